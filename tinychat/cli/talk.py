"""`tinychat chat`: a conversation in the terminal."""
import sys
from contextlib import closing
from pathlib import Path

from tinychat.cli.commands import fetched, load_shown
from tinychat.cli.settings import decide
from tinychat.cli.terminal import one_line, printable, say
from tinychat.errors import InvalidRequest, ModelNotFound, TinychatError

HELP = """\
/help           this list
/clear          forget the conversation
/image FILE     the next message shows this image, after those named before
/system TEXT    the system prompt from now on; without a text: none
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer; what was stopped is not part of the conversation."""


def chat(args) -> int:
    from tinychat.library import Library
    from tinychat.store import Store

    with Library(**decide(args).of("library"), parallel=1) as library, closing(Store()) as store:
        name, text = model_and_text(library, args.words)
        if not text and not sys.stdin.isatty():
            text = sys.stdin.read()
            if not text.strip():
                raise TinychatError("expected a text on standard input, got none")
        key = fetched(library, name).key
        load_shown(library, key)
        talk = Talk(library, store, key, system=args.system, temperature=args.temperature,
                    max_output_tokens=args.max_output_tokens)
        for path in args.image:
            talk.take_image(path)
        if text:
            return 0 if talk.answer(text) else 1
        talk.converse()
        return 0


def model_and_text(library, words: list[str]) -> tuple[str, str]:
    """The first word is the model when one or a file is called so; else all words are the text."""
    from tinychat.library import catalog, default_model
    if not words:
        return default_model(), ""
    first, rest = words[0], " ".join(words[1:])
    is_path = first.endswith(".gguf") and (Path(first).is_file() or " " not in first)
    if is_path or first in catalog():
        return first, rest
    try:
        library.find(first)
        return first, rest
    except ModelNotFound:
        return default_model(), " ".join(words)


class Talk:
    """One conversation: answers on standard output, reasoning and remarks on standard error."""

    def __init__(self, library, store, key: str, *, system: str | None, **fields):
        self.library, self.store, self.key = library, store, key
        self.fields = {"system_prompt": system, **fields}
        self.last_id: str | None = None
        self.images: list[str] = []  # data URLs that go with the next message

    def take_image(self, path: str) -> None:
        """Raises: InvalidRequest for what is no image, or a model that could not see it."""
        from tinychat import images

        if not self.library.find(self.key).sees:
            raise InvalidRequest(f"{self.key} cannot see images")
        try:
            found = Path(path).expanduser()
        except RuntimeError as error:  # of ~somebody who is not known
            raise InvalidRequest(f"{path}: {error}") from None
        data = images.load(found)
        images.decode(data)
        self.images.append(images.data_url(data))

    def converse(self) -> None:
        """Read lines until the end of input or /exit."""
        try:
            import readline  # noqa: F401  gives input() a history and editing keys
        except ImportError:
            pass
        say(f"{self.key}; /help lists the commands")
        while True:
            try:
                line = prompt("> ").strip()
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("\nCtrl-D or /exit leaves")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.reply(line)

    def reply(self, text: str) -> None:
        """An answer that Ctrl-C stops, and nothing but the answer."""
        try:
            self.answer(text)
        except KeyboardInterrupt:
            say("(stopped)")

    def command(self, line: str) -> None:
        word, _, text = line.partition(" ")
        if word == "/help":
            say(HELP)
        elif word == "/clear":
            self.last_id, self.images = None, []
            say("the conversation is forgotten")
        elif word == "/image":
            try:
                self.take_image(text.strip())
                say(f"{len(self.images)} images go with the next message" if self.images[1:]
                    else "the image goes with the next message")
            except TinychatError as error:
                say(f"tinychat: {one_line(error)}")
        elif word == "/system":
            self.fields["system_prompt"] = text.strip()
            say("system prompt set" if text.strip() else "no system prompt")
        else:
            say(f"{word} is no command; /help lists them")

    def answer(self, text: str) -> bool:
        """Stream one answer. Returns whether it came to its end; Ctrl-C goes to the caller."""
        from tinychat.api import chat_request
        from tinychat.chat import run

        screen = Screen()
        try:
            seen = [{"type": "image", "data_url": url} for url in self.images]
            request = chat_request(model=self.key, input=[*seen, text] if seen else text,
                                   previous_response_id=self.last_id, **self.fields)
            with closing(run(self.library, self.store, request)) as events:
                for event in events:
                    screen.show(event)
            if screen.error is None:
                self.last_id, self.images = screen.result["response_id"], []
                return True
            self.fail(screen.error)
        except TinychatError as error:
            self.fail(error)
        except KeyboardInterrupt:
            screen.end_line()
            raise
        return False

    def fail(self, error: TinychatError | str) -> None:
        """Images that may be what was wrong do not come back with the next message."""
        say(f"tinychat: {one_line(error)}")
        if self.images:
            self.images = []
            say("the images were let go of")


class Screen:
    """Shows events as they come. A terminal gets no control characters that a model made up."""

    def __init__(self):
        self.error: str | None = None
        self.result: dict | None = None
        self._stream, self._at_line_start = sys.stdout, True
        self._safe = sys.stdout.isatty()

    def show(self, event: dict) -> None:
        kind = event["type"]
        if kind == "message.delta":
            self._write(sys.stdout, event["content"])
        elif kind == "reasoning.delta":
            self._write(sys.stderr, event["content"])
        elif kind in ("message.end", "reasoning.end"):
            self.end_line()
        elif kind == "error":
            self.error = event["error"]["message"]
        elif kind == "chat.end":
            self.result = event["result"]

    def _write(self, stream, text: str) -> None:
        stream.write(printable(text) if self._safe else text)
        stream.flush()
        self._stream, self._at_line_start = stream, text.endswith("\n")

    def end_line(self) -> None:
        if not self._at_line_start:
            self._write(self._stream, "\n")


def prompt(text: str) -> str:
    """input(), whose own prompt would go to standard output when that is no terminal."""
    if sys.stdout.isatty():
        return input(text)
    sys.stderr.write(text)
    sys.stderr.flush()
    return input()

"""Messages and tools -> the prompt, by the model's own chat template.

A template that fails is an error with its line; no other form is tried behind the user's back.
"""
import json
import re
from collections.abc import Iterator
from datetime import date
from functools import cached_property
from traceback import clear_frames
from typing import Any

import jinja2

from tinychat.errors import InvalidRequest, TemplateError
from tinychat.text import sandbox, split

# Round control tokens that a stranger wrote into a text; dropped where they come in from outside.
MARK_OPEN, MARK_CLOSE = "\U00100000", "\U00100001"
_MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
_MARKED = re.compile(f"{MARK_OPEN}([^{MARK_OPEN}{MARK_CLOSE}]*){MARK_CLOSE}")
THINKING = ("enable_thinking", "thinking")  # both names are in use
_NEEDLE = "Needle7Haystack"
_SPECIAL_TYPES = (2, 3, 4)  # tokenizer.ggml.token_type: unknown, control, user-defined


def render(template: str, messages: list[dict], tools: list[dict] | None = None,
           bos_token: str = "", eos_token: str = "", **kwargs) -> str:
    """One prompt from the text of a template; `ChatTemplate` keeps what it compiled."""
    chat_template = ChatTemplate(template, bos_token=bos_token, eos_token=eos_token)
    return chat_template.render(messages, tools, **kwargs)


def source_of(metadata: dict[str, Any]) -> str | None:
    """The text of a file's chat template; None when it has none."""
    return (_text(metadata, "tokenizer.chat_template")
            or _text(metadata, "tokenizer.chat_template.default"))


def _text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


class ChatTemplate:
    """A model's chat template and its variant for tools, compiled at the first use.

    special: texts of the control and user-defined tokens, which text from outside must not become.
    Raises: TemplateError from `render` and `encode`, with the template's line.
    """

    def __init__(self, source: str | None, *, tool_use: str | None = None, bos_token: str = "",
                 eos_token: str = "", special: list[str] = ()):
        self.source = source
        self.bos_token, self.eos_token = bos_token, eos_token
        self._plain = _Program(source)
        self._with_tools = _Program(tool_use) if tool_use else self._plain
        self._hits = _TextFinder(special)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], tokenizer) -> "ChatTemplate":
        """A file without a template is no error before a chat is rendered: it can complete text."""
        def token(token_id):
            return "" if token_id is None else tokenizer.tokens[token_id]

        types = metadata.get("tokenizer.ggml.token_type", ())
        return cls(source_of(metadata),
                   tool_use=_text(metadata, "tokenizer.chat_template.tool_use"),
                   bos_token=token(tokenizer.bos_id), eos_token=token(tokenizer.eos_id),
                   special=[token for token, kind in zip(tokenizer.tokens, types)
                            if kind in _SPECIAL_TYPES])

    def render(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> str:
        """The prompt as text. kwargs go to the template: enable_thinking, reasoning_effort, …"""
        program = self._with_tools if tools else self._plain
        messages = [_neutral(message) for message in messages]
        if messages and messages[0]["role"] == "system" and not program.shows_system(self):
            messages = _system_into_user(messages)
        return program.render(self.context(program, messages, tools, kwargs))

    @cached_property
    def reasoning_markers(self) -> tuple[str, str] | None:
        """What opens and closes the model's thoughts, for `split.Splitter`."""
        return split.reasoning_markers(self.source or "")

    @cached_property
    def reasoning(self) -> dict[str, Any] | None:
        """The contract's capability, found by rendering with the switch on and off."""
        if self._plain.switches_thinking(self):
            default = "on" if self._plain.thinks_by_default(self) else "off"
            return {"allowed_options": ["off", "on"], "default": default}
        return {"allowed_options": ["on"], "default": "on"} if self.reasoning_markers else None

    def context(self, program: "_Program", messages: list[dict], tools: list[dict] | None,
                kwargs: dict) -> dict[str, Any]:
        """The variables a template sees: copies, since it may change lists."""
        context = {"messages": _copied(messages), "add_generation_prompt": True,
                   "bos_token": self.bos_token, "eos_token": self.eos_token,
                   "date_string": date.today().strftime("%d %b %Y"),
                   "datetime": date.today().strftime("%b %d %Y")}
        if tools:  # three templates fail on none
            context["tools"] = [_whole_tool(tool) for tool in _copied(tools)]
            context["functions"] = json.dumps(context["tools"], ensure_ascii=False, indent=4)
        context.update(_copied(kwargs))
        asked = [kwargs[name] for name in THINKING if kwargs.get(name) is not None]
        thinking = asked[0] if asked else program.thinks_by_default(self)
        context.update({name: thinking for name in THINKING if kwargs.get(name) is None})
        return context

    def pieces(self, messages: list[dict], tools: list[dict] | None = None,
               **kwargs) -> list[tuple[str, bool]]:
        """The prompt cut into (text, is_structure) round control tokens that came from outside.

        A piece that is no structure begins with such a text and reaches to the next real token.
        """
        marked = _copied([messages, tools], self._hits.mark)
        prompt, pieces, pos = self.render(*marked, **kwargs), [], 0
        for mark in (MARK_OPEN, MARK_CLOSE):  # a template may ask `tojson` for ASCII
            prompt = prompt.replace(json.dumps(mark)[1:-1], mark)
        for match in _MARKED.finditer(prompt):
            # A template that splits at a marked tag leaves its marks round what it writes itself.
            if match[1] in self._hits.texts:
                self._add_structure(pieces, prompt[pos:match.start()])
                _add(pieces, match[1], False)
                pos = match.end()
        self._add_structure(pieces, prompt[pos:])
        return pieces

    def _add_structure(self, pieces: list[tuple[str, bool]], text: str) -> None:
        text = _MARKS.sub("", text)
        start, _ = next(self._hits.spans(text), (len(text), None)) if pieces else (0, None)
        _add(pieces, text[:start], False)
        _add(pieces, text[start:], True)

    def encode(self, messages: list[dict], tokenizer, tools: list[dict] | None = None,
               **kwargs) -> list[int]:
        """The prompt as token ids, BOS exactly once where the model wants one."""
        ids = []
        for text, is_structure in self.pieces(messages, tools, **kwargs):
            if is_structure:
                ids += tokenizer.encode(text, special=True)
            else:  # NOTE: `encode` finds user-defined tokens in any case
                ids += tokenizer.encode_plain(text, after_special=not ids)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids


class _Program:
    """One compiled template, and what was found out by rendering small chats with it."""

    def __init__(self, source: str | None):
        self.source = source
        self._shows_system: bool | None = None
        self._switches: bool | None = None
        self._thinks = True

    @cached_property
    def template(self) -> jinja2.Template:
        if self.source is None:
            raise TemplateError("the model file has no chat template (tokenizer.chat_template), "
                                "so it cannot chat")
        try:
            return sandbox.ChatEnvironment().from_string(self.source)
        except Exception as error:  # deep nesting ends in errors of Python's own compiler
            raise _template_error(error) from None

    def render(self, context: dict[str, Any]) -> str:
        template = self.template
        token = sandbox.budget.set(sandbox.Budget())
        try:
            return template.render(context)
        except Exception as error:  # a template can raise whatever Python can
            failure = _template_error(error)
            clear_frames(error.__traceback__)  # else its variables would wait for the collector
            raise failure from None
        finally:
            sandbox.budget.reset(token)

    def shows_system(self, owner: ChatTemplate) -> bool:
        """Does a system text reach the prompt? Gemma 2 raises, some templates drop it."""
        if self._shows_system is None:
            chat = [{"role": "system", "content": _NEEDLE}, {"role": "user", "content": "Hello"}]
            try:
                self._shows_system = _NEEDLE in self.render(owner.context(self, chat, None, {}))
            except TemplateError:
                self._shows_system = False
        return self._shows_system

    def thinks_by_default(self, owner: ChatTemplate) -> bool:
        """What leaving the switch undefined means to this template; on, when it is neither."""
        self.switches_thinking(owner)
        return self._thinks

    def switches_thinking(self, owner: ChatTemplate) -> bool:
        """Does the switch change the prompt?"""
        if self._switches is None:
            chat = [{"role": "user", "content": "Hello"}]
            off = owner.context(self, chat, None, dict.fromkeys(THINKING, False))
            on = off | dict.fromkeys(THINKING, True)
            plain = {name: value for name, value in off.items() if name not in THINKING}
            try:
                off, on, plain = map(self.render, (off, on, plain))
            except TemplateError:
                off = on = plain = ""
            self._thinks, self._switches = plain == on or plain != off, on != off
        return self._switches


def _template_error(error: Exception) -> TemplateError:
    """The template's own words or the failure's, and the line."""
    line, traceback = getattr(error, "lineno", None), error.__traceback__
    while traceback:  # the innermost line of the template counts
        template = traceback.tb_frame.f_globals.get("__jinja_template__")
        if template and traceback.tb_frame.f_code.co_filename == "<template>":
            line = template.get_corresponding_lineno(traceback.tb_lineno)
        traceback = traceback.tb_next
    where = f"line {line} of the chat template" if line else "the chat template"
    if isinstance(error, sandbox.Refusal):
        return TemplateError(f"{where} refuses this conversation: {error}")
    if isinstance(error, RecursionError):
        return TemplateError(f"{where}: recursion without end, or nesting too deep")
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return TemplateError(f"{where}: {kind}{error}")


# Messages and tools in the form that all templates understand

def _neutral(message: dict) -> dict:
    """Content is never missing, and reasoning has all of its three names."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"expected a message with a role, got {str(message):.100}",
                             param="messages")
    message = {**message, "content": "" if message.get("content") is None else message["content"]}
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        message.update(thinking=reasoning, reasoning=reasoning)
    return message


def _whole_tool(tool: dict) -> dict:
    """Ten templates fail without a description or parameters."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise InvalidRequest(f"expected a tool with a function, got {str(tool):.100}", param="tools")
    function = {"description": "", "parameters": {"type": "object", "properties": {}},
                **tool["function"]}
    return {**tool, "function": function}


def _system_into_user(messages: list[dict]) -> list[dict]:
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [{**system, "role": "user"}, *rest]
    content = rest[first]["content"]
    if isinstance(content, str):
        content = f"{system['content']}\n\n{content}"
    else:
        content = [{"type": "text", "text": f"{system['content']}\n\n"}, *content]
    return [*rest[:first], {**rest[first], "content": content}, *rest[first + 1:]]


def _copied(value, change=str):
    """A copy of JSON-like data with each text in it changed, names of properties too."""
    try:
        return _map_texts(value, change)
    except RecursionError:
        raise TemplateError("messages or tools are nested too deeply for a chat template") from None


def _map_texts(value, change):
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, change) for item in value]
    return value


# Text from outside is never structure

def _add(pieces: list[tuple[str, bool]], text: str, is_structure: bool) -> None:
    if not text:
        return
    if pieces and pieces[-1][1] == is_structure:
        pieces[-1] = pieces[-1][0] + text, is_structure
    else:
        pieces.append((text, is_structure))


class _TextFinder:
    """Finds any of some thousand texts, the longest first; one alternation of them all crawls."""

    def __init__(self, texts: list[str]):
        # Runs of white space are tokens of their own in some vocabularies, and structure in none.
        self.texts = {text for text in texts if text.strip(" \t\r\n▁")}
        self.lengths = sorted({len(text) for text in self.texts}, reverse=True)
        starts = "|".join(re.escape(start) for start in sorted({text[:2] for text in self.texts}))
        self.starts = re.compile(starts or "(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of each hit, from left to right."""
        pos = 0
        while match := self.starts.search(text, pos):
            start = match.start()
            stop = self._stop(text, start)
            if stop:
                yield start, stop
            pos = stop or start + 1

    def mark(self, text: str) -> str:
        """`text` with the marks round each hit, and none that it brought along."""
        text, parts, done = _MARKS.sub("", text), [], 0
        for start, stop in self.spans(text):
            parts += [text[done:start], MARK_OPEN, text[start:stop], MARK_CLOSE]
            done = stop
        return "".join([*parts, text[done:]])

    def _stop(self, text: str, start: int) -> int | None:
        for n in self.lengths:
            if text[start:start + n] in self.texts:
                return start + n
        return None

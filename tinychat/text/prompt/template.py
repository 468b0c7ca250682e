"""Messages and tools -> the prompt, by the model's own chat template.

A template that fails is an error with its line; no other form is tried behind the user's back.
"""
import json
import time
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np

from tinychat.errors import TemplateError
from tinychat.text.prompt import needles
from tinychat.text.prompt.forms import copied, neutral, whole_tool
from tinychat.text.prompt.outside import (
    IMAGE, MARKED, MARKS, TextFinder, add_piece, numbered, with_image_marks)
from tinychat.text.prompt.parts import (
    IMAGE_PART, image_marks, in_parts, kept_apart, text_part, with_marks, written_image)
from tinychat.text.prompt.prepare import prepared
from tinychat.text.prompt.program import Program
from tinychat.text.prompt.switches import SUFFIX, THINKING, Switches, find_switches
from tinychat.text.prompt.traits import Traits
from tinychat.text.reply.format import Format
from tinychat.text.reply.known import REASONING_PAIRS
from tinychat.text.reply.literals import common_prefix
from tinychat.text.reply.parser import reasoning_in
from tinychat.text.reply.probe import probe

PROBE_S = 1.0        # for one small rendering, which takes some milliseconds
MAX_PROBING_S = 3.0  # for some sixty of them
_ABOUT_REASONING = ("think", "reason", "THINK", "inner_prefix", "<|channel|>", ">>>all")
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
        self._plain = _Variant(source, self)
        self._with_tools = _Variant(tool_use, self) if tool_use else self._plain
        self._hits = TextFinder(special)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], tokenizer) -> "ChatTemplate":
        """A file without a template is no error before a chat is rendered: it can complete text."""
        def token(token_id):
            return "" if token_id is None else tokenizer.tokens[token_id]

        types = metadata.get("tokenizer.ggml.token_type", ())[:len(tokenizer.tokens)]
        special = np.flatnonzero(np.isin(types, _SPECIAL_TYPES))
        return cls(source_of(metadata),
                   tool_use=_text(metadata, "tokenizer.chat_template.tool_use"),
                   bos_token=token(tokenizer.bos_id), eos_token=token(tokenizer.eos_id),
                   special=[tokenizer.tokens[id] for id in special])

    def render(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> str:
        """The prompt as text. kwargs go to the template: enable_thinking, reasoning_effort, …"""
        variant = self._with_tools if tools else self._plain
        return variant.render([neutral(message) for message in messages],
                              [whole_tool(tool) for tool in tools] if tools else None, kwargs)

    # -- what the template can do

    @cached_property
    def format(self) -> Format:
        """How a model with this template writes reasoning and calls, found by rendering."""
        variant = self._with_tools
        return probe(variant.show, variant.program.source or "",
                     arguments_as_text=variant.traits.arguments_as_text)

    @property
    def switches(self) -> Switches:
        """The settings of `reasoning` that change the prompt."""
        return self._plain.switches

    @cached_property
    def reasoning(self) -> dict[str, Any] | None:
        """The contract's capability; None for a model whose thoughts could not be told apart."""
        source = self.source or ""
        if not any(word in source for word in _ABOUT_REASONING):
            return None  # nothing to find: listing many models need not try each template out
        opens = (any(marker in source for pair in REASONING_PAIRS for marker in pair)
                 or bool(self.format.frame) or reasoning_in(self.prefill(),
                                                            *self.format.reasoning)[0])
        return self.switches.capability(opens)

    def prefill(self, messages: list[dict] = (), tools: list[dict] | None = None,
                **kwargs) -> str:
        """The part of a prompt that belongs to the assistant's turn, where a template may have
        begun the reasoning; messages: of the chat, of which only the last one's role matters."""
        variant = self._with_tools if tools else self._plain
        after_result = bool(messages) and messages[-1].get("role") == "tool"
        return variant.prefill(after_result, kwargs)

    # -- encoding

    def context(self, messages: list[dict], tools: list[dict] | None, kwargs: dict,
                ) -> dict[str, Any]:
        """The variables a template sees: copies, since it may change lists."""
        context = {"messages": copied(messages), "add_generation_prompt": True,
                   "bos_token": self.bos_token, "eos_token": self.eos_token,
                   "date_string": date.today().strftime("%d %b %Y"),
                   "datetime": date.today().strftime("%b %d %Y")}
        if tools:  # three templates fail on none
            context["tools"] = copied(tools)
            context["functions"] = json.dumps(context["tools"], ensure_ascii=False, indent=4)
        context.update(copied(kwargs))
        return context

    def pieces(self, messages: list[dict], tools: list[dict] | None = None,
               **kwargs) -> list[tuple[str, bool]]:
        """The prompt cut into (text, is_structure) round control tokens that came from outside.

        A piece that is no structure begins with such a text and reaches to the next real token.
        Images, parts of a content that is a list, are marks with their numbers in it.
        """
        messages, tools = copied([numbered(messages), tools], self._hits.mark)
        prompt, pieces, pos = self.render(with_image_marks(messages), tools, **kwargs), [], 0
        for match in MARKED.finditer(prompt):
            # A template that splits at a marked tag leaves its marks round what it writes itself.
            if match[1] in self._hits.texts:
                self._add_structure(pieces, prompt[pos:match.start()])
                add_piece(pieces, match[1], False)
                pos = match.end()
        self._add_structure(pieces, prompt[pos:])
        return pieces

    def _add_structure(self, pieces: list[tuple[str, bool]], text: str) -> None:
        text = MARKS.sub("", text)
        start, _ = next(self._hits.spans(text), (len(text), None)) if pieces else (0, None)
        add_piece(pieces, text[:start], False)
        add_piece(pieces, text[start:], True)

    def encode(self, messages: list[dict], tokenizer, tools: list[dict] | None = None,
               **kwargs) -> list[int]:
        """The prompt as token ids, BOS exactly once where the model wants one."""
        return self.encode_seen(messages, tokenizer, [], tools, **kwargs)[0]

    def encode_seen(self, messages: list[dict], tokenizer, images: list[list[str | int]],
                    tools: list[dict] | None = None, placeholder_id: int = 0,
                    **kwargs) -> tuple[list[int], list[tuple[int, int, int]]]:
        """As `encode`, for contents that are lists with images in them.

        images: of each, in the order of the chat, the parts that stand for it: structural text,
        or how many tokens are seen there. Returns the ids, with the placeholder's where something
        is seen, and (image, part, first token) of each such run, in order.
        """
        ids, runs = [], []
        for piece, kind in _laid_out(self.pieces(messages, tools, **kwargs), images):
            if kind is True:
                ids += tokenizer.encode(piece, special=True)
            elif kind is False:  # NOTE: `encode` finds user-defined tokens in any case
                ids += tokenizer.encode_plain(piece, after_special=not ids)
            else:
                runs.append((*kind, len(ids)))
                ids += [placeholder_id] * piece
        if {image for image, _, _ in runs} != set(range(len(images))):
            raise TemplateError("the chat template leaves out an image of the chat")
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
            runs = [(image, part, first + 1) for image, part, first in runs]
        return ids, runs

    def tail(self, messages: list[dict], news: list[dict], end: str, tokenizer,
             tools: list[dict] | None = None, **kwargs) -> list[int] | None:
        """The ids that follow the assistant's message in the prompt with `news`, which begins with
        it; None where the template does not simply append.

        end: the text of the token that ended that message; the model has written it already.
        """
        before = self._plain_text(messages, tools, kwargs)
        said = self._plain_text([*messages, news[0]], tools, {**kwargs,
                                                              "add_generation_prompt": False})
        pieces = self.pieces([*messages, *news], tools, **kwargs)
        whole = "".join(text for text, _ in pieces)
        start = common_prefix(before, whole)
        at = whole.rfind(end, start, common_prefix(said, whole))
        if at < 0 or start < common_prefix(before, said):
            return None
        n, ids = at + len(end), []
        for text, is_structure in pieces:
            rest, n = text[n:], max(n - len(text), 0)
            if rest and is_structure:
                ids += tokenizer.encode(rest, special=True)
            elif rest:
                ids += tokenizer.encode_plain(rest, after_special=not ids)
        return ids

    def _plain_text(self, messages: list[dict], tools: list[dict] | None, kwargs: dict) -> str:
        return "".join(text for text, _ in self.pieces(messages, tools, **kwargs))


def _laid_out(pieces: list[tuple[str, bool]], images: list[list[str | int]],
              ) -> list[tuple[str, bool] | tuple[int, tuple[int, int]]]:
    """The pieces, with an image's parts in the place of its mark: numbers with (image, part)."""
    out = []
    for text, is_structure in pieces:
        at = 0
        for match in IMAGE.finditer(text):
            add_piece(out, text[at:match.start()], is_structure)
            at, image = match.end(), int(match[1])
            for i, part in enumerate(images[image]):
                if isinstance(part, str):
                    add_piece(out, part, True)
                else:
                    out.append((part, (image, i)))
        add_piece(out, text[at:], is_structure)
    return out


class _Variant:
    """One of a file's templates, and what was found out by rendering small chats with it."""

    def __init__(self, source: str | None, owner: ChatTemplate):
        self.program, self._owner = Program(source), owner
        self.traits = Traits(self.show)
        self._prefills: dict[str, str] = {}
        self._probing_s = MAX_PROBING_S

    def show(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> str:
        """Renders small chats as they are: what the template does with them is what is asked.

        All of them together have so many seconds: a template that loops shows nothing.
        """
        return self._try(in_parts(messages) if self.takes_parts_only else messages, tools,
                         **kwargs)

    def _try(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> str:
        if self._probing_s <= 0:
            raise TemplateError("the chat template is too slow to be tried out")
        began = time.thread_time()  # a busy machine must not make a template another one
        try:
            return self.program.render(self._owner.context(messages, tools, kwargs), PROBE_S)
        finally:
            took = time.thread_time() - began
            self._probing_s -= took if took < PROBE_S / 2 else MAX_PROBING_S

    @cached_property
    def takes_parts_only(self) -> bool:
        """Does a content that is a text vanish where a list with that text is shown?"""
        return (needles.USER not in self._question(needles.USER)
                and needles.USER in self._question([text_part(needles.USER)]))

    @cached_property
    def written_image(self) -> str:
        """How a template that takes parts only writes an image; "" if it does not."""
        text = text_part(needles.USER)
        return written_image(self._question([text]), self._question([IMAGE_PART, text]))

    def _question(self, content: str | list[dict]) -> str:
        return needles.rendered_chat(self._try, [{**needles.QUESTION, "content": content}])

    def render(self, messages: list[dict], tools: list[dict] | None, kwargs: dict) -> str:
        variables = {name: value for name, value in kwargs.items() if name != SUFFIX}
        if suffix := kwargs.get(SUFFIX):
            messages = _with_suffix(messages, suffix)
        messages, tools = prepared(messages, tools, self.traits, self._owner)
        variables = {**self._thinking(variables), **variables}
        if not self.takes_parts_only:
            return self.program.render(self._owner.context(messages, tools, variables))
        marks = image_marks(messages)
        written = self.written_image if marks else ""
        if written:
            messages = kept_apart(messages, written)
        prompt = self.program.render(self._owner.context(in_parts(messages), tools, variables))
        return with_marks(prompt, marks, written) if written else prompt

    def _thinking(self, kwargs: dict) -> dict[str, Any]:
        """Both names of the switch: undefined they mean on, off or a third thing."""
        asked = [kwargs[name] for name in THINKING if kwargs.get(name) is not None]
        thinking = asked[0] if asked else self.switches.default != "off"
        return {name: thinking for name in THINKING if kwargs.get(name) is None}

    @cached_property
    def switches(self) -> Switches:
        format = self._owner.format

        def closes(prompt: str) -> bool:
            return reasoning_in(prompt, *format.reasoning)[1]

        return find_switches(lambda messages, variables: self.show(messages, **variables), closes)

    def prefill(self, after_result: bool, kwargs: dict) -> str:
        key = json.dumps([after_result, kwargs], sort_keys=True, default=str)
        if key not in self._prefills:
            calls = [needles.assistant("", needles.call(0)), needles.result()]
            messages = [needles.QUESTION, *(calls if after_result else ())]
            try:
                text = self.render(messages, needles.BOTH_TOOLS[:1] if after_result else None,
                                   kwargs)
            except TemplateError:
                text = ""
            needle = needles.RESULT if after_result else needles.USER
            self._prefills[key] = text.rpartition(needle)[2] if needle in text else ""
        return self._prefills[key]


def _with_suffix(messages: list[dict], suffix: str) -> list[dict]:
    """A switch of the template's that stands at the end of the system text."""
    if messages and messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        system, *rest = messages
        return [{**system, "content": f"{system['content']} {suffix}".strip()}, *rest]
    return [{"role": "system", "content": suffix}, *messages]

"""Templates that show a content only when it is a list of parts (SmolVLM, LLaVA).

A text that such a template is given as a string vanishes without an error, and an image is written
as a text of the template's own, in whose place the number of the image has to come.
"""
import re
from collections.abc import Callable

from tinychat.errors import TemplateError
from tinychat.text.prompt.outside import IMAGE, MARK_CLOSE, MARK_OPEN
from tinychat.text.reply.literals import common_prefix, n_common_end

IMAGE_PART = {"type": "image"}


def in_parts(messages: list[dict]) -> list[dict]:
    """Each content that is a text becomes a list of its parts; images are found by their marks."""
    return _with_texts(messages, _parts)


def _with_texts(messages: list[dict], change: Callable[[str], str | list[dict]]) -> list[dict]:
    return [{**message, "content": change(message["content"])}
            if isinstance(message.get("content"), str) else message for message in messages]


def _parts(content: str) -> list[dict]:
    parts, at = [], 0
    for match in IMAGE.finditer(content):
        parts += [text_part(content[at:match.start()]), IMAGE_PART]
        at = match.end()
    parts.append(text_part(content[at:]))
    return [part for part in parts if part is IMAGE_PART or part["text"]] or [text_part("")]


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def written_image(without: str, with_image: str) -> str:
    """How a template writes an image: two renderings differ by it."""
    n = common_prefix(without, with_image)
    n_end = min(n_common_end(without, with_image), len(without) - n)
    return with_image[n:len(with_image) - n_end].strip()


def kept_apart(messages: list[dict], written: str) -> list[dict]:
    """Where a text from outside spells an image as the template would, a pair of marks cuts it."""
    cut = written[:1] + MARK_OPEN + MARK_CLOSE + written[1:]
    return _with_texts(messages, lambda text: _foreign(written).sub(lambda _: cut, text))


def image_marks(messages: list[dict]) -> list[str]:
    return [match[0] for message in messages if isinstance(message.get("content"), str)
            for match in IMAGE.finditer(message["content"])]


def with_marks(prompt: str, marks: list[str], written: str) -> str:
    """The prompt with the images' marks where the template wrote them, in the order of the chat."""
    pieces = _foreign(written).split(prompt)
    if len(pieces) != len(marks) + 1:
        raise TemplateError("the chat template leaves out an image of the chat")
    return "".join(text for pair in zip(pieces, [*marks, ""]) for text in pair)


def _foreign(written: str) -> re.Pattern:
    """Not such a text that is marked as a control token from outside."""
    return re.compile(f"(?<!{MARK_OPEN}){re.escape(written)}")

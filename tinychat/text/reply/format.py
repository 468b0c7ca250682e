"""How a model writes what is not plain text: the parameters that a probe finds for a template."""
from dataclasses import dataclass

from tinychat.text.reply.grammars import Grammar, JsonCalls, NamedCalls, PythonCalls, TaggedCalls

DEFAULT_REASONING = ("<think>", "</think>")  # fine-tunes put it into templates that know none
FALLBACK = JsonCalls("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Format:
    """frame: "" or the name of a channel frame. reasoning: open (may be empty) and close.

    wrappers: markers round plain content, dropped. stops: texts that end the turn. result_open:
    what would begin a tool's result, which models invent after a call.
    """

    frame: str = ""
    reasoning: tuple[str, str] = DEFAULT_REASONING
    wrappers: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    result_open: str = ""
    calls: Grammar = FALLBACK

    def texts(self) -> str:
        """All literals together: a control token whose text is in here is spelled out."""
        calls = (value for value in vars(self.calls).values() if isinstance(value, str))
        return "\n".join([*self.reasoning, *self.wrappers, *self.stops, self.result_open, *calls,
                          *FRAME_TEXTS.get(self.frame, ())])


def is_silent(tokenizer, id: int, spelled: str) -> bool:
    """Does a token show nothing? Control tokens do, but for those that stand in `spelled`, the texts
    of a format: they are spelled out."""
    return tokenizer.is_control(id) and tokenizer.tokens[id] not in spelled


FRAME_TEXTS = {
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>",
                "<|return|>"),
    "functionary": (">>>",),
    "muse": ("<|start|>", "<|channel|>", "<|message|>", "<|eom|>", "<|end|>", "<|call|>"),
}

__all__ = ["DEFAULT_REASONING", "FALLBACK", "FRAME_TEXTS", "Format", "Grammar", "JsonCalls",
           "NamedCalls", "PythonCalls", "TaggedCalls", "is_silent"]

"""What comes of one run: the items of its text with their events, and the figures of `stats`."""
from dataclasses import dataclass


class Output:
    """Turns a splitter's pieces into text events and collects the items that they make.

    The splitter has kept the contract's rules on white space; here pieces of one channel become one
    item, and a run that shows nothing becomes one empty message.
    """

    def __init__(self):
        self.items: list[dict] = []
        self._open: str | None = None
        self._pieces: list[str] = []

    def feed(self, channel: str, text: str) -> list[dict]:
        """The events of one piece; channel is "reasoning" or "message"."""
        events = []
        if channel != self._open:
            events = [*self.close(), {"type": f"{channel}.start"}]
            self._open = channel
        self._pieces.append(text)
        return [*events, {"type": f"{channel}.delta", "content": text}]

    def close(self) -> list[dict]:
        """Ends the open item."""
        if self._open is None:
            return []
        kind, self._open = self._open, None
        self.items.append({"type": kind, "content": "".join(self._pieces)})
        self._pieces = []
        return [{"type": f"{kind}.end"}]

    def finish(self) -> list[dict]:
        """Ends a run that did not fail."""
        events = self.close()
        if self.items:
            return events
        self.items.append({"type": "message", "content": ""})
        return [{"type": "message.start"}, {"type": "message.end"}]


@dataclass
class Stats:
    """The figures of one request; times are time.perf_counter() seconds."""

    n_input: int = 0
    n_output: int = 0
    n_reasoning: int = 0
    prompt_started: float = 0.0
    prompt_done: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    load_time_s: float | None = None
    n_held: int = 0      # tokens since the last piece of reasoning: more of it, or its end marker
    in_reasoning: bool = False

    def token(self, t: float):
        self.n_output += 1
        self.first_token = self.first_token or t
        self.last_token = t

    def split(self, channels: list[str], n: int = 1):
        """Counts `n` tokens as reasoning or not, by the channels of the text that they released."""
        if self.in_reasoning or "reasoning" in channels:
            self.n_held += n
        if "reasoning" in channels:  # text that was held to the end has been some token's
            self.n_reasoning += self.n_held or self.n_reasoning == 0
            self.n_held = 0
        if channels:
            self.in_reasoning = channels[-1] == "reasoning"
            self.n_held *= self.in_reasoning

    @property
    def decode_rate(self) -> float:
        """Tokens per second from the end of the prompt to the last token, 0 without tokens."""
        elapsed = max(self.last_token - self.prompt_done, 1e-6)
        return self.n_output / elapsed if self.n_output else 0.0

    def to_json(self) -> dict:
        wait = max(self.first_token - self.prompt_started, 0.0) if self.n_output else 0.0
        stats = {"input_tokens": self.n_input, "total_output_tokens": self.n_output,
                 "reasoning_output_tokens": self.n_reasoning,
                 "tokens_per_second": self.decode_rate, "time_to_first_token_seconds": wait}
        if self.load_time_s is not None:
            stats["model_load_time_seconds"] = self.load_time_s
        return stats

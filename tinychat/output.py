"""What comes of one run: its items with their events, and the figures of `stats`."""
from dataclasses import dataclass


class Output:
    """Turns a parser's pieces and calls into events, and collects the items that they make.

    The parser has kept the contract's rules on white space; here pieces of one channel become one
    item, and a run that shows nothing becomes one empty message.
    """

    def __init__(self):
        self.items: list[dict] = []
        self._open: str | None = None
        self._pieces: list[str] = []
        self._call: dict | None = None  # tool, provider_info, then arguments

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

    # -- tool calls, one after the other

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def begin_call(self, tool: str, provider_info: dict) -> list[dict]:
        self._call = {"tool": tool, "provider_info": provider_info}
        return [*self.close(), {"type": "tool_call.start", **self._call}]

    def call_arguments(self, arguments: dict) -> dict:
        self._call["arguments"] = arguments
        return {"type": "tool_call.arguments", **self._call}

    def end_call(self, output: str) -> dict:
        """The tool has answered."""
        call, self._call = {**self._call, "output": output}, None
        self.items.append({"type": "tool_call", **call})
        return {"type": "tool_call.success", **call}

    def fail_call(self, reason: str, metadata: dict) -> list[dict]:
        """The call was never made."""
        self._call = None
        events = self.close()
        self.items.append({"type": "invalid_tool_call", "reason": reason, "metadata": metadata})
        return [*events, {"type": "tool_call.failure", "reason": reason, "metadata": metadata}]

    def finish(self) -> list[dict]:
        """Ends a run that did not fail."""
        events = self.close()
        if self.items:
            return events
        self.items.append({"type": "message", "content": ""})
        return [{"type": "message.start"}, {"type": "message.end"}]


@dataclass
class Stats:
    """The figures of one request; times are time.perf_counter() seconds.

    n_input: tokens of the first prompt. The others are sums over the rounds.
    """

    n_input: int = 0
    n_cached: int = 0
    n_output: int = 0
    n_reasoning: int = 0
    first_started: float = 0.0   # the first prompt's start, and the first token of all
    first_token: float = 0.0
    load_time_s: float | None = None
    _started: float = 0.0        # of this round
    _prompt_done: float = 0.0
    _last_token: float = 0.0
    _decode_s: float = 0.0       # of the rounds before
    _prefill: tuple[int, float] = (0, 0.0)

    def begin_prompt(self, t: float):
        self.first_started = self.first_started or t
        self._decode_s += self._round_s()
        self._started, self._prompt_done = t, 0.0

    def end_prompt(self, t: float, n_computed: int = 0):
        n, seconds = self._prefill
        self._prefill = n + n_computed, seconds + t - self._started
        self._prompt_done = self._last_token = t

    def token(self, t: float):
        self.n_output += 1
        self.first_token = self.first_token or t
        self._last_token = t

    def _round_s(self) -> float:
        return self._last_token - self._prompt_done if self._prompt_done else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second from the ends of the prompts to the last tokens, 0 without tokens."""
        elapsed = max(self._decode_s + self._round_s(), 1e-6)
        return self.n_output / elapsed if self.n_output else 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens per second that were computed of the prompts, 0 before the first was done."""
        n, seconds = self._prefill
        return n / max(seconds, 1e-6) if n else 0.0

    def to_json(self) -> dict:
        wait = max(self.first_token - self.first_started, 0.0) if self.n_output else 0.0
        stats = {"input_tokens": self.n_input, "total_output_tokens": self.n_output,
                 "reasoning_output_tokens": self.n_reasoning,
                 "tokens_per_second": self.decode_rate, "time_to_first_token_seconds": wait}
        if self.load_time_s is not None:
            stats["model_load_time_seconds"] = self.load_time_s
        return stats

"""Tokens per second of an engine: of a prompt, of streams together, and behind a long context."""
import numpy as np

from tinychat.engine.sequence import Finished, Sequence, Token
from tinychat.library import LoadedModel
from tinychat.ops.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
DECODE_PROMPT = 16  # tokens before the decoded ones


def measure_decoding(model: LoadedModel, n_prompt: int, n_generate: int, streams: list[int],
                     depths: list[int], seed: int) -> dict:
    """`seed` makes prompts that no page in memory knows.

    streams: numbers of sequences that decode together, of which all tokens count; depths: tokens of
    context before those that are decoded.
    """
    rng = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return rng.integers(model.program.n_vocab, size=n).tolist()

    def decode(n_past: int) -> float:
        _, times = _run(model, ids(n_past), n_generate + 1)
        return n_generate / (times[-1] - times[0])

    _run(model, ids(2), 2)  # touch everything once
    started, times = _run(model, ids(n_prompt), 1)
    found = {"prefill_tokens_per_second": n_prompt / (times[0] - started),
             "decode_tokens_per_second": decode(DECODE_PROMPT)}
    for n in streams:
        found[streams_key(n)] = _together(model, [ids(DECODE_PROMPT) for _ in range(n)],
                                          n_generate + 1)
    for n_past in depths:
        found[depth_key(n_past)] = decode(n_past)
    return found


def streams_key(n: int) -> str:
    return f"decode_tokens_per_second_of_{n}_streams"


def depth_key(n_past: int) -> str:
    return f"decode_tokens_per_second_after_{n_past}"


def _submit(model: LoadedModel, ids: list[int], n: int) -> Sequence:
    return model.engine.submit(ids, params=GREEDY, max_tokens=n)


def _times_of(sequence: Sequence) -> list[float]:
    """When each token came, in seconds."""
    times = []
    for update in sequence.updates():
        if isinstance(update, Token):
            times.append(update.t)
        elif isinstance(update, Finished) and update.error:
            raise update.error
    return times


def _run(model: LoadedModel, ids: list[int], n: int) -> tuple[float, list[float]]:
    """When the prompt began, and when each of `n` tokens came."""
    sequence = _submit(model, ids, n)
    times = _times_of(sequence)
    return sequence.t_started, times


def _together(model: LoadedModel, prompts: list[list[int]], n: int) -> float:
    """Tokens per second of all, while all of them decode."""
    times = [_times_of(sequence) for sequence in [_submit(model, ids, n) for ids in prompts]]
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    n_tokens = sum(begin < t <= end for each in times for t in each)
    return n_tokens / (end - begin) if end > begin else 0.0

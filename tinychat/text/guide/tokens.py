"""What a state lets a vocabulary say: each token is walked byte by byte, and all of them by a trie.

The tokens lie sorted by their bytes, so a trie is a list of its nodes in that order: each knows its
depth, its byte and where the nodes below it end. One walk over it makes a mask; a byte that is
impossible skips all tokens that share it.
"""
import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np

from tinychat.text.guide.automaton import State
from tinychat.text.reply.format import is_silent
from tinychat.text.tokenizer import Tokenizer

MAX_MASKS = 64             # 10 MB for a vocabulary of 150 000


class TokenTrie:
    """One per model; threads may share it. A token of no text is never allowed, and one that ends
    the generation is wherever a text may end.

    spelled: the literals of the model's format; control tokens with texts in there are read as the
    text they spell, and others have none.
    """

    def __init__(self, tokenizer: Tokenizer, spelled: str = ""):
        self._tokenizer = tokenizer
        self._ends = frozenset(tokenizer.eog_ids)
        self._mute = frozenset(id for id in range(tokenizer.n_vocab)
                               if is_silent(tokenizer, id, spelled))
        self._masks: OrderedDict[State, np.ndarray | None] = OrderedDict()
        self._lock = threading.Lock()

    def advance(self, state: State, id: int) -> State | None:
        """The state after a token (the same one after an end of generation); None: it is not
        allowed."""
        if id in self._ends:
            return state if state.done else None
        text = b"" if id in self._mute else self._tokenizer.token_bytes(id)
        return state.walk(text) if text else None

    def allowed(self, state: State, id: int) -> bool:
        return self.advance(state, id) is not None

    def mask(self, state: State) -> np.ndarray | None:
        """bool (n_vocab,), read-only: the tokens that are allowed. None: the vocabulary has none,
        and what cannot be followed has to be given up."""
        with self._lock:
            if state not in self._masks:
                self._masks[state] = self._walk(state)
                if len(self._masks) > MAX_MASKS:
                    self._masks.popitem(last=False)
            self._masks.move_to_end(state)
            return self._masks[state]

    def _walk(self, state: State) -> np.ndarray | None:
        nodes = self._nodes
        reached = np.zeros(len(nodes.bytes) + 1, bool)
        reached[nodes.reached(state)] = True
        mask = reached[nodes.of_token]
        mask[list(self._ends)] = state.done
        mask.flags.writeable = False
        return mask if mask.any() else None

    def prepare(self) -> "TokenTrie":
        """Builds what would else be built when it is first needed, in the middle of a step."""
        self._nodes
        return self

    @cached_property
    def _nodes(self) -> "_Nodes":
        """Built when first asked for: 150 000 tokens take half a second."""
        silent = self._ends | self._mute
        ids = [id for id in range(self._tokenizer.n_vocab) if id not in silent]
        return _Nodes({id: self._tokenizer.token_bytes(id) for id in ids}, self._tokenizer.n_vocab)


class _Nodes:
    """The nodes in the order of their texts. of_token: int32 (n_vocab,), the node where a token
    ends; for one of no text, or that ends the generation, the number of nodes."""

    def __init__(self, texts: dict[int, bytes], n_vocab: int):
        self.bytes: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []      # the node after all those below
        self.longest = max(map(len, texts.values()), default=0)
        ends_at: dict[int, int] = {}
        path: list[int] = []
        before = b""
        for text, id in sorted((text, id) for id, text in texts.items() if text):
            n = _n_common(before, text)
            for node in path[n:]:
                self.ends[node] = len(self.bytes)
            del path[n:]
            for depth in range(n, len(text)):
                path.append(len(self.bytes))
                self.bytes.append(text[depth])
                self.depths.append(depth)
                self.ends.append(0)
            ends_at[id] = path[-1]
            before = text
        for node in path:
            self.ends[node] = len(self.bytes)
        self.of_token = np.full(n_vocab, len(self.bytes), np.int32)
        self.of_token[list(ends_at)] = list(ends_at.values())

    def reached(self, state: State) -> list[int]:
        """The nodes whose text is possible from `state`."""
        bytes, depths, ends = self.bytes, self.depths, self.ends
        states = [state] * (self.longest + 1)  # after each depth
        found = []
        node = 0
        while node < len(bytes):
            depth, byte = depths[node], bytes[node]
            before = states[depth]
            # NOTE: `step` would say the same and keep a None for each byte it was asked about:
            # twice the time in most states, where few of 256 are possible.
            after = before.step(byte) if byte in before.possible else None
            if after is None:
                node = ends[node]
            else:
                states[depth + 1] = after
                found.append(node)
                node += 1
        return found


def _n_common(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

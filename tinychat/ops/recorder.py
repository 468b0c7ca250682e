"""The recorder that a model description writes to: the vocabulary of operations.

Shapes: T is the step's tokens, E n_embd, V n_vocab, K and N the columns and rows of a matrix. What
an operation computes is said in `meaning.py` and `mixers.py`, under its name.
"""
from collections.abc import Sequence

from tinychat.gguf_file import QTensor
from tinychat.ops.program import (
    Buffer, DeltaNet, Heads, Mamba2, Op, Program, Rope, Routing)

ACTIVATIONS = ("identity", "silu", "gelu", "gelu_erf", "gelu_quick", "relu", "relu2", "sigmoid",
               "silu_clamped")


class Recorder:
    """Each method records one operation and returns the buffer it fills.

    keeps_kv: False where all of a sequence comes in one step, as an encoder needs it: no later step
    looks back, and layers take turns in one KV layer.
    """

    def __init__(self, *, keeps_kv: bool = True):
        self._keeps_kv = keeps_kv
        self._ops: list[Op] = []
        self._buffers: list[Buffer] = []
        self._kv: list[Heads] = []
        self._states: list[int] = []
        self._input_width = self._n_axes = self._n_spans = 0

    def _record(self, name, width, inputs, weights=(), rows=None, **params) -> Buffer:
        rows = rows or (inputs[0].rows if inputs else "tokens")
        out = Buffer(len(self._buffers), width, f"b{len(self._buffers)}", rows)
        self._buffers.append(out)
        self._ops.append(Op(name, out, tuple(inputs), tuple(w for w in weights if w), params))
        return out

    # Rows in

    def embed(self, weight: QTensor) -> Buffer:
        """Rows of `weight (V, E)` at the batch's token ids -> (T, E)."""
        return self._record("embed", weight.shape[1], (), (weight,))

    def embed_positions(self, weight: QTensor) -> Buffer:
        """Rows of `weight (n, E)` at the tokens' positions, the last where it has no more."""
        return self._record("embed_positions", weight.shape[1], (), (weight,))

    def given(self, width: int, column: int = 0) -> Buffer:
        """Columns [column, column + width) of the batch's input row of each token -> (T, width);
        zeros for a token that has none."""
        self._input_width = max(self._input_width, column + width)
        return self._record("given", width, (), column=column)

    def place(self, x: Buffer, column: int = 0) -> Buffer:
        """x, but for tokens that have an input row: columns [column, column + x.width) of that."""
        self._input_width = max(self._input_width, column + x.width)
        return self._record("place", x.width, (x,), column=column)

    # Norms: over groups of len(weight), or of `group` values, of a row. A weight is as long as the
    # group or as the row.

    def rmsnorm(self, x: Buffer, weight: QTensor | None, eps: float, group: int = 0) -> Buffer:
        """x / sqrt(mean(x²) + eps) * weight."""
        return self._norm("rmsnorm", x, weight, None, eps, group)

    def layernorm(self, x: Buffer, weight: QTensor | None, bias: QTensor | None, eps: float,
                  group: int = 0) -> Buffer:
        """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, of the same length."""
        return self._norm("layernorm", x, weight, bias, eps, group)

    def _norm(self, name, x, weight, bias, eps, group) -> Buffer:
        group = group or (weight.shape[-1] if weight else x.width)
        assert x.width % group == 0, (x, weight, group)
        assert all(not w or _length(w) in (group, x.width) for w in (weight, bias)), (x, weight)
        assert weight or not bias, "a bias without a weight"
        return self._record(name, x.width, (x,), (weight, bias), eps=float(eps), group=group)

    # Products

    def linear(self, x: Buffer, weight: QTensor, bias: QTensor | None = None) -> Buffer:
        """x (T, K) @ weight (N, K)ᵀ + bias (N,) -> (T, N)."""
        assert weight.shape[1] == x.width, (x, weight)
        return self._record("linear", weight.shape[0], (x,), (weight, bias))

    def head_linear(self, x: Buffer, weight: QTensor) -> Buffer:
        """Each head by its own matrix: x (T, H*K), weight (H, N, K) -> (T, H*N)."""
        n_head, n_out, n_in = weight.shape
        assert x.width == n_head * n_in, (x, weight)
        return self._record("head_linear", n_head * n_out, (x,), (weight,))

    # Elementwise

    def activate(self, fn: str, x: Buffer) -> Buffer:
        """fn(x), one of ACTIVATIONS but the last."""
        assert fn in ACTIVATIONS[:-1], fn
        return self._record("activate", x.width, (x,), fn=fn)

    def gate(self, fn: str, gate: Buffer, up: Buffer) -> Buffer:
        """fn(gate) * up; "identity" makes it the plain product."""
        assert fn in ACTIVATIONS and gate.width == up.width, (fn, gate, up)
        return self._record("gate", gate.width, (gate, up), fn=fn)

    def add(self, a: Buffer, b: Buffer, scale: float = 1.0) -> Buffer:
        """a + scale * b."""
        assert a.width == b.width, (a, b)
        return self._record("add", a.width, (a, b), scale=float(scale))

    def scale(self, x: Buffer, scale: float) -> Buffer:
        """x * scale."""
        return self._record("scale", x.width, (x,), scale=float(scale))

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        """cap * tanh(x / cap)."""
        return self._record("softcap", x.width, (x,), scale=float(cap))

    def add_vector(self, x: Buffer, vector: QTensor) -> Buffer:
        """x + vector (x.width,)."""
        assert _length(vector) == x.width, (x, vector)
        return self._record("add_vector", x.width, (x,), (vector,))

    def mul_vector(self, x: Buffer, vector: QTensor) -> Buffer:
        """x * vector (x.width,)."""
        assert _length(vector) == x.width, (x, vector)
        return self._record("mul_vector", x.width, (x,), (vector,))

    def mul_column(self, x: Buffer, column: Buffer) -> Buffer:
        """x times each token's one number in column (T, 1)."""
        assert column.width == 1, column
        return self._record("mul_column", x.width, (x, column))

    # Layout

    def columns(self, x: Buffer, begin: int, width: int) -> Buffer:
        """Columns [begin, begin + width) of x."""
        assert 0 <= begin and begin + width <= x.width, (x, begin, width)
        return self._record("columns", width, (x,), begin=begin)

    def join(self, a: Buffer, b: Buffer, n_head: int = 1) -> Buffer:
        """Head by head a's columns, then b's: (T, H*A), (T, H*B) -> (T, H*(A+B))."""
        assert a.width % n_head == b.width % n_head == 0, (a, b, n_head)
        return self._record("join", a.width + b.width, (a, b), n_head=n_head)

    def outputs(self, x: Buffer) -> Buffer:
        """The rows of x whose results the batch asks for: (T, E) -> (n_outputs, E)."""
        return self._record("outputs", x.width, (x,), rows="outputs")

    # Attention

    def rope(self, x: Buffer, head_dim: int, rope: Rope) -> Buffer:
        """Turn each head of `x (T, n_head * head_dim)` by its token's position."""
        assert x.width % head_dim == 0 and 2 * len(rope.inv_freq) <= head_dim, (x, head_dim, rope)
        assert rope.axes is None or len(rope.axes) == len(rope.inv_freq), rope
        self._n_axes = max(self._n_axes, *(axis + 1 for axis in rope.axes or (-1,)), 0)
        return self._record("rope", x.width, (x,), head_dim=head_dim, rope=rope)

    def temper(self, x: Buffer, beta: float, length: int, offset: int = 0) -> Buffer:
        """x * (1 + beta * log(1 + floor((position + offset) / length)))."""
        assert length > 0, length
        return self._record("temper", x.width, (x,), beta=float(beta), length=length, offset=offset)

    def attend(self, q: Buffer, k: Buffer, v: Buffer, heads: Heads,
               sinks: QTensor | None = None) -> Buffer:
        """Store k and v in a new KV layer at each token's position, then attend from q.

        q (T, n_head * key_length), k (T, n_head_kv * key_length), v (T, n_head_kv * value_length)
        -> (T, n_head * value_length). Head h reads KV head h // (n_head / n_head_kv).
        sinks (n_head,): one more score in the softmax's denominator.
        """
        assert k.width == heads.n_head_kv * heads.key_length, (k, heads)
        assert v.width == heads.n_head_kv * heads.value_length, (v, heads)
        layer = self._kv_layer(heads)
        self._ops.append(Op("store_kv", None, (k, v), (), {"layer": layer}))
        return self.attend_again(q, layer, heads, sinks)

    def attend_again(self, q: Buffer, layer: int, heads: Heads,
                     sinks: QTensor | None = None) -> Buffer:
        """Attend from q to the keys and values of KV layer `layer`, stored before."""
        assert q.width == heads.n_head * heads.key_length, (q, heads)
        assert heads.n_head % heads.n_head_kv == 0, heads
        assert _stored_alike(heads, self._kv[layer]), (heads, self._kv[layer])
        assert sinks is None or _length(sinks) == heads.n_head, (sinks, heads)
        if heads.span is not None:
            self._n_spans = max(self._n_spans, heads.span + 1)
        width = heads.n_head * heads.value_length
        return self._record("attend", width, (q,), (sinks,), layer=layer, heads=heads)

    @property
    def last_kv_layer(self) -> int:
        return len(self._kv) - 1

    def _kv_layer(self, heads: Heads) -> int:
        if not self._keeps_kv:
            for i, other in enumerate(self._kv):
                if _stored_alike(heads, other):
                    return i
        self._kv.append(heads)
        return len(self._kv) - 1

    # Experts

    def route(self, logits: Buffer, routing: Routing, bias: QTensor | None = None) -> Buffer:
        """Choose each token's experts -> (T, 2 * n_used): their ids, best first, then weights."""
        assert logits.width == routing.n_expert >= routing.n_used > 0, (logits, routing)
        assert routing.n_expert % routing.n_group == 0, routing
        assert 0 < routing.n_group_used <= routing.n_group, routing
        assert bias is None or _length(bias) == routing.n_expert, (bias, routing)
        return self._record("route", 2 * routing.n_used, (logits,), (bias,), routing=routing)

    def experts(self, x: Buffer, routes: Buffer, weight: QTensor,
                bias: QTensor | None = None) -> Buffer:
        """Each chosen expert's product: weight (n_expert, N, K), bias (n_expert, N), x (T, K) for
        all of a token's experts or (T, n_used*K) for each its own -> (T, n_used*N)."""
        n_used, (_, n_out, n_in) = routes.width // 2, weight.shape
        assert x.width in (n_in, n_used * n_in), (x, weight)
        made = next(op for op in reversed(self._ops) if op.out is routes)
        assert made.name == "route" and made.params["routing"].n_expert == weight.shape[0], made
        assert bias is None or _length(bias) == weight.shape[0] * n_out, (bias, weight)
        return self._record("experts", n_used * n_out, (x, routes), (weight, bias))

    def weigh(self, x: Buffer, routes: Buffer) -> Buffer:
        """x (T, K) times each route's weight -> (T, n_used*K)."""
        return self._record("weigh", routes.width // 2 * x.width, (x, routes))

    def mix(self, x: Buffer, routes: Buffer, weighted: bool = True) -> Buffer:
        """Sum over a token's routes of weight * x: x (T, n_used*N) -> (T, N)."""
        n_used = routes.width // 2
        assert x.width % n_used == 0, (x, routes)
        return self._record("mix", x.width // n_used, (x, routes), weighted=weighted)

    # Recurrent mixers: each has a state of its own in every sequence

    def conv(self, x: Buffer, weight: QTensor, bias: QTensor | None = None) -> Buffer:
        """Causal convolution of each column by itself: weight (x.width, L), bias (x.width,)."""
        assert weight.shape[0] == x.width, (x, weight)
        assert bias is None or _length(bias) == x.width, (x, bias)
        return self._recurrent("conv", x.width, (weight.shape[1] - 1) * x.width, (x,),
                               (weight, bias))

    def mamba2(self, x: Buffer, b: Buffer, c: Buffer, dt: Buffer, a: QTensor, d: QTensor,
               dt_bias: QTensor, shape: Mamba2) -> Buffer:
        """Selective state space -> (T, H*P); a (negative), d, dt_bias (H,)."""
        n_values = shape.n_head * shape.head_dim
        assert x.width == n_values and dt.width == shape.n_head, (x, dt, shape)
        assert b.width == c.width == shape.n_group * shape.n_state, (b, c, shape)
        assert shape.n_head % shape.n_group == 0, shape
        assert all(_length(w) == shape.n_head for w in (a, d, dt_bias)), (a, d, dt_bias, shape)
        return self._recurrent("mamba2", n_values, n_values * shape.n_state, (x, b, c, dt),
                               (a, d, dt_bias), shape=shape)

    def delta_net(self, q: Buffer, k: Buffer, v: Buffer, alpha: Buffer, beta: Buffer, a: QTensor,
                  dt_bias: QTensor, shape: DeltaNet) -> Buffer:
        """Gated delta rule -> (T, Hv*Dv); alpha, beta (T, Hv); a (negative), dt_bias (Hv,)."""
        assert q.width == k.width == shape.n_key_head * shape.key_length, (q, k, shape)
        assert v.width == shape.n_value_head * shape.value_length, (v, shape)
        assert alpha.width == beta.width == shape.n_value_head, (alpha, beta, shape)
        assert shape.n_value_head % shape.n_key_head == 0, shape
        assert all(_length(w) == shape.n_value_head for w in (a, dt_bias)), (a, dt_bias, shape)
        return self._recurrent("delta_net", v.width, v.width * shape.key_length,
                               (q, k, v, alpha, beta), (a, dt_bias), shape=shape)

    def _recurrent(self, name, width, n_floats, inputs: Sequence[Buffer], weights,
                   **params) -> Buffer:
        self._states.append(n_floats)
        return self._record(name, width, inputs, weights, state=len(self._states) - 1, **params)

    def finish(self, name: str, result: Buffer) -> Program:
        return Program(name, tuple(self._ops), tuple(self._buffers), tuple(self._kv), result,
                       tuple(self._states), self._input_width, self._n_axes, self._n_spans)


def _stored_alike(a: Heads, b: Heads) -> bool:
    """Whether keys and values of both have the same shape and are let go of at the same time."""
    return (a.n_head_kv, a.key_length, a.value_length, a.reach) == (
        b.n_head_kv, b.key_length, b.value_length, b.reach)


def _length(weight: QTensor) -> int:
    n = 1
    for size in weight.shape:
        n *= size
    return n

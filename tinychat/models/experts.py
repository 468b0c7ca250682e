"""Feed-forward parts of experts: a router chooses a few of many for each token; one may be shared.

The file says how many there are and, in some families, how they are chosen; the rest is a family's
`Experts`. Shapes: T tokens, E n_embd, F the width within one expert, N experts.
"""
from dataclasses import dataclass

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import QTensor
from tinychat.models import layers
from tinychat.models.config import MAX_WIDTH, ModelConfig
from tinychat.models.weights import Weights, gathered, reshaped
from tinychat.ops.program import Buffer, Routing
from tinychat.ops.recorder import Recorder

GATINGS = {1: "softmax", 2: "sigmoid", 3: "chosen"}  # the file's numbers


@dataclass(frozen=True)
class Experts:
    """What a family's files do not say of its experts.

    gating, normalise: see Routing; where a file has a key of its own, that holds.
    activation: None: that of the other layers. weighs_before: a route's weight is on what goes
    into its expert, not on what comes out.
    """

    gating: str = "softmax"
    normalise: bool = True
    activation: str | None = None
    weighs_before: bool = False


def ffn(g: Recorder, w: Weights, config: ModelConfig, experts: Experts, x: Buffer,
        activation: str = "silu") -> Buffer:
    """The weighted sum of the chosen experts, plus the shared one: x (T, E) -> (T, E)."""
    shape = routing(config, experts)
    logits = layers.linear(g, w, "ffn_gate_inp", x, shape.n_expert)           # (T, N)
    routes = g.route(logits, shape, w.optional("exp_probs_b.bias", shape.n_expert))
    out = chosen(g, w, experts, x, routes, shape.n_expert, activation)
    if w.has("ffn_up_shexp.weight"):
        out = g.add(out, shared(g, w, x, activation))
    return out


def routing(config: ModelConfig, experts: Experts) -> Routing:
    """Raises: ModelFileError for numbers that leave nothing to choose from."""
    keys, n_expert = config.keys, config.n_expert
    if not n_expert:
        raise ModelFileError("tensor 'ffn_gate_inp.weight' chooses among experts, but metadata key "
                             f"{keys.prefix}.expert_count is 0 or missing")
    n_used = keys.integer("expert_used_count", 1, n_expert)
    n_group = keys.integer("expert_group_count", 0, n_expert, 1) or 1
    n_group_used = keys.integer("expert_group_used_count", 0, n_group, n_group) or n_group
    n_eligible = n_expert // n_group * n_group_used
    if n_expert % n_group or n_eligible < n_used:
        raise ModelFileError(f"metadata key {keys.prefix}.expert_group_count: {n_group} groups, "
                             f"{n_group_used} of them used, cannot give {n_used} of {n_expert} "
                             "experts")
    number = keys.integer("expert_gating_func", 0, len(GATINGS), 0)  # 0: not said
    return Routing(n_expert, n_used, gating=GATINGS.get(number, experts.gating),
                   n_group=n_group, n_group_used=n_group_used,
                   normalise=keys.boolean("expert_weights_norm", experts.normalise),
                   scale=keys.factor("expert_weights_scale"))


def chosen(g: Recorder, w: Weights, experts: Experts, x: Buffer, routes: Buffer, n_expert: int,
           activation: str) -> Buffer:
    """Sum over each token's routes of down(fn(gate(x)) * up(x)), weighted -> (T, E)."""
    n_embd, n_ff = x.width, _n_ff(w, n_expert)
    h = g.weigh(x, routes) if experts.weighs_before else x
    fn = experts.activation or activation

    def product(name: str, h: Buffer, n_out: int, n_in: int) -> Buffer:
        weight = w.tensor(f"{name}.weight", n_expert, n_out, n_in)
        return g.experts(h, routes, weight, w.optional(f"{name}.bias", n_expert, n_out))
    if w.has("ffn_gate_up_exps.weight"):
        fused = w.tensor("ffn_gate_up_exps.weight", n_expert, 2 * n_ff, n_embd)
        bias = w.optional("ffn_gate_up_exps.bias", n_expert, 2 * n_ff)
        gate, up = (g.experts(h, routes, _half(fused, i), bias and _half(bias, i))
                    for i in (0, 1))
        h = g.gate(fn, gate, up)
    elif w.has("ffn_gate_exps.weight"):
        gate = product("ffn_gate_exps", h, n_ff, n_embd)
        h = g.gate(fn, gate, product("ffn_up_exps", h, n_ff, n_embd))         # (T, n_used * F)
    else:
        h = g.activate(fn, product("ffn_up_exps", h, n_ff, n_embd))
    return g.mix(product("ffn_down_exps", h, n_embd, n_ff), routes,
                 weighted=not experts.weighs_before)


def _n_ff(w: Weights, n_expert: int) -> int:
    return w.tensor("ffn_down_exps.weight", n_expert, None, None).shape[2]


def _half(fused: QTensor, which: int) -> QTensor:
    """Of each expert's rows, the first or the second half: a copy, as they do not stand together."""
    n_expert, n_rows = fused.shape[:2]
    n = n_rows // 2
    rows = np.arange(n_expert)[:, None] * n_rows + which * n + np.arange(n)
    flat = reshaped(fused, n_expert * n_rows, *fused.shape[2:])
    part = gathered(flat, rows.reshape(-1), ("gate", "up")[which])
    return reshaped(part, n_expert, n, *fused.shape[2:])


def shared(g: Recorder, w: Weights, x: Buffer, activation: str) -> Buffer:
    """The expert that every token goes through, times a gate of its own where the file has one."""
    n_ff = w.tensor("ffn_up_shexp.weight", None, x.width).shape[0]
    up = layers.linear(g, w, "ffn_up_shexp", x, n_ff)
    if w.has("ffn_gate_shexp.weight"):
        up = g.gate(activation, layers.linear(g, w, "ffn_gate_shexp", x, n_ff), up)
    else:
        up = g.activate(activation, up)
    out = layers.linear(g, w, "ffn_down_shexp", up, x.width)
    name = "ffn_gate_inp_shexp.weight"
    if not w.has(name):
        return out
    shape = (x.width,) if len(w.shape(name)) == 1 else (1, x.width)
    weight = reshaped(w.tensor(name, *shape), 1, x.width)
    return g.mul_column(out, g.activate("sigmoid", g.linear(x, weight)))

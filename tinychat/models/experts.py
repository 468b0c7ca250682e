"""Mixtures of experts: a router chooses some of many feed-forward networks for each token.

Shapes: X n_expert, U n_used, F the experts' n_ff.
"""
from dataclasses import dataclass, replace

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.models import layers
from tinychat.models.config import ModelConfig
from tinychat.models.weights import Weights, reshaped
from tinychat.ops.program import Buffer, Routing
from tinychat.ops.recorder import Recorder

GATING = {1: "softmax", 2: "sigmoid", 3: "chosen"}  # llama.cpp: llama_expert_gating_func_type


@dataclass(frozen=True)
class Experts:
    """What a family's files do not say. gating, normalise: unless the file has them.

    weighted_inputs: the weights are on what the experts read, not on what they give.
    """

    gating: str = "softmax"
    normalise: bool = True
    activation: str | None = None  # None: that of the dense layers
    weighted_inputs: bool = False


def routing_of(config: ModelConfig, i: int, family: Experts) -> Routing:
    """Of layer i. Raises: ModelFileError for numbers that do not fit each other."""
    keys, n_expert = config.keys, config.n_expert
    n_blocks = config.n_layer + config.n_ahead
    n_used = keys.integers("expert_used_count", n_blocks, 0, n_expert)[i]
    n_group = keys.integer("expert_group_count", 0, max(n_expert, 1), 1) or 1
    n_group_used = keys.integer("expert_group_used_count", 0, n_group, n_group) or n_group
    if not n_used:
        raise ModelFileError(f"metadata key {keys.prefix}.expert_used_count: layer {i} chooses "
                             f"none of its {n_expert} experts")
    if n_expert % n_group or n_expert // n_group * n_group_used < n_used:
        raise ModelFileError(f"metadata key {keys.prefix}.expert_group_count: {n_used} of "
                             f"{n_expert} experts cannot come from {n_group_used} of {n_group} "
                             "groups")
    gating = keys.integer("expert_gating_func", 0, max(GATING), 0)
    return Routing(n_expert, n_used, GATING.get(gating, family.gating), n_group, n_group_used,
                   keys.boolean("expert_weights_norm", family.normalise),
                   keys.factor("expert_weights_scale"))


def ffn(g: Recorder, w: Weights, x: Buffer, config: ModelConfig, i: int, family: Experts,
        activation: str) -> Buffer:
    """The chosen experts' outputs mixed, plus the shared expert's: x (T, E) -> (T, E).

    Experts may work on rows of another width, into and out of which the file has matrices.
    """
    if not config.n_expert:
        raise ModelFileError(f"metadata key {config.architecture}.expert_count is missing or 0, "
                             f"but layer {i} has a router")
    logits = layers.linear(g, w, "ffn_gate_inp", x, config.n_expert)          # (T, X)
    given = x
    if w.has("ffn_latent_down.weight"):
        given = g.linear(x, w.tensor("ffn_latent_down.weight", None, x.width))
    out = mixed(g, w, given, logits, config, i, family, family.activation or activation)
    if given is not x:
        out = layers.linear(g, w, "ffn_latent_up", out, x.width)
    shared = shared_expert(g, w, x, activation)
    return g.add(out, shared) if shared else out


def mixed(g: Recorder, w: Weights, x: Buffer, logits: Buffer, config: ModelConfig, i: int,
          family: Experts, activation: str) -> Buffer:
    """What the router's logits (T, X) choose, run and summed: x (T, E) -> (T, E)."""
    n_expert = config.n_expert
    bias = w.optional("exp_probs_b.bias", n_expert)
    routes = g.route(logits, routing_of(config, i, family), bias)
    down = w.tensor("ffn_down_exps.weight", n_expert, x.width, None)          # (X, E, F)
    given = g.weigh(x, routes) if family.weighted_inputs else x
    gate, up = (_experts(g, w, name, given, routes, (n_expert, down.shape[2], x.width))
                for name in ("gate", "up"))                                   # (T, U*F)
    if gate is None:
        hidden = g.activate(activation, up)
    else:
        hidden = g.gate(activation, gate, up)
    out = g.experts(hidden, routes, down, w.optional("ffn_down_exps.bias", n_expert, x.width))
    if w.has("ffn_down_exps.scale"):
        routes = _scaled(g, routes, w.tensor("ffn_down_exps.scale", n_expert))
    return g.mix(out, routes, weighted=not family.weighted_inputs)


def _experts(g, w, name, x, routes, shape: tuple[int, int, int]) -> Buffer | None:
    """(T, U*F) of `ffn_NAME_exps`, or of its half of `ffn_gate_up_exps`; None: no such gate."""
    n_expert, n_ff, n_embd = shape
    own = f"ffn_{name}_exps"
    if w.has("ffn_gate_up_exps.weight"):
        both = w.tensor("ffn_gate_up_exps.weight", n_expert, 2 * n_ff, n_embd)
        return g.experts(x, routes, _half(both, name == "up"))
    if name == "gate" and not w.has(f"{own}.weight"):
        return None
    return g.experts(x, routes, w.tensor(f"{own}.weight", *shape),
                     w.optional(f"{own}.bias", n_expert, n_ff))


def _scaled(g: Recorder, routes: Buffer, factors: QTensor) -> Buffer:
    """The routes, for `mix`, with each weight times its expert's factor (X,): what an expert of one
    number makes of 1."""
    one = QTensor("one", GGMLQuantizationType.F32, (1, 1), np.ones(1, np.float32).view(np.uint8))
    chosen = g.experts(g.embed_positions(one), routes, reshaped(factors, factors.shape[0], 1, 1))
    return g.gate("identity", routes, g.join(chosen, chosen))


def _half(tensor: QTensor, second: bool) -> QTensor:
    """The first or second half of each expert's rows: a copy, as they do not lie together."""
    n_expert, n_rows, n_cols = tensor.shape
    halves = tensor.data.reshape(n_expert, 2, -1)
    return replace(tensor, name=f"{tensor.name}[{'second' if second else 'first'} half]",
                   shape=(n_expert, n_rows // 2, n_cols), data=halves[:, int(second)].reshape(-1))


def shared_expert(g: Recorder, w: Weights, x: Buffer, activation: str) -> Buffer | None:
    """The expert that every token takes, behind a gate of its own where there is one."""
    if not w.has("ffn_up_shexp.weight"):
        return None
    n_ff = w.tensor("ffn_up_shexp.weight", None, x.width).shape[0]
    out = layers.ffn(g, w, x, n_ff, activation, suffix="_shexp")
    name = "ffn_gate_inp_shexp.weight"
    if not w.has(name):
        return out
    shape = (x.width,) if len(w.shape(name)) == 1 else (1, x.width)
    row = reshaped(w.tensor(name, *shape), 1, x.width)
    return g.mul_column(out, g.activate("sigmoid", g.linear(x, row)))

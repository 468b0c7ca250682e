"""The meaning of the routed and the recurrent operations, in NumPy; see `meaning.py`.

A recurrent one takes one sequence's tokens in order and its state, which it changes in place.
"""
import numpy as np

from tinychat.ops.meaning import sigmoid, softmax
from tinychat.ops.program import DeltaNet, Mamba2, Routing

LEAST_SUM = 6.103515625e-5  # the smallest normal float16: what a sum of scores is at least


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(x, np.float32(0))


# Experts

def route(logits: np.ndarray, bias: np.ndarray | None = None, *, routing: Routing) -> np.ndarray:
    """logits (T, n_expert) -> (T, 2 * n_used): ids of the chosen, best first, then their weights.

    Of equals the lower id is better, and so it is of groups; what is no number, or a group with
    one, comes last. Source: DeepSeek-V3 report, section 2.1.2 (groups).
    """
    n = routing.n_used
    scores = {"softmax": softmax, "sigmoid": sigmoid, "chosen": lambda x: x}[routing.gating](logits)
    judged = scores if bias is None else scores + bias
    if routing.n_group > 1:
        judged = _only_best_groups(judged, routing)
    ids = np.argsort(-judged, axis=1, kind="stable")[:, :n]
    weights = np.take_along_axis(scores, ids, axis=1)
    if routing.gating == "chosen":
        weights = softmax(weights)
    if routing.normalise:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.float32(LEAST_SUM))
    return np.concatenate([ids.astype(np.float32), weights * np.float32(routing.scale)], axis=1)


def _only_best_groups(judged: np.ndarray, routing: Routing) -> np.ndarray:
    groups = judged.reshape(len(judged), routing.n_group, -1)
    of_group = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)                 # (T, n_group)
    best = np.argsort(-of_group, axis=1, kind="stable")[:, :routing.n_group_used]
    refused = np.ones(of_group.shape, bool)
    np.put_along_axis(refused, best, False, axis=1)
    return np.where(refused[:, :, None], np.float32(-np.inf), groups).reshape(judged.shape)


def experts(x: np.ndarray, routes: np.ndarray, weight: np.ndarray,
            bias: np.ndarray | None = None) -> np.ndarray:
    """x (T, K) or (T, n_used*K), weight (n_expert, N, K), bias (n_expert, N) -> (T, n_used*N)."""
    n_used, n_in = routes.shape[1] // 2, weight.shape[2]
    ids = routes[:, :n_used].astype(np.int64)
    x = np.broadcast_to(x.reshape(len(x), -1, n_in), (len(x), n_used, n_in))
    out = np.empty((len(x), n_used, weight.shape[1]), np.float32)
    for expert in np.unique(ids):
        chosen = ids == expert
        out[chosen] = x[chosen] @ weight[expert].T
        if bias is not None:
            out[chosen] += bias[expert]
    return out.reshape(len(x), -1)


def weigh(x: np.ndarray, routes: np.ndarray) -> np.ndarray:
    """x (T, K) times each route's weight -> (T, n_used*K)."""
    weights = routes[:, routes.shape[1] // 2:]
    return (x[:, None, :] * weights[:, :, None]).reshape(len(x), -1)


def mix(x: np.ndarray, routes: np.ndarray, weighted: bool) -> np.ndarray:
    """Sum over routes of weight * x (T, n_used*N) -> (T, N), in the routes' order."""
    n_used = routes.shape[1] // 2
    parts = x.reshape(len(x), n_used, -1)
    out = np.zeros(parts[:, 0].shape, np.float32)
    for i in range(n_used):
        out += parts[:, i] * routes[:, n_used + i, None] if weighted else parts[:, i]
    return out


# Recurrent mixers

def conv(state: np.ndarray, x: np.ndarray, weight: np.ndarray,
         bias: np.ndarray | None = None) -> np.ndarray:
    """out[t] = sum over j of weight[:, j] * x[t - (L-1) + j] + bias; state: the L-1 rows before.

    state (L-1, C), oldest first; x (T, C); weight (C, L).
    """
    n_before, rows = len(state), np.concatenate([state, x])
    out = np.zeros_like(x)
    for j in range(weight.shape[1]):
        out += weight[:, j] * rows[j:j + len(x)]
    state[:] = rows[len(rows) - n_before:]
    return out if bias is None else out + bias


def mamba2(state: np.ndarray, x: np.ndarray, b: np.ndarray, c: np.ndarray, dt: np.ndarray,
           a: np.ndarray, d: np.ndarray, dt_bias: np.ndarray, *, shape: Mamba2) -> np.ndarray:
    """state_t = exp(a * dt_t) state_{t-1} + dt_t x_t ⊗ b_t; y_t = state_t c_t + d x_t.

    dt is softplus(dt + dt_bias); state (H, P, N); head h reads group h // (H / G) of b and c.
    Source: Dao and Gu, "Transformers are SSMs", section 6.
    """
    n_head, n_tokens = shape.n_head, len(x)
    x = x.reshape(n_tokens, n_head, shape.head_dim)
    group = np.arange(n_head) // (n_head // shape.n_group)
    b, c = (m.reshape(n_tokens, shape.n_group, shape.n_state)[:, group] for m in (b, c))  # (T,H,N)
    dt = softplus(dt + dt_bias)                                               # (T, H)
    decay = np.exp(dt * a)
    out = np.empty_like(x)
    for t in range(n_tokens):
        state *= decay[t, :, None, None]
        state += (dt[t, :, None] * x[t])[:, :, None] * b[t, :, None, :]
        out[t] = (state * c[t, :, None, :]).sum(axis=2) + d[:, None] * x[t]
    return out.reshape(n_tokens, -1)


def delta_net(state: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, alpha: np.ndarray,
              beta: np.ndarray, a: np.ndarray, dt_bias: np.ndarray, *,
              shape: DeltaNet) -> np.ndarray:
    """S = exp(a * softplus(alpha + dt_bias)) S; S += k ⊗ (v - kᵀS) sigmoid(beta); out = qᵀS.

    state (Hv, Dk, Dv); q and k come normed and scaled.
    Source: Yang et al., "Gated Delta Networks", equation 10.
    """
    n_tokens, n_head = len(q), shape.n_value_head
    head = np.arange(n_head)
    of = head % shape.n_key_head if shape.tiled else head // (n_head // shape.n_key_head)
    q, k = (m.reshape(n_tokens, shape.n_key_head, shape.key_length)[:, of] for m in (q, k))
    v = v.reshape(n_tokens, n_head, shape.value_length)
    decay, beta = np.exp(a * softplus(alpha + dt_bias)), sigmoid(beta)        # (T, Hv)
    out = np.empty_like(v)
    for t in range(n_tokens):
        state *= decay[t, :, None, None]
        known = (state * k[t, :, :, None]).sum(axis=1)                        # (Hv, Dv)
        state += k[t, :, :, None] * ((v[t] - known) * beta[t, :, None])[:, None, :]
        out[t] = (state * q[t, :, :, None]).sum(axis=1)
    return out.reshape(n_tokens, -1)

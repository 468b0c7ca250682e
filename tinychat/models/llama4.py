"""Llama 4: attention in chunks with rope and normed heads, or over everything without either.

Layers without rope let their queries grow with the position instead. None of the numbers is in the
file. Source: transformers: modeling_llama4.py; llama.cpp: src/models/llama4.cpp.
"""
from collections.abc import Callable
from dataclasses import replace

from tinychat.models import layers
from tinychat.models.config import ModelConfig
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder

CHUNK = 8192               # positions; also those after which queries grow
GROWTH = 0.1
PLAIN_HEADS_EXPERTS = 128  # the model of so many experts does not norm its heads


def attention(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, i: int,
              heads: Callable[[], Heads], rope: Rope | None) -> Buffer:
    """h (T, E) -> (T, E); rope None: layer i sees everything."""
    shape = heads()
    d = shape.key_length
    q, k, v = layers.qkv(g, w, h, shape)
    has_chunks = config.keys.integer("attention.sliding_window", 0, 1 << 31, CHUNK) > 0
    if rope:
        shape = replace(shape, window=0, chunk=CHUNK if has_chunks else 0)
        q, k = g.rope(q, d, rope), g.rope(k, d, rope)
        if config.n_expert != PLAIN_HEADS_EXPERTS:
            q, k = (g.rmsnorm(x, None, config.norm_eps, d) for x in (q, k))
    elif has_chunks:
        q = g.temper(q, GROWTH, CHUNK, 1)
    return layers.linear(g, w, "attn_output", g.attend(q, k, v, shape), h.width)

"""Experts, latent heads and recurrent mixers on the kernels: what the reference says, the same bits
whatever else is in the step."""
from dataclasses import replace

import gguf
import numpy as np
import pytest

from helpers_program import batch, weight

pytest.importorskip("tinychat._kernels")

from helpers_native import PAGES, every_level, executor_of, normal, prefill  # noqa: E402

from tinychat.errors import KernelError  # noqa: E402
from tinychat.gguf_file import GGMLQuantizationType, QTensor  # noqa: E402
from tinychat.ops.native import NativeExecutor  # noqa: E402
from tinychat.ops.program import DeltaNet, Mamba2, Program, Routing  # noqa: E402
from tinychat.ops.recorder import Recorder  # noqa: E402
from tinychat.ops.reference import ReferenceExecutor  # noqa: E402

N_ROWS = 90  # of the table whose rows are the tokens
LIMITS = dict(n_pages=8, max_outputs=96, max_sequences=2, kv_type="f32")


def executor(program: Program, isa: str | None = None, threads: int = 2) -> NativeExecutor:
    return executor_of(program, isa, **LIMITS, threads=threads)


def program(build, *widths: int, seed: int = 0) -> Program:
    """build(g, rng, *inputs): inputs are rows of random tables, of these widths."""
    rng, g = np.random.default_rng(seed), Recorder()
    inputs = [g.embed(weight(f"x{i}", normal(rng, N_ROWS, width)))
              for i, width in enumerate(widths)]
    return g.finish("test", g.outputs(build(g, rng, *inputs)))


def agreement(build, isa, *widths, n=40, seed=0) -> tuple[np.ndarray, np.ndarray]:
    recorded, tokens = program(build, *widths, seed=seed), np.arange(n)
    made = executor(recorded, isa), ReferenceExecutor(recorded, **LIMITS)
    return tuple(prefill(one, tokens, n) for one in made)


# Experts

ROUTINGS = [
    Routing(8, 2), Routing(5, 5, "sigmoid", normalise=True, scale=2.5), Routing(1, 1),
    Routing(12, 3, "chosen"), Routing(16, 4, "sigmoid", 4, 2, True), Routing(6, 2, "softmax", 3, 1),
]


@every_level
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_routes_are_those_of_the_reference(isa, routing, has_bias):
    def build(g, rng, logits):
        bias = weight("bias", normal(rng, routing.n_expert)) if has_bias else None
        return g.route(logits, routing, bias)
    got, expected = agreement(build, isa, routing.n_expert, n=80)
    np.testing.assert_array_equal(got[:, :routing.n_used], expected[:, :routing.n_used])
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_of_equals_the_first_expert_is_chosen_and_what_is_no_number_last():
    rows = np.array([[1, 3, 3, 3], [np.nan, -np.inf, 0, np.nan], [np.nan] * 4], np.float32)
    g = Recorder()
    recorded = g.finish("ties", g.outputs(g.route(g.embed(weight("x", rows)),
                                                  Routing(4, 3, "chosen"))))
    step = batch([0, 1, 2], outputs=[0, 1, 2])
    with np.errstate(invalid="ignore"):
        expected = ReferenceExecutor(recorded, n_pages=2).step(step)
    got = executor(recorded).step(step)
    assert got[:, :3].tolist() == expected[:, :3].tolist() == [[1, 2, 3], [2, 1, 0], [0, 1, 2]]


def experts_weight(rng, name, *shape, qtype="F32") -> QTensor:
    values = normal(rng, *shape, scale=shape[-1] ** -0.5)
    kind = GGMLQuantizationType[qtype]
    data = gguf.quants.quantize(values, kind)
    return QTensor(name, kind, shape, np.ascontiguousarray(data).reshape(-1).view(np.uint8))


def moe(qtype, n_expert, n_used, n_embd, n_ff, has_bias=True, weighted_inputs=False):
    def build(g, rng, x, logits):
        def bias(name, n):
            return weight(f"{name}.bias", normal(rng, n_expert, n)) if has_bias else None
        routes = g.route(logits, Routing(n_expert, n_used, normalise=True))
        given = g.weigh(x, routes) if weighted_inputs else x
        gate, up = (g.experts(given, routes, experts_weight(rng, name, n_expert, n_ff, n_embd,
                                                            qtype=qtype), bias(name, n_ff))
                    for name in ("gate", "up"))
        down = experts_weight(rng, "down", n_expert, n_embd, n_ff, qtype=qtype)
        out = g.experts(g.gate("silu", gate, up), routes, down, bias("down", n_embd))
        return g.mix(out, routes, weighted=not weighted_inputs)
    return build


@every_level
@pytest.mark.parametrize("n_expert, n_used, n_embd, n_ff", [(1, 1, 32, 32), (4, 3, 32, 96),
                                                            (7, 2, 160, 64)])
@pytest.mark.parametrize("qtype", ["F32", "F16", "Q8_0", "Q4_0", "MXFP4"])
def test_experts_agree(isa, n_expert, n_used, n_embd, n_ff, qtype):
    build = moe(qtype, n_expert, n_used, n_embd, n_ff, weighted_inputs=qtype == "Q8_0")
    got, expected = agreement(build, isa, n_embd, n_expert, n=70)
    error = np.abs(got - expected).max() / expected.std()
    assert error < (1e-5 if qtype in ("F32", "F16") else 0.1), error


@every_level
@pytest.mark.parametrize("n_embd, n_ff", [(3, 5), (17, 33), (1, 1)])
def test_experts_of_odd_sizes_agree(isa, n_embd, n_ff):
    got, expected = agreement(moe("F32", 5, 2, n_embd, n_ff, has_bias=False), isa, n_embd, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@every_level
@pytest.mark.parametrize("qtype, n_head, n_out, n_in", [
    ("F32", 3, 5, 7), ("F16", 2, 24, 16), ("Q8_0", 4, 20, 64), ("Q4_0", 1, 33, 32)])
def test_each_head_is_multiplied_by_its_own_matrix(isa, qtype, n_head, n_out, n_in):
    def build(g, rng, x):
        return g.head_linear(x, experts_weight(rng, "w", n_head, n_out, n_in, qtype=qtype))
    got, expected = agreement(build, isa, n_head * n_in)
    error = np.abs(got - expected).max() / expected.std()
    assert error < (1e-5 if qtype in ("F32", "F16") else 0.1), error


# Recurrent mixers

def conv(width, length, has_bias=True):
    def build(g, rng, x):
        bias = weight("bias", normal(rng, width)) if has_bias else None
        return g.conv(x, weight("w", normal(rng, width, length)), bias)
    return build, (width,)


def mamba2(n_head, head_dim, n_group, n_state):
    def build(g, rng, x, b, c, dt):
        vectors = [weight("a", -np.exp(normal(rng, n_head))), weight("d", normal(rng, n_head)),
                   weight("dt", normal(rng, n_head))]
        return g.mamba2(x, b, c, dt, *vectors, Mamba2(n_head, head_dim, n_group, n_state))
    return build, (n_head * head_dim, n_group * n_state, n_group * n_state, n_head)


def delta_net(n_key_head, n_value_head, n_key, n_value, tiled=False):
    def build(g, rng, q, k, v, alpha, beta):
        q, k = (g.scale(g.rmsnorm(x, None, 1e-6, n_key), n_key ** -0.5) for x in (q, k))
        vectors = [weight("a", -np.exp(normal(rng, n_value_head))),
                   weight("dt", normal(rng, n_value_head))]
        return g.delta_net(q, k, v, alpha, beta, *vectors,
                           DeltaNet(n_key_head, n_value_head, n_key, n_value, tiled))
    n_keys = n_key_head * n_key
    return build, (n_keys, n_keys, n_value_head * n_value, n_value_head, n_value_head)


MIXERS = {
    "conv 3 of 5": conv(5, 3), "conv 4 of 130": conv(130, 4, has_bias=False), "conv 1": conv(3, 1),
    "mamba2 small": mamba2(2, 3, 1, 5), "mamba2 groups": mamba2(4, 8, 2, 16),
    "mamba2 wide": mamba2(2, 16, 1, 70),
    "delta small": delta_net(1, 1, 3, 5), "delta grouped": delta_net(2, 4, 16, 24),
    "delta tiled": delta_net(2, 4, 8, 70, tiled=True),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


@every_level
@every_mixer
def test_mixers_agree(isa, name):
    build, widths = MIXERS[name]
    got, expected = agreement(build, isa, *widths, n=60)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@every_level
@pytest.mark.parametrize("name", [*MIXERS, "experts"])
def test_bits_do_not_depend_on_chunks_company_or_threads(isa, name):
    build, widths = MIXERS.get(name) or (moe("Q4_0", 6, 2, 64, 96), (64, 6))
    recorded = program(build, *widths)
    tokens, others = np.arange(64), np.arange(25, 65)
    whole = prefill(executor(recorded, isa, threads=1), tokens, 512)
    for threads in (1, 2, 3):
        runs = executor(recorded, isa, threads=threads)
        for chunk in (512, 7, 1):
            np.testing.assert_array_equal(prefill(runs, tokens, chunk), whole)
        mixed = np.argsort(np.concatenate([np.arange(64), np.arange(40) + 0.5]), kind="stable")
        ids, positions = np.concatenate([tokens, others]), np.concatenate([np.arange(64),
                                                                           np.arange(40)])
        sequences = np.repeat([1, 0], [64, 40])
        step = batch(ids[mixed], positions[mixed], sequences[mixed], pages=PAGES,
                     outputs=np.flatnonzero(sequences[mixed] == 1)[:96])
        np.testing.assert_array_equal(runs.step(step), whole)
        runs.close()


@every_mixer
def test_a_copied_state_goes_on_as_the_first_would(name):
    build, widths = MIXERS[name]
    recorded = program(build, *widths)
    for made in (executor(recorded), ReferenceExecutor(recorded, **LIMITS)):
        whole = prefill(made, np.arange(50), 50)
        prefill(made, np.arange(30), 30)
        made.copy_state(0, 1)
        prefill(made, np.arange(40, 60), 20)                       # another text in the first place
        step = batch(range(30, 50), range(30, 50), [1] * 20, PAGES, range(20))
        np.testing.assert_allclose(made.step(step), whole[30:], rtol=1e-5, atol=1e-6)
        assert made.state_bytes == 2 * 4 * sum(recorded.states)
        made.close()


def test_places_that_do_not_exist_are_refused():
    build, widths = MIXERS["conv 3 of 5"]
    made = executor(program(build, *widths))
    with pytest.raises(KernelError, match="expected places below 2"):
        made.copy_state(0, 2)
    with pytest.raises(KernelError, match="states"):
        made.step(replace(batch([1]), states=np.array([5], np.int32)))


@every_level
def test_a_group_with_an_expert_that_is_no_number_is_chosen_last(isa):
    rows = np.array([[np.nan, 9, 1, 2, 0, 0], [1, 2, 9, np.nan, np.nan, 9], [np.nan] * 6],
                    np.float32)
    g = Recorder()
    routing = Routing(6, 2, "chosen", n_group=3, n_group_used=1)
    recorded = g.finish("groups", g.outputs(g.route(g.embed(weight("x", rows)), routing)))
    step = batch([0, 1, 2], outputs=[0, 1, 2])
    with np.errstate(invalid="ignore"):
        expected = ReferenceExecutor(recorded, n_pages=2).step(step)
    got = executor(recorded, isa).step(step)
    assert got[:, :2].tolist() == expected[:, :2].tolist() == [[3, 2], [1, 0], [2, 3]]

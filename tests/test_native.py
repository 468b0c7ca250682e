"""The native executor against the reference, on each SIMD level; its promises and refusals.

Tolerances count roundings: u = 2**-24 is half a unit in the last place, and a sum of n products is
off by at most n * u times the sum of their magnitudes, in whatever order it is taken.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("tinychat._kernels", reason="no compiled kernels", exc_type=ImportError)

from helpers_native import (  # noqa: E402
    PAGES, U, all_outputs, both, every_level, executor_of, normal, prefill)
from helpers_program import batch, tiny_program, weight  # noqa: E402
from tinychat.errors import KernelError, ModelLoadError  # noqa: E402
from tinychat.gguf_file import GGMLQuantizationType, QTensor, open_gguf  # noqa: E402
from tinychat.ops import native, sampling  # noqa: E402
from tinychat.ops.lowering import _is_mapped, barriers, lower  # noqa: E402
from tinychat.ops.native import NativeExecutor  # noqa: E402
from tinychat.ops.batch import Batch  # noqa: E402
from tinychat.ops.program import Heads, Rope, plan_slots  # noqa: E402
from tinychat.ops.recorder import Recorder  # noqa: E402
from tinychat.ops.reference import ReferenceExecutor  # noqa: E402
from tinychat.ops.sampling import SamplingParams  # noqa: E402

# Operations

@every_level
@pytest.mark.parametrize("width", [1, 15, 16, 33, 576])
def test_embed_outputs_and_scale_are_exact(isa, width):
    rows = normal(np.random.default_rng(width), 5, width)
    step = batch([4, 0, 4, 2], outputs=[3, 0])
    got, expected = both(lambda g: g.scale(g.embed(weight("e", rows)), 0.3), isa, step)
    np.testing.assert_array_equal(got, expected)


@every_level
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_add_is_exact(isa, width):
    rng = np.random.default_rng(width)
    a, b = weight("a", normal(rng, 5, width)), weight("b", normal(rng, 5, width))
    got, expected = both(lambda g: g.add(g.embed(a), g.embed(b), 0.22), isa, all_outputs(5))
    np.testing.assert_array_equal(got, expected)


@every_level
@pytest.mark.parametrize("groups, group", [(1, 1), (1, 3), (3, 20), (2, 64), (1, 576), (5, 17)])
def test_rmsnorm_agrees(isa, groups, group):
    rng = np.random.default_rng(group)
    rows, w = normal(rng, 5, groups * group, scale=3), weight("w", normal(rng, group))
    got, expected = both(
        lambda g: g.rmsnorm(g.embed(weight("e", rows)), w, 1e-5), isa, all_outputs(5)
    )
    np.testing.assert_allclose(got, expected, rtol=(group + 8) * U, atol=0)


@every_level
@pytest.mark.parametrize("layout", ["adjacent", "halves"])
@pytest.mark.parametrize("head_dim, n_rot", [(2, 2), (10, 6), (64, 64), (80, 20), (96, 96)])
def test_rope_agrees(isa, layout, head_dim, n_rot):
    rng = np.random.default_rng(n_rot)
    rope = Rope(layout, (10000.0 ** -(np.arange(n_rot // 2) / n_rot)).astype(np.float32), 1.2)
    rows = normal(rng, 5, 3 * head_dim)
    step = all_outputs(5, positions=[0, 1, 31, 1000, 131071], pages=[[0] * 4096])
    got, expected = both(lambda g: g.rope(g.embed(weight("e", rows)), head_dim, rope), isa, step)
    # sine and cosine to 4 u, their product with the magnitude, two products and a sum
    assert np.abs(got - expected).max() <= 8 * U * 2 * 1.2 * np.abs(rows).max()


@every_level
@pytest.mark.parametrize("width", [1, 16, 77])
def test_swiglu_agrees_up_to_where_exp_overflows(isa, width):
    rng = np.random.default_rng(width)
    gate, up = normal(rng, 8, width, scale=4), normal(rng, 8, width)
    gate[:, 0] = [0, -87, -88.5, -104, 88, 100, -1e4, 1e4]
    got, expected = both(
        lambda g: g.gate("silu", g.embed(weight("g", gate)), g.embed(weight("u", up))),
        isa,
        all_outputs(8),
    )
    np.testing.assert_allclose(got, expected, rtol=12 * U, atol=1e-37)


@every_level
@pytest.mark.parametrize("n_rows, n_cols", [(1, 1), (16, 32), (17, 33), (40, 100)])
def test_linear_agrees_with_and_without_bias(isa, n_rows, n_cols):
    rng = np.random.default_rng(n_rows)
    rows, w, bias = normal(rng, 5, n_cols), normal(rng, n_rows, n_cols), normal(rng, n_rows)
    bound = (n_cols + 2) * U * (np.abs(rows) @ np.abs(w).T + np.abs(bias))
    for extra in ((), (weight("b", bias),)):
        got, expected = both(
            lambda g: g.linear(g.embed(weight("e", rows)), weight("w", w), *extra),
            isa,
            all_outputs(5),
        )
        assert (np.abs(got - expected) <= bound).all()


SHAPES = [  # n_head, n_head_kv, key_length, value_length, window
    (1, 1, 4, 4, 0),
    (2, 1, 64, 64, 0),
    (9, 3, 64, 64, 0),
    (4, 4, 20, 12, 0),
    (5, 1, 33, 80, 0),
    (8, 2, 80, 80, 40),
    (6, 2, 16, 17, 1),
    (7, 1, 32, 128, 32),
    (16, 2, 128, 128, 0),
    (3, 1, 192, 128, 33),
]


@every_level
@pytest.mark.parametrize("kv_type", ["q8_0", "f16", "f32"])
@pytest.mark.parametrize("n_head, n_head_kv, n_key, n_value, window", SHAPES)
def test_attention_agrees(isa, kv_type, n_head, n_head_kv, n_key, n_value, window):
    rng = np.random.default_rng(n_head)
    heads = Heads(n_head, n_head_kv, n_key, n_value, n_key ** -0.5, window)
    n = 100
    q, k = normal(rng, n, n_head * n_key), normal(rng, n, n_head_kv * n_key)
    v = normal(rng, n, n_head_kv * n_value)

    def attend(g):
        return g.attend(
            *(g.embed(weight(name, x)) for name, x in (("q", q), ("k", k), ("v", v))), heads
        )

    step = all_outputs(n, pages=[[6, 0, 3, 5]])
    got, expected = both(attend, isa, step, max_outputs=n, kv_type=kv_type)
    # A score is off by n_key roundings of |q||k| * scale, a weight by that and exp, the mean by n
    score = (
        np.linalg.norm(q.reshape(-1, n_key), axis=1).max()
        * np.linalg.norm(k.reshape(-1, n_key), axis=1).max()
    )
    bound = (2 * n_key * score * heads.scale + n + 16) * U * np.abs(v).max()
    assert np.abs(got - expected).max() <= bound


@every_level
def test_float16_keys_and_values_round_as_numpy_does(isa):
    """One position: the answer is its value, and so what was stored."""
    v = np.concatenate(
        [
            normal(np.random.default_rng(1), 40),
            np.float32(
                [
                    0,
                    -0.0,
                    6e-8,
                    2.9e-8,
                    3.1e-8,
                    1e-7,
                    6.1e-5,
                    6.09e-5,
                    65504,
                    65519,
                    1 + 2**-11,
                    1 + 3 * 2**-11,
                    -1e-5,
                ]
            ),
        ]
    )
    heads = Heads(1, 1, 4, len(v), 1.0)
    ones = weight("q", np.ones((1, 4)))
    got, _ = both(
        lambda g: g.attend(g.embed(ones), g.embed(ones), g.embed(weight("v", v[None])), heads),
        isa,
        all_outputs(1),
        kv_type="f16",
    )
    np.testing.assert_array_equal(got[0], v.astype(np.float16).astype(np.float32))


@every_level
def test_what_lies_in_a_page_behind_the_last_token_does_not_matter(isa):
    program = tiny_program()
    fresh, used = executor_of(program, isa), executor_of(program, isa)
    used.step(batch([9] * 40))  # fills both pages with another sequence
    np.testing.assert_array_equal(fresh.step(batch([1, 2, 3])), used.step(batch([1, 2, 3])))


@every_level
def test_the_whole_tiny_program_agrees(isa):
    program = tiny_program(window=5)
    step = batch([3, 1, 4, 1, 5] * 8, outputs=range(40))
    got = executor_of(program, isa).step(step)
    expected = ReferenceExecutor(program, n_pages=2, kv_type="f32").step(step)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# The same bits, whatever else is in the step

QTYPES = (
    GGMLQuantizationType.F16,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q5_1,
)


def random_program(seed: int):
    """Two layers of random shape and format over 50 tokens."""
    rng = np.random.default_rng(seed)
    n_head_kv, n_embd, n_ff = (
        int(rng.integers(1, 4)),
        32 * int(rng.integers(1, 5)),
        32 * int(rng.integers(1, 9)),
    )
    n_head, head_dim = n_head_kv * int(rng.integers(1, 6)), 2 * int(rng.integers(2, 33))
    window = int(rng.choice([0, 3, 40]))
    heads = Heads(n_head, n_head_kv, head_dim, head_dim, head_dim ** -0.5, window)
    rope = Rope(
        str(rng.choice(["adjacent", "halves"])),
        (0.1 ** np.arange(head_dim // 2)).astype(np.float32),
    )

    def matrix(n_rows, n_cols):
        values = normal(rng, n_rows, n_cols, scale=n_cols ** -0.5)
        qtype = QTYPES[rng.integers(len(QTYPES))] if n_cols % 32 == 0 else GGMLQuantizationType.F16
        return QTensor(
            "w", qtype, values.shape, gguf.quants.quantize(values, qtype).reshape(-1).view(np.uint8)
        )

    def norm():
        return weight("norm", 1 + normal(rng, n_embd, scale=0.1))

    g = Recorder()
    x = g.embed(matrix(50, n_embd))
    for _ in range(2):
        h = g.rmsnorm(x, norm(), 1e-5)
        q, k, v = (
            g.linear(h, matrix(n * head_dim, n_embd)) for n in (n_head, n_head_kv, n_head_kv)
        )
        q, k = g.rope(q, head_dim, rope), g.rope(k, head_dim, rope)
        x = g.add(x, g.linear(g.attend(q, k, v, heads), matrix(n_embd, n_head * head_dim)))
        h = g.rmsnorm(x, norm(), 1e-5)
        x = g.add(
            x,
            g.linear(
                g.gate("silu", g.linear(h, matrix(n_ff, n_embd)), g.linear(h, matrix(n_ff, n_embd))),
                matrix(n_embd, n_ff),
            ),
        )
    return g.finish("random", g.linear(g.outputs(g.rmsnorm(x, norm(), 1e-5)), matrix(50, n_embd)))


@every_level
@pytest.mark.parametrize("seed", range(4))
def test_logits_are_the_same_bits_in_chunks_in_a_crowd_and_with_any_number_of_threads(isa, seed):
    program, rng = random_program(seed), np.random.default_rng(seed)
    tokens, others = rng.integers(0, 50, 70), rng.integers(0, 50, 40)
    whole = prefill(executor_of(program, isa, threads=1, max_outputs=128), tokens, 512)
    assert np.isfinite(whole).all() and whole.std() > 0
    for threads in (1, 2, 3):
        executor = executor_of(program, isa, threads=threads, max_outputs=128)
        for chunk in (512, 7, 1):
            np.testing.assert_array_equal(prefill(executor, tokens, chunk), whole)
        crowd = batch(
            [*others, *tokens], [*range(40), *range(70)], [1] * 40 + [0] * 70, PAGES, range(40, 110)
        )
        np.testing.assert_array_equal(executor.step(crowd), whole)
        mixed = np.concatenate([tokens, others])
        order = np.argsort(
            np.concatenate([np.arange(70), np.arange(40) + 0.5])
        )  # one of each in turn
        positions, sequences = (
            np.array([*range(70), *range(40)])[order],
            np.repeat([0, 1], [70, 40])[order],
        )
        got = executor.step(
            batch(mixed[order], positions, sequences, PAGES, np.flatnonzero(sequences == 0))
        )
        np.testing.assert_array_equal(got, whole)
        executor.close()


# Lowering

def test_products_share_one_quantised_row():
    ops = lower(random_program(1)).ops
    assert len({id(op.params["rope"]) for op in ops if op.name == "rope"}) == 1
    assert sum(op.name == "rope_table" for op in ops) == 1
    read = [op.inputs[0].id for op in ops if op.name == "quantize"]
    assert read and len(read) == len(set(read))


@pytest.mark.parametrize("seed", range(4))
def test_every_conflict_has_a_barrier_and_rows_pass_on_without(seed):
    lowered = lower(random_program(seed))
    slot_of, _ = plan_slots(lowered)
    waits = barriers(lowered.ops, slot_of)
    by_rows = {"embed", "rmsnorm", "quantize", "rope", "rope_table", "store_kv", "gate", "add"}
    for j, later in enumerate(lowered.ops):
        for i in range(j):
            earlier = lowered.ops[i]
            written = {slot_of[b.id] for b in (earlier.out, later.out) if b}
            touched = [
                {slot_of[b.id] for b in (*op.inputs, *([op.out] if op.out else ()))}
                for op in (earlier, later)
            ]
            rows = {(op.out or op.inputs[0]).rows if op.name in by_rows else f"by {op.name}"
                    for op in (earlier, later)}
            stored = earlier.name == "store_kv" and later.name == "attend"
            if (
                written & touched[0] & touched[1]
                and (len(rows) > 1 or not rows <= {"tokens", "outputs"})
                or stored
            ):
                assert any(waits[i + 1:j + 1]), (earlier, later)
    names = [op.name for op in lowered.ops]
    assert not any(
        wait
        for wait, name, before in zip(waits[1:], names[1:], names)
        if (before, name) == ("add", "rmsnorm")
    )
    assert sum(waits) <= 2 * 10 + 4  # a layer has ten, and the way to the logits four


# Refusals

GOOD = batch([1, 2], [0, 1])
BAD = {
    "no token": batch([], [], [], outputs=[]),
    "token below": batch([-1]),
    "token above": batch([11]),
    "position below": batch([1], [-1]),
    "position above": batch([1], [64]),
    "position twice": batch([1, 2], [3, 3]),
    "sequence below": batch([1], sequences=[-1]),
    "sequence above": batch([1], sequences=[1]),
    "page below": batch([1], pages=[[-1, 0]]),
    "page above": batch([1, 2], [0, 40], pages=[[0, 8]]),
    "output below": batch([1], outputs=[-1]),
    "output above": batch([1], outputs=[1]),
    "too many tokens": batch([1] * 17, pages=[[0]]),
    "too many outputs": batch([1] * 5, outputs=[0] * 5),
    "too many sequences": batch([1], pages=[[0]] * 4),
    "lengths differ": batch([1, 2], [0]),
    "int64": Batch(
        *(
            getattr(GOOD, name).astype(np.int64)
            for name in ("tokens", "positions", "sequences", "pages", "outputs")
        )
    ),
    "flat pages": batch([1], pages=[0, 1]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_refused_and_does_no_harm(name):
    executor = executor_of(tiny_program(), max_tokens=16, max_outputs=4, max_sequences=3)
    expected = executor.step(GOOD).copy()
    with pytest.raises(KernelError, match="batch"):
        executor.step(BAD[name])
    np.testing.assert_array_equal(executor.step(GOOD), expected)


def test_pages_behind_the_last_position_may_hold_anything():
    executor_of(tiny_program()).step(batch([1], pages=[[0, -1]]))


def test_a_step_may_ask_for_no_logits():
    assert executor_of(tiny_program()).step(batch([1], outputs=[])).shape == (0, 11)


@pytest.mark.parametrize(
    "limits",
    [{"n_pages": 0}, {"threads": 0}, {"max_tokens": 0}, {"kv_type": "q8"}, {"max_outputs": -1}],
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(KernelError):
        executor_of(tiny_program(), **limits)


@pytest.mark.parametrize("n_pages", [1 << 40, 1 << 50, 1 << 61, 1 << 80])
def test_a_cache_larger_than_memory_is_a_load_error(n_pages):
    with pytest.raises(ModelLoadError, match="no memory"):
        executor_of(tiny_program(), n_pages=n_pages)


def test_an_unknown_instruction_set_is_refused_by_name(monkeypatch):
    with pytest.raises(KernelError, match="instruction set of this machine, scalar.*got 'sse9'"):
        NativeExecutor(tiny_program(), n_pages=1, isa="sse9")
    monkeypatch.setenv("TINYCHAT_ISA", "scalar")
    assert NativeExecutor(tiny_program(), n_pages=1).name == "native scalar"


# Threads and lifetime

def test_two_executors_run_at_once():
    program, step = random_program(0), batch(range(40), outputs=range(40), pages=PAGES)
    executors = [executor_of(program) for _ in range(2)]
    expected, got = executors[0].step(step).copy(), [[], []]

    def run(i):
        got[i] = [executors[i].step(step).copy() for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(logits) for logits in got] == [20, 20]
    for logits in (*got[0], *got[1]):
        np.testing.assert_array_equal(logits, expected)


def test_other_python_threads_go_on_during_a_step():
    """Under an endless switch interval a thread gives the GIL up only inside the step."""
    executor = executor_of(random_program(2), threads=1)
    step = batch(range(50), pages=PAGES)
    inside, seen = [False], False

    def run():
        for _ in range(500):
            inside[0] = True
            executor.step(step)
            inside[0] = False

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive() and not seen:
            time.sleep(0)  # gives the GIL up at once; it comes back when the step lets go of it
            seen = inside[0]
    finally:
        sys.setswitchinterval(interval)
    thread.join(60)
    assert seen


def test_a_second_thread_is_refused_while_a_step_runs():
    executor = executor_of(tiny_program())
    with executor._stepping:
        with pytest.raises(KernelError, match="already running"):
            executor.step(GOOD)
    executor.step(GOOD)


def test_a_closed_executor_says_so_and_its_last_logits_stay():
    executor = executor_of(tiny_program())
    logits = executor.step(GOOD)
    before = logits.copy()
    executor.close()
    executor.close()
    np.testing.assert_array_equal(logits, before)
    with pytest.raises(KernelError, match="closed"):
        executor.step(GOOD)
    with pytest.raises(KernelError):
        executor.sample(before[0], SamplingParams(), [], 0.5)


def run_python(code: str) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=here,  # not the repository's root, whose tinychat may be without kernels
    )


START = """
import os
from helpers_program import batch, tiny_program
from tinychat.ops.native import NativeExecutor
executor = NativeExecutor(tiny_program(), n_pages=2, threads=3)
executor.step(batch([1]))
"""


def test_a_forgotten_executor_does_not_hold_up_the_interpreter():
    ended = run_python(START + "print('done')")
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_the_parent_goes_on():
    ended = run_python(START + """
child = os.fork()
if child == 0:
    try:
        executor.step(batch([1]))
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    executor.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
executor.step(batch([1]))
executor.close()
print("parent")
""")
    assert ended.returncode == 0, ended.stderr
    assert (
        "KernelError" in ended.stdout
        and "forked" in ended.stdout
        and ended.stdout.endswith("parent\n")
    )


def test_threads_default_to_the_processors_allowed():
    assert 1 <= native.default_threads() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_control_groups_quota_is_read(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert native._cgroup_quota(tmp_path) == expected


def test_memory_is_counted():
    half, full = (executor_of(tiny_program(), kv_type=kind) for kind in ("f16", "f32"))
    assert full.kv_bytes == 2 * half.kv_bytes > 0
    assert half.weight_bytes > 0


def test_weights_in_a_mapped_file_survive_giving_their_pages_back(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    table = normal(np.random.default_rng(0), 64, 2048)
    writer.add_tensor("w", table)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    with open_gguf(tmp_path / "m.gguf") as file:
        w = file.tensors["w"]
        assert _is_mapped(w.data) and not _is_mapped(weight("x", table).data)
        g = Recorder()
        program = g.finish("tied", g.linear(g.outputs(g.embed(w)), w))
        executor = executor_of(program, max_tokens=64)
    got = executor.step(batch(range(60), pages=PAGES, outputs=range(60)))
    np.testing.assert_allclose(got, table[:60] @ table.T, atol=2100 * U * 2048 * 4)
    np.testing.assert_array_equal(w.data.view(np.float32).reshape(64, 2048), table)


# Sampling

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0),
    SamplingParams(temperature=1.5, top_k=0),
    SamplingParams(temperature=0.1, top_k=0, top_p=1, min_p=0),
    SamplingParams(temperature=2, top_k=0, top_p=0.5, min_p=0),
    SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0.2),
    SamplingParams(temperature=1e30, top_k=0, top_p=1, min_p=0),
    SamplingParams(temperature=1e-300, top_k=0, top_p=1, min_p=0),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, repeat_penalty=1.3),
    SamplingParams(temperature=1, top_k=1000, top_p=1, min_p=0, repeat_penalty=0.5),
    SamplingParams(temperature=1, top_k=3, top_p=1, min_p=1),
    SamplingParams(temperature=0, repeat_penalty=1e300),
]


def sampler(n_vocab: int, isa=None) -> NativeExecutor:
    g = Recorder()
    return executor_of(
        g.finish("sampler", g.outputs(g.embed(weight("e", np.zeros((1, n_vocab)))))), isa, threads=1
    )


@every_level
@pytest.mark.parametrize("n_vocab", [1, 2, 63, 64, 65, 1000, 4111])
def test_sampling_takes_the_token_that_numpy_takes(isa, n_vocab):
    rng, executor = np.random.default_rng(n_vocab), sampler(n_vocab, isa)
    for params in PARAMS:
        for spread in (0.0, 0.5, 4.0, 30.0):
            logits = normal(rng, n_vocab, scale=spread)
            if spread == 4.0:
                logits = np.round(logits)  # many are equal
            recent = [int(i) for i in rng.integers(0, n_vocab, 80)]
            for coin in (0.0, float(rng.random()), 1 - 2.0 ** -53):
                got = executor.sample(logits, params, recent, coin)
                expected = sampling.sample(logits, params, recent, coin)
                assert got == expected or near_a_boundary(logits, params, recent, coin), (
                    params,
                    spread,
                    coin,
                )


def near_a_boundary(logits, params, recent, coin) -> bool:
    """Whether moving the coin or top_p by what a twin may round changes NumPy's own answer."""
    moved = [(params.top_p, min(coin * (1 + sign * 1e-6), 1 - 2.0 ** -53)) for sign in (-1, 1)]
    moved += [(min(params.top_p * (1 + sign * 1e-6), 1.0), coin) for sign in (-1, 1)]
    fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
    ids = {
        sampling.sample(logits, SamplingParams(**{**fields, "top_p": p}), recent, c)
        for p, c in moved
    }
    return len(ids) > 1


@every_level
def test_sampling_never_takes_what_is_not_finite(isa):
    executor = sampler(200, isa)
    logits = np.full(200, np.nan, np.float32)
    logits[::3], logits[1::3] = np.inf, -np.inf
    with pytest.raises(KernelError, match="finite"):
        executor.sample(logits, SamplingParams(), [], 0.5)
    logits[77] = -3e38
    for params in PARAMS:
        assert executor.sample(logits, params, [77], 0.99) == 77


def test_sampling_refuses_a_row_of_another_length():
    with pytest.raises(KernelError, match="expected 10 logits"):
        sampler(10).sample(np.zeros(9, np.float32), SamplingParams(), [], 0.5)


def test_penalized_ids_may_be_outside_the_vocabulary():
    params = SamplingParams(temperature=0, repeat_penalty=2)
    assert sampler(3).sample(np.float32([1, 3, 2]), params, [-1, 1, 1, 3, 10 ** 12], 0.5) == 2

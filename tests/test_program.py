"""Recording, printing, sharing buffers, and judging batches."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers_program import batch, tiny_program, weight
from tinychat.errors import KernelError
from tinychat.ops.batch import Batch, Limits
from tinychat.ops.program import plan_slots
from tinychat.ops.recorder import Recorder

TINY = """\
program tiny: 19 operations, 1 KV layers
  b0:8 = embed(token_embd<F32 11x8>)
  b1:8 = rmsnorm(b0, norm<F32 8>, eps=1e-05, group=8)
  b2:8 = linear(b1, q<F32 8x8>, q.bias<F32 8>)
  b3:8 = rope(b2, head_dim=4, rope=halves/4)
  b4:4 = linear(b1, k<F32 4x8>)
  b5:4 = rope(b4, head_dim=4, rope=halves/4)
  b6:6 = linear(b1, v<F32 6x8>)
  store_kv(b5, b6, layer=0)
  b7:12 = attend(b3, layer=0, heads=2/1 heads of 4 window 3)
  b8:8 = linear(b7, o<F32 8x12>)
  b9:8 = add(b0, b8, scale=0.5)
  b10:16 = linear(b9, gate<F32 16x8>)
  b11:16 = linear(b9, up<F32 16x8>)
  b12:16 = gate(b10, b11, fn=silu)
  b13:8 = linear(b12, down<F32 8x16>)
  b14:8 = add(b9, b13, scale=1)
  b15:8 = outputs(b14)
  b16:11 = linear(b15, output<F32 11x8>)
  b17:11 = scale(b16, scale=2)"""


def test_a_program_prints_as_its_operations():
    assert str(tiny_program(window=3)) == TINY


def test_rows_become_outputs_and_stay_so():
    program = tiny_program()
    assert [b.rows for b in program.buffers] == ["tokens"] * 15 + ["outputs"] * 3
    assert program.result is program.buffers[-1] and program.n_vocab == 11


def test_a_shared_weight_is_listed_once():
    g, table = Recorder(), weight("token_embd", np.ones((5, 4)))
    x = g.embed(table)
    program = g.finish("tied", g.linear(g.outputs(x), table))
    assert program.weights() == [table]


def test_a_matrix_of_another_width_is_our_own_mistake():
    g = Recorder()
    x = g.embed(weight("token_embd", np.ones((5, 4))))
    with pytest.raises(AssertionError):
        g.linear(x, weight("w", np.ones((2, 3))))


def random_program(choices: list[int]):
    """Additions and halvings of earlier buffers, as the numbers say."""
    g = Recorder()
    buffers = [g.embed(weight("token_embd", np.ones((3, 4))))]
    for choice in choices:
        x = buffers[choice % len(buffers)]
        alike = [b for b in buffers if b.rows == x.rows]
        if choice % 5 == 0 and x.rows == "tokens":
            buffers.append(g.outputs(x))
        else:
            buffers.append(g.add(x, alike[choice // 7 % len(alike)]))
    return g.finish("random", g.scale(buffers[-1], 0.5))


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_no_living_buffer_is_overwritten(choices):
    program = random_program(choices)
    slot_of, widths = plan_slots(program)
    holder: dict[int, int] = {}
    for op in program.ops:
        for x in op.inputs:
            assert holder[slot_of[x.id]] == x.id, "overwritten before its last use"
        assert slot_of[op.out.id] not in {slot_of[x.id] for x in op.inputs}, "written over an input"
        holder[slot_of[op.out.id]] = op.out.id
    assert holder[slot_of[program.result.id]] == program.result.id
    for b in program.buffers:
        assert widths[slot_of[b.id]] >= b.width
        assert {c.rows for c in program.buffers if slot_of[c.id] == slot_of[b.id]} == {b.rows}


def test_a_deep_model_needs_no_more_memory_than_a_shallow_one():
    def slots(n_layer):
        g = Recorder()
        x = g.embed(weight("token_embd", np.ones((3, 4))))
        for _ in range(n_layer):
            x = g.add(x, g.scale(x, 0.5))
        return len(plan_slots(g.finish("deep", g.outputs(x)))[1])

    assert slots(50) == slots(2)


LIMITS = Limits(n_pages=4, max_tokens=6, max_outputs=2, max_sequences=3)


def check(step: Batch) -> None:
    program = tiny_program()
    step.whole(program).check(program, LIMITS.of(program))


@pytest.mark.parametrize("good", [
    batch([1]),
    batch([0, 10], outputs=[]),
    batch([1, 2, 3], [33, 5, 34], [1, 0, 1], pages=[[0, -1], [2, 3]], outputs=[0, 2]),
    batch([1], [31], pages=[[3, 99]]),
])
def test_a_good_batch_passes(good):
    check(good)


@pytest.mark.parametrize("bad, complaint", [
    (batch([], outputs=[]), "number of tokens is 0, expected 1 to 6"),
    (batch([1] * 7), "number of tokens is 7, expected 1 to 6"),
    (batch([1], pages=np.zeros((4, 1))), "number of sequences is 4, expected 1 to 3"),
    (batch([1, 2, 3], outputs=[0, 1, 2]), "number of outputs is 3, expected 0 to 2"),
    (batch([1, 11]), r"tokens\[1\] is 11, expected 0 to 10"),
    (batch([-1]), r"tokens\[0\] is -1"),
    (batch([1], sequences=[1]), r"sequences\[0\] is 1, expected 0 to 0"),
    (batch([1], outputs=[1]), r"outputs\[0\] is 1, expected 0 to 0"),
    (batch([1], [64]), r"positions\[0\] is 64, expected 0 to 63"),
    (batch([1], [-1]), r"positions\[0\] is -1"),
    (batch([1], [32], pages=[[0, 4]]), r"pages\[1\] is 4, expected 0 to 3"),
    (batch([1], [32], pages=[[-1, 0]]), r"pages\[0\] is -1"),
    (batch([1, 2], [3, 3]), r"positions\[1\] is 3, expected above 3"),
    (batch([1, 2, 3], [3, 0, 2], [0, 1, 0], pages=[[0], [1]]),
     r"positions\[2\] is 2, expected above 3"),
    (batch([1, 2], [0]), r"expected positions as int32 \(2\), got int32 \(1,\)"),
    (batch([[1]]), r"expected tokens as int32 \(1\), got int32 \(1, 1\)"),
])
def test_a_bad_batch_is_refused_with_what_is_wrong(bad, complaint):
    with pytest.raises(KernelError, match=complaint):
        check(bad)


def test_other_integers_than_int32_are_refused():
    wide = replace(batch([1]), tokens=np.array([1], np.int64))
    with pytest.raises(KernelError, match="expected tokens as int32 \\(1\\), got int64"):
        check(wide)

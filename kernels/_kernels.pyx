# cython: language_level=3, boundscheck=True, wraparound=False
"""Every entry that Python can call: it checks, releases the GIL, and calls C.

tinychat/ops/lowering.py makes the arrays that Runner takes; kernels.h says what they mean.
"""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy as np

from kernels cimport *

include "text.pxi"

page_tokens = PAGE_TOKENS
row_floats = ROW_FLOATS
kv_types = {"f32": KV_F32, "f16": KV_F16, "q8_0": KV_Q8_0}
rope_layouts = {"adjacent": ROPE_ADJACENT, "halves": ROPE_HALVES}
gatings = {"softmax": GATING_SOFTMAX, "sigmoid": GATING_SIGMOID, "chosen": GATING_CHOSEN}
op_kinds = {op_name(kind).decode(): kind for kind in range(OP_KINDS)}
activations = {activation_name(fn).decode(): fn for fn in range(FN_KINDS)}

# The fields of the structs in kernels.h, in their order, as numpy.dtype takes them
op_fields = [(name, "<i4") for name in ("kind", "barrier", "outputs", "out")]
op_fields += [("in", "<i4", 5), ("weights", "<i4", 3)]
op_fields += [(name, "<i4") for name in (
    "width", "group", "n_head", "fn", "begin", "length", "offset", "weighted", "layer", "state",
    "params")]
op_fields += [("scalar", "<f4")]
attention_fields = [(name, "<i4") for name in (
    "n_head", "n_head_kv", "key_length", "value_length", "window", "chunk", "causal", "span")]
attention_fields += [("scale", "<f4"), ("softcap", "<f4")]
routing_fields = [(name, "<i4") for name in (
    "n_expert", "n_used", "gating", "n_group", "n_group_used", "normalise")] + [("scale", "<f4")]
mamba2_fields = [(name, "<i4") for name in ("n_head", "head_dim", "n_group", "n_state")]
delta_net_fields = [(name, "<i4") for name in (
    "n_key_head", "n_value_head", "key_length", "value_length", "tiled")]


def isa_levels() -> list[str]:
    """Instruction sets that this machine has, slowest first."""
    cdef const kernel_table *const *table = kernel_tables()
    names = []
    while table[0] is not NULL:
        names.append(table[0].isa.decode())
        table += 1
    return names


cdef const kernel_table *_table(str isa) except NULL:
    cdef const kernel_table *const *table = kernel_tables()
    while table[0] is not NULL:
        if table[0].isa.decode() == isa:
            return table[0]
        table += 1
    raise ValueError(f"expected one of {', '.join(isa_levels())}, got {isa!r}")


def multiply_adds(str isa, bint is_int8, int64_t rounds) -> float:
    """Operations done by `rounds` rounds of multiply-adds in registers alone; 0: none is known."""
    cdef const char *name = _table(isa).isa
    cdef double n
    with nogil:
        n = c_multiply_adds(name, is_int8, rounds)
    return n


def activation_floats(int qtype, int64_t n_rows, int64_t n_cols) -> int | None:
    """float32s that a row of n_cols takes once it is quantised for such a matrix; 0: it stays.

    None: no kernel multiplies with such a matrix.
    """
    cdef packed_matrix plan
    if linear_plan(qtype, n_rows, n_cols, &plan) < 0:
        return None
    return linear_act_bytes(n_cols) // sizeof(float) if linear_wants_int8(&plan) else 0


cdef void *_allocate(size_t n, size_t size) except NULL:
    cdef void *memory = calloc(n if n else 1, size)
    if memory is NULL:
        raise MemoryError
    return memory


cdef void *_copied(array, size_t item_size) except NULL:
    """The memory of a structured array, whose items must be as large as their struct."""
    if array.dtype.itemsize != item_size:
        raise ValueError(f"expected items of {item_size} bytes, got {array.dtype}")
    cdef const uint8_t[::1] data = array.view(np.uint8)
    cdef void *memory = _allocate(array.shape[0], item_size)
    if data.shape[0]:
        memcpy(memory, &data[0], data.shape[0])
    return memory


cdef class Runner:
    """A lowered program with its weights and memory: step runs it, sample draws from its logits.

    ops, attentions, routings, mamba2s, delta_nets: structured arrays of the fields above; slots:
    (stride, is_outputs) each; result: float32 (max_outputs, stride) 64-byte aligned, the memory of
    slot `result_slot`; vectors: float32 1-D arrays; matrices: (qtype, n_parts, n_rows, n_cols,
    uint8 bytes, pack, is_mapped) each; ropes: (layout, inv_freq, magnitude, axes or None) each; kv:
    (n_head_kv, key_length, value_length, has_reach) each; states: floats of each recurrent state.
    sizes: what the runner struct has under these names.
    Raises: ValueError, MemoryError. Indices inside `ops` are the lowering's own and not checked.
    """

    cdef runner r
    cdef sample_memory memory
    cdef list keep
    cdef bint is_open

    def __init__(self, str isa, int threads, *, ops, attentions, routings, mamba2s, delta_nets,
                 list slots, result, int result_slot, list vectors, list matrices, list ropes,
                 list kv, str kv_type, list states, int64_t n_vocab, dict sizes):
        if self.is_open:
            raise ValueError("a Runner is made once")
        if threads < 1:
            raise ValueError("expected at least one thread")
        self.is_open = True
        self.keep = [result, vectors, matrices, ropes]
        self.r.table = _table(isa)
        self._set_sizes(sizes)
        self.r.ops = <program_op *>_copied(ops, sizeof(program_op))
        self.r.n_ops = len(ops)
        self.r.attentions = <attention *>_copied(attentions, sizeof(attention))
        self.r.routings = <routing *>_copied(routings, sizeof(routing))
        self.r.mamba2s = <mamba2_shape *>_copied(mamba2s, sizeof(mamba2_shape))
        self.r.delta_nets = <delta_net_shape *>_copied(delta_nets, sizeof(delta_net_shape))
        self._set_slots(slots, result, result_slot)
        self._set_vectors(vectors)
        self._set_matrices(matrices)
        self._set_ropes(ropes)
        self._set_kv(kv, kv_types[kv_type])
        self._set_states(states)
        self._set_sampling(n_vocab)
        self.r.pool = pool_create(threads)
        if self.r.pool is NULL:
            raise MemoryError(f"{threads} threads could not be started")
        cdef const char *fault
        with nogil:
            fault = runner_build(&self.r)
        if fault is not NULL:
            raise MemoryError(fault.decode())
        self._forget_packed_sources(matrices)

    cdef _forget_packed_sources(self, list matrices):
        """The bytes of a matrix that is only multiplied with are not needed once it is packed."""
        looked_up = {self.r.ops[i].weights[0] for i in range(self.r.n_ops)
                     if self.r.ops[i].kind in (OP_embed, OP_embed_positions)}
        for i in range(self.r.n_matrices):
            if i not in looked_up:
                self.r.matrices[i].source = NULL
        self.keep[2] = [matrix for i, matrix in enumerate(matrices) if i in looked_up]

    cdef _set_sizes(self, dict sizes):
        self.r.n_ids, self.r.window = sizes["n_ids"], sizes["window"]
        self.r.input_width = sizes["input_width"]
        self.r.n_axes, self.r.n_spans = sizes["n_axes"], sizes["n_spans"]
        self.r.n_pages, self.r.n_window_pages = sizes["n_pages"], sizes["n_window_pages"]
        self.r.n_states, self.r.max_tokens = sizes["n_states"], sizes["max_tokens"]
        self.r.max_outputs, self.r.max_sequences = sizes["max_outputs"], sizes["max_sequences"]
        if min(self.r.n_pages, self.r.max_tokens, self.r.max_outputs, self.r.max_sequences) < 1:
            raise ValueError("expected at least one page, token, output and sequence")

    cdef _set_slots(self, list slots, float[:, ::1] result, int result_slot):
        self.r.slots = <slot *>_allocate(len(slots), sizeof(slot))
        self.r.n_slots = len(slots)
        for i, (stride, outputs) in enumerate(slots):
            if stride % ROW_FLOATS:
                raise ValueError("a slot's stride must be a multiple of ROW_FLOATS")
            self.r.slots[i].stride, self.r.slots[i].outputs = stride, outputs
        cdef slot *last = &self.r.slots[result_slot]
        if (result.shape[0] < self.r.max_outputs or result.shape[1] != last.stride
                or not last.outputs):
            raise ValueError("the result's memory must be (max_outputs, stride of its slot)")
        last.data = &result[0, 0]

    cdef _set_vectors(self, list vectors):
        cdef const float[::1] values
        self.r.vectors = <vector *>_allocate(len(vectors), sizeof(vector))
        self.r.n_vectors = len(vectors)
        for i, values in enumerate(vectors):
            self.r.vectors[i].data, self.r.vectors[i].n = &values[0], values.shape[0]

    cdef _set_matrices(self, list matrices):
        cdef const uint8_t[::1] source
        cdef matrix *m
        self.r.matrices = <matrix *>_allocate(len(matrices), sizeof(matrix))
        self.r.n_matrices = len(matrices)
        for i, (qtype, n_parts, n_rows, n_cols, source, pack, is_mapped) in enumerate(matrices):
            m = &self.r.matrices[i]
            m.qtype, m.n_parts, m.is_mapped = qtype, n_parts, is_mapped
            m.n_rows, m.n_cols = n_rows, n_cols
            m.row_bytes = linear_row_bytes(qtype, n_cols)
            if m.row_bytes == 0 or source.shape[0] != m.row_bytes * n_rows * n_parts:
                raise ValueError(f"{n_parts}x{n_rows}x{n_cols} weights of this type do not take "
                                 f"{source.shape[0]} bytes")
            m.source = &source[0]
            if pack and linear_plan(qtype, n_rows, n_cols, &m.packed) < 0:
                raise ValueError(f"no kernel takes {n_rows}x{n_cols} weights of this type")

    cdef _set_ropes(self, list ropes):
        cdef const float[::1] inv_freq
        cdef const int32_t[::1] axes
        self.r.ropes = <rope *>_allocate(len(ropes), sizeof(rope))
        self.r.n_ropes = len(ropes)
        for i, (layout, inv_freq, magnitude, axes) in enumerate(ropes):
            self.r.ropes[i].layout = rope_layouts[layout]
            self.r.ropes[i].n_rot = 2 * inv_freq.shape[0]
            self.r.ropes[i].magnitude = magnitude
            self.r.ropes[i].inv_freq = &inv_freq[0] if inv_freq.shape[0] else NULL
            self.r.ropes[i].axes = &axes[0] if axes is not None and axes.shape[0] else NULL

    cdef _set_kv(self, list kv, int32_t kv_type):
        self.r.kv = <kv_layer *>_allocate(len(kv), sizeof(kv_layer))
        self.r.n_kv = len(kv)
        for i, (n_head_kv, key_length, value_length, has_reach) in enumerate(kv):
            self.r.kv[i].shape = kv_shape(n_head_kv, key_length, value_length, has_reach)
            self.r.kv[i].type = kv_type

    cdef _set_states(self, list states):
        self.r.states = <recurrent_state *>_allocate(len(states), sizeof(recurrent_state))
        self.r.n_recurrent = len(states)
        for i, n_floats in enumerate(states):
            self.r.states[i].n_floats = n_floats

    cdef _set_sampling(self, int64_t n_vocab):
        self.memory.n_vocab = n_vocab
        self.memory.penalized = <float *>_allocate(n_vocab, sizeof(float))
        self.memory.maxima = <float *>_allocate(n_vocab // SAMPLE_GROUP + 1, sizeof(float))
        self.memory.ranking = <ranked *>_allocate(n_vocab, sizeof(ranked))

    @property
    def weight_bytes(self) -> int:
        return self.r.weight_bytes

    @property
    def kv_bytes(self) -> int:
        return self.r.kv_bytes

    @property
    def state_bytes(self) -> int:
        return self.r.state_bytes

    def step(self, const int32_t[::1] tokens, const int32_t[::1] positions,
             const int32_t[::1] sequences, const int32_t[:, ::1] pages,
             const int32_t[::1] outputs, const int32_t[:, ::1] window_pages=None,
             const int32_t[::1] states=None, const float[:, ::1] inputs=None,
             const int32_t[::1] input_rows=None, const int32_t[:, ::1] axes=None,
             const int32_t[:, :, ::1] spans=None) -> bool:
        """Runs the program on a batch; the result is then in its array. False: refused.

        What the program reads must be there; without window_pages they are `pages`.
        """
        cdef batch b
        memset(&b, 0, sizeof(batch))
        cdef int64_t n = tokens.shape[0], n_sequences = pages.shape[0]
        if not self.is_open or n == 0 or pages.shape[1] == 0:
            return False
        if positions.shape[0] != n or sequences.shape[0] != n:
            return False
        if not pool_is_ours(self.r.pool):
            raise ValueError("made before this process was forked: its threads are in the parent")
        b.tokens, b.positions, b.sequences = &tokens[0], &positions[0], &sequences[0]
        b.n_tokens, b.n_outputs = n, outputs.shape[0]
        b.n_sequences, b.max_pages = n_sequences, pages.shape[1]
        b.pages = &pages[0, 0] if n_sequences else NULL
        b.outputs = &outputs[0] if outputs.shape[0] else NULL
        if self.r.window:
            b.window_pages = b.pages
        if self.r.window and window_pages is not None:
            if (window_pages.shape[0] != n_sequences or window_pages.shape[1] != b.max_pages
                    or n_sequences == 0):
                return False
            b.window_pages = &window_pages[0, 0]
        if self.r.n_recurrent:
            if states is None or n_sequences == 0 or states.shape[0] != n_sequences:
                return False
            b.states = &states[0]
        if self.r.input_width:
            if (inputs is None or input_rows is None or input_rows.shape[0] != n
                    or inputs.shape[1] != self.r.input_width):
                return False
            b.input_rows, b.n_inputs = &input_rows[0], inputs.shape[0]
            b.inputs = &inputs[0, 0] if b.n_inputs else NULL
        if self.r.n_axes:
            if axes is None or axes.shape[0] != n or axes.shape[1] != self.r.n_axes:
                return False
            b.axes = &axes[0, 0]
        if self.r.n_spans:
            if (spans is None or spans.shape[0] != n or spans.shape[1] != self.r.n_spans
                    or spans.shape[2] != 2):
                return False
            b.spans = &spans[0, 0, 0]
        cdef int accepted
        with nogil:
            accepted = runner_accepts(&self.r, &b)
            if accepted:
                runner_step(&self.r, &b)
        return accepted

    def copy_state(self, int64_t source, int64_t target):
        """What place `source` of the recurrent states holds, to `target`. Not while a step runs."""
        if not self.is_open:
            return
        if not (0 <= source < self.r.n_states and 0 <= target < self.r.n_states):
            raise ValueError(f"expected places below {self.r.n_states}, got {source} and {target}")
        with nogil:
            runner_copy_state(&self.r, source, target)

    def sample(self, const float[::1] logits, const int64_t[::1] recent, double coin, *,
               double temperature, double top_p, int64_t top_k, double min_p,
               double repeat_penalty) -> int:
        """A token id drawn from `logits` (n_vocab,); -1 when none is finite."""
        if not self.is_open or logits.shape[0] != self.memory.n_vocab:
            raise ValueError(f"expected {self.memory.n_vocab} logits of an open Runner, "
                             f"got {logits.shape[0]}")
        cdef sample_params params = sample_params(temperature, top_p, min_p, repeat_penalty, top_k)
        cdef const int64_t *ids = &recent[0] if recent.shape[0] else NULL
        cdef int64_t id
        with nogil:
            id = sample_logits(self.r.table, &self.memory, &logits[0], &params, ids,
                               recent.shape[0], coin)
        return id

    def close(self):
        """Ends the threads and frees the memory, but not the result. Not while a step runs."""
        if not self.is_open:
            return
        self.is_open = False
        with nogil:
            runner_free(&self.r)
        free(self.memory.penalized)
        free(self.memory.maxima)
        free(self.memory.ranking)
        self.keep = []

    def __dealloc__(self):
        self.close()


cdef _aligned(size_t n_bytes):
    """uint8 (n_bytes,) that begins at a cache line."""
    memory = np.empty(n_bytes + MEMORY_ALIGN, np.uint8)
    start = -memory.ctypes.data % MEMORY_ALIGN
    return memory[start:start + n_bytes]


cdef int _check_weights(int qtype, const uint8_t[::1] raw, int64_t n_rows, int64_t n_cols,
                        packed_matrix *m) except -1:
    if linear_plan(qtype, n_rows, n_cols, m) < 0:
        raise ValueError(f"no kernel reads {n_rows}x{n_cols} weights of type {qtype}")
    cdef size_t row_bytes = linear_row_bytes(qtype, n_cols)
    if <size_t>raw.shape[0] != <size_t>n_rows * row_bytes:
        raise ValueError(f"expected {n_rows} rows of {row_bytes} bytes, got {raw.shape[0]} bytes")
    return 0


def linear(str isa, int qtype, const uint8_t[::1] raw, int64_t n_rows, int64_t n_cols,
           const float[:, ::1] x, const float[::1] bias=None, tiles=None) -> np.ndarray:
    """One product, as `step` computes it: x (T, n_cols) @ weights (n_rows, n_cols)ᵀ + bias.

    Returns float32 (T, n_rows).
    raw: the weights' bytes as in a file; tiles: (begin, end), only these groups of TILE_ROWS rows.
    """
    cdef const linear_table *table = _table(isa).linear
    cdef packed_matrix m
    _check_weights(qtype, raw, n_rows, n_cols, &m)
    if x.shape[1] != n_cols or x.shape[0] == 0 or (bias is not None and bias.shape[0] != n_rows):
        raise ValueError(f"expected x (T, {n_cols}) and bias ({n_rows},)")
    cdef int64_t begin = tiles[0] if tiles else 0, end = tiles[1] if tiles else linear_tiles(&m)
    if not 0 <= begin < end <= linear_tiles(&m):
        raise ValueError(f"expected a range of the {linear_tiles(&m)} tiles, got {tiles}")
    cdef uint8_t[::1] packed = _aligned(linear_tiles(&m) * m.tile_bytes)
    cdef bint int8 = linear_wants_int8(&m)
    cdef size_t stride = linear_act_bytes(n_cols) if int8 else n_cols * sizeof(float)
    cdef uint8_t[::1] act = _aligned(stride * x.shape[0])
    cdef float[:, ::1] out = np.zeros((x.shape[0], n_rows), np.float32)
    cdef const float *bias_data = &bias[0] if bias is not None else NULL
    cdef const void *rows = &act[0] if int8 else <const void *>&x[0, 0]
    cdef int64_t t
    m.data = &packed[0]
    with nogil:
        linear_pack(&m, &raw[0], begin, end)
        if int8:
            for t in range(x.shape[0]):
                table.quantize_row(&x[t, 0], n_cols, &act[t * stride])
        table.linear(&m, rows, stride, x.shape[0], bias_data, &out[0, 0], n_rows, begin, end)
    return np.asarray(out)[:, begin * TILE_ROWS:end * TILE_ROWS]


def dequantize(str isa, int qtype, const uint8_t[::1] raw, int64_t n_rows,
               int64_t n_cols) -> np.ndarray:
    """The weights in `raw`, bytes as in a file, row by row as an embedding lookup reads them.

    Returns float32 (n_rows, n_cols).
    """
    cdef const linear_table *table = _table(isa).linear
    cdef packed_matrix m
    _check_weights(qtype, raw, n_rows, n_cols, &m)
    cdef float[:, ::1] out = np.empty((n_rows, n_cols), np.float32)
    cdef size_t row_bytes = linear_row_bytes(qtype, n_cols)
    cdef int64_t row
    with nogil:
        for row in range(n_rows):
            table.dequantize_row(qtype, &raw[row * row_bytes], n_cols, &out[row, 0])
    return np.asarray(out)


def is_rare(int qtype) -> bool:
    """Whether weights of this type are multiplied with once rare_to_q8_0_blocks made Q8_0 of them.
    """
    return rare_block_bytes(qtype) > 0


def rare_to_q8_0_blocks(int qtype, const int8_t[::1] grid, const uint8_t[::1] raw) -> np.ndarray:
    """Weights of a rare format as Q8_0, uint8 (34 bytes for each 32 weights).

    grid: the values that its codes stand for, as gguf has them; empty where it has none.
    """
    cdef int block_bytes = rare_block_bytes(qtype)
    if block_bytes == 0 or raw.shape[0] % block_bytes or grid.shape[0] != rare_grid_bytes(qtype):
        raise ValueError(f"expected blocks of {block_bytes} bytes and a grid of "
                         f"{rare_grid_bytes(qtype)}, got {raw.shape[0]} and {grid.shape[0]}")
    cdef int64_t n_blocks = raw.shape[0] // block_bytes
    cdef uint8_t[::1] out = np.empty(n_blocks * 8 * 34, np.uint8)
    cdef const int8_t *values = &grid[0] if grid.shape[0] else NULL
    if n_blocks:
        with nogil:
            rare_to_q8_0(qtype, values, &raw[0], n_blocks, &out[0])
    return np.asarray(out)

"""The C side as the binding sees it: only what _kernels.pyx touches."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t


cdef extern from "linear.h" nogil:
    enum: TILE_ROWS
    ctypedef struct packed_matrix:
        size_t tile_bytes
        uint8_t *data
    ctypedef struct linear_table:
        void quantize_row(const float *x, int64_t n_cols, void *act) noexcept nogil
        void linear(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                    const float *bias, float *out, int64_t ld, int64_t tile_begin,
                    int64_t tile_end) noexcept nogil
        void dequantize_row(int32_t qtype, const uint8_t *src, int64_t n_cols,
                            float *out) noexcept nogil
    int linear_plan(int32_t qtype, int64_t n_rows, int64_t n_cols, packed_matrix *out)
    int64_t linear_tiles(const packed_matrix *m)
    size_t linear_row_bytes(int32_t qtype, int64_t n_cols)
    void linear_pack(const packed_matrix *m, const uint8_t *src, int64_t tile_begin,
                     int64_t tile_end)
    int linear_wants_int8(const packed_matrix *m)
    size_t linear_act_bytes(int64_t n_cols)
    int rare_block_bytes(int32_t qtype)
    int rare_grid_bytes(int32_t qtype)
    void rare_to_q8_0(int32_t qtype, const int8_t *grid, const uint8_t *src, int64_t n_blocks,
                      uint8_t *out)


cdef extern from "kernels.h" nogil:
    enum: PAGE_TOKENS
    enum: MEMORY_ALIGN
    enum: ROW_FLOATS
    enum: SAMPLE_GROUP

    enum: OP_KINDS, FN_KINDS
    enum: ROPE_ADJACENT, ROPE_HALVES
    enum: GATING_SOFTMAX, GATING_SIGMOID, GATING_CHOSEN

    enum: OP_embed, OP_embed_positions

    ctypedef struct program_op:
        int32_t kind
        int32_t weights[3]
    ctypedef struct attention:
        pass
    ctypedef struct routing:
        pass
    ctypedef struct mamba2_shape:
        pass
    ctypedef struct delta_net_shape:
        pass

    enum: KV_F32, KV_F16, KV_Q8_0

    ctypedef struct kv_shape:
        int32_t n_head_kv, key_length, value_length, has_reach

    ctypedef struct kv_layer:
        kv_shape shape
        int32_t type

    ctypedef struct kernel_table:
        const char *isa
        const linear_table *linear

    const kernel_table *const *kernel_tables()
    double c_multiply_adds "multiply_adds"(const char *isa, int is_int8, int64_t rounds)

    ctypedef struct thread_pool:
        pass
    thread_pool *pool_create(int n_threads)
    int pool_is_ours(const thread_pool *pool)

    ctypedef struct slot:
        float *data
        int64_t stride
        int32_t outputs

    ctypedef struct matrix:
        packed_matrix packed
        int32_t qtype
        int64_t n_parts, n_rows, n_cols
        size_t row_bytes
        const uint8_t *source
        int32_t is_mapped

    ctypedef struct vector:
        const float *data
        int64_t n

    ctypedef struct rope:
        int32_t layout
        int32_t n_rot
        float magnitude
        const float *inv_freq
        const int32_t *axes

    ctypedef struct recurrent_state:
        int64_t n_floats

    ctypedef struct batch:
        const int32_t *tokens
        const int32_t *positions
        const int32_t *sequences
        const int32_t *pages
        const int32_t *window_pages
        const int32_t *outputs
        const int32_t *states
        const float *inputs
        const int32_t *input_rows
        const int32_t *axes
        const int32_t *spans
        int64_t n_tokens, n_sequences, max_pages, n_outputs, n_inputs

    ctypedef struct runner:
        const kernel_table *table
        thread_pool *pool
        program_op *ops
        int64_t n_ops
        slot *slots
        int64_t n_slots
        matrix *matrices
        int64_t n_matrices
        vector *vectors
        int64_t n_vectors
        rope *ropes
        int64_t n_ropes
        attention *attentions
        routing *routings
        mamba2_shape *mamba2s
        delta_net_shape *delta_nets
        kv_layer *kv
        int64_t n_kv
        recurrent_state *states
        int64_t n_recurrent
        int64_t n_ids, window, input_width, n_axes, n_spans
        int64_t n_pages, n_window_pages, n_states, max_tokens, max_outputs, max_sequences
        size_t weight_bytes, kv_bytes, state_bytes

    const char *op_name(int kind)
    const char *activation_name(int fn)
    const char *runner_build(runner *r)
    int runner_accepts(runner *r, const batch *b)
    void runner_step(runner *r, const batch *b)
    void runner_copy_state(runner *r, int64_t source, int64_t target)
    void runner_free(runner *r)

    ctypedef struct ranked:
        pass

    ctypedef struct sample_memory:
        int64_t n_vocab
        float *penalized
        float *maxima
        ranked *ranking

    ctypedef struct sample_params:
        double temperature, top_p, min_p, repeat_penalty
        int64_t top_k

    int64_t sample_logits(const kernel_table *table, sample_memory *memory, const float *logits,
                          const sample_params *params, const int64_t *recent, int64_t n_recent,
                          double coin)

/* What the C files of the native executor share: the program, the thread pool, the table of one
 * instruction set.
 *
 * A program is a flat list of operations over slots of memory (tinychat/ops/lowering.py makes it).
 * Every step, all threads walk the list together (program.c). Work is divided in one of two ways:
 *   rows    each thread takes a contiguous range of the step's tokens (or of its outputs), the
 *           same for every operation
 *   claims  threads claim the next few tiles, or the next (token, head) pair, until none is left
 */
#ifndef TINYCHAT_KERNELS_H
#define TINYCHAT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "linear.h"

#define PAGE_TOKENS 32 /* positions in one KV page, as in tinychat/ops/program.py */
#define MEMORY_ALIGN 64

/* ---- threads.c: a pool whose threads spin briefly, then sleep ---- */

typedef struct thread_pool thread_pool;
typedef void (*pool_work)(void *arg, int thread); /* thread 0 is the caller of pool_run */

/* NULL when the threads cannot be had */
thread_pool *pool_create(int n_threads);
int pool_size(const thread_pool *pool);
/* returns when every thread has returned from `work` */
void pool_run(thread_pool *pool, pool_work work, void *arg);
/* inside `work`: waits for all threads */
void pool_barrier(thread_pool *pool, int thread);
/* 0 in a forked child, where the threads do not exist; pool_destroy then only forgets them */
int pool_is_ours(const thread_pool *pool);
void pool_destroy(thread_pool *pool);

/* ---- the program ---- */

enum op_kind {
    OP_EMBED, OP_RMSNORM, OP_QUANTIZE, OP_LINEAR, OP_ROPE_TABLE, OP_ROPE, OP_STORE_KV, OP_ATTEND,
    OP_SWIGLU, OP_ADD, OP_SCALE, OP_OUTPUTS, OP_KINDS
};

enum rope_layout { ROPE_ADJACENT, ROPE_HALVES };

typedef struct {
    int32_t kind;      /* enum op_kind */
    int32_t barrier;   /* 1: all threads must have finished every operation before this one */
    int32_t outputs;   /* 1: its rows are the batch's outputs, 0: its tokens */
    int32_t out, a, b; /* slots; -1: none */
    int32_t weight;    /* index of a matrix (linear, embed) or a vector (rmsnorm); -1: none */
    int32_t bias;      /* index of a vector; -1: none */
    int32_t width;     /* floats in a row of out, or of a where there is no out */
    int32_t layer;     /* KV layer, or index of a rope */
    int32_t head_dim;  /* rope */
    int32_t window;    /* attend; 0: all */
    float scalar;      /* eps, scale */
} program_op;

typedef struct {
    int32_t n_head, n_head_kv, key_length, value_length;
} kv_shape;

/* A layer's pages, one after another; in each, one block per KV head:
 *   keys   [key_length][PAGE_TOKENS]   so that a vector holds one dimension of many positions
 *   values [PAGE_TOKENS][value_stride] value_length rounded up to 16; the rest stays zero
 * Elements are float16 or float32. */
typedef struct {
    kv_shape shape;
    int32_t value_stride;
    int32_t is_f16;
    size_t key_block_bytes, value_block_bytes; /* one KV head of one page */
    uint8_t *keys, *values;
} kv_layer;

/* One token's query against its sequence's pages. */
typedef struct {
    const kv_layer *kv;
    const float *q;        /* (n_head * key_length) */
    float *out;            /* (n_head * value_length) */
    const int32_t *pages;
    int32_t position, window;
    float scale;
} attend_query;

/* ---- one instruction set ---- */

typedef struct {
    const char *isa;
    const linear_table *linear;
    /* x (n_groups * group): each group over its root mean square, times w (group) */
    void (*rmsnorm)(const float *x, const float *w, int64_t n_groups, int64_t group, float eps,
                    float *out);
    /* table: cosines (n_rot), then signed sines (n_rot), of one position, from rope_table_row */
    void (*rope)(const float *x, const float *table, int64_t n_heads, int64_t head_dim,
                 int64_t n_rot, int layout, float *out);
    void (*store_kv)(const kv_layer *kv, const float *k, const float *v, int32_t page,
                     int32_t slot);
    void (*attend)(const attend_query *query, int32_t kv_head, float *scratch);
    void (*swiglu)(const float *gate, const float *up, int64_t n, float *out);
    void (*add)(const float *a, const float *b, float scale, int64_t n, float *out);
    void (*scale)(const float *x, float scale, int64_t n, float *out);
    /* the highest finite value of each group of SAMPLE_GROUP in x (n), -inf where none is */
    void (*group_maxima)(const float *x, int64_t n, float *maxima);
    /* sum of exp((x - high) * scale) over the finite x (n) */
    double (*exp_sum)(const float *x, int64_t n, float high, float scale);
} kernel_table;

/* Rows that rope, swiglu, add, scale and quantize see are 64-byte aligned, and memory goes on to
 * the next multiple of ROW_FLOATS: they may read and write that far. */
#define ROW_FLOATS 16

extern const kernel_table kernels_scalar;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2;
extern const kernel_table kernels_avx512_vnni;
#endif

/* ---- dispatch.c ---- */

/* the instruction sets of this processor, slowest first; NULL after the last */
const kernel_table *const *kernel_tables(void);

/* ---- program.c ---- */

typedef struct {
    float *data;    /* (rows, stride); NULL: taken from the arena */
    int64_t stride; /* floats, a multiple of ROW_FLOATS */
    int32_t outputs;
} slot;

typedef struct {
    packed_matrix packed;  /* made by linear_plan; tile_bytes 0: rows are only looked up */
    int32_t qtype;
    int64_t n_rows, n_cols;
    size_t row_bytes;
    const uint8_t *source; /* the bytes of the file */
    int32_t is_mapped;     /* 1: pages of a file, which can be given back once they are packed */
} matrix;

typedef struct {
    int32_t layout; /* enum rope_layout */
    int32_t n_rot;
    float magnitude;
    const float *inv_freq; /* (n_rot / 2) */
} rope;

typedef struct {
    const int32_t *tokens, *positions, *sequences; /* (n_tokens) */
    const int32_t *pages;                          /* (n_sequences, max_pages) */
    const int32_t *outputs;                        /* (n_outputs) */
    int64_t n_tokens, n_sequences, max_pages, n_outputs;
} batch;

typedef struct {
    _Atomic int32_t next; /* the first item of an operation that nobody has claimed */
} claim_counter;

/* The binding fills it; every array has its n_; runner_build allocates the rest. Zeroed before. */
typedef struct {
    const kernel_table *table;
    thread_pool *pool;
    program_op *ops;        int64_t n_ops;
    slot *slots;            int64_t n_slots;
    matrix *matrices;       int64_t n_matrices;
    const float **vectors;  int64_t n_vectors;
    rope *ropes;            int64_t n_ropes;
    kv_layer *kv;           int64_t n_kv;
    int64_t n_ids, n_pages, max_tokens, max_outputs, max_sequences;
    /* from runner_build on */
    uint8_t *arena;         size_t arena_bytes;
    uint8_t *weights;       size_t weight_bytes;
    uint8_t *kv_memory;     size_t kv_bytes;
    float *scratch;         size_t scratch_floats; /* one piece per thread */
    claim_counter *claims;  /* (n_ops) */
    int32_t *last;          /* (max_sequences) */
    const batch *step;      /* while a step runs */
} runner;

/* allocates and packs; NULL, or what went wrong */
const char *runner_build(runner *r);
/* 1: nothing that Batch.check in tinychat/ops/program.py would refuse */
int runner_accepts(runner *r, const batch *b);
/* a batch that was accepted */
void runner_step(runner *r, const batch *b);
void runner_free(runner *r);

/* ---- sample.c: the twin of tinychat/ops/sampling.py ---- */

enum { SAMPLE_GROUP = 64 };

typedef struct { float value; int32_t id; } ranked;

typedef struct {
    int64_t n_vocab;
    float *penalized; /* (n_vocab) */
    float *maxima;    /* (ceil(n_vocab / SAMPLE_GROUP)) */
    ranked *ranking;  /* (n_vocab) */
} sample_memory;

typedef struct {
    double temperature, top_p, min_p, repeat_penalty;
    int64_t top_k;
} sample_params;

/* -1 when no logit is finite. recent: the ids to penalize, in any order, also twice. */
int64_t sample_logits(const kernel_table *table, sample_memory *memory, const float *logits,
                      const sample_params *params, const int64_t *recent, int64_t n_recent,
                      double coin);

#endif

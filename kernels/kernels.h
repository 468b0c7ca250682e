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

/* What lowering.py may write down: the vocabulary of recorder.py, and two operations of its own. */
#define OPERATIONS(X) \
    X(embed) X(embed_positions) X(given) X(place) \
    X(rmsnorm) X(layernorm) \
    X(quantize) X(linear) X(head_linear) \
    X(activate) X(gate) X(add) X(scale) X(softcap) X(add_vector) X(mul_vector) X(mul_column) \
    X(columns) X(join) X(outputs) \
    X(rope_table) X(rope) X(temper) X(store_kv) X(attend) \
    X(route) X(experts) X(weigh) X(mix) \
    X(conv) X(mamba2) X(delta_net)

/* As ACTIVATIONS in recorder.py */
#define ACTIVATIONS(X) \
    X(identity) X(silu) X(gelu) X(gelu_erf) X(gelu_quick) X(relu) X(relu2) X(sigmoid) \
    X(silu_clamped)

#define OP_KIND(name) OP_##name,
#define FN_KIND(name) FN_##name,
enum op_kind { OPERATIONS(OP_KIND) OP_KINDS };
enum activation { ACTIVATIONS(FN_KIND) FN_KINDS };
#undef OP_KIND
#undef FN_KIND

enum rope_layout { ROPE_ADJACENT, ROPE_HALVES };

/* Fields that an operation does not have are -1 for slots and weights, 0 otherwise. */
typedef struct {
    int32_t kind;       /* enum op_kind */
    int32_t barrier;    /* 1: all threads must have finished every operation before this one */
    int32_t outputs;    /* 1: its rows are the batch's outputs, 0: its tokens */
    int32_t out, in[5]; /* slots, in the order of the recorder's arguments */
    int32_t weights[3]; /* indices of matrices or vectors: WEIGHTS in lowering.py says which */
    int32_t width;      /* floats in a row of out, or of in[0] where there is no out */
    int32_t group;      /* norms: values of a group; rope: head_dim; quantize: columns of a part;
                           else the width of in[0] */
    int32_t n_head;     /* join */
    int32_t fn;         /* enum activation */
    int32_t begin;      /* given, place, columns: first column */
    int32_t length, offset; /* temper */
    int32_t weighted;   /* mix */
    int32_t layer;      /* KV layer */
    int32_t state;      /* recurrent state */
    int32_t params;     /* index in the table of attentions, ropes, routings, ... */
    float scalar;       /* eps, scale, cap, beta */
} program_op;

/* Heads in program.py */
typedef struct {
    int32_t n_head, n_head_kv, key_length, value_length, window, chunk, causal;
    int32_t span; /* -1: none */
    float scale, softcap;
} attention;

/* Routing in program.py */
enum gating { GATING_SOFTMAX, GATING_SIGMOID, GATING_CHOSEN };

typedef struct {
    int32_t n_expert, n_used, gating, n_group, n_group_used, normalise;
    float scale;
} routing;

/* Mamba2 and DeltaNet in program.py */
typedef struct {
    int32_t n_head, head_dim, n_group, n_state;
} mamba2_shape;

typedef struct {
    int32_t n_key_head, n_value_head, key_length, value_length, tiled;
} delta_net_shape;

typedef struct {
    int32_t n_head_kv, key_length, value_length;
    int32_t has_reach; /* 1: its pages are the batch's window_pages */
} kv_shape;

enum kv_type { KV_F32, KV_F16, KV_Q8_0 };

/* A layer's pages, one after another; in each, one block per KV head:
 *   keys   [key_length][PAGE_TOKENS]   so that a vector holds one dimension of many positions
 *   values [PAGE_TOKENS][value_stride] value_length rounded up to 16; the rest stays zero
 * KV_Q8_0: elements are int8, and after them come the float16 scales of each KV_GROUP dimensions of
 * a position, [key_length / KV_GROUP][PAGE_TOKENS] and [PAGE_TOKENS][value_stride / KV_GROUP], both
 * rounded up. */
#define KV_GROUP 32

typedef struct {
    kv_shape shape;
    int32_t value_stride;
    int32_t type; /* enum kv_type */
    size_t key_block_bytes, value_block_bytes; /* one KV head of one page */
    uint8_t *keys, *values;
} kv_layer;

/* One query head of one token. */
typedef struct {
    const float *q; /* (key_length) */
    float *out;     /* (value_length) */
    int32_t first, last; /* positions that it sees */
    float sink;     /* -inf: none */
} attend_row;

/* Rows of one sequence that read the same KV head; together they read its pages once. */
enum { BLOCK_ROWS = 32 };

typedef struct {
    const kv_layer *kv;
    const attention *heads;
    const int32_t *pages;
    attend_row rows[BLOCK_ROWS];
    int n_rows;
} attend_block;

/* NULL: none. A step of 0: the same for each group. */
typedef struct {
    const float *scale, *bias;
    int64_t scale_step, bias_step;
} norm_weights;

/* One head of one token of the recurrent mixers. */
typedef struct {
    const float *x, *b, *c;
    float dt, decay, d;
} mamba2_step;

typedef struct {
    const float *q, *k, *v;
    float decay, beta;
} delta_net_step;

/* ---- one instruction set ---- */

typedef struct {
    const char *isa;
    const linear_table *linear;
    /* x (n_groups * group): each group over its root mean square, times its weights */
    void (*rmsnorm)(const norm_weights *w, const float *x, int64_t n_groups, int64_t group,
                    float eps, float *out);
    /* the same of what is left of a group without its mean, plus its bias */
    void (*layernorm)(const norm_weights *w, const float *x, int64_t n_groups, int64_t group,
                      float eps, float *out);
    /* table: cosines (n_rot), then signed sines (n_rot), of one position, from rope_table_row */
    void (*rope)(const float *x, const float *table, int64_t n_heads, int64_t head_dim,
                 int64_t n_rot, int layout, float *out);
    void (*store_kv)(const kv_layer *kv, const float *k, const float *v, int32_t page,
                     int32_t slot);
    /* scratch: (BLOCK_ROWS, value_stride), for KV_Q8_0 and a page as float32 */
    void (*attend)(const attend_block *block, int32_t kv_head, float *scratch);
    void (*activate)(int fn, const float *x, int64_t n, float *out);
    void (*gate)(int fn, const float *gate, const float *up, int64_t n, float *out);
    void (*softcap)(const float *x, float cap, int64_t n, float *out);
    void (*mul)(const float *a, const float *b, int64_t n, float *out);
    void (*add)(const float *a, const float *b, float scale, int64_t n, float *out);
    void (*scale)(const float *x, float scale, int64_t n, float *out);
    /* state (n_state, n_value) */
    void (*mamba2)(const mamba2_step *step, float *state, int64_t n_value, int64_t n_state,
                   float *out);
    /* columns [begin, end) of state (n_key, n_value) and of out; begin is a multiple of 64 */
    void (*delta_net)(const delta_net_step *step, float *state, int64_t n_key, int64_t n_value,
                      int64_t begin, int64_t end, float *out);
    /* the highest finite value of each group of SAMPLE_GROUP in x (n), -inf where none is */
    void (*group_maxima)(const float *x, int64_t n, float *maxima);
    /* sum of exp((x - high) * scale) over the finite x (n) */
    double (*exp_sum)(const float *x, int64_t n, float high, float scale);
} kernel_table;

/* Rows that activate, gate, softcap and quantize see are 64-byte aligned, and memory goes on to the
 * next multiple of ROW_FLOATS: they may read and write that far. */
#define ROW_FLOATS 16

extern const kernel_table kernels_scalar;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2;
extern const kernel_table kernels_avx512_vnni;
#endif
#if HAVE_NEON_DOTPROD
extern const kernel_table kernels_neon_dotprod;
#endif

/* ---- dispatch.c ---- */

/* the instruction sets of this processor, slowest first; NULL after the last */
const kernel_table *const *kernel_tables(void);

/* ---- peaks.c ---- */

/* Multiply-adds in registers alone, in int8 or float32, by the best instruction of the set: how
 * many operations `rounds` rounds were, a product and a sum counting as two; 0 where it is not
 * known. */
double multiply_adds(const char *isa, int is_int8, int64_t rounds);

/* ---- the runner: build.c makes it, batch.c judges what it is given, program.c runs it ---- */

typedef struct {
    float *data;    /* (rows, stride); NULL: taken from the arena */
    int64_t stride; /* floats, a multiple of ROW_FLOATS */
    int32_t outputs;
} slot;

/* n_parts matrices of (n_rows, n_cols), one after another: experts, or heads; else 1 */
typedef struct {
    packed_matrix packed;  /* of the first part, made by linear_plan; tile_bytes 0: rows are only
                              looked up */
    size_t part_bytes;     /* from one packed part to the next */
    int32_t qtype;
    int64_t n_parts, n_rows, n_cols;
    size_t row_bytes;
    const uint8_t *source; /* the bytes of the file */
    int32_t is_mapped;     /* 1: pages of a file, which can be given back once they are packed */
} matrix;

typedef struct {
    const float *data;
    int64_t n;
} vector;

typedef struct {
    int32_t layout; /* enum rope_layout */
    int32_t n_rot;
    float magnitude;
    const float *inv_freq; /* (n_rot / 2) */
    const int32_t *axes;   /* (n_rot / 2), columns of the batch's axes; NULL: the position */
} rope;

/* One recurrent state: n_floats for each place, zeros before a sequence's first token. */
typedef struct {
    int64_t n_floats;
    float *data; /* (n_states, n_floats) */
} recurrent_state;

/* Batch in batch.py, whole; what the program does not read is NULL. */
typedef struct {
    const int32_t *tokens, *positions, *sequences; /* (n_tokens) */
    const int32_t *pages, *window_pages;           /* (n_sequences, max_pages) */
    const int32_t *outputs;                        /* (n_outputs) */
    const int32_t *states;                         /* (n_sequences) */
    const float *inputs;                           /* (n_inputs, input_width) */
    const int32_t *input_rows;                     /* (n_tokens) */
    const int32_t *axes;                           /* (n_tokens, n_axes) */
    const int32_t *spans;                          /* (n_tokens, n_spans, 2) */
    int64_t n_tokens, n_sequences, max_pages, n_outputs, n_inputs;
} batch;

/* Tokens gathered for one expert, and tiles of its matrix, that are multiplied together. */
enum { EXPERT_TOKENS = 32, EXPERT_TILES = 8 };

typedef struct {
    _Atomic int64_t next; /* the first item of an operation that nobody has claimed */
} claim_counter;

/* The binding fills it; every array has its n_; runner_build allocates the rest. Zeroed before. */
typedef struct {
    const kernel_table *table;
    thread_pool *pool;
    program_op *ops;        int64_t n_ops;
    slot *slots;            int64_t n_slots;
    matrix *matrices;       int64_t n_matrices;
    vector *vectors;        int64_t n_vectors;
    rope *ropes;            int64_t n_ropes;
    attention *attentions;  routing *routings;  mamba2_shape *mamba2s;  delta_net_shape *delta_nets;
    kv_layer *kv;           int64_t n_kv;
    recurrent_state *states; int64_t n_recurrent;
    int64_t n_ids, window, input_width, n_axes, n_spans;           /* of the program */
    int64_t n_pages, n_window_pages, n_states, max_tokens, max_outputs, max_sequences;
    /* from runner_build on */
    uint8_t *arena;         size_t arena_bytes;
    uint8_t *weights;       size_t weight_bytes;
    uint8_t *kv_memory;     size_t kv_bytes;
    uint8_t *state_memory;  size_t state_bytes;
    float *scratch;         size_t scratch_floats; /* one piece per thread */
    claim_counter *claims;  /* (n_ops) */
    int32_t *first, *last;  /* (max_sequences), positions of this step; last -1: none */
    uint8_t *taken;         /* (n_states), 1: a sequence of this step has it */
    const batch *step;      /* while a step runs */
} runner;

/* NULL beyond the last */
const char *op_name(int kind);
const char *activation_name(int fn);
/* allocates and packs; NULL, or what went wrong */
const char *runner_build(runner *r);
/* 1: nothing that Batch.check in tinychat/ops/batch.py would refuse */
int runner_accepts(runner *r, const batch *b);
/* a batch that was accepted */
void runner_step(runner *r, const batch *b);
/* what one place of the recurrent states holds to another; not while a step runs */
void runner_copy_state(runner *r, int64_t source, int64_t target);
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

/* One step: every thread walks the list of operations, doing its part of each. Memory is allocated
 * once, here. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

/* How a product is cut. A claim is a share of the tiles left, at least CLAIM_BYTES of weights for
 * each token, so that claiming costs little; within a claim, TILES_AT_ONCE tiles stay in the cache
 * while TOKENS_AT_ONCE pass by. */
enum { CLAIM_BYTES = 16384, TILES_AT_ONCE = 8, TOKENS_AT_ONCE = 128 };

typedef struct {
    int64_t begin, end;
} range;

static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline float *row(const runner *r, int32_t slot, int64_t i)
{
    return r->slots[slot].data + i * r->slots[slot].stride;
}

static int64_t n_rows(const runner *r, const program_op *op)
{
    return op->outputs ? r->step->n_outputs : r->step->n_tokens;
}

/* This thread's rows: the same for every operation of a step, so that rows pass from one to the
 * next without waiting. */
static range my_rows(const runner *r, const program_op *op, int thread)
{
    const int64_t n = n_rows(r, op), threads = pool_size(r->pool);
    return (range){(n * thread + threads - 1) / threads,
                   (n * (thread + 1) + threads - 1) / threads};
}

/* The next items of this operation that nobody has claimed: many at first, few at the end. */
static int claim(runner *r, const program_op *op, int64_t total, int64_t least, range *out)
{
    _Atomic int32_t *next = &r->claims[op - r->ops].next;
    int32_t begin = atomic_load_explicit(next, memory_order_relaxed);
    int64_t n;
    do {
        if (begin >= total)
            return 0;
        n = at_most(at_least((total - begin) / (2 * pool_size(r->pool)), least), total - begin);
    } while (!atomic_compare_exchange_weak_explicit(next, &begin, begin + (int32_t)n,
                                                    memory_order_relaxed, memory_order_relaxed));
    *out = (range){begin, begin + n};
    return 1;
}

/* ---- operations ---- */

typedef void (*run_op)(runner *r, const program_op *op, int thread);

static void run_embed(runner *r, const program_op *op, int thread)
{
    const matrix *m = &r->matrices[op->weight];
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->linear->dequantize_row(m->qtype,
                                         m->source + (size_t)r->step->tokens[t] * m->row_bytes,
                                         m->n_cols, row(r, op->out, t));
}

static void run_rmsnorm(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->rmsnorm(row(r, op->a, t), r->vectors[op->weight], op->width / op->head_dim,
                          op->head_dim, op->scalar, row(r, op->out, t));
}

static void run_quantize(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->linear->quantize_row(row(r, op->a, t), op->width, row(r, op->out, t));
}

static void run_linear(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const packed_matrix *m = &r->matrices[op->weight].packed;
    const float *bias = op->bias < 0 ? NULL : r->vectors[op->bias];
    const int64_t tokens = n_rows(r, op), stride = r->slots[op->a].stride,
                  ld = r->slots[op->out].stride;
    const int64_t least = at_least(CLAIM_BYTES / (int64_t)m->tile_bytes / at_least(tokens, 1), 1);
    range tiles;
    while (tokens > 0 && claim(r, op, linear_tiles(m), least, &tiles))
        for (int64_t tile = tiles.begin; tile < tiles.end; tile += TILES_AT_ONCE)
            for (int64_t t = 0; t < tokens; t += TOKENS_AT_ONCE)
                r->table->linear->linear(m, row(r, op->a, t), (size_t)stride * sizeof(float),
                                         at_most(tokens - t, TOKENS_AT_ONCE), bias,
                                         row(r, op->out, t), ld, tile,
                                         at_most(tile + TILES_AT_ONCE, tiles.end));
}

/* Cosines, then sines with the sign that the first of a pair needs, of position * inv_freq. The
 * angle is rounded to float32 as in the reference; its cosine is exact. */
static void rope_table_row(const rope *p, int32_t position, float *table)
{
    for (int32_t i = 0; i < p->n_rot / 2; i++) {
        const double angle = (double)((float)position * p->inv_freq[i]);
        const int32_t first = p->layout == ROPE_HALVES ? i : 2 * i;
        const int32_t second = p->layout == ROPE_HALVES ? i + p->n_rot / 2 : 2 * i + 1;
        const float cosine = (float)cos(angle) * p->magnitude,
                    sine = (float)sin(angle) * p->magnitude;
        table[first] = table[second] = cosine;
        table[p->n_rot + first] = -sine;
        table[p->n_rot + second] = sine;
    }
}

static void run_rope_table(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        rope_table_row(&r->ropes[op->layer], r->step->positions[t], row(r, op->out, t));
}

static void run_rope(runner *r, const program_op *op, int thread)
{
    const rope *p = &r->ropes[op->layer];
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->rope(row(r, op->a, t), row(r, op->b, t), op->width / op->head_dim, op->head_dim,
                       p->n_rot, p->layout, row(r, op->out, t));
}

static const int32_t *pages_of(const batch *b, int64_t t)
{
    return b->pages + b->sequences[t] * b->max_pages;
}

static void run_store_kv(runner *r, const program_op *op, int thread)
{
    const batch *b = r->step;
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->store_kv(&r->kv[op->layer], row(r, op->a, t), row(r, op->b, t),
                           pages_of(b, t)[b->positions[t] / PAGE_TOKENS],
                           b->positions[t] % PAGE_TOKENS);
}

static void run_attend(runner *r, const program_op *op, int thread)
{
    const batch *b = r->step;
    const kv_layer *kv = &r->kv[op->layer];
    const int64_t n_kv = kv->shape.n_head_kv;
    float *scratch = r->scratch + (size_t)thread * r->scratch_floats;
    attend_query query = {.kv = kv, .window = op->window, .scale = op->scalar};
    range items; /* token * n_kv + KV head */
    while (claim(r, op, b->n_tokens * n_kv, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t t = i / n_kv;
            query.q = row(r, op->a, t);
            query.out = row(r, op->out, t);
            query.pages = pages_of(b, t);
            query.position = b->positions[t];
            r->table->attend(&query, (int32_t)(i % n_kv), scratch);
        }
}

static void run_swiglu(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->swiglu(row(r, op->a, t), row(r, op->b, t), op->width, row(r, op->out, t));
}

static void run_add(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->add(row(r, op->a, t), row(r, op->b, t), op->scalar, op->width,
                      row(r, op->out, t));
}

static void run_scale(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t t = rows.begin; t < rows.end; t++)
        r->table->scale(row(r, op->a, t), op->scalar, op->width, row(r, op->out, t));
}

static void run_outputs(runner *r, const program_op *op, int thread)
{
    const range rows = my_rows(r, op, thread);
    for (int64_t i = rows.begin; i < rows.end; i++)
        memcpy(row(r, op->out, i), row(r, op->a, r->step->outputs[i]),
               (size_t)op->width * sizeof(float));
}

static const run_op run_table[OP_KINDS] = {
    [OP_EMBED] = run_embed,       [OP_RMSNORM] = run_rmsnorm,       [OP_QUANTIZE] = run_quantize,
    [OP_LINEAR] = run_linear,     [OP_ROPE_TABLE] = run_rope_table, [OP_ROPE] = run_rope,
    [OP_STORE_KV] = run_store_kv, [OP_ATTEND] = run_attend,         [OP_SWIGLU] = run_swiglu,
    [OP_ADD] = run_add,           [OP_SCALE] = run_scale,           [OP_OUTPUTS] = run_outputs,
};

static void walk(void *arg, int thread)
{
    runner *r = arg;
    for (const program_op *op = r->ops; op < r->ops + r->n_ops; op++) {
        if (op->barrier)
            pool_barrier(r->pool, thread);
        run_table[op->kind](r, op, thread);
    }
}

void runner_step(runner *r, const batch *b)
{
    r->step = b;
    for (int64_t i = 0; i < r->n_ops; i++)
        atomic_store_explicit(&r->claims[i].next, 0, memory_order_relaxed);
    pool_run(r->pool, walk, r);
    r->step = NULL;
}

/* ---- judging a batch ---- */

static int all_below(const int32_t *values, int64_t n, int64_t end)
{
    for (int64_t i = 0; i < n; i++)
        if (values[i] < 0 || values[i] >= end)
            return 0;
    return 1;
}

/* Positions of a sequence rise; only the pages up to its last position are read. */
static int sequences_fit(runner *r, const batch *b)
{
    for (int64_t s = 0; s < b->n_sequences; s++)
        r->last[s] = -1;
    for (int64_t t = 0; t < b->n_tokens; t++) {
        int32_t *last = &r->last[b->sequences[t]];
        if (b->positions[t] <= *last)
            return 0;
        *last = b->positions[t];
    }
    for (int64_t s = 0; s < b->n_sequences; s++)
        if (r->last[s] >= 0 &&
            !all_below(b->pages + s * b->max_pages, r->last[s] / PAGE_TOKENS + 1, r->n_pages))
            return 0;
    return 1;
}

int runner_accepts(runner *r, const batch *b)
{
    return b->n_tokens >= 1 && b->n_tokens <= r->max_tokens && b->n_sequences >= 1 &&
           b->n_sequences <= r->max_sequences && b->n_outputs <= r->max_outputs &&
           all_below(b->tokens, b->n_tokens, r->n_ids) &&
           all_below(b->sequences, b->n_tokens, b->n_sequences) &&
           all_below(b->outputs, b->n_outputs, b->n_tokens) &&
           all_below(b->positions, b->n_tokens, b->max_pages * PAGE_TOKENS) && sequences_fit(r, b);
}

/* ---- building ---- */

/* Zeroed pages that cost nothing until they are touched; NULL when there is no room. */
static uint8_t *map_memory(size_t n_bytes)
{
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
#if defined(MADV_HUGEPAGE)
    madvise(memory, n_bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

static int64_t slot_rows(const runner *r, const slot *s)
{
    return s->outputs ? r->max_outputs : r->max_tokens;
}

static int place_slots(runner *r)
{
    const size_t scratch = r->scratch_floats * (size_t)pool_size(r->pool);
    size_t floats = scratch;
    for (int64_t i = 0; i < r->n_slots; i++)
        floats += r->slots[i].data ? 0 : (size_t)(slot_rows(r, &r->slots[i]) * r->slots[i].stride);
    r->arena_bytes = floats * sizeof(float) + MEMORY_ALIGN;
    if (!(r->arena = map_memory(r->arena_bytes)))
        return -1;
    float *next = (float *)r->arena;
    for (int64_t i = 0; i < r->n_slots; i++)
        if (!r->slots[i].data) {
            r->slots[i].data = next;
            next += slot_rows(r, &r->slots[i]) * r->slots[i].stride;
        }
    r->scratch = next;
    return 0;
}

static int place_kv(runner *r)
{
    r->kv_bytes = 0;
    for (int64_t i = 0; i < r->n_kv; i++) {
        kv_layer *kv = &r->kv[i];
        const size_t element = kv->is_f16 ? 2 : 4;
        kv->value_stride = (int32_t)round_up(kv->shape.value_length, ROW_FLOATS);
        kv->key_block_bytes = element * PAGE_TOKENS * (size_t)kv->shape.key_length;
        kv->value_block_bytes = element * PAGE_TOKENS * (size_t)kv->value_stride;
        r->kv_bytes += (kv->key_block_bytes + kv->value_block_bytes) * (size_t)kv->shape.n_head_kv *
                       (size_t)r->n_pages;
        /* attend works on up to four heads at a time */
        r->scratch_floats = (size_t)at_least((int64_t)r->scratch_floats, 4 * kv->value_stride);
    }
    if (r->kv_bytes && !(r->kv_memory = map_memory(r->kv_bytes)))
        return -1;
    uint8_t *next = r->kv_memory;
    for (int64_t i = 0; i < r->n_kv; i++) {
        kv_layer *kv = &r->kv[i];
        const size_t blocks = (size_t)kv->shape.n_head_kv * (size_t)r->n_pages;
        kv->keys = next;
        kv->values = next += kv->key_block_bytes * blocks;
        next += kv->value_block_bytes * blocks;
    }
    return 0;
}

static size_t packed_bytes(const packed_matrix *m)
{
    return m->tile_bytes ? (size_t)linear_tiles(m) * m->tile_bytes : 0;
}

static int place_weights(runner *r)
{
    r->weight_bytes = 0;
    for (int64_t i = 0; i < r->n_matrices; i++)
        r->weight_bytes += packed_bytes(&r->matrices[i].packed);
    if (r->weight_bytes && !(r->weights = map_memory(r->weight_bytes)))
        return -1;
    uint8_t *next = r->weights;
    for (int64_t i = 0; i < r->n_matrices; i++) {
        r->matrices[i].packed.data = next;
        next += packed_bytes(&r->matrices[i].packed);
    }
    return 0;
}

/* The whole pages of these bytes of a mapped file leave memory; a later look reads them from the
 * file again. */
static void give_back(const uint8_t *begin, const uint8_t *end)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)begin + page - 1) / page * page,
                    last = (uintptr_t)end / page * page;
    if (first < last)
        madvise((void *)first, last - first, MADV_DONTNEED);
}

static void pack(void *arg, int thread)
{
    runner *r = arg;
    const int64_t threads = pool_size(r->pool);
    for (int64_t i = 0; i < r->n_matrices; i++) {
        const matrix *m = &r->matrices[i];
        if (!m->packed.tile_bytes)
            continue;
        const int64_t tiles = linear_tiles(&m->packed), begin = tiles * thread / threads,
                      end = tiles * (thread + 1) / threads;
        linear_pack(&m->packed, m->source, begin, end);
        if (m->is_mapped)
            give_back(m->source + (size_t)begin * TILE_ROWS * m->row_bytes,
                      m->source + (size_t)at_most(end * TILE_ROWS, m->n_rows) * m->row_bytes);
    }
}

const char *runner_build(runner *r)
{
    r->claims = calloc((size_t)at_least(r->n_ops, 1), sizeof *r->claims);
    r->last = calloc((size_t)at_least(r->max_sequences, 1), sizeof *r->last);
    if (!r->claims || !r->last || place_kv(r) || place_slots(r) || place_weights(r))
        return "out of memory";
    pool_run(r->pool, pack, r);
    return NULL;
}

void runner_free(runner *r)
{
    pool_destroy(r->pool);
    if (r->arena)
        munmap(r->arena, r->arena_bytes);
    if (r->weights)
        munmap(r->weights, r->weight_bytes);
    if (r->kv_memory)
        munmap(r->kv_memory, r->kv_bytes);
    free(r->claims);
    free(r->last);
    free(r->ops);
    free(r->slots);
    free(r->matrices);
    free(r->vectors);
    free(r->ropes);
    free(r->kv);
    memset(r, 0, sizeof *r);
}

/* Rotary positions, the KV pages, and attention over them. */
#include <math.h>

#include "runner.h"

/* ---- rope ---- */

/* Cosines, then sines with the sign that the first of a pair needs, of turn * inv_freq. turns: what
 * each axis turns by. The angle is rounded to float32 as in the reference; its cosine is exact. */
static void rope_table_row(const rope *p, const int32_t *turns, float *table)
{
    for (int32_t i = 0; i < p->n_rot / 2; i++) {
        const int32_t turn = turns[p->axes ? p->axes[i] : 0];
        const double angle = (double)((float)turn * p->inv_freq[i]);
        const int32_t first = p->layout == ROPE_HALVES ? i : 2 * i;
        const int32_t second = p->layout == ROPE_HALVES ? i + p->n_rot / 2 : 2 * i + 1;
        const float cosine = (float)cos(angle) * p->magnitude,
                    sine = (float)sin(angle) * p->magnitude;
        table[first] = table[second] = cosine;
        table[p->n_rot + first] = -sine;
        table[p->n_rot + second] = sine;
    }
}

void run_rope_table(runner *r, const program_op *op, int thread)
{
    const rope *p = &r->ropes[op->params];
    const batch *b = r->step;
    EACH_ROW(t)
        rope_table_row(p, p->axes ? b->axes + t * r->n_axes : b->positions + t,
                       out_row(r, op, t));
}

void run_rope(runner *r, const program_op *op, int thread)
{
    const rope *p = &r->ropes[op->params];
    EACH_ROW(t)
        r->table->rope(in_row(r, op, 0, t), in_row(r, op, 1, t), op->width / op->group, op->group,
                       p->n_rot, p->layout, out_row(r, op, t));
}

/* ---- keys and values ---- */

static const int32_t *pages_of(const batch *b, const kv_layer *kv, int64_t t)
{
    return (kv->shape.has_reach ? b->window_pages : b->pages) + b->sequences[t] * b->max_pages;
}

void run_store_kv(runner *r, const program_op *op, int thread)
{
    const batch *b = r->step;
    const kv_layer *kv = &r->kv[op->layer];
    EACH_ROW(t)
        r->table->store_kv(kv, in_row(r, op, 0, t), in_row(r, op, 1, t),
                           pages_of(b, kv, t)[b->positions[t] / PAGE_TOKENS],
                           b->positions[t] % PAGE_TOKENS);
}

/* ---- attention ---- */

typedef struct {
    int32_t first, last;
} seen;

static int32_t lower(int64_t a, int64_t b) { return (int32_t)at_most(a, b); }
static int32_t higher(int64_t a, int64_t b) { return (int32_t)at_least(a, b); }

/* The positions that token t sees: the twin of meaning.seen_range. */
static seen seen_by(const runner *r, const attention *heads, int64_t t)
{
    const int64_t p = r->step->positions[t];
    seen s = {0, (int32_t)p};
    const int32_t *span = heads->span < 0 ? &s.first
                                          : r->step->spans + 2 * (t * r->n_spans + heads->span);
    if (!heads->causal) {
        const int64_t side = heads->window ? heads->window / 2 : INT32_MAX;
        return (seen){higher(span[0], p - side), lower(span[1], p + side)};
    }
    if (heads->window)
        s.first = higher(p - heads->window + 1, 0);
    if (heads->chunk)
        s.first = (int32_t)(p - p % heads->chunk);
    if (heads->span >= 0)
        s = (seen){lower(s.first, span[0]), higher(s.last, span[1])};
    return s;
}

/* The query heads of token t that read this KV head, as rows of a block, which runs when it is
 * full. */
static void add_rows(const runner *r, const program_op *op, int64_t t, int32_t kv_head,
                     attend_block *block, float *scratch)
{
    const attention *heads = block->heads;
    const int64_t group = heads->n_head / heads->n_head_kv;
    const seen s = seen_by(r, heads, t);
    const float *sinks = vector_of(r, op, 0);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        block->rows[block->n_rows++] = (attend_row){
            .q = in_row(r, op, 0, t) + head * heads->key_length,
            .out = out_row(r, op, t) + head * heads->value_length,
            .first = s.first, .last = s.last, .sink = sinks ? sinks[head] : -INFINITY};
        if (block->n_rows == BLOCK_ROWS) {
            r->table->attend(block, kv_head, scratch);
            block->n_rows = 0;
        }
    }
}

/* Tokens [begin, end) of the step: those that follow one another in a sequence share a block. */
static void attend_tokens(const runner *r, const program_op *op, range tokens, int32_t kv_head,
                          float *scratch)
{
    const int32_t *sequences = r->step->sequences;
    attend_block block = {.kv = &r->kv[op->layer], .heads = &r->attentions[op->params]};
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        block.pages = pages_of(r->step, block.kv, t);
        add_rows(r, op, t, kv_head, &block, scratch);
        if (block.n_rows && (t + 1 == tokens.end || sequences[t + 1] != sequences[t])) {
            r->table->attend(&block, kv_head, scratch);
            block.n_rows = 0;
        }
    }
}

void run_attend(runner *r, const program_op *op, int thread)
{
    const attention *heads = &r->attentions[op->params];
    const int64_t n_tokens = r->step->n_tokens, n_kv = heads->n_head_kv,
                  at_once = at_least(BLOCK_ROWS / (heads->n_head / n_kv), 1);
    const int64_t blocks = (n_tokens + at_once - 1) / at_once;
    range items; /* KV head * blocks + block of tokens: the next block reads the same pages */
    while (claim(r, op, blocks * n_kv, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t begin = i % blocks * at_once;
            attend_tokens(r, op, (range){begin, at_most(begin + at_once, n_tokens)},
                          (int32_t)(i / blocks), r->scratch + (size_t)thread * r->scratch_floats);
        }
}

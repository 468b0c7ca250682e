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

/* The positions that token t sees; meaning.seen_range is its twin. */
static void set_seen(const runner *r, const attention *heads, int64_t t, attend_query *query)
{
    const int32_t p = r->step->positions[t];
    query->first = heads->window > 0 && p >= heads->window ? p - heads->window + 1 : 0;
    query->last = p;
}

void run_attend(runner *r, const program_op *op, int thread)
{
    const batch *b = r->step;
    const kv_layer *kv = &r->kv[op->layer];
    const attention *heads = &r->attentions[op->params];
    const int64_t n_kv = kv->shape.n_head_kv;
    float *scratch = r->scratch + (size_t)thread * r->scratch_floats;
    attend_query query = {.kv = kv, .heads = heads};
    range items; /* token * n_kv + KV head */
    while (claim(r, op, b->n_tokens * n_kv, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t t = i / n_kv;
            query.q = in_row(r, op, 0, t);
            query.out = out_row(r, op, t);
            query.pages = pages_of(b, kv, t);
            set_seen(r, heads, t, &query);
            r->table->attend(&query, (int32_t)(i % n_kv), scratch);
        }
}

/* Mixers with a state: tokens one after the other, threads share the heads or the columns. A
 * token's state is that of its sequence, which begins as zeros at position 0. */
#include <math.h>
#include <string.h>

#include "runner.h"

/* of conv: wide, for its rows lie far apart in memory; of delta_net */
enum { COLUMNS_AT_ONCE = 512, DELTA_COLUMNS = 64 };

static float *state_of(const runner *r, const program_op *op, int64_t t)
{
    const recurrent_state *s = &r->states[op->state];
    return s->data + r->step->states[r->step->sequences[t]] * s->n_floats;
}

/* `n` floats of the state from `begin` on, zeroed where the sequence begins. */
static float *state_part(const runner *r, const program_op *op, int64_t t, int64_t begin,
                         int64_t n)
{
    float *part = state_of(r, op, t) + begin;
    if (r->step->positions[t] == 0)
        memset(part, 0, (size_t)n * sizeof(float));
    return part;
}

static float softplus(float x) { return x > 30.0f ? x : log1pf(expf(x)); }

/* ---- conv: state (length - 1, width), oldest first; weight (length, width) ---- */

static void conv_columns(runner *r, const program_op *op, int64_t begin, int64_t n)
{
    const int64_t width = op->width, before = r->states[op->state].n_floats / width;
    const float *w = vector_of(r, op, 0) + begin, *bias = vector_of(r, op, 1);
    for (int64_t t = 0; t < r->step->n_tokens; t++) {
        float *state = state_of(r, op, t) + begin, sum[COLUMNS_AT_ONCE] = {0};
        const float *x = in_row(r, op, 0, t) + begin;
        const int fresh = r->step->positions[t] == 0;
        for (int64_t j = 0; j < before; j++) {
            float *row = state + j * width;
            const float *next = j + 1 < before ? row + width : x;
            for (int64_t c = 0; c < n; c++) {
                sum[c] += w[j * width + c] * (fresh ? 0.0f : row[c]);
                row[c] = fresh && next != x ? 0.0f : next[c];
            }
        }
        float *out = out_row(r, op, t) + begin;
        for (int64_t c = 0; c < n; c++) {
            out[c] = sum[c] + w[before * width + c] * x[c];
            if (bias)
                out[c] += bias[begin + c];
        }
    }
}

void run_conv(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const int64_t blocks = (op->width + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE;
    range items;
    while (claim(r, op, blocks, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t begin = i * COLUMNS_AT_ONCE;
            conv_columns(r, op, begin, at_most(COLUMNS_AT_ONCE, op->width - begin));
        }
}

/* ---- mamba2: state (n_head, n_state, head_dim) ---- */

static void mamba2_head(runner *r, const program_op *op, const mamba2_shape *p, int64_t h)
{
    const int64_t n_floats = (int64_t)p->head_dim * p->n_state,
                  group = h / (p->n_head / p->n_group) * p->n_state;
    const float a = vector_of(r, op, 0)[h], d = vector_of(r, op, 1)[h],
                dt_bias = vector_of(r, op, 2)[h];
    for (int64_t t = 0; t < r->step->n_tokens; t++) {
        const float dt = softplus(in_row(r, op, 3, t)[h] + dt_bias);
        const mamba2_step step = {
            .x = in_row(r, op, 0, t) + h * p->head_dim, .b = in_row(r, op, 1, t) + group,
            .c = in_row(r, op, 2, t) + group, .dt = dt, .decay = expf(dt * a), .d = d};
        r->table->mamba2(&step, state_part(r, op, t, h * n_floats, n_floats), p->head_dim,
                         p->n_state, out_row(r, op, t) + h * p->head_dim);
    }
}

void run_mamba2(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const mamba2_shape *p = &r->mamba2s[op->params];
    range heads;
    while (claim(r, op, p->n_head, 1, &heads))
        for (int64_t h = heads.begin; h < heads.end; h++)
            mamba2_head(r, op, p, h);
}

/* ---- delta_net: state (n_value_head, key_length, value_length) ---- */

/* Columns [begin, end) of a head: few enough to stay in the nearest cache from token to token. */
static void delta_net_columns(runner *r, const program_op *op, int64_t h, int64_t begin,
                              int64_t end)
{
    const delta_net_shape *p = &r->delta_nets[op->params];
    const int64_t n_key = p->key_length, n_value = p->value_length,
                  key_head = p->tiled ? h % p->n_key_head : h / (p->n_value_head / p->n_key_head);
    const float a = vector_of(r, op, 0)[h], dt_bias = vector_of(r, op, 1)[h];
    for (int64_t t = 0; t < r->step->n_tokens; t++) {
        float *state = state_of(r, op, t) + h * n_key * n_value;
        for (int64_t i = 0; r->step->positions[t] == 0 && i < n_key; i++)
            memset(state + i * n_value + begin, 0, (size_t)(end - begin) * sizeof(float));
        const delta_net_step step = {
            .q = in_row(r, op, 0, t) + key_head * n_key,
            .k = in_row(r, op, 1, t) + key_head * n_key, .v = in_row(r, op, 2, t) + h * n_value,
            .decay = expf(a * softplus(in_row(r, op, 3, t)[h] + dt_bias)),
            .beta = 1.0f / (1.0f + expf(-in_row(r, op, 4, t)[h]))};
        r->table->delta_net(&step, state, n_key, n_value, begin, end,
                            out_row(r, op, t) + h * n_value);
    }
}

void run_delta_net(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const delta_net_shape *p = &r->delta_nets[op->params];
    const int64_t n = p->value_length, blocks = (n + DELTA_COLUMNS - 1) / DELTA_COLUMNS;
    range items; /* head * blocks + block */
    while (claim(r, op, p->n_value_head * blocks, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t begin = i % blocks * DELTA_COLUMNS;
            delta_net_columns(r, op, i / blocks, begin, at_most(begin + DELTA_COLUMNS, n));
        }
}

void runner_copy_state(runner *r, int64_t source, int64_t target)
{
    for (int64_t i = 0; i < r->n_recurrent; i++) {
        const recurrent_state *s = &r->states[i];
        memmove(s->data + target * s->n_floats, s->data + source * s->n_floats,
                (size_t)s->n_floats * sizeof(float));
    }
}

/* Mixtures of experts, and products with a matrix for each head. */
#include <math.h>
#include <string.h>

#include "runner.h"

/* A piece of work is so many tiles of one expert; its tokens are gathered so many at a time. */
enum { TILES_AT_ONCE = EXPERT_TILES, TOKENS_AT_ONCE = EXPERT_TOKENS, FEW_ROUTES = 32 };

#define LEAST_SUM 6.103515625e-5f /* as in tinychat/ops/mixers.py */

/* ---- route ---- */

static void soften(float *x, int64_t n)
{
    float high = x[0], sum = 0.0f;
    for (int64_t i = 1; i < n; i++)
        high = x[i] > high ? x[i] : high;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] = expf(x[i] - high);
    for (int64_t i = 0; i < n; i++)
        x[i] /= sum;
}

/* Numbers from the highest down, then what is none; of equals the first. */
static int is_better(float a, float b) { return isnan(b) ? !isnan(a) : a > b; }

/* The index of the best of x (n) that is not taken; there is one. */
static int64_t best_of(const float *x, const uint8_t *taken, int64_t n)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || is_better(x[i], x[best])))
            best = i;
    return best;
}

/* Experts outside of the groups with the best two become -inf. A group with one that is no number
 * is none either. */
static void refuse_groups(const routing *p, float *judged, float *of_group, uint8_t *taken)
{
    const int64_t n = p->n_expert / p->n_group;
    for (int64_t g = 0; g < p->n_group; g++) {
        float first = -INFINITY, second = -INFINITY;
        int none = 0;
        for (int64_t i = 0; i < n; i++) {
            const float x = judged[g * n + i];
            if (x > first)
                second = first, first = x;
            else if (x > second)
                second = x;
            none |= isnan(x);
        }
        of_group[g] = none ? NAN : n > 1 ? first + second : first;
    }
    memset(taken, 0, (size_t)p->n_group);
    for (int64_t i = 0; i < p->n_group_used; i++)
        taken[best_of(of_group, taken, p->n_group)] = 1;
    for (int64_t g = 0; g < p->n_group; g++)
        for (int64_t i = 0; i < n && !taken[g]; i++)
            judged[g * n + i] = -INFINITY;
}

/* scratch: scores (n_expert), judged (n_expert), of groups (n_expert), then bytes (n_expert) */
static void route_row(const routing *p, const float *logits, const float *bias, float *scratch,
                      float *out)
{
    const int64_t n = p->n_expert;
    float *scores = scratch, *judged = scores + n, *weights = out + p->n_used, sum = 0.0f;
    uint8_t *taken = (uint8_t *)(judged + 2 * n);
    memcpy(scores, logits, (size_t)n * sizeof(float));
    if (p->gating == GATING_SOFTMAX)
        soften(scores, n);
    for (int64_t i = 0; i < n; i++) {
        if (p->gating == GATING_SIGMOID)
            scores[i] = 1.0f / (1.0f + expf(-scores[i]));
        judged[i] = bias ? scores[i] + bias[i] : scores[i];
    }
    if (p->n_group > 1)
        refuse_groups(p, judged, judged + n, taken);
    memset(taken, 0, (size_t)n);
    for (int64_t i = 0; i < p->n_used; i++) {
        const int64_t best = best_of(judged, taken, n);
        taken[best] = 1;
        out[i] = (float)best;
        weights[i] = scores[best];
    }
    if (p->gating == GATING_CHOSEN)
        soften(weights, p->n_used);
    for (int64_t i = 0; i < p->n_used; i++)
        sum += weights[i];
    for (int64_t i = 0; i < p->n_used; i++)
        weights[i] = (p->normalise ? weights[i] / (sum > LEAST_SUM ? sum : LEAST_SUM) : weights[i])
                     * p->scale;
}

void run_route(runner *r, const program_op *op, int thread)
{
    float *scratch = r->scratch + (size_t)thread * r->scratch_floats;
    EACH_ROW(t)
        route_row(&r->routings[op->params], in_row(r, op, 0, t), vector_of(r, op, 0), scratch,
                  out_row(r, op, t));
}

/* ---- experts ---- */

typedef struct {
    runner *r;
    const program_op *op;
    const matrix *m;
    int64_t n_used, n_out;
    size_t act_bytes; /* of one input row */
    int own;          /* 1: each route has an input row of its own, 0: a token's routes share one */
} experts_op;

static experts_op experts_of(runner *r, const program_op *op)
{
    const matrix *m = matrix_of(r, op);
    experts_op e = {.r = r, .op = op, .m = m, .n_out = m->n_rows, .n_used = op->width / m->n_rows};
    e.act_bytes = linear_wants_int8(&m->packed) ? linear_act_bytes(m->n_cols)
                                                : (size_t)m->n_cols * sizeof(float);
    e.own = (size_t)op->group * sizeof(float) > e.act_bytes;
    return e;
}

static int64_t expert_of(const experts_op *e, int64_t t, int64_t route)
{
    return (int64_t)in_row(e->r, e->op, 1, t)[route];
}

static const uint8_t *input(const experts_op *e, int64_t t, int64_t route)
{
    return (const uint8_t *)in_row(e->r, e->op, 0, t) + (e->own ? route : 0) * e->act_bytes;
}

static const float *bias_of(const experts_op *e, int64_t expert)
{
    const float *bias = vector_of(e->r, e->op, 1);
    return bias ? bias + expert * e->n_out : NULL;
}

static void one_route(const experts_op *e, int64_t t, int64_t route, range tiles)
{
    const int64_t expert = expert_of(e, t, route);
    const packed_matrix packed = packed_part(e->m, expert);
    e->r->table->linear->linear(&packed, input(e, t, route), e->act_bytes, 1, bias_of(e, expert),
                                out_row(e->r, e->op, t) + route * e->n_out, e->n_out, tiles.begin,
                                tiles.end);
}

/* Tokens gathered for one expert: their rows side by side, and where their results go. */
typedef struct {
    uint8_t *act; /* (TOKENS_AT_ONCE, act_bytes) */
    float *out;   /* (TOKENS_AT_ONCE, TILES_AT_ONCE * TILE_ROWS) */
    float *to[TOKENS_AT_ONCE];
    int64_t n;
} gathered;

static void multiply_gathered(const experts_op *e, int64_t expert, range tiles, gathered *g)
{
    const int64_t first = tiles.begin * TILE_ROWS, ld = TILES_AT_ONCE * TILE_ROWS,
                  width = at_most(tiles.end * TILE_ROWS, e->n_out) - first;
    const packed_matrix packed = packed_part(e->m, expert);
    e->r->table->linear->linear(&packed, g->act, e->act_bytes, g->n, bias_of(e, expert),
                                g->out - first, ld, tiles.begin, tiles.end);
    for (int64_t i = 0; i < g->n; i++)
        memcpy(g->to[i] + first, g->out + i * ld, (size_t)width * sizeof(float));
    g->n = 0;
}

static void one_expert(const experts_op *e, int64_t expert, range tiles, gathered *g)
{
    for (int64_t t = 0; t < n_rows(e->r, e->op); t++)
        for (int64_t route = 0; route < e->n_used; route++)
            if (expert_of(e, t, route) == expert) {
                memcpy(g->act + (size_t)g->n * e->act_bytes, input(e, t, route), e->act_bytes);
                g->to[g->n++] = out_row(e->r, e->op, t) + route * e->n_out;
                if (g->n == TOKENS_AT_ONCE)
                    multiply_gathered(e, expert, tiles, g);
            }
    if (g->n)
        multiply_gathered(e, expert, tiles, g);
}

/* With few routes each is a product by itself; else an expert's tokens are multiplied together, so
 * that its weights are read once. */
void run_experts(runner *r, const program_op *op, int thread)
{
    const experts_op e = experts_of(r, op);
    const int64_t tiles = linear_tiles(&e.m->packed),
                  chunks = (tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE,
                  routes = n_rows(r, op) * e.n_used;
    float *scratch = r->scratch + (size_t)thread * r->scratch_floats;
    gathered g = {.act = (uint8_t *)scratch,
                  .out = scratch + TOKENS_AT_ONCE * e.act_bytes / sizeof(float)};
    const int few = routes <= FEW_ROUTES;
    range items; /* (route or expert) * chunks + chunk */
    while (claim(r, op, (few ? routes : e.m->n_parts) * chunks, 1, &items))
        for (int64_t i = items.begin; i < items.end; i++) {
            const int64_t begin = i % chunks * TILES_AT_ONCE;
            const range part = {begin, at_most(begin + TILES_AT_ONCE, tiles)};
            if (few)
                one_route(&e, i / chunks / e.n_used, i / chunks % e.n_used, part);
            else
                one_expert(&e, i / chunks, part, &g);
        }
}

void run_weigh(runner *r, const program_op *op, int thread)
{
    const int64_t n = op->group, n_used = op->width / n;
    EACH_ROW(t)
        for (int64_t i = 0; i < n_used; i++)
            r->table->scale(in_row(r, op, 0, t), in_row(r, op, 1, t)[n_used + i], n,
                            out_row(r, op, t) + i * n);
}

void run_mix(runner *r, const program_op *op, int thread)
{
    const int64_t n = op->width, n_used = op->group / n;
    EACH_ROW(t) {
        const float *routes = in_row(r, op, 1, t);
        float *out = out_row(r, op, t);
        memset(out, 0, (size_t)n * sizeof(float));
        for (int64_t i = 0; i < n_used; i++)
            r->table->add(out, in_row(r, op, 0, t) + i * n,
                          op->weighted ? routes[n_used + i] : 1.0f, n, out);
    }
}

/* ---- heads ---- */

void run_head_linear(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const matrix *m = matrix_of(r, op);
    const int64_t tokens = n_rows(r, op), tiles = linear_tiles(&m->packed);
    const size_t stride = (size_t)r->slots[op->in[0]].stride * sizeof(float),
                 act_bytes = linear_wants_int8(&m->packed) ? linear_act_bytes(m->n_cols)
                                                           : (size_t)m->n_cols * sizeof(float);
    range heads;
    while (tokens > 0 && claim(r, op, m->n_parts, 1, &heads))
        for (int64_t h = heads.begin; h < heads.end; h++) {
            const packed_matrix packed = packed_part(m, h);
            r->table->linear->linear(&packed, (const uint8_t *)in_row(r, op, 0, 0) + h * act_bytes,
                                     stride, tokens, NULL, out_row(r, op, 0) + h * m->n_rows,
                                     r->slots[op->out].stride, 0, tiles);
        }
}

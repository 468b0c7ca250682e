/* The twin of tinychat/ops/sampling.py, which says what is meant. The vocabulary is read once or
 * twice by vectors; only the few tokens that can be chosen are ranked. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

/* Without top_k: how many to rank first, and how many times more when they do not do. */
enum { FIRST_RANKS = 64, MORE_RANKS = 8 };

typedef struct {
    const kernel_table *table;
    sample_memory *memory;
    const float *x; /* logits, penalized */
    int64_t n, n_groups;
    float high; /* the highest finite logit */
} row;

static int is_finite(float x) { return x >= -FLT_MAX && x <= FLT_MAX; }

/* ---- repeat penalty ---- */

static float penalize(float x, double penalty)
{
    const double y = x > 0 ? (double)x / penalty : (double)x * penalty;
    return (float)fmin(fmax(y, -(double)FLT_MAX), (double)FLT_MAX);
}

/* Each id once: one that was penalized before differs from its logit, or the penalty does not move
 * it. */
static const float *penalized(sample_memory *memory, const float *logits, double penalty,
                              const int64_t *recent, int64_t n_recent)
{
    if (penalty == 1.0 || n_recent == 0)
        return logits;
    memcpy(memory->penalized, logits, (size_t)memory->n_vocab * sizeof *logits);
    for (int64_t i = 0; i < n_recent; i++) {
        const int64_t id = recent[i];
        if (id >= 0 && id < memory->n_vocab && is_finite(logits[id]) &&
            memory->penalized[id] == logits[id])
            memory->penalized[id] = penalize(logits[id], penalty);
    }
    return memory->penalized;
}

/* ---- ranking: by value descending, then id ascending ---- */

static int before(ranked a, ranked b)
{
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

static int compare(const void *a, const void *b)
{
    return before(*(const ranked *)a, *(const ranked *)b) ? -1 : 1;
}

static void swap(ranked *a, ranked *b)
{
    const ranked c = *a;
    *a = *b;
    *b = c;
}

/* Moves the k that rank first to the front. Source: Hoare, "Algorithm 65: find"; the pivot is the
 * median of three. */
static void select_first(ranked *r, int64_t n, int64_t k)
{
    for (int64_t low = 0, high = n - 1; low < high;) {
        const int64_t middle = low + (high - low) / 2;
        if (before(r[middle], r[low]))
            swap(&r[middle], &r[low]);
        if (before(r[high], r[low]))
            swap(&r[high], &r[low]);
        if (before(r[high], r[middle]))
            swap(&r[high], &r[middle]);
        const ranked pivot = r[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (before(r[i], pivot))
                i++;
            while (before(pivot, r[j]))
                j--;
            if (i <= j)
                swap(&r[i++], &r[j--]);
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

/* A value that at least k tokens reach, if there are so many: the k-th highest of the groups'
 * maxima. */
static float floor_of(row *r, int64_t k)
{
    if (k > r->n_groups)
        return -FLT_MAX;
    ranked *groups = r->memory->ranking;
    for (int64_t g = 0; g < r->n_groups; g++)
        groups[g] = (ranked){r->memory->maxima[g], (int32_t)g};
    select_first(groups, r->n_groups, k);
    return groups[k - 1].value >= -FLT_MAX ? groups[k - 1].value : -FLT_MAX;
}

/* All finite tokens of at least `floor` -> memory->ranking, unsorted; returns how many. */
static int64_t collect(row *r, float floor)
{
    int64_t n = 0;
    for (int64_t g = 0; g < r->n_groups; g++) {
        if (!(r->memory->maxima[g] >= floor))
            continue;
        const int64_t end = (g + 1) * SAMPLE_GROUP < r->n ? (g + 1) * SAMPLE_GROUP : r->n;
        for (int64_t i = g * SAMPLE_GROUP; i < end; i++)
            if (r->x[i] >= floor && r->x[i] <= FLT_MAX)
                r->memory->ranking[n++] = (ranked){r->x[i], (int32_t)i};
    }
    return n;
}

/* Ranks the first k tokens; returns how many there are. */
static int64_t rank_first(row *r, int64_t k)
{
    ranked *ranking = r->memory->ranking;
    int64_t n = collect(r, floor_of(r, k));
    if (n > k) {
        select_first(ranking, n, k);
        n = k;
    }
    qsort(ranking, (size_t)n, sizeof *ranking, compare);
    return n;
}

static int64_t highest(const row *r)
{
    int64_t g = 0;
    while (r->memory->maxima[g] != r->high)
        g++;
    int64_t i = g * SAMPLE_GROUP;
    while (r->x[i] != r->high)
        i++;
    return i;
}

/* ---- filters on the ranking; x = value - highest ---- */

static double above_high(const row *r, int64_t i)
{
    return (double)r->memory->ranking[i].value - (double)r->high;
}

static double sum_of(const row *r, int64_t n, double temperature)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += exp(above_high(r, i) / temperature);
    return sum;
}

/* The first of n ranks at which the cumulative sum reaches `target` (or exceeds it); n: none. */
static int64_t find_sum(const row *r, int64_t n, double temperature, double target, int exceed)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += exp(above_high(r, i) / temperature);
        if (sum > target || (!exceed && sum == target))
            return i;
    }
    return n;
}

static int64_t count_min_p(const row *r, int64_t n, double min_p)
{
    const double least = min_p > 0 ? log(min_p) : -INFINITY;
    int64_t kept = 0;
    while (kept < n && above_high(r, kept) >= least)
        kept++;
    return kept;
}

static int64_t draw(const row *r, int64_t n, double temperature, double coin, double total)
{
    const int64_t i = find_sum(r, n, temperature, coin * total, 1);
    return r->memory->ranking[i < n ? i : n - 1].id;
}

static int64_t sample_top_k(row *r, const sample_params *p, double coin)
{
    int64_t n = rank_first(r, p->top_k);
    if (p->top_p < 1) {
        const int64_t i = find_sum(r, n, 1.0, p->top_p * sum_of(r, n, 1.0), 0);
        n = i < n ? i + 1 : n;
    }
    n = count_min_p(r, n, p->min_p);
    return draw(r, n, p->temperature, coin, sum_of(r, n, p->temperature));
}

/* Without top_k every token is a candidate: rank more and more of them until the filters, or the
 * coin, need no more. */
static int64_t sample_all(row *r, const sample_params *p, double coin)
{
    const double inverse = 1.0 / p->temperature;
    const float scale = inverse < (double)FLT_MAX ? (float)inverse : FLT_MAX;
    const double mass =
        p->top_p < 1 ? p->top_p * r->table->exp_sum(r->x, r->n, r->high, 1.0f) : INFINITY;
    const int unfiltered = p->top_p >= 1 && p->min_p <= 0;
    const double total = unfiltered ? r->table->exp_sum(r->x, r->n, r->high, scale) : 0.0;
    for (int64_t k = FIRST_RANKS;; k *= MORE_RANKS) {
        const int64_t n = rank_first(r, k);
        const int complete = n < k;
        const int64_t i = find_sum(r, n, 1.0, mass, 0);
        const int64_t kept = count_min_p(r, i < n ? i + 1 : n, p->min_p);
        if (complete || kept < n || i < n)
            return draw(r, kept, p->temperature, coin, sum_of(r, kept, p->temperature));
        if (unfiltered) {
            const int64_t drawn = find_sum(r, n, p->temperature, coin * total, 1);
            if (drawn < n)
                return r->memory->ranking[drawn].id;
        }
    }
}

int64_t sample_logits(const kernel_table *table, sample_memory *memory, const float *logits,
                      const sample_params *params, const int64_t *recent, int64_t n_recent,
                      double coin)
{
    row r = {.table = table,
             .memory = memory,
             .n = memory->n_vocab,
             .n_groups = (memory->n_vocab + SAMPLE_GROUP - 1) / SAMPLE_GROUP};
    r.x = penalized(memory, logits, params->repeat_penalty, recent, n_recent);
    table->group_maxima(r.x, r.n, memory->maxima);
    r.high = -INFINITY;
    for (int64_t g = 0; g < r.n_groups; g++)
        r.high = memory->maxima[g] > r.high ? memory->maxima[g] : r.high;
    if (!is_finite(r.high))
        return -1;
    if (params->temperature == 0 || params->top_k == 1 || params->top_p == 0)
        return highest(&r);
    return params->top_k > 0 ? sample_top_k(&r, params, coin) : sample_all(&r, params, coin);
}

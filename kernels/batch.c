/* Whether a batch can be run: the twin of Batch.check in tinychat/ops/batch.py. */
#include <string.h>

#include "runner.h"

static int all_between(const int32_t *values, int64_t n, int64_t low, int64_t end)
{
    for (int64_t i = 0; i < n; i++)
        if (values[i] < low || values[i] >= end)
            return 0;
    return 1;
}

/* Notes the first and last position of each sequence; they must rise. */
static int positions_rise(runner *r, const batch *b)
{
    for (int64_t s = 0; s < b->n_sequences; s++)
        r->first[s] = r->last[s] = -1;
    for (int64_t t = 0; t < b->n_tokens; t++) {
        const int32_t s = b->sequences[t], p = b->positions[t];
        if (p <= r->last[s])
            return 0;
        if (r->last[s] < 0)
            r->first[s] = p;
        r->last[s] = p;
    }
    return 1;
}

/* Only the pages that this step's tokens need are read: of those of layers with a reach, not the
 * first ones. */
static int pages_fit(const runner *r, const batch *b, int64_t s)
{
    const int64_t end = r->last[s] / PAGE_TOKENS + 1,
                  begin = at_least(r->first[s] - r->window + 1, 0) / PAGE_TOKENS,
                  row = s * b->max_pages;
    return all_between(b->pages + row, end, 0, r->n_pages) &&
           (!b->window_pages ||
            all_between(b->window_pages + row + begin, end - begin, 0, r->n_window_pages));
}

static int all_pages_fit(const runner *r, const batch *b)
{
    for (int64_t s = 0; s < b->n_sequences; s++)
        if (r->last[s] >= 0 && !pages_fit(r, b, s))
            return 0;
    return 1;
}

/* A recurrent state belongs to one sequence of the step, which goes on without a gap. */
static int states_fit(runner *r, const batch *b)
{
    memset(r->taken, 0, (size_t)r->n_states);
    for (int64_t s = 0; s < b->n_sequences; s++) {
        if (r->last[s] < 0)
            continue;
        const int32_t state = b->states[s];
        if (state < 0 || state >= r->n_states || r->taken[state])
            return 0;
        r->taken[state] = 1;
    }
    for (int64_t s = 0; s < b->n_sequences; s++)
        r->first[s]--;
    for (int64_t t = 0; t < b->n_tokens; t++) {
        int32_t *before = &r->first[b->sequences[t]];
        if (b->positions[t] != *before + 1)
            return 0;
        *before = b->positions[t];
    }
    return 1;
}

static int spans_fit(const runner *r, const batch *b)
{
    for (int64_t t = 0; t < b->n_tokens; t++) {
        const int32_t first = r->first[b->sequences[t]], last = r->last[b->sequences[t]];
        for (int64_t i = t * r->n_spans; i < (t + 1) * r->n_spans; i++) {
            const int32_t begin = b->spans[2 * i], end = b->spans[2 * i + 1];
            if (begin < first || begin > end || end > last)
                return 0;
        }
    }
    return 1;
}

/* NOTE: states_fit comes last, for it moves r->first on. */
int runner_accepts(runner *r, const batch *b)
{
    return b->n_tokens >= 1 && b->n_tokens <= r->max_tokens && b->n_sequences >= 1 &&
           b->n_sequences <= r->max_sequences && b->n_outputs <= r->max_outputs &&
           all_between(b->tokens, b->n_tokens, 0, r->n_ids) &&
           all_between(b->sequences, b->n_tokens, 0, b->n_sequences) &&
           all_between(b->outputs, b->n_outputs, 0, b->n_tokens) &&
           all_between(b->positions, b->n_tokens, 0, b->max_pages * PAGE_TOKENS) &&
           positions_rise(r, b) && all_pages_fit(r, b) &&
           (!b->input_rows || all_between(b->input_rows, b->n_tokens, -1, b->n_inputs)) &&
           (!b->spans || spans_fit(r, b)) && (!b->states || states_fit(r, b));
}

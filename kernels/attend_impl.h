/* Attention over the KV pages: see ops_impl.h. */

/* A row is one query head of one token. Page by page, in order of position, with the online
 * softmax: m the highest score so far, l the sum of exp(score - m) in lanes, o the values weighted
 * alike; a higher m rescales l and o. Several rows take a page at once, so that what is read of it
 * serves them all; what is computed for each is the same as alone. Source: Milakov and Gimelshein,
 * "Online normalizer calculation for softmax". */

#define PAGE_VECTORS (PAGE_TOKENS / LANES)
#define ROWS_AT_ONCE (LANES == 16 ? 8 : 4) /* sums and keys stay in registers: 16 lanes have 32 */

/* What is known of a row after some pages, beside its o. */
typedef struct {
    vf l;
    float m, rescale;
    int lo, hi; /* slots of the page that it sees; none where lo >= hi */
    float weights[PAGE_TOKENS];
} row_state;

INLINE vf load_kv(const uint8_t *block, int64_t i, const int is_f16)
{
    return is_f16 ? vf_load_f16((const uint16_t *)block + i) : vf_load((const float *)block + i);
}

/* scores[r][slot] = q_r . key_slot for the slots of one page. The lines of `next`, wanted soon, are
 * fetched on the way: one head's blocks lie too far apart for the processor to foresee them. */
INLINE void score_page(const uint8_t *keys, const attend_row *rows, int64_t n_key, const int n,
                       const int is_f16, const uint8_t *next, vf scores[ROWS_AT_ONCE][PAGE_VECTORS])
{
    const int some = n * PAGE_VECTORS <= SUMS ? PAGE_VECTORS : n * 4 <= SUMS ? 4 : 2;
    for (int at = 0; at < PAGE_VECTORS; at += some) {
        vf sum[ROWS_AT_ONCE][PAGE_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
#pragma GCC unroll 8
            for (int j = 0; j < some; j++)
                sum[r][j] = vf_set(0.0f);
        for (int64_t i = 0; i < n_key; i++) {
            vf key[PAGE_VECTORS];
            if (n <= 4)
                __builtin_prefetch(next + i * MEMORY_ALIGN);
#pragma GCC unroll 8
            for (int j = 0; j < some; j++)
                key[j] = load_kv(keys, i * PAGE_TOKENS + (at + j) * LANES, is_f16);
#pragma GCC unroll 8
            for (int r = 0; r < n; r++)
#pragma GCC unroll 8
                for (int j = 0; j < some; j++)
                    sum[r][j] = vf_fma(vf_set(rows[r].q[i]), key[j], sum[r][j]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
#pragma GCC unroll 8
            for (int j = 0; j < some; j++)
                scores[r][at + j] = sum[r][j];
    }
}

/* The scores of slots from `slot` on, -inf where the row does not see them */
INLINE vf only_seen(vf score, int slot, const row_state *s)
{
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi lane;
    memcpy(&lane, lanes, sizeof lane);
    return vf_select((lane + slot >= s->lo) & (lane + slot < s->hi), score, vf_set(-INFINITY));
}

INLINE void raise_high(row_state *s, float high)
{
    float rescale[LANES];
    vf_store(rescale, vf_exp(vf_set(s->m - high)));
    s->rescale = rescale[0];
    s->l = s->l * s->rescale;
    s->m = high;
}

/* Scores of one row and page -> weights[slot] = exp(score - m), 0 outside [lo, hi). */
INLINE void soften_page(const vf *scores, const attention *heads, row_state *s)
{
    vf score[PAGE_VECTORS], high = vf_set(-INFINITY);
    for (int j = 0; j < PAGE_VECTORS; j++) {
        score[j] = scores[j] * heads->scale;
        if (heads->softcap > 0.0f)
            score[j] = heads->softcap * vf_tanh(score[j] / heads->softcap);
        if (s->lo > 0 || s->hi < PAGE_TOKENS)
            score[j] = only_seen(score[j], j * LANES, s);
        high = vf_max(high, score[j]);
    }
    s->rescale = 1.0f;
    if (vf_any_above(high, vf_set(s->m)))
        raise_high(s, lanes_max(high));
    for (int j = 0; j < PAGE_VECTORS; j++) {
        const vf weight = vf_exp(score[j] - s->m);
        s->l += weight;
        vf_store(s->weights + j * LANES, weight);
    }
}

/* o[r][c..] = o[r][c..] * rescale[r] + sum of weights[r][slot] * value_slot[c..] over the slots
 * [lo, hi), n_vectors of them */
INLINE void weigh_columns(const uint8_t *values, int64_t stride, int64_t c, int lo, int hi,
                          const row_state *states, const int n, const int n_vectors,
                          const int is_f16, const uint8_t *next, float *o)
{
    vf sum[ROWS_AT_ONCE][4];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            sum[r][j] = vf_load(o + r * stride + c + j * LANES) * states[r].rescale;
    for (int slot = lo; slot < hi; slot++) {
        vf value[4];
        if (n <= 4) {
            __builtin_prefetch(next + (16 * (c / LANES) + 2 * slot) * MEMORY_ALIGN);
            __builtin_prefetch(next + (16 * (c / LANES) + 2 * slot + 1) * MEMORY_ALIGN);
        }
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            value[j] = load_kv(values, slot * stride + c + j * LANES, is_f16);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; j++)
                sum[r][j] = vf_fma(vf_set(states[r].weights[slot]), value[j], sum[r][j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            vf_store(o + r * stride + c + j * LANES, sum[r][j]);
}

INLINE void weigh_page(const uint8_t *values, int64_t stride, const row_state *states, const int n,
                       const int is_f16, const uint8_t *next, float *o)
{
    const int some = n * 4 <= SUMS ? 4 : 2, lo = states->lo, hi = states->hi;
    int64_t c = 0;
    for (; c + some * LANES <= stride; c += some * LANES)
        weigh_columns(values, stride, c, lo, hi, states, n, some, is_f16, next, o);
    for (; c < stride; c += LANES)
        weigh_columns(values, stride, c, lo, hi, states, n, 1, is_f16, next, o);
}

/* Which slots of page p a row sees. */
INLINE void set_seen(const attend_row *row, int32_t p, row_state *s)
{
    const int64_t start = (int64_t)p * PAGE_TOKENS, first = row->first - start,
                  end = row->last - start + 1;
    s->lo = first > 0 ? (int)(first < PAGE_TOKENS ? first : PAGE_TOKENS) : 0;
    s->hi = end < PAGE_TOKENS ? (int)(end > 0 ? end : 0) : PAGE_TOKENS;
}

/* One page for n rows. They weigh its values together where they see the same slots. NOTE: what a
 * row does not see may hold anything, also NaN, and must not even be multiplied by 0. */
INLINE void attend_page(const attend_block *a, const attend_row *rows, int32_t p, const int n,
                        const int is_f16, const uint8_t *keys, const uint8_t *values,
                        const uint8_t *next, row_state *states, float *o)
{
    const int64_t stride = a->kv->value_stride;
    vf scores[ROWS_AT_ONCE][PAGE_VECTORS];
    int alike = 1, some = 0;
    for (int r = 0; r < n; r++) {
        set_seen(&rows[r], p, &states[r]);
        alike &= states[r].lo == states[0].lo && states[r].hi == states[0].hi;
        some |= states[r].lo < states[r].hi;
    }
    if (!some)
        return;
    score_page(keys, rows, a->kv->shape.key_length, n, is_f16, values, scores);
    for (int r = 0; r < n; r++)
        if (states[r].lo < states[r].hi)
            soften_page(scores[r], a->heads, &states[r]);
    if (alike) {
        weigh_page(values, stride, states, n, is_f16, next, o);
        return;
    }
    for (int r = 0; r < n; r++)
        if (states[r].lo < states[r].hi)
            weigh_page(values, stride, states + r, 1, is_f16, next, o + r * stride);
}

typedef void attend_some(const attend_block *a, const attend_row *rows, int32_t p,
                         const uint8_t *keys, const uint8_t *values, const uint8_t *next,
                         row_state *states, float *o);
#define ATTEND(n) ATTEND_AS(n, f32, 0) ATTEND_AS(n, f16, 1)
#define ATTEND_AS(n, type, is_f16) \
    static void attend_##n##_##type(const attend_block *a, const attend_row *rows, int32_t p, \
                                    const uint8_t *keys, const uint8_t *values, \
                                    const uint8_t *next, row_state *states, float *o) \
    { \
        attend_page(a, rows, p, n, is_f16, keys, values, next, states, o); \
    }
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)
#if LANES == 16
ATTEND(8)
#endif
#undef ATTEND
#undef ATTEND_AS

/* How many of the rows that are left are taken at once, and by whom. */
INLINE int next_rows(int n, int is_f16, attend_some **run)
{
    static attend_some *const table[][2] = {{attend_1_f32, attend_1_f16},
                                            {attend_2_f32, attend_2_f16},
                                            {attend_3_f32, attend_3_f16},
                                            {attend_4_f32, attend_4_f16}};
#if LANES == 16
    if (n >= 8) {
        *run = is_f16 ? attend_8_f16 : attend_8_f32;
        return 8;
    }
#endif
    n = n < 4 ? n : 4;
    *run = table[n - 1][is_f16];
    return n;
}

/* A sink is a score that was there before all others. */
INLINE row_state first_state(float sink)
{
    row_state s = {.m = sink};
    float lane[LANES] = {sink > -INFINITY ? 1.0f : 0.0f};
    s.l = vf_load(lane);
    return s;
}

static void attend(const attend_block *a, int32_t kv_head, float *o)
{
    const kv_layer *kv = a->kv;
    const int64_t stride = kv->value_stride;
    float *page_keys = o + BLOCK_ROWS * stride,
          *page_values = page_keys + PAGE_TOKENS * (int64_t)kv->shape.key_length;
    row_state states[BLOCK_ROWS];
    int32_t first = INT32_MAX, last = -1;
    for (int r = 0; r < a->n_rows; r++) {
        states[r] = first_state(a->rows[r].sink);
        first = a->rows[r].first < first ? a->rows[r].first : first;
        last = a->rows[r].last > last ? a->rows[r].last : last;
    }
    memset(o, 0, (size_t)(a->n_rows * stride) * sizeof(float));
    for (int32_t p = first / PAGE_TOKENS; p <= last / PAGE_TOKENS; p++) {
        const uint8_t *keys = key_block(kv, a->pages[p], kv_head),
                      *values = value_block(kv, a->pages[p], kv_head);
        const uint8_t *next =
            p < last / PAGE_TOKENS ? key_block(kv, a->pages[p + 1], kv_head) : keys;
        if (kv->type == KV_Q8_0) {
            dequantize_page(kv, keys, values, page_keys, page_values);
            keys = (const uint8_t *)page_keys;
            values = (const uint8_t *)page_values;
        }
        attend_some *run;
        for (int r = 0, n; r < a->n_rows; r += n) {
            n = next_rows(a->n_rows - r, kv->type == KV_F16, &run);
            run(a, a->rows + r, p, keys, values, next, states + r, o + r * stride);
        }
    }
    for (int r = 0; r < a->n_rows; r++) {
        const float total = lanes_sum(states[r].l);
        for (int64_t i = 0; i < kv->shape.value_length; i++)
            a->rows[r].out[i] = o[r * stride + i] / total;
    }
}

/* Everything between the matrix products, written once and compiled once per instruction set.
 *
 * The including file gives LANES (4, 8 or 16), the vector type vf of that many floats, and vf_load,
 * vf_store, vf_set, vf_fma (a * b + c), vf_max, vf_load_f16, vf_store_f16; then KERNELS, the name
 * of the table, and ISA, LINEAR.
 *
 * What is computed for one token is the same, operation by operation, whatever else is in the step.
 * Sums run in LANES fixed lanes that are added at the end in a fixed order. Plain loops are left to
 * the compiler's vectorizer: without contraction an elementwise loop rounds the same in its vectors
 * and in its tail.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define PAGE_VECTORS (PAGE_TOKENS / LANES)
#define HEADS_AT_ONCE (LANES / 4) /* scores and keys stay in registers: 16 lanes have 32 of them */

typedef int32_t vi __attribute__((vector_size(LANES * 4)));

/* sum and maximum of the lanes, always in the same order */
INLINE float lanes_sum(vf v)
{
    float lane[LANES];
    vf_store(lane, v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            lane[i] += lane[i + n];
    return lane[0];
}

INLINE float lanes_max(vf v)
{
    float lane[LANES];
    vf_store(lane, v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
    return lane[0];
}

/* the first n < LANES values of x, then zeros */
INLINE vf vf_load_some(const float *x, int64_t n)
{
    float lane[LANES] = {0};
    for (int64_t i = 0; i < n; i++)
        lane[i] = x[i];
    return vf_load(lane);
}

/* exp(x), within 2 ulp; 0 below -104, infinity above 88.73.
 * exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of
 * degree 7. */
INLINE vf vf_exp(vf x)
{
    /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits */
    const vf magic = vf_set(12582912.0f);
    x = vf_max(vf_set(-110.0f), x); /* in this order: a NaN stays one */
    x = -vf_max(vf_set(-110.0f), -x);
    const vf shifted = vf_fma(x, vf_set(1.44269504f), magic);
    const vf n = shifted - magic;
    /* ln 2 in two parts; the first has few bits, so n times it is exact */
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    /* 2^n in two factors, since n goes beyond the exponents of a float */
    const vi k = (vi)shifted - (vi)magic, half = k >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}

static void rmsnorm(const float *x, const float *w, int64_t n_groups, int64_t group, float eps,
                    float *out)
{
    const int64_t whole = group - group % LANES;
    for (int64_t g = 0; g < n_groups; g++, x += group, out += group) {
        vf sum = vf_set(0.0f);
        for (int64_t i = 0; i < whole; i += LANES)
            sum = vf_fma(vf_load(x + i), vf_load(x + i), sum);
        const vf rest = vf_load_some(x + whole, group - whole);
        sum = vf_fma(rest, rest, sum);
        const float factor = 1.0f / sqrtf(lanes_sum(sum) / (float)group + eps);
        for (int64_t i = 0; i < group; i++)
            out[i] = x[i] * factor * w[i];
    }
}

/* out[i] = x[i] * cos[i] + x[partner of i] * sin[i]; sin is negative for the first of a pair */
static void rope_rows(const float *x, const float *table, int64_t n_heads, int64_t head_dim,
                      int64_t n_rot, int layout, float *out)
{
    const float *restrict cosine = table, *restrict sine = table + n_rot;
    const int64_t half = n_rot / 2;
    for (int64_t h = 0; h < n_heads; h++) {
        const float *restrict from = x + h * head_dim;
        float *restrict to = out + h * head_dim;
        if (layout == ROPE_HALVES) {
            for (int64_t i = 0; i < half; i++)
                to[i] = from[i] * cosine[i] + from[i + half] * sine[i];
            for (int64_t i = half; i < n_rot; i++)
                to[i] = from[i] * cosine[i] + from[i - half] * sine[i];
        } else {
            for (int64_t i = 0; i < n_rot; i += 2) {
                to[i] = from[i] * cosine[i] + from[i + 1] * sine[i];
                to[i + 1] = from[i + 1] * cosine[i + 1] + from[i] * sine[i + 1];
            }
        }
        for (int64_t i = n_rot; i < head_dim; i++)
            to[i] = from[i];
    }
}

static void gate_row(int fn, const float *gate, const float *up, int64_t n, float *out)
{
    (void)fn;
    for (int64_t i = 0; i < n; i += LANES) { /* the last vector may go on into the row's padding */
        const vf x = vf_load(gate + i);
        vf_store(out + i, x / (1.0f + vf_exp(-x)) * vf_load(up + i));
    }
}

static void add(const float *restrict a, const float *restrict b, float scale, int64_t n,
                float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] + scale * b[i];
}

static void scale_row(const float *restrict x, float scale, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale;
}

/* ---- keys and values ---- */

INLINE uint8_t *key_block(const kv_layer *kv, int64_t page, int64_t kv_head)
{
    return kv->keys + (size_t)(page * kv->shape.n_head_kv + kv_head) * kv->key_block_bytes;
}

INLINE uint8_t *value_block(const kv_layer *kv, int64_t page, int64_t kv_head)
{
    return kv->values + (size_t)(page * kv->shape.n_head_kv + kv_head) * kv->value_block_bytes;
}

INLINE void store_f16(uint16_t *to, int64_t stride, const float *from, int64_t n)
{
    uint16_t half[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t rest = n - i < LANES ? n - i : LANES;
        vf_store_f16(half, rest == LANES ? vf_load(from + i) : vf_load_some(from + i, rest));
        for (int64_t j = 0; j < rest; j++)
            to[(i + j) * stride] = half[j];
    }
}

static void store_kv(const kv_layer *kv, const float *k, const float *v, int32_t page, int32_t slot)
{
    const int64_t n_kv = kv->shape.n_head_kv, n_key = kv->shape.key_length,
                  n_value = kv->shape.value_length;
    for (int64_t h = 0; h < n_kv; h++, k += n_key, v += n_value) {
        uint8_t *key = key_block(kv, page, h), *value = value_block(kv, page, h);
        if (kv->is_f16) {
            store_f16((uint16_t *)key + slot, PAGE_TOKENS, k, n_key);
            store_f16((uint16_t *)value + (int64_t)slot * kv->value_stride, 1, v, n_value);
        } else {
            for (int64_t i = 0; i < n_key; i++)
                ((float *)key)[i * PAGE_TOKENS + slot] = k[i];
            memcpy((float *)value + (int64_t)slot * kv->value_stride, v,
                   (size_t)n_value * sizeof(float));
        }
    }
}

/* ---- attention ----
 * Page by page, in order of position, with the online softmax: m the highest score so far, l the
 * sum of exp(score - m) in lanes, o the values weighted alike; a higher m rescales l and o. Source:
 * Milakov and Gimelshein, "Online normalizer calculation for softmax". */

INLINE vf load_kv(const uint8_t *block, int64_t i, const int is_f16)
{
    return is_f16 ? vf_load_f16((const uint16_t *)block + i) : vf_load((const float *)block + i);
}

/* scores[h][slot] = q_h . key_slot for the slots of one page; q: n_heads rows of n_key. The lines
 * of `next`, wanted soon, are fetched on the way: one head's blocks lie too far apart for the
 * processor to foresee them. */
INLINE void score_page(const uint8_t *keys, const float *q, int64_t n_key, const int n_heads,
                       const int is_f16, const uint8_t *next,
                       vf scores[HEADS_AT_ONCE][PAGE_VECTORS])
{
    vf sum[HEADS_AT_ONCE][PAGE_VECTORS];
#pragma GCC unroll 8
    for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
        for (int j = 0; j < PAGE_VECTORS; j++)
            sum[h][j] = vf_set(0.0f);
    for (int64_t i = 0; i < n_key; i++) {
        vf key[PAGE_VECTORS];
        __builtin_prefetch(next + i * MEMORY_ALIGN);
#pragma GCC unroll 8
        for (int j = 0; j < PAGE_VECTORS; j++)
            key[j] = load_kv(keys, i * PAGE_TOKENS + j * LANES, is_f16);
#pragma GCC unroll 8
        for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
            for (int j = 0; j < PAGE_VECTORS; j++)
                sum[h][j] = vf_fma(vf_set(q[h * n_key + i]), key[j], sum[h][j]);
    }
#pragma GCC unroll 8
    for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
        for (int j = 0; j < PAGE_VECTORS; j++)
            scores[h][j] = sum[h][j];
}

/* o[h][c..] = o[h][c..] * rescale[h] + sum of weights[h][slot] * value_slot[c..] over the slots
 * [lo, hi), n_vectors of them */
INLINE void weigh_columns(const uint8_t *values, int64_t stride, int64_t c, int lo, int hi,
                          const float *weights, const float *rescale, const int n_heads,
                          const int n_vectors, const int is_f16, const uint8_t *next, float *o)
{
    vf sum[HEADS_AT_ONCE][4];
#pragma GCC unroll 8
    for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            sum[h][j] = vf_load(o + h * stride + c + j * LANES) * rescale[h];
    for (int slot = lo; slot < hi; slot++) {
        vf value[4];
        __builtin_prefetch(next + (16 * (c / LANES) + 2 * slot) * MEMORY_ALIGN);
        __builtin_prefetch(next + (16 * (c / LANES) + 2 * slot + 1) * MEMORY_ALIGN);
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            value[j] = load_kv(values, slot * stride + c + j * LANES, is_f16);
#pragma GCC unroll 8
        for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; j++)
                sum[h][j] = vf_fma(vf_set(weights[h * PAGE_TOKENS + slot]), value[j], sum[h][j]);
    }
#pragma GCC unroll 8
    for (int h = 0; h < n_heads; h++)
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; j++)
            vf_store(o + h * stride + c + j * LANES, sum[h][j]);
}

/* Scores of one head and page -> weights[slot] = exp(score - m), 0 outside [lo, hi). Returns
 * exp(old m - m). */
INLINE float soften_page(const vf *scores, float scale, int lo, int hi, float *m, vf *l,
                         float *weights)
{
    static const int32_t slots[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vf nothing = vf_set(-INFINITY);
    vf score[PAGE_VECTORS], high = nothing;
    vi lane;
    memcpy(&lane, slots, sizeof lane);
    for (int j = 0; j < PAGE_VECTORS; j++) {
        const vi slot = lane + j * LANES, seen = (slot >= lo) & (slot < hi);
        score[j] = (vf)(((vi)(scores[j] * scale) & seen) | ((vi)nothing & ~seen));
        high = vf_max(high, score[j]);
    }
    const float old = *m, page_high = lanes_max(high);
    *m = page_high > old ? page_high : old;
    float rescale[LANES];
    vf_store(rescale, vf_exp(vf_set(old - *m)));
    *l = *l * rescale[0];
    for (int j = 0; j < PAGE_VECTORS; j++) {
        const vf weight = vf_exp(score[j] - *m);
        *l += weight;
        vf_store(weights + j * LANES, weight);
    }
    return rescale[0];
}

/* n_heads query heads from `head` on, which share kv_head */
INLINE void attend_heads(const attend_query *a, int32_t kv_head, int64_t head, const int n_heads,
                         const int is_f16, float *scratch)
{
    const kv_layer *kv = a->kv;
    const int64_t n_key = kv->shape.key_length, n_value = kv->shape.value_length,
                  stride = kv->value_stride;
    const float *q = a->q + head * n_key;
    float weights[HEADS_AT_ONCE * PAGE_TOKENS], rescale[HEADS_AT_ONCE], m[HEADS_AT_ONCE];
    vf l[HEADS_AT_ONCE], scores[HEADS_AT_ONCE][PAGE_VECTORS];
    for (int h = 0; h < n_heads; h++) {
        m[h] = -INFINITY;
        l[h] = vf_set(0.0f);
    }
    memset(scratch, 0, (size_t)(n_heads * stride) * sizeof(float)); /* o (n_heads, stride) */
    for (int32_t p = a->first / PAGE_TOKENS; p <= a->last / PAGE_TOKENS; p++) {
        const int32_t start = p * PAGE_TOKENS;
        const int lo = a->first > start ? a->first - start : 0;
        const int hi = a->last - start < PAGE_TOKENS ? a->last - start + 1 : PAGE_TOKENS;
        const uint8_t *keys = key_block(kv, a->pages[p], kv_head),
                      *values = value_block(kv, a->pages[p], kv_head);
        const uint8_t *next =
            p < a->last / PAGE_TOKENS ? key_block(kv, a->pages[p + 1], kv_head) : keys;
        score_page(keys, q, n_key, n_heads, is_f16, values, scores);
        for (int h = 0; h < n_heads; h++)
            rescale[h] =
                soften_page(scores[h], a->heads->scale, lo, hi, &m[h], &l[h], weights + h * PAGE_TOKENS);
        int64_t c = 0;
        for (; c + 4 * LANES <= stride; c += 4 * LANES)
            weigh_columns(values, stride, c, lo, hi, weights, rescale, n_heads, 4, is_f16, next,
                          scratch);
        for (; c < stride; c += LANES)
            weigh_columns(values, stride, c, lo, hi, weights, rescale, n_heads, 1, is_f16, next,
                          scratch);
    }
    for (int h = 0; h < n_heads; h++) {
        const float total = lanes_sum(l[h]);
        float *out = a->out + (head + h) * n_value;
        for (int64_t i = 0; i < n_value; i++)
            out[i] = scratch[h * stride + i] / total;
    }
}

#define ATTEND(name, n_heads, is_f16)                                                              \
    static void name(const attend_query *a, int32_t kv_head, int64_t head, float *scratch)         \
    {                                                                                              \
        attend_heads(a, kv_head, head, n_heads, is_f16, scratch);                                  \
    }
typedef void (*attend_some)(const attend_query *a, int32_t kv_head, int64_t head, float *scratch);
ATTEND(attend_1_f32, 1, 0)
ATTEND(attend_1_f16, 1, 1)
#if HEADS_AT_ONCE >= 2
ATTEND(attend_2_f32, 2, 0)
ATTEND(attend_2_f16, 2, 1)
#endif
#if HEADS_AT_ONCE >= 4
ATTEND(attend_3_f32, 3, 0)
ATTEND(attend_3_f16, 3, 1)
ATTEND(attend_4_f32, 4, 0)
ATTEND(attend_4_f16, 4, 1)
#endif
static const attend_some attend_table[HEADS_AT_ONCE][2] = {
    {attend_1_f32, attend_1_f16},
#if HEADS_AT_ONCE >= 2
    {attend_2_f32, attend_2_f16},
#endif
#if HEADS_AT_ONCE >= 4
    {attend_3_f32, attend_3_f16},
    {attend_4_f32, attend_4_f16},
#endif
};

static void attend(const attend_query *a, int32_t kv_head, float *scratch)
{
    const int64_t group = a->heads->n_head / a->heads->n_head_kv;
    for (int64_t i = 0; i < group;) {
        const int64_t n = group - i < HEADS_AT_ONCE ? group - i : HEADS_AT_ONCE;
        attend_table[n - 1][a->kv->is_f16](a, kv_head, kv_head * group + i, scratch);
        i += n;
    }
}

/* ---- sampling ---- */

/* x where it is finite, -inf elsewhere */
INLINE vf only_finite(vf x)
{
    const vi bits = (vi)x, finite = (bits & 0x7f800000) != 0x7f800000;
    return (vf)((bits & finite) | ((vi)vf_set(-INFINITY) & ~finite));
}

INLINE vf load_row(const float *x, int64_t i, int64_t n)
{
    if (i + LANES <= n)
        return vf_load(x + i);
    float lane[LANES];
    for (int64_t j = 0; j < LANES; j++)
        lane[j] = i + j < n ? x[i + j] : -INFINITY;
    return vf_load(lane);
}

static void group_maxima(const float *x, int64_t n, float *maxima)
{
    for (int64_t g = 0; g < n; g += SAMPLE_GROUP) {
        vf high = vf_set(-INFINITY);
        for (int64_t i = g; i < g + SAMPLE_GROUP && i < n; i += LANES)
            high = vf_max(high, only_finite(load_row(x, i, n)));
        maxima[g / SAMPLE_GROUP] = lanes_max(high);
    }
}

static double exp_sum(const float *x, int64_t n, float high, float scale)
{
    double total = 0.0;
    for (int64_t g = 0; g < n; g += SAMPLE_GROUP) {
        vf sum = vf_set(0.0f);
        for (int64_t i = g; i < g + SAMPLE_GROUP && i < n; i += LANES)
            sum += vf_exp((only_finite(load_row(x, i, n)) - high) * scale);
        total += (double)lanes_sum(sum);
    }
    return total;
}

const kernel_table KERNELS = {
    .isa = ISA,
    .linear = &LINEAR,
    .rmsnorm = rmsnorm,
    .rope = rope_rows,
    .store_kv = store_kv,
    .attend = attend,
    .gate = gate_row,
    .add = add,
    .scale = scale_row,
    .group_maxima = group_maxima,
    .exp_sum = exp_sum,
};

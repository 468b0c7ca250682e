/* Matrix products for AVX2: half a tile at a time, by vpmaddubsw, which adds two products of
 * unsigned codes and signed activations in 16 bits and saturates. So as many groups are added in 16
 * bits as the format's largest code allows: 2 * 127 * largest * groups <= 32767. Codes of 8 bits
 * are taken as |w| times (x with the sign of w). */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>

#include "formats.h"

typedef __m256i vint;
typedef __m256 vfloat;

enum { LANES = 8, SIGNED_FROM = 128, MAX_TOKENS = 4, FLOAT_TOKENS = 4, FLOAT_TILES = 4,
       TOKENS_TILES = 1 };

#define vi_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define vi_and _mm256_and_si256
#define vi_or _mm256_or_si256
#define vi_sub8 _mm256_sub_epi8
#define vi_set8(c) _mm256_set1_epi8(c)
#define vi_set16(c) _mm256_set1_epi16(c)
#define vi_set32(c) _mm256_set1_epi32(c)
#define vi_left16(v, n) _mm256_slli_epi16(v, n)
#define vi_right16(v, n) _mm256_srli_epi16(v, n)
#define vi_left32(v, n) _mm256_slli_epi32(v, n)
#define vi_right32(v, n) _mm256_srli_epi32(v, n)
#define vi_add16 _mm256_add_epi16
#define vi_add32 _mm256_add_epi32
#define vi_mul16 _mm256_mullo_epi16
#define vi_madd16 _mm256_madd_epi16
#define vi_table(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p)))
#define vi_lookup(table, i) _mm256_shuffle_epi8(table, i)
#define vi_pairs_u8(p) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define vi_pairs_s8(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define vi_u16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define vf_zero _mm256_setzero_ps
#define vf_load(p) _mm256_loadu_ps((const float *)(p))
#define vf_store(p, v) _mm256_storeu_ps(p, v)
#define vf_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vf_bf16(p) _mm256_castsi256_ps(_mm256_slli_epi32(vi_u16(p), 16))
#define vf_of_i32 _mm256_cvtepi32_ps
#define vf_mul _mm256_mul_ps
#define vf_add _mm256_add_ps
#define vf_fma _mm256_fmadd_ps
#define vf_fnma _mm256_fnmadd_ps

static inline __m256i vi_splat32(const void *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

static inline __m256 vf_splat(const void *p) { return _mm256_castsi256_ps(vi_splat32(p)); }

/* 2^(e-128); e = 0 and 1 are denormals. */
static inline __m256 vf_e8m0(const uint8_t *p)
{
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i denormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(
        _mm256_blendv_epi8(normal, denormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}

/* Four products of group g, added by twos in 16 bits. */
static inline __attribute__((always_inline)) __m256i multiply_group(int kind, const __m256i *w,
                                                                    const int8_t *q, int g)
{
    const __m256i x = vi_splat32(q + 4 * g);
    if (formats[kind].offset == 128)
        return _mm256_maddubs_epi16(_mm256_abs_epi8(w[g]),
                                    _mm256_sign_epi8(x, w[g])); /* |w| <= 128: 2 * 128 * 127 */
    return _mm256_maddubs_epi16(w[g], x);
}

/* Groups whose products fit 16 bits together; the largest codes: 3, 7, 15, 24 or 31, 63, 128. */
static inline __attribute__((always_inline)) int groups_in_16_bits(int kind)
{
    switch (kind) {
    case Q8_0: case IQ4_NL: case IQ4_XS: return 1;
    case Q6_K: return 2;
    case Q5_0: case Q5_1: case Q5_K: case MXFP4: return 4;
    default: return 8;
    }
}

/* s + the products of groups [first, first + n), each multiplied with the int16 `scale` */
static inline __attribute__((always_inline)) __m256i dot_groups(int kind, const __m256i *w,
                                                                const int8_t *q, int first,
                                                                const int n, __m256i scale,
                                                                __m256i s)
{
    const int most = groups_in_16_bits(kind) < n ? groups_in_16_bits(kind) : n;
    for (int g = first; g < first + n; g += most) {
        __m256i sums = multiply_group(kind, w, q, g);
        for (int i = 1; i < most; i++)
            sums = _mm256_add_epi16(sums, multiply_group(kind, w, q, g + i));
        s = _mm256_add_epi32(s, _mm256_madd_epi16(sums, scale));
    }
    return s;
}

static inline __attribute__((always_inline)) __m256i dot(int kind, const __m256i *w,
                                                         const int8_t *q, __m256i s)
{
    return dot_groups(kind, w, q, 0, 8, _mm256_set1_epi16(1), s);
}

typedef struct { __m256i first, second; } sub_scales; /* each twice in an int16 pair */

static inline sub_scales make_sub(int kind, __m256i pairs)
{
    (void)kind;
    return (sub_scales){_mm256_blend_epi16(pairs, _mm256_slli_epi32(pairs, 16), 0xaa),
                        _mm256_blend_epi16(pairs, _mm256_srli_epi32(pairs, 16), 0x55)};
}

static inline __attribute__((always_inline)) __m256i dot_sub(int kind, const __m256i *w,
                                                             const int8_t *q, sub_scales sub,
                                                             __m256i start)
{
    start = dot_groups(kind, w, q, 0, 4, sub.first, start);
    return dot_groups(kind, w, q, 4, 4, sub.second, start);
}

#include "linear_simd.h"

static inline int reduce_add(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static inline uint32_t reduce_max(__m256i v)
{
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* 16 values -> int8, and their sum */
static inline int quantize_half(const float *x, __m256 inverse, int8_t *out)
{
    const __m256 most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
    const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(x), inverse),
                 b = _mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse);
    const __m256i qa = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(a, most), least));
    const __m256i qb = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(b, most), least));
    const __m256i q16 = _mm256_permute4x64_epi64(_mm256_packs_epi32(qa, qb), 0xd8);
    _mm_storeu_si128((__m128i *)out, _mm_packs_epi16(_mm256_castsi256_si128(q16),
                                                     _mm256_extracti128_si256(q16, 1)));
    return reduce_add(_mm256_add_epi32(qa, qb));
}

/* linear_scalar.c says what it computes. */
static void quantize_row(const float *x, int64_t n_cols, void *act)
{
    act_block *out = act;
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < n_cols / 32; i++, out++, x += 32) {
        __m256i largest = _mm256_and_si256(vi_load(x), no_sign);
        for (int j = 1; j < 4; j++)
            largest = _mm256_max_epi32(largest, _mm256_and_si256(vi_load(x + 8 * j), no_sign));
        const float amax = float_of_bits(reduce_max(largest));
        const __m256 inverse = _mm256_set1_ps(amax <= ACT_TINY ? 0.0f : 127.0f / amax);
        const int first = quantize_half(x, inverse, out->q),
                  second = quantize_half(x + 16, inverse, out->q + 16);
        set_act_scales(out, amax, first, second);
    }
}

const linear_table linear_avx2 = {"avx2", quantize_row, linear, linear_dequantize_row};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

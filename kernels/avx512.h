/* The vector operations of decode_simd.h and linear_simd.h in AVX-512; include it where its
 * instructions are allowed. */
#include <immintrin.h>

#include "formats.h"

typedef __m512i vint;
typedef __m512 vfloat;

enum { LANES = 16 };

#define vi_load(p) _mm512_loadu_si512(p)
#define vi_and _mm512_and_si512
#define vi_or _mm512_or_si512
#define vi_sub8 _mm512_sub_epi8
#define vi_set8(c) _mm512_set1_epi8(c)
#define vi_set16(c) _mm512_set1_epi16(c)
#define vi_set32(c) _mm512_set1_epi32(c)
#define vi_left16(v, n) _mm512_slli_epi16(v, n)
#define vi_right16(v, n) _mm512_srli_epi16(v, n)
#define vi_left32(v, n) _mm512_slli_epi32(v, n)
#define vi_right32(v, n) _mm512_srli_epi32(v, n)
#define vi_add16 _mm512_add_epi16
#define vi_add32 _mm512_add_epi32
#define vi_mul16 _mm512_mullo_epi16
#define vi_madd16 _mm512_madd_epi16
#define vi_table(p) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(p)))
#define vi_lookup(table, i) _mm512_shuffle_epi8(table, i)
#define vi_pairs_u8(p) _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define vi_pairs_s8(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define vi_u16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_zero _mm512_setzero_ps
#define vf_load(p) _mm512_loadu_ps(p)
#define vf_store(p, v) _mm512_storeu_ps(p, v)
#define vf_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_bf16(p) _mm512_castsi512_ps(_mm512_slli_epi32(vi_u16(p), 16))
#define vf_of_i32 _mm512_cvtepi32_ps
#define vf_mul _mm512_mul_ps
#define vf_add _mm512_add_ps
#define vf_fma _mm512_fmadd_ps
#define vf_fnma _mm512_fnmadd_ps

static inline __m512i vi_splat32(const void *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

static inline __m512 vf_splat(const void *p) { return _mm512_castsi512_ps(vi_splat32(p)); }

/* 2^(e-128); e = 0 and 1 are denormals. */
static inline __m512 vf_e8m0(const uint8_t *p)
{
    const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __m512i denormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)), denormal));
}

typedef struct { __m512i first, second; } sub_scales;

/* Q2_K, Q3_K: int16 pairs, since a sum over 16 columns fits 16 bits (16 * 7 * 127); Q6_K: an int32
 * for each half. */
static inline sub_scales make_sub(int kind, __m512i pairs)
{
    if (kind != Q6_K)
        return (sub_scales){pairs, pairs};
    return (sub_scales){_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16),
                        _mm512_srai_epi32(pairs, 16)};
}

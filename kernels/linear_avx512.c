/* Matrix products for AVX-512 with VNNI: vpdpbusd multiplies 16 rows x 4 columns of codes
 * (unsigned) with 4 activations. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#include "avx512.h"

enum { SIGNED_FROM = 256 /* never */, MAX_TOKENS = 12, FLOAT_TOKENS = 8, FLOAT_TILES = 4,
       TOKENS_TILES = 2 };

#define DOT(s, w, q, g) s = _mm512_dpbusd_epi32(s, w[g], vi_splat32((q) + 4 * (g)))

static inline __m512i dot(int kind, const __m512i *w, const int8_t *q, __m512i s)
{
    (void)kind;
    __m512i other = _mm512_setzero_si512(); /* two chains are 3 to 5 % faster than one */
    for (int g = 0; g < 4; g++) {
        DOT(s, w, q, g);
        DOT(other, w, q, g + 4);
    }
    return _mm512_add_epi32(s, other);
}

static inline __m512i dot_sub(int kind, const __m512i *w, const int8_t *q, sub_scales sub,
                              __m512i start)
{
    __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
    for (int g = 0; g < 4; g++) {
        DOT(a, w, q, g);
        DOT(b, w, q, g + 4);
    }
    if (kind != Q6_K) {
        const __m512i sums = _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16));
        return _mm512_add_epi32(start, _mm512_madd_epi16(sums, sub.first));
    }
    return _mm512_add_epi32(_mm512_add_epi32(start, _mm512_mullo_epi32(a, sub.first)),
                            _mm512_mullo_epi32(b, sub.second));
}

#include "linear_simd.h"

/* linear_scalar.c says what it computes. */
static void quantize_row(const float *x, int64_t n_cols, void *act)
{
    act_block *out = act;
    const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    for (int64_t i = 0; i < n_cols / 32; i++, out++) {
        __m512 v[2] = {_mm512_loadu_ps(x + 32 * i), _mm512_loadu_ps(x + 32 * i + 16)};
        const __m512i magnitudes = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(v[0])),
                                                    _mm512_castps_si512(_mm512_abs_ps(v[1])));
        const float amax = float_of_bits((uint32_t)_mm512_reduce_max_epi32(magnitudes));
        const __m512 inverse = _mm512_set1_ps(amax <= ACT_TINY ? 0.0f : 127.0f / amax);
        int sums[2];
        for (int half = 0; half < 2; half++) {
            v[half] = _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(v[half], inverse), most), least);
            const __m512i q = _mm512_cvtps_epi32(v[half]);
            _mm_storeu_si128((__m128i *)(out->q + 16 * half), _mm512_cvtepi32_epi8(q));
            sums[half] = _mm512_reduce_add_epi32(q);
        }
        set_act_scales(out, amax, sums[0], sums[1]);
    }
}

const linear_table linear_avx512_vnni = {"avx512_vnni", quantize_row, linear,
                                         linear_dequantize_row};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

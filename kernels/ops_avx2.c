/* 8 lanes: AVX2 with FMA and F16C. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <immintrin.h>
#include <stdint.h>

#define LANES 8
#define SUMS 8
typedef float vf __attribute__((vector_size(32)));

static inline vf vf_set(float x) { return (vf)_mm256_set1_ps(x); }
static inline vf vf_load(const float *x) { return (vf)_mm256_loadu_ps(x); }
static inline void vf_store(float *x, vf v) { _mm256_storeu_ps(x, (__m256)v); }
static inline vf vf_fma(vf a, vf b, vf c)
{
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
static inline vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline float lanes_max(vf v)
{
    const __m256 a = (__m256)v;
    __m128 high = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    high = _mm_max_ps(high, _mm_movehl_ps(high, high));
    return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
}
static inline int vf_any_above(vf a, vf b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
}
static inline vf vf_load_f16(const uint16_t *x)
{
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
static inline void vf_store_f16(uint16_t *x, vf v)
{
    _mm_storeu_si128((__m128i *)x, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

#define ISA "avx2"
#define LINEAR linear_avx2
#define KERNELS kernels_avx2
#include "ops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

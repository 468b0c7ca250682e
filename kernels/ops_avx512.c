/* 16 lanes: AVX-512. On a processor with two FMA units a vf_fma costs half a cycle, a vf_load_f16
 * one. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#include <immintrin.h>
#include <stdint.h>

#define LANES 16
#define SUMS 16
typedef float vf __attribute__((vector_size(64)));

static inline vf vf_set(float x) { return (vf)_mm512_set1_ps(x); }
static inline vf vf_load(const float *x) { return (vf)_mm512_loadu_ps(x); }
static inline void vf_store(float *x, vf v) { _mm512_storeu_ps(x, (__m512)v); }
static inline vf vf_fma(vf a, vf b, vf c)
{
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static inline vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float lanes_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
static inline int vf_any_above(vf a, vf b)
{
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
static inline vf vf_load_f16(const uint16_t *x)
{
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}
static inline void vf_store_f16(uint16_t *x, vf v)
{
    _mm256_storeu_si256((__m256i *)x, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

#define ISA "avx512_vnni"
#define LINEAR linear_avx512_vnni
#define KERNELS kernels_avx512_vnni
#include "ops_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

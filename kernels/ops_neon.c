/* 4 lanes: AArch64, whose every processor has NEON and fused multiply-add. */
#include "linear.h"

#if HAVE_NEON_DOTPROD

#include <arm_neon.h>

#define LANES 4
#define SUMS 16
typedef float vf __attribute__((vector_size(16)));

static inline vf vf_set(float x) { return (vf)vdupq_n_f32(x); }
static inline vf vf_load(const float *x) { return (vf)vld1q_f32(x); }
static inline void vf_store(float *x, vf v) { vst1q_f32(x, (float32x4_t)v); }
static inline vf vf_fma(vf a, vf b, vf c)
{
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
/* a where it is above b: of a NaN and a number it is b, which FMAX would not be */
static inline vf vf_max(vf a, vf b)
{
    return (vf)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a,
                         (float32x4_t)b);
}
static inline float lanes_max(vf v) { return vmaxvq_f32((float32x4_t)v); }
static inline int vf_any_above(vf a, vf b)
{
    return vmaxvq_u32(vcgtq_f32((float32x4_t)a, (float32x4_t)b)) != 0;
}
static inline vf vf_load_f16(const uint16_t *x)
{
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
}
static inline void vf_store_f16(uint16_t *x, vf v)
{
    vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}

#define ISA "neon_dotprod"
#define LINEAR linear_neon_dotprod
#define KERNELS kernels_neon_dotprod
#include "ops_impl.h"

#endif

/* Matrix products for AArch64 with SDOT: a quarter of a tile at a time, four rows of four columns
 * in a register of 128 bits. SDOT takes the four activations of a group from any lane, so 32 of
 * them are two registers. Codes are made signed, less their offset: that is once for all tokens. */
#include "linear.h"

#if HAVE_NEON_DOTPROD

#if !defined(__ARM_FEATURE_DOTPROD)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#endif

#include <arm_neon.h>

#include "formats.h"

typedef int32x4_t vint;
typedef float32x4_t vfloat;

/* Of 32 registers a tile of 8 tokens takes 8 for its sums and 8 for its codes; with 12 a token
 * needs as many instructions (22 for a block of Q4_0, by GCC 12), more of them spills. */
enum { LANES = 4, SIGNED_FROM = 1, MAX_TOKENS = 8, FLOAT_TOKENS = 4, FLOAT_TILES = 4,
       TOKENS_TILES = 1 };

#define vi_load(p) vreinterpretq_s32_u8(vld1q_u8(p))
#define vi_and vandq_s32
#define vi_or vorrq_s32
#define vi_sub8(a, b) ((vint)vsubq_s8((int8x16_t)(a), (int8x16_t)(b)))
#define vi_set8(c) ((vint)vdupq_n_s8(c))
#define vi_set16(c) ((vint)vdupq_n_s16(c))
#define vi_set32(c) vdupq_n_s32(c)
#define vi_left16(v, n) ((vint)vshlq_n_u16((uint16x8_t)(v), n))
#define vi_right16(v, n) ((vint)vshrq_n_u16((uint16x8_t)(v), n))
#define vi_left32(v, n) ((vint)vshlq_n_u32((uint32x4_t)(v), n))
#define vi_right32(v, n) ((vint)vshrq_n_u32((uint32x4_t)(v), n))
#define vi_add16(a, b) ((vint)vaddq_s16((int16x8_t)(a), (int16x8_t)(b)))
#define vi_add32 vaddq_s32
#define vi_mul16(a, b) ((vint)vmulq_s16((int16x8_t)(a), (int16x8_t)(b)))
#define vi_table(p) vi_load(p)
#define vi_lookup(table, i) ((vint)vqtbl1q_u8((uint8x16_t)(table), (uint8x16_t)(i)))
#define vi_pairs_u8(p) ((vint)vmovl_u8(vld1_u8(p)))
#define vi_pairs_s8(p) ((vint)vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))))
#define vi_u16(p) ((vint)vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))))
#define vf_zero() vdupq_n_f32(0.0f)
#define vf_load(p) vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(p)))
#define vf_store vst1q_f32
#define vf_f16(p) vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)))
#define vf_bf16(p) ((vfloat)vi_left32(vi_u16(p), 16))
#define vf_of_i32 vcvtq_f32_s32
#define vf_mul vmulq_f32
#define vf_add vaddq_f32
#define vf_fma(a, b, c) vfmaq_f32(c, a, b)
#define vf_fnma(a, b, c) vfmsq_f32(c, a, b)

static inline int32x4_t vi_splat32(const void *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return vdupq_n_s32(v);
}

static inline float32x4_t vf_splat(const void *p) { return (float32x4_t)vi_splat32(p); }

static inline int32x4_t vi_madd16(int32x4_t a, int32x4_t b)
{
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}

/* 2^(e-128); e = 0 and 1 are denormals. */
static inline float32x4_t vf_e8m0(const uint8_t *p)
{
    const float e[LANES] = {float_of_e8m0_half(p[0]), float_of_e8m0_half(p[1]),
                            float_of_e8m0_half(p[2]), float_of_e8m0_half(p[3])};
    return vld1q_f32(e);
}

/* s + the products of four groups with 16 activations */
#define DOT4(s, w, x) \
    vdotq_laneq_s32(vdotq_laneq_s32(vdotq_laneq_s32(vdotq_laneq_s32( \
        s, (int8x16_t)(w)[0], x, 0), (int8x16_t)(w)[1], x, 1), (int8x16_t)(w)[2], x, 2), \
        (int8x16_t)(w)[3], x, 3)

static inline int32x4_t dot(int kind, const int32x4_t *w, const int8_t *q, int32x4_t s)
{
    (void)kind;
    const int8x16_t first = vld1q_s8(q), second = vld1q_s8(q + 16);
    return DOT4(DOT4(s, w, first), w + 4, second);
}

typedef struct { int32x4_t first, second; } sub_scales;

static inline sub_scales make_sub(int kind, int32x4_t pairs)
{
    (void)kind;
    return (sub_scales){vshrq_n_s32(vshlq_n_s32(pairs, 16), 16), vshrq_n_s32(pairs, 16)};
}

static inline int32x4_t dot_sub(int kind, const int32x4_t *w, const int8_t *q, sub_scales sub,
                                int32x4_t s)
{
    (void)kind;
    const int32x4_t none = vdupq_n_s32(0);
    s = vmlaq_s32(s, DOT4(none, w, vld1q_s8(q)), sub.first);
    return vmlaq_s32(s, DOT4(none, w + 4, vld1q_s8(q + 16)), sub.second);
}

#include "linear_simd.h"

/* 16 values -> int8, and their sum; what is no number becomes 127 */
static inline int quantize_half(const float *x, float inverse, int8_t *out)
{
    const float32x4_t most = vdupq_n_f32(127.0f), least = vdupq_n_f32(-127.0f);
    int32x4_t q[4];
    for (int i = 0; i < 4; i++)
        q[i] = vcvtnq_s32_f32(vmaxnmq_f32(
            vminnmq_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), inverse), most), least));
    const int16x8_t low = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1])),
                    high = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
    vst1q_s8(out, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
    return vaddvq_s16(vaddq_s16(low, high));
}

/* linear_scalar.c says what it computes. */
static void quantize_row(const float *x, int64_t n_cols, void *act)
{
    act_block *out = act;
    for (int64_t i = 0; i < n_cols / 32; i++, out++, x += 32) {
        uint32x4_t largest = vdupq_n_u32(0);
        for (int j = 0; j < 8; j++)
            largest = vmaxq_u32(largest, (uint32x4_t)vabsq_f32(vld1q_f32(x + 4 * j)));
        const float amax = float_of_bits(vmaxvq_u32(largest));
        const float inverse = amax <= ACT_TINY ? 0.0f : 127.0f / amax;
        const int first = quantize_half(x, inverse, out->q),
                  second = quantize_half(x + 16, inverse, out->q + 16);
        set_act_scales(out, amax, first, second);
    }
}

const linear_table linear_neon_dotprod = {"neon_dotprod", quantize_row, linear,
                                          linear_dequantize_row};

#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
#pragma clang attribute pop
#endif

#endif

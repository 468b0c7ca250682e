/* 4 lanes of portable C: what every processor has. The vector type is the compiler's own; no
 * instruction is named. */
#include <stdint.h>
#include <string.h>

#include "formats.h"

#define LANES 4
#define SUMS 8
typedef float vf __attribute__((vector_size(16)));

static inline vf vf_set(float x) { return (vf){x, x, x, x}; }

static inline vf vf_load(const float *x)
{
    vf v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline void vf_store(float *x, vf v) { memcpy(x, &v, sizeof v); }
static inline vf vf_fma(vf a, vf b, vf c)
{
    return a * b + c;
} /* rounded twice: fmaf without the instruction is slow */

static inline vf vf_max(vf a, vf b)
{
    typedef int32_t mask __attribute__((vector_size(16)));
    const mask above = (mask)(a > b);
    return (vf)(((mask)a & above) | ((mask)b & ~above));
}

static inline float lanes_max(vf v)
{
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}

static inline int vf_any_above(vf a, vf b)
{
    return (a[0] > b[0]) | (a[1] > b[1]) | (a[2] > b[2]) | (a[3] > b[3]);
}

static inline vf vf_load_f16(const uint16_t *x)
{
    return (vf){float_of_f16(x[0]), float_of_f16(x[1]), float_of_f16(x[2]), float_of_f16(x[3])};
}

static inline void vf_store_f16(uint16_t *x, vf v)
{
    for (int i = 0; i < LANES; i++)
        x[i] = f16_of_float(v[i]);
}

#define ISA "scalar"
#define LINEAR linear_scalar
#define KERNELS kernels_scalar
#include "ops_impl.h"

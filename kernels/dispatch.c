/* Which instruction sets this processor and its operating system have, asked once. */
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* NOTE: __builtin_cpu_supports also asks whether the operating system saves the wide registers
 * (xgetbv). */
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static int has_avx512_vnni(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

const kernel_table *const *kernel_tables(void)
{
    static const kernel_table *tables[4]; /* called with the GIL held, so once at a time */
    int n = 0;
    tables[n++] = &kernels_scalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_avx2())
        tables[n++] = &kernels_avx2;
    if (has_avx512_vnni())
        tables[n++] = &kernels_avx512_vnni;
#endif
    tables[n] = NULL;
    return tables;
}

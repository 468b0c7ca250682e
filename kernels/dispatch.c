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

#if HAVE_NEON_DOTPROD
#if defined(__linux__)
#include <sys/auxv.h>

static int has_dotprod(void)
{
    enum { ASIMDDP = 1 << 20 }; /* HWCAP_ASIMDDP, which older headers do not have */
    return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int has_dotprod(void)
{
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
}
#else
static int has_dotprod(void) { return 0; }
#endif
#endif

#if HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Leaf 7 of cpuid, edx. Linux has a process ask before it uses the tiles: it then keeps room for
 * them wherever it saves registers. Source: Linux, Documentation/arch/x86/xstate.rst */
enum { AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25, ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };

static int has_amx(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_TILE) && (d & AMX_INT8) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

/* All but the matrix products is as for AVX-512. */
static const kernel_table *amx_table(void)
{
    static kernel_table table;
    table = kernels_avx512_vnni;
    table.isa = linear_amx.isa;
    table.linear = &linear_amx;
    return &table;
}
#endif

const kernel_table *const *kernel_tables(void)
{
    static const kernel_table *tables[5]; /* called with the GIL held, so once at a time */
    int n = 0;
    tables[n++] = &kernels_scalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_avx2())
        tables[n++] = &kernels_avx2;
    if (has_avx512_vnni())
        tables[n++] = &kernels_avx512_vnni;
#if HAVE_AMX
    if (has_avx512_vnni() && has_amx())
        tables[n++] = amx_table();
#endif
#endif
#if HAVE_NEON_DOTPROD
    if (has_dotprod())
        tables[n++] = &kernels_neon_dotprod;
#endif
    tables[n] = NULL;
    return tables;
}

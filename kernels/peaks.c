/* How many multiply-adds a processor does in registers alone, per instruction set: what the speed
 * of the matrix products is held against. */
#include <string.h>

#include "kernels.h"

/* Chains that do not wait for one another: enough to hide an instruction's latency in all units. */
#define CHAINS 12

#define CHAIN(i, code, c, ...) __asm__ volatile(code : "+" c(sums[i]) : c(factor) : __VA_ARGS__)

/* double name(int64_t rounds) -> operations done, a product and a sum counting as two. code adds to
 * %0 what it makes of %1, `products` of them. */
#define PEAK(name, isa, type, c, products, code, ...) \
    __attribute__((target(isa))) static double name(int64_t rounds) \
    { \
        type factor = {0}, sums[CHAINS] = {factor}; \
        for (int64_t i = 0; i < rounds; i++) { \
            CHAIN(0, code, c, __VA_ARGS__); \
            CHAIN(1, code, c, __VA_ARGS__); \
            CHAIN(2, code, c, __VA_ARGS__); \
            CHAIN(3, code, c, __VA_ARGS__); \
            CHAIN(4, code, c, __VA_ARGS__); \
            CHAIN(5, code, c, __VA_ARGS__); \
            CHAIN(6, code, c, __VA_ARGS__); \
            CHAIN(7, code, c, __VA_ARGS__); \
            CHAIN(8, code, c, __VA_ARGS__); \
            CHAIN(9, code, c, __VA_ARGS__); \
            CHAIN(10, code, c, __VA_ARGS__); \
            CHAIN(11, code, c, __VA_ARGS__); \
        } \
        return 2.0 * CHAINS * (products) * (double)rounds; \
    }

#if defined(__x86_64__)
#include <immintrin.h>

PEAK(avx2_float, "avx2,fma", __m256, "x", 8, "vfmadd231ps %1, %1, %0", "memory")
/* AVX2 needs three instructions for 32 products */
PEAK(avx2_int8, "avx2", __m256i, "x", 32,
     "vpmaddubsw %1, %1, %%ymm15\n\tvpmaddwd %1, %%ymm15, %%ymm15\n\tvpaddd %%ymm15, %0, %0",
     "xmm15")
PEAK(avx512_float, "avx512f", __m512, "v", 16, "vfmadd231ps %1, %1, %0", "memory")
PEAK(avx512_int8, "avx512f,avx512vnni", __m512i, "v", 64, "vpdpbusd %1, %1, %0", "memory")
#endif

#if HAVE_NEON_DOTPROD
#include <arm_neon.h>

PEAK(neon_float, "arch=armv8.2-a+dotprod", float32x4_t, "w", 4, "fmla %0.4s, %1.4s, %1.4s",
     "memory")
PEAK(neon_int8, "arch=armv8.2-a+dotprod", int32x4_t, "w", 16, "sdot %0.4s, %1.16b, %1.16b",
     "memory")
#endif

#if HAVE_AMX
/* Four tiles of sums, 16 x 16 x 64 products each */
__attribute__((target("amx-tile,amx-int8"))) static double amx_int8(int64_t rounds)
{
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1,
                .row_bytes = {64, 64, 64, 64, 64, 64},
                .rows = {16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    for (int64_t i = 0; i < rounds; i++)
        __asm__ volatile("tdpbssd %tmm4, %tmm5, %tmm0\n\ttdpbssd %tmm4, %tmm5, %tmm1\n\t"
                         "tdpbssd %tmm4, %tmm5, %tmm2\n\ttdpbssd %tmm4, %tmm5, %tmm3");
    __asm__ volatile("tilerelease");
    return 2.0 * 4 * 16 * 16 * 64 * (double)rounds;
}
#endif

static const struct {
    const char *isa;
    double (*int8)(int64_t), (*floats)(int64_t);
} peaks[] = {
#if defined(__x86_64__)
    {"avx2", avx2_int8, avx2_float},
    {"avx512_vnni", avx512_int8, avx512_float},
#endif
#if HAVE_AMX
    {"amx_int8", amx_int8, avx512_float},
#endif
#if HAVE_NEON_DOTPROD
    {"neon_dotprod", neon_int8, neon_float},
#endif
    {NULL, NULL, NULL},
};

double multiply_adds(const char *isa, int is_int8, int64_t rounds)
{
    for (int i = 0; peaks[i].isa; i++)
        if (strcmp(peaks[i].isa, isa) == 0)
            return (is_int8 ? peaks[i].int8 : peaks[i].floats)(rounds);
    return 0;
}

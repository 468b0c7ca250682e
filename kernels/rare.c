/* The rare formats, which no product reads: IQ1, IQ2, IQ3 and TQ become Q8_0 at load.
 *
 * All are blocks of 256 weights, scale * code, with a scale for each 32 or 16 weights and codes of
 * at most 62, mostly looked up in a grid. Where one scale holds for 32 the codes stay as they are,
 * and only the scale is rounded to float16; where two do, the 32 weights are quantised again.
 * Layouts: ggml-org/ggml: src/ggml-common.h, gguf-py/gguf/quants.py.
 */
#include <math.h>

#include "formats.h"

typedef struct {
    int8_t codes[256];
    float scales[16]; /* of 16 codes each */
} rare_block;

static float f16_at(const uint8_t *p) { return float_of_f16(read_u16(p, 0)); }

static int nibble(const uint8_t *p, int i) { return p[i / 2] >> 4 * (i % 2) & 15; }

/* Seven signs are stored; the eighth makes their number even. */
static unsigned eight_signs(unsigned seven)
{
    seven &= 127;
    return seven | (unsigned)(__builtin_popcount(seven) & 1) << 7;
}

/* 8 codes, bit i of signs negates the i-th: its byte becomes 255 - code, and 1 is added. Codes are
 * 1 at least, so nothing is carried. */
static void put_signed(uint64_t grid, unsigned signs, int8_t *codes)
{
    const uint64_t ones = 0x0101010101010101u;
    const uint64_t bits = (signs & 255) * ones & 0x8040201008040201u;
    const uint64_t negative = ((bits + 0x7f * ones) | bits) >> 7 & ones;
    grid = (grid ^ negative * 255) + negative;
    memcpy(codes, &grid, 8);
}

static uint64_t eight_at(const int8_t *grid, int index)
{
    uint64_t v;
    memcpy(&v, grid + 8 * index, 8);
    return v;
}

static uint64_t four_and_four_at(const int8_t *grid, int first, int second)
{
    return read_u32((const uint8_t *)grid, first) |
           (uint64_t)read_u32((const uint8_t *)grid, second) << 32;
}

static void put_scale32(rare_block *b, int i, float scale)
{
    b->scales[2 * i] = b->scales[2 * i + 1] = scale;
}

/* d f16 | 8 of: 4 grid indices u8 | u32: 4 times 7 signs, 4 bits of scale */
static void unpack_iq2_xxs(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    for (int i = 0; i < 8; i++) {
        const uint8_t *at = p + 2 + 8 * i;
        const uint32_t word = read_u32(at, 1);
        put_scale32(b, i, d * (0.5f + (float)(word >> 28)) * 0.25f);
        for (int j = 0; j < 4; j++)
            put_signed(eight_at(grid, at[j]), eight_signs(word >> 7 * j),
                       b->codes + 32 * i + 8 * j);
    }
}

/* d f16 | 32 of u16: 9 bits of index, 7 signs | 16 nibbles of scale */
static void unpack_iq2_xs(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    for (int i = 0; i < 32; i++) {
        const unsigned q = read_u16(p + 2, i);
        put_signed(eight_at(grid, q & 511), eight_signs(q >> 9), b->codes + 8 * i);
    }
    for (int i = 0; i < 16; i++)
        b->scales[i] = d * (0.5f + (float)nibble(p + 66, i)) * 0.25f;
}

/* d f16 | 32 low bytes of index | 32 signs of 8 | 32 times 2 high bits | 16 nibbles of scale */
static void unpack_iq2_s(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    const uint8_t *low = p + 2, *signs = p + 34, *high = p + 66;
    for (int i = 0; i < 32; i++) {
        const int index = low[i] | (high[i / 4] >> 2 * (i % 4) & 3) << 8;
        put_signed(eight_at(grid, index), signs[i], b->codes + 8 * i);
    }
    for (int i = 0; i < 16; i++)
        b->scales[i] = d * (0.5f + (float)nibble(p + 74, i)) * 0.25f;
}

/* d f16 | 64 grid indices u8 | 8 of u32: 4 times 7 signs, 4 bits of scale */
static void unpack_iq3_xxs(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    for (int i = 0; i < 8; i++) {
        const uint32_t word = read_u32(p + 66, i);
        put_scale32(b, i, d * (0.5f + (float)(word >> 28)) * 0.5f);
        for (int j = 0; j < 4; j++) {
            const uint8_t *at = p + 2 + 8 * i + 2 * j;
            put_signed(four_and_four_at(grid, at[0], at[1]), eight_signs(word >> 7 * j),
                       b->codes + 32 * i + 8 * j);
        }
    }
}

/* d f16 | 64 low bytes of index | 64 high bits | 32 signs of 8 | 8 nibbles of scale */
static void unpack_iq3_s(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    const uint8_t *low = p + 2, *high = p + 66, *signs = p + 74;
    for (int i = 0; i < 32; i++) {
        const int bits = high[i / 4] >> 2 * (i % 4), first = low[2 * i] | (bits & 1) << 8,
                  second = low[2 * i + 1] | (bits & 2) << 7;
        put_signed(four_and_four_at(grid, first, second), signs[i], b->codes + 8 * i);
    }
    for (int i = 0; i < 8; i++)
        put_scale32(b, i, d * (float)(1 + 2 * nibble(p + 106, i)));
}

/* grid -1, 0, 1, and an eighth more or less: codes in eighths */
static void put_eighths(const int8_t *grid, int is_less, int8_t *codes)
{
    for (int i = 0; i < 8; i++)
        codes[i] = (int8_t)(8 * grid[i] + (is_less ? -1 : 1));
}

/* d f16 | 32 low bytes of index | 8 of u16: 4 times 3 high bits, 3 bits of scale, sign of delta */
static void unpack_iq1_s(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const float d = f16_at(p);
    for (int i = 0; i < 8; i++) {
        const unsigned q = read_u16(p + 34, i);
        put_scale32(b, i, d * (float)(2 * (q >> 12 & 7) + 1) * 0.125f);
        for (int j = 0; j < 4; j++)
            put_eighths(grid + 8 * (p[2 + 4 * i + j] | (q >> 3 * j & 7) << 8), q >> 15,
                        b->codes + 32 * i + 8 * j);
    }
}

/* 32 low bytes of index | 32 nibbles: 3 high bits, sign of delta | 4 of u16: 4 times 3 bits of
 * scale, 4 bits of d f16 */
static void unpack_iq1_m(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    const uint8_t *scales = p + 48;
    unsigned bits = 0;
    for (int i = 0; i < 4; i++)
        bits |= (unsigned)(read_u16(scales, i) >> 12) << 4 * i;
    const float d = float_of_f16((uint16_t)bits);
    for (int i = 0; i < 32; i++) {
        const int q = nibble(p + 32, i);
        put_eighths(grid + 8 * (p[i] | (q & 7) << 8), q >> 3, b->codes + 8 * i);
    }
    for (int i = 0; i < 16; i++)
        b->scales[i] =
            d * (float)(2 * (read_u16(scales, i / 4) >> 3 * (i % 4) & 7) + 1) * 0.125f;
}

/* n bytes of base 3 digits, the first digits of all, then the second of all */
static void put_digits(const uint8_t *p, int n, int n_digits, int8_t *codes)
{
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    for (int digit = 0; digit < n_digits; digit++)
        for (int i = 0; i < n; i++)
            *codes++ = (int8_t)(((uint8_t)(p[i] * power[digit]) * 3 >> 8) - 1);
}

/* 32, then 16 bytes of 5 digits | 4 bytes of 4 digits | d f16 */
static void unpack_tq1_0(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    (void)grid;
    put_digits(p, 32, 5, b->codes);
    put_digits(p + 32, 16, 5, b->codes + 160);
    put_digits(p + 48, 4, 4, b->codes + 240);
    for (int i = 0; i < 8; i++)
        put_scale32(b, i, f16_at(p + 52));
}

/* 2 of 32 bytes: 4 times 2 bits | d f16 */
static void unpack_tq2_0(const uint8_t *p, const int8_t *grid, rare_block *b)
{
    (void)grid;
    for (int i = 0; i < 256; i++)
        b->codes[i] = (int8_t)((p[32 * (i / 128) + i % 32] >> 2 * (i / 32 % 4) & 3) - 1);
    for (int i = 0; i < 8; i++)
        put_scale32(b, i, f16_at(p + 64));
}

/* ---- to Q8_0 ---- */

/* 32 weights of two scales: the largest becomes 127. */
static void quantize_again(const int8_t *codes, const float *scales, block_q8_0 *out)
{
    float weights[32], high = 0.0f;
    for (int i = 0; i < 32; i++) {
        weights[i] = scales[i / 16] * (float)codes[i];
        high = fabsf(weights[i]) > high ? fabsf(weights[i]) : high;
    }
    out->d = f16_of_float(high / 127.0f);
    const float d = float_of_f16(out->d), inverse = d > 0.0f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; i++) {
        float code = weights[i] * inverse;
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        out->qs[i] = (int8_t)(code + (code < 0.0f ? -0.5f : 0.5f));
    }
}

static void to_q8_0(const rare_block *b, block_q8_0 *out)
{
    for (int i = 0; i < 8; i++, out++) {
        const float *scales = b->scales + 2 * i;
        const int8_t *codes = b->codes + 32 * i;
        const float both = scales[0] + scales[1];
        if (scales[0] != scales[1] && isfinite(both)) {
            quantize_again(codes, scales, out);
            continue;
        }
        out->d = f16_of_float(isfinite(both) ? scales[0] : both); /* not finite: it stays so */
        memcpy(out->qs, codes, 32);
    }
}

static const struct {
    int32_t qtype, block_bytes, grid_bytes;
    void (*unpack)(const uint8_t *p, const int8_t *grid, rare_block *b);
} rare_formats[] = {
    {16, 66, 256 * 8, unpack_iq2_xxs}, {17, 74, 512 * 8, unpack_iq2_xs},
    {18, 98, 256 * 4, unpack_iq3_xxs}, {19, 50, 2048 * 8, unpack_iq1_s},
    {21, 110, 512 * 4, unpack_iq3_s},  {22, 82, 1024 * 8, unpack_iq2_s},
    {29, 56, 2048 * 8, unpack_iq1_m},  {34, 54, 0, unpack_tq1_0},
    {35, 66, 0, unpack_tq2_0},
};

static int rare_format(int32_t qtype)
{
    for (int i = 0; i < (int)(sizeof rare_formats / sizeof *rare_formats); i++)
        if (rare_formats[i].qtype == qtype)
            return i;
    return -1;
}

int rare_block_bytes(int32_t qtype)
{
    const int i = rare_format(qtype);
    return i < 0 ? 0 : rare_formats[i].block_bytes;
}

int rare_grid_bytes(int32_t qtype)
{
    const int i = rare_format(qtype);
    return i < 0 ? 0 : rare_formats[i].grid_bytes;
}

void rare_to_q8_0(int32_t qtype, const int8_t *grid, const uint8_t *src, int64_t n_blocks,
                  uint8_t *out)
{
    const int format = rare_format(qtype);
    rare_block block;
    block_q8_0 packed[8];
    for (int64_t i = 0; i < n_blocks; i++) {
        rare_formats[format].unpack(src + i * rare_formats[format].block_bytes, grid, &block);
        to_q8_0(&block, packed);
        memcpy(out + i * (int64_t)sizeof packed, packed, sizeof packed);
    }
}

/* Block formats: as the file has them, and as a packed tile has them.
 *
 * A packed matrix is ceil(N/16) tiles. A tile holds 16 rows, first all scales, then all codes (two
 * planes, each rounded up to 64 bytes), at the bits per weight of the file. Scales stand first so
 * that who reads a tile from memory in one stream has them when the first codes come.
 *
 * Codes come in blocks of 32 columns. A block is 8 groups of 4 columns; a group is a vector of 64
 * bytes, byte 4 * row + (k % 4): what one vpdpbusd multiplies with 4 activations. Groups are stored
 * by bit planes:
 *   nibbles   4 vectors; vector j has group j in its low and group j+4 in its high nibbles
 *   twos      2 vectors; vector j has group 4j+i in bits 2i, 2i+1 of each byte
 *   ones      1 vector; group g in bit g of each byte
 *   bytes     8 vectors, group after group
 * Codes are unsigned; a weight is scale * (code - offset), scale * code + min, or
 * scale * table[code].
 */
#ifndef TINYCHAT_FORMATS_H
#define TINYCHAT_FORMATS_H

#include <stdint.h>
#include <string.h>

#include "linear.h"

/* The file's blocks. d, m, dmin: float16. Columns of a 256-column block: b = k / 32, s = k / 16,
 * l = k % 32. */

/* low nibbles k < 16, high k >= 16; w = d * (q - 8) */
typedef struct { uint16_t d; uint8_t qs[16]; } block_q4_0;

/* w = d * q + m */
typedef struct { uint16_t d, m; uint8_t qs[16]; } block_q4_1;

/* bit k of qh is bit 4 of q; w = d * (q - 16) */
typedef struct { uint16_t d; uint8_t qh[4], qs[16]; } block_q5_0;

/* w = d * q + m */
typedef struct { uint16_t d, m; uint8_t qh[4], qs[16]; } block_q5_1;

/* w = d * q */
typedef struct { uint16_t d; int8_t qs[32]; } block_q8_0;

/* w = 2^(e-128) * table[q]: the table is E2M1 doubled */
typedef struct { uint8_t e, qs[16]; } block_mxfp4;

/* w = d * table[q] */
typedef block_q4_0 block_iq4_nl;

/* q: bits 2(b%4) of qs[32(b/4) + l]; scales[s]: low nibble scale, high min;
 * w = d*scale*q - dmin*min */
typedef struct { uint8_t scales[16], qs[64]; uint16_t d, dmin; } block_q2_k;

/* as q2_k, bit b of hmask[l] is bit 2 of q; 6-bit scales less 32; w = d*scale*(q - 4) */
typedef struct { uint8_t hmask[32], qs[64], scales[12]; uint16_t d; } block_q3_k;

/* q: nibble b%2 of qs[32(b/2) + l]; 6-bit scales and mins, one per b; w = d*scale*q - dmin*min */
typedef struct { uint16_t d, dmin; uint8_t scales[12], qs[128]; } block_q4_k;

/* as q4_k, bit b of qh[l] is bit 4 of q */
typedef struct { uint16_t d, dmin; uint8_t scales[12], qh[32], qs[128]; } block_q5_k;

/* q: low nibble (b/2)%2 of ql[64(b/4) + 32(b%2) + l], above it bits 2(b%4) of qh[32(b/4) + l];
 * w = d*scales[s]*(q - 32) */
typedef struct { uint8_t ql[128], qh[64]; int8_t scales[16]; uint16_t d; } block_q6_k;

/* qs per b as q4_0; scale: nibble b of scales_l, bits 2b of scales_h above it, less 32;
 * w = d*scale*table[q] */
typedef struct { uint16_t d, scales_h; uint8_t scales_l[4], qs[128]; } block_iq4_xs;

_Static_assert(sizeof(block_q4_0) == 18, "q4_0 is a file format");
_Static_assert(sizeof(block_q4_1) == 20, "q4_1 is a file format");
_Static_assert(sizeof(block_q5_0) == 22, "q5_0 is a file format");
_Static_assert(sizeof(block_q5_1) == 24, "q5_1 is a file format");
_Static_assert(sizeof(block_q8_0) == 34, "q8_0 is a file format");
_Static_assert(sizeof(block_mxfp4) == 17, "mxfp4 is a file format");
_Static_assert(sizeof(block_q2_k) == 84, "q2_k is a file format");
_Static_assert(sizeof(block_q3_k) == 110, "q3_k is a file format");
_Static_assert(sizeof(block_q4_k) == 144, "q4_k is a file format");
_Static_assert(sizeof(block_q5_k) == 176, "q5_k is a file format");
_Static_assert(sizeof(block_q6_k) == 210, "q6_k is a file format");
_Static_assert(sizeof(block_iq4_xs) == 136, "iq4_xs is a file format");

/* The packed kinds, one per source format. The kernels are instantiated from these two lists. */
#define BLOCK_KINDS(X) \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
    X(IQ4_NL) X(IQ4_XS) X(MXFP4)
#define FLOAT_KINDS(X) X(F32) X(F16) X(BF16)

#define KIND_NAME(K) K,
enum { BLOCK_KINDS(KIND_NAME) FLOAT_KINDS(KIND_NAME) N_KINDS };
#undef KIND_NAME

/* How a weight is made of its code. The sub-scales are integers, one for each 16 columns. */
enum {
    FORM_OFFSET,  /* scale * (code - offset) */
    FORM_MIN,     /* scale * code + min */
    FORM_SUB,     /* d * sub * (code - offset) */
    FORM_SUB_MIN, /* d * sub * code - dmin * sub_min */
    FORM_FLOAT,
};

typedef struct {
    int16_t qtype;        /* GGUF number */
    int16_t file_cols;    /* columns of a file block */
    int16_t file_bytes;   /* bytes of a file block */
    int16_t code_bytes;   /* packed codes of 16 rows x 32 columns; float kinds: x 1 column */
    int16_t scale_bytes;  /* packed scales of 16 rows x file_cols */
    int16_t form;
    int16_t offset;       /* code that means 0 */
} format_traits;

/* Scales of 16 rows, by file block; last come f16 d[16] and, where there is one, f16 m[16] (min or
 * dmin).
 *   Q4_K Q5_K  u32 low_scale[16], low_min[16], high[16] (scales6), d, dmin
 *   Q3_K       the same with the scales of the first and the second half of each block, d
 *   Q2_K       u8 [8][16][2]: block, row, half; low nibble scale, high min; d, dmin
 *   Q6_K       i8 [8][16][2], d
 *   IQ4_XS     u32 low[16], u16 high[16], d
 *   MXFP4      u8 e[16] and no d
 * scales6: nibble b of low_scale and above it bits 4b, 4b+1 of high make the first number of block
 * b; nibble b of low_min and bits 4b+2, 4b+3 the second.
 */
static const format_traits formats[N_KINDS] = {
    [Q4_0] = {2, 32, sizeof(block_q4_0), 256, 32, FORM_OFFSET, 8},
    [Q4_1] = {3, 32, sizeof(block_q4_1), 256, 64, FORM_MIN, 0},
    [Q5_0] = {6, 32, sizeof(block_q5_0), 320, 32, FORM_OFFSET, 16},
    [Q5_1] = {7, 32, sizeof(block_q5_1), 320, 64, FORM_MIN, 0},
    [Q8_0] = {8, 32, sizeof(block_q8_0), 512, 32, FORM_OFFSET, 128},
    [Q2_K] = {10, 256, sizeof(block_q2_k), 128, 256 + 64, FORM_SUB_MIN, 0},
    [Q3_K] = {11, 256, sizeof(block_q3_k), 192, 192 + 32, FORM_SUB, 4},
    [Q4_K] = {12, 256, sizeof(block_q4_k), 256, 192 + 64, FORM_MIN, 0},
    [Q5_K] = {13, 256, sizeof(block_q5_k), 320, 192 + 64, FORM_MIN, 0},
    [Q6_K] = {14, 256, sizeof(block_q6_k), 384, 256 + 32, FORM_SUB, 32},
    [IQ4_NL] = {20, 32, sizeof(block_iq4_nl), 256, 32, FORM_OFFSET, 128},
    [IQ4_XS] = {23, 256, sizeof(block_iq4_xs), 256, 96 + 32, FORM_OFFSET, 128},
    [MXFP4] = {39, 32, sizeof(block_mxfp4), 256, 16, FORM_OFFSET, 12},
    [F32] = {0, 1, 4, 64, 0, FORM_FLOAT, 0},
    [F16] = {1, 1, 2, 32, 0, FORM_FLOAT, 0},
    [BF16] = {30, 1, 2, 32, 0, FORM_FLOAT, 0},
};

/* Where d[16] stands in a scale group; m[16] follows. */
static inline int d_at(int kind)
{
    int has_m = formats[kind].form == FORM_MIN || formats[kind].form == FORM_SUB_MIN;
    return formats[kind].scale_bytes - (has_m ? 64 : 32);
}

/* Values of the table kinds plus their offset: codes that a dot product can take. */
static const uint8_t iq4_table[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                      129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t mxfp4_table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* One quantized activation row: a block for each 32 columns.
 * Tried: quantizing the remainder x - d * q of the 6 to 12 % of blocks whose d is over twice the
 * row's mean, and multiplying those twice: SmolLM2's logits err half as much (rms 0.07 against
 * 0.14), for 20 % of the speed. */
typedef struct {
    int8_t q[32];      /* x = d * q, |q| <= 127 */
    float d;
    float d_sum;       /* d * (sum of q): what a min is multiplied with */
    int16_t sum16[2];  /* sums of q over each half: what an offset is multiplied with */
} act_block;

_Static_assert(sizeof(act_block) == 44, "a row of activations has no holes");

/* Below this a block of activations counts as zero: 127 / amax must stay finite. */
#define ACT_TINY 1e-30f

/* What a block's q are scaled with; first, second: the sums of its halves */
static inline void set_act_scales(act_block *out, float amax, int first, int second)
{
    out->d = amax <= ACT_TINY ? 0.0f : amax / 127.0f;
    out->d_sum = out->d * (float)(first + second);
    out->sum16[0] = (int16_t)first;
    out->sum16[1] = (int16_t)second;
}

/* The slot `dequantize_row` of every table. */
void linear_dequantize_row(int32_t qtype, const uint8_t *src, int64_t n_cols, float *out);

static inline int64_t round_up_64(int64_t n) { return (n + 63) / 64 * 64; }

/* The two planes of one tile. */
static inline int64_t code_plane_bytes(int kind, int64_t n_cols)
{
    return round_up_64(n_cols / (kind < F32 ? 32 : 1) * formats[kind].code_bytes);
}
static inline int64_t scale_plane_bytes(int kind, int64_t n_cols)
{
    return round_up_64(n_cols / formats[kind].file_cols * formats[kind].scale_bytes);
}

/* Number i of an array that may begin at any byte. */
static inline uint16_t read_u16(const uint8_t *p, int i)
{
    uint16_t v;
    memcpy(&v, p + 2 * i, 2);
    return v;
}

static inline uint32_t read_u32(const uint8_t *p, int i)
{
    uint32_t v;
    memcpy(&v, p + 4 * i, 4);
    return v;
}

static inline float float_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* The largest |x|; compared as integers, so that a NaN is larger than all and stays. */
static inline float largest_magnitude(const float *x, int64_t n)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return float_of_bits(largest);
}

/* To the nearest, ties to even. A product may end just above 127; infinity and NaN, which have no
 * int8, are left to the scale. */
static inline int8_t nearest_int8(float v)
{
    v = v < 127.0f ? v : 127.0f;
    v = v > -127.0f ? v : -127.0f;
    return (int8_t)(v + 12582912.0f - 12582912.0f); /* 1.5 * 2^23: no room for a fraction */
}

/* float16 -> float32, exact; denormals by a product, so that no flush-to-zero mode loses them. */
static inline float float_of_f16(uint16_t h)
{
    uint32_t magnitude = h & 0x7fff, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u; /* inf, nan: twice */
    float f = magnitude < 0x400 ? (float)magnitude * 0x1p-24f
                                : float_of_bits((magnitude << 13) + rebias);
    return sign ? -f : f;
}

/* round to nearest, ties to even; too large becomes infinity, NaN stays one. Source: F. Giesen,
 * float_to_half_fast3_rtne */
static inline uint16_t f16_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) /* 65536 and above, infinity, NaN */
        return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) { /* below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the
                                bottom */
        float shifted;
        memcpy(&shifted, &bits, sizeof shifted);
        shifted += 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

static inline float float_of_bf16(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

/* E8M0 halved: 2^(e-128), since the table of MXFP4 is doubled. */
static inline float float_of_e8m0_half(uint8_t e)
{
    return float_of_bits(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

#endif

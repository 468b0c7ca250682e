/* Matrix products in portable C: complete, and the meaning of the vector versions, which do the
 * same float operations. */
#include <math.h>

#include "formats.h"

#define INLINE inline __attribute__((always_inline)) /* kind is a constant inside */

enum { CHUNK = 8 }; /* tokens that share one decoding of a block */

/* ---- activations ---- */

/* q = x / d to the nearest (ties to even), d = max|x| / 127. */
static void quantize_block(const float *x, act_block *out)
{
    float amax = largest_magnitude(x, 32);
    float inverse = amax <= ACT_TINY ? 0.0f : 127.0f / amax;
    int sums[2] = {0, 0};
    for (int k = 0; k < 32; k++) {
        out->q[k] = nearest_int8(x[k] * inverse);
        sums[k / 16] += out->q[k];
    }
    set_act_scales(out, amax, sums[0], sums[1]);
}

static void quantize_row(const float *x, int64_t n_cols, void *act)
{
    act_block *out = act;
    for (int64_t i = 0; i < n_cols / 32; i++)
        quantize_block(x + 32 * i, out + i);
}

/* ---- one block of a tile: 16 rows x 32 columns ---- */

typedef struct {
    int16_t w[32][TILE_ROWS];       /* code - offset */
    float d[TILE_ROWS], m[TILE_ROWS];
    int32_t sub[2][TILE_ROWS];      /* Q2_K Q3_K Q6_K: the scales of either half */
    int32_t sub_min[2][TILE_ROWS];  /* Q2_K: its mins, which m multiplies */
} tile_block;

static INLINE int nibble_at(const uint8_t *p, int g, int i)
{
    return p[64 * (g % 4) + i] >> 4 * (g / 4) & 15;
}
static INLINE int two_at(const uint8_t *p, int g, int i)
{
    return p[64 * (g / 4) + i] >> 2 * (g % 4) & 3;
}
static INLINE int bit_at(const uint8_t *p, int g, int i) { return p[i] >> g & 1; }

/* Byte i of group g of a code block. */
static INLINE int code_at(int kind, const uint8_t *p, int g, int i)
{
    switch (kind) {
    case Q8_0: return p[64 * g + i];
    case Q2_K: return two_at(p, g, i);
    case Q3_K: return two_at(p, g, i) | bit_at(p + 128, g, i) << 2;
    case Q5_0: case Q5_1: case Q5_K: return nibble_at(p, g, i) | bit_at(p + 256, g, i) << 4;
    case Q6_K: return nibble_at(p, g, i) | two_at(p + 256, g, i) << 4;
    case IQ4_NL: case IQ4_XS: return iq4_table[nibble_at(p, g, i)];
    case MXFP4: return mxfp4_table[nibble_at(p, g, i)];
    default: return nibble_at(p, g, i);
    }
}

static INLINE void read_codes(int kind, const uint8_t *p, tile_block *t)
{
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 64; i++)
            t->w[4 * g + i % 4][i / 4] = (int16_t)(code_at(kind, p, g, i) - formats[kind].offset);
}

/* formats.h, scales6: number `which` (0, 1) of block b and a row. */
static int scale6(const uint8_t *group, int which, int row, int b)
{
    uint32_t low = read_u32(group + 64 * which, row), high = read_u32(group + 128, row);
    return (int)((low >> 4 * b & 15) | (high >> (4 * b + 2 * which) & 3) << 4);
}

/* p: the scale group of the file block; b: the number of our 32 columns in it. */
static INLINE void read_scales(int kind, const uint8_t *p, int b, tile_block *t)
{
    int form = formats[kind].form;
    const uint8_t *d = p + d_at(kind);
    for (int row = 0; row < TILE_ROWS; row++) {
        t->d[row] = kind == MXFP4 ? float_of_e8m0_half(p[row]) : float_of_f16(read_u16(d, row));
        t->m[row] = form == FORM_MIN || form == FORM_SUB_MIN ? float_of_f16(read_u16(d + 32, row))
                                                             : 0.0f;
        if (kind == Q4_K || kind == Q5_K) {
            t->d[row] *= (float)scale6(p, 0, row, b);
            t->m[row] *= -(float)scale6(p, 1, row, b);
        }
        if (kind == IQ4_XS) {
            int low = read_u32(p, row) >> 4 * b & 15, high = read_u16(p + 64, row) >> 2 * b & 3;
            t->d[row] *= (float)((low | high << 4) - 32);
        }
        for (int half = 0; half < 2; half++) {
            uint8_t byte = kind == Q2_K || kind == Q6_K ? p[32 * b + 2 * row + half] : 0;
            t->sub[half][row] = kind == Q2_K ? byte & 15 : kind == Q6_K ? (int8_t)byte
                              : kind == Q3_K ? scale6(p, half, row, b) - 32 : 1;
            t->sub_min[half][row] = kind == Q2_K ? byte >> 4 : 0;
        }
    }
}

/* sums[row] = sum over 16 columns of w * q, exact */
static INLINE void dot_half(const tile_block *t, const act_block *x, int half, int32_t *sums)
{
    for (int row = 0; row < TILE_ROWS; row++)
        sums[row] = 0;
    for (int k = 16 * half; k < 16 * half + 16; k++)
        for (int row = 0; row < TILE_ROWS; row++)
            sums[row] += t->w[k][row] * x->q[k];
}

/* The float operations of a block; fmaf is exact everywhere, so every level gives the same bits. */
static INLINE void add_block(int kind, const tile_block *t, const act_block *x, float *acc)
{
    int32_t sums[2][TILE_ROWS];
    dot_half(t, x, 0, sums[0]);
    dot_half(t, x, 1, sums[1]);
    for (int row = 0; row < TILE_ROWS; row++) {
        int32_t sum = sums[0][row] * t->sub[0][row] + sums[1][row] * t->sub[1][row];
        if (formats[kind].form == FORM_SUB_MIN) {
            int32_t min_sum = x->sum16[0] * t->sub_min[0][row] + x->sum16[1] * t->sub_min[1][row];
            float v = fmaf(-t->m[row], (float)min_sum, t->d[row] * (float)sum);
            acc[row] = fmaf(v, x->d, acc[row]);
            continue;
        }
        acc[row] = fmaf((float)sum, t->d[row] * x->d, acc[row]);
        if (formats[kind].form == FORM_MIN)
            acc[row] = fmaf(t->m[row], x->d_sum, acc[row]);
    }
}

/* ---- products ---- */

/* One tile, up to CHUNK tokens. */
static INLINE void tile_of_blocks(int kind, int64_t n_cols, const uint8_t *tile, const uint8_t *act,
                                  size_t act_stride, int n, float acc[][TILE_ROWS])
{
    const format_traits f = formats[kind];
    const uint8_t *codes = tile + scale_plane_bytes(kind, n_cols);
    int blocks = f.file_cols / 32;
    tile_block block = {.sub = {{0}}};
    for (int64_t i = 0; i < n_cols / 32; i++) {
        read_codes(kind, codes + i * f.code_bytes, &block);
        read_scales(kind, tile + i / blocks * f.scale_bytes, (int)(i % blocks), &block);
        for (int t = 0; t < n; t++)
            add_block(kind, &block, (const act_block *)(act + t * act_stride) + i, acc[t]);
    }
}

/* One tile of a float kind: one lane per row, k in order. */
static INLINE void tile_of_floats(int kind, int64_t n_cols, const uint8_t *tile, const uint8_t *act,
                                  size_t act_stride, int n, float acc[][TILE_ROWS])
{
    for (int64_t k = 0; k < n_cols; k++) {
        float w[TILE_ROWS];
        for (int row = 0; row < TILE_ROWS; row++) {
            w[row] = kind == F32   ? float_of_bits(read_u32(tile + 64 * k, row))
                     : kind == F16 ? float_of_f16(read_u16(tile + 32 * k, row))
                                   : float_of_bf16(read_u16(tile + 32 * k, row));
        }
        for (int t = 0; t < n; t++) {
            float x = ((const float *)(act + t * act_stride))[k];
            for (int row = 0; row < TILE_ROWS; row++)
                acc[t][row] = fmaf(w[row], x, acc[t][row]);
        }
    }
}

typedef void tile_function(int64_t n_cols, const uint8_t *tile, const uint8_t *act,
                           size_t act_stride, int n, float acc[][TILE_ROWS]);

#define BLOCK_TILE(K) \
    static void tile_##K(int64_t n_cols, const uint8_t *tile, const uint8_t *act, \
                         size_t act_stride, int n, float acc[][TILE_ROWS]) \
    { tile_of_blocks(K, n_cols, tile, act, act_stride, n, acc); }
#define FLOAT_TILE(K) \
    static void tile_##K(int64_t n_cols, const uint8_t *tile, const uint8_t *act, \
                         size_t act_stride, int n, float acc[][TILE_ROWS]) \
    { tile_of_floats(K, n_cols, tile, act, act_stride, n, acc); }
#define TILE_ENTRY(K) [K] = tile_##K,
BLOCK_KINDS(BLOCK_TILE)
FLOAT_KINDS(FLOAT_TILE)
static tile_function *const tile_functions[N_KINDS] = {BLOCK_KINDS(TILE_ENTRY)
                                                           FLOAT_KINDS(TILE_ENTRY)};

static void linear(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                   const float *bias, float *out, int64_t ld, int64_t tile_begin, int64_t tile_end)
{
    for (int64_t i = tile_begin; i < tile_end; i++)
        for (int64_t t0 = 0; t0 < n_tokens; t0 += CHUNK) {
            int n = n_tokens - t0 < CHUNK ? (int)(n_tokens - t0) : CHUNK;
            float acc[CHUNK][TILE_ROWS] = {{0}};
            tile_functions[m->kind](m->n_cols, m->data + i * m->tile_bytes,
                                    (const uint8_t *)act + t0 * act_stride, act_stride, n, acc);
            for (int t = 0; t < n; t++)
                for (int64_t row = i * TILE_ROWS; row < (i + 1) * TILE_ROWS && row < m->n_rows;
                     row++)
                    out[(t0 + t) * ld + row] = acc[t][row - i * TILE_ROWS] +
                                               (bias ? bias[row] : 0.0f);
        }
}

const linear_table linear_scalar = {"scalar", quantize_row, linear, linear_dequantize_row};

/* Matrix products, written once over the few vector operations that an instruction set file defines
 * before it includes this: those of decode_simd.h, and
 *
 *   vi_splat32(p)           the 4 bytes at p in every lane
 *   vf_zero()  vf_splat(p)
 *   vf_fma fnma(a, b, c)    c + a*b, c - a*b, rounded once
 *   dot(kind, w, q, start)  start + the sum over 32 columns of w * q; w: vint[8], q: 32 activations
 *   dot_sub(kind, w, q, sub, start)  the same with each half times its sub-scale
 *   MAX_TOKENS              tokens of the largest register tile: 12, 8 or 4 (16 spill even with 32
 *                           registers: 13 % off Q4_0)
 *   FLOAT_TOKENS            the same for the float kinds
 *   FLOAT_TILES             tiles that one token takes at once there
 *   TOKENS_TILES            tiles that FLOAT_TOKENS take at once, 1 or 2
 */
#include "decode_simd.h"

/* ---- one block: 32 columns, one part of a tile, one token ---- */

/* The float operations are those of linear_scalar.c, in the same order. */
INLINE vfloat add_block(int kind, const vint *w, const block_scales *b, const act_block *x,
                        vfloat acc)
{
    const vfloat dx = vf_splat(&x->d);
    const int form = formats[kind].form;
    const int has_offset = formats[kind].offset != 0 && !is_signed(kind);
    const vint start = has_offset ? vi_madd16(b->offset, vi_splat32(x->sum16)) : vi_set32(0);
    if (form == FORM_SUB || form == FORM_SUB_MIN) {
        vfloat sum = vf_of_i32(dot_sub(kind, w, x->q, b->sub, start));
        if (form == FORM_SUB)
            return vf_fma(sum, vf_mul(b->d, dx), acc);
        vfloat min_sum = vf_of_i32(vi_madd16(b->min, vi_splat32(x->sum16)));
        return vf_fma(vf_fnma(b->m, min_sum, vf_mul(b->d, sum)), dx, acc);
    }
    acc = vf_fma(vf_of_i32(dot(kind, w, x->q, start)), vf_mul(b->d, dx), acc);
    if (form == FORM_MIN) {
        const vfloat d_sum = vf_splat(&x->d_sum);
        acc = kind == Q4_K || kind == Q5_K ? vf_fnma(b->m, d_sum, acc) : vf_fma(b->m, d_sum, acc);
    }
    return acc;
}

/* ---- one tile, n tokens ---- */

/* How far ahead of the codes in use memory is asked for, across the ends of tiles, which follow one
 * another. One core reads Q4_0 at 28 of 44 GB/s without, 39 at 8 KB, no more at 16 KB. */
enum { PREFETCH_BYTES = 8 * 1024 };

/* `parts` parts of one tile from `first` on. One token takes the whole tile in one pass over
 * memory; many go part by part, so that 8 vectors of codes are all that has to stay in registers
 * beside the sums. */
INLINE void block_tile(int kind, const int n, const int parts, const int first,
                       const packed_matrix *m, int64_t number, const uint8_t *act,
                       size_t act_stride, const float *bias, float *out, int64_t ld)
{
    const format_traits f = formats[kind];
    const int blocks = f.file_cols / 32, bytes = f.code_bytes + f.scale_bytes / blocks;
    const uint8_t *scales = m->data + number * m->tile_bytes,
                  *codes = scales + scale_plane_bytes(kind, m->n_cols);
    const uint8_t *ahead = codes + PREFETCH_BYTES;
    vfloat acc[MAX_TOKENS][PARTS];
    for (int t = 0; t < n; t++)
        for (int p = 0; p < parts; p++)
            acc[t][p] = vf_zero();
    for (int64_t i = 0; i < m->n_cols / f.file_cols; i++, scales += f.scale_bytes) {
        scale_group group[PARTS];
        for (int p = 0; p < parts; p++)
            group[p] = read_group(kind, scales, first + p);
        for (int j = 0; j < blocks;
             j++, codes += f.code_bytes, ahead += bytes, act += sizeof(act_block)) {
            for (int at = 0; at < bytes; at += 64)
                __builtin_prefetch(ahead + at);
            for (int p = 0; p < parts; p++) {
                vint w[8];
                decode(kind, codes + PART_BYTES * (first + p), w);
                const block_scales b = read_block_scales(kind, &group[p]);
                UNROLL
                for (int t = 0; t < n; t++)
                    acc[t][p] = add_block(kind, w, &b, (const act_block *)(act + t * act_stride),
                                          acc[t][p]);
            }
        }
    }
    for (int t = 0; t < n; t++)
        for (int p = 0; p < parts; p++) {
            const int64_t row = number * TILE_ROWS + LANES * (first + p);
            write_part(acc[t][p], bias ? bias + row : NULL, out + t * ld + row, m->n_rows - row);
        }
}

/* One tile of a float kind: one lane per row, k in order; `tiles` tiles at once keep the
 * multipliers busy. */
INLINE void float_tiles(int kind, const int n, const int tiles, const packed_matrix *m,
                        int64_t first, const uint8_t *act, size_t act_stride, const float *bias,
                        float *out, int64_t ld)
{
    const uint8_t *w = m->data + first * m->tile_bytes;
    const int part_bytes = formats[kind].code_bytes / PARTS;
    vfloat acc[MAX_TOKENS][PARTS * FLOAT_TILES];
    for (int t = 0; t < n; t++)
        for (int p = 0; p < PARTS * tiles; p++)
            acc[t][p] = vf_zero();
    for (int64_t k = 0; k < m->n_cols; k++, w += formats[kind].code_bytes, act += 4)
        for (int p = 0; p < PARTS * tiles; p++) {
            const uint8_t *at = w + p / PARTS * m->tile_bytes + p % PARTS * part_bytes;
            const vfloat v = kind == F32 ? vf_load(at) : kind == F16 ? vf_f16(at) : vf_bf16(at);
            for (int t = 0; t < n; t++)
                acc[t][p] = vf_fma(v, vf_splat(act + t * act_stride), acc[t][p]);
        }
    for (int t = 0; t < n; t++)
        for (int p = 0; p < PARTS * tiles; p++) {
            const int64_t row = first * TILE_ROWS + LANES * p;
            write_part(acc[t][p], bias ? bias + row : NULL, out + t * ld + row, m->n_rows - row);
        }
}

/* ---- tiles and tokens ---- */

typedef void product(const packed_matrix *m, const uint8_t *act, size_t act_stride,
                     int64_t n_tokens, const float *bias, float *out, int64_t ld,
                     int64_t tile_begin, int64_t tile_end);

/* Every token of the range meets a tile while the tile is in the nearest cache. */
INLINE void block_product(int kind, const packed_matrix *m, const uint8_t *act, size_t act_stride,
                          int64_t n_tokens, const float *bias, float *out, int64_t ld,
                          int64_t tile_begin, int64_t tile_end)
{
    for (int64_t i = tile_begin; i < tile_end; i++) {
        int64_t t = 0;
#define STEP(n) \
        for (; n <= MAX_TOKENS && n_tokens - t >= n; t += n) \
            for (int part = 0; part < PARTS; part += n == 1 ? PARTS : 1) \
                block_tile(kind, n <= MAX_TOKENS ? n : 1, n == 1 ? PARTS : 1, part, m, i, \
                           act + t * act_stride, act_stride, bias, out + t * ld, ld)
        STEP(12);
        STEP(8);
        STEP(4);
        STEP(2);
        STEP(1);
#undef STEP
    }
}

INLINE void float_product(int kind, const packed_matrix *m, const uint8_t *act, size_t act_stride,
                          int64_t n_tokens, const float *bias, float *out, int64_t ld,
                          int64_t tile_begin, int64_t tile_end)
{
    for (int64_t i = tile_begin; i < tile_end; i += FLOAT_TILES) {
        const int64_t end = i + FLOAT_TILES < tile_end ? i + FLOAT_TILES : tile_end;
        int64_t t = 0;
        for (; n_tokens - t >= FLOAT_TOKENS; t += FLOAT_TOKENS)
            for (int64_t j = i; j < end; j += TOKENS_TILES)
                if (TOKENS_TILES > 1 && end - j >= TOKENS_TILES)
                    float_tiles(kind, FLOAT_TOKENS, TOKENS_TILES, m, j, act + t * act_stride,
                                act_stride, bias, out + t * ld, ld);
                else
                    float_tiles(kind, FLOAT_TOKENS, 1, m, j, act + t * act_stride, act_stride,
                                bias, out + t * ld, ld);
        for (; t < n_tokens; t++) {
            if (end - i == FLOAT_TILES)
                float_tiles(kind, 1, FLOAT_TILES, m, i, act + t * act_stride, act_stride, bias,
                            out + t * ld, ld);
            else
                for (int64_t j = i; j < end; j++)
                    float_tiles(kind, 1, 1, m, j, act + t * act_stride, act_stride, bias,
                                out + t * ld, ld);
        }
    }
}

#define PRODUCT(K, by) \
    static void product_##K(const packed_matrix *m, const uint8_t *act, size_t act_stride, \
                            int64_t n_tokens, const float *bias, float *out, int64_t ld, \
                            int64_t tile_begin, int64_t tile_end) \
    { by(K, m, act, act_stride, n_tokens, bias, out, ld, tile_begin, tile_end); }
#define BLOCK_PRODUCT(K) PRODUCT(K, block_product)
#define FLOAT_PRODUCT(K) PRODUCT(K, float_product)
#define PRODUCT_ENTRY(K) [K] = product_##K,
BLOCK_KINDS(BLOCK_PRODUCT)
FLOAT_KINDS(FLOAT_PRODUCT)
static product *const products[N_KINDS] = {BLOCK_KINDS(PRODUCT_ENTRY) FLOAT_KINDS(PRODUCT_ENTRY)};

/* TILES_AT_ONCE tiles stay in the cache while a chunk of activations passes by, which stays in the
 * second cache. */
enum { TILES_AT_ONCE = 8, CHUNK_BYTES = 384 * 1024, CHUNK_TOKENS = 128 };

static void linear(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                   const float *bias, float *out, int64_t ld, int64_t tile_begin, int64_t tile_end)
{
    int64_t chunk = (int64_t)(CHUNK_BYTES / act_stride) / MAX_TOKENS * MAX_TOKENS;
    chunk = chunk < MAX_TOKENS ? MAX_TOKENS : chunk > CHUNK_TOKENS ? CHUNK_TOKENS : chunk;
    for (int64_t tile = tile_begin; tile < tile_end; tile += TILES_AT_ONCE) {
        const int64_t end = tile_end - tile < TILES_AT_ONCE ? tile_end : tile + TILES_AT_ONCE;
        for (int64_t t = 0; t < n_tokens; t += chunk)
            products[m->kind](m, (const uint8_t *)act + t * act_stride, act_stride,
                              n_tokens - t < chunk ? n_tokens - t : chunk, bias, out + t * ld, ld,
                              tile, end);
    }
}

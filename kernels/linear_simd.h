/* Matrix products, written once over the few vector operations that an instruction set file defines
 * before it includes this.
 *
 * LANES rows at a time: 16, a whole tile, or 8, one of the two PARTS of a tile. What it needs:
 *   vint, vfloat            LANES groups of 4 bytes / LANES floats
 *   vi_load(p)  vi_splat32(p): 4 bytes at p in every lane  vi_set8 set16 set32(c)
 *   vi_and or xor(a, b)  vi_left16 right16 left32 right32(a, constant)
 *   vi_lookup(table, i)     table: vi_table(16 bytes), i: bytes below 16
 *   vi_add16 add32 mul16(a, b)  vi_madd16(a, b): int32 lanes of a0*b0 + a1*b1
 *   vi_pairs_u8 s8(p)       2 * LANES bytes -> int16      vi_u16(p): LANES uint16 -> int32
 *   vf_zero()  vf_load f16 bf16 e8m0 splat(p)  vf_of_i32(a)  vf_mul add(a, b)  vf_store(p, a)
 *   vf_fma fnma(a, b, c)    c + a*b, c - a*b, rounded once
 *   dot(kind, w, q, start)  start + the sum over 32 columns of w * q; w: vint[8], q: 32 activations
 *   dot_sub(kind, w, q, sub, start)  the same with each half times its sub-scale;
 *                           sub: a sub_scales, from make_sub(kind, int16 pairs)
 *   CODES_SIGNED            codes of offset 128 are wanted as int8 with offset 0
 *   MAX_TOKENS              tokens of the largest register tile: 12, 8 or 4 (16 spill even with 32
 *                           registers: 13 % off Q4_0)
 *   FLOAT_TOKENS            the same for the float kinds
 *   FLOAT_TILES             tiles that one token takes at once there
 *   TOKENS_TILES            tiles that FLOAT_TOKENS take at once, 1 or 2
 */
#include "formats.h"

/* kind and the numbers of tokens are constants inside */
#define INLINE static inline __attribute__((always_inline))

/* For the loop over a register tile's tokens: its sums stay in registers (5 % at 512 tokens). */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum { PARTS = TILE_ROWS / LANES, PART_BYTES = 4 * LANES };

/* ---- codes ---- */

INLINE int is_wide(int kind) { return formats[kind].offset == 128; }
INLINE int has_fifth_bit(int kind) { return kind == Q5_0 || kind == Q5_1 || kind == Q5_K; }

INLINE vint as_wanted(int kind, vint w)
{
    return CODES_SIGNED && is_wide(kind) ? vi_xor(w, vi_set8((char)0x80)) : w;
}

INLINE void decode_bytes(int kind, const uint8_t *p, vint *w)
{
    for (int g = 0; g < 8; g++)
        w[g] = as_wanted(kind, vi_load(p + 64 * g));
}

INLINE void decode_nibbles(const uint8_t *p, vint *w)
{
    const vint low = vi_set8(15);
    for (int j = 0; j < 4; j++) {
        vint v = vi_load(p + 64 * j);
        w[j] = vi_and(v, low);
        w[j + 4] = vi_and(vi_right16(v, 4), low);
    }
}

INLINE void look_up(int kind, vint *w)
{
    const vint table = as_wanted(kind, vi_table(kind == MXFP4 ? mxfp4_table : iq4_table));
    for (int g = 0; g < 8; g++)
        w[g] = vi_lookup(table, w[g]);
}

/* Bit g of each byte of p becomes bit 4 of w[g]. */
INLINE void add_fifth_bits(const uint8_t *p, vint *w)
{
    const vint bit = vi_set8(16), v = vi_load(p);
    w[0] = vi_or(w[0], vi_and(vi_left16(v, 4), bit));
    w[1] = vi_or(w[1], vi_and(vi_left16(v, 3), bit));
    w[2] = vi_or(w[2], vi_and(vi_left16(v, 2), bit));
    w[3] = vi_or(w[3], vi_and(vi_left16(v, 1), bit));
    w[4] = vi_or(w[4], vi_and(v, bit));
    w[5] = vi_or(w[5], vi_and(vi_right16(v, 1), bit));
    w[6] = vi_or(w[6], vi_and(vi_right16(v, 2), bit));
    w[7] = vi_or(w[7], vi_and(vi_right16(v, 3), bit));
}

/* Q6_K: two bits for each group in two vectors become bits 4 and 5. */
INLINE void add_high_twos(const uint8_t *p, vint *w)
{
    const vint bits = vi_set8(48);
    for (int j = 0; j < 2; j++) {
        vint v = vi_load(p + 64 * j);
        w[4 * j] = vi_or(w[4 * j], vi_and(vi_left16(v, 4), bits));
        w[4 * j + 1] = vi_or(w[4 * j + 1], vi_and(vi_left16(v, 2), bits));
        w[4 * j + 2] = vi_or(w[4 * j + 2], vi_and(v, bits));
        w[4 * j + 3] = vi_or(w[4 * j + 3], vi_and(vi_right16(v, 2), bits));
    }
}

INLINE void decode_twos(const uint8_t *p, vint *w)
{
    const vint bits = vi_set8(3);
    for (int j = 0; j < 2; j++) {
        vint v = vi_load(p + 64 * j);
        w[4 * j] = vi_and(v, bits);
        w[4 * j + 1] = vi_and(vi_right16(v, 2), bits);
        w[4 * j + 2] = vi_and(vi_right16(v, 4), bits);
        w[4 * j + 3] = vi_and(vi_right16(v, 6), bits);
    }
}

/* Q3_K: bit g of each byte becomes bit 2 of w[g]. */
INLINE void add_third_bits(const uint8_t *p, vint *w)
{
    const vint bit = vi_set8(4), v = vi_load(p);
    w[0] = vi_or(w[0], vi_and(vi_left16(v, 2), bit));
    w[1] = vi_or(w[1], vi_and(vi_left16(v, 1), bit));
    w[2] = vi_or(w[2], vi_and(v, bit));
    w[3] = vi_or(w[3], vi_and(vi_right16(v, 1), bit));
    w[4] = vi_or(w[4], vi_and(vi_right16(v, 2), bit));
    w[5] = vi_or(w[5], vi_and(vi_right16(v, 3), bit));
    w[6] = vi_or(w[6], vi_and(vi_right16(v, 4), bit));
    w[7] = vi_or(w[7], vi_and(vi_right16(v, 5), bit));
}

/* The 8 groups of a part of a code block. */
INLINE void decode(int kind, const uint8_t *p, vint *w)
{
    if (kind == Q8_0) {
        decode_bytes(kind, p, w);
    } else if (kind == Q2_K || kind == Q3_K) {
        decode_twos(p, w);
        if (kind == Q3_K)
            add_third_bits(p + 128, w);
    } else {
        decode_nibbles(p, w);
        if (has_fifth_bit(kind))
            add_fifth_bits(p + 256, w);
        if (kind == Q6_K)
            add_high_twos(p + 256, w);
        if (kind == IQ4_NL || kind == IQ4_XS || kind == MXFP4)
            look_up(kind, w);
    }
}

/* ---- scales ---- */

/* What the blocks of a scale group share; packed 6-bit scales are shifted from block to block. */
typedef struct {
    vfloat d, m;
    vint low, low_second, high;
    const uint8_t *bytes;
} scale_group;

INLINE scale_group read_group(int kind, const uint8_t *p, int part)
{
    scale_group s;
    const uint8_t *d = p + d_at(kind) + 2 * LANES * part;
    s.d = kind == MXFP4 ? vf_e8m0(p + LANES * part) : vf_f16(d);
    s.m = formats[kind].form == FORM_MIN || formats[kind].form == FORM_SUB_MIN ? vf_f16(d + 32)
                                                                               : s.d;
    s.low = s.low_second = s.high = vi_set8(0);
    s.bytes = p + 2 * LANES * part;
    if (kind == Q3_K || kind == Q4_K || kind == Q5_K) {
        s.low = vi_load(p + PART_BYTES * part);
        s.low_second = vi_load(p + 64 + PART_BYTES * part);
        s.high = vi_load(p + 128 + PART_BYTES * part);
    }
    if (kind == IQ4_XS) {
        s.low = vi_load(p + PART_BYTES * part);
        s.high = vi_u16(p + 64 + 2 * LANES * part);
    }
    return s;
}

/* low nibble | two bits of high above it */
INLINE vint join6(vint low, vint high_at_4)
{
    return vi_or(vi_and(low, vi_set32(15)), vi_and(high_at_4, vi_set32(48)));
}

INLINE void next_block(int kind, scale_group *s)
{
    s->low = vi_right32(s->low, 4);
    s->low_second = vi_right32(s->low_second, 4);
    s->high = kind == IQ4_XS ? vi_right32(s->high, 2) : vi_right32(s->high, 4);
    s->bytes += 32;
}

/* What turns the exact sums of one block into floats. */
typedef struct {
    vfloat d, m;
    sub_scales sub;
    vint offset; /* int16 pairs to multiply sum16 with */
    vint min;    /* Q2_K: int16 pairs of mins */
} block_scales;

INLINE block_scales read_block_scales(int kind, scale_group *s)
{
    block_scales b = {.d = s->d, .m = s->m};
    vint pairs = vi_set8(0);
    b.offset = vi_set16((int16_t)-formats[kind].offset);
    if (kind == Q4_K || kind == Q5_K) {
        b.d = vf_mul(s->d, vf_of_i32(join6(s->low, vi_left32(s->high, 4))));
        b.m = vf_mul(s->m, vf_of_i32(join6(s->low_second, vi_left32(s->high, 2))));
    }
    if (kind == IQ4_XS)
        b.d = vf_mul(s->d,
                     vf_of_i32(vi_add32(join6(s->low, vi_left32(s->high, 4)), vi_set32(-32))));
    if (kind == Q6_K)
        pairs = vi_pairs_s8(s->bytes);
    if (kind == Q3_K) {
        vint first = join6(s->low, vi_left32(s->high, 4)),
             second = join6(s->low_second, vi_left32(s->high, 2));
        pairs = vi_add16(vi_or(first, vi_left32(second, 16)), vi_set16(-32));
    }
    if (kind == Q2_K) {
        vint both = vi_pairs_u8(s->bytes);
        pairs = vi_and(both, vi_set16(15));
        b.min = vi_right16(both, 4);
    }
    if (formats[kind].form == FORM_SUB)
        b.offset = vi_mul16(pairs, b.offset);
    b.sub = make_sub(kind, pairs);
    next_block(kind, s);
    return b;
}

/* ---- one block: 32 columns, one part of a tile, one token ---- */

/* The float operations are those of linear_scalar.c, in the same order. */
INLINE vfloat add_block(int kind, const vint *w, const block_scales *b, const act_block *x,
                        vfloat acc)
{
    const vfloat dx = vf_splat(&x->d);
    const int form = formats[kind].form;
    const int has_offset = formats[kind].offset != 0 && !(CODES_SIGNED && is_wide(kind));
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

/* Writes the sums of one part of a tile for one token; `rows` of its LANES exist. */
INLINE void write_part(vfloat acc, const float *bias, float *out, int64_t rows)
{
    if (rows >= LANES) {
        vf_store(out, bias ? vf_add(acc, vf_load(bias)) : acc);
        return;
    }
    float sums[LANES];
    vf_store(sums, acc);
    for (int row = 0; row < rows; row++)
        out[row] = bias ? sums[row] + bias[row] : sums[row];
}

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

/* A chunk of activations stays in the second cache while all tiles pass over it. */
enum { CHUNK_BYTES = 384 * 1024 };

static void linear(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                   const float *bias, float *out, int64_t ld, int64_t tile_begin, int64_t tile_end)
{
    int64_t chunk = (int64_t)(CHUNK_BYTES / act_stride) / MAX_TOKENS * MAX_TOKENS;
    chunk = chunk < MAX_TOKENS ? MAX_TOKENS : chunk;
    for (int64_t t = 0; t < n_tokens; t += chunk)
        products[m->kind](m, (const uint8_t *)act + t * act_stride, act_stride,
                          n_tokens - t < chunk ? n_tokens - t : chunk, bias, out + t * ld, ld,
                          tile_begin, tile_end);
}

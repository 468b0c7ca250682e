/* The codes and scales of a tile's blocks as vectors, written once over the few operations that an
 * instruction set file defines before it includes this.
 *
 * LANES rows at a time: 16, a whole tile, or 8 or 4, one of the PARTS of a tile. What it needs:
 *   vint, vfloat            LANES groups of 4 bytes / LANES floats
 *   vi_load(p)  vi_set8 set16 set32(c)
 *   vi_and or(a, b)  vi_sub8(a, b)  vi_left16 right16 left32 right32(a, constant)
 *   vi_lookup(table, i)     table: vi_table(16 bytes), i: bytes below 16
 *   vi_add16 add32 mul16(a, b)  vi_madd16(a, b): int32 lanes of a0*b0 + a1*b1
 *   vi_pairs_u8 s8(p)       2 * LANES bytes -> int16      vi_u16(p): LANES uint16 -> int32
 *   vf_load f16 bf16 e8m0(p)  vf_of_i32(a)  vf_mul add(a, b)  vf_store(p, a)
 *   sub_scales, make_sub(kind, int16 pairs)   sub-scales as its dot_sub wants them
 *   SIGNED_FROM             codes of at least this offset are wanted as int8, less the offset
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

INLINE int is_signed(int kind) { return formats[kind].offset >= SIGNED_FROM; }
INLINE int has_fifth_bit(int kind) { return kind == Q5_0 || kind == Q5_1 || kind == Q5_K; }

INLINE vint as_wanted(int kind, vint w)
{
    return is_signed(kind) ? vi_sub8(w, vi_set8((char)formats[kind].offset)) : w;
}

INLINE void decode_bytes(const uint8_t *p, vint *w)
{
    for (int g = 0; g < 8; g++)
        w[g] = vi_load(p + 64 * g);
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
        decode_bytes(p, w);
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
    }
    if (kind == IQ4_NL || kind == IQ4_XS || kind == MXFP4)
        look_up(kind, w);
    else
        for (int g = 0; g < 8; g++)
            w[g] = as_wanted(kind, w[g]);
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

/* ---- results ---- */

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

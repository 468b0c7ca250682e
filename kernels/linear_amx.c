/* Matrix products for AMX: one tdpbssd multiplies 16 rows x 32 columns of codes with 16 tokens.
 *
 * A code block, once decoded, is already the tile that the instruction wants: 8 groups of 16 rows x
 * 4 columns. Its exact sums go through memory, for only there do vectors meet tiles, and from there
 * on are scaled as in linear_simd.h: the same float operations in the same order, so a token's
 * results are those of AVX-512 bit for bit. Few tokens, and float kinds, are left to it.
 *
 * In cycles of Sapphire Rapids: tdpbssd of 32 columns 16, tilestored 16, tileloadd of 16 rows
 * 8, and these overlap neither one another nor much of the scaling, 3 vector operations for each
 * token: 75 in all for 8192 products, where VNNI needs 125. Tried: 2x2 tiles, which load half as
 * much: no faster. Tiles of activations straight from their rows: as fast alone, a third slower
 * beside a busy hyper-thread.
 */
#include "linear.h"

#if HAVE_AMX

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c," \
                          "amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#endif

#include "avx512.h"

enum { SIGNED_FROM = 1 };

#include "decode_simd.h"

enum {
    CHUNK_BLOCKS = 32,   /* blocks of 32 columns that are decoded at once: they stay in L1 */
    GROUP = 16,          /* tokens that are multiplied with at once */
    LEAST_TOKENS = 32,   /* decoding does not pay for fewer; AVX-512 is a third faster with 8 */
    MOST_GROUPS = 16,    /* groups of tokens that use what is decoded */
    GATHERED = 1024,     /* tiles of activations at hand, 512 bytes each */
    AHEAD = 3, RING = 4, /* blocks whose sums are on their way through memory */
};

/* Blocks of a tile. Q6_K has two planes of codes, 64 * high + low. */
typedef struct {
    int8_t codes[2][CHUNK_BLOCKS][512];
    vfloat d[CHUNK_BLOCKS], m[CHUNK_BLOCKS];
    vint min[CHUNK_BLOCKS]; /* Q2_K: int16 pairs */
} decoded;

/* ---- decoding ---- */

/* Codes times a sub-scale, which int16 pairs of `scale` hold, in the even and the odd bytes */
INLINE void times_scale(vint w, vint scale, vint *even, vint *odd)
{
    *even = vi_mul16(_mm512_srai_epi16(vi_left16(w, 8), 8), scale);
    *odd = vi_mul16(_mm512_srai_epi16(w, 8), scale);
}

INLINE vint join_bytes(vint even, vint odd)
{
    return vi_or(vi_and(even, vi_set16(255)), vi_left16(odd, 8));
}

/* The sub-scale of either half in both int16 of each lane */
INLINE vint scale_of_half(int kind, const sub_scales *sub, int half)
{
    if (kind == Q6_K) {
        const vint scale = half ? sub->second : sub->first;
        return vi_or(vi_and(scale, vi_set32(0xffff)), vi_left32(scale, 16));
    }
    return half ? vi_or(vi_and(sub->first, vi_set32((int)0xffff0000)), vi_right32(sub->first, 16))
                : vi_or(vi_and(sub->first, vi_set32(0xffff)), vi_left32(sub->first, 16));
}

/* Q3_K's products are -124 to 128; 2 less fit a byte, and scale_sums makes up for it. */
enum { Q3_K_SHIFT = 2 };

/* Sub-scales are multiplied into the codes: 0 to 45 for Q2_K; Q6_K's -4096 to 4096 need two
 * planes. */
INLINE void scale_codes(int kind, const vint *w, const sub_scales *sub, int8_t *high, int8_t *low)
{
    for (int g = 0; g < 8; g++) {
        vint even, odd;
        times_scale(w[g], scale_of_half(kind, sub, g / 4), &even, &odd);
        if (kind == Q6_K) {
            const vint half = vi_set16(32);
            const vint high_even = _mm512_srai_epi16(vi_add16(even, half), 6),
                       high_odd = _mm512_srai_epi16(vi_add16(odd, half), 6);
            _mm512_store_si512(high + 64 * g, join_bytes(high_even, high_odd));
            even = _mm512_sub_epi16(even, vi_left16(high_even, 6));
            odd = _mm512_sub_epi16(odd, vi_left16(high_odd, 6));
        }
        if (kind == Q3_K) {
            even = _mm512_sub_epi16(even, vi_set16(Q3_K_SHIFT));
            odd = _mm512_sub_epi16(odd, vi_set16(Q3_K_SHIFT));
        }
        _mm512_store_si512(low + 64 * g, join_bytes(even, odd));
    }
}

/* Blocks [first, first + n) of a tile; first is that of a file block. */
INLINE void decode_blocks(int kind, const packed_matrix *m, int64_t tile, int64_t first, int64_t n,
                          decoded *out)
{
    const format_traits f = formats[kind];
    const int blocks = f.file_cols / 32;
    const uint8_t *scales = m->data + tile * m->tile_bytes,
                  *codes = scales + scale_plane_bytes(kind, m->n_cols) + first * f.code_bytes;
    scale_group group;
    scales += first / blocks * f.scale_bytes;
    for (int64_t i = 0; i < n; i++, codes += f.code_bytes) {
        if (i % blocks == 0) {
            group = read_group(kind, scales, 0);
            scales += f.scale_bytes;
        }
        vint w[8];
        decode(kind, codes, w);
        const block_scales b = read_block_scales(kind, &group);
        out->d[i] = b.d;
        out->m[i] = b.m;
        if (f.form == FORM_SUB_MIN)
            out->min[i] = b.min;
        if (f.form == FORM_SUB || f.form == FORM_SUB_MIN) {
            scale_codes(kind, w, &b.sub, out->codes[1][i], out->codes[0][i]);
            continue;
        }
        for (int g = 0; g < 8; g++)
            _mm512_store_si512(out->codes[0][i] + 64 * g, w[g]);
    }
}

/* ---- activations ---- */

/* 32 columns of a group of tokens */
typedef int8_t token_tile[GROUP][32];

/* n_blocks tiles of the rows from act on */
static void gather(const uint8_t *act, size_t act_stride, int64_t n_blocks, token_tile *out)
{
    for (int64_t i = 0; i < n_blocks; i++)
        for (int t = 0; t < GROUP; t++)
            memcpy(out[i][t], ((const act_block *)(act + t * act_stride))[i].q, 32);
}

/* ---- products ---- */

/* Registers: 0 sums, 1 activations (a row for each token), 2 codes. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* NOTE: GCC 12's _tile_loadconfig says that it reads 8 bytes of its argument, and the stores of
 * the others are dropped. */
static void configure(void)
{
    static const tile_shapes shapes = {
        .palette = 1, .row_bytes = {64, 32, 64}, .rows = {GROUP, GROUP, 8}};
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

INLINE void multiply(const int8_t *codes, const token_tile *x, int32_t *sums)
{
    _tile_zero(0);
    _tile_loadd(1, x, 32);
    _tile_loadd(2, codes, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, sums, 64);
}

/* The float operations of add_block in linear_simd.h. low, high: exact sums. */
INLINE vfloat scale_sums(int kind, const decoded *w, int64_t i, vint low, vint high,
                         const act_block *x, vfloat acc)
{
    const int form = formats[kind].form;
    const vfloat dx = vf_splat(&x->d);
    if (kind == Q6_K)
        low = vi_add32(low, vi_left32(high, 6));
    if (kind == Q3_K)
        low = vi_add32(low, vi_madd16(vi_set16(Q3_K_SHIFT), vi_splat32(x->sum16)));
    if (form == FORM_SUB_MIN) {
        const vfloat min_sum = vf_of_i32(vi_madd16(w->min[i], vi_splat32(x->sum16)));
        return vf_fma(vf_fnma(w->m[i], min_sum, vf_mul(w->d[i], vf_of_i32(low))), dx, acc);
    }
    acc = vf_fma(vf_of_i32(low), vf_mul(w->d[i], dx), acc);
    if (form != FORM_MIN)
        return acc;
    const vfloat d_sum = vf_splat(&x->d_sum);
    return kind == Q4_K || kind == Q5_K ? vf_fnma(w->m[i], d_sum, acc)
                                        : vf_fma(w->m[i], d_sum, acc);
}

/* n blocks of a tile for a group of tokens: x, and as rows from act on; sums: (GROUP, 16) so far */
INLINE void add_blocks(int kind, const decoded *w, int64_t n, const token_tile *x,
                       const uint8_t *act, size_t act_stride, float *sums)
{
    const int planes = kind == Q6_K ? 2 : 1;
    int32_t ring[RING][2][256] __attribute__((aligned(64)));
    vfloat acc[GROUP];
    for (int t = 0; t < GROUP; t++)
        acc[t] = vf_load(sums + TILE_ROWS * t);
    for (int64_t i = -AHEAD; i < n; i++) {
        const int64_t next = i + AHEAD;
        for (int p = 0; p < planes && next < n; p++)
            multiply(w->codes[p][next], x + next, ring[next % RING][p]);
        if (i < 0)
            continue;
        UNROLL
        for (int t = 0; t < GROUP; t++)
            acc[t] = scale_sums(kind, w, i, vi_load(ring[i % RING][0] + TILE_ROWS * t),
                                vi_load(ring[i % RING][planes - 1] + TILE_ROWS * t),
                                (const act_block *)(act + t * act_stride) + i, acc[t]);
    }
    for (int t = 0; t < GROUP; t++)
        vf_store(sums + TILE_ROWS * t, acc[t]);
}

/* The first token of group i: the last group ends with the last token, and may begin inside the
 * group before it. */
INLINE int64_t first_token(int64_t i, int64_t n_tokens)
{
    return (i + 1) * GROUP <= n_tokens ? i * GROUP : n_tokens - GROUP;
}

/* One tile, at most MOST_GROUPS groups. x: (groups, n_cols / 32) */
INLINE void tile_product(int kind, const packed_matrix *m, int64_t tile,
                         const token_tile *x, const uint8_t *act, size_t act_stride,
                         int64_t n_tokens, const float *bias, float *out, int64_t ld)
{
    decoded w;
    float sums[MOST_GROUPS][GROUP * TILE_ROWS] __attribute__((aligned(64)));
    const int64_t n_blocks = m->n_cols / 32, n_groups = (n_tokens + GROUP - 1) / GROUP,
                  row = tile * TILE_ROWS;
    memset(sums, 0, (size_t)n_groups * sizeof sums[0]);
    for (int64_t first = 0; first < n_blocks; first += CHUNK_BLOCKS) {
        const int64_t n = n_blocks - first < CHUNK_BLOCKS ? n_blocks - first : CHUNK_BLOCKS;
        decode_blocks(kind, m, tile, first, n, &w);
        for (int64_t i = 0; i < n_groups; i++)
            add_blocks(kind, &w, n, x + i * n_blocks + first,
                       act + (size_t)first_token(i, n_tokens) * act_stride +
                           (size_t)first * sizeof(act_block),
                       act_stride, sums[i]);
    }
    for (int64_t i = 0; i < n_groups; i++)
        for (int t = 0; t < GROUP; t++)
            write_part(vf_load(sums[i] + TILE_ROWS * t), bias ? bias + row : NULL,
                       out + (first_token(i, n_tokens) + t) * ld + row, m->n_rows - row);
}

typedef void product(const packed_matrix *m, int64_t tile, const token_tile *x, const uint8_t *act,
                     size_t act_stride, int64_t n_tokens, const float *bias, float *out,
                     int64_t ld);

#define PRODUCT(K) \
    static void product_##K(const packed_matrix *m, int64_t tile, const token_tile *x, \
                            const uint8_t *act, size_t act_stride, int64_t n_tokens, \
                            const float *bias, float *out, int64_t ld) \
    { tile_product(K, m, tile, x, act, act_stride, n_tokens, bias, out, ld); }
#define PRODUCT_ENTRY(K) [K] = product_##K,
BLOCK_KINDS(PRODUCT)
static product *const products[N_KINDS] = {BLOCK_KINDS(PRODUCT_ENTRY)};

/* Tokens [0, n) for all tiles of the range */
static void some_tokens(const packed_matrix *m, const uint8_t *act, size_t act_stride, int64_t n,
                        const float *bias, float *out, int64_t ld, int64_t tile_begin,
                        int64_t tile_end)
{
    static _Thread_local token_tile gathered[GATHERED];
    const int64_t n_blocks = m->n_cols / 32;
    for (int64_t i = 0; i * GROUP < n; i++)
        gather(act + (size_t)first_token(i, n) * act_stride, act_stride, n_blocks,
               gathered + i * n_blocks);
    for (int64_t tile = tile_begin; tile < tile_end; tile++)
        products[m->kind](m, tile, gathered, act, act_stride, n, bias, out, ld);
}

static void linear(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                   const float *bias, float *out, int64_t ld, int64_t tile_begin, int64_t tile_end)
{
    int64_t n_groups = linear_wants_int8(m) ? GATHERED / (m->n_cols / 32) : 0;
    if (n_tokens < LEAST_TOKENS || n_groups < 2) {
        linear_avx512_vnni.linear(m, act, act_stride, n_tokens, bias, out, ld, tile_begin,
                                  tile_end);
        return;
    }
    configure();
    n_groups = n_groups < MOST_GROUPS ? n_groups : MOST_GROUPS;
    int64_t n;
    for (int64_t t = 0; t < n_tokens; t += n) {
        n = n_tokens - t < n_groups * GROUP ? n_tokens - t : n_groups * GROUP;
        if (n_tokens - t > n && n_tokens - t - n < GROUP) /* what is left must be a group */
            n -= GROUP;
        some_tokens(m, (const uint8_t *)act + (size_t)t * act_stride, act_stride, n, bias,
                    out + t * ld, ld, tile_begin, tile_end);
    }
    _tile_release();
}

static void quantize_row(const float *x, int64_t n_cols, void *act)
{
    linear_avx512_vnni.quantize_row(x, n_cols, act);
}

const linear_table linear_amx = {"amx_int8", quantize_row, linear, linear_dequantize_row};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif

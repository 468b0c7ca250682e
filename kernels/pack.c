/* From the file's rows to packed tiles, and to floats. Both read a block through unpack_block. */
#include "formats.h"

/* One file block of one row, every field in a byte of its own. */
typedef struct {
    uint32_t codes[64]; /* 4 codes in each word, in order of k */
    uint16_t d, m;      /* float16 bits; m is the min of a 32-column block or dmin; MXFP4: d is e */
    uint8_t scale[16], min[16];
} row_block;

static const uint32_t LOW_NIBBLES = 0x0f0f0f0fu, LOW_TWOS = 0x03030303u, LOW_ONES = 0x01010101u;

static int kind_of_qtype(int32_t qtype)
{
    for (int kind = 0; kind < N_KINDS; kind++)
        if (formats[kind].qtype == qtype)
            return kind;
    return -1;
}

int linear_plan(int32_t qtype, int64_t n_rows, int64_t n_cols, packed_matrix *out)
{
    int kind = kind_of_qtype(qtype);
    if (kind < 0 || n_rows < 1 || n_cols < 1 || n_cols % formats[kind].file_cols != 0)
        return -1;
    *out = (packed_matrix){.qtype = qtype, .kind = kind, .n_rows = n_rows, .n_cols = n_cols};
    out->tile_bytes = (size_t)(code_plane_bytes(kind, n_cols) + scale_plane_bytes(kind, n_cols));
    return 0;
}

size_t linear_row_bytes(int32_t qtype, int64_t n_cols)
{
    packed_matrix m;
    if (linear_plan(qtype, 1, n_cols, &m) != 0)
        return 0;
    return (size_t)(n_cols / formats[m.kind].file_cols * formats[m.kind].file_bytes);
}

int linear_wants_int8(const packed_matrix *m) { return m->kind < F32; }

size_t linear_act_bytes(int64_t n_cols)
{
    return (size_t)round_up_64(n_cols / 32 * (int64_t)sizeof(act_block));
}

/* ---- unpacking one file block ---- */

static uint32_t word(const uint8_t *p, int i)
{
    uint32_t w;
    memcpy(&w, p + 4 * i, 4);
    return w;
}

/* 16 bytes -> 32 codes: low nibbles first. */
static void unpack_nibbles(const uint8_t *qs, uint32_t *codes)
{
    for (int i = 0; i < 4; i++) {
        codes[i] = word(qs, i) & LOW_NIBBLES;
        codes[i + 4] = word(qs, i) >> 4 & LOW_NIBBLES;
    }
}

/* Bit k of qh becomes bit 4 of code k. The factor moves bit i of a nibble to bit 0 of byte i. */
static void unpack_fifth_bits(const uint8_t *qh, uint32_t *codes)
{
    uint32_t bits = (uint32_t)qh[0] | (uint32_t)qh[1] << 8 | (uint32_t)qh[2] << 16 |
                    (uint32_t)qh[3] << 24;
    for (int g = 0; g < 8; g++)
        codes[g] |= ((bits >> 4 * g & 15) * 0x00204081u & LOW_ONES) << 4;
}

/* 128 bytes -> 256 codes, block b in nibble b % 2 of 32 bytes. */
static void unpack_nibbles_k(const uint8_t *qs, uint32_t *codes)
{
    for (int b = 0; b < 8; b++)
        for (int i = 0; i < 8; i++)
            codes[8 * b + i] = word(qs + 32 * (b / 2), i) >> 4 * (b % 2) & LOW_NIBBLES;
}

/* 64 bytes -> two bits of 256 codes, block b in bits 2(b % 4) of 32 bytes; they go to bit `at`. */
static void unpack_twos_k(const uint8_t *qs, uint32_t *codes, int at)
{
    for (int b = 0; b < 8; b++)
        for (int i = 0; i < 8; i++)
            codes[8 * b + i] |= (word(qs + 32 * (b / 4), i) >> 2 * (b % 4) & LOW_TWOS) << at;
}

/* 32 bytes -> one bit of 256 codes, block b in bit b; it goes to bit `at`. */
static void unpack_ones_k(const uint8_t *qh, uint32_t *codes, int at)
{
    for (int b = 0; b < 8; b++)
        for (int i = 0; i < 8; i++)
            codes[8 * b + i] |= (word(qh, i) >> b & LOW_ONES) << at;
}

/* q4_k, q5_k: 8 scales, 8 mins of 6 bits. Bytes 0-3 and 4-7: the first four of each; their top bits
 * belong to the last. */
static void unpack_scales_mins(const uint8_t *s, row_block *b)
{
    for (int i = 0; i < 4; i++) {
        b->scale[i] = s[i] & 63;
        b->min[i] = s[i + 4] & 63;
        b->scale[i + 4] = (s[i + 8] & 15) | (s[i] >> 6 << 4);
        b->min[i + 4] = (s[i + 8] >> 4) | (s[i + 4] >> 6 << 4);
    }
}

/* q3_k: 16 scales of 6 bits, still with their offset of 32. */
static void unpack_scales_q3_k(const uint8_t *s, row_block *b)
{
    for (int i = 0; i < 16; i++)
        b->scale[i] = (s[i % 8] >> 4 * (i / 8) & 15) | (s[8 + i % 4] >> 2 * (i / 4) & 3) << 4;
}

static void unpack_q2_k(const block_q2_k *s, row_block *b)
{
    memset(b->codes, 0, sizeof b->codes);
    unpack_twos_k(s->qs, b->codes, 0);
    for (int i = 0; i < 16; i++) {
        b->scale[i] = s->scales[i] & 15;
        b->min[i] = s->scales[i] >> 4;
    }
    b->d = s->d;
    b->m = s->dmin;
}

static void unpack_q3_k(const block_q3_k *s, row_block *b)
{
    memset(b->codes, 0, sizeof b->codes);
    unpack_twos_k(s->qs, b->codes, 0);
    unpack_ones_k(s->hmask, b->codes, 2);
    unpack_scales_q3_k(s->scales, b);
    b->d = s->d;
}

static void unpack_q6_k(const block_q6_k *s, row_block *b)
{
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++)
            b->codes[8 * i + j] = word(s->ql + 64 * (i / 4) + 32 * (i % 2), j) >> 4 * (i / 2 % 2) &
                                  LOW_NIBBLES;
    unpack_twos_k(s->qh, b->codes, 4);
    memcpy(b->scale, s->scales, 16);
    b->d = s->d;
}

static void unpack_iq4_xs(const block_iq4_xs *s, row_block *b)
{
    for (int i = 0; i < 8; i++) {
        unpack_nibbles(s->qs + 16 * i, b->codes + 8 * i);
        b->scale[i] = (s->scales_l[i / 2] >> 4 * (i % 2) & 15) | (s->scales_h >> 2 * i & 3) << 4;
    }
    b->d = s->d;
}

/* Reads a file block through a properly aligned copy. */
#define FILE_BLOCK(type, name) type name; memcpy(&name, src, sizeof name)

static void unpack_block(int kind, const uint8_t *src, row_block *b)
{
    switch (kind) {
    case Q4_0: case IQ4_NL: {
        FILE_BLOCK(block_q4_0, s);
        unpack_nibbles(s.qs, b->codes);
        b->d = s.d;
        break;
    }
    case Q4_1: {
        FILE_BLOCK(block_q4_1, s);
        unpack_nibbles(s.qs, b->codes);
        b->d = s.d;
        b->m = s.m;
        break;
    }
    case Q5_0: {
        FILE_BLOCK(block_q5_0, s);
        unpack_nibbles(s.qs, b->codes);
        unpack_fifth_bits(s.qh, b->codes);
        b->d = s.d;
        break;
    }
    case Q5_1: {
        FILE_BLOCK(block_q5_1, s);
        unpack_nibbles(s.qs, b->codes);
        unpack_fifth_bits(s.qh, b->codes);
        b->d = s.d;
        b->m = s.m;
        break;
    }
    case Q8_0: {
        FILE_BLOCK(block_q8_0, s);
        for (int i = 0; i < 8; i++)
            b->codes[i] = word((const uint8_t *)s.qs, i) ^ 0x80808080u; /* offset 128 */
        b->d = s.d;
        break;
    }
    case MXFP4: {
        FILE_BLOCK(block_mxfp4, s);
        unpack_nibbles(s.qs, b->codes);
        b->d = s.e;
        break;
    }
    case Q2_K: {
        FILE_BLOCK(block_q2_k, s);
        unpack_q2_k(&s, b);
        break;
    }
    case Q3_K: {
        FILE_BLOCK(block_q3_k, s);
        unpack_q3_k(&s, b);
        break;
    }
    case Q4_K: {
        FILE_BLOCK(block_q4_k, s);
        unpack_nibbles_k(s.qs, b->codes);
        unpack_scales_mins(s.scales, b);
        b->d = s.d;
        b->m = s.dmin;
        break;
    }
    case Q5_K: {
        FILE_BLOCK(block_q5_k, s);
        unpack_nibbles_k(s.qs, b->codes);
        unpack_ones_k(s.qh, b->codes, 4);
        unpack_scales_mins(s.scales, b);
        b->d = s.d;
        b->m = s.dmin;
        break;
    }
    case Q6_K: {
        FILE_BLOCK(block_q6_k, s);
        unpack_q6_k(&s, b);
        break;
    }
    case IQ4_XS: {
        FILE_BLOCK(block_iq4_xs, s);
        unpack_iq4_xs(&s, b);
        break;
    }
    }
}

/* ---- packing ---- */

static void put_word(uint8_t *vectors, int vector, int row, uint32_t w)
{
    memcpy(vectors + 64 * vector + 4 * row, &w, 4);
}

static void put_bytes(const uint32_t *codes, int row, uint8_t *out)
{
    for (int g = 0; g < 8; g++)
        put_word(out, g, row, codes[g]);
}

static void put_nibbles(const uint32_t *codes, int row, uint8_t *out)
{
    for (int j = 0; j < 4; j++)
        put_word(out, j, row, (codes[j] & LOW_NIBBLES) | (codes[j + 4] & LOW_NIBBLES) << 4);
}

/* Bits `at`, `at` + 1 of the codes. */
static void put_twos(const uint32_t *codes, int at, int row, uint8_t *out)
{
    for (int j = 0; j < 2; j++) {
        uint32_t w = 0;
        for (int i = 0; i < 4; i++)
            w |= (codes[4 * j + i] >> at & LOW_TWOS) << 2 * i;
        put_word(out, j, row, w);
    }
}

/* Bit `at` of the codes. */
static void put_ones(const uint32_t *codes, int at, int row, uint8_t *out)
{
    uint32_t w = 0;
    for (int g = 0; g < 8; g++)
        w |= (codes[g] >> at & LOW_ONES) << g;
    put_word(out, 0, row, w);
}

/* 32 codes of one row into the code block of its tile. */
static void put_codes(int kind, const uint32_t *codes, int row, uint8_t *out)
{
    switch (kind) {
    case Q8_0:
        put_bytes(codes, row, out);
        break;
    case Q2_K:
        put_twos(codes, 0, row, out);
        break;
    case Q3_K:
        put_twos(codes, 0, row, out);
        put_ones(codes, 2, row, out + 128);
        break;
    case Q5_0: case Q5_1: case Q5_K:
        put_nibbles(codes, row, out);
        put_ones(codes, 4, row, out + 256);
        break;
    case Q6_K:
        put_nibbles(codes, row, out);
        put_twos(codes, 4, row, out + 256);
        break;
    default:
        put_nibbles(codes, row, out);
    }
}

static void put_u16(uint8_t *out, int row, uint16_t v) { memcpy(out + 2 * row, &v, 2); }

/* formats.h, scales6: two 6-bit numbers for each of 8 blocks. */
static void put_scales6(const uint8_t *first, const uint8_t *second, int step, int row,
                        uint8_t *out)
{
    uint32_t low_first = 0, low_second = 0, high = 0;
    for (int b = 0; b < 8; b++) {
        uint32_t x = first[step * b], y = second[step * b];
        low_first |= (x & 15) << 4 * b;
        low_second |= (y & 15) << 4 * b;
        high |= (x >> 4 | y >> 4 << 2) << 4 * b;
    }
    put_word(out, 0, row, low_first);
    put_word(out, 1, row, low_second);
    put_word(out, 2, row, high);
}

/* The scales of one row's file block into the scale group of its tile. */
static void put_scales(int kind, const row_block *b, int row, uint8_t *out)
{
    switch (kind) {
    case MXFP4:
        out[row] = (uint8_t)b->d;
        return;
    case Q2_K:
        for (int i = 0; i < 16; i++)
            out[32 * (i / 2) + 2 * row + i % 2] = b->scale[i] | b->min[i] << 4;
        break;
    case Q3_K:
        put_scales6(b->scale, b->scale + 1, 2, row, out);
        break;
    case Q4_K: case Q5_K:
        put_scales6(b->scale, b->min, 1, row, out);
        break;
    case Q6_K:
        for (int i = 0; i < 16; i++)
            out[32 * (i / 2) + 2 * row + i % 2] = b->scale[i];
        break;
    case IQ4_XS: {
        uint32_t low = 0, high = 0;
        for (int i = 0; i < 8; i++) {
            low |= (uint32_t)(b->scale[i] & 15) << 4 * i;
            high |= (uint32_t)(b->scale[i] >> 4) << 2 * i;
        }
        put_word(out, 0, row, low);
        put_u16(out + 64, row, (uint16_t)high);
        break;
    }
    }
    put_u16(out + d_at(kind), row, b->d);
    if (formats[kind].form == FORM_MIN || formats[kind].form == FORM_SUB_MIN)
        put_u16(out + d_at(kind) + 32, row, b->m);
}

static void pack_block_tile(int kind, int64_t n_cols, const uint8_t *src, size_t row_bytes,
                            int n_rows, uint8_t *tile)
{
    const format_traits f = formats[kind];
    uint8_t *codes = tile + scale_plane_bytes(kind, n_cols);
    row_block b;
    for (int64_t i = 0; i < n_cols / f.file_cols; i++)
        for (int row = 0; row < n_rows; row++) {
            unpack_block(kind, src + row * row_bytes + i * f.file_bytes, &b);
            put_scales(kind, &b, row, tile + i * f.scale_bytes);
            for (int j = 0; j < f.file_cols / 32; j++)
                put_codes(kind, b.codes + 8 * j, row,
                          codes + (i * (f.file_cols / 32) + j) * f.code_bytes);
        }
}

static void pack_float_tile(int kind, int64_t n_cols, const uint8_t *src, size_t row_bytes,
                            int n_rows, uint8_t *tile)
{
    size_t size = (size_t)formats[kind].file_bytes;
    for (int64_t k = 0; k < n_cols; k++)
        for (int row = 0; row < n_rows; row++)
            memcpy(tile + (k * TILE_ROWS + row) * size, src + row * row_bytes + k * size, size);
}

void linear_pack(const packed_matrix *m, const uint8_t *src, int64_t tile_begin, int64_t tile_end)
{
    size_t row_bytes = linear_row_bytes(m->qtype, m->n_cols);
    for (int64_t i = tile_begin; i < tile_end; i++) {
        int64_t left = m->n_rows - i * TILE_ROWS;
        int n_rows = left < TILE_ROWS ? (int)left : TILE_ROWS;
        uint8_t *tile = m->data + i * m->tile_bytes;
        if (n_rows < TILE_ROWS) /* rows that are not there weigh nothing: code 0, scale 0 */
            memset(tile, 0, m->tile_bytes);
        (m->kind < F32 ? pack_block_tile : pack_float_tile)(
            m->kind, m->n_cols, src + i * TILE_ROWS * row_bytes, row_bytes, n_rows, tile);
    }
}

/* ---- dequantizing one row ---- */

static float block_scale(int kind, const row_block *b, int k)
{
    switch (kind) {
    case MXFP4: return float_of_e8m0_half((uint8_t)b->d);
    case Q2_K: return float_of_f16(b->d) * (float)b->scale[k / 16];
    case Q3_K: return float_of_f16(b->d) * (float)(b->scale[k / 16] - 32);
    case Q4_K: case Q5_K: return float_of_f16(b->d) * (float)b->scale[k / 32];
    case Q6_K: return float_of_f16(b->d) * (float)(int8_t)b->scale[k / 16];
    case IQ4_XS: return float_of_f16(b->d) * (float)(b->scale[k / 32] - 32);
    default: return float_of_f16(b->d);
    }
}

static float block_min(int kind, const row_block *b, int k)
{
    switch (kind) {
    case Q4_1: case Q5_1: return float_of_f16(b->m);
    case Q2_K: return -(float_of_f16(b->m) * (float)b->min[k / 16]);
    case Q4_K: case Q5_K: return -(float_of_f16(b->m) * (float)b->min[k / 32]);
    default: return 0.0f;
    }
}

static void dequantize_block(int kind, const row_block *b, float *out)
{
    const uint8_t *codes = (const uint8_t *)b->codes;
    const uint8_t *table = kind == IQ4_NL || kind == IQ4_XS ? iq4_table : NULL;
    if (kind == MXFP4)
        table = mxfp4_table;
    for (int k = 0; k < formats[kind].file_cols; k += 16) {
        float scale = block_scale(kind, b, k), min = block_min(kind, b, k);
        for (int i = k; i < k + 16; i++) {
            int q = (table ? table[codes[i]] : codes[i]) - formats[kind].offset;
            out[i] = scale * (float)q + min;
        }
    }
}

static void dequantize_floats(int kind, const uint8_t *src, int64_t n_cols, float *out)
{
    if (kind == F32) {
        memcpy(out, src, 4 * (size_t)n_cols);
        return;
    }
    for (int64_t k = 0; k < n_cols; k++) {
        uint16_t h;
        memcpy(&h, src + 2 * k, 2);
        out[k] = kind == F16 ? float_of_f16(h) : float_of_bf16(h);
    }
}

void linear_dequantize_row(int32_t qtype, const uint8_t *src, int64_t n_cols, float *out)
{
    int kind = kind_of_qtype(qtype);
    if (kind < 0)
        return;
    if (kind >= F32) {
        dequantize_floats(kind, src, n_cols, out);
        return;
    }
    row_block b;
    for (int64_t i = 0; i < n_cols / formats[kind].file_cols; i++) {
        unpack_block(kind, src + i * formats[kind].file_bytes, &b);
        dequantize_block(kind, &b, out + i * formats[kind].file_cols);
    }
}

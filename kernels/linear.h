/* Matrix products with block-quantized weights: what the rest of the kernels may call.
 *
 * A weight matrix is packed once, at load, into tiles of 16 interleaved rows (formats.h has the
 * layouts). A product is out[t, row] = sum over k of x[t, k] * w[row, k] (+ bias[row]). Its value
 * is the same bit for bit whatever the number of tokens, the range of tiles or the number of
 * threads: each (t, row) has its own float accumulator that takes the blocks in order of k, and
 * inside a block the sums are exact integers.
 */
#ifndef TINYCHAT_LINEAR_H
#define TINYCHAT_LINEAR_H

#include <stddef.h>
#include <stdint.h>

enum { TILE_ROWS = 16 };

typedef struct {            /* one weight matrix, rows interleaved by TILE_ROWS */
    int32_t qtype;          /* GGUF number of the source format */
    int32_t kind;           /* packed layout, see formats.h */
    int64_t n_rows, n_cols; /* N, K */
    size_t tile_bytes;      /* bytes of one tile, a multiple of 64 */
    uint8_t *data; /* 64-byte aligned, linear_tiles(m) * tile_bytes; the caller allocates after
                      linear_plan */
} packed_matrix;

static inline int64_t linear_tiles(const packed_matrix *m)
{
    return (m->n_rows + TILE_ROWS - 1) / TILE_ROWS;
}

/* Fills everything but `data`. Returns -1 for an unknown format, n_rows < 1, or n_cols < 1 or no
 * multiple of the block. */
int linear_plan(int32_t qtype, int64_t n_rows, int64_t n_cols, packed_matrix *out);

/* Bytes of one row of the ORIGINAL format; 0 where linear_plan would return -1. */
size_t linear_row_bytes(int32_t qtype, int64_t n_cols);

/* Packs tiles [tile_begin, tile_end) from `src`, the whole matrix as in the file (any alignment).
 * Disjoint ranges may run in different threads. */
void linear_pack(const packed_matrix *m, const uint8_t *src, int64_t tile_begin, int64_t tile_end);

/* 1: `linear` wants rows made by quantize_row; 0: rows of plain float32 (F32, F16, BF16). */
int linear_wants_int8(const packed_matrix *m);

/* Bytes of one quantized activation row, a multiple of 64. Rows must be 64-byte aligned. n_cols is
 * a multiple of 32. */
size_t linear_act_bytes(int64_t n_cols);

/* ---- rare.c: formats of 256 weights a block that become Q8_0 at load ---- */

/* Bytes of a block, and of the grid that its codes index, as gguf has it, in int8; 0: not such a
 * format. */
int rare_block_bytes(int32_t qtype);
int rare_grid_bytes(int32_t qtype);

/* n_blocks blocks of a format that is one -> 8 Q8_0 blocks each */
void rare_to_q8_0(int32_t qtype, const int8_t *grid, const uint8_t *src, int64_t n_blocks,
                  uint8_t *out);

typedef struct {
    const char *isa; /* "scalar" | "avx2" | "avx512_vnni" | "amx_int8" | "neon_dotprod" */

    /* x float32 (n_cols) -> act (linear_act_bytes(n_cols)); n_cols a multiple of 32 */
    void (*quantize_row)(const float *x, int64_t n_cols, void *act);

    /* out[t * ld + row] for the rows of tiles [tile_begin, tile_end) and tokens [0, n_tokens);
     * never writes past n_rows. act: quantized rows, or float32 rows when !linear_wants_int8(m),
     * act_stride bytes apart. bias (n_rows) or NULL. */
    void (*linear)(const packed_matrix *m, const void *act, size_t act_stride, int64_t n_tokens,
                   const float *bias, float *out, int64_t ld, int64_t tile_begin, int64_t tile_end);

    /* One row of the ORIGINAL bytes -> out float32 (n_cols): the embedding lookup. Nothing is done
     * for an unknown qtype. */
    void (*dequantize_row)(int32_t qtype, const uint8_t *src, int64_t n_cols, float *out);
} linear_table;

extern const linear_table linear_scalar;
#if defined(__x86_64__)
extern const linear_table linear_avx2;        /* needs avx2, fma, f16c */
extern const linear_table linear_avx512_vnni; /* needs avx512 f, bw, vl, dq, vnni, and the above */
#endif

/* Compilers know the instructions where the build's own target does not name them since GCC 8 and
 * clang 16. */
#if defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || \
    (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 8))
#define HAVE_NEON_DOTPROD 1
extern const linear_table linear_neon_dotprod; /* needs asimddp */
#else
#define HAVE_NEON_DOTPROD 0
#endif

/* Linux grants the tiles on request; compilers know them since GCC 11 and clang 12. */
#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAVE_AMX 1
extern const linear_table linear_amx; /* needs amx tile, int8, and the above */
#else
#define HAVE_AMX 0
#endif

#endif

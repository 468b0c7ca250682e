/* Matrix products: threads claim tiles of a matrix. */
#include "runner.h"

/* How a product is cut. A claim is a share of the tiles left, at least CLAIM_BYTES of weights for
 * each token, so that claiming costs little; within a claim, TILES_AT_ONCE tiles stay in the cache
 * while TOKENS_AT_ONCE pass by. */
enum { CLAIM_BYTES = 16384, TILES_AT_ONCE = 8, TOKENS_AT_ONCE = 128 };

void run_quantize(runner *r, const program_op *op, int thread)
{
    const size_t part_floats = linear_act_bytes(op->group) / sizeof(float);
    const int64_t n_parts = op->width / op->group;
    EACH_ROW(t)
        for (int64_t i = 0; i < n_parts; i++)
            r->table->linear->quantize_row(in_row(r, op, 0, t) + i * op->group, op->group,
                                           out_row(r, op, t) + i * part_floats);
}

void run_linear(runner *r, const program_op *op, int thread)
{
    (void)thread;
    const packed_matrix *m = &matrix_of(r, op)->packed;
    const float *bias = vector_of(r, op, 1);
    const int64_t tokens = n_rows(r, op), stride = r->slots[op->in[0]].stride,
                  ld = r->slots[op->out].stride;
    const int64_t least = at_least(CLAIM_BYTES / (int64_t)m->tile_bytes / at_least(tokens, 1), 1);
    range tiles;
    while (tokens > 0 && claim(r, op, linear_tiles(m), least, &tiles))
        for (int64_t tile = tiles.begin; tile < tiles.end; tile += TILES_AT_ONCE)
            for (int64_t t = 0; t < tokens; t += TOKENS_AT_ONCE)
                r->table->linear->linear(m, in_row(r, op, 0, t), (size_t)stride * sizeof(float),
                                         at_most(tokens - t, TOKENS_AT_ONCE), bias,
                                         out_row(r, op, t), ld, tile,
                                         at_most(tile + TILES_AT_ONCE, tiles.end));
}


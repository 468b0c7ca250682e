/* Matrix products: threads claim tiles of a matrix. */
#include "runner.h"

/* A claim is a share of the tiles left, at least CLAIM_BYTES of weights for each token, so that
 * claiming costs little. */
enum { CLAIM_BYTES = 16384 };

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
    const int64_t least =
        at_least(CLAIM_BYTES / (int64_t)m->tile_bytes / at_least(tokens, 1), tokens > 1 ? 2 : 1);
    range tiles;
    while (tokens > 0 && claim(r, op, linear_tiles(m), least, &tiles))
        r->table->linear->linear(m, in_row(r, op, 0, 0), (size_t)stride * sizeof(float), tokens,
                                 bias, out_row(r, op, 0), ld, tiles.begin, tiles.end);
}

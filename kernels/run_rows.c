/* Operations whose rows are independent of one another: each thread takes its range of them. */
#include <math.h>
#include <string.h>

#include "runner.h"

static void copy(float *to, const float *from, int64_t n)
{
    memcpy(to, from, (size_t)n * sizeof(float));
}

/* ---- rows in and out ---- */

static void look_up(const runner *r, const matrix *m, int64_t i, float *out)
{
    r->table->linear->dequantize_row(m->qtype, m->source + (size_t)i * m->row_bytes, m->n_cols,
                                     out);
}

void run_embed(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        look_up(r, matrix_of(r, op), r->step->tokens[t], out_row(r, op, t));
}

void run_outputs(runner *r, const program_op *op, int thread)
{
    EACH_ROW(i)
        copy(out_row(r, op, i), in_row(r, op, 0, r->step->outputs[i]), op->width);
}

/* ---- norms ---- */

void run_rmsnorm(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->rmsnorm(in_row(r, op, 0, t), vector_of(r, op, 0), op->width / op->group,
                          op->group, op->scalar, out_row(r, op, t));
}

/* ---- elementwise ---- */

void run_gate(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->gate(op->fn, in_row(r, op, 0, t), in_row(r, op, 1, t), op->width,
                       out_row(r, op, t));
}

void run_add(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->add(in_row(r, op, 0, t), in_row(r, op, 1, t), op->scalar, op->width,
                      out_row(r, op, t));
}

void run_scale(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->scale(in_row(r, op, 0, t), op->scalar, op->width, out_row(r, op, t));
}

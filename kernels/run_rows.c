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

void run_embed_positions(runner *r, const program_op *op, int thread)
{
    const matrix *m = matrix_of(r, op);
    EACH_ROW(t)
        look_up(r, m, at_most(r->step->positions[t], m->n_rows - 1), out_row(r, op, t));
}

/* The batch's input row of token t from column op->begin on; NULL: it has none */
static const float *input_of(const runner *r, const program_op *op, int64_t t)
{
    const int32_t i = r->step->input_rows[t];
    return i < 0 ? NULL : r->step->inputs + i * r->input_width + op->begin;
}

void run_given(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t) {
        const float *given = input_of(r, op, t);
        if (given)
            copy(out_row(r, op, t), given, op->width);
        else
            memset(out_row(r, op, t), 0, (size_t)op->width * sizeof(float));
    }
}

void run_place(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t) {
        const float *given = input_of(r, op, t);
        copy(out_row(r, op, t), given ? given : in_row(r, op, 0, t), op->width);
    }
}

void run_columns(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        copy(out_row(r, op, t), in_row(r, op, 0, t) + op->begin, op->width);
}

void run_join(runner *r, const program_op *op, int thread)
{
    const int64_t first = op->group / op->n_head, second = op->width / op->n_head - first;
    EACH_ROW(t)
        for (int64_t h = 0; h < op->n_head; h++) {
            float *out = out_row(r, op, t) + h * (first + second);
            copy(out, in_row(r, op, 0, t) + h * first, first);
            copy(out + first, in_row(r, op, 1, t) + h * second, second);
        }
}

void run_outputs(runner *r, const program_op *op, int thread)
{
    EACH_ROW(i)
        copy(out_row(r, op, i), in_row(r, op, 0, r->step->outputs[i]), op->width);
}

/* ---- norms ---- */

/* One weight for each value of a group serves every group; one for each value of a row, its own. */
static norm_weights norm_weights_of(const runner *r, const program_op *op)
{
    int64_t step[2] = {0, 0};
    for (int i = 0; i < 2; i++)
        if (op->weights[i] >= 0 && r->vectors[op->weights[i]].n > op->group)
            step[i] = op->group;
    return (norm_weights){.scale = vector_of(r, op, 0), .bias = vector_of(r, op, 1),
                          .scale_step = step[0], .bias_step = step[1]};
}

void run_rmsnorm(runner *r, const program_op *op, int thread)
{
    const norm_weights w = norm_weights_of(r, op);
    EACH_ROW(t)
        r->table->rmsnorm(&w, in_row(r, op, 0, t), op->width / op->group, op->group, op->scalar,
                          out_row(r, op, t));
}

void run_layernorm(runner *r, const program_op *op, int thread)
{
    const norm_weights w = norm_weights_of(r, op);
    EACH_ROW(t)
        r->table->layernorm(&w, in_row(r, op, 0, t), op->width / op->group, op->group, op->scalar,
                            out_row(r, op, t));
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

void run_activate(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->activate(op->fn, in_row(r, op, 0, t), op->width, out_row(r, op, t));
}

void run_softcap(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->softcap(in_row(r, op, 0, t), op->scalar, op->width, out_row(r, op, t));
}

void run_add_vector(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->add(in_row(r, op, 0, t), vector_of(r, op, 0), 1.0f, op->width,
                      out_row(r, op, t));
}

void run_mul_vector(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->mul(in_row(r, op, 0, t), vector_of(r, op, 0), op->width, out_row(r, op, t));
}

void run_mul_column(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t)
        r->table->scale(in_row(r, op, 0, t), in_row(r, op, 1, t)[0], op->width, out_row(r, op, t));
}

/* floor((position + offset) / length), length > 0 */
static int64_t whole_lengths(const program_op *op, int64_t position)
{
    const int64_t n = position + op->offset;
    return n / op->length - (n % op->length < 0);
}

void run_temper(runner *r, const program_op *op, int thread)
{
    EACH_ROW(t) {
        const double lengths = (double)whole_lengths(op, r->step->positions[t]);
        r->table->scale(in_row(r, op, 0, t), (float)(1.0 + (double)op->scalar * log1p(lengths)),
                        op->width, out_row(r, op, t));
    }
}

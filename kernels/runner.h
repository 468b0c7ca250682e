/* What the files of operations, run_*.c, share: who does which rows, and where they lie. */
#ifndef TINYCHAT_RUNNER_H
#define TINYCHAT_RUNNER_H

#include <stdatomic.h>

#include "kernels.h"

/* A thread's part of one operation. */
typedef void run_op(runner *r, const program_op *op, int thread);

#define RUN_OP(name) run_op run_##name;
OPERATIONS(RUN_OP)
#undef RUN_OP

typedef struct {
    int64_t begin, end;
} range;

static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static inline float *row(const runner *r, int32_t slot, int64_t i)
{
    return r->slots[slot].data + i * r->slots[slot].stride;
}

static inline float *out_row(const runner *r, const program_op *op, int64_t i)
{
    return row(r, op->out, i);
}

static inline const float *in_row(const runner *r, const program_op *op, int which, int64_t i)
{
    return row(r, op->in[which], i);
}

/* NULL where the operation has no such weight */
static inline const float *vector_of(const runner *r, const program_op *op, int which)
{
    return op->weights[which] < 0 ? NULL : r->vectors[op->weights[which]].data;
}

static inline const matrix *matrix_of(const runner *r, const program_op *op)
{
    return &r->matrices[op->weights[0]];
}

static inline packed_matrix packed_part(const matrix *m, int64_t part)
{
    packed_matrix packed = m->packed;
    packed.data += (size_t)part * m->part_bytes;
    return packed;
}

static inline int64_t n_rows(const runner *r, const program_op *op)
{
    return op->outputs ? r->step->n_outputs : r->step->n_tokens;
}

/* This thread's rows: the same for every operation of a step, so that rows pass from one to the
 * next without waiting. */
static inline range my_rows(const runner *r, const program_op *op, int thread)
{
    const int64_t n = n_rows(r, op), threads = pool_size(r->pool);
    return (range){(n * thread + threads - 1) / threads,
                   (n * (thread + 1) + threads - 1) / threads};
}

/* The next items of this operation that nobody has claimed: many at first, few at the end. */
static inline int claim(runner *r, const program_op *op, int64_t total, int64_t least, range *out)
{
    _Atomic int64_t *next = &r->claims[op - r->ops].next;
    int64_t begin = atomic_load_explicit(next, memory_order_relaxed);
    int64_t n;
    do {
        if (begin >= total)
            return 0;
        n = at_most(at_least((total - begin) / (2 * pool_size(r->pool)), least), total - begin);
    } while (!atomic_compare_exchange_weak_explicit(next, &begin, begin + n, memory_order_relaxed,
                                                    memory_order_relaxed));
    *out = (range){begin, begin + n};
    return 1;
}

/* For each of this thread's rows i. */
#define EACH_ROW(i) \
    for (int64_t i = my_rows(r, op, thread).begin, i##_end = my_rows(r, op, thread).end; \
         i < i##_end; i++)

#endif

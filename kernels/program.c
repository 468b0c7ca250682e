/* One step: every thread walks the list of operations, doing its part of each. */
#include "runner.h"

#define RUN_ROW(name) [OP_##name] = run_##name,
static run_op *const run_table[OP_KINDS] = {OPERATIONS(RUN_ROW)};
#undef RUN_ROW

#define NAME(name) #name,
static const char *const op_names[OP_KINDS] = {OPERATIONS(NAME)};
static const char *const activation_names[FN_KINDS] = {ACTIVATIONS(NAME)};
#undef NAME

const char *op_name(int kind) { return kind < OP_KINDS ? op_names[kind] : NULL; }
const char *activation_name(int fn) { return fn < FN_KINDS ? activation_names[fn] : NULL; }

static void walk(void *arg, int thread)
{
    runner *r = arg;
    for (const program_op *op = r->ops; op < r->ops + r->n_ops; op++) {
        if (op->barrier)
            pool_barrier(r->pool, thread);
        run_table[op->kind](r, op, thread);
    }
}

void runner_step(runner *r, const batch *b)
{
    r->step = b;
    for (int64_t i = 0; i < r->n_ops; i++)
        atomic_store_explicit(&r->claims[i].next, 0, memory_order_relaxed);
    pool_run(r->pool, walk, r);
    r->step = NULL;
}


/* One step: every thread walks the list of operations, doing its part of each. */
#include "runner.h"

static run_op *const run_table[OP_KINDS] = {
    [OP_embed] = run_embed, [OP_rmsnorm] = run_rmsnorm, [OP_quantize] = run_quantize,
    [OP_linear] = run_linear, [OP_rope_table] = run_rope_table, [OP_rope] = run_rope,
    [OP_store_kv] = run_store_kv, [OP_attend] = run_attend, [OP_gate] = run_gate,
    [OP_add] = run_add, [OP_scale] = run_scale, [OP_outputs] = run_outputs,
    [OP_embed_positions] = run_embed_positions, [OP_given] = run_given, [OP_place] = run_place,
    [OP_layernorm] = run_layernorm, [OP_activate] = run_activate, [OP_softcap] = run_softcap,
    [OP_add_vector] = run_add_vector, [OP_mul_vector] = run_mul_vector,
    [OP_mul_column] = run_mul_column, [OP_columns] = run_columns, [OP_join] = run_join,
    [OP_temper] = run_temper, [OP_head_linear] = run_head_linear, [OP_route] = run_route,
    [OP_experts] = run_experts, [OP_weigh] = run_weigh, [OP_mix] = run_mix, [OP_conv] = run_conv,
    [OP_mamba2] = run_mamba2, [OP_delta_net] = run_delta_net,
};

#define NAME(name) #name,
static const char *const op_names[OP_KINDS] = {OPERATIONS(NAME)};
static const char *const activation_names[FN_KINDS] = {ACTIVATIONS(NAME)};
#undef NAME

int runner_has(int kind) { return run_table[kind] != NULL; }
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


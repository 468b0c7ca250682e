/* The kernels behind a pipe, for tests of another architecture's under an emulator (helpers_neon.py
 * is the other end). It does what _kernels.pyx does, and trusts what it is told.
 *
 * A message, either way: int64 n, then n times int64 n_bytes and the bytes. The first array of a
 * request is the name of a command. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MAX_ARRAYS = 1024 };

typedef struct {
    int64_t n;
    void *data[MAX_ARRAYS];
    int64_t n_bytes[MAX_ARRAYS];
} message;

static void fail(const char *what)
{
    fprintf(stderr, "neon_driver: %s\n", what);
    exit(1);
}

/* n_bytes zeroed bytes and a cache line more, on a cache line */
static void *taken(int64_t n_bytes)
{
    const size_t size = ((size_t)n_bytes + 2 * MEMORY_ALIGN) / MEMORY_ALIGN * MEMORY_ALIGN;
    void *memory = aligned_alloc(MEMORY_ALIGN, size);
    if (!memory)
        fail("out of memory");
    return memset(memory, 0, size);
}

static void get(void *to, int64_t n_bytes)
{
    if (n_bytes && fread(to, (size_t)n_bytes, 1, stdin) != 1)
        fail("a message broke off");
}

static void put(const void *from, int64_t n_bytes)
{
    fwrite(&n_bytes, sizeof n_bytes, 1, stdout);
    fwrite(from, 1, (size_t)n_bytes, stdout);
}

/* 0 where there is none any more */
static int read_message(message *m)
{
    if (fread(&m->n, sizeof m->n, 1, stdin) != 1)
        return 0;
    if (m->n < 1 || m->n > MAX_ARRAYS)
        fail("a message of too many arrays");
    for (int64_t i = 0; i < m->n; i++) {
        get(&m->n_bytes[i], sizeof *m->n_bytes);
        m->data[i] = taken(m->n_bytes[i]);
        get(m->data[i], m->n_bytes[i]);
    }
    return 1;
}

static void free_message(message *m)
{
    for (int64_t i = 0; i < m->n; i++)
        free(m->data[i]);
}

static void begin_reply(int64_t n) { fwrite(&n, sizeof n, 1, stdout); }

static void reply(const void *data, int64_t n_bytes)
{
    begin_reply(1);
    put(data, n_bytes);
}

static const void *or_null(const message *m, int i) { return m->n_bytes[i] ? m->data[i] : NULL; }

static const kernel_table *table_of(const char *isa)
{
    const kernel_table *const *table = kernel_tables();
    while (*table && strcmp((*table)->isa, isa) != 0)
        table++;
    if (!*table)
        fail("no such instruction set");
    return *table;
}

/* ---- one product ---- */

/* isa; qtype, n_rows, n_cols, n_tokens, first and last tile; weights; x; bias */
static void run_linear_once(const message *m)
{
    const linear_table *table = table_of(m->data[1])->linear;
    const int64_t *n = m->data[2], n_rows = n[1], n_cols = n[2], n_tokens = n[3];
    const float *x = m->data[4];
    packed_matrix w;
    if (linear_plan((int32_t)n[0], n_rows, n_cols, &w))
        fail("no such matrix");
    w.data = taken(linear_tiles(&w) * (int64_t)w.tile_bytes);
    linear_pack(&w, m->data[3], n[4], n[5]);
    const int int8 = linear_wants_int8(&w);
    const size_t stride = int8 ? linear_act_bytes(n_cols) : (size_t)n_cols * sizeof(float);
    uint8_t *act = taken((int64_t)stride * n_tokens);
    for (int64_t t = 0; t < n_tokens; t++)
        if (int8)
            table->quantize_row(x + t * n_cols, n_cols, act + t * (int64_t)stride);
        else
            memcpy(act + t * (int64_t)stride, x + t * n_cols, stride);
    float *out = taken(n_tokens * n_rows * 4);
    table->linear(&w, act, stride, n_tokens, or_null(m, 5), out, n_rows, n[4], n[5]);
    begin_reply(2);
    put(out, n_tokens * n_rows * 4);
    put(act, int8 ? (int64_t)stride * n_tokens : 0);
    free(w.data);
    free(act);
    free(out);
}

/* ---- programs ---- */

typedef struct {
    runner r;
    float *result;
    message arrays;
} made;

static void *copied(const message *m, int i)
{
    void *memory = calloc((size_t)m->n_bytes[i] + 1, 1);
    return memory ? memcpy(memory, m->data[i], (size_t)m->n_bytes[i]) : NULL;
}

static void set_slots(runner *r, const int64_t *slots, int64_t n)
{
    r->n_slots = n;
    r->slots = calloc((size_t)n + 1, sizeof *r->slots);
    for (int64_t i = 0; i < n; i++)
        r->slots[i] = (slot){.stride = slots[2 * i], .outputs = (int32_t)slots[2 * i + 1]};
}

static void set_matrix(matrix *w, const int64_t *n, const uint8_t *source)
{
    *w = (matrix){.qtype = (int32_t)n[0], .n_parts = n[1], .n_rows = n[2], .n_cols = n[3],
                  .row_bytes = linear_row_bytes((int32_t)n[0], n[3]), .source = source};
    if (n[4] && linear_plan(w->qtype, w->n_rows, w->n_cols, &w->packed))
        fail("no such matrix");
}

/* What follows the fixed arrays: vectors; matrices (numbers, bytes); ropes (numbers, inv_freq,
 * axes). */
static void set_weights(runner *r, const message *m, int at, int64_t n_vectors, int64_t n_matrices,
                        int64_t n_ropes)
{
    r->n_vectors = n_vectors;
    r->n_matrices = n_matrices;
    r->n_ropes = n_ropes;
    r->vectors = calloc((size_t)n_vectors + 1, sizeof *r->vectors);
    r->matrices = calloc((size_t)n_matrices + 1, sizeof *r->matrices);
    r->ropes = calloc((size_t)n_ropes + 1, sizeof *r->ropes);
    for (int64_t i = 0; i < n_vectors; i++, at++)
        r->vectors[i] = (vector){m->data[at], m->n_bytes[at] / 4};
    for (int64_t i = 0; i < n_matrices; i++, at += 2)
        set_matrix(&r->matrices[i], m->data[at], m->data[at + 1]);
    for (int64_t i = 0; i < n_ropes; i++, at += 3) {
        const double *n = m->data[at];
        r->ropes[i] = (rope){(int32_t)n[0], (int32_t)(m->n_bytes[at + 1] / 2), (float)n[1],
                             m->data[at + 1], or_null(m, at + 2)};
    }
}

/* isa; sizes; ops; attentions; routings; mamba2s; delta_nets; slots; kv; states; weights */
static void build(message *m)
{
    made *it = calloc(1, sizeof *it);
    runner *r = &it->r;
    const int64_t *n = m->data[2], *states = m->data[10];
    const kv_shape *kv = m->data[9];
    it->arrays = *m;
    r->table = table_of(m->data[1]);
    r->n_ids = n[0], r->window = n[1], r->input_width = n[2], r->n_axes = n[3], r->n_spans = n[4];
    r->n_pages = n[5], r->n_window_pages = n[6], r->n_states = n[7];
    r->max_tokens = n[8], r->max_outputs = n[9], r->max_sequences = n[10];
    r->ops = copied(m, 3);
    r->n_ops = m->n_bytes[3] / (int64_t)sizeof *r->ops;
    r->attentions = copied(m, 4);
    r->routings = copied(m, 5);
    r->mamba2s = copied(m, 6);
    r->delta_nets = copied(m, 7);
    set_slots(r, m->data[8], m->n_bytes[8] / 16);
    r->n_kv = m->n_bytes[9] / (int64_t)sizeof *kv;
    r->kv = calloc((size_t)r->n_kv + 1, sizeof *r->kv);
    for (int64_t i = 0; i < r->n_kv; i++)
        r->kv[i] = (kv_layer){.shape = kv[i], .type = (int32_t)n[11]};
    r->n_recurrent = m->n_bytes[10] / 8;
    r->states = calloc((size_t)r->n_recurrent + 1, sizeof *r->states);
    for (int64_t i = 0; i < r->n_recurrent; i++)
        r->states[i].n_floats = states[i];
    slot *last = &r->slots[n[12]];
    last->data = it->result = taken(r->max_outputs * last->stride * 4);
    set_weights(r, m, 11, n[14], n[15], n[16]);
    r->pool = pool_create((int)n[13]);
    if (!r->pool || runner_build(r))
        fail("a program could not be built");
    const int64_t answer[] = {(int64_t)(intptr_t)it, (int64_t)r->weight_bytes,
                              (int64_t)r->kv_bytes, (int64_t)r->state_bytes};
    reply(answer, sizeof answer);
}

static made *made_of(const message *m) { return (made *)(intptr_t)*(int64_t *)m->data[1]; }

/* handle; width of the result; max_pages; then the arrays of a batch, empty where it has none */
static void step(const message *m)
{
    made *it = made_of(m);
    const int64_t *n = m->data[1];
    const batch b = {
        .tokens = m->data[2], .positions = m->data[3], .sequences = m->data[4],
        .pages = or_null(m, 5), .outputs = or_null(m, 6),
        .window_pages = it->r.window ? or_null(m, 7) : NULL,
        .states = or_null(m, 8), .inputs = or_null(m, 9), .input_rows = or_null(m, 10),
        .axes = or_null(m, 11), .spans = or_null(m, 12), .n_tokens = m->n_bytes[2] / 4,
        .n_sequences = m->n_bytes[5] / 4 / n[2], .max_pages = n[2],
        .n_outputs = m->n_bytes[6] / 4,
        .n_inputs = it->r.input_width ? m->n_bytes[9] / 4 / it->r.input_width : 0};
    if (!runner_accepts(&it->r, &b)) {
        reply("", 0);
        return;
    }
    runner_step(&it->r, &b);
    begin_reply(2);
    put("accepted", 8);
    put(it->result, b.n_outputs * n[1] * 4);
}

static void forget(message *m)
{
    made *it = made_of(m);
    runner_free(&it->r);
    free_message(&it->arrays);
    free(it->result);
    free(it);
    reply("", 0);
}

/* isa; coin, temperature, top_p, min_p, repeat_penalty, top_k; logits; recent ids */
static void sample(const message *m)
{
    const double *n = m->data[2];
    sample_memory memory = {.n_vocab = m->n_bytes[3] / 4};
    memory.penalized = taken(memory.n_vocab * 4);
    memory.maxima = taken((memory.n_vocab / SAMPLE_GROUP + 1) * 4);
    memory.ranking = taken(memory.n_vocab * (int64_t)sizeof *memory.ranking);
    const sample_params params = {n[1], n[2], n[3], n[4], (int64_t)n[5]};
    const int64_t id = sample_logits(table_of(m->data[1]), &memory, m->data[3], &params,
                                     m->data[4], m->n_bytes[4] / 8, n[0]);
    free(memory.penalized);
    free(memory.maxima);
    free(memory.ranking);
    reply(&id, sizeof id);
}

int main(void)
{
    message m;
    while (read_message(&m)) {
        const char *command = m.data[0];
        const int keeps = strcmp(command, "build") == 0;
        if (keeps)
            build(&m);
        else if (strcmp(command, "linear") == 0)
            run_linear_once(&m);
        else if (strcmp(command, "step") == 0)
            step(&m);
        else if (strcmp(command, "copy") == 0) {
            const int64_t *n = m.data[1];
            runner_copy_state(&made_of(&m)->r, n[1], n[2]);
            reply("", 0);
        } else if (strcmp(command, "free") == 0)
            forget(&m);
        else if (strcmp(command, "sample") == 0)
            sample(&m);
        else
            fail("no such command");
        fflush(stdout);
        if (!keeps)
            free_message(&m);
    }
    return 0;
}

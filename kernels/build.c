/* A runner's memory: taken once, here, and given back. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runner.h"

/* Zeroed pages that cost nothing until they are touched; NULL when there is no room. */
static uint8_t *map_memory(size_t n_bytes)
{
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
#if defined(MADV_HUGEPAGE)
    madvise(memory, n_bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

static int64_t slot_rows(const runner *r, const slot *s)
{
    return s->outputs ? r->max_outputs : r->max_tokens;
}

static int place_slots(runner *r)
{
    const size_t scratch = r->scratch_floats * (size_t)pool_size(r->pool);
    size_t floats = scratch;
    for (int64_t i = 0; i < r->n_slots; i++)
        floats += r->slots[i].data ? 0 : (size_t)(slot_rows(r, &r->slots[i]) * r->slots[i].stride);
    r->arena_bytes = floats * sizeof(float) + MEMORY_ALIGN;
    if (!(r->arena = map_memory(r->arena_bytes)))
        return -1;
    float *next = (float *)r->arena;
    for (int64_t i = 0; i < r->n_slots; i++)
        if (!r->slots[i].data) {
            r->slots[i].data = next;
            next += slot_rows(r, &r->slots[i]) * r->slots[i].stride;
        }
    r->scratch = next;
    return 0;
}

static size_t n_blocks(const runner *r, const kv_layer *kv)
{
    return (size_t)kv->shape.n_head_kv *
           (size_t)(kv->shape.has_reach ? r->n_window_pages : r->n_pages);
}

/* One KV head's keys or values in a page */
static size_t page_bytes(int32_t type, int32_t length)
{
    const size_t n = PAGE_TOKENS * (size_t)length;
    if (type != KV_Q8_0)
        return n * (type == KV_F16 ? 2 : 4);
    return n + PAGE_TOKENS * sizeof(uint16_t) * (size_t)((length + KV_GROUP - 1) / KV_GROUP);
}

static int place_kv(runner *r)
{
    r->kv_bytes = 0;
    for (int64_t i = 0; i < r->n_kv; i++) {
        kv_layer *kv = &r->kv[i];
        kv->value_stride = (int32_t)round_up(kv->shape.value_length, ROW_FLOATS);
        kv->key_block_bytes = page_bytes(kv->type, kv->shape.key_length);
        kv->value_block_bytes = page_bytes(kv->type, kv->value_stride);
        r->kv_bytes += (kv->key_block_bytes + kv->value_block_bytes) * n_blocks(r, kv);
        const int64_t page = kv->type == KV_Q8_0 ? PAGE_TOKENS * (int64_t)kv->shape.key_length : 0,
                      rows = BLOCK_ROWS + (page ? PAGE_TOKENS : 0);
        r->scratch_floats =
            (size_t)at_least((int64_t)r->scratch_floats, page + rows * kv->value_stride);
    }
    if (r->kv_bytes && !(r->kv_memory = map_memory(r->kv_bytes)))
        return -1;
    uint8_t *next = r->kv_memory;
    for (int64_t i = 0; i < r->n_kv; i++) {
        kv_layer *kv = &r->kv[i];
        kv->keys = next;
        kv->values = next += kv->key_block_bytes * n_blocks(r, kv);
        next += kv->value_block_bytes * n_blocks(r, kv);
    }
    return 0;
}

/* What the threads need for routing and for gathering the tokens of an expert. */
static void count_scratch(runner *r)
{
    int64_t most = (int64_t)r->scratch_floats;
    for (const program_op *op = r->ops; op < r->ops + r->n_ops; op++) {
        if (op->kind == OP_route)
            most = at_least(most, 4 * (int64_t)r->routings[op->params].n_expert);
        if (op->kind == OP_experts)
            most = at_least(most, EXPERT_TOKENS * (r->slots[op->in[0]].stride +
                                                   EXPERT_TILES * TILE_ROWS));
    }
    r->scratch_floats = (size_t)round_up(most, ROW_FLOATS);
}

static int place_states(runner *r)
{
    size_t floats = 0;
    for (int64_t i = 0; i < r->n_recurrent; i++)
        floats += (size_t)(r->states[i].n_floats * r->n_states);
    r->state_bytes = floats * sizeof(float);
    if (floats && !(r->state_memory = map_memory(r->state_bytes)))
        return -1;
    float *next = (float *)r->state_memory;
    for (int64_t i = 0; i < r->n_recurrent; i++) {
        r->states[i].data = next;
        next += r->states[i].n_floats * r->n_states;
    }
    return 0;
}

static int place_weights(runner *r)
{
    r->weight_bytes = 0;
    for (int64_t i = 0; i < r->n_matrices; i++) {
        matrix *m = &r->matrices[i];
        m->part_bytes =
            m->packed.tile_bytes ? (size_t)linear_tiles(&m->packed) * m->packed.tile_bytes : 0;
        r->weight_bytes += m->part_bytes * (size_t)m->n_parts;
    }
    if (r->weight_bytes && !(r->weights = map_memory(r->weight_bytes)))
        return -1;
    uint8_t *next = r->weights;
    for (int64_t i = 0; i < r->n_matrices; i++) {
        r->matrices[i].packed.data = next;
        next += r->matrices[i].part_bytes * (size_t)r->matrices[i].n_parts;
    }
    return 0;
}

/* The whole pages of these bytes of a mapped file leave memory; a later look reads them from the
 * file again. */
static void give_back(const uint8_t *begin, const uint8_t *end)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)begin + page - 1) / page * page,
                    last = (uintptr_t)end / page * page;
    if (first < last)
        madvise((void *)first, last - first, MADV_DONTNEED);
}

/* This thread's share of the tiles of one part. */
static void pack_part(const matrix *m, int64_t part, int64_t thread, int64_t threads)
{
    const packed_matrix packed = packed_part(m, part);
    const uint8_t *source = m->source + (size_t)(part * m->n_rows) * m->row_bytes;
    const int64_t tiles = linear_tiles(&packed), begin = tiles * thread / threads,
                  end = tiles * (thread + 1) / threads;
    linear_pack(&packed, source, begin, end);
    if (m->is_mapped)
        give_back(source + (size_t)begin * TILE_ROWS * m->row_bytes,
                  source + (size_t)at_most(end * TILE_ROWS, m->n_rows) * m->row_bytes);
}

static void pack(void *arg, int thread)
{
    const runner *r = arg;
    for (int64_t i = 0; i < r->n_matrices; i++)
        for (int64_t part = 0; r->matrices[i].part_bytes && part < r->matrices[i].n_parts; part++)
            pack_part(&r->matrices[i], part, thread, pool_size(r->pool));
}

static void *zeroed(int64_t n, size_t size) { return calloc((size_t)at_least(n, 1), size); }

const char *runner_build(runner *r)
{
    r->claims = zeroed(r->n_ops, sizeof *r->claims);
    r->first = zeroed(r->max_sequences, sizeof *r->first);
    r->last = zeroed(r->max_sequences, sizeof *r->last);
    r->taken = zeroed(r->n_states, sizeof *r->taken);
    if (!r->claims || !r->first || !r->last || !r->taken || place_kv(r) || place_states(r))
        return "out of memory";
    count_scratch(r);
    if (place_slots(r) || place_weights(r))
        return "out of memory";
    pool_run(r->pool, pack, r);
    return NULL;
}

void runner_free(runner *r)
{
    pool_destroy(r->pool);
    if (r->arena)
        munmap(r->arena, r->arena_bytes);
    if (r->weights)
        munmap(r->weights, r->weight_bytes);
    if (r->kv_memory)
        munmap(r->kv_memory, r->kv_bytes);
    if (r->state_memory)
        munmap(r->state_memory, r->state_bytes);
    void *const taken[] = {r->claims, r->first, r->last, r->taken, r->ops, r->slots, r->matrices,
                           r->vectors, r->ropes, r->attentions, r->routings, r->mamba2s,
                           r->delta_nets, r->kv, r->states};
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        free(taken[i]);
    memset(r, 0, sizeof *r);
}

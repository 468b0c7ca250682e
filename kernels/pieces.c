#include "pieces.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the table: open addressing, at least two slots for three pieces ---- */

static const uint64_t MULTIPLIER = 0x9E3779B97F4A7C15; /* 2^64 over the golden ratio */

static uint64_t load_8(const uint8_t *s) { uint64_t x; memcpy(&x, s, 8); return x; }
static uint64_t load_4(const uint8_t *s) { uint32_t x; memcpy(&x, s, 4); return x; }

static uint64_t mixed(uint64_t h, uint64_t x)
{
    h = (h ^ x) * MULTIPLIER;
    return h ^ h >> 29;
}

/* Up to 8 bytes are read from both ends, where they may overlap: the length is in the hash too. */
static uint64_t hash_of(uint64_t seed, const uint8_t *s, uint32_t n)
{
    uint64_t h = seed + n;
    for (; n > 8; n -= 8, s += 8)
        h = mixed(h, load_8(s)) + seed;
    const uint64_t rest = n >= 4 ? load_4(s) | load_4(s + n - 4) << 32
                          : n ? s[0] | (uint64_t)s[n / 2] << 8 | (uint64_t)s[n - 1] << 16 : 0;
    return mixed(mixed(h, rest), seed);
}

int pieces_init(piece_table *t, int32_t n_pieces, uint64_t seed)
{
    uint32_t n_slots = 16;
    while (n_slots < (uint32_t)n_pieces + (uint32_t)n_pieces / 2)
        n_slots *= 2;
    *t = (piece_table){.seed = seed, .slot_mask = n_slots - 1, .room = n_pieces,
                       .text_room = (uint32_t)n_pieces * 8 + 16};
    t->text = malloc(t->text_room);
    t->pieces = malloc(((size_t)n_pieces + 1) * sizeof *t->pieces);
    t->slots = malloc(n_slots * sizeof *t->slots);
    t->marks = calloc(n_slots, 1);
    if (t->text == NULL || t->pieces == NULL || t->slots == NULL ||
        t->marks == NULL)
        return -1;
    memset(t->slots, 0xFF, n_slots * sizeof *t->slots); /* NO_PIECE */
    return 0;
}

void pieces_free(piece_table *t)
{
    free(t->text);
    free(t->pieces);
    free(t->ways);
    free(t->slots);
    free(t->marks);
}

static int is_piece(const piece_table *t, int32_t i, const uint8_t *text, uint32_t n)
{
    return t->pieces[i].n_bytes == n && memcmp(t->text + t->pieces[i].begin, text, n) == 0;
}

/* The slot of this text, or the empty one where it would stand. */
static piece_slot *slot_of(const piece_table *t, const uint8_t *text, uint32_t n, uint64_t hash)
{
    for (uint32_t at = (uint32_t)hash;; at++) {
        piece_slot *slot = &t->slots[at & t->slot_mask];
        if (slot->piece == NO_PIECE)
            return slot;
        if (slot->check == hash >> 32 && is_piece(t, slot->piece, text, n))
            return slot;
    }
}

static uint8_t *mark_of(const piece_table *t, uint64_t hash)
{
    return &t->marks[hash >> 24 & t->slot_mask];
}

int32_t pieces_find(const piece_table *t, const uint8_t *text, uint32_t n)
{
    if (n == 0 || n > t->longest[text[0]])
        return NO_PIECE;
    const uint64_t hash = hash_of(t->seed, text, n);
    if (!(*mark_of(t, hash) >> (hash >> 61) & 1))
        return NO_PIECE;
    return slot_of(t, text, n, hash)->piece;
}

int32_t pieces_find_near(const piece_table *t, const uint8_t *text, uint32_t n, int32_t guess)
{
    const int is_right = 0 <= guess && guess < t->n_pieces && is_piece(t, guess, text, n);
    return is_right ? guess : pieces_find(t, text, n);
}

int32_t pieces_add(piece_table *t, const uint8_t *text, uint32_t n)
{
    const uint64_t hash = hash_of(t->seed, text, n);
    piece_slot *slot = slot_of(t, text, n, hash);
    if (slot->piece != NO_PIECE)
        return slot->piece;
    if (t->n_pieces == t->room)
        return -1;
    while (n > t->text_room - t->text_bytes) {
        uint8_t *more = t->text_room < UINT32_MAX / 2 ? realloc(t->text, t->text_room * 2) : NULL;
        if (more == NULL)
            return -1;
        t->text = more;
        t->text_room *= 2;
    }
    memcpy(t->text + t->text_bytes, text, n);
    t->pieces[t->n_pieces] = (piece){t->text_bytes, n, NO_PIECE, NO_PIECE};
    t->text_bytes += n;
    if (t->longest[text[0]] < n)
        t->longest[text[0]] = n;
    *mark_of(t, hash) |= (uint8_t)(1 << (hash >> 61));
    *slot = (piece_slot){(uint32_t)(hash >> 32), t->n_pieces};
    return t->n_pieces++;
}

int pieces_make_room(piece_table *t, int32_t n_ways)
{
    join_way *more = realloc(t->ways, ((size_t)t->n_ways + (size_t)n_ways + 1) * sizeof *more);
    if (more == NULL)
        return -1;
    t->ways = more;
    return 0;
}

void pieces_add_way(piece_table *t, int32_t piece, uint32_t cut, double rank)
{
    int32_t *link = &t->pieces[piece].way;
    for (; *link != NO_PIECE; link = &t->ways[*link].next)
        if (t->ways[*link].cut == cut)
            return;
    t->ways[t->n_ways] = (join_way){rank, cut, NO_PIECE};
    *link = t->n_ways++;
}

/* ---- joining: a heap of the pairs that may be joined, lowest rank first, then leftmost ---- */

typedef struct {
    double rank;
    int32_t left, piece; /* that it joins to */
} pair;

typedef struct {
    pair *pairs;
    int32_t n;
} pair_heap;

static int goes_before(const pair *a, const pair *b)
{
    return a->rank < b->rank || (a->rank == b->rank && a->left < b->left);
}

static void heap_push(pair_heap *heap, pair new)
{
    int32_t i = heap->n++;
    for (; i && goes_before(&new, &heap->pairs[(i - 1) / 2]); i = (i - 1) / 2)
        heap->pairs[i] = heap->pairs[(i - 1) / 2];
    heap->pairs[i] = new;
}

static pair heap_pop(pair_heap *heap)
{
    const pair top = heap->pairs[0], last = heap->pairs[--heap->n];
    int32_t i = 0;
    for (int32_t child = 1; child < heap->n; child = 2 * i + 1) {
        if (child + 1 < heap->n && goes_before(&heap->pairs[child + 1], &heap->pairs[child]))
            child++;
        if (!goes_before(&heap->pairs[child], &last))
            break;
        heap->pairs[i] = heap->pairs[child];
        i = child;
    }
    heap->pairs[i] = last;
    return top;
}

static void push_pair(const piece_table *t, pair_heap *heap, const uint8_t *word,
                      const symbol *symbols, int32_t left)
{
    const int32_t cut = symbols[left].n_bytes, n_bytes = cut + symbols[left + cut].n_bytes;
    const int32_t joined = pieces_find(t, word + left, (uint32_t)n_bytes);
    if (joined == NO_PIECE)
        return;
    for (int32_t i = t->pieces[joined].way; i != NO_PIECE; i = t->ways[i].next)
        if (t->ways[i].cut == ANY_CUT || t->ways[i].cut == (uint32_t)cut) {
            heap_push(heap, (pair){t->ways[i].rank, left, joined});
            return;
        }
}

static int is_inside(const uint8_t *text, int32_t at, int32_t n) /* of a character */
{
    return at < n && (text[at] & 0xC0) == 0x80;
}

static int32_t character_bytes(const uint8_t *text, int32_t at, int32_t n)
{
    int32_t end = at + 1;
    while (is_inside(text, end, n))
        end++;
    return end - at;
}

static void first_symbols(const piece_table *t, const uint8_t *word, int32_t n, int one_byte,
                          symbol *symbols)
{
    int32_t before = 0;
    for (int32_t i = 0, n_bytes; i < n; i += n_bytes) {
        n_bytes = one_byte ? 1 : character_bytes(word, i, n);
        symbols[i] = (symbol){n_bytes, before, pieces_find(t, word + i, (uint32_t)n_bytes)};
        before = n_bytes;
    }
}

int pieces_join(const piece_table *t, const uint8_t *word, uint32_t n_bytes, int one_byte,
                symbol *symbols)
{
    enum { SHORT = 128 };
    pair few[2 * SHORT]; /* n - 1 pairs at first, and each joining takes one away and adds two */
    const int32_t n = (int32_t)n_bytes;
    pair_heap heap = {n <= SHORT ? few : malloc(2 * (size_t)n * sizeof(pair)), 0};
    if (heap.pairs == NULL)
        return -1;
    first_symbols(t, word, n, one_byte, symbols);
    for (int32_t i = 0; n && i + symbols[i].n_bytes < n; i += symbols[i].n_bytes)
        push_pair(t, &heap, word, symbols, i);
    while (heap.n) {
        const pair top = heap_pop(&heap);
        const int32_t n_joined = (int32_t)t->pieces[top.piece].n_bytes, end = top.left + n_joined;
        symbol *left = &symbols[top.left], *right = left + left->n_bytes;
        const int has_changed = left->n_bytes == 0 || left->n_bytes >= n_joined ||
                                left->n_bytes + right->n_bytes != n_joined;
        if (has_changed) /* since it was pushed */
            continue;
        *left = (symbol){n_joined, left->before, top.piece};
        right->n_bytes = 0; /* no longer a symbol */
        if (end < n) {
            symbols[end].before = n_joined;
            push_pair(t, &heap, word, symbols, top.left);
        }
        if (left->before)
            push_pair(t, &heap, word, symbols, top.left - left->before);
    }
    if (heap.pairs != few)
        free(heap.pairs);
    return 0;
}

/* ---- the longest first ---- */

static uint32_t at_most(const piece_table *t, const uint8_t *text, uint32_t n)
{
    return n == 0 || n < t->longest[text[0]] ? n : t->longest[text[0]];
}

int32_t pieces_longest(const piece_table *t, const uint8_t *text, uint32_t n, uint32_t more_than)
{
    for (uint32_t end = at_most(t, text, n); end > more_than; end--) {
        if (is_inside(text, (int32_t)end, (int32_t)n))
            continue;
        const int32_t found = pieces_find(t, text, end);
        if (found != NO_PIECE && t->pieces[found].id != NO_PIECE)
            return found;
    }
    return NO_PIECE;
}

/* ---- the likeliest ---- */

int pieces_likeliest(const piece_table *t, const uint8_t *word, uint32_t n_bytes,
                     double unknown_cost, symbol *symbols)
{
    const int32_t n = (int32_t)n_bytes;
    double *best = malloc(((size_t)n + 1) * sizeof *best);      /* cost of what ends here */
    int32_t *begin = calloc((size_t)n + 1, sizeof *begin);      /* of its last piece */
    const int has_memory = best != NULL && begin != NULL;
    for (int32_t i = 0; has_memory && i <= n; i++)
        best[i] = i ? INFINITY : 0;
    for (int32_t start = 0, n_first; has_memory && start < n; start += n_first) {
        n_first = character_bytes(word, start, n);
        const int32_t reach = (int32_t)at_most(t, word + start, n_bytes - (uint32_t)start);
        for (int32_t size = n_first; size == n_first || size <= reach; size++) {
            const int32_t end = start + size;
            if (is_inside(word, end, n))
                continue;
            const int32_t found = pieces_find(t, word + start, (uint32_t)size);
            const int has_id = found != NO_PIECE && t->pieces[found].id != NO_PIECE;
            double cost = size == n_first && !has_id ? unknown_cost : INFINITY;
            if (has_id && t->pieces[found].way != NO_PIECE)
                cost = t->ways[t->pieces[found].way].rank;
            if (best[start] + cost < best[end]) {
                best[end] = best[start] + cost;
                begin[end] = start;
            }
        }
    }
    for (int32_t end = n; has_memory && end > 0; end = begin[end]) {
        const int32_t size = end - begin[end];
        symbols[begin[end]] =
            (symbol){size, 0, pieces_find(t, word + begin[end], (uint32_t)size)};
    }
    free(best);
    free(begin);
    return has_memory ? 0 : -1;
}

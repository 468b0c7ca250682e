/* The pieces of a tokenizer's vocabulary, found by their bytes, and three ways to make a word of
 * them. tinychat/text/words.py, wordpiece.py and unigram.py say what is meant. */
#ifndef TINYCHAT_PIECES_H
#define TINYCHAT_PIECES_H

#include <stdint.h>

enum { NO_PIECE = -1, ANY_CUT = 0, MAX_WORD_BYTES = 1 << 30 };

typedef struct {
    uint32_t begin, n_bytes; /* of its text in piece_table.text */
    int32_t id;              /* its token; NO_PIECE: none that a text may become */
    int32_t way;             /* the first way to join it, NO_PIECE: none */
} piece;

/* A piece is joined of its first `cut` bytes and the others, or at ANY_CUT of any two pieces; there
 * its rank is what it costs. */
typedef struct {
    double rank;
    uint32_t cut;
    int32_t next; /* another way to join the same piece, or NO_PIECE */
} join_way;

typedef struct {
    uint32_t check; /* half of the text's hash */
    int32_t piece;  /* or NO_PIECE */
} piece_slot;

typedef struct {
    uint64_t seed;
    uint8_t *text;
    uint32_t text_bytes, text_room;
    uint32_t longest[256]; /* of the pieces that begin with a byte */
    piece *pieces;
    join_way *ways;
    int32_t n_pieces, room, n_ways; /* room: for pieces */
    piece_slot *slots;
    uint8_t *marks; /* 8 bits for each slot, one set for each text: it stays in the cache */
    uint32_t slot_mask;
} piece_table;

/* A symbol of a word stands at its first byte; the next one stands n_bytes further on. */
typedef struct {
    int32_t n_bytes, before; /* bytes back to the symbol before it; 0: it is the first */
    int32_t piece;           /* or NO_PIECE: it is none */
} symbol;

/* seed: a secret of this process, so that no file can make all its pieces meet in one slot.
 * 0, or -1 without memory */
int pieces_init(piece_table *t, int32_t n_pieces, uint64_t seed);
void pieces_free(piece_table *t);
/* the piece with this text, made if there is none; -1 without memory or room */
int32_t pieces_add(piece_table *t, const uint8_t *text, uint32_t n_bytes);
int32_t pieces_find(const piece_table *t, const uint8_t *text, uint32_t n_bytes);
/* guess: where it may well stand, any number */
int32_t pieces_find_near(const piece_table *t, const uint8_t *text, uint32_t n_bytes,
                         int32_t guess);
/* for so many more calls of pieces_add_way. 0, or -1 without memory */
int pieces_make_room(piece_table *t, int32_t n_ways);
/* a way that is there already keeps its rank */
void pieces_add_way(piece_table *t, int32_t piece, uint32_t cut, double rank);
/* Writes the symbols that are left of a word. one_byte: they begin as bytes, else as characters of
 * UTF-8. symbols: room for n_bytes. Takes 32 bytes more for each byte of a word.
 * 0, or -1 without memory */
int pieces_join(const piece_table *t, const uint8_t *word, uint32_t n_bytes, int one_byte,
                symbol *symbols);

/* the longest piece with an id at the head of a text, in whole characters of UTF-8 and longer than
 * `more_than` bytes */
int32_t pieces_longest(const piece_table *t, const uint8_t *text, uint32_t n_bytes,
                       uint32_t more_than);
/* Writes the symbols of the cheapest way to make up a word. unknown_cost: for a character that is
 * no piece. Takes 12 bytes more for each byte of a word. 0, or -1 without memory */
int pieces_likeliest(const piece_table *t, const uint8_t *word, uint32_t n_bytes,
                     double unknown_cost, symbol *symbols);

#endif

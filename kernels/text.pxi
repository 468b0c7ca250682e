# What the tokenizers and the reader of GGUF files call; part of _kernels.pyx.
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.math cimport INFINITY
from libc.stdint cimport int16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc

cdef extern from "pieces.h":
    enum: NO_PIECE, ANY_CUT, MAX_WORD_BYTES

    ctypedef struct piece:
        uint32_t n_bytes
        int32_t id

    ctypedef struct piece_table:
        piece *pieces
        int32_t n_pieces

    ctypedef struct symbol:
        int32_t n_bytes, piece

    int pieces_init(piece_table *t, int32_t n_pieces, uint64_t seed)
    void pieces_free(piece_table *t)
    int32_t pieces_add(piece_table *t, const uint8_t *text, uint32_t n_bytes)
    int32_t pieces_find(const piece_table *t, const uint8_t *text, uint32_t n_bytes)
    int32_t pieces_find_near(const piece_table *t, const uint8_t *text, uint32_t n_bytes,
                             int32_t guess)
    int pieces_make_room(piece_table *t, int32_t n_ways)
    void pieces_add_way(piece_table *t, int32_t piece, uint32_t cut, double rank)
    int pieces_join(const piece_table *t, const uint8_t *word, uint32_t n_bytes, int one_byte,
                    symbol *symbols) nogil
    int pieces_likeliest(const piece_table *t, const uint8_t *word, uint32_t n_bytes,
                         double unknown_cost, symbol *symbols) nogil
    int32_t pieces_longest(const piece_table *t, const uint8_t *text, uint32_t n_bytes,
                           uint32_t more_than)

cdef enum:
    FEW_BYTES = 256                    # of a word whose symbols stand on the stack
    MANY_BYTES = 4096                  # of a word long enough to let other threads go on

cdef bytes SPACE = "▁".encode()


cdef class Pieces:
    """A vocabulary's pieces, and the ways to encode a word with them: the compiled twin of
    tinychat/text/encoders.py, which says what is meant. Threads may share one once it is filled.

    tokens: their texts, of equal ones the last counts. never: ids of those no word may become.
    alphabet: the character that spells each byte; None where tokens spell characters.
    spell: the bytes of a piece that has no id -> ids; not asked where there is an alphabet.
    """

    cdef piece_table table
    cdef object spell
    cdef int16_t byte_of[512]          # by code point; -1: it spells none
    cdef bint is_byte_level, is_open
    cdef uint8_t *spelled              # room for the longest token, and a merge of its length
    cdef int64_t longest

    def __init__(self, list tokens not None, list never not None, str alphabet, spell):
        if self.is_open:
            raise ValueError("Pieces are made once")
        self.is_open = True
        self.spell = spell
        self._read_alphabet(alphabet)
        if len(tokens) > MAX_WORD_BYTES or \
                pieces_init(&self.table, len(tokens), <uint64_t>hash("pieces")) < 0:
            raise MemoryError
        cdef str token
        for token in tokens:
            self.longest = max(self.longest, len(token))
        self.spelled = <uint8_t *>_allocate(self.longest + 1, 4)
        self._add_tokens(tokens)
        cdef int64_t n
        for id in never:
            n = self._spell_out(tokens[id], NULL)
            if n > 0:
                self.table.pieces[pieces_find(&self.table, self.spelled, n)].id = NO_PIECE

    def __dealloc__(self):
        pieces_free(&self.table)
        free(self.spelled)

    cdef int _read_alphabet(self, str alphabet) except -1:
        cdef int byte
        self.is_byte_level = alphabet is not None
        memset(self.byte_of, -1, sizeof(self.byte_of))
        if self.is_byte_level:
            for byte in range(256):
                if ord(alphabet[byte]) >= 512:
                    raise ValueError("expected an alphabet of characters below U+0200")
                self.byte_of[ord(alphabet[byte])] = byte
        return 0

    cdef int64_t _spell_out(self, str text, int64_t *cut) except -2:
        """Writes a text's bytes to self.spelled: how many, or -1 where it spells none.
        cut: if not NULL, the first space is left out and its place stands here, or -1."""
        cdef int64_t n = 0
        cdef Py_UCS4 c
        if cut is not NULL:
            cut[0] = -1
        for c in text:
            if cut is not NULL and cut[0] < 0 and c == u" ":
                cut[0] = n
            elif not self.is_byte_level:
                n += _write_utf8(c, &self.spelled[n])
            elif c < 512 and self.byte_of[<int>c] >= 0:
                self.spelled[n] = <uint8_t>self.byte_of[<int>c]
                n += 1
            else:
                return -1
        return n

    cdef int _add_tokens(self, list tokens) except -1:
        cdef int64_t n
        cdef int32_t id, piece
        for id in range(len(tokens)):
            n = self._spell_out(tokens[id], NULL)
            if n > 0:
                piece = pieces_add(&self.table, self.spelled, n)
                if piece < 0:
                    raise MemoryError
                self.table.pieces[piece].id = id
        return 0

    def add_merges(self, list merges not None) -> bool:
        """merges: "left right", lowest rank first. Whether each is two texts with a space between
        that join to a token's text; those that do not are left out."""
        cdef bint all_join = True
        cdef int64_t i, n, cut
        cdef int32_t piece, last = NO_PIECE      # tokens mostly stand in the order of the merges
        cdef str merge
        self._make_room(len(merges))
        for i in range(len(merges)):
            merge = merges[i]
            piece = NO_PIECE
            if len(merge) <= self.longest + 1:
                n = self._spell_out(merge, &cut)
                if n > 0 and cut >= 0:
                    piece = pieces_find_near(&self.table, self.spelled, n, last + 1)
            if piece == NO_PIECE:
                all_join = False
                continue
            last = piece
            if 0 < cut < n:
                pieces_add_way(&self.table, piece, cut, i)
        return all_join

    def add_costs(self, const double[::1] costs):
        """costs: of each token, as a rank for `join`; a piece that costs infinity is never made."""
        cdef int32_t piece, id
        self._make_room(self.table.n_pieces)
        for piece in range(self.table.n_pieces):
            id = self.table.pieces[piece].id
            if id != NO_PIECE and costs[id] < INFINITY:
                pieces_add_way(&self.table, piece, ANY_CUT, costs[id])

    cdef int _make_room(self, int64_t n_ways) except -1:
        if n_ways > MAX_WORD_BYTES or pieces_make_room(&self.table, n_ways) < 0:
            raise MemoryError
        return 0

    def join(self, str word not None, bint whole=False) -> list[int]:
        """By merges or costs. whole: a word that is a token is that token, however it joins."""
        cdef bytes data = word.encode()
        cdef int32_t id
        if whole:
            id = self._id_of(pieces_find(&self.table, data, len(data)))
            if id != NO_PIECE:
                return [id]
        return self._by_symbols(data, False, 0, None)

    def likeliest(self, str word not None, double unknown_cost, list unknown not None) -> list[int]:
        """By costs. unknown: what a run of characters becomes that are no pieces."""
        return self._by_symbols(word.encode(), True, unknown_cost, unknown)

    def longest_first(self, str word not None, list unknown not None) -> list[int]:
        """Pieces that begin a word have ▁ in front. unknown: where they do not cover the word."""
        cdef bytes data = SPACE + word.encode()
        cdef const uint8_t *text = data
        cdef int64_t at = 0, n = len(data)
        cdef int64_t n_space = len(SPACE)
        cdef int32_t piece
        cdef list ids = []
        while at < n and n > n_space:
            if at and data.startswith(SPACE, at):
                return unknown
            piece = pieces_longest(&self.table, &text[at], n - at, 0 if at else n_space)
            if piece == NO_PIECE:
                return unknown
            ids.append(self.table.pieces[piece].id)
            at += self.table.pieces[piece].n_bytes
        return ids

    cdef list _by_symbols(self, bytes data, bint likeliest, double unknown_cost, list unknown):
        cdef int64_t n = len(data)
        cdef const uint8_t *word = data
        cdef symbol few[FEW_BYTES]
        cdef symbol *symbols = few
        if n > MAX_WORD_BYTES:
            raise ValueError(f"expected a word of at most {MAX_WORD_BYTES} bytes, got {n}")
        if n > FEW_BYTES:
            symbols = <symbol *>_allocate(n, sizeof(symbol))
        try:
            if n <= MANY_BYTES:
                failed = self._cut(word, n, likeliest, unknown_cost, symbols)
            else:
                with nogil:
                    failed = self._cut(word, n, likeliest, unknown_cost, symbols)
            if failed:
                raise MemoryError
            return self._ids(data, symbols, unknown)
        finally:
            if symbols is not few:
                free(symbols)

    cdef int _cut(self, const uint8_t *word, uint32_t n, bint likeliest, double unknown_cost,
                  symbol *symbols) noexcept nogil:
        if likeliest:
            return pieces_likeliest(&self.table, word, n, unknown_cost, symbols)
        return pieces_join(&self.table, word, n, self.is_byte_level, symbols)

    cdef list _ids(self, bytes data, const symbol *symbols, list unknown):
        cdef list ids = []
        cdef int64_t at = 0, n = len(data)
        cdef int32_t id
        cdef bint was_known = True
        while at < n:
            id = self._id_of(symbols[at].piece)
            if id != NO_PIECE:
                ids.append(id)
            elif unknown is None:
                self._spell(ids, data, at, symbols[at].n_bytes)
            elif was_known:
                ids += unknown
            was_known = id != NO_PIECE
            at += symbols[at].n_bytes
        return ids

    cdef int _spell(self, list ids, bytes data, int64_t at, int64_t n) except -1:
        cdef const uint8_t *text = data
        cdef int64_t i
        cdef int32_t id
        if not self.is_byte_level:
            ids += self.spell(data[at:at + n])
            return 0
        for i in range(at, at + n):    # a byte that is no token is left out
            id = self._id_of(pieces_find(&self.table, &text[i], 1))
            if id != NO_PIECE:
                ids.append(id)
        return 0

    cdef inline int32_t _id_of(self, int32_t piece) noexcept:
        return NO_PIECE if piece == NO_PIECE else self.table.pieces[piece].id


cdef inline int _write_utf8(uint32_t c, uint8_t *out) noexcept:
    if c < 0x80:
        out[0] = c
        return 1
    if c < 0x800:
        out[0] = 0xC0 | c >> 6
        out[1] = 0x80 | c & 0x3F
        return 2
    if c < 0x10000:
        out[0] = 0xE0 | c >> 12
        out[1] = 0x80 | c >> 6 & 0x3F
        out[2] = 0x80 | c & 0x3F
        return 3
    out[0] = 0xF0 | c >> 18
    out[1] = 0x80 | c >> 12 & 0x3F
    out[2] = 0x80 | c >> 6 & 0x3F
    out[3] = 0x80 | c & 0x3F
    return 4


def read_strings(const uint8_t[::1] data, int64_t pos, int64_t n) -> tuple[list[str], int] | None:
    """n strings of a GGUF file from byte `pos` on, and where they end; None where something is
    wrong with them, for gguf_file.py to say what."""
    cdef list texts = []
    cdef int64_t left, size = data.shape[0]
    cdef uint64_t n_bytes
    try:
        for _ in range(n):
            left = size - pos - 8
            if left < 0:
                return None
            memcpy(&n_bytes, &data[pos], 8)
            if n_bytes > <uint64_t>left:
                return None
            pos += 8
            texts.append(PyUnicode_DecodeUTF8(<const char *>&data[0] + pos, n_bytes, NULL))
            pos += n_bytes
    except UnicodeDecodeError:
        return None
    return texts, pos

"""Small vocabularies, a plain way to join against the fast ones, and a megabyte of mixed text."""
import random
import string
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np

from tinychat.text.tokenizer import _BYTE_CHARACTERS
from tinychat.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_pair_metadata(merges=("h e", "l l", "he ll", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "ĠĠ ĠĠ"),
                       pre="gpt-2", special=(("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL),
                                             ("<tool>", USER_DEFINED)), **more) -> dict:
    """256 bytes, what the merges make, then the special tokens."""
    tokens = [*_BYTE_CHARACTERS, *(merge.replace(" ", "") for merge in merges),
              *(text for text, _ in special)]
    types = [NORMAL] * (256 + len(merges)) + [type for _, type in special]
    return _metadata("gpt2", tokens, types, merges=list(merges), pre=pre, **more)


def sentence_piece_metadata(pieces=(("▁", -1), ("▁h", -2), ("he", -1.5), ("ll", -3), ("▁hell", -2),
                                    ("▁he", -2), ("o", -4), ("h", -5), ("e", -5), ("l", -5),
                                    ("▁▁", -1)), special=(), **more) -> dict:
    """<unk>, <s>, </s>, 256 bytes, the pieces with their scores, then the special tokens."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(piece for piece, _ in pieces),
              *(text for text, _ in special)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces),
             *(type for _, type in special)]
    scores = [0.0] * 259 + [score for _, score in pieces] + [0.0] * len(special)
    return _metadata("llama", tokens, types, scores=np.array(scores, np.float32), **more)


def word_piece_metadata(pieces=("▁un", "▁do", "do", "ne", "▁!", "▁好", "▁ασ", "▁u"), **more) -> dict:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces]
    types = [CONTROL] * 4 + [NORMAL] * len(pieces)
    ids = {"unknown_token_id": 1, "cls_token_id": 2, "seperator_token_id": 3}
    return _metadata("bert", tokens, types, **{**ids, **more})


def unigram_metadata(pieces=(("▁", -2), ("▁a", -1), ("bc", -2), ("b", -3), ("▁abc", -9), ("f", -4),
                             ("i", -4), ("é", -4), ("e", -4), ("E", -4)), **more) -> dict:
    """<pad>, </s>, <unk>, <s>, then the pieces with their scores."""
    tokens = ["<pad>", "</s>", "<unk>", "<s>", *(piece for piece, _ in pieces)]
    types = [CONTROL, CONTROL, UNKNOWN, CONTROL, *[NORMAL] * len(pieces)]
    scores = np.array([0.0] * 4 + [score for _, score in pieces], np.float32)
    flags = {"add_space_prefix": True, "remove_extra_whitespaces": True}
    return _metadata("t5", tokens, types, scores=scores, **{**flags, **more})


def charsmap(table: dict[str, str]) -> np.ndarray:
    """The table of `tokenizer.ggml.precompiled_charsmap`: each node has 256 words for itself."""
    words, replacements = [0] * 256, b""
    nodes = {b"": 0}                   # key -> its place
    bases = {}                         # key -> where its children stand

    def give_base(key: bytes) -> None:
        bases[key] = len(words)
        words.extend([0] * 256)
        offset = nodes[key] ^ bases[key]
        words[nodes[key]] |= offset << 10

    give_base(b"")
    for key, value in sorted((key.encode(), value) for key, value in table.items()):
        for n in range(1, len(key) + 1):
            if key[:n] not in nodes:
                nodes[key[:n]] = bases[key[:n - 1]] ^ key[n - 1]
                words[nodes[key[:n]]] = key[n - 1]
                give_base(key[:n])
        words[nodes[key]] |= 1 << 8
        words[bases[key]] = len(replacements)
        replacements += value.encode() + b"\0"
    trie = np.array(words, "<u4").tobytes()
    return np.frombuffer(len(trie).to_bytes(4, "little") + trie + replacements, np.uint8)


def _metadata(model: str, tokens: list[str], types: list[int], **keys) -> dict:
    keys = {"model": model, "tokens": tokens, "token_type": np.array(types, np.int32), **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def join_plainly(word: str, ranks: dict, glue: str) -> list[str]:
    """The meaning of joining: look at all neighbours, join the lowest, begin again."""
    parts = list(word)
    while True:
        pairs = [(ranks[a + glue + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                 if a + glue + b in ranks]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


LINES = (
    "The quick brown fox jumps over the lazy dog, and nobody asked why it wouldn't stop. ",
    "Größere Übungen führen zu längeren Sätzen, während Vögel über Dächer fliegen. ",
    "L'été dernier, j'ai mangé des crêpes à la crème brûlée près du château. ",
    "El niño comió piñas mañana por la mañana según el señor Muñoz. ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
    "Ο γρήγορος καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. ",
    "快速的棕色狐狸跳过懒狗,今天天气很好,我们去公园散步吧。",
    "素早い茶色の狐がのろまな犬を飛び越える。カタカナも少し。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. ",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. ",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। ",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ",
)


def mixed_text(n_bytes: int, seed: int = 1) -> str:
    """Code, prose in many scripts, names, numbers, emoji and words nobody knows; always the same
    for one Python version."""
    random_ = random.Random(seed)
    library = Path(sysconfig.get_path("stdlib"))
    code = (library / "argparse.py").read_text("utf-8") + (library / "typing.py").read_text("utf-8")
    names = [name.capitalize() for name in
             (unicodedata.name(chr(c), "") for c in range(0x20, 0x3000)) if name]

    def from_code():
        start = random_.randrange(len(code) - 1500)
        return code[start:start + 1500]

    def unknown_words():
        return " ".join("".join(random_.choices(string.ascii_lowercase, k=random_.randrange(2, 12)))
                        for _ in range(80)) + "\r\n"

    kinds = [
        from_code,
        lambda: "".join(random_.choices(LINES, k=6)),
        lambda: ". ".join(random_.choices(names, k=12)) + "\n\n",
        lambda: " ".join(str(random_.randrange(10 ** random_.randrange(1, 9)))
                         for _ in range(40)) + "\n",
        lambda: " ".join(chr(0x1F600 + random_.randrange(64)) * random_.randrange(1, 4)
                         for _ in range(20)) + " 👨‍👩‍👧 🇩🇪\n",
        unknown_words,
    ]
    parts, size = [], 0
    while size < n_bytes:
        parts.append(random_.choices(kinds, weights=[35, 35, 10, 8, 4, 8])[0]())
        size += len(parts[-1].encode())
    return "".join(parts)

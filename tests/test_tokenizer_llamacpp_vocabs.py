"""llama.cpp's own vocabularies, with the texts and ids of its own tests.

They come inside the source archive of the package `xllamacpp`, fetched once from the index that
pip is configured with, checked against its SHA-256, and kept in the test cache. Each `.inp` holds texts,
each `.out` their ids, encoded without bos and without special tokens.
"""
import hashlib
import json
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from helpers_tokenizer import mixed_text
from tinychat.gguf_file import open_gguf
from tinychat.text.tokenizer import Tokenizer, seconds_to_encode

PACKAGE, ARCHIVE = "xllamacpp", "xllamacpp-2026.10.11549.tar.gz"
SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
TIMEOUT_S = 60

WITH_EXPECTED_IDS = [
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe",
    "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"]
WITHOUT = ["aquila", "baichuan", "gpt-neox", "nomic-bert-moe"]         # llama.cpp has no ids
UNIGRAM_IDS = [
    [0, 35378, 148, 7118, 7344, 38, 6, 124084, 9131, 26216, 5885, 1022, 250001, 6, 177033, 6, 3, 2],
    [0, 8839, 393, 4868, 6, 26618, 6, 189402, 2], [0, 2], [0, 2]]
NORMALISING = {"bert-bge", "nomic-bert-moe"}           # they do not keep every character


@pytest.fixture(scope="module")
def vocabularies(test_cache) -> Path:
    """The folder with the ggml-vocab-* files; skips when they cannot be had."""
    folder = test_cache / ARCHIVE.removesuffix(".tar.gz")
    if not folder.is_dir():
        try:
            _fetch(folder)
        except (OSError, LookupError, subprocess.SubprocessError) as error:
            pytest.skip(f"{ARCHIVE} could not be fetched: {error!r}")
    return folder


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive, unpacked = Path(temporary, ARCHIVE), Path(temporary, "vocabularies")
        with _open(_archive_url()) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert digest == SHA256, f"{ARCHIVE}: expected SHA-256 {SHA256}, got {digest}"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name.startswith("ggml-vocab-"):
                    with tar.extractfile(member) as source:
                        (unpacked / name).write_bytes(source.read())
        try:
            unpacked.rename(folder)
        except OSError:                # another run was faster
            if not folder.is_dir():
                raise


def _archive_url() -> str:
    """The archive's address in the first of pip's indexes that lists it."""
    for index in _pip_indexes():
        page_url = f"{index.rstrip('/')}/{PACKAGE}/"
        try:
            with _open(page_url) as response:
                page = response.read().decode()
        except (OSError, ValueError):
            continue
        try:
            links = [file["url"] for file in json.loads(page)["files"]]
        except ValueError:             # an index that knows only HTML
            links = re.findall(r"href=[\"']([^\"']+)", page)
        for link in links:
            if ARCHIVE in link:
                return urllib.parse.urljoin(page_url, link)
    raise LookupError(f"no configured package index lists {ARCHIVE}")


def _pip_indexes() -> list[str]:
    default = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    first = _pip_setting("index-url") or _output(sys.executable, "-c", default)
    return [*first.split(), *_pip_setting("extra-index-url").split()]


def _pip_setting(name: str) -> str:
    """From the environment, else from pip's files; "" where nothing is set."""
    pip = (sys.executable, "-m", "pip", "config", "get")
    return _output(*pip, f":env:.{name}") or _output(*pip, f"global.{name}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S).stdout.strip()


def _open(url: str):
    json_or_html = "application/vnd.pypi.simple.v1+json, text/html;q=0.1, */*;q=0.01"
    context = ssl.create_default_context(cafile=_pip_setting("cert") or None)
    request = urllib.request.Request(url, headers={"Accept": json_or_html})
    return urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)


def load(folder: Path, name: str) -> Tokenizer:
    with open_gguf(folder / f"ggml-vocab-{name}.gguf") as file:
        return Tokenizer.from_metadata(file.metadata)


def test_every_vocabulary_is_accounted_for(vocabularies):
    names = {path.stem.removeprefix("ggml-vocab-") for path in vocabularies.glob("*.gguf")}
    assert names == {*WITH_EXPECTED_IDS, *WITHOUT}
    with_ids = {path.name.split(".")[0].removeprefix("ggml-vocab-")
                for path in vocabularies.glob("*.out")}
    assert with_ids == {*WITH_EXPECTED_IDS}


@pytest.mark.parametrize("name", WITH_EXPECTED_IDS)
def test_ids_are_those_of_llamacpp(vocabularies, name):
    tokenizer = load(vocabularies, name)
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(id) for id in line.split()]
                for line in Path(f"{path}.out").read_text("utf-8").splitlines()]
    if texts[-1] == "":                # most files end with the mark, gemma-4's does not
        texts.pop()
    assert len(texts) == len(expected) > 40
    for text, ids in zip(texts, expected):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("name", [*WITH_EXPECTED_IDS, *WITHOUT])
def test_a_megabyte_survives(vocabularies, name, record_property):
    tokenizer = load(vocabularies, name)
    text = mixed_text(1_000_000)
    seconds = seconds_to_encode(tokenizer, text)
    record_property("seconds_to_encode_1_MB", seconds)
    print(f"{name}: {seconds:.2f} s of processor time for 1 MB of mixed text")
    ids = tokenizer.encode(text)
    if name in NORMALISING:            # a line begins anew, for it begins with a space
        assert ids == [id for line in text.split("\n") for id in tokenizer.encode(line)]
    else:
        assert tokenizer.decode(ids) == text


def test_unigram_ids_are_those_of_llamacpp(vocabularies):
    """From llama.cpp's tokenizer (llama-cpp-python 0.3.36): there is no .out file for it."""
    tokenizer = load(vocabularies, "nomic-bert-moe")
    texts = ["Hello  wörld! 你好吗 café ﬁne\tx <mask> zzz 🜁🜂", "A\u030a e\u0301\u0301 ｶﾞ ㌔", " ", ""]
    assert [tokenizer.encode_prompt(text) for text in texts] == UNIGRAM_IDS

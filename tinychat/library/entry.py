"""What the models list says about one file, all of it read from the file itself.

Source of the fields: the HTTP contract, `GET /api/v1/models`.
"""
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGUFFile, LlamaFileType, open_gguf
from tinychat.models.vision import KNOWN, projector_of
from tinychat.text.prompt.template import ChatTemplate, source_of

QUANT_SUFFIX = re.compile(r"[-._](I?Q\d\w*|[BF]\d{2}|MXFP4\w*)$", re.IGNORECASE)  # model-Q4_K_M
QUANT = re.compile(  # anywhere in a name of capitals
    r"(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|TQ\d_\d|MXFP4(_MOE)?|BF16|FP?16|FP?32)(?![A-Z0-9_])")
SIZE_LABEL = re.compile(r"(\d+x)?\d+(\.\d+)?[KMBTQ](-A\d+(\.\d+)?[KMBT])?")  # 135M, 8x7B, 30B-A3B
PART = re.compile(r"-(\d{5})-of-(\d{5})$")
DEFAULT_QUANTS = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0")  # of a folder's files
TOWER_QUANTS = ("F16", "BF16", "Q8_0", "F32")  # of vision towers, the first is taken
_FILE_TYPES = {kind.value: kind.name.split("_", 1)[1]  # MOSTLY_Q4_K_M -> Q4_K_M
               for kind in LlamaFileType if "_" in kind.name}
DEFAULT_MAX_CONTEXT = 2048  # for the rare file that does not say


@dataclass(frozen=True)
class Quantization:
    """name: "Q4_K_M" …; bits_per_weight: all tensors' bits by all tensors' values."""

    name: str | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class ModelEntry:
    """One model on disk; `path` is the chosen variant's file, the first one when it is split.

    mmproj: the vision tower's file that goes with it. stamp: changes when any of its files does.
    """

    key: str
    publisher: str
    display_name: str
    architecture: str
    quantization: Quantization
    size_bytes: int
    params_string: str | None
    max_context_length: int
    path: Path
    type: str = "llm"
    description: str | None = None
    capabilities: dict = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    selected_variant: str | None = None
    mmproj: Path | None = None
    stamp: tuple | None = None

    @property
    def sees(self) -> bool:
        return self.capabilities.get("vision", False)

    def is_as_it_was(self) -> bool:
        """Are its files those that were read?"""
        return stamp_of(self.path, self.mmproj) == self.stamp

    def to_json(self, instances: list[dict] = ()) -> dict:
        """The wire's object; `instances` are the wire's `{"id", "config"}`."""
        body = {
            "type": self.type, "publisher": self.publisher, "key": self.key,
            "display_name": self.display_name,
            "quantization": {"name": self.quantization.name,
                             "bits_per_weight": self.quantization.bits_per_weight},
            "size_bytes": self.size_bytes, "params_string": self.params_string,
            "loaded_instances": list(instances), "max_context_length": self.max_context_length,
            "format": "gguf",
        }
        if self.type == "llm":
            body |= {"architecture": self.architecture, "capabilities": self.capabilities,
                     "description": self.description}
        if self.variants:
            body |= {"variants": list(self.variants), "selected_variant": self.selected_variant}
        return body


def describe(path: Path, key: str, publisher: str, mmproj: Path | None = None) -> ModelEntry:
    """The entry of one model. Raises: ModelFileError when it is malformed or no language model."""
    stamp, files = stamp_of(path, mmproj), [mmproj] if mmproj else []
    for part in parts(path):
        if part != path and not part.is_file():
            raise ModelFileError(f"{path}: is of several parts, and {part.name} is not there")
        files.append(part)
    with open_gguf(path) as file:
        metadata, architecture = file.metadata, file.architecture
        if not file.tensors or architecture == "clip":
            found = "a vision tower" if file.tensors else "a vocabulary without weights"
            raise ModelFileError(f"{path}: expected a language model, got {found}")
        embedding = makes_vectors(file)
        return ModelEntry(
            key=key, publisher=publisher or _text(metadata, "general.organization") or "",
            display_name=_text(metadata, "general.name") or PART.sub("", legible(path.stem)),
            architecture=architecture, quantization=quantization(file),
            size_bytes=sum(one.stat().st_size for one in files),
            params_string=params_string(file),
            max_context_length=max(1, _int(metadata, f"{architecture}.context_length",
                                           DEFAULT_MAX_CONTEXT)),
            path=path, type="embedding" if embedding else "llm",
            description=_text(metadata, "general.description"),
            capabilities={} if embedding else _capabilities(metadata, mmproj), mmproj=mmproj,
            stamp=stamp)


def makes_vectors(file: GGUFFile) -> bool:
    """Whether it is an embedding model: it says how the vectors of a text's tokens become one, or
    its tokens see those that follow, so that it cannot write."""
    prefix = file.architecture
    return (f"{prefix}.pooling_type" in file.metadata
            or file.metadata.get(f"{prefix}.attention.causal") is False)


def quantization(file: GGUFFile) -> Quantization:
    n_bits = 8 * sum(t.n_bytes for t in file.tensors.values())
    n_values = _n_values(file)
    return Quantization(_quantization_name(file), round(n_bits / n_values, 2) if n_values else None)


def _quantization_name(file: GGUFFile) -> str | None:
    """What the file says of itself, else the type of most of its matrices."""
    number = file.metadata.get("general.file_type")
    if isinstance(number, int) and number in _FILE_TYPES:
        return _FILE_TYPES[number]
    matrices = Counter(t.qtype.name for t in file.tensors.values() if len(t.shape) > 1)
    return matrices.most_common(1)[0][0] if matrices else None


def params_string(file: GGUFFile) -> str | None:
    label = _text(file.metadata, "general.size_label")
    if label and SIZE_LABEL.fullmatch(label):
        return label
    n_values = _n_values(file)
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n_values >= size:
            return f"{n_values / size:.{0 if n_values >= 10 * size else 1}f}{unit}"
    return None


def _n_values(file: GGUFFile) -> int:
    return sum(math.prod(tensor.shape) for tensor in file.tensors.values())


def _capabilities(metadata: dict, mmproj: Path | None) -> dict:
    template = ChatTemplate(source_of(metadata))
    found = {"vision": mmproj is not None and is_known_tower(mmproj),
             "trained_for_tool_use": "tools" in (template.source or "")}
    if reasoning := template.reasoning:
        found["reasoning"] = reasoning
    return found


def is_known_tower(path: Path) -> bool:
    """Whether it is a vision tower of a kind that can be used; a broken file is told of at load."""
    try:
        with open_gguf(path) as file:
            return projector_of(file.metadata) in KNOWN
    except ModelFileError:
        return True


def parts(path: Path) -> Iterator[Path]:
    """All files of a model, there or not: the first one's name tells of how many parts it is."""
    yield path
    part = PART.search(path.stem)
    for i in range(2, int(part[2]) + 1 if part and int(part[1]) == 1 else 0):
        yield path.with_name(f"{path.stem[:part.start()]}-{i:05d}-of-{part[2]}{path.suffix}")


def stamp_of(path: Path, mmproj: Path | None = None) -> tuple:
    """Changes when any of a model's files does; ends at the first that is not there."""
    found = []
    for file in (*([mmproj] if mmproj else []), *parts(path)):
        try:
            stat = file.stat()
        except OSError:
            break
        found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return (mmproj, *found)


def is_model_file(path: Path) -> bool:
    """A file to list: not hidden, not a vision tower's file, not a later part of a split one."""
    part = PART.search(path.stem)
    return (path.suffix == ".gguf" and not path.name.startswith(".")
            and not is_tower_name(path.name) and (part is None or int(part[1]) == 1))


def is_tower_name(name: str) -> bool:
    return "mmproj" in name.lower() and name.endswith(".gguf")


def tower_beside(path: Path, names: list[str], *, alone: bool) -> Path | None:
    """The vision tower of the model at `path`.

    names: of the files in its folder. alone: the folder has no other model; else only a tower that
    is named after this one is its own.
    """
    found = [path.with_name(name) for name in names if is_tower_name(name)
             and not name.startswith(".") and (alone or key_of_stem(path.stem) in name.lower())]
    found = [tower for tower in found if tower.is_file()]
    return min(found, default=None,
               key=lambda tower: tower_rank(tower.name, tower.stat().st_size))


def tower_rank(name: str, size: int) -> tuple:
    """Least is the one to take: the usual precision if its name tells it, else the smallest."""
    quant = quantization_in(name.removesuffix(".gguf"))
    index = TOWER_QUANTS.index(quant) if quant in TOWER_QUANTS else len(TOWER_QUANTS)
    return index, size, name


def quantization_in(name: str) -> str | None:
    """`Qwen3-4B-UD-q4_k_xl` -> `Q4_K_XL`; `model.fp16` -> `F16`; of several, the last."""
    found = [match[0] for match in QUANT.finditer(name.upper())]
    return found[-1].replace("FP16", "F16").replace("FP32", "F32") if found else None


def legible(name: str) -> str:
    """A file's name as text: what is not UTF-8, or steers a terminal, becomes U+FFFD."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name)


def key_of_stem(stem: str) -> str:
    """`SmolLM2-135M-Instruct.Q4_1` -> `smollm2-135m-instruct`."""
    return legible(QUANT_SUFFIX.sub("", PART.sub("", stem)).lower())


def key_of_folder(name: str) -> str:
    """`Qwen3-4B-GGUF` -> `qwen3-4b`."""
    return legible(re.sub(r"-gguf$", "", name.lower()))


def preferred(entries: list[ModelEntry]) -> ModelEntry:
    """Which of a folder's files its key means: the usual 4 bits if there, else the smallest."""
    rank = {name: i for i, name in enumerate(DEFAULT_QUANTS)}
    return min(entries, key=lambda entry: (rank.get(entry.quantization.name, len(rank)),
                                           entry.size_bytes, entry.path))


def _text(metadata: dict, key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None


def _int(metadata: dict, key: str, default: int) -> int:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else default

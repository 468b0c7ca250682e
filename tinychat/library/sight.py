"""The sight of a loaded model: its vision tower, and the images that it has encoded lately."""
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinychat import images
from tinychat.engine.images import PlacedImage
from tinychat.errors import ModelFileError, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.library.entry import ModelEntry
from tinychat.models.vision import EncodedImage, ImageBlock, VisionEncoder
from tinychat.ops.program import Program
from tinychat.text.tokenizer import Tokenizer

KEPT_BYTES = 256 << 20  # of encoded images


@dataclass(frozen=True, eq=False)
class Seen:
    """One encoded image; digest: of its bytes."""

    digest: bytes
    image: EncodedImage

    def layout(self) -> list[str | int]:
        """Its parts as they stand in a prompt: texts, and how many tokens are seen."""
        return [part if isinstance(part, str) else len(part.rows) for part in self.image.parts]

    def placed(self, part: int, first: int) -> PlacedImage:
        """The block that is part `part`, from token `first` on."""
        block = self.image.parts[part]
        return PlacedImage(first, block.rows, block.axes, block.n_positions,
                           self.digest + part.to_bytes(4, "little"), self.image.both_ways)

    @property
    def n_bytes(self) -> int:
        return sum(part.rows.nbytes for part in self.image.parts if isinstance(part, ImageBlock))


class Sight:
    """Safe for many threads: one image is encoded at a time, and the last ones are kept.

    n_embd: width of the text model; program: the text model's. threads: as a load has them.
    Raises: ModelFileError for a tower that is broken, unknown or another model's; ModelLoadError.
    """

    def __init__(self, entry: ModelEntry, program: Program, *, threads: int | None):
        self._file = open_gguf(entry.mmproj)
        try:
            n_embd = next(op.out.width for op in program.ops if op.name == "embed")
            self._encoder = VisionEncoder(self._file, n_embd=n_embd, threads=threads)
            if self._encoder.width != program.input_width:
                self._encoder.close()
                raise ModelFileError(f"{entry.mmproj}: its images have {self._encoder.width} values"
                                     f" a token, the model takes {program.input_width}")
        except BaseException:
            self._file.close()
            raise
        self._busy = threading.Lock()
        self._kept: OrderedDict[bytes, Seen] = OrderedDict()  # least recently seen first
        self._stopped: TinychatError | None = None

    def placeholder_id(self, tokenizer: Tokenizer) -> int:
        """The token that image tokens are counted as; 0 where the family has none."""
        ids = tokenizer.encode(self._encoder.placeholder or "", special=True)
        return ids[0] if len(ids) == 1 else 0

    def knows_all(self, data_urls: Sequence[str]) -> bool:
        """Whether seeing these takes no time."""
        return all(_digest(images.parse_data_url(url)) in self._kept for url in set(data_urls))

    def n_tokens(self, data_urls: Sequence[str]) -> int:
        """Of these images, all together: known before any is encoded, or even decoded."""
        sizes = (images.size_of(images.parse_data_url(url)) for url in data_urls)
        return sum(self._encoder.count(height, width) for height, width in sizes)

    def see_all(self, data_urls: Sequence[str],
                report: Callable[[float], None] = lambda part: None) -> list[Seen]:
        """Each image encoded, or found; report: gets 0 to 1, and may raise to stop.

        Raises: InvalidRequest for what is no image, TinychatError once it is told to stop.
        """
        def report_unless_stopped(part: float) -> None:
            self._check_stopped()
            report(part)

        seen = []
        for i, url in enumerate(data_urls):
            seen.append(self._see(images.parse_data_url(url), lambda part: report_unless_stopped(
                (i + part) / len(data_urls))))
            report_unless_stopped((i + 1) / len(data_urls))
        return seen

    def _see(self, data: bytes, report: Callable[[float], None]) -> Seen:
        digest = _digest(data)
        with self._busy:
            self._check_stopped()
            if digest not in self._kept:
                self._keep(Seen(digest, self._encoder.encode(images.decode(data), report)))
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def _keep(self, seen: Seen) -> None:
        self._kept[seen.digest] = seen
        n_bytes = sum(one.n_bytes for one in self._kept.values())
        while n_bytes > KEPT_BYTES and len(self._kept) > 1:
            n_bytes -= self._kept.popitem(last=False)[1].n_bytes

    def _check_stopped(self) -> None:
        if self._stopped:
            raise self._stopped

    def stop(self, error: TinychatError | None = None) -> None:
        """What is being encoded ends with `error` at its next report, and what comes at once."""
        self._stopped = self._stopped or error or TinychatError(
            "the model was unloaded", code="model_unloaded", param="model")

    def close(self) -> None:
        """May be called again."""
        self.stop()
        with self._busy:
            self._encoder.close()
            self._file.close()
            self._kept.clear()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()

"""A chat's images on their way into its prompt."""
import threading
from collections.abc import Callable, Iterator

from tinychat.chat.waiting import away
from tinychat.contract import ImageItem
from tinychat.errors import ContextOverflow, TinychatError
from tinychat.library import LoadedModel
from tinychat.library.sight import Seen

WAIT_S = 0.1  # between two looks at how far it is


class Looking:
    """seen: the images encoded, once `parts` has come to its end.

    called_off: set when nobody waits any more; the tower then stops at its next report.
    """

    def __init__(self, model: LoadedModel, images: list[ImageItem], called_off: threading.Event):
        self._sight, self._urls = model.sight, [image.data_url for image in images]
        self._called_off = called_off
        self._part: float | None = None
        self.seen: list[Seen] = []

    def check_room(self, n_ctx: int) -> None:
        """Raises: ContextOverflow, before any time goes into images that have no room."""
        n = self._sight.n_tokens(self._urls)
        if n >= n_ctx:
            raise ContextOverflow(f"the images have {n} tokens, more than the context length of "
                                  f"{n_ctx} has room for", param="input")

    @property
    def takes_time(self) -> bool:
        """Whether one of them has to go through the tower."""
        return not self._sight.knows_all(self._urls)

    def parts(self, check: Callable[[], None]) -> Iterator[float | None]:
        """How much is done, each so often, 0 to 1; None before anything is. check: may raise."""
        work = away(lambda: self._sight.see_all(self._urls, self._report), WAIT_S, check)
        while True:
            try:
                next(work)
            except StopIteration as end:
                self.seen = end.value
                return
            yield self._part

    def _report(self, part: float) -> None:
        self._part = part
        if self._called_off.is_set():
            raise TinychatError("nobody waits for this image any more")

"""What is sent without hope of an answer: that nobody waits for a call any more."""
import threading
from collections.abc import Callable

from tinychat.mcp.errors import McpError


class Errands:
    """What is sent in the background: nobody waits for it before the end, and there not long."""

    def __init__(self):
        self._threads: list[threading.Thread] = []

    def run(self, send: Callable[[], None]) -> None:
        def errand():
            try:
                send()
            except McpError:
                pass  # best effort
        thread = threading.Thread(target=errand, name="mcp-errand", daemon=True)
        thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    def finish(self, seconds: float) -> None:
        for thread in self._threads:
            thread.join(seconds)

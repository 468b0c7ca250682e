"""Downloads that run beside the requests that ask for them, and what the contract says of each."""
import logging
import secrets
import string
import threading
import time
from collections import deque
from datetime import datetime, timedelta, timezone

from tinychat.errors import JobNotFound, Overloaded, TinychatError
from tinychat.library.fetch.download import Plan, Stop, Stopped
from tinychat.library.entry import ModelEntry
from tinychat.library.shelf import Shelf

log = logging.getLogger(__name__)

ID_LETTERS, ID_LENGTH = string.ascii_lowercase + string.digits, 24
RATE_WINDOW_S = 10.0     # the speed is that of so many seconds
RATE_STEP_S = 0.25       # of which a point is kept so often
CLOSE_WAIT_S = 5.0       # for all downloads together to notice that they are stopped
LONGEST = timedelta(days=3650)  # no download is said to take longer


class Rate:
    """Bytes per second over the last RATE_WINDOW_S. What was there at first was not received."""

    def __init__(self):
        self._points: deque[tuple[float, int]] = deque()  # (time, bytes by then), oldest first
        self._last: tuple[float, int] | None = None

    def add(self, now: float, done: int) -> None:
        """done: bytes in all; fewer than before when a server starts again."""
        if self._last is None or done < self._last[1]:
            self._points.clear()
        self._last = (now, done)
        if not self._points or now - self._points[-1][0] >= RATE_STEP_S:
            self._points.append(self._last)

    def at(self, now: float) -> int:
        while len(self._points) > 1 and self._points[1][0] <= now - RATE_WINDOW_S:
            self._points.popleft()  # what remains first is the last point before the window
        if self._last is None:
            return 0
        since, before = self._points[0]
        return int((self._last[1] - before) / (now - since)) if now > since else 0


class Job:
    """One download, from its start for as long as the process runs. Safe for many threads.

    error: why it has failed, else None.
    """

    def __init__(self, asked: tuple[str, str | None], plan: Plan):
        self.id = "job_" + "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH))
        self.model, self.total_bytes = asked[0], plan.total_bytes
        self.asked, self.plan = {asked}, plan
        self.error: TinychatError | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()  # guards all below
        self._status, self._rate = "downloading", Rate()
        self._done = self._most = 0    # bytes here; the most there have been
        self._started_at, self._completed_at = _now(), None

    @property
    def is_running(self) -> bool:
        with self._lock:
            return self._status == "downloading"

    def answer(self) -> dict:
        """The body of `POST /api/v1/models/download`."""
        with self._lock:
            return {"status": self._status, "job_id": self.id,
                    "total_size_bytes": self.total_bytes, **self._times()}

    def status(self) -> dict:
        """The body of `GET /api/v1/models/download/status/:job_id`."""
        with self._lock:
            body = {"job_id": self.id, "status": self._status,
                    "total_size_bytes": self.total_bytes, "downloaded_bytes": self._most,
                    **self._times()}
            if self._status == "downloading":
                rate = body["bytes_per_second"] = self._rate.at(time.monotonic())
                if rate > 0:
                    left_s = min((self.total_bytes - self._done) / rate, LONGEST.total_seconds())
                    body["estimated_completion"] = _text(_now() + timedelta(seconds=left_s))
            return body

    def progress(self, what: str, done: int, total: int) -> None:
        if what == "downloading":
            with self._lock:
                self._done = min(done, self.total_bytes)
                self._most = max(self._most, self._done)
                self._rate.add(time.monotonic(), self._done)

    def complete(self) -> None:
        with self._lock:
            self._done = self._most = self.total_bytes
            self._completed_at = max(_now(), self._started_at)  # a clock may have been put back
            self._status = "completed"
        self._ended.set()

    def fail(self, error: TinychatError) -> None:
        with self._lock:
            self.error, self._status = error, "failed"
        self._ended.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is completed or has failed; False when that takes longer."""
        return self._ended.wait(timeout_s)

    def _times(self) -> dict[str, str]:
        times = {"started_at": _text(self._started_at)}
        if self._completed_at:
            times["completed_at"] = _text(self._completed_at)
        return times


class Downloads:
    """The jobs of one process. Safe for many threads."""

    def __init__(self, shelf: Shelf):
        self._shelf, self._stop = shelf, Stop()
        self._lock = threading.Lock()  # guards all below
        self._jobs: dict[str, Job] = {}
        self._running: dict[Job, threading.Thread] = {}
        self._closed = False

    def start(self, model: str, quantization: str | None = None) -> Job | None:
        """Fetch a model on a thread of its own; the job that does so already, if there is one.

        model, quantization: as in the contract. None: the model is here.
        Raises: ModelNotFound, InvalidRequest, Overloaded after `close`, TinychatError when the hub
        cannot be asked or the disk is too full.
        """
        asked = model, quantization
        with self._lock:
            self._check_open()
            for job in self._running:
                if asked in job.asked and job.is_running:
                    return job
        found = self._shelf.plan(model, quantization, self._stop)
        if isinstance(found, ModelEntry):
            return None
        with self._lock:
            self._check_open()
            for job in self._running:
                if job.plan.target == found.target and job.is_running:
                    job.asked.add(asked)
                    return job
            found.check_space()
            return self._begin(Job(asked, found))

    def get(self, job_id: str) -> Job:
        """Raises: JobNotFound."""
        with self._lock:
            if job := self._jobs.get(job_id):
                return job
        raise JobNotFound(f"no download job {job_id[:200]!r}", param="job_id")

    def close(self) -> None:
        """Stop what runs; what it has so far stays for the next attempt. May be called again."""
        with self._lock:
            self._closed = True
            threads = list(self._running.values())
        self._stop.set()
        ends = time.monotonic() + CLOSE_WAIT_S
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _check_open(self) -> None:
        if self._closed:
            raise Overloaded("tinychat is shutting down")

    def _begin(self, job: Job) -> Job:
        thread = threading.Thread(target=self._run, args=(job,), name=job.id, daemon=True)
        self._jobs[job.id], self._running[job] = job, thread
        thread.start()
        return job

    def _run(self, job: Job) -> None:
        try:
            job.plan.fetch(job.progress)
            self._shelf.resolve(job.plan.target)  # it is listed before anybody hears so
            log.info("%.200r: downloaded, %d bytes", job.model, job.total_bytes)
            job.complete()
        except Stopped as error:
            log.info("%.200r: the download was stopped; the next one continues", job.model)
            job.fail(error)
        except TinychatError as error:
            log.warning("%.200r: the download failed: %s", job.model, error)
            job.fail(error)
        except Exception as error:
            log.warning("%.200r: the download failed", job.model, exc_info=True)
            job.fail(TinychatError(f"{type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._running.pop(job, None)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

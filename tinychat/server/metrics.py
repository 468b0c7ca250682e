"""What the server counts, in Prometheus' text format (version 0.0.4)."""
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import tinychat

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[dict[str, object], float]  # labels, value


class Metrics:
    """Counts requests; the figures of models are the library's own. Safe for many threads.

    route_of: the name under which a path is counted: few values, or the counters would never end.
    """

    def __init__(self, route_of: Callable[[str], str]):
        self._route_of = route_of
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def request(self, path: str, status: int, seconds: float) -> None:
        """status 0: the client was gone before there was an answer."""
        route = self._route_of(path)
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds

    def text(self, library, n_connections: int) -> str:
        """All figures of this moment."""
        with self._lock:
            requests, seconds = dict(self._requests), dict(self._seconds)
        lines = [
            *_metric("build_info", "gauge", "The version that runs.",
                     [({"version": tinychat.__version__}, 1)]),
            *_metric("http_connections", "gauge", "Open connections.", [({}, n_connections)]),
            *_metric("http_requests_total", "counter", "Requests, by path and status; status 0: "
                     "the client left before an answer.",
                     [({"path": route, "status": status}, n)
                      for (route, status), n in sorted(requests.items())]),
            *_metric("http_request_seconds_total", "counter", "Time from a request's first byte "
                     "to its answer's last.",
                     [({"path": route}, n) for route, n in sorted(seconds.items())]),
            *_of_counters(library.counters()),
            *_of_instances(library.instances()),
        ]
        return "\n".join(lines) + "\n"


def _of_counters(counters: dict[str, Counter]) -> Iterable[str]:
    def samples(name: str, **labels) -> list[Sample]:
        return [({"model": key, **labels}, counts[name]) for key, counts in sorted(counters.items())]

    yield from _metric("tokens_total", "counter", "Tokens: computed of prompts, reused from "
                       "earlier prompts, generated.",
                       [sample for kind in ("prefilled", "reused", "generated")
                        for sample in samples(kind, kind=kind)])
    yield from _metric("draft_tokens_total", "counter", "Guesses by prompt lookup: computed, and "
                       "those that were right.",
                       [sample for kind in ("drafted", "accepted")
                        for sample in samples(kind, kind=kind)])
    yield from _metric("model_loads_total", "counter", "Loads that succeeded.", samples("loads"))
    yield from _metric("model_load_failures_total", "counter", "Loads that failed.",
                       samples("failed_loads"))
    yield from _metric("model_load_seconds_total", "counter", "Time of the loads that succeeded.",
                       samples("load_seconds"))


def _of_instances(models) -> Iterable[str]:
    stats = [(model.entry.key, model.engine.stats) for model in models]
    yield from _metric("requests_running", "gauge", "Requests that generate or are prefilled.",
                       [({"model": key}, now.running) for key, now in stats])
    yield from _metric("requests_waiting", "gauge", "Requests in the queue.",
                       [({"model": key}, now.waiting) for key, now in stats])
    yield from _metric("kv_pages", "gauge", "Pages of the KV cache: in use by requests, or free "
                       "(kept for reuse as long as nobody needs them).",
                       [({"model": key, "state": state}, n) for key, now in stats
                        for state, n in (("used", now.n_pages - now.free_pages),
                                         ("free", now.free_pages))])
    yield from _metric("model_memory_bytes", "gauge", "Weights, buffers and KV pages as planned.",
                       [({"model": model.entry.key}, model.memory.total_bytes)
                        for model in models])


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    name = f"tinychat_{name}"
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(str(of))}"' for label, of in labels.items())
        yield f"{name}{'{' + inside + '}' if inside else ''} {value:.10g}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r'\"')

"""One chat request from start to end as a stream of events: the one place where engine, text,
library and store meet.

`run` yields the contract's events in the contract's order; `fold` makes the plain answer of them.
There is no other path: each door, HTTP or Python, goes through `run`.
"""
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace

from tinychat.contract import ChatRequest, EphemeralServer, ImageItem, Plugin, TextItem
from tinychat.engine.sequence import (
    Finished, PromptDone, PromptProgress, PromptStarted, Sequence, Token, Update)
from tinychat.errors import InvalidRequest, NotImplementedYet, Overloaded, TinychatError
from tinychat.library import Library, LoadedModel, ModelEntry
from tinychat.output import Output, Stats
from tinychat.store import Store, Turn
from tinychat.text.split import Splitter

log = logging.getLogger(__name__)

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
EFFORTS = ("low", "medium", "high")
PREFILL_TOKENS = 64  # of the prompt's end, in which a template may have opened the reasoning
LEAST_CONTEXT = 2  # an engine has room for a prompt and an answer; a request may ask for less
WAIT_S = 1.0  # how long one wait for the engine lasts when nobody asked for heartbeats


@dataclass(frozen=True)
class ChatSettings:
    """What a door allows.

    heartbeat_s: when given, `run` yields None at least once in so many seconds of silence, so that
    its consumer can look after its client. stopping: once it is true the chat fails, and ends.
    refusal: why an integration is not permitted, None when it is.
    """

    heartbeat_s: float | None = None
    stopping: Callable[[], bool] = lambda: False
    refusal: Callable[[Plugin | EphemeralServer], str | None] = lambda integration: None


def run(library: Library, store: Store, request: ChatRequest,
        settings: ChatSettings = ChatSettings()) -> Iterator[dict | None]:
    """The events of one request. Closing the generator cancels what runs.

    Raises: TinychatError before the first event; later failures are an `error` event, then `chat.end`.
    """
    entry = _find_model(library, request)
    turns = _thread(store, request, entry)
    _check_integrations(request, settings)
    chat = _Chat(library, store, request, entry, turns, settings)
    try:
        with closing(chat.events()) as events:
            for event in events:
                if event is not None or settings.heartbeat_s:
                    yield event
    finally:
        chat.end()


def fold(events: Iterator[dict | None]) -> dict:
    """The response that a stream of events amounts to.

    Raises: TinychatError when the stream has an `error`.
    """
    result = failure = None
    for event in events:  # to its end: what the chat held is given back before anybody is told
        if event is None:
            continue
        if event["type"] == "error":
            failure = dict(event["error"])
        elif event["type"] == "chat.end":
            result = event["result"]
    if failure:
        raise TinychatError(failure.pop("message"), **failure)
    if result:
        return result
    raise TinychatError("the chat ended without a result")


# ---- what is checked before anything starts ---------------------------------------------------

def _find_model(library: Library, request: ChatRequest) -> ModelEntry:
    entry = library.find(request.model)
    if entry.type != "llm":
        raise InvalidRequest(f"{entry.key} is not a chat model", param="model")
    if not (library.jit or library.expects(entry)):
        raise InvalidRequest(f"{entry.key} is not loaded, and loading on demand is off",
                             code="model_not_loaded", param="model")
    _check_reasoning(entry, request.reasoning)
    if request.context_length and request.context_length > entry.max_context_length:
        raise InvalidRequest(f"{entry.key} has a context of at most {entry.max_context_length}"
                             f" tokens, not {request.context_length}", param="context_length")
    for position, item in enumerate(request.input):
        if isinstance(item, ImageItem) and not entry.capabilities["vision"]:
            raise InvalidRequest(f"{entry.key} cannot see images", param=f"input.{position}")
        if isinstance(item, ImageItem):
            raise NotImplementedYet("this build cannot read images yet",
                                    param=f"input.{position}")
    return entry


def _check_reasoning(entry: ModelEntry, value: str | None):
    if value is None:
        return
    offered = entry.capabilities.get("reasoning")
    if offered is None:
        raise InvalidRequest(f"{entry.key} does not expose reasoning configuration",
                             param="reasoning")
    if value not in offered["allowed_options"]:
        raise InvalidRequest(f"reasoning {value} is not supported by model {entry.key}; it allows "
                             + ", ".join(offered["allowed_options"]), param="reasoning")


def _thread(store: Store, request: ChatRequest, entry: ModelEntry) -> list[Turn]:
    """The turns that the request continues."""
    if not request.previous_response_id:
        return []
    turns = store.chain(request.previous_response_id)
    seen = any(isinstance(item, ImageItem) for turn in turns for item in turn.input)
    if seen and not entry.capabilities["vision"]:
        raise InvalidRequest(f"the chat has images, which {entry.key} cannot see",
                             param="previous_response_id")
    return turns


def _check_integrations(request: ChatRequest, settings: ChatSettings):
    for position, integration in enumerate(request.integrations):
        if reason := settings.refusal(integration):
            raise InvalidRequest(reason, code="permission_denied",
                                 param=f"integrations.{position}")
    if request.integrations:
        raise NotImplementedYet("this build cannot use tools yet", param="integrations")


# ---- history -> messages ----------------------------------------------------------------------

def _messages(turns: list[Turn], system_prompt: str | None, request: ChatRequest) -> list[dict]:
    """The conversation in the neutral form that templates take."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for turn in turns:
        messages += [_user_message(turn.input), _assistant_message(turn.output)]
    return messages + [_user_message(request.input)]


def _user_message(items: tuple[TextItem | ImageItem, ...]) -> dict:
    return {"role": "user", "content": "\n".join(item.content for item in items)}


def _assistant_message(output: tuple[dict, ...]) -> dict:
    def joined(kind: str) -> str:
        return "\n".join(item["content"] for item in output if item["type"] == kind)

    message = {"role": "assistant", "content": joined("message")}
    thought = joined("reasoning")
    if thought:  # under each name that a template may look for
        message.update(reasoning_content=thought, thinking=thought, reasoning=thought)
    return message


# ---- the request ------------------------------------------------------------------------------

class _Chat:
    """One request's state while its events are made."""

    def __init__(self, library: Library, store: Store, request: ChatRequest, entry: ModelEntry,
                 turns: list[Turn], settings: ChatSettings):
        self.library, self.store, self.request, self.entry = library, store, request, entry
        self.turns = turns
        self.settings, self.wait_s = settings, settings.heartbeat_s or WAIT_S
        inherited = turns[-1].system_prompt if turns else None
        given = request.system_prompt
        self.system_prompt = (inherited if given is None else given) or None
        self.messages = _messages(turns, self.system_prompt, request)
        self.reasoning = request.reasoning or entry.capabilities.get("reasoning", {}).get("default")
        self.output, self.stats = Output(), Stats()
        self.model: LoadedModel | None = None       # held from acquire to release
        self.loading: Future[LoadedModel] | None = None
        self.sequence: Sequence | None = None
        self.began = time.perf_counter()
        self.ending = "cancelled"

    def events(self) -> Iterator[dict | None]:
        self.model = self.library.try_acquire(self.entry, **self._wish())
        if self.model:
            self._submit()
        yield {"type": "chat.start", "model_instance_id": self.entry.key}
        try:
            if not self.model:
                yield from self._load()
                self._submit()
            yield from self._generate()
            yield self._chat_end(self._save())
        except Exception as error:
            yield from self._fail(error)

    def end(self):
        """Gives back what the request holds of engine and library, and writes the log's line.

        The model is given back when the engine has done with the sequence: a client that reads
        slowly holds up nobody who wants another model.
        """
        if self.sequence:
            self.model.engine.cancel(self.sequence)
            self._log()
        elif self.model:
            self.library.release(self.model)
        elif self.loading:
            self.loading.add_done_callback(self._give_back)

    # -- loading

    def _wish(self) -> dict:
        wanted = self.request.context_length
        return {"context_length": wanted and max(wanted, LEAST_CONTEXT), "ttl": self.request.ttl}

    def _check_stopping(self):
        if self.settings.stopping():
            raise Overloaded("the server is shutting down")

    def _load(self) -> Iterator[dict | None]:
        """Loads on a helper thread, so that progress becomes events while it happens."""
        instance = {"model_instance_id": self.entry.key}
        yield {"type": "model_load.start", **instance}
        news: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self.loading = Future()
        threading.Thread(target=self._load_into, args=(self.loading, news), name="load",
                         daemon=True).start()
        told = 0.0
        while (part := _next_of(news, self.wait_s)) is not None:
            if part > told:
                told = min(part, 1.0)
                yield {"type": "model_load.progress", **instance, "progress": told}
            else:
                self._check_stopping()
                yield None
        self.model = self.loading.result()
        self.stats.load_time_s = self.model.load_time_seconds
        yield {"type": "model_load.end", **instance, "load_time_seconds": self.stats.load_time_s}

    def _load_into(self, loading: Future, news: queue.SimpleQueue):
        try:
            loading.set_result(self.library.acquire(self.entry, progress=news.put,
                                                    **self._wish()))
        except BaseException as error:  # the other thread would wait for ever
            loading.set_exception(error)
        finally:
            news.put(None)

    def _give_back(self, loading: Future):
        """The request was over before its load was."""
        if not loading.exception():
            self.library.release(loading.result())

    # -- generating

    def _submit(self):
        """Renders, encodes and queues the prompt.

        Raises: ContextOverflow, Overloaded, TemplateError.
        """
        model, request = self.model, self.request
        ids = model.template.encode(self.messages, model.tokenizer, **self._template_switches())
        self.stats.n_input = len(ids)
        self.splitter = Splitter(model.template.reasoning_markers,
                                 model.tokenizer.decode(ids[-PREFILL_TOKENS:]))
        self.decoder = model.tokenizer.decoder()
        given = {name: getattr(request, name) for name in SAMPLING_FIELDS
                 if getattr(request, name) is not None}
        self.sequence = model.engine.submit(
            ids, params=replace(model.defaults, **given), max_tokens=request.max_output_tokens,
            stop_ids=model.tokenizer.eog_ids, n_ctx=request.context_length,
            on_finish=lambda: self.library.release(model))

    def _template_switches(self) -> dict:
        """What tells the template whether to reason; nothing for a model that offers no choice."""
        if self.reasoning is None:
            return {}
        thinks = self.reasoning != "off"
        effort = {"reasoning_effort": self.reasoning} if self.request.reasoning in EFFORTS else {}
        return {"enable_thinking": thinks, "thinking": thinks, **effort}

    def _updates(self) -> Iterator[Update | None]:
        """The engine's updates; None after each wait in which none came."""
        while True:
            try:
                for update in self.sequence.updates(timeout=self.wait_s):
                    self._check_stopping()
                    yield update
                return
            except TimeoutError:
                self._check_stopping()
                yield None

    def _generate(self) -> Iterator[dict | None]:
        progress = 0.0
        for update in self._updates():
            match update:
                case PromptStarted():
                    self.stats.prompt_started = self.sequence.t_started
                    yield {"type": "prompt_processing.start"}
                case PromptProgress(done, total):
                    progress = max(progress, done / total)
                    yield {"type": "prompt_processing.progress", "progress": progress}
                case PromptDone(t):
                    self.stats.prompt_done = t
                    yield {"type": "prompt_processing.end"}
                case Token(id, t):
                    self.stats.token(t)
                    yield from self._token(id) or [None]
                case Finished(reason, error):
                    self._finished(reason, error)
                case None:
                    yield None
        rest = self.splitter.feed(self.decoder.flush()) + self.splitter.finish()
        yield from self._show(rest, n_tokens=0)
        yield from self.output.finish()

    def _token(self, id: int) -> list[dict]:
        """The events of one token. Control tokens show only where they mark reasoning."""
        tokenizer, markers = self.model.tokenizer, (self.splitter.open, self.splitter.close)
        if id in tokenizer.eog_ids:
            return []
        if tokenizer.is_control(id) and tokenizer.decode([id]) not in markers:
            return []
        return self._show(self.splitter.feed(self.decoder.feed(id)))

    def _show(self, pieces: list[tuple[str, str]], n_tokens: int = 1) -> list[dict]:
        if self.reasoning == "off":
            pieces = [piece for piece in pieces if piece[0] != "reasoning"]
        self.stats.split([channel for channel, _ in pieces], n_tokens)
        return [event for channel, text in pieces for event in self.output.feed(channel, text)]

    def _finished(self, reason: str, error: Exception | None):
        self.ending = reason
        if reason == "error":
            raise error or TinychatError("the engine stopped")
        if reason == "cancelled":
            raise TinychatError("the generation was cancelled")

    # -- the end

    def _save(self) -> str | None:
        request = self.request
        if not request.store:
            return None
        return self.store.save(self.turns, self.system_prompt, self.entry.key, request.input,
                               self.output.items)

    def _chat_end(self, response_id: str | None) -> dict:
        result = {"model_instance_id": self.entry.key, "output": self.output.items,
                  "stats": self.stats.to_json()}
        if response_id:
            result["response_id"] = response_id
        return {"type": "chat.end", "result": result}

    def _fail(self, error: Exception) -> Iterator[dict]:
        if not isinstance(error, TinychatError):
            log.error("a chat failed", exc_info=error)
            error = TinychatError("an internal error; the server's log has it")
        self.ending = error.code or error.type
        yield from self.output.close()
        yield {"type": "error", "error": error.to_json()}
        yield self._chat_end(None)

    def _log(self):
        stats, now = self.stats, time.perf_counter()
        prefilled = stats.n_input - self.sequence.n_cached
        prefill_s = max(stats.prompt_done - stats.prompt_started, 1e-6)
        log.info("%s: %d tokens in, %d cached, prefill %.0f tok/s, %d out, decode %.1f tok/s, "
                 "%.2f s, %s", self.entry.key, stats.n_input, self.sequence.n_cached,
                 prefilled / prefill_s if stats.prompt_done else 0.0, stats.n_output,
                 stats.decode_rate, now - self.began, self.ending)


def _next_of(news: queue.SimpleQueue, wait_s: float) -> float | None:
    """The next progress of a load, None at its end; 0.0 when there was none in time."""
    try:
        return news.get(timeout=wait_s)
    except queue.Empty:
        return 0.0

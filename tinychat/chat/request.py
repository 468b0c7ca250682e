"""The state of one request while its events are made: load, rounds, tools, the end."""
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from tinychat.chat.history import CallIds, images_of, messages_of, round_messages
from tinychat.chat.looking import Looking
from tinychat.chat.prompts import Prompts
from tinychat.chat.round import Prompt, Round
from tinychat.chat.settings import ChatSettings
from tinychat.chat.toolbox import Toolbox
from tinychat.chat.waiting import away, next_of
from tinychat.contract import ChatRequest
from tinychat.engine.sequence import (
    Finished, PromptDone, PromptProgress, PromptStarted, Token)
from tinychat.errors import Overloaded, known
from tinychat.library import Library, LoadedModel, ModelEntry
from tinychat.library.sight import Seen
from tinychat.mcp.results import CallResult
from tinychat.mcp.tools import output_of
from tinychat.output import Output, Stats
from tinychat.store import Store, Turn
from tinychat.text.guide.caller import CallGuide
from tinychat.text.reply.calls import Call, CallStarted, InvalidCall
from tinychat.text.reply.emitter import Event

log = logging.getLogger("tinychat.chat")

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
LEAST_CONTEXT = 2  # an engine has room for a prompt and an answer; a request may ask for less
LOOK_SHARE = 0.5  # of a prompt's progress, where images are encoded for it
WAIT_S = 1.0  # how long one wait lasts when nobody asked for heartbeats


class Chat:
    """One request."""

    def __init__(self, library: Library, store: Store, request: ChatRequest, entry: ModelEntry,
                 turns: list[Turn], settings: ChatSettings):
        self.library, self.store, self.request, self.entry = library, store, request, entry
        self.turns = turns
        self.settings, self.wait_s = settings, settings.heartbeat_s or WAIT_S
        inherited = turns[-1].system_prompt if turns else None
        given = request.system_prompt
        self.system_prompt = (inherited if given is None else given) or None
        self.reasoning = request.reasoning or entry.capabilities.get("reasoning", {}).get("default")
        self.output, self.stats = Output(), Stats()
        self.called_off = threading.Event()         # nobody waits any more
        self.tools = Toolbox(settings, self.called_off)
        self.model: LoadedModel | None = None       # held from acquire to release
        self.loading: Future[LoadedModel] | None = None
        self.round: Round | None = None
        self.looked, self.progress = False, 0.0     # the prompt's start has been told; how far
        self.results: list[tuple[tuple[str, dict], CallResult]] = []  # of the round's calls
        self.began = time.perf_counter()
        self.ending = "cancelled"

    def events(self) -> Iterator[dict | None]:
        if self.request.integrations:
            yield from self._away(lambda: self.tools.connect(self.request.integrations))
        self.ids = CallIds()
        self.messages = messages_of(self.turns, self.system_prompt, self.request, self.ids)
        self.images = images_of(self.turns, self.request)
        self.model = self.library.try_acquire(self.entry, **self._wish())
        if self.model and not self.images:
            self._first_round([])
        yield {"type": "chat.start", "model_instance_id": self.entry.key}
        try:
            if not self.model:
                yield from self._load()
            if not self.round:
                self._first_round((yield from self._look()) if self.images else [])
            yield from self._generate()
            yield from self._away(self.tools.close)
            yield self._chat_end(self._save())
        except Exception as error:
            yield from self._fail(error)

    def end(self):
        """Gives back what the request holds of engine, library and servers, and writes the log's
        line.

        Without tools the model is given back when the engine has done with the sequence: a client
        that reads slowly holds up nobody who wants another model.
        """
        self.called_off.set()
        if self.round:
            self.model.engine.cancel(self.round.sequence)
            self._log()
            if self._holds_model():
                self.library.release(self.model)
        elif self.model:
            self.library.release(self.model)
        elif self.loading:
            self.loading.add_done_callback(self._give_back)
        self.tools.close()

    # -- waiting

    def _check_stopping(self):
        if self.settings.stopping():
            raise Overloaded("the server is shutting down")

    def _away(self, work: Callable[[], Any]) -> Iterator[None]:
        return away(work, self.wait_s, self._check_stopping)

    # -- loading

    def _wish(self) -> dict:
        wanted = self.request.context_length
        return {"context_length": wanted and max(wanted, LEAST_CONTEXT), "ttl": self.request.ttl}

    def _load(self) -> Iterator[dict | None]:
        """Loads on a helper thread, so that progress becomes events while it happens."""
        instance = {"model_instance_id": self.entry.key}
        yield {"type": "model_load.start", **instance}
        news: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self.loading = Future()
        threading.Thread(target=self._load_into, args=(self.loading, news), name="load",
                         daemon=True).start()
        told = 0.0
        while (part := next_of(news, self.wait_s)) is not None:
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

    # -- rounds

    def _holds_model(self) -> bool:
        """A request with tools may have another round after each."""
        return bool(self.request.integrations)

    def _look(self) -> Iterator[dict | None]:
        """Encodes the chat's images, the first part of processing its prompt; returns them."""
        looking = Looking(self.model, self.images, self.called_off)
        if looking.takes_time:
            looking.check_room(min(self.request.context_length or self.model.context_length,
                                   self.model.context_length))
            self.looked = True
            self.stats.begin_prompt(time.perf_counter())
            yield {"type": "prompt_processing.start"}
        for part in looking.parts(self._check_stopping):
            if part is not None:
                yield from self._tell_progress(LOOK_SHARE * part)
            yield None
        return looking.seen

    def _first_round(self, seen: list[Seen]):
        self.prompts = Prompts(self.model, self.reasoning, bool(self.request.reasoning),
                               self.tools.definitions, self.tools.schemas, seen)
        self._begin(self.prompts.first(self.messages))
        self.stats.n_input = len(self.round.prompt.ids)

    def _begin(self, prompt: Prompt):
        """Queues a prompt. Raises: ContextOverflow, Overloaded, TemplateError."""
        model, request = self.model, self.request
        given = {name: getattr(request, name) for name in SAMPLING_FIELDS
                 if getattr(request, name) is not None}
        on_finish = (lambda: None) if self._holds_model() else lambda: self.library.release(model)
        self.round = Round(model, prompt, check=self._check_stopping, wait_s=self.wait_s,
                           params=replace(model.defaults, **given), max_tokens=self._n_left(),
                           n_ctx=request.context_length, on_finish=on_finish,
                           guide=self._guide(prompt))

    def _guide(self, prompt: Prompt) -> CallGuide | None:
        """What keeps the model's calls well-formed."""
        format = self.model.template.format
        if not prompt.schemas or format.frame or not self.settings.guided_tool_calls:
            return None
        return CallGuide(format, prompt.schemas, prompt.prefill, self.model.tokenizer,
                         self.model.trie)

    def _n_left(self) -> int | None:
        """Tokens that the request may still generate; None: no limit of its own."""
        most = self.request.max_output_tokens
        return None if most is None else most - self.stats.n_output

    def _generate(self) -> Iterator[dict | None]:
        n_rounds = 0
        while True:
            yield from self._one_round()
            self.ending = self.round.reason
            if not self.results or self._n_left() == 0 or self.round.reason == "context":
                break
            n_rounds += 1
            self._next_round(with_tools=n_rounds < self.settings.max_tool_rounds)
        yield from self.output.finish()

    def _one_round(self) -> Iterator[dict | None]:
        self.results = []
        self.n_items = len(self.output.items)
        for update in self.round.updates():
            match update:
                case PromptStarted() if not self.looked:
                    self.progress = 0.0
                    self.stats.begin_prompt(self.round.sequence.t_started)
                    yield {"type": "prompt_processing.start"}
                case PromptProgress(done, total):
                    share = LOOK_SHARE if self.looked else 0.0
                    yield from self._tell_progress(share + (1 - share) * done / total)
                case PromptDone(t):
                    self.looked = False
                    sequence = self.round.sequence
                    self.stats.end_prompt(t, sequence.n_prompt - sequence.n_cached)
                    yield {"type": "prompt_processing.end"}
                case Token(id, t):
                    self.stats.token(t)
                    yield from self._show(self.round.token(id))
                    yield None
                case Finished(reason, error):
                    yield from self._show(self.round.finished(reason, error))
                case None:
                    yield None
        yield from self.output.close()
        if self.reasoning != "off":
            self.stats.n_reasoning += self.round.n_reasoning
        self.stats.n_cached += self.round.sequence.n_cached

    def _tell_progress(self, progress: float) -> Iterator[dict]:
        if progress > self.progress:
            self.progress = progress
            yield {"type": "prompt_processing.progress", "progress": progress}

    def _show(self, events: list[Event]) -> Iterator[dict | None]:
        for event in events:
            match event:
                case ("reasoning", _) if self.reasoning == "off":
                    pass
                case (channel, text):
                    yield from self.output.feed(channel, text)
                case CallStarted(name):
                    yield from self.output.begin_call(self.tools.own_name(name),
                                                      self.tools.provider_info(name))
                case Call(name, arguments):
                    yield from self._call(name, arguments)
                case InvalidCall():
                    yield from self._refuse(event)

    def _call(self, name: str, arguments: dict) -> Iterator[dict | None]:
        yield self.output.call_arguments(arguments)
        result = yield from self._away(lambda: self.tools.call(name, arguments))
        self.results.append(((name, arguments), result))
        yield self.output.end_call(output_of(result))

    def _refuse(self, invalid: InvalidCall) -> Iterator[dict]:
        """The model reads why, and may try again."""
        metadata = invalid.metadata()
        if invalid.kind == "invalid_arguments":
            info = self.tools.provider_info(invalid.tool)
            metadata.update(tool_name=self.tools.own_name(invalid.tool), provider_info=info)
            if not self.output.in_call:
                yield from self.output.begin_call(metadata["tool_name"], info)
        result = CallResult([{"type": "text", "text": f"Error: {invalid.reason}"}], None, True)
        self.results.append(((invalid.tool, invalid.arguments or {}), result))
        yield from self.output.fail_call(invalid.reason, metadata)

    def _next_round(self, with_tools: bool):
        """Appends what the model said and what its calls gave, and starts the next prompt."""
        read = self.prompts.reader(self.round, self._n_ctx(), len(self.results))
        results = [(call, read(result)) for call, result in self.results]
        news = round_messages(self.output.items[self.n_items:], results, self.ids)
        self._begin(self.prompts.following(self.round, self.messages, news, with_tools))
        self.messages += news

    def _n_ctx(self) -> int:
        asked = self.request.context_length
        return min(asked or self.model.context_length, self.model.context_length)

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
        error = known(error, log, "a chat")
        self.ending = error.code or error.type
        yield from self.output.close()
        yield {"type": "error", "error": error.to_json()}
        yield self._chat_end(None)

    def _log(self):
        stats, now = self.stats, time.perf_counter()
        log.info("%s: %d tokens in, %d cached, prefill %.0f tok/s, %d out, decode %.1f tok/s, "
                 "%.2f s, %s", self.entry.key, stats.n_input,
                 stats.n_cached or self.round.sequence.n_cached, stats.prefill_rate,
                 stats.n_output, stats.decode_rate, now - self.began, self.ending)

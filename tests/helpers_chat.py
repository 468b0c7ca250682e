"""A scripted model and library: everything round a chat but the numbers. Byte tokenizer, ids 0 to 255.

`ScriptedLibrary(answer)` has one model, key "test/scripted"; `answer(prompt) -> list of ids` is what it
generates. A sequence is fed by a thread of its own, so that time passes as it does with an engine.
"""
import http.client
import json
import threading
import time
from dataclasses import dataclass, field

from contract_checker import check_error, check_response, check_stream, parse_sse

from tinychat.engine.sampler import SamplingParams
from tinychat.engine.sequence import Finished, PromptDone, PromptProgress, PromptStarted, Token
from tinychat.errors import ContextOverflow, ModelNotFound, Overloaded, TinychatError
from tinychat.sse import Decoder
from tinychat.text.prompt.template import ChatTemplate

KEY = "test/scripted"
WAIT_S = 10.0  # bound of every wait; a test that needs it has failed
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
START, END, THINK, UNTHINK = range(256, 260)


def ids_of(text: str) -> list[int]:
    """The tokens of a text, the special ones by name: 'a<think>' -> [97, 258]."""
    ids, data = [], text.encode()
    while data:
        for id, name in enumerate(SPECIAL, 256):
            if data.startswith(name.encode()):
                ids.append(id)
                data = data[len(name):]
                break
        else:
            ids.append(data[0])
            data = data[1:]
    return ids


def says(text: str):
    """An answer that is this text and then the end of the turn, whatever the prompt."""
    return lambda prompt: [*ids_of(text), END]


class ByteTokenizer:
    """As tinychat.text.tokenizer.Tokenizer, one token per byte."""

    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + SPECIAL
    n_vocab = 260
    bos_id, eos_id, add_bos, add_eos = None, END, False, False
    eog_ids = frozenset({END})
    stop_ids = frozenset({END, START})

    def encode(self, text, *, special=False):
        return ids_of(text) if special else list(text.encode())

    def encode_plain(self, text, after_special=False):
        return list(text.encode())

    def decode(self, ids, *, special=True):
        return b"".join(self.token_bytes(id) for id in ids
                        if special or not self.is_control(id)).decode("utf-8", "replace")

    def decoder(self):
        return ByteDecoder(self)

    def token_bytes(self, id):
        return bytes([id]) if id < 256 else SPECIAL[id - 256].encode()

    def is_control(self, id):
        return id >= 256


class ByteDecoder:
    def __init__(self, tokenizer):
        import codecs
        self.tokenizer, self.text = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id):
        return self.text.decode(self.tokenizer.token_bytes(id))

    def flush(self):
        return self.text.decode(b"", final=True)


@dataclass(eq=False)
class ScriptedSequence:
    n_prompt: int
    n_cached: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    t_started: float = 0.0

    def __post_init__(self):
        self._news, self._over, self._changed = [], False, threading.Condition()

    def put(self, update):
        with self._changed:
            self._news.append(update)
            self._changed.notify()

    def updates(self, timeout=None):
        while not self._over:
            with self._changed:
                if not self._changed.wait_for(lambda: self._news, timeout):
                    raise TimeoutError
                update = self._news.pop(0)
            self._over = isinstance(update, Finished)
            yield update


class ScriptedEngine:
    """gate: when given, each token waits until it is released once (threading.Semaphore)."""

    def __init__(self, answer, tokenizer, *, n_ctx, gate=None, slots=1000, fault_after=None):
        self.answer, self.tokenizer, self.n_ctx, self.gate = answer, tokenizer, n_ctx, gate
        self.slots, self.fault_after, self.fault = slots, fault_after, RuntimeError("scripted fault")
        self.submitted, self.prompts, self.n_running = [], [], 0
        self.idle = threading.Condition()

    def submit(self, ids, *, params, max_tokens, stop_ids, n_ctx=None, seed=None,
               guide=None, images=(), on_finish=lambda: None):
        limit = min(n_ctx or self.n_ctx, self.n_ctx)
        if len(ids) >= limit:
            raise ContextOverflow(f"prompt of {len(ids)} tokens, context of {limit}", param="input")
        if self.n_running >= self.slots:
            raise Overloaded("the queue is full")
        sequence = ScriptedSequence(len(ids))
        sequence.params = params
        self.submitted.append(sequence)
        self.prompts.append(self.tokenizer.decode(ids))
        with self.idle:
            self.n_running += 1
        threading.Thread(target=self._feed, daemon=True,
                         args=(sequence, self.prompts[-1], max_tokens, stop_ids, limit, on_finish)).start()
        return sequence

    def _feed(self, sequence, prompt, max_tokens, stop_ids, limit, on_finish):
        reason = "length"
        sequence.t_started = time.perf_counter()
        sequence.put(PromptStarted())
        sequence.put(PromptProgress(sequence.n_prompt, sequence.n_prompt))
        sequence.put(PromptDone(time.perf_counter()))
        error = None
        for n, id in enumerate(self.answer(prompt), 1):
            if self.gate and not self._released(sequence):
                reason = "cancelled"
                break
            if self.fault_after is not None and n > self.fault_after:
                reason, error = "error", self.fault
                break
            sequence.put(Token(id, time.perf_counter()))
            if id in stop_ids:
                reason = "stop"
                break
            if n == max_tokens or sequence.n_prompt + n >= limit:
                reason = "length" if n == max_tokens else "context"
                break
        with self.idle:
            self.n_running -= 1
            self.idle.notify_all()
        on_finish()
        sequence.put(Finished(reason, error))

    def _released(self, sequence):
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and not sequence.cancelled.is_set():
            if self.gate.acquire(timeout=0.01):
                return True
        return False

    def cancel(self, sequence):
        sequence.cancelled.set()

    def wait_idle(self) -> bool:
        with self.idle:
            return self.idle.wait_for(lambda: self.n_running == 0, WAIT_S)


@dataclass
class ScriptedEntry:
    key: str = KEY
    type: str = "llm"
    max_context_length: int = 8192
    capabilities: dict = field(default_factory=lambda: {"vision": False, "trained_for_tool_use": False})
    variants: tuple = ()
    path: str = "scripted.gguf"

    def to_json(self, instances=()):
        common = {"type": self.type, "publisher": "test", "key": self.key, "display_name": "Scripted",
                  "quantization": None, "size_bytes": 1, "params_string": None,
                  "loaded_instances": list(instances), "max_context_length": self.max_context_length,
                  "format": "gguf"}
        llm = {"architecture": "bytes", "capabilities": self.capabilities, "description": None}
        names = {"variants": list(self.variants), "selected_variant": self.variants[0]} if self.variants else {}
        return {**common, **(llm if self.type == "llm" else {}), **names}


TEMPLATE = """{% if reasoning_effort %}effort {{ reasoning_effort }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
REASONING_TEMPLATE = TEMPLATE + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


class ScriptedModel:
    load_time_seconds = 0.25

    def __init__(self, entry, engine, tokenizer, context_length):
        self.entry, self.engine, self.tokenizer = entry, engine, tokenizer
        self.template = ChatTemplate(REASONING_TEMPLATE if "reasoning" in entry.capabilities else TEMPLATE,
                                     special=SPECIAL)
        self.context_length, self.defaults, self.n_users = context_length, SamplingParams(), 0
        self.trie = None  # nobody samples here

    def to_json(self):
        return {"id": self.entry.key, "config": {"context_length": self.context_length, "parallel": 4}}


class ScriptedLibrary:
    """One or more entries that all answer alike. loaded=False: the first request loads.

    load_gate: an Event without which no load ends; load_error: what a load raises.
    """

    def __init__(self, answer, *, entries=None, loaded=True, jit=True, default_context_length=4096,
                 load_gate=None, load_error=None, **engine):
        self.answer, self.engine_options, self.jit = answer, engine, jit
        self.entries = {e.key: e for e in entries or [ScriptedEntry()]}
        self.default_context_length = default_context_length
        self.load_gate, self.load_error, self.n_loads = load_gate, load_error, 0
        self.models, self.lock = {}, threading.Lock()
        if loaded:
            for key in self.entries:
                self._open(key, None)
            self.n_loads = 0

    @property
    def engine(self):
        return next(iter(self.models.values())).engine

    def find(self, name):
        for entry in self.entries.values():
            if name in (entry.key, *entry.variants):
                return entry
        raise ModelNotFound("no such model", param="model")

    def list(self):
        return list(self.entries.values())

    def loaded(self, key):
        return self.models.get(key)

    instance = loaded

    def instances(self):
        return []

    def counters(self):
        return {}

    def expects(self, entry):
        return entry.key in self.models

    def try_acquire(self, entry, *, context_length=None, ttl=None):
        with self.lock:
            model = self.models.get(entry.key)
            if model is None or (context_length or 0) > model.context_length:
                return None
            model.n_users += 1
            return model

    def acquire(self, entry, *, context_length=None, ttl=None, progress=None):
        with self.lock:
            model = self.models.get(entry.key)
            if model is None or (context_length or 0) > model.context_length:
                model = self._load(entry, context_length, progress or (lambda part: None))
            model.n_users += 1
        return model

    def _load(self, entry, context_length, progress):
        progress(0.5)
        if self.load_gate and not self.load_gate.wait(WAIT_S):
            raise TinychatError("the test never opened the gate")
        if self.load_error:
            raise self.load_error
        progress(1.0)
        return self._open(entry.key, context_length)

    def _open(self, key, context_length):
        n_ctx = context_length or min(self.default_context_length, self.entries[key].max_context_length)
        tokenizer = ByteTokenizer()
        engine = ScriptedEngine(self.answer, tokenizer, n_ctx=n_ctx, **self.engine_options)
        self.n_loads += 1
        self.models[key] = ScriptedModel(self.entries[key], engine, tokenizer, n_ctx)
        return self.models[key]

    def release(self, model):
        with self.lock:
            model.n_users -= 1

    def wait_idle(self) -> bool:
        """Every sequence ended and every model given back, within the bound."""
        deadline = time.monotonic() + WAIT_S
        while any(m.n_users or m.engine.n_running for m in self.models.values()):
            if time.monotonic() > deadline:
                return False
            threading.Event().wait(0.01)
        return True


def reasoning_entry(options=("off", "on"), default="on", **changes) -> ScriptedEntry:
    return ScriptedEntry(capabilities={
        "vision": False, "trained_for_tool_use": False,
        "reasoning": {"allowed_options": list(options), "default": default}}, **changes)


class Client:
    """Asks a server over real sockets and holds every answer against the contract."""

    def __init__(self, server):
        self.server = server

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=WAIT_S)

    def request(self, method, path, body=None, headers=None):
        """(status, headers, bytes)."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, body, path="/api/v1/chat"):
        """(status, parsed body): an error or a finished response, checked either way."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, headers, data = self.request("POST", path, data, {"Content-Type": "application/json"})
        assert headers["Content-Type"] == "application/json; charset=utf-8"
        answer = json.loads(data)
        checked = (check_response(answer, request=body if isinstance(body, dict) else None)
                   if status == 200 else check_error(answer, status))
        assert checked == []
        return status, answer

    def chat(self, input="hi", model=KEY, **fields):
        """The finished response."""
        status, answer = self.post({"model": model, "input": input, **fields})
        assert status == 200, answer
        return answer

    def error(self, input="hi", model=KEY, **fields):
        """(status, code, param) of a refused chat."""
        status, answer = self.post({"model": model, "input": input, **fields})
        assert status != 200, answer
        return status, answer["error"]["code"], answer["error"].get("param")

    def stream(self, input="hi", model=KEY, **fields):
        """The events of a stream, as (name, data)."""
        body = {"model": model, "input": input, "stream": True, **fields}
        status, headers, data = self.request("POST", "/api/v1/chat", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
        assert (status, headers["Content-Type"]) == (200, "text/event-stream"), data
        assert check_stream(data, request=body) == []
        return parse_sse(data)[0]

    def events(self, input="hi", model=KEY, **fields):
        """The same one by one as they come; closing the iterator goes away."""
        connection, decoder = self.connect(), Decoder()
        try:
            body = {"model": model, "input": input, "stream": True, **fields}
            connection.request("POST", "/api/v1/chat", json.dumps(body).encode(),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            while data := response.read1():
                for event in decoder.feed(data):
                    yield event.event, json.loads(event.data)
        finally:
            connection.close()

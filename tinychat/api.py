"""The door for programs: a model as an object, a tokenizer alone, a server inside the process."""
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np

from tinychat import chat, images
from tinychat.contract import ChatRequest, Plugin as PluginName, parse_chat_request, parse_json
from tinychat.engine.embedder import Embedder
from tinychat.engine.engine import Engine
from tinychat.engine.sequence import Finished, Token
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.library import Library, LoadedModel
from tinychat.mcp.config import MCP_JSON_NAME
from tinychat.mcp.plugins import Plugins
from tinychat.store import IN_MEMORY, Store
from tinychat.text.prompt.template import ChatTemplate, render
from tinychat.text.reply.parse import items, parser_for, schemas_of
from tinychat.text.tokenizer import Tokenizer

Name = str | os.PathLike  # a key of the library, a name of the catalogue, or a file's path
STORE_NAME = "responses.sqlite3"
__all__ = ["Model", "Serving", "load", "load_tokenizer", "parse_output", "render", "serve"]
LIBRARY_OPTIONS = signature(Library).parameters.keys()


def load(name: Name, *, context_length: int | None = None, store: str | os.PathLike = IN_MEMORY,
         **options) -> "Model":
    """The model of that name or path, in memory; one of the catalogue is fetched on first use.

    context_length: tokens of prompt and answer together; None: 4096, or the model's own when less.
    store: where chats are kept for `previous_response_id`, a file or ":memory:".
    options: parallel, queue_limit, kv_type ("f16", "q8_0", "f32"), threads, prompt_lookup, home;
    see `Library`.
    Raises: ModelNotFound, ModelFileError, ModelLoadError.
    """
    with ExitStack() as undo:
        library = Library(**options)
        undo.callback(library.close)
        key = library.ensure(name).key
        responses = Store(store)
        undo.callback(responses.close)
        model = Model(library, key, responses, context_length)
        undo.pop_all()
    return model


def load_tokenizer(path: str | os.PathLike) -> "Vocabulary":
    """The tokenizer of a GGUF file, which may hold nothing else. Raises: ModelFileError."""
    with open_gguf(path) as file:
        return Vocabulary(Tokenizer.from_metadata(file.metadata))


def parse_output(text: str, template: str, tools: Iterable[dict] = (), prefill: str = "",
                 cut: bool = False) -> list[dict]:
    """What a model wrote, control tokens spelled out, as the items of a chat's output.

    template: the source of the model's chat template, which shows how it writes calls and thoughts.
    tools: those offered, as OpenAI-style functions. prefill: the end of the prompt that belongs to
    the assistant's turn. cut: the token limit ended it.
    Items: reasoning and message with `content`, tool_call with `tool` and `arguments`,
    invalid_tool_call with `reason` and `metadata`; none when there is nothing to show.
    """
    parser = parser_for(ChatTemplate(template).format, schemas_of(tools), prefill)
    return items([*parser.feed(text), *parser.finish(cut)])


def serve(models: "Name | Model | Iterable[Name]" = (), *, host: str = "127.0.0.1",
          port: int = 1234, store: str | os.PathLike | None = None,
          max_stored_responses: int = 10_000, **settings) -> "Serving":
    """A server on threads of its own, with the models in memory; close it, or use it in a `with`.

    models: names or paths; or one loaded `Model`, which the server then shares.
    port: 0 takes a free one. store: a file, ":memory:", or None for a file in the data folder;
    a shared model keeps its own.
    settings: the server's, such as cors, and those of `Library`, such as parallel and home.
    Raises: TinychatError when a model cannot be loaded or the address is taken.
    """
    if isinstance(models, Model):
        return Serving(models.library, models.store, owns=(), host=host, port=port, **settings)
    names = [models] if isinstance(models, (str, os.PathLike)) else list(models)
    with ExitStack() as undo:
        library = Library(**{key: settings.pop(key) for key in LIBRARY_OPTIONS & settings.keys()})
        undo.callback(library.close)
        for name in names:
            library.load(library.ensure(name).key)
        responses = Store(library.home / STORE_NAME if store is None else store,
                          max_responses=max_stored_responses)
        undo.callback(responses.close)
        serving = Serving(library, responses, owns=(library, responses), host=host, port=port,
                          **settings)
        undo.pop_all()
    return serving


def chat_request(**fields) -> ChatRequest:
    """A request as the server would read it from the wire; None leaves a field out.

    Raises: InvalidRequest.
    """
    if isinstance(fields.get("input"), (list, tuple)):
        fields["input"] = [_wire_item(item) for item in fields["input"]]
    try:
        body = json.dumps({name: value for name, value in fields.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"expected values that JSON has: {error}") from None
    return parse_chat_request(parse_json(body.encode()))


def _wire_item(item):
    """An item of the wire from what stands for one in Python. Raises: InvalidRequest."""
    if isinstance(item, str):
        return {"type": "text", "content": item}
    if isinstance(item, (bytes, bytearray, os.PathLike)):
        return {"type": "image", "data_url": images.data_url(images.load(item))}
    return item


def _texts_in(texts: Iterable[str]) -> list[str]:
    """Raises: InvalidRequest for anything but texts, and for one text that is not in a list."""
    found = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else None
    if found is None or not all(isinstance(one, str) for one in found):
        kinds = {type(one).__name__ for one in found or [texts]}
        raise InvalidRequest(f"expected a list of texts, got {'items of type ' if found else ''}"
                             f"{', '.join(sorted(kinds))}", param="input")
    return found


class Serving:
    """A running server: `url`, `close()`."""

    def __init__(self, library: Library, store: Store, *, owns: tuple, **settings):
        from tinychat.server import make_server
        self.library, self._owns = library, owns
        self._server = make_server(library, store, **settings)
        self.url: str = self._server.url
        self._server.start()

    def close(self) -> None:
        """Stop taking requests, end those that run, free what it loaded; may be called again."""
        self._server.close()
        for owned in self._owns:
            owned.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


class Vocabulary:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """No BOS is added. special: whether control tokens written in the text are recognised."""
        return self._tokenizer.encode(text, special=special)

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))


class Model(Vocabulary):
    """A loaded model. Its methods may be called from many threads at once: they share its steps."""

    def __init__(self, library: Library, key: str, store: Store, context_length: int | None = None):
        self.library, self.key, self.store = library, key, store
        loaded = library.load(key, context_length=context_length)
        super().__init__(loaded.tokenizer)
        self._template = loaded.template
        self.path: Path = loaded.entry.path
        self.context_length = loaded.context_length
        self.load_time_seconds = loaded.load_time_seconds
        self._closed = False
        self._plugins: Plugins | None = None
        self._lock = threading.Lock()

    def chat(self, input: "str | list[dict | str | bytes | Path]", *,
             system_prompt: str | None = None, stream: bool = False,
             temperature: float | None = None, top_p: float | None = None,
             top_k: int | None = None, min_p: float | None = None,
             repeat_penalty: float | None = None, max_output_tokens: int | None = None,
             reasoning: str | None = None, context_length: int | None = None,
             previous_response_id: str | None = None, store: bool = True,
             integrations: list | None = None) -> "dict | Iterator[dict]":
        """The wire's `POST /api/v1/chat`: its response, or with `stream` its events one by one.

        input: a text, or a list of the wire's items, in which a text may stand by itself, and a
        path or bytes for an image, beside `{"type": "image", "data_url": ...}`.
        Closing the iterator stops the answer. None leaves a field out.
        Raises: TinychatError, for a bad field at once; in a stream later errors are events.
        """
        fields = {name: value for name, value in locals().items() if name != "self"}
        self._check_open()
        request = chat_request(model=self.key, **fields)
        events = chat.run(self.library, self.store, request,
                          chat.ChatSettings(plugins=self._plugins_for(request)))
        if stream:
            return events
        with closing(events):
            return chat.fold(events)

    def _plugins_for(self, request: ChatRequest) -> Plugins | None:
        """The servers of mcp.json in the data folder, once somebody asks for one."""
        if any(isinstance(one, PluginName) for one in request.integrations):
            with self._lock:
                if self._plugins is None:
                    self._plugins = Plugins(self.library.home / MCP_JSON_NAME)
        return self._plugins

    def render(self, messages: list[dict], tools: list[dict] | None = None,
               **template_kwargs) -> str:
        """The prompt that the model's own template makes of messages. Raises: TemplateError."""
        return self._template.render(messages, tools, **template_kwargs)

    def logits(self, ids: Iterable[int]) -> np.ndarray:
        """float32 (n_tokens, n_vocab): row t scores what follows ids[:t + 1].

        Raises: ContextOverflow; InvalidRequest for no ids, or ids outside the vocabulary.
        """
        with self._loaded(Engine, "cannot write texts") as loaded:
            return loaded.engine.logits(list(ids))

    def embed(self, texts: Iterable[str], *, normalize: bool = True) -> np.ndarray:
        """float32 (n_texts, n_embd): a vector of each text, pooled as the file says.

        normalize: to length 1. Raises: InvalidRequest for a model that is no embedding model or a
        text without a token, ContextOverflow.
        """
        texts = _texts_in(texts)
        with self._loaded(Embedder, "makes no vectors: it is no embedding model") as loaded:
            vectors = loaded.engine.embed([loaded.tokenizer.encode_prompt(text) for text in texts])
        if normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return vectors

    def generate(self, ids: Iterable[int], *, max_tokens: int | None = None,
                 stop_ids: Iterable[int] | None = None, seed: int | None = None,
                 **sampling) -> Iterator[int]:
        """The ids that follow `ids`, one by one, a stop id too; closing the iterator stops it.

        stop_ids: None for the model's end-of-turn tokens, () for none. sampling: temperature,
        top_p, top_k, min_p, repeat_penalty; the model's own settings where left out.
        Raises: ContextOverflow, InvalidRequest, at the first id.
        """
        stops = self._tokenizer.eog_ids if stop_ids is None else frozenset(stop_ids)
        with self._loaded(Engine, "cannot write texts") as loaded:
            sequence = loaded.engine.submit(
                list(ids), params=replace(loaded.defaults, **sampling), max_tokens=max_tokens,
                stop_ids=stops, seed=seed)
            try:
                for update in sequence.updates():
                    if isinstance(update, Token):
                        yield update.id
                    elif isinstance(update, Finished) and update.error:
                        raise update.error
            finally:
                loaded.engine.cancel(sequence)

    def close(self) -> None:
        """Free the model; what still runs on it ends with an error. May be called again."""
        self._closed = True
        if self._plugins:
            self._plugins.close()
        self.library.close()
        self.store.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @contextmanager
    def _loaded(self, kind: type, otherwise: str) -> Iterator[LoadedModel]:
        """The model, held, whose engine is of this kind. Raises: InvalidRequest."""
        self._check_open()
        with self.library.use(self.key) as loaded:
            if not isinstance(loaded.engine, kind):
                raise InvalidRequest(f"{self.key} {otherwise}", param="model")
            yield loaded

    def _check_open(self) -> None:
        if self._closed:
            raise TinychatError(f"the model {self.key} is closed")

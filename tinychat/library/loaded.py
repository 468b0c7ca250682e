"""One model in memory: file, program, executor, engine and text, opened and closed together."""
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from tinychat.engine.embedder import POOLINGS, USABLE, Embedder
from tinychat.engine.engine import Engine
from tinychat.engine.sampler import SamplingParams
from tinychat.errors import InvalidRequest, ModelFileError, ModelLoadError, TinychatError
from tinychat.gguf_file import GGUFFile, open_gguf
from tinychat.library.entry import ModelEntry
from tinychat.library.memory import (
    MemoryPlan, available_memory, bytes_without_context, plan_memory)
from tinychat.library.sight import Sight
from tinychat.models import build_program
from tinychat.models.vision import read_tower
from tinychat.ops import open_executor, why_reference
from tinychat.ops.program import Program
from tinychat.text.guide import TokenTrie
from tinychat.text.prompt.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

CHUNK = 512  # tokens of one prefill step
LARGE_IMAGE = 1024  # tokens of one that see one another
MIN_SLOTS = 64
MIN_CONTEXT = 2  # a prompt token and an answer's
SAMPLING_KEYS = {  # a model's own generation settings: ours, and where the file keeps them
    "temperature": "general.sampling.temp", "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k", "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True)
class LoadSettings:
    """What the loads of a library share. threads None: as many as this process has cores.

    eval_batch_size: prompt tokens of one step, which the instance caps at its context.
    prompt_lookup: see `Engine`.
    """

    parallel: int = 4
    queue_limit: int = 64
    kv_type: str = "f16"
    threads: int | None = None
    eval_batch_size: int = CHUNK
    prompt_lookup: bool = True

    def step_tokens(self, n_ctx: int, program: Program) -> int:
        """The most of one step: a chunk of prompts, or a token of each running request; where
        images must not be cut there is room for a large one."""
        n = max(min(self.eval_batch_size, n_ctx), self.parallel)
        return max(n, min(LARGE_IMAGE, n_ctx) + self.parallel) if program.n_spans else n


@dataclass(eq=False)
class LoadedModel:
    """The last four fields belong to the library, under its lock.

    on_demand: loaded for a request. ttl_s: idle seconds after which it goes, None for never.
    """

    entry: ModelEntry
    file: GGUFFile
    program: Program
    executor: object
    engine: Engine | Embedder
    tokenizer: Tokenizer
    template: ChatTemplate
    context_length: int
    defaults: SamplingParams
    memory: MemoryPlan
    settings: LoadSettings
    load_time_seconds: float
    sight: Sight | None = None
    n_users: int = 0
    on_demand: bool = False
    ttl_s: float | None = None
    idle_since: float = field(default_factory=time.monotonic)

    @cached_property
    def trie(self) -> TokenTrie:
        """The vocabulary as the guidance of tool calls needs it, built when it is first used."""
        return TokenTrie(self.tokenizer, self.template.format.texts()).prepare()

    @property
    def eval_batch_size(self) -> int:
        return min(self.settings.eval_batch_size, self.context_length)

    def to_json(self) -> dict:
        """The wire's loaded instance."""
        parallel = {"parallel": self.settings.parallel} if self.entry.type == "llm" else {}
        return {"id": self.entry.key, "config": {**self.load_config(), **parallel}}

    def load_config(self) -> dict:
        """What of a load's fields applied, on the wire."""
        batch = {"eval_batch_size": self.eval_batch_size} if self.entry.type == "llm" else {}
        return {"context_length": self.context_length, **batch}

    def stop(self, error: TinychatError | None = None) -> bool:
        """What runs ends with `error`, and nothing new begins. False: a step goes on still."""
        if self.sight:
            self.sight.stop(error)
        return self.engine.close(error)

    def close(self, error: TinychatError | None = None) -> None:
        """End what runs with `error` and give the memory back."""
        has_ended = self.stop(error)
        if self.sight:
            self.sight.close()
        if has_ended:  # else a step is inside the executor: its memory must stay
            self.executor.close()
            self.file.close()


def open_model(entry: ModelEntry, n_ctx: int, settings: LoadSettings,
               report: Callable[[float], None] = lambda part: None) -> LoadedModel:
    """Load a model with a context of `n_ctx` tokens; `report` gets 0 to 1.

    Raises: ModelFileError, ModelLoadError; both with param "model".
    """
    with _told_of(entry):
        return _open_model(entry, n_ctx, settings, report)


def check(entry: ModelEntry, n_ctx: int, settings: LoadSettings, freed_bytes: int) -> None:
    """Raises what `open_model` would, as far as that is known without loading any weights.

    freed_bytes: what will be given back before the load.
    """
    with _told_of(entry), open_gguf(entry.path) as file:
        n_ctx = max(n_ctx, MIN_CONTEXT)
        plan(_program(entry, file, n_ctx), entry, n_ctx, settings, freed_bytes)


@contextmanager
def _told_of(entry: ModelEntry) -> Iterator[None]:
    """Errors of a load as clients may read them: with the file's name, but not its folder."""
    try:
        yield
    except (TinychatError, OSError, MemoryError) as error:
        said = "out of memory" if isinstance(error, MemoryError) else str(error)
        said = said.replace(f"{entry.path.parent}{os.sep}", "")
        if isinstance(error, (ModelFileError, ModelLoadError)):
            raise type(error)(said, param="model") from error
        raise ModelLoadError(f"{entry.key}: {said}", param="model") from error


def _open_model(entry, n_ctx, settings, report) -> LoadedModel:
    start = time.perf_counter()
    n_ctx = max(n_ctx, MIN_CONTEXT)
    with ExitStack() as undo:
        file = undo.enter_context(open_gguf(entry.path))
        report(0.05)
        program = _program(entry, file, n_ctx)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        _check_vocabulary(file, program, tokenizer)
        template = ChatTemplate.from_metadata(file.metadata, tokenizer)
        memory = plan(program, entry, n_ctx, settings)
        sight = None
        if entry.sees:
            sight = Sight(entry, program, threads=settings.threads)
            undo.callback(sight.close)
        report(0.3)
        run = _engine if entry.type == "llm" else _embedder
        executor, engine = run(undo, file, program, n_ctx, settings, memory)
        report(1.0)
        undo.pop_all()
    return LoadedModel(entry, file, program, executor, engine, tokenizer, template, n_ctx,
                       sampling_defaults(file.metadata), memory, settings,
                       time.perf_counter() - start, sight)


def _program(entry: ModelEntry, file: GGUFFile, n_ctx: int) -> Program:
    return build_program(file, n_ctx=n_ctx, hidden=entry.type != "llm", sees=entry.sees)


def _engine(undo: ExitStack, file, program, n_ctx, settings, memory):
    executor = open_executor(
        program, n_pages=memory.n_pages, n_window_pages=memory.n_window_pages,
        n_states=memory.n_states, max_tokens=settings.step_tokens(n_ctx, program),
        max_outputs=max(MIN_SLOTS, settings.parallel),
        max_sequences=max(MIN_SLOTS, settings.parallel + 1),
        kv_type=settings.kv_type, threads=settings.threads)
    undo.callback(executor.close)
    lookup = settings.prompt_lookup and why_reference() is None  # NumPy may round a batch otherwise
    engine = Engine(executor, n_ctx=n_ctx, parallel=settings.parallel,
                    queue_limit=settings.queue_limit, chunk=min(settings.eval_batch_size, n_ctx),
                    prompt_lookup=lookup)
    undo.callback(engine.close)
    return executor, engine


def _embedder(undo: ExitStack, file, program, n_ctx, settings, memory):
    executor = open_executor(
        program, n_pages=memory.n_pages, n_window_pages=None, n_states=MIN_SLOTS,
        max_tokens=n_ctx, max_outputs=n_ctx, max_sequences=MIN_SLOTS,
        kv_type="f32", threads=settings.threads)
    undo.callback(executor.close)
    return executor, Embedder(executor, _pooling(file))


def _pooling(file: GGUFFile) -> str:
    """Raises: ModelFileError for one that makes no vector of a text."""
    key = f"{file.architecture}.pooling_type"
    number = file.metadata.get(key)
    name = POOLINGS[number] if type(number) is int and 0 <= number < len(POOLINGS) else None
    if name not in USABLE:
        raise ModelFileError(f"metadata key {key}: expected the number of a pooling, "
                             f"{', '.join(USABLE)}, got {name or repr(number)}")
    return name


def _check_vocabulary(file: GGUFFile, program: Program, tokenizer: Tokenizer) -> None:
    """An id that only one of both knows could be neither read nor written."""
    if tokenizer.n_vocab != program.n_ids:
        raise ModelFileError(f"{file.path}: tokenizer.ggml.tokens has {tokenizer.n_vocab} tokens, "
                             f"but token_embd.weight {program.n_ids} rows")


def plan(program: Program, entry: ModelEntry, n_ctx: int, settings: LoadSettings,
         freed_bytes: int = 0) -> MemoryPlan:
    """`freed_bytes`: what will be given back before the load. Raises: ModelLoadError."""
    available = available_memory()
    is_llm, dequantized = entry.type == "llm", why_reference() is not None
    return plan_memory(program, n_ctx=n_ctx, parallel=settings.parallel if is_llm else 1,
                       max_tokens=settings.step_tokens(n_ctx, program) if is_llm else n_ctx,
                       kv_type=settings.kv_type if is_llm else "f32",
                       extra_bytes=_tower_bytes(entry, dequantized) if entry.sees else 0,
                       dequantized=dequantized,
                       spare_pages=0 if is_llm else MIN_SLOTS,  # texts share a step, but no page
                       available=None if available is None else available + freed_bytes)


def _tower_bytes(entry: ModelEntry, dequantized: bool) -> int:
    with open_gguf(entry.mmproj) as file:
        _, stages = read_tower(file)
        return sum(bytes_without_context(program, n_rows, dequantized)
                   for program, n_rows in stages)


def sampling_defaults(metadata: dict) -> SamplingParams:
    """The file's own settings over ours; one that makes no sense is left out."""
    params = SamplingParams()
    for name, key in SAMPLING_KEYS.items():
        value = metadata.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                params = replace(params, **{name: type(getattr(params, name))(value)})
            except (InvalidRequest, ValueError, OverflowError):
                continue
    return params

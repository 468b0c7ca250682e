"""The commands but for chat: serve, pull, list, inspect, bench."""
import json
import signal
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import tinychat
from tinychat.cli.settings import settings_of
from tinychat.cli.terminal import Bar, print_table, printable, say, size

TEMPLATE_LINES = 8
LONG_VALUE = 60
COLUMNS = ("KEY", "ARCHITECTURE", "PARAMETERS", "QUANTIZATION", "SIZE", "CONTEXT", "PUBLISHER")


def serve(args) -> None:
    from tinychat.api import STORE_NAME
    from tinychat.library import Library, default_model
    from tinychat.server import make_server
    from tinychat.server.handler import is_loopback
    from tinychat.store import Store

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    ours, theirs = settings_of(args)
    with Library(**ours) as library:
        keys = [fetched(library, name).key for name in args.models or [default_model()]]
        with closing(Store(library.home / STORE_NAME)) as store:
            with closing(make_server(library, store, **theirs)) as server:
                loaded = [load_shown(library, key) for key in keys]
                if not is_loopback(theirs["host"]):
                    say(f"WARNING: {theirs['host']} is not a loopback address: whoever reaches "
                        f"port {server.port} can use this server and read its chats")
                serve_until_interrupted(server, loaded)


def serve_until_interrupted(server, loaded) -> None:
    """Serve until SIGINT or SIGTERM."""
    names = ", ".join(f"{model.entry.key} ({model.executor.name})" for model in loaded)
    try:
        server.start()
        say(f"tinychat {tinychat.__version__} is ready: {server.url} with {names}; Ctrl-C stops it")
        while not threading.Event().wait(1.0):  # Windows interrupts no wait without an end
            pass
    except KeyboardInterrupt:
        say("stopping")


def fetched(library, name: str):
    """The entry of a name or path; a model of the catalogue is fetched first, with a bar."""
    with Bar() as bar:
        return library.ensure(name, bar.bytes)


def load_shown(library, key: str):
    with Bar() as bar:
        return library.load(key, progress=lambda part: bar.show(f"loading {key}", part))


def pull(args) -> None:
    from tinychat.library import Library
    with Library() as library:
        with Bar() as bar:
            entry = library.pull(args.name, bar.bytes)
        say(f"{entry.key} is at {entry.path}")


def list_models(args) -> None:
    from tinychat.library import Library, default_model
    with Library() as library:
        rows = [(e.key, e.architecture, e.params_string or "", e.quantization.name or "",
                 size(e.size_bytes), str(e.max_context_length), e.publisher)
                for e in library.list()]
        if rows:
            print_table([COLUMNS, *rows])
        else:
            say(f"no models in {library.home / 'models'}; "
                f"`tinychat pull {default_model()}` fetches one")


def inspect(args) -> None:
    from tinychat.gguf_file import open_gguf
    from tinychat.models import build_program

    with open_gguf(_path_of(args.model)) as file:
        if args.program:
            print(build_program(file))
        else:
            print_summary(file)


def _path_of(model: str) -> Path:
    """Of a file as it is, a vision tower or a vocabulary too, or of a name of the library."""
    from tinychat.library import Library
    if Path(model).is_file():
        return Path(model)
    with Library() as library:
        return library.resolve(model).path


def print_summary(file) -> None:
    """Tensors by type, metadata, and the beginning of the chat template."""
    tensors = file.tensors.values()
    print(f"{file.path}: GGUF version {file.version}, {size(file.path.stat().st_size)}")
    print(f"{len(tensors)} tensors, {size(sum(t.n_bytes for t in tensors))}")
    counts, n_bytes = Counter(), Counter()
    for tensor in tensors:
        counts[tensor.qtype.name] += 1
        n_bytes[tensor.qtype.name] += tensor.n_bytes
    print_table([(f"  {name}", str(n), size(n_bytes[name])) for name, n in counts.most_common()])
    print("metadata")
    for key, value in file.metadata.items():
        if key != "tokenizer.chat_template":
            print(f"  {printable(key)} = {short(value)}")
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        lines = template.splitlines()
        print(f"chat template, {len(template)} characters in {len(lines)} lines")
        for line in lines[:TEMPLATE_LINES]:
            print(f"  {printable(line)}")


def short(value) -> str:
    """One line for a metadata value: long texts are cut, long arrays counted."""
    if isinstance(value, str):
        cut = value if len(value) <= LONG_VALUE else value[:LONG_VALUE] + "…"
        return printable(cut.replace("\n", "⏎"))
    if hasattr(value, "__len__"):
        items = ", ".join(short(item) for item in value[:4])
        return f"[{items}{', …' if len(value) > 4 else ''}] ({len(value)} items)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def bench(args) -> None:
    from tinychat import bench as measure

    ours, _ = settings_of(args)
    result = measure.run(args.model, n_prompt=args.prompt, n_generate=args.generate,
                         n_runs=args.runs, threads=ours["threads"],
                         rival_python=args.vs_python if args.vs else None, say=say)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(measure.table(result))
        print("\n".join(measure.notes(result)))

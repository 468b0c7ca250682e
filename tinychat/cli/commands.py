"""The commands but for chat: serve, pull, list, inspect, bench."""
import json
import logging
import signal
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import tinychat
from tinychat.cli.settings import decide
from tinychat.cli.terminal import Bar, print_table, printable, say, size

TEMPLATE_LINES = 8
LONG_VALUE = 60
FIRST_TOKEN, FIRST_PERMISSIONS = "first", ["chat", "models", "ephemeral_mcp", "mcp"]
TOKEN_COLUMNS = ("NAME", "PERMISSIONS", "CREATED")
COLUMNS = ("KEY", "ARCHITECTURE", "PARAMETERS", "QUANTIZATION", "SIZE", "CONTEXT", "PUBLISHER")


def serve(args) -> None:
    from tinychat.api import STORE_NAME
    from tinychat.library import Library, data_folder, default_model
    from tinychat.server import check_settings, make_server
    from tinychat.store import Store

    settings = decide(args)
    decided = check_settings(**settings.of("server"))  # before anything is fetched
    if args.print_config:
        print(settings.toml(ephemeral_mcp=decided.ephemeral_mcp,
                            require_auth=decided.require_auth,
                            allow_mcp_json=decided.allow_mcp_json,
                            store=str(data_folder() / STORE_NAME)), end="")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    with Library(**settings.of("library")) as library:
        keys = [fetched(library, name).key for name in args.models or [default_model()]]
        store = settings.of("store")
        store["path"] = store["path"] or library.home / STORE_NAME
        with closing(Store(**store)) as store:
            with closing(make_server(library, store, **settings.of("server"))) as server:
                loaded = [load_shown(library, key) for key in keys]
                if decided.mcp_json is not None and not server.tokens.list():
                    make_first_token(server.tokens)
                warn_of_openness(server)
                logging.getLogger("tinychat.access").setLevel(
                    logging.INFO if settings.values["access_log"] else logging.WARNING)
                serve_until_interrupted(server, loaded)


def warn_of_openness(server) -> None:
    """What whoever starts a server has to know of who can reach it."""
    from tinychat.server.origin import is_loopback

    if server.settings.require_auth:
        if not server.tokens.list():
            say("WARNING: no token exists yet, so nobody can use this server; "
                "`tinychat token create NAME` makes one")
    elif not is_loopback(server.settings.host):
        frame = "!" * 78
        say(f"{frame}\nWARNING: {server.settings.host} is not a loopback address, and no token is "
            f"asked for.\nWhoever reaches port {server.port} can use this server, its models and "
            f"its disk, and read\nits chats. `--require-auth` asks for a token of `tinychat token "
            f"create`.\n{frame}")


def make_first_token(tokens) -> None:
    """For --mcp-json, which turned on that a token is asked for."""
    print(tokens.create(FIRST_TOKEN, FIRST_PERMISSIONS), flush=True)
    say(f"no token existed: the one above, {FIRST_TOKEN!r}, was made and is not shown again; it may "
        + ", ".join(FIRST_PERMISSIONS))


def serve_until_interrupted(server, loaded) -> None:
    """Serve until SIGINT or SIGTERM."""
    names = ", ".join(f"{model.entry.key} ({model.executor.name})" for model in loaded)
    try:
        server.start()
        say(f"tinychat {tinychat.__version__} is ready: {server.url} with {names}; Ctrl-C stops it")
        while not threading.Event().wait(1.0):  # Windows interrupts no wait without an end
            pass
    except KeyboardInterrupt:
        say("stopping: running requests may finish")


def token(args) -> None:
    """create prints the token alone on standard output, and only this once."""
    from tinychat.library import data_folder
    from tinychat.server.auth import TOKENS_NAME, Tokens

    tokens = Tokens(data_folder() / TOKENS_NAME)
    if args.action == "create":
        permissions = [one.strip() for one in args.permissions.split(",") if one.strip()]
        print(tokens.create(args.name, permissions))
        say(f"{args.name} may: {', '.join(permissions)}; the token is not shown again")
    elif args.action == "revoke":
        tokens.revoke(args.name)
        say(f"{args.name} is revoked")
    else:
        rows = [(one.name, ",".join(one.permissions), one.created_at) for one in tokens.list()]
        if rows:
            print_table([TOKEN_COLUMNS, *rows])
        else:
            say("no tokens; `tinychat token create NAME` makes one")


def fetched(library, name: str):
    """The entry of a name or path; a model of the catalogue is fetched first, with a bar."""
    with Bar() as bar:
        return library.ensure(name, bar.bytes)


def load_shown(library, key: str):
    with Bar() as bar:
        return library.load(key, progress=lambda part: bar.show(f"loading {key}", part))


def pull(args) -> None:
    from tinychat.library import Library
    name = f"{args.name}:{args.quantization}" if args.quantization else args.name
    with Library() as library:
        with Bar() as bar:
            entry = library.pull(name, bar.bytes)
        say(f"{entry.key} is at {entry.path}")


def list_models(args) -> None:
    from tinychat.library import Library, default_model
    with Library(**decide(args).of("library")) as library:
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
    from tinychat.library.entry import makes_vectors
    from tinychat.models import build_program

    with open_gguf(_path_of(args.model)) as file:
        if args.program:
            print(build_program(file, hidden=makes_vectors(file)))
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
    from tinychat.bench import Plan, run
    from tinychat.bench.plot import plot
    from tinychat.bench.report import notes, table

    threads = decide(args).values["threads"]
    plan = Plan(args.prompt, args.generate, args.streams, args.depths)
    result = run(args.model, plan, n_runs=args.runs, threads=threads,
                 rival_python=args.vs_python if args.vs else None, say=say)
    if args.plot:
        Path(args.plot).write_text(plot(result), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        print_table(table(result))
        print("\n".join(notes(result)))

"""`tinychat mcp`: the servers of mcp.json, their tools, and one call, for people."""
import json
import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tinychat.cli.terminal import one_line, print_table, printable, say
from tinychat.errors import TinychatError

FILE_NAME = "mcp.json"
COLUMNS = ("LABEL", "KIND", "WHAT")
SHOWN_CHARS = 1 << 20  # of a result
WAIT_S = 180.0         # until a server is there: the first start of some downloads them


def mcp(args) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server outlives us
    logging.getLogger("tinychat.mcp.config").setLevel(logging.ERROR)  # the commands say it too
    return {"list": list_servers, "tools": show_tools, "call": call_tool}[args.action](args)


def list_servers(args) -> int:
    from tinychat.mcp.config import McpJson

    config = McpJson(file_of(args))
    entries = config.entries()
    if config.problem:
        raise TinychatError(config.problem)
    if not entries:
        say(f"no servers in {config.path}")
        return 0
    print_table([COLUMNS, *(row_of(entry) for entry in entries.values())])
    return 0


def row_of(entry) -> tuple[str, str, str]:
    """Without arguments, queries, headers and variables: they may hold secrets."""
    from tinychat.mcp.errors import McpError
    from tinychat.mcp.url import parse

    if entry.command is not None:
        return entry.label, "process", one_line(entry.command.command)
    try:
        return (entry.label, "broken", one_line(entry.problem)) if entry.problem else \
            (entry.label, "http", parse(entry.url).where)
    except McpError as error:
        return entry.label, "broken", one_line(error)


def show_tools(args) -> int:
    with connected(args) as (client, _):
        tools = client.tools(watch(WAIT_S, f"listing the tools of {args.server}"))
    for tool in tools:
        properties = tool.input_schema.get("properties")
        names = ", ".join(properties) if isinstance(properties, dict) else ""
        print(one_line(f"{tool.name}({names})"))
        for line in tool.description.strip().splitlines():
            print(f"    {printable(line)}".rstrip())
    if not tools:
        say(f"{args.server} has no tools")
    return 0


def call_tool(args) -> int:
    """The exit code is 1 when the tool says that it failed."""
    from tinychat.mcp.limits import DEFAULT
    from tinychat.mcp.tools import text_for_model

    arguments = arguments_of(args.arguments)
    with connected(args) as (client, timeout_ms):
        quiet_s = timeout_ms / 1000 if timeout_ms else DEFAULT.call_quiet_s
        result = client.call(args.tool, arguments,
                             watch(DEFAULT.call_s, f"the tool {args.tool}", quiet_s))
    print(printable(text_for_model(result, SHOWN_CHARS)))
    if result.is_error:
        say(f"tinychat: the tool {one_line(args.tool)} says that it failed")
    return 1 if result.is_error else 0


def arguments_of(text: str) -> dict:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TinychatError(f"the arguments: expected a JSON object: {error}") from None
    if not isinstance(arguments, dict):
        raise TinychatError("the arguments: expected a JSON object, like '{\"name\": \"value\"}'")
    return arguments


@contextmanager
def connected(args) -> Iterator[tuple]:
    """The client of a URL or of a label of mcp.json, and the timeout_ms that is set for it."""
    from tinychat.mcp.client import connect_http
    from tinychat.mcp.plugins import PREFIX, Plugins

    if args.server.lower().startswith(("http://", "https://")):
        with closing(connect_http(args.server)) as client:
            yield client, None
        return
    with closing(Plugins(file_of(args))) as plugins:
        label = plugins.find(PREFIX + args.server.removeprefix(PREFIX))
        with plugins.acquire(label, watch(WAIT_S, f"the start of {label}")) as client:
            yield client, plugins.timeout_ms(label)


def watch(total_s: float, what: str, patience_s: float | None = None):
    from tinychat.mcp.watch import Watch
    return Watch(total_s, what=what, patience_s=patience_s)


def file_of(args) -> Path:
    """mcp.json: the one given, else that of the data folder, which need not be there."""
    if args.mcp_json is None:
        from tinychat.library import data_folder
        return data_folder() / FILE_NAME
    path = Path(args.mcp_json).expanduser()
    if not path.is_file():
        raise TinychatError(f"{path}: no such file")
    return path

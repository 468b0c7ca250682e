"""The commands: serve, chat, pull, list, inspect, bench, token, mcp.

What was asked for goes to standard output, all else to standard error. Exit codes: 0; 1 for a
failure; 2 for a command line that makes no sense; 130 after Ctrl-C. Rooms are imported inside the
commands, so that `tinychat --help` answers at once.
"""
import argparse
import logging
import os
import sys

import tinychat
from tinychat.cli import commands, mcp, talk
from tinychat.cli.settings import SETTINGS, count
from tinychat.cli.terminal import one_line, say
from tinychat.errors import TinychatError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell has closed it: `tinychat chat hi <&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # bytes that are no text are no traceback
            getattr(sys, name).reconfigure(errors="replace")
    try:
        args = make_parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING,
                            stream=sys.stderr, format="tinychat: %(message)s")
        code = args.run(args) or 0
        sys.stdout.flush()  # here an error still has a handler
        return code
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    except TinychatError as error:
        say(f"tinychat: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        say("tinychat: interrupted")
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `tinychat list | head -1` needs no word
            say(f"tinychat: {one_line(error)}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinychat", description="Chat with GGUF models: over HTTP, in the terminal.")
    parser.add_argument("--version", action="version", version=f"tinychat {tinychat.__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("-v", "--verbose", action="store_true",
                         help="say what happens, on standard error")
        for setting in SETTINGS:
            if name in setting.commands:
                setting.add_to(sub)
        return sub

    _serve_arguments(command("serve", commands.serve, "The HTTP server."))
    _chat_arguments(command("chat", talk.chat, "A conversation in the terminal; one answer with a "
                            "TEXT, or with text on standard input."))
    _pull_arguments(command("pull", commands.pull, "Fetch a model of the catalogue, or of a "
                            "repository of the Hugging Face hub."))
    command("list", commands.list_models, "The models on this machine.")
    _inspect_arguments(command("inspect", commands.inspect, "What is in a model file."))
    _token_arguments(command("token", commands.token, "Who may use a server with --require-auth."))
    _mcp_arguments(command("mcp", mcp.mcp, "The servers of mcp.json, their tools, and calls."))
    _bench_arguments(command("bench", commands.bench, "Load time, speed and memory of a model, "
                             "beside the machine's limits."))
    return parser


def _serve_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("models", nargs="*", metavar="MODEL",
                     help="name or path, loaded at once; others when they are asked for")
    sub.add_argument("--config", metavar="FILE", help="the settings file (default: $TINYCHAT_CONFIG"
                     ", else config.toml in the data folder if there is one)")
    sub.add_argument("--print-config", action="store_true",
                     help="print every setting, as a settings file, and stop")


def _chat_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--system", metavar="TEXT", help="the system prompt")
    sub.add_argument("--image", metavar="FILE", action="append", default=[],
                     help="an image that the first message shows; may be given more than once")
    sub.add_argument("--temperature", type=float, metavar="NUMBER",
                     help="0 always takes the likeliest token")
    sub.add_argument("--max-output-tokens", type=count, metavar="COUNT")
    sub.add_argument("words", nargs="*", metavar="[MODEL] [TEXT]",
                     help="the first word is the model, if one is called so; else all is text")


def _pull_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", metavar="NAME",
                     help="an id of the catalogue, OWNER/NAME of the hub, or the link of a "
                     "repository or of one file in it")
    sub.add_argument("--quantization", metavar="NAME",
                     help="which of a repository's files (default: Q4_K_M, else the nearest); "
                     "OWNER/NAME:Q8_0 says the same")


def _token_arguments(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token and print it, once")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--permissions", default="chat", metavar="LIST",
                        help="some of chat, models (load, unload, download), ephemeral_mcp, and mcp "
                        "or mcp:LABEL for servers of mcp.json; commas between (default: chat)")
    actions.add_parser("list", help="names, permissions and dates; not the tokens")
    revoke = actions.add_parser("revoke", help="end a token at once, also for running servers")
    revoke.add_argument("name", metavar="NAME")


def _mcp_arguments(sub: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--mcp-json", metavar="FILE",
                      help="the servers (default: mcp.json in the data folder)")
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the servers of mcp.json", parents=[file])
    tools = actions.add_parser("tools", help="what a server offers", parents=[file])
    call = actions.add_parser("call", help="use one tool", parents=[file])
    for action in (tools, call):
        action.add_argument("server", metavar="LABEL|URL", help="of mcp.json, or of a server that "
                            "speaks Streamable HTTP or HTTP with SSE")
    call.add_argument("tool", metavar="TOOL")
    call.add_argument("arguments", metavar="JSON", nargs="?", default="{}",
                      help="an object with the tool's arguments (default: {})")


def _inspect_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="name or path")
    sub.add_argument("--program", action="store_true", help="every operation of one step")


def _bench_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="name or path")
    sub.add_argument("--prompt", type=count, default=512, metavar="TOKENS")
    sub.add_argument("--generate", type=count, default=64, metavar="TOKENS")
    sub.add_argument("--runs", type=count, default=3, metavar="COUNT", help="medians of so many")
    sub.add_argument("--streams", type=count, nargs="*", default=[2, 4, 8], metavar="COUNT",
                     help="decode so many together (default: 2 4 8)")
    sub.add_argument("--depths", type=count, nargs="*", default=[1024], metavar="TOKENS",
                     help="decode after so many tokens of context (default: 1024)")
    sub.add_argument("--plot", metavar="FILE", help="tokens per second by streams and by context, "
                     "as an SVG picture")
    sub.add_argument("--vs", choices=["llama.cpp"],
                     help="measure it too, if llama_cpp or xllamacpp is installed")
    sub.add_argument("--vs-python", metavar="PATH", default=sys.executable,
                     help="the Python that has it (default: this one)")
    sub.add_argument("--json", action="store_true", help="one line of JSON, last")

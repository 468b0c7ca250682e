"""For chats with tools: models that call them, servers that have them, plugins on disk."""
import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from contract_checker import check_response, check_stream
from helpers_chat import END, KEY, ScriptedLibrary, ids_of
from helpers_mcp import McpServer, Reply

from tinychat.chat import ChatSettings, fold, run
from tinychat.contract import parse_chat_request
from tinychat.store import Store

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False}
WEATHER = {"name": "weather", "description": "The weather of a city", "inputSchema": CITY}
SEARCH = {"name": "search", "description": "Finds things", "inputSchema": {
    "type": "object", "properties": {"query": {"type": "string"}}}}


def call(name: str, **arguments) -> str:
    """A call in the convention for templates without tools."""
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{text}</tool_call>"


def in_rounds(*texts: str):
    """An answer that depends on how many results of tools the prompt shows; the last one stays."""
    def answer(prompt: str) -> list[int]:
        n = prompt.count("<|im_start|>tool\n")
        return [*ids_of(texts[min(n, len(texts) - 1)]), END]
    return answer


def weather(reply: Reply) -> None:
    """Answers tools/call: sunny wherever it is."""
    city = reply.seen.message["params"]["arguments"]["city"]
    reply.result(text_result(f"sunny in {city}"))


def text_result(*texts: str, **fields) -> dict:
    return {"content": [{"type": "text", "text": text} for text in texts],
            "resultType": "complete", **fields}


def weather_server(**options) -> McpServer:
    on = {"tools/call": weather, **options.pop("on", {})}
    return McpServer(tools=[WEATHER], on=on, **options)


def ephemeral(server: McpServer | str, label: str = "w", **fields) -> dict:
    url = server if isinstance(server, str) else server.url
    return {"type": "ephemeral_mcp", "server_label": label, "server_url": url, **fields}


def provider(label: str = "w") -> dict:
    return {"type": "ephemeral_mcp", "server_label": label}


class ToolChat:
    """A scripted model with servers: each stream and answer is held against the contract."""

    def __init__(self, *texts: str, answer=None, library=None, store=None, **settings):
        self.library = library or ScriptedLibrary(answer or in_rounds(*texts))
        self.store = store or Store()
        self.settings = ChatSettings(**settings)

    def request(self, *servers, input="hi", **fields) -> dict:
        given = [one if isinstance(one, (dict, str)) and not str(one).startswith("http")
                 else ephemeral(one) for one in servers]
        return {"model": KEY, "input": input, "integrations": given, **fields}

    def events(self, *servers, **fields) -> list[dict]:
        body = self.request(*servers, **fields)
        events = [event for event in run(self.library, self.store, parse_chat_request(body),
                                         self.settings) if event]
        assert check_stream(events, request=body) == []
        assert self.library.wait_idle()
        return events

    def ask(self, *servers, **fields) -> dict:
        body = self.request(*servers, **fields)
        response = fold(run(self.library, self.store, parse_chat_request(body), self.settings))
        assert check_response(response, request=body) == []
        assert self.library.wait_idle()
        return response

    @property
    def prompts(self) -> list[str]:
        return self.library.engine.prompts


# A server of mcp.json: a program of ours that speaks stdio

STDIO_SERVER = '''
import json, sys
TOOLS = json.loads(%r)
for line in sys.stdin:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params", {})
    if "id" not in message:
        continue
    answer = {"error": {"code": -32601, "message": "no"}}
    if method == "initialize":
        answer = {"result": {"protocolVersion": params["protocolVersion"],
                             "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}}
    elif method == "tools/list":
        answer = {"result": {"tools": TOOLS}}
    elif method == "tools/call":
        city = params["arguments"].get("city")
        answer = {"result": {"content": [{"type": "text", "text": f"sunny in {city}"}]}}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}), flush=True)
'''


def write_mcp_json(folder: Path, **servers: dict) -> Path:
    path = folder / "mcp.json"
    path.write_text(json.dumps({"mcpServers": servers}))
    return path


def stdio_entry(folder: Path, *tools: dict, source: str | None = None) -> dict:
    """An entry of mcp.json that runs a small server with these tools."""
    program = folder / f"server{len(list(folder.glob('server*.py')))}.py"
    program.write_text(source or STDIO_SERVER % json.dumps(list(tools or [WEATHER])))
    return {"command": sys.executable, "args": [str(program)]}


@contextmanager
def held_open():
    """(a script that answers no call until the test ends, an event: a call has come)."""
    come, over = threading.Event(), threading.Event()

    def hang(reply: Reply) -> None:
        come.set()
        reply.hang()
    try:
        yield hang, come
    finally:
        over.set()

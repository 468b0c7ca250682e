"""The tools that one request offers, and the servers they are on."""
import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from tinychat.chat.settings import ChatSettings
from tinychat.contract import EphemeralServer, Plugin
from tinychat.errors import TinychatError, known
from tinychat.mcp.client import Client, connect_http
from tinychat.mcp.errors import CalledOff, McpError, TimedOut, Unreachable
from tinychat.mcp.limits import DEFAULT
from tinychat.mcp.plugins import PREFIX, UnknownPlugin
from tinychat.mcp.results import CallResult
from tinychat.mcp.tools import Exposed, Tool, definition, expose, failure
from tinychat.mcp.watch import Watch

log = logging.getLogger(__name__)

MAX_FAILURES = 2    # of a server's connection in a row, after which its calls fail at once
GOODBYE_S = 2.5     # for all sessions together to be closed


@dataclass
class _Server:
    """One integration. held: gives the client back, or closes it."""

    label: str
    provider_info: dict
    patience_s: float
    allowed: tuple[str, ...] | None
    client: Client | None = None
    held: ExitStack = field(default_factory=ExitStack)
    tools: list[Tool] = field(default_factory=list)
    n_failures: int = 0

    def choose(self, tools: list[Tool]) -> None:
        """Keeps the tools that the request allows."""
        if self.allowed is None:
            self.tools = tools
            return
        missing = sorted(set(self.allowed) - {tool.name for tool in tools})
        if missing:
            log.info("%s has no tools %s", self.label, ", ".join(missing)[:500])
        self.tools = [tool for tool in tools if tool.name in self.allowed]


class Toolbox:
    """Connected servers and their tools.

    called_off: set when nobody waits for the request any more; it ends every wait.
    """

    def __init__(self, settings: ChatSettings, called_off: threading.Event):
        self._settings, self._called_off = settings, called_off
        self._servers: list[_Server] = []
        self._exposed: dict[str, Exposed] = {}

    def connect(self, integrations: tuple[Plugin | EphemeralServer, ...]) -> None:
        """Connects to all at once, and lists their tools.

        Raises: TinychatError of the first in the request that failed; param names it.
        """
        self._servers = [self._server_of(one) for one in integrations]
        failures: list[TinychatError | None] = [None] * len(integrations)

        def connect(position: int) -> None:
            try:
                self._connect(self._servers[position], integrations[position])
            except Exception as error:  # a fault of ours must not leave the request hanging
                failures[position] = known(error, log, "connecting to an MCP server")

        threads = [threading.Thread(target=connect, args=(position,), name="mcp-connect",
                                    daemon=True) for position in range(len(integrations))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for position, error in enumerate(failures):
            if error:
                raise _with_param(error, position, self._servers[position])
        self._exposed = {one.name: one for one in expose(
            [(server.label, server.tools) for server in self._servers])}

    def _server_of(self, integration: Plugin | EphemeralServer) -> _Server:
        if isinstance(integration, EphemeralServer):
            label = integration.server_label
            info = {"type": "ephemeral_mcp", "server_label": label}
        else:
            label = integration.id.removeprefix(PREFIX)
            info = {"type": "plugin", "plugin_id": integration.id}
        ms = integration.timeout
        return _Server(label, info, ms / 1000 if ms else self._settings.mcp_call_s,
                       integration.allowed_tools)

    def _connect(self, server: _Server, integration: Plugin | EphemeralServer) -> None:
        watch = Watch(self._settings.mcp_connect_s, what=f"connecting to {server.label}",
                      called_off=self._called_off)
        if isinstance(integration, EphemeralServer):
            client = connect_http(integration.server_url, headers=dict(integration.headers),
                                  policy=self._settings.ephemeral_mcp, label=server.label,
                                  called_off=self._called_off,
                                  connect_s=self._settings.mcp_connect_s)
            server.client = client
            server.held.callback(client.close)
        else:
            self._use_plugin(server, integration, watch)
        server.choose(server.client.tools(watch))

    def _use_plugin(self, server: _Server, integration: Plugin, watch: Watch) -> None:
        plugins = self._settings.plugins
        if plugins is None:
            raise UnknownPlugin(f"there is no mcp.json with a server {integration.id}")
        server.label = plugins.find(integration.id)
        timeout_ms = integration.timeout or plugins.timeout_ms(server.label)
        if timeout_ms:
            server.patience_s = timeout_ms / 1000
        server.client = server.held.enter_context(plugins.acquire(server.label, watch))

    # -- what is offered

    @property
    def definitions(self) -> list[dict]:
        """The tools as functions for the prompt."""
        return [definition(one) for one in self._exposed.values()]

    @property
    def schemas(self) -> dict[str, dict]:
        """The server's own schema of each tool, by the name that the model sees."""
        return {name: one.tool.input_schema for name, one in self._exposed.items()}

    def own_name(self, name: str) -> str:
        """What the server calls the tool that the model sees as `name`."""
        return self._exposed[name].tool.name

    def provider_info(self, name: str) -> dict:
        return self._servers[self._exposed[name].server].provider_info

    # -- calling

    def call(self, name: str, arguments: dict) -> CallResult:
        """Runs a tool. Whatever happens, it comes to a result that the model can read."""
        exposed = self._exposed[name]
        server = self._servers[exposed.server]
        what = f"the tool {exposed.tool.name} of {server.label}"
        if server.n_failures >= MAX_FAILURES:
            return failure(Unreachable(f"{what}: its server cannot be reached"))
        began = time.monotonic()
        watch = Watch(DEFAULT.call_s, what=what, patience_s=server.patience_s,
                      called_off=self._called_off)
        try:
            result = server.client.call(exposed.tool.name, arguments, watch)
        except McpError as error:
            server.n_failures += isinstance(error, (Unreachable, TimedOut))
            log.info("%s failed after %.1f s: %s", what, time.monotonic() - began, error)
            return failure(error)
        except Exception as error:  # a fault of ours ends this call, not the chat
            return failure(known(error, log, what))
        server.n_failures = 0
        log.info("%s answered in %.2f s%s", what, time.monotonic() - began,
                 ", with an error" if result.is_error else "")
        return result

    def close(self) -> None:
        """Gives back what the request holds. Bounded; may be called again."""
        servers, self._servers = self._servers, []
        threads = [threading.Thread(target=server.held.close, name="mcp-close", daemon=True)
                   for server in servers]
        for thread in threads:
            thread.start()
        end = time.monotonic() + GOODBYE_S
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))


def _with_param(error: TinychatError, position: int, server: _Server) -> TinychatError:
    """The error as the request's, with the position of the integration and its label."""
    if isinstance(error, CalledOff):
        return error
    param = f"integrations.{position}"
    if error.code == "private_address_refused":
        param += ".server_url"
    plugin = server.provider_info["type"] == "plugin"
    kind = "plugin_connection_error" if plugin else error.type
    message = error.message if server.label in error.message else f"{server.label}: {error.message}"
    return TinychatError(message, type=kind, code=error.code, param=param)

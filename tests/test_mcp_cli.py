"""`tinychat mcp` as people run it: processes, what they print where, their exit codes."""
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers_mcp import McpServer
from helpers_mcp_stdio import WAIT_S, Script, is_alive, wait_until, wait_until_gone

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SERVER = '''
TOOLS = [{"name": "echo", "description": "Says it again.\\nAnd \\x1b[31mred\\x1b[0m.", "inputSchema":
          {"type": "object", "properties": {"text": {"type": "string"}, "n": {"type": "integer"}}}},
         {"name": "evil\\x1b[2J\\nname", "inputSchema": {"type": "object"}}]
for m in calls():
    said = arguments(m).get("text", "")
    if said == "fail":
        result(m, {"content": [{"type": "text", "text": "it broke"}], "isError": True})
    elif said == "die":
        sys.exit(3)
    elif said != "hang":
        text(m, said)
'''


@pytest.fixture
def home(tmp_path):
    """A data folder whose mcp.json has a server of each kind."""
    server = Script(tmp_path, SERVER)
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {
        "My_Server": server.entry(env={"KEY": "sk-12345678"}),
        "quick": server.entry(timeout=200),
        "web": {"url": "https://example.com/mcp?key=secret", "headers": {"Authorization": "Bearer secret"}},
        "gone": {"command": "no-such-command"},
        "off": {"command": "x", "disabled": True},
        "broken": {"command": 3}}}))
    yield server
    assert not any(is_alive(pid) for pid in server.pids)


def start(folder, *args) -> subprocess.Popen:
    environment = {**os.environ, "TINYCHAT_HOME": str(folder), "PYTHONWARNINGS": "error"}
    return subprocess.Popen([sys.executable, "-m", "tinychat", "mcp", *map(str, args)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                            encoding="utf-8", preexec_fn=take_ctrl_c)


def take_ctrl_c() -> None:
    """Who was started in the background of a shell ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(folder, *args, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error."""
    process = start(folder, *args)
    try:
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "\x1b" not in out + err
    return out, err


def error(folder, *args) -> str:
    """The one line that a failure says."""
    out, err = run(folder, *args, code=1)
    assert out == "" and err.startswith("tinychat: ") and err.count("\n") == 1
    return err


def test_list_shows_the_servers_without_their_secrets(home):
    """M-087 M-089"""
    out, err = run(home.folder, "list")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["LABEL", "KIND"], ["My_Server", "process"], ["quick", "process"], ["web", "http"], ["gone", "process"],
        ["broken", "broken"]]
    assert lines[3][2] == "https://example.com/mcp" and "command: expected a string" in lines[5][2]
    assert "secret" not in out and "sk-1" not in out and err == ""


def test_another_file_can_be_named(home, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    out, _ = run(other, "list", "--mcp-json", home.folder / "mcp.json")
    assert "My_Server" in out
    out, err = run(other, "list")
    assert out == "" and "no servers in" in err and str(other) in err
    assert "none.json: no such file" in error(other, "tools", "x", "--mcp-json", other / "none.json")


def test_a_broken_file_is_an_error_with_line_and_column(home):
    """M-087"""
    (home.folder / "mcp.json").write_text("{\n oops")
    assert "line 2, column 2" in error(home.folder, "list")
    assert "line 2, column 2" in error(home.folder, "tools", "My_Server")


def test_tools_shows_names_arguments_and_descriptions(home):
    """C-125: a label is found under its own spelling, and folded."""
    for label in ("My_Server", "mcp/my-server"):
        out, err = run(home.folder, "tools", label)
        assert out.splitlines()[:3] == ["echo(text, n)", "    Says it again.", "    And \ufffd[31mred\ufffd[0m."]
        assert out.splitlines()[3].startswith("evil") and len(out.splitlines()) == 4
        assert err == ""


def test_call_prints_what_the_tool_says(home):
    out, err = run(home.folder, "call", "My_Server", "echo", json.dumps({"text": "grüße \x1b[2J\nzwei"}))
    assert (out, err) == ("grüße \ufffd[2J\nzwei\n", "")
    assert run(home.folder, "call", "My_Server", "echo") == ("\n", "")


def test_a_failed_tool_is_shown_and_is_a_failure(home):
    """M-071"""
    out, err = run(home.folder, "call", "My_Server", "echo", '{"text": "fail"}', code=1)
    assert (out, err) == ("it broke\n", "tinychat: the tool echo says that it failed\n")


def test_failures_are_one_line(home):
    """M-058 M-088 M-090"""
    folder = home.folder

    def error_of(*args):  # naming the file is quicker than the data folder, which the library knows
        return error(folder, *args, "--mcp-json", folder / "mcp.json")
    assert "known: mcp/My_Server, mcp/quick" in error_of("tools", "nope")
    assert "gone (no-such-command): cannot start" in error_of("tools", "gone")
    assert "broken in mcp.json: command: expected a string" in error_of("tools", "broken")
    assert "expected a JSON object" in error_of("call", "My_Server", "echo", "[]")
    assert "exited with code 3" in error_of("call", "My_Server", "echo", '{"text": "die"}')
    assert "took too long" in error_of("call", "quick", "echo", '{"text": "hang"}')
    assert "cannot connect" in error_of("tools", "http://127.0.0.1:9/mcp?key=secret")


def test_a_command_line_that_makes_no_sense_is_refused(home):
    for args in ([], ["call", "x"]):
        out, err = run(home.folder, *args, code=2)
        assert out == "" and "usage: tinychat mcp" in err


def test_a_url_is_as_good_as_a_label(home):
    with McpServer() as server:
        out, _ = run(home.folder, "tools", server.url)
        assert out.splitlines() == ["echo(text)", "    says it again"]
        assert run(home.folder, "call", server.url, "echo", '{"text": "hi"}') == ("hi\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_ends_the_server_too(home, number):
    """M-056"""
    process = start(home.folder, "call", "My_Server", "echo", '{"text": "hang"}')
    try:
        wait_until(lambda: home.seen("tools/call"), "the call")
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "tinychat: interrupted\n")
    wait_until_gone(home.pids)

"""mcp.json: entry by entry, with what is wrong said where it is."""
import json
import logging
import os
from pathlib import Path

import pytest

from tinychat.mcp.config import McpJson, read_entry
from tinychat.mcp.plugins import match


@pytest.fixture
def config(tmp_path):
    return McpJson(tmp_path / "mcp.json")


def write(config: McpJson, value) -> None:
    """Anew, with another time than before."""
    text = value if isinstance(value, (str, bytes)) else json.dumps({"mcpServers": value})
    before = config.path.stat().st_mtime_ns if config.path.exists() else 0
    config.path.write_bytes(text.encode() if isinstance(text, str) else text)
    os.utime(config.path, ns=(before + 10**9, before + 10**9))


def entry(value, folder=Path("/there")):
    return read_entry("x", value, folder)


def test_both_kinds_of_servers_are_read(config, tmp_path):
    write(config, {"files": {"command": "npx", "args": ["-y", "it"], "env": {"A": "1"}, "cwd": "sub",
                             "type": "stdio", "timeout": 5000},
                   "web": {"url": "https://example.com/mcp?key=1", "headers": {"X-Key": "k"},
                           "type": "streamable-http"}})
    files, web = config.entries().values()
    assert (files.label, files.timeout_ms, files.problem, files.url) == ("files", 5000, None, None)
    command = files.command
    assert (command.label, command.command, command.args) == ("files", "npx", ("-y", "it"))
    assert command.env == {"A": "1"} and command.cwd == tmp_path / "sub"
    assert (web.url, web.headers, web.command) == ("https://example.com/mcp?key=1", {"X-Key": "k"}, None)
    assert config.problem is None


def test_a_process_starts_in_the_folder_of_mcp_json_unless_told_otherwise(config, tmp_path):
    write(config, {"a": {"command": "x"}, "b": {"command": "x", "cwd": "/elsewhere"}})
    a, b = config.entries().values()
    assert a.command.cwd == tmp_path and b.command.cwd == Path("/elsewhere")


def test_no_file_means_no_servers(config):
    assert config.entries() == {} and config.problem is None


def test_a_byte_order_mark_and_unknown_keys_are_harmless(config, caplog):
    """M-087"""
    caplog.set_level(logging.INFO)
    text = json.dumps({"mcpServers": {"a": {"command": "x", "icon": 1}}, "inputs": [], "other": 2})
    write(config, b"\xef\xbb\xbf" + text.encode())
    assert config.entries()["a"].problem is None
    for key in ("icon", "inputs", "other"):
        assert f"ignored the key '{key}'" in caplog.text


BROKEN = {
    "both": ({"command": "x", "url": "http://h"}, "either a command or a url"),
    "neither": ({"args": []}, "either a command or a url"),
    "no object": (3, "expected an object"),
    "command": ({"command": 3}, "command: expected a string"),
    "empty command": ({"command": " "}, "command: expected a string with something in it"),
    "args": ({"command": "x", "args": "-y it"}, "args: expected an array of strings"),
    "args of numbers": ({"command": "x", "args": [1]}, "args: expected an array of strings"),
    "env": ({"command": "x", "env": {"A": 1}}, "env: expected an object of strings"),
    "env name": ({"command": "x", "env": {"A=B": "1"}}, "env: expected names of variables"),
    "headers": ({"url": "http://h", "headers": ["a"]}, "headers: expected an object of strings"),
    "cwd": ({"command": "x", "cwd": None}, "cwd: expected a string"),
    "timeout 0": ({"command": "x", "timeout": 0}, "timeout: expected 1 to 3600000 milliseconds"),
    "timeout true": ({"command": "x", "timeout": True}, "timeout: expected 1 to 3600000"),
    "timeout text": ({"url": "http://h", "timeout": "5s"}, "timeout: expected 1 to 3600000"),
    "NUL": ({"command": "x", "args": ["a\0b"]}, "args: expected text without NUL"),
    "half a character": ({"command": "x\ud800"}, "command: expected text without NUL and halves"),
    "unset": ({"command": "x", "env": {"KEY": "${env:NO_SUCH_VARIABLE}"}},
              "env.KEY: the variable NO_SUCH_VARIABLE of the environment is not set"),
    "unset in headers": ({"url": "http://h", "headers": {"A": "${env:NO_SUCH_VARIABLE}"}},
                         "headers.A: the variable NO_SUCH_VARIABLE"),
    "envFile": ({"command": "x", "envFile": "none.env"}, "envFile: .*none.env: No such file"),
}


@pytest.mark.parametrize("value, said", BROKEN.values(), ids=BROKEN)
def test_a_broken_entry_explains_itself_and_costs_no_other(config, value, said):
    """M-087"""
    write(config, {"first": {"command": "x"}, "it": value, "last": {"url": "http://h"}})
    entries = config.entries()
    assert list(entries) == ["first", "it", "last"] and config.problem is None
    assert entries["first"].problem is entries["last"].problem is None
    problem = entries["it"].problem
    assert problem.startswith("it in mcp.json: ") and "\n" not in problem
    import re
    assert re.search(said, problem)
    assert entries["it"].command is entries["it"].url is None


@pytest.mark.parametrize("label, ok", [("a", True), ("My Server_1.2-x", True), ("a" * 64, True), ("", False),
                                       ("a" * 65, False), ("a/b", False), (" a", False), ("é", False),
                                       ("a\n", False)])
def test_labels_are_short_and_plain(label, ok):
    assert (read_entry(label, {"command": "x"}, Path("/")).problem is None) == ok


def test_disabled_servers_are_not_there(config):
    write(config, {"a": {"command": "x", "disabled": True}, "b": {"command": "x", "disabled": False},
                   "c": {"disabled": True}})
    assert list(config.entries()) == ["b"]


def test_variables_and_the_home_folder_are_filled_in(monkeypatch):
    monkeypatch.setenv("ONE", "1")
    monkeypatch.setenv("EMPTY", "")
    home = str(Path.home())
    filled = entry({"command": "${userHome}/run", "args": ["${env:ONE}${env:ONE}", "${HOME}", "${env:EMPTY}"],
                    "env": {"A": "x${env:ONE}"}, "cwd": "${userHome}"}).command
    assert filled.command == f"{home}/run" and filled.args == ("11", "${HOME}", "")
    assert filled.env == {"A": "x1"} and filled.cwd == Path(home)
    web = entry({"url": "http://h/${env:ONE}", "headers": {"Authorization": "Bearer ${env:ONE}"}})
    assert web.url == "http://h/1" and web.headers == {"Authorization": "Bearer 1"}


def test_what_a_variable_holds_is_not_filled_again(monkeypatch):
    monkeypatch.setenv("ONE", "${env:TWO}")
    assert entry({"command": "${env:ONE}"}).command.command == "${env:TWO}"


def test_an_env_file_is_read_and_env_goes_before_it(tmp_path):
    (tmp_path / "my.env").write_text("\ufeff# keys\nA=1\r\nexport B = two words \nC='q=\"1\"'\n\nD=\n")
    command = entry({"command": "x", "envFile": "my.env", "env": {"A": "2"}}, tmp_path).command
    assert command.env == {"A": "2", "B": "two words", "C": 'q="1"', "D": ""}
    (tmp_path / "my.env").write_text("A=1\nsecret value\n")
    problem = entry({"command": "x", "envFile": "my.env"}, tmp_path).problem
    assert "my.env, line 2: expected NAME=value" in problem and "secret" not in problem


def test_secrets_are_not_in_any_repr(monkeypatch):
    """M-089"""
    monkeypatch.setenv("KEY", "sk-12345678")
    for value in ({"command": "x", "env": {"A": "${env:KEY}"}}, {"url": "http://h", "headers": {"A": "${env:KEY}"}}):
        assert "sk-1" not in repr(entry(value))


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(config, monkeypatch):
    """M-087"""
    write(config, {"a": {"command": "x"}})
    first = config.entries()
    assert config.entries() is first
    write(config, {"b": {"command": "x"}})
    assert list(config.entries()) == ["b"]
    config.path.unlink()
    assert config.entries() == {}


@pytest.mark.parametrize("text, where", [
    ('{"mcpServers": {\n  "a": {"command": "x",}\n}}', "line 2, column 2"),
    ('{"mcpServers": {}', "line 1, column 18"),
    (b'{"mcpServers":\n {"\xff": 1}}', "line 2, column 4: expected UTF-8"),
    ("[]", 'expected an object with "mcpServers"'),
    ('{"mcpServers": []}', 'expected an object with "mcpServers"'),
    ("[" * 100_000, "expected JSON of a usual size"),
    ('{"a": ' + "9" * 5000 + "}", "expected JSON of a usual size"),
    ('"' + "x" * (1 << 20) + '"', "expected at most 1048576 bytes"),
], ids=["comma", "end", "bytes", "array", "servers", "deep", "number", "long"])
def test_a_broken_file_keeps_what_it_said_before(config, caplog, text, where):
    """M-087"""
    write(config, {"a": {"command": "x"}})
    before = config.entries()
    write(config, text)
    assert config.entries() == before
    assert where in config.problem and str(config.path) in config.problem and "\n" not in config.problem
    assert where in caplog.text and "still holds" in caplog.text
    n = len(caplog.records)
    config.entries()
    assert len(caplog.records) == n, "said once"
    write(config, {"b": {"command": "x"}})
    assert list(config.entries()) == ["b"] and config.problem is None


def test_a_file_that_is_broken_from_the_start_has_no_servers(config):
    write(config, "{")
    assert config.entries() == {} and "line 1, column 2" in config.problem


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_a_problem_of_its_own(config):
    write(config, {"a": {"command": "x"}})
    config.path.chmod(0)
    assert config.entries() == {} and "Permission denied" in config.problem


def test_a_folder_in_its_place_is_a_problem(config):
    config.path.mkdir()
    assert config.entries() == {} and "mcp.json" in config.problem


# ---- labels in requests

@pytest.mark.parametrize("id, found", [
    ("mcp/My_Server", "My_Server"), ("mcp/my-server", "My_Server"), ("mcp/MY SERVER", "My_Server"),
    ("mcp/big", "big"), ("mcp/Big", "Big"), ("mcp/BIG", None), ("mcp/none", None), ("mcp/", None),
    ("My_Server", None), ("", None), ("mcp/mcp/big", None), ("MCP/big", None),
])
def test_labels_match_as_spelled_and_then_folded_where_that_is_clear(id, found):
    """C-125"""
    assert match(id, ["big", "Big", "My_Server"]) == found

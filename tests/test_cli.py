"""The command line: what it prints where, its exit codes, the conversation, the server process."""
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import closing

import pytest
from contract_checker import check_response
from helpers_doors import (WAIT_S, environment, golden, offer_toy, put,
                           tinychat_command, write_model)

import tinychat
from tinychat import cli
from tinychat.cli import talk, terminal
from tinychat.cli.settings import SETTINGS
from tinychat.errors import TinychatError
from tinychat.library import Library
from tinychat.store import Store

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
LIMITS = ["--temperature", "0", "--max-output-tokens", "8", "--threads", "1", "--context-length",
          "512"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def qwen(home):
    return put(home / "models" / "qwen.gguf", golden("qwen2-a"))


@pytest.fixture
def answer(qwen):
    """What the model says to "hello" under LIMITS, by way of the API."""
    with tinychat.load(qwen, context_length=512, threads=1) as model:
        return model.chat("hello", temperature=0, max_output_tokens=8)["output"][0]["content"]


def run(*args, code=0, capsys=None):
    """Exit code as expected; (standard output, standard error)."""
    assert cli.main([str(arg) for arg in args]) == code
    return capsys.readouterr() if capsys else None


def one_line_error(capsys, *args):
    said = run(*args, code=1, capsys=capsys)
    assert said.out == "" and said.err.startswith("tinychat: ") and said.err.count("\n") == 1
    return said.err


# ---- the command line itself

def test_help_and_version_name_the_program(capsys):
    assert "serve" in run("--help", capsys=capsys).out
    assert run("--version", capsys=capsys).out == f"tinychat {tinychat.__version__}\n"
    for command in ("serve", "chat", "pull", "list", "inspect", "bench"):
        assert "usage: tinychat " + command in run(command, "--help", capsys=capsys).out


def test_help_imports_nothing_heavy(home):
    code = ("import sys; from tinychat.cli import main; main(['--help']);"
            "print({'numpy', 'gguf'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=WAIT_S, cwd=home, env=environment(home))
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize("args", [
    [], ["dance"], ["serve", "--port", "70000"], ["serve", "--parallel", "0"], ["pull"],
    ["bench", "m", "--vs", "ollama"], ["chat", "--temperature", "hot"],
])
def test_a_senseless_command_line_exits_with_2(capsys, args):
    said = run(*args, code=2, capsys=capsys)
    assert said.out == "" and "usage: tinychat" in said.err


def test_failures_are_one_line_and_exit_code_1(capsys, home):
    (home / "bad.gguf").write_bytes(b"GGUF\x03\x00")
    assert "no such file" in one_line_error(capsys, "inspect", home / "none.gguf")
    assert "bad.gguf" in one_line_error(capsys, "inspect", home / "bad.gguf")
    assert "'unknown'" in one_line_error(capsys, "bench", "unknown")
    assert "catalogue" in one_line_error(capsys, "pull", "unknown")
    assert "'unknown'" in one_line_error(capsys, "serve", "unknown")


def test_names_from_files_cannot_drive_the_terminal(capsys, home):
    write_model(home / "models" / "m.gguf", general__name="\x1b]0;owned\x07", template="a\x1b[2J")
    run("inspect", "m", capsys=None)
    run("list")
    assert "\x1b" not in capsys.readouterr().out
    assert terminal.printable("a\x1b[31m\tb\n\x85") == "a\ufffd[31m\tb\n\ufffd"


def test_flags_go_before_the_environment_then_the_file_then_defaults(monkeypatch):
    port, cors = (next(s for s in SETTINGS if s.name == name) for name in ("port", "cors"))
    assert port.value(None) == (1234, "default")
    assert port.value(None, {"port": 5}) == (5, "file")
    monkeypatch.setenv("TINYCHAT_PORT", "99")
    monkeypatch.setenv("TINYCHAT_CORS", "on")
    assert port.value(None, {"port": 5}) == (99, "TINYCHAT_PORT")
    assert port.value(7, {"port": 5}) == (7, "flag")
    assert cors.value(None)[0] is True and cors.value(False)[0] is False
    monkeypatch.setenv("TINYCHAT_PORT", "many")
    with pytest.raises(TinychatError, match="TINYCHAT_PORT: expected a port, got 'many'"):
        port.value(None)


# ---- list, inspect, pull

def test_list_is_a_table_or_a_hint(capsys, home):
    said = run("list", capsys=capsys)
    assert said.out == "" and "tinychat pull smollm2-135m-instruct" in said.err
    put(home / "models" / "pub" / "Llama" / "l.Q4_0.gguf", golden("llama3-a.Q4_0"))
    head, row = run("list", capsys=capsys).out.splitlines()
    assert head.split()[0] == "KEY" and row.split()[:4] == ["llama", "llama", "853K", "Q4_0"]


def test_inspect_shows_the_program_that_makes_vectors(capsys):
    program = run("inspect", golden("bert-a"), "--program", capsys=capsys).out
    assert "outputs(" in program.splitlines()[-1] and "token_embd" not in program.splitlines()[-1]


def test_inspect_tells_what_is_in_a_file(capsys, qwen):
    for name in (qwen, "qwen"):
        out = run("inspect", name, capsys=capsys).out
        for part in ("GGUF version 3", "qwen2.block_count = ", "F16", "tensors", "chat template",
                     "items"):
            assert part in out
    program = run("inspect", qwen, "--program", capsys=capsys).out
    assert program.startswith("program qwen2: ") and "attend(" in program


def test_pull_says_where_the_model_is(capsys, home, monkeypatch):
    data = golden("qwen2-a").read_bytes()
    offer_toy(monkeypatch, home, data)
    said = run("pull", "toy", capsys=capsys)
    assert said.out == "" and "downloading" in said.err and "Toy.F16.gguf" in said.err
    assert run("pull", "toy", capsys=capsys).err.count("\n") == 1


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with terminal.Bar() as bar:
        bar.bytes("downloading", 50_000_000, 100_000_000)
        bar.show("loading x", 1.0)
    err = capsys.readouterr().err
    assert "downloading [###############...............]  50% 50.0 MB of 100.0 MB" in err
    assert err.endswith("\r\x1b[K"), "and is wiped out in the end"


# ---- chat

def test_one_shot_answers_on_standard_output_alone(capsys, qwen, answer):
    said = run("chat", "qwen", "hello", *LIMITS, capsys=capsys)
    assert said.out.strip("\n") == answer.strip("\n") and "loading qwen" in said.err
    assert run("chat", qwen, "hello", *LIMITS, capsys=capsys).out == said.out


def test_text_comes_from_standard_input_when_piped(home, qwen, answer):
    done = tinychat_command("chat", "qwen", *LIMITS, home=home, input="hello")
    assert done.returncode == 0 and done.stdout.strip("\n") == answer.strip("\n")
    empty = tinychat_command("chat", "qwen", *LIMITS, home=home, input="")
    assert empty.returncode == 1 and "standard input" in empty.stderr


def test_the_first_word_is_the_model_only_if_one_is_called_so(home, qwen):
    with Library() as library:
        for words, expected in (([], ("smollm2-135m-instruct", "")),
                                (["qwen", "a", "b"], ("qwen", "a b")),
                                (["what", "is it"], ("smollm2-135m-instruct", "what is it")),
                                (["smollm2-135m-instruct"], ("smollm2-135m-instruct", "")),
                                ([str(qwen), "hi"], (str(qwen), "hi")),
                                (["absent.gguf"], ("absent.gguf", "")),
                                (["what is a .gguf"],
                                 ("smollm2-135m-instruct", "what is a .gguf"))):
            assert talk.model_and_text(library, words) == expected


@pytest.fixture
def talking(qwen):
    with Library(default_context_length=512, threads=1, parallel=1) as library, \
            closing(Store()) as store:
        yield talk.Talk(library, store, "qwen", system=None, temperature=0, max_output_tokens=8)


def typed(monkeypatch, *lines):
    """Lines for input(); an exception class is raised, and the end of input follows."""
    queue = [*lines, EOFError]

    def next_line(text=""):
        line = queue.pop(0)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", next_line)
    return queue


def test_a_conversation_streams_and_remembers(capsys, monkeypatch, talking, answer):
    left = typed(monkeypatch, "hello", "", "and again", "/clear", "hello", "/exit", "never read")
    inputs = []
    original = talking.answer
    monkeypatch.setattr(talking, "answer",
                        lambda text: inputs.append((text, talking.last_id)) or original(text))
    talking.converse()
    assert [text for text, _ in inputs] == ["hello", "and again", "hello"]
    assert inputs[0][1] is None and inputs[1][1] is not None and inputs[2][1] is None
    out = capsys.readouterr().out
    assert out.startswith(answer) and out.strip("\n").endswith(answer.strip("\n"))
    assert left == ["never read", EOFError]


def test_commands_of_the_conversation(capsys, monkeypatch, talking):
    typed(monkeypatch, "/help", "/system be brief", "/nonsense", KeyboardInterrupt)
    talking.converse()
    said = capsys.readouterr()
    assert said.out == "" and talking.fields["system_prompt"] == "be brief"
    for part in ("/clear", "system prompt set", "/nonsense is no command",
                 "Ctrl-D or /exit leaves"):
        assert part in said.err
    typed(monkeypatch, "/system")
    talking.converse()
    assert talking.fields["system_prompt"] == ""


def test_ctrl_c_stops_the_reply_and_not_the_program(capsys, monkeypatch, talking, answer):
    shown = talk.Screen.show

    def interrupt(self, event):
        shown(self, event)
        if event["type"] == "message.delta":
            raise KeyboardInterrupt
    monkeypatch.setattr(talk.Screen, "show", interrupt)
    typed(monkeypatch, "hello")
    talking.converse()
    assert talking.last_id is None and "(stopped)" in capsys.readouterr().err
    monkeypatch.setattr(talk.Screen, "show", shown)
    assert talking.answer("hello") is True
    assert capsys.readouterr().out.strip("\n") == answer.strip("\n")
    assert talking.library.loaded("qwen").n_users == 0


def test_ctrl_c_in_a_single_answer_ends_the_program(capsys, monkeypatch, qwen):
    def interrupt(self, event):
        raise KeyboardInterrupt
    monkeypatch.setattr(talk.Screen, "show", interrupt)
    assert cli.main(["chat", "qwen", "hello", *LIMITS]) == cli.INTERRUPTED
    assert capsys.readouterr().err.endswith("tinychat: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="redirects with a POSIX shell")
@pytest.mark.parametrize("command, redirected, code, line", [
    ("chat qwen hello", ">&-", 0, None),
    ("chat qwen hello", "2>&-", 0, None),
    ("chat qwen", "<&-", 1, "expected a text on standard input, got none"),
    pytest.param("chat qwen hello", ">/dev/full", 1, "No space left on device", marks=FULL),
    pytest.param("list", ">/dev/full", 1, "No space left on device", marks=FULL),
])
def test_a_closed_or_full_stream_is_no_traceback(home, qwen, command, redirected, code, line):
    limits = LIMITS if command.startswith("chat") else []
    variables = {**environment(home), "PYTHONUNBUFFERED": ""}  # as users have it
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "tinychat",
         *command.split(), *limits], text=True, capture_output=True, timeout=WAIT_S, cwd=home,
        env=variables, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert line is None or line in done.stderr.splitlines()[-1]


def test_a_failed_reply_is_told_in_one_line(capsys, talking):
    assert talking.answer("word " * 2000) is False
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("tinychat: ") and said.err.count("\n") == 1


# ---- serve

class ServeProcess:
    """`tinychat serve` with its standard error read line by line."""

    def __init__(self, home, *args, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tinychat", "serve", *map(str, args)], cwd=home, text=True,
            env=environment(home, **variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines, self._more = [], threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    def line_with(self, part: str) -> str:
        def found():
            return next((line for line in self.lines if part in line), None)
        with self._more:
            assert self._more.wait_for(found, WAIT_S), self.lines
            return found()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_when_it_is_ready_answers_and_stops(home, qwen, how):
    with ServeProcess(home, "qwen", "--threads", 1, "--context-length", 512,
                      TINYCHAT_PORT="0") as serve:
        ready = serve.line_with(" is ready: ")
        assert tinychat.__version__ in ready and "qwen" in ready
        url = next(word for word in ready.split() if word.startswith("http://127.0.0.1:"))
        body = {"model": "qwen", "input": "hello", "temperature": 0, "max_output_tokens": 8}
        request = urllib.request.Request(url + "/api/v1/chat", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            assert check_response(json.load(answer)) == []
        serve.process.send_signal(how)
        assert serve.process.wait(WAIT_S) == 0
        assert serve.line_with("stopping")
        assert serve.process.stdout.read() == ""
        assert not any("Traceback" in line for line in serve.lines)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_serve_warns_when_it_is_open_to_others(home, qwen):
    with ServeProcess(home, "qwen", "--port", 0, "--host", "0.0.0.0", "--threads", 1) as serve:
        assert "not a loopback address" in serve.line_with("WARNING")
        serve.line_with(" is ready: ")
        serve.process.terminate()
        assert serve.process.wait(WAIT_S) == 0


def test_a_taken_port_is_one_line(home, qwen):
    with tinychat.serve(port=0, home=home) as server:
        port = server.url.rpartition(":")[2]
        done = tinychat_command("serve", "qwen", "--port", port, home=home)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and port in done.stderr

"""Load and ill-behaved clients: silent, dripping, not reading, vanishing, and many at once.

TINYCHAT_TEST_LOAD_SECONDS: how long the many stream; the suite takes 10 s, a measurement 120.
"""
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import struct
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from contract_checker import check_error, check_response, check_stream, parse_sse
from helpers_load import KEY, WAIT_S, ServerProcess

CHAT = "/api/v1/chat"
LOAD_S = float(os.environ.get("TINYCHAT_TEST_LOAD_SECONDS", "10"))
N_SILENT, N_DRIPPING, N_STREAMING, N_VANISHING = 200, 50, 64, 500
PARALLEL = 4
CONNECTION_BYTES = 128 << 10  # what one that waits may cost: its thread's stack and its buffers
FIELDS = {"model": KEY, "input": "hello", "temperature": 0, "max_output_tokens": 8, "store": False}


def post(body: bytes, length: int | None = None) -> bytes:
    return (b"POST /api/v1/chat HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body)


REQUEST = post(json.dumps(FIELDS).encode())


def connect(port):
    return socket.create_connection(("127.0.0.1", port), WAIT_S)


def ask(port, **fields):
    """One chat over a connection of its own; (the answer, seconds)."""
    began, body = time.monotonic(), {**FIELDS, **fields}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    assert response.status == 200 and check_response(answer, request=body) == [], answer
    return answer, time.monotonic() - began


def warmed_up(server):
    """The state of a server that has answered once and is quiet again."""
    ask(server.port)
    return server.when_quiet()


def until(server, reached):
    """The first state that `reached` says yes to."""
    deadline = time.monotonic() + WAIT_S
    while not reached(state := server.state()):
        assert time.monotonic() < deadline, state
        threading.Event().wait(0.01)
    return state


def run_all(works, seconds=WAIT_S, meanwhile=lambda: None):
    """Each work on a thread of its own; their results, and whatever one raised is raised here."""
    results, failures = [], []

    def guarded(work):
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + seconds
    while any(thread.is_alive() for thread in threads) and time.monotonic() < ends:
        meanwhile()
        threading.Event().wait(0.05)
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    return results


@pytest.fixture
def told(capsys):
    """Prints a line of figures past pytest's capture."""
    def tell(text):
        with capsys.disabled():
            print(f"\n{text}")
    return tell


# ---- slow clients

SILENT = [b"", REQUEST[:9], REQUEST[:60], REQUEST[:-5]]  # no byte, line, headers, body: half of each
DRIPPING = [  # (beginning, what is repeated a byte at a time)
    (b"GET / HTTP/1.1\r\nA: ", b"x"),
    (b"GET / HTTP/1.1\r\n", b"A: some header\r\n"),
    (post(b"", 10_000), b" "),
    (REQUEST.partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
]


def hung_up(sock):
    """Does the server end the connection, with or without an answer before that?"""
    sock.settimeout(WAIT_S)
    try:
        while sock.recv(65536):
            pass
        return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def drip(socks):
    """Another byte to each, again and again; what is left after WAIT_S was not hung up on."""
    pieces = {}
    for sock, (beginning, repeated) in zip(socks, itertools.cycle(DRIPPING)):
        sock.sendall(beginning)
        pieces[sock] = itertools.cycle([repeated[at:at + 1] for at in range(len(repeated))])
    ends = time.monotonic() + WAIT_S
    while pieces and time.monotonic() < ends:
        for sock in list(pieces):
            try:
                sock.send(next(pieces[sock]))
            except OSError:
                del pieces[sock]
        threading.Event().wait(0.05)
    return list(pieces)


def test_silent_and_dripping_connections_keep_nobody_waiting(tmp_path, told):
    """Slowloris: 200 connections silent at different points of a request, 50 that drip.

    The silent ones run into the limits on silence; a drip breaks silence, so that only the limits
    on a whole head and a whole body end those.
    """
    with ServerProcess(tmp_path, idle_timeout_s=6.0, read_timeout_s=6.0, head_timeout_s=6.0,
                       body_timeout_s=6.0) as server, ExitStack() as opened:
        before = warmed_up(server)
        silent = [opened.enter_context(connect(server.port)) for _ in range(N_SILENT)]
        for sock, beginning in zip(silent, itertools.cycle(SILENT)):
            sock.sendall(beginning)
        dripping = [opened.enter_context(connect(server.port)) for _ in range(N_DRIPPING)]
        left: list[list[socket.socket]] = []
        thread = threading.Thread(target=lambda: left.append(drip(dripping)))
        thread.start()
        waits = [ask(server.port)[1] for _ in range(20)]
        during = server.state()
        assert during["connections"] >= N_SILENT + N_DRIPPING, "answered while all of them were there"
        grown = during["rss"] - before["rss"]
        assert grown < (N_SILENT + N_DRIPPING) * CONNECTION_BYTES
        assert all([hung_up(sock) for sock in silent])
        thread.join(2 * WAIT_S)
        assert left == [[]], "a drip went on and on"
        after = server.when_quiet(before)
        ask(server.port)
    told(f"slowloris: {N_SILENT} silent, {N_DRIPPING} dripping: a request takes "
         f"{statistics.median(waits) * 1e3:.1f} ms (worst {max(waits) * 1e3:.1f}), "
         f"{grown / (N_SILENT + N_DRIPPING) / 1e3:.0f} kB per connection, "
         f"{(after['rss'] - before['rss']) / 1e3:.0f} kB kept")


def test_beyond_the_limit_of_connections_new_ones_are_told_to_come_back(tmp_path):
    with ServerProcess(tmp_path, max_connections=20) as server, ExitStack() as silent:
        before = warmed_up(server)
        for _ in range(20):
            silent.enter_context(connect(server.port))
        until(server, lambda state: state["connections"] == 20)
        for _ in range(20):
            with connect(server.port) as late, late.makefile("rb") as file:
                assert file.readline().startswith(b"HTTP/1.1 503 ")
                headers = http.client.parse_headers(file)
                assert int(headers["Retry-After"]) >= 1
                assert check_error(json.loads(file.read()), 503) == []
        assert server.state()["connections"] == 20
        silent.close()
        server.when_quiet(before)
        ask(server.port)


def test_readers_that_take_nothing_hold_up_nobody(tmp_path):
    """C-076: three for each slot, and who comes after them is answered like anybody.

    The system's buffers take what these streams are long; test_server.py has one that fills them.
    """
    with ServerProcess(tmp_path, library={"default_context_length": 4096,
                                          "parallel": PARALLEL}) as server, ExitStack() as lazy:
        before = warmed_up(server)
        request = post(json.dumps({**FIELDS, "stream": True, "max_output_tokens": 800}).encode())
        for _ in range(3 * PARALLEL):
            sock = lazy.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(request)
        until(server, lambda state: state["running"] == PARALLEL and state["waiting"])
        ask(server.port)
        assert server.state()["connections"] >= 3 * PARALLEL
        lazy.close()
        server.when_quiet(before)


# ---- many at once

PROMPTS = [f"Tell me of the number {n}, please." + " And more." * n for n in range(8)]
ANSWER = {"temperature": 0, "max_output_tokens": 24}


def stream_until(port, ends, alone, draw):
    """Streams one after the other on one connection; each is checked from end to end."""
    done = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        while not done or time.monotonic() < ends:
            prompt, began = draw.choice(PROMPTS), time.monotonic()
            body = {**FIELDS, **ANSWER, "input": prompt, "stream": True,
                    "store": draw.random() < 0.1}
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = b""
            while b"prompt_processing.start" not in data and (more := response.read1()):
                data += more
            waited = time.monotonic() - began
            data += response.read()
            assert response.status == 200, data
            problems = check_stream(data, request=body, store=body["store"], loaded=True)
            result = parse_sse(data)[0][-1][1]["result"]
            assert problems == [] and result["output"] == alone[prompt], (problems, result)
            done.append(SimpleNamespace(waited=waited, seconds=time.monotonic() - began,
                                        n_tokens=result["stats"]["total_output_tokens"]))
    finally:
        connection.close()
    return done


def test_64_clients_stream_at_once_each_its_own_whole_answer(tmp_path, told):
    """C-143, C-054, C-060, C-061: through 4 slots, in order and complete; nothing stays behind."""
    with ServerProcess(tmp_path, library={"parallel": PARALLEL, "queue_limit": N_STREAMING,
                                          "default_context_length": 512}) as server:
        alone = {prompt: ask(server.port, input=prompt, **ANSWER)[0]["output"]
                 for prompt in PROMPTS}
        assert len({json.dumps(output) for output in alone.values()}) > 1
        before, seen = server.when_quiet(), []
        began = time.monotonic()
        results = run_all([lambda seed=seed: stream_until(server.port, began + LOAD_S, alone,
                                                          random.Random(seed))
                           for seed in range(N_STREAMING)], LOAD_S + WAIT_S,
                          meanwhile=lambda: seen.append(server.state()))
        seconds = time.monotonic() - began
        after = server.when_quiet(before)
        ask(server.port)
    assert max(state["running"] for state in seen) == PARALLEL, "all slots are used, never more"
    assert max(state["waiting"] for state in seen) > 0
    assert after["rss"] - before["rss"] < 64 << 20
    streams = [stream for one in results for stream in one]
    told(f"{N_STREAMING} clients, {seconds:.0f} s: {len(streams)} streams whole and in order "
         f"({min(map(len, results))} to {max(map(len, results))} each), "
         f"{sum(one.n_tokens for one in streams) / seconds:.0f} tok/s; a stream waits "
         f"{statistics.median(one.waited for one in streams):.2f} s for its turn "
         f"(longest {max(one.waited for one in streams):.2f}) and takes "
         f"{statistics.median(one.seconds for one in streams):.2f} s "
         f"(longest {max(one.seconds for one in streams):.2f}); resident "
         f"{before['rss'] / 1e6:.0f} -> {after['rss'] / 1e6:.0f} MB")


# ---- clients that vanish

LONG = 450  # tokens of an answer that somebody leaves


def vanish(port, draw):
    """A request that is left at a random point, politely or with a reset; was it a whole one?"""
    stream = draw.random() < 0.7
    body = json.dumps({**FIELDS, "input": f"a {draw.random()}", "max_output_tokens": LONG,
                       "stream": stream, "store": True}).encode()
    request = post(body)
    n_head = len(request) - len(body)
    point = draw.choice(["head", "body", "asked", "answer"])
    with connect(port) as sock:
        if point == "head":
            sock.sendall(request[:draw.randrange(n_head)])
        elif point == "body":
            sock.sendall(request[:draw.randrange(n_head, len(request))])
        else:
            sock.sendall(request)
            if point == "answer":
                left = draw.randrange(1, 6000 if stream else 500)
                while left > 0 and (data := sock.recv(left)):
                    left -= len(data)
        if draw.random() < 0.5:  # a reset instead of an end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return point in ("asked", "answer")


def test_500_clients_that_vanish_at_random_points_leave_nothing_behind(tmp_path, told):
    """C-075: and nobody goes on generating for them."""
    with ServerProcess(tmp_path, library={"default_context_length": 512, "queue_limit": 1000},
                       heartbeat_s=0.02) as server:
        alone = ask(server.port)[0]["output"]
        before, began = server.when_quiet(), time.monotonic()

        def work(seed):
            draw = random.Random(seed)
            return sum(vanish(server.port, draw) for _ in range(N_VANISHING // 10))
        n_asked = sum(run_all([lambda seed=seed: work(seed) for seed in range(10)]))
        after, seconds = server.when_quiet(before), time.monotonic() - began
        assert ask(server.port)[0]["output"] == alone
    generated = after["generated"] - before["generated"]
    assert 0 < generated < n_asked * LONG / 2
    told(f"{N_VANISHING} clients vanished within {seconds:.1f} s, {n_asked} of them after a whole "
         f"request: {generated / n_asked:.0f} of {LONG} tokens generated for each; every page, "
         "slot, thread and descriptor came back")

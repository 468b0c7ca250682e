"""Load and ill-behaved clients: silent, dripping, vanishing, and many at once.

TINYCHAT_TEST_LOAD_SECONDS: how long the many stream; the suite takes 10 s, a measurement 120.
"""
import http.client
import json
import os
import random
import socket
import statistics
import struct
import threading
import time
from types import SimpleNamespace

import pytest
from contract_checker import check_error, check_response, check_stream, parse_sse
from helpers_load import KEY, WAIT_S, ServerProcess

CHAT = "/api/v1/chat"
LOAD_S = float(os.environ.get("TINYCHAT_TEST_LOAD_SECONDS", "10"))
N_SILENT, N_DRIPPING, N_STREAMING, N_VANISHING = 200, 50, 64, 500
BODY = json.dumps({"model": KEY, "input": "hello", "temperature": 0, "max_output_tokens": 8,
                   "store": False}).encode()
HEAD = (b"POST /api/v1/chat HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(BODY))
REQUEST = HEAD + BODY


def connect(port):
    return socket.create_connection(("127.0.0.1", port), WAIT_S)


def ask(port, **fields):
    """One chat over a connection of its own; (the answer, seconds)."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("POST", CHAT, json.dumps({**json.loads(BODY), **fields}),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    assert response.status == 200 and check_response(answer) == [], answer
    return answer, time.monotonic() - began


@pytest.fixture
def told(capsys):
    """Prints a line of figures past pytest's capture."""
    def tell(text):
        with capsys.disabled():
            print(f"\n{text}")
    return tell


# ---- slow clients

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
    finally:
        sock.close()


def drip(socks, stop):
    """One byte of a request to each, again and again, until it is told to stop."""
    data = REQUEST[:-1] * 50  # a head without an end in sight
    for at in range(len(data)):
        for sock in list(socks):
            try:
                sock.send(data[at:at + 1])
            except OSError:
                socks.remove(sock)
        if not socks or stop.wait(0.05):
            return


def test_silent_and_dripping_connections_keep_nobody_waiting(tmp_path, told):
    """Slowloris: 200 connections silent at different points of a request, 50 that drip."""
    with ServerProcess(tmp_path, head_timeout_s=6.0, read_timeout_s=5.0, idle_timeout_s=6.0,
                       body_timeout_s=6.0) as server:
        ask(server.port)
        before = server.when_quiet({**server.state(), "connections": 0})
        silent = [connect(server.port) for _ in range(N_SILENT)]
        beginnings = [b"", REQUEST[:9], HEAD[:60], REQUEST[:-5]]
        for n, sock in enumerate(silent):
            sock.sendall(beginnings[n % 4])
        dripping, stop = [connect(server.port) for _ in range(N_DRIPPING)], threading.Event()
        drips = list(dripping)
        thread = threading.Thread(target=drip, args=(drips, stop))
        thread.start()
        waits = [ask(server.port)[1] for _ in range(20)]
        during = server.state()
        assert during["connections"] >= N_SILENT + N_DRIPPING
        grown = during["rss"] - before["rss"]
        assert grown < 64 << 20, "memory is bounded: well below a quarter of a megabyte each"
        assert all(hung_up(sock) for sock in silent)
        stop.set()
        thread.join(WAIT_S)
        assert all(hung_up(sock) for sock in dripping)
        server.when_quiet(before)
    told(f"slowloris: {N_SILENT} silent, {N_DRIPPING} dripping: a request takes "
         f"{statistics.median(waits) * 1e3:.1f} ms (worst {max(waits) * 1e3:.1f}), "
         f"{grown / (N_SILENT + N_DRIPPING) / 1e3:.0f} kB per connection")


def test_beyond_the_limit_of_connections_a_new_one_is_told_to_come_back(tmp_path):
    with ServerProcess(tmp_path, max_connections=20) as server:
        before = server.state()
        silent = [connect(server.port) for _ in range(20)]
        while server.state()["connections"] < 20:
            pass
        with connect(server.port) as late, late.makefile("rb") as file:
            late.settimeout(WAIT_S)
            assert file.readline().startswith(b"HTTP/1.1 503 ")
            headers = http.client.parse_headers(file)
            assert int(headers["Retry-After"]) >= 1
            assert check_error(json.loads(file.read()), 503) == []
        for sock in silent:
            sock.close()
        server.when_quiet(before)
        assert ask(server.port)[0]["output"]


# ---- many at once

PROMPTS = [f"Tell me of the number {n}, please." + " And more." * n for n in range(8)]
ANSWER = {"temperature": 0, "max_output_tokens": 24}


def stream_until(port, ends, alone, results):
    """Streams one after the other on one connection; each is checked from end to end."""
    draw = random.Random(threading.get_ident())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        while time.monotonic() < ends:
            prompt, began = draw.choice(PROMPTS), time.monotonic()
            body = {"model": KEY, "input": prompt, "stream": True, **ANSWER,
                    "store": draw.random() < 0.1}
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            assert response.status == 200, data
            problems = check_stream(data, request=body)
            result = parse_sse(data)[0][-1][1]["result"]
            assert problems == [] and result["output"] == alone[prompt], (problems, result)
            results.append(SimpleNamespace(seconds=time.monotonic() - began,
                                           n_tokens=result["stats"]["total_output_tokens"]))
    except BaseException as error:
        results.append(error)
    finally:
        connection.close()


def test_64_clients_stream_at_once_each_its_own_whole_answer(tmp_path, told):
    """C-143, C-054, C-060: through 4 slots, in order and complete; nothing stays behind."""
    with ServerProcess(tmp_path, library={"parallel": 4, "queue_limit": 64,
                                          "default_context_length": 512}) as server:
        alone = {prompt: ask(server.port, input=prompt, **ANSWER)[0]["output"]
                 for prompt in PROMPTS}
        before = server.when_quiet({**server.state(), "connections": 0})
        began, results = time.monotonic(), []
        threads = [threading.Thread(target=stream_until, args=(
            server.port, began + LOAD_S, alone, results)) for _ in range(N_STREAMING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LOAD_S + WAIT_S)
            assert not thread.is_alive()
        seconds = time.monotonic() - began
        assert [one for one in results if isinstance(one, BaseException)] == []
        after = server.when_quiet(before)
    assert len(results) >= N_STREAMING
    waits = [one.seconds for one in results]
    told(f"{N_STREAMING} clients, {seconds:.0f} s: {len(results)} streams whole and in order, "
         f"{sum(one.n_tokens for one in results) / seconds:.0f} tok/s, a stream takes "
         f"{statistics.median(waits):.2f} s (longest {max(waits):.2f}); resident "
         f"{before['rss'] / 1e6:.0f} -> {after['rss'] / 1e6:.0f} MB")


# ---- clients that vanish

def vanish(port, draw):
    """A request that is left at a random point, politely or with a reset."""
    long = {"max_output_tokens": 450, "stream": draw.random() < 0.7, "store": True}
    body = json.dumps({**json.loads(BODY), **long}).encode()
    request = HEAD.replace(b"%d" % len(BODY), b"%d" % len(body)) + body
    sock = connect(port)
    try:
        point = draw.choice(["head", "body", "asked", "stream"])
        if point == "head":
            sock.sendall(request[:draw.randrange(len(HEAD))])
        elif point == "body":
            sock.sendall(request[:draw.randrange(len(HEAD), len(request))])
        else:
            sock.sendall(request)
            if point == "stream":
                left = draw.randrange(1, 6000 if long["stream"] else 500)
                while left > 0 and (data := sock.recv(left)):
                    left -= len(data)
        if draw.random() < 0.5:  # a reset instead of an end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        sock.close()


def test_500_clients_that_vanish_at_random_points_leave_nothing_behind(tmp_path, told):
    """C-075, C-097."""
    with ServerProcess(tmp_path, library={"default_context_length": 512, "queue_limit": 1000},
                       heartbeat_s=0.02) as server:
        alone = ask(server.port)[0]["output"]
        before, failures = server.when_quiet({**server.state(), "connections": 0}), []
        began = time.monotonic()

        def work(seed):
            draw = random.Random(seed)
            try:
                for _ in range(N_VANISHING // 10):
                    vanish(server.port, draw)
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert failures == []
        server.when_quiet(before)
        assert ask(server.port)[0]["output"] == alone
    told(f"{N_VANISHING} clients vanished within {time.monotonic() - began:.1f} s; "
         "every page, slot, thread and descriptor came back")

"""One request over HTTP: what goes out, what comes of each answer, where it may go at all."""
import logging
import ssl
import subprocess

import pytest
from helpers_mcp import (
    QUICK, McpServer, connect, connected, echo, quick, raw_server, read_request, watch)

from tinychat.mcp import addresses, headers, http, url
from tinychat.mcp.era import HANDSHAKE
from tinychat.mcp.errors import McpError, NotConnected, ProtocolError, Refused, ServerError
from tinychat.mcp.url import parse

PUBLIC = "93.184.215.14"


# ---- what goes out

@pytest.mark.parametrize("versions", [HANDSHAKE, ("2026-07-28",)])
@pytest.mark.parametrize("streams", [False, True])
def test_posts_say_what_they_are_and_take_both_kinds_of_answers(versions, streams):
    """M-021"""
    with McpServer(versions=versions, streams=streams) as server:
        with connected(server.url + "?a=b&c=%20d#fragment") as client:
            assert [tool.name for tool in client.tools(watch())] == ["echo"]
            assert echo(client) == "hello"
    for seen in server.seen:
        assert seen.path == "/mcp?a=b&c=%20d"
        assert seen.headers["accept"] == "application/json, text/event-stream"
        assert seen.headers["content-type"] == "application/json"
        assert seen.headers["content-length"] == str(len(seen.body))
        assert seen.headers["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("kind", ["Application/JSON; charset=utf-8", "TEXT/Event-Stream;charset=x"])
def test_content_types_are_compared_without_parameters_and_case(kind):
    """M-021"""
    def script(reply):
        body = b'{"jsonrpc":"2.0","id":%d,"result":{"content":[]}}' % reply.seen.message["id"]
        reply.status(200, body if "/json" in kind.lower() else b"data: " + body + b"\n\n", kind)
    with McpServer(on={"tools/call": script}) as server, connected(server) as client:
        assert client.call("x", {}, watch()).content == []


def test_the_users_headers_are_on_every_request():
    """M-025"""
    own = {"Authorization": "Bearer s3cret-token", "X-Latin": "grüß", "User-Agent": "mine"}

    def cut(reply):
        reply.stream()
        reply.event(id="1")
    with McpServer(versions=HANDSHAKE, sessions=True, on={"tools/call": cut}) as server:
        with connected(server, headers=own) as client, pytest.raises(McpError):
            echo(client)
    assert {"POST", "GET", "DELETE"} == {seen.method for seen in server.seen}
    for seen in server.seen:
        assert seen.headers["authorization"] == "Bearer s3cret-token"
        assert seen.headers["x-latin"] == "grüß" and seen.headers["user-agent"] == "mine"


BAD_HEADERS = [
    *[{name: "x"} for name in ("Host", "content-length", "Content-Type", "Transfer-Encoding", "Connection",
                               "ACCEPT", "Expect", "TE", "Trailer", "Upgrade", "Last-Event-ID", "Mcp-Name",
                               "mcp-session-id", "Mcp-Param-X", "MCP-Protocol-Version")],
    *[{name: "x"} for name in ("", "a b", "a:", "ä", "a\r\nb", "(x)")],
    *[{"X-Key": value} for value in ("a\r\nEvil: 1", "a\nb", "a\0b", "\x7f", "\x85", "€", 5, None)],
    {"X-Key": "a", "x-key": "b"}]


@pytest.mark.parametrize("bad", BAD_HEADERS, ids=repr)
def test_headers_that_must_not_go_out_are_refused_before_any_connection(bad):
    """M-026, M-089"""
    with McpServer() as server, pytest.raises(Refused) as caught:
        connect(server, headers=bad)
    assert server.seen == [] and "Evil" not in caught.value.message


@pytest.mark.parametrize("text, value", [
    ("us-west1", "us-west1"), ("two words", "two words"), ("", ""), ("Zürich", "=?base64?WsO8cmljaA==?="),
    (" edge", "=?base64?IGVkZ2U=?="), ("a\r\nb", "=?base64?YQ0KYg==?="), ("a\tb", "=?base64?YQli?="),
    ("=?base64?YQ==?=", "=?base64?PT9iYXNlNjQ/WVE9PT89?="), ("\ud800", "=?base64?Pw==?="), (" ", "=?base64?IA==?=")])
def test_texts_are_wrapped_where_a_header_could_not_hold_them(text, value):
    """M-036"""
    assert headers.encode(text) == value


# ---- what comes of an answer

@pytest.mark.parametrize("answer, what", [
    ((202, b"", None), "HTTP 202 with no content type"), ((204, b"", None), "HTTP 204"),
    ((200, b"", "application/json"), "an empty body"), ((200, b" \n", "application/json"), "an empty body"),
    ((200, b"<p>", "text/html"), "text/html"), ((200, b"{}", None), "no content type"),
    ((201, b"{}", "application/json"), "HTTP 201"), ((200, b"", "text/event-stream"), "without an answer")])
def test_an_answer_that_is_none_is_an_error_that_names_what_came(answer, what):
    """M-022"""
    status, body, kind = answer
    on = {"tools/call": lambda reply: reply.status(status, body, kind)}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(McpError, match=what) as caught:
            echo(client)
    assert "/mcp: " in caught.value.message


@pytest.mark.parametrize("status", [400, 403, 404, 500])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_json_rpc_error_in_the_body_is_the_error(status, kind):
    """M-023"""
    body = b'{"jsonrpc":"2.0","id":null,"error":{"code":-32055,"message":"wrong moon","data":{"a":1}}}'
    on = {"tools/call": lambda reply: reply.status(status, body, kind)}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(ServerError, match="^wrong moon$") as caught:
            echo(client)
    assert (caught.value.rpc_code, caught.value.http_status) == (-32055, status)
    assert caught.value.data == {"a": 1}


def test_other_bodies_are_told_in_a_few_printable_letters():
    on = {"tools/call": [lambda reply: reply.status(500, b"oops\x00\n\xff" + b"x" * 900),
                         lambda reply: reply.status(502, b"PNG", "image/png"),
                         lambda reply: reply.status(503, "busy", Retry_After="17"),
                         lambda reply: reply.error(-1, "busy", 429, Retry_After="18")]}
    with McpServer(on=on) as server, connected(server) as client:
        for text in (r"HTTP 500 Internal Server Error: oops \S?\s?x{180,}…$", "HTTP 502 Bad Gateway$",
                     r"HTTP 503 Service Unavailable: busy \(Retry-After: 17\)$", r"busy \(Retry-After: 18\)$"):
            with pytest.raises(ServerError, match=text) as caught:
                echo(client)
            assert len(caught.value.message) < 350


@pytest.mark.parametrize("as_json", [False, True])
def test_401_says_where_credentials_go_and_visits_nobody(as_json):
    """M-024"""
    with McpServer() as other:
        announced = {"WWW_Authenticate": f'Bearer resource_metadata="{other.url}/.well-known/x"'}

        def script(reply):
            if as_json:
                reply.error(-32001, "token expired", 401, **announced)
            else:
                reply.status(401, "token expired", **announced)
        with McpServer(on={"server/discover": script}) as server, pytest.raises(ServerError) as caught:
            connect(server)
    for word in ("401", "`headers`", "Authorization: Bearer", "OAuth", "token expired"):
        assert word in caught.value.message
    assert caught.value.http_status == 401 and other.seen == [] and len(server.seen) == 1


def test_secrets_are_in_no_message_and_no_log(caplog):
    """M-089"""
    caplog.set_level(logging.DEBUG)
    secret, query = "s3cret-token", "k3y-in-query"

    def repeat(reply):
        reply.status(403, f"no: {reply.seen.headers['authorization']} {reply.seen.headers.get('mcp-session-id')}")

    messages = []
    with McpServer(versions=HANDSHAKE, sessions=True) as server:
        with connected(f"{server.url}?key={query}", headers={"Authorization": f"Bearer {secret}"}) as client:
            client.tools(watch())
            for on in (repeat, lambda reply: reply.status(500), lambda reply: reply.status(302, Location="/x"),
                       lambda reply: reply.status(404), lambda reply: None):
                server.on["tools/call"] = on
                with pytest.raises(McpError) as caught:
                    echo(client)
                messages.append(caught.value.message)
    told = "\n".join([*messages, caplog.text, repr(client)])
    assert "/mcp" in told
    assert not [word for word in (secret, query, *server.session_ids) if word in told]


def test_an_answer_in_a_compression_nobody_asked_for_is_an_error():
    """M-079"""
    on = {"tools/call": lambda reply: reply.status(200, b"\x1f\x8b", "application/json", Content_Encoding="gzip")}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(ProtocolError, match="without compression, got 'gzip'"):
            echo(client)
    assert {seen.headers["accept-encoding"] for seen in server.seen} == {"identity"}


# ---- redirects

@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_within_the_origin_is_followed_as_it_was(status):
    """M-033"""
    def script(reply):
        if reply.seen.path == "/mcp":
            return reply.status(status, Location="/there?x=1")
        reply.server.usual(reply)
    with McpServer(on={"tools/call": script}) as server, connected(server, headers={"X-A": "b"}) as client:
        assert echo(client) == "hello"
    first, second = server.of("tools/call")
    assert (second.path, second.body, second.headers["x-a"]) == ("/there?x=1", first.body, "b")


def test_a_loop_of_redirects_ends():
    """M-033"""
    on = {"tools/call": lambda reply: reply.status(307, Location="/mcp")}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(Refused, match="more than 3 redirects"):
            echo(client)
    assert len(server.of("tools/call")) == 4


@pytest.mark.parametrize("status, location, origin", [
    (307, "http://localhost:{port}/mcp?key=1", "http://localhost:{port}"),
    (308, "https://127.0.0.1:{port}/", "https://127.0.0.1:{port}"),
    (307, "http://127.0.0.1:{other}/", "http://127.0.0.1:{other}"),
    (307, "//user:pw@127.0.0.1:{port}/", "user or password"),
    (301, "/there", "http://127.0.0.1:{port}"), (302, "/there", "127"), (303, "/there", "127"),
    (307, "", "nowhere"), (307, "http://[", "no URL"), (300, "/x", "127"), (304, "", "nowhere")])
def test_other_redirects_are_errors_that_name_the_origin(status, location, origin):
    """M-034"""
    with McpServer() as other, McpServer() as server, connected(server) as client:
        ports = {"port": server.port, "other": other.port}
        server.on["tools/call"] = lambda reply: reply.status(status, Location=location.format(**ports))
        with pytest.raises(Refused) as caught:
            echo(client)
    assert origin.format(**ports) in caught.value.message
    assert "key=1" not in caught.value.message and "pw" not in caught.value.message
    assert len(server.of("tools/call")) == 1 and other.seen == []


# ---- addresses

LOOPBACKS = ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1", "[::ffff:127.0.0.1]",
             "0x7f000001", "[::]"]


@pytest.mark.parametrize("host", LOOPBACKS)
def test_public_never_leads_to_loopback(host):
    """M-083"""
    with McpServer() as server, pytest.raises(Refused) as caught:
        connect(f"http://{host}:{server.port}/mcp?key=1", policy="public")
    assert caught.value.code == "private_address_refused" and server.seen == []
    assert "ephemeral_mcp" in caught.value.message and "'local' would" in caught.value.message
    assert f":{server.port}/mcp" in caught.value.message and "key=1" not in caught.value.message


REFUSED = ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.1.2.3", "224.0.0.1",
           "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.88.99.1", "fe80::1", "fc00::1",
           "fd00:ec2::254", "ff02::1", "::", "2001:db8::1", "3fff::1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
           "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::", "::ffff:10.0.0.1", "::127.0.0.1", "fec0::1",
           "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "5f00::1"]
FIT = [PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14", "2002:5db8:d70e::1"]


@pytest.mark.parametrize("address", REFUSED)
def test_public_refuses_what_the_internet_does_not_route(address):
    """M-083"""
    with pytest.raises(Refused, match="ephemeral_mcp"):
        connect("http://example.test/", policy="public", resolve=lambda host, port: [address])


@pytest.mark.parametrize("address", FIT)
def test_public_takes_the_rest(address):
    """M-083"""
    assert addresses.judged(parse("http://h/"), "public", lambda *_: [address], watch())


def test_the_connection_goes_to_the_judged_address_and_the_name_is_not_asked_again(monkeypatch):
    """M-084"""
    answers, connected_to = iter([[PUBLIC], ["127.0.0.1"]]), []

    def no_connection(url, found, watch, tls):
        connected_to.append(found)
        raise NotConnected("tests reach nobody")

    monkeypatch.setattr(http, "connect", no_connection)
    for error in (NotConnected, Refused):
        with pytest.raises(error):
            connect("http://example.test/", policy="public", resolve=lambda *_: next(answers))
    assert connected_to == [[PUBLIC]]


@pytest.mark.parametrize("found", [[PUBLIC, "127.0.0.1"], ["127.0.0.1", PUBLIC], ["::1", PUBLIC]])
def test_a_name_with_one_address_that_is_not_fit_is_refused(found):
    """M-084"""
    with McpServer() as server, pytest.raises(Refused, match="ephemeral_mcp"):
        connect(f"http://example.test:{server.port}/", policy="public", resolve=lambda *_: found)
    assert server.seen == []


def test_every_connection_is_judged_anew():
    """M-084"""
    answers = iter([["127.0.0.1"], ["127.0.0.1"], ["169.254.169.254"]])
    with McpServer() as server:
        with connected(f"http://example.test:{server.port}/mcp", policy="local",
                       resolve=lambda *_: next(answers)) as client:
            assert echo(client) == "hello"
            with pytest.raises(Refused, match="metadata"):
                echo(client)
    assert len(server.seen) == 2


def test_local_takes_loopback_but_never_metadata():
    """M-085"""
    with McpServer() as server, connected(server, policy="local") as client:
        assert echo(client) == "hello"
    for host in ("169.254.169.254", "[::ffff:169.254.169.254]", "[fd00:ec2::254]", "[64:ff9b::a9fe:a9fe]"):
        with pytest.raises(Refused, match="ephemeral_mcp"):
            connect(f"http://{host}/", policy="local")


def test_the_owners_own_urls_are_not_judged():
    """M-085"""
    assert addresses.judged(parse("http://h/"), None, lambda *_: ["169.254.169.254"], watch())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 63 + ".invalid"])
def test_a_name_without_an_address_is_one_error(host):
    with pytest.raises(NotConnected, match="cannot resolve"):
        connect(f"http://{host}/", resolve=lambda *_: [])


def test_a_resolver_that_hangs_is_not_waited_for():
    """M-077"""
    with McpServer() as server, pytest.raises(NotConnected, match="within 0.2 seconds"):
        connect("http://example.test/", limits=quick(connect_s=0.2),
                resolve=lambda *_: server.closing.wait(5) and [])


# ---- URLs

@pytest.mark.parametrize("text", [
    "file:///etc/passwd", "ftp://h/", "gopher://h/", "http://", "http:///x", "//h/x", "h/x", "", "http://u@h/",
    "http://u:p@h/", "http://h:0/", "http://h:65536/", "http://h:x/", "http://h\r\n/", "http://h/\0", "http://[::1",
    "http://[zz]/", "http://a b/", "http://-h/", "http://" + "a" * 64 + "/", "http://h/" + "a" * 9_000,
    "http://h%00/", "http://[fe80::1%25eth0]/", "javascript:x", "http://..", "http://\ud800/"])
def test_urls_that_cannot_be_a_servers_are_refused(text):
    """M-086"""
    with pytest.raises(Refused, match="^expected "):
        connect(text)


@pytest.mark.parametrize("text, target, host", [
    ("http://h", "/", "h"), ("HTTP://H/a b?q=ä \"#f", "/a%20b?q=%C3%A4%20%22", "h"), ("http://h/%41?x=%42", "/%41?x=%42", "h"),
    ("https://müller.example/", "/", "xn--mller-kva.example"), ("http://[2001:DB8::1]/", "/", "2001:db8::1"),
    ("http://h/a\\b", "/a%5Cb", "h"), ("http://h?q", "/?q", "h"), ("http://a_b/", "/", "a_b")])
def test_what_a_url_may_not_have_is_encoded(text, target, host):
    """M-086"""
    assert (parse(text).target, parse(text).host) == (target, host)


def test_origins_are_compared_with_their_usual_ports():
    assert parse("http://h:80/a").origin == parse("http://H/b").origin == "http://h"
    assert len({parse(text).origin for text in ("http://h", "https://h", "http://h:81", "http://i")}) == 4
    assert url.parse("http://h:8/a?key=1").where == "http://h:8/a"


# ---- TLS

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
         "-days", "2", "-subj", "/CN=example.test", "-addext", "subjectAltName=DNS:example.test"],
        cwd=folder, capture_output=True) if _has_openssl() else None
    if made is None or made.returncode:
        pytest.skip("no certificate could be made here")
    return folder / "cert.pem", folder / "key.pem"


def _has_openssl() -> bool:
    import shutil
    return shutil.which("openssl") is not None


def serve_tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def serve(connection, closing):
        with context.wrap_socket(connection, server_side=True) as secured:
            read_request(secured)
            body = (b'{"jsonrpc":"2.0","id":1,"result":{"supportedVersions":["2026-07-28"],'
                    b'"capabilities":{}}}')
            secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                            b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    return serve


def test_tls_verifies_the_name_while_the_judged_address_is_used(certificate):
    """M-084"""
    trusting = ssl.create_default_context(cafile=certificate[0])
    with raw_server(serve_tls(certificate)) as address:
        port = parse(address).port
        reach = {"resolve": lambda *_: ["127.0.0.1"], "limits": QUICK}
        with connected(f"https://example.test:{port}/", tls=trusting, **reach) as client:
            assert client.version == "2026-07-28"
        for name, tls in (("other.test", trusting), ("example.test", None)):
            with pytest.raises(NotConnected, match="no TLS with this server: .*(mismatch|self.signed)"):
                connect(f"https://{name}:{port}/", tls=tls, **reach)


def test_a_handshake_that_never_ends_ends_in_time():
    """M-077"""
    with raw_server(lambda connection, closing: closing.wait(20)) as address:
        with pytest.raises(NotConnected, match="cannot connect within 0.3 seconds"):
            connect(address.replace("http:", "https:"), limits=quick(connect_s=0.3))


def test_a_server_without_tls_is_one_error():
    with McpServer() as server, pytest.raises(NotConnected, match="no TLS with this server"):
        connect(server.url.replace("http:", "https:"))

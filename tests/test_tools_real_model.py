"""The small real model completes a tool round trip, and only what is new is computed for it."""
import pytest
from contract_checker import check_response
from helpers_tools import WEATHER, ephemeral, weather_server

import tinychat
from tinychat import chat
from tinychat.contract import parse_chat_request

ASKED = 'Repeat: <tool_call>{"name": "weather"'  # a model of 135M begins no call by itself


@pytest.fixture(scope="module")
def model(smollm2_path):
    with tinychat.load(smollm2_path) as loaded:
        yield loaded


def ask(model, server, **fields) -> dict:
    body = {"model": model.key, "input": ASKED, "temperature": 0, "max_output_tokens": 200,
            "integrations": [ephemeral(server)], **fields}
    response = chat.fold(chat.run(model.library, model.store, parse_chat_request(body),
                                  chat.ChatSettings(max_tool_rounds=1)))
    assert check_response(response, request=body) == []
    return response


def test_a_small_model_completes_a_round_trip(model):
    with weather_server() as server:
        output = ask(model, server)["output"]
        (seen,) = server.of("tools/call")
    assert [item["type"] for item in output] == ["tool_call", "message"]
    assert output[0]["tool"] == WEATHER["name"]
    assert seen.message["params"]["arguments"] == output[0]["arguments"]
    assert isinstance(output[0]["arguments"]["city"], str)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_it_draws_its_calls_are_valid(model, seed):
    """C-044: at a temperature at which it would write anything."""
    with weather_server() as server:
        output = ask(model, server, temperature=1.5, input=ASKED + " " * seed)["output"]
    assert "invalid_tool_call" not in [item["type"] for item in output[:1]]


def test_only_the_result_is_computed_for_the_next_round(model):
    """KV pages are used again from round to round."""
    engine = model.library.loaded(model.key).engine
    settings = chat.ChatSettings(max_tool_rounds=5)
    with weather_server() as server:
        for n in range(2):  # the second time all of the first prompt is there too
            before = engine.stats
            body = {"model": model.key, "input": ASKED, "temperature": 0, "max_output_tokens": 60,
                    "store": False, "integrations": [ephemeral(server)]}
            response = chat.fold(chat.run(model.library, model.store, parse_chat_request(body),
                                          settings))
            after = engine.stats
    n_calls = sum(item["type"] == "tool_call" for item in response["output"])
    n_result = len(model.tokenize("<tool_response>sunny in New York</tool_response>"))
    assert n_calls >= 1
    # of a page, which is the least that is kept, something may have to be computed again
    assert after.n_prefilled_tokens - before.n_prefilled_tokens < (n_calls + 1) * (n_result + 32)

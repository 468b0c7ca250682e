"""Validation of the chat request: codes, params and the order of checks (C-008 to C-043, C-113, C-114)."""
import base64
import io
import json

import pytest
from contract_checker import check_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinychat.contract import (
    MAX_COUNT, EphemeralServer, ImageItem, Plugin, TextItem, parse_chat_request, parse_json)
from tinychat.errors import InvalidRequest, TinychatError

BASE = {"model": "m", "input": "hi"}


def refused(change: dict, base=BASE) -> TinychatError:
    with pytest.raises(TinychatError) as caught:
        parse_chat_request({**base, **change})
    assert check_error({"error": caught.value.to_json()}) == []
    return caught.value


def code_and_param(change: dict) -> tuple:
    error = refused(change)
    return error.code, error.param


def png(mode="RGB") -> str:
    data = io.BytesIO()
    Image.new(mode, (2, 2)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


# ---- JSON

@pytest.mark.parametrize("data", [
    b"", b" ", b"{", b"{} x", b"{}{}", b"nul", b"{'a': 1}", b"\xff\xfe{\x00}\x00", b'{"a": "\xff"}',
    b"\xef\xbb\xbf{}", b'{"a": NaN}', b"[Infinity]", b"-Infinity", b'{"a": 01}', b'{"a": "\n"}', b"[1,]",
    b"[" * 101 + b"]" * 101, b"[" * 1000 + b"]" * 1000, b"[" * 200_000, b'{"a":' * 150_000,
])
def test_broken_json_is_invalid_json(data):
    """C-008, C-009."""
    with pytest.raises(InvalidRequest) as caught:
        parse_json(data)
    assert (caught.value.code, caught.value.param) == ("invalid_json", None)
    assert check_error({"error": caught.value.to_json()}, 400) == []


def test_a_hundred_levels_are_allowed():
    assert parse_json(b"[" * 100 + b"]" * 100)


def test_of_a_doubled_key_the_last_counts():
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}


def test_unpaired_surrogates_become_replacement_characters():
    """C-014."""
    assert parse_json(rb'{"a\ud800": ["x\udc00y", "\ud83d\ude00"]}') == {"a\ufffd": ["x\ufffdy", "\U0001f600"]}


@pytest.mark.parametrize("number", ["1e999", "9" * 5000, "-" + "9" * 5000])
def test_a_number_beyond_all_floats_is_outside_the_range(number):
    """A clear error, not Python's limit on digits."""
    for field in ("temperature", "top_k", "max_output_tokens"):
        body = parse_json(f'{{"model": "m", "input": "i", "{field}": {number}}}'.encode())
        with pytest.raises(InvalidRequest) as caught:
            parse_chat_request(body)
        assert (caught.value.code, caught.value.param) == ("invalid_value", field)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8ef019.NaInfty-+ ', max_size=40).map(str.encode))
def test_any_bytes_parse_or_are_invalid_json(data):
    try:
        parse_json(data)
    except InvalidRequest as error:
        assert error.code == "invalid_json"


# ---- fields

def test_a_full_request_is_read():
    request = parse_chat_request({
        "model": "m", "input": [{"type": "text", "content": "a"}, {"type": "message", "content": "b"},
                                {"type": "image", "data_url": png()}],
        "system_prompt": "s", "stream": True, "temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0,
        "repeat_penalty": 1.1, "max_output_tokens": 5, "reasoning": "low", "context_length": 8000.0,
        "store": False, "previous_response_id": "resp_x", "ttl": 300,
        "integrations": ["mcp/a", {"type": "plugin", "id": "mcp/b", "allowed_tools": [], "timeout": 5},
                         {"type": "ephemeral_mcp", "server_label": "l", "server_url": "https://h/mcp",
                          "headers": {"X-A": "secret"}}]})
    assert request.input == (TextItem("a"), TextItem("b"), ImageItem(png()))
    assert (request.context_length, request.stream, request.store, request.ttl) == (8000, True, False, 300)
    assert request.integrations[:2] == (Plugin("mcp/a"), Plugin("mcp/b", (), 5))
    assert request.integrations[2] == EphemeralServer("l", "https://h/mcp", None, (("X-A", "secret"),), None)
    assert "secret" not in repr(request)


def test_defaults_of_a_bare_request():
    request = parse_chat_request(BASE)
    assert request.input == (TextItem("hi"),)
    assert (request.stream, request.store, request.temperature, request.integrations) == (False, True, None, ())


@pytest.mark.parametrize("field", ["model", "input"])
def test_a_missing_field_is_named(field):
    """C-017, C-018."""
    for base in ({k: v for k, v in BASE.items() if k != field}, {**BASE, field: None}):
        error = refused({}, base)
        assert (error.code, error.param) == ("missing_required_parameter", field)


def test_null_is_absent():
    """C-018."""
    optional = ["system_prompt", "integrations", "stream", "temperature", "top_p", "top_k", "min_p", "repeat_penalty",
                "max_output_tokens", "reasoning", "context_length", "store", "previous_response_id", "ttl"]
    assert parse_chat_request({**BASE, **dict.fromkeys(optional)}) == parse_chat_request(BASE)


@pytest.mark.parametrize("change, code, param", [
    ({"model": ""}, "invalid_value", "model"),                                      # C-019
    ({"model": 5}, "invalid_type", "model"),
    ({"foo": 1}, "unrecognized_keys", "foo"),                                       # C-023
    ({"foo": None}, "unrecognized_keys", "foo"),
    ({"": 1}, "unrecognized_keys", "''"),
    ({"messages": []}, "unrecognized_keys", "messages"),                            # C-024
    ({"tools": []}, "unrecognized_keys", "tools"),
    ({"stop": "x"}, "unrecognized_keys", "stop"),
    ({"seed": 1}, "unrecognized_keys", "seed"),
    ({"max_tokens": 1}, "unrecognized_keys", "max_tokens"),
    ({"input": {}}, "invalid_type", "input"),                                       # C-027
    ({"input": 5}, "invalid_type", "input"),
    ({"input": True}, "invalid_type", "input"),
    ({"input": []}, "invalid_value", "input"),                                      # C-028
    ({"input": ["x"]}, "invalid_type", "input.0"),
    ({"input": [{"type": "audio"}]}, "invalid_union", "input"),                     # C-032
    ({"input": [{"content": "x"}]}, "invalid_union", "input"),
    ({"input": [{"type": ["text"]}]}, "invalid_union", "input"),
    ({"input": [{"type": "text"}]}, "missing_required_parameter", "input.0.content"),  # C-033
    ({"input": [{"type": "text", "content": 1}]}, "invalid_type", "input.0.content"),
    ({"input": [{"type": "text", "content": "x"}, {"type": "text", "content": "x", "role": "user"}]},
     "unrecognized_keys", "input.1"),                                               # C-034
    ({"input": [{"type": "image"}]}, "missing_required_parameter", "input.0.data_url"),
    ({"input": [{"type": "image", "data_url": "http://h/x.png"}]}, "invalid_value", "input.0.data_url"),  # C-036
    ({"input": [{"type": "image", "data_url": "data:image/png,abc"}]}, "invalid_value", "input.0.data_url"),
    ({"input": [{"type": "image", "data_url": "data:image/png;base64,@@"}]}, "invalid_value", "input.0.data_url"),
    ({"input": [{"type": "image", "data_url": "data:image/png;base64,AAAA"}]}, "invalid_value", "input.0.data_url"),
    ({"system_prompt": 1}, "invalid_type", "system_prompt"),
    ({"temperature": "0.5"}, "invalid_type", "temperature"),                        # C-037
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"stream": 1}, "invalid_type", "stream"),
    ({"store": "no"}, "invalid_type", "store"),
    ({"temperature": -0.1}, "invalid_value", "temperature"),                        # C-038
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"top_p": -0.01}, "invalid_value", "top_p"),                                   # C-039
    ({"top_p": 1.01}, "invalid_value", "top_p"),
    ({"min_p": -0.01}, "invalid_value", "min_p"),
    ({"min_p": 1.01}, "invalid_value", "min_p"),
    ({"top_k": -1}, "invalid_value", "top_k"),                                      # C-040
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"top_k": True}, "invalid_type", "top_k"),
    ({"repeat_penalty": 0}, "invalid_value", "repeat_penalty"),
    ({"repeat_penalty": -1}, "invalid_value", "repeat_penalty"),
    ({"repeat_penalty": 10.5}, "invalid_value", "repeat_penalty"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),               # C-041
    ({"max_output_tokens": -1}, "invalid_value", "max_output_tokens"),
    ({"ttl": 0}, "invalid_value", "ttl"),
    ({"ttl": -1}, "invalid_value", "ttl"),
    ({"context_length": 0}, "invalid_value", "context_length"),                     # C-042
    ({"reasoning": "xhigh"}, "invalid_value", "reasoning"),                         # C-043
    ({"reasoning": True}, "invalid_type", "reasoning"),
    ({"previous_response_id": "abc"}, "invalid_value", "previous_response_id"),     # C-089
    ({"previous_response_id": 5}, "invalid_type", "previous_response_id"),
    ({"integrations": "mcp/a"}, "invalid_type", "integrations"),
    ({"integrations": ["mcp/a"] * 33}, "invalid_value", "integrations"),
    ({"integrations": [1]}, "invalid_type", "integrations.0"),
    ({"integrations": [""]}, "invalid_value", "integrations.0"),
    ({"integrations": ["mcp/a", {"type": "x"}]}, "invalid_union", "integrations.1"),  # C-113
    ({"integrations": [{}]}, "invalid_union", "integrations.0"),
    ({"integrations": ["mcp/a", "mcp/a"]}, "invalid_value", "integrations.1"),
    ({"integrations": [{"type": "plugin"}]}, "missing_required_parameter", "integrations.0.id"),
    ({"integrations": [{"type": "plugin", "id": "a", "x": 1}]}, "unrecognized_keys", "integrations.0"),  # C-114
    ({"integrations": [{"type": "plugin", "id": "a", "timeout": 0}]}, "invalid_value", "integrations.0.timeout"),
    ({"integrations": [{"type": "plugin", "id": "a", "allowed_tools": [1]}]}, "invalid_type",
     "integrations.0.allowed_tools.0"),
])
def test_a_bad_field_answers_with_its_code_and_path(change, code, param):
    assert code_and_param(change) == (code, param)


EPHEMERAL = {"type": "ephemeral_mcp", "server_label": "l", "server_url": "http://h/mcp"}


@pytest.mark.parametrize("change, param", [
    ({"server_label": ""}, "server_label"), ({"server_label": "x" * 65}, "server_label"),
    ({"server_url": "ftp://h"}, "server_url"), ({"server_url": "/mcp"}, "server_url"),
    ({"server_url": "http://"}, "server_url"), ({"server_url": "http://[::1"}, "server_url"),
    ({"server_url": "http://h:99999/"}, "server_url"), ({"server_url": "http://h/ x"}, "server_url"),
    ({"server_url": "http://h/\r\nX: y"}, "server_url"),
    ({"headers": {"Host": "x"}}, "headers"), ({"headers": {"content-length": "1"}}, "headers"),
    ({"headers": {"A": "x\r\nB: y"}}, "headers"), ({"headers": {"A b": "x"}}, "headers"),
    ({"timeout": 3_600_001}, "timeout"),
])
def test_a_bad_ephemeral_server_is_refused_at_its_field(change, param):
    error = refused({"integrations": [{**EPHEMERAL, **change}]})
    assert (error.code, error.param) == ("invalid_value", f"integrations.0.{param}")


def test_labels_are_unique():
    assert code_and_param({"integrations": [EPHEMERAL, EPHEMERAL]}) == (
        "invalid_value", "integrations.1.server_label")


def test_no_message_carries_a_header_value():
    """C-015."""
    error = refused({"integrations": [{**EPHEMERAL, "headers": {"Authorization": "Bearer s3cret\n"}}]})
    assert "s3cret" not in json.dumps(error.to_json())


@pytest.mark.parametrize("change", [
    {"temperature": 0}, {"temperature": 1}, {"temperature": 2}, {"top_p": 0}, {"top_p": 1}, {"min_p": 0},
    {"min_p": 1}, {"top_k": 0}, {"top_k": 1}, {"repeat_penalty": 1}, {"repeat_penalty": 1.1},
    {"max_output_tokens": 1}, {"ttl": 300}, {"context_length": 8000.0}, {"input": ""}, {"system_prompt": ""},
    {"integrations": []},
])
def test_values_at_the_edge_are_accepted(change):
    """C-028, C-038 to C-042."""
    parse_chat_request({**BASE, **change})


def test_a_huge_count_is_capped():
    assert parse_chat_request({**BASE, "max_output_tokens": 10**300}).max_output_tokens == MAX_COUNT


def test_the_first_violation_in_the_tables_order_is_reported():
    """C-025, C-026."""
    assert refused({"foo": 1}, {"model": "m"}).param == "input"
    assert refused({"model": 5, "zzz": 1}, {}).param == "model"
    assert refused({"ttl": 0, "temperature": 9, "min_p": "x"}).param == "temperature"
    assert refused({"input": [{"type": "text"}], "temperature": 9}).param == "input.0.content"


@pytest.mark.parametrize("value", [[], "x", 5, None, True])
def test_a_body_that_is_no_object_is_a_type_error_without_param(value):
    """C-010, C-013."""
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(value)
    assert caught.value.code == "invalid_type"
    assert "param" not in caught.value.to_json()


WIRE_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["text", "image", "plugin", "ephemeral_mcp", "off", "resp_x", "data:image/png;base64,"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "content", "data_url", "id", "server_label", "server_url", "headers", "x"]),
        inner, max_size=4), max_leaves=8)
FIELDS = ["model", "input", "system_prompt", "integrations", "stream", "temperature", "top_p", "top_k", "min_p",
          "repeat_penalty", "max_output_tokens", "reasoning", "context_length", "store", "previous_response_id",
          "ttl", "extra"]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), WIRE_VALUES, max_size=4), st.booleans())
def test_any_body_is_a_request_or_a_contract_error(body, complete):
    """C-012."""
    try:
        parse_chat_request({**BASE, **body} if complete else body)
    except TinychatError as error:
        assert check_error({"error": error.to_json()}, 400) == []

"""Tools as the model knows them, and what it reads of their results."""
import base64
import copy
import json
import logging
import time

import pytest

from tinychat.mcp.errors import ServerError, TimedOut
from tinychat.mcp.results import CallResult
from tinychat.mcp.schemas import MAX_BYTES
from tinychat.mcp.tools import (
    Exposed, Tool, definition, expose, failure, output_of, prompt_schema, text_for_model)

LOTS = 1 << 20


def tool(name: str, schema: dict | None = None, description: str = "") -> Tool:
    return Tool(name, description, schema or {"type": "object"})


def names(*servers) -> list[str]:
    """Of (label, names of tools)."""
    return [one.name for one in expose([(label, [tool(name) for name in own]) for label, own in servers])]


# ---- names

def test_plain_names_stay_as_they_are():
    exposed = expose([("a", [tool("search"), tool("read_file-2")]), ("b", [tool("write")])])
    assert [(one.name, one.tool.name, one.server) for one in exposed] == [
        ("search", "search", 0), ("read_file-2", "read_file-2", 0), ("write", "write", 1)]


def test_the_second_of_two_equal_names_gets_its_label():
    """M-062"""
    assert names(("a", ["search"]), ("b", ["search", "x"]), ("c", ["search"])) == [
        "search", "b__search", "x", "c__search"]
    assert names(("b", ["search"]), ("a", ["search"])) == ["search", "a__search"]


ODD = ["a.b", "a/b", "a b", "a_b", "检索", "搜索", "ä", "x" * 300, "x" * 299 + "y", "x" * 64, "x" * 65,
       "\ud800", "\n", "<|im_end|>"]


def test_odd_names_become_ones_that_a_grammar_takes_and_differ():
    """M-063"""
    import re
    found = names(("my server", ODD), ("other", ODD), ("my_server", ODD))
    assert len(set(found)) == len(found) == 3 * len(ODD)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", name) for name in found)
    assert found == names(("my server", ODD), ("other", ODD), ("my_server", ODD))


def test_names_do_not_depend_on_the_order_of_a_servers_list():
    """M-063"""
    there = {one.tool.name: one.name for one in expose([("a", [tool(name) for name in ODD])])}
    back = {one.tool.name: one.name for one in expose([("a", [tool(name) for name in reversed(ODD)])])}
    assert there == back and there["a_b"] == "a_b" and there["x" * 64] == "x" * 64


def test_a_name_that_looks_like_a_label_and_a_name_is_no_trap():
    """M-062 M-063"""
    assert names(("a", ["b__search", "search"]), ("b", ["search"]))[:2] == ["b__search", "search"]
    found = names(("a", ["b__search", "search"]), ("b", ["search"]), ("b", ["search"]))
    assert len(set(found)) == 4


def test_long_names_keep_their_beginning():
    long = "x" * 300
    (name,) = names(("a", [long]))
    assert len(name) == 64 and name.startswith("x" * 55 + "_")


# ---- definitions

def test_a_definition_is_in_the_notation_of_templates():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert definition(Exposed("b__x", tool("x", schema, "does it"), 1)) == {
        "type": "function", "function": {"name": "b__x", "description": "does it", "parameters": schema}}


def test_a_tool_without_arguments_still_has_properties():
    parameters = definition(Exposed("x", Tool("x", "", {}), 0))["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {}}


def test_long_descriptions_are_cut():
    found = definition(Exposed("x", tool("x", description="d" * 5_000), 0))["function"]["description"]
    assert len(found) == 4_000 and found.endswith("d…")


# ---- schemas

def test_local_references_are_put_in_place():
    schema = {"$schema": "x", "$id": "y", "$comment": "z", "type": "object",
              "properties": {"at": {"$ref": "#/$defs/point", "description": "where"},
                             "all": {"type": "array", "items": {"$ref": "#/$defs/point"}},
                             "region": {"type": "string", "x-mcp-header": "Region"}},
              "$defs": {"point": {"type": "object", "properties": {"x": {"$ref": "#/definitions/a~1b%20c"}}}},
              "definitions": {"a/b c": {"type": "number"}}}
    before = copy.deepcopy(schema)
    point = {"type": "object", "properties": {"x": {"type": "number"}}}
    assert prompt_schema(schema) == {
        "type": "object", "properties": {"at": {**point, "description": "where"},
                                         "all": {"type": "array", "items": point},
                                         "region": {"type": "string"}}}
    assert schema == before, "M-067: the original is the server's"


def test_recursion_is_cut():
    """M-065"""
    tree = {"type": "object", "properties": {"child": {"$ref": "#"}, "left": {"$ref": "#/$defs/node"}},
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}}
    assert prompt_schema(tree)["properties"] == {
        "child": {}, "left": {"type": "object", "properties": {"next": {}}}}
    assert prompt_schema({"$ref": "#"}) == {}
    mutual = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]},
                                             "b": {"not": {"$ref": "#/$defs/a"}}}}
    assert prompt_schema(mutual) == {"anyOf": [{"not": {}}]}


@pytest.mark.parametrize("ref", ["#/$defs/none", "#/a/b/c", "#anchor", "other.json", "http://127.0.0.1:9/s.json",
                                 "https://example.com/schema#/$defs/x", "file:///etc/passwd", "", 3, None, [], "#/",
                                 "#/properties/a/enum/99999999999999999999"])
def test_references_to_elsewhere_allow_anything_and_nothing_is_fetched(ref, monkeypatch):
    """M-065 M-066"""
    import socket
    monkeypatch.setattr(socket, "socket", None)
    schema = {"type": "object", "properties": {"a": {"$ref": ref, "title": "A"}, "b": {"type": "string"}}}
    assert prompt_schema(schema)["properties"] == {"a": {"title": "A"}, "b": {"type": "string"}}


def test_references_into_lists_work():
    schema = {"properties": {"a": {"$ref": "#/anyOf/1"}}, "anyOf": [True, {"type": "number"}]}
    assert prompt_schema(schema)["properties"] == {"a": {"type": "number"}}


def test_properties_may_be_named_as_keywords_are():
    own = {name: {"type": "string"} for name in ("$ref", "$id", "$schema", "$defs", "properties", "x-mcp-header")}
    schema = {"type": "object", "properties": own}
    assert prompt_schema(schema) == schema


def test_values_are_no_schemas():
    schema = {"properties": {"a": {"default": {"$ref": "#", "$id": 1}, "enum": [{"$id": 2}], "const": {"$comment": 3}}}}
    assert prompt_schema(schema) == schema


def test_what_is_no_schema_allows_anything():
    schema = {"properties": {"a": 3, "b": None, "c": True, "d": [], "e": {"items": [{}, 3]}}, "$defs": 3,
              "patternProperties": []}
    assert prompt_schema(schema) == {
        "properties": {"a": {}, "b": {}, "c": True, "d": {}, "e": {"items": [{}, 3]}}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def bomb(n: int = 30) -> dict:
    """Each definition uses the next one twice."""
    return {"$ref": "#/$defs/0", "$defs": {
        str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}, {"$ref": f"#/$defs/{i + 1}"}]} for i in range(n)}}


def chain(n: int = 400) -> dict:
    return {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(n)}}


BEYOND = {
    "deep": nested(400),
    "deep values": {"default": json.loads("[" * 400 + "]" * 400)},
    "deep lists": {"anyOf": json.loads("[" * 400 + "]" * 400)},
    "wide": {"properties": {f"property_{i}": {"type": "string", "title": "x"} for i in range(3_000)}},
    "many": {"properties": {str(i): {} for i in range(6_000)}},
    "many values": {"default": [[]] * 6_000},
    "long": {"properties": {"a": {"description": "x" * MAX_BYTES}}},
    "a bomb of references": bomb(),
    "a chain of references": chain(),
}


@pytest.mark.parametrize("schema", BEYOND.values(), ids=BEYOND)
def test_a_schema_beyond_the_bounds_becomes_any_object_with_a_warning(schema, caplog):
    """M-065"""
    began = time.monotonic()
    assert prompt_schema(schema, "huge\ntool") == {"type": "object"}
    assert time.monotonic() - began < 1
    assert "the schema of huge tool is left out of the prompt" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_one_schema_beyond_the_bounds_touches_no_other_tool():
    """M-065 M-067"""
    before = copy.deepcopy(BEYOND["wide"])
    good = {"type": "object", "properties": {"a": {"type": "string"}}}
    found = [definition(one)["function"]["parameters"] for one in expose([
        ("a", [tool("wide", BEYOND["wide"]), tool("good", good)])])]
    assert found == [{"type": "object", "properties": {}}, good]
    assert BEYOND["wide"] == before


def test_what_fits_stays_whole():
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1_000)}}
    assert prompt_schema(wide) == wide
    assert prompt_schema(nested(30)) == nested(30)


def test_patterns_are_text():
    """No pattern of a server's is ever run."""
    schema = {"properties": {"a": {"pattern": "(a+)+$("}}}
    assert prompt_schema(schema) == schema


# ---- results

PNG = base64.b64encode(b"\x89PNG" + bytes(12_000)).decode()
TEXT = {"type": "text", "text": "hello"}


def result(*content, structured=None, is_error=False) -> CallResult:
    return CallResult(list(content), structured, is_error)


def shown(*content, **fields) -> str:
    return text_for_model(result(*content, **fields), LOTS)


def test_every_block_leaves_a_trace_for_the_model_and_is_whole_for_the_user():
    """M-070"""
    blocks = [TEXT, {"type": "image", "data": PNG, "mimeType": "image/png"},
              {"type": "audio", "data": base64.b64encode(bytes(3_000)).decode(), "mimeType": "audio/wav"},
              {"type": "resource", "resource": {"uri": "file:///a.txt", "text": "its text"}},
              {"type": "resource", "resource": {"uri": "file:///b", "mimeType": "application/zip", "blob": "AAAA"}},
              {"type": "resource_link", "uri": "https://h/c", "name": "C"},
              {"type": "hologram", "data": {"x": 1}}]
    assert shown(*blocks).split("\n") == [
        "hello", "[image image/png, 12 kB]", "[audio audio/wav, 3 kB]", "file:///a.txt", "its text",
        "[resource file:///b, application/zip, 3 bytes]", "[resource C: https://h/c]",
        "[a block of a kind that is not shown: hologram]"]
    assert json.loads(output_of(result(*blocks))) == blocks


def test_the_output_is_the_json_of_the_blocks():
    assert output_of(result({"type": "text", "text": "grüße \"x\""})) == '[{"type":"text","text":"grüße \\"x\\""}]'
    assert output_of(result()) == "[]"


def test_a_failed_tool_is_text_for_the_model():
    """M-071"""
    assert shown({"type": "text", "text": "no such city"}, is_error=True) == "no such city"
    assert shown(is_error=True) == "Error: the tool failed and said nothing"
    assert shown() == ""


def test_a_call_without_a_result_is_an_error_that_the_model_can_read():
    """M-071"""
    refused = failure(ServerError("Unknown tool: x", rpc_code=-32602))
    assert refused.is_error and text_for_model(refused, LOTS) == "Error: Unknown tool: x"
    late = failure(TimedOut("the tool x took too long"))
    assert text_for_model(late, LOTS) == "Error: the call failed: the tool x took too long"
    assert json.loads(output_of(late)) == [{"type": "text", "text": "Error: the call failed: the tool x took too long"}]


@pytest.mark.parametrize("structured", [{"a": [1, "ü"]}, [1], 0, "text", False])
def test_structured_content_counts_where_nothing_is_text(structured):
    """M-072"""
    text = json.dumps(structured, ensure_ascii=False, separators=(",", ":"))
    image = {"type": "image", "data": PNG, "mimeType": "image/png"}
    assert shown(structured=structured) == text
    assert json.loads(output_of(result(structured=structured))) == [{"type": "text", "text": text}]
    assert shown(TEXT, structured=structured) == "hello"
    assert json.loads(output_of(result(TEXT, structured=structured))) == [TEXT]
    assert shown(image, structured=structured) == f"[image image/png, 12 kB]\n{text}"
    assert json.loads(output_of(result(image, structured=structured))) == [image, {"type": "text", "text": text}]


@pytest.mark.parametrize("block, note", [
    (None, "got null"), (3, "got a number"), ("text", "got a string"), (True, "got a boolean"),
    ([TEXT], "got an array"),
    ({}, "without type"), ({"type": 3}, "without type"), ({"type": "text"}, "not shown: text"),
    ({"type": "text", "text": 3}, "not shown: text"),
    ({"type": "image", "data": "!!!", "mimeType": "image/png"}, "[image image/png, which is no valid base64]"),
    ({"type": "image", "data": "AAA", "mimeType": "image/png"}, "which is no valid base64"),
    ({"type": "image", "data": "ü" * 4}, "[image without mimeType, which is no valid base64]"),
    ({"type": "audio"}, "[audio without mimeType, without data]"),
    ({"type": "resource"}, "not shown: resource"), ({"type": "resource", "resource": []}, "not shown: resource"),
    ({"type": "resource", "resource": {}}, "[resource without uri, without mimeType, without data]"),
    ({"type": "resource_link", "name": "a\nb\x1b[1m", "uri": 3}, "[resource a b [1m: without uri]"),
    ({"type": "x" * 9_999}, "xxx…]"),
])
def test_blocks_that_are_none_become_notes(block, note):
    """M-073"""
    said = shown(block, TEXT)
    assert note in said and said.endswith("\nhello") and len(said) < 500 and said.count("\n") == 1
    assert json.loads(output_of(result(block, TEXT))) == [block, TEXT]


def test_base64_may_have_line_breaks():
    broken = "\r\n".join(PNG[i:i + 76] for i in range(0, len(PNG), 76))
    assert shown({"type": "image", "data": broken, "mimeType": "image/png"}) == "[image image/png, 12 kB]"


def test_a_long_text_is_cut_in_the_middle_with_a_mark():
    """M-074"""
    text = "".join(f"{i:07d}\n" for i in range(3_000_000 // 8))
    said = text_for_model(result({"type": "text", "text": text}), 10_000)
    assert 9_900 < len(said) <= 10_000
    beginning, mark, end = said.partition("\n[... ")
    mark, _, end = end.partition(" characters are left out here ...]\n")
    assert text.startswith(beginning) and text.endswith(end)
    assert len(beginning) + int(mark) + len(end) == len(text)
    assert abs(len(beginning) - len(end)) <= 1
    assert json.loads(output_of(result({"type": "text", "text": text})))[0]["text"] == text


@pytest.mark.parametrize("budget", [0, 1, 10, 49, 50, 51, 60, 99, 100, 101])
def test_no_budget_is_exceeded(budget):
    """M-074"""
    assert len(text_for_model(result({"type": "text", "text": "x" * 100}), budget)) <= budget


def test_halves_of_characters_do_not_crash_what_encodes_later():
    """M-008 M-073"""
    odd = {"type": "text", "text": "a\ud800b"}
    assert shown(odd).encode() == "a\ufffdb".encode()
    for one in (result(odd), result(structured={"\udfff": "\ud800"}), result({"type": "\ud800"})):
        output_of(one).encode()
        text_for_model(one, LOTS).encode()
        json.loads(output_of(one))

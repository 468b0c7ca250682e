"""The automaton of a schema: what it lets pass satisfies the schema, and all that does passes."""
import json
import random
import time

import pytest

from helpers_guide import (
    READ_PAGE, keys_of, passes, possible, random_schema, random_text, random_value, refused_at,
    satisfies,
)
from tinychat.text.guide import json_call
from tinychat.text.guide.automaton import start
from tinychat.text.guide.values import Values

STYLES = [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"indent": 1}, {"indent": 2},
          {"indent": 4, "ensure_ascii": False}, {"indent": "\t"}]


def value_state(schema):
    return start((Values(schema).value(schema),))


@pytest.mark.parametrize("seed", range(150))
def test_random_walks_give_json_that_satisfies_the_schema(seed):
    rng = random.Random(seed)
    schema = random_schema(rng)
    for _ in range(3):
        text = random_text(rng, value_state(schema), keys_of(schema))
        value = json.loads(text)
        assert satisfies(value, schema), (schema, text)
        json.dumps(value, ensure_ascii=False).encode()  # no halves of UTF-16 pairs


@pytest.mark.parametrize("seed", range(150))
def test_valid_values_pass_in_every_style(seed):
    rng = random.Random(seed)
    schema = random_schema(rng)
    value = random_value(rng, schema)
    assert satisfies(value, schema)
    for style in STYLES:
        text = json.dumps(value, **style)
        assert passes(value_state(schema), text), (schema, text,
                                                   refused_at(value_state(schema), text))


@pytest.mark.parametrize("schema, text, passed", [
    ({"type": "integer"}, "1.5", "1"),
    ({"type": "integer"}, '"1"', ""),
    ({"type": "integer"}, "01", "0"),
    ({"type": "number"}, "1" * 21, "1" * 20),
    ({"type": "number"}, "1e999", "1e99"),
    ({"type": "string"}, '"a\nb"', '"a'),
    ({"type": "string"}, r'"\ud83d"', r'"\ud83d'),
    ({"type": "string"}, r'"\udc00"', r'"\ud'),
    ({"type": "string"}, r'"\x41"', '"\\'),
    ({"type": ["string", "null"]}, "true", ""),
    ({"enum": ["ab", "ac"]}, '"ad"', '"a'),
    ({"enum": [1, 12]}, "13", "1"),
    ({"const": [1, 2]}, "[1, 2, 3]", "[1, 2"),
    ({"type": "string", "enum": ["a", 1]}, "1", ""),
    ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, "null", ""),
    ({"allOf": [{"type": ["integer", "string"]}, {"type": "number"}]}, '"', ""),
    ({"type": "array", "items": {"type": "integer"}}, '[1, "2"]', "[1, "),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, "[null, 1]", "[null"),
    ({"type": "array", "minItems": 2}, "[1]", "[1"),
    (READ_PAGE, "{}", "{"),
    (READ_PAGE, '{"lines": 1}', '{"lines": 1'),
    (READ_PAGE, '{"url": "a", "url": "b"}', '{"url": "a", "'),
    (READ_PAGE, '{"url": "a", "x": 1}', '{"url": "a", "'),
    (READ_PAGE, '{"url": "a",}', '{"url": "a",'),
    ({"properties": {"a": {}}, "additionalProperties": False}, '{"b": 1}', '{"'),
    ({"properties": {"abc": {"type": "null"}}, "additionalProperties": True}, '{"abc": 1}',
     '{"abc": '),
    ({"properties": {"abc": {"type": "null"}}, "additionalProperties": True}, r'{"\u0061bc": 1}',
     '{"'),
    ({"additionalProperties": {"type": "integer"}}, '{"any": "1"}', '{"any": '),
    ({"type": "null"}, "null ", "null"),
    ({}, "[" * 40, "[" * 32),
    ({}, '{"a":  1}', '{"a": '),
    ({}, "[" + " " * 9, "[ "),
    ({}, "[\n" + " " * 99, "[\n" + " " * 64),
])
def test_the_first_wrong_byte_is_refused(schema, text, passed):
    assert refused_at(value_state(schema), text) == passed


@pytest.mark.parametrize("bad", [b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"\xe0\x80"])
def test_strings_are_valid_utf_8(bad):
    assert value_state({"type": "string"}).walk(b'"' + bad) is None


@pytest.mark.parametrize("schema", [
    {}, {"type": "any"}, {"type": 5}, {"type": []}, {"enum": []}, {"enum": "abc"}, {"anyOf": []},
    {"anyOf": 3}, {"allOf": [False]}, {"$ref": "#"}, {"$ref": "#/nowhere"}, {"$ref": "http://x/y"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"const": float("nan")},
])
def test_a_schema_of_no_use_lets_any_json_pass(schema):
    for text in ('{"a": [1, "x", null], "b": {}}', "[]", "true", '"text"', "-1.5e-7"):
        assert passes(value_state(schema), text), text


def test_a_schema_may_contain_itself():
    tree = {"type": "object", "properties": {
        "name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["name"]}
    assert passes(value_state(tree), '{"name": "a", "children": [{"name": "b", "children": []}]}')
    assert refused_at(value_state(tree), '{"name": "a", "children": [{}]}') == \
        '{"name": "a", "children": [{'
    endless = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    json.loads(random_text(random.Random(1), value_state(endless)))  # at some depth it is a null


def laughing(n: int) -> dict:
    """Two references a level: a few lines that stand for 2^n schemas."""
    return {"$ref": "#/$defs/0", "$defs": {
        str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(n)}}


def deep(n: int, key: str) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]} \
            if key == "properties" else {key: [schema, {"type": "null"}]}
    return schema


def wide(n: int) -> dict:
    names = [f"property_{i}" for i in range(n)]
    return {"type": "object", "properties": dict.fromkeys(names, {"type": "integer"}),
            "required": names[:5]}


@pytest.mark.parametrize("schema", [
    deep(400, "properties"), deep(400, "anyOf"), deep(400, "allOf"), wide(3000), laughing(40),
    {"anyOf": [{"type": "object", "properties": {"a": {"const": i}}} for i in range(3000)]},
    {"enum": [f"value {i}" for i in range(3000)]},
    {"type": "array", "minItems": 10 ** 9},
], ids=["deep", "deep anyOf", "deep allOf", "wide", "laughing", "many alternatives", "many values",
        "many items"])
def test_large_schemas_take_less_than_a_second(schema):
    began = time.process_time()
    state = json_call([("f", {"type": "object", "properties": {"x": schema}})], close=b"</c>",
                      array=False, many=False)
    state = state.walk(b'{"name": "f", "arguments": {"x": ')
    for byte in b'{"property_7": 1, "property_8": 2, "':
        possible(state)
        state = state.step(byte) or state
    assert time.process_time() - began < 1


def test_equal_states_are_one_object():
    state = value_state({"type": "array", "items": {"type": "string"}})
    assert state.walk(b'["a') is state.walk(b'["bcd') is state.walk(b'["", "x')
    assert state.walk(b"[") is not state.walk(b'["a"')

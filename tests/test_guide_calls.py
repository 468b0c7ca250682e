"""Whole calls in every shape: what models write passes, and the first wrong byte does not."""
import ast
import json
import random

import pytest

from helpers_guide import READ_PAGE, passes, possible, random_text, refused_at
from tinychat.text.guide import json_call, named_call, python_call, tagged_call

TOOLS = [("read_page", READ_PAGE), ("read", {"type": "object", "properties": {}}),
         ("note", {"type": "object", "properties": {
             "tags": {"type": "array", "items": {"type": "string"}},
             "kind": {"enum": ["todo", "done"]}, "pinned": {"type": "boolean"}}})]

CALL = '{"name": "read_page", "arguments": {"url": "a.example", "lines": 5}}'


def test_json_calls_pass_as_models_write_them():
    state = json_call(TOOLS, close=b"</tool_call>", array=False, many=False)
    assert passes(state, CALL + "</tool_call>")
    assert passes(state, f"\n{CALL}\n</tool_call>")
    assert passes(state, f"{json.dumps(json.loads(CALL), indent=2)}</tool_call>")
    assert passes(state, '{"name":"read","arguments":{}}</tool_call>')
    assert refused_at(state, CALL + "\n{") == CALL + "\n"
    assert refused_at(state, CALL + "</tool_call>\n") == CALL + "</tool_call>"
    assert refused_at(state, '{"name": "reap"') == '{"name": "rea'
    assert refused_at(state, '{"name": "rea"') == '{"name": "rea'
    no_keys = '{"name": "read", "arguments": {'
    assert refused_at(state, no_keys + '"x"') == no_keys
    assert refused_at(state, '{"arguments"') == '{"'
    assert refused_at(state, "[") == ""


def test_json_calls_stand_in_arrays_or_follow_one_another():
    array = json_call(TOOLS, close=b"]!", array=True, many=True)
    assert passes(array, f"[{CALL}]]!") and passes(array, f"[{CALL}, {CALL},\n {CALL}]\n]!")
    assert refused_at(array, "[]") == "["
    one = json_call(TOOLS, close=b"", array=True, many=False)
    assert passes(one, f"[{CALL}]") and refused_at(one, f"[{CALL},") == f"[{CALL}"
    many = json_call(TOOLS, close=b"</c>", array=False, many=True)
    assert passes(many, f"{CALL}\n{CALL}</c>") and passes(many, f"{CALL}; {CALL}, {CALL}</c>")
    bare = json_call(TOOLS, close=b"", array=False, many=False)
    assert passes(bare, CALL) and not possible(bare.walk(CALL.encode()))


def test_json_calls_have_the_keys_of_the_template():
    named = json_call(TOOLS, close=b"", name_key="tool_name", args_key="parameters", array=False,
                      many=False)
    assert passes(named, '{"tool_name": "read", "parameters": {}}')
    single = json_call(TOOLS, close=b"</x>", array=True, many=False, single_key=True)
    assert passes(single, '[{"read_page": {"url": "a"}}]</x>')
    assert refused_at(single, '[{"write') == '[{"'


@pytest.mark.parametrize("schema", [{}, {"type": "string"}, {"$ref": "#/no"}, {"type": "object"}])
def test_arguments_are_an_object_whatever_the_schema_says(schema):
    state = json_call([("f", schema)], close=b"", array=False, many=False)
    assert passes(state, '{"name": "f", "arguments": {"a": 1}}')
    assert refused_at(state, '{"name": "f", "arguments": "a"}') == '{"name": "f", "arguments": '


def test_named_calls_have_the_separator_of_the_template():
    state = named_call(TOOLS, sep=b"[ARGS]", close=b"", bare_keys=None)
    assert passes(state, 'read_page[ARGS]{"url": "a"}') and passes(state, "read[ARGS]{}")
    assert refused_at(state, "reads[") == "read"
    kimi = named_call([("functions.read", {})], sep=":\U0010F000<|args|>".encode(),
                      close=b"<|end|>", bare_keys=None)
    assert passes(kimi, 'functions.read:0<|args|>{"a": [{}]}<|end|>')
    assert passes(kimi, "functions.read:123<|args|>{}\n<|end|>")
    fenced = named_call(TOOLS, sep=b"\n```json\n", close=b"\n```<end>", bare_keys=None)
    assert passes(fenced, "read\n```json\n{}\n```<end>")
    an_id = named_call(TOOLS, sep="[CALL_ID]\U0010F001[ARGS]".encode(), close=b"", bare_keys=None)
    assert passes(an_id, "read[CALL_ID]a1B2c3D4e[ARGS]{}")


def test_bare_keys_take_marked_strings():
    state = named_call(TOOLS, sep=b"", close=b"<end>", bare_keys=b'<|"|>')
    assert passes(state, 'read_page{url:<|"|>a "b" \n <|c<|"|>,lines:1}<end>')
    assert passes(state, 'note{tags:[<|"|>a<|"|>,<|"|><|"|>],kind:<|"|>done<|"|>,pinned:true}<end>')
    assert refused_at(state, 'note{kind:<|"|>do it') == 'note{kind:<|"|>do'
    assert refused_at(state, 'note{"kind') == "note{"
    free = named_call([("f", {})], sep=b"", close=b"", bare_keys=b"<q>")
    assert passes(free, "f{a:1,b_2:{c:<q>x<q>}}") and refused_at(free, "f{:") == "f{"


QWEN = dict(sep=b">\n", key_open=b"<parameter=", key_end=b">\n", val_close=b"\n</parameter>\n",
            close=b"</function>\n</tool_call>")
GLM = dict(sep=b"\n", key_open=b"<arg_key>", key_end=b"</arg_key>\n<arg_value>",
           val_close=b"</arg_value>\n", close=b"</tool_call>")


def test_tagged_strings_are_text_up_to_their_tag_and_the_rest_is_json():
    state = tagged_call(TOOLS, **QWEN)
    assert passes(state, "read_page>\n<parameter=url>\nhttp://a/<b>?\n\"c\"\n</parameter>\n"
                         "<parameter=lines>\n5\n</parameter>\n</function>\n</tool_call>")
    assert passes(state, "read_page><parameter=url>中</</parameter></function></tool_call>")
    assert passes(state, "read>\n</function>\n</tool_call>")
    assert passes(state, 'note>\n<parameter=tags>\n["a"]\n</parameter>\n<parameter=kind>\ntodo\n'
                         "</parameter>\n</function>\n</tool_call>")
    assert refused_at(state, "read_page>\n</function>") == "read_page>\n<"
    assert refused_at(state, "note>\n<parameter=lines") == "note>\n<parameter="
    assert refused_at(state, "note>\n<parameter=kind>\ntodont") == "note>\n<parameter=kind>\ntodo"
    assert refused_at(state, "note>\n<parameter=pinned>\nyes") == "note>\n<parameter=pinned>\n"
    once = "note>\n<parameter=pinned>\ntrue\n</parameter>\n<parameter="
    assert refused_at(state, once + "pinned") == once


def test_tagged_calls_of_other_families():
    glm = tagged_call(TOOLS, **GLM)
    assert passes(glm, "read_page\n<arg_key>url</arg_key>\n<arg_value>a b</arg_value></tool_call>")
    assert passes(tagged_call(TOOLS, **GLM | {"sep": b""}), "read</tool_call>")
    dsml = tagged_call(TOOLS, sep=b'">\n', key_open='<｜p name="'.encode(),
                       key_end='" string="\U0010F002">'.encode(), val_close="</｜p>\n".encode(),
                       close="</｜i>".encode())
    assert passes(dsml, 'read_page">\n<｜p name="url" string="true">a｜b</｜b</｜p>\n'
                        '<｜p name="lines" string="false">3</｜p>\n</｜i>')
    keyed = tagged_call(TOOLS, sep=b">", key_open=b"<", key_end=b">",
                        val_close="</\U0010F003>".encode(), close=b"</x>")
    assert passes(keyed, "read_page><url>a</lines></url><lines>3</lines></x>")
    assert refused_at(keyed, "read_page><lines>3</url>") == "read_page><lines>3</"


def test_tagged_values_of_many_types():
    schema = {"type": "object", "properties": {
        "maybe": {"type": ["string", "null"]}, "any": {}, "mixed": {"enum": ["x", 5]},
        "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}
    state = tagged_call([("f", schema)], **QWEN)

    def with_value(key, value):
        return f"f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"

    for key, value in [("maybe", "text"), ("maybe", "null"), ("any", "t e x t"), ("any", "{}"),
                       ("mixed", "x"), ("mixed", "5"), ("n", "null"), ("n", "-3")]:
        assert passes(state, with_value(key, value)), (key, value)
    for key, value in [("mixed", "6"), ("mixed", '"x"'), ("n", "three"), ("n", "1.5")]:
        assert not passes(state, with_value(key, value)), (key, value)
    free = tagged_call([("f", {"type": "object"})], **QWEN)
    assert passes(free, with_value("whatever", "text"))


def test_python_calls_take_keywords_and_literals():
    state = python_call(TOOLS, close=b"<|end|>")
    for text in ('[read_page(url="a", lines=5)]', "[read_page(url='it\\'s'), read()]", "[read()]",
                 "[note(tags=['a', \"b\"], pinned=True, kind='todo')]", "[note(pinned=false)]"):
        assert passes(state, text + "<|end|>"), text
        ast.parse(text)
    assert refused_at(state, "[]") == "["
    assert refused_at(state, "[read_page(lines=1)") == "[read_page(lines=1"
    assert refused_at(state, '[read_page("a"') == "[read_page("
    assert refused_at(state, "[note(pinned=1") == "[note(pinned="
    free = python_call([("f", {})], close=b"")
    assert passes(free, "[f(a={'x': [1, None]}, b_2='')]") and refused_at(free, "[f(=") == "[f("


def test_names_that_a_dialect_cannot_write_are_not_offered():
    schema = {"type": "object", "properties": {"a-b": {}, "c\nd": {}, "e": {}}, "required": ["a-b"]}
    assert passes(python_call([("f", schema)], close=b""), "[f(e=1)]")
    assert refused_at(python_call([("f", schema)], close=b""), "[f(a-b=1)]") == "[f("
    tagged = tagged_call([("f", schema)], **GLM)
    assert refused_at(tagged, "f<arg_key>c\nd") == "f<arg_key>"
    bare = named_call([("f", schema)], sep=b"", close=b"", bare_keys=b"<q>")
    assert passes(bare, "f{a-b:1,<q>c\nd<q>:2}")


@pytest.mark.parametrize("state", [
    json_call(TOOLS, close=b"</c>", array=False, many=True),
    json_call(TOOLS, close=b"</c>", array=True, many=True),
    named_call(TOOLS, sep=b"[ARGS]", close=b"</c>", bare_keys=None),
    named_call(TOOLS, sep=b"", close=b"</c>", bare_keys=b"<q>"),
    tagged_call(TOOLS, **QWEN), tagged_call(TOOLS, **GLM), python_call(TOOLS, close=b"<|end|>"),
], ids=["json", "array", "named", "bare", "qwen", "glm", "python"])
@pytest.mark.parametrize("seed", range(5))
def test_random_walks_of_every_shape_come_to_an_end(state, seed):
    text = random_text(random.Random(seed), state, marks=(b"</parameter>", b"</arg_value>", b"<q>"))
    assert any(name.encode() in text for name, _ in TOOLS) and text.decode()

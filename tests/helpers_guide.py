"""Random schemas, values of them, a plain checker for both, and random texts of an automaton."""
import json
import random

KINDS = ("string", "integer", "number", "boolean", "null", "array", "object")
PLAIN = b'}])"\'0a:,{['            # of which the structure of a call is made
READ_PAGE = {"type": "object", "required": ["url"],
             "properties": {"url": {"type": "string"}, "lines": {"type": "integer"}}}


def random_schema(rng: random.Random, depth: int = 3) -> dict:
    roll = rng.random()
    if roll < 0.08:
        return {}
    if roll < 0.16:
        return {"enum": rng.sample([1, 12, "a", "ab", "ü", None, True, 2.5, [1, "x"], {"k": 1}], 3)}
    if roll < 0.2:
        return {"const": rng.choice(["x", 7, [1, [2]], {"a": {"b": None}}])}
    if depth and roll < 0.3:
        return {rng.choice(["anyOf", "oneOf"]): [random_schema(rng, depth - 1) for _ in range(2)]}
    if roll < 0.36:
        return {"type": rng.sample(["string", "integer", "null", "boolean"], 2)}
    if depth and roll < 0.42:
        part = _object(rng, depth - 1)
        return {"allOf": [part, {"type": "object", "required": sorted(part["properties"])[:1]}]}
    kind = rng.choice(KINDS if depth else KINDS[:5])
    if kind == "object":
        return _object(rng, depth - 1)
    if kind == "array":
        return _array(rng, depth - 1)
    return {"type": kind}


def _object(rng: random.Random, depth: int) -> dict:
    names = rng.sample(["a", "ab", "b c", "größe", 'qu"ote', "name", "line\nbreak", "👍"], 3)
    schema = {"type": "object",
              "properties": {name: random_schema(rng, max(depth, 0)) for name in names},
              "required": rng.sample(names, rng.randrange(3))}
    if rng.random() < 0.6:
        other = rng.choice([True, False, {"type": "integer"}])
        schema["additionalProperties"] = other
    return schema


def _array(rng: random.Random, depth: int) -> dict:
    schema = {"type": "array", "items": random_schema(rng, max(depth, 0))}
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, 0), random_schema(rng, 0)]
    if rng.random() < 0.3:
        schema["minItems"] = rng.randrange(3)
    return schema


def random_value(rng: random.Random, schema: dict, depth: int = 3):
    """A value that satisfies the schema."""
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else rng.choice(schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return random_value(rng, rng.choice(schema[key]), depth)
    if "allOf" in schema:
        first, second = schema["allOf"]
        required = first["required"] + second["required"]
        return random_value(rng, first | {"required": required}, depth)
    kinds = schema.get("type") or KINDS if depth else schema.get("type") or KINDS[:5]
    kind = kinds if isinstance(kinds, str) else rng.choice(kinds)
    if kind == "object":
        return _random_object(rng, schema, depth)
    if kind == "array":
        first = schema.get("prefixItems", [])
        n = rng.randrange(max(schema.get("minItems", 0), 0), 4)
        items = [*first, *[schema.get("items", {})] * n][:n]
        return [random_value(rng, item, depth - 1) for item in items]
    return {"string": lambda: "".join(rng.choices('aB \\"/\n\t\x01\x7féß中😀<', k=rng.randrange(6))),
            "integer": lambda: rng.randrange(-10 ** 6, 10 ** 12),
            "number": lambda: rng.choice([0, -0.5, 1e-7, 3.25, 1e22, 17, rng.uniform(-9, 9)]),
            "boolean": lambda: rng.random() < 0.5, "null": lambda: None}[kind]()


def _random_object(rng: random.Random, schema: dict, depth: int) -> dict:
    properties, required = schema.get("properties", {}), schema.get("required", ())
    names = [name for name in properties if name in required or rng.random() < 0.5]
    other = schema.get("additionalProperties", "properties" not in schema)
    values = {name: random_value(rng, properties[name], depth - 1) for name in names}
    if other is not False and rng.random() < 0.5:
        inner = other if isinstance(other, dict) else {}
        values |= {name: random_value(rng, inner, depth - 1) for name in ("z", "abc", "names")}
    return dict(rng.sample(sorted(values.items()), len(values)))


def satisfies(value, schema) -> bool:
    """Of the words that an automaton promises: types, enums, keys and items."""
    if not isinstance(schema, dict):
        return schema is not False
    if "allOf" in schema and not all(satisfies(value, part) for part in schema["allOf"]):
        return False
    for key in ("anyOf", "oneOf"):  # of oneOf: at least one
        if key in schema and not any(satisfies(value, part) for part in schema[key]):
            return False
    if "enum" in schema and not any(_same(value, item) for item in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        other = schema.get("additionalProperties", True)
        return set(schema.get("required", ())) <= value.keys() and all(
            satisfies(item, properties.get(key, other)) for key, item in value.items())
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        return len(value) >= schema.get("minItems", 0) and all(
            satisfies(item, first[i] if i < len(first) else schema.get("items", True))
            for i, item in enumerate(value))
    return True


def _same(a, b) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _is(value, kind: str) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, (int, float) if kind == "number" else int) and \
            not isinstance(value, bool)
    return isinstance(value, {"string": str, "boolean": bool, "null": type(None), "array": list,
                              "object": dict}[kind])


def possible(state) -> list[int]:
    found = [byte for byte in range(256) if state.step(byte)]
    assert state.possible == set(found)
    return found


def random_text(rng: random.Random, state, keys: tuple[bytes, ...] = (),
                marks: tuple[bytes, ...] = (), n_wild: int = 60, n_max: int = 5000) -> bytes:
    """Possible bytes, wild for a while, then such as lead to the end: keys that may have to come,
    what leaves least to be written, and the ends of free texts."""
    text = b""
    while not state.done:
        assert len(text) < n_max, f"no end: {text!r}"
        choices = [bytes([byte]) for byte in possible(state)]
        assert choices, f"stuck after {text!r}"
        plain = [byte for byte in choices if byte in PLAIN]
        if len(text) >= n_wild:
            left = {byte: height(state.walk(byte)) for byte in choices}
            least = min(left.values())
            lower = [byte for byte in choices if left[byte] == least < height(state)]
            choices = [key for key in keys if state.walk(key)] or lower or [
                mark for mark in marks if state.walk(mark)] or choices
        elif plain and rng.random() < 0.4:  # or a free string would be wild Unicode and no more
            choices = plain
        text += (chosen := rng.choice(choices))
        state = state.walk(chosen)
    return text


def height(state) -> int:
    """How many things are still to be written, at least."""
    def of(stack) -> int:
        return 0 if stack.node is None else 1 + of(stack.below)
    return min(map(of, state._stacks))


def keys_of(schema) -> tuple[bytes, ...]:
    """The keys of which a schema speaks, as JSON writes them: what is required must be found."""
    if isinstance(schema, list):
        return tuple(key for item in schema for key in keys_of(item))
    if not isinstance(schema, dict):
        return ()
    own = (json.dumps(key).encode() + b":" for key in schema.get("properties", {}))
    return (*own, *keys_of(list(schema.values())))


def passes(state, text: str | bytes) -> bool:
    end = state.walk(text.encode() if isinstance(text, str) else text)
    return end is not None and end.done


def refused_at(state, text: str) -> str:
    """The part of a text that passes, up to the first impossible byte."""
    for i, byte in enumerate(text.encode()):
        if (state := state.step(byte)) is None:
            return text.encode()[:i].decode()
    return text

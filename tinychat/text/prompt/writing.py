"""Calls written as a model writes them, and tools described to a template that knows none."""
import json

from tinychat.text.reply.format import (
    Grammar, JsonCalls, NamedCalls, PythonCalls, TaggedCalls)
from tinychat.text.reply.grammars.tagged import KEY
from tinychat.text.reply.literals import ANY_ID, FREE, NUMBER

_TOOLS_TEXT = """You can use the tools listed below. To use one, write a line with nothing but
{example}
once per call, then stop. The result is given to you in the next message. Answer directly when no \
tool is needed.

Tools:
{tools}"""

Calls = list[tuple[str, dict]]  # (name, arguments)


def tools_text(tools: list[dict], grammar: Grammar) -> str:
    """The definitions for the system text, one tool a line."""
    functions = [tool["function"] for tool in tools]
    lines = [_compact({key: function[key] for key in ("name", "description", "parameters")
                       if key in function}) for function in functions]
    return _TOOLS_TEXT.format(example=_example(grammar), tools="\n".join(lines))


def _example(grammar: Grammar) -> str:
    if isinstance(grammar, JsonCalls):
        name, arguments = grammar.name_key or "name", grammar.arguments_key or "arguments"
        call = f'{{"{name}": "…", "{arguments}": {{…}}}}'
        return grammar.open + (f"[{call}]" if grammar.array else call) + grammar.close
    return written_calls(grammar, [("NAME", {"PARAMETER": "VALUE"})])


def written_calls(grammar: Grammar, calls: Calls) -> str:
    """The text of one or more calls, markers included."""
    if isinstance(grammar, JsonCalls):
        return _json(grammar, calls)
    if isinstance(grammar, PythonCalls):
        inner = ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
                          for name, arguments in calls)
        return f"{grammar.open}[{inner}]{grammar.close}"
    each = [_named(grammar, n, *call) if isinstance(grammar, NamedCalls) else
            _tagged(grammar, n, *call) for n, call in enumerate(calls)]
    return grammar.section_open + "".join(each) + grammar.section_close


def _json(grammar: JsonCalls, calls: Calls) -> str:
    if grammar.name_key:
        objects = [_compact({grammar.name_key: name, grammar.arguments_key: arguments}, ": ", ", ")
                   for name, arguments in calls]
    else:
        objects = [_compact({name: arguments}, ": ", ", ") for name, arguments in calls]
    if grammar.array:
        objects = [f"[{', '.join(objects)}]"]
    return "\n".join(grammar.open + one + grammar.close for one in objects)


def _named(grammar: NamedCalls, n: int, name: str, arguments: dict) -> str:
    text = _bare(arguments, grammar.quote) if grammar.quote else _compact(arguments, ": ", ", ")
    return _filled(grammar.open, n) + name + _filled(grammar.sep, n) + text + grammar.close


def _tagged(grammar: TaggedCalls, n: int, name: str, arguments: dict) -> str:
    pairs = [grammar.key_open + key + grammar.key_end.replace(FREE, "true" if isinstance(value, str)
                                                              else "false")
             + (value if isinstance(value, str) else _compact(value, ": ", ", "))
             + grammar.val_close.replace(KEY, key) for key, value in arguments.items()]
    return _filled(grammar.open, n) + name + _filled(grammar.sep, n) + "".join(pairs) + grammar.close


def _filled(literal: str, n: int) -> str:
    return literal.replace(NUMBER, str(n)).replace(ANY_ID, f"call{n:05d}")


def _bare(value, quote: str) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_bare(item, quote)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_bare(item, quote) for item in value) + "]"
    return f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value)


def _compact(value, colon: str = ":", comma: str = ",") -> str:
    return json.dumps(value, ensure_ascii=False, separators=(comma, colon))

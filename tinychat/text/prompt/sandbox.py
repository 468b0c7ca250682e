"""The jinja2 environment that chat templates are written for, with limits on time and size.

A template is a program from a stranger. jinja2's sandbox keeps it away from the interpreter; what
is added here ends templates that loop for ever or build huge texts: loops and macros watch a clock,
every written text is counted, and operations that multiply a text are judged before they run.

Source: huggingface/transformers: src/transformers/utils/chat_template_utils.py for the environment;
the departures from it are marked below.
"""
import json
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import wraps

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinychat.text.prompt.outside import ALL_MARKS

MAX_CHARS = 16_000_000  # more than the longest context of any model, four characters a token
MAX_COPIED = 2_000_000_000  # by all operations together: what was built before may still be held
MAX_INT_BITS = 10_000
MAX_SECONDS = 10.0

_TO_ESCAPE = re.compile(f"[^\\x00-\\x7e{''.join(ALL_MARKS)}]+")
LIST_METHODS = {"append", "extend", "insert", "pop", "remove"}


# Limits

class Budget:
    """What one rendering may still spend."""

    def __init__(self, seconds: float | None = None):
        self.n_chars = self.n_copied = 0
        self.seconds = MAX_SECONDS if seconds is None else seconds
        self.deadline = time.monotonic() + self.seconds

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"still running after {self.seconds:g} seconds")

    def copy(self, n: int) -> None:
        """Counts the characters or items that an operation is about to put together."""
        self.tick()
        self.n_copied += judged(n)
        if self.n_copied > MAX_COPIED:
            raise SecurityError(f"puts together more than {MAX_COPIED} characters")

    def write(self, n_chars: int) -> None:
        """Counts captured blocks and macros too, else doubling a captured text would go unseen."""
        self.tick()
        self.n_chars = judged(self.n_chars + n_chars)


budget: ContextVar[Budget] = ContextVar("budget")  # of the rendering that this thread is in


def judged(n_chars: int) -> int:
    if n_chars > MAX_CHARS:
        raise SecurityError(f"builds more than {MAX_CHARS} characters")
    return n_chars


def weigh(value) -> int:
    """About how many characters `value` takes written out; a list of itself never ends."""
    n_chars, stack = 0, [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            n_chars += len(part)
        elif isinstance(part, dict):
            stack.extend(part.keys())
            stack.extend(part.values())
        elif isinstance(part, (list, tuple)):
            stack.extend(part)
        n_chars = judged(n_chars + 4)
    return n_chars


def _width(_, width=80, *rest, **named):
    return width if isinstance(width, int) else 0


def _indent(text, width=4, *rest, **named):
    return (1 + text.count("\n")) * (width if isinstance(width, int) else len(width))


def _replace(text, old, new, *rest, **named):
    return text.count(old) * len(new)


def _join(items, separator="", *rest, **named):
    return weigh(items) + len(items) * len(separator)


def _items(items, *rest, **named):
    return 4 * len(items)


def _format(text, *values, **named):
    """Each place may take all values; a width is a number in the text or a value of its own."""
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    if re.search(r"%[^a-zA-Z%]*\*|:[^{}]*\{", text):
        raise SecurityError("takes the width of a format from a value")
    places = 1 + text.count("%") + text.count("{")
    return places * (weigh([values, named]) + max(widths, default=0))


# name of a filter or of a method of str: about how many characters it will make
GROWTH = {
    "center": _width, "ljust": _width, "rjust": _width, "zfill": _width, "batch": _width,
    "slice": _width, "indent": _indent, "replace": _replace, "join": _join, "format": _format,
    "format_map": _format, "string": weigh, "pprint": weigh,
    "list": _items, "sort": _items,
    "expandtabs": lambda text, size=8: text.count("\t") * size,
}


def _judge_growth(name: str, args: list, named: dict) -> None:
    try:
        judged(GROWTH[name](*args, **named))
    except (TypeError, AttributeError):
        pass  # arguments of the wrong kind: the operation itself says so better


def _limited(name: str, function):
    """A filter that is judged first; judging would use an iterator up, so it becomes a list."""
    @wraps(function)  # keeps jinja2's mark for filters that want the context in front
    def call(*args, **named):
        args = [list(arg) if isinstance(arg, Iterator) else arg for arg in args]
        plain = [arg for arg in args if not isinstance(arg, (Context, EvalContext, Environment))]
        _judge_growth(name, plain, named)
        return function(*args, **named)
    return call


class _Generator(CodeGenerator):
    """Compiles a tick into each loop and macro, and passes each text through `finalize`."""

    def visit_For(self, node, frame):
        node.body.insert(0, _tick(node.lineno))
        super().visit_For(node, frame)

    def macro_body(self, node, frame):
        node.body.insert(0, _tick(node.lineno))
        return super().macro_body(node, frame)

    def visit_Output(self, node, frame):
        node.nodes = [nodes.Const(child.data, lineno=child.lineno)
                      if isinstance(child, nodes.TemplateData) else child for child in node.nodes]
        super().visit_Output(node, frame)

    def visit_Concat(self, node, frame):
        self.write("environment.concatenate((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")


def _tick(lineno: int) -> nodes.Node:
    tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
    return nodes.ExprStmt(tick).set_lineno(lineno)


# The environment

class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Attributes with a leading underscore, and changing anything but a list, stay forbidden."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_write,
                         extensions=["jinja2.ext.loopcontrols", Generation])
        for name in GROWTH.keys() & self.filters.keys():
            self.filters[name] = _limited(name, self.filters[name])
        self.filters.update(tojson=_tojson, safe=lambda value: value, from_json=json.loads)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        del self.globals["lipsum"]

    def is_safe_attribute(self, obj, attr, value):
        # departure: templates keep queues in lists; all they can reach are copies
        if isinstance(obj, list) and attr in LIST_METHODS:
            return True
        return super().is_safe_attribute(obj, attr, value)

    def handle_exception(self, source=None):
        # departure: jinja2 builds a traceback of invented frames, a cycle that keeps a failed
        # template's variables until the collector comes; lines are looked up from the real frames
        raise

    def tick(self):
        budget.get().tick()

    def concatenate(self, parts: tuple) -> str:
        budget.get().copy(sum(map(weigh, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context, operator, left, right):
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.get().copy(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _judge_growth("format", [left, right], {})
        elif operator == "*":
            _judge_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _judge_bits(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **named):  # the names leave `self` to templates
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str) and name in GROWTH:
            args = [list(arg) if isinstance(arg, Iterator) else arg for arg in args]
            joins = name == "join" and len(args) == 1
            _judge_growth(name, [args[0], text] if joins else [text, *args], named)
        elif isinstance(text, list) and name == "extend":
            args = [list(arg) if isinstance(arg, Iterator) else arg for arg in args]
            budget.get().copy(len(text) + sum(len(arg) for arg in args if hasattr(arg, "__len__")))
        elif isinstance(text, str) and name == "translate":
            raise SecurityError("str.translate is not available in chat templates")
        return super().call(__context, __obj, *args, **named)


def _judge_product(left, right) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            budget.get().copy(len(value) * times)
    if isinstance(left, int) and isinstance(right, int):
        _judge_bits(left.bit_length() + right.bit_length())


def _judge_bits(n_bits: int) -> None:
    if n_bits > MAX_INT_BITS:
        raise SecurityError(f"computes a number of more than {MAX_INT_BITS} bits")


@pass_context  # also keeps jinja2 from calling it on constants while it compiles
def _write(context, value):
    if not isinstance(value, str):
        weigh(value)
        value = str(value)
    budget.get().write(len(value))
    return value


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Plain JSON, no HTML escaping. Departure: an iterator is written as a list.

    In ASCII too our marks stay as they are: could they be spelled, a text could spell them.
    """
    value = list(value) if isinstance(value, Iterator) else value
    n_chars = weigh(value)
    judged(n_chars * (1 + indent if isinstance(indent, int) else 1))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators,
                      sort_keys=sort_keys, default=_json_default)
    return _TO_ESCAPE.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _json_default(value):
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


class Refusal(TemplateError):
    """The template's own `raise_exception`."""


def _raise_exception(message):
    raise Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks the model's text for training only."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)

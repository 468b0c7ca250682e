"""How a body is read: strict JSON, then checks that each take a path and a value.

Every check raises `InvalidRequest` with the contract's code and the dotted path of the field. A
message names fields, kinds and limits, never the text that a client sent in them.
"""
import json
import math
import re
from collections.abc import Callable
from typing import Any

from tinychat.errors import InvalidRequest

MAX_DEPTH = 100            # nesting of arrays and objects in a body
MAX_INT_DIGITS = 400       # longer integers are read as floats, that is as infinite
MAX_COUNT = 2**31 - 1      # counts without an upper limit end here: no chat is that long

SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no trailing text, at most MAX_DEPTH levels.

    Unpaired surrogate escapes become U+FFFD; of a doubled key the last one counts; numbers too
    large for a float become infinite and fail their field's range.

    Raises: InvalidRequest, code invalid_json.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant,
                           parse_int=_integer_of)
    except UnicodeDecodeError as error:
        raise _invalid_json(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    return _cleaned(value, 0)


def _invalid_json(why: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not JSON: {why}", code="invalid_json")


def _too_deep() -> InvalidRequest:
    return _invalid_json(f"nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str):
    raise _invalid_json(f"{name} is no JSON number")


def _integer_of(digits: str) -> int | float:
    # int() refuses more than 4300 digits with an error of its own, and takes quadratic time.
    return int(digits) if len(digits) <= MAX_INT_DIGITS else float(digits)


def _cleaned(value: Any, depth: int) -> Any:
    """The value without unpaired surrogates, its depth checked."""
    if isinstance(value, str):
        return value if value.isascii() else SURROGATE.sub("\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value
    if depth >= MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, list):
        return [_cleaned(item, depth + 1) for item in value]
    return {_cleaned(name, 0): _cleaned(item, depth + 1) for name, item in value.items()}


# ---- checks: each takes the path and the value, and returns the value as the program wants it -

Check = Callable[[str, Any], Any]

KINDS = ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string"),
         (list, "array"), (dict, "object"), (type(None), "null"))


def kind_of(value: Any) -> str:
    """JSON's name for the type of a parsed value."""
    return next(name for kind, name in KINDS if isinstance(value, kind))


def wrong_type(path: str, expected: str, value: Any) -> InvalidRequest:
    where = f" at `{path}`" if path else ""
    return InvalidRequest(f"expected {expected}, got {kind_of(value)}{where}",
                          code="invalid_type", param=path or None)


def wrong_value(path: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"expected {expected} at `{path}`", code="invalid_value", param=path)


def boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(path, "a boolean", value)
    return value


def string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(path, "a string", value)
    return value


def text(least: int = 1, most: int | None = None, prefix: str = "") -> Check:
    """A string with limits on its length or a fixed beginning."""
    def check(path: str, value: Any) -> str:
        string(path, value)
        if len(value) < least:
            raise wrong_value(path, "a string that is not empty")
        if most is not None and len(value) > most:
            raise wrong_value(path, f"at most {most} characters")
        if not value.startswith(prefix):
            raise wrong_value(path, f"a string that starts with {prefix}")
        return value
    return check


def choice(options: tuple[str, ...]) -> Check:
    def check(path: str, value: Any) -> str:
        if string(path, value) not in options:
            raise wrong_value(path, f"one of {', '.join(options)}")
        return value
    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number from `low` to `high`; with `above`, `low` itself is outside."""
    expected = (f"a number above {low:g} and at most {high:g}" if above
                else f"a number from {low:g} to {high:g}")

    def check(path: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(path, "a number", value)
        if not low <= value <= high or (above and value == low):
            raise wrong_value(path, expected)
        return float(value)
    return check


def integer(low: int, high: int | None = None) -> Check:
    """A whole number, `8000.0` too, of at least `low`; without `high` it is capped at MAX_COUNT."""
    expected = (f"an integer of at least {low}" if high is None
                else f"an integer from {low} to {high}")

    def check(path: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(path, "an integer", value)
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            raise InvalidRequest(f"expected an integer, got a fraction at `{path}`",
                                 code="invalid_type", param=path)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise wrong_value(path, expected)
        return min(int(value), MAX_COUNT)
    return check


def array(of: Check, *, most: int | None = None) -> Check:
    def check(path: str, value: Any) -> tuple:
        if not isinstance(value, list):
            raise wrong_type(path, "an array", value)
        if most is not None and len(value) > most:
            raise wrong_value(path, f"at most {most} entries")
        return tuple(of(f"{path}.{position}", item) for position, item in enumerate(value))
    return check


class Fields:
    """Reads one object's fields in the order of the contract's table; `null` means absent."""

    def __init__(self, path: str, value: Any):
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        self.path, self.value, self.known = path, value, set()

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def optional(self, name: str, check: Check, default: Any = None) -> Any:
        self.known.add(name)
        value = self.value.get(name)
        return default if value is None else check(self.at(name), value)

    def required(self, name: str, check: Check) -> Any:
        if self.value.get(name) is None:
            raise InvalidRequest(f"`{self.at(name)}` is required",
                                 code="missing_required_parameter", param=self.at(name))
        return self.optional(name, check)

    def finish(self):
        """Refuses fields that nobody asked for: at the top the field itself is the param."""
        unknown = [name for name in self.value if name not in self.known]
        if unknown:
            names = ", ".join(repr(name[:60]) for name in unknown[:8])
            raise InvalidRequest(f"Unrecognized key(s) in object: {names}",
                                 code="unrecognized_keys",
                                 param=self.path or unknown[0][:512] or "''")

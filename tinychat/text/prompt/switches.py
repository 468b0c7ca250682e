"""Which settings of `reasoning` a template really supports, found by rendering with each.

A switch changes the prompt: variables of the template (enable_thinking, reasoning_effort, …), or a
word in the system text. Each setting becomes variables; SUFFIX goes to the end of the system text.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tinychat.errors import TemplateError

THINKING = ("enable_thinking", "thinking")  # both names are in use
EFFORTS = ("low", "medium", "high")
EFFORT_NAMES = ("reasoning_effort", "reasoning_strength", "thinking_effort")
EFFORT_OFF = ("none", "no_think")
MODES = "thinking_mode"
MODE_VALUES = {"off": ("disabled", "off"), "on": ("enabled", "on")}
SUFFIX = "system_suffix"
NO_THINK = "/no_think"
_CHAT = [{"role": "user", "content": "Hello"}]
_SYSTEM = "Be brief."


@dataclass(frozen=True)
class Switches:
    """variables: of each setting that the template knows. default: what it does when not asked."""

    default: str | None = None
    variables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def capability(self, opens_reasoning: bool) -> dict[str, Any] | None:
        """The contract's capabilities.reasoning. opens_reasoning: the model thinks anyway."""
        if self.variables:
            options = [option for option in ("off", *EFFORTS, "on") if option in self.variables]
            return {"allowed_options": options, "default": self.default}
        return {"allowed_options": ["on"], "default": "on"} if opens_reasoning else None


def find_switches(render: Callable[[list[dict], dict], str],
                  closes: Callable[[str], bool]) -> Switches:
    """render(messages, variables) -> prompt. closes(prompt): has it ended the reasoning?"""
    return _Search(render, closes).switches()


class _Search:
    def __init__(self, render, closes):
        self._render, self._closes = render, closes
        self.plain = self.shown()

    def shown(self, system: str = "", **variables) -> str | None:
        messages = [{"role": "system", "content": system}] * bool(system) + _CHAT
        try:
            return self._render(messages, variables)
        except TemplateError:
            return None

    def switches(self) -> Switches:
        if self.plain is None:
            return Switches()
        for find in (self._thinking, self._mode, self._budget, self._word):
            found = find()
            if found.variables:
                break
        efforts = self._efforts()
        if not efforts.variables:
            return found
        base = found.variables.get("on", {})
        merged = {option: {**base, **variables}
                  for option, variables in efforts.variables.items()}
        default = found.default if found.default == "off" else efforts.default
        return Switches(default, {**found.variables, **merged})

    def _thinking(self) -> Switches:
        off, on = (dict.fromkeys(THINKING, value) for value in (False, True))
        return self._pair(off, on)

    def _pair(self, off: dict, on: dict) -> Switches:
        shown_off, shown_on = self.shown(**off), self.shown(**on)
        if shown_off == shown_on or None in (shown_off, shown_on):
            return Switches()
        default = "off" if self.plain == shown_off and self.plain != shown_on else "on"
        return Switches(default, {"off": off, "on": on})

    def _mode(self) -> Switches:
        for off, on in zip(*MODE_VALUES.values()):
            found = self._pair({MODES: off}, {MODES: on})
            if found.variables:
                return found
        return Switches()

    def _budget(self) -> Switches:
        shown = self.shown(thinking_budget=0)
        if shown in (None, self.plain):
            return Switches()
        return Switches("on", {"off": {"thinking_budget": 0}, "on": {}})

    def _word(self) -> Switches:
        """A word in the system text that does more than stand there."""
        plain, shown = self.shown(_SYSTEM), self.shown(f"{_SYSTEM} {NO_THINK}")
        if plain is None or shown is None or shown.replace(f" {NO_THINK}", "") == plain:
            return Switches()
        return Switches("on", {"off": {SUFFIX: NO_THINK}, "on": {}})

    def _efforts(self) -> Switches:
        for name in EFFORT_NAMES:
            shown = {value: self.shown(**{name: value}) for value in (*EFFORTS, *EFFORT_OFF)}
            known = {value: text for value, text in shown.items() if text is not None}
            if len({*known.values(), self.plain}) > 1:
                return self._effort_switches(name, known)
        return Switches()

    def _effort_switches(self, name: str, shown: dict[str, str]) -> Switches:
        variables = {value: {name: value} for value in EFFORTS if value in shown}
        off = next((value for value in EFFORT_OFF
                    if value in shown and self._closes(shown[value])
                    and not self._closes(shown.get("high", self.plain))), None)
        if off:
            variables["off"] = {name: off}
        same = [option for option in variables
                if shown[variables[option][name]] == self.plain]
        usual = [option for option in ("medium", "high", "low", "off") if option in same]
        fallback = "medium" if "medium" in variables else next(iter(variables), None)
        return Switches(usual[0] if usual else fallback, variables)

"""What a template does with the parts of a chat, each found out by rendering when first asked."""
import json
import re
from collections.abc import Callable
from functools import cached_property

from tinychat.text.prompt import needles
from tinychat.text.prompt.needles import CONTENT, RESULT, SYSTEM, THOUGHT, TOOLS, VALUES, assistant

_NESTED = {"type": "function", "function": {"name": TOOLS[0], "description": "", "parameters": {
    "type": "object", "properties": {
        "a": {"type": "object", "properties": {"b": {"type": ["string", "null"]}}},
        "c": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "d": {"type": "array", "items": {"type": "object", "properties": {"e": {}}}},
        "f": {"enum": ["x", "y"]}}}}}


class Traits:
    """render(messages, tools, **variables) -> prompt, which raises TemplateError."""

    def __init__(self, render: Callable[..., str]):
        self._render = render

    def _shown(self, *messages: dict, tools=None) -> str:
        return needles.rendered(self._render, *messages, tools=tools, prompt=True)

    @cached_property
    def shows_system(self) -> bool:
        """Gemma 2 raises, some drop it."""
        chat = [{"role": "system", "content": SYSTEM}, needles.QUESTION]
        return SYSTEM in needles.rendered_chat(self._render, chat)

    @cached_property
    def arguments_as_text(self) -> bool:
        """Does it want encoded arguments? Objects come first: many encode a text once more."""
        return not self._shows_call(needles.call(0)) and self._shows_call(
            needles.call(0, '{"Alphakey": "Alphavalue"}'))

    def _shows_call(self, *calls: dict) -> bool:
        shown = self._shown(assistant("", *calls), needles.result(), tools=needles.BOTH_TOOLS)
        return VALUES[0] in (shown or self._shown(assistant("", *calls), tools=needles.BOTH_TOOLS))

    @cached_property
    def shows_calls(self) -> bool:
        return self.arguments_as_text or self._shows_call(needles.call(0))

    def _calls(self, n: int) -> list[dict]:
        calls = [needles.call(i) for i in range(n)]
        if self.arguments_as_text:
            for call in calls:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return calls

    @cached_property
    def shows_tools(self) -> bool:
        shown = self._shown(tools=needles.BOTH_TOOLS)
        return any(name in shown for name in TOOLS)

    @cached_property
    def shows_results(self) -> bool:
        calls = self._calls(1) if self.shows_calls else []
        return RESULT in self._shown(assistant("" if calls else CONTENT, *calls), needles.result(),
                                     tools=needles.BOTH_TOOLS)

    @cached_property
    def result_stands_in_json(self) -> bool:
        """Is a result's text copied unquoted into JSON?"""
        calls = self._calls(1) if self.shows_calls else []
        before, found, after = self._shown(assistant("", *calls), needles.result(),
                                           tools=needles.BOTH_TOOLS).partition(RESULT)
        return bool(found) and bool(re.search(r"[\[{][^\[\]{}]*:\s*\Z|\[\Z|,\s*\Z", before[-200:])) \
            and bool(re.match(r"\s*[,\]}]", after))

    @cached_property
    def parallel_calls(self) -> bool:
        shown = self._shown(assistant("", *self._calls(2)), needles.result(0), needles.result(1),
                            tools=needles.BOTH_TOOLS)
        return VALUES[0] in shown and VALUES[2] in shown

    @cached_property
    def same_role_twice(self) -> bool:
        """Two user messages in a row; some refuse roles that do not alternate."""
        return self._takes([needles.QUESTION, {"role": "user", "content": CONTENT}])

    @cached_property
    def begins_with_assistant(self) -> bool:
        return self._takes([assistant(CONTENT), needles.QUESTION])

    def _takes(self, chat: list[dict]) -> bool:
        """Does it render a chat, if it renders any at all?"""
        return bool(needles.rendered_chat(self._render, chat)) or not self._shown()

    @cached_property
    def any_schema(self) -> bool:
        """Nested objects, unions of types and missing descriptions in a tool's parameters."""
        return TOOLS[0] in self._shown(tools=[_NESTED])

    @cached_property
    def thought_beside_content(self) -> bool:
        """Content, a thought and a call in one message; gpt-oss raises."""
        message = assistant(CONTENT, *self._calls(1), thought=THOUGHT)
        return bool(self._shown(message, needles.result(), tools=needles.BOTH_TOOLS))

"""Small chats with unmistakable words in them, for finding out by rendering what a template does."""
from collections.abc import Callable

from tinychat.errors import TemplateError

USER, CONTENT, THOUGHT, RESULT = "Questionneedle", "Contentneedle", "Thoughtneedle", "Resultneedle"
SYSTEM = "Systemneedle"
TOOLS = ("Alphatool", "Betatool")
KEYS = ("Alphakey", "Betakey")
VALUES = ("Alphavalue", "Betavalue", "Gammavalue")
IDS = ("alphaidxx", "betaidxxx")  # nine letters: two templates demand exactly that

QUESTION = {"role": "user", "content": USER}

Render = Callable[..., str]  # (messages, tools, add_generation_prompt=...) -> prompt, or raises


def tool(name: str) -> dict:
    properties = {key: {"type": "string", "description": "a text"} for key in KEYS}
    return {"type": "function", "function": {
        "name": name, "description": "a tool",
        "parameters": {"type": "object", "properties": properties, "required": [KEYS[0]]}}}


BOTH_TOOLS = [tool(name) for name in TOOLS]


def call(n: int, arguments: dict | str | None = None) -> dict:
    """The n-th call: of the n-th tool, with two texts."""
    if arguments is None:
        arguments = dict(zip(KEYS, VALUES[n:]))
    return {"id": IDS[n], "type": "function",
            "function": {"name": TOOLS[n], "arguments": arguments}}


def assistant(content: str = "", *calls: dict, thought: str = "") -> dict:
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = list(calls)
    if thought:
        message.update(reasoning_content=thought, thinking=thought, reasoning=thought)
    return message


def result(n: int = 0, text: str = RESULT) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": IDS[n], "name": TOOLS[n]}


def rendered(render: Render, *messages: dict, tools: list[dict] | None = None,
             prompt: bool = False, **variables) -> str:
    """The rendering of a chat that begins with the question; "" when the template refuses it."""
    return rendered_chat(render, [QUESTION, *messages], tools, prompt, **variables)


def rendered_chat(render: Render, messages: list[dict], tools: list[dict] | None = None,
                  prompt: bool = True, **variables) -> str:
    try:
        return render(messages, tools, add_generation_prompt=prompt, **variables)
    except TemplateError:
        return ""

"""Messages and tools in the form that all templates understand, and copies of them."""
from tinychat.errors import InvalidRequest, TemplateError


def neutral(message: dict) -> dict:
    """Content is never missing, and reasoning has all of its three names."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"expected a message with a role, got {str(message):.100}",
                             param="messages")
    message = {**message, "content": "" if message.get("content") is None else message["content"]}
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        message.update(thinking=reasoning, reasoning=reasoning)
    return message


def whole_tool(tool: dict) -> dict:
    """Ten templates fail without a description or parameters."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise InvalidRequest(f"expected a tool with a function, got {str(tool):.100}", param="tools")
    function = {"description": "", "parameters": {"type": "object", "properties": {}},
                **tool["function"]}
    return {**tool, "function": function}


def copied(value, change=str):
    """A copy of JSON-like data with each text in it changed, names of properties too."""
    try:
        return _map_texts(value, change)
    except RecursionError:
        raise TemplateError("messages or tools are nested too deeply for a chat template") from None


def _map_texts(value, change):
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, change) for item in value]
    return value

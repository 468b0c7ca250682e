"""What is checked before anything of a chat starts."""
from tinychat.chat.settings import ChatSettings
from tinychat.contract import ChatRequest, ImageItem
from tinychat.errors import InvalidRequest
from tinychat.library import Library, ModelEntry
from tinychat.store import Store, Turn


def find_model(library: Library, request: ChatRequest) -> ModelEntry:
    """The model, which can do what the request asks of it. Raises: TinychatError."""
    entry = library.find(request.model)
    if entry.type != "llm":
        raise InvalidRequest(f"{entry.key} is not a chat model", param="model")
    if not (library.jit or library.expects(entry)):
        raise InvalidRequest(f"{entry.key} is not loaded, and loading on demand is off",
                             code="model_not_loaded", param="model")
    _check_reasoning(entry, request.reasoning)
    if request.context_length and request.context_length > entry.max_context_length:
        raise InvalidRequest(f"{entry.key} has a context of at most {entry.max_context_length}"
                             f" tokens, not {request.context_length}", param="context_length")
    for position, item in enumerate(request.input):
        if isinstance(item, ImageItem) and not entry.capabilities["vision"]:
            raise InvalidRequest(f"{entry.key} cannot see images", param=f"input.{position}")
    return entry


def _check_reasoning(entry: ModelEntry, value: str | None):
    if value is None:
        return
    offered = entry.capabilities.get("reasoning")
    if offered is None:
        raise InvalidRequest(f"{entry.key} does not expose reasoning configuration",
                             param="reasoning")
    if value not in offered["allowed_options"]:
        raise InvalidRequest(f"reasoning {value} is not supported by model {entry.key}; it allows "
                             + ", ".join(offered["allowed_options"]), param="reasoning")


def thread_of(store: Store, request: ChatRequest, entry: ModelEntry) -> list[Turn]:
    """The turns that the request continues."""
    if not request.previous_response_id:
        return []
    turns = store.chain(request.previous_response_id)
    seen = any(isinstance(item, ImageItem) for turn in turns for item in turn.input)
    if seen and not entry.capabilities["vision"]:
        raise InvalidRequest(f"the chat has images, which {entry.key} cannot see",
                             param="previous_response_id")
    return turns


def check_permissions(request: ChatRequest, settings: ChatSettings) -> None:
    """Raises: InvalidRequest for the first integration that is not permitted."""
    for position, integration in enumerate(request.integrations):
        if reason := settings.refusal(integration):
            raise InvalidRequest(reason, code="permission_denied",
                                 param=f"integrations.{position}")

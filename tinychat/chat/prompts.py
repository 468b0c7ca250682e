"""The prompts of one request: the first, and those that go on after tool results."""
import logging
from collections.abc import Callable

from tinychat.chat.round import Prompt, Round
from tinychat.engine.images import PlacedImage
from tinychat.library import LoadedModel
from tinychat.library.sight import Seen
from tinychat.mcp.results import CallResult
from tinychat.mcp.tools import text_for_model

log = logging.getLogger(__name__)

LEAST_RESULT_TOKENS = 64  # that a result may have, however full the context is
CHARS_PER_TOKEN = 8       # at most, of a text worth reading


class Prompts:
    """reasoning: the setting in force; asked: it is the request's own, not the model's default.

    definitions: the tools as functions, empty for none; schemas: by their names there.
    seen: the chat's images, in order.
    """

    def __init__(self, model: LoadedModel, reasoning: str | None, asked: bool,
                 definitions: list[dict], schemas: dict[str, dict], seen: list[Seen] = ()):
        self._model, self._definitions, self._schemas = model, definitions, schemas
        self._seen = seen
        told = asked or reasoning in ("off", "on")  # an effort only when somebody wants it
        self._variables = model.template.switches.variables.get(reasoning, {}) if told else {}
        if definitions and log.isEnabledFor(logging.INFO):
            log.info("%d tools take about %d tokens of the prompt", len(definitions),
                     len(model.tokenizer.encode(str(definitions))))

    def first(self, messages: list[dict]) -> Prompt:
        """Raises: TemplateError."""
        return self._whole(messages, with_tools=True)

    def _whole(self, messages: list[dict], with_tools: bool) -> Prompt:
        model = self._model
        ids, runs = model.template.encode_seen(
            messages, model.tokenizer, [one.layout() for one in self._seen],
            self._tools(with_tools), model.sight.placeholder_id(model.tokenizer) if self._seen
            else 0, **self._variables)
        images = tuple(self._seen[image].placed(part, first) for image, part, first in runs)
        return self._prompt(ids, messages, with_tools, images)

    def _tools(self, with_tools: bool) -> list[dict] | None:
        return self._definitions if with_tools and self._definitions else None

    def _prompt(self, ids: list[int], messages: list[dict], with_tools: bool,
                images: tuple[PlacedImage, ...]) -> Prompt:
        prefill = self._model.template.prefill(messages, self._tools(with_tools),
                                               **self._variables)
        return Prompt(ids, prefill, self._schemas if with_tools else {}, images)

    def following(self, last: Round, messages: list[dict], news: list[dict],
                  with_tools: bool) -> Prompt:
        """The prompt after `news`: the assistant's message of the last round, and the results.

        Where the template only appends to what the model has read and written, its very tokens
        stay, so that nothing but the results is computed. Raises: TemplateError.
        """
        whole = [*messages, *news]
        end = last.end_text
        if with_tools and end and not last.stopped_early:
            tail = self._model.template.tail(messages, news, end, self._model.tokenizer,
                                             self._tools(True), **self._variables)
            if tail is not None:
                return self._prompt([*last.prompt.ids, *last.generated, *tail], whole, True,
                                    last.prompt.images)
        return self._whole(whole, with_tools)

    def reader(self, last: Round, n_ctx: int, n_results: int) -> Callable[[CallResult], str]:
        """What the model reads of a result: each has its share of half of the room that is left."""
        n_left = n_ctx - len(last.prompt.ids) - len(last.generated)
        n_most = max(n_left // 2 // max(n_results, 1), LEAST_RESULT_TOKENS)

        def read(result: CallResult) -> str:
            n_chars = CHARS_PER_TOKEN * n_most
            while True:
                text = text_for_model(result, n_chars)
                n_tokens = len(self._model.tokenizer.encode(text)) if len(text) > n_most else 0
                if n_tokens <= n_most:
                    return text
                n_chars = len(text) * n_most // n_tokens * 9 // 10
        return read

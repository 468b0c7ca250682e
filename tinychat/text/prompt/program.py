"""One compiled chat template: rendering, and the failures of it as errors with a line."""
from functools import cached_property
from traceback import clear_frames
from typing import Any

import jinja2

from tinychat.errors import TemplateError
from tinychat.text.prompt import sandbox


class Program:
    """A template's text, compiled at the first use. source None: the file has none."""

    def __init__(self, source: str | None):
        self.source = source

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.source is None:
            raise TemplateError("the model file has no chat template (tokenizer.chat_template), "
                                "so it cannot chat")
        try:
            return sandbox.ChatEnvironment().from_string(self.source)
        except Exception as error:  # deep nesting ends in errors of Python's own compiler
            raise _template_error(error) from None

    def render(self, context: dict[str, Any], seconds: float | None = None) -> str:
        """Raises: TemplateError."""
        template = self._template
        token = sandbox.budget.set(sandbox.Budget(seconds))
        try:
            return template.render(context)
        except Exception as error:  # a template can raise whatever Python can
            failure = _template_error(error)
            clear_frames(error.__traceback__)  # else its variables would wait for the collector
            raise failure from None
        finally:
            sandbox.budget.reset(token)


def _template_error(error: Exception) -> TemplateError:
    """The template's own words or the failure's, and the line."""
    line, traceback = getattr(error, "lineno", None), error.__traceback__
    while traceback:  # the innermost line of the template counts
        template = traceback.tb_frame.f_globals.get("__jinja_template__")
        if template and traceback.tb_frame.f_code.co_filename == "<template>":
            line = template.get_corresponding_lineno(traceback.tb_lineno)
        traceback = traceback.tb_next
    where = f"line {line} of the chat template" if line else "the chat template"
    if isinstance(error, sandbox.Refusal):
        return TemplateError(f"{where} refuses this conversation: {error}")
    if isinstance(error, RecursionError):
        return TemplateError(f"{where}: recursion without end, or nesting too deep")
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return TemplateError(f"{where}: {kind}{error}")

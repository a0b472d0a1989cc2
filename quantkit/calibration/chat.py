"""Chat templates, rendered in a sandbox with what Transformers offers to them.

The names that a template may use (messages, special tokens, raise_exception, strftime_now,
tojson, loop controls, the generation block) are those of
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Protocol

from quantkit.errors import InputError

TEMPLATE_DATE = date(2025, 1, 1)
"""What a template is told that today is: the same input gives the same tokens on every day."""

THINKING = "enable_thinking"
"""What the templates of models that can think ask for."""


class TemplateRefusalError(ValueError):
    """The template does not accept a conversation (roles out of order, for example)."""


class Render(Protocol):
    """From messages, and the tools that are offered, to text."""

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str: ...


def compile_template(
    template: str,
    special_tokens: Mapping[str, str],
    *,
    generation_prompt: bool = False,
    told: Mapping[str, Any] | None = None,
) -> Render:
    """A function from messages to text; with `generation_prompt` the assistant's turn begins, and
    `told` is what else the template may ask for.

    Raises InputError when the template is not valid Jinja; the function raises
    TemplateRefusalError for messages that the template does not accept.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The generation block marks what the assistant said; the text stays as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateRefusalError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise InputError(
            f"The model's chat template is not valid: {error}.",
            hint="copy chat_template.jinja or tokenizer_config.json of the base model again",
            code="calibration.bad_template",
        ) from error

    def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        try:
            return compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **special_tokens,
                **(told or {}),
            )
        except (TemplateError, TypeError) as error:
            raise TemplateRefusalError(str(error)) from error

    return render


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

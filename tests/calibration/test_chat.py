"""Chat templates render as Transformers renders them, and on every day alike."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.calibration.chat import TemplateRefusalError, compile_template
from quantkit.errors import InputError

TALK = [
    {"role": "user", "content": "Where is <Paris>?"},
    {"role": "assistant", "content": "In France."},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  [{{ m.role }}] {{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{% if tools %}tools{% endif %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers_does(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    more: dict[str, Any] = {"chat_template": template, **SPECIAL}
    rendered: Any = render_jinja_template([TALK], **more)
    assert [compile_template(template, SPECIAL)(TALK)] == rendered[0]


def test_tools_reach_the_template() -> None:
    render = compile_template("{{ tools | tojson }}{{ messages | length }}", SPECIAL)
    assert render(TALK, [{"name": "f"}]) == '[{"name": "f"}]2'
    assert render(TALK) == "null2"


def test_the_date_does_not_change_the_tokens() -> None:
    render = compile_template("{{ strftime_now('%d %B %Y') }}", {})
    assert render(TALK) == "01 January 2025"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_refusal_and_an_escape_are_the_same_error(template: str) -> None:
    with pytest.raises(TemplateRefusalError):
        compile_template(template, {})(TALK)


def test_a_template_that_does_not_parse() -> None:
    with pytest.raises(InputError, match="not valid"):
        compile_template("{% for %}", {})

"""Chat templates: what published ones rely on, refusals, and the sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.errors import CheckpointError, LlmirError, RequestError

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, messages: Any = HELLO, **variables: Any) -> str:
    return ChatTemplate(source=source, special_tokens={"bos_token": "<s>"}).render(messages, **variables)


def test_smollm2_reference(smollm2_path: Path, data_path: Path) -> None:
    template = ChatTemplate(source=GGUFFile(smollm2_path).metadata["tokenizer.chat_template"])
    cases = json.loads((data_path / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]
    chats = [case for case in cases if "user" in case]
    assert len(chats) >= 15
    for case in chats:
        assert template.render([{"role": "user", "content": case["user"]}]) == case["prompt"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>Hello"),
        ("{% for m in messages %}\n    {{ m.role }}\n{% endfor %}", "    user\n"),  # blocks trimmed, as in transformers
        ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
        ("{{ {'a': '<é>', 'b': [1, true]} | tojson }}", '{"a": "<é>", "b": [1, true]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hello!"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is defined }}{{ eos_token is defined }}", "FalseFalse"),
    ],
)
def test_what_templates_rely_on(source: str, expected: str) -> None:
    assert render(source) == expected


def test_variables_and_no_generation_prompt() -> None:
    assert (
        render("{{ tools[0] }}{{ add_generation_prompt }}", tools=["search"], add_generation_prompt=False)
        == "searchFalse"
    )


def test_a_template_may_refuse() -> None:
    with pytest.raises(RequestError, match=r"refuses this conversation: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{{ messages[0].content + 1 }}", "{{ undefined.field }}", "{{ 1 / 0 }}"]
)
def test_broken_templates(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the model's chat template"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_templates_reach_nothing(source: str) -> None:
    """Either an error or an undefined value: nothing of the program shows, and the conversation is not changed."""
    try:
        shown = render(source)
    except CheckpointError:
        shown = ""
    assert shown == "" and HELLO == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "messages", [[], "Hello", {"role": "user"}, ["Hello"], [{"content": "x"}], [{"role": "user"}], [{"role": 1}]]
)
def test_what_is_not_a_conversation(messages: Any) -> None:
    with pytest.raises(LlmirError, match=r"message"):
        render("x", messages)

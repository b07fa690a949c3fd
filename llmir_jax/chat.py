"""Chat templates: a conversation to the text the model was trained on, by Jinja in a sandbox.

Templates come with checkpoints, from anybody, so they run where they can reach nothing of the program; they see what
Hugging Face's templates see: messages, tools, the special tokens, raise_exception, strftime_now, tojson, loop controls.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmir_jax.errors import CheckpointError, RequestError

Messages = Sequence[Mapping[str, Any]]


class _Refused(Exception):
    """The template called raise_exception: the conversation is not one it takes."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A chat template's `source`, and the special tokens it may write (`bos_token`, `eos_token` … by name)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Messages, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text, ending where the assistant is to go on.

        `messages`: mappings with "role" and "content". The template sees `variables` (tools, …) under their names.
        Raises RequestError for a conversation the template refuses, CheckpointError for a template that does not work.
        """
        _check_messages(messages)
        try:
            return (
                _environment()
                .from_string(self.source)
                .render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens, **variables
                )
            )
        except _Refused as refusal:
            raise RequestError(f"the model's chat template refuses this conversation: {refusal}") from None
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the model's chat template, line {error.lineno}: {error.message}") from None
        except Exception as error:  # anything at all can go wrong in somebody else's template
            raise CheckpointError(
                f"the model's chat template failed on this conversation: {type(error).__name__}: {error}"
            ) from None


def _check_messages(messages: Messages) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError('messages must be a non-empty list like [{"role": "user", "content": "Hello"}]')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f'message {i} has no "role"; expected {{"role": "user", "content": "Hello"}}')
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f'message {i}, of role {message["role"]!r}, has no "content"')


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

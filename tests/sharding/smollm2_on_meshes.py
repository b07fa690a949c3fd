"""SmolLM2-135M on meshes of virtual CPU devices, against transformers' greedy outputs; prints the report of each mesh.

python smollm2_on_meshes.py tensor=3 sequence=2 …
"""

import json
import os
import sys
from math import prod
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax

import llmir_jax as llmir
from llmir_jax.checkpoint.smollm2 import fetch_smollm2
from sharding import make_mesh, parse_axes

REFERENCE = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"
NUM_CASES, NUM_TOKENS = 3, 12


def main() -> None:
    cases = json.loads(REFERENCE.read_text())["cases"][:NUM_CASES]
    prompts = [case["prompt_ids"] for case in cases]
    outputs = [case["output_ids"][:NUM_TOKENS] for case in cases]
    loaded = llmir.load(fetch_smollm2())
    params = [llmir.SamplingParams(max_tokens=len(output), ignore_eos=True) for output in outputs]
    for axes in sys.argv[1:]:
        sizes = parse_axes(axes)
        mesh = make_mesh(sizes, devices=jax.devices()[: prod(sizes.values())])
        decoder = loaded.decoder(
            mesh=mesh, max_seq_len=128, num_pages=32, max_seqs=4, buckets=(4, 64), verify=False, burst=0.0
        )
        found = decoder.generate(prompts, params)
        assert found == outputs, (axes, found, outputs)
        print(decoder.report())


if __name__ == "__main__":
    main()

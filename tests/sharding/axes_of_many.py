"""One process of two on loopback, with two devices each: decodes with the small model on several meshes; prints JSON.

python axes_of_many.py PORT NUMBER
"""

import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax
from tiny_llama import PROMPTS, forward, make_model

import llmir_jax as llmir
from llmir_jax import processes
from llmir_jax.errors import LlmirError
from sharding import make_mesh

OPTIONS: dict[str, Any] = {"num_pages": 16, "page_size": 8, "max_seqs": 2, "max_seq_len": 64, "buckets": (8,)}

SAMPLED = ("stages, one a process", "copies in stages of both processes")


def main() -> None:
    processes.join(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
    devices = jax.devices()
    assert [device.process_index for device in devices] == [0, 0, 1, 1]
    across = [devices[i] for i in (0, 2, 1, 3)]  # neighbours are of different processes
    int8 = {"quantize": "int8-g16"}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "copies, one a process": ("data=2,tensor=2", {}),
        "stages, one a process": ("pipeline=2,tensor=2", {"verify": True, **int8}),
        "stages, each of both processes": (make_mesh({"pipeline": 2, "tensor": 2}, devices=across), {}),
        "copies in stages of both processes": (make_mesh({"data": 2, "pipeline": 2}, devices=across), int8),
    }
    jitted, model = llmir.jit(forward), make_model()
    results: dict[str, Any] = {}
    for case, (mesh, options) in cases.items():
        decoder = jitted.decoder(model, mesh=mesh, **{"verify": False, **OPTIONS, **options})
        tokens = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=6))
        results[case] = {"tokens": tokens, "report": str(decoder.report())}
        if case in SAMPLED:  # of a shared seed
            results[case]["drawn"] = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=3, temperature=0.8))
    try:
        jitted.decoder(model, mesh=make_mesh({"tensor": 2}, devices=devices[:2]), verify=False, **OPTIONS)
    except LlmirError as error:
        results["mesh of one process"] = {"error": str(error)}
    print(json.dumps(results), flush=True)
    processes.leave()


if __name__ == "__main__":
    main()

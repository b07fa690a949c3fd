"""One process of several on loopback: decodes with the small model on a mesh of all their devices.

python one_of_many.py PORT COUNT NUMBER AXES MODE     MODE: decode, hang (never ends), old (says another version)
"""

import json
import os
import sys
import time
from typing import Any

os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={8 // int(sys.argv[2])} "
    "--xla_backend_optimization_level=0"  # optimising machine code takes longer than running it here
)
os.environ["LLMIR_NO_CACHE"] = "1"

from tiny_llama import PROMPTS, forward, make_model

import llmir_jax as llmir
from llmir_jax import processes
from llmir_jax.errors import LlmirError

OPTIONS: dict[str, Any] = {"num_pages": 32, "page_size": 8, "max_seqs": 4, "max_seq_len": 64}


def main() -> None:
    port, count, number, axes, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    if mode == "old" and number == count - 1:
        llmir.__version__ = "0.0.1"
    try:
        processes.join(f"127.0.0.1:{port}", count, number)
    except LlmirError as error:
        print(f"llmir: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    is_whole = count == 2  # more processes share the cores: they compile less
    decoder = llmir.jit(forward).decoder(
        make_model(), mesh=axes, **OPTIONS, buckets=(4, 16) if is_whole else (4,), verify=is_whole
    )
    tokens = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=10))
    sampled = None
    if is_whole:
        sampled = decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=4, temperature=0.8))  # of a shared seed
    print(json.dumps({"tokens": tokens, "sampled": sampled, "report": str(decoder.report())}), flush=True)
    while mode == "hang":
        decoder.generate(PROMPTS[:1], llmir.SamplingParams(max_tokens=10))
        time.sleep(0.01)
    processes.leave()


if __name__ == "__main__":
    main()

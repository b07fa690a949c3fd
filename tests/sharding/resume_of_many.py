"""One process of two on loopback, with a device each: decodes with snapshots; prints JSON.

python resume_of_many.py PORT NUMBER FOLDER KILLED     KILLED: the process that dies in the middle, or none
"""

import json
import os
import signal
import sys
from collections.abc import Sequence

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["LLMIR_NO_CACHE"] = "1"

from tiny_llama import PROMPTS, SHALLOW, forward, make_model

import llmir_jax as llmir
from llmir_jax import processes
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.snapshots import Snapshots

PARAMS = [
    llmir.SamplingParams(max_tokens=16),
    llmir.SamplingParams(max_tokens=16, temperature=0.8, seed=3),
    llmir.SamplingParams(max_tokens=2),
]


class Counted(Snapshots):
    """Notes where it has begun, and dies after some calls if it is to."""

    num_calls = 0
    began_at: Sequence[int] = ()
    killed: int | None = None

    def take(self, requests: Sequence[Request]) -> None:
        self.began_at = self.began_at or [request.num_generated for request in requests]
        super().take(requests)
        self.num_calls += 1
        if self.num_calls == 20 and self.killed is not None and processes.is_first() == (self.killed == 0):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    port, number, folder, killed = sys.argv[1:]
    processes.join(f"127.0.0.1:{port}", 2, int(number))
    model, sizes = make_model(config=SHALLOW), {"num_pages": 32, "page_size": 8, "max_seqs": 3, "max_seq_len": 64}
    decoder = llmir.jit(forward).decoder(model, mesh="tensor=2", buckets=(4,), verify=False, **sizes)
    found = {}
    if killed != "none":
        found["whole"] = [output.token_ids for output in decoder.complete(PROMPTS, PARAMS)]
        print(json.dumps(found), flush=True)
    snapshots = Counted(folder, every=0)
    snapshots.killed = None if killed == "none" else int(killed)
    outputs = decoder.engine.generate(PROMPTS, PARAMS, snapshots=snapshots)
    found = {"resumed": [output.token_ids for output in outputs], "began_at": snapshots.began_at}
    print(json.dumps(found), flush=True)
    processes.leave()


if __name__ == "__main__":
    main()

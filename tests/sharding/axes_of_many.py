"""One process of two on loopback, with two devices each: decodes with the small model on several meshes; prints JSON.

python axes_of_many.py PORT NUMBER FOLDER     FOLDER: an orbax checkpoint of a small Llama
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# the least optimization, since programs run for a few steps only
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ["LLMIR_NO_CACHE"] = "1"

import jax
import numpy as np
from tiny_llama import SHALLOW, SHORT, forward, make_model

import llmir_jax as llmir
from llmir_jax import processes
from llmir_jax.checkpoint import orbax_tensors
from llmir_jax.checkpoint.files import StableFile
from llmir_jax.errors import LlmirError
from llmir_jax.quantization import QuantizedArray
from sharding import make_mesh

OPTIONS: dict[str, Any] = {"num_pages": 16, "page_size": 8, "max_seqs": 2, "max_seq_len": 64, "buckets": (8,)}


def compare(step: Any, source: Any) -> int:
    """How many parts of weights this process has; each is that of the weight as it is read whole."""
    num_compared = 0
    for weight in step.weights:
        if isinstance(weight.value, QuantizedArray):
            whole = source.read_quantized(weight.path, weight.value.scheme).laid_out("columns")
            pairs = zip(jax.tree.leaves(weight.value), jax.tree.leaves(whole), strict=True)
        else:
            pairs = iter([(weight.value, source.read(weight.path))])
        for own, all_of_it in pairs:
            for shard in own.addressable_shards if isinstance(own, jax.Array) else ():
                np.testing.assert_array_equal(shard.data, np.asarray(all_of_it)[shard.index])
                num_compared += 1
    return num_compared


def read_from_orbax(folder: str, process: int) -> int:
    """As `compare`, of stages whose processes read one array a call, and not as many of them."""
    orbax_tensors.BATCH_BYTES = 0
    loaded = llmir.load(folder)
    sizes = {"max_seqs": 1, "num_pages": 4, "max_seq_len": 64}
    decoder = loaded.decoder(mesh="pipeline=2,tensor=2", verify=False, **sizes)
    assert [stage.placement.is_here for stage in decoder._step.stages] == [process == 0, process == 1]
    return compare(decoder._step.stages[process], loaded.source)


def read_from_a_file() -> dict[str, Any]:
    """Bytes of weights that this process reads for its half of them, and whether they are those of the whole."""
    num_bytes = [0]
    read = StableFile.read

    def counted(self: StableFile, offset: int, size: int) -> Any:
        num_bytes[0] += size
        return read(self, offset, size)

    StableFile.read = counted  # type: ignore[method-assign]
    pread = os.pread

    def counted_row(file: int, size: int, offset: int) -> bytes:
        num_bytes[0] += size
        return pread(file, size, offset)

    os.pread = counted_row
    loaded = llmir.load(Path(__file__).parents[1] / "data" / "checkpoints" / "llama")
    num_bytes[0] = 0
    decoder = loaded.decoder(mesh="tensor=4", quantize="int8-g4", verify=False, max_seqs=1, num_pages=4, max_seq_len=64)
    taken = num_bytes[0]
    num_compared = compare(decoder._step, loaded.source)
    return {"bytes": taken, "of": num_bytes[0] - taken, "compared": num_compared}


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
    jitted, model = llmir.jit(forward), make_model(config=SHALLOW)
    results: dict[str, Any] = {}
    for case, (mesh, options) in cases.items():
        decoder = jitted.decoder(model, mesh=mesh, **{"verify": False, **OPTIONS, **options})
        tokens = decoder.generate(SHORT, llmir.SamplingParams(max_tokens=4))
        results[case] = {"tokens": tokens, "report": str(decoder.report())}
        if case == "copies in stages of both processes":  # of a shared seed
            results[case]["drawn"] = decoder.generate(SHORT, llmir.SamplingParams(max_tokens=2, temperature=0.8))
    try:
        jitted.decoder(model, mesh=make_mesh({"tensor": 2}, devices=devices[:2]), verify=False, **OPTIONS)
    except LlmirError as error:
        results["mesh of one process"] = {"error": str(error)}
    results["file"] = read_from_a_file()
    results["orbax"] = read_from_orbax(sys.argv[3], int(sys.argv[2]))
    print(json.dumps(results), flush=True)
    processes.leave()


if __name__ == "__main__":
    main()

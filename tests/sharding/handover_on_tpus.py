"""Compiles by libtpu what processes of a slice pass to each other; prints the collectives, how often each, as JSON."""

import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llmir_jax.exchange import Exchange
from llmir_jax.placement import Placement
from llmir_jax.runtime.handover import Handover


def collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(match[1] for match in re.finditer(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    halves = [Mesh(np.array(half), ("tensor",), axis_types=(AxisType.Auto,)) for half in (devices[:8], devices[8:])]
    handover, exchange = Handover(*map(Placement.of, halves)), Exchange(devices)
    residual = jax.ShapeDtypeStruct((2, 64, 8192), jnp.bfloat16, sharding=handover._split)
    words = jax.ShapeDtypeStruct((16, 2000), jnp.int32, sharding=exchange._split)
    found = {
        "processes": len({device.process_index for device in devices}),
        "handover": collectives(handover._send.lower([residual]).compile()),
        "exchange": collectives(exchange._sum.lower(words).compile()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

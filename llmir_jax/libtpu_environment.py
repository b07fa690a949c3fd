"""What libtpu is told where there is no TPU: it then compiles, and looks for nothing."""

import os
import sys

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # else libtpu asks for them, and prints that nobody answers
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_HOST_BOUNDS": "1,1,1",
}


def prepare() -> None:
    """For the process, before JAX is imported; after it, it would be of no use."""
    if "jax" in sys.modules:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

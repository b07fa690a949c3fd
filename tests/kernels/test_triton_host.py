"""Triton's compiler and interpreter, with no GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.triton_host import Interpreter, Launch, compile_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, of the gpu extra (Python 3.12 or later)"
)


def _launch(x: object, y: object, size: int) -> Launch:
    return Launch(
        kernel="triton_example:scale_and_sum",
        updated=(x,),
        operands=(y,),
        outputs=(jax.ShapeDtypeStruct((size,), jnp.float32),),
        grid=(-(-size // 32),),
        constants={"SIZE": size, "FACTOR": 2.0, "BLOCK": 32},
    )


def test_interpreted_kernels_update_and_make_arrays() -> None:
    x = np.arange(45).astype(ml_dtypes.bfloat16)
    y = np.linspace(0, 1, 45, dtype=np.float32)
    with Interpreter() as interpreter:
        doubled, total = interpreter.run(_launch(x, y, 45))
        (again, _) = interpreter.run(_launch(doubled, y, 40))  # the last five are left alone
    assert doubled.dtype == x.dtype
    np.testing.assert_array_equal(doubled.astype(np.float32), 2.0 * np.arange(45))
    np.testing.assert_array_equal(total, np.arange(45, dtype=np.float32) + y)
    np.testing.assert_array_equal(again.astype(np.float32), np.arange(45) * np.where(np.arange(45) < 40, 4.0, 2.0))


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_kernels_compile_to_machine_code(capability: int) -> None:
    size = 45
    shapes = (jax.ShapeDtypeStruct((size,), jnp.bfloat16), jax.ShapeDtypeStruct((size,), jnp.float32))
    binary = compile_for(_launch(*shapes, size), capability)
    assert binary.cubin[:4] == b"\x7fELF"
    assert f".target sm_{capability}" in binary.ptx


def test_dtypes_that_no_kernel_reads_are_named() -> None:
    launch = _launch(np.zeros(4, np.float64), np.zeros(4, np.float32), 4)
    with pytest.raises(ValueError, match="got float64"):
        compile_for(launch, 80)

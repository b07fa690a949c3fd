"""Adds up what a step keeps on each device of a mesh, and refuses what cannot fit.

    module attributes {llmir.device_bytes = 1234 : i64}

Parameters and pages count by their shards, with all their copies; activations come and go, and are not in it. Runs
after ``model-partitioning`` and ``kv-cache-sharding``, before anything is put on a device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from jax.sharding import AbstractMesh
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, IntegerType, ModuleOp, TensorType, i64
from xdsl.ir import Attribute
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.errors import LlmirError
from llmir_jax.transforms import signature
from llmir_jax.transforms.sharding_attributes import Spec, mesh_of, of_argument, split_of

DEVICE_BYTES = "llmir.device_bytes"


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes that a step keeps on each device."""

    parameters: int
    cache: int

    @property
    def total(self) -> int:
        return self.parameters + self.cache


def parts_of(kind: Attribute, spec: Spec) -> Iterator[tuple[TensorType, Spec]]:
    """The tensors that hold a value of a type, each with where it lives."""
    if not isinstance(kind, llm.QuantizedTensorType):
        assert isinstance(kind, TensorType)
        yield kind, spec
        return
    shape = kind.get_shape()
    for part in kind.parts():
        own = part.get_shape()
        sizes = own[::-1] if kind.in_columns else own
        # What is one for several is whole everywhere: a scale for all inputs, or for all rows.
        specs = tuple(
            axes if size > 1 or whole == 1 else () for axes, size, whole in zip(spec, sizes, shape, strict=True)
        )
        yield part, specs[::-1] if kind.in_columns else specs


def stored_bytes(kind: Attribute) -> int:
    """Of the whole of a value of a type."""
    assert isinstance(kind, TensorType | llm.QuantizedTensorType)
    parts = parts_of(kind, ((),) * len(kind.get_shape()))
    return sum(part_bytes(part) for part, _ in parts)


def part_bytes(part: TensorType) -> int:
    """Of a tensor, where a device packs what is narrower than a byte."""
    kind = part.element_type
    num_elements: int = prod(part.get_shape())
    if isinstance(kind, IntegerType) and kind.width.data == 4:
        return num_elements // 2
    return num_elements * element_dtype(kind).itemsize


def device_memory(module: ModuleOp, mesh: AbstractMesh) -> DeviceMemory:
    """What a step that is partitioned keeps on each device of a mesh."""
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    found = {"parameters": 0, "cache": 0}
    pages = {arg for role in ("k_pages", "v_pages") for arg in signature.arguments(main, role)}
    for arg in (*(arg for arg, _ in signature.parameter_paths(main)), *pages):
        spec = of_argument(attributes[arg.index])
        rank = len(arg.type.get_shape()) if isinstance(arg.type, TensorType | llm.QuantizedTensorType) else 0
        for part, own in parts_of(arg.type, spec if spec is not None else ((),) * rank):
            split = prod(split_of(own, dim, mesh) for dim in range(len(own)))
            found["cache" if arg in pages else "parameters"] += part_bytes(part) // split
    return DeviceMemory(**found)


@dataclass(frozen=True)
class MemoryPlanningPass(ModulePass):
    """Bytes a device of a `mesh`; an error if they are more than `device_bytes`, unless that is 0."""

    name = "memory-planning"

    mesh: str
    device_bytes: int = 0

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        mesh = mesh_of(self.mesh)
        needed = device_memory(op, mesh)
        op.attributes[DEVICE_BYTES] = IntegerAttr(needed.total, i64)
        if self.device_bytes and needed.total > self.device_bytes:
            raise LlmirError(
                f"mesh: {self.mesh.replace(',', ', ')} needs {_gib(needed.total)} on each device, "
                f"{_gib(needed.parameters)} of parameters and {_gib(needed.cache)} of KV cache, but a device has "
                f"{_gib(self.device_bytes)}: use more devices, quantize, or lower num_pages"
            )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

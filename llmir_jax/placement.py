"""A mesh that a decoder runs on: what passes are told of it, and how arrays get there.

Host arrays are whole in every process, and each puts on its own devices what belongs there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from llmir_jax.errors import LlmirError
from llmir_jax.transforms.sharding_attributes import Spec, mesh_text, partition_spec
from sharding.errors import ShardingError
from sharding.mesh import AXES, check_axes, describe, make_mesh, parse_axes, split_for_kv_heads
from sharding.rules import Rule, parse_rules

T = TypeVar("T")
MeshOption = Mesh | str | Mapping[str, int] | None
"""What the option `mesh` takes: a mesh, "tensor=3,pipeline=2", {"tensor": 3, "pipeline": 2}, or "auto"."""


def as_mesh(option: MeshOption) -> Mesh | None:
    """The mesh that is meant, with Auto axes. Raises LlmirError for axes that are none or do not match the devices."""
    sizes = check_mesh(option)
    if sizes is None:
        return None
    devices = None
    if isinstance(option, Mesh):
        order = [option.axis_names.index(name) for name in AXES if name in sizes]
        devices = list(option.devices.transpose(order).flat)
    try:
        return make_mesh(sizes, devices=devices)
    except ShardingError as error:
        raise LlmirError(str(error)) from None


def check_mesh(option: MeshOption) -> dict[str, int] | None:
    """Sizes by axis of the mesh that is meant. Raises LlmirError for axes that do not exist."""
    if option is None or option == "auto":  # which `auto_mesh` decides later
        return None
    if not isinstance(option, Mesh | str | Mapping):
        raise LlmirError(f"mesh: expected a jax.sharding.Mesh, axes such as 'tensor=3', or None, got {option!r}")
    try:
        if isinstance(option, str):
            return parse_axes(option)
        sizes = dict(option.shape if isinstance(option, Mesh) else option)
        check_axes(sizes)
    except ShardingError as error:
        raise LlmirError(str(error)) from None
    return sizes


def processes_of(*meshes: Mesh) -> list[int]:
    """Those that have devices of the meshes, rising."""
    return sorted({device.process_index for mesh in meshes for device in mesh.devices.flat})


def run_in_turn(*meshes: Mesh) -> bool:
    """Whether programs on these devices must end before the next begins: on CPUs of several processes.

    XLA has a few threads for all programs, which wait for other processes, and gloo's messages have no names: two
    at once take each other's threads or messages. Accelerators run what is launched in its order.
    """
    return len(processes_of(*meshes)) > 1 and meshes[0].devices.flat[0].platform == "cpu"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the arrays of a step live."""

    mesh: Mesh
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: Mapping[str, Any] | None = None) -> "Placement":
        """On a mesh, by a user's rules before the default ones. Raises LlmirError for what is no rule."""
        try:
            return cls(mesh=mesh, rules=parse_rules(rules))
        except ShardingError as error:
            raise LlmirError(str(error)) from None

    def for_heads(self, num_heads: int, num_kv_heads: int) -> "Placement":
        """With `tensor` in two where it has more devices than there are KV heads. Raises LlmirError if it cannot be."""
        try:
            return Placement(mesh=split_for_kv_heads(self.mesh, num_heads, num_kv_heads), rules=self.rules)
        except ShardingError as error:
            raise LlmirError(str(error)) from None

    def on(self, mesh: Mesh) -> "Placement":
        """The same on a mesh of other devices, of the axes that this one had at first."""
        like = self.mesh
        moved = Mesh(mesh.devices.reshape(like.devices.shape), like.axis_names, axis_types=like.axis_types)
        return Placement(mesh=moved, rules=self.rules)

    @property
    def text(self) -> str:
        """The mesh as passes take it."""
        return mesh_text(dict(self.mesh.shape))

    def __str__(self) -> str:
        return describe(self.mesh)

    @property
    def device_bytes(self) -> int:
        """Memory of a device, as far as it says so; 0 where it does not."""
        own = [device for device in self.mesh.devices.reshape(-1) if device.process_index == jax.process_index()]
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in own]
        return min(limits, default=0)

    @property
    def is_local(self) -> bool:
        """Whether all of its devices are this process's."""
        return self.processes == [jax.process_index()]

    @property
    def is_here(self) -> bool:
        """Whether some of its devices are this process's."""
        return jax.process_index() in self.processes

    @property
    def processes(self) -> list[int]:
        """Those that have its devices, rising."""
        return processes_of(self.mesh)

    def sharding(self, spec: Spec = ()) -> NamedSharding:
        """As JAX takes it; without a spec, whole on every device."""
        return NamedSharding(self.mesh, partition_spec(spec) if spec else PartitionSpec())

    def put(self, array: Any, spec: Spec = ()) -> jax.Array:
        """An array that every process has, where it is to live."""
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, self.sharding(spec), lambda index: host[index])

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, spec: Spec = ()) -> jax.Array:
        """Zeros where they are to live; no process has all of them."""

        def shard(index: Any) -> np.ndarray[Any, Any]:
            sizes = [len(range(*own.indices(size))) for own, size in zip(index, shape, strict=True)]
            return np.zeros(sizes, dtype)

        return jax.make_array_from_callback(shape, self.sharding(spec), shard)

    def constrain(self, array: jax.Array, spec: Spec = ()) -> jax.Array:
        """The traced array, where it is to live."""
        constrained: jax.Array = jax.lax.with_sharding_constraint(array, self.sharding(spec))
        return constrained

    def on_each(self, fn: Callable[..., T]) -> Callable[..., T]:
        """The traceable function, computed by every device of whole arrays."""
        mapped: Callable[..., T] = jax.shard_map(
            fn, mesh=self.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
        return mapped

    def to_host(self, array: jax.Array) -> np.ndarray[Any, Any]:
        """All of an array, in every process."""
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        whole = jax.jit(lambda x: x, out_shardings=self.sharding())(array)
        return np.asarray(whole)

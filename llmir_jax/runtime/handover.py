"""Hands arrays from the devices of one stage of a pipeline to those of the next, which may be of other processes.

Within one process they are copied. Between processes each device of a stage sends to the one in its place in the next:
a collective-permute over both stages' devices, which every process that has some of them calls.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmir_jax.placement import Placement, run_in_turn

_STAGE, _PLACE = "stage", "place"


class Handover:
    """From the devices of `source` to those of `target`, as many; on each of them the arrays are whole."""

    def __init__(self, source: Placement, target: Placement) -> None:
        self._source, self._target = source, target
        self.is_here = source.is_here or target.is_here
        """Whether this process takes part in it."""
        self._is_local = source.is_local and target.is_local
        self._in_turn = run_in_turn(source.mesh, target.mesh)
        pairs = np.stack([source.mesh.devices.reshape(-1), target.mesh.devices.reshape(-1)])
        mesh = Mesh(pairs, (_STAGE, _PLACE), axis_types=(AxisType.Auto,) * 2)
        spec = PartitionSpec(_STAGE)
        self._split = NamedSharding(mesh, spec)
        self._send = jax.jit(jax.shard_map(self._trace_send, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        self._own_devices = [device for device in pairs.flat if device.process_index == jax.process_index()]
        self._zeros: dict[tuple[tuple[int, ...], str, jax.Device], jax.Array] = {}

    def __call__(self, arrays: Sequence[jax.Array], like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """The arrays, of one dimension and more, on the devices of `target`.

        Args:
            arrays: on those of `source`; none where this process has none of these.
            like: shapes and dtypes of the arrays; not needed where it has some of those of `source`.

        Returns:
            None of them where this process has no device of `target`.
        """
        if self._is_local:
            return [jax.device_put(array, self._target.sharding()) for array in arrays]
        if self._source.is_here:
            like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        every: Sequence[jax.Array | None] = arrays or [None] * len(like)
        sent = self._send([self._joined(array, own) for array, own in zip(every, like, strict=True)])
        if self._in_turn:
            jax.block_until_ready(sent)
        if not self._target.is_here:
            return []
        return [self._arrived(array, own) for array, own in zip(sent, like, strict=True)]

    @staticmethod
    def _trace_send(arrays: list[jax.Array]) -> list[jax.Array]:
        return [lax.ppermute(array, _STAGE, [(0, 1)]) for array in arrays]

    def _joined(self, array: jax.Array | None, like: jax.ShapeDtypeStruct) -> jax.Array:
        """The array and, where it is to arrive, zeros in its place, one after the other along the first dimension."""
        parts = {} if array is None else {shard.device: shard.data for shard in array.addressable_shards}
        shards = [parts[device] if device in parts else self._zeros_on(device, like) for device in self._own_devices]
        shape = (2 * like.shape[0], *like.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._split, shards)

    def _arrived(self, sent: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        parts = {shard.device: shard.data for shard in sent.addressable_shards}
        own = [parts[device] for device in self._target.mesh.devices.flat if device in parts]
        return jax.make_array_from_single_device_arrays(like.shape, self._target.sharding(), own)

    def _zeros_on(self, device: jax.Device, like: jax.ShapeDtypeStruct) -> jax.Array:
        key = like.shape, np.dtype(like.dtype).name, device
        if key not in self._zeros:
            self._zeros[key] = jax.device_put(jnp.zeros(like.shape, like.dtype), device)
        return self._zeros[key]


__all__ = ["Handover"]

"""What one process has on its host, on the hosts of several: a sum over their devices of bits, all but one's zeros."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = np.ndarray[Any, Any]
_AXIS = "device"


class Exchange:
    """Between the processes that have these devices; each of them makes the same calls, in the same order."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        whole = NamedSharding(mesh, PartitionSpec())
        self._sum = jax.jit(lambda x: x.sum(0, dtype=x.dtype), out_shardings=whole)
        self._own = [device for device in devices if device.process_index == jax.process_index()]
        self._num_devices = len(devices)

    def merged(self, own: Array) -> Array:
        """What processes have between them, bit for bit.

        Each gives an array of the same shape and dtype, and has zeros where another has values.
        """
        values = np.ascontiguousarray(own).reshape(-1)
        words = np.zeros((1, -(-own.nbytes // 4)), np.int32)  # what all backends can sum
        words.view(np.uint8)[0, : own.nbytes] = values.view(np.uint8)
        zeros = np.zeros_like(words)
        shards = [jax.device_put(words if at == 0 else zeros, device) for at, device in enumerate(self._own)]
        shape = (self._num_devices, words.shape[1])
        total = self._sum(jax.make_array_from_single_device_arrays(shape, self._split, shards))
        merged: Array = np.asarray(total).view(np.uint8)[: own.nbytes].view(own.dtype).reshape(own.shape)
        return merged

    def shared(self, values: Array | None, like: jax.ShapeDtypeStruct) -> Array:
        """What one of the processes gives, in all of them; the others give None, and what it is like."""
        return self.merged(np.zeros(like.shape, like.dtype) if values is None else values)


__all__ = ["Exchange"]

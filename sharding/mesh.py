"""Meshes by name, for one process or many.

    make_mesh(parse_axes("tensor=3,pipeline=2"))      six devices, axes ("pipeline", "tensor")

Axes are laid out in the order of `AXES`: the last one, `tensor`, which talks most, is between devices that are next to
each other. They are of type Auto, which leaves where values live to the compiler; `jax.make_mesh` makes Explicit ones.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.errors import ShardingError

DATA, PIPELINE, SEQUENCE, EXPERT, TENSOR = AXES = ("data", "pipeline", "sequence", "expert", "tensor")
"""Replicas of the model; runs of its layers; tokens of the cache; experts of a mixture; heads, columns and rows."""
TENSOR_COPIES = "tensor_copies"
"""The inner part of `tensor` where there are more devices than KV heads: each head is on so many of them."""


def parse_axes(text: str) -> dict[str, int]:
    """Sizes by axis of "tensor=3,pipeline=2". Raises ShardingError for what is no axis or no size."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdecimal():
            raise ShardingError(f"mesh: expected axis=size, such as tensor=4 or tensor=3,pipeline=2, got {part!r}")
        if name in sizes:
            raise ShardingError(f"mesh: axis {name!r} is given twice in {text!r}")
        sizes[name] = int(size)
    check_axes(sizes)
    return sizes


def check_axes(sizes: Mapping[str, int]) -> None:
    """Raises ShardingError for axes that are not in `AXES`, and for sizes below 1."""
    for name, size in sizes.items():
        if name not in AXES:
            raise ShardingError(f"mesh: there is no axis {name!r}; the axes are {', '.join(AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShardingError(f"mesh: axis {name!r} must have a size of at least 1, got {size!r}")


def make_mesh(axes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these axes over all devices, those of other processes too, or over `devices`.

    The axes are laid out in the order of `AXES`, whatever theirs is.

    Args:
        axes: size by name; the product is the number of devices. Axes that are left out are not in the mesh.
        devices: as many as the axes' sizes make; None for all that JAX has.

    Raises:
        ShardingError: an axis that does not exist, or sizes whose product is not the number of devices.
    """
    check_axes(axes)
    found = list(jax.devices() if devices is None else devices)
    sizes = {name: axes[name] for name in AXES if name in axes}
    wanted = math.prod(sizes.values())
    if wanted != len(found):
        product = " × ".join(f"{name} {size}" for name, size in sizes.items()) or "no axis"
        where = f"JAX has {len(found)} ({found[0].platform})" if devices is None else f"{len(found)} were given"
        raise ShardingError(f"mesh: {product} needs {_count(wanted)}, but {where}; change the sizes or the devices")
    names, shape = tuple(sizes), tuple(sizes.values())
    types = (AxisType.Auto,) * len(names)
    if devices is None and found[0].platform != "cpu":
        return jax.make_mesh(shape, names, axis_types=types)  # follows the links of the topology
    return Mesh(np.array(found).reshape(shape), names, axis_types=types)


def axis_size(mesh: Mesh, name: str) -> int:
    """The size of an axis, 1 if the mesh does not have it. `tensor` counts its copies too."""
    sizes: dict[str, int] = dict(mesh.shape)
    return sizes.get(name, 1) * (sizes.get(TENSOR_COPIES, 1) if name == TENSOR else 1)


def describe(mesh: Mesh) -> str:
    """The mesh in words: "tensor 3 × sequence 2 on 6 cpu devices of 2 processes"."""
    devices = mesh.devices.reshape(-1)
    axes = [(name, axis_size(mesh, name)) for name in mesh.axis_names if name != TENSOR_COPIES]
    processes = {device.process_index for device in devices}
    text = " × ".join(f"{name} {size}" for name, size in axes) or "one device"
    of = f" of {len(processes)} processes" if len(processes) > 1 else ""
    return f"{text} on {len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}{of}"


def sub_meshes(mesh: Mesh, name: str) -> tuple[Mesh, ...]:
    """The mesh cut along an axis: one mesh without it for each of its places; the mesh itself if it is not there."""
    if name not in mesh.axis_names:
        return (mesh,)
    along = mesh.axis_names.index(name)
    names = tuple(axis for axis in mesh.axis_names if axis != name)
    types = tuple(kind for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if axis != name)
    parts = np.moveaxis(mesh.devices, along, 0)
    if not names:  # a mesh needs an axis
        return tuple(Mesh(np.array([part]), (TENSOR,), axis_types=(AxisType.Auto,)) for part in parts)
    return tuple(Mesh(part, names, axis_types=types) for part in parts)


def split_for_kv_heads(mesh: Mesh, num_heads: int, num_kv_heads: int) -> Mesh:
    """The mesh with `tensor` in two where there are fewer KV heads than devices along it: heads, then their copies.

    Raises:
        ShardingError: query heads that cannot be shared out, or KV heads that neither divide the devices nor can be
            divided over them.
    """
    size = axis_size(mesh, TENSOR)
    check_heads(size, num_heads, num_kv_heads)
    if num_kv_heads % size == 0 or TENSOR_COPIES in mesh.axis_names:
        return mesh
    along = mesh.axis_names.index(TENSOR)
    shape, names, types = list(mesh.devices.shape), list(mesh.axis_names), list(mesh.axis_types)
    shape[along : along + 1] = [num_kv_heads, size // num_kv_heads]
    names.insert(along + 1, TENSOR_COPIES)
    types.insert(along + 1, types[along])
    return Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=tuple(types))


def check_heads(size: int, num_heads: int, num_kv_heads: int) -> None:
    """Raises ShardingError for heads that cannot be shared out over so many devices along `tensor`."""
    fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and kv_heads_fit(num_kv_heads, n)]
    if num_heads % size:
        raise ShardingError(
            f"mesh: {num_heads} heads cannot be divided over tensor = {size}; it can be {_listed(fitting)}"
        )
    if not kv_heads_fit(num_kv_heads, size):
        raise ShardingError(
            f"mesh: {num_kv_heads} KV heads neither divide tensor = {size} nor are divided by it; "
            f"it can be {_listed(fitting)}"
        )


def kv_heads_fit(num_kv_heads: int, size: int) -> bool:
    """Whether each of `size` devices can have the same number of KV heads, some of them copies of another's."""
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


def _count(number: int) -> str:
    return f"{number} device{'' if number == 1 else 's'}"


def _listed(numbers: Sequence[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last

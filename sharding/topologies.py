"""Slices of accelerators by name: their chips, hosts, and the links between them.

    topology("v5e:4x4")      16 chips of TPU v5e on 4 hosts, a 4 × 4 mesh of links
    topology("v5p:4x4x4")    64 chips of TPU v5p, a 3D torus
    topology("h100:2x8")     two servers of eight NVIDIA H100s

What a chip does is in `pallas_kernels.chips`; here is what is between chips. Figures are the vendors' own, so that
rooflines made of them are what no program exceeds, not what one reaches. Bandwidths are in one direction.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from pallas_kernels.chips import Chip, UnknownChipError, chip_named, chip_of
from sharding.errors import ShardingError

HOP_SECONDS = 1e-6
"""From a chip to its neighbour, about: https://jax-ml.github.io/scaling-book/sharding, on collectives of few bytes."""


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What is between chips of a kind."""

    link_bandwidth: float
    """Bytes a second: of one link of a TPU, of all links of a GPU to its server's others."""
    network_bandwidth: float
    """Bytes a second and chip, between slices or servers."""
    chips_per_host: int
    num_dims: int = 0
    """Dimensions of the mesh of links; 0 for GPUs, each of which reaches all others of its server."""
    source: str


def _tpu(chip: float, network: float, num_dims: int, page: str) -> Interconnect:
    """Of the bidirectional figure of a chip in bytes, which has two links a dimension, and of its network's in bits."""
    return Interconnect(
        link_bandwidth=chip / (4 * num_dims),
        network_bandwidth=network / 8,
        chips_per_host=4,
        num_dims=num_dims,
        source=f"https://docs.cloud.google.com/tpu/docs/{page}",
    )


def _gpu(link: float, network: float, source: str, *, chips_per_host: int = 8) -> Interconnect:
    return Interconnect(link_bandwidth=link, network_bandwidth=network, chips_per_host=chips_per_host, source=source)


INTERCONNECTS: Mapping[str, Interconnect] = {
    "v5e": _tpu(400e9, 6.4e12 / 256, 2, "v5e"),
    "v6e": _tpu(800e9, 100e9, 2, "v6e"),
    "v5p": _tpu(1200e9, 50e9, 3, "v5p"),
    "tpu7x": _tpu(1200e9, 100e9, 3, "tpu7x"),
    "a100-40gb": _gpu(300e9, 25e9, "NVLink 3 of the NVIDIA A100 datasheet; 8 × 200 Gbit/s of a DGX A100"),
    "a100-80gb": _gpu(300e9, 25e9, "NVLink 3 of the NVIDIA A100 datasheet; 8 × 200 Gbit/s of a DGX A100"),
    "h100": _gpu(450e9, 50e9, "NVLink 4 of the NVIDIA H100 datasheet; 8 × 400 Gbit/s of a DGX H100"),
    "h200": _gpu(450e9, 50e9, "NVLink 4 of the NVIDIA H200 datasheet; 8 × 400 Gbit/s of a DGX H200"),
    "b200": _gpu(900e9, 50e9, "NVLink 5 of the NVIDIA DGX B200 datasheet; its 8 × 400 Gbit/s"),
    "l4": _gpu(32e9, 12.5e9, "PCIe 4.0 x16 of the NVIDIA L4 datasheet; 100 Gbit/s of Google Cloud's g2-standard-96"),
    "t4": _gpu(
        16e9, 12.5e9, "PCIe 3.0 x16 of the NVIDIA T4 datasheet; 100 Gbit/s of Google Cloud's n1", chips_per_host=4
    ),
}
"""By the name of the chip."""

_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST = 32  # chips along a dimension of a 3D slice


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice. Devices are JAX's; figures are of one of them."""

    name: str
    chip: Chip
    interconnect: Interconnect
    shape: tuple[int, ...]
    """Of a TPU slice, chips along each dimension; of GPUs, servers and GPUs a server."""

    @property
    def num_chips(self) -> int:
        """Of the slice."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """That JAX has."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def num_hosts(self) -> int:
        """Machines, each of which runs one process."""
        if not self.interconnect.num_dims:
            return self.shape[0]
        # Up to 8 chips of v5e and v6e are one machine.
        per_host = 8 if self.interconnect.num_dims == 2 and self.num_chips <= 8 else self.interconnect.chips_per_host
        return -(-self.num_chips // per_host)

    @property
    def device(self) -> Chip:
        """The share of a chip that one device is."""
        return self.chip.per_device

    @property
    def peak_flops(self) -> float:
        """Of a device, in the 16-bit floats that it has: additions and multiplications a second."""
        peaks = self.device.peak_flops
        return next(peaks[dtype] for dtype in ("bfloat16", "float16") if dtype in peaks)

    def wraps(self, dim: int) -> bool:
        """Whether the chips along a dimension are a ring: 16 of them in 2D, whole cubes of 4 × 4 × 4 in 3D."""
        if self.interconnect.num_dims == 2:
            return self.shape[dim] == 16
        return self.interconnect.num_dims == 3 and all(size % 4 == 0 for size in self.shape)

    def __str__(self) -> str:
        chips = f"{self.num_chips} {self.chip.name} chip{'s' if self.num_chips > 1 else ''}"
        return f"{self.name}: {chips} on {self.num_hosts} host{'s' if self.num_hosts > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class Links:
    """What a group of devices of a mesh axis has to talk over."""

    size: int
    bandwidth: float
    """Bytes a second that a device sends, in all directions that a ring of the group uses."""
    hops: int
    """From a device to the farthest of its group."""

    def all_reduce_seconds(self, num_bytes: float) -> float:
        """Of an array of so many bytes on each device: a reduce-scatter and an all-gather."""
        return 2 * self.all_gather_seconds(num_bytes)

    def all_gather_seconds(self, num_bytes: float) -> float:
        """Until each device has the whole, of so many bytes, that they have parts of."""
        if self.size == 1:
            return 0.0
        moved = num_bytes * (self.size - 1) / self.size
        return max(moved / self.bandwidth, self.hops * HOP_SECONDS)

    def send_seconds(self, num_bytes: float) -> float:
        """From a device to the next of its group."""
        return 0.0 if self.size == 1 else max(num_bytes / self.bandwidth, HOP_SECONDS)


def links(topology: Topology, sizes: tuple[int, ...]) -> tuple[Links, ...]:
    """The links of each axis of a mesh that is laid out over a slice, the last axis innermost.

    A group takes the slice's dimensions from the last one on, a part of one where its size asks for it. Along a whole
    dimension that wraps a device sends both ways; along others a ring has one link in each direction to use.
    """
    chip, net = topology.chip, topology.interconnect
    found: list[Links] = []
    if not net.num_dims:
        inside = 1
        for size in reversed(sizes):
            inside *= size
            bandwidth = net.link_bandwidth if inside <= topology.shape[-1] else net.network_bandwidth
            found.append(Links(size=size, bandwidth=bandwidth, hops=1))
        return tuple(reversed(found))
    left = [*topology.shape, chip.devices_per_chip]  # the devices of a chip are next to each other
    for size in reversed(sizes):
        bandwidth, hops, wanted = 0.0, 0, size
        for dim in reversed(range(len(left))):
            part = math.gcd(wanted, left[dim])
            if part == 1:
                continue
            is_ring = dim < len(topology.shape) and part == topology.shape[dim] and topology.wraps(dim)
            # The devices of a chip share its links.
            bandwidth += net.link_bandwidth * (2 if is_ring else 1) / chip.devices_per_chip
            hops += part // 2 if is_ring else part - 1
            wanted //= part
            left[dim] //= part
        found.append(Links(size=size, bandwidth=bandwidth or net.link_bandwidth, hops=max(hops, 1)))
    return tuple(reversed(found))


def topology(name: str) -> Topology:
    """The slice of a name such as "v5e:4x4". Raises ShardingError, with the names that there are."""
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None:
        raise ShardingError(f"topology: expected a name such as v5e:4x4, v5p:4x4x4 or h100:8, got {name!r}")
    chip_name, sizes = match[1], match[2]
    if chip_name not in INTERCONNECTS:
        raise ShardingError(f"topology: there is no chip {chip_name!r}; there are {', '.join(INTERCONNECTS)}")
    net, shape = INTERCONNECTS[chip_name], tuple(map(int, sizes.split("x")))
    if not net.num_dims and len(shape) == 1:
        shape = (1, *shape)
    if not _is_slice(net, shape):
        raise ShardingError(f"topology: {name} does not exist; {_slices(chip_name, net)}")
    return Topology(name=f"{chip_name}:{sizes}", chip=chip_named(chip_name), interconnect=net, shape=shape)


def _is_slice(net: Interconnect, shape: tuple[int, ...]) -> bool:
    if not net.num_dims:
        return len(shape) == 2 and min(shape) >= 1 and shape[1] <= net.chips_per_host
    if net.num_dims == 2:
        return shape in _SQUARES
    is_cubes = len(shape) == 3 and all(size and size % 4 == 0 for size in shape)
    return shape in _SMALL_CUBES or (is_cubes and tuple(sorted(shape)) == shape and shape[2] <= _LONGEST)


def _slices(name: str, net: Interconnect) -> str:
    if not net.num_dims:
        return f"{name} has 1 to {net.chips_per_host} GPUs a server: {name}:{net.chips_per_host}, or {name}:2x4 for two"
    shapes = ", ".join("x".join(map(str, shape)) for shape in (_SQUARES if net.num_dims == 2 else _SMALL_CUBES))
    larger = " and rising multiples of 4 such as 4x4x4 and 4x4x8" if net.num_dims == 3 else ""
    return f"slices of {name} are {shapes}{larger}"


def topology_of(devices: Sequence[jax.Device]) -> Topology:
    """The slice that these devices are. Raises ShardingError for devices whose figures are not known."""
    try:
        chip = chip_of(devices[0])
    except UnknownChipError as error:
        raise ShardingError(f"{error}; give the mesh's axes and sizes, such as tensor=4") from None
    if chip.name not in INTERCONNECTS:
        raise ShardingError(
            f"mesh: what is between chips of {chip.name} is not known: give axes and sizes, such as tensor=4"
        )
    net = INTERCONNECTS[chip.name]
    if net.num_dims:
        # (x, y, z) of each device's chip; a 2D slice has z = 0
        places = [tuple(device.coords)[: net.num_dims] for device in devices]
        shape = tuple(1 + max(axis) - min(axis) for axis in zip(*places, strict=True))
    else:
        num_hosts = len({device.process_index for device in devices})
        shape = (num_hosts, -(-len(devices) // num_hosts))
    return Topology(name=f"{chip.name}:{'x'.join(map(str, shape))}", chip=chip, interconnect=net, shape=shape)

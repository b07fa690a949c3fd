"""What the chips that kernels are written for can do, and which of them a JAX device is.

Figures are those that the vendors publish, for a whole chip and without structured sparsity. A cost model that counts
JAX devices takes `Chip.per_device`: JAX shows a TPU7x chip as two devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import jax

KIB, MIB, GIB = 1024, 1024**2, 1024**3
GB, TB = 1e9, 1e12
TERA = 1e12


class UnknownChipError(ValueError):
    """A device, or a name, that is not in the table."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    A dtype that `peak_flops` lacks is one that the matrix units do not multiply: it is converted first, or emulated.
    """

    name: str
    platform: Literal["tpu", "gpu"]
    device_kinds: tuple[str, ...]
    """What `jax.Device.device_kind` says of it; of a GPU, its beginnings."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes a second."""
    peak_flops: Mapping[str, float] = field(hash=False)
    """Operations a second (a multiply-add is two) of the matrix units, by the dtype of what is multiplied.

    "tfloat32" is float32 that is rounded to 10 bits of mantissa first, "float32" of a GPU is done by its vector units.
    """
    fast_memory_bytes: int
    """Of a TPU the VMEM of one TensorCore, of a GPU the shared memory that one block of threads may have."""
    num_cores: int
    """TensorCores, or streaming multiprocessors."""
    devices_per_chip: int = 1
    capability: int | None = None
    """The compute capability of a GPU, 90 for 9.0."""
    sources: tuple[str, ...]
    """Where the figures are from."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the matrix units multiply, the fastest first."""
        return tuple(sorted(self.peak_flops, key=lambda dtype: -self.peak_flops[dtype]))

    @property
    def per_device(self) -> "Chip":
        """The share of it that one JAX device is."""
        parts = self.devices_per_chip
        return replace(
            self,
            memory_bytes=self.memory_bytes // parts,
            memory_bandwidth=self.memory_bandwidth / parts,
            peak_flops=MappingProxyType({dtype: peak / parts for dtype, peak in self.peak_flops.items()}),
            num_cores=self.num_cores // parts,
            devices_per_chip=1,
        )


def _peaks(**teraflops: float) -> Mapping[str, float]:
    return MappingProxyType({dtype: peak * TERA for dtype, peak in teraflops.items()})


_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"
_VMEM = "VMEM, int4, and int8 on v5p: jax/_src/pallas/mosaic/tpu_info.py of JAX 0.10.2"
_CUDA = "shared memory: CUDA C++ Programming Guide, 'Technical Specifications per Compute Capability'"
_NVIDIA = "https://www.nvidia.com/"

CHIPS: tuple[Chip, ...] = (
    Chip(
        name="v5e",
        platform="tpu",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        memory_bytes=16 * GIB,
        memory_bandwidth=819 * GB,
        peak_flops=_peaks(bfloat16=197, int8=393, int4=788),
        fast_memory_bytes=128 * MIB,
        num_cores=1,
        sources=(_GOOGLE + "v5e", _VMEM),
    ),
    Chip(
        name="v6e",
        platform="tpu",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        memory_bytes=32 * GIB,
        memory_bandwidth=1638 * GB,
        peak_flops=_peaks(bfloat16=918, float8=918, int8=1836, int4=3680),
        fast_memory_bytes=128 * MIB,
        num_cores=1,
        sources=(_GOOGLE + "v6e", _VMEM),
    ),
    Chip(
        name="v5p",
        platform="tpu",
        device_kinds=("TPU v5", "TPU v5p"),
        memory_bytes=95 * GIB,
        memory_bandwidth=2765 * GB,
        peak_flops=_peaks(bfloat16=459, int8=918, int4=1840),
        fast_memory_bytes=64 * MIB,
        num_cores=2,
        sources=(_GOOGLE + "v5p", _VMEM),
    ),
    Chip(
        name="tpu7x",
        platform="tpu",
        device_kinds=("TPU7x",),
        memory_bytes=192 * GIB,
        memory_bandwidth=7380 * GB,
        peak_flops=_peaks(bfloat16=2307, float8=4614),  # its matrix units take no integers
        fast_memory_bytes=64 * MIB,
        num_cores=2,
        devices_per_chip=2,
        sources=(_GOOGLE + "tpu7x", _VMEM),
    ),
    Chip(
        name="t4",
        platform="gpu",
        device_kinds=("Tesla T4", "NVIDIA T4"),
        memory_bytes=16 * GIB,
        memory_bandwidth=320 * GB,
        peak_flops=_peaks(float32=8.1, float16=65, int8=130, int4=260),
        fast_memory_bytes=64 * KIB,
        num_cores=40,
        capability=75,
        sources=("NVIDIA T4 datasheet, " + _NVIDIA + "en-us/data-center/tesla-t4/", _CUDA),
    ),
    Chip(
        name="a100-40gb",
        platform="gpu",
        device_kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB"),
        memory_bytes=40 * GIB,
        memory_bandwidth=1555 * GB,
        peak_flops=_peaks(float32=19.5, tfloat32=156, bfloat16=312, float16=312, int8=624, int4=1248),
        fast_memory_bytes=163 * KIB,
        num_cores=108,
        capability=80,
        sources=("NVIDIA A100 datasheet, " + _NVIDIA + "en-us/data-center/a100/", _CUDA),
    ),
    Chip(
        name="a100-80gb",
        platform="gpu",
        device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB", "A100-SXM4-80GB"),
        memory_bytes=80 * GIB,
        memory_bandwidth=2039 * GB,
        peak_flops=_peaks(float32=19.5, tfloat32=156, bfloat16=312, float16=312, int8=624, int4=1248),
        fast_memory_bytes=163 * KIB,
        num_cores=108,
        capability=80,
        sources=("NVIDIA A100 datasheet (SXM), " + _NVIDIA + "en-us/data-center/a100/", _CUDA),
    ),
    Chip(
        name="a10",
        platform="gpu",
        device_kinds=("NVIDIA A10",),
        memory_bytes=24 * GIB,
        memory_bandwidth=600 * GB,
        peak_flops=_peaks(float32=31.2, tfloat32=62.5, bfloat16=125, float16=125, int8=250, int4=500),
        fast_memory_bytes=99 * KIB,
        num_cores=72,
        capability=86,
        sources=("NVIDIA A10 datasheet, " + _NVIDIA + "en-us/data-center/products/a10-gpu/", _CUDA),
    ),
    Chip(
        name="l4",
        platform="gpu",
        device_kinds=("NVIDIA L4",),
        memory_bytes=24 * GIB,
        memory_bandwidth=300 * GB,
        peak_flops=_peaks(float32=30.3, tfloat32=60, bfloat16=121, float16=121, float8=242.5, int8=242.5),
        fast_memory_bytes=99 * KIB,
        num_cores=58,
        capability=89,
        sources=("NVIDIA L4 datasheet (halved: it gives sparse ones), " + _NVIDIA + "en-us/data-center/l4/", _CUDA),
    ),
    Chip(
        name="h100",
        platform="gpu",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        memory_bytes=80 * GIB,
        memory_bandwidth=3350 * GB,
        peak_flops=_peaks(float32=67, tfloat32=494.5, bfloat16=989.5, float16=989.5, float8=1979, int8=1979),
        fast_memory_bytes=227 * KIB,
        num_cores=132,
        capability=90,
        sources=("NVIDIA H100 datasheet (SXM; halved: sparse ones), " + _NVIDIA + "en-us/data-center/h100/", _CUDA),
    ),
    Chip(
        name="h200",
        platform="gpu",
        device_kinds=("NVIDIA H200",),
        memory_bytes=141 * 10**9,
        memory_bandwidth=4800 * GB,
        peak_flops=_peaks(float32=67, tfloat32=494.5, bfloat16=989.5, float16=989.5, float8=1979, int8=1979),
        fast_memory_bytes=227 * KIB,
        num_cores=132,
        capability=90,
        sources=("NVIDIA H200 datasheet (SXM; halved: sparse ones), " + _NVIDIA + "en-us/data-center/h200/", _CUDA),
    ),
    Chip(
        name="b200",
        platform="gpu",
        device_kinds=("NVIDIA B200",),
        memory_bytes=180 * 10**9,
        memory_bandwidth=7700 * GB,
        peak_flops=_peaks(float32=75, tfloat32=1100, bfloat16=2250, float16=2250, float8=4500, int8=4500, float4=9000),
        fast_memory_bytes=227 * KIB,
        num_cores=148,
        capability=100,
        sources=(
            "NVIDIA Blackwell datasheet (HGX B200; halved: sparse ones), " + _NVIDIA + "en-us/data-center/hgx/",
            _CUDA,
        ),
    ),
)
"""Every chip that is known, TPUs first."""

_BY_NAME: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in CHIPS})
_REPRESENTATIVES: Mapping[int, str] = MappingProxyType(
    {75: "t4", 80: "a100-40gb", 86: "a10", 89: "l4", 90: "h100", 100: "b200"}
)


def chip_named(name: str) -> Chip:
    """The chip of a name ("v5e", "h100"), or for "sm90" one of that compute capability.

    Raises UnknownChipError, which lists the names.
    """
    if name.startswith("sm") and name[2:].isdigit() and int(name[2:]) in _REPRESENTATIVES:
        return _BY_NAME[_REPRESENTATIVES[int(name[2:])]]
    if name in _BY_NAME:
        return _BY_NAME[name]
    known = [*_BY_NAME, *(f"sm{capability}" for capability in _REPRESENTATIVES)]
    raise UnknownChipError(f"chip: expected one of {', '.join(known)}; got {name!r}")


def capability_of(device: jax.Device) -> int | None:
    """The compute capability of an NVIDIA GPU, 90 for 9.0; None for other devices."""
    text = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or not isinstance(text, str) or not text.replace(".", "").isdigit():
        return None
    major, _, minor = text.partition(".")
    return 10 * int(major) + int(minor or 0)


def chip_of(device: jax.Device) -> Chip:
    """The chip that a JAX device is, or is a part of.

    Raises UnknownChipError for a device whose figures are not known. What only needs a GPU's limits, not its speed,
    asks `limits_of`.
    """
    kind = device.device_kind
    for chip in CHIPS:
        if chip.platform == "tpu" and device.platform == "tpu" and kind in chip.device_kinds:
            return chip
    if device.platform in ("gpu", "cuda"):
        # The longest beginning: "NVIDIA A100 80GB PCIe" is no "NVIDIA A10".
        starts = [(len(start), chip) for chip in CHIPS for start in chip.device_kinds if _begins(kind, start)]
        if starts:
            return max(starts, key=lambda found: found[0])[1]
    names = ", ".join(f"{chip.name} ({chip.device_kinds[0]})" for chip in CHIPS)
    raise UnknownChipError(f"device {kind!r} ({device.platform}): no figures are known for it; known are {names}")


def limits_of(device: jax.Device) -> Chip:
    """The chip of a device, or of a GPU whose speed is not known one of the same compute capability.

    Raises UnknownChipError for other devices, and for GPUs of a capability that kernels are not made for.
    """
    try:
        return chip_of(device)
    except UnknownChipError:
        capability = capability_of(device)
        if capability is None:
            raise
        if capability not in _REPRESENTATIVES:
            known = ", ".join(f"{each / 10:.1f}" for each in _REPRESENTATIVES)
            raise UnknownChipError(
                f"device {device.device_kind!r}: compute capability {capability / 10:.1f}, kernels are for {known}"
            ) from None
        return chip_named(f"sm{capability}")


def _begins(kind: str, start: str) -> bool:
    """Whether a name begins with whole words."""
    return kind == start or kind.startswith(start + " ")


__all__ = ["CHIPS", "Chip", "UnknownChipError", "capability_of", "chip_named", "chip_of", "limits_of"]

"""What a decoder's step is lowered to: native code, the kernels of a chip, or its reference decomposition."""

from dataclasses import dataclass

import jax

from llmir_jax.errors import LlmirError
from llmir_jax.targets.gpu import kernels_for
from llmir_jax.transforms.hardware_specific_quantization import LAYOUTS
from llmir_jax.transforms.lower_to_flash import LowerToFlashPass
from llmir_jax.transforms.lower_to_gpu import LowerToGpuPass
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass
from llmir_jax.transforms.lower_to_tpu import LowerToTpuPass
from pallas_kernels.chips import Chip, UnknownChipError, chip_of, limits_of

GPU = ("gpu", "gpu-mosaic")
"""Targets of an NVIDIA GPU: with Triton's kernel of attention, or with that of Pallas through Mosaic GPU."""


def check_target(target: str | None, interpret: bool) -> str:
    """The platform that the decoder runs on. Raises LlmirError for a target that cannot be served there."""
    platform = jax.default_backend()
    if interpret and target != "tpu":
        raise LlmirError(f"decoder: interpret=True is of the kernels of target='tpu', got target={target!r}")
    if interpret:
        return platform
    if target not in (None, "reference", platform) and not (target in GPU and platform in ("gpu", "cuda", "rocm")):
        raise LlmirError(
            f"decoder: target={target!r}, but JAX runs on {platform!r} here: leave target out, or set JAX_PLATFORMS"
        )
    return platform


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """The choice for one decoder."""

    platform: str
    native: bool
    """Whether the step is native code of a CPU, where it can be."""
    layout: str
    """What quantized weights are laid out for, of `LAYOUTS`."""
    kernels: LowerToKernelsPass | None
    """How the step is lowered to its target's kernels, whose `max_tokens` are still to be said."""
    notes: tuple[str, ...]
    """For the report: why there are no kernels where there might be."""

    @staticmethod
    def of(target: str | None, *, platform: str, interpret: bool, on_mesh: bool) -> "TargetChoice":
        """Of a target that `check_target` allows, on its platform."""
        if on_mesh:
            why = "no kernels on a mesh in this version: steps are partitioned as reference decompositions"
            notes = (why,) if interpret or platform in ("tpu", "gpu") else ()
            # in columns a product is one operation, which XLA can partition
            return TargetChoice(platform=platform, native=False, layout="tpu", kernels=None, notes=notes)
        if target == "tpu" or (target is None and platform == "tpu"):
            chip = chip_of(jax.devices()[0]).name if platform == "tpu" else LowerToTpuPass.chip
            kernels = LowerToTpuPass(interpret=interpret, chip=chip)
            return TargetChoice(platform=platform, native=False, layout="tpu", kernels=kernels, notes=())
        if platform == "gpu" and target in (None, *GPU):
            gpu = kernels_for(jax.devices()[0])
            if isinstance(gpu, Chip):
                own = LowerToGpuPass(chip=gpu.name, attention="mosaic_gpu" if target == "gpu-mosaic" else "triton")
                return TargetChoice(platform=platform, native=False, layout="gpu", kernels=own, notes=())
            notes = (f"no kernels for the GPU: {gpu}",)
            return TargetChoice(platform=platform, native=False, layout="gpu-reference", kernels=None, notes=notes)
        native = platform == "cpu" and target in (None, "cpu")
        layout = platform if platform in LAYOUTS else "reference"
        if platform in ("gpu", "cuda", "rocm"):
            layout = "gpu-reference"
        return TargetChoice(platform=platform, native=native, layout=layout, kernels=None, notes=())

    @property
    def kv_cache(self) -> str | None:
        """What it takes keys and values as where that is left to it: native code reads float16 twice as fast."""
        if not self.native:
            return None
        from llmir_jax.targets.cpu.host import this_host

        return "float16" if this_host().has_half else None


def flash_lowering(target: str | None) -> LowerToFlashPass | str:
    """How a direct call's attention is lowered to flash attention on the device that JAX uses; or why it is not."""
    platform = jax.default_backend()
    if target in ("reference", "cpu"):
        return f"target={target!r}"
    if platform not in ("tpu", "gpu"):
        return f"JAX runs on {platform}"
    try:
        return LowerToFlashPass(chip=limits_of(jax.devices()[0]).name)
    except UnknownChipError as error:
        return str(error)


__all__ = ["TargetChoice", "check_target", "flash_lowering"]

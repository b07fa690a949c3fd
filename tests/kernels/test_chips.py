"""The table of chips, and which of them a device is."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from pallas_kernels.chips import CHIPS, UnknownChipError, capability_of, chip_named, chip_of, limits_of


def device(platform: str, kind: str, capability: str | None = None) -> Any:
    fields = {"platform": platform, "device_kind": kind}
    return SimpleNamespace(**fields if capability is None else fields | {"compute_capability": capability})


def test_every_chip_has_sources_and_plausible_units() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert len(chip.sources) == 2, chip.name
        assert 15e9 < chip.memory_bytes < 300e9, chip.name
        assert 250e9 < chip.memory_bandwidth < 10e12, chip.name
        assert all(5e12 < peak < 1e16 for peak in chip.peak_flops.values()), chip.name
        assert chip.dtypes[0] == max(chip.peak_flops, key=lambda dtype: chip.peak_flops[dtype])
        assert (chip.platform == "gpu") == (chip.capability is not None)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (device("tpu", "TPU v5 lite"), "v5e"),
        (device("tpu", "TPU v5"), "v5p"),
        (device("tpu", "TPU v6 lite"), "v6e"),
        (device("tpu", "TPU7x"), "tpu7x"),
        (device("gpu", "Tesla T4", "7.5"), "t4"),
        (device("gpu", "NVIDIA A100 80GB PCIe", "8.0"), "a100-80gb"),
        (device("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "a100-40gb"),
        (device("gpu", "NVIDIA A10", "8.6"), "a10"),
        (device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "h100"),
        (device("cuda", "NVIDIA B200", "10.0"), "b200"),
    ],
)
def test_devices_are_recognized(found: Any, name: str) -> None:
    chip = chip_of(found)
    assert chip.name == name
    assert capability_of(found) == chip.capability


@pytest.mark.parametrize(
    "found", [device("gpu", "NVIDIA A10G", "8.6"), device("tpu", "TPU v2"), device("gpu", "NVIDIA L40S")]
)
def test_no_device_is_taken_for_another(found: Any) -> None:
    with pytest.raises(UnknownChipError, match=f"device '{found.device_kind}'.*v5e \\(TPU v5 lite\\)"):
        chip_of(found)


def test_limits_of_gpus_whose_speed_is_not_known() -> None:
    assert limits_of(device("gpu", "NVIDIA A10G", "8.6")).name == "a10"
    assert limits_of(device("gpu", "Tesla T4", "7.5")).name == "t4"
    for kind, capability in (("NVIDIA GeForce RTX 5090", "12.0"), ("Tesla V100-SXM2-16GB", "7.0")):
        words = f"device '{kind}': compute capability {capability}, kernels are for 7.5, 8.0, 8.6, 8.9, 9.0, 10.0"
        with pytest.raises(UnknownChipError, match=f"^{words}$"):
            limits_of(device("gpu", kind, capability))


def test_the_cpu_is_no_chip() -> None:
    assert capability_of(jax.devices("cpu")[0]) is None
    with pytest.raises(UnknownChipError, match="no figures are known"):
        chip_of(jax.devices("cpu")[0])


def test_names_and_capabilities() -> None:
    assert chip_named("v6e").num_cores == 1
    assert chip_named("sm90").name == "h100" and chip_named("sm75").name == "t4"
    with pytest.raises(UnknownChipError, match=r"expected one of v5e, .*sm100; got 'v7'"):
        chip_named("v7")


def test_a_device_is_half_of_a_chip_of_two() -> None:
    chip = chip_named("tpu7x")
    half = chip.per_device
    assert half.memory_bytes * 2 == chip.memory_bytes
    assert half.peak_flops["bfloat16"] * 2 == chip.peak_flops["bfloat16"]
    assert half.fast_memory_bytes == chip.fast_memory_bytes  # of each TensorCore
    assert chip_named("v5p").per_device == chip_named("v5p")

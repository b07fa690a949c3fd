"""`mesh="auto"`: chosen by the cost model where the devices are known, refused in words where they are not."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from flax import nnx
from tiny_llama import forward, make_model

import llmir_jax as llmir
from llmir_jax.auto_mesh import choose_mesh, cost_of, derive_from_shapes, one_device
from llmir_jax.errors import LlmirError
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.placement import Placement
from llmir_jax.planning import ModelPlan
from sharding.errors import ShardingError
from sharding.topologies import topology, topology_of

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=8,
    max_seq_len=64, rms_norm_eps=1e-5, rope_theta=10_000.0, windows=(None, None),
)  # fmt: skip


def devices(number: int, kind: str, *, per_process: int = 8, platform: str = "tpu") -> list[Any]:
    return [
        SimpleNamespace(
            device_kind=kind, platform=platform, process_index=i // per_process, coords=(i % 4, i // 4, 0), id=i
        )
        for i in range(number)
    ]


def test_chosen_for_the_devices_there_are() -> None:
    plan = ModelPlan(config=CONFIG, batch=4, context=64)

    def derive(placement: Any) -> Any:
        derived = plan.derive(2, 64)
        assert dict(placement.mesh.shape) == {"tensor": 1}
        return derived

    chosen = choose_mesh(derive, max_seqs=4, context=64, devices=devices(8, "TPU v5 lite"))
    assert chosen.axes is not None and "data" not in chosen.axes
    assert chosen.why.startswith("on v5e:4x2 ") and "takes the least for a step" in chosen.why


def test_several_hosts_may_have_what_one_has() -> None:
    few = dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=3, hidden_size=24)
    plan = ModelPlan(config=few, batch=4, context=64)
    one, four = (
        choose_mesh(
            lambda _: plan.derive(2, 64),
            max_seqs=4,
            context=64,
            devices=devices(16, "TPU v5 lite", per_process=per_process),
            topology=topology("v5e:4x4"),
        )
        for per_process in (16, 4)
    )
    assert one == four
    assert one.axes is not None and "tensor" not in one.axes  # 3 heads are not for 16 devices


def test_devices_by_what_they_say() -> None:
    assert topology_of(devices(16, "TPU v5 lite", per_process=4)).name == "v5e:4x4"
    gpus = devices(16, "NVIDIA H100 80GB HBM3", platform="gpu")
    assert (topology_of(gpus).name, topology_of(gpus).num_hosts) == ("h100:2x8", 2)
    with pytest.raises(ShardingError, match=r"no figures are known for it.*give the mesh's axes and sizes"):
        topology_of(devices(2, "cpu", platform="cpu"))


def test_a_model_may_be_larger_than_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "device_bytes", 1)
    sizes: dict[str, Any] = {"num_pages": 32, "page_size": 8, "max_seqs": 4}
    shapes = nnx.eval_shape(make_model)
    derived = derive_from_shapes(forward, shapes, None, 64, one_device(), kv_cache=None, **sizes)
    assert cost_of(derived, 4).weight_bytes > 1
    with pytest.raises(LlmirError, match=r"needs .* on each device, .* but a device has 0\.00 GiB: use more devices"):
        llmir.jit(forward).decoder(make_model(), mesh=one_device().mesh, max_seq_len=64, verify=False, **sizes)


@pytest.mark.skipif(len(jax.devices()) > 1, reason="has several devices")
def test_one_device_needs_no_mesh(data_path: Any) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    decoder = loaded.decoder(mesh="auto", target="reference", num_pages=4, max_seqs=1, max_seq_len=64, verify=False)
    assert "mesh: auto: there is one device" in str(decoder.report())

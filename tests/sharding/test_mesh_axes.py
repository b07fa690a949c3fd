"""Meshes by name and rules by path: what they give, and what they refuse. No device computes: meshes are abstract."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sharding import ShardingError, make_mesh, parse_axes, parse_rules, partition_spec, shardings
from sharding.mesh import axis_size, describe, split_for_kv_heads, sub_meshes
from sharding.rules import check_used


class FakeDevice:
    """Enough of a device for a mesh."""

    platform = "cpu"

    def __init__(self, number: int, per_process: int = 8):
        self.id, self.process_index = number, number // per_process


def fake(**axes: int):
    return make_mesh(axes, devices=[FakeDevice(i) for i in range(int(np.prod(list(axes.values()))))])


def test_axes_are_laid_out_with_tensor_innermost_and_auto():
    mesh = fake(tensor=2, pipeline=3)
    assert mesh.axis_names == ("pipeline", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5]]
    assert describe(mesh) == "pipeline 3 × tensor 2 on 6 cpu devices"
    stages = sub_meshes(mesh, "pipeline")
    assert [[d.id for d in stage.devices] for stage in stages] == [[0, 1], [2, 3], [4, 5]]
    assert sub_meshes(fake(data=2), "data")[1].devices[0].id == 1
    assert sub_meshes(mesh, "data") == (mesh,)


def test_parse_axes():
    assert parse_axes("tensor=3, pipeline=2") == {"tensor": 3, "pipeline": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensr=2", "there is no axis 'tensr'; the axes are data, pipeline, sequence, expert, tensor"),
        ("tensor", "expected axis=size"),
        ("tensor=two", "expected axis=size"),
        ("tensor=0", "'tensor' must have a size of at least 1, got 0"),
        ("tensor=2,tensor=3", "given twice"),
    ],
)
def test_bad_axes(text: str, message: str):
    with pytest.raises(ShardingError, match=message):
        parse_axes(text)


def test_a_mesh_that_does_not_match_the_devices():
    with pytest.raises(ShardingError, match=r"pipeline 2 × tensor 3 needs 6 devices, but 4 were given"):
        make_mesh({"tensor": 3, "pipeline": 2}, devices=[FakeDevice(i) for i in range(4)])
    with pytest.raises(ShardingError, match=rf"tensor 77 needs 77 devices, but JAX has {len(jax.devices())} \("):
        make_mesh({"tensor": 77})


def test_kv_heads_fewer_than_devices_are_copied():
    mesh = split_for_kv_heads(fake(tensor=8), 8, 2)
    assert dict(mesh.shape) == {"tensor": 2, "tensor_copies": 4}
    assert axis_size(mesh, "tensor") == 8
    assert [d.id for d in mesh.devices.reshape(-1)] == list(range(8))
    assert dict(split_for_kv_heads(fake(tensor=2), 8, 2).shape) == {"tensor": 2}
    assert partition_spec("attn.k.kernel", (64, 32), mesh) == PartitionSpec(None, "tensor")
    assert partition_spec("attn.q.kernel", (64, 64), mesh) == PartitionSpec(None, ("tensor", "tensor_copies"))


def test_heads_that_cannot_be_divided():
    with pytest.raises(ShardingError, match=r"9 heads cannot be divided over tensor = 2; it can be 1, 3 or 9"):
        split_for_kv_heads(fake(tensor=2), 9, 3)
    with pytest.raises(ShardingError, match=r"4 KV heads neither divide tensor = 6 nor are divided by it"):
        split_for_kv_heads(fake(tensor=6), 12, 4)


MESH = AbstractMesh((2, 4), ("expert", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers.0.attn.q.kernel", (64, 128), (None, "tensor")),
        ("layers.0.attn.k.bias", (128,), ("tensor",)),
        ("layers.0.attn.o.kernel", (128, 64), ("tensor",)),
        ("layers.0.attn.o.bias", (64,), ()),
        ("layers.0.mlp.down.kernel", (128, 64), ("tensor",)),
        ("layers/mlp/up/kernel", (30, 64, 128), (None, None, "tensor")),  # stacked layers
        ("model.layers.3.self_attn.q_proj.kernel", (64, 128), (None, "tensor")),
        ("layers.0.moe.experts.up.kernel", (8, 64, 128), (("expert", "tensor"),)),
        ("layers.0.moe.experts.up.kernel", (6, 64, 128), ("expert", None, "tensor")),  # 6 experts over 2 devices, not 8
        ("layers.0.moe.experts.down.kernel", (6, 128, 64), ("expert", "tensor")),
        ("embed.embedding", (1000, 64), ("tensor",)),
        ("embed.embedding", (1001, 64), ()),  # a default splits what it can
        ("head.kernel", (64, 1000), (None, "tensor")),
        ("layers.0.attn_norm.scale", (64,), ()),
        ("layers.0.backup.kernel", (64, 128), ()),  # whole components: this is no "up"
    ],
)
def test_defaults(path: str, shape: tuple[int, ...], spec: tuple[str | None, ...]):
    assert partition_spec(path, shape, MESH) == PartitionSpec(*spec)


def test_shardings_of_a_whole_model():
    mesh = make_mesh({"tensor": 1}, devices=jax.devices()[:1])
    shapes = {"layers.0.attn.q.kernel": (8, 8), "layers.0.mlp.up.kernel": (8, 16), "norm.scale": (8,)}
    found = shardings(shapes, mesh, {"attn/q/kernel": ("tensor", None)})
    specs = {path: sharding.spec for path, sharding in found.items()}
    assert list(specs.values()) == [PartitionSpec("tensor"), PartitionSpec(None, "tensor"), PartitionSpec()]
    assert all(sharding.mesh == mesh for sharding in found.values())
    with pytest.raises(ShardingError, match="'atn/q' matches no parameter"):
        shardings(shapes, mesh, {"atn/q": ("tensor", None)})


def test_own_rules_go_first_and_are_taken_at_their_word():
    rules = parse_rules({"mlp/.*/kernel": ("expert", None)})
    assert partition_spec("layers.0.mlp.up.kernel", (64, 128), MESH, rules) == PartitionSpec("expert")
    assert partition_spec("layers.0.attn.q.kernel", (64, 128), MESH, rules) == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        ({"up": ("sequence", None)}, (64, 128), "over 'sequence', but the mesh has only 'expert', 'tensor'"),
        ({"up": ("tensor", None)}, (63, 128), r"\[63, 128\], 63, over tensor 4, which does not divide it"),
        ({"up": (("expert", "tensor"),)}, (64, 100), "100, over expert 2 × tensor 4, which does not divide it"),
        ({"up": (None, None, "tensor")}, (64, 128), "splits 3 dimensions, but 'mlp.up.kernel' is .* which has 2"),
        ({"up": ("tensr",)}, (64, 128), "names the axis 'tensr'; the axes are"),
        ({"up": "tensor"}, (64, 128), r"expected an axis or None for each dimension: \('tensor',\)"),
        ({"(": (None,)}, (64, 128), "is not a regular expression"),
        ({"down": (None,)}, (64, 128), "matches no parameter; the 1 are such as 'mlp.up.kernel'"),
    ],
)
def test_rules_that_cannot_be(rule: dict, shape: tuple[int, ...], message: str):
    with pytest.raises(ShardingError, match=message):
        rules = parse_rules(rule)
        check_used(rules, ["mlp.up.kernel"])
        partition_spec("mlp.up.kernel", shape, MESH, rules)

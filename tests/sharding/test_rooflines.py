"""The cost model on slices, by hand. `test_cost_compiled.py` has it beside what XLA compiles."""

import dataclasses

import pytest

from sharding.choice import choose
from sharding.cost import CostModel, Layout, Workload
from sharding.errors import ShardingError
from sharding.step_cost import CacheCost, ParameterCost, StepCost
from sharding.topologies import HOP_SECONDS, INTERCONNECTS, links, topology

HIDDEN, FF, VOCAB, LAYERS = 1024, 4096, 32_000, 4
HEADS, KV_HEADS, DIM = 8, 2, 128


def matrix(path: str, inputs: int, outputs: int, **more: int) -> ParameterCost:
    nbytes = 2 * inputs * outputs
    return ParameterCost(
        path=path,
        shape=(inputs, outputs),
        nbytes=nbytes,
        nbytes_read=nbytes,
        multiply_adds_per_token=more.get("token", inputs * outputs),
        multiply_adds_per_row=more.get("row", 0),
        outputs=outputs,
    )


def tiny_model() -> StepCost:
    """bfloat16, untied."""
    layer = [
        matrix("attn.q.kernel", HIDDEN, HEADS * DIM),
        matrix("attn.k.kernel", HIDDEN, KV_HEADS * DIM),
        matrix("attn.v.kernel", HIDDEN, KV_HEADS * DIM),
        matrix("attn.o.kernel", HEADS * DIM, HIDDEN),
        matrix("mlp.up.kernel", HIDDEN, FF),
        matrix("mlp.down.kernel", FF, HIDDEN),
    ]
    table = ParameterCost(
        path="embed.embedding", shape=(VOCAB, HIDDEN), nbytes=2 * VOCAB * HIDDEN, nbytes_read=2 * HIDDEN,
        gathered_size=HIDDEN,
    )  # fmt: skip
    layers = [dataclasses.replace(p, path=f"layers.{i}.{p.path}") for i in range(LAYERS) for p in layer]
    head = matrix("head.kernel", HIDDEN, VOCAB, token=0, row=HIDDEN * VOCAB)
    cache = CacheCost(
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        value_dim=DIM,
        bytes_per_token=LAYERS * 2 * KV_HEADS * DIM * 2,
        multiply_adds_per_pair=LAYERS * HEADS * 2 * DIM,
    )
    return StepCost(parameters=(table, *layers, head), caches=(cache,), itemsize=2, vocab_size=VOCAB)


LAYER_WEIGHTS = HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 2 * HIDDEN * FF


def test_one_device_is_a_roofline() -> None:
    slice_ = topology("v5e:1x1")
    batch, context = 8, 1000
    found = CostModel(tiny_model(), slice_).estimate(Layout(), Workload(batch=batch, context=context))
    weights, cache = 2 * LAYERS * LAYER_WEIGHTS, LAYERS * 4 * KV_HEADS * DIM
    assert found.memory.parameters == weights + 2 * 2 * VOCAB * HIDDEN
    assert found.memory.cache == batch * context * cache
    assert found.parts["weights"].nbytes == weights + batch * 2 * HIDDEN
    assert found.parts["weights"].operations == 2 * batch * LAYERS * LAYER_WEIGHTS
    assert found.parts["attention"].operations == 2 * batch * context * LAYERS * HEADS * 2 * DIM
    read = weights + batch * 2 * HIDDEN + batch * context * cache + 2 * VOCAB * HIDDEN
    assert found.seconds == pytest.approx(read / 819e9)  # so few rows: reading bounds all of it
    assert found.collectives == ()
    assert found.tokens_per_second == pytest.approx(batch / found.seconds)


def test_many_rows_are_bound_by_arithmetic() -> None:
    model = CostModel(tiny_model(), topology("v5e:1x1"))
    found = model.estimate(Layout(), Workload(batch=1, context=4096, new_tokens=4096))
    assert found.parts["weights"].bound == "compute"
    assert found.parts["weights"].seconds == pytest.approx(2 * 4096 * LAYERS * LAYER_WEIGHTS / 197e12)
    # a token sees itself and those before it
    assert found.parts["attention"].operations == 4096 * 4097 * LAYERS * HEADS * 2 * DIM


def test_tensor_halves_and_talks() -> None:
    model = CostModel(tiny_model(), topology("v5e:2x2"))
    work = Workload(batch=8, context=1000)
    found = model.estimate(Layout(tensor=4), work)
    # KV heads are fewer than devices: keys, values and their cache are in two parts, each on two devices.
    kv = LAYERS * 2 * HIDDEN * KV_HEADS * DIM
    rest = LAYERS * LAYER_WEIGHTS - kv + 2 * VOCAB * HIDDEN
    assert found.memory.parameters == 2 * (rest // 4 + kv // 2)
    assert found.memory.cache == 8 * 1000 * LAYERS * 4 * KV_HEADS * DIM // 2
    counts = {(each.kind, each.what): (each.count, each.nbytes) for each in found.collectives}
    assert counts == {
        ("all-reduce", "attention and MLP"): (2 * LAYERS, 8 * HIDDEN * 2),
        ("all-reduce", "rows of the table"): (1, 8 * HIDDEN * 2),
        ("all-gather", "logits"): (1, 8 * VOCAB * 2),
    }
    assert found.seconds < model.estimate(Layout(data=4), work).seconds


def test_sequence_splits_the_cache_only() -> None:
    model = CostModel(tiny_model(), topology("v5e:2x2"))
    work = Workload(batch=8, context=1000)
    whole, split = model.estimate(Layout(data=4), work), model.estimate(Layout(sequence=4), work)
    assert split.memory.parameters == whole.memory.parameters
    assert split.memory.cache == 8 * 1000 * LAYERS * 4 * KV_HEADS * DIM // 4
    assert {each.axis for each in split.collectives} == {"sequence"}


def test_sequence_splits_a_long_prompt_and_passes_it_round() -> None:
    model = CostModel(tiny_model(), topology("v5e:2x2"))
    work = Workload(batch=1, context=4096, new_tokens=4096)
    whole, split = model.estimate(Layout(data=4), work), model.estimate(Layout(sequence=4), work)
    for part in ("weights", "attention"):
        assert split.parts[part].operations == pytest.approx(whole.parts[part].operations / 4)
    counts = {each.what: (each.kind, each.count, each.nbytes) for each in split.collectives}
    own = 4096 // 4
    assert counts == {
        "new keys and values": ("collective-permute", 4 * LAYERS, own * 4 * KV_HEADS * DIM),
        "queries and partial attention": ("collective-permute", 4 * LAYERS, own * HEADS * (6 * DIM + 8)),
    }


def test_pipeline_reads_weights_once_a_stage() -> None:
    model = CostModel(tiny_model(), topology("v5e:2x2"))
    found = model.estimate(Layout(pipeline=4), Workload(batch=8, context=1000))
    layer = 2 * LAYER_WEIGHTS
    assert found.memory.parameters == layer + 2 * VOCAB * HIDDEN  # the ends are on two devices
    assert found.seconds == pytest.approx(4 * sum(part.seconds for part in found.parts.values()))
    assert [each.kind for each in found.collectives] == ["collective-permute"]


def test_choice_fits_and_says_why() -> None:
    model = CostModel(tiny_model(), topology("v5e:2x2"))
    work = Workload(batch=8, context=1000)
    choice = choose(model, work)
    assert choice.best.seconds == min(model.estimate(layout, work).seconds for layout in model.layouts())
    assert str(choice.best.layout) in choice.why and " ms" in choice.why
    for estimate in choice.fitting:
        most = model.largest_batch(estimate.layout, work)
        at_once = estimate.layout.data * estimate.layout.pipeline
        assert model.estimate(estimate.layout, dataclasses.replace(work, batch=most)).memory.fits
        assert not model.estimate(estimate.layout, dataclasses.replace(work, batch=most + at_once)).memory.fits
    assert choose(model, work, axes=("sequence",)).best.layout == Layout(sequence=4)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    model = CostModel(tiny_model(), topology("v5e:1x1"))
    with pytest.raises(ShardingError, match=r"needs \d+\.\d+ GiB a device.*has 16\.00 GiB.*at most \d+ fit"):
        choose(model, Workload(batch=10_000, context=1000))


def test_layouts_that_cannot_be() -> None:
    model = CostModel(tiny_model(), topology("v5e:4x4"))
    work = Workload(batch=1, context=10)
    with pytest.raises(ShardingError, match="tensor 4 needs 4 devices, but v5e:4x4 has 16"):
        model.estimate(Layout(tensor=4), work)
    with pytest.raises(ShardingError, match="8 heads cannot be divided over tensor = 16"):
        model.estimate(Layout(tensor=16), work)
    with pytest.raises(ShardingError, match="4 layers cannot be divided over pipeline = 16"):
        model.estimate(Layout(pipeline=16), work)
    with pytest.raises(ShardingError, match="16 devices cannot be divided over tensor for 8 heads, 2 KV heads"):
        choose(model, work, axes=("tensor",))
    with pytest.raises(ShardingError, match="axis 'expert' is not known"):
        Layout.of({"expert": 2})


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts"),
    [
        ("v5e:1x1", 1, 1, 1), ("v5e:2x4", 8, 8, 1), ("v5e:4x4", 16, 16, 4), ("v6e:16x16", 256, 256, 64),
        ("v5p:2x2x1", 4, 4, 1), ("v5p:4x4x4", 64, 64, 16), ("tpu7x:2x2x1", 4, 8, 1), ("h100:8", 8, 8, 1),
        ("a100-80gb:2x8", 16, 16, 2),
    ],
)  # fmt: skip
def test_topologies(name: str, chips: int, devices: int, hosts: int) -> None:
    found = topology(name)
    assert (found.num_chips, found.num_devices, found.num_hosts) == (chips, devices, hosts)
    assert (
        INTERCONNECTS[found.chip.name].source and found.device.memory_bytes * devices == found.chip.memory_bytes * chips
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:3x3", "v5e:3x3 does not exist; slices of v5e are 1x1, 2x2"),
        ("v5p:4x4", "v5p:4x4 does not exist"),
        ("v5p:4x4x6", "multiples of 4"),
        ("h100:9", "1 to 8 GPUs a server"),
        ("v9:2x2", "there is no chip 'v9'; there are v5e"),
        ("v5e", "expected a name such as v5e:4x4"),
    ],
)
def test_topologies_that_do_not_exist(name: str, said: str) -> None:
    with pytest.raises(ShardingError, match=said):
        topology(name)


def test_links_of_a_torus() -> None:
    """Docs: 400 GB/s of a v5e chip in both directions of four links, 1,200 of a v5p in those of six."""
    (whole,) = links(topology("v5p:4x4x4"), (64,))
    assert (whole.bandwidth, whole.hops) == (600e9, 6)  # rings in three dimensions
    assert whole.all_reduce_seconds(64e6) == pytest.approx(2 * 63e6 / 600e9)
    assert whole.all_reduce_seconds(1) == 2 * 6 * HOP_SECONDS
    outer, inner = links(topology("v5e:4x4"), (4, 4))
    assert outer == inner and inner.bandwidth == 50e9  # no ring of 4 in 2D
    (ring, _) = links(topology("v5e:16x16"), (16, 16))
    assert ring.bandwidth == 100e9
    inside, across = links(topology("h100:2x8"), (2, 8))[::-1]
    assert (inside.bandwidth, across.bandwidth) == (450e9, 50e9)
    assert links(topology("v5e:1x1"), (1,))[0].all_reduce_seconds(1e9) == 0

"""Decoders on the TPU's kernels, interpreted on a CPU: the self-check compares each with its forward."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import llmir_jax as llmir
from llmir_jax.models.llama import Llama, LlamaConfig
from llmir_jax.target_choice import TargetChoice

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_seq_len=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, 9),
)


@llmir.jit(target="tpu")
def forward(model: Llama, tokens: jnp.ndarray) -> jnp.ndarray:
    return model(tokens)


ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1, windows=(None,))


def decoder(page_size: int = 16, config: LlamaConfig = CONFIG, **options: object) -> llmir.Decoder:
    model = Llama(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    sizes = {"num_pages": max(4, 256 // page_size), "max_seqs": 3, "buckets": (3, 16), "burst": 0.0}
    return forward.decoder(model, page_size=page_size, interpret=True, **(sizes | options))


def test_served_by_the_kernel() -> None:
    served = decoder()
    report = served.report()
    assert report.self_check.startswith("passed")
    assert report.served_by["llm.attend_pages"] == report.served_by["llm.write_pages"]
    assert report.served_by["llm.attend_pages"].startswith("the Pallas kernel of ragged paged attention, interpreted")
    assert "reference" in report.served_by["llm.linear"]
    assert {group.row_width for group in served.cache_groups} == {128}
    prompts = [[1, 2, 3], list(range(20)), [7]]
    tokens = served.generate(prompts, llmir.SamplingParams(max_tokens=6, temperature=0.0))
    model = Llama(CONFIG, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    reference = llmir.jit(lambda model, tokens: model(tokens), target="reference").decoder(
        model, page_size=16, num_pages=16, max_seqs=3, buckets=(3, 16), verify=False
    )
    assert tokens == reference.generate(prompts, llmir.SamplingParams(max_tokens=6, temperature=0.0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"page_size": 4}, "page_size 4 is no multiple of 8"),
        ({"kv_cache": "int8"}, "page_size 16 is no multiple of 128, which int8 pages need"),
        ({"kv_cache": "int4"}, "pages are int4 with a float16 scale and a minimum for a head"),
    ],
)
def test_what_the_kernel_does_not_serve(options: dict[str, object], reason: str) -> None:
    report = decoder(config=ONE_LAYER, **options, verify=False).report()
    assert reason in report.served_by["llm.attend_pages"]
    assert "reference" in report.served_by["llm.attend_pages"]


def test_int8_pages_are_those_of_the_reference_decomposition() -> None:
    served, reference = (decoder(size, ONE_LAYER, kv_cache="int8") for size in (128, 16))
    title = served.report().served_by["llm.attend_pages"]
    assert title.startswith("the Pallas kernel of ragged paged attention, interpreted")
    assert "reference" in reference.report().served_by["llm.attend_pages"]
    (group,) = served.cache_groups
    assert group.nbytes == sum(array.nbytes for array in jax.tree.leaves(served._step.init_cache()))
    assert group.nbytes == 2 * 4 * 128 * (128 + 2 * 4)  # pages of 128 tokens, of 2 heads of 64 and their scales
    # both round as much against the forward, to a hundredth of that: what they attend to is the same integers
    errors = [each._check.error for each in (served, reference)]
    assert errors[0] > 1e-3
    assert abs(errors[0] - errors[1]) < 1e-2 * errors[0]
    prompts = [[1, 2, 3], list(range(20)), [7]]
    params = llmir.SamplingParams(max_tokens=6, temperature=0.0)
    assert served.generate(prompts, params) == reference.generate(prompts, params)


def test_quantized_products_have_a_kernel() -> None:
    report = decoder(config=ONE_LAYER, quantize={".*down.*": "int4-g32-min", ".*": "int8"}, buckets=(16,)).report()
    assert report.self_check.startswith("passed")
    assert report.served_by["llm.quantized_matmul"].startswith("the Pallas kernel of quantized matmul, interpreted")


def test_products_that_the_kernel_does_not_take() -> None:
    quantize = {".*up.*": "int8-g16", ".*": "int8"}
    served = decoder(config=ONE_LAYER, quantize=quantize, verify=False).report().served_by
    assert "groups of multiples of 32, got 16" in served["llm.quantized_matmul"]


def test_on_a_mesh_the_report_says_why_kernels_are_not_interpreted() -> None:
    notes = TargetChoice.of("tpu", platform="cpu", interpret=True, on_mesh=True).notes
    assert len(notes) == 1 and notes[0].startswith("no kernels on a mesh")
    assert not TargetChoice.of(None, platform="cpu", interpret=False, on_mesh=True).notes

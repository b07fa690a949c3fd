"""Derived steps lowered to a GPU's kernels, on a machine that has no GPU: what they call, and why not where not."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp

import llmir_jax as llmir
from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError
from llmir_jax.models.llama import Llama, LlamaConfig
from llmir_jax.pipeline import text_of
from llmir_jax.target_choice import TargetChoice
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_quantization import KVCacheQuantizationPass
from llmir_jax.transforms.lower_to_gpu import LowerToGpuPass
from llmir_jax.transforms.specialize_tokens import SpecializeTokensPass
from pallas_kernels.chips import chip_named
from pallas_kernels.paged_attention.mosaic_gpu import LEAST_JAX

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-triton and JAX's CUDA plugin, which need no GPU",
)
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, 9),
)


def derived(config: LlamaConfig = CONFIG, **options: object) -> ModuleOp:
    """The step over pages, at the length it was derived at."""
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    forward = llmir.jit(lambda model, tokens: model(tokens), target="reference")
    decoder = forward.decoder(model, page_size=16, num_pages=16, max_seqs=3, verify=False, **options)
    return decoder._step.derived_module.clone()


@needs_plugin
def test_both_layers_call_the_kernel() -> None:
    module = derived()
    lower = LowerToGpuPass(max_tokens=16, chip="t4")
    assert lower.unserved(module) == {}
    served = lower.kernel_pages(module)
    assert len(served) == 4  # keys and values of two layers
    SpecializeTokensPass(tokens=16).apply(Context(), module)
    lower.apply(Context(), module)
    module.verify()
    text = text_of(module)
    assert text.count("@triton_kernel_call_ffi") == 2  # one has a window
    assert "llm." not in text.replace("llmir.", "")
    pages = [main_function(module).body.block.args[index].type for index in served]
    assert {str(kind) for kind in pages} == {"tensor<16x16x32xbf16>"}


@pytest.mark.skipif(jax.__version_info__ < LEAST_JAX, reason="needs the Mosaic GPU of a later JAX")
def test_attention_by_mosaic_gpu_where_it_is_asked_for() -> None:
    module = derived(replace(CONFIG, head_dim=64))
    lower = LowerToGpuPass(max_tokens=16, chip="h100", attention="mosaic_gpu")
    assert lower.unserved(module) == {}
    assert lower.titles()["llm.attend_pages"].startswith("the Mosaic GPU kernel of ragged paged attention, for h100")
    SpecializeTokensPass(tokens=16).apply(Context(), module)
    lower.apply(Context(), module)
    module.verify()
    text = text_of(module)
    assert text.count("@mosaic_gpu_v2") == 2  # one has a window
    assert "@triton_kernel_call_ffi" not in text


def test_mosaic_gpu_is_for_what_it_is_sound_for() -> None:
    module = derived()
    triton, mosaic = (LowerToGpuPass(max_tokens=16, chip="b200", attention=name) for name in ("triton", "mosaic_gpu"))
    assert triton.key != mosaic.key
    (reason,) = mosaic.unserved(module)["llm.attend_pages"]
    assert reason == "b200 is of compute capability 10.0, Mosaic GPU's kernel is for 9.0"
    with pytest.raises(InvalidIRError, match="attention must be triton or mosaic_gpu, got 'cudnn'"):
        LowerToGpuPass(max_tokens=16, attention="cudnn").unserved(module)


@pytest.mark.parametrize(("target", "attention"), [(None, "triton"), ("gpu", "triton"), ("gpu-mosaic", "mosaic_gpu")])
def test_the_target_chooses_the_kernel_of_attention(
    target: str | None, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmir_jax.target_choice.kernels_for", lambda device: chip_named("h100"))
    choice = TargetChoice.of(target, platform="gpu", interpret=False, on_mesh=False)
    assert choice.kernels == LowerToGpuPass(chip="h100", attention=attention)


@needs_plugin
def test_int8_pages_are_integers_and_scales_as_the_kernel_reads_them() -> None:
    module = derived()
    KVCacheQuantizationPass(bits=8, target="gpu").apply(Context(), module)
    lower = LowerToGpuPass(max_tokens=16, chip="t4")
    assert lower.unserved(module) == {}
    assert len(lower.kernel_pages(module)) == 4
    SpecializeTokensPass(tokens=16).apply(Context(), module)
    lower.apply(Context(), module)
    module.verify()
    assert text_of(module).count("@triton_kernel_call_ffi") == 2
    main = main_function(module)
    pages = [str(arg.type) for role in ("k_pages", "v_pages") for arg in signature.arguments(main, role)]
    assert pages == ["tensor<16x16x32xi8>", "tensor<16x2x16xf32>"] * 4


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (CONFIG, {"kv_cache": "int4"}, "pages are int4 with a float16 scale and a minimum"),
        (replace(CONFIG, head_dim=320), {}, "head_dim 320 is larger than 256"),
    ],
)
def test_what_no_kernel_serves_is_said(config: LlamaConfig, options: dict[str, object], reason: str) -> None:
    unserved = LowerToGpuPass(max_tokens=16).unserved(derived(config, **options))
    ((text, count),) = unserved["llm.attend_pages"].items()
    assert reason in text
    assert count == 2


def test_attention_over_pages_of_no_write_is_said() -> None:
    module = derived()
    first = next(op for op in main_function(module).body.block.ops if isinstance(op, llm.AttendPagesOp))
    write = first.k_pages.owner
    assert isinstance(write, llm.WritePagesOp)
    first.operands[list(first.operands).index(first.v_pages)] = write.v_pages
    found = LowerToGpuPass().unserved(module)["llm.attend_pages"]
    assert found == {"its keys and values are not of one write": 1}


@needs_plugin
@pytest.mark.parametrize("scheme", ["int8", "int4-g32-min", "int4-g32-a8"])
def test_quantized_products_call_their_kernel(scheme: str) -> None:
    module = derived(replace(CONFIG, intermediate_size=64), quantize=scheme)
    lower = LowerToGpuPass(max_tokens=16, chip="h100")
    assert lower.unserved(module) == {}
    SpecializeTokensPass(tokens=16).apply(Context(), module)
    lower.apply(Context(), module)
    module.verify()
    assert text_of(module).count("@triton_kernel_call_ffi") > 2  # two are attention


def test_chips_of_other_targets_are_refused() -> None:
    with pytest.raises(InvalidIRError, match=r"lower-to-gpu: chip must be a GPU, got 'v5e'"):
        LowerToGpuPass(chip="v5e").unserved(derived())

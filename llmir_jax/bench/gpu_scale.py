"""What `gpu_check` runs: sizes for a GPU, and the same on a small scale for a machine without one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmir_jax.bench.gpu_flash import LONGEST
from llmir_jax.bench.shapes import SHAPES
from llmir_jax.models.llama import LlamaConfig
from pallas_kernels.flash_attention import arg_specs as flash
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.paged_attention.types import Masking
from pallas_kernels.quantized_matmul import arg_specs as products

GIB = 2**30
LLAMA_8B = replace(
    SHAPES["llama-3.2-1b"],
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    head_dim=128,
    windows=(None,) * 32,
    tie_embeddings=False,
)
"""https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json"""
FORMATS = (("int4-g32", 4, 32), ("int4-g64", 4, 64), ("int4-g128", 4, 128), ("int8", 8, None))
"""Names, bits and groups of weights whose products are timed."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    interpret: bool
    specs: tuple[ArgSpec, ...]
    products: tuple[products.ArgSpec, ...]
    flash: tuple[flash.ArgSpec, ...]
    copy_bytes: int
    matmul_size: int
    iterations: int
    decode: ArgSpec
    prefill: ArgSpec
    rows: tuple[int, ...]
    """Of products with quantized weights: decoding, and a prompt."""
    weight: tuple[int, int]
    """Outputs and inputs of such a weight."""
    weight_copies: int
    """So many are multiplied in turn, so that none is found in a cache."""
    models: tuple[tuple[str, LlamaConfig], ...]
    new_tokens: int
    max_seqs: int


def full(dtype: str) -> Scale:
    """What a GPU is measured with; 16-bit shapes in `dtype`."""
    decode = next(spec for spec in SPECS if spec.name == "llama-3-8b-decode")
    llama = replace(decode, seq_len=4096, dtype=dtype, page_dtype=dtype)
    return Scale(
        interpret=False,
        specs=(*SPECS, replace(decode, name="llama-3-8b-decode-float16", dtype="float16", page_dtype="float16")),
        products=products.SPECS,
        flash=tuple(replace(spec, seq_len=min(spec.seq_len, LONGEST)) for spec in flash.SPECS),
        copy_bytes=GIB,
        matmul_size=8192,
        iterations=20,
        decode=replace(llama, num_tokens=64, num_seqs=64),
        prefill=replace(llama, name="llama-3-8b-prefill", num_tokens=4096, num_seqs=1),
        rows=(1, 16, 64, 512),
        weight=(14_336, 4096),  # gate of Llama 3.1 8B: 29 MB in int4, of which 8 are more than any L2
        weight_copies=8,
        models=(("1B", SHAPES["llama-3.2-1b"]), ("8B", LLAMA_8B)),
        new_tokens=128,
        max_seqs=64,
    )


def dry() -> Scale:
    """The same on a small scale."""
    small = ArgSpec(
        name="small",
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_tokens=3,
        num_seqs=3,
        seq_len=32,
        page_size=8,
        dtype="float32",
        page_dtype="float32",
    )
    tiny = replace(
        SHAPES["llama-3.2-1b"],
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        windows=(None,) * 2,
    )
    product = products.ArgSpec(name="small", m=3, n=40, k=128, bits=4, group_size=32, kind="minima", x_dtype="float32")
    rounded = replace(product, name="small-a8", m=17, bits=8, kind="symmetric", activation_group_size=64)
    return Scale(
        interpret=True,
        specs=(
            small,
            replace(small, name="small-int8", page_dtype="int8", num_tokens=9),
            replace(small, name="small-bfloat16", head_dim=64, dtype="bfloat16", page_dtype="bfloat16"),
        ),
        products=(product, rounded),
        flash=(flash.ArgSpec(name="small", num_heads=4, num_kv_heads=2, head_dim=16, seq_len=20, dtype="float32"),),
        copy_bytes=2**20,
        matmul_size=64,
        iterations=2,
        decode=small,
        prefill=replace(small, name="small-prefill", num_tokens=16, num_seqs=1),
        rows=(1, 3),
        weight=(192, 128),
        weight_copies=2,
        models=(("tiny", tiny),),
        new_tokens=4,
        max_seqs=2,
    )


def timed_products(scale: Scale, dtype: str) -> Iterator[products.ArgSpec]:
    """Every format, symmetric and with zero points, with every number of rows."""
    n, k = scale.weight
    for name, bits, group_size in FORMATS:
        for kind, asymmetric in (("symmetric", ""), ("zero_points", ", zero points")):
            for m in scale.rows:
                yield products.ArgSpec(
                    name=f"{name}{asymmetric}",
                    m=m,
                    n=n,
                    k=k,
                    bits=bits,
                    group_size=group_size,
                    kind=kind,
                    x_dtype=dtype,
                )


def masking_of(spec: ArgSpec) -> Masking:
    """Causal, with what else the model has."""
    return Masking(scale=spec.head_dim**-0.5, window=spec.window, softcap=spec.softcap)


def arguments_of(spec: ArgSpec) -> tuple[Any, ...]:
    """A full batch: single tokens of all sequences but the last, which has all other rows; contexts of many lengths."""
    last = min(spec.num_tokens - spec.num_seqs + 1, spec.seq_len)
    query_lens = [1] * (spec.num_seqs - 1) + [last]
    seq_lens = [max(n, spec.seq_len * (i + 1) // spec.num_seqs) for i, n in enumerate(query_lens)]
    return random_arguments(spec, seq_lens, query_lens)


__all__ = ["FORMATS", "GIB", "LLAMA_8B", "Scale", "arguments_of", "dry", "full", "masking_of", "timed_products"]

"""Attention to pages and the writing of them against their reference, on ragged batches between guard pages."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from cpu_harness import hosts, native_assembly, parse, run_native, run_reference

from llmir_jax.quantization import parse_scheme, quantize
from llmir_jax.targets.cpu.host import KNOWN_HOSTS


@dataclass(frozen=True, kw_only=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    value_dim: int = 16
    page_size: int = 4
    tokens: tuple[int, ...] = (1, 1, 1)  # new ones of each sequence
    before: tuple[int, ...] = (5, 0, 40)  # tokens in the cache
    padding: int = 0
    attributes: str = ""
    slopes: bool = False
    bits: int | None = None  # of pages of integers
    dtype: str = "float32"  # of the pages

    @property
    def name(self) -> str:
        tokens = "+".join(map(str, self.tokens))
        sizes = f"{self.heads}x{self.kv_heads}x{self.dim}-ps{self.page_size}-{tokens}"
        return f"{sizes}{self.attributes}-int{self.bits}-{self.dtype}"


CASES = [
    Case(),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1,), before=(99,)),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 0, 1), before=(200, 0, 15), padding=3),
    Case(heads=1, kv_heads=1, dim=8, value_dim=24, page_size=5, tokens=(7, 2, 1), before=(0, 3, 33), padding=1),
    Case(heads=6, kv_heads=1, dim=20, value_dim=12, page_size=2, tokens=(3, 3, 3)),
    Case(heads=8, kv_heads=8, dim=128, value_dim=128, page_size=32, tokens=(2, 1), before=(31, 64)),
    Case(tokens=(4, 5, 6), attributes=", window = 7 : i64"),
    Case(heads=3, kv_heads=3, dim=32, value_dim=32, page_size=16, attributes=", window = 3 : i64", before=(5, 0, 90)),
    Case(tokens=(2, 1, 5), attributes=", softcap = 3.0 : f32"),
    Case(tokens=(2, 1, 5), slopes=True, attributes=", softcap = 5.0 : f32, window = 30 : i64"),
    Case(tokens=(1, 3), before=(2, 6), attributes=", causal = false"),
    Case(heads=2, kv_heads=1, dim=9, value_dim=7, page_size=3, tokens=(1, 2, 0)),
    Case(bits=8, tokens=(3, 1, 2)),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 2), before=(70, 4), bits=8, padding=1),
    Case(heads=2, kv_heads=2, dim=20, value_dim=36, page_size=5, tokens=(1, 1), before=(7, 0), bits=8),
    Case(bits=4, tokens=(3, 1, 2), before=(5, 0, 40)),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 2), before=(70, 4), bits=4, padding=1),
    Case(heads=2, kv_heads=2, dim=10, value_dim=36, page_size=5, tokens=(1, 1), before=(7, 0), bits=4),
    Case(tokens=(0, 0), before=(4, 4), padding=2),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 2), before=(70, 4), dtype="bfloat16"),
    Case(heads=2, kv_heads=1, dim=9, value_dim=7, page_size=3, tokens=(1, 2, 0), dtype="bfloat16"),
    Case(tokens=(3, 1, 2), dtype="float16", attributes=", window = 7 : i64"),
    # prompts: tiles of tokens, short runs between them
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(53,), before=(0,), padding=11),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(17, 1, 40), before=(30, 200, 0), padding=6),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 40, 1), before=(200, 0, 300)),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(1, 20, 1, 33), before=(90, 5, 100, 60)),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(33, 3), before=(5, 7), bits=8),
    Case(heads=1, kv_heads=1, dim=8, value_dim=24, page_size=5, tokens=(70, 2, 9), before=(0, 3, 33), padding=1),
    Case(heads=6, kv_heads=1, dim=20, value_dim=12, page_size=2, tokens=(20, 1, 31), before=(3, 4, 0)),
    Case(heads=8, kv_heads=8, dim=128, value_dim=128, page_size=32, tokens=(40, 9), before=(31, 64)),
    Case(heads=2, kv_heads=1, dim=9, value_dim=7, page_size=3, tokens=(19, 2, 16)),
    Case(tokens=(40, 50, 6), attributes=", window = 7 : i64"),
    Case(heads=4, kv_heads=1, dim=160, value_dim=36, tokens=(17, 9), attributes=", window = 30 : i64", before=(0, 80)),
    Case(tokens=(20, 1, 50), slopes=True, attributes=", softcap = 5.0 : f32, window = 30 : i64"),
    Case(tokens=(20, 13), before=(2, 36), attributes=", causal = false"),
    Case(tokens=(20, 13), before=(2, 36), attributes=", causal = false, window = 9 : i64"),
    Case(heads=2, kv_heads=2, dim=20, value_dim=36, page_size=5, tokens=(15, 18), before=(7, 0), bits=8),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(33, 3), before=(5, 7), bits=4),
    Case(heads=2, kv_heads=1, dim=10, value_dim=6, page_size=3, tokens=(19, 2, 16), bits=4),
    Case(heads=9, kv_heads=3, dim=64, value_dim=64, page_size=16, tokens=(33, 3), before=(5, 7), dtype="bfloat16"),
    Case(tokens=(40, 50, 6), attributes=", window = 7 : i64", dtype="float16"),
]


def rounding_one_way(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Rows whose scales (and minima) float16 holds, of numbers that are nearer to one integer than to any other.

    XLA may divide by 15 as it pleases: a scale in the middle between two of float16 would be either.
    """
    low, high = (0, 15) if bits == 4 else (-127, 127)
    integers = rng.integers(low + 1, high, shape) + rng.uniform(-0.4, 0.4, shape)
    integers[..., 0] = high
    if bits == 4:
        integers[..., 1] = low
    steps = 256 if bits == 4 else 2048  # so that numbers are of about 1
    scale, least = rng.integers(1, 64, (*shape[:-1], 1)) / steps, rng.integers(-64, 64, (*shape[:-1], 1)) / 64
    return rng.permuted(integers, axis=-1) * scale + (least if bits == 4 else 0)


def build(case: Case, seed: int):
    rng = np.random.default_rng(seed)
    num_seqs = len(case.tokens)
    lengths = [a + b for a, b in zip(case.tokens, case.before, strict=False)]
    per_seq = max(1, -(-max(lengths) // case.page_size))
    num_pages = num_seqs * per_seq + 1
    rows = sum(case.tokens) + case.padding
    tables = rng.permutation(num_pages)[: num_seqs * per_seq].reshape(num_seqs, per_seq)
    seq_ids = np.concatenate([np.repeat(np.arange(num_seqs), case.tokens), np.zeros(case.padding)])
    chunks = [b + np.arange(t) for t, b in zip(case.tokens, case.before, strict=False)]
    positions = np.concatenate([*chunks, np.zeros(case.padding)])
    arrays = {
        "k_pages": rng.normal(size=(num_pages, case.page_size, case.kv_heads, case.dim)),
        "v_pages": rng.normal(size=(num_pages, case.page_size, case.kv_heads, case.value_dim)),
        "q": rng.normal(size=(rows, case.heads, case.dim)),
        "k": rng.normal(size=(rows, case.kv_heads, case.dim)),
        "v": rng.normal(size=(rows, case.kv_heads, case.value_dim)),
        "block_tables": tables,
        "seq_lens": np.array([n if t else 0 for n, t in zip(lengths, case.tokens, strict=False)]),
        "seq_ids": seq_ids,
        "positions": positions,
        "num_tokens": np.array(sum(case.tokens)),
        "slopes": rng.random(size=case.heads),
    }
    if case.bits is not None:
        arrays |= {name: rounding_one_way(rng, arrays[name].shape, case.bits) for name in ("k", "v")}
    kinds, values = {}, []
    for name, array in arrays.items():
        is_int = name in ("block_tables", "seq_lens", "seq_ids", "positions", "num_tokens")
        dtype = case.dtype if name.endswith("_pages") else "int32" if is_int else "float32"
        values.append(array.astype(jnp.dtype(dtype)))
        element = {"int32": "i32", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        kinds[name] = f"tensor<{''.join(f'{n}x' for n in array.shape)}{element}>"
        if case.bits is not None and name.endswith("_pages"):
            sizes = "x".join(map(str, array.shape))
            scales = rng.random(size=(*array.shape[:-1], 1)).astype(np.float16) / 64
            if case.bits == 8:
                values[-1] = rng.integers(-127, 128, array.shape).astype(np.int8), scales
                kinds[name] = f"!llm.quantized_tensor<{sizes}xi8, scale=f16, symmetric=true>"
                continue
            packed = rng.integers(0, 256, (*array.shape[:-1], array.shape[-1] // 2)).astype(np.uint8)
            values[-1] = packed, scales, rng.normal(size=scales.shape).astype(np.float16)
            kinds[name] = f"!llm.quantized_tensor<{sizes}xi4, scale=f16, min=f16>"
    arguments = ", ".join(f'%{name}: {kind} {{llmir.role = "{name}"}}' for name, kind in kinds.items())
    pages = f"{kinds['k_pages']}, {kinds['v_pages']}"
    ints = ", ".join(kinds[name] for name in ("block_tables", "seq_lens", "seq_ids", "positions", "num_tokens"))
    out = f"tensor<{rows}x{case.heads}x{case.value_dim}xf32>"
    slopes, slopes_kind = (" slopes(%slopes)", f", {kinds['slopes']}") if case.slopes else ("", "")
    text = f"""func.func @main({arguments}) -> ({out}, {pages}) {{
      %kp, %vp = llm.write_pages %k_pages, %v_pages, %k, %v, %seq_ids, %positions, %block_tables, %num_tokens
        : ({pages}, {kinds["k"]}, {kinds["v"]}, {kinds["seq_ids"]}, {kinds["positions"]}, {kinds["block_tables"]},
           tensor<i32>) -> ({pages})
      %o = llm.attend_pages %q, %kp, %vp, %block_tables, %seq_lens, %seq_ids, %positions, %num_tokens{slopes}
        {{scale = 0.3 : f32{case.attributes}}} : ({kinds["q"]}, {pages}, {ints}{slopes_kind}) -> {out}
      func.return %o, %kp, %vp : {out}, {pages}
    }}"""
    return parse(text), values


def assert_close(got: list[np.ndarray], expected: list[np.ndarray], live: int) -> None:
    """Outputs of the first `live` rows, and pages, which are equal; of 4 bits, what lies between two may be either."""
    is_same = True
    for pages, other in zip(got[1:], expected[1:], strict=True):
        if pages.dtype != np.uint8:
            np.testing.assert_array_equal(pages, other)
            continue
        steps = np.stack([(pages & 15, other & 15), (pages >> 4, other >> 4)]).astype(int)
        steps = np.abs(steps[:, 0] - steps[:, 1])
        assert steps.max() <= 1 and steps.sum() <= 3
        is_same &= not steps.any()
    np.testing.assert_allclose(got[0][:live], expected[0][:live], rtol=0, atol=2e-5 if is_same else 0.1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(case: Case) -> None:
    module, values = build(case, seed=int(np.random.default_rng().integers(1 << 30)))
    expected, got = run_reference(module, values), run_native(module, values, repeats=3)
    live = sum(case.tokens)
    assert np.isfinite(got[0]).all()
    assert_close(got, expected, live)


@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.dot)
def test_tiles_by_every_instruction_set(host) -> None:
    case = Case(heads=6, kv_heads=2, dim=20, value_dim=12, tokens=(9, 21, 2), padding=2)
    module, values = build(case, seed=int(np.random.default_rng().integers(1 << 30)))
    expected, got = run_reference(module, values), run_native(module, values, host=host)
    np.testing.assert_allclose(got[0][: sum(case.tokens)], expected[0][: sum(case.tokens)], rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows, live", [(1, 1), (9, 4), (16, 16), (40, 13), (150, 97), (131, 131), (20, 0)])
def test_rows_of_padding_are_not_computed(rows: int, live: int) -> None:
    """A product from tokens, then attention, then the rows that are wanted: those are right, whatever padding has."""
    rng = np.random.default_rng()
    heads, dim, k, num_pages, page_size = 4, 16, 96, 12, 16
    weight = quantize(rng.normal(size=(heads * dim, k)).astype(np.float32), parse_scheme("int4-g32-min"))
    x, flat, q = f"tensor<{rows}x{k}xf32>", f"tensor<{rows}x{heads * dim}xf32>", f"tensor<{rows}x{heads}x{dim}xf32>"
    pages, ints = f"tensor<{num_pages}x{page_size}x{heads}x{dim}xf32>", f"tensor<{rows}xi32>"
    activations = "bits = 4 : i32, transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32"
    roles = {
        "tokens": x,
        "kp": pages,
        "vp": pages,
        "block_tables": f"tensor<1x{num_pages}xi32>",
        "seq_lens": "tensor<1xi32>",
        "seq_ids": ints,
        "positions": ints,
        "num_tokens": "tensor<i32>",
    }
    arguments = ", ".join(f'%{name}: {kind} {{llmir.role = "{name}"}}' for name, kind in roles.items())
    batch = "%block_tables, %seq_lens, %seq_ids, %positions, %num_tokens"
    kinds = ", ".join(roles[name.strip(" %")] for name in batch.split(","))
    text = f"""func.func @main(%w: {weight.ir_type()} {{llmir.path = "w"}}, {arguments}) -> ({flat}, {flat}) {{
      %p = llm.quantized_matmul %tokens, %w {{{activations}}} : ({x}, {weight.ir_type()}) -> {flat}
      %s = stablehlo.add %p, %p : {flat}
      %q = stablehlo.reshape %s : ({flat}) -> {q}
      %o = llm.attend_pages %q, %kp, %vp, {batch} {{scale = 0.3 : f32}} : ({q}, {pages}, {pages}, {kinds}) -> {q}
      %r = stablehlo.reshape %o : ({q}) -> {flat}
      func.return %r, %s : {flat}, {flat}
    }}"""
    text = text.replace("llm.quantized_matmul %tokens, %w", "llm.quantized_matmul(%tokens, %w)")
    shape = (num_pages, page_size, heads, dim)
    inputs = rng.integers(-127, 128, (rows, k)) / 64  # with 127 in each group, none lies between two integers
    inputs[:, ::32] = 127 / 64
    values = [weight, inputs, rng.normal(size=shape), rng.normal(size=shape)]
    values[1:] = [value.astype(np.float32) for value in values[1:]]
    values += [np.arange(num_pages)[None], [live], np.zeros(rows), np.arange(rows), live]
    values[4:] = [np.array(value, np.int32) for value in values[4:]]
    module = parse(text)
    expected, got = run_reference(module, values), run_native(module, values, repeats=2)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a[:live], b[:live], rtol=0, atol=3e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", KNOWN_HOSTS)
def test_compiles_for(name: str) -> None:
    module, _ = build(Case(tokens=(20, 1, 1)), seed=0)
    assert native_assembly(module, KNOWN_HOSTS[name])

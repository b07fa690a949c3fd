"""The llm dialect: round trips, constructors, equality of types, hexadecimal floats; and llmir-opt on bad input."""

import io
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from jaxlib.mlir import ir
from xdsl.dialects.builtin import FunctionType, IntegerType, ModuleOp, Signedness, TensorType, bf16, f16, f32, i8, i32
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Block, Region
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from llmir_jax.cli import opt
from llmir_jax.dense import dense_from_numpy, dense_to_numpy
from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.interop import make_context
from llmir_jax.transforms import PASSES, all_passes

i4 = IntegerType(4)
FOLDER = Path(__file__).parent / "filecheck" / "llm"
VALID = sorted(path for path in FOLDER.glob("*.mlir") if not path.stem.endswith("invalid"))


def parse(text: str) -> ModuleOp:
    context = make_context()
    context.load_dialect(llm.LLM)
    module = IRParser(context, text).parse_module()
    module.verify()
    return module


def generic(module: ModuleOp) -> str:
    stream = io.StringIO()
    Printer(stream, print_generic_format=True).print_op(module)
    return stream.getvalue()


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_printed_forms_parse_to_the_same_module(path: Path) -> None:
    module = parse(path.read_text())
    for text in (str(module), generic(module)):
        again = parse(text)
        assert again.is_structurally_equivalent(module)
        assert str(again) == str(module)


def test_every_op_and_type_is_in_the_ir_tests_and_documented() -> None:
    valid = "\n".join(path.read_text() for path in VALID)
    invalid = "\n".join(path.read_text() for path in FOLDER.glob("*_invalid.mlir"))
    for definition in [*llm.LLM.operations, *llm.LLM.attributes]:
        assert re.search(rf"\b{re.escape(definition.name)}\b", valid), definition.name
        assert re.search(rf"CHECK: .*{re.escape(definition.name)}\b", invalid), definition.name
        assert definition.__doc__ and definition.name in definition.__doc__, definition.name
    assert set(llm.__all__) >= {definition.__name__ for definition in [*llm.LLM.operations, *llm.LLM.attributes]}


def test_types_differ_in_every_parameter() -> None:
    sizes = (12, 16, 64, 16, 4096)
    types: list[Attribute] = [llm.PagedKVCacheType(f16, *sizes), llm.PagedKVCacheType(bf16, *sizes)]
    types += [llm.PagedKVCacheType(f16, *(n + (i == j) for j, n in enumerate(sizes))) for i in range(5)]
    types += [llm.ShardedKVCacheType(f16, *sizes, shards) for shards in (1, 2)]
    types += [
        llm.QuantizedTensorType([4, 8], i8, f32),
        llm.QuantizedTensorType([4, 8], i8, f32, group_size=4),
        llm.QuantizedTensorType([4, 8], i8, f32, zero_point_type=i8),
        llm.QuantizedTensorType([4, 8], i8, f32, min_type=f32),
        llm.QuantizedTensorType([4, 8], i4, f32),
        llm.QuantizedTensorType([4, 8], i8, f16),
        llm.MixedQuantizedTensorType([4, 8], llm.MixedType(i8, i4), f32),
    ]
    types += [llm.ShardedTensorType(TensorType(f16, [8, 8]), *where) for where in ((0, 2, 0), (1, 2, 0), (1, 2, 1))]
    assert len(set(types)) == len(types)
    assert len({str(type_) for type_ in types}) == len(types)
    assert llm.PagedKVCacheType(f16, *sizes) == llm.PagedKVCacheType(f16, *sizes)


def test_parts_of_types() -> None:
    assert llm.QuantizedTensorType([4, 8], i4, f16, min_type=f32, group_size=4).parts() == (
        TensorType(IntegerType(8, Signedness.UNSIGNED), [4, 4]),  # two in a byte
        TensorType(f16, [4, 2]),
        TensorType(f32, [4, 2]),
    )
    assert llm.MixedQuantizedTensorType([4, 8], llm.MixedType(i8, i4), f32).parts() == (
        TensorType(i8, [4, 8]),
        TensorType(f32, [4, 1]),
    )
    assert llm.ShardedTensorType(TensorType(f16, [8, 6]), 1, 2, 0).parts() == (TensorType(f16, [8, 3]),)
    assert llm.ShardedKVCacheType(f16, 2, 3, 8, 4, 32, 4).parts() == (TensorType(f16, [2, 8, 3, 8]),) * 2
    assert llm.PagedKVCacheType(f16, 1, 1, 8, 4, 30).blocks_per_seq == 8


def _arguments(*types: Attribute) -> Block:
    return Block(arg_types=types)


def test_constructors_make_ops_that_verify() -> None:
    """Every op's constructor, on the shapes of one small model."""
    cache = llm.PagedKVCacheType(f16, 2, 2, 16, 4, 30)
    sharded = llm.ShardedKVCacheType(f16, 2, 2, 16, 4, 32, 2)
    weight = llm.QuantizedTensorType([48, 32], i4, f32, min_type=f32, group_size=8)
    types: dict[str, Attribute] = {
        "q": TensorType(f32, [7, 8, 16]),
        "q1": TensorType(f32, [4, 8, 16]),
        "k": TensorType(f32, [7, 2, 16]),
        "ck": TensorType(f32, [4, 30, 2, 16]),
        "slopes": TensorType(f32, [8]),
        "ids": TensorType(i32, [7]),
        "pages": TensorType(bf16, [32, 4, 2, 16]),
        "tables": TensorType(i32, [4, 8]),
        "lens": TensorType(i32, [4]),
        "n": TensorType(i32, []),
        "cache": cache,
        "sharded": sharded,
        "x": TensorType(f32, [6, 32]),
        "c": TensorType(f32, [32]),
        "cos": TensorType(f32, [7, 4]),
        "w": TensorType(f32, [32, 48]),
        "down": TensorType(f32, [48, 32]),
        "wq": weight,
        "x8": TensorType(i8, [6, 32]),
    }
    block = _arguments(*types.values())
    a = dict(zip(types, block.args, strict=True))
    tokens = {"seq_ids": a["ids"], "positions": a["ids"]}
    step = {**tokens, "num_tokens": a["n"]}
    q_type, x_type = a["q"].type, a["x"].type
    wide = TensorType(f32, [6, 48])
    attention = {"scale": 0.25, "window": 8, "softcap": 30.0, "slopes": a["slopes"], "result_type": q_type}
    part = {"shard_dim": 1, "num_shards": 4, "shard_id": 3}
    ops = [
        llm.AttentionOp(a["q"], a["k"], a["k"], **attention),
        llm.AttentionOp(a["q"], a["ck"], a["ck"], causal=False, **attention, **tokens),
        llm.WritePagesOp(a["pages"], a["pages"], a["k"], a["k"], block_tables=a["tables"], **step),
        llm.AttendPagesOp(
            a["q"], a["pages"], a["pages"], block_tables=a["tables"], seq_lens=a["lens"], **step, **attention
        ),
        llm.AppendKVOp(a["cache"], a["k"], a["k"], a["ids"]),
        llm.AppendKVOp(
            a["cache"],
            a["k"],
            a["k"],
            a["ids"],
            layer=1,
            positions=a["ids"],
            block_tables=a["tables"],
            num_tokens=a["n"],
        ),
        llm.LookupKVOp(a["cache"], a["tables"], layer=1),
        llm.PagedAttentionOp(a["q1"], a["cache"], a["tables"], a["lens"], result_type=a["q1"].type, scale=0.25),
        llm.PagedAttentionOp(a["q"], a["cache"], a["tables"], a["lens"], layer=1, **step, **attention),
        llm.RMSNormOp(a["x"], a["c"], epsilon=1e-5, offset=1.0),
        llm.LayerNormOp(a["x"], a["c"], a["c"], epsilon=1e-5),
        llm.RopeOp(a["q"], a["cos"], a["cos"], rotary_dim=8, interleaved=True),
        llm.LinearOp(a["x"], a["w"], result_type=wide),
        llm.LinearOp(a["x"], a["down"], result_type=wide, transpose_w=True),
        llm.GatedMLPOp(a["x"], a["w"], a["w"], a["down"], result_type=x_type, activation="silu"),
        llm.QuantizeOp(a["x"], result_type=TensorType(i8, [6, 32]), scale=0.1),
        llm.QuantizeOp(a["x"], result_type=llm.QuantizedTensorType([6, 32], i4, f32)),
        llm.QuantizeOp(
            a["x"], result_type=llm.MixedQuantizedTensorType([6, 32], llm.MixedType(i8, i4), f32), wide_rows=[5]
        ),
        llm.DequantizeOp(a["x8"], result_type=x_type, scale=dense_from_numpy(np.full(32, 0.1, np.float32))),
        llm.DequantizeOp(a["wq"], result_type=TensorType(f32, [48, 32])),
        llm.ObserveOp(a["x"], "absmax", result_type=TensorType(f32, [32])),
        llm.QuantizedGatherOp(a["wq"], a["lens"], result_type=TensorType(f32, [4, 32])),
        llm.QuantizedMatmulOp(a["x"], a["wq"], result_type=wide, transpose_w=True),
        llm.QuantizedMatmulOp(a["x"], a["x8"], a["lens"], result_type=wide),
        llm.ShardedLinearOp(a["x"], a["w"], result_type=TensorType(f32, [6, 12]), **part),
        llm.AllGatherOp(a["x"], dim=1, group_size=2),
        llm.AllReduceOp(a["x"], reduction="sum", group_size=2),
        llm.ReduceScatterOp(a["x"], dim=1, group_size=2),
        llm.PipelineStageOp(a["x"], stage_id=0, num_stages=2),
        llm.PipelineSendOp(a["x"], dest_stage=1),
        llm.PipelineRecvOp(source_stage=0, result_type=x_type),
        llm.SequenceParallelAttentionOp(
            a["q"], a["k"], a["k"], result_type=q_type, seq_start=0, seq_length=7, total_length=7
        ),
        llm.DistributedAttentionOp(a["q"], a["sharded"], a["n"], result_type=q_type, scale=0.25),
        llm.CostAnnotationOp(a["x"], compute_flops=1, memory_bytes=2, communication_bytes=3),
    ]
    assert {type(op) for op in ops} == set(llm.LLM.operations)
    bad_shapes = next(op for op in ops if isinstance(op, llm.QuantizedMatmulOp) and op.scales is not None)
    ops.remove(bad_shapes)
    with pytest.raises(VerifyException, match=r"llm\.quantized_matmul: scales: expected floating-point elements"):
        bad_shapes.verify()
    block.add_ops(ops)
    for op in ops:
        op.verify()
    module = ModuleOp([FuncOp("f", FunctionType.from_lists(list(types.values()), []), Region(block))])
    text = str(module)
    # the body has no terminator: give it one to read it back
    assert str(parse(text[: text.rindex("  }")] + "  func.return\n  }\n}")).count("llm.") == text.count("llm.")


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_infinities_and_nans_survive_text(dtype: type) -> None:
    """Through our printer and parser, from MLIR's printer to our parser, from our printer to MLIR's parser."""
    finite_only = dtype is ml_dtypes.float8_e4m3fn
    values = [1.5, -0.0, 1e-5, np.pi, np.nan, *([] if finite_only else [np.inf, -np.inf])]
    for array in (np.array(values).astype(dtype), np.full((2, 3), values[-1]).astype(dtype)):
        text = f"func.func @main() {{ %0 = stablehlo.constant {dense_from_numpy(array)} func.return }}"
        ours = parse(text)
        assert _constant(ours, array) == _bytes(array)
        with ir.Context() as mlir_context:
            mlir_context.allow_unregistered_dialects = True
            theirs = ir.Module.parse(generic(ours).replace('"stablehlo.constant"', '"test.constant"'))
            again = parse(str(theirs))
        assert _constant(again, array) == _bytes(array)


def _constant(module: ModuleOp, like: np.ndarray) -> list[object]:
    for op in module.walk():
        value = op.properties.get("value") or op.attributes.get("value")
        if value is not None:
            return _bytes(np.broadcast_to(dense_to_numpy(value), like.shape))
    raise AssertionError(f"no constant in {module}")


def _bytes(array: np.ndarray) -> list[object]:
    """Bits, with all NaNs alike: text does not keep a NaN's sign and payload in every type."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return ["nan" if np.isnan(x.astype(np.float32)) else x.tobytes() for x in flat]


def test_hexadecimal_literals_of_other_kinds() -> None:
    text = "func.func @main() {{ %0 = stablehlo.constant dense<{}> : {} func.return }}"
    (integers,) = (op for op in parse(text.format("[0x10, -1]", "tensor<2xi32>")).walk() if "value" in op.properties)
    np.testing.assert_array_equal(dense_to_numpy(integers.properties["value"]), [16, -1])
    (pair,) = (
        op for op in parse(text.format("(0xFF800000, 1.5)", "tensor<complex<f32>>")).walk() if "value" in op.properties
    )
    assert pair.properties["value"].get_values() == ((-np.inf, 1.5),)
    with pytest.raises(ParseError, match="hexadecimal float: expected the bits of one f16, got 0xff800000"):
        parse(text.format("0xFF800000", "tensor<f16>"))


def test_every_pass_is_registered_under_its_own_name() -> None:
    assert [cls.name for cls in all_passes()] == list(PASSES)
    folder = Path(opt.__file__).parent.parent / "transforms"
    defined = {
        (path.stem, cls)
        for path in folder.glob("*.py")
        for cls in re.findall(r"^class (\w+)\((?:ModulePass|LowerToKernelsPass)\)", path.read_text(), re.M)
    }
    assert defined == set(PASSES.values())


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        ([], "func.func @f(", r"input\.mlir:1:14: Expected argument or type"),
        ([], "\xff\xfe", r"input\.mlir: expected a text file, got "),
        ([], "func.func @f() { %0 = stablehlo.nope }", r"input\.mlir:1:"),
        ([], "func.func private @f(!llm.paged_kv_cache<i8, 1, 1, 1, 1, 1>)", r"!llm\.paged_kv_cache: element type"),
        (["-p", "dce,nope"], "", r"unknown pass nope: expected some of .*dce"),
        (["-p", "dce{a=1}"], "", r"--passes dce\{a=1\}: .*a"),
        (["-p", "dce{"], "", r"Error parsing pass pipeline"),
        (["-o", "/no/such/folder/x"], "", r"/no/such/folder/x: No such file or directory"),
        (["missing.mlir"], None, r"missing\.mlir: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    args: list[str], text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "input.mlir"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
        args = [str(path), *args]
    with pytest.raises(SystemExit) as exit_:
        opt.main(args)
    output = capsys.readouterr()
    assert exit_.value.code == 1
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.search(rf"^llmir-opt: error: .*{message}", output.err), output.err


def test_ir_is_printed_before_and_after_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input.mlir"
    path.write_text("func.func @f(%x: tensor<4xf32>) { %0 = stablehlo.add %x, %x : tensor<4xf32> func.return }")
    opt.main([str(path), "-p", "dce,cse", "--print-before-all", "--print-after-all"])
    output = capsys.readouterr()
    assert "stablehlo.add" not in output.out
    titles = re.findall(r"// -----// IR (.*) //----- //", output.err)
    assert titles == ["before dce", "after dce", "before cse", "after cse"]
    assert output.err.count("stablehlo.add") == 1

"""The operations we add to StableHLO and CHLO: their text round-trips, MLIR takes them, their verifiers teach."""

from io import StringIO

import pytest
from jax.interpreters import mlir
from xdsl.dialects.builtin import ModuleOp, TensorType, f32, i1, i32, i64
from xdsl.dialects.test import TestOp as SourceOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from llmir_jax.dialects.stablehlo_ext import DynamicUpdateSliceOp, ErfcOp, ErfOp, PadOp, ReverseOp, SquareOp, TopKOp
from llmir_jax.interop import export_module, import_module, make_context

FUNCTION = "func.func @main({args}) {{ {op} func.return }}"
TEXTS = [
    (
        "%x: tensor<4x4xbf16>, %u: tensor<2x2xbf16>, %i: tensor<i64>",
        "%r = stablehlo.dynamic_update_slice %x, %u, %i, %i"
        " : (tensor<4x4xbf16>, tensor<2x2xbf16>, tensor<i64>, tensor<i64>) -> tensor<4x4xbf16>",
    ),
    (
        "%x: tensor<2x3xf32>, %v: tensor<f32>",
        "%r = stablehlo.pad %x, %v, low = [0, -1], high = [2, 1], interior = [1, 0]"
        " : (tensor<2x3xf32>, tensor<f32>) -> tensor<5x3xf32>",
    ),
    ("%x: tensor<3x2xi1>", "%r = stablehlo.reverse %x, dims = [1, 0] : tensor<3x2xi1>"),
    ("%x: tensor<2x9xf16>", "%r, %i = chlo.top_k(%x, k = 8) : tensor<2x9xf16> -> (tensor<2x8xf16>, tensor<2x8xi32>)"),
    ("%x: tensor<4xf32>", "%r = chlo.erf %x : tensor<4xf32> -> tensor<4xf32>"),
    ("%x: tensor<4xf32>", "%r = chlo.erfc %x : tensor<4xf32> -> tensor<4xf32>"),
    ("%x: tensor<4xf32>", "%r = chlo.square %x : tensor<4xf32> -> tensor<4xf32>"),
]


def text_of(module: ModuleOp) -> str:
    out = StringIO()
    Printer(out).print_op(module)
    return out.getvalue()


@pytest.mark.parametrize(("args", "op"), TEXTS)
def test_text_round_trips_and_mlir_takes_it(args: str, op: str) -> None:
    module = Parser(make_context(), FUNCTION.format(args=args, op=op)).parse_module()
    module.verify()
    printed = text_of(module)
    again = Parser(make_context(), printed).parse_module()
    assert module.is_structurally_equivalent(again)
    imported = import_module(export_module(module, mlir.make_ir_context()))
    assert imported.is_structurally_equivalent(module)


def value(element: Attribute, *shape: int) -> SSAValue:
    return SourceOp(result_types=[TensorType(element, shape)]).results[0]


X, INDEX = value(f32, 4, 6), value(i64)


@pytest.mark.parametrize(
    "op",
    [
        DynamicUpdateSliceOp(X, value(f32, 4, 2), [INDEX, INDEX]),
        PadOp(X, value(f32), [1, 0], [0, 2], [0, 3]),
        ReverseOp(X, [0]),
        TopKOp(X, 3),
        *(cls(X) for cls in (ErfOp, ErfcOp, SquareOp)),
    ],
    ids=lambda op: op.name,
)
def test_built_operations_verify(op: Operation) -> None:
    op.verify()


def built(
    cls: type[Operation], operands: list[SSAValue], results: list[Attribute], like: Operation | None = None
) -> Operation:
    return cls.create(operands=operands, result_types=results, properties=like.properties if like else {})


PAD = PadOp(X, value(f32), [1, 0], [0, 2], [0, 3])
SAME = [TensorType(f32, [4, 6])]
INVALID: list[tuple[Operation, str]] = [
    (built(DynamicUpdateSliceOp, [X, value(f32, 4, 2), INDEX, INDEX], [TensorType(f32, [4, 2])]), "operand's type"),
    (DynamicUpdateSliceOp(X, value(i32, 4, 2), [INDEX, INDEX]), "elements i32 must be f32"),
    (DynamicUpdateSliceOp(X, value(f32, 4, 2), [INDEX]), "rank 2 and 1 indices"),
    (DynamicUpdateSliceOp(X, value(f32, 4, 7), [INDEX, INDEX]), "does not fit"),
    (built(PadOp, [X, value(i32)], list(PAD.result_types), PAD), "scalar of f32"),
    (built(PadOp, [value(f32, 4), value(f32)], [TensorType(f32, [5])], PAD), "each of the 1 dimensions"),
    (built(PadOp, [X, value(f32)], SAME, PAD), "result must be tensor<5x23xf32>"),
    (PadOp(X, value(f32), [1, 0], [0, 2], [0, -1]), "must not be negative"),
    (ReverseOp(X, [0, 0]), "must be unique"),
    (ReverseOp(X, [2]), "inside rank 2"),
    (built(ReverseOp, [X], [TensorType(f32, [6, 4])], ReverseOp(X, [0])), "result"),
    (TopKOp(X, 7), "k = 7 exceeds"),
    (
        built(TopKOp, [X], [TensorType(f32, [4, 3]), TensorType(i64, [4, 3])], TopKOp(X, 3)),
        "indices must be tensor<4x3xi32>",
    ),
    (built(ErfOp, [X], [TensorType(i1, [4, 6])]), "operand's type"),
]


@pytest.mark.parametrize(("op", "message"), INVALID, ids=[message for _, message in INVALID])
def test_verifier_names_what_is_wrong(op: Operation, message: str) -> None:
    with pytest.raises(VerifyException, match=message):
        op.verify()

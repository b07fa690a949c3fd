"""Keys and values are kept as floats of another width than the model computes.

    %k_pages : tensor<512x16x3x64xf32>      →  dtype=float16      %k_pages : tensor<512x16x3x64xf16>

Runs after ``kv-cache-allocation``: ``llm.write_pages`` then rounds, and ``llm.attend_pages`` reads back and computes as
before. Pages of integers are left alone. Pages that anything else reads are refused.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import AnyFloat, ModuleOp, TensorType, bf16, f16, f32
from xdsl.dialects.func import ReturnOp
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature

_ELEMENTS: dict[str, AnyFloat] = {"float32": f32, "bfloat16": bf16, "float16": f16}


def _retype(pages: SSAValue, element: AnyFloat) -> None:
    """Change the type of page arrays, and of the arrays that follow from them by writing."""
    kind = pages.type
    assert isinstance(kind, TensorType)
    signature.retype(pages, TensorType(element, kind.get_shape()))
    for use in pages.uses:
        op = use.operation
        if isinstance(op, llm.WritePagesOp):
            _retype(op.results[use.index], element)
        elif not isinstance(op, llm.AttendPagesOp | ReturnOp):
            raise InvalidIRError(f"kv-cache-precision: {op_name(op)} reads pages; only llm ops convert what they read")


@dataclass(frozen=True)
class KVCachePrecisionPass(ModulePass):
    """Pages of `dtype`: float32, bfloat16 or float16."""

    name = "kv-cache-precision"

    dtype: str = "float16"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        element = _ELEMENTS.get(self.dtype)
        if element is None:
            raise InvalidIRError(f"kv-cache-precision: dtype must be one of {', '.join(_ELEMENTS)}, got {self.dtype!r}")
        main = main_function(op)
        for role in ("k_pages", "v_pages"):
            for pages in signature.arguments(main, role):
                if isinstance(pages.type, TensorType):
                    _retype(pages, element)
        signature.sync(main)


__all__ = ["KVCachePrecisionPass"]

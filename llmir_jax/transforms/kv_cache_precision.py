"""Keys and values are kept as floats of another width than the model computes.

    %k_pages : tensor<512x16x3x64xf32>      →  dtype=float16      %k_pages : tensor<512x16x3x64xf16>

Runs after ``kv-cache-allocation``: ``llm.write_pages`` then rounds, and ``llm.attend_pages`` reads back and computes as
before. Pages of integers are left alone. Pages that anything else reads are refused.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import AnyFloat, ModuleOp, TensorType, bf16, f16, f32
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.errors import InvalidIRError
from llmir_jax.transforms.page_types import retype_pages

_ELEMENTS: dict[str, AnyFloat] = {"float32": f32, "bfloat16": bf16, "float16": f16}


@dataclass(frozen=True)
class KVCachePrecisionPass(ModulePass):
    """Pages of `dtype`: float32, bfloat16 or float16."""

    name = "kv-cache-precision"

    dtype: str = "float16"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        element = _ELEMENTS.get(self.dtype)
        if element is None:
            raise InvalidIRError(f"kv-cache-precision: dtype must be one of {', '.join(_ELEMENTS)}, got {self.dtype!r}")
        retype_pages(main_function(op), lambda kind: TensorType(element, kind.get_shape()), by=self.name)


__all__ = ["KVCachePrecisionPass"]

"""Makes a step for a number of tokens of its own out of the one derived.

    %x : tensor<1x131x576xf32>    →    %x : tensor<1x32x576xf32>       (tokens = 32)

Every operation left is token-pointwise or an llm operation that takes any number of tokens, so only types and sizes
change. The module's attribute `llmir.length` tells the number of tokens it was derived at.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import LENGTH, main_function
from llmir_jax.errors import InvalidIRError
from llmir_jax.transforms import signature
from llmir_jax.transforms.resize import resize_properties, resized_type


@dataclass(frozen=True)
class SpecializeTokensPass(ModulePass):
    """Resize the token axis to `tokens`."""

    name = "specialize-tokens"

    tokens: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        length = op.attributes.get(LENGTH)
        if not isinstance(length, IntegerAttr):
            raise InvalidIRError(
                f"specialize-tokens: the module has no attribute {LENGTH}, the length it was derived at"
            )
        if self.tokens < 1:
            raise InvalidIRError(f"specialize-tokens: tokens must be at least 1, got {self.tokens}")
        old = length.value.data
        if old == self.tokens:
            return
        main = main_function(op)
        for inner in main.body.walk():  # while the operands still tell which sizes follow the tokens
            inner.properties.update(resize_properties(inner, old, self.tokens))
        for arg in main.body.block.args:
            signature.retype(arg, resized_type(arg.type, old, self.tokens))
        for inner in main.body.walk():
            for result in inner.results:
                signature.retype(result, resized_type(result.type, old, self.tokens))
        signature.sync(main)
        op.attributes[LENGTH] = IntegerAttr(self.tokens, i64)

"""Removes arguments of @main that nothing reads: parameters the step does not need, inputs no layer asks for.

    func.func @main(%w: …, %unused: …)    →    func.func @main(%w: …)

Step inputs are kept with `keep_inputs`, so that the runtime can pass the same batch to every step.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.transforms.dead_code_elimination import dce

from llmir_jax.analysis.align import main_function
from llmir_jax.transforms import signature


@dataclass(frozen=True)
class RemoveDeadArgumentsPass(ModulePass):
    """Drop unused arguments."""

    name = "remove-dead-arguments"

    keep_inputs: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        dce(op)
        main = main_function(op)
        pairs = zip(list(main.body.block.args), signature.argument_attributes(main), strict=True)
        for arg, attributes in pairs:
            if arg.uses or (self.keep_inputs and signature.ROLE in attributes):
                continue
            signature.remove_argument(main, arg)

"""Gives pages of keys and values another type, for passes that choose what they are kept as."""

from collections.abc import Callable

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, SSAValue

from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature


def retype_pages(main: FuncOp, kept_as: Callable[[TensorType], Attribute], *, by: str) -> None:
    """Change the type of all page arrays of floats, and of the arrays that follow from them by writing.

    Raises InvalidIRError, in the name of the pass that it is done by, for pages that anything else reads.
    """
    for role in ("k_pages", "v_pages"):
        for pages in signature.arguments(main, role):
            if isinstance(pages.type, TensorType):
                _retype(pages, kept_as(pages.type), by)
    signature.sync(main)


def _retype(pages: SSAValue, kind: Attribute, by: str) -> None:
    signature.retype(pages, kind)
    for use in pages.uses:
        op = use.operation
        if isinstance(op, llm.WritePagesOp):
            _retype(op.results[use.index], kind, by)
        elif not isinstance(op, llm.AttendPagesOp | ReturnOp):
            raise InvalidIRError(f"{by}: {op_name(op)} reads pages; only llm ops convert what they read")


__all__ = ["retype_pages"]

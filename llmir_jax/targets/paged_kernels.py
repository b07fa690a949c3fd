"""Writing a step's keys and values and attending to the pages as one call of a target's kernel.

Page arrays of layers that the kernel serves are [num_pages, page_size, width]: a token's heads side by side, on a TPU
padded to whole lane groups. Those of int8 have scales float32 [num_pages, num_kv_heads, page_size] after them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from xdsl.dialects.builtin import Float32Type, TensorType, f32
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute, BlockArgument, Operation, SSAValue

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, shape_of, tensor
from llmir_jax.dialects.llm.common import bool_of, float_of, optional_float_of, optional_int_of
from pallas_kernels.paged_attention import KVPages, Masking, RaggedBatch, Sizes


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedKernel:
    """A target's kernel of ragged paged attention."""

    run: Callable[..., tuple[Array, KVPages]]
    """Of q, k, v, pages, batch, masking, slopes or None, as `pallas_kernels.paged_attention.paged_attention`."""
    page_width: Callable[[int, int], int]
    """Elements that a token of so many KV heads, and numbers a head, takes in a page."""
    unsupported_reason: Callable[[Sizes], str | None]


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """A layer's write and the attention that reads what it wrote."""

    write: llm.WritePagesOp
    attend: llm.AttendPagesOp

    @property
    def operands(self) -> list[SSAValue]:
        """Of `function`; quantized pages are two arrays each."""
        op = self.attend
        pages = [self.write.k_pages, self.write.v_pages]
        slopes = [] if op.slopes is None else [op.slopes]
        batch = [op.block_tables, op.seq_lens, op.seq_ids, op.num_tokens]
        return [op.q, self.write.k, self.write.v, *pages, *batch, *slopes]

    def function(self, kernel: PagedKernel) -> Callable[..., tuple[Array, ...]]:
        """The attention's result and the new arrays of pages, of keys and then of values."""
        op = self.attend
        masking = Masking(
            scale=float_of(op.scale),
            causal=bool_of(op.causal),
            window=optional_int_of(op.window),
            softcap=optional_float_of(op.softcap),
        )
        assert isinstance(op.output.type, TensorType)
        dtype = element_dtype(op.output.type.element_type)
        is_quantized = isinstance(self.write.k_pages.type, llm.QuantizedTensorType)

        def run(q: Array, k: Array, v: Array, *others: Array) -> tuple[Array, ...]:
            if is_quantized:
                keys, k_scales, values, v_scales, *rest = others
                pages = KVPages(keys, values, k_scales, v_scales)
            else:
                keys, values, *rest = others
                pages = KVPages(keys, values)
            tables, seq_lens, seq_ids, num_tokens, *slopes = rest
            batch = ragged_batch(tables, seq_lens, seq_ids, num_tokens)
            common = jnp.promote_types(q.dtype, jnp.promote_types(k.dtype, v.dtype))
            q, k, v = (x.astype(common) for x in (q, k, v))
            out, new = kernel.run(q, k, v, pages, batch, masking, slopes[0] if slopes else None)
            arrays = (new.k, new.k_scales, new.v, new.v_scales)
            return out.astype(dtype), *(array for array in arrays if array is not None)

        return run

    def reason(self, kernel: PagedKernel, num_tokens: int) -> str | None:
        """None if the kernel serves it, for up to so many tokens; else why not."""
        write, op = self.write, self.attend
        kinds = (write.k_pages.type, write.v_pages.type)
        for kind in kinds:
            if isinstance(kind, llm.QuantizedTensorType) and not _has_kernel_scales(kind):
                bits, scale = kind.integer_type.width.data, element_dtype(kind.scale_type)
                minimum = "" if kind.is_symmetric else " and a minimum"
                return f"pages are int{bits} with a {scale} scale{minimum} for a head, the kernel's int8 with a float32"
        if kinds[0] != kinds[1]:
            return f"keys and values differ, {kinds[0]} and {kinds[1]}"
        if not isinstance(write.k_pages, BlockArgument) or not isinstance(write.v_pages, BlockArgument):
            return "a layer's pages are written more than once"
        if any(len(set(pages.uses)) != 1 for pages in (write.k_pages, write.v_pages)):
            return "the pages are read before they are written"
        for new in (write.new_k_pages, write.new_v_pages):
            if any(use.operation is not op and not isinstance(use.operation, ReturnOp) for use in new.uses):
                return "the pages have other readers"
        same = (
            (write.block_tables, op.block_tables),
            (write.seq_ids, op.seq_ids),
            (write.positions, op.positions),
            (write.num_tokens, op.num_tokens),
        )
        if any(a is not b for a, b in same):
            return "keys are written for other tokens than those that attend"
        kind = kinds[0]
        assert isinstance(kind, TensorType | llm.QuantizedTensorType)
        num_pages, page_size, num_kv_heads, head_dim = kind.get_shape()
        num_seqs, pages_per_seq = shape_of(op.block_tables)
        return kernel.unsupported_reason(
            Sizes(
                num_tokens=num_tokens,
                num_heads=shape_of(op.q)[1],
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                num_pages=num_pages,
                page_size=page_size,
                num_seqs=num_seqs,
                pages_per_seq=pages_per_seq,
                q_dtype=jnp.promote_types(dtype_of(op.q), jnp.promote_types(dtype_of(write.k), dtype_of(write.v))),
                page_dtype=element_dtype(kind.element_type),
            )
        )


def ragged_batch(tables: Array, seq_lens: Array, seq_ids: Array, num_tokens: Array) -> RaggedBatch:
    """The batch that kernels take, of a step's: each sequence's rows are neighbours, in rising position order."""
    rows = jnp.arange(seq_ids.shape[0], dtype=jnp.int32)
    seqs = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
    mine = (seq_ids[None, :] == seqs[:, None]) & (rows < num_tokens)[None, :]  # [S, T]
    return RaggedBatch(
        tables,
        seq_lens,
        jnp.argmax(mine, axis=1).astype(jnp.int32),
        jnp.sum(mine, axis=1, dtype=jnp.int32),
    )


def find_attention(ops: list[Operation]) -> list[FusedAttention]:
    """Attention over pages that one write has just filled."""
    pairs = [(op.k_pages.owner, op) for op in ops if isinstance(op, llm.AttendPagesOp)]
    return [
        FusedAttention(write, op)
        for write, op in pairs
        if isinstance(write, llm.WritePagesOp) and op.v_pages is write.new_v_pages
    ]


def _has_kernel_scales(kind: llm.QuantizedTensorType) -> bool:
    """Whether these are pages whose integers and scales kernels read, in an order of their own."""
    is_whole = kind.elements_per_group == kind.get_shape()[-1]
    is_int8 = kind.is_symmetric and kind.integer_type.width.data == 8
    return is_int8 and is_whole and isinstance(kind.scale_type, Float32Type)


def served_pages(kind: Attribute, kernel: PagedKernel) -> tuple[TensorType[Any], ...]:
    """The arrays that hold pages [num_pages, page_size, num_kv_heads, head_dim] for the kernel."""
    assert isinstance(kind, TensorType | llm.QuantizedTensorType)
    num_pages, page_size, num_kv_heads, head_dim = kind.get_shape()
    rows = tensor((num_pages, page_size, kernel.page_width(num_kv_heads, head_dim)), kind.element_type)
    if isinstance(kind, TensorType):
        return (rows,)
    return rows, tensor((num_pages, num_kv_heads, page_size), f32)


__all__ = ["FusedAttention", "PagedKernel", "find_attention", "ragged_batch", "served_pages"]

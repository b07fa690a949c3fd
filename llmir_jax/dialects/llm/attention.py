"""Attention without a cache, and over the page arrays of one layer."""

from typing import Any, ClassVar

from xdsl.dialects.builtin import BoolAttr, FloatAttr, IntegerAttr, StringAttr, TensorType
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .common import (
    LLMOp,
    check_finite,
    check_float,
    check_int32,
    check_positive_float,
    check_range,
    check_same_type,
    check_shapes,
    fail,
    maybe,
    optional_f32,
    optional_i64,
)
from .types import QuantizedTensorType

TRUE = BoolAttr.from_bool(True)
PAGES = TensorType | QuantizedTensorType


def mask_properties(
    *, scale: float, causal: bool, window: int | None, softcap: float | None
) -> dict[str, Attribute | None]:
    """The properties that every attention op has: how a score is scaled and capped, and which keys are visible."""
    return {
        "scale": optional_f32(scale),
        "causal": BoolAttr.from_bool(causal),
        "window": optional_i64(window),
        "softcap": optional_f32(softcap),
    }


def check_mask_properties(scale: Attribute | None, window: Attribute | None, softcap: Attribute | None) -> None:
    """Check the properties that every attention op has."""
    check_finite("scale", scale)
    check_range("window", window, 1)
    check_positive_float("softcap", softcap)


def check_heads(num_q_heads: int | None, num_kv_heads: int | None) -> None:
    """Check that query heads share KV heads evenly. None or a dynamic size agrees with any."""
    if num_q_heads is None or num_kv_heads is None or num_q_heads < 0 or num_kv_heads < 0:
        return
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        fail("q", f"a number of query heads that is a multiple of the {num_kv_heads} KV heads", num_q_heads)


@irdl_op_definition
class AttentionOp(LLMOp):
    """Attention of a whole sequence to itself, or of the tokens of several sequences to contiguous caches.

    ```mlir
    %o = llm.attention %q, %k, %v {scale = 0.125 : f32, causal = true, window = 128 : i64}
           : (tensor<131x9x64xf32>, tensor<131x3x64xf32>, tensor<131x3x64xf32>) -> tensor<131x9x64xf32>
    %o = llm.attention %q, %k, %v slopes(%s) tokens(%seq_ids, %positions) {scale = 0.125 : f32}
           : (tensor<7x9x64xf32>, tensor<4x512x3x64xf32>, tensor<4x512x3x64xf32>, tensor<9xf32>, tensor<7xi32>,
              tensor<7xi32>) -> tensor<7x9x64xf32>
    ```

    q is [T, H, D]. Without ``tokens``, k is [T, Hkv, D], v [T, Hkv, Dv], and query and key i are at position i. With
    ``tokens``, k is [S, L, Hkv, D], v [S, L, Hkv, Dv]: query t is at ``positions[t]`` of sequence ``seq_ids[t]``, and
    key j of a sequence at position j. Query head h reads KV head h // (H / Hkv). The result is [T, H, Dv].

    A key is visible to a query when (not ``causal`` or k_pos <= q_pos) and (no ``window`` or k_pos > q_pos - window).
    Its score is softcap(scale·q·k) + slope_h·(k_pos - q_pos), with softcap(x) = c·tanh(x/c) where ``softcap`` = c is
    given; the softmax over visible keys is taken in float32. ``causal`` is true unless said otherwise. Products of
    float32 are as precise as the device makes them by itself, or with ``precise = true`` as precise as float32 is.
    """

    name = "llm.attention"
    OPERAND_GROUPS: ClassVar = {"slopes": ("slopes",), "tokens": ("seq_ids", "positions")}

    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    slopes = opt_operand_def(TensorType)
    seq_ids = opt_operand_def(TensorType)
    positions = opt_operand_def(TensorType)

    scale = prop_def(FloatAttr)
    causal = prop_def(BoolAttr, default_value=TRUE)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)
    precise = opt_prop_def(BoolAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        q: SSAValue | Operation,
        k: SSAValue | Operation,
        v: SSAValue | Operation,
        *,
        result_type: Attribute,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        slopes: SSAValue | Operation | None = None,
        seq_ids: SSAValue | Operation | None = None,
        positions: SSAValue | Operation | None = None,
        precise: bool = False,
    ) -> None:
        properties = mask_properties(scale=scale, causal=causal, window=window, softcap=softcap)
        super().__init__(
            operands=[q, k, v, maybe(slopes), maybe(seq_ids), maybe(positions)],
            result_types=[result_type],
            properties={**properties, "precise": TRUE if precise else None},
        )

    @property
    def is_precise(self) -> bool:
        """Whether products of float32 must be as precise as that."""
        return self.precise is not None and bool(self.precise.value.data)

    def check(self) -> None:
        check_float(q=self.q, k=self.k, v=self.v, slopes=self.slopes, output=self.output)
        check_int32(seq_ids=self.seq_ids, positions=self.positions)
        check_mask_properties(self.scale, self.window, self.softcap)
        if (self.seq_ids is None) != (self.positions is None):
            raise VerifyException("tokens: expected both seq_ids and positions, got one of them")
        keys: tuple[str, ...] = ("T",) if self.seq_ids is None else ("S", "L")
        sizes = check_shapes(
            {
                "q": (self.q, ("T", "H", "D")),
                "k": (self.k, (*keys, "Hkv", "D")),
                "v": (self.v, (*keys, "Hkv", "Dv")),
                "slopes": (self.slopes, ("H",)),
                "seq_ids": (self.seq_ids, ("T",)),
                "positions": (self.positions, ("T",)),
                "output": (self.output, ("T", "H", "Dv")),
            }
        )
        check_heads(sizes["H"], sizes["Hkv"])


def _check_pages(k_pages: SSAValue, v_pages: SSAValue) -> dict[str, int]:
    """Check a layer's page arrays, [N, PS, Hkv, D] and [N, PS, Hkv, Dv]; returns these sizes."""
    sizes: dict[str, int] = {}
    for subject, pages, names in (
        ("k_pages", k_pages, ("N", "PS", "Hkv", "D")),
        ("v_pages", v_pages, ("N", "PS", "Hkv", "Dv")),
    ):
        if isinstance(pages.type, TensorType):
            check_float(**{subject: pages})
            sizes = check_shapes({subject: (pages, names)}, **sizes)
            continue
        kind = pages.type
        assert isinstance(kind, QuantizedTensorType)
        shape = kind.get_shape()
        if len(shape) != 4 or kind.elements_per_group != shape[-1]:
            fail(subject, "[N, PS, Hkv, D] with one scale for each token and head", kind)
        for name, size in zip(names, shape, strict=True):
            if sizes.setdefault(name, size) != size:
                fail(subject, f"{name}={sizes[name]}", size)
    return sizes


def _check_shards(shards: IntegerAttr[Any] | None, pages: SSAValue) -> None:
    if shards is None:
        return
    kind = pages.type
    assert isinstance(kind, TensorType | QuantizedTensorType)
    page_size, count = kind.get_shape()[1], shards.value.data
    if count < 1 or page_size % count:
        fail("shards", f"a divisor of the page size {page_size}", count)


def _check_ring(ring: StringAttr | None, shards: IntegerAttr[Any] | None, rows: int) -> None:
    if ring is None:
        return
    count = 1 if shards is None else shards.value.data
    if count == 1 or rows % count:
        fail("ring", f"shards, a divisor of the {rows} rows", count)


@irdl_op_definition
class WritePagesOp(LLMOp):
    """The page arrays of a layer with the keys and values of a step written to the pages that the tables name.

    ```mlir
    %kp, %vp = llm.write_pages %k_pages, %v_pages, %k, %v, %seq_ids, %positions, %block_tables, %num_tokens
                 : (tensor<512x16x3x64xbf16>, tensor<512x16x3x64xbf16>, tensor<7x3x64xf32>, tensor<7x3x64xf32>,
                    tensor<7xi32>, tensor<7xi32>, tensor<4x32xi32>, tensor<i32>)
                 -> (tensor<512x16x3x64xbf16>, tensor<512x16x3x64xbf16>)
    ```

    Pages are [N, PS, Hkv, D] ([…, Dv] for values), k and v [T, Hkv, D], block tables [S, P]. Row t goes to slot
    ``positions[t] % PS`` of page ``block_tables[seq_ids[t], positions[t] // PS]``, in the pages' element type. Rows
    from ``num_tokens`` on are padding and write nothing. With ``shards`` the positions of every page are in so many
    parts of one length, one after the other, each on other devices. With ``ring``, a mesh, rows too are in so many
    parts along its axis `sequence`, and go round to where their positions are.
    """

    name = "llm.write_pages"

    k_pages = operand_def(PAGES)
    v_pages = operand_def(PAGES)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    seq_ids = operand_def(TensorType)
    positions = operand_def(TensorType)
    block_tables = operand_def(TensorType)
    num_tokens = operand_def(TensorType)

    shards = opt_prop_def(IntegerAttr)
    ring = opt_prop_def(StringAttr)

    new_k_pages = result_def(PAGES)
    new_v_pages = result_def(PAGES)

    traits = traits_def(Pure())

    def __init__(
        self,
        k_pages: SSAValue,
        v_pages: SSAValue,
        k: SSAValue | Operation,
        v: SSAValue | Operation,
        *,
        seq_ids: SSAValue | Operation,
        positions: SSAValue | Operation,
        block_tables: SSAValue | Operation,
        num_tokens: SSAValue | Operation,
    ) -> None:
        super().__init__(
            operands=[k_pages, v_pages, k, v, seq_ids, positions, block_tables, num_tokens],
            result_types=[k_pages.type, v_pages.type],
        )

    def check(self) -> None:
        check_float(k=self.k, v=self.v)
        check_int32(
            seq_ids=self.seq_ids,
            positions=self.positions,
            block_tables=self.block_tables,
            num_tokens=self.num_tokens,
        )
        sizes = check_shapes(
            {
                "k": (self.k, ("T", "Hkv", "D")),
                "v": (self.v, ("T", "Hkv", "Dv")),
                "seq_ids": (self.seq_ids, ("T",)),
                "positions": (self.positions, ("T",)),
                "block_tables": (self.block_tables, ("S", "P")),
                "num_tokens": (self.num_tokens, ()),
            },
            **_check_pages(self.k_pages, self.v_pages),
        )
        _check_shards(self.shards, self.k_pages)
        _check_ring(self.ring, self.shards, sizes["T"])
        check_same_type("first result", self.new_k_pages, "k_pages", self.k_pages)
        check_same_type("second result", self.new_v_pages, "v_pages", self.v_pages)


@irdl_op_definition
class AttendPagesOp(LLMOp):
    """Attention of a step's tokens to the pages of one layer.

    ```mlir
    %o = llm.attend_pages %q, %k_pages, %v_pages, %block_tables, %seq_lens, %seq_ids, %positions, %num_tokens
           slopes(%s) {scale = 0.125 : f32, window = 128 : i64}
           : (tensor<7x9x64xf32>, tensor<512x16x3x64xbf16>, tensor<512x16x3x64xbf16>, tensor<4x32xi32>, tensor<4xi32>,
              tensor<7xi32>, tensor<7xi32>, tensor<i32>, tensor<9xf32>) -> tensor<7x9x64xf32>
    ```

    q is [T, H, D], pages [N, PS, Hkv, D] ([…, Dv] for values), block tables [S, P]. The key at position j of sequence s
    is in slot ``j % PS`` of page ``block_tables[s, j // PS]``; positions from ``seq_lens[s]`` on do not exist. What is
    visible to a query, and its score, are as in `AttentionOp`. Rows from ``num_tokens`` on are padding: their results
    are finite and mean nothing. The result is [T, H, Dv]. With ``shards`` the positions of every page are in so many
    parts, each on other devices: attention is to each by itself, and then merged. With ``ring``, a mesh, queries
    too are in so many parts along its axis `sequence`, and go round from one part of the pages to the next.
    """

    name = "llm.attend_pages"
    OPERAND_GROUPS: ClassVar = {"slopes": ("slopes",)}

    q = operand_def(TensorType)
    k_pages = operand_def(PAGES)
    v_pages = operand_def(PAGES)
    block_tables = operand_def(TensorType)
    seq_lens = operand_def(TensorType)
    seq_ids = operand_def(TensorType)
    positions = operand_def(TensorType)
    num_tokens = operand_def(TensorType)
    slopes = opt_operand_def(TensorType)

    scale = prop_def(FloatAttr)
    causal = prop_def(BoolAttr, default_value=TRUE)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)
    shards = opt_prop_def(IntegerAttr)
    ring = opt_prop_def(StringAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        q: SSAValue | Operation,
        k_pages: SSAValue | Operation,
        v_pages: SSAValue | Operation,
        *,
        block_tables: SSAValue | Operation,
        seq_lens: SSAValue | Operation,
        seq_ids: SSAValue | Operation,
        positions: SSAValue | Operation,
        num_tokens: SSAValue | Operation,
        result_type: Attribute,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        slopes: SSAValue | Operation | None = None,
    ) -> None:
        operands = [q, k_pages, v_pages, block_tables, seq_lens, seq_ids, positions, num_tokens, maybe(slopes)]
        super().__init__(
            operands=operands,
            result_types=[result_type],
            properties=mask_properties(scale=scale, causal=causal, window=window, softcap=softcap),
        )

    def check(self) -> None:
        check_float(q=self.q, slopes=self.slopes, output=self.output)
        check_int32(
            block_tables=self.block_tables,
            seq_lens=self.seq_lens,
            seq_ids=self.seq_ids,
            positions=self.positions,
            num_tokens=self.num_tokens,
        )
        check_mask_properties(self.scale, self.window, self.softcap)
        pages = _check_pages(self.k_pages, self.v_pages)
        _check_shards(self.shards, self.k_pages)
        sizes = check_shapes(
            {
                "q": (self.q, ("T", "H", "D")),
                "block_tables": (self.block_tables, ("S", "P")),
                "seq_lens": (self.seq_lens, ("S",)),
                "seq_ids": (self.seq_ids, ("T",)),
                "positions": (self.positions, ("T",)),
                "num_tokens": (self.num_tokens, ()),
                "slopes": (self.slopes, ("H",)),
                "output": (self.output, ("T", "H", "Dv")),
            },
            **pages,
        )
        _check_ring(self.ring, self.shards, sizes["T"])
        check_heads(sizes["H"], pages["Hkv"])

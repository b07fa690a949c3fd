"""What serving needs to know of a derived step besides its operations, as data that outlives the process.

A decoder reads its parameters, cache groups and report from the record; only to make the step for another number of
tokens, and to show its IR, does it need the operations themselves.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Block, Region
from xdsl.printer import Printer

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.derive import Derived
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, type_of
from llmir_jax.dialects.parser import IRParser
from llmir_jax.interop import make_context, op_name
from llmir_jax.quantization import Plan, Scheme
from llmir_jax.transforms import signature

if TYPE_CHECKING:
    from llmir_jax.targets.cpu.regions import InXla
    from llmir_jax.targets.cpu.weights import Arrangement


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """Attention as some layers have it."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    alibi: bool
    cache_dtype: str


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeParts:
    """What of a step is native code for the CPU."""

    arrangement: "Arrangement | None" = None
    """Where native code finds the parameters; None if none of the step is native."""
    not_native: tuple[str, ...] = ()
    """Why none is, where it was to be."""
    in_xla: Mapping[str, "InXla"] = field(default_factory=dict)
    """Kinds of operations, by name, that XLA computes between calls of native code, and why."""

    def as_data(self) -> dict[str, Any]:
        """As what JSON holds."""
        return {
            "arrangement": None if self.arrangement is None else self.arrangement.as_data(),
            "not_native": self.not_native,
            "in_xla": {name: asdict(those) for name, those in self.in_xla.items()},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "NativeParts":
        """The inverse of `as_data`."""
        if data["arrangement"] is None:
            return cls(not_native=tuple(data["not_native"]))
        from llmir_jax.targets.cpu.regions import InXla  # here, since other targets need no LLVM
        from llmir_jax.targets.cpu.weights import Arrangement

        in_xla = {name: InXla(**those) for name, those in data["in_xla"].items()}
        return cls(arrangement=Arrangement.from_data(data["arrangement"]), in_xla=in_xla)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRecord:
    """Of a step, at the length it was derived at."""

    main: ModuleOp
    """@main without its operations: types and attributes of arguments, and types of results."""
    max_seq_len: int
    plan: Plan | None
    notes: tuple[str, ...]
    native: NativeParts
    operations: Mapping[str, int]
    """How many there are, by name."""
    attention: tuple[AttentionForm, ...]
    computes_in_half: bool
    """Whether 16-bit floats take part."""
    activations: tuple[str, ...]
    """How activations are quantized: "int8 activations", "static int8 activations"."""

    @classmethod
    def of(cls, derived: Derived, native: NativeParts, notes: Sequence[str]) -> "StepRecord":
        """The record of a derived step; `notes` go before its own."""
        main = main_function(derived.module)
        ops = list(main.body.block.ops)
        return cls(
            main=ModuleOp([_without_operations(main)]),
            max_seq_len=derived.max_seq_len,
            plan=derived.plan,
            notes=(*derived.notes, *notes),
            native=native,
            operations=dict(Counter(map(op_name, ops))),
            attention=_attention(op for op in ops if isinstance(op, llm.AttendPagesOp)),
            computes_in_half=any(
                dtype_of(result).itemsize <= 2 and dtype_of(result).kind not in "iub"
                for op in ops
                for result in op.results
                if isinstance(result.type, TensorType)
            ),
            activations=tuple(
                sorted(
                    {
                        "int8 activations" if op.activation_scales is None else "static int8 activations"
                        for op in ops
                        if isinstance(op, llm.QuantizedMatmulOp) and op.activation_bits is not None
                    }
                )
            ),
        )

    @property
    def results(self) -> tuple[Attribute, ...]:
        """Types of what @main returns."""
        return main_function(self.main).function_type.outputs.data

    def to_json(self) -> bytes:
        """The record as text. Static scales of activations cannot be in it."""
        assert self.plan is None or not self.plan.activation_scales
        data = {own.name: getattr(self, own.name) for own in fields(self)}
        out = StringIO()
        Printer(out, print_generic_format=True).print_op(self.main)
        data["main"] = out.getvalue()
        if self.plan is not None:
            schemes = {path: asdict(scheme) for path, scheme in self.plan.schemes.items()}
            data["plan"] = {"schemes": schemes, "kept": dict(self.plan.kept)}
        data["native"] = self.native.as_data()
        data["attention"] = [asdict(form) for form in self.attention]
        return json.dumps(data).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "StepRecord":
        """The inverse of `to_json`."""
        data = json.loads(content)
        context = make_context()
        context.load_dialect(llm.LLM)
        data["main"] = IRParser(context, data["main"]).parse_module()
        if data["plan"] is not None:
            schemes = {path: Scheme(**scheme) for path, scheme in data["plan"]["schemes"].items()}
            data["plan"] = Plan(schemes=schemes, kept=data["plan"]["kept"])
        data["native"] = NativeParts.from_data(data["native"])
        data["attention"] = tuple(AttentionForm(**form) for form in data["attention"])
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**values)


def _without_operations(main: FuncOp) -> FuncOp:
    copy = FuncOp("main", main.function_type, Region(Block(arg_types=main.function_type.inputs.data)))
    signature.store_attributes(copy, signature.argument_attributes(main))
    return copy


def _attention(ops: Any) -> tuple[AttentionForm, ...]:
    forms: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for op in ops:
        heads, dim = type_of(op.q).get_shape()[1:]
        kind = op.k_pages.type
        assert isinstance(kind, TensorType | llm.QuantizedTensorType)
        form = {
            "num_heads": heads,
            "num_kv_heads": kind.get_shape()[2],
            "head_dim": dim,
            "window": None if op.window is None else op.window.value.data,
            "softcap": None if op.softcap is None else float(op.softcap.value.data),
            "alibi": op.slopes is not None,
            "cache_dtype": _cache_dtype(kind),
        }
        forms[tuple(form.items())] += 1
    return tuple(AttentionForm(layers=count, **dict(form)) for form, count in forms.items())


def _cache_dtype(kind: TensorType | llm.QuantizedTensorType) -> str:
    if isinstance(kind, llm.QuantizedTensorType):
        scale: np.dtype[Any] = element_dtype(kind.scale_type)
        side = "scale" if kind.is_symmetric else "scale and minimum"
        return f"int{kind.integer_type.width.data}, a {scale} {side} for each token and head"
    return str(element_dtype(kind.element_type))


__all__ = ["AttentionForm", "NativeParts", "StepRecord"]

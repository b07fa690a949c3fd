"""jaxlib's MLIR modules to xDSL modules and back, and xDSL modules called from JAX.

Both directions walk operations instead of printing and parsing text: it is faster, and xDSL's parser reads
``dense<0xFF800000>`` (minus infinity) as the number 4286578688. Dense elements travel as raw bytes, so every dtype
JAX has is exact, NaN payloads included.

Dense elements, as imported: row-major, one byte for each element narrower than a byte, true as 0xFF (xDSL's own
convention). **A splat holds one element, whatever its shape**: read constants with :func:`dense_to_numpy` and make
them with :func:`dense_from_numpy`.

Every use of JAX's private modules in this project is in this file.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO, StringIO
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax._src.interpreters.mlir import merge_mlir_modules
from jax._src.util import weakref_lru_cache
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import func as mlir_func
from xdsl.context import Context
from xdsl.dialects import builtin, func
from xdsl.dialects.builtin import (
    ArrayAttr,
    BytesAttr,
    ComplexType,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    DictionaryAttr,
    FloatAttr,
    FunctionType,
    IntegerAttr,
    IntegerType,
    ModuleOp,
    Signedness,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    TupleType,
    UnitAttr,
    UnregisteredOp,
)
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError

from llmir_jax.dialects.stablehlo_ext import CHLO, StableHLO
from llmir_jax.errors import InvalidIRError, LlmirError

LOC = "llmir.loc"
"""Attribute of an imported operation: the user's source line it comes from, as ``file.py:LINE (function)``.

Operations inside functions that JAX shares between callers (``jnp.where`` …) have none: whoever inlines the call
gives them the call's.
"""

_PRIVATE_PREFIX = "llmir."


def make_context() -> Context:
    """A context with the dialects that JAX's modules use; what it does not know passes through unregistered."""
    context = Context(allow_unregistered=True)
    for dialect in (builtin.Builtin, func.Func, StableHLO, CHLO):
        context.load_dialect(dialect)
    return context


def op_name(op: Operation) -> str:
    """The operation's name in MLIR, of an unregistered operation too."""
    return op.op_name.data if isinstance(op, UnregisteredOp) else op.name


# Dense elements ------------------------------------------------------------------------------------------------------

_FLOAT_DTYPES: dict[type[Attribute], np.dtype[Any]] = {
    builtin.Float16Type: np.dtype(np.float16),
    builtin.Float32Type: np.dtype(np.float32),
    builtin.Float64Type: np.dtype(np.float64),
    builtin.BFloat16Type: np.dtype(ml_dtypes.bfloat16),
    builtin.Float8E3M4Type: np.dtype(ml_dtypes.float8_e3m4),
    builtin.Float8E4M3Type: np.dtype(ml_dtypes.float8_e4m3),
    builtin.Float8E4M3B11FNUZType: np.dtype(ml_dtypes.float8_e4m3b11fnuz),
    builtin.Float8E4M3FNType: np.dtype(ml_dtypes.float8_e4m3fn),
    builtin.Float8E4M3FNUZType: np.dtype(ml_dtypes.float8_e4m3fnuz),
    builtin.Float8E5M2Type: np.dtype(ml_dtypes.float8_e5m2),
    builtin.Float8E5M2FNUZType: np.dtype(ml_dtypes.float8_e5m2fnuz),
    builtin.Float8E8M0FNUType: np.dtype(ml_dtypes.float8_e8m0fnu),
    builtin.Float6E2M3FNType: np.dtype(ml_dtypes.float6_e2m3fn),
    builtin.Float6E3M2FNType: np.dtype(ml_dtypes.float6_e3m2fn),
    builtin.Float4E2M1FNType: np.dtype(ml_dtypes.float4_e2m1fn),
}
_FLOAT_TYPES = {dtype: cls() for cls, dtype in _FLOAT_DTYPES.items()}
_INT_DTYPES: dict[tuple[int, bool], np.dtype[Any]] = {
    (1, True): np.dtype(np.bool_),
    (2, True): np.dtype(ml_dtypes.int2),
    (2, False): np.dtype(ml_dtypes.uint2),
    (4, True): np.dtype(ml_dtypes.int4),
    (4, False): np.dtype(ml_dtypes.uint4),
    **{(8 * size, True): np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{(8 * size, False): np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
}
_INT_TYPES = {
    dtype: IntegerType(width, Signedness.SIGNLESS if signed else Signedness.UNSIGNED)
    for (width, signed), dtype in _INT_DTYPES.items()
}


def element_dtype(element_type: Attribute) -> np.dtype[Any]:
    """The NumPy dtype (``ml_dtypes`` for what NumPy lacks) of a tensor's element type.

    Raises:
        InvalidIRError: JAX has no dtype for the type.
    """
    dtype: np.dtype[Any] | None = None
    if isinstance(element_type, IntegerType):
        signed = element_type.signedness.data != Signedness.UNSIGNED
        dtype = _INT_DTYPES.get((element_type.width.data, signed))
    elif isinstance(element_type, ComplexType):
        dtype = np.dtype(f"c{2 * element_dtype(element_type.element_type).itemsize}")
    elif isinstance(element_type, builtin.IndexType):
        dtype = np.dtype(np.int64)
    else:
        dtype = _FLOAT_DTYPES.get(type(element_type))
    if dtype is None:
        raise InvalidIRError(f"JAX has no dtype for elements of type {element_type}")
    return dtype


def dtype_element_type(dtype: Any) -> Attribute:
    """The element type of a tensor that holds ``dtype``. Raises InvalidIRError for what is not a number or a bool."""
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        return ComplexType(_FLOAT_TYPES[np.dtype(f"f{dtype.itemsize // 2}")])
    element_type = _FLOAT_TYPES.get(dtype) or _INT_TYPES.get(dtype)
    if element_type is None:
        raise InvalidIRError(f"no tensor holds elements of dtype {dtype}")
    return element_type


def dense_to_numpy(attr: DenseIntOrFPElementsAttr) -> np.ndarray[Any, Any]:
    """The elements of a constant, of the constant's shape; a splat comes as a read-only broadcast of one element."""
    element_type, shape = attr.get_element_type(), attr.get_shape()
    dtype, data = element_dtype(element_type), attr.data.data
    if dtype == np.bool_:
        flat = np.frombuffer(data, np.uint8) != 0
    elif isinstance(element_type, IntegerType) and element_type.width.data < 8:
        flat = np.frombuffer(data, np.int8).astype(dtype)
    else:
        flat = np.frombuffer(data, dtype)
    return np.broadcast_to(flat[0], shape) if flat.size == 1 else flat.reshape(shape)


def dense_from_numpy(array: np.ndarray[Any, Any], *, splat: bool = False) -> DenseIntOrFPElementsAttr:
    """A constant with the array's elements; with ``splat``, all elements are the first one and only it is stored."""
    tensor_type = TensorType(dtype_element_type(array.dtype), array.shape)
    elements = array.reshape(-1)[:1] if splat else array
    return DenseIntOrFPElementsAttr(tensor_type, BytesAttr(_element_bytes(elements)))


def _element_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Bytes of a dense attribute as xDSL keeps them."""
    if array.dtype == np.bool_:
        return (array.astype(np.uint8) * np.uint8(0xFF)).tobytes()
    if array.dtype in (ml_dtypes.int2, ml_dtypes.int4):
        return array.astype(np.int8).tobytes()
    if array.dtype in (ml_dtypes.uint2, ml_dtypes.uint4):
        return array.astype(np.uint8).tobytes()
    return array.tobytes()


_ELEMENT = re.compile(r"[^\[\](),\s]+")


def _elements_from_text(attr: ir.DenseElementsAttr, element_type: Attribute) -> np.ndarray[Any, Any]:
    """The elements [n] of a dense attribute, or [1] for a splat, from its text.

    For the dtypes that jaxlib gives no buffer of. MLIR prints more than a hundred elements as the hexadecimal digits
    of their bytes, NaN and infinity as their bits, and any other number with the digits that identify it: all exact.
    """
    dtype = element_dtype(element_type)
    body = str(attr).split("<", 1)[1].rsplit("> :", 1)[0]
    if isinstance(element_type, IntegerType):  # of less than a byte
        width = element_type.width.data
        values = list(bytes.fromhex(body[3:-1])) if body.startswith('"') else [int(t) for t in _ELEMENT.findall(body)]
        unsigned = np.asarray(values, np.int64) & (2**width - 1)
        if dtype in (ml_dtypes.uint2, ml_dtypes.uint4):
            return unsigned.astype(dtype)
        sign = 2 ** (width - 1)
        return ((unsigned ^ sign) - sign).astype(dtype)
    if body.startswith('"'):
        return np.frombuffer(bytes.fromhex(body[3:-1]), dtype)
    part = np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
    tokens = _ELEMENT.findall(body)
    parts = np.empty(len(tokens), part)
    bits = parts.view(f"u{part.itemsize}")
    for i, token in enumerate(tokens):
        if token.startswith("0x"):
            bits[i] = int(token, 16)
        else:
            parts[i] = float(token)
    return parts.view(dtype)


# MLIR to xDSL --------------------------------------------------------------------------------------------------------

_LIBRARIES = ("jax", "jaxlib", "flax", "optax")
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_MODELS_FOLDER = os.path.join(_OWN_FOLDER, "models", "")  # our models are user code like any other


@cache
def _library_folders() -> tuple[str, ...]:
    specs = [spec for name in _LIBRARIES if (spec := find_spec(name)) is not None]
    return tuple(folder + os.sep for spec in specs for folder in spec.submodule_search_locations or ())


@cache
def _op_class(name: str) -> type[Operation]:
    return _text_context().get_op(name)


@cache
def _text_context() -> Context:
    return make_context()


def _frames(loc: ir.Location) -> Iterator[tuple[str, int, str]]:
    """(file, line, function) of the frames of a location, innermost first."""
    if isinstance(loc, ir.NameLoc):
        child = loc.child_loc
        if isinstance(child, ir.FileLineColLoc):
            yield child.filename, child.start_line, loc.name_str
        else:
            yield from _frames(child)
    elif isinstance(loc, ir.CallSiteLoc):
        yield from _frames(loc.callee)
        yield from _frames(loc.caller)
    elif isinstance(loc, ir.FileLineColLoc):
        yield loc.filename, loc.start_line, "?"
    elif isinstance(loc, ir.FusedLoc):
        for part in loc.locations:
            yield from _frames(part)


def _location_text(loc: ir.Location) -> str | None:
    """The innermost frame of the user's, or else the innermost frame, or None where no source line is known.

    The bodies of JAX's own jitted functions, which callers share, have no frames: their calls have.
    """
    frames = [f for f in _frames(loc) if not f[0].startswith(_OWN_FOLDER) or f[0].startswith(_MODELS_FOLDER)]
    if not frames:
        return None
    users = (frame for frame in frames if not frame[0].startswith(_library_folders()))
    file, line, function = next(users, frames[0])
    return f"{os.path.basename(file)}:{line} ({function})"


class _Importer:
    """Builds xDSL operations from jaxlib's; equal types, attributes and locations are converted once."""

    def __init__(self) -> None:
        self.types: dict[ir.Type, Attribute] = {}
        self.attrs: dict[ir.Attribute, Attribute] = {}
        self.locs: dict[ir.Attribute, Attribute | None] = {}
        self.values: dict[ir.Value, SSAValue] = {}

    def type(self, type_: ir.Type) -> Attribute:
        converted = self.types.get(type_)
        if converted is None:
            converted = self.types[type_] = self._convert_type(type_)
        return converted

    def _convert_type(self, type_: ir.Type) -> Attribute:
        if isinstance(type_, ir.RankedTensorType):
            shape = [-1 if type_.is_dynamic_dim(i) else type_.get_dim_size(i) for i in range(type_.rank)]
            encoding = type_.encoding
            element_type = self.type(type_.element_type)
            if encoding is None:
                return TensorType(element_type, shape)
            return TensorType(element_type, shape, self.attr(encoding))
        if isinstance(type_, ir.FunctionType):
            return FunctionType.from_lists([self.type(t) for t in type_.inputs], [self.type(t) for t in type_.results])
        if isinstance(type_, ir.TupleType):
            return TupleType([self.type(type_.get_type(i)) for i in range(type_.num_types)])
        if isinstance(type_, ir.ComplexType):
            return ComplexType(self.type(type_.element_type))  # type: ignore[arg-type]
        text = str(type_)
        for float_type in _FLOAT_TYPES.values():  # xDSL's parser does not know the types narrower than a byte
            if float_type.name == text:
                return float_type
        return _parse(text, Parser.parse_type)

    def attr(self, attr: ir.Attribute) -> Attribute:
        converted = self.attrs.get(attr)
        if converted is None:
            converted = self.attrs[attr] = self._convert_attr(attr.maybe_downcast())
        return converted

    def _convert_attr(self, attr: ir.Attribute) -> Attribute:
        if isinstance(attr, ir.DenseElementsAttr):
            return self._dense(attr)
        if isinstance(attr, ir.StringAttr):
            data = attr.value_bytes
            try:
                return StringAttr(data.decode())
            except UnicodeDecodeError:
                return BytesAttr(data)
        if isinstance(attr, ir.BoolAttr):
            return IntegerAttr(int(attr.value), 1)
        if isinstance(attr, ir.IntegerAttr):
            return IntegerAttr(attr.value, self.type(attr.type))  # type: ignore[arg-type]
        if isinstance(attr, ir.FloatAttr):
            return FloatAttr(attr.value, self.type(attr.type))  # type: ignore[arg-type]
        if isinstance(attr, ir.ArrayAttr):
            return ArrayAttr([self.attr(element) for element in attr])
        if isinstance(attr, ir.DictAttr):
            return DictionaryAttr({named.name: self.attr(named.attr) for named in attr})
        if isinstance(attr, ir.TypeAttr):
            return self.type(attr.value)
        if isinstance(attr, ir.FlatSymbolRefAttr):
            return SymbolRefAttr(attr.value)
        if isinstance(attr, ir.DenseI64ArrayAttr):
            return DenseArrayBase.from_list(builtin.i64, list(attr))
        if isinstance(attr, ir.UnitAttr):
            return UnitAttr()
        return _parse(str(attr), Parser.parse_attribute)

    def _dense(self, attr: ir.DenseElementsAttr) -> Attribute:
        tensor_type = self.type(attr.type)
        assert isinstance(tensor_type, TensorType)
        try:
            elements = np.asarray(memoryview(attr))  # a splat has strides of zero
        except BufferError:
            elements = _elements_from_text(attr, tensor_type.element_type)
        except TypeError:  # complex
            elements = _elements_from_text(attr, tensor_type.element_type)
        if attr.is_splat:
            elements = elements.reshape(-1)[:1]
        return DenseIntOrFPElementsAttr(tensor_type, BytesAttr(_element_bytes(elements)))

    def op(self, op: ir.Operation) -> Operation:
        name, values = op.name, self.values
        op_class = _op_class(name)
        attributes: dict[str, Attribute] = {}
        for key, attr in op.attributes.items():
            attributes[key] = self.attr(attr)
        properties = {key: attributes.pop(key) for key in _property_names(op_class) if key in attributes}
        location = op.location.attr
        if location not in self.locs:
            text = _location_text(op.location)
            self.locs[location] = None if text is None else StringAttr(text)
        if (loc := self.locs[location]) is not None:
            attributes[LOC] = loc
        if len(op.successors):
            raise InvalidIRError(f"{name}: branches between blocks have no place in a JAX module")
        regions = [self.region(region) for region in op.regions]
        results = op.results
        built = op_class.create(
            operands=[values[operand] for operand in op.operands],
            result_types=[self.type(result.type) for result in results],
            properties=properties,
            attributes=attributes,
            regions=regions,
        )
        for result, new in zip(results, built.results, strict=True):
            values[result] = new
        return built

    def region(self, region: ir.Region) -> Region:
        blocks = []
        for block in region.blocks:
            arguments = block.arguments
            new = Block(arg_types=[self.type(argument.type) for argument in arguments])
            for argument, new_argument in zip(arguments, new.args, strict=True):
                self.values[argument] = new_argument
            for op in block.operations:
                new.add_op(self.op(op.operation))
            blocks.append(new)
        return Region(blocks)


@cache
def _property_names(op_class: type[Operation]) -> tuple[str, ...]:
    get_definition = getattr(op_class, "get_irdl_definition", None)
    return () if get_definition is None else tuple(get_definition().properties)


def _parse(text: str, parse: Callable[[Parser], Attribute]) -> Attribute:
    try:
        return parse(Parser(_text_context(), text))
    except ParseError as error:
        raise InvalidIRError(f"the attribute or type `{text}` has no form in xDSL: {error}") from error


def import_module(module: ir.Module) -> ModuleOp:
    """The xDSL module equal to a module of jaxlib's MLIR.

    Operations of the builtin, func, stablehlo and chlo dialects that have a class become that class; any other passes
    through as an unregistered operation whose attributes are all in ``attributes``. Each operation gets
    :data:`LOC`. Types and attributes shared in MLIR are shared objects here.

    Raises:
        InvalidIRError: the module has branches between blocks, or a type or attribute that xDSL cannot hold.
    """
    with module.context:
        imported = _Importer().op(module.operation)
    assert isinstance(imported, ModuleOp)
    return imported


# xDSL to MLIR --------------------------------------------------------------------------------------------------------


class _Exporter:
    """Builds jaxlib operations in the current context; an attribute object is converted once."""

    def __init__(self) -> None:
        self.types: dict[Attribute, ir.Type] = {}
        self.attrs: dict[int, ir.Attribute] = {}
        self.types_by_id: dict[int, ir.Type] = {}
        self.texts: dict[str, ir.Attribute] = {}
        self.locs: dict[Attribute | None, ir.Location] = {None: ir.Location.unknown()}
        self.values: dict[SSAValue, ir.Value] = {}

    def type(self, type_: Attribute) -> ir.Type:
        # An id stays valid: the module that holds the object outlives the export.
        converted = self.types_by_id.get(id(type_))
        if converted is None:
            converted = self.types.get(type_)
            if converted is None:
                converted = self.types[type_] = self._convert_type(type_)
            self.types_by_id[id(type_)] = converted
        return converted

    def _convert_type(self, type_: Attribute) -> ir.Type:
        try:
            return ir.Type.parse(_print(type_))
        except ir.MLIRError as error:
            raise InvalidIRError(f"type {type_} has no form in JAX's MLIR: it must be lowered first") from error

    def attr(self, attr: Attribute) -> ir.Attribute:
        converted = self.attrs.get(id(attr))
        if converted is None:
            converted = self.attrs[id(attr)] = self._convert_attr(attr)
        return converted

    def _convert_attr(self, attr: Attribute) -> ir.Attribute:
        if isinstance(attr, DenseIntOrFPElementsAttr):
            return self._dense(attr)
        if isinstance(attr, StringAttr):
            return ir.StringAttr.get(attr.data)
        if isinstance(attr, BytesAttr):
            return ir.StringAttr.get(attr.data)
        if isinstance(attr, FloatAttr):
            return ir.FloatAttr.get(self.type(attr.type), attr.value.data)
        if isinstance(attr, ArrayAttr):
            return ir.ArrayAttr.get([self.attr(element) for element in attr.data])
        if isinstance(attr, DictionaryAttr):
            return ir.DictAttr.get(self.dictionary(attr.data))
        if isinstance(attr, FunctionType):
            return ir.TypeAttr.get(self.type(attr))
        text = _print(attr)
        if text not in self.texts:
            try:
                self.texts[text] = ir.Attribute.parse(text)
            except ir.MLIRError as error:
                raise InvalidIRError(f"attribute {text} has no form in JAX's MLIR: it must be lowered first") from error
        return self.texts[text]

    def dictionary(self, attributes: Mapping[str, Attribute]) -> dict[str, ir.Attribute]:
        return {key: self.attr(attr) for key, attr in attributes.items() if not key.startswith(_PRIVATE_PREFIX)}

    def _dense(self, attr: DenseIntOrFPElementsAttr) -> ir.Attribute:
        element_type, data = attr.get_element_type(), attr.data.data
        dtype = element_dtype(element_type)
        elements: np.ndarray[Any, Any]
        if dtype == np.bool_:
            elements = np.frombuffer(data, np.uint8) != 0
        elif dtype.kind == "c":
            elements = np.frombuffer(data, dtype)
        else:
            elements = np.frombuffer(data, f"i{dtype.itemsize}")
        return ir.DenseElementsAttr.get(elements, type=self.type(element_type), shape=attr.get_shape())

    def op(self, op: Operation, ip: ir.InsertionPoint | None) -> ir.Operation:
        loc_attr = op.attributes.get(LOC)
        loc = self.locs.get(loc_attr)
        if loc is None:
            assert isinstance(loc_attr, StringAttr)
            loc = self.locs[loc_attr] = ir.Location.name(loc_attr.data)
        attributes = self.dictionary(op.attributes)
        attributes.update(self.dictionary(op.properties))
        attributes.pop("op_name__", None)
        name, values = op_name(op), self.values
        try:
            built = ir.Operation.create(
                name,
                results=[self.type(result.type) for result in op.results],
                operands=[values[operand] for operand in op.operands],
                attributes=attributes,
                regions=len(op.regions),
                loc=loc,
                ip=False if ip is None else ip,
            )
        except (ir.MLIRError, ValueError) as error:
            raise InvalidIRError(f"{name} cannot be built in JAX's MLIR: {error}") from error
        for result, new in zip(op.results, built.results, strict=True):
            values[result] = new
        for region, new_region in zip(op.regions, built.regions, strict=True):
            for block in region.blocks:
                new_block = new_region.blocks.append(
                    *[self.type(arg.type) for arg in block.args], arg_locs=[loc] * len(block.args)
                )
                for arg, new_arg in zip(block.args, new_block.arguments, strict=True):
                    values[arg] = new_arg
                inner = ir.InsertionPoint(new_block)
                for inner_op in block.ops:
                    self.op(inner_op, inner)
        return built


def _print(attr: Attribute) -> str:
    stream = StringIO()
    Printer(stream).print_attribute(attr)
    return stream.getvalue()


def export_module(module: ModuleOp, context: ir.Context) -> ir.Module:
    """The module as one of jaxlib's MLIR in ``context``, verified. Attributes whose name starts with "llmir." are left out.

    Raises:
        InvalidIRError: an operation, type or attribute that JAX's MLIR does not have or that does not verify.
    """
    with context, ir.Location.unknown():
        exporter = _Exporter()
        exported = ir.Module.create()
        for key, attr in exporter.dictionary({**module.attributes, **module.properties}).items():
            exported.operation.attributes[key] = attr
        ip = ir.InsertionPoint(exported.body)
        for op in module.ops:
            exporter.op(op, ip)
        try:
            exported.operation.verify()
        except ir.MLIRError as error:
            raise InvalidIRError(f"the module does not verify in JAX's MLIR: {error}") from error
    return exported


def cleanup(module: ir.Module) -> None:
    """Fold constants, merge equal operations and drop unused private functions, in place.

    MLIR's own inliner leaves StableHLO's calls as they are, so it is not run.
    """
    with module.context:
        passmanager.PassManager.parse("builtin.module(canonicalize,cse,symbol-dce)").run(module.operation)


def lower_to_module(fn: Callable[..., Any], *args: Any) -> ModuleOp:
    """The cleaned-up StableHLO module of a function, jitted or not, of arrays or ShapeDtypeStructs (pytrees too)."""
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    module = jitted.lower(*args).compiler_ir("stablehlo")
    cleanup(module)
    return import_module(module)


# Modules called from JAX ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Executable:
    """A module's bytecode and the types of its main function: what a call holds, hashed by identity."""

    bytecode: bytes
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]


def _main(module: ModuleOp) -> func.FuncOp:
    for op in module.ops:
        if isinstance(op, func.FuncOp) and op.sym_name.data == "main":
            return op
    raise InvalidIRError("a module that is called needs a function @main; this one has none")


def _avals(types: Sequence[Attribute]) -> tuple[jax.ShapeDtypeStruct, ...]:
    for type_ in types:
        if not isinstance(type_, TensorType) or not type_.has_static_shape():
            raise InvalidIRError(f"@main of a called module takes and returns tensors of static shape, got {type_}")
    return tuple(
        jax.ShapeDtypeStruct(type_.get_shape(), element_dtype(type_.element_type))
        for type_ in types
        if isinstance(type_, TensorType)
    )


def _export_for_calls(module: ModuleOp) -> _Executable:
    main = _main(module)
    exported = export_module(module, mlir.make_ir_context())
    bytecode = BytesIO()
    exported.operation.write_bytecode(bytecode)
    signature = main.function_type
    return _Executable(
        bytecode=bytecode.getvalue(), inputs=_avals(signature.inputs.data), outputs=_avals(signature.outputs.data)
    )


_executable = weakref_lru_cache(_export_for_calls)

_call = Primitive("llmir_call")
_call.multiple_results = True


@_call.def_abstract_eval
def _call_abstract_eval(*_: Any, executable: _Executable, original: Any) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(out.shape, out.dtype) for out in executable.outputs]


_eager_call = jax.jit(_call.bind, static_argnames=("executable", "original"))


@_call.def_impl
def _call_impl(*args: Any, executable: _Executable, original: Any) -> Any:
    return _eager_call(*args, executable=executable, original=original)


def _call_lowering(ctx: mlir.LoweringRuleContext, *args: Any, executable: _Executable, original: Any) -> Any:
    module = ir.Module.parse(executable.bytecode, context=ctx.module_context.context)
    main = next(op for op in module.body.operations if op.operation.attributes["sym_name"].value == "main")
    results = list(main.type.results)
    name = merge_mlir_modules(ctx.module_context.module, "llmir_main", module)
    return mlir_func.CallOp(results, ir.FlatSymbolRefAttr.get(name), list(args)).results


mlir.register_lowering(_call, _call_lowering)


def _call_jvp(primals: Any, tangents: Any, *, executable: _Executable, original: Callable[..., Any] | None) -> Any:
    if original is None:
        raise LlmirError("a compiled module has no derivative: differentiate the function it was compiled from")
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(lambda *args: list(original(*args)), primals, tangents)


def _call_batch(args: Any, dims: Any, *, executable: _Executable, original: Callable[..., Any] | None) -> Any:
    if original is None:
        raise LlmirError("a compiled module has no vmap: apply vmap to the function it was compiled from")
    in_axes = [None if dim is batching.not_mapped else dim for dim in dims]
    outs = jax.vmap(lambda *args: list(original(*args)), in_axes=in_axes)(*args)
    return outs, [0] * len(outs)


ad.primitive_jvps[_call] = _call_jvp
batching.primitive_batchers[_call] = _call_batch


def call_module(
    module: ModuleOp, *args: jax.typing.ArrayLike, original: Callable[..., Sequence[jax.Array]] | None = None
) -> list[jax.Array]:
    """Call the ``@main`` of a module on arrays, under any transformation that ``jit`` composes with.

    The module is exported at its first call and must not change after it.

    Args:
        module: what to call.
        args: one array for each argument of ``@main``, of its shape and dtype.
        original: function of the same arrays that returns the same results in a sequence, to which ``vmap`` and
            differentiation turn. Hashable, and the same object at each call. Without it they raise LlmirError.

    Raises:
        LlmirError: the arguments are not what ``@main`` takes.
        InvalidIRError: the module cannot be exported.
    """
    executable = _executable(module)
    if len(args) != len(executable.inputs):
        raise LlmirError(f"the module's @main takes {len(executable.inputs)} arrays, got {len(args)}")
    arrays = [jax.numpy.asarray(arg) for arg in args]
    for i, (array, expected) in enumerate(zip(arrays, executable.inputs, strict=True)):
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise LlmirError(
                f"argument {i} of the module's @main must be {expected.dtype}{list(expected.shape)}, "
                f"got {array.dtype}{list(array.shape)}"
            )
    return list(_call.bind(*arrays, executable=executable, original=original))

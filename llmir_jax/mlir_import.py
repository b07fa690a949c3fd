"""jaxlib's MLIR modules to xDSL modules, by walking operations.

Printing and parsing text instead would be slower, and wrong: xDSL's parser reads ``dense<0xFF800000>`` (minus infinity)
as the number 4286578688. Dense elements travel as raw bytes, so every dtype JAX has is exact, NaN payloads included.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import cast

import numpy as np
from jaxlib.mlir import ir
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
    StringAttr,
    SymbolRefAttr,
    TensorType,
    TupleType,
    UnitAttr,
)
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue, TypeAttribute
from xdsl.irdl import OptionalDef
from xdsl.parser import Parser
from xdsl.utils.exceptions import ParseError

from llmir_jax.dense import FLOAT_TYPES, element_bytes, elements_from_text
from llmir_jax.dialects.stablehlo_ext import CHLO, StableHLO
from llmir_jax.errors import InvalidIRError

LOC = "llmir.loc"
"""Attribute of an imported operation: the user's source line it comes from, as ``file.py:LINE (function)``.

Operations inside functions that JAX shares between callers (``jnp.where`` …) have none: whoever inlines the call
gives them the call's.
"""


MLIR_NAMES = {("stablehlo.compare", "comparison_type"): "compare_type"}
"""MLIR's names of the properties that xdsl-jax calls otherwise."""


def make_context() -> Context:
    """A context with the dialects that JAX's modules use; what it does not know passes through unregistered."""
    context = Context(allow_unregistered=True)
    for dialect in (builtin.Builtin, func.Func, StableHLO, CHLO):
        context.load_dialect(dialect)
    return context


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
            shape = [
                builtin.DYNAMIC_INDEX if type_.is_dynamic_dim(i) else type_.get_dim_size(i) for i in range(type_.rank)
            ]
            encoding = type_.encoding
            element_type = self.type(type_.element_type)
            if encoding is None:
                return TensorType(element_type, shape)
            return TensorType(element_type, shape, self.attr(encoding))
        if isinstance(type_, ir.FunctionType):
            return FunctionType.from_lists([self.type(t) for t in type_.inputs], [self.type(t) for t in type_.results])
        if isinstance(type_, ir.TupleType):
            elements = [self.type(type_.get_type(i)) for i in range(type_.num_types)]
            return TupleType(ArrayAttr(cast(list[TypeAttribute], elements)))
        if isinstance(type_, ir.ComplexType):
            return ComplexType(cast(builtin.AnyFloat, self.type(type_.element_type)))
        text = str(type_)
        for float_type in FLOAT_TYPES.values():  # xDSL's parser does not know the types narrower than a byte
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
            return IntegerAttr(attr.value, cast(IntegerType, self.type(attr.type)))
        if isinstance(attr, ir.FloatAttr):
            return FloatAttr(attr.value, cast(builtin.AnyFloat, self.type(attr.type)))
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
        text = str(attr)
        if text.startswith("dense_resource<"):
            raise InvalidIRError(f"elements outside the module, as in {text}, are not supported: make them dense")
        return _parse(text, Parser.parse_attribute)

    def _dense(self, attr: ir.DenseElementsAttr) -> Attribute:
        tensor_type = self.type(attr.type)
        if not isinstance(tensor_type, TensorType):
            raise InvalidIRError(f"dense elements of type {tensor_type} are not supported: only those of tensors are")
        try:
            elements = np.asarray(memoryview(attr))  # a splat has strides of zero
        except BufferError:
            body = str(attr).removeprefix("dense<").rpartition("> :")[0]
            elements = elements_from_text(body, tensor_type.element_type)
        if attr.is_splat:
            elements = elements.reshape(-1)[:1]
        return DenseIntOrFPElementsAttr(tensor_type, BytesAttr(element_bytes(elements)))

    def _attributes(self, op: ir.Operation) -> dict[str, Attribute]:
        try:
            items = op.attributes.items()
        except TypeError:  # jaxlib cannot make a Python object of complex elements, and aborts on access by index
            return self._complex_constant(op)
        return {key: self.attr(attr) for key, attr in items}

    def _complex_constant(self, op: ir.Operation) -> dict[str, Attribute]:
        text = op.get_asm(print_generic_op_form=True, assume_verified=True)
        match = re.search(r'"stablehlo\.constant"\(\) <\{value = dense<([^<>]*)> : ', text)
        if match is None:
            raise InvalidIRError(f"{op.name} has complex elements in an attribute: only stablehlo.constant may")
        tensor_type = self.type(op.results[0].type)
        assert isinstance(tensor_type, TensorType)
        elements = elements_from_text(match.group(1), tensor_type.element_type)
        value = DenseIntOrFPElementsAttr(tensor_type, BytesAttr(element_bytes(elements)))
        others = {key: self.attr(op.attributes[key]) for key in op.attributes if key != "value"}
        return {"value": value, **others}

    def op(self, op: ir.Operation) -> Operation:
        name, values = op.name, self.values
        op_class = _op_class(name)
        attributes, properties = self._attributes(op), {}
        for key, (xdsl_key, default) in _properties(op_class).items():
            attr = attributes.pop(key, default)
            if attr is not None:
                properties[xdsl_key] = attr
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
def _properties(op_class: type[Operation]) -> dict[str, tuple[str, Attribute | None]]:
    """From MLIR's names of an operation's properties to xDSL's, and the values of those that xDSL needs present."""
    get_definition = getattr(op_class, "get_irdl_definition", None)
    if get_definition is None:
        return {}
    return {
        MLIR_NAMES.get((op_class.name, name), name): (
            name,
            None if isinstance(definition, OptionalDef) else definition.default_value,
        )
        for name, definition in get_definition().properties.items()
    }


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

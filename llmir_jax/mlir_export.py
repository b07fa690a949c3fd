"""xDSL modules to jaxlib's MLIR modules, by walking operations; constants go as raw bytes."""

from collections.abc import Mapping
from io import StringIO
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from xdsl.dialects.builtin import (
    ArrayAttr,
    BytesAttr,
    DenseIntOrFPElementsAttr,
    DictionaryAttr,
    FloatAttr,
    FunctionType,
    IntegerType,
    ModuleOp,
    StringAttr,
    UnregisteredOp,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.printer import Printer

from llmir_jax.dense import element_dtype
from llmir_jax.errors import InvalidIRError
from llmir_jax.mlir_import import LOC, MLIR_NAMES

_PRIVATE_PREFIX = "llmir."


def op_name(op: Operation) -> str:
    """The operation's name in MLIR, of an unregistered operation too."""
    return op.op_name.data if isinstance(op, UnregisteredOp) else op.name


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
            elements = np.frombuffer(data, f"u{dtype.itemsize}")
            if isinstance(element_type, IntegerType) and element_type.width.data < 8:
                elements = elements & np.uint8(2**element_type.width.data - 1)
        return ir.DenseElementsAttr.get(elements, type=self.type(element_type), shape=attr.get_shape())

    def op(self, op: Operation, ip: ir.InsertionPoint | None) -> ir.Operation:
        loc_attr = op.attributes.get(LOC)
        loc = self.locs.get(loc_attr)
        if loc is None:
            assert isinstance(loc_attr, StringAttr)
            loc = self.locs[loc_attr] = ir.Location.name(loc_attr.data)
        attributes = self.dictionary(op.attributes)
        for key, attr in op.properties.items():
            attributes[MLIR_NAMES.get((op.name, key), key)] = self.attr(attr)
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
    """The module as one of jaxlib's MLIR in ``context``, verified, without attributes whose name starts with "llmir.".

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

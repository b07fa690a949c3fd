"""Arguments of @main by role. A parameter has `llmir.path`, a step input `llmir.role` ("tokens", "cache" …)."""

from collections.abc import Iterable

from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, IntegerAttr, StringAttr, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, BlockArgument, SSAValue

from llmir_jax.errors import InvalidIRError

ROLE = "llmir.role"
PATH = "llmir.path"
GROUP = "llmir.group"


def argument_attributes(function: FuncOp) -> list[dict[str, Attribute]]:
    """A dictionary for each argument."""
    if function.arg_attrs is None:
        return [{} for _ in function.body.block.args]
    return [dict(entry.data) for entry in function.arg_attrs.data]


def _text(attributes: dict[str, Attribute], name: str) -> str | None:
    value = attributes.get(name)
    return value.data if isinstance(value, StringAttr) else None


def role_of(attributes: dict[str, Attribute]) -> str | None:
    """The role that an argument's dictionary says, or None."""
    return _text(attributes, ROLE)


def arguments(function: FuncOp, role: str) -> list[BlockArgument]:
    """Arguments of a role, in order (of cache group, for those there are one a group of)."""
    pairs = zip(function.body.block.args, argument_attributes(function), strict=True)
    return [arg for arg, attributes in pairs if _text(attributes, ROLE) == role]


def argument(function: FuncOp, role: str) -> BlockArgument:
    """The one argument of a role; InvalidIRError if there is none, or several."""
    found = arguments(function, role)
    if len(found) != 1:
        raise InvalidIRError(f'@main: expected one argument of {ROLE} = "{role}", got {len(found)}')
    return found[0]


def parameter_paths(function: FuncOp) -> list[tuple[BlockArgument, str]]:
    """Arguments that are parameters of the model, with their paths."""
    pairs = zip(function.body.block.args, argument_attributes(function), strict=True)
    return [(arg, path) for arg, attributes in pairs if (path := _text(attributes, PATH)) is not None]


def store(function: FuncOp, attributes: Iterable[dict[str, Attribute]]) -> None:
    """Set the arguments' dictionaries, and make the function's type agree with its block and its return."""
    store_attributes(function, attributes)
    function.update_function_type()
    results = function.function_type.outputs.data
    if function.res_attrs is None or len(function.res_attrs.data) != len(results):
        function.properties.pop("res_attrs", None)


def store_attributes(function: FuncOp, attributes: Iterable[dict[str, Attribute]]) -> None:
    """Set the arguments' dictionaries, and nothing else."""
    function.properties["arg_attrs"] = ArrayAttr([DictionaryAttr(entry) for entry in attributes])


def sync(function: FuncOp) -> None:
    """Make the function's type agree with its block and its return."""
    store(function, argument_attributes(function))


def add_argument(
    function: FuncOp, role: str, type: Attribute, *, group: int | None = None, index: int | None = None
) -> BlockArgument:
    """A new argument of `role`, last or at `index`."""
    attributes = argument_attributes(function)
    index = len(attributes) if index is None else index
    arg = function.body.block.insert_arg(type, index)
    entry: dict[str, Attribute] = {ROLE: StringAttr(role)}
    if group is not None:
        entry[GROUP] = IntegerAttr(group, i64)
    attributes.insert(index, entry)
    store(function, attributes)
    return arg


def remove_argument(function: FuncOp, arg: BlockArgument) -> None:
    """Remove an argument that nothing uses."""
    attributes = argument_attributes(function)
    del attributes[arg.index]
    function.body.block.erase_arg(arg)
    store(function, attributes)


def results(function: FuncOp) -> list[SSAValue]:
    """What @main returns."""
    last = function.body.block.last_op
    assert last is not None
    return list(last.operands)


def set_results(function: FuncOp, values: Iterable[SSAValue]) -> None:
    """Make @main return `values`."""
    last = function.body.block.last_op
    assert last is not None
    last.operands = list(values)
    sync(function)


def retype(value: SSAValue, type: Attribute) -> None:
    """Change a value's type in place. Its users must be changed to agree."""
    value._type = type  # xDSL's rewriter would replace the value; passes here keep identities

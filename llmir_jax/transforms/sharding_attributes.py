"""Where values live, in the IR: `llmir.sharding` of arguments, and Shardy's constraints between operations.

    @main(%w: tensor<576x1536xf32> {llmir.path = "up", llmir.sharding = [[], ["tensor"]]}, …)
    %1 = "sdy.sharding_constraint"(%0) {sharding = #sdy.sharding<mesh<["tensor"=3]>, [{}, {"tensor"}]>} : …

An entry for each dimension has the mesh axes that split it, the outermost first. A mesh is written as
``tensor=3,sequence=2``; in the order in which its devices are numbered.
"""

from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.ir import Attribute, SSAValue

from llmir_jax.dialects.build import OpBuilder
from llmir_jax.dialects.parser import IRParser
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import make_context, op_name

SHARDING = "llmir.sharding"

Spec = tuple[tuple[str, ...], ...]
"""The axes that split each dimension."""


def mesh_of(text: str) -> AbstractMesh:
    """The mesh that a pass is told of. Raises InvalidIRError for what is none."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise InvalidIRError(f"mesh: expected axes and sizes such as tensor=3,sequence=2, got {text!r}")
        sizes[name] = int(size)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The inverse of `mesh_of`."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def spec_from(spec: PartitionSpec, rank: int) -> Spec:
    """A PartitionSpec with an entry for each dimension."""
    entries = [() if axis is None else (axis,) if isinstance(axis, str) else tuple(axis) for axis in spec]
    return (*entries, *[()] * (rank - len(entries)))


def partition_spec(spec: Spec) -> PartitionSpec:
    """The inverse of `spec_from`."""
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in spec))


def to_attribute(spec: Spec) -> Attribute:
    """The value of `llmir.sharding`."""
    return ArrayAttr([ArrayAttr([StringAttr(axis) for axis in axes]) for axes in spec])


def of_argument(attributes: Mapping[str, Attribute]) -> Spec | None:
    """Where an argument lives; None if nothing says so."""
    found = attributes.get(SHARDING)
    if not isinstance(found, ArrayAttr):
        return None
    return tuple(tuple(axis.data for axis in axes.data) for axes in found.data)


def constrain(builder: OpBuilder, value: SSAValue, spec: Spec, mesh: AbstractMesh) -> SSAValue:
    """The value, where a spec says that it lives."""
    axes = ", ".join(f'"{name}"={size}' for name, size in dict(mesh.shape).items())
    dims = ", ".join(f"{{{', '.join(f'{chr(34)}{axis}{chr(34)}' for axis in own)}}}" for own in spec)
    context = make_context()
    sharding = IRParser(context, f"#sdy.sharding<mesh<[{axes}]>, [{dims}]>").parse_attribute()
    kind = context.get_op("sdy.sharding_constraint")
    op = kind.create(operands=[value], result_types=[value.type], attributes={"sharding": sharding})
    return builder.insert(op).results[0]


def inline_meshes(module: ModuleOp) -> None:
    """Write the meshes that shardings name (``<@mesh, …>``, as `jax.shard_map` has them) out where they are named."""
    meshes: dict[str, str] = {}
    for op in module.walk():
        if op_name(op) == "sdy.mesh":
            name = op.attributes["sym_name"]
            assert isinstance(name, StringAttr)
            meshes[f"<@{name.data}, "] = f"<{str(op.attributes['mesh']).removeprefix('#sdy.')}, "
    for op in module.walk() if meshes else ():
        for key in ("in_shardings", "out_shardings", "sharding"):
            if key in op.attributes:
                text = str(op.attributes[key])
                for symbol, mesh in meshes.items():
                    text = text.replace(symbol, mesh)
                op.attributes[key] = IRParser(make_context(), text).parse_attribute()


def split_of(spec: Spec, dim: int, mesh: AbstractMesh) -> int:
    """Into how many parts a dimension is."""
    sizes = dict(mesh.shape)
    parts = 1
    for axis in spec[dim]:
        parts *= sizes[axis]
    return parts


def has(mesh: AbstractMesh, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of the axes that the mesh has."""
    return tuple(axis for axis in axes if axis in mesh.axis_names)

"""Cuts a step into stages of layers, each a module of its own, for devices that work one after the other.

    @main(tokens, parameters of 30 layers, pages of 30 layers)  →  logits, new pages
      →  4 stages of 8, 8, 7 and 7 layers
    @main(tokens, parameters and pages of 8 layers)             →  %x, new pages
    @main(%x, parameters and pages of 8 layers)                 →  %x, new pages      …
    @main(%x, parameters and pages of 7 layers)                 →  logits, new pages

Between the last attention of one stage and the first of the next the cut is where the fewest bytes are alive: what
crosses it, most often the residual stream alone, is an argument of role "carried" of the next stage. What follows from
the step's inputs alone, such as positions' sines, is computed again in every stage that reads it, and a parameter that
several read, such as tied embeddings, is an argument of each. Where layers cannot be shared out evenly the first stages
have one more, since the last has the head.
"""

from collections.abc import Sequence
from math import prod

from xdsl.dialects.builtin import FunctionType, IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, BlockArgument, Operation, Region, SSAValue

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, shape_of
from llmir_jax.errors import LlmirError
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_allocation import LAYER, RESULT

CARRIED = "carried"
"""The role of what a stage gets from the one before."""
_STATE = ("k_pages", "v_pages")


def layers_of_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """How many layers each stage has: 30 over 4 is 8, 8, 7, 7. Raises LlmirError for fewer layers than stages."""
    if num_layers < num_stages:
        raise LlmirError(f"mesh: {num_layers} layers cannot be divided over pipeline = {num_stages}: lower it")
    share, more = divmod(num_layers, num_stages)
    return tuple(share + (stage < more) for stage in range(num_stages))


def cut_into_stages(module: ModuleOp, num_stages: int) -> list[ModuleOp]:
    """The modules of the stages, in order; `module` stays as it is. Raises LlmirError for too few layers."""
    main = main_function(module)
    ops = [op for op in main.body.block.ops if not isinstance(op, ReturnOp)]
    layers = [at for at, op in enumerate(ops) if isinstance(op, llm.AttendPagesOp)]
    counts = layers_of_stages(len(layers), num_stages)
    free = _free_values(main, ops)
    cuts, done = [0], 0
    for count in counts[:-1]:
        done += count
        cuts.append(_cheapest_cut(main, ops, range(layers[done - 1] + 1, layers[done] + 1), free))
    cuts.append(len(ops))
    return [
        _stage(module, ops, cuts[stage], cuts[stage + 1], free, is_last=stage == num_stages - 1)
        for stage in range(num_stages)
    ]


def _free_values(main: FuncOp, ops: Sequence[Operation]) -> set[SSAValue]:
    """What is computed from the step's inputs alone, without parameters or pages, and those inputs."""
    attributes = signature.argument_attributes(main)
    free: set[SSAValue] = set()
    for arg in main.body.block.args:
        if signature.role_of(attributes[arg.index]) not in (None, *_STATE):
            free.add(arg)
    for op in ops:
        if not op.regions and all(x in free for x in op.operands):
            free.update(op.results)
    return free


def _live(main: FuncOp, ops: Sequence[Operation], at: int, free: set[SSAValue]) -> list[SSAValue]:
    """Values made before a place that are read from it on, but for arguments, what is free, and new pages."""
    before = [x for op in ops[:at] for x in op.results if x not in free]
    later = {id(x) for op in ops[at:] for inner in op.walk() for x in inner.operands}
    logits = signature.results(main)[0]
    return [x for x in before if id(x) in later or x is logits]


def _cheapest_cut(main: FuncOp, ops: Sequence[Operation], places: range, free: set[SSAValue]) -> int:
    def cost(at: int) -> int:
        return sum(prod(shape_of(x)) * dtype_of(x).itemsize for x in _live(main, ops, at, free))

    return min(places, key=lambda at: (cost(at), -at))


def _stage(
    module: ModuleOp, ops: Sequence[Operation], start: int, stop: int, free: set[SSAValue], *, is_last: bool
) -> ModuleOp:
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    arrives = _live(main, ops, start, free) if start else []
    leaves = [] if is_last else _live(main, ops, stop, free)
    own = [op for op in ops[start:stop] if not all(x in free for x in op.results)]
    needed = _again(own, leaves, free)
    body = [op for op in ops if op in needed or op in set(own)]
    used = {x for op in body for inner in op.walk() for x in inner.operands if isinstance(x, BlockArgument)}
    args = [
        arg
        for arg in main.body.block.args
        if arg in used or (is_last and signature.role_of(attributes[arg.index]) == "logits_rows")
    ]
    block = Block(arg_types=[*(x.type for x in arrives), *(arg.type for arg in args)])
    mapping: dict[SSAValue, SSAValue] = dict(zip((*arrives, *args), block.args, strict=True))
    for op in body:
        block.add_op(op.clone(mapping))
    logits, *pages = signature.results(main)
    entries: list[dict[str, Attribute]] = [{signature.ROLE: StringAttr(CARRIED)} for _ in arrives]
    entries += [dict(attributes[arg.index]) for arg in args]
    results = [logits] if is_last else leaves
    results = [*results, *_renumbered(entries, [logits, *pages], len(results))]
    block.add_op(ReturnOp(*(mapping[x] for x in results)))
    types = FunctionType.from_lists([x.type for x in block.args], [mapping[x].type for x in results])
    function = FuncOp("main", types, Region(block))
    signature.store_attributes(function, entries)
    return ModuleOp([function], dict(module.attributes))


def _renumbered(entries: list[dict[str, Attribute]], results: Sequence[SSAValue], first: int) -> list[SSAValue]:
    """The new pages of the stage, in order; its pages' attributes then say where they are among its own results."""
    kept: list[SSAValue] = []
    seen: dict[int, list[int]] = {}
    for entry in entries:
        place = entry.get(RESULT)
        if not isinstance(place, IntegerAttr):
            continue
        kept.append(results[place.value.data])
        entry[RESULT] = IntegerAttr(first + len(kept) - 1, i64)
        layer, group = entry[LAYER], entry.get(signature.GROUP)
        assert isinstance(layer, IntegerAttr)
        own = seen.setdefault(group.value.data if isinstance(group, IntegerAttr) else 0, [])
        if layer.value.data not in own:
            own.append(layer.value.data)
        entry[LAYER] = IntegerAttr(own.index(layer.value.data), i64)
    return kept


def _again(own: Sequence[Operation], leaves: Sequence[SSAValue], free: set[SSAValue]) -> set[Operation]:
    """Operations of free values that a stage computes for itself."""
    found: set[Operation] = set()
    pending = [x for op in own for inner in op.walk() for x in inner.operands] + list(leaves)
    while pending:
        value = pending.pop()
        op = value.owner
        if value in free and isinstance(op, Operation) and op not in found:
            found.add(op)
            pending += op.operands
    return found

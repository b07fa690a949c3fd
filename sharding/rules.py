"""Where parameters live: rules from their paths to PartitionSpecs.

    {"attn/(q|k|v)/kernel": (None, "tensor"), "mlp/down/kernel": ("tensor", None)}

A rule is a regular expression for one or several whole components of a path, in a row and anywhere in it; "/" and "."
both separate components. Its spec has a mesh axis, several or None for each of the last dimensions of the parameter;
dimensions before them, such as those of stacked layers, are not split. The first rule that matches decides, of the
defaults the first that matches and divides; what no rule matches is on every device.

The defaults cut matrices in pairs, columns first and then rows, so that each pair needs one all-reduce (Megatron-LM,
https://arxiv.org/abs/1909.08053), and tables and heads along the vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError
from sharding.mesh import AXES, EXPERT, TENSOR, TENSOR_COPIES

KV_HEADS = "kv_heads"
"""In a spec: `tensor`, without its copies. Of keys and values, of which some devices have the same."""

AnyMesh = Mesh | AbstractMesh
"""Rules ask for names and sizes only."""
Axis = str | None | tuple[str, ...]
Spec = Sequence[Axis] | PartitionSpec


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A pattern for paths, and what splits each of the last dimensions of the parameters that it matches."""

    pattern: str
    spec: tuple[Axis, ...]
    is_default: bool = False
    """Whether axes that the mesh does not have split nothing, and sizes that do not divide are not split: a default
    is for any model and any mesh. Other rules are taken at their word."""

    def matches(self, path: str) -> bool:
        """Whether it is for the parameter of this path."""
        slashed = path.replace(".", "/")
        forms = (("/", slashed), (r"\.", slashed.replace("/", ".")))
        return any(re.search(rf"(?:^|{s})(?:{self.pattern})(?:{s}|$)", form) for s, form in forms)


def _defaults(spec: tuple[Axis, ...], suffix: str, *names: str) -> Rule:
    return Rule(pattern=f"({'|'.join(names)})/{suffix}", spec=spec, is_default=True)


_QUERIES = ("q", "q_proj", "wq", "query", "qkv", "c_attn", "qkv_proj")
_KEYS = ("k", "v", "k_proj", "v_proj", "wk", "wv", "key", "value")
_INTO_MLP = ("gate", "up", "fc", "gate_proj", "up_proj", "c_fc", "fc1", "w1", "w3", "fc_in", "wi", "wi_0", "wi_1")
_OUT = ("o", "down", "proj", "o_proj", "down_proj", "c_proj", "out_proj", "fc2", "w2", "wo", "fc_out")
_HEADS = ("head", "lm_head", "logits", "output")
_WEIGHT = "(kernel|w)"

DEFAULT_RULES = (
    # mixtures of experts, whose matrices are stacked, [experts, inputs, outputs]: whole experts where that can be, as a
    # product that sums over experts and channels is one over both together, of which only the outer can be split
    Rule(pattern="experts/.*", spec=((EXPERT, TENSOR), None, None), is_default=True),
    Rule(pattern="experts/.*(down|w2|wo)(/kernel)?", spec=(EXPERT, TENSOR, None), is_default=True),
    Rule(pattern="experts/.*(gate|up|w1|w3|wi)(/kernel)?", spec=(EXPERT, None, TENSOR), is_default=True),
    # columns: heads, and the channels of the MLP
    _defaults((None, KV_HEADS), _WEIGHT, *_KEYS),
    _defaults((KV_HEADS,), "bias", *_KEYS),
    _defaults((None, TENSOR), _WEIGHT, *_QUERIES, *_INTO_MLP),
    _defaults((TENSOR,), "bias", *_QUERIES, *_INTO_MLP),
    # rows: back to the residual stream, with one all-reduce; the bias is added once
    _defaults((TENSOR, None), _WEIGHT, *_OUT),
    # vocabulary: rows of the table, columns of the head
    _defaults((TENSOR, None), "embedding", "embed", "embed_tokens", "wte", "token_embedding", "tok_embeddings"),
    _defaults((None, TENSOR), _WEIGHT, *_HEADS),
    _defaults((TENSOR,), "bias", *_HEADS),
)  # fmt: skip
"""For Llama, Mistral, Qwen, GPT-2 and models whose parameters have such names: flax's, Hugging Face's, MaxText's."""


def parse_rules(rules: Mapping[str, Spec] | None) -> tuple[Rule, ...]:
    """A user's rules, in order, and after them the defaults. Raises ShardingError for what is no rule."""
    made = []
    for pattern, spec in (rules or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ShardingError(f"rules: {pattern!r} is not a regular expression: {error}") from None
        if isinstance(spec, str):
            raise ShardingError(
                f"rules: {pattern!r} has {spec!r}; expected an axis or None for each dimension: ({spec!r},)"
            )
        axes = tuple(tuple(axis) if isinstance(axis, list) else axis for axis in spec)
        known = (*AXES, KV_HEADS)
        for name in (name for axis in axes for name in names_of(axis)):
            if name not in known:
                raise ShardingError(f"rules: {pattern!r} names the axis {name!r}; the axes are {', '.join(AXES)}")
        made.append(Rule(pattern=pattern, spec=axes))
    return (*made, *DEFAULT_RULES)


def partition_spec(
    path: str, shape: Sequence[int], mesh: AnyMesh, rules: Sequence[Rule] = DEFAULT_RULES
) -> PartitionSpec:
    """Where a parameter lives on a mesh.

    Raises:
        ShardingError: a rule that names an axis the mesh does not have, has more dimensions than the parameter, or
            splits a dimension that its axes do not divide.
    """
    matching = [rule for rule in rules if rule.matches(path)]
    if not matching:
        return PartitionSpec()
    if matching[0].is_default:
        matching = [rule for rule in matching if _divides(rule, shape, mesh)] or matching
    return spec_of(matching[0], path, shape, mesh)


def _divides(rule: Rule, shape: Sequence[int], mesh: AnyMesh) -> bool:
    """Whether a default rule splits all that it wants to, of the axes that the mesh has."""
    if len(rule.spec) > len(shape):
        return False
    sizes = dict(mesh.shape)
    for size, axis in zip(shape[len(shape) - len(rule.spec) :], rule.spec, strict=True):
        if size % prod(sizes.get(name, 1) for each in names_of(axis) for name in _on(mesh, each)):
            return False
    return True


def spec_of(rule: Rule, path: str, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """What a rule means for a parameter of this shape on a mesh. Raises ShardingError, see `partition_spec`."""
    if len(rule.spec) > len(shape):
        if rule.is_default:
            return PartitionSpec()
        raise ShardingError(
            f"rules: {rule.pattern!r} splits {len(rule.spec)} dimensions, but {path!r} is {list(shape)}, "
            f"which has {len(shape)}"
        )
    padding: tuple[Axis, ...] = (None,) * (len(shape) - len(rule.spec))
    sizes = dict(mesh.shape)
    out: list[Axis] = []
    for size, axis in zip(shape, (*padding, *rule.spec), strict=True):
        names = [name for each in names_of(axis) for name in _on(mesh, each)]
        if rule.is_default:
            names = [name for name in names if name in sizes]
        elif missing := [name for name in names if name not in sizes]:
            raise ShardingError(
                f"rules: {rule.pattern!r} splits {path!r} over {missing[0]!r}, but the mesh has only "
                f"{', '.join(map(repr, sizes))}"
            )
        parts = prod(sizes[name] for name in names)
        if size % parts:
            if rule.is_default:
                names = []
            else:
                raise ShardingError(
                    f"rules: {rule.pattern!r} splits a dimension of {path!r} {list(shape)}, {size}, over "
                    f"{' × '.join(f'{name} {sizes[name]}' for name in names)}, which does not divide it"
                )
        out.append(None if not names else names[0] if len(names) == 1 else tuple(names))
    while out and out[-1] is None:
        out.pop()
    return PartitionSpec(*out)


def shardings(
    shapes: Mapping[str, Sequence[int]], mesh: Mesh, rules: Mapping[str, Spec] | None = None
) -> dict[str, NamedSharding]:
    """Where every parameter of a model lives, by path. Raises ShardingError for rules that cannot be, or match none."""
    parsed = parse_rules(rules)
    check_used(parsed, shapes)
    return {path: NamedSharding(mesh, partition_spec(path, shape, mesh, parsed)) for path, shape in shapes.items()}


def check_used(rules: Sequence[Rule], paths: Mapping[str, object] | Sequence[str]) -> None:
    """Raises ShardingError for a rule of a user's that matches no path."""
    for rule in rules:
        if not rule.is_default and not any(map(rule.matches, paths)):
            some = ", ".join(map(repr, list(paths)[:3]))
            raise ShardingError(f"rules: {rule.pattern!r} matches no parameter; the {len(paths)} are such as {some}")


def names_of(axis: Axis) -> tuple[str, ...]:
    """The axes of a mesh that split a dimension."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _on(mesh: AnyMesh, name: str) -> tuple[str, ...]:
    """The axes of the mesh that an axis of a rule is."""
    if name == KV_HEADS:
        return (TENSOR,)
    return (TENSOR, TENSOR_COPIES) if name == TENSOR and TENSOR_COPIES in mesh.axis_names else (name,)

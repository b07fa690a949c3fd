"""Meshes, partition rules, slices and their cost, usable without ``llmir_jax``."""

from sharding.errors import ShardingError
from sharding.mesh import AXES, make_mesh, parse_axes
from sharding.rules import DEFAULT_RULES, Rule, parse_rules, partition_spec, shardings

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "Rule",
    "ShardingError",
    "make_mesh",
    "parse_axes",
    "parse_rules",
    "partition_spec",
    "shardings",
]

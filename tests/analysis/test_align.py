"""Two traces side by side: what follows the length, what depends on it, and when they do not match."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traces import LENGTH, OTHER, WIDTH, Fn, module_at
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import Alignment, align, align_by_size, location, main_function, module_length
from llmir_jax.errors import InvalidIRError, UnsupportedModelError
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(300, WIDTH)), jnp.float32)


def aligned(fn: Fn, other: int = OTHER) -> Alignment:
    return align(module_at(fn, TABLE, LENGTH), module_at(fn, TABLE, other), LENGTH, other)


def varying(alignment: Alignment) -> set[tuple[str, str]]:
    return {(op_name(op), name) for op, names in alignment.varying.items() for name in names}


def test_token_dims() -> None:
    alignment = aligned(lambda table, tokens: jnp.stack([table[tokens], table[tokens]], 2).reshape(1, -1, WIDTH))
    multiples = set(alignment.token_sized.values())
    assert {(0, 1), (0, 1, 0), (0, 2, 0)} <= multiples  # the tokens; their embeddings; two rows a token
    assert alignment.odd == {}
    assert alignment.varying == {}


def test_slices_and_constants_that_depend_on_the_length() -> None:
    alignment = aligned(lambda table, tokens: table[tokens] * tokens.shape[1] + table[: tokens.shape[1]])
    assert varying(alignment) == {("stablehlo.slice", "limit_indices"), ("stablehlo.constant", "value")}


def test_a_constant_that_repeats_one_element_does_not_depend_on_the_length() -> None:
    assert aligned(lambda table, tokens: table[tokens] + jnp.ones((tokens.shape[1], WIDTH))).varying == {}


def test_sizes_that_are_no_multiple() -> None:
    alignment = aligned(lambda table, tokens: jnp.pad(table[tokens], ((0, 0), (1, 0), (0, 0)))[:, :-1])
    assert "132 elements for 131 tokens and 68 for 67" in next(iter(alignment.odd.values()))


def test_a_third_length_widens() -> None:
    """What is the same at two lengths, and differs at a third."""

    def fn(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return table[tokens] * (1 + tokens.shape[1] // 200)

    first = module_at(fn, TABLE, LENGTH)
    alignment = align(first, module_at(fn, TABLE, OTHER), LENGTH, OTHER)
    assert alignment.varying == {}
    alignment.widen(align(first, module_at(fn, TABLE, 400), LENGTH, 400))
    assert varying(alignment) == {("stablehlo.constant", "value")}


def branch(table: jax.Array, tokens: jax.Array) -> jax.Array:
    x = table[tokens]
    return jnp.tanh(x) if tokens.shape[1] > 100 else x


def loop(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.stack([table[tokens[:, i]] for i in range(tokens.shape[1])], 1)


@pytest.mark.parametrize("fn", [branch, loop])
def test_operations_that_depend_on_the_length(fn: Fn) -> None:
    with pytest.raises(
        UnsupportedModelError, match="computes different operations for 131 and for 67 tokens"
    ) as caught:
        aligned(fn)
    assert "test_align.py:" in str(caught.value)


def by_size(fn: Fn) -> Alignment:
    return align_by_size(main_function(module_at(fn, TABLE, LENGTH)), LENGTH)


def test_by_size_agrees_with_two_traces() -> None:
    def fn(table: jax.Array, tokens: jax.Array) -> jax.Array:
        x = (
            table[tokens]
            + table[: tokens.shape[1]]
            + jnp.asarray(np.arange(tokens.shape[1], dtype=np.float32))[:, None]
        )
        return (x.reshape(1, -1) + 1).reshape(x.shape)[..., 2:]

    one, two = by_size(fn), aligned(fn)
    assert list(one.token_sized.values()) == list(two.token_sized.values())
    assert varying(one) == varying(two) == {("stablehlo.slice", "limit_indices"), ("stablehlo.constant", "value")}


def test_by_size_knows_no_more_than_sizes() -> None:
    """A scalar that depends on the length cannot be told from one that does not."""
    assert by_size(lambda table, tokens: table[tokens] * tokens.shape[1]).varying == {}


def test_length_of_a_module() -> None:
    module = module_at(branch, TABLE, LENGTH)
    with pytest.raises(InvalidIRError, match=r"no attribute llmir\.length"):
        module_length(module)


def test_location() -> None:
    module = module_at(branch, TABLE, LENGTH)
    (op,) = (op for op in main_function(module).body.block.ops if isinstance(op, stablehlo.TanhOp))
    assert "test_align.py:" in location(op)
    op.attributes.clear()
    assert location(op) == "unknown location"


def test_no_main() -> None:
    module = module_at(branch, TABLE, LENGTH)
    main = main_function(module)
    assert signature.argument(main, "tokens").index == 1
    main.detach()
    with pytest.raises(UnsupportedModelError, match="no function @main"):
        main_function(module)

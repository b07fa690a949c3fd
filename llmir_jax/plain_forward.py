"""Runs a plain forward piece by piece, so that no more of its parameters are floats at once than one piece reads.

The forward is traced; its operations are cut before each that reads a parameter. Every piece is compiled by itself,
equal ones (the layers) once, together with what makes its parameters of the stored arrays. The product with a large
matrix is computed some rows of the matrix at a time. What a model does inside a scan or a `jit` of its own is one
operation: the parameters that it reads are there at once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from llmir_jax.dense_parameters import Dense, DenseParameters
from llmir_jax.memory import give_back

LARGE = 32 << 20
"""Bytes of a parameter as floats from which on it is multiplied with in parts."""
PART = 4 << 20
"""Bytes of such a part."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class _Piece:
    eqns: list[Any]
    inputs: list[Any]  # variables, in order
    outputs: list[Any]


@dataclass(frozen=True, kw_only=True)
class _LargeProduct:
    """`eqn`, a dot_general whose right side is parameter `index` with its axes in the order `axes`."""

    eqn: Any
    index: int
    axes: tuple[int, ...]


class PlainForward:
    """A forward of model arrays and tokens [1, T], with the arrays in `parameters`.

    Args:
        flat_fn: of the arrays in order, then the tokens; returns [logits [1, T, vocab]].
        shapes: of the arrays.
    """

    def __init__(
        self,
        flat_fn: Callable[..., list[jax.Array]],
        shapes: Sequence[jax.ShapeDtypeStruct],
        parameters: DenseParameters,
        num_tokens: int,
    ) -> None:
        tokens = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
        closed = jax.jit(flat_fn, keep_unused=True).trace(*shapes, tokens).jaxpr
        self._jaxpr, self._consts = closed.jaxpr, closed.consts
        self._parameters = parameters
        *model, self._tokens = self._jaxpr.invars
        self._index = {var: at for at, var in enumerate(model)}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._pieces = self._cut()

    def __call__(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits float32[T, vocab] for tokens int32[T]."""
        env: dict[Any, Any] = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
        env[self._tokens] = jnp.asarray(tokens, jnp.int32)[None]
        last = self._last_uses()
        for at, piece in enumerate(self._pieces):
            if isinstance(piece, _LargeProduct):
                env[piece.eqn.outvars[0]] = self._product(piece, env)
                used = piece.eqn.invars
            else:
                env.update(zip(piece.outputs, self._run(piece, env), strict=True))
                used = piece.inputs
            for var in used:
                if not isinstance(var, Literal) and last.get(var) == at:
                    env.pop(var, None)
        (logits,) = (self._read(var, env) for var in self._jaxpr.outvars)
        rows: np.ndarray[Any, Any] = np.asarray(logits[0], np.float32)
        return rows

    # Cutting

    def _cut(self) -> list[_Piece | _LargeProduct]:
        runs: list[list[Any] | _LargeProduct] = [[]]
        views = {var: (at, tuple(range(len(var.aval.shape)))) for var, at in self._index.items()}
        skipped: dict[Any, Any] = {}  # transposes of large parameters, which only their products see
        for eqn in self._jaxpr.eqns:
            inputs = [var for var in eqn.invars if not isinstance(var, Literal)]
            if eqn.primitive.name == "transpose" and inputs[0] in views and self._is_large(views[inputs[0]][0]):
                at, axes = views[inputs[0]]
                views[eqn.outvars[0]] = at, tuple(axes[d] for d in eqn.params["permutation"])
                skipped[eqn.outvars[0]] = eqn
                continue
            product = self._large_product(eqn, views)
            if product is not None:
                runs += [product, []]
                continue
            needed = [skipped[var] for var in inputs if var in skipped]
            current = runs[-1]
            assert isinstance(current, list)
            if current and (needed or any(var in self._index for var in inputs)):
                current = []
                runs.append(current)
            current += [*needed, eqn]
        return [
            self._piece(run, runs[at + 1 :]) if isinstance(run, list) else run for at, run in enumerate(runs) if run
        ]

    def _is_large(self, index: int) -> bool:
        return self._parameters.nbytes(index) > LARGE

    def _large_product(self, eqn: Any, views: dict[Any, Any]) -> _LargeProduct | None:
        if eqn.primitive.name != "dot_general" or isinstance(eqn.invars[1], Literal) or eqn.invars[1] not in views:
            return None
        index, axes = views[eqn.invars[1]]
        (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
        row_axis = self._parameters.row_axis(index) if self._is_large(index) else None
        if row_axis is None or batch or len(contracted) != 1 or axes[contracted[0]] == row_axis:
            return None
        return _LargeProduct(eqn=eqn, index=index, axes=axes)

    def _piece(self, eqns: list[Any], after: Sequence[list[Any] | _LargeProduct]) -> _Piece:
        made = {var for eqn in eqns for var in eqn.outvars}
        later = {
            var
            for run in after
            for eqn in (run if isinstance(run, list) else [run.eqn])
            for var in eqn.invars
            if not isinstance(var, Literal)
        }
        later |= {var for var in self._jaxpr.outvars if not isinstance(var, Literal)}
        inputs = dict.fromkeys(
            var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal) and var not in made
        )
        outputs = [var for eqn in eqns for var in eqn.outvars if var in later]
        return _Piece(eqns=eqns, inputs=list(inputs), outputs=list(dict.fromkeys(outputs)))

    def _last_uses(self) -> dict[Any, int]:
        last: dict[Any, int] = {}
        for at, piece in enumerate(self._pieces):
            used = piece.eqn.invars if isinstance(piece, _LargeProduct) else piece.inputs
            last |= {var: at for var in used if not isinstance(var, Literal)}
        return {var: at for var, at in last.items() if var not in self._jaxpr.outvars}

    # Running

    def _read(self, var: Any, env: dict[Any, Any]) -> Any:
        if isinstance(var, Literal):
            return var.val
        if var not in self._index:
            return env[var]
        dense = self._parameters.dense(self._index[var])
        return jax.jit(dense.make)(dense.arrays)

    def _run(self, piece: _Piece, env: dict[Any, Any]) -> list[Any]:
        dense = {var: self._parameters.dense(self._index[var]) for var in piece.inputs if var in self._index}
        arrays = [dense[var].arrays if var in dense else env[var] for var in piece.inputs]
        key = (_text(piece), tuple(dense[var].key if var in dense else None for var in piece.inputs))
        if key not in self._compiled:

            def call(arrays: Sequence[Any]) -> list[Any]:
                own = {
                    var: dense[var].make(array) if var in dense else array
                    for var, array in zip(piece.inputs, arrays, strict=True)
                }
                for eqn in piece.eqns:
                    values = [var.val if isinstance(var, Literal) else own[var] for var in eqn.invars]
                    own.update(zip(eqn.outvars, _bind(eqn, values), strict=True))
                return [own[var] for var in piece.outputs]

            self._compiled[key] = jax.jit(call)
        results: list[Any] = self._compiled[key](arrays)
        return results

    def _product(self, product: _LargeProduct, env: dict[Any, Any]) -> Any:
        give_back(collect=False)  # what compiling the pieces before has left
        eqn, index = product.eqn, product.index
        left = self._read(eqn.invars[0], env)
        axis = self._parameters.row_axis(index)
        assert axis is not None
        (var,) = (var for var, at in self._index.items() if at == index)
        total = var.aval.shape[axis]
        results: np.ndarray[Any, Any] = np.empty(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
        step = max(1, PART * total // self._parameters.nbytes(index))
        step = max(16, step // 16 * 16)  # rows of native code's tiles
        for start in range(0, total, step):
            stop = min(start + step, total)
            some = self._parameters.span(index, start, stop)
            results[..., start:stop] = np.asarray(self._multiply(eqn, product.axes, some)(left, some.arrays))
        return jnp.asarray(results)

    def _multiply(self, eqn: Any, axes: tuple[int, ...], some: Dense) -> Callable[..., Any]:
        key = (id(eqn), some.key)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(lambda x, own: _bind(eqn, [x, some.make(own).transpose(axes)])[0])
        return self._compiled[key]


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _text(piece: _Piece) -> str:
    """Equal for pieces that compute the same. Functions in it, such as rules of differentiation, are named only."""
    numbers: dict[Any, int] = {var: at for at, var in enumerate(piece.inputs)}
    lines = [str([str(var.aval) for var in piece.inputs])]
    for eqn in piece.eqns:
        own = [f"{var.val}:{var.aval}" if isinstance(var, Literal) else str(numbers[var]) for var in eqn.invars]
        consts = [id(const) for param in eqn.params.values() for const in _constants(param)]
        numbers.update({var: len(numbers) + at for at, var in enumerate(eqn.outvars)})
        outputs = [str(var.aval) for var in eqn.outvars]
        lines.append(f"{eqn.primitive.name} {own} {outputs} {consts} {_ADDRESS.sub('', str(eqn.params))}")
    lines.append(str([numbers[var] for var in piece.outputs]))
    return "\n".join(lines)


def _constants(param: Any) -> list[Any]:
    """Arrays that an inner program closes over, which its text does not show."""
    if isinstance(param, list | tuple):
        return [const for each in param for const in _constants(each)]
    found = list(getattr(param, "consts", ()))
    inner = getattr(param, "jaxpr", param)
    for eqn in getattr(inner, "eqns", ()):
        found += [const for each in eqn.params.values() for const in _constants(each)]
    return found


__all__ = ["PlainForward"]

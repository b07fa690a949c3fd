"""The tensors of a checkpoint of our own, restored by orbax when they are read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llmir_jax.errors import CheckpointError, LlmirError
from llmir_jax.quantization import QuantizedArray, Scheme

BATCH_BYTES = 32 << 20
PARTS = ("values", "scales", "zero_points", "minima")
ACTIVATION_SCALES = "activation_scales"


def to_tree(parameter: Any, activation_scales: np.ndarray | None = None) -> Any:
    """What orbax is given for a parameter: the array, or a dict of those of a quantized one in rows."""
    if not isinstance(parameter, QuantizedArray):
        return parameter
    in_rows = parameter.laid_out("rows")
    tree = {part: array for part in PARTS if (array := getattr(in_rows, part)) is not None}
    return tree if activation_scales is None else {**tree, ACTIVATION_SCALES: activation_scales}


class OrbaxReader:
    """The tensors in `path`, the directory that orbax wrote: `to_tree` of each, by name.

    `stored` says which are quantized, [outputs, inputs]. Raises CheckpointError where it does not fit what is there.

    Orbax goes through its whole index for each call, so that a call gives more than one small tensor: those that come
    next in `order` are kept until they are read, `BATCH_BYTES` of them at most.
    """

    def __init__(self, path: Path, stored: Mapping[str, Scheme], order: Sequence[str]) -> None:
        import orbax.checkpoint

        self.path = path
        self.stored = stored
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            try:
                self._entries: dict[str, Any] = dict(checkpointer.metadata(path.resolve()).item_metadata.tree)
            except Exception as error:  # tensorstore, orbax and the file system each raise their own
                raise _damaged(path, error) from None
        self._order = [name for name in order if name in self._entries]
        self._ahead: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, entry in self._entries.items():
            if isinstance(entry, dict) != (name in stored):
                raise CheckpointError(f"{path}: tensor {name!r} is quantized in one of weights and manifest only")
            quantized = self._quantized(name, entry, jnp.float32) if name in stored else None
            self.shapes[name] = tuple(entry.shape) if quantized is None else quantized.shape

    def check(self, name: str) -> None:
        """Raises CheckpointError for a tensor that is not of a floating-point type."""
        if name not in self.stored and not jnp.issubdtype(self._entries[name].dtype, jnp.floating):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {self._entries[name].dtype}; expected a floating-point one"
            )

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantized if need be."""
        if name in self.stored:
            return np.asarray(self.read_quantized(name, jnp.float32).dequantize())
        array: np.ndarray = self._restore(name)
        return array

    def read_quantized(self, name: str, dtype: DTypeLike) -> QuantizedArray:
        """A tensor of `stored`, bit for bit."""
        return self._quantized(name, {part: jnp.asarray(array) for part, array in self._restore(name).items()}, dtype)

    def activation_scales(self) -> dict[str, np.ndarray]:
        """Static scales of what is multiplied with tensors whose scheme has such, float32 [G], by the tensor's name.

        Raises CheckpointError where they do not fit the scheme.
        """
        # A table of which rows are looked up is multiplied with nothing, and has none.
        names = [
            name
            for name, scheme in self.stored.items()
            if scheme.static_activations and ACTIVATION_SCALES in self._entries[name]
        ]
        wanted = {name: {ACTIVATION_SCALES: self._entries[name][ACTIVATION_SCALES]} for name in names}
        found = {name: parts[ACTIVATION_SCALES] for name, parts in self._restore_all(wanted).items()} if names else {}
        for name, scales in found.items():
            group_size = self.stored[name].activation_group_size
            num_groups = 1 if group_size is None else self.shapes[name][1] // group_size
            if scales.shape != (num_groups,) or not np.isfinite(scales).all():
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has scales of activations {list(scales.shape)}, expected "
                    f"{[num_groups]} finite ones; save it again"
                )
        return found

    def _quantized(self, name: str, parts: Any, dtype: DTypeLike) -> QuantizedArray:
        """Of arrays, or of what has the shapes and dtypes of arrays."""
        scheme = self.stored[name]
        try:
            n, packed = parts["values"].shape
            k = packed * 8 // scheme.bits
            array = QuantizedArray(
                **{part: parts.get(part) for part in PARTS},
                bits=scheme.bits,
                group_size=scheme.group_size or k,
                shape=(n, k),
                dtype=jnp.dtype(dtype),
            )
            array.check(name)
        except (KeyError, ValueError, AttributeError, LlmirError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} is not of the manifest's format: {error}") from None
        if array.kind != scheme.kind or array.scales.dtype != scheme.dtype:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {array.scheme.name!r}, but the manifest says {scheme.name!r}"
            )
        return array

    def _restore(self, name: str) -> Any:
        """The arrays of a tensor, in numpy."""
        if name not in self._ahead:
            self._ahead = self._restore_batch(self._batch(name))
        return self._ahead.pop(name)

    def _batch(self, first: str) -> list[str]:
        names, num_bytes = [first], _num_bytes(self._entries[first])
        for name in self._order[self._order.index(first) + 1 :]:
            num_bytes += _num_bytes(self._entries[name])
            if num_bytes > BATCH_BYTES:
                break
            names.append(name)
        return names

    def _restore_batch(self, names: list[str]) -> dict[str, Any]:
        return self._restore_all({name: self._entries[name] for name in names})

    def _restore_all(self, wanted: dict[str, Any]) -> dict[str, Any]:
        import jax
        import orbax.checkpoint as ocp

        # Processes wait for no other: each reads what it needs, and that may be in more or fewer calls.
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"llmir_read_{own}"
        )
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            try:
                restored: dict[str, Any] = checkpointer.restore(self.path.resolve(), args=args)
            except Exception as error:
                raise _damaged(self.path, error) from None
        return restored


def _num_bytes(entry: Any) -> int:
    arrays = entry.values() if isinstance(entry, dict) else (entry,)
    return sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return CheckpointError(f"{folder}: truncated or corrupt orbax checkpoint: {type(error).__name__}: {first_line}")

"""A GGUF file: header, metadata and tensors, read with every offset and count checked against the file's length.

The `gguf` package's reader takes two seconds for a vocabulary of 49,152 and trusts the counts in the file, so the
header is read here; block sizes and dequantization are the package's.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.typing import DTypeLike

from llmir_jax.checkpoint.files import StableFile
from llmir_jax.checkpoint.gguf_blocks import block_scheme, quantized_from_blocks
from llmir_jax.errors import CheckpointError
from llmir_jax.quantization import QuantizedArray, Scheme

GGML = gguf.GGMLQuantizationType
SUPPORTED_TYPES = tuple(
    GGML[name]
    for name in (
        *("F32", "F16", "BF16"),
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
MAX_DIMS = 4
ROWS_AT_ONCE = 1024
STRING, ARRAY, BOOL = 8, 9, 7
# Metadata scalars by type code: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#file-structure
SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
} | {BOOL: struct.Struct("<?")}


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """A tensor's place in the file: `shape` in elements, in numpy's order; `offset` and `num_bytes` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """`metadata` and `tensors` of the file at `path`; `read` gives a tensor as float32 (float16 if F16).

    Raises CheckpointError for a file that is missing, truncated, corrupt, or has a tensor of a type we do not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = StableFile(path)
            mapped = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from None
        header = _Header(path, mapped)
        self.metadata: Mapping[str, Any] = header.metadata
        self.tensors: Mapping[str, GGUFTensor] = header.tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {name: t.shape for name, t in self.tensors.items()}
        schemes = {name: block_scheme(t.kind) for name, t in self.tensors.items() if len(t.shape) == 2}
        self.stored: Mapping[str, Scheme] = {name: scheme for name, scheme in schemes.items() if scheme is not None}

    def forget(self, prefix: str) -> None:
        """Drop the metadata whose names begin so, once they were read."""
        self.metadata = {name: value for name, value in self.metadata.items() if not name.startswith(prefix)}

    def check(self, name: str) -> None:
        """Nothing: a tensor of a type that is not read is refused with the file."""

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as stored: uint8[..., bytes of a row]."""
        tensor = self.tensors[name]
        stored = self._file.read(tensor.offset, tensor.num_bytes)
        return stored.reshape(*tensor.shape[:-1], -1) if tensor.num_bytes else stored

    def read(self, name: str) -> np.ndarray:
        tensor, raw = self.tensors[name], self.raw(name)
        return _floats(raw, tensor.kind, tensor.shape) if tensor.num_bytes else np.empty(tensor.shape, np.float32)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor; of a matrix only the blocks are read that it is of."""
        if len(index) != 2:
            whole: np.ndarray = self.read(name)[index]
            return whole
        raw, first = self._blocks(name, *index)
        size, block = gguf.GGML_QUANT_SIZES[self.tensors[name].kind]
        values = _floats(raw, self.tensors[name].kind, (len(raw), raw.shape[1] // block * size))
        start, stop, _ = index[1].indices(self.shapes[name][1])
        return values[:, start - first : stop - first]

    def read_quantized(self, name: str, dtype: DTypeLike) -> QuantizedArray:
        """A tensor of `stored`: its blocks, bit for bit."""
        return quantized_from_blocks(self.raw(name), self.tensors[name].kind, dtype)

    def read_quantized_part(self, name: str, dtype: DTypeLike, rows: slice, columns: slice) -> QuantizedArray:
        """Rows of a tensor of `stored`, and of them columns that are whole blocks."""
        return quantized_from_blocks(self._blocks(name, rows, columns)[0], self.tensors[name].kind, dtype)

    def _blocks(self, name: str, rows: slice, columns: slice) -> tuple[np.ndarray, int]:
        """Of rows of a matrix the blocks that columns are of, uint8[rows, bytes], and the first column of these."""
        tensor = self.tensors[name]
        size, block = gguf.GGML_QUANT_SIZES[tensor.kind]
        (top, bottom, _), (left, right, _) = rows.indices(tensor.shape[0]), columns.indices(tensor.shape[1])
        first, last = left // size, -(-right // size)
        stride = tensor.shape[1] // size * block
        start = tensor.offset + top * stride + first * block
        return self._file.read_rows(start, bottom - top, stride, (last - first) * block), first * size


def _floats(raw: np.ndarray, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The values of bytes uint8[..., bytes of a row], float32 (float16 if F16)."""
    if kind in (GGML.F32, GGML.F16):
        return raw.view(np.float32 if kind == GGML.F32 else np.float16)
    values = np.empty(shape, np.float32)
    flat, rows = raw.reshape(-1, raw.shape[-1]), values.reshape(-1, values.shape[-1])
    for start in range(0, len(rows), ROWS_AT_ONCE):  # the package needs as much memory again
        some = slice(start, start + ROWS_AT_ONCE)
        with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file: who uses the values sees it
            rows[some] = gguf.dequantize(flat[some], kind)
    return values


class _Header:
    """A cursor over the header; refuses to move past the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.data = memoryview(data.data)
        self.position = 0
        if self._take(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
        version = self._scalar(4)
        if version not in (2, 3):
            raise CheckpointError(
                f"{path}: GGUF version {version}; expected 2 or 3, little-endian: convert the model again"
            )
        num_tensors, num_entries = self._scalar(10), self._scalar(10)
        # A tensor's record is at least 24 bytes, an entry's at least 13: counts beyond that are damage, not data.
        self._check_count(num_tensors, 24)
        self._check_count(num_entries, 13)
        self.metadata = dict(self._entry() for _ in range(num_entries))
        records = [self._record() for _ in range(num_tensors)]
        self.tensors = {tensor.name: tensor for tensor in self._locate(records)}
        if len(self.tensors) != len(records):
            raise self._damaged("two tensors have the same name")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: truncated or corrupt GGUF file ({what}); fetch it again")

    def _take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise self._damaged(f"the header runs past the end of the file, {len(self.data):,} bytes")
        taken = bytes(self.data[self.position : end])
        self.position = end
        return taken

    def _check_count(self, count: int, min_bytes: int) -> None:
        if count * min_bytes > len(self.data) - self.position:
            raise self._damaged(f"{count:,} items announced at byte {self.position:,} do not fit in the file")

    def _scalar(self, code: int) -> Any:
        layout = SCALARS.get(code)
        if layout is None:
            raise self._damaged(f"unknown value type {code} at byte {self.position:,}")
        return layout.unpack(self._take(layout.size))[0]

    def _string(self) -> str:
        text = self._take(self._scalar(10))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"text before byte {self.position:,} is not UTF-8") from None

    def _value(self, code: int) -> Any:
        if code == STRING:
            return self._string()
        if code != ARRAY:
            return self._scalar(code)
        item_code, count = self._scalar(4), self._scalar(10)
        if item_code == STRING:
            self._check_count(count, 8)
            return [self._string() for _ in range(count)]
        if item_code not in SCALARS:
            raise self._damaged(f"array of value type {item_code} at byte {self.position:,}")
        layout = SCALARS[item_code]
        self._check_count(count, layout.size)
        return [value for (value,) in layout.iter_unpack(self._take(count * layout.size))]

    def _entry(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(self._scalar(4))

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._scalar(4)
        if num_dims > MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {num_dims} dimensions")
        dims = tuple(self._scalar(10) for _ in range(num_dims))
        return name, dims[::-1], self._scalar(4), self._scalar(10)

    def _locate(self, records: list[tuple[str, tuple[int, ...], int, int]]) -> list[GGUFTensor]:
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"alignment of {alignment!r}")
        data_start = -(-self.position // alignment) * alignment
        tensors = []
        for name, shape, code, offset in records:
            kind = self._supported_kind(name, code)
            items_a_block, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
            if shape and shape[-1] % items_a_block:
                raise self._damaged(f"tensor {name!r}: rows of {shape[-1]} are not whole {kind.name} blocks")
            num_bytes = math.prod(shape) // items_a_block * bytes_a_block
            start = data_start + offset
            if offset % alignment or start + num_bytes > len(self.data):
                raise self._damaged(
                    f"tensor {name!r} should end at byte {start + num_bytes:,} of a file of {len(self.data):,}"
                )
            tensors.append(GGUFTensor(name=name, shape=shape, kind=kind, offset=start, num_bytes=num_bytes))
        return tensors

    def _supported_kind(self, name: str, code: int) -> Any:
        try:
            kind = GGML(code)
        except ValueError:
            raise self._damaged(f"tensor {name!r} is of unknown type {code}") from None
        if kind not in SUPPORTED_TYPES:
            names = ", ".join(supported.name for supported in SUPPORTED_TYPES)
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {kind.name}, which is not supported; take a file of {names}"
            )
        return kind

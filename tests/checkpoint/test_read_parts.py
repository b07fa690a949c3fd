"""Parts of parameters are read without the rest of them: from safetensors and GGUF, as floats and quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf_export import export_gguf

import llmir_jax as llmir
from llmir_jax.checkpoint.files import StableFile
from llmir_jax.checkpoint.source import ParameterSource
from llmir_jax.errors import LlmirError
from llmir_jax.quantization import QuantizedArray, parse_scheme

GGML = gguf.GGMLQuantizationType
FILES = ("safetensors", "Q4_0", "Q4_1", "Q8_0", "F16")
Sources = Callable[[str], ParameterSource]


@pytest.fixture(scope="module")
def sources(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The same small Llama, whose query and key heads lie in another order in GGUF, by kind of file."""
    folder = data_path / "checkpoints" / "llama"
    made: dict[str, ParameterSource] = {"safetensors": llmir.load(folder).source}

    def of(kind: str) -> ParameterSource:
        if kind not in made:
            path = tmp_path_factory.mktemp("parts") / f"{kind}.gguf"
            export_gguf(folder, path, quantization=GGML[kind])
            made[kind] = llmir.load(path).source
        return made[kind]

    return of


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a file has taken."""
    found: list[int] = []
    read, read_rows = StableFile.read, StableFile.read_rows

    def counted(self: StableFile, *args: Any) -> np.ndarray:
        found.append(args[1])
        return read(self, *args)

    def counted_rows(self: StableFile, *args: Any) -> np.ndarray:
        rows = read_rows(self, *args)
        if args[2] != args[3]:  # else it is one read
            found.append(rows.nbytes)
        return rows

    monkeypatch.setattr(StableFile, "read", counted)
    monkeypatch.setattr(StableFile, "read_rows", counted_rows)
    return found


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "path", ["layers.0.attn.q.kernel", "layers.1.attn.k.kernel", "layers.1.mlp.down.kernel", "embed.embedding"]
)
def test_parts_are_those_of_the_whole(sources: Sources, kind: str, path: str):
    source = sources(kind)
    whole = np.asarray(source.read(path))
    read = source.part_reader(path)
    assert read is not None
    (n, k), everything = whole.shape, slice(None)
    boxes = [(everything, everything), (slice(n // 2, None), everything), (slice(0, n // 4), slice(k // 2, k))]
    for box in (*boxes, (slice(3, 5), slice(7, 12))):
        np.testing.assert_array_equal(read(box), whole[box])


def test_kernels_that_are_stored_as_they_are(data_path: Path):
    source, path = llmir.load(data_path / "checkpoints" / "gpt2").source, "layers.0.mlp.fc.kernel"
    assert not source._sources[path].transposed
    n, k = source.matrices[path]
    read, read_floats = source.quantized_reader(path, parse_scheme("int8-g16")), source.part_reader(path)
    assert read is not None and read_floats is not None
    whole = source.read_quantized(path, parse_scheme("int8-g16"))
    assert_same(read(slice(n // 2, n), slice(16, k)), whole.span(n // 2, n), (16, k))
    box = (slice(0, k // 2), slice(n // 2, n))
    np.testing.assert_array_equal(read_floats(box), np.asarray(source.read(path))[box])


def test_vectors_too(sources: Sources):
    for kind in FILES[:2]:
        read = sources(kind).part_reader("norm.scale")
        assert read is not None
        np.testing.assert_array_equal(read((slice(1, 5),)), np.asarray(sources(kind).read("norm.scale"))[1:5])


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *[("safetensors", scheme) for scheme in ("int8-g16", "int4-g16-min", "int4-g8-zp", "int8-channel")],
        *[("Q4_0", "int4-g32"), ("Q4_1", "int4-g32-min"), ("Q8_0", "int8-g32"), ("Q4_1", "int8-g16")],
    ],
)
@pytest.mark.parametrize("path", ["layers.0.attn.q.kernel", "layers.1.attn.k.kernel", "embed.embedding"])
def test_quantized_parts_are_those_of_the_whole(sources: Sources, kind: str, scheme: str, path: str):
    source, wanted = sources(kind), parse_scheme(scheme)
    whole = source.read_quantized(path, wanted)
    read = source.quantized_reader(path, wanted)
    assert read is not None
    (n, k), group = whole.shape, wanted.group_size or whole.shape[1]
    for rows in (slice(0, n), slice(n // 2, n), slice(n // 4, n // 4 + 3)):
        for columns in {(0, k), (k // group // 2 * group, k)}:
            assert_same(read(rows, slice(*columns)), whole.span(rows.start, rows.stop), columns)


def assert_same(part: QuantizedArray, rows: QuantizedArray, columns: tuple[int, int]):
    """The part has the bits that the rows have in these columns."""
    assert part.shape == (rows.shape[0], columns[1] - columns[0]) and part.dtype == rows.dtype
    for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(rows), strict=True):
        width = np.shape(theirs)[1]
        start, stop = (at * width // rows.shape[1] for at in columns)
        np.testing.assert_array_equal(ours, np.asarray(theirs)[:, start:stop])


@pytest.mark.parametrize(("kind", "scheme"), [("safetensors", "int8-g16"), ("Q4_0", "int4-g32"), ("Q8_0", "int4-g32")])
def test_only_the_bytes_of_a_part_are_read(sources: Sources, read_bytes: list[int], kind: str, scheme: str):
    source, wanted, path = sources(kind), parse_scheme(scheme), "layers.0.attn.q.kernel"
    n, k = source.matrices[path]
    read, read_floats = source.quantized_reader(path, wanted), source.part_reader(path)
    assert read is not None and read_floats is not None

    def taken(call: Callable[[], Any]) -> int:
        read_bytes.clear()
        call()
        return sum(read_bytes)

    whole = taken(lambda: source.read_quantized(path, wanted))
    assert whole == taken(lambda: source.read(path))
    assert taken(lambda: read(slice(0, n // 4), slice(0, k))) == whole // 4, "a head of four"
    assert taken(lambda: read_floats((slice(0, k), slice(0, n // 4)))) == whole // 4
    if k > wanted.group_size:
        share = wanted.group_size
        assert taken(lambda: read(slice(0, n), slice(0, share))) == whole * share // k


def test_what_is_read_whole(sources: Sources):
    source, path = sources("safetensors"), "layers.0.mlp.up.kernel"
    assert source.quantized_reader(path, parse_scheme("int8-tensor")) is None
    assert source.quantized_reader(path, parse_scheme("int8-g16"), lambda *_: None) is None  # type: ignore[arg-type]
    replaced = source.replaced({path: source.read_quantized(path, parse_scheme("int8-g16"))})
    assert replaced.quantized_reader(path, parse_scheme("int8-g16")) is None
    assert replaced.part_reader(path) is None


def test_errors_say_where_a_part_begins(sources: Sources, monkeypatch: pytest.MonkeyPatch):
    source = sources("safetensors")
    reader: Any = source._reader
    original = reader.read_part
    monkeypatch.setattr(reader, "read_part", lambda *args: original(*args) * np.float32("nan"))
    read = source.quantized_reader("layers.0.mlp.up.kernel", parse_scheme("int8-g16"))
    assert read is not None
    with pytest.raises(
        LlmirError, match=r"mlp\.up\.kernel, counted from row 4 and column 16 on: nan in row 0, column 0"
    ):
        read(slice(4, 8), slice(16, 32))

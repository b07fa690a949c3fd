"""A model from a Hugging Face directory: config, weights in one .safetensors file or in shards, tokenizer, template."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from jax.typing import DTypeLike

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint.assemble import ModelConfig
from llmir_jax.checkpoint.files import StableFile
from llmir_jax.checkpoint.hf_config import read_hf_config
from llmir_jax.checkpoint.names import huggingface_sources
from llmir_jax.checkpoint.source import Source
from llmir_jax.errors import CheckpointError
from llmir_jax.quantization import QuantizedArray, Scheme
from llmir_jax.tokenizer import Tokenizer, read_tokenizer_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers that old versions of transformers wrote beside the weights: what they hold follows from the config.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_huggingface(folder: Path) -> tuple[ModelConfig, dict[str, Source], "SafetensorsReader"]:
    """The config in `folder`, where each parameter is, and what reads it.

    Raises CheckpointError for files that are missing or damaged, an unknown architecture, a config our models do not
    have, and for tensors that are left over.
    """
    if not (folder / "config.json").exists() and (found := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(f"{folder}: no config.json, but {found[0].name}: load {found[0]}")
    config = read_hf_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    reader = SafetensorsReader(folder)
    sources = huggingface_sources(config, reader.shapes)
    known = {source.name for source in sources.values()}
    leftovers = sorted(name for name in reader.shapes if name not in known and not BUFFERS.search(name))
    if leftovers:
        raise CheckpointError(
            f"{folder}: {len(leftovers)} tensors are not of the architecture in config.json, such as {leftovers[0]!r}; "
            "this variant of the model is not supported"
        )
    return config, sources, reader


@dataclass(frozen=True, kw_only=True)
class _Stored:
    file: StableFile
    offset: int  # in the file, in bytes
    dtype: str


class SafetensorsReader:
    """The tensors of one or several .safetensors files in `path`, a directory.

    The package checks a file when it is opened. Tensors are read here: it maps the whole file into memory.
    Source: https://huggingface.co/docs/safetensors/index#format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: Mapping[str, Scheme] = {}  # none of the quantized formats of others is read
        self._stored: dict[str, _Stored] = {}
        for shard in _shards(path):
            self._open(shard)

    def _open(self, path: Path) -> None:
        try:
            file = StableFile(path)
            opened: Any = safetensors.safe_open(str(path), framework="np")
            names = opened.keys()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete: fetch it again") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again") from None
        header_bytes = int(file.read(0, 8).view("<u8")[0])
        header = json.loads(file.read(8, header_bytes).tobytes())
        for name in names:
            view = opened.get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            offset = 8 + header_bytes + header[name]["data_offsets"][0]
            self._stored[name] = _Stored(file=file, offset=offset, dtype=view.get_dtype())

    def check(self, name: str) -> None:
        """Raises CheckpointError for a tensor that is not of a floating-point type."""
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{stored.file.path}: tensor {name!r} is of type {stored.dtype}; expected one of {', '.join(DTYPES)}: "
                "take the checkpoint that was not quantized"
            )

    def read(self, name: str) -> np.ndarray:
        stored, shape = self._stored[name], self.shapes[name]
        dtype = DTYPES[stored.dtype]
        data = stored.file.read(stored.offset, math.prod(shape) * dtype.itemsize)
        array: np.ndarray = data.view(dtype).reshape(shape)
        return array

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor, of which no other bytes are read but between the ends of its first two dimensions."""
        stored, shape = self._stored[name], self.shapes[name]
        dtype = DTYPES[stored.dtype]
        (first, last), *inner = [own.indices(size)[:2] for own, size in zip(index, shape, strict=True)]
        stride = math.prod(shape[1:]) * dtype.itemsize
        start, stop = inner[0] if inner else (0, 1)
        step = math.prod(shape[2:]) * dtype.itemsize
        rows = stored.file.read_rows(
            stored.offset + first * stride + start * step, last - first, stride, (stop - start) * step
        )
        box = rows.view(dtype).reshape(last - first, *([stop - start] if inner else []), *shape[2:])
        part: np.ndarray = box[(slice(None), slice(None), *(slice(*own) for own in inner[1:]))[: box.ndim]]
        return part

    def read_quantized(self, name: str, dtype: DTypeLike) -> QuantizedArray:
        raise CheckpointError(f"{self.path}: tensor {name!r} is not quantized")


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{folder / INDEX}: no weight_map; the checkpoint is incomplete: fetch it again")
        names = sorted(set(map(str, placed.values())))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{folder / INDEX}: {name!r} is not the name of a file beside it")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    found = sorted(
        path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)
    )
    hint = f"; it has {', '.join(found[:3])}" if found else ""
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX}{hint}; only safetensors weights are read")


def read_text_files(folder: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and chat template that a directory's tokenizer.json and the files beside it describe."""
    if not (folder / "tokenizer.json").exists():
        return None, None
    settings = _optional_json(folder / "tokenizer_config.json")
    special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(settings.get(name))) is not None}
    backend = read_tokenizer_json(folder / "tokenizer.json")
    ends = _eos_ids(folder)
    if "eos_token" in special and (own := backend.token_to_id(special["eos_token"])) is not None:
        ends.append(own)
    tokenizer = Tokenizer(
        backend=backend,
        eos_ids=tuple(dict.fromkeys(ends)),
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
    )
    source = _template_source(folder, settings)
    return tokenizer, None if source is None else ChatTemplate(source=source, special_tokens=special)


def _eos_ids(folder: Path) -> list[int]:
    """Where generation stops: what generation_config.json says, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _optional_json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(i, int) for i in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is {found!r}; expected token ids")
        if ids:
            return ids
    return []


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the directory is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}

"""A checkpoint of our own: the weights by orbax, and beside them the config, tokenizer and chat template as text.

my-model/
  llmir.json             format, architecture, config, special tokens, SHA-256 of each file of weights
  weights/               orbax: {"layers.0.attn.q.kernel": array, …}
  tokenizer.json         if the model has a tokenizer
  chat_template.jinja    if it has a chat template
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint.assemble import ModelConfig, abstract_model
from llmir_jax.checkpoint.safetensors import read_json
from llmir_jax.errors import CheckpointError
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import FrequencyFactors, LinearScaling, Llama3Scaling
from llmir_jax.tokenizer import Tokenizer, read_tokenizer_json

MANIFEST = "llmir.json"
FORMAT, VERSION = "llmir-orbax", 1
CONFIGS: Mapping[str, Any] = {"llama": LlamaConfig, "gpt2": GPT2Config}
SCALINGS: Mapping[str, Any] = {"linear": LinearScaling, "llama3": Llama3Scaling, "factors": FrequencyFactors}


def save_orbax(
    path: Path,
    config: ModelConfig,
    model: nnx.Module,
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write the model to `path`, a directory that does not exist yet. An interrupted save leaves no such directory."""
    import orbax.checkpoint

    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it or save elsewhere")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **_config_to_json(config),
        "tokenizer": None,
        "special_tokens": {},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True
        ) as scratch:
            folder = Path(scratch).resolve() / path.name
            folder.mkdir()
            if tokenizer is not None:
                tokenizer.save(folder / "tokenizer.json")
                fields = ("eos_ids", "bos_token", "eos_token")
                manifest["tokenizer"] = {field: getattr(tokenizer, field) for field in fields}
            if chat_template is not None:
                (folder / "chat_template.jinja").write_text(chat_template.source, encoding="utf-8")
                manifest["special_tokens"] = dict(chat_template.special_tokens)
            arrays = {_path(key): variable.get_value() for key, variable in nnx.to_flat_state(nnx.state(model))}
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "weights", arrays)
                checkpointer.wait_until_finished()
            manifest["sha256"] = _digests(folder / "weights")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            os.rename(folder, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def load_orbax(
    folder: Path, *, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[ModelConfig, nnx.Module, Tokenizer | None, ChatTemplate | None]:
    """What `save_orbax` wrote. Raises CheckpointError for files that are missing, damaged or of another model."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"expected {FORMAT!r} version {VERSION}"
        )
    config = _config_from_json(manifest, folder / MANIFEST)
    # Checked here, since orbax would pass over damage to the numbers and report other damage from several threads.
    wanted, found = manifest.get("sha256") or {}, _digests(folder / "weights")
    if damaged := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise CheckpointError(f"{folder / 'weights' / damaged[0]}: missing or damaged; copy the checkpoint again")
    graph, state = nnx.split(abstract_model(config, dtype=dtype, param_dtype=param_dtype))
    flat = nnx.to_flat_state(state)
    arrays = _restore(folder / "weights", {_path(key): variable.get_value() for key, variable in flat})
    filled = [(key, variable.replace(arrays[_path(key)])) for key, variable in flat]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    return config, model, *_read_text_files(folder, manifest)


def _restore(folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    import orbax.checkpoint

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in wanted.items()}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        try:
            found = {
                name: tuple(entry.shape)
                for name, entry in checkpointer.metadata(folder.resolve()).item_metadata.tree.items()
            }
        except Exception as error:  # tensorstore, orbax and the file system each raise their own
            raise _damaged(folder, error) from None
        expected = {name: x.shape for name, x in target.items()}
        if found != expected:
            name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {found.get(name)}, but {MANIFEST} asks for {expected.get(name)}"
            )
        try:
            restored: dict[str, jax.Array] = checkpointer.restore(folder.resolve(), target)
        except Exception as error:
            raise _damaged(folder, error) from None
    return restored


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative path."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return {path.relative_to(folder).as_posix(): d for path, d in zip(files, pool.map(digest, files), strict=True)}


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return CheckpointError(f"{folder}: truncated or corrupt orbax checkpoint: {type(error).__name__}: {first_line}")


def _read_text_files(folder: Path, manifest: Mapping[str, Any]) -> tuple[Tokenizer | None, ChatTemplate | None]:
    special, template_file = manifest.get("tokenizer"), folder / "chat_template.jinja"
    tokenizer = None
    if special is not None:
        tokenizer = Tokenizer(
            backend=read_tokenizer_json(folder / "tokenizer.json"),
            eos_ids=tuple(special["eos_ids"]),
            bos_token=special["bos_token"],
            eos_token=special["eos_token"],
        )
    if not template_file.exists():
        return tokenizer, None
    source = template_file.read_text(encoding="utf-8")
    return tokenizer, ChatTemplate(source=source, special_tokens=manifest["special_tokens"])


def _config_to_json(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    scaling = getattr(config, "rope_scaling", None)
    if scaling is not None:
        kind = next(kind for kind, scaling_type in SCALINGS.items() if isinstance(scaling, scaling_type))
        fields["rope_scaling"] = {"kind": kind, **fields["rope_scaling"]}
    return {"architecture": "gpt2" if isinstance(config, GPT2Config) else "llama", "config": fields}


def _config_from_json(manifest: Mapping[str, Any], where: Path) -> ModelConfig:
    config_type = CONFIGS.get(str(manifest.get("architecture")))
    if config_type is None:
        raise CheckpointError(f"{where}: architecture {manifest.get('architecture')!r}; expected {', '.join(CONFIGS)}")
    try:
        fields = {name: _tupled(value) for name, value in manifest["config"].items()}
        if fields.get("rope_scaling") is not None:
            scaling = {name: _tupled(value) for name, value in fields["rope_scaling"].items()}
            fields["rope_scaling"] = SCALINGS[scaling.pop("kind")](**scaling)
        config: ModelConfig = config_type(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a config that this version wrote: {error}") from None
    return config


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key))

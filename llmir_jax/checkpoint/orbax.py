"""A checkpoint of our own: the weights by orbax, and beside them the config, tokenizer and chat template as text.

my-model/
  llmir.json             format, architecture, config, special tokens, schemes of quantized parameters, SHA-256 of each
                         file of weights
  weights/               orbax: {"layers.0.attn.q.kernel": array, …}, of a quantized one {"values": array, "scales": …}
                         and with static activations {…, "activation_scales": array}
  tokenizer.json         if the model has a tokenizer
  chat_template.jinja    if it has a chat template
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint.assemble import ModelConfig, open_source, parameter_path
from llmir_jax.checkpoint.orbax_tensors import OrbaxReader, to_tree
from llmir_jax.checkpoint.safetensors import read_json
from llmir_jax.checkpoint.source import Parameter, ParameterSource, Source
from llmir_jax.errors import CheckpointError, LlmirError
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import FrequencyFactors, LinearScaling, Llama3Scaling
from llmir_jax.quantization import Scheme, parse_scheme
from llmir_jax.tokenizer import Tokenizer, read_tokenizer_json

MANIFEST = "llmir.json"
FORMAT, VERSION = "llmir-orbax", 1
CONFIGS: Mapping[str, Any] = {"llama": LlamaConfig, "gpt2": GPT2Config}
SCALINGS: Mapping[str, Any] = {"linear": LinearScaling, "llama3": Llama3Scaling, "factors": FrequencyFactors}


def save_orbax(
    path: Path,
    config: ModelConfig,
    parameters: Mapping[str, Parameter],
    *,
    schemes: Mapping[str, Scheme],
    activation_scales: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write a model to `path`, a directory that does not exist yet. An interrupted save leaves no such directory.

    `schemes` has that of each quantized parameter, `activation_scales` float32 [G] those of static activations.
    """
    import orbax.checkpoint

    check_new(path)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **_config_to_json(config),
        "quantized": {name: scheme.name for name, scheme in schemes.items()},
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
            arrays = {name: to_tree(parameter, activation_scales.get(name)) for name, parameter in parameters.items()}
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "weights", arrays)
                checkpointer.wait_until_finished()
            manifest["sha256"] = _digests(folder / "weights")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            os.rename(folder, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def check_new(path: Path) -> None:
    """Raises CheckpointError if a checkpoint cannot be saved there since something is."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already; remove it or save elsewhere")


def read_orbax(
    folder: Path, abstract: Callable[[ModelConfig], nnx.Module]
) -> tuple[ModelConfig, ParameterSource, Tokenizer | None, ChatTemplate | None]:
    """What `save_orbax` wrote, for the model of shapes that `abstract` makes of its config.

    Raises CheckpointError for files that are missing, damaged or of another model.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"expected {FORMAT!r} version {VERSION}"
        )
    config = _config_from_json(manifest, folder / MANIFEST)
    schemes = _schemes_from_json(manifest, folder / MANIFEST)
    # Checked here, since orbax would pass over damage to the numbers and report other damage from several threads.
    wanted, found = manifest.get("sha256") or {}, _digests(folder / "weights")
    if damaged := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise CheckpointError(f"{folder / 'weights' / damaged[0]}: missing or damaged; copy the checkpoint again")
    model = abstract(config)
    shapes = {parameter_path(key): tuple(v.get_value().shape) for key, v in nnx.to_flat_state(nnx.state(model))}
    reader = OrbaxReader(folder / "weights", schemes, list(shapes))
    sources = {name: Source(name=name, transposed=name in schemes and name.endswith(".kernel")) for name in shapes}
    expected = {name: shape[::-1] if sources[name].transposed else shape for name, shape in shapes.items()}
    if reader.shapes != expected:
        names = reader.shapes.keys() | expected.keys()
        name = min(n for n in names if reader.shapes.get(n) != expected.get(n))
        raise CheckpointError(
            f"{folder / 'weights'}: tensor {name!r} has shape {reader.shapes.get(name)}, but {MANIFEST} asks for "
            f"{expected.get(name)}"
        )
    source = open_source(model, sources, reader, activation_scales=reader.activation_scales())
    return config, source, *_read_text_files(folder, manifest)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative path."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return {path.relative_to(folder).as_posix(): d for path, d in zip(files, pool.map(digest, files), strict=True)}


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


def _schemes_from_json(manifest: Mapping[str, Any], where: Path) -> dict[str, Scheme]:
    quantized = manifest.get("quantized", {})
    try:
        return {str(name): parse_scheme(scheme) for name, scheme in quantized.items()}
    except (AttributeError, LlmirError) as error:
        raise CheckpointError(f"{where}: 'quantized' is not what this version wrote: {error}") from None


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

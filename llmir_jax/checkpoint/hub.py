"""A model by its name on the Hugging Face hub: from the local cache where it is complete there, else downloaded."""

import json
import re
from pathlib import Path

from llmir_jax.checkpoint.safetensors import INDEX, WEIGHTS
from llmir_jax.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
]


def find_in_hub(name: str) -> Path:
    """The directory of a snapshot of `name` ("org/name") with its weights.

    A complete snapshot in the cache is used as it is, whether or not the hub has a newer one. HF_HUB_OFFLINE,
    HF_HOME, HF_TOKEN and the like mean what they mean to `huggingface_hub`. Raises CheckpointError.
    """
    import huggingface_hub  # here: it takes a while, and most models are local
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns="config.json", local_files_only=True))
        if not _missing(cached):
            return cached
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a name on the hub: {error}") from None
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{name}: not a local path, not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            "fetch it first with the variable unset"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=TEXT_FILES))
        # Only the weights that are read: repositories often hold the same ones in other formats too.
        if missing := _missing(folder):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*TEXT_FILES, *missing]))
    except Exception as error:  # the package's own, and those of whatever HTTP client its version uses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: not a local path, not complete in the cache {constants.HF_HUB_CACHE}, and not to be had from the "
            f"hub: {reason}"
        ) from None
    return folder


def _missing(folder: Path) -> list[str]:
    """What a snapshot lacks of its config and weights: an interrupted download has only some."""
    wanted = [WEIGHTS]
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        try:
            wanted = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [INDEX]
    return [name for name in ("config.json", *wanted) if not (folder / name).exists()]

"""A model by its name on the Hugging Face hub: from the local cache where it is complete there, else downloaded."""

import json
import re
from pathlib import Path

from llmir_jax.checkpoint.safetensors import INDEX, WEIGHTS
from llmir_jax.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.safetensors", INDEX, "*config.json", "tokenizer.json", "chat_template.jinja"]


def find_in_hub(name: str) -> Path:
    """The directory of a snapshot of `name` ("org/name") with all its weights.

    A complete snapshot in the cache is used as it is, whether or not the hub has a newer one. HF_HUB_OFFLINE,
    HF_HOME, HF_TOKEN and the like mean what they mean to `huggingface_hub`. Raises CheckpointError.
    """
    import huggingface_hub  # here: it takes a while, and most models are local
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        if _is_complete(cached):
            return cached
    except HFValidationError as error:
        raise CheckpointError(f"{name}: not a name on the hub: {error}") from None
    except LocalEntryNotFoundError:
        pass
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{name}: not complete in the local cache {huggingface_hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            "set: fetch it first with the variable unset"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: neither a local path, nor complete in the local cache, nor to be had from the hub: {reason}"
        ) from None


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has its config and every shard of its weights: an interrupted download may lack some."""
    if not (folder / "config.json").exists():
        return False
    if (folder / WEIGHTS).exists():
        return True
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return all((folder / shard).exists() for shard in set(placed.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False

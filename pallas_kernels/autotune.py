"""The fastest of some tiles, measured on the chip that is here, and remembered on disk.

The model of `tiles` ranks candidates well enough to run with; what a chip really does it does not know. Measuring
takes seconds a candidate, so results are kept in files, one for each chip, kernel, shape and version of what compiles
it, in the folder that PALLAS_KERNELS_CACHE names, or ~/.cache/pallas_kernels.
"""

import hashlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from pallas_kernels.chips import UnknownChipError, chip_of

Tile = TypeVar("Tile")

CACHE_VARIABLE = "PALLAS_KERNELS_CACHE"
_COMPILERS = ("jax", "jaxlib", "libtpu", "triton", "jax-triton")


class AutotuneError(RuntimeError):
    """Nothing can be measured: there is no chip, or no candidate runs on it."""


@dataclass(frozen=True, kw_only=True)
class Tuned(Generic[Tile]):
    """The fastest candidate."""

    tiles: Tile
    seconds: float
    """Of a call: the median of some rounds, in each of which calls follow each other."""
    refused: Mapping[str, str]
    """Candidates that did not compile or run, with why."""
    from_cache: bool


def cache_folder() -> Path:
    """Where results are kept."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "pallas_kernels"


def versions() -> dict[str, str]:
    """Of everything that makes a kernel what it is, and of what compiles it."""
    found = {}
    for name in _COMPILERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return found | {"pallas_kernels": source.hexdigest()[:16]}


def _seconds(call: Callable[[], Any], rounds: int, calls: int) -> float:
    jax.block_until_ready(call())  # compiles
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = None
        for _ in range(calls):
            made = call()
        jax.block_until_ready(made)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def autotune(
    kernel: str,
    shape: Mapping[str, Any],
    candidates: Sequence[Tile],
    make_call: Callable[[Tile], Callable[[], Any]],
    *,
    device: jax.Device | None = None,
    rounds: int = 5,
    calls: int = 10,
) -> Tuned[Tile]:
    """The fastest candidate on a device, from the cache where it was measured before.

    Args:
        kernel: its name.
        shape: everything else that decides how fast it is: sizes, dtypes, options. To be written as JSON.
        candidates: frozen dataclasses of numbers.
        make_call: from a candidate, a function that runs the kernel once and returns its arrays. It may raise.
        device: by default JAX's first.
        rounds: measurements, of which the median counts.
        calls: calls a measurement.

    Raises:
        AutotuneError: the device is no chip of the table, or no candidate runs.
    """
    where = jax.devices()[0] if device is None else device
    try:
        chip_of(where)
    except UnknownChipError as error:
        raise AutotuneError(
            f"autotune {kernel}: nothing can be measured without a TPU or GPU that is known; {error}"
        ) from None
    key = {"device": where.device_kind, "kernel": kernel, "shape": dict(shape), "versions": versions()}
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    found = _read(path, key, candidates)
    if found is not None:
        return found
    times: dict[int, float] = {}
    refused: dict[str, str] = {}
    for place, tiles in enumerate(candidates):
        try:
            times[place] = _seconds(make_call(tiles), rounds, calls)
        except Exception as error:  # compilers raise whatever they like; every reason is kept
            refused[str(tiles)] = f"{type(error).__name__}: {error}"
    if not times:
        reasons = "; ".join(f"{tiles}: {reason}" for tiles, reason in refused.items()) or "there are none"
        raise AutotuneError(f"autotune {kernel}: no candidate runs on {where.device_kind}: {reasons}")
    best = min(times, key=lambda place: times[place])
    made = Tuned(tiles=candidates[best], seconds=times[best], refused=refused, from_cache=False)
    _write(path, {"key": key, "tiles": _fields(made.tiles), "seconds": made.seconds, "refused": refused})
    return made


def _fields(tiles: Any) -> dict[str, Any]:
    return asdict(tiles)


def _read(path: Path, key: Mapping[str, Any], candidates: Sequence[Tile]) -> Tuned[Tile] | None:
    """What was measured before, if it is whole and of one of these candidates."""
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != json.loads(json.dumps(key)):
            return None
        fields, seconds, refused = stored["tiles"], float(stored["seconds"]), dict(stored["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for tiles in candidates:
        if _fields(tiles) == fields:
            return Tuned(tiles=tiles, seconds=seconds, refused=refused, from_cache=True)
    return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """In one piece: two processes may measure the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)


__all__ = ["AutotuneError", "Tuned", "autotune", "cache_folder", "versions"]

"""What the compiler did to a model, for people and for programs."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AttentionEntry:
    """Layers whose attention has one form."""

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    alibi: bool
    served_by: str
    cache_dtype: str | None = None
    """Of a decoder."""
    dtype: str | None = None
    """Of the queries of a direct call."""

    def __str__(self) -> str:
        parts = [f"{self.num_heads} heads, {self.num_kv_heads} KV heads of {self.head_dim}", "causal"]
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.softcap is not None:
            parts.append(f"soft-cap {self.softcap:g}")
        if self.alibi:
            parts.append("ALiBi")
        if self.dtype is not None:
            parts.append(self.dtype)
        cache = "" if self.cache_dtype is None else f"; cache {self.cache_dtype}"
        return f"{self.layers} layers: {', '.join(parts)}{cache}; served by {self.served_by}"


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """What became of the attention of a forward that is called directly."""

    attention: tuple[AttentionEntry, ...]
    """Empty where attention was not looked for, or something is in the way: `notes` say what."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["attention", *(f"  {entry}" for entry in self.attention)] if self.attention else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was matched, how each part is served, and what the self-check found."""

    attention: tuple[AttentionEntry, ...]
    operations: dict[str, int]
    """Operations of the step by name."""
    served_by: dict[str, str]
    """For each llm operation, what computes it and why."""
    parameters: dict[str, str]
    """dtype and shape of each parameter by path; of quantized ones the scheme, and (outputs, inputs)."""
    parameter_bytes: int
    not_quantized: dict[str, str]
    """Where weights are quantized: why the others are not, by path."""
    unused_parameters: tuple[str, ...]
    cache_bytes: int
    max_seq_len: int
    buckets: tuple[int, ...]
    compilations: tuple[str, ...]
    self_check: str
    seconds: dict[str, float]
    from_disk: tuple[str, ...] = ()
    """What an earlier start had compiled."""
    to_disk: tuple[str, ...] = ()
    """What was compiled now, and kept for later starts."""
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["attention"]
        lines += [f"  {entry}" for entry in self.attention] or ["  none"]
        lines.append("operations")
        lines += [f"  {name}: served by {how}" for name, how in self.served_by.items()]
        dtypes: dict[str, int] = {}
        for text in self.parameters.values():
            dtypes[text.split("[")[0]] = dtypes.get(text.split("[")[0], 0) + 1
        counts = ", ".join(f"{n} {dtype}" for dtype, n in sorted(dtypes.items()))
        lines.append(f"parameters: {counts}; {self.parameter_bytes / 2**20:.1f} MiB")
        reasons: dict[str, list[str]] = {}
        for path, why in self.not_quantized.items():
            reasons.setdefault(why, []).append(path)
        for why, paths in reasons.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"  not quantized, {why}: {', '.join(paths[:3])}{more}")
        if self.unused_parameters:
            lines.append(f"  not read by the step: {', '.join(self.unused_parameters)}")
        lines.append(f"KV cache: {self.cache_bytes / 2**20:.1f} MiB, up to {self.max_seq_len} tokens a sequence")
        lines.append(f"token buckets: {', '.join(map(str, self.buckets))}")
        lines += [f"  compiled {text}" for text in self.compilations]
        lines.append(f"self-check: {self.self_check}")
        if self.from_disk:
            lines.append(f"found on disk: {', '.join(self.from_disk)}")
        if self.to_disk:
            lines.append(f"kept on disk: {', '.join(self.to_disk)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

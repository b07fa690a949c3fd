"""How a matrix is quantized, and the names by which a user asks for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp

from llmir_jax.errors import LlmirError

Kind = Literal["symmetric", "zero_point", "minimum"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

_SHORT_KINDS: Mapping[str, Kind] = {"zp": "zero_point", "min": "minimum"}
_SHORT_DTYPES: Mapping[str, ScaleDtype] = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
_NAME = re.compile(
    r"int(?P<bits>[48])-(?P<span>channel|tensor|g(?P<group>[1-9]\d{0,5}))(-(?P<kind>zp|min))?"
    r"(-(?P<scale>f16|bf16|f32))?(-a8(-g(?P<a_group>[1-9]\d{0,5}))?(?P<static>-static)?|(?P<auto>-auto))?"
)
FORMS = (
    "'int8', 'int4', 'w8a16', 'w4a16', 'w8a8', 'w4a8', or spelled out: int8 or int4, then -channel, -tensor or "
    "-g<group size>, then -zp or -min for an asymmetric one, then -f16, -bf16 or -f32 for the scales, then -a8 or "
    "-a8-g<group size> for int8 activations, and -static for scales of these from calibration, or -auto for "
    "activations as the target takes them ('int8-channel', 'int4-g64', 'int4-g32-min', 'int8-g32-a8-g32')"
)


def _check(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise LlmirError(f"quantization scheme: {field} must be one of {', '.join(map(str, allowed))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a weight [N, K] (outputs, inputs) is stored as, and what it is multiplied with.

    See `QuantizedArray` for the equations. `parse_scheme` gives one for a name, `Scheme.name` a name for one.
    """

    bits: int
    """4 or 8."""
    group_size: int | None
    """Elements along K that share a scale; None: a whole row (a scale per channel)."""
    kind: Kind = "symmetric"
    scale_dtype: ScaleDtype = "float16"
    """Of the scales, and of the minima."""
    per_tensor: bool = False
    """One scale for the whole matrix; then `group_size` is None."""
    activations: Literal["int8"] | None = None
    """What the other operand of a matmul is quantized to as the model runs; None: it stays as it is."""
    activation_group_size: int | None = None
    """Elements along K of an activation that share a scale; None: a token's."""
    static_activations: bool = False
    """Whether the scales of activations come from calibration, the same for all tokens; else each token's from it."""
    auto_activations: bool = False
    """Whether the target decides about activations: see `for_target`."""
    adapts: bool = False
    """Whether a K that `group_size` does not divide gets smaller groups (see `fitted`), not an error."""
    keeps_blocks: bool = False
    """Whether a weight that the checkpoint has in as many bits stays in the checkpoint's own format.

    So does, for 4 bits, one that it has in 8 beside others in 4: its maker chose so, and quantizing twice hurts.
    """

    def __post_init__(self) -> None:
        _check("bits", self.bits, (4, 8))
        _check("kind", self.kind, get_args(Kind))
        _check("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _check("activations", self.activations, (None, "int8"))
        for field, size in (("group_size", self.group_size), ("activation_group_size", self.activation_group_size)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise LlmirError(f"quantization scheme: {field} must be a whole number of at least 1, got {size!r}")
        if self.bits == 4 and self.group_size is not None and self.group_size % 2:
            raise LlmirError(
                f"quantization scheme: two 4-bit integers share a byte, so that a group has an even number of them; "
                f"got group_size={self.group_size}"
            )
        if self.per_tensor and self.group_size is not None:
            raise LlmirError("quantization scheme: per_tensor means one scale for all: leave group_size out")
        for field in ("activation_group_size", "static_activations"):
            if self.activations is None and getattr(self, field):
                raise LlmirError(f"quantization scheme: {field} is given, but activations are not quantized")
        if self.auto_activations and self.activations is not None:
            raise LlmirError(
                "quantization scheme: auto_activations leaves activations to the target: leave out the other"
            )

    @property
    def name(self) -> str:
        """The spelled-out name, such as "int4-g32-min-f16"."""
        span = "tensor" if self.per_tensor else "channel" if self.group_size is None else f"g{self.group_size}"
        parts = [f"int{self.bits}", span]
        parts += [short for short, kind in _SHORT_KINDS.items() if kind == self.kind]
        parts += [short for short, dtype in _SHORT_DTYPES.items() if dtype == self.scale_dtype]
        return "-".join(parts) + self.activations_name

    @property
    def activations_name(self) -> str:
        """The end of `name` that is about activations, such as "-a8-g32-static"; empty if they stay as they are."""
        if self.activations is None:
            return "-auto" if self.auto_activations else ""
        group = "" if self.activation_group_size is None else f"-g{self.activation_group_size}"
        return f"-a8{group}{'-static' if self.static_activations else ''}"

    @property
    def dtype(self) -> Any:
        """Of the scales, and of the minima, as a numpy dtype."""
        return jnp.dtype(self.scale_dtype)

    @property
    def integer_range(self) -> tuple[int, int]:
        """The least and the greatest integer that plain rounding gives: -127 and 127 for symmetric int8."""
        if self.kind == "minimum":
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high if self.kind == "symmetric" else -high - 1), high

    @property
    def storage_range(self) -> tuple[int, int]:
        """The least and the greatest integer that a search for scales may use.

        Symmetric int4 has -8 too, for one level in sixteen; int8 has not, for one in 256, since kernels multiply
        -127 to 127 without a thought.
        """
        low, high = self.integer_range
        return (-8, high) if self.kind == "symmetric" and self.bits == 4 else (low, high)

    @property
    def weight_format(self) -> "Scheme":
        """The part that says how the weight is stored."""
        return replace(
            self,
            activations=None,
            activation_group_size=None,
            static_activations=False,
            auto_activations=False,
            adapts=False,
            keeps_blocks=False,
        )

    def for_target(self, target: str | None, num_inputs: int) -> "Scheme":
        """With the activations that `target` takes where that is left to it, for a matrix of so many inputs.

        Native code of a CPU multiplies integers with int8 several times faster than with floats: there, activations are
        rounded in groups of 32. Elsewhere they stay floats.
        """
        if not self.auto_activations:
            return self
        if target != "cpu":
            return replace(self, auto_activations=False)
        power = min(num_inputs & -num_inputs, 32)
        group = power if power >= 8 else None
        return replace(self, auto_activations=False, activations="int8", activation_group_size=group)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix [N, K] that is stored so: its integers, scales, and zero points or minima.

        Of a scheme that was `fitted` to the shape.
        """
        n, k = shape
        num_groups = 1 if self.per_tensor else n * (k // (self.group_size or k))
        scale: int = self.dtype.itemsize
        side = {"symmetric": 0, "zero_point": 1, "minimum": scale}[self.kind]
        return n * k * self.bits // 8 + num_groups * (scale + side)

    def same_storage(self, other: "Scheme", shape: tuple[int, int]) -> bool:
        """Whether a matrix [N, K] is stored alike in both: groups of K are whole rows."""

        def form(scheme: Scheme) -> tuple[Any, ...]:
            per_tensor = scheme.per_tensor and shape[0] > 1
            return scheme.bits, scheme.group_size or shape[1], scheme.kind, scheme.scale_dtype, per_tensor

        return form(self) == form(other)

    def fitted(self, shape: tuple[int, ...], *, name: str) -> "Scheme":
        """This scheme for the matrix `name` of shape [N, K], with the sizes of groups it gets.

        An adapting scheme takes the largest power of two that divides K and is at most its group size; if that is less
        than 8, a whole row. Activations likewise. Raises LlmirError for what the matrix cannot have.
        """
        if len(shape) != 2 or not all(shape):
            raise LlmirError(f"{name}: only a matrix can be quantized, got shape {list(shape)}")
        k = shape[1]
        if self.bits == 4 and k % 2:
            raise LlmirError(
                f"{name}: int4 packs two inputs into a byte, so that their number must be even, got {k} "
                f"(shape {list(shape)}, outputs first); keep it in int8, by a rule such as {{{name!r}: 'int8-channel'}}"
            )
        return replace(
            self,
            group_size=self._fit("group_size", self.group_size, k, name),
            activation_group_size=self._fit("activation_group_size", self.activation_group_size, k, name),
            adapts=False,
        )

    def _fit(self, field: str, group_size: int | None, k: int, name: str) -> int | None:
        if group_size is None or k % group_size == 0:
            return group_size
        if not self.adapts:
            raise LlmirError(
                f"{name}: {field} {group_size} does not divide its {k} inputs; choose a divisor, or "
                f"'int{self.bits}-channel'"
            )
        power = min(k & -k, 1 << (group_size.bit_length() - 1))
        return power if power >= 8 else None


_INT8 = Scheme(bits=8, group_size=64, adapts=True, keeps_blocks=True)
_INT4 = Scheme(bits=4, group_size=32, kind="minimum", adapts=True, keeps_blocks=True)
PRESETS: Mapping[str, Scheme] = {
    "int8": replace(_INT8, auto_activations=True),
    "int4": replace(_INT4, auto_activations=True),
    "w8a16": _INT8,
    "w4a16": _INT4,
    # Activations have outliers: a scale a token costs ten times the error of a scale for 32 channels.
    "w8a8": replace(_INT8, group_size=32, activations="int8", activation_group_size=32),
    "w4a8": replace(_INT4, activations="int8", activation_group_size=32),
}


def parse_scheme(name: str | Scheme) -> Scheme:
    """The scheme of a preset's or a spelled-out name. Raises LlmirError with the allowed forms.

    Scales are float16 for groups and float32 for whole rows and matrices, unless the name says.
    """
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str):
        raise LlmirError(f"quantize: expected the name of a scheme, got {name!r}; names are {FORMS}")
    if name in PRESETS:
        return PRESETS[name]
    match = _NAME.fullmatch(name)
    if match is None:
        raise LlmirError(f"quantize: unknown scheme {name!r}; expected {FORMS}")
    group, a_group, scale = match["group"], match["a_group"], match["scale"]
    return Scheme(
        bits=int(match["bits"]),
        group_size=None if group is None else int(group),
        kind=_SHORT_KINDS.get(match["kind"], "symmetric"),
        scale_dtype=_SHORT_DTYPES[scale or ("f32" if group is None else "f16")],
        per_tensor=match["span"] == "tensor",
        activations="int8" if "-a8" in name else None,
        activation_group_size=None if a_group is None else int(a_group),
        static_activations=match["static"] is not None,
        auto_activations=match["auto"] is not None,
    )

"""Which parameter is quantized to what: from what a user asks for to a plan, checked against the model's shapes.

    quantize="int4"                                                       every matrix
    quantize={"layers/.*/mlp": "int4", "lm_head": "int8", ".*norm": None}   by the parameter's path

A rule is a regular expression for one or several whole components of a path, in a row and anywhere in it; "/" and "."
both separate components. "mlp" and "layers/.*/mlp" match "layers.0.mlp.up.kernel"; "ml" does not. The first rule that
matches a path decides; parameters that no rule matches stay floats. None keeps them floats too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.rounding import MatrixKey
from llmir_jax.quantization.scheme import FORMS, Scheme, parse_scheme

Rules = str | Scheme | Mapping[str, str | Scheme | None] | None
"""What the option `quantize` takes, besides `MixedPrecision`."""
STORED = "stored"
"""As `quantize`: what the checkpoint has quantized stays as it is there, all else stays floats."""
NOT_A_MATRIX = "{} is not multiplied as a matrix"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of each parameter, by path."""

    schemes: Mapping[str, Scheme]
    """Of the parameters that are quantized, fitted to their shapes."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Of the others: why they stay floats, for the report."""
    activation_scales: Mapping[MatrixKey, np.ndarray] = field(default_factory=dict)
    """Static scales, float32 [G] each, of what is multiplied with the matrices whose scheme has such."""

    kv_cache: str | None = None
    """What the target takes as keys and values, where that is left to it."""

    def get(self, path: str) -> Scheme | None:
        """The scheme of a parameter; None if it stays floats."""
        return self.schemes.get(path)

    def __bool__(self) -> bool:
        return bool(self.schemes)

    def for_target(
        self, target: str | None, matrices: Mapping[str, tuple[int, int]], kv_cache: str | None = None
    ) -> "Plan":
        """With what `target` decides, see `Scheme.for_target`. `matrices` are [N, K] by path.

        Where it decides about activations, it does about what is kept of them too, and that is `kv_cache`.
        """
        decides = any(scheme.auto_activations for scheme in self.schemes.values())
        schemes = {path: scheme.for_target(target, matrices[path][1]) for path, scheme in self.schemes.items()}
        return replace(self, schemes=schemes, kv_cache=kv_cache if decides else self.kv_cache)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    text: str
    scheme: Scheme | None
    patterns: tuple[re.Pattern[str], ...]

    def matches(self, path: str) -> bool:
        return any(pattern.search(form) for pattern, form in zip(self.patterns, _forms(path), strict=True))


def make_plan(
    quantize: Rules,
    parameters: Mapping[str, tuple[int, ...]],
    *,
    matrices: Mapping[str, tuple[int, int]],
    stored: Mapping[str, Scheme] | None = None,
) -> Plan:
    """The plan for a model.

    Args:
        quantize: a scheme, its name, rules (see above), "stored", or None for floats.
        parameters: path → shape of every parameter.
        matrices: path → [N, K] (outputs, inputs) of those that can be quantized. The others, norms and biases, stay
            floats whatever a rule says.
        stored: path → format of those that the checkpoint has quantized, which a scheme that `keeps_blocks` leaves as
            they are.

    Raises:
        LlmirError: an unknown scheme; a rule that is no regular expression, or matches nothing, or nothing that can be
            quantized; a scheme that a matrix cannot have, with the parameter's path.
    """
    stored = stored or {}
    if quantize is None:
        return Plan(schemes={}, kept=dict.fromkeys(parameters, "quantize is None"))
    if quantize == STORED:
        kept = {path: "floats in the checkpoint" for path in parameters if path not in stored}
        return Plan(schemes={path: stored[path] for path in parameters if path in stored}, kept=kept)
    if not isinstance(quantize, Mapping):
        scheme = parse_scheme(quantize)
        return _resolve(dict.fromkeys(parameters, scheme), parameters, matrices, stored)
    rules = [_parse_rule(text, scheme) for text, scheme in quantize.items()]
    if not rules:
        raise LlmirError("quantize: no rules in it; leave it out, or give a scheme for all matrices such as 'int8'")
    chosen: dict[str, Scheme | None] = {}
    for path in parameters:
        rule = next((rule for rule in rules if rule.matches(path)), None)
        if rule is not None:
            chosen[path] = rule.scheme
    _refuse_idle_rules(rules, parameters, matrices)
    return _resolve(chosen, parameters, matrices, stored)


def check_rules(quantize: Rules) -> None:
    """Raises LlmirError for what the option can mean for no model: an unknown scheme, a rule that is none."""
    if quantize is None or quantize == STORED:
        return
    if not isinstance(quantize, Mapping):
        parse_scheme(quantize)
        return
    if not quantize:
        raise LlmirError("quantize: no rules in it; leave it out, or give a scheme for all matrices such as 'int8'")
    for text, scheme in quantize.items():
        _parse_rule(text, scheme)


def _resolve(
    chosen: Mapping[str, Scheme | None],
    parameters: Mapping[str, tuple[int, ...]],
    matrices: Mapping[str, tuple[int, int]],
    stored: Mapping[str, Scheme],
) -> Plan:
    schemes: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    for path, shape in parameters.items():
        scheme = chosen.get(path)
        if path not in chosen:
            kept[path] = "no rule matches it"
        elif scheme is None:
            kept[path] = "a rule keeps it"
        elif path not in matrices:
            kept[path] = NOT_A_MATRIX.format(list(shape))
        else:
            schemes[path] = scheme_for(scheme, matrices[path], path, stored)
    return Plan(schemes=schemes, kept=kept)


def scheme_for(scheme: Scheme, shape: tuple[int, int], path: str, stored: Mapping[str, Scheme]) -> Scheme:
    """What the matrix `path` of shape [N, K] gets where `scheme` is asked for: fitted, or its blocks in the checkpoint.

    Raises LlmirError, which names the path, for what it cannot have.
    """
    has_int4 = any(other.bits == 4 for other in stored.values())
    kept_widths = (4, 8) if scheme.bits == 4 and has_int4 else (scheme.bits,)
    if path not in stored or not scheme.keeps_blocks or stored[path].bits not in kept_widths:
        return replace(scheme.fitted(shape, name=path), keeps_blocks=False)
    kept = replace(
        stored[path],
        activations=scheme.activations,
        activation_group_size=scheme.activation_group_size,
        static_activations=scheme.static_activations,
        auto_activations=scheme.auto_activations,
        adapts=scheme.adapts,
    )
    return replace(kept.fitted(shape, name=path), keeps_blocks=False)


def _parse_rule(text: object, scheme: str | Scheme | None) -> _Rule:
    if not isinstance(text, str):
        raise LlmirError(f"quantize: a rule is a regular expression for parameters' paths, got {text!r}")
    try:
        patterns = tuple(re.compile(rf"(?:^|{s})(?:{text})(?:{s}|$)") for s in ("/", r"\."))
        re.compile(text)  # by itself, since a stray ")" may go well with the parentheses around it
    except re.error as error:
        raise LlmirError(f"quantize: rule {text!r} is not a regular expression: {error}") from None
    if scheme is None:
        return _Rule(text=text, scheme=None, patterns=patterns)
    try:
        return _Rule(text=text, scheme=parse_scheme(scheme), patterns=patterns)
    except LlmirError:
        raise LlmirError(f"quantize: rule {text!r} has scheme {scheme!r}; expected None, {FORMS}") from None


def _refuse_idle_rules(
    rules: list[_Rule], parameters: Mapping[str, tuple[int, ...]], matrices: Mapping[str, tuple[int, int]]
) -> None:
    for i, rule in enumerate(rules):
        matched = [path for path in parameters if rule.matches(path)]
        if not matched:
            paths = list(parameters)
            raise LlmirError(
                f"quantize: rule {rule.text!r} matches no parameter; a rule matches whole components of a path; "
                f"the {len(paths)} paths are such as {', '.join(map(repr, (paths[:2] + paths[-1:]) if paths else []))}"
            )
        if rule.scheme is not None and not any(path in matrices for path in matched):
            raise LlmirError(
                f"quantize: rule {rule.text!r} matches only parameters that cannot be quantized, such as "
                f"{matched[0]!r} {list(parameters[matched[0]])}; only matrices can be: give it None"
            )
        earlier = next((r for r in rules[:i] if all(r.matches(path) for path in matched)), None)
        if earlier is None and all(any(r.matches(path) for r in rules[:i]) for path in matched):
            earlier = rules[0]
        if earlier is not None:
            raise LlmirError(
                f"quantize: rule {rule.text!r} never applies, since rules before it such as {earlier.text!r} match all "
                "it matches, and the first one decides: put it before them"
            )


def _forms(path: str) -> tuple[str, str]:
    """The path with "/" and with "." between its components."""
    slashed = path.replace(".", "/")
    return slashed, slashed.replace("/", ".")

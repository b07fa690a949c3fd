"""Schemes: names and what they mean, what is refused, and how presets fit themselves to a matrix."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.errors import LlmirError
from llmir_jax.quantization import PRESETS, Scheme, parse_scheme


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    bits = draw(st.sampled_from([4, 8]))
    span = draw(st.sampled_from(["channel", "tensor", "group"]))
    activations = draw(st.sampled_from([None, "int8"]))
    sizes = st.integers(1, 500)
    return Scheme(
        bits=bits,
        group_size=draw(sizes) * 2 if span == "group" else None,
        per_tensor=span == "tensor",
        kind=draw(st.sampled_from(["symmetric", "zero_point", "minimum"])),
        scale_dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        activations=activations,
        activation_group_size=draw(st.none() | sizes) if activations else None,
        auto_activations=activations is None and draw(st.booleans()),
    )


@given(schemes())
def test_every_scheme_has_a_name(scheme: Scheme) -> None:
    assert parse_scheme(scheme.name) == scheme
    assert parse_scheme(scheme) is scheme


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8-channel", {"bits": 8, "group_size": None, "scale_dtype": "float32"}),
        ("int8-tensor", {"bits": 8, "group_size": None, "scale_dtype": "float32", "per_tensor": True}),
        ("int8-g64", {"bits": 8, "group_size": 64}),
        ("int4-g64", {"bits": 4, "group_size": 64}),
        ("int4-g32-zp", {"bits": 4, "group_size": 32, "kind": "zero_point"}),
        ("int4-g32-min", {"bits": 4, "group_size": 32, "kind": "minimum"}),
        ("int4-g128-bf16", {"bits": 4, "group_size": 128, "scale_dtype": "bfloat16"}),
        ("int4-channel-min-f16", {"bits": 4, "group_size": None, "kind": "minimum"}),
        ("int8-g32-a8", {"bits": 8, "group_size": 32, "activations": "int8"}),
        (
            "int4-g32-min-a8-g32",
            {"bits": 4, "group_size": 32, "kind": "minimum", "activations": "int8", "activation_group_size": 32},
        ),
    ],
)
def test_spelled_out_names(name: str, expected: dict[str, Any]) -> None:
    assert parse_scheme(name) == Scheme(**expected)


def test_presets() -> None:
    assert {name: scheme.name for name, scheme in PRESETS.items()} == {
        "int8": "int8-g64-f16-auto",
        "int4": "int4-g32-min-f16-auto",
        "w8a16": "int8-g64-f16",
        "w4a16": "int4-g32-min-f16",
        "w8a8": "int8-g32-f16-a8-g32",
        "w4a8": "int4-g32-min-f16-a8-g32",
    }
    assert all(scheme.keeps_blocks and scheme.adapts for scheme in PRESETS.values())
    assert not parse_scheme("int4-g32-min").keeps_blocks
    assert PRESETS["w4a8"].weight_format == parse_scheme("int4-g32-min")


@pytest.mark.parametrize(
    "name",
    [
        *("", "int3", "fp8", "INT8 ", "int8-", "int8-g0", "int8-g064", "int8-g64-min-zp", "int8-f16-g64"),
        *("int8-g64-a4", "int16-channel", "int8-channel-tensor", "int8-g64-a8-g0", "int8-g64-a8-auto"),
        *(8, None, 4.0, b"int8", ("int8",)),
    ],
)
def test_unknown_names_are_refused(name: Any) -> None:
    with pytest.raises(LlmirError, match=r"quantize: .*'int8', 'int4', 'w8a16', .*int4-g32-min") as caught:
        parse_scheme(name)
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 3}, "bits must be one of 4, 8, got 3"),
        ({"kind": "asymmetric"}, "kind must be one of symmetric, zero_point, minimum"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of float16"),
        ({"activations": "int4"}, "activations must be one of None, int8"),
        ({"group_size": 0}, "group_size must be a whole number"),
        ({"group_size": True}, "group_size must be a whole number"),
        ({"group_size": 32.0}, "group_size must be a whole number"),
        ({"activations": "int8", "activation_group_size": -1}, "activation_group_size must be a whole number"),
        ({"activation_group_size": 32}, "activations are not quantized"),
        ({"activations": "int8", "auto_activations": True}, "leaves activations to the target"),
        ({"per_tensor": True}, "leave group_size out"),
        ({"bits": 4, "group_size": 3}, "an even number of them; got group_size=3"),
    ],
)
def test_schemes_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        Scheme(**{"bits": 8, "group_size": 32} | wrong)


@pytest.mark.parametrize(
    ("name", "k", "weights", "activations"),
    [
        ("int8", 576, 64, None),
        ("int8", 96, 32, None),
        ("int8", 48, 16, None),
        ("int8", 1000, 8, None),
        ("int8", 20, None, None),
        ("int8", 63, None, None),
        ("int4", 64, 32, None),
        ("int4", 48, 16, None),
        ("int4", 6, None, None),
        ("w8a8", 576, 32, 32),
        ("w8a8", 48, 16, 16),
        ("w4a8", 20, None, None),
    ],
)
def test_presets_fit_themselves(name: str, k: int, weights: int | None, activations: int | None) -> None:
    fitted = parse_scheme(name).fitted((5, k), name="w")
    assert (fitted.group_size, fitted.activation_group_size) == (weights, activations)
    assert not fitted.adapts and fitted.fitted((9, k), name="w") == fitted


@pytest.mark.parametrize(("k", "group"), [(576, 32), (48, 16), (20, None)])
def test_the_target_decides_about_activations(k: int, group: int | None) -> None:
    for name, floats in (("int4", "w4a16"), ("int8", "w8a16")):
        scheme = parse_scheme(name).fitted((5, k), name="w")
        native = scheme.for_target("cpu", k)
        assert native.activations == "int8" and native.activation_group_size == group
        assert scheme.for_target("reference", k) == parse_scheme(floats).fitted((5, k), name="w")
        assert scheme.weight_format == native.weight_format
    assert parse_scheme("int4").fitted((5, k), name="w").for_target("cpu", k) == parse_scheme("w4a8").fitted(
        (5, k), name="w"
    )
    other = parse_scheme("int4-g32")
    assert other.for_target("cpu", k) is other


@pytest.mark.parametrize("name", ["int4", "w4a8", "int4-channel", "int4-tensor", "int4-g32-min"])
def test_int4_on_an_odd_dimension(name: str) -> None:
    with pytest.raises(LlmirError, match=r"^layers\.0\.mlp\.up\.kernel: int4 packs two .* even, got 33"):
        parse_scheme(name).fitted((64, 33), name="layers.0.mlp.up.kernel")


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(LlmirError, match=r"^head\.kernel: group_size 64 does not divide its 96 inputs"):
        parse_scheme("int8-g64").fitted((4, 96), name="head.kernel")
    with pytest.raises(LlmirError, match=r"^head\.kernel: activation_group_size 64 does not divide its 96 inputs"):
        parse_scheme("int8-channel-a8-g64").fitted((4, 96), name="head.kernel")


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4), (0, 4), (4, 0)])
def test_only_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(LlmirError, match=r"^norm\.scale: only a matrix can be quantized"):
        parse_scheme("int8").fitted(shape, name="norm.scale")

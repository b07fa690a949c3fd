"""Rules: what matches what, which rule decides, what is kept, and rules that cannot be meant."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.errors import LlmirError
from llmir_jax.quantization import Plan, Scheme, make_plan, parse_scheme

MATRICES = {
    "embed.embedding": (96, 32),
    "layers.0.attn.q.kernel": (32, 32),
    "layers.0.mlp.up.kernel": (64, 32),
    "layers.0.mlp.down.kernel": (32, 64),
    "layers.10.mlp.up.kernel": (64, 32),
    "lm_head.kernel": (96, 32),
}
PARAMETERS: dict[str, tuple[int, ...]] = {
    **{path: shape if path.startswith("embed") else shape[::-1] for path, shape in MATRICES.items()},
    "layers.0.attn.q.bias": (32,),
    "layers.0.attn_norm.scale": (32,),
    "norm.scale": (32,),
}


def plan(quantize: Any, **options: Any) -> Plan:
    made = make_plan(quantize, PARAMETERS, matrices=MATRICES, **options)
    assert sorted([*made.schemes, *made.kept]) == sorted(PARAMETERS)
    return made


def names(made: Plan) -> dict[str, str]:
    return {path: scheme.name for path, scheme in made.schemes.items()}


def test_one_scheme_for_all_matrices() -> None:
    made = plan("int8")
    assert set(made.schemes) == set(MATRICES)
    assert names(made)["lm_head.kernel"] == "int8-g32-f16-auto"
    assert names(made)["layers.0.mlp.down.kernel"] == "int8-g64-f16-auto"
    assert made.kept["norm.scale"] == "[32] is not multiplied as a matrix"
    assert made.get("lm_head.kernel") == made.schemes["lm_head.kernel"] and made.get("norm.scale") is None
    assert plan(Scheme(bits=8, group_size=None)).schemes.keys() == MATRICES.keys()
    assert made and not plan(None) and not plan(None).schemes


def test_rules_by_path() -> None:
    made = plan({"layers/.*/mlp": "int4", "lm_head": "int8", ".*norm": None})
    assert names(made) == {
        "layers.0.mlp.up.kernel": "int4-g32-min-f16-auto",
        "layers.0.mlp.down.kernel": "int4-g32-min-f16-auto",
        "layers.10.mlp.up.kernel": "int4-g32-min-f16-auto",
        "lm_head.kernel": "int8-g32-f16-auto",
    }
    assert made.kept["layers.0.attn_norm.scale"] == made.kept["norm.scale"] == "a rule keeps it"
    assert made.kept["embed.embedding"] == "no rule matches it"


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        ("mlp", {"layers.0.mlp.up.kernel", "layers.0.mlp.down.kernel", "layers.10.mlp.up.kernel"}),
        ("layers/0/mlp", {"layers.0.mlp.up.kernel", "layers.0.mlp.down.kernel"}),
        (r"layers\.0\.mlp", {"layers.0.mlp.up.kernel", "layers.0.mlp.down.kernel"}),
        ("layers.0.mlp.up.kernel", {"layers.0.mlp.up.kernel"}),
        (r"layers/\d+/mlp/(up|gate)", {"layers.0.mlp.up.kernel", "layers.10.mlp.up.kernel"}),
        ("up/kernel|embedding", {"layers.0.mlp.up.kernel", "layers.10.mlp.up.kernel", "embed.embedding"}),
        ("1.", {"layers.10.mlp.up.kernel"}),
        (".*head", {"lm_head.kernel"}),
        ("^embed", {"embed.embedding"}),
        (".*", set(MATRICES)),
    ],
)
def test_a_rule_matches_whole_components(rule: str, matched: set[str]) -> None:
    assert set(plan({rule: "int8"}).schemes) == matched


def test_the_first_rule_decides() -> None:
    made = plan({"layers/0": "int8", "mlp": "int4", ".*": None})
    assert names(made)["layers.0.mlp.up.kernel"] == "int8-g32-f16-auto"
    assert names(made)["layers.10.mlp.up.kernel"] == "int4-g32-min-f16-auto"
    assert len(made.schemes) == 4


@pytest.mark.parametrize("rule", ["head", "ml", "layers/1", "layers/0/mlp/upp", "mlp/kernel", "Mlp", ""])
def test_a_rule_that_matches_nothing(rule: str) -> None:
    with pytest.raises(LlmirError, match=re.escape(f"rule {rule!r} matches no parameter")) as caught:
        plan({"embed": "int8", rule: "int4"})
    assert "'embed.embedding'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("int5", r"unknown scheme 'int5'; expected 'int8', 'int4'"),
        ({"mlp": "int5"}, r"rule 'mlp' has scheme 'int5'; expected None, 'int8'"),
        ({"mlp": 8}, r"rule 'mlp' has scheme 8; expected None, 'int8'"),
        (8, r"expected the name of a scheme, got 8"),
        ({}, r"no rules in it"),
        ({"(": "int8"}, r"rule '\(' is not a regular expression"),
        ({"mlp)|(?:x": "int8"}, r"is not a regular expression"),
        ({3: "int8"}, r"a rule is a regular expression .* got 3"),
        ({".*norm": "int8"}, r"rule '\.\*norm' matches only parameters that cannot be quantized, such as 'layers\.0"),
        ({"layers": "int8", "mlp": "int4"}, r"rule 'mlp' never applies, since rules before it such as 'layers'"),
        ({"layers/0": "int8", "layers/10": None, "layers": "int4"}, r"rule 'layers' never applies"),
        ({"mlp/down": "int8-g48"}, r"^layers\.0\.mlp\.down\.kernel: group_size 48 does not divide its 64 inputs"),
        ("int4-g64", r"^embed\.embedding: group_size 64 does not divide its 32 inputs"),
    ],
)
def test_rules_that_cannot_be_meant(quantize: Any, message: str) -> None:
    with pytest.raises(LlmirError, match=message) as caught:
        plan(quantize)
    assert "\n" not in str(caught.value)


def test_int4_on_an_odd_dimension() -> None:
    shapes = {"a.kernel": (32, 8), "b.kernel": (33, 8)}
    matrices = {"a.kernel": (8, 32), "b.kernel": (8, 33)}
    with pytest.raises(LlmirError, match=r"^b\.kernel: int4 packs two inputs .* even, got 33") as caught:
        make_plan("int4", shapes, matrices=matrices)
    remedy = re.search(r"(\{.*\})", str(caught.value))
    assert remedy is not None
    name, scheme = re.findall(r"'([^']*)'", remedy[1])
    assert make_plan({name: scheme, ".*": "int4"}, shapes, matrices=matrices).schemes["b.kernel"].bits == 8


def test_what_the_checkpoint_has_quantized() -> None:
    """Presets keep blocks of their own width; a spelled-out scheme does not; "stored" keeps all and adds nothing."""
    q8, q4 = (Scheme(bits=bits, group_size=32) for bits in (8, 4))
    stored = {"embed.embedding": q8, "lm_head.kernel": q4}
    made = names(plan("int4", stored=stored))
    # What a file of four bits has in eight, it has so on purpose; a file of eight bits becomes one of four.
    assert (made["embed.embedding"], made["lm_head.kernel"]) == ("int8-g32-f16-auto", "int4-g32-f16-auto")
    assert names(plan("int4", stored={"embed.embedding": q8}))["embed.embedding"] == "int4-g32-min-f16-auto"
    made = names(plan("int8", stored=stored))
    assert (made["embed.embedding"], made["lm_head.kernel"]) == ("int8-g32-f16-auto", "int8-g32-f16-auto")
    assert names(plan("int4-g32-min", stored=stored))["lm_head.kernel"] == "int4-g32-min-f16"
    assert names(plan("w4a8", stored=stored))["lm_head.kernel"] == "int4-g32-f16-a8-g32"
    assert plan("stored", stored=stored).schemes == stored and not plan("stored")
    assert plan("stored", stored=stored).kept["norm.scale"] == "floats in the checkpoint"
    assert plan("w4a8", stored=stored).schemes["lm_head.kernel"].weight_format == q4


@given(st.lists(st.tuples(st.sampled_from(["embed", "layers", "0", "mlp", ".*"]), st.sampled_from(["int8", None]))))
def test_a_plan_or_one_clear_error(rules: list[tuple[str, str | None]]) -> None:
    """Whatever the order: each parameter has the scheme of the first rule that matches it."""
    quantize = dict(rules)
    try:
        made = plan(quantize)
    except LlmirError as error:
        assert "\n" not in str(error)
        return
    for path, shape in MATRICES.items():
        parts = path.split(".")
        scheme = next((s for rule, s in quantize.items() if rule == ".*" or rule in parts), None)
        expected = None if scheme is None else parse_scheme(scheme).fitted(shape, name=path).name
        assert names(made).get(path) == expected

"""Tokenizers rebuilt from GGUF metadata, against SmolLM2's reference, SentencePiece, and rules as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_export import export_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.checkpoint.gguf_tokenizer import read_tokenizer
from llmir_jax.errors import CheckpointError
from llmir_jax.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 1234 times they've done so, isn't it?\n\n",
    "def forward(model, tokens):\n    return model(tokens)  # 2024-01-31\n",
    "Les œufs coûtent 12,50 €. Größe, naïve café — «voilà»!\r\n\tTAB\n",
    "日本語のテキスト。中文文本。 한국어 텍스트 😀😃\n",
] * 3
SAMPLES = [
    *CORPUS[:4],
    "",
    " ",
    "  leading and trailing  ",
    "I'LL WE'VE can't",
    "1234567890 1 22 333 4444",
    "e\u0301 combining, \u00e9 composed",
    "\n\n\n  \n",
    "a" * 50,
    "unseen: ∀x∈ℝ 🤖",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def published(name: str) -> tokenizers.Tokenizer:
    """An untrained tokenizer with the normalizer and pre-tokenizer of the tokenizer.json that the family publishes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    if name == "gpt-2":
        tokenizer.pre_tokenizer = byte_level
    elif name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        split = pre_tokenizers.Split(Regex(QWEN2 if name == "qwen2" else LLAMA3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def read_back(folder: Path, path: Path, metadata: dict[str, Any]) -> Tokenizer:
    export_gguf(folder, path, metadata=metadata)
    return read_tokenizer(GGUFFile(path))


def bpe_metadata(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }


def trained(name: str) -> tokenizers.Tokenizer:
    tokenizer = published(name)
    special = ["<|begin|>", "<|end|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_rules(data_path: Path, tmp_path: Path, name: str) -> None:
    original = trained(name)
    rebuilt = read_back(data_path / "checkpoints" / "llama", tmp_path / "t.gguf", bpe_metadata(original, name))
    adds_bos = name == "llama-bpe"
    for sample in SAMPLES:
        assert rebuilt.encode(sample, add_special_tokens=False) == original.encode(sample).ids, sample
        assert rebuilt.encode(sample) == [0] * adds_bos + original.encode(sample).ids
        if name != "qwen2":  # which normalizes
            assert rebuilt.decode(rebuilt.encode(sample)) == sample
    assert rebuilt.bos_token == "<|begin|>" and rebuilt.eos_token == "<|end|>"
    assert rebuilt.eos_ids == (1, 2)  # the end of the text, and the end of a turn
    assert rebuilt.encode("a<|im_end|>b", add_special_tokens=False)[1] == 2
    assert (
        rebuilt.decode([0, 2, 1]) == ""
        and rebuilt.decode([0, 2, 1], skip_special_tokens=False) == "<|begin|><|im_end|><|end|>"
    )


def test_a_whole_word_beats_the_merges_only_in_llama3(data_path: Path, tmp_path: Path) -> None:
    original = trained("gpt-2")
    metadata = bpe_metadata(original, "gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["zebra"]
    metadata["tokenizer.ggml.token_type"] += [1]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    for pre, whole in (("gpt-2", False), ("llama-bpe", True)):
        tokenizer = read_back(
            data_path / "checkpoints" / "llama", tmp_path / "t.gguf", metadata | {"tokenizer.ggml.pre": pre}
        )
        assert (tokenizer.encode("zebra", add_special_tokens=False) == [last]) is whole


def test_bos_and_eos_as_the_file_asks(data_path: Path, tmp_path: Path) -> None:
    metadata = bpe_metadata(trained("gpt-2"), "gpt-2")
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = read_back(data_path / "checkpoints" / "llama", tmp_path / "t.gguf", metadata | asked)
    plain = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == [0, *plain, 1]


def test_gpt2_files_may_lack_the_rule(data_path: Path, tmp_path: Path) -> None:
    metadata = bpe_metadata(trained("gpt-2"), "gpt-2")
    del metadata["tokenizer.ggml.pre"]
    tokenizer = read_back(data_path / "checkpoints" / "gpt2", tmp_path / "t.gguf", metadata)
    assert tokenizer.encode("it's") == trained("gpt-2").encode("it's").ids
    with pytest.raises(CheckpointError, match=r"pre-tokenizer None"):
        read_back(data_path / "checkpoints" / "llama", tmp_path / "t.gguf", metadata)


def test_sentencepiece(data_path: Path, tmp_path: Path) -> None:
    """Ids as SentencePiece itself gives them: prefix space, runs of spaces, bytes for what is not in the vocabulary."""
    data = json.loads((data_path / "tokenizers" / "sentencepiece.json").read_text(encoding="utf-8"))
    metadata = {f"tokenizer.ggml.{key}": data[key] for key in ("tokens", "scores", "token_type")}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    tokenizer = read_back(data_path / "checkpoints" / "llama", tmp_path / "t.gguf", metadata)
    for sample, ids in data["samples"].items():
        assert tokenizer.encode(sample) == [1, *ids], sample
        assert tokenizer.decode(ids) == sample
    assert tokenizer.eos_ids == (2,) and tokenizer.bos_token == "<s>"


CHARACTERS = st.characters(codec="utf-8", max_codepoint=0x2FFFF, exclude_characters="\4\6\x13\x14\x16\x1d")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    return read_tokenizer(GGUFFile(smollm2_path))


def test_smollm2_reference(smollm2_tokenizer: Tokenizer, data_path: Path) -> None:
    cases = json.loads((data_path / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 21 and smollm2_tokenizer.vocab_size == 49152 and smollm2_tokenizer.eos_ids == (2,)
    for case in cases:
        assert smollm2_tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert smollm2_tokenizer.decode(case["output_ids"], skip_special_tokens=False) == case["text"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(CHARACTERS, max_size=60))
def test_smollm2_round_trip(smollm2_tokenizer: Tokenizer, text: str) -> None:
    """Six control characters and the planes that Unicode does not use yet have no bytes in its vocabulary."""
    ids = smollm2_tokenizer.encode(text)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "".join(smollm2_tokenizer.decode_stream(ids, skip_special_tokens=False)) == text


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_smollm2_streams_what_it_decodes(smollm2_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Any ids, broken characters among them and at the end."""
    pieces = list(smollm2_tokenizer.decode_stream(ids, skip_special_tokens=skip))
    assert "".join(pieces) == smollm2_tokenizer.decode(ids, skip_special_tokens=skip) and "" not in pieces

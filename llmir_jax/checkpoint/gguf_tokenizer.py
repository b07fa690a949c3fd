"""A tokenizer from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

GGUF keeps vocabulary, merges and scores but only a name for the rule that splits text into words; the rules here are
those of the tokenizers that Hugging Face publishes with the same models.
"""

from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.errors import CheckpointError
from llmir_jax.tokenizer import Tokenizer

# Token types: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h, llama_token_type
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
# They end a turn whatever the metadata calls the end of text: a chat model must not write past them.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
SPACE = "▁"  # SentencePiece's mark for a space


@dataclass(frozen=True, kw_only=True)
class WordRule:
    """How text is split before merging: `pattern` None is GPT-2's own, which byte-level tokenizers have built in."""

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False  # a whole word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = WordRule(pattern=rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True)
_QWEN2 = WordRule(pattern=rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", nfc=True)
WORD_RULES = {
    "gpt-2": WordRule(),
    "smollm": WordRule(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The file's tokenizer. Raises CheckpointError where it has none, or one of a kind we cannot rebuild exactly."""
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = _vocabulary(file)
    if kind == "gpt2":
        rule = _word_rule(file)
        backend, add_bos = _byte_level_bpe(file, tokens, rule), rule.add_bos
    elif kind == "llama":
        backend, add_bos = _sentencepiece_bpe(file, tokens, types), True
    else:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' or 'llama'")
    _add_special_tokens(backend, tokens, types)
    ids = {name: _token_id(file, name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    bos, eos = (None if (i := ids[name]) is None else tokens[i] for name in ("bos", "eos"))
    backend.post_processor = _surround(
        bos if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
        backend,
    )
    ends = [ids["eos"], ids["eot"], ids["eom"]]
    ends += [i for i, (token, k) in enumerate(zip(tokens, types, strict=True)) if k == CONTROL and token in END_OF_TURN]
    eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    return Tokenizer(backend=backend, eos_ids=eos_ids, bos_token=bos, eos_token=eos)


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    tokens: list[str] = _strings(file, "tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{file.path}: corrupt vocabulary: {len(tokens)} tokens, {len(types)} types, or a repeated token"
        )
    return tokens, types


def _strings(file: GGUFFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path}: no list of strings {key}; the file has no usable tokenizer")
    return values


def _token_id(file: GGUFFile, name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token: Any = file.metadata.get(key)
    if token is not None and (not isinstance(token, int) or not 0 <= token < vocab_size):
        raise CheckpointError(f"{file.path}: {key} = {token} is not in the vocabulary of {vocab_size:,} tokens")
    return token


def _word_rule(file: GGUFFile) -> WordRule:
    # GPT-2 files older than the key have GPT-2's rule; for others its absence means that nobody knows.
    default = "gpt-2" if file.metadata.get("general.architecture") == "gpt2" else None
    name = file.metadata.get("tokenizer.ggml.pre", default)
    if not isinstance(name, str) or name not in WORD_RULES:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; expected one of "
            f"{', '.join(WORD_RULES)}"
        )
    return WORD_RULES[name]


def _byte_level_bpe(file: GGUFFile, tokens: list[str], rule: WordRule) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(file, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(_bpe(file, vocab, merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.single_digits else []
    if rule.pattern is not None:
        splits.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece joins the pair whose piece has the best score: as merges, all pairs in the order of that score."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(isinstance(x, float) for x in scores):
        raise CheckpointError(
            f"{file.path}: no score for each token (tokenizer.ggml.scores); the tokenizer is incomplete"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    # Bytes and control tokens are never the result of a merge.
    pieces = {t for t, k in zip(tokens, types, strict=True) if k not in (CONTROL, UNKNOWN, BYTE)}
    ranked = []
    for piece in pieces:
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in pieces and right in pieces:
                ranked.append((-scores[vocab[piece]], vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = next((token for token, k in zip(tokens, types, strict=True) if k == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        _bpe(file, vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    )
    add_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if add_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return backend


def _bpe(file: GGUFFile, vocab: dict[str, int], merges: list[Any], **options: Any) -> Any:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the package raises bare Exception, for merges of tokens that are not in the vocabulary
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file.path}: corrupt tokenizer: {reason}") from None


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Make control tokens (skipped in decoding) and user-defined ones (not skipped) match whole in any text."""
    typed = list(zip(tokens, types, strict=True))
    control = [AddedToken(t, special=True, normalized=False) for t, kind in typed if kind in (CONTROL, UNKNOWN)]
    user_defined = [AddedToken(t, special=False, normalized=False) for t, kind in typed if kind == USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)


def _surround(bos: str | None, eos: str | None, backend: tokenizers.Tokenizer) -> Any:
    """What puts `bos` before every text and `eos` after it, or None."""
    if bos is None and eos is None:
        return None
    parts = [part for part in (bos, "$A", eos) if part is not None]
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    return processors.TemplateProcessing(single=parts, special_tokens=special)

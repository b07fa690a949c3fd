"""Tiny random checkpoints and what transformers computes with them, for tests of our models and loaders.

Not run by the tests: needs torch, transformers and sentencepiece, which the project does not. See README.md here.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import sentencepiece
import torch
import transformers
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

VOCAB, SEQ_LEN, NUM_KEPT = 96, 24, 8  # logits of the last NUM_KEPT positions are kept
LLAMA_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_SHAPE, tie_word_embeddings=False),
    "llama3": LlamaConfig(**LLAMA_SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama_bias": LlamaConfig(
        **LLAMA_SHAPE,
        attention_bias=True,
        mlp_bias=True,
        head_dim=16,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    ),
    "mistral": MistralConfig(**LLAMA_SHAPE, sliding_window=7, tie_word_embeddings=False, head_dim=8),
    "qwen2": Qwen2Config(**LLAMA_SHAPE, tie_word_embeddings=True),
    "qwen2_window": Qwen2Config(**LLAMA_SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**LLAMA_SHAPE, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=0.2,
    ),
}


def make(name: str, config: transformers.PretrainedConfig, folder: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.2)
        tokens = torch.randint(0, VOCAB, (2, SEQ_LEN))
        logits = model(tokens).logits
    # Two of them in several shards, as large models come.
    model.save_pretrained(folder, max_shard_size="40KB" if name in ("llama", "gpt2") else "1GB")
    expected = {"tokens": tokens.int(), "last_logits": logits[:, -NUM_KEPT:].contiguous()}
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


def make_sentencepiece(folder: Path) -> None:
    """A BPE model of the kind Llama 2 has, with pieces and scores as llama.cpp would store them, and what it gives."""
    folder.mkdir(parents=True, exist_ok=True)
    prose = "Les œufs sont très chers, naïve café. The cat sat on the mat; the dog did too.\n" * 20
    text = Path(__file__).read_text() + prose
    corpus = folder / "corpus.txt"
    corpus.write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    tests = ((2, spm.is_unknown), (3, spm.is_control), (6, spm.is_byte), (1, lambda _: True))
    kinds = [next(kind for kind, holds in tests if holds(i)) for i in range(len(pieces))]
    samples = [
        "Hello world",
        "The cat sat on the mat",
        " two  spaces   inside",
        "naïve café œufs",
        "日本語 😀",
        "def f(x):\n\treturn x * 2\n",
        "aaaaaaaaaaa",
        "model.parameters()",
    ]
    data = {
        "tokens": pieces,
        "scores": [spm.get_score(i) for i in range(len(pieces))],
        "token_type": kinds,
        "samples": {sample: spm.encode(sample) for sample in samples},
    }
    (folder / "sentencepiece.json").write_text(json.dumps(data, ensure_ascii=False))
    for leftover in (corpus, folder / "spm.model", folder / "spm.vocab"):
        leftover.unlink()


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, config in CONFIGS.items():
        make(name, config, out / "checkpoints" / name)
    make_sentencepiece(out / "tokenizers")

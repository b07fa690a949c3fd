"""Which tensor of a checkpoint each parameter of our models is, for Hugging Face's names and for GGUF's."""

from collections.abc import Collection, Iterator

from llmir_jax.checkpoint.assemble import ModelConfig
from llmir_jax.checkpoint.source import Source
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import LlamaConfig

# ours → (Hugging Face's, GGUF's), inside a layer
LLAMA_LINEARS = {
    "attn.q": ("self_attn.q_proj", "attn_q"),
    "attn.k": ("self_attn.k_proj", "attn_k"),
    "attn.v": ("self_attn.v_proj", "attn_v"),
    "attn.o": ("self_attn.o_proj", "attn_output"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.down_proj", "ffn_down"),
}
LLAMA_NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "attn.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attn.k_norm": ("self_attn.k_norm", "attn_k_norm"),
}
GPT2_LINEARS = {
    "attn.qkv": ("attn.c_attn", "attn_qkv"),
    "attn.o": ("attn.c_proj", "attn_output"),
    "mlp.fc": ("mlp.c_fc", "ffn_up"),
    "mlp.proj": ("mlp.c_proj", "ffn_down"),
}
GPT2_NORMS = {"attn_norm": ("ln_1", "attn_norm"), "mlp_norm": ("ln_2", "ffn_norm")}

HF, GGUF = 0, 1


def huggingface_sources(config: ModelConfig, stored: Collection[str]) -> dict[str, Source]:
    """Parameter path → its tensor in a Hugging Face checkpoint that has the tensors `stored`."""
    if isinstance(config, LlamaConfig):
        return dict(_llama_sources(config, HF, "model.layers.{}.", interleaved=False))
    # GPT-2 of 2019 was published without the prefix that later conversions have.
    prefix = "transformer." if "transformer.wte.weight" in stored else ""
    return dict(_gpt2_sources(config, HF, prefix + "h.{}.", prefix))


def gguf_sources(config: ModelConfig, *, interleaved: bool) -> dict[str, Source]:
    """Parameter path → its tensor in a GGUF file. `interleaved`: q and k have llama.cpp's order of rows for "llama"."""
    if isinstance(config, LlamaConfig):
        return dict(_llama_sources(config, GGUF, "blk.{}.", interleaved=interleaved))
    return dict(_gpt2_sources(config, GGUF, "blk.{}.", ""))


def _llama_sources(
    config: LlamaConfig, column: int, layer_format: str, *, interleaved: bool
) -> Iterator[tuple[str, Source]]:
    embed, norm, head = (
        ("model.embed_tokens", "model.norm", "lm_head"),
        ("token_embd", "output_norm", "output"),
    )[column]
    yield "embed.embedding", Source(name=f"{embed}.weight")
    yield "norm.scale", Source(name=f"{norm}.weight")
    yield "head.kernel", Source(name=f"{head}.weight", transposed=True)
    interleaved_heads = {"attn.q": config.num_heads, "attn.k": config.num_kv_heads} if interleaved else {}
    for i in range(config.num_layers):
        prefix = layer_format.format(i)
        for ours, names in LLAMA_LINEARS.items():
            heads = interleaved_heads.get(ours)
            weight, bias = f"{prefix}{names[column]}.weight", f"{prefix}{names[column]}.bias"
            yield f"layers.{i}.{ours}.kernel", Source(name=weight, transposed=True, interleaved_heads=heads)
            yield f"layers.{i}.{ours}.bias", Source(name=bias, interleaved_heads=heads)
        for ours, names in LLAMA_NORMS.items():
            yield f"layers.{i}.{ours}.scale", Source(name=f"{prefix}{names[column]}.weight")


def _gpt2_sources(config: GPT2Config, column: int, layer_format: str, prefix: str) -> Iterator[tuple[str, Source]]:
    embed, positions, norm, head = (
        (f"{prefix}wte", f"{prefix}wpe", f"{prefix}ln_f", "lm_head"),
        ("token_embd", "position_embd", "output_norm", "output"),
    )[column]
    yield "embed.embedding", Source(name=f"{embed}.weight")
    yield "positions.embedding", Source(name=f"{positions}.weight")
    yield "head.kernel", Source(name=f"{head}.weight", transposed=True)
    yield from _layer_norm("norm", norm)
    for i in range(config.num_layers):
        layer_prefix = layer_format.format(i)
        for ours, names in GPT2_LINEARS.items():
            # Hugging Face keeps GPT-2's original [in, out]; llama.cpp turns it to [out, in] like every other model.
            weight = Source(name=f"{layer_prefix}{names[column]}.weight", transposed=column == GGUF)
            yield f"layers.{i}.{ours}.kernel", weight
            yield f"layers.{i}.{ours}.bias", Source(name=f"{layer_prefix}{names[column]}.bias")
        for ours, names in GPT2_NORMS.items():
            yield from _layer_norm(f"layers.{i}.{ours}", layer_prefix + names[column])


def _layer_norm(ours: str, theirs: str) -> Iterator[tuple[str, Source]]:
    yield f"{ours}.scale", Source(name=f"{theirs}.weight")
    yield f"{ours}.bias", Source(name=f"{theirs}.bias")

"""Models of published shapes with random weights, as GGUF files that LLMIR and llama.cpp both load.

Speed depends on shapes and formats, not on values: what a model of a billion parameters would do can be measured
without its weights. Matrices are of random Q4_0 blocks, the table of embeddings too, so that everyone reads the same
bytes; norms are ones. There is no tokenizer: prompts are token ids. Blocks are as in `checkpoint.gguf_blocks`.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from llmir_jax.checkpoint import smollm2
from llmir_jax.errors import LlmirError
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import Llama3Scaling, inverse_frequencies

FORMAT = "Q4_0"
VERSION = 1  # of what is written: a file of another one is not taken
STANDARD_DEVIATION = 0.02  # of the weights
BLOCK, BLOCK_BYTES = 32, 18  # elements; a float16 scale and 16 bytes of two values each
ROWS_AT_ONCE = 8192

SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_seq_len=131_072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192),
        windows=(None,) * 16,
        tie_embeddings=True,
    ),
}
"""Of the Llama architecture, with tied embeddings, without biases, windows and norms of queries."""


def shape_file(name: str) -> Path:
    """The GGUF file of `SHAPES[name]`, written to the cache folder unless it is there. Raises LlmirError."""
    folder = smollm2.cache_dir() / "bench" / "shapes"
    path = folder / f"{name}-{FORMAT.lower()}-v{VERSION}.gguf"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            written = Path(scratch) / path.name
            write_shape(SHAPES[name], written)
            os.replace(written, path)
    except OSError as error:
        raise LlmirError(f"--shape {name}: cannot be kept in {folder}: {error.strerror}; set LLMIR_CACHE") from None
    return path


def write_shape(shape: LlamaConfig, path: Path, *, seed: int = 0) -> None:
    """Write the file, a part of a tensor at a time: memory does not grow with the model."""
    kind = gguf.GGMLQuantizationType[FORMAT]
    vectors, matrices = _vectors(shape), _matrices(shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # llama.cpp then takes the size of the vocabulary from the line above
    for name, vector in vectors.items():
        writer.add_tensor_info(f"{name}.weight", vector.shape, vector.dtype, vector.nbytes)
    for name, (rows, columns) in matrices.items():
        stored = rows, columns // BLOCK * BLOCK_BYTES
        writer.add_tensor_info(f"{name}.weight", stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(seed)
    with path.open("ab") as file:

        def pad() -> None:
            file.write(bytes(-file.tell() % writer.data_alignment))

        pad()
        for vector in vectors.values():
            file.write(vector.tobytes())
            pad()
        for rows, columns in matrices.values():
            for part in _random_blocks(rng, rows, columns):
                file.write(part)
            pad()


def _matrices(shape: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name → [outputs, inputs], in the order of the file."""
    hidden, ff = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, q)}
    layer |= {"ffn_gate": (ff, hidden), "ffn_up": (ff, hidden), "ffn_down": (hidden, ff)}
    layers = {f"blk.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}
    return {"token_embd": (shape.vocab_size, hidden), **layers}


def _vectors(shape: LlamaConfig) -> dict[str, np.ndarray]:
    """What stays float32: norms, and what each frequency of RoPE is divided by, which is how GGUF has its scaling."""
    plain, scaled = (
        inverse_frequencies(shape.head_dim, shape.rope_theta, scaling) for scaling in (None, shape.rope_scaling)
    )
    ones = np.ones(shape.hidden_size, np.float32)
    norms = {f"blk.{i}.{name}": ones for i in range(shape.num_layers) for name in ("attn_norm", "ffn_norm")}
    return {"rope_freqs": plain / scaled, "output_norm": ones, **norms}


def _random_blocks(rng: np.random.Generator, rows: int, columns: int) -> Iterator[bytes]:
    """A matrix of Q4_0 blocks, some rows at a time: values from -8 to 7, scales that differ by a factor of 3."""
    deviation = math.sqrt((16**2 - 1) / 12)  # of the values
    for start in range(0, rows, ROWS_AT_ONCE):
        num_blocks = min(ROWS_AT_ONCE, rows - start) * columns // BLOCK
        blocks = rng.integers(0, 256, (num_blocks, BLOCK_BYTES), np.uint8)
        scales = STANDARD_DEVIATION / deviation * rng.uniform(0.5, 1.5, num_blocks)
        blocks[:, :2] = scales.astype("<f2").view(np.uint8).reshape(num_blocks, 2)
        yield blocks.tobytes()

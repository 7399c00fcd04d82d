"""A Llama as llama.cpp reads it: a GGUF file of Q4_0 matrices, from the same weights as the bundle's.

As llama.cpp's own `Q4_0` files: matrices in blocks of 32 with an fp16 scale, the output layer finer (Q8_0 here, where
theirs has Q6_K: 3 % of a 7 B file and no less exact), norms in fp32. Source: the GGUF specification.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.export.arch import EMBED_TOKENS, LM_HEAD, LlamaConfig
from wsi_rt.export.sources.stored import with_head
from wsi_rt.export.sources.weights import F32, WeightSource

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROWS = 1 << 22  # values quantised at a time


def gguf_names(c: LlamaConfig) -> dict[str, str]:
    """Published tensor name -> GGUF's."""
    names = {f"{EMBED_TOKENS}.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for i in range(c.layers):
        names |= {f"model.layers.{i}.{old}.weight": f"blk.{i}.{new}.weight" for old, new in _LAYER.items()}
    return names | {f"{LM_HEAD}.weight": "output.weight"}


def write_gguf(c: LlamaConfig, source: WeightSource, path: Path) -> int:
    """Writes `path` -> bytes of its tensors but the embedding table: what a step reads. The file has no vocabulary,
    token ids only. Raises ImportError without the gguf package."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer, c)
    tensors, names = with_head(c, source), gguf_names(c)
    kinds = {old: _kind(new, tensors.shapes()[old]) for old, new in names.items()}
    for old, new in names.items():
        shape, kind = tensors.shapes()[old], kinds[old]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        stored = shape if block == 1 else gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(new, stored, np.dtype(dtype), math.prod(shape) // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    read = 0
    for old, new in names.items():
        data = _quantised(llama_cpp_order(old, tensors.get(old), c), kinds[old])
        writer.write_tensor_data(data)
        read += 0 if new == "token_embd.weight" else data.nbytes
    writer.close()
    return read


def _kind(name: str, shape: tuple[int, ...]) -> Any:
    """The type of a tensor; rows that are no whole blocks stay fp16, as with llama.cpp's own quantiser."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    kind = kinds.Q8_0 if name == "output.weight" else kinds.Q4_0
    return kind if shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else kinds.F16


def _describe(writer: Any, c: LlamaConfig) -> None:
    import gguf

    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_value_length(c.head_width)
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_eps)
    writer.add_vocab_size(c.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")


def llama_cpp_order(name: str, x: F32, c: LlamaConfig) -> F32:
    """llama.cpp rotates neighbouring rows of a head where the published layout rotates its halves: row j of the first
    half and row j of the second become rows 2 j and 2 j + 1."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return x
    halves = x.reshape(-1, 2, c.head_width // 2, x.shape[1])  # [heads, 2, D / 2, in]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(x.shape)


def _quantised(x: F32, kind: Any) -> np.ndarray:
    import gguf

    step = max(1, _ROWS // x.shape[-1])
    parts = [gguf.quants.quantize(x[a : a + step], kind) for a in range(0, len(x), step)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

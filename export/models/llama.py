"""Language model in fp32 torch: transformers' own Llama, which the published system runs (SPEC 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsi_rt.export.arch import LlamaConfig

if TYPE_CHECKING:
    from torch import nn


def build_llama(c: LlamaConfig) -> nn.Module:
    """An uninitialised LlamaForCausalLM of this size (`models.reference_model` assigns its weights)."""
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(
        HfConfig(
            vocab_size=c.vocab,
            hidden_size=c.hidden,
            intermediate_size=c.ffn,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_width,
            max_position_embeddings=c.context,
            rms_norm_eps=c.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied_embeddings,
            hidden_act="silu",
        )
    )


def finish_llama(module: Any) -> None:
    """Put the rotary frequencies, buffers that no checkpoint holds, on the CPU after a meta-device build."""
    module.model.rotary_emb = type(module.model.rotary_emb)(config=module.config)

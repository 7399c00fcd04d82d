"""Configuration files as published checkpoints have them, for components of any size."""

from __future__ import annotations

from typing import Any

from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.runtime.errors import InputError


def timm_json(c: ViTConfig) -> dict[str, Any]:
    """A timm `config.json` in the words of Prov-GigaPath's. InputError: a ViT that is none of its kind."""
    plain = ViTConfig(c.width, c.depth, c.heads, c.mlp_hidden, "swiglu_packed", "silu", c.image_px, c.patch_px)
    fields = {k for k, v in vars(c).items() if v != getattr(plain, k)} - {"layer_scale", "mean", "std"}
    if fields or not c.layer_scale:
        raise InputError(
            f"tile encoder with {sorted(fields)} has no DINOv2 config.json, expected a DINOv2 giant's kind"
        )
    return {
        "architecture": "vit_giant_patch14_dinov2",
        "num_classes": 0,
        "num_features": c.width,
        "global_pool": "token",
        "model_args": {
            "img_size": c.image_px,
            "in_chans": 3,
            "patch_size": c.patch_px,
            "embed_dim": c.width,
            "depth": c.depth,
            "num_heads": c.heads,
            "init_values": 1e-5,
            # timm truncates width x ratio; the published 5.33334 is 8192 / 1536 and a little more for that reason.
            "mlp_ratio": (2 * c.mlp_hidden + 0.01) / c.width,
            "num_classes": 0,
        },
        "pretrained_cfg": {"input_size": [3, c.image_px, c.image_px], "mean": list(c.mean), "std": list(c.std)},
    }


def longnet_json(c: LongNetConfig) -> dict[str, Any]:
    """Settings that the weights do not tell, where they are not the published ones; usually none."""
    published = LongNetConfig(c.in_width)
    names = {
        "heads": "heads",
        "segment_lengths": "segment_length",
        "dilated_ratios": "dilated_ratio",
        "eps": "layer_norm_eps",
        "pool_eps": "norm_eps",
    }
    given = {key: getattr(c, own) for own, key in names.items() if getattr(c, own) != getattr(published, own)}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in given.items()}


def llama_json(c: LlamaConfig) -> dict[str, Any]:
    """A language model's `config.json`, as Vicuna's is."""
    out = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.ffn,
        "vocab_size": c.vocab,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return out if c.head_width * c.heads == c.hidden else out | {"head_dim": c.head_width}


def llava_json(c: LlamaConfig, projector: ProjectorConfig) -> dict[str, Any]:
    """The same as LLaVA saves it after training."""
    return llama_json(c) | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_hidden_size": projector.widths[0],
        "mm_projector_type": projector.kind,
    }


def adapter_json(rank: int, alpha: int, targets: list[str], base: str) -> dict[str, Any]:
    """peft's `adapter_config.json` of a plain LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
    }

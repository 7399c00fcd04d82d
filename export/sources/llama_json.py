"""A language model's `config.json`, of one folder or of a checkpoint over its base -> LlamaConfig (SPEC 5, 6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import read_json_object
from wsi_rt.runtime.errors import CheckpointError

_ROPES = ("rope_parameters", "rope_scaling")  # the later spelling, which holds rope_theta too, and the earlier
_MODELS = ("llama", "llava", "llava_llama")
# What decides the arithmetic without being told by every tensor's shape. mm_hidden_size is not among them: it is wrong
# in some releases (SPEC 4); nor are vocab_size and max_position_embeddings, which training may change.
_DECIDING = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_type",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "mm_projector_type",
)


def read_settings(path: Path, base: Path | None) -> tuple[dict[str, Any], str]:
    """The settings of a checkpoint, and how messages name where they stand.

    Over a base, each setting is the checkpoint's own where its config.json gives it (LLaVA saves one with an adapter;
    peft and a projector's file bring none), the base's otherwise. Raises CheckpointError when both give one that
    decides the arithmetic and they disagree, naming both values.
    """
    if base is None:
        return read_json_object(path / "config.json"), str(path)
    own = read_json_object(path / "config.json", optional=True) if path.is_dir() else {}
    below = read_json_object(base / "config.json", optional=bool(own))
    if not own or not below:
        return (own, str(path)) if own else (below, str(base))
    label = f"{path} over {base}"
    _plain_rope(Fields(_spoken(below), f"{base}: config.json"), below)
    ours, theirs = _deciding(own), _deciding(below)
    different = [k for k in _DECIDING if k in ours and k in theirs and ours[k] != theirs[k]]
    if different:
        told = ", ".join(f"{k} = {ours[k]!r} there and {theirs[k]!r} in the base's" for k in different)
        raise CheckpointError(
            f"{path}: config.json disagrees with {base}/config.json: {told}, expected the same; give the base it was "
            "trained over, or correct the wrong one"
        )
    ropes = {} if any(own.get(k) for k in _ROPES) else {k: below[k] for k in _ROPES if k in below}
    settings = {**_spoken(below), **_spoken(own)}
    return {k: v for k, v in settings.items() if k not in _ROPES or own.get(k)} | ropes, label


def _spoken(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls, which leave a setting to transformers' default."""
    return {k: v for k, v in data.items() if v is not None}


def _deciding(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, rotary ones flattened."""
    out = _spoken(data)
    for rope in (data[k] for k in reversed(_ROPES) if k in data):
        given = rope if isinstance(rope, dict) else {}
        out["rope_type"] = given.get("rope_type", given.get("type", "default"))
        if given.get("rope_theta") is not None:
            out["rope_theta"] = given["rope_theta"]
    return out


def llama_config(data: Mapping[str, Any], label: str) -> LlamaConfig:
    """A Hugging Face `config.json` -> LlamaConfig; raises CheckpointError naming what is not supported."""
    f = Fields(_spoken(data), f"{label}: config.json")
    rope = _plain_rope(f, data)
    heads, hidden = f.whole("num_attention_heads"), f.whole("hidden_size")
    kv_heads = f.whole("num_key_value_heads", default=heads)
    if hidden % heads:  # whatever head_dim says
        f.refuse("num_attention_heads", heads, f"a divisor of hidden_size {hidden}, as transformers demands")
    if heads % kv_heads:
        f.refuse("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_width = f.whole("head_dim", default=hidden // heads)
    if head_width % 16:  # whole vectors of rotary halves; nothing smaller has been tried
        f.refuse("head_dim", head_width, "a multiple of 16")
    return LlamaConfig(
        hidden=hidden,
        layers=f.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn=f.whole("intermediate_size"),
        vocab=f.whole("vocab_size"),
        context=f.whole("max_position_embeddings"),
        rms_eps=f.positive("rms_norm_eps"),
        rope_theta=rope.positive("rope_theta", default=f.positive("rope_theta", default=10000.0)),
        tied_embeddings=f.flag("tie_word_embeddings", default=False),
    )


def _plain_rope(f: Fields, data: Mapping[str, Any]) -> Fields:
    """Refuse what is no plain Llama; the settings of its rotary positions."""
    kind = data.get("model_type")
    if kind not in _MODELS:
        raise CheckpointError(f"{f.label}: language model {kind!r} is not supported, expected llama (or llava over it)")
    rope_name = next((k for k in _ROPES if data.get(k)), _ROPES[-1])
    rope = data.get(rope_name) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{f.label}: {rope_name} = {rope!r} is not an object")
    refused = {
        rope_name: rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": data.get("attention_bias", False),
        "mlp_bias": data.get("mlp_bias", False),
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None,
    }
    if any(refused.values()):
        names = [f"{n} = {data.get(n)!r}" for n, bad in refused.items() if bad]
        raise CheckpointError(f"{f.label}: {', '.join(names)} is not supported, expected a plain Llama")
    return Fields(_spoken(rope), f"{f.label}: {rope_name}")

"""Sizes of the synthetic checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig


@dataclass(frozen=True)
class Preset:
    """Four component sizes; the synthetic tokenizer has as many tokens as `llm.vocab`."""

    tile_encoder: ViTConfig
    slide_encoder: LongNetConfig
    projector: ProjectorConfig
    llm: LlamaConfig

    def components(self) -> dict[str, ComponentConfig]:
        return {c.component: c for c in (self.tile_encoder, self.slide_encoder, self.projector, self.llm)}


# The published architecture with fewer and narrower layers: seconds on two cores. Slide tokens keep
# their published widths (768, padded to 1024), so published-style `.pt` files fit.
NANO = Preset(
    tile_encoder=ViTConfig(
        width=96, depth=3, heads=4, mlp_hidden=256, mlp="swiglu_packed", act="silu", layer_scale=True
    ),
    slide_encoder=LongNetConfig(in_width=96, depth=2),
    projector=ProjectorConfig(widths=(1024, 256, 256)),
    llm=LlamaConfig(hidden=256, layers=4, heads=8, kv_heads=8, head_width=32, ffn=688, vocab=2048, context=4096),
)

# The published sizes (SPEC 2 to 5): ViT-g 1.13 B, LongNet 12 x 768, Vicuna-7B.
WSI_LLAVA_7B = Preset(
    tile_encoder=ViTConfig(
        width=1536, depth=40, heads=24, mlp_hidden=4096, mlp="swiglu_packed", act="silu", layer_scale=True
    ),
    slide_encoder=LongNetConfig(in_width=1536),
    projector=ProjectorConfig(widths=(1024, 4096, 4096)),
    llm=LlamaConfig(
        hidden=4096, layers=32, heads=32, kv_heads=32, head_width=128, ffn=11008, vocab=32000, context=4096
    ),
)

# The language model of TinyLlama-1.1B, with grouped KV heads, behind NANO's encoders: what benches measure where 7 B is
# too much.
WSI_LLAVA_1B = Preset(
    tile_encoder=NANO.tile_encoder,
    slide_encoder=NANO.slide_encoder,
    projector=ProjectorConfig(widths=(1024, 2048, 2048)),
    llm=LlamaConfig(hidden=2048, layers=22, heads=32, kv_heads=4, head_width=64, ffn=5632, vocab=32000, context=2048),
)

PRESETS = {"nano": NANO, "wsi-llava-1b": WSI_LLAVA_1B, "wsi-llava-7b": WSI_LLAVA_7B}

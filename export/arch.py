"""What each component is: sizes, and the tensors a checkpoint must hold (published key names).

Everything that builds or checks a component starts from these; nothing reads sizes anywhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

Shapes = dict[str, tuple[int, ...]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, out: int, inp: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inp)} | ({f"{name}.bias": (out,)} if bias else {})


@dataclass(frozen=True)
class ViTConfig:
    """A timm VisionTransformer (SPEC 2). `mlp`: "mlp" (fc1, act, fc2), "swiglu_packed" (fc1 = gate | value)
    or "swiglu" (fc1_g, fc1_x). `pool`: "token" or "avg"."""

    component: ClassVar[str] = "tile_encoder"

    width: int
    depth: int
    heads: int
    mlp_hidden: int  # inputs of fc2
    mlp: str = "mlp"
    act: str = "gelu"
    image_px: int = 224
    patch_px: int = 16
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    norm_eps: float = 1e-6
    pool: str = "token"
    fc_norm: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def grid(self) -> int:
        return self.image_px // self.patch_px

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens

    def tensors(self) -> Shapes:
        c, positions = self.width, self.grid**2 + (0 if self.no_embed_class else self.prefix_tokens)
        out: Shapes = {"cls_token": (1, 1, c)} if self.class_token else {}
        if self.reg_tokens:
            out["reg_token"] = (1, self.reg_tokens, c)
        out["pos_embed"] = (1, positions, c)
        out["patch_embed.proj.weight"] = (c, 3, self.patch_px, self.patch_px)
        if self.patch_bias:
            out["patch_embed.proj.bias"] = (c,)
        if self.pre_norm:
            out |= _norm("norm_pre", c)
        for i in range(self.depth):
            out |= {f"blocks.{i}.{k}": v for k, v in self._block_tensors().items()}
        return out | _norm("fc_norm" if self.fc_norm else "norm", c)

    def _block_tensors(self) -> Shapes:
        c, h = self.width, self.mlp_hidden
        out = _norm("norm1", c) | _linear("attn.qkv", 3 * c, c, self.qkv_bias)
        if self.qk_norm:
            out |= _norm("attn.q_norm", c // self.heads) | _norm("attn.k_norm", c // self.heads)
        out |= _linear("attn.proj", c, c, self.proj_bias)
        if self.layer_scale:
            out |= {"ls1.gamma": (c,), "ls2.gamma": (c,)}
        out |= _norm("norm2", c)
        if self.mlp == "swiglu":
            out |= _linear("mlp.fc1_g", h, c, self.proj_bias) | _linear("mlp.fc1_x", h, c, self.proj_bias)
        else:
            out |= _linear("mlp.fc1", 2 * h if self.mlp == "swiglu_packed" else h, c, self.proj_bias)
        return out | _linear("mlp.fc2", c, h, self.proj_bias)


@dataclass(frozen=True)
class LongNetConfig:
    """The slide encoder (SPEC 3). `norm_width` equals `width` (norm then pad) or `padded` (pad then norm)."""

    component: ClassVar[str] = "slide_encoder"

    in_width: int
    width: int = 768
    depth: int = 12
    heads: int = 16
    ffn: int = 3072
    segment_lengths: tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilated_ratios: tuple[int, ...] = (1, 2, 4, 8, 16)
    eps: float = 1e-5
    pool_eps: float = 1e-6
    pooled: int = 576
    padded: int = 1024
    norm_width: int = 768

    def tensors(self) -> Shapes:
        c = self.width
        out: Shapes = {"cls_token": (1, 1, c)} | _linear("patch_embed.proj", c, self.in_width)
        for i in range(self.depth):
            p = f"encoder.layers.{i}"
            for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
                out |= _linear(f"{p}.self_attn.{proj}", c, c)
            out |= _norm(f"{p}.self_attn.inner_attn_ln", c) | _norm(f"{p}.self_attn_layer_norm", c)
            out |= _linear(f"{p}.ffn.fc1", self.ffn, c) | _linear(f"{p}.ffn.fc2", c, self.ffn)
            out |= _norm(f"{p}.ffn.ffn_layernorm", self.ffn) | _norm(f"{p}.final_layer_norm", c)
        return out | _norm("encoder.layer_norm", c) | _norm("norm", self.norm_width)


@dataclass(frozen=True)
class ProjectorConfig:
    """LLaVA's mm_projector (SPEC 4): `widths` are the inputs of each Linear and the last output;
    one Linear is `linear`, n of them `mlp{n}x_gelu`, none `identity`."""

    component: ClassVar[str] = "projector"

    widths: tuple[int, ...]

    @property
    def kind(self) -> str:
        layers = len(self.widths) - 1
        return ("identity", "linear")[layers] if layers < 2 else f"mlp{layers}x_gelu"

    def linear_names(self) -> list[str]:
        """State-dict prefixes: `model.mm_projector` for one Linear, `.0`, `.2`, ... between GELUs else."""
        layers = len(self.widths) - 1
        return ["model.mm_projector"] if layers == 1 else [f"model.mm_projector.{2 * i}" for i in range(layers)]

    def tensors(self) -> Shapes:
        out: Shapes = {}
        for name, inp, width in zip(self.linear_names(), self.widths[:-1], self.widths[1:], strict=True):
            out |= _linear(name, width, inp)
        return out


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama decoder (SPEC 5). `rope_theta` with rotate-half layout; grouped KV heads allowed."""

    component: ClassVar[str] = "llm"

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocab: int
    context: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied_embeddings: bool = False

    def tensors(self) -> Shapes:
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        out: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            p = f"model.layers.{i}"
            out[f"{p}.input_layernorm.weight"] = (self.hidden,)
            out |= _linear(f"{p}.self_attn.q_proj", q, self.hidden, False)
            out |= _linear(f"{p}.self_attn.k_proj", kv, self.hidden, False)
            out |= _linear(f"{p}.self_attn.v_proj", kv, self.hidden, False)
            out |= _linear(f"{p}.self_attn.o_proj", self.hidden, q, False)
            out[f"{p}.post_attention_layernorm.weight"] = (self.hidden,)
            out |= _linear(f"{p}.mlp.gate_proj", self.ffn, self.hidden, False)
            out |= _linear(f"{p}.mlp.up_proj", self.ffn, self.hidden, False)
            out |= _linear(f"{p}.mlp.down_proj", self.hidden, self.ffn, False)
        out["model.norm.weight"] = (self.hidden,)
        return out if self.tied_embeddings else out | {"lm_head.weight": (self.vocab, self.hidden)}


ComponentConfig = ViTConfig | LongNetConfig | ProjectorConfig | LlamaConfig


def config_json(config: ComponentConfig) -> dict[str, Any]:
    """The configuration as the manifest stores it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


EMBED_TOKENS, LM_HEAD = "model.embed_tokens", "lm_head"


def linear_shapes(config: ComponentConfig) -> Shapes:
    """Linear layers by their tensors' prefix -> [out, in]; tied embeddings are `lm_head` too."""
    matrices = {n.removesuffix(".weight"): s for n, s in config.tensors().items() if n.endswith(".weight")}
    linears = {n: s for n, s in matrices.items() if len(s) == 2 and n != EMBED_TOKENS}
    return linears | ({LM_HEAD: matrices[EMBED_TOKENS]} if EMBED_TOKENS in matrices else {})


def parameter_count(config: ComponentConfig) -> int:
    total = 0
    for shape in config.tensors().values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total

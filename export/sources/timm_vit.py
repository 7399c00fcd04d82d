"""A timm directory (config.json + weights) -> ViTConfig and fitting weights (SPEC 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.export.arch import IMAGENET_MEAN, IMAGENET_STD, Shapes, ViTConfig
from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import open_weights, read_json_object
from wsi_rt.export.sources.weights import F32, Derived, Part, Renamed, WeightSource, plain
from wsi_rt.runtime.errors import CheckpointError, MachineError
from wsi_rt.runtime.types import TILE_PX

# Arguments of timm.create_model that make it read other files, or fetch them.
_ELSEWHERE = ("checkpoint_path", "cache_dir", "pretrained")

# Tile encoders whose architecture is known without timm. Others are looked up in timm itself.
_KNOWN: dict[str, dict[str, Any]] = {
    "vit_giant_patch14_dinov2": {
        "patch_size": 14,
        "embed_dim": 1536,
        "depth": 40,
        "num_heads": 24,
        "mlp_ratio": 2.66667 * 2,
        "mlp": "swiglu_packed",
        "act": "silu",
        "layer_scale": True,
        "img_size": 518,
    },
}


def load_timm_directory(path: Path) -> Part:
    """Raises CheckpointError on an unknown or unsupported architecture."""
    config_path = path / "config.json"
    data = read_json_object(config_path)
    name, args, pretrained = (data.get(k) for k in ("architecture", "model_args", "pretrained_cfg"))
    args, pretrained = args or {}, pretrained or data  # older files are one flat object
    if not (isinstance(name, str) and isinstance(args, dict) and isinstance(pretrained, dict)):
        raise CheckpointError(
            f"{config_path}: not a timm config (architecture = {name!r}, model_args {args!r:.80}), expected the name "
            "of a timm model and an object"
        )
    args = _own_arguments(name, args, config_path)
    preparation = Fields({k: v for k, v in pretrained.items() if v is not None}, str(config_path))
    if "img_size" not in args and preparation.given("input_size"):
        args = {**args, "img_size": preparation.wholes("input_size")[-1]}
    if name in _KNOWN:
        config = _known(name, Fields(_KNOWN[name] | args, f"{config_path}: model_args"), args)
    else:
        config = _from_timm(name, args)
    config = replace(config, **_statistics(preparation))
    if config.image_px > TILE_PX:
        raise CheckpointError(
            f"{path}: {name} takes {config.image_px} px, tiles are {TILE_PX} px; set model_args.img_size to 224 "
            "(positions are resampled as timm does)"
        )
    stored = open_weights(path)
    weights = Renamed(stored, lambda n: None if n.startswith("head.") else n)
    config = _fit_mlp(config, weights.shapes())
    return Part(config, _Resampled(weights, config), ignored=len(stored.shapes()) - len(weights.shapes()))


def _own_arguments(name: str, args: dict[str, Any], config_path: Path) -> dict[str, Any]:
    """model_args without those that are off; CheckpointError for whatever sends timm to another place than `path`."""
    if ":" in name:
        raise CheckpointError(
            f"{config_path}: architecture = {name!r} names a place, expected a model of timm; write its name alone"
        )
    elsewhere = {k: v for k, v in args.items() if k.startswith(_ELSEWHERE)}
    told = [f"{k} = {v!r}"[:120] for k, v in elsewhere.items() if v]
    if told:
        raise CheckpointError(
            f"{config_path}: model_args has {', '.join(told)}, expected the shape of the model (its weights lie beside "
            "config.json); remove it"
        )
    return {k: v for k, v in args.items() if k not in elsewhere}


def _fit_mlp(config: ViTConfig, shapes: Shapes) -> ViTConfig:
    """The MLP as the weights have it. Some published encoders (Virchow, UNI 2) name theirs only in their model
    card's code: a first layer twice as wide as the second's input is timm's SwiGLUPacked with SiLU."""
    fc1, fc2 = shapes.get("blocks.0.mlp.fc1.weight"), shapes.get("blocks.0.mlp.fc2.weight")
    if config.mlp != "mlp" or fc1 is None or fc2 is None or fc1[0] != 2 * fc2[-1]:
        return config
    return replace(config, mlp="swiglu_packed", act="silu", mlp_hidden=fc2[-1])


def _statistics(preparation: Fields) -> dict[str, Any]:
    mean, std = preparation.triple("mean", IMAGENET_MEAN), preparation.triple("std", IMAGENET_STD)
    if min(std) <= 0:
        preparation.refuse("std", std, "numbers above 0")
    return {"mean": mean, "std": std}


def _known(name: str, f: Fields, args: dict[str, Any]) -> ViTConfig:
    """From the table above; model_args override it, and any other argument is refused."""
    allowed = {
        "img_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "init_values",
        "reg_tokens",
        "no_embed_class",
        "in_chans",
        "num_classes",
        "global_pool",
        "dynamic_img_size",
    }
    fixed = {"global_pool": "token", "in_chans": 3}
    unknown = sorted(n for n, v in args.items() if n not in allowed or fixed.get(n, v) != v)
    if unknown:
        raise CheckpointError(f"{name}: model_args {', '.join(f'{n}={args[n]!r}' for n in unknown)} are not supported")
    width, heads = f.whole("embed_dim"), f.whole("num_heads")
    if width % heads:
        f.refuse("num_heads", heads, f"a divisor of embed_dim {width}")
    return ViTConfig(
        width=width,
        depth=f.whole("depth"),
        heads=heads,
        mlp_hidden=int(width * f.positive("mlp_ratio")) // 2,
        mlp=_KNOWN[name]["mlp"],
        act=_KNOWN[name]["act"],
        image_px=f.whole("img_size"),
        patch_px=f.whole("patch_size"),
        layer_scale=bool(args.get("init_values", _KNOWN[name]["layer_scale"])),
        reg_tokens=f.whole("reg_tokens", default=0, least=0),
        no_embed_class=f.flag("no_embed_class", default=False),
    )


def _from_timm(name: str, args: dict[str, Any]) -> ViTConfig:
    """Build the model without memory (meta device) and read what it is made of."""
    try:
        import timm
        import torch
    except (ImportError, RuntimeError) as e:  # a torchvision of another torch raises RuntimeError
        raise MachineError(
            f"tile encoder {name!r} needs timm, which does not import ({e}): "
            "pip install '.[export]' in a checkout of wsi-rt"
        ) from e
    if not timm.is_model(name):
        raise CheckpointError(
            f"tile encoder {name!r} is no model of timm {timm.__version__}, expected one of its VisionTransformers; "
            "correct architecture in config.json"
        )
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **{**args, "num_classes": 0})
        return describe_timm(model, name)
    except (CheckpointError, MemoryError):
        raise
    except Exception as e:  # what arguments of the wrong kind lead to, which can be anything
        raise CheckpointError(
            f"timm cannot build {name!r} with {str(args)[:200]}: {plain(e, 300)}; correct model_args in config.json"
        ) from e


def describe_timm(model: Any, name: str) -> ViTConfig:
    """A timm VisionTransformer -> ViTConfig; raises CheckpointError naming what is not supported."""
    _refuse_unsupported(model, name)
    block, mlp = model.blocks[0], model.blocks[0].mlp
    kind = type(mlp).__name__
    norm = next(m for m in (model.norm, model.fc_norm) if type(m).__name__ != "Identity")
    return ViTConfig(
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_hidden=mlp.fc2.in_features,
        mlp={"Mlp": "mlp", "GluMlp": "swiglu_packed", "SwiGLU": "swiglu"}[kind],
        act=_activation(mlp.act, name),
        image_px=model.patch_embed.img_size[0],
        patch_px=model.patch_embed.patch_size[0],
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        qk_norm=type(block.attn.q_norm).__name__ != "Identity",
        layer_scale=type(block.ls1).__name__ != "Identity",
        class_token=model.has_class_token,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=model.no_embed_class,
        pre_norm=type(model.norm_pre).__name__ != "Identity",
        patch_bias=model.patch_embed.proj.bias is not None,
        norm_eps=norm.eps,
        pool=model.global_pool,
        fc_norm=type(model.fc_norm).__name__ != "Identity",
    )


def _refuse_unsupported(model: Any, name: str) -> None:
    def refuse(what: str) -> None:
        raise CheckpointError(f"tile encoder {name!r}: {what} is not supported (a plain timm VisionTransformer is)")

    if type(model).__name__ != "VisionTransformer":
        refuse(f"class {type(model).__name__}")
    block = model.blocks[0]
    if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
        refuse(f"block {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}")
    if type(block.mlp).__name__ not in {"Mlp", "GluMlp", "SwiGLU"} or getattr(block.mlp, "gate_last", False):
        refuse(f"MLP {type(block.mlp).__name__}")
    if model.global_pool not in {"token", "avg"} or model.attn_pool is not None or model.pool_include_prefix:
        refuse(f"pooling {model.global_pool!r}")
    if type(model.patch_embed).__name__ != "PatchEmbed":
        refuse(f"patch embedding {type(model.patch_embed).__name__}")
    if model.pos_embed is None or type(model.patch_embed.norm).__name__ != "Identity":
        refuse("a patch embedding without learned positions or with its own norm")
    for module in model.modules():
        if type(module).__name__ in {"RmsNorm", "SimpleNorm"}:
            refuse(f"norm {type(module).__name__}")
    attn = block.attn
    if type(attn.norm).__name__ != "Identity" or attn.gate is not None or type(block.mlp.norm).__name__ != "Identity":
        refuse("a norm or gate inside attention or MLP")
    if all(type(m).__name__ == "Identity" for m in (model.norm, model.fc_norm)):
        refuse("no final norm")


def _activation(module: Any, name: str) -> str:
    kind = type(module).__name__
    if kind == "GELU" and getattr(module, "approximate", "none") == "tanh":
        kind = "GELUTanh"
    known = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    if kind not in known:
        raise CheckpointError(f"tile encoder {name!r}: activation {kind} is not supported, expected {sorted(known)}")
    return known[kind]


class _Resampled(Derived):
    """Position embeddings brought to the grid of the configuration, bicubic with antialiasing as timm does."""

    def __init__(self, source: WeightSource, config: ViTConfig) -> None:
        super().__init__(source)
        self._config = config
        self._wanted = config.tensors()["pos_embed"]

    def shapes(self) -> Shapes:
        shapes = self._source.shapes()
        if self._resamples(shapes.get("pos_embed")):
            shapes["pos_embed"] = self._wanted
        return shapes

    def _resamples(self, shape: tuple[int, ...] | None) -> bool:
        """Whether `shape` is a square grid of another size plus our prefix tokens."""
        if shape is None or shape == self._wanted or len(shape) != 3 or shape[2] != self._wanted[2]:
            return False
        cells = shape[1] - self._prefix
        return cells > 0 and round(cells**0.5) ** 2 == cells

    @property
    def _prefix(self) -> int:
        return 0 if self._config.no_embed_class else self._config.prefix_tokens

    def get(self, name: str) -> F32:
        x = self._source.get(name)
        if name != "pos_embed" or not self._resamples(x.shape):
            return x
        import torch
        import torch.nn.functional as F

        prefix, grid = x[:, : self._prefix], x[:, self._prefix :]
        side = round(grid.shape[1] ** 0.5)
        t = torch.from_numpy(grid.reshape(1, side, side, -1)).permute(0, 3, 1, 2)
        t = F.interpolate(t, size=(self._config.grid,) * 2, mode="bicubic", antialias=True)
        grid = t.permute(0, 2, 3, 1).reshape(1, -1, grid.shape[2]).numpy()
        return np.ascontiguousarray(np.concatenate([prefix, grid], axis=1))

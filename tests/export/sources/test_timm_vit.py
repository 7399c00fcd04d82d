"""timm directories: our torch module and our graph against timm itself, loading the same folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="the export extra is not installed")

from wsi_rt.export.arch import IMAGENET_MEAN, IMAGENET_STD, LongNetConfig, ViTConfig, parameter_count  # noqa: E402
from wsi_rt.export.graphs import tile_encoder  # noqa: E402
from wsi_rt.export.graphs.builder import WeightFile, check_model  # noqa: E402
from wsi_rt.export.graphs.layers import Style  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.sources.checkpoint import Sources, resolve  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.timm_vit import describe_timm, load_timm_directory  # noqa: E402
from wsi_rt.export.sources.weights import check_tensors  # noqa: E402
from wsi_rt.runtime.errors import CheckpointError, MachineError  # noqa: E402

TILES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "tiles"
TOLERANCE = 1e-4
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# What Prov-GigaPath's config.json says, in_chans and unused fields included (SPEC 2).
GIGAPATH_ARGS = {
    "img_size": 224,
    "in_chans": 3,
    "patch_size": 16,
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "init_values": 1e-05,
    "mlp_ratio": 5.33334,
    "num_classes": 0,
}

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"depth": 2}),
    "gigapath": ("vit_giant_patch14_dinov2", {**GIGAPATH_ARGS, **SMALL}),
    "dinov2-patch14": ("vit_small_patch14_dinov2", {"depth": 2, "img_size": 224}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 224}),
    "swiglu-registers": ("vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": 224}),
    "clip-pre-norm": ("vit_base_patch16_clip_224", SMALL),
    "clip-quickgelu": ("vit_base_patch16_clip_quickgelu_224", SMALL),
    "deit3": ("deit3_small_patch16_224", {"depth": 2}),
    "qk-norm": ("vit_tiny_patch16_224", {"depth": 2, "qk_norm": True, "qkv_bias": False}),
    "gap-fc-norm": ("vit_medium_patch16_gap_256", {"depth": 2}),
    "gap-registers": ("vit_medium_patch16_reg4_gap_256", {"depth": 2}),
    "gap-siglip": ("vit_base_patch16_siglip_gap_224", SMALL),
    "avg-with-class-token": ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg"}),
    "avg-without-fc-norm": ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "fc_norm": False}),
    "patch32-of-256": ("vit_base_patch32_clip_256", SMALL),
}


@pytest.fixture(scope="module")
def timm():
    try:
        return pytest.importorskip("timm", reason="timm is not installed")
    except RuntimeError as e:  # a torchvision of another torch
        pytest.skip(f"timm does not import: {e}")


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """u8 [2, 256, 256, 3]: the two real tiles, else noise."""
    from PIL import Image

    paths = sorted(TILES.glob("*.png"))
    if len(paths) < 2:
        return np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths[:2]])


def randomise(model) -> None:
    """Weights that make every part count: LayerScale U(0.1, 1), norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            lo, hi = -0.5, 0.5
            if name.endswith("gamma"):
                lo, hi = 0.1, 1.0
            elif p.ndim == 1:
                lo, hi = (-0.1, 0.1) if name.endswith("bias") else (0.7, 1.3)
            elif "pos_embed" not in name and "token" not in name:
                hi = (3.0 / p[0].numel()) ** 0.5
                lo = -hi
            p.uniform_(lo, hi, generator=generator)


def save(folder: Path, model, name: str, args: dict[str, Any], **pretrained: Any) -> Path:
    """A timm directory, as timm's own hub helpers lay it out."""
    folder.mkdir(exist_ok=True)
    size = args.get("img_size", model.patch_embed.img_size[0])
    pretrained = {
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    } | pretrained
    config = {"architecture": name, "num_classes": 0, "num_features": model.num_features, "model_args": args}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    safetensors_torch.save_file(model.state_dict(), str(folder / "model.safetensors"))
    return folder


def crop(tiles: np.ndarray, image_px: int, mean, std) -> torch.Tensor:
    """SPEC 1's preprocessing, written out: centre crop, /255, (x - mean) / std."""
    at = (256 - image_px) // 2
    x = tiles[:, at : at + image_px, at : at + image_px].astype(np.float32) / 255
    x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def same_outputs(folder: Path, oracle, tiles, ort_run, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> ViTConfig:
    """Load `folder` our way and hold torch and ONNX against `oracle`, which timm loaded."""
    part = load_timm_directory(folder)
    config, source = part.config, part.source
    check_tensors(source, config.tensors(), "tile_encoder")
    with torch.inference_mode():
        expected = oracle.eval()(crop(tiles, config.image_px, mean, std)).numpy()
        module = reference_model(config, source)(torch.from_numpy(tiles)).numpy()
    assert expected.shape == (2, config.width)
    assert np.abs(expected[0] - expected[1]).max() > 0.01, "the model does not look at its input"
    assert np.abs(module - expected).max() <= TOLERANCE
    tile_encoder.build(config, source, WeightFile(folder / "weights.data"), folder / "model.onnx", Style())
    check_model(folder / "model.onnx")
    features = ort_run(folder / "model.onnx", {"tiles": tiles})["features"]
    assert np.abs(features - expected).max() <= TOLERANCE
    return config


def load_with_timm(timm, folder: Path):
    """timm's own reading of the directory."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_equals_timm(timm, tmp_path, tiles, ort_run, key):
    name, args = ARCHITECTURES[key]
    model = timm.create_model(name, **{**args, "num_classes": 0})
    randomise(model)
    folder = save(tmp_path / "timm", model, name, args)
    same_outputs(folder, load_with_timm(timm, folder), tiles, ort_run)


def test_unpacked_swiglu_equals_timm(timm, tmp_path, tiles, ort_run):
    """An MLP that no config.json can name, described from the module."""
    from timm.layers import SwiGLU

    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, mlp_layer=SwiGLU)
    randomise(model)
    safetensors_torch.save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    config = describe_timm(model, "vit_tiny_patch16_224")
    assert config.mlp == "swiglu"
    source = open_weights(tmp_path)
    check_tensors(source, config.tensors(), "tile_encoder")
    with torch.inference_mode():
        expected = model.eval()(crop(tiles, 224, IMAGENET_MEAN, IMAGENET_STD)).numpy()
        assert np.abs(reference_model(config, source)(torch.from_numpy(tiles)).numpy() - expected).max() <= TOLERANCE
    tile_encoder.build(config, source, WeightFile(tmp_path / "weights.data"), tmp_path / "model.onnx", Style())
    assert np.abs(ort_run(tmp_path / "model.onnx", {"tiles": tiles})["features"] - expected).max() <= TOLERANCE


def test_a_packed_swiglu_that_only_code_names(timm, tmp_path, tiles, ort_run):
    """Virchow's and UNI 2's config.json name the plain model; their cards pass mlp_layer and act_layer in code."""
    name, args = "vit_small_patch14_dinov2", {"depth": 2, "img_size": 224, "mlp_ratio": 5.33334}
    packed = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    model = timm.create_model(name, num_classes=0, **args, **packed)
    randomise(model)
    config = same_outputs(save(tmp_path / name, model, name, args), model, tiles, ort_run)
    assert (config.mlp, config.act) == ("swiglu_packed", "silu")


def test_weights_of_torch_save(timm, tmp_path):
    """Any ViT's `pytorch_model.bin` gives what its `model.safetensors` gives."""
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, depth=2, num_classes=0)
    randomise(model)
    folder = save(tmp_path / name, model, name, {"depth": 2})
    safe = load_timm_directory(folder)
    expected = {n: safe.source.get(n) for n in safe.config.tensors()}
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    part = load_timm_directory(folder)
    check_tensors(part.source, part.config.tensors(), "tile_encoder")
    assert part.config == safe.config
    assert all(np.array_equal(part.source.get(n), x) for n, x in expected.items())


def test_statistics_come_from_the_checkpoint(timm, tmp_path, tiles, ort_run):
    args = {**SMALL, "img_size": 224}
    model = timm.create_model("vit_base_patch16_clip_224", **args, num_classes=0)
    randomise(model)
    folder = save(tmp_path / "timm", model, "vit_base_patch16_clip_224", args, mean=CLIP_MEAN, std=CLIP_STD)
    same_outputs(folder, load_with_timm(timm, folder), tiles, ort_run, CLIP_MEAN, CLIP_STD)


def test_older_flat_configs_are_read(timm, tmp_path, tiles, ort_run):
    """Before `pretrained_cfg` was a part of its own, its fields stood beside `architecture`."""
    model = timm.create_model("test_vit", num_classes=0, img_size=224)
    randomise(model)
    folder = save(tmp_path / "timm", model, "test_vit", {}, mean=CLIP_MEAN, std=CLIP_STD)
    data = json.loads((folder / "config.json").read_text())
    flat = {"architecture": "test_vit", **data["pretrained_cfg"], "input_size": [3, 224, 224]}
    (folder / "config.json").write_text(json.dumps(flat))
    same_outputs(folder, load_with_timm(timm, folder), tiles, ort_run, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_positions_are_resampled_as_timm_does(timm, tmp_path, tiles, ort_run, name):
    """A checkpoint of 518 px (37 x 37 patches) used at 224 px (16 x 16)."""
    model = timm.create_model(name, depth=1, num_classes=0)
    randomise(model)
    folder = save(tmp_path / "timm", model, name, {"depth": 1, "img_size": 224}, input_size=[3, 518, 518])
    oracle = load_with_timm(timm, folder)
    source = load_timm_directory(folder).source
    assert model.pos_embed.shape[1] != oracle.pos_embed.shape[1]
    assert np.array_equal(source.get("pos_embed"), oracle.pos_embed.detach().numpy())
    same_outputs(folder, oracle, tiles, ort_run)


def test_other_grids_are_not_resampled(timm, tmp_path):
    """Positions that are no square grid are misshapen, not stretched."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    folder = save(tmp_path / "timm", model, "vit_tiny_patch16_224", {"depth": 1})
    tensors = safetensors_torch.load_file(str(folder / "model.safetensors"))
    tensors["pos_embed"] = torch.zeros(1, 150, 192)
    safetensors_torch.save_file(tensors, str(folder / "model.safetensors"))
    part = load_timm_directory(folder)
    config, source = part.config, part.source
    with pytest.raises(CheckpointError, match=r"1 misshapen \(pos_embed \[1, 150, 192\], expected \[1, 197, 192\]\)"):
        check_tensors(source, config.tensors(), "tile_encoder")


@pytest.mark.parametrize(
    ("name", "args", "what"),
    [
        ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 224}, "class Eva"),
        ("vit_small_patch16_rope_224", {}, "class Eva"),
        ("resnet18", {}, "class ResNet"),
        ("vit_small_patch16_18x2_224", {}, "block ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "DiffAttention"),
        ("vit_base_patch16_siglip_224", {}, "pooling 'map'"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "pooling ''"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "without learned positions"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "norm RmsNorm"),
        ("vit_tiny_patch16_224", {"act_layer": "mish"}, "activation Mish"),
        ("vit_tiny_patch16_224", {"final_norm": False}, "no final norm"),
        ("vit_small_r26_s32_224", {}, "patch embedding HybridEmbed"),
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
    ],
)
def test_unsupported_models_are_refused_by_name(timm, tmp_path, name, args, what):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
    with pytest.raises(CheckpointError) as e:
        load_timm_directory(tmp_path)
    assert name in str(e.value)
    assert what in str(e.value)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("{", "config.json: corrupt"),
        ("[]", "config.json: a JSON list, expected an object"),
        ("{}", "architecture"),
        ('{"architecture": "vit_no_such_model"}', "vit_no_such_model"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"no_such": 1}}', "no_such"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": 7}', "not a timm config"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"mlp_layer": "x", "depth": 1}}', "mlp_layer"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"in_chans": 4}}', "in_chans"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"global_pool": "avg"}}', "global_pool"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"embed_dim": "wide"}}', "embed_dim = 'wide'"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"embed_dim": 96.0}}', "embed_dim = 96.0"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"depth": true}}', "depth = True"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"num_heads": 0}}', "num_heads = 0"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"num_heads": 7}}', "num_heads = 7"),
        ('{"architecture": "vit_giant_patch14_dinov2", "model_args": {"reg_tokens": -1}}', "reg_tokens = -1"),
        (
            '{"architecture": "vit_giant_patch14_dinov2", "model_args": {"img_size": [224, 224]}}',
            "img_size = [224, 224]",
        ),
        ('{"architecture": "vit_giant_patch14_dinov2", "input_size": 224}', "input_size = 224"),
        ('{"architecture": "vit_giant_patch14_dinov2", "mean": [0.5, "x", 0.5]}', "mean = [0.5, 'x', 0.5]"),
        ('{"architecture": "vit_giant_patch14_dinov2", "std": [0.5, 0.5]}', "std = [0.5, 0.5]"),
        ('{"architecture": "vit_giant_patch14_dinov2", "std": [0.5, 0, 0.5]}', "above 0"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 0}}', "vit_tiny_patch16_224"),
        ('{"architecture": ["vit"]}', "not a timm config"),
        ('{"architecture": "vit_giant_patch14_dinov2"}', "518 px"),
    ],
)
def test_bad_configs_are_refused(timm, tmp_path, config, what):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError) as e:
        load_timm_directory(tmp_path)
    assert what in str(e.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_giant_patch14_dinov2"])
@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "x.pth"}},
        {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}},
        {"pretrained_strict": True},
    ],
    ids=str,
)
def test_nothing_else_is_read_or_fetched(no_timm, tmp_path, name, args):
    """Refused before timm is imported."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
    with pytest.raises(CheckpointError, match=rf"config.json: model_args has {next(iter(args))} = .*; remove it"):
        load_timm_directory(tmp_path)


@pytest.mark.parametrize("name", ["hf-hub:bioptimus/H-optimus-0", "local-dir:/etc", "hf_hub:x", ":"])
def test_places_are_no_architecture(no_timm, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(CheckpointError, match=rf"architecture = '{name}' names a place"):
        load_timm_directory(tmp_path)


@pytest.mark.parametrize("name", ["vit_no_such_model", "", "../x", "vit tiny", "timm/vit_tiny_patch16_224"])
def test_timm_builds_only_what_it_knows(timm, tmp_path, monkeypatch, name):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(CheckpointError, match=rf"tile encoder '{name}' is no model of timm"):
        load_timm_directory(tmp_path)


def test_arguments_that_are_off_are_as_none(timm, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    off = {"depth": 1, "pretrained": False, "checkpoint_path": "", "cache_dir": None}
    assert load_timm_directory(save(tmp_path, model, "vit_tiny_patch16_224", off)).config.depth == 1


@pytest.mark.parametrize(
    "args",
    [{"depth": 0}, {"img_size": {}}, {"norm_layer": "x"}, {"embed_dim": None, "depth": "two"}, {"patch_size": [[1]]}],
    ids=str,
)
def test_whatever_timm_raises_is_one_line(timm, tmp_path, args):
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"timm cannot build 'vit_tiny_patch16_224' with") as e:
        load_timm_directory(tmp_path)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700


def test_timms_own_message_is_folded(timm, tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("first\n   second\tthird")

    monkeypatch.setattr(timm, "create_model", fails)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(CheckpointError, match=r"with \{\}: .*first.*second.*third.*; correct model_args") as e:
        load_timm_directory(tmp_path)
    assert "\n" not in str(e.value)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        load_timm_directory(tmp_path)


def test_a_classifier_that_is_left_out_is_counted(checkpoint):
    """`head.*` takes no part in features; what is dropped is told (`--dry-run` shows it)."""
    assert load_timm_directory(checkpoint.tile).ignored == 0
    head = {"head.weight": np.zeros((10, 32), np.float32), "head.bias": np.zeros(10, np.float32)}
    checkpoint.save(checkpoint.tile / "model.safetensors", {**checkpoint.tensors["tile_encoder"], **head})
    parts = resolve(Sources(checkpoint=str(checkpoint.root))).parts
    assert {name: part.ignored for name, part in parts.items()} == {
        "tile_encoder": 2,
        "slide_encoder": 0,
        "projector": 0,
        "llm": 2,
    }


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def gigapath_config(tmp_path: Path, **changes: Any) -> ViTConfig:
    config = {
        "architecture": "vit_giant_patch14_dinov2",
        "num_classes": 0,
        "num_features": 1536,
        "global_pool": "token",
        "model_args": {**GIGAPATH_ARGS, **changes},
        "pretrained_cfg": {"input_size": [3, 224, 224], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors_torch.save_file({"none": torch.zeros(1)}, str(tmp_path / "model.safetensors"))
    config = load_timm_directory(tmp_path).config
    assert isinstance(config, ViTConfig)
    return config


def test_published_tile_encoder_needs_no_timm(no_timm, tmp_path):
    config = gigapath_config(tmp_path)
    assert parameter_count(config) == 1_134_953_984
    assert (config.grid, config.width, config.mlp_hidden) == (14, 1536, 4096)


def test_the_known_table_equals_timm(timm, tmp_path):
    known = gigapath_config(tmp_path)
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_dinov2", **GIGAPATH_ARGS)
    assert known == describe_timm(model, "vit_giant_patch14_dinov2")
    assert known.tensors() == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert parameter_count(known) == sum(p.numel() for p in model.parameters())


def test_other_architectures_without_timm_name_the_package(no_timm, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(MachineError, match=r"vit_tiny_patch16_224.*needs timm.*pip install"):
        load_timm_directory(tmp_path)


def test_published_slide_encoder_has_its_parameters():
    assert parameter_count(LongNetConfig(in_width=1536)) == 86_330_880

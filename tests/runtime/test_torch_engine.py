"""The torch target's encoders against ONNX Runtime on the same bundle, and against the fp32 modules they came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import torch

from wsi_rt.export.arch import ComponentConfig, LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.component import build_component, describe
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.graphs.layers import Style
from wsi_rt.export.graphs.linears import DequantisedLinears
from wsi_rt.export.graphs.write import Component, write_graphs
from wsi_rt.export.models import reference_model
from wsi_rt.export.models.longnet import SlideEncoder
from wsi_rt.export.models.projector import Projector
from wsi_rt.export.models.vit import TileEncoder, preprocess
from wsi_rt.export.quantise import BlockFormat, FormatOf, quantise
from wsi_rt.export.sources.files import open_weights
from wsi_rt.export.sources.presets import NANO
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part, WeightSource
from wsi_rt.kernels.tile_normalize import tile_normalize
from wsi_rt.runtime.engines import torch_device
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.engines.torch_attention import choose_attention
from wsi_rt.runtime.engines.torch_device import choose_device, compute_dtype
from wsi_rt.runtime.engines.torch_engine import TorchEngine, TorchTileEngine
from wsi_rt.runtime.engines.torch_layers import Layers
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.torch_weights import StoredTensors
from wsi_rt.runtime.manifest import Compiled, EngineManifest, load_manifest
from wsi_rt.runtime.parity import GATES, compare, load_check
from wsi_rt.runtime.slides.device.device import DeviceTileEngine

GOLDEN = Path(__file__).parents[1] / "golden" / "longnet"
CPU = torch.device("cpu")
VIT = ViTConfig(width=64, depth=2, heads=4, mlp_hidden=96)
LONGNET = LongNetConfig(in_width=32, width=64, depth=2, heads=8, ffn=128, norm_width=64, padded=96)
CASES: dict[str, tuple[ComponentConfig, str]] = {
    "vit-nano": (NANO.tile_encoder, "fp32"),
    "vit-wide": (  # GELU, registers, per-head norms, patches of 14 px, the mean of the patches
        ViTConfig(width=384, depth=4, heads=6, mlp_hidden=1536, patch_px=14, qk_norm=True, reg_tokens=4, pool="avg",
                  no_embed_class=True, fc_norm=True, layer_scale=True, qkv_bias=False),
        "fp32",
    ),
    "vit-swiglu": (replace(VIT, mlp="swiglu", act="silu", pre_norm=True, patch_bias=False, proj_bias=False), "fp32"),
    "vit-packed-gelu": (replace(VIT, mlp="swiglu_packed", act="gelu_tanh", class_token=False, pool="avg"), "fp32"),
    "vit-quick": (replace(VIT, act="quick_gelu", reg_tokens=2, image_px=200, patch_px=32), "fp32"),
    "vit-int8": (replace(VIT, mlp="swiglu_packed", act="silu", layer_scale=True), "int8"),
    "longnet-nano": (NANO.slide_encoder, "fp32"),
    "longnet-wide": (LongNetConfig(in_width=384, width=1024, depth=1, ffn=2048, norm_width=1024), "fp32"),
    "longnet-pad-first": (replace(LONGNET, norm_width=96), "fp32"),
    "longnet-int8": (LONGNET, "int8"),
    "projector-nano": (NANO.projector, "fp32"),
    "projector-wide": (ProjectorConfig((1024, 2048, 1024, 2048)), "fp32"),
    "projector-linear": (ProjectorConfig((48, 64)), "fp32"),
    "projector-identity": (ProjectorConfig((48,)), "fp32"),
}  # fmt: skip
NARROW = {"vit": replace(VIT, layer_scale=True), "longnet": LONGNET, "projector": ProjectorConfig((48, 64, 32))}
Arrays = dict[str, np.ndarray]


@dataclass
class Case:
    root: Path
    manifest: EngineManifest
    source: WeightSource | None = None

    def torch(self, device: torch.device | None = CPU, precision: str = "fp32", threads: int = 1) -> TorchEngine:
        compiled = Compiled({}, "", precision, {}, {}, {})
        return TorchEngine.open(self.root, self.manifest, compiled, threads, device)

    def ort(self) -> Any:
        return backend("ort-cpu").open_engine(self.root, self.manifest, 1)


def build(config: ComponentConfig, root: Path, precision: str) -> Case:
    """With onnxruntime's engine, and a stored check."""
    source = SyntheticSource(config, "test", 3)
    part = Part(config, source)
    return Case(root, build_component(config.component, part, root, "ort-cpu", precision, 1, lambda _: None), source)


def write(
    config: ComponentConfig, root: Path, source: WeightSource | None = None, form: FormatOf = lambda _: None
) -> Case:
    """The portable graph alone."""
    folder, source = root / config.component, source or SyntheticSource(config, "test", 3)
    folder.mkdir()
    component = Component(config, source, WeightFile(folder / "weights.data"), form)
    graphs = write_graphs(component, folder, Style(DequantisedLinears(form)))
    return Case(root, describe(component, graphs, root), source)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """built(name) -> Case, each built once; those of nano are the bundle's that other tests use, too."""
    made: dict[str, Case] = {}

    def of(name: str) -> Case:
        if name.endswith("-nano"):
            root = request.getfixturevalue("nano_bundle")
            made[name] = Case(root, load_manifest(root).components[CASES[name][0].component])
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = build(CASES[name][0], root, CASES[name][1]) if name in CASES else write(NARROW[name], root)
        return made[name]

    return of


@pytest.fixture
def projector(built) -> Iterator[TorchEngine]:
    with built("projector").torch() as engine:
        yield engine


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that this torch can use")
    return torch.device(request.param)


def some_inputs(config: ComponentConfig, rows: int = 5, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    if isinstance(config, ViTConfig):
        return {"tiles": rng.integers(0, 256, (rows, 256, 256, 3), np.uint8)}
    if isinstance(config, LongNetConfig):
        index = rng.permutation(40 * 40)[:rows]
        features = rng.standard_normal((rows, config.in_width), np.float32)
        return {"features": features, "positions": np.stack([index // 40, index % 40], axis=1)}
    assert isinstance(config, ProjectorConfig)
    return {"tokens": rng.standard_normal((rows, config.widths[0]), np.float32)}


def largest_error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


# --- fp32: the same numbers
@pytest.mark.parametrize("name", [n for n in CASES if not n.endswith("int8")])
def test_fp32_outputs_equal_onnxruntime(built, name: str, device: torch.device) -> None:
    case, config = built(name), CASES[name][0]
    with case.ort() as ort, case.torch(device) as engine:
        for rows in (1, 5) if not isinstance(config, LongNetConfig) else (1, 577):
            inputs = some_inputs(config, rows)
            expected = ort.run(inputs)
            found = engine.run(inputs)
            assert list(found) == list(expected) == [s.name for s in case.manifest.outputs]
            for output, x in found.items():
                assert x.dtype == np.float32
                assert largest_error(x, expected[output]) <= 5e-5, output


@pytest.mark.parametrize("name", CASES)
def test_the_stored_check_comes_out(built, name: str, device: torch.device) -> None:
    """The fp32 module with the weights as the bundle stores them. No activation is rounded here, so integer weights
    meet the gate of fp32, too."""
    case = built(name)
    inputs, outputs = load_check(case.root / case.manifest.check)
    with case.torch(device) as engine:
        parity = compare(engine.run(inputs), outputs)
    assert parity.passes(GATES["fp32"]), parity


def test_every_way_a_linear_is_stored(tmp_path: Path) -> None:
    """Whole rows, blocks of 8 and 4 bits with and without zeros, and fp32, in one encoder."""
    forms = {
        "q_proj": BlockFormat(8, 0, True), "k_proj": BlockFormat(8, 32, True), "v_proj": BlockFormat(8, 128, True),
        "out_proj": BlockFormat(4, 32, False), "fc1": BlockFormat(8, 32, False),
    }  # fmt: skip
    config = replace(LONGNET, width=80, padded=96, norm_width=80, heads=5)  # 80 inputs: the last block is not full

    def form(name: str) -> BlockFormat | None:
        return forms.get(name.rpartition(".")[2])

    case = write(config, tmp_path, form=form)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        layers = Layers(StoredTensors(case.root / p for p in case.manifest.portable.values()), CPU, dtype)
        for kind in (*forms, "fc2"):
            name = f"encoder.layers.1.{'ffn' if kind.startswith('fc') else 'self_attn'}.{kind}"
            weight, bias = (case.source.get(f"{name}.{n}") for n in ("weight", "bias"))
            if kind in forms:
                weight = quantise(weight, forms[kind]).dequantised(weight.shape[1])
            x = np.random.default_rng(0).standard_normal((2, 7, weight.shape[1]), np.float32)
            expected, given = x @ weight.T + bias, torch.from_numpy(x).to(dtype)
            assert largest_error(layers.linear(name, bias=True)(given).float().numpy(), expected) < most
            without = layers.linear(name, bias=False)(given).float().numpy()
            assert largest_error(without + bias, expected) < most


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, dict[str, Any]]:
    """The published slide encoder of SPEC 10, whose weights and outputs are stored."""
    facts = json.loads((GOLDEN / "tiny.json").read_text())
    c = facts["config"]
    config = LongNetConfig(
        in_width=c["in_chans"], width=c["embed_dim"], depth=c["depth"], heads=c["heads"], ffn=c["ffn_dim"],
        segment_lengths=tuple(c["segment_length"]), dilated_ratios=tuple(c["dilated_ratio"]),
        eps=c["layer_norm_eps"], pool_eps=c["norm_eps"], padded=c["embed_dim"], norm_width=c["embed_dim"],
    )  # fmt: skip
    source = open_weights(GOLDEN / "tiny_weights.safetensors")
    return write(config, tmp_path_factory.mktemp("golden"), source), facts


@pytest.mark.parametrize("tiles", [1, 2, 17, 575, 576, 577, 1023, 1024, 1500, 2900, 4500])
def test_the_slide_encoder_equals_the_published_one(golden, tiles: int, device: torch.device) -> None:
    case, facts = golden
    assert str(tiles) in map(str, facts["cases"])
    load_file = pytest.importorskip("safetensors.numpy", reason="the export extra is not installed").load_file
    stored = load_file(GOLDEN / f"tiny_L{tiles}.safetensors")
    positions = stored["coords"] // facts["config"]["tile_size"]
    with case.torch(device) as engine:
        out = engine.run({"features": stored["tile_features"], "positions": positions})
    for name, reference in {"tokens": stored["pooled"], "cls": stored["cls"], "mean": stored["mean"]}.items():
        assert out[name].shape == reference.shape
        assert np.abs(out[name] - reference).max() <= 2e-4, name  # SPEC 10


# --- fp16 and bf16
def eager(config: ComponentConfig, source: WeightSource, inputs: Arrays, dtype: torch.dtype) -> Arrays:
    """The reference module with weights and activations of `dtype`, by the book."""
    made = {"tile_encoder": TileEncoder, "slide_encoder": SlideEncoder, "projector": Projector}[config.component](
        config
    )
    made.load_state_dict({name: torch.from_numpy(source.get(name)) for name in source.shapes()})
    made = made.to(dtype).eval()
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with torch.no_grad():
        if isinstance(config, ViTConfig):
            out = {"features": made.features(preprocess(given["tiles"], config).to(dtype))}
        elif isinstance(config, LongNetConfig):
            out = made(given["features"].to(dtype), given["positions"])
        else:
            out = {"embeds": made(given["tokens"].to(dtype))}
    return {name: x.float().numpy() for name, x in out.items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NARROW)
def test_half_precision_is_as_near_as_eager_torch(built, name: str, precision: str, device: torch.device) -> None:
    """flash-attention's rule: err(ours, fp32) <= 2 err(eager, fp32) + a floor, here one rounding of the largest value,
    for the largest error and for that of the worst row."""
    case, config, dtype = built(name), NARROW[name], compute_dtype(precision)
    inputs = some_inputs(config, 700 if isinstance(config, LongNetConfig) else 3)
    exact, theirs = (eager(config, case.source, inputs, d) for d in (torch.float32, dtype))
    with case.torch(device, precision) as engine:
        ours = engine.run(inputs)
        assert engine.facts["dtype"] == str(dtype).removeprefix("torch.")
    assert engine.precision == precision
    for output, x in ours.items():
        assert x.dtype == np.float32
        assert np.isfinite(x).all()
        reference, floor = exact[output], torch.finfo(dtype).eps * np.abs(exact[output]).max()
        assert 0 < np.abs(x - reference).max() <= 2 * np.abs(theirs[output] - reference).max() + floor
        rows = [np.linalg.norm(y - reference, axis=-1).max() for y in (x, theirs[output])]
        assert rows[0] <= 2 * rows[1] + floor * np.sqrt(reference.shape[-1])


def test_precisions_have_their_types() -> None:
    found = {p: compute_dtype(p) for p in ("fp32", "fp16", "bf16", "int8", "int4")}
    assert found == {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32,
        "int4": torch.float32,
    }  # fmt: skip


# --- the engine
@pytest.mark.parametrize("name", NARROW)
def test_outputs_are_filled_in_place(built, name: str, device: torch.device) -> None:
    inputs = some_inputs(NARROW[name])
    copies = {n: x.copy() for n, x in inputs.items()}
    with built(name).torch(device) as engine:
        fresh = engine.run(inputs)
        mine = {n: np.full_like(x, np.nan) for n, x in fresh.items()}
        out = engine.run(inputs, mine)
        again = engine.run(some_inputs(NARROW[name], seed=2))
    assert out.keys() == mine.keys()
    for n, x in out.items():
        assert x is mine[n]
        assert np.array_equal(x, fresh[n]), "an output of its own, which no later run changes"
        assert not np.array_equal(again[n], fresh[n])
    assert all(np.array_equal(x, copies[n]) for n, x in inputs.items())


def test_some_outputs_are_enough(built, device: torch.device) -> None:
    inputs = some_inputs(LONGNET)
    with built("longnet").torch(device) as engine:
        cls = np.full(64, np.nan, np.float32)
        assert list(engine.run(inputs, {"cls": cls})) == ["cls"]
        assert np.array_equal(cls, engine.run(inputs)["cls"])


def test_tiles_that_lie_on_the_device_are_taken_normalised(built, device: torch.device) -> None:
    """As `encode_slide` gives them where the encoder runs on a GPU."""
    config = NARROW["vit"]
    assert isinstance(config, ViTConfig)
    inputs = some_inputs(config, 3)
    for precision, rounding in (("fp32", 1e-5), ("bf16", 3e-2)):
        with built("vit").torch(device, precision) as engine:
            assert isinstance(engine, TorchTileEngine)
            assert isinstance(engine, DeviceTileEngine)
            assert (engine.device, engine.dtype) == (device, compute_dtype(precision))
            engine.prepare_device([2, 3])
            tiles = torch.from_numpy(inputs["tiles"]).to(device)
            pixels = tile_normalize(tiles, config.mean, config.std, config.image_px, dtype=engine.dtype)
            features = engine.run_device(pixels)
            assert (features.device.type, features.dtype) == (device.type, torch.float32)
            found = features.cpu().numpy().copy()
            assert np.array_equal(found, engine.run(inputs)["features"])
            assert largest_error(engine.run_device(pixels[:2]).cpu().numpy(), found[:2]) < rounding


def test_a_view_into_larger_memory_is_filled(projector: TorchEngine) -> None:
    store = np.full((9, 32), -7, np.float32)
    tokens = np.ones((3, 48), np.float32)
    projector.run({"tokens": tokens}, {"embeds": store[2:5]})
    assert np.array_equal(store[2:5], projector.run({"tokens": tokens})["embeds"])
    assert (store[:2] == -7).all()
    assert (store[5:] == -7).all()


def test_inputs_may_be_views_and_read_only(projector: TorchEngine, recwarn: pytest.WarningsRecorder) -> None:
    x = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)
    expected = projector.run({"tokens": np.ascontiguousarray(x.T)})["embeds"]
    x.flags.writeable = False
    assert np.array_equal(projector.run({"tokens": x.T})["embeds"], expected)
    assert np.array_equal(projector.run({"tokens": np.ascontiguousarray(x.T)})["embeds"], expected)
    assert not [w for w in recwarn if "writ" in str(w.message)]


def test_outputs_that_cannot_be_filled(projector: TorchEngine) -> None:
    tokens = {"tokens": np.zeros((5, 48), np.float32)}
    frozen = np.zeros((5, 32), np.float32)
    frozen.flags.writeable = False
    for out, told in ((np.zeros((32, 5), np.float32).T, "not contiguous"), (frozen, "read-only")):
        with pytest.raises(InputError, match=f"projector: `embeds` is {told}, expected memory to fill in place"):
            projector.run(tokens, {"embeds": out})
    with pytest.raises(InputError, match="with tokens between 1 and 4096"):
        projector.run({"tokens": np.zeros((4097, 48), np.float32)})


def test_positions_off_the_grid_are_the_inputs_fault(built, device: torch.device) -> None:
    inputs = some_inputs(LONGNET)
    inputs["positions"][3] = (7, 1000)
    with built("longnet").torch(device) as engine, pytest.raises(InputError, match=r"slide_encoder: .*1000"):
        engine.run(inputs)


def test_memory_that_ran_out_and_other_failures_are_one_line(built) -> None:
    engine = built("projector").torch()
    inputs = {"tokens": np.zeros((1, 48), np.float32)}
    for error, kind, told in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nand more"), MachineError, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MachineError, "memory ran out"),
        (RuntimeError("a bug\nits trace"), WsiRtError, r"torch failed \(a bug\); check the bundle with wsi-rt verify"),
    ):

        def fail(*_: object, error: Exception = error) -> dict[str, torch.Tensor]:
            raise error

        fail.facts = {}  # type: ignore[attr-defined]
        engine._component = fail  # type: ignore[assignment]
        with pytest.raises(kind, match=f"projector: {told}") as e:
            engine.run(inputs)
        assert "\n" not in str(e.value)


def test_a_closed_engine_and_a_graph_without_its_tensors_say_so(built, tmp_path: Path) -> None:
    case = built("projector")
    with case.torch() as engine:
        pass
    engine.close()
    with pytest.raises(WsiRtError, match="projector: this engine is closed"):
        engine.run({"tokens": np.zeros((1, 48), np.float32)})
    longer = replace(case, manifest=replace(case.manifest, config={"widths": [48, 64, 64, 32]}))
    with pytest.raises(EngineMismatchError, match=r"hold no .*mm_projector\.4"):
        longer.torch()
    with pytest.raises(InputError, match="llm is no encoder, expected one of: tile_encoder, slide_encoder, projector"):
        replace(case, manifest=replace(case.manifest, name="llm")).torch()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineMismatchError, match="rebuild"):
        replace(case, root=tmp_path, manifest=replace(case.manifest, portable={"model": "model.onnx"})).torch()


def test_weights_are_the_files_mapped(built) -> None:
    case = built("vit-nano")
    tensors = StoredTensors([case.root / case.manifest.portable["model"]])
    name = "blocks.1.mlp.fc2.weight.T"
    found, stored = Layers(tensors, CPU, torch.float32).tensor(name), tensors.bytes(name)
    assert isinstance(stored, np.memmap)
    assert found.data_ptr() == stored.ctypes.data
    assert Layers(tensors, CPU, torch.bfloat16).tensor(name).dtype == torch.bfloat16


@pytest.mark.parametrize("before", [1, 2])
def test_the_process_has_its_threads_back_after_a_run(built, before: int) -> None:
    case, seen = built("projector"), []
    engine = case.torch(threads=3)
    engine._component = lambda inputs, wanted: seen.append(torch.get_num_threads()) or {"embeds": torch.zeros(1, 32)}  # type: ignore[assignment,func-returns-value]
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        engine.run({"tokens": np.zeros((1, 48), np.float32)})
        assert (seen, torch.get_num_threads()) == ([3], before)
    finally:
        torch.set_num_threads(own)


# --- what it runs on, told
def test_without_a_gpu_the_cpu_is_chosen_and_told(built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == CPU
    case = built("vit")
    engine = case.torch(device=None)
    assert engine.facts["device"] == torch_device.describe(CPU)
    assert engine.facts["device"].startswith(f"cpu (torch {torch.__version__} ")
    rest = {name: told for name, told in engine.facts.items() if name != "device"}
    assert rest == {"dtype": "float32", "attention": "scaled_dot_product_attention", "tiles": "no graphs"}


def test_describe_says_why_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for cuda, available in ((None, False), ("13.0", False), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        told[cuda, available] = torch_device.describe(CPU)
    assert "built without CUDA" in told[None, False]
    assert "finds no NVIDIA GPU" in told["13.0", False]
    assert "chosen, although torch has a GPU" in told["13.0", True]


def test_a_gpu_is_chosen_where_torch_has_cuda_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's word stands in for the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_device() == CPU, "ROCm's torch calls itself CUDA"


def test_flash_attn_is_taken_where_it_can_run_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of its name stands in for flash-attn, which installs only with CUDA."""
    cuda, sdpa = torch.device("cuda", 0), "scaled_dot_product_attention"
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    assert {choose_attention(d, t)[0] for d in (CPU, cuda) for t in (torch.float32, torch.float16)} == {sdpa}
    flash = SimpleNamespace(__version__="2.8.3", flash_attn_func=lambda q, k, v: q)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    for dtype in (torch.float16, torch.bfloat16):
        assert choose_attention(cuda, dtype) == ("flash-attn 2.8.3", flash.flash_attn_func)
        assert choose_attention(CPU, dtype)[0] == sdpa
    assert choose_attention(cuda, torch.float32)[0] == sdpa


def test_the_reference_module_bites(built) -> None:
    """What the parities above would not let pass: an encoder without one of its blocks."""
    case, config = built("vit"), NARROW["vit"]
    assert isinstance(config, ViTConfig)
    assert case.source is not None
    inputs = some_inputs(config, 2)
    with torch.no_grad():
        expected = reference_model(config, case.source)(torch.from_numpy(inputs["tiles"])).numpy()
    shorter = replace(case, manifest=replace(case.manifest, config={**case.manifest.config, "depth": config.depth - 1}))
    assert largest_error(case.torch().run(inputs)["features"], expected) <= 5e-5
    assert largest_error(shorter.torch().run(inputs)["features"], expected) > 1e-2

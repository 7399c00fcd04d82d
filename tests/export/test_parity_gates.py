"""Gates bite: an engine with a part left out or shuffled is refused, and nothing of it is installed."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export import component  # noqa: E402
from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ProjectorConfig  # noqa: E402
from wsi_rt.export.build import BuildRequest, build_engines, plan_build  # noqa: E402
from wsi_rt.export.component import build_component, hold_against_reference  # noqa: E402
from wsi_rt.export.parity import check_inputs  # noqa: E402
from wsi_rt.export.sources.checkpoint import Sources  # noqa: E402
from wsi_rt.export.sources.presets import NANO  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.export.sources.weights import Part  # noqa: E402
from wsi_rt.runtime.errors import EngineMismatchError, ParityError  # noqa: E402
from wsi_rt.runtime.parity import GATES, Gate, Parity, check_component, compare, later_gate, load_check, require  # noqa: E402

# ViT and Llama as deep as the published ones: one layer is the smallest share it can be. LongNet, whose reference is
# slow, is shallow (at its published 12 layers the mildest fault below still gives 5.6e-2). All are narrow.
VIT = replace(NANO.tile_encoder, width=32, depth=40, heads=2, mlp_hidden=48)
LONGNET = LongNetConfig(in_width=32, width=64, depth=3, heads=16, ffn=128, norm_width=64, padded=64)
LLAMA = LlamaConfig(hidden=64, layers=32, heads=4, kv_heads=2, head_width=16, ffn=96, vocab=256, context=64)
PROJECTOR = ProjectorConfig((96, 48, 32))


def zeroed(source, *suffixes: str) -> dict[str, np.ndarray]:
    """The tensors that end so, as zeros: a block whose outputs are zero adds nothing, as if it were left out."""
    names = [n for n in source.shapes() if n.endswith(suffixes)]
    assert len(names) == len(suffixes)
    return {n: np.zeros(source.shapes()[n], np.float32) for n in names}


def swapped_heads(source, name: str, heads: int, axis: int) -> dict[str, np.ndarray]:
    """The last two heads of a projection's outputs (axis 0) or inputs (axis 1) change places."""
    x = source.get(name)
    order = np.arange(x.shape[axis]).reshape(heads, -1)
    order[[-2, -1]] = order[[-1, -2]]
    return {name: np.take(x, order.reshape(-1), axis=axis)}


def damages():
    v, s, m = (SyntheticSource(c, "test", 1) for c in (VIT, LONGNET, LLAMA))
    yield "vit-no-block", VIT, zeroed(v, *(f"blocks.20.{t}" for t in ("ls1.gamma", "ls2.gamma")))
    yield "vit-no-last-block", VIT, zeroed(v, *(f"blocks.39.{t}" for t in ("ls1.gamma", "ls2.gamma")))
    yield "vit-no-attention", VIT, zeroed(v, "blocks.20.ls1.gamma")
    yield "vit-heads-swapped", VIT, swapped_heads(v, "blocks.20.attn.proj.weight", VIT.heads, 1)
    yield "vit-no-layerscale", VIT, {"blocks.20.ls1.gamma": np.ones(VIT.width, np.float32)}
    layer = "encoder.layers.1"
    ends = [f"{layer}.{t}" for t in ("self_attn.out_proj.weight", "self_attn.out_proj.bias")]
    ends += [f"{layer}.ffn.{t}" for t in ("fc2.weight", "fc2.bias")]
    yield "longnet-no-layer", LONGNET, zeroed(s, *ends)
    yield "longnet-no-attention", LONGNET, zeroed(s, *ends[:2])
    yield "longnet-heads-swapped", LONGNET, swapped_heads(s, f"{layer}.self_attn.out_proj.weight", 16, 1)
    # Exchanged consistently, two heads still change places among the dilation groups.
    q, k, v_ = (swapped_heads(s, f"{layer}.self_attn.{p}_proj.weight", 16, 0) for p in "qkv")
    out = swapped_heads(s, f"{layer}.self_attn.out_proj.weight", 16, 1)
    yield "longnet-group-swapped", LONGNET, q | k | v_ | out
    ends = [f"model.layers.15.{t}.weight" for t in ("self_attn.o_proj", "mlp.down_proj")]
    yield "llama-no-layer", LLAMA, zeroed(m, *ends)
    yield "llama-no-attention", LLAMA, zeroed(m, ends[0])
    yield "llama-heads-swapped", LLAMA, swapped_heads(m, ends[0], LLAMA.heads, 1)
    yield "llama-kv-heads-swapped", LLAMA, swapped_heads(m, "model.layers.15.self_attn.v_proj.weight", 2, 0)
    p = SyntheticSource(PROJECTOR, "test", 1)
    yield "projector-no-bias", PROJECTOR, zeroed(p, "mm_projector.2.bias")


DAMAGES = {name: (config, tensors) for name, config, tensors in damages()}


PRECISIONS = [("fp32", c) for c in (VIT, LONGNET, LLAMA, PROJECTOR)]
PRECISIONS += [("int8", VIT), ("int8", LONGNET), ("int8", LLAMA), ("int4", LLAMA)]
# Blocks that are not full, and several to a row: of a row that is one block, an outlier spoils all.
TIED = replace(LLAMA, hidden=128, layers=3, tied_embeddings=True, head_width=32, ffn=200)
VARIANTS = [(p, c) for p in ("int8", "int4") for c in (TIED, replace(TIED, kv_heads=4, vocab=250))]
VARIANTS += [("int8", replace(VIT, depth=3, reg_tokens=4, no_embed_class=True, patch_px=14, mlp="swiglu", width=40))]


def built(config, source, work, precision="fp32"):
    return build_component(config.component, Part(config, source), work, "ort-cpu", precision, 1, lambda _: None)


HONEST = [*PRECISIONS, *VARIANTS]


@pytest.mark.parametrize(
    ("precision", "config"), HONEST, ids=[f"{c.component}-{p}-{i}" for i, (p, c) in enumerate(HONEST)]
)
def test_an_honest_engine_passes(tmp_path, precision, config):
    manifest = built(config, SyntheticSource(config, "test", 1), tmp_path, precision)
    gate, parity = GATES[precision], check_component(tmp_path, "ort-cpu", manifest, 1)
    assert parity.passes(gate)
    assert parity.max_rel < 0.5 * gate.max_rel, "the gate is too near to hold on other machines"
    assert manifest.portable_parity["max_rel"] <= GATES["fp32"].max_rel, "fp32 arithmetic, whatever the weights are"
    assert list(manifest.targets) == ["ort-cpu"]
    compiled = manifest.targets["ort-cpu"]
    assert compiled.precision == precision
    assert compiled.parity["engine"] == parity.to_json()
    assert compiled.parity["gate"] == vars(later_gate(gate, parity))
    assert compiled.requires == {"isa": platform.machine()}
    layers = compiled.parity["layers"]
    if config is not PROJECTOR:
        assert layers["count"] == 1 + getattr(config, "depth", getattr(config, "layers", 0))
        assert layers["error"] < 0.5 * gate.max_layer
        assert layers["row"] < 0.5 * gate.max_row
    assert sorted(p.name for p in (tmp_path / config.component).iterdir() if p.suffix == ".onnx") == sorted(
        Path(p).name for p in manifest.portable.values()
    ), "probes are removed"


# What each precision rounds a weight to is told apart from a fault: every damage fails, 4-bit weights included.
CASES = [(p, d) for d, (c, _) in DAMAGES.items() for p in ("fp32", "int8", "int4") if (p, c) in PRECISIONS]


@pytest.mark.parametrize(("precision", "damage"), CASES, ids=[f"{d}-{p}" for p, d in CASES])
def test_a_damaged_engine_is_refused(tmp_path, monkeypatch, changed, precision, damage):
    """Engine from the damaged weights, held against the whole ones: refused, and where a layer does it, by its name."""
    config, tensors = DAMAGES[damage]
    whole = SyntheticSource(config, "test", 1)
    assert any(not np.array_equal(whole.get(n), x) for n, x in tensors.items())
    honest = component.open_component

    def damaged(*args):
        return replace(honest(*args), source=changed(whole, tensors))

    def against_whole(opened, *args):
        return hold_against_reference(replace(opened, source=whole), *args)

    monkeypatch.setattr(component, "open_component", damaged)
    monkeypatch.setattr(component, "hold_against_reference", against_whole)
    with pytest.raises(ParityError) as e:
        built(config, whole, tmp_path, precision)
    assert e.value.exit_code == 5
    layer = next(iter(tensors)).rsplit(".", 2)[0].removesuffix(".self_attn").removesuffix(".ffn").removesuffix(".mlp")
    layer = layer.removesuffix(".attn")
    if config is PROJECTOR:
        assert "portable graph" in str(e.value)
    elif f"layer {layer} differs from the fp32 reference by" not in str(e.value):  # as stored, and stored wrong
        assert precision != "fp32"
        assert f": {layer}." in str(e.value), str(e.value)
        assert "away from the checkpoint's" in str(e.value)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """(config, precision) -> folder and manifest of an engine from the undamaged weights, built once."""
    made = {}

    def get(config, precision):
        key = config.component, precision
        if key not in made:
            work = tmp_path_factory.mktemp("honest")
            made[key] = work, built(config, SyntheticSource(config, "test", 1), work, precision)
        return made[key]

    return get


@pytest.mark.parametrize(("precision", "damage"), CASES, ids=[f"{d}-{p}" for p, d in CASES])
def test_verify_shows_it_too(tmp_path, changed, honest, precision, damage):
    """The stored check alone, run on a damaged engine: far outside the fp32 gate, and outside the one that an honest
    build leaves behind in the others, whose rounding hides more."""
    config, tensors = DAMAGES[damage]
    work, manifest = honest(config, precision)
    gate = Gate(**manifest.targets["ort-cpu"].parity["gate"])
    folder = tmp_path / config.component
    opened = component.open_component(
        Part(config, changed(SyntheticSource(config, "test", 1), tensors)), folder, precision
    )
    lowered = component.lower(opened, "ort-cpu")["ort-cpu"]
    compiled = component.compiled_entry(lowered, tmp_path, config, precision)
    (folder / "check.npz").write_bytes((work / manifest.check).read_bytes())
    parity = check_component(tmp_path, "ort-cpu", replace(manifest, targets={"ort-cpu": compiled}), 1)
    assert not parity.passes(gate), (parity, gate)
    if precision == "fp32":
        assert parity.max_rel > 10 * gate.max_rel, "only just: a slightly smaller fault would pass"


def test_verify_demands_no_more_than_the_build_and_no_less_than_twice_what_it_measured():
    wide = GATES["int8"]
    assert later_gate(GATES["fp32"], Parity(0, 1e-6, 1.0)) == GATES["fp32"]
    assert later_gate(wide, Parity(1, 0.01, 0.999)) == replace(wide, max_rel=0.02, min_cosine=pytest.approx(0.998))
    assert later_gate(wide, Parity(1, 0.2, 0.96)) == wide


def test_a_graph_of_another_depth_is_refused(tmp_path, monkeypatch):
    """A layer that the graph leaves out altogether, not one that adds nothing."""
    short, honest = replace(LONGNET, depth=2), component.open_component
    monkeypatch.setattr(component, "open_component", lambda *args: replace(honest(*args), config=short))
    monkeypatch.setattr(
        component,
        "hold_against_reference",
        lambda opened, *args: hold_against_reference(replace(opened, config=LONGNET), *args),
    )
    with pytest.raises(ParityError, match="slide_encoder: the engine has 2 layers, its checkpoint 3"):
        built(LONGNET, SyntheticSource(LONGNET, "test", 1), tmp_path)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over-an-old-one"])
def test_a_failed_build_installs_nothing(tmp_path, monkeypatch, tiny_preset, existing):
    """The lowered engine is off: exit code 5, and the bundle that was there stays as it was."""
    out = tmp_path / "engines" / "bundle"
    if existing:
        build_engines(plan_build(BuildRequest(Sources(checkpoint=tiny_preset), out, components=("projector",))))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(component, "check_component", lambda *_: Parity(0.1, 0.1, 0.9))
    request = BuildRequest(Sources(checkpoint=tiny_preset + "?seed=1"), out, components=("projector",), force=existing)
    with pytest.raises(ParityError, match=r"projector \(ort-cpu engine\) .* nothing was installed"):
        build_engines(plan_build(request))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert (tmp_path / "engines").exists() == existing


def test_non_finite_missing_and_misshapen_outputs_fail():
    good = {"x": np.ones((2, 3), np.float32)}
    assert compare(good, good) == Parity(0.0, 0.0, 1.0)
    nan = np.ones((2, 3), np.float32)
    nan[1, 2] = np.nan
    for bad in ({}, {"x": nan}, {"x": nan * np.inf}, {"x": np.ones((3, 2))}, {"x": np.ones((2, 3, 1))}):
        assert not compare(bad, good).passes(Gate(1e9, -1e9, 1e9, 1e9) if not bad else GATES["fp32"])
    assert not Parity(np.nan, np.nan, np.nan).passes(Gate(1e9, -1.0, 1e9, 1e9))


def test_both_bounds_hold_and_the_worst_row_counts():
    e = np.ones((100, 8), np.float32)
    a = e.copy()
    a[7] = -1
    parity = compare({"x": a}, {"x": e})
    assert parity.max_abs == 2.0
    assert parity.min_cosine == pytest.approx(-1)
    assert not Parity(0, 1e-9, 0.9).passes(GATES["fp32"])
    assert not Parity(0, 1e-3, 1.0).passes(GATES["fp32"])
    small = compare({"x": e, "y": 1e-3 * e}, {"x": e, "y": 2e-3 * e})
    assert small.max_rel == pytest.approx(0.5), "each output is measured by its own size"


def test_zero_rows_compare():
    zero = {"x": np.zeros((2, 3), np.float32)}
    assert compare(zero, zero).min_cosine == 1.0
    assert compare({"x": np.full((2, 3), 1e-3, np.float32)}, zero).min_cosine == 0.0


def test_require_names_both_numbers():
    with pytest.raises(
        ParityError, match=r"llm \(engine\).*1\.00e-03 \(at most 5e-05\), cosine 0\.9000000 \(at least 0\.999999\)"
    ):
        require("llm", "engine", Parity(1.0, 1e-3, 0.9), GATES["fp32"])


def test_a_damaged_check_file_is_an_engine_mismatch(tmp_path):
    manifest = built(PROJECTOR, SyntheticSource(PROJECTOR, "test", 1), tmp_path)
    path = tmp_path / manifest.check
    inputs, outputs = load_check(path)
    assert set(inputs) == {"tokens"}
    assert set(outputs) == {"embeds"}
    data = path.read_bytes()
    for bad in (b"", data[:50], data[: len(data) // 2], b"\x80\x04]."):
        path.write_bytes(bad)
        with pytest.raises(EngineMismatchError, match=r"check\.npz: not readable"):
            load_check(path)
    path.unlink()
    with pytest.raises(EngineMismatchError, match=r"check\.npz: not readable"):
        load_check(path)


def test_check_inputs_exercise_the_whole_component():
    """More tiles than one segment and than the 576 bins; every pixel level; tokens of the whole vocabulary's range."""
    slide = check_inputs(LONGNET)
    assert slide["features"].shape == (1100, 32)
    assert len(np.unique(slide["positions"], axis=0)) == 1100
    tiles = check_inputs(VIT)["tiles"]
    assert tiles.shape == (2, 256, 256, 3)
    assert tiles.max() > 240
    assert tiles.min() < 10
    ids = check_inputs(LLAMA)["token_ids"]
    assert ids.min() >= 0
    assert ids.max() < LLAMA.vocab
    assert len(set(ids.tolist())) > 4

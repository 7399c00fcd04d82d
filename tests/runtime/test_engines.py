"""The engine seam on real ONNX Runtime engines: what goes in is checked, what comes out is written in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.engines.ort import PROVIDER, OrtEngine, open_session
from wsi_rt.runtime.engines.registry import TARGETS, backend
from wsi_rt.runtime.errors import EngineMismatchError, InputError, WsiRtError
from wsi_rt.runtime.parity import load_check

CONFIGS = {
    "tile_encoder": ViTConfig(width=32, depth=1, heads=2, mlp_hidden=48),
    "slide_encoder": LongNetConfig(in_width=16, width=32, depth=1, heads=16, ffn=64, norm_width=32, padded=48),
    "projector": ProjectorConfig((48, 32, 24)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """(folder, manifest by component)."""
    root = tmp_path_factory.mktemp("engines")
    parts = {name: Part(c, SyntheticSource(c, "test", 0)) for name, c in CONFIGS.items()}
    return root, {n: build_component(n, p, root, "ort-cpu", "fp32", 1, lambda _: None) for n, p in parts.items()}


@pytest.fixture(params=CONFIGS)
def engine(request, built):
    root, manifests = built
    with backend("ort-cpu").open_engine(root, manifests[request.param], 1) as engine:
        yield engine


@pytest.fixture
def projector(built):
    with backend("ort-cpu").open_engine(built[0], built[1]["projector"], 1) as engine:
        yield engine


@pytest.fixture
def slide_encoder(built):
    with backend("ort-cpu").open_engine(built[0], built[1]["slide_encoder"], 1) as engine:
        yield engine


def check(built, engine):
    return load_check(built[0] / engine.manifest.check)


def refused(engine, inputs, *words: str, outputs=None) -> None:
    """InputError that names the component and every word."""
    with pytest.raises(InputError) as e:
        engine.run(inputs, outputs)
    message = str(e.value)
    assert message.startswith(f"{engine.manifest.name}: ")
    assert [w for w in words if w not in message] == [], message


def test_the_stored_check_comes_out(built, engine):
    inputs, expected = check(built, engine)
    out = engine.run(inputs)
    assert list(out) == [s.name for s in engine.manifest.outputs]
    for name, reference in expected.items():
        assert out[name].dtype == np.float32
        assert np.abs(out[name] - reference).max() <= 5e-5 * np.abs(reference).max()


def test_the_manifest_tells_names_dtypes_and_dims(built):
    specs = {n: [(s.name, s.dtype, s.dims) for s in (*m.inputs, *m.outputs)] for n, m in built[1].items()}
    assert specs == {
        "tile_encoder": [("tiles", "uint8", ("batch", 256, 256, 3)), ("features", "float32", ("batch", 32))],
        "slide_encoder": [
            ("features", "float32", ("tiles", 16)),
            ("positions", "int64", ("tiles", 2)),
            ("tokens", "float32", (576, 48)),
            ("cls", "float32", (32,)),
            ("mean", "float32", (32,)),
        ],
        "projector": [("tokens", "float32", ("tokens", 48)), ("embeds", "float32", ("tokens", 24))],
    }


def test_outputs_are_filled_in_place(built, engine):
    inputs, _ = check(built, engine)
    fresh = engine.run(inputs)
    mine = {name: np.full_like(x, np.nan) for name, x in fresh.items()}
    pointers = {name: x.ctypes.data for name, x in mine.items()}
    out = engine.run(inputs, mine)
    assert out.keys() == mine.keys()
    for name, x in out.items():
        assert x is mine[name]
        assert x.ctypes.data == pointers[name]
        assert np.array_equal(x, fresh[name])


def test_a_view_into_larger_memory_is_filled(projector):
    """What lies around it stays as it was."""
    tokens = np.ones((3, 48), np.float32)
    store = np.full((9, 24), -7, np.float32)
    projector.run({"tokens": tokens}, {"embeds": store[2:5]})
    assert np.array_equal(store[2:5], projector.run({"tokens": tokens})["embeds"])
    assert (store[:2] == -7).all()
    assert (store[5:] == -7).all()


def test_some_outputs_are_enough(built, slide_encoder):
    inputs, _ = check(built, slide_encoder)
    cls = np.full(32, np.nan, np.float32)
    out = slide_encoder.run(inputs, {"cls": cls})
    assert list(out) == ["cls"]
    assert np.array_equal(cls, slide_encoder.run(inputs)["cls"])


def test_inputs_need_not_be_contiguous(projector):
    x = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)
    expected = projector.run({"tokens": np.ascontiguousarray(x.T)})["embeds"]
    assert np.array_equal(projector.run({"tokens": x.T})["embeds"], expected)
    mine = np.empty_like(expected)
    projector.run({"tokens": x.T}, {"embeds": mine})
    assert np.array_equal(mine, expected)


def test_inputs_are_not_changed(built, engine):
    inputs, _ = check(built, engine)
    copies = {name: x.copy() for name, x in inputs.items()}
    engine.run(inputs)
    assert all(np.array_equal(x, copies[name]) for name, x in inputs.items())


def test_wrong_names(projector, slide_encoder):
    x = np.zeros((2, 48), np.float32)
    refused(projector, {}, "given []", "expected ['tokens']")
    refused(projector, {"token": x}, "given ['token']", "expected ['tokens']")
    refused(projector, {"tokens": x, "more": x}, "given ['more', 'tokens']", "expected ['tokens']")
    refused(slide_encoder, {"features": np.zeros((2, 16), np.float32)}, "given ['features']", "'positions'")
    refused(projector, {"tokens": x}, "given ['logits']", "expected ['embeds']", outputs={"logits": x})


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8])
def test_wrong_dtype(projector, dtype):
    given = f"`tokens` is {np.dtype(dtype).name}[2, 48]"
    refused(projector, {"tokens": np.zeros((2, 48), dtype)}, given, "expected float32['tokens', 48]")
    refused(
        projector,
        {"tokens": np.zeros((2, 48), np.float32)},
        f"`embeds` is {np.dtype(dtype).name}[2, 24]",
        "expected float32['tokens', 24]",
        outputs={"embeds": np.zeros((2, 24), dtype)},
    )


@pytest.mark.parametrize("shape", [(2, 47), (2, 48, 1), (48,), (), (48, 2)])
def test_wrong_shape(projector, shape):
    given = f"`tokens` is float32{list(shape)}"
    refused(projector, {"tokens": np.zeros(shape, np.float32)}, given, "expected float32['tokens', 48]")


def test_sizes_outside_the_profile(built, projector):
    low, opt, high = projector.manifest.profile["tokens"]
    assert (low, opt, high) == (1, 576, 4096)
    for n in (0, high + 1):
        words = f"`tokens` is float32[{n}, 48]", f"with tokens between {low} and {high}"
        refused(projector, {"tokens": np.zeros((n, 48), np.float32)}, *words)
    for n in (low, high):
        assert projector.run({"tokens": np.zeros((n, 48), np.float32)})["embeds"].shape == (n, 24)
    with backend("ort-cpu").open_engine(built[0], built[1]["tile_encoder"], 1) as tiles:
        refused(tiles, {"tiles": np.zeros((257, 256, 256, 3), np.uint8)}, "with batch between 1 and 256")
        refused(tiles, {"tiles": np.zeros((1, 224, 224, 3), np.uint8)}, "expected uint8['batch', 256, 256, 3]")
        assert tiles.run({"tiles": np.zeros((1, 256, 256, 3), np.uint8)})["features"].shape == (1, 32)


def test_one_size_per_symbolic_dimension(projector, slide_encoder):
    features, positions = np.zeros((5, 16), np.float32), np.zeros((4, 2), np.int64)
    refused(slide_encoder, {"features": features, "positions": positions}, "`positions` is int64[4, 2]", "tiles = 5")
    tokens = {"tokens": np.zeros((5, 48), np.float32)}
    out = np.zeros((4, 24), np.float32)
    refused(
        projector, tokens, "`embeds` is float32[4, 24]", "tokens = 5 as in the other arrays", outputs={"embeds": out}
    )


def test_outputs_that_cannot_be_filled(projector):
    tokens = {"tokens": np.zeros((5, 48), np.float32)}
    refused(projector, tokens, "`embeds` is not contiguous", outputs={"embeds": np.zeros((24, 5), np.float32).T})
    frozen = np.zeros((5, 24), np.float32)
    frozen.flags.writeable = False
    refused(projector, tokens, "`embeds` is read-only", outputs={"embeds": frozen})
    assert not frozen.any()


def test_a_closed_engine(built):
    engine = backend("ort-cpu").open_engine(built[0], built[1]["projector"], 1)
    with engine as entered:
        assert entered is engine
    engine.close()
    tokens = {"tokens": np.zeros((1, 48), np.float32)}
    for outputs in (None, {"embeds": np.zeros((1, 24), np.float32)}):
        with pytest.raises(WsiRtError, match="projector: this engine is closed"):
            engine.run(tokens, outputs)


def test_unknown_targets_list_the_choices():
    for name in ("abacus", "", "ort-cuda "):
        with pytest.raises(InputError, match=f"target is {name!r}, expected one of: {', '.join(TARGETS)}"):
            backend(name)


def test_a_component_that_was_not_compiled_for_the_target(built):
    m = replace(built[1]["projector"], targets={"abacus": built[1]["projector"].compiled("ort-cpu")})
    for open_it in (backend("ort-cpu").open_engine, backend("ort-cpu").open_decoder):
        with pytest.raises(InputError, match="projector is not compiled for 'ort-cpu', expected one of: abacus"):
            open_it(built[0], m, 1)


def test_every_target_loads_lazily_and_exists():
    """The registry's names resolve."""
    from importlib import import_module

    for entry in TARGETS.values():
        for where in (entry.engine, entry.decoder):
            module, name = where.split(":")
            assert callable(getattr(import_module(module), name).open)
    assert backend("ort-cpu").engine.endswith(OrtEngine.__name__)


def test_the_provider_asked_for_is_the_one_that_runs(built):
    root, manifests = built
    m = manifests["projector"]
    compiled = m.compiled("ort-cpu")
    session = open_session(root / compiled.graphs["model"], root / compiled.weights_dir, 1)
    assert session.get_providers() == [PROVIDER]
    assert session.get_session_options().intra_op_num_threads == 1


def test_a_graph_that_cannot_be_opened(built, tmp_path):
    root, manifests = built
    m = manifests["projector"]
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineMismatchError, match=r"bad\.onnx: onnxruntime .* cannot open it .*; rebuild it"):
        open_session(tmp_path / "bad.onnx", tmp_path, 1)
    with pytest.raises(EngineMismatchError, match=r"cannot open it"):
        open_session(root / m.compiled("ort-cpu").graphs["model"], tmp_path, 1)  # no weights there
    with pytest.raises(EngineMismatchError, match=r"nowhere\.onnx"):
        OrtEngine.open(tmp_path, m, replace(m.compiled("ort-cpu"), graphs={"model": "nowhere.onnx"}), 1)


def test_engines_do_not_care_where_the_process_stands(built, tmp_path, monkeypatch):
    """Weights are found beside the graph, not in the current folder."""
    root, manifests = built
    monkeypatch.chdir(tmp_path)
    assert Path.cwd() != root
    with backend("ort-cpu").open_engine(root, manifests["projector"], 1) as engine:
        engine.run({"tokens": np.zeros((1, 48), np.float32)})

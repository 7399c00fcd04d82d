"""The TensorRT engine on a stand-in for the GPU: sizes, profiles, the order of copies and launches, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LongNetConfig, ProjectorConfig, ViTConfig  # noqa: E402
from wsi_rt.export.parity import check_inputs, reference_outputs  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.runtime import devices  # noqa: E402
from wsi_rt.runtime.engines import tensorrt_api, tensorrt_session  # noqa: E402
from wsi_rt.runtime.engines.tensorrt import TensorRtEngine  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_device import Device, Growing, from_half, to_half  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_sidecar import SCHEMA, read_sidecar, sizes  # noqa: E402
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MachineError, WsiRtError  # noqa: E402
from wsi_rt.runtime.manifest import TensorSpec  # noqa: E402

TARGET = "tensorrt-rtx-sm89"
CONFIGS = {
    "tile_encoder": ViTConfig(width=32, depth=1, heads=2, mlp_hidden=48),
    "slide_encoder": LongNetConfig(in_width=16, width=64, depth=1, heads=4, ffn=64, norm_width=64, padded=96),
    "projector": ProjectorConfig((48, 32, 24)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory, stand_in_engine):
    root = tmp_path_factory.mktemp("engines")
    return root, {name: stand_in_engine(c, root) for name, c in CONFIGS.items()}


@pytest.fixture
def open_engine(built, stand_in):
    root, manifests = built
    opened = []

    def open_one(name):
        opened.append(TensorRtEngine.open(root, manifests[name], manifests[name].compiled(TARGET), 1))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()
    assert stand_in.cuda.held == 0, "everything was freed"


def inputs_of(name):
    found = check_inputs(CONFIGS[name])
    return {n: x[:576] for n, x in found.items()}  # the projector's profile ends there


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_go_through(name, open_engine, stand_in):
    """In fp16, near the fp32 module; once more with other arrays, and into the caller's own memory."""
    engine, inputs = open_engine(name), inputs_of(name)
    assert engine.precision == "fp16"
    expected = reference_outputs(CONFIGS[name], SyntheticSource(CONFIGS[name], "test", 1), inputs).outputs
    for _ in range(2):
        found = engine.run(inputs)
        assert found.keys() == expected.keys()
        for output, e in expected.items():
            assert found[output].dtype == np.float32
            assert np.abs(found[output] - e).max() <= 0.01 * np.abs(e).max()
    mine = {output: np.full_like(e, np.nan) for output, e in expected.items()}
    assert engine.run(inputs, mine).keys() == mine.keys()
    for output, x in mine.items():
        assert np.array_equal(x, found[output])
    assert len(stand_in.launches) == 3


def test_copies_in_then_launch_then_copies_out(open_engine, stand_in):
    engine, inputs = open_engine("slide_encoder"), inputs_of("slide_encoder")
    engine.run(inputs)
    first = [call[0] for call in stand_in.cuda.calls]
    assert [c for c in first if c != "wait"] == ["device", "in", "in", "launch", "out", "out", "out", "out"]
    assert first[-1] == "wait"
    held = stand_in.cuda.held
    engine.run({n: x[:100] for n, x in inputs.items()})
    assert stand_in.cuda.held == held, "a smaller slide takes no more memory"


def test_one_wanted_output_alone_is_copied(open_engine, stand_in):
    """The check of its range comes with it."""
    engine, inputs = open_engine("slide_encoder"), inputs_of("slide_encoder")
    tokens = np.empty((576, 96), np.float32)
    assert list(engine.run(inputs, {"tokens": tokens})) == ["tokens"]
    assert [c for c in stand_in.cuda.calls if c[0] == "out"] == [("out", tokens.nbytes), ("out", 4)]


def test_sums_out_of_range_are_refused(built, stand_in):
    """An engine whose headroom is not enough does not answer, and says which precision would."""
    root, manifests = built
    manifest = manifests["slide_encoder"]
    with TensorRtEngine.open(root, manifest, manifest.compiled(TARGET), 1) as engine:
        inputs = inputs_of("slide_encoder")
        engine._session.sidecar = replace(engine._session.sidecar, least={"attention_headroom": 1e9})
        with pytest.raises(
            WsiRtError, match=r"leave the range of fp16 .* build it with --precision slide_encoder=bf16"
        ):
            engine.run(inputs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": (577, 48)}, r"tokens is 577, expected 1 to 576 of this engine"),
        ({"tokens": (5, 47)}, r"expected float32\['tokens', 48\]"),
    ],
)
def test_sizes_beyond_the_profile_are_refused(change, said, open_engine, stand_in):
    engine = open_engine("projector")
    with pytest.raises(InputError, match=said):
        engine.run({n: np.zeros(shape, np.float32) for n, shape in change.items()})
    assert stand_in.launches == []


def test_read_only_memory_is_refused(open_engine):
    out = np.empty((5, 24), np.float32)
    out.flags.writeable = False
    with pytest.raises(InputError, match="`embeds` is read-only, expected memory to fill"):
        open_engine("projector").run({"tokens": np.zeros((5, 48), np.float32)}, {"embeds": out})


@pytest.mark.parametrize(
    ("name", "said"),
    [("context", "an execution context"), ("shape", r"shape \[5, 48\] of `tokens`"), ("execute", "the run")],
)
def test_what_tensorrt_refuses_is_one_line(name, said, open_engine, stand_in):
    engine = open_engine("projector")
    stand_in.refuse = name
    with pytest.raises(WsiRtError, match=rf"projector: tensorrt_rtx refuses {said} \(stand-in refuses {name}\)") as e:
        engine.run({"tokens": np.zeros((5, 48), np.float32)})
    assert "\n" not in str(e.value)


def test_closed_is_closed(open_engine):
    engine = open_engine("projector")
    engine.close()
    engine.close()
    with pytest.raises(WsiRtError, match="closed"):
        engine.run({"tokens": np.zeros((5, 48), np.float32)})


def test_full_gpu_memory_is_told(open_engine, stand_in):
    engine = open_engine("projector")
    stand_in.cuda.limit = stand_in.cuda.held + 1000
    with pytest.raises(MachineError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation; free GPU memory"):
        engine.run({"tokens": np.zeros((5, 48), np.float32)})


# --- opening


def opened(built, name="projector"):
    root, manifests = built
    return TensorRtEngine.open(root, manifests[name], manifests[name].compiled(TARGET), 1)


def test_another_architecture_names_the_rebuild(built, stand_in, monkeypatch):
    monkeypatch.setattr(tensorrt_session, "require_gpu", lambda target: devices.Gpu(0, "RTX 5090", 120, 1 << 34))
    with pytest.raises(
        EngineMismatchError,
        match=r"built for sm_89, this GPU \(RTX 5090\) is sm_120; rebuild it .*--target tensorrt-rtx --sm 120 "
        r"--precision fp16",
    ) as e:
        opened(built)
    assert e.value.exit_code == 4


def test_another_version_names_both_ways_out(built, stand_in):
    stand_in.__version__ = "1.8.0"
    with pytest.raises(
        EngineMismatchError, match=r"installed is 1\.8\.0; pip install tensorrt-rtx-cu12==1\.7\.1.*wsi-rt "
    ):
        opened(built)


def test_an_engine_that_does_not_open(built, stand_in):
    stand_in.refuse = "deserialize"
    with pytest.raises(EngineMismatchError, match=r"cannot open it \(stand-in refuses deserialize\); rebuild it"):
        opened(built)


def test_without_a_gpu(built, stand_in, monkeypatch):
    monkeypatch.setattr(tensorrt_session, "require_gpu", devices.require_gpu)
    monkeypatch.setattr(devices, "gpus", lambda: ())
    monkeypatch.setattr(devices, "found", lambda: devices.Survey(problem="no NVIDIA driver here"))
    with pytest.raises(MachineError, match=r"tensorrt-rtx-sm89 needs an NVIDIA GPU: no NVIDIA driver") as e:
        opened(built)
    assert e.value.exit_code == 3


@pytest.mark.parametrize(
    ("module", "said"),
    [("tensorrt_rtx", "pip install tensorrt-rtx-cu12"), ("cuda.bindings.runtime", "pip install cuda-bindings")],
)
def test_a_missing_module_names_its_package(built, stand_in, monkeypatch, module, said):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MachineError, match=said):
        opened(built)


def test_an_old_module_is_refused(stand_in):
    del stand_in.IStreamWriter
    with pytest.raises(MachineError, match="has no IStreamWriter, expected a newer one: pip install -U"):
        tensorrt_api.load(tensorrt_api.FAMILIES["tensorrt-rtx"])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-sm89", "tensorrt-rtx", "tensorrt-rtx-sm120"])
def test_families(target):
    assert tensorrt_api.family(target).name == ("tensorrt-rtx" if "rtx" in target else "tensorrt")


def test_no_family():
    with pytest.raises(InputError, match="expected one of: tensorrt, tensorrt-rtx"):
        tensorrt_api.family("ort-cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "not readable"),
        ("{", "not readable"),
        (json.dumps({"schema": SCHEMA + 1}), f"schema {SCHEMA + 1}, this wsi-rt reads {SCHEMA}"),
        (json.dumps({"schema": SCHEMA}), "not readable"),
    ],
)
def test_a_sidecar_that_does_not_fit(tmp_path, text, said):
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(EngineMismatchError, match=said):
        read_sidecar(tmp_path / "model.engine")


def test_the_runtime_cache_is_kept_for_the_next_process(built, stand_in, own_cache):
    for times in (1, 2):
        with opened(built) as engine:
            engine.run({"tokens": np.zeros((5, 48), np.float32)})
        (cache,) = own_cache.rglob("*.runtime-cache")
        assert cache.read_bytes() == b"kernels;" * times
    with opened(built):
        pass
    assert cache.read_bytes() == b"kernels;" * 2, "nothing was compiled"


# --- parts


def test_sizes_of_several_tensors():
    specs = (TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "float32", ("n", "m")))
    assert sizes(specs, {"a": (4, 3), "b": (4, 7)}, "x") == {"n": 4, "m": 7}
    with pytest.raises(InputError, match=r"`b` is \[5, 7\], expected \['n', 'm'\] with n = 4"):
        sizes(specs, {"a": (4, 3), "b": (5, 7)}, "x")
    with pytest.raises(InputError, match=r"`a` is \[4, 2\], expected \['n', 3\]"):
        sizes(specs, {"a": (4, 2)}, "x")


def test_a_buffer_grows_and_is_freed(stand_in):
    device = Device()
    buffers = Growing(device)
    small = buffers.take("x", 100)
    assert buffers.take("x", 90) == small
    assert buffers.take("x", 1000) != small
    assert stand_in.cuda.held == 1000
    buffers.close()
    assert stand_in.cuda.held == 0


def test_half_types_round_as_torch_does():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(2000) * 10.0 ** rng.uniform(-6, 4, 2000)).astype(np.float32)
    x[:6] = [0.0, -0.0, np.inf, -np.inf, 1.00390625, 1.01171875]  # the last two are ties in bfloat16
    for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        expected = torch.from_numpy(x).to(kind).float().numpy()
        with np.errstate(over="ignore"):
            assert np.array_equal(from_half(to_half(x, name), name), expected)
        assert np.isnan(from_half(to_half(np.array([np.nan], np.float32), name), name)).all()

"""`ort-cuda` without a GPU: the CPU provider stands in for it through the same code, and what is missing is told.

Nothing here says how onnxruntime's CUDA provider behaves; it has not run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LongNetConfig, ProjectorConfig, ViTConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime import devices
from wsi_rt.runtime.devices import Gpu, Survey
from wsi_rt.runtime.engines import ort_cuda
from wsi_rt.runtime.engines.ort_cuda import CUDA, TENSORRT, OrtCudaEngine, gpu_provider, onnxruntime_problem
from wsi_rt.runtime.engines.ort_provider import Provider, on_cpu
from wsi_rt.runtime.errors import EngineMismatchError, InputError, MachineError, WsiRtError
from wsi_rt.runtime.parity import GATES, check_component, check_source, compare, load_check

CONFIGS = {
    "tile_encoder": ViTConfig(width=32, depth=1, heads=2, mlp_hidden=48),
    "slide_encoder": LongNetConfig(in_width=16, width=32, depth=1, heads=16, ffn=64, norm_width=32, padded=48),
    "projector": ProjectorConfig((48, 32, 24)),
}
STAND_IN_GPU = Gpu(0, "stand-in", 89, 1 << 30)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """(folder, manifest by component)."""
    root = tmp_path_factory.mktemp("engines")
    parts = {name: Part(c, SyntheticSource(c, "test", 0)) for name, c in CONFIGS.items()}
    return root, {n: build_component(n, p, root, "ort-cuda", "fp32", 1, lambda _: None) for n, p in parts.items()}


@pytest.fixture(params=CONFIGS)
def engine(request, built):
    """On the stand-in."""
    manifest = built[1][request.param]
    with OrtCudaEngine.on(on_cpu(1), built[0], manifest, manifest.compiled("ort-cuda")) as engine:
        yield engine


@pytest.fixture
def gpu(monkeypatch):
    """This machine has a GPU, as far as the driver is asked."""
    monkeypatch.setattr(devices, "found", lambda: Survey((STAND_IN_GPU,), "580.65.06", (13, 1)))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "found", lambda: Survey(problem="no NVIDIA driver here"))


def test_an_engine_that_has_not_run_is_told_so(built):
    """On a machine without a GPU; what was measured is the portable graph, which is what would run."""
    if devices.gpus():
        pytest.skip("this machine has a GPU: its engines run")
    for manifest in built[1].values():
        compiled = manifest.compiled("ort-cuda")
        assert compiled.parity["engine"] == "not run: no GPU"
        assert compiled.parity["source"] == compiled.measured() == manifest.portable_parity
        assert compiled.graphs == compiled.source == manifest.portable
        assert check_source(built[0], "ort-cuda", manifest, 1).max_rel <= 5e-5


def test_the_stored_check_comes_out(built, engine):
    inputs, expected = load_check(built[0] / engine.manifest.check)
    out = engine.run(inputs)
    assert list(out) == [s.name for s in engine.manifest.outputs]
    assert compare(out, expected).max_rel <= 5e-5
    mine = {name: np.full_like(x, np.nan) for name, x in out.items()}
    filled = engine.run(inputs, mine)
    assert all(filled[name] is mine[name] and np.array_equal(mine[name], x) for name, x in out.items())


def test_outputs_stay_on_the_device_where_asked(built):
    """From one run into the next without an array in between; what is not asked for is not given."""
    root, manifests = built
    m = manifests["slide_encoder"]
    with OrtCudaEngine.on(on_cpu(1), root, m, m.compiled("ort-cuda")) as engine:
        inputs, _ = load_check(root / m.check)
        put = {name: on_cpu(1).put(x) for name, x in inputs.items()}
        found = engine.run_device(put, ["tokens"])
        assert list(found) == ["tokens"]
        assert found["tokens"].device_name() == "cpu"
        assert np.array_equal(found["tokens"].numpy(), engine.run(inputs)["tokens"])
    projector = manifests["projector"]
    with OrtCudaEngine.on(on_cpu(1), root, projector, projector.compiled("ort-cuda")) as engine:
        embeds = engine.run_device({"tokens": found["tokens"]}, ["embeds"])["embeds"]
        assert np.array_equal(embeds.numpy(), engine.run({"tokens": found["tokens"].numpy()})["embeds"])


def test_outputs_that_cannot_be_filled_and_a_closed_engine(built):
    root, m = built[0], built[1]["projector"]
    engine = OrtCudaEngine.on(on_cpu(1), root, m, m.compiled("ort-cuda"))
    tokens = {"tokens": np.zeros((5, 48), np.float32)}
    with pytest.raises(InputError, match="`embeds` is not contiguous"):
        engine.run(tokens, {"embeds": np.zeros((24, 5), np.float32).T})
    engine.close()
    with pytest.raises(WsiRtError, match="projector: this engine is closed"):
        engine.run(tokens)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_an_error_not_a_cpu_run(built):
    """Real onnxruntime, which has no CUDA here and would run on the CPU with no more than a warning."""
    import onnxruntime as ort

    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    m = built[1]["projector"]
    provider = Provider((CUDA,), ({},), "cuda", 0, 1)
    with pytest.raises(MachineError, match=rf"would run it on \['CPUExecutionProvider'\] instead of {CUDA}") as e:
        OrtCudaEngine.on(provider, built[0], m, m.compiled("ort-cuda"))
    assert e.value.exit_code == 3


def placed(**nodes):
    """A stand-in session that put these operators on these providers."""
    parts = [
        SimpleNamespace(ep_name=ep, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=o, name=f"/{o}") for o in ops])
        for ep, ops in nodes.items()
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_a_node_on_the_cpu_is_refused_unless_it_computes_shapes():
    provider = Provider((CUDA,), ({},), "cuda", 0, 1)
    shapes = {"CPUExecutionProvider": ["Shape", "Gather", "Concat"], CUDA: ["MatMul", "Softmax"]}
    provider._require_placement(Path("m.onnx"), placed(**shapes))
    stray = {**shapes, "CPUExecutionProvider": ["Shape", "MatMul", "Gelu"]}
    with pytest.raises(EngineMismatchError, match=r"m\.onnx: MatMul \(/MatMul\) and 1 more would run on the CPU"):
        provider._require_placement(Path("m.onnx"), placed(**stray))


def test_a_graph_that_cannot_be_opened(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineMismatchError, match=r"bad\.onnx: onnxruntime .* cannot open it"):
        on_cpu(1).open(tmp_path / "bad.onnx", tmp_path)


def test_opening_needs_a_gpu(built, no_gpu):
    m = built[1]["projector"]
    with pytest.raises(MachineError, match=r"^ort-cuda needs an NVIDIA GPU: no NVIDIA driver here"):
        OrtCudaEngine.open(built[0], m, m.compiled("ort-cuda"), 1)


def test_opening_needs_the_gpu_build_of_onnxruntime(built, gpu):
    import onnxruntime as ort

    if CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    m = built[1]["projector"]
    with pytest.raises(MachineError, match=rf"ort-cuda: onnxruntime .* is a build without {CUDA}: pip uninstall"):
        OrtCudaEngine.open(built[0], m, m.compiled("ort-cuda"), 1)


@pytest.fixture
def onnxruntime_gpu(monkeypatch, gpu):
    """onnxruntime_gpu(said): a stand-in for onnxruntime-gpu of CUDA 13, whose preload_dlls prints `said`."""

    def install(said: str = "", cuda: str = "13.0") -> None:
        module = SimpleNamespace(
            __version__="1.32.0",
            cuda_version=cuda,
            get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
            preload_dlls=lambda: sys.stdout.write(said),
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        versions = {"onnxruntime-gpu": "1.32.0"}
        monkeypatch.setattr(ort_cuda, "installed_version", versions.get)

    return install


def test_what_keeps_onnxruntime_from_cuda(onnxruntime_gpu, monkeypatch, capsys):
    onnxruntime_gpu()
    assert onnxruntime_problem() is None
    onnxruntime_gpu("Failed to load libcudnn.so.9: cannot open shared object file\nPlease follow https://...\n")
    assert "need" in (told := str(onnxruntime_problem()))
    assert "(libcudnn.so.9: cannot open shared object file): pip install 'onnxruntime-gpu[cuda,cudnn]==1.32.0'" in told
    assert capsys.readouterr().out == "", "what onnxruntime prints is not this command's output"
    onnxruntime_gpu(cuda="14.0")
    assert "is built for CUDA 14.0, the driver supports 13.1: install a newer driver" in str(onnxruntime_problem())
    monkeypatch.setattr(ort_cuda, "installed_version", lambda name: "1.32.0")
    assert "are both installed and overwrite each other: pip uninstall -y" in str(onnxruntime_problem())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(ort_cuda, "installed_version", lambda name: None)
    assert "pip install onnxruntime-gpu" in str(onnxruntime_problem())


def test_the_provider_that_is_asked_for(built, onnxruntime_gpu, own_cache, monkeypatch):
    m = replace(built[1]["projector"], digest="d" * 64)
    compiled = m.compiled("ort-cuda")
    onnxruntime_gpu()
    assert gpu_provider(m, compiled, 2) == Provider((CUDA,), ({"device_id": "0", "use_tf32": "0"},), "cuda", 0, 2)
    monkeypatch.setenv("WSI_RT_ORT_PROVIDER", "tensorrt")
    found = gpu_provider(m, compiled, 2)
    assert (found.names, found.device) == ((TENSORRT, CUDA), "cuda")
    folder = Path(found.options[0]["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.is_relative_to(own_cache)
    monkeypatch.setenv("WSI_RT_ORT_PROVIDER", "cpu")
    with pytest.raises(InputError, match="WSI_RT_ORT_PROVIDER is 'cpu', expected one of: cuda, tensorrt"):
        gpu_provider(m, compiled, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not devices.gpus(), reason="no NVIDIA GPU here")
def test_on_a_gpu(built):
    """The real provider: the stored checks, within the fp32 gate."""
    root, manifests = built
    for name, manifest in manifests.items():
        found = check_component(root, "ort-cuda", manifest, 1)
        assert found.passes(GATES["fp32"]), name


def test_compiled_engines_are_kept_for_the_same_files_gpu_and_versions(built, own_cache, gpu, monkeypatch):
    m = replace(built[1]["projector"], digest="d" * 64)

    def folder(manifest=m, gpu=STAND_IN_GPU) -> str:
        return ort_cuda.tensorrt_options(manifest, m.compiled("ort-cuda"), gpu)["trt_engine_cache_path"]

    first = folder()
    assert folder() == first
    others = {folder(replace(m, digest="e" * 64)), folder(gpu=replace(STAND_IN_GPU, sm=90))}
    monkeypatch.setattr(ort_cuda, "installed_version", lambda name: "9.9")
    others.add(folder())
    assert len({first, *others}) == 4

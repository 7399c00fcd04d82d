"""The `tensorrt` path up to its libraries, which cannot be installed without a GPU: the graph with the plugin's calls,
and the builder on a stand-in for the module, in which everything that is called has to exist."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("torch", reason="the export extra is not installed")

from onnx import TensorProto  # noqa: E402

from wsi_rt.export import tensorrt as lowering  # noqa: E402
from wsi_rt.export.arch import LongNetConfig  # noqa: E402
from wsi_rt.export.graphs.half import HALVES  # noqa: E402
from wsi_rt.export.plugins.lowering import PROGRAMS, PluginCall  # noqa: E402
from wsi_rt.export.tensorrt.build import Options, build_engine  # noqa: E402
from wsi_rt.export.tensorrt.sources import write_sources  # noqa: E402
from wsi_rt.kernels.dilated_attention.programs import branch_table, program_table  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.runtime.engines import tensorrt_api  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_sidecar import read_sidecar  # noqa: E402
from wsi_rt.runtime.errors import MachineError  # noqa: E402
from wsi_rt.runtime.manifest import TensorSpec  # noqa: E402

FAMILY = tensorrt_api.FAMILIES["tensorrt"]
CONFIG = LongNetConfig(in_width=32, width=64, depth=2, heads=4, ffn=128, norm_width=64, padded=96)


@pytest.fixture
def sources(tmp_path, open_small):
    return write_sources(open_small(CONFIG, tmp_path / "slide_encoder"), FAMILY, HALVES["fp16"], 90)


def load(path):
    return onnx.load(str(path), load_external_data=False)


def test_every_layer_calls_the_plugin(sources):
    model = load(sources.compiled)
    calls = [n for n in model.graph.node if n.op_type == "dilated_attention"]
    assert len(calls) == CONFIG.depth
    assert not model.functions
    assert {n.op_type for n in model.graph.node if n.domain} == {"dilated_attention"}
    told = {a.name: onnx.helper.get_attribute_value(a) for a in calls[0].attribute}
    assert told == {
        "plugin_namespace": b"wsi_rt",
        "plugin_version": b"1",
        "sm": 90,
        "heads": 4,
        "width": 16,
        "block_m": sources.plugin.plugin.block_m,
        "row_step": 16,
        "n_branches": 5,
        "precision": b"ieee",
    }
    inputs = {i.name: i for i in model.graph.input}
    assert inputs[PROGRAMS].type.tensor_type.elem_type == TensorProto.INT32
    stored = {t.name: t for t in model.graph.initializer}
    branches = onnx.numpy_helper.to_array(stored[calls[0].input[2]])
    assert np.array_equal(branches, branch_table(CONFIG.segment_lengths, CONFIG.dilated_ratios))
    made = {o: n for n in model.graph.node for o in n.output}
    qkv = made[calls[0].input[0]]
    assert qkv.op_type == "Concat"
    assert [made[x].op_type for x in qkv.input] == ["Unsqueeze"] * 3, "half precision goes in, no cast between"


def test_the_runnable_form_has_the_same_weights(sources):
    compiled, runnable = load(sources.compiled), load(sources.runnable)
    assert sources.runnable != sources.compiled
    assert "Attention" in {n.op_type for n in runnable.graph.node}
    external = [
        {t.name: [e.value for e in t.external_data] for t in m.graph.initializer if t.external_data}
        for m in (compiled, runnable)
    ]
    assert external[0] == external[1]


def test_the_profile_of_the_table_is_that_of_the_slides():
    call = PluginCall.of(CONFIG, "fp16", 90)
    block = call.table()["block_m"]
    lists = CONFIG.segment_lengths, CONFIG.dilated_ratios, CONFIG.heads, block
    assert call.programs((1, 500)) == tuple(len(program_table((n + 1,), *lists)) for n in (1, 500))


def test_an_architecture_without_a_kernel_is_refused():
    with pytest.raises(KernelInputError, match="architecture 75"):
        PluginCall.of(CONFIG, "fp16", 75)


# --- the builder on a stand-in


class StandIn(ModuleType):
    """In place of `tensorrt`: notes what the builder is told. Not a mock: a name that TensorRT lacks is an error."""

    def __init__(self):
        super().__init__("tensorrt")
        self.__version__ = "10.16.0"
        self.told = []
        self.refused = []  # ONNX nodes that the parser refuses: (name, operator)
        self.builds = True
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.IStreamWriter = type("IStreamWriter", (), {"__init__": lambda self: None})
        self.INetworkDefinition = SimpleNamespace(add_attention=1, add_kv_cache_update=1)
        self.NetworkDefinitionCreationFlag = SimpleNamespace(
            STRONGLY_TYPED=1, PREFER_JIT_PYTHON_PLUGINS=2, PREFER_AOT_PYTHON_PLUGINS=3
        )
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.HardwareCompatibilityLevel = SimpleNamespace(SAME_COMPUTE_CAPABILITY="same sm")
        self.BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="versions")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.attention = SimpleNamespace(decomposable=True)
        self.config = None

    def Builder(self, log):  # noqa: N802
        self.log = log
        profile = SimpleNamespace(set_shape=lambda *a: self.told.append(("shape", *a)))
        return SimpleNamespace(
            create_network=self.network,
            create_builder_config=self.new_config,
            create_optimization_profile=lambda: profile,
            build_serialized_network_to_stream=self.build,
        )

    def network(self, flags):
        self.told.append(("network", flags))
        layers = [SimpleNamespace(), SimpleNamespace(attention=self.attention)]
        return SimpleNamespace(num_layers=2, get_layer=lambda i: layers[i])

    def OnnxParser(self, network, log):  # noqa: N802
        errors = [
            SimpleNamespace(node_name=lambda n=n: n, node_operator=lambda k=k: k, desc=lambda: "not\nhere")
            for n, k in self.refused
        ]
        return SimpleNamespace(
            parse_from_file=lambda path: not self.refused, num_errors=len(errors), get_error=lambda i: errors[i]
        )

    def new_config(self):
        def set_timing_cache(cache, ignore):
            self.told.append(("timing cache", cache.data, ignore))
            return cache.data != b"of another GPU"

        def cache(data):
            return SimpleNamespace(data=data, serialize=lambda: data + b"timed;")

        self.config = SimpleNamespace(
            clear_flag=lambda f: self.told.append(("clear", f)),
            set_flag=lambda f: self.told.append(("set", f)),
            set_memory_pool_limit=lambda pool, n: self.told.append((pool, n)),
            add_optimization_profile=lambda p: self.told.append(("profile",)),
            create_timing_cache=cache,
            set_timing_cache=set_timing_cache,
        )
        return self.config

    def build(self, network, config, writer):
        self.log.log("Severity.INFO", "Total Activation Memory: 1234 bytes")
        self.log.log("Severity.INFO", "Total Weights Memory: 567 bytes")
        self.log.log(
            "Severity.VERBOSE", "Layers:\nName: a, LayerType: gemm, X\nName: _gemm_mha_v2_b, LayerType: kgen, Y"
        )
        if not self.builds:
            self.log.log("Severity.ERROR", "no kernel\nfor this")
            return False
        writer.write(b"engine")
        return True


@pytest.fixture
def module():
    tensorrt_api.logger.cache_clear()
    yield StandIn()
    tensorrt_api.logger.cache_clear()


def build(module, folder, **options):
    inputs = (TensorSpec("x", "float32", ("n", 3)),)
    return build_engine(
        module, FAMILY, folder / "g.onnx", inputs, Options((90,), ({"n": (1, 2, 9)},), **options), folder / "g.engine"
    )


def test_what_tensorrt_is_told(module, tmp_path):
    built = build(module, tmp_path, workspace_bytes=99, version_compatible=True)
    assert (built.memory_bytes, built.weights_bytes, built.layers) == (1234, 567, {"fused attention": 1, "gemm": 1})
    assert (tmp_path / "g.engine").read_bytes() == b"engine"
    assert module.told == [
        ("network", (1 << 1) + (1 << 3)),
        ("clear", "tf32"),
        ("set", "versions"),
        ("workspace", 99),
        ("shape", "x", (1, 3), (2, 3), (9, 3)),
        ("profile",),
    ]
    assert module.config.hardware_compatibility_level == "same sm"
    assert module.attention.decomposable is False


def test_the_timing_cache_is_read_and_written_back(module, tmp_path):
    cache = tmp_path / "timing"
    for times in (1, 2):
        build(module, tmp_path, timing_cache=cache)
        assert cache.read_bytes() == b"timed;" * times
    cache.write_bytes(b"of another GPU")
    build(module, tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"timed;"
    assert all(ignore is False for what, *rest in module.told if what == "timing cache" for ignore in rest[1:])


def test_refusals_are_one_line(module, tmp_path):
    module.refused = [("/layers.0/x", "Odd")]
    with pytest.raises(MachineError, match=r"10\.16\.0 refuses node /layers\.0/x \(Odd\): not here; see docs/"):
        build(module, tmp_path)
    module.refused, module.builds = [], False
    with pytest.raises(MachineError, match=r"cannot build it for sm_90: no kernel for this"):
        build(module, tmp_path)


def test_a_slide_encoder_for_the_gpu_of_the_machine(module, tmp_path, open_small, monkeypatch, own_cache):
    """The whole `tensorrt` path but for the libraries: plugins are registered first, the sidecar holds their table."""
    registered = []
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", module)
    monkeypatch.setattr(lowering, "register_plugins", lambda: registered.append(len(module.told)))
    monkeypatch.setattr(lowering, "require_gpu", lambda target: SimpleNamespace(sm=90))
    component = open_small(CONFIG, tmp_path / "slide_encoder")
    folder = tmp_path / "slide_encoder" / "tensorrt-sm90"
    folder.mkdir()
    lowered = lowering.lower(component, folder, 1, "tensorrt", (), "fp16")
    assert registered == [0]
    sidecar = read_sidecar(lowered.graphs["model"])
    assert (sidecar.target, sidecar.sms, sidecar.version) == ("tensorrt", (90,), "10.16.0")
    assert sidecar.tables[PROGRAMS] == PluginCall.of(CONFIG, "fp16", 90).table()
    assert sidecar.profiles[0][PROGRAMS] == PluginCall.of(CONFIG, "fp16", 90).programs((1, 8192, 65536))
    assert sidecar.least == {}, "the plugin needs no sums beside"
    assert json.loads((folder / "model.json").read_text())["toolchain"]["tensorrt"] == "10.16.0"
    assert list(own_cache.rglob("timing-sm90-10.16.0.cache"))
    assert lowered.requires["sm"] == "90"

"""What every portable graph promises: clean, deterministic, standard operators, named dimensions, no giant tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig, LongNetConfig, ProjectorConfig, ViTConfig  # noqa: E402
from wsi_rt.export.graphs import llama, llama_layers  # noqa: E402
from wsi_rt.export.graphs.builder import OUR_DOMAIN, WeightFile, check_model  # noqa: E402
from wsi_rt.export.graphs.layers import Style  # noqa: E402
from wsi_rt.export.graphs.linears import PlainLinears  # noqa: E402
from wsi_rt.export.graphs.write import Component, write_graphs  # noqa: E402
from wsi_rt.export.lowering import lower_ort_cpu  # noqa: E402
from wsi_rt.export.parity import check_inputs, reference_outputs  # noqa: E402
from wsi_rt.export.portable import run_portable  # noqa: E402
from wsi_rt.export.sources.presets import NANO  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.export.sources.weights import WeightSource  # noqa: E402
from wsi_rt.runtime.errors import MachineError, WsiRtError  # noqa: E402

VIT = ViTConfig(width=32, depth=2, heads=2, mlp_hidden=48)
LONGNET = LongNetConfig(in_width=32, width=64, depth=2, heads=16, ffn=128, norm_width=64, padded=96)
LLAMA = LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=4, head_width=8, ffn=64, vocab=96, context=64)
CONFIGS = {
    "vit-plain": VIT,
    "vit-dinov2-giant": replace(VIT, mlp="swiglu_packed", act="silu", layer_scale=True),
    "vit-swiglu": replace(VIT, mlp="swiglu", act="silu", qkv_bias=False, proj_bias=False),
    "vit-registers": replace(VIT, reg_tokens=4, no_embed_class=True, layer_scale=True, patch_px=14),
    "vit-clip": replace(VIT, pre_norm=True, patch_bias=False, act="quick_gelu"),
    "vit-gap": replace(VIT, class_token=False, pool="avg", fc_norm=True, act="gelu_tanh", image_px=256),
    "vit-avg-qknorm": replace(VIT, qk_norm=True, pool="avg", act="relu"),
    "longnet": LONGNET,
    "longnet-wide-norm": replace(LONGNET, norm_width=96),
    "longnet-odd-heads": replace(LONGNET, width=60, heads=5, norm_width=60, dilated_ratios=(1, 2, 4, 8, 16)),
    "projector-mlp2x": ProjectorConfig((96, 48, 32)),
    "projector-mlp3x": ProjectorConfig((96, 48, 48, 32)),
    "projector-linear": ProjectorConfig((96, 32)),
    "projector-identity": ProjectorConfig((32,)),
    "llama-mha": LLAMA,
    "llama-gqa": replace(LLAMA, kv_heads=2),
    "llama-mqa-tied": replace(LLAMA, kv_heads=1, tied_embeddings=True, head_width=16),
}
SYMBOLS = {
    "tile_encoder": {"batch"},
    "slide_encoder": {"tiles"},
    "projector": {"tokens"},
    "llm": {"batch", "tokens", "past", "total"},
}


def build(config, folder: Path, source: WeightSource | None = None) -> dict[str, Path]:
    """The portable graphs of a component, from synthetic weights unless others are given."""
    folder.mkdir(parents=True)
    source = source or SyntheticSource(config, "test", 1)
    return write_graphs(Component(config, source, WeightFile(folder / "weights.data"), lambda _: None), folder, Style())


@pytest.fixture(scope="module", params=CONFIGS)
def built(request, tmp_path_factory: pytest.TempPathFactory):
    """(config, graphs, the same built once more)."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("graphs")
    return config, build(config, folder / "a"), build(config, folder / "b")


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


def bodies(model: onnx.ModelProto) -> Iterator[tuple[str, list[onnx.NodeProto]]]:
    yield "graph", list(model.graph.node)
    for function in model.functions:
        yield function.name, list(function.node)


def test_checker_and_strict_inference_are_clean(built):
    for path in built[1].values():
        check_model(path)


def test_inference_reaches_every_value(built):
    """No tensor of the main graph is left without a type and a rank."""
    for path in built[1].values():
        inferred = onnx.shape_inference.infer_shapes(load(path), check_type=True, strict_mode=True, data_prop=True)
        known = {
            v.name for v in (*inferred.graph.value_info, *inferred.graph.output) if v.type.tensor_type.HasField("shape")
        }
        assert {o for n in inferred.graph.node for o in n.output} <= known


def test_checker_would_complain(tmp_path):
    """The check is not a formality: a broken graph does not pass it."""
    path = build(CONFIGS["projector-linear"], tmp_path / "a")["model"]
    model = load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 95
    path.write_bytes(model.SerializeToString())
    with pytest.raises(onnx.shape_inference.InferenceError):
        check_model(path)


def test_dimensions_are_sizes_or_names(built):
    config, graphs, _ = built
    symbols = set()
    for path in graphs.values():
        graph = load(path).graph
        for value in (*graph.input, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                assert dim.dim_value > 0 or dim.dim_param, f"{value.name} has an anonymous dimension"
                symbols |= {dim.dim_param} - {""}
    assert symbols == SYMBOLS[config.component]


def test_only_standard_operators_or_functions_with_bodies(built):
    for path in built[1].values():
        model = load(path)
        functions = {f.name for f in model.functions}
        assert all(f.domain == OUR_DOMAIN and f.node for f in model.functions)
        called = set()
        for _, nodes in bodies(model):
            for node in nodes:
                assert node.domain in {"", OUR_DOMAIN}, f"{node.name}: {node.domain}::{node.op_type}"
                if node.domain == OUR_DOMAIN:
                    called.add(node.op_type)
                else:
                    assert onnx.defs.has(node.op_type, max_inclusive_version=20, domain="")
        assert called == functions
        assert {o.domain for o in model.opset_import} <= {"", OUR_DOMAIN}


def test_slide_encoder_keeps_its_operators_callable(tmp_path):
    """A target with kernels of its own finds whole operators with their settings, not thirty nodes."""
    model = load(build(LONGNET, tmp_path / "a")["model"])
    calls = [n for n in model.graph.node if n.op_type == "DilatedAttention"]
    assert len(calls) == LONGNET.depth
    attributes = {a.name: list(a.ints) for a in calls[0].attribute}
    assert attributes["segment_lengths"] == list(LONGNET.segment_lengths)
    assert attributes["dilated_ratios"] == list(LONGNET.dilated_ratios)
    assert [n.op_type for n in model.graph.node].count("PoolNormPad") == 1


def test_names_are_unique_and_equal_between_builds(built):
    _, first, second = built
    for role, path in first.items():
        for (body, nodes), (_, again) in zip(bodies(load(path)), bodies(load(second[role])), strict=True):
            names = [n.name for n in nodes]
            assert all(names), body
            assert len(set(names)) == len(names), body
            assert names == [n.name for n in again], body


def test_builds_are_equal_byte_for_byte(built):
    _, first, second = built
    for role, path in first.items():
        assert path.read_bytes() == second[role].read_bytes()
        assert (path.parent / "weights.data").read_bytes() == (second[role].parent / "weights.data").read_bytes()


def test_node_names_say_where_they_are(tmp_path):
    names = {n.name for n in load(build(LLAMA, tmp_path / "a")["decoder"]).graph.node}
    assert {"/layers.0/attn/q_proj/MatMul", "/layers.1/mlp/down_proj/MatMul", "/head/lm_head/MatMul"} <= names


def test_external_weights_are_aligned_and_apart(built):
    for path in built[1].values():
        size = (path.parent / "weights.data").stat().st_size
        spans = []
        for tensor in load(path).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.raw_data) <= 4096, f"{tensor.name} stands inside the graph"
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entry["offset"]), int(entry["length"])
            assert entry["location"] == "weights.data"
            assert offset % 4096 == 0
            assert length == 4 * np.prod(tensor.dims)
            spans.append((offset, offset + length))
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert not spans or spans[-1][1] <= size


def test_every_weight_of_the_checkpoint_is_in_the_graphs(built):
    """Each tensor once, under its published name (".T": stored transposed), and nothing unaccounted for; tied
    embeddings are stored as the output layer, too."""
    config, graphs, _ = built
    found = {t.name.removesuffix(".T") for path in graphs.values() for t in load(path).graph.initializer}
    own = {"preprocess.mean", "preprocess.std", "axis_table", "rope.cos", "rope.sin"}
    own |= {"lm_head.weight"} if getattr(config, "tied_embeddings", False) else set()
    assert {n for n in found if not n.startswith("const/")} - own == set(config.tensors())


class Counting(SyntheticSource):
    """Counts how often each tensor is asked for."""

    def __init__(self, config) -> None:
        super().__init__(config, "test", 1)
        self.counts = Counter()

    def get(self, name):
        self.counts[name] += 1
        return super().get(name)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-tied"])
def test_llama_weights_are_loaded_once_for_all_graphs(tmp_path, name):
    """7 billion numbers are not read three times; tied embeddings are stored in two forms, so asked for twice."""
    config, weights = CONFIGS[name], WeightFile(tmp_path / "weights.data")
    source = Counting(config)
    for path in ("embed.onnx", "lowered-embed.onnx"):
        llama.build_embed(config, source, weights, tmp_path / path)
    llama.build_decoder(config, source, weights, tmp_path / "decoder.onnx", Style())
    llama_layers.build_layers(config, source, weights, tmp_path, Style())
    twice = {"model.embed_tokens.weight"} if config.tied_embeddings else set()
    assert source.counts == {n: 2 if n in twice else 1 for n in config.tensors()}


@pytest.mark.parametrize("name", ["vit-registers", "longnet", "projector-mlp2x"])
def test_encoder_weights_are_loaded_once(tmp_path, name):
    counting = Counting(CONFIGS[name])
    build(CONFIGS[name], tmp_path / "a", counting)
    assert counting.counts == dict.fromkeys(CONFIGS[name].tensors(), 1)


@pytest.mark.parametrize("form", ["portable", "layers"])
def test_every_linear_of_the_language_model_goes_through_one_method(tmp_path, form):
    """A precision is another `Linears`: no weight matrix is left outside it."""

    class Noting(PlainLinears):
        def make(self, g, x, name, bias):
            made.append(name)
            return super().make(g, x, name, bias)

    made, style, weights = [], Style(Noting()), WeightFile(tmp_path / "weights.data")
    source = SyntheticSource(LLAMA, "test", 1)
    if form == "portable":
        llama.build_decoder(LLAMA, source, weights, tmp_path / "d.onnx", style)
    else:
        llama_layers.build_layers(LLAMA, source, weights, tmp_path, style)
    matrices = {n.removesuffix(".weight") for n, s in LLAMA.tensors().items() if len(s) == 2}
    assert sorted(made) == sorted(matrices - {"model.embed_tokens"})


def test_rotary_tables_are_transformers_own(tmp_path):
    """Bit for bit: one in the last place of a frequency is 2e-4 of the cosine at position 4000."""
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for width, theta in ((128, 1e4), (96, 1e4), (64, 5e5)):
        c = replace(LLAMA, head_width=width, context=4096, rope_theta=theta)
        rope = {"rope_type": "default", "rope_theta": theta}
        hf = transformers.LlamaConfig(
            hidden_size=4 * width, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=rope
        )
        expected = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(4096)[None])
        for table, e in zip(llama.rope_tables(c), expected, strict=True):
            assert np.array_equal(table, e[0, :, : width // 2].numpy())


def test_a_graph_that_onnxruntime_refuses_is_not_blamed_on_the_disk(tmp_path):
    path = build(CONFIGS["projector-linear"], tmp_path / "a")["model"]
    model = load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WsiRtError, match=r"cannot optimise .*NoSuchOperator") as e:
        lower_ort_cpu(path, tmp_path / "lowered" / "model.onnx")
    assert not isinstance(e.value, MachineError)
    assert "disk" not in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is not here")
@pytest.mark.parametrize("file", ["weights.data", "model.onnx"])
def test_a_disk_that_fills_up_while_lowering_is_named(tmp_path, file):
    path = build(CONFIGS["projector-mlp2x"], tmp_path / "a")["model"]
    (tmp_path / "lowered").mkdir()
    (tmp_path / "lowered" / file).symlink_to("/dev/full")
    with pytest.raises(MachineError, match=r"not written .* GB free; make room or choose another --out"):
        lower_ort_cpu(path, tmp_path / "lowered" / "model.onnx")


def test_no_position_table_in_the_nano_slide_encoder(tmp_path):
    """At the published width only the axis table is added to the weights, 1000 x 384 instead of 1,000,001 x 768."""
    config = replace(NANO.slide_encoder, depth=1)
    model = load(build(config, tmp_path / "a")["model"])
    extra = {
        t.name: tuple(t.dims) for t in model.graph.initializer if t.name.removesuffix(".T") not in config.tensors()
    }
    assert config.width == 768
    assert extra.pop("axis_table") == (1000, 384)
    assert all(np.prod(dims, dtype=int) <= config.pooled for dims in extra.values())
    constants = [
        t for f in model.functions for n in f.node for a in n.attribute for t in [a.t] if n.op_type == "Constant"
    ]
    assert max(len(t.raw_data) for t in constants) <= 8 * config.pooled
    assert sum(p.stat().st_size for p in (tmp_path / "a").iterdir()) < 40e6


def test_portable_graph_equals_torch(built):
    """Every variant, not only the presets: within rounding of the fp32 module."""
    config, graphs, _ = built
    inputs = check_inputs(config)
    expected = reference_outputs(config, SyntheticSource(config, "test", 1), inputs).outputs
    actual = run_portable(config, graphs, inputs)
    assert expected.keys() <= actual.keys()
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape
        assert np.abs(actual[name] - reference).max() <= 1e-5 * max(1.0, np.abs(reference).max()), name

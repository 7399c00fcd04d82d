"""Half-precision graphs: strongly typed, rounded where they say, near the fp32 reference on onnxruntime."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("torch", reason="the export extra is not installed")

from onnx import TensorProto, helper  # noqa: E402

from wsi_rt.export.graphs import dilated_attention_rtx  # noqa: E402
from wsi_rt.export.graphs.builder import WeightFile  # noqa: E402
from wsi_rt.export.graphs.half import HALVES, half_of, write_half  # noqa: E402
from wsi_rt.export.parity import check_inputs, reference_outputs  # noqa: E402
from wsi_rt.export.tensorrt import check  # noqa: E402
from wsi_rt.export.tensorrt.sources import write_sources  # noqa: E402
from wsi_rt.runtime.engines.tensorrt_api import FAMILIES  # noqa: E402
from wsi_rt.runtime.errors import InputError, ParityError  # noqa: E402
from wsi_rt.runtime.parity import compare  # noqa: E402

RTX = FAMILIES["tensorrt-rtx"]
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
COMPONENTS = ("tile_encoder", "slide_encoder", "projector", "llm")
CASES = [(name, half) for name in COMPONENTS for half in HALVES]
# Of the largest value and of what a layer adds, in units of the type's rounding (2^-11, 2^-8): seen are 0.3 to 2.5.
WITHIN = 6


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request, tmp_path_factory, small, open_small):
    """(component, half type, sources)."""
    name, half = request.param
    component = open_small(small[name], tmp_path_factory.mktemp(name) / name)
    return component, HALVES[half], write_sources(component, RTX, HALVES[half], 89)


def load(path):
    return onnx.load(str(path), load_external_data=False)


def types_of(model):
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    return found | {t.name: t.data_type for t in inferred.initializer}


def test_every_operator_sees_one_float_type(made):
    """As a strongly typed network wants it; and the types are those of the policy."""
    _, half, sources = made
    model = load(sources.compiled)
    types = types_of(model)
    kinds = {True: set(), False: set()}
    for node in model.graph.node:
        floats = {types[x] for x in (*node.input, *node.output) if types.get(x) in FLOATS}
        if node.op_type != "Cast":
            assert len(floats) <= 1, node.name
            kinds[half.onnx_type in floats].add(node.op_type)
    heavy = {"MatMul", "Conv", "Attention", "TensorScatter"}
    assert kinds[True] & heavy
    assert not kinds[False] & heavy
    precise = {
        "LayerNormalization",
        "Gelu",
        "Sigmoid",
        "Softmax",
        "ReduceMean",
        "ReduceSum",
        "ReduceMin",
        "Sqrt",
        "Div",
    }
    assert not kinds[True] & (precise | {"Sub", "Mul", "Max", "Min"})
    assert not any(t == TensorProto.DOUBLE for t in types.values())


def test_the_stream_between_layers_is_fp32(made):
    component, _, sources = made
    types, pieces = types_of(load(sources.compiled)), check.Pieces(sources.compiled, 1)
    layers = {"tile_encoder": 3, "slide_encoder": 3, "projector": 0, "llm": 3}[component.config.component]
    assert len(pieces.boundaries) == layers
    assert {types[name] for name in pieces.boundaries} <= {TensorProto.FLOAT}


def test_borders_are_those_of_the_portable_graph(made):
    """fp32, bytes and int64 as before; a language model's caches are half."""
    component, half, sources = made
    graph = load(sources.compiled).graph
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if value.name.startswith(("cache.", "updated.")):
            assert kind == half.onnx_type
        else:
            assert kind in {TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64}
    if component.config.component != "llm":
        portable = load(sources.compiled.parents[1] / "model.onnx").graph
        assert list(graph.input) == list(portable.input)
        assert list(graph.output)[: len(portable.output)] == list(portable.output)


def test_matrices_are_stored_in_half_once(made):
    component, half, sources = made
    matrices = {n for n, s in component.config.tensors().items() if len(s) == 2 and "embed_tokens" not in n}
    stored = {t.name: t for t in load(sources.compiled).graph.initializer}
    for name in matrices:
        assert f"{name}.T" not in stored
        assert stored[f"{name}.T.{half.name}"].data_type == half.onnx_type
    size = (sources.compiled.parent / "weights.data").stat().st_size
    ends = [
        int(e["offset"]) + int(e["length"]) for t in stored.values() if (e := {x.key: x.value for x in t.external_data})
    ]
    assert max(ends) == size, "the file of the fp16 form holds nothing else"
    halves = sum(2 * int(np.prod(component.config.tensors()[n])) for n in matrices)
    assert halves < size


def test_builds_are_equal_byte_for_byte(made, tmp_path, open_small):
    component, half, sources = made
    again = write_sources(open_small(component.config, tmp_path / "again"), RTX, half, 89)
    for name in (sources.compiled.name, sources.runnable.name, "weights.data"):
        assert (sources.compiled.parent / name).read_bytes() == (again.compiled.parent / name).read_bytes()


def test_near_the_reference(made):
    """The outputs and, layer by layer on the graph's own values, what each layer adds. fp16: the very file that
    TensorRT parses, by onnxruntime's fp16 kernels, or fp32 ones between casts; bf16: rounded wherever that file is."""
    component, half, sources = made
    c, inputs = component.config, check_inputs(component.config)
    layers = check.trajectory(c, sources, inputs, 1)
    expected = reference_outputs(c, component.source, inputs, 1, layers)
    actual = check.outputs(c, sources, inputs, 1)
    assert {n: x.shape for n, x in actual.items()} == {n: x.shape for n, x in expected.outputs.items()}
    error = compare(actual, expected.outputs)
    assert error.max_rel <= WITHIN * half.unit_roundoff
    assert error.max_rel >= half.unit_roundoff / 20, "nothing was rounded"
    for name, layer in expected.layers.items():
        assert layer.total <= WITHIN * half.unit_roundoff, name


def test_emulated_values_are_numbers_of_the_type(tmp_path, small, open_small):
    """What onnxruntime computes of the bf16 form has no bits that bf16 has not."""
    component = open_small(small["tile_encoder"], tmp_path / "tile_encoder")
    sources = write_sources(component, RTX, HALVES["bf16"], 89)
    pieces = check.Pieces(sources.runnable, 1)
    graph = load(sources.runnable).graph
    exact = [n.output[0].removesuffix("/exact") for n in graph.node if n.output[0].endswith("/exact")]
    assert len(exact) == sum(n.op_type in {"MatMul", "Conv", "Attention"} for n in graph.node) + 8  # biases
    inputs = check_inputs(component.config)
    for x in pieces.open(list(inputs), exact[:6])(inputs):
        assert np.array_equal(x, x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_sum_out_of_range_is_no_parity(tmp_path, small, open_small, monkeypatch):
    """The check looks at every layer's headroom, not only at its numbers: limits that nothing meets."""
    strict = replace(dilated_attention_rtx.RANGES["fp16"], least_a=1.0)
    monkeypatch.setitem(dilated_attention_rtx.RANGES, "fp16", strict)
    component = open_small(replace(small["slide_encoder"], depth=1), tmp_path / "a")
    sources = write_sources(component, RTX, HALVES["fp16"], 89)
    with pytest.raises(
        ParityError, match=r"in layer 0 leave the range .* build it with --precision slide_encoder=bf16"
    ):
        check.trajectory(component.config, sources, check_inputs(component.config), 1)


# --- the pass itself


def graph_of(nodes, inputs, outputs, initializers=()):
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in outputs.items()]
    graph = helper.make_graph(nodes, "g", made, results, initializer=list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def tensor(name, array):
    return onnx.numpy_helper.from_array(np.asarray(array, np.float32), name)


def convert(model, folder, half="fp16"):
    write_half(model, folder, folder / "out.onnx", WeightFile(folder / "weights.data"), half_of(half))
    return load(folder / "out.onnx")


def test_a_scalar_stays_a_scalar_and_both_forms_of_a_weight_are_kept(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Mul", ["y", "half"], ["z"], name="scaled"),
        helper.make_node("MatMul", ["z", "w"], ["u"], name="again"),
        helper.make_node("Mul", ["u", "w"], ["out"], name="other"),
    ]
    weights = [tensor("w", np.eye(3)), tensor("half", 0.5)]
    found = convert(graph_of(nodes, {"x": [3, 3]}, {"out": [3, 3]}, weights), tmp_path)
    kinds = {t.name: (t.data_type, list(t.dims)) for t in found.graph.initializer}
    assert kinds == {"w": (1, [3, 3]), "w.fp16": (10, [3, 3]), "half": (1, [])}
    types_of(found)


def test_what_is_moved_from_weights_alone_takes_its_readers_type(tmp_path):
    """A row behind half-precision keys is expanded in half, not cast at its full size."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Expand", ["row", "size"], ["rows"]),
        helper.make_node("Concat", ["y", "rows"], ["z"], axis=0),
        helper.make_node("MatMul", ["z", "w"], ["out"]),
    ]
    size = onnx.numpy_helper.from_array(np.array([2, 3]), "size")
    weights = [tensor("w", np.eye(3)), tensor("row", np.zeros((1, 3))), size]
    found = convert(graph_of(nodes, {"x": [4, 3]}, {"out": [6, 3]}, weights), tmp_path)
    assert [n.op_type for n in found.graph.node] == ["Cast", "MatMul", "Expand", "Concat", "MatMul", "Cast"]


def test_weights_beyond_the_type_are_named(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["out"])]
    model = graph_of(nodes, {"x": [3, 3]}, {"out": [3, 3]}, [tensor("w", 7e4 * np.eye(3))])
    with pytest.raises(InputError, match=r"w: a weight of 7e\+04, fp16 ends at 65504; .*bf16"):
        convert(model, tmp_path)


def test_control_flow_is_refused(tmp_path):
    body = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])
    condition = onnx.numpy_helper.from_array(np.array(True), "yes")
    nodes = [helper.make_node("If", ["yes"], ["out"], name="choice", then_branch=body, else_branch=body)]
    with pytest.raises(ValueError, match="choice: a subgraph"):
        convert(graph_of(nodes, {"x": [1]}, {"out": [1]}, [condition]), tmp_path)


def test_no_other_precision():
    with pytest.raises(InputError, match="expected one of: fp16, bf16"):
        half_of("fp8")

"""Integer blocks: nearest codes, bytes as onnxruntime and ONNX read them, and how much is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

torch = pytest.importorskip("torch", reason="the export extra is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig, ProjectorConfig, linear_shapes  # noqa: E402
from wsi_rt.export.graphs.builder import WeightFile  # noqa: E402
from wsi_rt.export.graphs.layers import Style  # noqa: E402
from wsi_rt.export.graphs.linears import DequantisedLinears, FusedLinears  # noqa: E402
from wsi_rt.export.graphs.llama_layers import build_layers  # noqa: E402
from wsi_rt.export.graphs.write import Component, write_graphs, write_main  # noqa: E402
from wsi_rt.export.precision import SUPPORTED, format_of, formats, weight_bytes  # noqa: E402
from wsi_rt.export.quantise import BlockFormat, quantise  # noqa: E402
from wsi_rt.export.sources.presets import NANO  # noqa: E402
from wsi_rt.export.sources.stored import Compared, Stored, with_head  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402

FORMATS = [BlockFormat(bits, block, symmetric) for bits in (4, 8) for block in (32, 128) for symmetric in (True, False)]
FORMATS.append(BlockFormat(bits=8, block=0, symmetric=True))
EACH_FORMAT = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.name}{'s' if f.symmetric else 'a'}")
LLAMA = LlamaConfig(hidden=96, layers=2, heads=6, kv_heads=2, head_width=16, ffn=160, vocab=96, context=64)


@EACH_FORMAT
def test_every_code_is_the_nearest(form):
    w = np.random.default_rng(0).standard_normal((7, 300)).astype(np.float32)
    blocks = quantise(w, form)
    filled = blocks.codes.shape[1] * form.width(300)
    padded = np.pad(w, ((0, 0), (0, filled - 300))).reshape(blocks.codes.shape)
    grid = np.arange(form.top + 1) - blocks.zeros[..., None].astype(np.float64)
    values = grid * blocks.scales[..., None]  # [out, blocks, codes]
    best = np.abs(padded[..., None] - values[:, :, None]).min(axis=-1)
    lost = np.abs(padded - blocks.dequantised(filled).reshape(padded.shape))
    assert np.abs(lost - best).max() < 1e-6


@EACH_FORMAT
@settings(max_examples=40, deadline=None)
@given(w=arrays(np.float32, (3, 50), elements=st.floats(-1e4, 1e4, width=32)))
def test_nothing_is_off_by_more_than_a_step(form, w):
    """Zeros stay zero, constant blocks and tiny values included; a clipped extreme loses at most its share of range."""
    blocks = quantise(w, form)
    back = blocks.dequantised(50)
    assert np.isfinite(back).all()
    assert (back[w == 0] == 0).all()
    span = np.maximum(w.max(1), 0) - np.minimum(w.min(1), 0)
    assert (np.abs(back - w).max(1) <= 0.6 * span + 1e-6).all()


@pytest.mark.parametrize(("kind", "most"), [("uniform", (0.064, 0.0040)), ("normal", (0.081, 0.0056))])
def test_what_is_lost(kind, most):
    rng = np.random.default_rng(1)
    w = (rng.uniform(-1, 1, (64, 2048)) if kind == "uniform" else rng.standard_normal((64, 2048))).astype(np.float32)
    for form, bound in zip((BlockFormat(4, 32, False), BlockFormat(8, 32, True)), most, strict=True):
        lost = np.linalg.norm(quantise(w, form).dequantised(2048) - w) / np.linalg.norm(w)
        assert 0.5 * bound < lost < bound


def test_the_search_beats_the_plain_range():
    """What the candidates are for; the plain range is the first of them."""
    w = np.random.default_rng(2).standard_normal((64, 2048)).astype(np.float32)
    form = BlockFormat(4, 32, False)
    x = w.reshape(64, -1, 32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = ((np.clip(np.rint(x / scale) + zero, 0, 15) - zero) * scale).reshape(w.shape)
    assert np.square(quantise(w, form).dequantised(2048) - w).sum() < 0.97 * np.square(plain - w).sum()


@EACH_FORMAT
@pytest.mark.parametrize("inputs", [64, 96, 100, 256], ids=lambda n: f"in{n}")
def test_both_graphs_read_the_same_weights(tmp_path, ort_run, form, inputs):
    """Odd numbers of blocks and a last block that is not full included: what onnxruntime multiplies by is what
    `dequantised` says, to fp32 rounding in the standard graph, to rounded activations in the fused one."""
    config = ProjectorConfig((inputs, 48))
    source = SyntheticSource(config, "test", 1)
    component = Component(config, source, WeightFile(tmp_path / "weights.data"), lambda _: form)
    x = np.random.default_rng(3).standard_normal((5, inputs)).astype(np.float32)
    name = "model.mm_projector"
    expected = x @ quantise(source.get(f"{name}.weight"), form).dequantised(inputs).T + source.get(f"{name}.bias")
    for linears, bound in ((DequantisedLinears, 2e-6), (FusedLinears, 2e-2)):
        path = tmp_path / f"{linears.__name__}.onnx"
        write_main(component, path, Style(linears(component.format_of)))
        y = ort_run(path, {"tokens": x})["embeds"]
        assert np.abs(y - expected).max() <= bound * np.abs(expected).max(), linears.__name__


@pytest.mark.parametrize("form", [f for f in FORMATS if f.block != 128], ids=lambda f: f"{f.name}{f.symmetric}")
def test_a_row_does_not_depend_on_its_batch(tmp_path, ort_run, form):
    """Bit for bit, other rows a thousand times as large included. (Blocks of 128, which are not used, differ in one row
    and in odd ones.)"""
    config = ProjectorConfig((256, 96))
    component = Component(
        config, SyntheticSource(config, "test", 1), WeightFile(tmp_path / "weights.data"), lambda _: form
    )
    write_main(component, tmp_path / "fused.onnx", Style(FusedLinears(component.format_of)))
    x = np.random.default_rng(3).standard_normal((70, 256)).astype(np.float32)
    x[1::2] *= 1000
    x[4] = 0
    whole = ort_run(tmp_path / "fused.onnx", {"tokens": x})["embeds"]
    for rows in (slice(0, 1), slice(2, 4), slice(4, 5), slice(3, 20), slice(5, 70)):
        part = ort_run(tmp_path / "fused.onnx", {"tokens": x[rows]})["embeds"]
        assert np.array_equal(part, whole[rows]), rows


def test_codes_are_stored_once_for_both_graphs(tmp_path):
    """And every weight is asked for once per graph set, whatever the number of its arrays."""
    counts: Counter[str] = Counter()

    class Counting(SyntheticSource):
        def get(self, name):
            counts[name] += 1
            return super().get(name)

    source = Counting(LLAMA, "test", 1)
    component = Component(LLAMA, source, WeightFile(tmp_path / "weights.data"), format_of("int4"))
    write_main(component, tmp_path / "portable.onnx", Style(DequantisedLinears(component.format_of)))
    first = (tmp_path / "weights.data").stat().st_size
    layers = build_layers(LLAMA, source, component.weights, tmp_path, Style(FusedLinears(component.format_of)))
    assert {n for n, k in counts.items() if k > 1} <= {f"{n}.weight" for n in linear_shapes(LLAMA)}
    grown = (tmp_path / "weights.data").stat().st_size - first
    assert grown <= 4096 * 2 * len(linear_shapes(LLAMA)), "only zeros of odd rows are stored a second time"
    models = [onnx.load(str(path), load_external_data=False) for path in layers.values()]
    ops = Counter(n.op_type for m in models for n in m.graph.node)
    assert ops["MatMulNBits"] == len(linear_shapes(LLAMA))


@pytest.mark.parametrize("component", SUPPORTED)
def test_every_linear_is_recorded(component):
    config = NANO.components()[component]
    for precision in SUPPORTED[component]:
        told = formats(config, precision)
        assert sum(int(str(f["layers"])) for f in told.values()) == (
            0 if precision == "fp32" else len(linear_shapes(config))
        )


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_sizes_are_told_before_a_build(tmp_path, precision, tied):
    """`--dry-run` and the check for room: the estimate against the file that is written."""
    config = replace(LLAMA, vocab=2048, ffn=1024, tied_embeddings=tied)
    component = Component(
        config, SyntheticSource(config, "test", 1), WeightFile(tmp_path / "weights.data"), format_of(precision)
    )
    write_graphs(component, tmp_path, Style(FusedLinears(component.format_of)))
    written = (tmp_path / "weights.data").stat().st_size
    arrays = len(config.tensors()) * 3
    assert abs(written - weight_bytes(config, precision)) <= 4096 * arrays


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_the_file_holds_is_read_back(tmp_path, precision):
    """Odd numbers of blocks included. What is no Linear comes from the checkpoint, and so does the table that tokens
    are looked up in, while the output layer tied to it is rounded."""
    config = replace(LLAMA, tied_embeddings=True)
    source = with_head(config, SyntheticSource(config, "test", 1))
    file, choose = WeightFile(tmp_path / "weights.data"), format_of(precision)
    write_graphs(Component(config, source, file, choose), tmp_path, Style(FusedLinears(choose)))
    stored = Stored(source, file, choose)
    compared = Compared(source, stored)
    linears = {f"{n}.weight" for n in linear_shapes(config)}
    for name in (*config.tensors(), "lm_head.weight"):
        x = source.get(name)
        expected = x
        if name in linears:
            expected = quantise(x, choose(name.removesuffix(".weight"))).dequantised(x.shape[1])
            assert not np.array_equal(expected, x)
        assert np.array_equal(stored.get(name), expected), name
        assert np.array_equal(compared.get(name), x)
    assert set(compared.errors) == linears
    assert 0.001 < min(compared.errors.values()) <= max(compared.errors.values()) < 0.1

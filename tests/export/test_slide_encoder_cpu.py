"""The slide encoder as onnxruntime's CPU runs it: equal to the published one at every length, and from any scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
load_file = pytest.importorskip("safetensors.numpy", reason="the export extra is not installed").load_file

from wsi_rt.export.arch import LongNetConfig  # noqa: E402
from wsi_rt.export.graphs import dilated_attention_cpu as cpu  # noqa: E402
from wsi_rt.export.graphs import slide_encoder_cpu  # noqa: E402
from wsi_rt.export.graphs.builder import GraphBuilder, WeightFile  # noqa: E402
from wsi_rt.export.graphs.dilated_tables import Heads, make_tables  # noqa: E402
from wsi_rt.export.graphs.layers import FLOAT, Style  # noqa: E402
from wsi_rt.export.graphs.linears import FusedLinears  # noqa: E402
from wsi_rt.export.lowering import lower_ort_cpu  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.precision import format_of  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference  # noqa: E402
from wsi_rt.runtime.engines.ort import open_session  # noqa: E402
from wsi_rt.runtime.parity import row_cosines  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = json.loads((GOLDEN / "longnet" / "tiny.json").read_text())
OPERATOR = json.loads((GOLDEN / "dilated_attention" / "cases.json").read_text())
EVEN = [c for c in OPERATOR if all(c["H"] % r == 0 for r in c["dilated_ratio"])]
TOLERANCE, OPERATOR_TOLERANCE = 2e-4, 1e-5  # max abs, SPEC 10
SMALL = LongNetConfig(in_width=32, width=64, depth=2, heads=16, ffn=128, norm_width=64, padded=96)


def tiny_config() -> LongNetConfig:
    c = TINY["config"]
    return LongNetConfig(
        in_width=c["in_chans"],
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["heads"],
        ffn=c["ffn_dim"],
        segment_lengths=tuple(c["segment_length"]),
        dilated_ratios=tuple(c["dilated_ratio"]),
        eps=c["layer_norm_eps"],
        pool_eps=c["norm_eps"],
        padded=c["embed_dim"],
        norm_width=c["embed_dim"],
    )


def operator(folder: Path, segments, ratios, heads: Heads):
    """q, k, v [L, H, D] -> [L, H, D] by the graph's operator, tables and all."""
    b = GraphBuilder("operator", WeightFile(folder / "weights.data"))
    c = heads.count * heads.width
    q, k, v = (b.input(name, FLOAT, ["tokens", c]) for name in "qkv")
    tables = make_tables(b, q, segments, ratios, heads, 64)
    pads = b.op("Concat", [b.constant([0, 0]), tables.filling, b.constant([0])], axis=0)
    q, k, v = (b.op("Pad", [x, pads]) for x in (q, k, v))
    sums = b.op("Reshape", [tables.sums, b.constant([-1, 1, heads.extra])])
    sums = b.op("Expand", [sums, b.constant([1, heads.count, 1])])
    v = b.op("Concat", [b.op("Reshape", [v, b.constant([-1, heads.count, heads.width])]), sums], axis=2)
    out = cpu.dilated_attention_cpu(b, q, k, b.op("Reshape", [v, b.constant([-1, heads.value_row])]), tables, heads)
    out = b.op("Slice", [out, b.constant([0]), tables.end, b.constant([0])])
    b.output(out, "out", FLOAT, ["tokens", c])
    b.save(folder / "operator.onnx")
    session = open_session(folder / "operator.onnx", folder, 1)

    def run(q, k, v):
        flat = {n: x.reshape(len(x), c) for n, x in (("q", q), ("k", k), ("v", v))}
        return session.run(None, flat)[0].reshape(q.shape)

    return run


def reference(q, k, v, segments, ratios):
    return dilated_attention_reference(*(torch.from_numpy(x) for x in (q, k, v)), segments, ratios)


def encoder(c, source, folder: Path, linears=None, threads: int = 1):
    folder.mkdir(exist_ok=True)
    style = Style() if linears is None else Style(linears)
    weights = WeightFile(folder / "weights.data")
    slide_encoder_cpu.build(c, source, weights, folder / "model.onnx", style, expose_encoder_out=True)
    lower_ort_cpu(folder / "model.onnx", folder / "ort-cpu" / "model.onnx")
    session = open_session(folder / "ort-cpu" / "model.onnx", folder / "ort-cpu", threads)
    names = [o.name for o in session.get_outputs()]
    return lambda features, positions: dict(
        zip(names, session.run(names, {"features": features, "positions": positions}), strict=True)
    )


def slide(c, n: int, seed: int = 0):
    side = int(n**0.5) + 1
    features = np.random.default_rng(seed).uniform(-2, 2, (n, c.in_width)).astype(np.float32)
    return features, np.stack([np.arange(n) % side, np.arange(n) // side], axis=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    source = open_weights(GOLDEN / "longnet" / "tiny_weights.safetensors")
    return encoder(tiny_config(), source, tmp_path_factory.mktemp("golden") / "tiny")


@pytest.mark.parametrize("n", TINY["cases"], ids=lambda n: f"N{n}")
def test_encoder_equals_published(published, n):
    case = load_file(GOLDEN / "longnet" / f"tiny_L{n}.safetensors")
    out = published(case["tile_features"], case["coords"] // TINY["config"]["tile_size"])
    expected = {"tokens": case["pooled"], "cls": case["cls"], "mean": case["mean"]}
    if int(n) <= 1500:
        expected["encoder_out"] = case["encoder_out"]
    for name, wanted in expected.items():
        assert out[name].shape == wanted.shape, name
        assert np.abs(out[name] - wanted).max() <= TOLERANCE, name


@pytest.mark.parametrize("case", EVEN, ids=lambda c: c["file"].removesuffix(".safetensors"))
def test_operator_equals_published(case, tmp_path):
    tensors = load_file(GOLDEN / "dilated_attention" / case["file"])
    run = operator(tmp_path, case["segment_length"], case["dilated_ratio"], Heads(case["H"], case["D"]))
    assert np.abs(run(tensors["q"], tensors["k"], tensors["v"]) - tensors["out"]).max() <= OPERATOR_TOLERANCE


BRANCHES = {
    "ragged": ((16, 40, 100), (1, 2, 4)),
    "odd-segments": ((13, 31, 57), (1, 2, 8)),
    "dilated-first": ((16, 40), (2, 1)),
    "no-branch-keeps-all": ((9, 20), (2, 4)),
}


@pytest.fixture(scope="module", params=BRANCHES)
def branches(request, tmp_path_factory):
    segments, ratios = BRANCHES[request.param]
    return segments, ratios, operator(tmp_path_factory.mktemp("branches"), segments, ratios, Heads(8, 6))


def random_qkv(length: int, size: float = 1.0, heads: int = 8, width: int = 6):
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((length, heads, width), np.float32) for _ in range(3))
    return size * q, size * k, v


@pytest.mark.parametrize("length", [1, 2, 9, 15, 16, 17, 31, 32, 33, 40, 41, 57, 80, 81, 99, 100, 101, 130, 200])
def test_every_length(branches, length):
    """Whole and partly filled segments, groups that keep a position more than others, zero-padded keys."""
    segments, ratios, run = branches
    q, k, v = random_qkv(length)
    expected = reference(q, k, v, segments, ratios).numpy()
    assert np.abs(run(q, k, v) - expected).max() <= OPERATOR_TOLERANCE
    assert np.array_equal(run(q, k, v) == 0, expected == 0), "zero where no branch keeps a position, and nowhere else"


def opposed(length: int, size: float):
    """Every score about -size^2 / sqrt(width): sums of exponentials that vanish."""
    q, k, v = random_qkv(length)
    q[:], k[:] = size, -size
    return q + 1e-3 * v, k, v


LARGE = {"large": lambda: random_qkv(101, 14.0), "very-large": lambda: random_qkv(101, 60.0)}
LARGE |= {"all-below": lambda: opposed(96, 8.0), "zero-keys-decide": lambda: opposed(101, 8.0)}


@pytest.mark.parametrize("scores", LARGE)
def test_scores_beyond_the_range_of_exponentials(tmp_path, monkeypatch, scores):
    """Attended to again from the scores themselves; the sums alone would be far off, or not even numbers."""
    segments, ratios = (16, 48), (1, 2)
    q, k, v = LARGE[scores]()
    expected = reference(q, k, v, segments, ratios).numpy()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    scale = max(1.0, float(np.abs(q[0, 0] @ k[0, 0]))) * 1e-6  # what fp32 leaves of a score
    run = operator(tmp_path / "a", segments, ratios, Heads(8, 6))
    assert np.abs(run(q, k, v) - expected).max() <= max(OPERATOR_TOLERANCE, scale)
    monkeypatch.setattr(cpu, "SMALLEST", -1.0)
    trusting = operator(tmp_path / "b", segments, ratios, Heads(8, 6))
    off = np.abs(trusting(q, k, v) - expected).max()
    assert scores == "zero-keys-decide" or not off <= 1e-2, "this case needs no second path: it shows nothing"


@pytest.mark.parametrize("length", [9, 101])
def test_scores_within_range_are_not_attended_to_twice(tmp_path, monkeypatch, length):
    """The second path, spoilt, changes nothing: scores of dozens."""
    monkeypatch.setattr(cpu, "_again", lambda b, q, k, v, tables, heads: b.op("Sub", [q, q]))
    segments, ratios = (16, 40), (1, 2)
    q, k, v = random_qkv(length, 2.7)
    assert 20 < np.abs(np.einsum("ihd,jhd->hij", q, k)).max() / 6**0.5 < 60
    run = operator(tmp_path, segments, ratios, Heads(8, 6))
    assert np.abs(run(q, k, v) - reference(q, k, v, segments, ratios).numpy()).max() <= 2e-5


def test_threads_and_repeats_change_no_bit(tmp_path):
    source = SyntheticSource(SMALL, "test", 1)
    runs = [encoder(SMALL, source, tmp_path / f"t{threads}", threads=threads) for threads in (1, 2)]
    inputs = slide(SMALL, 2100)
    first = runs[0](*inputs)
    for out in (runs[0](*inputs), runs[1](*inputs)):
        assert np.array_equal(out["encoder_out"], first["encoder_out"])
        assert np.array_equal(out["tokens"], first["tokens"])


def test_uneven_heads_are_attended_to_as_in_the_portable_graph(tmp_path):
    c = replace(SMALL, width=60, heads=5, norm_width=60)
    source = SyntheticSource(c, "test", 1)
    features, positions = slide(c, 90)
    out = encoder(c, source, tmp_path)(features, positions)
    with torch.inference_mode():
        expected = reference_model(c, source)(torch.from_numpy(features), torch.from_numpy(positions))
    assert np.abs(out["encoder_out"] - expected["encoder_out"].numpy()).max() <= TOLERANCE


@pytest.mark.slow
def test_int8_tokens_of_the_published_size(tmp_path):
    """All 12 layers of 768, on 1,100 tiles: cosine of every slide token against fp32."""
    c = LongNetConfig(in_width=1536)
    source, inputs = SyntheticSource(c, "test", 1), slide(c, 1100)
    tokens = {}
    for precision in ("fp32", "int8"):
        linears = FusedLinears(format_of(precision, c.component))
        tokens[precision] = encoder(c, source, tmp_path / precision, linears, threads=2)(*inputs)["tokens"]
    cosines = row_cosines(tokens["int8"].astype(np.float64), tokens["fp32"].astype(np.float64))
    assert cosines.shape == (576,)
    assert cosines.min() >= 0.999
    assert cosines.min() < 0.999999, "not one rounded value: this is no int8"

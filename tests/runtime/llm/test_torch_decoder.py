"""The torch decoder against the fp32 reference and the onnxruntime decoder of the same bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import EngineMismatchError, InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import Chunk, Decoder
from wsi_rt.runtime.llm.torch_decoder import TorchDecoder
from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.parity import GATES, compare, load_check

MHA = LlamaConfig(hidden=64, layers=3, heads=4, kv_heads=4, head_width=16, ffn=96, vocab=512, context=2048)
GQA = replace(MHA, kv_heads=2, rope_theta=500000.0, rms_eps=1e-2)
ODD = replace(MHA, hidden=80, ffn=144, kv_heads=1)  # rows of 3 and 5 blocks: not whole, and zeros not in whole bytes
CASES = {
    "mha-fp32": (MHA, "fp32"),
    "gqa-fp32": (GQA, "fp32"),
    "tied-fp32": (replace(MHA, tied_embeddings=True), "fp32"),
    "mha-int4": (MHA, "int4"),
    "odd-int4": (ODD, "int4"),
    "odd-int8": (ODD, "int8"),
}
PREFIX, NEW = 70, 32


class SmallTable(SyntheticSource):
    """Tied embeddings small, so that a token's own row does not always win."""

    def get(self, name: str) -> np.ndarray:
        return super().get(name) * np.float32(0.03 if name == "model.embed_tokens.weight" else 1.0)


@dataclass
class Case:
    root: Path
    manifest: EngineManifest
    torch: TorchDecoder

    def ort(self) -> Decoder:
        return backend("ort-cpu").open_decoder(self.root, self.manifest, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """built(name) -> Case, each built once."""
    made: dict[str, Case] = {}

    def build(name: str) -> Case:
        if name not in made:
            config, precision = CASES[name]
            root = tmp_path_factory.mktemp(name)
            source = (SmallTable if config.tied_embeddings else SyntheticSource)(config, "test", 3)
            part = Part(config, source)
            manifest = build_component("llm", part, root, "ort-cpu", precision, 1, lambda _: None)
            made[name] = Case(root, manifest, TorchDecoder.open(root, manifest, None, 1))
        return made[name]

    yield build
    for case in made.values():
        case.torch.close()


@pytest.fixture
def gqa(built) -> Case:
    return built("gqa-fp32")


def prompt(decoder: Decoder, tokens: int, seed: str = "prompt") -> np.ndarray:
    width = decoder.spec.hidden_size
    return uniform(9, seed, tokens * width, -1, 1).reshape(tokens, width)


def shared_greedy(decoder: Decoder, new: int = NEW) -> tuple[np.ndarray, list[list[int]]]:
    """A prefix, four sequences behind it and one without, of other lengths -> the first logits, the greedy tokens."""
    kv = decoder.new_kv(PREFIX)
    decoder.prefill(kv, prompt(decoder, PREFIX))
    prefix = decoder.freeze(kv)
    kvs = [decoder.new_kv(PREFIX + 20 + new, prefix if i else None) for i in range(5)]
    chunks = [Chunk(kv, prompt(decoder, 3 + 4 * i, f"question {i}")) for i, kv in enumerate(kvs)]
    logits = np.concatenate(decoder.extend(chunks))
    tokens = [[int(row.argmax())] for row in logits]
    for _ in range(new - 1):
        step = decoder.step(kvs, np.array([t[-1] for t in tokens]))
        for found, row in zip(tokens, step, strict=True):
            found.append(int(row.argmax()))
    return logits, tokens


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_reference_on_the_stored_weights(built, name: str) -> None:
    """The build's own check: the fp32 module with the weights as stored, 640 tokens and 8 more. No activation is
    rounded here, so every precision meets the gate of fp32."""
    case = built(name)
    inputs, outputs = load_check(case.root / case.manifest.check)
    logits = TorchDecoder.teach(case.root, case.manifest, None, 1, inputs["embeds"], inputs["token_ids"])
    parity = compare({"logits": logits}, outputs)
    assert parity.passes(GATES["fp32"]), parity


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("fp32")])
def test_greedy_tokens_equal_onnxruntime_in_fp32(built, name: str) -> None:
    case = built(name)
    with case.ort() as ort:
        expected, tokens = shared_greedy(ort)
    assert len({t for row in tokens for t in row}) > 8, "a model that repeats itself shows little"
    logits, found = shared_greedy(case.torch)
    assert found == tokens
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


def test_cuts_prefixes_and_company_change_only_the_rounding(gqa: Case) -> None:
    decoder = gqa.torch
    embeds = prompt(decoder, PREFIX + 9)
    whole = decoder.extend([Chunk(decoder.new_kv(200), embeds, len(embeds))])[0]
    cut = decoder.new_kv(200)
    pieces = [decoder.extend([Chunk(cut, piece, len(piece))])[0] for piece in np.split(embeds, [1, 2, 40])]
    close = {"rtol": 0, "atol": 1e-5 * float(np.abs(whole).max())}
    np.testing.assert_allclose(np.concatenate(pieces), whole, **close)
    owner = decoder.new_kv(PREFIX)
    decoder.prefill(owner, embeds[:PREFIX])
    behind = decoder.new_kv(200, decoder.freeze(owner))
    other = decoder.new_kv(50)
    behind_logits, other_logits = decoder.extend([Chunk(behind, embeds[PREFIX:], 9), Chunk(other, embeds[:40], 0)])
    np.testing.assert_allclose(behind_logits, whole[PREFIX:], **close)
    assert other_logits.shape == (0, decoder.spec.vocab_size)
    assert (behind.length, other.length) == (PREFIX + 9, 40)


def test_rewinding_forgets(gqa: Case) -> None:
    decoder = gqa.torch
    kv = decoder.new_kv(64)
    decoder.prefill(kv, prompt(decoder, 20))
    expected = decoder.prefill(kv, prompt(decoder, 5, "then"))
    kv.rewind(20)
    decoder.prefill(kv, prompt(decoder, 30, "something else"))
    kv.rewind(20)
    assert np.array_equal(decoder.prefill(kv, prompt(decoder, 5, "then")), expected)


def test_a_prefix_read_back_from_a_file_answers_the_same(gqa: Case, tmp_path: Path) -> None:
    decoder = gqa.torch
    kv = decoder.new_kv(PREFIX)
    decoder.prefill(kv, prompt(decoder, PREFIX))
    prefix = decoder.freeze(kv)
    np.save(tmp_path / "prefix.npy", np.stack(list(prefix.layers())))
    loaded = decoder.load_prefix(list(np.load(tmp_path / "prefix.npy", mmap_mode="r")))
    assert (loaded.length, loaded.nbytes) == (PREFIX, PREFIX * decoder.spec.kv_bytes_per_token)
    question = prompt(decoder, 7, "question")
    one, two = (decoder.prefill(decoder.new_kv(PREFIX + 7, p), question) for p in (prefix, loaded))
    assert np.array_equal(one, two)


def test_a_prefix_of_onnxruntime_serves_torch(gqa: Case) -> None:
    """`PrefixKV.layers` is one format: what one backend computed, the other goes on from."""
    with gqa.ort() as ort:
        kv = ort.new_kv(PREFIX)
        ort.prefill(kv, prompt(ort, PREFIX))
        prefix = ort.freeze(kv)
        question = prompt(ort, 7, "question")
        expected = ort.prefill(ort.new_kv(PREFIX + 7, prefix), question)
        layers = [np.array(x) for x in prefix.layers()]
    decoder = gqa.torch
    found = decoder.prefill(decoder.new_kv(PREFIX + 7, decoder.load_prefix(layers)), question)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_bytes_are_those_of_the_tokens_held(gqa: Case) -> None:
    decoder = gqa.torch
    owner = decoder.new_kv(PREFIX)
    decoder.prefill(owner, prompt(decoder, PREFIX))
    prefix = decoder.freeze(owner)
    kv = decoder.new_kv(1000, prefix)
    assert kv.nbytes == 0
    decoder.prefill(kv, prompt(decoder, 100))
    per_token = decoder.spec.kv_bytes_per_token
    assert (prefix.nbytes, kv.nbytes) == (PREFIX * per_token, 100 * per_token)
    assert per_token == 2 * 4 * 3 * 2 * 16


def test_what_does_not_fit_is_refused_and_nothing_grows(gqa: Case) -> None:
    decoder = gqa.torch
    kv, other = decoder.new_kv(10), decoder.new_kv(10)
    good = Chunk(other, prompt(decoder, 3))
    bad = {
        "11 tokens after 0 do not fit a KV of 10": [good, Chunk(kv, prompt(decoder, 11))],
        "0 tokens after 0": [good, Chunk(kv, prompt(decoder, 0), 0)],
        "a KV of its own": [good, good],
        "one chunk or more": [],
        "logits of 4 positions": [good, Chunk(kv, prompt(decoder, 3), 4)],
        "expected \\[tokens, 64\\]": [good, Chunk(kv, np.zeros((3, 63), np.float32))],
    }
    for message, chunks in bad.items():
        with pytest.raises(ValueError, match=message):
            decoder.extend(chunks)
    assert (kv.length, other.length) == (0, 0)


def test_foreign_and_unfit_prefixes_are_refused(gqa: Case) -> None:
    decoder = gqa.torch
    with pytest.raises(ValueError, match=r"expected 1\.\.2048"):
        decoder.new_kv(2049)
    with pytest.raises(ValueError, match="expected 3 of"):
        decoder.load_prefix([np.zeros((2, 5, 2, 16), np.float32)] * 2)
    with pytest.raises(ValueError, match="float64"):
        decoder.load_prefix([np.zeros((2, 5, 2, 16))] * 3)
    with pytest.raises(ValueError, match="holds tokens"):
        decoder.freeze(decoder.new_kv(5))
    with gqa.ort() as ort:
        kv = ort.new_kv(5)
        ort.prefill(kv, prompt(ort, 3))
        with pytest.raises(TypeError, match="OrtKV"):
            decoder.step([kv], np.array([1]))
        with pytest.raises(TypeError, match="OrtPrefix"):
            decoder.new_kv(9, ort.freeze(kv))


def test_a_closed_decoder_and_a_graph_without_its_tensors_say_so(gqa: Case, tmp_path: Path) -> None:
    decoder = TorchDecoder.open(gqa.root, gqa.manifest, None, 1)
    decoder.close()
    decoder.close()
    with pytest.raises(WsiRtError, match="closed"):
        decoder.embed(np.array([1]))
    with pytest.raises(InputError, match="no --fast"):
        TorchDecoder.open(gqa.root, gqa.manifest, None, 1, fast=True)
    only_table = replace(gqa.manifest, portable={"embed": gqa.manifest.portable["embed"]})
    with pytest.raises(EngineMismatchError, match="hold no tensor"):
        TorchDecoder.open(gqa.root, only_table, None, 1)
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineMismatchError, match="rebuild"):
        TorchDecoder.open(tmp_path, replace(gqa.manifest, portable={"decoder": "decoder.onnx"}), None, 1)


def test_weights_are_mapped_not_read() -> None:
    """Opening 200 MB of weights takes the memory of what is used: a process of its own, since memory stays taken."""
    code = """
import json, resource, sys, tempfile
from pathlib import Path
import numpy as np, onnx
from onnx import TensorProto, helper
from wsi_rt.runtime.llm.torch_weights import StoredTensors
folder = Path(tempfile.mkdtemp())
n = 50_000_000
np.zeros(n, np.float32).tofile(folder / "weights.data")
t = TensorProto(name="w.weight.T", dims=[5000, 10000], data_type=1, data_location=TensorProto.EXTERNAL)
for k, v in {"location": "weights.data", "offset": "0", "length": str(4 * n)}.items():
    t.external_data.add(key=k, value=v)
onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [t])), str(folder / "decoder.onnx"))
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
linear = StoredTensors([folder / "decoder.onnx"]).linear("w")
after = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
print(json.dumps(after - before))
(folder / "weights.data").unlink()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 50e6

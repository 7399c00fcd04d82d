"""The peers' dilated attention is the operator's: one attention per branch and a merge, on CPU tensors in fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.benchmarks.kernels.branches import (  # noqa: E402
    UnavailableError,
    attend_per_branch,
    flash_attn,
    torch_sdpa,
)
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dilated_attention"
BRANCHES = {
    "powers": ([32, 64, 100], [1, 2, 4]),
    "no-r1": ([23, 50], [4, 3]),
    "more-groups-than-heads": ([40], [16]),
}


def by_hand(q, k, v):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("attend", [torch_sdpa, by_hand])
@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize(("length", "heads"), [(1, 4), (17, 3), (63, 5), (257, 4)])
def test_branches_and_merge_are_the_reference(length, heads, branches, attend):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(length, 3, heads, 16, generator=generator).unbind(1)
    out = attend_per_branch(q, k, v, *branches, attend)
    exact = dilated_attention_reference(q, k, v, *branches)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= 1e-5
    assert torch.equal(out == 0, exact == 0)  # kept by no branch


@pytest.mark.parametrize("case", json.loads((GOLDEN / "cases.json").read_text()), ids=lambda c: c["file"])
def test_branches_and_merge_are_the_published_numbers(case):
    t = pytest.importorskip("safetensors.torch").load_file(GOLDEN / case["file"])
    out = attend_per_branch(t["q"], t["k"], t["v"], case["segment_length"], case["dilated_ratio"], torch_sdpa)
    assert (out - t["out"]).abs().max() <= 1e-5


def test_a_merge_without_the_log_sum_exp_is_another_answer():
    """What the test above would catch: each branch weighted alike."""
    q, k, v = torch.randn(63, 3, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(1)
    blind = attend_per_branch(q, k, v, *BRANCHES["powers"], lambda *x: (by_hand(*x)[0], by_hand(*x)[1] * 0))
    assert (blind - dilated_attention_reference(q, k, v, *BRANCHES["powers"])).abs().max() > 1e-2


def test_flash_attn_takes_tokens_before_heads(monkeypatch):
    """With a stand-in of its signature: q, k, v [S, m, H, D] -> out alike, log-sum-exp [S, H, m], nothing."""

    def flash_attn_func(q, k, v, return_attn_probs):
        assert return_attn_probs
        out, lse = by_hand(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), lse, None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = torch.randn(63, 3, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(1)
    out = attend_per_branch(q, k, v, *BRANCHES["powers"], flash_attn())
    assert (out - dilated_attention_reference(q, k, v, *BRANCHES["powers"])).abs().max() <= 1e-5


def test_flash_attn_that_is_absent_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UnavailableError, match=r"flash-attn does not load .*: pip install flash-attn"):
        flash_attn()

"""The published sizes: the 7 B bundle is built and asked, within the memory that it promises."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

pytestmark = pytest.mark.full
MAX_BUILD_BYTES = 8e9


def command(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "wsi_rt.runtime.cli", *words], text=True, check=True, **options)


def peak_bytes() -> float:
    """The largest resident set of any child so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0


def test_the_7b_bundle_builds_in_8_gb_and_answers(tmp_path):
    engines, tokens = tmp_path / "engines", tmp_path / "tokens.pt"
    torch.save(torch.randn(576, 1024, generator=torch.Generator().manual_seed(0)), tokens)
    command("build-engines", "--checkpoint", "synthetic:wsi-llava-7b", "--precision", "int4", "--out", str(engines))
    built = peak_bytes()
    print(f"\nbuild: {built / 1e9:.2f} GB at most")
    assert built <= MAX_BUILD_BYTES
    words = ("ask", str(tokens), "What is the grade?", "--engines", str(engines), "--max-new-tokens", "64", "--json")
    answer = json.loads(command(*words, capture_output=True).stdout)
    print(answer["timings_ms"])
    assert len(answer["token_ids"]) == 64
    assert np.isfinite(list(answer["timings_ms"].values())).all()
    report = json.loads(command("verify", str(engines), "--json", capture_output=True).stdout)
    assert all(c["ok"] for c in report["components"].values())

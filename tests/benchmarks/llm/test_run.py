"""`wsi-rt bench llm` on a small bundle: every provider that is installed, the gate, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.benchmarks.llm import run
from wsi_rt.benchmarks.llm.cases import CASES, FAST, LLAMA_CPP, OURS, PEERS, PLAIN, TORCH, UNSHARED, Work, sequences
from wsi_rt.benchmarks.llm.files import GATE_STEPS, Files, reference_logits, source_of
from wsi_rt.benchmarks.llm.providers import NEEDS, Place
from wsi_rt.benchmarks.llm.run import Outcome, Plan, Runner, bench_model, merged, preset_of, worst_cosine
from wsi_rt.benchmarks.llm.worker import GATE, Found, run_job
from wsi_rt.runtime.errors import InputError, WsiRtError

WORK = Work(prefills=1, warm_steps=1, steps=2, batch_steps=2, answer=3, rounds=1)
VOCAB = 2048


@pytest.fixture(scope="session")
def engines(export_extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model of synthetic:nano in int4."""
    from wsi_rt.runtime.cli import run as wsi_rt

    out = tmp_path_factory.mktemp("bench") / "engines"
    words = ["build-engines", "--checkpoint", "synthetic:nano?seed=0", "--components", "llm", "--precision", "int4"]
    assert wsi_rt([*words, "--fast", "--threads", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def files(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files("nano", tmp_path_factory.mktemp("cache"), engines, 1)


@pytest.fixture(scope="session")
def reference() -> np.ndarray:
    c, source = source_of("synthetic:nano?seed=0")
    logits = reference_logits(c, source)
    assert logits.shape == (GATE_STEPS + 1, VOCAB)
    return logits


def job(what: str, provider: str, files: Files) -> dict:
    kind = NEEDS[provider][1]
    place = Place({kind: files.get(kind)}, 1, 1024, sequences(what, provider))
    return {"what": what, "provider": provider, "vocab": VOCAB, "work": asdict(WORK), "place": asdict(place)}


def plan(files: Files, **changes) -> Plan:
    return replace(Plan(files, "nano int4", ("load",), (OURS,), WORK, 1), **changes)


def installed(provider: str) -> str:
    if find_spec(NEEDS[provider][0]) is None or (provider.startswith(LLAMA_CPP) and find_spec("gguf") is None):
        pytest.skip(f"{provider} is not installed (the peers extra)")
    return provider


# The largest error of the logits: a peer's own 4 bits, ours, or none.
ERRORS = {
    OURS: (0.02, 0.25), FAST: (0.02, 0.25), TORCH: (0.02, 0.25), "openvino": (0.02, 0.25), "transformers": (0.0, 1e-5),
    "llama-cpp-python": (0.1, 0.4), "onnxruntime-genai": (0.1, 0.4),
}  # fmt: skip


@pytest.mark.parametrize("provider", ERRORS)
def test_every_provider_computes_the_same_model(files: Files, reference: np.ndarray, provider: str) -> None:
    found = run_job(job(GATE, installed(provider), files))
    logits = np.array(found.samples["logits"]).reshape(reference.shape)
    error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    least, most = ERRORS[provider]
    assert least <= error <= most
    assert worst_cosine(logits, reference) > 0.9
    assert found.weight_bytes > 2e6
    assert found.kv_bytes_per_token == 2 * 4 * 256 * (2 if provider == "llama-cpp-python" else 4)


@pytest.mark.parametrize("provider", [OURS, FAST, PLAIN, UNSHARED, TORCH, *PEERS])
def test_every_provider_answers_a_slide(files: Files, provider: str) -> None:
    found = run_job(job("slide-20q", installed(provider), files))
    assert sorted(map(len, found.tokens)) == [1] * 8 + [3] * 12
    assert len(found.samples["first_seconds"]) == 20
    assert 0 < max(found.samples["first_seconds"]) <= found.samples["seconds"][0]
    assert found.peak_rss_bytes > 1e7


@pytest.mark.parametrize("provider", [OURS, FAST, TORCH, LLAMA_CPP])
def test_a_batch_that_shares_a_prefix(files: Files, provider: str) -> None:
    found = run_job(job("decode-b20", installed(provider), files))
    assert len(found.samples["seconds"]) == WORK.batch_steps


def test_sharing_changes_how_a_slide_is_computed_not_what_is_answered(files: Files) -> None:
    """But where activations are rounded, a near tie may fall otherwise."""
    ours, shared, alone = (run_job(job("slide-20q", p, files)).tokens for p in (OURS, PLAIN, UNSHARED))
    assert ours == shared, "guessed tokens change no answer"
    assert sum(a == b for a, b in zip(shared, alone, strict=True)) >= 15
    assert len({tuple(t) for t in shared}) > 10


def test_keys_and_values_of_a_slide_are_held_once(files: Files) -> None:
    found = run_job(job("slide-20q", OURS, files))
    assert found.samples["kv_ratio"][0] <= 1.05
    whole = 20 * 611 * found.kv_bytes_per_token
    assert found.samples["kv_bytes"][0] < whole / 5


def test_a_case_that_a_provider_cannot_do_says_so(files: Files) -> None:
    found = run_job(job("decode-b20", UNSHARED, files))
    assert found.cannot == "does not decode a batch of sequences that share a prefix"


def test_logits_of_another_model_are_not_timed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same weights but for the order of the vocabulary: every figure else would look right."""

    def worker(self: Runner, what: str, provider: str, needed: dict) -> Found:
        assert what == GATE, "timed on a red gate"
        found = run_job(job(what, provider, files))
        logits = np.array(found.samples["logits"]).reshape(-1, VOCAB)
        return replace(found, samples={"logits": np.roll(logits, 1, axis=1).ravel().tolist()})

    monkeypatch.setattr(Runner, "worker", worker)
    outcome = Outcome()
    bench_model(plan(files, names=("load", "slide-20q"), providers=(OURS, PLAIN, UNSHARED)), outcome)
    red, *others = outcome.red
    assert [r.partition(": ")[0] for r in others] == [PLAIN, UNSHARED], "the same engine"
    assert re.match(r"wsi-rt: parity: cosine of the logits -?0\.0\d+, expected 0.5 or more", red)
    assert f"{OURS}: {next(r.skipped for r in outcome.rows if r.case == 'load')}" == red


def test_a_bench_in_processes_of_its_own(files: Files) -> None:
    outcome, steps = Outcome(), []
    several = plan(files, work=replace(WORK, rounds=2), names=("slide-20q", "load"))
    bench_model(several, outcome, lambda what, done, total: steps.append((what, done, total)))
    assert [s[1] for s in steps] == list(range(len(steps)))
    assert {s[2] for s in steps} == {len(steps)}
    assert not outcome.red
    assert not outcome.broken
    rows = {(r.case, r.provider, r.metric): r for r in outcome.rows}
    assert 0.02 < rows[GATE, OURS, "logit_error"].p50 < 0.25
    assert rows["load", OURS, "seconds"].n == 2
    assert rows["slide-20q", OURS, "seconds"].n == 1
    assert rows["load", OURS, "peak_rss_bytes"].p50 > 1e7


def test_what_is_not_installed_is_a_row_that_says_how_to_get_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    runner = Runner(plan(files), VOCAB)
    runner.examine("openvino")
    (row,) = runner.gate_rows(run.Bench("nano", source_of(files.word)[0], 1, WORK), "openvino")
    assert row.skipped == "openvino is not installed: pip install '.[peers]'"


def test_a_worker_that_fails_gives_its_last_line(files: Files, tmp_path: Path) -> None:
    runner = Runner(plan(files), VOCAB)
    found = runner.worker("load", OURS, {"bundle": str(tmp_path / "none")})
    assert found.cannot is not None
    assert "no engine bundle there" in found.cannot


def test_failures_of_ours_are_failures(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's are rows."""
    monkeypatch.setattr(Runner, "examine", lambda self, provider: self.why_not.update({provider: "did not run"}))
    monkeypatch.setattr(Runner, "worker", lambda self, *_: Found(cannot="no limits"))
    outcome = Outcome()
    bench_model(plan(files, providers=(OURS, "openvino")), outcome)
    assert outcome.broken == ["wsi-rt: did not run"]
    assert {r.provider for r in outcome.rows if r.skipped == "did not run"} == {OURS, "openvino"}


def test_files_are_asked_for_once_in_a_run(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of other code would be built again between two providers."""
    asked: list[str] = []
    real = Files.get
    monkeypatch.setattr(Files, "get", lambda self, kind: asked.append(kind) or real(self, kind))
    monkeypatch.setattr(Runner, "worker", lambda self, what, provider, needed: Found(cannot=str(needed)))
    runner = Runner(plan(files), VOCAB)
    for provider in (OURS, TORCH, "transformers"):
        runner.examine(provider)
    assert asked == ["reference", "bundle", "source"]
    assert runner.why_not[TORCH] == str({"bundle": str(files.engines)})


def test_rounds_are_merged() -> None:
    one, two = Found({"seconds": [1.0]}, peak_rss_bytes=9), Found({"seconds": [2.0]}, peak_rss_bytes=5)
    both = merged(merged(None, one), two)
    assert (both.samples, both.peak_rss_bytes) == ({"seconds": [1.0, 2.0]}, 9)
    failed = Found(cannot="why")
    assert merged(failed, one) is failed
    assert merged(one, failed) is failed


def test_a_bundle_of_other_weights_is_refused(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are given the preset's weights with seed 0."""
    assert preset_of(engines) == ("nano", "int4")
    with pytest.raises(InputError, match="no engine bundle"):
        preset_of(tmp_path / "none")
    manifest = run.load_manifest(engines)
    for label in ("synthetic:nano?seed=1", "/models/llava"):
        other = replace(manifest, source={**manifest.source, "label": label})
        monkeypatch.setattr(run, "load_manifest", lambda _, other=other: other)
        with pytest.raises(InputError, match=f"has llm of {re.escape(label)}, expected an llm of synthetic:<preset>"):
            preset_of(engines)


def test_files_that_cannot_be_made_say_why(tmp_path: Path) -> None:
    with pytest.raises(WsiRtError, match=r"making the reference failed: .*'none'|making the reference failed: .*none"):
        Files("none", tmp_path).get("reference")


@pytest.mark.slow
def test_the_command_builds_what_it_needs_and_prints_one_object(wsi_rt_process, tmp_path: Path) -> None:
    words = ["bench", "llm", "--quick", "--cache", tmp_path, "--threads", "1", "--json"]
    words += [w for case in ("slide-20q", "decode-b1") for w in ("--case", case)]
    words += ["--provider", OURS, "--provider", UNSHARED]
    done = wsi_rt_process(*words, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert {r["case"] for r in rows} == {GATE, "slide-20q", "decode-b1"} <= {GATE, *CASES}
    assert {r["provider"] for r in rows} == {OURS, UNSHARED, "limit"}
    assert {r["model"] for r in rows} == {"nano int4"}
    by = {(r["case"], r["provider"], r["metric"]): r for r in rows}
    tpot = by["decode-b1", OURS, "tpot_seconds"]
    assert tpot["p50"] <= tpot["p90"] <= tpot["p99"]
    assert tpot["n"] == 16
    assert by["slide-20q", OURS, "kv_ratio"]["p50"] <= 1.05
    speedup = by["slide-20q", OURS, "speedup"]
    assert speedup["note"].startswith("over wsi-rt:unshared")
    ratio = by["slide-20q", UNSHARED, "seconds"]["p50"] / by["slide-20q", OURS, "seconds"]["p50"]
    assert speedup["p50"] == pytest.approx(ratio)

"""The bench of the kernels: what is timed passed the gate, what is not says why, nothing is claimed without a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from time import perf_counter

import pytest

from wsi_rt.benchmarks.kernels import run
from wsi_rt.benchmarks.kernels.cases import CASES, PROVIDERS, Case, chosen
from wsi_rt.kernels.gpus import GPUS
from wsi_rt.runtime.errors import InputError


@pytest.fixture(scope="session")
def has_gpu():
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    return torch.cuda.is_available()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(run, "_gpu", lambda: (None, run.NOT_RUN))


@pytest.fixture
def operators(monkeypatch):
    """The table of operators, for a test to change."""
    pytest.importorskip("torch", reason="the export extra is not installed")
    from wsi_rt.benchmarks.kernels import operators

    monkeypatch.setattr(operators, "OPERATORS", dict(operators.OPERATORS))
    return operators


def seconds(function, repeats):
    """The wall clock: the timer of the bench needs a GPU."""
    out = []
    for _ in range(repeats):
        start = perf_counter()
        function()
        out.append(perf_counter() - start)
    return out


def run_on_cpu(case):
    import torch

    outcome = run.Outcome()
    run.run_case(case, torch.device("cpu"), seconds, 2, outcome)
    return outcome


def answer(operators, op, provider, change):
    """Replace what one provider answers: `change` of its answer."""
    operator = operators.OPERATORS[op]
    before = operator.providers[provider]

    def changed(inputs):
        plain = before(inputs)
        return lambda: change(plain())

    operators.OPERATORS[op] = replace(operator, providers={**operator.providers, provider: changed})


# --- cases


def test_the_smallest_cases_are_quick():
    assert {(c.op, c.size) for c in chosen((), quick=True)} == {
        ("block_linear", 1), ("dilated_attention", 1000), ("pool_norm_pad", 1000), ("rms_norm", 1),
        ("rope_kv_write", 1), ("shared_prefix_attention", 1), ("slide_embed", 1000), ("swiglu", 1),
        ("tile_normalize", 256),
    }  # fmt: skip
    assert chosen((), quick=False) == list(CASES)
    assert len(chosen(["dilated_attention"], quick=True)) == 2  # fp16 and bf16
    assert [c.name for c in chosen(["slide_embed-10000-fp16"], quick=False)] == ["slide_embed-10000-fp16"]


def test_cases_and_operators_name_the_same_providers(operators):
    assert {op: tuple(o.providers) for op, o in operators.OPERATORS.items()} == PROVIDERS
    assert all(o.eager in o.providers for o in operators.OPERATORS.values())


# --- without a GPU


def test_without_a_gpu_every_provider_says_so_and_the_roofline_is_a_prediction(no_gpu):
    rows = run.bench_kernels(sms=(80, 90)).rows
    assert {r.skipped for r in rows if r.provider != "limit"} == {"not run on a GPU yet"}
    assert {(r.case, r.provider) for r in rows} == {(c.name, p) for c in CASES for p in (*c.providers, "limit")}
    limits = [r for r in rows if r.provider == "limit"]
    assert len(limits) == 2 * len(CASES)
    assert all(r.note.startswith("predicted") and r.n == 0 and r.p99 is None and r.p50 > 0 for r in limits)


def test_the_roofline_is_work_over_the_published_peak(no_gpu):
    case = Case("dilated_attention", 10_000, "fp16")
    (limit,) = [r for r in run.bench_kernels([case.name]).rows if r.provider == "limit"]
    assert limit.device == "H100 SXM (sm_90)"
    assert limit.p50 == pytest.approx(case.cost.flops / (GPUS[90].half_tflops * 1e12))


def test_without_torch_the_roofline_is_still_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = run.bench_kernels(["tile_normalize"]).rows
    assert {r.skipped for r in rows} == {"not run on a GPU yet: torch is not installed", None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["tile_normalise"]}, "--case tile_normalise is unknown, expected an operator or a case"),
        ({"sms": (75, 90)}, "--sm 75 is no shipped architecture, expected some of 80, 86"),
    ],
)
def test_unknown_names_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        run.bench_kernels(**arguments)


def test_the_command_without_a_gpu_ends_well(wsi_rt, has_gpu):
    if has_gpu:
        pytest.skip("there is a GPU: test_on_a_gpu runs instead")
    done = wsi_rt("bench", "kernels", "--quick", "--json", "--sm", "90,120")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert set(report) == {"machine", "versions", "commit", "rows"}
    assert report["machine"]["gpus"] == []
    assert {r.get("skipped") for r in report["rows"]} == {"not run on a GPU yet", None}
    assert all("predicted" in r["note"] for r in report["rows"] if "skipped" not in r)

    shown = wsi_rt("bench", "kernels", "--case", "tile_normalize")
    assert shown.code == 0
    assert "not run on a GPU yet" in shown.out
    assert "predicted" in shown.out


@pytest.mark.gpu
def test_on_a_gpu(wsi_rt, has_gpu):
    """No red gate, and everything of ours is timed; peers may be absent."""
    if not has_gpu:
        pytest.skip("no NVIDIA GPU")
    done = wsi_rt("bench", "kernels", "--quick", "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)["rows"]
    ours = [r for r in rows if r["provider"] == "wsi-rt"]
    assert ours
    assert not [r for r in ours if "skipped" in r]
    limits = {r["case"]: r["p50"] for r in rows if r["provider"] == "limit"}
    # A third: the peaks are of one GPU of the architecture, and another has up to twice the memory bandwidth.
    assert all(r["n"] >= 20 and r["p50"] > limits[r["case"]] / 3 for r in ours if r["metric"] == "seconds")


# --- the gate, with real operators on the CPU


@pytest.mark.parametrize("op", PROVIDERS)
def test_what_agrees_is_timed(op, operators, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    case = Case(op, 40 if op != "tile_normalize" else 1, "fp16")
    outcome = run_on_cpu(case)
    assert (outcome.red, outcome.broken) == ([], [])
    timed = [r for r in outcome.rows if not r.skipped]
    assert {r.provider for r in timed} == set(case.providers) - {"flash-attn"}
    assert {r.metric for r in timed} == {"seconds", case.metric}
    assert all(r.n == 2 and r.p50 > 0 for r in timed)
    (absent,) = [r.skipped for r in outcome.rows if r.skipped] or [None]
    assert absent is None or "pip install flash-attn" in absent


@pytest.mark.parametrize("provider", ["wsi-rt", "reference"])
def test_a_wrong_answer_is_not_timed(provider, operators):
    answer(operators, "pool_norm_pad", provider, lambda y: y.roll(1, 0))
    outcome = run_on_cpu(Case("pool_norm_pad", 600, "fp16"))
    (row,) = [r for r in outcome.rows if r.provider == provider]
    assert row.skipped.startswith("parity: largest error")
    assert row.p50 is None
    # The wrong eager answer is the yardstick of this operator, and yet excuses nothing.
    assert len(outcome.red) == (1 if provider == "wsi-rt" else 0)
    assert [r.provider for r in outcome.rows if r.p50] == [p for p in ("wsi-rt", "reference") if p != provider] * 2


@pytest.mark.parametrize(
    "change",
    [lambda y: y * float("nan"), lambda y: y[1:], lambda y: y * 1.01],
    ids=["nan", "another-shape", "one-percent"],
)
def test_ours_is_red_when_it_is_off(change, operators):
    answer(operators, "dilated_attention", "wsi-rt", change)
    outcome = run_on_cpu(Case("dilated_attention", 40, "fp16"))
    assert len(outcome.red) == 1
    assert not [r for r in outcome.rows if r.provider == "wsi-rt" and r.p50]


def test_what_fails_says_why_and_the_others_still_run(operators):
    def broken(y):
        raise RuntimeError("no kernel\nimage")

    answer(operators, "slide_embed", "wsi-rt", broken)
    outcome = run_on_cpu(Case("slide_embed", 10, "fp16"))
    assert outcome.broken == ["slide_embed-10-fp16: RuntimeError: no kernel image"]
    assert [r.provider for r in outcome.rows if r.p50] == ["reference", "reference"]


@pytest.mark.parametrize(("red", "broken", "code"), [(["a: b"], [], 5), ([], ["a: b"], 1)], ids=["red", "broken"])
def test_the_command_fails_where_ours_did(red, broken, code, wsi_rt, monkeypatch):
    monkeypatch.setattr(run, "bench_kernels", lambda *a: run.Outcome(rows=[], red=red, broken=broken))
    done = wsi_rt("bench", "kernels")
    assert done.code == code
    assert done.err.count("\n") == 1
    assert "a: b" in done.err

"""The bench: every provider's logits are held against the fp32 reference, then it is timed, in fresh processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm import cases
from wsi_rt.benchmarks.llm.cases import LEFT_OUT, LIMIT, LIMITED, OURS, PEERS, PLAIN, UNSHARED, Work
from wsi_rt.benchmarks.llm.files import PRECISION, Files, source_of
from wsi_rt.benchmarks.llm.providers import NEEDS, Place
from wsi_rt.benchmarks.llm.rows import Bench, comparison_rows
from wsi_rt.benchmarks.llm.worker import GATE, LIMITS, Found
from wsi_rt.benchmarks.report import Outcome, Row
from wsi_rt.export.sources.presets import PRESETS
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.manifest import load_manifest

# Of the worst row of logits and the reference's. Another model's are at 0; wsi-rt's int4 is at 0.97 and Q4_0 at 0.93 on
# the 4-layer preset.
MIN_COSINE = 0.5
DEFAULT_PRESETS, QUICK_PRESETS = ("wsi-llava-1b", "wsi-llava-7b"), ("nano",)
# Whose logits are held against the reference once for all of them.
SAME_ENGINE = {PLAIN: OURS, UNSHARED: OURS, cases.LLAMA_CPP_BATCHED: cases.LLAMA_CPP}
MAY_REFUSE = (*PEERS, cases.FAST, cases.TORCH)
CONTEXT = 1024  # tokens of a sequence: prompt and answer of every case
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is run of one model."""

    files: Files
    model: str
    names: Sequence[str]
    providers: Sequence[str]
    work: Work
    threads: int


def bench_model(plan: Plan, outcome: Outcome, on_step: Progress = lambda what, done, total: None) -> None:
    """Adds the rows of one model. Raises WsiRtError when its bundle or the reference cannot be made."""
    config, _ = source_of(plan.files.word)
    bench = Bench(plan.model, config, plan.threads, plan.work)
    jobs = [(case, p) for case in plan.names for p in plan.providers if case not in LEFT_OUT.get(p, ())]
    rounds = {case: 1 if case == cases.SLIDE else plan.work.rounds for case in plan.names}
    total, done = sum(rounds[case] for case, _ in jobs) + len(plan.providers) + 1, 0

    def step(what: str) -> None:
        nonlocal done
        on_step(f"{plan.model}: {what}", done, total)
        done += 1

    run = Runner(plan, config.vocab)
    for provider in plan.providers:
        step(f"{provider}: logits")
        run.examine(provider)
    outcome.rows += [r for p in plan.providers for r in run.gate_rows(bench, p)]
    found: dict[tuple[str, str], Found] = {}
    for case in plan.names:
        for _ in range(rounds[case]):
            for provider in [p for c, p in jobs if c == case]:
                step(f"{case}: {provider}")
                found[case, provider] = merged(found.get((case, provider)), run.measure(case, provider))
        for provider in [p for c, p in jobs if c == case]:
            outcome.rows += _rows(bench, case, provider, found[case, provider])
        ran = {p: f for (c, p), f in found.items() if c == case and f.cannot is None}
        outcome.rows += comparison_rows(bench, case, ran)
    step(LIMIT)
    if set(plan.names) & set(LIMITED):
        ours = {case: f for (case, p), f in found.items() if p == OURS and f.cannot is None}
        outcome.rows += bench.limit_rows(plan.names, run.worker(LIMITS, OURS, {}), ours)
    _judge(run, found, outcome)


def _rows(bench: Bench, case: str, provider: str, found: Found) -> list[Row]:
    if found.cannot is not None:
        return [bench.row(case, provider, "seconds", "s", skipped=found.cannot)]
    return bench.rows(case, provider, found)


def _judge(run: Runner, found: dict[tuple[str, str], Found], outcome: Outcome) -> None:
    """What a peer, or the torch decoder with a large model, does not do is a row; what others of ours do not, a
    failure."""
    outcome.red += [f"{p}: {why}" for p, why in run.why_not.items() if p in run.red and p not in PEERS]
    ours = {p: why for p, why in run.why_not.items() if p not in MAY_REFUSE and p not in run.red}
    outcome.broken += [f"{p}: {why}" for p, why in ours.items()]
    failed = {(c, p): f.cannot for (c, p), f in found.items() if f.cannot and p not in MAY_REFUSE}
    outcome.broken += [f"{c} of {p}: {why}" for (c, p), why in failed.items() if p not in run.why_not]


def merged(one: Found | None, other: Found) -> Found:
    """The samples of both rounds; of what a process has one figure of, the larger."""
    if one is None or one.cannot is not None:
        return other if one is None else one
    if other.cannot is not None:
        return other
    samples = {name: [*one.samples[name], *other.samples[name]] for name in one.samples}
    other.samples, other.peak_rss_bytes = samples, max(one.peak_rss_bytes, other.peak_rss_bytes)
    return other


class Runner:
    """Runs jobs in worker processes. why_not: providers that are not timed, and why; red: those of them that answer
    as another model would."""

    def __init__(self, plan: Plan, vocab: int) -> None:
        self._plan, self._vocab = plan, vocab
        self.why_not: dict[str, str] = {}
        self.red: set[str] = set()
        self._files: dict[str, str] = {}
        self._errors: dict[str, float] = {}

    def examine(self, provider: str) -> None:
        """Its package, its file, its logits: what is amiss goes into `why_not`."""
        module, kind = NEEDS[provider]
        if find_spec(module) is None:
            self.why_not[provider] = f"{module} is not installed: pip install '.[peers]'"
            return
        try:
            reference = np.load(self._file("reference"))
            file = self._file(kind)
        except WsiRtError as e:
            if kind in ("bundle", "source"):
                raise
            self.why_not[provider] = str(e)
            return
        same = SAME_ENGINE.get(provider)
        if same in self.why_not:
            self.why_not[provider] = self.why_not[same]
            self.red |= {provider} if same in self.red else set()
        if same in (*self.why_not, *self._errors):
            return
        found = self.worker(GATE, provider, {kind: file})
        if found.cannot is not None:
            self.why_not[provider] = found.cannot
            return
        logits = np.array(found.samples["logits"]).reshape(reference.shape)
        self._errors[provider] = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
        cosine = worst_cosine(logits, reference)
        if not cosine >= MIN_COSINE:  # NaN too
            self.red.add(provider)
            self.why_not[provider] = f"parity: cosine of the logits {cosine:.3g}, expected {MIN_COSINE} or more"

    def gate_rows(self, bench: Bench, provider: str) -> list[Row]:
        """How far its logits are from the fp32 model's: the norm of the difference over the norm."""
        if provider in self._errors:
            note = "against the fp32 checkpoint: rounded weights and what the engine rounds"
            return [bench.row(GATE, provider, "logit_error", "", p50=self._errors[provider], note=note)]
        if provider in self.why_not:
            return [bench.row(GATE, provider, "logit_error", "", skipped=self.why_not[provider])]
        return []

    def measure(self, case: str, provider: str) -> Found:
        if provider in self.why_not:
            return Found(cannot=self.why_not[provider])
        kind = NEEDS[provider][1]
        return self.worker(case, provider, {kind: self._file(kind)})

    def _file(self, kind: str) -> str:
        """Made once in a run: whether a bundle is of this code is asked at its start."""
        if kind not in self._files:
            self._files[kind] = self._plan.files.get(kind)
        return self._files[kind]

    def worker(self, what: str, provider: str, files: dict[str, str]) -> Found:
        plan = self._plan
        place = Place(files, plan.threads, CONTEXT, cases.sequences(what, provider))
        job: dict[str, Any] = {"what": what, "provider": provider, "vocab": self._vocab}
        job |= {"work": asdict(plan.work), "place": asdict(place)}
        with TemporaryDirectory() as aside:
            out = Path(aside) / "found.json"
            done = subprocess.run(
                [sys.executable, "-m", "wsi_rt.benchmarks.llm.worker"],
                input=json.dumps({**job, "out": str(out)}), capture_output=True, text=True, check=False,
                env={**os.environ, "OMP_NUM_THREADS": str(plan.threads), "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
            if done.returncode or not out.is_file():
                said = [line for line in done.stderr.splitlines() if line.strip()]
                return Found(cannot=f"failed: {said[-1][:200]}" if said else f"ended with {done.returncode}")
            return Found(**json.loads(out.read_text()))


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the rows [N, C] of two arrays."""
    return float(((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min())


def bench_llm(
    names: Sequence[str],
    providers: Sequence[str],
    presets: Sequence[str],
    engines: Path | None,
    cache: Path,
    threads: int,
    quick: bool,
    on_step: Progress = lambda what, done, total: None,
) -> Outcome:
    """Every chosen case of every chosen preset. engines: a bundle to use instead of one built into `cache`, whose
    preset is then the only one. Raises InputError on an unknown name or a bundle of other weights, WsiRtError when a
    bundle cannot be made."""
    chosen, runners = cases.chosen(names), cases.chosen_providers(providers)
    outcome = Outcome()
    if engines is not None:
        preset, precision = preset_of(engines)
        presets = (preset,)
    elif unknown := [p for p in presets if p not in PRESETS]:
        raise InputError(f"--preset {', '.join(unknown)} is unknown, expected some of: {', '.join(PRESETS)}")
    else:
        precision = PRECISION
    for preset in presets or (QUICK_PRESETS if quick else DEFAULT_PRESETS):
        files = Files(preset, cache, engines, threads)
        plan = Plan(files, f"{preset} {precision}", chosen, runners, Work.of(quick), threads)
        bench_model(plan, outcome, on_step)
    return outcome


def peer_versions() -> dict[str, str]:
    """Of the peers that are installed here."""
    found = {}
    for peer in (*PEERS, "gguf"):
        with suppress(PackageNotFoundError):
            found[peer] = version(peer)
    return found


def preset_of(engines: Path) -> tuple[str, str]:
    """The preset and the language model's precision of a bundle. Raises InputError when peers cannot be given its
    weights, since it was not built from a preset with seed 0."""
    manifest = load_manifest(engines)
    found = re.fullmatch(r"synthetic:(.+)\?seed=0", manifest.source["label"])
    if found is None or found[1] not in PRESETS or "llm" not in manifest.components:
        raise InputError(
            f"--engines {engines} has {', '.join(manifest.components)} of {manifest.source['label']}, expected an llm "
            "of synthetic:<preset>?seed=0: wsi-rt build-engines --checkpoint synthetic:nano --components llm --out DIR"
        )
    return found[1], manifest.components["llm"].compiled(manifest.targets[0]).precision

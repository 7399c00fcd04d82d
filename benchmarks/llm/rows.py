"""Samples -> rows: rates, bytes and operations of a case's work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsi_rt.benchmarks.llm import cases
from wsi_rt.benchmarks.llm.cases import LIMIT, OURS, Work
from wsi_rt.benchmarks.llm.limits import GEMMS
from wsi_rt.benchmarks.llm.worker import BATCH_QUESTION, Found
from wsi_rt.benchmarks.report import Row, percentiles

if TYPE_CHECKING:
    from wsi_rt.export.arch import LlamaConfig


@dataclass(frozen=True)
class LlmRow(Row):
    """A row of one language model. model: its preset and the precision of our bundle."""

    model: str = ""


@dataclass(frozen=True)
class Bench:
    """What all rows of one model share."""

    model: str
    config: LlamaConfig
    threads: int
    work: Work

    def row(self, case: str, provider: str, metric: str, unit: str, samples: Sequence[float] = (), **rest: Any) -> Row:
        figures = percentiles(samples) if len(samples) else {}
        return LlmRow(
            "llm", case, provider, metric, unit, threads=self.threads, model=self.model, **{**figures, **rest}
        )

    def rows(self, case: str, provider: str, found: Found) -> list[Row]:
        """Everything that one case's samples tell. The first row carries the note."""
        seconds, note = found.samples["seconds"], found.note or None
        if case == cases.PREFILL:
            flops = prompt_flops(self.config, cases.PROMPT)
            rows = [self.row(case, provider, "ttft_seconds", "s", seconds, note=note)]
            rows += self._rate(case, provider, "tokens_per_s", "1/s", seconds, cases.PROMPT)
            rows += self._rate(case, provider, "gflops", "GFLOP/s", seconds, flops / 1e9)
        elif case in (cases.DECODE, cases.BATCH):
            rows = self._step_rows(case, provider, found, note)
        elif case == cases.SLIDE:
            rows = self._slide_rows(provider, found, note)
        else:
            rows = [
                self.row(case, provider, "seconds", "s", seconds, note=note or "to the first token, files in cache")
            ]
        peak = [float(found.peak_rss_bytes)] if found.peak_rss_bytes else []
        return rows + ([self.row(case, provider, "peak_rss_bytes", "B", peak)] if peak else [])

    def _step_rows(self, case: str, provider: str, found: Found, note: str | None) -> list[Row]:
        seconds, batch = found.samples["seconds"], 20 if case == cases.BATCH else 1
        step = step_bytes(case, self.work, found)
        return [
            self.row(case, provider, "tpot_seconds", "s", seconds, note=note),
            *self._rate(case, provider, "tokens_per_s", "1/s", seconds, batch),
            self.row(case, provider, "bytes_per_token", "B", p50=step / batch),
            *self._rate(case, provider, "gbytes_per_s", "GB/s", seconds, step / 1e9),
        ]

    def _slide_rows(self, provider: str, found: Found, note: str | None) -> list[Row]:
        seconds, tokens = found.samples["seconds"], sum(len(t) for t in found.tokens)
        rows = [
            self.row(cases.SLIDE, provider, "seconds", "s", seconds, note=note),
            *self._rate(cases.SLIDE, provider, "tokens_per_s", "1/s", seconds, tokens),
            self.row(cases.SLIDE, provider, "ttft_seconds", "s", found.samples["first_seconds"]),
        ]
        units = {"kv_bytes": "B", "kv_ratio": "x", "grown_bytes": "B"}
        return rows + [
            self.row(cases.SLIDE, provider, metric, unit, found.samples[metric])
            for metric, unit in units.items()
            if metric in found.samples
        ]

    def _rate(
        self, case: str, provider: str, metric: str, unit: str, seconds: Sequence[float], amount: float
    ) -> list[Row]:
        return [self.row(case, provider, metric, unit, [amount / s for s in seconds])]

    def limit_rows(self, names: Sequence[str], limits: Found, ours: dict[str, Found]) -> list[Row]:
        """What the machine reached in the same run, and what that allows our own bytes and operations."""
        rows: list[Row] = []
        if limits.cannot is not None:
            return [self.row(c, LIMIT, "seconds", "s", skipped=limits.cannot) for c in names if c in cases.LIMITED]
        if cases.PREFILL in names:
            flops = prompt_flops(self.config, cases.PROMPT)
            for kind in GEMMS:
                samples = limits.samples[f"gemm_{kind}_gflops"]
                allowed = cases.PROMPT / (flops / (percentiles(samples)["p50"] * 1e9))
                note = f"one {kind} matrix product of 640 rows; allows {allowed:.3g} tokens/s"
                rows.append(self.row(cases.PREFILL, LIMIT, "gflops", "GFLOP/s", samples, note=note))
        for case in (c for c in (cases.DECODE, cases.BATCH) if c in names):
            samples = limits.samples["read_gbytes_per_s"]
            rows.append(self.row(case, LIMIT, "gbytes_per_s", "GB/s", samples, note="reading memory"))
            if case in ours:
                batch, step = 20 if case == cases.BATCH else 1, step_bytes(case, self.work, ours[case])
                allowed = batch * percentiles(samples)["p50"] * 1e9 / step
                note = f"what that allows {OURS}'s bytes"
                rows.append(self.row(case, LIMIT, "tokens_per_s", "1/s", p50=allowed, note=note))
        return rows


def comparison_rows(bench: Bench, case: str, found: Mapping[str, Found]) -> list[Row]:
    """How many times less time wsi-rt takes than each of the others in one case; found: by provider, with samples."""
    if OURS not in found:
        return []
    own, rows = found[OURS], []
    for provider in (p for p in found if p != OURS):
        times = percentiles(found[provider].samples["seconds"])["p50"] / percentiles(own.samples["seconds"])["p50"]
        note = f"over {provider}"
        if case == cases.SLIDE:
            same = sum(a == b for a, b in zip(own.tokens, found[provider].tokens, strict=True))
            note += f"; {same} of {len(own.tokens)} answers are the same tokens"
        rows.append(bench.row(case, OURS, "speedup", "x", p50=times, note=note))
    return rows


def step_bytes(case: str, work: Work, found: Found) -> float:
    """What a step reads: the weights once, and every token's keys and values, a shared prefix's once."""
    if case == cases.DECODE:
        tokens = cases.PROMPT + work.warm_steps + work.steps / 2
    else:
        tokens = cases.SLIDE_PREFIX + 20 * (BATCH_QUESTION + work.warm_steps + work.batch_steps / 2)
    return found.weight_bytes + tokens * found.kv_bytes_per_token


def prompt_flops(c: LlamaConfig, tokens: int) -> float:
    """Of a prompt whose last logits are wanted: two for each weight and token, and causal attention's."""
    from wsi_rt.export.arch import LM_HEAD, linear_shapes

    linears = {name: math.prod(shape) for name, shape in linear_shapes(c).items()}
    head = linears.pop(LM_HEAD)
    attention = 2 * c.layers * c.heads * c.head_width * tokens * (tokens + 1)
    return 2.0 * (sum(linears.values()) * tokens + head) + attention

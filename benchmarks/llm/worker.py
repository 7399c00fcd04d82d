"""One measurement in a process of its own: a job in JSON on stdin, its result in JSON in the file that it names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm import cases
from wsi_rt.benchmarks.llm.cases import Work, token_ids
from wsi_rt.benchmarks.llm.files import gate_tokens
from wsi_rt.benchmarks.llm.providers import Place, open_model
from wsi_rt.benchmarks.llm.providers.base import CannotError, Model, seconds_of

GATE, LIMITS = "gate", "limits"
BATCH_QUESTION = 24  # tokens behind the prefix of each sequence of decode-b20


@dataclass
class Found:
    """samples: by what they are of, in seconds, bytes or none; peak_rss_bytes: of the whole process, mapped weights
    included. cannot: why there is nothing."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[list[int]] = field(default_factory=list)
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    peak_rss_bytes: int = 0
    note: str = ""
    cannot: str | None = None


def run_job(job: Mapping[str, Any]) -> Found:
    """job: what (a case, GATE or LIMITS), provider, vocab, work (of `Work`), place (of `Place`)."""
    if job["what"] == LIMITS:
        from wsi_rt.benchmarks.llm.limits import measured_limits

        return Found(samples=measured_limits(job["place"]["threads"], job["work"]["rounds"]))
    found = Found()
    try:
        start = perf_counter()
        model = open_model(job["provider"], Place(**job["place"]))
        opened = perf_counter() - start
        _JOBS[job["what"]](model, job["vocab"], Work(**job["work"]), found)
    except CannotError as e:
        return Found(cannot=str(e))
    if job["what"] == cases.LOAD:
        found.samples["seconds"] = [opened + found.samples.pop("first_step")[0]]
    found.weight_bytes = model.batch_weight_bytes if job["what"] == cases.BATCH else model.weight_bytes
    found.kv_bytes_per_token = model.kv_bytes_per_token
    found.note = "; ".join(filter(None, (model.note, found.note)))
    found.peak_rss_bytes = memory_bytes("VmHWM:")
    return found


def _gate(model: Model, vocab: int, work: Work, found: Found) -> None:
    found.samples["logits"] = model.teach(*gate_tokens(vocab)).ravel().tolist()


def _prefill(model: Model, vocab: int, work: Work, found: Found) -> None:
    ids = token_ids("prompt", cases.PROMPT, vocab)
    model.prefill(ids[:16])
    found.samples["seconds"] = [seconds_of(lambda: model.prefill(ids)) for _ in range(work.prefills)]


def _decode(model: Model, vocab: int, work: Work, found: Found) -> None:
    token = model.prefill(token_ids("prompt", cases.PROMPT, vocab))[None].argmax(-1)
    found.samples["seconds"] = _steps(model, token, work.warm_steps, work.steps)


def _batch(model: Model, vocab: int, work: Work, found: Found) -> None:
    questions = tuple(token_ids(f"batch.{i}", BATCH_QUESTION, vocab) for i in range(20))
    logits = model.shared(token_ids("prefix", cases.SLIDE_PREFIX, vocab), questions)
    found.samples["seconds"] = _steps(model, logits.argmax(-1), work.warm_steps, work.batch_steps)


def _steps(model: Model, ids: np.ndarray, warm: int, count: int) -> list[float]:
    """Greedy steps of all sequences -> seconds of each but the first `warm`."""
    seconds = []
    for _ in range(warm + count):
        start = perf_counter()
        ids = model.step(ids).argmax(-1)
        seconds.append(perf_counter() - start)
    return seconds[warm:]


def _slide(model: Model, vocab: int, work: Work, found: Found) -> None:
    model.prefill(token_ids("prompt", 16, vocab))
    slide = cases.slide(vocab, work.answer)
    before, start = memory_bytes("RssAnon:", "RssShmem:"), perf_counter()
    answers = model.answer_slide(slide)
    found.samples["seconds"] = [perf_counter() - start]
    found.samples["grown_bytes"] = [max(0.0, memory_bytes("RssAnon:", "RssShmem:") - before)]
    found.samples["first_seconds"] = answers.first_seconds
    found.tokens = answers.token_ids
    early = sum(len(t) < n for t, n in zip(answers.token_ids, slide.answers, strict=True))
    notes = [f"{answers.accepted} of {answers.drafted} guessed tokens right"] if answers.drafted else []
    notes += [f"{early} answers ended before {work.answer} tokens"] if early else []
    found.note = "; ".join(notes)
    if answers.kv_bytes is not None and answers.kv_needed_bytes:
        found.samples |= {
            "kv_bytes": [float(answers.kv_bytes)],
            "kv_ratio": [answers.kv_bytes / answers.kv_needed_bytes],
        }


def _load(model: Model, vocab: int, work: Work, found: Found) -> None:
    found.samples["first_step"] = [seconds_of(lambda: model.prefill(token_ids("prompt", 1, vocab)))]


_JOBS: dict[str, Callable[[Model, int, Work, Found], None]] = {
    GATE: _gate,
    cases.PREFILL: _prefill,
    cases.DECODE: _decode,
    cases.BATCH: _batch,
    cases.SLIDE: _slide,
    cases.LOAD: _load,
}


def memory_bytes(*fields: str) -> int:
    """The sum of these fields of this process: VmHWM is the most that was resident at once, mapped files included. 0
    where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(fields))


if __name__ == "__main__":
    given = json.load(sys.stdin)
    Path(given["out"]).write_text(json.dumps(asdict(run_job(given))))

"""Damaged slides against every reader: python tests/runtime/slides/fuzz/run.py --count 2000 --seed 0

Each case is one damaged copy of a seed slide, read by our readers in a process of its own and then by OpenSlide on
the same bytes in another. A finding is a crash, a hang (> 30 s), more than 2 GB, an exception that is no SlideError,
pixels that differ from OpenSlide's, or a level less. Where OpenSlide gives an error, or drops a level, and we give
pixels, they have to be those of the slide with its header mended ("salvaged" in the summary). Findings are kept in
--out with their bytes; `--only N` runs case N again. Exit code 1 when there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mutate import mutate
from read import MEMORY_BYTES, Outcome, apart, digest, read_openslide, read_ours
from seeds import Seed, write_seeds


@dataclass
class Case:
    """One damaged slide and what came of it."""

    number: int
    seed_slide: str
    reader: str | None
    damage: str
    digest: str
    ours: str = ""
    openslide: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    openslide_seconds: float = 0.0
    openslide_megabytes: float = 0.0
    findings: list[str] = field(default_factory=list)


def run_case(number: int, seed: int, seeds: list[Seed], out: Path | None) -> Case:
    """Damage one seed slide, read it both ways, judge."""
    rng = np.random.default_rng((seed, number))
    chosen = seeds[rng.integers(0, len(seeds))]
    reader = chosen.readers[rng.integers(0, len(chosen.readers))]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        files = {path.name: path.read_bytes() for path in chosen.files}
        target = chosen.files[rng.integers(0, len(chosen.files))].name
        data, damage = mutate(files[target], rng)
        for name, content in {**files, target: data}.items():
            (Path(folder) / name).write_bytes(content)
        path = Path(folder) / chosen.files[0].name if len(files) == 1 or rng.random() < 0.5 else Path(folder)
        case = Case(number, chosen.name, reader, damage, digest(data))
        result = Path(folder) / "result.pickle"
        ours = apart(partial(read_ours, path, reader, number), result)
        case.seconds, case.megabytes = round(ours.seconds, 2), round(ours.bytes / 2**20)
        judge_alone(case, ours)
        if ours.found.get("levels") and chosen.oracle:
            slide = path if path.is_file() else path / chosen.files[0].name
            theirs = apart(partial(read_openslide, slide, ours.found["levels"], number), result)
            note_openslide(case, theirs)
            mended = Path(folder) / "mended"
            mended.mkdir()
            for name, content in {**files, target: with_whole_header(files[target], data)}.items():
                (mended / name).write_bytes(content)
            whole = apart(partial(read_openslide, mended / chosen.files[0].name, ours.found["levels"], number), result)
            compare(case, ours, theirs, whole)
        elif chosen.oracle and number % 4 == 0:  # what OpenSlide does by itself with such files
            theirs = apart(partial(read_openslide, path, [], number), result)
            note_openslide(case, theirs)
            case.openslide = theirs.ended if theirs.ended != "done" else "did not crash"
        if case.findings and out is not None:
            (out / f"case-{number}-{target}").write_bytes(data)
    return case


def with_whole_header(original: bytes, damaged: bytes) -> bytes:
    """A DICOM file with its header mended and its pixel data as damaged; of other files the undamaged bytes.

    A changed bit in a frame decodes to other pixels without an error, in OpenSlide as in ours.
    """
    pixels = original.find(b"\xe0\x7f\x10\x00OB")  # the tag of the pixel data, explicit little endian
    if pixels < 0 or len(original) != len(damaged):
        return original
    return original[: pixels + 12] + damaged[pixels + 12 :]


def note_openslide(case: Case, theirs: Outcome) -> None:
    case.openslide_seconds, case.openslide_megabytes = round(theirs.seconds, 2), round(theirs.bytes / 2**20)


def judge_alone(case: Case, ours: Outcome) -> None:
    case.ours = ours.ended
    if ours.ended != "done":
        case.findings.append(f"ours ended with {ours.ended} after {ours.seconds:.1f} s")
    if ours.bytes > MEMORY_BYTES:
        case.findings.append(f"ours took {ours.bytes / 2**30:.1f} GiB")
    if "raised" in ours.found:
        case.ours = "raised"
        case.findings.append(f"not a SlideError: {ours.found['raised']} | {ours.found['trace']}")
    if "refused" in ours.found:
        case.ours = "refused"
    if "regions" in ours.found:
        bad = sum(isinstance(found, str) for _, found in ours.found["regions"])
        case.ours = f"read by {ours.found['name'].split()[0]}" + (", some regions refused" if bad else "")


def compare(case: Case, ours: Outcome, theirs: Outcome, whole: Outcome) -> None:
    """Pixels of ours that OpenSlide gives neither for the same bytes nor, if it gives none, for the mended slide."""
    good = [(place, found) for place, found in ours.found["regions"] if not isinstance(found, str)]
    case.openslide = theirs.ended if theirs.ended != "done" else "refused" if "refused" in theirs.found else "read"
    if missing := [level for level in theirs.found.get("levels", ()) if level not in ours.found["levels"]]:
        case.findings.append(f"levels {ours.found['levels']}, OpenSlide has {missing} too")
    want, undamaged = dict(theirs.found.get("regions", ())), dict(whole.found.get("regions", ()))
    for place, pixels in good:
        expected = want.get(place, theirs.found.get("refused", "no such level"))
        if not isinstance(expected, str):
            if not np.array_equal(pixels, expected):
                off = np.abs(pixels.astype(int) - expected).max(axis=2)
                case.findings.append(f"pixels differ at {place}: {(off > 0).sum()} px, up to {off.max()}")
        elif np.array_equal(pixels, undamaged.get(place)):
            case.openslide = case.openslide.removesuffix(", salvaged") + ", salvaged"
        elif case.reader == "cucim":  # pinned by choice; its notes say that it takes cut-off tiles without a word
            case.openslide = "cucim: no error, as its notes say"
        else:
            case.findings.append(f"pixels at {place}, not those of the mended slide; OpenSlide: {expected[:200]}")


def run_all(numbers: list[int], seed: int, jobs: int, out: Path | None) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        seeds = write_seeds(Path(folder))
        work = partial(run_case, seed=seed, seeds=seeds, out=out)
        if jobs == 1:
            yield from map(work, numbers)
            return
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(work, numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="folder for findings")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = list(range(arguments.count)) if arguments.only is None else [arguments.only]
    tally: dict[str, Counter[Any]] = {"ours": Counter(), "openslide": Counter(), "seeds": Counter()}
    cases, most = [], dict.fromkeys(("seconds", "megabytes", "openslide_seconds", "openslide_megabytes"), 0.0)
    for case in run_all(numbers, arguments.seed, arguments.jobs, arguments.out):
        tally["ours"][case.ours] += 1
        tally["openslide"][case.openslide or "not asked"] += 1
        tally["seeds"][case.seed_slide] += 1
        most = {name: max(value, getattr(case, name)) for name, value in most.items()}
        if case.findings:
            cases.append(asdict(case))
            sys.stderr.write(json.dumps(asdict(case)) + "\n")
    summary = {
        "cases": len(numbers),
        "seed": arguments.seed,
        **{name: dict(counter.most_common()) for name, counter in tally.items()},
        "most": most,
        "findings": len(cases),
    }
    if arguments.out:
        (arguments.out / "findings.json").write_text(json.dumps({**summary, "cases_with_findings": cases}, indent=1))
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    return 1 if cases else 0


if __name__ == "__main__":
    sys.exit(main())

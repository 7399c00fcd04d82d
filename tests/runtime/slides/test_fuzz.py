"""Damaged slides: a short run of the fuzzer, and that it sees what it is there to see. Long: make fuzz-slides."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "fuzz"
MODULES = ("mutate", "read", "seeds", "run")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer counts on Linux's limits and fork")


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The fuzzer's modules, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield modules()
    for name in MODULES:
        sys.modules.pop(name, None)


def modules() -> SimpleNamespace:
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def test_damaged_slides_are_refused_or_read_as_openslide_reads_them(tmp_path: Path) -> None:
    """100 of them over all readers and formats."""
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--count", "100", "--seed", "7", "--jobs", "2", "--out", tmp_path],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary["cases"] == sum(summary["ours"].values()) == 100
    assert summary["ours"]["refused"] > 10
    assert sum(n for how, n in summary["ours"].items() if how.startswith("read by")) > 30
    assert summary["openslide"].get("read", 0) > 20  # something was compared
    assert summary["most"]["seconds"] < 30
    assert summary["most"]["megabytes"] < 2048


def test_the_same_number_gives_the_same_damage(fuzz: SimpleNamespace) -> None:
    data = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    made = [[fuzz.mutate.mutate(data, np.random.default_rng((seed, n))) for n in range(60)] for seed in (0, 0, 1)]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert {kind for _, kind in made[0]} == {"flip", "flip-head", "truncate", "header", "marker", "block"}
    assert all(damaged != data for damaged, kind in made[0] if kind == "flip-head")


def test_directories_of_a_tiff_are_found(fuzz: SimpleNamespace, tmp_path: Path) -> None:
    from wsi_rt.runtime.slides.synth import write_synth_slide

    for layout in ({}, {"bigtiff": False}, {"big_endian": True}):
        path = write_synth_slide(tmp_path / "s.svs", width=300, height=300, levels=(1, 2), **layout)
        entries = fuzz.mutate.tiff_entries(path.read_bytes())
        assert [tag for _, tag, *_ in entries].count(324) == 2
    assert fuzz.mutate.tiff_entries(b"no TIFF at all, but long enough") == []


def crash() -> dict:
    faulthandler.disable()  # pytest's would tell of it as if it were the tests' own
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hang() -> dict:
    time.sleep(100)
    return {}


def hoard() -> dict:
    np.ones(300 << 20, np.uint8)
    return {}


def wrong() -> dict:
    raise KeyError("surprise")


def test_what_a_process_may_do(tmp_path: Path) -> None:
    """Real crashes, hangs and hoards end in findings; an answer does not. In a process of its own: a fork begins with
    what its parent holds, and after some hundred tests that is more than the bound."""
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def judge_processes(fuzz: SimpleNamespace, folder: Path) -> None:
    fuzz.read.SECONDS = -2  # and 5 more
    fuzz.run.MEMORY_BYTES = 280 << 20
    expected = {
        crash: "ours ended with SIGSEGV",
        hang: "ours ended with hang",
        hoard: "ours took 0.",
        wrong: "not a SlideError: KeyError: 'surprise'",
        dict: None,
    }
    for work, finding in expected.items():
        case = fuzz.run.Case(0, "s", None, "flip", "d")
        fuzz.run.judge_alone(case, fuzz.read.apart(work, folder / "result"))
        assert [f[: len(finding or "")] for f in case.findings] == ([finding] if finding else []), work


PLACE = ((0, 0), 0, (2, 2))
LEVELS = [(10, 10, 1.0)]


@pytest.mark.parametrize(
    ("ours", "theirs", "finding"),
    [
        (5, 5, None),
        (5, 6, "pixels differ at ((0, 0), 0, (2, 2)): 4 px, up to 1"),
        ("an error", 6, None),
        (5, "an error", "pixels at ((0, 0), 0, (2, 2)), not those of the mended slide; OpenSlide: an error"),
        (7, "an error", None),  # those of the mended slide
        ("an error", "an error", None),
    ],
)
def test_pixels_are_compared(fuzz: SimpleNamespace, ours: object, theirs: object, finding: str | None) -> None:
    def outcome(found: object) -> object:
        pixels = np.full((2, 2, 3), found, np.uint8) if isinstance(found, int) else found
        return fuzz.read.Outcome("done", 0.1, 1000, {"levels": LEVELS, "regions": [(PLACE, pixels)], "name": "x 1"})

    case = fuzz.run.Case(0, "s", None, "flip", "d")
    fuzz.run.compare(case, outcome(ours), outcome(theirs), outcome(7))
    assert case.findings == ([finding] if finding else [])


def test_other_levels_and_refusals_are_findings(fuzz: SimpleNamespace) -> None:
    pixels = np.full((2, 2, 3), 5, np.uint8)
    ours = fuzz.read.Outcome("done", 0.1, 1, {"levels": LEVELS, "regions": [(PLACE, pixels)], "name": "x 1"})
    whole = fuzz.read.Outcome("done", 0.1, 1, {"levels": LEVELS, "regions": [(PLACE, pixels + 1)]})
    for found, word in (
        ({"levels": [*LEVELS, (5, 5, 2.0)], "regions": [(PLACE, pixels)]}, "OpenSlide has [(5, 5, 2.0)] too"),
        ({"levels": [], "regions": []}, "not those of the mended slide; OpenSlide: no such level"),
        ({"refused": "no slide"}, "not those of the mended slide; OpenSlide: no slide"),
    ):
        case = fuzz.run.Case(0, "s", None, "flip", "d")
        fuzz.run.compare(case, ours, fuzz.read.Outcome("done", 0.1, 1, found), whole)
        assert len(case.findings) == 1
        assert word in case.findings[0]


def test_a_mended_dicom_keeps_its_damaged_pixels(fuzz: SimpleNamespace) -> None:
    original = b"header" * 10 + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + b"frames" * 10
    damaged = bytearray(original)
    damaged[3] ^= 1
    damaged[-5] ^= 1
    mended = fuzz.run.with_whole_header(original, bytes(damaged))
    assert [i for i in range(len(original)) if mended[i] != original[i]] == [len(original) - 5]
    assert fuzz.run.with_whole_header(b"II*" + bytes(30), b"II*" + bytes(29) + b"x") == b"II*" + bytes(30)


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    judge_processes(modules(), Path(sys.argv[1]))

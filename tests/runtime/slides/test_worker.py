"""A reader in a process of its own: the same pixels, and what happens when it crashes, hangs or takes all memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides import worker
from wsi_rt.runtime.slides.readers.openslide import open_with_openslide
from wsi_rt.runtime.slides.worker import WorkerReader, open_in_worker

OPENSLIDE = "wsi_rt.runtime.slides.readers.openslide:open_with_openslide"

# A reader that does at x = 1 ... 5 what a C library may do; it paints its own process id into the first pixels.
HOSTILE = """
import os, signal, sys, time
import numpy as np
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides.reader import DeclaredMpp, Level, SlideReader

class Hostile(SlideReader):
    def _read(self, xy0, level, size):
        out = np.zeros((size[1], size[0], 3), np.uint8)
        out[0, 0, :] = list(os.getpid().to_bytes(3, "little"))
        if xy0[0] == 1:
            print("GLib-ERROR: could not allocate", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if xy0[0] == 2:
            time.sleep(1000)
        if xy0[0] == 3:
            hoard = np.ones(3 << 30, np.uint8)
        if xy0[0] == 4:
            raise SlideError("a plain refusal")
        if xy0[0] == 5:
            os._exit(0)
        if xy0[0] == 6:
            os.write(1, b"a library prints to stdout")
        return out
    def _close(self):
        pass

def open_it(path, settings):
    text = path.read_text()
    if text == "crash":
        os.abort()
    if text == "refuse":
        raise SlideError("a plain refusal")
    if text == "missing":
        raise MachineError("a package is missing")
    if text == "not mine":
        return None
    mpp = DeclaredMpp(0.5, 0.5, "x")
    return Hostile(path, settings, name="hostile 1", levels=(Level(100, 50, 1.0),), declared_mpp=mpp)
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerReader | None]:
    """hostile(what the slide says) -> reader."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "hostile_reader.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(code))
    path = tmp_path / "hostile.slide"

    def make(text: str = "good") -> WorkerReader | None:
        path.write_text(text)
        return open_in_worker("hostile_reader:open_it", path, SlideSettings())

    return make


def process_of(pixels: np.ndarray) -> int:
    return int.from_bytes(pixels[0, 0].tobytes(), "little")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_says_and_paints_what_the_reader_in_it_does(slides: Path) -> None:
    path = slides / "CMU-1-Small-Region.svs"
    with open_in_worker(OPENSLIDE, path, SlideSettings()) as far, open_with_openslide(path, SlideSettings()) as near:
        for fact in ("name", "levels", "size0", "mpp0", "mpp_source", "notes", "background", "icc", "associated",
                     "bounds0", "files", "declared_mpp", "ref"):  # fmt: skip
            assert getattr(far, fact) == getattr(near, fact), fact
        for xy0, size in (((-30, -20), (256, 256)), ((2100, 2900), (300, 100)), ((13, 7), (1, 1))):
            np.testing.assert_array_equal(far.read_region(xy0, 0, size), near.read_region(xy0, 0, size))
        np.testing.assert_array_equal(far.read_associated("macro"), near.read_associated("macro"))
        xy0s = np.random.default_rng(0).integers(-100, 2200, (40, 2))
        got, want = np.zeros((2, 40, 64, 64, 3), np.uint8)
        assert far.read_tiles(xy0s, 0, (64, 64), got) == near.read_tiles(xy0s, 0, (64, 64), want) == []
        np.testing.assert_array_equal(got, want)


def test_notes_and_overridden_resolution_come_from_within(slides: Path) -> None:
    settings = SlideSettings(mpp=0.25)
    with open_in_worker(OPENSLIDE, slides / "CMU-1-Small-Region.svs", settings) as reader:
        assert (reader.mpp0, reader.mpp_source) == (0.25, "--mpp")
        assert reader.notes == ("--mpp 0.25 replaces the slide's own 0.499 um/px",)


def test_more_shared_memory_is_taken_when_a_region_needs_it(slides: Path) -> None:
    path = slides / "CMU-1-Small-Region.svs"
    with open_in_worker(OPENSLIDE, path, SlideSettings()) as far, open_with_openslide(path, SlideSettings()) as near:
        for edge in (10, 2000, 20):
            np.testing.assert_array_equal(
                far.read_region((5, 9), 0, (edge, edge)), near.read_region((5, 9), 0, (edge, edge))
            )


def test_chunks_of_many_tiles(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CHUNK_BYTES", 3 * 64 * 64 * 3)
    path = slides / "CMU-1-Small-Region.svs"
    xy0s = np.random.default_rng(1).integers(0, 2000, (10, 2))
    got, want = np.zeros((2, 10, 64, 64, 3), np.uint8)
    with open_in_worker(OPENSLIDE, path, SlideSettings()) as far, open_with_openslide(path, SlideSettings()) as near:
        far.read_tiles(xy0s, 0, (64, 64), got)
        near.read_tiles(xy0s, 0, (64, 64), want)
    np.testing.assert_array_equal(got, want)


def test_errors_and_refusals_come_through(slides: Path, hostile: Callable) -> None:
    with pytest.raises(SlideError, match=r"unopenable\.tiff: cannot be opened .*52479"):
        open_in_worker(OPENSLIDE, slides / "ospy_unopenable.tiff", SlideSettings())
    assert open_in_worker(OPENSLIDE, slides / "histolab_broken.svs", SlideSettings()) is None
    assert hostile("not mine") is None
    with pytest.raises(MachineError, match="a package is missing"):
        hostile("missing")
    with pytest.raises(SlideError, match=r"^a plain refusal$"):
        hostile("refuse")
    with hostile("good") as reader, pytest.raises(SlideError, match=r"^a plain refusal$"):
        reader.read_region((4, 0), 0, (2, 2))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (1, r"its reader crashed with SIGSEGV: GLib-ERROR: could not allocate"),
        (2, r"its reader hung for 1 s"),
        (5, r"its reader ended with exit code 0"),
    ],
    ids=["crash", "hang", "exit"],
)
def test_a_dead_worker_is_a_slide_error_and_the_next_region_gets_a_new_one(
    hostile: Callable, monkeypatch: pytest.MonkeyPatch, x: int, reason: str
) -> None:
    with hostile() as reader:
        first = process_of(reader.read_region((0, 0), 0, (2, 2)))
        place = rf"hostile\.slide: 3 x 2 px at level 0, level-0 position \({x}, 7\) cannot be read \({reason}\)"
        with monkeypatch.context() as patch:
            if "hung" in reason:
                patch.setattr(worker, "SECONDS", 1.0)
            with pytest.raises(SlideError, match=place):
                reader.read_region((x, 7), 0, (3, 2))
        assert not alive(first)
        out = np.full((4, 2, 2, 3), 9, np.uint8)
        failures = reader.read_tiles(np.array([(0, 0), (1, 0), (0, 5), (4, 4)]), 0, (2, 2), out)
        assert [(row, "SIGSEGV" in str(error)) for row, error in failures] == [(1, True), (3, False)]
        assert (out[[1, 3]] == 255).all()
        second, third = process_of(out[0]), process_of(out[2])
        assert len({first, second, third}) == 3
    assert not alive(third)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
def test_memory_is_bounded(hostile: Callable) -> None:
    with hostile() as reader:
        with pytest.raises(SlideError, match=r"hostile\.slide: reading it takes more memory"):
            reader.read_region((3, 0), 0, (2, 2))
        reader.read_region((0, 0), 0, (2, 2))


def test_a_crash_at_opening(hostile: Callable) -> None:
    with pytest.raises(SlideError, match=r"hostile\.slide: cannot be opened \(its reader crashed with SIGABRT"):
        hostile("crash")


def test_nothing_is_imported_from_the_current_folder(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file there that is named like one of Python's own modules."""
    for name in ("copy", "json", "numpy", "openslide"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    with open_in_worker(OPENSLIDE, slides / "CMU-1-Small-Region.svs", SlideSettings()) as reader:
        assert reader.size0 == (2220, 2967)


def test_what_a_library_prints_is_no_answer(hostile: Callable, capfd: pytest.CaptureFixture[str]) -> None:
    with hostile() as reader:
        assert process_of(reader.read_region((6, 0), 0, (2, 2))) > 0
    assert capfd.readouterr() == ("", "")


def test_a_slide_that_kills_every_worker_is_given_up(hostile: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_DEATHS", 2)
    with hostile() as reader:
        for _ in range(2):
            with pytest.raises(SlideError, match="crashed"):
                reader.read_region((1, 0), 0, (2, 2))
        with pytest.raises(SlideError, match="2 readers died of this slide before"):
            reader.read_region((0, 0), 0, (2, 2))


def test_threads_have_workers_of_their_own(hostile: Callable) -> None:
    barrier, seen = threading.Barrier(3), []

    def read(reader: WorkerReader) -> None:
        barrier.wait()
        for _ in range(30):
            seen.append(process_of(reader.read_region((0, 0), 0, (2, 2))))

    with hostile() as reader:
        threads = [threading.Thread(target=read, args=(reader,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 90
        assert 1 < len(set(seen)) <= 3
    assert not [pid for pid in set(seen) if alive(pid)]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hung"])
def test_nothing_outlives_a_killed_parent(hostile: Callable, tmp_path: Path, busy: bool) -> None:
    code = f"""
import sys, threading
from pathlib import Path
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides.worker import open_in_worker
reader = open_in_worker("hostile_reader:open_it", Path({str(tmp_path / "hostile.slide")!r}), SlideSettings())
pid = int.from_bytes(reader.read_region((0, 0), 0, (2, 2))[0, 0].tobytes(), "little")
sys.stdout.write(f"{{pid}}\\n")
sys.stdout.flush()
reader.read_region(({2 if busy else 0}, 0), 0, (2, 2))
threading.Event().wait()
"""
    (tmp_path / "hostile.slide").write_text("good")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker.subprocess, "Popen", refused)
    with pytest.raises(MachineError, match="no process for a slide reader can be started"):
        open_in_worker(OPENSLIDE, tmp_path / "s", SlideSettings())

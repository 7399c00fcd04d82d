"""The digest of a slide: of all its bytes, remembered only as long as nothing was written."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.features import slide_digest
from wsi_rt.runtime.features.slide_digest import SETTLED_S, digest_slide
from wsi_rt.runtime.slides.reader import fingerprint

SIZE = 5 << 20


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """5 MiB, written a while ago."""
    path = tmp_path / "slide.svs"
    path.write_bytes(os.urandom(SIZE))
    return aged(path)


def aged(path: Path, seconds: float = 3600) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctime cannot be set: the clock is an hour ahead instead."""
    now = time.time
    monkeypatch.setattr(slide_digest.time, "time", lambda: now() + 3600)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were really read."""
    seen: list[Path] = []
    real = slide_digest._hash
    monkeypatch.setattr(slide_digest, "_hash", lambda path, *rest: (seen.append(path), real(path, *rest))[1])
    return seen


def test_it_is_the_sha256_of_the_file_and_read_once(slide: Path, tmp_path: Path, settled: None, hashed: list[Path]):
    memo, told = tmp_path / "memo", []
    first = digest_slide([slide], memo, lambda done, total: told.append((done, total)))
    assert first.value == hashlib.sha256(slide.read_bytes()).hexdigest()
    assert told[-1] == (SIZE, SIZE)
    assert digest_slide([slide], memo).value == first.value
    assert hashed == [slide]


def test_an_edit_in_the_middle_is_seen(slide: Path, tmp_path: Path, settled: None):
    memo = tmp_path / "memo"
    before, quick = digest_slide([slide], memo), fingerprint(slide)
    times = slide.stat()
    with slide.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"edited")
    os.utime(slide, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a tool that keeps times would
    assert fingerprint(slide) == quick
    assert not before.still_holds()
    assert digest_slide([slide], memo).value != before.value


def test_a_file_written_just_now_is_not_remembered(slide: Path, tmp_path: Path, hashed: list[Path]):
    assert time.time() - slide.stat().st_ctime < SETTLED_S
    for _ in range(2):
        digest_slide([slide], tmp_path / "memo")
    assert hashed == [slide, slide]


def test_names_do_not_matter_and_are_not_kept(slide: Path, tmp_path: Path, settled: None):
    memo = tmp_path / "memo"
    before = digest_slide([slide], memo).value
    moved = slide.rename(tmp_path / "SMITH JOHN.svs")
    assert digest_slide([moved], memo).value == before
    kept = [(p.name, p.read_text()) for p in memo.iterdir()]
    assert kept
    assert not [k for k in kept if "SMITH" in "".join(k) or "slide" in "".join(k)]


def test_several_files_in_any_order(tmp_path: Path):
    files = [tmp_path / name for name in ("a.dcm", "b.dcm")]
    for file in files:
        file.write_bytes(file.name.encode())
    both = digest_slide(files, tmp_path / "memo").value
    assert both == digest_slide(files[::-1], tmp_path / "memo").value
    assert both not in {digest_slide([f], tmp_path / "memo").value for f in files}
    files[1].write_bytes(b"other")
    assert digest_slide(files, tmp_path / "memo").value != both


@pytest.mark.parametrize("text", ["", "f00d", "x" * 64, "\u00e9" * 40], ids=["empty", "short", "no-hex", "no-ascii"])
def test_a_damaged_memory_is_not_believed(slide: Path, tmp_path: Path, settled: None, text: str):
    memo = tmp_path / "memo"
    value = digest_slide([slide], memo).value
    for path in memo.iterdir():
        path.write_text(text)
    assert digest_slide([slide], memo).value == value


def test_a_memo_that_cannot_be_written_costs_only_time(slide: Path, tmp_path: Path, settled: None):
    (tmp_path / "memo").write_text("in the way")
    assert digest_slide([slide], tmp_path / "memo").value == hashlib.sha256(slide.read_bytes()).hexdigest()


def test_a_slide_that_changes_meanwhile_is_refused(slide: Path, tmp_path: Path):
    def append(done: int, total: int) -> None:
        with slide.open("ab") as file:
            file.write(b"more")

    with pytest.raises(SlideError, match="changed while it was read"):
        digest_slide([slide], tmp_path / "memo", append)


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(SlideError, match="No such file"):
        digest_slide([tmp_path / "missing.svs"], tmp_path / "memo")

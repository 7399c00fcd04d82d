"""A bundle is swapped in whole or not at all, whoever builds beside it and whenever the build is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsi_rt.runtime import staging
from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.staging import staged_directory

FILES = ("a", "b/c", "b/d/e")


def fill(folder: Path, text: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def whole(text: str) -> dict[str, str]:
    return dict.fromkeys(FILES, text)


def work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.building"


def build_and_fail(target: Path, error: BaseException) -> None:
    with staged_directory(target) as work:
        fill(work, "half")
        raise error


@pytest.fixture(params=["new", "over-an-old-one", "over-an-empty-folder"])
def target(request, tmp_path: Path) -> Path:
    target = tmp_path / "bundle"
    if request.param == "over-an-old-one":
        fill(target, "old")
    elif request.param == "over-an-empty-folder":
        target.mkdir()
    return target


def test_the_block_ends_and_the_folder_is_there(target):
    with staged_directory(target) as work:
        assert work.parent == target.parent
        assert list(work.iterdir()) == []
        before = content(target) if target.exists() else None
        fill(work, "new")
        assert (content(target) if target.exists() else None) == before, "visible before it is whole"
    assert content(target) == whole("new")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(target, error):
    existed, before = target.exists(), content(target)
    with pytest.raises(error):
        build_and_fail(target, error())
    assert (target.exists(), content(target)) == (existed, before)
    assert list(target.parent.iterdir()) == ([target] if existed else [])


@pytest.mark.parametrize("when", [1, 2], ids=["at-the-start", "before-the-swap"])
def test_what_may_not_be_replaced_stays(target, when):
    """Asked under the lock, twice; a refusal removes the work and nothing else."""
    existed, before, asked = target.exists(), content(target), []

    def may_replace(path: Path) -> None:
        with pytest.raises(InputError, match="another build"):
            staging._lock(work_of(target), target)
        asked.append(path)
        if len(asked) == when:
            raise InputError("mine")

    with pytest.raises(InputError, match="mine"), staged_directory(target, may_replace) as work:
        fill(work, "new")
    assert asked == [target] * when
    assert (target.exists(), content(target)) == (existed, before)
    assert list(target.parent.iterdir()) == ([target] if existed else [])


def test_a_folder_that_appears_is_seen_before_the_swap(tmp_path):
    target = tmp_path / "bundle"

    def only_nothing(path: Path) -> None:
        if path.exists():
            raise InputError(f"{path} is taken")

    with pytest.raises(InputError, match="is taken"), staged_directory(target, only_nothing):
        fill(target, "another's")
    assert content(target) == whole("another's")
    assert list(tmp_path.iterdir()) == [target]


def test_folders_made_on_the_way_are_removed_again(tmp_path):
    with pytest.raises(RuntimeError), staged_directory(tmp_path / "x" / "y" / "bundle"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged_directory(tmp_path / "x" / "y" / "bundle") as work:
        fill(work, "new")
    assert content(tmp_path / "x" / "y" / "bundle") == whole("new")


def test_a_second_builder_is_refused(target):
    with staged_directory(target) as work:
        fill(work, "first")
        with (
            pytest.raises(InputError, match=r"bundle: another build is writing it; wait .* or choose another --out"),
            staged_directory(target),
        ):
            pass
        assert content(work) == whole("first")
    assert content(target) == whole("first")
    assert list(target.parent.iterdir()) == [target]


def test_other_targets_do_not_wait(tmp_path):
    with staged_directory(tmp_path / "a") as a, staged_directory(tmp_path / "b") as b:
        fill(a, "a")
        fill(b, "b")
    assert content(tmp_path / "a") == whole("a")
    assert content(tmp_path / "b") == whole("b")


def test_a_builder_that_starts_right_after_the_rename_keeps_its_workplace(tmp_path, monkeypatch):
    """New target: the workplace's path is free once it was renamed; the next builder may take it before we clean up."""
    target, swap, second = tmp_path / "bundle", staging._swap_in, []

    def swap_then_second(work: Path, target: Path) -> None:
        swap(work, target)
        second.append(staging._lock(work, target))
        fill(work, "second")

    monkeypatch.setattr(staging, "_swap_in", swap_then_second)
    with staged_directory(target) as work:
        fill(work, "first")
    assert content(target) == whole("first")
    assert content(tmp_path / ".bundle.building") == whole("second")
    os.close(second[0])


def test_no_builder_takes_the_replaced_bundle_as_its_workplace(tmp_path, monkeypatch):
    """Old target: after the exchange the old bundle stands at the workplace's path until it is removed."""
    target, rmtree, refused = tmp_path / "bundle", staging.shutil.rmtree, []
    fill(target, "old")

    def meet_a_second_builder(path: Path, **options) -> None:
        if Path(path).name == ".bundle.building" and content(target) == whole("new"):
            with pytest.raises(InputError, match="another build"):
                staging._lock(Path(path), target)
            refused.append(path)
        rmtree(path, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", meet_a_second_builder)
    with staged_directory(target) as work:
        fill(work, "new")
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_without_an_atomic_exchange(tmp_path, monkeypatch):
    """A file system or libc without renameat2: two renames, and back if the second fails."""

    class NoLibc:
        def __init__(self, *_, **__) -> None:
            pass

    monkeypatch.setattr(staging.ctypes, "CDLL", NoLibc)
    target = tmp_path / "bundle"
    fill(target, "old")
    with staged_directory(target) as work:
        fill(work, "new")
    assert content(target) == whole("new")
    assert list(tmp_path.iterdir()) == [target]

    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name == ".bundle.building":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MachineError, match="Input/output error"), staged_directory(target) as work:
        fill(work, "newer")
    assert content(target) == whole("new")
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_build_left_is_cleared(target):
    left = target.parent / ".bundle.building"
    fill(left, "half")
    (left / "link").symlink_to("/")
    with staged_directory(target) as work:
        assert work == left
        assert list(work.iterdir()) == []
        fill(work, "new")
    assert content(target) == whole("new")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, MachineError, "no room to write"),
        (errno.EDQUOT, MachineError, "no room to write"),
        (errno.EROFS, MachineError, "cannot write"),
        (errno.EACCES, MachineError, "cannot write"),
        (errno.EIO, MachineError, "Input/output error"),
    ],
)
def test_os_errors_are_told_in_one_line(target, code, kind, words):
    existed = target.exists()
    with pytest.raises(kind, match=words):
        build_and_fail(target, OSError(code, os.strerror(code)))
    assert list(target.parent.iterdir()) == ([target] if existed else [])


@pytest.mark.parametrize("name", ["file", "file/bundle", "file/x/bundle"])
def test_a_file_in_the_way(tmp_path, name):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="something stands in the way"), staged_directory(tmp_path / name) as work:
        fill(work, "new")
    assert content(tmp_path) == {"file": "keep"}


KILLED = """
import sys, time
from pathlib import Path
from wsi_rt.runtime.staging import staged_directory
target, text = Path(sys.argv[1]), sys.argv[2]
while True:
    with staged_directory(target) as work:
        for name in ("a", "b/c", "b/d/e"):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
    print("built", flush=True)
"""


def test_sigkill_at_any_moment(tmp_path):
    """A builder that swaps over and over, killed at random: the target is always one whole build or the other."""
    target = tmp_path / "bundle"
    fill(target, "x" * 64)
    for i in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(target), str(i) * 64], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()  # it is at work
        time.sleep(0.002 + 0.0037 * i)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = content(target)
        assert found == whole(found["a"])
        assert len(found["a"]) == 64
    with staged_directory(target) as work:
        fill(work, "last")
    assert content(target) == whole("last")
    assert list(tmp_path.iterdir()) == [target]


def test_the_current_folder_and_links(tmp_path, monkeypatch):
    """`--out .` in an empty folder, and a link to the place where bundles live."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path(), tmp_path / "link"):
        with staged_directory(target) as work:
            (work / "file").write_text(str(target))
        assert (tmp_path / "here" / "file").read_text() == str(target)
        assert (tmp_path / "link").is_symlink()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link"]

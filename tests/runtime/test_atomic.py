"""Whole files or none, on every way out."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.features import write_slide_tokens, write_tensor, write_tile_features
from wsi_rt.runtime.types import Provenance, SlideTokens, TileFeatures, TileGrid

TOKENS = SlideTokens(np.ones((576, 256), np.float32), Provenance("x"))
TILES = TileFeatures(
    np.ones((600, 256), np.float32),
    TileGrid(np.arange(1200, dtype=np.int64).reshape(600, 2) * 256, 256),
    Provenance("x"),
)
WRITERS = {
    "tensor": lambda path: write_tensor(path, TOKENS.tokens),
    "tokens": lambda path: write_slide_tokens(path, TOKENS),
    "tiles": lambda path: write_tile_features(path, TILES),
}


def _write_half(target: Path, error: BaseException | None) -> None:
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"half")
        if error is not None:
            raise error


def test_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_honours_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_tensor(tmp_path / "t.pt", np.ones(3, np.float32))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "t.pt").stat().st_mode) == 0o640


def test_writes_through_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "t.pt")
    write_tensor(link, np.ones(3, np.float32))
    assert link.is_symlink()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["t.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("x"), MemoryError()], ids=repr)
def test_nothing_is_left_when_the_body_raises(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)):
        _write_half(target, error)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


OS_ERRORS = {
    errno.ENOSPC: (MachineError, "No space left.*free disk space"),
    errno.EDQUOT: (MachineError, "free disk space"),
    errno.EACCES: (MachineError, "Permission denied.*choose a folder"),
    errno.EROFS: (MachineError, "Read-only.*choose a folder"),
    errno.EIO: (MachineError, "cannot write"),
    errno.ENAMETOOLONG: (InputError, "name too long"),
}


@pytest.mark.parametrize("number", OS_ERRORS)
@pytest.mark.parametrize("step", ["body", "fsync", "replace"])
def test_os_errors_become_one_plain_line(tmp_path, monkeypatch, number, step):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    if step != "body":
        monkeypatch.setattr(os, step, fail)
    kind, words = OS_ERRORS[number]
    with pytest.raises(kind, match=words) as caught:
        _write_half(tmp_path / "a.bin", OSError(number, os.strerror(number)) if step == "body" else None)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.bin") in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_bad_targets(tmp_path, writer):
    with pytest.raises(InputError, match="mkdir -p"):
        WRITERS[writer](tmp_path / "none" / "a")
    with pytest.raises(InputError, match="directory"):
        WRITERS[writer](tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file"):
        WRITERS[writer](tmp_path / "file" / "a")
    with pytest.raises(InputError, match="too long"):
        WRITERS[writer](tmp_path / ("a" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_interrupted_writers_leave_nothing(tmp_path, monkeypatch, writer):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[writer](tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys, traceback
sys.path.insert(0, {here!r})
from test_atomic import WRITERS
from wsi_rt.runtime.errors import MachineError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses to write beyond, like a full disk
try:
    WRITERS[{writer!r}]({path!r})
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up(tmp_path, writer):
    path = str(tmp_path / "a")
    code = _LIMITED.format(here=str(Path(__file__).parent), writer=writer, path=path)
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"no room to write {path}")
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_device_or_pipe_is_not_replaced(tmp_path):
    """As root a rename over /dev/null would take it from everyone."""
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="no regular file"):
        write_slide_tokens(pipe, TOKENS)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]

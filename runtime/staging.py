"""A directory written aside and swapped in whole: no half-built bundle is ever visible.

`.<name>.building` beside the target is the workplace, held by an flock on the directory itself, which a
kill releases: a later build takes the lock, clears what is left and goes on.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsi_rt.runtime.atomic import plain_os_error
from wsi_rt.runtime.errors import InputError, MachineError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged_directory(target: Path, may_replace: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yields an empty directory that becomes `target` when the block ends without an exception.

    An existing `target` is replaced in one step. `may_replace` is called with it before the work and again before
    the swap, and raises where what stands there (if anything) must stay. On any exception, KeyboardInterrupt
    included, the workplace and the folders made for it are removed, and `target` is as it was. Raises InputError
    when another process is building the same target, MachineError when the disk is full or the place not
    writable.
    """
    target = Path(os.path.realpath(target))  # "." has no name, and a link is written through
    work = target.parent / f".{target.name}.building"
    created = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(work, target)
    except OSError as e:
        raise plain_os_error(e, target) from e
    try:
        may_replace(target)
        _clear(work)
        yield work
        may_replace(target)
        _swap_in(work, target)
    except OSError as e:
        raise plain_os_error(e, target) from e
    finally:
        if _is_at(lock, work):  # after a swap that path is free, or another build's
            shutil.rmtree(work, ignore_errors=True)
            for folder in created:
                with suppress(OSError):
                    folder.rmdir()
        os.close(lock)


def standing_parent(target: Path) -> Path:
    """The nearest folder above `target` that is there already, links resolved."""
    return next(p for p in Path(os.path.realpath(target)).parents if p.exists())


def require_room(target: Path, needed_bytes: int, what: str) -> None:
    """Raises MachineError when the disk below `target` has less; `what`: "the bundle needs"."""
    place = standing_parent(target)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise MachineError(
            f"{place}: {free / 1e9:.1f} GB free, {what} {needed_bytes / 1e9:.1f} GB; choose another --out"
        )


def _lock(work: Path, target: Path) -> int:
    """An exclusive lock on the workplace directory; retried when the directory was swapped away meanwhile."""
    while True:
        work.mkdir(exist_ok=True)
        fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, work):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise InputError(f"{target}: another build is writing it; wait for it or choose another --out") from None
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open directory still stands under this path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _clear(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _swap_in(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    old = _lock(target, target)  # it becomes the workplace: no other build may take it before it is gone
    try:
        if exchange and exchange(_AT_FDCWD, bytes(work), _AT_FDCWD, bytes(target), _RENAME_EXCHANGE) == 0:
            return
    finally:
        if _is_at(old, work):
            shutil.rmtree(work, ignore_errors=True)
        os.close(old)
    # No atomic exchange on this file system or libc: the old bundle steps aside first.
    aside = target.parent / f".{target.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    try:
        work.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)

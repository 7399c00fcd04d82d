"""Files that are either whole or not there: write beside the target, flush to disk, rename over it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh temporary path in the folder of `path`; on success it becomes `path`.

    The body writes the whole file and closes it. Then it is fsynced and renamed with `os.replace`, so a reader sees
    the old file or the new one. On any exception, KeyboardInterrupt included, the temporary file is removed and
    `path` is as it was. A symbolic link is written through, not replaced.

    Raises: MachineError (disk full, no permission, other I/O error), InputError (no such folder, `path` is a
    folder or a device). Other exceptions of the body pass unchanged.
    """
    target = Path(os.path.realpath(path))
    # Not tempfile.mkstemp: its mode 0600 would survive the rename; open() honours the umask.
    temporary = target.parent / f".{target.name[:64]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not target.is_file():  # a device or pipe: the rename would replace it for everyone
            raise FileExistsError(errno.EEXIST, "no regular file")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except OSError as error:
        raise plain_os_error(error, Path(path)) from error
    finally:
        with contextlib.suppress(OSError):  # gone after a successful rename
            temporary.unlink()
    with contextlib.suppress(OSError):  # the rename itself; some filesystems cannot sync a folder
        _sync(target.parent, os.O_RDONLY)


def is_vacant(path: Path) -> bool:
    """Nothing stands there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_os_error(error: OSError, path: Path) -> WsiRtError:
    """The one-line error for an OSError met while writing `path`."""
    if error.errno in _FULL:
        return MachineError(
            f"no room to write {path} ({os.strerror(error.errno)}): free disk space or choose another folder"
        )
    if error.errno in _DENIED:
        return MachineError(f"cannot write {path} ({os.strerror(error.errno)}): choose a folder you may write to")
    if error.errno == errno.ENOENT:
        return InputError(f"cannot write {path}: its folder does not exist; create it with `mkdir -p {path.parent}`")
    if error.errno in _BAD_PATH:
        return InputError(f"cannot write {path} ({error.strerror}): something stands in the way, choose another path")
    return MachineError(f"cannot write {path} ({error.strerror or error}): choose another folder")

"""What a slide is, whatever it is called: the SHA-256 of all its bytes, remembered by what the file system says of it.

A quick fingerprint (size, first and last MiB) would be no address for stored features: an edit in the middle goes
unseen. Hashing runs at 1.7 GiB/s on one core with SHA instructions (a 2 GB slide: 1.2 s, or as long as the disk takes)
and happens once: later the file's device, inode, size and times tell that it is the same. No name is stored.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.errors import SlideError, WsiRtError
from wsi_rt.runtime.hashing import sha256_json

_BLOCK = 1 << 22
# A file changed within one tick of the file system's clock keeps its times, so younger ones are not remembered. Ticks
# are 10 ms at most on current systems, 1 s on HFS+ and 2 s on FAT.
SETTLED_S = 3.0

Identity = tuple[int, int, int, int, int]  # device, inode, bytes, mtime_ns, ctime_ns
OnBytes = Callable[[int, int], None]  # bytes hashed, bytes in all


@dataclass(frozen=True)
class SlideDigest:
    """value: hex SHA-256; of several files, that of their sorted digests. files, identities: what was hashed."""

    value: str
    files: tuple[Path, ...]
    identities: tuple[Identity, ...]

    def still_holds(self) -> bool:
        """Nothing was written to the files since."""
        try:
            return tuple(identity(f) for f in self.files) == self.identities
        except SlideError:
            return False


def identity(path: Path) -> Identity:
    """Raises SlideError."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest_slide(files: Sequence[Path], memo: Path, on_bytes: OnBytes = lambda done, total: None) -> SlideDigest:
    """The digest of a slide's files; `memo` is the folder where it is remembered (made when missing; a folder that
    cannot be written costs a new hash each time, nothing else).

    Raises SlideError: a file that cannot be read, or that changes meanwhile.
    """
    identities = tuple(identity(f) for f in files)
    known = [_recall(memo, i) for i in identities]
    total = sum(i[2] for i, value in zip(identities, known, strict=True) if value is None)
    done, values = 0, []
    for path, told, value in zip(files, identities, known, strict=True):
        if value is None:
            value = _hash(path, told[2], partial(_add, on_bytes, done, total))
            done += told[2]
            if identity(path) != told:
                raise SlideError(f"{path}: the file changed while it was read, expected a finished slide; try again")
            _remember(memo, told, value)
        values.append(value)
    joined = values[0] if len(values) == 1 else hashlib.sha256("".join(sorted(values)).encode()).hexdigest()
    return SlideDigest(joined, tuple(files), identities)


def _add(on_bytes: OnBytes, before: int, total: int, done: int) -> None:
    on_bytes(before + done, total)


def _hash(path: Path, size: int, on_bytes: Callable[[int], None]) -> str:
    """Of a file that still grows, no more than `size` and a block."""
    sha, buffer, done = hashlib.sha256(), bytearray(_BLOCK), 0
    try:
        with path.open("rb", buffering=0) as file:
            while done <= size and (count := file.readinto(buffer)):
                sha.update(memoryview(buffer)[:count])
                done += count
                on_bytes(done)
    except OSError as error:
        raise _unreadable(path, error) from error
    return sha.hexdigest()


def _unreadable(path: Path, error: OSError) -> SlideError:
    return SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file")


def _memo(folder: Path, told: Identity) -> Path:
    return folder / sha256_json(told)


def _recall(folder: Path, told: Identity) -> str | None:
    path = _memo(folder, told)
    try:
        text = path.read_text("ascii")
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            return None
        os.utime(path)
    except (OSError, UnicodeDecodeError):
        return None
    return text


def _remember(folder: Path, told: Identity, value: str) -> None:
    if time.time() - max(told[3], told[4]) / 1e9 < SETTLED_S:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(_memo(folder, told)) as temporary:
            temporary.write_text(value, "ascii")
    except (OSError, WsiRtError):  # it is hashed again next time
        return

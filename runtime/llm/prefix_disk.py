"""Slide prefixes on disk: one file each, memory-mapped when read, so that a restart answers without prefill.

A 7 B prefix of 611 tokens is 640 MB (f32), which is why nothing is written unless a folder was asked for. A file is
4,096 bytes of header, then keys and values [layers, 2, P, kv_heads, head_width], little-endian. Its name is the key of
what it holds; header and numbers carry a SHA-256, compared on every read (0.4 s for 640 MB).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write, plain_os_error
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.hashing import sha256_json

ENVIRONMENT, ENVIRONMENT_BOUND = "WSI_RT_PREFIXES", "WSI_RT_PREFIXES_MAX_BYTES"
MAX_BYTES = 20 << 30  # by default: about 30 slides of a 7 B model
_MAGIC, _HEADER_BYTES, _SCHEMA = b"WSIRTPFX", 4096, 1
_SUFFIX, _PIN = ".prefix", ".pin"
_DTYPES: dict[str, np.dtype[Any]] = {"<f4": np.dtype("<f4"), "<f2": np.dtype("<f2")}
Layer = NDArray[Any]  # [2, P, kv_heads, head_width], f32 or f16


class _DamagedError(ValueError):
    """The file is not as it was written."""


@dataclass(frozen=True)
class Stored:
    """A prefix on disk. used: seconds since the epoch; problem: why it cannot be read, its numbers not looked at."""

    key: str
    nbytes: int
    used: float
    pinned: bool
    length: int = 0
    dtype: str = ""
    made_of: Mapping[str, Any] | None = None
    problem: str | None = None


class PrefixDisk:
    """Prefix files in `folder`, which processes may share. max_bytes: of all files; beyond it the least recently used
    go, pinned ones excepted. What goes wrong in `read` is told in `take_notes` and costs a prefill, nothing else."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._notes: list[str] = []

    def take_notes(self) -> list[str]:
        notes, self._notes = self._notes, []
        return notes

    def read(self, key: str, made_of: Mapping[str, Any]) -> list[Layer] | None:
        """Per layer [2, P, kv_heads, head_width], mapped read-only; None when it is not there, or was dropped because
        it is damaged or of something else (a note says so)."""
        path = self._path(key)
        try:
            header = _read_header(path)
            if header["key"] != key or header["made_of"] != json.loads(json.dumps(dict(made_of))):
                raise _DamagedError("it was made of something else")
            numbers = np.memmap(path, _DTYPES[header["dtype"]], "r", _HEADER_BYTES, tuple(header["shape"]))
            if hashlib.sha256(_bytes_of(numbers)).hexdigest() != header["sha256"]:
                raise _DamagedError("its SHA-256 does not match")
        except FileNotFoundError:
            return None
        except (_DamagedError, OSError) as error:
            self.discard(key, str(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return [np.asarray(layer) for layer in numbers]

    def write(self, key: str, made_of: Mapping[str, Any], layers: Sequence[Layer]) -> None:
        """Raises WsiRtError when it cannot be written (disk full); a prefix larger than max_bytes is a note."""
        first = layers[0]
        nbytes = _HEADER_BYTES + first.nbytes * len(layers)
        if nbytes > self.max_bytes:
            self._notes.append(f"the prefix is not kept on disk: {nbytes} bytes, which holds at most {self.max_bytes}")
            return
        self._make_folder()
        dtype = "<f2" if first.dtype == np.float16 else "<f4"
        shape = [len(layers), *first.shape]
        with self._locked(), atomic_write(self._path(key)) as temporary:
            self._prune(self.max_bytes - nbytes, keep=key)
            with temporary.open("r+b") as file:
                file.seek(_HEADER_BYTES)
                sha256 = hashlib.sha256()
                for layer in layers:
                    data = _bytes_of(np.ascontiguousarray(layer, _DTYPES[dtype]))
                    sha256.update(data)
                    file.write(data)
                header = {"schema": _SCHEMA, "key": key, "made_of": dict(made_of), "dtype": dtype, "shape": shape}
                file.seek(0)
                file.write(_pack_header({**header, "sha256": sha256.hexdigest(), "created": int(time.time())}))

    def listed(self) -> list[Stored]:
        """Every file, damaged ones included, most recently used first."""
        found = []
        for path in self._files():
            key = path.stem
            with contextlib.suppress(FileNotFoundError):  # dropped by another process meanwhile
                status = path.stat()
                facts: dict[str, Any] = {}
                try:
                    header = _read_header(path)
                    facts = {"length": header["shape"][2], "dtype": header["dtype"], "made_of": header["made_of"]}
                except _DamagedError as error:
                    facts = {"problem": str(error)}
                found.append(Stored(key, status.st_size, status.st_mtime, self._pin_path(key).exists(), **facts))
        return sorted(found, key=lambda s: s.used, reverse=True)

    def drop(self, key: str) -> int:
        """Remove a prefix -> its bytes. A process that reads it reads on. Raises InputError when there is none."""
        path = self._path(self._whole_key(key))
        with self._locked():
            nbytes = path.stat().st_size
            self._pin_path(path.stem).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return nbytes

    def pin(self, key: str, pinned: bool = True) -> None:
        """A pinned prefix is not dropped to make room. Raises InputError when there is none."""
        key = self._whole_key(key)
        with self._locked():
            if pinned:
                self._pin_path(key).touch()
            else:
                self._pin_path(key).unlink(missing_ok=True)

    def discard(self, key: str, reason: str) -> None:
        """Remove what cannot be used, with a note."""
        self._notes.append(f"a stored slide prefix was dropped and is computed again: {reason}")
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _whole_key(self, start: str) -> str:
        """The key that begins with `start`. Raises InputError when none does, or several."""
        keys = [p.stem for p in self._files()]
        if start in keys:
            return start
        found = [k for k in keys if start and k.startswith(start)]
        if len(found) != 1:
            what = f"{len(found)} prefixes begin with {start!r}" if found else f"no prefix begins with {start!r}"
            raise InputError(f"{self.folder}: {what}, expected the first characters of one; see `wsi-rt prefix list`")
        return found[0]

    def _prune(self, max_bytes: int, keep: str) -> None:
        """Called with the lock held."""
        others = [item for item in self.listed() if item.key != keep]
        total = sum(item.nbytes for item in others if item.pinned)
        for item in (item for item in others if not item.pinned):
            total += item.nbytes
            if total > max_bytes:
                total -= item.nbytes
                with contextlib.suppress(OSError):
                    self._path(item.key).unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that change this folder; the system's lock goes with its process. Reading needs
        none: files appear and vanish whole."""
        from filelock import FileLock

        try:
            with FileLock(self.folder / ".lock", fallback_to_soft=False):
                yield
        except NotImplementedError as error:
            raise WsiRtError(f"{self.folder} cannot be locked ({error}); choose a folder on a local disk") from error
        except OSError as error:
            raise plain_os_error(error, self.folder) from error

    def _make_folder(self) -> None:
        """For this user alone: a prefix is made of a patient's slide."""
        if self.folder.is_dir():
            return
        try:
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            # https://bford.info/cachedir: backups leave such a folder out.
            (self.folder / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n")
        except OSError as error:
            raise plain_os_error(error, self.folder) from error

    def _files(self) -> list[Path]:
        found = self.folder.glob(f"*{_SUFFIX}") if self.folder.is_dir() else ()
        return sorted(p for p in found if not p.name.startswith("."))  # atomic_write's temporary ones

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _pin_path(self, key: str) -> Path:
        return self.folder / f"{key}{_PIN}"


def _bytes_of(x: Layer) -> memoryview:
    return np.asarray(x).reshape(-1).view(np.uint8).data


def _pack_header(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps({**fields, "check": sha256_json(dict(fields))}).encode()
    if len(_MAGIC) + len(text) > _HEADER_BYTES:
        raise ValueError(f"the header of a prefix file has {len(text)} bytes, more than {_HEADER_BYTES}")
    return (_MAGIC + text).ljust(_HEADER_BYTES, b"\0")


def _read_header(path: Path) -> dict[str, Any]:
    """Raises _DamagedError when it is none of this version's, or the file is too short; FileNotFoundError."""
    with path.open("rb") as file:
        data = file.read(_HEADER_BYTES)
    if len(data) < _HEADER_BYTES or not data.startswith(_MAGIC):
        raise _DamagedError("no prefix file")
    try:
        header = json.loads(data[len(_MAGIC) :].rstrip(b"\0"))
        check = header.pop("check")
        intact = check == sha256_json(header)
        schema, dtype, shape = header["schema"], header["dtype"], header["shape"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, schema = False, None
    if not intact:
        raise _DamagedError("its header is not as it was written")
    if schema != _SCHEMA or dtype not in _DTYPES:
        raise _DamagedError(f"it has schema {schema}, this wsi-rt reads {_SCHEMA}")
    if path.stat().st_size != _HEADER_BYTES + int(np.prod(shape)) * _DTYPES[dtype].itemsize:
        raise _DamagedError("it is cut short")
    return header

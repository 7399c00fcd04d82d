"""Tensor files of `torch.save` (the zip format of torch >= 1.6), read and written without torch.

Layout (torch/serialization.py): stored, 64-byte aligned zip entries `<name>/data.pkl` (the pickle, see
torch_pickle.py), `<name>/data/<key>` (the bytes of a storage), `<name>/byteorder`, `<name>/version`.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.torch_pickle import STORAGES, TensorRef, read_tensor_ref, shown

MAX_TENSOR_BYTES = 1 << 30  # limit of the file and of the array read from it; slide tokens take 2.4 MB
_MAX_DIRECTORY_BYTES = 1 << 20  # of the zip: some 15,000 entries, a tensor file has about 7
_ALIGNMENT = 64  # torch's own, so that the storage can be memory-mapped
_PADDING_ID = 0x4246  # "FB": the extra field torch pads with
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # torch < 1.6: a pickled magic number comes first
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
)


def read_tensor(path: str | os.PathLike[str], *, max_bytes: int = MAX_TENSOR_BYTES) -> NDArray[Any]:
    """The one tensor of a torch file, as a C-contiguous array that owns its memory (bfloat16 becomes float32).

    Views keep their meaning: offset, size and strides are applied, and checked to stay inside the storage.
    `nn.Parameter` reads like a tensor. No code of the file is ever run.

    Raises: FeatureFileError when the file is missing, not such a zip, damaged (checksum), larger than `max_bytes`, or
    holds anything but one plain tensor of a dtype in torch_pickle.STORAGES.
    """
    return parse_tensor(read_bounded(path, max_bytes), str(path), max_bytes=max_bytes)[0]


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises: FeatureFileError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FeatureFileError(f"{path} is no regular file, expected a file")
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FeatureFileError(f"cannot read {path} ({reason}): check the path and its permissions") from error
    if len(data) > max_bytes:
        raise FeatureFileError(f"{path} has {status.st_size} bytes, expected at most {max_bytes} for a tensor file")
    return data


def parse_tensor(
    data: bytes, where: str, *, max_bytes: int = MAX_TENSOR_BYTES, extra: str = ""
) -> tuple[NDArray[Any], bytes | None]:
    """`read_tensor` for bytes in memory; also returns the entry `<name>/<extra>` when asked for and there.

    Raises: FeatureFileError, with `where` as the name of the file.
    """
    _check_magic(data, where)
    archive = _Archive(data, where)
    tensor = read_tensor_ref(archive.read("data.pkl"), where)
    order = archive.read("byteorder") if archive.has("byteorder") else b"little"
    if order not in (b"little", b"big"):
        archive.fail(f"its byteorder is {shown(order)}, expected little or big")
    itemsize = 4 if tensor.storage.code == "bf16" else tensor.storage.itemsize
    size_bytes = math.prod(max(size, 1) for size in tensor.shape) * itemsize  # (0, 2**62) has no elements but overflows
    if size_bytes > max_bytes:
        archive.fail(f"its tensor {shown(tensor.shape)} takes {size_bytes} bytes, expected at most {max_bytes}")
    entry = f"data/{tensor.storage.key}"
    expected = tensor.storage.numel * tensor.storage.itemsize
    if not archive.has(entry) or archive.size(entry) != expected:
        given = f"{archive.size(entry)} bytes" if archive.has(entry) else "missing"
        archive.fail(f"its storage {shown(tensor.storage.key)} is {given}, expected {expected} bytes")
    array = _materialise(tensor, archive.read(entry), ">" if order == b"big" else "<")
    return array, archive.read(extra) if extra and archive.has(extra) else None


def _check_magic(data: bytes, where: str) -> None:
    if data.startswith(b"PK\x03\x04"):
        return
    if data.startswith(_LEGACY_MAGIC):
        what = "is in the format of torch < 1.6"
    elif data.startswith(b"\x80"):
        what = "is a bare pickle, which may hold code (nothing was executed)"
    elif data.startswith(b"\x89HDF\r\n\x1a\n"):
        raise FeatureFileError(f"{where} is an HDF5 file, expected a torch file: tile features are named .h5")
    elif data.startswith(b"version https://git-lfs"):
        raise FeatureFileError(f"{where} is a Git LFS pointer, expected the file itself: run `git lfs pull`")
    else:
        what = "is empty" if not data else "is no torch file"
    raise FeatureFileError(
        f"{where} {what}, expected a zip written by torch >= 1.6: re-save it with a current torch, "
        "`torch.save(torch.load(path, weights_only=True), path)`"
    )


class _CappedBytes(io.BytesIO):
    """zipfile reads the whole central directory in one call: refuse one that would expand to gigabytes of objects."""

    capped = True

    def read(self, size: int | None = -1, /) -> bytes:
        if self.capped and size is not None and size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"zip directory of {size} bytes")
        return super().read(size)


class _Archive:
    """The stored entries of one torch zip. Every failure is a FeatureFileError that names the file."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        file = _CappedBytes(data)
        try:
            self.zip = zipfile.ZipFile(file)
        except _ZIP_ERRORS as error:
            raise self._damaged(error) from error
        file.capped = False
        self.entries = {info.filename: info for info in self.zip.infolist()}
        if len(self.entries) != len(self.zip.infolist()):
            self.fail("its zip has two entries of one name")
        pickles = [name for name in self.entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            self.fail(f"its zip has {len(pickles)} entries data.pkl, expected one; it is no file of torch.save")
        self.prefix = pickles[0][: -len("data.pkl")]

    def fail(self, what: str) -> NoReturn:
        raise FeatureFileError(f"{self.where}: {what}; re-save it with a current torch, or fetch it again")

    def _damaged(self, error: BaseException) -> FeatureFileError:
        detail = shown(str(error) or type(error).__name__)[1:-1]
        return FeatureFileError(
            f"{self.where} is damaged or cut short ({detail}), expected a whole zip: fetch or write it again"
        )

    def has(self, name: str) -> bool:
        return self.prefix + name in self.entries

    def size(self, name: str) -> int:
        return self.entries[self.prefix + name].file_size

    def read(self, name: str) -> bytes:
        """The bytes of an entry, checksum verified. Stored entries only, so an entry is never larger than the file."""
        info = self.entries[self.prefix + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            self.fail(f"its zip entry {shown(name)} is compressed or encrypted, expected it stored as torch does")
        try:
            data = self.zip.read(info)
        except _ZIP_ERRORS as error:
            raise self._damaged(error) from error
        if len(data) != info.file_size:
            raise self._damaged(EOFError(f"entry {name} ends early"))
        return data


def _materialise(tensor: TensorRef, raw: bytes, order: str) -> NDArray[Any]:
    """A contiguous native array of the view; `tensor` is already checked against the storage."""
    code = {"bf16": "u2", "b1": "u1"}.get(tensor.storage.code, tensor.storage.code)
    stored = np.dtype(order + code)
    if tensor.numel == 0:
        view = np.empty(tensor.shape, stored)
    else:
        flat = np.frombuffer(raw, stored)[tensor.offset :]
        # The stride of a dimension of one is never used and may be anything: 0 cannot overflow.
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        strides = [stride * stored.itemsize if size > 1 else 0 for size, stride in pairs]
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    array = np.array(view, dtype=stored.newbyteorder("="), order="C")
    if tensor.storage.code == "bf16":  # the upper half of a float32
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array != 0 if tensor.storage.code == "b1" else array


def write_tensor(
    path: str | os.PathLike[str], array: NDArray[Any], *, extra: Mapping[str, bytes] | None = None
) -> None:
    """Write `array` so that `torch.load(path, weights_only=True)` and `read_tensor` give it back, any shape.

    Same array, same bytes. `extra` adds entries that torch ignores. Written atomically.

    Raises: FeatureFileError (dtype torch cannot hold here, too large), MachineError, InputError (atomic.py).
    """
    array = np.ascontiguousarray(array).reshape(np.shape(array))  # ascontiguousarray makes 0-d 1-d
    code = array.dtype.str[1:]
    kind = next((name for name, (known, _) in STORAGES.items() if known == code), None)
    if kind is None:
        known_codes = sorted(known for known, _ in STORAGES.values() if known != "bf16")
        raise FeatureFileError(f"cannot write {path}: dtype {array.dtype}, expected one of {known_codes}")
    if array.nbytes > MAX_TENSOR_BYTES or array.ndim > 8:
        raise FeatureFileError(
            f"cannot write {path}: {array.nbytes} bytes in {array.ndim} dimensions, "
            f"expected at most {MAX_TENSOR_BYTES} in 8"
        )
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    entries = {"data.pkl": _pickle(kind, array.shape), "byteorder": b"little", "data/0": little.tobytes()}
    entries |= {"version": b"3\n", **(extra or {})}
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, data in entries.items():
            _store(archive, f"archive/{name}", data)


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a stored entry whose bytes begin at a multiple of 64, with nothing of this machine or day in it."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3  # else it differs on Windows
    start = archive.fp.tell() + 30 + len(name) + 4  # type: ignore[union-attr]  # local header, name, extra header
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    archive.writestr(info, data)


def _pickle(kind: str, shape: tuple[int, ...]) -> bytes:
    """Protocol 2 for `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, opcode by opcode."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    numel = int(np.prod(shape, dtype=np.int64))
    return b"".join(
        (
            b"\x80\x02",  # PROTO 2
            b"ctorch._utils\n_rebuild_tensor_v2\n",  # GLOBAL: the function
            b"(",  # MARK: its arguments
            b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text("0") + _text("cpu") + _int(numel),
            b"tQ",  # TUPLE, BINPERSID: the storage in entry data/0
            _int(0),  # storage offset
            b"(" + b"".join(map(_int, shape)) + b"t",  # size
            b"(" + b"".join(map(_int, strides)) + b"t",  # stride
            b"\x89",  # NEWFALSE: requires_grad
            b"ccollections\nOrderedDict\n)R",  # no backward hooks: OrderedDict()
            b"tR.",  # TUPLE, REDUCE, STOP
        )
    )


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode("ascii")  # BINUNICODE


def _int(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + struct.pack("<B", value)  # BININT1
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)  # BININT2
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)  # BININT
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of eight bytes

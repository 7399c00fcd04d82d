"""One `.bin`, `.pth` or `.pt` file of `torch.save`, tensor by tensor, with no code of the file's own run.

`torch.load(weights_only=True, mmap=True)` maps a zip archive without reading it. What `get` touches of a mapping
counts as the process's memory, so it is mapped anew every _MAPPED_BYTES: memory does not grow with the file.
Files from before PyTorch 1.6 are no zip archives and cannot be mapped: they are read whole, and released when the
next file is needed.

A zip archive has a CRC-32 per record. `sha256`, which reads every byte anyway, holds each against its bytes; reading
a tensor does not. Legacy files, and archives that `torch.save` was told to write without (they hold zeros), have none.
"""

from __future__ import annotations

import gc
import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from wsi_rt.export.arch import Shapes
from wsi_rt.export.sources.weights import few, plain
from wsi_rt.runtime.errors import CheckpointError, MachineError
from wsi_rt.runtime.hashing import sha256_file

if TYPE_CHECKING:
    from torch import Tensor

_MAPPED_BYTES = 1 << 27  # mapping a 10 GB shard anew takes about 0.1 s: once per 128 MB is nothing
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30  # then the record's name and an extra field, whose lengths are its last two words
_READ_BYTES = 1 << 22
_WRAPPERS = ("model", "state_dict", "module")  # what training scripts put a state dict under
_MOST_WRAPPERS = 3


class TorchFile:
    """A state dict, alone or under "model", "state_dict" or "module", with or without DataParallel's `module.`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as f:
            self.legacy = f.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC
        self._tensors: dict[str, Tensor] | None = None
        self._touched = 0
        self.shapes: Shapes = {name: tuple(t.shape) for name, t in self._load().items()}
        self.release()

    def tensor(self, name: str) -> Tensor:
        """In the file's dtype; a copy that the caller owns."""
        tensor = self._load()[name].detach().clone()
        self._touched += tensor.nbytes
        if self._touched > _MAPPED_BYTES and not self.legacy:
            self.release()
        return tensor

    def release(self) -> None:
        """Let go of the mapping (or of a legacy file's tensors); the next call takes it up again."""
        touched, self._tensors, self._touched = self._touched, None, 0
        if touched:
            gc.collect()  # torch.load's own closures form a cycle that keeps the mapping

    def sha256(self) -> str:
        """Hex, of the whole file. Raises CheckpointError naming the record whose bytes do not have its CRC-32."""
        if self.legacy:
            return sha256_file(self.path)
        digest = hashlib.sha256()
        with self.path.open("rb") as f:
            for record in _records(f, self.path):
                _feed(f, digest, record.start - f.tell())
                if _feed(f, digest, record.size) != record.crc and record.crc is not None:
                    raise CheckpointError(
                        f"{self.path}: record {record.name} does not have the checksum stored with it, so its bytes "
                        "were damaged; download it again"
                    )
            _feed(f, digest, None)
        return digest.hexdigest()

    def _load(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = _state_dict(_unpickle(self.path, self.legacy), self.path)
        return self._tensors


class _Record(NamedTuple):
    """Where a record's data lies in the file, and its CRC-32: None where the archive was written without any."""

    start: int
    size: int
    crc: int | None
    name: str


def _records(f: BinaryIO, path: Path) -> list[_Record]:
    """Every record of the archive in the file's order; leaves `f` at its start."""
    out: list[_Record] = []
    try:
        infos = sorted(zipfile.ZipFile(f).infolist(), key=lambda i: i.header_offset)
        checked = any(i.CRC for i in infos)
        for i in infos:
            f.seek(i.header_offset)
            header = f.read(_LOCAL_HEADER_BYTES)
            lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            start = i.header_offset + len(header) + sum(lengths)
            end = out[-1].start + out[-1].size if out else 0
            if not header.startswith(_ZIP_MAGIC) or i.header_offset < end or i.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"record {i.filename} is not stored as torch.save does")
            out.append(_Record(start, i.file_size, i.CRC if checked else None, i.filename))
    except Exception as e:  # a damaged directory can make zipfile raise anything
        if isinstance(e, MemoryError):
            raise
        raise CheckpointError(f"{path}: not a readable PyTorch file ({plain(e)}); download it again") from e
    f.seek(0)
    return out


def _feed(f: BinaryIO, digest: Any, count: int | None) -> int:
    """The next `count` bytes (None: all that follow) into `digest`, a chunk at a time; their CRC-32."""
    crc = 0
    while count is None or count > 0:
        chunk = f.read(_READ_BYTES if count is None else min(count, _READ_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
        count = None if count is None else count - len(chunk)
    return crc


def _unpickle(path: Path, legacy: bool) -> Any:
    try:
        import torch
    except ImportError as e:
        raise MachineError(f"reading {path} needs torch: pip install '.[export]' in a checkout of wsi-rt") from e
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles: what follows from them is an error of ours
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)
    except MemoryError:
        raise
    except Exception as e:  # a damaged pickle can raise anything; nothing of it was executed
        code = re.search(r"GLOBAL ([\w.]+)", str(e))
        if code:
            raise CheckpointError(
                f"{path}: its pickle asks for {code[1]}, which is no tensor and was not run; expected tensors only: "
                "save the state dict alone, or as .safetensors"
            ) from e
        raise CheckpointError(f"{path}: not a readable PyTorch file ({plain(e)}); download it again") from e


def _state_dict(data: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for _ in range(_MOST_WRAPPERS):
        inner = next((data[k] for k in _WRAPPERS if isinstance(data.get(k), Mapping)), None) if _is_map(data) else None
        data = data if inner is None else inner
    if not _is_map(data) or not data:
        raise CheckpointError(f"{path}: holds {_told(data)}, expected tensors by name; give the file of weights")
    wrong = [n for n, t in data.items() if not (isinstance(n, str) and isinstance(t, torch.Tensor))]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(data)} entries are no tensors ({few([str(n) for n in wrong])}; the first is "
            f"{_told(data[wrong[0]])}), expected tensors by name; save the state dict alone"
        )
    absent = [name for name, t in data.items() if t.device.type != "cpu" or t.layout != torch.strided]
    if absent:
        raise CheckpointError(
            f"{path}: {len(absent)} tensors are without data or sparse ({few(absent)}), expected dense ones; save it "
            "again"
        )
    prefix = "module." if all(name.startswith("module.") for name in data) else ""
    return {name.removeprefix(prefix): t for name, t in data.items()}


def _is_map(data: Any) -> bool:
    return isinstance(data, Mapping)


def _told(value: Any) -> str:
    return f"a {type(value).__name__}" if not _is_map(value) or value else "nothing"

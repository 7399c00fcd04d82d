"""Weights in files, whatever their format and however many, and the JSON beside them.

A folder is searched in transformers' order: `model.safetensors`, its index with shards, and only then
`pytorch_model.bin` and its index. Where both formats lie in a folder the `.bin` files are not looked at.

A file whose size or time of change is another than when it was opened is refused, whether a tensor is read or the
digest is made: the weights that are checked, read and hashed are the same. Zip archives of torch carry checksums, which
the digest's pass verifies; safetensors carry none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from wsi_rt.export.arch import Shapes
from wsi_rt.export.sources.safetensors_file import SafetensorsFile
from wsi_rt.export.sources.torch_file import TorchFile
from wsi_rt.export.sources.weights import F32, WeightSource, few, plain, require_finite
from wsi_rt.runtime.errors import CheckpointError, MachineError

_TORCH = (".bin", ".pth", ".pt")
_FAMILIES = (("model", (".safetensors",)), ("pytorch_model", _TORCH))  # the first that lies in a folder is read
_FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
_LFS = b"version https://git-lfs"
_NAME_BYTES = 255  # the longest file name of every common file system
_TRAINING = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")  # beside weights, and no weights


class TensorFile(Protocol):
    """One open file; `tensor` gives a torch tensor in the file's dtype, `release` frees what is held meanwhile.

    `sha256` reads the whole file, and raises CheckpointError where the format carries checksums and one is wrong.
    """

    path: Path
    shapes: Shapes

    def tensor(self, name: str) -> Any: ...

    def release(self) -> None: ...

    def sha256(self) -> str: ...


class FileSource(WeightSource):
    """The tensors of one file, or of the shards of one checkpoint. fp16, bf16 and fp64 are given as fp32.

    `placed` is an index's word on which file holds which tensor; it must be right.
    """

    def __init__(self, files: list[Path], label: str, placed: Mapping[str, str] | None = None) -> None:
        self.label = label
        self._states = {path: _state(path) for path in files}  # before anything of them is read
        self._files = [_open_file(path) for path in files]
        self._where: dict[str, TensorFile] = {}
        self._last: TensorFile | None = None
        self._digest: str | None = None
        for file in self._files:
            for name in file.shapes:
                if name in self._where:
                    raise CheckpointError(f"{file.path}: tensor {name} stands in {self._where[name].path.name} too")
                self._where[name] = file
        astray = [n for n, f in (placed or {}).items() if n not in self._where or self._where[n].path.name != f]
        if placed and astray:
            raise CheckpointError(
                f"{label}: its index puts {astray[0]} into {placed[astray[0]]}, which lacks it ({len(astray)} tensors "
                "are not where it says); download the index and the shards again"
            )
        if any(getattr(file, "legacy", False) for file in self._files):
            self.label += " (a format from before PyTorch 1.6: one whole file in memory at a time)"

    def shapes(self) -> Shapes:
        return {name: file.shapes[name] for name, file in self._where.items()}

    def get(self, name: str) -> F32:
        file = self._where.get(name)
        if file is None:
            raise CheckpointError(f"{self.label}: no tensor named {name}")
        if self._last not in (None, file):
            self._last.release()  # type: ignore[union-attr]
        self._last = file
        tensor = self._read(file, name)
        if str(tensor.dtype) not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{file.path}: tensor {name} is {kind}, expected fp32, fp16, bf16 or fp64 (quantised checkpoints are "
                "not read); give the unquantised one"
            )
        return require_finite(tensor.float().contiguous().numpy(), name, str(file.path))

    def _read(self, file: TensorFile, name: str) -> Any:
        self._require_unchanged(file)  # first: touching a mapping of a file cut short would end the process
        try:
            tensor = file.tensor(name)
        except (CheckpointError, MachineError, MemoryError):
            raise
        except Exception as e:  # whatever a library says of a file that was whole when it was opened
            self._require_unchanged(file)
            raise CheckpointError(f"{file.path}: tensor {name} is not readable ({plain(e)}); download it again") from e
        self._require_unchanged(file)
        return tensor

    def _require_unchanged(self, file: TensorFile) -> None:
        if _state(file.path) != self._states[file.path]:
            raise CheckpointError(
                f"{file.path}: changed while it was read (another size or time of change than when it was opened), "
                "expected a file that nothing writes to; run again once it is whole"
            )

    def digest(self) -> str:
        if self._digest is None:  # two components may share the files: 13 GB are not read twice
            digests = [self._hashed(file) for file in self._files]
            self._digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        return self._digest

    def _hashed(self, file: TensorFile) -> str:
        self._require_unchanged(file)
        try:
            digest = file.sha256()
        except OSError as e:
            raise CheckpointError(f"{file.path}: not readable ({e.strerror}); check the disk") from e
        finally:
            self._require_unchanged(file)
        return digest


def open_weights(path: Path, prefer: str | None = None) -> FileSource:
    """A file of weights, or a folder of them; `prefer` is the stem of the file to take before any other.

    Raises CheckpointError: nothing there, more than one choice, or files that are damaged, incomplete or no weights.
    """
    if path.is_file():
        return FileSource([path], str(path))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory, expected a file of weights or a folder of them")
    for suffix in (".safetensors", *_TORCH):
        if prefer and (path / f"{prefer}{suffix}").is_file():
            return FileSource([path / f"{prefer}{suffix}"], str(path))
    for stem, suffixes in _FAMILIES:
        found = _in_folder(path, stem, suffixes)
        if found:
            return found
    raise CheckpointError(
        f"{path}: no weights, expected model.safetensors, pytorch_model.bin, one file of either kind, or an index of "
        "shards"
    )


def _in_folder(folder: Path, stem: str, suffixes: tuple[str, ...]) -> FileSource | None:
    """The one checkpoint of this format, or None."""
    first = suffixes[0]
    if (folder / (stem + first)).is_file():
        return FileSource([folder / (stem + first)], str(folder))
    indices = sorted(folder.glob(f"*{first}.index.json"))
    if (folder / f"{stem}{first}.index.json") in indices:
        indices = [folder / f"{stem}{first}.index.json"]
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: {few([p.name for p in indices])}: several indices of shards, expected one")
    if indices:
        placed = _placement(indices[0])
        return FileSource(_shards(indices[0], placed), str(folder), placed)
    files = [p for p in sorted(folder.iterdir()) if p.suffix in suffixes and p.is_file()]
    files = [p for p in files if not p.name.startswith(_TRAINING)]
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: {len(files)} {first} files ({few([p.name for p in files])}), expected {stem}{first}, one file, "
            "or an index of shards; name the file itself"
        )
    return FileSource(files, str(folder)) if files else None


def _state(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns; None for a file that is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _open_file(path: Path) -> TensorFile:
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH:
        return TorchFile(path)
    raise CheckpointError(f"{path}: not known as a file of weights, expected .safetensors, {', '.join(_TORCH)}")


def refuse_pointer(path: Path) -> None:
    """CheckpointError for what a clone without Git LFS leaves in place of a large file: 130 bytes of text."""
    try:
        with path.open("rb") as f:
            start = f.read(len(_LFS))
    except OSError as e:
        raise CheckpointError(f"{path}: not readable ({e.strerror}); check its permissions") from e
    if start == _LFS:
        raise CheckpointError(
            f"{path}: a Git LFS pointer, expected the file itself; fetch it with `git lfs pull` in its repository"
        )


def _placement(index: Path) -> dict[str, str]:
    """Tensor -> shard's file name."""
    refuse_pointer(index)
    try:
        weight_map = json.loads(index.read_text(), object_pairs_hook=_once)["weight_map"]
        placed = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{index}: not a shard index ({e}), expected a JSON object with `weight_map`") from e
    if not placed:
        raise CheckpointError(
            f"{index}: its `weight_map` is empty, expected tensors by shard; download the index again"
        )
    return placed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when it names a tensor twice: json would silently keep the last."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is listed twice")
    return out


def _shards(index: Path, placed: Mapping[str, str]) -> list[Path]:
    names = sorted(set(placed.values()))
    outside = [n for n in names if not _is_file_name(n)]
    if outside:
        told = repr(outside[0] if len(outside[0]) <= 80 else f"{outside[0][:77]}...")
        raise CheckpointError(f"{index}: shard {told} is no file beside it; download the index again")
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: shard {missing[0]} is missing ({len(missing)} of {len(names)}); download it again"
        )
    return [index.parent / n for n in names]


def _is_file_name(name: str) -> bool:
    """Whether it can name a file of one folder, and of nowhere else; a backslash leads out on Windows."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    try:
        return len(name.encode()) <= _NAME_BYTES
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False


def read_json_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """A configuration file; an `optional` one that is missing is empty.

    Raises CheckpointError when it is missing or holds anything but an object.
    """
    if optional and not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path}: not readable ({e.strerror}), expected the checkpoint's configuration") from e
    except (ValueError, RecursionError) as e:
        if path.read_bytes().startswith(_LFS):
            refuse_pointer(path)
        raise CheckpointError(f"{path}: corrupt ({e}), expected JSON; download it again") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON {type(data).__name__}, expected an object; download it again")
    return data

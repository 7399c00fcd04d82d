"""One `.safetensors` file, tensor by tensor.

The format carries no checksum: a bit that flips in the data and leaves a finite number is read as that number, and
shows only against a digest published with the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_rt.export.arch import Shapes
from wsi_rt.runtime.errors import CheckpointError, MachineError
from wsi_rt.runtime.hashing import sha256_file

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFile:
    """The header is read and held against the file's length when it is opened; data only in `tensor`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as f:
            self.shapes: Shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """In the file's dtype; the caller owns it."""
        with _open(self.path) as f:
            return f.get_tensor(name)

    def release(self) -> None:
        """Nothing is held between two calls."""

    def sha256(self) -> str:
        """Hex, of the whole file."""
        return sha256_file(self.path)


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise MachineError(f"reading {path} needs safetensors: pip install '.[export]' in a checkout of wsi-rt") from e
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({e}); download it again") from e

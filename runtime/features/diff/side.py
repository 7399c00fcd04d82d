"""One of the two files: read as it is, neither sorted nor judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.compat import working_mpp
from wsi_rt.runtime.features.order import SAYS, order_of
from wsi_rt.runtime.features.rounding import storage_of
from wsi_rt.runtime.features.slide_tokens import stamped
from wsi_rt.runtime.features.stamp import STAMP, load_stamp
from wsi_rt.runtime.features.tile_features import MAX_FEATURE_BYTES, checked_coordinates, integer_attribute
from wsi_rt.runtime.features.tile_h5 import RawTiles, read_raw_any
from wsi_rt.runtime.features.torch_file import MAX_TENSOR_BYTES, parse_tensor, read_bounded
from wsi_rt.runtime.types import POOLED_TOKENS, Provenance

Kind = Literal["tiles", "tokens", "rows"]


@dataclass(frozen=True)
class Side:
    """One file. kind: tiles (with coordinates), tokens (576), rows (features without coordinates).

    x: [N, C] f32, None where the file has coordinates alone. xy0: [N, 2] int64 level-0 px, None without coordinates.
    storage: the narrowest type that holds x; size0: tile edge in level-0 px; mpp: um/px of a tile as 256 px, each None
    where the file does not say. facts: the stamp's other entries, such as the grid's record.
    """

    path: Path
    kind: Kind
    x: NDArray[np.float32] | None
    xy0: NDArray[np.int64] | None
    storage: str | None
    size0: int | None
    mpp: float | None
    provenance: Provenance
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.x) if self.x is not None else len(self.xy0) if self.xy0 is not None else 0

    @property
    def width(self) -> int | None:
        return None if self.x is None else self.x.shape[1]

    def told(self) -> dict[str, Any]:
        order = order_of(self.xy0) if self.xy0 is not None else None
        return {
            "path": str(self.path),
            "kind": self.kind,
            "rows": self.rows,
            "width": self.width,
            "storage": self.storage,
            "order": None if self.xy0 is None else SAYS[order] if order else "in no known order",
            "patch_size_level0": self.size0,
            "mpp": self.mpp,
            "maker": f"made by {ascii(self.provenance.maker)[1:-1][:60]}",
        }


def read_side(path: Path) -> Side:
    """An `.h5` of tiles with or without features, or a `.pt` of slide tokens [576, C] or features [N, C].

    Values that are not finite are left in. Raises FeatureFileError.
    """
    if path.suffix.lower() in (".h5", ".hdf5"):
        return _read_h5(path)
    if path.suffix.lower() == ".pt":
        return _read_pt(path)
    raise FeatureFileError(f"{path}: expected a feature file, .h5 (tiles) or .pt (slide tokens)")


def _read_h5(path: Path) -> Side:
    raw = read_raw_any(path, MAX_FEATURE_BYTES)
    xy0 = checked_coordinates(raw.xy0, path)
    text = raw.attrs.get(STAMP)
    text = text if isinstance(text, (str, bytes)) else None
    provenance, facts = load_stamp(text, digest=raw.digest, otherwise=f"external {raw.layout}")
    size0 = integer_attribute(raw.attrs.get("patch_size_level0"))
    grid = facts.get("grid")
    settings = grid.get("settings") if isinstance(grid, dict) else None
    told = working_mpp(settings if isinstance(settings, dict) else {}, size0, raw.attrs)
    x = _float32(raw.x) if isinstance(raw, RawTiles) else None
    storage = None if x is None else storage_of(x)
    return Side(path, "tiles", x, xy0, storage, size0, told[0] if told else None, provenance, facts)


def _read_pt(path: Path) -> Side:
    data = read_bounded(path, MAX_TENSOR_BYTES)
    array, entry = parse_tensor(data, str(path), extra=f"{STAMP}.json")
    shape = array.shape[1:] if array.ndim == 3 and array.shape[0] == 1 else array.shape
    if len(shape) != 2 or 0 in shape or array.dtype.kind != "f":
        raise FeatureFileError(
            f"{path} holds {array.dtype}{list(array.shape)}, expected slide tokens [{POOLED_TOKENS}, C] or features "
            "[N, C], floating point"
        )
    provenance, facts = stamped(data, entry)
    x = _float32(array.reshape(shape))
    kind: Kind = "tokens" if shape[0] == POOLED_TOKENS else "rows"
    return Side(path, kind, x, None, storage_of(x), None, None, provenance, facts)


def _float32(x: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)

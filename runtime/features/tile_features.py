"""Tile features of a slide in HDF5: TRIDENT's layout, written and read; AtlasPatch's, read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.order import sorted_rows
from wsi_rt.runtime.features.stamp import STAMP, claimed_provenance, dump_stamp, load_stamp
from wsi_rt.runtime.features.tile_h5 import CARRIED, ENCODER_ATTRIBUTES, RawTiles, read_raw
from wsi_rt.runtime.types import TILE_PX, Provenance, TileFeatures, TileGrid

MAX_FEATURE_BYTES = 8 << 30  # as float32: a million tiles (the whole 1000 x 1000 grid) of 1536 take 6.1 GB
_MAX_XY0 = 1 << 31  # level-0 px; the largest slides are some 10^6 px wide
_BLOCK = 4096  # rows looked at together, to keep temporary arrays small
_CHUNK = 256  # rows of features per HDF5 chunk: 1.5 MB at 1536 channels


def read_tile_features(
    path: str | os.PathLike[str],
    *,
    sort: bool = True,
    patch_size_level0: int | None = None,
    max_bytes: int = MAX_FEATURE_BYTES,
) -> TileFeatures:
    """Tile features of an `.h5` file: x [N, D] f32 and a grid xy0 [N, 2] int64 level-0 px, both in one order.

    sort: by exact (y, x), the order the slide encoder was trained on (`grid.order` "row-major"); a note says when that
    changed the file's order. With False the file's order stays, and `grid.order` is "file" when it is another one.
    patch_size_level0: tile edge in level-0 px; overrides the file, and is needed where the file does not say.
    `provenance.digest` is the SHA-256 of the file. Two tiles may lie in one place.

    Raises: FeatureFileError (damaged, no known layout, no features, N = 0 or different, no patch_size_level0,
    coordinates that are no level-0 px, values that are not finite). Source: SPEC 1 and 6.
    """
    return read_tile_file(path, sort=sort, patch_size_level0=patch_size_level0, max_bytes=max_bytes)[0]


def read_tile_file(
    path: str | os.PathLike[str],
    *,
    sort: bool = True,
    patch_size_level0: int | None = None,
    max_bytes: int = MAX_FEATURE_BYTES,
) -> tuple[TileFeatures, dict[str, Any]]:
    """`read_tile_features`, and what the file says of its slide, for `write_tile_features(attributes=...)`."""
    where = Path(path)
    raw = read_raw(where, max_bytes)
    size0, notes = patch_size_of(raw.attrs, patch_size_level0, where)
    xy0 = checked_coordinates(raw.xy0, where)
    x = _finite(raw.x, xy0, where)
    provenance, facts = load_stamp(_text(raw.attrs.get(STAMP)), digest=raw.digest, otherwise=f"external {raw.layout}")
    named = _encoder_name(raw, where) if not facts else ""
    if named:
        provenance = replace(provenance, settings={**provenance.settings, "encoder_name": named})
    order, moved = sorted_rows(xy0)
    if sort and moved:
        x, xy0 = x[order], xy0[order]
        notes.append(f"sorted to row-major (y, x): {moved} of {len(order)} tiles changed place")
    elif moved:
        notes.append("order kept as in the file, which is not row-major (y, x)")
    cells, tiler = facts.get("cells"), facts.get("grid")
    grid = TileGrid(
        xy0,
        size0,
        order="row-major" if sort or not moved else "file",
        cells=cells if isinstance(cells, int) and cells >= len(xy0) else len(xy0),
        provenance=claimed_provenance(tiler) if isinstance(tiler, dict) else provenance,
    )
    carried = {name: raw.attrs[name] for name in CARRIED if _is_plain(raw.attrs.get(name))}
    return TileFeatures(x, grid, provenance, tuple(notes)), carried


def _encoder_name(raw: RawTiles, path: Path) -> str:
    """What another tool calls the tile encoder: AtlasPatch its set of features, TRIDENT the folder of its files."""
    told = [_text(raw.attrs.get(name)) for name in ENCODER_ATTRIBUTES]
    folder = path.absolute().parent.name
    told += [raw.set_name, folder.removeprefix("features_") if folder.startswith("features_") else ""]
    texts = (t.decode("utf-8", "replace") if isinstance(t, bytes) else t for t in told if t)
    return next(texts, "")[:100]


def patch_size_of(attrs: Mapping[str, Any], given: int | None, path: Path) -> tuple[int, list[str]]:
    """(tile edge in level-0 px, notes). Never guessed: positions are coordinates divided by it."""
    stored = integer_attribute(attrs.get("patch_size_level0"))
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or not 0 < given < _MAX_XY0:
            raise FeatureFileError(f"--patch-size-level0 is {given!r}, expected a positive number of level-0 px")
        differs = stored is not None and stored != given
        note = f"patch_size_level0 {given} as given; the file says {stored}"
        return int(given), [note] if differs else []
    if stored is not None and 0 < stored < _MAX_XY0:
        return stored, []
    what = "has no attribute patch_size_level0"
    if "patch_size_level0" in attrs:
        what = f"has patch_size_level0 {ascii(attrs['patch_size_level0'])[:40]}, expected a positive integer"
    patch, factor = integer_attribute(attrs.get("patch_size")), integer_attribute(attrs.get("downsample"))
    hint = f" (patch_size {patch} x downsample {factor} suggests {patch * factor})" if patch and factor else ""
    raise FeatureFileError(
        f"{path} {what} (tile edge in level-0 px), needed for tile positions: "
        f"give it with `--patch-size-level0 PX`{hint}"
    )


def integer_attribute(value: Any) -> int | None:
    """An HDF5 attribute as an integer: a number, or an array of equal numbers (CLAM's downsample has one per axis)."""
    array = np.asarray(value).ravel()
    if array.dtype.kind not in "iuf" or array.size == 0 or (array != array[0]).any():
        return None
    return int(array[0]) if np.isfinite(array[0]) and float(array[0]).is_integer() else None


def checked_coordinates(xy: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """[N, 2] int64; floats are taken when they are whole numbers."""
    good = (xy >= 0) & (xy < _MAX_XY0)
    if xy.dtype.kind == "f":
        good &= xy == np.floor(xy)
    if not good.all():
        row = int(np.flatnonzero(~good.all(axis=1))[0])
        raise FeatureFileError(
            f"{path}: tile {row} is at {xy[row].tolist()}, expected whole level-0 px (x, y) from 0 to {_MAX_XY0 - 1}: "
            "extract the coordinates again"
        )
    return np.ascontiguousarray(xy, dtype=np.int64)


def _finite(features: NDArray[Any], xy0: NDArray[np.int64], path: Path) -> NDArray[np.float32]:
    """[N, D] f32, or the error that counts the tiles with NaN or infinity and names the first."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused
        x = np.ascontiguousarray(features, dtype=np.float32)
    blocks = range(0, len(x), _BLOCK)
    bad = np.concatenate([~np.isfinite(x[i : i + _BLOCK]).all(axis=1) for i in blocks])
    if bad.any():
        first = int(np.argmax(bad))
        raise FeatureFileError(
            f"{path}: {int(bad.sum())} of {len(x)} tiles hold values that are not finite, first tile {first} at "
            f"(x, y) = {tuple(xy0[first].tolist())}: extract them again in bf16 or fp32"
        )
    return x


def _is_plain(value: Any) -> bool:
    """A short text, a number, or an array of one number per axis (CLAM's downsample)."""
    array = np.asarray(value)
    if array.dtype.kind in "iuf":
        return array.size in (1, 2)
    return isinstance(value, (str, bytes)) and len(value) <= 1000


def _text(value: Any) -> str | bytes | None:
    return value if isinstance(value, (str, bytes)) else None


def write_tile_features(
    path: str | os.PathLike[str],
    features: TileFeatures,
    *,
    name: str = "",
    size0: tuple[int, int] | None = None,
    target_magnification: float | None = None,
    level0_magnification: float | None = None,
    patch_size: int = TILE_PX,
    overlap: int = 0,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write TRIDENT's layout: `features` [N, D] f32 and `coords` [N, 2] int64 with the attributes that TRIDENT sets.

    name: the slide, without suffix; size0: (width, height) in level-0 px; what is not known is left out.
    attributes: of features that come from a file, what `read_tile_file` gave: written instead of all the others.
    Provenance, order and grid travel as JSON in the file attribute `wsi_rt`. Atomic; same input, same bytes; with
    checksums. Takes the size of the features once more in memory.

    Raises: FeatureFileError (no tiles, values that are not finite), MachineError, InputError (disk).
    """
    grid, where = features.grid, Path(path)
    if features.x.size == 0:
        raise FeatureFileError(f"there are {len(grid)} tiles of {features.x.shape[1]} numbers to write to {where}")
    _finite(features.x, grid.xy0, where)
    if attributes is None:
        attributes = _trident(name, size0, target_magnification, level0_magnification, patch_size, overlap)
    image = _image(grid, attributes, features.provenance, np.asarray(features.x, dtype=np.float32))
    with atomic_write(where) as temporary:
        temporary.write_bytes(image.getbuffer())


def write_tile_grid(
    path: str | os.PathLike[str],
    grid: TileGrid,
    *,
    name: str = "",
    size0: tuple[int, int] | None = None,
    target_magnification: float | None = None,
    level0_magnification: float | None = None,
    patch_size: int = TILE_PX,
    overlap: int = 0,
) -> None:
    """Write tiles without features as TRIDENT's patches file does: `coords` [N, 2] int64 and the attributes of
    `write_tile_features`. `coords.read_coords` reads it. Atomic; same input, same bytes.

    Raises: FeatureFileError (no tiles), MachineError, InputError (disk).
    """
    if len(grid) == 0:
        raise FeatureFileError(f"there are no tiles to write to {path}")
    attributes = _trident(name, size0, target_magnification, level0_magnification, patch_size, overlap)
    image = _image(grid, attributes, grid.provenance, None)
    with atomic_write(path) as temporary:
        temporary.write_bytes(image.getbuffer())


def _trident(
    name: str,
    size0: tuple[int, int] | None,
    target_magnification: float | None,
    level0_magnification: float | None,
    patch_size: int,
    overlap: int,
) -> dict[str, Any]:
    width, height = size0 if size0 is not None else (None, None)
    return {
        "patch_size": patch_size,
        "overlap": overlap,
        "target_magnification": target_magnification,
        "level0_magnification": level0_magnification,
        "level0_width": width,
        "level0_height": height,
        "name": name or None,
    }


def _image(
    grid: TileGrid, attributes: Mapping[str, Any], made_by: Provenance, x: NDArray[np.float32] | None
) -> io.BytesIO:
    """The bytes of the file. In memory, since h5py 3.16 can die of SIGSEGV when a chunked file meets a full disk
    (seen with RLIMIT_FSIZE, tests/runtime/features/test_atomic.py)."""
    import h5py

    image, rows = io.BytesIO(), len(grid)
    tiler = json.loads(dump_stamp(grid.provenance))
    stamp = dump_stamp(made_by, order=grid.order, cells=grid.cells, grid=tiler)
    told = {"patch_size_level0": grid.patch_size_level0, **{k: v for k, v in attributes.items() if v is not None}}
    with h5py.File(image, "w") as root:
        root.attrs[STAMP] = stamp.decode("ascii")
        # Fletcher-32 sums (built into HDF5, so any reader has them) go with chunks: damage is seen on reading.
        if x is not None:
            root.create_dataset("features", data=x, chunks=(min(rows, _CHUNK), x.shape[1]), fletcher32=True)
        coords = root.create_dataset("coords", data=grid.xy0, chunks=(min(rows, _BLOCK), 2), fletcher32=True)
        coords.attrs.update(told)
    return image

"""The HDF5 side of tile features: open an untrusted file, find the layout, take arrays and attributes out of it.

Layouts (SPEC 6): TRIDENT `features` [N, D] or [1, N, D] and `coords` [N, 2]; AtlasPatch `features/<name>` [N, D] and
`coords` [N, 5] (x, y, read_w, read_h, level; patch_size_level0 is a file attribute); CLAM patch files hold `coords`
only. Datasets must lie in the file itself: links and storage outside of it are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from numpy.typing import NDArray

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.stamp import STAMP

if TYPE_CHECKING:
    import h5py

# What h5py raises for damaged files, by experience. Our own errors are none of these.
_H5_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError)
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
CARRIED = (  # what TRIDENT and CLAM say of a slide and its tiles, beside patch_size_level0
    *("patch_size", "overlap", "target_magnification", "level0_magnification", "level0_width", "level0_height"),
    *("patch_level", "downsample", "name"),
)
# Where tools say which tile encoder made features; written by none of ours.
ENCODER_ATTRIBUTES = ("encoder", "encoder_name", "patch_encoder", "feature_extractor")
_ATTRIBUTES = ("patch_size_level0", *CARRIED, *ENCODER_ATTRIBUTES, STAMP)
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class RawCoords:
    """xy0: [N, 2] number as stored; attrs: those of _ATTRIBUTES that features, file or coords carry (the last one
    wins); layout: trident, clam or atlaspatch."""

    xy0: NDArray[Any]
    attrs: Mapping[str, Any]
    layout: str
    digest: str


@dataclass(frozen=True)
class RawTiles(RawCoords):
    """x: [N, D] float as stored; set_name: what AtlasPatch calls this set of features, else ""."""

    x: NDArray[Any]
    set_name: str = ""


def read_raw(path: Path, max_bytes: int) -> RawTiles:
    """The arrays of a tile-features file, unchecked beyond their shapes, and the SHA-256 of the same bytes.

    Raises: FeatureFileError when the file is missing, damaged, of no known layout, without features or coordinates,
    or declares more than `max_bytes` of features as float32.
    """
    return _open(path, lambda root, digest: _read_root(root, path, digest, max_bytes))


def read_raw_coords(path: Path) -> RawCoords:
    """The coordinates of any of these files, with or without features. Raises: FeatureFileError."""
    return _open(path, lambda root, digest: _read_coords(root, path, digest))


def read_raw_any(path: Path, max_bytes: int) -> RawCoords:
    """RawTiles where there are features, else RawCoords. Raises: FeatureFileError."""

    def read(root: h5py.File, digest: str) -> RawCoords:
        bare = "coords" in root and _features(root, path)[0] is None
        return _read_coords(root, path, digest) if bare else _read_root(root, path, digest, max_bytes)

    return _open(path, read)


def _open(path: Path, read: Callable[[h5py.File, str], _Read]) -> _Read:
    import h5py

    try:
        # Opened once by us: what is hashed is what is read, and no HDF5 file lock is asked of a network disk.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            digest = _digest(file, path)
            with h5py.File(file, "r") as root:
                return read(root, digest)
    except FileNotFoundError as error:
        raise FeatureFileError(f"cannot read {path} (no such file): check the path") from error
    except PermissionError as error:
        raise FeatureFileError(f"cannot read {path} (permission denied): check its permissions") from error
    except _H5_ERRORS as error:
        detail = ascii(str(error))[1:-1][:120]
        raise FeatureFileError(
            f"{path} is damaged or cut short ({detail}), expected a whole HDF5 file: fetch or write it again"
        ) from error


def _digest(file: BinaryIO, path: Path) -> str:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise FeatureFileError(f"{path} is no regular file, expected an HDF5 file")
    if file.read(8) != _HDF5_MAGIC:
        raise FeatureFileError(f"{path} is no HDF5 file, expected tile features (.h5): slide tokens are named .pt")
    file.seek(0)
    sha = hashlib.sha256()
    while block := file.read(1 << 20):
        sha.update(block)
    file.seek(0)
    return sha.hexdigest()


def _read_coords(root: h5py.File, path: Path, digest: str) -> RawCoords:
    coords = _dataset(root, "coords", path)
    if coords is None:
        raise FeatureFileError(
            f"{path} holds no 'coords', expected tile coordinates [N, 2]: segment the slide with TRIDENT, CLAM or "
            "AtlasPatch, or with `wsi-rt tile SLIDE --out DIR`"
        )
    attrs, shape = {**_attributes(root), **_attributes(coords)}, _checked_coords(coords, path)
    clam = "patch_level" in attrs and "patch_size_level0" not in attrs
    layout = "atlaspatch" if shape[1] == 5 else "clam" if clam else "trident"
    return RawCoords(coords[...].reshape(shape)[:, :2], attrs, layout, digest)


def _checked_coords(coords: h5py.Dataset, path: Path) -> tuple[int, ...]:
    shape = _squeezed(coords.shape)
    if len(shape) != 2 or shape[1] not in (2, 5) or coords.dtype.kind not in "iuf":
        raise FeatureFileError(f"{path}: coords are {_described(coords)}, expected integers [N, 2] or [N, 5]")
    if shape[0] == 0:
        raise FeatureFileError(f"{path} holds 0 tiles, expected at least one: check the tissue detection of that slide")
    return shape


def _read_root(root: h5py.File, path: Path, digest: str, max_bytes: int) -> RawTiles:
    coords = _dataset(root, "coords", path)
    features, layout, set_name = _features(root, path)
    if features is None:
        count = "no tiles" if coords is None else f"coordinates of {coords.shape[0] if coords.shape else 0} tiles"
        raise FeatureFileError(
            f"{path} holds {count} but no features, expected 'features' [N, D] and 'coords' [N, 2]: encode its slide "
            f"at these coordinates with `wsi-rt encode SLIDE --engines DIR --coords FILE --out tiles.h5`, or extract "
            "features for it with TRIDENT or CLAM"
        )
    if coords is None:
        raise FeatureFileError(
            f"{path} holds features but no 'coords' [N, 2], which the slide encoder needs: "
            "run `wsi-rt encode SLIDE --engines DIR --out tiles.h5`"
        )
    x_shape = _squeezed(features.shape)
    if len(x_shape) != 2 or features.dtype.kind != "f" or x_shape[1] == 0:
        raise FeatureFileError(f"{path}: features are {_described(features)}, expected float [N, D] or [1, N, D]")
    xy_shape = _squeezed(coords.shape)
    if len(xy_shape) == 2 and x_shape[0] != xy_shape[0]:
        raise FeatureFileError(
            f"{path} holds {x_shape[0]} features for {xy_shape[0]} coordinates, expected one each: extract them again"
        )
    xy_shape = _checked_coords(coords, path)
    size_bytes = math.prod(x_shape) * 4
    if size_bytes > max_bytes:
        raise FeatureFileError(
            f"{path}: features {list(x_shape)} take {size_bytes} bytes as float32, expected at most {max_bytes}"
        )
    attrs = {**_attributes(features), **_attributes(root), **_attributes(coords)}
    xy0 = coords[...].reshape(xy_shape)[:, :2]
    return RawTiles(xy0, attrs, layout, digest, features[...].reshape(x_shape), set_name)


def _features(root: h5py.File, path: Path) -> tuple[h5py.Dataset | None, str, str]:
    """The one set of features, the name of the layout, and of the set."""
    import h5py

    if not isinstance(_local(root, "features", path), h5py.Group):
        return _dataset(root, "features", path), "trident", ""
    names = sorted(root["features"])
    if len(names) > 1:
        raise FeatureFileError(
            f"{path} holds {len(names)} feature sets {names[:8]}, expected one: "
            "run atlaspatch with one --feature-extractors, or copy that set to a file of its own"
        )
    return (_dataset(root["features"], names[0], path) if names else None), "atlaspatch", "".join(names)


def _local(group: h5py.Group, name: str, path: Path) -> Any:
    """The object of that name, or None. A link could name any file that this process may read: refused."""
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise FeatureFileError(f"{path}: {name!r} is a link to elsewhere, expected data in the file: copy it in")
    return group[name]


def _dataset(group: h5py.Group, name: str, path: Path) -> h5py.Dataset | None:
    import h5py

    found = _local(group, name, path)
    if found is None:
        return None
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise FeatureFileError(f"{path}: {name!r} holds no array, expected a dataset")
    if found.is_virtual or found.external:
        raise FeatureFileError(f"{path}: {name!r} is stored outside the file, expected data in it: copy it in")
    return found


def _attributes(found: h5py.HLObject) -> dict[str, Any]:
    return {name: found.attrs[name] for name in _ATTRIBUTES if name in found.attrs}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _described(found: h5py.Dataset) -> str:
    return f"{found.dtype}{list(found.shape)}"

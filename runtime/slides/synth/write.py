"""Writing a synthetic slide: the levels grow side by side, a tile row at a time."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write, is_vacant, plain_os_error
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.slides.synth.encode import JPEG_QUALITY, TileEncoder
from wsi_rt.runtime.slides.synth.spec import SlideSpec
from wsi_rt.runtime.slides.synth.stain import TissuePainter
from wsi_rt.runtime.slides.synth.tiff import PyramidWriter

Progress = Callable[[int, int], None]


def write_synth_slide(path: str | Path, *, on_progress: Progress | None = None, threads: int = 1, **spec: Any) -> Path:
    """Write the slide that `SlideSpec(**spec)` describes, one that OpenSlide opens; return its path.

    path: the file to write, or the folder of a DICOM series, which must be new or empty. threads: who paint and
    encode; the bytes do not depend on it. About 10,000 tiles of 256 px a minute and thread with JPEG.

    Memory: about 60 MB, one tile row per coarser level (100,000 px wide: 26 MB) and, with several threads, at most one
    row of tiles (75 MB); measured: 113 MB for 100,000 px and 2 threads. What is written lies beside its place and is
    renamed, replacing an older file; whatever interrupts it, nothing is left behind. on_progress(done, total) counts
    level-0 tiles.

    Raises InputError (the spec, missing folder) and MachineError (disk full, not writable; DICOM without pydicom).
    """
    path = Path(path)
    chosen = SlideSpec(**spec)
    if not path.parent.is_dir():
        raise InputError(f"synthetic slide: folder is {str(path.parent)!r}, expected an existing folder")
    if chosen.format == "dicom":
        _write_dicom(path, chosen, on_progress, threads)
    else:
        _write_tiff(path, chosen, on_progress, threads)
    return path


def _write_tiff(path: Path, spec: SlideSpec, on_progress: Progress | None, threads: int) -> None:
    if path.is_dir():
        raise InputError(f"synthetic slide: path is {str(path)!r}, expected a file name, not a folder")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        encode = TileEncoder(spec)
        writer = PyramidWriter(file, spec, _description(spec), encode.tables)
        Cascade(writer, spec, encode).run(on_progress, threads)
        writer.finish()


def _write_dicom(path: Path, spec: SlideSpec, on_progress: Progress | None, threads: int) -> None:
    from wsi_rt.runtime.slides.synth.dicom import DicomWriter

    if not is_vacant(path):
        raise InputError(f"synthetic slide: path is {str(path)!r}, expected a new or empty folder for a DICOM series")
    # offsets of 32 bits reach 4 GiB of frames per level: 20,000 that do not compress at all
    frames = -(-spec.width // spec.tile) * -(-spec.height // spec.tile)
    table = "basic" if frames * spec.tile**2 * 3 < 1 << 32 else "extended"
    temporary = path.parent / f".{path.name[:64]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        writer = DicomWriter(
            temporary, spec.sizes, spec.tile, spec.codec,
            mpp=spec.mpp, sparse=spec.sparse, seed=spec.seed, table=table,
        )  # fmt: skip
        with contextlib.closing(writer):
            Cascade(writer, spec, TileEncoder(spec)).run(on_progress, threads)
            writer.finish()
        os.replace(temporary, path)
    except OSError as error:
        raise plain_os_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after a successful rename


def _description(spec: SlideSpec) -> str | None:
    """Aperio's ImageDescription, from which readers take the resolution; a generic TIFF has tags for it."""
    if spec.format != "svs":
        return None
    codec = {"jpeg": f"JPEG/RGB Q={JPEG_QUALITY}", "jpeg2000": "J2K/RGB"}.get(spec.codec, spec.codec)
    size = f"{spec.width}x{spec.height}"
    return (
        f"Aperio Image Library (synthetic, wsi-rt) \r\n{size} [0,0 {size}] ({spec.tile}x{spec.tile}) {codec}"
        f"|AppMag = {10 / spec.mpp:.3g}|MPP = {spec.mpp:.6g}"
    )


class TileSink(Protocol):
    """Where encoded tiles go, each place once; a sparse file gets no tile where bare glass is."""

    def write_tile(self, level: int, col: int, row: int, data: bytes) -> None: ...


class Cascade:
    """Paints level 0 tile by tile and averages each tile row into the next level's row as it goes.

    A level's row is written once it is complete; so only one tile row per coarser level is held.
    """

    def __init__(self, sink: TileSink, spec: SlideSpec, encode: Callable[[NDArray[np.uint8]], bytes]) -> None:
        self._sink = sink
        self._spec = spec
        self._encode = encode
        self._tile = tile = spec.tile
        self._counts = [(-(-w // tile), -(-h // tile)) for w, h in spec.sizes]
        self._steps = [b // a for a, b in pairwise(spec.levels)]
        self._painter = TissuePainter(spec.width, spec.height, spec.mpp, spec.seed, spec.tissue)
        self._glass = self._painter.background(tile, tile)
        self._glass_data = None if spec.sparse else encode(self._glass)
        # strips[i]: the unfinished tile row of level i + 1, u8 [tile, cols * tile, 3]; white where no slide is
        self._strips = [np.full((tile, cols * tile, 3), 255, np.uint8) for cols, _ in self._counts[1:]]

    def run(self, on_progress: Progress | None, threads: int = 1) -> None:
        """Paint and write everything. Threads work within a tile row, whose tiles are written in order."""
        cols, rows = self._counts[0]
        with ThreadPoolExecutor(threads) as pool:
            for row in range(rows):
                self._row(row, cols, pool if threads > 1 else None, on_progress, rows * cols)
                self._row_done(0, row)

    def _row(
        self, row: int, cols: int, pool: ThreadPoolExecutor | None, on_progress: Progress | None, total: int
    ) -> None:
        ahead: list[Future[tuple[NDArray[np.uint8], bytes | None]]] = []
        if pool is not None:
            ahead = [pool.submit(self._painted, col, row) for col in range(cols)]
        try:
            for col in range(cols):
                pixels, data = ahead[col].result() if ahead else self._painted(col, row)
                if data is not None:
                    self._sink.write_tile(0, col, row, data)
                self._average(0, col, row, pixels)
                if ahead:
                    ahead[col] = Future()  # gives the pixels back: a row of them may be 75 MB
                if on_progress is not None:
                    on_progress(row * cols + col + 1, total)
        finally:
            for future in ahead:
                future.cancel()

    def _painted(self, col: int, row: int) -> tuple[NDArray[np.uint8], bytes | None]:
        place = (col * self._tile, row * self._tile, self._tile, self._tile)
        if self._painter.is_background(*place):
            return self._glass, self._glass_data
        pixels = self._painter.paint(*place)
        return pixels, self._encode(pixels)

    def _average(self, level: int, col: int, row: int, pixels: NDArray[np.uint8]) -> None:
        """Box-average one tile of `level` into the strip of the next level."""
        if level == len(self._steps):
            return
        step, strip = self._steps[level], self._strips[level]
        edge = self._tile // step
        y, x = row * edge % self._tile, col * edge
        mean = pixels.reshape(edge, step, edge, step, 3).mean(axis=(1, 3), dtype=np.float32)
        target = strip[y : y + edge, x : x + edge]  # the last column may be cut off
        target[:] = np.rint(mean).astype(np.uint8)[:, : target.shape[1]]

    def _row_done(self, level: int, row: int) -> None:
        """After a tile row of `level`: write the next level's row if this completed it."""
        if level == len(self._steps):
            return
        step = self._steps[level]
        last = row == self._counts[level][1] - 1
        if (row + 1) % step and not last:
            return
        cols, rows = self._counts[level + 1]
        strip, up = self._strips[level], row // step
        if up < rows:
            for col in range(cols):
                pixels = np.ascontiguousarray(strip[:, col * self._tile : (col + 1) * self._tile])
                self._sink.write_tile(level + 1, col, up, self._encode(pixels))
                self._average(level + 1, col, up, pixels)
            self._row_done(level + 1, up)
        strip[:] = 255

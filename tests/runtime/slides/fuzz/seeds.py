"""The slides that are damaged: small ones of every format and codec, and the real ones where they are there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[5] / "shared" / "data" / "slides"
REAL = ("CMU-1-Small-Region.svs", "slideio_test3-DAPI-2-387.ndpi", "ezwsi_multiframe_camelyon.dcm",
        "highdicom_sm_image.dcm", "ospy_small.svs", "ospy_boxes.tiff")  # fmt: skip
SIZE: dict[str, Any] = {"width": 700, "height": 500, "levels": (1, 2, 4), "tissue": 0.6}
WRITTEN: dict[str, dict[str, Any]] = {
    "jpeg.svs": {"codec": "jpeg"},
    "jpeg-rgb-240.svs": {"codec": "jpeg-rgb", "tile": 240, "bigtiff": False},
    "jpeg-tables.tif": {"codec": "jpeg", "shared_tables": True, "format": "tiff", "subsampling": "4:2:2"},
    "jpeg2000.svs": {"codec": "jpeg2000"},
    "jpeg2000-ycc.svs": {"codec": "jpeg2000-ycc", "bigtiff": False},
    "deflate.tif": {"codec": "deflate", "format": "tiff", "predictor": True},
    "lzw.tif": {"codec": "lzw", "format": "tiff", "bigtiff": False, "predictor": True},
    "raw.tif": {"codec": "raw", "format": "tiff", "big_endian": True, "levels": (1, 4)},
    "sparse.svs": {"codec": "jpeg", "sparse": True, "tissue": 0.2},
}  # fmt: skip
SERIES: dict[str, dict[str, Any]] = {
    "dicom-jpeg": {"codec": "jpeg"},
    "dicom-jpeg2000": {"codec": "jpeg2000", "sparse": True},
    "dicom-raw": {"codec": "raw", "levels": (1, 4)},
}


@dataclass(frozen=True)
class Seed:
    """files: the slide, the one to open first.  readers: --reader, None for the automatic choice.

    oracle: OpenSlide reads the format, so pixels are compared with its.
    """

    name: str
    files: tuple[Path, ...]
    readers: tuple[str | None, ...]
    oracle: bool = True


def write_seeds(folder: Path) -> list[Seed]:
    from PIL import Image

    from wsi_rt.runtime.slides.synth import write_synth_slide
    from wsi_rt.runtime.slides.synth.stain import TissuePainter

    tiff: tuple[str | None, ...] = (None, None, "openslide")
    if importlib.util.find_spec("cucim"):
        tiff = (*tiff, "cucim")
    seeds = []
    for name, spec in WRITTEN.items():
        path = write_synth_slide(folder / name, **{**SIZE, **spec})
        seeds.append(Seed(name, (path,), tiff if name.startswith("jpeg") else (None, None, "openslide")))
    if importlib.util.find_spec("pydicom"):
        for name, spec in SERIES.items():
            series = write_synth_slide(folder / name, **{**SIZE, **spec}, format="dicom")
            seeds.append(Seed(name, tuple(sorted(series.iterdir())), (None, None, "openslide")))
    picture = Image.fromarray(TissuePainter(400, 300, 0.5, 0, 0.6).paint(0, 0, 400, 300))
    for name in ("plain.png", "plain.jpg", "plain.bmp", "strips.tif"):
        picture.save(folder / name, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))
        seeds.append(Seed(name, (folder / name,), (None,), oracle=False))
    for name in REAL:
        if (DATA / name).is_file():
            seeds.append(Seed(name, (DATA / name,), (None, None, "openslide")))
    return seeds

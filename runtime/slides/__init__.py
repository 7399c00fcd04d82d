"""Slides: open one, plan the tiles, find the tissue, read the tiles.

    with open_slide(path, settings) as reader:
        plan = plan_reads(reader, settings)
        grid = select_tiles(plan, find_tissue(reader))
        for batch in iter_tiles(reader, grid, plan, batch_size=32):
            ...

OpenSlide and Pillow are imported when a slide is opened, not with this package, and what writes slides is in `synth`.
"""

from wsi_rt.runtime.slides.cohort import FailedSlide, SlideBatch, iter_slide_batches
from wsi_rt.runtime.slides.grid import ReadPlan, plan_reads
from wsi_rt.runtime.slides.open import READER_NAMES, open_slide
from wsi_rt.runtime.slides.reader import Level, SlideReader
from wsi_rt.runtime.slides.regions import Regions, read_regions
from wsi_rt.runtime.slides.tiles import iter_tiles, read_tile
from wsi_rt.runtime.slides.tissue import TissueMask, find_tissue, otsu_threshold
from wsi_rt.runtime.slides.tissue_tiles import select_tiles, selection_notes

__all__ = [
    "READER_NAMES",
    "FailedSlide",
    "Level",
    "ReadPlan",
    "Regions",
    "SlideBatch",
    "SlideReader",
    "TissueMask",
    "find_tissue",
    "iter_slide_batches",
    "iter_tiles",
    "open_slide",
    "otsu_threshold",
    "plan_reads",
    "read_regions",
    "read_tile",
    "select_tiles",
    "selection_notes",
]

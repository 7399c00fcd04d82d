"""Slides: open one, plan the tiles, find the tissue, read the tiles.

    with open_slide(path, settings) as reader:
        plan = plan_reads(reader, settings)
        grid = select_tiles(plan, find_tissue(reader))
        for batch in iter_tiles(reader, grid, plan, batch_size=32):
            ...

OpenSlide and Pillow are imported when a slide is opened, not with this package.
"""

from wsi_rt.runtime.slides.grid import ReadPlan, plan_reads
from wsi_rt.runtime.slides.reader import Level, SlideReader, open_slide
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.slides.tiles import iter_tiles, read_tile
from wsi_rt.runtime.slides.tissue import TissueMask, find_tissue, otsu_threshold, select_tiles

__all__ = [
    "Level",
    "ReadPlan",
    "SlideReader",
    "TissueMask",
    "find_tissue",
    "iter_tiles",
    "open_slide",
    "otsu_threshold",
    "plan_reads",
    "read_tile",
    "select_tiles",
    "write_synth_slide",
]

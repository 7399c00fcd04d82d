"""Synthetic H&E slides of any size, for demos, tests and benchmarks: deterministic, streamed, no patient."""

from wsi_rt.runtime.slides.synth.spec import CODECS, FORMATS, SlideSpec
from wsi_rt.runtime.slides.synth.write import write_synth_slide

__all__ = ["CODECS", "FORMATS", "SlideSpec", "write_synth_slide"]

"""What answers questions about slides. `from wsi_rt.runtime import Pipeline`."""

from wsi_rt.runtime.config import GenerationSettings, SlideSettings
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.pipeline import Pipeline
from wsi_rt.runtime.types import Answer

__all__ = ["Answer", "GenerationSettings", "Pipeline", "SlideSettings", "WsiRtError"]

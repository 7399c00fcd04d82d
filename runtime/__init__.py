"""What answers questions about slides. `from wsi_rt.runtime import Pipeline`.

Names are imported when they are first used, so that `wsi-rt --help` and errors of usage need no numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_rt.runtime.config import GenerationSettings, SlideSettings
    from wsi_rt.runtime.errors import WsiRtError
    from wsi_rt.runtime.llm.language_model import ModelSettings, Question
    from wsi_rt.runtime.pipeline import Pipeline
    from wsi_rt.runtime.types import Answer

__all__ = ["Answer", "GenerationSettings", "ModelSettings", "Pipeline", "Question", "SlideSettings", "WsiRtError"]

_HOME = {
    "Answer": "types",
    "GenerationSettings": "config",
    "ModelSettings": "llm.language_model",
    "Pipeline": "pipeline",
    "Question": "llm.language_model",
    "SlideSettings": "config",
    "WsiRtError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

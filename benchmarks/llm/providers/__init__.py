"""Who computes: each provider is a `Model`, opened in a process of its own by `open_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_rt.benchmarks.llm.cases import FAST, LLAMA_CPP, LLAMA_CPP_BATCHED, OURS, PLAIN, TORCH, UNSHARED

if TYPE_CHECKING:
    from wsi_rt.benchmarks.llm.providers.base import Model

_HERE = "wsi_rt.benchmarks.llm.providers"
_MODELS = {
    OURS: f"{_HERE}.ours:Ours",
    FAST: f"{_HERE}.ours:Fast",
    PLAIN: f"{_HERE}.ours:Plain",
    UNSHARED: f"{_HERE}.ours:Unshared",
    TORCH: f"{_HERE}.ours:Torch",
    LLAMA_CPP: f"{_HERE}.llama_cpp_python:LlamaCpp",
    LLAMA_CPP_BATCHED: f"{_HERE}.llama_cpp_python:Batched",
    "onnxruntime-genai": f"{_HERE}.onnxruntime_genai:GenAi",
    "openvino": f"{_HERE}.openvino_runtime:OpenVino",
    "transformers": f"{_HERE}.hf_transformers:Transformers",
}
# Provider -> (module that must import, the file that `files` makes for it)
NEEDS = {
    OURS: ("onnxruntime", "bundle"),
    FAST: ("onnxruntime", "bundle"),
    PLAIN: ("onnxruntime", "bundle"),
    UNSHARED: ("onnxruntime", "bundle"),
    TORCH: ("torch", "bundle"),
    LLAMA_CPP: ("llama_cpp", "gguf"),
    LLAMA_CPP_BATCHED: ("llama_cpp", "gguf"),
    "onnxruntime-genai": ("onnxruntime_genai", "genai"),
    "openvino": ("openvino", "bundle"),
    "transformers": ("transformers", "source"),
}


@dataclass(frozen=True)
class Place:
    """What a provider opens. files: kind (NEEDS) -> path, or the checkpoint's word for "source"."""

    files: Mapping[str, str]
    threads: int
    context: int  # tokens of one sequence at most
    sequences: int  # at once at most

    def path(self, kind: str) -> Path:
        return Path(self.files[kind])


def open_model(provider: str, place: Place) -> Model:
    module, _, name = _MODELS[provider].partition(":")
    model: Model = getattr(import_module(module), name)(place)
    return model

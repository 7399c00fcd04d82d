"""`adapter_config.json` of a LoRA adapter (peft's LoraConfig): what decides the merge, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import read_json_object
from wsi_rt.runtime.errors import CheckpointError

FILE_NAME = "adapter_config.json"

# Settings without a say in the merged weights. fan_in_fan_out is among them because peft switches it off for
# nn.Linear, and every projection of a Llama is one; what it was trained as shows in the tensors' shapes.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
# Initialisations that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) rewrite it.
_PLAIN_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """`targets`: the module names every decoder layer must bring tensors for; None when the configuration chooses
    layers by other means. `saved`: modules whose whole weights the adapter holds."""

    label: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | None
    saved: tuple[str, ...]
    base: str | None

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised)."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def arithmetic(self) -> tuple[object, ...]:
        """What decides the merged numbers, for a digest."""
        patterns = (tuple(self.rank_pattern.items()), tuple(self.alpha_pattern.items()))
        return (self.rank, self.alpha, self.rslora, *patterns)

    def local_base(self, folder: Path) -> Path | None:
        """The base that the adapter names, when it is a folder here: beside the adapter, or where we stand."""
        places = (folder / self.base, Path(self.base)) if self.base else ()
        return next((p.resolve() for p in places if p.is_dir()), None)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises CheckpointError naming every setting whose arithmetic is not this merge's."""
    path = folder / FILE_NAME
    data = read_json_object(path)
    f = Fields({k: v for k, v in data.items() if v is not None}, str(path))
    _refuse_other_arithmetic(f, data)
    rank_pattern = _pattern(f, data, "rank_pattern")
    if any(not isinstance(r, int) for r in rank_pattern.values()):
        f.refuse("rank_pattern", rank_pattern, "whole numbers")
    base = data.get("base_model_name_or_path")
    return AdapterConfig(
        label=str(path),
        rank=f.whole("r"),
        alpha=f.positive("lora_alpha"),
        rslora=f.flag("use_rslora", default=False),
        rank_pattern=rank_pattern,
        alpha_pattern=_pattern(f, data, "alpha_pattern"),
        targets=_targets(data),
        saved=tuple(_strings(f, data, "modules_to_save")),
        base=base if isinstance(base, str) and base else None,
    )


def _refuse_other_arithmetic(f: Fields, data: Mapping[str, Any]) -> None:
    if data.get("peft_type", "LORA") != "LORA":
        f.refuse("peft_type", data["peft_type"], "LORA, the only adapter supported: merge it with peft first")
    init = data.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        f.refuse("init_lora_weights", init, f"one of {_PLAIN_INIT}: others rewrite the base; merge it with peft first")
    if data.get("bias", "none") not in ("none", "all", "lora_only"):
        f.refuse("bias", data["bias"], "none, all or lora_only")
    other = sorted(k for k, v in data.items() if v and k not in _INERT | _READ)
    if other:
        told = ", ".join(f"{k} = {data[k]!r}"[:120] for k in other)
        raise CheckpointError(f"{f.label}: {told} is not supported, expected plain LoRA; merge it with peft first")


def _pattern(f: Fields, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Regular expression of a module's name -> a number above 0."""
    given = data.get(key) or {}
    if not isinstance(given, dict):
        f.refuse(key, given, "an object")
    for pattern, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            f.refuse(key, given, "numbers above 0")
        try:
            re.compile(pattern)
        except re.error as e:
            raise CheckpointError(f"{f.label}: {key} has {pattern!r} ({e}), expected a regular expression") from e
    return dict(given)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the whole name, or what follows one of its dots."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def _strings(f: Fields, data: Mapping[str, Any], key: str) -> list[str]:
    given = data.get(key) or []
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        f.refuse(key, given, "a list of module names")
    return given


def _targets(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names only: a regular expression, "all-linear" or a choice of layers is peft's to read, not ours."""
    targets = data.get("target_modules")
    chosen = data.get("layers_to_transform") is not None or data.get("exclude_modules")
    return None if chosen or not isinstance(targets, list) else tuple(str(t) for t in targets)

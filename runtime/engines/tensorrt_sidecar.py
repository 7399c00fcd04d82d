"""What stands beside an engine as JSON: an engine file tells nothing without a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.manifest import TensorSpec

SCHEMA = 1
Bounds = tuple[int, int, int]  # min, opt, max
Profile = Mapping[str, Bounds]  # by symbolic dimension

# Bytes of an element, by the name that a spec has.
ITEM_BYTES = {"uint8": 1, "bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class Sidecar:
    """Of one engine.

    target: `tensorrt` or `tensorrt-rtx`. version: of the module that built it, which alone opens it. sms: GPU
    architectures that it runs on. precision: fp16 or bf16. inputs, outputs: of the engine, dtypes as in ITEM_BYTES.
    least: outputs that must not be below a number, else the numbers are not to be trusted. tables: inputs that the
    runtime computes (a plugin's table of programs), with what from. memory_bytes: of activations at the largest shapes,
    weights_bytes: as the builder reports them. layers: how the builder's own layers are called, and how many of each.
    toolchain: package versions. onnx: SHA-256 of the graph and of its weights.
    """

    target: str
    version: str
    sms: tuple[int, ...]
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    memory_bytes: int
    weights_bytes: int
    layers: Mapping[str, int]
    toolchain: Mapping[str, str]
    onnx: Mapping[str, str]
    least: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    def profile_for(self, dims: Mapping[str, int], what: str) -> int:
        """The first profile that takes these sizes. Raises InputError, naming the dimension, when none does."""
        flaws = [_outside(profile, dims) for profile in self.profiles]
        if None in flaws:
            return flaws.index(None)
        raise InputError(f"{what}: {'; '.join(f for f in flaws if f)}")


def _outside(profile: Profile, dims: Mapping[str, int]) -> str | None:
    for dim, size in dims.items():
        low, _, high = profile[dim]
        if not low <= size <= high:
            return f"{dim} is {size}, expected {low} to {high} of this engine"
    return None


def sizes(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], what: str) -> dict[str, int]:
    """The symbolic dimensions of these shapes. Raises InputError where two differ, or a fixed size is not met."""
    found: dict[str, int] = {}
    for spec in specs:
        shape = shapes.get(spec.name)
        if shape is None:
            continue
        told = f"{what}: `{spec.name}` is {list(shape)}, expected {list(spec.dims)}"
        if len(shape) != len(spec.dims):
            raise InputError(told)
        for size, dim in zip(shape, spec.dims, strict=True):
            expected = dim if isinstance(dim, int) else found.setdefault(dim, size)
            if size != expected:
                raise InputError(told if isinstance(dim, int) else f"{told} with {dim} = {expected}")
    return found


def sidecar_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def read_sidecar(engine: Path) -> Sidecar:
    """Raises EngineMismatchError when it is missing, damaged or of another schema."""
    path = sidecar_path(engine)
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise EngineMismatchError(
                f"{path}: schema {data['schema']}, this wsi-rt reads {SCHEMA}; rebuild the bundle"
            )
        for key in ("inputs", "outputs"):
            data[key] = tuple(TensorSpec(s["name"], s["dtype"], tuple(s["dims"])) for s in data[key])
        data["profiles"] = tuple({dim: tuple(bounds) for dim, bounds in p.items()} for p in data["profiles"])
        return Sidecar(**{**data, "sms": tuple(data["sms"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineMismatchError(f"{path}: not readable ({e!r}); rebuild the bundle") from e

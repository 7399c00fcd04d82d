"""How far an engine is from the fp32 reference, and how far it may be.

Every component of a bundle carries a small stored input and the reference's output (`check.npz`), so that
the numbers can be checked again without the checkpoint and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.engines.ort import plain_failure
from wsi_rt.runtime.engines.ort_provider import on_cpu
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import EngineMismatchError, ParityError
from wsi_rt.runtime.manifest import EngineManifest

Arrays = Mapping[str, NDArray[Any]]
INPUT, OUTPUT = "input.", "output."  # prefixes of the names in check.npz
WIDE_LOGITS = "logits.wide"  # of a language model's graphs for calls of many rows


@dataclass(frozen=True)
class Gate:
    """All bounds must hold. max_rel: largest error over the largest reference value; min_cosine: of the worst row.
    max_layer, max_row: what a layer adds to its input may be off by this share, over all rows, and in one row by this
    share of an average row, or of its own where that is larger (`export.parity.LayerCheck`)."""

    max_rel: float
    min_cosine: float
    max_layer: float
    max_row: float


# Against the fp32 module with the very weights that the engine stores, rounded ones included: what is left is rounding
# and summation order in fp32 (about 2e-6 is seen), and where Linear layers are integer blocks, their activations
# rounded to 8 bits: each layer is off by 0.02, and after 32 of them the end by 0.14 (cosine 0.99). A fault in one layer
# could hide in the latter, which is why layers have bounds of their own.
# In 16 bits weights are rounded too. Of the nano preset and components of 768 to 4,096 channels, at worst (end, its
# cosine below 1, a layer, a row in one): fp16 2.8e-3, 4.3e-6, 1.2e-3, 2.7e-3; bf16 2.0e-2, 1.8e-4, 8.7e-3, 1.7e-2,
# eight times as much, as three bits less say. The bounds are 3 to 4 times that, and of the end's cosine 10 times: 32
# and 40 layers add up more than the 12 measured.
_ROUNDED = Gate(max_rel=0.3, min_cosine=0.95, max_layer=0.05, max_row=0.2)
GATES = {
    "fp32": Gate(max_rel=5e-5, min_cosine=0.999999, max_layer=1e-4, max_row=1e-3),
    "int8": _ROUNDED,
    "int4": _ROUNDED,
    "fp16": Gate(max_rel=0.01, min_cosine=0.99995, max_layer=0.004, max_row=0.01),
    "bf16": Gate(max_rel=0.07, min_cosine=0.998, max_layer=0.03, max_row=0.06),
}


# Of the layers of `--fast`, against the checkpoint itself. One scale for a row of activations, of which a few stand far
# out: 0.06 is seen in a 7 B layer, 0.09 in SmolLM2's and 0.23 in one of its rows. What is broken (a dropped layer, two
# heads that changed places) is off by 0.25 and more.
WIDE_GATE = Gate(max_rel=0.3, min_cosine=0.95, max_layer=0.15, max_row=0.5)

# How far a stored tensor may be from the checkpoint's, the norm of the difference over its norm. Uniform to Laplacian
# weights lose 0.06 to 0.09 to 4 bits in blocks of 32 and 0.004 to 0.007 to 8; one outlier per block makes that 0.12 and
# 0.013. Two heads of 64 that changed places: 0.25.
MAX_ROUNDING = {"int8": 0.02, "int4": 0.16}


def later_gate(gate: Gate, built: Parity) -> Gate:
    """What `verify` demands: twice what the build measured, since another CPU rounds otherwise but not worse; never
    looser than the build's gate. Rounded activations make that one too wide to show a missing layer at the end."""
    if gate == GATES["fp32"]:
        return gate
    return replace(
        gate,
        max_rel=min(gate.max_rel, 2 * built.max_rel),
        min_cosine=max(gate.min_cosine, 1 - 2 * (1 - built.min_cosine)),
    )


@dataclass(frozen=True)
class Parity:
    max_abs: float
    max_rel: float
    min_cosine: float

    def passes(self, gate: Gate) -> bool:
        return self.max_rel <= gate.max_rel and self.min_cosine >= gate.min_cosine  # NaN fails both

    def to_json(self) -> dict[str, float]:
        return {k: short(v) for k, v in asdict(self).items()}


def short(x: float) -> float:
    """As reports store it: six digits."""
    return float(f"{x:.6g}")


def compare(actual: Arrays, expected: Arrays) -> Parity:
    """The worst of all outputs; a missing, misshapen or non-finite output counts as infinitely wrong."""
    worst = Parity(0.0, 0.0, 1.0)
    for name, reference in expected.items():
        one = _compare_one(actual.get(name), reference)
        worst = Parity(
            max(worst.max_abs, one.max_abs), max(worst.max_rel, one.max_rel), min(worst.min_cosine, one.min_cosine)
        )
    return worst


def _compare_one(actual: NDArray[Any] | None, reference: NDArray[Any]) -> Parity:
    if actual is None or actual.shape != reference.shape or not np.isfinite(actual).all():
        return Parity(float("inf"), float("inf"), -1.0)
    a, e = actual.astype(np.float64), reference.astype(np.float64)
    max_abs = float(np.abs(a - e).max())
    return Parity(max_abs, max_abs / max(float(np.abs(e).max()), 1e-30), float(row_cosines(a, e).min()))


def row_cosines(a: NDArray[np.float64], e: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., C] each -> [...]; of a row of zeros 1 where both are, 0 else."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(e, axis=-1)
    return np.where(norms > 0, (a * e).sum(-1) / np.where(norms > 0, norms, 1.0), np.all(a == e, axis=-1))


def load_check(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The stored inputs and reference outputs of a component."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as e:
        raise EngineMismatchError(f"{path}: not readable ({e}); rebuild the bundle") from e
    parts = ({k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)} for p in (INPUT, OUTPUT))
    inputs, outputs = parts
    return inputs, outputs


def check_component(root: Path, target: str, manifest: EngineManifest, threads: int) -> Parity:
    """Run a component's engine on its stored input and compare with its stored reference output."""
    inputs, expected = load_check(root / manifest.check)
    if manifest.name == "llm":
        teach, compiled = backend(target).decoder_class().teach, manifest.compiled(target)
        taught = partial(teach, root, manifest, compiled, threads, inputs["embeds"], inputs["token_ids"])
        actual = {"logits": taught()}
        if WIDE_LOGITS in expected:
            actual[WIDE_LOGITS] = taught(all_wide=True)
    else:
        with backend(target).open_engine(root, manifest, threads) as engine:
            actual = engine.run(inputs)
    return compare(actual, expected)


def check_source(root: Path, target: str, manifest: EngineManifest, threads: int) -> Parity:
    """The same of the ONNX files that the engine was made from, run by onnxruntime on the CPU: what can be checked of
    an engine that this machine cannot run."""
    inputs, expected = load_check(root / manifest.check)
    return compare(run_source(root, manifest, manifest.compiled(target).source, inputs, threads), expected)


def run_source(root: Path, manifest: EngineManifest, source: Mapping[str, str], inputs: Arrays, threads: int) -> Arrays:
    """The outputs of a component's ONNX files, by role, on the CPU. A language model takes the prompt, then the answer
    token by token."""
    graphs = {role: root / path for role, path in source.items()}
    if manifest.name == "llm":
        from wsi_rt.runtime.llm.ort_cuda_decoder import OrtCudaDecoder

        with OrtCudaDecoder(manifest, graphs, on_cpu(threads)) as decoder:
            return {"logits": decoder.taught(inputs["embeds"], inputs["token_ids"])}
    session = on_cpu(threads).open(graphs["model"], graphs["model"].parent)
    names = [s.name for s in manifest.outputs]
    with plain_failure(manifest.name):
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def require(name: str, what: str, parity: Parity, gate: Gate) -> None:
    """Raises ParityError, naming the component and both numbers, when the gate does not hold."""
    if not parity.passes(gate):
        raise ParityError(
            f"{name} ({what}) differs from the fp32 reference: relative error {parity.max_rel:.2e} (at most "
            f"{gate.max_rel:.0e}), cosine {parity.min_cosine:.7f} (at least {gate.min_cosine:.6g}); "
            f"{_what_now(name, gate)}"
        )


def _what_now(name: str, gate: Gate) -> str:
    """Large activations lose most to 8 bits, and are beyond fp16: an honest engine can miss the gate there."""
    if gate == GATES["fp32"]:
        return "nothing was installed"
    wider = f"--precision {name}=fp32"
    if gate in (GATES["fp16"], GATES["bf16"]):
        wider = f"--precision {name}=bf16 for its range, or --target torch, which computes in fp32"
    return f"nothing was installed; if the checkpoint is sound, try {wider}"


@dataclass(frozen=True)
class LayerError:
    """How far a layer is off, over the size of what it adds: all rows together, and the worst row alone."""

    total: float
    row: float


def require_layers(name: str, errors: Mapping[str, LayerError], gate: Gate) -> dict[str, Any]:
    """Raises ParityError, naming the first layer beyond the gate; else what the manifest records of them."""
    for layer, error in errors.items():
        if not (error.total <= gate.max_layer and error.row <= gate.max_row):  # NaN fails
            raise ParityError(
                f"{name}: layer {layer} differs from the fp32 reference by {error.total:.2e} of what it adds (at most "
                f"{gate.max_layer:.0e}; in one row by {error.row:.2e}, at most {gate.max_row:.0e}), the first that "
                f"does; {_what_now(name, gate)}"
            )
    if not errors:
        return {}
    worst = max(errors, key=lambda n: errors[n].total)
    rows = max(e.row for e in errors.values())
    return {
        "count": len(errors),
        "worst": worst,
        "error": short(errors[worst].total),
        "row": short(rows),
    }


def require_rounding(name: str, errors: Mapping[str, float], precision: str) -> dict[str, Any]:
    """Raises ParityError, naming the first tensor that is stored too far from the checkpoint's; else what the manifest
    records of them."""
    for tensor, error in errors.items():
        if not error <= MAX_ROUNDING[precision]:
            raise ParityError(
                f"{name}: {tensor} is stored {error:.2e} of its size away from the checkpoint's (at most "
                f"{MAX_ROUNDING[precision]} in {precision}), the first that is; {_what_now(name, GATES[precision])}"
            )
    worst = max(errors, key=lambda n: errors[n])
    return {"worst": worst, "error": short(errors[worst])}

"""Which Linear layers lose too much to 8 bits with one scale a row, and what they get instead.

Measured at build time, on the layer's own inputs: the fp32 module runs once, and every layer's product is computed
again as an integer product would, weights and activations rounded. Only encoders, whose layers are stored in whole
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import ViTConfig, linear_shapes
from wsi_rt.export.models import reference_model
from wsi_rt.export.parity import Arrays, check_inputs
from wsi_rt.export.precision import WIDER
from wsi_rt.export.quantise import BlockFormat, FormatOf, quantise
from wsi_rt.export.sources.weights import WeightSource
from wsi_rt.runtime.parity import short
from wsi_rt.runtime.slides.synth.stain import TissuePainter
from wsi_rt.runtime.types import TILE_PX

if TYPE_CHECKING:
    from torch import Tensor

# Of a layer's output, all rows together, and of an average row in the worst one. Half of what a block may be off by
# (`runtime.parity.GATES`), which four such layers make up.
MAX_ERROR, MAX_ROW_ERROR = 0.02, 0.08
ROWS, CRESTED = 256, 32  # of each layer's input: that many in all, and those whose largest value stands out most
TISSUE_TILES, TISSUE_MPP = 2, 0.5


@dataclass(frozen=True)
class Loss:
    """Of one layer in whole rows. format: what it got instead; its own error is `left`."""

    error: float
    row: float
    format: str
    left: float

    def to_json(self) -> dict[str, Any]:
        return {"error": short(self.error), "row": short(self.row), "format": self.format, "left": short(self.left)}


@dataclass(frozen=True)
class Sensitive:
    """The layers that are kept wider, by name, and `worst`: the largest error of those that are not."""

    formats: Mapping[str, BlockFormat | None] = field(default_factory=dict)
    losses: Mapping[str, Loss] = field(default_factory=dict)
    worst: float = 0.0

    def format_of(self, otherwise: FormatOf) -> FormatOf:
        return lambda name: self.formats[name] if name in self.formats else otherwise(name)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        limits = {"error": MAX_ERROR, "row": MAX_ROW_ERROR}
        layers = {name: loss.to_json() for name, loss in self.losses.items()}
        return {"limits": limits, "worst": short(self.worst), "wider": layers}


def sensitive_layers(c: ViTConfig, source: WeightSource, otherwise: FormatOf, threads: int = 0) -> Sensitive:
    """otherwise: the formats that are on trial; layers in another one than whole rows are left as they are.
    threads 0: torch's default."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    module, trial = reference_model(c, source), _Trial(otherwise)
    for name in linear_shapes(c):
        module.get_submodule(name).register_forward_hook(trial.hook(name))
    with torch.inference_mode():
        module(torch.from_numpy(calibration_tiles(c)["tiles"]))
    return Sensitive(trial.formats, trial.losses, trial.worst)


def calibration_tiles(c: ViTConfig) -> Arrays:
    """The stored check's tiles, and painted tissue: activations on noise alone are not those on stained tissue."""
    side = TILE_PX * TISSUE_TILES
    painter = TissuePainter(side, side, TISSUE_MPP, 0, 0.9)
    at = TILE_PX // 2
    tissue = [painter.paint(i * at, at, TILE_PX, TILE_PX) for i in range(TISSUE_TILES)]
    return {"tiles": np.concatenate([check_inputs(c)["tiles"], np.stack(tissue)])}


class _Trial:
    def __init__(self, otherwise: FormatOf) -> None:
        self._otherwise = otherwise
        self.formats: dict[str, BlockFormat | None] = {}
        self.losses: dict[str, Loss] = {}
        self.worst = 0.0

    def hook(self, name: str) -> Any:
        def measure(layer: Any, args: Any, _: Any) -> None:
            form = self._otherwise(name)
            if form is None or form.block:
                return
            x, w = _telling_rows(args[0]), layer.weight.numpy()
            exact = x @ layer.weight.T
            error, row = _error(x, w, form, exact)
            if error <= MAX_ERROR and row <= MAX_ROW_ERROR:
                self.worst = max(self.worst, error)
                return
            for wider in WIDER:
                left, left_row = _error(x, w, wider, exact)
                if left <= MAX_ERROR and left_row <= MAX_ROW_ERROR:
                    break
            self.formats[name] = wider
            self.losses[name] = Loss(error, row, wider.name if wider else "fp32", left)

        return measure


def _telling_rows(x: Tensor) -> Tensor:
    """[..., in] -> at most ROWS + CRESTED of its rows [n, in]: every n-th, and those that one value dominates."""
    import torch

    x = x.reshape(-1, x.shape[-1])
    crest = x.abs().amax(-1) / x.norm(dim=-1).clamp(min=1e-30)
    chosen = torch.arange(0, len(x), max(1, -(-len(x) // ROWS)))
    return x[torch.cat([chosen, crest.topk(min(CRESTED, len(x))).indices])]


def _error(x: Tensor, w: NDArray[np.float32], form: BlockFormat | None, exact: Tensor) -> tuple[float, float]:
    """Of x [n, in] times w [out, in] in this format, over the size of an average row of `exact` [n, out]: all rows
    together, and the worst."""
    import torch

    if form is None:
        return 0.0, 0.0
    rounded = torch.from_numpy(quantise(w, form).dequantised(w.shape[1]))
    off = (_rounded_activations(x, form) @ rounded.T - exact).norm(dim=-1)
    size = exact.norm(dim=-1).square().mean().sqrt().clamp(min=1e-30)
    return float(off.square().mean().sqrt() / size), float(off.max() / size)


def _rounded_activations(x: Tensor, form: BlockFormat) -> Tensor:
    """As `graphs.linears.FusedLinears` computes with them: 8 bits, a scale per row and block."""
    import torch

    width = form.width(x.shape[1])
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).reshape(len(x), -1, width)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / step).round() * step).reshape(len(x), -1)[:, : x.shape[1]]

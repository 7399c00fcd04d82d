"""The cases of the bench and their work, without torch: names, providers, roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from wsi_rt.kernels.aot_case import Cost
from wsi_rt.kernels.gpus import GPUS, predicted_seconds
from wsi_rt.runtime.errors import InputError

OURS, LIMIT = "wsi-rt", "limit"
# Operator -> who computes it; "reference" is the published way in eager torch.
PROVIDERS = {
    "block_linear": (OURS, "torch-dense", "reference"),
    "dilated_attention": (OURS, "flash-attn", "torch-sdpa", "reference"),
    "pool_norm_pad": (OURS, "reference"),
    "rms_norm": (OURS, "reference"),
    "rope_kv_write": (OURS, "reference"),
    "shared_prefix_attention": (OURS, "torch-sdpa", "reference"),
    "slide_embed": (OURS, "reference"),
    "swiglu": (OURS, "reference"),
    "tile_normalize": (OURS, "reference"),
}
BYTES = {"fp16": 2, "bf16": 2}
SLIDES = (1_000, 10_000, 50_000)
TILES = 256  # of one batch of the tile encoder
STEPS = (1, 20, 64)  # questions on a slide that a decoding step takes on
MATRIX = ("block_linear", "dilated_attention", "shared_prefix_attention")
COMPUTE_BOUND = ("dilated_attention",)


@dataclass(frozen=True)
class Case:
    """One operator at the published sizes.

    size: tiles of the slide (tile_normalize: of the batch), tokens or sequences of a step, as `kernels.aot.OPS` says.
    """

    op: str
    size: int
    dtype: str

    @property
    def name(self) -> str:
        """ "dilated_attention-10000-fp16": what --case takes."""
        return f"{self.op}-{self.size}-{self.dtype}"

    @property
    def providers(self) -> tuple[str, ...]:
        return PROVIDERS[self.op]

    @property
    def matrix(self) -> bool:
        """Whether the roofline is that of the tensor cores."""
        return self.op in MATRIX

    @property
    def metric(self) -> str:
        """The rate that is reported: of operations where the roofline says compute on most GPUs, else of bytes."""
        return "gflops" if self.op in COMPUTE_BOUND else "gbytes_per_s"

    @property
    def cost(self) -> Cost:
        """Operations and bytes of one run."""
        found: Cost = import_module(f"wsi_rt.kernels.{self.op}.cost").cost(self.size, BYTES[self.dtype])
        return found

    def limit(self, sm: int) -> tuple[float, str]:
        """(seconds, "memory" or "compute"): the roofline of `GPUS[sm]`, predicted."""
        return predicted_seconds(sm, self.cost, self.matrix)


def gpu_name(sm: int) -> str:
    """ "H100 SXM (sm_90)": whose published peaks the roofline of an architecture uses."""
    return f"{GPUS[sm].name} (sm_{sm})"


CASES = (
    *(Case("dilated_attention", n, dtype) for n in SLIDES for dtype in BYTES),
    *(Case(op, n, "fp16") for op in ("pool_norm_pad", "slide_embed") for n in SLIDES),
    Case("tile_normalize", TILES, "fp16"),
    *(Case(op, n, dtype) for op in ("block_linear", "shared_prefix_attention") for n in STEPS for dtype in BYTES),
    *(Case(op, n, "fp16") for op in ("rms_norm", "rope_kv_write", "swiglu") for n in STEPS),
)


def chosen(names: Sequence[str], quick: bool) -> list[Case]:
    """The cases of some names or operators (none: all); `quick`: only the smallest of each operator and dtype.

    Raises InputError on a name that is neither.
    """
    if unknown := [name for name in names if name not in PROVIDERS and name not in {c.name for c in CASES}]:
        known = ", ".join([*PROVIDERS, *(c.name for c in CASES)])
        raise InputError(f"--case {', '.join(unknown)} is unknown, expected an operator or a case of: {known}")
    cases = [c for c in CASES if not names or c.op in names or c.name in names]
    if not quick:
        return cases
    return list({(c.op, c.dtype): c for c in reversed(cases)}.values())[::-1]

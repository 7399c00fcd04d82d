"""The TensorRT plugin of dilated attention.

Inputs: qkv [L, 3, H, D]; programs [P, 5] int32, the table that says which queries share their keys, P following from
the slide's length; branches [n, 2] int32, a constant of the network. `programs` is an input of the engine: the runtime
makes it per slide (`wsi_rt.kernels.dilated_attention.programs.program_table`, numpy alone) with the `block_m` that
the engine was built for, and all layers read the same one. Output: [L, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from wsi_rt.export.plugins.ptx import SHARED_BYTES
from wsi_rt.export.plugins.spec import Dim, Shape, check_architecture
from wsi_rt.kernels.aot import Resources, read_table
from wsi_rt.kernels.aot_case import AotCase
from wsi_rt.kernels.dilated_attention import check_branches
from wsi_rt.kernels.dilated_attention.configs import PRECISIONS, WIDTHS, config
from wsi_rt.kernels.dilated_attention.programs import program_table, row_step
from wsi_rt.kernels.errors import KernelInputError

DTYPES = ("fp16", "bf16", "fp32")
_OTHERWISE = "use another precision or dtype, or the Triton operator outside TensorRT"


@cache
def _committed() -> dict[str, Resources]:
    return read_table()[1]


def _check_choices(sm: int, width: int, precision: str) -> None:
    check_architecture(sm)
    for what, given, expected in (("head width", width, WIDTHS), ("precision", precision, PRECISIONS)):
        if given not in expected:
            raise KernelInputError(f"{what} {given!r}, expected one of {', '.join(map(str, expected))}")


@dataclass(frozen=True)
class DilatedAttention:
    """Attributes of the plugin. block_m: queries of a program at most, as in the table that the engine is fed.

    Raises KernelInputError on an architecture, head width or precision that the kernel is not shipped for, and where no
    dtype has `block_m` and fits into a plugin's shared memory.
    """

    sm: int
    heads: int
    width: int
    block_m: int
    row_step: int  # tokens between two queries of a program
    n_branches: int
    precision: str  # how fp32 is multiplied: "ieee" or "tf32"

    inputs: ClassVar[tuple[str, ...]] = ("qkv", "programs", "branches")
    other_inputs: ClassVar[tuple[str, ...]] = ("INT32", "INT32")

    def __post_init__(self) -> None:
        _check_choices(self.sm, self.width, self.precision)
        if self.heads < 1 or self.n_branches < 1 or self.row_step < 1:
            raise KernelInputError(
                f"{self.heads} heads, {self.n_branches} branches, row step {self.row_step}: expected at least 1 of each"
            )
        if not self.dtypes():
            raise KernelInputError(
                f"no dtype for programs of {self.block_m} queries at head width {self.width} on sm_{self.sm}: "
                + "; ".join(f"{dtype} {self._misfit(dtype)}" for dtype in DTYPES)
                + f"; {_OTHERWISE}"
            )

    @classmethod
    def of(
        cls,
        sm: int,
        dtype: str,
        heads: int,
        width: int,
        segment_lengths: Sequence[int],
        dilated_ratios: Sequence[int],
        precision: str = "ieee",
    ) -> DilatedAttention:
        """The attributes for one layer's branches, with the block of the configuration table.

        dtype: "fp16", "bf16" or "fp32". Raises KernelInputError on what the kernel is not shipped for, or a plugin has
        no memory for.
        """
        check_branches(segment_lengths, dilated_ratios)
        _check_choices(sm, width, precision)
        if dtype not in DTYPES:
            raise KernelInputError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        block_m = config(sm, precision if dtype == "fp32" else "half", width).block_m
        plugin = cls(sm, heads, width, block_m, row_step(dilated_ratios), len(dilated_ratios), precision)
        if why := plugin._misfit(dtype):
            raise KernelInputError(f"{dtype} at head width {width} on sm_{sm} {why}; {_OTHERWISE}")
        return plugin

    def dtypes(self) -> list[str]:
        """Those with as many queries in a program as the table that the engine is fed, within a plugin's memory."""
        return [dtype for dtype in DTYPES if not self._misfit(dtype)]

    def _misfit(self, dtype: str) -> str:
        """Why a dtype does not fit these attributes, "" where it does; shared memory by the committed table."""
        kind = self.precision if dtype == "fp32" else "half"
        block_m = config(self.sm, kind, self.width).block_m
        if block_m != self.block_m:
            return f"runs in programs of {block_m} queries, the table has {self.block_m}"
        variant = f"fp32-{kind}" if dtype == "fp32" else dtype
        shared = _committed()[f"dilated_attention/{variant}-D{self.width}/sm{self.sm}"].shared_bytes
        if shared > SHARED_BYTES:
            return f"needs {shared} bytes of shared memory, a TensorRT plugin gets {SHARED_BYTES}"
        return ""

    def case(self, dtype: str) -> AotCase:
        """`kernels.dilated_attention_packed` for one dtype. Raises KernelInputError on one not in `dtypes()`."""
        import torch

        from wsi_rt.export.plugins.kernels import dilated_attention_packed
        from wsi_rt.kernels.dilated_attention.launch import launch_options

        if dtype not in self.dtypes():
            why = f" ({self._misfit(dtype)})" if dtype in DTYPES else ""
            raise KernelInputError(
                f"{dtype} in blocks of {self.block_m} queries{why}, expected {', '.join(self.dtypes())}"
            )
        torch_type = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        tile, options = launch_options(self.sm, torch_type, self.width, self.precision)
        constexprs: dict[str, Any] = {
            "HEADS": self.heads,
            "ROW_STEP": self.row_step,
            "BRANCHES": self.n_branches,
            **tile,
        }
        pointers = {"qkv": f"*{dtype}", "programs": "*i32", "branches": "*i32", "out": f"*{dtype}"}
        return AotCase(
            op="dilated_attention",
            variant=f"plugin-{dtype}-H{self.heads}-D{self.width}",
            sm=self.sm,
            kernel=dilated_attention_packed,
            signature={**pointers, **dict.fromkeys(constexprs, "constexpr")},
            constexprs=constexprs,
            divisible=tuple(pointers),  # TensorRT aligns tensors to 256 bytes
            matrix=tile["PRECISION"] != "ieee" or dtype != "fp32",
            **options,
        )

    def output_shape(self, *inputs: Shape) -> tuple[Dim, ...]:
        return (inputs[0][0], self.heads, self.width)

    def grid(self, *inputs: Shape) -> tuple[Dim, Dim]:
        """One program a row of the table."""
        return (inputs[1][0], 1)

    def scalars(self, *inputs: Shape) -> tuple[Dim, ...]:
        return ()

    def profile(
        self, segment_lengths: Sequence[int], dilated_ratios: Sequence[int], tokens: Sequence[int]
    ) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of the inputs that vary, at each of `tokens` (least, usual, most): an optimization profile.

        A shorter slide never has more programs than a longer one, so the last entry bounds them.
        """
        rows = [
            len(program_table((n,), segment_lengths, dilated_ratios, self.heads, self.block_m)) for n in sorted(tokens)
        ]
        qkv = [(n, 3, self.heads, self.width) for n in sorted(tokens)]
        return {"qkv": [*qkv], "programs": [(n, 5) for n in rows]}

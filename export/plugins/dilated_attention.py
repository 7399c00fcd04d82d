"""The TensorRT plugin of dilated attention.

Inputs: qkv [L, 3, H, D]; programs [P, 5] int32, the table that says which queries share their keys, P following from
the slide's length; branches [n, 2] int32, a constant of the network. `programs` is an input of the engine: the runtime
makes it per slide (`wsi_rt.kernels.dilated_attention.programs.program_table`, numpy alone) with the `block_m` that
the engine was built for, and all layers read the same one. Output: [L, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from wsi_rt.export.plugins.spec import Dim, Shape
from wsi_rt.kernels.aot_case import SHIPPED_SM, AotCase
from wsi_rt.kernels.dilated_attention import check_branches
from wsi_rt.kernels.dilated_attention.configs import PRECISIONS, WIDTHS, config
from wsi_rt.kernels.dilated_attention.programs import program_table, row_step
from wsi_rt.kernels.errors import KernelInputError


@dataclass(frozen=True)
class DilatedAttention:
    """Attributes of the plugin. block_m: queries of a program at most, as in the table that the engine is fed.

    Raises KernelInputError on an architecture, head width or precision that the kernel is not shipped for.
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
        for what, given, expected in (
            ("architecture", self.sm, SHIPPED_SM),
            ("head width", self.width, WIDTHS),
            ("precision", self.precision, PRECISIONS),
        ):
            if given not in expected:
                raise KernelInputError(f"{what} {given!r}, expected one of {', '.join(map(str, expected))}")
        if self.heads < 1 or self.n_branches < 1 or self.row_step < 1:
            raise KernelInputError(
                f"{self.heads} heads, {self.n_branches} branches, row step {self.row_step}: expected at least 1 of each"
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
        precision: str = "tf32",
    ) -> DilatedAttention:
        """The attributes for one layer's branches, with the block of the configuration table.

        dtype: "fp16", "bf16" or "fp32". Raises KernelInputError on what the kernel is not shipped for.
        """
        check_branches(segment_lengths, dilated_ratios)
        draft = cls(sm, heads, width, 0, row_step(dilated_ratios), len(dilated_ratios), precision)
        return cls(**{**draft.__dict__, "block_m": draft._block_m(dtype)})

    def _block_m(self, dtype: str) -> int:
        return config(self.sm, self.precision if dtype == "fp32" else "half", self.width).block_m

    def dtypes(self) -> list[str]:
        """Those whose configuration has as many queries in a program as the table that the engine is fed."""
        return [dtype for dtype in ("fp16", "bf16", "fp32") if self._block_m(dtype) == self.block_m]

    def case(self, dtype: str) -> AotCase:
        """`kernels.dilated_attention_packed` for one dtype. Raises KernelInputError on one not in `dtypes()`."""
        import torch

        from wsi_rt.export.plugins.kernels import dilated_attention_packed
        from wsi_rt.kernels.dilated_attention.launch import launch_options

        if dtype not in self.dtypes():
            raise KernelInputError(
                f"{dtype} in blocks of {self.block_m} queries, expected {', '.join(self.dtypes()) or 'another block_m'}"
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

"""The configurations that are shipped: one for every architecture, precision and head width."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from wsi_rt.kernels.aot_case import SHIPPED_SM
from wsi_rt.kernels.dilated_attention.configs import WIDTHS, chunks, config
from wsi_rt.kernels.dilated_attention.triton import aot_cases


@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_hold_a_head_without_a_chunk_in_vain(width):
    d0, d1 = chunks(width)
    assert all(d & (d - 1) == 0 for d in (d0, d1))
    assert min(d for d in (d0, d1) if d) >= 16  # what a tensor core contracts at once
    assert d0 < width + 16 <= d0 + d1 + 16
    assert (d0 + d1 == width) == (width % 16 == 0)


def test_every_configuration_is_a_case():
    cases = aot_cases()
    assert len(cases) == len(SHIPPED_SM) * len(WIDTHS) * 4 * 2  # rows on 16 bytes, and off
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        assert {n for n, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
        assert case.matrix == ("ieee" not in case.variant)
        rows = {"q", "k", "v"} if case.constexprs["UNIT"] == 8 else set()
        assert set(case.divisible) == {"out", "programs", "branches"} | rows


@pytest.mark.parametrize("sm", [90, 100])
def test_tiles_are_tall_enough_for_the_matrix_instructions_of_a_warp_group(sm):
    for width in WIDTHS:
        for kind in ("half", "tf32"):
            for c in (config(sm, kind, width), config(sm, kind, width, aligned=False)):
                assert c.block_m >= 64
                assert c.num_warps % 4 == 0

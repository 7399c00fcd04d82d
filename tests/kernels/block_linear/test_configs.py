"""The configurations that are shipped, how K is split among programs, and what a launch costs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from wsi_rt.kernels.aot_case import SHIPPED_SM  # noqa: E402
from wsi_rt.kernels.block_linear.configs import LEAST_STEPS, MATRIX, PROGRAMS, VECTOR, bucket, split_steps  # noqa: E402
from wsi_rt.kernels.block_linear.cost import ROWS, SHAPES, cost, workspace_bytes  # noqa: E402
from wsi_rt.kernels.block_linear.launch import launch_options  # noqa: E402
from wsi_rt.kernels.block_linear.triton import aot_cases, matrix_kernel, vector_kernel  # noqa: E402
from wsi_rt.kernels.gpus import predicted_seconds  # noqa: E402


def test_every_number_of_rows_has_a_bucket():
    found = [bucket(rows) for rows in range(1, 70)]
    assert found == [1] + 3 * [4] + 12 * [16] + 16 * [32] + 37 * [64]
    assert bucket(10_000) == 64


def test_every_configuration_is_a_case():
    cases = aot_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        assert {n for n, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
        assert case.matrix == (case.kernel is matrix_kernel and not case.variant.startswith("fp32"))
    compiled = {(c.sm, c.variant.split("-")[0], c.constexprs.get("BLOCK_M")) for c in cases if c.matrix}
    assert compiled == {(sm, dtype, m) for sm in SHIPPED_SM for dtype in ("fp16", "bf16") for m in MATRIX["half"][sm]}
    rows = {(c.sm, c.constexprs["ROWS"]) for c in cases if c.kernel is vector_kernel}
    assert rows == {(sm, m) for sm in SHIPPED_SM for m in VECTOR[sm]}


@pytest.mark.parametrize("sm", SHIPPED_SM)
def test_a_thread_of_the_vector_kernel_loads_16_bytes_of_each_row(sm):
    for config in VECTOR[sm].values():
        assert config.chunks == config.num_warps * 32


@pytest.mark.parametrize("sm", [90, 100])
def test_tiles_are_tall_enough_for_the_matrix_instructions_of_a_warp_group(sm):
    for config in MATRIX["half"][sm].values():
        assert config.block_n % 64 == 0
        assert config.num_warps % 4 == 0


@pytest.mark.parametrize("blocks", [128, 344, 3], ids="blocks{}".format)
def test_blocks_are_counted_in_fours_where_they_can_be(blocks):
    constexprs, _ = launch_options(90, torch.float16, 1, (blocks, 16), 4)
    assert constexprs["UNIT"] == (4 if blocks % 4 == 0 else 1)


@pytest.mark.parametrize("sm", SHIPPED_SM)
@pytest.mark.parametrize("steps", [1, 3, 7, 32, 86])
@pytest.mark.parametrize("tiles", [1, 8, 64, 172, 500])
def test_splits_cover_all_steps_and_are_worth_a_program(sm, tiles, steps):
    each = split_steps(sm, tiles, steps)
    splits = -(-steps // each)
    assert 1 <= each <= steps
    assert (splits - 1) * each < steps <= splits * each
    assert splits == 1 or (each >= LEAST_STEPS and splits * tiles <= PROGRAMS[sm])


def test_published_widths_fill_a_gpu():
    """Two tiles for each SM of an H100: 64 tiles of 4,096 outputs in four splits of 32 steps, 500 of 32,000 whole."""
    assert split_steps(90, 4096 // 64, 4096 // 128) == 8
    assert split_steps(90, 32_000 // 64, 4096 // 128) == 32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_of_a_launch_are_those_of_its_tensors(shape, rows):
    def nbytes(*sizes, dtype=torch.float16):
        return torch.empty(sizes, dtype=dtype, device="meta").nbytes

    inputs, outputs = shape
    blocks = inputs // 32
    weight = nbytes(outputs, blocks, 16, dtype=torch.uint8) + nbytes(outputs, blocks, dtype=torch.uint8)
    weight += nbytes(outputs, blocks, dtype=torch.float32)
    found = cost(rows, 2, shape)
    assert found.bytes == nbytes(rows, inputs) + weight + nbytes(rows, outputs)
    assert found.flops == 2 * rows * inputs * outputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_up_to_32_rows_memory_is_the_bound_but_on_the_rtx_3090(shape):
    bounds = {sm: predicted_seconds(sm, cost(32, 2, shape), matrix=True)[1] for sm in SHIPPED_SM}
    assert bounds == {sm: "compute" if sm == 86 else "memory" for sm in SHIPPED_SM}


def test_vector_units_keep_up_with_memory_for_three_rows():
    """On an A100, whose memory is the fastest for its vector units."""
    assert [predicted_seconds(80, cost(rows, 2), matrix=False)[1] for rows in (1, 3, 4)] == [*2 * ["memory"], "compute"]


def test_the_workspace_is_one_fp32_part_for_every_split():
    parts = torch.empty((4, 8, 4096), dtype=torch.float32, device="meta")
    assert workspace_bytes(8, 4096, 4) == parts.nbytes
    assert workspace_bytes(8, 4096, 1) == 0

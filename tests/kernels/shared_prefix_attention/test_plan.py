"""The grid that shapes alone decide: room for any grouping, as many parts as fill a GPU; and the work of a step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.shared_prefix_attention.configs import LEAST_TOKENS, ROWS_OF  # noqa: E402
from wsi_rt.kernels.shared_prefix_attention.cost import (  # noqa: E402
    HEAD_WIDTH,
    HEADS,
    KV_HEADS,
    PREFIX,
    SUFFIX,
    cost,
    workspace_bytes,
)
from wsi_rt.kernels.shared_prefix_attention.launch import Plan, plan  # noqa: E402

H100_SMS = 132


def published(batch: int, groups: int = 1, kv_heads: int = 32, prefix_room: int = 640) -> Plan:
    return plan(batch, 32, kv_heads, groups, prefix_room, 256, H100_SMS, full=False)


@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8).filter(any), shared=st.sampled_from([1, 3, 4, 8]))
@settings(max_examples=200, deadline=None)
def test_every_grouping_of_the_batch_has_its_blocks(sizes, shared):
    batch = sum(sizes)
    p = plan(batch, shared * 2, 2, len(sizes), 611, 100, H100_SMS, full=False)
    assert p.rows in ROWS_OF["half"]
    assert p.rows >= min(batch * shared, 64)
    assert sum(-(-n * shared // p.rows) for n in sizes) <= p.prefix_blocks
    assert p.prefix_blocks <= batch * shared / p.rows + min(len(sizes), batch)
    assert p.suffix_units >= batch


@pytest.mark.parametrize(
    ("batch", "rows", "blocks"), [(1, 16, 1), (16, 16, 1), (17, 32, 1), (33, 64, 1), (64, 64, 1), (65, 64, 2)]
)
def test_a_group_reads_its_prefix_once_up_to_the_largest_tile(batch, rows, blocks):
    p = published(batch)
    assert (p.rows, p.prefix_blocks) == (rows, blocks)


def test_fp32_has_one_tile():
    assert plan(40, 32, 32, 1, 640, 256, H100_SMS, full=True).rows == 16


def test_keys_are_split_where_programs_are_few():
    one, many = published(1), published(20)
    assert (one.prefix_parts, one.suffix_parts) == (5, 2)  # 640 and 256 tokens by 128; 9 parts would be wanted
    assert (many.prefix_parts, many.suffix_parts) == (5, 1)
    assert one.units == 5 + 2
    assert many.units == 5 + 20
    assert published(20, groups=20).prefix_parts == 1  # 20 prefixes are programs enough
    assert published(1, prefix_room=4096).prefix_parts == 9
    assert published(1, kv_heads=8, prefix_room=4096).prefix_parts == 4096 // LEAST_TOKENS


def test_the_plan_does_not_know_lengths():
    """The same shapes, whatever is in them: a CUDA graph holds one grid."""
    assert published(20, prefix_room=640) != published(20, prefix_room=64)


@pytest.mark.parametrize(("sequences", "groups"), [(1, 1), (20, 1), (20, 4)])
def test_cost_counts_every_key_once(sequences, groups):
    def nbytes(*shape):
        return torch.empty(shape, dtype=torch.float16, device="meta").nbytes

    found = cost(sequences, 2, groups=groups)
    tokens = groups * PREFIX + sequences * SUFFIX
    assert found.bytes == 2 * nbytes(tokens, KV_HEADS, HEAD_WIDTH) + 2 * nbytes(sequences, HEADS, HEAD_WIDTH)
    assert found.flops == 4 * HEAD_WIDTH * HEADS * sequences * (PREFIX + SUFFIX)


def test_the_numbers_that_the_design_rests_on():
    """What cost.py says of 20 questions on a slide."""
    shared, alone = cost(20, 2).bytes, cost(20, 2, groups=20).bytes
    assert alone / shared == pytest.approx(5.4, abs=0.05)
    assert shared / 3.35e12 == pytest.approx(13e-6, rel=0.02)
    assert 2 * workspace_bytes(20, published(20).prefix_parts + 1) / shared == pytest.approx(0.09, abs=0.005)

"""Calls in buckets: padded rows, one graph for each bucket, replayed on static memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")

import torch
from torch import Tensor

from wsi_rt.runtime.engines.torch_graphs import GraphedCall, Staging, bucket_for, doubling

CPU = torch.device("cpu")
TABLE = torch.arange(10.0)


class GraphsOnTheCpu:
    """Stands for CUDA's graphs: a replay calls the function on the same static memory, into the same output."""

    def __init__(self) -> None:
        self.captured: list[dict[str, Tensor]] = []  # the static inputs as they were
        self.replays = 0

    def __call__(self, fn: Callable[..., Tensor], static: dict[str, Tensor], pool: Any) -> tuple[Any, Tensor]:
        self.captured.append({name: x.clone() for name, x in static.items()})
        output = fn(**static).clone()

        def replay() -> None:
            self.replays += 1
            output.copy_(fn(**static))

        return replay, output


class Writer:
    """x [rows, 2], slot [rows] -> x + table[slot], and `written[slot] = x` where slot is not negative."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.written = torch.zeros(11, 2, device=device)
        self.rows: list[int] = []

    def __call__(self, x: Tensor, slot: Tensor, table: Tensor) -> Tensor:
        self.rows.append(len(x))
        self.written[torch.where(slot >= 0, slot, 10)] = x
        return x + table[slot.clamp(min=0)][:, None]


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.arange(2.0 * count).view(count, 2) + 1, "slot": torch.arange(count) + 1, "table": TABLE}


def expected(given: dict[str, Tensor]) -> Tensor:
    return given["x"] + given["table"][given["slot"]][:, None]


@pytest.fixture
def graphs() -> GraphsOnTheCpu:
    return GraphsOnTheCpu()


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def call(writer: Writer, graphs: GraphsOnTheCpu) -> GraphedCall:
    return GraphedCall(writer, (8, 2, 4), CPU, {"x": 0, "slot": -1}, capture=graphs)


def test_doubling_buckets_end_at_the_largest() -> None:
    assert [doubling(n) for n in (1, 2, 3, 8, 12)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8), (1, 2, 4, 8, 12)]
    for n in range(1, 300):
        assert all(bucket_for(count, doubling(n)) < 2 * count for count in range(1, n + 1))
    with pytest.raises(ValueError, match="0 rows at most"):
        doubling(0)


def test_the_smallest_bucket_that_holds_the_rows() -> None:
    assert [bucket_for(n, (2, 4, 8)) for n in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"{wrong} rows, expected from 1 to 8"):
            bucket_for(wrong, (2, 4, 8))


def test_on_the_cpu_the_function_sees_the_rows_alone(writer: Writer) -> None:
    plain = GraphedCall(writer, (2, 4, 8), CPU, {"x": 0, "slot": -1})
    plain.prepare([1, 8], **rows(1))
    assert writer.rows == []
    for n in (1, 3, 8):
        assert torch.equal(plain(**rows(n)), expected(rows(n)))
    assert writer.rows == [1, 3, 8]


def test_rows_are_padded_to_their_bucket_and_come_back_alone(call: GraphedCall, writer: Writer) -> None:
    assert call.buckets == (2, 4, 8)
    assert call.largest == 8
    for n in (8, 3, 1, 5, 4, 2):
        given = rows(n)
        assert torch.equal(call(**given), expected(given))
        assert not writer.written[n + 1 : 10].any()
        assert torch.equal(writer.written[1 : n + 1], given["x"])
        writer.written.zero_()
    assert set(writer.rows) == {2, 4, 8}


def test_what_an_earlier_call_left_in_a_bucket_is_padding_again(call: GraphedCall, writer: Writer) -> None:
    call(**rows(8))
    writer.written.zero_()
    call(**rows(5))
    assert not writer.written[6:10].any(), "rows of the call before would have been written again"


def test_a_bucket_is_captured_once_on_padding_alone(call: GraphedCall, writer: Writer, graphs: GraphsOnTheCpu) -> None:
    call.prepare([1, 3, 7, 2], **rows(3))
    assert [len(static["x"]) for static in graphs.captured] == [8, 4, 2], "the largest first"
    call.prepare([4], **rows(1))
    assert not writer.written[:10].any()
    assert graphs.replays == 0
    for static in graphs.captured:
        assert not static["x"].any()
        assert (static["slot"] == -1).all()
        assert torch.equal(static["table"], TABLE)
    for n in (1, 2, 3, 8, 7):
        call(**rows(n))
    assert (len(graphs.captured), graphs.replays) == (3, 5)


def test_a_bucket_is_captured_when_a_call_first_needs_it(call: GraphedCall, graphs: GraphsOnTheCpu) -> None:
    for n in (3, 4, 3):
        call(**rows(n))
    assert [len(static["x"]) for static in graphs.captured] == [4]
    call.prepare([2, 3], **rows(8))
    assert [len(static["x"]) for static in graphs.captured] == [4, 2]


def test_an_input_that_is_not_by_row_is_read_anew(call: GraphedCall) -> None:
    call(**rows(3))
    changed = {**rows(3), "table": TABLE * -1}
    assert torch.equal(call(**changed), expected(changed))


def test_inputs_are_copied_not_kept(call: GraphedCall) -> None:
    given = rows(3)
    before = {name: x.clone() for name, x in given.items()}
    out = call(**given).clone()
    call(**{name: x * 0 for name, x in rows(4).items()})
    assert all(torch.equal(x, before[name]) for name, x in given.items())
    assert torch.equal(call(**given), out)


@pytest.mark.parametrize("count", [0, 9])
def test_rows_beyond_the_buckets_are_refused(call: GraphedCall, writer: Writer, count: int) -> None:
    plain = GraphedCall(writer, (2, 4, 8), CPU, {"x": 0, "slot": -1})
    for one in (call, plain):
        with pytest.raises(ValueError, match="from 1 to 8"):
            one(**rows(count))
        with pytest.raises(ValueError, match="from 1 to 8"):
            one.prepare([3, count], **rows(1))


def test_what_does_not_fit_is_refused(call: GraphedCall) -> None:
    call(**rows(3))
    for change, message in (
        ({"slot": torch.arange(2)}, "as many of each"),
        ({"x": torch.zeros(3, 3)}, r"x is torch.float32 \[3, 3\], expected torch.float32 \[3, 2\]"),
        ({"table": TABLE[:5]}, r"table is torch.float32 \[5\], expected torch.float32 \[10\]"),
        ({"table": TABLE.double()}, r"table is torch.float64"),
        ({"more": TABLE}, "expected those of the first call"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{**rows(3), **change})
    for buckets, by_row in (((), {"x": 0}), ((0, 2), {"x": 0}), ((2,), {})):
        with pytest.raises(ValueError, match="expected one or more of each"):
            GraphedCall(Writer(), buckets, CPU, by_row)


def test_staging_for_the_cpu_is_plain_memory() -> None:
    staging = Staging(CPU)
    one, two = staging.empty("x", (2, 3), torch.uint8), staging.empty("x", (2, 3), torch.uint8)
    assert (one.shape, one.dtype) == ((2, 3), torch.uint8)
    assert one.data_ptr() != two.data_ptr()


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that this torch can use")
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_cuda_graphs_compute_the_same(gpu: torch.device) -> None:
    writer, staging = Writer(gpu), Staging(gpu)
    call = GraphedCall(writer, (2, 4, 8), gpu, {"x": 0, "slot": -1})
    for n in (3, 8, 1, 4, 5, 3):
        writer.written.zero_()
        given = rows(n)
        pinned = {name: staging.empty(name, x.shape, x.dtype).copy_(x) for name, x in given.items()}
        assert all(x.is_pinned() for x in pinned.values())
        assert torch.equal(call(**pinned).cpu(), expected(given))
        assert torch.equal(writer.written[1 : n + 1].cpu(), given["x"])
        assert not writer.written[n + 1 : 10].any()
    assert len(writer.rows) == 3 * 3, "two warm-ups and a capture for each bucket; a replay calls nothing"


@pytest.mark.gpu
def test_staging_keeps_one_pinned_block_for_a_name(gpu: torch.device) -> None:
    staging = Staging(gpu)
    large = staging.empty("x", (8, 4), torch.float32)
    small = staging.empty("x", (3,), torch.int64)
    assert large.data_ptr() == small.data_ptr()
    assert staging.empty("y", (3,), torch.int64).data_ptr() != small.data_ptr()
    assert staging.empty("x", (9, 4), torch.float32).is_pinned()

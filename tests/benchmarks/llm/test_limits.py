"""What the machine can do: real products and reads, small, on a clock that says half a second."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.benchmarks.llm import limits


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs, and takes 0.5 s."""
    monkeypatch.setattr(limits, "seconds_of", lambda run: run() is not None and 0.5)
    for name, value in {"READ_BYTES": 1 << 20, "ROWS": 4, "INPUTS": 64, "OUTPUTS": 96}.items():
        monkeypatch.setattr(limits, name, value)


def test_every_limit_is_an_amount_over_a_time(half_a_second: None) -> None:
    found = limits.measured_limits(threads=2, rounds=1)
    gflops = 2 * 4 * 64 * 96 / 0.5 / 1e9
    assert found == {
        "read_gbytes_per_s": [pytest.approx((1 << 20) / 0.5 / 1e9)] * limits.REPEATS,
        **{f"gemm_{kind}_gflops": [pytest.approx(gflops)] * limits.REPEATS for kind in ("fp32", "int8", "int4")},
    }


def test_threads_that_do_not_divide_the_array_read_the_rest_of_it(half_a_second: None) -> None:
    assert limits.read_gbytes_per_s(3, 1) == [pytest.approx(4 * ((1 << 18) // 3 * 3) / 0.5 / 1e9)]


@pytest.mark.parametrize("kind", limits.GEMMS)
def test_the_products_are_products(half_a_second: None, kind: str) -> None:
    """[4, 64] x [64, 96]: twice the input, twice the result (int8: around its zero point)."""
    import onnxruntime as ort

    session = ort.InferenceSession(limits._gemm(kind), providers=["CPUExecutionProvider"])
    if kind == "int8":
        x = np.full((4, 64), 130, np.uint8)
        one, two = (session.run(None, {"x": v})[0] for v in (x, x + np.uint8(2)))
    else:
        x = np.ones((4, 64), np.float32)
        one, two = (session.run(None, {"x": v})[0] for v in (x, 2 * x))
    assert one.shape == (4, 96)
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)

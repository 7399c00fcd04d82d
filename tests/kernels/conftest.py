"""How Triton kernels are tested: the same files on a GPU, and without one in Triton's interpreter.

`interpreter/test_<op>.py` hold the tests that launch kernels. In the ordinary process they are the `gpu` variant, and
skip where there is none. TRITON_INTERPRET=1 has to stand in the environment before Triton is imported, and interpreter
and compiler cannot share a process: `test_interpreter.py` runs each of those files in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["interpreter"] if INTERPRETED else [pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def kernel_device(request: pytest.FixtureRequest):
    """Where tensors lie for Triton: the CPU under the interpreter, else the GPU."""
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU; test_interpreter.py runs this file in Triton's interpreter")
    if request.param == "interpreter":
        request.getfixturevalue("bf16_dot")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


@pytest.fixture(scope="session")
def bf16_dot() -> Iterator[None]:
    """The interpreter of Triton 3.8 keeps bf16 as its 16 bits and multiplies those bits in `dot`: widen them first."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        assert x.data.dtype == np.uint16, "this interpreter keeps bf16 otherwise: the patch is out of date"
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return plain(self, widened(a), widened(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    yield
    interpreter.InterpreterBuilder.create_dot = plain


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integer): what a kernel does not write shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def assert_as_exact() -> Callable[..., None]:
    """assert_as_exact(ours, eager, exact, floor=1e-5): flash-attention's rule, over the whole and for every row.

    err(ours, exact) <= 2 x err(eager, exact) + floor, where `eager` is plain torch at the precision of `ours` and
    `exact` is fp32 or finer; no NaN.
    """

    def check(ours, eager, exact, floor: float = 1e-5) -> None:
        assert ours.shape == eager.shape == exact.shape
        assert not ours.isnan().any()
        exact = exact.double().cpu()
        error, allowed = ((x.double().cpu() - exact).abs().flatten(1).amax(1) for x in (ours, eager))
        assert error.max() <= 2 * allowed.max() + floor
        # A row of eager may be exact by luck (one key): what a row may be off by is at least half of what any row is.
        worst = (error - 2 * allowed.clamp(min=allowed.max() / 2)).max()
        assert worst <= floor

    return check

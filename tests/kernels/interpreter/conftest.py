"""What Triton's interpreter does otherwise than a GPU, set right for every file of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def bf16_rounding() -> Iterator[None]:
    """The interpreter of Triton 3.8 cuts fp32 off to bf16; a GPU rounds to nearest even (cvt.rn.bf16.f32)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    np, tl = pytest.importorskip("numpy"), pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return plain(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        data = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    one_and_a_bit = interpreter.TensorHandle(np.array([0x3F80C000], np.uint32).view(np.float32), tl.float32)
    cut = plain(interpreter.InterpreterBuilder(), one_and_a_bit, tl.bfloat16)
    assert cut.data.tolist() == [0x3F80], "this interpreter rounds by itself: the patch is out of date"
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    yield
    interpreter.InterpreterBuilder.cast_impl = plain

"""The public operator block_linear: what it refuses, how it traces, its CPU path against loops and ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.block_linear import block_linear, library  # noqa: E402
from wsi_rt.kernels.block_linear.library import block_linear_op  # noqa: E402
from wsi_rt.kernels.block_linear.reference import block_linear_reference, dequantised  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402

FORMATS = [(bits, block, own) for bits in (4, 8) for block in (32, 64, 128) for own in (True, False)]
BY_FORMAT = pytest.mark.parametrize(("bits", "block", "own_zeros"), FORMATS, ids=lambda v: str(int(v)))


def weight(outputs: int, inputs: int, bits: int, block: int, own_zeros: bool):
    """codes, scales, zeros, bits; columns beyond `inputs` hold codes like any."""
    generator = torch.Generator().manual_seed(inputs + bits + block)
    blocks = -(-inputs // block)
    codes = torch.randint(0, 256, (outputs, blocks, block * bits // 8), dtype=torch.uint8, generator=generator)
    scales = torch.rand(outputs, blocks, generator=generator) + 0.5
    zeros = torch.randint(0, 1 << bits, (outputs, blocks), dtype=torch.uint8, generator=generator)
    return codes, scales, zeros if own_zeros else None, bits


def rows_of(batch: int, inputs: int, dtype: torch.dtype = torch.float32):
    return torch.randn(batch, inputs, generator=torch.Generator().manual_seed(batch)).to(dtype)


CODES, SCALES, ZEROS, BITS = weight(6, 70, 4, 32, True)
X = rows_of(3, 70)
BLOCKS_FIRST = CODES.transpose(0, 1).contiguous().transpose(0, 1)


def product(x=X, codes=CODES, scales=SCALES, zeros=ZEROS, bits=BITS):
    return block_linear(x, codes, scales, zeros, bits)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"5 bits, expected 4 or 8", {"bits": 5}),
        (r"True bits, expected 4 or 8", {"bits": True}),
        (r"x is \[70\], expected \[B >= 1, K >= 1\]", {"x": X[0]}),
        (r"x is \[0, 70\], expected", {"x": X[:0]}),
        (r"x is \[3, 0\], expected", {"x": X[:, :0]}),
        (r"x is \[1, 3, 70\], expected", {"x": X[None]}),
        (r"x is torch.float64, expected torch.float16", {"x": X.double()}),
        (r"x is torch.int8, expected", {"x": X.to(torch.int8)}),
        (r"x has strides \(1, 3\), expected a contiguous last axis", {"x": X.T.contiguous().T}),
        (r"codes are torch.int8, expected torch.uint8", {"codes": CODES.to(torch.int8)}),
        (r"codes are \[6, 48\], expected \[N >= 1, blocks, 16 or 32 or 64\] at 4 bits", {"codes": CODES.flatten(1)}),
        (r"codes are \[6, 3, 8\], expected \[N >= 1, blocks, 16 or 32 or 64\]", {"codes": CODES[..., :8]}),
        (r"codes are \[6, 3, 16\], expected \[N >= 1, blocks, 32 or 64 or 128\] at 8 bits", {"bits": 8}),
        (r"codes are \[0, 3, 16\], expected", {"codes": CODES[:0], "scales": SCALES[:0], "zeros": ZEROS[:0]}),
        (r"codes \[6, 2, 16\] hold 2 blocks of 32, expected 3 for x of 70 columns", {"codes": CODES[:, :2]}),
        (r"hold 3 blocks of 32, expected 4 for x of 97 columns", {"x": rows_of(3, 97)}),
        (r"hold 3 blocks of 32, expected 2 for x of 64 columns", {"x": X[:, :64]}),
        (r"codes have strides \(16, 96, 1\), expected contiguous", {"codes": BLOCKS_FIRST}),
        (r"scales are torch.bfloat16, expected torch.float32 or float16", {"scales": SCALES.bfloat16()}),
        (r"scales are \[5, 3\], expected \[6, 3\]: one for each block", {"scales": SCALES[:5]}),
        (r"scales have strides \(1, 6\), expected contiguous memory", {"scales": SCALES.T.contiguous().T}),
        (r"zeros are torch.int32, expected torch.uint8", {"zeros": ZEROS.int()}),
        (r"zeros are \[6\], expected \[6, 3\]", {"zeros": ZEROS[:, 0]}),
        (r"zeros have strides \(0, 1\), expected contiguous", {"zeros": ZEROS[:1].expand(6, 3)}),
        (r"scales on meta, zeros on cpu; expected one device", {"scales": SCALES.to("meta")}),
        (r"x on meta, codes on cpu, .*; expected one device", {"x": X.to("meta")}),
        (r"zeros on meta; expected one device", {"zeros": ZEROS.to("meta")}),
    ],
)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=message):
        product(**changed)


def in_loops(codes, scales, zeros, bits, inputs):
    """W [N, inputs] as fp32, one weight after the other: the code is bits (k % block) * bits and on of its block."""
    outputs, _, width = codes.shape
    block = width * 8 // bits
    found = np.zeros((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            number = int.from_bytes(bytes(codes[n, k // block].tolist()), "little")
            code = (number >> ((k % block) * bits)) % (1 << bits)
            zero = 1 << (bits - 1) if zeros is None else int(zeros[n, k // block])
            found[n, k] = np.float32(code - zero) * scales[n, k // block].numpy()
    return torch.from_numpy(found)


@BY_FORMAT
def test_the_reference_is_what_loops_give(bits, block, own_zeros):
    given, x = weight(3, 150, bits, block, own_zeros), rows_of(2, 150)
    looped = in_loops(*given, 150)
    assert torch.equal(dequantised(*given)[:, :150], looped)
    exact = x.double() @ looped.double().T
    for ours in (block_linear_reference(x, *given), block_linear(x, *given)):
        assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max()


FAULTS = {
    "nibbles-swapped": lambda c, s, z, b: ((c >> 4) | (c << 4), s, z, b),
    "next-block": lambda c, s, z, b: (c, s.roll(1, 1), z, b),
    "next-zero": lambda c, s, z, b: (c, s, z.roll(1, 1), b),
    "zero-off-by-one": lambda c, s, z, b: (c, s, (z + 1) % 16, b),
    "zero-of-the-middle": lambda c, s, z, b: (c, s, None, b),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_comparison_with_loops_sees_a_wrong_layout(fault):
    given, x = weight(3, 150, 4, 32, True), rows_of(2, 150)
    exact = x.double() @ in_loops(*given, 150).double().T
    assert (block_linear(x, *fault(*given)) - exact).abs().max() > 1e-2 * exact.abs().max()


@pytest.mark.parametrize("inputs", [256, 150], ids="K{}".format)
@BY_FORMAT
def test_equals_matmul_n_bits_of_onnx_runtime_on_the_same_bytes(bits, block, own_zeros, inputs):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    helper, proto = (pytest.importorskip(f"onnx{part}").__dict__ for part in (".helper", ""))
    codes, scales, zeros, _ = weight(24, inputs, bits, block, own_zeros)
    x = rows_of(5, inputs)
    floats = proto["TensorProto"].FLOAT
    stored = {"codes": codes.numpy(), "scales": scales.numpy()}
    if own_zeros:
        stored["zeros"] = packed(zeros.numpy(), bits)
    node = helper["make_node"](
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", K=inputs, N=24, bits=bits, block_size=block,
        accuracy_level=1,
    )  # fmt: skip
    value = helper["make_tensor_value_info"]
    graph = helper["make_graph"](
        [node], "product", [value("x", floats, [None, inputs])], [value("y", floats, [None, 24])],
        [proto["numpy_helper"].from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    imports = [helper["make_opsetid"]("", 21), helper["make_opsetid"]("com.microsoft", 1)]
    model = helper["make_model"](graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x.numpy()})
    ours = block_linear(x, codes, scales, zeros, bits)
    assert (ours - torch.from_numpy(theirs)).abs().max() <= 2e-6 * ours.abs().max()


def packed(zeros: np.ndarray, bits: int) -> np.ndarray:
    """[N, blocks] -> [N, ceil(blocks * bits / 8)]: a row ends at a byte."""
    if bits == 8:
        return zeros
    even = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_fp32_and_returns_the_precision_of_x(dtype):
    x = rows_of(4, 70, dtype)
    assert torch.equal(product(x), product(x.float()).to(dtype))
    assert product(x).dtype == dtype


def test_scales_in_fp16_are_taken_as_they_are():
    half = SCALES.half()
    assert torch.equal(product(scales=half), product(scales=half.float()))


def test_rows_of_a_wider_matrix():
    wide = torch.full((3, 100), torch.nan)
    wide[:, :70] = X
    assert (product(wide[:, :70]) - product()).abs().max() <= 1e-6 * product().abs().max()  # BLAS sums in another order


def test_some_rows_of_the_weight_are_made_fp32_at_a_time(monkeypatch):
    seen = []

    def recorded(x, codes, *rest):
        seen.append(codes.shape[0])
        return block_linear_reference(x, codes, *rest)

    monkeypatch.setattr(library, "block_linear_reference", recorded)
    whole = product()
    monkeypatch.setattr(library, "DEQUANTISED_VALUES", 4 * 70)
    parts = product()
    assert seen == [6, 4, 2]
    assert (parts - whole).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.parametrize("own_zeros", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_is_a_well_formed_operator(dtype, own_zeros):
    given = (X.to(dtype), CODES, SCALES, ZEROS if own_zeros else None, BITS)
    torch.library.opcheck(block_linear_op, given)


def test_exports_with_any_number_of_rows():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return product(x)

    program = torch.export.export(Layer(), (X,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert "wsi_rt.block_linear" in str(program.graph)
    x = rows_of(11, 70)
    assert torch.equal(program.module()(x), product(x))


def test_the_cpu_path_does_not_load_the_kernels():
    source = (
        "import sys, torch\n"
        "from wsi_rt.kernels.block_linear import block_linear, library\n"
        "assert 'triton' not in sys.modules\n"
        "block_linear(torch.zeros(1, 32), torch.zeros(1, 1, 16, dtype=torch.uint8), torch.ones(1, 1), None, 4)\n"
        "assert not [m for m in sys.modules if m.startswith('wsi_rt.') and m.endswith('.triton')]\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

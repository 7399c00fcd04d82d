"""What one launch of block_linear costs at the sizes of a 7 B model, whose layers it reads once a decoding step.

4 bits in blocks of 32 with fp32 scales and a zero each are 5.25 bits a weight, 0.66 bytes. n rows of x do 3 n
operations a byte: 98 at 32 rows, which the tensor cores of all architectures outrun (an A100 does 153 in the time of a
byte) but for the RTX 3090 (76). The vector units of an A100 do 9.6: the vector kernel is for few rows only.

Where K is split among programs, fp32 parts of the output are written and read again (`workspace_bytes`): half a MB each
way for 8 rows and 4 splits of 4,096 outputs, beside 11 MB of weights, where they do not stay in the L2 cache.
"""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

# (inputs, outputs): attention projections, gate and up each, down, logits.
SHAPES = ((4096, 4096), (4096, 11_008), (11_008, 4096), (4096, 32_000))
ROWS = (1, 8, 32)
BITS, BLOCK, SCALE_BYTES, OWN_ZEROS = 4, 32, 4, True  # int4 as bundles store it


def cost(
    tokens: int,
    dtype_bytes: int,
    shape: tuple[int, int] = SHAPES[1],
    bits: int = BITS,
    block: int = BLOCK,
    own_zeros: bool = OWN_ZEROS,
) -> Cost:
    """x and the weight read, the product written, each once; two operations a weight and row.

    Unpacking is not counted, and the roofline of memory and tensor cores does not see it: int4 takes 5.1 instructions a
    weight in the vector kernel for one row and 7.4 in the matrix kernel for 16 (compiled for sm_90, the whole loop). An
    H100 at 1.7 GHz has 5.6 in the time its memory takes for a weight.
    """
    inputs, outputs = shape
    values = tokens * (inputs + outputs)
    weight = weight_bytes(shape, bits, block, own_zeros)
    return Cost(flops=2.0 * tokens * inputs * outputs, bytes=float(dtype_bytes * values + weight))


def weight_bytes(shape: tuple[int, int], bits: int, block: int, own_zeros: bool) -> int:
    """Codes, fp32 scales and zeros."""
    inputs, outputs = shape
    return outputs * -(-inputs // block) * (block * bits // 8 + SCALE_BYTES + own_zeros)


def workspace_bytes(tokens: int, outputs: int, splits: int) -> int:
    """What the splits of K leave for their sum, in fp32; nothing where there is one."""
    return 4 * splits * tokens * outputs if splits > 1 else 0

"""What each shipped architecture allows and what its GPUs promise: occupancy and the roofline, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_rt.kernels.aot_case import Cost


@dataclass(frozen=True)
class Gpu:
    """Limits of one architecture, and the published peaks of one GPU of it."""

    sm: int
    name: str
    warps_per_sm: int
    blocks_per_sm: int
    shared_per_sm_bytes: int
    shared_per_block_bytes: int
    half_tflops: float  # tensor cores, fp16 or bf16 in, fp32 accumulated, dense
    fp32_tflops: float  # vector units
    memory_gbs: float  # GB/s
    tensor_core: str  # instruction of its own generation of matrix products, as the disassembler writes it


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (shared memory per SM and per
# block, resident warps and blocks). The register file is 64 K 32-bit registers on all of them.
# Peaks: data sheets of A100 80GB SXM, L40S, H100 SXM and HGX B200 (sparse figures halved), NVIDIA's GA102 and RTX
# Blackwell architecture papers (RTX 3090, RTX 5090; the rate with fp32 accumulation, half of the advertised one).
GPUS = {
    gpu.sm: gpu
    for gpu in (
        Gpu(80, "A100 80GB SXM", 64, 32, 164 * 1024, 163 * 1024, 312.0, 19.5, 2039.0, "HMMA"),
        Gpu(86, "RTX 3090", 48, 16, 100 * 1024, 99 * 1024, 71.0, 35.6, 936.0, "HMMA"),
        Gpu(89, "L40S", 48, 24, 100 * 1024, 99 * 1024, 362.0, 91.6, 864.0, "HMMA"),
        Gpu(90, "H100 SXM", 64, 32, 228 * 1024, 227 * 1024, 989.0, 67.0, 3350.0, "HGMMA"),
        Gpu(100, "B200", 64, 32, 228 * 1024, 227 * 1024, 2250.0, 75.0, 8000.0, "UTCHMMA"),
        Gpu(120, "RTX 5090", 48, 24, 100 * 1024, 99 * 1024, 209.5, 104.8, 1792.0, "HMMA"),
    )
}

# The occupancy calculator's units: registers are given to a warp by 256, to warps by 4 (one per scheduler); shared
# memory by 128 bytes, 1 KiB of every block kept by the system since sm_80.
REGISTERS_PER_SM, REGISTERS_PER_THREAD, REGISTER_UNIT, WARP_UNIT = 65536, 255, 256, 4
SHARED_UNIT_BYTES, SHARED_KEPT_BYTES = 128, 1024
TENSOR_MEMORY_COLUMNS = 512  # per SM, sm_100
THREADS_PER_WARP = 32


def resident_blocks(sm: int, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """Blocks of a kernel that one SM holds at once: registers per thread, dynamic shared bytes per block. 0: none."""
    gpu = GPUS[sm]
    per_warp = -(-max(registers, 1) * THREADS_PER_WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // per_warp // WARP_UNIT * WARP_UNIT // warps
    per_block = -(-(shared_bytes + SHARED_KEPT_BYTES) // SHARED_UNIT_BYTES) * SHARED_UNIT_BYTES
    fits = [by_registers, gpu.shared_per_sm_bytes // per_block, gpu.warps_per_sm // warps, gpu.blocks_per_sm]
    if tensor_columns:
        fits.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return 0 if shared_bytes > gpu.shared_per_block_bytes or registers > REGISTERS_PER_THREAD else min(fits)


def occupancy(sm: int, warps: int, blocks: int) -> float:
    """Share of an SM's warp slots that `blocks` resident blocks fill."""
    return blocks * warps / GPUS[sm].warps_per_sm


def predicted_seconds(sm: int, cost: Cost, matrix: bool) -> tuple[float, str]:
    """(seconds, "memory" or "compute") by the roofline: a lower bound at the published peaks, nothing measured."""
    gpu = GPUS[sm]
    compute = cost.flops / ((gpu.half_tflops if matrix else gpu.fp32_tflops) * 1e12)
    memory = cost.bytes / (gpu.memory_gbs * 1e9)
    return max(compute, memory), "compute" if compute > memory else "memory"

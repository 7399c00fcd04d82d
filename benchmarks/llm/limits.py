"""What this machine can do at most, measured: reading memory, and multiplying matrices in fp32, int8 and int4."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm.providers.base import seconds_of

READ_BYTES = 1 << 29  # far beyond any cache
ROWS, INPUTS, OUTPUTS = 640, 4096, 11008  # the largest layer of a 7 B model under a prompt
REPEATS = 5
GEMMS = ("fp32", "int8", "int4")


def measured_limits(threads: int, rounds: int) -> dict[str, list[float]]:
    """-> samples: read_gbytes_per_s; gemm_<kind>_gflops (an int8 or int4 multiply-add counts as two, too)."""
    found = {"read_gbytes_per_s": read_gbytes_per_s(threads, REPEATS * rounds)}
    return found | {f"gemm_{kind}_gflops": gemm_gflops(kind, threads, REPEATS * rounds) for kind in GEMMS}


def read_gbytes_per_s(threads: int, repeats: int) -> list[float]:
    """Every thread sums squares of its own part of a large array (BLAS dot, one thread each)."""
    parts = np.split(np.ones(READ_BYTES // 4 // threads * threads, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        run = lambda: list(pool.map(lambda x: np.dot(x, x), parts))  # noqa: E731
        run()
        return [sum(x.nbytes for x in parts) / seconds_of(run) / 1e9 for _ in range(repeats)]


def gemm_gflops(kind: str, threads: int, repeats: int) -> list[float]:
    """[640, 4096] x [4096, 11008] in onnxruntime: MatMul, MatMulInteger (u8 x s8), or MatMulNBits as bundles use it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_gemm(kind), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(ROWS, INPUTS)).astype(np.float32)
    feeds = {"x": (128 + 20 * x).clip(0, 255).astype(np.uint8) if kind == "int8" else x}
    session.run(None, feeds)
    flops = 2 * ROWS * INPUTS * OUTPUTS
    return [flops / seconds_of(lambda: session.run(None, feeds)) / 1e9 for _ in range(repeats)]


def _gemm(kind: str) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rng, domain = np.random.default_rng(1), ""
    attributes: dict[str, Any] = {}
    weights: dict[str, Any]
    if kind == "fp32":
        weights = {"w": rng.standard_normal((INPUTS, OUTPUTS), np.float32)}
    elif kind == "int8":
        weights = {"w": rng.integers(-100, 100, (INPUTS, OUTPUTS), np.int8), "zero": np.array(128, np.uint8)}
    else:
        codes = rng.integers(0, 256, (OUTPUTS, INPUTS // 32, 16), np.uint8)
        weights = {"w": codes, "scales": np.ones((OUTPUTS, INPUTS // 32), np.float32)}
        domain = "com.microsoft"
        attributes = {"K": INPUTS, "N": OUTPUTS, "bits": 4, "block_size": 32, "accuracy_level": 4}
    op = {"fp32": "MatMul", "int8": "MatMulInteger", "int4": "MatMulNBits"}[kind]
    node = helper.make_node(op, ["x", *weights], ["y"], domain=domain, **attributes)
    given, made = (TensorProto.UINT8, TensorProto.INT32) if kind == "int8" else (TensorProto.FLOAT, TensorProto.FLOAT)
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("x", given, [ROWS, INPUTS])],
        [helper.make_tensor_value_info("y", made, [ROWS, OUTPUTS])],
        [numpy_helper.from_array(x, name) for name, x in weights.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()

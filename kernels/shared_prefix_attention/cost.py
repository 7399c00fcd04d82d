"""What one layer's attention of a decoding step costs at the sizes of a 7 B model, and why it is cut as it is.

Read once a group, a prefix of 611 tokens is 10.0 MB of fp16 keys and values a layer. 20 questions on a slide with 100
own tokens each read 42.8 MB a step and layer; were the prefix read for every question it would be 233 MB, 5.4 times
as much: 13 microseconds on an H100 against 70.

- Tensor cores: n rows do n operations a byte of prefix (fp16). The vector units of an H100 reach 20 operations a byte
  of its memory, its tensor cores 295: from 20 questions on only the latter keep up with memory.
- Parts: 32 heads make 32 programs of a prefix, an H100 has 132 SMs, and one SM moves a 132nd of 3.35 TB/s. Without
  parts one question's 10 MB take the time of 4 times as many.
- Two launches, not one: parts need a merge, which without atomics is a second launch. It reads what the first wrote,
  (D + 1) * 4 bytes a row and part (`workspace_bytes`): 6 parts of 20 questions are 2.0 MB each way, 9 % on top of the
  42.8 MB where they reach memory, which they need not: every L2 cache here holds them (RTX 3090: 6 MB). One launch (a
  program walks a head's prefix, then its rows' suffixes) would have 32 programs of 1.3 MB each for 132 SMs: 4 times
  the time at best.
"""

from __future__ import annotations

from wsi_rt.kernels.aot_case import Cost

HEADS, KV_HEADS, HEAD_WIDTH = 32, 32, 128
PREFIX, SUFFIX = 611, 100  # tokens: system prompt and slide; a question, and half of its answer


def cost(sequences: int, dtype_bytes: int, groups: int = 1, prefix: int = PREFIX, suffix: int = SUFFIX) -> Cost:
    """One token of each sequence: keys and values of every group's prefix and of every suffix read once, q read, the
    answer written. 4 D operations a (query, key) pair; exponentials are not counted, nor is the workspace."""
    pairs = sequences * HEADS * (prefix + suffix)
    read = 2 * KV_HEADS * HEAD_WIDTH * (groups * prefix + sequences * suffix)
    return Cost(flops=4.0 * HEAD_WIDTH * pairs, bytes=float(dtype_bytes * (read + 2 * sequences * HEADS * HEAD_WIDTH)))


def workspace_bytes(sequences: int, parts: int) -> int:
    """What the first launch leaves for the second: outputs and log-sum-exps of the parts in fp32."""
    return 4 * parts * sequences * HEADS * (HEAD_WIDTH + 1)

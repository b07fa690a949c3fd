"""A kernel that is there to test how kernels are compiled and interpreted."""

import triton
import triton.language as tl


@triton.jit
def scale_and_sum(x, y, out, SIZE: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """x [SIZE] becomes FACTOR * x, and out [SIZE] x + y."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    before = tl.load(x + at, mask=inside).to(tl.float32)
    tl.store(x + at, before * FACTOR, mask=inside)
    tl.store(out + at, before + tl.load(y + at, mask=inside), mask=inside)

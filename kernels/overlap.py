"""Programmatic dependent launch: a kernel begins while the one before it in its stream still runs.

From the end of one kernel to the first loads of the next a GPU idles for a µs or two, and a decode
step of one sequence is 170 kernels of a few µs each. On Hopper and later a kernel that is launched
so begins once all programs of the one before have begun; it loads what it can, and then waits for
that one to be complete (CUDA C++ Programming Guide, "Programmatic Dependent Launch").

It must not load anything before it waits that an overlapped kernel of the same step writes, since
several of them may stand in line, nor what the ordinary kernel right before it does. Weights are
safe, and so is what was computed before the embedding, which is an ordinary kernel.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HOPPER = (9, 0)


@cache
def overlapped() -> dict[str, bool]:
    """Launch options of a kernel that calls `begin` and `await_previous`, and its OVERLAP."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Lets the next kernel begin, once all programs of this one have come here."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Waits until the kernel before is complete, and all that it wrote can be read. Each program
    must call it: it is what makes the next kernel's wait cover all kernels before."""
    if OVERLAP:
        gdc_wait()

"""Programmatic dependent launch: a kernel starts while the kernel before it still runs.

Between the end of a kernel and the first loads of the next one a GPU idles for a µs or two, and a
decode step of one sequence is 170 kernels of a few µs each. On Hopper and later, a kernel launched
this way starts once all programs of the kernel before have started. It loads what it can, and then
waits for that kernel to complete (CUDA C++ Programming Guide, "Programmatic Dependent Launch").

Before a kernel waits, it may load only what no kernel still running can write: several overlapped
kernels may be waiting in line, and the ordinary kernel before them may still run. Weights are safe.
So is whatever a step computes up to the embedding, whose kernel lets no other start before it ends.
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
    """Launch options, OVERLAP among them, of a kernel that calls `launch_next` and
    `await_previous`."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def launch_next(OVERLAP: tl.constexpr):
    """Lets the next kernel start, once all programs of this one have come here."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Waits until the kernel before is complete and its writes can be read.

    Every program must call it: only so does the next kernel's wait cover all kernels before.
    """
    if OVERLAP:
        gdc_wait()

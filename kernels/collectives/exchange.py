"""The kernels of `peers`: how ranks send words to one another, and wait for them.

32 bits of data travel with the 32 bits of a sequence number in a word of 64 bits, which is written
and read at once (NCCL calls this protocol LL). So a word that shows the number awaited shows its
data too, and nothing needs a fence. The numbers of a segment are those of its exchanges, counted on
the device: a CUDA graph may be replayed. There are two buffers in turn. A rank that begins exchange
n + 2 of a segment has received what the others sent in exchange n + 1, which they began when they
had read what came in exchange n.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from nanovllm.kernels.overlap import await_previous, launch_next


@triton.jit(do_not_specialize=["rank", "rows"])
def add_rms_norm(
    x_ptr,  # int32 [rows, WIDTH]: one float32, or two values of 16 bits
    residual_ptr,
    weight_ptr,  # int32 [WIDTH], if NORM
    normed_ptr,
    total_ptr,
    addresses_ptr,  # int64 [RANKS], of words [2, rows, RANKS, WIDTH]
    numbers_ptr,  # int32 [rows, SEGMENTS]
    meeting_ptr,  # int64 [2, rows, SEGMENTS]
    bound_ptr,
    given_up_ptr,
    told_ptr,
    rank,
    rows,
    eps,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    TIMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    segment = tl.program_id(0)
    row = tl.program_id(1)
    columns = segment * SEGMENT + tl.arange(0, SEGMENT)
    present = columns < WIDTH
    ranks = tl.arange(0, PADDED_RANKS)
    memory = tl.load(addresses_ptr + ranks, mask=ranks < RANKS, other=0)
    own_memory = tl.load(addresses_ptr + rank)
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=present, other=0)
    await_previous(OVERLAP)
    number_ptr = numbers_ptr + row * SEGMENTS + segment
    number = tl.load(number_ptr) + 1
    offsets = row.to(tl.int64) * WIDTH + columns
    x = tl.load(x_ptr + offsets, mask=present, other=0)
    residual = x
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=present, other=0)
    # The row's index in the buffer whose turn it is.
    index = (number & 1).to(tl.int64) * rows + row
    sent = 8 * ((index * RANKS + rank) * WIDTH + columns[None, :])
    from_ranks = own_memory + 8 * ((index * RANKS + ranks[:, None]) * WIDTH + columns[None, :])
    of_others = ((ranks < RANKS) & (ranks != rank))[:, None] & present[None, :]
    packed = _pack(x, number)[None, :]
    _send(memory[:, None] + sent, packed, of_others)

    words = receive(_words(from_ranks), of_others, number, bound_ptr, given_up_ptr, told_ptr, TIMED)
    words = tl.where((ranks == rank)[:, None], packed, words)
    total = add_up(words.to(tl.int32), residual, ADD, DTYPE)
    tl.store(total_ptr + offsets, total, mask=present)
    if NORM:
        low, high = floats(total, DTYPE)
        squares = tl.sum(low * low + high * high, 0)
        if SEGMENTS > 1:
            # The words of a row's segments are in this rank's own memory.
            tl.store(
                meeting_ptr + index * SEGMENTS + segment,
                _pack(squares.to(tl.int32, bitcast=True), number),
            )
            segments = tl.arange(0, PADDED_SEGMENTS)
            met = receive(
                meeting_ptr + index * SEGMENTS + segments,
                segments < SEGMENTS,
                number,
                bound_ptr,
                given_up_ptr,
                told_ptr,
                TIMED,
            )
            squares = tl.sum(met.to(tl.int32).to(tl.float32, bitcast=True), 0)
        inverse = tl.rsqrt(squares / SIZE + eps)
        normed = scaled(low, high, inverse, weight, DTYPE)
        tl.store(normed_ptr + offsets, normed, mask=present)
    finish(number_ptr, number)


@triton.jit(do_not_specialize=["rank", "rows"])
def all_gather(
    x_ptr,  # int32 [rows, WIDTH]
    out_ptr,  # int32 [rows, RANKS, WIDTH]
    addresses_ptr,  # see add_rms_norm
    numbers_ptr,
    meeting_ptr,  # not used
    bound_ptr,
    given_up_ptr,
    told_ptr,
    rank,
    rows,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PADDED_SEGMENTS: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    TIMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    segment = tl.program_id(0)
    row = tl.program_id(1)
    columns = segment * SEGMENT + tl.arange(0, SEGMENT)
    ranks = tl.arange(0, PADDED_RANKS)
    memory = tl.load(addresses_ptr + ranks, mask=ranks < RANKS, other=0)
    own_memory = tl.load(addresses_ptr + rank)
    present = (ranks < RANKS)[:, None] & (columns < WIDTH)[None, :]
    await_previous(OVERLAP)
    number_ptr = numbers_ptr + row * SEGMENTS + segment
    number = tl.load(number_ptr) + 1
    x = tl.load(x_ptr + row.to(tl.int64) * WIDTH + columns, mask=columns < WIDTH, other=0)
    index = (number & 1).to(tl.int64) * rows + row
    sent = 8 * ((index * RANKS + rank) * WIDTH + columns[None, :])
    _send(memory[:, None] + sent, _pack(x, number)[None, :], present)
    received = own_memory + 8 * ((index * RANKS + ranks[:, None]) * WIDTH + columns[None, :])
    words = receive(_words(received), present, number, bound_ptr, given_up_ptr, told_ptr, TIMED)
    offsets = (row.to(tl.int64) * RANKS + ranks[:, None]) * WIDTH + columns[None, :]
    tl.store(out_ptr + offsets, words.to(tl.int32), mask=present)
    finish(number_ptr, number)


@triton.jit
def _pack(values, number):
    return (number.to(tl.int64) << 32) | (values.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _send(addresses, words, mask):
    tl.store(_words(addresses), words, mask=mask)


@triton.jit
def _words(addresses):
    return addresses.to(tl.pointer_type(tl.int64))


@triton.jit
def receive(pointers, mask, number, bound_ptr, given_up_ptr, told_ptr, TIMED: tl.constexpr):
    """The words at these addresses, once all of them have come."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    missing = mask & _missing(words, number)
    bound = tl.load(bound_ptr)
    start = tl.full([], 0, tl.int64)
    now = tl.full([], 0, tl.int64)
    if TIMED:
        start = globaltimer()
    # 2: a word is missing and awaited. 1: words are missing, and nobody waits for them any more.
    # Threads read clock and flag for themselves, and must leave the loop together.
    state = 2 * tl.max(missing.to(tl.int32))
    while state == 2:
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
        missing = mask & _missing(words, number)
        if TIMED:
            now = globaltimer()
        else:
            now += 1
        given_up = (now - start > bound) | (tl.load(given_up_ptr, volatile=True) != 0)
        state = tl.max(missing.to(tl.int32) * (2 - given_up.to(tl.int32)))
    tl.store(given_up_ptr, 1, mask=state != 0)
    tl.store(told_ptr, 1, mask=state != 0)
    return words


@triton.jit
def _missing(words, number):
    if words.dtype == tl.int64:
        return (words >> 32).to(tl.int32) != number
    else:
        return words == 0


@triton.jit
def finish(number_ptr, number):
    tl.debug_barrier()  # all threads have read the number before
    tl.store(number_ptr, number)


@triton.jit
def add_up(parts, residual, ADD: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of the ranks' parts [ranks, words], and of the residual [words] if ADD."""
    low, high = floats(parts, DTYPE)
    low = tl.sum(low, 0)
    high = tl.sum(high, 0)
    if ADD:
        low_residual, high_residual = floats(residual, DTYPE)
        low += low_residual
        high += high_residual
    return rounded(low, high, DTYPE)


@triton.jit
def scaled(low, high, inverse, weight, DTYPE: tl.constexpr):
    """What `floats` has found, times `inverse` and the weight [words], as words."""
    low_weight, high_weight = floats(weight, DTYPE)
    return rounded(low * inverse * low_weight, high * inverse * high_weight, DTYPE)


@triton.jit
def floats(values, DTYPE: tl.constexpr):
    """The float32 in each of `values`, and 0; or the two values of 16 bits."""
    if tl.float32 == DTYPE:
        return values.to(tl.float32, bitcast=True), (values - values).to(tl.float32)
    else:
        low = values.to(tl.int16).to(DTYPE, bitcast=True)
        high = (values >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def rounded(low, high, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_bits | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)

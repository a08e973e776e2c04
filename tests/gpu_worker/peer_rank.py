"""What each rank of test_peers does: on GPUs over their own memory, on a CPU over shared files."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

import tests.interpreter  # noqa: F401
from nanovllm.kernels.collectives import reference
from nanovllm.kernels.collectives.peers import WORD, PeerRows, Watch
from nanovllm.kernels.collectives.two_shot import TwoShot
from nanovllm.kernels.layers.ops import Norm
from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.peers import Peers
from nanovllm.services.gpu_worker.runner import GroupBroken

ON_CUDA = torch.cuda.is_available()
# Triton's interpreter runs one program after another, so there a row has one segment.
HIDDEN = 4096 if ON_CUDA else 72

GATHERED = 2 * SHORTLIST_SIZE
ROWS = 64 if ON_CUDA else 4
# Few and many rows in turn: each row counts its own exchanges.
CALLS = (3, 1, 1, 64, 2, 33, 1, 50) if ON_CUDA else (4, 1)
DTYPES = (torch.float32, torch.bfloat16) + (torch.float16,) * ON_CUDA
# As a fraction of each element. The interpreter does not round to bfloat16, but cuts off.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7 if ON_CUDA else 2**-5,
    torch.float16: 2**-9,
}
# How long to wait for a rank that stays away: in ns; in Triton's interpreter, in looks.
SHORT_BOUND = 10**9 if ON_CUDA else 50
LATE_S = 5.0 if ON_CUDA else 0.5
REPLAYS = 200


def run(rank: int, ranks: int, root: Path) -> None:
    """Writes every result, for the test to compare the ranks' bits. Raises if a result differs from
    the reference. In the end the last rank is late, and then stays away."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if ON_CUDA else torch.device("cpu")
    if ON_CUDA:
        torch.cuda.set_device(device)
        store = FileStore(f"{root}/rendezvous", ranks)
        store.set_timeout(timedelta(seconds=60))
        tp = TensorParallel.connect(rank, ranks, store, device)
    else:
        tp = TensorParallel(rank, ranks)
    results = []
    for dtype in DTYPES:
        tp = with_peers(tp, dtype, root, device)
        for two_shot in (False, True):
            for call, rows in enumerate(CALLS):
                results += exchange(tp, rows, two_shot, call, dtype, device)
        if ON_CUDA:
            replay(tp, dtype, device)
    torch.save([result.cpu() for result in results], root / f"results-{rank}.pt")
    if rank == ranks - 1:
        time.sleep(LATE_S)
    exchange(tp, 2, False, 0, dtype, device)
    stay_away(tp, dtype, device)


def with_peers(
    tp: TensorParallel, dtype: torch.dtype, root: Path, device: torch.device
) -> TensorParallel:
    if ON_CUDA:
        found = tp.with_peers(HIDDEN, dtype, device)
        assert found.peers is not None
        return found
    watch = Watch.on(device)

    width = HIDDEN * dtype.itemsize // 4
    memory: list[Tensor] = []

    def shared(name: str, words: int) -> Tensor:
        held = [
            torch.from_file(f"{root}/{dtype}-{name}-{rank}", shared=True, size=words, dtype=WORD)
            for rank in range(tp.size)
        ]
        memory.extend(held)
        return torch.tensor([words.data_ptr() for words in held])

    def rows(name: str, width: int) -> PeerRows:
        addresses = shared(name, PeerRows.num_words(tp.size, width, ROWS))
        return PeerRows(addresses, tp.rank, width, ROWS, watch)

    addresses = shared("two-shot", TwoShot.num_words(tp.size, width, ROWS))
    two_shot = TwoShot(addresses, tp.rank, width, ROWS, watch)
    peers = Peers(rows("sums", width), two_shot, rows("shortlists", GATHERED), watch, memory)
    return TensorParallel(tp.rank, tp.size, peers=peers)


def parts_of(ranks: int, rows: int, call: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[ranks, rows, HIDDEN], the same on every rank. Some are 0, which two shots send as -0.0."""
    random = torch.Generator().manual_seed(call)
    parts = torch.randn(ranks, rows, HIDDEN, generator=random)
    parts[..., : HIDDEN // 8] = 0
    return parts.to(device, dtype)


def exchange(
    tp: TensorParallel,
    rows: int,
    two_shot: bool,
    call: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """A sum without a residual and one with it, and a gather. Returns what all ranks must have."""
    assert tp.peers is not None
    parts = parts_of(tp.size, rows, call, dtype, device)
    norm = Norm(parts_of(1, 1, 7, dtype, device)[0, 0], 1e-6)
    own = slice(tp.rank, None, tp.size) if two_shot else slice(None)
    results = []
    added = tp.peers.sums.add(parts[tp.rank], parts[0])
    close(added, reference.add_rms_norm(list(parts), parts[0], norm)[1])
    results.append(added)
    stream = expected_stream = None
    for _ in range(2):
        sums = tp.peers.two_shot if two_shot else tp.peers.sums
        normed, stream = sums.add_rms_norm(parts[tp.rank], stream, norm)
        expected, expected_stream = reference.add_rms_norm(list(parts), expected_stream, norm)
        close(stream[own], expected_stream[own])
        close(normed, expected)
        results += [normed] if two_shot else [normed, stream]
    sent = parts_of(tp.size, rows, call, torch.float32, device)[..., : GATHERED // 2]
    sent = sent.repeat(1, 1, GATHERED // sent.shape[2] + 1)[..., :GATHERED].contiguous()
    gathered = tp.peers.shortlists.all_gather(sent[tp.rank])
    assert torch.equal(gathered, reference.all_gather(list(sent)))
    return results


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=4 * tolerance)


def replay(tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
    """A CUDA graph of exchanges of one row and of many: each replay brings what its inputs say."""
    assert tp.peers is not None
    norm = Norm(torch.ones(HIDDEN, dtype=dtype, device=device), 1e-6)
    x = [torch.zeros(rows, HIDDEN, dtype=dtype, device=device) for rows in (1, 64, 1, 4)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [
            sums.add_rms_norm(rows, None, norm)[0]
            for rows in x
            for sums in (tp.peers.sums, tp.peers.two_shot)
        ]
    wrong = torch.zeros((), device=device)
    for call in range(REPLAYS):
        parts = [parts_of(tp.size, len(rows), call, dtype, device) for rows in x]
        for rows, part in zip(x, parts, strict=True):
            rows.copy_(part[tp.rank])
        graph.replay()
        for normed, part in zip(found, [part for part in parts for _ in range(2)], strict=True):
            expected = reference.add_rms_norm(list(part), None, norm)[0].float()
            wrong = torch.maximum(wrong, (normed - expected).abs().max() / expected.abs().max())
    assert wrong.item() < TOLERANCES[dtype], wrong


def stay_away(tp: TensorParallel, dtype: torch.dtype, device: torch.device) -> None:
    """The last rank stays away. The others go on after the bound, and do not wait again."""
    assert tp.peers is not None
    tp.check()
    if tp.rank == tp.size - 1:
        return
    tp.peers.watch.bound.fill_(SHORT_BOUND)
    x = parts_of(tp.size, ROWS, 0, dtype, device)[0]
    norm = Norm(torch.ones(HIDDEN, dtype=dtype, device=device), 1e-6)
    start = time.monotonic()
    for _ in range(50 if ON_CUDA else 1):
        tp.peers.sums.add_rms_norm(x, None, norm)
        tp.peers.two_shot.add_rms_norm(x, None, norm)
    if ON_CUDA:
        torch.cuda.synchronize()
        assert time.monotonic() - start < 3 * SHORT_BOUND / 1e9
    try:
        tp.check()
    except GroupBroken:
        return
    raise RuntimeError("a rank went on without another one, and did not say so")

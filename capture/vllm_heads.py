"""Which attention heads each process of a tensor-parallel engine owns."""

from __future__ import annotations

from mechanistic.store.errors import CaptureError


def owned_heads(total: int, rank: int, ranks: int) -> range:
    """The heads of one rank: equal slices, or, of fewer heads than ranks, one that several ranks hold.

    Raises
    ------
    CaptureError    heads and ranks do not divide, so no engine splits them so.
    """
    if not 0 <= rank < ranks:
        raise CaptureError(f"There is no rank {rank} of {ranks}.", "Ranks are counted from 0.")
    if total % ranks == 0:
        each = total // ranks
        return range(rank * each, (rank + 1) * each)
    if ranks % total == 0:
        held = rank * total // ranks
        return range(held, held + 1)
    raise CaptureError(
        f"{total} heads cannot be told apart over {ranks} processes.",
        "Choose a tensor_parallel_size that divides the number of heads.",
    )

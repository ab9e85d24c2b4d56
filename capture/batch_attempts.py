"""Run a batch to its end: failing samples are set aside, and what does not fit in memory is halved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mechanistic.store.errors import CaptureError

from .failures import SampleError
from .memory import free_memory, out_of_memory
from .tables import Rows


def attempt(
    numbers: Sequence[int],
    run: Callable[[list[int]], list[Rows]],
    fail: Callable[[int, SampleError], Rows],
    say: Callable[[str], None],
) -> dict[int, Rows]:
    """The rows of every sample of a batch, by number.

    Parameters
    ----------
    run
        Captures these samples together; SampleError names the one that cannot be captured.
    fail
        The rows of a sample that cannot be captured, or raises.

    Raises
    ------
    CaptureError    one sample alone does not fit in memory.
    """
    left, done = list(numbers), dict[int, Rows]()
    while left:
        failure, full = None, ""
        try:
            return done | dict(zip(left, run(left), strict=True))
        except SampleError as error:
            failure = error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            full = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside the except clauses, whose traceback keeps the tensors of the failed forward alive.
        if failure is not None:
            number = left.pop(failure.row)
            done[number] = fail(number, failure)
        elif len(left) == 1:
            raise CaptureError(
                f"Sample {left[0]} does not fit in memory by itself: {full}",
                "Capture fewer sites or layers, in half precision, or on a larger device.",
            )
        else:
            free_memory()
            half = (len(left) + 1) // 2
            say(f"out of memory: samples {left[0]} to {left[-1]} go on in two batches, of {half} at most")
            done |= attempt(left[:half], run, fail, say)
            return done | attempt(left[half:], run, fail, say)
    return done

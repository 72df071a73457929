"""Several cores on the CPU, split by pieces of work instead of op by op.

PyTorch spreads each op over its threads, which costs a barrier an op and leaves no piece in one
core's cache. Where a computation is many small ops on independent pieces, every thread here takes
whole pieces and runs their ops alone. Results do not depend on the number of threads.
"""

import contextvars
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_MOST_HELPERS = 1024  # a pool starts a thread only when none is idle


def _make_pool() -> None:
    """Threads each of which runs its ops alone; a forked child has none of its parent's."""
    global _pool
    _pool = ThreadPoolExecutor(_MOST_HELPERS, "kernels", torch.set_num_threads, (1,))


_make_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_pool)


def for_each(
    pieces: Iterable[Any], work: Callable[[Any, Any], None], setup: Callable[[], Any] = lambda: None
) -> None:
    """work(setup(), piece) for every piece, on as many threads as torch has.

    Args:
        work: no gradient is recorded in it; pieces must not write to the same memory.
        setup: called once a thread, e.g. for memory that one piece after the other uses.
    Raises: the first exception of `work`.
    """
    pieces = list(pieces)
    threads = torch.get_num_threads()
    helpers = min(threads, len(pieces)) - 1
    queue = iter(pieces)
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            state = setup()
            for piece in queue:  # a list's iterator hands each item to one thread
                work(state, piece)

    if helpers < 1:
        take()
        return
    torch.set_num_threads(1)
    try:
        contexts = [contextvars.copy_context() for _ in range(helpers)]
        futures = [_pool.submit(context.run, take) for context in contexts]
        try:
            take()
        finally:
            errors = [future.exception() for future in futures]
        for error in filter(None, errors):
            raise error
    finally:
        torch.set_num_threads(threads)

"""Several things at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


def together(workers: Sequence[Callable[[], object]]) -> None:
    """Runs callables in threads that start at once, switching often; re-raises the first error."""
    barrier = threading.Barrier(len(workers))
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(w,)) for w in workers]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within: torch, and the CPU backend with it, compute with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

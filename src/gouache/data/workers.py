"""Threads that read pictures and caches, while the main thread computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")


def reading_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, all of them started, in each of which torch computes with one thread.

    Otherwise each would start a team of OpenMP threads of its own for the first large tensor that it converts. As soon
    as there are more of them than processors, GCC's OpenMP lets all threads sleep instead of wait for the next kernel,
    those of the main thread too: a training step took 1.7 times as long.
    """
    threads, all_started = torch.get_num_threads(), threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets the number of a new thread when it is asked first, and not again
        torch.set_num_threads(1)  # of this thread, and of threads that are new
        all_started.wait()

    pool = ThreadPoolExecutor(count, "gouache-data")
    try:
        for _ in range(count):
            pool.submit(start)
        all_started.wait()
    except BaseException:  # Ctrl-C, or no more threads can be started: those that wait would do so for ever
        all_started.abort()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`pool.map`, but only a few results ahead: pictures of a whole data set do not fit into memory."""
    remaining = iter(items)
    futures = [pool.submit(function, item) for item in islice(remaining, 2 * (os.cpu_count() or 1))]
    while futures:
        yield futures.pop(0).result()
        futures += [pool.submit(function, item) for item in islice(remaining, 1)]

"""Threads that read pictures and caches, while the main thread computes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


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
    for _ in range(count):
        pool.submit(start)
    all_started.wait()
    torch.set_num_threads(threads)
    return pool

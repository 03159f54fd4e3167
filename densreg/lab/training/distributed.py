"""The processes that train together, started by torchrun, and torch's threads in each."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch


def processes() -> tuple[int, int]:
    """(rank, world size) of the processes that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """The process group under torchrun; none without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or processes()[1] > 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        # Whatever holds the group goes first: if a Reducer is the last to let go of it, gloo's threads and this one can
        # wait for each other for ever (torch 2.11: the destructor joins them without giving up the GIL).
        gc.collect()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Let torch use n threads on the CPU; as many as before for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

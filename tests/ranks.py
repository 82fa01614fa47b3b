"""Real processes of one group: gloo on the CPU, one thread each."""

import os
import socket
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def run_ranks(world, function, folder, *args):
    """What `function(rank, *args)` returns on each of `world` ranks, in order; a rank's exception fails the test."""
    folder = Path(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (world, port, function, str(folder), args), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, world, port, function, folder, args):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()

"""Real processes of one group: gloo on the CPU, one thread each.

They are forked from a server that has imported the libraries once: a process started anew would spend seconds on that.
"""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(["torch.distributed", "transformers.trainer", "hf_xent.trainers"])
PATIENCE = timedelta(minutes=10)  # on a busy machine, a rank may be long in coming


def run_ranks(world, function, folder, *args):
    """What `function(rank, *args)` returns on each of `world` ranks, in order; a rank's exception fails the test."""
    folder = Path(folder)
    # the ranks meet at a port that is taken here and now: one that was looked up first could be another's by then
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    shared = (world, meeting.port, function, str(folder), args, dict(os.environ))
    mp.start_processes(_rank, shared, nprocs=world, start_method=METHOD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, world, port, function, folder, args, environment):
    torch.set_num_threads(1)
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()

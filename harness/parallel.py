"""Where the work runs: threads of a process, processes of a run, and the device.

    torchrun --standalone --nproc_per_node=2 factorize.py configs/sorting_discrete.py --threads=1

A batch is cut into chunks. Each of n processes takes every n-th chunk, and its threads work on them side by side. Then
all exchange their results: every process holds the same weights and the same values. Process 0 alone writes files.
"""
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from harness.config import any_terminal, fail

rank, processes = 0, 1  # which process this is, of how many
threads = ThreadPoolExecutor(1)
kind = "cpu"  # of device
bfloat16 = False  # matrix products of training, not those of sampling


def start(n_threads, device="cpu", precision="float32"):
    """Takes threads of one core each, all cores if n_threads is 0, and a device into use, and joins the other processes
    if torchrun started some. How many threads there are changes no result by a bit."""
    global rank, processes, threads, kind, bfloat16
    any_terminal()
    here = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if device not in ("auto", *here):
        fail(f"config key 'device' is 'auto' or, on this machine, {' or '.join(here)}; got '{device}'")
    kind = here[0] if device == "auto" else device
    bfloat16 = precision == "bfloat16" or (precision == "auto" and kind == "cuda")
    torchrun = dist.is_torchelastic_launched()

    def set_up_thread():
        torch.set_num_threads(1)  # matrices as small as these gain more from a core per chunk than from several on each
        if kind == "cuda":
            place = torch.device(kind, int(os.environ["LOCAL_RANK"]) if torchrun else 0)
            torch.cuda.set_device(place)
            torch.set_default_device(place)  # every tensor that is made stands there; a default is that of one thread

    set_up_thread()
    n_threads = n_threads or max(1, cores() // (int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun else 1))
    threads = ThreadPoolExecutor(n_threads, initializer=set_up_thread)
    if torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
        if rank:
            sys.stdout = open(os.devnull, "w")


def cores():
    """How many this process may use: those it is bound to, but no more than its control group has a quota for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = map(int, f.read().split())
        return max(1, min(bound, quota // period))
    except (OSError, ValueError):  # no control group, or "max", which is no number
        return bound


def leave():
    """Parts from the other processes; True where the work that is left, for one process, goes on."""
    global processes
    if dist.is_initialized():  # by torchrun, also where it started one process
        barrier()
        dist.destroy_process_group()
        os.environ.pop("TORCHELASTIC_RUN_ID", None)  # a later start() in this process must not join again
        processes = 1
    return rank == 0


def seeded(seed):
    """A torch.Generator on the device that tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def in_threads(f, *chunks):
    """list(map(f, *chunks)), the calls side by side."""
    return list(threads.map(f, *chunks))


def mine(chunks):
    """This process's share of the chunks."""
    return chunks[rank::processes]


def gather(found):
    """What was found for all chunks, in their order, from what every process found for its own."""
    if processes == 1:
        return found
    buffer, everyone = io.BytesIO(), [None] * processes
    torch.save(found, buffer)
    dist.all_gather_object(everyone, buffer.getvalue())
    everyone = [torch.load(io.BytesIO(part), map_location=torch.get_default_device(), weights_only=True)
                for part in everyone]  # what another process found stands on its own device
    return [everyone[i % processes][i // processes] for i in range(sum(map(len, everyone)))]


def map_chunks(f, *chunks):
    """list(map(f, *chunks)), shared out among processes and threads. Results carry no gradient."""
    return gather(in_threads(f, *map(mine, chunks)))


def sum_chunks(f, chunks):
    """The sums of f's results, tuples of tensors, over all chunks; shared out among processes and threads."""
    return add_up(threads.map(f, mine(chunks)))


def add_up(parts):
    """parts: for each chunk of this process a tuple of tensors, or None in the place of one; taken as they come, none
    is kept. Their sums over the chunks of all processes, in double precision: so the order, which the number of
    processes changes, changes no result."""
    totals = None
    for part in parts:
        dtypes = [None if tensor is None else tensor.dtype for tensor in part]
        part = [None if tensor is None else tensor.double() for tensor in part]
        totals = part if totals is None else [a if b is None else a + b for a, b in zip(totals, part)]
    if totals is None:
        fail(f"there are fewer pairs to work on than processes ({processes}): start fewer, or raise batch_size")
    for total in totals:
        if total is not None and processes > 1:
            dist.all_reduce(total)
    return [None if total is None else total.to(dtype) for total, dtype in zip(totals, dtypes)]


def union(found):
    """The elements that any process has found."""
    return sorted({each for part in gather([found]) for each in part})


def barrier():
    """Waits until every process is here."""
    if processes > 1:
        dist.barrier()

"""Threads, processes and devices change where the work runs, and not what comes out."""
import io
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

import factorize
from conftest import ROOT
from harness import config, parallel
from model import GPT, GPTConfig, sample
from tasks import SPECIALS

SMALL = ["--steps=5", "--eval_every=5", "--pool_size=64", "--cluster_inputs=16",
         "--cluster_responses=6", "--cluster_searches=1", "--eval_inputs=4",
         "--validation_inputs=4", "--chunks=4", "--seed=1"]
DISCRETE = ["--eval_samples=2", "--fixed_label_steps=2", "--responsibility_steps=2", "--router_marginal_kl_weight=0.3"]
CONTINUOUS = ["--z_dim=2", "--cell_steps=3"]  # the term of the routers' moments has a weight by default


def run_of(folder):
    """(log entries without the clock, weights) of a run, its posterior's and its base's among them."""
    with open(folder / "log.jsonl") as f:
        log = [{key: value for key, value in json.loads(line).items() if key != "minutes"} for line in f]
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    parts = {"model": checkpoint["model"], "posterior": checkpoint["posterior"], "base": checkpoint["base"]["model"]}
    return log, {f"{part} {key}": weight for part, weights in parts.items() for key, weight in weights.items()}


@pytest.mark.parametrize("stages, router_term", [(DISCRETE, "router_marginal_kl"), (CONTINUOUS, "router_moment_kl")],
                         ids=["discrete", "continuous"])
def test_two_processes_equal_one(tmp_path, monkeypatch, whole_searches, stages, router_term):
    """Five steps of a base, then five of its factorization through all stages: losses and weights agree to 1e-5. The
    responsibilities, and the marginal of the routers, are those of all pairs, wherever they were scored."""
    with open(tmp_path / "base.py", "w") as f:
        f.write('task = "grid_pathfinding"\ntask_sizes = {"side": 8, "max_distance": 3}\nn_layer = 2\nn_head = 2\n'
                'n_embd = 32\nblock_size = 48\nsteps = 5\nwarmup = 0\nbatch_size = 24\nchunks = 4\n'
                'final_eval_size = 16\n')
    with open(tmp_path / "run.py", "w") as f:
        f.write('base = "base.py"\nn_latents = 3\nbatch_size = 32\n')
    monkeypatch.chdir(tmp_path)
    command = [os.path.join(ROOT, "factorize.py"), "run.py", *SMALL, *stages]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           *command, "--threads=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run step 5/5") == 1 and done.stdout.count("wrote out/run/metrics.json") == 1
    log, weights = run_of(tmp_path / "out" / "run")
    os.rename(tmp_path / "out", tmp_path / "of two")
    factorize.factorize(config.load(factorize, command[1:]))
    log_of_one, weights_of_one = run_of(tmp_path / "out" / "run")
    assert {entry["stage"] for entry in log} >= {"fixed labels", "ELBO"} and log[-1][router_term] > 1e-6
    for entry, entry_of_one in zip(log, log_of_one, strict=True):
        for key in ("stage", "strategy_by_latent"):
            assert entry.pop(key, None) == entry_of_one.pop(key, None)
        assert entry == pytest.approx(entry_of_one, abs=1e-5)
    assert weights.keys() == weights_of_one.keys()
    for name, weight in weights_of_one.items():
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-5), name


def test_one_process_of_torchrun_leaves_as_two_do(tmp_path):
    """What it joined it leaves, and what starts after that, as the evaluation does, starts alone."""
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\nimport torch.distributed as dist\n"
                       "from harness import parallel\nparallel.start(1)\n"
                       "assert dist.is_initialized() and parallel.leave()\n"
                       "parallel.start(1)\nassert not dist.is_initialized() and parallel.processes == 1\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shares_of_all_processes_make_up_the_chunks(monkeypatch):
    """Every chunk is some process's, none is two's, and gather puts results back in the order of the chunks."""
    chunks, processes = list(range(7)), 3
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", rank)
        monkeypatch.setattr(parallel, "processes", processes)
        shares.append(parallel.mine(chunks))
    assert sorted(sum(shares, [])) == chunks

    def all_gather(everyone, found):
        for i, share in enumerate(shares):
            buffer = io.BytesIO()
            torch.save(share, buffer)
            everyone[i] = buffer.getvalue()

    monkeypatch.setattr(parallel.dist, "all_gather_object", all_gather)
    assert parallel.gather(shares[0]) == chunks


def test_sums_do_not_depend_on_their_order():
    """In single precision (1e8 + 1) - 1e8 is 0, in double precision 1."""
    parts = [(torch.tensor([1e8]), None), (torch.tensor([1.0]), None), (torch.tensor([-1e8]), None)]
    assert parallel.add_up(parts)[0].item() == parallel.add_up(parts[::-1])[0].item() == 1
    assert parallel.add_up(parts)[1] is None and parts[0][0].item() == 1e8


def test_a_sum_keeps_none_of_its_parts():
    """Gradients of many chunks are as large as many models."""
    left = []

    def parts():
        for _ in range(9):
            part = torch.ones(3)
            left.append(weakref.ref(part))
            yield (part,)
            del part
            assert sum(part() is not None for part in left) <= 1

    assert parallel.add_up(parts())[0].tolist() == [9, 9, 9]


def test_fewer_chunks_than_processes_are_one_line():
    """Such as where a batch has fewer pairs: a process is left without work."""
    with pytest.raises(SystemExit, match=r"fewer pairs to work on than processes \(1\): start fewer"):
        parallel.sum_chunks(lambda chunk: (chunk,), [])


def small_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(len(SPECIALS) + 8, block_size=24, n_layer=2, n_head=2, n_embd=32))
    return model, torch.randint(len(SPECIALS), len(SPECIALS) + 8, (3, 12))


def test_bfloat16_is_close_to_float32_and_leaves_sampling_alone(monkeypatch):
    model, ids = small_gpt()
    exact, samples = model(ids), sample(model, ids.tolist(), parallel.seeded(0))
    monkeypatch.setattr(parallel, "bfloat16", True)
    rough = model(ids)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=0.02 * exact.abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(samples, sample(model, ids.tolist(), parallel.seeded(0))))


@pytest.mark.parametrize("flag, line", [("--device=tpu", "'device'"), ("--precision=float8", "'precision'")])
def test_a_device_that_is_not_there_is_one_line(workplace, flag, line):
    with pytest.raises(SystemExit) as stop:
        factorize.factorize(config.load(factorize, ["configs/tiny_discrete.py", "--name=nowhere", flag]))
    assert line in str(stop.value) and not os.path.exists("out/nowhere")


@pytest.mark.parametrize("bound, quota, beside, n", [
    (8, "max 100000", 1, 8), (8, "250000 100000", 1, 2), (8, "50000 100000", 1, 1), (8, None, 2, 4), (2, None, 8, 1)])
def test_all_cores_that_a_process_may_use_are_used_by_default(monkeypatch, tmp_path, bound, quota, beside, n):
    """The fewer of those it is bound to and of its control group's quota, shared by the processes on the machine."""
    (tmp_path / "cpu.max").write_text(quota or "")
    real = open
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)))
    monkeypatch.setattr(parallel, "open", lambda path, *more: real(tmp_path / os.path.basename(path), *more)
                        if path.startswith("/sys") else real(path, *more), raising=False)
    of_torchrun = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for key in of_torchrun if beside > 1 else ("WORLD_SIZE", "RANK"):  # a cluster's shell may set some of them
        monkeypatch.setenv(key, str(beside))
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    before = parallel.threads
    parallel.start(0)
    assert parallel.threads._max_workers == n
    parallel.threads = before

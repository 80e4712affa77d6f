"""A GPU computes what the CPU does. Skipped where there is none. Random numbers of the two differ, so whole runs are
compared by what they reach, parts of them on the same weights and inputs."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import factorize
from conftest import ROOT
from harness import parallel
from model import Pairs, log_likelihood, sample, score_base
from posterior import Posterior, cluster_responses
from train_base import load_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@pytest.fixture
def on_cuda(workplace):
    """Returns f(function): the tensors that it gives on CUDA, in float32, on the CPU again."""
    def call(function):
        parallel.start(2, "cuda", "float32")
        return [tensor.cpu() for tensor in function()]

    yield call
    torch.set_default_device(None)
    parallel.start(2, "cpu")


@pytest.fixture(scope="module")
def parts(workplace):
    """(base, {kind of z: model and posterior}, 24 pairs), on the CPU; three latents that differ."""
    base, task, _ = load_base("out/tiny_base/ckpt.pt")
    pairs = factorize.sample_responses(base, task, 12, 2, "cuda")
    torch.manual_seed(0)
    models = {}
    for kind, n_latents, z_dim in (("discrete", 3, 0), ("continuous", 0, 2)):
        model, q = base.with_latents(n_latents, z_dim), Posterior(base, 3, z_dim=z_dim)
        model.embed.weight.data[len(model.embed.weight) - n_latents:] += torch.randn(n_latents, 64)
        q.fit_statistics(pairs)
        if z_dim:
            q.cells.place(torch.full((3,), 1 / 3), std=0.3)
        models[kind] = model, q
    return base, models, pairs


def to_cuda(*things):
    return [Pairs(*(part.cuda() for part in each)) if isinstance(each, Pairs) else copy.deepcopy(each).cuda()
            for each in things]


def close(got, want, rtol=1e-3):
    return torch.allclose(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


def test_scores_samples_and_features_are_those_of_the_cpu(parts, on_cuda):
    base, models, pairs = parts
    prompts = [row[:start] for row, start in zip(pairs.ids.tolist(), pairs.starts.tolist())]

    def here(base, model, q, pairs):
        tokens, logp = sample(base, prompts, parallel.seeded(0), temperature=0)
        return [tokens, log_likelihood(model, pairs), score_base(base, pairs), q(pairs), logp,
                q.fit_statistics(pairs)]

    tokens, *want = here(*(copy.deepcopy(each) for each in (base, *models["discrete"])), pairs)
    cuda_tokens, *got = on_cuda(lambda: here(*to_cuda(base, *models["discrete"], pairs)))
    assert torch.equal(cuda_tokens, tokens)
    assert want[0].std(dim=1).mean() > 0.03  # latents differ by more than what is tolerated
    for of_cuda, of_cpu in zip(got, want):
        assert close(of_cuda, of_cpu)


@pytest.mark.parametrize("kind, stage", [("discrete", "fixed labels"), ("discrete", "responsibilities"),
                                         ("discrete", "ELBO"), ("continuous", "fixed labels"), ("continuous", "ELBO")])
def test_the_gradient_is_that_of_the_cpu(parts, on_cuda, kind, stage):
    """Of all terms at once, and their values. Labels are drawn on the CPU: random numbers of a GPU are others."""
    _, models, pairs = parts
    model, q = models[kind]
    of_kind = {"discrete": ("posterior_entropy", "jsd", "router_marginal_kl"), "continuous": ("posterior_variance",)}
    weights = {f"{name}_weight": 1.0 for name in ("token_weighted", *of_kind[kind])}
    cfg = factorize.Config(base="", z_dim=model.config.z_dim, **weights)
    terms, share = factorize.term_weights(cfg, stage, 2.0), torch.tensor([0.5, 0.3, 0.2])
    labels = factorize.label_pool(model, q, pairs, stage, cfg, share, parallel.seeded(0))
    pairs, labels = factorize.take_batch(model, pairs, labels, slice(None), stage, cfg, terms, share,
                                         parallel.seeded(0))

    def gradient(model, q, pairs, labels):
        parameters = [*model.parameters(), *q.head.parameters()]
        values, gradients = factorize.gradient(model, q, pairs, labels, stage, terms, parameters, 4)
        return [torch.tensor([*values.values()]), *(g for g in gradients if g is not None)]

    want = gradient(model, q, pairs, labels)
    got = on_cuda(lambda: gradient(*to_cuda(model, q, pairs), {key: part.cuda() for key, part in labels.items()}))
    assert len(got) == len(want)
    for of_cuda, of_cpu in zip(got, want):
        assert close(of_cuda, of_cpu) and of_cpu.abs().max() > 0


def test_clusters_do_not_depend_on_the_device(on_cuda):
    """Three clusters far apart, shifted by another amount for each of 20 inputs."""
    truth = torch.arange(120) % 3
    x_index = torch.arange(120) // 6
    features = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)) / 10 + x_index[:, None]
    features[torch.arange(120), truth] += 4

    def labels():
        responses = [tensor.to(torch.get_default_device()) for tensor in (features, x_index)]
        return [cluster_responses(*responses, K=3, seed=0, searches=2).r.argmax(dim=1)]

    for label in labels() + on_cuda(labels):
        assert len({*zip(label.tolist(), truth.tolist())}) == len({*label.tolist()}) == 3


def program(*argv, **env):
    done = subprocess.run([sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]], capture_output=True, text=True,
                          env=os.environ | env)
    assert done.returncode == 0, done.stderr


def read(path):
    with open(path) as f:
        return json.load(f)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_base_trains_on_cuda(workplace, precision):
    """To the loss that the CPU reaches in as many steps, in either precision."""
    name = f"--name=base_cuda_{precision}"
    program("train_base.py", "configs/tiny_base.py", "--steps=160", "--device=cuda", name, f"--precision={precision}")
    nll = read(f"out/base_cuda_{precision}/metrics.json")["nll"]
    assert nll == pytest.approx(read("out/tiny_base/metrics.json")["nll"], abs=0.3)


@pytest.mark.parametrize("z", ["discrete", "continuous"])
def test_a_factorization_of_cuda_is_evaluated_anywhere(workplace, z):
    """All stages and the evaluation on CUDA, then the evaluation on a machine without a GPU."""
    run = ["factorize.py", f"configs/tiny_{z}.py", f"--name=cuda_{z}", "--device=auto"]
    run += ["--router_marginal_kl_weight=1"] if z == "discrete" else []  # of a continuous z, a term by default
    program(*run)
    there = read(f"out/cuda_{z}/metrics.json")
    program("evaluate.py", f"out/cuda_{z}", CUDA_VISIBLE_DEVICES="")
    here = read(f"out/cuda_{z}/metrics.json")
    assert here["nll"] - here["base_nll"] == pytest.approx(there["nll"] - there["base_nll"], abs=0.3)


def test_a_run_on_cuda_goes_on_from_a_saved_state(workplace):
    """Ten steps at once, or five and five: the same losses, but for the order in which a GPU adds up."""
    run = ["configs/tiny_discrete.py", "--device=cuda", "--steps=10", "--fixed_label_steps=3",
           "--responsibility_steps=4", "--precision=float32"]
    program("factorize.py", *run, "--name=cuda_whole")
    stopped = f"""
import sys, os, signal
sys.path.insert(0, {ROOT!r})
import factorize
from harness import config, runs
check = runs.Run.check_finite
def interrupt(self, step, *more):
    check(self, step, *more)
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
runs.Run.check_finite = interrupt
factorize.factorize(config.load(factorize, {[*run, "--name=cuda_parts"]!r}))
"""
    done = subprocess.run([sys.executable, "-c", stopped], capture_output=True, text=True)
    assert "stopped after step 5 of 10" in done.stdout, done.stderr
    program("factorize.py", *run, "--name=cuda_parts", "--resume=True")
    logs = []
    for name in ("whole", "parts"):
        with open(f"out/cuda_{name}/log.jsonl") as f:
            logs.append([json.loads(line)["objective"] for line in f])
    assert len(logs[1]) == 10 and logs[1] == pytest.approx(logs[0], rel=1e-2)

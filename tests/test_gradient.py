"""The gradient of the loop, in chunks, against one backward() of J over the whole batch, in double precision."""
import weakref

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

import factorize
import train_base
from harness import config, parallel
from harness.parallel import seeded
from model import gaussian, score_latents
from posterior import Posterior

STAGES = {"fixed labels": 0, "responsibilities": 1, "ELBO": 2}  # the step of SHORT in which each is reached
SHORT = ["configs/tiny_discrete.py", "--fixed_label_steps=1", "--responsibility_steps=1"]
CONTINUOUS = ["configs/tiny_continuous.py", "--cell_steps=2", "--z_dim=3", "--z_samples=2"]
DISCRETE_WEIGHTS = {"token_weighted": 0.7, "posterior_entropy": 0.3, "router_support": 0.2,
                    "router_marginal_kl": 1.3, "jsd": 0.9}
SHARE = [0.5, 0.3, 0.2]  # of the clusters
CONTINUOUS_WEIGHTS = {"token_weighted": 0.7, "router_moment_kl": 1.3, "posterior_variance": 0.4, "cell": 0.6}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def discrete_reference(model, q, pairs, labels, stage, share):
    """Every term as its definition has it, a mean over the batch; r is a label that nothing flows through."""
    logq, w = q(pairs), (pairs.b / pairs.b.sum(dim=1, keepdim=True))[:, None]
    logq = logq.detach() if stage == "fixed labels" else logq
    K, (nll, logits, router) = len(share), score_latents(model, pairs, keep=labels["keep"])
    logp_z = router[:, -K:].log_softmax(dim=1)
    of_z = logq.exp() if stage == "ELBO" else torch.eye(K)[labels["z"][:, 0]]  # what R is expected under
    terms = {"reconstruction": (of_z * nll.sum(dim=2)).sum(dim=1).mean(),
             "token_weighted": (of_z * (nll * w).sum(dim=2)).sum(dim=1).mean(),
             "kl": kl_divergence(Categorical(logits=logq), Categorical(logits=logp_z)).mean(),
             "posterior_entropy": Categorical(logits=logq).entropy().mean(),
             "router_support": -router.softmax(dim=1)[:, -K:].sum(dim=1).log().mean(),
             "router_marginal_kl": kl_divergence(Categorical(logp_z.exp().mean(dim=0)), Categorical(share))}
    if stage == "ELBO":
        p = logits.softmax(dim=-1)  # (B, K, T, V)
        jsd = Categorical(p.mean(dim=1)).entropy() - Categorical(p).entropy().mean(dim=1)
        terms["jsd"] = (w[:, 0] * jsd).sum(dim=1).mean()
    else:
        terms["router_distillation"] = -(labels["log_r"].exp() * logp_z).sum(dim=1).mean()
    if stage == "responsibilities":
        terms["posterior_distillation"] = -(labels["log_r"].exp() * logq).sum(dim=1).mean()
    return terms


def continuous_reference(model, q, pairs, labels, stage, share):
    mean, log_var = (part.detach() if stage == "fixed labels" else part for part in q(pairs))
    posterior, w = Normal(mean, (0.5 * log_var).exp()), pairs.b / pairs.b.sum(dim=1, keepdim=True)
    z = labels["z"]
    if stage == "ELBO":
        z = torch.cat([posterior.mean[:, None] + posterior.stddev[:, None] * labels["noise"], z], dim=1)
    nll, _, raw = score_latents(model, pairs, z, labels["keep"])
    of_q = nll[:, :-1] if stage == "ELBO" else nll
    mean_p, log_var_p = gaussian(raw)
    router = Normal(mean_p, (0.5 * log_var_p).exp())
    variance = (router.variance + router.mean.square()).mean(dim=0) - router.mean.mean(dim=0).square()
    moments = Normal(router.mean.mean(dim=0), variance.sqrt())
    terms = {"reconstruction": of_q.sum(dim=2).mean(), "token_weighted": (of_q * w[:, None]).sum(dim=2).mean(),
             "kl": kl_divergence(posterior, router).sum(dim=1).mean(),
             "posterior_variance": posterior.variance.mean(),
             "router_moment_kl": kl_divergence(moments, Normal(torch.zeros(()), torch.ones(()))).sum()}
    if stage == "ELBO":
        terms["cell_reconstruction"] = nll[:, -1].sum(dim=1).mean()
    else:
        terms["router_distillation"] = terms["kl"]
    return terms


def setting(flags, more, posterior):
    """A config, a model and a posterior far from their start, and ten pairs of several lengths."""
    cfg = config.load(factorize, [*flags, *(f"--{name}_weight={value}" for name, value in more.items()),
                                  f"--posterior={posterior}", "--dropout=0.3"])
    base, task, _ = train_base.load_base("out/tiny_base/ckpt.pt")
    torch.manual_seed(0)
    pairs = factorize.sample_responses(base, task, 10, 1, "gradient")
    model = base.with_latents(0 if cfg.z_dim else 3, cfg.z_dim)
    q = Posterior(base, 3, posterior, cfg.z_dim)
    q.fit_statistics(pairs)
    for p in [*model.parameters(), *q.head.parameters()]:
        p.data += 0.1 * torch.randn(p.shape)
    if cfg.z_dim:
        q.cells.place(torch.full((3,), 1 / 3), cfg.posterior_std)
    return cfg, model, q, pairs


def both_gradients(flags, more, posterior, stage, step, only=None):
    """(terms, gradients by the loop's function, in 3 chunks; the same by one backward of the reference)."""
    cfg, model, q, pairs = setting(flags, more, posterior)
    assert factorize.stage_of(cfg, step) == stage
    share = torch.tensor(SHARE)
    weights = factorize.term_weights(cfg, stage, c_base=1.7)
    weights = {name: weight if only in (None, name) else 0.0 for name, weight in weights.items()}
    labels = factorize.label_pool(model, q, pairs, stage, cfg, share, seeded(0))
    pairs, labels = factorize.take_batch(model, pairs, labels, slice(0, 10), stage, cfg, weights, share, seeded(1))
    named = [(n, p) for n, p in [*model.named_parameters(), *q.named_parameters()] if p.requires_grad]
    parameters = [p for _, p in named]
    values, got = factorize.gradient(model, q, pairs, labels, stage, weights, parameters, 3)
    terms = (continuous_reference if cfg.z_dim else discrete_reference)(model, q, pairs, labels, stage, share)
    J = sum(weights[name] * terms[name] for name in weights)
    J.backward()
    return values, terms, [(n, g, p.grad) for (n, p), g in zip(named, got, strict=True)]


KINDS = [(SHORT, DISCRETE_WEIGHTS, stage, step) for stage, step in STAGES.items()] + [
    (CONTINUOUS, CONTINUOUS_WEIGHTS, stage, step) for stage, step in STAGES.items() if stage != "responsibilities"]


@pytest.mark.parametrize("posterior", ["linear", "full"])
@pytest.mark.parametrize("flags, more, stage, step", KINDS)
def test_the_gradient_in_chunks_is_that_of_one_graph(workplace, flags, more, posterior, stage, step):
    """J with a weight on every term, and each term's value: relative difference at most 1e-9 for every parameter. In
    the stage of fixed labels, nothing reaches the posterior."""
    values, terms, gradients = both_gradients(flags, more, posterior, stage, step)
    assert set(values) == set(terms)
    for name, value in values.items():
        assert value == pytest.approx(terms[name].item(), rel=1e-9, abs=1e-12), name
    reached = set()
    for name, got, want in gradients:
        if got is None or want is None:
            assert (got is None or not got.any()) and (want is None or not want.any()), name
            continue
        assert (got - want).norm() <= 1e-9 * want.norm(), name
        if want.norm() > 0:
            reached.add(name.split(".")[0])
    assert {"embed", "blocks"} <= reached
    assert ("head" in reached and "backbone" in reached) or posterior == "linear" or stage == "fixed labels"
    assert "backbone" not in reached or posterior == "full" and stage != "fixed labels"


@pytest.mark.parametrize("flags, more, stage, step", KINDS)
def test_the_gradient_of_each_term_alone_is_that_of_one_graph(workplace, flags, more, stage, step):
    """One term at a time, so that no other hides it; each has a gradient somewhere, unless it is of a posterior that
    stands still or has no weight in the stage."""
    cfg = setting(flags, more, "full")[0]
    for only, weight in factorize.term_weights(cfg, stage, c_base=1.7).items():
        still = stage == "fixed labels" and only in ("posterior_entropy", "posterior_variance")
        if not weight or still:
            continue
        _, _, gradients = both_gradients(flags, more, "full", stage, step, only)
        zero = torch.zeros(1)  # what a gradient that is None stands for
        total = sum(want.norm() ** 2 for _, _, want in gradients if want is not None) ** 0.5
        error = sum(((zero if got is None else got) - (zero if want is None else want)).norm() ** 2
                    for _, got, want in gradients if got is not None or want is not None)
        assert total > 1e-6 and error ** 0.5 <= 1e-9 * total, only


@pytest.mark.parametrize("flags, stage, step, z_of_a_pair", [
    (SHORT, "fixed labels", 0, 1), (SHORT, "ELBO", 2, 3),
    (CONTINUOUS, "fixed labels", 0, 1), (CONTINUOUS, "ELBO", 2, 3)])
def test_a_chunk_has_about_64_records_or_one_pair(workplace, monkeypatch, flags, stage, step, z_of_a_pair):
    """Of 70 pairs, each as many records as the stage scores z: K, or the samples of q and the z of the cell."""
    cfg, model, q, pairs = setting(flags, {}, "linear")
    pairs = pairs.rows(torch.arange(70) % 10)
    labels = factorize.label_pool(model, q, pairs, stage, cfg, torch.tensor(SHARE), seeded(0))
    weights = factorize.term_weights(cfg, stage, 1.0)
    pairs, labels = factorize.take_batch(model, pairs, labels, slice(70), stage, cfg, weights, None, seeded(1))
    score, sizes = factorize.score_latents, []

    def spy(model, chunk, latents, keep):
        sizes.append(latents.shape[:2].numel())
        return score(model, chunk, latents)

    monkeypatch.setattr(factorize, "score_latents", spy)
    factorize.gradient(model, q, pairs, labels, stage, weights, [*model.parameters()], 1)
    assert sum(sizes) == 70 * z_of_a_pair and len(sizes) == max(1, 70 * z_of_a_pair // 64) and max(sizes) <= 72


def test_no_graph_of_a_chunk_outlives_its_gradient(workplace, monkeypatch):
    """With one thread, one graph at a time: peak memory is that of a chunk, and not of the batch."""
    class Sentinel:
        """Lives as long as the graph that it hooks into."""

    def spy(*args):
        found, sentinel = score(*args), Sentinel()
        found[0].register_hook(lambda gradient, sentinel=sentinel: None)
        sentinels.append(weakref.ref(sentinel))
        alive.append(sum(each() is not None for each in sentinels))
        return found

    parallel.start(1)
    score, sentinels, alive = factorize.score_latents, [], []
    cfg, model, q, pairs = setting(SHORT, {}, "linear")
    labels = factorize.label_pool(model, q, pairs, "ELBO", cfg, None, None)
    monkeypatch.setattr(factorize, "score_latents", spy)
    weights = factorize.term_weights(cfg, "ELBO", 1.0)
    factorize.gradient(model, q, pairs, labels, "ELBO", weights, [*model.parameters()], 10)
    assert len(sentinels) == 10 and set(alive) == {1}

"""The GPT against loops, cached sampling against uncached scoring, the latent section, and the posterior."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

from model import (EPS, GPT, GPTConfig, gaussian, insert_latents, pad, sample, sample_in_batches, sample_pairs,
                   score_base, score_latents)
from posterior import Posterior, cluster_responses
from tasks import BOS, EOS, PAD, X, X_END, Y, Y_END, Z, Z_EMPTY, Z_END, Tokenizer
from train_base import load_base

VOCAB = 20


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB, 0, block_size=24, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data.mul_(12)  # far from uniform, so that mistakes show
    return model.requires_grad_(False)


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[BOS, X, *(rng.randrange(10, VOCAB) for _ in range(rng.randint(1, 6))), X_END, Y] for _ in range(n)]


def slow_logits(model, ids):
    """One sequence, position by position, head by head: the transformer as its definition has it."""
    C, nh = model.config.n_embd, model.config.n_head
    hs = C // nh

    def norm(v):
        return v / (v.square().mean() + EPS).sqrt()

    def turn(v, position):
        out = v.clone()
        for i in range(hs // 2):
            angle = position * 10000 ** (-2 * i / hs)
            a, b = v[i], v[i + hs // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + hs // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    stream = [model.embed.weight[i] for i in ids]
    for block in model.blocks:
        qkv = [block.attention.qkv.weight @ norm(v) for v in stream]
        attended = []
        for t in range(len(ids)):
            heads = []
            for h in range(nh):
                q = turn(norm(qkv[t][h * hs:(h + 1) * hs]), t)
                keys = [turn(norm(qkv[s][C + h * hs:C + (h + 1) * hs]), s) for s in range(t + 1)]
                scores = torch.stack([q @ k / math.sqrt(hs) for k in keys])
                weights = scores.softmax(dim=0)
                heads.append(sum(weights[s] * qkv[s][2 * C + h * hs:2 * C + (h + 1) * hs] for s in range(t + 1)))
            attended.append(stream[t] + block.attention.proj.weight @ torch.cat(heads))
        stream = [v + block.down.weight @ F.gelu(block.up.weight @ norm(v)) for v in attended]
    return torch.stack([model.head.weight @ norm(v) for v in stream])


def test_the_forward_pass_is_that_of_explicit_loops(model):
    ids = prompts(1, seed=3)[0]
    assert torch.allclose(model(torch.tensor([ids]))[0], slow_logits(model, ids), atol=1e-3)


def test_a_later_token_changes_no_earlier_logit(model):
    ids = torch.tensor([prompts(1, seed=3)[0] + [12, 13, 14]])
    other = ids.clone()
    other[0, -1] = 15
    assert torch.equal(model(ids)[:, :-1], model(other)[:, :-1])
    assert not torch.equal(model(ids)[:, -1], model(other)[:, -1])


def test_cached_sampling_scores_like_an_uncached_pass(model):
    """The log-probability of every sampled token equals that of a fresh pass over the finished record, for prompts of
    different lengths whose rows finish, and leave the batch, at different times."""
    pairs = sample_pairs(model, prompts(64), torch.Generator().manual_seed(1))
    assert len(set((pairs.ids != PAD).sum(dim=1).tolist())) > 5
    scored = pairs.ids != PAD  # this random model also samples <pad> now and then
    assert torch.allclose(score_base(model, pairs.ids, pairs.starts)[scored], pairs.b[scored], atol=1e-3)


def test_nothing_follows_the_end(model):
    tokens, logp = sample(model, prompts(64), torch.Generator().manual_seed(1))
    assert (tokens == EOS).any()
    for row, scores in zip(tokens.tolist(), logp):
        if EOS in row:
            end = row.index(EOS)
            assert set(row[end + 1:]) <= {PAD} and not scores[end + 1:].any()


def test_temperature_zero_takes_the_likeliest_token_whatever_the_batch(model):
    alone = [sample(model, [p], torch.Generator(), temperature=0)[0][0].tolist() for p in prompts(8)]
    together = sample(model, prompts(8), torch.Generator(), temperature=0)[0].tolist()
    assert all(row[:len(a[:10])] == a[:10] for row, a in zip(together, alone))
    assert alone[0][0] == model(torch.tensor([prompts(8)[0]]))[0, -1].argmax().item()


def test_sampling_frequencies_are_the_models_probabilities(model):
    """First tokens of 4,000 samples, in batches that must differ: every share within 5 standard errors."""
    prompt, n = prompts(1)[0], 4000
    p = model(torch.tensor([prompt]))[0, -1].softmax(dim=0)
    samples = sample_in_batches(model, [prompt] * n, torch.Generator().manual_seed(0))
    first = torch.stack([tokens[0] for tokens, _ in samples])
    shares = torch.bincount(first, minlength=VOCAB) / n
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_a_record_longer_than_the_context_says_its_length(model):
    with pytest.raises(AssertionError, match="25 positions exceed block_size 24"):
        model(torch.full((1, 25), 12))
    with pytest.raises(AssertionError, match="leaves no room in block_size 24"):
        sample(model, [[12] * 24], torch.Generator())


def test_the_latent_section_stands_before_y_and_takes_no_position():
    """<bos> <x> ... </x> <z> z </z> <y> ...: the three tokens repeat the position of </x>."""
    model = GPT(GPTConfig(VOCAB + 3, 3, block_size=24, n_layer=1, n_head=2, n_embd=16))
    ids = pad([[BOS, X, 11, 12, X_END, Y, 13, Y_END, EOS], [BOS, X, 11, X_END, Y, 13, Y_END, EOS]])
    starts = torch.tensor([6, 5])
    rows = insert_latents(ids, starts, torch.tensor([[VOCAB, VOCAB + 2]] * 2))
    assert rows[0, 1].tolist() == [BOS, X, 11, 12, X_END, Z, VOCAB + 2, Z_END, Y, 13, Y_END, EOS]
    assert rows[1, 0].tolist() == [BOS, X, 11, X_END, Z, VOCAB, Z_END, Y, 13, Y_END, EOS, PAD]
    assert model.positions(rows[:, 1])[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8]


def test_scoring_under_all_latents_is_scoring_one_at_a_time(model):
    """token_nll[i, k] from an explicit forward of '<bos> <x> x </x> <z> z_k </z> <y> y'; router logits from the router
    prompt alone; a choice of latents gives the matching columns."""
    torch.manual_seed(1)
    canonical = sample_pairs(model, prompts(5), torch.Generator().manual_seed(1))
    model = model.with_latents(3, canonical, steps=1).requires_grad_(False)
    model.embed.weight[-3:] += torch.randn(3, 16)
    records = [p + [12, 13, 14, 11, 12][:n] + [Y_END, EOS] for n, p in enumerate(prompts(5))]
    ids, starts = pad(records), torch.tensor([len(p) for p in prompts(5)])
    nll, logits, router = score_latents(model, ids, starts)
    for i, (record, start) in enumerate(zip(records, starts.tolist())):
        assert torch.allclose(model(torch.tensor([record[:start - 1] + [Z]]))[0, -1], router[i], atol=1e-4)
        for k in range(3):
            row = record[:start - 1] + [Z, VOCAB + k, Z_END] + record[start - 1:]
            logp = model(torch.tensor([row]))[0].log_softmax(dim=-1)
            slow = [-logp[t + 2, record[t]].item() for t in range(start, len(record))]
            assert nll[i, k, start:len(record)].tolist() == pytest.approx(slow, abs=1e-3)
            assert nll[i, k, :start].abs().sum() == nll[i, k, len(record):].abs().sum() == 0
    z = torch.tensor([[2], [0], [1], [2], [0]])
    chosen = score_latents(model, ids, starts, VOCAB + z)[0][:, 0]
    assert torch.allclose(chosen, nll[torch.arange(5), z[:, 0]], atol=1e-5)


@pytest.fixture(scope="module")
def trained(workplace):
    """The tiny base and two sets of its own samples."""
    base, task, _ = load_base("out/tiny_base/ckpt.pt")
    tokenizer, rng, generator = Tokenizer(task.vocab), random.Random("trained"), torch.Generator().manual_seed(0)
    pairs = [sample_pairs(base, [tokenizer.prompt(task.sample_input(rng, False)) for _ in range(512)], generator)
             for _ in range(2)]
    return base.requires_grad_(False), *pairs


def test_a_fresh_factorization_starts_at_the_base(trained):
    """|NLL of y given (x, z_k) - base NLL of y| <= 5% for every k, on samples the slot was not fitted to; all the
    base's weights are kept, the latents differ, and a section of ordinary embeddings would have broken it."""
    base, pairs, (ids, starts, _) = trained
    ids, starts = ids[:256], starts[:256]
    torch.manual_seed(0)
    nll = score_base(base, ids, starts).sum(dim=1).mean()
    model = base.with_latents(4, pairs, steps=50)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    fresh = score_latents(model, ids, starts)[0].sum(dim=2).mean(dim=0)
    assert ((fresh - nll).abs() <= 0.05 * nll).all() and fresh.unique().numel() == 4
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in base.state_dict().items() if "blocks" in name)
    ordinary = ids[~torch.isin(ids, torch.tensor([Z, Z_END, Z_EMPTY])).any(dim=1)]  # a bad base may sample anything
    assert len(ordinary) > 200 and torch.allclose(model(ordinary)[..., :-4], base(ordinary), atol=1e-5)
    model.embed.weight[[Z, Z_END, -4, -3, -2, -1]] = model.embed.weight[[12, 13, 14, 15, 16, 17]]
    broken = score_latents(model, ids, starts)[0].sum(dim=2).mean(dim=0)
    assert (broken - nll).abs().min() > 0.05 * nll
    model = base.with_latents(0, pairs, steps=50, z_dim=3).requires_grad_(False)
    z = torch.cat([torch.zeros(len(ids), 1, 3), torch.randn(len(ids), 2, 3)], dim=1)
    fresh = score_latents(model, ids, starts, z)[0].sum(dim=2).mean(dim=0)
    assert ((fresh - nll).abs() <= 0.05 * nll).all() and fresh.unique().numel() == 3


def test_a_linear_posterior_trains_its_head_and_a_full_one_everything(trained):
    base, _, _ = trained
    pairs = sample_pairs(base, prompts(12), torch.Generator().manual_seed(0))
    for adaptation in ("linear", "full"):
        q = Posterior(base, 3, adaptation)
        q.fit_statistics(pairs)
        q(pairs)[:, 0].sum().backward()
        assert q.head.weight.grad.abs().sum() > 0
        got = [p.grad is not None and p.grad.abs().sum() > 0 for p in q.backbone.blocks.parameters()]
        assert all(got) if adaptation == "full" else not any(got)


def test_posterior_features_are_standardised_and_ignore_padding_and_company(trained):
    base, _, _ = trained
    pairs = sample_pairs(base, prompts(40), torch.Generator().manual_seed(0))
    q = Posterior(base, 3)
    features = q.fit_statistics(pairs)
    assert torch.allclose(features, q.features(pairs), atol=1e-3)
    assert features.mean(dim=0).abs().max() < 1e-3
    assert torch.allclose(q.features(pairs.rows(torch.tensor([5]))), features[5:6], atol=1e-3)
    assert torch.equal(q.fit_statistics(pairs), features)  # whatever was fitted before


def test_clusters_mean_the_same_for_every_input_where_plain_distances_do_not():
    """features = large offset of x + direction of the strategy + noise, one response a strategy: constrained, centred
    k-means finds the strategies; the nearest raw centroids, which are those of x, do not. Same seed, same labels."""
    generator = torch.Generator().manual_seed(0)
    n, S = 200, 3
    x_index, strategy = torch.arange(n).repeat_interleave(S), torch.arange(S).repeat(n)
    features = (10 * torch.randn(n, 40, generator=generator)[x_index]
                + 2 * torch.randn(S, 40, generator=generator)[strategy]
                + 0.5 * torch.randn(n * S, 40, generator=generator))
    prior, log_p = torch.full((S,), -math.log(S)), torch.full((n * S,), -math.log(S))

    def labels(features):
        generator = torch.Generator().manual_seed(1)
        return cluster_responses(features, x_index, log_p, prior, generator, restarts=8)

    log_t, agreement = labels(features)
    assert agreement > 0.5  # whatever a restart calls its clusters
    joint = torch.zeros(S, S).index_put_((log_t.argmax(dim=1), strategy), torch.ones(n * S), accumulate=True) / n
    assert joint.max(dim=1).values.min() > 0.95 and joint.max(dim=0).values.min() > 0.95
    assert torch.equal(log_t, labels(features)[0])
    raw = torch.cdist(features, features[:S]).argmin(dim=1)
    plain = torch.zeros(S, S).index_put_((raw, strategy), torch.ones(n * S), accumulate=True) / n
    assert plain.max(dim=0).values.min() < 0.8


def continuous(model, z_dim=3):
    torch.manual_seed(1)
    model = GPT(GPTConfig(VOCAB, 0, 24, 2, 2, 16, z_dim=z_dim))
    for p in model.parameters():
        p.data.mul_(12)
    model.embed_z[0].weight.data.normal_()
    return model.requires_grad_(False)


def test_z_changes_the_embedding_of_its_slot_and_nothing_else(model):
    """hidden_states of z against those of a model whose <z_empty> embedding is that of <z_empty> plus E(z)."""
    model, z = continuous(model), torch.tensor([[0.5, -1.0, 2.0]])
    ids = torch.tensor([[BOS, X, 11, X_END, Z, Z_EMPTY, Z_END, Y, 12, Y_END]])
    plain, shifted = model.hidden_states(ids), model.hidden_states(ids, z=z)
    changed = (shifted[0] - plain[0]).abs().sum(dim=2)[0] > 0
    assert changed.nonzero().tolist() == [[5]]
    model.embed.weight[Z_EMPTY] += model.embed_z(z[0])
    assert torch.allclose(model.hidden_states(ids)[-1], shifted[-1], atol=1e-5)


def test_sampling_under_a_continuous_z_scores_like_an_uncached_pass(model):
    """Prompts of different lengths, a z for each, through batches: every z stays with its prompt."""
    model = continuous(model)
    some = [[*p[:-1], Z, Z_EMPTY, Z_END, Y] for p in prompts(7)]
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    found = sample_in_batches(model, some, torch.Generator().manual_seed(0), z=z, batch=3)
    compared = 0
    for p, vector, (tokens, logp) in zip(some, z, found):
        tokens = tokens.tolist()  # this random model also samples <pad> and a second <z_empty>: until there
        tokens = tokens[:min(tokens.index(end) for end in (PAD, Z_EMPTY, tokens[-1]) if end in tokens)]
        ids = torch.tensor([p + tokens])
        want = model(ids, z=vector[None]).log_softmax(dim=-1)[0, len(p) - 1:-1].gather(1, ids[0, len(p):, None])[:, 0]
        assert torch.allclose(logp[:len(want)], want, atol=1e-4)
        compared += len(want)
        assert not torch.allclose(model(ids)[0, len(p) - 1:], model(ids, z=vector[None])[0, len(p) - 1:], atol=1e-2)
    assert compared > 10


def test_a_standard_deviation_is_bounded_whatever_comes_in():
    for raw in (0.0, 1e9, -1e9):
        mean, log_var = gaussian(torch.full((1, 4), raw))
        assert mean.shape == log_var.shape == (1, 2) and (mean == raw).all() and log_var.abs().max() <= 5


def test_the_corners_of_a_posterior_have_unit_variance_and_equal_distances(trained):
    """Fitted to four clusters that its features tell apart, a continuous posterior starts there."""
    base, pairs, _ = trained
    q = Posterior(base, 4, z_dim=5)
    features, cluster = torch.zeros(400, q.head.in_features), torch.arange(400) % 4
    features[torch.arange(400), cluster] = 2.0
    q.place_corners(torch.full((4,), 0.25), std=0.5)
    q.fit_head(features, F.one_hot(cluster, 4).float().log().clamp(min=-50), torch.ones(400), steps=2000,
               weight_decay=0.0)
    mean, log_var = gaussian(q.head(features).detach())
    distances = torch.pdist(mean[:4])
    assert distances.std() < 0.02 * distances.mean()
    assert torch.allclose((mean.var(dim=0) + log_var.exp()[0])[:3], torch.ones(3), atol=0.05)
    assert torch.allclose((0.5 * log_var[0]).exp(), torch.tensor([0.5, 0.5, 0.5, 1, 1]), atol=1e-3)
    assert mean[:, 3:].abs().max() < 0.05


@pytest.mark.parametrize("std", [0.1, 0.3])
@pytest.mark.parametrize("share", [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)])
def test_a_cell_takes_as_much_of_space_as_its_cluster_of_the_responses(trained, share, std):
    """Also where clusters are of different sizes; a corner is in its own cell."""
    q = Posterior(trained[0], 3, z_dim=2)
    q.place_corners(torch.tensor(share), std)
    found = q.cell(torch.randn(20000, 2, generator=torch.Generator().manual_seed(1))).bincount(minlength=3) / 20000
    assert torch.allclose(found, torch.tensor(share), atol=0.015), found
    assert q.cell(q.corners).tolist() == [0, 1, 2]

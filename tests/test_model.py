"""The GPT against loops, cached sampling against uncached scoring, the router, and the latent section."""
import math
import random

import pytest
import torch
import torch.nn.functional as F

from model import (EPS, GPT, GPTConfig, Pairs, as_pairs, gaussian, in_chunks, insert_latents,
                   log_likelihood, pad, sample, sample_in_batches, sample_pairs, score_base, score_latents,
                   score_router)
from tasks import BOS, EOS, PAD, X, X_END, Y, Y_END, Z, Z_EMPTY, Z_END

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


def slow_logits(model, ids, keep):
    """One sequence, position by position, head by head: the transformer as its definition has it. keep: (L, 2, T, C)
    factors of what attention and MLP add."""
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
    for block, (keep_attention, keep_mlp) in zip(model.blocks, keep):
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
            attended.append(stream[t] + keep_attention[t] * (block.attention.proj.weight @ torch.cat(heads)))
        stream = [v + k * (block.down.weight @ F.gelu(block.up.weight @ norm(v))) for v, k in zip(attended, keep_mlp)]
    return torch.stack([model.head.weight @ norm(v) for v in stream])


def test_the_forward_pass_is_that_of_explicit_loops(model):
    ids = prompts(1, seed=3)[0]
    keep = torch.ones(len(model.blocks), 2, len(ids), model.config.n_embd)
    assert torch.allclose(model(torch.tensor([ids]))[0], slow_logits(model, ids, keep), atol=1e-3)
    keep = (torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)) > 0.3) / 0.7  # dropout
    logits = model(torch.tensor([ids]), keep=keep[None])[0]
    assert torch.allclose(logits, slow_logits(model, ids, keep), atol=1e-3)


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
    assert torch.allclose(score_base(model, pairs)[scored], pairs.b[scored], atol=1e-3)


def test_nothing_follows_the_end(model):
    tokens, logp = sample(model, prompts(64), torch.Generator().manual_seed(1))
    assert (tokens == EOS).any()
    for row, scores in zip(tokens.tolist(), logp):
        if EOS in row:
            end = row.index(EOS)
            assert set(row[end + 1:]) <= {PAD} and not scores[end + 1:].any()


@pytest.mark.parametrize("n, sizes", [(20, [20]), (40, [32, 8]), (100, [50, 50]), (600, [256, 256, 88])])
def test_two_threads_share_what_would_fill_one_batch(model, monkeypatch, n, sizes):
    """At most 256 prompts a batch, and no more than half of them, but 32 or all. Each has its sample, in its place."""
    found = []

    def noted(model, prompts, *args):
        found.append(len(prompts))
        return pad([[int(prompt[2])] for prompt in prompts]), torch.zeros(len(prompts), 1)

    monkeypatch.setattr("model.sample", noted)
    asked = prompts(n)
    samples = sample_in_batches(model, asked, torch.Generator().manual_seed(0))
    assert sorted(found, reverse=True) == sizes
    assert [tokens.tolist() for tokens, _ in samples] == [[prompt[2]] for prompt in asked]


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


def test_what_a_row_draws_is_no_matter_of_other_rows(model):
    """The noise of a row is its own, also after others have ended and left the batch."""
    first, *others = prompts(16)
    together = sample(model, [first, *others], torch.Generator().manual_seed(4))[0]
    lengths = (together != PAD).sum(dim=1)
    assert lengths[0] > lengths.sort().values[4]  # more than a quarter leave the batch before it ends
    for more in (others[::-1], 15 * [others[0]], 15 * [[12] * 20]):
        row = sample(model, [first, *more], torch.Generator().manual_seed(4))[0][0]
        assert row[:lengths[0]].tolist() == together[0, :lengths[0]].tolist()


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
    rows = insert_latents(ids, starts, torch.tensor([[Z_EMPTY]] * 2))  # where z is continuous
    assert model.positions(rows[:, 0]).tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8],
                                                    [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7]]


def records(n):
    """n records of different lengths: as Pairs, and as id lists."""
    rows = [p + [12, 13, 14, 11, 12][:i % 6] + [Y_END, EOS] for i, p in enumerate(prompts(n))]
    ids = pad(rows)
    return Pairs(ids, torch.tensor([len(p) for p in prompts(n)]), torch.zeros(ids.shape)), rows


def test_a_solution_counts_as_decided_after_the_last_token_that_surprises_the_base():
    """By hand: b of three pairs, of which the second is all but certain from the start and the third to its end."""
    pairs, rows = records(6)
    pairs = pairs.rows(torch.tensor([3, 4, 5]))
    (first, second, third), starts = (rows[i] for i in (3, 4, 5)), pairs.starts.tolist()
    for row, b in zip(pairs.b, ([0.7, 0, 0.06, 0.04, 0.05], [0.01] * 6, [0.9, 0, 0, 0, 0, 0, 0.3])):
        start = starts.pop(0)
        row[start:start + len(b)] = torch.tensor(b)
    cut = pairs.decided()
    kept = [[t for t in row if t != PAD] for row in cut.ids.tolist()]
    a, b, _ = pairs.starts.tolist()
    assert kept == [first[:a + 3], second[:b + 1], third] and torch.equal(cut.starts, pairs.starts)
    assert cut.b[0].sum().item() == pytest.approx(0.76) and cut.b[1].sum().item() == pytest.approx(0.01)
    assert torch.equal(pairs.decided(nats=0).rows(torch.tensor([2])).ids, pairs.rows(torch.tensor([2])).ids)


def with_random_latents(model, **latents):
    """The model of `with_latents` with embeddings of '<z> z </z>' that matter."""
    torch.manual_seed(1)
    model = model.with_latents(**latents).requires_grad_(False)
    model.embed.weight[[Z, Z_EMPTY, Z_END]] += torch.randn(3, 16)
    model.embed.weight[VOCAB:] += torch.randn(len(model.embed.weight) - VOCAB, 16)
    return model


def test_scoring_under_all_latents_is_scoring_one_at_a_time(model):
    """token_nll[i, k] from an explicit forward of '<bos> <x> x </x> <z> z_k </z> <y> y'; router logits from the prompt
    alone, which ends in <z>; a choice of latents gives the matching columns; logits are those behind the nll. Dropout
    is that of the record under every z, and of the router alone."""
    model, (pairs, rows) = with_random_latents(model, n_latents=3), records(5)
    keep = (torch.rand(5, len(model.blocks), 2, pairs.ids.shape[1] + 3, 16) > 0.3) / 0.7
    nll, logits, router = score_latents(model, pairs, keep=keep)
    assert torch.allclose(router, score_router(model, pairs, keep), atol=1e-4)
    for i, (record, start) in enumerate(zip(rows, pairs.starts.tolist())):
        prompt = torch.tensor([record[:start - 1] + [Z]])
        assert torch.allclose(model(prompt, keep=keep[[i], :, :, :start])[0, -1], router[i], atol=1e-4)
        for k in range(3):
            row = record[:start - 1] + [Z, VOCAB + k, Z_END] + record[start - 1:]
            explicit = model(torch.tensor([row]), keep=keep[[i], :, :, :len(row)])[0]
            slow = [-explicit[t + 2].log_softmax(dim=0)[record[t]].item() for t in range(start, len(record))]
            assert nll[i, k, start:len(record)].tolist() == pytest.approx(slow, abs=1e-3)
            assert torch.allclose(logits[i, k, start:len(record)], explicit[start + 2:-1], atol=1e-4)
            assert nll[i, k, :start].abs().sum() == nll[i, k, len(record):].abs().sum() == 0
    z = torch.tensor([[2], [0], [1], [2], [0]])
    chosen = score_latents(model, pairs, VOCAB + z, keep)[0][:, 0]
    assert torch.allclose(chosen, nll[torch.arange(5), z[:, 0]], atol=1e-5)


@pytest.mark.parametrize("latents", [{"n_latents": 3}, {"n_latents": 0, "z_dim": 2}])
def test_the_router_is_read_at_z_in_the_place_of_y(model, latents):
    """score_router[i] = what GPT.route says at the end of '<bos> <x> x </x> <z>', whatever follows the prompt, and what
    score_latents says with the generator behind it."""
    model, (pairs, rows) = with_random_latents(model, **latents), records(5)
    if model.config.z_dim:
        torch.nn.init.normal_(model.gaussian_router.weight)
    found = score_router(model, pairs)
    for i, (record, start) in enumerate(zip(rows, pairs.starts.tolist())):
        ids = torch.tensor([record[:start - 1] + [Z]])
        alone = model.route(model.hidden_states(ids)[-1][:, -1])
        assert torch.allclose(found[i], alone[0], atol=1e-4)
        if not model.config.z_dim:
            assert torch.allclose(found[i], model(ids)[0, -1], atol=1e-4)
    assert found.shape == (5, 4 if model.config.z_dim else VOCAB + 3) and found.std(dim=0).min() > 1e-3
    z = torch.randn(5, 2, 2) if model.config.z_dim else None
    assert torch.allclose(score_latents(model, pairs, z)[2], found, atol=1e-4)
    other, t = pairs.ids.clone(), torch.arange(pairs.ids.shape[1])
    other[t >= pairs.starts[:, None]] = 15
    assert torch.equal(score_router(model, pairs._replace(ids=other)), found)
    assert torch.equal(pairs.ids, pad(rows)), "the records themselves stay as they are"


def test_likelihoods_computed_in_chunks_come_back_in_the_order_of_the_pairs(model):
    """70 pairs of many lengths, 16 at a time: the same as in one pass, for tokens and for vectors of each pair."""
    (pairs, _), seen = records(70), []
    assert torch.equal(in_chunks(lambda chunk: seen.append(len(chunk.ids)) or chunk.starts, pairs), pairs.starts)
    assert len(seen) == 5 and max(seen) <= 16
    discrete = with_random_latents(model, n_latents=3)
    one_pass = -score_latents(discrete, pairs)[0].sum(dim=2)
    assert torch.allclose(log_likelihood(discrete, pairs), one_pass, atol=1e-3) and one_pass.std() > 1
    model, z = continuous(), torch.randn(70, 2, 3, generator=torch.Generator().manual_seed(0))
    one_pass = -score_latents(model, pairs, z)[0].sum(dim=2)
    assert torch.allclose(log_likelihood(model, pairs, z), one_pass, atol=1e-3)


def test_a_likelihood_under_many_latents_takes_few_pairs_at_a_time(model, monkeypatch):
    """At most 64 records a chunk, whatever K is: no pool of labels takes the memory of its pairs times K."""
    pairs = as_pairs([p + [12, Y_END, EOS] for p in prompts(20)], map(len, prompts(20)))
    score, sizes = score_latents, []

    def spy(model, chunk, *z):
        sizes.append(len(chunk.ids) * model.config.n_latents)
        return score(model, chunk, *z)

    monkeypatch.setattr("model.score_latents", spy)
    for n_latents in (3, 40, 100):
        sizes.clear()
        log_likelihood(with_random_latents(model, n_latents=n_latents), pairs)
        assert sum(sizes) == 20 * n_latents and max(sizes) <= max(64, n_latents)


def test_every_process_gets_a_chunk(model, monkeypatch):
    """Where there are as many pairs: also of a pool that one chunk would hold."""
    pairs = as_pairs(prompts(12), map(len, prompts(12)))
    for processes, n in ((1, 2), (5, 5), (20, 12)):
        monkeypatch.setattr("harness.parallel.processes", processes)
        chunks = pairs.by_length(2)
        assert len(chunks) == n and sorted(torch.cat(chunks).tolist()) == list(range(12))


def test_new_tokens_leave_the_base_as_it_was(model):
    """Records without '<z> z </z>' have the base's logits; a new token is as unlikely as <z_empty>; a Gaussian router
    begins as N(0, I) for every x. The base's own tensors are not touched."""
    before, ids = {name: p.clone() for name, p in model.state_dict().items()}, pad(prompts(5))
    wide = model.with_latents(3)
    assert wide.config.vocab_size == VOCAB + 3 and wide.config.n_latents == 3
    assert torch.allclose(wide(ids)[..., :-3], model(ids), atol=1e-5)
    assert torch.equal(wide(ids)[..., -3:], wide(ids)[..., [Z_EMPTY] * 3])
    wide = model.with_latents(0, z_dim=2)
    assert torch.allclose(wide(ids), model(ids), atol=1e-5)
    assert not score_router(wide, as_pairs(ids.tolist(), map(len, prompts(5)))).any()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_fresh_factorization_starts_near_the_base(trained):
    """|NLL of y given (x, z_k) - base NLL of y| <= 10% for every k; a section of ordinary embeddings, or one that takes
    positions, would have broken it. Latents are <z_empty> with a tenth of its size as noise; E(z) is as small, for
    z ~ N(0, I), and bends with z."""
    base, _, pairs = trained
    pairs = pairs.rows(slice(256))
    torch.manual_seed(0)
    base_nll = score_base(base, pairs).sum(dim=1).mean()

    def error(model, z=None):
        nll = score_latents(model, pairs, z)[0].detach().sum(dim=2).mean(dim=0)
        assert nll.unique().numel() == len(nll)
        return ((nll - base_nll).abs() / base_nll).max()

    model, V = base.with_latents(4), base.config.vocab_size
    assert error(model) < 0.1
    embed = model.embed.weight.detach()
    noise = embed[V:] - embed[Z_EMPTY]
    assert noise.std() == pytest.approx(0.1 * embed[Z_EMPTY].std().item(), rel=0.3)
    with torch.no_grad():
        model.embed.weight[[Z, Z_END, -4, -3, -2, -1]] = embed[[12, 13, 14, 15, 16, 17]]
    assert error(model) > 0.1
    model = base.with_latents(4)
    model.takes_position = lambda ids: ids != PAD
    assert error(model) > 0.1
    model = base.with_latents(0, z_dim=3).requires_grad_(False)
    assert error(model, torch.cat([torch.zeros(256, 1, 3), torch.randn(256, 2, 3)], dim=1)) < 0.1
    z = torch.randn(1000, 3)
    size = (model.embed_z(z) - model.embed_z(torch.zeros(1, 3))).square().mean().sqrt()
    assert 0.05 < size / model.embed.weight[Z_EMPTY].std() < 0.3
    bend = model.embed_z(z) + model.embed_z(-z) - 2 * model.embed_z(torch.zeros(1, 3))
    assert bend.square().mean().sqrt() > 0.3 * size


def continuous(z_dim=3):
    torch.manual_seed(1)
    model = GPT(GPTConfig(VOCAB, 0, 24, 2, 2, 16, z_dim=z_dim))
    for p in model.parameters():
        p.data.mul_(12)
    model.embed_z[0].weight.data.normal_()
    return model.requires_grad_(False)


def test_z_changes_the_embedding_of_z_empty_and_nothing_else():
    """hidden_states of z against those of a model whose <z_empty> embedding is that of <z_empty> plus E(z)."""
    model, z = continuous(), torch.tensor([[0.5, -1.0, 2.0]])
    ids = torch.tensor([[BOS, X, 11, X_END, Z, Z_EMPTY, Z_END, Y, 12, Y_END]])
    plain, shifted = model.hidden_states(ids), model.hidden_states(ids, z=z)
    changed = (shifted[0] - plain[0]).abs().sum(dim=2)[0] > 0
    assert changed.nonzero().tolist() == [[5]]
    model.embed.weight[Z_EMPTY] += model.embed_z(z[0])
    assert torch.allclose(model.hidden_states(ids)[-1], shifted[-1], atol=1e-5)


def test_sampling_under_a_continuous_z_scores_like_an_uncached_pass():
    """Prompts of different lengths, a z for each, through batches: every z stays with its prompt."""
    model = continuous()
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

"""Every term of the objective against a slow reference, with its sign, its range and its stop-gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, kl_divergence

import losses

B, K, T, V = 6, 4, 5, 7


@pytest.fixture
def random():
    """A function that draws log-probabilities of the given shape, normalised over the last axis, with gradients."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: F.log_softmax(2 * torch.randn(shape, generator=generator), dim=-1).requires_grad_()


def leaf(values):
    return values.detach().clone().requires_grad_()


def test_reconstruction_is_the_expected_negative_log_likelihood(random):
    """R_i = -sum_k q_ik log p_ik, by loops; both the generator and the posterior get a gradient."""
    logp_y, logq = leaf(10 * random(B, K)), random(B, K)
    slow = [-sum(math.exp(logq[i, k].item()) * logp_y[i, k].item() for k in range(K)) for i in range(B)]
    assert losses.reconstruction(logp_y, logq).tolist() == pytest.approx(slow, rel=1e-5)
    losses.reconstruction(logp_y, logq).sum().backward()
    assert torch.allclose(logp_y.grad, -logq.exp()) and logq.grad.abs().sum() > 0


def test_exact_reconstruction_agrees_with_sampling_and_a_broken_sampler_does_not(random):
    """The mean of -log p(y|x,z), z ~ q, lies within 5 standard errors of R; with z ~ uniform it lies outside."""
    logp_y, logq = 10 * random(1, K).detach(), random(1, K).detach()
    exact = losses.reconstruction(logp_y, logq).item()
    generator = torch.Generator().manual_seed(1)
    for probabilities, agrees in ((logq.exp()[0], True), (torch.full((K,), 1 / K), False)):
        z = torch.multinomial(probabilities, 20000, replacement=True, generator=generator)
        values = -logp_y[0, z]
        error = 5 * values.std().item() / math.sqrt(len(values))
        assert (abs(values.mean().item() - exact) < error) == agrees


def test_kl_equals_torch_distributions_and_takes_q_first(random):
    logq, logp = random(B, K), random(B, K)
    theirs = kl_divergence(Categorical(logits=logq), Categorical(logits=logp))
    assert torch.allclose(losses.categorical_kl(logq, logp), theirs)
    assert not torch.allclose(losses.categorical_kl(logq, logp), losses.categorical_kl(logp, logq))
    assert losses.categorical_kl(logq, logq).abs().max() < 1e-6
    losses.categorical_kl(logq, logp).sum().backward()
    assert logq.grad.abs().sum() > 0 and logp.grad.abs().sum() > 0


def test_the_elbo_is_a_bound_that_is_tight_at_the_true_posterior(random):
    """-(R + KL) <= log sum_z p(z|x) p(y|x,z), with equality for q = p(z|x,y)."""
    logp_y, logp_z, logq = 10 * random(B, K), random(B, K), random(B, K)
    evidence = (logp_y + logp_z).logsumexp(dim=1)

    def elbo(logq):
        return -(losses.reconstruction(logp_y, logq) + losses.categorical_kl(logq, logp_z))

    assert (elbo(logq) <= evidence + 1e-5).all() and (elbo(logq) < evidence - 1e-3).any()
    assert torch.allclose(elbo(F.log_softmax(logp_y + logp_z, dim=1)), evidence, atol=1e-4)


def test_token_weights_follow_the_surprise_and_carry_no_gradient():
    b = torch.tensor([[0.0, 2.0, 0.5, 0.0], [0.0, 0.1, 0.1, 0.2]], requires_grad=True)
    w = losses.token_weights(b)
    assert torch.allclose(w, torch.tensor([[0, 0.8, 0.2, 0], [0, 0.25, 0.25, 0.5]])) and not w.requires_grad
    assert losses.token_weights(torch.zeros(1, 3)).isfinite().all()


def test_token_weighted_reconstruction_is_the_double_sum(random):
    """sum_k q_k sum_t w_t l_t(k), by loops; w = 1 gives back R."""
    nll, logq = leaf(-random(B, K, T)), random(B, K)
    w = losses.token_weights(torch.rand(B, T, generator=torch.Generator().manual_seed(2)))
    slow = [sum(logq[i, k].exp().item() * sum(w[i, t].item() * nll[i, k, t].item() for t in range(T)) for k in range(K))
            for i in range(B)]
    got = losses.token_weighted_reconstruction(nll, w, logq)
    assert got.tolist() == pytest.approx(slow, rel=1e-5)
    ones = losses.token_weighted_reconstruction(nll, torch.ones(B, T), logq)
    assert torch.allclose(ones, losses.reconstruction(-nll.sum(dim=2), logq))
    got.sum().backward()
    assert torch.allclose(nll.grad, logq.exp()[..., None] * w[:, None]) and logq.grad.abs().sum() > 0


def test_posterior_entropy_lies_between_zero_and_log_k(random):
    logq = random(B, K)
    assert torch.allclose(losses.posterior_entropy(logq), Categorical(logits=logq).entropy())
    assert losses.posterior_entropy(torch.full((1, K), -math.log(K))).item() == pytest.approx(math.log(K))
    step = leaf(logq)
    losses.posterior_entropy(F.log_softmax(step, dim=1)).sum().backward()  # going down the gradient commits
    after = losses.posterior_entropy(F.log_softmax(step - 0.1 * step.grad, dim=1))
    assert (after <= losses.posterior_entropy(logq)).all()


def test_router_support_is_minus_the_log_mass_on_the_latents():
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(3))
    slow = -logits.softmax(dim=1)[:, -3:].sum(dim=1).log()
    assert torch.allclose(losses.router_support(logits, 3), slow) and (slow > 0).all()
    assert losses.router_support(logits + torch.tensor([0.0] * 4 + [50.0] * 3), 3).abs().max() < 1e-5


class Marginal:
    """A term whose batch mean is the KL of the mixture of routers. raw (N, 2, 4): what two numbers of each of K = 4
    latents, or of D = 4 dimensions, the routers say."""

    def __init__(self, kind):
        self.kind = kind
        self.prior = torch.tensor([0.4, 0.3, 0.2, 0.1]).double() if kind == "categorical" else None

    def of(self, raw):
        """What a term needs to know about all N routers: log m (4,), or m and v (4,)."""
        if self.kind == "categorical":
            return [raw[:, 0].softmax(dim=1).mean(dim=0).log()]
        mean, variance = raw[:, 0], raw[:, 1].exp()
        m = mean.mean(dim=0)
        return [m, variance.mean(dim=0) + (mean - m).square().mean(dim=0)]  # the law of total variance

    def term(self, raw, marginal):
        """The term of every router, given the marginal: (N, 2, 4) -> (N,)."""
        marginal = [part.expand(len(raw), -1) for part in marginal]
        if self.kind == "categorical":
            return losses.router_marginal_kl(raw[:, 0].log_softmax(dim=1), *marginal, self.prior.log())
        return losses.router_moment_kl(raw[:, 0], raw[:, 1], *marginal)

    def full(self, raw):
        """The KL itself, by torch.distributions, through the marginal."""
        if self.kind == "categorical":
            return kl_divergence(Categorical(logits=self.of(raw)[0]), Categorical(self.prior))
        m, v = self.of(raw)
        return kl_divergence(Normal(m, v.sqrt()), Normal(torch.zeros_like(m), torch.ones_like(m))).sum()


@pytest.fixture(params=["categorical", "Gaussian"])
def marginal(request):
    return Marginal(request.param)


@pytest.fixture
def raw():
    return torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(4)).double().requires_grad_()


def gradient(value, raw):
    return torch.autograd.grad(value, raw)[0]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_mean_of_a_marginal_term_is_the_kl_of_the_mixture(marginal, raw):
    """mean_x sum_z p(z|x) (log m(z) - log prior(z)) = KL(m || prior), and so for the Gaussian of the same moments."""
    assert marginal.term(raw, marginal.of(raw)).shape == (8,)
    assert marginal.term(raw, marginal.of(raw)).mean().item() == pytest.approx(marginal.full(raw).item(), rel=1e-6)
    wrong = marginal.of(raw[:4])
    assert marginal.term(raw, wrong).mean().item() != pytest.approx(marginal.full(raw).item(), rel=1e-2)


def test_a_marginal_that_is_kept_constant_leaves_the_gradient_exact(marginal, raw):
    """The gradient of the mean over x, m a constant, is that of KL(m || prior) through m, since sum_z m d log m =
    d sum_z m = 0: relative difference 1e-6. Nothing flows into m as it is passed in."""
    want = gradient(marginal.full(raw), raw)
    assert want.norm() > 1e-2
    given = [part.detach().requires_grad_() for part in marginal.of(raw)]
    got, *into_given = torch.autograd.grad(marginal.term(raw, given).mean(), [raw, *given], allow_unused=True)
    assert distance(got, want) < 1e-6 and all(g is None for g in into_given)


def test_the_gradient_of_a_marginal_term_adds_up_over_chunks_only_with_the_marginal_of_all(marginal, raw):
    """Chunks of 3 and 5, each divided by 8: with each chunk's own marginal, or that of another batch, the gradient is
    wrong by more than a twentieth."""
    want, chunks = gradient(marginal.full(raw), raw), (slice(0, 3), slice(3, 8))

    def chunked(marginal_of):
        return gradient(sum(marginal.term(raw[rows], marginal_of(rows)).sum() / 8 for rows in chunks), raw)

    assert distance(chunked(lambda rows: marginal.of(raw)), want) < 1e-6
    other = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(5)).double()
    for wrong in (lambda rows: marginal.of(raw[rows]), lambda rows: marginal.of(other)):
        assert distance(chunked(wrong), want) > 0.05


def test_a_marginal_term_asks_for_balance_over_the_batch_and_not_within_it(marginal):
    """Sure routers that take turns have the mixture that is asked for, and cost next to nothing; the same sure router
    for every x costs the KL of one latent, or of a narrow Gaussian."""
    if marginal.kind == "categorical":  # 40% for the first latent, and so on
        turns = torch.zeros(10, 2, 4).double()
        turns[torch.arange(10), 0, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])] = 50.0
        one = -math.log(0.4)
    else:  # means with the quantiles of N(0, 1)
        quantiles = Normal(0.0, 1.0).icdf((torch.arange(1000) + 0.5) / 1000).double()
        turns = torch.stack([quantiles, torch.full_like(quantiles, -10)], dim=1)[..., None].expand(-1, -1, 4)
        one = 4 * 0.5 * (math.exp(-10) + quantiles[0].item() ** 2 - 1 + 10)
    assert abs(marginal.term(turns, marginal.of(turns)).mean()) < 0.02
    same = turns[:1].expand_as(turns)
    assert marginal.term(same, marginal.of(same)).mean().item() == pytest.approx(one, rel=1e-6)


def test_jsd_is_zero_for_equal_and_log_k_for_disjoint_latents(random):
    """JSD_t = H(mixture) - mean H, by loops, weighted by w_t."""
    logp, w = random(B, K, T, V), losses.token_weights(torch.rand(B, T, generator=torch.Generator().manual_seed(5)))
    p = logp.detach().exp()
    slow = [sum(w[i, t].item() * (Categorical(p[i, :, t].mean(dim=0)).entropy()
                                  - Categorical(p[i, :, t]).entropy().mean()).item() for t in range(T))
            for i in range(B)]
    assert losses.inter_latent_jsd(logp, w).tolist() == pytest.approx(slow, rel=1e-4)
    assert losses.inter_latent_jsd(logp[:, :1].expand(B, K, T, V), w).abs().max() < 1e-6
    disjoint = F.log_softmax(80 * torch.eye(K)[:, None].expand(K, T, K), dim=-1)[None]
    assert losses.inter_latent_jsd(disjoint, w[:1]).item() == pytest.approx(math.log(K), rel=1e-4)


@pytest.mark.parametrize("share", [[0.25] * 4, [0.6, 0.2, 0.1, 0.1]])
def test_responsibilities_have_the_shares_as_column_means_and_rows_that_sum_to_one(share):
    scores = (3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(6))).requires_grad_()
    log_r = losses.balanced_responsibilities(scores, torch.tensor(share).log(), iterations=300)
    assert not log_r.requires_grad
    assert torch.allclose(log_r.exp().sum(dim=1), torch.ones(40))
    assert torch.allclose(log_r.exp().mean(dim=0), torch.tensor(share), atol=1e-3)


def test_responsibilities_are_scaled_rows_and_columns_of_the_scores():
    """Sinkhorn's solution is r_ik = exp(score_ik) u_i v_k: scores minus log r have rank one structure, so every 2 x 2
    minor of exp(scores) / r is 0. Balanced scores come back unchanged, and scores of 500 stay finite."""
    scores = torch.randn(10, K, generator=torch.Generator().manual_seed(8))
    log_share = torch.full((K,), -math.log(K))
    rest = scores - losses.balanced_responsibilities(scores, log_share)
    assert torch.allclose(rest - rest[:1], (rest - rest[:1])[:, :1].expand_as(rest), atol=1e-4)
    balanced = torch.eye(K).mul(3).log_softmax(dim=1)
    assert torch.allclose(losses.balanced_responsibilities(balanced, log_share), balanced, atol=1e-5)
    assert losses.balanced_responsibilities(500 * scores, log_share).isfinite().all()


def test_distillation_moves_the_student_and_not_the_labels(random):
    """-sum r log q is H(r) at q = r and more elsewhere."""
    log_r, logq = random(B, K), random(B, K)
    losses.distillation(log_r, logq).sum().backward()
    assert log_r.grad is None and torch.allclose(logq.grad, -log_r.exp())
    assert torch.allclose(losses.distillation(log_r, log_r), Categorical(logits=log_r).entropy())
    assert (losses.distillation(log_r, logq) > losses.distillation(log_r, log_r)).all()


def gaussians(n=2, D=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=generator).requires_grad_() for _ in range(2 * n)]


def test_gaussian_kl_equals_torch_distributions_and_takes_q_first():
    mean_q, log_var_q, mean_p, log_var_p = gaussians()
    q, p = Normal(mean_q, (0.5 * log_var_q).exp()), Normal(mean_p, (0.5 * log_var_p).exp())
    got = losses.gaussian_kl(mean_q, log_var_q, mean_p, log_var_p)
    assert torch.allclose(got, kl_divergence(q, p).sum(dim=1), atol=1e-5)
    assert not torch.allclose(got, kl_divergence(p, q).sum(dim=1), atol=1e-2)
    got.sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (mean_q, log_var_q, mean_p, log_var_p))


def test_the_moments_of_the_router_are_those_of_its_mixture():
    """Against the mean and variance of many samples, z ~ N(mu(x), sigma(x)), x drawn from the batch."""
    mean, log_var = gaussians(1)
    generator = torch.Generator().manual_seed(1)
    z = mean + (0.5 * log_var).exp() * torch.randn(200_000, *mean.shape, generator=generator)
    z = z.flatten(0, 1).detach()
    m, v = z.mean(dim=0), z.var(dim=0)
    slow = kl_divergence(Normal(m, v.sqrt()), Normal(0.0, 1.0)).sum()
    assert losses.router_moment_kl(mean, log_var, m, v).mean().item() == pytest.approx(slow.item(), abs=0.01)


def test_a_reparameterised_gradient_is_that_of_finite_differences():
    """d/d(mean, log variance) of the reconstruction of a fixed noise, through a nonlinear decoder."""
    mean, log_var = (t.double().detach().requires_grad_() for t in gaussians(1))
    noise = torch.randn(B, 2, 3, generator=torch.Generator().manual_seed(2)).double()

    def reconstruction(mean, log_var):
        z = mean[:, None] + (0.5 * log_var).exp()[:, None] * noise
        logp_y = -(z.sin() * z).sum(dim=2)
        return losses.reconstruction(logp_y, torch.full((B, 2), -math.log(2)).double())

    assert torch.autograd.gradcheck(reconstruction, (mean, log_var))


def test_elbo_importance_bound_and_evidence_are_in_order():
    """z ~ N(0, 1), y ~ N(z, 1): log p(y) = log N(y; 0, 2) is known. A posterior that is too wide gives an ELBO below
    the importance-weighted bound, which approaches the evidence; a bound with inverted weights does not."""
    y, generator = torch.linspace(-2, 2, 50)[:, None], torch.Generator().manual_seed(0)
    q, p = Normal(y / 2, 1.0), Normal(0.0, 1.0)
    z = y / 2 + torch.randn(50, 4000, generator=generator)
    logp_y, log_weight = Normal(z, 1.0).log_prob(y), p.log_prob(z) - q.log_prob(z)
    evidence = Normal(0.0, math.sqrt(2)).log_prob(y)[:, 0]
    kl = losses.gaussian_kl(y / 2, torch.zeros(50, 1), torch.zeros(50, 1), torch.zeros(50, 1))
    elbo = -losses.reconstruction(logp_y, torch.full(z.shape, -math.log(4000))) - kl
    few = losses.importance_weighted_bound(logp_y[:, :4], log_weight[:, :4]).mean()
    many = losses.importance_weighted_bound(logp_y, log_weight).mean()
    assert elbo.mean() < few < many and many.item() == pytest.approx(evidence.mean().item(), abs=0.01)
    assert abs(losses.importance_weighted_bound(logp_y, -log_weight).mean() - evidence.mean()) > 0.1


def test_posterior_variance_is_the_mean_over_dimensions():
    assert losses.posterior_variance(torch.tensor([[0.0, math.log(3)]])).tolist() == pytest.approx([2])

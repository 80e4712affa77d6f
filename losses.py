"""Every term of the objective, one pure function each: tensors in, one value per pair (x, y) out.

    J = R + beta KL + sum_i lambda_i L_i      minimised, in nats, assembled in factorize.py

Notation (dimensions: see model.py). logp_y (B, K) is log p_psi(y|x,z) for every latent z, summed
over the tokens of y; token_nll (B, K, T) is its negative, token by token; logq (B, K) is the
posterior log q_xi(z|x,y); logp_z (B, K) is the router log p_phi(z|x); w (B, T) are token weights;
log_r (B, K) are responsibilities, labels that no gradient flows through. A KL(q || p) takes q
first. A continuous z has n samples in the place of the K latents.
[1] Kingma & Welling 2014, arXiv 1312.6114      [2] Asano et al. 2020, arXiv 1911.05371
[3] Cuturi 2013, arXiv 1306.0895                [4] Burda et al. 2016, arXiv 1509.00519
[5] Hinton et al. 2015, arXiv 1503.02531
"""
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------- both kinds of z
def reconstruction(logp_y, logq):
    """R = -sum_z q(z|x,y) log p(y|x,z) [1, eq. 3], exact: (B, K), (B, K) -> (B,). Gradients reach
    both arguments. With n samples of a continuous z and logq = -log n it is their mean, an estimate
    without bias; so it is with one draw and logq = 0."""
    return -(logq.exp() * logp_y).sum(dim=1)


def token_weights(b):
    """w_t = b_t / sum_s b_s, large where the frozen base is uncertain, which is where strategies
    part. b (B, T): -log p_theta(y_t|x,y_<t), 0 outside y -> (B, T), rows sum to 1. Detached: the
    base's surprise is a constant."""
    b = b.detach()
    return b / b.sum(dim=1, keepdim=True).clamp(min=1e-8)


def token_weighted_reconstruction(token_nll, w, logq):
    """sum_z q(z|x,y) sum_t w_t l_t(z), where l_t(z) = -log p(y_t|x,z,y_<t):
    (B, K, T), (B, T), (B, K) -> (B,). Gradients reach token_nll and logq."""
    return reconstruction(-(token_nll * w[:, None]).sum(dim=2), logq)


# ------------------------------------------------------------- a discrete z
def categorical_kl(logq, logp):
    """KL(q || p) = sum_z q (log q - log p), closed form: (B, K), (B, K) -> (B,)."""
    return (logq.exp() * (logq - logp)).sum(dim=1)


def posterior_entropy(logq):
    """H(q) = -sum_z q log q, between 0 and log K: (B, K) -> (B,). Minimised, it makes assignments
    commit."""
    return -(logq.exp() * logq).sum(dim=1)


def router_support(logits, n_latents):
    """-log of the full-vocabulary softmax mass on the latent tokens, the last n_latents ids:
    (B, V) -> (B,)."""
    return logits.logsumexp(dim=1) - logits[:, -n_latents:].logsumexp(dim=1)


def router_marginal_kl(logp_z, log_marginal, log_prior):
    """KL(m || prior) of m = mean_x p(z|x), written as the mean over x of
    sum_z p(z|x) (log m(z) - log prior(z)): (B, K) three times -> (B,), the last two rows repeated.

    log_marginal is log m, computed before over the whole batch, and detached. Value and gradient
    are exact all the same: what is missing, sum_z m d log m = d sum_z m, is 0. As an estimate over
    all x it is biased upwards where routers differ, by about (K - 1) / 2B at most.
    """
    return (logp_z.exp() * (log_marginal.detach() - log_prior)).sum(dim=1)


def inter_latent_jsd(logp_tokens, w):
    """sum_t w_t JSD_t, where JSD_t = H(mean_z p_t(.|z)) - mean_z H(p_t(.|z)) over the K next-token
    distributions, teacher-forced: (B, K, T, V), (B, T) -> (B,), between 0 and log K. Maximised: the
    objective takes it with a minus sign."""
    K = logp_tokens.shape[1]
    log_mixture = logp_tokens.logsumexp(dim=1) - math.log(K)  # (B, T, V)
    entropy_of_mixture = -(log_mixture.exp() * log_mixture).sum(dim=-1)  # (B, T)
    mean_entropy = -(logp_tokens.exp() * logp_tokens).sum(dim=-1).mean(dim=1)
    return (w * (entropy_of_mixture - mean_entropy)).sum(dim=1)


def distillation(log_r, logq):
    """Cross-entropy -sum_z r log q with labels r = exp(log_r) [5]: (B, K), (B, K) -> (B,). Labels
    are detached."""
    return -(log_r.detach().exp() * logq).sum(dim=1)


@torch.no_grad()
def balanced_responsibilities(scores, log_share, iterations=30):
    """r = Sinkhorn(scores): rows sum to 1, their mean goes to the shares, so that no latent dies or
    takes all. In the limit, r is the closest of all such couplings to softmax(scores) in
    KL [2, 3]. After few iterations, rows whose scores differ by much have not moved: a pair that is
    sure of its latent keeps it.

    scores (B, K), for example log p(y|x,z) / tau; log_share (K,). Returns log r (B, K), without
    gradient: a gradient through the balancing would let the model lower its loss by moving the
    labels.
    """
    shift = torch.zeros_like(log_share)  # log potential of a latent
    for _ in range(iterations):
        mean = F.log_softmax(scores + shift, dim=1).logsumexp(dim=0) - math.log(len(scores))
        shift = shift + log_share - mean
    return F.log_softmax(scores + shift, dim=1)


# ------------------------------------------------------------- a continuous z
def gaussian_kl(mean_q, log_var_q, mean_p, log_var_p):
    """KL(q || p) of diagonal Gaussians, closed form, summed over dimensions:
    (B, D) four times -> (B,)."""
    ratio = (log_var_q - log_var_p).exp() + (mean_q - mean_p).square() / log_var_p.exp()
    return 0.5 * (ratio - 1 + log_var_p - log_var_q).sum(dim=1)


def posterior_variance(log_var):
    """Mean of the posterior's variances over dimensions: (B, D) -> (B,)."""
    return log_var.exp().mean(dim=1)


def router_moment_kl(mean, log_var, m, v):
    """KL(N(m, v) || N(0, I)) of the one Gaussian with the moments of the batch's mixture of
    routers, m = mean_x mu and v = mean_x(sigma^2 + mu^2) - m^2, summed over dimensions. Written as
    the mean over x of E_{p(z|x)}[log N(z; m, v) - log N(z; 0, I)]: (B, D) four times -> (B,).

    m and v are computed before over the whole batch, and detached. Value and gradient are exact all
    the same, as in router_marginal_kl: the expectations of log N depend on the two moments alone.
    """
    m, v, var = m.detach(), v.detach(), log_var.exp()
    log_marginal = -0.5 * (v.log() + (var + (mean - m).square()) / v)
    log_prior = -0.5 * (var + mean.square())
    return (log_marginal - log_prior).sum(dim=1)


def importance_weighted_bound(logp_y, log_weight):
    """log 1/n sum_s w_s p(y|x,z_s) <= log p(y|x) in expectation [4, eq. 8]: (B, n), (B, n) -> (B,).
    log w_s is the router's log density at z_s minus that of the distribution z_s was drawn from; if
    fixed numbers of z were drawn from several, minus that of their mixture."""
    return (logp_y + log_weight).logsumexp(dim=1) - math.log(logp_y.shape[1])

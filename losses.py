"""Every term of the objective, one pure function each: tensors in, tensor out, one value per example where it can be.

    J = R + beta KL + sum_i lambda_i L_i            (minimised; all in nats; assembled in factorize.py)

Notation: K latents; logp_y (B, K) is log p_psi(y|x,z) for every latent z, summed over the tokens of y; token_nll
(B, K, T) its negative, token by token; logq (B, K) the posterior log q_xi(z|x,y); logp_z (B, K) the router
log p_phi(z|x); w (B, T) token weights. kl(q, p) takes its arguments in this order.
[1] Kingma & Welling 2014, arXiv 1312.6114   [2] Asano et al. 2020, arXiv 1911.05371   [3] Cuturi 2013, arXiv 1306.0895
[4] Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519
"""
import math

import torch
import torch.nn.functional as F


def reconstruction(logp_y, logq):
    """R = -sum_z q(z|x,y) log p(y|x,z) [1, eq. 3], exact: (B, K), (B, K) -> (B,). Gradients reach both arguments. With
    S samples of a continuous z and logq = -log S it is their mean: an estimate without bias."""
    return expected(-logp_y, logq)


def categorical_kl(logq, logp):
    """KL(q || p) = sum_z q (log q - log p), closed form: (B, K), (B, K) -> (B,)."""
    return (logq.exp() * (logq - logp)).sum(dim=1)


def token_weights(b):
    """w_t = b_t / sum_s b_s: large where the frozen base is uncertain, which is where strategies part.

    b (B, T): -log p_theta(y_t|x,y_<t), 0 outside y. Detached: the base's surprise is a constant. Rows sum to 1.
    """
    b = b.detach()
    return b / b.sum(dim=1, keepdim=True).clamp(min=1e-8)


def token_weighted_nll(token_nll, w):
    """sum_t w_t l_t(z), l_t(z) = -log p(y_t|x,z,y_<t): (B, K, T), (B, T) -> (B, K). expected() takes it under q, which
    is the token-weighted reconstruction."""
    return (token_nll * w[:, None]).sum(dim=2)


def expected(values, logq):
    """sum_z q(z|x,y) values(z), exact: (B, K), (B, K) -> (B,). Gradients reach both arguments."""
    return (logq.exp() * values).sum(dim=1)


def posterior_entropy(logq):
    """H(q) = -sum_z q log q: (B, K) -> (B,). Minimised, it makes assignments commit; 0 <= H <= log K."""
    return -(logq.exp() * logq).sum(dim=1)


def router_support(logits, n_latents):
    """-log of the full-vocabulary softmax mass on the latent tokens, the last n_latents ids: (B, V) -> (B,)."""
    return logits.logsumexp(dim=1) - logits[:, -n_latents:].logsumexp(dim=1)


def router_marginal_kl(logp_z, log_prior):
    """KL(mean_x p(z|x) || prior): (B, K), (K,) -> scalar. A statement about the batch, so it has no per-example value;
    the batch mean makes it biased upwards where routers differ between inputs, by about (K - 1) / 2B at most."""
    log_marginal = logp_z.logsumexp(dim=0) - math.log(len(logp_z))
    return (log_marginal.exp() * (log_marginal - log_prior)).sum()


def inter_latent_jsd(logp_tokens, w):
    """sum_t w_t JSD_t, where JSD_t = H(mean_z p_t(.|z)) - mean_z H(p_t(.|z)) over the K next-token distributions.

    logp_tokens (B, K, T, V) log-probabilities, teacher-forced; w (B, T). Returns (B,), between 0 and log K. Maximised:
    the objective takes it with a minus sign.
    """
    log_mixture = logp_tokens.logsumexp(dim=1) - math.log(logp_tokens.shape[1])  # (B, T, V)
    entropy_of_mixture = -(log_mixture.exp() * log_mixture).sum(dim=-1)  # (B, T)
    mean_entropy = -(logp_tokens.exp() * logp_tokens).sum(dim=-1).mean(dim=1)
    return (w * (entropy_of_mixture - mean_entropy)).sum(dim=1)


@torch.no_grad()
def balanced_responsibilities(scores, log_prior, group=None, log_weight=None, iterations=30):
    """T = Sinkhorn(scores): rows sum to 1, and the weighted mean of the rows of each group goes to the prior, so that
    no latent dies and none takes all; in the limit, T is the closest of all such couplings to softmax(scores) in KL
    [2, 3]. After a few iterations rows whose scores differ by much have not moved, which is as well: they are sure.

    scores (B, K), for example log p(y|x,z) / tau; log_prior (K,); group (B,) of integers from 0 and log_weight (B,);
    by default one group, the batch, of equal weights. Weights sum to 1 in every group, or to less: what is missing
    counts as one more row, of score 0, such as the responses to an x that were not sampled. Returns log T (B, K),
    without gradient: T is a target, and following it through its own constraints would reward gaming them.
    """
    if group is None:
        group = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        log_weight = torch.full((len(scores),), -math.log(len(scores)), device=scores.device)
    shift = torch.zeros(int(group.max()) + 1, scores.shape[1], device=scores.device)  # log potential of (group, latent)
    missing = 1 - torch.zeros(len(shift), device=scores.device).index_add(0, group, log_weight.exp())
    log_missing = torch.where(missing > 1e-5, missing, 0).log()[:, None]
    for _ in range(iterations):
        log_t = F.log_softmax(scores + shift[group], dim=1)
        mass = grouped_logsumexp(log_t + log_weight[:, None], group, len(shift))
        shift += log_prior - torch.logaddexp(mass, F.log_softmax(shift, dim=1) + log_missing)
    return F.log_softmax(scores + shift[group], dim=1)


def grouped_logsumexp(values, group, n_groups):
    """log sum of exp(values) over the rows of each group: (B, K), (B,) -> (n_groups, K)."""
    top = torch.full((n_groups, values.shape[1]), -torch.inf, device=values.device)
    top = top.scatter_reduce(0, group[:, None].expand_as(values), values, "amax")
    return top + torch.zeros_like(top).index_add(0, group, (values - top[group]).exp()).log()


def distillation(target, logq):
    """Cross-entropy -sum_z T log q from fixed targets T = exp(target): (B, K), (B, K) -> (B,)."""
    return -(target.detach().exp() * logq).sum(dim=1)


def gaussian_kl(mean_q, log_var_q, mean_p, log_var_p):
    """KL(q || p) of diagonal Gaussians, closed form, summed over dimensions: (B, D) four times -> (B,)."""
    ratio = (log_var_q - log_var_p).exp() + (mean_q - mean_p).square() / log_var_p.exp()
    return 0.5 * (ratio - 1 + log_var_p - log_var_q).sum(dim=1)


def posterior_variance(log_var):
    """Mean of the posterior's variances over dimensions: (B, D) -> (B,)."""
    return log_var.exp().mean(dim=1)


def router_moment_kl(mean, log_var):
    """KL(N(m, v) || N(0, I)) of the one Gaussian that has the moments of the batch's mixture of routers, m = mean mu
    and v = mean(sigma^2 + mu^2) - m^2, summed over dimensions: (B, D) twice -> scalar. A statement about the batch."""
    m = mean.mean(dim=0)
    v = (log_var.exp() + mean.square()).mean(dim=0) - m.square()
    return 0.5 * (v + m.square() - 1 - v.log()).sum()


def importance_weighted_bound(logp_y, log_weight):
    """log 1/S sum_s w_s p(y|x,z_s) <= log p(y|x) in expectation [4, eq. 8]: logp_y (B, S) and log w_s (B, S), the
    density of the router at z_s over that of the distribution z_s was drawn from; if the z_s are fixed numbers of draws
    from several, over that of their mixture. (B, S), (B, S) -> (B,)."""
    return (logp_y + log_weight).logsumexp(dim=1) - math.log(logp_y.shape[1])

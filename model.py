"""A GPT for short symbolic records, and batched sampling from it with a KV cache.

    python train_base.py configs/sorting_base.py     # the first user of this file

Pre-norm transformer (Radford et al. 2019 [1]) with RMSNorm [2], also of queries and keys [4], and rotary positions [3].
Dimensions, here and in every other file:
    B batch   T positions   C width   V vocabulary   nh heads   hs head size   L layers
    K latents   D latent size   n latents, or samples of z, that a record is scored under   S strategies
[1] Language Models are Unsupervised Multitask Learners  [2] arXiv 1910.07467  [3] RoFormer, arXiv 2104.09864
[4] Query-Key Normalization, arXiv 2010.04245  [5] Srivastava et al. 2014, JMLR 15

One record, as the base reads it, and as the generator does. The latent section takes no position of its own, so that y
keeps the positions at which the base learned to read it. The router is what the model says after <z>.

    token      <bos> <x>  4  2  7 </x>                <y>  2  4  7  ;  ans ... </y> <eos>
    position     0    1   2  3  4   5                  6   7  8  9 10   11

    token      <bos> <x>  4  2  7 </x> <z> <z3> </z>  <y>  2  4  7  ;  ans ... </y> <eos>
    position     0    1   2  3  4   5   5    5    5    6   7  8  9 10   11

A continuous z has <z_empty> in the place of <z3>, and E(z), a vector of width C, is added to its embedding.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from harness import parallel
from harness.parallel import map_chunks, seeded
from tasks import EOS, PAD, X_END, Z, Z_EMPTY, Z_END


@dataclass
class GPTConfig:
    vocab_size: int
    n_latents: int = 0  # the last n_latents ids of the vocabulary are <z1> ... <zK>
    block_size: int = 160  # longest canonical record, in tokens
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    z_dim: int = 0  # size D of a continuous latent, which enters at <z_empty>


EPS = 1e-5  # under the root of RMSNorm


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def rotate(x, cos, sin):
    """Rotary embedding: turns each pair (x1, x2) of a head by an angle proportional to its position."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, C = x.shape
        # (B, nh, T, hs) each
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        assert mask is not None or k.shape[2] == T, f"{T} queries of {k.shape[2]} keys need a mask"
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, keep=(1, 1)):
        """keep: two factors (B, T, C), of what attention and of what MLP adds, 0 or 1 / (1 - p): dropout [5]."""
        x = x + keep[0] * self.attention(norm(x), cos, sin, mask, cache)
        return x + keep[1] * self.down(F.gelu(self.up(norm(x))))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.z_dim:
            # E(z): one linear map would leave it to the blocks to tell apart what z means on two sides of a border
            self.embed_z = nn.Sequential(nn.Linear(config.z_dim, 4 * config.n_embd), nn.GELU(),
                                         nn.Linear(4 * config.n_embd, config.n_embd, bias=False))
            self.gaussian_router = nn.Linear(config.n_embd, 2 * config.z_dim)
        hs = config.n_embd // config.n_head
        angles = torch.arange(config.block_size)[:, None] * 10000.0 ** (-torch.arange(0, hs, 2) / hs)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, hs / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            # residual branches start small, so that depth does not grow the stream's variance (nanoGPT)
            residual = name.endswith(("proj.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.z_dim:  # N(0, I) for every x
            nn.init.zeros_(self.gaussian_router.weight)
            nn.init.zeros_(self.gaussian_router.bias)

    def takes_position(self, ids):
        """False for padding and for the latent section '<z> z </z>', which repeat the position before them."""
        first_latent = self.config.vocab_size - self.config.n_latents
        latent = (ids == Z) | (ids == Z_END) | (ids == Z_EMPTY) | (ids >= first_latent)
        return ~(latent | (ids == PAD))

    def positions(self, ids):
        """(B, T) ids -> (B, T) positions, from 0."""
        return (self.takes_position(ids).cumsum(dim=1) - 1).clamp(min=0)

    def hidden_states(self, ids, positions=None, mask=None, caches=None, z=None, keep=None):
        """(B, T) ids -> list of L + 1 tensors (B, T, C): the embedding, to which E(z) is added at <z_empty> where z
        (B, D) is given, and the stream after every block; keep: (B, L, 2, T, C), see Block."""
        positions = self.positions(ids) if positions is None else positions
        last = int(positions.max())
        assert last < self.config.block_size, f"{last + 1} positions exceed block_size {self.config.block_size}"
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, hs / 2)
        states = [self.embed(ids)]
        if z is not None:
            states[0] = states[0] + (ids == Z_EMPTY)[..., None] * self.embed_z(z)[:, None]
        bfloat16 = parallel.bfloat16 and not caches  # samples are of float32
        caches = caches or len(self.blocks) * [None]
        keep = len(self.blocks) * [(1, 1)] if keep is None else [of_block.unbind(1) for of_block in keep.unbind(1)]
        with torch.autocast(parallel.kind, torch.bfloat16, enabled=bfloat16):
            for block, cache, kept in zip(self.blocks, caches, keep):
                states.append(block(states[-1], cos, sin, mask, cache, kept))
        return states

    def logits(self, hidden):
        """Last stream (..., C) -> next-token logits (..., V)."""
        return self.head(norm(hidden))

    def route(self, hidden):
        """Last stream at <z> (B, C) -> what the router says: next-token logits (B, V), of which the last K name the
        latents, or, where latents are continuous, the (B, 2 D) that gaussian() takes."""
        return self.gaussian_router(norm(hidden)) if self.config.z_dim else self.logits(hidden)

    def forward(self, ids, **kwargs):
        """(B, T) ids, padded on the right -> (B, T, V) next-token logits."""
        return self.logits(self.hidden_states(ids, **kwargs)[-1])

    def with_latents(self, n_latents, z_dim=0):
        """A copy of this model whose vocabulary ends in n_latents new tokens, or which takes a vector z of size z_dim
        at <z_empty>. '<z> z </z>', which it never saw, starts as a small </x>, and z as a little noise on top."""
        config = replace(self.config, vocab_size=self.config.vocab_size + n_latents, n_latents=n_latents, z_dim=z_dim)
        model, state = GPT(config), self.state_dict()
        slot = 0.2 * state["embed.weight"][X_END]  # small embeddings turn faster
        noise = 0.1 * slot.std().item()
        embed = torch.cat((state["embed.weight"], slot + noise * torch.randn(n_latents, config.n_embd)))
        embed[[Z, Z_EMPTY, Z_END]] = slot
        # as outputs, the new tokens are as unlikely as <z_empty>, which the base never saw
        head = torch.cat((state["head.weight"], state["head.weight"][Z_EMPTY].expand(n_latents, -1)))
        model.load_state_dict({**model.state_dict(), **state, "embed.weight": embed, "head.weight": head})
        if z_dim:
            hidden, _, out = model.embed_z
            nn.init.normal_(hidden.weight)  # z is N(0, I): hidden units bend all over its space
            nn.init.normal_(hidden.bias)
            nn.init.normal_(out.weight, std=noise / math.sqrt(out.in_features))
        return model


def gaussian(raw):
    """(..., 2 D) -> mean and log variance, (..., D) each; a standard deviation is between 1/12 and 12."""
    mean, raw = raw.chunk(2, dim=-1)
    return mean, 5 * torch.tanh(raw / 5)


class KVCache:
    """Keys and values of one layer, written in place: (B, nh, room, hs) each, of the type and device of `weight`."""

    def __init__(self, weight, *shape):
        self.k, self.v, self.length = weight.new_empty(shape), weight.new_empty(shape), 0

    def append(self, k, v):
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def keep(self, rows):
        self.k, self.v = self.k[rows], self.v[rows]


@torch.no_grad()
def sample(model, prompts, generator, temperature=1.0, z=None):
    """Continues every prompt until <eos> or the context is full.

    prompts: list of B id lists, of different lengths; generator: torch.Generator that all randomness comes from;
    temperature: 0 takes the likeliest token; z: (B, D), one for every prompt with <z_empty>. Returns (tokens, logp),
    both (B, N) on the model's device: sampled ids, <pad> after <eos>, and each one's log-probability under the model at
    temperature 1 (nats, 0 at <pad>). Prompts are padded on the left, so that all rows write the same cache column.
    """
    device, config = model.embed.weight.device, model.config
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=device)
    positions = model.positions(ids)
    rooms = config.block_size - 1 - positions[:, -1]  # how many tokens each prompt can be continued by
    assert rooms.min() > 0, f"prompt of {longest} tokens leaves no room in block_size {config.block_size}"
    room = int(rooms.max())
    tokens = torch.full((len(prompts), room), PAD, device=device)
    logps = model.embed.weight.new_zeros(len(prompts), room)
    shape = len(prompts), config.n_head, longest + room, config.n_embd // config.n_head
    caches = [KVCache(model.embed.weight, *shape) for _ in model.blocks]
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the shrinking batch belongs to
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)  # rows that have not sampled <eos> yet
    real = ids != PAD  # (B, columns): the keys that may be attended to
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    # a padded query has no key of its own to look at; letting it see itself avoids a softmax over nothing
    mask = (causal & real[:, None]) | torch.eye(longest, dtype=torch.bool, device=device)
    hidden = model.hidden_states(ids, positions, mask[:, None], caches, z)[-1][:, -1]
    for t in range(room):
        logp = F.log_softmax(model.logits(hidden), dim=-1)  # (B, V)
        if temperature == 0:
            token = logp.argmax(dim=-1)
        else:  # Gumbel-max: argmax of logits plus Gumbel noise is a sample of the softmax
            # noise for all prompts, also those that are done: what a row draws is no matter of other rows' lengths
            uniform = torch.rand(len(prompts), logp.shape[1], generator=generator, device=generator.device)
            noise = -torch.log(-torch.log(uniform.to(device)[rows].clamp(min=1e-20)))
            token = (logp / temperature + noise).argmax(dim=-1)
        tokens[rows[going], t] = token[going]
        logps[rows[going], t] = logp.gather(1, token[:, None])[going, 0]
        going = going & (token != EOS) & (rooms[rows] > t + 1)
        if not going.any():
            break
        if going.sum() < 0.75 * len(going):  # dropping rows copies the caches: worth it for many rows at a time
            rows, token, real, positions = rows[going], token[going], real[going], positions[going]
            for cache in caches:
                cache.keep(going)
            going = going[going]
        positions = (positions[:, -1:] + model.takes_position(token[:, None])).clamp(max=config.block_size - 1)
        real = torch.cat((real, real.new_ones(len(rows), 1)), dim=1)
        hidden = model.hidden_states(token[:, None], positions, real[:, None, None], caches)[-1][:, -1]
    return tokens[:, :t + 1], logps[:, :t + 1]


def sample_in_batches(model, prompts, generator, temperature=1.0, z=None, batch=256):
    """`sample` for any number of prompts, a batch at a time and each with a generator of its own, seeded by
    `generator`. Returns a list of (tokens (N,), logp (N,)) on the CPU, one for every prompt."""
    batch = min(batch, max(32, math.ceil(len(prompts) / 2)))  # two threads share what would fill one batch
    starts = range(0, len(prompts), batch)
    seeds = torch.randint(2 ** 62, (len(starts),), generator=generator).tolist()

    def run(start, seed):
        rows = slice(start, start + batch)
        tokens, logp = sample(model, prompts[rows], seeded(seed), temperature, None if z is None else z[rows])
        return list(zip(tokens.cpu(), logp.cpu()))

    return [row for rows in map_chunks(run, starts, seeds) for row in rows]


def pad(rows):
    """List of id lists, or of numbers -> (B, longest) tensor, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


class Pairs(NamedTuple):
    """Inputs with one solution each, as canonical records."""
    ids: torch.Tensor  # (B, T) <bos> <x> ... </x> <y> ... </y> <eos>, padded on the right
    starts: torch.Tensor  # (B,) index of the first token after <y>
    b: torch.Tensor  # (B, T) -log p_theta(y_t|x,y_<t) of the frozen base, 0 outside y (nats)

    def rows(self, index):
        """The pairs at `index`, without columns that are padding in all of them."""
        ids = self.ids[index]
        width = int((ids != PAD).any(dim=0).nonzero().max()) + 1
        return Pairs(ids[:, :width], self.starts[index], self.b[index][:, :width])

    def decided(self, nats=0.05):
        """The pairs, but of y only what comes before the base is sure of all that follows, to `nats` a token."""
        t = torch.arange(self.ids.shape[1], device=self.ids.device)
        last = torch.where(self.b > nats, t, 0).max(dim=1).values.maximum(self.starts)[:, None]
        return self._replace(ids=self.ids.where(t <= last, PAD), b=self.b * (t <= last)).rows(slice(None))

    def by_length(self, n_chunks):
        """Indices of the rows, in chunks of similar length, the longest first; at least one for every process."""
        order = (self.ids != PAD).sum(dim=1).argsort(descending=True)
        return order.tensor_split(min(max(n_chunks, parallel.processes), len(order)))


def as_pairs(records, starts):
    """Id lists, and for each the index of the first token after <y>, as Pairs of which no b is known."""
    ids = pad(records)
    return Pairs(ids, torch.tensor([*starts]), torch.zeros(ids.shape))


def in_chunks(f, pairs, *more, size=16):
    """f(pairs, *more), a tensor with a row for every pair, computed without gradient in chunks of `size` side by side;
    `more`: further tensors with a row for every pair."""
    order = pairs.by_length(math.ceil(len(pairs.ids) / size))
    f = torch.no_grad()(f)  # in the threads, which do not inherit it
    parts = map_chunks(lambda rows: f(pairs.rows(rows), *(tensor[rows] for tensor in more)), order)
    return torch.cat(parts)[torch.cat(order).argsort()]


def sample_pairs(base, prompts, generator):
    """One y ~ p_theta(y|x) for every canonical prompt (id list). The surprise b_t falls out of the sampler."""
    samples = sample_in_batches(base, prompts, generator)
    records = [p + tokens.tolist() for p, (tokens, _) in zip(prompts, samples)]
    b = pad([len(p) * [0.0] + (-logp).tolist() for p, (_, logp) in zip(prompts, samples)])
    return as_pairs(records, map(len, prompts))._replace(b=b).rows(slice(None))


def y_nll(logits, ids, starts):
    """-log p of every token of the y region (y, </y>, <eos>), in nats; 0 elsewhere. logits (B, T, V), where entry t
    scores ids[:, t] (shifted by the caller); ids (B, T); starts (B,). Returns (B, T)."""
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    t = torch.arange(ids.shape[1], device=ids.device)
    return losses * ((t >= starts[:, None]) & (ids != PAD))


def score_base(model, pairs, keep=None):
    """Teacher-forced y_nll of Pairs of B under a model without latents: (B, T). keep: see GPT.hidden_states."""
    logits = model(pairs.ids, keep=keep)  # column 0 is <bos>, never in y
    return y_nll(torch.cat((logits[:, :1], logits[:, :-1]), dim=1), pairs.ids, pairs.starts)


def insert_latents(ids, starts, latents):
    """(B, T) canonical records and (B, n) latent ids -> (B, n, T + 3): '<z> z </z>' put before <y>, for every z."""
    t, cut = torch.arange(ids.shape[1] + 3, device=ids.device), (starts - 1)[:, None]  # cut: where <y> stood
    out = ids.gather(1, torch.where(t < cut, t, t - 3).clamp(min=0))[:, None]  # (B, 1, T + 3)
    for offset, token in enumerate((Z, latents[:, :, None], Z_END)):
        out = torch.where(t == cut[:, None] + offset, token, out)
    return out


def score_latents(model, pairs, latents=None, keep=None):
    """Scores every record under several latents in one pass: the generator and the router of the factorization.

    pairs: Pairs of B; latents (B, n) token ids, by default <z1> ... <zK> for every record, or (B, n, D) vectors z; keep
    (B, L, 2, T + 3 or more, C): see GPT.hidden_states, the same under every z.
    Returns token_nll (B, n, T): -log p_psi(y_t|x,z,y_<t), 0 outside y; logits (B, n, T, V) behind them; router (B, V)
    or (B, 2 D): what GPT.route says at <z>.
    """
    (B, T), starts = pairs.ids.shape, pairs.starts
    K, V = model.config.n_latents, model.config.vocab_size
    latents = torch.arange(V - K, V, device=pairs.ids.device).expand(B, K) if latents is None else latents
    n, z = latents.shape[1], None
    if latents.is_floating_point():
        z, latents = latents.flatten(0, 1), torch.full((B, n), Z_EMPTY, device=pairs.ids.device)
    keep = None if keep is None else keep[:, :, :, :T + 3].repeat_interleave(n, dim=0)
    hidden = model.hidden_states(insert_latents(pairs.ids, starts, latents).flatten(0, 1), z=z, keep=keep)[-1]
    # what stands at <z> is the same for every z, by causality
    router = model.route(hidden.view(B, n, T + 3, -1)[torch.arange(B, device=starts.device), 0, starts - 1])
    logits = model.logits(hidden[:, 2:-1])  # entry t now scores ids[:, t], which stands at t + 3
    nll = y_nll(logits, pairs.ids.repeat_interleave(n, dim=0), starts.repeat_interleave(n))
    return nll.view(B, n, T), logits.view(B, n, T, V), router


def log_likelihood(model, pairs, *z):
    """log p_psi(y|x,z) of every pair under every latent: Pairs of B -> (B, K), without gradient; or, given z (B, n, D)
    or token ids (B, n), under the n latents of each pair: (B, n)."""
    n = z[0].shape[1] if z else model.config.n_latents  # a chunk has 64 records, or one pair
    return in_chunks(lambda chunk, *z: -score_latents(model, chunk, *z)[0].sum(dim=2), pairs, *z, size=max(1, 64 // n))


def score_router(model, pairs, keep=None):
    """What GPT.route says after '<bos> <x> ... </x> <z>', without the generator: (B, V) or (B, 2 D). Of Pairs of B it
    reads the canonical prompts alone. keep: that of score_latents."""
    ids, rows = pairs.ids[:, :int(pairs.starts.max())].clone(), torch.arange(len(pairs.ids), device=pairs.ids.device)
    ids[rows, pairs.starts - 1] = Z  # in the place of <y>; what stands behind it is not seen, by causality
    keep = None if keep is None else keep[:, :, :, :ids.shape[1]]
    return model.route(model.hidden_states(ids, keep=keep)[-1][rows, pairs.starts - 1])

"""Small models about which everything is known, for all tests: each docstring says what, and by which formula.

One discrete group (`P`, `R`) and two coins, whose laws under a sampler can be written out; hierarchies of tables (`Enumerated`) and of
Gaussians (`Ladder`); flat Gaussian VAEs (`AddedNoise`, `LinearGaussian`); ratios as a function, a table or between Gaussians; and
how far means, variances and counts are from what they should be, in their own standard errors."""
from itertools import product
from math import exp, log, sqrt

import torch
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Normal

from ncp_vae.nce import RatioEstimator
from ncp_vae.prior import NoiseContrastivePrior
from ncp_vae.walk import FlatVAE, Step, TopDownVAE, Trace, diagonal_normal, rows


def rng(seed=0):
    "Random numbers of its own."
    return torch.Generator().manual_seed(seed)


# ---- how far off ----------------------------------------------------------------------------------------------------

def z_scores(values, truth):
    "By how many standard errors the means of independent rows are above the truth. values: [n, ...]."
    return (values.mean(0) - truth) / (values.std(0) / sqrt(len(values)))


def worst(values, truth):
    "The largest miss of `z_scores`."
    return z_scores(values, truth).abs().max().item()


def errors(z, mean, variance):
    "The larger of: by how many standard errors do the mean and the variance of Gaussian rows miss theirs?"
    n = len(z)
    return max(abs(z.mean() - mean) / sqrt(variance / n), abs(z.var() - variance) / (variance * sqrt(2 / n))).item()


def chi_square(counts, law):
    "Pearson's statistic of counts: len(law) - 1 degrees of freedom."
    expected = counts.sum() * law
    return ((counts - expected) ** 2 / expected).sum()


def chi_square_p(picks, law):
    "The p-value of picks, indices of a discrete law."
    statistic = chi_square(picks.bincount(minlength=len(law)), law)
    return torch.special.gammaincc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2).item()


# ---- one group of three outcomes ------------------------------------------------------------------------------------

P, R = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 2.0, 6.0], dtype=torch.float64)
Z = 2.0                                # sum of r p
TARGET = R * P / Z                     # (0.1, 0.3, 0.6)


def outcomes(rows):
    "The prior P, in as many rows."
    return Categorical(P.float().expand(rows, 3))


def log_r(z):
    "log R of outcomes."
    return R.float().log()[z]


def pools(size, p=P):
    "All tuples of so many draws of p, [n, size], and their probabilities, [n]."
    tuples = torch.tensor(list(product(range(len(p)), repeat=size)), dtype=torch.long).reshape(-1, size)
    return tuples, p[tuples].prod(1)


def sir_law(M, p=P, r=R):
    "The law of SIR's pick among M proposals, by its definition: over all M-tuples, sum of chance r_i / sum_j r_j."
    tuples, chance = pools(M, p)
    odds = chance[:, None] * r[tuples] / r[tuples].sum(1, keepdim=True)
    return torch.zeros(len(p), dtype=torch.float64).index_add_(0, tuples.flatten(), odds.flatten())


# ---- tables, all sums written out -----------------------------------------------------------------------------------

class Table(RatioEstimator):
    "log r(z, c) from a table of r, [outcomes] or [contexts, outcomes]: E_p[r | c] is a sum over a row."
    def __init__(self, r):
        super().__init__()
        r = torch.as_tensor(r)
        self.register_buffer("log_table", r.reshape(-1, r.shape[-1]).log())

    def condition(self, context):
        return lambda z: self.log_table[torch.zeros_like(z) if context is None else context.expand_as(z), z]


class TrainedTable(Table):
    "A `Table` whose logarithms, [contexts, outcomes], are trained."
    def __init__(self, log_table):
        RatioEstimator.__init__(self)
        self.log_table = nn.Parameter(log_table)


class Enumerated(TopDownVAE):
    """Categorical groups of the given sizes, every law a table: all expectations are finite sums.

    p[k]: p(z_k | z_<k), [*sizes up to k]. q[k]: q(z_k | z_<k, x), [images, *sizes up to k]; None: the prior. px: p(x | z),
    [*sizes, images]; None: x tells z. An image is an index; a context is the index of z_<k among all its values."""

    def __init__(self, p, q=None, px=None):
        super().__init__()
        self.p, self.q, self.sizes = p, q, p[-1].shape
        self.px = torch.eye(p[-1].numel()).view(*self.sizes, -1) if px is None else px
        self.latent_shapes = [torch.Size([])] * len(p)
        self.context_shapes = [None] + [torch.Size([])] * (len(p) - 1)

    @classmethod
    def random(cls, sizes=(2, 3), number=0, images=3):
        "Every conditional a random table."
        generator = rng(number)
        def table(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
        p = [table(*sizes[:k + 1]) for k in range(len(sizes))]
        q = [table(images, *sizes[:k + 1]) for k in range(len(sizes))]
        return cls(p, q, table(*sizes, images))

    def encode(self, x):
        return x

    def walk(self, choose, *, n=None, evidence=None):
        n = rows(n, None if evidence is None else len(evidence))
        above, latents, steps = torch.zeros(n, dtype=torch.long), [], []
        for k, size in enumerate(self.sizes):
            prior = posterior = Categorical(self.p[k].reshape(-1, size)[above])
            if self.q is not None and evidence is not None:
                posterior = Categorical(self.q[k].flatten(1).unflatten(1, (-1, size))[evidence, above])
            steps.append(Step(k, above if k else None, prior, None if evidence is None else posterior))
            latents.append(choose(steps[-1]))
            above = above * size + latents[-1]
        return Trace(latents, steps, Categorical(self.px.flatten(0, -2)[above]))

    def posterior_joint(self, k):
        "q(z_1..z_{k+1} | x): [images, *sizes[:k + 1]]."
        joint = torch.ones(self.px.shape[-1])
        for table in self.q[:k + 1]:
            joint = joint.unsqueeze(-1) * table
        return joint

    def log_weights(self, x):
        "All states of z: q(z | x) and log p(x, z) - log q(z | x), both [states]. Their mean is the ELBO, of e^w p(x)."
        q = self.posterior_joint(len(self.sizes) - 1)[x]
        p = torch.ones(())
        for table in self.p:
            p = p.unsqueeze(-1) * table
        return q.flatten(), (p.log() + self.px[..., x].log() - q.log()).flatten()


def two_coins(tails=0.5):
    "Two coins, the second one fair; posteriors are the priors."
    return Enumerated([torch.tensor([1 - tails, tails]), torch.full((2, 2), 0.5)])


def coins(first=(1.0, 1.0), below=((1.0, 1.0), (4.0, 2.0)), tails=0.5):
    """An NCP on `two_coins`: r_1 = first, r_2 = below[z_1]. The group-wise law is prod_k r_k p_k / Z_k(z_<k), the joint one
    r_1 r_2 p / Z. As it stands Z_2 = (1, 3), Z = 2, and the laws of the four `STATES` are `GROUP_WISE` and `JOINT`."""
    return NoiseContrastivePrior(two_coins(tails), [Table(first), Table(below)])


STATES = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])]
GROUP_WISE, JOINT = torch.tensor([1 / 4, 1 / 4, 1 / 3, 1 / 6]), torch.tensor([1.0, 1.0, 4.0, 2.0]) / 8


# ---- flat Gaussians -------------------------------------------------------------------------------------------------

def normal(rows, *event, dtype=torch.float32):
    "N(0, I): batch [rows]."
    loc = torch.zeros(rows, *event, dtype=dtype)
    return diagonal_normal(loc, torch.ones_like(loc))


def tilt(z):
    "log r = z - z^2 / 2 a coordinate: on N(0, 1) the target is N(1/2, 1/2), and log Z = 1/4 - log(2) / 2."
    return (z - z.square() / 2).sum(-1)


TILT_Z = exp(0.25) / sqrt(2)            # of one coordinate


class Function(RatioEstimator):
    "log r = f(z), or f(z, context)."
    def __init__(self, f, of_context=False):
        super().__init__()
        self.f, self.of_context = f, of_context

    def condition(self, context):
        return (lambda z: self.f(z, context)) if self.of_context else self.f


class ToNormal(RatioEstimator):
    """From N(0, I) to N(loc, scale^2 I), times e^log_z: log Z = log_z. For scale^2 < 2 the variance of r / Z is finite: over D
    coordinates (e^(loc^2 / (2 - scale^2)) / (scale sqrt(2 - scale^2)))^D - 1."""
    def __init__(self, loc, scale, log_z=0.0):
        super().__init__()
        self.target, self.log_z = Normal(loc, scale), log_z

    def condition(self, context):
        base = Normal(0.0, 1.0)
        return lambda z: (self.target.log_prob(z) - base.log_prob(z)).sum(-1) + self.log_z

    def chi_squared(self, dim):
        "Var(r / Z)."
        loc, scale = self.target.loc.item(), self.target.scale.item()
        return (exp(loc**2 / (2 - scale**2)) / (scale * sqrt(2 - scale**2))) ** dim - 1


class AddedNoise(FlatVAE):
    """x = z + noise eps: p(x) = N(0, (1 + noise^2) I), and q(z | x) is the exact posterior N(x / (1 + noise^2), noise^2 / (1 + noise^2) I)
    unless another one is given. Under the prior N(m, t^2 I) of a `ToNormal` p(x) = N(m, (t^2 + noise^2) I). Counts its decodings."""
    def __init__(self, latent_shape, noise=1.0, posterior=None):
        super().__init__(latent_shape)
        self.noise, self.decoded = noise, 0
        if posterior is not None:
            self.posterior = posterior

    def posterior(self, x):
        variance = 1 + self.noise**2
        return diagonal_normal(x / variance, torch.full_like(x, self.noise / variance**0.5))

    def likelihood(self, z):
        self.decoded += 1
        return diagonal_normal(z, torch.full_like(z, self.noise))


class LinearGaussian(FlatVAE):
    """x = W z + sigma eps in three pixels, the two columns of W orthogonal, z ~ N(m, t^2 I): log p(x) is `log_evidence`. q is the exact
    posterior, moved by `shift` and widened by `stretch` of its own standard deviations: KL(q || p(z | x)) is `gap`, for every x.
    The prior of the walk is N(0, I): m and t are those that a ratio leads to."""

    def __init__(self, shift=0.0, stretch=1.0, m=0.0, t=1.0, sigma=0.2):
        super().__init__(2)
        self.shift, self.stretch, self.m, self.t, self.sigma = shift, stretch, m, t, sigma
        self.register_buffer("W", torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]]))
        self.double()

    def likelihood(self, z):
        mean = z @ self.W.T
        return diagonal_normal(mean, torch.full_like(mean, self.sigma))

    def posterior(self, x):
        precision = 1 / self.t**2 + self.W.square().sum(0) / self.sigma**2
        loc = (x @ self.W / self.sigma**2 + self.m / self.t**2) / precision
        scale = precision**-0.5
        return diagonal_normal(loc + self.shift * scale, (self.stretch * scale).expand_as(loc))

    def log_evidence(self, x):
        "log N(x; m W 1, t^2 W W' + sigma^2 I): [B]."
        covariance = self.t**2 * self.W @ self.W.T + self.sigma**2 * torch.eye(3, dtype=x.dtype)
        return MultivariateNormal(self.m * self.W.sum(1), covariance).log_prob(x)

    def gap(self):
        "KL(q(z|x) || p(z|x)), the same for all x."
        return 2 * ((self.shift**2 + self.stretch**2 - 1) / 2 - log(self.stretch))


# ---- a ladder of Gaussians ------------------------------------------------------------------------------------------

SLOPE, WIDTH = 0.8, 0.6                 # of the ladder's prior


class Rung(RatioEstimator):
    """The exact ratio of a group of `Ladder` to q(z_k | z_<k) = N(slope z_<k + shift, width^2), times exp(tilt z_<k + level). So for
    tilt 0 the target is q, and log Z is the sum of the levels. Counts the latents it is evaluated at."""
    def __init__(self, shift, width, slope=0.5, tilt=0.0, level=0.0):
        super().__init__()
        self.shift, self.width, self.slope, self.tilt, self.level, self.seen = shift, width, slope, tilt, level, 0

    def law(self, above):
        "q(z_k | z_<k)."
        return Normal(self.slope * above + self.shift, self.width)

    def condition(self, context):
        above, sigma = (torch.zeros(1), 1.0) if context is None else (context, WIDTH)
        q, p = self.law(above), Normal(SLOPE * above, sigma)
        def log_ratio(z):
            self.seen += z.shape[:-1].numel()
            return (q.log_prob(z) - p.log_prob(z) + self.tilt * above).sum(-1) + self.level
        return log_ratio


class Ladder(TopDownVAE):
    """z_1 ~ N(0, I), z_k ~ N(0.8 z_{k-1}, 0.6^2 I), x = z_K + eps. With `laws`, K `Rung`s, q(z_k | z_<k, x) is the rung's law for every
    x; or, where by_image is a share of its variance, a law with the rest of it whose mean is moved by x_k: with x_k ~ N(0, that
    share) the aggregate posterior is the rungs' law, and x = z + eps in every group. Counts the groups that it walks, and keeps the images that it has seen."""
    def __init__(self, groups=3, event=(1,), laws=None, by_image=0.0):
        super().__init__()
        self.latent_shapes = [torch.Size(event)] * groups
        self.context_shapes = [None] + [torch.Size(event)] * (groups - 1)
        self.laws, self.by_image = laws, by_image
        self.groups_walked, self.seen = 0, []

    def encode(self, x):
        self.seen.append(x)
        return x

    def posterior(self, k, above, x):
        law = self.laws[k].law(above)
        moved = x[:, k:k + 1] if self.by_image else 0.0
        return diagonal_normal(law.loc + moved, sqrt(1 - self.by_image) * law.scale)

    def walk(self, choose, *, n=None, evidence=None):
        n = rows(n, None if evidence is None else len(evidence))
        context, steps, latents = None, [], []
        for k, event in enumerate(self.latent_shapes):
            above, sigma = (torch.zeros(n, *event), 1.0) if context is None else (context, WIDTH)
            prior = diagonal_normal(SLOPE * above, torch.full_like(above, sigma))
            steps.append(Step(k, context, prior, None if evidence is None else self.posterior(k, above, evidence)))
            self.groups_walked += 1
            context = choose(steps[-1])
            latents.append(context)
        mean = torch.cat(latents, -1) if self.by_image else context
        return Trace(latents, steps, diagonal_normal(mean, torch.ones_like(mean)))


RUNGS = ((1.0, 0.7), (0.5, 0.42), (0.5, 0.42))          # shifts and widths of `ladder`


def ladder(tilt=0.0):
    "An NCP of three groups on a `Ladder` whose target is N(1, 0.7^2), N(0.5 z_<k + 0.5, 0.42^2); half of its variance is by image."
    ratios = [Rung(*each, tilt=tilt) for each in RUNGS]
    return NoiseContrastivePrior(Ladder(laws=ratios, by_image=0.5), ratios)


def ladder_images(n, seed):
    "Images [n, 3] under which the aggregate posterior of `ladder` is its target."
    return torch.randn(n, 3, generator=rng(seed)) * sqrt(0.5) * torch.tensor([width for _, width in RUNGS])


def ladder_law(tilt=0.0):
    """Of `ladder`: the means of the group-wise and the joint law, their common covariance, and log Z.

    Group-wise z = root eps + mean, row by row. The joint law is that times exp(c'z), c = (tilt, tilt, 0), over its mean: its mean is
    moved by covariance c, and log Z = c'mean + c'covariance c / 2."""
    mean, root = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for k, (shift, width) in enumerate(RUNGS):
        mean[k] = shift + (0.5 * mean[k - 1] if k else 0)
        root[k] = 0.5 * root[k - 1] if k else 0
        root[k, k] = width
    covariance, c = root @ root.T, torch.tensor([tilt, tilt, 0.0]).double()
    return mean, mean + covariance @ c, covariance, (c @ mean + c @ covariance @ c / 2).item()

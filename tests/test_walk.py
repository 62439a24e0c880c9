"""The walk: exact identities first, then statistics.

Every statistical test has fixed seeds and accepts |z| < 5: a correct implementation fails a single comparison for
one seed in 1.7 million. Each has a broken twin that the same test must refuse."""
import pytest
import torch
from exact import rng
from torch.distributions import Categorical, Exponential, Independent, Normal

from ncp_vae.walk import (FlatVAE, Step, TopDownVAE, Trace, at_least_float32, check_trace, diagonal_normal, draw,
                          from_posterior, from_prior, replay, rows, seeded, tempered)


class Flat(FlatVAE):
    "Two pixels; any latent shape of two numbers."

    def posterior(self, x):
        loc = x.view(-1, *self.latent_shapes[0]) / 2 + 0.5
        return diagonal_normal(loc, torch.full_like(loc, 0.3))

    def likelihood(self, z):
        return diagonal_normal(z.flatten(1), torch.full_like(z.flatten(1), 0.2))


class Chain(TopDownVAE):
    "K groups of two coordinates; group k's prior depends on the sum of the groups before it."

    def __init__(self, groups):
        super().__init__()
        self.latent_shapes = [torch.Size([2])] * groups
        self.context_shapes = [None] + [torch.Size([2])] * (groups - 1)

    def encode(self, x):
        return x

    def walk(self, choose, *, n=None, evidence=None):
        n = rows(n, None if evidence is None else len(evidence))
        context, total = None, torch.zeros(n, 2, dtype=torch.float64)
        steps, latents = [], []
        for k in range(len(self.latent_shapes)):
            scale = 0.5 + total.square() / (1 + total.square())
            posterior = None if evidence is None else diagonal_normal((total.sin() + evidence) / 2, scale / 2)
            steps.append(Step(k, context, diagonal_normal(total.sin(), scale), posterior))
            latents.append(choose(steps[-1]))
            context = total = total + latents[-1]
        return Trace(latents, steps, diagonal_normal(total, torch.full_like(total, 0.2)))


def noise_of(trace):
    "The standardised draw of each group: [K, B, 2]."
    return torch.stack([(z - s.prior.mean) / s.prior.stddev for s, z in zip(trace.steps, trace.latents)])


X = torch.tensor([[0.5, 1.5], [-1.0, 0.2], [2.0, 2.0]], dtype=torch.float64)
MODELS = [Flat((2,)).double(), Flat((1, 2)).double(), Chain(1), Chain(3)]


# ---------------------------------------------------------------- exact

@pytest.mark.parametrize("vae", MODELS)
def test_replay_reproduces_the_trace(vae):
    trace = vae.walk(from_posterior(rng(0)), evidence=vae.encode(X))
    again = vae.walk(replay(trace.latents), evidence=vae.encode(X))
    assert torch.equal(again.log_prior(), trace.log_prior())
    assert torch.equal(again.log_posterior(), trace.log_posterior())
    assert torch.equal(again.likelihood.log_prob(X), trace.likelihood.log_prob(X))
    assert torch.equal(vae.walk(replay(trace.latents), n=3).log_prior(), trace.log_prior())


@pytest.mark.parametrize("vae", MODELS)
def test_shapes_are_the_declared_ones(vae):
    trace = vae.walk(from_posterior(), evidence=vae.encode(X))
    assert [s.index for s in trace.steps] == list(range(len(vae.latent_shapes)))
    for step, z, latent, context in zip(trace.steps, trace.latents, vae.latent_shapes, vae.context_shapes):
        for distribution in (step.prior, step.posterior):
            assert distribution.batch_shape == (3,) and distribution.event_shape == latent
        assert z.shape == (3, *latent) and (None if step.context is None else step.context.shape[1:]) == context
    assert trace.log_prior().shape == trace.log_posterior().shape == (3,)


def test_densities_are_sums_over_groups_by_hand():
    trace = Chain(3).walk(from_posterior(rng(1)), evidence=X)
    total, log_p, log_q = torch.zeros(3, 2, dtype=torch.float64), 0, 0
    for z in trace.latents:
        scale = 0.5 + total**2 / (1 + total**2)
        log_p = log_p + Normal(total.sin(), scale).log_prob(z).sum(1)
        log_q = log_q + Normal((total.sin() + X) / 2, scale / 2).log_prob(z).sum(1)
        total = total + z
    torch.testing.assert_close(trace.log_prior(), log_p)
    torch.testing.assert_close(trace.log_posterior(), log_q)


@pytest.mark.parametrize("vae", MODELS)
@pytest.mark.parametrize("choose", [from_prior, lambda generator: from_prior(0.7, generator), from_posterior])
def test_a_seed_fixes_the_walk_and_spares_the_global_state(vae, choose):
    before = torch.get_rng_state()
    a, b, c = (torch.cat([z.flatten() for z in vae.walk(choose(generator=rng(s)), evidence=vae.encode(X)).latents])
               for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.isclose(a, c).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_restores_after_an_error_and_nests():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(rng(0)):
        torch.randn(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)

    def outer(inside):
        with seeded(rng(1)):
            first = torch.randn(2)
            if inside:
                with seeded(rng(2)):
                    torch.randn(5)
            return torch.cat([first, torch.randn(2)])
    assert torch.equal(outer(True), outer(False))


def test_without_a_generator_the_global_state_is_used_and_moves():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        before, a = torch.get_rng_state(), MODELS[0].walk(from_prior(), n=3).latents[0]
        assert not torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        assert torch.equal(MODELS[0].walk(from_prior(), n=3).latents[0], a)


def test_a_generator_moves_on_between_blocks():
    generator, draws = rng(0), []
    for _ in range(50):
        with seeded(generator):
            draws.append(torch.rand(()).item())
    assert len(set(draws)) == 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeded_on_a_gpu():
    torch.cuda.init()
    before, draws = torch.cuda.get_rng_state(), []
    for number in (3, 3, 4):
        with seeded(rng(number)):
            draws.append(torch.randn(4, device="cuda"))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_tempered_scales_the_std_and_nothing_else():
    p = diagonal_normal(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.1)
    q = tempered(p, 0.5)
    assert torch.equal(q.mean, p.mean) and torch.equal(q.stddev, p.stddev * 0.5)
    assert q.batch_shape == p.batch_shape and q.event_shape == p.event_shape
    assert tempered(p, 1) is p
    twice = Independent(diagonal_normal(torch.zeros(3, 2), torch.ones(3, 2)), 1)
    assert tempered(twice, 2.0).event_shape == (3, 2)


def test_draw_has_gradients_where_it_can():
    loc = torch.zeros(2, 3, requires_grad=True)
    draw(diagonal_normal(loc, torch.ones(2, 3))).sum().backward()
    assert torch.equal(loc.grad, torch.ones(2, 3))
    assert draw(Categorical(logits=torch.zeros(4, 2))).shape == (4,)


def test_a_flat_prior_follows_the_model():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        vae = Flat((3, 2)).to(dtype)
        assert vae.walk(from_prior(), n=5).latents[0].dtype == dtype
    assert Flat(4).latent_shapes == [torch.Size([4])] and Flat(4).state_dict() == {}


def test_the_helpers():
    "One source of the number of rows; one density a row; float32 or better."
    assert rows(5, None) == rows(None, 5) == 5
    p = diagonal_normal(torch.zeros(4, 3, 2), torch.ones(4, 3, 2))
    assert p.batch_shape == (4,) and p.event_shape == (3, 2) and p.log_prob(p.sample()).shape == (4,)
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    assert all(at_least_float32(torch.ones(1, dtype=given)).dtype == kind for given, kind in kinds.items())


def test_a_chooser_that_keeps_the_top_agrees_with_the_two_at_its_ends():
    "The answer to an exercise of the chapter: posterior above a level, prior below it, one generator for both."
    def keep_top(levels):
        generator = rng(15)
        kept, redrawn = from_posterior(generator), from_prior(generator=generator)
        return lambda step: kept(step) if step.index < levels else redrawn(step)

    def latents(choose):
        return torch.stack(MODELS[3].walk(choose, evidence=X).latents)
    top, prior = latents(from_posterior(rng(15))), latents(from_prior(generator=rng(15)))
    assert torch.equal(latents(keep_top(3)), top) and torch.equal(latents(keep_top(0)), prior)
    mixed = latents(keep_top(2))
    assert torch.equal(mixed[:2], top[:2]) and not torch.isclose(mixed[2], top[2]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_walk_on_a_gpu():
    vae, x = Flat((2,)).cuda(), X.float().cuda()
    trace = check_trace(vae, vae.walk(from_posterior(rng(0)), evidence=vae.encode(x)), 3)
    again = vae.walk(replay(trace.latents), evidence=vae.encode(x))
    assert trace.latents[0].device == x.device and torch.equal(again.log_prior(), trace.log_prior())
    a, b = (vae.walk(from_prior(0.7, rng(1)), n=3).latents[0] for _ in range(2))
    assert torch.equal(a, b) and a.device == x.device


def test_the_trace_keeps_the_untempered_prior():
    trace = MODELS[3].walk(from_prior(0.3, rng(0)), n=4)
    torch.testing.assert_close(trace.log_prior(), MODELS[3].walk(replay(trace.latents), n=4).log_prior())


@pytest.mark.parametrize("vae", [MODELS[0], MODELS[3]])
@pytest.mark.parametrize("words, call", [
    ("not both", lambda vae: vae.walk(from_prior(), n=3, evidence=vae.encode(X))),
    ("either n=", lambda vae: vae.walk(from_prior())),
    ("at least 1, got 0", lambda vae: vae.walk(from_prior(), n=0)),
    ("at least 1, got -2", lambda vae: vae.walk(from_prior(), n=-2)),
    ("at least 1, got 0", lambda vae: vae.walk(from_prior(), evidence=vae.encode(X[:0]))),
    ("no evidence", lambda vae: vae.walk(from_posterior(), n=3)),
    ("no evidence", lambda vae: vae.walk(from_prior(), n=3).log_posterior()),
    ("positive, got 0", lambda vae: vae.walk(from_prior(0), n=3)),
    ("positive, got -1.5", lambda vae: vae.walk(from_prior(-1.5), n=3)),
    ("positive, got nan", lambda vae: vae.walk(from_prior(float("nan")), n=3)),
    ("0 latents given", lambda vae: vae.walk(replay([]), n=3)),
    (r"shape \(1, 2\), the walk needs \(3, 2\)", lambda vae: vae.walk(replay([X[:1]] * 3), n=3)),
])
def test_refused(vae, words, call):
    with pytest.raises(ValueError, match=words):
        call(vae)


def test_refused_kinds():
    for law in (Exponential(torch.ones(2)), Categorical(logits=torch.zeros(1, 2))):
        with pytest.raises(TypeError, match=type(law).__name__):
            tempered(law, 0.5)
        assert tempered(law, 1.0) is law
    for call in (lambda: TopDownVAE().encode(X), lambda: TopDownVAE().walk(from_prior(), n=1),
                 lambda: FlatVAE(2).encode(X), lambda: FlatVAE(2).posterior(X), lambda: FlatVAE(2).likelihood(X)):
        with pytest.raises(NotImplementedError, match="must define"):
            call()


def test_a_replay_that_ends_early_is_refused():
    latents = Chain(3).walk(from_prior(), n=2).latents
    with pytest.raises(ValueError, match="1 latents given, the walk has reached group 2"):
        Chain(3).walk(replay(latents[:1]), n=2)


def test_one_row_would_broadcast_without_the_check():
    "What the refusal of a misshapen replay is for: the prior gives two densities of the one latent."
    one_row = torch.zeros(1, 2, dtype=torch.float64)
    assert MODELS[0].prior(2).log_prob(one_row).shape == (2,)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), the walk needs \(2, 2\)"):
        MODELS[0].walk(replay([one_row]), n=2)


class Forgetful(Chain):
    "A chain that gets the shape of one of its laws, or of its context, wrong."

    def __init__(self, what):
        super().__init__(2)
        self.what = what

    def walk(self, choose, *, n=None, evidence=None):
        trace = super().walk(choose, n=n, evidence=evidence)
        step = trace.steps[1]
        if self.what == "likelihood":
            trace.likelihood = trace.likelihood.base_dist               # one density a pixel
        elif self.what == "context":
            step.context = step.context[:, :1]
        else:
            setattr(step, self.what, getattr(step, self.what).base_dist)
        return trace


@pytest.mark.parametrize("what, words", [
    ("prior", r"prior of group 1 has batch \(3, 2\) and event \(\), expected \(3,\) and \(2,\): wrap it in Independent"),
    ("posterior", r"posterior of group 1 has batch \(3, 2\)"),
    ("context", r"context of group 1 has shape \(3, 1\), expected \(3, 2\)"),
    ("likelihood", r"likelihood has batch \(3, 2\) and event \(\), expected batch \(3,\)"),
])
def test_check_trace_refuses_shapes_that_would_broadcast(what, words):
    vae = Forgetful(what)
    with pytest.raises(ValueError, match=words):
        check_trace(vae, vae.walk(from_posterior(rng(0)), evidence=X), 3)


@pytest.mark.parametrize("vae", MODELS)
def test_check_trace_passes_what_fits(vae):
    trace = vae.walk(from_posterior(rng(0)), evidence=vae.encode(X))
    assert check_trace(vae, trace, 3) is trace
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        check_trace(vae, trace, 4)


# ---------------------------------------------------------------- statistics

N = 40_000


def check_spread(noise, expected):
    "noise: [..., N, 2]; its standard deviation, whose relative standard error is 1 / sqrt(2 N) for a Gaussian."
    z = (noise.std(-2) / expected - 1) * (2 * N) ** 0.5
    assert z.abs().max() < 5, f"spread is {z.abs().max():.1f} standard errors from {expected}"


def check_mean(noise, expected):
    z = (noise.mean(-2) - expected) / noise.std(-2) * N**0.5
    assert z.abs().max() < 5, f"mean is {z.abs().max():.1f} standard errors from {expected}"


def check_independent(a, b):
    z = torch.corrcoef(torch.stack([a, b]))[0, 1] * N**0.5
    assert abs(z) < 5, f"correlation is {abs(z):.1f} standard errors from 0"


@pytest.mark.parametrize("t", [0.4, 1.0, 1.3])
def test_temperature_is_the_std_of_every_group(t):
    noise = noise_of(Chain(3).walk(from_prior(t, rng(11)), n=N))
    check_spread(noise, t)
    check_mean(noise, 0.0)


def test_temperature_broken_twin_scales_the_variance():
    def choose(step):
        with seeded(rng(11 + step.index)):
            return step.prior.mean + 0.7**0.5 * step.prior.stddev * torch.randn_like(step.prior.mean)
    with pytest.raises(AssertionError, match="spread"):
        check_spread(noise_of(Chain(3).walk(choose, n=N)), 0.7)


def standardised_by_posterior(trace):
    return torch.stack([(z - s.posterior.mean) / s.posterior.stddev for s, z in zip(trace.steps, trace.latents)])


def test_from_posterior_draws_the_posterior():
    noise = standardised_by_posterior(Chain(3).walk(from_posterior(rng(12)), evidence=X[:1].expand(N, -1)))
    check_spread(noise, 1.0)
    check_mean(noise, 0.0)


def test_from_posterior_broken_twin_draws_the_prior():
    noise = standardised_by_posterior(Chain(3).walk(from_prior(generator=rng(12)), evidence=X[:1].expand(N, -1)))
    with pytest.raises(AssertionError):
        check_spread(noise, 1.0)
    with pytest.raises(AssertionError):
        check_mean(noise, 0.0)


def test_groups_have_independent_noise():
    noise = noise_of(Chain(3).walk(from_prior(generator=rng(13)), n=N))
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        check_independent(noise[a, :, 0], noise[b, :, 0])


def test_independence_broken_twin_reseeds_every_group():
    noise = noise_of(Chain(3).walk(lambda step: from_prior(generator=rng(13))(step), n=N))
    with pytest.raises(AssertionError, match="correlation"):
        check_independent(noise[0, :, 0], noise[1, :, 0])


def test_blocks_of_one_generator_are_independent():
    def block(generator):
        with seeded(generator):
            return torch.randn(N)
    generator = rng(14)
    check_independent(block(generator), block(generator))
    with pytest.raises(AssertionError, match="correlation"):              # the broken twin: a fresh generator each time
        check_independent(block(rng(14)), block(rng(14)))

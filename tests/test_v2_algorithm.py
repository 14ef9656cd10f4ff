"""What the two DreamerV2 scripts promise about their algorithm, compared with brute force on small agents."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_tools import Draws, Record, check, check_gradient, check_policy, mode, noise, step_by_step, watch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import distributions as dist

atari = importlib.import_module("dreamer_v2_atari")
continuous = importlib.import_module("dreamer_v2_continuous")

CPU = torch.device("cpu")
T, B, H, ACTION = 6, 3, 4, 3  # sequence length, batch, horizon, action size
SMALL = {"stoch_size": 4, "num_classes": 3, "deter_size": 8, "units": 8, "cnn_depth": 1, "obs_embed_size": 6}
SMALL |= {"imagine_horizon": H, "cuda": False, "precision": "float32"}
FEAT = 4 * 3 + 8
STILL = {"model_learning_rate": 1e-15, "actor_learning_rate": 1e-15, "value_learning_rate": 1e-15, "weight_decay": 0.0}


@pytest.fixture(params=[atari, continuous], ids=["atari", "continuous"])
def v2(request):
    return request.param


@pytest.fixture(params=["onehot", "tanh_normal", "trunc_normal"])
def kind(request):
    """An actor's distribution: its script and the flag that chooses it."""
    return (atari, {}) if request.param == "onehot" else (continuous, {"actor_dist": request.param})


def make_agent(v2, **flags):
    """A small agent with no parameter at a trivial value; its flags are `agent.args`."""
    torch.manual_seed(0)
    agent = v2.Dreamer(v2.Args(**SMALL | flags), 1, ACTION)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def make_batch(v2, seed: int = 0):
    """Sequences with an episode that ends, truly, in the middle of the second one."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (T, B, 1, 64, 64), generator=draw, dtype=torch.uint8)
    action = torch.rand(T, B, ACTION, generator=draw) * 2 - 1
    action = F.one_hot(action.argmax(-1), ACTION).float() if v2 is atari else action
    is_first, is_terminal = torch.zeros(2, T, B, dtype=torch.bool)
    is_first[0], is_first[3, 1], is_terminal[2, 1] = True, True, True
    action[is_first] = 0
    return v2.Batch(image, action, 3 * torch.randn(T, B, generator=draw), is_first, is_terminal)


@pytest.mark.parametrize("act", ["elu", "silu"])
def test_convolutions_let_through_what_differs_between_images_and_between_latents(v2, act):
    """At the start, at full size: a ball of two pixels in 20 places, 50 random latents.

    With ELU 2.2e-3 and 0.032 are left of it; with SiLU, where Pong was never seen, 1.5e-4 and 0.0048.
    """
    torch.manual_seed(0)
    args = v2.Args(act=act, obs_embed_size=0, cnn_depth=32)
    encoder, decoder = v2.Encoder(args, 1), v2.Decoder(args, 1624, 1)
    v2.init_weights(encoder)
    v2.init_weights(decoder)
    image = torch.full((20, 1, 64, 64), -0.16)
    for i in range(20):
        image[i, :, 3 * i : 3 * i + 2, 30] = 0.4
    with torch.no_grad():
        assert encoder(image).std(0).mean() > 1e-3
        assert decoder(torch.randn(50, 1624)).std(0).mean() > 0.015


def make_learner(agent):
    """The learner of this agent, in the agent's script."""
    return importlib.import_module(type(agent).__module__).Learner(agent, agent.args, CPU)


def kolmogorov_smirnov(sample: torch.Tensor, ranks: torch.Tensor) -> None:
    """`ranks`: the distribution's CDF at each of the draws. Passes the truth but once in 10,000 seeds."""
    order = sample.argsort()
    steps = torch.arange(1, len(sample) + 1, dtype=torch.float64) / len(sample)
    assert (ranks[order] - steps).abs().max() < 2.23 / math.sqrt(len(sample))


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("act", ["elu", "silu"])
def test_hidden_layers_are_a_linear_one_a_layer_norm_with_epsilon_1e_3_and_the_activation(v2, act, layer_norm):
    agent, feat = make_agent(v2, act=act, layer_norm=layer_norm), 0.1 * noise(5, FEAT)
    with torch.no_grad():
        x, layers = feat, [layer for layer in agent.value if list(layer.parameters())]
        *hidden, output = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        norms = [layer for layer in layers if isinstance(layer, torch.nn.LayerNorm)]
        assert len(hidden) == 4 and len(norms) == 4 * layer_norm
        for i, linear in enumerate(hidden):
            x = x @ linear.weight.T + linear.bias
            if layer_norm:
                x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
                x = x * norms[i].weight + norms[i].bias
            x = x * x.sigmoid() if act == "silu" else torch.where(x > 0, x, x.expm1())
        check(agent.value(feat), x @ output.weight.T + output.bias)
    epsilons = {layer.eps for layer in agent.modules() if isinstance(layer, torch.nn.LayerNorm)}
    assert epsilons == {1e-3}  # the GRU has one in any case


# TWO-HOT REWARDS

BINS = torch.linspace(-20, 20, 255)


@settings(deadline=None, max_examples=200)
@given(st.floats(-4e8, 4e8, width=32))
def test_symlog_and_symexp_are_inverse_odd_and_near_zero_the_identity(x):
    x = torch.tensor(x)
    for v2 in (atari, continuous):
        y = v2.symlog(x)
        assert y.item() == pytest.approx(math.copysign(math.log1p(abs(x)), x), rel=1e-6)
        assert v2.symexp(y).item() == pytest.approx(x.item(), rel=1e-5, abs=1e-9)
        assert v2.symlog(-x) == -y and v2.symexp(-y) == -v2.symexp(y)


def test_twohot_of_a_bin_is_onehot_and_its_mean_that_bin(v2):
    weights = v2.twohot(BINS, BINS)
    assert torch.equal(weights, torch.eye(255))
    assert torch.equal(weights @ BINS, BINS)
    assert torch.equal(v2.twohot(BINS.double(), BINS), weights)


@settings(deadline=None, max_examples=200)
@given(st.floats(-20, 20, width=32))
def test_twohot_has_two_neighbouring_weights_that_sum_to_one_and_its_mean_is_the_value(x):
    for v2 in (atari, continuous):
        weights = v2.twohot(torch.tensor([x]), BINS)[0]
        places = weights.nonzero()[:, 0]
        assert len(places) in (1, 2) and places[-1] - places[0] == len(places) - 1
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert (weights @ BINS).item() == pytest.approx(x, abs=1e-5)
        assert (BINS[places] - x).abs().max() <= 40 / 254 + 1e-5


@pytest.mark.parametrize("reward", [1e9, 1e30, math.inf])
def test_rewards_beyond_the_bins_count_as_the_last_one(v2, reward):
    weights = v2.twohot(v2.symlog(torch.tensor([-reward, reward])), BINS)
    assert torch.equal(weights, torch.eye(255)[[0, 254]])
    agent = make_agent(v2)
    feat = noise(2, FEAT).requires_grad_()
    loss = agent.world_model.reward.nll(feat, torch.tensor([-reward, reward]))
    loss.sum().backward()
    assert loss.isfinite().all() and feat.grad.isfinite().all()


def test_reward_head_predicts_the_reward_whose_twohot_weights_it_has_learned(v2):
    """To 2e-5 relative: near the last bins an error of one float32 in the logarithm is as much."""
    head = v2.RewardHead(v2.Args(**SMALL, reward_layers=0), FEAT)
    reward = torch.tensor([-4e8, -1000.0, -1.0, -0.01, 0.0, 0.3, 1.0, 7.0, 21.0, 12345.0, 4e8])
    for value in reward:
        with torch.no_grad():
            head[0].weight.zero_()
            head[0].bias.copy_(v2.twohot(v2.symlog(value[None]), BINS)[0].log().clamp(min=-1e4))
        assert head.mean(noise(FEAT)).item() == pytest.approx(value.item(), rel=2e-5, abs=2e-5)


def test_reward_loss_is_the_cross_entropy_of_twohot_labels(v2):
    head, feat, reward = make_agent(v2).world_model.reward, noise(T, B, FEAT), 10 * noise(T, B, seed=1)
    expected = dist.Categorical(logits=head(feat))
    labels = v2.twohot(v2.symlog(reward), BINS)
    check(head.nll(feat, reward), -(labels * expected.logits).sum(-1))
    check(head.mean(feat), v2.symexp(expected.probs @ BINS))


def test_games_rewards_pass_through_tanh_in_the_loss_and_only_there(v2, monkeypatch):
    """Atari only. The batch keeps them, and what the head predicts is not squashed again in imagination."""
    agent, batch = make_agent(v2, **STILL), make_batch(v2)
    seen, nll = [], agent.world_model.reward.nll

    def see(feat, reward):
        seen.append(reward)
        return nll(feat, reward)

    monkeypatch.setattr(agent.world_model.reward, "nll", see)
    before, imagined = batch.reward.clone(), watch(v2, monkeypatch, "imagine")
    returns = watch(v2, monkeypatch, "lambda_return")
    make_learner(agent).update(batch)
    assert batch.reward.abs().max() > 2
    check(seen[0], torch.tanh(batch.reward) if v2 is atari else batch.reward)
    assert torch.equal(batch.reward, before)
    check(returns[0][0]["reward"], agent.world_model.reward.mean(imagined[0][1][0])[:-1])


# KL BALANCING AND LATENTS


def test_kl_and_entropy_are_those_of_independent_categoricals(v2):
    post, prior = noise(5, 4, 3), noise(5, 4, 3, seed=1)
    one, other = (dist.Independent(dist.Categorical(logits=logit), 1) for logit in (post, prior))
    check(v2.kl_categorical(post, prior), dist.kl_divergence(one, other))
    check(v2.entropy_categorical(post), one.entropy())


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(0, 1000))
@example(0.5, 0)
def test_the_share_alpha_of_the_kl_moves_only_the_prior_and_the_rest_only_the_posterior(alpha, seed):
    for v2 in (atari, continuous):
        post, prior = noise(T, B, 4, 3, seed=seed).requires_grad_(), noise(T, B, 4, 3, seed=seed + 1).requires_grad_()
        one, other = (dist.Independent(dist.Categorical(logits=logit), 1) for logit in (post, prior))
        kl = dist.kl_divergence(one, other).mean()
        loss, mean = v2.kl_loss(post, prior, alpha, 0.0)
        check(loss, kl)
        check(mean, kl)
        assert not mean.requires_grad
        expected = torch.autograd.grad(kl, [post, prior])
        actual = torch.autograd.grad(loss, [post, prior])
        shares = (1 - alpha, alpha) if alpha != 0.5 else (1, 1)  # as in the official code
        for gradient, other, share in zip(actual, expected, shares, strict=True):
            scale = other.abs().max().item()
            assert (gradient - share * other).abs().max().item() <= 1e-5 * scale


def test_kl_has_no_gradient_while_its_mean_is_under_the_free_nats(v2):
    post, prior = noise(T, B, 4, 3).requires_grad_(), noise(T, B, 4, 3, seed=1).requires_grad_()
    _, mean = v2.kl_loss(post, prior, 0.8, 0.0)
    each = v2.kl_categorical(post, prior)
    assert each.min() < mean < each.max()
    loss, metric = v2.kl_loss(post, prior, 0.8, mean.item() * 1.01)
    assert torch.equal(metric, mean), "what is logged knows no free nats"
    assert loss.item() == pytest.approx(mean.item() * 1.01, rel=1e-6)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [post, prior]))
    above, _ = v2.kl_loss(post, prior, 0.8, mean.item() * 0.99)
    gradients = torch.autograd.grad(above, [post, prior])
    free, _ = v2.kl_loss(post, prior, 0.8, 0.0)
    for gradient, whole in zip(gradients, torch.autograd.grad(free, [post, prior]), strict=True):
        assert torch.equal(gradient, whole), "it is the mean that is clamped, not each step"


def test_sampled_latents_are_onehot_with_the_frequencies_of_their_probabilities(v2):
    """Chi-square of 100,000 draws; passes the truth but once in 10,000 seeds."""
    logits, draws = 2 * noise(4, 6), 100_000
    torch.manual_seed(0)
    sample = v2.sample_onehot(logits.expand(draws, 4, 6))
    torch.testing.assert_close(sample.sum(-1), torch.ones(draws, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(sample.amax(-1), torch.ones(draws, 4), rtol=0, atol=1e-6)
    assert sample.min() > -1e-6
    expected = draws * logits.softmax(-1)
    chi_square = ((sample.round().sum(0) - expected).square() / expected).sum(-1)  # 5 degrees of freedom each
    assert chi_square.max() < 29


def test_sampled_latents_are_independent_of_each_other(v2):
    torch.manual_seed(0)
    sample = v2.sample_onehot(torch.zeros(50_000, 2, 3)).round()
    joint = torch.einsum("ni,nj->ij", sample[:, 0], sample[:, 1])
    expected = 50_000 / 9
    assert ((joint - expected) ** 2 / expected).sum() < 32  # 8 degrees of freedom, once in 10,000


def test_sampled_latents_pass_the_gradient_of_their_probabilities(v2):
    logits, cotangent = noise(7, 4, 3).requires_grad_(), noise(7, 4, 3, seed=1)
    (gradient,) = torch.autograd.grad((cotangent * v2.sample_onehot(logits)).sum(), logits)
    (expected,) = torch.autograd.grad((cotangent * logits.softmax(-1)).sum(), logits)
    check_gradient(gradient, expected)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_lowest_and_the_highest_random_numbers_draw_classes_too_but_none_that_cannot_be(v2, number, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, number))
    logits = noise(1000, 4, 6)
    logits[..., 0] = -1e4
    assert torch.equal(v2.sample_onehot(logits).argmax(-1), torch.full((1000, 4), 1 if number == 0 else 5))


def test_extreme_logits_are_sampled_without_nan(v2):
    sample = v2.sample_onehot(torch.tensor([[0.0, -1e4, 1e4], [-1e30, 0.0, -1e30]]).expand(1000, 2, 3))
    assert torch.equal(sample, F.one_hot(torch.tensor([2, 1]), 3).float().expand(1000, 2, 3))


def test_is_first_in_the_middle_of_a_sequence_equals_starting_a_fresh_sequence_there(v2, monkeypatch):
    """From zeros, and without the action that is stored at the reset."""
    monkeypatch.setattr(v2, "sample_onehot", mode)
    rssm, batch, embed, k = make_agent(v2).world_model.rssm, make_batch(v2), noise(T, B, 6), 3
    action, never = batch.action + 1, torch.zeros(T, B, dtype=torch.bool)
    post, prior = rssm.observe(embed, action, batch.is_first)
    without_action = torch.cat([torch.zeros(1, B, ACTION), action[k + 1 :]])
    fresh_post, fresh_prior = rssm.observe(embed[k:], without_action, never[k:])
    check(post.feat[k:, 1], fresh_post.feat[:, 1])
    check(prior[k:, 1], fresh_prior[:, 1])
    other, _ = rssm.observe(embed, action, never)
    assert not torch.allclose(post.deter[k:, 1], other.deter[k:, 1])


@pytest.mark.parametrize("steps", [10, 23])
def test_sequences_of_any_length_are_filtered_step_after_step(v2, steps, monkeypatch):
    """`observe` goes through them in spans of 10 steps."""
    monkeypatch.setattr(
        v2, "sample_onehot", lambda logits: mode(logits) + logits.softmax(-1) - logits.softmax(-1).detach()
    )
    rssm, embed, action = make_agent(v2).world_model.rssm, noise(steps, B, 6), noise(steps, B, ACTION, seed=1)
    is_first = noise(steps, B, seed=2) > 1.3
    is_first[:, 0] = False
    assert is_first.any()
    embed.requires_grad_()
    post, prior = rssm.observe(embed, action, is_first)
    expected = step_by_step(rssm, embed, action, is_first)
    for name, field in post._asdict().items():
        check(field, getattr(expected, name), name)
    check(prior, rssm.prior(post.deter))
    gradient, by_steps = (torch.autograd.grad(states.logit[-1].sum(), embed)[0] for states in (post, expected))
    assert by_steps[0, 0].any(), "the last states depend on all spans"
    check_gradient(gradient, by_steps)


@pytest.mark.parametrize("act", ["elu", "silu"])
def test_layers_and_activations_are_those_of_the_flags(v2, act):
    layers = {"reward_layers": 1, "discount_layers": 2, "value_layers": 3, "actor_layers": 5}
    agent = make_agent(v2, act=act, pred_discount=True, **layers)
    model, kind = agent.world_model, torch.nn.ELU if act == "elu" else torch.nn.SiLU
    for head, count in zip((model.reward, model.discount, agent.value, agent.actor), layers.values(), strict=True):
        assert [type(layer) for layer in head].count(torch.nn.Linear) == count + 1
        assert [type(layer) for layer in head].count(kind) == count
    assert type(model.rssm.act) is kind


class Drawn:
    """In the place of `sample_onehot`: given categories, for latents (..., stoch, classes) and for actions apart."""

    def __init__(self, latents, actions=()):
        self.indices = {3: list(latents), 2: list(actions)}

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return F.one_hot(self.indices[logits.ndim].pop(0), logits.shape[-1]).float()


def test_policy_filters_as_training_does_with_the_action_it_took_stored_at_the_next_step(v2, monkeypatch):
    agent, batch = make_agent(v2), make_batch(v2)
    latents, choices = torch.randint(3, (T, B, 4)), torch.randint(ACTION, (T, B))
    monkeypatch.setattr(v2, "sample_onehot", Drawn(latents, choices))
    state, actions, states = agent.initial_state(B), [], []
    for t in range(T):
        action, state = agent.policy(batch.image[t].numpy(), state, batch.is_first[t].numpy())
        actions.append(action)
        states.append(torch.cat([state[0].flatten(1), state[1]], -1))
    assert len(torch.cat(actions).unique(dim=0)) > 1
    stored = torch.stack([torch.zeros(B, ACTION), *actions[:-1]])  # index t: the action that led to x_t
    monkeypatch.setattr(v2, "sample_onehot", Drawn(latents))
    _, post, _ = v2.world_model_loss(agent.world_model, batch._replace(action=stored), agent.args)
    check(torch.stack(states), post.feat)


def test_exploration_adds_clipped_noise_to_continuous_actions(monkeypatch):
    v2, agent, batch = continuous, make_agent(continuous), make_batch(continuous)
    monkeypatch.setattr(v2, "sample_onehot", mode)
    explore = torch.tensor([[0.5, -0.5, 0.1], [100.0, -100.0, 0.0], [0.0, 0.1, 3.0]])
    arguments = batch.image[0].numpy(), agent.initial_state(B), batch.is_first[0].numpy()
    plain, _ = agent.policy(*arguments, mode=True)
    monkeypatch.setattr(v2, "sample_normal", Draws(explore))
    noisy, state = agent.policy(*arguments, mode=True, noise=0.3)
    check(noisy, (plain + 0.3 * explore).clamp(-1, 1))
    assert torch.equal(state[2], noisy)  # the next state follows from the action that was taken


def test_exploration_replaces_this_share_of_discrete_actions_by_uniform_ones():
    agent, n = make_agent(atari), 4000
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 1000.0, 0.0]))  # it wants nothing but action 1
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 64, 64, dtype=torch.uint8).expand(n, 1, 64, 64).numpy()
    action, state = agent.policy(image, agent.initial_state(n), np.ones(n, bool), noise=0.3)
    assert torch.equal(state[2], action) and torch.equal(action.sum(-1), torch.ones(n))
    expected = n * torch.tensor([0.1, 0.8, 0.1])
    assert ((action.sum(0) - expected) ** 2 / expected).sum() < 18  # 2 degrees of freedom, once in 10,000
    greedy, _ = agent.policy(image, agent.initial_state(n), np.ones(n, bool))
    assert greedy[:, 1].all()


# THE ACTOR'S DISTRIBUTIONS


def test_onehot_policy_is_a_categorical():
    logits = noise(7, ACTION).requires_grad_()
    policy, truth = atari.OneHot(logits), dist.OneHotCategorical(logits=logits)
    action = policy.sample().requires_grad_()
    check(policy.log_prob(action), truth.log_prob(action.round()))
    check(policy.entropy(), truth.entropy())
    assert torch.equal(policy.mode(), F.one_hot(logits.argmax(-1), ACTION).float())
    (gradient,) = torch.autograd.grad(policy.log_prob(action).sum(), action, allow_unused=True)
    assert gradient is None or not gradient.any(), "as in the official code, also under `both`"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.1), (-3.0, 0.7), (2.0, 3.0)])
def test_tanh_normal_integrates_to_one_over_the_actions(mean, std):
    """Over y = tanh(x), dy = (1 - tanh^2 x) dx, up to where float32 has no number between y and 1."""
    x = torch.linspace(-8.3, 8.3, 100_001, dtype=torch.float64)
    y = torch.tanh(x)
    fields = (torch.full((len(x), 1), value) for value in (mean, std))
    log_prob = continuous.TanhNormal(*fields).log_prob(y[:, None]).double()
    inside = dist.Normal(mean, std).cdf(torch.tensor([-8.3, 8.3]))
    total = torch.trapezoid(log_prob.exp() * (1 - y**2), x)
    assert total.item() == pytest.approx((inside[1] - inside[0]).item(), abs=1e-4)


def test_tanh_normal_log_prob_sums_over_actions_and_is_finite_at_the_bounds():
    mean, std = noise(5, ACTION).requires_grad_(), noise(5, ACTION, seed=1).exp().requires_grad_()
    policy, action = continuous.TanhNormal(mean, std), torch.tanh(0.7 * noise(5, ACTION, seed=2))
    squashed = dist.TransformedDistribution(dist.Normal(mean, std), dist.TanhTransform())
    check(policy.log_prob(action), squashed.log_prob(action).sum(-1))
    assert torch.equal(policy.mode(), torch.tanh(mean))
    edge = policy.log_prob(torch.ones(5, ACTION))
    assert edge.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(edge.sum(), [mean, std]))


def test_tanh_normal_entropy_is_unbiased():
    """The mean of 20,000 one-sample estimates against the integral, to 2e-2."""
    torch.manual_seed(0)
    policy = continuous.TanhNormal(torch.full((20_000, 1), 0.4), torch.full((20_000, 1), 0.6))
    x = torch.linspace(-7, 7, 100_001, dtype=torch.float64)
    density = dist.Normal(0.4, 0.6).log_prob(x)
    log_prob = density - torch.log1p(-(torch.tanh(x) ** 2))
    expected = -torch.trapezoid(density.exp() * log_prob, x)
    assert policy.entropy().mean().item() == pytest.approx(expected.item(), abs=2e-2)


TRUNCATED = [(0.0, 0.1), (0.3, 0.5), (-0.7, 1.0), (0.95, 0.3), (-1.0, 0.1), (1.0, 2.1), (0.999, 0.1)]


@pytest.mark.parametrize(("mean", "std"), TRUNCATED)
def test_truncated_normal_draws_have_their_distribution_and_stay_between_the_bounds(mean, std):
    torch.manual_seed(0)
    fields = [torch.full((100_000, 1), value) for value in (mean, std)]
    raw, sample = continuous.sample_trunc_normal(*fields), continuous.TruncNormal(*fields).sample()
    assert raw.abs().max() <= 1 + 1e-6 and sample.abs().max() <= 1 - 9e-7
    x = torch.cat([torch.tensor([-1.0, 1.0], dtype=torch.float64), sample[:, 0].double()])
    rank = torch.special.ndtr((x - mean) / std)
    kolmogorov_smirnov(sample[:, 0], (rank[2:] - rank[0]) / (rank[1] - rank[0]))


@pytest.mark.parametrize(("mean", "std"), TRUNCATED)
def test_truncated_normal_density_integrates_to_one_and_gives_its_entropy(mean, std):
    x = torch.linspace(-1, 1, 100_001)
    policy = continuous.TruncNormal(torch.full((len(x), 1), mean), torch.full((len(x), 1), std))
    log_prob = policy.log_prob(x[:, None]).double()
    assert torch.trapezoid(log_prob.exp(), x.double()).item() == pytest.approx(1, abs=1e-4)
    entropy = -torch.trapezoid(log_prob.exp() * log_prob, x.double())
    assert policy.entropy()[0].item() == pytest.approx(entropy.item(), abs=2e-4)
    assert torch.equal(policy.mode(), policy.mean)


def test_truncated_normal_draws_have_the_official_gradient_also_where_they_are_clipped():
    """d/dmean = 1 and d/dstd = (x - mean) / std: the truncation has no share in it."""
    torch.manual_seed(0)
    mean, std = (
        (0.99 * torch.tanh(noise(500, ACTION))).requires_grad_(),
        (0.1 + 2 * torch.rand(500, ACTION)).requires_grad_(),
    )
    sample = continuous.TruncNormal(mean, std).sample()
    to_mean, to_std = torch.autograd.grad(sample.sum(), [mean, std])
    check_gradient(to_mean, torch.ones_like(mean))
    check_gradient(to_std, ((sample - mean) / std).detach(), tolerance=1e-4)  # the clip moves x by 1e-6
    clipped = torch.full((4, 1), 1.0).requires_grad_()
    raw = torch.tensor([[1.0], [0.5], [-1.0], [0.0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "sample_trunc_normal", lambda mean, std: mean + (raw - mean).detach())
        action = continuous.TruncNormal(clipped, torch.ones(4, 1)).sample()
    check(action, raw.clamp(-1 + 1e-6, 1 - 1e-6), tolerance=1e-8)
    assert torch.equal(torch.autograd.grad(action.sum(), clipped)[0], torch.ones(4, 1))


def test_actors_outputs_are_bounded_as_documented(kind):
    v2, flags = kind
    policy = make_agent(v2, **flags).actor(1e4 * noise(50, FEAT))
    assert all(field.isfinite().all() for field in policy)
    if flags.get("actor_dist") == "tanh_normal":
        assert policy.mean.abs().max() <= 5 and policy.std.min() >= 0.1
    elif flags:
        assert policy.mean.abs().max() <= 1 and policy.std.min() >= 0.1 and policy.std.max() <= 2.1 + 1e-6
    for value in (policy.sample(), policy.mode()):
        assert value.shape == (50, ACTION) and value.abs().max() <= 1
    assert policy.entropy().isfinite().all()


# IMAGINATION AND ITS RETURNS


def test_imagined_action_t_is_drawn_at_state_t_minus_1_and_led_to_state_t(kind, monkeypatch):
    v2, flags = kind
    agent, n, steps = make_agent(v2, **flags), 5, []
    rssm, draw = agent.world_model.rssm, type(agent.actor(noise(1, FEAT)))
    step, sample = rssm.imagine_step, draw.sample

    def watched_step(state, action):
        steps.append((state, action, step(state, action)))
        return steps[-1][-1]

    monkeypatch.setattr(rssm, "imagine_step", watched_step)
    inputs, drawn = [], []
    agent.actor.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    monkeypatch.setattr(draw, "sample", lambda self: drawn.append(sample(self)) or drawn[-1])
    logit = noise(n, 4, 3)
    start = v2.State(logit, mode(logit).requires_grad_(), noise(n, 8).requires_grad_())
    feat, action, _ = v2.imagine(rssm, agent.actor, start, H)
    assert feat.shape == (H + 1, n, FEAT) and action.shape == (H + 1, n, ACTION)
    assert torch.equal(feat[0], start.feat) and not action[0].any()
    assert len(steps) == len(drawn) == len(inputs) == H
    for t in range(1, H + 1):
        assert torch.equal(inputs[t - 1], feat[t - 1]) and not inputs[t - 1].requires_grad, (
            "the actor's input is stopped"
        )
        assert torch.equal(drawn[t - 1], action[t])
        state, taken, following = steps[t - 1]
        assert torch.equal(state.feat, feat[t - 1]) and torch.equal(taken, action[t])
        assert torch.equal(following.feat, feat[t])


@pytest.mark.parametrize("pred_discount", [True, False])
def test_returns_weights_and_baseline_follow_from_imagined_rewards_discounts_and_the_slow_critic(
    v2, pred_discount, monkeypatch
):
    """Start states are all posteriors; entry 0 of the discounts is the true one; weights are their shifted product."""
    agent = make_agent(v2, pred_discount=pred_discount, td_lambda=0.7, discount=0.9, **STILL)
    names = ("world_model_loss", "imagine", "actor_loss", "critic_loss")
    losses, imagined, actor_loss, critic_loss = (watch(v2, monkeypatch, name) for name in names)
    batch = make_batch(v2)
    make_learner(agent).update(batch)
    start, (feat, action, _), model = imagined[0][0]["start"], imagined[0][1], agent.world_model
    assert torch.equal(start.feat, losses[0][1][1].feat.flatten(0, 1)) and not start.feat.requires_grad
    assert imagined[0][0]["horizon"] == H
    reward, value = model.reward.mean(feat), agent.slow_value(feat)[..., 0]
    discount = torch.full_like(reward, 0.9)
    if pred_discount:
        discount = model.discount(feat)[..., 0].sigmoid()
        discount = torch.cat([0.9 * (1 - batch.is_terminal.flatten().float())[None], discount[1:]])
    target, weights, weight = [value[H]], [], torch.ones(T * B)
    for t in reversed(range(H)):
        target.insert(0, reward[t] + discount[t] * (0.3 * value[t + 1] + 0.7 * target[0]))
    for t in range(H):
        weights.append(weight)
        weight = weight * discount[t]
    target, weights = torch.stack(target[:-1]), torch.stack(weights)
    for name, arguments, last in (("actor", actor_loss[0][0], H - 1), ("critic", critic_loss[0][0], H)):
        check(arguments["target"], target, f"{name}'s targets")
        check(arguments["weight"], weights[:last], f"{name}'s weights")
        assert not arguments["weight"].requires_grad
    check(actor_loss[0][0]["baseline"], value[: H - 1], "baseline")
    assert torch.equal(actor_loss[0][0]["action"], action)
    assert torch.equal(critic_loss[0][0]["feat"], feat[:-1])
    likelihood = dist.Normal(agent.value(feat[:-1])[..., 0], 1).log_prob(target)
    check(critic_loss[0][1], -(weights * likelihood).mean(), "critic's loss")


def test_nothing_imagined_after_a_terminal_start_state_counts(v2, monkeypatch):
    """Its own weight is 1, that of everything later 0, and its return is its reward alone."""
    agent = make_agent(v2, **STILL)
    names = ("lambda_return", "actor_loss", "critic_loss")
    returns, actor_loss, critic_loss = (watch(v2, monkeypatch, name) for name in names)
    batch = make_batch(v2)
    make_learner(agent).update(batch)
    over = batch.is_terminal.flatten()
    for arguments in (actor_loss[0][0], critic_loss[0][0]):
        assert (arguments["weight"][0] == 1).all()
        assert (arguments["weight"][1:, over] == 0).all() and (arguments["weight"][1:, ~over] > 0).all()
    given_to, target = returns[0]
    check(target[0, over], given_to["reward"][0, over])


def test_targets_and_baseline_come_from_the_slow_critic_and_the_critic_is_what_learns(v2, monkeypatch):
    agent = make_agent(v2, **STILL)
    with torch.no_grad():
        for parameter in agent.slow_value.parameters():
            parameter.zero_()
        agent.slow_value[-1].bias.fill_(7)
    returns, actor_loss = watch(v2, monkeypatch, "lambda_return"), watch(v2, monkeypatch, "actor_loss")
    slow = [parameter.clone() for parameter in agent.slow_value.parameters()]
    make_learner(agent).update(make_batch(v2))
    assert (returns[0][0]["value"] == 7).all() and (returns[0][0]["bootstrap"] == 7).all()
    assert (actor_loss[0][0]["baseline"] == 7).all()
    assert all(torch.equal(old, new) for old, new in zip(slow, agent.slow_value.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in agent.slow_value.parameters())
    assert all(parameter.grad.any() for parameter in agent.value.parameters())


def test_discount_head_is_trained_by_cross_entropy_on_the_soft_label_gamma_unless_terminal(v2):
    agent, batch = make_agent(v2, discount=0.9, discount_scale=5.0), make_batch(v2)
    _, post, metrics = v2.world_model_loss(agent.world_model, batch, agent.args)
    mean = agent.world_model.discount(post.feat)[..., 0].sigmoid()
    label = torch.full((T, B), 0.9)
    label[2, 1] = 0
    cross_entropy = -(label * mean.log() + (1 - label) * (1 - mean).log()).mean()
    assert metrics["losses/discount"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_world_model_loss_is_the_sum_of_its_terms(v2):
    flags = {"discount_scale": 5.0, "kl_loss_coeff": 0.3, "kl_alpha": 0.7, "free_nats": 0.0}
    agent, batch = make_agent(v2, **flags), make_batch(v2)
    loss, post, metrics = v2.world_model_loss(agent.world_model, batch, agent.args)
    image = batch.image.flatten(0, 1).float() / 255 - 0.5
    likelihood = dist.Normal(agent.world_model.decoder(post.feat.flatten(0, 1)), 1).log_prob(image)
    check(metrics["losses/image"], -likelihood.sum((1, 2, 3)).mean())
    prior = agent.world_model.rssm.prior(post.deter)
    kl = v2.kl_categorical(post.logit, prior).mean()
    check(metrics["losses/kl"], kl)
    terms = {"image": 1, "reward": 1, "discount": 5, "kl": 0.3}
    check(loss, sum(weight * metrics[f"losses/{name}"] for name, weight in terms.items()))
    check(metrics["latents/prior_entropy"], v2.entropy_categorical(prior).mean())
    check(metrics["latents/post_entropy"], v2.entropy_categorical(post.logit).mean())


# THE ACTOR'S LOSS


def truth(policy, action: torch.Tensor) -> torch.Tensor:
    """log_prob by PyTorch's distributions."""
    if isinstance(policy, atari.OneHot):
        return dist.OneHotCategorical(logits=policy.logits, validate_args=False).log_prob(action)
    if isinstance(policy, continuous.TanhNormal):
        return dist.TransformedDistribution(dist.Normal(*policy), dist.TanhTransform()).log_prob(action).sum(-1)
    normal = dist.Normal(*policy)
    mass = normal.cdf(torch.ones_like(action)) - normal.cdf(-torch.ones_like(action))
    return (normal.log_prob(action) - mass.log()).sum(-1)


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_actor_loss_is_equation_6_with_action_return_baseline_and_weight_aligned(kind, actor_grad, monkeypatch):
    """-mean(w_{t-1} (rho log pi(a_t | s_{t-1}) sg(G_t - v_{t-1}) + (1 - rho) G_t + eta entropy)), t = 1 ... H-1."""
    v2, flags = kind
    n, mix, eta = 5, 0.25, 0.1
    agent = make_agent(v2, actor_grad=actor_grad, actor_grad_mix=mix, actor_entropy=eta, **flags)
    feat, target, baseline = noise(H + 1, n, FEAT), noise(H, n).requires_grad_(), noise(H - 1, n).requires_grad_()
    weight, raw = torch.rand(H - 1, n), noise(H + 1, n, ACTION, seed=4)
    action = (mode(raw) if v2 is atari else 0.9 * torch.tanh(raw)).requires_grad_()
    draws = noise(H - 1, n, ACTION, seed=3)
    if v2 is continuous:
        monkeypatch.setattr(v2, "sample_normal", Draws(draws))
    loss, mean_entropy = v2.actor_loss(agent.actor(feat[:-2]), action, target, baseline, weight, agent.args)
    weights = list(agent.actor.parameters())
    gradients = torch.autograd.grad(loss, [*weights, target, action, baseline], retain_graph=True, allow_unused=True)
    terms, entropies = [], []
    for t in range(1, H):
        policy = agent.actor(feat[t - 1])
        lets_through = actor_grad == "both" and v2 is continuous  # as in the official code
        log_prob = truth(policy, action[t] if lets_through else action[t].detach())
        score = log_prob * (target[t] - baseline[t - 1]).detach()
        objective = {"dynamics": target[t], "reinforce": score, "both": mix * target[t] + (1 - mix) * score}[actor_grad]
        entropy = policy.entropy()
        if isinstance(policy, continuous.TanhNormal):
            entropy = -policy.log_prob(torch.tanh(policy.mean + policy.std * draws[t - 1]))
        entropies.append(entropy)
        terms.append(weight[t - 1] * (objective + eta * entropy))
    expected = -torch.stack(terms).mean()
    check(loss, expected, "loss")
    check(mean_entropy, torch.stack(entropies).mean(), "entropy")
    others = torch.autograd.grad(expected, [*weights, target, action, baseline], allow_unused=True)
    for gradient, other in zip(gradients, others, strict=True):
        if other is not None:
            check_gradient(gradient, other, tolerance=1e-4)
        else:
            assert gradient is None or not gradient.any()
    assert others[-1] is None and (others[-2] is None) == (not lets_through)


def test_entropy_bonus_spreads_the_actor_out(kind):
    """With nothing but the bonus, a step down the loss raises the entropy."""
    v2, flags = kind
    agent = make_agent(v2, actor_grad="reinforce", actor_entropy=1.0, actor_learning_rate=1e-3, **flags)
    feat, action, zeros = noise(H + 1, 200, FEAT), torch.zeros(H + 1, 200, ACTION), torch.zeros(H, 200)
    learner, weight = make_learner(agent), torch.ones(H - 1, 200)
    entropies = []
    for _ in range(30):
        loss, entropy = v2.actor_loss(agent.actor(feat[:-2]), action, zeros, zeros[1:], weight, agent.args)
        agent.zero_grad()
        loss.backward()
        learner.step("actor", loss)
        entropies.append(entropy.item())
    assert entropies[-1] > entropies[0] + 0.01


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_each_of_the_three_losses_gives_gradients_to_its_own_weights_and_to_no_others(kind, actor_grad, monkeypatch):
    v2, flags = kind
    agent = make_agent(v2, actor_grad=actor_grad, actor_entropy=0.1, free_nats=0.0, **flags)
    learner = make_learner(agent)
    modules = {"model": agent.world_model, "actor": agent.actor, "value": agent.value, "slow": agent.slow_value}
    backward, seen = torch.Tensor.backward, []

    def watched(loss):
        agent.zero_grad(set_to_none=True)
        backward(loss)
        touched = {
            name: [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]
            for name, module in modules.items()
        }
        seen.append([name for name, weights in touched.items() if any(weights)])
        assert all(touched[seen[-1][0]]), f"{seen[-1][0]}: not all weights have a gradient"

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    learner(make_batch(v2))
    assert seen == [["model"], ["actor"], ["value"]], "each loss its own weights"
    assert all(
        parameter.requires_grad for part in ("model", "actor", "value") for parameter in modules[part].parameters()
    )
    assert not any(parameter.requires_grad for parameter in agent.slow_value.parameters())


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_the_actors_loss_gets_the_distributions_that_imagined_actions_came_from(kind, actor_grad, monkeypatch):
    """Those at all states but the last two, with the gradients of the actor's weights."""
    v2, flags = kind
    agent = make_agent(v2, actor_grad=actor_grad, **flags)
    calls = check_policy(v2, monkeypatch, agent)
    make_learner(agent).update(make_batch(v2))
    assert calls


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_only_dynamics_gradients_go_through_imagined_actions_and_returns(kind, actor_grad, monkeypatch):
    v2, flags = kind
    agent = make_agent(v2, actor_grad=actor_grad, **flags, **STILL)
    calls = watch(v2, monkeypatch, "actor_loss")
    make_learner(agent).update(make_batch(v2))
    through = actor_grad != "reinforce"
    assert calls[0][0]["target"].requires_grad == calls[0][0]["action"].requires_grad == through


# OPTIMIZERS


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-2])
@pytest.mark.parametrize("name", ["model", "actor", "value"])
def test_weight_decay_multiplies_every_weight_and_bias_by_1_minus_1e_6_whatever_the_learning_rate(
    v2, name, learning_rate
):
    """100 steps at zero gradient, in float64: Adam's own step is zero."""
    agent = make_agent(v2, **{f"{name}_learning_rate": learning_rate}).double()
    assert agent.args.weight_decay == 1e-6, "the default"
    learner = make_learner(agent)
    module = {"model": agent.world_model, "actor": agent.actor, "value": agent.value}[name]
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(100):
        loss = sum(parameter.sum() * 0 for parameter in module.parameters())
        loss.backward()
        learner.step(name, loss)
    for old, new in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 1e-6) ** 100, rtol=1e-12, atol=0)


def test_each_step_is_the_official_one_decay_then_adam_at_the_clipped_gradient(v2):
    """Three steps against a step written by hand, in float64: decay, moments, bias correction, epsilon, global norm."""
    flags = {"actor_learning_rate": 1e-2, "weight_decay": 1e-3, "grad_clip": 1.0, "adam_eps": 1e-5}
    agent = make_agent(v2, **flags).double()
    learner, parameters = make_learner(agent), list(agent.actor.parameters())
    weights = [parameter.detach().clone() for parameter in parameters]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(1, 4):
        gradients = [noise(*w.shape, seed=10 * step).double() * step for w in weights]
        agent.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))
        loss.backward()
        metrics = learner.step("actor", loss)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 1 and metrics["grad_norm/actor"].item() == pytest.approx(norm.item())
        for i, gradient in enumerate(gradients):
            gradient = gradient / (norm + 1e-6)
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m, v = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            weights[i] = weights[i] * (1 - 1e-3) - 1e-2 * m / (v.sqrt() + 1e-5)
            torch.testing.assert_close(parameters[i].detach(), weights[i], rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_finite_leaves_all_weights_as_they_were_even_by_the_decay(v2):
    agent, batch = make_agent(v2), make_batch(v2)
    learner = make_learner(agent)
    learner(batch)
    before = [parameter.detach().clone() for parameter in agent.world_model.parameters()]
    batch.reward[2, 1] = math.nan
    metrics = learner(batch)
    assert metrics["losses/model"].isnan() and metrics["skipped/model"].item() == 1
    assert all(torch.equal(old, new) for old, new in zip(before, agent.world_model.parameters(), strict=True))
    for _ in range(9):
        metrics = learner(batch)
    with pytest.raises(v2.UserError, match="losses/reward"):
        learner.check_finite(metrics)


@pytest.mark.parametrize("finite", ["loss", "gradient", "both"])
def test_a_step_is_skipped_when_either_its_loss_or_its_gradient_is_not_finite(v2, finite):
    agent = make_agent(v2)
    learner, parameters = make_learner(agent), list(agent.actor.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    loss = sum(parameter.sum() for parameter in parameters)
    if finite == "loss":
        loss = loss + (parameters[0] - before[0]).abs().sum().sqrt()  # its slope at 0 is infinite
    if finite == "gradient":
        loss = loss + math.inf
    loss.backward()
    metrics = learner.step("actor", loss)
    assert loss.isfinite().item() is (finite != "gradient")
    assert metrics["grad_norm/actor"].isfinite().item() is (finite != "loss")
    assert metrics["skipped/actor"].item() == (finite != "both")
    assert all(map(torch.equal, before, parameters)) is (finite != "both")


def test_a_resumed_learner_keeps_its_moments_and_takes_learning_rate_and_decay_from_the_flags(v2):
    agent = make_agent(v2)
    learner = make_learner(agent)
    learner(make_batch(v2))
    other = make_agent(v2, actor_learning_rate=0.5, weight_decay=0.25, adam_eps=0.125)
    resumed = make_learner(other)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.updates == 1
    for name, optimizer in resumed.optimizers.items():
        before = learner.optimizers[name].state_dict()["state"]
        for index, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[key], before[index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    (group,) = resumed.optimizers["actor"].param_groups
    assert (group["lr"], group["lr"] * group["weight_decay"], group["eps"]) == (0.5, 0.25, 0.125)


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_every_update_runs_the_same_operations_on_the_same_shapes_whatever_the_batch_holds(kind, actor_grad):
    """So that an update can be captured once and replayed, and never waits for the device."""
    v2, flags = kind
    learner = make_learner(make_agent(v2, actor_grad=actor_grad, **flags))
    learner(make_batch(v2))  # the first creates Adam's moments
    other = make_batch(v2, 2)
    records = []
    for batch in (make_batch(v2, 1), other._replace(is_first=~other.is_first, is_terminal=~other.is_terminal)):
        with Record() as record:
            learner(batch)
        records.append(record.operations)
    assert len(records[0]) > 500
    assert records[0] == records[1]
    assert not [name for name, _ in records[0] if "_local_scalar_dense" in name or "nonzero" in name]


def fixed_categories(logits: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(-1)
    return mode(noise(*logits.shape)) + (probs - probs.detach())


def test_an_update_in_bfloat16_is_finite_and_close_to_float32(kind):
    v2, flags = kind
    results = {}
    for precision in ("float32", "bfloat16"):
        agent = make_agent(v2, precision=precision, free_nats=0.0, **flags, **STILL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(v2, "sample_onehot", fixed_categories)  # one draw for both, whatever the logits' rounding
            results[precision] = make_learner(agent)(make_batch(v2)), agent
    (exact, _), (rough, agent) = results["float32"], results["bfloat16"]
    for name, value in exact.items():
        assert rough[name].isfinite() and rough[name].dtype == value.dtype == torch.float32, name
    for name in ("losses/image", "losses/reward", "losses/discount", "losses/kl"):
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05, abs=0.02), name
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.parameters())


# REPLAY: ATARI'S PRIORITY FOR THE ENDS OF EPISODES

LENGTH = 8


def make_replay(folder, capacity: int, slack: int = 3, streams: int = 1):
    return atari.Replay(folder, capacity * streams, slack, streams, (1, 1, 1), ACTION, CPU)


def fill(replay, episodes: list[int], last_is_finished: bool = True) -> None:
    """Adds episodes of these lengths to every stream; the reward of a row is its number."""
    n = replay.num_envs
    no, image, action = np.zeros(n, bool), np.zeros((n, 1, 1, 1), np.uint8), np.zeros((n, ACTION))
    for length in episodes:
        for i in range(length):
            replay.add(image, action, np.full(n, replay.total), no | (i == 0), no, no | (i == length - 1))
    if not last_is_finished:
        replay.steps["is_last"][(replay.total - 1) % replay.rows] = False


def start_frequencies(replay, draws: int = 500_000) -> np.ndarray:
    """How often each row is a sequence's first."""
    starts = atari.draw_starts(replay, np.random.default_rng(0), np.zeros(draws, int), LENGTH)
    return np.bincount(starts, minlength=replay.total) / draws


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    return np.abs(one - other).sum() / 2


def test_starts_are_rows_or_the_last_possible_one_before_an_end_as_documented(tmp_path):
    """Every row once; where fewer than LENGTH rows are left of its episode, the episode's last LENGTH rows."""
    replay, episodes = make_replay(tmp_path, 100), [20, 5, 30, 8, 17]  # one is shorter than a sequence
    fill(replay, episodes, last_is_finished=False)
    expected, first = np.zeros(replay.total), 0
    for length in episodes:
        for row in range(first, first + length):
            expected[min(row, first + length - LENGTH)] += 1 / replay.total
        first += length
    actual = start_frequencies(replay)
    assert (actual[expected == 0] == 0).all()
    assert total_variation(actual, expected) < 0.01  # 500,000 draws come closer


@pytest.mark.parametrize("n", [LENGTH, 12, 40, 200])
def test_starts_in_one_finished_episode_are_as_likely_as_in_the_official_code(n, tmp_path):
    """The official index is min(randint(n - T + 1 + T), n - T): its last start has T+1 of n+1 shares, ours T of n."""
    replay = make_replay(tmp_path, n)
    fill(replay, [n])
    draws = np.random.default_rng(1).integers(n - LENGTH + 1 + LENGTH, size=500_000)
    official = np.bincount(np.minimum(draws, n - LENGTH), minlength=n) / len(draws)
    actual = start_frequencies(replay)
    assert total_variation(actual, official) < 1 / n + 0.015
    assert actual[n - LENGTH] == pytest.approx(LENGTH / n, abs=0.01)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("total", [LENGTH, 13, 40, 41, 43, 44, 97, 300])
def test_sequences_never_cross_the_write_head_nor_start_before_the_oldest_row(total, streams, tmp_path):
    replay = make_replay(tmp_path, 40, streams=streams)
    lengths = np.random.default_rng(total).integers(1, 20, 300)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), total)]
    fill(replay, [*lengths, total - lengths.sum()], last_is_finished=total % 2 == 0)
    assert replay.total == total
    batch = replay.sample(np.random.default_rng(0), 2000, LENGTH)
    rows = batch.reward.numpy().astype(int)
    assert (np.diff(rows, axis=0) == 1).all()
    assert rows.min() == max(0, total - 40) and rows.max() == total - 1  # the first and the last row take part


def test_every_row_is_seen_and_ends_of_episodes_no_less_than_their_middles(tmp_path):
    replay = make_replay(tmp_path, 300)
    fill(replay, [60] * 5)
    rows = replay.sample(np.random.default_rng(0), 20_000, LENGTH).reward.numpy().astype(int)
    seen = np.bincount(rows.flatten(), minlength=300).reshape(5, 60).mean(0)
    assert seen.min() > 0
    assert seen[-LENGTH:].min() > 0.9 * seen[20:40].mean()
    assert seen[-1] == pytest.approx(seen[20:40].mean(), rel=0.1), "an end is as likely as any row to be seen"

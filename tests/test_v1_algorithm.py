"""What dreamer_v1_continuous.py promises about its algorithm, compared with brute force on small agents."""

import importlib
import math

import numpy as np
import pytest
import torch
from golden_tools import Draws, Record, check, check_gradient, check_policy, noise, step_by_step, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as dist

v1 = importlib.import_module("dreamer_v1_continuous")

CPU = torch.device("cpu")
T, B, H, ACTION = 6, 3, 4, 2  # sequence length, batch, horizon, action size
SMALL = {"stoch_size": 4, "deter_size": 8, "units": 8, "cnn_depth": 1, "obs_embed_size": 6, "imagine_horizon": H}


def make_agent(**flags) -> "v1.Dreamer":
    """A small agent with no parameter at a trivial value; its flags are `agent.args`."""
    torch.manual_seed(0)
    agent = v1.Dreamer(v1.Args(**SMALL | {"cuda": False, "precision": "float32"} | flags), 3, ACTION)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def make_batch(seed: int = 0) -> "v1.Batch":
    """Sequences with an episode that ends, truly, in the middle of the second one."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (T, B, 3, 64, 64), generator=draw, dtype=torch.uint8)
    action = torch.rand(T, B, ACTION, generator=draw) * 2 - 1
    is_first, is_terminal = torch.zeros(2, T, B, dtype=torch.bool)
    is_first[0], is_first[3, 1], is_terminal[2, 1] = True, True, True
    action[is_first] = 0
    return v1.Batch(image, action, torch.randn(T, B, generator=draw), is_first, is_terminal)


def make_learner(agent, **flags) -> "v1.Learner":
    for name, value in flags.items():
        setattr(agent.args, name, value)
    return v1.Learner(agent, agent.args, CPU)


STILL = {"model_learning_rate": 0, "actor_learning_rate": 0, "value_learning_rate": 0}


def random_state(agent, n: int) -> "v1.State":
    stoch, deter = agent.args.stoch_size, agent.args.deter_size
    return v1.State(noise(n, stoch), 0.1 + noise(n, stoch).exp(), noise(n, stoch, seed=1), noise(n, deter, seed=2))


# RETURNS


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_lambda_return_is_the_weighted_sum_of_all_n_step_returns(steps, n, td_lambda, seed):
    """Equation 6, summed in float64; discounts include zeros."""
    draw = torch.Generator().manual_seed(seed)
    reward, value, discount = torch.randn(3, steps, n, generator=draw, dtype=torch.float64)
    discount = discount.abs().clamp(max=1) * (torch.rand(steps, n, generator=draw) > 0.2)
    bootstrap = torch.randn(n, generator=draw, dtype=torch.float64)
    values = torch.cat([value, bootstrap[None]])  # V_0 ... V_T

    def n_step(t: int, k: int) -> torch.Tensor:
        """k rewards from t on, then the value."""
        total, weight = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        for i in range(t, t + k):
            total, weight = total + weight * reward[i], weight * discount[i]
        return total + weight * values[t + k]

    for t, result in enumerate(v1.lambda_return(reward, value, discount, bootstrap, td_lambda)):
        last = steps - t
        expected = td_lambda ** (last - 1) * n_step(t, last)
        for k in range(1, last):
            expected = expected + (1 - td_lambda) * td_lambda ** (k - 1) * n_step(t, k)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


# DISTRIBUTIONS


def test_tanh_normal_has_the_density_of_a_gaussian_squashed_by_tanh():
    mean, std = noise(5, ACTION), noise(5, ACTION, seed=1).exp()
    action = torch.tanh(0.7 * noise(5, ACTION, seed=2))
    squashed = dist.TransformedDistribution(dist.Normal(mean, std), dist.TanhTransform())
    check(v1.TanhNormal(mean, std).log_prob(action), squashed.log_prob(action).sum(-1))


def test_draws_are_gaussians_independent_in_each_element_and_reparameterised():
    torch.manual_seed(0)
    mean, std = torch.tensor([[-1.0, 0.0, 2.0]]).repeat(20_000, 1), torch.tensor([[0.5, 1.0, 3.0]]).repeat(20_000, 1)
    mean.requires_grad_(), std.requires_grad_()
    draw = v1.sample_normal(mean, std)
    standard = ((draw - mean) / std).detach()
    assert standard.mean(0).abs().max() < 0.03 and (standard.std(0) - 1).abs().max() < 0.03
    assert ((standard.abs() < 1).float().mean(0) - 0.6827).abs().max() < 0.02, "as many within one deviation"
    assert (standard.T.corrcoef() - torch.eye(3)).abs().max() < 0.03
    to_mean, to_std = torch.autograd.grad(draw.sum(), (mean, std))
    check(to_mean, torch.ones_like(mean))
    check(to_std, standard)


def test_log_prob_of_actions_at_the_bounds_is_finite_and_so_is_its_gradient():
    mean, std = torch.zeros(2, ACTION, requires_grad=True), torch.ones(2, ACTION, requires_grad=True)
    log_prob = v1.TanhNormal(mean, std).log_prob(torch.tensor([[1.0, -1.0], [-1.0, 0.0]]))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and mean.grad.isfinite().all() and std.grad.isfinite().all()


def test_actor_mode_is_tanh_of_the_mean_which_stays_within_five_and_the_std_starts_at_five():
    agent = make_agent()
    for parameter in agent.actor.parameters():
        torch.nn.init.zeros_(parameter)
    policy = agent.actor(noise(4, 12))
    check(policy.std, torch.full((4, ACTION), 5.0001))
    agent = make_agent()
    policy = agent.actor(1e4 * noise(4, 12))
    assert 4 < policy.mean.abs().max() <= 5 and policy.std.min() >= 1e-4
    assert torch.equal(policy.mode(), torch.tanh(policy.mean))


def test_kl_and_entropy_are_those_of_diagonal_gaussians():
    post, prior = v1.State(noise(7, 4), noise(7, 4, seed=1).exp(), None, None), random_state(make_agent(), 7)
    kl = dist.kl_divergence(dist.Normal(post.mean, post.std), dist.Normal(prior.mean, prior.std))
    check(v1.kl_normal(post, prior), kl.sum(-1))
    check(v1.entropy_normal(post.std), dist.Normal(post.mean, post.std).entropy().sum(-1))


# FILTERING


def test_is_first_in_the_middle_of_a_sequence_equals_starting_a_fresh_sequence_there(monkeypatch):
    rssm, batch, draws = make_agent().world_model.rssm, make_batch(), noise(T, B, 4)
    embed, k = noise(T, B, 6), 3
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    post, prior = rssm.observe(embed, batch.action, batch.is_first)
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws[k:]))
    fresh = rssm.observe(embed[k:], batch.action[k:], torch.zeros_like(batch.is_first[k:]))
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    never = rssm.observe(embed, batch.action, torch.zeros_like(batch.is_first))
    for state, from_k, no_reset in zip((post, prior), fresh, never, strict=True):
        check(state.feat[k:, 1], from_k.feat[:, 1])
        check(state.feat[:, [0, 2]], no_reset.feat[:, [0, 2]])
        assert not torch.allclose(state.feat[k:, 1], no_reset.feat[k:, 1])


def test_nothing_before_a_reset_and_not_its_own_action_reaches_the_states_after_it(monkeypatch):
    rssm, batch, draws = make_agent().world_model.rssm, make_batch(), noise(T, B, 4)
    embed, action = noise(T, B, 6).requires_grad_(), noise(T, B, ACTION).requires_grad_()
    start = v1.State(*(field.requires_grad_() for field in random_state(make_agent(), B)))
    is_first = batch.is_first.clone()
    is_first[0, 2] = False  # this one continues from `start`
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    post, _ = rssm.observe(embed, action, is_first, start)
    embed_grad, action_grad, deter_grad = torch.autograd.grad(post.feat[5].sum(), [embed, action, start.deter])
    assert not embed_grad[:3, 1].any() and embed_grad[3:, 1].any(-1).all()
    assert not action_grad[:4, 1].any() and action_grad[4:, 1].any(-1).all()
    assert not deter_grad[:2].any() and deter_grad[2].any()
    assert not action_grad[0, 0].any() and action_grad[0, 2].any()


def test_filtering_in_two_pieces_equals_filtering_at_once(monkeypatch):
    rssm, batch, draws, embed = make_agent().world_model.rssm, make_batch(), noise(T, B, 4), noise(T, B, 6)
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    whole, _ = rssm.observe(embed, batch.action, batch.is_first)
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    first, _ = rssm.observe(embed[:2], batch.action[:2], batch.is_first[:2])
    state = v1.State(*(field[-1] for field in first))
    second, _ = rssm.observe(embed[2:], batch.action[2:], batch.is_first[2:], state)
    check(torch.cat([first.feat, second.feat]), whole.feat)


@pytest.mark.parametrize("steps", [10, 23])
def test_sequences_of_any_length_are_filtered_step_after_step(steps, monkeypatch):
    """`observe` goes through them in spans of 10 steps."""
    monkeypatch.setattr(v1, "sample_normal", lambda mean, std: mean)
    rssm, embed, action = make_agent().world_model.rssm, noise(steps, B, 6), noise(steps, B, ACTION, seed=1)
    is_first = noise(steps, B, seed=2) > 1.3
    is_first[:, 0] = False
    assert is_first.any()
    embed.requires_grad_()
    post, _ = rssm.observe(embed, action, is_first)
    expected = step_by_step(rssm, embed, action, is_first)
    for name, field in post._asdict().items():
        check(field, getattr(expected, name), name)
    gradient, by_steps = (torch.autograd.grad(states.feat[-1].sum(), embed)[0] for states in (post, expected))
    assert by_steps[0, 0].any(), "the last states depend on all spans"
    check_gradient(gradient, by_steps)


def test_policy_filters_as_training_does_with_the_action_it_took_stored_at_the_next_step(monkeypatch):
    agent, batch = make_agent(), make_batch()
    latent, own = noise(T, B, 4), noise(T, B, ACTION)
    state, actions, states = agent.initial_state(B), [], []
    for t in range(T):
        monkeypatch.setattr(v1, "sample_normal", Draws(latent[t], own[t]))
        action, state = agent.policy(batch.image[t].numpy(), state, batch.is_first[t].numpy())
        actions.append(action)
        states.append(torch.cat(state[:2], -1))
    stored = torch.stack([torch.zeros(B, ACTION), *actions[:-1]])  # index t: the action that led to x_t
    monkeypatch.setattr(v1, "sample_normal", Draws(*latent))
    _, post, _ = v1.world_model_loss(agent.world_model, batch._replace(action=stored), agent.args)
    check(torch.stack(states), post.feat)


def test_latents_are_drawn_also_where_the_action_is_the_mode(monkeypatch):
    agent, image, is_first = make_agent(), make_batch().image[0].numpy(), np.ones(B, bool)
    states = []
    for mode in (True, False):
        monkeypatch.setattr(v1, "sample_normal", lambda mean, std: mean + 3 * std)
        action, (stoch, deter, _) = agent.policy(image, agent.initial_state(B), is_first, mode=mode)
        states.append((stoch, deter))
        if mode:
            check(action, agent.actor(torch.cat([stoch, deter], -1)).mode())
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])


def test_exploration_noise_is_added_to_the_action_and_clipped_to_the_bounds(monkeypatch):
    agent, batch = make_agent(), make_batch()
    draws = noise(B, 4), noise(B, ACTION, seed=1)
    explore = torch.tensor([[0.5, -0.5], [100.0, -100.0], [0.0, 0.1]])
    arguments = batch.image[0].numpy(), agent.initial_state(B), batch.is_first[0].numpy()
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws))
    plain, _ = agent.policy(*arguments)
    monkeypatch.setattr(v1, "sample_normal", Draws(*draws, explore))
    noisy, state = agent.policy(*arguments, noise=0.3)
    check(noisy, (plain + 0.3 * explore).clamp(-1, 1))
    assert torch.equal(state[2], noisy)  # the next state follows from the action that was taken
    assert noisy[1].tolist() == [1, -1]


# IMAGINATION


def imagine_draws(actor_noise, latent_noise) -> Draws:
    """The actor's draw, then the latent's, at every step."""
    return Draws(*(draw for pair in zip(actor_noise, latent_noise, strict=True) for draw in pair))


def test_imagined_action_t_is_drawn_at_state_t_minus_1_and_led_to_state_t(monkeypatch):
    agent, n = make_agent(), 5
    rssm, start = agent.world_model.rssm, random_state(agent, n)
    actor_noise, latent_noise = noise(H, n, ACTION), noise(H, n, 4, seed=1)
    monkeypatch.setattr(v1, "sample_normal", imagine_draws(actor_noise, latent_noise))
    feat, action, _ = v1.imagine(rssm, agent.actor, start, H)
    assert feat.shape == (H + 1, n, 12) and action.shape == (H + 1, n, ACTION)
    assert torch.equal(feat[0], start.feat) and not action[0].any()
    state = start
    for t in range(1, H + 1):
        monkeypatch.setattr(v1, "sample_normal", Draws(actor_noise[t - 1]))
        check(action[t], agent.actor(state.feat).sample())
        monkeypatch.setattr(v1, "sample_normal", Draws(latent_noise[t - 1]))
        state = rssm.imagine_step(state, action[t])
        check(feat[t], state.feat)


@pytest.mark.parametrize("pred_discount", [False, True])
def test_imagination_starts_at_every_posterior_but_with_a_discount_head_not_at_the_last(pred_discount, monkeypatch):
    agent = make_agent(pred_discount=pred_discount)
    losses, imagined = watch(v1, monkeypatch, "world_model_loss"), watch(v1, monkeypatch, "imagine")
    make_learner(agent)(make_batch())
    post, start = losses[0][1][1], imagined[0][0]["start"]
    used = T - 1 if pred_discount else T
    assert torch.equal(start.feat, post.feat[:used].flatten(0, 1))
    assert not start.feat.requires_grad
    assert imagined[0][0]["horizon"] == H


def test_nothing_imagined_from_a_terminal_state_counts_wherever_in_the_sequence_it_stands(monkeypatch):
    agent = make_agent(pred_discount=True)
    actor_loss, critic_loss = watch(v1, monkeypatch, "actor_loss"), watch(v1, monkeypatch, "critic_loss")
    batch = make_batch()
    make_learner(agent).update(batch)
    over = batch.is_terminal[:-1].flatten()
    assert over.any()
    for arguments in (actor_loss[0][0], critic_loss[0][0]):
        assert (arguments["weight"][:, over] == 0).all() and (arguments["weight"][:, ~over] > 0).all()


def test_the_actors_input_takes_no_gradient(monkeypatch):
    """Actions depend on the start state by value only, and no earlier action acts on a later one's gradient."""
    agent, n = make_agent(), 5
    start = v1.State(*(field.requires_grad_() for field in random_state(agent, n)))
    actor_noise, latent_noise = noise(H, n, ACTION), noise(H, n, 4, seed=1)
    monkeypatch.setattr(v1, "sample_normal", imagine_draws(actor_noise, latent_noise))
    feat, action, _ = v1.imagine(agent.world_model.rssm, agent.actor, start, H)
    weights, cotangent = list(agent.actor.parameters()), noise(H, n, ACTION, seed=2)
    of = [start.stoch, start.deter, *weights]
    stoch, deter, *gradients = torch.autograd.grad((cotangent * action[1:]).sum(), of, allow_unused=True)
    assert stoch is None and deter is None
    policy = agent.actor(feat[:-1].detach())
    alone = torch.tanh(policy.mean + policy.std * actor_noise)
    for gradient, expected in zip(gradients, torch.autograd.grad((cotangent * alone).sum(), weights), strict=True):
        check_gradient(gradient, expected)


def test_the_gradient_reaches_the_actor_through_the_dynamics_and_nowhere_else(monkeypatch):
    batch, agent = make_batch(), make_agent(**STILL)

    def actor_gradient() -> float:
        make_learner(agent)(batch)
        return max(parameter.grad.abs().max().item() for parameter in agent.actor.parameters())

    assert actor_gradient() > 1e-4
    step = v1.RSSM.imagine_step
    monkeypatch.setattr(v1.RSSM, "imagine_step", lambda self, state, action: step(self, state, action.detach()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        actor_gradient()


# THE THREE LOSSES


@pytest.mark.parametrize("pred_discount", [False, True])
@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_each_of_the_three_losses_gives_gradients_to_its_own_weights_and_to_no_others(
    actor_grad, pred_discount, monkeypatch
):
    agent = make_agent(actor_grad=actor_grad, pred_discount=pred_discount, actor_entropy=0.1, free_nats=0)
    learner = make_learner(agent)
    modules = {"model": agent.world_model, "actor": agent.actor, "value": agent.value}
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
    learner(make_batch())
    assert seen == [["model"], ["actor"], ["value"]], "each loss its own weights"
    assert all(parameter.requires_grad for parameter in agent.parameters())


def test_all_three_losses_are_of_the_weights_before_the_update():
    """As in the official code, which takes its three steps at the end: the model's step does not move the others."""
    losses = []
    for learning_rate in (0.0, 0.1):
        metrics = make_learner(make_agent(), model_learning_rate=learning_rate)(make_batch())
        losses.append([metrics[f"losses/{name}"].item() for name in ("model", "actor", "value")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pred_discount", [False, True])
@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_returns_and_weights_follow_from_imagined_rewards_values_and_discounts(actor_grad, pred_discount, monkeypatch):
    """Weights are cumprod([1, discount, discount, ...]), cut from the graph, and with a discount head 0 from a terminal
    state; the start state has a return, for the critic, only with `reinforce`."""
    agent, batch = make_agent(pred_discount=pred_discount, actor_grad=actor_grad, **STILL), make_batch()
    first = 0 if actor_grad == "reinforce" else 1
    imagined, actor_loss, critic_loss = (watch(v1, monkeypatch, f) for f in ("imagine", "actor_loss", "critic_loss"))
    make_learner(agent, td_lambda=0.7, discount=0.9)(batch)
    feat = imagined[0][1][0]
    model, rows = agent.world_model, feat.shape[1]
    reward, value = model.reward(feat)[..., 0], agent.value(feat)[..., 0]
    discount = model.discount(feat)[..., 0].sigmoid() if pred_discount else torch.full((H + 1, rows), 0.9)
    alive = 1 - batch.is_terminal[:-1].flatten().float() if pred_discount else torch.ones(rows)
    returns, weights, weight = [value[H]], [], alive
    for t in range(H - 1, first - 1, -1):
        returns.insert(0, reward[t] + discount[t] * (0.3 * value[t + 1] + 0.7 * returns[0]))
    for t in range(first, H):
        weights.append(weight)
        weight = weight * discount[t]
    returns, weights = torch.stack(returns[:-1]), torch.stack(weights)
    to_actor, to_critic = actor_loss[0][0], critic_loss[0][0]
    check(to_critic["returns"], returns, "the critic's returns")
    check(to_critic["weight"], weights, "the critic's weights")
    assert torch.equal(to_critic["feat"], feat[first:-1])
    check(to_actor["returns"], returns[1 - first :], "the actor's returns: actions earn them")
    check(to_actor["weight"], weights[: H - 1], "the actor's weights: of the state where the action was drawn")
    assert not to_actor["weight"].requires_grad
    if actor_grad == "dynamics":
        check(actor_loss[0][1][0], -(weights * returns).mean(), "actor loss")
    likelihood = dist.Normal(value[first:H], 1).log_prob(returns)
    check(critic_loss[0][1], -(weights * likelihood).mean(), "value loss")
    if not pred_discount and first:
        assert torch.equal(weights[:, 0], torch.tensor([1, 0.9, 0.9]).cumprod(0))


def test_gradients_of_the_returns_pass_through_rewards_values_and_discounts():
    agent = make_agent(pred_discount=True, td_lambda=0.7)
    model = agent.world_model
    feat, _, _, returns, _ = v1.imagined_returns(agent, random_state(agent, 5), agent.args)
    reward, value, discount = (net(feat)[..., 0] for net in (model.reward, agent.value, model.discount))
    discount, expected = discount.sigmoid(), [value[H]]
    for t in range(H - 1, 0, -1):
        expected.insert(0, reward[t] + discount[t] * (0.3 * value[t + 1] + 0.7 * expected[0]))
    gradient, by_hand = (
        torch.autograd.grad(x.sum(), feat, retain_graph=True)[0] for x in (returns, sum(expected[:-1]))
    )
    check_gradient(gradient, by_hand)


def test_actor_gradient_takes_part_in_the_returns_as_actor_grad_says():
    """dynamics: all of -mean(w * G); reinforce: none, the returns are data; both: the share actor_grad_mix."""
    n = 5
    feat, returns = noise(H + 1, n, 12), noise(H - 1, n).requires_grad_()
    action, weight = torch.tanh(noise(H + 1, n, ACTION)), torch.rand(H - 1, n)
    for actor_grad, share in (("dynamics", 1), ("reinforce", 0), ("both", 0.25)):
        agent = make_agent(actor_grad=actor_grad, actor_grad_mix=0.25)
        loss = v1.actor_loss(agent.actor(feat[:-2]), agent.value, feat, action, returns, weight, agent.args)[0]
        (gradient,) = torch.autograd.grad(loss, returns, allow_unused=True)
        check_gradient(gradient, -share * weight / weight.numel(), actor_grad)


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_the_actor_loss_is_the_returns_or_their_score_function_and_the_entropy_bonus(actor_grad, monkeypatch):
    """-mean(w * (log pi(a_t | s_{t-1}) * (G_t - V(s_{t-1})) + eta * entropy)); the advantage and a_t are data."""
    agent, n, mix, eta = make_agent(actor_grad=actor_grad), 5, 0.25, 0.1
    agent.args.actor_grad_mix, agent.args.actor_entropy = mix, eta
    feat, returns, weight = noise(H + 1, n, 12), noise(H - 1, n), torch.rand(H - 1, n)
    action, draws = torch.tanh(noise(H + 1, n, ACTION)).requires_grad_(), noise(H - 1, n, ACTION, seed=3)
    monkeypatch.setattr(v1, "sample_normal", Draws(draws))
    loss = v1.actor_loss(agent.actor(feat[:-2]), agent.value, feat, action, returns, weight, agent.args)[0]
    weights = list(agent.actor.parameters())
    gradients = torch.autograd.grad(loss, weights, retain_graph=True)
    terms = []
    for t in range(1, H):  # the action at t, drawn at t - 1, earns the return at t, which is entry t - 1 of `returns`
        policy = agent.actor(feat[t - 1])
        squashed = dist.TransformedDistribution(dist.Normal(policy.mean, policy.std), dist.TanhTransform(cache_size=1))
        advantage = (returns[t - 1] - agent.value(feat[t - 1])[:, 0]).detach()
        score = squashed.log_prob(action[t].detach()).sum(-1) * advantage
        own = torch.tanh(policy.mean + policy.std * draws[t - 1])
        entropy = -v1.TanhNormal(policy.mean, policy.std).log_prob(own)
        mixture = mix * returns[t - 1] + (1 - mix) * score
        objective = {"dynamics": returns[t - 1], "reinforce": score, "both": mixture}[actor_grad]
        terms.append(weight[t - 1] * (objective + eta * entropy))
    expected = -torch.stack(terms).mean()
    check(loss, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, weights), strict=True):
        check_gradient(gradient, other, tolerance=1e-4)
    unused = [action, *agent.value.parameters()]
    assert all(g is None or not g.any() for g in torch.autograd.grad(loss, unused, allow_unused=True))


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_the_actors_loss_gets_the_distributions_that_imagined_actions_came_from(actor_grad, monkeypatch):
    """Those at all states but the last two, with the gradients of the actor's weights."""
    agent = make_agent(actor_grad=actor_grad)
    calls = check_policy(v1, monkeypatch, agent)
    make_learner(agent).update(make_batch())
    assert calls


def test_under_reinforce_the_imagined_returns_carry_no_graph(monkeypatch):
    calls = watch(v1, monkeypatch, "lambda_return")
    make_learner(make_agent(actor_grad="reinforce"))(make_batch())
    assert not calls[0][1].requires_grad


def kl_gradients(free_nats: float, kl_loss_coeff: float = 1.0) -> dict[str, torch.Tensor | None]:
    agent = make_agent(free_nats=free_nats, kl_loss_coeff=kl_loss_coeff)
    torch.manual_seed(1)
    loss, _, metrics = v1.world_model_loss(agent.world_model, make_batch(), agent.args)
    names, parameters = zip(*agent.world_model.named_parameters(), strict=True)
    divergence = loss - metrics["losses/image"] - metrics["losses/reward"]
    return dict(zip(names, torch.autograd.grad(divergence, parameters, allow_unused=True), strict=True))


def test_kl_gradient_reaches_the_posterior_and_the_prior_in_proportion_to_its_coefficient():
    gradients, doubled = kl_gradients(free_nats=0), kl_gradients(free_nats=0, kl_loss_coeff=2)
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    parts = ("encoder", "rssm.post_hidden", "rssm.post_stats", "rssm.prior_hidden", "rssm.prior_stats", "rssm.gru")
    assert all(any(name.startswith(part) for name in reached) for part in parts)
    assert not any(name.startswith(("decoder", "reward")) for name in reached)
    for name in reached:
        check_gradient(doubled[name], 2 * gradients[name], name)


def test_kl_gradient_vanishes_when_the_mean_kl_is_under_the_free_nats():
    assert all(gradient is None or not gradient.any() for gradient in kl_gradients(free_nats=1000).values())


def test_free_nats_bound_the_mean_kl_and_not_each_step(monkeypatch):
    agent, kl = make_agent(), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]])  # mean 3
    monkeypatch.setattr(v1, "kl_normal", lambda post, prior: kl)
    batch = v1.Batch(*(field[:2] for field in make_batch()))
    for free_nats, expected in ((0, 3), (2.9, 3), (3.5, 3.5)):
        agent.args.free_nats = free_nats
        loss, _, metrics = v1.world_model_loss(agent.world_model, batch, agent.args)
        rest = metrics["losses/image"] + metrics["losses/reward"]
        assert (loss - rest).item() == pytest.approx(expected, abs=2e-3)  # rounding of a loss of 11,000
        assert metrics["losses/kl"].item() == 3


def test_image_and_reward_terms_are_unit_gaussians_summed_over_pixels_and_averaged_over_the_batch():
    agent, batch = make_agent(), make_batch()
    _, post, metrics = v1.world_model_loss(agent.world_model, batch, agent.args)
    feat = post.feat.flatten(0, 1)
    image = batch.image.flatten(0, 1).float() / 255 - 0.5
    image_nll = -dist.Normal(agent.world_model.decoder(feat), 1).log_prob(image).sum((1, 2, 3))
    reward_nll = -dist.Normal(agent.world_model.reward(feat)[:, 0], 1).log_prob(batch.reward.flatten())
    check(metrics["losses/image"], image_nll.mean())
    check(metrics["losses/reward"], reward_nll.mean())


def test_discount_head_is_trained_by_cross_entropy_on_the_soft_label_gamma_unless_terminal():
    agent, batch = make_agent(pred_discount=True, discount=0.9, discount_scale=5.0, free_nats=1000), make_batch()
    torch.manual_seed(1)
    loss, post, metrics = v1.world_model_loss(agent.world_model, batch, agent.args)
    mean = agent.world_model.discount(post.feat)[..., 0].sigmoid()
    label = torch.full((T, B), 0.9)
    label[2, 1] = 0
    cross_entropy = -(label * mean.log() + (1 - label) * (1 - mean).log()).mean()
    discount = metrics["losses/discount"]
    assert discount.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    check(loss, metrics["losses/image"] + metrics["losses/reward"] + 5 * discount + 1000)
    head = agent.world_model.discount
    expected = torch.autograd.grad(5 * cross_entropy, list(head.parameters()), retain_graph=True)
    for actual, other in zip(torch.autograd.grad(loss, list(head.parameters())), expected, strict=True):
        check_gradient(actual, other, tolerance=1e-4)


# OPTIMIZERS


def snapshot(learner, name: str, module) -> list[torch.Tensor]:
    """Weights and Adam's moments and step counts."""
    states = [learner.optimizers[name].state[parameter] for parameter in module.parameters()]
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step")]
    return [tensor.detach().clone() for tensor in [*module.parameters(), *moments]]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def nan_batch():
    batch = make_batch(1)
    batch.reward[2, 1] = math.nan
    return batch


def test_a_loss_that_is_not_finite_leaves_its_weights_and_adam_moments_bit_identical(nan_batch):
    agent = make_agent()
    learner = make_learner(agent)
    learner(make_batch())
    before = snapshot(learner, "model", agent.world_model), snapshot(learner, "actor", agent.actor)
    metrics = learner(nan_batch)
    assert metrics["losses/model"].isnan() and metrics["skipped/model"].item() == 1
    assert same_bits(snapshot(learner, "model", agent.world_model), before[0])
    assert metrics["skipped/actor"].item() == 0
    assert not same_bits(snapshot(learner, "actor", agent.actor), before[1])  # imagination was sound
    learner(make_batch())
    after = snapshot(learner, "model", agent.world_model)
    assert not same_bits(after, before[0]) and all(tensor.isfinite().all() for tensor in after)


def test_a_gradient_that_is_not_finite_leaves_its_weights_and_adam_moments_bit_identical():
    agent = make_agent()
    learner = make_learner(agent)
    learner(make_batch())
    before = snapshot(learner, "value", agent.value)
    hook = next(agent.value.parameters()).register_hook(lambda gradient: gradient * math.inf)
    metrics = learner(make_batch())
    assert metrics["losses/value"].isfinite() and metrics["skipped/value"].item() == 1
    assert same_bits(snapshot(learner, "value", agent.value), before)
    hook.remove()
    learner(make_batch())
    assert not same_bits(snapshot(learner, "value", agent.value), before)


def test_a_first_update_that_is_skipped_leaves_the_initial_weights(nan_batch):
    agent = make_agent()
    before = [parameter.detach().clone() for parameter in agent.world_model.parameters()]
    make_learner(agent)(nan_batch)
    assert same_bits([parameter.detach() for parameter in agent.world_model.parameters()], before)


def test_ten_skipped_updates_in_a_row_raise_an_error_naming_the_term(nan_batch):
    learner = make_learner(make_agent())
    for _ in range(9):
        metrics = learner(nan_batch)
    learner.check_finite(metrics)
    learner.check_finite(learner(make_batch()))  # the row is broken: counting starts again
    for _ in range(9):
        metrics = learner(nan_batch)
    learner.check_finite(metrics)
    metrics = learner(nan_batch)
    with pytest.raises(v1.UserError, match="losses/reward"):
        learner.check_finite(metrics)
    assert metrics["skipped/model"].item() == 19


@pytest.mark.parametrize("name", ["model", "actor", "value"])
def test_each_gradient_is_clipped_at_its_global_norm(name):
    """All of a part's weights are scaled by one factor to norm `grad_clip`; below it nothing is touched."""

    def gradients(grad_clip: float) -> tuple[torch.Tensor, float]:
        agent = make_agent(**STILL)
        torch.manual_seed(1)
        metrics = make_learner(agent, grad_clip=grad_clip)(make_batch())
        module = {"model": agent.world_model, "actor": agent.actor, "value": agent.value}[name]
        return torch.cat([p.grad.flatten() for p in module.parameters()]), metrics[f"grad_norm/{name}"].item()

    free, norm = gradients(1e9)
    assert norm == pytest.approx(free.norm().item(), rel=1e-5)
    clipped, reported = gradients(norm / 10)
    assert reported == pytest.approx(norm, rel=1e-5)  # what is logged is the norm before clipping
    assert clipped.norm().item() == pytest.approx(norm / 10, rel=1e-4)
    check_gradient(clipped * 10, free, tolerance=1e-4)
    above, _ = gradients(norm * 10)
    assert torch.equal(above, free)


def test_each_part_takes_the_adam_step_of_its_own_learning_rate():
    rates = {"model": 1e-2, "actor": 1e-3, "value": 1e-4}
    agent = make_agent(**{f"{name}_learning_rate": rate for name, rate in rates.items()}, grad_clip=1e9)
    parts = {"model": agent.world_model, "actor": agent.actor, "value": agent.value}
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    make_learner(agent)(make_batch())
    for name, part in parts.items():
        step = torch.cat([(p - old).flatten() for p, old in zip(part.parameters(), before[name], strict=True)])
        gradient = torch.cat([p.grad.flatten() for p in part.parameters()])
        check(step / rates[name], -gradient / (gradient.abs() + agent.args.adam_eps), name, tolerance=5e-3)


def test_later_steps_are_those_of_adam_with_its_usual_betas():
    rates = {f"{name}_learning_rate": 1e-3 for name in ("model", "actor", "value")}
    agent = make_agent(**rates, grad_clip=1e9)
    twins = [parameter.detach().clone() for parameter in agent.parameters()]
    adam, learner = torch.optim.Adam(twins, 1e-3, (0.9, 0.999), agent.args.adam_eps), make_learner(agent)
    for seed in range(4):
        learner(make_batch(seed))
        for twin, parameter in zip(twins, agent.parameters(), strict=True):
            twin.grad = parameter.grad.clone()
        adam.step()
    for twin, (name, parameter) in zip(twins, agent.named_parameters(), strict=True):
        check(parameter, twin, name)


# SHAPES AND PRECISION


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
@pytest.mark.parametrize("pred_discount", [False, True])
def test_every_update_runs_the_same_operations_on_the_same_shapes(actor_grad, pred_discount, nan_batch):
    """Whatever the batch holds, and none of them waits for a value, so that an update can be one CUDA graph."""
    learner = make_learner(make_agent(actor_grad=actor_grad, pred_discount=pred_discount))
    learner(make_batch())  # the first creates Adam's moments
    other = make_batch(2)
    records = []
    for batch in (make_batch(1), other._replace(is_first=~other.is_first, is_terminal=~other.is_terminal), nan_batch):
        with Record() as record:
            learner(batch)
        records.append(record.operations)
    assert len(records[0]) > 500
    assert records[0] == records[1] == records[2]
    assert not [name for name, _ in records[0] if "_local_scalar_dense" in name or "nonzero" in name]


def seeded_draws(seed: int):
    """Stands in for `sample_normal` and draws the same whatever the precision."""
    draw = torch.Generator().manual_seed(seed)
    return lambda mean, std: mean + std * torch.randn(mean.shape, generator=draw)


@pytest.mark.parametrize("actor_grad", ["dynamics", "reinforce", "both"])
def test_an_update_in_bfloat16_is_finite_and_close_to_float32_in_losses_and_gradients(actor_grad, monkeypatch):
    results = {}
    for precision in ("float32", "bfloat16"):
        agent = make_agent(precision=precision, actor_grad=actor_grad, actor_entropy=1e-3, free_nats=0, **STILL)
        monkeypatch.setattr(v1, "sample_normal", seeded_draws(3))  # the same draws for both
        metrics = make_learner(agent)(make_batch())
        parts = agent.world_model, agent.actor, agent.value
        results[precision] = metrics, [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in parts]
    (exact, gradients), (rough, rough_gradients) = results["float32"], results["bfloat16"]
    for name, value in exact.items():
        assert rough[name].isfinite() and rough[name].dtype == value.dtype == torch.float32, name
        if name.startswith("losses/"):
            assert rough[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name
    for gradient, other in zip(gradients, rough_gradients, strict=True):
        assert torch.cosine_similarity(gradient, other, 0) > 0.95
        assert other.norm().item() == pytest.approx(gradient.norm().item(), rel=0.1)


# REPLAY

CAPACITY, SLACK, STREAMS, LENGTH = 12, 3, 2, 4


def make_replay(folder) -> "v1.Replay":
    return v1.Replay(folder, CAPACITY * STREAMS, SLACK, STREAMS, (1, 2, 2), ACTION, CPU)


def fill(replay, rows: int) -> list[dict[str, np.ndarray]]:
    """Adds rows of random content, episodes of five steps; the reward is 1000 * stream + row. Returns them."""
    rng, added = np.random.default_rng(replay.total), []
    for index in range(replay.total, replay.total + rows):
        row = {
            "image": rng.integers(256, size=(STREAMS, 1, 2, 2), dtype=np.uint8),
            "action": rng.uniform(-1, 1, (STREAMS, ACTION)).astype(np.float32),
            "reward": 1000 * np.arange(STREAMS, dtype=np.float32) + index,
            "is_first": np.full(STREAMS, index % 5 == 0),
            "is_terminal": rng.random(STREAMS) < 0.3,
            "is_last": np.full(STREAMS, index % 5 == 4),
        }
        replay.add(**row)
        added.append(row)
    return added


def samples(replay, count: int, seed: int = 0) -> tuple["v1.Batch", np.ndarray, np.ndarray]:
    """A batch, its streams (B,) and row numbers (T, B) as the rewards tell them."""
    batch = replay.sample(np.random.default_rng(seed), count, LENGTH)
    stream, rows = np.divmod(batch.reward.numpy().astype(int), 1000)
    assert (stream == stream[0]).all(), "a sample mixes streams"
    return batch, stream[0], rows


@pytest.mark.parametrize("total", [LENGTH, 7, CAPACITY, CAPACITY + 2, CAPACITY + SLACK, 40])
def test_samples_are_consecutive_steps_of_one_stream_and_never_cross_the_write_head(total, tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, total)
    _, _, rows = samples(replay, 500)
    assert (np.diff(rows, axis=0) == 1).all()
    assert rows.min() == max(0, total - CAPACITY) and rows.max() == total - 1  # the first and the last row take part


def test_samples_wrap_around_the_end_of_the_ring_and_may_cross_episodes(tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, 40)
    batch, _, rows = samples(replay, 500)
    places = rows % replay.rows
    assert (places[-1] < places[0]).any()
    assert batch.is_first[1:].any() and not batch.is_first[1:].all()


def test_the_first_row_of_a_sample_counts_as_is_first_and_the_others_are_as_stored(tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, 40)
    batch, _, rows = samples(replay, 200)
    assert batch.is_first[0].all()
    assert np.array_equal(batch.is_first[1:].numpy(), rows[1:] % 5 == 0)
    again, _, _ = samples(replay, 200)
    assert torch.equal(again.is_first, batch.is_first)
    assert replay.steps["is_first"].mean() < 0.5  # the flag is set in the sample, not in the store


@pytest.mark.parametrize("total", [7, 40])
def test_samples_are_uniform_over_streams_and_starts(total, tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, total)
    starts = min(total, CAPACITY) - LENGTH + 1
    count = 1000 * STREAMS * starts
    _, stream, rows = samples(replay, count)
    cells = np.bincount(stream * starts + rows[0] - rows[0].min(), minlength=STREAMS * starts)
    chi_square = ((cells - 1000) ** 2 / 1000).sum()
    freedom = STREAMS * starts - 1
    assert len(cells) == STREAMS * starts
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), cells


def test_every_stored_transition_comes_back_bit_for_bit_also_after_reopening(tmp_path):
    replay = make_replay(tmp_path)
    stored = fill(replay, 40)
    replay.steps.flush()
    reopened = make_replay(tmp_path)
    reopened.restore(40)
    for store in (replay, reopened):
        batch, stream, rows = samples(store, 500)
        for t, b in np.ndindex(rows.shape):
            row = stored[rows[t, b]]
            for name in ("image", "action", "reward", "is_terminal"):
                assert np.array_equal(getattr(batch, name)[t, b].numpy(), row[name][stream[b]]), name
        seen = {(env, row) for env, row in zip(np.broadcast_to(stream, rows.shape).flat, rows.flat, strict=True)}
        assert len(seen) == STREAMS * CAPACITY
    assert [field.dtype for field in batch] == [torch.uint8, torch.float32, torch.float32, torch.bool, torch.bool]
    assert batch.image.shape == (LENGTH, 500, 1, 2, 2)


def test_rows_written_after_a_checkpoint_do_not_touch_those_it_counts_on(tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, 40)
    before, _, _ = samples(replay, 100)
    fill(replay, SLACK)
    replay.steps.flush()
    reopened = make_replay(tmp_path)
    reopened.restore(40)
    after, _, _ = samples(reopened, 100)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("field", ["image", "action", "reward", "is_first", "is_terminal", "is_last", "checksum"])
def test_a_changed_byte_in_the_file_is_detected_when_the_replay_is_restored(field, tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, 40)
    index, env = 35, 1
    offset = replay.steps.offset + (index % replay.rows * STREAMS + env) * replay.fields.itemsize
    offset += replay.fields.fields[field][1]
    replay.steps.flush()
    with open(replay.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(v1.UserError, match=f"checksum in row {index} of environment {env}"):
        make_replay(tmp_path).restore(40)


def test_a_row_in_another_ones_place_is_detected_when_the_replay_is_restored(tmp_path):
    replay = make_replay(tmp_path)
    fill(replay, 40)
    replay.steps[34 % replay.rows, 1] = replay.steps[35 % replay.rows, 1].copy()
    replay.steps.flush()
    with pytest.raises(v1.UserError, match="checksum in row 34 of environment 1"):
        make_replay(tmp_path).restore(40)


@pytest.mark.parametrize("closed", [[True, True], [False, True]])
def test_close_streams_ends_those_streams_at_their_last_row_and_changes_nothing_else(closed, tmp_path):
    replay = make_replay(tmp_path)
    replay.close_streams(np.array(closed))  # nothing there: nothing to end
    fill(replay, 38)  # row 37 is in the middle of an episode
    before = replay.steps.copy()
    replay.close_streams(np.array(closed))
    last = 37 % replay.rows
    assert not before["is_last"][last].any() and replay.steps["is_last"][last].tolist() == closed
    names = [name for name in replay.fields.names if name not in ("is_last", "checksum")]
    assert all(np.array_equal(before[name], replay.steps[name]) for name in names)
    others = np.arange(replay.rows) != last
    assert np.array_equal(before[others], replay.steps[others])
    replay.steps.flush()
    make_replay(tmp_path).restore(38)  # checksums hold

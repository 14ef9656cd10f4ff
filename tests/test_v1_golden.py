"""dreamer_v1_continuous.py computes what the official TensorFlow code computes, given the same weights and draws.

Values agree to 1e-5 * max(1, largest entry), gradients to 5e-5 of the array's largest entry, or a test says why not.
The golden vectors are batch-major, ours are time-major.
"""

import importlib
import math

import pytest
import torch
from golden_tools import Draws, check, check_gradient, check_gradients, conv, dense, gru, load, parameters, time_major

v1 = importlib.import_module("dreamer_v1_continuous")

RSSM = {
    "input": (dense, "img1"),
    "gru": (gru, "cell"),
    "prior_hidden": (dense, "img2"),
    "prior_stats": (dense, "img3"),
    "post_hidden": (dense, "obs1"),
    "post_stats": (dense, "obs2"),
}
ENCODER = {f"convs.{i}": (conv, f"h{i + 1}") for i in range(4)}
DECODER = {"linear": (dense, "h1")} | {f"convs.{i}": (conv, f"h{i + 2}") for i in range(4)}


def mlp(layers: int) -> dict:
    return {str(2 * i): (dense, f"h{i}") for i in range(layers)} | {str(2 * layers): (dense, "hout")}


def recorded_state(arrays, name: str, swap: bool = False) -> "v1.State":
    """The latent states recorded under `name`; `swap`: (B, T, ...) to (T, B, ...)."""
    fields = (arrays[f"{name}/{field}"] for field in v1.State._fields)
    return v1.State(*(time_major(field) if swap else field for field in fields))


def check_state(actual, expected, name: str, fields=("mean", "std", "stoch", "deter")) -> None:
    for field in fields:
        check(getattr(actual, field), getattr(expected, field), f"{name}/{field}")


# CELLS AND NETWORKS


def test_gru_is_the_official_cell_over_an_unroll_and_in_its_gradients():
    a = load("v1_gru")
    rssm = v1.RSSM(stoch_size=6, deter_size=16, hidden_size=12, action_size=4, embed_size=10)
    cell = rssm.gru
    cell.load_state_dict(gru(a, "w/cell"))
    x = a["in/x"].clone().requires_grad_()
    states = [a["in/h0"].clone().requires_grad_()]
    for t in range(len(x)):
        states.append(cell(x[t], states[-1]))
    check(states[1], a["out/one_step"])
    unroll = torch.stack(states[1:])
    check(unroll, a["out/unroll"])
    (a["in/cot"] * unroll).sum().backward()
    check_gradient(x.grad, a["grad/x"], "x")
    check_gradient(states[0].grad, a["grad/h0"], "h0")
    check_gradients(cell, [p.grad for p in cell.parameters()], gru(a, "grad/w/cell"))


def test_encoder_gives_the_official_embedding_and_gradients():
    a = load("v1_encoder")
    encoder = v1.Encoder(channels=3, depth=4, embed_size=0)
    encoder.load_state_dict(parameters(a, "w", ENCODER))
    image = a["in/image_uint8"].flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - 0.5
    embed = encoder(image)
    check(embed, a["out/embed"].flatten(0, 1))
    (a["in/cot"].flatten(0, 1) * embed).sum().backward()
    check_gradients(encoder, [p.grad for p in encoder.parameters()], parameters(a, "grad/w", ENCODER))


def test_reward_and_value_heads_give_the_official_log_likelihood_and_gradients():
    a = load("v1_dense_normal")
    head = v1.MLP(10, 12, 2, 1)
    head.load_state_dict(parameters(a, "w", mlp(2)))
    feat = a["in/feat"].clone().requires_grad_()
    mean = head(feat).squeeze(-1)
    log_prob = -v1.normal_nll(mean, a["in/value"])
    check(mean, a["out/mean"])
    check(log_prob, a["out/log_prob"])
    log_prob.sum().backward()
    check_gradient(feat.grad, a["grad/feat"], "feat")
    check_gradients(head, [p.grad for p in head.parameters()], parameters(a, "grad/w", mlp(2)))


def test_discount_head_gives_the_official_log_likelihood_of_soft_labels_and_gradients():
    a = load("v1_dense_binary")
    head = v1.MLP(10, 12, 2, 1)
    head.load_state_dict(parameters(a, "w", mlp(2)))
    feat = a["in/feat"].clone().requires_grad_()
    logit = head(feat).squeeze(-1)
    log_prob = -torch.nn.functional.binary_cross_entropy_with_logits(logit, a["in/value"], reduction="none")
    check(logit, a["out/logits"])
    check(logit.sigmoid(), a["out/mean"])
    check(log_prob, a["out/log_prob"])
    log_prob.sum().backward()
    check_gradient(feat.grad, a["grad/feat"], "feat")
    check_gradients(head, [p.grad for p in head.parameters()], parameters(a, "grad/w", mlp(2)))


def test_initial_weights_have_the_official_distributions():
    a = load("v1_init_stats")
    torch.manual_seed(0)
    agent = v1.Dreamer(v1.Args(obs_embed_size=0), channels=3, action_size=6)
    layers = {f"world_model.rssm.{module}": (layout, f"dynamics/{layer}") for module, (layout, layer) in RSSM.items()}
    layers |= {
        f"world_model.encoder.{module}": (layout, f"encode/{layer}") for module, (layout, layer) in ENCODER.items()
    }
    layers |= {
        f"world_model.decoder.{module}": (layout, f"decode/{layer}") for module, (layout, layer) in DECODER.items()
    }
    layers |= {f"actor.{module}": (layout, f"actor/{layer}") for module, (layout, layer) in mlp(4).items()}
    stats = {
        name: (limit, std) for name, limit, std in zip(a["names"], a["limit"].tolist(), a["std"].tolist(), strict=True)
    }
    compared = set()
    for name, parameter in agent.named_parameters():
        module, _, kind = name.rpartition(".")
        if "bias" in kind:
            assert not parameter.any(), f"{name} is not zero"
        elif module in layers:
            part = "recurrent_kernel" if kind == "weight_hh" else "kernel"
            limit, std = stats[f"{layers[module][1]}/{part}"]
            compared.add(f"{layers[module][1]}/{part}")
            assert parameter.std().item() == pytest.approx(std, rel=0.04), name
            if kind == "weight_hh":  # Keras' (u, 3u) matrix has orthonormal rows, its transpose orthonormal columns
                check(parameter.T @ parameter, torch.eye(200), name)
            else:
                assert 0.98 * limit < parameter.abs().max() <= limit * (1 + 1e-6), name
    assert compared == {name for name in stats if "bias" not in name}


# RSSM


@pytest.fixture
def rssm_case():
    a = load("v1_rssm")
    rssm = v1.RSSM(stoch_size=6, deter_size=16, hidden_size=12, action_size=4, embed_size=10)
    rssm.load_state_dict(parameters(a, "w", RSSM))
    return a, rssm


@pytest.mark.parametrize("case", ["observe", "observe_with_state"])
def test_observe_gives_the_official_posteriors_priors_and_gradients(rssm_case, case, monkeypatch):
    a, rssm = rssm_case
    draws = Draws(*time_major(a["in/post_noise"]))
    monkeypatch.setattr(v1, "sample_normal", draws)
    leaf = {
        name: a[f"in/{name}"].clone().requires_grad_() for name in ("embed", "action", "state/stoch", "state/deter")
    }
    given = v1.State(a["in/state/mean"], a["in/state/std"], leaf["state/stoch"], leaf["state/deter"])
    is_first = torch.zeros(7, 3, dtype=torch.bool)
    embed, action = leaf["embed"].transpose(0, 1), leaf["action"].transpose(0, 1)
    post, prior = rssm.observe(embed, action, is_first, given if case == "observe_with_state" else None)
    assert draws.used_up
    check_state(post, recorded_state(a, f"{case}/post", swap=True), "post")
    # Ours draws no sample from the prior, the loss having no need of it: the official one follows from mean and std.
    prior = prior._replace(stoch=prior.mean + prior.std * time_major(a["in/prior_noise"]))
    check_state(prior, recorded_state(a, f"{case}/prior", swap=True), "prior")
    check(post.feat, time_major(a[f"{case}/feat"]), "feat")
    loss = sum(
        (time_major(a[f"in/cot/{part}/{field}"]) * getattr(state, field)).sum()
        for part, state in (("post", post), ("prior", prior))
        for field in v1.State._fields
    )
    check(loss, a[f"{case}/loss"], "loss")
    loss.backward()
    check_gradients(rssm, [p.grad for p in rssm.parameters()], parameters(a, f"{case}/grad/w", RSSM))
    check_gradient(leaf["embed"].grad, a[f"{case}/grad/embed"], "embed")
    check_gradient(leaf["action"].grad, a[f"{case}/grad/action"], "action")
    if case == "observe_with_state":
        check_gradient(leaf["state/stoch"].grad, a[f"{case}/grad/state_stoch"], "stoch")
        check_gradient(leaf["state/deter"].grad, a[f"{case}/grad/state_deter"], "deter")


def test_imagining_with_given_actions_gives_the_official_states(rssm_case, monkeypatch):
    a, rssm = rssm_case
    monkeypatch.setattr(v1, "sample_normal", Draws(*time_major(a["in/imagine_noise"])))
    states = [recorded_state(a, "in/state")]
    for action in time_major(a["in/action"]):
        states.append(rssm.imagine_step(states[-1], action))
    imagined = v1.State(*(torch.stack(field) for field in zip(*states[1:], strict=True)))
    check_state(imagined, recorded_state(a, "imagine", swap=True), "imagine")


def test_one_step_of_prior_and_posterior_gives_the_official_states(rssm_case, monkeypatch):
    a, rssm = rssm_case
    start, action, embed = recorded_state(a, "in/state"), a["in/action"][:, 1], a["in/embed"][:, 1]
    monkeypatch.setattr(v1, "sample_normal", Draws(a["in/img_step_noise"]))
    check_state(rssm.imagine_step(start, action), recorded_state(a, "img_step"), "img_step")
    monkeypatch.setattr(v1, "sample_normal", Draws(a["in/obs_step_post_noise"]))
    projected, is_first = rssm.project_embed(embed), torch.zeros(3, dtype=torch.bool)
    post = rssm.observe_step(start.stoch, start.deter, action, projected, is_first)
    check_state(post, recorded_state(a, "obs_step/post"), "post")
    mean, std = rssm.prior(post.deter)
    prior = v1.State(mean, std, mean + std * a["in/obs_step_prior_noise"], post.deter)
    check_state(prior, recorded_state(a, "obs_step/prior"), "prior")


def test_initial_state_is_the_official_one(rssm_case):
    a, rssm = rssm_case
    check_state(rssm.initial(3), recorded_state(a, "initial"), "initial")


def test_kl_and_entropy_are_the_official_ones(rssm_case):
    a, _ = rssm_case
    post, prior = (recorded_state(a, f"observe_with_state/{part}") for part in ("post", "prior"))
    check(v1.kl_normal(post, prior), a["kl/post_prior"])
    check(v1.entropy_normal(post.std), a["kl/entropy_post"])


# ACTION DISTRIBUTION


@pytest.fixture
def actor_case():
    a = load("v1_action_tanh_normal")
    actor = v1.Actor(10, 12, 2, 3)
    actor.load_state_dict(parameters(a, "w", mlp(2)))
    return a, actor


def test_actor_gives_the_official_mean_std_log_prob_and_gradients(actor_case):
    a, actor = actor_case
    feat = a["in/feat"].clone().requires_grad_()
    policy = actor(feat)
    check(policy.mean, a["out/mean"])
    check(policy.std, a["out/std"])
    log_prob = policy.log_prob(a["in/action"])
    check(log_prob, a["out/log_prob"])
    log_prob.sum().backward()
    check_gradient(feat.grad, a["grad_sum_log_prob/feat"], "feat")
    check_gradients(actor, [p.grad for p in actor.parameters()], parameters(a, "grad_sum_log_prob/w", mlp(2)))


def test_log_prob_of_saturated_actions_is_the_official_one(actor_case):
    """To 1e-3 relative: there float32 knows the inverse of tanh no better."""
    a, actor = actor_case
    log_prob = actor(a["in/feat"]).log_prob(a["in/action_edge"])
    torch.testing.assert_close(log_prob, a["out/log_prob_edge"], rtol=1e-3, atol=0)


def test_log_prob_of_own_draws_is_close_to_the_official_one_which_remembers_the_draw(actor_case):
    """To 0.05: ours inverts tanh, and many of these draws are within 1e-4 of -1 or 1."""
    a, actor = actor_case
    log_prob = actor(a["in/feat"]).log_prob(a["out/sample"])
    torch.testing.assert_close(log_prob, a["out/log_prob_of_sample_cached"], rtol=0, atol=0.05)


def test_actor_sample_and_its_gradient_are_the_official_ones(actor_case, monkeypatch):
    a, actor = actor_case
    monkeypatch.setattr(v1, "sample_normal", Draws(a["in/sample_noise"]))
    sample = actor(a["in/feat"]).sample()
    check(sample, a["out/sample"])
    (a["in/sample_cot"] * sample).sum().backward()
    check_gradients(actor, [p.grad for p in actor.parameters()], parameters(a, "grad_sample/w", mlp(2)))


def test_entropy_and_mean_of_a_hundred_draws_are_the_official_estimates(actor_case, monkeypatch):
    """To 1e-2 for the entropy: float32 knows the inverse of tanh only coarsely near -1 and 1."""
    a, actor = actor_case
    policy = actor(a["in/feat"])
    monkeypatch.setattr(v1, "sample_normal", Draws(*a["in/entropy_noise"]))
    entropy = torch.stack([policy.entropy() for _ in a["in/entropy_noise"]]).mean(0)
    torch.testing.assert_close(entropy, a["out/entropy_mc"], rtol=1e-2, atol=0)
    monkeypatch.setattr(v1, "sample_normal", Draws(*a["in/mean_noise"]))
    check(torch.stack([policy.sample() for _ in a["in/mean_noise"]]).mean(0), a["out/mean_mc"])


def test_tanh_inverse_and_volume_inside_log_prob_are_the_official_bijector():
    a = load("v1_tanh_bijector")
    y = a["in/y"][:, None].clone().requires_grad_()
    mean, std = torch.zeros_like(y, requires_grad=True), torch.ones_like(y)
    log_prob = v1.TanhNormal(mean, std).log_prob(y)
    (inverse,) = torch.autograd.grad(log_prob.sum(), mean, create_graph=True)  # (raw - mean) / std^2
    check(inverse[:, 0], a["out/inverse"], "inverse")
    (slope,) = torch.autograd.grad(inverse.sum(), y)
    inside = a["in/y"].abs() < 0.9999
    check_gradient(slope[inside, 0], a["grad/inverse__y"][inside], "inverse")
    raw = a["out/inverse"]
    volume = 2 * (math.log(2) - raw - torch.nn.functional.softplus(-2 * raw))
    # log(1 - y^2) is as steep as the inverse near -1 and 1, hence inside only.
    check(log_prob[inside], (-0.5 * raw**2 - 0.5 * math.log(2 * math.pi) - volume)[inside], "log_prob")
    x = a["in/x"][a["in/x"].abs() < 4]
    density = v1.TanhNormal(torch.zeros(len(x), 1), torch.ones(len(x), 1)).log_prob(torch.tanh(x)[:, None])
    expected = -0.5 * x**2 - 0.5 * math.log(2 * math.pi) - a["out/fldj"][a["in/x"].abs() < 4]
    torch.testing.assert_close(density, expected, rtol=0, atol=2e-3)


# RETURNS AND PREPROCESSING


def test_lambda_return_is_the_official_one():
    a = load("v1_lambda_return")
    returns = v1.lambda_return(a["in/reward"], a["in/value"], a["in/pcont"], a["in/bootstrap"], 0.95)
    check(returns, a["out/returns"])


def test_images_reach_the_encoder_as_in_the_official_code():
    """In the world-model loss and in the policy; rewards are used as they are (`clip_rewards: none`)."""
    a = load("v1_preprocess")
    assert torch.equal(a["none/reward"], a["in/reward"])
    args = v1.Args(stoch_size=2, deter_size=4, obs_embed_size=0, cnn_depth=1, units=4, cuda=False)
    agent = v1.Dreamer(args, 1, 1)
    seen = []
    agent.world_model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = a["in/image"].permute(0, 3, 1, 2).tile(1, 1, 4, 4)  # (1, 1, 64, 64): the recorded 16x16 pixels, 16 times
    expected = a["out/image"].permute(0, 3, 1, 2).tile(1, 1, 4, 4)
    zeros = torch.zeros(1, 1)
    v1.world_model_loss(agent.world_model, v1.Batch(image[None], zeros[None], zeros, zeros == 0, zeros == 1), args)
    agent.policy(image.numpy(), agent.initial_state(1), [True])
    check(seen[0], expected, "loss")
    check(seen[1], expected, "policy")


# ONE UPDATE: B = 3 sequences of T = 6 steps, horizon H = 5


class TrainCase:
    """The official `_train` on a recorded batch: the same agent, batch and draws."""

    def __init__(self):
        self.a = load("v1_train_nopcont")
        self.args = v1.Args(
            **{"stoch_size": 6, "deter_size": 16, "obs_embed_size": 0, "cnn_depth": 2, "units": 12},
            **{"imagine_horizon": 5, "cuda": False, "precision": "float32", "grad_clip": 1e9},
            **{"model_learning_rate": 0, "actor_learning_rate": 0, "value_learning_rate": 0},
        )
        self.agent = v1.Dreamer(self.args, channels=3, action_size=4)
        self.agent.load_state_dict(
            {f"world_model.{name}": value for name, value in self.model("w/model").items()}
            | {f"actor.{name}": value for name, value in parameters(self.a, "w/actor", mlp(4)).items()}
            | {f"value.{name}": value for name, value in parameters(self.a, "w/value", mlp(3)).items()}
        )
        never = torch.zeros(6, 3, dtype=torch.bool)  # (T, B); the official code knows no is_first
        image = time_major(self.a["in/image_uint8"]).permute(0, 1, 4, 2, 3).contiguous()
        self.batch = v1.Batch(image, time_major(self.a["in/action"]), time_major(self.a["in/reward"]), never, never)

    def model(self, prefix: str) -> dict[str, torch.Tensor]:
        """The world model's parameters, or their gradients."""
        parts = {"encoder": ("encode", ENCODER), "rssm": ("dynamics", RSSM), "decoder": ("decode", DECODER)}
        parts["reward"] = ("reward", mlp(2))
        return {
            f"{part}.{name}": value
            for part, (layer, layers) in parts.items()
            for name, value in parameters(self.a, f"{prefix}/{layer}", layers).items()
        }

    def imagined(self, key: str) -> torch.Tensor:
        """A recorded (H, B * T, ...) or (B * T) array in our order of start states: (H, T * B, ...) or (T * B)."""
        axis = min(1, self.a[key].ndim - 1)
        return self.a[key].unflatten(axis, (3, 6)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    def observe_draws(self) -> list[torch.Tensor]:
        return list(time_major(self.a["in/post_noise"]))

    def imagine_draws(self) -> list[torch.Tensor]:
        """The actor's draw, then the latent's, at every step."""
        pairs = zip(self.imagined("in/imag_action_noise"), self.imagined("in/imag_state_noise"), strict=True)
        return [noise for pair in pairs for noise in pair]


@pytest.fixture
def train_case():
    return TrainCase()


@pytest.mark.parametrize("free_nats", [3, 50])
def test_world_model_loss_and_its_terms_are_the_official_ones_with_their_gradients(train_case, free_nats, monkeypatch):
    case, a, model = train_case, train_case.a, train_case.agent.world_model
    case.args.free_nats = free_nats
    draws = Draws(*case.observe_draws())
    monkeypatch.setattr(v1, "sample_normal", draws)
    loss, post, metrics = v1.world_model_loss(model, case.batch, case.args)
    assert draws.used_up
    image, reward = metrics["losses/image"], metrics["losses/reward"]
    divergence = loss - image - reward
    check(-image, a["out/likes/image"], "image")
    check(-reward, a["out/likes/reward"], "reward")
    check(metrics["losses/kl"], a["out/kl_mean"], "kl")
    check(loss, a[f"free{free_nats}/model_loss"], "loss")
    check(loss - image - reward, a[f"free{free_nats}/div_clamped"], "div", tolerance=2e-3 / 15)  # loss is 12,000
    check_state(post, recorded_state(a, "out/post", swap=True), "post")
    check(post.feat, time_major(a["out/feat"]), "feat")

    def gradients(of):
        return torch.autograd.grad(of, list(model.parameters()), retain_graph=True, allow_unused=True)

    check_gradients(model, gradients(divergence), case.model(f"free{free_nats}/grad_div/model"))
    if free_nats == 3:
        check_gradients(model, gradients(loss), case.model("free3/grad/model"))
        check_gradients(model, gradients(-reward), case.model("grad_likes_reward/model"))


def test_prior_and_kl_of_each_step_are_the_official_ones(train_case, monkeypatch):
    case, model = train_case, train_case.agent.world_model
    monkeypatch.setattr(v1, "sample_normal", Draws(*case.observe_draws()))
    embed = model.encoder(case.batch.image.flatten(0, 1).float() / 255 - 0.5).unflatten(0, (6, 3))
    post, prior = model.rssm.observe(embed, case.batch.action, case.batch.is_first)
    check_state(prior, recorded_state(case.a, "out/prior", swap=True), "prior", fields=("mean", "std", "deter"))
    check(v1.kl_normal(post, prior), time_major(case.a["out/kl_per_step"]), "kl")


def test_a_whole_update_has_the_official_imagination_returns_losses_and_gradients(train_case, monkeypatch):
    """`Learner` as training calls it, at learning rate 0 and with no clipping, so that all gradients stay readable."""
    case, a, agent = train_case, train_case.a, train_case.agent
    draws = Draws(*case.observe_draws(), *case.imagine_draws())
    monkeypatch.setattr(v1, "sample_normal", draws)
    seen = {}

    def spy(name):
        function = getattr(v1, name)

        def wrapped(*arguments):
            seen[name] = arguments, function(*arguments)
            return seen[name][1]

        monkeypatch.setattr(v1, name, wrapped)

    for name in ("imagine", "lambda_return", "actor_loss", "critic_loss"):
        spy(name)
    metrics = v1.Learner(agent, case.args, torch.device("cpu"))(case.batch)
    assert draws.used_up

    check(metrics["losses/image"], -a["out/likes/image"], "image")
    check(metrics["losses/reward"], -a["out/likes/reward"], "reward")
    check(metrics["losses/model"], a["free3/model_loss"], "model")
    feat, _, _ = seen["imagine"][1]
    check(feat[1:], case.imagined("imag/feat"), "imagined feat")
    (reward, value, discount, bootstrap, _), returns = seen["lambda_return"]
    check(reward, case.imagined("imag/reward_all_but_last"), "imagined reward")
    check(value, case.imagined("imag/value_all_but_last"), "imagined value")
    check(discount, case.imagined("imag/pcont_all_but_last"), "imagined discount")
    check(bootstrap, case.imagined("imag/bootstrap"), "bootstrap")
    check(returns, case.imagined("imag/returns"), "returns")
    check(seen["actor_loss"][0][5], case.imagined("imag/discount"), "actor's weights")
    check(seen["critic_loss"][0][3], case.imagined("imag/discount"), "critic's weights")
    check(metrics["losses/actor"], a["imag/actor_loss"], "actor")
    check(metrics["losses/value"], a["imag/value_loss"], "value")

    for module, expected in (
        (agent.world_model, case.model("free3/grad/model")),
        (agent.actor, parameters(a, "imag/grad/actor", mlp(4))),
        (agent.value, parameters(a, "imag/grad/value", mlp(3))),
    ):
        check_gradients(module, [p.grad for p in module.parameters()], expected)

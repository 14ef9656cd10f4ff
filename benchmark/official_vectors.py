"""Golden vectors of the whole losses: the official DreamerV2 code is run, with its random draws recorded.

    python benchmark/official_vectors.py --out tests/golden

Writes `v2_world_model_*.npz` (the world model's loss on a batch of sequences with resets, and its gradients),
`v2_behaviour_*.npz` (imagination from given states, returns, the actor's and the critic's loss with their gradients,
for the three distributions of actions and the three kinds of gradients), `v2_updates_*.npz` (the weights before and
after some whole updates, with its own optimizers) and `v2_policy_*.npz` (some steps of acting). Small sizes, random
weights and data. The official code is run as it is, but for optimizers that record gradients in the place of its own
where a file has gradients, and for one line that was mended after the release: `reinforce` takes no gradient through
the action. Keys are those of tests/golden/README.md.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import official_code
from run import InputError, Parser, replacing, run_tool

ACTIONS, B, T, HORIZON = 4, 3, 5, 5
MLP = {"layers": 2, "units": 12}
SIZES = {"rssm": {"hidden": 16, "deter": 16, "stoch": 6, "discrete": 5}, "discount": 0.99, "precision": 32}
SIZES |= {"reward_head": MLP, "discount_head": MLP, "actor": MLP, "critic": MLP, "imag_horizon": HORIZON}
SIZES |= {"encoder.cnn_depth": 2, "decoder.cnn_depth": 2, "actor_ent": 0.03}
DISCOUNT = {"pred_discount": True, "grad_heads": ["decoder", "reward", "discount"]}
NO_DISCOUNT = {"pred_discount": False, "grad_heads": ["decoder", "reward"]}
WORLD_MODELS = {"atari": ("atari", {}), "dmc": ("dmc_vision", {}), "dmc_discount": ("dmc_vision", DISCOUNT)}
DISTRIBUTIONS = ("onehot", "trunc_normal", "tanh_normal")
# Whole updates. Strong decay and clipping, so that they show; Keras adds Adam's epsilon at another place than PyTorch.
ADAM = {"lr": 1e-3, "eps": 1e-10, "wd": 0.01, "clip": 1.0}
UPDATES = {"count": 4, "slow_target_update": 2, **{f"{part}_opt": ADAM for part in ("model", "actor", "critic")}}
BEHAVIOURS = [(dist, grad) for dist in DISTRIBUTIONS for grad in ("dynamics", "reinforce", "both")]


def named_variables(module, prefix):
    """{"<prefix>/<layer>/kernel": variable} of a network that has been called."""
    found = {}
    for name, part in getattr(module, "_modules", {}).items():
        found |= named_variables(part, f"{prefix}/{name}")
    if hasattr(module, "_cell"):
        layers = {"cell/dense": module._cell._layer, "cell/norm": module._cell._norm}
        for name, layer in layers.items():
            found |= named_variables(layer, f"{prefix}/{name}")
    if hasattr(module, "kernel") or hasattr(module, "gamma"):  # a layer
        found |= {f"{prefix}/{v.name.rpartition('/')[2].removesuffix(':0')}": v for v in module.variables}
    return found


def all_variables(networks):
    return {k: v for name, network in networks.items() for k, v in named_variables(network, name).items()}


def randomise(variables, rng):
    """No weight is left at a trivial value."""
    for name, variable in variables.items():
        scale = 2 / np.sqrt(np.prod(variable.shape[:-1])) if name.endswith("kernel") else 0.1
        variable.assign(name.endswith("gamma") + scale * rng.normal(size=variable.shape))


class Gradients:
    """In the place of an optimizer: keeps the gradients of all named variables, changes nothing."""

    def __init__(self, networks):
        self.networks, self.found = networks, {}

    def __call__(self, tape, loss, modules):
        variables = all_variables(self.networks)
        gradients = tape.gradient(loss, list(variables.values()), unconnected_gradients="zero")
        self.found = dict(zip(variables, gradients, strict=True))
        return {}


def record(owner, name, kept):
    """Keeps what each call of the method returns."""
    method = getattr(owner, name)

    def recorded(*args, **kwargs):
        kept.append(method(*args, **kwargs))
        return kept[-1]

    setattr(owner, name, recorded)


def data(rng, channels, discrete):
    """A batch of sequences: every sequence begins with a reset, one has a second."""
    is_first = np.zeros((B, T), bool)
    is_first[:, 0] = is_first[1, 3] = True
    is_terminal = np.zeros((B, T), bool)
    is_terminal[1, 2] = is_terminal[2, 4] = True
    action = rng.uniform(-1, 1, (B, T, ACTIONS))
    action = np.eye(ACTIONS)[action.argmax(-1)] if discrete else action
    return {
        "image": rng.integers(0, 256, (B, T, 64, 64, channels), np.uint8),
        "action": np.where(is_first[..., None], 0, action).astype(np.float32),
        "reward": rng.normal(0, 2, (B, T)).astype(np.float32),
        "is_first": is_first,
        "is_terminal": is_terminal,
    }


def world_model(agent, config, rng, channels, discrete, draws):
    """What the world model's training makes of a batch."""
    import tensorflow as tf

    image = SimpleNamespace(shape=(64, 64, channels))
    model = agent.WorldModel(config, {"image": image}, tf.Variable(0, dtype=tf.int64))
    batch = data(rng, channels, discrete)
    inputs = {key: tf.constant(value) for key, value in batch.items()}
    model.loss(inputs)  # makes the networks
    networks = {"encoder": model.encoder, "rssm": model.rssm}
    networks |= {f"heads.{name}": head for name, head in model.heads.items()}
    weights = all_variables(networks)
    randomise(weights, rng)
    model.model_opt = Gradients(networks)
    losses = []
    record(model, "loss", losses)
    draws.clear()
    model.train(inputs)
    loss, _, outs, metrics = losses[0]
    arrays = {f"in/{key}": value for key, value in batch.items()}
    index = np.concatenate(draws).argmax(-1).swapaxes(0, 1).astype(np.int32)  # (B, 2 T): prior, posterior, prior, ...
    arrays |= {"in/prior_index": index[:, ::2], "in/post_index": index[:, 1::2]}
    arrays |= {"out/model_loss": loss} | {f"out/{name}": value for name, value in metrics.items()}
    arrays |= {f"out/{name}/logit": outs[name]["logit"] for name in ("post", "prior")} | {"out/kl": outs["kl"]}
    arrays |= {f"w/{name}": value for name, value in weights.items()}
    return arrays | {f"grad/{name}": value for name, value in model.model_opt.found.items()}


def draws_of_behaviour(draws, raw_actions, discrete):
    """What actions and latents were drawn while imagining."""
    onehots = [draw.numpy().argmax(-1).astype(np.int32) for draw in draws]
    if discrete:  # action, latent, action, ...
        return {"in/action_index": np.stack(onehots[::2]), "in/stoch_index": np.concatenate(onehots[1::2])}
    raw = [draw for draw in raw_actions if len(draw) == 1]  # not the tanh-normal's 100 for its mode and entropy
    return {"in/action_raw": np.concatenate(raw), "in/stoch_index": np.concatenate(onehots)}


def behaviour(agent, config, rng, discrete, draws, raw_actions):
    """What the training of actor and critic makes of posterior states."""
    import tensorflow as tf

    model = agent.WorldModel(config, {}, tf.Variable(0, dtype=tf.int64))
    space = SimpleNamespace(shape=(ACTIONS,), **({"n": ACTIONS} if discrete else {}))
    learner = agent.ActorCritic(config, space, tf.Variable(0, dtype=tf.int64))
    index = rng.integers(SIZES["rssm"]["discrete"], size=(B, T, SIZES["rssm"]["stoch"]))
    start = {"logit": rng.normal(size=(*index.shape, SIZES["rssm"]["discrete"]))}
    start |= {"stoch": np.eye(SIZES["rssm"]["discrete"])[index]}
    start |= {"deter": np.tanh(rng.normal(size=(B, T, SIZES["rssm"]["deter"])))}
    start = {key: value.astype(np.float32) for key, value in start.items()}
    is_terminal = data(rng, 1, discrete)["is_terminal"]
    states = {key: tf.constant(value) for key, value in start.items()}

    def reward(seq):  # as in `Agent.train`
        return model.heads["reward"](seq["feat"]).mode()

    def train():
        return learner.train(model, states, tf.constant(is_terminal), reward)

    networks = {"actor": learner.actor, "critic": learner.critic}
    learner.actor_opt, learner.critic_opt = (Gradients({name: networks[name]}) for name in networks)
    train()  # makes the networks
    others = {"rssm": model.rssm, "target_critic": learner._target_critic}
    others |= {f"heads.{name}": head for name, head in model.heads.items() if name != "decoder"}
    variables = all_variables(networks | others)
    randomise(variables, rng)
    if config.actor.dist == "tanh_normal":  # draws near 1, whose inverse tanh float32 does not know exactly, are rare
        for layer in ("out", "std"):
            kernel = variables[f"actor/out/{layer}/kernel"]
            kernel.assign(kernel / 8)
    weights = {name: value.numpy() for name, value in variables.items()}  # before the slow critic changes
    imagined, targets, losses = [], [], {"actor": [], "critic": []}
    record(model, "imagine", imagined)
    record(learner, "target", targets)
    official_code.mend_reinforce(learner)
    for name, kept in losses.items():
        record(learner, f"{name}_loss", kept)
    draws.clear()
    raw_actions.clear()
    metrics = train()
    arrays = {f"in/start/{key}": value for key, value in start.items()} | {"in/is_terminal": is_terminal}
    arrays |= draws_of_behaviour(draws, raw_actions, discrete)
    arrays |= {f"out/seq/{key}": value for key, value in imagined[0].items()} | {"out/target": targets[0][0]}
    arrays |= {f"out/{name}_loss": kept[0][0] for name, kept in losses.items()}
    arrays |= {f"out/metrics/{name}": value for name, value in metrics.items()}
    arrays |= {f"w/{name}": value for name, value in weights.items()}
    for optimizer in (learner.actor_opt, learner.critic_opt):
        arrays |= {f"grad/{name}": value for name, value in optimizer.found.items()}
    return arrays


def make_agent(agent, config, channels, discrete):
    space = SimpleNamespace(shape=(ACTIONS,), **({"n": ACTIONS} if discrete else {}))
    return agent.Agent(config, {"image": SimpleNamespace(shape=(64, 64, channels))}, {"action": space}, 0)


def coarse(image):
    """Blocks of 8 pixels, (..., 64, 64, C): the file is smaller."""
    return image[..., ::8, ::8, :].repeat(8, -2).repeat(8, -3)


def updates(agent, config, rng, channels, discrete, draws, raw_actions):
    """The weights before and after whole updates on as many batches, and the losses on the way."""
    import tensorflow as tf

    whole = make_agent(agent, config, channels, discrete)
    model, learner = whole.wm, whole._task_behavior
    batches = [data(rng, channels, discrete) for _ in range(UPDATES["count"])]
    batches = [batch | {"image": coarse(batch["image"])} for batch in batches]
    owners = ((model, "model_opt"), (learner, "actor_opt"), (learner, "critic_opt"))
    optimizers = [getattr(*owner) for owner in owners]
    for owner in owners:
        setattr(*owner, lambda *_: {})
    whole.train({key: tf.constant(value) for key, value in batches[0].items()})  # makes the networks
    learner._updates.assign(0)
    for owner, optimizer in zip(owners, optimizers, strict=True):
        setattr(*owner, optimizer)
    networks = {"encoder": model.encoder, "rssm": model.rssm, "actor": learner.actor, "critic": learner.critic}
    networks |= {"target_critic": learner._target_critic}
    variables = all_variables(networks | {f"heads.{name}": head for name, head in model.heads.items()})
    randomise(variables, rng)
    arrays = {f"w/{name}": value.numpy() for name, value in variables.items()}
    rows = []
    for batch in batches:
        draws.clear()
        raw_actions.clear()
        _, metrics = whole.train({key: tf.constant(value) for key, value in batch.items()})
        rows.append({f"in/{key}": value for key, value in batch.items()})
        latents, draws[:] = draws[: 2 * T], draws[2 * T :]  # prior, posterior, prior, ...
        rows[-1]["in/post_index"] = np.concatenate(latents[1::2]).argmax(-1).swapaxes(0, 1).astype(np.int32)
        rows[-1] |= draws_of_behaviour(draws, raw_actions, discrete)
        rows[-1] |= {f"out/metrics/{name}": value for name, value in metrics.items()}
    arrays |= {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return arrays | {f"out/w/{name}": value for name, value in variables.items()}


def policy(agent, config, rng, channels, discrete, draws, raw_actions):
    """Some steps of B environments, one of which is reset on the way; each with a drawn action and with the mode."""
    import tensorflow as tf

    whole = make_agent(agent, config, channels, discrete)
    batch = data(rng, channels, discrete)
    batch["image"] = coarse(batch["image"])
    steps = [{key: tf.constant(value[:, t]) for key, value in batch.items() if key != "action"} for t in range(T)]
    whole.policy(steps[0])  # makes the networks
    networks = {"encoder": whole.wm.encoder, "rssm": whole.wm.rssm, "actor": whole._task_behavior.actor}
    variables = all_variables(networks)
    randomise(variables, rng)
    rows = {"train": [], "eval": []}
    for mode, kept in rows.items():
        state = None
        for t, step in enumerate(steps):
            draws.clear()
            raw_actions.clear()
            outputs, state = whole.policy(step, state, mode)
            row = {f"in/{key}": batch[key][:, t] for key in ("image", "is_first")}
            row["in/post_index"] = np.concatenate(draws[1:2]).argmax(-1).astype(np.int32)  # after the prior
            if mode == "train" and not discrete:
                row["in/action_raw"] = raw_actions[-1]
            row |= {f"out/{key}": state[0][key] for key in ("logit", "stoch", "deter")}
            kept.append(row | {"out/action": outputs["action"]})
    arrays = {f"w/{name}": value for name, value in variables.items()}
    for mode, kept in rows.items():
        arrays |= {f"{mode}/{key}": np.stack([row[key] for row in kept]) for key in kept[0]}
    return arrays


def work(out):
    """In the other environment, where there is no torch."""
    common, agent = official_code.load(threads=1)
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    tf.random.set_seed(1)
    draws, raw_actions = [], []
    record(common.OneHotDist, "sample", draws)
    for distribution in (common.tfd.TruncatedNormal, common.tfd.Normal):  # before they are clipped or squashed
        record(distribution, "sample", raw_actions)
    arrays = {}
    for seed, (name, (recipe, settings)) in enumerate(WORLD_MODELS.items()):
        config = official_code.settings(common, recipe, SIZES | settings)
        discrete = recipe == "atari"
        rng, channels = np.random.default_rng(seed), 1 if discrete else 3
        arrays[f"v2_world_model_{name}"] = world_model(agent, config, rng, channels, discrete, draws)
    for seed, (dist, grad) in enumerate(BEHAVIOURS, 10):
        heads = DISCOUNT if dist == "onehot" else NO_DISCOUNT
        changes = {"actor_grad": grad, "actor.dist": dist}
        if dist == "tanh_normal":  # its entropy is a random estimate there
            changes["actor_ent"] = 0.0
        config = official_code.settings(common, "defaults", SIZES | heads | changes)
        arrays[f"v2_behaviour_{dist}_{grad}"] = behaviour(
            agent, config, np.random.default_rng(seed), dist == "onehot", draws, raw_actions
        )
    for seed, (kind, function) in enumerate((("updates", updates), ("policy", policy)), 30):
        for name, recipe in (("atari", "atari"), ("dmc", "dmc_vision")):
            changes = {key: value for key, value in UPDATES.items() if key != "count"}
            config = official_code.settings(common, recipe, SIZES | changes)
            discrete = recipe == "atari"
            rng, channels = np.random.default_rng(seed), 1 if discrete else 3
            arrays[f"v2_{kind}_{name}"] = function(agent, config, rng, channels, discrete, draws, raw_actions)
    for name, values in arrays.items():
        with replacing(out / f"{name}.npz") as path:
            np.savez_compressed(path, **{key: np.asarray(value) for key, value in values.items()})
        print(f"{name}.npz: {len(values)} arrays")


def main(argv):
    if argv[:1] == ["--worker"]:
        return work(Path(argv[1]))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=official_code.VENV)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is no folder")
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_ENABLE_ONEDNN_OPTS": "0"}
    command = [official_code.official_python(options.venv), __file__, "--worker", options.out]
    if subprocess.run(command, env=quiet).returncode:
        raise InputError("the official code failed, see above")


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))

"""What compare.py times: each contestant in a process of its own, with what is installed where it runs.

A contestant gives the numbers of its networks' trained values, a function that draws a batch, one that learns from it
and one that acts.
"""

import importlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EXPERIMENTS = {
    "V1": ("dreamer_v1", ["exp=dreamer_v1", "env=dmc", "+buffer.type=sequential"]),
    "V2-DMC": ("dreamer_v2", ["exp=dreamer_v2", "env=dmc"]),
    "V2-Atari": ("dreamer_v2", ["exp=dreamer_v2_ms_pacman", "buffer.type=sequential"]),
}
PACKAGES = {
    "ours": ["torch", "numpy"],
    "sheeprl": ["torch", "numpy", "sheeprl", "lightning"],
    "official": ["tensorflow-cpu", "numpy", "dreamerv2"],
}
WARMUP = 2
POLICY_STEPS = 50  # a turn


def trained_values(parts):
    return {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}


def ours(spec):
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    script = importlib.import_module(spec["script"])
    script.tune_cpu()
    args, device = script.Args(**spec["args"]), torch.device("cpu")
    channels, actions = spec["channels"], spec["actions"]
    agent = script.Dreamer(args, channels, actions)
    learner = script.Learner(agent, args, device)
    rng, n = np.random.default_rng(0), args.batch_size * args.train_seq_len
    replay = script.Replay(Path(spec["folder"]), n, 2, 1, (channels, 64, 64), actions, device)
    no = np.zeros(1, bool)
    for _ in range(n):
        image = rng.integers(0, 256, (1, channels, 64, 64), np.uint8)
        replay.add(image, script.random_actions(rng, 1, actions), rng.normal(size=1), no, no, no)
    parts = {"world_model": agent.world_model, "actor": agent.actor, "critic": agent.value}
    state = agent.initial_state(1)
    act = lambda: agent.policy(image, state, no)[0].numpy()  # noqa: E731
    return trained_values(parts), lambda: replay.sample(rng, args.batch_size, args.train_seq_len), learner, act


def overrides(spec):
    """Our sizes, by SheepRL's names."""
    args = spec["args"]
    values = {
        "algo.per_rank_batch_size": args["batch_size"],
        "algo.per_rank_sequence_length": args["train_seq_len"],
        "algo.horizon": args["imagine_horizon"],
        "algo.dense_units": args["units"],
        "algo.actor.mlp_layers": args["actor_layers"],
        "algo.critic.mlp_layers": args["value_layers"],
        "algo.world_model.stochastic_size": args["stoch_size"],
        "algo.world_model.encoder.cnn_channels_multiplier": args["cnn_depth"],
        "algo.world_model.recurrent_model.recurrent_state_size": args["deter_size"],
        "algo.world_model.transition_model.hidden_size": args["deter_size"],
        "algo.world_model.representation_model.hidden_size": args["deter_size"],
        "algo.world_model.reward_model.mlp_layers": args["reward_layers"],
        "algo.world_model.discount_model.mlp_layers": args["discount_layers"],
        "algo.world_model.use_continues": args["pred_discount"],
        "fabric.precision": spec["precision"],
        "algo.compile.enabled": spec["compile"],
        "env.num_envs": 1,
        "buffer.size": args["batch_size"] * args["train_seq_len"],
    }
    if "num_classes" in args:
        values |= {"algo.world_model.discrete_size": args["num_classes"], "algo.layer_norm": args["layer_norm"]}
    return [f"{key}={value}" for key, value in values.items()]


def sheeprl(spec):
    import gymnasium as gym
    import hydra
    import torch
    from lightning.fabric import Fabric
    from omegaconf import OmegaConf
    from sheeprl.algos.dreamer_v2.utils import build_buffer, build_optimizer, prepare_obs, sample_batches
    from sheeprl.utils.utils import dotdict

    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    name, experiment = EXPERIMENTS[spec["case"]]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        cfg = hydra.compose("config", experiment + overrides(spec))
    cfg = dotdict(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.distributions.Distribution.set_default_validate_args(cfg.distribution.validate_args)
    fabric = Fabric(accelerator="cpu", devices=1, precision=cfg.fabric.precision)
    script = importlib.import_module(f"sheeprl.algos.{name}.{name}")

    image, actions = (spec["channels"], 64, 64), spec["actions"]
    space = gym.spaces.Dict({"rgb": gym.spaces.Box(0, 255, image, np.uint8)})
    *models, player = script.build_agent(fabric, (actions,), not spec["discrete"], cfg, space)
    parts = dict(zip(("world_model", "actor", "critic"), models, strict=False))  # V2's fourth is the target critic
    optimizers = [build_optimizer(cfg.algo[part].optimizer, model.parameters()) for part, model in parts.items()]
    optimizers = fabric.setup_optimizers(*optimizers)
    aggregator = hydra.utils.instantiate(cfg.metric.aggregator, _convert_="all")

    rng, n = np.random.default_rng(0), cfg.buffer.size
    action = rng.uniform(-1, 1, (n, 1, actions))
    data = {key: np.zeros((n, 1, 1)) for key in ("terminated", "truncated", "is_first")}
    data |= {"rgb": rng.integers(0, 256, (n, 1, *image), np.uint8), "rewards": rng.normal(size=(n, 1, 1))}
    data["actions"] = np.eye(actions)[action.argmax(-1)] if spec["discrete"] else action
    replay = build_buffer(fabric, cfg, spec["folder"], dry_run_size=2)
    replay.add(data)
    extra = {"actions_dim": (actions,)} if name == "dreamer_v2" else {}
    update = partial(script.train, fabric, *models, *optimizers, aggregator=aggregator, cfg=cfg, **extra)
    player.init_states()

    @torch.inference_mode()
    def act():
        action = player.get_actions(prepare_obs(fabric, {"rgb": data["rgb"][0]}, cnn_keys=["rgb"], num_envs=1))
        return torch.cat(action, -1).cpu().numpy()

    return trained_values(parts), lambda: next(sample_batches(fabric, cfg, replay, 1)), update, act


def official(spec):
    import official_code

    args, actions = spec["args"], spec["actions"]
    batch, length = args["batch_size"], args["train_seq_len"]
    sizes = {"dataset": {"batch": batch, "length": length}, "replay": {"minlen": length, "maxlen": length}}
    sizes |= {"rssm.hidden": args["deter_size"], "rssm.deter": args["deter_size"]}
    recipe = "atari" if spec["discrete"] else "dmc_vision"
    common, agent = official_code.load(spec["threads"])
    config = official_code.settings(common, recipe, sizes)

    rng, n = np.random.default_rng(0), batch * length
    replay = common.Replay(Path(spec["folder"]), **config.replay)
    for step in range(n + 1):
        image, action = rng.integers(0, 256, (64, 64, spec["channels"]), np.uint8), rng.uniform(-1, 1, actions)
        if spec["discrete"]:
            action = np.eye(actions)[action.argmax()]
        obs = {"image": image, "reward": rng.normal(), "is_terminal": False}
        obs |= {"is_first": step == 0, "is_last": step == n}
        replay.add_step(obs | {"action": action})
    dataset = iter(replay.dataset(**config.dataset))
    space = SimpleNamespace(shape=(actions,), **({"n": actions} if spec["discrete"] else {}))
    agent = agent.Agent(config, {"image": image}, {"action": space}, 0)
    train = common.CarryOverState(agent.train)

    def update(batch):
        return {name: float(value) for name, value in train(batch).items()}

    update(next(dataset))  # makes the networks
    model, behaviour = agent.wm, agent._task_behavior
    parts = {"world_model": [model.encoder, model.rssm, *model.heads.values()]}
    parts |= {"actor": [behaviour.actor], "critic": [behaviour.critic]}
    variables = {name: [v for module in modules for v in module.trainable_variables] for name, modules in parts.items()}
    values = {name: sum(math.prod(v.shape) for v in part) for name, part in variables.items()}
    obs = {name: np.asarray(value)[None] for name, value in obs.items()}
    _, state = agent.policy(obs)
    act = lambda: agent.policy(obs, state)[0]["action"].numpy()  # noqa: E731
    return values, lambda: next(dataset), update, act


def main(spec):
    """The life of a contestant: says that it is ready, then times an update and policy steps for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w", 1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    parameters, sample, update, act = {"ours": ours, "sheeprl": sheeprl, "official": official}[spec["side"]](spec)
    for _ in range(WARMUP):
        update(sample())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[spec["side"]]}
    print(json.dumps({"parameters": parameters, "versions": versions}), file=answers)
    clock = time.perf_counter
    for _ in sys.stdin:
        start = clock()
        batch = sample()
        sampled = clock()
        update(batch)
        total, steps = clock() - start, []
        for _ in range(2 * POLICY_STEPS):
            begun = clock()
            act()
            steps.append(clock() - begun)
        policy = statistics.median(steps[POLICY_STEPS:])
        print(json.dumps({"sample": sampled - start, "total": total, "policy": policy}), file=answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

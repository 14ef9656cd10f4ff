"""The recipes of benchmark/configs: each is one the scripts take, and those of the papers are the official settings."""

import pytest

from tests.running import ROOT, load

CONFIGS = ROOT / "benchmark" / "configs"
V1, V2, ATARI = "dreamer_v1_continuous", "dreamer_v2_continuous", "dreamer_v2_atari"
PREFIXES = {"v1": [V1], "v2_atari": [ATARI], "v2_continuous": [V2], "v2_dmc": [V2], "v2_source": [V2, ATARI]}
RECIPES = [
    (path.name, script)
    for path in sorted(CONFIGS.glob("*.yaml"))
    for prefix, scripts in PREFIXES.items()
    if path.name.startswith(prefix)
    for script in scripts
]

HEADS = {"units": 400, "value_layers": 3, "actor_layers": 4, "reward_layers": 2}
V2_HEADS = {"units": 400, "value_layers": 4, "actor_layers": 4, "reward_layers": 4, "reward_head": "mse"}
V2_PAPER = V2_HEADS | {
    "stoch_size": 32,
    "num_classes": 32,
    "obs_embed_size": 0,
    "cnn_depth": 48,
    "act": "elu",
    "layer_norm": False,
    "batch_size": 16,
    "train_seq_len": 50,
    "imagine_horizon": 15,
    "td_lambda": 0.95,
    "kl_alpha": 0.8,
    "slow_target_update": 100,
    "adam_eps": 1e-5,
    "weight_decay": 1e-6,
    "grad_clip": 100.0,
    "action_noise": 0.0,
    "update_steps": 1,
    "replay_capacity": 2_000_000,
}
# danijar/dreamer's `define_config` and `configs.yaml` of danijar/dreamerv2, agent steps times the action repeat.
PAPERS = {
    "v1_dmc_paper.yaml": HEADS
    | {
        "stoch_size": 30,
        "deter_size": 200,
        "obs_embed_size": 0,
        "cnn_depth": 32,
        "batch_size": 50,
        "train_seq_len": 50,
        "imagine_horizon": 15,
        "discount": 0.99,
        "td_lambda": 0.95,
        "kl_loss_coeff": 1.0,
        "free_nats": 3.0,
        "actor_grad": "dynamics",
        "actor_entropy": 0.0,
        "action_noise": 0.3,
        "action_repeat": 2,
        "model_learning_rate": 6e-4,
        "actor_learning_rate": 8e-5,
        "value_learning_rate": 8e-5,
        "adam_eps": 1e-7,
        "grad_clip": 100.0,
        "seed_steps": 5000,
        "collect_steps": 1000,
        "update_steps": 100,
        "pretrain": 100,
        "eval_every": 10_000,
        "eval_episodes": 1,
        "total_steps": 5_000_000,
    },
    "v2_dmc_paper.yaml": V2_PAPER
    | {
        "deter_size": 200,
        "pred_discount": False,
        "discount": 0.99,
        "kl_loss_coeff": 1.0,
        "free_nats": 1.0,
        "actor_dist": "trunc_normal",
        "actor_grad": "dynamics",
        "actor_entropy": 1e-4,
        "action_repeat": 2,
        "model_learning_rate": 3e-4,
        "actor_learning_rate": 8e-5,
        "value_learning_rate": 8e-5,
        "seed_steps": 2000,
        "collect_steps": 10,
        "pretrain": 100,
        "eval_every": 20_000,
        "eval_episodes": 1,
        "total_steps": 2_000_000,
    },
    "v2_atari_paper.yaml": V2_PAPER
    | {
        "deter_size": 600,
        "pred_discount": True,
        "discount_layers": 4,
        "discount_scale": 5.0,
        "discount": 0.999,
        "kl_loss_coeff": 0.1,
        "free_nats": 0.0,
        "actor_grad": "reinforce",
        "actor_entropy": 1e-3,
        "action_repeat": 4,
        "sticky_actions": True,
        "full_action_space": False,
        "terminal_on_life_loss": False,
        "model_learning_rate": 2e-4,
        "actor_learning_rate": 4e-5,
        "value_learning_rate": 1e-4,
        "seed_steps": 200_000,
        "collect_steps": 64,
        "pretrain": 1,
        "eval_every": 1_000_000,
        "eval_episodes": 1,
        "total_steps": 200_000_000,
    },
}

# The settings at 0216d33, but for its evaluations.
PAPERS["v2_atari_curves.yaml"] = PAPERS["v2_atari_paper.yaml"] | {"batch_size": 50, "full_action_space": True}
PAPERS["v2_atari_curves.yaml"] |= {"eval_every": 500_000, "eval_episodes": 5}

# Where the defaults depart from these recipes: the design's values, which the README's table of deviations lists.
DEVIATIONS = {
    "v1_dmc_paper.yaml": {"obs_embed_size": 1024, "eval_every": 100_000, "eval_episodes": 5},
    "v2_dmc_paper.yaml": {
        "reward_head": "twohot",
        "obs_embed_size": 1024,
        "cnn_depth": 32,
        "act": "silu",
        "layer_norm": True,
        "replay_capacity": 1_000_000,
        "pred_discount": True,
        "discount": 0.997,
        "free_nats": 3.0,
        "actor_dist": "tanh_normal",
        "seed_steps": 5000,
        "eval_every": 100_000,
        "eval_episodes": 5,
        "total_steps": 5_000_000,
    },
    "v2_atari_paper.yaml": {
        "reward_head": "twohot",
        "cnn_depth": 32,
        "discount": 0.997,
        "seed_steps": 20_000,
        "eval_every": 500_000,
        "eval_episodes": 5,
        "total_steps": 10_000_000,
    },
}


def test_every_recipe_belongs_to_a_script():
    assert {name for name, _ in RECIPES} == {path.name for path in CONFIGS.iterdir()}


@pytest.mark.parametrize(("name", "script"), RECIPES)
def test_a_recipe_is_valid(name, script):
    script = load(script)
    script.check_args(script.load_config(CONFIGS / name))


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_are_the_official_settings(name):
    (script,) = next(scripts for prefix, scripts in PREFIXES.items() if name.startswith(prefix))
    args = load(script).load_config(CONFIGS / name)
    assert {key: getattr(args, key) for key in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize("name", DEVIATIONS)
def test_defaults_are_the_papers_but_for_the_deviations(name):
    (script,) = next(scripts for prefix, scripts in PREFIXES.items() if name.startswith(prefix))
    args = load(script).Args()
    expected = PAPERS[name] | DEVIATIONS[name]
    assert {key: getattr(args, key) for key in expected} == expected

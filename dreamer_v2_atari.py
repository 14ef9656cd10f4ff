# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "opencv-python-headless==5.0.0.93",
#   "mujoco==3.17.0",
#   "imageio==2.38.1",
#   "dm_control==1.0.50;python_version<'3.13'",
#   "ale-py==0.12.1",
#   "pygame-ce==2.5.8",
#   "tyro==1.0.16",
#   "tensorboard==2.21.0",
#   "pillow==13.0.0",
#   "pyyaml==6.0.3",
#   "tqdm==4.70.1",
#   "wandb==0.31.0",
# ]
# ///
"""DreamerV2: learn a discrete world model from pixels, learn to act inside its imagination (discrete actions).

Mastering Atari with Discrete World Models, Hafner et al. 2020, https://arxiv.org/abs/2010.02193
Official code: https://github.com/danijar/dreamerv2

    python dreamer_v2_atari.py --env-id PongNoFrameskip-v4     # train
    python dreamer_v2_atari.py --resume runs/<run>              # continue a run that was stopped or killed
    python dreamer_v2_atari.py --evaluate runs/<run>            # play with the mode action, print the returns

Steps are environment frames, action repeat included. Sequences are time-major, (T, B, ...); imagined ones are
(H, N, ...) with N = T * B start states. Index t of a sequence holds the observation x_t, the action a_t that LED to it,
and the reward r_t received on arriving there.

The algorithm alone: `RSSM`, the functions under LOSSES, `Learner.update`, and the loop of `train`.
"""

import contextlib
import copy
import ctypes
import dataclasses
import fcntl
import gc
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import reprlib
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import ale_py.roms
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import yaml
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """train on the GPU if there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """autocast precision (on the CPU: of updates, not of the policy); auto: bfloat16 on CUDA, float32 on the CPU"""
    compile: bool = True
    """on CUDA: compile the recurrences and the losses with torch.compile"""
    compile_cpu: bool = False
    """compile them and the policy on the CPU: updates take 2 to 15% less, after some minutes; needs a C++ compiler"""
    cuda_graph: bool = True
    """on CUDA: replay the whole update, and the policy's step, as CUDA graphs"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "dreamer"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """save a GIF of the first episode of each evaluation while training (in the run folder's `videos`)"""
    config: str = ""
    """YAML file with values for these flags (a run's config.yaml or a recipe); flags given beside it win"""
    resume: str = ""
    """run folder to continue"""
    evaluate: str = ""
    """run folder whose agent plays `eval_episodes` episodes; nothing is written"""

    # environment
    env_id: str = "PongNoFrameskip-v4"
    """an Atari game by any of its names, or any Gymnasium id with discrete actions, `module:Id` included"""
    num_envs: int = 1
    """environments stepped in parallel (more than one: each in a process of its own, but for Atari games)"""
    env_timeout: float = 0.0
    """seconds after which an environment's step counts as hung and it is restarted (0: wait forever)"""
    action_repeat: int = 4
    """frames for which each action is repeated"""
    sticky_actions: bool = True
    """Atari: with probability 0.25 a frame repeats the action before (Machado et al. 2018)"""
    full_action_space: bool = False
    """Atari: all 18 actions instead of the game's own"""
    terminal_on_life_loss: bool = False
    """Atari: a lost life counts as terminal; the game goes on"""

    # schedule, in frames
    total_steps: int = 10_000_000
    """frames of the whole run"""
    seed_steps: int = 20_000
    """frames of random actions before learning starts"""
    collect_steps: int = 64
    """frames between two training phases"""
    update_steps: int = 1
    """updates in each training phase"""
    pretrain: int = 1
    """updates right after the seed frames (0: as many as in the other training phases)"""
    scalar_freq: int = 4000
    """frames between two log lines"""
    eval_every: int = 500_000
    """frames between two evaluations, each with an open-loop video (0: none)"""
    eval_episodes: int = 5
    """episodes of each evaluation"""
    checkpoint_interval: int = 50_000
    """frames between two checkpoints"""

    # replay
    replay_capacity: int = 2_000_000
    """agent steps kept, over all environments"""
    batch_size: int = 16
    """sequences in a batch"""
    train_seq_len: int = 50
    """length of these sequences"""

    # world model
    stoch_size: int = 32
    """number of categorical latents"""
    num_classes: int = 32
    """classes of each"""
    deter_size: int = 600
    """size of the recurrent state, and of the RSSM's hidden layers"""
    obs_embed_size: int = 0
    """size of a Linear after the encoder's convolutions (0: none, as in the official code)"""
    cnn_depth: int = 32
    """channels of the encoder's first convolution"""
    units: int = 400
    """width of the heads, the actor and the critic"""
    reward_layers: int = 4
    """hidden layers of the reward head"""
    discount_layers: int = 4
    """hidden layers of the discount head"""
    value_layers: int = 4
    """hidden layers of the critic"""
    actor_layers: int = 4
    """hidden layers of the actor"""
    act: Literal["silu", "elu"] = "elu"
    """activation function of the linear layers (the paper's: elu)"""
    layer_norm: bool = False
    """LayerNorm in the hidden layers (the paper: no; its GRU has one in either case)"""
    reward_head: Literal["twohot", "mse"] = "twohot"
    """rewards as a two-hot classification over symlog bins, or the paper's regression"""
    pred_discount: bool = True
    """learn when episodes terminate"""
    discount_scale: float = 5.0
    """weight of the discount head's loss"""
    kl_loss_coeff: float = 0.1
    """weight of the KL loss"""
    kl_alpha: float = 0.8
    """share of the KL loss that moves the prior towards the posterior (0.5: the KL itself, free nats for each step)"""
    free_nats: float = 0.0
    """the mean KL is not pushed below this"""
    model_learning_rate: float = 2e-4
    """learning rate of the world model"""

    # behaviour
    imagine_horizon: int = 15
    """imagined steps"""
    discount: float = 0.997
    """discount factor"""
    td_lambda: float = 0.95
    """lambda of the returns"""
    actor_grad: Literal["dynamics", "reinforce", "both"] = "reinforce"
    """gradient of the actor: through the learned dynamics, score function, or a mixture"""
    actor_grad_mix: float = 0.1
    """share of the dynamics gradient under `both`"""
    actor_entropy: float = 1e-3
    """weight of the actor's entropy"""
    action_noise: float = 0.0
    """probability of a random action instead of the actor's"""
    actor_learning_rate: float = 4e-5
    """learning rate of the actor"""
    value_learning_rate: float = 1e-4
    """learning rate of the critic"""
    slow_target_update: int = 100
    """updates after which the slow critic, which gives targets and baseline, becomes a copy of the critic"""
    adam_eps: float = 1e-5
    """epsilon of the three Adams"""
    weight_decay: float = 1e-6
    """factor by which all weights shrink at each update, whatever the learning rate"""
    grad_clip: float = 100.0
    """global norm to which each gradient is clipped"""


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong and how to mend it; the script exits with code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def load_config(path: Path) -> Args:
    """Reads flags from YAML, coerced to the types of `Args` (YAML reads `1e-4` as text). Unknown keys are refused."""
    try:
        values = yaml.safe_load(path.read_text())
    except Exception as error:  # PyYAML raises more than its YAMLError, for `!!int ""` for example
        raise UserError(f"cannot read the configuration {path}: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `flag: value` lines")
    kinds = {field.name: field.type for field in dataclasses.fields(Args)}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"unknown key {key!r} in {path} (another script's?); `--help` lists the flags")
        kind = kinds[key]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        try:
            if choices:
                valid = value in choices
            elif kind in (int, float):
                number = float("nan" if isinstance(value, bool) else value)
                values[key] = kind(number)
                valid = values[key] == number
            else:
                valid = isinstance(value, kind)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            wanted = " or ".join(choices) or getattr(kind, "__name__", kind)
            raise UserError(f"{key}: {reprlib.repr(value)} in {path} is not valid: give {wanted}")
    return Args(**values)


def check_args(args: Args) -> Args:
    """Raises `UserError` for values no run can have."""
    least = {"imagine_horizon": 2, "train_seq_len": 2}  # of whole numbers; 1 where nothing else is said
    may_be_zero = ("seed", "seed_steps", "pretrain", "eval_every", "obs_embed_size")
    least |= dict.fromkeys((*may_be_zero, "reward_layers", "discount_layers", "value_layers", "actor_layers"), 0)
    positive = ("model_learning_rate", "actor_learning_rate", "value_learning_rate", "adam_eps", "grad_clip")
    shares = ("discount", "td_lambda", "actor_grad_mix", "kl_alpha", "weight_decay", "action_noise")
    for field in dataclasses.fields(Args):
        name, value = field.name, getattr(args, field.name)
        flag = f"--{name.replace('_', '-')} {value}"
        if field.type in (int, float) and not 0 <= value < 2**53:
            raise UserError(f"{flag} must be a finite number, from 0 to 2**53")
        if field.type is int and value < least.get(name, 1):
            raise UserError(f"{flag} must be at least {least.get(name, 1)}")
        if name in positive and value == 0:
            raise UserError(f"{flag} must be greater than 0")
        if name in shares and value > 1:
            raise UserError(f"{flag} must lie between 0 and 1")
    if args.env_timeout > 10**6:  # poll knows no more than 2**31 milliseconds
        raise UserError("--env-timeout must be at most 1000000 seconds")
    if args.seed >= 2**30:  # ALE takes seeds to 2**31, and later episodes have higher ones
        raise UserError("--seed must be less than 2**30")
    try:
        "".join(str(value) for value in vars(args).values()).encode()
    except UnicodeEncodeError:
        raise UserError("a flag is not valid UTF-8") from None
    if args.train_seq_len > args.replay_capacity // args.num_envs:
        raise UserError(
            f"--train-seq-len {args.train_seq_len} is longer than an environment's share of the replay "
            f"({args.replay_capacity // args.num_envs} agent steps): raise --replay-capacity"
        )
    return args


# What has to stay beside --resume. Other sizes do not fit the weights, and need no mention.
KEPT = ("env_id", "num_envs", "action_repeat", "replay_capacity", "checkpoint_interval", "act", "actor_dist")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the run's or recipe's YAML over the defaults. Raises `UserError` with tyro's message on one line."""

    def parse(default: Args) -> Args:
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Args, args=argv, default=default, description=__doc__)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            text = "\n".join(line.strip("│ ") for line in box.getvalue().splitlines()[1:])
            message, *hints = re.split("\n[─╰].*", text)
            meant = [flag for hint in hints if "you meant" in hint for flag in re.findall("^--[a-z-]+", hint, re.M)]
            mend = f"perhaps {' or '.join(meant)}?" if meant else "--help lists the flags; switches: --flag, --no-flag"
            raise UserError(f"{message} ({mend})") from None

    words = sys.argv[1:] if argv is None else argv
    for before, word in zip(["the script's name", *words], words, strict=False):
        if not word or re.fullmatch(r"--[\w-]+=", word):  # `--resume ""` would begin a new run
            raise UserError(f"nothing after {word or before}: is a variable of the shell not set?")
    args = parse(Args())
    run_dir = args.resume or args.evaluate
    path = os.path.join(run_dir, "config.yaml") if run_dir else args.config
    if sum(map(bool, (args.resume, args.evaluate, args.config))) > 1:
        raise UserError("only one of --resume, --evaluate and --config: a run's own settings are in its folder")
    if run_dir and not os.path.isfile(path):
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    if path:
        default = load_config(Path(path))
        if default.config or default.resume or default.evaluate:
            raise UserError(f"{path} may not set config, resume or evaluate: they belong on the command line")
        args = parse(default)
        for name in KEPT if args.resume else ():
            old, new = getattr(default, name, None), getattr(args, name, None)
            if new != old:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {new}: {run_dir} has {old}, which its weights or stored steps depend on")
    return check_args(args)


# ENVIRONMENTS


def atari_game(env_id: str) -> str | None:
    """The game's name in ALE for `PongNoFrameskip-v4`, `ALE/Pong-v5`, `atari/pong` and the like; None for other ids."""
    env_id = env_id.removeprefix("ale_py:")
    suite, _, name = env_id.rpartition("/")
    key = re.sub(r"((NoFrameskip|Deterministic)?-v\d+)?$", "", name, count=1).replace("_", "").lower()
    for_two = {"combat", "joust", "maze_craze", "warlords"}  # which end the process
    games = {game.replace("_", ""): game for game in ale_py.roms.get_all_rom_ids() if game not in for_two}
    if suite in ("ALE", "atari") and key not in games:
        raise UserError(f"ALE has no game {name!r}; names are like PongNoFrameskip-v4, ALE/Pong-v5 or atari/pong")
    is_atari = suite in ("ALE", "atari") or re.fullmatch(r"\w+-v[04]", env_id)  # Blackjack-v1 is Gymnasium's own
    return games.get(key) if is_atari else None


class Atari(gym.vector.VectorWrapper):
    """Games in ALE's own threads: (N, 1, 64, 64) grey, the maximum of the last two of the repeated frames.

    With `terminal_on_life_loss`, `life_lost` in the info marks the rows on which a life was lost.
    """

    def __init__(self, args: Args, game: str, num_envs: int):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        envs = AtariVectorEnv(
            game,
            num_envs,
            img_height=64,
            img_width=64,
            stack_num=1,
            frameskip=args.action_repeat,
            repeat_action_probability=0.25 if args.sticky_actions else 0.0,
            full_action_space=args.full_action_space,
            max_num_frames_per_episode=108_000,
            noop_max=31,  # 0 to 30
            reward_clipping=False,
            use_fire_reset=False,
        )
        super().__init__(envs)
        self.terminal_on_life_loss = args.terminal_on_life_loss
        self.lives, self.ended = np.zeros(num_envs, int), np.zeros(num_envs, bool)

    def step(self, action: np.ndarray):
        image, reward, terminated, truncated, info = self.env.step(action.argmax(-1))
        if self.terminal_on_life_loss:
            info["life_lost"] = (info["lives"] < self.lives) & ~self.ended  # a new game may have fewer than the old one
        self.lives, self.ended = info["lives"].copy(), terminated | truncated
        return image, reward, terminated, truncated, info


@contextlib.contextmanager
def plain_errors():
    """An environment may not end the script; and what it raises in a worker might not be picklable."""
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError(f"it called sys.exit({stop.code})") from None
    except Exception as error:  # whatever an environment raises
        if multiprocessing.parent_process() is None:
            raise
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        raise RuntimeError(f"{kind}{error}") from None


class Pixels(gym.Wrapper):
    """Observations are what the environment renders, (3, 64, 64) uint8."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)

    def pixels(self) -> np.ndarray:
        frame = self.env.render()
        if not (isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8):
            raise UserError("render() gives no uint8 image (H, W, 3): the environment needs render_mode='rgb_array'")
        return cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA).transpose(2, 0, 1)

    def reset(self, **kwargs):
        with plain_errors():
            self.env.reset(**kwargs)
            return self.pixels(), {}

    def step(self, action):
        with plain_errors():
            _, reward, terminated, truncated, _ = self.env.step(action)
            return self.pixels(), reward, terminated, truncated, {}


def make_env(args: Args) -> gym.Env:
    """One environment with pixels (3, 64, 64) uint8 and one-hot actions; `UserError` for an unsuitable one."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if args.env_id.startswith(("dmc/", "dm_control/")):
        raise UserError(f"{args.env_id} has continuous actions, which dreamer_v2_continuous.py takes")
    module, _, name = args.env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    env = gym.make(gym.spec(name), render_mode="rgb_array")
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UserError(
            f"{args.env_id} has the actions {env.action_space}; this script needs discrete ones: "
            "dreamer_v2_continuous.py takes a one-dimensional Box"
        )
    first, size = int(env.action_space.start), int(env.action_space.n)
    env = gym.wrappers.TransformAction(env, lambda action: first + action.argmax(), gym.spaces.Box(0, 1, (size,)))
    return Pixels(gym.wrappers.RepeatAction(env, args.action_repeat))


# Ctrl-C, a closed terminal, the scheduler's end, its warning before
STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)


def make_envs(args: Args, num_envs: int, workers: bool = False) -> gym.vector.VectorEnv:
    """Environments side by side. NEXT_STEP autoreset: the last observation is a row of its own, then comes the reset's.

    `workers`: each in a process of its own, spawned: a fork would deadlock once the parent has initialised EGL.
    """
    if game := atari_game(args.env_id):
        return Atari(args, game, num_envs)
    thunks = [lambda: make_env(args)] * num_envs
    if not workers:
        return gym.vector.SyncVectorEnv(thunks)
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers inherit this: these are the script's
    try:
        return gym.vector.AsyncVectorEnv(thunks, context="spawn")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def group_sizes(args: Args) -> list[int]:
    """How many environments break together: a process of its own for each, but for games, which share ALE's threads."""
    return [args.num_envs] if atari_game(args.env_id) else [1] * args.num_envs


def probe_env(args: Args) -> tuple[tuple[int, ...], int]:
    """Makes and resets one environment, so that a bad one is told in one line before anything is created.

    Returns the image shape (C, 64, 64) and the action size.
    """
    try:
        with warnings.catch_warnings():  # the environments of the run will tell theirs
            warnings.simplefilter("ignore")
            envs = make_envs(args, 1)
            envs.reset(seed=args.seed)
            envs.close()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a third party's environment raises
        mend = "the environment itself fails"
        if isinstance(error, (gym.error.Error, ImportError)):
            mend = "ids: Pendulum-v1, dmc/walker-walk, ALE/Pong-v5, my_envs:MyEnv-v0 with my_envs.py beside the script"
        if re.search("EGL|OpenGL|eglQuery|glGetError|OSMesa|MUJOCO_GL", str(error)):
            mend = "unset MUJOCO_GL, or apt-get install --no-install-recommends libegl1 libgl1"
        elif "No module named 'dm_control'" in str(error):  # labmaze, which it requires, has no wheel for 3.13
            mend = "Python 3.13 and newer: pip install dm-env lxml scipy, then pip install --no-deps dm_control==1.0.50"
        raise UserError(f"cannot use {args.env_id}: {type(error).__name__}: {str(error)[:300]} ({mend})") from None
    return envs.single_observation_space.shape, int(gym.spaces.flatdim(envs.single_action_space))


def close_envs(envs: gym.vector.VectorEnv | None) -> None:
    """Ends environments, if they were begun, at once, hung and dead ones too; `close` would wait for every worker."""
    for process in getattr(envs, "processes", ()):
        process.kill()
        process.join()
        envs.closed = True
    with contextlib.suppress(Exception):
        envs.close()


def random_actions(rng: np.random.Generator, num_envs: int, action_size: int) -> np.ndarray:
    return np.eye(action_size, dtype=np.float32)[rng.integers(action_size, size=num_envs)]


START_TIMEOUT = 60  # seconds that a worker gets at least for its first reset; its construction has no limit


def reset_envs(envs: gym.vector.VectorEnv, seed: int, timeout: float = 0.0) -> np.ndarray:
    """Images (N, C, 64, 64). Workers get `timeout` seconds (0: no limit)."""
    if not timeout or not isinstance(envs, gym.vector.AsyncVectorEnv):
        return envs.reset(seed=seed)[0]
    envs.reset_async(seed=seed)
    return envs.reset_wait(timeout=max(timeout, START_TIMEOUT))[0]


def step_envs(envs: gym.vector.VectorEnv, action: np.ndarray, timeout: float = 0.0):
    """One step: image (N, C, 64, 64), reward, is_terminal and is_last (N,).

    Workers have begun it with `step_async` and get `timeout` seconds (0: no limit).
    """
    workers = isinstance(envs, gym.vector.AsyncVectorEnv)
    result = envs.step_wait(timeout or None) if workers else envs.step(action)
    image, reward, terminated, truncated, info = result
    is_terminal = terminated | info.get("life_lost", False)
    return image, reward, is_terminal, terminated | truncated


# DISTRIBUTIONS AND NETWORKS


def normal_nll(mean: Tensor, target: Tensor) -> Tensor:
    """-log N(target; mean, 1), element by element."""
    return 0.5 * (target - mean).square() + 0.5 * math.log(2 * math.pi)


def image_nll(mean: Tensor, image: Tensor) -> Tensor:
    """-log N(image; mean, 1) of (N, C, 64, 64), summed over pixels, mean over images."""
    squares = F.mse_loss(mean, image, reduction="sum") / len(image)
    return 0.5 * squares + 0.5 * math.log(2 * math.pi) * image[0].numel()


def sample_onehot(logits: Tensor) -> Tensor:
    """One-hot draws (..., classes) with straight-through gradients (Algorithm 1 of the paper).

    All latents are drawn here, so that a test can put recorded draws in their place.
    """
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1)
    threshold = torch.rand_like(cdf[..., -1:]) * cdf[..., -1:]  # one random number a latent: they are slow on the CPU
    index = (cdf <= threshold).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    onehot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return onehot + (probs - probs.detach())


def kl_categorical(logit: Tensor, other: Tensor) -> Tensor:
    """KL(logit || other) of independent categoricals (..., stoch, classes) -> (...), in nats."""
    logp, logq = logit.log_softmax(-1), other.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum((-2, -1))


def kl_loss(post: Tensor, prior: Tensor, alpha: float, free_nats: float) -> tuple[Tensor, Tensor]:
    """KL balancing (Algorithm 2 of the paper), for logits (T, B, stoch, classes). Returns the loss and the mean KL.

    The share `alpha` moves the prior towards the posterior, the rest the posterior towards the prior.
    """
    if alpha == 0.5:  # in the official code not balanced: the KL itself, with free nats for each step
        kl = kl_categorical(post, prior)
        return kl.clamp(min=free_nats).mean(), kl.mean().detach()
    to_post = kl_categorical(post.detach(), prior).mean()
    to_prior = kl_categorical(post, prior.detach()).mean()
    loss = alpha * to_post.clamp(min=free_nats) + (1 - alpha) * to_prior.clamp(min=free_nats)
    return loss, to_post.detach()


def entropy_categorical(logit: Tensor) -> Tensor:
    """Entropy of independent categoricals (..., stoch, classes) -> (...), in nats."""
    logp = logit.log_softmax(-1)
    return -(logp.exp() * logp).sum((-2, -1))


def symlog(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


def twohot(x: Tensor, bins: Tensor) -> Tensor:
    """Weights (..., bins) on the two bins beside each x (...), whose mean is x; beyond the range, on the last bin."""
    x = x.to(bins.dtype).clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, x).clamp(1, len(bins) - 1)
    share = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
    weights = torch.zeros(*x.shape, len(bins), dtype=bins.dtype, device=x.device)
    weights.scatter_(-1, (above - 1)[..., None], (1 - share)[..., None])
    return weights.scatter_(-1, above[..., None], share[..., None])


class OneHot(NamedTuple):
    """A categorical over one-hot actions: the actor's distribution. Field: (..., action)."""

    logits: Tensor

    def sample(self) -> Tensor:
        return sample_onehot(self.logits)

    def mode(self) -> Tensor:
        return torch.zeros_like(self.logits).scatter_(-1, self.logits.argmax(-1, keepdim=True), 1.0)

    def log_prob(self, action: Tensor) -> Tensor:
        """log probability of one-hot actions (..., action) -> (...); no gradient to them, as in the official code."""
        return (action.detach() * self.logits.log_softmax(-1)).sum(-1)

    def entropy(self) -> Tensor:
        return entropy_categorical(self.logits.unsqueeze(-2))


def init_weights(module: nn.Module) -> None:
    """Keras' defaults, as in the official code: Glorot-uniform weights, zero biases."""
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def activation(args: Args) -> nn.Module:
    return nn.SiLU() if args.act == "silu" else nn.ELU()


def norm(args: Args, size: int) -> nn.Module:
    return nn.LayerNorm(size, eps=1e-3) if args.layer_norm else nn.Identity()


class MLP(nn.Sequential):
    """`layers` hidden layers with norm and activation, an output layer in float32: (..., size) -> (..., out_size)."""

    def __init__(self, args: Args, size: int, layers: int, out_size: int):
        modules = []
        for _ in range(layers):
            modules += [nn.Linear(size, args.units), norm(args, args.units), activation(args)]
            size = args.units
        super().__init__(*modules, nn.Linear(size, out_size))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, output = self
        for layer in hidden:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 knows a value of 200 only to 1
            return output(x.to(output.weight.dtype))


class RewardHead(MLP):
    """Features (..., feat) -> reward: two-hot classification over 255 symlog-spaced bins, or regression."""

    def __init__(self, args: Args, size: int):
        self.twohot = args.reward_head == "twohot"
        super().__init__(args, size, args.reward_layers, 255 if self.twohot else 1)
        self.register_buffer("bins", torch.linspace(-20, 20, 255), persistent=False)

    def mean(self, feat: Tensor) -> Tensor:
        """(..., feat) -> (...)."""
        output = self(feat)
        return symexp((output.softmax(-1) * self.bins).sum(-1)) if self.twohot else output.squeeze(-1)

    def nll(self, feat: Tensor, reward: Tensor) -> Tensor:
        """Negative log-likelihood of rewards (...)."""
        output = self(feat)
        if self.twohot:
            return -(twohot(symlog(reward), self.bins) * output.log_softmax(-1)).sum(-1)
        return normal_nll(output.squeeze(-1), reward)


class Actor(MLP):
    """Features (..., feat) -> distribution of actions (..., action)."""

    def __init__(self, args: Args, size: int, action_size: int):
        super().__init__(args, size, args.actor_layers, action_size)

    def forward(self, feat: Tensor) -> OneHot:
        return OneHot(super().forward(feat))


def pixels_to_float(image: Tensor) -> Tensor:
    """uint8 images (N, C, 64, 64) to [-0.5, 0.5], channels last in memory, which convolutions like."""
    return image.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)


def conv_as_product(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` (4x4, stride 2) as the matrix product of patches (N, h, w, kh * kw * C) and weights."""
    x = x.permute(0, 2, 3, 1)
    if x.shape[1] == 6:  # four patches: as slices, whose gradient takes less time than that of `unfold`
        patches = torch.stack([x[:, i : i + 4, j : j + 4] for i in (0, 2) for j in (0, 2)], 1)
        patches = patches.flatten(2).unflatten(1, (2, 2))
    else:
        patches = x.unfold(1, 4, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3).flatten(3)
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Images (N, C, 64, 64) in [-0.5, 0.5] -> embeddings (N, embed). 64 > 31 > 14 > 6 > 2 pixels."""

    def __init__(self, args: Args, channels: int):
        super().__init__()
        depth, embed_size = args.cnn_depth, args.obs_embed_size
        self.convs = nn.ModuleList()
        for i in range(4):
            self.convs.append(nn.Conv2d(channels, depth * 2**i, 4, stride=2))
            channels = depth * 2**i
        self.convs.to(memory_format=torch.channels_last)  # else oneDNN reorders the weights at every step of the policy
        self.embed_size = embed_size or 4 * channels
        self.linear = nn.Linear(4 * channels, embed_size) if embed_size else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        # ELU whatever `act` is: without a norm, SiLU, whose slope at 0 is half of ELU's, leaves a 15th of what differs
        # between two images, and in the decoder an 8th of what differs between two latents: small objects are lost.
        x = image
        for conv in self.convs:
            # For the few pixels of a step of the policy, oneDNN's convolution spends its time on reordering weights;
            # to 2x2 pixels it is slow. cuDNN's for one or three channels does not use the tensor cores.
            as_product = x[:, 0].numel() <= 800 or (x.shape[1] <= 3 if x.is_cuda else x.shape[-1] == 6)
            x = F.elu(conv_as_product(x, conv) if as_product else conv(x), inplace=True)
        return self.linear(x.permute(0, 2, 3, 1).flatten(1))  # (h, w, c) order, as the official code flattens


def conv_transpose_1x1(x: Tensor, conv: nn.ConvTranspose2d) -> Tensor:
    """`conv` of 1x1 images (N, in) -> (N, out, k, k), as the matrix product it is."""
    _, out, k, _ = conv.weight.shape
    y = F.linear(x, conv.weight.flatten(1).t(), conv.bias.repeat_interleave(k * k))
    return y.view(-1, out, k, k).to(memory_format=torch.channels_last)


def sub_pixel_conv_transpose(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution of stride 2, as a convolution that gives the four output pixels around each input pixel
    as channels: up to twice as fast on the CPU, and on CUDA where there are few output channels."""
    size, out, k, _ = weight.shape
    taps = (k + 1) // 2  # of each of the four pixels; an odd kernel gets a zero tap, and the image is cropped
    weight = F.pad(weight, (0, k % 2, 0, k % 2)).view(size, out, taps, 2, taps, 2)
    weight = weight.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * out, size, taps, taps)
    y = F.conv2d(x, weight, bias.repeat(4), padding=taps - 1).permute(0, 2, 3, 1)  # (N, h, w, 4 * out)
    n, h, w, _ = y.shape
    y = y.reshape(n, h, w, 2, 2, out).transpose(2, 3).reshape(n, 2 * h, 2 * w, out)
    return y[:, : 2 * h - k % 2, : 2 * w - k % 2].contiguous().permute(0, 3, 1, 2)


class SubPixelConvTranspose(torch.autograd.Function):
    """`sub_pixel_conv_transpose` with the usual backward, which is faster on the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return sub_pixel_conv_transpose(x, weight, bias).detach()  # a view may not be changed in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)
        for_x, for_weight, _ = ctx.needs_input_grad
        how = (None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)  # stride 2, transposed; no padding, dilation or groups
        wanted = (for_x, for_weight, False)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *how, wanted)
        return grad_x, grad_weight, grad.sum((0, 2, 3))  # oneDNN's own sum takes up to two thirds of the time


class Decoder(nn.Module):
    """Features (N, feat) -> mean image (N, C, 64, 64). 1 > 5 > 13 > 30 > 64 pixels; no activation after the Linear."""

    def __init__(self, args: Args, feat_size: int, channels: int):
        super().__init__()
        depth = args.cnn_depth
        sizes = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        self.linear = nn.Linear(feat_size, sizes[0])
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(sizes[i], sizes[i + 1], kernel, stride=2) for i, kernel in enumerate((5, 5, 6, 6))
        )

    def forward(self, feat: Tensor) -> Tensor:
        x = conv_transpose_1x1(self.linear(feat), self.convs[0])
        for conv in self.convs[1:]:
            x = F.elu(x, inplace=True)
            if not x.is_cuda:
                x = SubPixelConvTranspose.apply(x, conv.weight, conv.bias)
            elif conv.out_channels <= 3:
                x = sub_pixel_conv_transpose(x, conv.weight, conv.bias)
            else:
                x = conv(x)
        return x


# RSSM


class State(NamedTuple):
    """Latent state: one-hot `stoch` (..., stoch, classes), drawn with `logit`, and `deter` (..., deter)."""

    logit: Tensor
    stoch: Tensor
    deter: Tensor

    @property
    def feat(self) -> Tensor:
        """What the heads, the actor and the critic see: (..., stoch * classes + deter)."""
        return torch.cat([self.stoch.flatten(-2), self.deter], -1)


class LayerNormGRUCell(nn.Module):
    """(N, size), (N, deter) -> (N, deter). One LayerNorm over all gates; update = 1 means overwrite."""

    def __init__(self, size: int, deter_size: int):
        super().__init__()
        self.linear = nn.Linear(size + deter_size, 3 * deter_size)
        self.norm = nn.LayerNorm(3 * deter_size, eps=1e-3)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        gates = self.norm(self.linear(torch.cat([x, deter], -1))).float()
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * deter


class RSSM(nn.Module):
    """Recurrent state-space model (equation 1).

    recurrent model             h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}])
    transition predictor        z_t ~ p(z_t | h_t)           the prior
    representation model        z_t ~ q(z_t | h_t, e_t)      the posterior; e_t: embedded image
    """

    def __init__(self, args: Args, hidden_size: int, action_size: int, embed_size: int):
        super().__init__()
        self.stoch_size, self.num_classes = args.stoch_size, args.num_classes
        self.deter_size, self.action_size = args.deter_size, action_size
        latent_size = args.stoch_size * args.num_classes
        self.input = nn.Linear(latent_size + action_size, hidden_size)
        self.input_norm = norm(args, hidden_size)
        self.gru = LayerNormGRUCell(hidden_size, args.deter_size)
        self.prior_hidden = nn.Linear(args.deter_size, hidden_size)
        self.prior_norm = norm(args, hidden_size)
        self.prior_logit = nn.Linear(hidden_size, latent_size)
        self.post_hidden = nn.Linear(args.deter_size + embed_size, hidden_size)
        self.post_norm = norm(args, hidden_size)
        self.post_logit = nn.Linear(hidden_size, latent_size)
        self.act = activation(args)

    def initial(self, batch_size: int) -> State:
        """All zeros, as in the official code."""
        stoch = self.input.weight.new_zeros(batch_size, self.stoch_size, self.num_classes)
        return State(stoch, stoch, self.input.weight.new_zeros(batch_size, self.deter_size))

    def recur(self, stoch: Tensor, action: Tensor, deter: Tensor) -> Tensor:
        """h_t from z_{t-1}, the action taken there and h_{t-1}."""
        x = self.input(torch.cat([stoch.flatten(-2), action], -1))
        return self.gru(self.act(self.input_norm(x)), deter)

    def prior(self, deter: Tensor) -> Tensor:
        """Logits (..., stoch, classes) of p(z_t | h_t)."""
        hidden = self.act(self.prior_norm(self.prior_hidden(deter)))
        return self.prior_logit(hidden).float().unflatten(-1, (self.stoch_size, self.num_classes))

    def project_embed(self, embed: Tensor) -> Tensor:
        """The embedding's share of the posterior's hidden layer; it needs no recurrence: all t at once."""
        return F.linear(embed, self.post_hidden.weight[:, self.deter_size :], self.post_hidden.bias)

    def posterior(self, deter: Tensor, projected: Tensor) -> Tensor:
        """Logits (..., stoch, classes) of q(z_t | h_t, e_t), e_t being given by `project_embed`."""
        hidden = F.linear(deter, self.post_hidden.weight[:, : self.deter_size]) + projected
        hidden = self.act(self.post_norm(hidden))
        return self.post_logit(hidden).float().unflatten(-1, (self.stoch_size, self.num_classes))

    def imagine_step(self, state: State, action: Tensor) -> State:
        """One step of the prior."""
        deter = self.recur(state.stoch, action, state.deter)
        logit = self.prior(deter)
        return State(logit, sample_onehot(logit), deter)

    def observe_step(self, stoch: Tensor, deter: Tensor, action: Tensor, projected: Tensor, is_first: Tensor) -> State:
        """One step of the posterior; where an episode begins the previous state and action are multiplied by 0."""
        keep = 1 - is_first.to(deter.dtype)[:, None]
        deter = self.recur(stoch * keep[..., None], action * keep, deter * keep)
        logit = self.posterior(deter, projected)
        return State(logit, sample_onehot(logit), deter)

    def observe_span(self, state: State, action: Tensor, projected: Tensor, is_first: Tensor) -> State:
        """The posterior states of some steps, (T, B, ...): what is compiled as one."""
        states = []
        for step in zip(action, projected, is_first, strict=True):
            state = self.observe_step(state.stoch, state.deter, *step)
            states.append(state)
        return State(*(torch.stack(fields) for fields in zip(*states, strict=True)))

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None):
        """Filters a batch of sequences: posterior states and the prior's logits, all (T, B, ...).

            x_0      x_1      x_2          a_t led to x_t; the state before index 0 is `state` (zeros if None)
             |        |        |
        -a_0-> s_0 -a_1-> s_1 -a_2-> s_2
        """
        state = state or self.initial(embed.shape[1])
        projected = self.project_embed(embed)  # (T, B, hidden)
        spans = []
        for span in zip(*(field.split(10) for field in (action, projected, is_first)), strict=True):
            spans.append(self.observe_span(state, *span))
            state = State(*(field[-1] for field in spans[-1]))
        post = State(*(torch.cat(fields) for fields in zip(*spans, strict=True)))
        return post, self.prior(post.deter)  # the loss needs no draw from the prior, so no recurrence either


# REPLAY


class Batch(NamedTuple):
    """Sequences, (T, B, ...). Index t: what was seen, the action that led there, the reward on arriving."""

    image: Tensor  # (T, B, C, 64, 64) uint8
    action: Tensor  # (T, B, action), zeros at a reset
    reward: Tensor  # (T, B)
    is_first: Tensor  # (T, B) bool
    is_terminal: Tensor  # (T, B) bool; a time limit is not terminal


def draw_starts(replay: "Replay", rng: np.random.Generator, env: np.ndarray, length: int) -> np.ndarray:
    """First row of each sequence, for the streams `env` (B,).

    A row is drawn uniformly; if its episode ends, or the stream does, less than `length` rows later, the sequence is
    the last one before that end. So an episode's last row is as likely to be seen as one in its middle, as with the
    official `prioritize_ends` (where the last sequence has `length` + 1 shares to the others' 1; here `length`).
    """
    oldest = replay.total - len(replay)
    start = oldest + rng.integers(len(replay), size=len(env))  # (B,)
    rows = start + np.arange(length)[:, None]  # (length, B)
    is_end = replay.steps["is_last"][rows % replay.rows, env] | (rows >= replay.total - 1)
    end = np.where(is_end.any(0), is_end.argmax(0), length - 1)
    return np.maximum(start + end - (length - 1), oldest)


class Replay:
    """Ring buffer of environment steps in a memory-mapped file, one stream per environment, each frame stored once.

    Every row carries a checksum. The ring has `slack` rows more than it offers: what a run writes after its last
    checkpoint never overwrites a row which that checkpoint counts on, so a killed run finds them all again.
    On CUDA the images are mirrored in GPU memory if they fit there, and gathered there.
    """

    GROWTH = 1024  # rows for which disk space is reserved at a time: a full disk is an error here, not a SIGBUS later

    def __init__(self, folder: Path, capacity: int, slack: int, num_envs: int, image_shape, action_size: int, device):
        self.fields = np.dtype(
            [
                ("image", np.uint8, image_shape),
                ("action", np.float32, (action_size,)),
                ("reward", np.float32),
                ("is_first", bool),
                ("is_terminal", bool),
                ("is_last", bool),
                ("checksum", np.uint32),
            ]
        )
        self.capacity, self.num_envs, self.device = capacity // num_envs, num_envs, device
        self.rows = self.capacity + slack
        self.total = 0  # rows ever written to each stream
        self.path = folder / "steps.npy"
        mode = "r+" if self.path.exists() else "w+"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if mode == "r+":
                np.lib.format.open_memmap(self.path, "r")  # "r+" would fill up a truncated file with zeros
            self.steps = np.lib.format.open_memmap(self.path, mode, self.fields, (self.rows, num_envs))
            if self.steps.dtype != self.fields or self.steps.shape != (self.rows, num_envs):
                flags = "replay_capacity, num_envs, action_repeat or checkpoint_interval"
                raise ValueError(f"it was written with another environment, {flags}: give those of its config.yaml")
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"cannot open the replay {self.path}: {error}") from None
        self.reserve(0)
        self.mirror = None
        if device.type == "cuda" and self.steps["image"].nbytes < 0.6 * torch.cuda.mem_get_info()[0]:
            self.mirror = torch.zeros(self.steps["image"].shape, dtype=torch.uint8, device=device)

    def reserve(self, row: int) -> None:
        """Takes disk space for the rows from `row` on. Raises `UserError` on a full disk."""
        self.reserved = min(self.rows, row + self.GROWTH)
        if hasattr(os, "posix_fallocate"):
            try:
                with open(self.path, "r+b") as file:
                    stride = self.num_envs * self.fields.itemsize
                    offset = self.steps.offset + row * stride
                    os.posix_fallocate(file.fileno(), offset, (self.reserved - row) * stride)
            except OSError as error:
                text = f"no room for the replay {self.path} ({error.strerror})"
                raise UserError(f"{text}: free some space, then start again or --resume") from None

    def add(self, image, action, reward, is_first, is_terminal, is_last) -> None:
        """Appends one row to each stream; arguments are (num_envs, ...). Raises `UserError` on a full disk."""
        row = self.total % self.rows
        if row >= self.reserved:
            self.reserve(row)
        steps = np.empty(self.num_envs, self.fields)
        values = (image, action, reward, is_first, is_terminal, is_last)
        for name, value in zip(self.fields.names[:-1], values, strict=True):
            steps[name] = value
        steps["checksum"] = [self.checksum(step, self.total) for step in steps]
        self.steps[row] = steps
        if self.mirror is not None:
            self.mirror[row].copy_(torch.from_numpy(np.ascontiguousarray(image)), non_blocking=True)
        self.total += 1

    @staticmethod
    def checksum(step: np.void, index: int) -> int:
        """Of a stream's row number `index`, so that a row which took another's place is known for what it is."""
        return zlib.crc32(step.tobytes()[:-4], index)

    def close_streams(self, envs: np.ndarray) -> None:
        """Ends the open episodes of the streams `envs` with a truncation: the rows to come belong to new ones."""
        if self.total:
            for env in np.flatnonzero(envs):
                row = (self.total - 1) % self.rows
                step = self.steps[row, env].copy()
                step["is_last"] = True
                step["checksum"] = self.checksum(step, self.total - 1)
                self.steps[row, env] = step  # in one go: a kill must not leave one without the other

    def restore(self, total: int) -> None:
        """Goes back to the first `total` rows. Raises `UserError` if a row is not what was written."""
        self.total = total
        for index in range(max(0, total - self.capacity), total):
            for env, step in enumerate(self.steps[index % self.rows]):
                if step["checksum"] != self.checksum(step, index):
                    raise UserError(f"{self.path} is corrupt: wrong checksum in row {index} of environment {env}")
        if self.mirror is not None:
            for row in range(0, min(total, self.rows), self.GROWTH):
                images = np.ascontiguousarray(self.steps["image"][row : row + self.GROWTH])
                self.mirror[row : row + self.GROWTH].copy_(torch.from_numpy(images))

    def __len__(self) -> int:
        """Rows each stream offers."""
        return min(self.total, self.capacity)

    def sample(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Sequences of consecutive steps; they may cross episodes, never the place where the stream is written."""
        env = rng.integers(self.num_envs, size=batch_size)  # (B,)
        start = draw_starts(self, rng, env, length)
        rows = (start + np.arange(length)[:, None]) % self.rows  # (T, B)
        fields = {name: torch.from_numpy(self.steps[name][rows, env]) for name in Batch._fields[1:]}
        fields["is_first"][0] = True  # the state starts at zero, as in the official code
        if self.mirror is None:
            fields["image"] = torch.from_numpy(self.steps["image"][rows, env])
            if self.device.type == "cuda":
                fields = {name: value.pin_memory() for name, value in fields.items()}
        else:
            place = torch.from_numpy(rows * self.num_envs + env).pin_memory().to(self.device, non_blocking=True)
            fields["image"] = self.mirror.flatten(0, 1)[place]
        return Batch(**{name: value.to(self.device, non_blocking=True) for name, value in fields.items()})


# LOSSES


def world_model_loss(model: "WorldModel", batch: Batch, args: Args) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Equation 2: predict images, rewards and discounts, keep prior and posterior near. Returns posterior states too.

    x_t  a_t  r_t      the state s_t has seen x_0 ... x_t and the actions a_0 ... a_t that led there;
      \\   |   ^        it predicts the image x_t and the reward r_t received on arriving at x_t
       --> s_t -->
    """
    T, B = batch.reward.shape
    image = pixels_to_float(batch.image.flatten(0, 1))  # (T*B, C, 64, 64)
    embed = model.encoder(image).unflatten(0, (T, B))  # (T, B, embed)
    post, prior = model.rssm.observe(embed, batch.action, batch.is_first)
    feat = post.feat  # (T, B, feat)
    reward = batch.reward.tanh()  # games' scores differ by orders of magnitude
    losses = {
        "image": image_nll(model.decoder(feat.flatten(0, 1)).float(), image),
        "reward": model.reward.nll(feat, reward).mean(),
    }
    if model.discount is not None:
        target = args.discount * (1 - batch.is_terminal.float())  # a soft label: the head's mean already holds gamma
        logit = model.discount(feat).squeeze(-1)
        losses["discount"] = F.binary_cross_entropy_with_logits(logit, target)
    loss_kl, kl = kl_loss(post.logit, prior, args.kl_alpha, args.free_nats)
    loss = losses["image"] + losses["reward"] + args.discount_scale * losses.get("discount", 0)
    loss = loss + args.kl_loss_coeff * loss_kl
    metrics = {f"losses/{name}": value for name, value in losses.items()} | {
        "losses/kl": kl,
        "losses/model": loss,
        "latents/prior_entropy": entropy_categorical(prior).mean(),
        "latents/post_entropy": entropy_categorical(post.logit).mean(),
    }
    return loss, post, metrics


def imagine(rssm: RSSM, actor: nn.Module, start: State, horizon: int):
    """Follows the actor from N start states with the prior (section 2.2).

    Returns feat and action (H+1, N, ...), and what a_1 ... a_{H-1} were drawn from, (H-1, N, ...); a_H is in no loss.

    feat      s_0      s_1      s_2  ...  s_H        s_0: a posterior state of the batch
    action     0  -a_1->    -a_2->   ...             a_t led to s_t: the actor drew it at s_{t-1}
    """
    state, feats, policies = start, [start.feat], []
    actions = [start.deter.new_zeros(len(start.deter), rssm.action_size)]
    for _ in range(horizon):
        policies.append(actor(feats[-1].detach()))  # the actor's input takes no gradient
        actions.append(policies[-1].sample())
        state = rssm.imagine_step(state, actions[-1])
        feats.append(state.feat)
    policy = type(policies[0])(*(torch.stack(fields) for fields in zip(*policies[:-1], strict=True)))
    return torch.stack(feats), torch.stack(actions), policy


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, bootstrap: Tensor, td_lambda: float) -> Tensor:
    """Equation 4: G_t = r_t + discount_t * [(1 - lambda) V_{t+1} + lambda G_{t+1}], G_T = bootstrap. All (T, ...)."""
    next_value = torch.cat([value[1:], bootstrap[None]])
    inputs = reward + discount * next_value * (1 - td_lambda)
    returns, last = [], bootstrap
    for t in reversed(range(len(reward))):
        last = inputs[t] + discount[t] * td_lambda * last
        returns.append(last)
    return torch.stack(returns[::-1])


def imagined_returns(agent: "Dreamer", start: State, is_terminal: Tensor, args: Args) -> tuple[Tensor, ...]:
    """What `imagine` gives for N posteriors (section 2.2), target (H, N), value and weight (H+1, N).

    index       0         1         2     ...  H-1          0: a posterior state of the batch
    reward      r_0       r_1       r_2        r_{H-1}      on arriving at the state
    discount    d_0       d_1       d_2        d_{H-1}      d_0 is the true one: 0 if the episode is over there
    weight      1         d_0       d_0 d_1                 that the imagined episode got this far
    """
    model = agent.world_model
    with torch.set_grad_enabled(args.actor_grad != "reinforce"):
        feat, action, policy = imagine(model.rssm, agent.actor, start, args.imagine_horizon)
        reward = model.reward.mean(feat[:-1])  # (H, N), as discount: of the last state only the value counts
        value = agent.slow_value(feat).squeeze(-1)  # targets and baseline, as in the official code
        discount = torch.full_like(reward, args.discount)
        if model.discount is not None:
            true_discount = args.discount * (1 - is_terminal.float())
            discount = model.discount(feat[:-1]).squeeze(-1).sigmoid()
            discount = torch.cat([true_discount[None], discount[1:]])
        target = lambda_return(reward, value[:-1], discount, value[-1], args.td_lambda)  # (H, N)
    weight = torch.cat([torch.ones_like(discount[:1]), discount]).cumprod(0).detach()  # (H+1, N)
    return feat, action, policy, target, value, weight


def actor_loss(policy: NamedTuple, action: Tensor, target: Tensor, baseline: Tensor, weight: Tensor, args: Args):
    """Equation 6, over the states whose action an imagined target follows.

    state     s_0   s_1   s_2  ...  s_{H-2}   s_{H-1}   s_H
    policy    p_0   p_1   p_2  ...  p_{H-2}                      (H-1, N, ...): what a_t was drawn from, at s_{t-1}
    action     0    a_1   a_2  ...            a_{H-1}   a_H      (H+1, N, action)
    target   (G_0)  G_1   G_2  ...            G_{H-1}            (H, N): the action a_t drawn at s_{t-1} earns G_t
    baseline v_0    v_1   v_2  ...  v_{H-2}                      (H-1, N): of the state where a_t was drawn
    weight   w_0    w_1   w_2  ...  w_{H-2}                      (H-1, N)
    """
    entropy, objective = policy.entropy(), target[1:]
    if args.actor_grad == "reinforce":
        objective = policy.log_prob(action[1:-1].detach()) * (target[1:] - baseline).detach()
    elif args.actor_grad == "both":  # here the official code lets gradients through the action
        objective = policy.log_prob(action[1:-1]) * (target[1:] - baseline).detach()
        objective = args.actor_grad_mix * target[1:] + (1 - args.actor_grad_mix) * objective
    objective = objective + args.actor_entropy * entropy
    return -(weight * objective).mean(), entropy.mean()


def action_metrics(action: Tensor) -> dict[str, Tensor]:
    """Signs of a collapsed policy: the share of imagined actions (..., action) that are the most common one."""
    return {"actor/most_common": action.flatten(0, -2).mean(0).max()}


def critic_loss(value: nn.Module, feat: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Equation 5: regress v(s_t) on the stopped target G_t. feat (H, N, feat); target and weight (H, N)."""
    return (weight * normal_nll(value(feat.detach()).squeeze(-1), target.detach())).mean()


# AGENT


def autocast(args: Args, device: torch.device) -> torch.autocast:
    """The networks' precision; losses, KL, latents and optimizer state are float32 in either."""
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and, with `pred_discount`, discount head."""

    def __init__(self, args: Args, channels: int, action_size: int):
        super().__init__()
        feat_size = args.stoch_size * args.num_classes + args.deter_size
        self.encoder = Encoder(args, channels)
        self.rssm = RSSM(args, args.deter_size, action_size, self.encoder.embed_size)
        self.decoder = Decoder(args, feat_size, channels)
        self.reward = RewardHead(args, feat_size)
        self.discount = MLP(args, feat_size, args.discount_layers, 1) if args.pred_discount else None


class Dreamer(nn.Module):
    """World model, actor and critic.

    agent = Dreamer.from_pretrained("runs/<run>")
    state = agent.initial_state(num_envs)
    action, state = agent.policy(image, state, is_first)
    """

    def __init__(self, args: Args, channels: int, action_size: int):
        super().__init__()
        self.args, self.channels, self.action_size = args, channels, action_size
        feat_size = args.stoch_size * args.num_classes + args.deter_size
        self.world_model = WorldModel(args, channels, action_size)
        self.actor = Actor(args, feat_size, action_size)
        self.value = MLP(args, feat_size, args.value_layers, 1)
        init_weights(self)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)

    @classmethod
    def from_config(cls, config: str | Path | Args) -> "Dreamer":
        """A fresh agent for `Args` or a YAML file of flags; asks the environment for its sizes."""
        args = check_args(config if isinstance(config, Args) else load_config(Path(config)))
        (channels, _, _), action_size = probe_env(args)
        return cls(args, channels, action_size)

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, device: str | torch.device = "cpu") -> "Dreamer":
        """The agent of a run folder's last checkpoint."""
        checkpoint = load_checkpoint(Path(run_dir))
        agent = cls(load_config(Path(run_dir) / "config.yaml"), checkpoint["channels"], checkpoint["action_size"])
        agent.load(checkpoint)
        return agent.to(device)

    def load(self, checkpoint: dict) -> None:
        try:
            self.load_state_dict(checkpoint["agent"])
        except RuntimeError:
            raise UserError("the checkpoint has other sizes, layers or heads than the flags: leave those out") from None

    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def summary(self) -> str:
        """A line for each part: name and number of trained values."""
        parts = dict(self.world_model.named_children()) | {"actor": self.actor, "value": self.value}
        rows = [(name, sum(p.numel() for p in part.parameters())) for name, part in parts.items()]
        return "\n".join(f"{name:<10}{count:>12,}" for name, count in [*rows, ("total", self.parameter_count())])

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the policy carries from step to step: stoch, deter and the last action, all zeros."""
        state = self.world_model.rssm.initial(batch_size)
        return state.stoch, state.deter, state.deter.new_zeros(batch_size, self.action_size)

    @torch.no_grad()
    def policy(self, image, state, is_first, noise: float = 0.0, mode: bool = False):
        """One-hot actions (N, action) for images (N, C, 64, 64) uint8, and the next state.

        `noise`: probability of a random action instead; `mode`: the actor's mode instead of a draw.
        """
        rssm = self.world_model.rssm
        device = rssm.input.weight.device
        # On the CPU in float32: for a few images, casting the weights takes longer than bfloat16 saves.
        with autocast(self.args, device) if device.type == "cuda" else contextlib.nullcontext():
            image = pixels_to_float(torch.as_tensor(image, device=device))
            projected = rssm.project_embed(self.world_model.encoder(image))
            latent = rssm.observe_step(*state, projected, torch.as_tensor(is_first, device=device))
            actor = self.actor(latent.feat)
        action = actor.mode() if mode else actor.sample()
        if noise:
            is_random = torch.rand(len(action), 1, device=device) < noise
            action = torch.where(is_random, sample_onehot(torch.zeros_like(action)), action)
        return action, (latent.stoch, latent.deter, action)


def fast_policy(agent: Dreamer, num_envs: int, noise: float = 0.0, mode: bool = False) -> Callable:
    """`agent.policy` for `num_envs` environments; on CUDA one graph, whose results the next call overwrites."""

    def policy(image, state, is_first):
        return agent.policy(image, state, is_first, noise, mode)

    state = agent.initial_state(num_envs)
    device = state[0].device
    if device.type == "cpu" or not agent.args.cuda_graph:
        return policy
    image = torch.zeros(num_envs, agent.channels, 64, 64, dtype=torch.uint8, device=device)
    is_first = torch.ones(num_envs, dtype=bool, device=device)
    # Its own random numbers: it may run while an update draws some, and before torch 2.13 all graphs share an offset.
    generator = torch.cuda.default_generators[image.get_device()]
    shared, own = generator.graphsafe_get_state(), generator.clone_state()
    own.manual_seed(int(torch.randint(2**31, ())))
    generator.graphsafe_set_state(own)
    gc.collect()  # of the last evaluation's graph, which is in a reference cycle: its end would spoil a capture
    try:
        graph = torch.cuda.make_graphed_callables(policy, (image, state, is_first))
    finally:
        generator.graphsafe_set_state(shared)
    return lambda image, state, is_first: graph(torch.from_numpy(image), state, torch.from_numpy(is_first))


class Learner:
    """An agent with its three optimizers. Calling it with a batch does one update of everything and returns metrics.

    Shapes are static and nothing waits for the device, so on CUDA the whole update is one graph. A call only starts it,
    on a stream of its own; there, until the next call, `acting` has the weights from before it, so that acting need not
    wait, and what needs the new ones, or the metrics, calls `wait` first.
    """

    def __init__(self, agent: Dreamer, args: Args, device: torch.device):
        self.agent, self.args, self.device, cuda = agent, args, device, device.type == "cuda"
        self.acting = copy.deepcopy(agent).requires_grad_(False) if cuda else agent
        self.stream = torch.cuda.Stream() if cuda else None
        # AdamW shrinks weights by learning_rate * decay; in the official factor there is no learning rate.
        self.optimizers = {
            name: torch.optim.AdamW(
                module.parameters(),
                learning_rate,
                eps=args.adam_eps,
                weight_decay=args.weight_decay / learning_rate,
                fused=True,
                capturable=cuda,
            )
            for name, module, learning_rate in (
                ("model", agent.world_model, args.model_learning_rate),
                ("actor", agent.actor, args.actor_learning_rate),
                ("value", agent.value, args.value_learning_rate),
            )
        }
        # Steps skipped for a non-finite loss or gradient: in a row, and in all.
        self.skipped = {name: torch.zeros(2, device=device) for name in self.optimizers}
        self.updates, self.warmup, self.static, self.graph = 0, 3, None, None

        compiles = args.compile if cuda else args.compile_cpu  # on CUDA thousands of small kernels take the time

        def compiled(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False) if compiles else function

        self.world_model_loss, self.imagined_returns = compiled(world_model_loss), compiled(imagined_returns)
        self.actor, self.actor_loss = compiled(agent.actor), compiled(actor_loss)
        self.critic_loss = compiled(critic_loss)
        if compiles:  # in the loss too the recurrence's spans are compiled one by one: all at once takes minutes
            rssm = agent.world_model.rssm
            rssm.observe_span, rssm.observe = compiled(rssm.observe_span), torch.compiler.disable(rssm.observe)
        if compiles and not cuda:
            agent.policy = compiled(agent.policy)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self.stream is None:
            return self.learn(batch)
        caller = torch.cuda.current_stream()
        self.stream.wait_stream(caller)  # it gathers the batch
        with torch.cuda.stream(self.stream):
            with torch.no_grad():
                torch._foreach_copy_(list(self.acting.parameters()), list(self.agent.parameters()))
            self.static = self.static or Batch(*(torch.empty_like(field) for field in batch))
            torch._foreach_copy_(list(self.static), list(batch))
            caller.wait_stream(self.stream)  # for these copies, and so for the last update, but not for this one
            return self.learn(self.static)

    def wait(self) -> None:
        """What the caller starts from now on comes after the updates started so far."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One update, as a graph where there is one; now and then the slow critic becomes the critic."""
        metrics = self.replay_graph() if self.stream is not None and self.args.cuda_graph else self.update(batch)
        if self.updates % self.args.slow_target_update == 0:
            self.agent.slow_value.load_state_dict(self.agent.value.state_dict())
        self.updates += 1
        return metrics

    def replay_graph(self) -> dict[str, Tensor]:
        """`update` of the batch in `static` as one CUDA graph."""
        if self.graph is None:
            if self.warmup:  # compilation and the optimizers' first steps must come before the capture
                self.warmup -= 1
                return self.update(self.static)
            gc.collect()  # as in `fast_policy`
            self.graph = torch.cuda.CUDAGraph()
            # On this stream, since cuBLAS has a workspace for each; the prefetch thread may go on.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.metrics = self.update(self.static)
        self.graph.replay()
        return self.metrics

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the world model (section 2.1), the actor and the critic (section 2.2)."""
        agent, model, args = self.agent, self.agent.world_model, self.args
        agent.zero_grad()

        # DYNAMICS LEARNING
        with autocast(args, self.device):
            loss, post, metrics = self.world_model_loss(model, batch, args)
        loss.backward()
        metrics |= self.step("model", loss)

        # BEHAVIOUR LEARNING: imagine from every posterior state, through weights that stay as they are
        model.requires_grad_(False)  # gradients pass through the world model, none are computed for its weights
        with autocast(args, self.device):
            start = State(*(field.detach().flatten(0, 1) for field in post))  # (N, ...)
            is_terminal = batch.is_terminal.flatten()
            feat, action, policy, target, value, weight = self.imagined_returns(agent, start, is_terminal, args)
        with autocast(args, self.device):  # anew: autocast keeps casts without gradient
            if args.actor_grad == "reinforce":  # imagined without gradients
                policy = self.actor(feat[:-2])
            loss, entropy = self.actor_loss(policy, action, target, value[:-2], weight[:-2], args)
        model.requires_grad_(True)
        loss.backward()
        metrics |= {"losses/actor": loss, "actor/entropy": entropy} | action_metrics(action[1:])
        metrics |= self.step("actor", loss)
        with autocast(args, self.device):
            loss = self.critic_loss(agent.value, feat[:-1], target, weight[:-1])
        loss.backward()
        metrics |= {"losses/value": loss, "imagined/return": target.mean()} | self.step("value", loss)
        return {name: metric.detach() for name, metric in metrics.items()}

    def step(self, name: str, loss: Tensor) -> dict[str, Tensor]:
        """One step at the clipped gradient of `loss`; if either is not finite, none, without waiting for the device."""
        optimizer = self.optimizers[name]
        parameters = optimizer.param_groups[0]["params"]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)
        bad = (~(grad_norm.isfinite() & loss.isfinite())).float()
        optimizer.found_inf = bad  # where it is 1 the fused Adam leaves everything as it was
        optimizer.step()
        row, total = self.skipped[name]
        row, total = (row + bad) * bad, total + bad
        self.skipped[name].copy_(torch.stack([row, total]))
        return {f"grad_norm/{name}": grad_norm, f"skipped/{name}": total}

    def check_finite(self, metrics: dict[str, Tensor]) -> None:
        """Raises `UserError` after 10 skipped steps in a row. Waits for the device."""
        self.wait()
        if any(row >= 10 for row, _ in self.skipped.values()):
            terms = ", ".join(name for name, metric in metrics.items() if not metric.isfinite())
            raise UserError(
                f"10 updates in a row were not finite ({terms or 'gradient'}): lower the learning rate or look at the "
                "rewards; what was saved is finite"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "skipped": self.skipped,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, optimizer in self.optimizers.items():
            flags = optimizer.state_dict()["param_groups"]  # learning rates and the device may have changed since
            optimizer.load_state_dict(state["optimizers"][name] | {"param_groups": flags})
            self.skipped[name].copy_(state["skipped"][name])


# CHECKPOINT, LOGGING, EVALUATION


FORMAT = "dreamer_v2_atari 2"  # raised when checkpoints change so that old ones cannot be read


def write_file(path: Path, data: bytes) -> None:
    """Atomic: a temporary file, flushed to disk, renamed. Raises `OSError` and keeps the old file if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Like `write_file`."""
    file = io.BytesIO()
    torch.save(state, file)
    write_file(path, file.getvalue())


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The run's last checkpoint, on the CPU. `UserError` if it is missing, damaged or not this script's."""
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{run_dir} has no checkpoint.pt: nothing was saved there yet")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load itself does not look at the checksums
                raise ValueError(f"wrong checksum in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise UserError(f"cannot read the checkpoint {path}: {str(error)[:120]}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of {Path(__file__).name} ({FORMAT})")
    return checkpoint


def gif(frames: np.ndarray, fps: int = 20) -> bytes:
    """Encodes (T, H, W, 3) uint8 as a GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
    return file.getvalue()


class Console:
    """Standard output or error: a full disk, a closed terminal or a broken pipe behind it must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the last: None, if closed from the start
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        return bool(self.stream) and self.stream.isatty()

    def close(self) -> None:
        """Leaves the stream open: absl, which dm_control imports, closes at the end what standard error was then."""

    def finish(self) -> None:
        """Gives up what cannot be written: Python's own flush at the end would fail, and the exit code be 120."""
        try:
            self.stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Logger:
    """One line of metrics at a time to metrics.jsonl and TensorBoard (and, through it, to wandb)."""

    def __init__(self, run_dir: Path, args: Args, step: int, offset: int):
        self.run_dir, self.path, self.warned = run_dir, run_dir / "metrics.jsonl", set()
        if args.track:
            import wandb

            name = run_dir.resolve().name
            try:
                wandb.init(
                    project=args.wandb_project_name,
                    entity=args.wandb_entity,
                    name=name,
                    id=name[-120:],
                    resume="allow",
                    sync_tensorboard=True,
                    config=vars(args),
                    dir=run_dir,
                )
            except Exception as error:  # no login, no network
                raise UserError(f"cannot --track: {error} (wandb login, or WANDB_MODE=offline)") from None
        try:
            with open(self.path, "a+b") as file:  # what a killed run wrote after its checkpoint will be written again
                file.seek(0)
                file.truncate(file.read(offset).rfind(b"\n") + 1)  # whole lines: it may have lost its end
            self.writer = SummaryWriter(run_dir, purge_step=step + 1 if step else None)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {run_dir}: {error.strerror}") from None
        if step == 0:
            table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        finite = {key: float(f"{value:.9g}") if math.isfinite(value) else None for key, value in values.items()}
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step} | finite) + "\n")
            except OSError:
                os.truncate(self.path, size)  # the next line must not begin within half a line
                raise
            for key, value in values.items():
                self.events().add_scalar(key, value, step)
        except OSError as error:
            self.close()
            self.warn("log", f"could not log: {error}")

    def video(self, step: int, tag: str, frames: np.ndarray, path: Path | None = None) -> None:
        """(T, H, W, 3) uint8, to TensorBoard and to the file `path` if there is one.

        `add_video` writes nothing with current moviepy releases, a GIF summary does.
        """
        _, height, width, _ = frames.shape
        data = gif(frames)
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        try:
            if path:
                path.parent.mkdir(exist_ok=True)
                write_file(path, data)
            self.events().file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)
        except OSError as error:
            self.close()
            self.warn("video", f"could not write a video: {error}")

    def events(self) -> SummaryWriter:
        """TensorBoard's writer. A failed write ends its thread, so after one comes another, with a file of its own."""
        self.writer = self.writer or SummaryWriter(self.run_dir)
        return self.writer

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk
            if self.writer:
                self.writer.close()
        self.writer = None

    def warn(self, topic: str, message: str) -> None:
        """Tells each kind of trouble once."""
        if topic not in self.warned:
            self.warned.add(topic)
            tqdm.write(f"warning: {' '.join(message.split())}", file=sys.stderr)


def diagnose(values: dict[str, float], image_errors: list[float], args: Args) -> dict[str, str]:
    """The failures users report, by topic, in plain words; `image_errors` are the logged ones, constants left out."""
    found = {}
    before, lately = image_errors[-20:-10], image_errors[-10:]
    flat = len(before) == 10 and min(lately) > 0.98 * min(before)
    free = max(args.free_nats, 0.1)  # 0.1: as good as none
    if flat and values["losses/kl"] < free:
        found["collapse"] = (
            f"the KL ({values['losses/kl']:.2f} nats) is under {free:g}, the image loss is flat: if the open-loop video"
            " lacks an object, the posterior ignores it: lower --free-nats and --kl-loss-coeff"
        )
    if len(before) == 10 and values.get("actor/most_common", 0) > 0.99:  # at first it may be, and passes
        found["saturation"] = "the actor nearly always takes one action: raise --actor-entropy"
    if any(value for name, value in values.items() if name.startswith("skipped/")):
        found["skipped"] = "an update was not finite and was skipped: look at the rewards, lower the learning rates"
    return found


@torch.no_grad()
def open_loop(agent: Dreamer, batch: Batch) -> tuple[np.ndarray, float, float]:
    """Observes five frames of up to six sequences, then imagines the rest with the actions that were taken.

    Returns a video (T, 3 * 64, n * 64, 3) uint8 with rows truth, model and error, and the mean squared image error of
    the imagined frames up to the next episode, and of the same frames when they are observed.
    """
    batch = Batch(*(field[:, :6] for field in batch))
    model, (T, n) = agent.world_model, batch.reward.shape
    context = min(5, T - 1)
    truth = batch.image.float() / 255  # (T, n, C, 64, 64)
    with autocast(agent.args, truth.device):
        embed = model.encoder(truth.flatten(0, 1) - 0.5).unflatten(0, (T, n))
        post, _ = model.rssm.observe(embed, batch.action, batch.is_first)
        feats, state = list(post.feat[:context]), State(*(field[context - 1] for field in post))
        for t in range(context, T):
            state = model.rssm.imagine_step(state, batch.action[t])
            feats.append(state.feat)
        both = torch.cat([torch.stack(feats), post.feat]).flatten(0, 1)
        imagined, observed = (model.decoder(both).float() + 0.5).unflatten(0, (2, T, n)).clamp(0, 1)
    rows = torch.cat([truth, imagined, (imagined - truth + 1) / 2], 3)  # (T, n, C, 192, 64)
    video = (rows.permute(0, 3, 1, 4, 2).flatten(2, 3) * 255).byte().cpu().numpy()  # (T, 192, n * 64, C)
    known = batch.is_first[context:].cumsum(0) == 0  # (T - context, n): nothing foretells what follows a reset
    errors = ((frames - truth)[context:].square().mean((2, 3, 4)) * known for frames in (imagined, observed))
    imagined_error, observed_error = (error.sum().item() / max(known.sum().item(), 1) for error in errors)
    return video.repeat(3 // video.shape[-1], -1), imagined_error, observed_error


def evaluate(agent: Dreamer, args: Args, episodes: int, seed: int, stop: list) -> tuple[list[float], np.ndarray]:
    """Plays with the actor's mode. Returns the episodes' returns and, with `capture_video`, the first one's frames.

    Frames are (T, 64, 64, 3) uint8; without `capture_video` there is only the first: those of a long game fill memory.
    It ends early when something gets into the list `stop`, or after 108,000 frames for each episode; raises what the
    environment raises, or `RuntimeError` when no episode ended.
    """
    policy, envs = fast_policy(agent, 1, mode=True), make_envs(args, 1, workers=args.env_timeout > 0)
    try:
        image = reset_envs(envs, seed, args.env_timeout)
        is_first, is_last, state = np.ones(1, bool), np.zeros(1, bool), agent.initial_state(1)
        returns, total, frames = [], 0.0, [image[0]]
        steps_left = episodes * (108_000 // args.action_repeat + 2)  # a part of a step at the end, and the reset's row
        while len(returns) < episodes and steps_left and not stop:
            action, state = policy(image, state, is_first)
            action = action.cpu().numpy()
            if isinstance(envs, gym.vector.AsyncVectorEnv):
                envs.step_async(action)
            is_first = is_last  # the row after an episode's last is the next one's first
            image, reward, _, is_last = step_envs(envs, action, args.env_timeout)
            total += float(reward[0])
            if args.capture_video and not returns:
                frames.append(image[0])
            if is_last[0]:
                returns.append(total)
                total = 0.0
            steps_left -= 1
    finally:
        close_envs(envs)
    if not (returns or stop):
        raise RuntimeError(f"no episode ended within {episodes * 108_000:,} frames")
    frames = np.stack(frames).transpose(0, 2, 3, 1)
    return returns, frames.repeat(3 // frames.shape[-1], -1)


# TRAINING


@dataclasses.dataclass
class Counters:
    """Where a run stands. Everything but `updates_due` is in frames or counts from the run's start."""

    frames: int = 0
    updates_due: int = 0
    env_restarts: int = 0
    last_train: int = 0
    last_eval: int = 0


class SturdyEnvs:
    """A run's environments. What raises, dies or hangs is started again; five times in a row end the run."""

    def __init__(self, args: Args, counters: Counters, logger: Logger):
        self.args, self.counters, self.logger = args, counters, logger
        self.sizes = group_sizes(args)  # a group breaks alone
        self.groups = [None] * len(self.sizes)
        self.faults, self.fault_frames = [0] * len(self.sizes), [0] * len(self.sizes)  # in a row; the last one's frame

    def reset(self, seed: int) -> np.ndarray:
        """Starts everything; returns images (N, C, 64, 64)."""
        if len(self.groups) == 1:  # in this thread: what renders here may not leave it
            return self.start(0, seed)
        with ThreadPoolExecutor(len(self.groups)) as pool:  # a worker takes seconds to start
            return np.concatenate(list(pool.map(lambda group: self.start(group, seed), range(len(self.groups)))))

    def start(self, group: int, seed: int) -> np.ndarray:
        """A fresh group, tried until five faults in a row; returns its images (size, C, 64, 64)."""
        workers = self.args.num_envs > 1 or self.args.env_timeout > 0
        while True:
            try:
                envs = self.groups[group] = make_envs(self.args, self.sizes[group], workers)
                return reset_envs(envs, seed + group + self.faults[group], self.args.env_timeout)
            except (Exception, SystemExit) as error:  # whatever an environment raises
                self.broke(group, error)

    def step(self, action: np.ndarray):
        """`step_envs` for all, and who was started again (N,): there the image is the first of a new episode."""
        parts = np.split(action, np.cumsum(self.sizes)[:-1])
        for envs, part in zip(self.groups, parts, strict=True):
            with contextlib.suppress(OSError):  # a dead worker, which is met again below
                if isinstance(envs, gym.vector.AsyncVectorEnv):
                    envs.step_async(part)
        rows = []
        for group, part in enumerate(parts):
            nothing = np.zeros(self.sizes[group], bool)
            try:
                image, reward, is_terminal, is_last = step_envs(self.groups[group], part, self.args.env_timeout)
                rows.append((image, reward, is_terminal, is_last, nothing))
                if is_last.any():
                    self.faults[group] = 0
            except Exception as error:  # whatever an environment raises, or a worker's death
                self.broke(group, error)
                image = self.start(group, self.args.seed + self.counters.frames)
                rows.append((image, nothing.astype(float), nothing, nothing, ~nothing))
        return tuple(np.concatenate(field) for field in zip(*rows, strict=True))

    def broke(self, group: int, error: BaseException) -> None:
        close_envs(self.groups[group])
        if isinstance(error, UserError):
            raise error
        in_a_row = self.counters.frames - self.fault_frames[group] < 10_000  # episodes may have no end
        self.faults[group] = self.faults[group] + 1 if in_a_row else 1
        self.fault_frames[group] = self.counters.frames
        self.counters.env_restarts += 1
        died = isinstance(error, (EOFError, gym.error.NoAsyncCallError))
        cause = "its process died" if died else f"{type(error).__name__}: {str(error)[:200]}"
        if self.faults[group] == 5:
            raise UserError(f"five times in a row {self.args.env_id} failed: {cause}")
        self.logger.warn(f"env {self.faults[group]}", f"{self.args.env_id} failed: {cause}; it is started again")

    def close(self) -> None:
        for envs in self.groups:
            close_envs(envs)


def prefetch(pool: ThreadPoolExecutor, replay: Replay, rng: np.random.Generator, args: Args, count: int):
    """`count` batches; while one is used the pool's thread gathers the next. The order of draws is a plain loop's."""
    future = None
    try:
        for remaining in reversed(range(count)):
            batch = future.result() if future else replay.sample(rng, args.batch_size, args.train_seq_len)
            if remaining:
                future = pool.submit(replay.sample, rng, args.batch_size, args.train_seq_len)
            yield batch
    finally:
        if future:  # left early: the thread may be drawing with the random state that is saved next
            future.exception()


def discard_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # runs are in it
        folder.rmdir()


def discard_refused(run_dir: Path) -> None:
    """Removes the folder of a new run whose set-up failed: bad input leaves nothing behind."""
    # The set-up ends with config.yaml; a run that has saved is kept whatever became of that file.
    if not any((run_dir / name).exists() for name in ("config.yaml", "checkpoint.pt")):
        shutil.rmtree(run_dir, ignore_errors=True)


def new_run_dir(args: Args, stack: contextlib.ExitStack) -> Path:
    """Makes runs/<env>__<exp_name>__<seed>__<time>, which `stack` removes again if the set-up fails."""
    parent = Path("runs")
    if not os.path.exists(parent):
        stack.callback(discard_empty, parent)
    parent.mkdir(exist_ok=True)
    for now in itertools.count(int(time.time())):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
        run_dir = parent / re.sub(r"[^\w.=+-]+", "-", name).lstrip(".-")
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            run_dir.mkdir()
            stack.callback(discard_refused, run_dir)
            return run_dir


def open_run(args: Args, stack: contextlib.ExitStack) -> tuple[Path, dict | None]:
    """The run folder, locked until `stack` closes: a new one, or the one to resume with its checkpoint."""
    try:
        run_dir = Path(args.resume) if args.resume else new_run_dir(args, stack)
        folder = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot open the run folder {error.filename}: {error.strerror}") from None
    stack.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill releases it
    except BlockingIOError:  # two would write one replay
        raise UserError(f"another process is training in {run_dir}: wait for it, or stop it") from None
    except OSError:  # no locks on that disk
        pass
    checkpoint = load_checkpoint(run_dir) if args.resume else None
    if checkpoint and not (run_dir / "replay" / "steps.npy").is_file():
        raise UserError(f"{run_dir} has lost its replay/steps.npy: nothing to resume from")
    return run_dir, checkpoint


def write_config(run_dir: Path, args: Args) -> None:
    flags = {key: value for key, value in vars(args).items() if key not in ("config", "resume", "evaluate")}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "gymnasium", "mujoco"))
    write_file(run_dir / "config.yaml", f"# {versions}\n{yaml.safe_dump(flags, sort_keys=False)}".encode())


def tune_cpu() -> None:
    """Settings of the process that make large updates on the CPU twice as fast; results stay those of float32."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: freed memory is kept rather than mapped anew at each update (about 1 GB at full
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: size)
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
    # oneDNN's products instead of MKL's, which are slow on AMD; on Intel MKL's are as fast, and those of a step of the
    # policy faster. "bf16" only permits less precision: without AMX oneDNN still computes in float32.
    with contextlib.suppress(OSError, AttributeError):  # no Linux; an older torch
        amx = torch.cpu.get_capabilities().get("amx_bf16", True)
        if "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and not amx:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def catch_signals(numbers: tuple[int, ...]) -> list[int]:
    """From now on these signals come into the list; a second one of a number ends the process at once (not SIGHUP)."""
    caught = []

    def catch(number, _):
        # A closed terminal may tell twice, by its shell and by the kernel.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        caught.append(number)

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, catch)
    return caught


def train(args: Args, device: torch.device, stack: contextlib.ExitStack) -> None:
    """The training loop: act, learn, step, store, log, evaluate, save. `stack` closes what it opens."""
    # SETUP
    stop_signals = catch_signals(STOP_SIGNALS)
    for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
        console = Console(stream)
        stack.callback(console.finish)
        stack.enter_context(redirect(console))
    rng = np.random.default_rng(args.seed)
    image_shape, action_size = probe_env(args)
    run_dir, checkpoint = open_run(args, stack)
    if checkpoint and (checkpoint["channels"], checkpoint["action_size"]) != (image_shape[0], action_size):
        raise UserError(f"{run_dir} is of another environment: {args.env_id} has other images or actions")
    agent = Dreamer(args, image_shape[0], action_size).to(device)
    if checkpoint:
        agent.load(checkpoint)
    learner = Learner(agent, args, device)
    slack = args.checkpoint_interval // (args.action_repeat * args.num_envs) + 2
    replay = Replay(run_dir / "replay", args.replay_capacity, slack, args.num_envs, image_shape, action_size, device)
    counters = Counters()
    if checkpoint:
        learner.load_state_dict(checkpoint["learner"])
        replay.restore(checkpoint["replay_rows"])
        counters = Counters(**checkpoint["counters"])
        rng.bit_generator.state = checkpoint["numpy_rng"]
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    if not (learner.updates or counters.updates_due):  # the first training phase comes when the seed frames are over
        counters.last_train = args.seed_steps - args.collect_steps
    if args.cuda and device.type == "cpu":
        print("no CUDA device: training on the CPU", file=sys.stderr)
    if counters.frames >= args.total_steps:
        print(f"{run_dir} has its {args.total_steps} frames: --evaluate it, or raise --total-steps", file=sys.stderr)
    logger = Logger(run_dir, args, counters.frames, checkpoint["metrics_size"] if checkpoint else 0)
    stack.callback(logger.close)
    try:
        if not checkpoint:
            write_config(run_dir, args)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run_dir}: {error.strerror}") from None

    def save(last: bool = False) -> bool:
        learner.wait()
        if not last and any(row > 0 for row, _ in learner.skipped.values()):
            return False  # the weights may have diverged, and the run be about to end: the last good checkpoint stays
        state = {
            "format": FORMAT,
            "channels": image_shape[0],
            "action_size": action_size,
            "agent": agent.state_dict(),
            "learner": learner.state_dict(),
            "counters": dataclasses.asdict(counters),
            "replay_rows": replay.total,
            "metrics_size": logger.path.stat().st_size if logger.path.exists() else 0,
            "numpy_rng": rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }
        try:
            replay.steps.flush()
            if checkpoint:  # the flags beside --resume stay from here on: before, they might have failed
                write_config(run_dir, args)
            save_checkpoint(run_dir / "checkpoint.pt", state)
        except OSError as error:
            if last:
                text = f"could not save frame {counters.frames} ({error}); the previous checkpoint stays"
                raise UserError(f"{text}: free some space, then --resume {run_dir}") from None
            logger.warn("save", f"could not save ({error}); the previous checkpoint stays, trying again later")
            return False
        return True

    def assess() -> None:
        """Evaluates, and imagines what the replay holds; not if it is stopped: then the resumed run does."""
        learner.wait()
        try:
            returns, frames = evaluate(agent, args, args.eval_episodes, args.seed + counters.frames, stop_signals)
        except (Exception, SystemExit) as error:  # whatever an environment raises
            logger.warn("evaluation", f"the evaluation failed: {type(error).__name__}: {error}")
            returns, frames = [], None
        if stop_signals:
            return
        counters.last_eval = counters.frames
        if returns:
            logger.scalars(counters.frames, {"charts/eval_return": np.mean(returns)})
            bar.write(f"frame {counters.frames}: evaluation return {np.mean(returns):.2f} +- {np.std(returns):.2f}")
        if returns and args.capture_video:
            path = run_dir / "videos" / f"eval_{counters.frames}.gif"
            logger.video(counters.frames, "evaluation", frames, path)
        if len(replay) >= args.train_seq_len:
            video, imagined, observed = open_loop(agent, replay.sample(rng, 6, args.train_seq_len))
            logger.video(counters.frames, "open_loop", video)
            logger.scalars(counters.frames, {"open_loop/imagined": imagined, "open_loop/observed": observed})
            if imagined > 10 * observed:
                message = "imagined images drift away from the true ones, observed ones do not: if not by chance,"
                logger.warn("drift", f"{message} train longer, or raise --kl-loss-coeff: the prior is not learned")

    # TRAINING LOOP
    envs = SturdyEnvs(args, counters, logger)
    stack.callback(envs.close)
    image = envs.reset(args.seed + counters.frames)
    is_first, is_last = np.ones(args.num_envs, bool), np.zeros(args.num_envs, bool)
    zeros = np.zeros((args.num_envs, action_size), np.float32)
    next_log, next_save, saved_rows = counters.frames, counters.frames + args.checkpoint_interval, replay.total
    replay.close_streams(is_first)  # a resumed run's episodes
    replay.add(image, zeros, zeros[:, 0], is_first, is_last, is_last)
    policy, state = fast_policy(learner.acting, args.num_envs, args.action_noise), agent.initial_state(args.num_envs)
    episode_return, episode_frames = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    metrics, logged, image_errors = {}, 0, []
    start, start_frames, start_updates = time.time(), counters.frames, learner.updates
    interval = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=args.total_steps, initial=counters.frames, unit="frame", mininterval=interval)
    stack.callback(bar.close)
    pool = stack.enter_context(ThreadPoolExecutor(1))  # one thread for the whole run: each new one may add a heap
    while counters.frames < args.total_steps and not stop_signals:
        # ACT
        if counters.frames < args.seed_steps:
            action = random_actions(rng, args.num_envs, action_size)
        else:
            action, state = policy(image, state, is_first)
            action = action.cpu().numpy()
            if not np.isfinite(action).all():
                raise UserError("the policy's actions are not finite: lower the learning rates")

        # LEARN: on CUDA an update is only started here, and runs while the agent acts and the environments step
        # A step of many environments may pass several phases; before the first update none are made up for.
        phases = (counters.frames - counters.last_train) // args.collect_steps
        if phases > 0 and len(replay) >= args.train_seq_len:
            begun = learner.updates or counters.updates_due
            due = phases * args.update_steps if begun else args.pretrain or args.update_steps
            counters.updates_due += due
            counters.last_train += phases * args.collect_steps
        updates = counters.updates_due if len(replay) >= args.train_seq_len else 0
        for batch in prefetch(pool, replay, rng, args, updates):
            try:
                metrics = learner(batch)
            except Exception:
                if stop_signals:  # Ctrl-C ends the compilers that torch.compile has started, too
                    break
                raise
            if device.type == "cpu":  # on CUDA before each log line, which waits for the device anyway
                learner.check_finite(metrics)
            counters.updates_due -= 1
            bar.update(0)
            if stop_signals:
                break

        # STEP
        try:
            image, reward, is_terminal, ended, restarted = envs.step(action)
            bad = reward[~(np.abs(reward) < 1e38)]  # NaN too; float32 ends at 3e38
            if len(bad):
                raise UserError(f"{args.env_id} gave the reward {bad[0]}: mend it, then --resume {run_dir}")

            # STORE
            replay.close_streams(restarted)
            is_first, is_last = is_last | restarted, ended  # the row after an episode's last is the next one's first
            action[is_first] = 0
            replay.add(image, action, reward, is_first, is_terminal, is_last)
        except UserError:
            save()
            raise
        stepped = args.action_repeat * int((~is_first).sum())
        counters.frames += stepped
        bar.update(stepped)
        episode_return = np.where(restarted, 0, episode_return + reward)
        episode_frames = np.where(restarted, 0, episode_frames + args.action_repeat * ~is_first)
        for env in np.flatnonzero(is_last):
            values = {"charts/episodic_return": episode_return[env], "charts/episodic_length": episode_frames[env]}
            logger.scalars(counters.frames, values)
            bar.set_postfix({"return": f"{episode_return[env]:.1f}"}, refresh=False)
            episode_return[env], episode_frames[env] = 0, 0

        # LOG
        done = counters.frames >= args.total_steps
        # Not at a reset's row, whose frame may be a checkpoint's: after a kill TensorBoard would keep that line, since
        # it forgets only later frames.
        if metrics and stepped and (counters.frames >= next_log and learner.updates > logged or done):
            next_log, logged = counters.frames + args.scalar_freq, learner.updates
            learner.check_finite(metrics)
            seconds = time.time() - start
            values = {name: metric.item() for name, metric in metrics.items()}
            values["charts/SPS"] = (counters.frames - start_frames) / seconds
            values["charts/updates_per_second"] = (learner.updates - start_updates) / seconds
            values["charts/updates"] = learner.updates
            values["charts/env_restarts"] = counters.env_restarts
            image_errors.append(values["losses/image"] - 0.5 * math.log(2 * math.pi) * math.prod(image_shape))
            for topic, message in diagnose(values, image_errors, args).items():
                logger.warn(topic, message)
            logger.scalars(counters.frames, values)

        # EVALUATE
        evaluation_due = args.eval_every and counters.frames // args.eval_every > counters.last_eval // args.eval_every
        if evaluation_due and not (done or stop_signals):  # the last one comes after the loop
            assess()

        # SAVE
        # The last chance: soon the ring overwrites what the last checkpoint counts on.
        slack_used = replay.total >= replay.rows and replay.total - saved_rows >= slack - 1
        if not done and (counters.frames >= next_save or slack_used or restarted.any()):
            next_save = counters.frames + args.checkpoint_interval
            if save(last=slack_used):
                saved_rows = replay.total

    if args.eval_every and counters.last_eval < counters.frames and not stop_signals:
        assess()
    save(last=True)
    if stop_signals:
        print(f"\nstopped and saved at frame {counters.frames}; continue with --resume {run_dir}", file=sys.stderr)
    else:
        logger.scalars(counters.frames, {})  # a last line without values: the run is complete


def main(args: Args) -> None:
    """Trains, or with `--evaluate` plays. Raises `UserError` for bad input."""
    tune_cpu()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if not args.evaluate:
        compiles, flag = args.compile_cpu, "--no-compile-cpu"
        if device.type == "cuda":
            compiles, flag = args.compile, "--no-compile"
        if compiles:
            try:  # on something small, before anything is created
                torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
            except Exception as error:  # of the compiler's many
                reason = str(error).partition("\n")[0]
                mend = f"install g++ and Python's headers (python3-dev), or give {flag}"
                raise UserError(f"torch.compile fails ({reason}): {mend}") from None
        try:
            with contextlib.ExitStack() as stack:
                train(args, device, stack)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))):
                raise
            raise UserError("out of memory: lower --batch-size, --train-seq-len or the networks' sizes") from None
        return
    agent = Dreamer.from_pretrained(args.evaluate, device)
    (channels, _, _), action_size = probe_env(args)
    if (channels, action_size) != (agent.channels, agent.action_size):
        raise UserError(f"the agent was trained on another environment: {args.env_id} has other images or actions")
    # Flags may have been given beside --evaluate; the frames of a video would be kept for nothing.
    agent.args = args = dataclasses.replace(args, capture_video=False)
    stop_signals = catch_signals((signal.SIGINT, signal.SIGTERM))  # else pygame would take the second
    try:
        returns, _ = evaluate(agent, args, args.eval_episodes, args.seed, stop_signals)
    except (Exception, SystemExit) as error:  # whatever an environment raises
        raise UserError(f"{args.env_id} failed: {type(error).__name__}: {error}") from None
    if not returns:
        raise UserError("stopped before the end of the first episode")
    print(f"{args.env_id}: return {np.mean(returns):.2f} +- {np.std(returns):.2f} over {len(returns)} episodes")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

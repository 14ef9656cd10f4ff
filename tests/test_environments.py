"""Promises about environments: the papers' tasks load and render, pixels are 64x64, actions lie in [-1, 1], repeats sum
rewards, time limits are no terminals, the last observation of an episode is kept, seeds repeat frames."""

import itertools
import os
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from tests.running import CONTINUOUS, SCRIPTS, contents, env_id, is_discrete, load, small, small_args, start, train

ACTION_SIZES = {"acrobot": 1, "cartpole": 1, "cheetah": 6, "ball_in_cup": 2, "finger": 2, "hopper": 4, "pendulum": 1}
ACTION_SIZES |= {"quadruped": 12, "reacher": 2, "walker": 6}
VISION_TASKS = """acrobot-swingup ball_in_cup-catch cartpole-balance cartpole-balance_sparse cartpole-swingup
cartpole-swingup_sparse cheetah-run finger-spin finger-turn_easy finger-turn_hard hopper-hop hopper-stand
pendulum-swingup quadruped-run quadruped-walk reacher-easy reacher-hard walker-run walker-stand walker-walk"""


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


@pytest.fixture(params=CONTINUOUS)
def continuous(request):
    return load(request.param)


def make(script, env_id, **changes):
    return script.make_env(small_args(script, env_id=env_id, **changes))


def play(env, steps=3, seed=1, resets=1):
    """Frames and rewards of some steps with a fixed sequence of actions."""
    rng, frames, rewards = np.random.default_rng(0), [], []
    for reset in range(resets):
        frames.append(env.reset(**({} if reset else {"seed": seed}))[0])
        for _ in range(steps):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            image, reward, _, _, _ = env.step(action)
            frames.append(image)
            rewards.append(reward)
    env.close()
    return np.stack(frames), np.array(rewards)


def assert_usable(env, action_size):
    assert env.action_space.shape == (action_size,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    frames, rewards = play(env)
    assert frames.shape == (4, 3, 64, 64) and frames.dtype == np.uint8
    assert frames[0].std() > 5, "a blank picture"
    assert (frames[1:] != frames[0]).any(), "nothing moves"
    assert np.isfinite(rewards).all()


# DEEPMIND CONTROL


@pytest.mark.parametrize("task", VISION_TASKS.split())
def test_every_vision_task_of_the_paper_works(continuous, task):
    assert_usable(make(continuous, f"dmc/{task}"), ACTION_SIZES[task.partition("-")[0]])


def test_both_spellings_of_dm_control_are_the_same_environment(continuous):
    (frames, rewards), (other_frames, other_rewards) = (
        play(make(continuous, spelling)) for spelling in ("dmc/cartpole-swingup", "dm_control/cartpole-swingup-v0")
    )
    assert (frames == other_frames).all() and (rewards == other_rewards).all()


def test_dm_control_episodes_have_1000_frames_and_end_without_a_terminal(continuous):
    env = make(continuous, "dmc/cartpole-balance", action_repeat=100)
    env.reset(seed=1)
    ends = [env.step(np.zeros(1, np.float32))[1:4] for _ in range(10)]
    assert [(terminated, truncated) for _, terminated, truncated in ends] == [(False, False)] * 9 + [(False, True)]
    assert sum(reward for reward, _, _ in ends) > 100, "rewards of the repeated frames are summed"


def test_dm_control_frames_are_those_of_the_suite_itself(continuous):
    env = make(continuous, "dmc/quadruped-walk", action_repeat=2)
    from dm_control import suite

    frames, rewards = play(env, seed=3)
    task = suite.load("quadruped", "walk", task_kwargs={"random": np.random.RandomState(3)})
    rng, spec = np.random.default_rng(0), task.action_spec()
    task.reset()
    for t in range(3):
        action = (rng.uniform(-1, 1, 12).astype(np.float32) + 1) / 2 * (spec.maximum - spec.minimum) + spec.minimum
        reward = task.step(action).reward + task.step(action).reward
        truth = task.physics.render(64, 64, camera_id=2).transpose(2, 0, 1)
        assert np.abs(truth - frames[t + 1].astype(float)).mean() < 1
        assert rewards[t] == pytest.approx(reward, abs=1e-4)


# GYMNASIUM


@pytest.mark.parametrize(
    ("name", "action_size"), [("Pendulum-v1", 1), ("HalfCheetah-v5", 6), ("Humanoid-v5", 17), ("HalfCheetah-v4", 6)]
)
def test_gymnasium_environments_work_from_pixels(continuous, name, action_size):
    if name not in gym.registry:
        pytest.skip(f"{name} is not part of this Gymnasium")
    assert_usable(make(continuous, name), action_size)


@pytest.mark.parametrize("known_already", [True, False])
def test_module_and_id_imports_the_module(script, known_already, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"fresh_{script.__name__}_{known_already}"
    lines = [
        "import gymnasium as gym",
        "from tests.pixel_envs import DotSteer",
        f"gym.register('{name}-v0', DotSteer, max_episode_steps=9, kwargs={{'discrete': {is_discrete(script)}}})",
    ]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    if known_already:
        __import__(name)
    envs = script.make_envs(small_args(script, env_id=f"{name}:{name}-v0"), 1)
    image, _ = envs.reset(seed=1)
    assert image.shape[-2:] == (64, 64) and image.dtype == np.uint8
    envs.close()


# ACTIONS, REPEATS, ENDS


def test_actions_between_minus_one_and_one_span_the_environments_own_range(continuous):
    env = make(continuous, env_id(continuous, "Gauge", "tests.faulty_envs"), action_repeat=1)
    env.reset(seed=1)
    for action in ([-1, -1], [1, 1], [0, 0.5]):
        env.step(np.array(action, np.float32))
    assert env.unwrapped.actions == [[-3, -3], [5, 5], [1, 3]]


@pytest.mark.parametrize(("low", "high"), [(-3.3, 0.7), (1e-3, 5), (-0.4, 0.4), (0, 1)])
def test_no_rounding_takes_an_action_out_of_bounds(continuous, low, high, monkeypatch):
    from tests import faulty_envs

    box = gym.spaces.Box(np.float32(low), np.float32(high), (2,))
    monkeypatch.setattr(faulty_envs.Gauge, "bounds", box)
    env = make(continuous, "tests.faulty_envs:Gauge-v0", action_repeat=1)
    env.reset(seed=1)
    for action in np.random.default_rng(0).uniform(-1, 1, (100, 2)).round(1):
        env.step(action.astype(np.float32))
    assert all(box.contains(np.array(action, np.float32)) for action in env.unwrapped.actions)


@pytest.mark.parametrize("discount, terminal", [(0.0, True), (1.0, False)])
def test_dm_control_tells_the_worlds_end_from_a_time_limit_by_the_discount(continuous, discount, terminal, monkeypatch):
    env = make(continuous, "dmc/cartpole-balance").unwrapped
    env.reset(seed=1)
    step = SimpleNamespace(last=lambda: True, discount=discount, reward=None)
    monkeypatch.setattr(env, "env", SimpleNamespace(step=lambda action: step))
    _, reward, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
    assert (reward, terminated, truncated) == (0.0, terminal, not terminal)
    step.last = lambda: False
    assert env.step(np.zeros(1, np.float32))[2:4] == (False, False)


def test_random_actions_are_uniform(script):
    actions = script.random_actions(np.random.default_rng(0), 20_000, 4)
    assert actions.shape == (20_000, 4) and actions.dtype == np.float32
    if is_discrete(script):
        assert {*np.unique(actions)} == {0, 1} and (actions.sum(1) == 1).all()
        assert np.abs(actions.mean(0) - 1 / 4).max() < 0.02
    else:
        assert -1 <= actions.min() < -0.999 and 0.999 < actions.max() <= 1
        assert np.abs(actions.mean(0)).max() < 0.02 and np.abs(actions.var(0) - 1 / 3).max() < 0.01


def test_pixels_are_means_over_areas(script):
    frame = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    env = script.Pixels(Rendered(frame))
    means = frame.reshape(64, 2, 64, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(env.pixels().astype(float) - means).max() <= 0.51


class Rendered(gym.Env):
    def __init__(self, frame):
        self.render = lambda: frame


def test_lqr_has_the_same_springs_in_every_environment_of_a_run(continuous):
    stiffness = []
    for seed in (1, 1, 2):
        env = make(continuous, "dmc/lqr-lqr_2_1", seed=seed)
        stiffness.append(env.unwrapped.env.physics.model.jnt_stiffness.copy())
    assert (stiffness[0] == stiffness[1]).all() and (stiffness[0] != stiffness[2]).any()


def test_an_action_is_repeated_and_drawn_once_and_its_rewards_are_summed(script):
    env = make(script, env_id(script, "Gauge", "tests.faulty_envs"), action_repeat=2)
    gauge, action = env.unwrapped, env.action_space.sample()
    env.reset(seed=1)
    drawn = gauge.drawn
    assert env.step(action)[1:4] == (10 + 100, False, False)
    assert len(gauge.actions) == 2 and gauge.actions[0] == gauge.actions[1]
    assert gauge.drawn == drawn + 1


def test_repeating_stops_where_the_episode_ends(script):
    env = make(script, env_id(script, "Gauge", "tests.faulty_envs"), action_repeat=4)
    action = env.action_space.sample()
    env.reset(seed=1)
    env.step(action)
    assert env.step(action)[1:4] == (10**5, True, False), "one step was left, and it is a true end"
    assert len(env.unwrapped.actions) == 5


def test_a_time_limit_is_a_truncation(script):
    env = make(script, env_id(script), action_repeat=5)  # 25 steps
    env.reset(seed=1)
    action = env.action_space.sample()
    assert [env.step(action)[2:4] for _ in range(5)] == [(False, False)] * 4 + [(False, True)]


# WHAT IS STORED


def replayed(script, name, steps, seed):
    """Plays the stored actions on the environment itself; yields each row with what the environment gives."""
    env = gym.make(name, render_mode="rgb_array")
    env.reset(seed=seed)
    for t, row in enumerate(steps):
        reward, terminated, truncated = 0.0, False, False
        if row["is_first"]:
            if t:
                env.reset()
        else:
            action = int(row["action"].argmax()) if is_discrete(script) else row["action"]
            for _ in range(2):
                _, step_reward, terminated, truncated, _ = env.step(action)
                reward += step_reward
                if terminated or truncated:
                    break
        yield row, env.render().transpose(2, 0, 1), reward, terminated, truncated


@pytest.mark.parametrize("name", ["DotSteer", "TerminalGoal"])
def test_the_replay_holds_every_step_of_every_episode(script, name, tmp_path):
    """Time limits (DotSteer) and true ends: frames, rewards and flags are those of the environment, the last
    observation of each episode has a row of its own, and the next row is a reset's, without action and reward."""
    run_dir = train(script, tmp_path, small(script, env_id=env_id(script, name), train_seq_len=8))
    last = script.load_checkpoint(run_dir)["replay_rows"]
    steps = np.load(run_dir / "replay" / "steps.npy", mmap_mode="r")[:last, 0]
    assert steps["is_first"][0] and steps["is_last"].sum() >= 5
    assert (steps["is_first"][1:] == steps["is_last"][:-1]).all()
    assert (steps["action"][steps["is_first"]] == 0).all() and (steps["reward"][steps["is_first"]] == 0).all()
    for row, frame, reward, terminated, truncated in replayed(script, env_id(script, name), steps, seed=1):
        stored = row["image"]
        if len(stored) == 1:  # grey
            assert np.abs(stored[0] - frame.transpose(1, 2, 0) @ [0.299, 0.587, 0.114]).max() < 2
        else:
            assert (stored == frame).all()
        assert row["reward"] == pytest.approx(reward, abs=1e-5)
        assert (row["is_terminal"], row["is_last"]) == (terminated, terminated or truncated)


# SEEDS AND PROCESSES


@pytest.mark.parametrize("name", ["dmc/walker-walk", "HalfCheetah-v5", "Pendulum-v1", "tests.pixel_envs:DotSteer-v0"])
def test_one_seed_gives_the_same_frames_another_gives_others(continuous, name):
    (frames, rewards), (again, rewards_again), (other, _) = (
        play(make(continuous, name), seed=seed, resets=2) for seed in (1, 1, 2)
    )
    assert (frames == again).all() and (rewards == rewards_again).all()
    assert (frames[0] != other[0]).any() and (frames[4] != frames[0]).any()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["dmc/cartpole-swingup", "DotSteer"])
def test_two_environments_in_processes_of_their_own_give_the_frames_of_two_alone(script, name):
    if name.startswith("dmc/"):
        if is_discrete(script):
            pytest.skip("dm_control has continuous actions")
    else:
        name = env_id(script)
    args = small_args(script, env_id=name, num_envs=2)
    actions = np.stack([script.make_env(args).action_space.sample()] * 2)
    alone = [script.make_env(args) for _ in range(2)]
    envs = script.make_envs(args, 2, workers=True)
    try:
        image, _ = envs.reset(seed=5)
        assert image.shape[0] == 2 and image.shape[-2:] == (64, 64) and (image[0] != image[1]).any()
        for i, env in enumerate(alone):
            assert (image[i] == env.reset(seed=5 + i)[0]).all()
        for _ in range(3):
            image, reward, terminated, truncated, _ = envs.step(actions)
            for i, env in enumerate(alone):
                frame, reward_alone, *ends, _ = env.step(actions[i])
                assert (image[i] == frame).all() and reward[i] == pytest.approx(reward_alone)
                assert ends == [terminated[i], truncated[i]]
    finally:
        envs.close()


# OPENGL

EGL, OSMESA = {"libEGL.so.1", "libGL.so.1"}, {"libOSMesa.so.8"}


@pytest.mark.parametrize(
    ("libraries", "environ", "chosen"),
    [
        (EGL | OSMESA, {}, "egl"),
        (EGL, {}, "egl"),
        (OSMESA, {}, "osmesa"),
        ({"libEGL.so.1"} | OSMESA, {}, "osmesa"),
        ({"libGL.so.1"} | OSMESA, {}, "osmesa"),
        (EGL, {"DISPLAY": ":0"}, "egl"),
        (set(), {"DISPLAY": ":0"}, None),
        (set(), {}, "error"),
        ({"libEGL.so.1"}, {}, "error"),
        (EGL, {"MUJOCO_GL": "osmesa"}, "osmesa"),
        (set(), {"MUJOCO_GL": "glfw"}, "glfw"),
        (EGL, {"MUJOCO_GL": ""}, "egl"),
    ],
)
def test_the_gl_backend_is_what_the_user_set_else_egl_else_osmesa(continuous, libraries, environ, chosen, monkeypatch):
    def open_library(name, *_):
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")

    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(continuous, "ctypes", SimpleNamespace(CDLL=open_library))
    if chosen == "error":
        with pytest.raises(continuous.UserError, match="apt-get install.* libegl1 libgl1"):
            continuous.choose_gl()
    else:
        continuous.choose_gl()
    assert os.environ.get("MUJOCO_GL") == (None if chosen == "error" else chosen)
    monkeypatch.delenv("MUJOCO_GL", raising=False)


# TRAINING ON THEM


def test_a_short_run_ends_without_a_word_of_trouble(continuous, tmp_path):
    """In a process of its own: what dm_control imports has a say at its end."""
    flags = small(continuous, env_id="dmc/reacher-easy", total_steps=60, seed_steps=40, replay_capacity=60)
    process = start(continuous, tmp_path, flags)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "Error" not in errors, errors


@pytest.mark.parametrize("name", ["dmc/reacher-easy", "Pendulum-v1"])
def test_a_short_run_works(continuous, name, tmp_path):
    flags = small(continuous, env_id=name, total_steps=60, seed_steps=40, checkpoint_interval=40, replay_capacity=60)
    run_dir = train(continuous, tmp_path, flags)
    assert continuous.load_checkpoint(run_dir)["counters"]["frames"] == 60
    written = itertools.chain(contents(tmp_path), contents(run_dir))
    assert not [path for path in written if path.endswith(".tmp")]

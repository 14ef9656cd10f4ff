"""What dreamer_v2_atari.py promises about its environments, compared with ALE's plain interface and OpenCV."""

import re

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

from tests.running import load, read_metrics, small, small_args, train

atari = load("dreamer_v2_atari")

GAMES = (  # the 55 of the DreamerV2 paper
    "alien amidar assault asterix asteroids atlantis bank_heist battle_zone beam_rider berzerk bowling boxing breakout "
    "centipede chopper_command crazy_climber demon_attack double_dunk enduro fishing_derby freeway frostbite gopher "
    "gravitar hero ice_hockey james_bond kangaroo krull kung_fu_master montezuma_revenge ms_pacman name_this_game "
    "phoenix pitfall pong private_eye qbert riverraid road_runner robotank seaquest skiing solaris space_invaders "
    "star_gunner tennis time_pilot tutankham up_n_down venture video_pinball wizard_of_wor yars_revenge zaxxon"
)


def make(env_id: str, num_envs: int = 1, **flags):
    return atari.make_envs(small_args(atari, **{"env_id": env_id, "action_repeat": 4} | flags), num_envs)


def one_hot(action, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[np.asarray(action)]


class Reference:
    """A game in ALE's plain interface, after `noops` frames of doing nothing."""

    def __init__(self, game: str, noops: int, full_action_space: bool = False):
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", 0)
        self.ale.loadROM(ale_py.roms.get_rom_path(game))
        self.actions = self.ale.getLegalActionSet() if full_action_space else self.ale.getMinimalActionSet()
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(0)

    def frame(self, *screens: np.ndarray) -> np.ndarray:
        """What the agent sees of these raw frames, or of the present one: (64, 64) uint8."""
        screen = np.maximum.reduce(screens) if screens else self.ale.getScreenGrayscale()
        return cv2.resize(screen, (64, 64), interpolation=cv2.INTER_AREA)

    def step(self, action: int, repeat: int = 4) -> tuple[np.ndarray, int, bool]:
        reward, screens = 0, []
        for _ in range(repeat):
            reward += self.ale.act(self.actions[action])
            screens.append(self.ale.getScreenGrayscale())
            if self.ale.game_over():
                break
        return self.frame(*screens[-2:]), reward, self.ale.game_over()


# FRAMES, REWARDS, ENDS


@pytest.mark.parametrize("repeat", [4, 1, 3])
@pytest.mark.parametrize("game", ["pong", "breakout", "ms_pacman"])
def test_frames_are_the_area_resized_maximum_of_the_last_two_of_the_repeated_ones(game, repeat):
    """Grey, bit for bit, and so are rewards and ends, over 60 steps after the first frame's up to 30 no-ops.

    Not the image of an episode's last row: when the game ends ALE repeats the one before, as Gymnasium's preprocessing
    does, which the official code uses.
    """
    envs = make(f"atari/{game}", sticky_actions=False, action_repeat=repeat)
    image, info = envs.reset(seed=3)
    assert image.shape == (1, 1, 64, 64) and image.dtype == np.uint8
    noops = info["episode_frame_number"][0]
    assert 0 < noops <= 30  # some, under this seed
    reference, rng, size = Reference(game, noops), np.random.default_rng(0), envs.single_action_space.n
    assert np.array_equal(image[0, 0], reference.frame())
    for _ in range(60):
        action = rng.integers(size)
        image, reward, is_terminal, is_last = atari.step_envs(envs, one_hot([action], size))
        frame, expected, over = reference.step(action, repeat)
        assert (reward[0], is_terminal[0], is_last[0]) == (expected, over, over)
        if over:
            break
        assert np.array_equal(image[0, 0], frame)
    envs.close()


def test_episodes_end_with_the_game_and_the_next_row_is_a_reset_without_reward():
    envs = make("atari/breakout", sticky_actions=False)
    _, info = envs.reset(seed=0)
    reference, rng, over = Reference("breakout", info["episode_frame_number"][0]), np.random.default_rng(0), False
    while not over:
        action = rng.integers(4)
        _, reward, is_terminal, is_last = atari.step_envs(envs, one_hot([action], 4))
        _, expected, over = reference.step(action)
        assert (reward[0], is_terminal[0], is_last[0]) == (expected, over, over)
    image, reward, is_terminal, is_last = atari.step_envs(envs, one_hot([1], 4))
    assert (reward[0], is_terminal[0], is_last[0]) == (0, False, False)
    assert any(np.array_equal(image[0, 0], Reference("breakout", noops).frame()) for noops in range(31))
    envs.close()


def test_episodes_start_after_up_to_30_no_ops_drawn_by_the_seed():
    envs = make("atari/pong")
    noops = [envs.reset(seed=seed)[1]["episode_frame_number"][0] for seed in (9, 45, *range(8))]  # 9: none; 45: 30
    assert (min(noops), max(noops)) == (0, 30) and len(set(noops)) > 5
    envs.close()


def with_limit(monkeypatch, frames: int) -> list[dict]:
    """Shortens the frame limit that the script asks for; returns what it asked."""
    asked = []

    def shortened(*args, **kwargs):
        asked.append(kwargs)
        return AtariVectorEnv(*args, **kwargs | {"max_num_frames_per_episode": frames})

    monkeypatch.setattr(atari, "AtariVectorEnv", shortened)
    return asked


def test_an_episode_is_truncated_and_not_terminal_after_108000_frames(monkeypatch):
    """Tried with a limit of 200 frames, 50 steps."""
    asked = with_limit(monkeypatch, 200)
    envs = make("atari/pong", num_envs=2)
    assert asked[0]["max_num_frames_per_episode"] == 108_000
    envs.reset(seed=0)
    for t in range(1, 121):
        _, _, is_terminal, is_last = atari.step_envs(envs, one_hot([0, 0], envs.single_action_space.n))
        assert not is_terminal.any()
        assert is_last.all() == is_last.any() == (t in (50, 101))  # step 51 is the reset
    envs.close()


# FLAGS


@pytest.mark.parametrize("sticky_actions", [True, False])
def test_sticky_actions_reach_ale(sticky_actions):
    """A frame repeats the action before with probability 0.25, or never: frames as those of ALE told so."""
    envs = make("atari/breakout", num_envs=2, sticky_actions=sticky_actions)
    options = {
        "img_height": 64,
        "img_width": 64,
        "stack_num": 1,
        "noop_max": 31,
        "use_fire_reset": False,
        "reward_clipping": False,
    }
    truth, other = (
        AtariVectorEnv("breakout", 2, repeat_action_probability=probability, **options)
        for probability in ((0.25, 0.0) if sticky_actions else (0.0, 0.25))
    )
    rng, equal, differ = np.random.default_rng(0), True, False
    for env in (envs, truth, other):
        env.reset(seed=5)
    for _ in range(60):
        action = rng.integers(4, size=2)
        image, *_ = atari.step_envs(envs, one_hot(action, 4))
        equal = equal and np.array_equal(image, truth.step(action)[0])
        differ = differ or not np.array_equal(image, other.step(action)[0])
    assert equal and differ


@pytest.mark.parametrize("full_action_space", [True, False])
def test_actions_are_all_18_or_the_games_own(full_action_space):
    """The one-hot action i is the set's i-th: frames as those of ALE's plain interface."""
    size = 18 if full_action_space else 4
    flags = {"env_id": "atari/breakout", "full_action_space": full_action_space, "sticky_actions": False}
    assert atari.probe_env(small_args(atari, **flags)) == ((1, 64, 64), size)
    envs = make(**flags)
    _, info = envs.reset(seed=1)
    reference = Reference("breakout", info["episode_frame_number"][0], full_action_space)
    for action in [1, *range(size), *range(size)]:
        image, *_ = atari.step_envs(envs, one_hot([action], size))
        assert np.array_equal(image[0, 0], reference.step(action)[0])
    envs.close()


def play_breakout(terminal_on_life_loss: bool, games: int) -> list[tuple[bool, bool, int]]:
    """is_terminal, is_last and lives of each row of so many games, with the resets between them."""
    envs = make("atari/breakout", sticky_actions=False, terminal_on_life_loss=terminal_on_life_loss)
    envs.reset(seed=0)
    rows, rng = [], np.random.default_rng(0)
    while sum(is_last for _, is_last, _ in rows) < games:
        action = one_hot([rng.integers(4)], 4)
        _, _, is_terminal, is_last = atari.step_envs(envs, action)
        rows.append((bool(is_terminal[0]), bool(is_last[0]), int(envs.lives[0])))
    envs.close()
    return rows


def test_a_lost_life_is_terminal_if_asked_and_the_game_goes_on():
    rows, plain = play_breakout(True, games=2), play_breakout(False, games=1)
    lives = [5, *(row[2] for row in rows)]
    lost = [after < before for before, after in zip(lives, lives[1:], strict=False)]
    assert sum(lost) == 10 and [row[0] for row in rows] == lost, "five lives a game"
    assert [row[1:] for row in plain] == [row[1:] for row in rows[: len(plain)]], "nothing else changes"
    assert [row[0] for row in plain] == [row[1] for row in plain], "else the game's end is the only terminal"


class Lives(gym.vector.VectorEnv):
    """In the place of the native environment: a game with a bonus life is truncated, the next one starts without it."""

    num_envs = 1
    single_action_space, single_observation_space = (
        gym.spaces.Discrete(2),
        gym.spaces.Box(0, 255, (1, 64, 64), np.uint8),
    )

    def __init__(self, *args, **kwargs):
        self.rows = iter([(4, False), (4, True), (3, False), (2, False)])

    def reset(self, **kwargs):
        return np.zeros((1, 1, 64, 64), np.uint8), {"lives": np.array([3])}

    def step(self, action):
        lives, truncated = next(self.rows)
        image, reward, no = np.zeros((1, 1, 64, 64), np.uint8), np.zeros(1), np.zeros(1, bool)
        return image, reward, no, no | truncated, {"lives": np.array([lives])}


def test_a_reset_that_brings_fewer_lives_is_no_lost_life(monkeypatch):
    monkeypatch.setattr(atari, "AtariVectorEnv", Lives)
    envs = make("atari/breakout", terminal_on_life_loss=True)
    envs.reset(seed=0)
    steps = [atari.step_envs(envs, one_hot([0], 2)) for _ in range(4)]
    assert [bool(is_terminal[0]) for _, _, is_terminal, _ in steps] == [False, False, False, True]


# NAMES


def test_every_id_that_gymnasium_has_for_a_game_is_that_game_and_no_other_id_is():
    """PongNoFrameskip-v4, Pong-v4, ALE/Pong-v5, ...; Blackjack-v1 is Gymnasium's own card game."""
    assert any(env_id.startswith("ALE/") for env_id in gym.registry)
    for env_id, spec in gym.registry.items():
        if spec.entry_point == "ale_py.env:AtariEnv":
            if spec.kwargs.get("obs_type", "rgb") == "rgb":
                assert atari.atari_game(env_id) == spec.kwargs["game"], env_id
        elif "/" not in env_id:
            assert atari.atari_game(env_id) is None, env_id


@pytest.mark.parametrize("game", GAMES.split())
def test_each_game_of_the_paper_resolves_by_all_its_names_and_starts(game):
    camel = "".join(word.capitalize() for word in game.replace("james_bond", "jamesbond").split("_"))
    names = [f"{camel}NoFrameskip-v4", f"ALE/{camel}-v5", f"atari/{game}", f"{camel}-v4", f"{camel}Deterministic-v4"]
    names += [f"ale_py:{name}" for name in (names[0], names[1], names[3])]
    assert names[0] in gym.registry and names[1] in gym.registry
    resolved = {atari.atari_game(name) for name in names}
    assert len(resolved) == 1 and None not in resolved
    envs = make(names[0])
    image, info = envs.reset(seed=1)
    assert image.shape == (1, 1, 64, 64) and info["lives"].shape == (1,)
    assert 3 <= envs.single_action_space.n <= 18
    envs.close()


@pytest.mark.parametrize(
    "env_id", ["PnogNoFrameskip-v4", "ALE/Pnog-v5", "atari/pnog", "atari/", "ALE/", "Pong", "", "atari/joust"]
)
def test_an_unknown_game_is_told_in_one_line(env_id):
    with pytest.raises(atari.UserError) as error:
        atari.probe_env(small_args(atari, env_id=env_id))
    assert re.fullmatch(r"[^\n]*\w[^\n]*", str(error.value))
    assert env_id.rpartition("/")[2] in str(error.value)


# OTHER ENVIRONMENTS, SEEDS, RUNS


def test_other_gymnasium_environments_with_discrete_actions_are_seen_through_their_pictures():
    args = small_args(atari, env_id="CartPole-v1", action_repeat=2)
    assert atari.probe_env(args) == ((3, 64, 64), 2)
    envs, plain = atari.make_envs(args, 1), gym.make("CartPole-v1", render_mode="rgb_array")
    image, _ = envs.reset(seed=4)
    plain.reset(seed=4)
    rng, over = np.random.default_rng(0), False
    while not over:
        frame = cv2.resize(plain.render(), (64, 64), interpolation=cv2.INTER_AREA)
        assert np.array_equal(image[0], frame.transpose(2, 0, 1))
        action, total = rng.integers(2), 0.0
        image, reward, is_terminal, is_last = atari.step_envs(envs, one_hot([action], 2))
        for _ in range(2):
            if not over:
                _, step_reward, over, _, _ = plain.step(action)
                total += step_reward
        assert (reward[0], is_terminal[0], is_last[0]) == (total, over, over)
    envs.close()


def test_one_hot_actions_are_numbered_from_the_environments_first():
    env = atari.make_env(small_args(atari, env_id="tests.faulty_envs:FromTwoDiscrete-v0", action_repeat=1))
    env.reset(seed=1)
    for action in np.eye(3):
        env.step(action)
    assert env.unwrapped.actions == [2, 3, 4]


def test_continuous_actions_are_refused_in_one_line():
    with pytest.raises(atari.UserError, match="^Pendulum-v1 .* discrete"):
        atari.probe_env(small_args(atari, env_id="Pendulum-v1"))


def test_four_games_side_by_side_repeat_by_their_seed_and_differ_from_each_other(monkeypatch):
    """110 steps with sticky actions and, a game lasting 50 steps here, the random no-ops of two resets."""
    with_limit(monkeypatch, 200)

    def play(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
        envs, rng = make("BreakoutNoFrameskip-v4", num_envs=4, sticky_actions=True), np.random.default_rng(0)
        images, rewards, ends = [envs.reset(seed=seed)[0]], [], 0
        for _ in range(110):
            image, reward, _, is_last = atari.step_envs(envs, one_hot(rng.integers(4, size=4), 4))
            images.append(image)
            rewards.append(reward)
            ends += is_last.sum()
        envs.close()
        return np.stack(images), np.stack(rewards), ends

    (images, rewards, ends), (again, rewards_again, _), (other, _, _) = play(1), play(1), play(2)
    assert ends == 8
    assert np.array_equal(images, again) and np.array_equal(rewards, rewards_again)
    assert not np.array_equal(images, other)
    assert all(not np.array_equal(images[:, i], images[:, j]) for i in range(4) for j in range(i))


def test_rewards_are_stored_unclipped_and_the_logged_return_is_the_games_own_score(tmp_path):
    """Random play; the stored actions, played again in ALE's plain interface, give the same rewards."""
    flags = {"env_id": "AsterixNoFrameskip-v4", "action_repeat": 4, "sticky_actions": False, "seed": 3}
    flags |= {"total_steps": 1600, "seed_steps": 1600, "replay_capacity": 500, "checkpoint_interval": 1600}
    run_dir = train(atari, tmp_path, small(atari, **flags))
    rows = np.load(run_dir / "replay" / "steps.npy", mmap_mode="r")[: atari.load_checkpoint(run_dir)["replay_rows"], 0]
    returns = [line["charts/episodic_return"] for line in read_metrics(run_dir) if "charts/episodic_return" in line]
    lengths = [line["charts/episodic_length"] for line in read_metrics(run_dir) if "charts/episodic_length" in line]
    assert len(returns) >= 1
    _, info = make("atari/asterix", sticky_actions=False).reset(seed=3)
    reference, score, over, t = Reference("asterix", info["episode_frame_number"][0]), 0, False, 0
    assert np.array_equal(rows["image"][0, 0], reference.frame())
    while not over:
        t += 1
        _, reward, over = reference.step(rows["action"][t].argmax())
        assert rows["reward"][t] == reward
        score += reward
    assert rows["is_last"][t] and rows["is_terminal"][t] and rows["is_first"][t + 1]
    assert returns[0] == score >= 50 and rows["reward"].max() == 50
    assert lengths[0] == 4 * t


@pytest.mark.parametrize(
    ("env_id", "channels", "changes"),
    [("ALE/Pong-v5", 1, {"num_envs": 2, "action_repeat": 4}), ("CartPole-v1", 3, {"eval_every": 240})],
)
def test_a_short_run_learns_from_games_and_from_pictures(env_id, channels, changes, tmp_path):
    run_dir = train(atari, tmp_path, small(atari, env_id=env_id, **{"total_steps": 240, "seed_steps": 120} | changes))
    checkpoint = atari.load_checkpoint(run_dir)
    assert checkpoint["channels"] == channels and checkpoint["learner"]["updates"] > 2
    assert not checkpoint["agent"]["world_model.encoder.convs.0.weight"].isnan().any()

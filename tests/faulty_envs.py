"""Environments that misbehave, for the tests of what a script does about it.

Importing this module registers each as `Name-v0` (two continuous actions) and `NameDiscrete-v0` (five discrete ones).
Those called `...Once` misbehave once and leave the file FAULT_MARKER (an environment variable) behind, which tells
the next process or instance that it has happened.
"""

import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

from tests.pixel_envs import DotSteer


class Faulty(DotSteer):
    """Steers a dot; in the fourth step of an episode comes `fault`."""

    def advance(self, *move):
        reward, terminated = super().advance(*move)
        return (reward if self.t != 4 else self.fault(reward)), terminated

    def happens_now(self):
        try:
            Path(os.environ["FAULT_MARKER"]).touch(exist_ok=False)  # only one of several processes succeeds
        except FileExistsError:
            return False
        return True


class Raises(Faulty):
    def fault(self, reward):
        raise RuntimeError("the simulator fell over")


class Exits(Faulty):
    def fault(self, reward):
        raise SystemExit(0)


class RaisesOnce(Faulty):
    def fault(self, reward):
        if self.happens_now():
            raise RuntimeError("the simulator fell over")
        return reward


class RaisesUnpicklableOnce(Faulty):
    def fault(self, reward):
        class LostConnection(Exception):
            """Cannot be pickled: nobody can import it."""

        if self.happens_now():
            raise LostConnection("the simulator fell over")
        return reward


class DiesOnce(Faulty):
    def fault(self, reward):
        if self.happens_now():
            os._exit(1)
        return reward


class HangsOnce(Faulty):
    def fault(self, reward):
        if self.happens_now():
            time.sleep(100)
        return reward


class RestartHangsOnce(Faulty):
    """Raises once; then a reset hangs, once."""

    fault = RaisesOnce.fault

    def reset(self, **kwargs):
        marker = Path(os.environ["FAULT_MARKER"])
        if marker.exists() and not (hung := marker.with_suffix(".hung")).exists():
            hung.touch()
            time.sleep(1000)
        return super().reset(**kwargs)


class RestartExits(Faulty):
    """Raises once; then it cannot be made any more."""

    fault = RaisesOnce.fault

    def __init__(self, **kwargs):
        if Path(os.environ["FAULT_MARKER"]).exists():
            sys.exit(3)
        super().__init__(**kwargs)


class ResetRaisesOnce(Faulty):
    """Raises in the reset after the first episode, so in the middle of the run."""

    episodes = 0

    def fault(self, reward):
        return reward

    def reset(self, **kwargs):
        self.episodes += 1
        if self.episodes == 3 and self.happens_now():
            raise RuntimeError("the simulator fell over")
        return super().reset(**kwargs)


class NanReward(Faulty):
    def fault(self, reward):
        return float("nan")


class HugeReward(Faulty):
    def fault(self, reward):
        return 1e39


class Endless(DotSteer):
    """Its episodes never end, and its steps take no time."""

    def step(self, action):
        return np.array(self.state(), np.float32), 0.0, False, False, {}


class Longest(Endless):
    """Its episodes end at the limit of 108,000 frames."""


class Slow(DotSteer):
    """A hundredth of a second a step, and no time limit."""

    def advance(self, *move):
        time.sleep(0.01)
        return super().advance(*move)


class Unbounded(DotSteer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class TwoDimensional(DotSteer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1, 1, (2, 2))


class NoActions(DotSteer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-1, 1, (0,))


class WholeActions(DotSteer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Box(-128, 127, (2,), np.int8)


class TextActions(DotSteer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Text(3)


class NoPicture(DotSteer):
    metadata = {"render_modes": []}

    def render(self):
        return None


class FloatPicture(DotSteer):
    def render(self):
        return super().render() / 255


class CannotBeMade(DotSteer):
    def __init__(self, **kwargs):
        raise OSError("libsimulator.so: cannot open shared object file\nin two lines")


class ExitsWhenMade(DotSteer):
    def __init__(self, **kwargs):
        sys.exit(3)


class CannotBeReset(DotSteer):
    def reset(self, **kwargs):
        raise ValueError("no such level")


class Gauge(DotSteer):
    """Actions between -3 and 5; notes what it was given and how often it was drawn. Ends after five steps."""

    bounds = gym.spaces.Box(np.float32(-3), np.float32(5), (2,))

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if not self.discrete:
            self.action_space = self.bounds
        self.actions, self.drawn = [], 0

    def step(self, action):
        self.t += 1
        self.actions.append(np.array(action).tolist())
        return np.array(self.state(), np.float32), 10.0**self.t, self.t == 5, False, {}

    def render(self):
        self.drawn += 1
        return super().render()


class FromTwo(Gauge):
    """Discrete actions 2, 3 and 4."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = gym.spaces.Discrete(3, start=2)


plain = (cls for cls in DotSteer.__subclasses__() if cls is not Faulty)
for cls in (*Faulty.__subclasses__(), *plain, Longest, FromTwo):
    for suffix, discrete in (("", False), ("Discrete", True)):
        env_id = f"{cls.__name__}{suffix}-v0"
        if cls.__module__ == __name__ and env_id not in gym.registry:
            limit = None if cls in (Endless, Slow, Gauge, FromTwo) else 108_000 if cls is Longest else 25
            gym.register(env_id, f"{__name__}:{cls.__name__}", max_episode_steps=limit, kwargs={"discrete": discrete})

"""Small 64x64 pixel environments for the learning tests.

Importing this module registers them, so `gym.make("tests.pixel_envs:DotSteer-v0", render_mode="rgb_array")` works. The
agent is meant to see `env.render()` (uint8, 64x64x3, numpy drawing only); `reset` and `step` return a short vector of
what is visible on the screen. All randomness comes from `self.np_random`. An action is a Box(-1, 1) of one or two
numbers (1-d: left .. right) or, in the Discrete variants, the index of one of the class's `moves`.

`python tests/pixel_envs.py` measures the mean returns of the scripted policies, which are recorded in RETURNS:
  random    actions sampled from the action space;
  blind     the best policy that does not have the one thing the task is about (see `blind_action` of each class);
  best      `expert_action`, with access to the internal state;
  mistaken  (TerminalGoal) the optimal policy of an agent that believes that no episode ever terminates.
"""

import math

import gymnasium as gym
import numpy as np

RETURNS = {  # means over 2000 episodes, as main prints them
    "DotSteer-v0": {"random": 8.77, "blind": 10.71, "best": 24.71},
    "DotSteerDiscrete-v0": {"random": 8.36, "blind": 10.71, "best": 24.71},
    "CueMemory-v0": {"random": -0.01, "blind": 0.03, "best": 4.0},
    "CueMemoryDiscrete-v0": {"random": 0.01, "blind": 0.03, "best": 4.0},
    "TerminalGoal-v0": {"random": 2.37, "blind": 5.71, "best": 9.6, "mistaken": 1.55},
    "TerminalGoalDiscrete-v0": {"random": 2.46, "blind": 5.71, "best": 9.6, "mistaken": 1.55},
    "TwoPixelBall-v0": {"random": -3.41, "blind": -2.7, "best": 8.0},
    "TwoPixelBallContinuous-v0": {"random": -3.07, "blind": -2.7, "best": 8.0},
    "FaintBall-v0": {"random": 6.3, "blind": 6.29, "best": 12.5},
    "FaintBallDiscrete-v0": {"random": 6.24, "blind": 6.29, "best": 12.5},
}

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
RED, GREEN, BLUE, YELLOW = (220, 40, 40), (40, 200, 60), (60, 110, 255), (240, 220, 40)


def clip(x, low=-1.0, high=1.0):
    return min(max(float(x), low), high)


def draw(image, colour, x, y, width, height):
    """Fills the rectangle with the upper left corner (x, y)."""
    image[y : y + height, x : x + width] = colour


class PixelEnv(gym.Env):
    """What the environments share: action spaces, reset and step. Subclasses define start, advance, state, render."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    background = BLACK
    moves = ((-1.0,), (0.0,), (1.0,))  # what the discrete actions stand for, each inside the continuous action space
    num_state = 0

    def __init__(self, discrete=False, render_mode=None):
        self.discrete, self.render_mode = discrete, render_mode
        axes = len(self.moves[0])
        self.action_space = gym.spaces.Discrete(len(self.moves)) if discrete else gym.spaces.Box(-1.0, 1.0, (axes,))
        self.observation_space = gym.spaces.Box(-2.0, 2.0, (self.num_state,))
        self._blank = np.empty((64, 64, 3), np.uint8)
        self._blank[:] = self.background

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.start()
        return np.array(self.state(), np.float32), {}

    def step(self, action):
        self.t += 1
        reward, terminated = self.advance(*(self.moves[action] if self.discrete else map(clip, action)))
        return np.array(self.state(), np.float32), float(reward), terminated, False, {}

    def to_action(self, *move):
        """The action nearest to the wanted move (one number per axis)."""
        if self.discrete:
            return min(range(len(self.moves)), key=lambda i: math.dist(self.moves[i], map(clip, move)))
        return np.array([clip(m) for m in move], np.float32)


class DotSteer(PixelEnv):
    """Steer a white dot onto a green square: 25 steps, ended by the time limit only.

    The dot starts in the middle; the square lies at one of four places around it. Positions are in [0, 1]^2 and a full
    action moves the dot by 0.1 along each axis (Discrete(5): stay, right, left, down, up).
    Reward per step: 1 when touching (centres within 0.15), falling linearly to 0 at a distance of 0.5.
    State: dot x, y, square x, y.
    Random fails: a random walk is as often on the wrong side of the screen as on the right one.
    Blind (does not see the square): staying in the middle, 0.35 from every square.
    """

    moves = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
    num_state = 4
    speed, touch, reach, radius = 0.1, 0.15, 0.5, 0.35

    def start(self):
        self.dot = [0.5, 0.5]
        angle = self.np_random.integers(4) * math.pi / 2
        self.target = (0.5 + self.radius * math.cos(angle), 0.5 + self.radius * math.sin(angle))

    def advance(self, dx, dy):
        self.dot = [clip(self.dot[0] + self.speed * dx, 0.0, 1.0), clip(self.dot[1] + self.speed * dy, 0.0, 1.0)]
        distance = math.dist(self.dot, self.target)
        return clip((self.reach - distance) / (self.reach - self.touch), 0.0, 1.0), False

    def state(self):
        return (*self.dot, *self.target)

    def render(self):
        image = self._blank.copy()
        draw(image, GREEN, round(48 * self.target[0]), round(48 * self.target[1]), 16, 16)
        draw(image, WHITE, round(3 + 48 * self.dot[0]), round(3 + 48 * self.dot[1]), 10, 10)
        return image

    def steer(self, goal):
        return self.to_action(*((goal[i] - self.dot[i]) / self.speed for i in range(2)))

    def expert_action(self):
        return self.steer(self.target)

    def blind_action(self):
        return self.steer((0.5, 0.5))


class CueMemory(PixelEnv):
    """Remember for four blank frames which half of the screen was lit: 10 steps, ended by the time limit only.

    Observations 0 and 1 show the left or the right half in yellow; after them only the clock (a bar along the bottom
    that grows by one tenth a step) and, at observations 6 to 9, a blue square: "answer now". An action chosen at one
    of these four earns `side * action` (side -1 or 1: the lit half; Discrete(3): left, nothing, right), so +1 for the
    right choice and -1 for the wrong one. Other actions do nothing, no action changes the screen, and nothing but the
    reward tells how an answer was judged. The last observation, after which there is nothing to decide, shows the cue
    again: a world model has to remember it to predict this frame. State: clock, visible cue (-1, 0, 1), answer now.
    Random fails: its answers are independent of the cue, 0 on average. Blind (no memory): the screens at which one can
    answer are the same for both cues, so every memoryless policy earns exactly 0 in expectation.
    Training sequences must span the episode (11 observations) for the cue and the reward to meet.
    """

    num_state = 3
    length, cue_frames, answer_frames = 10, 2, 4

    def start(self):
        self.side = 1 if self.np_random.random() < 0.5 else -1

    def visible_cue(self):
        return self.side if self.t < self.cue_frames or self.t >= self.length else 0

    def answering(self, t):
        return self.length - self.answer_frames <= t < self.length

    def advance(self, move):
        return self.side * move if self.answering(self.t - 1) else 0.0, False

    def state(self):
        return min(self.t / self.length, 1.0), self.visible_cue(), self.answering(self.t)

    def render(self):
        image = self._blank.copy()
        if self.visible_cue():
            draw(image, YELLOW, 32 if self.side > 0 else 0, 0, 32, 56)
        if self.answering(self.t):
            draw(image, BLUE, 20, 16, 24, 24)
        draw(image, WHITE, 0, 58, min(64 * self.t // self.length, 64), 6)
        return image

    def expert_action(self):
        return self.to_action(self.side)

    def blind_action(self):
        return self.to_action(1.0)


class TerminalGoal(PixelEnv):
    """Camp or lure: only an agent that has learned where episodes terminate chooses the camp. At most 25 steps.

    A white bar moves along a line, x in [-0.5, 0.5], by at most 0.1 a step (Discrete(3): left, stay, right) and starts
    at 0.2 to 0.3 left or right of the middle. The green middle, |x| <= 0.1, is the camp: each step that ends there
    earns 0.4. Both red ends, |x| >= 0.38, are the lure: each step that ends there earns 0.8 and, with probability 0.5,
    terminates the episode. Elsewhere 0. State: x. From the start both are one or two steps away.

    Why it separates agents with a discount head from agents that use a constant discount:
    - Nothing on the screen tells a terminal step in the lure from one after which the episode goes on. So what a model
      without terminations believes about "after the end" is no extrapolation that may turn out either way: half of the
      steps in the lure do go on, they pay 0.8 again, and that is what it is trained to predict. (If rewards came at
      certain ends only, this belief would be left to chance: no data says what follows such a state.)
    - To such a model the lure is worth 0.8 a step for ever, the camp 0.4: with gamma = 0.99, 80 against 40, so it walks
      into the lure. With a discount head the lure is worth 0.8 / (1 - gamma / 2) < 1.6 against 40. Rewards are free of
      noise and either belief ranks the two by a wide margin, so the choice does not hang on accuracy: value iteration
      gives a return of 9.6 with terminations and 1.6 without for every gamma from 0.9 to 0.999, and also for sums of 6,
      10 or 15 imagined rewards without a critic. (Taking the time limit for a termination does not change the choice.)
    - Policies stuck at one action end in the lure or (stay) earn 0, so the camp is not found by luck.
    Really the lure pays 1.6 in all (mistaken) and the camp 0.4 for each of about 24 steps (best).
    Random fails: it does not stay in the camp and soon ends in the lure. Blind (no sight of x): right twice, then stay.
    """

    num_state = 1
    speed, camp, lure, camp_reward, lure_reward, end_probability = 0.1, 0.1, 0.38, 0.4, 0.8, 0.5

    def start(self):
        self.x = self.np_random.uniform(0.2, 0.3) * (1 if self.np_random.random() < 0.5 else -1)

    def advance(self, move):
        self.x = clip(self.x + self.speed * move, -0.5, 0.5)
        if abs(self.x) <= self.camp:
            return self.camp_reward, False
        if abs(self.x) >= self.lure:
            return self.lure_reward, bool(self.np_random.random() < self.end_probability)
        return 0.0, False

    def state(self):
        return (self.x,)

    def render(self):
        image = self._blank.copy()
        draw(image, RED, 0, 0, 11, 64)
        draw(image, GREEN, 26, 0, 12, 64)
        draw(image, RED, 53, 0, 11, 64)
        draw(image, WHITE, round(28 + 56 * self.x), 0, 8, 64)
        return image

    def expert_action(self):
        return self.to_action(-self.x / self.speed)

    def mistaken_action(self):
        return self.to_action(math.copysign(1.0, self.x))

    def blind_action(self):
        return self.to_action(1.0 if self.t < 2 else 0.0)


class TwoPixelBall(PixelEnv):
    """Catch a ball of two pixels with a paddle: 34 steps, eight balls, ended by the time limit only.

    The ball is one pixel wide and two high, light on black. It appears at the top in one of three columns, falls
    straight down by 16 pixels a step and lands 3 steps later beside or on the paddle, which is 18 pixels wide and moves
    by at most 14 a step (Discrete(3): left, stay, right); the next step brings the next ball. Reward when a ball lands:
    +1 if a pixel of the paddle is under it, else -1; all other steps 0. Every ball can be caught by an agent that sets
    out at once. State: ball x, ball y, paddle x, in units of the screen.
    Random and blind (does not see the ball; the middle is as good as any place) fail: the paddle covers one of the
    three columns. The ball is but two of the 4096 pixels of the image error, yet the reward depends on it. The paddle
    is not at the bottom: the encoder does not see the last two rows of pixels, and half as much of the two before.
    """

    num_state = 3
    columns = (12, 32, 52)
    fall_steps, fall, speed, half = 3, 16, 14.0, 9

    def start(self):
        self.paddle = 32.0  # the paddle's middle
        self.new_ball()

    def new_ball(self):
        self.age, self.column = 0, self.columns[self.np_random.integers(len(self.columns))]

    def ball_top(self):
        return 4 + self.fall * self.age

    def paddle_left(self):
        return round(self.paddle) - self.half

    def advance(self, move):
        self.paddle = clip(self.paddle + self.speed * move, self.half, 64 - self.half)
        if self.age == self.fall_steps:
            self.new_ball()
            return 0.0, False
        self.age += 1
        if self.age < self.fall_steps:
            return 0.0, False
        return 1.0 if 0 <= self.column - self.paddle_left() < 2 * self.half else -1.0, False

    def state(self):
        return self.column / 64, self.ball_top() / 64, self.paddle / 64

    def render(self):
        image = self._blank.copy()
        draw(image, (92, 186, 92), self.paddle_left(), 54, 2 * self.half, 3)
        draw(image, (236, 236, 236), self.column, self.ball_top(), 1, 2)
        return image

    def expert_action(self):
        return self.to_action((self.column - self.paddle) / self.speed)

    def blind_action(self):
        return self.to_action((32.0 - self.paddle) / self.speed)


class FaintBall(PixelEnv):
    """Point at a faint ball of two pixels while a lamp jumps about: 25 steps, ended by the time limit only.

    The ball, one pixel wide, two high and by a fifth of the range lighter than the grey screen, is left or right of the
    middle; the lamp, 3x3 and white, is at one of 64 places and means nothing. Both are drawn anew at each step. An
    action on the side (Discrete(2): left, right) where the ball is seen earns 0.5, else 0. State: side, -1 or 1.
    Random and blind (does not see the ball) earn half of what is possible.

    Why it separates KL weight 1 with 3 free nats from the Atari defaults, 0.1 with none: once the free nats are used
    up, a nat costs the posterior `(1 - kl_alpha) * kl_loss_coeff`, 0.2 and 0.02. The lamp uses them up: it is 4.2 nats
    for 3.3 of image loss. A latent that has a correlation c with the ball's side is worth 0.06 c^2 of image loss and
    with regressed rewards 0.027 c^2 of reward loss, for c^2 / 2 nats, so c grows if a nat costs less than 0.17.
    The screen is mid-grey, 0 to the encoder, which else would see much screen and little ball.
    """

    background = (128, 128, 128)
    moves = ((-1.0,), (1.0,))
    num_state = 1
    reward = 0.5

    def start(self):
        self.side = 1 if self.np_random.random() < 0.5 else -1
        self.lamp = self.np_random.integers(8, size=2)

    def advance(self, move):
        right = move * self.side > 0
        self.start()
        return self.reward * right, False

    def state(self):
        return (self.side,)

    def render(self):
        image = self._blank.copy()
        draw(image, WHITE, *(4 + 7 * self.lamp), 3, 3)
        draw(image, (179, 179, 179), 43 if self.side > 0 else 22, 30, 1, 2)  # where the lamp is not
        return image

    def expert_action(self):
        return self.to_action(self.side)

    def blind_action(self):
        return self.to_action(1.0)


ENVIRONMENTS = {  # id: class, discrete, time limit
    "DotSteer-v0": (DotSteer, False, 25),
    "DotSteerDiscrete-v0": (DotSteer, True, 25),
    "CueMemory-v0": (CueMemory, False, 10),
    "CueMemoryDiscrete-v0": (CueMemory, True, 10),
    "TerminalGoal-v0": (TerminalGoal, False, 25),
    "TerminalGoalDiscrete-v0": (TerminalGoal, True, 25),
    "TwoPixelBall-v0": (TwoPixelBall, True, 34),
    "TwoPixelBallContinuous-v0": (TwoPixelBall, False, 34),
    "FaintBall-v0": (FaintBall, False, 25),
    "FaintBallDiscrete-v0": (FaintBall, True, 25),
}

for env_id, (cls, discrete, limit) in ENVIRONMENTS.items():
    if env_id not in gym.registry:  # the module may be imported under two names
        entry_point = f"{__name__}:{cls.__name__}"
        gym.register(env_id, entry_point, max_episode_steps=limit, kwargs={"discrete": discrete})


def mean_return(env_id, policy, episodes=2000, seed=0):
    """Mean return over `episodes` of the policy "random", "blind", "best" or "mistaken"."""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    inner, names = env.unwrapped, {"best": "expert_action", "blind": "blind_action", "mistaken": "mistaken_action"}
    act = env.action_space.sample if policy == "random" else getattr(inner, names[policy])
    total = 0.0
    env.reset(seed=seed)
    for _ in range(episodes):
        env.reset()
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(act())
            total, done = total + reward, terminated or truncated
    return total / episodes


def main():
    for env_id, (cls, _, _) in ENVIRONMENTS.items():
        policies = ["random", "blind", "best"] + ["mistaken"] * hasattr(cls, "mistaken_action")
        returns = {policy: round(mean_return(env_id, policy), 2) for policy in policies}
        print(f'    "{env_id}": {returns},'.replace("'", '"'))


if __name__ == "__main__":
    main()

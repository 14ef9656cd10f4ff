"""Does imagination foresee rewards? Asks the world model of a run of the Atari script, on the run's own replay.

    python benchmark/imagined_rewards.py runs/<run>

For steps of the last 8,000 rows whose reward is negative, positive and zero (there none lies near), the mean reward
that the model gives when it has seen that step's image, and the mean sum that it imagines when it has seen the images
until 1, 3, 8 steps before and is then told the actions alone, to 4 steps after. `foreseen` is the probability that a
step with a reward is told from one without by that sum (by chance 0.50). True rewards are those the model learns: tanh.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from run import Parser, run_tool, whole

sys.path.insert(0, str(Path(__file__).parents[1]))
import dreamer_v2_atari as dreamer  # noqa: E402

ROWS, CONTEXT, BEFORE, AFTER = 8000, 25, (1, 3, 8), 4


def spans(reward, is_first, before, after):
    """Places (t, env), (N, 2), by the sign of the reward there: `before` rows behind them and `after` ahead hold no
    other reward and no reset. reward and is_first: (T, envs)."""
    window = np.lib.stride_tricks.sliding_window_view
    rewards = (window(reward, before + after + 1, 0) != 0).sum(-1)
    alone = ~window(is_first, before + after + 1, 0).any(-1) & (rewards == (reward[before : len(reward) - after] != 0))
    sign = np.sign(reward[before : len(reward) - after])
    return {
        name: np.argwhere(alone & (sign == value)) + [before, 0]
        for name, value in (("negative", -1), ("positive", 1), ("zero", 0))
    }


@torch.no_grad()
def predict(model, steps, places, before):
    """True reward, reward observed and reward imagined, (N,): at `places` (N, 2) of steps (T, envs), and the sum from
    `before` rows behind on."""
    rows, env = places[:, 0] + np.arange(-before - CONTEXT + 1, AFTER + 1)[:, None], places[:, 1]
    image, action = (torch.from_numpy(steps[name][rows, env]) for name in ("image", "action"))  # (L, N, ...)
    is_first = torch.zeros(action.shape[:2], dtype=bool)
    is_first[0] = True
    embed = model.encoder(dreamer.pixels_to_float(image.flatten(0, 1))).unflatten(0, action.shape[:2])
    post, _ = model.rssm.observe(embed, action, is_first)
    observed = model.reward.mean(post.feat[-AFTER - 1])
    state, imagined = dreamer.State(*(field[CONTEXT - 1] for field in post)), 0
    for led in action[CONTEXT:]:
        state = model.rssm.imagine_step(state, led)
        imagined = imagined + model.reward.mean(state.feat)
    return np.tanh(steps["reward"][places[:, 0], env]), observed.numpy(), imagined.numpy()


def told_apart(low, high):
    """The probability that one of `high` (N,) exceeds one of `low` (M,); equal ones count half."""
    return ((high[:, None] > low).mean() + (high[:, None] >= low).mean()) / 2


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--places", type=whole(1), default=300, help="steps of each kind, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    try:
        model = dreamer.Dreamer.from_pretrained(options.run).world_model
        steps = np.load(options.run / "replay" / "steps.npy", mmap_mode="r")
        total = dreamer.load_checkpoint(options.run)["replay_rows"]
    except (dreamer.UserError, OSError, ValueError) as error:
        parser.error(str(error))
    # Half of the ring: the run may be going on, and writes over the oldest rows.
    rows = np.arange(max(0, total - min(ROWS, len(steps) // 2)), total) % len(steps)
    steps = steps[rows]
    if len(steps) <= max(BEFORE) + CONTEXT + AFTER:
        parser.error(f"{options.run} has stored {total} steps; this needs more than {max(BEFORE) + CONTEXT + AFTER}")
    found = spans(steps["reward"], steps["is_first"], max(BEFORE) + CONTEXT - 1, AFTER)
    kinds = {name: rng.permutation(places)[: options.places] for name, places in found.items() if len(places)}
    print("steps:", ", ".join(f"{len(places)} {name}" for name, places in kinds.items()))
    for before in BEFORE:
        results = {name: predict(model, steps, places, before) for name, places in kinds.items()}
        if before == BEFORE[0]:
            means = (f"{name} {seen.mean():.2f} (true {true.mean():.2f})" for name, (true, seen, _) in results.items())
            print("seen:", ", ".join(means))
        sums = {name: imagined for name, (_, _, imagined) in results.items()}
        text = ", ".join(f"{name} {values.mean():.2f}" for name, values in sums.items())
        zero = sums.get("zero", np.zeros(1))
        pairs = {"negative": (sums.get("negative"), zero), "positive": (zero, sums.get("positive"))}
        known = (f"{name} {told_apart(*pair):.2f}" for name, pair in pairs.items() if name in sums)
        print(f"imagined from {before} steps before: {text}; foreseen:", ", ".join(known), flush=True)


if __name__ == "__main__":
    run_tool(main)

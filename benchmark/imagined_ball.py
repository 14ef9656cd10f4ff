"""Does imagination keep a two-pixel ball? Trains the Atari script's world model alone, on random play; asks its prior.

    python benchmark/imagined_ball.py                                        # the default KL: weight 0.1, no free nats
    python benchmark/imagined_ball.py --kl-loss-coeff 1 --free-nats 3 --seed 2

The game is `TwoPixelBall` of the tests, whose sizes it uses: a ball appears in one of three columns and falls for three
steps. Every 250 updates, on episodes not trained on, from the posterior state that first sees a ball:

    seen      share of balls that the posterior draws in their column (by chance 0.33)
    imagined  the same for the prior, two steps later and one before the landing, given the episode's actions
    reward    probability that a caught ball's imagined reward is higher than a missed one's (by chance 0.50)

6,000 updates take 18 minutes on one core. The model keeps PyTorch's own initialisation: with the agents' the ball is
not drawn in that many updates, so that there is nothing to ask. Its weight decay is AdamW's own, 1e-5 an update, ten
times the agents'.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from run import Parser, run_tool, whole

sys.path.insert(0, str(Path(__file__).parents[1]))
import dreamer_v2_atari as dreamer  # noqa: E402
from tests.pixel_envs import TwoPixelBall  # noqa: E402
from tests.test_learning import BALL, SMALL  # noqa: E402

LENGTH = 18  # rows of an episode: four balls
COLUMNS = np.array(TwoPixelBall.columns)
FALL = TwoPixelBall.fall_steps


def play(episodes, rng):
    """Random play, each action kept for about three steps: a batch (LENGTH, episodes, ...), columns of the balls."""
    env, one_hot = TwoPixelBall(discrete=True), np.eye(3, dtype=np.float32)
    rows = []
    for _ in range(episodes):
        env.reset(seed=int(rng.integers(2**31)))
        rows.append([(env.render(), np.zeros(3, np.float32), 0.0, env.column)])
        action = 1
        for _ in range(LENGTH - 1):
            if rng.random() < 0.3:
                action = int(rng.integers(3))
            reward = env.step(action)[1]
            rows[-1].append((env.render(), one_hot[action], reward, env.column))
    image, action, reward, column = (np.stack([[row[i] for row in one] for one in rows], 1) for i in range(4))
    is_first = np.zeros((LENGTH, episodes), bool)
    is_first[0] = True
    fields = (image.transpose(0, 1, 4, 2, 3), action, reward.astype(np.float32), is_first, np.zeros_like(is_first))
    return dreamer.Batch(*map(torch.from_numpy, fields)), column


def columns_drawn(model, feat, age):
    """The column (N,) where the images decoded from feat (N, feat) are brightest at the height of a ball that old."""
    top = 4 + TwoPixelBall.fall * age
    image = model.decoder(feat)  # (N, 3, 64, 64)
    return COLUMNS[image[:, :, top : top + 2, COLUMNS].mean((1, 2)).argmax(-1).numpy()]


@torch.no_grad()
def measure(model, batch, column):
    """Shares of balls seen and imagined in their column, and how well imagined rewards tell caught from missed."""
    embed = model.encoder(dreamer.pixels_to_float(batch.image.flatten(0, 1))).unflatten(0, batch.reward.shape)
    post, _ = model.rssm.observe(embed, batch.action, batch.is_first)
    seen, imagined, predicted, true = [], [], [], []
    for t in range(0, LENGTH - FALL, FALL + 1):
        state = dreamer.State(*(field[t] for field in post))
        seen.append(columns_drawn(model, state.feat, 0) == column[t])
        for age in range(1, FALL + 1):
            state = model.rssm.imagine_step(state, batch.action[t + age])
            if age == FALL - 1:
                imagined.append(columns_drawn(model, state.feat, age) == column[t])
        predicted.append(model.reward.mean(state.feat))
        true.append(batch.reward[t + FALL])
    predicted, true = torch.cat(predicted), torch.cat(true)
    reward = (predicted[true > 0][:, None] > predicted[true < 0]).float().mean().item()
    return {"seen": np.mean(seen), "imagined": np.mean(imagined), "reward": reward}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl-loss-coeff", type=float, default=0.1)
    parser.add_argument("--free-nats", type=float, default=0.0)
    parser.add_argument("--updates", type=whole(1), default=6000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    flags = {name: value for name, value in vars(options).items() if name != "updates"}
    flags = {name: value for name, value in (SMALL | BALL | flags).items() if name in vars(dreamer.Args())}
    try:
        args = dreamer.check_args(dreamer.Args(**flags))
    except dreamer.UserError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    dreamer.tune_cpu()
    rng = np.random.default_rng(args.seed)
    (data, _), test = play(200, rng), play(40, rng)
    model = dreamer.WorldModel(args, 3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), args.model_learning_rate, eps=args.adam_eps)
    for update in range(1, options.updates + 1):
        episode = rng.integers(data.reward.shape[1], size=args.batch_size)  # (B,)
        start = rng.integers(LENGTH - args.train_seq_len + 1, size=args.batch_size)
        rows = start + np.arange(args.train_seq_len)[:, None]  # (T, B)
        batch = dreamer.Batch(*(field[rows, episode] for field in data))
        batch.is_first[0] = True  # as the replay does
        loss, _, metrics = dreamer.world_model_loss(model, batch, args)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        if update % 250 == 0 or update == options.updates:
            shares = measure(model, *test) | {"KL in nats": metrics["losses/kl"].item()}
            print(f"update {update}: " + ", ".join(f"{name} {x:.2f}" for name, x in shares.items()), flush=True)


if __name__ == "__main__":
    run_tool(main)

"""Does a world model come to see Pong's ball and paddles? Trains the Atari script's alone, small, on random play.

    python benchmark/seen_objects.py                                                    # the default architecture
    python benchmark/seen_objects.py -- --layer-norm --act silu --obs-embed-size 128    # what comes after -- are flags
    python benchmark/seen_objects.py --run runs/<run>                                   # what an agent for Pong sees

Every 200 updates it prints the loss of the images in nats over its constant, the KL, the standard deviation of the
posterior's logits, and the share of what varies in the images that the decoder shows, in all and for each object. So
that it takes minutes on one core and not hours, the sizes are small, the learning rate is 1e-3 and `--contrast` doubles
what varies in the images. With `--run` it trains nothing and looks at the last frames of that run's replay.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from run import Parser, run_tool, whole

sys.path.insert(0, str(Path(__file__).parents[1]))
import dreamer_v2_atari as dreamer  # noqa: E402

SIZES = {
    "num_envs": 8,
    "cnn_depth": 16,
    "units": 128,
    "deter_size": 128,
    "batch_size": 8,
    "train_seq_len": 16,
    "model_learning_rate": 1e-3,
}
CPU = torch.device("cpu")
FIELD = slice(11, 58)  # rows between the two walls
OBJECTS = {  # rows and columns in which only this object moves
    "score": (slice(0, 8), slice(None)),
    "opponent": (FIELD, slice(5, 9)),
    "ball": (FIELD, slice(10, 54)),
    "own paddle": (FIELD, slice(55, 60)),
}


def play(args, folder, steps, rng):
    """A replay of random play."""
    shape, action_size = dreamer.probe_env(args)
    replay = dreamer.Replay(folder, 40_000, 2, args.num_envs, shape, action_size, CPU)
    envs = dreamer.make_envs(args, args.num_envs)
    image, _ = envs.reset(seed=args.seed)
    is_first, no = np.ones(args.num_envs, bool), np.zeros(args.num_envs, bool)
    zeros = np.zeros((args.num_envs, action_size), np.float32)
    replay.add(image, zeros, zeros[:, 0], is_first, no, no)
    is_last = no
    for _ in range(steps):
        action = dreamer.random_actions(rng, args.num_envs, action_size)
        image, reward, is_terminal, ended = dreamer.step_envs(envs, action)
        is_first, is_last = is_last, ended
        action[is_first] = 0
        replay.add(image, action, reward, is_first, is_terminal, is_last)
    envs.close()
    return replay, shape, action_size


def last_frames(run_dir, batch_size, length):
    """Sequences (T, B, ...) from the last 5,000 rows of a run's replay, which is only read: the run may be going on."""
    steps = np.load(run_dir / "replay" / "steps.npy", mmap_mode="r")
    total, rng = dreamer.load_checkpoint(run_dir)["replay_rows"], np.random.default_rng(7)
    if total <= length:
        raise dreamer.UserError(f"{run_dir} has stored {total} steps; this needs more than {length}")
    start = rng.integers(max(0, total - min(5000, len(steps) // 2)), total - length, size=batch_size)
    env = rng.integers(steps.shape[1], size=batch_size)
    rows = (start + np.arange(length)[:, None]) % len(steps)
    batch = dreamer.Batch(*(torch.from_numpy(steps[name][rows, env]) for name in dreamer.Batch._fields))
    batch.is_first[0] = True  # as in training
    return batch


def shares(true, shown):
    """The share of what varies in images (N, 1, 64, 64) that others show (0: the mean image), in all and by object."""
    true, shown = true - true.mean(0), shown - shown.mean(0)
    return {
        name: ((true * shown)[..., rows, columns].sum() / true[..., rows, columns].square().sum()).item()
        for name, (rows, columns) in ({"shown": (slice(None), slice(None))} | OBJECTS).items()
    }


def principal(images):
    """Variance of images (N, 1, 64, 64) along their first principal component, by object."""
    pixels = {name: images[..., rows, columns].reshape(len(images), -1) for name, (rows, columns) in OBJECTS.items()}
    return {name: np.linalg.norm(x - x.mean(0), 2) ** 2 / len(x) for name, x in pixels.items()}


@torch.no_grad()
def measure(model, batch):
    """Standard deviation of the logits, and `shares` as text."""
    T, B = batch.reward.shape
    image = dreamer.pixels_to_float(batch.image.flatten(0, 1))
    embed = model.encoder(image).unflatten(0, (T, B))
    post, _ = model.rssm.observe(embed, batch.action, batch.is_first)
    feat = torch.cat([post.logit.softmax(-1).flatten(-2), post.deter], -1)[4:]
    found = shares(image.unflatten(0, (T, B))[4:].flatten(0, 1), model.decoder(feat.flatten(0, 1)))
    return post.logit[4:].std((0, 1)).mean().item(), ", ".join(f"{name} {share:.1%}" for name, share in found.items())


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=whole(1), default=2000)
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--contrast", type=float, default=2.0, help="factor on what varies in the images")
    parser.add_argument("--run", type=Path, help="folder of a run on Pong, whose agent is looked at instead")
    parser.add_argument("flags", nargs="*", help="flags of the script, after --")
    options = parser.parse_args()
    if not 0 < options.contrast < math.inf:
        parser.error("--contrast must be greater than 0")
    torch.set_num_threads(1)
    try:
        if options.run:
            torch.manual_seed(options.seed)
            agent = dreamer.Dreamer.from_pretrained(options.run)
            if dreamer.atari_game(agent.args.env_id) != "pong":
                parser.error(f"{options.run} is a run on {agent.args.env_id}: the places of the objects are Pong's")
            varies, found = measure(agent.world_model, last_frames(options.run, 64, 16))
            print(f"logits vary by {varies:.4f}, {found}")
            return
        sizes = [word for key, value in SIZES.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        args = dreamer.parse_args([*sizes, "--seed", str(options.seed), *options.flags])
        if dreamer.atari_game(args.env_id) != "pong":
            parser.error(f"--env-id {args.env_id}: the places of the objects are Pong's")
    except (dreamer.UserError, OSError, ValueError) as error:
        parser.error(str(error))
    dreamer.tune_cpu()
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        replay, shape, action_size = play(args, Path(folder), 2500, rng)
        learner = dreamer.Learner(dreamer.Dreamer(args, shape[0], action_size), args, CPU)
        model, constant = learner.agent.world_model, 0.5 * math.log(2 * math.pi) * math.prod(shape)
        images = replay.steps["image"][200:2400:3].reshape(-1, *shape).astype(np.float32) / 255 - 0.5
        mean, to_float = torch.from_numpy(images.mean(0)), dreamer.pixels_to_float
        dreamer.pixels_to_float = lambda image: mean + options.contrast * (to_float(image) - mean)
        nats = 0.5 * options.contrast**2 * np.square(images - images.mean(0)).sum((1, 2, 3)).mean()
        print(f"the mean image alone: {nats:.2f} nats", flush=True)
        spread = {name: options.contrast**2 * variance for name, variance in principal(images).items()}
        print("variance along the first principal component:", *(f"{name} {spread[name]:.4f}" for name in spread))
        price = (1 - args.kl_alpha) * args.kl_loss_coeff
        print(f"what varies by less than (1 - kl_alpha) * kl_loss_coeff = {price:.4f} is not worth its nats at first")
        losses = []
        for update in range(1, options.updates + 1):
            batch = replay.sample(rng, args.batch_size, args.train_seq_len)
            with dreamer.autocast(args, CPU):
                loss, _, metrics = dreamer.world_model_loss(model, batch, args)
            learner.optimizers["model"].zero_grad()
            loss.backward()
            learner.step("model", loss)
            losses.append((metrics["losses/image"].item() - constant, metrics["losses/kl"].item()))
            if update % 200 == 0 or update == options.updates:
                image, kl = np.mean(losses[-100:], 0)
                varies, found = measure(model, replay.sample(np.random.default_rng(7), 16, 16))
                figures = f"images {image:.2f} nats, KL {kl:.3f} nats, logits vary by {varies:.4f}, {found}"
                print(f"update {update}: {figures}", flush=True)


if __name__ == "__main__":
    run_tool(main)

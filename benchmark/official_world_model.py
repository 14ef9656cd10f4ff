"""Does our V2 world model learn as the official one does? Trains both on the same batches of random play in Pong.

    python benchmark/official_world_model.py --updates 6000 --out benchmark/results/settings/official_world_model.csv

The official code is dreamerv2 2.2.0 from PyPI, run by TensorFlow 2.15 on one thread in a virtual environment that is
made on first use (`requirements-official.txt`; Python 3.9 to 3.11). Sizes and learning rate are those of
seen_objects.py, the rest is the Atari defaults and the paper's reward regression, in float32. Initial weights and the
draws of latents are each code's own; the data are the same, batch by batch. At the end it prints, for every 200
updates, what seen_objects.py prints, for both. 6,000 updates take 25 minutes, with a core for each.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import official_code
from run import InputError, Parser, replacing, run_tool, whole

EVERY = 200
CONSTANT = 0.5 * math.log(2 * math.pi) * 64 * 64


def draw(steps, rng, batch_size, length):
    """Sequences of a replay's rows: {field: (T, B, ...)}; as in a run, the first step counts as an episode's first."""
    start = rng.integers(len(steps) - length, size=batch_size)
    env = rng.integers(steps.shape[1], size=batch_size)
    rows = start + np.arange(length)[:, None]
    batch = {key: steps[key][rows, env] for key in ("image", "action", "reward", "is_first", "is_terminal")}
    batch["is_first"][0] = True
    return batch


def batches(steps, spec):
    """The batches of a training run, and the one on which it is looked at."""
    rng, size = np.random.default_rng(spec["seed"]), (spec["batch_size"], spec["train_seq_len"])
    return (draw(steps, rng, *size) for _ in range(spec["updates"])), draw(steps, np.random.default_rng(7), 16, 24)


def report(folder, name, update, recent, logits, decoded):
    """Keeps a line of figures, and the images (N, 64, 64) to be judged."""
    image, kl, entropy = np.mean(recent, 0)
    np.save(folder / f"{name}_{update}.npy", decoded)
    figures = [image - CONSTANT, kl, entropy, logits.std(0).mean()]
    (folder / f"{name}_{update}.json").write_text(json.dumps([float(figure) for figure in figures]))


def train_official(folder, spec):
    """In the other environment, where there is no torch."""
    import tensorflow as tf

    common, agent = official_code.load(threads=1)
    config = official_code.settings(common, "atari", spec["official"])
    image = types.SimpleNamespace(shape=(64, 64, 1))
    model = agent.WorldModel(config, {"image": image}, tf.Variable(0, dtype=tf.int64))

    def batch_major(batch):
        batch = {key: np.ascontiguousarray(value.swapaxes(0, 1)) for key, value in batch.items()}
        return batch | {"image": batch["image"].transpose(0, 1, 3, 4, 2)}

    @tf.function
    def update_model(batch):
        metrics = model.train(batch)[2]
        return metrics["image_loss"], metrics["model_kl"], metrics["post_ent"]

    @tf.function
    def look(batch):
        batch = model.preprocess(batch)
        post, _ = model.rssm.observe(model.encoder(batch), batch["action"], batch["is_first"])
        probs = tf.nn.softmax(post["logit"])
        feat = model.rssm.get_feat({"stoch": probs, "deter": post["deter"]})[:, 4:]
        return post["logit"][:, 4:], model.heads["decoder"](feat)["image"].mode()

    train_batches, shown = batches(np.load(folder / "steps.npy", mmap_mode="r"), spec)
    recent = []
    for update, batch in enumerate(train_batches, 1):
        recent.append([float(value) for value in update_model(batch_major(batch))])
        if update % EVERY == 0:
            logits, decoded = (value.numpy().swapaxes(0, 1) for value in look(batch_major(shown)))
            report(folder, "official", update, recent[-100:], logits.reshape(-1, 32, 32), decoded.reshape(-1, 64, 64))


def train_ours(dreamer, learner, folder, spec):
    model, args, torch, recent = learner.agent.world_model, learner.args, dreamer.torch, []
    train_batches, shown = batches(np.load(folder / "steps.npy", mmap_mode="r"), spec)

    def tensors(batch):
        return dreamer.Batch(*(torch.from_numpy(np.ascontiguousarray(batch[key])) for key in dreamer.Batch._fields))

    for update, batch in enumerate(train_batches, 1):
        loss, _, metrics = dreamer.world_model_loss(model, tensors(batch), args)
        learner.optimizers["model"].zero_grad()
        loss.backward()
        learner.step("model", loss)
        names = ("losses/image", "losses/kl", "latents/post_entropy")
        recent.append([metrics[name].item() for name in names])
        if update % EVERY == 0:
            with torch.no_grad():
                batch = tensors(shown)
                T, B = batch.reward.shape
                embed = model.encoder(dreamer.pixels_to_float(batch.image.flatten(0, 1))).unflatten(0, (T, B))
                post, _ = model.rssm.observe(embed, batch.action, batch.is_first)
                feat = torch.cat([post.logit.softmax(-1).flatten(-2), post.deter], -1)[4:]
                decoded = model.decoder(feat.flatten(0, 1))[:, 0]
            report(folder, "ours", update, recent[-100:], post.logit[4:].flatten(0, 1).numpy(), decoded.numpy())


def main(argv):
    if argv[:1] == ["--worker"]:
        return train_official(Path(argv[1]), json.loads(argv[2]))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--seed", type=whole(0), default=1)
    parser.add_argument("--venv", type=Path, default=official_code.VENV)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    if options.updates < EVERY:
        parser.error(f"--updates {options.updates}: at least {EVERY}, at which the first figures are taken")
    if options.out and options.out.is_dir():
        parser.error(f"--out {options.out} is a folder")
    python = official_code.official_python(options.venv)

    import torch
    from seen_objects import CPU, SIZES, dreamer, play, shares

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    args = dreamer.Args(**SIZES, reward_head="mse", seed=options.seed)
    official = {"rssm.hidden": args.deter_size, "rssm.deter": args.deter_size, "discount": args.discount}
    official |= {f"{part}.cnn_depth": args.cnn_depth for part in ("encoder", "decoder")}
    official |= {f"{part}_head.units": args.units for part in ("reward", "discount")}
    official |= {"model_opt.lr": args.model_learning_rate}
    spec = {"seed": options.seed, "updates": options.updates, "official": official}
    spec |= {"batch_size": args.batch_size, "train_seq_len": args.train_seq_len}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replay, shape, action_size = play(args, folder / "play", 2500, np.random.default_rng(options.seed))
        np.save(folder / "steps.npy", replay.steps[: replay.total])
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, __file__, "--worker", folder, json.dumps(spec)]
        worker = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL)
        try:
            train_ours(dreamer, dreamer.Learner(dreamer.Dreamer(args, shape[0], action_size), args, CPU), folder, spec)
            if worker.wait():
                raise InputError("the official code failed, see above")
        finally:
            worker.kill()
        true = batches(np.load(folder / "steps.npy"), spec)[1]["image"][4:].reshape(-1, 64, 64) / 255 - 0.5
        rows = []
        for update in range(EVERY, options.updates + 1, EVERY):
            for code in ("official", "ours"):
                figures = json.loads((folder / f"{code}_{update}.json").read_text())
                decoded = torch.from_numpy(np.load(folder / f"{code}_{update}.npy"))[:, None]
                found = shares(torch.from_numpy(true)[:, None], decoded)
                rows.append([code, update, *(f"{figure:.4f}" for figure in [*figures, *found.values()])])
    header = ["code", "update", "image_nats_over_constant", "kl_nats", "post_entropy_nats", "logits_std"]
    header += [key.replace(" ", "_") for key in found]
    for row in [header, *rows]:
        print(*row, sep="\t")
    if options.out:
        with replacing(options.out) as name, open(name, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))

"""Times our full update and policy step against SheepRL's on the CPU, on identical shapes, taking turns; prints ratios.

    python benchmark/compare.py                                          # all cases, both precisions
    python benchmark/compare.py --cases V2-Atari --rounds 10 --out atari.json

SheepRL (requirements-compare.txt) lives in a virtual environment of its own, made at the first call and kept. Each
contestant is a process that builds its agent once, warms up and waits; in every round each does one update and some
steps of the policy, so that only one works at a time and a change of the machine's speed hits all of them.

Timed on both sides: drawing a batch of random data from a memory-mapped replay, and one update of world model, actor
and critic. Ours is `Replay.sample` and `Learner`, after `tune_cpu` as in every run. Theirs is what the loops of
sheeprl/algos/dreamer_v1 and dreamer_v2 do: `sample_batches`, conversion to float included, and `train` with its default
metrics, on agents of `build_agent`, composed by Hydra from its own experiments with our sizes (and, for Atari, a replay
of plain sequences); both sides get all threads (its default is one). By default neither side compiles; with `--compile`
each also enters compiled, ours by `--compile-cpu`, theirs by `algo.compile.enabled`.
A step of the policy goes from one uint8 image to an action in NumPy; theirs is `prepare_obs` and `get_actions`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from run import InputError, Parser, machine, write
from throughput import ACTIONS, CASES, ROOT, summary, times

OURS = ("float32", "bfloat16")
THEIRS = ("32-true", "bf16-mixed")
EXPERIMENTS = {
    "V1": ("dreamer_v1", ["exp=dreamer_v1", "env=dmc", "+buffer.type=sequential"]),
    "V2-DMC": ("dreamer_v2", ["exp=dreamer_v2", "env=dmc"]),
    "V2-Atari": ("dreamer_v2", ["exp=dreamer_v2_ms_pacman", "buffer.type=sequential"]),
}
CHECK = """import importlib.metadata, sys
pins = [pin.split("==") for pin in sys.argv[1:]]
sys.exit(any(importlib.metadata.version(name).split("+")[0] != version for name, version in pins))"""
WARMUP = 2
POLICY_STEPS = 50  # a turn
PAUSE = 0.2  # seconds before each turn, in which the threads of the one before fall asleep


class WorkerError(Exception):
    """A contestant's process has died; the message is one line."""


def at_least(low, text):
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
    return int(text)


# CONTESTANTS: each gives its networks, a function that draws a batch, one that learns from it and one that acts


def ours(spec):
    script = importlib.import_module(CASES[spec["case"]][0])
    script.tune_cpu()
    args, channels, device = script.Args(**spec["args"]), spec["channels"], torch.device("cpu")
    agent = script.Dreamer(args, channels, ACTIONS)
    learner = script.Learner(agent, args, device)
    rng, n = np.random.default_rng(0), args.batch_size * args.train_seq_len
    replay = script.Replay(Path(spec["folder"]), n, 2, 1, (channels, 64, 64), ACTIONS, device)
    no = np.zeros(1, bool)
    for _ in range(n):
        image = rng.integers(0, 256, (1, channels, 64, 64), np.uint8)
        replay.add(image, script.random_actions(rng, 1, ACTIONS), rng.normal(size=1), no, no, no)
    parts = {"world_model": agent.world_model, "actor": agent.actor, "critic": agent.value}
    state = agent.initial_state(1)
    act = lambda: agent.policy(image, state, no)[0].numpy()  # noqa: E731
    return parts, lambda: replay.sample(rng, args.batch_size, args.train_seq_len), learner, act


def overrides(spec):
    """Our sizes, by SheepRL's names."""
    args = spec["args"]
    values = {
        "algo.per_rank_batch_size": args["batch_size"],
        "algo.per_rank_sequence_length": args["train_seq_len"],
        "algo.horizon": args["imagine_horizon"],
        "algo.dense_units": args["units"],
        "algo.actor.mlp_layers": args["actor_layers"],
        "algo.critic.mlp_layers": args["value_layers"],
        "algo.world_model.stochastic_size": args["stoch_size"],
        "algo.world_model.encoder.cnn_channels_multiplier": args["cnn_depth"],
        "algo.world_model.recurrent_model.recurrent_state_size": args["deter_size"],
        "algo.world_model.transition_model.hidden_size": args["deter_size"],
        "algo.world_model.representation_model.hidden_size": args["deter_size"],
        "algo.world_model.reward_model.mlp_layers": args["reward_layers"],
        "algo.world_model.discount_model.mlp_layers": args["discount_layers"],
        "algo.world_model.use_continues": args["pred_discount"],
        "fabric.precision": spec["precision"],
        "algo.compile.enabled": spec["compile"],
        "env.num_envs": 1,
        "buffer.size": args["batch_size"] * args["train_seq_len"],
    }
    if "num_classes" in args:
        values |= {"algo.world_model.discrete_size": args["num_classes"], "algo.layer_norm": args["layer_norm"]}
    return [f"{key}={value}" for key, value in values.items()]


def sheeprl(spec):
    import gymnasium as gym
    import hydra
    from lightning.fabric import Fabric
    from omegaconf import OmegaConf
    from sheeprl.algos.dreamer_v2.utils import build_buffer, build_optimizer, prepare_obs, sample_batches
    from sheeprl.utils.utils import dotdict

    name, experiment = EXPERIMENTS[spec["case"]]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        cfg = hydra.compose("config", experiment + overrides(spec))
    cfg = dotdict(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.distributions.Distribution.set_default_validate_args(cfg.distribution.validate_args)
    fabric = Fabric(accelerator="cpu", devices=1, precision=cfg.fabric.precision)
    script = importlib.import_module(f"sheeprl.algos.{name}.{name}")

    image = (spec["channels"], 64, 64)
    space = gym.spaces.Dict({"rgb": gym.spaces.Box(0, 255, image, np.uint8)})
    *models, player = script.build_agent(fabric, (ACTIONS,), not spec["discrete"], cfg, space)
    parts = dict(zip(("world_model", "actor", "critic"), models, strict=False))  # V2's fourth is the target critic
    optimizers = [build_optimizer(cfg.algo[part].optimizer, model.parameters()) for part, model in parts.items()]
    optimizers = fabric.setup_optimizers(*optimizers)
    aggregator = hydra.utils.instantiate(cfg.metric.aggregator, _convert_="all")

    rng, n = np.random.default_rng(0), cfg.buffer.size
    action = rng.uniform(-1, 1, (n, 1, ACTIONS))
    data = {key: np.zeros((n, 1, 1)) for key in ("terminated", "truncated", "is_first")}
    data |= {"rgb": rng.integers(0, 256, (n, 1, *image), np.uint8), "rewards": rng.normal(size=(n, 1, 1))}
    data["actions"] = np.eye(ACTIONS)[action.argmax(-1)] if spec["discrete"] else action
    replay = build_buffer(fabric, cfg, spec["folder"], dry_run_size=2)
    replay.add(data)
    extra = {"actions_dim": (ACTIONS,)} if name == "dreamer_v2" else {}
    update = partial(script.train, fabric, *models, *optimizers, aggregator=aggregator, cfg=cfg, **extra)
    player.init_states()

    @torch.inference_mode()
    def act():
        action = player.get_actions(prepare_obs(fabric, {"rgb": data["rgb"][0]}, cnn_keys=["rgb"], num_envs=1))
        return torch.cat(action, -1).cpu().numpy()

    return parts, lambda: next(sample_batches(fabric, cfg, replay, 1)), update, act


def work(spec):
    """The life of a contestant: says that it is ready, then times an update and policy steps for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w", 1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    parts, sample, update, act = {"ours": ours, "sheeprl": sheeprl}[spec["side"]](spec)
    for _ in range(WARMUP):
        update(sample())
    parameters = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}
    packages = ["torch", "numpy"] + ["sheeprl", "lightning"] * (spec["side"] == "sheeprl")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"parameters": parameters, "versions": versions}), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        batch = sample()
        sampled = time.perf_counter()
        update(batch)
        total = time.perf_counter() - start
        policy = statistics.median(times(act, torch.device("cpu"), POLICY_STEPS, POLICY_STEPS))
        print(json.dumps({"sample": sampled - start, "total": total, "policy": policy}), file=answers)


# THE RACE


class Worker:
    """A contestant's process."""

    def __init__(self, python, spec):
        self.side = spec["side"]
        self.name = f"{spec['side']} {spec['precision']}" + " compiled" * spec["compile"]
        self.log, self.turns = Path(spec["folder"], "stderr"), []
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        env |= {"OMP_NUM_THREADS": str(spec["threads"]), "CUDA_VISIBLE_DEVICES": ""}
        command = [str(python), __file__, "--worker", json.dumps(spec)]
        pipe = subprocess.PIPE
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)

    def read(self):
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        lines = self.log.read_text().strip().splitlines() or ["nothing said"]
        raise WorkerError(f"{self.name} stopped with exit code {code}: {lines[-1]}")

    def turn(self):
        time.sleep(PAUSE)
        with contextlib.suppress(BrokenPipeError):  # `read` says why
            print("go", file=self.process.stdin, flush=True)
        self.turns.append(self.read())

    def summary(self, key):
        return summary([turn[key] for turn in self.turns])


def sheeprl_python(folder):
    """The python of SheepRL's virtual environment, which is made unless it is there with the pinned versions."""
    python, requirements = folder / "bin" / "python", ROOT / "benchmark" / "requirements-compare.txt"
    pins = [pin for pin in (ROOT / "requirements.txt").read_text().split() if pin.startswith("torch==")]
    check = [python, "-c", CHECK, *pins, *(line for line in requirements.read_text().splitlines() if "==" in line)]
    if not python.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--venv {folder} is there but is no virtual environment")
    if not python.exists() or subprocess.run(check, stderr=subprocess.DEVNULL).returncode:
        print(f"installing SheepRL into {folder}", file=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", *pins, "-r", requirements]
        for command in ([sys.executable, "-m", "venv", folder], pip):
            if subprocess.run(command, stdout=sys.stderr).returncode:
                raise WorkerError(f"this command failed: {' '.join(map(str, command))}")
    return python


def race(case, options, python, folder):
    """Lets the contestants of a case take turns, prints what came out and returns it."""
    name, env_id, sizes = CASES[case]
    script = importlib.import_module(name)
    size = {key: getattr(options, key) for key in ("batch_size", "train_seq_len") if getattr(options, key)}
    args = script.Args(env_id=env_id, cuda=False, **sizes, **size)
    discrete = name == "dreamer_v2_atari"
    shared = {"case": case, "threads": options.threads, "discrete": discrete, "channels": 1 if discrete else 3}
    workers = []
    try:
        for side, precisions in (("ours", options.precision), ("sheeprl", options.sheeprl)):
            for precision, compile_ in itertools.product(precisions, (False, True) if options.compile else (False,)):
                values = dataclasses.asdict(args)
                if side == "ours":
                    values |= {"precision": precision, "compile_cpu": compile_}
                spec = {"side": side, "precision": precision, "compile": compile_, "args": values, **shared}
                spec["folder"] = tempfile.mkdtemp(dir=folder)
                workers.append(Worker(python if side == "sheeprl" else sys.executable, spec))
                workers[-1].facts = workers[-1].read()
        for _ in range(options.rounds):
            for worker in workers:
                worker.turn()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()

    mine, theirs = ([worker for worker in workers if worker.side == side] for side in ("ours", "sheeprl"))
    parameters = mine[0].facts["parameters"]
    if any(worker.facts["parameters"] != parameters for worker in workers):
        raise WorkerError(f"{case}: not the same sizes: {[(worker.name, worker.facts) for worker in workers]}")
    print(f"{case}: {args.batch_size} sequences of {args.train_seq_len}, {options.threads} threads")
    print("  trained parameters, the same on both sides:", ", ".join(f"{part} {n:,}" for part, n in parameters.items()))
    row = shared | {"batch_size": args.batch_size, "train_seq_len": args.train_seq_len, "contestants": {}}
    row |= {"ratios": {}, "policy_ratios": {}}
    for worker in workers:
        total, sample, policy = (worker.summary(key) for key in ("total", "sample", "policy"))
        facts = {"total": total, "sample": sample, "policy": policy, "turns": worker.turns}
        row["contestants"][worker.name] = worker.facts | facts
        span = f"{total['min']:.3f} to {total['max']:.3f}"
        print(f"  {worker.name:<29}{total['median']:8.3f} s ({span}; sampling {sample['median']:.3f})", end=", ")
        span = f"{policy['min'] * 1000:.2f} to {policy['max'] * 1000:.2f}"
        print(f"policy step {policy['median'] * 1000:.2f} ms ({span})")
    for one, other in itertools.product(mine, theirs):
        ratio, policy = (other.summary(key)["median"] / one.summary(key)["median"] for key in ("total", "policy"))
        row["ratios"][f"{one.name} / {other.name}"] = ratio
        row["policy_ratios"][f"{one.name} / {other.name}"] = policy
        print(f"  {one.name} is {ratio:.2f} times as fast as {other.name}, its policy {policy:.2f} times", flush=True)
    return row


def main(argv):
    if argv[:1] == ["--worker"]:
        return work(json.loads(argv[1]))

    parser = Parser("compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    above_0, above_1 = partial(at_least, 1), partial(at_least, 2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--precision", nargs="+", default=OURS, choices=OURS, help="ours")
    parser.add_argument("--sheeprl", nargs="+", default=THEIRS, choices=THEIRS, help="its precision")
    parser.add_argument("--compile", action="store_true", help="both sides also compiled; takes minutes to start")
    parser.add_argument("--rounds", type=above_0, default=5, help="updates of each contestant after the warm-up")
    parser.add_argument("--threads", type=above_0, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--batch-size", type=above_0, help="for a try: fewer sequences than the reference")
    parser.add_argument("--train-seq-len", type=above_1, help="for a try: shorter ones than the reference")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-compare", help="where SheepRL is or will be")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    if options.out and (options.out.is_dir() or not os.access(options.out.parent, os.W_OK | os.X_OK)):
        raise InputError(f"--out {options.out}: no file can be written there")
    report = {"command": " ".join(["python", "benchmark/compare.py", *argv]), "threads": options.threads}
    report |= {**machine(ROOT, {"CUDA_VISIBLE_DEVICES": ""}), "rows": []}
    python = sheeprl_python(options.venv)
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            report["rows"].append(race(case, options, python, folder))
        if options.out:
            write(options.out, json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, WorkerError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("compare.py: interrupted", file=sys.stderr)
        sys.exit(130)

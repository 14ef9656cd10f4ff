"""Times our full update and policy step against other implementations' on the CPU, on identical shapes, taking turns.

    python benchmark/compare.py                                          # SheepRL, all cases, both precisions
    python benchmark/compare.py --official --sheeprl --cases V2-DMC V2-Atari --precision float32
    python benchmark/compare.py --cases V2-Atari --rounds 10 --out atari.json

Each contestant (contestants.py) is a process that builds its agent once, warms up and waits; in every round each does
one update and some steps of the policy, so that only one works at a time and a change of the machine's speed hits all
of them. SheepRL and the official code live in virtual environments of their own (requirements-compare.txt,
requirements-official.txt), made at the first call and kept.

Timed on all sides: drawing a batch of random data from a replay, and one update of world model, actor and critic. Ours
is `Replay.sample` and `Learner`, after `tune_cpu` as in every run. SheepRL's is what the loops of
sheeprl/algos/dreamer_v1 and dreamer_v2 do: `sample_batches`, conversion to float included, and `train` with its default
metrics, on agents of `build_agent`, composed by Hydra from its own experiments with our sizes (and, for Atari, a replay
of plain sequences). The official code, DreamerV2's in TensorFlow, is what its train.py does, in float32: its dataset
(which draws in the background, so mostly while the others take their turns), `Agent.train` as a `tf.function`, its
metrics as numbers. All get all threads (SheepRL's default is one). By default neither we nor SheepRL compile; with
`--compile` each also enters compiled, ours by `--compile-cpu`, theirs by `algo.compile.enabled`.
A step of the policy goes from one uint8 image to an action in NumPy; SheepRL's is `prepare_obs` and `get_actions`, the
official one `Agent.policy`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from official_code import VENV, official_python
from run import InputError, Parser, machine, run_tool, whole, write
from throughput import ACTIONS, CASES, ROOT, summary

OURS = ("float32", "bfloat16")
THEIRS = ("32-true", "bf16-mixed")
CHECK = """import importlib.metadata, sys
pins = [pin.split("==") for pin in sys.argv[1:]]
sys.exit(any(importlib.metadata.version(name).split("+")[0] != version for name, version in pins))"""
PAUSE = 0.2  # seconds before each turn, in which the threads of the one before fall asleep


class WorkerError(Exception):
    """A contestant's process has died; the message is one line."""


class Worker:
    """A contestant's process."""

    def __init__(self, python, spec):
        self.side = spec["side"]
        self.name = f"{spec['side']} {spec['precision']}" + " compiled" * spec["compile"]
        self.log, self.turns = Path(spec["folder"], "stderr"), []
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        env |= {"OMP_NUM_THREADS": str(spec["threads"]), "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [str(python), str(ROOT / "benchmark" / "contestants.py"), json.dumps(spec)]
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


def race(case, options, pythons, folder):
    """Lets the contestants of a case take turns, prints what came out and returns it."""
    name, env_id, sizes = CASES[case]
    script = importlib.import_module(name)
    size = {key: getattr(options, key) for key in ("batch_size", "train_seq_len") if getattr(options, key)}
    args = script.Args(env_id=env_id, cuda=False, **sizes, **size)
    discrete = name == "dreamer_v2_atari"
    shared = {"case": case, "script": name, "threads": options.threads, "discrete": discrete, "actions": ACTIONS}
    shared["channels"] = 1 if discrete else 3
    sides = {"ours": options.precision, "sheeprl": options.sheeprl}
    if options.official and case != "V1":
        sides["official"] = ["float32"]
    workers = []
    try:
        for side, precisions in sides.items():
            compiles = options.compile and side != "official"
            for precision, compile_ in itertools.product(precisions, (False, True) if compiles else (False,)):
                values = dataclasses.asdict(args)
                if side == "ours":
                    values |= {"precision": precision, "compile_cpu": compile_}
                spec = {"side": side, "precision": precision, "compile": compile_, "args": values, **shared}
                spec["folder"] = tempfile.mkdtemp(dir=folder)
                workers.append(Worker(pythons[side], spec))
                workers[-1].facts = workers[-1].read()
        for _ in range(options.rounds):
            for worker in workers:
                worker.turn()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()

    mine, theirs = ([worker for worker in workers if (worker.side == "ours") == ours] for ours in (True, False))
    parameters = mine[0].facts["parameters"]
    if any(worker.facts["parameters"] != parameters for worker in workers):
        raise WorkerError(f"{case}: not the same sizes: {[(worker.name, worker.facts) for worker in workers]}")
    print(f"{case}: {args.batch_size} sequences of {args.train_seq_len}, {options.threads} threads")
    print("  trained parameters, the same on all sides:", ", ".join(f"{part} {n:,}" for part, n in parameters.items()))
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
    parser = Parser("compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--precision", nargs="+", default=OURS, choices=OURS, help="ours")
    parser.add_argument("--sheeprl", nargs="*", default=THEIRS, choices=THEIRS, help="its precision; none: without it")
    parser.add_argument(
        "--official", action="store_true", help="the official code too, but for V1, which is no package"
    )
    parser.add_argument("--compile", action="store_true", help="ours and SheepRL also compiled; takes minutes to start")
    parser.add_argument("--rounds", type=whole(1), default=5, help="updates of each contestant after the warm-up")
    parser.add_argument("--threads", type=whole(1), default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--batch-size", type=whole(1), help="for a try: fewer sequences than the reference")
    parser.add_argument("--train-seq-len", type=whole(2), help="for a try: shorter ones than the reference")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-compare", help="where SheepRL is or will be")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    if options.out and (options.out.is_dir() or not os.access(options.out.parent, os.W_OK | os.X_OK)):
        raise InputError(f"--out {options.out}: no file can be written there")
    report = {"command": " ".join(["python", "benchmark/compare.py", *argv]), "threads": options.threads}
    report |= {**machine(ROOT, {"CUDA_VISIBLE_DEVICES": ""}), "rows": []}
    pythons = {"ours": sys.executable}
    if options.sheeprl:
        pythons["sheeprl"] = sheeprl_python(options.venv)
    if options.official:
        pythons["official"] = official_python(VENV)
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            report["rows"].append(race(case, options, pythons, folder))
        if options.out:
            write(options.out, json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    try:
        run_tool(lambda: main(sys.argv[1:]))
    except WorkerError as error:
        sys.exit(f"compare.py: {error}")

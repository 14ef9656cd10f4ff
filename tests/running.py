"""What the tests of whole runs share: the scripts that exist, small sizes, and ways to run a script."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("dreamer_v1_continuous", "dreamer_v2_continuous", "dreamer_v2_atari")
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").is_file()]
CONTINUOUS = [name for name in SCRIPTS if name.endswith("continuous")]

SMALL = {  # a run of some seconds; a script ignores what it has no flag for
    "action_repeat": 2,
    "total_steps": 300,
    "seed_steps": 60,
    "collect_steps": 20,
    "update_steps": 1,
    "pretrain": 1,
    "scalar_freq": 40,
    "eval_every": 0,
    "eval_episodes": 1,
    "checkpoint_interval": 100,
    "replay_capacity": 400,
    "batch_size": 4,
    "train_seq_len": 8,
    "stoch_size": 4,
    "num_classes": 4,
    "deter_size": 8,
    "obs_embed_size": 8,
    "cnn_depth": 2,
    "units": 8,
    "imagine_horizon": 3,
    "free_nats": 0.0,
    "cuda": False,  # of such sizes the CPU is faster than a GPU, whose compilation takes minutes
}


def load(name):
    return importlib.import_module(name)


def is_discrete(script):
    return script.__name__.endswith("atari")


def env_id(script, name="DotSteer", module="tests.pixel_envs"):
    """An environment of these tests, with the actions that the script takes."""
    return f"{module}:{name}{'Discrete' if is_discrete(script) else ''}-v0"


def as_flags(values):
    """{"num_envs": 2, "cuda": False} -> ["--num-envs", "2", "--no-cuda"]"""
    flags = []
    for key, value in values.items():
        name = key.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def small(script, **changes):
    """The flags of a small run."""
    known = {field.name for field in dataclasses.fields(script.Args)}
    values = {key: value for key, value in SMALL.items() if key in known}
    return as_flags({"env_id": env_id(script), **values, **changes})


def small_args(script, **changes):
    return script.parse_args(small(script, **changes))


@contextlib.contextmanager
def restored_signals():
    """A run takes over four signals; the tests want them back."""
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def train(script, folder, flags):
    """Runs the script in this process, with `folder` as the current one. Returns the run folder."""
    before = {*folder.glob("runs/*")}
    with restored_signals(), contextlib.chdir(folder):
        script.main(script.parse_args(flags))
    new = {*folder.glob("runs/*")} - before
    return new.pop() if new else None


def start(script, folder, flags, **kwargs):
    """Starts the script as a user does, in a process group of its own."""
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes, **kwargs)


def strict_json(line):
    """One JSON object; NaN and Infinity, which Python's reader takes, are no JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read_metrics(run_dir):
    return [strict_json(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clock(metrics):
    """Log lines without what depends on the computer's speed."""
    clock = {"charts/SPS", "charts/updates_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in metrics]


def contents(folder):
    """Path and checksum of everything in a folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: zlib.crc32(path.read_bytes()) if path.is_file() else None for name, path in paths.items()}


def one_line(text):
    """Whether a message for the user is one line that says something."""
    return bool(re.fullmatch(r"[^\n\r]*\w[^\n\r]*", text))

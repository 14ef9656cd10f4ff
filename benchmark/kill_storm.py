"""Starts a small run, kills it with SIGKILL at random instants and resumes it, again and again; then lets it finish.

    python benchmark/kill_storm.py --script dreamer_v1_continuous.py --rounds 100

After every kill it is checked that
  - the checkpoint loads, and its frames never go back;
  - every transition that a checkpoint counts is in the replay, bit for bit as at the first checkpoint that counted it;
  - metrics.jsonl up to the checkpoint has no torn, repeated or backward line;
  - `--resume` starts again from that checkpoint.
At the end the run has reached `total_steps` and its last evaluation return beats the given floor. Where something is
not so the run's folder is kept to look at. The task is the dot of the tests, with their sizes; needs
`tests/requirements.txt` too.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from run import Parser, run_tool, whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.running import as_flags  # noqa: E402
from tests.test_learning import SMALL, SMALL_V1  # noqa: E402

NAMES = ("dreamer_v1_continuous", "dreamer_v2_atari", "dreamer_v2_continuous")


def check_run(script, run_dir, seen):
    """Checks everything that the last checkpoint promises; `seen` maps replay rows to their first checksum."""
    checkpoint = script.load_checkpoint(run_dir)
    frames, rows = checkpoint["counters"]["frames"], checkpoint["replay_rows"]
    assert frames >= seen.get("frames", 0), f"the checkpoint went back from frame {seen['frames']} to {frames}"
    assert rows >= seen.get("rows", 0), f"the replay lost rows: {seen['rows']} before, {rows} now"
    steps = np.lib.format.open_memmap(run_dir / "replay" / "steps.npy", mode="r")
    for row in range(max(0, rows - seen["capacity"]), rows):
        for env, step in enumerate(steps[row % len(steps)]):
            assert step["checksum"] == script.Replay.checksum(step, row), f"row {row} is damaged"
            # A resumed run may mark a row as its episode's last; nothing else of a row ever changes.
            data = zlib.crc32(b"".join(step[name].tobytes() for name in steps.dtype.names[:-2]))
            assert seen.setdefault((row, env), data) == data, f"row {row} changed"
    log, size = (run_dir / "metrics.jsonl").read_bytes(), checkpoint["metrics_size"]
    assert len(log) >= size, "metrics.jsonl has lost lines"
    lines = log[:size].decode().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [line["step"] for line in logged] == sorted(line["step"] for line in logged), "a line goes back"
    assert len(lines) == len(set(lines)), "a line is repeated"
    assert lines[: len(seen.get("lines", []))] == seen.get("lines", []), "an old line changed"
    seen.update(frames=frames, rows=rows, lines=lines)
    return frames


def storm(script, first, options, folder):
    """Kills, resumes and checks; raises `AssertionError` for a promise that was not kept."""
    path, log, rng = ROOT / options.script, folder / "log.txt", random.Random(options.seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run_dir, seen, early, kills, start = None, {"capacity": SMALL["replay_capacity"]}, 0, 0, time.time()

    @contextlib.contextmanager
    def running():
        command = [sys.executable, str(path), *(["--resume", str(run_dir)] if run_dir else first)]
        with (
            open(log, "ab") as file,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def saved():
        return next(folder.glob("runs/*/checkpoint.pt"), None)

    while kills < options.rounds:
        size = log.stat().st_size if run_dir else 0
        with running() as process:
            if not run_dir:  # there is nothing to resume before the first checkpoint
                while not saved() and process.poll() is None:
                    time.sleep(0.05)
                assert saved(), log.read_text()[-2000:].strip()
                run_dir = saved().parent
            patient = rng.random() > 0.2
            # One kill in five strikes while the run starts, the others once its progress bar stands in the log.
            while patient and log.stat().st_size == size and process.poll() is None:
                time.sleep(0.3)
            time.sleep(rng.uniform(0.0, 5.0))
            if process.poll() is not None:
                assert process.returncode == 0, log.read_text()[-2000:].strip()
                break
        kills += 1
        before = seen.get("frames", 0)
        frames = check_run(script, run_dir, seen)
        early += frames == before
        print(f"kill {kills}: frame {frames}, {seen['rows']} rows, {time.time() - start:.0f} s", flush=True)
    with running() as process:
        assert process.wait() == 0, log.read_text()[-2000:].strip()
    frames = check_run(script, run_dir, seen)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    returns = [line["charts/eval_return"] for line in lines if "charts/eval_return" in line]
    assert frames >= options.total_steps, f"the run ended at frame {frames}"
    print(f"{path.name}: {kills} kills ({early} before a new checkpoint), {frames} frames, return {returns[-1]:.2f}")
    assert options.floor is None or returns[-1] > options.floor, "the task was not learned"
    assert kills == options.rounds, f"the run was over after {kills} kills: raise --total-steps"


def main():
    parser = Parser("kill_storm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="dreamer_v1_continuous.py", choices=[f"{name}.py" for name in NAMES])
    parser.add_argument("--rounds", type=whole(1), default=100)
    parser.add_argument("--total-steps", type=whole(1), default=5000)
    parser.add_argument("--floor", type=float, default=None, help="the last evaluation's mean return must exceed this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = ROOT / options.script
    script = importlib.import_module(path.stem)
    flags = SMALL | (SMALL_V1 if "v1" in path.stem else {"action_noise": 0.0})
    flags |= {
        "env_id": f"tests.pixel_envs:DotSteer{'Discrete' if 'atari' in path.stem else ''}-v0",
        "total_steps": options.total_steps,
        "eval_every": options.total_steps,
        "actor_entropy": 3e-3,
        "collect_steps": 10,
        "update_steps": 5,
        "pretrain": 5,  # no work between two checkpoints may outlast a round
        "scalar_freq": 100,
        "checkpoint_interval": 10,
    }
    known = {field.name for field in dataclasses.fields(script.Args)}
    first = as_flags({key: value for key, value in flags.items() if key in known})
    folder = Path(tempfile.mkdtemp())
    try:
        storm(script, first, options, folder)
    except AssertionError as error:
        sys.exit(f"kill_storm.py: {error} (the run is kept in {folder})")
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_tool(main)

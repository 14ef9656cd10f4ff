"""Starts a small run, kills it with SIGKILL at random instants and resumes it, again and again; then lets it finish.

    python benchmark/kill_storm.py --script dreamer_v1_continuous.py --rounds 100

After every kill it is checked that
  - the checkpoint loads, and its frames never go back;
  - every transition that a checkpoint counts is in the replay, bit for bit as at the first checkpoint that counted it;
  - metrics.jsonl up to the checkpoint has no torn, repeated or backward line;
  - `--resume` starts again from that checkpoint.
At the end the run has reached `total_steps` and its last evaluation return beats the given floor. The task is the dot
of the tests, with their sizes; needs `tests/requirements.txt` too.
"""

import argparse
import dataclasses
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from run import Parser, whole

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
    lines = (run_dir / "metrics.jsonl").read_bytes()[: checkpoint["metrics_size"]].decode().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [line["step"] for line in logged] == sorted(line["step"] for line in logged), "a line goes back"
    assert len(lines) == len(set(lines)), "a line is repeated"
    assert lines[: len(seen.get("lines", []))] == seen.get("lines", []), "an old line changed"
    seen.update(frames=frames, rows=rows, lines=lines)
    return frames


def main():
    parser = Parser("kill_storm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="dreamer_v1_continuous.py", choices=[f"{name}.py" for name in NAMES])
    parser.add_argument("--rounds", type=whole(1), default=100)
    parser.add_argument("--total-steps", type=int, default=5000)
    parser.add_argument("--floor", type=float, default=None, help="the last evaluation's mean return must exceed this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = ROOT / options.script
    script, rng = importlib.import_module(path.stem), random.Random(options.seed)
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
    command = [sys.executable, str(path)]
    first = as_flags({key: value for key, value in flags.items() if key in known})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    with tempfile.TemporaryDirectory() as folder:
        run_dir, seen, early, start = None, {"capacity": flags["replay_capacity"]}, 0, time.time()

        def launch():
            arguments = ["--resume", str(run_dir)] if run_dir else first
            log = open(Path(folder) / "log.txt", "ab")  # noqa: SIM115 (the child keeps it)
            return subprocess.Popen(command + arguments, cwd=folder, env=environment, stdout=log, stderr=log)

        def saved():
            return next(Path(folder).glob("runs/*/checkpoint.pt"), None)

        kills = 0
        while kills < options.rounds:
            size = (Path(folder) / "log.txt").stat().st_size if run_dir else 0
            process = launch()
            if not run_dir:  # there is nothing to resume before the first checkpoint
                while not saved() and process.poll() is None:
                    time.sleep(0.05)
                if not saved():
                    sys.exit((Path(folder) / "log.txt").read_text()[-2000:])
                run_dir = saved().parent
            patient = rng.random() > 0.2
            # One kill in five strikes while the run starts, the others once its progress bar stands in the log.
            while patient and (Path(folder) / "log.txt").stat().st_size == size and process.poll() is None:
                time.sleep(0.3)
            time.sleep(rng.uniform(0.0, 5.0))
            if process.poll() is not None:
                assert process.returncode == 0, (Path(folder) / "log.txt").read_text()[-2000:]
                print(f"the run finished after {kills} kills")
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            before = seen.get("frames", 0)
            frames = check_run(script, run_dir, seen)
            early += frames == before
            print(f"kill {kills}: frame {frames}, {seen['rows']} rows, {time.time() - start:.0f} s", flush=True)
        assert launch().wait() == 0, (Path(folder) / "log.txt").read_text()[-2000:]
        frames = check_run(script, run_dir, seen)
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        returns = [line["charts/eval_return"] for line in lines if "charts/eval_return" in line]
        assert frames >= options.total_steps, f"the run ended at frame {frames}"
        print(
            f"{path.name}: {kills} kills ({early} before a new checkpoint), {frames} frames, return {returns[-1]:.2f}"
        )
        assert options.floor is None or returns[-1] > options.floor, "the task was not learned"


if __name__ == "__main__":
    main()

"""Starts a small run, kills it with SIGKILL at random instants and resumes it, again and again; then lets it finish.

    python benchmark/kill_storm.py --script dreamer_v1_continuous.py --rounds 100

After every kill it is checked that
  - the checkpoint loads, and its frames never go back;
  - every transition that a checkpoint counts is in the replay, bit for bit as at the first checkpoint that counted it;
  - metrics.jsonl up to the checkpoint has no torn, repeated or backward line;
  - `--resume` starts again from that checkpoint.
At the end the run has reached `total_steps` and its last evaluation return beats the given floor.
"""

import argparse
import importlib.util
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

ROOT = Path(__file__).resolve().parents[1]
SMALL = {  # as in tests/test_learning.py, but for `pretrain`: no work between two checkpoints may outlast a round
    "action_repeat": 1,
    "seed_steps": 500,
    "collect_steps": 10,
    "update_steps": 5,
    "pretrain": 5,
    "scalar_freq": 100,
    "checkpoint_interval": 10,
    "replay_capacity": 10_000,
    "batch_size": 16,
    "train_seq_len": 12,
    "deter_size": 64,
    "obs_embed_size": 64,
    "cnn_depth": 4,
    "units": 64,
    "reward_layers": 2,
    "value_layers": 2,
    "actor_layers": 2,
    "imagine_horizon": 6,
    "discount": 0.9,
    "actor_entropy": 3e-3,
}
SMALL_V1 = {
    "stoch_size": 16,
    "free_nats": 1.0,
    "action_noise": 0.2,
    "model_learning_rate": 1.5e-3,
    "actor_learning_rate": 5e-4,
    "value_learning_rate": 1e-3,
}
SMALL_V2 = {
    "stoch_size": 8,
    "num_classes": 8,
    "discount_layers": 2,
    "slow_target_update": 50,
    "discount_scale": 1.0,
    "kl_loss_coeff": 0.3,
    "free_nats": 0.0,
    "model_learning_rate": 1e-3,
    "actor_learning_rate": 1e-3,
    "value_learning_rate": 2e-3,
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=ROOT / "dreamer_v1_continuous.py")
    parser.add_argument("--env-id")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--total-steps", type=int, default=5000)
    parser.add_argument("--floor", type=float, default=None, help="the last evaluation's mean return must exceed this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = options.script.resolve()
    script, rng = load(path), random.Random(options.seed)
    discrete = "Discrete" if "atari" in path.stem else ""
    env_id = options.env_id or f"pixel_envs:DotSteer{discrete}-v0"
    flags = SMALL | (SMALL_V2 if "v2" in path.stem else SMALL_V1)
    flags |= {"env_id": env_id, "total_steps": options.total_steps, "eval_every": options.total_steps}
    command = [sys.executable, str(path)]
    first = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}

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

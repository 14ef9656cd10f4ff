"""Times each script's full update, policy step, environment and training loop; prints a table and writes JSON.

    python benchmark/throughput.py                                  # everything, on the CPU or the GPU that is there
    python benchmark/throughput.py --parts update --precision bfloat16
    python benchmark/throughput.py --parts update --modes eager compile graph graph+compile     # on CUDA
    python benchmark/throughput.py --parts update policy --modes eager compile                  # on the CPU

Updates run on random uint8 data in a real replay, sampling included; environments and loops are real.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from run import InputError, Parser, machine, run_tool, whole, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The reference sizes: V1 as its paper, V2 in the paper's architecture (depth 48, no extra Linear, MLPs without norm).
PAPER_V2 = {"cnn_depth": 48, "obs_embed_size": 0, "act": "elu", "layer_norm": False, "reward_head": "mse"}
CASES = {
    "V1": ("dreamer_v1_continuous", "dmc/walker-walk", {"obs_embed_size": 0}),
    "V2-DMC": (
        "dreamer_v2_continuous",
        "dmc/walker-walk",
        PAPER_V2 | {"pred_discount": False, "actor_dist": "trunc_normal"},
    ),
    "V2-Atari": ("dreamer_v2_atari", "PongNoFrameskip-v4", PAPER_V2),
}
ACTIONS = 6
PARTS = ["update", "policy", "env", "loop"]
PRECISIONS = ["float32", "bfloat16"]
MODES = ["eager", "compile", "graph", "graph+compile"]
GFLOP = {"V1": 907, "V2-DMC": 663, "V2-Atari": 730}  # products and convolutions of one update at these sizes


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(call, device, warmup, repeats):
    """Seconds of each of `repeats` calls."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds):
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repeats": len(seconds)}


def product_speed(precision, device, n=2048):
    """GFLOP/s of a matrix product: how fast this machine is just now, to compare figures of other machines and days."""
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    return 2e-9 * n**3 / statistics.median(times(lambda: a @ b, device, 5, 10))


def profile(call, repeats=3):
    """Number of GPU kernels of a call, their seconds, and the 40 that take most of them: [ms, count, name]."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    kernels = [(k.self_device_time_total / repeats / 1000, k.count / repeats, k.key) for k in kernels]
    kernels = [kernel for kernel in kernels if kernel[0] > 0]
    return (
        sum(count for _, count, _ in kernels),
        sum(ms for ms, _, _ in kernels) / 1000,
        [[round(ms, 4), round(count, 1), name[:120]] for ms, count, name in kernels[:40]],
    )


def time_update(script, args, channels, device, repeats):
    """One update of world model, actor and critic, its batch drawn from a replay of random data."""
    if device.type == "cuda":
        gc.collect()  # a compiled learner holds itself
        torch.cuda.reset_peak_memory_stats()
    learner = script.Learner(script.Dreamer(args, channels, ACTIONS).to(device), args, device)
    rng, n = np.random.default_rng(0), args.batch_size * args.train_seq_len
    with tempfile.TemporaryDirectory() as folder:
        replay = script.Replay(Path(folder) / "replay", n, 2, 1, (channels, 64, 64), ACTIONS, device)
        no = np.zeros(1, bool)
        for _ in range(n):
            image = rng.integers(0, 256, (1, channels, 64, 64), np.uint8)
            replay.add(image, script.random_actions(rng, 1, ACTIONS), rng.normal(size=1), no, no, no)

        def sample():
            return replay.sample(rng, args.batch_size, args.train_seq_len)

        result = {
            "update": summary(times(lambda: learner(sample()), device, 5 if device.type == "cuda" else 2, repeats)),
            "sample": summary(times(sample, device, 2, 20)),
        }
    if device.type == "cuda":
        batch = sample()
        result["kernels"], result["kernel_seconds"], result["profile"] = profile(lambda: learner(batch))
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:  # of the process: a case after a larger one has that one's peak
        result["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def time_policy(script, args, channels, device):
    agent = script.Learner(script.Dreamer(args, channels, ACTIONS).to(device), args, device).acting
    result = {}
    for n in (1, 4, 16):
        image = np.random.default_rng(0).integers(0, 256, (n, channels, 64, 64), np.uint8)
        policy, state, no = script.fast_policy(agent, n), agent.initial_state(n), np.zeros(n, bool)
        seconds = times(lambda p=policy, i=image, s=state, f=no: p(i, s, f)[0].cpu(), device, 30, 200)
        result[f"policy_{n}"] = summary(seconds)
    return result


def time_env(script, args):
    silent = types.SimpleNamespace(warn=lambda topic, message: None)
    envs = script.SturdyEnvs(args, script.Counters(), logger=silent)
    envs.reset(seed=0)
    size = script.probe_env(args)[1]
    action = script.random_actions(np.random.default_rng(0), args.num_envs, size)
    seconds = times(lambda: envs.step(action), torch.device("cpu"), 20, 200)
    envs.close()
    frames = args.action_repeat * args.num_envs * len(seconds)
    return {"env_step": summary(seconds), "env_frames_per_second": frames / sum(seconds)}


def least_frames(args):
    """Frames after which `time_loop` has two training phases to time."""
    return (10 // args.update_steps + 2) * args.collect_steps + args.action_repeat * args.num_envs


def time_loop(script, args, frames):
    """Frames per second of the whole training loop at its default schedule, after the seed frames and the warm-up.

    From the first update of a training phase to that of a later one: V1 has 100 updates in each.
    """
    warm = 10 // args.update_steps  # phases: the first updates compile, capture and fill caches
    total = args.seed_steps + (frames or max(1000, least_frames(args)))
    args = dataclasses.replace(args, total_steps=total, eval_every=0, checkpoint_interval=10 * total, pretrain=5)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stderr(io.StringIO()) as log,
    ):
        marks = []

        class Timed(script.Learner):
            def __call__(self, batch):
                marks.append(time.perf_counter())
                return super().__call__(batch)

        original, script.Learner = script.Learner, Timed
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            script.main(args)
        finally:
            script.Learner = original
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if "stopped and saved" in log.getvalue():
        raise KeyboardInterrupt
    phases = marks[args.pretrain :: args.update_steps][warm:]
    return {"loop_frames_per_second": (len(phases) - 1) * args.collect_steps / (phases[-1] - phases[0])}


def main():
    parser = Parser("throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: graph+compile; on the CPU: eager")
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--loop-frames", type=whole(1), help="after the seed frames (default: 1000, V1 what it needs)")
    parser.add_argument("--num-envs", type=whole(1), default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modes = options.modes or (["graph+compile"] if device.type == "cuda" else ["eager"])
    if device.type == "cpu" and any("graph" in mode for mode in modes):
        parser.error("--modes: there are no graphs without CUDA: eager or compile")
    for name, _, sizes in (CASES[case] for case in options.cases if "loop" in options.parts and options.loop_frames):
        least = least_frames(importlib.import_module(name).Args(num_envs=options.num_envs, **sizes))
        if options.loop_frames < least:
            parser.error(f"--loop-frames {options.loop_frames} is too few for {name}: it needs {least}")
    report = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    report |= {**machine(ROOT, os.environ), "rows": []}
    if options.out:
        write(options.out, json.dumps(report, indent=1))
    for case in options.cases:
        name, env_id, sizes = CASES[case]
        script = importlib.import_module(name)
        script.tune_cpu()
        channels = 1 if case == "V2-Atari" else 3
        for precision in options.precision:
            for mode in modes:
                compiled = {"compile" if device.type == "cuda" else "compile_cpu": "compile" in mode}
                args = script.Args(env_id=env_id, precision=precision, cuda_graph="graph" in mode, **compiled, **sizes)
                args = dataclasses.replace(args, num_envs=options.num_envs)
                row = {"case": case, "precision": precision, "mode": mode}
                try:
                    if "update" in options.parts:
                        before = product_speed(precision, device)
                        row |= time_update(script, args, channels, device, options.repeats)
                        row["product_gflops"] = (before + product_speed(precision, device)) / 2
                        row["update_gflops"] = GFLOP[case] / row["update"]["median"]
                    if "policy" in options.parts:
                        row |= time_policy(script, args, channels, device)
                    if "env" in options.parts:
                        row |= time_env(script, args)
                    if "loop" in options.parts:
                        row |= time_loop(script, args, options.loop_frames)
                except script.UserError as error:  # an environment that cannot be used
                    raise InputError(f"{case}: {error}") from None
                report["rows"].append(row)
                if options.out:
                    write(options.out, json.dumps(report, indent=1))
                figures = [
                    f"{key} {value['median'] * 1000:.2f} ms" if isinstance(value, dict) else f"{key} {value:.2f}"
                    for key, value in row.items()
                    if not isinstance(value, str | list)
                ]
                print(f"{case:<9} {precision:<9} {mode:<14}", ", ".join(figures), flush=True)


if __name__ == "__main__":
    run_tool(main)

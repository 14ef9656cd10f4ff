"""Train a list of (script, environment, seed) on this machine, a Slurm cluster or Ray, and keep what is already there.

    python benchmark/run.py --script dreamer_v2_atari.py --env-ids PongNoFrameskip-v4 BreakoutNoFrameskip-v4 \\
        --seeds 1 2 3 --config benchmark/configs/v2_atari_paper.yaml --workers 2 -- --total-steps 1000000

Complete runs are skipped, runs that were cut off are resumed, and one that fails leaves the
others alone. So the same command, typed again, finishes whatever is missing.
Exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

LOCKED = 75  # EX_TEMPFAIL of sysexits.h
CONFIGS = {}  # (path, time of its last change) -> settings: the table asks for every run's again and again
CHILDREN = set()  # the training processes of this process, to be told when it is interrupted
STOPPING = []  # not empty: it was interrupted, and what starts from now on has to stop


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line that is shown."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole(low):
    """An argument's type: whole numbers from `low` on."""

    def parse(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return parse


def read_yaml(path):
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    return data


@contextlib.contextmanager
def replacing(path):
    """A temporary name that becomes `path` when the block ends well, so nobody ever reads half a file."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield name
        os.chmod(name, 0o644)
        try:
            os.replace(name, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write(path, text):
    with replacing(path) as name:
        Path(name).write_text(text)


def run_tool(main):
    """Runs a tool's `main`: bad input is one line and exit code 2, an interruption one line and 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that folders and children of the tool go too
    name = os.path.basename(sys.argv[0])
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


def frame_count(value, where):
    try:
        return int(float(value))  # PyYAML reads 1e6 as a string
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: total_steps is {value!r}, not a number of frames") from None


# RUN FOLDERS


class Run(NamedTuple):
    path: Path
    step: int
    total: int
    last_return: float | None
    resumable: bool
    finished: bool


def read_run(path, config, size=1 << 18):
    rows, metrics = [], path / "metrics.jsonl"
    if metrics.exists():
        with open(metrics, "rb") as file:  # its end only: a long run's is too big to be read at every refresh
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            for line in file.read().splitlines()[1 if start else 0 :]:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the line that a killed run was writing
                    rows.append({**(row := json.loads(line)), "step": int(row["step"])})
    total = frame_count(config.get("total_steps"), path / "config.yaml")
    evaluated = [row["step"] for row in rows if "charts/eval_return" in row]
    step = max(evaluated[-1:] + [row["step"] for row in rows[-1:]], default=0)
    names = ("charts/episodic_return", "charts/eval_return")
    last = next((row[name] for row in reversed(rows) for name in names if name in row), None)
    complete = bool(rows) and rows[-1].keys() == {"step"} and step >= total  # what a script writes after its last save
    return Run(path, step, total, last, (path / "checkpoint.pt").exists(), complete)


@dataclass(frozen=True)
class Job:
    """One training run. It is called on the machine that trains, and pickled on its way there."""

    script: str
    env_id: str
    seed: int
    exp_name: str
    config: str | None
    flags: tuple
    out: str

    @property
    def name(self):
        return f"{self.env_id}__{self.exp_name}__{self.seed}".replace("/", "_").replace(":", "_")

    @property
    def log(self):
        return Path(self.out, "logs", f"{self.name}.log")

    def find_run(self):
        """The run folder of this job: one that is finished, else one to resume, else the newest."""
        found = []
        for path in Path(self.out, "runs").glob("*/config.yaml"):
            born = path.stat().st_mtime_ns
            if (path, born) not in CONFIGS:
                with contextlib.suppress(InputError):  # a folder that was cut off at birth is no run
                    CONFIGS[path, born] = read_yaml(path)
            config = CONFIGS.get((path, born), {})
            if [config.get(key) for key in ("env_id", "seed", "exp_name")] == [self.env_id, self.seed, self.exp_name]:
                run = read_run(path.parent, config)
                found.append(((run.finished, run.resumable, born), run))
        return max(found, default=(None, None))[1]

    def command(self, run):
        if run and run.resumable:
            return [self.script, "--resume", str(run.path.relative_to(self.out))]
        recipe = ["--config", self.config] if self.config else []
        name = ["--env-id", self.env_id, "--seed", str(self.seed), "--exp-name", self.exp_name]
        return [self.script, *name, *recipe, *self.flags]

    def __call__(self, **environment):
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            # The child inherits the lock with the file: it holds as long as the run lives, even if this one is killed.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return LOCKED
            except OSError:  # a network disk without locks
                pass
            run = self.find_run()  # here and not at submission: a requeued job has to find its own first half
            if run and run.finished:
                return 0
            command, root = self.command(run), os.path.dirname(self.script) + os.sep
            shown = " ".join(["python", *(word.removeprefix(root) for word in command)])
            log.write(f"\n$ {shown}\n".encode())
            log.flush()
            # A progress bar that redraws ten times a second would fill the log.
            env = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30", **os.environ, **environment}
            attempt = {"command": shown, **machine(root, env)}  # before the run: the commit may be another one after it
            started, command = time.time(), [sys.executable, *command]
            # In a session of its own, or Ctrl-C in a terminal would reach it twice, the second time while it saves.
            process = subprocess.Popen(command, cwd=self.out, stdout=log, stderr=log, env=env, start_new_session=True)
            CHILDREN.add(process)
            if STOPPING:
                process.send_signal(signal.SIGINT)
            try:
                while process.poll() is None:  # not wait(): it would hold its lock while checkpoint() needs it
                    time.sleep(0.1)
            finally:  # submitit, after checkpoint(), ends this process from a signal's handler
                CHILDREN.discard(process)
                run, attempt["seconds"] = self.find_run(), round(time.time() - started, 1)
                with open(self.log.with_suffix(".jsonl"), "a") as attempts:
                    attempts.write(json.dumps({"run": run and run.path.name, "code": process.poll(), **attempt}) + "\n")
        return process.returncode

    def checkpoint(self):
        """Called by submitit before a timeout or a preemption: the same job is queued again, and resumes."""
        from submitit.helpers import DelayedSubmission

        stop_children(60)
        return DelayedSubmission(self)


def stop_children(seconds):
    """Let the training processes save and end."""
    for process in list(CHILDREN):
        process.send_signal(signal.SIGINT)
    for process in list(CHILDREN):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    CHILDREN.clear()


def cores():
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(root, env):
    """What a figure has to be quoted with: hardware, versions, commit."""

    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    visible = env.get("CUDA_VISIBLE_DEVICES")
    only = ["-i", visible] if visible else []
    gpus = "" if visible == "" else ask("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *only)
    gpus = [f"{len(list(same))}x {name}" for name, same in itertools.groupby(gpus.splitlines())]
    cpu = ask("sed", "-n", "s/^model name.*: //p;T;q", "/proc/cpuinfo") or platform.machine()
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "ale-py", "dm_control", "mujoco"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = ask("git", "-C", root or ".", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return {"hardware": ", ".join([*gpus, f"{cores()} cores of {cpu}"]), "versions": versions, "commit": commit}


# LAUNCHERS: one future-like handle (done, result) for each job


def launch_local(jobs, args):
    slots = queue.SimpleQueue()
    for slot in range(args.workers):
        slots.put({"CUDA_VISIBLE_DEVICES": args.gpus[slot % len(args.gpus)]} if args.gpus else {})
    # Torch takes every core by default; runs side by side that all do so are slower than one after the other.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // args.workers)))

    def work(job):
        slot = slots.get()
        try:
            return job(OMP_NUM_THREADS=threads, **slot)
        finally:
            slots.put(slot)

    pool = concurrent.futures.ThreadPoolExecutor(args.workers)
    return [pool.submit(work, job) for job in jobs]


def launch_submitit(jobs, args):
    import submitit

    cluster = args.launcher.removeprefix("submitit-")
    limits = {"timeout_min": 24 * 60, "name": "dreamer"}  # submitit's own limit is five minutes
    limits |= {"slurm_array_parallelism": args.workers} if cluster == "slurm" else {}
    try:
        executor = submitit.AutoExecutor(Path(args.out, "logs", "submitit"), cluster=cluster, slurm_max_num_timeout=100)
        executor.update_parameters(**{**limits, **args.resources})
        with executor.batch():
            handles = [executor.submit(job) for job in jobs]
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise InputError(f"--launcher {args.launcher}: {' '.join(str(error).split())}") from None
    print("submitted " + ", ".join(handle.job_id for handle in handles), flush=True)
    return handles


def launch_ray(jobs, args):
    import ray

    cores = None if args.ray_address else args.workers
    try:
        if args.ray_address and ":" in args.ray_address:  # ray.init waits for minutes where nobody answers
            host, _, port = args.ray_address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=20).close()
        ray.init(args.ray_address, num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init took it
        task = ray.remote(lambda job: job()).options(**{"num_cpus": 1, **args.resources})
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--launcher ray: {' '.join(str(error).split())}") from None
    return [task.remote(job).future() for job in jobs]


LAUNCHERS = {"local": launch_local, "slurm": launch_submitit, "submitit-local": launch_submitit, "ray": launch_ray}
PACKAGES = {"slurm": "submitit", "submitit-local": "submitit", "ray": "ray"}


# STATE


def outcome(job, handle):
    """Empty while the run is not over, else 'done' or the reason why it failed."""
    if not handle.done():
        return ""
    try:
        code = handle.result()
    except Exception as error:  # noqa: BLE001 - whatever an engine reports: a lost node, a killed job
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {next((line for line in reversed(lines) if 'Error' in line), lines[0])}"
    if code == LOCKED:
        return "another process is running it (its log is locked)"
    run = job.find_run()
    if code:
        lines = job.log.read_text(errors="replace").replace("\r", "\n").split("\n")
        return f"exit code {code}: " + next(line.strip() for line in reversed(lines) if line.strip())
    return "done" if run and run.finished else f"exit code 0, but not complete: at {run.step if run else 0:,} frames"


def table(jobs, states):
    rows = [("env", "seed", "experiment", "state", "frames", "return")]
    for job in jobs:
        run = job.find_run()
        frames = f"{run.step:,} / {run.total:,}" if run else "-"
        last = f"{run.last_return:.1f}" if run and run.last_return is not None else "-"
        rows.append((job.env_id, str(job.seed), job.exp_name, states[job], frames, last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    counts = [f"{list(states.values()).count(state)} {state}" for state in ("queued", "running", "done", "failed")]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    print("", f"{time.strftime('%H:%M:%S')}  {', '.join(counts)}", *lines, sep="\n", flush=True)


def parse(argv):
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", nargs="+", required=True, help="training scripts")
    parser.add_argument("--env-ids", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--config", help="recipe (YAML) given to every run")
    parser.add_argument("--exp-name", help="name of the experiment (default: that of the script)")
    parser.add_argument("--out", default=".", help="folder that gets runs/ and logs/ (default: here)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one, or one for each of --gpus)")
    parser.add_argument("--gpus", nargs="+", help="local: CUDA devices, dealt out to the workers")
    parser.add_argument("--refresh", type=float, default=30, help="seconds between two tables")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local")
    parser.add_argument("--resources", nargs="+", default=[], metavar="KEY=VALUE", help="for submitit or ray.remote")
    parser.add_argument("--ray-address", help="of a running Ray cluster (default: start one here)")
    return parser.parse_args(argv[:split], argparse.Namespace(flags=argv[split + 1 :]))


def plan(args):
    """The jobs, after everything that can be wrong with the list has been looked at."""
    if args.workers is None:
        args.workers = len(args.gpus or [0])
    if args.workers < 1 or not args.refresh > 0:
        raise InputError("--workers and --refresh must be positive")
    for path in [*args.script, *([args.config] if args.config else [])]:
        if not os.path.isfile(path):
            raise InputError(f"no such file: {path}")
    package = PACKAGES.get(args.launcher)
    if package and not importlib.util.find_spec(package):
        raise InputError(f"--launcher {args.launcher} needs {package}: pip install -r benchmark/requirements.txt")
    pairs = [entry.partition("=") for entry in args.resources]
    if not all(key and value for key, _, value in pairs):
        raise InputError("--resources takes KEY=VALUE")
    try:
        args.resources = {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError:
        raise InputError("--resources takes KEY=VALUE, the value as in YAML") from None
    total = read_yaml(args.config).get("total_steps") if args.config else None
    words = [word for flag in args.flags for word in flag.split("=", 1)]
    for name, value in zip((word.replace("_", "-") for word in words), [*words[1:], None], strict=False):
        if name in ("--env-id", "--seed", "--exp-name", "--config", "--resume"):
            raise InputError(f"{name} after -- is set by run.py itself")
        total = value if name == "--total-steps" else total
    args.out, recipe = os.path.abspath(args.out), args.config and os.path.abspath(args.config)
    jobs = [
        Job(os.path.abspath(script), env, seed, args.exp_name or Path(script).stem, recipe, tuple(args.flags), args.out)
        for script, env, seed in itertools.product(args.script, args.env_ids, args.seeds)
    ]
    for job, other in itertools.combinations(jobs, 2):
        if job.name == other.name:
            raise InputError(f"two runs would be called {job.name}")
    for job in jobs:
        run = job.find_run()
        if run and total is not None and run.total != frame_count(total, "flags"):
            raise InputError(f"{run.path} has total_steps {run.total}, not {total}: give another --exp-name or --out")
    try:
        os.makedirs(os.path.join(args.out, "logs"), exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from None
    return jobs


def main(argv):
    args = parse(argv)
    jobs = plan(args)
    todo = [job for job in jobs if not ((run := job.find_run()) and run.finished)]
    sizes = {job: job.log.stat().st_size if job.log.exists() else 0 for job in todo}
    handles = dict(zip(todo, LAUNCHERS[args.launcher](todo, args), strict=True)) if todo else {}
    try:
        while True:
            over = {job: outcome(job, handle) for job, handle in handles.items()}
            states = dict.fromkeys(jobs, "done")
            for job, reason in over.items():
                running = job.log.exists() and job.log.stat().st_size > sizes[job]  # says the same on every engine
                unfinished = "running" if running else "queued"
                states[job] = ("done" if reason == "done" else "failed") if reason else unfinished
            table(jobs, states)
            if all(over.values()):
                break
            deadline = time.monotonic() + args.refresh
            while time.monotonic() < deadline and not all(handle.done() for handle in handles.values()):
                time.sleep(min(0.5, args.refresh))
    except KeyboardInterrupt:
        STOPPING.append(True)
        for handle in handles.values():
            if isinstance(handle, concurrent.futures.Future):  # what Slurm was given is left to run
                handle.cancel()
        raise
    failures = {job: reason for job, reason in over.items() if reason != "done"}
    for job, reason in failures.items():
        print(f"failed: {job.name}: {reason} (log: {job.log})", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"waiting until {len(CHILDREN)} runs have saved", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            stop_children(60)
        print("interrupted: the same command goes on from here (what Slurm was given is left to run)", file=sys.stderr)
        sys.exit(130)

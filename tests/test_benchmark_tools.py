"""The promises of run.py, plot.py and gate.py, kept with a fake training script (no torch), and of seen_objects.py."""

import csv
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))

import plot  # noqa: E402
import run  # noqa: E402

# Writes what a training script writes, 100 frames a line, and leaves one word in starts.txt for each start.
FAKE = """
import argparse, json, os, signal, sys, time
import yaml

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
parser = argparse.ArgumentParser()
for name in ("--env-id", "--exp-name", "--config", "--resume"):
    parser.add_argument(name)
parser.add_argument("--seed", type=int)
parser.add_argument("--total-steps", type=int, default=1000)
parser.add_argument("--sleep", type=float, default=0.01)
parser.add_argument("--fail-seed", type=int)
flags = parser.parse_args()
recipe = yaml.safe_load(open(flags.config)) if flags.config else {}
if flags.resume:
    folder = flags.resume
    args = yaml.safe_load(open(f"{folder}/config.yaml"))
    step = int(open(f"{folder}/checkpoint.pt").read())
else:
    folder = f"runs/{flags.env_id.replace('/', '-')}__{flags.exp_name}__{flags.seed}__{time.time_ns()}"
    args = {"env_id": flags.env_id, "exp_name": flags.exp_name, "seed": flags.seed, "total_steps": flags.total_steps}
    args |= {"sleep": flags.sleep, "fail_seed": flags.fail_seed, "num_classes": 32} | recipe
    os.makedirs(folder)
    open(f"{folder}/config.yaml", "w").write(yaml.safe_dump(args))
    step = 0
with open("starts.txt", "a") as file:
    file.write(f"{args['env_id']}:{args['seed']}:{'resume' if flags.resume else 'new'}:{step}\\n")
try:
    while step < args["total_steps"]:
        time.sleep(args["sleep"])
        step += 100
        if step == 300 and args["seed"] == args["fail_seed"]:
            raise ValueError("the loss is not finite")
        line = {"step": step, "charts/episodic_return": step / 10 + args["seed"]}
        open(f"{folder}/metrics.jsonl", "a").write(json.dumps(line) + "\\n")
        if step % 500 == 0:
            open(f"{folder}/checkpoint.pt", "w").write(str(step))
    open(f"{folder}/metrics.jsonl", "a").write(json.dumps({"step": step}) + "\\n")
except KeyboardInterrupt:
    open(f"{folder}/checkpoint.pt", "w").write(str(step))
    print("saved", step)
"""

# sbatch, srun, sacct and scontrol of a cluster with one node: an array's tasks start at once, a requeued one again.
SLURM = """
import os, re, subprocess, sys
here, name, words = os.path.dirname(os.path.abspath(sys.argv[0])), os.path.basename(sys.argv[0]), sys.argv[1:]

def start(task):
    env = {**os.environ, "SLURM_JOB_ID": f"77{task}", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    env |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    env |= {"SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}
    out = open(f"{here}/task_{task}.txt", "a")
    subprocess.Popen(["bash", f"{here}/job.sh"], env=env, stdout=out, stderr=out, start_new_session=True)

if name == "sbatch":
    text = open(words[-1]).read()
    open(f"{here}/job.sh", "w").write(text)
    for task in range(int(re.search(r"--array=0-(\\d+)%", text)[1]) + 1):
        start(task)
    print("Submitted batch job 77")
elif name == "srun":
    command = words[words.index("--error") + 2 :]
    open(f"{here}/pid_{os.environ['SLURM_ARRAY_TASK_ID']}", "w").write(str(os.getpid()))
    os.execvp(command[0], command)
elif name == "scontrol":
    start(words[-1].split("_")[1])
elif name == "sacct":
    print("JobID|State|NodeList")
"""


def call(tool, *words, cwd=None, env=None, timeout=50):
    command = [sys.executable, str(BENCHMARK / tool), *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
    )


def one_line_error(result, *words):
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "fake_script.py"
    path.write_text(FAKE)
    return path


def starts(out):
    path = Path(out, "starts.txt")
    return sorted(path.read_text().split()) if path.exists() else []


def make_run(root, env_id, seed, points, exp_name="dreamer_v2_atari", total=1000, lines=(), born=1700000000, **config):
    """A run folder with the given [(step, return)] as training returns, then `lines` as they are, then the line of a
    complete run if the returns reach `total`."""
    folder = Path(root, "runs", f"{env_id.replace('/', '-')}__{exp_name}__{seed}__{born}")
    folder.mkdir(parents=True)
    config = {"env_id": env_id, "exp_name": exp_name, "seed": seed, "total_steps": total, "num_classes": 32, **config}
    (folder / "config.yaml").write_text("# torch 2\n" + yaml.safe_dump(config))
    lines = [*(json.dumps({"step": step, "charts/episodic_return": value}) for step, value in points), *lines]
    lines += [json.dumps({"step": points[-1][0]})] if points and points[-1][0] >= total else []
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "checkpoint.pt").write_text(str(points[-1][0] // 500 * 500 if points else 0))
    return folder


def write_csv(path, rows):
    """rows of (version, task, script, seed, step, return, kind)"""
    path.write_text("# a comment\n" + "\n".join(",".join(map(str, row)) for row in [plot.COLUMNS, *rows]) + "\n")
    return path


def last_step(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


# RUN


def test_run_skips_what_is_done_resumes_what_was_cut_off_and_survives_a_failure(tmp_path, script):
    out = tmp_path / "out"
    make_run(out, "Done-v0", 1, [(500, 1.0), (1000, 2.0)], exp_name="fake_script")
    cut = make_run(out, "dmc/walker-walk", 1, [(500, 1.0), (700, 2.0)], exp_name="fake_script", sleep=0, fail_seed=None)
    make_run(out, "dmc/walker-walk", 1, [(900, 9.0)], exp_name="something_else")
    words = ["--script", script, "--env-ids", "Done-v0", "dmc/walker-walk", "--seeds", 1, 2, "--out", out]
    words += ["--workers", 2, "--refresh", 0.2, "--", "--fail-seed", "2", "--total-steps", "1000"]
    result = call("run.py", *words)
    assert result.returncode == 1
    assert starts(out) == ["Done-v0:2:new:0", "dmc/walker-walk:1:resume:500", "dmc/walker-walk:2:new:0"]
    assert last_step(cut) == 1000
    failed = result.stderr.strip().splitlines()
    assert len(failed) == 2 and all("exit code 1: ValueError: the loss is not finite" in line for line in failed)
    log = out / "logs" / "Done-v0__fake_script__2.log"
    assert str(log) in failed[0] and "Traceback" in log.read_text()
    table = result.stdout.strip().split("\n\n")[-1].splitlines()
    assert "0 queued, 0 running, 2 done, 2 failed" in table[0]
    cells = {tuple(line.split()[:2]): line.split()[3:] for line in table[2:]}
    assert cells["Done-v0", "1"] == ["done", "1,000", "/", "1,000", "2.0"]
    assert cells["dmc/walker-walk", "1"] == ["done", "1,000", "/", "1,000", "101.0"]
    assert cells["dmc/walker-walk", "2"] == ["failed", "200", "/", "1,000", "22.0"]


def test_run_has_nothing_to_do_the_second_time(tmp_path, script):
    words = ["--script", script, "--env-ids", "A-v0", "--seeds", 1, 2, "--out", tmp_path, "--refresh", 0.2]
    assert call("run.py", *words).returncode == 0
    assert len(starts(tmp_path)) == 2
    assert call("run.py", *words).returncode == 0
    assert len(starts(tmp_path)) == 2


def test_run_gives_the_recipe_and_the_flags_to_the_script(tmp_path, script):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("deter_size: 7\ntotal_steps: 2e2\n")
    words = ["--script", script, "--env-ids", "A-v0", "--config", recipe, "--exp-name", "small", "--out", tmp_path]
    assert call("run.py", *words, "--refresh", 0.2, "--", "--sleep", "0", cwd=tmp_path).returncode != 2
    config = yaml.safe_load(next((tmp_path / "runs").glob("*/config.yaml")).read_text())
    assert config["deter_size"] == 7 and config["sleep"] == 0 and config["exp_name"] == "small" and config["seed"] == 1


def test_run_goes_on_with_a_run_that_was_stopped_in_its_last_evaluation(tmp_path, script):
    folder = make_run(tmp_path, "A-v0", 1, [(500, 1.0), (1000, 2.0)], exp_name="fake_script", sleep=0, fail_seed=None)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    words = ["--script", script, "--env-ids", "A-v0", "--out", tmp_path, "--refresh", 0.2]
    assert call("run.py", *words).returncode == call("run.py", *words).returncode == 0
    assert starts(tmp_path) == ["A-v0:1:resume:1000"]


def test_run_uses_every_gpu_it_is_given(tmp_path, script):
    words = ["--script", str(script), "--env-ids", "A-v0", "--out", str(tmp_path)]
    for more, workers in (([], 1), (["--gpus", "0", "1"], 2), (["--gpus", "0", "--workers", "3"], 3)):
        args = run.parse([*words, *more])
        run.plan(args)
        assert args.workers == workers


def test_run_never_starts_a_run_that_another_process_is_running(tmp_path, script):
    log = tmp_path / "logs" / "A-v0__fake_script__1.log"
    log.parent.mkdir()
    with open(log, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        result = call("run.py", "--script", script, "--env-ids", "A-v0", "--out", tmp_path, "--refresh", 0.2)
    assert result.returncode == 1 and "locked" in result.stderr
    assert starts(tmp_path) == []


def test_interrupted_run_lets_its_children_save_and_goes_on_later(tmp_path, script):
    words = ["--script", script, "--env-ids", "A-v0", "--seeds", 1, 2, "--out", tmp_path, "--refresh", 0.2]
    words = [*map(str, words), "--", "--sleep", "0.1", "--total-steps", "4000"]
    tool = subprocess.Popen(
        [sys.executable, str(BENCHMARK / "run.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 20
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.05)
    tool.send_signal(signal.SIGTERM)
    _, stderr = tool.communicate(timeout=20)
    assert tool.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert starts(tmp_path) == ["A-v0:1:new:0"]  # the queued one never began
    saved = int(next(tmp_path.glob("runs/*/checkpoint.pt")).read_text())
    assert 100 <= saved < 4000
    assert call("run.py", *words).returncode == 0
    assert starts(tmp_path) == ["A-v0:1:new:0", f"A-v0:1:resume:{saved}", "A-v0:2:new:0"]


def test_run_that_ends_well_but_early_is_a_failure(tmp_path):
    script = tmp_path / "lazy.py"
    script.write_text("print('bye')")
    result = call("run.py", "--script", script, "--env-ids", "A-v0", "--out", tmp_path, "--refresh", 0.2)
    assert result.returncode == 1 and "exit code 0, but not complete: at 0 frames" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env-ids", "A-v0"], "--script"),
        (["--script", "none.py", "--env-ids", "A-v0"], "no such file: none.py"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--config", "none.yaml"], "no such file: none.yaml"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--config", "broken.yaml"], "no valid YAML"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--config", "list.yaml"], "mapping"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--seeds", "x"], "invalid int value"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--seeds", "1", "1"], "two runs would be called"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--workers", "0"], "must be positive"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--resources", "gpus"], "KEY=VALUE"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--", "--seed=3"], "--seed after --"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--", "--env_id", "B"], "--env-id after --"),
        (["--script", "SCRIPT", "--env-ids", "Old-v0", "--", "--total-steps", "2000"], "has total_steps 1000"),
        (["--script", "SCRIPT", "--env-ids", "A-v0", "--out", "list.yaml"], "--out"),
    ],
)
def test_run_bad_input_is_one_line(tmp_path, script, words, message):
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "list.yaml").write_text("- 1")
    make_run(tmp_path, "Old-v0", 1, [(1000, 1.0)], exp_name="fake_script")
    words = [str(script) if word == "SCRIPT" else word for word in words]
    one_line_error(call("run.py", *words, cwd=tmp_path), message)
    assert starts(tmp_path) == []


needs_submitit = pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="submitit is not installed")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")


def check_engine(tmp_path, script, *words, env=None):
    """The same list gives the same folders on every engine: one done, one resumed, one new, two failing."""
    out = tmp_path / "out"
    make_run(out, "A-v0", 1, [(1000, 1.0)], exp_name="fake_script")
    make_run(out, "B-v0", 1, [(500, 1.0), (600, 2.0)], exp_name="fake_script", sleep=0, fail_seed=None)
    words = ["--script", script, "--env-ids", "A-v0", "B-v0", "--seeds", 1, 2, "--out", out, *words]
    words += ["--workers", 2, "--refresh", 1, "--", "--fail-seed", "2"]
    result = call("run.py", *words, env=env)
    assert result.returncode == 1, result.stdout + result.stderr
    assert starts(out) == ["A-v0:2:new:0", "B-v0:1:resume:500", "B-v0:2:new:0"]
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("the loss is not finite" in line for line in failed)
    assert "2 done, 2 failed" in result.stdout
    return result


@needs_submitit
def test_submitit_on_this_machine(tmp_path, script):
    check_engine(tmp_path, script, "--launcher", "submitit-local", "--resources", "timeout_min=2")


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol"):
        (folder / name).write_text(f"#!{sys.executable}\n" + SLURM)
        (folder / name).chmod(0o755)
    return folder


@needs_submitit
def test_slurm_job_array(tmp_path, script, slurm):
    env = {"PATH": f"{slurm}:{os.environ['PATH']}"}
    check_engine(
        tmp_path, script, "--launcher", "slurm", "--resources", "slurm_partition=gpu", "gpus_per_node=1", env=env
    )
    job = (slurm / "job.sh").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus-per-node=1", "--time=1440"):
        assert line in job


@needs_submitit
def test_slurm_timeout_saves_requeues_and_resumes(tmp_path, script, slurm):
    words = ["--script", script, "--env-ids", "A-v0", "B-v0", "--out", tmp_path, "--launcher", "slurm", "--refresh", 1]
    words = [*map(str, words), "--workers", "2", "--", "--sleep", "0.2", "--total-steps", "4000"]
    tool = subprocess.Popen(
        [sys.executable, str(BENCHMARK / "run.py"), *words],
        env={**os.environ, "PATH": f"{slurm}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 30
    while not list(tmp_path.glob("runs/A-v0*/metrics.jsonl")) and tool.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    os.kill(int((slurm / "pid_0").read_text()), signal.SIGUSR2)
    output, _ = tool.communicate(timeout=40)
    assert tool.returncode == 0, output
    first, second, other = starts(tmp_path)
    assert first == "A-v0:1:new:0" and other == "B-v0:1:new:0"
    assert second.startswith("A-v0:1:resume:") and int(second.split(":")[-1]) >= 100
    attempts = (tmp_path / "logs" / "A-v0__fake_script__1.jsonl").read_text().splitlines()
    commands = [json.loads(line)["command"] for line in attempts]
    assert len(commands) == 2 and "--resume" not in commands[0] and "--resume" in commands[1]


@needs_submitit
def test_slurm_bad_input_is_one_line(tmp_path, script, slurm):
    words = ["--script", script, "--env-ids", "A-v0", "B-v0", "--out", tmp_path, "--launcher", "slurm"]
    one_line_error(call("run.py", *words, env={"PATH": "/usr/bin:/bin"}), "--launcher slurm", "srun")
    env = {"PATH": f"{slurm}:{os.environ['PATH']}"}
    one_line_error(call("run.py", *words, "--resources", "colour=blue", env=env), "--launcher slurm", "colour")


@needs_ray
def test_ray_on_a_local_cluster(tmp_path, script):
    check_engine(tmp_path, script, "--launcher", "ray")


@needs_ray
def test_ray_bad_input_is_one_line(tmp_path, script):
    words = ["--script", script, "--env-ids", "A-v0", "--out", tmp_path, "--launcher", "ray"]
    one_line_error(call("run.py", *words, "--ray-address", "127.0.0.1:1"), "--launcher ray", "refused")


# RUN FOLDERS AND CSV


@pytest.mark.parametrize(
    ("env_id", "task"),
    [
        ("dmc/walker-walk", "dmc_walker_walk"),
        ("dm_control/walker-walk-v0", "dmc_walker_walk"),
        ("dmc/ball_in_cup-catch", "dmc_cup_catch"),
        ("dmc/cartpole-swingup_sparse", "dmc_cartpole_swingup_sparse"),
        ("PongNoFrameskip-v4", "atari_pong"),
        ("ALE/Pong-v5", "atari_pong"),
        ("ale_py:ALE/Pong-v5", "atari_pong"),
        ("atari/pong", "atari_pong"),
        ("JamesbondNoFrameskip-v4", "atari_james_bond"),
        ("atari/james_bond", "atari_james_bond"),
        ("ALE/UpNDown-v5", "atari_up_n_down"),
        ("ALE/Qbert-v5", "atari_qbert"),
        ("atari/ms_pacman", "atari_ms_pacman"),
        ("Pendulum-v1", "Pendulum-v1"),
        ("Humanoid-v5", "Humanoid-v5"),
    ],
)
def test_task_names_are_those_of_the_published_scores(env_id, task):
    assert plot.task_name(env_id) == task


def test_every_published_task_has_an_environment_id():
    for _, task in plot.read_official():
        suite, _, name = task.partition("_")
        assert plot.task_name(f"{suite}/{name}" if suite == "atari" else f"dmc/{name.replace('_', '-', 1)}") == task


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"exp_name": "dreamer_v2_atari"}, ("v2", "dreamer_v2_atari")),
        ({"exp_name": "dreamer_v2_atari_paper"}, ("v2", "dreamer_v2_atari_paper")),
        ({"exp_name": "mine"}, ("v2", "dreamer_v2_atari-mine")),
        ({"exp_name": "mine", "actor_dist": "tanh_normal"}, ("v2", "dreamer_v2_continuous-mine")),
    ],
)
def test_script_and_version_of_a_run(tmp_path, config, expected):
    version, _, script, _, _ = plot.describe(make_run(tmp_path, "A-v0", 1, [(1, 1.0)], **config))
    assert (version, script) == expected


def test_what_a_killed_run_logged_beyond_its_checkpoint_is_dropped(tmp_path):
    points = [(100, 1.0), (200, 2.0), (300, 3.0), (200, 20.0), (300, 30.0)]
    folder = make_run(
        tmp_path, "A-v0", 1, points, lines=['{"step": 400, "charts/eval_return": 4.0}', '{"step": 500, "ch']
    )
    kept, last = plot.read_metrics(folder)
    assert kept == [(100, 1.0, "train"), (200, 20.0, "train"), (300, 30.0, "train"), (400, 4.0, "eval")]
    assert last == 400


def test_training_returns_are_averaged_over_bins_and_evaluations_are_not():
    points = [(4, 1.0, "train"), (10, 3.0, "train"), (10, 9.0, "eval"), (11, 5.0, "train"), (20, 8.0, "eval")]
    assert plot.thin(points, 10) == [(10, 2.0, "train"), (10, 9.0, "eval"), (11, 5.0, "train"), (20, 8.0, "eval")]
    assert plot.thin(points, 0) == sorted(points)


def test_export_says_how_the_runs_were_made(tmp_path, script):
    out, target = tmp_path / "out", tmp_path / "results" / "x.csv"
    words = ["--script", script, "--env-ids", "PongNoFrameskip-v4", "--seeds", 1, 2, "--out", out, "--refresh", 0.2]
    assert call("run.py", *words, "--", "--sleep", "0.02").returncode == 0
    assert call("plot.py", "export", out, "--out", target, "--bin", 500).returncode == 0
    rows = list(csv.DictReader(target.open()))
    assert list(rows[0]) == ["version", "task", "script", "seed", "step", "return", "kind"]
    # returns are step / 10 + seed, one every 100 frames: the means of 100..500 and 600..1000
    found = [(row["seed"], row["step"], float(row["return"]), row["kind"]) for row in rows]
    assert found == [
        ("1", "500", 31.0, "train"),
        ("1", "1000", 81.0, "train"),
        ("2", "500", 32.0, "train"),
        ("2", "1000", 82.0, "train"),
    ]
    assert {(row["version"], row["task"]) for row in rows} == {("v2", "atari_pong")}
    sidecar = json.loads(target.with_suffix(".json").read_text())
    run = sidecar["runs"][0]
    assert run["command"].startswith("python fake_script.py --env-id PongNoFrameskip-v4 --seed 1")
    assert run["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and "cores" in run["hardware"]
    assert 0.2 < run["wall_seconds"] < 20 and run["starts"] == 1 and run["frames"] == run["total_steps"] == 1000
    assert sidecar["common_config"]["total_steps"] == 1000 and run["config"] == {"seed": 1}


def test_what_a_run_left_that_began_anew_is_left_out(tmp_path):
    """Killed before its first checkpoint: run.py starts the run again, in a folder of its own."""
    early = [make_run(tmp_path, "ALE/Pong-v5", 1, points, born=born) for points, born in (([], 3), ([(300, 9.0)], 2))]
    for folder in early:
        (folder / "checkpoint.pt").unlink()
    (early[0] / "metrics.jsonl").unlink()
    make_run(tmp_path, "ALE/Pong-v5", 1, [(1000, 1.0)], born=1)
    for words in (["table"], ["export", "--out", tmp_path / "x.csv"]):
        result = call("plot.py", words[0], tmp_path, *words[1:])
        assert result.returncode == 0, result.stderr
        assert all(f"left out: {folder}" in result.stderr for folder in early)
    assert {row["step"] for row in csv.DictReader((tmp_path / "x.csv").open())} == {"1000"}
    make_run(tmp_path, "ALE/Pong-v5", 1, [(1000, 1.0)], born=4)
    result = call("plot.py", "export", tmp_path, "--out", tmp_path / "y.csv")
    assert result.returncode == 2 and "two runs of" in result.stderr and not (tmp_path / "y.csv").exists()


def test_seeds_with_other_settings_are_told(tmp_path):
    make_run(tmp_path, "ALE/Pong-v5", 1, [(1000, 1.0)], deter_size=600)
    make_run(tmp_path, "ALE/Pong-v5", 2, [(1000, 1.0)], deter_size=600, precision="float32")
    assert call("plot.py", "table", tmp_path).stderr == ""
    make_run(tmp_path, "ALE/Pong-v5", 3, [(1000, 1.0)], deter_size=200)
    told = "note: the runs of dreamer_v2_atari on atari_pong differ in deter_size\n"
    assert call("plot.py", "export", tmp_path, "--out", tmp_path / "x.csv").stderr == told
    assert call("plot.py", "table", tmp_path / "x.csv").stderr == told


def test_the_bins_of_a_short_run_are_a_hundredth_of_it(tmp_path):
    folder = make_run(
        tmp_path, "ALE/Pong-v5", 1, [(step, float(step)) for step in range(100, 60_001, 100)], total=60_000
    )
    assert call("plot.py", "export", folder, "--out", tmp_path / "x.csv").returncode == 0
    short, whole = (plot.last_scores(plot.load([path]), {})[0].seeds[1] for path in (tmp_path / "x.csv", folder))
    assert short == pytest.approx(whole, rel=1e-2)


def test_two_runs_of_one_seed_are_refused(tmp_path):
    for root in ("a", "b"):
        make_run(tmp_path / root, "ALE/Pong-v5", 1, [(1000, 1.0)])
    result = call("plot.py", "table", tmp_path / "a", tmp_path / "b")
    one_line_error(result, "two runs of dreamer_v2_atari on atari_pong with seed 1")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), plot.replacing(path) as name:
        Path(name).write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]


# SCORES


def test_score_is_the_mean_of_the_last_frames_that_all_seeds_reached():
    seeds = {
        1: (np.array([100.0, 960.0, 980.0, 1000.0]), np.array([0.0, 10.0, 20.0, 30.0])),
        2: (np.array([500.0, 1500.0]), np.array([0.0, 100.0])),  # nothing in (950, 1000]: between its neighbours
    }
    (entry,) = plot.scores_of(plot.Group("v2", "no_such_task", "s"), "train", seeds, {})
    assert entry.frames == 1000 and entry.seeds == {1: 20.0, 2: 50.0} and entry.verdict == "no reference"


def test_score_of_evaluations_is_the_mean_of_three_at_least():
    steps, returns = np.arange(100.0, 1001.0, 100.0), np.arange(10.0)
    assert plot.scores_of(plot.Group("v2", "t", "s"), "eval", {1: (steps, returns)}, {})[-1].seeds == {1: 8.0}
    steps = np.arange(10.0, 1001.0, 10.0)  # five in the last 5%
    assert plot.scores_of(plot.Group("v2", "t", "s"), "eval", {1: (steps, steps)}, {})[-1].seeds == {1: 980.0}


def test_a_seed_that_starts_after_the_others_end_is_refused():
    seeds = {1: (np.array([50.0, 60.0]), np.zeros(2)), 2: (np.array([100.0, 200.0]), np.ones(2))}
    with pytest.raises(run.InputError, match="ends at frame 60, before seed 2 has any return"):
        plot.scores_of(plot.Group("v2", "t", "s"), "eval", seeds, {})


def test_the_kind_of_the_official_curve_counts_only_where_every_seed_has_it():
    rows = [plot.Row("v2", "t", "s", seed, 10, 1.0, "train") for seed in (1, 2)]
    rows += [plot.Row("v2", "t", "s", 1, 10, 5.0, "eval")]
    group = plot.Group("v2", "t", "s")
    assert plot.by_group(rows)[group][0] == "train"
    both = [*rows, plot.Row("v2", "t", "s", 2, 10, 6.0, "eval")]
    assert plot.by_group(both)[group][0] == "eval"
    assert plot.by_group(rows, "eval")[group][1].keys() == {1}
    # V2's on the Control Suite are of training episodes, V1's of evaluations.
    for version, kind in (("v2", "train"), ("v1", "eval")):
        of_task = [row._replace(version=version, task="dmc_walker_walk") for row in both]
        assert [use for use, _ in plot.by_group(of_task).values()] == [kind]


def test_evaluations_that_are_few_in_the_frames_of_an_official_figure_are_not_taken_for_their_mean():
    for steps, kind in (([400_000, 800_000], "train"), (range(200_000, 1_000_001, 200_000), "eval")):
        rows = [plot.Row("v2", "atari_pong", "s", 1, step, 1.0, "eval") for step in steps]
        assert [use for use, _ in plot.by_group(rows).values()] == ["eval"], "there is nothing else"
        rows += [plot.Row("v2", "atari_pong", "s", 1, 1000, 1.0, "train")]
        assert [use for use, _ in plot.by_group(rows).values()] == [kind]


def test_the_official_figures_are_those_whose_frames_are_filled():
    curve = np.array([[5, 105, 205], [1, 5, 20], [1, 0, 10], [1, 10, 30]], float)
    assert plot.official_over(curve, 100, 150) == [((5.0, 105.0), (5.0, 0.0, 10.0))]
    assert plot.official_over(curve, 100, 900)[1:] == [((105.0, 205.0), (20.0, 10.0, 30.0))]
    assert len(plot.official_over(curve, 100, 100)) == 1, "the last episode ends before the run"
    assert plot.official_over(curve, 100, 99) == [], "the first is one evaluation, no mean over 100 frames"
    late = np.array([[970_000, 1_000_000], [5, 20], [0, 10], [10, 30]], float)
    assert [span for span, _ in plot.official_over(late, 30_000, 989_000)] == [(940_000, 970_000)]
    assert plot.official_over(None, 100, 900) == plot.official_over(curve, None, 900) == []


def test_official_figures_are_drawn_in_the_middle_of_their_frames():
    curve = np.array([[5, 105, 205], [1, 5, 20], [1, 0, 10], [1, 10, 30]], float)
    frames, mean, low, high = plot.official_curve(curve, 100, 105)
    assert frames.tolist() == [5, 55, 105]
    assert mean.tolist() == [1, 5, 12.5] and low.tolist() == [1, 0, 5] and high.tolist() == [1, 10, 20]
    assert plot.official_curve(curve, 100, 900)[0].tolist() == [5, 55, 155]
    assert not plot.official_curve(curve[:, 1:], 100, 50)[0].size


def test_ours_are_compared_by_the_mean_over_the_same_frames():
    steps = np.array([30_000.0, 30_001.0, 45_000.0, 60_000.0, 61_000.0])
    official = {("v2", "dmc_walker_walk"): np.array([[30_000, 60_000], [9, 2.5], [9, 1], [9, 3]], float)}
    seeds = {1: (steps, np.array([50.0, 1.0, 2.0, 3.0, 90.0])), 2: (steps, np.array([50.0, 3.0, 4.0, 5.0, 90.0]))}
    first, entry = plot.scores_of(plot.Group("v2", "dmc_walker_walk", "s"), "train", seeds, official)
    assert first.span == (0, 30_000) and first.there == {1: 50.0, 2: 50.0} and first.verdict == "above"
    assert entry.span == (30_000, 60_000) and entry.there == {1: 2.0, 2: 4.0} and entry.verdict == "inside"
    assert entry.frames == 61_000 and entry.seeds == {1: 46.5, 2: 47.5} and entry.official == (2.5, 1.0, 3.0)
    entry = plot.scores_of(plot.Group("v2", "dmc_walker_walk", "s"), "train", seeds, official, repeat=8)[-1]
    assert entry.there == {1: 2.0, 2: 4.0} and entry.verdict == "other action repeat"
    seeds[2] = np.array([60_500.0, 61_000.0]), np.ones(2)
    (entry,) = plot.scores_of(plot.Group("v2", "dmc_walker_walk", "s"), "train", seeds, official)
    assert entry.verdict == "no reference"


def test_human_normalised_score():
    # Pong: random -20.7, human 14.6, so -3.05 is half way. Breakout: random 1.7, human 30.5.
    scores = [
        plot.Score(
            *(plot.Group("v2", "atari_pong", "s"), "train", 10, {1: -3.05, 2: 14.6}, (0, 9)),
            *({1: -20.7, 2: -3.05}, (14.6, 0, 0), "inside"),
        ),
        *(
            plot.Score(plot.Group("v2", task, "s"), "train", 10, {1: 59.3}, None, {}, None, "no reference")
            for task in ("atari_breakout", "dmc_walker_walk")
        ),
    ]
    (_, pong, there, official), (_, breakout, *nothing) = plot.human_normalised(scores)
    assert pong == pytest.approx([0.5, 1.0]) and there == pytest.approx([0, 0.5]) and official == pytest.approx(1.0)
    assert breakout == pytest.approx([2.0]) and nothing == [[], None]


def rliable_missing():
    try:
        import rliable.library  # noqa: F401
    except Exception as error:  # noqa: BLE001 - with some pandas versions it is a TypeError
        return f"rliable does not import: {error}"


NO_RLIABLE = rliable_missing()


@pytest.mark.skipif(bool(NO_RLIABLE), reason=str(NO_RLIABLE))
def test_interquartile_mean_and_its_interval():
    matrix = np.arange(1.0, 9.0).reshape(4, 2)  # the middle half of 1..8 is 3, 4, 5, 6
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    point, low, high = plot.iqm(matrix)
    assert point == pytest.approx(4.5) and 1 <= low < 4.5 < high <= 8
    assert plot.iqm(matrix) == (point, low, high)
    assert np.random.rand() == expected  # the caller's random state is as it was


@pytest.mark.skipif(bool(NO_RLIABLE), reason=str(NO_RLIABLE))
def test_a_task_with_one_seed_leaves_the_interquartile_mean_of_the_others():
    rows = [(f"dmc_{task}", seed) for task in "abc" for seed in ((1,) if task == "c" else (1, 2, 3))]
    group = {task: plot.Group("v1", task, "s") for task, _ in rows}
    values = {task: {seed: 100.0 * seed for t, seed in rows if t == task} for task in group}
    scores = [plot.Score(group[task], "eval", 1000, values[task], None, {}, None, "-") for task in group]
    ((script, suite, tasks, seeds, mean, low, high),) = plot.aggregate(scores)
    assert (script, tasks, seeds) == ("s", "2 of 3", 3) and mean == pytest.approx(0.2)


@pytest.mark.skipif(not NO_RLIABLE, reason="rliable imports")
def test_without_rliable_the_error_is_one_line(tmp_path):
    runs = [make_run(tmp_path, "ALE/Pong-v5", seed, [(1000, 1.0)]) for seed in range(4)]
    one_line_error(call("plot.py", "table", *runs), "rliable", "requirements.txt")


# GATE

# Official DreamerV1, walker walk: seeds from 81.35 to 232.72 over the frames 5,001 to 105,000, then 406.76 to 592.08.
FILLED = 205_000


@pytest.mark.parametrize(
    ("value", "verdict", "code"),
    [(406.7, "under", 1), (406.8, "inside", 0), (592.0, "inside", 0), (592.1, "above", 0)],
)
def test_gate_over_the_same_frames(tmp_path, value, verdict, code):
    rows = [
        ("v1", "dmc_walker_walk", "dreamer_v1_continuous", seed, step, returned, "eval")
        for seed, offset in ((1, -50), (2, 50))
        for step, returned in (
            (105_000, 150.0),
            (155_000, value - 9),
            (FILLED, value + 9 + 2 * offset),
            (210_000, 999.0),
        )
    ]
    result = call("gate.py", write_csv(tmp_path / "x.csv", rows))
    assert result.returncode == code, result.stderr
    first, line = (line.split() for line in result.stdout.splitlines()[1:])
    assert first[4:8] == ["5,000", "to", "105,000", "150.0"] and first[-1] == "inside"
    assert line[2:7] == ["eval", "2", "105,000", "to", "205,000"]
    assert line[7:9] == [str(value), "406.8"] and line[10:] == ["592.1", verdict]


def test_gate_judges_finished_run_folders_only(tmp_path):
    # Official DreamerV2, Pong over the first 1,000,000 frames: seeds from -19.3 to -15.7.
    good = make_run(tmp_path, "PongNoFrameskip-v4", 1, [(990_000, -16.0), (1_000_000, -18.0)], total=1_000_000)
    make_run(tmp_path, "PongNoFrameskip-v4", 2, [(400_000, -21.0)], total=1_000_000)
    result = call("gate.py", tmp_path)
    assert result.returncode == 0 and result.stdout.splitlines()[1].split()[-5:] == [
        "-17.0",
        "-19.3",
        "-18.3",
        "-15.7",
        "inside",
    ]
    assert "at 400,000 of 1,000,000 frames" in result.stderr
    lines = {"step": 1_000_000, "charts/eval_return": -20.5}, {"step": 1_000_000}
    (good / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("gate.py", tmp_path).returncode == 1
    one_line_error(call("gate.py", tmp_path, "--unfinished", "--kind", "train"), "nothing to judge")


def test_gate_does_not_judge_another_action_repeat(tmp_path):
    run = make_run(tmp_path, "PongNoFrameskip-v4", 1, [(1_000_000, -21.0)], total=1_000_000, action_repeat=8)
    one_line_error(call("gate.py", run), "nothing to judge")


def test_gate_one_task_under_among_others_fails(tmp_path):
    rows = [
        ("v1", "dmc_walker_walk", "dreamer_v1_continuous", 1, FILLED, 500.0, "eval"),
        ("v2", "atari_pong", "dreamer_v2_atari", 1, 2_000_000, -20.9, "train"),
        ("v2", "CartPole-v1", "dreamer_v2_atari", 1, 2_000_000, 500.0, "train"),
    ]
    result = call("gate.py", write_csv(tmp_path / "x.csv", rows))
    assert result.returncode == 1
    verdicts = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines()[1:]}
    assert verdicts == {"dmc_walker_walk": "inside", "atari_pong": "under", "CartPole-v1": "reference"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns"),
        ("version,task\nv1,x\n", "expected the columns"),
        ("HEADER\nv1,dmc_walker_walk,s,1,abc,1.0,eval\n", "'abc' is not a number"),
        ("HEADER\nv1,dmc_walker_walk,s,1,100,nan,eval\n", "'nan' is not a number"),
        ("HEADER\nv1,dmc_walker_walk,s,1,100\n", "one cell a column"),
        ("HEADER\nv1,dmc_walker_walk,s,1,100,1.0,test\n", "neither eval nor train"),
        ("HEADER\nv1,dmc_walker_walk,s,1,100,1.0,eval\n", "nothing to judge"),
        ("HEADER\n", "nothing to judge"),
        ("\0\xff", "not a text file"),
    ],
)
def test_gate_bad_input_is_one_line(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_bytes(text.replace("HEADER", ",".join(plot.COLUMNS)).encode("latin1"))
    one_line_error(call("gate.py", path), message)


def test_gate_without_a_run_is_one_line(tmp_path):
    one_line_error(call("gate.py", tmp_path), "no run folder")
    one_line_error(call("gate.py", tmp_path / "none.csv"), "No such file")
    (tmp_path / "config.yaml").write_text("env_id: A\n")
    one_line_error(call("gate.py", tmp_path), "no seed")
    (tmp_path / "config.yaml").write_text("env_id: A\nseed: 1\ntotal_steps: many\n")
    one_line_error(call("gate.py", tmp_path), "'many'")
    (tmp_path / "config.yaml").write_text("env_id: A\nseed: []\ntotal_steps: 1\n")
    one_line_error(call("gate.py", tmp_path), "[] is not a number")


# FIGURES AND README


def synthetic_results(folder):
    """CSVs with sidecars, by way of run folders: two games and two DMC tasks, three seeds each."""
    rng, roots = np.random.default_rng(0), []
    for env_id, exp_name, low, high, total in (
        ("PongNoFrameskip-v4", "dreamer_v2_atari", -21, 18, 4_000_000),
        ("ALE/Breakout-v5", "dreamer_v2_atari", 1, 60, 4_000_000),
        ("dmc/walker-walk", "dreamer_v2_continuous", 30, 950, 1_000_000),
        ("dmc/ball_in_cup-catch", "dreamer_v2_continuous", 0, 900, 1_000_000),
    ):
        for seed in (1, 2, 3):
            steps = np.linspace(total / 200, total, 200).astype(int)
            curve = low + (high - low) / (1 + np.exp(-(steps / total - 0.4 - 0.05 * seed) * 12))
            noise = rng.normal(0, 0.04 * (high - low), len(steps))
            points = list(zip(steps.tolist(), np.clip(curve + noise, low, None).tolist(), strict=True))
            roots.append(make_run(folder / "raw", env_id, seed, points, exp_name=exp_name, total=total))
    for name, part in (("atari", roots[:6]), ("dmc", roots[6:])):
        words = ["export", *part, "--out", folder / "results" / f"{name}.csv", "--bin", 20_000]
        result = call(
            "plot.py", *words, "--commit", "abc123", "--hardware", "one NVIDIA X", "--command", f"make {name}"
        )
        assert result.returncode == 0, result.stderr
    return folder / "results"


def test_readme_round_trip(tmp_path):
    results, page = synthetic_results(tmp_path), tmp_path / "README.md"
    page.write_text("# Title\n<!-- results:begin -->\nold numbers\n<!-- results:end -->\nlast words\n")
    words = ["readme", "--results", results, "--readme", page, "--out", tmp_path / "figures"]
    words += ["--no-iqm"] if NO_RLIABLE else []
    assert call("plot.py", *words).returncode == 0
    text = page.read_text()
    assert text.startswith("# Title\n<!-- results:begin -->\n") and text.endswith("<!-- results:end -->\nlast words\n")
    assert "old numbers" not in text and ("interquartile" in text) == (not NO_RLIABLE)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    # The table's numbers are those of the CSV, taken by hand: the last 5% of four million frames.
    last = [
        float(row["return"])
        for row in csv.DictReader((results / "atari.csv").open())
        if row["task"] == "atari_pong" and int(row["step"]) > 3_800_000
    ]
    pong = next(line for line in lines if line[0] == "atari_pong" and line[3] == "3")
    assert pong[1:6] == ["dreamer_v2_atari", "4", "3", "train", "4,000,000"]
    assert float(pong[6].split()[0]) == pytest.approx(np.mean(last), abs=0.06)
    there = [
        np.mean(
            [
                float(row["return"])
                for row in csv.DictReader((results / "atari.csv").open())
                if (row["task"], row["seed"]) == ("atari_pong", seed) and 3_000_000 < int(row["step"]) <= 4_000_000
            ]
        )
        for seed in "123"
    ]
    assert pong[8:] == [
        "3,000,000 to 4,000,000", plot.spread(np.mean(there), min(there), max(there)), "7.3 (1.1 to 15.7)", "above",
    ]  # fmt: skip
    assert [line[2:] for line in lines if line[0] == "atari.csv"][0][1:] == ["one NVIDIA X", "abc123", "`make atari`"]
    names = ["curves_dreamer_v2_atari", "curves_dreamer_v2_continuous", "atari_human_normalised"]
    first = {}
    for name in names:
        path = tmp_path / "figures" / f"{name}.png"
        assert f"![{name}](figures/{name}.png)" in text
        first[name] = path.read_bytes()
        assert first[name].startswith(b"\x89PNG") and 10_000 < len(first[name]) < 400_000
    assert sorted(os.listdir(tmp_path / "figures")) == sorted(f"{name}.png" for name in names)
    assert call("plot.py", *words).returncode == 0
    assert page.read_text() == text  # the same results give the same page, and the same pictures
    assert all((tmp_path / "figures" / f"{name}.png").read_bytes() == first[name] for name in names)
    (results / "dmc.json").unlink()
    one_line_error(call("plot.py", *words), "no dmc.json beside it")
    assert page.read_text() == text


def test_mean_and_range_are_over_the_frames_that_all_seeds_reached():
    seeds = {
        1: (np.array([0.0, 100.0]), np.array([0.0, 100.0])),
        2: (np.array([0.0, 200.0]), np.array([20.0, 220.0])),
    }
    frames, mean, low, high = plot.mean_and_range(seeds, points=4)
    assert frames.tolist() == [0, 25, 50, 75, 100]
    assert low.tolist() == [0, 25, 50, 75, 100]
    assert high.tolist() == [20, 45, 70, 95, 120] and mean.tolist() == [10, 35, 60, 85, 110]


def test_what_one_seed_did_outside_the_common_frames_has_no_part_in_their_mean():
    seeds = {
        1: (np.array([50.0, 100.0]), np.array([1.0, 1.0])),
        2: (np.array([0.0, 40.0, 60.0, 90.0, 110.0, 150.0, 200.0]), np.array([9.0, 3.0, 3.0, 3.0, 3.0, 70.0, 90.0])),
    }
    frames, mean, low, high = plot.mean_and_range(seeds, points=5)
    assert frames.tolist() == [50, 60, 70, 80, 90, 100]
    assert set(low) == {1} and set(high) == {3} and set(mean) == {2}


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("no markers", "expected one <!-- results:begin -->"),
        ("<!-- results:end --> <!-- results:begin -->", "expected one <!-- results:begin -->"),
        (None, "No such file"),
    ],
)
def test_readme_bad_input_is_one_line(tmp_path, page, message):
    if page:
        (tmp_path / "README.md").write_text(page)
    write_csv(tmp_path / "x.csv", [("v2", "atari_pong", "s", 1, 10, 1.0, "train")])
    one_line_error(call("plot.py", "readme", "--results", tmp_path, "--readme", tmp_path / "README.md"), message)


def test_plot_bad_input_is_one_line(tmp_path):
    one_line_error(call("plot.py", "readme", "--results", tmp_path, "--readme", BENCHMARK / "README.md"), "")
    one_line_error(call("plot.py", "curves", "--results", tmp_path), "no results")
    one_line_error(call("plot.py", "export", tmp_path, "--out", tmp_path / "x.csv"), "no run folder")
    folder = make_run(tmp_path, "A-v0", 1, [])
    one_line_error(call("plot.py", "export", folder, "--out", tmp_path / "x.csv"), "no returns")
    one_line_error(call("plot.py", "export", folder, "--out", tmp_path / "x.txt"), ".csv")
    one_line_error(call("plot.py", "paint"), "paint")


def test_random_policy_is_measured_and_merged(tmp_path):
    pytest.importorskip("gymnasium")
    path = tmp_path / "random_scores.csv"
    known = "CartPole-v1,2,1.0,0.0,1\ndmc/walker-walk,2,44.0,9.0,10\n"
    path.write_text("env_id,action_repeat,mean,std,episodes\n" + known)
    words = ["random", "--env-ids", "CartPole-v1", "--episodes", "40", "--out", path]
    assert call("plot.py", *words).returncode == 0
    rows = {row["env_id"]: row for row in plot.read_csv(path, ["env_id", "mean", "episodes"])}
    assert 15 < float(rows["CartPole-v1"]["mean"]) < 32 and rows["CartPole-v1"]["episodes"] == "40"
    assert rows["dmc/walker-walk"]["mean"] == "44.0"
    text = path.read_text()
    assert call("plot.py", *words).returncode == 0 and path.read_text() == text
    one_line_error(call("plot.py", "random", "--env-ids", "No-v0", "--out", path), "No")
    assert call("plot.py", *words, "--action-repeat", "8").returncode == 0
    floors = plot.read_floors(path)
    assert floors["dmc_walker_walk", 2] == 44.0 and floors["atari_pong", 4] == -20.7
    assert floors["CartPole-v1", 2] == float(rows["CartPole-v1"]["mean"]) > 1.2 * floors["CartPole-v1", 8]
    config = {"common_config": {"action_repeat": 8}, "runs": [{"task": "CartPole-v1", "script": "s", "config": {}}]}
    (tmp_path / "x.json").write_text(json.dumps(config))
    repeats = plot.read_repeats([tmp_path / "x.csv"])
    group = plot.Group("v2", "CartPole-v1", "s")
    assert plot.floor_of(group, floors, repeats) == (8, floors["CartPole-v1", 8])
    assert plot.floor_of(group, floors, {}) == (2, floors["CartPole-v1", 2])
    assert plot.floor_of(group._replace(task="atari_pong"), floors, {("atari_pong", "s"): 8}) == (8, None)


def test_objects_of_pong_are_told_apart(tmp_path):
    import seen_objects

    args = seen_objects.dreamer.Args(num_envs=2)
    replay, _, _ = seen_objects.play(args, tmp_path, 300, np.random.default_rng(1))
    image = seen_objects.dreamer.pixels_to_float(replay.sample(np.random.default_rng(1), 16, 8).image.flatten(0, 1))
    ones = dict.fromkeys(seen_objects.OBJECTS, pytest.approx(1, abs=1e-4))
    assert seen_objects.shares(image, image) == {"shown": pytest.approx(1, abs=1e-4)} | ones
    assert set(seen_objects.shares(image, image.mean(0, keepdim=True)).values()) == {0.0}
    without = image.clone()
    rows, columns = seen_objects.OBJECTS["own paddle"]
    without[..., rows, columns] = 0
    found = seen_objects.shares(image, without)
    assert 0.5 < found.pop("shown") < 0.95 and found == ones | {"own paddle": 0.0}


def test_rewards_are_found_and_told_apart(tmp_path, monkeypatch):
    import imagined_rewards

    reward, is_first = np.zeros((100, 2)), np.zeros((100, 2), bool)
    reward[50, 0], reward[30, 1], reward[33, 1], reward[70, 1], is_first[73, 1] = -1, 1, 1, 1, True
    reward[5, 0], reward[97, 0], reward[85, 1] = 1, 1, 5  # near the edges, where no step is taken, and after a reset
    found = imagined_rewards.spans(reward, is_first, 10, 4)
    assert found["negative"].tolist() == [[50, 0]] and found["positive"].tolist() == [[85, 1]]
    zeros = {(t, 0) for t in (*range(16, 46), *range(61, 93))} | {(t, 1) for t in (*range(10, 26), *range(44, 66))}
    assert set(map(tuple, found["zero"].tolist())) == zeros
    assert imagined_rewards.told_apart(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == 0.875

    args = imagined_rewards.dreamer.Args(cnn_depth=2, units=8, deter_size=8, stoch_size=2, num_classes=2)
    model = imagined_rewards.dreamer.Dreamer(args, 1, 3).world_model
    monkeypatch.setattr(model.reward, "mean", lambda feat: feat.new_ones(feat.shape[:-1]))
    steps = np.zeros((60, 2), [("image", "u1", (1, 64, 64)), ("action", "f4", (3,)), ("reward", "f4")])
    steps["reward"][50, 1] = -1
    true, seen, imagined = imagined_rewards.predict(model, steps, np.array([[40, 0], [50, 1]]), 3)
    assert true.tolist() == [0, np.tanh(np.float32(-1))] and seen.tolist() == [1, 1]
    assert imagined.tolist() == [3 + imagined_rewards.AFTER] * 2
    one_line_error(call("imagined_rewards.py", tmp_path), "checkpoint")


@pytest.mark.parametrize(("collect", "updates"), [(1000, 100), (10, 1)])
def test_the_loops_rate_counts_whole_phases(collect, updates, monkeypatch):
    """A loop on a clock of its own: 0.01 s a frame and 1 s an update, in bursts or one by one."""
    import throughput

    import dreamer_v2_atari

    now = [0.0]

    class Learner:
        def __call__(self, batch):
            now[0] += 1

    def main(args):
        learner, due = script.Learner(), args.seed_steps
        for frame in range(0, args.total_steps, 2):
            if frame >= due:
                for _ in range(args.pretrain if due == args.seed_steps else updates):
                    learner(None)
                due += collect
            now[0] += 0.02

    script = types.SimpleNamespace(__name__="script", Learner=Learner, main=main)
    args = dreamer_v2_atari.Args(action_repeat=2, seed_steps=100, collect_steps=collect, update_steps=updates)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    rate = throughput.time_loop(script, args, None)["loop_frames_per_second"]
    assert rate == pytest.approx(collect / (updates + 0.01 * collect))


@pytest.mark.parametrize("name", ["dreamer_v2_atari", "dreamer_v2_continuous"])
def test_the_loop_of_a_script_runs_with_the_official_agent_in_it(name, tmp_path, monkeypatch):
    import official_agent

    from tests.running import load, read_metrics, small, train

    script, asked = load(name), []
    for patched in ("Learner", "fast_policy", "open_loop", "diagnose", "save_checkpoint"):
        monkeypatch.setattr(script, patched, getattr(script, patched))  # taken back after the test
    paper = {"reward_head": "mse", "obs_embed_size": 0, "act": "elu", "layer_norm": False}

    def ask(request):
        request = official_agent.unpack(official_agent.pack(request))
        asked.append(request)
        if "mode" in request:
            n = len(request["image"])
            action = np.eye(5, dtype="f4")[np.zeros(n, int)] if name.endswith("atari") else np.zeros((n, 2), "f4")
            return {"action": action}
        return dict.fromkeys(official_agent.METRICS, np.float32(len(asked)))

    official_agent.put_in(script, ask)
    folder = train(script, tmp_path, small(script, **paper, eval_every=200, num_envs=2))
    modes = [str(request.get("mode")) for request in asked]
    updates, evaluated = modes.count("None"), modes.count("eval")
    assert updates == 1 + (300 - 60) // 20 - 1 and evaluated, "the schedule is the script's"
    assert modes.index("train") == 0 and modes.index("None") == 1, "acting comes first, as in the loop"
    batch = asked[1]
    assert batch["image"].shape == (8, 4, 3, 64, 64) and batch["is_first"][0].all()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "charts/eval_return" in row] == [200, 300]
    logged = [row["losses/image"] for row in rows if "losses/image" in row]
    assert logged and logged == sorted(set(logged)), "what the official code answered"
    assert not (folder / "checkpoint.pt").exists(), "our own weights, which are not trained"


def test_the_flags_become_settings_of_the_official_code():
    import official_agent

    import dreamer_v2_atari
    import dreamer_v2_continuous

    configs = BENCHMARK / "configs"
    atari = official_agent.official_settings(dreamer_v2_atari.load_config(configs / "v2_atari_paper.yaml"), True)
    dmc = official_agent.official_settings(dreamer_v2_continuous.load_config(configs / "v2_dmc_paper.yaml"), False)
    # The two configurations of the official code's configs.yaml.
    assert atari["rssm"] == {"act": "elu", "norm": "none", "hidden": 600, "deter": 600, "stoch": 32}
    assert [atari[f"{part}_opt"]["lr"] for part in ("model", "actor", "critic")] == [2e-4, 4e-5, 1e-4]
    assert atari["loss_scales"] == {"kl": 0.1, "discount": 5.0} and atari["clip_rewards"] == "tanh"
    assert atari["actor.dist"] == "onehot" and atari["actor_grad"] == "reinforce" and atari["discount"] == 0.999
    assert [dmc[f"{part}_opt"]["lr"] for part in ("model", "actor", "critic")] == [3e-4, 8e-5, 8e-5]
    assert dmc["grad_heads"] == ["decoder", "reward"] and dmc["kl"] == {"free": 1.0, "balance": 0.8}
    assert dmc["actor.dist"] == "trunc_normal" and dmc["actor_ent"] == 1e-4 and dmc["critic"]["layers"] == 4
    with pytest.raises(run.InputError, match="--reward-head mse"):
        official_agent.official_settings(dreamer_v2_atari.Args(), True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["throughput.py", "--parts", "nonsense"], ["--parts", "nonsense"]),
        (["throughput.py", "--modes", "fast"], ["--modes", "fast"]),
        (["throughput.py", "--num-envs", "0"], ["--num-envs", "'0'"]),
        (["throughput.py", "--out", "/proc/nowhere/x.json"], ["/proc/nowhere/x.json"]),
        (["compare.py", "--rounds", "0"], ["--rounds", "'0'"]),
        (["compare.py", "--cases", "V3"], ["--cases", "'V3'"]),
        (["throughput.py", "--parts", "loop", "--loop-frames", "5"], ["--loop-frames 5"]),
        (["kill_storm.py", "--script", "nope.py"], ["--script", "nope.py"]),
        (["kill_storm.py", "--total-steps", "0"], ["--total-steps", "'0'"]),
        (["seen_objects.py", "--contrast", "nan"], ["--contrast"]),
        (["seen_objects.py", "--", "--env-id", "BoxingNoFrameskip-v4"], ["BoxingNoFrameskip-v4"]),
        (["plot.py", "random", "--env-ids", "nomodule:Foo-v0", "--out", "no.csv"], ["nomodule"]),
        (["gifs.py", "nope.py", "."], ["script", "nope.py"]),
        (["gifs.py", "dreamer_v2_atari.py", "nope"], ["nope"]),
        (["official_world_model.py", "--updates", "0"], ["--updates 0"]),
        (["official_world_model.py", "--seed", "-1"], ["--seed", "'-1'"]),
        (["official_vectors.py"], ["--out"]),
        (["official_agent.py"], ["--script"]),
        (["official_agent.py", "--script", "dreamer_v2_atari.py"], ["--reward-head mse"]),
        (["official_agent.py", "--script", "dreamer_v2_atari.py", "--", "--no-such-flag"], ["--no-such-flag"]),
        (["long_run.py", "--pid", "1", "--run-dir", "nope", "--out", "x.csv"], ["--run-dir nope"]),
    ],
)
def test_bad_input_of_the_other_tools_is_one_line(words, told):
    one_line_error(call(*words), *told)


def test_long_run_does_not_write_over_the_samples_of_another(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    old = tmp_path / "old.csv"
    old.write_text("hours\n1.0\n")
    one_line_error(call("long_run.py", "--pid", "1", "--run-dir", str(tmp_path), "--out", str(old)), "old.csv")
    assert old.read_text() == "hours\n1.0\n"


def test_a_result_that_cannot_take_its_place_is_one_line_and_leaves_no_other_file(tmp_path):
    with pytest.raises(run.InputError, match="folder"):
        (tmp_path / "folder").mkdir()
        run.write(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

"""Promises about a run: what its folder holds, that a seed repeats it, that no kill, full disk or faulty environment
loses it, and what can be done with it afterwards."""

import builtins
import contextlib
import errno
import fcntl
import io
import itertools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.running import (
    ROOT,
    SCRIPTS,
    SMALL,
    as_flags,
    contents,
    env_id,
    is_discrete,
    load,
    read_metrics,
    small,
    small_args,
    start,
    strict_json,
    train,
    without_clock,
)

pytestmark = pytest.mark.timeout(300)

EPISODE = {"charts/episodic_return", "charts/episodic_length"}
UPDATE = {"charts/SPS", "charts/updates_per_second", "losses/image", "losses/reward", "losses/kl", "losses/model"}
UPDATE |= {"losses/actor", "losses/value", "grad_norm/model", "grad_norm/actor", "grad_norm/value", "actor/entropy"}
UPDATE |= {"latents/prior_entropy", "latents/post_entropy"}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return load(request.param)


@pytest.fixture(autouse=True)
def hangup_is_not_ignored():
    """Where the tests run under nohup, the scripts that they start would ignore it, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The folder of a run with evaluations and videos, which the tests only read."""
    folder = tmp_path_factory.mktemp(script.__name__)
    return train(script, folder, small(script, eval_every=150, eval_episodes=2, capture_video=True))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


def stored_rows(script, run_dir):
    """The rows up to the last checkpoint, of a run that has not filled its replay."""
    count, rows = (
        script.load_checkpoint(run_dir)["replay_rows"],
        np.load(run_dir / "replay" / "steps.npy", mmap_mode="r"),
    )
    assert count <= len(rows)
    return np.array(rows[:count])


# THE RUN FOLDER


def test_the_folder_is_named_by_environment_experiment_seed_and_time_and_holds_what_is_documented(script, finished):
    environment, experiment, seed, when = finished.name.split("__")
    assert environment.endswith("DotSteerDiscrete-v0" if is_discrete(script) else "DotSteer-v0")
    assert (experiment, seed) == (script.__name__, "1") and abs(int(when) - time.time()) < 3600
    names = sorted(path.name for path in finished.iterdir())
    events = [name for name in names if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert names == sorted([*events, "checkpoint.pt", "config.yaml", "metrics.jsonl", "replay", "videos"])
    assert [path.name for path in (finished / "replay").iterdir()] == ["steps.npy"]


def test_config_yaml_loads_back_and_flags_beside_it_win(script, finished):
    path = str(finished / "config.yaml")
    args = vars(script.parse_args(["--config", path]))
    trained_with = vars(script.parse_args(small(script, eval_every=150, eval_episodes=2, capture_video=True)))
    assert args | {"config": ""} == trained_with
    assert script.parse_args(["--config", path, "--units", "9"]).units == 9


def test_config_refuses_unknown_keys_and_reads_numbers_as_people_write_them(script, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_learning_rate: 1e-4\ntotal_steps: 1e6\nunits: 64\ntd_lambda: 1\n")
    args = script.parse_args(["--config", str(path)])
    assert (args.model_learning_rate, args.total_steps, args.units, args.td_lambda) == (1e-4, 1_000_000, 64, 1.0)
    assert [type(value) for value in (args.model_learning_rate, args.total_steps)] == [float, int]
    path.write_text("unitss: 64\n")
    with pytest.raises(script.UserError, match="unitss"):
        script.parse_args(["--config", str(path)])


def test_metrics_jsonl_is_json_with_steps_and_the_documented_names(script, finished):
    metrics = read_metrics(finished)
    steps = [line["step"] for line in metrics]
    assert steps == sorted(steps) and steps[-1] == 300
    named = [set(line) - {"step"} for line in metrics]
    assert all(isinstance(value, (int, float)) for line in metrics for value in line.values())
    assert sum(names == EPISODE for names in named) == 11, "300 frames are 11 episodes of 13 agent steps"
    updates = [line for line, names in zip(metrics, named, strict=True) if names >= UPDATE]
    assert len(updates) == 7, "one each 40 frames, from the seed frames on"
    assert all(("losses/discount" in line) == script.Args().pred_discount for line in updates)
    assert [line["step"] for line in metrics if "charts/eval_return" in line] == [150, 300]


@pytest.mark.parametrize(
    ("changes", "updates"),
    [
        ({"pretrain": 3}, 3 + 16),  # phases at 60, 80, ... 380 frames
        ({"pretrain": 0}, 1 + 16),
        ({"pretrain": 0, "update_steps": 2}, 2 + 16 * 2),
        ({"pretrain": 3, "train_seq_len": 40}, 3 + 16),  # the first phase waits for a whole sequence, to frame 78
        ({"pretrain": 3, "train_seq_len": 80}, 3 + 12),  # to frame 158: what was missed is not made up for
        ({"action_repeat": 8, "collect_steps": 2}, 1 + (392 - 64) // 2),  # four phases pass in each step
        ({"action_repeat": 8, "collect_steps": 12}, 1 + (392 - 60) // 12),
    ],
)
def test_there_are_as_many_updates_as_frames_passed_since_the_pretraining(script, changes, updates, tmp_path):
    sizes = {"total_steps": 400, "seed_steps": 60, "collect_steps": 20, "batch_size": 2, "checkpoint_interval": 400}
    run_dir = train(script, tmp_path, small(script, **sizes | changes))
    assert script.load_checkpoint(run_dir)["learner"]["updates"] == updates


def test_metrics_jsonl_stays_json_when_a_value_is_not_finite(script, tmp_path):
    logger = script.Logger(tmp_path, small_args(script), 0, 0)
    logger.scalars(1, {"losses/model": float("nan"), "losses/image": float("inf"), "losses/kl": 1.0})
    assert strict_json((tmp_path / "metrics.jsonl").read_text())["losses/kl"] == 1.0


def test_no_update_is_logged_twice(script, tmp_path):
    run_dir = train(script, tmp_path, small(script, scalar_freq=2, collect_steps=50, total_steps=200))
    updates = [line["charts/updates"] for line in read_metrics(run_dir) if "charts/updates" in line]
    assert updates == [1, 2, 3, 3], "but at the run's end"


def test_nothing_is_logged_at_the_frame_of_a_checkpoint_after_it(script, tmp_path, monkeypatch):
    """A kill would leave it in TensorBoard, which forgets later frames only, and not in metrics.jsonl."""
    happened = []
    scalars, save = script.Logger.scalars, script.save_checkpoint
    logged = lambda *a: (happened.extend([("log", a[1])] if a[2] else []), scalars(*a))  # noqa: E731
    monkeypatch.setattr(script.Logger, "scalars", logged)
    counted = lambda path, state: (happened.append(("save", state["counters"]["frames"])), save(path, state))  # noqa: E731
    monkeypatch.setattr(script, "save_checkpoint", counted)
    train(script, tmp_path, small(script, checkpoint_interval=26, seed_steps=26, scalar_freq=20))
    saved = -1
    for kind, frame in happened:
        saved = frame if kind == "save" else saved
        assert kind == "save" or frame > saved
    assert [kind for kind, _ in happened].count("save") > 8


def test_track_without_a_login_is_one_line(script, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", failing_once(wandb.init, wandb.errors.UsageError("no API key configured")))
    with pytest.raises(script.UserError, match="--track.*no API key configured.*wandb login"):
        train(script, tmp_path, small(script, track=True))
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_has_its_name_in_wandb_also_when_resumed_from_within_its_folder(script, tmp_path, monkeypatch):
    named = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: named.append(settings)))
    monkeypatch.chdir(tmp_path)
    script.Logger(Path("."), small_args(script, track=True), 0, 0).close()
    assert named[0]["name"] == named[0]["id"] == tmp_path.name


def test_tensorboard_shows_the_same_scalars(finished):
    assert_tensorboard_agrees(finished)


def assert_tensorboard_agrees(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    shown = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    logged = {(key, line["step"]): value for line in read_metrics(run_dir) for key, value in line.items()}
    logged = {key: value for key, value in logged.items() if key[0] != "step"}
    assert shown.keys() == logged.keys()
    assert all(shown[key] == pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in logged.items())


def test_tensorboard_shows_the_open_loop_video_in_three_rows(finished):
    events = EventAccumulator(str(finished), size_guidance={"images": 0})
    events.Reload()
    videos = events.Images("open_loop")
    assert [event.step for event in videos] == [150, 300]
    for event in videos:
        video = Image.open(io.BytesIO(event.encoded_image_string))
        assert video.format == "GIF" and video.size == (event.width, event.height)
        assert video.height == 3 * 64 and video.width % 64 == 0
        assert video.n_frames == 8, "as long as a training sequence"
        for i in range(video.n_frames):
            video.seek(i)
            assert np.asarray(video.convert("RGB"))[:64].std() > 5, "the row of true frames is not blank"


def test_the_open_loop_error_ends_where_the_next_episode_begins(script):
    """Nothing foretells what follows a reset, so it says nothing about the model."""
    args = small_args(script)
    rng, agent = np.random.default_rng(0), script.Dreamer(args, 3, 3)
    shape = (args.train_seq_len, 2)
    image = torch.from_numpy(rng.integers(0, 256, (*shape, 3, 64, 64), np.uint8))
    is_first, no = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    is_first[7] = True

    def errors(image):
        torch.manual_seed(0)
        return script.open_loop(agent, script.Batch(image, torch.zeros(*shape, 3), no, is_first, no.bool()))[1:]

    after, before = image.clone(), image.clone()
    after[7], before[6] = 255 - after[7], 255 - before[6]
    assert errors(image) == errors(after)
    assert errors(image)[0] != errors(before)[0] > 0


def test_capture_video_saves_the_first_episode_of_each_evaluation(finished):
    paths = sorted((finished / "videos").iterdir())
    assert [path.name for path in paths] == ["eval_150.gif", "eval_300.gif"]
    for path in paths:
        with Image.open(path) as video:
            assert video.size == (64, 64)
            assert video.n_frames > 1


def test_the_checkpoint_needs_no_pickle(finished):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert {"agent", "learner", "counters", "replay_rows", "numpy_rng", "torch_rng"} <= state.keys()


@pytest.mark.timeout(300)
def test_track_logs_to_wandb(script, tmp_path):
    flags = small(script, total_steps=100, seed_steps=40, eval_every=100, track=True, wandb_project_name="promises")
    environ = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    with started(script, tmp_path, flags, env=environ) as process:
        _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    (record,) = tmp_path.glob("runs/*/wandb/offline-run-*/run-*.wandb")
    assert b"losses/image" in record.read_bytes() and b"charts/episodic_return" in record.read_bytes()


# ONE SEED, ONE RUN


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_seed_gives_the_same_run_number_for_number(script, num_envs, tmp_path):
    runs = []
    for i, seed in enumerate([1, 1] if num_envs == 2 else [1, 1, 2]):
        folder = tmp_path / str(i)
        folder.mkdir()
        flags = small(script, seed=seed, num_envs=num_envs, total_steps=200, eval_every=200)
        run_dir = train(script, folder, flags)
        weights = script.load_checkpoint(run_dir)["agent"]
        runs.append((without_clock(read_metrics(run_dir)), stored_rows(script, run_dir).tobytes(), weights))
    (metrics, rows, weights), (metrics_again, rows_again, weights_again), *others = runs
    assert metrics == metrics_again and len(metrics) > 5
    assert rows == rows_again
    assert all((weights[name] == weights_again[name]).all() for name in weights)
    for other_metrics, other_rows, _ in others:
        assert other_metrics != metrics and other_rows != rows


# STOPPED, KILLED, RESUMED


@contextlib.contextmanager
def started(*args, **kwargs):
    """A script in a process group of its own; nothing of it is left afterwards."""
    process = start(*args, **kwargs)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_progress(script, process, folder, frames, timeout=200):
    """Until a checkpoint of more than `frames` frames lies on disk."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        for path in folder.glob("runs/*/checkpoint.pt"):
            if script.load_checkpoint(path.parent)["counters"]["frames"] > frames:
                return
        time.sleep(0.1)
    raise AssertionError("the run made no checkpoint")


def assert_group_is_gone(process, timeout=10):
    """No worker of the script is left, shortly after its end."""
    process.wait(timeout)
    deadline = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        raise AssertionError("a worker is still there")


@pytest.mark.timeout(600)
def test_a_run_killed_at_any_moment_resumes_from_its_last_checkpoint(script, tmp_path):
    """20 kills at random moments, then a resume to the end. Never below the last checkpoint's counters, each
    transition up to it still there bit for bit, no torn or repeated line of metrics."""
    rng = random.Random(0)
    sizes = {"checkpoint_interval": 26, "seed_steps": 26, "scalar_freq": 20, "replay_capacity": 20_000}
    flags = small(script, total_steps=1_000_000, **sizes)
    frames, rows, run_dir = 0, None, None
    for round in range(21):
        if run_dir:
            last = round == 20
            flags = ["--resume", str(run_dir)] + as_flags({"total_steps": frames + 100} if last else {})
        with started(script, tmp_path, flags) as process:
            if round < 20:
                wait_for_progress(script, process, tmp_path, frames)
                time.sleep(rng.uniform(0, 0.5))
            else:
                _, errors = process.communicate(timeout=120)
                assert process.returncode == 0, errors
        (run_dir,) = tmp_path.glob("runs/*")
        checkpoint = script.load_checkpoint(run_dir)
        assert checkpoint["counters"]["frames"] > frames
        assert checkpoint["learner"]["updates"] > 0 or not round  # the first checkpoint comes before any
        frames, stored = checkpoint["counters"]["frames"], stored_rows(script, run_dir)
        if rows is not None:
            assert len(stored) > len(rows)
            kept = stored[: len(rows)]
            assert kept[:-1].tobytes() == rows[:-1].tobytes()
            for name in ("image", "action", "reward", "is_first", "is_terminal"):
                assert (kept[name][-1] == rows[name][-1]).all()
            assert kept["is_last"][-1].all() and stored["is_first"][len(rows)].all(), "a resumed run starts an episode"
        rows = stored
    metrics = read_metrics(run_dir)
    assert_tensorboard_agrees(run_dir)
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)
    updates = [line["charts/updates"] for line in metrics if "charts/updates" in line]
    assert all(before <= after for before, after in itertools.pairwise(updates))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))


def test_a_resumed_learner_goes_on_exactly_as_the_live_one(script, tmp_path, monkeypatch):
    """Five more updates on the same replay, by the objects of a run that has just saved and by those restored from its
    checkpoint, end in the same weights."""
    live = {}
    for name in ("Learner", "Replay"):
        cls = getattr(script, name)

        def keep(*args, cls=cls, name=name):
            live[name] = cls(*args)
            return live[name]

        monkeypatch.setattr(script, name, keep)
    run_dir = train(script, tmp_path, small(script))
    monkeypatch.undo()

    checkpoint = script.load_checkpoint(run_dir)
    assert (torch.get_rng_state() == checkpoint["torch_rng"]).all()
    cpu, agent = torch.device("cpu"), script.Dreamer.from_pretrained(run_dir)
    fresh = script.Learner(agent, agent.args, cpu)
    fresh.load_state_dict(checkpoint["learner"])
    old = live["Replay"]
    shape, slack = old.fields["image"].shape, old.rows - old.capacity
    restored = script.Replay(run_dir / "replay", old.capacity, slack, 1, shape, agent.action_size, cpu)
    restored.restore(checkpoint["replay_rows"])
    weights = []
    for learner, replay in ((live["Learner"], old), (fresh, restored)):
        rng = np.random.default_rng()
        rng.bit_generator.state = checkpoint["numpy_rng"]
        torch.set_rng_state(checkpoint["torch_rng"])
        for _ in range(5):
            learner(replay.sample(rng, 4, 8))
        weights.append(learner.agent.state_dict())
        assert learner.updates == checkpoint["learner"]["updates"] + 5
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], checkpoint["agent"][name]) for name in weights[0])


def test_resume_keeps_the_flags_and_takes_new_ones(script, copy, tmp_path):
    *before, complete = read_metrics(copy)
    assert complete == {"step": 300}
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360"])
    checkpoint, metrics = script.load_checkpoint(copy), read_metrics(copy)
    assert checkpoint["counters"]["frames"] == 360
    assert metrics[: len(before)] == before and metrics[-1]["step"] == 360
    assert_tensorboard_agrees(copy)
    assert script.load_config(copy / "config.yaml").total_steps == 360
    assert [path.name for path in tmp_path.glob("runs/*")] == [copy.name], "no second folder"


def test_a_resume_that_fails_leaves_the_flags_as_they_were(script, copy, tmp_path, monkeypatch):
    before = contents(copy)["config.yaml"]

    def update(*_):
        raise MemoryError

    monkeypatch.setattr(script.Learner, "update", update)
    with pytest.raises(script.UserError, match="out of memory"):
        train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360", "--batch-size", "5"])
    assert contents(copy)["config.yaml"] == before


def test_flags_given_beside_resume_count_from_there_on(script, tmp_path):
    never = {"seed_steps": 5000, "eval_every": 100_000, "scalar_freq": 100_000}
    run_dir = train(script, tmp_path, small(script, total_steps=100, checkpoint_interval=400, **never))
    assert script.load_checkpoint(run_dir)["learner"]["updates"] == 0
    flags = {"seed_steps": 60, "eval_every": 50, "scalar_freq": 20, "total_steps": 260}
    train(script, tmp_path, ["--resume", str(run_dir), *as_flags(flags)])
    assert script.load_checkpoint(run_dir)["learner"]["updates"] == 1 + (240 - 100) // 20
    metrics = read_metrics(run_dir)
    assert [line["step"] for line in metrics if "charts/eval_return" in line] == [100, 150, 200, 250, 260]
    assert len([line for line in metrics if "losses/kl" in line]) >= 6


def test_updates_that_are_due_wait_for_sequences_as_long_as_the_new_flag_says(script, tmp_path):
    run_dir = train(script, tmp_path, small(script, total_steps=100))
    checkpoint = script.load_checkpoint(run_dir)
    before = checkpoint["learner"]["updates"]
    checkpoint["counters"]["updates_due"] = 3
    script.save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
    train(script, tmp_path, ["--resume", str(run_dir), "--train-seq-len", "300", "--total-steps", "120"])
    after = script.load_checkpoint(run_dir)
    assert after["learner"]["updates"] == before and after["counters"]["updates_due"] == 3


def test_a_run_that_another_process_is_in_is_refused(script, copy, tmp_path):
    before = contents(copy)
    folder = os.open(copy, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(script.UserError, match="another process"):
        train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360"])
    os.close(folder)
    assert contents(copy) == before
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360"])


def test_resuming_a_finished_run_changes_no_weight_and_says_so(script, copy, tmp_path, capsys):
    before = script.load_checkpoint(copy)
    train(script, tmp_path, ["--resume", str(copy)])
    assert "raise --total-steps" in capsys.readouterr().err
    after = script.load_checkpoint(copy)
    assert after["counters"]["frames"] == before["counters"]["frames"]
    assert all(torch.equal(after["agent"][name], before["agent"][name]) for name in before["agent"])


def test_a_line_without_values_ends_the_log_of_a_complete_run(script, copy, tmp_path):
    assert read_metrics(copy)[-1] == {"step": 300}
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "320"])
    metrics = read_metrics(copy)
    assert metrics[-1] == {"step": 320} and {"step": 300} not in metrics
    train(script, tmp_path, ["--resume", str(copy)])
    assert read_metrics(copy) == metrics


def test_a_run_stopped_in_its_last_evaluation_has_it_when_resumed(script, tmp_path, monkeypatch):
    evaluate = script.evaluate

    def stopped(agent, args, episodes, seed, stop):
        stop.append(signal.SIGTERM)
        return evaluate(agent, args, episodes, seed, stop)

    monkeypatch.setattr(script, "evaluate", stopped)
    run_dir = train(script, tmp_path, small(script, eval_every=1000))
    assert not any("charts/eval_return" in line for line in read_metrics(run_dir))
    assert read_metrics(run_dir)[-1] != {"step": 300}
    monkeypatch.setattr(script, "evaluate", evaluate)
    train(script, tmp_path, ["--resume", str(run_dir)])
    metrics = read_metrics(run_dir)
    assert [line["step"] for line in metrics if "charts/eval_return" in line] == [300] and metrics[-1] == {"step": 300}


def test_resume_without_the_log_starts_a_new_one(script, copy, tmp_path):
    (copy / "metrics.jsonl").unlink()
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360"])
    assert read_metrics(copy)[-1]["step"] == 360


def test_a_log_that_lost_its_end_is_gone_on_with_on_a_new_line(script, copy, tmp_path):
    """A power cut may take what was not yet on the disk."""
    whole = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(whole[:-30])
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "360"])
    steps = [line["step"] for line in read_metrics(copy)]
    assert len(steps) > whole.count(b"\n") - 1 and steps[-1] == 360


@pytest.mark.parametrize(
    ("number", "changes", "whole_group"),
    [
        pytest.param(signal.SIGINT, {"num_envs": 2}, True, id="ctrl-c in a terminal, two environments"),
        pytest.param(signal.SIGTERM, {}, False, id="SIGTERM"),
        pytest.param(signal.SIGHUP, {}, False, id="SIGHUP"),
        pytest.param(signal.SIGUSR1, {}, False, id="SIGUSR1 (a scheduler's warning)"),
        pytest.param(signal.SIGTERM, {"eval_every": 40, "env_id": "Slow"}, False, id="SIGTERM in a long evaluation"),
    ],
)
def test_a_signal_saves_and_ends_within_ten_seconds(script, number, changes, whole_group, tmp_path):
    if "env_id" in changes:
        changes = changes | {"env_id": env_id(script, changes["env_id"], "tests.faulty_envs")}
    flags = small(script, total_steps=1_000_000, seed_steps=40, checkpoint_interval=26, **changes)
    with started(script, tmp_path, flags) as process:
        wait_for_progress(script, process, tmp_path, 0)
        time.sleep(0.5)
        sent = time.monotonic()
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
        assert_group_is_gone(process)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    (run_dir,) = tmp_path.glob("runs/*")
    frames = script.load_checkpoint(run_dir)["counters"]["frames"]
    advice = [line for line in errors.splitlines() if f"--resume {run_dir.relative_to(tmp_path)}" in line]
    assert len(advice) == 1 and f"saved at frame {frames}" in advice[0]


def test_a_closed_terminal_saves_and_ends(script, tmp_path):
    """The kernel sends SIGHUP, nothing can be written any more, and the terminal's shell sends SIGHUP again."""
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *small(script, total_steps=1_000_000)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # else nothing is left to flush at the end
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its controlling terminal
    )  # fmt: skip
    os.close(theirs)
    try:
        wait_for_progress(script, process, tmp_path, 0)
        os.close(ours)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        assert process.returncode == 0
    finally:
        process.kill()
    (run_dir,) = tmp_path.glob("runs/*")
    assert script.load_checkpoint(run_dir)["counters"]["frames"] > 0


def test_under_nohup_a_closed_terminal_does_not_end_it(script, tmp_path):
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(script, tmp_path, small(script))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)


def test_a_pretraining_that_was_interrupted_is_not_due_twice(script, tmp_path, monkeypatch):
    """By Ctrl-C while the compilers of its first update work."""

    def interrupted(learner, batch):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("the compiler is gone")

    flags = small(script, collect_steps=2, pretrain=20, total_steps=100)
    expected = script.load_checkpoint(train(script, tmp_path, flags))["learner"]["updates"]
    monkeypatch.setattr(script.Learner, "__call__", interrupted)
    run_dir = train(script, tmp_path, [*flags, "--seed", "2"])
    assert script.load_checkpoint(run_dir)["learner"]["updates"] == 0
    monkeypatch.undo()
    train(script, tmp_path, ["--resume", str(run_dir)])
    assert script.load_checkpoint(run_dir)["learner"]["updates"] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_set_up_saves_too(script, number, tmp_path, monkeypatch):
    def replay(*args):
        signal.raise_signal(number)
        return made(*args)

    made = script.Replay
    monkeypatch.setattr(script, "Replay", replay)
    run_dir = train(script, tmp_path, small(script))
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 0
    monkeypatch.undo()
    train(script, tmp_path, ["--resume", str(run_dir)])
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 300


def test_ctrl_c_while_workers_start_saves_too(script, tmp_path):
    """In a terminal it reaches the workers as well, which are importing then."""
    with started(script, tmp_path, small(script, total_steps=1_000_000, num_envs=2)) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/config.yaml")) and time.monotonic() < deadline:  # the end of the set-up
            time.sleep(0.05)
        time.sleep(0.7)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert_group_is_gone(process)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "started again" not in errors
    (run_dir,) = tmp_path.glob("runs/*")
    assert script.load_checkpoint(run_dir)["counters"]["env_restarts"] == 0


def test_a_second_ctrl_c_stops_at_once(script, tmp_path):
    """The first one waits for the environment, which hangs."""
    flags = small(script, env_id=env_id(script, "HangsOnce", "tests.faulty_envs"))
    marker = tmp_path / "marker"
    with started(script, tmp_path, flags, env={"FAULT_MARKER": str(marker)}) as process:
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT


def test_ctrl_c_that_ends_a_compiler_saves_too(script, tmp_path, monkeypatch):
    """Ctrl-C in a terminal reaches the compilers which torch.compile has started, so that the update fails."""

    def update(*_):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("g++ was interrupted")

    monkeypatch.setattr(script.Learner, "update", update)
    run_dir = train(script, tmp_path, small(script))
    assert SMALL["seed_steps"] <= script.load_checkpoint(run_dir)["counters"]["frames"] < SMALL["total_steps"]
    monkeypatch.undo()
    train(script, tmp_path, ["--resume", str(run_dir)])
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == SMALL["total_steps"]


# AFTERWARDS


def test_evaluate_prints_mean_and_deviation_and_writes_nothing(script, finished, tmp_path, capsys):
    before = contents(finished)
    train(script, tmp_path, ["--evaluate", str(finished), "--eval-episodes", "3"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and env_id(script) in printed and "3 episodes" in printed
    mean, deviation = (float(printed.split("return ")[1].split()[i]) for i in (0, 2))
    assert 0 <= mean <= 25 and 0 <= deviation <= 25
    assert contents(finished) == before and not list(tmp_path.iterdir())
    train(script, tmp_path, ["--evaluate", str(finished), "--eval-episodes", "3"])
    assert capsys.readouterr().out == printed, "the same seed plays the same episodes"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_that_is_stopped_tells_what_was_played(script, finished, tmp_path, monkeypatch, capsys, number):
    def evaluate(agent, args, episodes, seed, stop):
        signal.raise_signal(number)
        assert stop == [number] and signal.getsignal(number) == signal.SIG_DFL, "a second one ends a hanging episode"
        assert not args.capture_video, "its frames would fill memory for nothing"
        return [2.0], None

    monkeypatch.setattr(script, "evaluate", evaluate)
    train(script, tmp_path, ["--evaluate", str(finished), "--eval-episodes", "3", "--capture-video"])
    assert "return 2.00 +- 0.00 over 1 episodes" in capsys.readouterr().out


def test_flags_beside_evaluate_hold(script, finished, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "evaluate", lambda agent, *_: seen.append(agent.args) or ([1.0], None))
    train(script, tmp_path, ["--evaluate", str(finished), "--precision", "bfloat16", "--no-cuda-graph"])
    assert seen[0].precision == "bfloat16" and not seen[0].cuda_graph


def test_from_pretrained_gives_the_agent_of_the_checkpoint(script, finished):
    agent = script.Dreamer.from_pretrained(finished)
    saved = script.load_checkpoint(finished)["agent"]
    assert agent.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in agent.state_dict().items())
    images = np.random.default_rng(0).integers(0, 256, (3, agent.channels, 64, 64), np.uint8)
    state = agent.initial_state(3)
    for is_first in (np.ones(3, bool), np.zeros(3, bool)):
        action, state = agent.policy(images, state, is_first, mode=True)
        assert action.shape == (3, agent.action_size) and action.abs().max() <= 1
        if is_discrete(script):
            assert ((action == 1).sum(-1) == 1).all() and (action.sum(-1) == 1).all()


def test_from_config_takes_args_or_a_file_and_counts_its_parameters(script, finished):
    agents = [script.Dreamer.from_config(source) for source in (small_args(script), finished / "config.yaml")]
    for agent in agents:
        count = sum(parameter.numel() for parameter in agent.parameters() if parameter.requires_grad)
        assert agent.parameter_count() == count
        *parts, total = agent.summary().splitlines()
        assert total.split() == ["total", f"{count:,}"]
        assert sum(int(line.split()[1].replace(",", "")) for line in parts) == count
        assert {"encoder", "rssm", "decoder", "reward", "actor", "value"} <= {line.split()[0] for line in parts}
    assert agents[0].state_dict().keys() == agents[1].state_dict().keys()


# A FULL DISK


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def files_end_at(size):
    """The kernel cuts short what is written to a file beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on(script, tmp_path):
    """A limit on the size of files that only the checkpoint exceeds: the kernel cuts its write short."""
    run_dir = train(script, tmp_path, small(script, total_steps=80, replay_capacity=40, units=256))
    before = (run_dir / "checkpoint.pt").read_bytes()
    assert (run_dir / "replay" / "steps.npy").stat().st_size < len(before) // 2
    refused = pytest.raises(script.UserError, match="could not save frame 160.*free some space")
    with files_end_at(len(before) // 2), refused:
        train(script, tmp_path, ["--resume", str(run_dir), "--total-steps", "160"])
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert not list(run_dir.glob("*.tmp"))
    assert read_metrics(run_dir)[-1]["step"] == 160, "it trained to its end"
    train(script, tmp_path, ["--resume", str(run_dir), "--total-steps", "160"])
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 160


def test_a_disk_that_stays_full_ends_the_run_before_the_ring_overwrites_what_the_last_checkpoint_needs(
    script, tmp_path, monkeypatch
):
    sizes = {"total_steps": 100, "replay_capacity": 40, "checkpoint_interval": 10}
    run_dir = train(script, tmp_path, small(script, **sizes))
    monkeypatch.setattr(script, "save_checkpoint", disk_full)
    with pytest.raises(script.UserError, match="could not save frame 1[01].*free some space"):
        train(script, tmp_path, ["--resume", str(run_dir), "--total-steps", "300"])
    monkeypatch.undo()
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 100
    train(script, tmp_path, ["--resume", str(run_dir), "--total-steps", "120"])
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 120


@pytest.mark.parametrize("place", ["torch.save", "metrics.jsonl", "tensorboard", "videos"])
def test_a_disk_that_is_full_for_a_while_is_survived_wherever_it_strikes(script, place, tmp_path, monkeypatch, capsys):
    strikes = itertools.count()

    def sometimes(function, strike=lambda *_: True):
        def full_at_first(*args, **kwargs):
            if strike(*args) and next(strikes) < 2:
                disk_full()
            return function(*args, **kwargs)

        return full_at_first

    if place == "torch.save":
        monkeypatch.setattr(script.torch, "save", sometimes(torch.save))
    elif place == "metrics.jsonl":
        opens = sometimes(builtins.open, lambda path, mode="r", *_: str(path).endswith(place) and mode == "a")
        monkeypatch.setattr(script, "open", opens, raising=False)
    elif place == "tensorboard":
        writer = script.SummaryWriter
        monkeypatch.setattr(writer, "add_scalar", sometimes(writer.add_scalar))
    else:
        monkeypatch.setattr(
            script, "write_file", sometimes(script.write_file, lambda path, _: path.parent.name == place)
        )
    run_dir = train(script, tmp_path, small(script, eval_every=100, capture_video=True))
    assert next(strikes) >= 2
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 300
    assert "No space left" in capsys.readouterr().err
    assert read_metrics(run_dir)[-1]["step"] == 300


def test_a_disk_too_full_for_a_resumed_runs_flags_does_not_end_it(script, copy, tmp_path, monkeypatch, capsys):
    write, strikes = script.write_file, itertools.count()

    def full_at_first(path, data):
        if path.name == "config.yaml" and next(strikes) == 0:
            disk_full()
        write(path, data)

    monkeypatch.setattr(script, "write_file", full_at_first)
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "500"])
    assert "could not save" in capsys.readouterr().err and next(strikes) > 1
    assert script.load_checkpoint(copy)["counters"]["frames"] == 500
    assert script.load_config(copy / "config.yaml").total_steps == 500


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
@pytest.mark.parametrize("cut", ["metrics.jsonl", "events.out.tfevents.*", "videos/1.gif"])
def test_a_write_that_was_cut_short_spoils_nothing_that_comes_after_it(script, cut, tmp_path, capsys):
    logger = script.Logger(tmp_path, small_args(script), 0, 0)
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    for step in range(30):  # the events file is the longer one
        logger.scalars(step, {"a": float(step)})
    logger.events().flush()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    events = sizes.pop(next(name for name in sizes if name.startswith("events")))
    limit = {"m": sizes["metrics.jsonl"] + 7, "e": events + 7, "v": 10}[cut[0]]
    with files_end_at(limit):
        if cut[0] == "v":
            logger.video(30, "playing", frames, tmp_path / "videos" / "1.gif")
        else:
            logger.scalars(30, {"a": 30.0, "b": 30.0})
            with contextlib.suppress(OSError):
                logger.events().flush()
    for step in range(31, 40):
        logger.scalars(step, {"a": float(step)})
    logger.video(40, "playing", frames, tmp_path / "videos" / "2.gif")
    logger.close()
    assert "could not" in capsys.readouterr().err
    assert {*range(30), *range(32, 40)} <= {line["step"] for line in read_metrics(tmp_path)}
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert {*range(30), *range(33, 40)} <= {event.step for event in events.Scalars("a")}
    assert events.Images("playing")[-1].step == 40
    assert [path.name for path in tmp_path.glob("videos/*")] == ["2.gif"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_that_cannot_log_at_its_start_is_refused_in_one_line(script, finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    with files_end_at(0), pytest.raises(script.UserError, match="cannot write to the run folder .*File too large"):
        train(script, tmp_path, ["--resume", str(run_dir), "--total-steps", "400"])


def test_a_replay_that_finds_no_room_to_grow_ends_the_run_with_its_progress_saved(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.Replay, "GROWTH", 40)
    monkeypatch.setattr(script.os, "posix_fallocate", lambda *_: next(rooms) or disk_full())
    rooms = iter([True, True, False])
    with pytest.raises(script.UserError, match="no room for the replay.*--resume"):
        train(script, tmp_path, small(script, checkpoint_interval=1000))
    (run_dir,) = tmp_path.glob("runs/*")
    checkpoint = script.load_checkpoint(run_dir)
    assert checkpoint["replay_rows"] == 80
    monkeypatch.undo()
    train(script, tmp_path, ["--resume", str(run_dir)])
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 300


def test_a_run_whose_first_steps_find_no_room_leaves_nothing(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.os, "posix_fallocate", lambda *_: disk_full())
    with pytest.raises(script.UserError, match="no room for the replay.*start again"):
        train(script, tmp_path, small(script))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["/dev/full", "closed", "pipe"])
def test_output_that_cannot_be_written_does_not_end_a_run(script, broken, tmp_path):
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *small(script, eval_every=100)]
    if broken == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    reader, stream = os.pipe()
    os.close(reader)
    if broken == "/dev/full":
        os.dup2(full := os.open(broken, os.O_WRONLY), stream)
        os.close(full)
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=stream, stderr=stream)
    os.close(stream)
    (run_dir,) = tmp_path.glob("runs/*")
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 300


def test_runs_that_begin_in_the_same_second_do_not_meet(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "time", lambda: 1_700_000_000.0)
    args = small_args(script)
    with contextlib.chdir(tmp_path), contextlib.ExitStack() as stack:
        assert script.open_run(args, stack)[0] != script.open_run(args, stack)[0]


# FAULTY ENVIRONMENTS


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("RaisesOnce", {}),
        ("ResetRaisesOnce", {}),
        ("RaisesOnce", {"num_envs": 3}),
        ("DiesOnce", {"num_envs": 2}),
        ("HangsOnce", {"env_timeout": 3.0}),
        ("HangsOnce", {"env_timeout": 3.0, "num_envs": 3}),
        ("RaisesUnpicklableOnce", {"num_envs": 2}),
    ],
)
def test_an_environment_that_fails_is_started_again(script, name, changes, tmp_path, monkeypatch, capsys):
    """Its open episode ends with a truncation, a fresh one begins, the restart is counted, the run reaches its end.

    Environments beside it are not interrupted.
    """
    monkeypatch.setenv("FAULT_MARKER", str(tmp_path / "marker"))
    environment = env_id(script, name, "tests.faulty_envs")
    begin = time.monotonic()
    run_dir = train(script, tmp_path, small(script, env_id=environment, total_steps=200, **changes))
    assert (tmp_path / "marker").exists() and time.monotonic() - begin < 90, "it did not wait for the one that hangs"
    checkpoint = script.load_checkpoint(run_dir)
    assert checkpoint["counters"]["frames"] >= 200 and checkpoint["counters"]["env_restarts"] == 1
    updates = [line for line in read_metrics(run_dir) if "charts/env_restarts" in line]
    assert updates[-1]["charts/env_restarts"] == 1
    rows = stored_rows(script, run_dir)
    assert (rows["is_first"][1:] == rows["is_last"][:-1]).all()
    if name != "ResetRaisesOnce":
        lengths = [np.diff(np.flatnonzero(first)) for first in rows["is_first"].T]
        whole = 14  # a reset and 13 steps
        assert sum((length != whole).sum() for length in lengths) == 1, "one episode was cut short, and no other"
        assert min(len(length) for length in lengths) >= 2, "each environment went on"
    assert not rows["is_terminal"].any()
    assert "is started again" in capsys.readouterr().err


def test_games_break_together_and_are_started_again(tmp_path, monkeypatch, capsys):
    """They share ALE's threads: a fault ends the open episode of each, and counts once."""
    script, steps = load("dreamer_v2_atari"), []
    step = script.Atari.step

    def failing(self, action):
        steps.append(0)
        if len(steps) == 20:
            raise RuntimeError("the emulator fell over")
        return step(self, action)

    monkeypatch.setattr(script.Atari, "step", failing)
    run_dir = train(script, tmp_path, small(script, env_id="ALE/Pong-v5", num_envs=2, total_steps=200))
    assert script.load_checkpoint(run_dir)["counters"]["env_restarts"] == 1
    rows = stored_rows(script, run_dir)
    assert rows["is_last"][19].all() and rows["is_first"][20].all() and not rows["is_terminal"].any()
    assert "fell over; it is started again" in capsys.readouterr().err


def test_actions_that_are_not_finite_are_neither_played_nor_stored(script, tmp_path, monkeypatch):
    policy = script.Dreamer.policy

    def poisoned(*args, **kwargs):
        action, state = policy(*args, **kwargs)
        return action * math.nan, state

    monkeypatch.setattr(script.Dreamer, "policy", poisoned)
    with pytest.raises(script.UserError, match="actions are not finite"):
        train(script, tmp_path, small(script))


def test_an_environment_that_keeps_failing_ends_the_run_with_its_cause(script, tmp_path):
    flags = small(script, env_id=env_id(script, "Raises", "tests.faulty_envs"))
    with pytest.raises(script.UserError, match="five times in a row.*RuntimeError: the simulator fell over"):
        train(script, tmp_path, flags)
    (run_dir,) = tmp_path.glob("runs/*")
    counters = script.load_checkpoint(run_dir)["counters"]
    assert counters["env_restarts"] == 5 and counters["frames"] > 0, "all that was played is saved"


def test_an_environment_that_exits_does_not_end_the_script(script, tmp_path):
    flags = small(script, env_id=env_id(script, "Exits", "tests.faulty_envs"))
    with pytest.raises(script.UserError, match=r"five times in a row.*it called sys.exit\(0\)"):
        train(script, tmp_path, flags)


def test_an_environment_whose_restart_exits_ends_the_run_with_its_progress(script, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT_MARKER", str(tmp_path / "marker"))
    flags = small(script, env_id=env_id(script, "RestartExits", "tests.faulty_envs"))
    with pytest.raises(script.UserError, match="five times in a row.*SystemExit: 3"):
        train(script, tmp_path, flags)
    (run_dir,) = tmp_path.glob("runs/*")
    assert script.load_checkpoint(run_dir)["counters"]["env_restarts"] == 5


def test_a_worker_whose_reset_hangs_is_started_again(script, tmp_path, monkeypatch):
    """The step raises once, then the restarted one's reset hangs, once."""
    monkeypatch.setenv("FAULT_MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr(script, "START_TIMEOUT", 20)
    environment = env_id(script, "RestartHangsOnce", "tests.faulty_envs")
    run_dir = train(script, tmp_path, small(script, env_id=environment, total_steps=100, env_timeout=3.0))
    assert script.load_checkpoint(run_dir)["counters"]["env_restarts"] == 2


def test_rare_faults_of_an_episode_without_end_do_not_add_up(script):
    counters = script.Counters()
    envs = script.SturdyEnvs(small_args(script), counters, logger=SilentLogger())
    for frames in range(0, 200_000, 20_000):
        counters.frames = frames
        envs.broke(0, RuntimeError("a hiccup"))
    with pytest.raises(script.UserError, match="five times in a row"):
        for _ in range(4):
            envs.broke(0, RuntimeError("a hiccup"))


class SilentLogger:
    def warn(self, topic, message):
        pass


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_faulty_environment_in_an_evaluation_does_not_end_the_run(script, tmp_path, monkeypatch, capsys, kind):
    fault = kind("the simulator\nfell over")
    monkeypatch.setattr(script, "evaluate", failing_once(script.evaluate, fault))
    run_dir = train(script, tmp_path, small(script, eval_every=100))
    assert f"warning: the evaluation failed: {kind.__name__}: the simulator fell over\n" in capsys.readouterr().err
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 300


def test_an_environment_that_hangs_in_an_evaluation_is_given_up_after_the_timeout(script, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT_MARKER", str(tmp_path / "marker"))
    args = small_args(script, env_id=env_id(script, "HangsOnce", "tests.faulty_envs"), env_timeout=3.0)
    begin = time.monotonic()
    with pytest.raises(multiprocessing.TimeoutError):
        script.evaluate(script.Dreamer.from_config(args), args, 1, seed=1, stop=[])
    assert (tmp_path / "marker").exists() and time.monotonic() - begin < 90
    assert not multiprocessing.active_children(), "the one that hangs is gone"


def test_an_evaluation_whose_episodes_do_not_end_is_given_up(script):
    args = small_args(script, env_id=env_id(script, "Endless", "tests.faulty_envs"), action_repeat=36_000)
    with pytest.raises(RuntimeError, match="no episode ended within 216,000 frames"):
        script.evaluate(script.Dreamer.from_config(args), args, 2, seed=1, stop=[])


@pytest.mark.parametrize("action_repeat", [36_000, 25_000])
def test_an_evaluation_plays_all_episodes_though_each_is_as_long_as_can_be(script, action_repeat):
    args = small_args(script, env_id=env_id(script, "Longest", "tests.faulty_envs"), action_repeat=action_repeat)
    returns, _ = script.evaluate(script.Dreamer.from_config(args), args, 3, seed=1, stop=[])
    assert len(returns) == 3


def test_an_evaluation_asks_for_the_mode_and_begins_each_episode_anew(script, monkeypatch):
    args = small_args(script, eval_episodes=3)
    agent, made, first = script.Dreamer.from_config(args), [], []
    still = torch.zeros(1, agent.action_size)
    still[:, 0] = float(is_discrete(script))

    def fast_policy(agent, num_envs, noise=0.0, mode=False):
        made.append((num_envs, noise, mode))
        return lambda image, state, is_first: (first.append(bool(is_first[0])) or still, state)

    monkeypatch.setattr(script, "fast_policy", fast_policy)
    returns, _ = script.evaluate(agent, args, 3, seed=1, stop=[])
    assert made == [(1, 0.0, True)]
    assert np.allclose(returns, 25 * 3 / 7), "the dot stays in the middle, where each of the 25 steps gives 3/7"
    begins = np.flatnonzero(first)
    assert len(begins) == 3 and begins[0] == 0 and len({*np.diff([*begins, len(first)])}) <= 2


def test_a_run_acts_with_draws_and_its_action_noise(script, tmp_path, monkeypatch):
    made, fast_policy = [], script.fast_policy
    monkeypatch.setattr(script, "fast_policy", lambda agent, *args: made.append(args) or fast_policy(agent, *args))
    train(script, tmp_path, small(script, num_envs=2, action_noise=0.25))
    assert made == [(2, 0.25)], "the number of environments and the noise, and no mode"


def test_a_resumed_run_goes_on_with_the_optimizers_and_random_states_of_its_checkpoint(
    script, copy, tmp_path, monkeypatch
):
    checkpoint, generators, learners, seen = script.load_checkpoint(copy), [], [], []
    default_rng, make_learner, reset = np.random.default_rng, script.Learner, script.SturdyEnvs.reset

    def reset_and_look(envs, seed):
        state = deepcopy(learners[0].state_dict())
        seen.append((seed, torch.get_rng_state(), generators[0].bit_generator.state, state))
        return reset(envs, seed)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: generators.append(default_rng(seed)) or generators[-1])
    monkeypatch.setattr(script, "Learner", lambda *args: learners.append(make_learner(*args)) or learners[-1])
    monkeypatch.setattr(script.SturdyEnvs, "reset", reset_and_look)
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "310"])
    ((seed, torch_state, numpy_state, learner),) = seen
    assert torch.equal(torch_state, checkpoint["torch_rng"]) and numpy_state == checkpoint["numpy_rng"]
    assert seed == 1 + checkpoint["counters"]["frames"], "episodes differ from the first ones"
    assert learner["updates"] == checkpoint["learner"]["updates"] > 0
    for name, optimizer in checkpoint["learner"]["optimizers"].items():
        for index, moments in optimizer["state"].items():
            for moment, value in moments.items():
                assert torch.equal(learner["optimizers"][name]["state"][index][moment], value)


def test_environments_of_a_run_have_seeds_of_their_own(script, monkeypatch):
    args, seeds = small_args(script, num_envs=3, env_id=env_id(script)), []
    monkeypatch.setattr(script, "make_envs", lambda *_: None)
    monkeypatch.setattr(script, "reset_envs", lambda envs, seed, timeout: seeds.append(seed) or np.zeros((1, 1)))
    script.SturdyEnvs(args, script.Counters(), SilentLogger()).reset(7)
    assert sorted(seeds) == [7, 8, 9]


def test_evaluate_tells_of_a_faulty_environment_in_one_line(script, finished, tmp_path):
    flags = ["--evaluate", str(finished), "--env-id", env_id(script, "Raises", "tests.faulty_envs")]
    with pytest.raises(script.UserError, match="Raises.*failed: RuntimeError: the simulator fell over"):
        train(script, tmp_path, flags)


def failing_once(function, error):
    errors = [error]

    def wrapped(*args, **kwargs):
        if errors:
            raise errors.pop()
        return function(*args, **kwargs)

    return wrapped


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run_at_once(script, tmp_path, monkeypatch):
    """With the last good checkpoint: from the first that is skipped on none is saved, the weights may have diverged."""
    updates, learn, nll = [], script.Learner.learn, script.image_nll
    monkeypatch.setattr(script, "image_nll", lambda *args: nll(*args) * (math.nan if len(updates) > 5 else 1))
    monkeypatch.setattr(script.Learner, "learn", lambda self, batch: updates.append(0) or learn(self, batch))
    flags = small(script, total_steps=10_000, scalar_freq=10_000, checkpoint_interval=20)
    with pytest.raises(script.UserError, match="10 updates in a row were not finite.*losses/image"):
        train(script, tmp_path, flags)
    assert len(updates) == 15
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert script.load_checkpoint(path.parent)["learner"]["updates"] == 5


def test_a_reward_beyond_float32_ends_the_run(script, tmp_path):
    with pytest.raises(script.UserError, match=r"reward 1e\+39"):
        train(script, tmp_path, small(script, env_id=env_id(script, "HugeReward", "tests.faulty_envs")))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_reward_that_is_no_number_ends_the_run(script, num_envs, tmp_path):
    """With workers too, exit code 2, and nobody is left behind."""
    flags = small(script, env_id=env_id(script, "NanReward", "tests.faulty_envs"), num_envs=num_envs)
    if num_envs == 1:
        with pytest.raises(script.UserError, match="reward nan"):
            train(script, tmp_path, flags)
        (run_dir,) = tmp_path.glob("runs/*")
        assert script.load_checkpoint(run_dir)["replay_rows"] == 2, "the reset and the step before are saved"
        return
    with started(script, tmp_path, flags) as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("error: ") and "reward nan" in errors.splitlines()[-1]
        assert_group_is_gone(process)


def test_workers_do_not_outlive_a_script_that_is_killed(script, tmp_path):
    with started(script, tmp_path, small(script, num_envs=2, total_steps=1_000_000, seed_steps=40)) as process:
        wait_for_progress(script, process, tmp_path, 0)
        process.kill()
        assert_group_is_gone(process)

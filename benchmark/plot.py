"""Learning curves of our runs over the published ones, and the tables of the README.

    python benchmark/plot.py export runs/* --out benchmark/results/pong.csv    # run folders to one CSV (and its .json)
    python benchmark/plot.py curves --out figures                              # PNGs from benchmark/results/*.csv
    python benchmark/plot.py curves runs/* --out figures                       # ... or straight from run folders
    python benchmark/plot.py readme                                            # figures and tables of README.md
    python benchmark/plot.py random --env-ids dmc/walker-walk ALE/Pong-v5      # what a random policy scores

The x axis is in environment frames. The return of a run is the mean in the last 5% of the frames that all seeds of its
group reached, of three evaluations at least. A published figure is a mean over the frames up to its frame count; ours
are set beside the last one whose frames they fill, by the mean over the same frames. Bad input: one line, exit code 2.
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from run import InputError, Parser, frame_count, machine, read_run, read_yaml, replacing, run_tool, whole, write

HERE = Path(__file__).resolve().parent
RANDOM_COLUMNS = ["env_id", "action_repeat", "mean", "std", "episodes"]
COLUMNS = ["version", "task", "script", "seed", "step", "return", "kind"]
SCRIPTS = ("dreamer_v1_continuous", "dreamer_v2_atari", "dreamer_v2_continuous")
OURS, THEIRS, FLOOR = "#d1495b", "#8a8a8a", "#30638e"
WINDOW = 0.05
# Over how many frames, up to its frame count, a published figure is a mean, and of which returns (reference/README.md).
PUBLISHED = {"v1": (100_000, "eval"), "dmc": (30_000, "train"), "atari": (1_000_000, "eval")}
# Settings in which the seeds of one curve may differ: they change no result, or no more than a seed does.
FREE = {
    *("env_id", "seed", "exp_name", "total_steps", "config", "resume", "evaluate", "track", "wandb_project_name"),
    *("wandb_entity", "capture_video", "cuda", "precision", "compile", "compile_cpu", "cuda_graph", "num_envs"),
    *("torch_deterministic", "env_timeout", "scalar_freq", "eval_every", "eval_episodes", "checkpoint_interval"),
}
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


class Row(NamedTuple):
    version: str
    task: str
    script: str
    seed: int
    step: int
    value: float
    kind: str


class Group(NamedTuple):
    version: str
    task: str
    script: str


class Score(NamedTuple):
    """The runs of one group: at the frames that all its seeds reached, and beside the official ones."""

    group: Group
    kind: str
    frames: int
    seeds: dict  # seed -> return in the last 5% of these frames, three evaluations at least
    span: tuple | None  # the frames compared: after the first, up to the last
    there: dict  # seed -> mean return over the span
    official: tuple | None  # mean, min, max over the span
    verdict: str


# FILES


def read_csv(path, columns):
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    reader = csv.DictReader(line for line in lines if line and not line.startswith("#"))
    if not set(columns) <= set(reader.fieldnames or []):
        raise InputError(f"{path}: expected the columns {','.join(columns)}")
    rows = list(reader)
    for row in rows:
        if None in row or None in row.values():
            raise InputError(f"{path}: row {','.join(str(value) for value in row.values())} has not one cell a column")
    return rows


def number(text, path):
    try:
        value = float(text)
    except (ValueError, TypeError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: {text!r} is not a number")
    return value


def read_official():
    """{(version, task): array of frames, mean, min, max}"""
    path, curves = HERE / "reference" / "official_scores.csv", defaultdict(list)
    for row in read_csv(path, ["version", "task", "env_steps", "mean", "min", "max"]):
        point = [number(row[key], path) for key in ("env_steps", "mean", "min", "max")]
        curves[row["version"], row["task"]].append(point)
    return {key: np.array(sorted(points)).T for key, points in curves.items()}


def read_normalizers():
    """{Atari task: (random, human gamer)}, nan where nothing was published"""
    path = HERE / "reference" / "atari_normalizers.csv"
    rows = read_csv(path, ["task", "random", "human_gamer"])
    return {row["task"]: [float(row[key] or "nan") for key in ("random", "human_gamer")] for row in rows}


def read_floors(path=None):
    """{(task, action repeat): mean return of a random policy}: measured where it was, else the published figure."""
    floors = {(task, usual_repeat(task)): scores[0] for task, scores in read_normalizers().items()}
    path = path or HERE / "results" / "random_scores.csv"
    if Path(path).exists():
        for row in read_csv(path, RANDOM_COLUMNS):
            key = task_name(row["env_id"]), int(number(row["action_repeat"], path))
            floors[key] = number(row["mean"], path)
    return floors


def usual_repeat(task):
    return 4 if task.startswith("atari_") else 2


def read_settings(paths):
    """{(task, script): the settings of each run} of run folders and of CSV files that have a sidecar."""
    settings = defaultdict(list)
    for path in map(Path, paths):
        if path.is_dir():
            for folder in chosen_folders(path):
                _, task, script, *_ = describe(folder)
                settings[task, script].append(read_yaml(folder / "config.yaml"))
        elif path.with_suffix(".json").exists():
            try:
                sidecar = json.loads(path.with_suffix(".json").read_text())
                for run in sidecar["runs"]:
                    settings[run["task"], run["script"]].append(sidecar["common_config"] | run["config"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path.with_suffix('.json')}: not what `plot.py export` writes") from None
    return settings


def read_repeats(paths):
    """{(task, script): action repeat}, where it is known."""
    repeats = {key: configs[-1].get("action_repeat") for key, configs in read_settings(paths).items()}
    return {key: repeat for key, repeat in repeats.items() if repeat}


def tell_of_mixed(paths):
    """A curve over seeds says nothing if each was trained in another way."""
    for (task, script), (first, *others) in read_settings(paths).items():
        keys = sorted({key for other in others for key in other | first if other.get(key) != first.get(key)} - FREE)
        if keys:
            print(f"note: the runs of {script} on {task} differ in {', '.join(keys)}", file=sys.stderr)


def floor_of(group, floors, repeats):
    """(action repeat, what a random policy returns with it or None)"""
    repeat = repeats.get((group.task, group.script), usual_repeat(group.task))
    return repeat, floors.get((group.task, repeat))


def task_name(env_id):
    """The name of the published scores: dmc/walker-walk is dmc_walker_walk, ALE/Pong-v5 is atari_pong."""
    bare = env_id.rpartition(":")[2]
    suite, _, name = bare.partition("/")
    if suite in ("dmc", "dm_control"):
        return "dmc_" + re.sub(r"-v\d+$", "", name).replace("-", "_").replace("ball_in_cup", "cup")
    game = re.sub(r"(NoFrameskip|Deterministic)?-v\d+$", "", name if suite == "ALE" else bare)
    squashed = game.removeprefix("atari/").replace("_", "").lower()
    known = {task.removeprefix("atari_").replace("_", ""): task for task in read_normalizers()}
    return known.get(squashed, bare)


# RUNS


def run_folders(path):
    """`path` is a run folder, or it holds some."""
    found = [path] if (path / "config.yaml").exists() else sorted(p.parent for p in path.glob("*/config.yaml"))
    if not found and not (found := sorted(p.parent for p in path.glob("runs/*/config.yaml"))):
        raise InputError(f"{path}: no run folder (config.yaml) in it")
    return found


def chosen_folders(path, tell=False):
    """The run folders in `path` but those that a run left when it began anew, since it was killed before it saved."""
    folders = run_folders(path)
    if folders == [path]:
        return folders
    seeds, best, kept = {}, {}, []
    for folder in folders:
        run, born = read_run(folder, read_yaml(folder / "config.yaml")), (folder / "config.yaml").stat().st_mtime_ns
        rank = run.finished, run.resumable, 0 if run.finished or run.resumable else born
        seeds[folder] = describe(folder)[1:4], rank
        best[seeds[folder][0]] = max(rank, best.get(seeds[folder][0], rank))
    for folder, (seed, rank) in seeds.items():
        empty = not (folder / "metrics.jsonl").exists()
        if rank == best[seed] and not empty:
            kept.append(folder)
        elif tell:
            reason = "it has no metrics.jsonl" if empty else "another run of this seed got further"
            print(f"left out: {folder}: {reason}", file=sys.stderr)
    if not kept:
        raise InputError(f"{path}: no run in it has a metrics.jsonl")
    return kept


def describe(folder):
    """(version, task, script, seed, total_steps) of a run folder, from its config.yaml alone."""
    path = folder / "config.yaml"
    config = read_yaml(path)
    missing = [key for key in ("env_id", "seed", "total_steps") if key not in config]
    if missing:
        raise InputError(f"{path}: no {missing[0]}")
    task, name = task_name(str(config["env_id"])), str(config.get("exp_name") or "")
    script = next((script for script in SCRIPTS if name.startswith(script)), None)
    if script is None:  # a free --exp-name: tell the script by what only it has
        v2 = "dreamer_v2_continuous" if "actor_dist" in config else "dreamer_v2_atari"
        script = v2 if "num_classes" in config else "dreamer_v1_continuous"
    label = name if name.startswith(script) or not name else f"{script}-{name}"
    return (
        script.split("_")[1],
        task,
        label,
        int(number(config["seed"], path)),
        frame_count(config["total_steps"], path),
    )


def read_metrics(folder):
    """([(step, return, kind)], last step). What a killed run logged beyond the checkpoint it resumed at is dropped."""
    path, points = folder / "metrics.jsonl", []
    if not path.exists():
        raise InputError(f"{folder}: no metrics.jsonl")
    last = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
            continue
        if step < last:
            points = [point for point in points if point[0] < step]
        last = step
        for kind, name in (("train", "charts/episodic_return"), ("eval", "charts/eval_return")):
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((step, float(value), kind))
    return points, last


def thin(points, width):
    """Mean of the training returns in every `width` frames, at the frame of the last of them. Evaluations stay."""
    bins, out = defaultdict(list), [point for point in points if point[2] == "eval" or not width]
    for step, value, kind in points:
        if kind == "train" and width:
            bins[(step - 1) // width].append((step, value))
    out += [(part[-1][0], float(np.mean([value for _, value in part])), "train") for part in bins.values()]
    return sorted(out)


def load(paths, width=0, unfinished=True):
    """Rows of CSV files and run folders. `width`: frames over which training returns are averaged, None: as it fits."""
    rows, sources = [], {}
    tell_of_mixed(paths)
    for path in map(Path, paths):
        if path.is_dir():
            for folder in chosen_folders(path, tell=True):
                version, task, script, seed, total = describe(folder)
                points, last = read_metrics(folder)
                if not (unfinished or read_run(folder, read_yaml(folder / "config.yaml")).finished):
                    print(f"left out: {folder} is not complete: at {last:,} of {total:,} frames", file=sys.stderr)
                    continue
                size = min(10_000, last // 100) if width is None else width
                new = [Row(version, task, script, seed, *point) for point in thin(points, size)]
                rows += claim(new, folder, sources)
        else:
            new = [
                Row(
                    r["version"],
                    r["task"],
                    r["script"],
                    int(number(r["seed"], path)),
                    int(number(r["step"], path)),
                    number(r["return"], path),
                    r["kind"],
                )
                for r in read_csv(path, COLUMNS)
            ]
            if bad := next((row.kind for row in new if row.kind not in ("eval", "train")), None):
                raise InputError(f"{path}: kind is {bad!r}, neither eval nor train")
            rows += claim(new, path, sources)
    return rows


def claim(rows, source, sources):
    """One run for each seed: two would be averaged into a curve that nobody ran."""
    for key in {(row.script, row.task, row.seed) for row in rows}:
        if sources.setdefault(key, source) != source:
            pair = f"{sources[key]} and {source}"
            raise InputError(f"two runs of {key[0]} on {key[1]} with seed {key[2]}, {pair}: leave one out")
    return rows


def published(group):
    """Over how many frames each official figure of these runs is a mean, and of which returns."""
    return PUBLISHED.get("v1" if group.version == "v1" else group.task.partition("_")[0], (None, "eval"))


def by_group(rows, kind="auto"):
    """{group: (kind, {seed: (steps, returns)})}; auto: the official curve's kind if every seed has it, else the other.

    Evaluations have to be five for each official figure at least: one or two are no mean over its frames.
    """
    groups = defaultdict(lambda: {"eval": defaultdict(list), "train": defaultdict(list)})
    for row in rows:
        groups[Group(row.version, row.task, row.script)][row.kind][row.seed].append((row.step, row.value))
    out = {}
    for group, kinds in sorted(groups.items()):
        use = kind
        if kind == "auto":
            width, use = published(group)
            other, everyone = "train" if use == "eval" else "eval", {*kinds["eval"], *kinds["train"]}
            sparse = any(len(points) * (width or math.inf) < 5 * max(points)[0] for points in kinds["eval"].values())
            fit = [name for name in (use, other) if set(kinds[name]) == everyone and not (name == "eval" and sparse)]
            use = fit[0] if fit else other if kinds[other] else use
        if kinds[use]:
            out[group] = use, {seed: np.array(sorted(points)).T for seed, points in sorted(kinds[use].items())}
    return out


def official_over(curve, width, frames):
    """The published figures whose frames a run fills, in their order: [((first, last), (mean, min, max))]."""
    if curve is None or width is None:
        return []
    # The last episode ends a little before the run. V1's curves begin with one evaluation, which is no mean.
    filled = (curve[0] >= width) & (curve[0] - WINDOW * width <= frames)
    return [((last - width, last), tuple(values)) for last, *values in curve[:, filled].T.tolist()]


def scores_of(group, kind, seeds, official, repeat=None):
    """A score for each published figure whose frames all seeds have filled; one without it if there is none."""
    frames = int(min(steps[-1] for steps, _ in seeds.values()))
    values = {}
    for seed, (steps, returns) in seeds.items():
        if steps[0] > frames:
            runs = f"{group.script} on {group.task}"
            raise InputError(f"{runs}: another seed ends at frame {frames:,}, before seed {seed} has any return")
        last = returns[(steps > (1 - WINDOW) * frames) & (steps <= frames)]
        if kind == "eval" and len(last) < 3:
            last = returns[steps <= frames][-3:]
        values[seed] = float(last.mean() if len(last) else np.interp(frames, steps, returns))
    found = []
    for span, reference in official_over(official.get(group[:2]), published(group)[0], frames):
        inside = {seed: returns[(span[0] < steps) & (steps <= span[1])] for seed, (steps, returns) in seeds.items()}
        if not all(map(len, inside.values())):
            continue
        there = {seed: float(returns.mean()) for seed, returns in inside.items()}
        mean = np.mean(list(there.values()))
        verdict = "under" if mean < reference[1] else "above" if mean > reference[2] else "inside"
        if repeat not in (None, usual_repeat(group.task)):  # another task: the random policy's return is another, too
            verdict = "other action repeat"
        found.append(Score(group, kind, frames, values, span, there, reference, verdict))
    return found or [Score(group, kind, frames, values, None, {}, None, "no reference")]


def all_scores(rows, official, kind="auto", repeats=None):
    """[the scores of each group, at the published figures in their order]"""
    repeats, groups = repeats or {}, by_group(rows, kind)
    return [scores_of(g, use, seeds, official, repeats.get((g.task, g.script))) for g, (use, seeds) in groups.items()]


def last_scores(*args):
    return [scores[-1] for scores in all_scores(*args)]


def iqm(matrix, reps=2000):
    """Interquartile mean over (seeds, tasks) and its 95% interval, bootstrapped over the seeds of each task."""
    try:
        from rliable import library, metrics
    except Exception as error:  # noqa: BLE001 - with an unlucky pandas it is no ImportError
        raise InputError(f"rliable does not import ({error}): pip install -r benchmark/requirements.txt") from None
    # rliable takes a random_state and then draws from numpy's global one.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        point, interval = library.get_interval_estimates(
            {"ours": matrix}, lambda scores: np.array([metrics.aggregate_iqm(scores)]), reps=reps
        )
    finally:
        np.random.set_state(state)
    return float(point["ours"][0]), *(float(bound) for bound in interval["ours"][:, 0])


# EXPORT


def attempts_of(folder):
    """What run.py wrote down about a run: one dict for each time it was started."""
    found = []
    for path in sorted(folder.absolute().parent.parent.glob("logs/*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off
                record = json.loads(line)
                found += [record] if record["run"] == folder.name else []
    return found


def provenance(folder, args):
    _, task, script, seed, total = describe(folder)
    if attempts := attempts_of(folder):
        facts, recorded = attempts[0], "by run.py, at the start of the run"
        seconds = sum(attempt["seconds"] for attempt in attempts)
    else:
        facts, recorded = machine(str(HERE.parent), os.environ), "at export; wall_seconds from file times"
        name = next(name for name in SCRIPTS if script.startswith(name))  # the label goes on with --exp-name
        facts["command"] = f"python {name}.py --config CONFIG  (the settings below)"
        stamp = re.search(r"__(\d{9,})$", folder.name)  # not config.yaml, which every resume writes again
        started = float(stamp[1]) if stamp else (folder / "config.yaml").stat().st_mtime
        seconds = (folder / "metrics.jsonl").stat().st_mtime - started
    return {
        "run": folder.name,
        "task": task,
        "script": script,
        "seed": seed,
        "frames": read_metrics(folder)[1],
        "total_steps": total,
        "command": args.command or facts["command"],
        "hardware": args.hardware or facts["hardware"],
        "commit": args.commit or facts["commit"],
        "versions": facts["versions"],
        "starts": len(attempts) or None,
        "wall_seconds": round(seconds, 1),
        "recorded": recorded,
    }


def export(args):
    out = Path(args.out)
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: expected a name that ends in .csv")
    folders = list(dict.fromkeys(f for path in args.inputs for f in chosen_folders(Path(path), tell=True)))
    rows = sorted(load(folders, args.bin, unfinished=True))
    if not rows:
        raise InputError(f"no returns in {', '.join(map(str, folders))}")
    configs = [read_yaml(folder / "config.yaml") for folder in folders]
    local = ("config", "resume", "evaluate")  # paths of the machine that trained
    common = {k: v for k, v in configs[0].items() if k not in local and all(c.get(k) == v for c in configs)}
    runs = []
    for folder, config in zip(folders, configs, strict=True):
        own = {k: v for k, v in config.items() if k not in common and k not in local}
        runs.append({**provenance(folder, args), "config": own})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row._replace(value=f"{row.value:.6g}") for row in rows)
    write(out.with_suffix(".json"), json.dumps({"common_config": common, "runs": runs}, indent=1) + "\n")
    write(out, text.getvalue())
    print(f"{out}: {len(rows)} rows of {len(folders)} runs")


# FIGURES


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is not installed: pip install -r benchmark/requirements.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#ececec", "axes.axisbelow": True, "legend.frameon": False,
    })  # fmt: skip
    return plt


def save(figure, path):
    with replacing(path) as name:
        # No software version inside: the same curves give the same bytes.
        figure.savefig(
            name, dpi=130 if figure.get_figheight() < 10 else 90, facecolor="white", metadata={"Software": None}
        )
    pyplot().close(figure)
    print(path)
    return Path(path)


def mean_and_range(seeds, points=60):
    """Frames, mean, lowest and highest seed, from the first frame to the last one that all seeds reached."""
    start, end = max(steps[0] for steps, _ in seeds.values()), min(steps[-1] for steps, _ in seeds.values())
    if start >= end:
        return None
    edges = np.linspace(start, end, points + 1)
    curves = []
    for steps, returns in seeds.values():
        ends = np.setdiff1d([start, end], steps)  # where a seed has no value, the one between its neighbours
        inside = (start <= steps) & (steps <= end)
        returns = np.r_[returns[inside], np.interp(ends, steps, returns)]
        steps = np.r_[steps[inside], ends]
        # The mean in each interval, so that a long noisy series is smoothed and a short one is left as it is.
        index = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, points - 1)
        filled = np.unique(index)
        x, y = ([values[index == i].mean() for i in filled] for values in (steps, returns))
        curves.append(np.interp(edges, x, y))
    return edges, np.mean(curves, 0), np.min(curves, 0), np.max(curves, 0)


def official_curve(curve, width, right):
    """Frames, mean, lowest and highest seed up to the frame `right`, each figure in the middle of its frames."""
    ends = curve[0]
    middle = np.where(ends < width, ends, ends - width / 2)  # V1's first is one evaluation
    # Cut at the right edge: what lies beyond it would still stretch the y axis.
    edge = [right] if middle[0] <= right < middle[-1] else []
    frames = np.r_[middle[middle < right], edge]
    return frames, *(np.interp(frames, middle, values) for values in curve[1:])


def legend_below(figure, columns):
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: not label.startswith("ours"))
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns, fontsize=8)


def draw_curves(script, groups, official, floors, repeats, out, full=False):
    plt = pyplot()
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = max(6, 3 * columns), 2.3 * lines + 0.6
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (group, (kind, seeds)) in zip(axes.flat, groups.items(), strict=False):
        reference = official.get(group[:2])
        right = 1.05 * max(steps[-1] for steps, _ in seeds.values())
        if reference is not None:
            right = max(right, reference[0][-1]) if full else right
            frames, mean, low, high = official_curve(reference, published(group)[0], right)
            axis.fill_between(frames / 1e6, low, high, color=THEIRS, alpha=0.2, linewidth=0)
            axis.plot(frames / 1e6, mean, color=THEIRS, linewidth=1.5, label="official: mean and range")
        if (floor := floor_of(group, floors, repeats)[1]) is not None:
            axis.axhline(floor, color=FLOOR, linewidth=1, linestyle=":", label="random policy")
        for steps, returns in seeds.values():
            axis.plot(steps / 1e6, returns, color=OURS, linewidth=0.6, alpha=0.25)
        if curve := mean_and_range(seeds):
            frames, mean, low, high = curve
            axis.fill_between(frames / 1e6, low, high, color=OURS, alpha=0.2, linewidth=0)
            axis.plot(frames / 1e6, mean, color=OURS, linewidth=1.8, label="ours: mean and range")
        else:
            points = [(steps[-1] / 1e6, returns[-1]) for steps, returns in seeds.values()]
            axis.plot(*zip(*points, strict=True), "o", color=OURS, markersize=4, label="ours: one point a seed")
        many = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
        axis.set_title(re.sub("^(dmc|atari)_", "", group.task), loc="left")
        axis.set_title(f"{many}, {kind}", loc="right", fontsize=7, color="#777777")
        axis.set_xlim(0, right / 1e6)
    figure.suptitle(script, x=0.01, ha="left", fontweight="bold")
    for axis in axes[:, 0]:
        axis.set_ylabel("return")
    for axis in axes.flat[max(0, len(groups) - columns) : len(groups)]:
        axis.set_xlabel("million frames")
    legend_below(figure, 3)
    return save(figure, Path(out, f"curves_{script}.png"))


def human_normalised(scores):
    """[(score, ours per seed, ours per seed over the span, official mean there or None)] for the Atari games.

    0 is a random policy, 1 a human player.
    """
    known, out = read_normalizers(), []
    for entry in scores:
        floor, human = known.get(entry.group.task, (math.nan,) * 2)
        if not math.isnan(human):
            means = entry.official[:1] if entry.official else ()
            values = entry.seeds.values(), entry.there.values(), means
            ours, there, official = ([(value - floor) / (human - floor) for value in some] for some in values)
            out.append((entry, ours, there, official[0] if official else None))
    return out


def draw_atari(scores, out):
    # Each game over the frames compared, or, where there are none, at the end.
    entries = [(entry, there or ours, theirs) for entry, ours, there, theirs in human_normalised(scores)]
    if not entries:
        return None
    plt = pyplot()
    entries.sort(key=lambda entry: np.mean(entry[1]))
    figure, axis = plt.subplots(figsize=(6.5, 0.32 * len(entries) + 1.4), layout="constrained")
    for y, (_, ours, theirs) in enumerate(entries):
        axis.barh(y, np.mean(ours), 0.6, color=OURS, alpha=0.7, label="ours: mean of the seeds")
        axis.plot(ours, [y] * len(ours), "o", color="#5c1420", markersize=3, label="ours: each seed")
        if theirs is not None:
            axis.plot([theirs] * 2, [y - 0.4, y + 0.4], color="#444444", linewidth=2, label="official, these frames")
    axis.axvline(1, color=FLOOR, linewidth=1, linestyle=":", label="human player")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1)  # games differ by factors of a hundred
    values = [value for _, ours, theirs in entries for value in [*ours, theirs] if value is not None]
    axis.set_xticks([-1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200])
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_xlim(min(-0.02, 1.1 * min(values)), max(1.1, 1.1 * max(values)))
    axis.set_ylim(-0.7, len(entries) - 0.3)
    axis.grid(axis="y", visible=False)
    frames = [" to ".join(f"{frame / 1e6:.3g}" for frame in e.span or [e.frames]) for e, *_ in entries]
    names = [f"{e.group.task.removeprefix('atari_')}, {f}M" for f, (e, *_) in zip(frames, entries, strict=True)]
    several = len({e.group.script for e, *_ in entries}) > 1
    names = [f"{n} ({e.group.script})" if several else n for n, (e, *_) in zip(names, entries, strict=True)]
    axis.set_yticks(range(len(entries)), names)
    axis.set_xlabel("human-normalised score\n(0: random policy, 1: human player)")
    legend_below(figure, 4)
    return save(figure, Path(out, "atari_human_normalised.png"))


def aggregate(scores):
    """[(script, suite, tasks, seeds, IQM, low, high)] where tasks of three seeds and more have values for quartiles."""
    suites = defaultdict(list)
    for entry, ours, *_ in human_normalised(scores):
        suites[entry.group.script, "Atari, human-normalised"].append(ours)
    for entry in scores:
        if entry.group.task.startswith("dmc_"):
            suites[entry.group.script, "DMC, return / 1000"].append([v / 1000 for v in entry.seeds.values()])
    out = []
    for (script, suite), every in sorted(suites.items()):
        tasks = [values for values in every if len(values) > 2]  # one or two seeds say nothing about the spread
        seeds = min(map(len, tasks), default=0)  # rliable wants a full matrix
        if seeds * len(tasks) >= 4:
            matrix = np.array([values[:seeds] for values in tasks]).T
            out.append((script, suite, f"{len(tasks)} of {len(every)}", seeds, *iqm(matrix)))
    return out


def figures(paths, args):
    rows, official, by_script = load(paths), read_official(), defaultdict(dict)
    for group, entry in by_group(rows, args.kind).items():
        by_script[group.script][group] = entry
    if not by_script:
        raise InputError(f"no returns (--kind {args.kind}) in {', '.join(map(str, paths))}")
    known = official, read_floors(), read_repeats(paths)
    drawn = [draw_curves(s, groups, *known, args.figures, args.full) for s, groups in by_script.items()]
    return [path for path in [*drawn, draw_atari(last_scores(rows, official, args.kind), args.figures)] if path]


# TABLES


def markdown(header, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def digits(value):
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(mean, low, high):
    return f"{digits(mean)} ({digits(low)} to {digits(high)})"


def of_seeds(values):
    return spread(np.mean(values), min(values), max(values)) if len(values) > 1 else digits(values[0])


def frames_compared(entry):
    return "{:,.0f} to {:,.0f}".format(*entry.span) if entry.span else "-"


def tables(paths, kind, with_iqm=True):
    floors, repeats = read_floors(), read_repeats(paths)
    scores = last_scores(load(paths), read_official(), kind, repeats)
    if not scores:
        raise InputError(f"no returns (--kind {kind}) in {', '.join(map(str, paths))}")
    lines = []
    for entry in scores:
        values, (repeat, floor) = list(entry.seeds.values()), floor_of(entry.group, floors, repeats)
        there = list(entry.there.values())
        lines.append([
            entry.group.task, entry.group.script, str(repeat), str(len(values)), entry.kind, f"{entry.frames:,}",
            of_seeds(values), "-" if floor is None else digits(floor), frames_compared(entry),
            of_seeds(there) if there else "-", spread(*entry.official) if entry.official else "-", entry.verdict,
        ])  # fmt: skip
    header = ["task", "script", "action repeat", "seeds", "kind", "frames", "return: mean (range)", "random policy"]
    header += ["compared over frames", "ours there", "official there", "against official"]
    parts = [markdown(header, lines)]
    if atari := human_normalised(scores):
        lines = []
        for entry, ours, there, official in atari:
            values = (f"{np.mean(there):.2f}", f"{official:.2f}") if there else "--"
            cells = entry.group.task, entry.group.script, f"{entry.frames:,}", f"{np.mean(ours):.2f}"
            lines.append([*cells, frames_compared(entry), *values])
        header = ["game", "script", "frames", "human-normalised", *header[-4:-1]]
        parts.append(markdown(header, lines))
    if with_iqm and (groups := aggregate(scores)):
        lines = [[s, suite, tasks, str(n), f"{m:.3f} ({a:.3f} to {b:.3f})"] for s, suite, tasks, n, m, a, b in groups]
        header = ["script", "suite", "tasks", "seeds", "interquartile mean (95% bootstrap interval)"]
        parts.append(markdown(header, lines))
    return parts


def measured_with(paths):
    lines = []
    for path in paths:
        sidecar = Path(path).with_suffix(".json")
        if not sidecar.exists():
            raise InputError(f"{path}: no {sidecar.name} beside it to say how it was measured")
        try:
            runs = json.loads(sidecar.read_text())["runs"]
            hours = [run["wall_seconds"] / 3600 for run in runs]
            unique = [", ".join(sorted({str(run[key] or "-") for run in runs})) for key in ("hardware", "commit")]
            command = runs[0]["command"]
        except (ValueError, KeyError, TypeError, IndexError):
            raise InputError(f"{sidecar}: not what `plot.py export` writes") from None
        low, high = (f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in (min(hours), max(hours)))
        time = low if low == high else f"{low} to {high}"
        lines.append([Path(path).name, str(len(runs)), time, *unique, f"`{command}`"])
    return markdown(["results", "runs", "hours a run", "hardware", "commit", "command of the first run"], lines)


def result_files(folder):
    paths = sorted(
        path for path in glob.glob(f"{glob.escape(str(folder))}/*.csv") if not path.endswith("random_scores.csv")
    )
    if not paths:
        raise InputError(f"{folder}: no results (*.csv) in it")
    return paths


def readme(args):
    path = Path(args.readme)
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if [text.count(marker) for marker in MARKERS] != [1, 1] or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise InputError(f"{path}: expected one {MARKERS[0]} and, after it, one {MARKERS[1]}")
    files = result_files(args.results)
    folded = "<details><summary>How each curve was made: hours, hardware, commit, command</summary>"
    written = [*tables(files, args.kind, not args.no_iqm), folded, measured_with(files), "</details>"]
    images = [os.path.relpath(image, path.absolute().parent) for image in figures(files, args)]
    parts = ["<!-- written by `python benchmark/plot.py readme`: do not edit -->"]
    parts += [*(f"![{Path(image).stem}]({image})" for image in images), *written]
    before, after = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
    section = "\n\n".join([MARKERS[0], *parts, MARKERS[1]])
    write(path, before + section + after)
    print(path)


# RANDOM POLICY


def random_returns(env_id, episodes, seed, repeat, sticky):
    """Returns of uniformly random actions, each held for `repeat` frames; nothing is rendered."""
    suite, _, name = env_id.rpartition(":")[2].partition("/")
    generator = np.random.default_rng(seed)
    if suite in ("dmc", "dm_control"):
        os.environ["MUJOCO_GL"] = "disabled"
        from dm_control import suite as dmc

        domain, _, task = re.sub(r"-v\d+$", "", name).partition("-")
        try:
            env = dmc.load(domain, task, task_kwargs={"random": seed})
        except ValueError as error:
            raise InputError(f"{env_id}: {error}") from None
        spec = env.action_spec()
        for _ in range(episodes):
            total, step, frame = 0.0, env.reset(), 0
            while not step.last():
                if frame % repeat == 0:
                    action = generator.uniform(spec.minimum, spec.maximum)
                step = env.step(action)
                total, frame = total + step.reward, frame + 1
            yield total
        return
    import gymnasium as gym

    atari = task_name(env_id)
    try:
        if atari.startswith("atari_"):
            import ale_py

            gym.register_envs(ale_py)
            game = "".join(word.capitalize() for word in atari.removeprefix("atari_").split("_"))
            game = {"JamesBond": "Jamesbond"}.get(game, game)
            env = gym.make(
                f"ALE/{game}-v5", obs_type="ram", frameskip=repeat, repeat_action_probability=sticky,
                max_num_frames_per_episode=108_000,
            )  # fmt: skip
            hold = 1
        else:
            env, hold = gym.make(env_id), repeat
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"{env_id}: {' '.join(str(error).split())}") from None
    env.action_space.seed(seed)
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        total, over = 0.0, False
        while not over:
            action = env.action_space.sample()
            for _ in range(hold):
                _, reward, terminated, truncated, _ = env.step(action)
                total, over = total + float(reward), terminated or truncated
                if over:
                    break
        yield total


def measure_random(args):
    if not 0 <= args.sticky <= 1:
        raise InputError(f"--sticky {args.sticky} is no probability")
    path, rows = Path(args.out), {}
    if path.exists():
        for row in read_csv(path, RANDOM_COLUMNS):
            rows[row["env_id"], int(number(row["action_repeat"], path))] = row
    for env_id in args.env_ids:
        repeat = args.action_repeat or usual_repeat(task_name(env_id))
        returns = list(random_returns(env_id, args.episodes, args.seed, repeat, args.sticky))
        values = (env_id, str(repeat), f"{np.mean(returns):.4f}", f"{np.std(returns):.4f}", str(args.episodes))
        rows[env_id, repeat] = dict(zip(RANDOM_COLUMNS, values, strict=True))
        print(*values, flush=True)
        head = "# returns of uniformly random actions, by benchmark/plot.py random"
        lines = [",".join(rows[key][column] for column in RANDOM_COLUMNS) for key in sorted(rows)]
        text = [head, ",".join(RANDOM_COLUMNS), *lines]
        write(path, "\n".join(text) + "\n")


# COMMAND LINE


def parse(argv):
    parser = Parser("plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="export|curves|table|readme|random", parser_class=Parser)

    def command(name, function, about):
        sub = commands.add_parser(name, help=about, description=about, prog="plot.py")
        sub.set_defaults(function=function)
        return sub

    sub = command("export", export, "run folders to one CSV, with a .json that says how they were made")
    sub.add_argument("inputs", nargs="+", help="run folders, or folders that hold some")
    sub.add_argument("--out", required=True)
    sub.add_argument(
        "--bin", type=whole(0), help="average training returns over so many frames (0: no; default: 10000, at most 1%%)"
    )
    for name in ("command", "hardware", "commit"):
        sub.add_argument(f"--{name}", help="for runs that run.py did not start")
    for name, function, about in (
        ("curves", lambda args: figures(args.inputs or result_files(args.results), args), "draw the figures"),
        ("table", show_tables, "print the tables"),
        ("readme", readme, "rewrite the figures and tables of README.md"),
    ):
        sub = command(name, function, about)
        if name != "readme":
            sub.add_argument("inputs", nargs="*", help="CSV files and run folders (default: all of --results)")
        sub.add_argument("--results", default=HERE / "results", help="folder of the CSV files")
        sub.add_argument("--kind", choices=("auto", "eval", "train"), default="auto")
        if name != "table":
            sub.add_argument("--out", dest="figures", default=HERE / "figures", help="folder of the PNGs")
            sub.add_argument("--full", action="store_true", help="show the official curve beyond our last frame")
        if name != "curves":
            sub.add_argument("--no-iqm", action="store_true", help="leave out what needs rliable")
    sub.add_argument("--readme", default=HERE.parent / "README.md")
    sub = command("random", measure_random, "measure what a random policy scores")
    sub.add_argument("--env-ids", nargs="+", required=True)
    sub.add_argument("--episodes", type=whole(1), default=10)
    sub.add_argument("--seed", type=whole(0), default=0)
    sub.add_argument("--action-repeat", type=whole(1), help="frames an action is held (default: Atari 4, else 2)")
    sub.add_argument("--sticky", type=float, default=0.25, help="Atari: chance that the last action is repeated")
    sub.add_argument("--out", default=HERE / "results" / "random_scores.csv")
    return parser.parse_args(argv)


def show_tables(args):
    print("\n\n".join(tables(args.inputs or result_files(args.results), args.kind, not args.no_iqm)))


def main():
    args = parse(sys.argv[1:])
    args.function(args)


if __name__ == "__main__":
    run_tool(main)

"""Does it learn as the published agent does? Compare our mean over seeds with the range of the official seeds.

    python benchmark/gate.py                             # every CSV in benchmark/results/
    python benchmark/gate.py runs/* benchmark/results/pong.csv

A published figure is a mean over the frames up to its frame count. Each whose frames all seeds of a task have filled is
compared with their mean over the same frames, where the action repeat is the published one. Exit code: 0 none is under,
1 one is, 2 bad input.
"""

import argparse
import sys

import numpy as np
from plot import HERE, all_scores, digits, frames_compared, load, read_official, read_repeats, result_files
from run import InputError, Parser, run_tool


def main(argv):
    parser = Parser("gate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="CSV files and run folders (default: benchmark/results/*.csv)")
    parser.add_argument("--kind", choices=("auto", "eval", "train"), default="auto", help="which returns count")
    parser.add_argument("--unfinished", action="store_true", help="judge runs that have not reached their total_steps")
    args = parser.parse_args(argv)
    paths = args.inputs or result_files(HERE / "results")
    groups = all_scores(load(paths, unfinished=args.unfinished), read_official(), args.kind, read_repeats(paths))
    scores = [entry for scores in groups for entry in scores]
    if not any(entry.verdict in ("under", "inside", "above") for entry in scores):
        raise InputError("nothing to judge: no finished run of a task and frame count with published scores")
    lines = [("task", "script", "kind", "seeds", "over frames", "ours", "low", "mean", "high", "verdict")]
    for entry in scores:
        mean, low, high = map(digits, entry.official) if entry.official else "---"
        ours = digits(np.mean(list(entry.there.values()))) if entry.there else "-"
        group = (entry.group.task, entry.group.script, entry.kind, str(len(entry.seeds)), frames_compared(entry))
        lines.append((*group, ours, low, mean, high, entry.verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 1 if any(entry.verdict == "under" for entry in scores) else 0


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))

"""Watches a long run from outside: memory, open files and frames per CPU second, a sample every half minute.

    python benchmark/long_run.py --pid PID --run-dir runs/RUN --hours 2 --out long_run.csv

Linux only (it reads /proc), and of the main process only; its memory is without the replay's pages. The slopes printed
at the end, or after Ctrl-C, are those of a straight line through the samples after the first `--warm-up` minutes, in
percent of their mean an hour.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from run import InputError, Parser, replacing, run_tool

COLUMNS = ("hours", "frame", "rss_mib", "open_files", "cpu_seconds")


def sample(pid, run_dir, start):
    """One row of the CSV."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    anonymous = int(status["RssAnon"].split()[0]) / 1024  # the replay's mapped pages belong to the page cache
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return round((time.time() - start) / 3600, 4), json.loads(lines[-1])["step"], round(anonymous, 1), files, cpu


def slope(hours, values):
    """Percent of the mean an hour."""
    return 100 * np.polyfit(hours, values, 1)[0] / np.mean(values)


def watch(parser, options, rows):
    """Takes a sample every half minute, until the time is up or the run is over."""
    start = time.time()
    while time.time() - start < options.hours * 3600 and Path(f"/proc/{options.pid}").exists():
        # It ended meanwhile (KeyError: and its parent does not know yet), or writes its first line.
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            rows.append(sample(options.pid, options.run_dir, start))
        try:
            with replacing(options.out) as name, open(name, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        except (InputError, OSError) as error:
            if not rows:
                parser.error(str(error))
            print(f"cannot write yet: {error}", file=sys.stderr)
        time.sleep(30)


def main():
    parser = Parser("long_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not Path(f"/proc/{options.pid}").exists():
        parser.error(f"--pid {options.pid}: there is no such process")
    if not (options.run_dir / "metrics.jsonl").is_file():
        parser.error(f"--run-dir {options.run_dir}: no run folder with a metrics.jsonl")
    if options.out.exists():
        parser.error(f"--out {options.out} is there already: give another name")
    if not options.hours > 0:
        parser.error("--hours must be greater than 0")
    rows = []
    with contextlib.suppress(KeyboardInterrupt):
        watch(parser, options, rows)
    data = np.array([row for row in rows if row[0] * 60 > options.warm_up], float)
    if len(data) < 3:
        parser.error("too few samples after the warm-up")
    hours, frames, memory, files, cpu = data.T
    speed = np.diff(frames) / np.diff(cpu)
    print(f"{hours[0]:.2f} to {hours[-1]:.2f} hours, frames {frames[0]:.0f} to {frames[-1]:.0f}")
    print(f"its own memory {memory.min():.0f} to {memory.max():.0f} MiB, slope {slope(hours, memory):+.2f}% an hour")
    print(f"open files {files.min():.0f} to {files.max():.0f}, slope {slope(hours, files):+.2f}% an hour")
    mean = (frames[-1] - frames[0]) / (cpu[-1] - cpu[0])
    print(f"frames per CPU second {mean:.1f}, slope {slope(hours[1:], speed):+.2f}% an hour")


if __name__ == "__main__":
    run_tool(main)

"""Watches a long run from outside: resident memory, open files and frames per CPU second, a sample every half minute.

    python benchmark/long_run.py --script dreamer_v2_atari.py --hours 2 --out long_run.csv -- FLAGS

What follows `--` goes to the script. Linux only (it reads /proc). The slopes printed at the end are those of a straight
line through the samples after the first `--warm-up` minutes, in percent of their mean an hour.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS = ("hours", "frame", "rss_mib", "open_files", "cpu_seconds")


def sample(pid, run_dir, start):
    """One row of the CSV, or None before the first log line."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines() if run_dir else []
    if not lines:
        return None
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    anonymous = int(status["RssAnon"].split()[0]) / 1024  # the replay's mapped pages belong to the page cache
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return round((time.time() - start) / 3600, 4), json.loads(lines[-1])["step"], round(anonymous, 1), files, cpu


def slope(hours, values):
    """Percent of the mean an hour."""
    return 100 * np.polyfit(hours, values, 1)[0] / np.mean(values)


def main():
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words[:cut])
    start, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log.txt", "w") as log:
        command = [sys.executable, str(options.script.resolve()), *words[cut + 1 :]]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while process.poll() is None and time.time() - start < options.hours * 3600:
            time.sleep(30)
            run_dir = next((path.parent for path in Path(folder).glob("runs/*/metrics.jsonl")), None)
            if process.poll() is None and (row := sample(process.pid, run_dir, start)):
                rows.append(row)
                with open(options.out, "w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        process.send_signal(signal.SIGTERM)
        if process.wait() != 0:
            sys.exit(Path(log.name).read_text()[-2000:])
    data = np.array([row for row in rows if row[0] * 60 > options.warm_up], float)
    hours, frames, memory, files, cpu = data.T
    speed = np.diff(frames) / np.diff(cpu)
    print(f"{hours[0]:.2f} to {hours[-1]:.2f} hours, frames {frames[0]:.0f} to {frames[-1]:.0f}")
    print(f"resident memory {memory.min():.0f} to {memory.max():.0f} MiB, slope {slope(hours, memory):+.2f}% an hour")
    print(f"open files {files.min():.0f} to {files.max():.0f}, slope {slope(hours, files):+.2f}% an hour")
    print(f"frames per CPU second {speed.mean():.1f}, slope {slope(hours[1:], speed):+.2f}% an hour")


if __name__ == "__main__":
    main()

"""Draws a trained agent: a GIF of it playing, a GIF and a PNG strip of its imagination (truth, model, error).

python benchmark/gifs.py dreamer_v2_continuous.py runs/<run> --out benchmark/figures
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from run import Parser, run_tool, whole

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("dreamer_v1_continuous.py", "dreamer_v2_atari.py", "dreamer_v2_continuous.py")
sys.path.insert(0, str(ROOT))


def main():
    parser = Parser("gifs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "figures")
    parser.add_argument(
        "--frames", type=whole(2), default=200, help="agent steps that the playing GIF shows, every other one"
    )
    options = parser.parse_args()
    script = importlib.import_module(options.script.removesuffix(".py"))
    try:
        args = script.load_config(options.run_dir / "config.yaml")
        agent = script.Dreamer.from_pretrained(options.run_dir)
        steps = np.load(options.run_dir / "replay" / "steps.npy", mmap_mode="r")
        script.probe_env(args)
        options.out.mkdir(parents=True, exist_ok=True)
    except (script.UserError, OSError, ValueError) as error:
        parser.error(str(error))

    rows, length = script.load_checkpoint(options.run_dir)["replay_rows"], args.train_seq_len
    if rows < length:
        parser.error(f"{options.run_dir} has stored {rows} steps; a sequence has {length}")
    starts = np.linspace(max(0, rows - max(1500, length)), rows - length, 6).astype(int)
    window = (starts + np.arange(length)[:, None]) % len(steps)  # (T, 6)
    fields = {
        name: script.torch.from_numpy(np.ascontiguousarray(steps[name][window, 0])) for name in script.Batch._fields
    }
    fields["is_first"][0] = True  # as in training
    video, imagined, observed = script.open_loop(agent, script.Batch(**fields))
    print(f"mean squared error of imagined frames {imagined:.5f}, of observed ones {observed:.5f}")

    name = f"{args.env_id.replace('/', '-')}_{script.__name__}"
    script.write_file(options.out / f"imagination_{name}.gif", script.gif(video, fps=10))
    # The strip shows one sequence: a column each for some steps, rows truth, model and error.
    shown = np.unique(np.linspace(0, length - 1, 12).astype(int))
    strip = np.concatenate([video[t, :, :64] for t in shown], 1)
    Image.fromarray(strip).save(options.out / f"imagination_{name}.png")
    returns, frames = script.evaluate(agent, dataclasses.replace(args, capture_video=True), 1, args.seed, stop=[])
    frames = frames[: options.frames : 2].repeat(2, 1).repeat(2, 2)
    script.write_file(options.out / f"playing_{name}.gif", script.gif(frames, fps=20))
    print(f"return of the episode shown: {returns[0]:.2f}")


if __name__ == "__main__":
    run_tool(main)

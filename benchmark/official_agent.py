"""Does our V2 agent learn as the official one does? Runs a script's training loop with the official agent in it.

    python benchmark/official_agent.py --script dreamer_v2_continuous.py -- --env-id tests.pixel_envs:DotSteer-v0 \\
        --config benchmark/configs/v2_continuous_dot.yaml --obs-embed-size 0 --reward-head mse

Environments, schedule, replay, batches, evaluations and logs are the script's. Networks, losses, optimizers and acting
are those of dreamerv2 2.2.0 from PyPI (but for one line that was mended after the release: `reinforce` takes no
gradient through the action), in float32 and at the sizes and settings of the script's flags. TensorFlow 2.15 runs them
on one thread in a virtual environment that is made on first use (`requirements-official.txt`; Python 3.9 to 3.11). The
official code has no two-hot rewards and no Linear after the encoder, so both must be off; its convolutions have ELU, as
ours. Its draws are not seeded. There are no checkpoints, whatever the script says when it is stopped. The run folder is
one like any other for plot.py, `<script>_official` being its `exp_name`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import subprocess
import sys
import types
from multiprocessing import Pipe, connection
from pathlib import Path

import numpy as np
import official_code
from run import InputError, Parser, run_tool

ROOT = Path(__file__).resolve().parents[1]
METRICS = {  # the loop's name: theirs
    "losses/image": "image_loss",
    "losses/reward": "reward_loss",
    "losses/discount": "discount_loss",
    "losses/kl": "model_kl",
    "losses/model": "model_loss",
    "losses/actor": "actor_loss",
    "losses/value": "critic_loss",
    "latents/prior_entropy": "prior_ent",
    "latents/post_entropy": "post_ent",
    "actor/entropy": "actor_ent",
}


def pack(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpack(data):
    return dict(np.load(io.BytesIO(data)))


def official_settings(args, discrete):
    """The flags of a V2 script by the official code's names."""
    if args.reward_head != "mse" or args.obs_embed_size:
        raise InputError("the official code has no two-hot rewards and no Linear: --reward-head mse --obs-embed-size 0")
    if args.action_noise:
        raise InputError("--action-noise is not what the official code's is: leave it at 0")
    layers = {"act": args.act, "norm": "layer" if args.layer_norm else "none"}
    parts = {"reward_head": "reward", "discount_head": "discount", "actor": "actor", "critic": "value"}
    heads = {part: layers | {"layers": getattr(args, f"{name}_layers")} for part, name in parts.items()}
    rates = {"model_opt": "model", "actor_opt": "actor", "critic_opt": "value"}
    adam = {"eps": args.adam_eps, "clip": args.grad_clip, "wd": args.weight_decay}
    return {
        "precision": 32,
        "rssm": layers | {"hidden": args.deter_size, "deter": args.deter_size, "stoch": args.stoch_size},
        "rssm.discrete": args.num_classes,
        "encoder.cnn_depth": args.cnn_depth,
        "decoder.cnn_depth": args.cnn_depth,
        **{part: head | {"units": args.units} for part, head in heads.items()},
        "actor.dist": "onehot" if discrete else args.actor_dist,
        **{part: adam | {"lr": getattr(args, f"{name}_learning_rate")} for part, name in rates.items()},
        "pred_discount": args.pred_discount,
        "grad_heads": ["decoder", "reward"] + ["discount"] * args.pred_discount,
        "loss_scales": {"kl": args.kl_loss_coeff, "discount": args.discount_scale},
        "kl": {"free": args.free_nats, "balance": args.kl_alpha},
        "clip_rewards": "tanh" if discrete else "identity",
        "discount": args.discount,
        "discount_lambda": args.td_lambda,
        "imag_horizon": args.imagine_horizon,
        "actor_grad": args.actor_grad,
        "actor_grad_mix": args.actor_grad_mix,
        "actor_ent": args.actor_entropy,
        "slow_target_update": args.slow_target_update,
    }


def serve(pipe, spec):
    """In the other environment, where there is no torch: answers batches with metrics, images with actions."""
    common, module = official_code.load(threads=1)
    config = official_code.settings(common, "atari" if spec["discrete"] else "dmc_vision", spec["settings"])
    actions = spec["actions"]
    space = types.SimpleNamespace(shape=(actions,), **({"n": actions} if spec["discrete"] else {}))
    image = types.SimpleNamespace(shape=(64, 64, spec["channels"]))
    agent = module.Agent(config, {"image": image}, {"action": space}, 0)
    official_code.mend_reinforce(agent._task_behavior)
    states = {}

    def act(image, is_first, mode):
        obs = {"image": image.transpose(0, 2, 3, 1), "is_first": is_first, "is_terminal": np.zeros_like(is_first)}
        obs["reward"] = np.zeros(len(image), np.float32)
        outputs, states[mode] = agent.policy(obs, states.get(mode), mode)
        return {"action": outputs["action"].numpy()}

    def learn(batch):
        batch = {key: np.ascontiguousarray(value.swapaxes(0, 1)) for key, value in batch.items()}
        metrics = agent.train(batch | {"image": batch["image"].transpose(0, 1, 3, 4, 2)})[1]
        return {name: metrics[theirs].numpy() for name, theirs in METRICS.items() if theirs in metrics}

    with contextlib.suppress(EOFError):
        while True:
            request = unpack(pipe.recv_bytes())
            mode = str(request.pop("mode", ""))
            pipe.send_bytes(pack(act(**request, mode=mode) if mode else learn(request)))


def put_in(script, ask):
    """Puts the official agent, which answers what it is asked, where the training loop has the script's own."""
    import torch

    class Learner:
        def __init__(self, agent, args, device):
            self.acting, self.updates, self.skipped = agent, 0, {}

        def __call__(self, batch):
            self.updates += 1
            fields = ("image", "action", "reward", "is_first", "is_terminal")
            return {k: torch.tensor(v) for k, v in ask({f: getattr(batch, f).numpy() for f in fields}).items()}

        def wait(self):
            pass

        def check_finite(self, metrics):
            pass

        def state_dict(self):
            return {}

    def fast_policy(agent, num_envs, noise=0.0, mode=False):
        def policy(image, state, is_first):
            answer = ask({"image": image, "is_first": is_first, "mode": np.array("eval" if mode else "train")})
            return torch.from_numpy(answer["action"]), state

        return policy

    script.Learner, script.fast_policy = Learner, fast_policy
    script.open_loop = lambda agent, batch: (np.zeros((1, 64, 64, 3), np.uint8), math.nan, math.nan)
    script.diagnose = lambda *_: {}
    script.save_checkpoint = lambda path, state: None


def main(argv):
    if argv[:1] == ["--worker"]:
        return serve(connection.Connection(int(argv[1])), json.loads(argv[2]))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = ["dreamer_v2_atari.py", "dreamer_v2_continuous.py"]
    parser.add_argument("--script", choices=scripts, required=True)
    parser.add_argument("--venv", type=Path, default=official_code.VENV)
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="the script's")
    options = parser.parse_args(argv)

    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(options.script.removesuffix(".py"))
    try:
        args = script.parse_args(options.flags)
        if args.resume or args.evaluate:
            raise InputError("there is nothing to resume or to evaluate: no checkpoints are written")
        discrete = not hasattr(args, "actor_dist")
        settings = official_settings(args, discrete)
        (channels, _, _), actions = script.probe_env(args)
        python = official_code.official_python(options.venv)
        if args.exp_name == script.Args().exp_name:
            args = dataclasses.replace(args, exp_name=f"{args.exp_name}_official")
        spec = {"discrete": discrete, "channels": channels, "actions": actions, "settings": settings}
        ours, theirs = Pipe()
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        command = [python, __file__, "--worker", str(theirs.fileno()), json.dumps(spec)]
        # A group of its own: Ctrl-C is for the loop, which ends the run in order.
        worker = subprocess.Popen(
            command, env=quiet, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )

        def ask(request):
            try:
                ours.send_bytes(pack(request))
                return unpack(ours.recv_bytes())
            except (EOFError, OSError):
                raise InputError("the official code failed, see above") from None

        try:
            theirs.close()
            put_in(script, ask)
            script.main(dataclasses.replace(args, cuda=False))
        finally:
            worker.kill()
            worker.wait()
    except script.UserError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))

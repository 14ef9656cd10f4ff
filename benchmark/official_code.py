"""The official DreamerV2 code: dreamerv2 2.2.0 from PyPI, with TensorFlow 2.15 in a virtual environment of its own."""

import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

from run import InputError

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".venv-official"


def official_python(folder):
    """The python of the official code's virtual environment, which is made unless it is there."""
    python, pip = folder / "bin" / "python", [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    complete = folder / "complete"  # an installation may have been interrupted
    if not complete.exists():
        if not python.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--venv {folder} is there but is no virtual environment")
        if not (3, 9) <= sys.version_info < (3, 12):
            raise InputError("TensorFlow 2.15 needs Python 3.9 to 3.11")
        print(f"installing the official code into {folder}", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", folder],
            [*pip, "-r", HERE / "requirements-official.txt"],
            [*pip, "--no-deps", "dreamerv2==2.2.0"],
        ):
            if subprocess.run(command, stdout=sys.stderr).returncode:
                raise InputError(f"this command failed: {' '.join(map(str, command))}; remove {folder} and try again")
        complete.touch()
    return python


def load(threads):
    """Called in that environment: its modules `common` and `agent`."""
    import numpy as np
    import tensorflow as tf
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    precision = importlib.import_module("tensorflow.keras.mixed_precision")
    precision.experimental = sys.modules["tensorflow.keras.mixed_precision.experimental"] = precision  # its name then
    np.bool = bool  # likewise
    (package,) = importlib.util.find_spec("dreamerv2").submodule_search_locations
    sys.path.insert(0, package)
    common = sys.modules["common"] = types.ModuleType("common")  # without the parts that need environments
    common.__path__ = [str(Path(package, "common"))]
    for part in ("config", "tfutils", "other", "dists", "nets", "replay"):
        names = vars(importlib.import_module(f"common.{part}"))
        vars(common).update({name: value for name, value in names.items() if not name.startswith("_")})
    return common, importlib.import_module("agent")


def settings(common, recipe, changes):
    """Its settings: the defaults, those of `recipe`, and `changes`."""
    from ruamel.yaml import YAML

    configs = YAML(typ="safe").load(Path(common.__path__[0]).with_name("configs.yaml").read_text())
    return common.Config(configs["defaults"]).update(configs[recipe]).update(changes)


def mend_reinforce(learner):
    """No gradient through the action, as in the official repository; the release on PyPI, which is older, has one."""
    import tensorflow as tf

    if learner.config.actor_grad == "reinforce":
        loss = learner.actor_loss
        learner.actor_loss = lambda seq, target: loss(seq | {"action": tf.stop_gradient(seq["action"])}, target)

"""Promises about bad input: it is told in one line that names the cause, with exit code 2, before anything is written
or changed; no file, however broken, gives another exception or runs code."""

import dataclasses
import io
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.running import SCRIPTS, contents, env_id, is_discrete, load, one_line, small, start, train

pytestmark = pytest.mark.timeout(300)

fuzz = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return load(request.param)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    return train(script, tmp_path_factory.mktemp(script.__name__), small(script, total_steps=100))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


def assert_refused(script, folder, flags, fragment):
    """`UserError` in one line that contains `fragment`, and not a byte in the folder is different afterwards."""
    before = contents(folder)
    with pytest.raises(script.UserError, match=f"(?i){fragment}") as refusal:
        train(script, folder, flags)
    assert one_line(str(refusal.value)) and len(str(refusal.value)) < 2000
    assert contents(folder) == before


# FLAGS


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--no-such-flag"], "no-such-flag.*--help"),
        (["--no-such-flag", "3"], "no-such-flag"),
        (["--total-step", "3"], "total-step, 3.*perhaps --total-steps\\?"),
        (["--discoun", "0.9"], "discoun, 0.9.*perhaps --discount( or|\\?)"),
        (["--cuda", "False"], "False.*--no-flag"),
        (["walker-walk"], "walker-walk"),
        (["--units"], "units"),
        (["--config"], "config.*expected 1 value"),
        (["--resume"], "resume.*expected 1 value"),
        (["--evaluate"], "evaluate.*expected 1 value"),
        (["--resume", "runs/a", "--config", "a.yaml"], "only one of"),
        (["--resume", "runs/a", "--evaluate", "runs/a"], "only one of"),
        (["--resume", 300 * "a"], "not a run folder"),
        (["--evaluate", 300 * "a"], "not a run folder"),
        (["--exp-name", "a\udcffb"], "UTF-8"),
        (["--seed", str(2**30)], "seed.*less than"),
        (["--units", "many"], "units"),
        (["--units", "2.5"], "units"),
        (["--units", ""], "units"),
        (["--resume", ""], "nothing after --resume:"),
        (["--resume=", "--seed", "1"], "nothing after --resume="),
        (["--evaluate="], "nothing after --evaluate="),
        (["--env-timeout", "1e7"], "env-timeout.*at most"),
        (["--units", "0"], "units.*at least 1"),
        (["--units", "-8"], "units.*-8"),
        (["--cuda", "perhaps"], "perhaps"),
        (["--precision", "float8"], "precision"),
        (["--actor-grad", "none"], "actor-grad"),
        (["--env-id"], "env-id"),
        (["--seed", "-1"], "seed.*-1"),
        (["--seed", "99999999999999999999999"], "seed"),
        (["--total-steps", "1" + 400 * "0"], "total-steps.*2\\*\\*53"),
        (["--replay-capacity", str(2**53)], "replay-capacity.*2\\*\\*53"),
        (["--num-envs", "0"], "num-envs.*at least 1"),
        (["--num-envs", "-1"], "num-envs"),
        (["--batch-size", "0"], "batch-size.*at least 1"),
        (["--train-seq-len", "0"], "train-seq-len.*at least [12]"),
        (["--train-seq-len", "401"], "train-seq-len.*replay"),
        (["--train-seq-len", "8", "--num-envs", "100"], "train-seq-len.*replay"),
        (["--replay-capacity", "0"], "replay-capacity"),
        (["--imagine-horizon", "1"], "imagine-horizon.*at least 2"),
        (["--stoch-size", "0"], "stoch-size"),
        (["--deter-size", "-1"], "deter-size"),
        (["--cnn-depth", "0"], "cnn-depth"),
        (["--action-repeat", "0"], "action-repeat"),
        (["--total-steps", "0"], "total-steps"),
        (["--collect-steps", "0"], "collect-steps"),
        (["--update-steps", "0"], "update-steps"),
        (["--scalar-freq", "0"], "scalar-freq"),
        (["--checkpoint-interval", "0"], "checkpoint-interval"),
        (["--eval-episodes", "0"], "eval-episodes"),
        (["--discount", "1.01"], "discount.*between 0 and 1"),
        (["--td-lambda", "2"], "td-lambda.*between 0 and 1"),
        (["--discount", "-0.1"], "discount"),
        (["--discount", "nan"], "discount.*nan.*finite"),
        (["--model-learning-rate", "nan"], "model-learning-rate.*nan"),
        (["--model-learning-rate", "inf"], "model-learning-rate.*inf"),
        (["--actor-learning-rate", "-1e-4"], "actor-learning-rate"),
        (["--value-learning-rate", "fast"], "value-learning-rate"),
        (["--free-nats", "-1"], "free-nats"),
        (["--action-noise", "inf"], "action-noise"),
        (["--grad-clip", "-100"], "grad-clip"),
        (["--env-timeout", "-1"], "env-timeout"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_refused(script, flags, fragment, tmp_path):
    assert_refused(script, tmp_path, small(script) + flags, fragment)


def test_an_empty_first_word_is_refused(script):
    with pytest.raises(script.UserError, match="nothing after the script's name"):
        script.parse_args(["", "--seed", "1"])


def test_each_number_must_be_finite_and_not_negative(script):
    for field in dataclasses.fields(script.Args):
        if field.type in (int, float):
            for bad in (-1, float("nan"), float("inf")):
                args = dataclasses.replace(script.Args(), **{field.name: bad})
                with pytest.raises(script.UserError, match=f"--{field.name.replace('_', '-')} {bad}"):
                    script.check_args(args)


SHARES = {"discount", "td_lambda", "actor_grad_mix", "kl_alpha", "weight_decay"}  # from 0 to 1, both included
POSITIVE = {"model_learning_rate", "actor_learning_rate", "value_learning_rate", "adam_eps", "grad_clip"}
MAY_BE_ZERO = {"seed", "seed_steps", "pretrain", "eval_every", "obs_embed_size"}
MAY_BE_ZERO |= {"reward_layers", "discount_layers", "value_layers", "actor_layers"}


def test_each_number_is_taken_up_to_its_bounds_and_not_beyond(script):
    shares = SHARES | ({"action_noise"} if is_discrete(script) else set())
    for name, kind in script.Args.__annotations__.items():
        if name in shares:
            good, bad = [0.0, 1.0], 1.001
        elif name in POSITIVE:
            good, bad = [1e-9, 1.0], 0.0
        elif kind is int:
            least = 2 if name in ("imagine_horizon", "train_seq_len") else int(name not in MAY_BE_ZERO)
            good, bad = [least + (name == "replay_capacity")], least - 1  # a replay must hold a sequence of 2
        else:
            continue
        for value in good:
            script.check_args(script.Args(**{"train_seq_len": 2} | {name: value}))
        with pytest.raises(script.UserError, match=f"--{name.replace('_', '-')} {bad} must"):
            script.check_args(script.Args(**{name: bad}))


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6])
def test_short_sequences_work_or_are_refused_at_once(script, length, tmp_path):
    flags = small(script, train_seq_len=length, total_steps=80, seed_steps=40, eval_every=80)
    try:
        script.parse_args(flags)
    except script.UserError as refusal:
        assert "train-seq-len" in str(refusal)
    else:
        run_dir = train(script, tmp_path, flags)
        assert script.load_checkpoint(run_dir)["counters"]["frames"] == 80


def test_a_run_that_ends_before_it_has_a_sequence_is_no_error(script, tmp_path):
    run_dir = train(script, tmp_path, small(script, total_steps=4, seed_steps=0, eval_every=2))
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 4


def test_help_is_no_error(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--help"])
    assert not end.value.code
    assert "--env-id" in capsys.readouterr().out


# YAML


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "holds no"),
        ("# only a comment\n", "holds no"),
        ("- units\n- 8\n", "holds no"),
        ("units", "holds no"),
        ("units: [", "cannot read"),
        ("units: 8\n  seed: 1\n", "cannot read"),
        ("\x00\x01", "cannot read"),
        (b"\xff\xfe\x00\xd8", "cannot read"),
        (b"PK\x03\x04\x80", "cannot read"),
        ("unitss: 8\n", "unknown key 'unitss'"),
        ("1: 8\n", "unknown key 1"),
        ("resume: runs/a\n", "may not set.*resume"),
        ("null: 8\n", "unknown key None"),
        ("[a]: 8\n", "cannot read|unknown key"),
        ("units: true\n", "units: True"),
        ("units: 2.5\n", "units: 2.5"),
        ("units: many\n", "units: 'many'"),
        ("units: [8]\n", r"units: \[8\]"),
        ("units: {a: 8}\n", "units: {'a': 8}"),
        ("units:\n", "units: None"),
        ("units: .inf\n", "units: inf"),
        ("units: 1e400\n", "units"),
        ("units: 2001-02-03\n", "units"),
        ("units: 0\n", "units.*at least 1"),
        ("model_learning_rate: fast\n", "model_learning_rate: 'fast'"),
        ("model_learning_rate: false\n", "model_learning_rate: False"),
        ("model_learning_rate: .nan\n", "model_learning_rate: nan"),
        ("discount: 1.5\n", "discount.*between 0 and 1"),
        ("cuda: 1\n", "cuda: 1"),
        ("cuda: 'no'\n", "cuda: 'no'"),
        ("exp_name: 7\n", "exp_name: 7"),
        ("env_id: [a]\n", "env_id"),
        ("precision: float8\n", "precision: 'float8'"),
        ("precision: [float32]\n", "precision"),
        ("when: 2001-99-99\n", "cannot read"),
        ("units: !!int ''\n", "cannot read"),
        ("units: !!float ''\n", "cannot read"),
        ("cuda: !!bool perhaps\n", "cannot read"),
        ("units: !!timestamp soon\n", "cannot read"),
        ("units: !!python/object/apply:os.mkdir [pwned]\n", "cannot read"),
        ("[" * 10_000, "cannot read"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_yaml_is_refused(script, text, fragment, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(script, tmp_path, ["--config", "recipe.yaml"], fragment)


@pytest.mark.parametrize("path", ["missing.yaml", "folder", "recipe.yaml/further", "nul\0byte"])
def test_a_yaml_file_that_cannot_be_opened_is_refused(script, path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "recipe.yaml").write_text("units: 8\n")
    assert_refused(script, tmp_path, ["--config", path], "cannot read.*")


def is_valid(script, path):
    """Whether the file gives `Args` that keep their types; anything but that or `UserError` fails the test."""
    try:
        args = script.load_config(path)
    except script.UserError as refusal:
        assert one_line(str(refusal))
        return False
    types = {"seed": int, "units": int, "discount": float, "cuda": bool, "env_id": str}
    assert all(type(getattr(args, name)) is kind for name, kind in types.items())
    return True


@fuzz
@given(data=st.binary(max_size=200))
def test_any_bytes_as_yaml_are_refused_or_valid(script, data, tmp_path):
    (tmp_path / "any.yaml").write_bytes(data)
    is_valid(script, tmp_path / "any.yaml")


VALUES = [
    *(
        "8",
        "8.0",
        "1e3",
        "1e-4",
        "-1",
        "0x1F",
        "0o17",
        "0b",
        "1_000",
        "1:30",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "9" * 5000,
    ),
    *(
        "true",
        "no",
        "~",
        "''",
        "'8'",
        "2001-02-03",
        "2001-02-30",
        "[1]",
        "{a: 1}",
        "&a [*a]",
        "*b",
        "!!set {a}",
        "!!omap [a]",
    ),
    *("!!int x", "!!int ''", "!!bool x", "!!float x", "!!binary é", "!!timestamp x", "!!null x", "!x 8", "!!pairs [1]"),
    *("|\n  text", ">-", "? a", "- a", "@", "`", "%", "\t", "\x85", "\ufeff", "float32", "bfloat16"),
]


@fuzz
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(
                ["units", "seed", "discount", "cuda", "env_id", "precision", "wandb_entity", "<<", "=", "? "]
            ),
            st.sampled_from(VALUES) | st.text(max_size=10),
        ),
        max_size=4,
    )
)
def test_any_values_in_yaml_are_refused_or_valid(script, lines, tmp_path):
    text = "\n".join(f"{key}: {value}" for key, value in lines)
    (tmp_path / "any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    is_valid(script, tmp_path / "any.yaml")


@fuzz
@given(data=st.data())
def test_what_is_saved_is_what_is_read(script, data, tmp_path):
    values = {}
    for field in dataclasses.fields(script.Args):
        if field.type in (int, float, bool, str) and data.draw(st.booleans()):
            kinds = {
                int: st.integers(0, 2**40),
                float: st.floats(0, 1e30),
                bool: st.booleans(),
                str: st.text(max_size=20),
            }
            values[field.name] = data.draw(kinds[field.type])
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(values or {"units": 8}))
    args = script.load_config(tmp_path / "any.yaml")
    assert all(getattr(args, name) == value for name, value in values.items())


# ENVIRONMENTS

ENVIRONMENTS = [
    ("NoSuchEnvironment-v0", "NoSuchEnvironment"),
    ("NoSuchSpace/Environment-v0", "NoSuchSpace"),
    ("CartPole-v99", "CartPole"),
    ("no_such_module:Environment-v0", "no_such_module"),
    ("tests.pixel_envs:NoSuchEnvironment-v0", "NoSuchEnvironment"),
    ("../../x", "x"),
    ("..", r"\.\."),
    ("", "env-id|cannot use"),
    (":", "cannot use|env-id"),
    ("/", "cannot use|env-id"),
    ("Pendulum", "cannot use.*ids: Pendulum-v1"),
    ("a b\nc", "cannot use"),
]
CONTINUOUS_ONLY = [
    ("dmc/walker-fly", "walker-fly.*walker-walk"),
    ("dmc/nobody-walk", "nobody-walk.*walker-walk"),
    ("dmc/", "dm_control has no task"),
    ("dm_control/walker", "dm_control has no task"),
    ("CartPole-v1", "Discrete.*needs.*dreamer_v2_atari.py"),
    ("ALE/Pong-v5", "discrete.*dreamer_v2_atari.py"),
    ("atari/pong", "discrete.*dreamer_v2_atari.py"),
    ("PongNoFrameskip-v4", "discrete.*dreamer_v2_atari.py"),
    ("Blackjack-v1", "Discrete.*needs|render"),
]
DISCRETE_ONLY = [
    ("Pendulum-v1", "Box.*needs.*dreamer_v2_continuous.py"),
    ("dmc/walker-walk", "continuous.*dreamer_v2_continuous.py"),
    ("ALE/NoSuchGame-v5", "NoSuchGame"),
    ("atari/no_such_game", "no_such_game"),
    ("NoSuchGameNoFrameskip-v4", "NoSuchGame"),
]
FAULTY = [
    ("TwoDimensional", r"\(2, 2\).*needs"),
    ("TextActions", "Text.*needs"),
    ("NoActions", r"\(0,\).*needs"),
    ("WholeActions", "int8.*needs"),
    ("Unbounded", "unbounded"),
    ("NoPicture", "render|rgb_array"),
    ("FloatPicture", "render.*uint8 image"),
    ("CannotBeMade", "OSError: libsimulator.so: cannot open shared object file"),
    ("CannotBeReset", "ValueError: no such level.*environment itself"),
    ("ExitsWhenMade", "SystemExit: 3"),
]
BOX_ONLY = {"TwoDimensional", "NoActions", "WholeActions", "TextActions", "Unbounded"}


@pytest.mark.filterwarnings("ignore")
def test_unsuitable_environments_are_refused_before_anything_is_created(script, tmp_path):
    cases = ENVIRONMENTS + (DISCRETE_ONLY if is_discrete(script) else CONTINUOUS_ONLY)
    for name, fragment in FAULTY:
        if not (is_discrete(script) and name in BOX_ONLY):
            cases.append((env_id(script, name, "tests.faulty_envs"), fragment))
    for name, fragment in cases:
        assert_refused(script, tmp_path, small(script, env_id=name), fragment)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/b\\c d", "..", "~", "-x", ". .", "naïve\n\x1b[31m"])
def test_names_of_runs_lead_nowhere_else(script, name, tmp_path):
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    run_dir = train(script, inner, [*small(script, total_steps=2, seed_steps=10), f"--exp-name={name}"])
    assert run_dir.parent == inner / "runs" and not run_dir.name.startswith((".", "-"))
    assert not set(run_dir.name) & set("/\\ \n\x1b~")
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and {path.name for path in inner.iterdir()} == {"runs"}


@pytest.mark.parametrize(
    ("flag", "fragment"), [("--exp-name=" + "x" * 300, "run folder.*too long"), ("--replay-capacity=10**15", "replay")]
)
def test_what_the_disk_cannot_hold_is_refused(script, flag, fragment, tmp_path):
    with pytest.raises(script.UserError, match=fragment):
        train(script, tmp_path, [*small(script), flag.replace("10**15", str(10**15))])
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("script", [name for name in SCRIPTS if "continuous" in name], indirect=True)
def test_missing_gl_libraries_are_told_with_what_to_install(script, tmp_path, monkeypatch):
    def nothing_there(name, *_):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(script, "ctypes", SimpleNamespace(CDLL=nothing_there))
    assert_refused(script, tmp_path, small(script, env_id="dmc/walker-walk"), "apt-get install.*libegl1 libgl1")


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("'NoneType' object has no attribute 'eglQueryString'"),
        AttributeError("'NoneType' object has no attribute 'glGetError'"),
        RuntimeError("an OpenGL platform library has not been loaded into this process"),
        ImportError("Cannot initialize a EGL device display"),
        ImportError("Unable to load OSMesa library"),
        RuntimeError("invalid value for environment variable MUJOCO_GL: foo"),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_errors_of_opengl_are_told_with_what_to_install(script, error, tmp_path, monkeypatch):
    def make_env(args):
        raise error

    monkeypatch.setattr(script, "make_env", make_env)
    assert_refused(script, tmp_path, small(script), "unset MUJOCO_GL, or apt-get install.*libegl1 libgl1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_without_cuda_goes_on_with_a_note(script, tmp_path, capsys):
    run_dir = train(script, tmp_path, small(script, total_steps=2, cuda=True))
    assert "no CUDA device" in capsys.readouterr().err
    assert script.load_checkpoint(run_dir)["counters"]["frames"] == 2
    train(script, tmp_path, small(script, total_steps=2, seed=2))
    assert "no CUDA device" not in capsys.readouterr().err


# RUN FOLDERS


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda path: None, "is not a run folder"),
        (lambda path: path.write_text("a file"), "is not a run folder"),
        (lambda path: path.mkdir(), "is not a run folder: it has no config.yaml"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("")), "config.yaml holds no"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("unitss: 8")), "unknown key 'unitss'"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("units: -8")), "units.*-8"),
        (lambda path: (path.mkdir(), (path / "config.yaml").mkdir()), "is not a run folder"),
    ],
    ids=["missing", "a file", "empty", "empty config", "unknown key", "negative size", "config is a folder"],
)
def test_what_is_no_run_folder_is_refused(script, flag, make, fragment, tmp_path):
    make(tmp_path / "run")
    assert_refused(script, tmp_path, [flag, "run"], fragment)


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def legacy(state):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


CHECKPOINTS = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a checkpoint",
    "truncated": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "with a flipped byte": lambda data: flip(data, len(data) // 2),
    "a pickle with code": lambda data: pickle.dumps(Code()),
    "a zipped pickle with code": lambda data: saved({"format": Code()}),
    "an old pickle with code": lambda data: legacy({"format": Code()}),
    "a tensor": lambda data: saved(torch.zeros(3)),
    "a list": lambda data: saved([1, 2]),
    "another program's": lambda data: saved({"model": {}, "step": 3}),
    "another script's": lambda data: saved({"format": "dreamer_v9_quantum 1", "agent": {}}),
    "an empty zip": lambda data: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_and_runs_no_code(script, kind, copy, tmp_path):
    path = copy / "checkpoint.pt"
    path.write_bytes(CHECKPOINTS[kind](path.read_bytes()))
    for flags in (["--evaluate", str(copy)], ["--resume", str(copy), "--total-steps", "120"]):
        assert_refused(script, tmp_path, flags, "checkpoint")
    with pytest.raises(script.UserError, match="checkpoint"):
        script.Dreamer.from_pretrained(copy)


def test_a_run_without_a_checkpoint_is_refused(script, copy, tmp_path):
    (copy / "checkpoint.pt").unlink()
    for flag in ("--resume", "--evaluate"):
        assert_refused(script, tmp_path, [flag, str(copy)], "has no checkpoint.pt")


@fuzz
@given(data=st.binary(max_size=200))
def test_any_bytes_as_a_checkpoint_are_refused(script, data, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(script.UserError) as refusal:
        script.load_checkpoint(tmp_path)
    assert one_line(str(refusal.value))


@fuzz
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_whole(script, data, finished, tmp_path):
    """Any byte changed, or the rest cut off. Not every byte counts: some lie between the parts of the archive."""
    whole = (finished / "checkpoint.pt").read_bytes()
    near_the_end = st.integers(len(whole) - 3000, len(whole) - 1)  # the archive's table of contents
    position = data.draw(st.integers(0, len(whole) - 1) | near_the_end)
    changed = flip(whole, position) if data.draw(st.booleans()) else whole[:position]
    (tmp_path / "checkpoint.pt").write_bytes(changed)
    try:
        state = script.load_checkpoint(tmp_path)
    except script.UserError as refusal:
        assert one_line(str(refusal))
    else:
        agent = script.load_checkpoint(finished)["agent"]
        assert all(torch.equal(state["agent"][name], value) for name, value in agent.items())


# RESUMING WITH WHAT DOES NOT FIT


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--deter-size", "9"], "other sizes"),
        (["--units", "9"], "other sizes"),
        (["--cnn-depth", "3"], "other sizes"),
        (["--value-layers", "1"], "other sizes"),
        (["--replay-capacity", "500"], "--replay-capacity 500"),
        (["--num-envs", "2"], "--num-envs 2"),
        (["--action-repeat", "3"], "--action-repeat 3"),
        (["--checkpoint-interval", "41"], "--checkpoint-interval 41"),
        (["--units", "-1"], "units"),
        (["--env-id", "NoSuchEnvironment-v0"], "NoSuchEnvironment"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resuming_with_flags_that_do_not_fit_leaves_the_run_as_it_was(script, flags, fragment, copy, tmp_path):
    assert_refused(script, tmp_path, ["--resume", str(copy), "--total-steps", "120", *flags], fragment)
    train(script, tmp_path, ["--resume", str(copy), "--total-steps", "104"])
    assert script.load_checkpoint(copy)["counters"]["frames"] == 104


def test_another_environment_or_kind_of_network_is_refused_beside_resume(script, copy, tmp_path):
    """They have the same sizes, so that nothing else would tell."""
    args = script.load_config(copy / "config.yaml")
    changes = [["--env-id", env_id(script, "CueMemory")]]
    if hasattr(args, "act"):
        changes.append(["--act", {"elu": "silu", "silu": "elu"}[args.act]])
    if hasattr(args, "actor_dist"):
        changes.append(["--actor-dist", "trunc_normal"])
    for flags in changes:
        assert_refused(script, tmp_path, ["--resume", str(copy), "--total-steps", "120", *flags], " ".join(flags))


def test_an_environment_of_other_actions_is_refused(script, copy, tmp_path):
    other = env_id(script, "TerminalGoal")
    assert_refused(script, tmp_path, ["--evaluate", str(copy), "--env-id", other], "another environment|actions")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(env_id(script), other))
    assert_refused(script, tmp_path, ["--resume", str(copy), "--total-steps", "120"], "another environment")


REPLAYS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not a replay"),
    "truncated": lambda path: os.truncate(path, 100_000),
    "of another kind": lambda path: np.save(path, np.zeros((3, 1))),
    "of another length": lambda path: np.save(path, np.load(path)[:-1]),
    "a pickle with code": lambda path: np.save(path, np.array([Code()]), allow_pickle=True),
    "with a flipped byte": lambda path: path.write_bytes(flip(path.read_bytes(), 20_000)),
    "with a flipped byte in its header": lambda path: path.write_bytes(flip(path.read_bytes(), 40)),
}


@pytest.mark.parametrize("kind", REPLAYS)
def test_a_bad_replay_is_refused(script, kind, copy, tmp_path):
    REPLAYS[kind](copy / "replay" / "steps.npy")
    assert_refused(script, tmp_path, ["--resume", str(copy), "--total-steps", "120"], "steps.npy")


# AS A USER SEES IT


def block_runs(folder):
    (folder / "runs").write_text("a file in the way")


def unmount_runs(folder):
    (folder / "runs").symlink_to(folder / "nothing")


def make_runs(folder):
    (folder / "runs").mkdir()


def break_yaml(folder):
    (folder / "recipe.yaml").write_text("units: [\n")


COMMANDS = {
    "unknown environment": (None, ["--env-id", "NoSuchEnvironment-v0"], "NoSuchEnvironment"),
    "unknown flag": (None, ["--no-such-flag", "3"], "--no-such-flag"),
    "missing value": (None, ["--units"], "--units"),
    "no run folder": (None, ["--resume", "runs/nothing"], "runs/nothing is not a run folder"),
    "broken YAML": (break_yaml, ["--config", "recipe.yaml"], "recipe.yaml"),
    "runs is a file": (block_runs, None, "run folder"),
    "runs leads nowhere": (unmount_runs, None, "run folder runs"),
    "runs is empty, and the disk too small": (make_runs, ["--replay-capacity", str(10**14)], "replay"),
    "out of memory": (None, ["--units", "1000000000000"], "out of memory"),
    "a name too long": (None, ["--exp-name", "x" * 300], "too long"),
    "an environment that warns": (None, ["--env-id", "Humanoid-v3"], "cannot use Humanoid-v3"),
    "no C++ compiler": (None, ["--compile-cpu", "--no-cuda"], "install g++"),
}


@pytest.fixture(scope="module")
def outcomes(script, tmp_path_factory):
    """All commands at once: exit code, stdout, stderr, and the folder before and after."""
    running, env = {}, {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    for name, (prepare, flags, _) in COMMANDS.items():
        folder = tmp_path_factory.mktemp("cwd")
        if prepare:
            prepare(folder)
        flags = flags if flags and "--replay-capacity" not in flags else [*small(script), *(flags or ())]
        running[name] = folder, contents(folder), start(script, folder, flags, env=env)
    outcomes = {}
    for name, (folder, before, process) in running.items():
        output, errors = process.communicate(timeout=100)
        outcomes[name] = process.returncode, output, errors, before, contents(folder)
    return outcomes


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_code_2_one_line_and_nothing_written(outcomes, name):
    code, output, errors, before, after = outcomes[name]
    assert code == 2 and output == ""
    assert errors.startswith("error: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    assert COMMANDS[name][2] in errors
    assert after == before

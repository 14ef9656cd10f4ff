"""The scripts repeat each other word for word, except where the algorithms differ. These are all the places."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
V1, ATARI, CONTINUOUS = "dreamer_v1_continuous", "dreamer_v2_atari", "dreamer_v2_continuous"
SCRIPTS = (V1, ATARI, CONTINUOUS)

ENVIRONMENTS = "games through ALE's native environment; the actions are discrete"
HEADS = "V2 chooses activation, norm and sizes by flags, and hands them over in args"
LATENTS = "Gaussian latents in V1, one-hot ones in V2"
EQUATION = "the number of the equation or section in its own paper"

BETWEEN_THE_V2_SCRIPTS = {
    "Args": "defaults, Atari's flags, the flag for the continuous actor's distribution",
    "check_args": "Atari's action_noise is a probability",
    "make_env": ENVIRONMENTS,
    "make_envs": ENVIRONMENTS,
    "group_sizes": ENVIRONMENTS,
    "step_envs": ENVIRONMENTS,
    "random_actions": "one-hot or uniform",
    "Actor.__init__": "as many outputs as its distribution has parameters",
    "Actor.forward": "the distribution",
    "draw_starts": "Atari gives priority to the ends of episodes",
    "world_model_loss": "games' rewards pass through tanh",
    "FORMAT": "the script's name",
    "action_metrics": "what a collapsed policy looks like",
    "diagnose": "what a collapsed policy looks like",
    "Dreamer.policy": "exploration by random actions or by additive noise",
}
BETWEEN_V1_AND_V2_CONTINUOUS = {
    "FORMAT": "the script's name",
    "Args": "the two algorithms' flags and defaults",
    "check_args": "the two algorithms' flags",
    "init_weights": "V1's GRU is PyTorch's, with orthogonal recurrent weights",
    "MLP": HEADS,
    "MLP.__init__": HEADS,
    "Actor.__init__": HEADS,
    "Actor.forward": "V1: tanh-normal with its own standard deviation; V2: by flag",
    "Encoder.__init__": HEADS,
    "Encoder.forward": "V1's convolutions are followed by ReLU",
    "Decoder.__init__": HEADS,
    "Decoder.forward": "V1's convolutions are followed by ReLU",
    "State": LATENTS,
    "State.feat": LATENTS,
    "RSSM": "equation and latents",
    "RSSM.__init__": LATENTS,
    "RSSM.initial": LATENTS,
    "RSSM.recur": "V2: optional LayerNorm, its own GRU",
    "RSSM.prior": LATENTS,
    "RSSM.posterior": LATENTS,
    "RSSM.imagine_step": LATENTS,
    "RSSM.observe_step": LATENTS,
    "RSSM.observe": LATENTS,
    "world_model_loss": "V1: one KL; V2: KL balancing, two-hot rewards",
    "imagine": EQUATION,
    "imagined_returns": "V1's start state has no return of its own; V2 has a slow critic",
    "lambda_return": EQUATION,
    "actor_loss": "V1's start state has no return of its own; V2 has a baseline and an entropy bonus",
    "critic_loss": EQUATION,
    "WorldModel.__init__": HEADS,
    "Dreamer.__init__": "V2 has a slow critic",
    "Dreamer.parameter_count": "V2's slow critic is not trained",
    "Learner.__init__": "V2 decays weights",
    "Learner.learn": "V2 copies the critic every 100 updates",
    "Learner.update": "the behaviour's alignment",
}


def parts(script: str) -> dict[str, str]:
    """Source text of each function, class and constant; a class without its methods, which follow as Class.method."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {}

    def span(node: ast.stmt) -> range:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        return range(first - 1, node.end_lineno)

    def text(node: ast.stmt, without: tuple = ()) -> str:
        return "\n".join(lines[i] for i in span(node) if lines[i] and not any(i in span(part) for part in without))

    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = tuple(method for method in node.body if isinstance(method, ast.FunctionDef))
            found[node.name] = text(node, without=methods)
            found |= {f"{node.name}.{method.name}": text(method) for method in methods}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target): text(node) for target in targets}
    return found


@pytest.fixture(scope="module")
def code():
    return {script: parts(script) for script in SCRIPTS}


@pytest.mark.parametrize(
    ("one", "other", "listed"),
    [(ATARI, CONTINUOUS, BETWEEN_THE_V2_SCRIPTS), (V1, CONTINUOUS, BETWEEN_V1_AND_V2_CONTINUOUS)],
    ids=["atari and continuous", "v1 and v2"],
)
def test_what_two_scripts_both_define_has_the_same_text_but_for_the_listed_names(code, one, other, listed):
    both = code[one].keys() & code[other].keys()
    assert len(both) > 80
    different = {name for name in both if code[one][name] != code[other][name]}
    assert sorted(different - listed.keys()) == [], "these differ and are not listed"
    assert sorted(listed.keys() - different) == [], "these are listed and do not differ"
    assert all(len(reason) > 5 for reason in listed.values())


def test_what_only_v1_and_atari_both_define_has_the_same_text(code):
    both = (code[V1].keys() & code[ATARI].keys()) - code[CONTINUOUS].keys()
    assert not {name for name in both if code[V1][name] != code[ATARI][name]}


def flags(script: str) -> dict[str, tuple[str, str]]:
    """Type and help text of each flag."""
    (args,) = (
        node for node in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(node, "name", "") == "Args"
    )
    fields = zip(args.body[::2], args.body[1::2], strict=True)  # a field, then its doc
    return {ast.unparse(field.target): (ast.unparse(field.annotation), doc.value.value) for field, doc in fields}


def test_a_flag_means_the_same_in_every_script_but_for_what_the_environments_differ_in():
    all_flags = [flags(script) for script in SCRIPTS]
    names = {name for one in all_flags for name in one}
    different = {name for name in names if len({one[name] for one in all_flags if name in one}) > 1}
    assert different == {"env_id", "action_noise", "stoch_size", "actor_entropy", "pred_discount"}


# THE READING ORDER

ORDER = (  # a landmark of each part, in the order in which a reader meets them
    "Args",
    "make_env",
    "Encoder",
    "RSSM",
    "Replay",
    "world_model_loss",
    "Dreamer",
    "Learner",
    "save_checkpoint",
    "main",
)
HEADINGS = (
    "ENVIRONMENTS, DISTRIBUTIONS AND NETWORKS, RSSM, REPLAY, LOSSES, AGENT, CHECKPOINT LOGGING EVALUATION, TRAINING"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_read_from_settings_over_environments_networks_and_losses_to_the_agent_and_main(script):
    names = [name for name in parts(script) if "." not in name]
    places = [names.index(name) for name in ORDER]
    assert places == sorted(places)
    assert names[0] == "Args" and names[-1] == "main"
    source = (ROOT / f"{script}.py").read_text()
    headings = [heading.replace(",", "") for heading in re.findall(r"^# ([A-Z][A-Z, ]+)$", source, re.MULTILINE)]
    assert headings == HEADINGS.split(", ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_function_uses_nothing_defined_below_it_but_in_quoted_types(script):
    """So that the file reads from top to bottom; the functions of one part may call each other in any order."""
    source = (ROOT / f"{script}.py").read_text()
    heads = [line for line, text in enumerate(source.splitlines(), 1) if re.fullmatch(r"# [A-Z][A-Z, ]+", text)]

    def part(line: int) -> int:
        return sum(head < line for head in heads)

    body = ast.parse(source).body
    defined = {node.name: node.lineno for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    below = [
        (node.name, name.id)
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and name.id in defined
        if part(defined[name.id]) > part(node.lineno)
    ]
    assert set(below) <= {("Dreamer", "load_checkpoint")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_nothing_of_the_project(script):
    own = {"tests", "benchmark"} | {
        path.stem for folder in (".", "tests", "benchmark") for path in ROOT.glob(f"{folder}/*.py")
    }
    modules = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module)
    assert modules and not {module.split(".")[0] for module in modules} & own


def test_the_number_of_lines_is_reported(capsys):
    with capsys.disabled():
        for script in SCRIPTS:
            print(f"\n{script}.py: {len((ROOT / f'{script}.py').read_text().splitlines())} lines", end="")

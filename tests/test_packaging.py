"""What the scripts promise about being run from a plain checkout: one list of exact pins, and a complete --help."""

import ast
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.running import ROOT, SCRIPTS, load

REQUIREMENTS = (ROOT / "requirements.txt").read_text().split()


def script_block(script: str) -> dict:
    """The inline metadata of PEP 723: what `uv run SCRIPT` and `pipx run SCRIPT` install."""
    source = (ROOT / f"{script}.py").read_text()
    (block,) = re.findall(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)
    return tomllib.loads(
        "".join(line.removeprefix("#").removeprefix(" ") for line in block[0].splitlines(keepends=True))
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_inline_metadata_is_requirements_txt(script):
    block = script_block(script)
    assert block["dependencies"] == REQUIREMENTS
    # dm_control requires labmaze, which has no wheel for newer ones: uv then takes 3.12.
    assert block["requires-python"] == (">=3.11" if script.endswith("atari") else ">=3.11,<3.13")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tools["tool"]["ruff"]["target-version"] == "py311"


def test_every_requirement_is_pinned_exactly_and_named_once():
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)+(;python_version<'3.13')?", line) for line in REQUIREMENTS)
    names = [requirement.partition("==")[0].lower() for requirement in REQUIREMENTS]
    assert len(names) == len(set(names))
    together = {"mujoco==3.17.0", "dm_control==1.0.50;python_version<'3.13'"}
    assert together <= set(REQUIREMENTS), "a dm_control works with one mujoco only"


def third_party(script: str) -> set[str]:
    """Top-level modules imported anywhere in the script that are not Python's own."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_everything_a_script_imports_is_required(script):
    providers = importlib.metadata.packages_distributions()
    required = {requirement.partition("==")[0].lower().replace("_", "-") for requirement in REQUIREMENTS}
    for module in third_party(script):
        if module in ("wandb", "dm_control") and module not in providers:
            continue  # needed with --track only; not required on Python 3.13
        names = {name.lower().replace("_", "-") for name in providers[module]}
        assert names & required, f"{module} comes with {names}, which is not required"


IMPORT_NAMES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml", "ale-py": "ale_py"}


def test_every_requirement_is_imported_by_a_script_or_wanted_by_an_environment():
    imported = set().union(*map(third_party, SCRIPTS))
    names = {requirement.partition("==")[0] for requirement in REQUIREMENTS}
    others = {name for name in names if IMPORT_NAMES.get(name, name) not in imported}
    assert others == {"mujoco", "imageio", "pygame-ce"}, "for dm_control and for Gymnasium's pictures"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_text_and_default(script, tmp_path):
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    environ = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr
    words = " ".join(re.sub(r"[│╭╰─╮╯]", " ", result.stdout).split())
    assert f"python {script}.py --env-id" in words
    (args,) = (
        node for node in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(node, "name", "") == "Args"
    )
    docs = [node.value.value for node in args.body if isinstance(node, ast.Expr)]
    fields = dataclasses.fields(load(script).Args)
    assert len(docs) == len(fields)
    for field, doc in zip(fields, docs, strict=True):
        assert f"--{field.name.replace('_', '-')}" in words, field.name
        assert " ".join(doc.split()) in words, field.name
    assert not list(tmp_path.iterdir()), "--help writes nothing"

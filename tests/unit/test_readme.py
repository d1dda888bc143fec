"""README's commands can be typed: every one parses as the program would parse it, its settings exist, its files are there.

What runs for real is in `tests/integration/test_readme.py`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from cluster.cli import Parser
from cluster.config import load
from data_prep.config import BuildConfig
from pipeline.config import PretrainConfig
from tests.data_folder import REPOSITORY
from tests.readme import Command, commands, parse

README = REPOSITORY / "README.md"
COMMANDS = commands(README)
OURS = [command for command in COMMANDS if command.box]
CONFIGS = {
    ("pipeline", "train"): PretrainConfig, ("pipeline", "ablate"): PretrainConfig, ("pipeline", "layout"): PretrainConfig,
    ("cluster", "plan"): PretrainConfig, ("data_prep", "build"): BuildConfig,
}  # fmt: skip
SHIPPED = sorted([*(REPOSITORY / "pipeline/runs").glob("*.yaml"), *(REPOSITORY / "data_prep/runs").glob("*.yaml")])


def label(command: Command) -> str:
    return f"{command.line}:{command.name}"


def test_readme_shows_every_path_of_a_first_hour() -> None:
    names = {command.name for command in COMMANDS}
    assert {
        "make",
        "data_prep catalog",
        "data_prep build",
        "pipeline train",
        "pipeline compare",
        "cluster submit",
    } <= names
    assert len(OURS) >= 30


@pytest.mark.parametrize("command", OURS, ids=label)
def test_the_program_takes_the_words(command: Command) -> None:
    assert command.box is not None
    known = importlib.import_module(f"{command.box}.__main__").COMMANDS
    assert command.words[3] in known, f"README.md:{command.line}: no command {command.name}"
    if not command.whole:
        return
    module = importlib.import_module(known[command.words[3]][0])
    parser = Parser(prog=command.name)
    module.add_arguments(parser)
    parse_words = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
    try:
        parse_words(command.arguments)
    except SystemExit:
        pytest.fail(f"README.md:{command.line}: {command.text}")


@pytest.mark.parametrize("command", OURS, ids=label)
def test_settings_and_files_exist(command: Command) -> None:
    configs = [word for word in command.arguments if re.fullmatch(r"(data_prep|pipeline|tests)/.*\.yaml", word)]
    for config in configs:
        assert (REPOSITORY / config).exists(), f"README.md:{command.line}: {config}"
    cls = CONFIGS.get((str(command.box), command.words[3]))
    if cls is None or not configs:
        return
    overrides = [word for word in command.arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)+=", word)]
    if command.words[3] == "ablate":  # a grid: its first values
        overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in overrides]
    load(cls, str(REPOSITORY / configs[0]), overrides)


def test_make_targets_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        if command.name == "make":
            targets = [word for word in command.words[1:] if "=" not in word]
            assert set(targets) <= known, f"README.md:{command.line}: {command.text}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_resolves_as_a_dry_run_does(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.parent.parent.name == "data_prep":
        load(BuildConfig, str(path))  # its dry run reads a catalog: tests/integration/test_readme.py
        return
    from pipeline.commands.train import dry_run

    config = load(PretrainConfig, str(path))
    assert dry_run(config, None, as_json=True) == 0
    assert '"fingerprint"' in capsys.readouterr().out.splitlines()[-1]


def test_what_is_taken_for_a_command() -> None:
    taken = parse(1, "python -m pipeline probe RUN --task knn|linear [--seeds N] --n N …   # and why")
    assert taken is not None
    assert taken.words == ("python", "-m", "pipeline", "probe", "RUN", "--task", "knn", "--n", "1")
    assert not taken.whole
    assert parse(1, "an apostrophe's no command") is None

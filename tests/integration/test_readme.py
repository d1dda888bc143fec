"""README's commands typed in README's order, on a small scale: the demo, one's own data, training, comparing.

What a command is given instead of README's placeholders and sizes stands in `smaller`; commands that are only parsed
(`tests/unit/test_readme.py`) stand in PARSED_ONLY, each with its reason. `pipeline ablate` and `cluster submit` run for real in
`test_ablate.py` and `test_slurm.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_folder import REPOSITORY
from tests.readme import Command, commands

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]
SITES, STEPS, LARGE = "48", "2", "pipeline/runs/skysense_v2.yaml"
PARSED_ONLY = {
    r"make ": "their recipes are the commands of the first block",
    r"git |cd |rm ": "of the shell",
    r"data_prep (sites|prepare) |data_prep build +data_prep/runs/stac": "ask a STAC API: test_area_to_shards.py runs them against one",
    r"data_prep (append|remove) ": "change a set: tests/unit/test_grow.py",
    r"pipeline bench ": "benchmarks: minutes, `make bench`",
    r"pipeline layout |cluster plan .*--verify": "build engines of a world of 1,024: test_fake_world.py",
    r"pipeline probe RUN --": "test_probe_labels.py, test_probe_outside.py; the plain call runs here",
    r"pipeline evaluate [a-z]": "published data sets: test_evaluate_*.py run rows on tiny layouts",
    r"pipeline embed .*--task": "a published data set: tests/unit/test_embeddings.py embeds one of tiny layout",
    r"cluster status .*--watch": "watches jobs until it is stopped: test_ablate.py asks once",
    r"pipeline ablate .*(terms|--claims)": "hours; test_ablate.py runs a grid",
    r"pipeline compare ablations": "reads what those hours make",
    r"pipeline sync ": "needs a tracking server: test_sync.py",
    r"s3://bucket/runs": "needs object storage: test_checkpoint_s3.py",
    r"runs/s3\.yaml": "reads object storage: test_storage_s3.py",
}
PLACES = {
    "SRC": "demo_out/scenes", "OUT.parquet": "own.parquet", "s3://bucket/set": "own_set", "RUN_A": "demo_out/moe", "RUN_B": "demo_out/dense",
    "RUN": "demo_out/moe", "CHECKPOINT": "demo_out/moe", "URL": "demo_out/shards", "SET": "demo_out/shards", "OUT.safetensors": "backbone.safetensors",
    "INPUT": "demo_out/shards", "OUT": "features.npz",
}  # fmt: skip
SMALL = [
    "data.views_global.hr_px=64", "data.views_global.series_px=4", "data.views_local.hr_px=32", "data.views_local.series_px=4",
    "data.views_global.s2_dates=2", "data.views_global.s1_dates=2", "train.batch=4", f"train.steps={STEPS}", "train.log_every=1",
    "parallel.ep=1", "parallel.zero_stage=0", f"probe.every={STEPS}",
]  # fmt: skip


def skipped(command: Command) -> bool:
    text = command.text.removeprefix("python -m ")
    return not command.whole or any(re.search(pattern, text) for pattern in PARSED_ONLY)


def smaller(command: Command, key: str) -> list[str]:
    """The words to run. key: of some site of the demo's shard set."""
    words = [{**PLACES, "KEY": key}.get(word, word) for word in command.words]
    words = [re.sub(r"\[OUT\.parquet\]", "[own.parquet]", word).replace("s3://bucket/set", "own_set") for word in words]
    configs = {"build": "data_prep/runs/demo.yaml", "plan": LARGE, "submit": LARGE}
    config = configs.get(words[3], "tests/runs/small.yaml")
    words = [
        config if word == "CONFIG" or (re.search(r"runs/demo(_dense)?\.yaml$", word) and words[3] == "train") else word
        for word in words
    ]
    if words[3] == "simulate":
        words[words.index("--sites") + 1] = SITES
    elif words[3] == "train" and words[2] == "pipeline" and not {"--dry-run", "--explain"} & set(words):
        if "--processes" in words:
            words[words.index("--processes") + 1] = "1"
        words = [word for word in words if not word.startswith(("train.steps=", "tracking.uri="))] + SMALL
    elif words[3] == "ablate":
        words.append("--list")
    elif words[3] == "status":
        words.append("demo_out/moe")
    elif words[3] == "submit":
        words.append("--dry-run")
    elif words[3] == "embed":
        words += ["--key", key]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's paths mean what they mean in a checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("cluster", "data_prep", "model", "pipeline", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def typed(words: list[str], place: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=place, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def a_key(place: Path) -> str:
    from data_prep.shards import ShardSet

    return ShardSet.open(str(place / "demo_out/shards")).read_index(["key"])["key"][0].as_py()


def test_readme_s_commands_do_what_they_say(place: Path) -> None:
    todo = [command for command in commands(REPOSITORY / "README.md") if command.box and not skipped(command)]
    ran: list[list[str]] = []
    for command in todo:
        words = smaller(command, a_key(place) if command.words[3] == "embed" or "KEY" in command.words else "")
        if words not in ran:
            typed(words, place)
            ran.append(words)
        if command.name == "pipeline train" and "run.dir=demo_out/moe" in words:  # README's second run is told in words
            dense = [word.replace("demo_out/moe", "demo_out/dense") for word in words]
            typed([*dense, "model.moe.experts=0"], place)
            ran.append(dense)
    names = {" ".join(words[2:4]) for words in ran}
    assert {"data_prep simulate", "data_prep catalog", "data_prep audit", "data_prep build", "data_prep verify", "data_prep show",
            "pipeline train", "pipeline probe", "pipeline export", "pipeline embed", "pipeline compare", "cluster plan",
            "cluster submit"} <= names  # fmt: skip
    assert len(ran) >= 20
    for made in (
        "demo_out/sheet.png",
        "demo_out/compare.html",
        "own_set/manifest.json",
        "backbone.safetensors",
        "features.npz",
    ):
        assert (place / made).stat().st_size > 0, made
    for config in ("demo.yaml", "s3.yaml"):
        words = [
            "python",
            "-m",
            "data_prep",
            "build",
            f"data_prep/runs/{config}",
            "source.catalog=[demo_out/scenes/catalog.parquet]",
            "output.url=dry",
        ]
        typed([*words, "--dry-run"], place)
    assert not (place / "dry").exists()

"""The README's two quick-start commands, read from there and run as they stand, on the real game with the real sizes;
what is added only cuts the number of steps, updates and games."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SHORT = """
--total-steps 40 --first-steps-min 30 --first-steps-max 30 --first-diffusion-updates 2
--first-reward-updates 2 --first-policy-updates 1 --epoch-steps 10 --diffusion-updates 1
--reward-updates 1 --policy-updates 1 --final-epochs 0 --max-episode-steps 12 --eval-episodes 1
--final-episodes 2
""".split()
README = (ROOT / "README.md").read_text()


def quick_start(heading: str) -> str:
    """The command in a column of the quick start's table."""
    lines = README[README.index("## Quick start") :].splitlines()
    header = next(line for line in lines if line.startswith("| |"))
    column = next(i for i, cell in enumerate(header.split("|")) if heading in cell)
    cell = next(line for line in lines if line.startswith("| command")).split("|")[column]
    return re.search(r"`(python jedi_atari.py [^`]*)`", cell)[1]


@pytest.mark.parametrize(
    ("heading", "changes", "parameters"),
    [("tiny", [], 1_700_000), ("papers' numbers", ["--batch-size", "2"], 13_000_000)],
)
def test_quick_start(heading, changes, parameters, tmp_path):
    """It prints its plan, trains, says what was learned and leaves a whole run folder."""
    command = quick_start(heading)
    assert (
        heading != "tiny" or f"&& {command}\n" in README
    )  # the block above the table says the same
    run_dir = tmp_path / "run"
    argv = [
        sys.executable,
        *command.split()[1:],
        *SHORT,
        *changes,
        "--threads",
        "1",
        "--run-dir",
        str(run_dir),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "\nrewarded steps recognised: " in done.stdout and "\nrandom play " in done.stdout
    total = int(re.search(r"^parameters .* all ([\d,]+)", done.stdout, re.M)[1].replace(",", ""))
    assert parameters / 2 < total < parameters * 2
    result = json.loads((run_dir / "result.json").read_text())
    assert result["env_steps"] == 40 and len(result["returns"]) == 2
    assert {"checkpoint.pt", "metrics.jsonl"} <= {p.name for p in run_dir.iterdir()}

"""`benchmark/improvement.py`: intervals against closed forms, table and pictures of a real run."""

import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.stats
from conftest import MICRO, ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import improvement

import jedi_atari as jedi


def test_interval_is_the_normal_one_for_many_games():
    """For 400 draws of a normal distribution the bootstrap gives the textbook interval, within a tenth of its width."""
    values = np.random.default_rng(1).normal(10, 3, 400)
    low, high = improvement.interval(list(values))
    expected = scipy.stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    np.testing.assert_allclose((low, high), expected, atol=0.1 * (high - low))


def test_interval_of_equal_returns_is_a_point():
    assert improvement.interval([7.0] * 10) == (7.0, 7.0)


@pytest.mark.parametrize(
    ("shift", "certain"), [(3.0, True), (0.0, False), (-3.0, False), (0.3, False)]
)
def test_improved_needs_intervals_that_do_not_touch(shift, certain):
    rng = np.random.default_rng(2)
    chance, trained = rng.normal(0, 3, 100), rng.normal(shift, 3, 100)
    assert improvement.improved(list(trained), list(chance)) is certain


@pytest.mark.parametrize(
    ("game", "lengths", "shown"),
    [
        ("Krull", [5, 90], "0.50"),
        ("Krull", [5, 100], "cut"),
        ("Krull", [], "cut"),
        ("toys:Catch-v0", [90], "-"),
    ],
)
def test_human_normalised_is_for_whole_games_with_a_published_score(game, lengths, shown):
    """Krull's published scores: random play 1,598, a person 2,665.5."""
    result = dict(env_id=game, mean_return=(1598 + 2665.5) / 2, lengths=lengths)
    assert improvement.human_normalised(result | {"args": {"max_episode_steps": 100}}) == shown
    if game == "Krull":  # the papers' own limit
        whole = {"args": {"max_episode_steps": 27_000}, "lengths": [27_000]}
        assert improvement.human_normalised(result | whole) == "0.50"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A real, very small run."""
    folder = tmp_path_factory.mktemp("improvement")
    jedi.train(jedi.Args(**MICRO | dict(env_id="Krull", seed=3, run_dir=str(folder / "seed3"))))
    return folder


def test_table_and_picture_of_a_real_run(runs, capsys):
    assert improvement.main([str(runs)]) == 0
    text, result = capsys.readouterr().out, json.loads((runs / "seed3/result.json").read_text())
    random, trained = (
        improvement.with_interval(result[key]) for key in ("returns_random", "returns")
    )
    assert text.splitlines()[2].startswith(f"| Krull | 3 | {random} | {trained} | 3, 3 | ")
    assert " | cut | 130 | " in text and (runs / "improvement.md").read_text() == text
    assert cv2.imread(str(runs / "improvement.png")).std() > 10

    rows = (runs / "health.md").read_text().splitlines()[2:]
    assert rows[0].startswith("| Krull | 3 | 0, 0, 0 |")
    updates = ", ".join(str(result["updates"][name]) for name in ("diffusion", "reward", "policy"))
    measures, ratio = result["measures"], result["open_loop_ratio"]
    mean, std = f"{result['mean_return']:,.1f}", f"{measures['latent_std']:.2f}"
    assert rows[-1].startswith(f"| Krull | 3 | {updates} | {mean} | {std} |")
    assert f"| {ratio[0]:.2f}, {ratio[4]:.2f}, {ratio[14]:.2f} |" in rows[-1]
    probs = [measures[f"reward_prob_{k}"] for k in (0, 1, 3, 5)]
    shown = ", ".join("no data" if p is None else f"{p:.2f}" for p in probs)
    assert rows[-1].endswith(f" | {shown} | {measures['imagined_minus_real']:+.3f} |")


def test_nothing_that_is_missing_costs_the_table(runs, tmp_path):
    """A notebook's backend of matplotlib, a measure that is null, a result of something else."""
    shutil.copytree(runs / "seed3", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    nothing = dict.fromkeys(("reward_recall", "open_loop_ratio"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().replace("imagined_minus_real", "unknown")
    (tmp_path / "run/metrics.jsonl").write_text(lines)
    jedi.write_atomically(tmp_path / "run/result.json", result | nothing)
    (tmp_path / "old").mkdir()
    jedi.write_atomically(tmp_path / "old/result.json", result | {"returns_random": []})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text('{"half": ')
    for name in ("cut_off", "gone"):
        shutil.copytree(runs / "seed3", tmp_path / name)
    (tmp_path / "cut_off/metrics.jsonl").write_text(lines[:-9])
    (tmp_path / "gone/metrics.jsonl").unlink()
    command = [sys.executable, str(ROOT / "benchmark/improvement.py"), str(tmp_path)]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 4, done.stderr
    assert f"left out: {tmp_path}/old/result.json holds no returns_random" in done.stderr
    assert re.search(r"left out: \S+/cut_off/metrics.jsonl, line \d+, is cut off", done.stderr)
    assert f"No such file or directory: '{tmp_path}/gone/metrics.jsonl'" in done.stderr
    assert f"left out: {tmp_path}/other/result.json is cut off" in done.stderr
    assert done.stdout.count("\n") == 3 and "| no data |" in done.stdout
    assert (tmp_path / "health.md").read_text().endswith("| no data |\n")
    assert cv2.imread(str(tmp_path / "improvement.png")).std() > 10


def test_a_picture_that_fails_is_said_in_one_line(runs, monkeypatch, capsys):
    monkeypatch.setattr(improvement, "draw", lambda *_: [][0])
    assert improvement.main([str(runs)]) == 0
    assert capsys.readouterr().err == "no picture: IndexError: list index out of range\n"


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/result.json").write_text("{")
    for folder, words in (("no", "holds no result.json"), ("half", "half/result.json is cut off")):
        assert improvement.main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_runs_of_different_settings_are_refused(runs, tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copytree(runs / "seed3", tmp_path / name)
    result = json.loads((tmp_path / "two/result.json").read_text())
    result["args"]["max_episode_steps"] += 1
    jedi.write_atomically(tmp_path / "two/result.json", result)
    assert improvement.main([str(tmp_path)]) == 2
    assert "different settings" in capsys.readouterr().err


def test_the_tables_in_results_are_made_from_the_runs():
    """Each improvement.md in results/ is what the script prints from the runs beside it."""
    for path in (ROOT / "results").rglob("improvement.md"):
        found = improvement.read_runs(path.parent)
        assert path.read_text() == improvement.table(found)
        assert (path.parent / "health.md").read_text() == improvement.health_table(found)


def test_the_readme_shows_a_table_of_results():
    """The tables between the marks are improvement.md of the two folders."""
    text = (ROOT / "README.md").read_text()
    for mark, folder in (("improvement", "results/small"), ("quick-start", "results/tiny")):
        assert f"benchmark/improvement.py {folder}" in text
        shown = text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
        assert shown.strip() == (ROOT / folder / "improvement.md").read_text().strip()

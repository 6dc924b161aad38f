"""`benchmark/improvement.py`: intervals against closed forms, random play of the real game, table and picture."""

import json
import os
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


def test_random_play_of_pong_is_the_published_one(tmp_path):
    """Pong's published random score is -20.7; a game of random play ends between -21 and about -18."""
    args = jedi.Args(**MICRO | dict(env_id="Pong", max_episode_steps=27_000))
    played = improvement.random_play(args, 2)
    assert (
        -21 <= played["mean_return"] <= -18.5
        and len(played["returns"]) == len(played["lengths"]) == 2
    )
    assert min(played["lengths"]) > 700 and played["mean_return"] == np.mean(played["returns"])
    assert improvement.random_play(args, 1)["returns"] == played["returns"][:1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A real, very small run and random play cut at the same length."""
    folder = tmp_path_factory.mktemp("improvement")
    args = jedi.Args(
        **MICRO | dict(env_id="Krull", seed=3, run_dir=str(folder / "runs/Krull/seed3"))
    )
    jedi.train(args)
    (folder / "random").mkdir()
    played = improvement.random_play(args, 3)
    jedi.write_atomically(folder / "random/Krull.json", played)
    result = json.loads((folder / "runs/Krull/seed3/result.json").read_text())
    del result["returns_random"]  # runs once held none
    (folder / "old").mkdir()
    jedi.write_atomically(folder / "old/result.json", result)
    shutil.copy(folder / "runs/Krull/seed3/metrics.jsonl", folder / "old")
    return folder


def test_table_and_picture_of_a_real_run(runs, capsys):
    argv = [str(runs / "old"), "--random-play", str(runs / "random")]
    assert improvement.main(argv) == 0
    random = json.loads((runs / "random/Krull.json").read_text())["returns"]
    assert f"| {improvement.with_interval(random)} |" in capsys.readouterr().out
    assert improvement.main([str(runs / "runs")]) == 0
    text = capsys.readouterr().out
    result = json.loads((runs / "runs/Krull/seed3/result.json").read_text())
    assert (
        "| Krull | 3 |" in text and f"{result['mean_return']:,.1f} (" in text and "| 3, 3 |" in text
    )
    assert f"| {improvement.with_interval(result['returns_random'])} |" in text
    assert (runs / "runs/improvement.md").read_text() == text
    assert cv2.imread(str(runs / "runs/improvement.png")).std() > 10

    rows = (runs / "runs/health.md").read_text().splitlines()[2:]
    assert rows[0].startswith("| Krull | 3 | 0, 0, 0 |")
    updates = ", ".join(str(result["updates"][name]) for name in ("diffusion", "reward", "policy"))
    measures, ratio = result["measures"], result["open_loop_ratio"]
    assert rows[-1].startswith(f"| Krull | 3 | {updates} | {measures['latent_std']:.2f} |")
    assert f"| {ratio[0]:.2f}, {ratio[4]:.2f}, {ratio[14]:.2f} |" in rows[-1]
    shown = [
        f"{measures[f'reward_prob_{k}']:.2f}"
        for k in (0, 1, 3, 5)
        if measures[f"reward_prob_{k}"] is not None
    ]
    assert rows[-1].endswith(", ".join(shown) + " |" if len(shown) == 4 else "no data |")


def test_nothing_that_is_missing_costs_the_table(runs, tmp_path):
    """A notebook's backend of matplotlib, a measure that is null, a result of something else."""
    shutil.copytree(runs / "runs/Krull/seed3", tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    nothing = dict.fromkeys(("peak_memory_bytes", "reward_recall", "open_loop_ratio"))
    jedi.write_atomically(tmp_path / "run/result.json", result | nothing)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text('{"half": ')
    command = [sys.executable, str(ROOT / "benchmark/improvement.py"), str(tmp_path)]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"left out: {tmp_path}/other/result.json is cut off")
    assert done.stdout.splitlines()[2].endswith(" | - |") and "| no data |" in done.stdout
    assert cv2.imread(str(tmp_path / "improvement.png")).std() > 10


def test_a_picture_that_fails_is_said_in_one_line(runs, monkeypatch, capsys):
    monkeypatch.setattr(improvement, "draw", lambda *_: [][0])
    assert improvement.main([str(runs / "runs")]) == 0
    assert capsys.readouterr().err == "no picture: IndexError: list index out of range\n"


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    random = json.loads((runs / "random/Krull.json").read_text())
    jedi.write_atomically(tmp_path / "Krull.json", random | {"max_episode_steps": 17})
    (tmp_path / "half").mkdir()
    (tmp_path / "half/result.json").write_text("{")
    for argv, words in (
        ([], "give a folder of runs"),
        ([str(tmp_path / "no")], "holds no result.json"),
        ([str(tmp_path / "half")], "half/result.json is cut off"),
        ([str(runs / "old"), "--random-play", "a b'c"], """ --out 'a b'"'"'c'"""),
        ([str(runs / "old"), "--random-play", str(tmp_path / "no")], "--random Krull"),
        ([str(runs / "old"), "--random-play", str(tmp_path)], "another length"),
        (["--random", "Kurll", "--out", str(tmp_path / "new")], "Did you mean: `Krull`"),
        (["--random", "Krull", "--episodes", "1", "--out", str(tmp_path / "new")], "at least 2"),
    ):
        assert improvement.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_tables_in_results_are_made_from_the_runs():
    """Each improvement.md in results/ is what the script prints from the runs beside it."""
    for path in (ROOT / "results").rglob("improvement.md"):
        found = improvement.read_runs(path.parent)
        chance = [improvement.read_random(ROOT / "results/random", r) for _, r in found]
        assert path.read_text() == improvement.table(found, chance)
        assert (path.parent / "health.md").read_text() == improvement.health_table(found)


def test_the_readme_shows_a_table_of_results():
    """The tables between the marks are improvement.md of the two folders."""
    text = (ROOT / "README.md").read_text()
    for mark, folder in (("improvement", "results/small"), ("quick-start", "results/tiny")):
        assert f"benchmark/improvement.py {folder}" in text
        shown = text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
        assert shown.strip() == (ROOT / folder / "improvement.md").read_text().strip()

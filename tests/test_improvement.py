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
import runs

import jedi_atari as jedi


def test_interval_is_the_normal_one_for_many_games():
    """For 400 draws of a normal distribution the bootstrap gives the textbook interval, within a tenth of its width."""
    values = np.random.default_rng(1).normal(10, 3, 400)
    low, high = runs.interval(list(values))
    expected = scipy.stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    np.testing.assert_allclose((low, high), expected, atol=0.1 * (high - low))
    assert runs.interval([7.0] * 10) == (7.0, 7.0)


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
        ("examples.toys:Catch-v0", [90], "-"),
    ],
)
def test_human_normalised_is_for_whole_games_with_a_published_score(game, lengths, shown):
    """Krull's published scores: random play 1,598, a person 2,665.5; the papers' own limit does not count as a cut."""
    result = dict(env_id=game, mean_return=(1598 + 2665.5) / 2, lengths=lengths)
    result["args"] = {"max_episode_steps": 100}
    assert improvement.human_normalised(runs.Run("", result, [])) == shown
    whole = dict(args={"max_episode_steps": 27_000}, lengths=[27_000], env_id="Krull")
    assert improvement.human_normalised(runs.Run("", result | whole, [])) == "0.50"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real, very small run."""
    folder = tmp_path_factory.mktemp("improvement")
    jedi.train(jedi.Args(**MICRO | dict(env_id="Krull", seed=3, run_dir=str(folder / "seed3"))))
    return folder


def test_table_and_picture_of_a_real_run_and_of_the_file_that_keeps_it(made, tmp_path, capsys):
    assert improvement.main([str(made)]) == 0
    text, result = capsys.readouterr().out, json.loads((made / "seed3/result.json").read_text())
    shown = [improvement.with_interval(result[key]) for key in ("returns_random", "returns")]
    assert text.splitlines()[2].startswith(f"| Krull | 3 | {shown[0]} | {shown[1]} | 3, 3 | ")
    assert " | cut | 130 | " in text and (made / "improvement.md").read_text().startswith(text)
    assert cv2.imread(str(made / "improvement.png")).std() > 10

    kept = tmp_path / "krull.jsonl"
    for source in (made, kept):  # of the folder, then again from the file alone
        assert improvement.main([str(source), "--out", str(kept)]) == 0
        assert (tmp_path / "krull.md").read_text().startswith(text)
        assert capsys.readouterr().out == text
    (one,), (other,) = runs.find_runs(made), runs.find_runs(kept)
    assert one.result == other.result and one.script == other.script
    np.testing.assert_allclose(one.curve, other.curve, rtol=1e-4)
    kept.write_text(before := kept.read_text() + kept.read_text().replace('"seed": 3', '"seed": 4'))
    assert improvement.main([str(made), "--out", str(kept)]) == 2  # it holds a run more
    assert (
        kept.read_text() == before
        and "1 other runs, such as jedi_atari Krull 4" in capsys.readouterr().err
    )
    (tmp_path / "readme.md").write_text("mine")
    assert improvement.main([str(made), "--out", str(tmp_path / "readme.jsonl")]) == 2
    assert "readme.md is there already" in capsys.readouterr().err
    for path in (tmp_path / "notes.txt", tmp_path / "notes.jsonl"):  # somebody else's
        path.write_text('{"a": 1}\n')
        assert improvement.main([str(made), "--out", str(path)]) == 2
        assert path.read_text() == '{"a": 1}\n' and "notes" in capsys.readouterr().err


def test_nothing_that_is_missing_costs_the_table(made, tmp_path):
    """A notebook's backend of matplotlib, a measure that is null, a result of something else."""
    for name in ("run", "old", "half", "cut_off", "gone"):
        shutil.copytree(made / "seed3", tmp_path / name)
        result = json.loads((tmp_path / name / "result.json").read_text())
        result |= {"reward_recall": None, "seed": len(name)}
        result |= {"returns_random": None} if name == "old" else {}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    (tmp_path / "half/result.json").write_text('{"half": ')
    logged = tmp_path / "cut_off/metrics.jsonl"
    logged.write_text(logged.read_text()[:-9])  # costs the curve
    (tmp_path / "gone/metrics.jsonl").unlink()
    (tmp_path / "gone/result.json").rename(tmp_path / "gone/result.json.broken")
    command = [sys.executable, str(ROOT / "benchmark/improvement.py"), str(tmp_path)]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 4, done.stderr
    assert re.search(r"left out: \S+/cut_off/metrics.jsonl, line \d+, is cut off", done.stderr)
    assert f"left out: {tmp_path}/old holds no returns_random" in done.stderr
    assert f"left out: {tmp_path}/half/result.json is cut off" in done.stderr
    assert f"left out: {tmp_path}/gone has no result.json" in done.stderr
    assert done.stdout.count("\n") == 2 + 2 and "| no data |" in done.stdout
    assert cv2.imread(str(tmp_path / "improvement.png")).std() > 10


def test_bad_input_is_one_line_and_a_picture_that_fails_costs_no_table(
    made, tmp_path, monkeypatch, capsys
):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/result.json").write_text("{")
    for folder, words in (("no", "is not there"), ("half", "half/result.json is cut off")):
        assert improvement.main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    monkeypatch.setattr(runs, "draw_learning_curves", lambda *_: [][0])
    assert improvement.main([str(made)]) == 0
    error = capsys.readouterr().err
    assert error == "no picture improvement.png: IndexError: list index out of range\n"
    assert not (made / "improvement.png").exists()  # an older one would show other runs


def test_the_tables_in_results_are_made_from_the_runs():
    for name in ("tiny", "small", "longer"):
        path = ROOT / "results" / f"{name}.jsonl"
        found = sorted(runs.find_runs(path), key=lambda run: (run.game, run.result["seed"]))
        assert path.with_suffix(".md").read_text() == improvement.table(found) + improvement.NOTE


def readme_table() -> str:
    """Each game of results/small.jsonl: its seeds' means, those that beat random play in bold, beside the published."""
    lines = ["| game | random play | JEDI `small`, each seed | human | DIAMOND, full size |"]
    lines.append("|---|---:|---:|---:|---:|")
    found = runs.find_runs(ROOT / "results/small.jsonl")
    diamond = json.loads((ROOT / "benchmark/published.json").read_text())["agents"]["DIAMOND"]
    for game in sorted({run.game for run in found}):
        of_game = sorted((r.result for r in found if r.game == game), key=lambda r: r["seed"])
        digits = 1 if max(abs(r["mean_return"]) for r in of_game) < 100 else 0
        means, chance = [], np.mean([np.mean(r["returns_random"]) for r in of_game])
        for r in of_game:
            bold = "**" if improvement.improved(r["returns"], r["returns_random"]) else ""
            means.append(f"{bold}{r['mean_return']:,.{digits}f}{bold}")
        human, theirs = runs.GAMES[game]["human"], np.mean(diamond["runs"][game])
        cells = [f"{x:,.{digits}f}" for x in (chance, human, theirs)]
        lines.append(f"| {game} | {cells[0]} | {', '.join(means)} | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    assert readme_table() in text
    kungfu = re.search(r"KungFuMaster \| (\S+) \| ([^|]+) \|", text)
    mean = np.mean([float(x.replace(",", "")) for x in re.findall(r"[\d,.]+\d", kungfu[2])])
    assert f"**{kungfu[1]} → {mean:,.0f} points**" in text

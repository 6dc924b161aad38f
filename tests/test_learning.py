"""It learns: whole runs on Catch; a world model of a ball that drifts by chance. `python -m pytest -m learning`."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch

import jedi_atari as jedi
from examples import drift, learn_catch, toys

ROOT = Path(__file__).resolve().parents[1]


def test_catch_is_the_game_that_it_says():
    """Perfect play returns +1 always, random play -0.6 on average; five steps a game."""
    env, rng = gym.make("Catch-v0"), np.random.default_rng(0)
    returns = {"perfect": [], "random": []}
    for player in returns:
        for game in range(400):
            env.reset(seed=game)
            total, over, steps = 0.0, False, 0
            while not over:
                toy = env.unwrapped
                toward = int(np.sign(toy.ball - toy.paddle)) + 1
                _, reward, over, _, _ = env.step(
                    toward if player == "perfect" else int(rng.integers(3))
                )
                total, steps = total + reward, steps + 1
            assert steps == toys.ROWS - 1
            returns[player].append(total)
    assert np.mean(returns["perfect"]) == 1.0
    assert np.mean(returns["random"]) == pytest.approx(-0.6, abs=0.12)


def test_the_picture_shows_the_state():
    frames = torch.from_numpy(
        np.stack([toys.draw(ball, row, 2) for ball in range(5) for row in range(6)])
    )
    assert drift.ball_columns(frames).tolist() == [ball for ball in range(5) for _ in range(6)]
    assert len({frame.numpy().tobytes() for frame in frames}) == 30


def test_the_drift_is_the_one_that_it_says():
    env, counts = gym.make("DriftingCatch-v0"), np.zeros((5, 5))
    env.reset(seed=0)
    for _ in range(6_000):
        before = env.unwrapped.ball
        if env.step(1)[2]:
            counts[before, env.unwrapped.ball] += 1
            env.reset()
        else:
            counts[before, env.unwrapped.ball] += 1
    shares = counts / counts.sum(1, keepdims=True)
    assert drift.total_variation(shares, np.arange(5)).max() < 0.04


def test_the_measure_of_chance_tells_samplers_apart():
    """Exact draws are close; always the likeliest is 0.2 away; single futures learned by heart only look close."""
    rng, columns = np.random.default_rng(0), np.repeat(np.arange(5), 400)
    exact = drift.EXACT[columns]
    drawn = np.stack([rng.multinomial(200, p) / 200 for p in exact])
    likeliest = np.eye(5)[exact.argmax(1)]
    by_heart = np.stack([rng.multinomial(1, p) for p in exact]).astype(float)
    for shares, least, most, pooled in (
        (drawn, 0, 0.04, 0.01),
        (likeliest, 0.199, 0.201, 0.25),
        (by_heart, 0.3, 1, 0.05),
    ):
        each = drift.by_column(drift.total_variation(shares, columns), columns)
        assert least <= each.mean() <= most
        together = drift.by_column(shares, columns)
        assert drift.total_variation(together, np.arange(5)).max() <= pooled


def test_the_readme_shows_the_results_of_catch(monkeypatch, capsys):
    """Its table is made from results/catch.jsonl; a file that is none is one line of error."""
    text, results = (ROOT / "examples" / "README.md").read_text(), ROOT / "results"
    shown = text.split("<!-- catch:begin -->")[1].split("<!-- catch:end -->")[0].strip()
    assert shown == learn_catch.table(results / "catch.jsonl") and shown.count("\n") == 1 + 4
    for path in (results / "speed.jsonl", results / "README.md", results / "nothing.jsonl"):
        monkeypatch.setattr(sys, "argv", ["learn_catch", "--table", str(path)])
        assert learn_catch.main() == 2
        assert "make it with --out" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.learning
@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_jedi_learns_catch(seed, tmp_path):
    """And draws what it has learned; the folder is not written to again."""
    run, out = tmp_path / "run", tmp_path / "catch.jsonl"
    command = [sys.executable, "-m", "examples.learn_catch", "--seed", str(seed)]
    command += ["--run-dir", str(run), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 0, done.stderr
    assert out.read_text() in done.stdout
    print(found := json.loads(out.read_text()))
    assert found["mean_return"] >= 0.9
    assert {"curves.png", "games.png", "games.gif"} <= {path.name for path in run.iterdir()}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.learning
@pytest.mark.slow
def test_the_quick_start_learns_a_real_game(tmp_path):
    """The README's first command, on a seed that is in no table: its last line says better, and `result.json` agrees."""
    argv = "jedi_atari.py --env-id CrazyClimber --preset tiny --seed 11 --run-dir".split()
    command = [sys.executable, *argv, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert done.returncode == 0, done.stderr
    print(done.stdout.splitlines()[-1])
    assert done.stdout.splitlines()[-1].endswith("over 40 and 40 games: better")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    chance, now = (np.array(result[key]) for key in ("returns_random", "returns"))
    assert scipy.stats.mannwhitneyu(now, chance, alternative="greater").pvalue < 0.001
    assert now.mean() > 1.5 * chance.mean()


@pytest.mark.learning
@pytest.mark.slow
def test_regression_to_the_mean_has_no_chance():
    """The same networks trained to predict the next latent by squared error say one next column and no other.

    The ball stays with probability 3/4, beside a wall 7/8: the best single answer is (3 * 1/4 + 2 * 1/8) / 5 = 0.2 from
    the true distribution.
    """
    with drift.ablations.regression():
        found = drift.measure(jedi.Args(**drift.DRIFT), {drift.REGRESSION: {}}, samples=2)
    assert found["probe"] > 0.99
    assert found[drift.REGRESSION]["each"][0] == pytest.approx(0.2, abs=0.03)


@pytest.mark.learning
@pytest.mark.slow
def test_imagined_chance_is_the_games_own():
    """The ball's next column, imagined and true: total variation at most 0.1, which no regression to a mean can do."""
    found = drift.measure(jedi.Args(**drift.DRIFT), drift.SAMPLERS)
    assert found["probe"] > 0.99 and found[drift.TUNED]["each"][0] <= 0.1
    assert found[drift.PAPERS]["each"][0] > 0.1  # from unit noise, samples vary too little

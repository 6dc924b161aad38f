"""benchmark/report.py: its data, its numbers against rliable and against published aggregates, and wrong input.

What needs rliable or matplotlib (benchmark/requirements.txt) is skipped where they cannot be imported.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import report  # noqa: E402

GAMES = list(report.GAMES)
FEW = ["Pong", "Breakout", "Alien"]
REPS = 20
AGENTS = {agent.name: agent for agent in report.published_agents()}


@pytest.fixture(scope="module")
def rliable():
    """rliable's library and metrics."""
    try:
        from rliable import library, metrics
    except (ImportError, TypeError) as error:  # TypeError: rliable 1.2.0 with pandas 3
        pytest.skip(
            f"rliable cannot be imported ({error}): pip install -r benchmark/requirements.txt"
        )
    return library, metrics


@pytest.fixture(scope="module")
def pictures(rliable):
    pytest.importorskip(
        "matplotlib", reason="matplotlib is missing: pip install -r benchmark/requirements.txt"
    )


def result(game: str, seed: int, **changes) -> dict:
    """What a run writes, with made-up returns that no two games or seeds share."""
    low, high = report.GAMES[game]["random"], report.GAMES[game]["human"]
    draws = np.random.default_rng([seed, GAMES.index(game)]).lognormal(-0.7, 0.8, 5)
    returns = [float(low + (high - low) * x) for x in draws]
    content = {
        "env_id": game,
        "script": "jedi_atari",
        "seed": seed,
        "preset": "paper",
        "env_steps": 1000,
        "environment": "plain",
        "returns": returns,
        "mean_return": float(np.mean(returns)),
        "other_environments": {},
        "wall_seconds": 5400.0,
        "peak_memory_bytes": 3 * 2**30,
        "device": "cpu",
        "precision": "fp32",
        "versions": {"torch": "2"},
        "git_commit": None,
        "args": {"env_id": game, "seed": seed, "final_episodes": len(returns), "batch_size": 32},
    }
    return content | changes


def write_run(folder: Path, game: str, seed: int, **changes) -> Path:
    """A finished run folder with a learning curve."""
    run = folder / f"{game}__{seed}"
    run.mkdir(parents=True)
    content = result(game, seed, **changes)
    lines = [{"epoch": 0, "eval/mean_return": 1.0}, {"epoch": 1, "charts/env_steps": 500.0}]
    lines += [{"epoch": 2, "charts/env_steps": 900.0, "eval/mean_return": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "result.json").write_text(json.dumps(content))
    return run


def scores(game: str, seeds: int) -> list[float]:
    return [result(game, seed)["mean_return"] for seed in range(seeds)]


def normalised(game: str, values) -> np.ndarray:
    low, high = report.GAMES[game]["random"], report.GAMES[game]["human"]
    return (np.asarray(values) - low) / (high - low)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """The report of all games, two seeds, and of three games with one or two seeds and another batch size."""
    folder = tmp_path_factory.mktemp("whole")
    for game in GAMES:
        for seed in range(2):
            write_run(folder / "a", game, seed)
    for game, seeds in zip(FEW, (2, 2, 1), strict=True):
        for seed in range(seeds):
            arguments = result(game, seed)["args"] | {"batch_size": 64}
            write_run(folder / "b", game, seed, args=arguments)
    (folder / "b" / "open").mkdir()
    (folder / "b" / "open" / "args.json").write_text("{}")
    arguments = [
        f"full={folder / 'a'}",
        f"few={folder / 'b'}",
        "--out",
        str(folder / "out"),
        "--reps",
        str(REPS),
    ]
    assert report.main(arguments) == 0
    return folder


def load(whole: Path, name: str):
    return json.loads((whole / "out" / f"{name}.json").read_text())


# --- the data


def table1_split(scores_of: dict[str, dict[str, float]]) -> set[str]:
    """Games whose mean human-normalised score over the four agents is above the threshold."""
    rule, chosen = report.PUBLISHED["agent_optimal"], set()
    for game in GAMES:
        total = 0.0
        for agent in rule["agents"]:
            low, high = report.GAMES[game]["random"], report.GAMES[game]["human"]
            total += (scores_of[agent][game] - low) / (high - low)
        if total / len(rule["agents"]) > rule["threshold"]:
            chosen.add(game)
    return chosen


def test_agent_optimal_games_follow_from_the_printed_table():
    table = report.PUBLISHED["diamond_table1"]["scores"]
    assert report.PUBLISHED["agent_optimal"]["agents"] == ["IRIS", "TWM", "DreamerV3", "STORM"]
    assert table1_split(table) == set(report.AGENT_OPTIMAL)
    assert len(report.AGENT_OPTIMAL) == len(report.SUBSETS["human_optimal"]) == 13
    assert set(report.SUBSETS["human_optimal"]) | set(report.AGENT_OPTIMAL) == set(GAMES)


def test_released_scores_would_split_the_games_otherwise():
    agents = report.PUBLISHED["agent_optimal"]["agents"]
    released = {
        name: {game: float(AGENTS[name].scores[game].mean()) for game in GAMES} for name in agents
    }
    moved = table1_split(released) ^ set(report.AGENT_OPTIMAL)
    assert moved and moved <= {"Freeway", "UpNDown", "Kangaroo"}


def test_random_and_human_scores_are_those_of_the_printed_table():
    table = report.PUBLISHED["diamond_table1"]["scores"]
    for game, known in report.GAMES.items():
        assert known["random"] == table["Random"][game] < known["human"] == table["Human"][game]


def test_action_sets_are_the_emulators():
    ale_py = pytest.importorskip("ale_py", reason="the emulator is missing")
    gym = pytest.importorskip("gymnasium", reason="gymnasium is missing")
    gym.register_envs(ale_py)
    for game, known in report.GAMES.items():
        env = gym.make(f"ALE/{game}-v5")
        assert env.action_space.n == known["actions"], game
        env.close()


def test_every_footnote_tells_of_a_different_number():
    table = report.PUBLISHED["diamond_table1"]["scores"]
    found = set()
    for name, entry in report.PUBLISHED["agents"].items():
        for other in entry.get("printed_differently", []):
            for game, value in other["scores"].items():
                assert abs(value - AGENTS[name].scores[game].mean()) > 0.5
                found.add((name, game))
    for name in report.PUBLISHED[
        "main"
    ]:  # and none is missing for DIAMOND's table, which prints one decimal or none
        for game in GAMES:
            if abs(table[name][game] - AGENTS[name].scores[game].mean()) > 0.51:
                assert (name, game) in found
    assert {
        ("STORM", "Freeway"),
        ("DreamerV3", "UpNDown"),
        ("DreamerV3", "ChopperCommand"),
    } <= found
    text = report.scores_markdown(list(AGENTS.values()))
    assert (
        "STORM, Freeway: 33.5 in DIAMOND" in text
        and "UpNDown: 9234 in DIAMOND" in text
        and "7600 in" in text
    )


# --- the numbers


def test_harmonic_mean_is_that_of_a_plain_loop():
    for seed in range(20):
        hns = np.random.default_rng(seed).normal(0.8, 0.2, 26)
        total = 0.0
        for value in hns:
            total += 1 / (value + 0.1)
        assert math.isclose(report.harmonic_hns(hns), 1 / (total / 26), rel_tol=1e-12)
    assert report.harmonic_hns(np.array([0.4, 0.4])) == pytest.approx(
        0.5
    )  # 0.1 is not taken off again
    assert report.harmonic_hns(np.array([1.0, -0.1])) is None
    assert report.harmonic_hns(np.array([1.0, -0.5])) is None


def test_aggregates_come_from_rliable(rliable):
    library, metrics = rliable
    for subset, games in report.SUBSETS.items():
        matrix = np.stack([normalised(game, AGENTS["IRIS"].scores[game]) for game in games], axis=1)
        summary = report.aggregate(AGENTS["IRIS"], games, 50, seed=3)
        for name in ("mean", "median", "iqm", "optimality_gap"):
            function = getattr(metrics, f"aggregate_{name}")
            assert summary[name] == pytest.approx(function(matrix), rel=1e-12), (subset, name)
            np.random.seed(3)
            _, interval = library.get_interval_estimates(
                {"x": matrix}, lambda m, f=function: np.array([f(m)]), reps=50
            )
            assert summary[f"{name}_interval"] == pytest.approx(interval["x"][:, 0], rel=1e-12), (
                subset,
                name,
            )
            assert summary[f"{name}_interval"][0] < summary[name] < summary[f"{name}_interval"][1]


def test_diamonds_published_aggregates_come_back(rliable):
    summary = report.aggregate(AGENTS["DIAMOND"], GAMES, 2, 0)
    assert (
        round(summary["mean"], 3) == 1.459
        and round(summary["iqm"], 3) == 0.641
        and summary["superhuman"] == 11
    )
    assert round(summary["har_hns"], 3) == 0.319  # quoted for DIAMOND in the JEDI paper
    assert summary["n_games"] == 26 and summary["n_runs"] == 5


def test_printed_aggregates_come_back_but_for_known_differences(rliable):
    known = {("DreamerV3", "mean"), ("DreamerV3", "iqm"), ("STORM", "mean"), ("STORM", "iqm")}
    known |= {
        ("STORM", "superhuman"),
        ("IRIS", "superhuman"),
        ("DreamerV3-2024", "mean"),
        ("DreamerV3-2024", "median"),
    }
    checked, different = 0, set()
    for name, entry in report.PUBLISHED["agents"].items():
        summary = report.aggregate(AGENTS[name], GAMES, 2, 0)
        for key, printed in entry.get("printed_aggregates", {}).items():
            if key == "where":
                continue
            checked += 1
            if round(summary[key], 3) != printed:
                different.add((name, key))
    assert different == known and checked >= 25
    freeway = {
        "Freeway": np.full(5, 33.5)
    }  # STORM's numbers need the score of Freeway that the table prints
    storm = report.Agent("STORM", AGENTS["STORM"].scores | freeway)
    summary = report.aggregate(storm, GAMES, 2, 0)
    assert (round(summary["mean"], 3), round(summary["iqm"], 3), summary["superhuman"]) == (
        1.266,
        0.636,
        10,
    )


def test_games_with_other_numbers_of_runs_weigh_alike(rliable):
    runs = {"Pong": [0.0, 10.0, -10.0], "Breakout": [5.0, 20.0], "Boxing": [1.0, 50.0, 40.0, 30.0]}
    agent = report.Agent("x", {game: np.array(values) for game, values in runs.items()})
    summary = report.aggregate(agent, list(runs), 100, 0)
    hns = {game: normalised(game, values) for game, values in runs.items()}
    assert summary["mean"] == pytest.approx(np.mean([values.mean() for values in hns.values()]))
    gap = 1 - np.mean([np.minimum(values, 1).mean() for values in hns.values()])
    assert summary["optimality_gap"] == pytest.approx(gap)
    weighted = sorted((value, 1 / len(values)) for values in hns.values() for value in values)
    assert summary["iqm"] == pytest.approx(trimmed(weighted, 3), rel=1e-9)
    assert summary["n_runs"] == 2 and summary["n_runs_max"] == 4
    assert summary["mean_interval"][0] < summary["mean"] < summary["mean_interval"][1]


def trimmed(weighted: list[tuple[float, float]], total: float) -> float:
    """Mean of the middle half of weighted, sorted values."""
    position, sum_ = 0.0, 0.0
    for value, weight in weighted:
        inside = max(0.0, min(position + weight, 0.75 * total) - max(position, 0.25 * total))
        sum_, position = sum_ + inside * value, position + weight
    return sum_ / (0.5 * total)


def test_one_run_has_no_interval_and_the_global_generator_is_left_alone(rliable):
    agent = report.Agent("x", {"Pong": np.array([1.0]), "Boxing": np.array([1.0, 2.0])})
    assert report.aggregate(agent, ["Pong", "Boxing"], 10, 0)["mean_interval"] is None
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    report.aggregate(AGENTS["IRIS"], GAMES, 2, 0)
    assert np.random.random() == expected


# --- a report


def test_report_of_all_games(whole, rliable):
    _, metrics = rliable
    aggregates = load(whole, "aggregates")
    for subset, games in report.SUBSETS.items():
        matrix = np.stack([normalised(game, scores(game, 2)) for game in games], axis=1)
        summary = aggregates["full"][subset]
        assert summary["mean"] == pytest.approx(metrics.aggregate_mean(matrix))
        assert summary["iqm"] == pytest.approx(metrics.aggregate_iqm(matrix))
        assert summary["superhuman"] == sum(matrix[:, i].mean() > 1 for i in range(len(games)))
        assert summary["har_hns"] == pytest.approx(report.harmonic_hns(matrix.mean(0)))
        assert (
            summary["n_games"] == len(games) and summary["n_runs"] == 2 and not summary["missing"]
        )
    asymmetry = {record["agent"]: record for record in load(whole, "asymmetry")}
    ratio = (
        aggregates["full"]["agent_optimal"]["mean"] / aggregates["full"]["human_optimal"]["mean"]
    )
    assert asymmetry["full"]["mean_ratio"] == pytest.approx(ratio)
    text = (whole / "out" / "report.md").read_text()
    assert "full (n=2)" in text and "full: 5 games per run, 26 of 26 games" in text


def test_report_has_the_scores_of_each_game(whole):
    table = load(whole, "scores")
    with open(whole / "out" / "scores.csv") as file:
        rows = {(row["agent"], row["game"]): row for row in csv.DictReader(file)}
    for game in GAMES:
        expected = np.mean(scores(game, 2))
        assert table["full"][game]["mean"] == pytest.approx(expected)
        assert float(rows["full", game]["hns"]) == pytest.approx(normalised(game, expected))
        assert table["full"][game]["std"] == pytest.approx(
            abs(np.diff(scores(game, 2))[0]) / math.sqrt(2)
        )  # n - 1
        assert table["full"][game]["n_runs"] == 2 and table["full"][game]["episodes_per_run"] == 5
    assert set(table["few"]) == set(FEW) and table["few"]["Alien"]["n_runs"] == 1
    lines = (whole / "out" / "scores.md").read_text().splitlines()
    pong = next(line for line in lines if line.startswith("| Pong"))
    assert f"{np.mean(scores('Pong', 2)):,.1f} ± " in pong and "(n=2)" in pong
    assert "not run" in next(line for line in lines if line.startswith("| Freeway"))
    by_size = {(r["actions"], r["agent"]): r for r in load(whole, "action_sets")}
    assert by_size[18, "few"]["n_games"] == 1 and by_size[18, "few"]["of_games"] == 13
    assert (
        sum(
            by_size[size, "full"]["n_games"]
            for size in {g["actions"] for g in report.GAMES.values()}
        )
        == 26
    )


def test_no_aggregate_over_missing_games(whole, rliable):
    _, metrics = rliable
    for subset, games in report.SUBSETS.items():
        summary = load(whole, "aggregates")["few"][subset]
        for key in (
            "mean",
            "median",
            "iqm",
            "optimality_gap",
            "superhuman",
            "har_hns",
            "mean_interval",
        ):
            assert summary[key] is None, (subset, key)
        assert (
            summary["n_games"] == len(set(FEW) & set(games))
            and len(summary["missing"]) == len(games) - summary["n_games"]
        )
    lines = [
        line
        for line in (whole / "out" / "aggregates.md").read_text().splitlines()
        if line.startswith("| few")
    ]
    assert len(lines) == 3 and all(
        not any(c.isdigit() for c in line.split("|")[4]) for line in lines
    )
    assert "few" not in {record["agent"] for record in load(whole, "asymmetry")}
    same = {record["agent"]: record for record in load(whole, "same_games")}
    matrix = np.stack(
        [normalised(game, AGENTS["DIAMOND"].scores[game]) for game in sorted(FEW, key=GAMES.index)],
        axis=1,
    )
    assert (
        same["DIAMOND"]["iqm"] == pytest.approx(metrics.aggregate_iqm(matrix))
        and same["DIAMOND"]["n_games"] == 3
    )
    assert (
        same["few"]["mean"] is not None and same["few"]["mean_interval"] is None
    )  # one game has one run
    assert "3 of 26 games" in (whole / "out" / "same_games.md").read_text()


def test_report_has_runs_curves_and_pictures(whole):
    runs = load(whole, "runs")
    assert len(runs) == 2 * 26 + 5 and all(
        run["hours"] == 1.5 and run["peak_memory_gib"] == 3 for run in runs
    )
    assert (
        runs[0]["file"] == "Alien__0/result.json"
        and "open" in (whole / "out" / "runs.md").read_text()
    )
    curve = [
        r
        for r in load(whole, "learning_curves")
        if (r["agent"], r["game"], r["seed"]) == ("few", "Pong", 1)
    ]
    assert [r["env_steps"] for r in curve] == [0, 900, 1000]
    assert [r["mean_return"] for r in curve] == [1, 2, result("Pong", 1)["mean_return"]]
    names = {path.name for path in (whole / "out").iterdir()}
    assert names == report.REPORT_FILES
    for picture in report.PICTURES:
        assert (whole / "out" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
        assert b"</svg>" in (whole / "out" / f"{picture}.svg").read_bytes()[-20:]
    text = (whole / "out" / "report.md").read_text()
    assert all(f"({picture}.png)" in text for picture in report.PICTURES) and str(whole) not in text
    defined = re.findall(r"^\[\^(\w+)\]: ", text, re.MULTILINE)
    assert len(defined) == len(set(defined)) and set(defined) == set(
        re.findall(r"\[\^(\w+)\](?!:)", text)
    )


def test_report_is_replaced_as_a_whole_or_not_at_all(pictures, tmp_path, monkeypatch, capsys):
    for slow in ("games", "aggregates", "action_sets", "profiles"):  # one picture is enough here
        monkeypatch.setattr(report, f"draw_{slow}", lambda *_: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "learning_curves.csv").write_text("of an earlier report")
    assert report.main(["--published", "--out", str(out), "--reps", "2"]) == 0
    names = {path.name for path in out.iterdir()}
    assert (
        "report.md" in names
        and "learning_curves.csv" not in names
        and not list(tmp_path.glob(".*"))
    )
    assert "nothing measured here" in (out / "report.md").read_text()
    before = snapshot(out)
    assert report.main(["--published", "--out", str(out), "--reps", "2"]) == 0
    assert snapshot(out) == before and "asymmetry.png" in before  # the same numbers, the same bytes
    (out / "mine.txt").write_text("not a report's")
    assert report.main(["--published", "--out", str(out)]) == 2
    assert "mine.txt" in capsys.readouterr().err and (out / "mine.txt").exists()


def test_failure_while_writing_leaves_the_old_report(pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("old")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "all_aggregates", full_disk)
    assert report.main(["--published", "--out", str(out)]) == 2
    assert snapshot(tmp_path) == {"out/report.md": b"old"} and "no space" in capsys.readouterr().err


def test_readme_table(rliable, tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / "small", "Pong", seed)
    before = snapshot(tmp_path)
    assert (
        report.main(
            [f"small={tmp_path / 'small'}", f"paper={tmp_path / 'paper'}", "--readme-table"]
        )
        == 0
    )
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    assert (lines[0], lines[-1]) == report.README_MARKERS and snapshot(tmp_path) == before
    assert "paper" in printed.err and len(lines) == 2 + 2 + 26 + 6
    header = [cell.strip() for cell in lines[1].split("|")[1:-1]]
    assert header == [
        "Game",
        "Random",
        "Human",
        "DIAMOND (n=5)",
        "small (n=2, 5 games each)",
        "paper",
    ]
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines[3:-1]
    }
    assert (
        cells["Pong"][3].startswith(f"{np.mean(scores('Pong', 2)):,.1f} ± ")
        and cells["Pong"][4] == "not run"
    )
    assert cells["Alien"][3] == "not run"
    assert cells["IQM, 26 games"] == [
        "",
        "",
        "0.641",
        "not run (1 of 26 games)",
        "not run (0 of 26 games)",
    ]


def test_the_stochastic_script_is_an_agent_of_its_own_in_each_environment(tmp_path):
    played = {"plain": {"returns": [20.0, 21.0], "mean_return": 20.5}}
    extra = dict(
        script="jedi_atari_stochastic", environment="stochastic", other_environments=played
    )
    write_run(tmp_path / "s", "Pong", 0, **extra)
    write_run(tmp_path / "p", "Pong", 0)
    groups, _ = report.load_groups([str(tmp_path)])
    agents = {agent.name: agent for agent in report.measured_agents(groups)}
    assert set(agents) == {
        "jedi_atari",
        "jedi_atari_stochastic [stochastic]",
        "jedi_atari_stochastic [plain]",
    }
    assert agents["jedi_atari_stochastic [plain]"].scores["Pong"] == [20.5]
    assert agents["jedi_atari"].scores["Pong"] == pytest.approx(scores("Pong", 1))


def test_real_run_folder_is_understood(tmp_path, request):
    jedi = pytest.importorskip("jedi_atari", reason="the training script cannot be imported here")
    args = request.getfixturevalue("micro")
    short = dict(
        total_steps=90,
        first_steps_max=70,
        first_diffusion_updates=1,
        first_reward_updates=1,
        final_epochs=0,
    )
    args = jedi.dataclasses.replace(
        args, env_id="ALE/Freeway-v5", run_dir=str(tmp_path / "run"), **short
    )
    trained = jedi.train(args)
    runs, unfinished = report.find_runs(tmp_path)
    assert not unfinished and [run.game for run in runs] == ["Freeway"]
    assert runs[0].curve[0][0] == 70 and runs[0].curve[-1] == (
        trained["env_steps"],
        trained["mean_return"],
    )
    agent = report.measured_agents(report.group_runs("", runs))[0]
    assert agent.name == "jedi_atari" and agent.scores["Freeway"] == [np.mean(trained["returns"])]
    settings, known = runs[0].settings, {field.name for field in jedi.dataclasses.fields(args)}
    older = {"checkpoint_every", "keep_replay", "track"}
    assert known == report.NOT_SETTINGS - older | set(settings)


# --- wrong input: one line that names it, status 2, nothing written


def cut(text: str) -> str:
    return text[: len(text) // 2]


def edit(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


def without(key: str):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


BROKEN = {
    "half written": (cut, "cut off or not JSON"),
    "empty": (lambda _: "", "cut off or not JSON"),
    "a list": (lambda _: "[]", "not a JSON object"),
    "not of Atari 100k": (edit(env_id="ALE/Venture-v5"), "'ALE/Venture-v5'"),
    "misspelt game": (edit(env_id="Pnog"), "did you mean Pong"),
    "game is a number": (edit(env_id=3), "'env_id' is 3"),
    "no returns": (without("returns"), "no 'returns'"),
    "no arguments": (without("args"), "no 'args'"),
    "empty returns": (edit(returns=[]), "'returns' is []"),
    "text in returns": (edit(returns=[1.0, "2"]), "'returns' is"),
    "NaN in returns": (edit(returns=[float("nan")] * 5), "'returns' is [nan"),
    "fewer returns than games": (edit(returns=[1.0], mean_return=1.0), "1 returns of 5 games"),
    "altered mean": (edit(mean_return=1e6), "is not the mean"),
    "bad seed": (edit(seed=0.5), "'seed' is 0.5"),
    "seed is true": (edit(seed=True), "'seed' is True"),
    "other environment without returns": (
        edit(other_environments={"plain": {}}),
        "'other_environments'",
    ),
}


def refused(arguments: list[str], capsys, *words: str) -> None:
    """Exit status 2 and one line that has all the words."""
    assert report.main(arguments) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith("left out")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and not printed.out
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results_are_named_and_nothing_is_written(name, tmp_path, capsys):
    change, message = BROKEN[name]
    path = write_run(tmp_path / "runs", "Pong", 0) / "result.json"
    path.write_text(change(path.read_text()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("an earlier report")
    before = snapshot(tmp_path)
    refused(
        [str(tmp_path / "runs"), "--out", str(tmp_path / "out")], capsys, str(path), message, "move"
    )
    assert snapshot(tmp_path) == before
    write_run(tmp_path / "runs", "Boxing", 0)  # beside a good run it is left out, by name
    groups, left_out = report.load_groups([str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert [run.game for run in groups["jedi_atari"]] == ["Boxing"] and list(left_out) == [
        path.parent
    ]
    assert said.startswith(f"left out: {path}") and message in said and said.count("\n") == 1


def test_an_unfinished_run_is_left_out_by_name(pictures, tmp_path, monkeypatch, capsys):
    for name in ("games", "aggregates", "asymmetry", "action_sets", "profiles", "learning_curves"):
        monkeypatch.setattr(report, f"draw_{name}", lambda *_: None)
    write_run(tmp_path / "runs", "Pong", 0)
    (write_run(tmp_path / "runs", "Boxing", 0) / "result.json").unlink()
    arguments = [str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--reps", "2"]
    assert report.main(arguments) == 0
    said = capsys.readouterr().err
    assert f"left out: {tmp_path / 'runs/Boxing__0'} has no result.json" in said
    assert "left out: runs/Boxing__0." in (tmp_path / "out/runs.md").read_text()
    (tmp_path / "runs/Pong__0/result.json").unlink()
    refused(arguments, capsys, "nothing to report", "Boxing__0 has no result.json", "1 more")


def test_what_a_run_does_not_know_is_null(tmp_path):
    unknown = ("peak_memory_bytes", "git_commit", "open_loop_ratio", "reward_recall", "device")
    write_run(tmp_path, "Pong", 0, **dict.fromkeys(unknown))
    groups, left_out = report.load_groups([str(tmp_path)])
    records = report.run_records(groups)
    assert not left_out and json.loads(report.to_json(records))[0]["peak_memory_gib"] is None
    assert "| 1:30 | – | – | fp32 | paper | – |" in report.runs_markdown(records, left_out)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend_is_not_asked_for(backend, pictures):
    code = "import report; report.import_rliable(); report.import_pyplot().figure()"
    env = os.environ | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmark", env=env, check=True)


def test_a_picture_that_fails_costs_no_number(pictures, tmp_path, monkeypatch, capsys):
    def draw_games(*_):
        raise ValueError("two\nlines")

    monkeypatch.setattr(report, "draw_games", draw_games)
    for slow in ("aggregates", "action_sets", "profiles"):
        monkeypatch.setattr(report, f"draw_{slow}", lambda *_: None)
    out = tmp_path / "out"
    assert report.main(["--published", "--out", str(out), "--reps", "2"]) == 0
    assert capsys.readouterr().err == "no picture by draw_games: two lines\n"
    assert (out / "report.md").exists() and (out / "asymmetry.png").exists()


def test_broken_bytes_and_curves_are_named(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "Pong", 0)
    metrics, good = run / "metrics.jsonl", (run / "metrics.jsonl").read_text()
    arguments = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    for text, message in (
        (good + '{"epoch": 3, "ev', "line 4, is cut off"),
        ('{"eval/mean_return": "high"}\n', "line 1: evaluation 'high'"),
    ):
        metrics.write_text(text)  # a run's score is good without its curve
        groups, _ = report.load_groups([str(tmp_path / "runs")])
        assert groups["jedi_atari"][0].curve == []
        assert f"left out: {metrics}, {message}" in capsys.readouterr().err
    (run / "result.json").write_bytes(b"\xff\xfe\x00")
    refused(arguments, capsys, "result.json", "not text")
    assert not (tmp_path / "out").exists()


def test_mixed_settings_are_named(tmp_path, capsys):
    write_run(tmp_path / "runs", "Pong", 0)
    arguments = result("Boxing", 0)["args"] | {"batch_size": 64, "new": 1, "device": "cuda"}
    write_run(tmp_path / "runs", "Boxing", 0, args=arguments)
    paths = [str(tmp_path / "runs" / f"{game}__0" / "result.json") for game in ("Pong", "Boxing")]
    words = ["batch_size is 64 and 32", "new is 1 and 'absent'", "NAME1=FOLDER1", *paths]
    refused([str(tmp_path / "runs"), "--out", str(tmp_path / "out")], capsys, *words)
    assert not (tmp_path / "out").exists()
    groups, _ = report.load_groups([f"{g}={tmp_path / 'runs' / g}__0" for g in ("Pong", "Boxing")])
    assert set(groups) == {"Pong", "Boxing"}  # the remedy that the line names


def test_device_seed_and_game_are_not_settings(tmp_path):
    write_run(tmp_path, "Pong", 0)
    write_run(
        tmp_path, "Boxing", 1, args=result("Boxing", 1)["args"] | {"device": "cuda:3", "threads": 2}
    )
    write_run(tmp_path, "Pong", 1, env_id="PongNoFrameskip-v4")
    groups, _ = report.load_groups([str(tmp_path)])
    assert {(run.game, run.result["seed"]) for run in groups["jedi_atari"]} == {
        ("Pong", 0),
        ("Boxing", 1),
        ("Pong", 1),
    }


def test_a_seed_counts_once(tmp_path, capsys):
    for copy in ("a", "b"):
        write_run(tmp_path / copy, "Pong", 7)
    words = ("both Pong, seed 7", str(tmp_path / "a"), str(tmp_path / "b"), "move one")
    refused([str(tmp_path), "--out", str(tmp_path / "out")], capsys, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none", "--out", "o"], "none is not a folder"),
        ([".", "--out", "o"], "holds no result.json"),
        (["--out", "o"], "folders of results or --published"),
        (["runs", "--published", "--out", "o"], "one of the two"),
        (["runs"], "--out"),
        (["runs", "--out", "o", "--readme-table"], "--out FOLDER for a report, or --readme-table"),
        (["--published", "--out", "file"], "is a file"),
        (["--published", "--out", "o", "--reps", "0"], "--reps"),
        (["--published", "--out", "o", "--reps", "many"], "--reps"),
        (["--published", "--out", "o", "--colour"], "--colour"),
        (["=runs", "--out", "o"], "NAME=FOLDER"),
        (["DIAMOND=runs", "--out", "o"], "'DIAMOND'"),
        (["a=runs", "a=runs", "--out", "o"], "'a'"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if words != "holds no result.json":
        write_run(tmp_path / "runs", "Pong", 0)
    before = snapshot(tmp_path)
    refused(arguments, capsys, words)
    assert snapshot(tmp_path) == before and not (tmp_path / "o").exists()

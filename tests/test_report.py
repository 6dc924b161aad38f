"""benchmark/report.py and runs.py: the data, the numbers against rliable and published aggregates, and wrong input.

What needs rliable or matplotlib (benchmark/requirements.txt) is skipped where they cannot be imported.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

for package in ("rliable.library", "matplotlib", "PIL"):
    pytest.importorskip(
        package, reason="pip install -r benchmark/requirements.txt", exc_type=Exception
    )

import improvement  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
from rliable import library, metrics  # noqa: E402

GAMES, METRICS = list(report.GAMES), list(report.METRICS)
FEW = ["Alien", "Breakout", "Pong"]
AGENTS = {agent.name: agent for agent in report.published_agents()}


def result(game: str, seed: int, **changes) -> dict:
    """What a run writes, with made-up returns that no two games or seeds share."""
    low, high = report.GAMES[game]["random"], report.GAMES[game]["human"]
    draws = np.random.default_rng([seed, GAMES.index(game)]).lognormal(-0.7, 0.8, 5)
    returns = [float(low + (high - low) * x) for x in draws]
    args = {"env_id": game, "seed": seed, "final_episodes": 5, "eval_episodes": 4, "batch_size": 32}
    content = dict(env_id=game, script="jedi_atari", seed=seed, env_steps=100_000, returns=returns)
    content |= dict(mean_return=float(np.mean(returns)), wall_seconds=5400.0, args=args)
    return content | dict(peak_memory_bytes=3 * 2**30, device="cpu", preset="paper") | changes


def write_run(folder: Path, game: str, seed: int, **changes) -> Path:
    """A finished run folder with a learning curve."""
    run = folder / f"{game}__{seed}"
    run.mkdir(parents=True)
    lines = [{"charts/env_steps": 300, "eval/mean_return": 1.0}, {"charts/env_steps": 500.0}]
    for steps, mean in ((500.0, 2.0 + seed), (900.0, 4.0)):
        lines.append({"charts/env_steps": steps, "eval/mean_return": mean, "eval/std_return": 3.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "result.json").write_text(json.dumps(result(game, seed, **changes)))
    (run / "jedi_atari.py").write_text("# the script\n")
    return run


def scores(game: str, seeds: int) -> list[float]:
    return [result(game, seed)["mean_return"] for seed in range(seeds)]


def normalised(game: str, values) -> np.ndarray:
    low, high = report.GAMES[game]["random"], report.GAMES[game]["human"]
    return (np.asarray(values) - low) / (high - low)


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the data


def split_by(scores_of: dict[str, dict[str, float]]) -> set[str]:
    """Games whose mean human-normalised score over the four agents is above the threshold."""
    rule, chosen = report.PUBLISHED["agent_optimal"], set()
    for game in GAMES:
        total = sum(normalised(game, scores_of[agent][game]) for agent in rule["agents"])
        chosen |= {game} if total / len(rule["agents"]) > rule["threshold"] else set()
    return chosen


def test_agent_optimal_games_follow_from_the_printed_table_and_not_from_the_released_scores():
    agents = report.PUBLISHED["agent_optimal"]["agents"]
    assert agents == ["IRIS", "TWM", "DreamerV3", "STORM"]
    assert split_by(report.PUBLISHED["diamond_table1"]["scores"]) == set(report.AGENT_OPTIMAL)
    assert len(report.AGENT_OPTIMAL) == len(report.SUBSETS["human_optimal"]) == 13
    released = {name: {game: AGENTS[name].scores[game].mean() for game in GAMES} for name in agents}
    moved = split_by(released) ^ set(report.AGENT_OPTIMAL)
    assert moved and moved <= {"Freeway", "UpNDown", "Kangaroo"}


def test_random_and_human_scores_and_action_sets():
    import ale_py
    import gymnasium as gym

    gym.register_envs(ale_py)
    table = report.PUBLISHED["diamond_table1"]["scores"]
    for game, known in report.GAMES.items():
        assert known["random"] == table["Random"][game] < known["human"] == table["Human"][game]
        env = gym.make(f"ALE/{game}-v5")
        assert env.action_space.n == known["actions"], game
        env.close()


def test_where_a_source_prints_another_number_it_is_noted():
    table, found = report.PUBLISHED["diamond_table1"]["scores"], set()
    for name, entry in report.PUBLISHED["agents"].items():
        for other in entry.get("printed_differently", []):
            for game, value in other["scores"].items():
                assert abs(value - AGENTS[name].scores[game].mean()) > 0.5
                found.add((name, game))
    differing = {
        (name, game)
        for name in report.PUBLISHED["main"]  # the table prints one decimal or none
        for game in GAMES
        if abs(table[name][game] - AGENTS[name].scores[game].mean()) > 0.51
    }
    assert ("STORM", "Freeway") in differing <= found
    assert "DIAMOND, arXiv 2405.12399, table 1: Freeway 33.5" in report.notes_of([AGENTS["STORM"]])


# --- the numbers


def test_harmonic_mean_is_that_of_a_plain_loop():
    hns = np.random.default_rng(0).normal(0.8, 0.2, 26)
    total = 0.0
    for value in hns:
        total += 1 / (value + 0.1)
    assert math.isclose(report.harmonic_hns(hns), 1 / (total / 26), rel_tol=1e-12)
    assert report.harmonic_hns(np.array([0.4, 0.4])) == pytest.approx(0.5)  # 0.1 is not taken off
    assert report.harmonic_hns(np.array([1.0, -0.1])) is None


def test_aggregates_come_from_rliable():
    for games in report.SUBSETS.values():
        matrix = np.stack([normalised(game, AGENTS["IRIS"].scores[game]) for game in games], axis=1)
        summary = report.aggregate(AGENTS["IRIS"], games, 50, seed=3)
        for name in METRICS:
            function = getattr(metrics, f"aggregate_{name}")
            np.random.seed(3)
            points, intervals = library.get_interval_estimates(
                {"x": matrix}, lambda m, f=function: np.array([f(m)]), reps=50
            )
            assert summary[name] == pytest.approx(points["x"][0], rel=1e-12)
            assert summary[f"{name}_interval"] == pytest.approx(intervals["x"][:, 0], rel=1e-12)


def test_diamonds_published_aggregates_come_back():
    summary = report.aggregate(AGENTS["DIAMOND"], GAMES, 2, 0)
    found = [round(summary[key], 3) for key in ("mean", "iqm", "superhuman", "har_hns")]
    assert found == [1.459, 0.641, 11, 0.319]  # the last as the JEDI paper quotes it
    assert summary["n_games"] == 26 and summary["n_runs"] == summary["n_runs_max"] == 5


def test_printed_aggregates_come_back_but_for_known_differences():
    known = {(name, key) for name in ("DreamerV3", "STORM") for key in ("mean", "iqm")}
    known |= {("STORM", "superhuman"), ("DreamerV3-2024", "mean"), ("DreamerV3-2024", "median")}
    checked, different = 0, set()
    for name, agent in AGENTS.items():
        summary = report.aggregate(agent, GAMES, 2, 0)
        for key, printed in agent.printed.items():
            checked += key != "where"
            if key != "where" and round(summary[key], 3) != printed:
                different.add((name, key))
    assert different == known and checked >= 30
    # IRIS is exactly at human level on Pong, and its paper counts that; STORM's needs the printed score of Freeway.
    assert report.aggregate(AGENTS["IRIS"], GAMES, 2, 0)["superhuman"] == 10
    storm = report.Agent("STORM", AGENTS["STORM"].scores | {"Freeway": np.full(5, 33.5)})
    summary = report.aggregate(storm, GAMES, 2, 0)
    assert [round(summary[k], 3) for k in ("mean", "iqm", "superhuman")] == [1.266, 0.636, 10]


def test_jedis_own_aggregates_are_quoted_and_no_more():
    quoted = report.aggregate(AGENTS["JEDI"], GAMES, 2, 0)
    known = dict(mean=1.450, iqm=0.688, optimality_gap=0.460, har_hns=0.377, superhuman=11)
    assert quoted | known == quoted and quoted["median"] is quoted["mean_interval"] is None
    assert report.aggregate(AGENTS["JEDI"], report.AGENT_OPTIMAL, 2, 0)["mean"] is None
    assert "Second-hand" in report.notes_of([AGENTS["JEDI"]])


def test_games_with_other_numbers_of_runs_weigh_alike():
    played = {
        "Pong": [0.0, 10.0, -10.0],
        "Breakout": [5.0, 20.0],
        "Boxing": [1.0, 50.0, 40.0, 30.0],
    }
    agent = report.Agent("x", {game: np.array(values) for game, values in played.items()})
    summary = report.aggregate(agent, list(played), 100, 0)
    hns = {game: normalised(game, values) for game, values in played.items()}
    assert summary["mean"] == pytest.approx(np.mean([values.mean() for values in hns.values()]))
    gap = 1 - np.mean([np.minimum(values, 1).mean() for values in hns.values()])
    assert summary["optimality_gap"] == pytest.approx(gap)
    weighted = sorted((value, 1 / len(values)) for values in hns.values() for value in values)
    position, middle = 0.0, 0.0  # the mean of the middle half, by hand
    for value, weight in weighted:
        middle += value * max(0.0, min(position + weight, 2.25) - max(position, 0.75))
        position += weight
    assert summary["iqm"] == pytest.approx(middle / 1.5, rel=1e-9)
    assert summary["n_runs"] == 2 and summary["n_runs_max"] == 4
    assert summary["mean_interval"][0] < summary["mean"] < summary["mean_interval"][1]


def test_one_run_has_no_interval_and_the_global_generator_is_left_alone():
    agent = report.Agent("x", {"Pong": np.array([1.0]), "Boxing": np.array([1.0, 2.0])})
    assert report.aggregate(agent, ["Pong", "Boxing"], 10, 0)["mean_interval"] is None
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    report.aggregate(AGENTS["IRIS"], GAMES, 2, 0)
    assert np.random.random() == expected


# --- a report


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The report of all games, two seeds; of three games, one or two seeds, other batch size; and a toy's run."""
    folder = tmp_path_factory.mktemp("whole")
    for game in GAMES:
        for seed in range(2):
            write_run(folder / "a", game, seed)
    for game, seeds in zip(FEW, (1, 2, 2), strict=True):
        for seed in range(seeds):
            write_run(
                folder / "b", game, seed, args=result(game, seed)["args"] | {"batch_size": 64}
            )
    write_run(folder / "b", "Pong", 7, env_id="examples.toys:Catch-v0")
    words = [f"full={folder / 'a'}", f"few={folder / 'b'}", "--out", str(folder / "out")]
    assert report.main([*words, "--reps", "20", "--formats", "csv", "svg"]) == 0
    return folder


def test_aggregates_of_own_runs(whole):
    aggregates = json.loads((whole / "out/aggregates.json").read_text())
    for subset, games in report.SUBSETS.items():
        matrix = np.stack([normalised(game, scores(game, 2)) for game in games], axis=1)
        summary = aggregates["full"][subset]
        for name in METRICS:
            assert summary[name] == pytest.approx(getattr(metrics, f"aggregate_{name}")(matrix))
        assert summary["superhuman"] == sum(matrix.mean(0) >= 1)
        assert summary["har_hns"] == pytest.approx(report.harmonic_hns(matrix.mean(0)))
        assert (summary["n_games"], summary["n_runs"], summary["missing"]) == (len(games), 2, [])
        few = aggregates["few"][subset]  # no aggregate over games that are not there
        assert all(few[key] is None for key in (*METRICS, "superhuman", "har_hns"))
        assert few["n_games"] == len({*FEW} & {*games}) == len(games) - len(few["missing"])
    same = {name: found["games of few"] for name, found in aggregates.items()}
    matrix = np.stack([normalised(game, AGENTS["DIAMOND"].scores[game]) for game in FEW], axis=1)
    assert same["DIAMOND"]["iqm"] == pytest.approx(metrics.aggregate_iqm(matrix))
    assert (
        same["few"]["mean"] is not None and same["few"]["mean_interval"] is None
    )  # one run of Alien
    means = [
        normalised(game, scores(game, n)).mean() for game, n in zip(FEW, (1, 2, 2), strict=True)
    ]
    assert same["few"]["mean"] == pytest.approx(np.mean(means))


def test_report_shows_what_was_run(whole, capsys):
    text = (whole / "out/report.md").read_text()
    assert "full (n=2), few (n=1-2, 3 of 26 games)" in text and str(whole / "out") not in text
    assert "Pong__7 is of 'examples.toys:Catch-v0', not of Atari 100k" in text
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| Pong | 6 |")).split(" | ")
    values = scores("Pong", 2)
    shown = f"{np.mean(values):,.1f} ± {np.std(values, ddof=1):,.1f}"
    assert row[-2] == shown == row[-1].removesuffix(" |")
    assert next(line for line in lines if line.startswith("| Freeway |")).endswith("not run |")
    made = [line for line in lines if line.startswith("| few | ")]
    assert len(made) == 5 + 1 and " | 1:30:00 | 3.0 | cpu | " in made[0]  # 5 runs, the aggregates
    script = subprocess.run(
        ["git", "hash-object", "--stdin"], input=b"# the script\n", capture_output=True
    )
    assert script.stdout.decode()[:7] in made[0]
    csv = (whole / "out/scores.csv").read_text().splitlines()
    assert csv[0].startswith("agent,game") and sum(line.startswith("full,") for line in csv) == 26
    pictures = {path.stem for path in (whole / "out").glob("*.png")}
    assert pictures == {path.stem for path in (whole / "out").glob("*.svg")} and len(pictures) == 6
    assert all(f"({name}.png)" in text for name in pictures)
    report.load_groups([str(whole / "b")])
    said = capsys.readouterr().err  # and the other game is left out, by name
    assert (
        said.count("\n") == 1
        and "Pong__7 is of 'examples.toys:Catch-v0', not of Atari 100k" in said
    )


def test_own_runs_are_in_every_picture(whole):
    """By the words in the figures: the agent, its number of runs and of games."""
    groups = report.load_groups([f"few={whole / 'b'}"])
    agents = report.published_agents() + report.measured_agents(groups)
    subsets = report.subsets_of(agents)
    found = {a.name: {s: report.aggregate(a, g, 2, 0) for s, g in subsets.items()} for a in agents}
    figures = [report.draw_games(agents), report.draw_action_sets(agents)]
    figures += [report.draw_aggregates(agents, found), report.draw_asymmetry(agents)]
    figures.append(report.draw_profiles(agents, 2, 0))

    def words(figure) -> set[str]:
        return {text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))}

    for figure in figures:
        assert "few (n=1-2, 3 of 26 games)" in words(figure)
        lines = [line for axis in figure.axes for line in axis.lines]
        assert {line.get_solid_capstyle() for line in lines} == {
            "butt"
        }  # no longer than its interval
    curves = runs.draw_learning_curves(groups)
    assert {"few", "Alien (n=1, human 7,128)", "Pong (n=2, human 15)"} <= words(curves)


def test_a_curve_is_the_mean_and_range_over_seeds(whole):
    found = [run for run in runs.find_runs(whole / "a") if run.game == "Pong"]
    steps, mean, low, high = runs.mean_and_range([run.curve for run in found])
    at_end = [run.result["mean_return"] for run in found]
    assert (steps[0], mean[0], low[0], high[0]) == (500, 2.5, 2, 3)  # not the first, of random play
    assert [mean[-1], low[-1], high[-1]] == pytest.approx([np.mean(at_end), *sorted(at_end)])
    half = found[0].curve[:, 2]  # of 4 games with a standard deviation of 3 (n)
    assert half[0] == pytest.approx(1.96 * 3 / math.sqrt(3)) and math.isnan(half[-1])


def test_a_report_is_replaced_and_nothing_else_is(tmp_path, monkeypatch, capsys):
    for slow in ("games", "aggregates", "action_sets", "profiles"):  # one picture is enough here
        monkeypatch.setattr(report, f"draw_{slow}", lambda *_: [][0])
    words, out = ["--published", "--reps", "2", "--out"], tmp_path / "out"
    assert report.main([*words, str(out)]) == 0
    assert "no picture games.png: IndexError: list index out of range" in capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert "nothing, published scores alone" in text and "(games.png)" not in text
    before = snapshot(out)
    assert {*before} == {"report.md", "aggregates.json", "asymmetry.png"}
    (out / "learning_curves.png").write_bytes(b"of an earlier report")
    (out / "runs.jsonl").write_text("mine")
    assert report.main([*words, str(out)]) == 0
    assert snapshot(out) == before | {"runs.jsonl": b"mine"}  # the same numbers, the same bytes
    (out / "report.md").write_text("# Mine\n")
    capsys.readouterr()
    assert report.main([*words, str(out)]) == 2 and "other files" in capsys.readouterr().err
    assert (out / "report.md").read_text() == "# Mine\n"


def test_published_scores_in_results_are_those_of_today():
    text = (ROOT / "results/published/report.md").read_text()
    for game in GAMES:
        assert f"| {game} | {report.GAMES[game]['actions']} | " in text
    for name in ("DIAMOND", "JEDI"):
        row = report.aggregate_table(
            [AGENTS[name]], {name: {"all": report.aggregate(AGENTS[name], GAMES, 2000, 0)}}, "all"
        ).splitlines()[-1]
        assert row in text


def test_real_run_folder_is_understood(tmp_path, micro):
    import jedi_atari as jedi

    short = dict(total_steps=90, first_steps_max=70, first_diffusion_updates=1, final_epochs=0)
    short |= dict(first_reward_updates=1, env_id="ALE/Freeway-v5", run_dir=str(tmp_path / "run"))
    short |= dict(encoder_stride=2, sample_steps=1)
    trained = jedi.train(jedi.dataclasses.replace(micro, **short))
    (run,) = runs.find_runs(tmp_path)
    assert run.game == "Freeway" and run.cut
    assert run.curve[0, 0] == 70 and math.isnan(run.curve[0, 2])  # of one game
    assert [*run.curve[-1, :2]] == [trained["env_steps"], trained["mean_return"]]
    git = ["git", "hash-object", str(ROOT / "jedi_atari.py")]
    assert run.script == subprocess.run(git, capture_output=True, text=True).stdout.strip()
    (agent,) = report.measured_agents(report.load_groups([str(tmp_path)]))
    assert agent.label == "jedi_atari, 0k steps, games cut (n=1, 1 of 26 games)"
    assert agent.scores["Freeway"] == [np.mean(trained["returns"])]
    known = {field.name for field in jedi.dataclasses.fields(jedi.Args)}
    assert known | {"environment"} == runs.NOT_SETTINGS | set(run.settings)


# --- wrong input: one line that names it, status 2, nothing written


def edit(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


def without(key: str):
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


BROKEN = {
    "half written": (lambda text: text[: len(text) // 2], "cut off or not JSON"),
    "a list": (lambda _: "[]", "not a JSON object"),
    "misspelt game": (edit(env_id="Pnog"), "did you mean Pong"),
    "not of Atari 100k": (edit(env_id="ALE/Venture-v5"), "'ALE/Venture-v5'"),
    "game is a number": (edit(env_id=3), "'env_id' is 3"),
    "no returns": (without("returns"), "no 'returns'"),
    "empty returns": (edit(returns=[]), "'returns' is []"),
    "text in returns": (edit(returns=[1.0, "2"]), "'returns' is"),
    "NaN in returns": (edit(returns=[float("nan")] * 5), "'returns' is [nan"),
    "fewer returns than games": (edit(returns=[1.0], mean_return=1.0), "1 returns of 5 games"),
    "altered mean": (edit(mean_return=1e6), "is not the mean"),
    "seed is true": (edit(seed=True), "'seed' is True"),
    "lengths are text": (edit(lengths="long"), "'lengths' is 'long'"),
    "updates are a number": (edit(updates=3), "'updates' is 3"),
    "no arguments": (edit(args=None), "'args' is None"),
}


def refused(words: list[str], capsys, *expected: str) -> None:
    """Exit status 2 and one line that has all the words."""
    assert report.main(words) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith("left out")]
    assert len(errors) == 1 and errors[0].startswith("report.py: error: ") and not printed.out
    assert all(word in errors[0] for word in expected), errors


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results_are_named_and_nothing_is_written(name, tmp_path, capsys):
    change, message = BROKEN[name]
    run = write_run(tmp_path / "runs", "Pong", 0)
    (run / "result.json").write_text(change((run / "result.json").read_text()))
    before = snapshot(tmp_path)
    refused([str(tmp_path / "runs"), "--out", str(tmp_path / "out")], capsys, str(run), message)
    assert snapshot(tmp_path) == before
    write_run(tmp_path / "runs", "Boxing", 0)  # beside a good run it is left out, by name
    groups = report.load_groups([str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert [run.game for run in groups["jedi_atari"]] == ["Boxing"]
    assert said.startswith(f"left out: {run}") and message in said and said.count("\n") == 1


def test_any_value_anywhere_is_taken_or_named(tmp_path):
    """In a run folder and in a file of runs: what is read is drawn and tabled, the rest is `BadInput`, nothing else."""
    row = {"result": result("Pong", 0), "metrics": [], "script": "abc"}
    row["result"] |= dict(
        lengths=[90] * 5, returns_random=[1.0, 2.0], reward_recall=0.5, updates={}
    )
    row["result"]["args"] |= {"max_episode_steps": 90}
    row["metrics"] = [
        {"charts/env_steps": k, "eval/mean_return": 1.0, "eval/std_return": 1.0} for k in (1, 2, 3)
    ]
    places = [((), key) for key in row] + [(("result",), key) for key in row["result"]]
    places += [(("result", "args"), key) for key in row["result"]["args"]]
    places += [(("metrics", 1), key) for key in row["metrics"][1]] + [(("metrics",), 1)]
    values = [None, "x", -3, math.nan, 1e308, 10**400, [], [1, "a"], {}, {"a": 1}, True, ...]
    refused_ones = 0
    for (path, key), value in itertools.product(places, values):
        changed = place = json.loads(json.dumps(row))
        for step in path:
            place = place[step]
        if value is ...:
            place.pop(key)
        else:
            place[key] = value
        (folder := tmp_path / "run").mkdir(exist_ok=True)
        (folder / "result.json").write_text(json.dumps(changed.get("result")))
        logged = changed.get("metrics")
        lines = [json.dumps(line) + "\n" for line in (logged if isinstance(logged, list) else [])]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (kept := tmp_path / "runs.jsonl").write_text(json.dumps(changed) + "\n")
        for source in (folder, kept):
            try:
                groups = report.load_groups([f"own={source}"])
                report.scores_frame(report.measured_agents(groups)), report.runs_frame(groups)
                assert runs.mean_and_range([run.curve for run in groups["own"]])
                improvement.table(runs.find_runs(source, improvement.has_random_play))
            except report.BadInput:
                refused_ones += 1
    assert 0.3 < refused_ones / (2 * len(places) * len(values)) < 0.9


def test_broken_bytes_curves_and_unfinished_runs_are_named(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "Pong", 0)
    logged, good = run / "metrics.jsonl", (run / "metrics.jsonl").read_text()
    for text, message in (
        (good + '{"epoch": 3, "ev', "line 5, is cut off"),
        ('{"eval/mean_return": "high"}\n', "line 1: eval/mean_return is 'high'"),
    ):
        logged.write_text(text)  # a run's score is good without its curve
        assert len(runs.find_runs(tmp_path / "runs")[0].curve) == 1
        assert f"left out: {logged}, {message}" in capsys.readouterr().err
    (run / "result.json").write_bytes(b"\xff\xfe\x00")
    words = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    refused(words, capsys, "result.json", "not text")
    (run / "result.json").unlink()
    write_run(tmp_path / "runs", "Boxing", 0)
    assert len(runs.find_runs(tmp_path / "runs")) == 1
    assert f"left out: {run} has no result.json; finish it" in capsys.readouterr().err


def test_what_does_not_belong_together_is_named(tmp_path, capsys):
    words = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    pong = write_run(tmp_path / "runs", "Pong", 0)
    changed = result("Boxing", 0)["args"] | {"batch_size": 64, "new": 1, "device": "cuda"}
    boxing = write_run(tmp_path / "runs", "Boxing", 0, args=changed)
    told = ("batch_size is 64 and 32", "new is 1 and 'absent'", "folder of its own")
    refused(words, capsys, *told, str(pong), str(boxing))
    one, other = report.load_groups([f"{f.name}={f}" for f in (pong, boxing)])  # the remedy
    assert (one, other) == ("Pong__0", "Boxing__0") and not (tmp_path / "out").exists()
    (boxing / "result.json").write_text(json.dumps(result("Pong", 0, env_id="ALE/Pong-v5")))
    refused(words, capsys, "both Pong, seed 0", str(pong), str(boxing), "move one")
    cuda = result("Pong", 1)["args"] | {"device": "cuda:3", "threads": 2, "seed": 1}
    (boxing / "result.json").write_text(json.dumps(result("Pong", 1, args=cuda)))
    assert len(report.load_groups(words[:1])["jedi_atari"]) == 2  # neither device nor seed
    (boxing / "result.json").write_text(json.dumps(result("Pong", 1, environment="stochastic")))
    refused(words, capsys, "environment is 'stochastic' and 'plain'")
    (boxing / "result.json").write_text(
        json.dumps(result("Pong", 0, args=changed, script="jedi_atari_stochastic"))
    )
    assert set(report.load_groups(words[:1])) == {"jedi_atari", "jedi_atari_stochastic"}


def test_links_to_run_folders_are_followed_and_each_run_counts_once(tmp_path):
    made = [write_run(tmp_path / "there", game, 0) for game in FEW]
    (here := tmp_path / "here").mkdir()
    for i, run in enumerate([*made, made[0]]):
        (here / f"link{i}").symlink_to(run)
    (made[0] / "circle").symlink_to(here)
    assert sorted(run.game for run in runs.find_runs(here)) == FEW


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "--out", "o"], "none is not there"),
        ([".", "--out", "o"], "holds no result.json"),
        (["--out", "o"], "folders of results or --published"),
        (["runs", "--published", "--out", "o"], "one of the two"),
        (["--published", "--out", "file"], "is a file"),
        (["--published", "--out", "o", "--reps", "0"], "--reps"),
        (["file", "--out", "o"], "file does not end in .jsonl"),
        (["=runs", "--out", "o"], "NAME=FOLDER"),
        (["a\nb=runs", "--out", "o"], "NAME=FOLDER"),
        (["DIAMOND=runs", "--out", "o"], "'DIAMOND'"),
        (["a=runs", "a=runs", "--out", "o"], "'a'"),
        (["file.jsonl", "--out", "o"], "holds no result.json"),
        (["rows.jsonl", "--out", "o"], "rows.jsonl, line 1, has no 'result'; delete that line"),
    ],
)
def test_wrong_words(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "file.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    if "holds no result.json" not in message:
        write_run(tmp_path / "runs", "Pong", 0)
    before = snapshot(tmp_path)
    refused(words, capsys, message)
    assert snapshot(tmp_path) == before and not (tmp_path / "o").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    for name in ("games", "aggregates", "asymmetry", "action_sets", "profiles"):
        monkeypatch.setattr(
            report, f"draw_{name}", lambda *_: report.new_figure("", 1, 1, (2, 1))[0]
        )
    words, old = ["--published", "--reps", "2", "--out", str(tmp_path / "o")], tmp_path / "o"
    assert report.main(words) == 0
    before = snapshot(old)
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "with_name", lambda *_: tmp_path / "full")
    assert report.main(words) == 1 and snapshot(old) == before
    error = f"report.py: failed: cannot write {old}/aggregates.json: No space left on device\n"
    assert capsys.readouterr().err.endswith(error)

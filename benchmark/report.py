"""Tables and pictures from run folders, beside the published Atari 100k scores.

    python benchmark/report.py runs --out report              # every result.json below runs/
    python benchmark/report.py small=runs/a large=runs/b --out report    # two settings, named
    python benchmark/report.py --published --out results/published       # the published scores alone
    python benchmark/report.py small=results/small --readme-table        # prints a Markdown table for a README

Needs benchmark/requirements.txt. A report is one folder: report.md shows everything; each table is there as Markdown,
CSV and JSON, each picture as PNG and SVG.

The score of a run is the mean return of its final evaluation. Human-normalised: (score - random) / (human - random).
Mean, median, interquartile mean (IQM), optimality gap and their 95% stratified bootstrap intervals are rliable's
(Agarwal et al. 2021, arXiv 2108.13264). Games above human and Har-HNS, the harmonic mean of the JEDI paper (arXiv
2605.13013), are of each game's mean over runs. All of it also for the Agent-Optimal and the Human-Optimal games apart
(arXiv 2505.19698). An aggregate over a set of games is made only from all games of the set.
"""

import argparse
import csv
import dataclasses
import difflib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's may not be here
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
GAMES: dict[str, dict] = PUBLISHED["games"]
AGENT_OPTIMAL: list[str] = PUBLISHED["agent_optimal"]["games"]
SUBSETS: dict[str, list[str]] = {
    "all": list(GAMES),
    "agent_optimal": AGENT_OPTIMAL,
    "human_optimal": [game for game in GAMES if game not in AGENT_OPTIMAL],
}
SUBSET_TITLES = {
    "all": f"all {len(GAMES)} games",
    "agent_optimal": f"{len(AGENT_OPTIMAL)} Agent-Optimal games",
    "human_optimal": f"{len(GAMES) - len(AGENT_OPTIMAL)} Human-Optimal games",
}
METRICS = {"mean": "Mean", "median": "Median", "iqm": "IQM", "optimality_gap": "Optimality gap"}
HARMONIC_OFFSET = (
    0.1  # keeps the harmonic mean finite where an agent plays like chance (arXiv 2605.13013)
)
REMEDY = "move the run folder away, or make the run again"
README_MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")

# Arguments of a run that change how or where it is computed, or which game is played, but not the method.
NOT_SETTINGS = set(
    "env_id seed threads device precision compile cuda_graphs run_dir resume eval_only dry_run".split()
    + "checkpoint_every keep_replay track".split()  # of older runs
)
TABLES = (
    "scores",
    "aggregates",
    "same_games",
    "asymmetry",
    "action_sets",
    "runs",
    "learning_curves",
)
PICTURES = (
    "games",
    "aggregates",
    "asymmetry",
    "action_sets",
    "performance_profiles",
    "learning_curves",
)
REPORT_FILES = {"report.md"} | {
    f"{table}.{ending}" for table in TABLES for ending in ("md", "csv", "json")
}
REPORT_FILES |= {f"{picture}.{ending}" for picture in PICTURES for ending in ("png", "svg")}


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what to do."""


# ======================================================================================================================
# Scores: published ones, and those of run folders
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Agent:
    """Scores of one agent: game -> one number per run (or the only one known, the mean, if `means_only`)."""

    name: str
    scores: dict[str, np.ndarray]
    measured: bool = False  # by run folders, not published
    main: bool = False  # in the pictures and the first table
    means_only: bool = False
    episodes: int | None = None  # games behind each score
    notes: tuple[str, ...] = ()  # on all of its scores
    game_notes: dict[str, str] = dataclasses.field(default_factory=dict)
    printed_aggregates: dict = dataclasses.field(default_factory=dict)

    def hns(self, game: str) -> np.ndarray:
        """Human-normalised scores of the runs of a game."""
        low, high = GAMES[game]["random"], GAMES[game]["human"]
        return (self.scores[game] - low) / (high - low)

    def mean_hns(self, games: Iterable[str]) -> np.ndarray:
        """Mean over runs, per game."""
        return np.array([self.hns(game).mean() for game in games])

    def present(self, games: Iterable[str]) -> list[str]:
        return [game for game in games if game in self.scores]


def published_agents() -> list[Agent]:
    """The agents of published.json; where other sources print other numbers, a note per game says so."""
    agents = []
    for name, entry in PUBLISHED["agents"].items():
        scores = entry.get("runs") or {game: [mean] for game, mean in entry["means"].items()}
        differences: dict[str, list[str]] = {}
        for table in entry.get("printed_differently", []):
            for game, value in table["scores"].items():
                differences.setdefault(game, []).append(f"{value:g} in {table['where']}")
        agents.append(
            Agent(
                name,
                {game: np.array(values, dtype=float) for game, values in scores.items()},
                main=name in PUBLISHED["main"],
                means_only="means" in entry,
                notes=(f"source: {entry['source']}.", *entry.get("notes", [])),
                game_notes={
                    game: f"{name}, {game}: " + "; ".join(texts) + "."
                    for game, texts in differences.items()
                },
                printed_aggregates=entry.get("printed_aggregates", {}),
            )
        )
    return agents


@dataclasses.dataclass(frozen=True)
class Run:
    """What a report needs of one run folder."""

    path: Path  # of result.json
    folder: Path  # the results folder it was found in
    game: str
    result: dict
    curve: list[tuple[float, float]]  # environment steps and mean return of each evaluation

    @property
    def settings(self) -> dict:
        return {key: value for key, value in self.result["args"].items() if key not in NOT_SETTINGS}

    def played(self) -> dict[str, list[float]]:
        """Environment -> returns of the final evaluation; the first one was trained in."""
        others = {
            name: played["returns"]
            for name, played in self.result.get("other_environments", {}).items()
        }
        return {self.result.get("environment", "plain"): self.result["returns"], **others}


def game_name(env_id: str, path: Path) -> str:
    """The short name of a game behind the spellings that the training script accepts."""
    name = re.sub(r"(NoFrameskip-v\d|-v\d)$", "", env_id.removeprefix("ALE/"))
    if name in GAMES:
        return name
    close = difflib.get_close_matches(name, GAMES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"they are {', '.join(GAMES)}"
    raise BadInput(
        f"{path}: game {env_id!r} is none of the {len(GAMES)} of Atari 100k, {hint}; move this run away"
    )


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def are_returns(value) -> bool:
    return isinstance(value, list) and bool(value) and all(is_number(x) for x in value)


def are_played(value) -> bool:
    """Environments, each with its returns."""
    played = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(one, dict) and are_returns(one.get("returns")) for one in played)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value)


REQUIRED: tuple[tuple[str, Callable, str], ...] = (
    ("env_id", is_text, "a name"),
    ("script", is_text, "a name"),
    ("seed", lambda value: is_number(value) and value == int(value), "a whole number"),
    ("env_steps", is_number, "a number"),
    ("returns", are_returns, "a list of finite numbers, one per game"),
    ("mean_return", is_number, "a finite number"),
    ("wall_seconds", is_number, "a number"),
    ("peak_memory_bytes", lambda value: value is None or is_number(value), "a number or null"),
    ("args", lambda value: isinstance(value, dict), "the arguments of the run"),
)


def read_json(text: str, where: str) -> dict:
    """A JSON object; NaN and infinities, which are not JSON, are let through to the checks of each key."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where} is cut off or not JSON ({error}); {REMEDY}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{where} is not a JSON object; {REMEDY}")
    return content


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8); {REMEDY}") from None


def read_result(path: Path) -> dict:
    """A checked result.json. Raises `BadInput` that names what is wrong with it."""
    result = read_json(read_text(path), str(path))
    for key, fits, wanted in REQUIRED:
        if key not in result:
            raise BadInput(f"{path} has no {key!r}: it is not the whole result of a run; {REMEDY}")
        if not fits(result[key]):
            raise BadInput(f"{path}: {key!r} is {short(result[key])}, not {wanted}; {REMEDY}")
    if not are_played(result.get("other_environments", {})):
        raise BadInput(f"{path}: 'other_environments' lacks returns; {REMEDY}")
    mean, count = float(np.mean(result["returns"])), result["args"].get("final_episodes")
    if not math.isclose(mean, result["mean_return"], rel_tol=1e-6, abs_tol=1e-6):
        raise BadInput(
            f"{path}: mean_return {result['mean_return']:g} is not the mean of its returns, {mean:g}; {REMEDY}"
        )
    if count is not None and count != len(result["returns"]):
        raise BadInput(f"{path} has {len(result['returns'])} returns of {count} games; {REMEDY}")
    return result


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_curve(path: Path, result: dict) -> list[tuple[float, float]]:
    """Evaluations in metrics.jsonl, then the final one; empty where the run folder keeps no metrics.jsonl.

    Raises `BadInput` that names what is wrong with it."""
    if not path.exists():
        return []
    curve, steps = [], 0.0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        metrics = read_json(line, f"{path}, line {number},")
        steps = metrics.get("charts/env_steps", steps)
        score = metrics.get("eval/mean_return")
        if score is not None:
            if not (is_number(score) and is_number(steps)):
                raise BadInput(
                    f"{path}, line {number}: evaluation {short(score)} at step {short(steps)}; {REMEDY}"
                )
            curve.append((float(steps), float(score)))
    return [*curve, (float(result["env_steps"]), result["mean_return"])]


def find_runs(folder: Path) -> tuple[list[Run], dict[Path, str]]:
    """All runs below a folder, and the run folders that are left out, with the reason."""
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder; give one that holds run folders with a result.json"
        )
    runs, left_out = [], {}
    for path in sorted(folder.rglob("*.json*")):
        if path.name in ("args.json", "metrics.jsonl"):
            if not path.with_name("result.json").exists():
                left_out[path.parent] = f"{path.parent} has no result.json; finish it with --resume"
        elif path.name == "result.json":
            try:
                result = read_result(path)
                game = game_name(result["env_id"], path)
            except (BadInput, OSError) as error:
                left_out[path.parent] = str(error)
                continue
            metrics, curve = path.with_name("metrics.jsonl"), []
            try:
                curve = read_curve(metrics, result)
            except BadInput as error:  # the score is good without
                left_out[metrics] = str(error)
            runs.append(Run(path, folder, game, result, curve))
    return runs, left_out


def check_same_settings(runs: list[Run]) -> None:
    """One agent is one method: its runs may differ in game, seed and machine only."""
    first = runs[0]
    for run in runs[1:]:
        a, b = first.settings, run.settings
        differing = [
            key for key in sorted({*a, *b}) if a.get(key) != b.get(key) or (key in a) != (key in b)
        ]
        if differing:
            shown = "; ".join(
                f"{k} is {a.get(k, 'absent')!r} and {b.get(k, 'absent')!r}" for k in differing[:3]
            )
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise BadInput(
                f"different settings in {first.path} and {run.path}: {shown}{more}; put each setting into a folder "
                "of its own and give them names: NAME1=FOLDER1 NAME2=FOLDER2"
            )


def check_no_duplicates(runs: list[Run]) -> None:
    """A seed counts once."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        key = (run.game, run.result["seed"])
        if key in seen:
            raise BadInput(
                f"{seen[key].path} and {run.path} are both {run.game}, seed {run.result['seed']}; move one of them away"
            )
        seen[key] = run


def group_runs(name: str, runs: list[Run]) -> dict[str, list[Run]]:
    """Agent -> runs. An agent is called after its script, or `name`; the two scripts are two agents."""
    scripts = sorted({run.result["script"] for run in runs})
    groups = {}
    for script in scripts:
        label = script if not name else name if len(scripts) == 1 else f"{name} ({script})"
        groups[label] = [run for run in runs if run.result["script"] == script]
        check_same_settings(groups[label])
        check_no_duplicates(groups[label])
    return groups


def measured_agents(groups: dict[str, list[Run]]) -> list[Agent]:
    """One agent per group and environment that it was evaluated in."""
    agents = []
    for label, runs in groups.items():
        environments = list(dict.fromkeys(name for run in runs for name in run.played()))
        for environment in environments:
            scores: dict[str, list[float]] = {}
            for run in runs:
                if environment in run.played():
                    scores.setdefault(run.game, []).append(
                        float(np.mean(run.played()[environment]))
                    )
            counts = {len(run.played()[environment]) for run in runs if environment in run.played()}
            name = label if environments == ["plain"] else f"{label} [{environment}]"
            agents.append(
                Agent(
                    name,
                    {game: np.array(scores[game]) for game in GAMES if game in scores},
                    measured=True,
                    main=True,
                    episodes=counts.pop() if len(counts) == 1 else None,
                    notes=("measured with this repository.",),
                )
            )
    return agents


def parse_folder(text: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or `FOLDER`."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        return "", Path(text)
    if not name or not folder:
        raise BadInput(f"{text!r} is neither a folder nor NAME=FOLDER")
    return name, Path(folder)


def load_groups(arguments: list[str]) -> tuple[dict[str, list[Run]], dict[Path, str]]:
    """All runs of all folders given, by agent; and what is left out."""
    groups: dict[str, list[Run]] = {}
    left_out: dict[Path, str] = {}
    for argument in arguments:
        name, folder = parse_folder(argument)
        runs, without = find_runs(folder)
        left_out |= without
        if not runs:
            reason = next(iter(without.values()), "it holds no result.json")
            more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
            raise BadInput(f"nothing to report below {folder}: {reason}{more}")
        for label, group in group_runs(name, runs).items():
            if label in groups or label in PUBLISHED["agents"]:
                raise BadInput(
                    f"two agents would be called {label!r}; name the folders: NAME1=FOLDER1 NAME2=FOLDER2"
                )
            groups[label] = group
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    return groups, left_out


# ======================================================================================================================
# Aggregates
# ======================================================================================================================


def import_rliable():
    """rliable's library and metrics, or a line that says how to install it."""
    try:
        from rliable import library, metrics
    except (ImportError, TypeError) as error:  # TypeError: rliable 1.2.0 with pandas 3
        raise BadInput(
            f"cannot import rliable ({error}); pip install -r benchmark/requirements.txt"
        ) from None
    return library, metrics


def balance(*columns: np.ndarray) -> np.ndarray:
    """Columns of (runs, games), repeated to one number of runs so that each game keeps the same weight."""
    size = math.lcm(*(len(column) for column in columns))
    return np.concatenate(
        [np.repeat(column, size // len(column), axis=0) for column in columns], axis=1
    )


def estimate(columns: list[np.ndarray], function: Callable, reps: int, seed: int) -> tuple:
    """`function` of the (runs, games) matrix of scores, and its 95% stratified bootstrap interval (2, outputs) or None.

    Runs are drawn anew within each game. No interval where a game has one run: it would hide that game's spread.
    rliable ignores its own `random_state`, so NumPy's global generator is seeded, and put back.
    """
    library, _ = import_rliable()
    columns = [np.asarray(column)[:, None] for column in columns]
    if min(len(column) for column in columns) < 2:
        return function(balance(*columns)), None
    equal = len({len(column) for column in columns}) == 1
    scores = np.concatenate(columns, axis=1) if equal else columns
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        points, intervals = library.get_interval_estimates(
            {"": scores}, lambda *c: function(balance(*c)), reps=reps
        )
    finally:
        np.random.set_state(state)
    return points[""], intervals[""]


def rliable_metrics(scores: np.ndarray) -> np.ndarray:
    """Mean, median, IQM and optimality gap of a (runs, games) matrix."""
    _, m = import_rliable()
    functions = (m.aggregate_mean, m.aggregate_median, m.aggregate_iqm, m.aggregate_optimality_gap)
    return np.array([function(scores) for function in functions])


def harmonic_hns(mean_hns: np.ndarray) -> float | None:
    """Har-HNS, (mean of 1 / (HNS + 0.1))^-1 over games; None if an HNS of -0.1 or less leaves it without meaning."""
    shifted = np.asarray(mean_hns) + HARMONIC_OFFSET
    return None if (shifted <= 0).any() else float(1 / np.mean(1 / shifted))


def run_count(agent: Agent, games: list[str]) -> int | None:
    """The smallest number of runs of any of these games; None where only means are known."""
    return None if agent.means_only or not games else min(len(agent.scores[game]) for game in games)


def aggregate(agent: Agent, games: list[str], reps: int, seed: int) -> dict:
    """Aggregates over exactly these games, None if one is missing; `n_runs` is that of the game with fewest."""
    present = agent.present(games)
    summary = {key: None for metric in METRICS for key in (metric, f"{metric}_interval")}
    summary |= {
        "superhuman": None,
        "har_hns": None,
        "n_games": len(present),
        "n_runs": run_count(agent, present),
    }
    summary["n_runs_max"] = (
        None if summary["n_runs"] is None else max(len(agent.scores[game]) for game in present)
    )
    summary["missing"] = [game for game in games if game not in present]
    if summary["missing"]:
        return summary
    points, intervals = estimate([agent.hns(game) for game in games], rliable_metrics, reps, seed)
    for i, metric in enumerate(METRICS):
        summary[metric] = float(points[i])
        summary[f"{metric}_interval"] = (
            None if intervals is None else [float(x) for x in intervals[:, i]]
        )
    mean_hns = agent.mean_hns(games)
    summary["superhuman"] = int((mean_hns > 1).sum())
    summary["har_hns"] = harmonic_hns(mean_hns)
    return summary


def all_aggregates(agents: list[Agent], reps: int, seed: int) -> dict[str, dict[str, dict]]:
    """Agent -> set of games -> aggregates."""
    return {
        a.name: {s: aggregate(a, games, reps, seed) for s, games in SUBSETS.items()} for a in agents
    }


def asymmetry(aggregates: dict) -> list[dict]:
    """Aggregates on Agent-Optimal over those on Human-Optimal games, of agents with all; None if not positive."""
    records = []
    for name, subsets in aggregates.items():
        if subsets["all"]["missing"]:
            continue
        record = {
            "agent": name,
            "n_games": subsets["all"]["n_games"],
            "n_runs": subsets["all"]["n_runs"],
        }
        for metric in ("mean", "median", "iqm", "har_hns"):
            high, low = subsets["agent_optimal"][metric], subsets["human_optimal"][metric]
            positive = high is not None and low is not None and high > 0 and low > 0
            record |= {f"{metric}_agent_optimal": high, f"{metric}_human_optimal": low}
            record[f"{metric}_ratio"] = high / low if positive else None
        records.append(record)
    return records


def same_games(agents: list[Agent], reps: int, seed: int) -> list[dict]:
    """For each measured agent with a part of the games: every agent that has them, over exactly these."""
    records = []
    for partial in agents:
        games = partial.present(GAMES)
        if not partial.measured or len(games) == len(GAMES):
            continue
        for agent in agents:
            summary = aggregate(agent, games, reps, seed)
            if not summary.pop("missing"):
                records.append(
                    {
                        "games_of": partial.name,
                        "games": " ".join(games),
                        "agent": agent.name,
                        **summary,
                    }
                )
    return records


def action_sets(agents: list[Agent]) -> list[dict]:
    """Mean and median HNS of each agent over the games with an action set of each size, as far as it played them."""
    records = []
    for size in sorted({game["actions"] for game in GAMES.values()}):
        games = [name for name, game in GAMES.items() if game["actions"] == size]
        for agent in agents:
            present = agent.present(games)
            if present:
                hns = agent.mean_hns(present)
                numbers = {"mean_hns": float(hns.mean()), "median_hns": float(np.median(hns))}
                counts = {
                    "n_games": len(present),
                    "of_games": len(games),
                    "n_runs": run_count(agent, present),
                }
                records.append(
                    {
                        "actions": size,
                        "agent": agent.name,
                        **numbers,
                        **counts,
                        "games": " ".join(present),
                    }
                )
    return records


def score_records(agents: list[Agent]) -> list[dict]:
    """One record per agent and game."""
    return [
        {
            "agent": agent.name,
            "game": game,
            "set": "agent_optimal" if game in AGENT_OPTIMAL else "human_optimal",
            "actions": GAMES[game]["actions"],
            "mean": float(agent.scores[game].mean()),
            "std": float(agent.scores[game].std(ddof=1)) if len(agent.scores[game]) > 1 else None,
            "n_runs": run_count(agent, [game]),
            "episodes_per_run": agent.episodes,
            "hns": float(agent.hns(game).mean()),
            "above_human": bool(agent.hns(game).mean() > 1),
            "note": agent.game_notes.get(game),
        }
        for agent in agents
        for game in agent.present(GAMES)
    ]


def versions(run: Run) -> dict:
    found = run.result.get("versions")
    return found if isinstance(found, dict) else {}


def run_records(groups: dict[str, list[Run]]) -> list[dict]:
    """Wall-clock time and memory of each run, and what it ran on."""
    return [
        {
            "agent": label,
            "game": run.game,
            "seed": run.result["seed"],
            "mean_return": run.result["mean_return"],
            "episodes": len(run.result["returns"]),
            "env_steps": run.result["env_steps"],
            "hours": run.result["wall_seconds"] / 3600,
            "peak_memory_gib": memory and memory / 2**30,
            "device": run.result.get("device"),
            "precision": run.result.get("precision"),
            "preset": run.result.get("preset"),
            "commit": run.result.get("git_commit"),
            "torch": versions(run).get("torch"),
            "file": run.path.relative_to(run.folder).as_posix(),
        }
        for label, runs in groups.items()
        for run in sorted(runs, key=lambda r: (r.game, r.result["seed"]))
        for memory in [run.result["peak_memory_bytes"]]
    ]


def curve_records(groups: dict[str, list[Run]]) -> list[dict]:
    """One record per evaluation of a run."""
    return [
        {
            "agent": label,
            "game": run.game,
            "seed": run.result["seed"],
            "env_steps": steps,
            "mean_return": score,
        }
        for label, runs in groups.items()
        for run in runs
        for steps, score in run.curve
    ]


# ======================================================================================================================
# Tables
# ======================================================================================================================


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is left-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    clean = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in clean) + "\n"


def to_csv(records: list[dict]) -> str:
    """Records with the same keys as CSV; an absent number is an empty cell."""
    if not records:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_json(content) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


class Footnotes:
    """Notes numbered in the order of their first mention; the prefix keeps those of two tables in one file apart."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.texts = prefix, []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [^{self.prefix}{self.texts.index(text) + 1}]"

    def __str__(self) -> str:
        return "".join(f"[^{self.prefix}{i}]: {text}\n" for i, text in enumerate(self.texts, 1))


def runs_label(agent: Agent, games: list[str] | None = None) -> str:
    """`n=5`, `n=1-3`, or `means` where single runs are not known."""
    if agent.means_only:
        return "means"
    counts = sorted({len(agent.scores[game]) for game in games or agent.scores})
    return f"n={counts[0]}" if len(counts) == 1 else f"n={counts[0]}-{counts[-1]}"


def score_cell(agent: Agent, game: str, notes: Footnotes) -> str:
    """Mean over runs; for measured agents also the standard deviation over runs and their number."""
    if game not in agent.scores:
        return "not run" if agent.measured else "–"
    values = agent.scores[game]
    cell = number(values.mean())
    if agent.measured:
        spread = f" ± {number(values.std(ddof=1))}" if len(values) > 1 else ""
        cell += f"{spread} (n={len(values)})"
    elif not agent.means_only and len({len(runs) for runs in agent.scores.values()}) > 1:
        cell += f" (n={len(values)})"
    return cell + (notes.mark(agent.game_notes[game]) if game in agent.game_notes else "")


def score_table(agents: list[Agent], title: str, notes: Footnotes) -> str:
    """Games in rows, agents in columns, Agent-Optimal games first."""
    header = ["Game", "Actions", "Random", "Human"]
    for agent in agents:
        marks = "".join(notes.mark(f"{agent.name}, {text}") for text in [" ".join(agent.notes)])
        header.append(f"{agent.name} ({runs_label(agent)}){marks}")
    rows = []
    for subset in ("agent_optimal", "human_optimal"):
        rows.append([f"*{SUBSET_TITLES[subset]}*"] + [""] * (len(header) - 1))
        for game in SUBSETS[subset]:
            known = GAMES[game]
            cells = [game, str(known["actions"]), number(known["random"]), number(known["human"])]
            rows.append(cells + [score_cell(agent, game, notes) for agent in agents])
    above = [f"{int((a.mean_hns(a.scores) > 1).sum())} of {len(a.scores)}" for a in agents]
    rows.append(["Games above human", "", "", "", *above])
    return f"### {title}\n\n{markdown(header, rows)}"


def scores_markdown(agents: list[Agent]) -> str:
    """The per-game tables and their footnotes."""
    notes = Footnotes("s")
    tables = [score_table([a for a in agents if a.main], "Scores per game", notes)]
    others = [a for a in agents if not a.main]
    for title, complete in (("Other agents", True), ("Other agents, a part of the games", False)):
        chosen = [a for a in others if (len(a.scores) == len(GAMES)) == complete]
        if chosen:
            tables.append(score_table(chosen, title, notes))
    intro = (
        "Raw score: mean over runs of the mean return of a run's final evaluation; n is the number of runs. Measured "
        "here: ± is the standard deviation over runs. A footnote says where other sources print another number.\n"
    )
    episodes = "".join(
        f"{a.name}: {a.episodes or 'a varying number of'} games per run, {len(a.scores)} of {len(GAMES)} games.\n"
        for a in agents
        if a.measured
    )
    return "\n".join([intro, *([episodes] if episodes else []), *tables, str(notes)])


def with_interval(summary: dict, metric: str) -> str:
    interval = summary[f"{metric}_interval"]
    suffix = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return number(summary[metric], 3) + suffix


def count_runs(summary: dict) -> str:
    """Number of runs of a set of games, for a table."""
    low, high = summary["n_runs"], summary["n_runs_max"]
    return "means" if low is None else str(low) if low == high else f"{low}-{high}"


def summary_cells(summary: dict) -> list[str]:
    cells = [with_interval(summary, metric) for metric in METRICS]
    above = (
        "–" if summary["superhuman"] is None else f"{summary['superhuman']} of {summary['n_games']}"
    )
    return [*cells, above, number(summary["har_hns"], 3)]


SUMMARY_HEADER = [*METRICS.values(), "Above human", "Har-HNS"]


def printed_cell(agent: Agent) -> str:
    """What the authors or others print for the aggregates over all games."""
    printed = [
        f"{key} {value:g}" for key, value in agent.printed_aggregates.items() if key != "where"
    ]
    return ", ".join(printed) or "–"


def aggregates_markdown(agents: list[Agent], aggregates: dict, reps: int) -> str:
    """One table per set of games; an agent without some of the games gets no numbers."""
    parts = [
        "Human-normalised; in brackets the 95% interval of a stratified bootstrap over runs "
        f"({reps:,} draws); none where a game has one run. `means`: single runs are not known, so there is no "
        "interval, and IQM and optimality gap are of game means. An agent that lacks games of a set has no aggregate "
        "over it: –. Less is better for the optimality gap. Runs: of the game with fewest, and of the one with most if "
        "they differ. Above human: strictly.\n"
    ]
    notes = Footnotes("a")
    for subset, games in SUBSETS.items():
        header = ["Agent", "Games", "Runs", *SUMMARY_HEADER]
        rows = []
        for agent in agents:
            summary = aggregates[agent.name][subset]
            counts = [
                f"{summary['n_games']} of {len(games)}",
                count_runs(summary) if summary["n_games"] else "–",
            ]
            extra = [printed_cell(agent)] if subset == "all" else []
            mark = (
                notes.mark(" ".join([f"{agent.name}:", *agent.notes[1:]]))
                if agent.notes[1:]
                else ""
            )
            rows.append([agent.name + mark, *counts, *summary_cells(summary), *extra])
        header += ["Printed elsewhere"] if subset == "all" else []
        parts.append(f"### Aggregates, {SUBSET_TITLES[subset]}\n\n{markdown(header, rows)}")
    places = dict.fromkeys(a.printed_aggregates["where"] for a in agents if a.printed_aggregates)
    parts += ["Printed elsewhere: " + "; ".join(places) + ".\n", str(notes)]
    return "\n".join(parts)


def flat_aggregates(aggregates: dict, agents: list[Agent]) -> list[dict]:
    """Aggregates as records, an interval in two columns."""
    printed = {a.name: printed_cell(a) for a in agents}
    records = []
    for name, subsets in aggregates.items():
        for subset, summary in subsets.items():
            record = {
                "agent": name,
                "set": subset,
                "of_games": len(SUBSETS[subset]),
            } | split_intervals(summary)
            records.append(
                record | {"printed_elsewhere": printed[name] if subset == "all" else None}
            )
    return records


def split_intervals(summary: dict) -> dict:
    """`x_interval` as `x_low` and `x_high`, lists as text."""
    flat = {}
    for key, value in summary.items():
        if key.endswith("_interval"):
            stem = key.removesuffix("_interval")
            flat[f"{stem}_low"], flat[f"{stem}_high"] = value or (None, None)
        else:
            flat[key] = " ".join(value) if isinstance(value, list) else value
    return flat


def same_games_markdown(records: list[dict]) -> str:
    """The tables over a part of the games, each headed by which."""
    parts = []
    for name in dict.fromkeys(record["games_of"] for record in records):
        chosen = [record for record in records if record["games_of"] == name]
        games = chosen[0]["games"].split()
        rows = [[r["agent"], count_runs(r), *summary_cells(r)] for r in chosen]
        parts.append(
            f"### Only the {len(games)} of {len(GAMES)} games that {name} played\n\n{', '.join(games)}. "
            "These are not comparable with aggregates over all games.\n\n"
            + markdown(["Agent", "Runs", *SUMMARY_HEADER], rows)
        )
    return "\n".join(parts)


def asymmetry_markdown(records: list[dict]) -> str:
    header = [
        "Agent",
        "Games",
        "Runs",
        "Mean, Agent-Optimal",
        "Mean, Human-Optimal",
        "Ratio of means",
    ]
    header += ["Ratio of medians", "Ratio of IQMs", "Ratio of Har-HNS"]
    rows = [
        [r["agent"], str(r["n_games"]), "means" if r["n_runs"] is None else str(r["n_runs"])]
        + [number(r["mean_agent_optimal"], 3), number(r["mean_human_optimal"], 3)]
        + [number(r[f"{metric}_ratio"], 1) for metric in ("mean", "median", "iqm", "har_hns")]
        for r in records
    ]
    rule = PUBLISHED["agent_optimal"]
    text = (
        f"A game is Agent-Optimal if the mean human-normalised score of {', '.join(rule['agents'])}, as printed in "
        f"{PUBLISHED['diamond_table1']['source']}, is above {rule['threshold']}: {', '.join(AGENT_OPTIMAL)}. "
        "The ratio is that of an aggregate on these games to the same on the others; 1 would be no asymmetry.\n"
    )
    return f"### Performance asymmetry\n\n{text}\n{markdown(header, rows)}"


def action_sets_markdown(records: list[dict], agents: list[Agent]) -> str:
    shown = [a for a in agents if a.main]
    cells = {(r["actions"], r["agent"]): r for r in records}
    rows = []
    for size in sorted({record["actions"] for record in records}):
        games = [name for name, game in GAMES.items() if game["actions"] == size]
        row = [str(size), f"{len(games)}: {', '.join(games)}"]
        for agent in shown:
            record = cells.get((size, agent.name))
            part = f" (n={record['n_games']})" if record and record["n_games"] < len(games) else ""
            row.append(
                number(record["mean_hns"], 3) + part
                if record
                else "not run"
                if agent.measured
                else "–"
            )
        rows.append(row)
    text = "Mean human-normalised score over the games with an action set of that size; n: games, where not all.\n"
    header = ["Actions", "Games", *(f"{a.name} ({runs_label(a)})" for a in shown)]
    return f"### Scores by the size of the action set\n\n{text}\n{markdown(header, rows)}"


def runs_markdown(records: list[dict], left_out: dict[Path, str]) -> str:
    rows = [
        [
            r["agent"],
            r["game"],
            str(r["seed"]),
            number(r["mean_return"]),
            str(r["episodes"]),
            f"{r['env_steps']:,}",
        ]
        + [
            clock(r["hours"]),
            number(r["peak_memory_gib"], 2),
            r["device"] or "–",
            r["precision"] or "–",
        ]
        + [r["preset"] or "–", str(r["commit"] or "–")[:7], r["torch"] or "–"]
        for r in records
    ]
    header = [
        "Agent",
        "Game",
        "Seed",
        "Mean return",
        "Games",
        "Steps",
        "Time (h:mm)",
        "Memory (GiB)",
        "Device",
    ]
    header += ["Precision", "Preset", "Commit", "PyTorch"]
    text = f"{len(records)} runs. Memory: the peak of the GPU's where there is one, else of the process.\n"
    if left_out:
        names = ", ".join("/".join(path.parts[-2:]) for path in left_out)
        text += f"\n{len(left_out)} unfinished or unfit, left out: {names}.\n"
    return f"### Time and memory\n\n{text}\n{markdown(header, rows)}"


def clock(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def readme_table(groups: dict[str, list[Run]]) -> str:
    """The table for a README, between markers: Random, Human, DIAMOND, and each agent measured or `not run`."""
    published = {agent.name: agent for agent in published_agents()}
    agents = [published["DIAMOND"]]
    for label, runs in groups.items():
        agents += measured_agents({label: runs}) if runs else [Agent(label, {}, measured=True)]
    header = ["Game", "Random", "Human"]
    for agent in agents:
        counts = f", {agent.episodes} games each" if agent.episodes else ""
        header.append(f"{agent.name} ({runs_label(agent)}{counts})" if agent.scores else agent.name)
    rows = []
    for game, known in GAMES.items():
        cells = [score_cell(agent, game, Footnotes("r")) for agent in agents]
        rows.append([game, number(known["random"]), number(known["human"]), *cells])
    rows += readme_aggregates(agents)
    return "\n".join([README_MARKERS[0], markdown(header, rows).rstrip(), README_MARKERS[1]])


def readme_aggregates(agents: list[Agent]) -> list[list[str]]:
    """Rows of aggregates over all games; an agent without some of them shows how many it has."""
    summaries = []
    for agent in agents:
        complete = not [game for game in GAMES if game not in agent.scores]
        summaries.append(aggregate(agent, SUBSETS["all"], 2, 0) if complete else None)
    titles = METRICS | {"superhuman": "Games above human", "har_hns": "Har-HNS"}
    rows = []
    for key, title in titles.items():
        row = [f"{title}, 26 games", "", ""]
        for agent, summary in zip(agents, summaries, strict=True):
            if summary is None:
                row.append(f"not run ({len(agent.scores)} of {len(GAMES)} games)")
            else:
                row.append(str(summary[key]) if key == "superhuman" else number(summary[key], 3))
        rows.append(row)
    return rows


# ======================================================================================================================
# Pictures
# ======================================================================================================================

# Okabe and Ito's colours, which people with any colour vision tell apart; markers and dashes repeat the distinction.
PUBLISHED_LOOK = (
    ("#999999", "v", (0, (1, 1.5))),
    ("#E69F00", "s", (0, (5, 1.5))),
    ("#56B4E9", "^", (0, (3, 1.2, 1, 1.2))),
    ("#009E73", "D", (0, (6, 1, 1, 1, 1, 1))),
    ("#0072B2", "P", (0, (2, 1))),
    ("#CC79A7", "o", "-"),
)
MEASURED_LOOK = (
    ("#D55E00", "*", "-"),
    ("#000000", "X", (0, (4, 1))),
    ("#8C510A", "h", (0, (1, 1))),
    ("#5E3C99", "p", (0, (3, 1, 1, 1, 1, 1))),
    ("#01665E", "<", (0, (6, 2))),
    ("#8B0000", ">", (0, (2, 2))),
)
HUMAN_OPTIMAL_COLOUR, AGENT_OPTIMAL_COLOUR = "#0072B2", "#E69F00"


def import_pyplot():
    """matplotlib for files only, with the same bytes for the same numbers."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "report",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
        | {
            "axes.grid": True,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "figure.dpi": 110,
        }
    )
    return plt


def looks(agents: list[Agent]) -> dict[str, tuple]:
    """Agent -> colour, marker, dashes; published ones keep theirs from report to report."""
    chosen = dict(zip(PUBLISHED["main"], PUBLISHED_LOOK, strict=True))
    measured = [a.name for a in agents if a.measured]
    return chosen | {name: MEASURED_LOOK[i % len(MEASURED_LOOK)] for i, name in enumerate(measured)}


def save(plt, figure, folder: Path, name: str) -> None:
    figure.savefig(
        folder / f"{name}.png", dpi=130, metadata={"Software": None}, bbox_inches="tight"
    )
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def hns_axis(axis, which: str) -> None:
    """Human-normalised scores reach from a little below 0 to above 10: logarithmic, but linear around 0."""
    getattr(axis, f"set_{which}scale")("symlog", linthresh=0.1, linscale=0.5)
    ticks = [-0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10, 30]
    low, high = axis.dataLim.intervalx if which == "x" else axis.dataLim.intervaly
    ticks = [tick for tick in ticks if min(low, 0) - 0.1 <= tick <= max(1, high) * 2]
    getattr(axis, f"set_{which}ticks")(ticks, labels=[f"{tick:g}" for tick in ticks])
    getattr(axis, f"set_{which}lim")(min(low, 0) * 1.3 - 0.03, max(1, high) * 1.3)
    getattr(axis, f"{which}axis").minorticks_off()


def draw_games(plt, agents: list[Agent], folder: Path) -> None:
    """Human-normalised score of each game, one marker per agent."""
    shown, style = [a for a in agents if a.main], looks(agents)
    figure, axes = plt.subplots(1, 2, figsize=(11, 6), sharex=True)
    for axis, subset in zip(axes, ("agent_optimal", "human_optimal"), strict=True):
        games = SUBSETS[subset][::-1]
        for i, agent in enumerate(shown):
            colour, marker, _ = style[agent.name]
            present = agent.present(games)
            offset = 0.5 * (
                0.5 - i / max(1, len(shown) - 1)
            )  # so that equal scores do not hide each other
            rows = [games.index(game) + offset for game in present]
            options = (
                dict(s=90, zorder=4, edgecolor="white", linewidth=0.4)
                if agent.measured
                else dict(s=28, zorder=3)
            )
            axis.scatter(
                agent.mean_hns(present),
                rows,
                color=colour,
                marker=marker,
                label=label(agent),
                **options,
            )
        axis.axvline(1, color="black", linewidth=1, zorder=1)
        axis.set(
            title=SUBSET_TITLES[subset],
            xlabel="human-normalised score (1 is human)",
            yticks=range(len(games)),
        )
        axis.set_yticklabels([f"{game} ({GAMES[game]['actions']})" for game in games])
    low = min(axis.dataLim.x0 for axis in axes)
    axes[0].update_datalim([(low, 0), (max(axis.dataLim.x1 for axis in axes), 0)])
    hns_axis(axes[0], "x")
    figure.suptitle("Human-normalised score per game (in brackets: size of the action set)")
    legend_below(figure, axes[0], 4)
    save(plt, figure, folder, "games")


def label(agent: Agent) -> str:
    """Name, number of runs, and number of games where it is not all."""
    part = f", {len(agent.scores)} of {len(GAMES)} games" if len(agent.scores) < len(GAMES) else ""
    return f"{agent.name} ({runs_label(agent)}{part})"


def legend_below(figure, axis, columns: int) -> None:
    """One legend under all panels."""
    figure.tight_layout()
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)


def draw_aggregates(plt, agents: list[Agent], aggregates: dict, folder: Path) -> None:
    """Mean, median, IQM and optimality gap with intervals, for the agents with all games."""
    shown = [a for a in agents if not aggregates[a.name]["all"]["missing"]]
    shown.sort(key=lambda a: aggregates[a.name]["all"]["iqm"])
    figure, axes = plt.subplots(1, 4, figsize=(12, 1.2 + 0.27 * len(shown)), sharey=True)
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for row, agent in enumerate(shown):
            summary = aggregates[agent.name]["all"]
            colour = "#D55E00" if agent.measured else HUMAN_OPTIMAL_COLOUR
            interval = summary[f"{metric}_interval"]
            if interval is not None:
                axis.plot(
                    interval,
                    [row, row],
                    color=colour,
                    linewidth=5,
                    alpha=0.4,
                    solid_capstyle="butt",
                )
            axis.plot(
                summary[metric],
                row,
                "|" if interval else "o",
                color=colour,
                markersize=9 if interval else 4,
            )
        better = "less is better" if metric == "optimality_gap" else "more is better"
        axis.set(title=f"{title}\n({better})", yticks=range(len(shown)))
    axes[0].set_yticklabels([label(agent) for agent in shown])
    figure.suptitle(
        f"Human-normalised aggregates over {len(GAMES)} games with 95% stratified bootstrap intervals "
        "(dot: means only, or one run: no interval)"
    )
    figure.tight_layout()
    save(plt, figure, folder, "aggregates")


def draw_asymmetry(plt, agents: list[Agent], records: list[dict], folder: Path) -> None:
    """Mean HNS on Agent-Optimal and on Human-Optimal games, joined, with their ratio."""
    by_name = {agent.name: agent for agent in agents}
    records = sorted(
        records, key=lambda r: (r["mean_ratio"] is None, r["mean_ratio"]), reverse=True
    )
    figure, axis = plt.subplots(figsize=(9, 1.3 + 0.3 * len(records)))
    high = max(record["mean_agent_optimal"] for record in records)
    for row, record in enumerate(records):
        ends = record["mean_human_optimal"], record["mean_agent_optimal"]
        axis.plot(ends, [row, row], color="#999999", linewidth=2, zorder=1)
        axis.scatter(ends[0], row, color=HUMAN_OPTIMAL_COLOUR, marker="o", s=45, zorder=2)
        axis.scatter(ends[1], row, color=AGENT_OPTIMAL_COLOUR, marker="s", s=45, zorder=2)
        ratio = "–" if record["mean_ratio"] is None else f"{record['mean_ratio']:.1f} times"
        axis.text(high * 1.25, row, ratio, va="center")
    axis.scatter(
        [], [], color=HUMAN_OPTIMAL_COLOUR, marker="o", label=SUBSET_TITLES["human_optimal"]
    )
    axis.scatter(
        [], [], color=AGENT_OPTIMAL_COLOUR, marker="s", label=SUBSET_TITLES["agent_optimal"]
    )
    if min(record["mean_human_optimal"] for record in records) > 0:
        axis.set_xscale("log")
        ticks = [
            t
            for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
            if t > 0.5 * min(r["mean_human_optimal"] for r in records)
        ]
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=1, zorder=0)
    axis.set(yticks=range(len(records)), xlabel="mean human-normalised score (1 is human)")
    axis.set_yticklabels([label(by_name[record["agent"]]) for record in records])
    for text in axis.get_yticklabels():
        text.set_fontweight(
            "bold" if text.get_text() in {label(a) for a in agents if a.measured} else "normal"
        )
    axis.set_title("Performance asymmetry: mean on Agent-Optimal over mean on Human-Optimal games")
    legend_below(figure, axis, 2)
    save(plt, figure, folder, "asymmetry")


def draw_action_sets(plt, agents: list[Agent], folder: Path) -> None:
    """Each game's score over the size of its action set: a marker per game, a bar at the agent's mean."""
    shown, style = [a for a in agents if a.main], looks(agents)
    sizes = sorted({game["actions"] for game in GAMES.values()})
    figure, axis = plt.subplots(figsize=(12, 5))
    for i, agent in enumerate(shown):
        colour, marker, _ = style[agent.name]
        offset = (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
        for x, size in enumerate(sizes):
            games = agent.present(name for name, game in GAMES.items() if game["actions"] == size)
            hns = agent.mean_hns(games)
            axis.scatter(
                [x + offset] * len(games), hns, color=colour, marker=marker, s=20, alpha=0.75
            )
            if len(games) > 1:
                width = 0.3 / len(shown)
                axis.plot(
                    [x + offset - width, x + offset + width],
                    [hns.mean()] * 2,
                    color=colour,
                    linewidth=3,
                )
        axis.scatter([], [], color=colour, marker=marker, label=label(agent))
    for x in range(len(sizes) - 1):
        axis.axvline(x + 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)
    hns_axis(axis, "y")
    axis.axhline(1, color="black", linewidth=1, zorder=0)
    counts = [sum(game["actions"] == size for game in GAMES.values()) for size in sizes]
    names = [
        f"{size}\n{count} game{'s' * (count > 1)}"
        for size, count in zip(sizes, counts, strict=True)
    ]
    axis.set_xticks(range(len(sizes)), labels=names)
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="size of the action set", ylabel="human-normalised score (1 is human)")
    axis.set_title(
        "Scores by the size of the action set (marker: a game; bar: the agent's mean, if there are several)"
    )
    legend_below(figure, axis, 4)
    save(plt, figure, folder, "action_sets")


def draw_profiles(plt, agents: list[Agent], reps: int, seed: int, folder: Path) -> None:
    """Share of runs above each score (Agarwal et al. 2021), with 95% bands; only agents with all games and runs."""
    shown = [a for a in agents if a.main and len(a.scores) == len(GAMES) and not a.means_only]
    style, thresholds = looks(agents), np.geomspace(0.01, 10, 61)

    def profile(scores: np.ndarray) -> np.ndarray:
        return (scores[None] > thresholds[:, None, None]).mean((1, 2))

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, (subset, games) in zip(axes, SUBSETS.items(), strict=True):
        for agent in shown:
            share, band = estimate([agent.hns(game) for game in games], profile, reps, seed)
            colour, _, dashes = style[agent.name]
            axis.plot(
                thresholds, share, color=colour, linestyle=dashes, linewidth=1.8, label=label(agent)
            )
            if band is not None:
                axis.fill_between(thresholds, *band, color=colour, alpha=0.13, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
        axis.axvline(1, color="black", linewidth=1, zorder=0)
        axis.set(
            title=SUBSET_TITLES[subset], xlabel="human-normalised score t (1 is human)", ylim=(0, 1)
        )
    axes[0].set_ylabel("share of runs above t")
    figure.suptitle("Performance profiles with 95% bands")
    legend_below(figure, axes[0], 4)
    save(plt, figure, folder, "performance_profiles")


def mean_curve(curves: list[list[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs of the evaluations during training, interpolated, where all runs have values."""
    curves = [curve[:-1] or curve for curve in curves]  # the final evaluation has its own marker
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    steps = np.linspace(low, high, 50)
    values = [np.interp(steps, *np.array(sorted(curve)).T) for curve in curves]
    return steps, np.mean(values, axis=0)


def draw_learning_curves(plt, groups: dict[str, list[Run]], folder: Path) -> None:
    """Evaluations during training: a thin line per run, a thick one for their mean, Random and Human dotted."""
    games = [
        game
        for game in GAMES
        if any(r.game == game and r.curve for runs in groups.values() for r in runs)
    ]
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    size = (max(7.5, 3.3 * columns), 1.6 + 2.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    style = {name: MEASURED_LOOK[i % len(MEASURED_LOOK)] for i, name in enumerate(groups)}
    for axis in axes.flat[len(games) :]:
        axis.set_visible(False)
    for axis, game in zip(axes.flat, games, strict=False):
        for name, runs in groups.items():
            curves = [run.curve for run in runs if run.game == game and run.curve]
            colour, marker, dashes = style[name]
            for curve in curves:
                axis.plot(
                    *np.array(curve).T,
                    color=colour,
                    alpha=0.4,
                    linewidth=0.9,
                    marker=".",
                    markersize=3,
                )
                axis.plot(*curve[-1], color=colour, marker=marker, markersize=7)
            if len(curves) > 1:
                axis.plot(*mean_curve(curves), color=colour, linewidth=2.2, linestyle=dashes)
        axis.axhline(GAMES[game]["random"], color="#777777", linestyle=":", linewidth=1.3)
        axis.axhline(GAMES[game]["human"], color="black", linestyle="--", linewidth=1.3)
        counts = ", ".join(
            str(sum(r.game == game and bool(r.curve) for r in runs)) for runs in groups.values()
        )
        axis.set_title(f"{game} (n={counts})")
        axis.ticklabel_format(style="plain", axis="x")
        axis.locator_params(axis="x", nbins=4)
    for axis in axes.flat[max(0, len(games) - columns) : len(games)]:
        axis.set_xlabel("environment steps")
    for name in groups:
        axes.flat[0].plot(
            [],
            [],
            color=style[name][0],
            marker=style[name][1],
            linestyle=style[name][2],
            label=name,
        )
    axes.flat[0].plot([], [], color="black", linestyle="--", label="Human")
    axes.flat[0].plot([], [], color="#777777", linestyle=":", label="Random")
    figure.supylabel("mean return", fontsize=9)
    figure.suptitle(
        "Evaluations during training (n: runs of each agent)\n"
        "thin: one run, ending in its final evaluation; thick: mean over runs"
    )
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(plt, figure, folder, "learning_curves")


# ======================================================================================================================
# The report
# ======================================================================================================================


def write_table(folder: Path, name: str, text: str, records: list[dict], content=None) -> str:
    """A table as Markdown, CSV and JSON (`content`, or the records); returns the Markdown."""
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.csv").write_text(to_csv(records), encoding="utf-8")
    (folder / f"{name}.json").write_text(
        to_json(records if content is None else content), encoding="utf-8"
    )
    return text


def nest(records: list[dict], outer: str, inner: str) -> dict:
    """Records as two levels of objects."""
    nested: dict[str, dict] = {}
    for record in records:
        rest = {key: value for key, value in record.items() if key not in (outer, inner)}
        nested.setdefault(record[outer], {})[record[inner]] = rest
    return nested


def picture(name: str, text: str) -> str:
    return f"![{text}]({name}.png)\n"


def write_report(
    folder: Path, groups: dict[str, list[Run]], left_out: dict[Path, str], reps: int, seed: int
) -> None:
    """All tables into an empty folder, then the pictures: one that fails is said in one line, and costs no number."""
    agents = published_agents() + measured_agents(groups)
    aggregates, scores, actions = (
        all_aggregates(agents, reps, seed),
        score_records(agents),
        action_sets(agents),
    )
    asymmetries, partial = asymmetry(aggregates), same_games(agents, reps, seed)
    measured = [label(agent) for agent in agents if agent.measured]
    parts = [
        "# Atari 100k report\n",
        f"Measured: {', '.join(measured)}.\n"
        if measured
        else "Published scores alone: nothing measured here.\n",
        "## Scores\n",
        write_table(
            folder, "scores", scores_markdown(agents), scores, nest(scores, "agent", "game")
        ),
        picture("games", "human-normalised score of each game"),
        "## Aggregates\n",
        write_table(
            folder,
            "aggregates",
            aggregates_markdown(agents, aggregates, reps),
            flat_aggregates(aggregates, agents),
            aggregates,
        ),
        picture("aggregates", "aggregates with intervals"),
        picture("performance_profiles", "performance profiles"),
    ]
    if partial:
        records = [split_intervals(record) for record in partial]
        parts.append(
            write_table(folder, "same_games", same_games_markdown(partial), records, partial)
        )
    parts += [
        "## Asymmetry\n",
        write_table(folder, "asymmetry", asymmetry_markdown(asymmetries), asymmetries),
    ]
    parts += [picture("asymmetry", "mean on Agent-Optimal and Human-Optimal games")]
    parts += [write_table(folder, "action_sets", action_sets_markdown(actions, agents), actions)]
    parts += [picture("action_sets", "scores by the size of the action set")]
    pictures = [(draw_games, agents), (draw_aggregates, agents, aggregates)]
    pictures += [(draw_asymmetry, agents, asymmetries), (draw_action_sets, agents)]
    pictures += [(draw_profiles, agents, reps, seed)]
    if groups:
        records, curves = run_records(groups), curve_records(groups)
        parts += [
            "## Runs\n",
            write_table(folder, "runs", runs_markdown(records, left_out), records),
        ]
        if curves:
            pictures += [(draw_learning_curves, groups)]
            text = f"### Learning curves\n\n{picture('learning_curves', 'evaluations during training')}"
            text += (
                f"\n{len(curves)} evaluations, in learning_curves.csv and learning_curves.json.\n"
            )
            parts.append(write_table(folder, "learning_curves", text, curves))
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    for draw, *given in pictures:
        try:
            draw(import_pyplot(), *given, folder)
        except Exception as error:
            print(f"no picture by {draw.__name__}: {' '.join(str(error).split())}", file=sys.stderr)


def check_out(out: Path) -> None:
    """A report may replace an earlier report, and nothing else."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; give a folder")
    foreign = (
        sorted(path.name for path in out.iterdir() if path.name not in REPORT_FILES)
        if out.is_dir()
        else []
    )
    if foreign:
        raise BadInput(
            f"--out {out} holds other files than a report's ({foreign[0]}); give an empty or a new folder"
        )


def make_report(
    out: Path, groups: dict[str, list[Run]], left_out: dict[Path, str], reps: int, seed: int
) -> None:
    """Write into a folder beside `out`, then put it in its place: `out` is never half a report."""
    out = out.resolve()
    fresh, old = (
        out.with_name(f".{out.name}.{os.getpid()}.new"),
        out.with_name(f".{out.name}.{os.getpid()}.old"),
    )
    fresh.mkdir(parents=True)
    try:
        write_report(fresh, groups, left_out, reps, seed)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


class Parser(argparse.ArgumentParser):
    """Wrong arguments end like all wrong input, in one line."""

    def error(self, message: str):
        raise BadInput(f"{message}; see --help")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results",
        nargs="*",
        metavar="[NAME=]FOLDER",
        help="folder with run folders, of one setting",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report; an earlier report there is replaced"
    )
    parser.add_argument(
        "--published", action="store_true", help="report the published scores alone"
    )
    parser.add_argument(
        "--readme-table", action="store_true", help="print the table for a README, write nothing"
    )
    parser.add_argument("--reps", type=int, default=2000, help="bootstrap draws (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    args = parser.parse_args(argv)
    if bool(args.results) == args.published:
        raise BadInput("give folders of results or --published, one of the two; see --help")
    if args.readme_table == bool(args.out) or (args.readme_table and args.published):
        raise BadInput(
            "give --out FOLDER for a report, or --readme-table with folders of results; see --help"
        )
    if args.reps < 2 or not 0 <= args.seed < 2**32:
        raise BadInput("--reps must be at least 2 and --seed between 0 and 4294967295")
    return args


def print_readme_table(arguments: list[str]) -> None:
    """A named folder that does not exist is a column that says `not run`: the table names what is still to do."""
    groups: dict[str, list[Run]] = {}
    for argument in arguments:
        name, folder = parse_folder(argument)
        if name and not folder.exists():
            print(f"{folder} does not exist: the column {name!r} says not run", file=sys.stderr)
            groups[name] = []
        else:
            loaded, _ = load_groups([argument])
            groups |= loaded
    print(readme_table(groups))


def report(argv: list[str] | None) -> None:
    args = parse_args(argv)
    if args.readme_table:
        print_readme_table(args.results)
        return
    check_out(args.out)
    groups, left_out = load_groups(args.results)
    make_report(args.out, groups, left_out, args.reps, args.seed)
    print(f"{args.out}/report.md")


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 and one line for wrong input."""
    try:
        report(argv)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

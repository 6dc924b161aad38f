"""Finished runs: read from their folders or from one file, checked, and their learning curves drawn.

Imported by report.py and improvement.py. A file of runs, NAME.jsonl, holds a run a line: `result` (its result.json),
`metrics` (the lines of its metrics.jsonl with an evaluation) and `script` (what `git hash-object` says of the copy of
the training script in its folder: `git log --find-object` finds the commits).
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import common
import numpy as np
from common import BadInput

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
GAMES: dict[str, dict] = PUBLISHED["games"]
WHOLE_GAME = 27_000  # steps of 4 frames: the papers' limit
KEYS = ("result", "metrics", "script")  # of a line of a file of runs
REMEDY = "move the run folder away, or make the run again"
# Arguments of a run that change how or where it is computed, or which game is played, but not the method.
NOT_SETTINGS = set(
    "env_id seed threads device precision compile cuda_graphs run_dir resume eval_only dry_run".split()
)
# Okabe and Ito's colours, which people with any colour vision tell apart; markers and dashes repeat the distinction.
LOOKS = (
    *(("#D55E00", "*", "-"), ("#000000", "X", (0, (4, 1))), ("#8C510A", "h", (0, (1, 1)))),
    *(("#5E3C99", "p", (0, (3, 1, 1, 1))), ("#01665E", "<", (0, (6, 2)))),
    ("#8B0000", ">", (0, (2, 2))),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: where it lies, its result.json, what it logged at its evaluations, and its script's hash."""

    where: str
    result: dict
    metrics: list[dict]
    script: str | None = None

    @property
    def game(self) -> str:
        """The short name of a game behind the spellings that the training script accepts."""
        return re.sub(r"(NoFrameskip-v\d|-v\d)$", "", self.result["env_id"].removeprefix("ALE/"))

    @property
    def settings(self) -> dict:
        args = {key: x for key, x in self.result["args"].items() if key not in NOT_SETTINGS}
        return args | {"environment": self.result.get("environment") or "plain"}

    @property
    def cut(self) -> bool:
        """Whether games ended at --max-episode-steps, before the papers' limit: not comparable with whole games."""
        limit = self.result["args"].get("max_episode_steps") or WHOLE_GAME
        return limit < WHOLE_GAME and max(self.result.get("lengths") or [limit]) >= limit

    @property
    def curve(self) -> np.ndarray:
        """Steps, mean return and half of its 95% interval (NaN: not logged) of each evaluation but the first, which is
        of random play, and of the games at the end: (n, 3)."""
        games = self.result["args"].get("eval_episodes") or 0
        evaluated = [row for row in self.metrics if "eval/mean_return" in row][1:]
        rows = [
            (r["charts/env_steps"], r["eval/mean_return"], abs(r.get("eval/std_return", math.nan)))
            for r in evaluated
        ]
        rows.append((self.result["env_steps"], self.result["mean_return"], math.nan))
        return np.array(rows) * (1, 1, 1.96 / math.sqrt(games - 1) if games > 1 else math.nan)


def human_normalised(game: str, scores):
    """(score - random) / (human - random) by the published scores, of a number or an array."""
    low, high = GAMES[game]["random"], GAMES[game]["human"]
    return (scores - low) / (high - low)


# --- reading


def is_number(value) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def are_numbers(value) -> bool:
    return isinstance(value, list) and bool(value) and all(is_number(x) for x in value)


NUMBER, NUMBERS = (is_number, "a finite number"), (are_numbers, "a list of finite numbers")
NAME = (lambda x: isinstance(x, str) and bool(x) and x.isprintable(), "a name")
TABLE = (lambda x: isinstance(x, dict), "a table of names and values")
REQUIRED: dict[str, tuple[Callable, str]] = {
    **dict(env_id=NAME, script=NAME, args=TABLE, returns=NUMBERS, mean_return=NUMBER),
    **dict(env_steps=NUMBER, wall_seconds=NUMBER),
    "seed": (lambda x: is_number(x) and x == int(x), "a whole number"),
}
MAY_LACK = dict(returns_random=NUMBERS, lengths=NUMBERS, updates=TABLE, reward_recall=NUMBER)
MAY_LACK |= dict(peak_memory_bytes=NUMBER, environment=NAME)
MAY_LACK |= {f"args.{key}_episodes": NUMBER for key in ("eval", "final")}
MAY_LACK["args.max_episode_steps"] = NUMBER


def check_result(result: dict, where: str, remedy: str = REMEDY) -> dict:
    """The whole result of a run. Raises `BadInput` that names what is wrong with it."""
    result = result if isinstance(result, dict) else {}
    for key, (fits, wanted) in {**REQUIRED, **MAY_LACK}.items():
        if key in REQUIRED and key not in result:
            raise BadInput(f"{where} has no {key!r}: it is not the whole result of a run; {remedy}")
        table, _, name = key.rpartition(".")
        value = (result[table] if table else result).get(name)
        if not fits(value) and (key in REQUIRED or value is not None):
            shown = text if len(text := repr(value)) <= 60 else text[:57] + "..."
            raise BadInput(f"{where}: {key!r} is {shown}, not {wanted}; {remedy}")
    mean, count = float(np.mean(result["returns"])), result["args"].get("final_episodes")
    if not math.isclose(mean, result["mean_return"], rel_tol=1e-6, abs_tol=1e-6):
        text = f"mean_return {result['mean_return']:g} is not the mean of its returns, {mean:g}"
        raise BadInput(f"{where}: {text}; {remedy}")
    if count is not None and count != len(result["returns"]):
        raise BadInput(f"{where} has {len(result['returns'])} returns of {count} games; {remedy}")
    if len(result.get("lengths") or result["returns"]) != len(result["returns"]):
        raise BadInput(f"{where} has {len(result['lengths'])} lengths of {count} games; {remedy}")
    return result


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8); {REMEDY}") from None


def evaluations(logged: Iterable[dict], where: str) -> list[dict]:
    """What was logged at evaluations. Raises `BadInput` that names the line."""
    rows, steps = [], 0.0
    for number, row in enumerate(logged, 1):
        steps = row.setdefault("charts/env_steps", steps)
        for key in (key for key, value in row.items() if not is_number(value)):
            raise BadInput(f"{where}, line {number}: {key} is {row[key]!r}; {REMEDY}")
        rows += [row] if any(key.startswith(("eval/", "wm/")) for key in row) else []
    return rows


def git_blob(path: Path) -> str | None:
    """What `git hash-object` says of a file; None without it."""
    if not path.exists():
        return None
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_run(folder: Path) -> Run:
    """A run from its folder. Raises `BadInput`."""
    path, logged, metrics = folder / "result.json", folder / "metrics.jsonl", []
    if not path.exists():
        raise BadInput(f"{folder} has no result.json; finish it with --resume")
    result = check_result(common.read_object(read_text(path), str(path), REMEDY), str(path))
    if logged.exists():
        try:
            lines = enumerate(read_text(logged).splitlines(), 1)
            rows = [common.read_object(x, f"{logged}, line {i},", REMEDY) for i, x in lines]
            metrics = evaluations(rows, str(logged))
        except BadInput as error:  # the score is good without
            print(f"left out: {error}", file=sys.stderr)
    return Run(str(folder), result, metrics, git_blob(folder / f"{result['script']}.py"))


def run_of_line(row: dict, where: str) -> Run:
    """A run from a line of a file of runs. Raises `BadInput`."""
    result = check_result(row["result"], where, "delete that line")
    logged, script = row["metrics"], row["script"]
    if not (isinstance(logged, list) and all(isinstance(x, dict) for x in logged)):
        raise BadInput(f"{where}: 'metrics' is not a list of tables; delete that line")
    if not isinstance(script, str | None):
        raise BadInput(f"{where}: 'script' is {script!r}, not a name; delete that line")
    return Run(where, result, evaluations(logged, f"{where}, metrics"), script)


def find_runs(
    source: Path, fits: Callable = lambda run: None, left_out: list[str] | None = None
) -> list[Run]:
    """All runs below a folder or in a file, of one setting. What is left out, because it is no whole run or because
    `fits(run)` raises `BadInput`, is said in a line, and added to `left_out`. Raises `BadInput` if nothing is left, or if they do not belong
    together: one agent is one method, so its runs differ in game, seed and machine only, and a seed counts once."""
    if not source.exists():
        raise BadInput(f"{source} is not there; give a folder that holds run folders")
    names, found, without = {"args.json", "metrics.jsonl", "result.json"}, {}, []
    if source.is_dir():
        folders, seen = [], set()
        for here, below, files in os.walk(source, followlinks=True):
            if (real := os.path.realpath(here)) in seen:  # a link in a circle, or to what was seen
                below.clear()
            elif names & {*files}:
                folders.append(Path(here))
            seen.add(real)
        readers = [lambda folder=folder: read_run(folder) for folder in sorted(folders)]
    else:
        readers = []
        for i, row in enumerate(common.read_rows(source, *KEYS), 1):
            run = run_of_line(row, f"{source}, line {i}")
            readers.append(lambda run=run: run)
    for read in readers:
        try:
            fits(run := read())
        except (BadInput, OSError) as error:
            without.append(str(error))
            continue
        same = found.setdefault((run.result["script"], run.game, run.result["seed"]), run)
        if same is not run:
            what = f"{run.game}, seed {run.result['seed']}"
            raise BadInput(f"{same.where} and {run.where} are both {what}; move one of them away")
        first = next(r for r in found.values() if r.result["script"] == run.result["script"])
        check_same_settings(first, run)
    if not found:
        more = f" (and {len(without) - 1} more)" * (len(without) > 1)
        reason = without[0] if without else "it holds no result.json"
        raise BadInput(f"nothing to report in {source}: {reason}{more}")
    print("".join(f"left out: {line}\n" for line in without), end="", file=sys.stderr)
    if left_out is not None:
        left_out += without
    return list(found.values())


def check_same_settings(one: Run, other: Run) -> None:
    a, b = one.settings, other.settings
    keys = [key for key in sorted({*a, *b}) if a.get(key, "absent") != b.get(key, "absent")]
    if keys:
        pairs = (f"{k} is {a.get(k, 'absent')!r} and {b.get(k, 'absent')!r}" for k in keys[:3])
        more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise BadInput(
            f"different settings in {one.where} and {other.where}: {'; '.join(pairs)}{more}; put each setting into "
            "a folder of its own"
        )


# --- learning curves


def interval(returns: Iterable[float], draws: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean over games."""
    values, rng = np.asarray(returns), np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]))


def mean_and_range(curves: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Steps, mean, lowest and highest value over runs, interpolated, where all runs have values."""
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= low) & (steps <= high)]
    values = np.array([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])
    return steps, values.mean(0), values.min(0), values.max(0)


def draw_learning_curves(groups: dict[str, list[Run]]):
    """A panel a game: evaluations during training, their mean and range over seeds, the games at the end."""
    games = sorted({run.game for runs in groups.values() for run in runs})
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    figure, axes = common.new_figure(
        "Return in evaluations, higher is better. Dot: one evaluation; large mark: a run's games at the end, with 95%\n"
        "interval. Line and band: mean and range over n runs, ending in the games at the end. Dotted, hatched: random\n"
        "play by the same rules, with 95% interval. Dashed: human, where in reach; cut: not whole games.",
        rows, columns, (max(8.5, 3.2 * columns), 1.7 + 2.3 * rows),
    )  # fmt: skip
    for axis, game in zip(axes.flat, games, strict=False):
        counts, known = [], GAMES.get(game)
        if any(run.cut for runs in groups.values() for run in runs if run.game == game):
            known = None  # the score of a person is that of whole games
        for (name, runs), look in zip(groups.items(), LOOKS * len(groups), strict=False):
            of = [run for run in runs if run.game == game]
            draw_runs(axis, of, look, name if axis is axes.flat[0] else None)
            counts.append(str(len(of)))
        if known and known["human"] <= axis.get_ylim()[1]:  # beyond, it would flatten the curves
            axis.axhline(known["human"], color="black", linestyle="--", linewidth=1)
        note = f", human {known['human']:,.0f}" if known else ", cut" if game in GAMES else ""
        axis.set_title(f"{game} (n={', '.join(counts)}{note})")
        axis.set_xlabel("environment steps")
        axis.ticklabel_format(style="plain", axis="x")
        axis.locator_params(axis="x", nbins=4)
    for axis in axes.flat[len(games) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("mean return")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_runs(axis, runs: list[Run], look: tuple, label: str | None) -> None:
    """The runs of one game and setting."""
    colour, marker, dashes = look
    axis.plot([], [], color=colour, marker=marker, linestyle=dashes, label=label)
    for run in runs:
        during, (steps, score, _) = run.curve[:-1], run.curve[-1]
        axis.errorbar(*during.T, color=colour, fmt=".-", markersize=4, linewidth=0.6, alpha=0.4)
        error = np.abs(np.array(interval(run.result["returns"])) - score)[:, None]
        axis.errorbar(steps, score, error, color=colour, fmt=marker, markersize=7, capsize=3)
    if runs:
        steps, mean, low, high = mean_and_range([run.curve for run in runs])
        axis.plot(steps, mean, color=colour, linewidth=2, linestyle=dashes)
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if chance := [x for run in runs for x in run.result.get("returns_random") or []]:
        hatched = dict(facecolor="none", edgecolor=colour, hatch="////", alpha=0.35, linewidth=0)
        axis.axhspan(*interval(chance), **hatched)
        axis.axhline(np.mean(chance), color=colour, linestyle=":", linewidth=1)

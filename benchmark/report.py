"""Tables and pictures from finished runs, beside the published Atari 100k scores.

    python benchmark/report.py runs --out report              # every result.json below runs/
    python benchmark/report.py small=runs/a large=runs/b --out report    # two settings, named
    python benchmark/report.py --published --out results/published       # the published scores alone

Needs benchmark/requirements.txt. A report is a folder: report.md, its pictures, and aggregates.json for programs. A file
of runs (`improvement.py --out`) stands for a folder as well.

The score of a run is the mean return of its final evaluation. Human-normalised: (score - random) / (human - random).
Mean, median, interquartile mean (IQM), optimality gap and their 95% stratified bootstrap intervals are rliable's
(Agarwal et al. 2021, arXiv 2108.13264). Games at or above human and Har-HNS, the harmonic mean of the JEDI paper (arXiv
2605.13013), are of each game's mean over runs. Agent-Optimal and Human-Optimal games: arXiv 2505.19698.
"""

import argparse
import dataclasses
import difflib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import common
import numpy as np
import runs
from common import BadInput, markdown, new_figure
from runs import GAMES, LOOKS, PUBLISHED, Run

AGENT_OPTIMAL: list[str] = PUBLISHED["agent_optimal"]["games"]
SUBSETS: dict[str, list[str]] = {
    "all": list(GAMES),
    "agent_optimal": AGENT_OPTIMAL,
    "human_optimal": [game for game in GAMES if game not in AGENT_OPTIMAL],
}
METRICS = {"mean": "Mean", "median": "Median", "iqm": "IQM", "optimality_gap": "Optimality gap"}
BUDGET = 100_000  # environment steps of 4 frames
HARMONIC_OFFSET = 0.1  # keeps Har-HNS finite where an agent plays like chance (arXiv 2605.13013)
TITLE, HUMAN = "# Atari 100k report", "human-normalised score (1 is human)"
PUBLISHED_LOOKS = (
    *(("#999999", "v", (0, (1, 1.5))), ("#E69F00", "s", (0, (5, 1.5)))),
    *(("#56B4E9", "^", (0, (3, 1.2, 1, 1.2))), ("#009E73", "D", (0, (6, 1, 1, 1, 1, 1)))),
    *(("#0072B2", "P", (0, (2, 1))), ("#CC79A7", "o", "-")),
)


# --- scores: published ones, and those of runs


@dataclasses.dataclass(frozen=True)
class Agent:
    """Scores of one agent: game -> one number per run (or the only one known, the mean, if `means_only`)."""

    name: str
    scores: dict[str, np.ndarray]
    measured: bool = False  # by runs, not published
    main: bool = False  # in the pictures and the first table
    means_only: bool = False
    notes: tuple[str, ...] = ()
    printed: dict = dataclasses.field(default_factory=dict)  # aggregates in papers
    mark: str = ""  # after its name, wherever that is shown

    @property
    def label(self) -> str:
        """Name, number of runs, and of games where it is not all."""
        runs_of = sorted({len(values) for values in self.scores.values()})
        n = "-".join(map(str, dict.fromkeys([*runs_of[:1], *runs_of[-1:]])))
        known = "means" if self.means_only else f"n={n}"
        part = f", {len(self.scores)} of {len(GAMES)} games" * (len(self.scores) < len(GAMES))
        return self.name + self.mark + (f" ({known}{part})" if self.scores else "")

    def hns(self, game: str) -> np.ndarray:
        """Human-normalised scores of the runs of a game."""
        return runs.human_normalised(game, self.scores[game])

    def mean_hns(self, games: Iterable[str]) -> np.ndarray:
        """Mean over runs, per game."""
        return np.array([self.hns(game).mean() for game in games])

    def present(self, games: Iterable[str]) -> list[str]:
        return [game for game in games if game in self.scores]


def published_agents() -> list[Agent]:
    """The agents of published.json; a note says where other sources print other numbers."""
    agents = []
    for name, entry in PUBLISHED["agents"].items():
        scores = entry.get("runs") or {game: [mean] for game, mean in entry["means"].items()}
        notes = [f"{entry['source']}.", *entry.get("notes", [])]
        for other in entry.get("printed_differently", []):
            values = ", ".join(f"{game} {value:g}" for game, value in other["scores"].items())
            notes.append(f"Printed otherwise in {other['where']}: {values}.")
        arrays = {game: np.array(values, dtype=float) for game, values in scores.items()}
        main, means, printed = name in PUBLISHED["main"], "means" in entry, entry.get("printed", {})
        mark = "" if scores else ", second-hand"
        agents.append(Agent(name, arrays, False, main, means, tuple(notes), printed, mark))
    return agents


def of_atari_100k(run: Run) -> None:
    if run.game not in GAMES:
        close = difflib.get_close_matches(run.game, GAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else "it has no published scores"
        raise BadInput(f"{run.where} is of {run.result['env_id']!r}, not of Atari 100k: {hint}")


def load_groups(words: list[str], left_out: list[str] | None = None) -> dict[str, list[Run]]:
    """Agent -> its runs, from words `FOLDER` or `NAME=FOLDER`. The two scripts are two agents."""
    groups: dict[str, list[Run]] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = "", word
        elif not name.isprintable() or name[:1] in ("", "_") or not folder:
            raise BadInput(f"{word!r} is neither a folder nor NAME=FOLDER")
        found = runs.find_runs(Path(folder), of_atari_100k, left_out)
        scripts = sorted({run.result["script"] for run in found})
        for script in scripts:
            label = script if not name else name if len(scripts) == 1 else f"{name} ({script})"
            if label in groups or label in PUBLISHED["agents"]:
                raise BadInput(f"two agents are called {label!r}; name them by NAME=FOLDER")
            groups[label] = [run for run in found if run.result["script"] == script]
    return groups


def measured_agents(groups: dict[str, list[Run]]) -> list[Agent]:
    """One agent per group."""
    agents = []
    for name, of in groups.items():
        scores = {game: [r.result["mean_return"] for r in of if r.game == game] for game in GAMES}
        games = "-".join(map(str, sorted({len(run.result["returns"]) for run in of})))
        notes = [f"Measured with this repository, {games} games a run."]
        if cut := sorted({run.game for run in of if run.cut}):
            limit = of[0].result["args"]["max_episode_steps"]
            notes.append(f"Not whole games, cut at {limit:,} steps: {', '.join(cut)}.")
        arrays = {game: np.array(values) for game, values in scores.items() if values}
        steps = sorted({run.result["env_steps"] for run in of})
        if steps != [BUDGET]:
            notes.append(f"{steps[-1]:,} steps a run; the published agents had {BUDGET:,}.")
        mark = f", {steps[-1] / 1000:.0f}k steps" * (steps != [BUDGET]) + ", games cut" * bool(cut)
        agents.append(Agent(name, arrays, True, True, notes=tuple(notes), mark=mark))
    return agents


# --- aggregates


def balance(*columns: np.ndarray) -> np.ndarray:
    """Columns of (runs, games), repeated to one number of runs so that each game keeps the same weight."""
    size = math.lcm(*(len(column) for column in columns))
    return np.concatenate([np.repeat(c, size // len(c), axis=0) for c in columns], axis=1)


def estimate(columns: list[np.ndarray], function: Callable, reps: int, seed: int) -> tuple:
    """`function` of the (runs, games) matrix of scores, and its 95% stratified bootstrap interval (2, outputs) or None.

    Runs are drawn anew within each game. No interval where a game has one run: it would hide that game's spread.
    rliable ignores its own `random_state`, so NumPy's global generator is seeded, and put back."""
    from rliable import library

    columns = [np.asarray(column)[:, None] for column in columns]
    if min(len(column) for column in columns) < 2:
        return function(balance(*columns)), None
    equal = len({len(column) for column in columns}) == 1
    scores = {"": np.concatenate(columns, axis=1) if equal else columns}
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        points, intervals = library.get_interval_estimates(
            scores, lambda *c: function(balance(*c)), reps=reps
        )
    finally:
        np.random.set_state(state)
    return points[""], intervals[""]


def rliable_metrics(scores: np.ndarray) -> np.ndarray:
    """Mean, median, IQM and optimality gap of a (runs, games) matrix."""
    from rliable import metrics

    return np.array([getattr(metrics, f"aggregate_{metric}")(scores) for metric in METRICS])


def harmonic_hns(mean_hns: np.ndarray) -> float | None:
    """Har-HNS, (mean of 1 / (HNS + 0.1))^-1 over games; None if an HNS of -0.1 or less leaves it without meaning."""
    shifted = np.asarray(mean_hns) + HARMONIC_OFFSET
    return None if (shifted <= 0).any() else float(1 / np.mean(1 / shifted))


def aggregate(agent: Agent, games: list[str], reps: int, seed: int) -> dict:
    """Aggregates over exactly these games, None if one is missing; `n_runs` is that of the game with fewest. Of an
    agent without scores those that are quoted for all games."""
    present = agent.present(games)
    counts = [] if agent.means_only else [len(agent.scores[game]) for game in present]
    summary = {key: None for metric in METRICS for key in (metric, f"{metric}_interval")}
    summary |= dict(superhuman=None, har_hns=None, n_games=len(present))
    summary |= dict(n_runs=min(counts, default=None), n_runs_max=max(counts, default=None))
    summary["missing"] = [game for game in games if game not in present]
    if not agent.scores and len(games) == len(GAMES):
        quoted = {key: value for key, value in agent.printed.items() if key != "where"}
        return summary | quoted | dict(n_games=len(games), missing=[])
    if summary["missing"]:
        return summary
    points, intervals = estimate([agent.hns(game) for game in games], rliable_metrics, reps, seed)
    for i, metric in enumerate(METRICS):
        interval = None if intervals is None else [float(x) for x in intervals[:, i]]
        summary |= {metric: float(points[i]), f"{metric}_interval": interval}
    mean_hns = agent.mean_hns(games)
    above = int((mean_hns > 1 - 1e-9).sum())  # a tie counts, as in DIAMOND's table (IRIS on Pong)
    return summary | dict(superhuman=above, har_hns=harmonic_hns(mean_hns))


def subsets_of(agents: list[Agent]) -> dict[str, list[str]]:
    """The three sets of games, and those that a measured agent has, where they are fewer."""
    parts = {f"games of {a.name}": a.present(GAMES) for a in agents if a.measured}
    return SUBSETS | {k: games for k, games in parts.items() if games not in SUBSETS.values()}


def title_of(subset: str, games: list[str]) -> str:
    kinds = {"all": "games, all", "agent_optimal": "Agent-Optimal games"}
    if subset in SUBSETS:
        return f"{len(games)} {kinds.get(subset, 'Human-Optimal games')}"
    return f"{len(games)} of {len(GAMES)} games: those of {subset.removeprefix('games of ')}"


# --- tables


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def scores_frame(agents: list[Agent]):
    """A row per agent and game: mean and standard deviation over runs, number of runs, human-normalised mean."""
    import pandas as pd

    keys = ["agent", "game", "actions", "mean", "std", "n_runs", "hns"]
    rows = [
        (a.name, game, GAMES[game]["actions"], x.mean(), x.std(ddof=1) if len(x) > 1 else math.nan)
        + (math.nan if a.means_only else len(x), a.hns(game).mean())
        for a in agents
        for game, x in a.scores.items()
    ]
    return pd.DataFrame(rows, columns=keys)


def score_table(agents: list[Agent], frame) -> str:
    """Games in rows, Agent-Optimal ones first; agents in columns: means over runs, ± their standard deviation."""
    cells, rows = frame.set_index(["game", "agent"]), []
    for subset in ("agent_optimal", "human_optimal"):
        rows.append([f"*{title_of(subset, SUBSETS[subset])}*"] + [""] * (3 + len(agents)))
        for game in SUBSETS[subset]:
            known = GAMES[game]
            row = [game, known["actions"], number(known["random"]), number(known["human"])]
            for agent in agents:
                shown = "not run" if agent.measured else "–"
                if game in agent.scores:
                    cell = cells.loc[game, agent.name]
                    spread = agent.measured and not math.isnan(cell["std"])
                    shown = number(cell["mean"]) + f" ± {number(cell['std'])}" * spread
                row.append(shown)
            rows.append(row)
    return markdown(["Game", "Actions", "Random", "Human", *(a.label for a in agents)], rows)


def runs_frame(groups: dict[str, list[Run]]):
    """A row per run: what it came to, what it took, and which script made it."""
    import pandas as pd

    rows = []
    for agent, of in groups.items():
        for run in sorted(of, key=lambda run: (run.game, run.result["seed"])):
            r, memory = run.result, run.result.get("peak_memory_bytes")
            row = dict(agent=agent, game=run.game, seed=r["seed"], mean_return=r["mean_return"])
            row |= dict(games=len(r["returns"]), steps=r["env_steps"])
            row |= dict(
                time=common.clock(r["wall_seconds"]), GiB=memory and round(memory / 2**30, 2)
            )
            row |= {key: str(r.get(key) or "–") for key in ("device", "precision", "preset")}
            rows.append(row | dict(script=run.script and run.script[:7], where=run.where))
    return pd.DataFrame(rows)


def aggregate_table(agents: list[Agent], aggregates: dict, subset: str) -> str:
    """The agents that have all of these games; in brackets the interval."""
    rows, whole = [], subset == "all"
    for agent in agents:
        summary, cells = aggregates[agent.name][subset], []
        if summary["missing"]:
            continue
        for metric in METRICS:
            ends = summary[f"{metric}_interval"]
            interval = "" if ends is None else " [{:.3f}, {:.3f}]".format(*ends)
            cells.append(number(summary[metric], 3) + interval)
        ends = dict.fromkeys([summary["n_runs"], summary["n_runs_max"]])
        counts = "–" if summary["n_runs"] is None else "-".join(map(str, ends))
        printed = agent.printed.items() if whole else ()
        other = [f"{k} {v:g}" for k, v in printed if k != "where" and abs(v - summary[k]) > 6e-4]
        above = f"{summary['superhuman']} of {summary['n_games']}"
        row = [agent.name + agent.mark, counts, *cells, above, number(summary["har_hns"], 3)]
        rows.append(row + [", ".join(other).replace("superhuman", "at or above human")] * whole)
    header = ["Agent", "Runs", *METRICS.values(), "At or above human", "Har-HNS"]
    return markdown(header + ["Printed otherwise"] * whole, rows)


def asymmetry(agents: list[Agent]) -> list[tuple[Agent, float, float]]:
    """Mean HNS on the Agent-Optimal and the Human-Optimal games that an agent has; largest ratio first."""
    found = []
    for agent in agents:
        sides = [agent.present(SUBSETS[key]) for key in ("agent_optimal", "human_optimal")]
        if all(sides):
            found.append((agent, *(float(agent.mean_hns(side).mean()) for side in sides)))
    return sorted(found, key=lambda one: one[1] / max(one[2], 1e-9), reverse=True)


def notes_of(agents: list[Agent]) -> str:
    return "".join(f"- {agent.name}: {' '.join(agent.notes)}\n" for agent in agents)


def report_text(agents, aggregates, frames: dict, drawn: set, left_out: list, reps: int) -> str:
    """report.md."""
    own = ", ".join(a.label for a in agents if a.measured) or "nothing, published scores alone"
    a100, rule = PUBLISHED["a100_hours"], PUBLISHED["agent_optimal"]
    hours = ", ".join(f"{k} {v}" for k, v in a100.items() if k != "where")

    def picture(name: str) -> str:
        return f"![{name.replace('_', ' ')}]({name}.png)\n" if name in drawn else ""

    parts = [f"{TITLE}\n", f"Measured: {own}.\n"]
    if "runs" in frames:
        frame = frames["runs"].drop(columns="where").astype(object)
        frame = frame.where(frame.notna(), "–")
        parts += ["## Runs\n", picture("learning_curves"), markdown(frame.columns, frame.values)]
        parts.append(f"{len(frame)} runs. `script`: by `git hash-object`. GiB: the peak.\n")
        parts += [f"Left out: {reason}\n" for reason in left_out]
    parts += [
        "## Aggregates\n",
        f"Human-normalised; in brackets the 95% interval of a stratified bootstrap over runs ({reps:,} draws), "
        "none where a game has one run or single runs are not known (Runs: –; then all is of game means). Lower is "
        "better for the optimality gap. A table has the agents that played all of its games.\n",
        picture("aggregates"),
        picture("performance_profiles"),
    ]
    for subset, games in subsets_of(agents).items():
        parts += [f"### {title_of(subset, games)}\n", f"{', '.join(games)}.\n"]
        parts.append(aggregate_table(agents, aggregates, subset))
    parts.append(f"A100-hours a run: {hours} ({a100['where']}).\n")
    rows = []
    for agent, high, low in asymmetry(agents):
        ratio = number(high / low) if min(high, low) > 0 else "–"
        rows.append([agent.label, number(high, 3), number(low, 3), ratio])
    parts += [
        "## Asymmetry\n",
        f"Agent-Optimal are the games on which the mean human-normalised score of {', '.join(rule['agents'])} in "
        f"{PUBLISHED['diamond_table1']['source']} is above {rule['threshold']}. A ratio of 1: no asymmetry. Agents with games of one kind only are not here.\n",
        picture("asymmetry"),
        markdown(["Agent", "Mean, Agent-Optimal", "Mean, Human-Optimal", "Ratio"], rows),
        "## Scores\n",
        "Mean over runs of a run's mean return in its final evaluation; measured here ± the standard deviation.\n",
        picture("games"),
        picture("action_sets"),
    ]
    others = [a for a in agents if a.scores and not a.main]
    groups = {
        "The agents in the pictures": [a for a in agents if a.main],
        "Others": [a for a in others if len(a.scores) == len(GAMES)],
        "Others, some games": [a for a in others if len(a.scores) < len(GAMES)],
    }
    for title, chosen in groups.items():
        parts += [f"### {title}\n", score_table(chosen, frames["scores"])]
    return "\n".join([part for part in parts if part] + ["## Sources\n", notes_of(agents)])


# --- pictures


def looks(agents: list[Agent]) -> dict[str, tuple]:
    """Agent -> colour, marker, dashes; published ones keep theirs from report to report."""
    measured = [agent.name for agent in agents if agent.measured]
    own = zip(measured, LOOKS * len(measured), strict=False)
    return dict(zip(PUBLISHED["main"], PUBLISHED_LOOKS, strict=True)) | dict(own)


def hns_scale(axis, which: str, values: Iterable[float]) -> None:
    """Human-normalised scores reach from a little below 0 to above 10: logarithmic, but linear around 0."""
    low, high = min([*values, 0]), max([*values, 1])
    getattr(axis, f"set_{which}scale")("symlog", linthresh=0.1, linscale=0.5)
    ticks = [t for t in (-0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10, 30) if low - 0.1 <= t <= high * 2]
    getattr(axis, f"set_{which}ticks")(ticks, labels=[f"{tick:g}" for tick in ticks])
    getattr(axis, f"set_{which}lim")(low * 1.3 - 0.03, high * 1.3)
    getattr(axis, f"{which}axis").minorticks_off()


def draw_games(agents: list[Agent]):
    """Human-normalised score of each game, a marker per agent, and its range over runs."""
    shown, style = [a for a in agents if a.main], looks(agents)
    title = "Score per game, higher is better. Mark: mean; bar: range over n runs. In brackets: size of the action set"
    figure, ((*axes,),) = new_figure(title, 1, 2, (11, 7), sharex=True)
    for axis, subset in zip(axes, ("agent_optimal", "human_optimal"), strict=True):
        games = SUBSETS[subset][::-1]
        for row in range(0, len(games), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
        for i, agent in enumerate(shown):
            colour, marker, _ = style[agent.name]
            offset = 0.35 - 0.7 * i / max(1, len(shown) - 1)  # equal scores do not hide each other
            for game in agent.present(games):
                row, hns, wide = games.index(game) + offset, agent.hns(game), 1 + 2 * agent.measured
                axis.plot([hns.min(), hns.max()], [row, row], color=colour, lw=wide, alpha=0.4)
                axis.plot(hns.mean(), row, marker, color=colour, markersize=3 + 2 * wide)
            axis.plot([], [], marker, color=colour, label=agent.label)
        axis.axvline(1, color="black", linewidth=1, zorder=1)
        axis.set(title=title_of(subset, games), xlabel=HUMAN)
        axis.set_yticks(range(len(games)), labels=[f"{g} ({GAMES[g]['actions']})" for g in games])
    hns_scale(axes[0], "x", [x for a in shown for game in a.scores for x in a.hns(game)])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_action_sets(agents: list[Agent]):
    """Each game's score over the size of its action set: a marker per game, a bar at the agent's mean."""
    shown, style = [a for a in agents if a.main], looks(agents)
    sizes = sorted({game["actions"] for game in GAMES.values()})
    title = "Score by the size of the action set, higher is better. Mark: a game; bar: the agent's mean of several games"
    figure, ((axis,),) = new_figure(title, 1, 1, (12, 5))
    for i, agent in enumerate(shown):
        colour, marker, _ = style[agent.name]
        for x, actions in enumerate(sizes):
            hns = agent.mean_hns(g for g in agent.scores if GAMES[g]["actions"] == actions)
            at, width = x + (i - (len(shown) - 1) / 2) * 0.8 / len(shown), 0.3 / len(shown)
            axis.plot([at] * len(hns), hns, marker, color=colour, markersize=5 + 4 * agent.measured)
            if len(hns) > 1:
                axis.plot([at - width, at + width], [hns.mean()] * 2, color=colour, linewidth=3)
        axis.plot([], [], marker, color=colour, label=agent.label)
    hns_scale(axis, "y", [x for a in shown for x in a.mean_hns(a.scores)])
    axis.axhline(1, color="black", linewidth=1, zorder=0)
    names = [f"{n}\n(games: {sum(g['actions'] == n for g in GAMES.values())})" for n in sizes]
    axis.set_xticks(range(len(sizes)), labels=names)
    axis.set(xlabel="size of the action set", ylabel=HUMAN)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_aggregates(agents: list[Agent], aggregates: dict):
    """Panels for all games, and for those of an own agent where they are fewer; a line per agent that has them."""
    rows, subsets = {}, subsets_of(agents)
    for subset in (s for s in subsets if s not in ("agent_optimal", "human_optimal")):
        having = [a for a in agents if not aggregates[a.name][subset]["missing"]]
        rows[subset] = sorted(having, key=lambda a, s=subset: aggregates[a.name][s]["mean"])
    heights = [len(shown) + 3 for shown in rows.values()]
    title = "Human-normalised aggregates. Bar: 95% bootstrap interval. Circle: none, of game means, one run or second-hand (IQM: of the means)"
    size = (12, 0.6 + 0.23 * sum(heights))
    figure, panels = new_figure(title, len(rows), 4, size, height_ratios=heights)
    for line, (subset, shown) in zip(panels, rows.items(), strict=True):
        for axis, (metric, name) in zip(line, METRICS.items(), strict=True):
            for y, agent in enumerate(shown):
                summary, colour = (
                    aggregates[agent.name][subset],
                    "#D55E00" if agent.measured else "#0072B2",
                )
                ends, at = summary[f"{metric}_interval"], summary[metric]
                if ends is not None:
                    axis.plot(ends, [y, y], color=colour, linewidth=5, alpha=0.4)
                if at is not None:
                    mark = dict(marker="|" if ends else "o", markersize=6, markerfacecolor="white")
                    axis.plot(at, y, color=colour, **mark)
            better = "lower" if metric == "optimality_gap" else "higher"
            title = f"{name}, {better} is better\n{title_of(subset, subsets[subset])}"
            axis.set_title(title, fontsize=8.5)
            labels = [agent.label if axis is line[0] else "" for agent in shown]
            axis.set_yticks(range(len(shown)), labels=labels)
    return figure


def draw_asymmetry(agents: list[Agent]):
    """Mean HNS on Agent-Optimal and on Human-Optimal games, joined, with their ratio."""
    found = asymmetry(agents)[::-1]
    title = "Performance asymmetry: mean score on Agent-Optimal and Human-Optimal games, and (right) their ratio"
    figure, ((axis,),) = new_figure(title, 1, 1, (9, 1.4 + 0.28 * len(found)))
    for y, (_, high, low) in enumerate(found):
        axis.plot([low, high], [y, y], color="#999999", linewidth=2, zorder=1)
        ratio = f"{high / low:.1f}" if min(high, low) > 0 else "–"
        axis.annotate(ratio, (1.01, y), xycoords=("axes fraction", "data"), va="center")
    highs, lows, rows = [one[1] for one in found], [one[2] for one in found], range(len(found))
    axis.plot(lows, rows, "o", color="#0072B2", label="Human-Optimal games")
    axis.plot(highs, rows, "s", color="#E69F00", label="Agent-Optimal games")
    hns_scale(axis, "x", highs + lows)
    axis.axvline(1, color="black", linewidth=1, zorder=0)
    axis.set_yticks(rows, labels=[agent.label for agent, *_ in found])
    for text, (agent, *_) in zip(axis.get_yticklabels(), found, strict=True):
        text.set_fontweight("bold" if agent.measured else "normal")
    axis.set_xlabel(f"mean {HUMAN}, higher is better")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_profiles(agents: list[Agent], reps: int, seed: int):
    """Share of runs above each score (Agarwal et al. 2021), a panel a set of games; agents of which runs are known."""
    subsets, style, thresholds = subsets_of(agents), looks(agents), np.geomspace(0.01, 10, 61)

    def profile(scores: np.ndarray) -> np.ndarray:
        return (scores[None] > thresholds[:, None, None]).mean((1, 2))

    rows = math.ceil(len(subsets) / 3)
    title = "Performance profiles: share of runs above a score, higher is better. Band: 95% bootstrap interval, none where a game has one run"
    figure, axes = new_figure(title, rows, 3, (13, 0.8 + 3.6 * rows), sharey=True)
    for axis, (subset, games) in zip(axes.flat, subsets.items(), strict=False):
        for agent in (a for a in agents if a.main and not a.means_only):
            colour, _, dashes = style[agent.name]
            label = agent.label if subset == "all" else None
            axis.plot([], [], color=colour, linestyle=dashes, label=label)
            if agent.present(games) == games:
                share, band = estimate([agent.hns(game) for game in games], profile, reps, seed)
                axis.plot(thresholds, share, color=colour, linestyle=dashes, linewidth=1.8)
                if band is not None:
                    axis.fill_between(thresholds, *band, color=colour, alpha=0.13, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.1, 1, 10], labels=["0.01", "0.1", "1", "10"])
        axis.axvline(1, color="black", linewidth=1, zorder=0)
        axis.set(title=title_of(subset, games), xlabel=HUMAN, ylim=(0, 1), ylabel="share of runs")
    for axis in axes.flat[len(subsets) :]:
        axis.remove()
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# --- the report


def check_out(out: Path) -> None:
    """A report may replace an earlier report, and nothing else."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file; give a folder")
    page, names = out / "report.md", sorted(path.name for path in out.glob("*"))
    if names and not (page.exists() and page.read_text(errors="replace").startswith(TITLE)):
        raise BadInput(f"--out {out} holds other files ({names[0]}); give an empty or a new folder")


def report(options: argparse.Namespace) -> None:
    """Make everything, then write it."""
    if bool(options.results) == options.published:
        raise BadInput("give folders of results or --published, one of the two; see --help")
    if options.reps < 2:
        raise BadInput(f"--reps is {options.reps}; it must be at least 2")
    try:
        import rliable.library  # noqa: F401
    except (ImportError, TypeError) as error:  # TypeError: rliable 1.2.0 with pandas 3
        raise BadInput(f"{error}; pip install -r benchmark/requirements.txt") from None
    check_out(out := options.out)
    groups = load_groups(options.results, left_out := [])
    agents, draws = published_agents() + measured_agents(groups), (options.reps, 0)
    subsets = subsets_of(agents)
    aggregates = {a.name: {s: aggregate(a, g, *draws) for s, g in subsets.items()} for a in agents}
    frames, pictures, formats = {"scores": scores_frame(agents)}, {}, options.formats
    if groups:
        frames["runs"] = runs_frame(groups)
        pictures["learning_curves"] = (runs.draw_learning_curves, groups)
    pictures |= {
        "aggregates": (draw_aggregates, agents, aggregates),
        "performance_profiles": (draw_profiles, agents, *draws),
        "games": (draw_games, agents),
        "asymmetry": (draw_asymmetry, agents),
        "action_sets": (draw_action_sets, agents),
    }
    files = {"aggregates.json": (json.dumps(aggregates, indent=1, allow_nan=False) + "\n").encode()}
    for name, frame in frames.items() if "csv" in formats else ():
        files[f"{name}.csv"] = frame.to_csv(index=False).encode()
    for name, (draw, *given) in pictures.items():
        with common.drawing(out / f"{name}.png"):
            files[f"{name}.png"] = common.png(figure := draw(*given))
            if "svg" in formats:
                figure.savefig(svg := io.BytesIO(), format="svg", metadata={"Date": None})
                files[f"{name}.svg"] = svg.getvalue()
    drawn = {name for name in pictures if f"{name}.png" in files}
    text = report_text(agents, aggregates, frames, drawn, left_out, options.reps)
    files["report.md"] = text.encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        common.write(out / name, content)
    for name in {*pictures, "learning_curves", *frames, "runs"}:  # of an earlier report
        for old in {f"{name}.png", f"{name}.svg", f"{name}.csv"} - {*files}:
            (out / old).unlink(missing_ok=True)
    print(out / "report.md")


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    add, source = parser.add_argument, "[NAME=]FOLDER"
    add("results", nargs="*", metavar=source, help="folder or file of runs of one setting")
    add("--out", type=Path, required=True, help="folder; an earlier report there is replaced")
    add("--published", action="store_true", help="report the published scores alone")
    add("--formats", nargs="+", choices=["csv", "svg"], default=[], help="write these as well")
    add("--reps", type=int, default=2000, help="bootstrap draws (2000)")
    return common.run("report.py", report, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

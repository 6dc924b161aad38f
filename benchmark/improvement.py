"""Did the policy get better than chance, for certain? Trained runs beside random play of the same game.

    python benchmark/improvement.py results/small

Every run holds its own random play: `returns_random`, as many games by the same rules as it plays at the end. A run has
improved for certain where the 95% interval of its mean return lies wholly above that of random play. Both intervals are
percentile bootstraps over games. Human-normalised: 0 random play, 1 a person, by the published scores of whole games;
"cut" where some games were cut by --max-episode-steps.

Prints the table, and writes it beside the runs as improvement.md, with the learning curves, improvement.png, and
health.md: the state of latents and world model at each evaluation.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import report

import jedi_atari as jedi

DRAWS = 10_000  # of the bootstrap
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")


def interval(returns: list[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean."""
    values = np.asarray(returns)
    rng = np.random.default_rng(0)
    means = rng.choice(values, (DRAWS, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def improved(trained: list[float], chance: list[float]) -> bool:
    """Whether the whole interval of the one lies above that of the other."""
    return interval(trained)[0] > interval(chance)[1]


def human_normalised(result: dict) -> str:
    """(score - random) / (human - random) by the published scores, as text."""
    game = report.PUBLISHED["games"].get(jedi.resolve_env_id(result["env_id"])[1])
    if game is None:
        return "-"
    limit = result["args"]["max_episode_steps"]
    if limit < jedi.Args().max_episode_steps and max(result.get("lengths") or [limit]) >= limit:
        return "cut"
    score = (result["mean_return"] - game["random"]) / (game["human"] - game["random"])
    return f"{score:.2f}"


def read_runs(folder: Path) -> list[tuple[list[dict], dict]]:
    """What every finished run below a folder logged, and its result; what is none is left out by name. Raises `BadInput` if there is none,
    or if they differ in their settings."""
    runs, left_out = [], []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = report.read_result(path)
            if not report.are_returns(result.get("returns_random")):
                raise report.BadInput(f"{path} holds no returns_random")
            run = report.Run(path, folder, result["env_id"], result, [])
            runs.append((read_metrics(path.parent), run))
        except (report.BadInput, OSError) as error:
            left_out.append(f"left out: {error}")
    if not runs:
        reason = left_out[0] if left_out else "give a folder of finished runs"
        raise report.BadInput(f"{folder} holds no result.json of a run; {reason}")
    report.check_same_settings([run for _, run in runs])
    print("".join(f"{line}\n" for line in left_out), end="", file=sys.stderr)
    return [(lines, run.result) for lines, run in runs]


def read_metrics(folder: Path) -> list[dict]:
    """What a run logged, a dictionary a line. Raises `BadInput` that names the line."""
    path = folder / "metrics.jsonl"
    lines = enumerate(report.read_text(path).splitlines(), 1)
    return [report.read_json(line, f"{path}, line {number},") for number, line in lines]


def with_interval(returns: list[float]) -> str:
    """Mean and interval, as text."""
    low, high = interval(returns)
    return f"{np.mean(returns):,.1f} ({low:,.1f} to {high:,.1f})"


def table(runs: list[tuple[list[dict], dict]]) -> str:
    """One row a run."""
    rows = []
    for _, result in runs:
        trained, chance = result["returns"], result["returns_random"]
        recall = result.get("reward_recall")
        rows.append(
            {
                "game": result["env_id"],
                "seed": result["seed"],
                "random play, 95% interval": with_interval(chance),
                "trained, 95% interval": with_interval(trained),
                "games": f"{len(chance)}, {len(trained)}",
                "better for certain": "yes" if improved(trained, chance) else "no",
                "human-normalised": human_normalised(result),
                "steps": f"{result['env_steps']:,}",
                "rewards recognised": "no data" if recall is None else f"{recall:.0%}",
                "time": common.clock(result["wall_seconds"]),
            }
        )
    return report.markdown(list(rows[0]), [list(row.values()) for row in rows])


HEALTH = (  # what health.md shows: heading, keys of metrics.jsonl, format
    (
        "updates: diffusion, reward, policy",
        [f"charts/{name}_updates" for name in jedi.PARTS],
        ",.0f",
    ),
    ("return", ["eval/mean_return"], ",.1f"),
    ("latents: standard deviation", ["wm/latent_std"], ".2f"),
    ("effective rank", ["wm/latent_effective_rank"], ".0f"),
    ("saturated", ["wm/latent_saturation"], ".1%"),
    ("open loop 1, 5, 15", [f"wm/open_loop_ratio_{k}" for k in (1, 5, 15)], ".2f"),
    ("rewards recognised", ["wm/reward_recall"], ".0%"),
    ("false alarms", ["wm/reward_false_alarms"], ".0%"),
    (
        "P(true reward) 0, 1, 3, 5 steps into a dream",
        [f"wm/reward_prob_{k}" for k in (0, 1, 3, 5)],
        ".2f",
    ),
    ("reward a step, imagined less real", ["wm/imagined_minus_real"], "+.3f"),
)


def health_table(runs: list[tuple[list[dict], dict]]) -> str:
    """One row an evaluation: what `measure_world_model` said of play that was not trained on.

    The first row of a run is before its training, the last after it. What was not there to measure is "no data".
    """
    rows = []
    for lines, result in runs:
        tested = [line for line in lines if "wm/latent_std" in line]
        for line in tested:
            counts, final = dict.fromkeys(jedi.PARTS, 0) if line is tested[0] else {}, {}
            if line is tested[-1]:
                counts, final = result["updates"], {"eval/mean_return": result["mean_return"]}
            line = line | final | {f"charts/{name}_updates": n for name, n in counts.items()}
            cells = [
                ", ".join("no data" if line.get(k) is None else format(line[k], form) for k in keys)
                for _, keys, form in HEALTH
            ]
            rows.append([result["env_id"], result["seed"], *cells])
    return report.markdown(["game", "seed", *(heading for heading, _, _ in HEALTH)], rows)


def draw(runs: list[tuple[list[dict], dict]], path: Path) -> None:
    """A column a game, four columns side by side: returns over real steps, returns over time, and what the
    dream pays beyond the game."""
    from matplotlib.figure import Figure

    games = sorted({result["env_id"] for _, result in runs})
    pays = any("wm/imagined_minus_real" in line for lines, _ in runs for line in lines)
    wide, high = min(4, len(games)), 2 + pays
    blocks = -(-len(games) // wide)
    figure = Figure(figsize=(3.6 * wide, 2.4 * high * blocks), dpi=80, layout="constrained")
    panels = figure.subplots(high * blocks, wide, squeeze=False)
    # (high, blocks * wide): a column a game; the places left over in the last block stay empty.
    panels = np.concatenate(np.split(panels, blocks), axis=1)
    for ax in panels[:, len(games) :].flat:
        ax.remove()
    for column, game in enumerate(games):
        ours = [run for run in runs if run[1]["env_id"] == game]
        chance = interval(np.concatenate([result["returns_random"] for _, result in ours]))
        by_steps, by_time, *pay = panels[:, column]
        for ax in (by_steps, by_time):
            ax.axhspan(*chance, color="0.8", label="random play")
        for colour, (lines, result) in zip(COLOURS * len(ours), ours, strict=False):
            name, lines[-1]["time/run"] = f"seed {result['seed']}", result["wall_seconds"]
            (low, high), mean = interval(result["returns"]), result["mean_return"]
            for ax, key, unit in ((by_steps, "charts/env_steps", 1_000), (by_time, "time/run", 60)):
                tested = [
                    (x[key] / unit, x["eval/mean_return"]) for x in lines if "eval/mean_return" in x
                ]
                ax.plot(
                    *zip(*tested, strict=True), color=colour, marker="o", markersize=4, label=name
                )
                error = [[mean - low], [high - mean]]
                ax.errorbar(lines[-1][key] / unit, mean, error, color=colour, marker="s", capsize=4)
            for ax in pay:
                found = [
                    (x["charts/env_steps"] / 1_000, x["wm/imagined_minus_real"])
                    for x in lines
                    if "wm/imagined_minus_real" in x
                ]
                ax.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=4)
        by_steps.set(title=game, xlabel="real steps, thousands")
        by_time.set(xlabel="minutes")
        by_steps.legend(frameon=False, fontsize=8)
        for ax in pay:
            ax.axhline(0, color="0.5", linewidth=1)
            ax.set(xlabel="real steps, thousands")
        for ax in panels[:, column]:
            ax.grid(alpha=0.3)
    labels = ("return, higher is better",) * 2 + ("reward a step (-1, 0, 1),\ndream less game",)
    for column in panels[:, : len(games) : wide].T:
        for ax, label in zip(column, labels, strict=False):
            ax.set_ylabel(label)
    figure.suptitle("circles: evaluations\nsquares: games at the end, 95% interval", fontsize=9)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of finished runs")
    folder = parser.parse_args(argv).runs
    try:
        runs = read_runs(folder)
        text = table(runs)
        print(text, end="")
        jedi.write_atomically(folder / "improvement.md", text.encode())
        jedi.write_atomically(folder / "health.md", health_table(runs).encode())
        with common.drawing():
            draw(runs, folder / "improvement.png")
    except report.BadInput as error:
        print(f"improvement.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"improvement.py: failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

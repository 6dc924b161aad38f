"""Did the policy get better than chance, for certain? Trained runs beside random play of the same game.

    python benchmark/improvement.py runs/small                  # table, picture and world model beside the runs
    python benchmark/improvement.py runs/small --out small.jsonl    # the same, and the runs themselves in one file
    python benchmark/improvement.py small.jsonl                 # table and picture again, from that file

Every run holds its own random play: `returns_random`, as many games by the same rules as it plays at the end. A run has
improved for certain where the 95% interval of its mean return lies wholly above that of random play. Both intervals are
percentile bootstraps over games. Human-normalised: 0 random play, 1 a person, by the published scores of whole games;
"cut" where some games were cut by --max-episode-steps.

Writes NAME.md, with a row a run, then a row an evaluation: what was measured of latents and world model on play that
was not trained on (docs/metrics.md; the first row of a run is before its training); and NAME.png, the learning curves.
"""

import argparse
import json
import sys
from pathlib import Path

import common
import numpy as np
import runs
from runs import GAMES, Run, interval

PARTS = ("diffusion", "reward", "policy")
WORLD_MODEL = {  # heading: keys of metrics.jsonl, format
    "updates: diffusion, reward, policy": ([f"charts/{name}_updates" for name in PARTS], ",.0f"),
    "return": (["eval/mean_return"], ",.1f"),
    "latents: standard deviation": (["wm/latent_std"], ".2f"),
    "effective rank": (["wm/latent_effective_rank"], ".0f"),
    "saturated": (["wm/latent_saturation"], ".1%"),
    "open loop 1, 5, 15": ([f"wm/open_loop_ratio_{k}" for k in (1, 5, 15)], ".2f"),
    "rewards recognised": (["wm/reward_recall"], ".0%"),
    "false alarms": (["wm/reward_false_alarms"], ".0%"),
    "P(true reward) 0, 1, 3, 5 steps into a dream": (
        [f"wm/reward_prob_{k}" for k in (0, 1, 3, 5)],
        ".2f",
    ),
    "reward a step, imagined less real": (["wm/imagined_minus_real"], "+.3f"),
}


def improved(trained: list[float], chance: list[float]) -> bool:
    """Whether the whole interval of the one lies above that of the other."""
    return interval(trained)[0] > interval(chance)[1]


def human_normalised(run: Run) -> str:
    """(score - random) / (human - random) by the published scores, as text."""
    if (game := GAMES.get(run.game)) is None or run.cut:
        return "cut" if game else "-"
    return f"{(run.result['mean_return'] - game['random']) / (game['human'] - game['random']):.2f}"


def with_interval(returns: list[float]) -> str:
    """Mean and interval, as text."""
    return "{:,.1f} ({:,.1f} to {:,.1f})".format(np.mean(returns), *interval(returns))


def table(found: list[Run]) -> str:
    """One row a run."""
    rows = []
    for run in found:
        r, recall = run.result, run.result.get("reward_recall")
        chance, trained = r["returns_random"], r["returns"]
        row = {
            "game": r["env_id"],
            "seed": r["seed"],
            "random play, 95% interval": with_interval(chance),
            "trained, 95% interval": with_interval(trained),
            "games": f"{len(chance)}, {len(trained)}",
            "better for certain": "yes" if improved(trained, chance) else "no",
            "human-normalised": human_normalised(run),
            "steps": f"{r['env_steps']:,}",
            "rewards recognised": "no data" if recall is None else f"{recall:.0%}",
            "time": common.clock(r["wall_seconds"]),
        }
        rows.append(row)
    return common.markdown(rows[0], (row.values() for row in rows))


def world_model(found: list[Run]) -> str:
    """One row an evaluation; what was not there to measure is "no data"."""
    rows = []
    for run in found:
        tested = [row for row in run.metrics if "wm/latent_std" in row]
        for i, row in enumerate(tested):
            counts = dict.fromkeys(PARTS, 0) if i == 0 else {}
            if i == len(tested) - 1:
                row = {**row, "eval/mean_return": run.result["mean_return"]}
                counts = run.result.get("updates") or {}
            row = row | {f"charts/{name}_updates": n for name, n in counts.items()}
            cells = [
                ", ".join("no data" if row.get(k) is None else format(row[k], form) for k in keys)
                for keys, form in WORLD_MODEL.values()
            ]
            rows.append([run.result["env_id"], run.result["seed"], *cells])
    return common.markdown(["game", "seed", *WORLD_MODEL], rows)


def has_random_play(run: Run) -> None:
    if not run.result.get("returns_random"):
        raise common.BadInput(f"{run.where} holds no returns_random")


def shortened(row: dict) -> dict:
    """Five digits are enough of a metric."""
    return {key: float(f"{value:.5g}") for key, value in row.items()}


def improvement(source: Path, out: Path | None) -> None:
    """Table and picture; with `out` the runs as well."""
    found = runs.find_runs(source, has_random_play)
    found.sort(key=lambda run: (run.game, run.result["seed"]))
    if out:
        lines = [
            dict(result=r.result, metrics=[*map(shortened, r.metrics)], script=r.script)
            for r in found
        ]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    beside = out or (source / "improvement" if source.is_dir() else source)
    print(shown := table(found), end="")
    text = f"{shown}\n### The world model at each evaluation\n\n{world_model(found)}"
    beside.with_suffix(".md").write_text(text, encoding="utf-8")
    with common.drawing(picture := beside.with_suffix(".png")):
        groups = {
            script: [r for r in found if r.result["script"] == script]
            for script in dict.fromkeys(r.result["script"] for r in found)
        }
        common.save(runs.draw_learning_curves(groups), picture)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("runs", type=Path, help="folder of finished runs, or a file of them")
    parser.add_argument("--out", type=Path, metavar="NAME.jsonl", help="file of the runs to write")
    options = parser.parse_args(argv)
    return common.run("improvement.py", improvement, options.runs, options.out)


if __name__ == "__main__":
    sys.exit(main())

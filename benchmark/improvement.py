"""Is the trained policy better than random play? Runs beside random play of the same game.

    python benchmark/improvement.py runs/small                  # table and learning curves, beside the runs
    python benchmark/improvement.py runs/small --out small.jsonl    # the same, and the runs themselves in one file
    python benchmark/improvement.py small.jsonl                 # table and picture again, from that file

Every run holds its own random play: `returns_random`, as many games by the same rules as it plays at the end. A run has
improved where the 95% interval of its mean return lies wholly above that of random play. Both intervals are
percentile bootstraps over games. Human-normalised: 0 random play, 1 a person, by the published scores of whole games;
"cut" where some games were cut by --max-episode-steps.

Writes the table and the learning curves: improvement.md and improvement.png in the folder, or NAME.md and NAME.png.
"""

import json
import sys
from pathlib import Path

import common
import numpy as np
import runs
from runs import GAMES, Run, interval

NOTE = """
Games: of random play, of the trained agent. Better: the trained policy's interval lies above that of random play;
that is said of this one policy, not of the method. Human-normalised: 0 is the published score of random play, not the
run's own, 1 a person's; "cut": some games ended at the step limit, so there is none.
"""


def improved(trained: list[float], chance: list[float]) -> bool:
    """Whether the whole interval of the one lies above that of the other."""
    return interval(trained)[0] > interval(chance)[1]


def human_normalised(run: Run) -> str:
    """The human-normalised score as text, where there is one."""
    if run.game not in GAMES or run.cut:
        return "cut" if run.game in GAMES else "-"
    return f"{runs.human_normalised(run.game, run.result['mean_return']):.2f}"


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
            "better": "yes" if improved(trained, chance) else "no",
            "human-normalised": human_normalised(run),
            "steps": f"{r['env_steps']:,}",
            "rewards recognised": "no data" if recall is None else f"{recall:.0%}",
            "time": common.clock(r["wall_seconds"]),
        }
        rows.append(row)
    return common.markdown(rows[0], (row.values() for row in rows))


def has_random_play(run: Run) -> None:
    if not run.result.get("returns_random"):
        raise common.BadInput(f"{run.where} holds no returns_random")


def shortened(row: dict) -> dict:
    """Five digits are enough of what is neither a count nor a score."""
    exact = ("charts/", "eval/")
    return {k: v if k.startswith(exact) else float(f"{v:.5g}") for k, v in row.items()}


def keep(found: list[Run], out: Path) -> None:
    """The runs as one file. Raises `BadInput` if it would lose others that are there."""
    key = lambda result: tuple(result.get(k) for k in ("script", "env_id", "seed"))  # noqa: E731
    rows = common.open_rows(out, *runs.KEYS)
    with common.reading(out):
        lost = {key(row["result"]) for row in rows} - {key(run.result) for run in found}
    if lost:
        which = f"{len(lost)} other runs, such as {' '.join(map(str, min(lost)))}"
        raise common.BadInput(f"{out} holds {which}; give another --out")
    kept = [(run.result, [*map(shortened, run.metrics)], run.script) for run in found]
    lines = [json.dumps(dict(zip(runs.KEYS, row, strict=True))) + "\n" for row in kept]
    common.write(out, "".join(lines))


def improvement(source: Path, out: Path | None) -> None:
    """Table and picture; with `out` the runs as well."""
    found = runs.find_runs(source, has_random_play)
    found.sort(key=lambda run: (run.game, run.result["seed"]))
    if out:
        keep(found, out)
    print(text := table(found), end="")
    groups = {}
    for run in found:
        groups.setdefault(run.result["script"], []).append(run)
    beside = out or (source / "improvement" if source.is_dir() else source)
    common.write_up(beside, text + NOTE, lambda: runs.draw_learning_curves(groups))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    parser = common.parser(__doc__)
    parser.add_argument("runs", type=Path, help="folder of finished runs, or a file of them")
    parser.add_argument("--out", type=Path, metavar="NAME.jsonl", help="file of the runs to write")
    options = parser.parse_args(argv)
    return common.run("improvement.py", improvement, options.runs, options.out)


if __name__ == "__main__":
    sys.exit(main())

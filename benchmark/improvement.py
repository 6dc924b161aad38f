"""Did the policy get better than chance, for certain? Trained runs beside random play of the same game.

    python benchmark/improvement.py --random Krull,RoadRunner --preset small --out results/random   # 100 games each
    python benchmark/improvement.py results/small --random-play results/random                      # table and picture
    python benchmark/improvement.py results/tiny     # these runs hold their own random play, `returns_random`

A run has improved for certain where the 95% interval of its mean return lies wholly above that of random play. Both
intervals are percentile bootstraps over games. Random play is played by the rules of the preset's final evaluation:
full games, raw rewards, lives ignored, cut at the same number of steps; its actions are drawn uniformly.

The second command prints the table, and writes it beside the runs as improvement.md, with the learning curves,
improvement.png, and health.md: the state of latents and world model at each evaluation.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import report

import jedi_atari as jedi

DRAWS = 10_000  # of the bootstrap


def random_play(args: jedi.Args, episodes: int) -> dict:
    """Returns and lengths of games with uniform actions."""
    env, rng = jedi.make_env(args), np.random.default_rng(args.seed)
    env.reset(seed=900_000_000 + args.seed)  # apart from training's and evaluation's
    returns, lengths = [], []
    for episode in range(episodes):
        if episode:
            env.reset()
        total, steps, over = 0.0, 0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
            total, steps, over = total + reward, steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    env.close()
    return {
        "env_id": args.env_id,
        "preset": args.preset,
        "seed": args.seed,
        "max_episode_steps": args.max_episode_steps,
        "returns": returns,
        "lengths": lengths,
        "mean_return": float(np.mean(returns)),
        "versions": common.versions(),
        "git_commit": common.git_commit(),
    }


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


def read_runs(folder: Path) -> list[tuple[Path, dict]]:
    """Every finished run below a folder; what is none is left out by name. Raises `BadInput` if there is none."""
    runs, left_out = [], []
    for path in sorted(folder.rglob("result.json")):
        try:
            runs.append((path.parent, report.read_result(path)))
        except report.BadInput as error:
            left_out.append(f"left out: {error}")
    if not runs:
        reason = left_out[0] if left_out else "give a folder of finished runs"
        raise jedi.BadInput(f"{folder} holds no result.json of a run; {reason}")
    print("".join(f"{line}\n" for line in left_out), end="", file=sys.stderr)
    return runs


def read_metrics(folder: Path) -> list[dict]:
    """What a run logged, a dictionary a line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_random(folder: Path, result: dict) -> dict:
    """Random play of a run's game, cut at the same length: the run's own, or for older runs that
    have none a file's. Raises `BadInput` that says how to make it."""
    if result.get("returns_random"):
        return {"returns": result["returns_random"]}
    _, name = jedi.resolve_env_id(result["env_id"])
    path = folder / f"{name}.json"
    command = f"python benchmark/improvement.py --random {name} --preset {result['preset']}"
    command += f" --out {shlex.quote(str(folder))}"
    try:
        chance = json.loads(path.read_text())
    except (OSError, ValueError):
        raise jedi.BadInput(f"{path} is missing or no JSON; make it with: {command}") from None
    if chance["max_episode_steps"] != result["args"]["max_episode_steps"]:
        raise jedi.BadInput(
            f"{path} cuts games at another length than the runs; make it anew with: {command}"
        )
    return chance


def with_interval(returns: list[float]) -> str:
    """Mean and interval, as text."""
    low, high = interval(returns)
    return f"{np.mean(returns):,.1f} ({low:,.1f} to {high:,.1f})"


def table(runs: list[tuple[Path, dict]], chance: list[dict]) -> str:
    """One row a run, as Markdown."""
    rows = [
        [
            "game",
            "seed",
            "random play, 95% interval",
            "trained, 95% interval",
            "games",
            "better for certain",
            "steps",
        ]
        + ["rewards recognised", "time", "memory"],
        ["---", "---:", "---:", "---:", "---:", "---", "---:", "---:", "---:", "---:"],
    ]
    for (_, result), random in zip(runs, chance, strict=True):
        recall = result.get("reward_recall")
        rows.append(
            [
                result["env_id"],
                str(result["seed"]),
                with_interval(random["returns"]),
                with_interval(result["returns"]),
                f"{len(random['returns'])}, {len(result['returns'])}",
                "yes" if improved(result["returns"], random["returns"]) else "no",
                f"{result['env_steps']:,}",
                "no data" if recall is None else f"{recall:.0%}",
                common.clock(result["wall_seconds"]),
                common.gib(result["peak_memory_bytes"]),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


HEALTH = (  # what health.md shows: heading, keys of metrics.jsonl, format
    (
        "updates: diffusion, reward, policy",
        [f"charts/{name}_updates" for name in jedi.PARTS],
        ",.0f",
    ),
    ("latents: standard deviation", ["wm/latent_std"], ".2f"),
    ("effective rank", ["wm/latent_effective_rank"], ".0f"),
    ("saturated", ["wm/latent_saturation"], ".1%"),
    ("open loop 1, 5, 15", [f"wm/open_loop_ratio_{k}" for k in (1, 5, 15)], ".2f"),
    ("rewards recognised", ["wm/reward_recall"], ".0%"),
    ("false alarms", ["wm/reward_false_alarms"], ".0%"),
    (
        "reward seen 0, 1, 3, 5 steps into a dream",
        [f"wm/reward_prob_{k}" for k in (0, 1, 3, 5)],
        ".2f",
    ),
)


def health_table(runs: list[tuple[Path, dict]]) -> str:
    """One row an evaluation, as Markdown: what `measure_world_model` said of play that was not trained on.

    The first row of a run is before its training, the last after it. What was not there to measure is "no data".
    """
    rows = [["game", "seed", *(heading for heading, _, _ in HEALTH)], ["---"] * (len(HEALTH) + 2)]
    for folder, result in runs:
        lines = read_metrics(folder)
        tested = [line for line in lines if "wm/latent_std" in line]
        for line in tested:
            known = {
                id(tested[0]): dict.fromkeys(jedi.PARTS, 0),
                id(tested[-1]): result["updates"],
            }.get(id(line), {})
            line = {f"charts/{name}_updates": count for name, count in known.items()} | line
            cells = [
                ", ".join("no data" if line.get(k) is None else format(line[k], form) for k in keys)
                for _, keys, form in HEALTH
            ]
            rows.append([result["env_id"], str(result["seed"]), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def draw(runs: list[tuple[Path, dict]], chance: list[dict], path: Path) -> None:
    """Learning curves, one panel a game: training games, evaluations, and the band of random play.

    Over policy updates, not steps: most steps of the small preset are the random play before the first update.
    """
    from matplotlib.figure import Figure

    games = sorted({result["env_id"] for _, result in runs})
    figure = Figure(figsize=(4.5 * len(games), 4), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(games), squeeze=False)[0]
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
    for ax, game in zip(panels, games, strict=True):
        played = [
            x["returns"] for (_, r), x in zip(runs, chance, strict=True) if r["env_id"] == game
        ]
        low, high = interval(np.concatenate(played))
        ax.axhspan(low, high, color="0.8", label="random play, 95% interval")
        for colour, (folder, result) in zip(
            colours, (run for run in runs if run[1]["env_id"] == game), strict=False
        ):
            lines = read_metrics(folder)
            point = lambda x, key: (x.get("charts/policy_updates", 0), x[key])  # noqa: E731
            played = [
                point(x, "charts/episodic_return") for x in lines if "charts/episodic_return" in x
            ]
            tested = [point(x, "eval/mean_return") for x in lines if "eval/mean_return" in x]
            ax.plot(*zip(*played, strict=True), color=colour, alpha=0.35, linewidth=1)
            ax.plot(
                *zip(*tested, strict=True), color=colour, marker="o", label=f"seed {result['seed']}"
            )
            low, high = interval(result["returns"])
            mean, updates = result["mean_return"], result["updates"]["policy"]
            ax.errorbar(
                updates,
                mean,
                [[mean - low], [high - mean]],
                color=colour,
                marker="s",
                markersize=8,
                capsize=5,
            )
        ax.set(title=game, xlabel="updates of the policy", ylabel="return of a game")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(
        "thin: games of training; circles: evaluations; square: games at the end, 95% interval",
        fontsize=10,
    )
    figure.savefig(path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="?", help="folder of finished runs")
    parser.add_argument(
        "--random", metavar="GAMES", help="play these games at random instead, separated by commas"
    )
    parser.add_argument(
        "--preset", choices=list(jedi.PRESETS), default="small", help="whose cut of long games"
    )
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("results/random"), help="where random play is written"
    )
    parser.add_argument(
        "--random-play", type=Path, default=Path("results/random"), help="where it is read"
    )
    return parser.parse_args(argv)


def play(options: argparse.Namespace) -> None:
    """Random play of each game, one file a game."""
    names = [jedi.resolve_env_id(game)[1] for game in options.random.split(",")]
    if options.episodes < 2:
        raise jedi.BadInput(f"--episodes is {options.episodes}; it must be at least 2")
    for name in names:
        jedi.make_env(jedi.Args(env_id=name)).close()  # before anything is written
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        settings = jedi.PRESETS[options.preset] | dict(
            env_id=name, preset=options.preset, seed=options.seed
        )
        result = random_play(jedi.Args(**settings), options.episodes)
        jedi.write_atomically(options.out / f"{name}.json", common.finite(result))
        print(f"{name}: {with_interval(result['returns'])} over {options.episodes} games")


def compare(options: argparse.Namespace) -> None:
    """Table and picture of the runs of a folder."""
    runs = read_runs(options.runs)
    chance = [read_random(options.random_play, result) for _, result in runs]
    text = table(runs, chance)
    print(text, end="")
    jedi.write_atomically(options.runs / "improvement.md", text.encode())
    jedi.write_atomically(options.runs / "health.md", health_table(runs).encode())
    with common.drawing():
        draw(runs, chance, options.runs / "improvement.png")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure."""
    options = parse_args(argv)
    try:
        if bool(options.random) == bool(options.runs):
            raise jedi.BadInput("give a folder of runs, or --random and the games to play")
        (play if options.random else compare)(options)
    except jedi.BadInput as error:
        print(f"improvement.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"improvement.py: failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

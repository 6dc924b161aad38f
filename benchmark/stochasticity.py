"""Does the world model know how uncertain it should be? Skill, and the spread of samples, with and without chance.

    python benchmark/stochasticity.py                       # two games, plain and stochastic; minutes on a CPU
    python benchmark/stochasticity.py --games Krull --updates 1000 --out krull.jsonl
    python benchmark/stochasticity.py --table --out results/stochasticity.jsonl    # table and picture again

For each game, played plainly and with sticky actions and random frame skips: train encoder and denoiser on random play,
then, on other play,

- skill: error of latents imagined 1 and 5 steps ahead / error of predicting no change (below 1: better than that);
- spread: at saved states of the emulator the same action is played many times with other draws of chance. The standard
  deviation of the latents that follow is the true spread; that of as many samples of the model, given the same past,
  is the model's. Their ratio should be 1; over the states, their rank correlation says whether the model is unsure
  where the game is. Without chance the true spread is 0; the model's is given as a share of a step's typical change.

Settings compared: 1, 3 and 10 sampling steps; no churn and `s_churn` 1; and the sampler's first noise of unit variance,
as the script has it, or multiplied by sigma_max, as in EDM's algorithm 2. --out FILE.jsonl must be new.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import jedi_atari_stochastic as jedi

STEPS, CHURNS, STARTS = (1, 3, 10), (0.0, 1.0), ("unit", "sigma_max")
SHOWN = ((3, 0.0, "unit"), (3, 1.0, "unit"), (3, 1.0, "sigma_max"), (10, 1.0, "sigma_max"))
SETTING = ("sample_steps", "s_churn", "start")
MEASURES = {
    "skill_1": "error after 1",
    "skill_5": "after 5",
    "spread_ratio": "spread / true",
    "spread_rank_correlation": "rank correlation",
    "spread_share_of_change": "spread / change",
}
CHANCE = {
    "plain": dict(frame_skip_min=4, frame_skip_max=4, sticky_prob=0.0),
    "stochastic": dict(frame_skip_min=2, frame_skip_max=6, sticky_prob=0.25),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_world_model(args: jedi.Args, updates: int, steps: int) -> tuple[jedi.Agent, float]:
    """Encoder and denoiser trained on `steps` steps of random play; returns the last 50 updates' mean loss too."""
    torch.manual_seed(args.seed)
    env = jedi.make_env(args)
    agent = jedi.Agent(int(env.action_space.n), args).to(DEVICE)
    env.close()
    replay = common.play(jedi, agent, args, args.seed, steps)  # the untrained policy is uniform
    optimizer = jedi.make_optimizer(agent, "diffusion", args)
    losses = [
        jedi.update(agent, "diffusion", optimizer, replay, number, args, False)["loss"]
        for number in range(updates)
    ]
    return agent, torch.stack(losses[-50:]).mean().item()


@torch.no_grad()
def skill(agent: jedi.Agent, heldout: jedi.ReplayBuffer, args: jedi.Args) -> dict[str, float]:
    """Error of latents imagined 1 and 5 steps ahead / error of predicting no change."""
    n = args.context_frames
    windows = heldout.all_windows(n + 5, stride=1, count=96)
    z = agent.encode(windows.frames)
    imagined = jedi.open_loop(agent, z, windows.actions, 5, args)
    error = (imagined - z)[:, n:].square().mean((0, 2, 3, 4))
    copy = (z[:, n - 1 : n] - z[:, n:]).square().mean((0, 2, 3, 4))
    return {f"skill_{k}": (error[k - 1] / copy[k - 1]).item() for k in (1, 5)}


@dataclasses.dataclass
class Situation:
    """A moment of a game, and what truly followed the same action with other draws of chance."""

    frames: torch.Tensor  # (N, 64, 64, 3) the last N frames
    actions: torch.Tensor  # (N,) the actions at them; the last one is the one whose outcomes follow
    outcomes: torch.Tensor  # (draws, 64, 64, 3)


def situations(args: jedi.Args, seed: int, count: int, draws: int) -> list[Situation]:
    """Moments spread over random play; at each the emulator is set back and plays on, `draws` times."""
    env, n = jedi.make_env(args), args.context_frames
    rng = np.random.default_rng(seed)
    frames, actions, found, since = [env.reset(seed=seed)[0]], [], [], 0
    while len(found) < count:
        action = int(rng.integers(env.action_space.n))
        if len(frames) >= n and since >= 25:
            past = torch.from_numpy(np.stack(frames[-n:]))
            taken = torch.tensor([*actions[len(actions) - n + 1 :], action])
            found.append(
                Situation(past, taken, torch.from_numpy(outcomes(env, action, draws, seed)))
            )
            since = 0
        frame, _, terminated, truncated, info = env.step(action)
        frames.append(frame)
        actions.append(action)
        since += 1
        if info["stop"]:
            if terminated or truncated:
                frame = env.reset()[0]
            frames, actions = [frame], []
    env.close()
    return found


def outcomes(env: jedi.Game, action: int, draws: int, seed: int) -> np.ndarray:
    """(draws, 64, 64, 3) frames after `action` from the present state; the game stays as it was."""
    emulator = env.unwrapped.clone_state(include_rng=True)
    lives, steps, last_action = env.lives, env.steps, env.last_action
    generator, result = env.unwrapped.np_random, []
    for draw in range(draws):
        env.unwrapped.np_random = np.random.default_rng((seed, draw))
        result.append(env.step(action)[0])
        env.unwrapped.restore_state(emulator)
        env.lives, env.steps, env.last_action = lives, steps, last_action
    env.unwrapped.np_random = generator
    return np.stack(result)


def deviation(z: torch.Tensor) -> float:
    """Root of the mean variance of latents (draws, 16, 8, 8) over the draws."""
    return z.var(dim=0).mean().sqrt().item()


@torch.no_grad()
def spread(agent: jedi.Agent, moments: list[Situation], args: jedi.Args) -> dict:
    """The model's spread and the true one at each moment, and what sums them up."""
    model, true, change = [], [], []
    for moment in moments:
        z = agent.encode(moment.frames[None].to(DEVICE))
        after = agent.encode(moment.outcomes[None].to(DEVICE))[0]
        draws = len(after)
        actions = moment.actions[None].expand(draws, -1).to(DEVICE)
        z = z.expand(draws, -1, -1, -1, -1)
        model.append(deviation(jedi.sample_next_latent(agent, z, actions, args)))
        true.append(deviation(after))
        change.append((after - z[:, -1]).square().mean().item())
    total_true = math.sqrt(np.mean(np.square(true)))
    total_model = math.sqrt(np.mean(np.square(model)))
    random_game = total_true > 0
    return {
        "spread_model": model,
        "spread_true": true,
        "spread_ratio": total_model / total_true if random_game else None,
        "spread_rank_correlation": float(spearmanr(model, true).statistic) if random_game else None,
        "spread_share_of_change": total_model / math.sqrt(np.mean(change)) if any(change) else None,
    }


def measure(game: str, chance: str, options: argparse.Namespace) -> list[dict]:
    """All settings on one game, a row each."""
    begun, rows, about = time.monotonic(), [], common.about("stochasticity.py")
    args = jedi.Args(**common.NARROW | CHANCE[chance], env_id=game, compile=False)
    agent, loss = train_world_model(args, options.updates, options.steps)
    heldout = common.play(jedi, agent, args, 1_000 + args.seed, 1_000)
    moments = situations(args, 2_000 + args.seed, options.situations, options.draws)
    for steps, churn, start in itertools.product(STEPS, CHURNS, STARTS):
        setting = dataclasses.replace(args, sample_steps=steps, s_churn=churn, sample_start=start)
        torch.manual_seed(0)
        row = dict(game=game, chance=chance, sample_steps=steps, s_churn=churn, start=start)
        row |= dict(loss=loss, updates=options.updates, steps=options.steps)
        row |= skill(agent, heldout, setting) | spread(agent, moments, setting)
        rows.append(row | about)
    took = time.monotonic() - begun
    print(f"{game} {chance}: diffusion loss {loss:.3f}, {took:.0f} s", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, one row a setting of a game."""
    show = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
    lines = [
        [row["game"], row["chance"], row["sample_steps"], f"{row['s_churn']:g}", row["start"]]
        + [show(row[key]) for key in MEASURES]
        for row in rows
    ]
    header = ["game", "chance", "sampling steps", "churn", "start", *MEASURES.values()]
    return common.markdown(header, lines)


def draw(rows: list[dict]):
    """The model's spread against the true one, state by state, for four settings of each game."""
    rows = [row for row in rows if row["chance"] == "stochastic"]
    games = list(dict.fromkeys(row["game"] for row in rows))
    figure, axes = common.new_figure(
        "Is the model as unsure as the stochastic game is random? A dot is a saved state: the standard deviation of the next\n"
        f"latent ({len(rows[0]['spread_true'])} states a game, 1 model each). On the line the spread is right.",
        len(games), len(SHOWN), (3.1 * len(SHOWN), 3.5 * len(games) + 0.5),
    )  # fmt: skip
    for game, line in zip(games, axes, strict=True):
        chosen = {tuple(r[key] for key in SETTING): r for r in rows if r["game"] == game}
        limit = 1.08 * max(max(r["spread_true"] + r["spread_model"]) for r in chosen.values())
        for ax, (steps, churn, start) in zip(line, SHOWN, strict=True):
            row = chosen[steps, churn, start]
            ax.plot([0, limit], [0, limit], color="0.6", linewidth=1)
            ax.scatter(row["spread_true"], row["spread_model"], s=16, color="#0072B2", alpha=0.8)
            ax.text(0.04, 0.96, "too unsure", va="top", color="0.35", transform=ax.transAxes)
            ax.text(0.96, 0.04, "too sure", ha="right", color="0.35", transform=ax.transAxes)
            ax.set(xlim=(0, limit), ylim=(0, limit), aspect="equal", xlabel="true spread")
            title = f"{game}, {steps} sampling steps, churn {churn:g}\nstart {start}: "
            ax.set_title(f"{title}spread / true {row['spread_ratio']:.2f}", fontsize=8.5)
        line[0].set_ylabel("the model's spread")
    return figure


def stochasticity(options: argparse.Namespace) -> None:
    """Measure, unless only the table is asked for; then table and picture."""
    keys = ("game", "chance", *SETTING, "spread_true", "spread_model", *MEASURES)
    if not options.table:
        if common.open_rows(options.out, *keys):
            how = "--table shows them; give another --out"
            raise common.BadInput(f"{options.out} holds results: {how}")
        for game, chance in itertools.product(options.games, CHANCE):
            for row in measure(game, chance, options):
                common.add_row(options.out, row)
    rows = common.read_rows(options.out, *keys)
    if not rows:
        raise common.BadInput(f"{options.out} holds no results; leave --table out to make them")
    with common.reading(options.out):
        print(text := table(rows), end="")
    common.write_up(options.out, text, functools.partial(draw, rows))


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--games", nargs="+", default=["Pong", "Breakout"])
    add("--updates", type=int, default=350, help="diffusion updates")
    add("--steps", type=int, default=4_000, help="environment steps trained on")
    add("--situations", type=int, default=24, help="states at which the spread is measured")
    add("--draws", type=int, default=32, help="draws of chance, and samples, at each")
    add("--threads", type=int, default=0, help="CPU threads; 0: as PyTorch has it")
    add("--out", type=Path, default=Path("runs/stochasticity.jsonl"))
    add("--table", action="store_true", help="table and picture of what is in --out; run nothing")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return common.run("stochasticity.py", stochasticity, options)


if __name__ == "__main__":
    sys.exit(main())

"""Train all of JEDI on the toy game Catch, in two minutes, and draw what it has learned.

    python -m examples.learn_catch --seed 0    # makes runs/catch-0, with pictures

Prints one JSON object: the mean return of 100 games (random play -0.6, perfect play +1), seconds,
the health of the world model. The pictures take a minute more and need `play/requirements.txt`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import jedi_atari as jedi
from examples import toys

# Narrow networks, few updates. 600 random games meet each last position and action some 8 times; of
# 200 games some were never met, the dream showed a catch there, and the policy went for it.
CATCH = dict(
    env_id="examples.toys:Catch-v0", preset="tiny", eval_every=100, eval_episodes=20,
    final_episodes=100, max_episode_steps=100, total_steps=3_300, first_steps_min=3_000,
    first_steps_max=3_000, first_diffusion_updates=400, first_reward_updates=300,
    first_policy_updates=0,  # a policy that begins before rewards are known learns nonsense first
    epoch_steps=100, reward_updates=20, policy_updates=260, final_epochs=0,
    diffusion_updates=110,  # some 80 until the dream is right after the encoder's reward updates
    batch_size=16, context_frames=2,  # one frame shows all of Catch
    encoder_width=8, denoiser_width=16, cond_dim=64, reward_width=8, lstm_size=128, horizon=5,
    latent_norm="center", sigma_offset=0.1, reward_dreamed=0.5, reward_window=3, sample_steps=2,
    learning_rate=1e-3, encoder_lr_scale=0.03, warmup_updates=20, entropy_weight=0.01,
)  # fmt: skip


def learn_catch(seed: int, run_dir: Path, **changes) -> dict:
    """One run; returns its figures."""
    begun = time.monotonic()
    run = dict(seed=seed, run_dir=str(run_dir), resume=True)  # again after a stop: it carries on
    result = jedi.train(jedi.Args(**CATCH | run | changes))
    found = dict(seed=seed, seconds=round(time.monotonic() - begun, 1))
    keys = "mean_return open_loop_ratio reward_recall peak_memory_bytes measures updates".split()
    return found | {"threads": torch.get_num_threads()} | {key: result[key] for key in keys}


def table(path: Path) -> str:
    """Markdown, one row a seed. Raises `BadInput` if there are no results."""
    lines = [
        "| seed | return of 100 games | time | threads | reward seen 0, 1, 3 steps into a dream "
        "| open loop 1, 3 | latents: standard deviation, rank, saturated |",
        "|---|---|---|---|---|---|---|",
    ]
    try:
        for row in map(json.loads, path.read_text().splitlines()):
            m, ratio, seconds = row["measures"], row["open_loop_ratio"], int(row["seconds"])
            seen = ", ".join(f"{m[f'reward_prob_{k}']:.2f}" for k in (0, 1, 3))
            lines.append(
                f"| {row['seed']} | {row['mean_return']:.2f} | {seconds // 60}:{seconds % 60:02d} "
                f"| {row['threads']} | {seen} | {ratio[0]:.3f}, {ratio[2]:.3f} "
                f"| {m['latent_std']:.2f}, {m['latent_effective_rank']:.0f}, "
                f"{m['latent_saturation']:.0%} |"
            )
        if not lines[2:]:
            raise ValueError("it is empty")
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        why = f"is no file of results of Catch ({error!r}); make it with --out"
        raise jedi.BadInput(f"{path} {why}") from None
    return "\n".join(lines)


# ---- Pictures ------------------------------------------------------------------------------------
@torch.no_grad()
def three_games(run) -> tuple[torch.Tensor, list]:
    """Actions and `Dreamed`s of games that nothing was learned from, with the ball on the left, in
    the middle, on the right. The dream sees the first frame, and then the actions alone."""
    from play.pictures import Dreamed

    args = jedi.Args(**CATCH, seed=run.args.seed + 10**6, epsilon=0.0)
    collector, play = jedi.Collector(args), jedi.ReplayBuffer(300, run.device)
    for _ in range(200):
        collector.step(run.agent, play)
    games = play.all_windows(toys.ROWS, stride=1)  # one window a game
    columns = games.frames[:, 0, 0, ::13].sum(-1).argmax(1)  # of the ball, in the first row
    chosen = [(columns == column).int().argmax().item() for column in (0, 2, 4)]
    frames, actions, rewards, ends, _ = (field[chosen] for field in games)
    n = args.context_frames - 1  # frames of padding before the first one, as in training
    z, taken = F.pad(run.agent.encode(frames), (*(0,) * 6, n, 0)), F.pad(actions, (n, 0))
    z = jedi.open_loop(run.agent, z, taken, toys.ROWS - 1, args)[:, n:]
    reward, end = (logits.argmax(-1) for logits in run.agent.reward(z, actions[:, :-1]))
    rewards = F.pad(torch.stack([rewards[:, :-1].long(), reward - 1], 1), (1, 0)).numpy()
    ends = F.pad(torch.stack([ends[:, :-1], end == 1], 1), (1, 0)).numpy()
    frames = np.stack([frames, frames, run.decoder.pictures(z)], 1)  # `Dreamed` has three rows
    ages = np.arange(toys.ROWS)
    return actions, [Dreamed(frames[i], rewards[i], ends[i], ages) for i in range(len(frames))]


def film_strip(actions: torch.Tensor, dreams: list):
    """Two rows a game, the real frames and the dreamed ones, a column a step."""
    from matplotlib.figure import Figure

    from play.pictures import event

    figure = Figure((8.4, 9.6), layout="constrained")
    figure.suptitle("Three games of Catch. A dream sees the first frame, then only the actions.")
    for (row, step), ax in np.ndenumerate(figure.subplots(2 * len(dreams), toys.ROWS)):
        (game, side), name = divmod(row, 2), f"step {step}" if step else "first frame"
        action = ("left", "stay", "right")[actions[game, step - 1]] if step else ""
        happened, _ = event(dreams[game].rewards[side, step], dreams[game].ends[side, step])
        ax.imshow(dreams[game].pictures[2 * side, step])
        ax.set(xticks=[], yticks=[], xlabel=", ".join(filter(None, [action, happened])))
        ax.set(title="" if row else name, ylabel="" if step else ("real game", "dream")[side])
    return figure


def draw(folder: Path, threads: int) -> None:
    """Learning curves, a film strip and a film, into the folder of a run."""
    from play import pictures, runs

    run, rows = runs.load_run(folder, "cpu", threads), {}
    if run.args.env_id != CATCH["env_id"]:
        raise jedi.BadInput(f"{folder} is a run of {run.game}; python -m play.pictures draws it")
    for row in run.metrics:  # the world model's first updates share a step: the last of them
        rows.setdefault(row["charts/env_steps"], {}).update(row)
    runs.UPDATES = 400  # of the decoder; Catch needs no more
    torch.manual_seed(run.args.seed)
    actions, dreams = three_games(run)
    moments = [moment for dream in dreams for moment in pictures.moments_of(dream)]
    curves = pictures.learning_curves([*rows.values()], f"Catch, {run.about}", run.args)
    if curves:  # of three points at least
        curves.save(folder / "curves.png")
    film_strip(actions, dreams).savefig(folder / "games.png", dpi=90)
    (folder / "games.gif").write_bytes(pictures.film(moments, ([800] * 5 + [2_000]) * 3))
    print("pictures:", *(folder / name for name in ("curves.png", "games.png", "games.gif")))


def main() -> int:
    """The command line; returns the exit status: 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0)
    add("--run-dir", type=Path, help="folder to make; else runs/catch-SEED")
    add("--out", type=Path, help="file that the JSON object is added to as a line")
    add("--table", type=Path, metavar="FILE", help="show such a file as a table, no more")
    add("--draw", type=Path, metavar="RUN", help="draw the pictures of a finished run, no more")
    args = parser.parse_args()
    folder = args.draw or args.run_dir or Path(f"runs/catch-{args.seed}")
    try:
        if args.table:
            return print(table(args.table)) or 0
        if not args.draw:
            file = open(args.out, "a") if args.out else None  # told now if it cannot be written
            line = json.dumps(learn_catch(args.seed, folder, threads=args.threads))
            print(line, flush=True)
            if file:
                print(line, file=file, flush=True)
        draw(folder, args.threads)
        return 0
    except ModuleNotFoundError:
        status, text = (
            int(bool(args.draw)),
            f"no pictures: pip install -r play/requirements.txt, then --draw {folder}",
        )
    except (jedi.BadInput, OSError) as error:
        status, text = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, text = 130, "stopped"
    print(f"learn_catch: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Train the whole of JEDI on Catch and say how well it plays: python -m examples.learn_catch --seed 0

The last line is one JSON object: mean_return of 100 games (random -0.6, perfect +1), seconds, the seed, the health of
the world model. `--out FILE` adds it to a file as a line; `--table results/catch.jsonl` shows such a file as a table.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import jedi_atari as jedi

# Narrow networks and few updates; the algorithm is the main script's.
CATCH = dict(
    env_id="examples.toys:Catch-v0",
    preset="tiny",
    eval_every=100,
    eval_episodes=20,
    final_episodes=100,
    max_episode_steps=100,
    total_steps=3_300,
    # 600 random games, which cost seconds: 25 last positions times 3 actions, each met some eight times. With 200 games
    # some were never met, the dream showed a catch there, and the policy went for it.
    first_steps_min=3_000,
    first_steps_max=3_000,
    first_diffusion_updates=400,
    first_reward_updates=300,
    first_policy_updates=0,  # not before the rewards are known: a policy that begins earlier learns nonsense first
    epoch_steps=100,
    diffusion_updates=110,  # some 80 until the dream is right again, after the reward updates have moved the encoder
    reward_updates=20,
    policy_updates=260,
    final_epochs=0,
    batch_size=16,
    context_frames=2,  # one frame shows all of Catch
    encoder_width=8,
    denoiser_width=16,
    cond_dim=64,
    reward_width=8,
    lstm_size=128,
    latent_norm="center",
    sigma_offset=0.1,
    reward_dreamed=0.5,
    learning_rate=1e-3,
    encoder_lr_scale=0.03,
    warmup_updates=20,
    reward_window=3,
    horizon=5,
    sample_steps=2,
    entropy_weight=0.01,
)


def learn_catch(seed: int, run_dir: Path, **changes) -> dict:
    """One run; returns its figures."""
    begun = time.monotonic()
    result = jedi.train(jedi.Args(**{**CATCH, "seed": seed, "run_dir": str(run_dir), **changes}))
    keys = (
        "mean_return",
        "open_loop_ratio",
        "reward_recall",
        "peak_memory_bytes",
        "measures",
        "updates",
    )
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "threads": torch.get_num_threads(),
        **{key: result[key] for key in keys},
    }


def table(path: Path) -> str:
    """Markdown, one row a seed. Raises `FileNotFoundError` if there are no results."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise FileNotFoundError("it is empty")
    lines = [
        "| seed | return of 100 games | time | threads | reward seen 0, 1, 3 steps into a dream | open loop 1, 3 "
        "| latents: standard deviation, rank, saturated |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        m, ratio = row["measures"], row["open_loop_ratio"]
        cells = [
            str(row["seed"]),
            f"{row['mean_return']:.2f}",
            f"{int(row['seconds']) // 60}:{int(row['seconds']) % 60:02d}",
            str(row["threads"]),
            ", ".join(f"{m[f'reward_prob_{k}']:.2f}" for k in (0, 1, 3)),
            f"{ratio[0]:.3f}, {ratio[2]:.3f}",
            f"{m['latent_std']:.2f}, {m['latent_effective_rank']:.0f}, {m['latent_saturation']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file that the last line is added to")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="show such a file as a table; train nothing"
    )
    args = parser.parse_args()
    if args.table:
        try:
            return print(table(args.table))
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            parser.error(
                f"{args.table} is no file of results of Catch ({error!r}); make it with --out"
            )
    with tempfile.TemporaryDirectory() as folder:
        found = learn_catch(args.seed, Path(folder) / "run", threads=args.threads)
    if args.out:
        with open(args.out, "a") as file:
            print(json.dumps(found), file=file)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

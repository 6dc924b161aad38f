"""Does the world model know that a ball jumps by chance? Ten minutes on one core, and a picture.

    python -m examples.drift    # adds a line to runs/drift.jsonl, draws runs/drift.png

In `DriftingCatch-v0` (examples/toys.py) the ball goes straight on with probability 3/4 and jumps to
either side with 1/8 each; walls hold it. Three world models say in which column it will be next: a
diffusion model with a sampler tuned for chance, the same with the papers' sampler, and networks
trained to predict the next latent by squared error. Needs `benchmark/requirements.txt`.
"""

import dataclasses
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import jedi_atari as jedi
from examples import learn_catch, toys

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))

import ablations
import common

# Whether the ball jumps is decided at noise levels of about half the distance between two futures,
# which is 17 here: training and sampler must be there.
DRIFT = learn_catch.CATCH | dict(
    env_id="examples.toys:DriftingCatch-v0", denoiser_width=32, noise_mean=1.2, sigma_offset=0.0,
    sample_start="sigma_max", sample_sigma_max=20.0, sample_steps=6,
)  # fmt: skip
STEPS, UPDATES = 12_000, 2_000  # so many steps that no single future can be learned by heart
TUNED, PAPERS, REGRESSION = "tuned sampler", "papers' sampler", "regression"
SAMPLERS = {TUNED: {}, PAPERS: dict(sample_start="unit", sample_sigma_max=5.0, sample_steps=3)}
EXACT = np.stack([toys.next_ball(column, 0.25) for column in range(toys.COLUMNS)])


# ---- The world model -----------------------------------------------------------------------------
def train_world_model(args: jedi.Args, replay: jedi.ReplayBuffer, updates: int) -> jedi.Agent:
    """Encoder and denoiser. Over the second half of the updates the learning rate falls to zero: at
    a constant one the imagined probabilities swing from one hundred updates to the next."""
    agent = jedi.Agent(3, args)
    optimizer = jedi.make_optimizer(agent, "diffusion", args)
    peaks = [group["peak"] for group in optimizer.param_groups]
    for number in jedi.progress(range(updates), desc="learn", unit="update"):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak * min(1.0, 2 * (1 - number / updates))
        jedi.update(agent, "diffusion", optimizer, replay, number, args, False)
    return agent


# ---- Where the ball is ---------------------------------------------------------------------------
def ball_columns(frames: torch.Tensor) -> torch.Tensor:
    """(B, 64, 64, 3) pictures -> (B,) columns of the ball, read off the pixels."""
    is_ball = (frames == torch.from_numpy(toys.BALL)).all(-1).any(1)  # (B, 64)
    middle = (is_ball * torch.arange(64)).sum(1) / is_ball.sum(1)
    return (middle / (64 / toys.COLUMNS)).long()


def train_probe(z: torch.Tensor, columns: torch.Tensor, steps: int = 300) -> torch.nn.Linear:
    """A linear probe that reads the ball's column off true latents."""
    torch.manual_seed(0)
    probe = torch.nn.Linear(z[0].numel(), toys.COLUMNS)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(probe(z.flatten(1)), columns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


@torch.no_grad()
def imagined_columns(
    agent, probe, windows: jedi.Windows, args: jedi.Args, samples: int
) -> np.ndarray:
    """(W, COLUMNS): for each of W windows, the share of samples with the ball in each column."""
    n = args.context_frames
    z = agent.encode(windows.frames[:, :n])
    counts = np.zeros((len(z), toys.COLUMNS))
    for _ in range(samples):
        following = jedi.sample_next_latent(agent, z, windows.actions[:, :n], args)
        np.add.at(counts, (np.arange(len(z)), probe(following.flatten(1)).argmax(1).numpy()), 1)
    return counts / samples


def total_variation(shares: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Distance of shares (W, COLUMNS) from the exact ones, the ball being in columns (W,)."""
    return np.abs(shares - EXACT[columns]).sum(1) / 2


def by_column(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(COLUMNS, ...): mean over the windows in which the ball is in each column."""
    return np.stack([values[columns == column].mean(0) for column in range(toys.COLUMNS)])


# ---- Measuring -----------------------------------------------------------------------------------
def measure(args: jedi.Args, samplers: dict[str, dict], samples: int = 200, count=150) -> dict:
    """Train; how far each sampler's distributions are from the exact ones, and the probe's
    accuracy on true latents.

    `each`: total variation of single states' distributions, mean and largest over the ball's
    columns; with 200 samples exact draws have about 0.03. `pooled`: of the distributions of all
    states with the ball in the same column, `imagined`, taken together. Single futures that were
    learned by heart have a small one too, so it proves nothing.
    """
    torch.manual_seed(args.seed)
    replay, other = (
        common.play(jedi, None, args, seed, steps, torch.device("cpu"))
        for seed, steps in ((args.seed, STEPS), (args.seed + 500, 600))
    )
    agent = train_world_model(args, replay, UPDATES)
    frames = replay.frames[:2_000]
    with torch.no_grad():
        z, seen = agent.encode(frames), ball_columns(frames)
    probe = train_probe(z[:1_000], seen[:1_000])
    right = probe(z[1_000:].flatten(1)).argmax(1) == seen[1_000:]
    windows = other.all_windows(args.context_frames + 1, stride=1, count=count)
    columns = ball_columns(windows.frames[:, args.context_frames - 1]).numpy()
    result = {"probe": right.float().mean().item(), "windows": len(columns)}
    for name, changes in samplers.items():
        now = dataclasses.replace(args, **changes)
        shares = imagined_columns(agent, probe, windows, now, samples)
        imagined = by_column(shares, columns)
        each = by_column(total_variation(shares, columns), columns)
        pooled = total_variation(imagined, np.arange(toys.COLUMNS))
        found = {"each": each, "pooled": pooled}
        found = {k: (round(float(v.mean()), 3), round(float(v.max()), 3)) for k, v in found.items()}
        print(name, result.setdefault(name, found), flush=True)
        found["imagined"] = imagined.round(3).tolist()
    return result


def measure_all(seed: int) -> dict:
    """A row of the file: the three settings."""
    begun, args = time.monotonic(), jedi.Args(**DRIFT, seed=seed)
    jedi.check_args(args)
    command = shlex.join(["python", "-m", "examples.drift", *sys.argv[1:]])
    row = common.about("") | dict(command=command, seed=seed)
    row |= measure(args, SAMPLERS)
    with ablations.regression():
        row |= measure(args, {REGRESSION: {}}, samples=1)
    return row | {"seconds": round(time.monotonic() - begun)}


def draw(row: dict):
    """Bars: for the ball in each column, the probabilities of its next one."""
    title = (
        "Where will the ball be next? Grey: the game, where it jumps to either side with "
        "probability 1/8. Others: what a world model imagines, on average over states.\n"
        "In the legend: how far from the game it is state by state "
        "(total variation; 0: exact; 0.2: always says the likeliest)"
    )
    figure, axes = common.new_figure(title, 1, toys.COLUMNS, (13, 3.8), sharey=True)
    looks = {TUNED: "#0072B2", PAPERS: "#E69F00", REGRESSION: "#000000"}  # Okabe and Ito
    bars = [("the game", "0.7", EXACT)]
    for name, colour in looks.items():
        kind = "" if name == REGRESSION else "diffusion, "
        label = f"{kind}{name}: {row[name]['each'][0]:.2f} from the game"
        bars.append((label, colour, np.array(row[name]["imagined"])))
    for column, ax in enumerate(axes[0]):
        for i, (label, colour, shares) in enumerate(bars):
            x = np.arange(toys.COLUMNS) + 1 + 0.2 * (i - 1.5)
            ax.bar(x, shares[column], 0.2, color=colour, label=None if column else label)
        ax.set(title=f"ball in column {column + 1}", xlabel="its next column", ylim=(0, 1.02))
        ax.set_xticks(np.arange(toys.COLUMNS) + 1)
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("probability")
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    return figure


def main(options) -> None:
    if not options.table:
        common.open_rows(options.out, TUNED, PAPERS, REGRESSION)
        torch.set_num_threads(1)
        common.add_row(options.out, measure_all(options.seed))
    rows = common.read_rows(options.out, TUNED, PAPERS, REGRESSION)
    if not rows:
        raise common.BadInput(f"{options.out} holds no results; leave --table out to make them")
    with common.drawing(path := options.out.with_suffix(".png")):
        common.write(path, common.png(draw(rows[-1])))
        print(path)


if __name__ == "__main__":
    parser = common.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/drift.jsonl"))
    parser.add_argument("--table", action="store_true", help="draw the last line; train nothing")
    sys.exit(common.run("examples.drift", main, parser.parse_args()))

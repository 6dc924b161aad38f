"""What the world model says of a ball that drifts by chance: the imagined distribution of its next column."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

import jedi_atari as jedi
from examples import toys

DEVICE = torch.device("cpu")


def random_play(args: jedi.Args, steps: int) -> jedi.ReplayBuffer:
    """Steps of uniformly random actions."""
    env, rng, replay = (
        jedi.make_env(args),
        np.random.default_rng(args.seed),
        jedi.ReplayBuffer(2 * steps, DEVICE),
    )
    frame, _ = env.reset(seed=args.seed)
    for _ in range(steps):
        action = int(rng.integers(env.action_space.n))
        following, reward, over, _, _ = env.step(action)  # neither toy has a time limit
        replay.add(frame, action, reward, over, following if over else None)
        frame = env.reset()[0] if over else following
    env.close()
    return replay


def train_world_model(
    args: jedi.Args, steps: int, updates: int
) -> tuple[jedi.Agent, jedi.ReplayBuffer]:
    """Encoder and denoiser, on random play. Over the second half of the updates the learning rate falls to zero: at a
    constant one the imagined probabilities swing from one hundred updates to the next."""
    torch.manual_seed(args.seed)
    agent = jedi.Agent(3, args)
    replay = random_play(args, steps)
    optimizer = jedi.make_optimizer(agent, "diffusion", args)
    peaks = [group["peak"] for group in optimizer.param_groups]
    for number in range(updates):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak * min(1.0, 2 * (1 - number / updates))
        jedi.update(agent, "diffusion", optimizer, replay, number, args, False)
    return agent, replay


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
    """(W, COLUMNS): for each of W windows, the share of samples in which the ball comes to be in each column."""
    n = args.context_frames
    z = agent.encode(windows.frames[:, :n])
    counts = np.zeros((len(z), toys.COLUMNS))
    for _ in range(samples):
        following = jedi.sample_next_latent(agent, z, windows.actions[:, :n], args)
        np.add.at(counts, (np.arange(len(z)), probe(following.flatten(1)).argmax(1).numpy()), 1)
    return counts / samples


def total_variation(shares: np.ndarray, columns: np.ndarray, drift: float) -> np.ndarray:
    """Distance of each row of shares (W, COLUMNS) from the exact distribution, the ball being in columns (W,)."""
    exact = np.stack([toys.next_ball(column, drift) for column in range(toys.COLUMNS)])
    return np.abs(shares - exact[columns]).sum(1) / 2


def by_column(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(COLUMNS, ...): mean over the windows in which the ball is in each column."""
    return np.stack([values[columns == column].mean(0) for column in range(toys.COLUMNS)])


def measure(
    args: jedi.Args, steps: int, updates: int, settings: list[dict], samples: int = 200, count=150
) -> dict:
    """Total variation for each setting of the sampler, and how well the probe reads true latents.

    `each`: mean and largest, over the ball's columns, of the distance of single states' distributions; with 200 samples
    exact draws have about 0.03. `pooled`: of the distributions of all states with the ball in the same column taken
    together. A regression which has learned single futures by heart has a small one too, so it proves nothing.
    """
    agent, replay = train_world_model(args, steps, updates)
    with torch.no_grad():
        frames = replay.frames[: min(replay.size, 2_000)]
        z = agent.encode(frames)
    seen = ball_columns(frames)
    half = len(z) // 2
    probe = train_probe(z[:half], seen[:half])
    accuracy = (probe(z[half:].flatten(1)).argmax(1) == seen[half:]).float().mean().item()
    other = random_play(dataclasses.replace(args, seed=args.seed + 500), 600)
    windows = other.all_windows(args.context_frames + 1, stride=1, count=count)
    columns = ball_columns(windows.frames[:, args.context_frames - 1]).numpy()
    result = {"probe": accuracy, "windows": len(columns)}
    for setting in settings:
        shares = imagined_columns(
            agent, probe, windows, dataclasses.replace(args, **setting), samples
        )
        each = by_column(total_variation(shares, columns, 0.25), columns)
        pooled = total_variation(by_column(shares, columns), np.arange(toys.COLUMNS), 0.25)
        found = {"each": each, "pooled": pooled}
        result[str(setting)] = {
            k: (round(float(v.mean()), 3), round(float(v.max()), 3)) for k, v in found.items()
        }
        print(setting, result[str(setting)], by_column(shares, columns)[2].round(2), flush=True)
    print(result)
    return result

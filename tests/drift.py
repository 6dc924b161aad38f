"""What the world model says of a ball that drifts by chance: the imagined distribution of its next column."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
import toys

import jedi_atari as jedi

DEVICE = torch.device("cpu")


def random_play(args: jedi.Args, agent: jedi.Agent, steps: int) -> jedi.ReplayBuffer:
    collector = jedi.Collector(args)
    replay = jedi.ReplayBuffer(2 * steps, DEVICE)
    for _ in range(steps):
        collector.step(agent, replay, DEVICE)
    replay.flush()
    return replay


def train_world_model(args: jedi.Args, steps: int, updates: int) -> tuple[jedi.Agent, jedi.ReplayBuffer]:
    """Encoder and denoiser, on random play."""
    jedi.seed_everything(args.seed)
    agent = jedi.Agent(3, args)
    replay = random_play(args, agent, steps)
    part = jedi.make_parts(agent, args, DEVICE)["diffusion"]
    for number in range(updates):
        jedi.update(agent, part, part.sample(replay), number, args, False)
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
def imagined_columns(agent, probe, windows: jedi.Windows, args: jedi.Args, samples: int) -> np.ndarray:
    """(COLUMNS, COLUMNS): share of imagined next columns, by the present one."""
    n = args.context_frames
    z = agent.encode(windows.frames[:, :n])
    present = ball_columns(windows.frames[:, n - 1])
    counts = np.zeros((toys.COLUMNS, toys.COLUMNS))
    for _ in range(samples):
        following = jedi.sample_next_latent(agent, z, windows.actions[:, :n], args)
        np.add.at(counts, (present.numpy(), probe(following.flatten(1)).argmax(1).numpy()), 1)
    return counts / counts.sum(1, keepdims=True)


def total_variation(shares: np.ndarray, drift: float) -> np.ndarray:
    """(COLUMNS,) distance of each row from the exact distribution."""
    exact = np.stack([toys.next_ball(column, drift) for column in range(toys.COLUMNS)])
    return np.abs(shares - exact).sum(1) / 2


def measure(args: jedi.Args, steps: int, updates: int, settings: list[dict], samples: int = 40) -> dict:
    """Mean and largest total variation for each setting of the sampler, and how well the probe reads true latents."""
    agent, replay = train_world_model(args, steps, updates)
    with torch.no_grad():
        frames = replay.frames[: replay.size]
        z = agent.encode(frames)
    columns = ball_columns(frames)
    half = len(z) // 2
    probe = train_probe(z[:half], columns[:half])
    accuracy = (probe(z[half:].flatten(1)).argmax(1) == columns[half:]).float().mean().item()
    other = random_play(dataclasses.replace(args, seed=args.seed + 500), agent, 600)
    windows = other.all_windows(args.context_frames + 1, stride=1)
    result = {"probe": accuracy, "windows": len(windows.frames)}
    for setting in settings:
        shares = imagined_columns(agent, probe, windows, dataclasses.replace(args, **setting), samples)
        distance = total_variation(shares, 0.25)
        result[str(setting)] = (round(float(distance.mean()), 3), round(float(distance.max()), 3))
        print(setting, result[str(setting)], shares[2].round(2), flush=True)
    print(result)
    return result

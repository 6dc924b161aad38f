"""What the benchmarks share: where a figure was measured, waiting for a device, changing a function for a while."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's may not be here

# For measurements of a few minutes: the papers' method with narrow networks and centred latents.
NARROW = dict(
    max_episode_steps=1_200, batch_size=16, final_epochs=0, encoder_width=8, denoiser_width=48,
    cond_dim=128, reward_width=16, lstm_size=128, latent_norm="center", learning_rate=1e-3,
    encoder_lr_scale=0.03, warmup_updates=20, reward_window=5, horizon=10, entropy_weight=0.03,
)  # fmt: skip
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def git_commit() -> str | None:
    """The commit of the scripts, with `-dirty` where they were changed since; None outside git."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def clock(seconds: float) -> str:
    """Seconds -> `1 d 02:03:04`, `2:03:04` or `3:04`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{m:02d}:{s:02d}"


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device on a GPU, of the process on a CPU; None where that is not known (not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # not getrusage, which counts a parent in
        found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        return found and 1024 * int(found[1])
    return None


def gib(count: int | None) -> str:
    """Bytes -> `1.25 GiB`."""
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def finite(content: dict) -> dict:
    """A copy with None for NaN and infinities, which are no JSON: a measure over nothing."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


@contextlib.contextmanager
def drawing():
    """What fails within is a picture: said in one line, it costs no result."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"no picture: {type(error).__name__}: {text}", file=sys.stderr)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def replaced(owner: object, **values):
    """Attributes of `owner` have these values, within."""
    kept = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


def play(script: ModuleType, agent: torch.nn.Module, args, seed: int, steps: int):
    """A `ReplayBuffer` of `steps` steps that an agent of this script plays, without exploration."""
    collector = script.Collector(dataclasses.replace(args, seed=seed, epsilon=0.0))
    replay = script.ReplayBuffer(2 * steps, agent.norm.mean.device)
    for _ in range(steps):
        collector.step(agent, replay)
    collector.env.close()
    return replay

"""JEDI (Joint Embedding DIffusion) in one file: Atari from 100k steps, learned inside a latent diffusion world model.

    python jedi_atari.py --env-id Pong --preset tiny   # minutes on a laptop CPU: a small world model of the real game
    python jedi_atari.py --env-id Pong                 # the papers' numbers: hours on a GPU
    python jedi_atari.py --env-id Pong --dry-run       # print the plan and its cost, do nothing
    python jedi_atari.py --eval-only runs/Pong__...    # play 100 games with a finished run

Read downward: 1 arguments, 2 environment, 3 replay, 4 networks, 5 diffusion, 6 losses, 7 imagination,
8 evaluation, 9 logs and checkpoints, 10 training. Nothing below reads a variable of the module that is not a constant.

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and its released code),
[E] EDM (arXiv 2206.00364), [C] our choice where no source says. A choice that departs from [P] or [D] is marked
DEVIATION n and explained in docs/implementation_details.md.

Symbols: E_phi encoder, D_theta denoiser with inner network F_theta, R_psi reward/termination model, pi_omega and
V_omega actor-critic; z latent, a action, r reward, d termination; sigma noise level, C latent clamp.
Dimensions: B batch, T time (window), H horizon, C x H x W a latent (16 x 8 x 8), A actions.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

IMAGE_SIZE = 64  # pixels; frames are 64 x 64 RGB [P, D]
LATENT_SHAPE = (16, 8, 8)  # channels, height, width [P]
LATENT_BOUND = 3.0  # the clamp C(z) = 3 tanh(z / 3) keeps every latent value in (-3, 3) [P]
PARTS = ("diffusion", "reward", "policy")  # the three updates, in the order in which an epoch makes them [D]
REPORTED_HORIZONS = (1, 3, 5, 10, 15)  # imagined steps named in the table at the end of a run
MAX_OPEN_LOOP = 15  # imagined steps over which the open-loop error is measured, whatever the training horizon


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what would be right."""


# ======================================================================================================================
# 1. Arguments: every number, its meaning and its source
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Args:
    """JEDI: learn an Atari game from 100k steps inside a latent diffusion world model."""

    # fmt: off
    # --- run
    env_id: str = "Pong"  # game: Pong, ALE/Pong-v5, PongNoFrameskip-v4, or any registered RGB environment
    preset: str = "paper"  # set of defaults: paper (the papers' numbers) or tiny (minutes on 2 CPU cores)
    seed: int = 0  # seeds the networks, the draws and the game; same seed, same run on a CPU
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device has matrix units for it [C]
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)  # torch.compile the losses; on with CUDA
    run_dir: str = ""  # folder of the run; empty: runs/<game>__<script>__<seed>__<time>
    resume: bool = False  # carry on the run in --run-dir from its checkpoint
    eval_only: str = ""  # folder of a run: play --final-episodes games with its checkpoint, train nothing
    dry_run: bool = False  # print the plan and its cost on this device, then stop; writes nothing
    checkpoint_every: int = 10  # epochs between checkpoints [C]
    # --- environment
    frame_skip: int = 4  # emulator frames per action, the last two max-pooled [D]
    noop_max: int = 30  # at most so many no-ops at the start of a game [D]
    max_episode_steps: int = 27_000  # steps after which a game is cut: 108,000 frames [D]
    epsilon: float = 0.01  # share of random actions while collecting, none in evaluation [D]
    # --- schedule
    total_steps: int = 100_000  # environment steps of the whole run: 400k frames [P, D]
    first_steps_min: int = 5_000  # steps collected before anything is trained [D]
    first_steps_max: int = 10_000  # ... and at most so many, if rewards are rare [D]
    first_rewards: int = 10  # ... until so many steps had another reward than the commonest [D]
    first_diffusion_updates: int = 10_000  # world model first: a policy in an untrained dream collapses [D]
    first_reward_updates: int = 10_000  # updates of the reward/termination model in the first epoch [D]
    first_policy_updates: int = 5_000  # updates of the actor-critic in the first epoch [D]
    epoch_steps: int = 100  # environment steps per later epoch [D]
    diffusion_updates: int = 400  # updates of the denoiser and encoder per later epoch [D]
    reward_updates: int = 400  # updates of the reward/termination model per later epoch [D]
    policy_updates: int = 400  # updates of the actor-critic per later epoch [D]
    final_epochs: int = 50  # epochs at the end that collect nothing [D]
    batch_size: int = 32  # windows per update; the papers report the better of 32 and 64 per game [P]
    # --- networks
    encoder_width: int = 32  # channels of the encoder's stages, the last one gives 16 [P]
    denoiser_width: int = 160  # channels of the one-level U-Net [P]
    cond_dim: int = 256  # size of the denoiser's conditioning vector [D]
    reward_width: int = 32  # channels of the reward/termination model [D]
    reward_cond_dim: int = 128  # size of its action embedding [D]
    lstm_size: int = 512  # of both LSTMs [D]
    latent_norm: Literal["none", "center"] = "none"  # none [P]; center: subtract a running mean, scale to sigma_data [C]
    # --- diffusion
    sigma_data: float = 0.5  # assumed standard deviation of latents; the real one is logged as latent/std [D, C]
    sigma_offset: float = 0.3  # scale of the noise shared by a whole channel [D]
    noise_mean: float = -0.4  # mean of ln(sigma) in training [E]
    noise_std: float = 1.2  # standard deviation of ln(sigma) in training [E]
    noise_min: float = 0.002  # training sigma is clipped to at least this [D]
    noise_max: float = 20.0  # ... and to at most this [D]
    context_frames: int = 4  # latents and actions the denoiser sees [D]
    target_frames: int = 2  # latents predicted one after the other in a training window [D]
    switch_prob: float = 0.5  # chance that the newest context latent is the denoiser's own output [P]
    sample_steps: int = 3  # Euler steps per imagined latent [P, D]
    sample_sigma_max: float = 5.0  # first noise level of the sampler [D]
    sample_sigma_min: float = 0.002  # last noise level before 0 [D]
    sample_rho: float = 7.0  # curvature of the Karras schedule [E]
    s_churn: float = 0.0  # noise put back at each sampling step; 1 for stochastic games [P]
    # --- learning
    learning_rate: float = 1e-4  # of all three AdamW optimisers [D]
    encoder_lr_scale: float = 0.3  # the encoder learns slower: a moving target is hard to follow [P]
    adam_eps: float = 1e-8  # AdamW's epsilon [D]
    weight_decay: float = 0.01  # on the world model's weight matrices; none on the actor-critic [D]
    warmup_updates: int = 100  # linear learning-rate warm-up of each optimiser [D]
    clip_diffusion: float = 1.0  # largest gradient norm of the diffusion update [D]
    clip_other: float = 100.0  # ... of the other two [D]
    reward_window: int = 15  # transitions after the context in a reward/termination window [D]
    horizon: int = 15  # imagined steps per policy update [P, D]
    gamma: float = 0.985  # discount [D]
    lambda_: float = 0.95  # of the lambda-returns [D]
    entropy_weight: float = 0.001  # weight of the entropy bonus [D]
    # --- evaluation
    eval_every: int = 10  # epochs between evaluations [D]
    eval_episodes: int = 4  # full games per evaluation [D]
    final_episodes: int = 100  # full games at the end [D]
    eval_envs: int = 10  # games played at the same time [C]
    temperature: float = 1.0  # of the sampled policy in evaluation [D]
    heldout_steps: int = 2_000  # evaluation steps kept to measure the world model on unseen play [C]
    # fmt: on


PRESETS: dict[str, dict] = {
    "paper": {},
    "tiny": dict(
        checkpoint_every=1,
        max_episode_steps=1_500,
        total_steps=2_600,
        first_steps_min=2_000,
        first_steps_max=2_000,
        first_diffusion_updates=300,
        first_reward_updates=300,
        first_policy_updates=20,
        epoch_steps=150,
        diffusion_updates=75,
        reward_updates=75,
        policy_updates=10,
        final_epochs=0,
        batch_size=16,
        encoder_width=16,
        denoiser_width=64,
        cond_dim=128,
        reward_cond_dim=64,
        lstm_size=128,
        latent_norm="center",
        learning_rate=5e-4,
        encoder_lr_scale=0.1,
        warmup_updates=20,
        reward_window=4,
        horizon=8,
        eval_every=2,
        eval_episodes=2,
        final_episodes=10,
        heldout_steps=1_500,
    ),
}


def check_args(args: Args) -> None:
    """Raise `BadInput` for a value that no run can use. Writes nothing."""
    positive = """checkpoint_every frame_skip max_episode_steps total_steps first_steps_min first_steps_max epoch_steps
        batch_size encoder_width denoiser_width cond_dim reward_width reward_cond_dim lstm_size sigma_data noise_std
        noise_min noise_max context_frames target_frames sample_steps sample_sigma_max sample_sigma_min sample_rho
        learning_rate encoder_lr_scale adam_eps clip_diffusion clip_other reward_window horizon eval_every
        eval_episodes final_episodes eval_envs temperature heldout_steps""".split()
    not_negative = """seed noop_max first_rewards first_diffusion_updates first_reward_updates first_policy_updates
        diffusion_updates reward_updates policy_updates final_epochs sigma_offset s_churn weight_decay warmup_updates
        entropy_weight""".split()
    shares = ["epsilon", "switch_prob", "gamma", "lambda_"]
    for names, fits, rule in (
        (positive, lambda v: v > 0, "above 0"),
        (not_negative, lambda v: v >= 0, "0 or more"),
        (shares, lambda v: 0 <= v <= 1, "from 0 to 1"),
    ):
        for name in names:
            value = getattr(args, name)
            if not (math.isfinite(value) and fits(value)):
                raise BadInput(f"{flag(name)} is {value}; it must be a finite number {rule}")
    for name in ("encoder_width", "denoiser_width", "reward_width"):
        if getattr(args, name) > 32 and getattr(args, name) % 32:
            raise BadInput(f"{flag(name)} is {getattr(args, name)}; above 32 it must be a multiple of 32")
    if args.cond_dim % args.context_frames or args.cond_dim % 2:
        raise BadInput(f"--cond-dim {args.cond_dim} must be even and a multiple of --context-frames")
    for low, high in (
        ("first_steps_min", "first_steps_max"),
        ("first_steps_max", "total_steps"),
        ("noise_min", "noise_max"),
        ("sample_sigma_min", "sample_sigma_max"),
    ):
        if getattr(args, low) > getattr(args, high):
            raise BadInput(f"{flag(low)} {getattr(args, low)} is above {flag(high)} {getattr(args, high)}")
    if args.seed >= 2**31:
        raise BadInput(f"--seed is {args.seed}; it must be below 2147483648")
    if args.resume and not args.run_dir:
        raise BadInput("--resume needs --run-dir, the folder of the run to carry on")


def flag(name: str) -> str:
    """The command-line flag of a field of `Args`: `lambda_` -> `--lambda`."""
    return "--" + name.strip("_").replace("_", "-")


# ======================================================================================================================
# 2. Environment: Atari as DIAMOND plays it, one plain environment, no vector wrappers
# ======================================================================================================================

# Mean return of random play and of a human player, for the human-normalised score. Source: DIAMOND, table 1.
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0), "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2),
}  # fmt: skip


def resolve_env_id(env_id: str) -> tuple[str, str]:
    """The gymnasium id behind a user's spelling, and the game's short name.

    `Pong`, `ALE/Pong-v5` and `PongNoFrameskip-v4` are all `("ALE/Pong-v5", "Pong")`; any other registered id (also
    `module:Name-v0`) stands for itself. Raises `BadInput` that names the closest known games.
    """
    gym.register_envs(ale_py)
    games = {i[4:-3]: i for i in gym.registry if i.startswith("ALE/") and i.endswith("-v5")}
    name = re.sub(r"(NoFrameskip-v\d|-v\d)$", "", env_id.removeprefix("ALE/"))
    if name in games:
        return games[name], name
    try:
        return gym.spec(env_id).id, re.sub(r"\W+", "_", env_id)
    except (gym.error.Error, ImportError, ValueError):
        lower = {g.lower(): g for g in games}
        close = [lower[g] for g in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        hint = f"did you mean {', '.join(close)}?" if close else f"known games: {', '.join(REFERENCE_SCORES)}"
        raise BadInput(f"unknown game {env_id!r}; {hint}") from None


class Game(gym.Wrapper):
    """One game that shows 64 x 64 RGB frames (uint8) and reports a lost life as `info["life_loss"]`.

    Like gymnasium's `AtariPreprocessing` (no-op start, frame skip, maximum over the last two frames, area
    interpolation) but for two things that a world model cares about. The frame returned at a game's end is the last
    one really shown, where that wrapper returns an older one; and a lost life neither ends the step nor the game.
    An environment that is not Atari has no frame skip and no no-ops: pass `frame_skip=1, noop_max=0`.
    """

    def __init__(self, env: gym.Env, frame_skip: int, noop_max: int, max_episode_steps: int):
        super().__init__(env)
        self.frame_skip, self.noop_max, self.max_episode_steps = frame_skip, noop_max, max_episode_steps
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.lives = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start a game with 1 to `noop_max` no-ops. Seed the first reset only: all later games then differ."""
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.np_random.integers(1, self.noop_max + 1) if self.noop_max else 0):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        # After the no-ops: Amidar and DemonAttack misreport their lives on the very first frame.
        self.lives, self.steps = info.get("lives", 0), 0
        return self.resize(frame), {**info, "life_loss": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat `action` for `frame_skip` frames. Rewards are summed, not clipped."""
        shown: list[np.ndarray] = []
        reward, terminated, truncated, info = 0.0, False, False, {}
        for _ in range(self.frame_skip):
            frame, frame_reward, terminated, truncated, info = self.env.step(action)
            shown.append(frame)
            reward += float(frame_reward)
            if terminated or truncated:
                break
        self.steps += 1
        truncated = truncated or (self.steps >= self.max_episode_steps and not terminated)
        lives = info.get("lives", 0)
        # Only a FALL tells anything: four games always report 0, DemonAttack's count can rise, BankHeist plays on at 0.
        life_loss, self.lives = lives < self.lives, lives
        frame = np.maximum(shown[-2], shown[-1]) if len(shown) > 1 else shown[-1]
        return self.resize(frame), reward, terminated, truncated, {**info, "life_loss": life_loss}

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """(h, w, 3) -> (64, 64, 3), by area interpolation."""
        if frame.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
            return frame
        return cv2.resize(frame, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def make_env(args: Args) -> Game:
    """The environment of `args.env_id`. Swap this function to play something else.

    Raises `BadInput` for an unknown game, for observations that are not RGB frames and for actions that are not a
    finite set.
    """
    gym_id, _ = resolve_env_id(args.env_id)
    if gym_id.startswith("ALE/"):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner on the screen
        settings = dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False)
        env = gym.make(gym_id, disable_env_checker=True, **settings)
        return Game(env, args.frame_skip, args.noop_max, args.max_episode_steps)
    env = gym.make(gym_id, disable_env_checker=True)
    space = env.observation_space
    if not (isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] == (3,)):
        raise BadInput(f"{args.env_id} shows {space}; supported are RGB frames, a uint8 Box of (height, width, 3)")
    if not (isinstance(env.action_space, gym.spaces.Discrete) and env.action_space.start == 0):
        raise BadInput(f"{args.env_id} takes {env.action_space}; supported are finite actions, Discrete(n)")
    return Game(env, 1, 0, args.max_episode_steps)


# ======================================================================================================================
# 3. Replay: frames on the training device, an append-only file behind them
# ======================================================================================================================


class Windows(NamedTuple):
    """A batch of windows cut from episodes. Rows of padding hold zeros and have `mask` False."""

    frames: Tensor  # (B, T, 64, 64, 3) uint8
    actions: Tensor  # (B, T) int64: actions[t] leads from frames[t] to frames[t + 1]
    rewards: Tensor  # (B, T) float32: of that transition, unclipped
    ends: Tensor  # (B, T) bool: that transition ended in a termination (game over or life lost; not a time limit)
    mask: Tensor  # (B, T) bool: which steps are real


class ReplayBuffer:
    """All play so far, flat in time. An episode of n steps that has ended holds n + 1 frames: its true last one too.

    The arrays live on the training device, so that a batch is gathered there without a copy. Behind them a file of
    fixed-size records is only ever appended to; a checkpoint stores its length, never its content.
    """

    RECORD = np.dtype(
        [("crc", "<u4"), ("action", "<i2"), ("final", "u1"), ("end", "u1"), ("reward", "<f4")]
        + [("frame", "u1", (IMAGE_SIZE, IMAGE_SIZE, 3))]
    )
    QUARTER_WEIGHTS = (0.1, 0.1, 0.1, 0.7)  # oldest to newest quarter of the episodes [D]

    def __init__(self, capacity: int, device: torch.device, path: Path | None = None):
        self.device, self.path = device, path
        self.size = self.num_episodes = 0  # records and episodes on the device; the last episode may still be open
        self.open = False
        self.pending: list[np.void] = []  # steps that flush() has yet to upload and write
        self.frames = torch.zeros((capacity, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=device)
        self.actions = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.ends = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.starts = torch.zeros(capacity, dtype=torch.int64, device=device)  # per episode: its first record
        self.lengths = torch.zeros(capacity, dtype=torch.int64, device=device)  # ... and how many records it has
        self.file = open(path, "ab") if path else None  # noqa: SIM115 - open for the life of the buffer

    def add(self, frame: np.ndarray, action: int, reward: float, end: bool, last: np.ndarray | None = None) -> None:
        """One step. `end`: it terminated. `last`: the frame after it, given when the episode stops here (for any
        reason), since no later step will bring it."""
        self._record(frame, action, reward, False, end)
        if last is not None:
            self._record(last, 0, 0.0, True, False)

    def _record(self, frame: np.ndarray, action: int, reward: float, final: bool, end: bool) -> None:
        record = np.zeros((), self.RECORD)
        record["action"], record["reward"], record["final"], record["end"] = action, reward, final, end
        record["frame"] = frame
        record["crc"] = zlib.crc32(record.tobytes()[4:])
        self.pending.append(record)

    def flush(self) -> None:
        """Upload what add() gathered and append it to the file; one transfer for all of it."""
        if self.pending:
            records = np.stack(self.pending)
            if self.file:
                self.file.write(records.tobytes())
                self.file.flush()
            self._upload(records)
            self.pending.clear()

    def _upload(self, records: np.ndarray) -> None:
        n, new = len(records), self.size + len(records)
        while new > len(self.actions):  # rare: games of very many, very short episodes
            for name in ("frames", "actions", "rewards", "ends", "starts", "lengths"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, torch.zeros_like(old[: len(old) // 4 + 1])]))
        for name, array in (("frames", "frame"), ("actions", "action"), ("rewards", "reward"), ("ends", "end")):
            target = getattr(self, name)
            target[self.size : new] = torch.from_numpy(np.ascontiguousarray(records[array])).to(target)
        bounds = [0, *(np.flatnonzero(records["final"]) + 1).tolist(), n]
        for begin, stop in zip(bounds, bounds[1:], strict=False):
            if begin == stop:
                continue
            if not self.open:
                self.starts[self.num_episodes], self.lengths[self.num_episodes] = self.size + begin, 0
                self.num_episodes += 1
            self.lengths[self.num_episodes - 1] += stop - begin
            self.open = not records["final"][stop - 1]
        self.size = new

    def load(self, size: int) -> None:
        """Read back the first `size` records of the file and cut off what is newer: play from after the checkpoint
        belongs to a policy that the checkpoint does not know. Raises `BadInput` if records are missing or altered."""
        assert self.path and self.file and self.size == 0
        have = self.path.stat().st_size // self.RECORD.itemsize
        if have < size:
            raise BadInput(f"{self.path} holds {have} records, its checkpoint needs {size}: the file was cut short")
        for begin in range(0, size, 1024):
            records = np.fromfile(
                self.path, self.RECORD, min(1024, size - begin), offset=begin * self.RECORD.itemsize
            )
            bad = [i for i, r in enumerate(records) if zlib.crc32(r.tobytes()[4:]) != r["crc"]]
            if bad:
                raise BadInput(f"{self.path}: record {begin + bad[0]} fails its checksum: the file was altered")
            self._upload(records)
        self.file.truncate(size * self.RECORD.itemsize)

    def _draw_episodes(self, count: int) -> Tensor:
        """(count,) episode numbers: a quarter by its weight, then any episode of it. O(1) in the buffer's size."""
        n, quarter = self.num_episodes, self.num_episodes // 4
        # An episode whose first transition is not complete yet is no use: the newest one when it was just opened.
        if quarter == 0:
            weights = (self.lengths[:n] - 1).clamp(min=0).float()  # by length while there are fewer than four
            return torch.multinomial(weights, count, replacement=True)
        weights = torch.tensor(self.QUARTER_WEIGHTS, device=self.device)
        which = torch.multinomial(weights, count, replacement=True)
        sizes = torch.where(which == 3, n - 3 * quarter, quarter)
        return which * quarter + (torch.rand(count, device=self.device) * sizes).long().clamp(max=n - 1)

    def _cut(self, episode: Tensor, start: Tensor, length: int, first: Tensor, stop: Tensor) -> Windows:
        """Gather `length` records of each episode from `start` on; real are those in [first, stop)."""
        time_ = start[:, None] + torch.arange(length, device=self.device)
        mask = (time_ >= first[:, None]) & (time_ < stop[:, None])
        index = self.starts[episode][:, None] + time_.clamp(min=0).minimum(self.lengths[episode][:, None] - 1)
        return Windows(
            self.frames[index] * mask[..., None, None, None],
            self.actions[index] * mask,
            self.rewards[index] * mask,
            self.ends[index] & mask,
            mask,
        )

    def sample_frames(self, batch_size: int, length: int, *, final: bool) -> Windows:
        """Windows that may begin before an episode (padding) but end inside it, for diffusion and policy.

        A frame is drawn, then its place in the window [D]. `final=False` leaves out an episode's last frame as the
        newest one of a window: nothing follows it, so no imagination can start there.
        """
        episode = self._draw_episodes(batch_size)
        count = (self.lengths[episode] - (0 if final else 1)).clamp(min=1)
        anchor = (torch.rand(batch_size, device=self.device) * count).long().minimum(count - 1)
        stop = (anchor + 1 + torch.randint(length, (batch_size,), device=self.device)).minimum(count)
        return self._cut(episode, stop - length, length, torch.zeros_like(stop), stop)

    def sample_transitions(self, batch_size: int, length: int) -> Windows:
        """Windows of `length` transitions (`length` + 1 frames) that may overlap both ends of an episode, for the
        reward/termination model. `mask` marks the real transitions; the frame after the last of them is real too.

        A window that would begin before its episode is moved to begin with it, the padding going to its end: a
        recurrent network that starts there from zero sees what it would see if padding kept its state at zero.
        """
        episode = self._draw_episodes(batch_size)
        count = (self.lengths[episode] - 1).clamp(min=1)
        anchor = (torch.rand(batch_size, device=self.device) * count).long().minimum(count - 1)
        start = anchor - torch.randint(length, (batch_size,), device=self.device)
        stop, start = (start + length).minimum(count), start.clamp(min=0)
        # One record more than transitions: the last transition needs the frame that it leads to.
        windows = self._cut(episode, start, length + 1, start, self.lengths[episode].minimum(stop + 1))
        return windows._replace(mask=windows.mask[:, 1:])

    def all_windows(self, length: int, stride: int) -> Windows:
        """Every window of `length` records that lies wholly in an episode, one each `stride` steps: no chance in it."""
        lengths = self.lengths[: self.num_episodes].tolist()
        pairs = [(e, s) for e, n in enumerate(lengths) for s in range(0, n - length + 1, stride)]
        episode, start = torch.tensor(pairs, dtype=torch.int64, device=self.device).reshape(-1, 2).unbind(1)
        return self._cut(episode, start, length, start, start + length)


# ======================================================================================================================
# 4. Networks: encoder E_phi, inner network F_theta, reward/termination model R_psi, actor-critic pi_omega, V_omega
# ======================================================================================================================


def group_norm_groups(channels: int) -> int:
    """Groups of 32 channels [D]."""
    return max(1, channels // 32)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def zero_(layer: nn.Module) -> nn.Module:
    """Set a layer to zero, so that the block that it closes starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class EncoderStage(nn.Module):
    """A small residual block: group norm, SiLU, convolution, skip."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = nn.GroupNorm(group_norm_groups(inputs), inputs)
        self.conv = conv3x3(inputs, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv(F.silu(self.norm(x)))


class Encoder(nn.Module):
    """E_phi: 64 x 64 RGB frame -> 16 x 8 x 8 latent in (-3, 3). 34,048 parameters at width 32 [P]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_in = conv3x3(3, width)
        widths = [width, width, width, width, LATENT_SHAPE[0]]
        self.stages = nn.ModuleList(EncoderStage(i, o) for i, o in zip(widths, widths[1:], strict=False))

    def forward(self, frames: Tensor) -> Tensor:
        """(..., 64, 64, 3) uint8 -> (..., 16, 8, 8) float32."""
        lead = frames.shape[:-3]
        # NHWC bytes read as NCHW: the strides are channels-last already, no copy.
        x = frames.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = self.conv_in(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < 3:
                x = F.max_pool2d(x, 2)
        return clamp_latent(x.float()).reshape(*lead, *LATENT_SHAPE)


def clamp_latent(z: Tensor) -> Tensor:
    """C(z) = 3 tanh(z / 3) [P]."""
    return LATENT_BOUND * torch.tanh(z / LATENT_BOUND)


class LatentNorm(nn.Module):
    """What every other network sees of a latent.

    `none` is the papers' algorithm: the latent itself. `center` subtracts a running mean, value by value, and scales
    what is left to standard deviation sigma_data: in most games nearly all of a latent is a background that never
    changes, and what must be predicted lies far below sigma_data without this. No gradient flows into the averages.
    """

    RATE = 0.01  # of both running averages; the first 100 updates are a plain average

    def __init__(self, mode: str, sigma_data: float):
        super().__init__()
        self.mode, self.sigma_data = mode, sigma_data
        self.register_buffer("mean", torch.zeros(LATENT_SHAPE))
        self.register_buffer("variance", torch.tensor(sigma_data**2))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def update(self, z: Tensor, mask: Tensor) -> None:
        """Move the averages towards a batch: z (B, T, 16, 8, 8), mask (B, T) of real frames."""
        if self.mode == "none":
            return
        self.updates += 1
        rate = torch.clamp(1 / self.updates, min=self.RATE)
        real = mask[..., None, None, None].float()
        self.mean += rate * ((z * real).sum((0, 1)) / real.sum() - self.mean)
        values = real.sum() * math.prod(LATENT_SHAPE)
        self.variance += rate * (((z - self.mean).square() * real).sum() / values - self.variance)

    def forward(self, z: Tensor) -> Tensor:
        """(..., 16, 8, 8) -> the same shape."""
        # DEVIATION 1: --latent-norm center; the papers use plain latents.
        return z if self.mode == "none" else (z - self.mean) * self._scale()

    def clamp(self, z: Tensor) -> Tensor:
        """C for a predicted latent. In the centred space: back to the encoder's own space, cut there to what the
        encoder can say, and forth again; applying tanh a second time would bend every correct prediction."""
        if self.mode == "none":
            return clamp_latent(z)
        bound = torch.full_like(self.mean, LATENT_BOUND)
        return torch.clamp(z, (-bound - self.mean) * self._scale(), (bound - self.mean) * self._scale())

    def _scale(self) -> Tensor:
        return self.sigma_data * torch.rsqrt(self.variance + 1e-8)


class AdaGroupNorm(nn.Module):
    """Group norm whose scale and shift are read off a conditioning vector [D]."""

    def __init__(self, channels: int, cond_dim: int):
        super().__init__()
        self.groups = group_norm_groups(channels)
        self.linear = nn.Linear(cond_dim, 2 * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(cond)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Self-attention over the 64 places of a latent, heads of 8 channels [D]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(group_norm_groups(channels), channels)
        self.heads = max(1, channels // 8)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # (B, 3C, H, W) -> 3 x (B, heads, H * W, C / heads)
        qkv = self.qkv(self.norm(x)).flatten(2).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        # DEVIATION 2: the residual is added to the input; DIAMOND's code adds it to the normalised input.
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


class ResBlock(nn.Module):
    """Two adaptive group norms and convolutions around a skip, then attention if asked [D]."""

    def __init__(self, inputs: int, outputs: int, cond_dim: int, attention: bool = False):
        super().__init__()
        self.norm1, self.conv1 = AdaGroupNorm(inputs, cond_dim), conv3x3(inputs, outputs)
        self.norm2, self.conv2 = AdaGroupNorm(outputs, cond_dim), zero_(conv3x3(outputs, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x, cond)))
        y = self.conv2(F.silu(self.norm2(y, cond)))
        return self.attention(self.skip(x) + y)


class Denoiser(nn.Module):
    """F_theta: a one-level U-Net at 8 x 8, conditioned on noise level, past latents and actions [P, D]."""

    def __init__(self, num_actions: int, width: int, cond_dim: int, context_frames: int, sigma_data: float):
        super().__init__()
        self.sigma_data = sigma_data
        channels = LATENT_SHAPE[0]
        self.register_buffer("fourier", torch.randn(cond_dim // 2))
        self.action_embedding = nn.Embedding(num_actions, cond_dim // context_frames)
        self.cond = nn.Sequential(nn.Linear(cond_dim, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.conv_in = conv3x3((context_frames + 1) * channels, width)
        self.down = ResBlock(width, width, cond_dim)
        self.middle = nn.ModuleList(ResBlock(width, width, cond_dim, attention=True) for _ in range(2))
        self.up = nn.ModuleList(ResBlock(2 * width, width, cond_dim) for _ in range(2))
        self.norm_out = nn.GroupNorm(group_norm_groups(width), width)
        self.conv_out = zero_(conv3x3(width, channels))

    def forward(self, x: Tensor, c_noise: Tensor, context: Tensor, actions: Tensor) -> Tensor:
        """x (B, 16, 8, 8) scaled by c_in, c_noise (B,), context (B, N, 16, 8, 8), actions (B, N) -> (B, 16, 8, 8)."""
        angle = 2 * math.pi * c_noise[:, None] * self.fourier
        noise_features = torch.cat([angle.cos(), angle.sin()], dim=1)
        cond = self.cond(noise_features + self.action_embedding(actions).flatten(1))
        x = torch.cat([(context / self.sigma_data).flatten(1, 2), x], dim=1)
        x0 = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x1 = x = self.down(x0, cond)
        for block in self.middle:
            x = block(x, cond)
        for block, skip in zip(self.up, (x1, x0), strict=True):
            x = block(torch.cat([x, skip], dim=1), cond)
        return self.conv_out(F.silu(self.norm_out(x))).float()


class RewardTerminationModel(nn.Module):
    """R_psi: pairs of latents and actions -> logits of the reward's sign and of termination [P, D]."""

    def __init__(self, num_actions: int, width: int, cond_dim: int, lstm_size: int):
        super().__init__()
        self.action_embedding = nn.Embedding(num_actions, cond_dim)
        self.conv_in = conv3x3(2 * LATENT_SHAPE[0], width)
        # Four stages of two blocks, then two with attention; all at 8 x 8, where DIAMOND's stages halve the picture.
        self.blocks = nn.ModuleList(ResBlock(width, width, cond_dim, attention=i >= 8) for i in range(10))
        self.lstm = nn.LSTM(width * LATENT_SHAPE[1] * LATENT_SHAPE[2], lstm_size, batch_first=True)
        init_lstm_(self.lstm)
        self.head = nn.Sequential(nn.Linear(lstm_size, lstm_size), nn.SiLU(), nn.Linear(lstm_size, 5, bias=False))

    def features(self, z: Tensor, actions: Tensor) -> Tensor:
        """z (B, T + 1, 16, 8, 8), actions (B, T) -> (B, T, width * 64): all that needs no recurrence, in one pass."""
        b, t = actions.shape
        pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1)
        cond = self.action_embedding(actions.flatten())
        x = self.conv_in(pairs.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x, cond)
        return x.reshape(b, t, -1)

    def forward(self, z: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, T + 1, 16, 8, 8), actions (B, T) -> reward logits (B, T, 3) for -1, 0, 1 and end logits (B, T, 2)."""
        return self.predict(self.lstm(self.features(z, actions))[0])

    def predict(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """LSTM output (B, T, lstm_size) -> both logits."""
        return self.head(hidden).float().split([3, 2], dim=-1)


class ActorCritic(nn.Module):
    """pi_omega and V_omega: a latent goes straight into an LSTM; linear heads that start at zero [P, D]."""

    def __init__(self, num_actions: int, lstm_size: int):
        super().__init__()
        self.lstm = nn.LSTM(math.prod(LATENT_SHAPE), lstm_size, batch_first=True)
        init_lstm_(self.lstm)
        self.policy = zero_(nn.Linear(lstm_size, num_actions))
        self.value = zero_(nn.Linear(lstm_size, 1))

    def forward(self, z: Tensor, state: tuple | None) -> tuple[Tensor, Tensor, tuple]:
        """z (B, T, 16, 8, 8), LSTM state -> action logits (B, T, A), values (B, T), new state."""
        hidden, state = self.lstm(z.flatten(2), state)
        return self.policy(hidden).float(), self.value(hidden).float().squeeze(-1), state


def init_lstm_(lstm: nn.LSTM) -> None:
    """Input weights xavier, recurrent weights orthogonal, biases 0 but the forget gate's, which sum to 1 [D]."""
    for name, parameter in lstm.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(parameter)
        elif "weight_hh" in name:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
            if "bias_ih" in name:
                nn.init.ones_(parameter.data[lstm.hidden_size : 2 * lstm.hidden_size])


def masked_lstm(lstm: nn.LSTM, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run an LSTM over a few steps x (B, T, n); a step of padding (mask (B, T) False) leaves the state at zero."""
    state = None
    for t in range(x.shape[1]):
        _, state = lstm(x[:, t : t + 1], state)
        state = tuple(s * mask[None, :, t, None] for s in state)
    return state


class Agent(nn.Module):
    """The four networks and the normalisation of latents between them."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.encoder = Encoder(args.encoder_width)
        self.norm = LatentNorm(args.latent_norm, args.sigma_data)
        self.denoiser = Denoiser(
            num_actions, args.denoiser_width, args.cond_dim, args.context_frames, args.sigma_data
        )
        self.reward = RewardTerminationModel(
            num_actions, args.reward_width, args.reward_cond_dim, args.lstm_size
        )
        self.policy = ActorCritic(num_actions, args.lstm_size)

    def encode(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames (B, T, 64, 64, 3) uint8 -> latents (B, T, 16, 8, 8) as the other networks see them; padding is 0."""
        z = self.norm(self.encoder(frames))
        return z if mask is None else z * mask[..., None, None, None]


def parameter_counts(agent: Agent) -> dict[str, int]:
    """Trainable parameters of each network."""
    names = {"encoder": agent.encoder, "denoiser": agent.denoiser, "reward": agent.reward, "policy": agent.policy}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in names.items()}
    return {**counts, "total": sum(counts.values())}

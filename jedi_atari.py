"""JEDI (Joint Embedding DIffusion) in one file: Atari from 100k steps, learned inside a latent diffusion world model.

    python jedi_atari.py --env-id Pong --preset tiny   # minutes on a laptop CPU: a small world model of the real game
    python jedi_atari.py --env-id Pong                 # the papers' numbers: hours on a GPU
    python jedi_atari.py --env-id Pong --dry-run       # print the plan and its cost, do nothing
    python jedi_atari.py --eval-only runs/Pong__...    # play 100 games with a finished run

Read downward: 1 arguments, 2 environment, 3 replay, 4 networks, 5 diffusion, 6 losses, 7 imagination,
8 evaluation, 9 pictures, 10 logs and checkpoints, 11 training. Nothing below reads a variable of the module that is
not a constant.

Sources: [P] the JEDI papers (arXiv 2505.19698 and 2605.13013), [D] DIAMOND (arXiv 2405.12399 and its released code),
[E] EDM (arXiv 2206.00364), [C] our choice where no source says. A choice that departs from [P] or [D] is marked
DEVIATION n and explained in docs/implementation_details.md.

Symbols: E_phi encoder, D_theta denoiser with inner network F_theta, R_psi reward/termination model, pi_omega and
V_omega actor-critic; z latent, a action, r reward, d termination; sigma noise level, C latent clamp.
Dimensions: B batch, T time (window), H horizon, C x H x W a latent (16 x 8 x 8), A actions.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
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

try:
    import fcntl  # locks a run folder
except ImportError:  # Windows has none
    fcntl = None

IMAGE_SIZE = 64  # pixels; frames are 64 x 64 RGB [P, D]
LATENT_SHAPE = (16, 8, 8)  # channels, height, width [P]
LATENT_BOUND = 3.0  # the clamp C(z) = 3 tanh(z / 3) keeps every latent value in (-3, 3) [P]
CPU_CHUNK = 16  # pictures that a CPU puts through convolutions at a time; 8 to 32 were about as fast
PARTS = ("diffusion", "reward", "policy")  # the three updates, in the order in which an epoch makes them [D]
REPORTED_HORIZONS = (1, 3, 5, 10, 15)  # imagined steps named in the table at the end of a run
DECODER_EVERY, DECODER_BATCH = 4, 8  # updates of the world model for one of the decoder, and its pictures: 3% at most
MAX_OPEN_LOOP = 15  # imagined steps over which the open-loop error is measured, whatever the training horizon


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one line that says what would be right."""


class RunFailed(RuntimeError):
    """A run cannot go on; the message is one line that says why and what is left of it."""


class Stopped(Exception):
    """A signal asked the program to stop; the message is one line that says what is left and how to carry on."""


# ======================================================================================================================
# 1. Arguments: every number, its meaning and its source
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Args:
    """JEDI: learn an Atari game from 100k steps inside a latent diffusion world model."""

    # fmt: off
    # --- run
    env_id: str = "Pong"  # game: Pong, ALE/Pong-v5, PongNoFrameskip-v4, or any registered RGB environment
    preset: str = "paper"  # set of defaults: paper; on 2 CPU cores tiny (minutes) or small (under an hour)
    seed: int = 0  # seeds the networks, the draws and the game; same seed, same run on a CPU
    threads: int = 0  # CPU threads of PyTorch; 0 leaves its default, all cores
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device has matrix units for it [C]
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)  # compile the networks; on with CUDA
    run_dir: str = ""  # folder of the run; empty: runs/<game>__<script>__<seed>__<time>
    resume: bool = False  # carry on the run in --run-dir from its checkpoint
    eval_only: str = ""  # folder of a run: play --final-episodes games with its checkpoint, train nothing
    dry_run: bool = False  # print the plan and its cost on this device, then stop; writes nothing
    checkpoint_every: int = 10  # epochs between checkpoints; the long first epoch has one after each phase [C]
    keep_replay: bool = True  # --no-keep-replay deletes the recorded play once result.json is written [C]
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
    lstm_size: int = 512  # of the reward/termination model's and the policy's LSTM [D]
    latent_norm: Literal["none", "center"] = "none"  # none [P]; center: less a running mean, scaled to sigma_data [C]
    # --- diffusion
    sigma_data: float = 0.5  # assumed standard deviation of latents; the real one: diffusion/latent_std [D, C]
    sigma_offset: float = 0.3  # scale of the noise shared by a whole channel [D]
    noise_mean: float = -0.4  # mean of ln(sigma) in training [E]
    noise_std: float = 1.2  # standard deviation of ln(sigma) in training [E]
    noise_min: float = 0.002  # training sigma is clipped to at least this [D]
    noise_max: float = 20.0  # ... and to at most this [D]
    context_frames: int = 4  # latents and actions the denoiser sees [D]
    target_frames: int = 2  # latents predicted one after the other in a training window [D]
    switch_prob: float = 0.5  # chance that the newest context latent is the denoiser's own output [P]
    sample_steps: int = 3  # Euler steps per imagined latent [P, D]
    sample_start: Literal["unit", "sigma_max"] = "unit"  # its first noise: unit variance [D], or its first level [E]
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
    reward_noise: float = 0.0  # noise of a random level up to this on the reward model's inputs in training [C]
    reward_window: int = 15  # transitions after the context in a reward/termination window [D]
    horizon: int = 15  # imagined steps per policy update [P, D]
    gamma: float = 0.985  # discount [D]
    td_lambda: float = 0.95  # lambda of the lambda-returns [D]
    entropy_weight: float = 0.001  # weight of the entropy bonus [D]
    # --- evaluation
    eval_every: int = 10  # epochs between evaluations [D]
    eval_episodes: int = 4  # full games per evaluation [D]
    final_episodes: int = 100  # full games at the end [D]
    eval_envs: int = 10  # games played at the same time [C]
    temperature: float = 1.0  # of the sampled policy in evaluation [D]
    heldout_steps: int = 2_000  # evaluation steps kept to measure the world model on unseen play [C]
    decoder: bool = True  # learn to turn latents into pictures, for dreams/; nothing of it reaches the agent [C]
    # fmt: on


PRESETS: dict[str, dict] = {
    "paper": {},
    "tiny": dict(
        checkpoint_every=1,
        max_episode_steps=1_200,
        total_steps=4_300,
        first_steps_min=4_000,
        first_steps_max=4_000,
        first_diffusion_updates=350,
        first_reward_updates=360,
        first_policy_updates=20,
        epoch_steps=150,
        diffusion_updates=40,
        reward_updates=40,
        policy_updates=10,
        final_epochs=0,
        batch_size=16,
        encoder_width=8,
        denoiser_width=48,
        cond_dim=128,
        reward_width=16,
        reward_cond_dim=64,
        lstm_size=128,
        latent_norm="center",
        reward_noise=0.2,
        learning_rate=1e-3,
        encoder_lr_scale=0.03,
        warmup_updates=20,
        reward_window=4,
        horizon=8,
        eval_envs=8,
        eval_episodes=2,
        final_episodes=8,
        heldout_steps=1_600,
    ),
}
PRESETS["small"] = PRESETS["tiny"] | dict(
    max_episode_steps=4_500,
    total_steps=10_800,
    first_steps_min=10_000,
    first_steps_max=10_000,
    first_diffusion_updates=1_000,
    first_reward_updates=600,
    first_policy_updates=40,
    epoch_steps=200,
    diffusion_updates=60,
    reward_updates=60,
    policy_updates=30,
    encoder_width=16,
    learning_rate=5e-4,
    encoder_lr_scale=0.06,
    entropy_weight=0.03,
    horizon=10,
    eval_every=2,
    eval_episodes=8,
    eval_envs=10,
    final_episodes=100,
)


# What a run can use of each number: smallest, largest, and the names. The largest are far above any use; they turn a
# slip of the keyboard into a message instead of a machine out of memory.
TINIEST = 1e-12  # of what must be above 0
RANGES: tuple[tuple[float, float, str], ...] = (
    (1, 1_000_000_000, "checkpoint_every max_episode_steps total_steps first_steps_max epoch_steps eval_every"),
    (2, 1_000_000_000, "first_steps_min"),  # or there is no transition to learn from
    (0, 1_000_000_000, "first_rewards first_diffusion_updates first_reward_updates first_policy_updates"),
    (0, 1_000_000_000, "diffusion_updates reward_updates policy_updates final_epochs warmup_updates"),
    (0, 2**31 - 1, "seed"),
    (0, 1_024, "threads"),
    (1, 1_000, "frame_skip context_frames target_frames sample_steps reward_window horizon eval_envs"),
    (0, 1_000, "noop_max"),
    (1, 100_000, "eval_episodes final_episodes heldout_steps"),
    (1, 4_096, "batch_size encoder_width denoiser_width cond_dim reward_width reward_cond_dim lstm_size"),
    (TINIEST, 1_000, "sigma_data noise_std noise_min noise_max sample_sigma_max sample_sigma_min sample_rho"),
    (TINIEST, 1_000, "encoder_lr_scale temperature"),
    (TINIEST, 1, "learning_rate adam_eps"),
    (TINIEST, 1e9, "clip_diffusion clip_other"),
    (0, 1_000, "sigma_offset s_churn reward_noise entropy_weight"),
    (-1_000, 1_000, "noise_mean"),
    (0, 1, "epsilon switch_prob gamma td_lambda weight_decay"),
)


def check_args(args: Args) -> None:
    """Raise `BadInput` for a value that no run can use. Writes nothing."""
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            if not low <= value <= high:  # false for nan, too
                least = "above 0" if low == TINIEST else f"at least {low}"
                raise BadInput(f"{flag(name)} is {value}; it must be {least} and at most {high:,}")
    for name in ("encoder_width", "denoiser_width", "reward_width"):
        width = getattr(args, name)
        if width % group_norm_groups(width):
            raise BadInput(f"{flag(name)} is {width}; it must be a multiple of {group_norm_groups(width)}")
    for name in ("denoiser_width", "reward_width"):
        width = getattr(args, name)
        if width % attention_heads(width):
            raise BadInput(f"{flag(name)} is {width}; it must be a multiple of its {attention_heads(width)} heads of 8")
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
    if args.resume and not args.run_dir:
        raise BadInput("--resume needs --run-dir, the folder of the run to carry on")
    modes = [flag(name) for name in ("resume", "eval_only", "dry_run") if getattr(args, name)]
    if len(modes) > 1:
        raise BadInput(f"{' and '.join(modes)} do not go together; choose one")


def flag(name: str) -> str:
    """The command-line flag of a field of `Args`: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


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
    `module:Name-v0`) stands for itself. Raises `BadInput` that names the closest known games, or what ails the module.
    """
    gym.register_envs(ale_py)
    games = {i[4:-3]: i for i in gym.registry if i.startswith("ALE/") and i.endswith("-v5")}
    name = re.sub(r"(NoFrameskip-v\d|-v\d)$", "", env_id.removeprefix("ALE/"))
    if name in games:
        return games[name], name
    module, _, registered = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)  # it registers the environment
        except Exception as error:  # whatever goes wrong in somebody's module
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"--env-id {env_id}: module {module!r} cannot be imported ({reason})") from None
    try:
        return gym.spec(registered).id, re.sub(r"\W+", "_", env_id)
    except (gym.error.Error, ValueError):
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

    def state(self) -> dict[str, int]:
        """What the next step depends on beside the emulator and its generator."""
        return {"lives": int(self.lives), "steps": self.steps}

    def set_state(self, state: dict[str, int]) -> None:
        """The opposite of `state`."""
        self.lives, self.steps = state["lives"], state["steps"]

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


def final_environments(args: Args) -> dict[str, Args]:
    """The environments of the final evaluation, by name, as the arguments that make them; the first is trained in."""
    return {"plain": args}


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
    MAX_PENDING = 1_000  # 12 MB
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
        self.file = open(path, "ab") if path else None  # open for the life of the buffer

    def add(self, frame: np.ndarray, action: int, reward: float, end: bool, last: np.ndarray | None = None) -> None:
        """One step. `end`: it terminated. `last`: the frame after it, given when the episode stops here (for any
        reason), since no later step will bring it."""
        # DEVIATION 4: the last frame is a target of the denoiser too; DIAMOND keeps it for the reward model only.
        self._record(frame, action, reward, False, end)
        if last is not None:
            self._record(last, 0, 0.0, True, False)

    def _record(self, frame: np.ndarray, action: int, reward: float, final: bool, end: bool) -> None:
        assert frame.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and frame.dtype == np.uint8
        record = np.zeros((), self.RECORD)
        record["action"], record["reward"], record["final"], record["end"] = action, reward, final, end
        record["frame"] = frame
        record["crc"] = zlib.crc32(record.tobytes()[4:])
        self.pending.append(record)
        if len(self.pending) == self.MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Upload what add() gathered and append it to the file; one transfer for all of it."""
        if self.pending:
            records = np.stack(self.pending)
            if self.file:
                self.file.write(records.tobytes())
                self.file.flush()
            self._upload(records)
            self.pending.clear()

    def sync(self) -> int:
        """Bring the file to disk, before a checkpoint counts on it; returns how many records it holds."""
        self.flush()
        if self.file:
            os.fsync(self.file.fileno())
        return self.size

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
            records = np.fromfile(self.path, self.RECORD, min(1024, size - begin), offset=begin * self.RECORD.itemsize)
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
        # DEVIATION 5: DIAMOND runs its LSTM over the padding, whose zeros change the state.
        episode = self._draw_episodes(batch_size)
        count = (self.lengths[episode] - 1).clamp(min=1)
        anchor = (torch.rand(batch_size, device=self.device) * count).long().minimum(count - 1)
        start = anchor - torch.randint(length, (batch_size,), device=self.device)
        stop, start = (start + length).minimum(count), start.clamp(min=0)
        # One record more than transitions: the last transition needs the frame that it leads to.
        windows = self._cut(episode, start, length + 1, start, self.lengths[episode].minimum(stop + 1))
        return windows._replace(mask=windows.mask[:, 1:])

    def tiled_transitions(self, length: int) -> Windows:
        """Windows of `length` transitions (`length` + 1 frames) that together hold every transition once: no chance in
        it. `mask` marks those; the last window of an episode overlaps the one before it rather than run past its end.
        """
        lengths = self.lengths[: self.num_episodes].tolist()
        rows = [(e, max(0, min(t, n - 1 - length)), t) for e, n in enumerate(lengths) for t in range(0, n - 1, length)]
        episode, start, new = torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(-1, 3).unbind(1)
        stop = self.lengths[episode]
        windows = self._cut(episode, start, length + 1, start, stop)
        time_ = start[:, None] + torch.arange(length, device=self.device)
        return windows._replace(mask=(time_ >= new[:, None]) & (time_ < stop[:, None] - 1))

    def all_windows(self, length: int, stride: int, count: int | None = None, rewarded: bool = False) -> Windows:
        """Windows of `length` records that lie wholly in an episode, one each `stride` steps: no chance in it.

        `rewarded`: only those whose last transition has a reward. `count`: at most so many, evenly spread.
        """
        lengths = self.lengths[: self.num_episodes].tolist()
        pairs = [(e, s) for e, n in enumerate(lengths) for s in range(0, n - length + 1, stride)]
        episode, start = torch.tensor(pairs, dtype=torch.int64, device=self.device).reshape(-1, 2).unbind(1)
        if rewarded:
            keep = self.rewards[self.starts[episode] + start + length - 2] != 0
            episode, start = episode[keep], start[keep]
        if count is not None and len(start) > count:
            index = torch.linspace(0, len(start) - 1, count, device=self.device).long()
            episode, start = episode[index], start[index]
        return self._cut(episode, start, length, start, start + length)


# ======================================================================================================================
# 4. Networks: encoder E_phi, inner network F_theta, reward/termination model R_psi, actor-critic pi_omega, V_omega
# ======================================================================================================================


def group_norm_groups(channels: int) -> int:
    """Groups of 32 channels [D]."""
    return max(1, channels // 32)


def attention_heads(channels: int) -> int:
    """Heads of 8 channels [D]."""
    return max(1, channels // 8)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def zero_(layer: nn.Module) -> nn.Module:
    """Set a layer to zero, so that the block that it closes starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def in_chunks(network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """network(*inputs); on a CPU for CPU_CHUNK rows at a time.

    A chunk's activations stay in the processor's caches, and memory of their size is used again, where the system
    hands out every larger tensor anew, cleared. Halves the encoder's time on 2 cores.
    """
    if inputs[0].device.type != "cpu":
        return network(*inputs)
    return torch.cat([network(*part) for part in zip(*(x.split(CPU_CHUNK) for x in inputs), strict=True)])


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
        z = in_chunks(self.layers, frames.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
        return z.reshape(*frames.shape[:-3], *LATENT_SHAPE)

    def layers(self, frames: Tensor) -> Tensor:
        """(N, 64, 64, 3) uint8 -> (N, 16, 8, 8) float32."""
        # NHWC bytes read as NCHW: the strides are channels-last already, no copy.
        x = self.conv_in(frames.permute(0, 3, 1, 2).float() / 127.5 - 1)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < 3:
                x = F.max_pool2d(x, 2)
        return clamp_latent(x.float())


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
        # Around the new mean.
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
        self.heads = attention_heads(channels)
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
        self.head = nn.Sequential(nn.Linear(lstm_size, lstm_size), nn.SiLU(), nn.Linear(lstm_size, 5))
        # DEVIATION 7: a bias that says "rewards and ends are rare"; DIAMOND's head has none. Without it the LSTM learns
        # to say so first, by saturating, and then learns nothing else for long.
        self.head[-1].bias.data.copy_(torch.tensor([-4.0, 0.0, -4.0, 0.0, -4.0]))

    def features(self, z: Tensor, actions: Tensor) -> Tensor:
        """z (B, T + 1, 16, 8, 8), actions (B, T) -> (B, T, width * 64): all that needs no recurrence, in one pass."""
        b, t = actions.shape
        pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1)
        cond = self.action_embedding(actions.flatten())
        x = self.conv_in(pairs.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x, cond)
        # DEVIATION 10: what ten blocks add up to grows in training; unnormalised it drives the LSTM into saturation.
        return F.group_norm(x, group_norm_groups(x.shape[1])).reshape(b, t, -1)

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


class Decoder(nn.Module):
    """Latent -> 64 x 64 RGB picture: for people only, in no paper. It learns what differs from the mean picture."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.register_buffer("background", torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE))
        self.register_buffer("updates", torch.zeros(()))
        self.conv_in = conv3x3(LATENT_SHAPE[0], 4 * width)
        self.stages = nn.ModuleList(conv3x3(i * width, o * width) for i, o in ((4, 2), (2, 1)))
        self.conv_out = zero_(conv3x3(width, 3 * 2 * 2))

    def forward(self, z: Tensor) -> Tensor:
        """(N, 16, 8, 8) -> (N, 3, 64, 64), in [-1, 1] but for errors."""
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(F.interpolate(F.silu(x), scale_factor=2))
        return self.background + F.pixel_shuffle(self.conv_out(F.silu(x)), 2)

    @torch.no_grad()
    def pictures(self, z: Tensor) -> np.ndarray:
        """(..., 16, 8, 8) -> (..., 64, 64, 3) uint8, on the host."""
        x = torch.cat([self(part) for part in z.reshape(-1, *LATENT_SHAPE).split(64)])
        x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return x.permute(0, 2, 3, 1).reshape(*z.shape[:-3], IMAGE_SIZE, IMAGE_SIZE, 3).cpu().numpy()


class Agent(nn.Module):
    """The four networks and the normalisation of latents between them."""

    def __init__(self, num_actions: int, args: Args):
        super().__init__()
        self.encoder = Encoder(args.encoder_width)
        self.norm = LatentNorm(args.latent_norm, args.sigma_data)
        self.denoiser = Denoiser(num_actions, args.denoiser_width, args.cond_dim, args.context_frames, args.sigma_data)
        self.reward = RewardTerminationModel(num_actions, args.reward_width, args.reward_cond_dim, args.lstm_size)
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


# ======================================================================================================================
# 5. Diffusion: preconditioning, noise and sampling in latent space, all in float32
# ======================================================================================================================


class Preconditioning(NamedTuple):
    """Coefficients of D_theta(z) = c_skip z + c_out F_theta(c_in z, c_noise), each (B, 1, 1, 1) but c_noise (B,)."""

    c_in: Tensor
    c_out: Tensor
    c_skip: Tensor
    c_noise: Tensor


def precondition(sigma: Tensor, sigma_data: float, sigma_offset: float) -> Preconditioning:
    """The coefficients for noise levels sigma (B,): EDM table 1, with DIAMOND's offset noise counted in [E, D].

    They make the network's input and its target both have unit variance, for data of standard deviation sigma_data.
    """
    sigma = torch.sqrt(sigma**2 + sigma_offset**2)
    c_in = 1 / torch.sqrt(sigma**2 + sigma_data**2)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * torch.sqrt(c_skip)
    wide = (c[:, None, None, None] for c in (c_in, c_out, c_skip))
    return Preconditioning(*wide, c_noise=torch.log(sigma) / 4)


def sample_sigma(batch_size: int, args: Args, device: torch.device) -> Tensor:
    """(B,) training noise levels: log-normal, clipped [E, D]."""
    normal = torch.randn(batch_size, device=device)
    return torch.exp(normal * args.noise_std + args.noise_mean).clamp(args.noise_min, args.noise_max)


def noise_like(x: Tensor) -> Tensor:
    """Standard normal noise of x's shape. Contiguous: random numbers are filled in in the order of memory, so that
    otherwise the same seed would give other noise where x was made in another way."""
    return torch.randn_like(x, memory_format=torch.contiguous_format)


def add_noise(z: Tensor, sigma: Tensor, sigma_offset: float) -> Tensor:
    """z (B, C, H, W) plus noise of level sigma (B,) plus one shared value per channel, scaled by sigma_offset [D]."""
    offset = sigma_offset * torch.randn(*z.shape[:2], 1, 1, device=z.device)
    return z + sigma[:, None, None, None] * noise_like(z) + offset


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """`steps` falling noise levels from sigma_max to sigma_min, then 0: EDM equation 5. One step: sigma_max alone."""
    if steps == 1:
        return [sigma_max, 0.0]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def denoise(agent: Agent, z: Tensor, sigma: Tensor, context: Tensor, actions: Tensor, args: Args) -> Tensor:
    """D_theta, clamped: z (B, 16, 8, 8) at noise levels sigma (B,) -> the clean latent expected there."""
    assert actions.shape == context.shape[:2] and context.shape[2:] == LATENT_SHAPE
    c = precondition(sigma, args.sigma_data, args.sigma_offset)
    output = agent.denoiser(c.c_in * z, c.c_noise, context, actions)
    return agent.norm.clamp(c.c_skip * z + c.c_out * output)


@torch.no_grad()
def sample_next_latent(agent: Agent, context: Tensor, actions: Tensor, args: Args) -> Tensor:
    """One imagined latent: context (B, N, 16, 8, 8) and actions (B, N) -> (B, 16, 8, 8).

    Euler steps of EDM's algorithm 2. Runs without gradients. From unit noise, as in DIAMOND's code, samples vary less
    than the truth; where chance matters: `sample_start` "sigma_max", `sample_sigma_max` 20, 6 steps, `noise_mean` 1.2.
    """
    sigmas = karras_sigmas(args.sample_steps, args.sample_sigma_min, args.sample_sigma_max, args.sample_rho)
    gamma = min(args.s_churn / args.sample_steps, math.sqrt(2) - 1)
    z = noise_like(context[:, -1]) * (args.sample_sigma_max if args.sample_start == "sigma_max" else 1.0)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            z = z + math.sqrt(sigma_hat**2 - sigma**2) * noise_like(z)
        # DEVIATION 9: the denoiser is told sigma_hat, the level that z is at now [E]; DIAMOND's code tells it sigma.
        levels = torch.full((len(z),), sigma_hat, device=z.device)
        denoised = denoise(agent, z, levels, context, actions, args)
        z = z + (sigma_next - sigma_hat) * (z - denoised) / sigma_hat
    return z


# ======================================================================================================================
# 6. World model losses
# ======================================================================================================================


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; 0 where nothing is. No synchronisation with the host."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def diffusion_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Denoising loss that trains D_theta and, through the context, E_phi [P].

    batch: windows of context_frames + target_frames frames. Returns the loss and metrics (detached scalars).
    """
    n = args.context_frames
    assert batch.frames.shape[1] == n + args.target_frames
    latents = agent.encoder(batch.frames)
    agent.norm.update(latents.detach(), batch.mask)
    z = agent.norm(latents) * batch.mask[..., None, None, None]
    context, losses = list(z[:, :n].unbind(1)), []
    for i in range(args.target_frames):
        # The one stop-gradient of JEDI: without it the encoder could make targets easy by making them all alike.
        target = z[:, n + i].detach()
        sigma = sample_sigma(len(z), args, z.device)
        noisy = add_noise(target, sigma, args.sigma_offset)
        c = precondition(sigma, args.sigma_data, args.sigma_offset)
        past = torch.stack(context[-n:], dim=1)  # carries the encoder's gradient
        output = agent.denoiser(c.c_in * noisy, c.c_noise, past, batch.actions[:, i : i + n])
        error = (output - (target - c.c_skip * noisy) / c.c_out).square().mean((1, 2, 3))
        losses.append(error)
        # Random switching: half of the batches go on from the denoiser's own output, as imagination will.
        # Detached, so that no gradient runs through two denoising passes. A tensor decides, not the host.
        denoised = agent.norm.clamp(c.c_skip * noisy + c.c_out * output).detach()
        switch = torch.rand((), device=z.device) < args.switch_prob
        real = batch.mask[:, n + i, None, None, None]
        context.append(torch.where(switch, denoised, z[:, n + i]) * real)
    loss = masked_mean(torch.stack(losses, dim=1), batch.mask[:, n:])
    return loss, {"loss": loss.detach(), "latent_std": z.detach().std()}


def reward_termination_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the reward's sign and of termination; trains R_psi and E_phi [P, D].

    batch: windows from `sample_transitions`: T + 1 frames, mask (B, T) of real transitions.
    """
    assert batch.mask.shape[1] == batch.frames.shape[1] - 1
    z = agent.encode(batch.frames)
    if args.reward_noise > 0:
        # DEVIATION 8: a model that has only seen true latents does not know the rewards of imagined ones.
        level = args.reward_noise * torch.rand(len(z), 1, 1, 1, 1, device=z.device)
        z = z + level * noise_like(z)
    reward_logits, end_logits = agent.reward(z, batch.actions[:, :-1])
    sign = batch.rewards[:, :-1].sign().long()
    reward_error = F.cross_entropy(reward_logits.flatten(0, 1), sign.flatten() + 1, reduction="none")
    end_error = F.cross_entropy(end_logits.flatten(0, 1), batch.ends[:, :-1].flatten().long(), reduction="none")
    mask = batch.mask.flatten()
    reward_loss, end_loss = masked_mean(reward_error, mask), masked_mean(end_error, mask)
    hit = reward_logits.argmax(-1) - 1 == sign
    metrics = {
        "loss": (reward_loss + end_loss).detach(),
        "reward_loss": reward_loss.detach(),
        "end_loss": end_loss.detach(),
        "recall": masked_mean(hit.float(), batch.mask & (sign != 0)),  # 0 for a batch without rewards
    }
    return reward_loss + end_loss, metrics


def decoder_loss(decoder: Decoder, agent: Agent, batch: Windows) -> Tensor:
    """Squared error of the picture made from a latent, of the first real frame of each window. What differs from the
    mean picture weighs more: a ball of four pixels would not be seen otherwise. Trains the decoder alone."""
    first = batch.mask[:DECODER_BATCH].int().argmax(1)
    frames = batch.frames[torch.arange(len(first), device=first.device), first]
    with torch.no_grad():
        z = agent.encode(frames)
        target = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        decoder.updates += 1
        decoder.background += (target.mean(0) - decoder.background) * torch.clamp(1 / decoder.updates, min=0.01)
        weight = 0.1 + (target - decoder.background).abs()
    return (weight * (decoder(z) - target).square()).mean()


# ======================================================================================================================
# 7. Imagination and the actor-critic
# ======================================================================================================================


class Imagined(NamedTuple):
    """Trajectories of H steps from B starts, with static shapes: after an end, `alive` is False and nothing counts."""

    z: Tensor  # (B, H + 1, 16, 8, 8)
    actions: Tensor  # (B, H)
    rewards: Tensor  # (B, H) in {-1, 0, 1}
    ends: Tensor  # (B, H) bool
    alive: Tensor  # (B, H) bool: the step was begun before any end
    policy_state: tuple  # LSTM state before z[:, 0]


def open_loop(agent: Agent, context: Tensor, past: Tensor, actions: Tensor, args: Args) -> Tensor:
    """Imagine with given actions: context (B, N, 16, 8, 8), past (B, N - 1) actions between its frames, actions
    (B, K) from its last frame on -> (B, K, 16, 8, 8)."""
    latents, taken, n = list(context.unbind(1)), torch.cat([past, actions], dim=1), context.shape[1]
    for k in range(actions.shape[1]):
        latents.append(sample_next_latent(agent, torch.stack(latents[-n:], 1), taken[:, k : k + n], args))
    return torch.stack(latents[n:], dim=1)


@torch.no_grad()
def imagine(agent: Agent, start: Windows, args: Args) -> Imagined:
    """Let the policy act for `args.horizon` steps in the world model, from windows of context_frames real frames.

    Runs without gradients. Rewards and ends feed nothing back into the latents, so R_psi runs once, at the end, over
    the whole sequence. DEVIATION 3: a trajectory that ends is masked from there on; DIAMOND starts it afresh.
    """
    n = args.context_frames
    assert start.frames.shape[1] == n
    context = agent.encode(start.frames, start.mask)
    latents, actions = list(context.unbind(1)), list(start.actions[:, : n - 1].unbind(1))
    burn_in = start.mask[:, : n - 1]
    policy_state = state = masked_lstm(agent.policy.lstm, context[:, : n - 1].flatten(2), burn_in)
    for _ in range(args.horizon):
        logits, _, state = agent.policy(latents[-1][:, None], state)
        actions.append(sample_categorical(logits[:, 0]))
        latents.append(sample_next_latent(agent, torch.stack(latents[-n:], 1), torch.stack(actions[-n:], 1), args))
    z, taken = torch.stack(latents, dim=1), torch.stack(actions, dim=1)
    features = agent.reward.features(z, taken)
    reward_state = masked_lstm(agent.reward.lstm, features[:, : n - 1], burn_in)
    hidden, _ = agent.reward.lstm(features[:, n - 1 :], reward_state)
    reward_logits, end_logits = agent.reward.predict(hidden)
    rewards = (sample_categorical(reward_logits) - 1).float()
    ends = sample_categorical(end_logits).bool()
    ended_before = F.pad(ends, (1, 0))[:, :-1].long().cumsum(1) > 0
    return Imagined(z[:, n - 1 :], taken[:, n - 1 :], rewards, ends, ~ended_before, policy_state)


def sample_categorical(logits: Tensor) -> Tensor:
    """(..., K) logits -> (...) samples, by the Gumbel-max trick: no synchronisation, unlike torch.multinomial."""
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()  # as in noise_like
    return (logits - noise.log()).argmax(-1)


def lambda_returns(rewards: Tensor, ends: Tensor, values: Tensor, gamma: float, lambda_: float) -> Tensor:
    """lambda-returns of trajectories: rewards, ends (B, H), values (B, H + 1) -> (B, H).

    G_t = r_t + gamma (1 - d_t) ((1 - lambda) V_{t+1} + lambda G_{t+1}), with G_H = V_H. lambda 0 is one-step
    bootstrapping, lambda 1 the whole sampled return [D, equation 14].
    """
    assert rewards.shape == ends.shape and values.shape[1] == rewards.shape[1] + 1
    returns, last = [], values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        going_on = gamma * (~ends[:, t]).float()
        last = rewards[:, t] + going_on * ((1 - lambda_) * values[:, t + 1] + lambda_ * last)
        returns.append(last)
    return torch.stack(returns[::-1], dim=1)


def actor_critic_loss(agent: Agent, batch: Windows, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with the value as baseline, squared value error and an entropy bonus, on imagined play [D].

    The rollout has no gradients; the policy is computed again over the stored latents in one LSTM call. The latents
    are detached by that: nothing of this loss reaches the encoder.
    """
    dream = imagine(agent, batch, args)
    logits, values, _ = agent.policy(dream.z, dream.policy_state)
    # The returns are targets and the advantage is a weight: neither passes a gradient on to the value.
    returns = lambda_returns(dream.rewards, dream.ends, values.detach(), args.gamma, args.td_lambda)
    log_probs = F.log_softmax(logits[:, :-1], dim=-1)
    taken = log_probs.gather(-1, dream.actions[..., None]).squeeze(-1)
    entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), dream.alive)
    policy_loss = masked_mean(-taken * (returns - values[:, :-1].detach()), dream.alive)
    value_loss = masked_mean((values[:, :-1] - returns).square(), dream.alive)
    loss = policy_loss + value_loss - args.entropy_weight * entropy
    metrics = {
        "loss": loss.detach(),
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "entropy": entropy.detach(),
        "value": masked_mean(values[:, :-1].detach(), dream.alive),
        "imagined_reward": masked_mean(dream.rewards, dream.alive),
        "imagined_end": masked_mean(dream.ends.float(), dream.alive),
    }
    return loss, metrics


# ======================================================================================================================
# 8. Playing: collection, evaluation, and measures of the world model on unseen play
# ======================================================================================================================


@torch.no_grad()
def act(
    agent: Agent, frames: list[np.ndarray], state: tuple | None, temperature: float, device: torch.device
) -> tuple[list[int], tuple]:
    """Sample an action for each of several games, and the LSTM's new state. SYNC: the host needs the actions."""
    z = agent.encode(torch.from_numpy(np.stack(frames)[:, None]).to(device))
    logits, _, state = agent.policy(z, state)
    return sample_categorical(logits[:, 0] / temperature).tolist(), state


def replay_end(terminated: bool, truncated: bool, info: dict) -> tuple[bool, bool]:
    """Whether a step is a termination, and whether an episode stops there, as the replay sees it: a lost life is both;
    a time limit stops an episode but is no termination: bootstrap there [D]."""
    end = terminated or info["life_loss"]
    return end, end or truncated


class Collector:
    """The training environment and what its play carries from one epoch to the next."""

    def __init__(self, args: Args):
        self.env, self.args = make_env(args), args
        self.frame, _ = self.env.reset(seed=args.seed)
        self.state: tuple | None = None  # of the policy's LSTM
        self.episode_return = 0.0
        self.reward_counts = [0, 0, 0]  # steps with a negative, no and a positive reward
        self.steps = 0

    def step(self, agent: Agent, replay: ReplayBuffer, device: torch.device) -> float | None:
        """Play one step with a little exploration; returns the return of a game that ended with it."""
        actions, self.state = act(agent, [self.frame], self.state, 1.0, device)
        action = actions[0]
        if torch.rand(()).item() < self.args.epsilon:
            action = int(torch.randint(int(self.env.action_space.n), ()).item())
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        self.episode_return += reward
        self.reward_counts[int(np.sign(reward)) + 1] += 1
        end, stop = replay_end(terminated, truncated, info)
        replay.add(self.frame, action, reward, end, frame if stop else None)
        self.frame, self.state = frame, None if stop else self.state
        if not (terminated or truncated):
            return None
        finished, self.episode_return = self.episode_return, 0.0
        self.frame, _ = self.env.reset()
        return finished

    def first_play_is_enough(self) -> bool:
        """Whether the first epoch's play may end: enough steps had another reward than the commonest, within limits;
        looked at every `epoch_steps` steps [D]."""
        args, over = self.args, self.steps - self.args.first_steps_min
        rewarded = sum(self.reward_counts) - max(self.reward_counts)
        enough = over >= 0 and over % args.epoch_steps == 0 and rewarded >= args.first_rewards
        return enough or self.steps >= args.first_steps_max


class Evaluation(NamedTuple):
    """Played games: raw returns and lengths, and some of their play for `measure_world_model`."""

    returns: list[float]
    lengths: list[int]
    heldout: ReplayBuffer


def evaluate(agent: Agent, args: Args, device: torch.device, episodes: int, seed: int, progress=None) -> Evaluation:
    """Play full games: rewards not clipped, lives ignored, actions sampled, no exploration [D].

    Each environment plays a fixed number of games (waiting for whichever ends first would favour short games). The
    play of the first two is kept up to `heldout_steps` together, cut at lost lives as in training: nothing was
    trained on it. Of two games a long stretch, not the beginnings of many: those are alike, and often without rewards.
    """
    count = min(args.eval_envs, episodes)
    envs = [make_env(args) for _ in range(count)]
    todo = [episodes // count + (i < episodes % count) for i in range(count)]
    frames = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]
    kept: list[list[tuple]] = [[] for _ in envs]
    recorded, state, returns, lengths = min(count, 2), None, [], []
    keep = -(-args.heldout_steps // recorded)
    totals, ages = [0.0] * count, [0] * count
    while any(todo):
        actions, state = act(agent, frames, state, args.temperature, device)
        for i, env in enumerate(envs):
            if not todo[i]:
                continue
            frame, reward, terminated, truncated, info = env.step(actions[i])
            totals[i], ages[i] = totals[i] + reward, ages[i] + 1
            if i < recorded and len(kept[i]) < keep:
                end, stop = replay_end(terminated, truncated, info)
                stop = stop or len(kept[i]) == keep - 1
                kept[i].append((frames[i], actions[i], reward, end, frame if stop else None))
            if terminated or truncated:
                returns.append(totals[i])
                lengths.append(ages[i])
                totals[i], ages[i], todo[i] = 0.0, 0, todo[i] - 1
                for s in state:
                    s[:, i] = 0
                frame = env.reset()[0] if todo[i] else frame
                if progress:
                    progress.advance()
            frames[i] = frame
    for env in envs:
        env.close()
    steps = [step for play in kept for step in play]
    heldout = ReplayBuffer(2 * len(steps) + 1, device)
    for step in steps:
        heldout.add(*step)
    heldout.flush()
    return Evaluation(returns, lengths, heldout)


@torch.no_grad()
def measure_world_model(agent: Agent, heldout: ReplayBuffer, args: Args) -> dict[str, float | list[float] | None]:
    """How good the world model is on play that it was not trained on. A measure without data is None.

    latent_*: health of the latent space. open_loop_ratio[k - 1]: error of latents imagined k steps ahead with the
    recorded actions, over the error of predicting that nothing changes; below 1 is skill. reward_recall: share of
    rewarded steps whose reward's sign is recognised; reward_false_alarms: share of the others that look rewarded;
    rewarded_steps: how many there were. end_recall, end_precision: of terminations. reward_prob_<k>: probability that
    R_psi gives to the true reward when it sees latents imagined k steps ahead (0: true ones).
    """
    return {
        **latent_health(agent, heldout),
        **open_loop_error(agent, heldout, args),
        **reward_skill(agent, heldout, args),
        **reward_in_imagination(agent, heldout, args),
    }


def latent_health(agent: Agent, heldout: ReplayBuffer, count: int = 512) -> dict[str, float]:
    """Standard deviation, effective rank (exp of the entropy of the normalised squared singular values of centred
    latents) and share of values near the clamp, of `count` frames spread over the held-out play."""
    index = torch.linspace(0, heldout.size - 1, min(count, heldout.size)).long().to(heldout.device)
    raw = torch.cat([agent.encoder(part) for part in heldout.frames[index].split(64)])
    z = agent.norm(raw).flatten(1)
    energy = torch.linalg.svdvals((z - z.mean(0)).double()).square()
    share = energy / energy.sum().clamp(min=1e-30)
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    return {
        "latent_std": raw.std().item(),
        "latent_change_std": (z - z.mean(0)).std().item(),
        "latent_effective_rank": entropy.exp().item(),
        "latent_saturation": (raw.abs() > 0.9 * LATENT_BOUND).float().mean().item(),
    }


def open_loop_error(agent: Agent, heldout: ReplayBuffer, args: Args, count: int = 64) -> dict:
    """Open-loop error after 1 to 15 imagined steps, or as many as games last, over that of the copy baseline, on
    `count` windows."""
    n = args.context_frames
    steps = min(MAX_OPEN_LOOP, int(heldout.lengths.max()) - n)
    if steps < 1:
        return {"open_loop_ratio": None}
    windows = heldout.all_windows(n + steps, stride=1, count=count)
    z = agent.encode(windows.frames)
    imagined = open_loop(agent, z[:, :n], windows.actions[:, : n - 1], windows.actions[:, n - 1 : -1], args)
    error = (imagined - z[:, n:]).square().mean((0, 2, 3, 4))
    copy = (z[:, n - 1 : n] - z[:, n:]).square().mean((0, 2, 3, 4))
    return {"open_loop_ratio": (error / copy.clamp(min=1e-12)).tolist()}


def reward_skill(agent: Agent, heldout: ReplayBuffer, args: Args) -> dict[str, float | None]:
    """Recall of rewards and false alarms, recall and precision of terminations, on true latents."""
    length = min(args.context_frames + args.reward_window, max(int(heldout.lengths.max()) - 1, 1))
    windows = heldout.tiled_transitions(length)
    signs, guesses, ends, end_guesses = [], [], [], []
    for part in zip(*(field.split(32) for field in windows), strict=True):
        part = Windows(*part)
        reward_logits, end_logits = agent.reward(agent.encode(part.frames), part.actions[:, :-1])
        signs.append(part.rewards[:, :-1].sign()[part.mask])
        guesses.append((reward_logits.argmax(-1) - 1)[part.mask])
        ends.append(part.ends[:, :-1][part.mask])
        end_guesses.append((end_logits.argmax(-1) == 1)[part.mask])
    sign, guess, end, end_guess = (torch.cat(x) for x in (signs, guesses, ends, end_guesses))

    def share(hits: Tensor, of: Tensor) -> float | None:
        return (hits & of).sum().item() / of.sum().item() if of.any() else None

    return {
        "reward_recall": share(guess == sign, sign != 0),
        "reward_false_alarms": share(guess != 0, sign == 0),
        "end_recall": share(end_guess, end),
        "end_precision": share(end, end_guess),
        "rewarded_steps": float((sign != 0).sum().item()),
    }


def reward_in_imagination(agent: Agent, heldout: ReplayBuffer, args: Args, count: int = 64) -> dict[str, float | None]:
    """Probability of the true reward when R_psi sees true latents, and latents imagined 1, 3 and 5 steps ahead."""
    n, result = args.context_frames, dict.fromkeys(f"reward_prob_{k}" for k in (0, 1, 3, 5))
    ahead = [k for k in (0, 1, 3, 5) if n + k <= int(heldout.lengths.max())]  # games may be shorter
    windows = heldout.all_windows(n + max(ahead, default=0), stride=1, count=count, rewarded=True)
    if not ahead or not len(windows.frames):
        return result
    z = agent.encode(windows.frames)
    sign = windows.rewards[:, -2].sign().long() + 1
    for k in ahead:
        seen = z.clone()
        if k:
            past, actions = windows.actions[:, -k - n : -k - 1], windows.actions[:, -k - 1 : -1]
            seen[:, -k:] = open_loop(agent, z[:, -k - n : -k], past, actions, args)
        reward_logits, _ = agent.reward(seen, windows.actions[:, :-1])
        result[f"reward_prob_{k}"] = reward_logits[:, -1].softmax(-1).gather(1, sign[:, None]).mean().item()
    return result


# ======================================================================================================================
# 9. Pictures: what the agent dreams, for people
# ======================================================================================================================

PLUS, MINUS, END = "#0072B2", "#D55E00", "#000000"  # colours that everybody can tell apart (Okabe and Ito)


class Dream(NamedTuple):
    """A stretch of K steps of held-out play, and the dream of it: the same actions, but imagined from step 0 on."""

    pictures: np.ndarray  # (3, K + 1, 64, 64, 3) uint8: the real frames, decoded from their latents, decoded dream
    rewards: np.ndarray  # (2, K + 1) in {-1, 0, 1}: of the step that led there; real, and likeliest in the dream
    ends: np.ndarray  # (2, K + 1) bool, likewise
    ages: np.ndarray  # (K + 1,) imagined steps since the dream last saw a real frame


@torch.no_grad()
def dream_of(agent: Agent, decoder: Decoder, play: Windows, args: Args, stretch: int) -> Dream:
    """Dream along one window of real play (batch size 1), seeing real frames again after every `stretch` steps."""
    n, last = args.context_frames, play.frames.shape[1] - 1
    z, seen, ages = agent.encode(play.frames), [], [0]
    for start in range(n - 1, last, stretch):
        k = min(stretch, last - start)
        past, actions = play.actions[:, start - n + 1 : start], play.actions[:, start : start + k]
        seen.append(open_loop(agent, z[:, start - n + 1 : start + 1], past, actions, args))
        ages += range(1, k + 1)
    imagined = torch.cat([z[:, :n], *seen], dim=1)
    reward_logits, end_logits = agent.reward(imagined, play.actions[:, :-1])
    real_rewards, real_ends = (x[0, n - 1 : -1].cpu().numpy() for x in (play.rewards.sign(), play.ends))
    guesses = (x.argmax(-1)[0, n - 1 :].cpu().numpy() for x in (reward_logits, end_logits))
    rewards, ends = (np.stack([a, b]) for a, b in zip((real_rewards, real_ends), guesses, strict=True))
    rewards[1] -= 1
    pictures = [play.frames[0, n - 1 :].cpu().numpy(), decoder.pictures(z[0, n - 1 :])]
    pictures.append(decoder.pictures(imagined[0, n - 1 :]))
    first = ((0, 0), (1, 0))  # nothing led to column 0
    return Dream(
        np.stack(pictures), np.pad(rewards, first).astype(int), np.pad(ends, first).astype(bool), np.array(ages)
    )


def eventful_window(heldout: ReplayBuffer, length: int) -> Windows | None:
    """A window of held-out play, the one with most rewards; None if there is no play of that length."""
    windows = heldout.all_windows(length, stride=5, count=max(1, 4_000 // length))  # 50 MB
    if not len(windows.frames):
        return None
    best = windows.rewards.ne(0).sum(1).argmax()
    return Windows(*(field[best : best + 1] for field in windows))


def event(reward: int, end: bool) -> tuple[str, str]:
    """Text and colour of what happened in a step; nothing for most."""
    texts = [f"{reward:+d}"] if reward else []
    return ", ".join(texts + ["end"] * bool(end)), END if end else PLUS if reward > 0 else MINUS


def film_strip(dream: Dream, title: str) -> np.ndarray:
    """Three rows of pictures: the real game, what the decoder makes of its latents, and the dream. Returns RGB."""
    from PIL import Image, ImageDraw

    size, gap, left, top, below = 2 * IMAGE_SIZE, 8, 150, 64, 26
    columns = dream.pictures.shape[1]
    sheet = Image.new("RGB", (left + columns * (size + gap), top + 3 * (size + below)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, "black", font_size=20)
    names = ("real game", "decoded from\nits latents", "dream")
    for row, column in np.ndindex(3, columns):
        x, y = left + column * (size + gap), top + row * (size + below)
        if row == 0:
            draw.text(
                (x + size / 2, y - 5), "now" if column == 0 else f"step {column}", "black", font_size=16, anchor="mb"
            )
        if column == 0:
            draw.multiline_text((8, y + size / 2 - 20), names[row], "black", font_size=18)
        text, colour = ("", "") if row == 1 else event(dream.rewards[row // 2, column], dream.ends[row // 2, column])
        if text:
            draw.rectangle((x - 4, y - 4, x + size + 3, y + size + 3), colour)
            draw.text((x + size / 2, y + size + 4), text, colour, font_size=19, anchor="ma")
        picture = Image.fromarray(dream.pictures[row, column])
        sheet.paste(picture.resize((size, size), Image.Resampling.NEAREST), (x, y))
    return np.asarray(sheet)


def film(dream: Dream, path: Path, milliseconds: int) -> None:
    """An animated GIF: the real game and the dream side by side, four times enlarged, with what happens in each."""
    from PIL import Image, ImageDraw

    scale, gap, head = 4, 8, 34
    size = IMAGE_SIZE * scale
    sheets = []
    for t, age in enumerate(dream.ages):
        sheet = Image.new("RGB", (2 * size + gap, size + head), "white")
        draw = ImageDraw.Draw(sheet)
        for side, (row, name) in enumerate(((0, "real game"), (2, f"dream, step {age}" if age else "sees the game"))):
            left, text = side * (size + gap), event(dream.rewards[side, t], dream.ends[side, t])
            picture = Image.fromarray(dream.pictures[row, t]).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, head))
            draw.text((left + 4, 8), name, "black", font_size=16)
            draw.text((left + size - 4, 8), text[0], text[1], font_size=18, anchor="ra")
        sheets.append(sheet.quantize(64, dither=Image.Dither.NONE))  # half the size of the file
    content = io.BytesIO()
    options = dict(format="GIF", save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0)
    sheets[0].save(content, **options)
    write_atomically(path, content.getbuffer())


def write_png(path: Path, rgb: np.ndarray) -> None:
    """Write a picture."""
    write_atomically(path, cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes())


CURVES = {
    "return of a game": {
        "training play": "charts/episodic_return", "evaluation": "eval/mean_return", "final": "final/mean_return"
    },
    "loss": {"diffusion": "diffusion/loss", "reward and end": "reward/loss", "value": "policy/value_loss"},
    "error of imagined latents / of 'nothing changes'": {
        f"{k} step{'s' * (k > 1)} ahead": f"wm/open_loop_ratio_{k}" for k in (1, 5, 15)
    },
    "probability given to true rewards": {
        "on true latents": "wm/reward_prob_0", "1 step into a dream": "wm/reward_prob_1",
        "5 steps into a dream": "wm/reward_prob_5",
    },
}  # fmt: skip


def learning_curves(lines: list[dict], title: str) -> np.ndarray:
    """Four panels over environment steps, from the lines of metrics.jsonl. Returns RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line.get("charts/env_steps") for line in lines]
    for i in range(len(steps)):  # evaluations before and after training have no count of their own
        steps[i] = steps[i] if steps[i] is not None else steps[i - 1] if i else 0
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    looks = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#000000", "^", ":"))
    for ax, (name, keys) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for (label, key), (colour, marker, dash) in zip(keys.items(), looks, strict=True):
            points = [(x, line[key]) for x, line in zip(steps, lines, strict=True) if key in line]
            if points:
                few = marker if len(points) < 40 else None
                ax.plot(*zip(*points, strict=True), color=colour, marker=few, linestyle=dash, label=label)
        ax.set(xlabel="environment steps", title=name)
        ax.grid(alpha=0.3)
        if "error" in name:
            ax.axhline(1, color="0.5", linewidth=1)
            ax.set_yscale("log")
        if "probability" in name:
            ax.set_ylim(-0.02, 1.02)  # or noise about 0 looks like a curve
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ======================================================================================================================
# 10. Plan, progress, logs and checkpoints
# ======================================================================================================================


class Plan(NamedTuple):
    """How much of everything a run does, if the first collection takes `first_steps` steps."""

    epochs: int
    steps: int
    diffusion: int
    reward: int
    policy: int
    games: int

    def work(self) -> dict[str, int]:
        """Units of each kind of work, by the names that costs and progress are counted under."""
        return {"collect": self.steps, **{part: getattr(self, part) for part in PARTS}, "games": self.games}


def make_plan(args: Args, first_steps: int) -> Plan:
    """Count epochs, environment steps, updates and evaluation games ahead of a run."""
    epochs = 1 + -(-(args.total_steps - first_steps) // args.epoch_steps) + args.final_epochs
    evaluations = sum(evaluation_due(args, epoch, epochs) for epoch in range(epochs))
    return Plan(
        epochs=epochs,
        steps=args.total_steps,
        diffusion=args.first_diffusion_updates + (epochs - 1) * args.diffusion_updates,
        reward=args.first_reward_updates + (epochs - 1) * args.reward_updates,
        policy=args.first_policy_updates + (epochs - 1) * args.policy_updates,
        games=(1 + evaluations) * args.eval_episodes + args.final_episodes,
    )


def evaluation_due(args: Args, epoch: int, epochs: int) -> bool:
    """After every `eval_every`-th epoch; the last one has the final evaluation instead."""
    return (epoch + 1) % args.eval_every == 0 and epoch + 1 < epochs


def clock(seconds: float) -> str:
    """Seconds -> `1 d 02:03:04`, `2:03:04` or `3:04`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{m:02d}:{s:02d}"


class Progress:
    """A bar with rate and time left for the phase and for the run; a plain line every 30 s where there is no terminal.

    Time left is the work left of each kind times what one unit of that kind has cost so far, so that the long first
    epoch does not spoil it.
    """

    def __init__(self, left: dict[str, int], cost: dict[str, float]):
        self.left, self.cost = dict(left), dict(cost)  # units of each kind to do, and seconds a unit of each
        self.spent: dict[str, tuple[int, float]] = {}  # per kind: units done, seconds
        self.terminal = sys.stdout.isatty()
        self.shown = time.monotonic()
        self.title, self.kind, self.count, self.done, self.begun = "", "", 0, 0, 0.0
        self.before = 0  # units of the phase that an earlier process did

    def start(self, title: str, kind: str, count: int, before: int = 0) -> None:
        """Begin a phase of `count` units of a kind, or carry it on."""
        self.title, self.kind, self.count, self.done, self.begun = title, kind, count, 0, time.monotonic()
        self.before = before

    def advance(self) -> None:
        """One more unit is done."""
        self.done += 1
        self.left[self.kind] = max(0, self.left[self.kind] - 1)
        now = time.monotonic()
        if now - self.shown > (0.2 if self.terminal else 25):
            self.shown = now
            self.show(now)

    def show(self, now: float) -> None:
        rate = self.done / max(now - self.begun, 1e-9)
        done = self.before + self.done
        phase_left = clock((self.count - done) / rate)
        text = f"{self.title} {done}/{self.count}  {rate:.1f}/s  {phase_left} left, run {clock(self.run_left())}"
        if self.terminal:
            full = int(20 * done / max(self.count, 1))
            print(f"\r\033[K[{'#' * full}{'.' * (20 - full)}] {text}", end="", flush=True)
        else:
            print(text, flush=True)

    def run_left(self) -> float:
        """Seconds until the end of the run, as far as one can tell."""
        spent = {**self.spent, self.kind: self.spent_with(time.monotonic() - self.begun)}
        cost = {**self.cost, **{kind: s / n for kind, (n, s) in spent.items() if n}}
        return sum(n * cost.get(kind, 0.0) for kind, n in self.left.items())

    def spent_with(self, seconds: float) -> tuple[int, float]:
        """Units and seconds spent on the present kind, with those of the present phase."""
        units, before = self.spent.get(self.kind, (0, 0.0))
        return units + self.done, before + seconds

    def finish(self) -> float:
        """End the phase; returns its seconds."""
        seconds = time.monotonic() - self.begun
        self.spent[self.kind] = self.spent_with(seconds)
        self.done = 0
        if self.terminal:
            print("\r\033[K", end="", flush=True)
        return seconds


class Logger:
    """Scalars under the same keys to TensorBoard and to metrics.jsonl (one line per call). x-axis: epochs."""

    def __init__(self, run_dir: Path, offset: int, next_epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: not for --help

        self.file = open(run_dir / "metrics.jsonl", "ab")  # open for the life of the run
        self.file.truncate(offset)  # a resumed run writes the lines after its checkpoint again
        self.writer = SummaryWriter(str(run_dir), purge_step=next_epoch or None)

    def log(self, epoch: int, metrics: dict[str, float | None]) -> None:
        """Write what is not None."""
        metrics = {key: float(value) for key, value in metrics.items() if value is not None}
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, epoch)
        self.file.write((json.dumps({"epoch": epoch, **metrics}) + "\n").encode())

    def picture(self, epoch: int, key: str, rgb: np.ndarray) -> None:
        """Show a picture (height, width, 3) on TensorBoard's page of images."""
        self.writer.add_image(key, rgb, epoch, dataformats="HWC")

    def flush(self) -> int:
        """Bring everything to disk; returns the length of metrics.jsonl, which a checkpoint stores."""
        self.writer.flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()


class Meter:
    """Means of metrics that stay on the device until read() (the only synchronisation of an epoch's updates)."""

    def __init__(self, sums: dict[str, Tensor] | None = None, count: int = 0) -> None:
        self.sums, self.count = dict(sums or {}), count

    def add(self, metrics: dict[str, Tensor]) -> None:
        for key, value in metrics.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.count += 1

    def read(self) -> dict[str, float]:
        return {key: value.item() / self.count for key, value in self.sums.items()}  # SYNC


class FiniteCheck:
    """Ends the run at the first update whose loss or gradient is not finite, and saves its batch for a look.

    On a GPU an update is looked at while the next one is under way, so that the device never waits for the host.
    """

    def __init__(self, run_dir: Path, device: torch.device):
        self.run_dir, self.delay = run_dir, int(device.type == "cuda")
        self.waiting: collections.deque = collections.deque()

    def add(self, name: str, number: int, metrics: dict[str, Tensor], batch: Windows) -> None:
        """Note the `number`-th update of part `name`; look at it, or on a GPU at the one before. Raises `RunFailed`."""
        self.waiting.append((name, number, metrics, batch))
        self.look(self.delay)

    def look(self, leave: int = 0) -> None:
        """Look at all updates but the newest `leave`. Raises `RunFailed`."""
        while len(self.waiting) > leave:
            name, number, metrics, batch = self.waiting.popleft()
            if not math.isfinite((metrics["loss"] + metrics["grad_norm"]).item()):  # SYNC
                raise RunFailed(self.report(name, number, metrics, batch))

    def report(self, name: str, number: int, metrics: dict[str, Tensor], batch: Windows) -> str:
        """Save the batch; returns the line to end with."""
        path = self.run_dir / f"nonfinite_{name}_{number}.pt"
        torch.save({"update": number, "metrics": metrics, "batch": batch._asdict()}, path)
        values = ", ".join(f"{key} {metrics[key].item():g}" for key in ("loss", "grad_norm"))
        return (
            f"update {number} of the {name} part is not finite ({values}); its batch is in {path}, and the last "
            f"good checkpoint, {self.run_dir / 'checkpoint.pt'}, is as it was"
        )


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (a cluster's warning before it kills) end the program in order.

    As a context manager it takes the signals over. One that comes `at_once` raises `Stopped` where it strikes: there
    is nothing to save, or what is under way is begun again on resume. Otherwise it waits for the next `check()`, so
    that no step, update or checkpoint is left half done. A second Ctrl-C does not wait.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1

    def __init__(self) -> None:
        self.at_once, self.signum, self.previous = True, 0, {}

    def __enter__(self) -> "StopSignals":
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, signum: int, _frame) -> None:
        """What a signal does."""
        again, self.signum = bool(self.signum), signum
        if self.at_once and not again:  # once: a cluster may send its signal twice
            raise Stopped
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt  # not Stopped: what is under way is no state to save

    def check(self) -> None:
        """A place where the program may stop."""
        if self.signum:
            raise Stopped

    @contextlib.contextmanager
    def may_strike(self):
        """Within, a signal need not wait."""
        self.check()
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a new file, bring it to disk, then let it take the place of `path`. A failure leaves `path` as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk its space is worth having
        raise


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def collector_state(collector: Collector) -> dict:
    """Everything that the next training step depends on, the emulator's own state included, as plain data."""
    env, game = collector.env, None
    if hasattr(env.unwrapped, "clone_state"):
        blob = env.unwrapped.clone_state(include_rng=True).serialize()
        game = {"emulator": torch.frombuffer(bytearray(blob), dtype=torch.uint8), "ale_py": ale_py.__version__}
    return {
        "game": game,
        "np_random": json.dumps(env.unwrapped.np_random.bit_generator.state),
        "wrapper": env.state(),
        "frame": torch.from_numpy(collector.frame.copy()),
        "lstm": collector.state,
        "episode_return": collector.episode_return,
        "reward_counts": list(collector.reward_counts),
        "steps": collector.steps,
    }


def restore_collector(collector: Collector, saved: dict, replay: ReplayBuffer, device: torch.device) -> None:
    """Carry on with the same game. Where the emulator's state cannot be restored, a new game begins, and says so."""
    env, game = collector.env, saved["game"]
    collector.reward_counts, collector.steps = list(saved["reward_counts"]), saved["steps"]
    env.unwrapped.np_random.bit_generator.state = json.loads(saved["np_random"])
    frame = saved["frame"].numpy()
    if game is None or game["ale_py"] != ale_py.__version__:
        print("the game's own state cannot be restored here: a new game begins")
        if replay.open:
            replay._record(frame, 0, 0.0, True, False)
            replay.flush()
        collector.frame, _ = env.reset()
        return
    env.unwrapped.restore_state(ale_py.ALEState(game["emulator"].numpy().tobytes()))
    env.set_state(saved["wrapper"])
    collector.frame = frame
    collector.state = None if saved["lstm"] is None else tuple(s.to(device) for s in saved["lstm"])
    collector.episode_return = saved["episode_return"]


def rng_state(device: torch.device) -> dict:
    """Every global random generator, as plain data; this file draws from PyTorch's alone, a fork may not."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_rng_state(saved: dict, device: torch.device) -> None:
    """The opposite of `rng_state`. On another kind of device its own generator goes on from the seed."""
    torch.set_rng_state(saved["cpu"].cpu())
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"].cpu(), device)
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))


# A checkpoint is an ordinary torch.save file, a zip archive, whose comment holds the format's number, the length of all
# before the comment, and its CRC-32: PyTorch does not look at the checksums inside of the archive.
CHECKPOINT_FORMAT = 2
SEAL = struct.Struct("<4sIQI")  # b"JEDI", format, length, checksum


def seal(archive: io.BytesIO) -> memoryview:
    """Append the seal to a torch.save file, as the comment of its zip archive; in place, since it can be large."""
    with archive.getbuffer() as view:
        view[-2:] = struct.pack("<H", SEAL.size)  # the last field is the comment's length
        length, checksum = len(view), zlib.crc32(view)
    archive.seek(length)
    archive.write(SEAL.pack(b"JEDI", CHECKPOINT_FORMAT, length, checksum))
    return archive.getbuffer()


def unseal(path: Path) -> bytes:
    """Read a sealed file. Raises `BadInput` that says what is wrong with it."""
    content = path.read_bytes()
    archive, tail = content[: -SEAL.size], content[-SEAL.size :]
    if len(tail) < SEAL.size or not tail.startswith(b"JEDI"):
        raise BadInput(f"{path} was cut short, or no run of this script wrote it")
    _, version, length, checksum = SEAL.unpack(tail)
    if version != CHECKPOINT_FORMAT:
        raise BadInput(
            f"{path} has format {version}, from another version of this script; it reads {CHECKPOINT_FORMAT}"
        )
    if length != len(archive) or checksum != zlib.crc32(archive):
        raise BadInput(f"{path} fails its checksum: the file was altered")
    return content


def save_checkpoint(run_dir: Path, content: dict) -> None:
    """Write checkpoint.pt under another name, bring it to disk, rename; the one before stays as checkpoint.prev.pt.

    Raises `OSError`, and leaves the last checkpoint as it was, if there is no room or no folder.
    """
    path, previous, new = (run_dir / f"checkpoint{name}.pt" for name in ("", ".prev", ".new"))
    archive = io.BytesIO()
    torch.save(content, archive)
    write_atomically(new, seal(archive))
    if path.exists():  # a second name, not a move: at no moment is there no checkpoint.pt
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    os.replace(new, path)


def load_checkpoint(run_dir: Path, device: torch.device) -> dict:
    """Read checkpoint.pt as data only, never as code. Raises `BadInput` if there is none or it cannot be read."""
    path, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"
    if not path.is_file():
        raise BadInput(f"{run_dir} holds no checkpoint.pt; give the folder of a run that has saved one")
    try:
        saved = torch.load(io.BytesIO(unseal(path)), map_location=device, weights_only=True)
    except Exception as error:
        fault = str(error) if isinstance(error, BadInput) else f"{path} is refused: it holds more than plain data"
        advice = f"; to go back to the one before it: mv {previous} {path}" if previous.is_file() else ""
        raise BadInput(fault + advice) from None
    if saved["script"] != Path(__file__).stem:
        raise BadInput(f"{path} was written by {saved['script']}.py; use that script")
    return saved


def load_args(run_dir: Path) -> Args:
    """The arguments of a run. Raises `BadInput` where there are none."""
    path = run_dir / "args.json"
    try:
        saved = json.loads(path.read_text())
        return Args(**saved)
    except (OSError, json.JSONDecodeError):
        raise BadInput(f"{run_dir} holds no readable args.json; give the folder of a run") from None
    except TypeError as error:
        raise BadInput(f"{path} was written by another version of this script: {error}") from None


MAY_CHANGE_ON_RESUME = (
    "run_dir",
    "resume",
    "device",
    "compile",
    "precision",
    "checkpoint_every",
    "keep_replay",
    "dry_run",
    "eval_only",
)


def prepare_run_dir(args: Args, name: str) -> tuple[Path, io.BufferedWriter]:
    """Make the run folder, or check the one to resume; the open file locks it against a second process.

    Raises `BadInput` rather than touch another run's files.
    """
    script = Path(__file__).stem
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path(args.run_dir or f"runs/{name}__{script}__{args.seed}__{stamp}")
    try:
        run_dir.exists()
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write to the run folder {str(run_dir)[:80]}: {error}") from None
    if args.resume:
        if not (run_dir / "checkpoint.pt").is_file():
            raise BadInput(f"--resume: {run_dir} holds no checkpoint.pt; drop --resume to start a new run there")
        if (run_dir / "result.json").exists():
            raise BadInput(
                f"--resume: {run_dir} is finished, it has a result.json; --eval-only plays more games with it"
            )
        saved = load_args(run_dir)
        names = [f.name for f in dataclasses.fields(Args) if f.name not in MAY_CHANGE_ON_RESUME]
        differ = [n for n in names if getattr(saved, n) != getattr(args, n)]
        if differ:
            was = ", ".join(f"{flag(n)} (was {getattr(saved, n)}, now {getattr(args, n)})" for n in differ)
            raise BadInput(f"--resume: {run_dir} was begun with other arguments: {was}")
    elif any((run_dir / file).exists() for file in ("checkpoint.pt", "checkpoint.prev.pt", "result.json")):
        raise BadInput(f"{run_dir} already holds a run; carry it on with --resume, or choose another --run-dir")
    try:
        (run_dir / "dreams").mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "wb")
    except OSError as error:
        raise BadInput(f"cannot write to the run folder {run_dir}: {error.strerror}") from None
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"another process is at work in the run folder {run_dir}; choose another --run-dir"
            ) from None
    return run_dir, lock


# ======================================================================================================================
# 11. Training
# ======================================================================================================================


class Compiled:
    """Methods of networks, compiled by PyTorch. As a context manager it puts them in place, while an update runs.

    The networks, not the losses around them: a rollout of 15 steps calls the denoiser 45 times and would take many
    minutes to compile as one program. Play and evaluation stay as written: each new shape would be compiled anew.
    """

    def __init__(self, methods: list[tuple[nn.Module, str]]):
        self.methods = [(module, name, torch.compile(getattr(module, name))) for module, name in methods]

    def __enter__(self) -> None:
        for module, name, function in self.methods:
            setattr(module, name, function)

    def __exit__(self, *error) -> None:
        for module, name, _ in self.methods:
            delattr(module, name)  # the class's own method shows again


class Part(NamedTuple):
    """One of the three updates: its loss, the parameters that it moves, and how it draws its batch."""

    loss: Callable  # (agent, batch, args) -> (loss, metrics)
    optimizer: torch.optim.AdamW
    parameters: list[nn.Parameter]
    clip: float
    sample: Callable[[ReplayBuffer], Windows]
    compiled: contextlib.AbstractContextManager  # what is compiled is in place within it


def make_optimizer(
    args: Args, network: nn.Module, encoder: nn.Module | None, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with decay on weight matrices only, the encoder at its own, lower learning rate [P, D]."""
    groups = []
    for module, scale in ((network, 1.0), (encoder, args.encoder_lr_scale)):
        if module is None:
            continue
        decayed, plain = [], []
        for submodule in module.modules():
            for name, parameter in submodule.named_parameters(recurse=False):
                keep = isinstance(submodule, (nn.GroupNorm, nn.Embedding)) or "bias" in name
                (plain if keep else decayed).append(parameter)
        # Learning rates are tensors: a captured or compiled update reads their present value.
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
            lr = torch.tensor(args.learning_rate * scale, device=device)
            groups.append({"params": parameters, "weight_decay": decay, "lr": lr, "peak": args.learning_rate * scale})
    return torch.optim.AdamW(groups, eps=args.adam_eps, fused=True)


def make_parts(agent: Agent, args: Args, device: torch.device) -> dict[str, Part]:
    """The three updates. The encoder learns from the first two; the actor-critic learns alone."""
    n = args.context_frames
    methods = [(agent.encoder, "layers"), (agent.denoiser, "forward"), (agent.reward, "features")]
    compiled = Compiled(methods) if args.compile else contextlib.nullcontext()
    diffusion = make_optimizer(args, agent.denoiser, agent.encoder, args.weight_decay, device)
    reward = make_optimizer(args, agent.reward, agent.encoder, args.weight_decay, device)
    policy = make_optimizer(args, agent.policy, None, 0.0, device)
    parameters = [[p for g in o.param_groups for p in g["params"]] for o in (diffusion, reward, policy)]
    b, window = args.batch_size, n + args.reward_window
    return {
        "diffusion": Part(
            diffusion_loss, diffusion, parameters[0], args.clip_diffusion,
            lambda replay: replay.sample_frames(b, n + args.target_frames, final=True), compiled,
        ),
        "reward": Part(
            reward_termination_loss, reward, parameters[1], args.clip_other,
            lambda replay: replay.sample_transitions(b, window), compiled,
        ),
        "policy": Part(
            actor_critic_loss, policy, parameters[2], args.clip_other,
            lambda replay: replay.sample_frames(b, n, final=False), compiled,
        ),
    }  # fmt: skip


def make_decoder(args: Args, device: torch.device) -> tuple[Decoder, torch.optim.Optimizer] | None:
    """The decoder and its optimiser, unless it is left out. Its first weights use up no random numbers of the run."""
    if not args.decoder:
        return None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        decoder = Decoder().to(device)
    return decoder, torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)


def update_decoder(decoder: Decoder, optimizer: torch.optim.Optimizer, agent: Agent, batch: Windows) -> None:
    """One step of the decoder alone."""
    optimizer.zero_grad(set_to_none=True)
    decoder_loss(decoder, agent, batch).backward()
    optimizer.step()


def update(agent: Agent, part: Part, batch: Windows, number: int, args: Args, bf16: bool) -> dict[str, Tensor]:
    """One optimiser step, the `number`-th (from 0) of its part. Returns metrics on the device: no synchronisation."""
    warm = min(1.0, (number + 1) / max(args.warmup_updates, 1))
    if number <= args.warmup_updates:  # once more at the end of it, to set the peak exactly
        for group in part.optimizer.param_groups:
            group["lr"].fill_(group["peak"] * warm)
    with part.compiled, torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=bf16):
        loss, metrics = part.loss(agent, batch, args)
    part.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(part.parameters, part.clip)
    part.optimizer.step()
    return {**metrics, "grad_norm": norm.detach()}


def set_threads(args: Args) -> None:
    """Limit PyTorch's CPU threads, for several runs on one machine."""
    if args.threads:
        torch.set_num_threads(args.threads)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> a device that is there. Raises `BadInput`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BadInput(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise BadInput(f"--device {name}: PyTorch sees {count} CUDA devices here; try --device cpu or auto")
    return device


def replay_capacity(args: Args) -> int:
    """Records that a run is likely to need: its steps and the last frames of its episodes."""
    return int(1.1 * args.total_steps) + 1_000


def check_memory(args: Args, device: torch.device) -> None:
    """Raise `BadInput` if the replay alone is larger than the memory of the device that holds it."""
    need = replay_capacity(args) * ReplayBuffer.RECORD.itemsize
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if need > have:
        raise BadInput(
            f"--total-steps {args.total_steps} needs {need / 2**30:,.0f} GiB for the replay; "
            f"this device has {have / 2**30:,.0f} GiB, choose fewer steps"
        )


def choose_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16. `auto`: where matrix units make it fast. Raises `BadInput`."""
    # DEVIATION 6: bf16 where it is fast; DIAMOND computes in float32. Diffusion maths stays in float32 either way.
    if device.type == "cuda":
        supported = fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        amx, avx = (
            bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()) for name in ("amx_tile", "avx512_bf16")
        )
        supported, fast = amx or avx, amx
    if precision == "bf16" and not supported:
        raise BadInput(f"--precision bf16: this {device.type} has no bf16 arithmetic; use --precision fp32 or auto")
    return fast if precision == "auto" else precision == "bf16"


def measure_costs(args: Args, device: torch.device, bf16: bool, repeats: int = 2) -> dict[str, float]:
    """Seconds of one environment step, one update of each part and one evaluation game, measured on a throw-away
    agent. A game is taken as 1,000 steps, or fewer where games are cut earlier."""
    print("measuring what an update of each kind costs here", flush=True)
    args = dataclasses.replace(args, compile=False, heldout_steps=1)
    collector, costs = Collector(args), {}
    agent = Agent(int(collector.env.action_space.n), args).to(device)
    replay = ReplayBuffer(1_000, device)
    warm_up, steps = 20, 40
    for i in range(warm_up + steps):
        if i == warm_up:
            begun = time.monotonic()
        collector.step(agent, replay, device)
    costs["collect"] = (time.monotonic() - begun) / steps
    replay.flush()
    collector.env.close()
    for name, part in make_parts(agent, args, device).items():
        for i in range(repeats + 1):  # the first is the warm-up; where it takes seconds it has to do
            begun = time.monotonic()
            update(agent, part, part.sample(replay), i, args, bf16)
            synchronize(device)
            seconds = time.monotonic() - begun
            if i and seconds > 2:
                break
        costs[name] = seconds
    costs["games"] = min(1_000, args.max_episode_steps) * costs["collect"]
    return costs


def synchronize(device: torch.device) -> None:
    """Wait for the device, to read a clock honestly."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_plan(args: Args, plan: Plan, counts: dict[str, int], costs: dict[str, float], device, bf16: bool) -> float:
    """Print what a run will do and cost; returns the estimated seconds."""
    work = plan.work()
    seconds = {kind: count * costs[kind] for kind, count in work.items()}
    replay = args.total_steps * ReplayBuffer.RECORD.itemsize
    checkpoints = 3 * 12 * counts["total"]  # weights and two moments, 4 bytes each; this one, the last and a new one
    print(f"game            {args.env_id}, seed {args.seed}, preset {args.preset}")
    print(f"device          {device}, {'bf16' if bf16 else 'fp32'}, compile {'on' if args.compile else 'off'}")
    print("parameters      " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"epochs          {plan.epochs:,}")
    names = {"collect": "env steps", "games": "games played"}
    for kind, count in work.items():
        title = names.get(kind, f"{kind} updates")
        print(f"{title:<17} {count:>9,} x {costs[kind] * 1000:9.1f} ms = {clock(seconds[kind]):>14}")
    print(
        f"replay          {replay:,} bytes in memory and on disk" + ("" if args.keep_replay else ", deleted at the end")
    )
    print(f"checkpoints     {checkpoints:,} bytes on disk at most")
    print(f"whole run       about {clock(sum(seconds.values()))} (measured on this device just now)")
    return sum(seconds.values())


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    modules = {"torch": torch, "gymnasium": gym, "ale_py": ale_py, "numpy": np, "cv2": cv2}
    return {"python": platform.python_version(), **{name: m.__version__ for name, m in modules.items()}}


def git_commit() -> str | None:
    """The commit of this script, if it lies in a git checkout; with `-dirty` where it was changed since."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # Linux; getrusage counts a parent in there
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    import resource  # not on Windows, where a GPU is the way to run this

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flatten_measures(measures: dict) -> dict[str, float | None]:
    """Measures of the world model -> scalars to log; the open-loop error as one key per horizon."""
    flat = {f"wm/{key}": value for key, value in measures.items() if key != "open_loop_ratio"}
    for k, value in enumerate(measures["open_loop_ratio"] or [], 1):
        flat[f"wm/open_loop_ratio_{k}"] = value
    return flat


def human_normalized(name: str, mean_return: float) -> float | None:
    """(score - random) / (human - random); None for a game without reference scores."""
    if name not in REFERENCE_SCORES:
        return None
    low, high = REFERENCE_SCORES[name]
    return (mean_return - low) / (high - low)


PHASES = ("untrained", "collect", *PARTS, "evaluate", "final")  # of a run; the middle ones repeat, epoch by epoch


@dataclasses.dataclass
class Run:
    """Everything that changes during a run, and the few things that all its steps need."""

    args: Args
    run_dir: Path
    device: torch.device
    bf16: bool
    agent: Agent
    parts: dict[str, Part]
    replay: ReplayBuffer
    collector: Collector
    decoder: tuple[Decoder, torch.optim.Optimizer] | None
    progress: Progress
    signals: StopSignals
    finite: FiniteCheck
    begun: float  # clock when this process began
    logger: Logger | None = None
    epoch: int = 0  # how many are done
    epochs: int = 0  # how many there will be; known once the first collection is
    first_steps: int = 0  # steps of the first collection
    phase: str = PHASES[0]
    done: int = 0  # updates or steps done in this phase
    meter: Meter = dataclasses.field(default_factory=Meter)  # of this phase
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)  # of this epoch so far
    finished: list[float] = dataclasses.field(default_factory=list)  # returns of the games that ended in this epoch
    updates: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    untrained: dict = dataclasses.field(default_factory=dict)  # returns and measures before training
    wall_seconds: float = 0.0  # of earlier processes of this run
    rng_before: dict | None = None  # the generators before the evaluations of this phase

    def enter(self, phase: str) -> None:
        """Begin the next phase."""
        self.phase, self.done, self.meter, self.rng_before = phase, 0, Meter(), None

    def seconds(self) -> float:
        """Time spent on this run, earlier processes counted in."""
        return self.wall_seconds + time.monotonic() - self.begun


# What a checkpoint holds of `Run` as it stands; the rest needs more than copying.
PLAIN_STATE = ("epoch", "epochs", "first_steps", "phase", "done", "metrics", "finished", "updates")


def checkpoint(run: Run) -> None:
    """Save everything that `restore` needs to turn back into the same run, bit by bit, as plain data."""
    run.finite.look()
    content = {
        "script": Path(__file__).stem,
        **{name: getattr(run, name) for name in PLAIN_STATE},
        "agent": run.agent.state_dict(),
        "optimizers": {name: part.optimizer.state_dict() for name, part in run.parts.items()},
        "decoder": [x.state_dict() for x in run.decoder or ()],
        "meter": {"sums": run.meter.sums, "count": run.meter.count},
        "untrained": json.dumps(run.untrained),
        "collector": collector_state(run.collector),
        "rng": rng_state(run.device),
        "replay_size": run.replay.sync(),
        "metrics_bytes": run.logger.flush(),
        "wall_seconds": run.seconds(),
    }
    save_checkpoint(run.run_dir, content)


def restore(run: Run, saved: dict) -> int:
    """Turn a fresh run into the one of a checkpoint; returns the length of its metrics file."""
    run.replay.load(saved["replay_size"])
    run.agent.load_state_dict(saved["agent"])
    for name, part in run.parts.items():
        part.optimizer.load_state_dict(saved["optimizers"][name])
    for part, state in zip(run.decoder or (), saved["decoder"], strict=True):
        part.load_state_dict(state)
    for name in PLAIN_STATE:
        setattr(run, name, saved[name])
    run.meter = Meter(**saved["meter"])
    run.wall_seconds = saved["wall_seconds"]
    run.untrained = json.loads(saved["untrained"])
    restore_collector(run.collector, saved["collector"], run.replay, run.device)
    set_rng_state(saved["rng"], run.device)
    return saved["metrics_bytes"]


def train(args: Args, signals: StopSignals | None = None) -> dict:
    """Train and evaluate one agent; writes the run folder and returns what it writes as result.json.

    Raises `BadInput` before anything is written if the arguments, the device or the folder do not fit, `RunFailed` if
    training breaks down, and `Stopped` if `signals` are given and one arrives; the run can then be resumed.
    """
    begun = time.monotonic()
    check_args(args)
    set_threads(args)
    device = choose_device(args.device)
    bf16 = choose_bf16(args.precision, device)
    _, name = resolve_env_id(args.env_id)
    make_env(args).close()
    check_memory(args, device)
    run_dir, lock = prepare_run_dir(args, name)
    with lock:
        saved = load_checkpoint(run_dir, device) if args.resume else None
        run = start_run(args, run_dir, device, bf16, signals or StopSignals(), begun, saved)
        try:
            run_epochs(run)
            return finish_run(run, name)
        except Stopped:
            if run.rng_before:  # an evaluation was struck: it will be played from its beginning
                set_rng_state(run.rng_before, device)
            checkpoint(run)
            command = f"python {Path(__file__).name} --resume --run-dir {run_dir}"
            raise Stopped(f"epoch {run.epoch + 1}, {run.phase} {run.done}; carry on with: {command}") from None


def start_run(
    args: Args,
    run_dir: Path,
    device: torch.device,
    bf16: bool,
    signals: StopSignals,
    begun: float,
    saved: dict | None,
) -> Run:
    """Announce the plan, build everything from the seed or the `saved` checkpoint; write what describes the run."""
    torch.set_float32_matmul_precision("high")  # TF32 where fp32 products remain on a GPU
    costs = measure_costs(args, device, bf16)
    seed_everything(args.seed)
    collector = Collector(args)
    agent = Agent(int(collector.env.action_space.n), args).to(device)
    plan = make_plan(args, args.first_steps_min)
    print(f"run folder      {run_dir}")
    seconds = print_plan(args, plan, parameter_counts(agent), costs, device, bf16)
    if device.type == "cpu" and seconds > 86_400:
        print(f"on this CPU that takes about {seconds / 86_400:.0f} days; for minutes, stop and use --preset tiny")
    if args.compile:
        print("compiling the updates: the first of each takes up to a minute")
    replay = ReplayBuffer(replay_capacity(args), device, run_dir / "replay.bin")
    parts, progress, finite = (
        make_parts(agent, args, device),
        Progress(plan.work(), costs),
        FiniteCheck(run_dir, device),
    )
    decoder = make_decoder(args, device)
    run = Run(args, run_dir, device, bf16, agent, parts, replay, collector, decoder, progress, signals, finite, begun)
    signals.check()
    signals.at_once = False  # from here on there is something to save
    if saved:
        offset = restore(run, saved)
        print(f"resumed in epoch {run.epoch + 1}, {run.phase} {run.done}, {run.collector.steps:,} steps")
        progress.left["collect"] -= run.collector.steps
        for part in PARTS:
            progress.left[part] -= run.updates[part]
        run.logger = Logger(run_dir, offset, 0 if run.phase == PHASES[0] else run.epoch + 1)
    else:
        replay.file.truncate(0)
        write_json(run_dir / "args.json", dataclasses.asdict(args))
        shutil.copyfile(__file__, run_dir / Path(__file__).name)
        run.logger = Logger(run_dir, 0, 0)
        checkpoint(run)  # from its first moment on, a run can be resumed
    return run


def seed_everything(seed: int) -> None:
    """Seed every global generator; this file draws from PyTorch's alone, a fork may not."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def run_epochs(run: Run) -> None:
    """All that is left of the run, from the phase where it stands, up to the final evaluation."""
    if run.phase == "untrained":
        measures, evaluation = evaluation_phase(run, run.args.eval_episodes, "play before training")
        run.untrained = {"returns": evaluation.returns, **measures}
        run.logger.log(0, {"eval/mean_return": np.mean(evaluation.returns), **flatten_measures(measures)})
        run.enter("collect")
        checkpoint(run)
    while run.phase != "final":
        for phase in PHASES[PHASES.index(run.phase) : -1]:
            first = run.epoch == 0
            if phase == "collect":
                collect_phase(run)
            elif phase in PARTS:
                update_phase(run, phase)
            else:
                end_epoch(run)
            due = phase == "evaluate" and (run.epoch % run.args.checkpoint_every == 0 or run.phase == "final")
            if first or due:
                checkpoint(run)


def collect_phase(run: Run) -> None:
    """Play on in the training game."""
    args, collector, first = run.args, run.collector, run.epoch == 0
    goal = args.first_steps_max if first else min(run.first_steps + run.epoch * args.epoch_steps, args.total_steps)
    begin_phase(run, "collect", goal - (collector.steps - run.done))
    while not (collector.first_play_is_enough() if first else collector.steps >= goal):
        finished = collector.step(run.agent, run.replay, run.device)
        if finished is not None:
            run.finished.append(finished)
        run.done += 1
        run.progress.advance()
        run.signals.check()
    run.replay.flush()
    if first:
        run.first_steps = collector.steps
        run.epochs = make_plan(args, collector.steps).epochs
    run.metrics["charts/env_steps"] = collector.steps
    run.metrics["charts/episodic_return"] = float(np.mean(run.finished)) if run.finished else None
    run.finished = []
    end_phase(run, "collect")
    run.enter(PARTS[0])


def update_phase(run: Run, name: str) -> None:
    """This epoch's updates of one part."""
    args, part = run.args, run.parts[name]
    count = getattr(args, f"first_{name}_updates" if run.epoch == 0 else f"{name}_updates")
    begin_phase(run, name, count)
    while run.done < count:
        batch = part.sample(run.replay)
        metrics = update(run.agent, part, batch, run.updates[name], args, run.bf16)
        run.meter.add(metrics)
        if run.decoder and name != "policy" and run.updates[name] % DECODER_EVERY == 0:
            update_decoder(*run.decoder, run.agent, batch)
        run.updates[name] += 1
        run.done += 1
        run.finite.add(name, run.updates[name], metrics, batch)
        run.progress.advance()
        run.signals.check()
    run.finite.look()
    run.metrics.update({f"{name}/{key}": value for key, value in run.meter.read().items()})
    run.metrics[f"charts/{name}_updates"] = run.updates[name]
    end_phase(run, name)
    run.enter(PHASES[PHASES.index(name) + 1])


def begin_phase(run: Run, kind: str, count: int) -> None:
    """Show that a phase of `count` units begins, or goes on."""
    title = f"epoch {run.epoch + 1}/{run.epochs}" if run.epochs else "epoch 1"
    run.progress.start(f"{title} {kind}", kind, count, run.done)


def end_phase(run: Run, kind: str) -> None:
    """Note the phase's seconds: those of this process."""
    run.metrics[f"time/{kind}"] = run.progress.finish()


def end_epoch(run: Run) -> None:
    """Evaluate if it is time to, log the epoch, show its line."""
    epoch = run.epoch + 1
    metrics = dict(run.metrics)
    if evaluation_due(run.args, run.epoch, run.epochs):
        measures, evaluation = evaluation_phase(run, run.args.eval_episodes, f"epoch {epoch} evaluation")
        metrics["eval/mean_return"] = np.mean(evaluation.returns)
        metrics["eval/mean_length"] = np.mean(evaluation.lengths)
        metrics.update(flatten_measures(measures))
    run.logger.log(epoch, metrics)
    run.epoch, run.metrics = epoch, {}
    run.enter("final" if epoch == run.epochs else "collect")
    print(epoch_line(run, metrics), flush=True)


def epoch_line(run: Run, metrics: dict[str, float | None]) -> str:
    """What an epoch did, in one line for the screen."""
    parts = [f"epoch {run.epoch}/{run.epochs}", f"{run.collector.steps:,} steps"]
    for key, title in (
        ("charts/episodic_return", "return"),
        ("diffusion/loss", "diffusion loss"),
        ("reward/loss", "reward loss"),
        ("reward/recall", "recall"),
        ("policy/entropy", "entropy"),
        ("eval/mean_return", "evaluation"),
        ("wm/open_loop_ratio_1", "open loop 1"),
    ):
        if metrics.get(key) is not None:
            parts.append(f"{title} {metrics[key]:.3g}")
    return ", ".join(parts) + f", {clock(run.progress.run_left())} left"


def evaluation_phase(run: Run, episodes: int, title: str, args: Args | None = None) -> tuple[dict, Evaluation]:
    """Play, in another environment if `args` are given, then measure the world model on that play. A signal may
    strike: a resumed run plays all of it again."""
    run.progress.start(title, "games", episodes)
    # Seeds of evaluation games lie apart from those of training and of each other.
    epoch = run.epoch + (run.phase == "evaluate")
    seed = 1_000_000_000 + (run.args.seed * 100_003 + epoch * 1_009 + episodes) % 1_000_000_000
    run.rng_before = run.rng_before or rng_state(run.device)
    with run.signals.may_strike():
        evaluation = evaluate(run.agent, args or run.args, run.device, episodes, seed, run.progress)
        measures = measure_world_model(run.agent, evaluation.heldout, run.args)
        if run.decoder and args is None:
            draw_dreams(run, evaluation.heldout, epoch)
    run.progress.finish()
    return measures, evaluation


def draw_dreams(run: Run, heldout: ReplayBuffer, epoch: int) -> None:
    """Film strip and film of a dream in dreams/ and in TensorBoard; at the end of the run a longer film. Draws its
    random numbers apart, so that the run is the same without it."""
    args, agent, (decoder, _) = run.args, run.agent, run.decoder
    final, n = run.phase == "final", args.context_frames
    name = "final" if final else f"epoch{epoch:04d}"
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        window = eventful_window(heldout, n + MAX_OPEN_LOOP)
        if window is not None:
            dream = dream_of(agent, decoder, window, args, MAX_OPEN_LOOP)
            strip = film_strip(
                dream, f"{args.env_id}, epoch {epoch}: from 'now' on the dream sees no frame, only actions"
            )
            write_png(run.run_dir / "dreams" / f"{name}.png", strip)
            film(dream, run.run_dir / "dreams" / f"{name}.gif", 200)
            run.logger.picture(epoch, "dream", strip)
        longest = min(int(heldout.lengths.max()), 300 + n)
        if final and longest > n:
            play = eventful_window(heldout, longest)
            film(dream_of(agent, decoder, play, args, 50), run.run_dir / "dreams" / "play.gif", 67)


def draw_curves(run: Run) -> None:
    """curves.png: what metrics.jsonl holds, in a picture."""
    run.logger.flush()
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    title = f"{run.args.env_id}, preset {run.args.preset}, seed {run.args.seed}"
    write_png(run.run_dir / "curves.png", learning_curves(lines, title))


def finish_run(run: Run, name: str) -> dict:
    """The final evaluation, the table of what was learned, and result.json, written last."""
    args, environments = run.args, final_environments(run.args)
    (trained_in, _), *others = environments.items()
    measures, evaluation = evaluation_phase(run, args.final_episodes, "final evaluation")
    elsewhere = {}
    for other, other_args in others:
        _, played = evaluation_phase(run, args.final_episodes, f"final evaluation, {other}", other_args)
        elsewhere[other] = {"returns": played.returns, "mean_return": float(np.mean(played.returns))}
    mean = float(np.mean(evaluation.returns))
    run.logger.log(run.epoch, {"final/mean_return": mean, **flatten_measures(measures)})
    draw_curves(run)
    result = {
        "env_id": args.env_id,
        "script": Path(__file__).stem,
        "seed": args.seed,
        "preset": args.preset,
        "env_steps": run.collector.steps,
        "updates": run.updates,
        "environment": trained_in,
        "returns": evaluation.returns,
        "lengths": evaluation.lengths,
        "mean_return": mean,
        "std_return": float(np.std(evaluation.returns)),
        "human_normalized_score": human_normalized(name, mean),
        "other_environments": elsewhere,
        "returns_untrained": run.untrained["returns"],
        "open_loop_ratio": measures["open_loop_ratio"],
        "open_loop_ratio_untrained": run.untrained["open_loop_ratio"],
        "reward_recall": measures["reward_recall"],
        "measures": {key: value for key, value in measures.items() if key != "open_loop_ratio"},
        "wall_seconds": run.seconds(),
        "peak_memory_bytes": peak_memory(run.device),
        "device": torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else platform.processor() or "cpu",
        "precision": "bf16" if run.bf16 else "fp32",
        "versions": versions(),
        "git_commit": git_commit(),
        "args": dataclasses.asdict(args),
    }
    write_json(run.run_dir / "result.json", result)
    print_result(result, run.run_dir)
    if not args.keep_replay:
        (run.run_dir / "replay.bin").unlink()
    return result


def print_result(result: dict, run_dir: Path) -> None:
    """The table at the end of a run: what was learned, measured on games that were not trained on."""
    measures = result["measures"]

    def show(value: float | None, percent: bool = False) -> str:
        return "no data" if value is None else f"{value:.0%}" if percent else f"{value:.2f}"

    print("\nwhat the world model learned, on games it was not trained on")
    print("  error of imagined latents over the error of 'nothing changes' (below 1 is skill)")
    print("    steps ahead      " + "".join(f"{k:>8}" for k in REPORTED_HORIZONS))
    for title, key in (("before training", "open_loop_ratio_untrained"), ("now", "open_loop_ratio")):
        values = [*(result[key] or []), *[None] * MAX_OPEN_LOOP]  # short games have fewer
        print(f"    {title:<17}" + "".join(f"{show(values[k - 1]):>8}" for k in REPORTED_HORIZONS))
    recall, alarms = show(measures["reward_recall"], True), show(measures["reward_false_alarms"], True)
    count = int(measures["rewarded_steps"])
    print(f"  rewarded steps recognised: {recall} of {count}; false alarms on the others: {alarms}")
    rank, saturation = measures["latent_effective_rank"], measures["latent_saturation"]
    std = measures["latent_std"]
    print(f"  latents: standard deviation {std:.2f}, effective rank {rank:.0f}, saturated {saturation:.1%}")
    score = result["human_normalized_score"]
    print(
        f"return {result['mean_return']:.1f} +- {result['std_return']:.1f} over {len(result['returns'])} games "
        f"(before training {np.mean(result['returns_untrained']):.1f}); human-normalised {show(score)}"
    )
    memory = result["peak_memory_bytes"] / 2**30
    print(f"{clock(result['wall_seconds'])} of time, {memory:.2f} GiB at most; {run_dir}/result.json")


def eval_only(args: Args) -> dict:
    """Play `--final-episodes` games with a run's checkpoint; writes eval_<time>.json beside it, nothing else."""
    check_args(args)
    run_dir = Path(args.eval_only)
    saved = load_args(run_dir)
    set_threads(args)
    device = choose_device(args.device)
    changes = {n: getattr(args, n) for n in ("seed", "final_episodes", "eval_envs", "temperature", "max_episode_steps")}
    saved = dataclasses.replace(saved, compile=False, **changes)
    env = make_env(saved)
    agent = Agent(int(env.action_space.n), saved).to(device)
    env.close()
    checkpoint = load_checkpoint(run_dir, device)
    agent.load_state_dict(checkpoint["agent"])
    torch.manual_seed(args.seed)
    progress = Progress({"games": args.final_episodes}, {})
    progress.start("evaluation", "games", args.final_episodes)
    evaluation = evaluate(agent, saved, device, args.final_episodes, 2_000_000_000 + args.seed % 10**8, progress)
    progress.finish()
    mean, std = float(np.mean(evaluation.returns)), float(np.std(evaluation.returns))
    result = {
        "env_id": saved.env_id,
        "seed": args.seed,
        "epoch": checkpoint["epoch"],
        "returns": evaluation.returns,
        "mean_return": mean,
        "std_return": std,
        "human_normalized_score": human_normalized(resolve_env_id(saved.env_id)[1], mean),
    }
    path = run_dir / f"eval_{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, result)
    print(f"return {mean:.1f} +- {std:.1f} over {len(evaluation.returns)} games; {path}")
    return result


def dry_run(args: Args) -> None:
    """Print the plan and its cost on this device. Writes nothing."""
    check_args(args)
    set_threads(args)
    device = choose_device(args.device)
    bf16 = choose_bf16(args.precision, device)
    env = make_env(args)
    agent = Agent(int(env.action_space.n), args)
    env.close()
    counts = parameter_counts(agent)
    print_plan(args, make_plan(args, args.first_steps_min), counts, measure_costs(args, device, bf16), device, bf16)


def parse_args(argv: list[str]) -> Args:
    """Command line -> `Args`. Defaults come from the preset, or with --resume from the run that is carried on.

    Raises `BadInput` with one line for whatever does not parse; --help prints and exits.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--preset", default="paper")
    peek.add_argument("--run-dir", default="")
    peek.add_argument("--resume", action="store_true")
    try:
        early, _ = peek.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise BadInput(str(error)) from None
    if early.preset not in PRESETS:
        raise BadInput(f"--preset is {early.preset!r}; it must be one of {', '.join(PRESETS)}")
    default = Args(**PRESETS[early.preset] | {"preset": early.preset})
    if early.resume and early.run_dir and (Path(early.run_dir) / "checkpoint.pt").is_file():
        default = load_args(Path(early.run_dir))
    if {"-h", "--help"} & set(argv):
        tyro.cli(Args, args=["--help"], default=default, prog=Path(__file__).name)  # prints and exits
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            return tyro.cli(Args, args=argv, default=default, prog=Path(__file__).name)
    except SystemExit:
        raise BadInput(first_message(shown.getvalue())) from None


def first_message(box: str) -> str:
    """The message in one of tyro's boxes, as one line: it stands between the title and the help below it."""
    lines = [line.strip(" │|╭╮╰╯") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    text = "\n".join("" if not line.strip("─-") else line for line in lines).strip("\n")
    return " ".join(text.split("\n\n")[0].split()) or "the arguments cannot be read"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 for a failure, 128 + n for signal n."""
    name, signals = Path(__file__).name, StopSignals()
    # TensorBoard writes in a thread; what fails there is raised again by its next call: no traceback needed.
    hook = threading.__excepthook__
    threading.excepthook = lambda failed: None if issubclass(failed.exc_type, OSError) else hook(failed)
    try:
        with signals:
            args = parse_args(sys.argv[1:] if argv is None else argv)
            if args.eval_only:
                eval_only(args)
            elif args.dry_run:
                dry_run(args)
            else:
                train(args, signals)
    except BadInput as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, OSError) as error:  # OSError: a full disk, a folder that is gone
        print(f"{name}: failed: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print(f"{name}: failed: out of memory; try a smaller --batch-size, widths or --total-steps", file=sys.stderr)
        return 1
    except Stopped as stop:
        reason = signal.Signals(signals.signum).name
        print(f"{name}: stopped by {reason}: {str(stop) or 'nothing was begun'}", file=sys.stderr)
        return 128 + signals.signum
    except KeyboardInterrupt:
        print(f"{name}: broken off; --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())

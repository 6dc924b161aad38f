"""Play the game of a run, or play inside its dream: a small web page, and the world model as a gymnasium environment.

    python play.py runs/Pong__...               # prints the address of the page; Ctrl-C ends it
    python play.py runs/Pong__... --port 9000   # where that machine has no screen: ssh -L 9000:127.0.0.1:9000 machine

    from play import DreamEnv
    env = DreamEnv("runs/Pong__...")            # reset() and step() happen in the world model alone

The first start with a run learns a decoder for its dreams, which takes a minute: see play_pictures.py.

Read downward: 1 a trained run, 2 scenes (the real game, the dream), 3 DreamEnv, 4 what one tab plays, 5 the server,
6 the command line. The page is in play_web/; what the server sends it is described above `Session.hello`.

The networks draw from PyTorch's global random generator, which threads share: use a run's environments from one thread,
as the server does, whose one worker thread takes a step of each tab in turn.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import ipaddress
import itertools
import json
import math
import secrets
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import gymnasium as gym
import numpy as np
import torch
from aiohttp import web
from PIL import Image, ImageDraw
from torch import Tensor

import jedi_atari
import play_pictures

FPS = 15  # steps per second at speed 1: the console's 60 frames, 4 to a step
REST = 15  # ticks for which the end of a game or dream stays on the screen
MOST_SAMPLE_STEPS = 10
SPEEDS = (0.1, 4.0)
MOST_TABS = 16
FILM_FRAMES = 60 * FPS  # the longest recording
WEB = Path(__file__).resolve().parent / "play_web"
PAGES = {
    "index.html": "text/html",
    "play.js": "text/javascript",
    "style.css": "text/css",
}  # all that is served


# ======================================================================================================================
# 1. A trained run
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run has learned, ready to play. All tabs share it: nothing in it changes."""

    script: ModuleType  # jedi_atari, jedi_atari_stochastic or a fork of one
    args: jedi_atari.Args
    game: str
    device: torch.device
    agent: jedi_atari.Agent
    decoder: play_pictures.Decoder
    replay: jedi_atari.ReplayBuffer  # the run's own play, to start dreams from
    meanings: tuple[str, ...]  # of the actions: NOOP, UPFIRE, ...
    epoch: int
    steps: int  # of the real game that it was trained on

    def __deepcopy__(self, _memo) -> "Model":
        return self  # gymnasium copies the arguments of its environments


def load_model(run_dir: Path, device: str = "auto", env_id: str = "", threads: int = 0) -> Model:
    """Read a run folder; what is missing for pictures is learned first, a minute. Raises `BadInput` if the folder holds
    no checkpoint, or another game than `env_id`."""
    run = play_pictures.load_run(run_dir, device, threads)
    script, args = run.script, run.args
    gym_id, game = script.resolve_env_id(args.env_id)
    if env_id and script.resolve_env_id(env_id)[0] != gym_id:
        raise jedi_atari.BadInput(
            f"{run_dir} is a run of {args.env_id}, not of {env_id}; drop --env-id {env_id}"
        )
    # A person plays longer than a run that is cut short to save time.
    args = dataclasses.replace(run.args, max_episode_steps=27_000)
    where, meanings = run.agent.norm.mean.device, meanings_of(run.collector.env)
    decoder, replay = play_pictures.decoder_of(run), run.replay
    epoch, steps = run.saved["epoch"], run.saved["collector"]["steps"]
    return Model(script, args, game, where, run.agent, decoder, replay, meanings, epoch, steps)


def meanings_of(env: gym.Env) -> tuple[str, ...]:
    """Names of the actions: Atari's own, or numbers."""
    named = getattr(env.unwrapped, "get_action_meanings", None)
    return tuple(named() if named else (f"ACTION {i}" for i in range(int(env.action_space.n))))


def recorded(
    replay: jedi_atari.ReplayBuffer, index: int, length: int
) -> tuple[np.ndarray, list[int], int]:
    """The frame at `index` after up to `length` - 1 frames of its episode, (k, 64, 64, 3), the k - 1 actions between
    them, and the index. Nothing follows an episode's last frame: it gives the one before."""
    index = min(max(index, 0), replay.size - 1)
    starts = replay.starts[: replay.num_episodes]
    episode = int(torch.searchsorted(starts, index, right=True)) - 1
    start, open_ = int(starts[episode]), replay.open and episode == len(starts) - 1
    if index == start + int(replay.lengths[episode]) - 1 and not open_:
        index -= 1
    first = max(start, index - length + 1)
    frames, actions = replay.frames[first : index + 1], replay.actions[first:index]
    return frames.numpy(), actions.tolist(), index


class Chance:
    """A stream of random numbers of its own. Within `with chance.drawn():` PyTorch's global generator is this stream;
    afterwards it is as it was, so that nobody else's draws are disturbed."""

    def __init__(self, seed: int, device: torch.device):
        self.cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.cuda):
            torch.manual_seed(seed)
            self.states = self.read()

    def read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda)]

    @contextlib.contextmanager
    def drawn(self):
        """Draw from this stream."""
        with torch.random.fork_rng(self.cuda):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.cuda, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self.states = self.read()


# ======================================================================================================================
# 2. Scenes: the real game and the dream, and what the networks make of them
# ======================================================================================================================


class Scene:
    """A game as the networks follow it, a latent at a time: a batch of one.

    `latents` are the last N = context_frames latents, `taken` the N - 1 actions between them. Before a game's first
    frame they are padding, zeros, as in training.
    """

    def __init__(self, model: Model):
        self.model = model
        self.frame: np.ndarray | None = None  # what there is to see
        self.steps, self.score, self.reward = 0, 0.0, 0.0
        self.end = self.over = (
            False  # end: a life lost or the game; over: there is nothing more to play
        )
        self.reward_probs, self.end_prob = (
            [0.0, 1.0, 0.0],
            0.0,
        )  # what R_psi expected of the last step

    @torch.inference_mode()
    def begin(self, frames: np.ndarray, taken: list[int]) -> None:
        """Start from 1 to N frames (k, 64, 64, 3) uint8 and the k - 1 actions between them, as `imagine` does."""
        agent, n = self.model.agent, self.model.args.context_frames
        padding = n - len(frames)
        frames = np.concatenate([np.zeros((padding, *frames.shape[1:]), np.uint8), frames])
        mask = torch.arange(n, device=self.model.device)[None] >= padding
        z = agent.encode(torch.from_numpy(frames)[None].to(self.model.device), mask)
        self.latents, self.taken = list(z.unbind(1)), [0] * padding + taken
        self.policy_state = self.reward_state = None
        if n > 1:
            masked_lstm, burn_in = self.model.script.masked_lstm, mask[:, : n - 1]
            self.policy_state = masked_lstm(agent.policy.lstm, z[:, : n - 1].flatten(2), burn_in)
            features = agent.reward.features(z, self.tensor(self.taken))
            self.reward_state = masked_lstm(agent.reward.lstm, features, burn_in)
        self.look()

    def tensor(self, actions: list[int]) -> Tensor:
        """(1, k)"""
        return torch.tensor([actions], device=self.model.device)

    def look(self) -> None:
        """Let the actor-critic see the newest latent: the action probabilities, and the value."""
        logits, values, self.policy_state = self.model.agent.policy(
            self.latents[-1][:, None], self.policy_state
        )
        self.logits, self.value = logits[:, 0] / self.model.args.temperature, values.item()
        self.action_probs = self.logits.softmax(-1)[0].tolist()

    def follow(self, z: Tensor, action: int) -> None:
        """Let the networks see that `action` led to the latent z (1, 16, 8, 8). Leaves R_psi's logits."""
        reward = self.model.agent.reward
        features = reward.features(torch.stack([self.latents[-1], z], 1), self.tensor([action]))
        hidden, self.reward_state = reward.lstm(features, self.reward_state)
        logits = reward.head(hidden)[:, 0].float()
        self.reward_logits, self.end_logits = logits.split([3, 2], dim=-1)
        self.reward_probs = self.reward_logits.softmax(-1)[0].tolist()
        self.end_prob = self.end_logits.softmax(-1)[0, 1].item()
        self.latents = [*self.latents[1:], z]
        self.taken = [*self.taken, action][1:]
        self.steps += 1
        self.look()

    def agent_action(self) -> int:
        """What the agent does here. Draws from the global generator."""
        return int(self.model.script.sample_categorical(self.logits).item())


class RealGame(Scene):
    """The game itself, in the emulator."""

    def __init__(self, model: Model, seed: int):
        super().__init__(model)
        self.env = model.script.make_env(model.args)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Start a game."""
        super().__init__(self.model)
        self.frame, _ = self.env.reset(seed=seed)
        self.begin(self.frame[None], [])

    @torch.inference_mode()
    def step(self, action: int, _sample_steps: int) -> None:
        """Play one action."""
        self.frame, self.reward, terminated, truncated, info = self.env.step(action)
        self.follow(
            self.model.agent.encode(torch.from_numpy(self.frame)[None].to(self.model.device)),
            action,
        )
        self.score += self.reward
        self.end, self.over = info["end"], terminated or truncated
        if info["stop"] and not self.over:
            # A life is lost: as in training, the world model starts anew; as in evaluation, the policy plays on.
            policy_state, probs = self.policy_state, (self.action_probs, self.value, self.logits)
            self.begin(self.frame[None], [])
            self.policy_state, (self.action_probs, self.value, self.logits) = policy_state, probs


class Dream(Scene):
    """The game as the world model imagines it. Rewards are signs: -1, 0 or 1. Draws from the global generator."""

    def begin(self, frames: np.ndarray, taken: list[int]) -> None:
        """Start from real frames."""
        super().begin(frames, taken)
        self.show()

    def take_over(self, scene: Scene) -> None:
        """Start where another scene stands."""
        for name in (
            "latents",
            "taken",
            "policy_state",
            "reward_state",
            "logits",
            "value",
            "action_probs",
        ):
            setattr(self, name, getattr(scene, name))
        self.show()

    @torch.inference_mode()
    def step(self, action: int, sample_steps: int) -> None:
        """Imagine what follows `action`, with so many denoising steps."""
        model = self.model
        args = dataclasses.replace(model.args, sample_steps=sample_steps)
        context, actions = torch.stack(self.latents, 1), self.tensor([*self.taken, action])
        self.follow(model.script.sample_next_latent(model.agent, context, actions, args), action)
        self.reward = float(model.script.sample_categorical(self.reward_logits).item() - 1)
        self.end = self.over = bool(model.script.sample_categorical(self.end_logits).item())
        self.score += self.reward
        self.show()

    def show(self) -> None:
        """Decode the newest latent."""
        self.frame = self.model.decoder.pictures(self.latents[-1])[0]


# ======================================================================================================================
# 3. The world model as a gymnasium environment
# ======================================================================================================================


class DreamEnv(gym.Env):
    """The dream of a run. Observations are its decoded frames, 64 x 64 x 3 uint8; rewards are -1, 0 or 1.

    `reset` starts from frames of the run's recorded play, drawn by the seed, or ending with the frame number
    `options["frame"]`. `terminated` is drawn from the model's own prediction of an end; `truncated` after `max_steps`.
    The same seed and actions give the same dream.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        run: Model | Path | str,
        max_steps: int = 1_000,
        sample_steps: int | None = None,
        render_mode: str | None = None,
        device: str = "auto",
    ):
        self.model = run if isinstance(run, Model) else load_model(Path(run), device)
        self.max_steps, self.render_mode = max_steps, render_mode
        self.sample_steps = sample_steps or self.model.args.sample_steps
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.model.meanings))
        self.dream: Dream | None = None

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start a dream."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.model.replay.size))
        self.chance = Chance(int(self.np_random.integers(2**63)), self.model.device)
        index, n = (options or {}).get("frame", drawn), self.model.args.context_frames
        frames, taken, index = recorded(self.model.replay, index, n)
        self.dream = Dream(self.model)
        self.dream.begin(frames, taken)
        return self.dream.frame, {"frame": index}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Imagine one step."""
        if self.dream is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        with self.chance.drawn():
            self.dream.step(int(action), self.sample_steps)
        truncated = not self.dream.over and self.dream.steps >= self.max_steps
        info = {
            "reward_probs": self.dream.reward_probs,
            "end_prob": self.dream.end_prob,
            "value": self.dream.value,
        }
        return self.dream.frame, self.dream.reward, self.dream.over, truncated, info

    def render(self) -> np.ndarray | None:
        """The frame."""
        return self.dream.frame if self.render_mode and self.dream else None


gym.register(
    "JediDream-v0", entry_point="play:DreamEnv"
)  # gymnasium.make("play:JediDream-v0", run="runs/...")


# ======================================================================================================================
# 4. What one tab plays
# ======================================================================================================================

KEYS = ("up", "down", "left", "right", "fire")


def keys_of(meaning: str) -> frozenset[str]:
    """The keys of an action: UPRIGHTFIRE -> up, right, fire; NOOP -> none."""
    return frozenset(key for key in KEYS if key.upper() in meaning)


def choose_action(
    meanings: tuple[str, ...], held: frozenset[str], fresh: frozenset[str] = frozenset()
) -> int:
    """The action that fits the held keys best: most of them, least beside them; then what was pressed just now
    (`fresh`), so that a tap on fire counts while an arrow is held; then a direction rather than fire."""
    offered = [keys_of(meaning) for meaning in meanings]
    known = frozenset().union(*offered)
    if not known & {"up", "down"}:  # Pong's paddle goes up with RIGHT and down with LEFT
        turned = {"up": "right", "down": "left"}
        held, fresh = (frozenset(turned.get(key, key) for key in keys) for keys in (held, fresh))
    for pair in ({"up", "down"}, {"left", "right"}):
        if pair <= held:
            held -= pair
    held &= known

    def fit(i: int) -> tuple[int, ...]:
        keys = offered[i]
        return len(keys & held), -len(keys - held), len(keys & fresh), len(keys - {"fire"}), -i

    return max(range(len(offered)), key=fit)


class BadCommand(ValueError):
    """A message that no page of ours sends."""


class Shot(NamedTuple):
    """One picture of a recording."""

    picture: np.ndarray  # (h, w, 3) uint8
    text: str
    reward: float
    end: bool


class Session:
    """The game and the dream of one tab. Its methods run in the worker thread."""

    def __init__(self, model: Model, seed: int):
        self.model = model
        self.chance, self.rng = Chance(seed, model.device), np.random.default_rng(seed)
        self.scene: Scene = RealGame(model, seed)
        self.game, self.dream = self.scene, None
        self.mode, self.player = "game", "human"
        self.paused, self.speed = False, 1.0
        self.sample_steps = min(model.args.sample_steps, MOST_SAMPLE_STEPS)
        self.held: frozenset[str] = frozenset()  # keys that are down
        self.fresh: frozenset[str] = (
            frozenset()
        )  # keys pressed since the last step, even if they are up again
        self.number: int | None = None  # an action chosen by its number
        self.fresh_number: int | None = None  # one chosen since the last step
        self.action: int | None = None  # the last one
        self.start: int | None = (
            None  # frame of the replay that the dream began with; None: the real game
        )
        self.rest = 0  # ticks since the end
        self.recording: list[Shot] | None = None
        self.film: list[Shot] | None = None  # a finished recording that nobody has fetched

    def close(self) -> None:
        self.game.env.close()

    # --- what the page asks for: a method for each command

    def hold(self, value: dict) -> None:
        """Keys went down or up: {"keys": those that are down, "action": number or None}."""
        keys, number = (
            frozenset(value["keys"]),
            None if value["action"] is None else int(value["action"]),
        )
        if not keys <= set(KEYS) or number not in (None, *range(len(self.model.meanings))):
            raise BadCommand("there is no such key")
        self.fresh |= keys - self.held
        self.held, self.number = keys, number
        self.fresh_number = self.fresh_number if number is None else number

    def do_mode(self, value: str) -> None:
        """Switch between game and dream. The dream takes over where the game stands; the game waits meanwhile."""
        if value not in ("game", "dream"):
            raise BadCommand("the mode is game or dream")
        if value == self.mode:
            return
        self.mode, self.rest, self.action = value, 0, None
        if value == "game":
            self.scene = self.game
        elif self.game.over:
            self.dream_from(int(self.rng.integers(self.model.replay.size)))
        else:
            self.scene = self.dream = Dream(self.model)
            self.dream.take_over(self.game)
            self.start = None

    def do_player(self, value: str) -> None:
        if value not in ("human", "agent"):
            raise BadCommand("the player is human or agent")
        self.player = value

    def do_pause(self, value: bool) -> None:
        self.paused = bool(value)

    def do_step(self, _value: None) -> None:
        """A single step; pauses."""
        self.paused = True
        if self.scene.over:
            self.rest = REST  # it has been seen by now
        self.advance()

    def do_speed(self, value: float) -> None:
        self.speed = min(
            max(SPEEDS[0], float(value)), SPEEDS[1]
        )  # in this order nan turns into the slowest

    def do_sampling(self, value: int) -> None:
        self.sample_steps = min(max(int(value), 1), MOST_SAMPLE_STEPS)

    def do_restart(self, _value: None) -> None:
        """A new game, or a dream from anywhere in the replay."""
        self.rest, self.action = 0, None
        if self.mode == "game":
            self.game.reset()
        else:
            self.dream_from(int(self.rng.integers(self.model.replay.size)))

    def do_dream_from(self, value: int) -> None:
        """A dream that starts with a frame of the replay."""
        self.mode, self.rest, self.action = "dream", 0, None
        self.dream_from(int(value))

    def do_record(self, value: bool) -> None:
        """Begin a recording, or end it."""
        if value and self.recording is None:
            self.recording = []
            self.note()
        elif not value and self.recording is not None:
            self.recording, self.film = None, self.recording

    # --- playing

    def dream_from(self, index: int) -> None:
        replay, n = self.model.replay, self.model.args.context_frames
        frames, taken, self.start = recorded(replay, index, n)
        self.scene = self.dream = Dream(self.model)
        self.dream.begin(frames, taken)

    def choose(self) -> int:
        """The next action, of the agent or of the keys."""
        fresh, self.fresh = self.fresh, frozenset()
        number, self.fresh_number = self.fresh_number, None
        if self.player == "agent":
            return self.scene.agent_action()
        if self.number is not None or number is not None:
            return number if self.number is None else self.number
        return choose_action(self.model.meanings, self.held | fresh, fresh)

    def tick(self) -> bytes | None:
        """Go on, unless a pause was asked for while this tick waited for its turn."""
        return None if self.paused else self.advance()

    def advance(self) -> bytes | None:
        """A step, or a moment's rest after an end, then a new start. Returns what to show, if it is new."""
        if not self.scene.over:
            with self.chance.drawn():
                self.action = self.choose()
                self.scene.step(self.action, self.sample_steps)
        elif self.rest < REST:
            self.rest += 1
            return None
        else:
            self.do_restart(None)
        self.note()
        return self.view()

    def note(self) -> None:
        """Add what is shown to the recording; end it when it is long enough."""
        if self.recording is None:
            return
        scene = self.scene
        name = "real game" if self.mode == "game" else "dream"
        text = f"{name}, step {scene.steps}"
        self.recording.append(Shot(scene.frame, text, scene.reward, scene.end))
        if len(self.recording) >= FILM_FRAMES:
            self.do_record(False)

    def latents(self) -> np.ndarray:
        """The newest latent (16, 8, 8) int8; 127 is three times the standard deviation that latents should have."""
        z = self.scene.latents[-1][0] / (3 * self.model.args.sigma_data)
        return (z.clamp(-1, 1) * 127).round().to(torch.int8).cpu().numpy()

    # --- what the page is shown
    # A binary message is: its kind (1 byte), the length of a header (4 bytes, little endian), the header (JSON), bytes.

    def hello(self) -> bytes:
        """What does not change."""
        model = self.model
        about = {
            "game": model.game,
            "actions": model.meanings,
            "replay": model.replay.size,
            "trained_steps": model.steps,
            "epoch": model.epoch,
            "chance": hasattr(model.args, "sticky_prob"),
            "fps": FPS,
            "speeds": SPEEDS,
            "most_sampling": MOST_SAMPLE_STEPS,
        }
        return pack("hello", about)

    def view(self) -> bytes:
        """The present moment: state, frame (12,288 bytes), latents (1,024 bytes)."""
        scene = self.scene
        state = {
            "mode": self.mode,
            "player": self.player,
            "paused": self.paused,
            "speed": self.speed,
            "sampling": self.sample_steps,
            "recording": None if self.recording is None else len(self.recording),
            "start": self.start,
            "step": scene.steps,
            "score": scene.score,
            "reward": scene.reward,
            "end": scene.end,
            "over": scene.over,
            "action": self.action,
            "probs": [number(p) for p in scene.action_probs],
            "value": number(scene.value),
            "reward_probs": [number(p) for p in scene.reward_probs],
            "end_prob": number(scene.end_prob),
        }
        return pack("view", state, scene.frame.tobytes(), self.latents().tobytes())

    def preview(self, value: int) -> bytes:
        """A frame of the replay."""
        frames, _, index = recorded(self.model.replay, int(value), 1)
        return pack("preview", {"index": index}, frames[-1].tobytes())


KINDS = ("hello", "view", "preview", "film", "error")


def pack(kind: str, header: dict, *parts: bytes) -> bytes:
    """A message to the page."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack("<BI", KINDS.index(kind), len(text)) + text + b"".join(parts)


def number(x: float) -> float | None:
    """Rounded; None where there is no number, which JSON does not know."""
    return round(x, 4) if math.isfinite(x) else None


def make_gif(film: list[Shot]) -> bytes:
    """An animated GIF, four times enlarged, at the game's speed, with what happened above the picture."""
    size, head = 4 * jedi_atari.IMAGE_SIZE, 28

    def draw(shot: Shot) -> Image.Image:
        sheet = Image.new("RGB", (size, size + head), "white")
        sheet.paste(play_pictures.enlarged(shot.picture, 4), (0, head))
        pen = ImageDraw.Draw(sheet)
        _, colour = play_pictures.event(int(np.sign(shot.reward)), shot.end)
        events = [f"{shot.reward:+g}"] * bool(shot.reward) + ["end"] * shot.end
        pen.text((4, 6), shot.text, "black", font_size=15)
        pen.text((size - 4, 5), ", ".join(events), colour, font_size=16, anchor="ra")
        return sheet

    # A GIF counts in hundredths of a second: 7 + 7 + 6 of them are three steps of 1 / 15 s.
    milliseconds = [(70, 70, 60)[i % 3] for i in range(len(film))]
    return play_pictures.gif(map(draw, film), milliseconds)


# ======================================================================================================================
# 5. The server
# ======================================================================================================================


class Outbox:
    """What waits to be sent to one tab. Only the newest few views and letters are kept: a slow tab misses some, and
    holds up neither its own game nor anyone else."""

    def __init__(self) -> None:
        self.views: collections.deque[bytes] = collections.deque(maxlen=3)
        self.letters: collections.deque[bytes] = collections.deque(maxlen=8)
        self.filled = asyncio.Event()

    def put(self, message: bytes | None, letter: bool = False) -> None:
        if message is not None:
            (self.letters if letter else self.views).append(message)
            self.filled.set()

    async def get(self) -> bytes:
        await self.filled.wait()
        message = (self.letters or self.views).popleft()
        if not (self.letters or self.views):
            self.filled.clear()
        return message


class Tab:
    """One open page: its session, the tasks that play and send, and what waits to be sent."""

    def __init__(self, server: "Server", ws: web.WebSocketResponse):
        self.server, self.ws, self.outbox, self.going = server, ws, Outbox(), asyncio.Event()
        self.films: set[asyncio.Task] = set()
        self.session: Session | None = None

    async def live(self) -> None:
        """Serve the page until it is closed, in whatever way."""
        work = self.server.work
        self.session = await work(Session, self.server.model, self.server.next_seed())
        tasks = []
        try:
            self.outbox.put(self.session.hello(), letter=True)
            self.outbox.put(await work(self.session.view))
            self.going.set()
            tasks = [asyncio.create_task(self.reported(job)) for job in (self.send, self.play)]
            await self.reported(self.listen)
        finally:
            for task in (*tasks, *self.films):
                task.cancel()
            await asyncio.gather(*tasks, *self.films, return_exceptions=True)
            await work(self.session.close)

    async def reported(self, job, *arguments) -> None:
        """Do a job; what goes wrong in it ends this tab alone, and is said on the page and on the terminal."""
        try:
            await job(*arguments)
        except (ConnectionError, aiohttp.ClientError):
            await self.ws.close()  # the page is gone
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            text = f"{type(error).__name__}; the terminal of play.py says more"
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await self.ws.send_bytes(pack("error", {"text": text}))
            await self.ws.close()

    async def send(self) -> None:
        """Send what waits, as fast as the page takes it."""
        while True:
            await self.ws.send_bytes(await self.outbox.get())

    async def play(self) -> None:
        """A tick of the session 15 times a second, times its speed, while it is not paused."""
        clock, due = asyncio.get_running_loop().time, 0.0
        while True:
            await self.going.wait()
            await asyncio.sleep(due - clock())
            if not self.going.is_set():
                continue
            begun, interval = clock(), 1 / (FPS * self.session.speed)
            self.outbox.put(await self.server.work(self.session.tick))
            self.send_film()
            # What was late by less than a step is caught up with; what was later is let go.
            due = (due if begun - due < interval else begun) + interval

    async def listen(self) -> None:
        """Do what the page asks for."""
        async for message in self.ws:
            if message.type != aiohttp.WSMsgType.TEXT:
                break
            try:
                await self.obey(json.loads(message.data))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                self.outbox.put(
                    pack("error", {"text": "the page sent a command that makes no sense"}),
                    letter=True,
                )

    async def obey(self, command: dict) -> None:
        """One command: {"do": its name, "value": ...}."""
        session, work, name, value = (
            self.session,
            self.server.work,
            command["do"],
            command.get("value"),
        )
        if name == "hold":
            await work(session.hold, value)
            return
        if name == "preview":
            self.outbox.put(await work(session.preview, value), letter=True)
            return
        if name not in (
            "mode",
            "player",
            "pause",
            "step",
            "speed",
            "sampling",
            "restart",
            "dream_from",
            "record",
        ):
            raise BadCommand("there is no such command")
        await work(getattr(session, f"do_{name}"), value)
        self.outbox.put(await work(session.view))
        self.send_film()
        (self.going.clear if session.paused else self.going.set)()

    def send_film(self) -> None:
        """Make a GIF of a finished recording and send it, beside the playing."""
        film, self.session.film = self.session.film, None
        if film:
            task = asyncio.create_task(self.reported(self.film, film))
            self.films.add(task)
            task.add_done_callback(self.films.discard)

    async def film(self, film: list[Shot]) -> None:
        async with self.server.one_film:
            gif = await asyncio.to_thread(make_gif, film)
        self.outbox.put(pack("film", {"frames": len(film)}, gif), letter=True)


class Server:
    """Serves the page and plays with each open tab. One worker thread runs the networks and emulators of them all, a
    step at a time in the order in which they ask, so that the event loop is always free."""

    def __init__(
        self, model: Model, token: str, host: str = "127.0.0.1", threads: int = 0, seed: int = 0
    ):
        self.model, self.token, self.host = model, token, host
        self.seeds = itertools.count(seed)
        self.tabs: set[Tab] = set()
        self.one_film = asyncio.Semaphore(1)  # a film takes memory
        # The number of threads is set in the worker: PyTorch keeps it per thread.
        setup = dict(initializer=torch.set_num_threads, initargs=(threads,)) if threads else {}
        self.worker = concurrent.futures.ThreadPoolExecutor(1, "worker", **setup)

    def next_seed(self) -> int:
        return next(self.seeds)

    async def work(self, function, *arguments):
        """Run a function in the worker thread."""
        job = functools.partial(function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self.worker, job)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard])
        app.router.add_get("/{token}", self.add_slash)
        app.router.add_get("/{token}/socket", self.socket)
        app.router.add_get("/{token}/{file:[a-z.]*}", self.page)
        app.on_shutdown.append(self.close_tabs)
        app.on_cleanup.append(self.stop_worker)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler) -> web.StreamResponse:
        """Refuse whoever has no token, and whoever came by a name that is not this machine's: a page elsewhere could
        have its own name point here."""
        token = request.match_info.get("token", "")
        if not (
            own_host(request.host, self.host)
            and secrets.compare_digest(token.encode(), self.token.encode())
        ):
            raise web.HTTPForbidden(text="403: open the address that play.py printed, all of it")
        return await handler(request)

    async def add_slash(self, _request: web.Request) -> web.Response:
        raise web.HTTPFound(f"/{self.token}/")  # the page's own links begin there

    async def page(self, request: web.Request) -> web.Response:
        """One of the page's three files."""
        name = request.match_info["file"] or "index.html"
        if name not in PAGES:
            raise web.HTTPNotFound
        headers = {
            "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",  # the address holds the token
            "Cache-Control": "no-store",
        }
        return web.Response(
            body=(WEB / name).read_bytes(),
            content_type=PAGES[name],
            charset="utf-8",
            headers=headers,
        )

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        """The life of a tab. Browsers name the page that opens a socket; another one's is refused."""
        if request.headers.get("Origin") not in (
            f"http://{request.host}",
            f"https://{request.host}",
        ):
            raise web.HTTPForbidden(text="403: this socket is for the page of play.py")
        if len(self.tabs) >= MOST_TABS:
            raise web.HTTPServiceUnavailable(text=f"503: {MOST_TABS} tabs are open already")
        ws = web.WebSocketResponse(heartbeat=20, max_msg_size=4096)
        tab = Tab(self, ws)
        self.tabs.add(tab)
        try:
            await ws.prepare(request)
            await tab.live()
        finally:
            self.tabs.discard(tab)
        return ws

    async def close_tabs(self, _app: web.Application) -> None:
        going_away = aiohttp.WSCloseCode.GOING_AWAY
        await asyncio.gather(
            *(tab.ws.close(code=going_away) for tab in self.tabs), return_exceptions=True
        )

    async def stop_worker(self, _app: web.Application) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)


def own_host(header: str, listening: str) -> bool:
    """Whether a Host header names this machine: by a number, as localhost, by the name it was told to listen on, or,
    if it is open to others, by its own name. The port is free: ssh may have moved it."""
    names = {"localhost", listening.lower()} | (
        set() if is_loopback(listening) else {socket.gethostname().lower()}
    )
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:  # no address at all
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in names


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int, tries: int = 20) -> socket.socket:
    """A socket that listens on `port` or, if that is taken, on the next free one. Raises `BadInput`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + tries, 65_536)):
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise jedi_atari.BadInput(
                    f"cannot listen on {host} port {candidate}: {error.strerror}"
                ) from None
            print(f"port {candidate} is taken, trying the next")
    raise jedi_atari.BadInput(f"ports {port} to {candidate} are all taken; choose another --port")


async def serve(model: Model, options: argparse.Namespace) -> None:
    """Listen until a signal says to stop."""
    sock = listen(options.host, options.port)
    port = sock.getsockname()[1]
    server = Server(model, secrets.token_urlsafe(16), options.host, options.threads, options.seed)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=2)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(
            NotImplementedError
        ):  # Windows: Ctrl-C raises KeyboardInterrupt instead
            loop.add_signal_handler(signum, stop.set)
    announce(model, server, port)
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def announce(model: Model, server: Server, port: int) -> None:
    """Say what there is to play and where."""
    print(f"game     {model.game}, after {model.steps:,} steps of training play")
    print(f"dream    starts from any of {model.replay.size:,} frames of that play")
    name = f"[{server.host}]" if ":" in server.host else server.host
    if server.host in ("0.0.0.0", "::"):
        name = socket.gethostname()
    print(f"open     http://{name}:{port}/{server.token}/")
    if is_loopback(server.host):
        tunnel = f"ssh -L {port}:{name}:{port} {socket.gethostname()}"
        print(f"         from another machine: {tunnel}, then the same address there")
    else:
        print(
            "         whoever can reach this machine and sees the address can play too; it is not encrypted"
        )
    print("Ctrl-C ends it", flush=True)


# ======================================================================================================================
# 6. The command line
# ======================================================================================================================


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises `BadInput`."""
    parser = play_pictures.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "run_dir", type=Path, help="folder of a run of jedi_atari.py or jedi_atari_stochastic.py"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network"
    )
    parser.add_argument("--port", type=int, default=8000, help="if it is taken, the next free one")
    parser.add_argument("--env-id", default="", help="the game that the run must be of")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of PyTorch; 0: all cores"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first tab's game and dreams; the next has the next",
    )
    options = parser.parse_args(argv)
    for name, low, high in (("port", 0, 65_535), ("threads", 0, 1_024), ("seed", 0, 2**31 - 1)):
        value = getattr(options, name)
        if not low <= value <= high:
            raise jedi_atari.BadInput(
                f"--{name} is {value}; it must be at least {low} and at most {high}"
            )
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when it was stopped, 2 for bad input."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        where = (options.run_dir, options.device, options.env_id, options.threads)
        asyncio.run(serve(load_model(*where), options))
    except jedi_atari.BadInput as error:
        print(f"play.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

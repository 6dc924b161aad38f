"""What one open page plays: the game, its dream, or both with the same keys."""

import json
import math
import struct

import numpy as np
import torch

from play.pictures import Shot
from play.runs import Run
from play.scenes import FPS, Chance, Dream, RealGame, Scene, recorded

REST = 15  # ticks for which the end of a game or dream stays on the screen
BREATH = 4  # ... and the last picture of a dream that has its length
MAX_SAMPLE_STEPS = 10
SPEEDS = (0.1, 4.0)
LENGTHS = (1, 500)  # of a dream, in steps
FILM_FRAMES = 60 * FPS  # the longest recording
KEYS = ("up", "down", "left", "right", "fire")
KINDS = ("hello", "view", "preview", "film", "error")  # of messages to the page


def keys_of(meaning: str) -> frozenset[str]:
    """The keys of an action: UPRIGHTFIRE -> up, right, fire; NOOP -> none."""
    return frozenset(key for key in KEYS if key.upper() in meaning)


def choose_action(
    meanings: tuple[str, ...], held: frozenset[str], fresh: frozenset[str] = frozenset()
) -> int:
    """The action that fits the held keys best: most of them, least beside them; then what was
    pressed just now (`fresh`), so that a tap on fire counts while an arrow is held; then a
    direction rather than fire."""
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


def key_actions(meanings: tuple[str, ...]) -> dict[str, str]:
    """What each key does in this game, {"up": "RIGHT", ...}; none of two keys that do the same."""
    found, idle = {}, meanings[choose_action(meanings, frozenset())]
    for key in KEYS:
        meaning = meanings[choose_action(meanings, frozenset({key}))]
        if meaning not in (idle, *found.values()):
            found[key] = meaning
    return found


class BadCommand(ValueError):
    """A message that no page of ours sends."""


class Session:
    """The game and the dream of one tab. Its methods run in the worker thread."""

    def __init__(self, run: Run, seed: int):
        self.run = run
        self.chance, self.rng = Chance(seed, run.device), np.random.default_rng(seed)
        self.game, self.dream = RealGame(run, seed), Dream(run)
        self.mode, self.player = "both", "human"
        self.paused, self.speed, self.screen = True, 1.0, False
        self.sample_steps = min(run.args.sample_steps, MAX_SAMPLE_STEPS)
        self.length = len(run.open_loop) or 15  # of a dream: as far as its error was measured
        self.held = self.fresh = frozenset()  # keys that are down; pressed since the last step
        self.number = self.fresh_number = None  # an action chosen by its number, likewise
        self.action: int | None = None  # the last one
        self.start: int | None = None  # frame of the replay that the dream began with, or the game
        self.rest = dict(game=0, dream=0)  # ticks since the end
        self.recording: list[list[Shot]] | None = None
        self.film: list[list[Shot]] | None = None  # a finished recording that nobody has fetched
        self.dream.take_over(self.game)

    def close(self) -> None:
        self.game.env.close()

    @property
    def shown(self) -> dict[str, Scene]:
        """What is played now: game, dream or both."""
        scenes = dict(game=self.game, dream=self.dream)
        return scenes if self.mode == "both" else {self.mode: scenes[self.mode]}

    @property
    def lead(self) -> Scene:
        """The scene that the agent acts in, and whose insides are shown: the game, while it goes on
        and is shown."""
        scenes = list(self.shown.values())
        return next((scene for scene in scenes if not scene.over), scenes[0])

    # ---- what the page asks for: a method for each command

    def hold(self, value: dict) -> None:
        """Keys went down or up: {"keys": those that are down, "action": number or None}."""
        keys, number = frozenset(value["keys"]), value["action"]
        number = None if number is None else int(number)
        if not keys <= set(KEYS) or number not in (None, *range(len(self.run.meanings))):
            raise BadCommand("there is no such key")
        self.fresh |= keys - self.held
        self.held, self.number = keys, number
        self.fresh_number = self.fresh_number if number is None else number

    def do_mode(self, value: list[str]) -> None:
        """[both, game or dream; human or agent]. A dream that is shown again begins where the game
        stands; a game that is hidden waits."""
        mode, player = value
        if mode not in ("both", "game", "dream") or player not in ("human", "agent"):
            raise BadCommand("there is no such mode")
        before, self.mode, self.player = self.mode, mode, player
        if self.game.over and mode == "both":
            self.do_restart(None)
        elif "dream" in self.shown and before != mode:
            self.dream_anew(from_game=not self.game.over)

    def do_pause(self, value: bool) -> None:
        self.paused = bool(value)

    def do_step(self, _value: None) -> None:
        """A single step; pauses."""
        self.paused = True
        self.rest = dict(game=REST, dream=REST)  # an end has been seen by now
        self.advance()

    def do_speed(self, value: float) -> None:
        # In this order nan turns into the slowest.
        self.speed = min(max(SPEEDS[0], float(value)), SPEEDS[1])

    def do_sampling(self, value: int) -> None:
        self.sample_steps = min(max(int(value), 1), MAX_SAMPLE_STEPS)

    def do_length(self, value: int) -> None:
        self.length = min(max(int(value), LENGTHS[0]), LENGTHS[1])

    def do_screen(self, value: bool) -> None:
        """Whether the real game is sent at its own size, too."""
        self.screen = bool(value)

    def do_restart(self, _value: None) -> None:
        """A new game; a dream of it or, alone, from anywhere in the replay."""
        self.action = None
        if self.mode != "dream":
            self.game.reset()
            self.rest["game"] = 0
        if self.mode != "game":
            self.dream_anew()

    def do_dream_from(self, value: int) -> None:
        """A dream that starts with a frame of the replay."""
        index = int(value)
        self.mode, self.action = "dream", None
        self.dream_from(index)

    def do_record(self, value: bool) -> None:
        """Begin a recording, or end it."""
        if value and self.recording is None:
            self.recording = []
            self.note()
        elif not value and self.recording is not None:
            self.recording, self.film = None, self.recording

    # ---- playing

    def dream_anew(self, from_game: bool = False) -> None:
        """Begin the dream again: where the game stands if that is shown, else in recorded play."""
        if from_game or self.mode == "both":
            self.dream, self.start, self.rest["dream"] = Dream(self.run), None, 0
            self.dream.take_over(self.game)
        else:
            self.dream_from(int(self.rng.integers(self.run.replay.size)))

    def dream_from(self, index: int) -> None:
        """Begin the dream with a frame of the replay."""
        frames, taken, self.start = recorded(self.run.replay, index, self.run.args.context_frames)
        self.dream, self.rest["dream"] = Dream(self.run), 0
        self.dream.begin(frames, taken)

    def choose(self) -> int:
        """The next action, of the agent or of the keys."""
        fresh, self.fresh = self.fresh, frozenset()
        number, self.fresh_number = self.fresh_number, None
        if self.player == "agent":
            return self.lead.agent_action()
        if self.number is not None or number is not None:
            return number if self.number is None else self.number
        return choose_action(self.run.meanings, self.held | fresh, fresh)

    def tick(self) -> bytes | None:
        """Go on, unless a pause was asked for while this tick waited for its turn."""
        return None if self.paused else self.advance()

    def ended(self, name: str) -> bool:
        """Whether a scene has nothing more to play."""
        return self.shown[name].over or (name == "dream" and self.dream.steps >= self.length)

    def advance(self) -> bytes | None:
        """A step of what is shown; what has ended rests a moment, then begins anew. Returns what to
        show, if it is new."""
        playing = [name for name in self.shown if not self.ended(name)]
        with self.chance.drawn():
            if playing:
                self.action = self.choose()
            if "game" in playing:
                self.game.step(self.action)
            if "dream" in playing:
                self.dream.step(self.action, self.sample_steps)
        due = []
        for name, scene in self.shown.items():
            self.rest[name] = 0 if name in playing else self.rest[name] + 1
            due += [name] * (self.rest[name] > (REST if scene.over else BREATH))
        if "game" in due:
            self.game.reset()
        elif self.mode == "both" and self.game.over:
            due = []  # the dream waits for the next game
        if due and "dream" in self.shown:
            self.dream_anew()
        self.rest |= dict.fromkeys(due, 0)
        if not (playing or due):
            return None
        self.note()
        return self.view()

    def note(self) -> None:
        """Add what is shown to the recording; end it when it is long enough."""
        if self.recording is None:
            return
        names = dict(game="real game", dream=f"dream, step {self.dream.steps}")
        shots = [Shot(x.frame, names[name], x.reward, x.end) for name, x in self.shown.items()]
        self.recording.append(shots)
        if len(self.recording) >= FILM_FRAMES:
            self.do_record(False)

    # ---- what the page is shown
    # A binary message: its kind (1 byte), the length of a header (4 bytes, little endian), the
    # header (JSON), bytes.

    def hello(self) -> bytes:
        """What does not change."""
        run, screen = self.run, self.game.screen()
        return pack(
            "hello",
            dict(
                game=run.game, about=run.about, actions=run.meanings,
                keys=key_actions(run.meanings), replay=run.replay.size, fps=FPS,
                chance=hasattr(run.args, "sticky_prob"),
                open_loop=[number(x) for x in run.open_loop], speeds=SPEEDS, lengths=LENGTHS,
                max_sampling=MAX_SAMPLE_STEPS, latent_shape=run.script.LATENT_SHAPE,
                screen=None if screen is None else screen.shape[:2],
            ),
        )  # fmt: skip

    def view(self) -> bytes:
        """The present moment: state, and the pictures that it names with their sizes in bytes."""
        lead, parts = self.lead, {}
        probs = lead.logits.softmax(-1)[0].tolist()
        state = dict(
            mode=self.mode, player=self.player, paused=self.paused, speed=self.speed,
            sampling=self.sample_steps, length=self.length, screen=self.screen, start=self.start,
            recording=None if self.recording is None else len(self.recording), action=self.action,
            value=number(lead.value), probs=[number(p) for p in probs],
            reward_probs=[number(p) for p in lead.reward_probs], end_prob=number(lead.end_prob),
        )  # fmt: skip
        for name, scene in self.shown.items():
            parts[name] = scene.frame.tobytes()
            state[name] = dict(
                step=scene.steps, score=scene.score, reward=scene.reward, end=scene.end,
                over=scene.over, done=self.ended(name),
            )  # fmt: skip
        # int8; 127 is three times the standard deviation that latents should have.
        z = lead.latents[-1][0] / (3 * self.run.args.sigma_data)
        parts["latents"] = (z.clamp(-1, 1) * 127).round().to(torch.int8).cpu().numpy().tobytes()
        if self.screen and "game" in parts and (screen := self.game.screen()) is not None:
            parts["screen"] = screen.tobytes()
        state["parts"] = {name: len(part) for name, part in parts.items()}
        return pack("view", state, *parts.values())

    def preview(self, value: int) -> bytes:
        """A frame of the replay."""
        frames, _, index = recorded(self.run.replay, int(value), 1)
        return pack("preview", {"index": index}, frames[-1].tobytes())


def pack(kind: str, header: dict, *parts: bytes) -> bytes:
    """A message to the page."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack("<BI", KINDS.index(kind), len(text)) + text + b"".join(parts)


def number(x: float) -> float | None:
    """Rounded; None where there is no number, which JSON does not know."""
    return round(x, 4) if math.isfinite(x) else None

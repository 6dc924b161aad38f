"""A trained run: its script, its networks, its play, and a decoder that makes pictures of latents.

JEDI has no decoder. This one is learned afterwards, from the run's own play and its frozen encoder,
for people only, and kept in the run folder as decoder.pt.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import sys
import time
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import jedi_atari
from jedi_atari import BadInput, progress, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SHOWCASE = Path(__file__).resolve().parent / "showcase"  # what is played where no run is named
NEEDED = (
    "Args BadInput Collector LATENT_SHAPE ReplayBuffer make_env masked_lstm open_loop set_up"
    " resolve_env_id sample_categorical sample_next_latent"
).split()  # of a script


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has learned and played. All that play with it share it: nothing in it changes."""

    folder: Path
    script: ModuleType  # jedi_atari, jedi_atari_stochastic or a fork of one
    args: jedi_atari.Args
    agent: jedi_atari.Agent  # frozen
    saved: dict  # its checkpoint
    collector: jedi_atari.Collector  # of a game that has just begun

    def __deepcopy__(self, _memo) -> "Run":
        return self  # gymnasium copies the arguments of its environments

    @property
    def game(self) -> str:
        """Short name."""
        return self.script.resolve_env_id(self.args.env_id)[1]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.agent.norm.mean.device

    @functools.cached_property
    def replay(self) -> jedi_atari.ReplayBuffer:
        """Its play, had back from the actions in the checkpoint: 100k steps take half a minute."""
        size, cpu = len(self.saved["collector"]["actions"]) + 1_000, torch.device("cpu")
        replay = self.script.ReplayBuffer(size, cpu)
        try:
            collector = self.script.Collector(self.args)
            collector.load_state_dict(self.saved["collector"], replay)
        except BadInput as error:  # another emulator than the run's: still its game
            print(f"not quite the run's own play: {error}")
        return replay

    @functools.cached_property
    def decoder(self) -> "Decoder":
        """decoder.pt or, if there is none for this encoder, one that is learned now and kept."""
        return decoder_of(self)

    @functools.cached_property
    def meanings(self) -> tuple[str, ...]:
        """Names of the actions: Atari's own (NOOP, UPFIRE, ...), or numbers."""
        env = self.collector.env
        named = getattr(env.unwrapped, "get_action_meanings", None)
        return tuple(named() if named else (f"ACTION {i}" for i in range(env.action_space.n)))

    @functools.cached_property
    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl; if it is missing or cut, those in the checkpoint: most."""
        keys = {"epoch", "charts/env_steps"}
        for read in ((self.folder / "metrics.jsonl").read_text, lambda: self.saved["metrics"]):
            with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
                rows = [json.loads(line) for line in read().splitlines()]
                rows = [{k: float(v) for k, v in row.items()} for row in rows]
                return [row for row in rows if row.keys() >= keys]
        return []

    @property
    def open_loop(self) -> list[float]:
        """Prediction error / error of predicting no change, 1, 2, ... imagined steps ahead, as it
        was last measured; empty if it never was."""
        for row in reversed(self.metrics):
            if found := [row[k] for i in range(1_000) if (k := f"wm/open_loop_ratio_{i}") in row]:
                return found
        return []

    @functools.cached_property
    def about(self) -> str:
        """Preset, seed, steps and date."""
        there = (self.folder / name for name in ("checkpoint.pt", "checkpoint.prev.pt"))
        newest = max((path.stat().st_mtime for path in there if path.exists()), default=0)
        date = time.strftime("%Y-%m-%d", time.localtime(newest))
        steps = self.saved["collector"]["steps"]
        text = f"preset {self.args.preset}, seed {self.args.seed}, {steps:,} steps of play, {date}"
        return self.saved.get("about", text)  # the showcase has its own


def load_script(name: str, folder: Path, named: Path | None = None) -> ModuleType:
    """The script that made a run: the one `named`, the copy in its folder, or the one of this name
    beside play/. It is run: use folders that you trust. Raises `BadInput`."""
    choices = [named] if named else [folder / f"{name}.py", ROOT / f"{name}.py"]
    try:
        path = next((path for path in choices if path.is_file()), None)
        if path is None or Path(name).name != name:
            text = f"there is no script {named}" if named else f"the run was made by {name}.py, "
            raise BadInput(text if named else text + "which is not there; name it with --script")
        content, own = path.read_bytes(), ROOT / f"{name}.py"
    except OSError as error:
        raise BadInput(f"cannot read the script: {error}") from None
    if own.is_file() and own.read_bytes() == content:
        return importlib.import_module(name)  # one module for all runs of today's script
    key = f"{path.stem}_{zlib.crc32(content):08x}"
    if key not in sys.modules:
        sys.modules[key] = module = ModuleType(key)  # dataclasses look it up there
        module.__file__ = str(path)
        try:
            exec(compile(content, path, "exec"), module.__dict__)  # an import would write a cache
        except (Exception, SystemExit) as error:
            del sys.modules[key]
            raise BadInput(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    module = sys.modules[key]
    module.BadInput = BadInput  # so that one `except` knows them all
    if missing := [word for word in NEEDED if not hasattr(module, word)]:
        raise BadInput(f"{path} has no {missing[0]}; play needs it. Is it a JEDI script of today?")
    return module


def load_run(
    folder: Path | str, device: str = "auto", threads: int = 0, script: Path | None = None
) -> Run:
    """Read a run's folder; writes nothing. Raises `BadInput` if it cannot be used here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}; name that of a run, as runs/Pong__...")
    saved = jedi_atari.load_checkpoint(folder)
    if not len(saved.get("collector", {}).get("actions", ())):
        raise BadInput(f"{folder / 'checkpoint.pt'} holds no play, from which dreams could start")
    module, arguments = load_script(saved["script"], folder, script), json.loads(saved["args"])
    other = f"{folder} was made by another version of {saved['script']}.py than {module.__file__}"
    if arguments.keys() != {field.name for field in dataclasses.fields(module.Args)}:
        raise BadInput(f"{other}: other arguments. Name the right one with --script")
    here = dict(device=device, threads=threads, precision="fp32", compile=False, resume=False)
    args = module.Args(**arguments | here)
    with torch.random.fork_rng([]):  # set_up seeds it for a run
        collector, agent, _ = module.set_up(args)
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError:
        raise BadInput(f"{other}: other networks. Name the right one with --script") from None
    return Run(folder, module, args, frozen(agent), saved, collector)


def frozen(network: nn.Module) -> nn.Module:
    """The network, not to be trained any more."""
    # Weights in the order in which a CPU's convolutions want them: else each call reorders them.
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


# ---- The decoder ---------------------------------------------------------------------------------
BATCH_SIZE, UPDATES, LEARNING_RATE = 16, 1_500, 2e-3
PROBE = 256  # frames, spread over the whole play, for the background
FLOOR = 0.02  # weight of a pixel that shows the background; of others, how far they are from it


class Decoder(nn.Module):
    """Latent -> 64 x 64 RGB picture: what differs from a background, the median picture."""

    def __init__(self, latent_shape: tuple[int, int, int], width: int = 32):
        super().__init__()
        conv, size = jedi_atari.conv3x3, jedi_atari.IMAGE_SIZE
        self.register_buffer("background", torch.zeros(3, size, size))
        self.conv_in = conv(latent_shape[0], 4 * width)
        sizes = ((4, 4), (4, 2), (2, 1))  # at 8 x 8, 16 x 16, 32 x 32
        self.first = nn.ModuleList(conv(i * width, o * width) for i, o in sizes)
        self.second = nn.ModuleList(conv(o * width, o * width) for _, o in sizes)
        self.conv_out = jedi_atari.zero_(conv(width, 3 * 2 * 2))

    def forward(self, z: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 3, 64, 64), in [-1, 1] but for errors."""
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        for size, first, second in zip((8, 16, 32), self.first, self.second, strict=True):
            x = x if x.shape[-1] == size else F.interpolate(x, size=(size, size))
            x = first(F.silu(x))
            x = x + second(F.silu(x))
        return self.background + F.pixel_shuffle(self.conv_out(F.silu(x)), 2)

    @torch.no_grad()
    def pictures(self, z: Tensor) -> np.ndarray:
        """(..., C, H, W) -> (..., 64, 64, 3) uint8, on the host."""
        x = torch.cat([self(part) for part in z.flatten(0, -4).split(64)])
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return x.unflatten(0, z.shape[:-3]).cpu().numpy()


def new_decoder(run: Run) -> Decoder:
    """A decoder for a run's latents. Leaves the global random generator as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(run.args.seed)
        decoder = Decoder(run.script.LATENT_SHAPE)
        return decoder.to(run.device, memory_format=torch.channels_last)


def decoder_loss(decoder: Decoder, z: Tensor, target: Tensor) -> Tensor:
    """Squared error of the pictures made from latents z (N, C, H, W), against (N, 3, 64, 64) in
    [-1, 1]. What differs from the background weighs more: else nobody would see a small ball."""
    weight = FLOOR + (target - decoder.background).abs().amax(1, keepdim=True)
    return (weight * (decoder(z) - target).square()).mean()


@torch.inference_mode(False)
@torch.enable_grad()
def learn_decoder(run: Run, frames: Tensor) -> Decoder:
    """Learn from frames (N, 64, 64, 3) uint8; the agent learns nothing."""
    decoder, rng = new_decoder(run), np.random.default_rng(run.args.seed)

    @torch.no_grad()
    def batch(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        some = frames[rows].to(run.device)
        return run.agent.encode(some), some.permute(0, 3, 1, 2).float() / 127.5 - 1

    spread = np.linspace(0, len(frames) - 1, PROBE).astype(int)
    decoder.background.copy_(batch(spread)[1].median(0).values)
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.95), fused=True)
    print("learn the decoder: a minute or two", flush=True)
    for number in progress(range(UPDATES), desc="learn the decoder", unit="update"):
        warm = min(1, (number + 1) / 50)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (1 - number / UPDATES)
        optimizer.zero_grad(set_to_none=True)
        loss = decoder_loss(decoder, *batch(rng.integers(len(frames), size=BATCH_SIZE)))
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return frozen(decoder)


def decoder_of(run: Run) -> Decoder:
    """Read or learn."""
    path, encoder = run.folder / "decoder.pt", checksum(run.agent)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["encoder"] == encoder:
            decoder = new_decoder(run)
            decoder.load_state_dict(saved["decoder"])
            return frozen(decoder)
    except Exception:  # missing, cut short or of another version: it can always be learned again
        pass
    decoder = learn_decoder(run, run.replay.frames[: run.replay.size])
    try:
        keep_decoder(run, decoder)
    except OSError as error:  # somebody else's run, or a full disk
        print(f"the decoder will be learned again next time: {error}")
    return decoder


def keep_decoder(run: Run, decoder: Decoder) -> None:
    """Write decoder.pt, with weights of 16 bits. Raises `OSError`."""
    weights = {key: value.half() for key, value in decoder.state_dict().items()}
    torch.save({"encoder": checksum(run.agent), "decoder": weights}, archive := io.BytesIO())
    write_atomically(run.folder / "decoder.pt", archive.getbuffer())


def checksum(agent: jedi_atari.Agent) -> int:
    """Of the weights that make latents."""
    total = 0
    for network in (agent.encoder, agent.norm):
        for tensor in network.state_dict().values():
            total = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), total)
    return total


# ---- The command line ----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; knows the arguments that name a run."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        self.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
        text = "the script that made the run; else the copy in its folder"
        self.add_argument("--script", type=Path, help=text)

    def error(self, message: str):
        raise BadInput(message)


def load_named(options: argparse.Namespace) -> Run:
    """The run that a `Parser`'s arguments name. Raises `BadInput`."""
    return load_run(options.run_dir, options.device, options.threads, options.script)

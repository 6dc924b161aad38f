"""An update as a recorded program: the same bits as written, by CUDA graphs emulated on the CPU; what would break one."""

import contextlib
import functools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_agent, replace

sys.path.insert(0, str(ROOT / "benchmark"))

import emulated_graph

import jedi_atari as jedi

CPU, META = torch.device("cpu"), torch.device("meta")
# Episodes come after these rounds: to four, drawn otherwise than fewer; one more; so many that the arrays grow. With
# one call as written, then one recorded and one replayed, before each.
COMING, ROUNDS = {2: 2, 5: 1, 6: 10}, 10


class Run:
    """An agent, its optimisers and replay; `recorded`: as emulated graphs."""

    def __init__(self, args: jedi.Args, recorded: bool, bf16: bool = False):
        self.agent = random_agent(args, 5)
        self.optimizers = {part: jedi.make_optimizer(self.agent, part, args) for part in jedi.PARTS}
        self.replay, self.rng = jedi.ReplayBuffer(60, CPU), np.random.default_rng(0)
        self.steps, self.found, self.bf16 = {}, [], bf16
        for part, optimizer in self.optimizers.items():
            program = functools.partial(
                jedi.update, self.agent, part, optimizer, self.replay, args=args, bf16=bf16
            )
            self.steps[part] = jedi.Recorded(program, self.replay, True)
            self.steps[part].active, self.steps[part].WARM_UP = recorded, 1

    def play(self, episodes: int) -> None:
        for _ in range(episodes):
            length = int(self.rng.integers(3, 9))
            for t in range(length):
                frame = self.rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                action, reward = int(self.rng.integers(5)), float(self.rng.integers(-1, 2))
                last = frame if t == length - 1 else None
                self.replay.add(frame, action, reward, last is not None, last)

    def round(self, number: int) -> None:
        """One update of each part, then new episodes."""
        for step in self.steps.values():
            metrics = step(number)
            self.found.append(torch.stack(list(metrics.values())).clone())
        torch.rand(3)  # somebody else draws, too
        self.play(COMING.get(number, 0))

    def state(self) -> list[torch.Tensor]:
        """All that must agree: metrics, weights and buffers, the optimisers' moments, the generator."""
        moments = [o.state_dict()["state"] for o in self.optimizers.values()]
        moments = [v for state in moments for each in state.values() for v in each.values()]
        weights = [v for v in self.agent.state_dict().values()]
        return [*self.found, *weights, *moments, torch.get_rng_state()]


@functools.cache
def run(args: jedi.Args, recorded: bool, bf16: bool = False) -> Run:
    return play_and_update(args, recorded, bf16)


def play_and_update(args: jedi.Args, recorded: bool, bf16: bool = False, rounds=ROUNDS) -> Run:
    made = Run(args, recorded, bf16)
    torch.manual_seed(0)
    made.play(2)
    with emulated_graph.emulated():
        for number in range(rounds):
            made.round(number)
    return made


def same(one: Run, other: Run) -> bool:
    pairs = list(zip(one.state(), other.state(), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def args(micro) -> jedi.Args:
    changes = dict(sample_steps=2, s_churn=0.5, reward_dreamed=0.5, warmup_updates=ROUNDS)
    changes |= dict(encoder_stride=2, reward_blocks=2)
    return replace(micro, latent_norm="center", **changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_and_written_updates_agree_bit_for_bit(args, bf16):
    """While the rate warms up, episodes are added and arrays grow."""
    recorded = run(args, True, bf16)
    assert same(run(args, False, bf16), recorded)
    assert recorded.replay.num_episodes == 15 and len(recorded.replay.frames) > 60
    assert all(step.graph.calls for step in recorded.steps.values())


def draw_with_numbers(self, batch_size: int, length: int, final: bool):
    """`_draw` with the number of episodes from the host."""
    self.count = torch.tensor(self.num_episodes)
    return DRAW(self, batch_size, length, final)


DRAW = jedi.ReplayBuffer._draw


@pytest.mark.parametrize("fault", ["rate", "episodes", "addresses"])
def test_what_a_recording_freezes_would_be_noticed(args, fault, monkeypatch):
    """The learning rate as a number, episodes counted by the host, arrays that moved: each must differ."""
    written, call = run(args, False), jedi.Recorded.__call__

    def frozen(self, number):
        given = self.program, self.replay
        if fault == "rate":
            self.program = lambda _: given[0](number)
        else:
            unmoved = SimpleNamespace(data_ptr=lambda: 0)
            self.replay = SimpleNamespace(frames=unmoved, num_episodes=given[1].num_episodes)
        try:
            return call(self, number)
        finally:
            self.program, self.replay = given

    if fault == "episodes":
        monkeypatch.setattr(jedi.ReplayBuffer, "_draw", draw_with_numbers)
    else:
        monkeypatch.setattr(jedi.Recorded, "__call__", frozen)
    found, first = play_and_update(args, True), {"rate": 2, "episodes": 6, "addresses": 7}[fault]
    equal = [torch.equal(a, b) for a, b in zip(written.found, found.found, strict=True)]
    assert all(equal[: 3 * first]) and not all(equal[3 * first : 3 * first + 3])


def test_a_resumed_run_ends_with_the_same_bits(args):
    """Weights, moments, generator and play are all: recordings are made anew."""
    whole, half = run(args, True), ROUNDS // 2
    first = play_and_update(args, True, rounds=half)
    with emulated_graph.emulated():
        generator, second = torch.get_rng_state(), Run(args, True)
        second.agent.load_state_dict(first.agent.state_dict())
        for part, optimizer in second.optimizers.items():
            optimizer.load_state_dict(first.optimizers[part].state_dict())
        second.found, second.rng = first.found, first.rng
        for name, value in vars(first.replay).items():
            copied = value.clone() if isinstance(value, torch.Tensor) else value
            setattr(second.replay, name, copied)
        torch.set_rng_state(generator)
        for number in range(half, ROUNDS):
            second.round(number)
    assert same(whole, second)


def test_a_replay_shows_what_is_not_finite(args):
    """A NaN that comes after the recording is in what the replay returns."""
    made = play_and_update(args, True, rounds=2)
    with torch.no_grad():
        made.agent.denoiser.conv_in.weight[0, 0, 0, 0] = torch.nan
    with emulated_graph.emulated():
        for part in ("diffusion", "policy"):
            assert made.steps[part].graph is not None
            assert not made.steps[part](2)["loss"].isfinite(), part


def update_on_meta(args: jedi.Args, part: str, episodes: int) -> dict[str, torch.Tensor]:
    """An update on a device without data: reading from it raises, as does a tensor of the host among its own."""
    agent = jedi.Agent(5, args).to(META)
    replay = jedi.ReplayBuffer(100, META)
    replay.num_episodes, optimizer = episodes, jedi.make_optimizer(agent, part, args)
    optimizer.step = lambda: None  # PyTorch's own, which knows no such device
    return jedi.update(agent, part, optimizer, replay, torch.zeros((), device=META), args, False)


@pytest.fixture
def no_autocast(monkeypatch):
    """There is none for the device `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("part", jedi.PARTS)
@pytest.mark.parametrize("latent_norm", ["none", "center"])
@pytest.mark.parametrize("episodes", [2, 9])
def test_nothing_in_an_update_reads_from_the_device(args, part, latent_norm, episodes, no_autocast):
    args = replace(args, latent_norm=latent_norm)
    found = update_on_meta(args, part, episodes)
    assert all(value.device == META and value.dim() == 0 for value in found.values())


@pytest.mark.parametrize("fault", ["read", "host"])
def test_a_read_or_a_tensor_of_the_host_would_be_noticed(args, fault, no_autocast, monkeypatch):
    mean = jedi.masked_mean
    faults = {
        "read": lambda v, m: mean(v, m) * float(m.sum()),
        "host": lambda v, m: mean(v, m) + torch.ones(1),
    }
    monkeypatch.setattr(jedi, "masked_mean", faults[fault])
    with pytest.raises((RuntimeError, NotImplementedError)):
        update_on_meta(args, "diffusion", 9)


def test_one_window_is_drawn_without_waiting(args, monkeypatch):
    """Drawing one sample, `torch.multinomial` reads from the device; of several it does not."""
    counts, multinomial = [], torch.multinomial
    made = Run(replace(args, batch_size=1), False)
    monkeypatch.setattr(
        torch, "multinomial", lambda w, n, **k: counts.append(n) or multinomial(w, n, **k)
    )
    for episodes in (2, 7):
        made.play(episodes)
        made.round(0)
    assert len(counts) == 6 and min(counts) > 1


def test_each_network_is_compiled_once_for_each_use(args, monkeypatch):
    """With gradients and without, and the encoder for each number of frames: nine programs, then no more."""
    compiled, compiler = [], torch.compile

    def counting(function, **options):
        def backend(graph, _):
            compiled.append(function.__qualname__)
            return graph.forward

        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(jedi, "CPU_CHUNK", 10_000)  # as on a GPU: all frames at once
    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    made = Run(args, False)
    jedi.compile_networks(made.agent)
    made.play(9)
    for number in range(3):
        made.round(number)
        if number == 0:
            first = list(compiled)
    assert compiled == first
    assert {name: first.count(name) for name in first} == {
        "Encoder.forward": 3,
        "Denoiser.condition": 2,
        "Denoiser.forward": 2,
        "RewardTerminationModel.features": 2,
    }


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_device_of_a_run_is_made_the_current_one(micro, device, index, monkeypatch):
    """By its number, which PyTorch insists on; graphs and streams are the current device's."""
    chosen = []
    number = torch.cuda._utils._get_device_index  # what `set_device` does to its argument
    for name, stand_in in {
        "device_count": lambda: 2,
        "set_device": lambda device: chosen.append(number(device)),
        "Stream": lambda: "a stream",
        "set_stream": chosen.append,
        "is_bf16_supported": lambda including_emulation: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(jedi.Agent, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    _, _, bf16 = jedi.set_up(replace(micro, device=device, precision="auto", compile=False))
    assert chosen == [index, "a stream"] and bf16

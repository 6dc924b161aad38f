"""benchmark/speed.py: the baseline has DIAMOND's sizes, and JEDI is ahead of it; the optimisations change no result."""

import contextlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, own_update, random_agent, random_windows, replace
from torch.optim import adam

sys.path.insert(0, str(ROOT / "benchmark"))

import gpu_check
import pixel_diffusion as pixel
import speed

import jedi_atari as jedi


@pytest.fixture(scope="module")
def pixel_agent() -> pixel.PixelAgent:
    torch.manual_seed(0)
    network = pixel.PixelAgent(5, jedi.Args())
    for parameter in network.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_the_baselines_sizes():
    """Parameters of DIAMOND at 18 actions: 4.41, 5.90 and 3.24 million, 13,546,326 in all."""
    counts = pixel.parameter_counts(pixel.PixelAgent(18, jedi.Args()))
    assert counts == {
        "denoiser": 4_406_851,
        "reward": 5_902_656,
        "policy": 3_236_819,
        "total": 13_546_326,
    }


def test_the_baseline_trains(pixel_agent):
    """JEDI's own losses: each is finite and reaches all parameters of its network, and of no other."""
    args = jedi.Args(horizon=2)
    losses = {
        "denoiser": (jedi.diffusion_loss, 6),
        "reward": (jedi.reward_termination_loss, 4),
        "policy": (jedi.actor_critic_loss, 4),
    }
    for name, (loss, length) in losses.items():
        batch = random_windows(args, length, batch=2)
        batch = batch._replace(mask=batch.mask[:, 1:]) if name == "reward" else batch
        pixel_agent.zero_grad(set_to_none=True)
        value, _ = loss(pixel_agent, batch, args)
        value.backward()
        assert torch.isfinite(value)
        for network, parameters in pixel_agent.named_children():
            touched = [p.grad is not None for p in parameters.parameters()]
            assert all(touched) if network == name else not any(touched), (name, network)


def test_the_baselines_frames_are_quantised(pixel_agent):
    args = jedi.Args()
    context = pixel.to_pixels(random_windows(args, 4, batch=2).frames)
    clean = jedi.sample_next_latent(pixel_agent, context, torch.zeros(2, 4).long(), args)
    values = (clean + 1) * 127.5
    assert clean.shape == (2, 3, 64, 64) and clean.std() > 0.1
    assert torch.allclose(clean, clean.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(values, values.round(), atol=1e-3)
    frames = random_windows(args, 1).frames
    assert torch.equal(pixel.quantise(pixel.to_pixels(frames)), pixel.to_pixels(frames))


# What makes the script fast, left out.


def without_products():
    """Attention by PyTorch's fused function."""

    def forward(self, x):
        b, c, h, w = x.shape
        x = self.norm(x)
        qkv = self.qkv(x).flatten(2).reshape(b, 3, self.heads, c // self.heads, h * w)
        y = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))

    return speed.common.replaced(jedi.SelfAttention, forward=forward)


@contextlib.contextmanager
def without_channels_last():
    """Convolutions on pictures, and with weights, whose channels lie apart."""
    forward = jedi.Encoder.forward

    def apart(self, frames):
        return forward(self, frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))

    with (
        speed.common.replaced(torch, channels_last=torch.contiguous_format),
        speed.common.replaced(jedi.Encoder, forward=apart),
    ):
        yield


def without_whole_sequences():
    """The reward/termination model sees imagined steps one after the other, as DIAMOND's does."""
    features = jedi.RewardTerminationModel.features

    def stepwise(self, z, actions):
        times = range(actions.shape[1])
        return torch.cat([features(self, z[:, t : t + 2], actions[:, t : t + 1]) for t in times], 1)

    return speed.common.replaced(jedi.RewardTerminationModel, features=stepwise)


WITHOUT = {
    "frames in chunks": lambda: speed.common.replaced(jedi, CPU_CHUNK=1_000_000),
    "channels-last": without_channels_last,
    "attention as products": without_products,
    "fused optimiser": lambda: speed.common.replaced(adam, _fused_adam=adam._single_tensor_adam),
    "reward model over whole sequences": without_whole_sequences,
}


@pytest.mark.parametrize("name", WITHOUT)
def test_an_optimisation_changes_no_result(micro, name):
    """Losses and gradients with and without it, on the same batch."""
    found = []
    for context in (WITHOUT[name], contextlib.nullcontext):
        with context():
            found.append(losses_and_gradients(micro))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_the_fused_optimiser_the_weights_are_the_same(micro):
    weights, calls = [], []
    for context in (WITHOUT["fused optimiser"], contextlib.nullcontext):
        agent = random_agent(micro, 5)
        optimizer = jedi.make_optimizer(agent, "policy", micro)
        batch = random_windows(micro, micro.context_frames)
        with context():
            step = adam._fused_adam
            for number in range(3):
                torch.manual_seed(number)
                with speed.common.replaced(
                    adam, _fused_adam=lambda *a, f=step, **k: calls.append(f) or f(*a, **k)
                ):
                    own_update(agent, "policy", optimizer, batch, number, micro)
        weights.append(list(agent.policy.parameters()))
    assert len(set(calls)) == 2
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def world_model_only(found: list[torch.Tensor]) -> list[torch.Tensor]:
    """The first two losses and their gradients: the policy's loss comes last."""
    return found[: [i for i, x in enumerate(found) if x.dim() == 0][2]]


def losses_and_gradients(
    args: jedi.Args, bf16: bool = False, compiled: bool = False
) -> list[torch.Tensor]:
    """All three losses, and the gradients of all parameters, of the same agent on the same batches."""
    agent, result = random_agent(args, 5), []
    if compiled:
        jedi.compile_networks(agent)
    n = args.context_frames
    for loss, length in (
        (jedi.diffusion_loss, n + args.target_frames),
        (jedi.reward_termination_loss, n + 3),
        (jedi.actor_critic_loss, n),
    ):
        batch = random_windows(args, length)
        if loss is jedi.reward_termination_loss:
            batch = batch._replace(mask=batch.mask[:, 1:])
        agent.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value, _ = loss(agent, batch, args)
        value.backward()
        result += [
            value.detach(),
            *(p.grad.clone() for p in agent.parameters() if p.grad is not None),
        ]
    return result


def report_differences(title: str, one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """For `pytest -s`: differences of the losses, and of all gradients together, as shares of their size."""
    losses = [
        abs(a - b).item() / abs(a).item() for a, b in zip(one, other, strict=True) if not a.dim()
    ]
    joined = [torch.cat([x.flatten() for x in side if x.dim()]) for side in (one, other)]
    gradients = ((joined[0] - joined[1]).norm() / joined[0].norm()).item()
    print(
        f"{title}: losses differ by {', '.join(f'{x:.1e}' for x in losses)}; gradients by {gradients:.1e}"
    )


def test_bf16_and_fp32_agree(micro):
    """Losses to 3%; gradients point the same way. The imagined trajectories of the policy's loss may part, since
    sampled actions do, so it is left out."""
    args = replace(micro, denoiser_width=32, lstm_size=32)
    exact, short = (world_model_only(losses_and_gradients(args, bf16)) for bf16 in (False, True))
    report_differences("fp32, bf16", exact, short)
    for a, b in zip(exact, short, strict=True):
        if a.dim() == 0:
            assert abs(a - b) < 0.03 * abs(a)
    joined = [torch.cat([x.flatten() for x in side if x.dim()]) for side in (exact, short)]
    assert torch.cosine_similarity(*joined, dim=0) > 0.99


@pytest.mark.slow
def test_compiled_and_eager_agree(micro):
    """All three losses and all gradients: only networks are compiled, so the random numbers are the same."""
    if shutil.which("c++") is None:
        pytest.skip("the compiler needs a C++ compiler on a CPU")
    eager = losses_and_gradients(micro)
    compiled = losses_and_gradients(micro, compiled=True)
    report_differences("eager, compiled", eager, compiled)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), (a - b).abs().max()


def test_both_sides_make_the_same_updates(micro):
    """Of their own networks each, drawn and clipped alike."""
    args, cpu = replace(micro, batch_size=1, horizon=1, reward_window=1), torch.device("cpu")
    replay = speed.make_replay(args, cpu)
    for name, shape in (("jedi", jedi.LATENT_SHAPE), ("pixel", (3, 64, 64))):
        agent = speed.make_agent(name, args, cpu)
        calls = speed.calls_of(agent, replay, args, False, 2)
        for part in speed.UPDATES:
            weights = list(getattr(agent, "denoiser" if part == "diffusion" else part).parameters())
            old = [weight.detach().clone() for weight in weights]
            assert torch.isfinite(calls[part]()["loss"])
            assert not all(map(torch.equal, weights, old)), (name, part)
        assert calls["sample"]().shape == (2, *shape)
        assert calls["imagine"]().z.shape == (1, 2, *shape)


def test_projected_hours_count_every_update_and_step():
    args = jedi.Args(first_steps_min=5_000)
    timing = {
        part: speed.Timing(s, s, s) for part, s in zip(speed.UPDATES, (1, 10, 100), strict=True)
    }
    hours = speed.projected_hours(args, timing, steps_per_second=50)
    # 10,000, 10,000 and 5,000 updates, then 400 of each in 950 epochs and 50 more that play nothing
    assert hours["updates"] == pytest.approx((410_000 * 1 + 410_000 * 10 + 405_000 * 100) / 3600)
    assert hours["play"] == pytest.approx(100_000 / 50 / 3600)


def test_without_proc_what_is_not_known_is_null(monkeypatch, capsys):
    """As on Windows and macOS: in the child, in its parent, in the table."""
    cpu, read = torch.device("cpu"), Path.read_text
    assert speed.peak_memory(cpu) > 2**20
    for text in ("Name: python", None):  # None: no such file

        def read_text(path, *a, text=text, **k):
            if path.parts[:2] != ("/", "proc"):
                return read(path, *a, **k)
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read_text)
        assert speed.peak_memory(cpu) is None
        assert speed.common.processor() == platform.processor() or platform.machine()
    done = SimpleNamespace(returncode=0, stdout="epoch\nnull\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    assert speed.memory_in_child("jedi", speed.parse_args([])) is None
    failed = SimpleNamespace(returncode=1, stdout="", stderr="no more memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    assert speed.memory_in_child("jedi", speed.parse_args([])) is None  # the times are kept
    assert capsys.readouterr().err == "speed.py: no memory of jedi: no more memory\n"
    row = measured() | {"memory_bytes": dict.fromkeys(speed.SIDES)}
    row["ratios"]["memory"] = None
    assert "| peak memory | - | - | - |" in speed.table(row)


def measured() -> dict:
    """The last line of results/speed.jsonl that holds both sides."""
    rows = speed.common.read_rows(ROOT / "results/speed.jsonl", "device", "projected_hours")
    return [row for row in rows if "ratios" in row][-1]


def test_the_tables_in_results_and_readme_are_made_from_the_raw_ones(tmp_path, capsys):
    shutil.copy(ROOT / "results/speed.jsonl", out := tmp_path / "speed.jsonl")
    assert speed.main(["--table", "--out", str(out)]) == 0
    text = out.with_suffix(".md").read_text()
    assert text == (ROOT / "results/speed.md").read_text() == capsys.readouterr().out
    faster = re.search(r"the three updates .*\| (.* faster)", text)[1]
    assert f"**{faster}**" in (ROOT / "README.md").read_text()
    assert "dirty" not in measured()["git_commit"]


def test_a_line_has_no_nan_and_the_command_can_be_pasted(tmp_path, monkeypatch):
    common, out = speed.common, tmp_path / "a.jsonl"
    common.add_row(out, {"a": [1, float("nan")], 2: -float("inf")})
    common.add_row(out, {"b": 1})
    common.add_row(out, {"b": 2}, again=True)
    assert common.read_rows(out) == [{"a": [1, None], "2": None}, {"b": 2}]
    script = tmp_path / "check.py"
    script.write_text("print('SEEN loss [NaN, 1.23456]')")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert gpu_check.run_check(1, 60, tmp_path / "log")["seen"] == {"loss": ["NaN", 1.235]}
    monkeypatch.setattr(sys, "argv", ["speed.py", "--out", "a b'c"])
    assert common.about("speed.py")["command"] == """python benchmark/speed.py --out 'a b'"'"'c'"""


def full_buffer(records: int) -> jedi.ReplayBuffer:
    """A replay of episodes of 1,000 records; random frames, so that every page of memory is really there."""
    replay = jedi.ReplayBuffer(records, torch.device("cpu"))
    for part in replay.frames.split(5_000):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8))
    replay.size, replay.num_episodes = records, records // 1_000
    replay.starts[: replay.num_episodes] = torch.arange(replay.num_episodes) * 1_000
    replay.lengths[: replay.num_episodes] = 1_000
    replay.count.fill_(replay.num_episodes)
    return replay


def test_a_full_replay_is_drawn_from_to_its_end():
    torch.manual_seed(0)
    episodes, *_ = full_buffer(9_000)._draw(4_096, 4, False)
    assert set(episodes.tolist()) == set(range(9))


@pytest.mark.timing
def test_a_batch_costs_the_same_however_full_the_replay_is():
    """Drawing and gathering 32 windows from 60,000 records and from 2,000: within a wide margin, the same time."""
    args = jedi.Args()
    replays = {records: full_buffer(records) for records in (2_000, 60_000)}
    calls = {
        records: (lambda r=replay: r.sample_frames(args.batch_size, 6, final=True))
        for records, replay in replays.items()
    }
    times = speed.time_in_turns(calls, torch.device("cpu"), 5)
    assert times[60_000].min < 2 * times[2_000].min


def speed_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark" / "speed.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.timing
def test_jedi_is_ahead(tmp_path):
    """The short form of the benchmark; only ratios with a wide margin are checked."""
    done = speed_command("--quick", "--repeats", "1", "--out", str(tmp_path / "speed.jsonl"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed.jsonl").read_text())
    assert set(result["ratios"]) == {"sample", "imagine", "updates", "memory"}
    assert result["ratios"]["sample"] >= 10, result["ratios"]
    assert (
        result["ratios"]["updates"] > 2
        and result["projected_hours"] < result["projected_hours_pixel"]
    )
    # The machine's own rate is that of one matrix product: on a shared machine it can be measured in a slow moment.
    assert 0.02 < result["matrix_rate_share"] < 5
    assert result["parameters"]["pixel"]["total"] == 13_546_326
    assert "sample one next state, batch 32" in done.stdout
    flop = result["sample_flop"]
    # design: about 16 GFLOP a pass at 18 actions, three passes; the encoder is not in it
    assert 35e9 < flop["jedi"] < 50e9 < 10 * flop["jedi"] < flop["pixel"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--table"], "--table needs a file that is there"),
        (["--out", str(ROOT / "README.md")], "give a file that ends in .jsonl"),
        (["--out", str(ROOT / "results/catch.jsonl")], "line 1, has no 'device'"),
        (["--env-id", "Pogn"], "Did you mean: `Pong`"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert speed.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error

"""Whole runs, far too small to learn: accounting, seeds, resume, and one through the command line, on the real Pong."""

import collections
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, random_agent, replace

import jedi_atari as jedi

RESULT_KEYS = (
    "env_id script seed preset env_steps returns mean_return std_return human_normalized_score open_loop_ratio "
    "open_loop_ratio_untrained reward_recall wall_seconds peak_memory_bytes device versions git_commit args"
).split()


def metrics_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """One run with its calls counted: (run folder, arguments, result, counts)."""
    args = replace(jedi.Args(**MICRO), run_dir=str(tmp_path_factory.mktemp("run") / "a"))
    counts = collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("update", "evaluate", "save_checkpoint"):
            original = getattr(jedi, name)

            def wrapper(*a, original=original, name=name, **k):
                counts[name] += 1
                return original(*a, **k)

            patch.setattr(jedi, name, wrapper)
        patch.setattr(
            jedi, "measure_costs", lambda *a: dict.fromkeys(("collect", *jedi.PARTS, "games"), 0.01)
        )
        result = jedi.train(args)
    return jedi.Path(args.run_dir), args, result, counts


def test_accounting(counted):
    run_dir, args, result, counts = counted
    metrics = metrics_of(run_dir)
    first = int(metrics[1]["charts/env_steps"])
    assert args.first_steps_min <= first <= args.first_steps_max
    epochs = 1 + math.ceil((args.total_steps - first) / args.epoch_steps) + args.final_epochs
    assert [row["epoch"] for row in metrics] == [*range(epochs + 1), epochs]
    assert result["env_steps"] == args.total_steps == metrics[-2]["charts/env_steps"]
    expected = {
        "diffusion": args.first_diffusion_updates + (epochs - 1) * args.diffusion_updates,
        "reward": args.first_reward_updates + (epochs - 1) * args.reward_updates,
        "policy": args.first_policy_updates + (epochs - 1) * args.policy_updates,
    }
    assert result["updates"] == expected and counts["update"] == sum(expected.values())
    assert [metrics[-2][f"charts/{name}_updates"] for name in jedi.PARTS] == list(expected.values())
    in_between = sum(1 for e in range(1, epochs) if e % args.eval_every == 0)
    assert counts["evaluate"] == 1 + in_between + 1
    assert sum("eval/mean_return" in row for row in metrics) == 1 + in_between
    # At the start, after each of the first epoch's five phases and the play before it, then once an epoch.
    assert counts["save_checkpoint"] == 1 + 6 + (epochs - 1) // args.checkpoint_every
    assert len(result["returns"]) == args.final_episodes
    # Collection appends one record a step, and one more for the last frame of each finished episode.
    size = (run_dir / "replay.bin").stat().st_size
    assert size % jedi.ReplayBuffer.RECORD.itemsize == 0
    assert args.total_steps < size // jedi.ReplayBuffer.RECORD.itemsize <= args.total_steps + 10


def test_the_result_holds_everything(counted):
    run_dir, args, result, _ = counted
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert not set(RESULT_KEYS) - set(result)
    assert result["mean_return"] == np.mean(result["returns"]) and result["std_return"] == np.std(
        result["returns"]
    )
    assert result["human_normalized_score"] == pytest.approx((result["mean_return"] + 20.7) / 35.3)
    assert len(result["open_loop_ratio"]) == len(result["open_loop_ratio_untrained"]) == 15
    assert all(math.isfinite(v) and v > 0 for v in result["open_loop_ratio"])


def test_tensorboard_and_the_metrics_file_agree(counted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, *_ = counted
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    board = {
        (tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
    }
    rows = metrics_of(run_dir)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    file = {
        (key, row["epoch"]): value for row in rows for key, value in row.items() if key != "epoch"
    }
    assert set(board) == set(file)
    assert all(board[key] == pytest.approx(file[key], rel=1e-5) for key in file)


def test_the_checkpoint_is_plain_data_and_rebuilds_the_agent(counted):
    run_dir, args, _, _ = counted
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = jedi.Agent(6, args)
    agent.load_state_dict(saved["agent"])
    assert all(p.isfinite().all() for p in agent.parameters())
    assert (run_dir / "checkpoint.prev.pt").is_file() and (run_dir / "jedi_atari.py").is_file()


def quiet_costs(monkeypatch):
    monkeypatch.setattr(
        jedi, "measure_costs", lambda *a: dict.fromkeys(("collect", *jedi.PARTS, "games"), 0.01)
    )


def test_the_same_seed_gives_the_same_run_and_another_does_not(counted, tmp_path, monkeypatch):
    run_dir, args, result, _ = counted
    quiet_costs(monkeypatch)
    again = jedi.train(replace(args, run_dir=str(tmp_path / "same")))
    assert without_time(metrics_of(tmp_path / "same")) == without_time(metrics_of(run_dir))
    assert (
        again["returns"] == result["returns"]
        and again["open_loop_ratio"] == result["open_loop_ratio"]
    )
    other = jedi.train(replace(args, run_dir=str(tmp_path / "other"), seed=1))
    assert without_time(metrics_of(tmp_path / "other"))[1] != without_time(metrics_of(run_dir))[1]
    assert other["open_loop_ratio"] != result["open_loop_ratio"]


class Stopped(Exception):
    pass


def test_a_stopped_run_carries_on_as_if_it_had_not_stopped(counted, tmp_path, monkeypatch):
    run_dir, args, result, _ = counted
    quiet_costs(monkeypatch)
    args = replace(args, run_dir=str(tmp_path / "r"))
    save, saved = jedi.save_checkpoint, []

    def save_then_stop(*a):
        save(*a)
        saved.append(1)
        if len(saved) == 8:
            raise Stopped

    monkeypatch.setattr(jedi, "save_checkpoint", save_then_stop)
    with pytest.raises(Stopped):
        jedi.train(args)
    with open(tmp_path / "r" / "replay.bin", "ab") as file:
        file.write(b"play from after the checkpoint" * 1_000)
    monkeypatch.setattr(jedi, "save_checkpoint", save)
    resumed = jedi.train(replace(args, resume=True))
    assert resumed["returns"] == result["returns"] and resumed["updates"] == result["updates"]
    assert without_time(metrics_of(tmp_path / "r")) == without_time(metrics_of(run_dir))
    assert (tmp_path / "r" / "replay.bin").read_bytes() == (run_dir / "replay.bin").read_bytes()
    a, b = (
        torch.load(d / "checkpoint.pt", weights_only=True)["agent"]
        for d in (run_dir, tmp_path / "r")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def command_line(args: dict) -> list[str]:
    return [x for name, value in args.items() for x in (jedi.flag(name), str(value))]


def test_the_command_line_end_to_end(tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "jedi_atari.py"),
        "--env-id",
        "Pong",
        *command_line(MICRO),
    ]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning of any library
    for text in (
        "parameters",
        "whole run",
        "what the world model learned",
        "rewarded steps recognised",
        "human-normalised",
    ):
        assert text in done.stdout
    assert all(len(line) < 200 and "Warning" not in line for line in done.stdout.splitlines())
    result = json.loads((run_dir / "result.json").read_text())
    assert not set(RESULT_KEYS) - set(result) and result["args"]["horizon"] == MICRO["horizon"]
    # The finished run can be evaluated again, and its folder is not touched but for one new file.
    before = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    again = [
        sys.executable,
        str(ROOT / "jedi_atari.py"),
        "--eval-only",
        str(run_dir),
        "--final-episodes",
        "2",
    ]
    done = subprocess.run(
        [*again, "--max-episode-steps", "30"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "over 2 games" in done.stdout, done.stderr
    after = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    new = set(after) - set(before)
    assert len(new) == 1 and all(after[name] == before[name] for name in before)
    assert len(json.loads((run_dir / new.pop()).read_text())["returns"]) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    quiet_costs(monkeypatch)
    loss = jedi.reward_termination_loss

    def broken(agent, batch, args):
        value, metrics = loss(agent, batch, args)
        return value * float("nan"), metrics

    monkeypatch.setattr(jedi, "reward_termination_loss", broken)
    flags = command_line(MICRO)
    assert jedi.main([*flags, "--run-dir", str(tmp_path / "r")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "update 1 of the reward part is not finite" in err
    assert not (tmp_path / "r" / "result.json").exists()
    saved = torch.load(tmp_path / "r" / "nonfinite_reward_1.pt", weights_only=True)
    assert saved["batch"]["frames"].shape == (3, 8, 64, 64, 3) and saved["update"] == 1
    # The checkpoint is the one from before: no reward update in it, nothing in it that is not finite.
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    assert checkpoint["phase"] == "reward" and checkpoint["updates"]["reward"] == 0
    assert all(v.isfinite().all() for v in checkpoint["agent"].values())


def test_imagined_and_recorded_play_are_aligned(counted):
    """With a world model that is right, every measure of it is perfect: no step is one off."""
    run_dir, args, _, _ = counted
    buffer = jedi.ReplayBuffer(400, torch.device("cpu"))
    rng = np.random.default_rng(0)
    for step in range(200):
        frame = np.full((64, 64, 3), step, np.uint8)
        buffer.add(
            frame,
            int(rng.integers(6)),
            float(step % 7 == 0),
            step == 199,
            frame if step == 199 else None,
        )
    buffer.flush()

    class Truth(torch.nn.Module):
        """Latents that say which step they are; a reward model that knows which steps are rewarded."""

        def encode(self, frames, mask=None):
            return (
                frames[..., :8, :8, :1]
                .permute(0, 1, 4, 2, 3)
                .float()
                .expand(-1, -1, 16, -1, -1)
                .clone()
            )

        def encoder(self, frames):
            return self.encode(frames[None])[0]

        norm = staticmethod(lambda z: z)

        def reward(self, z, actions):
            step = z[:, :-1].mean((2, 3, 4)).round()
            assert torch.equal(
                z[:, 1:].mean((2, 3, 4)).round().clamp(max=199), (step + 1).clamp(max=199)
            )
            rewarded = torch.stack(
                [torch.zeros_like(step), (step % 7 != 0).float(), (step % 7 == 0).float()], -1
            )
            ended = torch.stack([(step != 199).float(), (step == 199).float()], -1)
            return 50 * rewarded, 50 * ended

    actions = buffer.actions

    def next_latent(agent, context, given, args):
        step = context[:, -1].mean((1, 2, 3)).round().long()
        for i in range(given.shape[1]):  # the actions belong to the context's frames
            assert torch.equal(given[:, i], actions[step - given.shape[1] + 1 + i])
        return context[:, -1] + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jedi, "sample_next_latent", next_latent)
        measures = jedi.measure_world_model(Truth(), buffer, args)
    assert measures["open_loop_ratio"] == pytest.approx([0.0] * 15, abs=1e-3)
    assert measures["reward_recall"] == 1 and measures["reward_false_alarms"] == 0
    assert all(measures[f"reward_prob_{k}"] == pytest.approx(1) for k in (0, 1, 3, 5))


def test_games_shorter_than_the_measures_are_measured_as_far_as_they_go(micro):
    """Games of 6 frames, 2 of them context: 4 imagined steps, and rewards up to 3 steps into a dream."""
    args = replace(micro, context_frames=2)
    agent, buffer = random_agent(args, 5), jedi.ReplayBuffer(40, torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    for _ in range(3):
        for t in range(5):
            buffer.add(frames[t], 0, float(t == 4), t == 4, frames[5] if t == 4 else None)
    buffer.flush()
    measures = jedi.measure_world_model(agent, buffer, args)
    assert len(measures["open_loop_ratio"]) == 4 and all(v > 0 for v in measures["open_loop_ratio"])
    assert (
        all(0 < measures[f"reward_prob_{k}"] < 1 for k in (0, 1, 3))
        and measures["reward_prob_5"] is None
    )


def test_peak_memory_is_this_process_own():
    """A process started by a large one does not count that in (getrusage does), but it counts what it held itself."""
    parent = np.ones(1_500_000_000, np.uint8)
    code = "import sys, numpy, torch, jedi_atari as jedi; held = numpy.ones(int(sys.argv[1]), numpy.uint8); del held; "
    code += "print(jedi.peak_memory(torch.device('cpu')))"
    command = [sys.executable, "-c", code]
    small, large = (
        int(subprocess.run([*command, str(size)], cwd=ROOT, capture_output=True, check=True).stdout)
        for size in (1, 700_000_000)
    )
    assert small < len(parent) / 2 and 600_000_000 < large - small < 800_000_000

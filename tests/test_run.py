"""Whole runs, far too small to learn: accounting, seeds, schedule, progress, and one through the command line."""

import collections
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import MICRO, ROOT, SMALL, command_line, random_agent, replace

import jedi_atari as jedi
from examples import toys

RESULT_KEYS = (
    "env_id script seed preset env_steps updates environment returns mean_return std_return lengths "
    "measures open_loop_ratio open_loop_ratio_untrained returns_random reward_recall "
    "wall_seconds peak_memory_bytes device precision versions args"
).split()


def metrics_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """One run with its calls counted: run folder, arguments, result, counts, parts in the order of their updates,
    and its collector and replay at its end."""
    args = replace(jedi.Args(**MICRO), run_dir=str(tmp_path_factory.mktemp("run") / "a"))
    args = replace(args, warmup_updates=4, final_episodes=2)
    counts, order, made = collections.Counter(), [], {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("update", "evaluate", "save_checkpoint"):
            original = getattr(jedi, name)

            def wrapper(*a, original=original, name=name, **k):
                counts[name] += 1
                made_of = original(*a, **k)
                if name == "update":
                    rates = [float(group["lr"]) / group["peak"] for group in a[2].param_groups]
                    order.append((a[1], rates))
                return made_of

            patch.setattr(jedi, name, wrapper)
        for name in ("Collector", "ReplayBuffer"):
            original = getattr(jedi, name)

            def keep(*a, original=original, name=name):
                return made.setdefault(name, original(*a)) if name not in made else original(*a)

            patch.setattr(jedi, name, keep)
        patch.setattr(jedi, "CHECKPOINT_SECONDS", 0)
        result = jedi.train(args)
    return Path(args.run_dir), args, result, counts, order, tuple(made.values())


def test_accounting(counted):
    run_dir, args, result, counts, order, _ = counted
    metrics = metrics_of(run_dir)
    first = int(metrics[0]["charts/env_steps"])
    assert args.first_steps_min <= first <= args.first_steps_max
    later = math.ceil((args.total_steps - first) / args.epoch_steps) + args.final_epochs
    before = 3  # 6 + 4 + 2 updates of pre-training in epochs of 4 updates
    # Epoch 0 is the first play; the last row is the final evaluation's.
    assert [row["epoch"] for row in metrics] == [*range(1 + before + later), 1 + before + later]
    steps = [row["charts/env_steps"] for row in metrics]
    expected_steps = [first] * (1 + before)
    while expected_steps[-1] < args.total_steps:
        expected_steps.append(min(expected_steps[-1] + args.epoch_steps, args.total_steps))
    expected_steps += [args.total_steps] * (args.final_epochs + 1)
    assert steps == expected_steps and result["env_steps"] == args.total_steps
    expected = {
        "diffusion": args.first_diffusion_updates + later * args.diffusion_updates,
        "reward": args.first_reward_updates + later * args.reward_updates,
        "policy": args.first_policy_updates + later * args.policy_updates,
    }
    assert result["updates"] == expected and counts["update"] == sum(expected.values())
    assert [metrics[-2][f"charts/{name}_updates"] for name in jedi.PARTS] == list(expected.values())
    # In the schedule's order; the learning rate of each part warms up in its first updates.
    schedule = jedi.make_schedule(args, first)
    assert [part for part, _ in order] == [part for _, parts, _ in schedule for part in parts]
    for part in jedi.PARTS:
        rates = [rates for name, rates in order if name == part]
        warm_up = [min(1, (i + 1) / args.warmup_updates) for i in range(expected[part])]
        for group in zip(*rates, strict=True):
            assert group == pytest.approx(warm_up)
    in_between = sum(1 for e in range(1, later) if e % args.eval_every == 0)
    assert counts["evaluate"] == 2 + in_between + 1
    assert sum("eval/mean_return" in row for row in metrics) == 2 + in_between
    assert counts["save_checkpoint"] == 1 + before + later
    assert len(result["returns"]) == len(result["lengths"]) == args.final_episodes
    assert len(result["returns_random"]) == args.final_episodes
    files = {path.name.split(".")[0] for path in run_dir.iterdir()} - {""}  # .lock
    assert files == {"args", "checkpoint", "events", "jedi_atari", "metrics", "result"}


def test_a_checkpoint_gives_back_all_that_was_played(counted):
    """Its actions, played again from the seed: the replay to the last bit, and all that a collector carries."""
    run_dir, args, _, _, _, (collector, replay) = counted
    saved = jedi.load_checkpoint(run_dir)["collector"]
    again, buffer = jedi.Collector(args), jedi.ReplayBuffer(10, torch.device("cpu"))
    again.load_state_dict(saved, buffer)
    assert (buffer.size, buffer.num_episodes) == (replay.size, replay.num_episodes)
    assert replay.size > args.total_steps == again.steps  # with the last frames of episodes
    for name in ("frames", "actions", "rewards", "ends"):
        assert torch.equal(
            getattr(buffer, name)[: replay.size], getattr(replay, name)[: replay.size]
        )
    for name in ("starts", "lengths"):
        count = replay.num_episodes
        assert torch.equal(getattr(buffer, name)[:count], getattr(replay, name)[:count])
    for name in ("actions", "steps", "reward_counts"):
        assert getattr(again, name) == getattr(collector, name)
    for name in ("steps", "episode_return", "lives"):
        assert getattr(again.env, name) == getattr(collector.env, name)
    assert np.array_equal(again.frame, collector.frame)
    states = zip(again.lstm or (), collector.lstm or (), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_the_result_holds_everything(counted):
    run_dir, args, result, *_ = counted
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert set(result) == set(RESULT_KEYS)
    assert result["mean_return"] == np.mean(result["returns"])
    assert result["std_return"] == np.std(result["returns"])
    assert len(result["open_loop_ratio"]) == len(result["open_loop_ratio_untrained"]) == 15
    assert all(math.isfinite(v) and v > 0 for v in result["open_loop_ratio"])
    assert (result["peak_memory_bytes"] is None) == (result["device"] == "cpu")
    assert result["args"] == vars(args) and result["environment"] == "plain"


def assert_board_is_file(run_dir: Path) -> None:
    """TensorBoard and metrics.jsonl: the same keys, and at each step the same values, as often."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    board, file = collections.defaultdict(list), collections.defaultdict(list)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            board[tag, event.step].append(event.value)
    rows = metrics_of(run_dir)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    for row in rows:
        for key, value in row.items():
            file[key, int(row["charts/env_steps"])].append(np.float32(value))
    assert set(board) == set(file)
    for key in file:
        assert sorted(board[key]) == pytest.approx(sorted(file[key]), rel=1e-6), key


def test_tensorboard_and_the_metrics_file_agree(counted):
    assert_board_is_file(counted[0])


def test_the_checkpoint_is_plain_data_and_rebuilds_the_agent(counted):
    run_dir, args, *_ = counted
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    agent = jedi.Agent(6, args)
    agent.load_state_dict(saved["agent"])
    assert all(p.isfinite().all() for p in agent.parameters())
    before = torch.load(run_dir / "checkpoint.prev.pt", weights_only=True)
    assert before["epoch"] == saved["epoch"] - 1
    assert (run_dir / "jedi_atari.py").read_bytes() == (ROOT / "jedi_atari.py").read_bytes()


def test_the_same_seed_gives_the_same_run_and_another_does_not(counted, tmp_path):
    run_dir, args, result, *_ = counted
    again = jedi.train(replace(args, run_dir=str(tmp_path / "same")))
    assert without_time(metrics_of(tmp_path / "same")) == without_time(metrics_of(run_dir))
    assert again["returns"] == result["returns"]
    assert again["open_loop_ratio"] == result["open_loop_ratio"]
    (one, agent, _), (other, another, _) = (jedi.set_up(replace(args, seed=s)) for s in (0, 1))
    assert not torch.equal(agent.encoder.layers[0].weight, another.encoder.layers[0].weight)
    replays = [jedi.ReplayBuffer(100, torch.device("cpu")) for _ in range(2)]
    for collector, replay in zip((one, other), replays, strict=True):
        for step in range(60):
            collector.step(None, replay, 2 if step < 30 else None)
    assert not torch.equal(*(replay.frames[:30] for replay in replays))
    assert one.actions != other.actions


SCHEDULES = [
    {},
    dict(first_diffusion_updates=35, first_reward_updates=50, first_policy_updates=7),
    dict(diffusion_updates=7, reward_updates=3, policy_updates=5, eval_every=1),
    dict(diffusion_updates=0, reward_updates=4, final_epochs=5),
    dict(reward_updates=0, policy_updates=0, total_steps=90),
    dict(first_diffusion_updates=0, first_reward_updates=0, first_policy_updates=0),
    dict(
        first_diffusion_updates=400,
        first_reward_updates=300,
        diffusion_updates=110,
        reward_updates=20,
    ),
]


@pytest.mark.parametrize("changes", SCHEDULES)
def test_the_schedule_does_what_the_arguments_say(micro, changes):
    args = replace(micro, **changes)
    (steps, parts, evaluated), *epochs = jedi.make_schedule(args, 90)
    assert steps == 0 and not parts and evaluated
    later_count = math.ceil((args.total_steps - 90) / args.epoch_steps) + args.final_epochs
    cut = len(epochs) - later_count
    first, later = epochs[:cut], epochs[cut:]
    # Pre-training: all its updates, no more play, epochs no longer than the others.
    flat = [part for _, parts, _ in first for part in parts]
    for part in jedi.PARTS:
        assert flat.count(part) == getattr(args, f"first_{part}_updates")
    assert all(steps == 90 for steps, *_ in first)
    size = args.diffusion_updates + args.reward_updates + args.policy_updates
    assert all(len(parts) == size for _, parts, _ in first[:-1])
    assert [evaluated for *_, evaluated in first] == [False] * (cut - 1) + [True] * (cut > 0)
    # The world model before the policy; the reward updates between the two halves of diffusion's.
    assert flat[: len(flat) - args.first_policy_updates] == in_the_middle(
        args.first_diffusion_updates, args.first_reward_updates
    )
    assert set(flat[len(flat) - args.first_policy_updates :]) <= {"policy"}
    played = 90
    for number, (steps, parts, evaluated) in enumerate(later, 1):
        played = min(played + args.epoch_steps, args.total_steps)
        assert steps == played
        world = in_the_middle(args.diffusion_updates, args.reward_updates)
        assert parts == world + ["policy"] * args.policy_updates
        assert evaluated == (number % args.eval_every == 0 and number < later_count)
    assert not later or played == args.total_steps


def in_the_middle(diffusion: int, reward: int) -> list[str]:
    """Half of the diffusion updates, the odd one with them; all reward updates; the other half."""
    world = []
    for i in range(diffusion):
        world += ["reward"] * reward if 2 * i >= diffusion and "reward" not in world else []
        world.append("diffusion")
    return world if "reward" in world or not reward else world + ["reward"] * reward


def test_the_papers_schedule():
    args = jedi.Args()
    schedule = jedi.make_schedule(args, args.first_steps_min)
    counts = collections.Counter(part for _, parts, _ in schedule for part in parts)
    # DIAMOND's 1,000 epochs: the first with 5,100 steps, 949 with 100 more each, 50 without play.
    assert counts == dict(diffusion=409_600, reward=409_600, policy=404_600)
    # Here the first is the first play, then its 25,000 updates in epochs of 1,200.
    assert len(schedule) == 1 + 21 + 949 + 50
    assert sum(evaluated for *_, evaluated in schedule) == 2 + 99


def test_the_first_play_goes_on_until_rewards_are_known(micro):
    """On Catch: a reward each five steps, ten are enough; else to the limit."""
    for limits, expected in (((20, 100), 50), ((70, 100), 70), ((20, 40), 40)):
        args = replace(
            micro,
            env_id="examples.toys:Catch-v0",
            first_steps_min=limits[0],
            first_steps_max=limits[1],
        )
        collector = jedi.Collector(args)
        replay, agent = jedi.ReplayBuffer(200, torch.device("cpu")), random_agent(args, 3)
        while collector.steps < collector.first_goal():
            collector.step(agent, replay)
        assert collector.steps == expected


def test_random_play_is_uniform_and_needs_no_network(micro, monkeypatch):
    """The first play of a run and its evaluation number 0: chi-squared over the actions, 2 degrees of freedom."""
    monkeypatch.setattr(jedi, "act", lambda *_: pytest.fail("a network was asked"))
    monkeypatch.setattr(jedi, "measure_world_model", lambda *_: {})
    args, played = replace(micro, env_id="examples.toys:Catch-v0"), []
    step = jedi.Game.step
    monkeypatch.setattr(
        jedi.Game, "step", lambda self, action: (played.append(action), step(self, action))[1]
    )
    collector, replay = jedi.Collector(args), jedi.ReplayBuffer(1_500, torch.device("cpu"))
    for _ in range(1_200):
        collector.step(None, replay)
    jedi.evaluate(jedi.Agent(3, args), args, 240, 0)
    for actions in (played[:1_200], played[1_200:]):
        assert len(actions) == 1_200
        counts = np.bincount(actions, minlength=3)
        assert ((counts - 400) ** 2 / 400).sum() < 18.4  # p = 0.0001


def test_the_verdict_on_what_was_learned():
    """Welch's t beyond 3, of at least 20 games; the intervals are two standard errors on each side."""
    chance = [1.0, 3.0] * 13  # mean 2, standard error 1 / 5
    cases = [
        ([3.0, 5.0] * 13, "better"),
        ([0.0, 1.0] * 13, "worse"),
        ([1.7, 3.7] * 13, "no clear difference"),
        ([9.0, 11.0] * 5, "no clear difference"),  # too few games
        ([5.0] * 26, "better"),
    ]
    for now, verdict in cases:
        text = jedi.compare(chance, now)
        assert text.endswith(f"over 26 and {len(now)} games: {verdict}")
        assert text.startswith("random play 2.00 (1.60 to 2.40), this agent ")
        if len(now) >= 20 and np.std(now):
            t = scipy.stats.ttest_ind(now, chance, equal_var=False).statistic
            assert (abs(t) > 3) == (verdict != "no clear difference")
    assert "this agent 4.00 (3.60 to 4.40)" in jedi.compare(chance, cases[0][0])
    assert jedi.compare([0.0] * 3, [1.0] * 26).endswith("over 3 and 26 games: no clear difference")
    assert jedi.compare([0.0] * 40, [0.0] * 36 + [1.0] * 4).endswith("no clear difference")
    assert jedi.compare([0.0] * 40, [0.0] * 40).endswith("no clear difference")


def test_evaluation_plays_so_many_whole_games_of_each_environment(micro, monkeypatch):
    """With a player who reads the picture and never misses; each environment plays its fixed share."""
    args = replace(micro, env_id="examples.toys:Catch-v0")
    made, make_env = [], jedi.make_env
    monkeypatch.setattr(jedi, "make_env", lambda args: (made.append(make_env(args)), made[-1])[1])

    def perfect(agent, frames, state, temperature):
        columns = [
            [int(np.argwhere((f == colour).all(-1))[:, 1].mean() * toys.COLUMNS // 64)
             for colour in (toys.BALL, toys.PADDLE)]
            for f in frames
        ]  # fmt: skip
        return [int(np.sign(ball - paddle)) + 1 for ball, paddle in columns], ()

    monkeypatch.setattr(jedi, "act", perfect)
    resets = collections.Counter()
    reset = toys.Catch.reset

    def counted_reset(self, **options):
        resets[id(self)] += 1
        return reset(self, **options)

    monkeypatch.setattr(toys.Catch, "reset", counted_reset)
    found = jedi.evaluate(random_agent(args, 3), args, 13)
    assert found["returns"] == [1.0] * 13 and found["lengths"] == [5] * 13
    assert found["mean_return"] == 1.0 and found["std_return"] == 0.0
    assert len(made) == jedi.EVAL_ENVS == 10
    assert sorted(resets.values()) == [2] * 7 + [3] * 3  # one more than games
    assert found["measures"]["rewarded_steps"] == 2  # of the first environment's two games


def test_the_command_line_end_to_end(tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["--env-id", "Pong", *command_line(SMALL), "--run-dir", str(run_dir)]
    command = [sys.executable, str(ROOT / "jedi_atari.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning of any library
    shown = ("run folder", "parameters", "epoch 0/", "rewarded steps recognised", "random play")
    assert all(text in done.stdout for text in shown)
    assert all(len(line) < 200 and "Warning" not in line for line in done.stdout.splitlines())
    assert "\r" not in done.stdout
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result) == set(RESULT_KEYS) and result["args"]["horizon"] == SMALL["horizon"]
    # The finished run can be evaluated again, and its folder is not touched but for one new file.
    before = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    again = ["--eval-only", str(run_dir), "--final-episodes", "2", "--max-episode-steps", "30"]
    assert jedi.main(again) == 0
    out, err = capsys.readouterr()
    assert err == "" and "return" in out
    after = {p.name: p.stat().st_mtime_ns for p in run_dir.iterdir()}
    new = set(after) - set(before)
    assert len(new) == 1 and all(after[name] == before[name] for name in before)
    found = json.loads((run_dir / new.pop()).read_text())
    assert found["lengths"] == [30, 30] and len(found["returns"]) == 2


@pytest.mark.skipif(
    not importlib.util.find_spec("wandb"), reason="wandb is not installed: pip install wandb"
)
def test_weights_and_biases_offline(tmp_path):
    """The three lines of docs/metrics.md that send the metrics there; the script knows nothing of it."""
    run_dir = tmp_path / "run"
    short = dict(env_id="examples.toys:Catch-v0", total_steps=90, final_epochs=0)
    words = command_line(SMALL | short | dict(run_dir=run_dir))
    page = (ROOT / "docs" / "metrics.md").read_text()
    lines = re.search(r"```python\n(import wandb.*?)```", page, re.S)[1]
    assert len(lines.split("\n")) < 6 and '["--env-id", "Pong"]' in lines
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= dict(WANDB_MODE="offline", HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", lines.replace('["--env-id", "Pong"]', repr(words))]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and (run_dir / "result.json").exists(), done.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"diffusion/loss" in record.read_bytes()
    assert_board_is_file(run_dir)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    """One line; the checkpoint is the one from before."""
    monkeypatch.setattr(jedi, "CHECKPOINT_SECONDS", 0)
    loss, calls = jedi.reward_termination_loss, []

    def broken(agent, batch, args):
        calls.append(1)
        value, metrics = loss(agent, batch, args)
        if len(calls) < 3:
            return value, metrics
        value = value * float("nan")
        return value, metrics | dict(loss=value.detach())

    monkeypatch.setattr(jedi, "reward_termination_loss", broken)
    saved, save = [], jedi.save_checkpoint

    def remember(run_dir, content):
        save(run_dir, content)
        saved.append((run_dir / "checkpoint.pt").read_bytes())

    monkeypatch.setattr(jedi, "save_checkpoint", remember)
    words = [*command_line(SMALL), "--run-dir", str(tmp_path / "r")]
    assert jedi.main(words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not finite" in err and "reward/loss" in err
    assert not (tmp_path / "r" / "result.json").exists()
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == saved[-1]
    checkpoint = jedi.load_checkpoint(tmp_path / "r")
    assert 0 < checkpoint["updates"]["reward"] < 3
    assert all(v.isfinite().all() for v in checkpoint["agent"].values())


def test_imagined_and_recorded_play_are_aligned(counted):
    """With a world model that is right, every measure of it is perfect: no step is one off."""
    args = counted[1]
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

        def latents(self, frames):
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
        # Of three dreams one ends after a step: what follows does not count.
        rewards = torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, -1, -1]])
        alive = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
        dream = SimpleNamespace(rewards=rewards, alive=alive)
        patch.setattr(jedi, "imagine", lambda *_: dream)
        measures = jedi.measure_world_model(Truth(), buffer, args)
    assert measures["open_loop_ratio"] == pytest.approx([0.0] * 15, abs=1e-3)
    assert measures["reward_recall"] == 1 and measures["reward_false_alarms"] == 0
    assert all(measures[f"reward_prob_{k}"] == pytest.approx(1) for k in (0, 1, 3, 5))
    n, h = args.context_frames, args.horizon
    paid = [
        np.mean([step % 7 == 0 for step in range(first + n - 1, first + n - 1 + h)])
        for first in range(201 - n - h + 1)
    ]
    assert measures["imagined_minus_real"] == pytest.approx(4 / 7 - np.mean(paid))


@pytest.mark.parametrize("pays", [-1, 0, 1])
def test_what_the_dream_pays_is_set_beside_what_the_game_paid(micro, pays):
    """R_psi always sees the same reward; in the game the last four steps have one, of 7 points. Episodes of 9 steps, of
    which each start of a dream sees 4 frames before and the horizon after it."""
    args = replace(micro, horizon=4, expected_reward=False)
    agent, buffer = random_agent(args, 5), jedi.ReplayBuffer(100, torch.device("cpu"))
    agent.reward.head[-1].weight.data.zero_()
    agent.reward.head[-1].bias.data.copy_(50 * torch.eye(5)[pays + 1] + 50 * torch.eye(5)[3])
    frame, paid = np.zeros((64, 64, 3), np.uint8), [7.0 * (t >= 5) for t in range(9)]
    for _ in range(5):
        for t in range(9):
            buffer.add(frame, 0, paid[t], False, frame if t == 8 else None)
    # Ten frames hold windows of 4 + 4 from frames 0, 1 and 2: dreams from frames 3, 4 and 5.
    real = np.mean([np.sign(paid[start : start + 4]) for start in (3, 4, 5)])
    measures = jedi.measure_world_model(agent, buffer, args)
    assert measures["imagined_minus_real"] == pytest.approx(pays - real, abs=1e-6)


def test_games_shorter_than_the_measures_are_measured_as_far_as_they_go(micro):
    """Games of 6 frames, 2 of them context: 4 imagined steps, and rewards up to 3 steps into a dream."""
    args = replace(micro, context_frames=2)
    agent, buffer = random_agent(args, 5), jedi.ReplayBuffer(40, torch.device("cpu"))
    frames = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    for _ in range(3):
        for t in range(5):
            buffer.add(frames[t], 0, float(t == 4), t == 4, frames[5] if t == 4 else None)
    measures = jedi.measure_world_model(agent, buffer, args)
    assert len(measures["open_loop_ratio"]) == 4 and all(v > 0 for v in measures["open_loop_ratio"])
    assert (
        all(0 < measures[f"reward_prob_{k}"] < 1 for k in (0, 1, 3))
        and measures["reward_prob_5"] is None
    )


def test_every_measured_window_counts_its_rewards_and_ends(micro):
    """Windows as long as training's, backward from each episode's end, against the plain list; an untrained model sees
    no reward and no end."""
    from test_replay import LENGTHS, fill

    buffer = jedi.ReplayBuffer(500, torch.device("cpu"))
    episodes = fill(buffer, LENGTHS)
    measures = jedi.measure_world_model(jedi.Agent(6, micro), buffer, micro)
    length, rewards = micro.context_frames + micro.reward_window, 0
    for episode in episodes:
        for start in range(len(episode) + 1 - length, -1, -(length - 1)):
            rewards += sum(reward != 0 for _, reward, _ in episode[start : start + length - 1])
    assert rewards > 50 and measures["rewarded_steps"] == rewards
    assert measures["reward_recall"] == measures["reward_false_alarms"] == 0
    assert measures["end_recall"] == 0 and measures["end_precision"] is None


@pytest.fixture
def often(monkeypatch):
    """Progress is shown at each step, not every 30 s."""
    original = jedi.tqdm.__init__

    def init(self, *args, **options):
        original(self, *args, **options | dict(mininterval=1e-6, delay=1e-6))

    monkeypatch.setattr(jedi.tqdm, "__init__", init)


def test_a_log_has_no_bars(often, micro, capsys):
    for _ in jedi.progress(range(10_000), desc="update"):
        pass
    jedi.evaluate(random_agent(micro, 6), micro, 1, title="epoch 3/7 evaluation")
    assert capsys.readouterr() == ("epoch 3/7 evaluation, 1 games\n", "")


def test_progress_is_one_line_on_a_terminal(often, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in jedi.progress(range(5), desc="update"):
        pass
    err = capsys.readouterr().err
    assert "\n" not in err and err.count("\r") >= 5


@pytest.mark.parametrize(("preset", "parameters"), [("tiny", 1_700_000), ("paper", 13_000_000)])
def test_a_preset_runs_at_its_real_sizes(preset, parameters, tmp_path, capsys):
    """On the real game; few steps, updates and games."""
    names = [name for name in vars(jedi.Args()) if re.search("updates$|episodes$", name)]
    few = dict.fromkeys(names, 2) | dict(total_steps=40, first_steps_min=30, first_steps_max=30)
    few |= dict(epoch_steps=10, final_epochs=0, max_episode_steps=12, batch_size=2, threads=1)
    few |= dict(preset=preset, run_dir=tmp_path / "run")
    assert jedi.main(command_line(few)) == 0
    total = re.search(r"^parameters .* all ([\d,]+)", capsys.readouterr().out, re.M)[1]
    assert parameters / 2 < int(total.replace(",", "")) < parameters * 2
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["env_steps"] == 40 and len(result["returns"]) == 2
    assert {"checkpoint.pt", "metrics.jsonl"} <= {p.name for p in (tmp_path / "run").iterdir()}

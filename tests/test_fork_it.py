"""docs/fork_it.md: its changes apply to the script as it is, and what they make of it keeps what the page says."""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import MICRO, ROOT, command_line, random_windows
from gymnasium.utils.env_checker import check_env
from test_resume import assert_same, outcome

import jedi_atari as jedi
from examples import toys

PAGE = (ROOT / "docs" / "fork_it.md").read_text()
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "fork_it").glob("*.patch"))}
CATCH = "examples.toys:Catch-v0"
GAMES = {"my_game": "my_game:Apples-v0", "minigrid": "MiniGrid-Empty-Random-5x5-v0"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def apply(path: Path, names: list[str]) -> Path:
    """A new folder with a copy of the script that has these patches."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    path.mkdir()
    shutil.copy(ROOT / "jedi_atari.py", path)
    # Should the folder lie in a repository, git would take the patches' paths as that repository's.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.parent)}
    command = ["git", "apply", "--verbose", *(str(PATCHES[name]) for name in names)]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{names} do not apply any more:\n{done.stderr}"
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a patch, one for each."""
    made, parent = {}, tmp_path_factory.mktemp("forks")
    return lambda name: made.get(name) or made.setdefault(name, apply(parent / name, [name]))


@pytest.fixture
def fork(folders, monkeypatch):
    """A function that imports the script as a patch leaves it."""

    def load(name: str):
        if name == "minigrid":
            pytest.importorskip("minigrid.wrappers", reason="minigrid or pygame is not installed")
        folder = folders(name)
        monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location(f"fork_{name}", folder / "jedi_atari.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up there
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("my_game", None)
    gym.registry.pop("Apples-v0", None)


def record(folder: Path, wide: int = 1, long: int = 0) -> dict[str, np.ndarray]:
    """Three games of Catch in `folder`/recordings, the second cut short, the first `wide` times as large, and one of
    `long` steps of noise; what a replay must hold of them, row by row."""
    rng, rows = np.random.default_rng(0), []
    (folder / "recordings").mkdir()
    for number, steps in ((2, 3), (10, 5), (1, 5)):  # by name 01, 02, 10
        game, actions = toys.Catch(), rng.integers(3, size=steps)
        first = game.reset(seed=number)[0]
        shown, rewards, ends, *_ = zip(*map(game.step, actions), strict=True)
        frames = np.stack([first, *shown])
        rows.append((f"{number:02}", frames, actions, np.array(rewards), ends[-1]))
    assert [end for *_, end in rows] == [False, True, True]
    if long:
        noise = rng.integers(256, size=(long + 1, 64, 64, 3), dtype=np.uint8)
        actions = rng.integers(3, size=long, dtype=np.uint8)
        rows.append(("99", noise, actions, rng.normal(size=long).astype(np.float32), True))
    for name, frames, actions, rewards, end in rows:  # not in the order of their names
        size = wide if name == "01" else 1
        arrays = dict(actions=actions, rewards=rewards, terminated=end)
        arrays["frames"] = frames.repeat(size, 1).repeat(size, 2)  # of which the mean is known
        np.savez(folder / "recordings" / f"{name}.npz", **arrays)
    rows.sort(key=lambda row: row[0])
    lengths = [len(row[1]) for row in rows]
    return {
        "frames": np.concatenate([row[1] for row in rows]),
        "actions": np.concatenate([[*row[2], 0] for row in rows]),
        "rewards": np.concatenate([[*row[3], 0] for row in rows]).astype(np.float32),
        "ends": np.concatenate([[*[False] * (len(row[2]) - 1), row[4], False] for row in rows]),
        "lengths": np.array(lengths),
        "starts": np.cumsum([0, *lengths[:-1]]),
    }


# --- the page


def test_each_section_shows_a_part_of_its_patch_and_links_it():
    linked = []
    for section in PAGE.split("\n## ")[1:]:
        (name,) = re.findall(r"\]\(fork_it/(\w+)\.patch\)", section)
        (shown,) = re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S)
        rest = iter(PATCHES[name].read_text().splitlines())
        assert all(line in rest for line in shown.splitlines()), name  # in the patch's order
        linked.append(name)
    assert sorted(linked) == list(PATCHES)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_has_little_context(name):
    """One line on each side of a change: an edit elsewhere in the script does not touch it."""
    for hunk in re.split(r"^@@.*\n", PATCHES[name].read_text(), flags=re.M)[1:]:
        kept = [line[:1] in (" ", "") for line in hunk.splitlines()]
        assert not any(kept[i] and kept[i + 1] and kept[i + 2] for i in range(len(kept) - 2))
        assert kept[:2] != [True, True] and kept[-2:] != [True, True]


# --- the forks


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_is_clean(name, folders):
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", "--config"]
        command += [str(ROOT / "pyproject.toml"), "."]
        done = subprocess.run(command, cwd=folders(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("left_out", ["encoder", "latent_shape"])
def test_all_patches_but_one_go_together(left_out, tmp_path):
    apply(tmp_path / "all", [name for name in PATCHES if name != left_out])


@pytest.mark.parametrize("name", ["my_game", "minigrid", "encoder", "latent_shape"])
def test_a_fork_runs_from_beginning_to_end(name, fork, tmp_path, capsys):
    changes = dict(max_episode_steps=12, total_steps=100, final_epochs=0, final_episodes=2)
    changes |= dict(env_id=GAMES.get(name, CATCH), run_dir=tmp_path / "run")
    argv = command_line(MICRO | changes)
    assert fork(name).main(argv) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_steps"] == 100 and len(result["returns"]) == 2


def test_minigrid_shows_the_whole_grid(fork):
    script = fork("minigrid")
    env = script.make_env(script.Args(env_id=GAMES["minigrid"]))
    frame, _ = env.reset(seed=0)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and env.action_space.n == 7
    green = (frame[..., 1] > 200) & (frame[..., 0] < 100)
    assert green[41:50, 41:50].all() and green.mean() < 0.05  # the goal in its corner
    assert script.make_env(script.Args(env_id="Pong")).noop_max == 30  # Atari is as it was


@pytest.mark.parametrize("name, count", [("encoder", 20_704), ("latent_shape", 47_456)])
def test_the_other_encoders_give_latents_and_learn(name, count, fork):
    script, shape = fork(name), (32, 4, 4) if name == "latent_shape" else (16, 8, 8)
    encoder = script.Encoder(32)
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert f"{count:,} parameters" in PAGE and shape == script.LATENT_SHAPE
    z = encoder(torch.randint(256, (6, 64, 64, 3), dtype=torch.uint8))
    assert z.shape == (6, *shape) and z.dtype == torch.float32 and z.abs().max() < 3
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_one_step_is_one_call_of_the_denoiser(fork, monkeypatch):
    script = fork("one_step")
    words = "--preset one_step", "--preset paper --sample-steps 1"
    by_preset, by_flag = (script.parse_args(x.split()) for x in words)
    assert dataclasses.replace(by_preset, preset="paper") == by_flag
    small = {k: MICRO[k] for k in ("denoiser_width", "cond_dim", "reward_width", "lstm_size")}
    calls, denoised, agent = [], [], script.Agent(5, dataclasses.replace(by_flag, **small))
    forward, clamp = agent.denoiser.forward, agent.norm.clamp
    monkeypatch.setattr(agent.denoiser, "forward", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(agent.norm, "clamp", lambda z: denoised.append(clamp(z)) or denoised[-1])
    context, actions = torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    sampled = script.sample_next_latent(agent, context, actions, by_flag)
    # The sample is what the denoiser says, at the highest level: nothing of the noise is left.
    torch.testing.assert_close(sampled, denoised[0])
    assert calls == [1] and by_flag.sample_sigma_max == 5.0


def test_the_game_of_ones_own(fork):
    script = fork("my_game")
    env = script.make_env(script.Args(env_id=GAMES["my_game"]))  # imports the module
    check_env(gym.make("Apples-v0").unwrapped, skip_render_check=True)
    env.reset(seed=0)
    game = env.unwrapped
    game.walker, game.apple, game.trap = (0, 0), (0, 1), (1, 1)
    frame, reward, end, cut, _ = env.step(1)  # to the right, where the apple is
    assert (reward, end, cut) == (1.0, False, False) and game.apple not in (game.walker, game.trap)
    assert frame.shape == (64, 64, 3) and (frame[:16, 16:32] == 255).all()
    assert env.step(2)[1] == 0 and game.walker == (0, 1)  # a wall
    assert env.step(3)[1:4] == (-1.0, True, False)  # down, into the trap
    env.reset()
    game.walker, game.apple, game.trap = (0, 0), (3, 0), (3, 3)
    steps = [env.step(2)[1:4] for _ in range(100)]  # up, against the wall, until time is over
    assert steps == [(0.0, False, False)] * 99 + [(0.0, False, True)]


def test_the_new_network_learns_with_the_denoiser(fork, monkeypatch, capsys):
    script = fork("network")
    args, states = script.Args(**MICRO), []
    for module in (jedi, script):
        torch.manual_seed(0)
        agent = module.Agent(5, args)
        states.append(agent.state_dict())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    added = {name: p for name, p in agent.named_parameters() if name not in states[0]}
    assert len(added) == 4 and all(name.startswith("inverse.") for name in added)
    optimizers = [(part, script.make_optimizer(agent, part, args)) for part in script.PARTS]
    groups = [(part, group) for part, optimizer in optimizers for group in optimizer.param_groups]
    for parameter in added.values():
        rates = [(part, g["peak"]) for part, g in groups for p in g["params"] if p is parameter]
        assert rates == [("diffusion", args.learning_rate)]
    script.print_plan(args, agent, False)
    counts = [sum(p.numel() for p in group) for group in (added.values(), agent.parameters())]
    assert "inverse {:,}, all {:,}\n".format(*counts) in capsys.readouterr().out

    batch = random_windows(args, args.context_frames + args.target_frames)
    batch.mask[0, :3] = batch.mask[1, 5:] = False  # before an episode, and after one
    z, errors = agent.encode(batch.frames, batch.mask), []
    for b, t in np.argwhere((batch.mask[:, :-1] & batch.mask[:, 1:]).numpy()):
        pair = torch.cat([z[b, t], z[b, t + 1]]).flatten()
        errors.append(-agent.inverse.layers(pair).log_softmax(-1)[batch.actions[b, t]].item())
    loss, metrics = script.diffusion_loss(agent, batch, args)
    assert metrics["inverse_loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert loss.item() == pytest.approx((metrics["loss"] + metrics["inverse_loss"]).item())
    loss.backward()
    # The denoiser's last layer is zero: what comes to the encoder now comes from the new network.
    learning = (*added.values(), *agent.encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in learning)
    agent.zero_grad()
    forward = agent.inverse.forward
    monkeypatch.setattr(agent.inverse, "forward", lambda z: forward(z.detach()))
    script.diffusion_loss(agent, batch, args)[0].backward()
    assert all(p.grad.any() for p in added.values())
    assert not any(p.grad is not None and p.grad.any() for p in agent.encoder.parameters())


def test_the_new_metric_is_the_share_of_clipped_updates(fork, tmp_path, monkeypatch, capsys):
    script = fork("metric")
    limits, made, shares = dict(diffusion=1.0, reward=2.0, policy=3.0), [], []
    clip, rng, done = nn.utils.clip_grad_norm_, np.random.default_rng(0), collections.Counter()

    def with_known_norms(parameters, limit):
        """Gradients whose norm is half the limit or twice the limit, by chance."""
        made.append((limit, twice := rng.random() < 0.5))
        given = [p.grad for p in parameters if p.grad is not None]
        for gradient in given:
            size = sum(g.numel() for g in given) ** 0.5
            gradient.fill_(limit * (2.0 if twice else 0.5) / size)
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", with_known_norms)
    monkeypatch.setattr(script, "MAX_GRAD_NORM", limits)
    argv = command_line(MICRO | dict(env_id=CATCH, final_episodes=1, run_dir=tmp_path / "run"))
    assert script.main(argv) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[:-1]):
        for part, limit in limits.items():
            begin, done[part] = done[part], int(row[f"charts/{part}_updates"])
            if twice := [x for at, x in made if at == limit][begin : done[part]]:
                shares.append(row[f"{part}/clipped"])
                assert shares[-1] == pytest.approx(np.mean(twice))
    assert sum(done.values()) == len(made) and any(0 < share < 1 for share in shares)
    assert capsys.readouterr().out.count("diffusion/clipped ") >= 2


def test_recordings_are_in_the_replay_before_two_steps_of_play(fork, tmp_path, monkeypatch):
    """More of them than the replay was made for; then the page's run on hardly anything else."""
    script, made = fork("recordings"), []
    monkeypatch.chdir(tmp_path)
    expected, make = record(tmp_path, wide=2, long=1_100), script.ReplayBuffer
    monkeypatch.setattr(script, "ReplayBuffer", lambda *a: made.append(make(*a)) or made[-1])
    words = dict(total_steps=2, first_steps_min=2, first_steps_max=2, final_epochs=2)
    assert all(f"--{key.replace('_', '-')} " in "".join(blocks("bash")) for key in words)
    changes = words | dict(env_id=CATCH, final_episodes=1, run_dir="r")
    assert script.main(command_line(MICRO | changes)) == 0
    for key, values in expected.items():
        assert np.array_equal(getattr(made[0], key)[: len(values)].numpy(), values), key
    rows, result = len(expected["actions"]), json.loads(Path("r/result.json").read_text())
    assert rows > 1_002 and made[0].size == rows + 2 and result["env_steps"] == 2
    assert made[0].num_episodes == 5 and made[0].lengths[4] == 2 and made[0].starts[4] == rows
    assert result["updates"] == {"diffusion": 6 + 4, "reward": 4 + 2, "policy": 2 + 2}


@pytest.mark.parametrize("name", ["network", "recordings"])
def test_a_run_carried_on_ends_with_the_same_bits(name, fork, tmp_path, monkeypatch, capsys):
    script, parts = fork(name), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    record(tmp_path)
    argv = ["--resume", *command_line(MICRO | dict(env_id=CATCH, final_episodes=1))]
    assert script.main([*argv, "--run-dir", "whole"]) == 0
    update = script.update

    def stopped_once(agent, part, *rest, **options):
        parts.append(part)
        if part == "policy" and parts.count(part) == 4:
            raise KeyboardInterrupt
        return update(agent, part, *rest, **options)

    monkeypatch.setattr(script, "update", stopped_once)
    assert script.main([*argv, "--run-dir", "stopped"]) == 130
    saved, resume = script.load_checkpoint(Path("stopped")), ["--resume", "--run-dir", "stopped"]
    assert 0 < saved["collector"]["steps"] < 130
    assert sum(key.startswith("inverse.") for key in saved["agent"]) == 4 * (name == "network")
    if name == "recordings":
        capsys.readouterr()
        Path("recordings").rename("elsewhere")
        assert script.main(resume) == 2 and "recordings/*.npz" in capsys.readouterr().err
        Path("elsewhere").rename("recordings")
    assert script.main(resume) == 0
    assert_same(Path("stopped"), outcome(Path("whole")))


def test_bad_recordings_are_refused_by_name(fork, tmp_path, monkeypatch, capsys):
    script, path = fork("recordings"), Path("recordings/02.npz")
    monkeypatch.chdir(tmp_path)
    record(tmp_path)
    good, whole = dict(np.load(path)), path.read_bytes()
    frames, actions, rewards = good["frames"], good["actions"], good["rewards"]
    bad = [
        dict(frames=frames.astype(np.float32)),
        dict(frames=frames[..., :1]),
        dict(frames=frames[:-1]),
        dict(frames=frames[:1], actions=actions[:0], rewards=rewards[:0]),
        dict(actions=actions[:-1]),
        dict(actions=np.array([0, 1, 3])),
        dict(actions=np.array([0, -1, 2])),
        dict(actions=np.array([0, 0.5, 2])),
        dict(rewards=np.array([0, np.nan, 0])),
        dict(rewards=np.array([0, 1e300, 0])),
        dict(terminated=1),
        dict(terminated=None),  # needs pickle
    ]
    env, device = script.make_env(script.Args(env_id=CATCH)), torch.device("cpu")
    for changes in bad:
        np.savez(path, **good | changes)
        replay = script.ReplayBuffer(40, device)
        with pytest.raises(script.BadInput, match=r"^recordings/02.npz must hold frames [^\n]*$"):
            script.add_recordings(replay, env, path.parent)
        assert replay.size == 6 and not replay.open, changes  # what comes before it
    np.savez(path, **{key: good[key] for key in good if key != "rewards"})
    for content in (path.read_bytes(), whole[:-9], whole[:4000] + b"?" + whole[4001:], b""):
        path.write_bytes(content)
        argv = command_line(MICRO | dict(env_id=CATCH, run_dir="r"))
        assert script.main(argv) == 2 and not Path("r").exists()
        told = r".*error: recordings/02.npz must hold frames .* from 0 to 2.*\n"  # one line
        assert re.fullmatch(told, capsys.readouterr().err)


@pytest.mark.parametrize("game", [CATCH, "Breakout"])
def test_the_pages_program_records_what_training_would_see(game, fork, tmp_path, monkeypatch):
    """Its files, played again, in the order of their names: the frames of the game, a file for each life."""
    (program,) = blocks("python")
    assert program.count('"Pong"') == program.count("range(20)") == 1
    program = program.replace('"Pong"', repr(game)).replace("range(20)", "range(6)")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/fork_it.md", "exec"), {})
    script, device = fork("recordings"), torch.device("cpu")
    env = script.make_env(args := script.Args(env_id=game))
    replay, played = (script.ReplayBuffer(4_000, device) for _ in range(2))
    script.add_recordings(replay, env, Path("recordings"))
    assert replay.num_episodes == 6 and replay.ends.sum() == 6 and not replay.open
    collector, begins = script.Collector(args), replay.starts[:6].tolist()
    over = True
    for start, length in zip(begins, replay.lengths[:6].tolist(), strict=True):
        if over:  # a game is over after 5 lives; each is seeded with its first file's number
            collector.frame, _ = collector.env.reset(seed=begins.index(start))
        for action in replay.actions[start : start + length - 1].tolist():
            over = bool(collector.step(None, played, action))
    assert (played.size, played.num_episodes) == (replay.size, 6)
    for key in ("frames", "actions", "rewards", "ends", "starts", "lengths"):
        assert torch.equal(getattr(played, key), getattr(replay, key)), key

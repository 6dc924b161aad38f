"""docs/fork_it.md: its changes apply to the script as it is, and what they make of it keeps what the page says."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import kill_me
import numpy as np
import pytest
import torch
from conftest import MICRO, ROOT, command_line
from gymnasium.utils.env_checker import check_env
from test_resume import outcome

import jedi_atari as jedi
from examples import toys

PAGE = (ROOT / "docs" / "fork_it.md").read_text()
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "fork_it").glob("*.patch"))}
GAMES = {
    "minigrid": "MiniGrid-Empty-Random-5x5-v0",
    "my_game": "my_game:Apples-v0",
    "recordings": "examples.toys:Catch-v0",
}  # the others play Pong


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that applies a patch to a copy of the script in a folder of its own; one folder for each patch."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    made = {}

    def folder(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            shutil.copy(ROOT / "jedi_atari.py", path)
            # Should the folder lie in a repository, git would take the patch's paths as that repository's.
            environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.parent)}
            command = ["git", "apply", "--verbose", str(PATCHES[name])]
            done = subprocess.run(
                command, cwd=path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{name}.patch does not apply any more:\n{done.stderr}"
            made[name] = path
        return made[name]

    return folder


@pytest.fixture
def fork(folders, monkeypatch):
    """A function that imports the script as a patch leaves it."""

    def load(name: str):
        if name == "minigrid":
            pytest.importorskip(
                "minigrid.wrappers",
                reason="minigrid is not installed (with pygame, which it needs)",
            )
        folder = folders(name)
        monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location(f"fork_{name}", folder / "jedi_atari.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(
            sys.modules, spec.name, module
        )  # dataclasses look their module up there
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
        game, frames, rewards, end = toys.Catch(), [], [], False
        actions = rng.integers(3, size=steps)
        frames.append(game.reset(seed=number)[0])
        for action in actions:
            frame, reward, end, _, _ = game.step(action)
            frames.append(frame)
            rewards.append(reward)
        assert end == (steps == 5)
        rows.append((f"{number:02}", np.stack(frames), actions, np.array(rewards), end))
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


def test_the_page_shows_each_patch_as_it_is():
    assert len(PATCHES) == 6
    assert sorted(blocks("diff")) == sorted(path.read_text() for path in PATCHES.values())
    assert all(f"`git apply docs/fork_it/{name}.patch`" in PAGE for name in PATCHES)
    assert len(PAGE.splitlines()) < 295


def test_the_page_counts_the_lines_of_each_patch():
    text = " ".join(PAGE.split())
    for name, path in PATCHES.items():
        lines = path.read_text().splitlines()[2:]
        added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        assert f"`git apply docs/fork_it/{name}.patch` (+{added} −{removed})" in text, (
            name,
            added,
            removed,
        )


def test_its_commands_are_understood():
    assert len(commands()) >= 3
    for program, script, *argv in commands():
        assert (program, script) == ("python", "jedi_atari.py")
        jedi.check_args(jedi.parse_args(argv))


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
        command = [
            sys.executable,
            "-m",
            "ruff",
            *check,
            "--no-cache",
            "--config",
            str(ROOT / "pyproject.toml"),
            ".",
        ]
        done = subprocess.run(command, cwd=folders(name), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PATCHES)
def test_a_fork_runs_from_beginning_to_end(name, fork, tmp_path, capsys, monkeypatch):
    script = fork(name)
    if name == "recordings":
        monkeypatch.chdir(tmp_path)
        record(tmp_path)
    changes = {"env_id": GAMES.get(name, "Pong"), "run_dir": tmp_path / "run"}
    changes |= dict(max_episode_steps=12, total_steps=100, final_epochs=0, final_episodes=2)
    if name == "one_step":
        changes["preset"] = "one_step"
    assert script.main(command_line(MICRO | changes)) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["env_steps"] == 100 and len(result["returns"]) == 2
    assert result["args"]["preset"] == ("one_step" if name == "one_step" else "tiny")
    assert (tmp_path / "run" / "jedi_atari.py").read_text() == (
        ROOT / "jedi_atari.py"
    ).read_text() or name != "my_game"


def test_minigrid_shows_the_whole_grid(fork):
    script = fork("minigrid")
    env = script.make_env(script.Args(env_id=GAMES["minigrid"]))
    frame, _ = env.reset(seed=0)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and env.action_space.n == 7
    green = (frame[..., 1] > 200) & (frame[..., 0] < 100)
    assert green[41:50, 41:50].all() and green.mean() < 0.05  # the goal in its corner
    assert isinstance(
        script.make_env(script.Args(env_id="Pong")), script.Game
    )  # Atari is as it was


def test_the_other_encoder_keeps_its_shapes(fork):
    script = fork("encoder")
    encoder = script.Encoder(32)
    counts = [sum(p.numel() for p in e.parameters()) for e in (encoder, jedi.Encoder(32))]
    assert counts == [20_704, 34_048] and all(f"{count:,}" in PAGE for count in counts)
    z = encoder(torch.randint(256, (6, 64, 64, 3), dtype=torch.uint8))
    assert z.shape == (6, 16, 8, 8) and z.dtype == torch.float32 and z.abs().max() < 3
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    assert "34,048" not in script.Encoder.__doc__


def test_one_step_is_one_call_of_the_denoiser(fork, monkeypatch):
    script = fork("one_step")
    by_preset, by_flag = (
        script.parse_args(f"--preset {x}".split()) for x in ("one_step", "paper --sample-steps 1")
    )
    assert dataclasses.replace(by_preset, preset="paper") == by_flag
    calls, denoised, agent = [], [], script.Agent(5, by_flag)
    forward, clamp = agent.denoiser.forward, agent.norm.clamp
    monkeypatch.setattr(agent.denoiser, "forward", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(agent.norm, "clamp", lambda z: denoised.append(clamp(z)) or denoised[-1])
    context, actions = torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    sampled = script.sample_next_latent(agent, context, actions, by_flag)
    # The sample is what the denoiser says, at the highest level: nothing of the noise is left.
    torch.testing.assert_close(sampled, denoised[0])
    assert calls == [1] and by_flag.sample_sigma_max == 5.0


def test_the_other_latents_go_through_every_network(fork):
    script = fork("latent_shape")
    args = script.Args(**MICRO)
    agent = script.Agent(5, args)
    count = sum(p.numel() for p in script.Encoder(32).parameters())
    assert f"| 32 x 4 x 4 | {count:,} |" in PAGE
    frames, actions = (
        torch.randint(256, (2, 5, 64, 64, 3), dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.int64),
    )
    z = agent.encode(frames)
    assert z.shape == (2, 5, 32, 4, 4) and z.abs().max() < 3
    assert script.sample_next_latent(agent, z[:, :4], actions[:, :4], args).shape == (2, 32, 4, 4)
    assert agent.reward.features(z, actions[:, :4]).shape == (2, 4, args.reward_width * 16)


def test_the_game_of_ones_own(fork):
    script = fork("my_game")
    assert script.resolve_env_id("my_game:Apples-v0") == (
        "my_game:Apples-v0",
        "my_game_Apples_v0",
    )
    env = script.make_env(script.Args(env_id="my_game:Apples-v0"))  # imports the module
    check_env(gym.make("Apples-v0").unwrapped, skip_render_check=True)
    env.reset(seed=0)
    game = env.unwrapped
    game.walker, game.apple, game.trap = (0, 0), (0, 1), (1, 1)
    frame, reward, end, cut, _ = env.step(1)  # to the right, where the apple is
    assert (reward, end, cut) == (1.0, False, False) and game.apple not in (game.walker, game.trap)
    assert frame.shape == (64, 64, 3) and tuple(frame[0, 16]) == tuple(frame[15, 31]) == (
        255,
        255,
        255,
    )
    assert env.step(2)[1] == 0 and game.walker == (0, 1)  # a wall
    assert env.step(3)[1:4] == (-1.0, True, False)  # down, into the trap
    env.reset()
    game.walker, game.apple, game.trap = (0, 0), (3, 0), (3, 3)
    steps = [env.step(2)[1:4] for _ in range(100)]  # up, against the wall, until time is over
    assert steps == [(0.0, False, False)] * 99 + [(0.0, False, True)]


def keep_replays(script, monkeypatch) -> list:
    """The buffers that a run will make; the first is the one that it learns from."""
    made = []

    class Kept(script.ReplayBuffer):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(script, "ReplayBuffer", Kept)
    return made


def assert_begins_with(replay, expected: dict[str, np.ndarray]) -> None:
    for key, values in expected.items():
        assert np.array_equal(getattr(replay, key)[: len(values)].numpy(), values), key


def test_recordings_are_in_the_replay_before_two_steps_of_play(fork, tmp_path, monkeypatch):
    """More of them than the replay was made for; then the page's run on hardly anything else."""
    script = fork("recordings")
    monkeypatch.chdir(tmp_path)
    expected, made = record(tmp_path, wide=2, long=1_100), keep_replays(script, monkeypatch)
    words = dict(total_steps=2, first_steps_min=2, first_steps_max=2, final_epochs=2)
    assert all(f"--{key.replace('_', '-')} " in "".join(blocks("bash")) for key in words)
    changes = words | dict(env_id="examples.toys:Catch-v0", final_episodes=1, run_dir="r")
    assert script.main(command_line(MICRO | changes)) == 0
    assert_begins_with(made[0], expected)
    rows, result = len(expected["actions"]), json.loads(Path("r/result.json").read_text())
    assert rows > 1_002 and made[0].size == rows + 2 and result["env_steps"] == 2
    assert made[0].num_episodes == 5 and made[0].lengths[4] == 2 and made[0].starts[4] == rows
    assert result["updates"] == {"diffusion": 6 + 4, "reward": 4 + 2, "policy": 2 + 2}


def test_a_run_with_recordings_is_killed_and_ends_with_the_same_bits(
    fork, folders, tmp_path, monkeypatch, capsys
):
    script = fork("recordings")
    monkeypatch.chdir(tmp_path)
    expected, made = record(tmp_path), keep_replays(script, monkeypatch)
    argv = [
        "--resume",
        *command_line(MICRO | dict(env_id="examples.toys:Catch-v0", final_episodes=1)),
    ]
    assert script.main([*argv, "--run-dir", "whole"]) == 0
    run = "import sys, jedi_atari, kill_me; sys.exit(kill_me.main(sys.argv[1], sys.argv[2:]))"
    paths = os.pathsep.join(map(str, (folders("recordings"), Path(kill_me.__file__).parent)))
    killed = subprocess.run(
        [sys.executable, "-c", run, "policy:4:9", *argv, "--run-dir", "killed"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    saved = script.load_checkpoint(Path("killed"))
    assert 0 < saved["collector"]["steps"] < 130
    Path("recordings").rename("elsewhere")
    capsys.readouterr()
    resume = ["--resume", "--run-dir", "killed"]
    assert script.main(resume) == 2 and "recordings/*.npz" in capsys.readouterr().err
    Path("elsewhere").rename("recordings")
    made[1:] = []
    assert script.main(resume) == 0
    whole, carried_on = made[0], made[1]
    assert_begins_with(whole, expected)
    assert whole.size > len(expected["actions"]) + 130
    for key in expected:
        assert torch.equal(getattr(whole, key), getattr(carried_on, key)), key
    found, reference = outcome(Path("killed")), outcome(Path("whole"))
    for key in reference:
        assert found[key] == reference[key], key


def test_bad_recordings_are_refused_by_name(fork, tmp_path, monkeypatch, capsys):
    script = fork("recordings")
    monkeypatch.chdir(tmp_path)
    record(tmp_path)
    path = Path("recordings/02.npz")
    good, whole = dict(np.load(path)), path.read_bytes()
    frames, actions, rewards = good["frames"], good["actions"], good["rewards"]
    bad = [
        dict(frames=frames.astype(np.float32)),
        dict(frames=frames[..., :1]),
        dict(frames=frames[:-1]),
        dict(frames=frames[0]),
        dict(frames=frames[:1], actions=actions[:0], rewards=rewards[:0]),
        dict(actions=actions[:-1]),
        dict(actions=actions[:, None]),
        dict(actions=np.array([0, 1, 3])),
        dict(actions=np.array([0, -1, 2])),
        dict(actions=np.array([0, 0.5, 2])),
        dict(rewards=rewards[:2]),
        dict(rewards=np.array([0, np.nan, 0])),
        dict(rewards=np.array([0, -np.inf, 0])),
        dict(rewards=np.array([0, 1e300, 0])),
        dict(terminated=1),
        dict(terminated=[True]),
        dict(terminated=None),  # needs pickle
    ]
    env, device = script.make_env(script.Args(env_id="examples.toys:Catch-v0")), torch.device("cpu")
    for changes in bad:
        np.savez(path, **good | changes)
        replay = script.ReplayBuffer(40, device)
        with pytest.raises(script.BadInput, match=r"^recordings/02.npz must hold frames [^\n]*$"):
            script.add_recordings(replay, env, path.parent)
        assert replay.size == 6 and not replay.open, changes  # what comes before it
    np.savez(path, **{key: good[key] for key in good if key != "rewards"})
    for content in (path.read_bytes(), whole[:-9], whole[:4000] + b"?" + whole[4001:], b""):
        path.write_bytes(content)
        argv = command_line(MICRO | dict(env_id="examples.toys:Catch-v0", run_dir="r"))
        assert script.main(argv) == 2 and not Path("r").exists()
        err = capsys.readouterr().err
        assert "error: recordings/02.npz must hold frames" in err and err.count("\n") == 1
        assert "actions (T,) from 0 to 2" in err


@pytest.mark.parametrize("game", ["examples.toys:Catch-v0", "Breakout"])
def test_the_pages_program_records_what_training_would_see(game, fork, tmp_path, monkeypatch):
    """Its files, played again, in the order of their names: the frames of the game, a file for each life."""
    (program,) = blocks("python")
    assert program.count('"Pong"') == program.count("range(20)") == 1
    program = program.replace('"Pong"', repr(game)).replace("range(20)", "range(7)")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/fork_it.md", "exec"), {})
    script, device = fork("recordings"), torch.device("cpu")
    env = script.make_env(args := script.Args(env_id=game))
    replay, played = (script.ReplayBuffer(4_000, device) for _ in range(2))
    script.add_recordings(replay, env, Path("recordings"))
    assert replay.num_episodes == 7 and replay.ends.sum() == 7 and not replay.open
    collector, begins = script.Collector(args), replay.starts[:7].tolist()
    over = True
    for start, length in zip(begins, replay.lengths[:7].tolist(), strict=True):
        if over:  # a game is over after 5 lives; each is seeded with its first file's number
            collector.frame, _ = collector.env.reset(seed=begins.index(start))
        for action in replay.actions[start : start + length - 1].tolist():
            over = bool(collector.step(None, played, action))
    assert (played.size, played.num_episodes) == (replay.size, 7)
    for key in ("frames", "actions", "rewards", "ends", "starts", "lengths"):
        assert torch.equal(getattr(played, key), getattr(replay, key)), key

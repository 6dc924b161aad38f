"""benchmark/ablations.py: each variant changes what it says, only within, and the table is of what was measured."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import ROOT, own_update, random_agent, random_windows, replace

sys.path.insert(0, str(ROOT / "benchmark"))

import ablations
import stochasticity

import jedi_atari as jedi
from play import runs


@pytest.fixture
def batch(micro) -> jedi.Windows:
    return random_windows(micro, micro.context_frames + micro.target_frames)


def encoder_gradient(
    agent: jedi.Agent, batch: jedi.Windows, args: jedi.Args
) -> torch.Tensor | None:
    """Gradient of the diffusion loss with respect to the encoder's first weights."""
    agent.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    jedi.diffusion_loss(agent, batch, args)[0].backward()
    gradient = agent.encoder.layers[0].weight.grad
    return None if gradient is None else gradient.clone()


def test_every_variant_makes_finite_updates_and_leaves_the_script_as_it_was(micro, batch):
    def script():
        names = ("diffusion_loss", "sample_next_latent", "clamp_latent")
        methods = [jedi.Encoder.forward, jedi.LatentNorm.clamp]
        return [getattr(jedi, name) for name in names] + methods

    before = script()
    for variant in ablations.VARIANTS.values():
        args = dict(latent_norm="none", encoder_stride=2, reward_blocks=2) | variant.arguments
        args = replace(micro, **args)
        with variant.change():
            agent = random_agent(args, 5)
            optimizers = {part: jedi.make_optimizer(agent, part, args) for part in jedi.PARTS}
            for number in range(2):
                metrics = own_update(
                    agent, "diffusion", optimizers["diffusion"], batch, number, args
                )
                assert torch.isfinite(metrics["loss"])
            window = random_windows(args, args.context_frames + args.reward_window)
            window = window._replace(mask=window.mask[:, 1:])
            metrics = own_update(agent, "reward", optimizers["reward"], window, 0, args)
            assert torch.isfinite(metrics["loss"])
            start = random_windows(args, args.context_frames)
            own_update(agent, "policy", optimizers["policy"], start, 0, args)
        assert script() == before


def test_no_clamp(micro, agent):
    frames = random_windows(micro, 1).frames[:, 0]
    with torch.no_grad():
        agent.encoder.layers[-1].conv[-1].bias += 10
        assert agent.encoder(frames).abs().max() <= 3
        with ablations.no_clamp():
            assert agent.encoder(frames).abs().max() > 3


def test_no_denoising_gradient(micro, agent, batch):
    assert encoder_gradient(agent, batch, micro).any()
    with ablations.no_denoising_gradient():
        assert encoder_gradient(agent, batch, micro) is None


def test_averaged_target(micro, batch):
    """At first the average is the encoder, and the loss of one target the same; later the targets lag behind."""
    args = replace(micro, target_frames=1, latent_norm="none")
    batch = jedi.Windows(*(field[:, : args.context_frames + 1] for field in batch))
    losses = {}
    for moved in (False, True):
        for name, change in (
            ("plain", ablations.contextlib.nullcontext),
            ("averaged", ablations.averaged_target),
        ):
            agent = random_agent(args, 5)
            with change():
                jedi.diffusion_loss(agent, batch, args)
                if moved:
                    with torch.no_grad():
                        agent.encoder.layers[-1].conv[-1].bias += 1
                torch.manual_seed(0)
                losses[name, moved] = jedi.diffusion_loss(agent, batch, args)[0].item()
    assert losses["plain", False] == pytest.approx(losses["averaged", False], rel=1e-5)
    assert losses["plain", True] != pytest.approx(losses["averaged", True], rel=1e-3)


def test_regression_has_no_chance_in_it_and_learns_the_mean(micro):
    """Two futures of one past: regression says their mean, as it must."""
    args = replace(
        micro,
        latent_norm="none",
        encoder_lr_scale=1e-12,
        encoder_stride=2,
        target_frames=1,
        learning_rate=3e-3,
    )
    batch = random_windows(args, args.context_frames + 1, batch=2)
    n = args.context_frames
    same = batch.frames.clone()
    same[1, :n] = same[0, :n]
    batch = batch._replace(frames=same, actions=batch.actions * 0)
    with ablations.regression():
        agent = random_agent(args, 5)
        optimizer = jedi.make_optimizer(agent, "diffusion", args)
        for number in range(300):
            own_update(agent, "diffusion", optimizer, batch, number, args)
        z = agent.encode(batch.frames).detach()
        first, second = (
            jedi.sample_next_latent(agent, z[:, :n], batch.actions[:, :n], args) for _ in range(2)
        )
    assert torch.equal(first, second)
    mean = z[:, n].mean(0)
    assert (first[0] - mean).square().mean() < 0.1 * (z[0, n] - mean).square().mean()


def test_normalised_before_the_clamp(micro, agent):
    """The encoder's output no longer depends on the scale of what comes before the clamp."""
    frames = random_windows(micro, 1).frames[:, 0]
    with ablations.normalised_before_clamp(), torch.no_grad():
        before = agent.encoder(frames)
        for layer in (agent.encoder.layers[-1].conv[-1], agent.encoder.layers[-1].skip):
            layer.weight *= 3
            layer.bias *= 3
        assert torch.allclose(agent.encoder(frames), before, atol=1e-3)


SMALL = dict(
    first_diffusion_updates=2, first_reward_updates=2, total_steps=140, first_steps_min=120, first_steps_max=120,
    epoch_steps=20, diffusion_updates=1, reward_updates=1, policy_updates=1, eval_episodes=1, final_episodes=2,
    max_episode_steps=40,
)  # fmt: skip
COMMAND = ["--games", "Catch", "--seeds", "3", "--threads", "1", "--only"]


def test_a_run_and_its_table(tmp_path, monkeypatch, capsys):
    """One very small run, measured as the large ones; a second call makes none again, one of other settings is refused."""
    monkeypatch.setitem(ablations.GAMES, "Catch", ablations.GAMES["Catch"] | SMALL)
    monkeypatch.setattr(runs, "UPDATES", 2)
    out = tmp_path / "new" / "a.jsonl"
    assert ablations.main([*COMMAND, "no clamp", "--out", str(out)]) == 0
    made = out.read_text()
    assert (
        ablations.main([*COMMAND, "no clamp", "--out", str(out)]) == 0 and out.read_text() == made
    )
    found = json.loads(made, parse_constant=pytest.fail)
    assert found["updates"] == {"diffusion": 3, "reward": 3, "policy": 1}
    assert set(found["pixels"]) == {"1", "2", "3"}
    assert cv2.imread(str(out.with_suffix(".png"))).std() > 10
    text = out.with_suffix(".md").read_text()
    assert text.count("| no clamp | 1 |") == 1 and f"{found['return']:.2f}" in text

    other = found | {"seed": 4, "arguments": found["arguments"] | {"horizon": 99}}
    for lines, message in (
        ([found, other], "line 2: horizon is 99, in line 1 5; such runs cannot be compared"),
        ([found, found], "lines 1 and 2 are the same run; delete one"),
        ([{"game": "Catch"}], "line 1, has no 'variant'; delete that line"),
    ):
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        capsys.readouterr()
        assert ablations.main(["--table", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    out.write_text(made + made[:40])
    assert ablations.main(["--table", "--out", str(out)]) == 2
    assert "line 2, is cut off or not JSON" in capsys.readouterr().err


def test_a_measure_over_nothing_is_null(tmp_path, monkeypatch):
    found = {"game": "Catch", "variant": "no clamp", "seed": 3, "seconds": 1, "return": None}
    found |= {"reward": dict.fromkeys((0, 1, 3, 5)), "std": 0.5, "false_alarms": None, "rank": None}
    found |= {"pixels": {1: float("nan"), 3: float("inf")}, "changed": {}, "arguments": {}}
    monkeypatch.setattr(ablations, "run", lambda *_: found)
    out = tmp_path / "a.jsonl"
    assert ablations.main([*COMMAND, "no clamp", "--out", str(out)]) == 0
    assert json.loads(out.read_text(), parse_constant=pytest.fail)["pixels"] == {
        "1": None,
        "3": None,
    }
    table = "| variant | seeds | std |\n| --- | ---: | ---: |\n| no clamp | 1 | 0.50 |\n"
    assert out.with_suffix(".md").read_text().endswith(table)


def test_a_game_that_stands_still_has_a_spread(monkeypatch):
    args = stochasticity.jedi.Args(**ablations.COMMON | dict(sample_steps=1))
    agent = stochasticity.jedi.Agent(3, args)
    monkeypatch.setattr(stochasticity, "DEVICE", torch.device("cpu"))
    frames = torch.zeros(args.context_frames, 64, 64, 3, dtype=torch.uint8)
    moment = stochasticity.Situation(frames, frames[:, 0, 0, 0].long(), frames[:2])
    found = stochasticity.spread(agent, [moment], args)
    assert found["spread_ratio"] is None and found["spread_share_of_change"] is None


@pytest.mark.parametrize("script", [ablations, stochasticity], ids=lambda script: script.__name__)
def test_tables_and_pictures_in_results_are_made_from_the_raw_ones(script, tmp_path, capsys):
    """Measuring does not touch a file of results, or one of somebody else."""
    name, out = script.__name__, tmp_path / "a.jsonl"
    shutil.copy(ROOT / f"results/{name}.jsonl", out)
    assert script.main(["--table", "--out", str(out)]) == 0 and not capsys.readouterr().err
    assert (tmp_path / "a.md").read_text() == (ROOT / f"results/{name}.md").read_text()
    one, other = (cv2.imread(str(x)) for x in (tmp_path / "a.png", ROOT / f"results/{name}.png"))
    assert one.shape == other.shape and abs(one.astype(float) - other).mean() < 5
    out.write_text("my notes\n")
    assert script.main(["--out", str(out)]) == 2
    assert "line 1, is cut off or not JSON" in capsys.readouterr().err
    assert out.read_text() == "my notes\n"


def test_a_table_is_drawn_in_a_notebooks_environment(tmp_path):
    shutil.copy(ROOT / "results/ablations.jsonl", tmp_path / "a.jsonl")
    command = [sys.executable, str(ROOT / "benchmark/ablations.py"), "--table", "--out"]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([*command, str(tmp_path / "a.jsonl")], env=env, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "a.png").exists()


def test_jobs_share_out_the_cores_that_may_be_used(tmp_path, monkeypatch):
    threads, command = [], ["--jobs", "2", "--out", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(jedi, "usable_cores", lambda: 7)
    monkeypatch.setattr(ablations, "run_all", lambda todo, *_: threads.append(todo[0][-1]))
    assert ablations.main(command) == 2 and threads == [3]  # nothing was made
    with pytest.raises(SystemExit):
        ablations.main(["--jobs", "0"])


@pytest.mark.slow
def test_two_runs_at_once_come_to_what_one_alone_comes_to(tmp_path, monkeypatch):
    """Each in a process of its own, so that no change meets another's. (Most of the time goes into the decoders.)"""
    monkeypatch.setitem(ablations.GAMES, "Catch", ablations.GAMES["Catch"] | SMALL)
    found = {}
    for jobs, names in (("1", ["no clamp"]), ("2", ["no clamp", "nothing changed"])):
        out = tmp_path / f"{jobs}.jsonl"
        assert ablations.main([*COMMAND, *names, "--jobs", jobs, "--out", str(out)]) == 0
        for row in map(json.loads, out.read_text().splitlines()):
            found[jobs, row["variant"]] = row
    keys = (("1", "no clamp"), ("2", "no clamp"), ("2", "nothing changed"))
    alone, beside, other = (found[key] for key in keys)
    assert alone["pixels"] == beside["pixels"] != other["pixels"]


@torch.no_grad()
def test_no_group_norm_before_the_reward_lstm(agent):
    """The same features but for their mean and scale."""
    torch.manual_seed(0)
    z, actions = torch.randn(2, 5, *jedi.LATENT_SHAPE), torch.randint(3, (2, 4))
    normalised = agent.reward.features(z, actions)
    with ablations.unnormalised_rewards():
        plain = agent.reward.features(z, actions)
    centred = plain - plain.mean(-1, keepdim=True)
    assert not torch.allclose(plain, normalised, atol=0.1)
    assert torch.allclose(
        centred / centred.std(-1, correction=0, keepdim=True), normalised, atol=1e-3
    )

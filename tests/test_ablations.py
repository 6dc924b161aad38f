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
import play_pictures


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
        args = replace(micro, **{"latent_norm": "none"} | variant.arguments)
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
        micro, latent_norm="none", encoder_lr_scale=1e-12, target_frames=1, learning_rate=3e-3
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


def test_a_run_and_its_table(tmp_path, monkeypatch):
    """One very small run, measured as the large ones; a second call makes none again."""
    monkeypatch.setitem(ablations.GAMES, "Catch", ablations.GAMES["Catch"] | SMALL)
    monkeypatch.setattr(play_pictures, "MAX_UPDATES", 2)
    command = [*COMMAND, "no clamp", "--out", str(tmp_path)]
    out = tmp_path / "centred"
    assert ablations.main(command) == 0
    files = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert set(files) == {"Catch__no_clamp__3.json"}
    assert ablations.main(command) == 0
    assert files == {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    found = json.loads((out / "Catch__no_clamp__3.json").read_text())
    assert found["updates"] == {"diffusion": 3, "reward": 3, "policy": 1}
    assert 0 <= found["position"] <= 1 and all(0 <= found["end"][k] <= 1 for k in ("0", "3"))
    assert set(found["pixels"]) == {"1", "2", "3"}
    assert cv2.imread(str(out / "ablations.png")).std() > 10
    text = (out / "ablations.md").read_text()
    assert text.count("| no clamp | 1 |") == 1 and f"{found['return']:.2f}" in text

    with pytest.raises(SystemExit):
        ablations.main(["--jobs", "0", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_measure_over_nothing_is_null(tmp_path, monkeypatch):
    found = {"game": "Catch", "variant": "no clamp", "seed": 3, "seconds": 1, "return": None}
    found |= {"reward": dict.fromkeys((0, 1, 3, 5)), "end": {0: 0.5, 3: None}, "std": 0.5}
    found |= {"pixels": {1: float("nan"), 3: float("inf")}, "false_alarms": None, "rank": None}
    monkeypatch.setattr(ablations, "run", lambda *_: found)
    monkeypatch.setattr(ablations, "draw", lambda *_: [][0])
    assert ablations.main([*COMMAND, "no clamp", "--out", str(tmp_path)]) == 0
    out = tmp_path / "centred"
    text = (out / "Catch__no_clamp__3.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["pixels"] == {"1": None, "3": None}
    table = "| variant | seeds | end 0 | std |\n|---|---|---|---|\n| no clamp | 1 | 0.50 | 0.50 |\n"
    assert (out / "ablations.md").read_text().endswith(table)


def test_a_game_that_stands_still_has_a_spread(monkeypatch):
    args = stochasticity.jedi.Args(**ablations.COMMON | dict(sample_steps=1))
    agent = stochasticity.jedi.Agent(3, args)
    monkeypatch.setattr(stochasticity, "DEVICE", torch.device("cpu"))
    frames = torch.zeros(args.context_frames, 64, 64, 3, dtype=torch.uint8)
    moment = stochasticity.Situation(frames, frames[:, 0, 0, 0].long(), frames[:2])
    found = stochasticity.spread(agent, [moment], args)
    assert found["spread_ratio"] is None and found["spread_share_of_change"] is None


@pytest.mark.parametrize("script", ["ablations --table", "stochasticity --redraw"])
def test_a_notebooks_backend_costs_no_table(script, tmp_path):
    name, option = script.split()
    shutil.copytree(ROOT / "results" / name, tmp_path / name)
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.md")]:
        path.unlink()
    command = [sys.executable, str(ROOT / f"benchmark/{name}.py"), option]
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / name)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert list(tmp_path.rglob(f"{name}.png")) and list(tmp_path.rglob(f"{name}.md"))


def test_jobs_share_out_the_cores_that_may_be_used(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(jedi, "usable_cores", lambda: 7)
    monkeypatch.setattr(
        ablations, "run_all", lambda todo, jobs: threads.append(todo[0][-1]["threads"])
    )
    assert ablations.main(["--jobs", "2", "--out", str(tmp_path)]) == 0 and threads == [3]


@pytest.mark.slow
def test_two_runs_at_once_come_to_what_one_alone_comes_to(tmp_path, monkeypatch):
    """Each in a process of its own, so that no change meets another's. (Most of the time goes into the decoders.)"""
    monkeypatch.setitem(ablations.GAMES, "Catch", ablations.GAMES["Catch"] | SMALL)
    found = {}
    for jobs, names in (("1", ["no clamp"]), ("2", ["no clamp", "nothing changed"])):
        out = tmp_path / jobs
        assert ablations.main([*COMMAND, *names, "--jobs", jobs, "--out", str(out)]) == 0
        for path in (out / "centred").glob("*.json"):
            found[jobs, path.stem[7:-3]] = json.loads(path.read_text())
    alone, beside, other = (
        found[key] for key in (("1", "no_clamp"), ("2", "no_clamp"), ("2", "nothing_changed"))
    )
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


@torch.no_grad()
def test_end_probability(micro):
    """A window at a time by hand; ends and other steps count alike; only the last k latents are imagined."""
    args = replace(micro, s_churn=0.0)
    agent = random_agent(args, 5)
    n, k = args.context_frames, 3
    windows = random_windows(args, n + k)
    windows.ends[:] = False
    windows.ends[0, -2] = True  # one end against all the others
    z = agent.encode(windows.frames)
    torch.manual_seed(0)
    found = {j: ablations.end_probability(agent, z, windows, j, args) for j in (0, k)}
    torch.manual_seed(0)
    for j, seen in ((0, z), (k, jedi.open_loop(agent, z, windows.actions, k, args))):
        right = []
        for i in range(len(z)):
            logits = agent.reward(seen[i : i + 1], windows.actions[i : i + 1, :-1])[1][0, -1]
            p_end = 1 / (1 + torch.exp(logits[0] - logits[1]))
            right.append(p_end if i == 0 else 1 - p_end)
        expected = (right[0] + torch.stack(right[1:]).mean()) / 2
        assert found[j] == pytest.approx(expected.item(), abs=1e-5)
    windows.ends[:] = False
    assert ablations.end_probability(agent, z, windows, 0, args) is None

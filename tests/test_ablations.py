"""benchmark/ablations.py: each variant changes what it says, only within, and the table is of what was measured."""

import json
import sys

import cv2
import pytest
import torch
from conftest import ROOT, random_agent, random_windows, replace

sys.path.insert(0, str(ROOT / "benchmark"))

import ablations

import jedi_atari as jedi


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
    gradient = agent.encoder.conv_in.weight.grad
    return None if gradient is None else gradient.clone()


def test_every_variant_makes_finite_updates_and_leaves_the_script_as_it_was(micro, batch):
    names = ("diffusion_loss", "sample_next_latent", "clamp_latent", "noise_like")
    before = [getattr(jedi, name) for name in names] + [jedi.Encoder.layers, jedi.LatentNorm.clamp]
    for variant in ablations.VARIANTS.values():
        args = replace(micro, **{"latent_norm": "none"} | variant.arguments)
        with variant.change():
            agent = random_agent(args, 5)
            parts = jedi.make_parts(agent, args, torch.device("cpu"))
            for number in range(2):
                assert torch.isfinite(
                    jedi.update(agent, parts["diffusion"], batch, number, args, False)["loss"]
                )
            jedi.update(
                agent, parts["policy"], random_windows(args, args.context_frames), 0, args, False
            )
        after = [getattr(jedi, name) for name in names] + [
            jedi.Encoder.layers,
            jedi.LatentNorm.clamp,
        ]
        assert after == before


def test_no_clamp(micro, agent):
    frames = random_windows(micro, 1).frames
    with torch.no_grad():
        agent.encoder.stages[-1].conv.bias += 10
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
                        agent.encoder.stages[-1].conv.bias += 1
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
        part = jedi.make_parts(agent, args, torch.device("cpu"))["diffusion"]
        for number in range(300):
            jedi.update(agent, part, batch, number, args, False)
        z = agent.encode(batch.frames).detach()
        first, second = (
            jedi.sample_next_latent(agent, z[:, :n], batch.actions[:, :n], args) for _ in range(2)
        )
    assert torch.equal(first, second)
    mean = z[:, n].mean(0)
    assert (first[0] - mean).square().mean() < 0.1 * (z[0, n] - mean).square().mean()


def test_normalised_before_the_clamp(micro, agent):
    """The encoder's output no longer depends on the scale of what comes before the clamp."""
    frames = random_windows(micro, 1).frames
    with ablations.normalised_before_clamp(), torch.no_grad():
        before = agent.encoder(frames)
        for layer in (agent.encoder.stages[-1].conv, agent.encoder.stages[-1].skip):
            layer.weight *= 3
            layer.bias *= 3
        assert torch.allclose(agent.encoder(frames), before, atol=1e-3)


def test_a_run_and_its_table(tmp_path, monkeypatch):
    """One very small run, measured as the large ones; a second call makes none again."""
    small = dict(
        first_diffusion_updates=2, first_reward_updates=2, total_steps=140, first_steps_min=120, first_steps_max=120,
        epoch_steps=20, diffusion_updates=1, reward_updates=1, policy_updates=1, heldout_steps=60,
        eval_episodes=1, final_episodes=2, eval_envs=2, max_episode_steps=40,
    )  # fmt: skip
    monkeypatch.setitem(ablations.GAMES, "Catch", ablations.GAMES["Catch"] | small)
    monkeypatch.setattr(
        jedi, "measure_costs", lambda *a: dict.fromkeys(("collect", *jedi.PARTS, "games"), 0.01)
    )
    command = [
        "--games",
        "Catch",
        "--only",
        "no clamp",
        "--seeds",
        "3",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
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

    # Two at once, each in a process of its own: the same numbers.
    again = ["--only", "no clamp", "nothing changed", "--jobs", "2", "--out", str(tmp_path / "two")]
    assert ablations.main([*command, *again]) == 0
    both = tmp_path / "two" / "centred"
    assert json.loads((both / "Catch__no_clamp__3.json").read_text())["pixels"] == found["pixels"]
    assert (
        json.loads((both / "Catch__nothing_changed__3.json").read_text())["pixels"]
        != found["pixels"]
    )
    with pytest.raises(SystemExit):
        ablations.main(["--jobs", "0", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_no_group_norm_before_the_reward_lstm(agent):
    """The same features but for their mean and scale."""
    torch.manual_seed(0)
    z, actions = torch.randn(2, 5, *jedi.LATENT_SHAPE), torch.randint(3, (2, 4))
    with torch.no_grad():
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
    imagined = jedi.open_loop(
        agent, z[:, :n], windows.actions[:, : n - 1], windows.actions[:, n - 1 : -1], args
    )
    for j, seen in ((0, z), (k, torch.cat([z[:, :n], imagined], dim=1))):
        right = []
        for i in range(len(z)):
            logits = agent.reward(seen[i : i + 1], windows.actions[i : i + 1, :-1])[1][0, -1]
            p_end = 1 / (1 + torch.exp(logits[0] - logits[1]))
            right.append(p_end if i == 0 else 1 - p_end)
        expected = (right[0] + torch.stack(right[1:]).mean()) / 2
        assert found[j] == pytest.approx(expected.item(), abs=1e-5)
    windows.ends[:] = False
    assert ablations.end_probability(agent, z, windows, 0, args) is None

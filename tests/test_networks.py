"""Sizes, initial values, optimisers, and rules about the script as a text."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, has_bf16_lstm, replace

import jedi_atari as jedi

SOURCE = (ROOT / "jedi_atari.py").read_text()


def test_parameter_counts_of_the_papers_sizes():
    counts = jedi.parameter_counts(jedi.Agent(18, jedi.Args()))
    assert counts == {
        "encoder": 34_048,
        "denoiser": 4_334_192,
        "reward": 5_882_405,
        "policy": 3_159_571,
        "total": 13_410_216,
    }


def test_the_encoders_latent(agent):
    z = agent.encoder(torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8))
    assert z.shape == (2, 3, 16, 8, 8) and z.dtype == torch.float32 and z.abs().max() < 3


def test_untrained_policy_is_uniform_and_untrained_denoiser_predicts_c_skip(micro):
    torch.manual_seed(0)
    agent = jedi.Agent(6, replace(micro, latent_norm="none"))
    logits, values, _ = agent.policy(torch.randn(2, 3, 16, 8, 8), None)
    assert not logits.any() and not values.any()
    context, actions = torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    assert not agent.denoiser(torch.randn(2, 16, 8, 8), torch.zeros(2), context, actions).any()


def test_lstm_forget_bias_is_one(agent):
    for lstm in (agent.policy.lstm, agent.reward.lstm):
        n = lstm.hidden_size
        total = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
        fresh = torch.nn.LSTM(4, n)
        jedi.init_lstm_(fresh)
        total = (fresh.bias_ih_l0 + fresh.bias_hh_l0).detach()
        assert torch.equal(total[n : 2 * n], torch.ones(n)) and total.sum() == n
        w = fresh.weight_hh_l0.detach()
        torch.testing.assert_close(w.T @ w, torch.eye(n), atol=1e-4, rtol=0)


def test_the_state_stays_zero_through_padding(agent):
    x = torch.randn(2, 3, 1024)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    h, c = jedi.masked_lstm(agent.policy.lstm, x, mask)
    h_alone, c_alone = agent.policy.lstm(x[:1, 2:])[1]
    h_all, c_all = agent.policy.lstm(x[1:])[1]
    torch.testing.assert_close(h, torch.cat([h_alone, h_all], dim=1))
    torch.testing.assert_close(c, torch.cat([c_alone, c_all], dim=1))


def test_optimisers_cover_each_parameter_with_the_right_decay_and_rate(micro):
    agent = jedi.Agent(5, micro)
    parts = jedi.make_parts(agent, micro, torch.device("cpu"))
    expected = {
        "diffusion": [agent.denoiser, agent.encoder],
        "reward": [agent.reward, agent.encoder],
        "policy": [agent.policy],
    }
    names = {id(p): n for n, p in agent.named_parameters()}
    for part, modules in expected.items():
        groups = parts[part].optimizer.param_groups
        owned = [id(p) for g in groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for m in modules for p in m.parameters()) and len(
            set(owned)
        ) == len(owned)
        for group in groups:
            for p in group["params"]:
                name = names[id(p)]
                scale = micro.encoder_lr_scale if name.startswith("encoder") else 1.0
                assert group["lr"].item() == pytest.approx(micro.learning_rate * scale)
                decayed = p.dim() > 1 and "action_embedding" not in name and part != "policy"
                assert group["weight_decay"] == (micro.weight_decay if decayed else 0.0), name


def test_warm_up_is_linear(agent, micro):
    from conftest import random_windows

    args = replace(micro, warmup_updates=4)
    part = jedi.make_parts(agent, args, torch.device("cpu"))["policy"]
    rates = []
    for i in range(6):
        jedi.update(agent, part, random_windows(args, args.context_frames), i, args, False)
        rates.append(part.optimizer.param_groups[0]["lr"].item() / args.learning_rate)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_gradients_are_clipped(agent, micro):
    from conftest import random_windows

    args = replace(micro, clip_diffusion=1e-3)
    part = jedi.make_parts(agent, args, torch.device("cpu"))["diffusion"]
    metrics = jedi.update(
        agent, part, random_windows(args, args.context_frames + 2), 0, args, False
    )
    norm = torch.stack([p.grad.norm() for p in part.parameters if p.grad is not None]).norm()
    assert metrics["grad_norm"] > 1e-3 and norm.item() == pytest.approx(1e-3, rel=0.01)


def test_the_reward_models_lstm_sees_features_of_one_scale(agent, micro):
    """Whatever the blocks add up to: zero mean, unit variance for each transition; no gate near its bounds."""
    torch.manual_seed(0)
    z, actions = torch.randn(4, 6, *jedi.LATENT_SHAPE).clamp(-1, 1), torch.randint(3, (4, 5))
    with torch.no_grad():
        agent.reward.conv_in.weight.mul_(100)
        features = agent.reward.features(z, actions)
        hidden = agent.reward.lstm(features)[0]
    assert features.mean(-1).abs().max() < 1e-4 and torch.allclose(
        features.std(-1), torch.ones(4, 5), atol=0.01
    )
    assert hidden.abs().max() < 0.95


def test_every_trained_parameter_gets_a_gradient(agent, micro):
    from conftest import random_windows

    losses = {
        "diffusion": jedi.diffusion_loss(
            agent, random_windows(micro, micro.context_frames + 2), micro
        ),
        "reward": jedi.reward_termination_loss(agent, short(random_windows(micro, 8)), micro),
        "policy": jedi.actor_critic_loss(agent, random_windows(micro, micro.context_frames), micro),
    }
    for name, part in jedi.make_parts(agent, micro, torch.device("cpu")).items():
        agent.zero_grad()
        losses[name][0].backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in part.parameters
        ), name


def short(batch: jedi.Windows) -> jedi.Windows:
    return batch._replace(mask=batch.mask[:, 1:])


def test_importing_the_script_runs_nothing_and_needs_nothing_of_the_project():
    tree = ast.parse(SOURCE)
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.ClassDef,
        ast.FunctionDef,
        ast.Assign,
        ast.AnnAssign,
        ast.Expr,
        ast.If,
        ast.Try,
    )
    assert all(isinstance(node, allowed) for node in tree.body)
    ifs = [node for node in tree.body if isinstance(node, ast.If)]
    assert len(ifs) == 1 and ast.unparse(ifs[0].test) == "__name__ == '__main__'"
    imported = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    local = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not imported & local


def test_every_argument_is_read():
    tree = ast.parse(SOURCE)
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}
    read = set()
    for node in tree.body:
        if node is cls or (isinstance(node, ast.FunctionDef) and node.name == "check_args"):
            continue
        read |= {
            n.attr
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
        }
        for call in (
            n
            for n in ast.walk(node)
            if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"
        ):
            text = ast.unparse(
                call.args[1]
            )  # getattr(args, f"first_{name}_updates") for each of the three parts
            read |= {f for f in fields for part in jedi.PARTS if f in text.replace("{name}", part)}
    assert fields and not fields - read


def test_every_argument_has_a_comment_and_every_number_a_source():
    block = SOURCE[SOURCE.index("class Args:") : SOURCE.index("PRESETS:")]
    lines = re.findall(r"^    (\w+): [^#\n]+ = [^#\n]+  # (.+)$", block, re.M)
    names = {name for name, _ in lines}
    assert names == {f.name for f in jedi.dataclasses.fields(jedi.Args)}
    where_run = {
        "env_id",
        "preset",
        "seed",
        "threads",
        "device",
        "compile",
        "run_dir",
        "resume",
        "eval_only",
        "dry_run",
    }
    unsourced = {
        n for n, comment in lines if not re.search(r"\[[PDEC](, [PDEC])*\]", comment)
    } - where_run
    assert not unsourced


def test_deviations_in_the_script_and_in_the_docs_are_the_same():
    marked = re.findall(r"DEVIATION (\d+)", SOURCE)
    documented = re.findall(
        r"^## DEVIATION (\d+)", Path(ROOT / "docs/implementation_details.md").read_text(), re.M
    )
    assert sorted(set(marked), key=int) == [str(i) for i in range(1, len(set(marked)) + 1)]
    assert sorted(set(marked)) == sorted(documented)


def test_presets_name_real_arguments_and_pass_the_checks():
    for name, changes in jedi.PRESETS.items():
        jedi.check_args(jedi.Args(**{"preset": name, **changes}))


def test_deterministic_parts_of_the_plan():
    plan = jedi.make_plan(jedi.Args(), first_steps=5_000)
    assert plan == jedi.Plan(
        epochs=1 + 950 + 50, steps=100_000, diffusion=10_000 + 1_000 * 400, reward=10_000 + 1_000 * 400,
        policy=5_000 + 1_000 * 400, games=4 * (1 + 100) + 100,
    )  # fmt: skip


def test_bf16_and_fp32_agree(agent, micro):
    from conftest import random_windows

    batches = {
        "diffusion": random_windows(micro, micro.context_frames + 2),
        "reward": short(random_windows(micro, 8)),
        "policy": random_windows(micro, micro.context_frames),
    }
    lstm = has_bf16_lstm()
    for name, part in jedi.make_parts(agent, micro, torch.device("cpu")).items():
        if name != "diffusion" and not lstm:
            pytest.skip("diffusion agrees; this processor has no LSTM in bf16 for the other two")
        results = []
        for bf16 in (False, True):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = part.loss(agent, batches[name], micro)
            agent.zero_grad()
            loss.backward()
            results.append((loss.item(), torch.cat([p.grad.flatten() for p in part.parameters])))
        (loss, gradient), (loss16, gradient16) = results
        assert loss16 == pytest.approx(loss, rel=0.02), name
        assert (gradient16 - gradient).norm() < 0.2 * gradient.norm(), name

"""Sizes, initial values, optimisers, and rules about the script as a text."""

import ast
import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, own_update, random_agent, random_windows, replace

import jedi_atari as jedi

SOURCE = (ROOT / "jedi_atari.py").read_text()


def test_parameter_counts_of_the_papers_sizes():
    agent = jedi.Agent(18, jedi.Args())
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in agent.named_children()}
    assert counts == {
        "encoder": 34_048,
        "norm": 0,
        "denoiser": 4_334_192,
        "reward": 5_882_405,
        "policy": 3_159_571,
    }


def test_the_encoders_latent(agent):
    """Of one value in (-3, 3) whether frames come one by one, in windows or in chunks."""
    frames = torch.randint(256, (3, 7, 64, 64, 3), dtype=torch.uint8)
    z = agent.latents(frames)
    assert z.shape == (3, 7, 16, 8, 8) and z.dtype == torch.float32 and z.abs().max() < 3
    assert 3 * 7 > jedi.CPU_CHUNK
    torch.testing.assert_close(z.flatten(0, 1), agent.encoder(frames.flatten(0, 1)))
    torch.testing.assert_close(z[1, 2:3], agent.latents(frames[1, 2:3]))


def test_an_encoder_of_stride_2_sees_every_pixel():
    """Same latents in shape and range, one stage less, and no pixel between the strides."""
    torch.manual_seed(0)
    encoder, papers = jedi.Encoder(8, stride=2), jedi.Encoder(8)
    assert len(papers.layers) - len(encoder.layers) == 2  # a stage and its pooling
    frame = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    z = encoder(frame)
    assert z.shape == (1, 16, 8, 8) and z.abs().max() < 3
    changed = frame.repeat(64, 1, 1, 1)
    for i in range(64):  # a pixel on each of 64 rows and columns
        changed[i, i, 63 - i] = 255 - changed[i, i, 63 - i]
    assert ((encoder(changed) - z).abs().amax((1, 2, 3)) > 1e-6).all()


@pytest.mark.parametrize(("blocks", "attention"), [(3, 0), (8, 0), (10, 2), (11, 3)])
def test_reward_blocks_from_the_ninth_on_have_attention(micro, blocks, attention):
    model = jedi.RewardTerminationModel(5, replace(micro, reward_blocks=blocks))
    layers = [isinstance(block.attention, jedi.SelfAttention) for block in model.blocks]
    assert layers == [False] * (blocks - attention) + [True] * attention
    rewards, ends = model(torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 3, dtype=torch.long))
    assert rewards.shape == (2, 3, 3) and ends.shape == (2, 3, 2)


def test_padding_is_encoded_as_zero(agent):
    frames, mask = torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8), torch.ones(2, 3).bool()
    mask[0, :2] = False
    z = agent.encode(frames, mask)
    assert not z[0, :2].any() and torch.equal(z[mask], agent.encode(frames)[mask])


def test_untrained_policy_is_uniform_and_untrained_denoiser_predicts_c_skip(micro):
    torch.manual_seed(0)
    agent = jedi.Agent(6, replace(micro, latent_norm="none"))
    logits, values, _ = agent.policy(torch.randn(2, 3, 16, 8, 8), None)
    assert not logits.any() and not values.any()
    context, actions = torch.randn(2, 4, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long)
    cond = agent.denoiser.condition(torch.zeros(2), actions)
    assert not agent.denoiser(torch.randn(2, 16, 8, 8), context, cond).any()


def test_lstms_begin_orthogonal_and_remembering(micro):
    agent = jedi.Agent(5, micro)
    for lstm in (agent.policy.lstm, agent.reward.lstm):
        n = lstm.hidden_size
        total = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
        assert torch.equal(total[n : 2 * n], torch.ones(n)) and total.sum() == n
        w = lstm.weight_hh_l0.detach()
        torch.testing.assert_close(w.T @ w, torch.eye(n), atol=1e-4, rtol=0)


def test_attention_against_a_naive_loop_over_heads_with_the_normalised_residual():
    """DIAMOND's form: what is added is the normalised input, not the input."""
    torch.manual_seed(0)
    layer = jedi.SelfAttention(16)
    torch.nn.init.normal_(layer.out.weight)
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(2, 16, 8, 8)
    normal = torch.nn.functional.group_norm(x, 1, layer.norm.weight, layer.norm.bias)
    q, k, v = layer.qkv(normal).flatten(2).split(16, dim=1)  # (2, 16, 64) each
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        weights = (q[:, part].transpose(1, 2) @ k[:, part] / 8**0.5).softmax(-1)
        heads.append((weights @ v[:, part].transpose(1, 2)).transpose(1, 2))
    expected = normal + layer.out(torch.cat(heads, dim=1).reshape(2, 16, 8, 8))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_a_block_against_its_formula():
    """x + conv(silu(norm(conv(silu(norm(x))))))), each norm scaled and shifted by the condition."""
    torch.manual_seed(0)
    block = jedi.ResBlock(8, 16)
    torch.nn.init.normal_(block.conv2.weight)
    x, cond = torch.randn(3, 8, 8, 8), torch.randn(3, 48)

    def adaptive(y, part):
        mean, std = y.mean((1, 2, 3), keepdim=True), y.var((1, 2, 3), False, keepdim=True)
        scale, shift = part.reshape(3, 2, -1, 1, 1).unbind(1)
        y = (y - mean) / (std + 1e-5).sqrt() * (1 + scale) + shift
        return y * torch.sigmoid(y)

    y = block.conv2(adaptive(block.conv1(adaptive(x, cond[:, :16])), cond[:, 16:]))
    torch.testing.assert_close(block(x, cond), block.skip(x) + y, atol=1e-4, rtol=1e-4)


def fused_attention(layer: jedi.SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer with PyTorch's own attention."""
    b, c, h, w = x.shape
    x = layer.norm(x)
    qkv = layer.qkv(x).flatten(2).reshape(b, 3, layer.heads, c // layer.heads, h * w)
    y = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))
    return x + layer.out(y.transpose(2, 3).reshape(b, c, h, w))


@pytest.mark.parametrize("channels", [8, 48, 160])
def test_attention_is_pytorchs(channels):
    """Forward and backward."""
    torch.manual_seed(0)
    layer, x = jedi.SelfAttention(channels), torch.randn(3, channels, 8, 8, requires_grad=True)
    torch.nn.init.normal_(layer.out.weight, std=0.1)
    given, weight = (x, *layer.parameters()), torch.randn(x.shape)
    found = []
    for y in (layer(x), fused_attention(layer, x)):
        found.append((y, *torch.autograd.grad((y * weight).sum(), given)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def separate_layers(scales: torch.nn.Linear, blocks: list) -> dict:
    """For each block two linear layers, one for each of its norms, with the rows of the one layer for all."""
    layers, first = {}, 0
    for block in blocks:
        layers[block] = []
        for conv in (block.conv1, block.conv2):
            layer = torch.nn.Linear(scales.in_features, 2 * conv.in_channels)
            rows = slice(first, first := first + layer.out_features)
            layer.weight.data, layer.bias.data = scales.weight.data[rows], scales.bias.data[rows]
            layers[block].append(layer)
    assert first == scales.out_features
    return layers


def conditioned(block: jedi.ResBlock, layers: dict, x, cond) -> torch.Tensor:
    """A block that scales and shifts by layers of its own."""
    y, norms = x, (block.norm1, block.norm2)
    for norm, conv, layer in zip(norms, (block.conv1, block.conv2), layers[block], strict=True):
        scale, shift = layer(cond)[:, :, None, None].chunk(2, dim=1)
        y = conv(F.silu(norm(y) * (1 + scale) + shift))
    return block.attention(block.skip(x) + y)


@torch.no_grad()
def test_one_layer_conditions_as_a_layer_for_each_norm_does(micro):
    agent = random_agent(replace(micro, denoiser_width=64, reward_blocks=10), 5)
    torch.manual_seed(1)
    net, actions = agent.denoiser, torch.randint(5, (3, 4))
    x, context, c_noise = torch.randn(3, 16, 8, 8), torch.randn(3, 4, 16, 8, 8), torch.randn(3)
    layers = separate_layers(net.scales, [net.down, *net.middle, *net.up])
    angle = 2 * math.pi * c_noise[:, None] * net.fourier
    noise = torch.cat([angle.cos(), angle.sin()], dim=1)
    cond = net.cond(noise + net.action_embedding(actions).flatten(1))
    x0 = net.conv_in(torch.cat([(context / net.sigma_data).flatten(1, 2), x], dim=1))
    x1 = y = conditioned(net.down, layers, x0, cond)
    for block in net.middle:
        y = conditioned(block, layers, y, cond)
    for block, skip in zip(net.up, (x1, x0), strict=True):
        y = conditioned(block, layers, torch.cat([y, skip], dim=1), cond)
    y = net.conv_out(F.silu(net.norm_out(y)))
    found = net(x, context, net.condition(c_noise, actions))
    torch.testing.assert_close(found, y, atol=1e-4, rtol=1e-4)

    net, z = agent.reward, torch.randn(3, 5, 16, 8, 8)
    layers = separate_layers(net.scales, net.blocks)
    y = net.conv_in(torch.cat([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1))
    for block in net.blocks:
        y = conditioned(block, layers, y, net.action_embedding(actions.flatten()))
    y = F.group_norm(y, 1).reshape(3, 4, -1)
    torch.testing.assert_close(net.features(z, actions), y, atol=1e-4, rtol=1e-4)


def test_an_lstm_computes_in_float32_whatever_is_around_it(agent):
    x, state = torch.randn(2, 3, 1024), torch.randn(2, 1, 2, 16).unbind(0)
    expected = agent.policy.lstm(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        found = agent.policy.lstm(x, state)
        short, _ = agent.policy.lstm(x.bfloat16())
    assert short.dtype == torch.float32
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_a_group_has_32_channels():
    assert [jedi.group_norm(c).num_groups for c in (8, 16, 32, 64, 160)] == [1, 1, 1, 2, 5]


def test_the_state_stays_zero_through_padding(agent):
    x = torch.randn(2, 3, 1024)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    h, c = jedi.masked_lstm(agent.policy.lstm, x, mask)
    h_alone, c_alone = agent.policy.lstm(x[:1, 2:])[1]
    h_all, c_all = agent.policy.lstm(x[1:])[1]
    torch.testing.assert_close(h, torch.cat([h_alone, h_all], dim=1))
    torch.testing.assert_close(c, torch.cat([c_alone, c_all], dim=1))


OWNED = {
    "diffusion": ("denoiser", "encoder"),
    "reward": ("reward", "encoder"),
    "policy": ("policy",),
}


@pytest.mark.parametrize("part", jedi.PARTS)
def test_optimisers_cover_each_parameter_with_the_right_decay_and_rate(micro, part):
    agent = jedi.Agent(5, micro)
    groups = jedi.make_optimizer(agent, part, micro).param_groups
    names = {id(p): n for n, p in agent.named_parameters()}
    owned = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(n for n in names.values() if n.startswith(OWNED[part]))
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            scale = micro.encoder_lr_scale if name.startswith("encoder") else 1.0
            assert group["peak"] == pytest.approx(micro.learning_rate * scale)
            decayed = p.dim() > 1 and "action_embedding" not in name and part != "policy"
            assert group["weight_decay"] == (0.01 if decayed else 0.0), name


def test_an_update_learns_at_the_share_of_the_rate_that_it_is_given(agent, micro):
    """In the warm-up; what training gives is in test_run.py."""
    args = replace(micro, warmup_updates=4)
    optimizer, rates = jedi.make_optimizer(agent, "policy", args), []
    for i in range(6):
        own_update(agent, "policy", optimizer, random_windows(args, args.context_frames), i, args)
        rates.append(optimizer.param_groups[0]["lr"] / args.learning_rate)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


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


@pytest.mark.parametrize(("part", "limit"), [("diffusion", 1.0), ("reward", 100.0)])
def test_gradients_are_clipped_at_diamonds_norms(agent, micro, monkeypatch, part, limit):
    """And the metric is the norm before that; nothing else changes the gradient."""
    name = {"diffusion": "diffusion_loss", "reward": "reward_termination_loss"}[part]
    loss = getattr(jedi, name)

    def scaled(*given):
        value, metrics = loss(*given)
        return 1e4 * value, metrics

    monkeypatch.setattr(jedi, name, scaled)
    optimizer = jedi.make_optimizer(agent, part, micro)
    batch = random_windows(micro, micro.context_frames + 2)
    batch = batch if part == "diffusion" else short(batch)
    metrics = own_update(agent, part, optimizer, batch, 0, micro)
    norms = [p.grad.norm() for g in optimizer.param_groups for p in g["params"]]
    assert metrics["grad_norm"] > 10 * limit
    assert torch.stack(norms).norm().item() == pytest.approx(limit, rel=0.01)


def test_an_update_is_adamws_step_by_hand(agent, micro):
    """The first one: every weight moves by its rate against the sign of its gradient, less decay."""
    args = replace(micro, warmup_updates=0)
    optimizer = jedi.make_optimizer(agent, "reward", args)
    before = {id(p): p.detach().clone() for p in agent.parameters()}
    own_update(agent, "reward", optimizer, short(random_windows(args, 8)), 0, args)
    for group in optimizer.param_groups:
        for p in group["params"]:
            rate, decay = group["peak"], group["weight_decay"]
            step = p.grad / (p.grad.abs() + 1e-8)
            expected = before[id(p)] * (1 - rate * decay) - rate * step
            torch.testing.assert_close(p.detach(), expected, atol=rate * 1e-2, rtol=1e-5)
    moved = {n.split(".")[0] for n, p in agent.named_parameters() if not p.equal(before[id(p)])}
    assert moved == {"encoder", "reward"}


LOSSES = {
    "diffusion": lambda agent, args: jedi.diffusion_loss(
        agent, random_windows(args, args.context_frames + 2), args
    ),
    "reward": lambda agent, args: jedi.reward_termination_loss(
        agent, short(random_windows(args, 8)), args
    ),
    "policy": lambda agent, args: jedi.actor_critic_loss(
        agent, random_windows(args, args.context_frames), args
    ),
}


@pytest.mark.parametrize("part", jedi.PARTS)
def test_every_trained_parameter_gets_a_gradient_and_no_other(agent, micro, part):
    LOSSES[part](agent, micro)[0].backward()
    for name, p in agent.named_parameters():
        if name.startswith(OWNED[part]):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.grad is None or not p.grad.any(), name


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
            text = ast.unparse(call.args[1])  # getattr(args, f"{first}{part}_updates")
            for first, part in itertools.product(("", "first_"), jedi.PARTS):
                name = text.replace("{first}", first).replace("{part}", part)
                read |= {field for field in fields if f"'{field}'" in name}
    assert fields and not fields - read


def test_every_argument_has_a_comment_and_every_number_a_source():
    block = SOURCE[SOURCE.index("class Args:") : SOURCE.index("PRESETS:")]
    lines = re.findall(r"^    (\w+): [^#\n]+ = [^#\n]+  # (.+)$", block, re.M)
    assert {name for name, _ in lines} == {f.name for f in dataclasses.fields(jedi.Args)}
    where_run = "seed threads".split()
    numbers = {f.name for f in dataclasses.fields(jedi.Args) if f.metadata} - set(where_run)
    unsourced = {n for n, text in lines if not re.search(r"\[[PDEC](, [PDEC])*\]", text)}
    assert not numbers & unsourced


def test_deviations_in_the_script_and_in_the_docs_are_the_same():
    marked = re.findall(r"DEVIATION\s+(\d+)", SOURCE)
    documented = re.findall(
        r"^## DEVIATION (\d+)", Path(ROOT / "docs/implementation_details.md").read_text(), re.M
    )
    assert sorted(set(marked), key=int) == [str(i) for i in range(1, len(set(marked)) + 1)]
    assert sorted(set(marked)) == sorted(documented)


def test_presets_name_real_arguments_and_pass_the_checks():
    for name, changes in jedi.PRESETS.items():
        jedi.check_args(jedi.Args(**{"preset": name, **changes}))


@pytest.mark.parametrize("part", jedi.PARTS)
def test_bf16_and_fp32_agree(agent, micro, monkeypatch, part):
    dream = jedi.imagine(agent, random_windows(micro, micro.context_frames), micro)
    monkeypatch.setattr(jedi, "imagine", lambda *_: dream)  # a sampled action may be another one
    results = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = LOSSES[part](agent, micro)
        agent.zero_grad()
        loss.backward()
        gradients = [p.grad.flatten() for p in agent.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (loss16, gradient16) = results
    assert loss16 == pytest.approx(loss, rel=0.02)
    assert (gradient16 - gradient).norm() < 0.2 * gradient.norm()

"""Preconditioning, noise, schedule, sampler, clamp, random switching and the flow of gradients."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import own_update, random_agent, random_windows, replace

import jedi_atari as jedi


def test_precondition_at_a_known_level():
    # EDM table 1 at sigma = sigma_data, no offset: c_skip 1/2, c_out sigma_data / sqrt 2, c_in 1 / (sigma_data sqrt 2).
    given = jedi.precondition(torch.tensor([0.5]), sigma_data=0.5, sigma_offset=0.0)
    c_in, c_out, c_skip, c_noise = (c.item() for c in given)
    assert c_skip == pytest.approx(0.5)
    assert c_out == pytest.approx(0.5 / math.sqrt(2))
    assert c_in == pytest.approx(1 / (0.5 * math.sqrt(2)))
    assert c_noise == pytest.approx(math.log(0.5) / 4)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 20.0])
def test_precondition_closed_form(sigma):
    data, offset = 0.5, 0.3
    total = sigma**2 + offset**2
    given = jedi.precondition(torch.tensor([sigma], dtype=torch.float64), data, offset)
    c_in, c_out, c_skip, c_noise = (c.item() for c in given)
    assert c_skip == pytest.approx(data**2 / (total + data**2))
    assert c_out == pytest.approx(math.sqrt(total) * data / math.sqrt(total + data**2))
    assert c_in == pytest.approx(1 / math.sqrt(total + data**2))
    assert c_noise == pytest.approx(math.log(total) / 8)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0])
def test_input_and_target_of_the_network_have_unit_variance(micro, monkeypatch, sigma):
    torch.manual_seed(0)
    z = 0.5 * torch.randn(40_000, 4, 1, 1)
    monkeypatch.setattr(jedi, "NOISE_RANGE", (sigma, sigma))
    noisy, levels = jedi.add_noise(z, micro)
    assert levels.shape == (40_000,) and (levels == sigma).all()
    c_in, c_out, c_skip, _ = jedi.precondition(levels, 0.5, 0.3)
    assert (c_in * noisy).var().item() == pytest.approx(1, rel=0.02)
    assert ((z - c_skip * noisy) / c_out).var().item() == pytest.approx(1, rel=0.02)


def test_offset_noise_is_shared_by_a_channel(micro, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(jedi, "NOISE_RANGE", (0.0, 0.0))
    noise, _ = jedi.add_noise(torch.zeros(2_000, 4, 8, 8), micro)
    assert torch.equal(noise, noise[..., :1, :1].expand_as(noise))
    assert noise.std().item() == pytest.approx(0.3, rel=0.05)


def test_training_noise_levels(micro):
    torch.manual_seed(0)
    _, sigma = jedi.add_noise(torch.zeros(200_000, 1, 1, 1), micro)
    assert sigma.min() >= 0.002 and sigma.max() <= 20
    inside = sigma[(sigma > 0.002) & (sigma < 20)].log()
    assert inside.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert inside.std().item() == pytest.approx(1.2, abs=0.02)


def test_karras_schedule():
    sigmas = jedi.karras_sigmas(3, 0.002, 5.0, 7.0)
    middle = ((5.0 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigmas == pytest.approx([5.0, middle, 0.002, 0.0])
    assert jedi.karras_sigmas(1, 0.002, 5.0, 7.0) == pytest.approx([5.0, 0.0])
    many = jedi.karras_sigmas(50, 0.002, 5.0, 7.0)
    assert all(a > b for a, b in zip(many, many[1:], strict=False)) and len(many) == 51


class Ideal:
    """Stands in for an agent's denoiser: its D_theta, with EDM's preconditioning around it, is the function given."""

    def __init__(self, denoised, args: jedi.Args):
        self.denoised, self.data, self.offset = denoised, args.sigma_data**2, args.sigma_offset**2

    def condition(self, c_noise, actions):
        return c_noise

    def __call__(self, x, context, cond):
        total = torch.exp(8 * cond)[:, None, None, None]  # sigma^2 + sigma_offset^2
        z, skip = x * torch.sqrt(total + self.data), self.data / (total + self.data)
        target = self.denoised(z, torch.sqrt((total - self.offset).clamp(min=0)))
        return (target - skip * z) / torch.sqrt(total * skip)


def ideal_sample(denoised, args: jedi.Args, shape=(64, 16, 8, 8)) -> torch.Tensor:
    """`sample_next_latent` with the ideal denoiser, and no clamp."""
    agent = SimpleNamespace(denoiser=Ideal(denoised, args), norm=SimpleNamespace(clamp=lambda z: z))
    context, actions = torch.zeros(shape[0], 4, *shape[1:]), torch.zeros(shape[0], 4).long()
    return jedi.sample_next_latent(agent, context, actions, args)


def test_the_denoiser_is_told_the_level_that_it_is_given(micro):
    """The sampler's levels: with churn, the raised ones where the latent is then."""
    args, told = replace(micro, s_churn=1.0, sigma_offset=0.0), []

    def denoised(z, sigma):
        told.append(sigma[0].item())
        return torch.zeros_like(z)

    ideal_sample(denoised, args)
    gamma = min(1 / 3, math.sqrt(2) - 1)
    sigmas = jedi.karras_sigmas(3, 0.002, 5.0, 7.0)[:3]
    assert told == pytest.approx([sigma * (1 + gamma) for sigma in sigmas], rel=1e-5)


def test_denoising_follows_the_preconditioned_formula(micro):
    """A sample of one step is what the denoiser says of the first noise."""
    agent = random_agent(replace(micro, latent_norm="none"), 5)
    past, actions = torch.randn(2, 4, 16, 8, 8), torch.randint(5, (2, 4))
    for level in (0.1, 2.0):
        args = replace(micro, latent_norm="none", sample_steps=1, sample_sigma_max=level)
        torch.manual_seed(1)
        got = jedi.sample_next_latent(agent, past, actions, args)
        torch.manual_seed(1)
        z, total, data = torch.randn(2, 16, 8, 8), level**2 + 0.3**2, args.sigma_data**2
        cond = agent.denoiser.condition(torch.full((2,), math.log(total) / 8), actions)
        inside = agent.denoiser(z / math.sqrt(total + data), past, cond)
        skip, out = data / (total + data), math.sqrt(total * data / (total + data))
        expected = 3 * torch.tanh((skip * z + out * inside) / 3)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def naive_sample(agent: jedi.Agent, context, actions, args: jedi.Args) -> torch.Tensor:
    """Euler steps one by one: at each the conditioning anew and the preconditioning on tensors."""
    sigmas = jedi.karras_sigmas(args.sample_steps, 0.002, args.sample_sigma_max, 7.0)
    gamma = min(args.s_churn / args.sample_steps, math.sqrt(2) - 1)
    z = torch.randn(context[:, -1].shape)
    for sigma, following in itertools.pairwise(sigmas):
        hat = sigma * (1 + gamma)
        if gamma:
            z = z + math.sqrt(hat**2 - sigma**2) * torch.randn(z.shape)
        levels = torch.full((len(z),), hat)
        c_in, c_out, c_skip, c_noise = jedi.precondition(levels, args.sigma_data, args.sigma_offset)
        cond = agent.denoiser.condition(c_noise, actions)
        output = agent.denoiser(c_in * z, context, cond)
        denoised = agent.norm.clamp(c_skip * z + c_out * output)
        z = z + (following - hat) * (z - denoised) / hat
    return z


@pytest.mark.parametrize("norm", ["none", "center"])
@pytest.mark.parametrize("churn", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_sampler_against_a_naive_loop(micro, norm, churn, steps):
    args = replace(micro, latent_norm=norm, s_churn=churn, sample_steps=steps)
    agent = random_agent(args, 5)
    context, actions = torch.randn(3, 4, 16, 8, 8), torch.randint(5, (3, 4))
    found = []
    for sample in (jedi.sample_next_latent, naive_sample):
        torch.manual_seed(1)
        found.append((sample(agent, context, actions, args), torch.rand(())))  # as much noise
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def gaussian(mean: float, std: float):
    """The ideal denoiser of Gaussian data, known in closed form."""
    return lambda z, sigma: (std**2 * z + sigma**2 * mean) / (std**2 + sigma**2)


@pytest.mark.parametrize("sample_start", ["unit", "sigma_max"])
def test_sampler_follows_the_exact_solution_for_gaussian_data(micro, sample_start):
    mean, std = 0.7, 0.4
    micro = replace(micro, sample_start=sample_start)
    errors = []
    for steps in (3, 10, 40, 160):
        torch.manual_seed(0)
        z = ideal_sample(gaussian(mean, std), replace(micro, sample_steps=steps))
        torch.manual_seed(0)
        start = torch.randn(z.shape) * (
            micro.sample_sigma_max if sample_start == "sigma_max" else 1
        )
        # The probability-flow ODE of Gaussian data shrinks the distance to the mean by this factor.
        exact = mean + (start - mean) * std / math.sqrt(std**2 + micro.sample_sigma_max**2)
        errors.append((z - exact).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.01 * start.std()
    # Started at sigma_max, samples vary as the data do (but for the little that the schedule leaves out).
    if sample_start == "sigma_max":
        assert z.mean().item() == pytest.approx(mean, abs=0.07) and z.std().item() == pytest.approx(
            std, rel=0.05
        )


def test_churn_puts_noise_back(micro):
    # From one and the same start, samples without churn are equal; with it they spread, but not beyond the data.
    spreads = []
    for churn in (0.0, 1.0, 20.0):
        torch.manual_seed(0)
        args = replace(micro, sample_steps=20, s_churn=churn)
        spreads.append(ideal_sample(gaussian(0.0, 0.4), args, (256, 4, 4, 4)).std().item())
    assert spreads[0] < spreads[1] < spreads[2] < 0.45


def test_sampler_with_a_perfect_denoiser_returns_the_target(micro):
    target = torch.randn(2, 16, 8, 8)
    z = ideal_sample(lambda z, sigma: target, micro, target.shape)
    torch.testing.assert_close(z, target, atol=1e-5, rtol=1e-5)


def test_clamp_is_bounded_and_almost_the_identity_near_zero(agent, micro):
    z = torch.linspace(-50, 50, 1001)
    assert jedi.clamp_latent(z).abs().max() <= 3
    small = torch.linspace(-0.1, 0.1, 11)
    torch.testing.assert_close(jedi.clamp_latent(small), small, atol=1e-4, rtol=1e-3)


def test_every_denoised_estimate_is_clamped(micro, monkeypatch):
    args, clamped = replace(micro, latent_norm="none"), []
    agent = random_agent(args, 5)
    clamp = agent.norm.clamp
    monkeypatch.setattr(agent.norm, "clamp", lambda z: clamped.append(clamp(z)) or clamped[-1])
    for p in agent.denoiser.conv_out.parameters():
        p.data.mul_(100)
    actions = torch.zeros(2, 4, dtype=torch.long)
    out = jedi.sample_next_latent(agent, torch.randn(2, 4, 16, 8, 8), actions, args)
    assert len(clamped) == args.sample_steps > 1
    assert all(2.9 < z.abs().max() <= 3 for z in clamped)
    torch.testing.assert_close(out, clamped[-1])  # the last step goes all the way


def test_centred_latents_have_mean_zero_and_standard_deviation_sigma_data(micro):
    norm = jedi.LatentNorm("center", 0.5)
    torch.manual_seed(0)
    background = torch.randn(16, 8, 8)
    for _ in range(300):
        norm.update(background + 0.05 * torch.randn(8, 6, 16, 8, 8), torch.ones(8, 6))
    z = norm(background + 0.05 * torch.randn(500, 16, 8, 8))
    assert z.mean().item() == pytest.approx(0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, rel=0.05)


def test_centring_counts_real_frames_only():
    plain, masked = jedi.LatentNorm("center", 0.5), jedi.LatentNorm("center", 0.5)
    z = torch.randn(4, 6, 16, 8, 8)
    mask = torch.ones(4, 6)
    mask[:, :2] = 0
    plain.update(z[:, 2:], mask[:, 2:])
    masked.update(z, mask)
    torch.testing.assert_close(plain.mean, masked.mean)
    torch.testing.assert_close(plain.variance, masked.variance)


def test_centred_clamp_is_the_encoders_range():
    norm = jedi.LatentNorm("center", 0.5)
    norm.update(0.3 + 0.1 * torch.randn(4, 6, 16, 8, 8), torch.ones(4, 6))
    inside = norm(torch.empty(10, 16, 8, 8).uniform_(-2.99, 2.99))
    assert torch.equal(norm.clamp(inside), inside)
    torch.testing.assert_close(
        norm.clamp(torch.full((1, 16, 8, 8), 1e6)), norm(torch.full((1, 16, 8, 8), 3.0))
    )


def encoder_gradient(loss: torch.Tensor, agent: jedi.Agent) -> float:
    agent.zero_grad()
    loss.backward()
    return sum(p.grad.abs().sum().item() for p in agent.encoder.parameters() if p.grad is not None)


def masked_frames(batch: jedi.Windows, keep: slice) -> jedi.Windows:
    mask = torch.zeros_like(batch.mask)
    mask[:, keep] = True
    return batch._replace(mask=mask)


@pytest.mark.parametrize("norm", ["none", "center"])
def test_the_encoder_learns_through_the_context_and_not_through_the_target(micro, norm):
    args = replace(micro, latent_norm=norm, target_frames=1)
    agent = random_agent(args, 5)
    batch = random_windows(args, args.context_frames + 1)
    loss, _ = jedi.diffusion_loss(agent, batch, args)
    assert encoder_gradient(loss, agent) > 0
    # With all of the context padded (a zero latent) only the target is left: no gradient may come from there.
    loss, _ = jedi.diffusion_loss(agent, masked_frames(batch, slice(-1, None)), args)
    assert loss > 0 and encoder_gradient(loss, agent) == 0


def test_the_encoder_gets_nothing_from_the_actor_critic(agent, micro):
    loss, _ = jedi.actor_critic_loss(agent, random_windows(micro, micro.context_frames), micro)
    assert encoder_gradient(loss, agent) == 0
    for name in ("denoiser", "reward"):
        assert all(p.grad is None or not p.grad.any() for p in getattr(agent, name).parameters())
    assert any(p.grad.any() for p in agent.policy.parameters())


def test_the_reward_loss_reaches_the_encoder(agent, micro):
    batch = random_windows(micro, 8)
    loss, _ = jedi.reward_termination_loss(agent, batch._replace(mask=batch.mask[:, 1:]), micro)
    assert encoder_gradient(loss, agent) > 0


def test_imagined_reward_windows_against_a_loop(agent, micro):
    """Every latent after the context is sampled from the four before it; only R_psi learns from such a window."""
    args, n = replace(micro, reward_dreamed=1.0), micro.context_frames
    batch = random_windows(args, n + args.reward_window)
    batch = batch._replace(mask=batch.mask[:, 1:])
    batch.mask[0, -2:] = False  # one episode ended
    torch.manual_seed(3)
    loss, _ = jedi.reward_termination_loss(agent, batch, args)
    torch.manual_seed(3)
    with torch.no_grad():
        z = agent.encode(batch.frames)
        for t in range(n, z.shape[1]):
            z[:, t] = jedi.sample_next_latent(
                agent, z[:, t - n : t], batch.actions[:, t - n : t], args
            )
        reward_logits, end_logits = agent.reward(z, batch.actions[:, :-1])
        total = 0.0
        for b, t in batch.mask.nonzero().tolist():
            sign, end = int(batch.rewards[b, t].sign()) + 1, int(batch.ends[b, t])
            total -= (
                reward_logits[b, t].log_softmax(-1)[sign] + end_logits[b, t].log_softmax(-1)[end]
            )
    expected = total / batch.mask.sum()
    torch.testing.assert_close(loss.detach(), expected)
    assert encoder_gradient(loss, agent) == 0
    assert all(p.grad is None for p in agent.denoiser.parameters())
    assert all(p.grad.any() for p in agent.reward.parameters())


def test_a_share_of_the_reward_windows_is_imagined_from_end_to_end(agent, micro, monkeypatch):
    """Each window wholly or not at all; its context is always real."""
    args, n, seen = replace(micro, reward_dreamed=0.25), micro.context_frames, []
    batch, reward = random_windows(args, n + args.reward_window, batch=100), agent.reward.forward
    batch = batch._replace(mask=batch.mask[:, 1:])
    monkeypatch.setattr(
        agent.reward, "forward", lambda z, a: seen.append(z.detach()) or reward(z, a)
    )
    jedi.reward_termination_loss(agent, batch, args)
    same = (seen[0] == agent.encode(batch.frames).detach()).flatten(2).all(2)
    assert same[:, :n].all() and (same[:, n:].all(1) | ~same[:, n:].any(1)).all()
    assert (~same[:, n]).float().mean() == pytest.approx(0.25, abs=0.15)


def contexts_seen(agent, args, monkeypatch) -> list[torch.Tensor]:
    """The newest context latent of the second target, over many batches, with the encoder's own beside it."""
    seen, forward = [], agent.denoiser.forward
    monkeypatch.setattr(
        agent.denoiser,
        "forward",
        lambda x, context, cond: (seen.append(context), forward(x, context, cond))[1],
    )
    batch = random_windows(args, args.context_frames + 2)
    own = agent.encode(batch.frames)[:, args.context_frames].detach()
    result = []
    for seed in range(24):
        torch.manual_seed(seed)
        seen.clear()
        jedi.diffusion_loss(agent, batch, args)
        result.append((seen[1][:, -1], own))
    return result


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 4, 20), (1.0, 24, 24)])
def test_random_switching_takes_both_branches(micro, monkeypatch, probability, low, high):
    args = replace(micro, latent_norm="none", switch_prob=probability)
    agent = random_agent(args, 5)
    pairs = contexts_seen(agent, args, monkeypatch)
    # Whole batches switch: the newest context is the encoder's latent for all rows or for none.
    from_encoder = [torch.allclose(seen, own, atol=1e-5) for seen, own in pairs]
    from_itself = [
        not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, own, strict=True))
        for seen, own in pairs
    ]
    assert all(a != b for a, b in zip(from_encoder, from_itself, strict=True))
    assert low <= sum(from_itself) <= high
    assert all(seen.abs().max() <= 3 for seen, _ in pairs)


def test_the_denoisers_own_output_carries_no_gradient(micro):
    # Always switching, context and first target padded: the second target's loss sees only the denoiser's own output,
    # and that is detached, so nothing of the encoder's is left.
    args = replace(micro, latent_norm="none", switch_prob=1.0)
    agent = random_agent(args, 5)
    n = args.context_frames
    batch = masked_frames(random_windows(args, n + 2), slice(n, None))
    loss, _ = jedi.diffusion_loss(agent, batch, args)
    assert encoder_gradient(loss, agent) == 0
    loss, _ = jedi.diffusion_loss(agent, batch, replace(args, switch_prob=0.0))
    assert encoder_gradient(loss, agent) > 0


def test_padding_contributes_no_loss(agent, micro):
    n = micro.context_frames
    batch = random_windows(micro, n + 2)
    batch.mask[0] = False
    changed = batch.frames.clone()
    changed[0] = 255 - changed[0]
    losses = []
    for frames in (batch.frames, changed):
        torch.manual_seed(3)
        losses.append(
            jedi.diffusion_loss(random_agent(micro, 5), batch._replace(frames=frames), micro)[
                0
            ].item()
        )
    assert losses[0] == losses[1]


def test_the_denoiser_can_learn_one_transition(micro):
    """Its loss, measured at the same noise before and after."""
    args = replace(micro, learning_rate=5e-3, warmup_updates=1)
    torch.manual_seed(0)
    agent = jedi.Agent(5, args)
    optimizer = jedi.make_optimizer(agent, "diffusion", args)
    batch = random_windows(args, args.context_frames + 2, batch=1)
    batch = jedi.Windows(*(field.repeat(4, *[1] * (field.dim() - 1)) for field in batch))

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(1)
        return sum(jedi.diffusion_loss(agent, batch, args)[0].item() for _ in range(10))

    before = loss()
    for i in range(50):
        own_update(agent, "diffusion", optimizer, batch, i, args)
    assert loss() < 0.7 * before

"""lambda-returns, masked imagination and the policy's loss, against naive loops."""

import pytest
import torch
from conftest import own_update, random_agent, random_windows, replace

import jedi_atari as jedi


def naive_returns(rewards, ends, values, gamma, lambda_):
    """The definition as a double loop: a weighted sum of all n-step returns, for one trajectory of plain numbers."""
    horizon = len(rewards)

    def n_step(t, n):
        total, discount = 0.0, 1.0
        for i in range(t, t + n):
            total += discount * rewards[i]
            if ends[i]:
                return total
            discount *= gamma
        return total + discount * values[t + n]

    result = []
    for t in range(horizon):
        left = horizon - t
        mixed = sum((1 - lambda_) * lambda_ ** (n - 1) * n_step(t, n) for n in range(1, left))
        result.append(mixed + lambda_ ** (left - 1) * n_step(t, left))
    return result


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("share_of_ends", [0.0, 0.3, 1.0])
def test_lambda_returns_against_a_double_loop(lambda_, share_of_ends):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 9, generator=g)
    ends = torch.rand(6, 9, generator=g) < share_of_ends
    values = torch.randn(6, 10, generator=g)
    got = jedi.lambda_returns(rewards, ends, values, 0.9, lambda_)
    for b in range(6):
        naive = naive_returns(
            rewards[b].tolist(), ends[b].tolist(), values[b].tolist(), 0.9, lambda_
        )
        assert got[b].tolist() == pytest.approx(naive, abs=1e-5)


def test_lambda_returns_by_hand():
    # Two steps, an end after the first: the second step's reward and value must not reach the first.
    got = jedi.lambda_returns(
        torch.tensor([[1.0, 5.0]]),
        torch.tensor([[True, False]]),
        torch.tensor([[7.0, 7.0, 2.0]]),
        0.5,
        0.95,
    )
    assert got.tolist() == [[1.0, 6.0]]


@pytest.fixture
def without_chance(monkeypatch):
    """No randomness: the likeliest action, reward and end, and no noise in the sampler."""
    monkeypatch.setattr(jedi, "sample_categorical", lambda logits: logits.argmax(-1))
    monkeypatch.setattr(jedi.torch, "randn", lambda *shape, **_: torch.ones(*shape))


def dream_alone(agent, start, row, args):
    """The same imagination for one row, one step at a time, that stops at an end. Padding is left out, not masked."""
    n = args.context_frames
    first = int((~start.mask[row]).sum())
    frames = agent.encode(start.frames[row : row + 1], start.mask[row : row + 1])[0]
    actions = [int(a) for a in start.actions[row, : n - 1]]
    policy_state = reward_state = None
    for t in range(first, n - 1):
        _, _, policy_state = agent.policy(frames[None, t : t + 1], policy_state)
        pair = agent.reward.features(frames[None, t : t + 2], torch.tensor([[actions[t]]]))
        _, reward_state = agent.reward.lstm(pair, reward_state)
    frames, rewards, ends, values = list(frames), [], [], []
    for _ in range(args.horizon):
        logits, value, policy_state = agent.policy(frames[-1][None, None], policy_state)
        values.append(value.item())
        actions.append(int(logits.argmax()))
        taken = torch.tensor([actions[-n:]])
        frames.append(
            jedi.sample_next_latent(agent, torch.stack(frames[-n:])[None], taken, args)[0]
        )
        pair = agent.reward.features(torch.stack(frames[-2:])[None], taken[:, -1:])
        hidden, reward_state = agent.reward.lstm(pair, reward_state)
        reward_logits, end_logits = agent.reward.head(hidden).split([3, 2], dim=-1)
        rewards.append(float(reward_logits.argmax() - 1))
        ends.append(bool(end_logits.argmax()))
        if ends[-1]:
            break
    _, value, _ = agent.policy(frames[-1][None, None], policy_state)
    return rewards, ends, [*values, value.item()], actions[n - 1 :]


def test_an_expected_reward_is_the_mean_of_the_sampled_ones(micro):
    """The same dream either way, since the same numbers are drawn; its rewards against the model's own softmax."""
    agent, start = random_agent(micro, 5), random_windows(micro, micro.context_frames)
    agent.reward.head[-1].bias.data.zero_()  # rewards are not rare
    dreams = {}
    for expected in (False, True):
        torch.manual_seed(3)
        dreams[expected] = jedi.imagine(agent, start, replace(micro, expected_reward=expected))
    for a, b in zip(
        dreams[False][:2] + dreams[False][3:5], dreams[True][:2] + dreams[True][3:5], strict=True
    ):
        assert torch.equal(a, b)
    assert set(dreams[False].rewards.unique().tolist()) <= {-1.0, 0.0, 1.0}
    with torch.no_grad():
        z = torch.cat([agent.encode(start.frames[:, :-1]), dreams[True].z], dim=1)
        actions = torch.cat([start.actions[:, :-1], dreams[True].actions], dim=1)
        logits = agent.reward(z, actions)[0][:, -micro.horizon :].double().exp()
    mean = (logits[..., 2] - logits[..., 0]) / logits.sum(-1)
    torch.testing.assert_close(dreams[True].rewards.double(), mean, atol=1e-5, rtol=1e-4)
    assert mean.abs().max() > 0.01


def test_masked_imagination_equals_a_loop_that_stops(micro, without_chance):
    args = replace(micro, horizon=6)
    lengths = []
    with torch.no_grad():
        for seed in range(6):
            agent = random_agent(args, 5, seed)
            agent.reward.head[-1].weight.mul_(8)  # so that rewards and ends differ along the way
            agent.reward.head[-1].bias.zero_()
            start = random_windows(args, args.context_frames, batch=5, seed=seed)
            for row, padded in enumerate((0, 1, 2, 3, 0)):
                start.mask[row, :padded] = False
            start = start._replace(actions=start.actions * start.mask)
            dream = jedi.imagine(agent, start, args)
            _, values, _ = agent.policy(dream.z, dream.policy_state)
            returns = jedi.lambda_returns(
                dream.rewards, dream.ends, values, args.gamma, args.td_lambda
            )
            for row in range(5):
                rewards, ends, naive_values, actions = dream_alone(agent, start, row, args)
                steps = len(rewards)
                lengths.append(steps)
                assert dream.alive[row].tolist() == [True] * steps + [False] * (
                    args.horizon - steps
                )
                assert dream.actions[row, :steps].tolist() == actions
                assert dream.rewards[row, :steps].tolist() == rewards
                expected = naive_returns(rewards, ends, naive_values, args.gamma, args.td_lambda)
                assert returns[row, :steps].tolist() == pytest.approx(expected, abs=1e-4)
    assert (
        min(lengths) < args.horizon and max(lengths) > 1
    )  # the test saw trajectories that end and that go on


def test_what_follows_an_end_does_not_count(agent, micro, monkeypatch):
    """Rewards and latents after the end change neither the loss nor its gradient."""
    start = random_windows(micro, micro.context_frames)
    dream = jedi.imagine(agent, start, micro)
    ends = torch.zeros_like(dream.ends)
    ends[:, 0] = True
    alive = torch.zeros_like(dream.alive)
    alive[:, 0] = True
    losses = []
    for rewards, z in ((dream.rewards, dream.z), (dream.rewards.clone(), dream.z.clone())):
        if losses:
            rewards[:, 1:] = 100.0
            z[:, 2:] = -1.0
        fixed = dream._replace(rewards=rewards, z=z, ends=ends, alive=alive)
        monkeypatch.setattr(jedi, "imagine", lambda *a, fixed=fixed: fixed)
        losses.append(jedi.actor_critic_loss(agent, start, micro)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_policy_gradient_by_hand(agent, micro, monkeypatch):
    """The loss's gradient on the logits of one step: -(advantage) d log pi(a) for REINFORCE."""
    args = replace(micro, horizon=1, entropy_weight=0.0)
    start = random_windows(args, args.context_frames, batch=1)
    dream = jedi.imagine(agent, start, args)._replace(
        rewards=torch.tensor([[1.0]]), ends=torch.tensor([[True]]), alive=torch.tensor([[True]])
    )
    monkeypatch.setattr(jedi, "imagine", lambda *a: dream)
    agent.zero_grad()
    jedi.actor_critic_loss(agent, start, args)[0].backward()
    logits, values, _ = agent.policy(dream.z, dream.policy_state)
    advantage = 1.0 - values[0, 0].item()
    expected = advantage * (logits[0, 0].softmax(-1) - torch.eye(5)[dream.actions[0, 0]])
    torch.testing.assert_close(
        agent.policy.policy.bias.grad, expected.detach(), atol=1e-5, rtol=1e-4
    )
    assert agent.policy.value.bias.grad.item() == pytest.approx(-2 * advantage, abs=1e-5)


def test_entropy_bonus_flattens_the_policy(agent, micro):
    start = random_windows(micro, micro.context_frames, batch=8)
    args = replace(micro, entropy_weight=100.0, learning_rate=3e-3, warmup_updates=1)
    optimizer = jedi.make_optimizer(agent, "policy", args)
    entropies = [
        own_update(agent, "policy", optimizer, start, i, args)["entropy"].item() for i in range(30)
    ]
    assert entropies[-1] > entropies[0]


def test_sampling_follows_the_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    drawn = jedi.sample_categorical(probabilities.log().expand(60_000, 3))
    shares = torch.bincount(drawn, minlength=3) / 60_000
    torch.testing.assert_close(shares, probabilities, atol=0.01, rtol=0)

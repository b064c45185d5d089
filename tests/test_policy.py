"""Every advantage and every loss equals a reference in float64 that is written here from its formula."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from model.generate import sample
from model.rl import critic
from model.rl.clipping import Clipped, DynamicClipping
from model.rl.policy import (
    ADVANTAGES,
    ALGORITHMS,
    KL,
    TOKEN_LOSSES,
    PolicyOptions,
    Tokens,
    clipped_shares,
    gae,
    mean_by_answer,
    per_sequence,
    scored,
    value_loss,
    whitened,
)
from tests import tiny

RNG = np.random.default_rng(0)
REWARDS = np.array([[1.1, 0.1, 0.1, 1.1], [0.1, 0.1, 0.0, 1.1], [1.1, 1.1, 1.1, 1.1]])
LENGTHS = [3, 1, 5]
ANSWERS = np.repeat(np.arange(3), LENGTHS)
NOW, ROLLOUT = -RNG.random(9) * 2, -RNG.random(9) * 2
SIGNS = np.repeat([1.0, -0.5, -2.0], LENGTHS)
OPTIONS = PolicyOptions(0.2, 0.28, drift=0.7)


def tokens(dtype=torch.float64, **changes) -> Tokens:
    fields = {"logps": NOW, "rollout": ROLLOUT, "advantages": SIGNS, **changes}
    return Tokens(**{name: torch.tensor(value, dtype=dtype) for name, value in fields.items()}, answers=torch.tensor(ANSWERS))


# ---------------------------------------------------------------- advantages


def population(values) -> tuple[float, float]:
    """Mean and sample standard deviation, as the papers' code has it (divided by n - 1)."""
    values = [float(value) for value in values]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def reference_advantage(name: str) -> list[list[float]]:
    centred = [[r - population(row)[0] for r in row] for row in REWARDS]
    if name == "dr_grpo":
        return centred
    if name == "grpo":
        return [[(r - population(row)[0]) / (population(row)[1] + 1e-4) for r in row] for row in REWARDS]
    if name == "rloo":
        return [[r - (sum(row) - r) / (len(row) - 1) for r in row] for row in REWARDS]
    values = REWARDS.tolist() if name == "reinforce++" else centred
    mean, deviation = population([r for row in values for r in row])
    return [[(r - mean) / (deviation + 1e-8) for r in row] for row in values]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_equals_its_formula(name):
    found = ADVANTAGES[name](torch.tensor(REWARDS))
    np.testing.assert_allclose(found.numpy(), reference_advantage(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "reinforce++"])
def test_a_group_whose_answers_are_all_alike_teaches_nothing(name):
    assert ADVANTAGES[name](torch.tensor(REWARDS))[2].abs().max() < 1e-12
    assert torch.isfinite(ADVANTAGES[name](torch.ones(2, 4))).all()


def test_leave_one_out_is_the_mean_of_the_group_times_n_by_n_minus_1():
    rewards = torch.tensor(REWARDS)
    torch.testing.assert_close(ADVANTAGES["rloo"](rewards), ADVANTAGES["dr_grpo"](rewards) * 4 / 3)


def test_whitening_leaves_mean_0_and_deviation_1():
    found = whitened(torch.tensor(REWARDS))
    assert found.mean().abs() < 1e-12 and abs(found.std() - 1) < 1e-7


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_is_the_weighted_sum_of_the_temporal_differences(gamma, lam):
    rewards, values = RNG.random(6), RNG.random(6)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(6)]
    expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(6 - t)) for t in range(6)]
    advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)
    np.testing.assert_allclose(returns, np.array(expected) + values, rtol=1e-12)


def test_gae_to_the_end_is_the_return_less_the_value_and_padding_changes_nothing():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.3, 0.6, 0.2])
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.ones(3))
    padded = [torch.cat([part, torch.zeros(4)]) for part in (rewards, values)]
    torch.testing.assert_close(gae(*padded, 1.0, 0.9)[0][:3], gae(rewards, values, 1.0, 0.9)[0])


# ---------------------------------------------------------------- losses of tokens


def reference_loss(name: str) -> list[float]:
    found = []
    for k in range(9):
        log_ratio, advantage = NOW[k] - ROLLOUT[k], SIGNS[k]
        if name == "gspo":
            mine = [j for j in range(9) if ANSWERS[j] == ANSWERS[k]]
            log_ratio = sum(NOW[j] - ROLLOUT[j] for j in mine) / len(mine)
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 0.8), 1.28)
        if name == "cispo":
            found.append(-min(ratio, 1.28) * advantage * NOW[k])
        elif name == "cpgd":
            bounded = min(max(log_ratio, math.log(0.8)), math.log(1.28))
            found.append(-min(log_ratio * advantage, bounded * advantage) + 0.7 * (ratio - 1 - log_ratio))
        else:
            found.append(-min(ratio * advantage, clipped * advantage))
    return found


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_every_token_loss_equals_its_formula(name):
    np.testing.assert_allclose(TOKEN_LOSSES[name](tokens(), OPTIONS)[0], reference_loss(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name):
    """At rho = 1 they all are -A times the gradient of logp; they differ in what they do when the policy has moved."""
    logps = torch.tensor(ROLLOUT, requires_grad=True)
    now = tokens()._replace(logps=logps)
    weights = per_sequence(torch.tensor(LENGTHS))[now.answers] if name == "gspo" else torch.ones(9)
    (weights * TOKEN_LOSSES[name](now, OPTIONS)[0]).sum().backward()
    torch.testing.assert_close(logps.grad, -weights * now.advantages)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_what_has_gone_too_far_gets_no_gradient_and_may_come_back(name):
    if name == "cispo":
        pytest.skip("it clips the weight of a token, not its gradient")
    for advantage, away, moves in ((1.0, 2.0, False), (1.0, -2.0, True), (-1.0, -2.0, False), (-1.0, 2.0, True)):
        logps = torch.full((9,), away, dtype=torch.float64, requires_grad=True)
        now = tokens(rollout=np.zeros(9), advantages=np.full(9, advantage))._replace(logps=logps)
        TOKEN_LOSSES[name](now, PolicyOptions(0.2, 0.28))[0].sum().backward()
        assert bool(logps.grad.abs().sum() > 0) == moves


def test_cispo_keeps_the_gradient_of_every_token_with_a_bounded_weight():
    logps = torch.full((9,), 2.0, dtype=torch.float64, requires_grad=True)
    now = tokens(rollout=np.zeros(9), advantages=np.ones(9))._replace(logps=logps)
    TOKEN_LOSSES["cispo"](now, OPTIONS)[0].sum().backward()
    torch.testing.assert_close(logps.grad, torch.full((9,), -1.28, dtype=torch.float64))


def test_the_upper_side_is_wider():
    ratio = torch.tensor([0.7, 0.81, 1.0, 1.25, 1.3, 1.3])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    low, high = clipped_shares(ratio, advantages, OPTIONS)
    assert low.tolist() == [True, False, False, False, False, False]
    assert high.tolist() == [False, False, False, False, True, False]
    with pytest.raises(ValueError, match="clip_low is between 0 and 1"):
        PolicyOptions(1.0, 0.2)


def test_weights_by_sequence_count_every_answer_once():
    losses = torch.tensor(RNG.random(9))
    weighted = (per_sequence(torch.tensor(LENGTHS))[torch.tensor(ANSWERS)] * losses).sum() / 9
    expected = np.mean([losses[torch.tensor(ANSWERS == k)].mean().item() for k in range(3)])
    assert weighted.item() == pytest.approx(expected, rel=1e-12)
    assert mean_by_answer(losses, torch.tensor(ANSWERS))[3] == losses[3]


@pytest.mark.parametrize("name", KL)
def test_every_estimate_of_the_kl_equals_its_formula(name):
    formula = {"k1": lambda a, b: a - b, "k2": lambda a, b: (a - b) ** 2 / 2, "k3": lambda a, b: math.exp(b - a) - 1 - (b - a)}
    found = KL[name](torch.tensor(NOW), torch.tensor(ROLLOUT))
    np.testing.assert_allclose(found, [formula[name](a, b) for a, b in zip(NOW, ROLLOUT)], rtol=1e-10, atol=1e-14)


def test_in_expectation_k1_and_k3_are_the_kl_and_the_gradients_are_as_documented():
    """Over a whole vocabulary, so without sampling."""
    policy = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logps = policy.log_softmax(0)
    kl = (logps.exp() * (logps - reference)).sum()
    (true,) = torch.autograd.grad(kl, policy, retain_graph=True)
    for name in KL:
        estimate = KL[name](logps, reference)
        if name != "k2":
            torch.testing.assert_close((logps.exp() * estimate).sum(), kl)
        (gradient,) = torch.autograd.grad((logps.exp().detach() * estimate).sum(), policy, retain_graph=True)
        if name == "k1":
            assert gradient.abs().max() < 1e-12
        if name == "k2":
            torch.testing.assert_close(gradient, true)


def test_the_value_loss_does_not_reward_a_step_that_is_too_long():
    old, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 0.1, -1.0])
    values = torch.tensor([0.1, 0.9, 0.1, -0.5])
    expected = [max((v - r) ** 2, (min(max(v, -0.2), 0.2) - r) ** 2) / 2 for v, r in zip(values.tolist(), returns.tolist())]
    np.testing.assert_allclose(value_loss(values, old, returns, 0.2), expected, rtol=1e-6)


def test_every_algorithm_is_made_of_known_parts():
    for parts in ALGORITHMS.values():
        assert parts.loss in TOKEN_LOSSES and parts.advantage in (*ADVANTAGES, "gae")
        PolicyOptions(parts.clip_low, parts.clip_high)


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_scorer_agrees_with_the_sampler_about_bans_and_temperature(temperature):
    logits, banned = torch.randn(32, 20), (0, 3, 7)
    drawn, logps = sample(logits, temperature, 0, 1.0, banned, torch.Generator().manual_seed(0))
    found, entropy = scored(logits, drawn, banned, temperature)
    torch.testing.assert_close(found, logps)
    kept = [k for k in range(20) if k not in banned]
    p = (logits[:, kept].double() / temperature).softmax(-1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_entropies_are_measured_without_gradient_and_banned_tokens_give_no_nan():
    logits = torch.randn(4, 9, requires_grad=True)
    logps, entropy = scored(logits, torch.tensor([1, 2, 4, 5]), (0, 3), 1.0)
    assert not entropy.requires_grad
    logps.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[:, [0, 3]].abs().max() == 0


# ---------------------------------------------------------------- clipping


def test_the_threshold_follows_twice_the_usual_norm_and_never_exceeds_the_largest():
    clip = DynamicClipping(1.0)
    assert clip.judge(0.3) == (0.3, 1.0, False)  # nothing is known yet
    assert clip.judge(0.3).threshold == pytest.approx(0.6)
    average = 0.3
    for norm in (0.5, 0.1, 2.9):
        seen = clip.judge(norm)
        assert seen.threshold == pytest.approx(min(1.0, 2 * average)) and not seen.skip
        average = 0.9 * average + 0.1 * norm
    assert clip.average == pytest.approx(average)


def test_a_step_that_is_far_out_or_not_finite_is_left_out():
    clip = DynamicClipping(1.0, average=0.1)
    assert not clip.judge(0.99).skip
    clip = DynamicClipping(1.0, average=0.1)
    assert clip.judge(1.01).skip and clip.judge(math.inf).skip and clip.judge(math.nan).skip
    assert clip.average == pytest.approx(0.9 * 0.1 + 0.1 * 1.0)  # the finite one counts as ten times the usual


def test_where_large_norms_are_the_new_usual_steps_are_taken_again():
    clip = DynamicClipping(1.0, average=0.01)
    assert [clip.judge(5.0).skip for _ in range(9)][-1] is False


def test_norms_of_zero_do_not_make_everything_else_look_large():
    clip = DynamicClipping(1.0, average=0.2)
    for _ in range(50):
        assert clip.judge(0.0).skip, "a step would be one of momentum alone"
    assert clip.average == 0.2 and clip.skipped == 0


@pytest.mark.parametrize("worth", [0.1, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("answers", [3, 7, 8, 16])
def test_answers_that_are_all_alike_have_an_advantage_of_exactly_zero(worth, answers):
    rewards = torch.full((2, answers), worth)
    for name in ("dr_grpo", "grpo", "rloo", "reinforce++_baseline"):
        assert not ADVANTAGES[name](rewards).any(), name


def test_endless_nonsense_stops_the_run_with_advice():
    clip = DynamicClipping(1.0)
    with pytest.raises(FloatingPointError, match="20 steps in a row were left out.*lower --lr"):
        for _ in range(20):
            clip.judge(math.nan)


def test_gradients_are_scaled_to_the_threshold_and_left_alone_below_it():
    model = nn.Linear(2, 1, bias=False)
    for gradient, kept in (([0.3, 0.4], 0.5), ([3.0, 4.0], 1.0)):
        model.weight.grad = torch.tensor([gradient])
        clipped = DynamicClipping(1.0)(model)
        assert clipped.norm == pytest.approx(math.hypot(*gradient)) and model.weight.grad.norm().item() == pytest.approx(kept)


def test_the_log_tells_the_threshold_where_it_moves_and_the_norm_alone_where_it_does_not():
    assert Clipped(0.5).facts() == {"gradient_norm": 0.5} and not Clipped(0.5).skip
    assert DynamicClipping(1.0).judge(0.5).facts() == {"gradient_norm": 0.5, "gradient_threshold": 1.0, "step_left_out": 0.0}


def test_what_a_resumed_run_is_given_is_all_that_clipping_remembers():
    clip = DynamicClipping(1.0)
    for norm in (0.5, 0.4, 9.0):
        clip.judge(norm)
    again = DynamicClipping(1.0, **clip.state)
    assert [again.judge(norm) for norm in (0.3, 0.9)] == [clip.judge(norm) for norm in (0.3, 0.9)]


# ---------------------------------------------------------------- the value head


def test_values_come_with_the_same_logits_and_send_no_gradient_into_the_model():
    model = tiny.vlm()
    batch = tiny.flat([tiny.document(6, [], seed=1), tiny.document(9, [], seed=2)])
    keep = tiny.everywhere(batch)
    before = model(batch, keep)
    critic.apply(model)
    both = critic.ActorCritic(model)
    logits, values = both(batch, keep)
    assert torch.equal(logits, before) and values.tolist() == [0.0] * 15
    values.sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("value_head"))
    assert len(list(model.llm.model.norm._forward_hooks)) == 0

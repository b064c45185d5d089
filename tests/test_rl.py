"""What stage 3 minimises by rules: every advantage and every loss equals a reference in float64 that is written from its formula.

The KL to the reference, the critic and dynamic clipping are asked on a tiny model as 3-rl_vlm.py asks them.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from model import checkpoint
from model.generate import sample
from model.losses import score, token_entropy
from model.recipe import Mode, set_trainable
from model.reference import reference_model
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, UserError
from model.rl import critic
from model.rl.advantages import ADVANTAGES, gae, whitened
from model.rl.clipping import Clipped, DynamicClipping
from model.rl.kl import KL_ESTIMATES, KLPenalty
from model.rl.variants import mean_by_answer
from model.runtime import Run, StepMetrics
from tests import tiny

RNG = np.random.default_rng(0)
REWARDS = np.array([[1.1, 0.1, 0.1, 1.1], [0.1, 0.1, 0.0, 1.1], [1.1, 1.1, 1.1, 1.1]])
LENGTHS = [3, 1, 5]
ANSWERS = np.repeat(np.arange(3), LENGTHS)
OWNER = torch.tensor(ANSWERS)  # of each of nine tokens
NOW, ROLLOUT = -RNG.random(9) * 2, -RNG.random(9) * 2
SIGNS = np.repeat([1.0, -0.5, -2.0], LENGTHS)
OPTIONS = {"cispo": "clip_high=0.28", "cpgd": "clip_low=0.2,clip_high=0.28,drift=0.7"}
NAMES = ("grpo", "rloo", "reinforce++", "reinforce++_baseline", "ppo", "cispo", "gspo", "cpgd")


def algorithm(name: str):
    """An algorithm with the clips of 0.2 and 0.28, and a drift where it has one."""
    return ALGORITHMS.make(f"{name}:{OPTIONS.get(name, 'clip_low=0.2,clip_high=0.28')}")


def losses(algo, logps, rollout=ROLLOUT, advantages=SIGNS) -> torch.Tensor:
    """The loss of each of nine tokens of three answers, as 3-rl_vlm.py computes it."""
    logps, rollout, advantages = (torch.as_tensor(values) for values in (logps, rollout, advantages))
    return algo.loss(algo.ratio(logps - rollout, OWNER), advantages, logps, logps - rollout)


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
def test_a_group_without_reward_variance_teaches_nothing(name):
    assert ADVANTAGES[name](torch.tensor(REWARDS))[2].abs().max() < 1e-12
    assert torch.isfinite(ADVANTAGES[name](torch.ones(2, 4))).all()


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("group_size", [3, 7, 8, 16])
def test_equal_rewards_give_an_advantage_of_exactly_zero(reward, group_size):
    rewards = torch.full((2, group_size), reward)
    for name in ("dr_grpo", "grpo", "rloo", "reinforce++_baseline"):
        assert not ADVANTAGES[name](rewards).any(), name


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


# ---------------------------------------------------------------- algorithms


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


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_every_token_equals_its_formula(name):
    np.testing.assert_allclose(losses(algorithm(name), NOW), reference_loss(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name):
    """At a ratio of 1 they all are -A times the gradient of logp; they differ in what they do when the policy has moved."""
    logps, algo = torch.tensor(ROLLOUT, requires_grad=True), algorithm(name)
    weights = algo.token_weights(torch.tensor(LENGTHS))[OWNER]
    (weights * losses(algo, logps)).sum().backward()
    torch.testing.assert_close(logps.grad, -weights * torch.tensor(SIGNS))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cispo"])  # it clips a token's weight, not its gradient
def test_a_ratio_that_has_gone_too_far_gets_no_gradient_and_may_come_back(name):
    algo = ALGORITHMS.make(f"{name}:clip_low=0.2,clip_high=0.28")
    for advantage, away, moves in ((1.0, 2.0, False), (1.0, -2.0, True), (-1.0, -2.0, False), (-1.0, 2.0, True)):
        logps = torch.full((9,), away, dtype=torch.float64, requires_grad=True)
        losses(algo, logps, np.zeros(9), np.full(9, advantage)).sum().backward()
        assert bool(logps.grad.abs().sum() > 0) == moves


def test_cispo_keeps_the_gradient_of_every_token_with_a_bounded_weight():
    logps = torch.full((9,), 2.0, dtype=torch.float64, requires_grad=True)
    losses(algorithm("cispo"), logps, np.zeros(9), np.ones(9)).sum().backward()
    torch.testing.assert_close(logps.grad, torch.full((9,), -1.28, dtype=torch.float64))


def test_the_upper_side_is_wider():
    ratio = torch.tensor([0.7, 0.81, 1.0, 1.25, 1.3, 1.3])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    low, high = ALGORITHMS.make("grpo").clipped(ratio, advantages)
    assert low.tolist() == [True, False, False, False, False, False]
    assert high.tolist() == [False, False, False, False, True, False]


def test_weights_by_sequence_count_every_answer_once():
    values = torch.tensor(RNG.random(9))
    weights = ALGORITHMS.make("grpo:per_sequence=true").token_weights(torch.tensor(LENGTHS))
    expected = np.mean([values[OWNER == k].mean().item() for k in range(3)])
    assert (weights[OWNER] * values).sum().item() / 9 == pytest.approx(expected, rel=1e-6)
    assert mean_by_answer(values, OWNER)[3] == values[3]
    assert torch.equal(ALGORITHMS.make("grpo").token_weights(torch.tensor([LENGTHS])), torch.ones(1, 3))


def test_every_algorithm_is_made_of_known_parts():
    assert set(ALGORITHMS.names()) == set(NAMES) and not set(NAMES) & set(PREFERENCE_LOSSES.names())
    rewards = torch.tensor(REWARDS)
    for name in NAMES:
        algo = ALGORITHMS.make(name)
        assert torch.equal(algo.advantages(rewards), ADVANTAGES[algo.advantage](rewards))
        assert algo.has_critic == (name == "ppo") and algo.needs_groups == (name not in ("ppo", "reinforce++"))
        assert algo.kl == 0, "no second model in memory unless it is asked for"
    assert ALGORITHMS.make("grpo:advantage=rloo").advantage == "rloo"
    assert ALGORITHMS.make("gspo").clip_high == 4e-4 and ALGORITHMS.make("gspo:clip_high=0.5").clip_high == 0.5


@pytest.mark.parametrize(("spec", "message"), [
    ("grpo:clip_low=1.0,clip_high=0.2", "clip_low is between 0 and 1"), ("grpo:advantage=best", "advantage is one of dr_grpo"),
    ("grpo:kl=0.1,kl_estimate=k4", "kl_estimate is one of k1"), ("grpo:kl_estimate=k2", "kl_estimate has no use without kl"),
    ("grpo:drift=0.1", "has no option 'drift=0.1'"), ("ppo:advantage=rloo", "has no option 'advantage=rloo'"),
    ("cispo:clip_low=0.1", "has no option 'clip_low=0.1'"), ("rloo:lam=1", "has no option 'lam=1'"),
])  # fmt: skip
def test_an_option_that_makes_no_sense_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        ALGORITHMS.make(spec)


# ---------------------------------------------------------------- scoring what was sampled


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_score_agrees_with_the_sampler_about_bans_and_temperature(temperature):
    logits, banned = torch.randn(32, 20, requires_grad=True), (0, 3, 7)
    drawn, logps = sample(logits.detach(), temperature, 1.0, banned, torch.Generator().manual_seed(0))
    batch = {"labels": torch.cat([torch.tensor([-100]), drawn])[None], "document_ids": torch.zeros(1, 33, dtype=torch.long)}
    scores = score(lambda batch, logits_to_keep: logits, batch, temperature, banned)
    torch.testing.assert_close(scores.logps, logps)
    kept = [k for k in range(20) if k not in banned]
    p = (logits[:, kept].double() / temperature).softmax(-1)
    entropy = token_entropy(scores.logits)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad, "entropies are measured, not learned"
    scores.logps.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[:, list(banned)].abs().max() == 0


# ---------------------------------------------------------------- the KL to the reference


@pytest.mark.parametrize("name", KL_ESTIMATES)
def test_every_estimate_of_the_kl_equals_its_formula(name):
    formula = {"k1": lambda a, b: a - b, "k2": lambda a, b: (a - b) ** 2 / 2, "k3": lambda a, b: math.exp(b - a) - 1 - (b - a)}
    found = KL_ESTIMATES[name](torch.tensor(NOW), torch.tensor(ROLLOUT))
    np.testing.assert_allclose(found, [formula[name](a, b) for a, b in zip(NOW, ROLLOUT)], rtol=1e-10, atol=1e-14)


def test_in_expectation_k1_and_k3_are_the_kl_and_the_gradients_are_as_documented():
    """Over a whole vocabulary, so without sampling."""
    policy = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logps = policy.log_softmax(0)
    kl = (logps.exp() * (logps - reference)).sum()
    (true,) = torch.autograd.grad(kl, policy, retain_graph=True)
    for name in KL_ESTIMATES:
        estimate = KL_ESTIMATES[name](logps, reference)
        if name != "k2":
            torch.testing.assert_close((logps.exp() * estimate).sum(), kl)
        (gradient,) = torch.autograd.grad((logps.exp().detach() * estimate).sum(), policy, retain_graph=True)
        if name == "k1":
            assert gradient.abs().max() < 1e-12
        if name == "k2":
            torch.testing.assert_close(gradient, true)


def model_and_batch(tmp_path):
    """A model whose language model trains, a run, and a batch of four answers, two to each of two prompts, on policy."""
    model = tiny.vlm()
    for name, part in model.parts.items():
        set_trainable(part, Mode("full" if name == "llm" else "freeze"))
    lengths = (6, 9, 4, 7)
    batch = tiny.flat([tiny.document(length, [], seed) for seed, length in enumerate(lengths)])
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths) - 1)  # the first token is never predicted
    batch.update(answer_ids=owner, rollout_logps=score(model, batch).logps.detach())
    return model, Run.inference(tmp_path, "cpu", "fp32", 0), batch


@pytest.mark.parametrize("estimate", ["k2", "k3"])
def test_the_kl_penalty_begins_at_zero_and_pulls_the_policy_back(estimate, tmp_path):
    model, run, batch = model_and_batch(tmp_path)
    penalty = KLPenalty(10.0, estimate, reference_model(model), partial(score, temperature=1.0), run)
    rewards = torch.zeros(2, 2)
    assert penalty.off_rewards(rewards, [batch]) is rewards, "in the losses, not in the rewards"

    def penalties() -> tuple[torch.Tensor, float]:
        metrics = StepMetrics(run)
        found = penalty.of_tokens(score(model, batch).logps, batch, metrics)
        return found, metrics.reduce(1)["kl"]

    assert penalties()[1] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        model.llm.model.norm.weight.mul_(1.3)
    found, kl = penalties()
    assert kl > 0.01 and found.sum().item() == pytest.approx(10 * kl, rel=1e-5)
    found.sum().backward()
    with torch.no_grad():
        for p in model.llm.parameters():
            p.sub_(1e-3 * p.grad / (1 + p.grad.norm()))
    assert penalties()[1] < kl


def test_k1_is_taken_from_the_reward_of_the_whole_answer(tmp_path):
    model, run, batch = model_and_batch(tmp_path)
    penalty = KLPenalty(0.5, "k1", reference_model(model), score, run)
    with torch.no_grad():
        model.llm.model.norm.weight.mul_(1.3)
    batch["rollout_logps"] = score(model, batch).logps.detach()
    rewards = torch.tensor([[1.1, 1.1], [0.1, 0.1]])
    found = penalty.off_rewards(rewards, [batch])
    k1 = torch.zeros(4).index_add(0, batch["answer_ids"], batch["rollout_logps"] - batch["reference_logps"])
    assert k1.abs().min() > 0.01
    torch.testing.assert_close(found, rewards - 0.5 * k1.view(2, 2), atol=1e-5, rtol=1e-5)
    metrics = StepMetrics(run)
    assert not penalty.of_tokens(score(model, batch).logps, batch, metrics).any(), "nothing in the loss"
    assert metrics.reduce(1)["kl"] == pytest.approx(k1.sum().item(), abs=1e-3)


def test_the_reference_is_scored_in_evaluation_mode_and_does_not_move_with_the_policy(tmp_path):
    model, run, batch = model_and_batch(tmp_path)
    before = batch["rollout_logps"]
    model.train()
    penalty = KLPenalty(0.5, "k3", reference_model(model), score, run)
    with torch.no_grad():
        model.llm.model.norm.weight.mul_(1.3)
    penalty.off_rewards(torch.zeros(2, 2), [batch])
    torch.testing.assert_close(batch["reference_logps"], before)
    assert model.training and not batch["reference_logps"].requires_grad


# ---------------------------------------------------------------- the critic


def test_values_come_with_the_same_logits_and_send_no_gradient_into_the_model():
    model = tiny.vlm()
    batch = tiny.flat([tiny.document(6, [], seed=1), tiny.document(9, [], seed=2)])
    keep = tiny.everywhere(batch)
    before = model(batch, keep)
    both = critic.apply(model)
    logits, values = both(batch, keep)
    assert torch.equal(logits, before) and values.tolist() == [0.0] * 15
    values.sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("value_head"))
    assert len(list(model.llm.model.norm._forward_hooks)) == 0


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_the_critic_gives_every_token_an_advantage_of_its_own(lam, tmp_path):
    """By `gae` of each answer alone with the reward at its end, and whitened over all tokens of all micro-batches."""
    model, run, batch = model_and_batch(tmp_path)
    policy = critic.apply(model)
    nn.init.normal_(model.value_head.weight)
    other = tiny.flat([tiny.document(5, [], seed=8), tiny.document(8, [], seed=9)])
    other["answer_ids"] = torch.tensor([4] * 4 + [5] * 7)
    rewards = torch.tensor([[1.1, 0.1], [0.1, 0.0], [1.1, 1.1]])
    critic.add_advantages([batch, other], rewards, policy, lam, run)
    advantages, returns = [], []
    for one in (batch, other):
        values = score(policy, one).values
        torch.testing.assert_close(one["values"], values)
        for answer in one["answer_ids"].unique():
            own = values[one["answer_ids"] == answer].double().detach()
            given = torch.zeros(len(own), dtype=torch.double)
            given[-1] = rewards.flatten()[answer]
            found = gae(given, own, 1.0, lam)
            advantages.append(found[0])
            returns.append(found[1])
    advantages = torch.cat(advantages)
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(torch.cat([one["advantages"] for one in (batch, other)]).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([one["returns"] for one in (batch, other)]).double(), torch.cat(returns),
                               atol=1e-4, rtol=1e-4)
    ends = torch.cat([batch["answer_ids"][1:] != batch["answer_ids"][:-1], torch.tensor([True])])
    assert batch["returns"][ends].tolist() == pytest.approx([1.1, 0.1, 0.1, 0.0], abs=1e-5), "at the end: the reward"


def test_the_value_head_learns_from_its_own_loss_and_stays_out_of_a_checkpoint(tmp_path):
    model = tiny.nano()
    policy, run = critic.apply(model), Run.inference(tmp_path, "cpu", "fp32", 0)
    batch = tiny.flat([tiny.document(6, [], seed=1)])
    batch["answer_ids"] = torch.zeros(5, dtype=torch.long)
    critic.add_advantages([batch], torch.tensor([[1.1]]), policy, 1.0, run)
    metrics = StepMetrics(run)
    added = critic.weighted_value_loss(score(policy, batch), batch, metrics)
    assert metrics.reduce(1)["value_loss"] == pytest.approx(5 * 1.1**2 / 2), "values of 0, returns of 1.1"
    assert added.sum().item() == pytest.approx(0.5 * 5 * 1.1**2 / 2)
    added.sum().backward()
    assert model.value_head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("value_head"))
    checkpoint.save(tmp_path / "saved", model, tiny.processor().tokenizer.file)
    assert not any("value_head" in name for name in checkpoint.load(tmp_path / "saved").state_dict())


def test_the_value_loss_does_not_reward_a_step_that_is_too_long():
    before, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 0.1, -1.0])
    values = torch.tensor([0.1, 0.9, 0.1, -0.5])
    expected = [max((v - r) ** 2, (min(max(v, -0.2), 0.2) - r) ** 2) / 2 for v, r in zip(values.tolist(), returns.tolist())]
    np.testing.assert_allclose(critic.value_loss(values, before, returns), expected, rtol=1e-6)


# ---------------------------------------------------------------- clipping


def test_the_threshold_follows_twice_the_usual_norm_and_never_exceeds_the_largest():
    clip = DynamicClipping(1.0)
    assert clip.judge(0.3) == (0.3, 1.0, False)  # nothing is known yet
    assert clip.judge(0.3).threshold == pytest.approx(0.6)
    average = 0.3
    for norm in (0.5, 0.1, 2.9):
        clipped = clip.judge(norm)
        assert clipped.threshold == pytest.approx(min(1.0, 2 * average)) and not clipped.skip
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


def test_endless_nonsense_stops_the_run_with_advice():
    clip = DynamicClipping(1.0)
    with pytest.raises(FloatingPointError, match="20 steps in a row were left out.*lower --lr"):
        for _ in range(20):
            clip.judge(math.nan)


def test_gradients_are_scaled_to_the_threshold_and_left_alone_below_it():
    model = nn.Linear(2, 1, bias=False)
    for gradient, norm in (([0.3, 0.4], 0.5), ([3.0, 4.0], 1.0)):
        model.weight.grad = torch.tensor([gradient])
        clipped = DynamicClipping(1.0)(model)
        assert clipped.norm == pytest.approx(math.hypot(*gradient)) and model.weight.grad.norm().item() == pytest.approx(norm)


def test_the_log_tells_the_norm_the_threshold_and_whether_the_step_was_left_out():
    assert Clipped(3.0, 0.2, skip=True).facts() == {"gradient_norm": 3.0, "gradient_threshold": 0.2, "step_left_out": 1.0}
    assert DynamicClipping(1.0).judge(0.5).facts() == {"gradient_norm": 0.5, "gradient_threshold": 1.0, "step_left_out": 0.0}


def test_what_a_resumed_run_is_given_is_all_that_clipping_remembers():
    clip = DynamicClipping(1.0)
    for norm in (0.5, 0.4, 9.0):
        clip.judge(norm)
    again = DynamicClipping(1.0, **clip.state)
    assert [again.judge(norm) for norm in (0.3, 0.9)] == [clip.judge(norm) for norm in (0.3, 0.9)]

"""The losses of preference learning against their formulas, written out again here in float64 for one pair at a time."""

import math
import re

import pytest
import torch

from model.dpo.losses import Pairs, PreferenceLoss, rewards
from model.losses import sum_by_document
from model.registry import PREFERENCE_LOSSES

NAMES = PREFERENCE_LOSSES.names()
TOKENS = (3, 11, 7, 5), (6, 4, 7, 9)  # of the chosen and the rejected answers
OPTIONS = {"beta": 0.3, "smoothing": 0.1, "gamma": 0.7}
SHIFT = 0.4


def some_pairs(dtype=torch.float32) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.tensor(counts) for counts in TOKENS]
    policy = [-count * torch.rand(4, generator=generator, dtype=dtype) * 2 for count in tokens]
    reference = [-count * torch.rand(4, generator=generator, dtype=dtype) * 2 for count in tokens]
    return Pairs(*policy, *reference, *tokens)


def make(name: str) -> PreferenceLoss:
    """A loss as `--algo` makes it, with all the options that it has, in the middle of a run."""
    options = ",".join(f"{option}={OPTIONS[option]}" for option in PREFERENCE_LOSSES.parameters(name))
    algo = PREFERENCE_LOSSES.make(f"{name}:{options}")
    algo.shift = SHIFT
    return algo


def dpo(**options) -> PreferenceLoss:
    return PREFERENCE_LOSSES.factory("dpo")(**options)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_formula(name: str, c: float, r: float, ref_c: float, ref_r: float, n_c: int, n_r: int) -> float:
    """One pair's loss as its paper writes it."""
    beta, e, gamma = OPTIONS["beta"], OPTIONS["smoothing"], OPTIONS["gamma"]
    reward_c, reward_r = beta * (c - ref_c), beta * (r - ref_r)
    right, wrong = -math.log(sigmoid(reward_c - reward_r)), -math.log(sigmoid(reward_r - reward_c))
    if name == "dpo":
        return (1 - e) * right + e * wrong
    if name == "robust":
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if name == "ipo":
        return ((c / n_c - r / n_r) - (ref_c / n_c - ref_r / n_r) - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - reward_c + reward_r)
    if name == "simpo":
        return -math.log(sigmoid(beta / n_c * c - beta / n_r * r - gamma))
    if name == "apo_zero":
        return 1 - sigmoid(reward_c) + sigmoid(reward_r)
    if name == "bco":
        return -math.log(sigmoid(reward_c - SHIFT)) - math.log(sigmoid(-(reward_r - SHIFT)))
    if name == "mpo":
        return 0.8 * by_formula("dpo", c, r, ref_c, ref_r, n_c, n_r) + 0.2 * by_formula("bco", c, r, ref_c, ref_r, n_c, n_r)
    return {"sft_chosen": 0.0}[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_formula(name):
    found = make(name)(some_pairs())
    rows = zip(*(field.double().tolist() for field in some_pairs()))
    expected = torch.tensor([by_formula(name, *row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sft_chosen"])
def test_each_gradient_is_that_of_its_formula(name):
    """Finite differences of the formula in the chosen and the rejected log-probability of one pair."""
    row = [field.double()[0].item() for field in some_pairs(torch.float64)]
    leaves = [torch.tensor([value], dtype=torch.float64, requires_grad=k < 2) for k, value in enumerate(row)]
    make(name)(Pairs(*leaves)).sum().backward()
    for k in (0, 1):
        up, down = ([*row[:k], row[k] + step, *row[k + 1 :]] for step in (1e-5, -1e-5))
        slope = (by_formula(name, *up) - by_formula(name, *down)) / 2e-5
        assert leaves[k].grad.item() == pytest.approx(slope, abs=1e-6)


def equal_to_reference() -> Pairs:
    c, r, _, _, n_c, n_r = some_pairs()
    return Pairs(c, r, c, r, n_c, n_r)


@pytest.mark.parametrize(("spec", "value"), [
    ("dpo", math.log(2)), ("hinge", 1.0), ("apo_zero", 1.0), ("bco", 2 * math.log(2)), ("mpo", 1.2 * math.log(2)),
    ("ipo", (1 / 0.2) ** 2), ("robust", math.log(2)), ("sft_chosen", 0.0),
])  # fmt: skip
def test_a_policy_that_is_its_reference_has_the_loss_of_not_knowing(spec, value):
    """With beta 0.1 and no shift, the defaults."""
    torch.testing.assert_close(PREFERENCE_LOSSES.make(spec)(equal_to_reference()), torch.full((4,), value))


def swapped(pairs: Pairs) -> Pairs:
    c, r, ref_c, ref_r, n_c, n_r = pairs
    return Pairs(r, c, ref_r, ref_c, n_r, n_c)


def test_swapping_the_pair_flips_the_margin():
    chosen, rejected = rewards(some_pairs(), 0.3)
    other_chosen, other_rejected = rewards(swapped(some_pairs()), 0.3)
    torch.testing.assert_close(chosen - rejected, -(other_chosen - other_rejected))
    h = chosen - rejected
    loss, other = (dpo(beta=0.3)(pairs) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close(other - loss, h)  # -log sigmoid(-h) + log sigmoid(h) = h


def test_smoothing_is_the_mean_over_labels_of_which_a_share_is_swapped_and_robust_undoes_it():
    """Noisy labels: robust's expectation over them is DPO's loss on the true ones (the paper's lemma)."""
    e = 0.2
    right, wrong = (dpo(beta=0.3)(pairs) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close(dpo(beta=0.3, smoothing=e)(some_pairs()), (1 - e) * right + e * wrong)
    robust = PREFERENCE_LOSSES.make(f"robust:beta=0.3,smoothing={e}")
    kept, flipped = (robust(pairs) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close((1 - e) * kept + e * flipped, right)


def test_simpo_asks_no_reference_and_says_so():
    c, r, ref_c, ref_r, n_c, n_r = some_pairs()
    other = Pairs(c, r, ref_c - 5, ref_r + 9, n_c, n_r)
    assert [name for name in NAMES if not make(name).uses_reference] == ["simpo"]
    assert torch.equal(make("simpo")(some_pairs()), make("simpo")(other))
    others = [name for name in NAMES if name not in ("simpo", "sft_chosen")]
    assert not any(torch.equal(make(name)(some_pairs()), make(name)(other)) for name in others)


def test_very_unlikely_answers_give_finite_losses():
    pairs = Pairs(*(torch.tensor([value]) for value in (-9e3, -1.0, -1.0, -9e3)), torch.tensor([90]), torch.tensor([80]))
    for name in NAMES:
        for each in (pairs, swapped(pairs)):
            assert make(name)(each).isfinite().all(), name


@pytest.mark.parametrize(("spec", "message"), [
    ("dpo:beta=0.0", "beta is above 0"), ("simpo:beta=-1", "beta is above 0"), ("dpo:smoothing=0.5", "0 to below 0.5"),
    ("robust:smoothing=-0.1", "0 to below 0.5"), ("mpo:smoothing=0.7", "0 to below 0.5"),
    ("ipo:smoothing=0.1", "preference loss 'ipo' has no option 'smoothing=0.1'. Options: beta"),
    ("dpo:gamma=0.5", "preference loss 'dpo' has no option 'gamma=0.5'. Options: beta, smoothing"),
    ("dppo", "unknown preference loss 'dppo'. Did you mean 'dpo'?"),
])  # fmt: skip
def test_numbers_that_make_no_sense_and_those_that_a_loss_does_not_have_are_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PREFERENCE_LOSSES.make(spec)


def test_simpo_has_a_beta_of_its_own_and_robust_a_share_of_swapped_pairs():
    betas = {name: PREFERENCE_LOSSES.make(name).beta for name in NAMES}
    assert betas == {**dict.fromkeys(NAMES, 0.1), "simpo": 2.0}
    assert PREFERENCE_LOSSES.make("simpo:beta=3.0").beta == 3.0
    assert PREFERENCE_LOSSES.make("robust").smoothing == 0.1 and PREFERENCE_LOSSES.make("dpo").smoothing == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_log_holds_implied_rewards_log_probabilities_per_token_and_lengths(name):
    algo, pairs = make(name), some_pairs()
    mean = pairs.per_token()
    found = algo.log(pairs)
    chosen, rejected = rewards(mean if name in ("ipo", "simpo") else pairs, 0.3)
    expected = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected,
                "reward_accuracy": (chosen > rejected).float(), "logp_chosen": mean.chosen, "logp_rejected": mean.rejected,
                "length_chosen": pairs.chosen_tokens, "length_rejected": pairs.rejected_tokens}  # fmt: skip
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    assert algo.log(equal_to_reference())["reward_accuracy"].sum() == 0  # a tie is not agreement


def test_the_shift_of_bco_follows_the_rewards_and_no_other_loss_has_one():
    for name in NAMES:
        algo = make(name)
        algo.after_step(2.0)
        assert algo.shift == pytest.approx(0.9 * SHIFT + 0.1 * 2.0 if name in ("bco", "mpo") else SHIFT)
        assert PREFERENCE_LOSSES.make(name).shift == 0.0


# ---------------------------------------------------------------- tokens -> answers


def test_log_probabilities_add_up_by_document():
    logps, owner = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 0, 1, 3, 3])
    sums, tokens = sum_by_document(logps, owner, 4)
    assert sums.tolist() == [-3, -4, 0, -24]
    assert tokens.tolist() == [2, 1, 0, 2]


def test_means_divide_each_side_by_its_own_tokens_policy_and_reference_alike():
    """`sum in the policy and mean in the reference` is a bug that others have had."""
    pairs, mean = some_pairs(), some_pairs().per_token()
    for k, count in ((0, 4), (1, 5), (2, 4), (3, 5)):
        torch.testing.assert_close(mean[k] * pairs[count], pairs[k])
    assert all(torch.equal(a, b) for a, b in zip(mean, mean.per_token()))

"""The losses of preference learning against their formulas, written out again here in float64 for one pair at a time."""

import math

import pytest
import torch

from model.losses import (
    PREFERENCE_LOSSES,
    Pairs,
    PreferenceOptions,
    anchor,
    answer_sums,
    as_pairs,
    rewards,
)

TOKENS = (3, 11, 7, 5), (6, 4, 7, 9)  # of the chosen and the rejected answers


def some_pairs(dtype=torch.float32) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.tensor(counts) for counts in TOKENS]
    policy = [-count * torch.rand(4, generator=generator, dtype=dtype) * 2 for count in tokens]
    reference = [-count * torch.rand(4, generator=generator, dtype=dtype) * 2 for count in tokens]
    return Pairs(*policy, *reference, *tokens)


OPTIONS = PreferenceOptions(beta=0.3, smoothing=0.1, gamma=0.7, shift=0.4)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_formula(name: str, c: float, r: float, ref_c: float, ref_r: float, n_c: int, n_r: int, o: PreferenceOptions) -> float:
    """One pair's loss as its paper writes it."""
    reward_c, reward_r, e = o.beta * (c - ref_c), o.beta * (r - ref_r), o.smoothing
    right, wrong = -math.log(sigmoid(reward_c - reward_r)), -math.log(sigmoid(reward_r - reward_c))
    if name == "dpo":
        return (1 - e) * right + e * wrong
    if name == "robust":
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if name == "ipo":
        return ((c / n_c - r / n_r) - (ref_c / n_c - ref_r / n_r) - 1 / (2 * o.beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - reward_c + reward_r)
    if name == "simpo":
        return -math.log(sigmoid(o.beta / n_c * c - o.beta / n_r * r - o.gamma))
    if name == "apo_zero":
        return 1 - sigmoid(reward_c) + sigmoid(reward_r)
    if name == "bco":
        return -math.log(sigmoid(reward_c - o.shift)) - math.log(sigmoid(-(reward_r - o.shift)))
    if name == "mpo":
        return 0.8 * by_formula("dpo", c, r, ref_c, ref_r, n_c, n_r, o) + 0.2 * by_formula("bco", c, r, ref_c, ref_r, n_c, n_r, o)
    return {"sft_chosen": 0.0}[name]


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_each_loss_is_its_formula(name):
    found = PREFERENCE_LOSSES[name](some_pairs(), OPTIONS)
    rows = zip(*(field.double().tolist() for field in some_pairs()))
    expected = torch.tensor([by_formula(name, *row, OPTIONS) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if name != "sft_chosen"])
def test_each_gradient_is_that_of_its_formula(name):
    """Finite differences of the formula in the chosen and the rejected log-probability of one pair."""
    row = [field.double()[0].item() for field in some_pairs(torch.float64)]
    leaves = [torch.tensor([value], dtype=torch.float64, requires_grad=k < 2) for k, value in enumerate(row)]
    PREFERENCE_LOSSES[name](Pairs(*leaves), OPTIONS).sum().backward()
    for k in (0, 1):
        up, down = ([*row[:k], row[k] + step, *row[k + 1 :]] for step in (1e-5, -1e-5))
        slope = (by_formula(name, *up, OPTIONS) - by_formula(name, *down, OPTIONS)) / 2e-5
        assert leaves[k].grad.item() == pytest.approx(slope, abs=1e-6)


def equal_to_reference() -> Pairs:
    c, r, _, _, n_c, n_r = some_pairs()
    return Pairs(c, r, c, r, n_c, n_r)


@pytest.mark.parametrize(("name", "value"), [
    ("dpo", math.log(2)), ("hinge", 1.0), ("apo_zero", 1.0), ("bco", 2 * math.log(2)), ("mpo", 1.2 * math.log(2)),
    ("ipo", (1 / 0.2) ** 2), ("robust", math.log(2)), ("sft_chosen", 0.0),
])  # fmt: skip
def test_a_policy_that_is_its_reference_has_the_loss_of_not_knowing(name, value):
    loss = PREFERENCE_LOSSES[name](equal_to_reference(), PreferenceOptions(beta=0.1))
    torch.testing.assert_close(loss, torch.full((4,), value))


def swapped(pairs: Pairs) -> Pairs:
    c, r, ref_c, ref_r, n_c, n_r = pairs
    return Pairs(r, c, ref_r, ref_c, n_r, n_c)


def test_swapping_the_pair_flips_the_margin():
    chosen, rejected = rewards(some_pairs(), 0.3)
    other_chosen, other_rejected = rewards(swapped(some_pairs()), 0.3)
    torch.testing.assert_close(chosen - rejected, -(other_chosen - other_rejected))
    h = chosen - rejected
    loss, other = (PREFERENCE_LOSSES["dpo"](pairs, PreferenceOptions(0.3)) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close(other - loss, h)  # -log sigmoid(-h) + log sigmoid(h) = h


def test_smoothing_is_the_mean_over_labels_of_which_a_share_is_swapped_and_robust_undoes_it():
    """Noisy labels: robust's expectation over them is DPO's loss on the true ones (the paper's lemma)."""
    plain, e = PreferenceOptions(0.3), 0.2
    noisy = PreferenceOptions(0.3, smoothing=e)
    right, wrong = (PREFERENCE_LOSSES["dpo"](pairs, plain) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close(PREFERENCE_LOSSES["dpo"](some_pairs(), noisy), (1 - e) * right + e * wrong)
    kept, flipped = (PREFERENCE_LOSSES["robust"](pairs, noisy) for pairs in (some_pairs(), swapped(some_pairs())))
    torch.testing.assert_close((1 - e) * kept + e * flipped, right)


def test_simpo_asks_no_reference():
    c, r, ref_c, ref_r, n_c, n_r = some_pairs()
    other = Pairs(c, r, ref_c - 5, ref_r + 9, n_c, n_r)
    assert torch.equal(PREFERENCE_LOSSES["simpo"](some_pairs(), OPTIONS), PREFERENCE_LOSSES["simpo"](other, OPTIONS))


def test_the_anchor_is_the_mean_negative_log_likelihood_of_the_chosen_answer():
    pairs = some_pairs()
    torch.testing.assert_close(anchor(pairs), torch.tensor([-c / n for c, n in zip(pairs.chosen.tolist(), TOKENS[0])]))


def test_very_unlikely_answers_give_finite_losses():
    pairs = Pairs(*(torch.tensor([value]) for value in (-9e3, -1.0, -1.0, -9e3)), torch.tensor([90]), torch.tensor([80]))
    for name, loss in PREFERENCE_LOSSES.items():
        for each in (pairs, swapped(pairs)):
            assert loss(each, OPTIONS).isfinite().all(), name


@pytest.mark.parametrize(("change", "message"), [
    ({"beta": 0.0}, "beta is above 0"), ({"beta": 0.1, "smoothing": 0.5}, "0 to below 0.5"),
    ({"beta": 0.1, "smoothing": -0.1}, "0 to below 0.5"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PreferenceOptions(**change)


# ---------------------------------------------------------------- tokens -> answers


def test_log_probabilities_add_up_by_document():
    logps, documents = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 0, 1, 3, 3])
    sums, tokens = answer_sums(logps, documents, 4)
    assert sums.tolist() == [-3, -4, 0, -24]
    assert tokens.tolist() == [2, 1, 0, 2]


def test_documents_alternate_chosen_and_rejected():
    logps, documents = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 1, 1, 2, 3])
    pairs = as_pairs(logps, documents, torch.tensor([-10.0, -20.0, -30.0, -40.0]))
    assert [field.tolist() for field in pairs] == [[-1, -8], [-6, -16], [-10, -30], [-20, -40], [1, 1], [2, 1]]


def test_means_divide_each_side_by_its_own_tokens_policy_and_reference_alike():
    """`sum in the policy and mean in the reference` is a bug that others have had."""
    pairs, mean = some_pairs(), some_pairs().per_token()
    for k, count in ((0, 4), (1, 5), (2, 4), (3, 5)):
        torch.testing.assert_close(mean[k] * pairs[count], pairs[k])
    assert all(torch.equal(a, b) for a, b in zip(mean, mean.per_token()))

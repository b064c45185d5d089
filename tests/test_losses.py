"""Labels are shifted once, inside documents, and log-probabilities are those of a plain softmax, in fp32."""

import pytest
import torch

from model.losses import (
    IGNORE,
    count_learned,
    next_token_targets,
    sampling_logits,
    score,
    sum_by_document,
    token_entropy,
    token_logps,
)
from tests import tiny

# ---------------------------------------------------------------- targets


def test_targets_are_the_next_labels_of_the_same_document():
    labels = torch.tensor([[IGNORE, IGNORE, 12, 13, IGNORE, 25, 26, IGNORE]])
    document_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    assert next_token_targets(labels, document_ids).tolist() == [[IGNORE, 12, 13, IGNORE, 25, 26, IGNORE, IGNORE]]
    assert count_learned({"labels": labels, "document_ids": document_ids}) == 4


def test_the_last_token_of_a_document_never_predicts_the_first_of_the_next():
    labels = torch.tensor([[10, 11, 20, 21]])
    assert next_token_targets(labels, torch.tensor([[0, 0, 1, 1]])).tolist() == [[11, IGNORE, 21, IGNORE]]


def test_the_first_answer_token_and_the_end_of_turn_are_learned_once_each():
    # prompt 5 6, answer 7 8, end 1: position 1 predicts the first answer token, position 3 the end
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, 1]])
    assert next_token_targets(labels, torch.zeros(1, 5, dtype=torch.long)).tolist() == [[IGNORE, 7, 8, 1, IGNORE]]


def test_padding_is_never_a_target_even_when_it_is_labelled():
    labels = torch.tensor([[4, 5, 9, 9]])
    assert next_token_targets(labels, torch.tensor([[0, 0, -1, -1]])).tolist() == [[5, IGNORE, IGNORE, IGNORE]]


def test_labels_are_left_as_they_were():
    labels = torch.arange(6)[None]
    next_token_targets(labels, torch.zeros(1, 6, dtype=torch.long))
    assert labels.tolist() == [[0, 1, 2, 3, 4, 5]]


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_are_the_log_of_the_softmax():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 7) * 3, torch.randint(0, 7, (9,))
    expected = torch.log(logits.double().softmax(-1)[torch.arange(9), targets])
    torch.testing.assert_close(token_logps(logits, targets).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(token_logps(logits, targets).sum().double(), expected.sum(), atol=1e-5, rtol=0)


def test_log_probabilities_of_parts_are_those_of_the_whole():
    logits, targets = torch.randn(10, 7), torch.randint(0, 7, (10,))
    parts = torch.cat([token_logps(logits[:3], targets[:3]), token_logps(logits[3:], targets[3:])])
    torch.testing.assert_close(parts, token_logps(logits, targets))


def test_bf16_logits_are_summed_in_fp32():
    # 4,096 terms of about 0.7: a bf16 sum would be off by whole units
    logits, targets = torch.zeros(4096, 2, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)
    logps = token_logps(logits, targets)
    assert logps.dtype == sampling_logits(logits, 1.0, ()).dtype == torch.float32
    assert abs(logps.sum().item() + 4096 * torch.tensor(2.0).log().item()) < 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_banned_tokens_have_probability_zero_and_the_rest_sum_to_one(temperature):
    logits = torch.randn(4, 6)
    banned = sampling_logits(logits, temperature, (0, 5))
    probabilities = banned.softmax(-1)
    assert probabilities[:, [0, 5]].max() == 0 and logits.isfinite().all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    torch.testing.assert_close(banned[:, 1:5], logits[:, 1:5] / temperature)
    torch.testing.assert_close(sampling_logits(logits, temperature, ()), logits / temperature)


def test_log_probabilities_are_added_up_document_by_document():
    logps, owner = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 2, 0, 2, 2])
    sums, tokens = sum_by_document(logps, owner, 4)
    assert sums.tolist() == [5, 0, 26, 0] and tokens.tolist() == [2, 0, 3, 0]


@pytest.mark.parametrize("banned", [(), (1, 4)])
def test_the_entropy_is_minus_the_mean_log_probability_and_a_banned_token_adds_nothing(banned):
    logits = sampling_logits(torch.randn(5, 6) * 2, 1.0, banned)
    allowed = torch.tensor([token for token in range(6) if token not in banned])
    logps = logits[:, allowed].double().log_softmax(-1)
    torch.testing.assert_close(token_entropy(logits).double(), -(logps.exp() * logps).sum(-1), atol=1e-6, rtol=0)
    assert token_entropy(torch.zeros(1, 8)).item() == pytest.approx(torch.tensor(8.0).log().item())  # the most there is


# ---------------------------------------------------------------- a batch


DOCUMENTS = [tiny.document(9, [], seed=1), tiny.document(14, [2], seed=2), tiny.document(17, [0, 12], seed=3)]
PIXELS = tiny.pictures(3, seed=4)


@pytest.mark.parametrize("make", [tiny.flat, tiny.padded])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.6, (tiny.IMAGE, 2))])
@torch.no_grad()
def test_a_score_is_the_log_softmax_of_the_logits_before_every_learned_token(make, temperature, banned):
    """Against one softmax at a time, over all positions of each document alone."""
    model = tiny.vlm()
    batch = {**make(DOCUMENTS), "pixels": PIXELS}
    expected, owner, entropy = [], [], []
    for document, (ids, pixels) in enumerate(zip(DOCUMENTS, PIXELS.split([0, 1, 2]))):
        alone = tiny.flat([ids]) | ({"pixels": pixels} if len(pixels) else {})
        rows = model(alone, tiny.everywhere(alone)).double() / temperature
        rows[:, list(banned)] = -torch.inf
        for place, token in enumerate(ids[1:]):
            if token != tiny.IMAGE:  # a placeholder is not learned
                logps = rows[place].log_softmax(-1)
                expected.append(logps[token])
                owner.append(document)
                entropy.append(-sum(p * p.log() for p in logps.exp() if p > 0))
    scored = score(model, batch, temperature, banned)
    assert scored.owner.tolist() == owner and scored.values is None
    torch.testing.assert_close(scored.logps.double(), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(token_entropy(scored.logits).double(), torch.stack(entropy), atol=1e-5, rtol=0)
    assert scored.logps.dtype == torch.float32 and len(scored.logps) == count_learned(batch)


def test_logits_are_computed_only_before_learned_tokens():
    model, rows = tiny.vlm(), []
    model.llm.register_forward_hook(lambda module, args, logits: rows.append(len(logits)))
    batch = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    batch["labels"][:, :20] = IGNORE
    scored = score(model, batch)
    assert rows == [count_learned(batch)] == [len(scored.logits)] and rows[0] < batch["input_ids"].numel() / 2


def test_values_of_a_model_with_a_value_head_come_with_the_score():
    model = tiny.vlm()
    batch = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    plain = score(model, batch)
    valued = score(lambda *inputs: (model(*inputs), torch.arange(len(plain.logps))), batch)
    assert torch.equal(valued.logps, plain.logps) and valued.values.tolist() == list(range(len(plain.logps)))

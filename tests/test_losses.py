"""Labels are shifted once, inside documents, and losses are sums in fp32."""

import torch

from model.losses import IGNORE, ban, cross_entropy_sum, next_token_targets, token_logps


def test_targets_are_the_next_labels_of_the_same_document():
    labels = torch.tensor([[IGNORE, IGNORE, 12, 13, IGNORE, 25, 26, IGNORE]])
    document_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    assert next_token_targets(labels, document_ids).tolist() == [[IGNORE, 12, 13, IGNORE, 25, 26, IGNORE, IGNORE]]


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


def test_the_loss_is_minus_the_sum_of_the_log_probabilities():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 7) * 3, torch.randint(0, 7, (9,))
    expected = torch.log(logits.double().softmax(-1)[torch.arange(9), targets])
    torch.testing.assert_close(token_logps(logits, targets).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cross_entropy_sum(logits, targets).double(), -expected.sum(), atol=1e-5, rtol=0)


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    logits, targets = torch.randn(10, 7), torch.randint(0, 7, (10,))
    parts = cross_entropy_sum(logits[:3], targets[:3]) + cross_entropy_sum(logits[3:], targets[3:])
    torch.testing.assert_close(parts, cross_entropy_sum(logits, targets))


def test_bf16_logits_are_summed_in_fp32():
    # 4,096 terms of about 0.7: a bf16 sum would be off by whole units
    logits, targets = torch.zeros(4096, 2, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)
    loss = cross_entropy_sum(logits, targets)
    assert loss.dtype == token_logps(logits, targets).dtype == torch.float32
    assert abs(loss.item() - 4096 * torch.tensor(2.0).log().item()) < 0.1


def test_banned_tokens_have_probability_zero_and_the_rest_sum_to_one():
    logits = torch.randn(4, 6)
    probabilities = ban(logits, (0, 5)).softmax(-1)
    assert probabilities[:, [0, 5]].max() == 0 and logits.isfinite().all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
    torch.testing.assert_close(ban(logits, ()), logits)

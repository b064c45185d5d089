"""The model under the microscope: the weights are those of the fused kernel, and looking changes nothing."""

import pytest
import torch

from model import checkpoint
from model.inspection import Inspector, attention_weights, recorded
from model.losses import score
from model.registry import UserError
from tests import tiny


@pytest.fixture
def batch() -> dict:
    documents = [tiny.document(14, [3], seed=1), tiny.document(9, [], seed=2), tiny.document(21, [2, 7], seed=3)]
    return {**tiny.flat(documents), "pixels": tiny.pictures(3, seed=4), "ids": ["a", "b", "c"]}


@pytest.fixture
def inspector(tmp_path) -> Inspector:
    class Stored(Inspector):
        def __init__(self):
            self.folder, self.model = tmp_path, tiny.vlm().eval()

    return Stored()


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.inference_mode()
def test_weights_times_values_are_what_the_kernel_returned(batch, heads):
    model = tiny.vlm(num_key_value_heads=heads)
    with recorded(model) as seen:
        model(batch, tiny.everywhere(batch))
    assert len(seen) == 3
    for q, k, v, packed, out in seen:
        lengths = packed.lengths.tolist()
        parts = [x.split(lengths) for x in (q, k, v, out)]
        for q, k, v, gathered in zip(*parts, strict=True):
            v = v.repeat_interleave(4 // heads, dim=1)
            torch.testing.assert_close(torch.einsum("hqt,thk->qhk", attention_weights(q, k), v), gathered)


def test_no_token_looks_ahead_and_the_weights_of_each_sum_to_one(inspector, batch):
    found = inspector.attention(batch)
    assert [weights.shape for weights in found] == [(4, 14, 14), (4, 9, 9), (4, 21, 21)]
    for weights in found:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert not weights.triu(1).any()
    assert not torch.equal(found[0], inspector.attention(batch, block=0)[0])


def test_looking_leaves_the_model_as_it_was(batch):
    model = tiny.vlm()
    before = model(batch, tiny.everywhere(batch))
    with pytest.raises(RuntimeError), recorded(model) as seen:
        assert torch.equal(model(batch, tiny.everywhere(batch)), before)
        raise RuntimeError
    assert len(seen) == 3 and torch.equal(model(batch, tiny.everywhere(batch)), before) and len(seen) == 3


def test_a_language_model_of_another_library_is_refused_in_one_line():
    model = tiny.vlm()
    model.llm.blocks[1].self_attn = torch.nn.Identity()
    with pytest.raises(UserError, match="the attention of gpt is inside another library"), recorded(model):
        pass


@torch.inference_mode()
def test_an_answer_has_the_log_probability_that_the_losses_give_it(inspector, batch):
    logps, tokens = inspector.answer_logps(batch)
    scores = score(inspector.model, batch)
    assert [float(logp) for logp in logps] == [pytest.approx(float(scores.logps[scores.owner == k].sum())) for k in range(3)]
    assert tokens.tolist() == [int((scores.owner == k).sum()) for k in range(3)]


def test_the_steps_of_a_row_name_the_files_and_shapes_of_its_parts(inspector, batch):
    steps = inspector.steps(batch)
    learned = int(inspector.answer_logps(batch)[1].sum())
    assert [tuple(steps[name]) for name in ("encoder", "connector", "llm")] == [
        ("model/encoder/clip.py", (3, 3, 8, 8), (3, 5, 16)),
        ("model/connector/linear.py", (3, 5, 16), (3, 5, 24)),
        ("model/llm/gpt.py", (44, 24), (learned, 50))]  # fmt: skip


def test_the_same_answers_are_sampled_whenever_they_are_asked_for(tmp_path):
    model, folder = tiny.nano(), tmp_path / "sft"
    processor = tiny.processor(image_tokens=9, images=tiny.Images(96))
    checkpoint.save(folder, model, processor.tokenizer.file)
    inspector = Inspector(folder)
    prompt = processor.padded([processor.document(conversation(), 100)])
    answers = [inspector.sample(prompt, 3, temperature=1.0, max_new_tokens=4, **processor.sampling) for _ in range(2)]
    assert answers[0] == answers[1] and len(answers[0]) == 3
    assert inspector.tokenizer_file == folder / "tokenizer.model"


def conversation():
    from dataset.tasks import dialogue

    return dialogue("a", [], [("What is it?", "A bus.")])

"""Any language model of transformers keeps the contract of ours: documents, cache, and the same answers as by itself."""

import copy
import json

import pytest
import torch
import transformers

from model import checkpoint, recompute
from model.config import VLMConfig, preset
from model.generate import generate
from model.llm import pretrained
from model.llm.attention import PackedSequences
from model.recipe import Mode, count_trainable, set_trainable
from model.registry import LLMS, UserError
from model.vlm import VLM
from tests import tiny

SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=128)  # fmt: skip
ENCODER = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"
FAMILIES = {  # parallel blocks with biases; a scaled embedding that is also the head; learned positions
    "GPTNeoX": {}, "Gemma": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}, "OPT": {"ffn_dim": 40},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """(our module, transformers' own model, the start they came from)."""
    torch.manual_seed(1)
    shape = {**SHAPE, **FAMILIES[request.param]}
    if request.param == "OPT":
        shape.update(word_embed_proj_dim=24, dropout=0.0)
    theirs = getattr(transformers, f"{request.param}ForCausalLM")(getattr(transformers, f"{request.param}Config")(**shape)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    start = pretrained.start(f"huggingface:{folder}")
    config = start.config(preset("nano", vocab_size=51, image_token_id=tiny.IMAGE))
    llm = LLMS.make("huggingface", config=config.llm).eval()
    assert "0 missing, 0 unexpected" in start.fill(llm)
    return llm, theirs, config


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_packed_documents_get_the_logits_they_get_alone(both):
    llm, theirs, _ = both
    parts = [ids(7, 0), ids(12, 1), ids(1, 2)]
    tokens = torch.cat(parts)
    packed = PackedSequences(torch.repeat_interleave(torch.arange(3), torch.tensor([7, 12, 1]))[None])
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    expected = torch.cat([theirs(part[None]).logits[0] for part in parts])
    assert expected.std() > 0.1
    logits = llm(llm.embed(tokens), positions, packed)
    torch.testing.assert_close(logits[:, :50], expected, atol=2e-5, rtol=1e-5)
    keep = torch.arange(20) % 3 == 0
    torch.testing.assert_close(llm(llm.embed(tokens), positions, packed, logits_to_keep=keep), logits[keep])


@torch.no_grad()
def test_the_head_computes_logits_of_kept_positions_alone(both):
    llm, _, _ = both
    packed, seen = PackedSequences(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])), []
    handle = llm.lm.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: seen.append(logits.shape))
    try:
        llm(torch.randn(9, 24), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]), packed, logits_to_keep=torch.arange(9) > 6)
    finally:
        handle.remove()
    assert seen == [(2, 51)]


def test_no_gradient_crosses_from_a_document_into_another(both):
    llm, _, _ = both
    x = torch.randn(9, 24, requires_grad=True)
    packed = PackedSequences(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]))
    llm(x, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]), packed)[4:].sum().backward()
    reached = x.grad.abs().amax(-1)
    assert reached[:4].max() == 0 and reached[4:].min() > 0


@torch.no_grad()
def test_answers_to_prompts_of_different_lengths_are_those_of_transformers(both):
    """Through generate: the cache is filled, repeated, and loses rows that have ended."""
    llm, theirs, config = both
    model = VLM(VLMConfig(config.llm, ENCODER, "linear", tiny.IMAGE, "huggingface"))
    model.llm = llm
    prompts = [ids(4, 3), ids(9, 4), ids(6, 5)]
    expected = [theirs.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8, do_sample=False,
                                eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist() for prompt in prompts]
    stop = expected[0][4]  # the first answer ends early, perhaps others too
    ended = [tokens[:tokens.index(stop)] if stop in tokens else tokens for tokens in expected]
    answers = generate(model, tiny.padded([prompt.tolist() for prompt in prompts]), max_new_tokens=8, stop_ids={stop},
                       temperature=0.0, banned=[50], group_size=2)  # fmt: skip
    assert [answer.tokens for answer in answers] == [tokens for tokens in ended for _ in range(2)]


def test_a_checkpoint_is_whole_and_parts_of_it_can_be_trained(both, tmp_path):
    llm, _, config = both
    made = VLM(VLMConfig(config.llm, ENCODER, "linear", tiny.IMAGE, "huggingface"))
    made.llm = llm
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    checkpoint.save(tmp_path / "out", made, file)
    back = checkpoint.load(tmp_path / "out")
    assert back.config == made.config
    for name, tensor in made.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert len(back.llm.blocks) == 3
    set_trainable(back.llm, Mode.parse("partial:1"))
    assert 0 < count_trainable(back.llm) < sum(p.numel() for p in back.llm.parameters()) / 2
    set_trainable(back.llm, Mode.parse("lora:2"))
    assert count_trainable(back.llm) > 0


def test_activations_can_be_computed_again(both):
    """Blocks of transformers are called with names, which ours are not."""
    llm, _, config = both
    made = VLM(VLMConfig(config.llm, ENCODER, "linear", tiny.IMAGE, "huggingface"))
    made.llm = copy.deepcopy(llm)
    tokens, packed = ids(9, 3), PackedSequences(torch.zeros(1, 9, dtype=torch.long))
    gradients = []
    for again in (False, True):
        if again:
            recompute.apply(made)
        made.zero_grad()
        made.llm(made.llm.embed(tokens), torch.arange(9), packed).square().sum().backward()
        gradients.append({name: p.grad for name, p in made.llm.named_parameters() if p.grad is not None})
    assert gradients[0] and all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(("family", "changes"), [
    ("Phi", {"hidden_size": 32}), ("Phi3", {"pad_token_id": 0, "num_key_value_heads": 2}), ("GPT2", {}),
    ("Gemma", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
])  # fmt: skip
def test_image_takes_a_row_of_the_table_and_of_the_heads_bias_that_is_their_mean(family, changes, tmp_path):
    """Phi's head has a bias: one number per token, which needs a row for <image> as well."""
    torch.manual_seed(1)
    shape = {**SHAPE, **changes}
    if family == "GPT2":
        shape = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4}
    theirs = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{family}Config")(**shape)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    theirs.save_pretrained(tmp_path)
    for tokens, rows in ((51, 51), (40, 50)):  # a new row; an unused one of a table that is larger than the vocabulary
        start = pretrained.start(f"huggingface:{tmp_path}")
        config = start.config(preset("nano", vocab_size=tokens, image_token_id=tokens - 1))
        assert config.llm.vocab_size == rows
        llm = LLMS.make("huggingface", config=config.llm).eval()
        assert "0 missing, 0 unexpected" in start.fill(llm)
        tokens_read, packed = ids(9, 3), PackedSequences(torch.zeros(1, 9, dtype=torch.long))
        with torch.no_grad():
            logits = llm(llm.embed(tokens_read), torch.arange(9), packed)
            torch.testing.assert_close(logits[:, :50], theirs(tokens_read[None]).logits[0], atol=2e-5, rtol=1e-5)
        head, original = llm.lm.get_output_embeddings(), theirs.get_output_embeddings()
        assert (head.bias is None) == (family != "Phi")
        if rows == 51:
            torch.testing.assert_close(head.weight[50], original.weight.mean(0))
            if head.bias is not None:
                torch.testing.assert_close(head.bias[50], original.bias.mean())


@pytest.mark.parametrize("kind", ["unknown_kind", "llama"])
def test_code_that_comes_with_a_model_is_never_run(kind, tmp_path, monkeypatch):
    """Neither on request nor after a question to the user: a family of transformers itself needs none of it."""
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked whether to run the model's code"))
    shape = {**SHAPE, "num_key_value_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind, "auto_map": classes}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    if kind == "llama":
        assert pretrained.start(f"huggingface:{tmp_path}").shape.hidden_size == 24
    else:
        with pytest.raises(UserError, match="transformers cannot read .*, and code that comes with a model is never run") as told:
            pretrained.start(f"huggingface:{tmp_path}")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_a_shape_without_a_source_is_an_error():
    with pytest.raises(ValueError, match="huggingface:FOLDER"):
        LLMS.make("huggingface", config=tiny.llm_config())

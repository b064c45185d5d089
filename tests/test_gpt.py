"""The hand-written decoder is Llama, Qwen2 and Qwen3, to the last logit; documents never see each other."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from model.attention import attention
from model.llm.attention import DOCUMENTS_PER_CALL, PackedSequences, attend
from model.llm.gpt import GPT
from tests import tiny

FAMILIES = {
    "Llama": ({}, {}),
    "Qwen2": ({"attention_bias": True}, {}),
    "Qwen3": ({"qk_norm": True, "head_dim": 12}, {"attention_bias": False}),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


def pair(family: str, tied: bool) -> tuple[GPT, torch.nn.Module]:
    """Our decoder with the weights of transformers' own tiny random model."""
    ours, theirs = FAMILIES[family]
    # An eps and a theta that are nobody's default: a decoder that ignores its config must fail.
    changes = {"head_dim": 6, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "tie_word_embeddings": tied, **ours}
    config = tiny.llm_config(**changes)
    shared = dataclasses.asdict(config)
    for name in ("qk_norm", "attention_bias", "rope_scaling", "transformers"):
        del shared[name]
    shared["rope_parameters"] = {"rope_type": "default", "rope_theta": shared.pop("rope_theta")}
    torch.manual_seed(1)
    hf_config = getattr(transformers, f"{family}Config")(**{**shared, **theirs})
    hf = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for weight in hf.parameters():  # norm weights of 1 and biases of 0 would hide a mistake
            weight.add_(torch.randn_like(weight) * 0.2)
    gpt = GPT(config)
    weights = hf.state_dict()
    if tied:
        del weights["lm_head.weight"]
    gpt.load_state_dict(weights)
    return gpt, hf


def one_document(length: int) -> tuple[torch.Tensor, PackedSequences]:
    return torch.arange(length), PackedSequences(torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize(("family", "tied"), CASES)
@torch.no_grad()
def test_logits_equal_transformers(family, tied):
    gpt, hf = pair(family, tied)
    ids = torch.randint(0, 50, (33,))
    expected = hf(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(gpt(gpt.embed(ids), *one_document(33)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "tied"), CASES)
@torch.no_grad()
def test_logits_with_a_cache_equal_transformers(family, tied):
    gpt, hf = pair(family, tied)
    ids = torch.randint(0, 50, (20,))
    cache = gpt.cache(rows=1, capacity=20)
    logits = [gpt(gpt.embed(ids[:9]), *one_document(9), cache=cache)]
    for token in ids[9:]:
        logits.append(gpt(gpt.embed(token[None]), cache.lengths, packed=None, cache=cache))
    torch.testing.assert_close(torch.cat(logits), hf(ids[None]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "tied"), CASES)
@torch.no_grad()
def test_greedy_tokens_equal_transformers_generate(family, tied):
    gpt, hf = pair(family, tied)
    prompt = torch.randint(0, 50, (11,))
    expected = hf.generate(
        prompt[None],
        attention_mask=torch.ones(1, 11),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 11:]
    cache = gpt.cache(rows=1, capacity=11 + 24)
    logits = gpt(gpt.embed(prompt), *one_document(11), cache=cache)[-1:]
    tokens = []
    for _ in range(24):
        tokens.append(logits.argmax(-1))
        logits = gpt(gpt.embed(tokens[-1]), cache.lengths, packed=None, cache=cache)
    assert torch.cat(tokens).tolist() == expected.tolist()


def test_our_parameter_names_are_hugging_faces():
    gpt, hf = pair("Qwen3", tied=False)
    assert set(gpt.state_dict()) == set(hf.state_dict())


def test_packing_drops_padding_and_finds_every_boundary():
    # The same id in two rows is two documents; a row may hold several, and padding between them.
    packed = PackedSequences(torch.tensor([[0, 0, 0, 1, 1], [1, 1, -1, 4, -1]]))
    assert packed.lengths.tolist() == [3, 2, 2, 1] and packed.owner.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert packed.pack(torch.arange(10).view(2, 5)).tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    padded = packed.padding.pad(torch.arange(1, 9))
    assert padded.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0], [8, 0, 0]]
    assert packed.padding.unpad(padded).tolist() == list(range(1, 9))


def test_attention_in_several_kernel_calls_is_attention_document_by_document():
    """More documents than a call takes, of uneven lengths: no call may shift, cut or mix them."""
    lengths = torch.randint(1, 12, (2 * DOCUMENTS_PER_CALL + 3,)).tolist()
    packed = PackedSequences(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None])
    calls = [lengths[k:k + DOCUMENTS_PER_CALL] for k in range(0, len(lengths), DOCUMENTS_PER_CALL)]
    assert [padding.longest for padding in packed.parts] == list(map(max, calls))
    q, k, v = torch.randn(sum(lengths), 4, 8), torch.randn(sum(lengths), 2, 8), torch.randn(sum(lengths), 2, 8)
    alone = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v))):
        one = (x.transpose(0, 1)[None] for x in parts)
        alone.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    torch.testing.assert_close(attend(q, k, v, packed), torch.cat(alone))


@pytest.mark.parametrize(("causal", "tokens", "kv_heads"), [(True, 9, 4), (True, 9, 2), (False, 9, 1), (False, 5, 4)])
def test_attention_written_out_is_the_fused_kernel(monkeypatch, causal, tokens, kv_heads):
    q, *kv = torch.randn(3, 4, 9, 8, dtype=torch.double), *torch.randn(2, 3, kv_heads, tokens, 8, dtype=torch.double)
    for x in (q, *kv):
        x.requires_grad_()
    results = []
    for most in (9 * 9, 9 * 5 - 1):  # written out, and too long for that
        monkeypatch.setattr("model.attention.MOST_SCORES", most)
        out = attention(q, *kv, causal=causal)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, *kv))))
    kernel = F.scaled_dot_product_attention(q, *kv, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(results[1][0], kernel, rtol=0, atol=0)
    for written_out, fused in zip(*results):
        torch.testing.assert_close(written_out, fused)


def test_masked_keys_add_nothing_in_either_form(monkeypatch):
    q, kv, stored = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.arange(7) < torch.tensor([[5], [2]])
    alone = torch.cat([attention(q[k:k + 1], kv[k:k + 1, :, :n], kv[k:k + 1, :, :n]) for k, n in enumerate((5, 2))])
    for most in (4 * 7, 0):
        monkeypatch.setattr("model.attention.MOST_SCORES", most)
        torch.testing.assert_close(attention(q, kv, kv, mask=stored[:, None, None]), alone)


def test_attention_is_the_formula_of_its_docstring():
    q, k, v = torch.randn(9, 1, 8), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    scores = q[:, 0] @ k[:, 0].T / 8**0.5
    scores[torch.arange(9) > torch.arange(9)[:, None]] = -torch.inf
    packed = PackedSequences(torch.zeros(1, 9, dtype=torch.long))
    torch.testing.assert_close(attend(q, k, v, packed)[:, 0], scores.softmax(-1) @ v[:, 0])


def test_a_changed_document_never_moves_another():
    gpt = tiny.vlm().llm
    packed = PackedSequences(torch.tensor([[0] * 7 + [1] * 9 + [2] * 4]))
    position_ids = torch.cat([torch.arange(7), torch.arange(9), torch.arange(4)])
    x = torch.randn(20, 24, requires_grad=True)
    logits = gpt(x, position_ids, packed)
    changed = x.detach().clone()
    changed[7:16] += 1.0
    moved = (gpt(changed, position_ids, packed) - logits).abs().amax(-1)
    assert moved[:7].max() == 0 and moved[16:].max() == 0 and moved[7:16].min() > 0
    logits[7:16].sum().backward()
    reached = x.grad.abs().amax(-1)
    assert reached[:7].max() == 0 and reached[16:].max() == 0 and reached[7:16].min() > 0


def test_a_token_never_sees_a_later_one():
    gpt = tiny.vlm().llm
    x = torch.randn(12, 24)
    changed = x.clone()
    changed[8] += 1.0
    moved = (gpt(changed, *one_document(12)) - gpt(x, *one_document(12))).abs().amax(-1)
    assert moved[:8].max() == 0 and moved[8:].min() > 0


def test_kept_logits_equal_those_of_all_positions_in_outputs_and_gradients():
    gpt = tiny.vlm().llm
    x, keep = torch.randn(30, 24), torch.rand(30) < 0.3
    everything = gpt(x, *one_document(30))[keep]
    expected = torch.autograd.grad(everything.square().sum(), list(gpt.parameters()))
    kept = gpt(x, *one_document(30), logits_to_keep=keep)
    torch.testing.assert_close(kept, everything)
    gradients = torch.autograd.grad(kept.square().sum(), list(gpt.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)  # fp32, summed in another order


def test_the_last_mlp_runs_only_where_logits_are_asked_for():
    gpt = tiny.vlm().llm
    rows = []
    for block in gpt.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    gpt(torch.randn(30, 24), *one_document(30), logits_to_keep=torch.arange(30) % 6 == 0)
    assert rows == [30, 30, 5]


def test_residual_projections_start_smaller_than_the_rest():
    torch.manual_seed(0)
    gpt = GPT(tiny.llm_config(hidden_size=128, intermediate_size=256, num_hidden_layers=8))
    block = gpt.blocks[0]
    assert abs(block.mlp.up_proj.weight.std() - 0.02) < 0.001
    assert abs(block.mlp.down_proj.weight.std() - 0.005) < 0.0003
    assert abs(block.self_attn.o_proj.weight.std() - 0.005) < 0.0003

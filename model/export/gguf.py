"""The language model of a checkpoint, without its eyes, as a GGUF file for llama.cpp. `python -m model.export OUT FOLDER --gguf`

In:  a `VLM`, the processor of its chat.  Out: a file with every tensor in fp32, the tokenizer and the chat template, and a proof:
     each tensor is read back from the file and compared, bit for bit.

llama.cpp cannot show it pictures: its CLIP has no CLS token, and no connector of ours.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.export import llava
from model.export.tokenizer import MARK, chat_template
from model.registry import UserError
from model.vlm import VLM

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of tokens in GGUF


def require_exportable(model: VLM, tokenizer: Any) -> None:
    """UserError names what llama.cpp does not compute, or what is not written here."""
    config, to_folder = model.config.llm, "export a folder without --gguf"
    if type(model.llm).__name__ != "GPT" or config.rope_scaling or config.qk_norm and config.attention_bias:
        raise UserError(f"--gguf writes a Llama, Qwen2 or Qwen3 without a stretched RoPE, and this is another model: {to_folder}")
    if tokenizer.file.suffix != ".model":
        raise UserError(f"--gguf writes a sentencepiece tokenizer, and this is {tokenizer.file.name}: {to_folder}")


def family(model: VLM) -> str:
    """llama, qwen2 or qwen3."""
    return str(llava.text_config(model, [])["model_type"])


def tensors(model: VLM) -> dict[str, Tensor]:
    """GGUF's name -> tensor in fp32. In a Llama, unlike in a Qwen, RoPE pairs neighbours: rows of q and k change their places."""
    import gguf

    config, result = model.config.llm, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family(model).upper()], config.num_hidden_layers)
    for name, tensor in model.llm.state_dict().items():
        tensor = tensor.detach().float().cpu()
        if family(model) == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        result[str(names.get_name(name, (".weight", ".bias")))] = tensor.contiguous()
    return result


def facts(model: VLM, processor: Any) -> dict[str, Any]:
    """What the file says beside its tensors, by the name of GGUFWriter's function that writes it."""
    import gguf

    config, tokenizer = model.config.llm, processor.tokenizer
    kinds = token_kinds(tokenizer.model, config.vocab_size)
    pieces = [(MARK if kind == CONTROL else "") + tokenizer.model.id_to_piece(index) for index, kind in enumerate(kinds)]
    return {
        "file_type": gguf.LlamaFileType.ALL_F32, "vocab_size": config.vocab_size, "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads, "key_length": config.head_channels, "value_length": config.head_channels,
        "rope_dimension_count": config.head_channels, "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
        # llama.cpp's Jinja knows no \u: the characters themselves
        "chat_template": re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), chat_template(processor.template)),
        # sentencepiece's BPE, which puts no blank before a text; what begins a document stands in the template
        "tokenizer_model": "llama", "tokenizer_pre": "default", "token_list": pieces, "token_types": kinds,
        "token_scores": [tokenizer.model.get_score(index) for index in range(len(pieces))], "add_space_prefix": False,
        "add_bos_token": False, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.id(processor.template.stop),
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip


def token_kinds(pieces: Any, count: int) -> list[int]:
    """How llama.cpp treats each token. No text becomes a control token; a symbol with a name, <think>, is never cut.

    pieces   sentencepiece's model: symbols with a name stand before the 256 bytes
    """
    first_byte = next((index for index in range(count) if pieces.is_byte(index)), 0)
    return [CONTROL if pieces.is_control(index) else UNKNOWN if pieces.is_unknown(index) else BYTE if pieces.is_byte(index)
            else USER_DEFINED if index < first_byte else NORMAL for index in range(count)]  # fmt: skip


def write(file: Path, model: VLM, processor: Any) -> int:
    """Write the file and read it back: the number of its tensors. UserError for a model that it cannot hold."""
    import gguf

    require_exportable(model, processor.tokenizer)
    writer, stored = gguf.GGUFWriter(file, family(model)), tensors(model)
    for name, value in facts(model, processor).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in stored.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    if different := sorted(name for name in {*stored, *read} if name not in read or not torch.equal(stored[name], read[name])):
        raise UserError(f"{file} does not hold what was written: {', '.join(different[:4])}")
    return len(read)

"""A published LLaVA as a checkpoint of ours, and our own exports back.

In:  a folder, or OWNER/NAME on the Hugging Face hub, in one of two forms:
     llava-hf's           LlavaForConditionalGeneration of transformers; also what model/export writes
     the original one     LLaVA-1.5 and RLAIF-V-7B: model.mm_projector.*, model.vision_tower.vision_tower.*, or no tower at all
Out: a checkpoint that the scripts chat with, train and measure. Its parts are a CLIP ViT, a linear map or an MLP, and a Llama,
     Qwen2 or Qwen3. Nothing is guessed: a tower, a connector or a setting that these do not compute is an error that names it
     (published_llava.py).

    python -m model.from_llava llava-hf/llava-1.5-7b-hf out/llava
    python -m model.from_llava exported out/back
"""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint, cli
from model.config import VLMConfig, preset
from model.encoder.huggingface import renamed
from model.encoder.select import Selected
from model.hub import local_folder, read_json, read_tensors
from model.published_llava import parts_of, require_llava
from model.registry import UserError
from model.vlm import VLM

PLACES = {  # names of both forms, of older and newer versions of transformers
    "llm": r"(?:language_model\.model|model\.language_model|model)\.((?:embed_tokens|layers|norm)\..+)",
    "head": r"(?:language_model\.)?(lm_head\..+)", "projector": r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.(.+)",
    "tower": r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)",
}  # fmt: skip


def imported(source: str, load_tokenizer: Any) -> tuple[VLM, Path]:
    """(model, tokenizer file) of a folder or of a name on the hub. load_tokenizer: dataset/tokenizer.py's."""
    folder = local_folder(source)
    values = read_json(folder / "config.json")
    require_llava(values, folder)
    tensors = by_part(read_tensors(folder), folder)
    if "pupil" in values:
        return back(VLMConfig.from_dict(values["pupil"]), tensors), checkpoint_tokenizer(folder)
    parts = parts_of(values, tensors, folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    template = "vicuna" if not (parts.language.shape.qk_norm or parts.language.shape.attention_bias) else "chatml"
    base = preset("small", vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image, encoder=parts.encoder,
                  connector=parts.connector, template=template, fit=parts.fit)  # its shape gives way to the language model's
    model = VLM(parts.language.config(base))
    print(parts.language.fill(model.llm))
    checkpoint.load_weights(model.connector, parts.projection, f"the projector in {folder}", with_encoder=True)
    if parts.tower:
        fill_tower(model, parts.tower, str(folder))
        model.encoder_was_stored = True
    return model.eval(), tokenizer.file


def by_part(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by part, with what PLACES leaves of their names; UserError for tensors of another part."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in PLACES}
    strangers = []
    for name, tensor in tensors.items():
        match = next(((part, match[1]) for part, place in PLACES.items() if (match := re.fullmatch(place, name))), None)
        if match is None:
            strangers.append(name)
        elif not match[1].endswith(("rotary_emb.inv_freq", "position_ids")):  # numbers that follow from the config
            found[match[0]][match[1]] = tensor.float()
    if strangers:
        raise UserError(f"{folder} has tensors of a part that no LLaVA-1.5 has: {', '.join(strangers[:6])}")
    return found


# ---------------------------------------------------------------- our own exports


def back(config: VLMConfig, tensors: dict[str, dict[str, Tensor]]) -> VLM:
    """The model of a folder that model/export wrote, with the same tensors bit for bit.

    CLIP's `proj`, which no feature depends on, is not in such a folder: it comes with the encoder's name.
    """
    model = VLM(config)
    language = {**{f"model.{name}": tensor for name, tensor in tensors["llm"].items()}, **tensors["head"]}
    language = {name: tensor for name, tensor in language.items() if not name.endswith("o_proj.bias")}  # zeros (export/llava.py)
    projection = tensors["projector"]
    if "linear_1.weight" in projection and "linear_1.weight" not in model.connector.state_dict():
        places = [name for name in model.connector.state_dict() if name.endswith("weight")]  # in the order of the maps
        projection = {name: projection[f"linear_{place}.{kind}"] for place, weight in enumerate(places, 1)
                      for kind in ("weight", "bias") if (name := weight.replace("weight", kind)) in model.connector.state_dict()}
    checkpoint.load_weights(model.llm, language, "the language model", with_encoder=True)
    checkpoint.load_weights(model.connector, projection, "the connector", with_encoder=True)
    before = model.encoder.fingerprint()
    fill_tower(model, renamed(tensors["tower"]), "the folder")
    model.encoder_was_stored = model.encoder.fingerprint() != before  # it was trained: its name does not restore it
    return model.eval()


def fill_tower(model: VLM, tower: dict[str, Tensor], where: str) -> None:
    """Copy the tensors of our ViT; `proj`, if there is none, stays as it is."""
    vit: Any = model.encoder.encoder if isinstance(model.encoder, Selected) else model.encoder
    checkpoint.load_weights(vit, {"proj": vit.proj.detach(), **tower}, f"the tower in {where}", with_encoder=True)


def checkpoint_tokenizer(folder: Path) -> Path:
    """The tokenizer of the checkpoint that was exported."""
    files = [file for suffix in checkpoint.TOKENIZERS if (file := folder / f"pupil_tokenizer{suffix}").is_file()]
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} should hold pupil_tokenizer.model or .json, which the export wrote: copy it again")
    return files[0]


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("python -m model.from_llava FOLDER_OR_NAME OUT, as in: python -m model.from_llava exported out/back")
    chat = runpy.run_path(str(Path(__file__).parents[1] / "4-eval_chat.py"))  # the scripts alone know both packages
    with torch.no_grad():
        model, tokenizer_file = imported(arguments[0], chat["load_tokenizer"])
    model.requires_grad_(False)  # nothing is being trained, so the encoder is stored only if its name does not restore it
    checkpoint.save(Path(arguments[1]), model, tokenizer_file)
    print(f"wrote {arguments[1]}. Next: python 4-eval_chat.py --model {arguments[1]}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

"""All files of an exported folder.

In:  a checkpoint: its model, and the processor of its chat.  Out: a folder for transformers, written anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from model.export import llava, own_code, tokenizer
from model.export.model_card import model_card
from model.export.tokenizer import IMAGE, MARK
from model.registry import UserError
from model.vlm import VLM


def write_folder(folder: Path, model: VLM, processor: Any, checkpoint: Path) -> None:
    """Write the folder. UserError, before anything is written, for a part that cannot be exported or a folder of something else.

    processor    of the chat (dataset/processor.py): template, tokenizer and how pictures are fitted
    checkpoint   the folder of the model, for the card
    """
    llava.require_exportable(model)
    stop_ids = sorted(processor.stop_ids)
    texts = {
        "config.json": as_json(llava.config_json(model, stop_ids)),
        "generation_config.json": as_json({"eos_token_id": stop_ids, "pad_token_id": processor.tokenizer.pad, "do_sample": False,
                                           "max_new_tokens": 256, "suppress_tokens": sorted(set(processor.banned))}),
        "tokenizer.json": json.dumps(tokenizer.tokenizer_json(processor.tokenizer), ensure_ascii=False),
        "tokenizer_config.json": as_json(tokenizer_config(processor)),
        "chat_template.jinja": tokenizer.chat_template(processor.template),
        "processor_config.json": as_json(processor_config(model)),
        "preprocessor_config.json": as_json(preprocessor_config(model)),
        "image_processing_pupil.py": own_code.image_processing(),
        "README.md": model_card(model, checkpoint),
    }  # fmt: skip
    if not llava.is_llava(model.connector):
        texts["modeling_pupil.py"] = own_code.modeling(model.connector)
    if folder.exists() and not (folder / "processor_config.json").is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else than an earlier export: name a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(llava.tensors(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read
    shutil.copyfile(processor.tokenizer.file, folder / f"pupil_tokenizer{processor.tokenizer.file.suffix}")  # for the way back
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def as_json(values: dict) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def tokenizer_config(processor: Any) -> dict[str, Any]:
    """Names of control tokens, with their mark. Nothing is added to a text, and blanks stay as they are."""
    stop = MARK + processor.template.stop
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": stop,
        "pad_token": stop if processor.tokenizer.pad == processor.tokenizer.image else MARK + "<pad>", "padding_side": "left",
        "model_max_length": processor.context_length, "extra_special_tokens": {"image_token": MARK + IMAGE},
    }  # fmt: skip


def processor_config(model: VLM) -> dict[str, Any]:
    """LLaVA's processor counts patches; its patch is larger than the picture here, so the tokens are all additional ones."""
    return {"processor_class": "LlavaProcessor", "patch_size": 2 * model.encoder.size, "image_token": MARK + IMAGE,
            "num_additional_image_tokens": model.image_tokens, "vision_feature_select_strategy": "full"}  # fmt: skip


def preprocessor_config(model: VLM) -> dict[str, Any]:
    """Our image processor, and CLIP's for whoever runs no code of others; with --fit pad there is nothing like it."""
    encoder, fit = model.encoder, model.config.fit
    side = {"height": encoder.size, "width": encoder.size}
    kind = "PupilImageProcessor" if fit == "pad" else "CLIPImageProcessor"
    return {
        "image_processor_type": kind, "auto_map": {"AutoImageProcessor": "image_processing_pupil.PupilImageProcessor"},
        "processor_class": "LlavaProcessor", "fit": fit, "size": {"shortest_edge": encoder.size} if fit == "square" else side,
        "crop_size": side, "do_resize": True, "do_center_crop": fit == "square", "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "resample": 3, "do_convert_rgb": True, "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }  # fmt: skip

"""The model card of an exported folder: what the model is, what it learned, how it is opened, its numbers, the licences."""

import json
from pathlib import Path

from model.export import llava
from model.export.own_code import filled
from model.vlm import VLM, count_parameters


def model_card(model: VLM, checkpoint: Path) -> str:
    """The text of README.md. Numbers are those of scores.json, and the command that of run.json, where they are there."""
    scores, run = (read(checkpoint / name) for name in ("scores.json", "run.json"))
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(scores.items()) if isinstance(value, int | float))
    plain = llava.is_llava(model.connector)
    return filled(
        "README.md", STAGE=checkpoint.name, ENCODER=model.config.encoder, CONNECTOR=model.config.connector,
        SIZE=str(model.encoder.size), PARAMETERS=f"{count_parameters(model):,}", TOKENS=str(model.image_tokens),
        COMMAND=str(run.get("command", "not recorded")),
        CONTEXT=f"{model.config.llm.max_position_embeddings:,}", FAMILY=llava.text_config(model, [])["model_type"],
        CLASS="LlavaForConditionalGeneration" if plain else "LLaVA with a connector of its own, modeling_pupil.py",
        WHY=WHY_LLAVA if plain else WHY_OWN,
        SCORES=f"| | |\n| --- | --- |\n{rows}" if rows else "None were measured before the export.",
    )  # fmt: skip


WHY_LLAVA = ("The model opens without `trust_remote_code`. With it, pictures are also read exactly as in training. Without it, "
             "CLIP's image processor takes their place, which may differ by a pixel or a grey level.")
WHY_OWN = ("The connector compares the pictures of a conversation or joins their tokens, and no class of `transformers` does. "
           "Therefore the folder brings `modeling_pupil.py`. Read it, then pass `trust_remote_code=True`.")


def read(file: Path) -> dict:
    """A JSON file, {} where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

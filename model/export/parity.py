"""Is the exported folder the same model? It is opened by transformers, as a stranger would, and asked what our chat is asked.

In:  the folder, our model, the processor of our chat, conversations with pictures.
Out: a `Parity`: the largest difference of any logit, and the answers of both. Pictures go to transformers as PNG files.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from model.generate import generate
from model.registry import UserError
from model.vlm import VLM

OWN_CODE = {"trust_remote_code": True}  # the Python in the folder is this repository's, and was written a moment ago
TOLERANCE = 1e-4  # of a logit, in fp32
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Parity:
    """largest: difference of logits; ids: prompts with the same tokens; ours, theirs: answers to `questions` prompts."""

    largest: float
    ids: int
    ours: list[str]
    theirs: list[str]

    @property
    def equal(self) -> int:
        return sum(mine == other for mine, other in zip(self.ours, self.theirs))

    @property
    def exact(self) -> bool:
        return self.largest <= TOLERANCE and self.equal == self.ids == len(self.ours)

    def __str__(self) -> str:
        return (f"parity: largest difference of a logit {self.largest:.1e} (allowed {TOLERANCE:.0e}); of {len(self.ours)} "
                f"prompts {self.ids} with equal tokens, {self.equal} with equal greedy answers")


def require_transformers() -> None:
    """UserError where transformers is not installed."""
    try:
        import transformers  # noqa: F401  takes seconds, and only the check needs it
    except ImportError as error:
        raise UserError("transformers opens the folder to compare it, and is missing: pip install "
                        "'transformers>=5,<6'") from error


def reopened(folder: Path) -> tuple[Any, Any]:
    """(model, processor) of the folder by transformers; UserError where it knows other tensors than were written."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, __version__

    options: dict[str, Any] = {**OWN_CODE}
    options |= {"dtype": torch.float32, "output_loading_info": True}
    opened: Any = AutoModelForImageTextToText.from_pretrained(folder, **options)
    model, found = opened
    if wrong := {kind: sorted(names)[:4] for kind, names in found.items() if names}:
        raise UserError(f"transformers {__version__} does not know the tensors in {folder}: {wrong}. Install a newer one")
    return model.eval(), AutoProcessor.from_pretrained(folder, **OWN_CODE)  # type: ignore[arg-type]


@torch.inference_mode()
def compare(folder: Path, model: VLM, processor: Any, conversations: Iterable[Any], max_new_tokens: int = 48) -> Parity:
    """Both models read each prompt and answer it greedily. UserError where transformers finds other tensors than were written."""
    theirs, their_processor = reopened(folder)
    parity = Parity(0.0, 0, [], [])
    for conversation in conversations:
        document = processor.prompt(conversation)
        batch = processor.padded([document])
        logits = model(batch, batch["document_ids"] >= 0)  # (T, V)
        inputs = their_processor.apply_chat_template(
            as_messages(conversation), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        ids = inputs["input_ids"]
        parity.ids += ids[0].tolist() == document.input_ids
        if ids.shape[1] == len(document):
            parity.largest = max(parity.largest, (theirs(**inputs).logits[0] - logits).abs().max().item())
        (answer,) = generate(model, batch, max_new_tokens=max_new_tokens, temperature=0.0, **processor.sampling)
        parity.ours.append(processor.tokenizer.decode(answer.tokens))
        generated = theirs.generate(**inputs, max_new_tokens=max_new_tokens)[0, ids.shape[1]:]
        text = their_processor.decode(generated, skip_special_tokens=True)
        if BROKEN in text:  # half a character: sentencepiece writes one sign for it, tokenizers one for each of its bytes
            text = processor.tokenizer.decode([token for token in generated.tolist() if token not in processor.stop_ids])
        parity.theirs.append(text)
    return parity


def as_messages(conversation: Any) -> list[dict[str, Any]]:
    """A conversation in Hugging Face's form; pictures become what a PNG file holds."""
    def part_of(part: Any) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": str(part)}
        return {"type": "image", "image": through_png(part.load())}

    return [{"role": message.role, "content": list(map(part_of, message.parts))} for message in conversation.messages]


def through_png(image: Image.Image) -> Image.Image:
    """An image, written as a PNG file and read again."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(file)

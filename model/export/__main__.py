"""Export a checkpoint for transformers, and prove that it is the same model.

    python -m model.export out/grpo exported/       the folder; then a reload by transformers and the parity of logits and answers
    python -m model.export out/grpo words/ --gguf   the language model alone, for llama.cpp: words/grpo.gguf
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from model import checkpoint, cli
from model.export import gguf
from model.export.folder import write_folder
from model.export.parity import compare, require_transformers
from model.registry import TASKS, UserError
from model.runtime import Run

ROOT = Path(__file__).parents[2]
PROMPTS = 20  # to compare; of the embedded world, with one or more pictures


def chat_processor(folder: Path, model: Any) -> Any:
    """The processor of our chat (dataset/processor.py)."""
    chat = runpy.run_path(str(ROOT / "4-eval_chat.py"))  # the scripts alone know both packages, model and dataset
    tokenizer = chat["load_tokenizer"](checkpoint.tokenizer_file(folder))
    return chat["Processor"].of(model, tokenizer, Run.inference(folder, "cpu", "fp32", seed=0))


def conversations(model: Any) -> list[Any]:
    """Prompts with pictures, as different as possible: first one of each number of pictures and each kind of question."""
    examples = TASKS.make("world").examples("val", 4 * PROMPTS)
    seen: dict[tuple[int, str], int] = {}
    rank = []
    for example in examples:
        key = len(example.prompt.pictures), example.kind
        seen[key] = seen.get(key, 0) + 1
        rank.append(seen[key])
    order = sorted(range(len(examples)), key=lambda k: (rank[k], k))
    return [examples[k].prompt for k in order[:PROMPTS]]


def main(arguments: list[str]) -> None:
    names = [argument for argument in arguments if argument != "--gguf"]
    if len(names) != 2 or any(name.startswith("-") for name in names):
        raise UserError("python -m model.export CHECKPOINT FOLDER [--gguf], as in: python -m model.export out/grpo exported")
    source, folder = map(Path, names)
    model = checkpoint.load(source)
    processor = chat_processor(source, model)
    if "--gguf" in arguments:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{source.resolve().name}.gguf"
        print(f"wrote {file}: {gguf.write(file, model, processor)} tensors, each read back and equal. It sees no pictures")
        return
    write_folder(folder, model, processor, source)
    print(f"wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    require_transformers()
    parity = compare(folder, model, processor, conversations(model))
    print(parity)
    if not parity.exact:
        different = [f"{mine!r} != {other!r}" for mine, other in zip(parity.ours, parity.theirs) if mine != other]
        raise UserError(f"{folder} does not compute what {source} does: {'; '.join(different[:3]) or 'logits or tokens differ'}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

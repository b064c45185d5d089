"""Stage 4: talk to a model, let it answer a file, or measure it.

    python 4-eval_chat.py                                               chat; /image PATH shows a picture, /new starts again
    python 4-eval_chat.py --image cat.png dog.png --prompt "Which picture has a dog?"       one answer
    python 4-eval_chat.py --data rows.jsonl --save predictions.jsonl    one prediction a row, reasoning and answer apart
    python 4-eval_chat.py --data rows.jsonl --answers 8 --temperature 1      the same, and how often each row is solved
    python 4-eval_chat.py --bench world,easy_vqa                        test scores, with the blank and shuffled controls
    python 4-eval_chat.py --bench hallucination --best_of 8 --reference out/sft --temperature 0.7

In:  --model, or of out/grpo, out/dpo, out/sft and out/pretrain the first that is there, whenever it was made.
Out: what it says; scores.json beside the checkpoint, and out/report.md.
Best of N: what preference learning raised most, log pi(y) / pi_reference(y) a token, is said (dataset/feedback/best_of.py).
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.chat import Conversation, Message
from dataset.dialogue import Dialogue
from dataset.evaluation import Ask, add_scores, evaluate, several
from dataset.feedback.best_of import BestOf, Scorer
from dataset.formats.conversations import Source, image_values, load
from dataset.images import BadRow, Picture, from_file
from dataset.report import poster, section, sheet, table
from dataset.rewards import by_gold, rule
from dataset.tasks import Example
from dataset.tokenizer import Tokenizer, load_tokenizer
from dataset.vision.image_processor import Eyes
from model import checkpoint, cli
from model.generate import generate, prompt_room, stream
from model.losses import IGNORE, next_token_targets, token_logps
from model.registry import TASKS, TEMPLATES, specs
from model.runtime import Run
from model.vlm import VLM


@dataclass
class Config:
    model: Path | None = None  # a checkpoint; default: out/grpo, else out/dpo, else out/sft, else out/pretrain
    image: tuple[Path, ...] = ()  # pictures for the first message
    prompt: str = ""  # one message: answer it and stop
    data: Path | None = None  # a file of conversations to answer: json, jsonl or parquet
    image_folder: Path | None = None  # where its pictures are; default: beside the file
    allow_urls: bool = False  # let its rows fetch pictures from the network
    save: Path | None = None  # where the predictions go; default: predictions.jsonl beside the checkpoint
    answers: int = 1  # to each row of --data; of several its pass_rate is told, by which 3-rl_vlm.py --pass_rates takes rows
    bench: str = ""  # tasks to be scored on their test split, with commas between: world,easy_vqa,arithmetic,text
    examples: int = 0  # pictures' worth of questions a task; 0: its whole test set
    controls: int = 8  # ask every so-many-th question about a blank and a shuffled picture too; 0: no controls
    temperature: float = 0.0  # 0: always the likeliest token
    best_of: int = 1  # sample so many answers and say the one whose log-probability a token rose most above --reference
    reference: Path | None = None  # with --best_of: the checkpoint that preference learning started from, as out/sft
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    max_new_tokens: int = 256
    batch_size: int = 256  # prompts answered together, with --data and --bench
    feature_cache: Path = Path("out/features")  # features of the benchmarks' pictures, computed once
    seed: int = 0
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps


def main(config: Config) -> None:
    folder = checkpoint.require(config.model or checkpoint.latest())
    require_reference(config, folder)
    if config.answers != 1 and (config.answers < 1 or not config.data or config.temperature <= 0 or config.best_of > 1):
        raise SystemExit("--answers samples several to each row of --data: add --data and --temperature 1, leave out --best_of")
    run = Run.inference(folder, config.device, config.dtype, config.seed)
    model = checkpoint.load(folder, run.device)
    print(f"model: {folder}", file=sys.stderr)
    room = prompt_room(model, config.max_new_tokens)
    tokenizer = load_tokenizer(checkpoint.tokenizer_file(folder))
    template = TEMPLATES.make(model.config.template)
    sampling = dict(max_new_tokens=config.max_new_tokens, stop_ids={tokenizer.id(template.stop)}, temperature=config.temperature,
                    top_p=config.top_p, banned=(tokenizer.image, tokenizer.pad, tokenizer.bos))
    if config.data or config.bench or config.best_of > 1:
        eyes = Eyes(model.encoder, model.config.fit, model.config.tiles, run.device,
                    config.feature_cache if config.bench else None)
        ask = Ask(template, tokenizer, model.image_tokens, eyes,
                  run.generator(generate, model, **sampling), config.batch_size, progress=True)
        asked_alone = ask
        if config.best_of > 1:
            ask, folder = best_of(config, run, model, ask), folder.parent / f"{folder.name}-best_of_{config.best_of}"
        if config.bench:
            benchmark(config, folder, ask)
        if config.data:
            if not config.data.is_file():
                raise FileNotFoundError(f"--data takes one file of conversations; {config.data} is none")
            predict(load(config.data, config.image_folder, config.allow_urls, need_answer=False), ask,
                    lambda prompt: asked_alone.require_room(prompt, room), config.save or folder / "predictions.jsonl",
                    config.batch_size, config.answers)
        elif config.prompt and not config.bench:
            print(answer(config, ask))
        return
    chat(config, dialogue(run, model, tokenizer, sampling, room))


# ---------------------------------------------------------------- talking

def dialogue(run: Run, model: VLM, tokenizer: Tokenizer, sampling: dict, room: int) -> Dialogue:
    """A conversation with this model that remembers what was said and shown."""
    eyes = Eyes(model.encoder, model.config.fit, model.config.tiles, run.device, cache=None)
    return Dialogue(lambda batch: stream(model, run.to_device(batch), **sampling), eyes,
                    template=TEMPLATES.make(model.config.template), tokenizer=tokenizer, image_tokens=model.image_tokens,
                    max_length=room, views=eyes.views)


def chat(config: Config, talk: Dialogue) -> None:
    """Answer --prompt, or messages typed until the end of the input."""
    try:
        shown = [opened(path) for path in config.image]
        if config.prompt:
            say(talk, [*shown, config.prompt])
            return
    except BadRow as bad:
        raise SystemExit(f"{bad}") from bad
    print("Type a message. /image PATH shows a picture with the next message, /new starts again, /quit ends.")
    while (line := read_line()) is not None and line != "/quit":
        if line == "/new":
            talk.reset()
            shown = []
            continue
        try:
            if line.startswith("/image"):
                shown.append(opened(line.removeprefix("/image").strip()))
            elif line:
                say(talk, [*shown, line])
                shown = []
        except BadRow as bad:
            print(bad)


def opened(path: Path | str) -> Picture:
    """The picture in a file, which opens: else it would be told with every message that it is shown with. Raises BadRow."""
    try:
        picture = from_file(path)
        picture.load()
    except BadRow as bad:
        raise BadRow(bad.reason, "give the path of a picture") from bad
    return picture


def read_line() -> str | None:
    """A typed line, or None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


def say(talk: Dialogue, parts: list[Picture | str]) -> None:
    """Print an answer as it grows."""
    printed = ""
    for text in talk.say(parts):
        print(text[len(printed):], end="", flush=True)
        printed = text
    print()


# ---------------------------------------------------------------- the best of several answers

def require_reference(config: Config, folder: Path) -> None:
    """--best_of and its companions together, and a reference that reads and writes as the model does; SystemExit otherwise."""
    if config.best_of <= 1 and config.reference:
        raise SystemExit("--reference is for --best_of N: say how many answers to choose from")
    if config.best_of <= 1:
        return
    if not config.reference:
        raise SystemExit("--best_of compares with the checkpoint that preference learning started from: add --reference out/sft")
    if config.temperature <= 0:
        raise SystemExit("--best_of chooses among different answers, and at temperature 0 they are equal: add --temperature 0.7")
    if not (config.prompt or config.data or config.bench):
        raise SystemExit("--best_of answers --prompt, --data or --bench; a chat shows its one answer while it is written")
    checkpoint.require(config.reference)
    if config.reference.resolve() == folder.resolve():
        raise SystemExit(f"--reference {config.reference} is the model itself, which raised nothing: name another --model")
    writes = {"tokenizer": lambda path: checkpoint.tokenizer_file(path).read_bytes(),
              "template": lambda path: json.loads((path / "config.json").read_text(encoding="utf-8"))["template"]}
    for name, of in writes.items():
        if of(config.reference) != of(folder):
            raise SystemExit(f"--reference {config.reference} has another {name} than {folder}: their log-probabilities of an "
                             f"answer cannot be compared")


def best_of(config: Config, run: Run, model: VLM, ask: Ask) -> BestOf:
    """`ask` that samples --best_of answers to each prompt and gives the best."""
    reference = checkpoint.load(config.reference, run.device)
    eyes = Eyes(reference.encoder, reference.config.fit, reference.config.tiles, run.device,
                config.feature_cache if config.bench else None)

    def scorer(model: VLM, eyes: Eyes) -> Scorer:
        return Scorer(ask.template, ask.tokenizer, model.image_tokens, eyes, run.generator(answer_logps, model), ask.batch_size)

    return BestOf(ask, scorer(model, ask.eyes), scorer(reference, eyes), config.best_of)


def answer(config: Config, ask: Ask) -> str:
    """What is said to --prompt and --image."""
    try:
        return ask([Conversation("--prompt", (Message("user", (*map(opened, config.image), config.prompt)),))])[0]
    except BadRow as bad:
        raise SystemExit(f"{bad}") from bad


@torch.inference_mode()
def answer_logps(model: VLM, batch: dict) -> list[list[float]]:
    """Log-probabilities of the learned tokens of each document of a batch, in nats."""
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    learned = targets != IGNORE
    logps, documents = token_logps(model(batch, learned), targets[learned]), batch["document_ids"][learned]
    return [logps[documents == k].tolist() for k in range(len(batch["ids"]))]


# ---------------------------------------------------------------- answering a file

def predict(source: Source, ask: Ask, check: Callable[[Conversation], None], file: Path, batch_size: int, answers: int) -> None:
    """One line per row, in the MM-EUREKA format with `prediction`, and its reasoning and final answer apart.

    check     raises BadRow for a row that cannot be asked
    answers   to each row; of several all stand there, and `pass_rate`, the share that RL's rule calls right
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    answered = 0
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(source), batch_size):
            rows = list(range(start, min(start + batch_size, len(source))))
            for record in predictions(source, rows, ask, check, answers):
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                answered += "prediction" in record
    print(f"wrote {file}: {answered} predictions, {len(source) - answered} bad rows")


def predictions(source: Source, rows: list[int], ask: Ask, check: Callable[[Conversation], None],
                answers: int) -> Iterator[dict]:
    """The records of these rows; a bad row's record says why instead of what."""
    good: dict[int, Conversation] = {}
    errors: dict[int, str] = {}
    for row in rows:
        try:
            asked = source[row]
            check(asked)
            good[row] = asked
        except BadRow as bad:
            errors[row] = str(bad)
            print(f"skipped {bad}")
    said = dict(zip(good, several(ask, list(good.values()), answers), strict=True))
    for row in rows:
        if row in errors:
            yield {"id": f"{source.path}:{row + 1}", "error": errors[row]}
            continue
        raw, prompt, first = source.rows[row], good[row], said[row][0]
        reasoning = re.search(r"<think>(.*?)</think>", first, re.DOTALL)
        final = re.search(r"<answer>(.*?)</answer>", first, re.DOTALL)
        yield {"id": raw.get("id", prompt.id),
               "conversations": [{"role": message.role, "content": "".join(
                   part if isinstance(part, str) else "<image>" for part in message.parts)} for message in prompt.messages],
               "answer": prompt.answer or "", "image_urls": [value for value in image_values(raw) if isinstance(value, str)],
               "prediction": first, "reasoning": reasoning[1] if reasoning else "",
               "predicted_answer": final[1] if final else first, **(solved(prompt, said[row]) if answers > 1 else {})}


def solved(prompt: Conversation, said: list[str]) -> dict:
    """All answers to a row and the share of them that is right; no share where there is no right answer that can be checked."""
    try:
        right = [rule(by_gold)(Example(prompt, prompt.answer, "file"), text).accuracy for text in said]
    except ValueError:
        return {"predictions": said}
    return {"predictions": said, "pass_rate": sum(right) / len(right)}


# ---------------------------------------------------------------- measuring

def benchmark(config: Config, folder: Path, ask: Ask) -> None:
    """Score every task on its test split; numbers to scores.json, answers to predictions-TASK.jsonl, both to the report."""
    started, scores, page = time.time(), {}, folder.parent / "report.md"
    folder.mkdir(exist_ok=True)  # of best of N: its scores stand beside those of one answer, not in their place
    pictures = ""
    if len({spec.partition(":")[0] for spec in specs(config.bench)}) < len(specs(config.bench)):
        raise SystemExit(f"--bench {config.bench}: one variant of a task at a time, for its files bear its name")
    tasks = {spec.partition(":")[0]: TASKS.make(spec) for spec in specs(config.bench)}  # a wrong one fails before the scoring
    for name, task in tasks.items():
        began = time.time()
        new, rows = evaluate(name, task, "test", ask, config.examples or task.size, config.controls)
        new[f"{name}/seconds"] = round(time.time() - began, 1)
        scores.update(new)
        print(f"\n{table(new)}")
        with (folder / f"predictions-{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        shown = task.examples("test", 40)
        shown = random.Random(config.seed).sample(shown, min(24, len(shown)))
        said = ask([example.prompt for example in shown])
        drawn = poster(folder / f"{name}.png", page, shown, said)
        pictures += f"\n### {name}\n\n{drawn}{sheet(folder / name, page, shown, said)}\n"
    add_scores(folder, scores)
    section(page, f"Test scores of {folder.name}", f"{table(scores)}\n{pictures}")
    print(f"wrote {folder / 'scores.json'} and {page} in {time.time() - started:.0f} s. Next: python web_demo.py")


if __name__ == "__main__":
    cli.run(main, Config)

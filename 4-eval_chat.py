"""Stage 4: chat with a model, let it answer a file, or measure it.

    python 4-eval_chat.py                                               chat; /image PATH adds a picture, /help tells more
    python 4-eval_chat.py --image cat.png dog.png --prompt "Which picture has a dog?"       one answer
    python 4-eval_chat.py --video clip.mp4 --prompt "What happens?"     the same about frames of a video
    python 4-eval_chat.py --data rows.jsonl --save predictions.jsonl    one prediction per row, and the share of right ones
    python 4-eval_chat.py --data rows.jsonl --val_share 0.02            the same of the rows that training held out
    python 4-eval_chat.py --data rows.jsonl --samples 8 --temperature 1      the same, with the pass rate of each row
    python 4-eval_chat.py --bench world,easy_vqa                        test scores, with the blank and shuffled controls
    python 4-eval_chat.py --bench all                                   every benchmark whose files are there (dataset/README.md)
    python 4-eval_chat.py --bench world --model out/sft out/dpo         several checkpoints in one table, out/benchmarks.md
    torchrun --nproc_per_node 2 4-eval_chat.py --bench world            each process answers a share of the questions
    python 4-eval_chat.py --bench hallucination --best_of 8 --reference out/sft --temperature 0.7

In:  --model; by default the first that exists of out/grpo, out/dpo, out/sft and out/pretrain, whatever its age.
Out: answers; scores.json beside the checkpoint, and out/report.md.
Answers are kept as they come: after Ctrl-C or a crash, the same command goes on.
Best of N: the answer with the highest log pi(y) / pi_reference(y) per token (dataset/feedback/best_of.py).
"""

import contextlib
import io
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from model import cli


@dataclass
class Config:
    model: tuple[Path, ...] = ()  # a checkpoint, for --bench also several; default: out/grpo, else out/dpo, out/sft, out/pretrain
    image: tuple[Path, ...] = ()  # pictures for the first message
    video: tuple[str, ...] = ()  # videos for it, each as frames with their times: clip.mp4 (four), clip.mp4:frames=8
    prompt: str = ""  # one message; the script prints the answer and stops
    data: Path | None = None  # a file of conversations to answer: json, jsonl or parquet; scored where its rows hold answers
    val_share: float = 0.0  # answer only the rows of --data that training with this --val_share held out (its default is 0.02)
    image_folder: Path | None = None  # the folder of its pictures; default: that of the file
    allow_urls: bool = False  # allow its rows to download pictures
    save: Path | None = None  # the file for predictions; default: predictions.jsonl beside the checkpoint
    samples: cli.Count = 1  # answers per row of --data; several also give its pass_rate, which 3-rl_vlm.py --pass_rates reads
    bench: str = ""  # tasks to score on their test split, separated by commas: world,easy_vqa,arithmetic,text
    examples: cli.CountOrZero = 0  # pictures' worth of questions per task; 0: the full test set
    controls: cli.CountOrZero = 8  # repeat every n-th question with a blank and a shuffled picture; 0: no controls
    temperature: cli.PositiveOrZero = 0.0  # of sampling; 0: always the most likely token
    best_of: cli.Count = 1  # answers to sample; the one whose log-probability per token rose most above --reference is given
    reference: Path | None = None  # for --best_of: the checkpoint that preference learning started from, such as out/sft
    top_p: cli.PositiveShare = 1.0  # sample among the most likely tokens that together have this probability
    max_new_tokens: cli.Count = 256  # the longest answer, in tokens
    batch_size: cli.Count = 256  # prompts answered together, for --data and --bench
    feature_cache: Path = Path("out/features")  # folder for features of the benchmarks' pictures, computed once
    seed: cli.Seed = 0  # of sampling
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps


if __name__ == "__main__":  # before the imports below, which take seconds: --help and mistakes are answered at once
    config = cli.parse(Config)

import torch

from dataset.answers import Journal, answers
from dataset.bad_rows import BadRow
from dataset.benchmarks import benchmarks
from dataset.chat import Conversation, Message
from dataset.checkpoints import Checkpoints
from dataset.evaluation import Answerer, Asked
from dataset.feedback.best_of import AnswerScorer, BestOf
from dataset.held_out import indices
from dataset.images import Picture
from dataset.mixture import load_file
from dataset.predictions import Predictions
from dataset.processor import Processor
from dataset.report import add_scores, bench_page, bench_scores, table, write_rows
from dataset.score_table import write_table
from dataset.tasks import Task
from dataset.terminal import Chat, matches, opened, videos
from dataset.tokenizer import load_tokenizer
from dataset.writing import write_text
from model import checkpoint
from model.generate import generate, stream
from model.inspection import Inspector, beside
from model.losses import score
from model.registry import UserError
from model.run_data import file_fingerprint
from model.runtime import Run
from model.vlm import VLM


def main(config: Config) -> None:
    folders = [checkpoint.require(folder) for folder in config.model or (checkpoint.latest(),)]
    if len(folders) > 1 and (not config.bench or config.data or config.best_of > 1):
        raise UserError("--model takes several checkpoints for --bench alone: name one")
    check_flags(config, folders[0])
    run = Run.inference(folders[0], config.device, config.dtype, config.seed)
    if not (config.data or config.bench or config.best_of > 1):
        print(f"model: {folders[0]}", file=sys.stderr)
        chat(config, folders[0].resolve(), Checkpoints(beside(folders[0]), partial(Inspector, device=run.device), stream))
        return
    with contextlib.redirect_stdout(sys.stdout if run.is_main else io.StringIO()):  # the other processes answer, and are silent
        tasks = benchmarks(config.bench, config.examples)  # all are made first: a wrong name fails before any scoring
        for folder in folders:
            measure(config, run, folder, tasks)
        if len(folders) > 1 and run.is_main:
            print(f"wrote {write_table(folders, tasks)}")
        run.barrier()


def measure(config: Config, run: Run, folder: Path, tasks: dict[str, Task]) -> None:
    """What the flags ask for, of one checkpoint."""
    model, tokenizer = checkpoint.load(folder, run.device), load_tokenizer(checkpoint.tokenizer_file(folder))
    print(f"model: {folder}", file=sys.stderr if run.is_main else io.StringIO())
    processor = Processor.of(model, tokenizer, run, config.feature_cache if config.bench else None)
    longest_prompt = processor.max_prompt_tokens(config.max_new_tokens)  # tokens
    sampling = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                    **processor.sampling)
    one_answer = Answerer(processor, run.generator(generate, model, **sampling), config.batch_size)
    answerer = best_of(config, run, model, one_answer) if config.best_of > 1 else one_answer
    # The scores of best of N do not replace those of one answer.
    scores = folder.parent / f"{folder.name}-best_of_{config.best_of}" if config.best_of > 1 else folder
    journal = Journal(scores, what_decides(config, run, folder), run, config.batch_size // config.samples // config.best_of or 1,
                      config.seed)
    if config.bench:
        def answer(prompts: list[Conversation], kept: Journal) -> list[str]:
            processor.images.prepare(picture for prompt in prompts for picture in prompt.pictures)
            return answers(kept, answerer, prompts)

        benchmark(config, journal, answer, tasks)
    if config.data:
        source = load_file(config.data, config.image_folder, config.allow_urls, need_answer=False)
        rows, file = indices(source, config.val_share, config.image_folder), config.save or scores / "predictions.jsonl"
        predictions = Predictions(source, rows, answerer, processor, longest_prompt, config.samples)
        results = predictions.results(journal.of(file, data=file_fingerprint(config.data)))
        if run.is_main:
            predictions.write(results, file)
            predictions.report(results, config.data.name + ("-held_out" if config.val_share else ""), scores)
            journal.of(file).clear()
    elif config.prompt and not config.bench:
        print(answer_once(config, answerer))


def what_decides(config: Config, run: Run, folder: Path) -> dict[str, Any]:
    """All that answers depend on, beside the questions."""
    models = [folder, *([config.reference] if config.reference else [])]
    return {"models": list(map(checkpoint.fingerprint, models)), "computed in": f"{run.dtype} on {run.device.type}",
            "flags": [config.temperature, config.top_p, config.max_new_tokens, config.batch_size, config.samples, config.best_of,
                      config.seed]}


def check_flags(config: Config, folder: Path) -> None:
    """UserError for flags that contradict each other, or for a reference with another tokenizer or template than the model."""
    if config.samples != 1 and (config.samples < 1 or not config.data or config.temperature <= 0 or config.best_of > 1):
        raise UserError("--samples answers each row of --data several times: add --data and --temperature 1, leave out --best_of")
    if config.data and not config.data.is_file():
        raise FileNotFoundError(f"--data takes one file of conversations; {config.data} is not a file")
    if config.image_folder and not config.image_folder.is_dir():
        raise FileNotFoundError(f"--image_folder: no folder {config.image_folder}")
    if config.best_of <= 1:
        if config.reference:
            raise UserError("--reference is for --best_of N: say how many answers to choose from")
        return
    if not config.reference:
        raise UserError("--best_of compares with the checkpoint that preference learning started from: add --reference out/sft")
    if config.temperature <= 0:
        raise UserError("--best_of chooses among different answers, and at temperature 0 they are equal: add --temperature 0.7")
    if not (config.prompt or config.data or config.bench):
        raise UserError("--best_of answers --prompt, --data or --bench; a chat prints its only answer while it is generated")
    require_comparable(config.reference, folder)


def require_comparable(reference: Path, folder: Path) -> None:
    """UserError where the reference is the model itself, or has another tokenizer or template."""
    checkpoint.require(reference)
    if reference.resolve() == folder.resolve():
        raise UserError(f"--reference {reference} is the model itself, so all its rewards are 0: name another --model")
    must_equal = {"tokenizer": lambda path: checkpoint.tokenizer_file(path).read_bytes(),
                  "template": lambda path: json.loads((path / "config.json").read_text(encoding="utf-8"))["template"]}
    for name, part in must_equal.items():
        if part(reference) != part(folder):
            raise UserError(f"--reference {reference} has another {name} than {folder}: their log-probabilities of an answer "
                            f"cannot be compared")


# ---------------------------------------------------------------- chat

def chat(config: Config, folder: Path, checkpoints: Checkpoints) -> None:
    """Answer --prompt, or messages typed until the end of the input."""
    talks = {name: partial(checkpoints.dialogue, name, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                           top_p=config.top_p) for name in checkpoints.folders}
    try:
        talk = Chat(talks[folder.name](), shown(config), talks, partial(checkpoints.trained, folder.name))
        if config.prompt:
            talk.say(config.prompt)
            return
    except BadRow as bad:
        raise UserError(f"{bad}") from bad
    talk.run()


def shown(config: Config) -> list[str | Picture]:
    """What --image and --video show."""
    pictures = opened(file for path in config.image for file in matches(str(path)))
    return [*pictures, *videos(file for path in config.video for file in matches(path))]


def answer_once(config: Config, answer: Answerer | BestOf) -> str:
    """The answer to --prompt, --image and --video."""
    try:
        return answer([Conversation("--prompt", (Message("user", (*shown(config), config.prompt)),))])[0]
    except BadRow as bad:
        raise UserError(f"{bad}") from bad


# ---------------------------------------------------------------- best of N

def best_of(config: Config, run: Run, model: VLM, answerer: Answerer) -> BestOf:
    """A function that samples --best_of answers to each prompt and returns the best; each process works alone."""
    reference = checkpoint.load(config.reference or Path(), run.device)
    processor = Processor.of(reference, answerer.processor.tokenizer, run, config.feature_cache if config.bench else None)
    alone = replace(answerer, processor=answerer.processor.on_one_rank())
    aligned = AnswerScorer(alone.processor, run.generator(answer_logps, model), config.batch_size)
    scorer = AnswerScorer(processor.on_one_rank(), run.generator(answer_logps, reference), config.batch_size)
    return BestOf(alone, aligned, scorer, config.best_of)


@torch.inference_mode()
def answer_logps(model: VLM, batch: dict) -> list[list[float]]:
    """Log-probabilities of the learned tokens of each document of a batch, in nats."""
    scores = score(model, batch)
    return [scores.logps[scores.owner == k].tolist() for k in range(len(batch["ids"]))]


# ---------------------------------------------------------------- benchmarks

def benchmark(config: Config, journal: Journal, answer: Callable[[list[Conversation], Journal], list[str]],
              tasks: dict[str, Task]) -> None:
    """Score every task on its test split: numbers to scores.json, answers to predictions-TASK.jsonl, both to the report.

    journal   beside the checkpoint; a quick look (--examples) has one of its own for each task
    answer    prompts and a journal -> answers; the first process alone scores them
    """
    started, folder = time.monotonic(), journal.file
    page = folder.parent / "report.md"
    folder.mkdir(exist_ok=True)
    for name, task in tasks.items():
        task_started, file = time.monotonic(), folder / f"predictions-{name}.jsonl"
        asked = Asked.of(name, task, "test", config.examples or task.size, controls=config.controls)
        kept = journal.of(folder / f"quick-{name}.jsonl" if config.examples else file)
        said = answer(asked.prompts, kept)
        if journal.ranks.rank > 0:
            continue
        new, rows = asked.scored(said)
        new[f"{name}/seconds"] = round(time.monotonic() - task_started, 1)
        print(f"\n{table(new)}")
        if config.examples and (fuller := bench_scores(folder).get(f"{name}/n", 0)) > len(rows):
            print(f"not stored: {folder / 'scores.json'} and {page} keep {name} on {fuller:g} questions; without --examples it "
                  f"is replaced")
        else:
            write_rows(file, rows)
            add_scores(folder, new, name)  # before anything is drawn
            for upload, answered in task.submission(rows).items():
                write_text(folder / upload, json.dumps(answered, ensure_ascii=False))
                print(f"wrote {folder / upload}")
            answered_questions = list(zip(asked.examples, said))
            bench_page(folder, name, task, random.Random(config.seed).sample(answered_questions, min(24, len(rows))))
        if not any(new.get(f"{name}/{failed}") for failed in ("judge_failures", "trust_failures")):
            kept.clear()  # else the same command asks the judge again, and not the model
    print(f"wrote {folder / 'scores.json'} and {page} in {time.monotonic() - started:.0f} s. "
          f"Next: python web_demo.py --model {config.model[0] if config.model else checkpoint.latest()}")


if __name__ == "__main__":
    cli.run(main, config)

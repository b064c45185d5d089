"""Stage 4: chat with a model, let it answer a file, or measure it.

    python 4-eval_chat.py                                               chat; /image PATH adds a picture, /help tells more
    python 4-eval_chat.py --image cat.png dog.png --prompt "Which picture has a dog?"       one answer
    python 4-eval_chat.py --data rows.jsonl --save predictions.jsonl    one prediction per row, and the share of right ones
    python 4-eval_chat.py --data rows.jsonl --val_share 0.02            the same of the rows that training held out
    python 4-eval_chat.py --data rows.jsonl --samples 8 --temperature 1      the same, with the pass rate of each row
    python 4-eval_chat.py --bench world,easy_vqa                        test scores, with the blank and shuffled controls
    python 4-eval_chat.py --bench all                                   every benchmark whose files are there (dataset/README.md)
    python 4-eval_chat.py --bench hallucination --best_of 8 --reference out/sft --temperature 0.7

In:  --model; by default the first that exists of out/grpo, out/dpo, out/sft and out/pretrain, whatever its age.
Out: answers; scores.json beside the checkpoint, and out/report.md.
Best of N: the answer with the highest log pi(y) / pi_reference(y) per token (dataset/feedback/best_of.py).
"""

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model import cli


@dataclass
class Config:
    model: Path | None = None  # a checkpoint; default: out/grpo, else out/dpo, else out/sft, else out/pretrain
    image: tuple[Path, ...] = ()  # pictures for the first message
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

from dataset.bad_rows import BadRow
from dataset.benchmarks import benchmarks
from dataset.chat import Conversation, Message
from dataset.dialogue import Dialogue
from dataset.evaluation import Answer, Answerer, evaluate
from dataset.feedback.best_of import AnswerScorer, BestOf
from dataset.formats.files import FileSource
from dataset.held_out import indices
from dataset.mixture import load_file
from dataset.own_rows import OwnRows, Verdicts, as_example, final_answer
from dataset.processor import Processor
from dataset.report import add_scores, bench_scores, poster, section, sheet, subsections, table
from dataset.rewards import answer_reward, matches_gold
from dataset.tasks import Example
from dataset.terminal import Chat, matches, opened
from dataset.tokenizer import load_tokenizer
from model import checkpoint
from model.generate import generate, stream
from model.losses import score
from model.registry import UserError
from model.runtime import Run
from model.vlm import VLM


def main(config: Config) -> None:
    folder = checkpoint.require(config.model or checkpoint.latest())
    check_flags(config, folder)
    run = Run.inference(folder, config.device, config.dtype, config.seed)
    model, tokenizer = checkpoint.load(folder, run.device), load_tokenizer(checkpoint.tokenizer_file(folder))
    print(f"model: {folder}", file=sys.stderr)
    processor = Processor.of(model, tokenizer, run, config.feature_cache if config.bench else None)
    longest_prompt = processor.max_prompt_tokens(config.max_new_tokens)  # tokens
    sampling = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                    **processor.sampling)
    if not (config.data or config.bench or config.best_of > 1):
        chat(config, Dialogue(lambda batch: stream(model, run.to_device(batch), **sampling), processor, longest_prompt))
        return
    answerer = Answerer(processor, run.generator(generate, model, **sampling), config.batch_size, progress=True)
    answer: Answer = answerer
    if config.best_of > 1:
        answer, folder = best_of(config, run, model, answerer), folder.parent / f"{folder.name}-best_of_{config.best_of}"
    if config.bench:
        benchmark(config, folder, answer)
    if config.data:
        source = load_file(config.data, config.image_folder, config.allow_urls, need_answer=False)
        rows = indices(source, config.val_share, config.image_folder)
        predictions = Predictions(source, rows, answer, processor, longest_prompt, config.samples)
        predictions.write(config.save or folder / "predictions.jsonl", config.batch_size)
        predictions.report(config.data.name + ("-held_out" if config.val_share else ""), folder)
    elif config.prompt and not config.bench:
        print(answer_once(config, answer))


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

def chat(config: Config, dialogue: Dialogue) -> None:
    """Answer --prompt, or messages typed until the end of the input."""
    try:
        talk = Chat(dialogue, opened(file for path in config.image for file in matches(str(path))))
        if config.prompt:
            talk.say(config.prompt)
            return
    except BadRow as bad:
        raise UserError(f"{bad}") from bad
    talk.run()


def answer_once(config: Config, answer: Answer) -> str:
    """The answer to --prompt and --image."""
    try:
        pictures = opened(file for path in config.image for file in matches(str(path)))
        return answer([Conversation("--prompt", (Message("user", (*pictures, config.prompt)),))])[0]
    except BadRow as bad:
        raise UserError(f"{bad}") from bad


# ---------------------------------------------------------------- best of N

def best_of(config: Config, run: Run, model: VLM, answerer: Answerer) -> BestOf:
    """A function that samples --best_of answers to each prompt and returns the best."""
    reference = checkpoint.load(config.reference or Path(), run.device)
    processor = Processor.of(reference, answerer.processor.tokenizer, run, config.feature_cache if config.bench else None)
    aligned = AnswerScorer(answerer.processor, run.generator(answer_logps, model), config.batch_size)
    return BestOf(answerer, aligned, AnswerScorer(processor, run.generator(answer_logps, reference), config.batch_size),
                  config.best_of)


@torch.inference_mode()
def answer_logps(model: VLM, batch: dict) -> list[list[float]]:
    """Log-probabilities of the learned tokens of each document of a batch, in nats."""
    scores = score(model, batch)
    return [scores.logps[scores.owner == k].tolist() for k in range(len(batch["ids"]))]


# ---------------------------------------------------------------- predictions for a file

@dataclass
class Predictions:
    """Answers to the rows of a file, one line each, in the MM-EUREKA format with `prediction` and its reasoning and final answer.

    max_prompt_tokens   the longest prompt that leaves space for an answer
    samples             answers to each row; several are all saved, with `pass_rate`, the share that RL's rule calls right
    """

    source: FileSource
    rows: Sequence[int]
    answer: Answer
    processor: Processor
    max_prompt_tokens: int
    samples: int
    verdicts: Verdicts = field(default_factory=Verdicts)

    def write(self, file: Path, batch_size: int) -> None:
        """Write all rows, `batch_size` of them answered together. The line of a bad row holds the error."""
        file.parent.mkdir(parents=True, exist_ok=True)
        answered, started = 0, time.time()
        with file.open("w", encoding="utf-8") as out:
            for start in range(0, len(self.rows), batch_size):
                for record in self.records(self.rows[start:start + batch_size]):
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    answered += "prediction" in record
        print(f"wrote {file}: {answered} predictions, {len(self.rows) - answered} bad rows, in {time.time() - started:.0f} s")

    def report(self, name: str, folder: Path) -> None:
        """Print the scores of the rows that hold answers; they go to scores.json, and with some answers to the report."""
        scores, page = self.verdicts.scores(name), folder.parent / "report.md"
        if not scores:
            print(f"{self.source.path} holds no answers, so its rows are not scored")
            return
        print(f"\n{table(scores)}")
        folder.mkdir(exist_ok=True)
        add_scores(folder, scores)
        examples, answers = zip(*self.verdicts.shown)
        rows = sheet(folder / name, page, [(OwnRows(examples), example) for example in examples], {"answer": answers})
        section(page, f"{name}, answered by {folder.name}", f"{table(scores)}\n\n{rows}")
        print(f"accuracy: the final answer is right by the rule of RL, with or without <think>...</think><answer>...</answer>; "
              f"format: the share with it. They are in {folder / 'scores.json'} and {page}")

    def records(self, rows: Sequence[int]) -> Iterator[dict]:
        """The lines of these rows."""
        prompts: dict[int, Conversation] = {}
        errors: dict[int, str] = {}
        for row in rows:
            try:
                prompt = self.source[row]
                self.processor.require_answerable(prompt, self.max_prompt_tokens)
                prompts[row] = prompt
            except BadRow as bad:
                errors[row] = str(bad)
                print(f"skipped {bad}")
        answers = iter(self.answer([prompt for prompt in prompts.values() for _ in range(self.samples)]))
        for row in rows:
            if row in errors:
                yield {"id": f"{self.source.path}:{row + 1}", "error": errors[row]}
            else:
                yield self.record(self.source.rows[row], prompts[row], [next(answers) for _ in range(self.samples)])

    def record(self, raw: dict, prompt: Conversation, answers: list[str]) -> dict:
        """The line of one row, whose answers are scored where it holds the right one."""
        example = as_example(prompt)
        self.verdicts.add(example, answers)
        reasoning = re.search(r"<think>(.*?)</think>", answers[0], re.DOTALL)
        return {"id": raw.get("id", prompt.id),
                "conversations": [{"role": message.role, "content": "".join(part if isinstance(part, str) else "<image>"
                                                                            for part in message.parts)}
                                  for message in example.prompt.messages],
                "answer": example.answer, "image_urls": [picture.address for picture in prompt.pictures],
                "prediction": answers[0], "reasoning": reasoning[1] if reasoning else "",
                "predicted_answer": final_answer(answers[0]), **(solved(example, answers) if self.samples > 1 else {})}


def solved(example: Example, answers: list[str]) -> dict:
    """All answers to a row, and the share of right ones where the row has a gold answer that can be checked."""
    reward = answer_reward(matches_gold)
    try:
        right = [reward(example, text).accuracy for text in answers]
    except ValueError:
        return {"predictions": answers}
    return {"predictions": answers, "pass_rate": sum(right) / len(right)}


# ---------------------------------------------------------------- benchmarks

def benchmark(config: Config, folder: Path, answer: Answer) -> None:
    """Score every task on its test split: numbers to scores.json, answers to predictions-TASK.jsonl, both to the report."""
    started, page, title = time.time(), folder.parent / "report.md", f"Test scores of {folder.name}"
    folder.mkdir(exist_ok=True)  # best of N has a folder of its own, so its scores do not replace those of one answer
    for name, task in benchmarks(config.bench).items():  # all tasks are made first: a wrong name fails before any scoring
        task_started = time.time()
        new, rows = evaluate(name, task, "test", answer, config.examples or task.size, controls=config.controls)
        new[f"{name}/seconds"] = round(time.time() - task_started, 1)
        print(f"\n{table(new)}")
        if config.examples and (fuller := bench_scores(folder).get(f"{name}/n", 0)) > len(rows):
            print(f"not stored: {folder / 'scores.json'} and {page} keep {name} on {fuller:g} questions; without --examples it "
                  f"is replaced")
            continue
        with (folder / f"predictions-{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        add_scores(folder, new)  # before anything is drawn
        for upload, answered in task.submission(rows).items():
            (folder / upload).write_text(json.dumps(answered, ensure_ascii=False), encoding="utf-8")
            print(f"wrote {folder / upload}")
        examples = task.examples("test", min(40, config.examples or 40))
        examples = random.Random(config.seed).sample(examples, min(24, len(examples)))
        answers, questions = answer([example.prompt for example in examples]), [(task, example) for example in examples]
        image = poster(folder / f"{name}.png", page, questions, answers)
        parts = {**subsections(page, title), name: f"{image}{sheet(folder / name, page, questions, {'answer': answers})}"}
        section(page, title, "\n\n".join([table(bench_scores(folder)), *(f"### {part}\n\n{parts[part]}" for part in parts)]))
    print(f"wrote {folder / 'scores.json'} and {page} in {time.time() - started:.0f} s. "
          f"Next: python web_demo.py --model {config.model or checkpoint.latest()}")


if __name__ == "__main__":
    cli.run(main, config)

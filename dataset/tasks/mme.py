"""MME (arXiv 2306.13394): 14 abilities, each tested by pictures with one question to say yes to and one to say no to.

    python 4-eval_chat.py --bench mme:path=benchmarks/mme

path   the folder of the release (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation), with a folder
       for each ability: existence, count, ..., code_reasoning, in it, in MME_Benchmark or in MME_Benchmark_release_version

An ability scores 100 x accuracy + 100 x accuracy+, where accuracy+ is the share of pictures with both answers right.
perception: the sum over ten abilities, at most 2000, "MME" in the tables of LLaVA and TinyLLaVA. cognition: over four, at most
800. Always yes scores 500 and 200, a coin 750 and 300. The parser is the official one: yes or no among the first four
characters. `unparsed`: answers with neither, which are wrong; `yes`: the share of yes among the answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from dataset.formats.official import Folder, first_picture, text
from dataset.images import Picture
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.vqa_score import SHORT
from model.registry import TASKS, UserError

SOURCE = "the release of github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation)"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(answer: str) -> str | None:
    """yes or no, as MME's calculation.py reads an answer; None for what it calls "other"."""
    start = answer.replace("\t", " ").replace("\n", " ").lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def questions(file: Path) -> list[tuple[str, str]]:
    """The two (question, yes or no) of a picture. UserError for another number, or another answer."""
    lines = [line for line in text(file).split("\n") if line.strip()]
    pairs = [tuple(part.strip() for part in line.rsplit("\t", 1)) for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 or pair[1].lower() not in ("yes", "no") for pair in pairs):
        raise UserError(f"{file}: two lines, each a question, a tab and Yes or No, are expected: download MME again")
    return [(pair[0], pair[1].lower()) for pair in pairs]


@TASKS.register("mme")
class MME(Task):
    """MME from its official folders: perception and cognition, accuracy and accuracy+ of each ability."""

    size = 1_187  # pictures, with two questions each

    def __init__(self, path: str = ""):
        self.folder = Folder("mme", path, SOURCE)

    def pictures(self, ability: str) -> Iterator[tuple[str, Picture, Path]]:
        """(ability, picture, its file of questions), in the order of names."""
        names = [f"{above}{ability}" for above in ("", "MME_Benchmark_release_version/", "MME_Benchmark/",
                                                   "MME_Benchmark_release_version/MME_Benchmark/")]  # fmt: skip
        folder = self.folder.file(*names)
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        images = folder / "images" if (folder / "images").is_dir() else folder
        if not (files := sorted(texts.glob("*.txt"))):
            raise FileNotFoundError(f"mme: {texts} has no *.txt with questions: it wants {ability} of {SOURCE}")
        for file in files:
            missing = f"mme: {images} has no {file.stem}.jpg or .png for {file}: it is one of {SOURCE}"
            yield ability, first_picture([images / f"{file.stem}.{end}" for end in ("jpg", "png")], missing), file

    def examples(self, split: str, n: int) -> list[Example]:
        """The two questions about each of n pictures, the abilities in turns; a tag tells the picture."""
        turns = zip_longest(*(list(self.pictures(ability)) for ability in (*PERCEPTION, *COGNITION)))
        examples = []
        for ability, image, file in [one for turn in turns for one in turn if one][:n]:
            for k, (question, answer) in enumerate(questions(file)):
                asked = re.sub(r"\s*Please answer yes or no\.$", "", question) + SHORT
                prompt = dialogue(f"mme/{ability}/{file.stem}/{k}", [image], [(asked, "")])
                examples.append(Example(prompt, answer, ability, (file.stem,)))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return float(mme_answer(answer) == example.answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """perception and cognition, where all their abilities were asked; yes, unparsed; three metrics of each ability.

        A picture's two questions are found by its name, not by their order.
        """
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        right: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for example, score in zip(examples, scores):
            right[example.kind][example.tags[0]].append(score)
        parts: dict[str, float] = {}
        for ability in (*PERCEPTION, *COGNITION):
            if pairs := list(right[ability].values()):
                accuracy = sum(map(sum, pairs)) / sum(map(len, pairs))
                plus = sum(pair == [1, 1] for pair in pairs) / len(pairs)
                parts[f"score_{ability}"] = 100 * accuracy + 100 * plus
                parts |= {f"accuracy_{ability}": accuracy, f"accuracy_plus_{ability}": plus}
        sums = {name: sum(parts[f"score_{ability}"] for ability in abilities)
                for name, abilities in (("perception", PERCEPTION), ("cognition", COGNITION))
                if all(f"score_{ability}" in parts for ability in abilities)}  # fmt: skip
        given = [mme_answer(answer) for answer in answers]
        return scores, {**sums, "yes": given.count("yes") / len(given), "unparsed": given.count(None) / len(given), **parts}

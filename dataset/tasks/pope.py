"""POPE (arXiv 2305.10355): is this object in the picture? Three sets of 3,000 questions about the same 500 pictures of COCO.

    python 4-eval_chat.py --bench pope:path=benchmarks/pope

path     a folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of
         github.com/RUCAIBox/POPE (output/coco), in it or in its folder coco
images   COCO's val2014; default: val2014 in that folder

f1 (LLaVA's "POPE") and accuracy (TinyLLaVA's) are means over the three sets. The parser is the official one: an answer whose
first sentence has the word no or not is a no, and every other one a yes, even an empty one. So beside it: `yes`, the share of
yes among the answers; `unparsed`, answers that do not begin with yes or no; strict_accuracy, in which those are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from dataset.formats.official import Folder, checked, of_first, rows
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.chair import binary, yes_or_no
from dataset.tasks.vqa_score import SHORT
from model.registry import TASKS, UserError

SOURCE = "github.com/RUCAIBox/POPE (output/coco)"
SETS = ("random", "popular", "adversarial")


def pope_answer(answer: str) -> str:
    """yes or no, as POPE's evaluate.py reads an answer."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@TASKS.register("pope")
class POPE(Task):
    """POPE from its official files: F1 and accuracy, means over random, popular and adversarial."""

    size = 500  # pictures, with six questions each in every set

    def __init__(self, path: str = "", images: str = ""):
        self.folder = Folder("pope", path, SOURCE, images)

    def examples(self, split: str, n: int) -> list[Example]:
        """The questions of all three sets; an id has the set, because the sets count from 1 each."""
        examples = []
        for kind in SETS:
            name = f"coco_pope_{kind}.json"
            file = self.folder.file(name, f"coco/{name}")
            fields = {"question_id": int, "image": str, "text": str, "label": str}
            listed = checked(rows(file), fields, file, f"{name} of {SOURCE}")
            for row in of_first(listed, lambda row: row["image"], n):
                if row["label"] not in ("yes", "no"):
                    raise UserError(f"{file}: question {row['question_id']}: the label is {row['label']!r}, neither yes nor no")
                image = self.folder.picture([row["image"]], ["val2014", "coco/val2014", ""], "COCO's val2014 (cocodataset.org)")
                prompt = dialogue(f"pope/{kind}/{row['question_id']}", [image], [(row["text"] + SHORT, "")])
                examples.append(Example(prompt, row["label"], kind))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return float(pope_answer(answer) == example.answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """f1 and accuracy: means over the sets; yes, unparsed, strict_accuracy of all; accuracy ... yes of each set."""
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        sets: dict[str, dict[str, float]] = {}
        for kind in SETS:
            pairs = [(pope_answer(answer), example.answer) for example, answer in zip(examples, answers) if example.kind == kind]
            if pairs:
                sets[kind] = binary([given for given, _ in pairs], [truth for _, truth in pairs], "yes")
        strict = [yes_or_no(answer) for answer in answers]
        return scores, {
            "f1": sum(values["f1"] for values in sets.values()) / len(sets),
            "accuracy": sum(values["accuracy"] for values in sets.values()) / len(sets),
            "yes": sum(pope_answer(answer) == "yes" for answer in answers) / len(answers),
            "unparsed": strict.count(None) / len(strict),
            "strict_accuracy": sum(given == example.answer for given, example in zip(strict, examples)) / len(strict),
            **{f"{kind}_{name}": value for kind, values in sets.items() for name, value in values.items() if name != "unparsed"},
        }

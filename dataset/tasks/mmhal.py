"""MMHal-Bench (arXiv 2309.14525): 96 questions in eight types, each answer rated from 0 to 6 by a judge.

    python 4-eval_chat.py --bench mmhal:path=response_template.json,images=mmhal_images,judge=http://localhost:8000/v1,model=NAME

path      response_template.json of huggingface.co/datasets/Shengcao1006/MMHal-Bench, in its order
images    its pictures, named as in `image_src` (7206072054_c53d53b97d_o.jpg), or IMAGE_ID.jpg
judge, model, key    address, name and the key's environment variable of the judge; without a judge answers are only saved

score = mean rating.  hallucination_rate = share of ratings below 3.  Rows cycle through the eight types. The paper's judge was
GPT-4 of 2023 with its own prompt: scores of another judge, or of this prompt, do not compare with the paper's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataset.formats.official import checked, existing, picture, rows
from dataset.judge import Failure, failures, judge_or_none, message
from dataset.tasks import Example, Task, dialogue
from model.registry import TASKS

SOURCE = "response_template.json of huggingface.co/datasets/Shengcao1006/MMHal-Bench"
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
JUDGE = """You rate the answer of a vision-language model. You do not see the picture, but you are told what is in it and how a
person answered the same question.

An answer hallucinates when it states something about the picture that neither the list of contents, nor the person's answer,
nor plain reasoning from them supports: an object, number, colour, place, action or text that is not there. General knowledge
and cautious inference are no hallucination, and neither is admitting doubt. The list and the person's answer may be incomplete,
so do not punish a detail only because they leave it out when it agrees with them. An answer that accepts a false assumption
in the question hallucinates.

First explain in a few sentences what is wrong or right. Then end with one line, the rating:
Rating: 6 - very informative, with good reasoning, no hallucination
Rating: 5 - very informative, no hallucination
Rating: 4 - somewhat informative, no hallucination
Rating: 3 - not informative, no hallucination
Rating: 2 - very informative, with hallucination
Rating: 1 - somewhat informative, with hallucination
Rating: 0 - not informative, with hallucination
Write the word "Rating:" once only.

Contents of the picture: {contents}
Question: {question}
Answer of a person: {reference}
Answer to rate: {answer}"""


def rating(reply: str | Failure) -> int | Failure:
    """The rating in a reply. A `Failure`, not a zero, for none, several different ones, or an invalid one."""
    if isinstance(reply, Failure):
        return reply
    ratings = set(re.findall(r"rating\W*(\d+)", reply.lower()))
    if len(ratings) != 1 or not ratings <= set("0123456"):
        return Failure(f"{len(ratings)} ratings {sorted(ratings)} in {reply[-80:]!r}")
    return int(ratings.pop())


def summary(ratings: Sequence[int | Failure], types: Sequence[str]) -> dict[str, float]:
    """score (0 to 6), hallucination_rate and the score of each type, over the judged answers."""
    judged = [(mark, kind) for mark, kind in zip(ratings, types, strict=True) if not isinstance(mark, Failure)]
    if not judged:
        return {}
    groups = {kind: [mark for mark, other in judged if other == kind] for kind in TYPES}
    return {
        "score": sum(mark for mark, _ in judged) / len(judged),
        "hallucination_rate": sum(mark < 3 for mark, _ in judged) / len(judged),
        **{f"score_{kind}": sum(marks) / len(marks) for kind, marks in groups.items() if marks},
    }


@TASKS.register("mmhal")
class MMHal(Task):
    """MMHal-Bench from its official file: 96 questions, rated 0 to 6 by a judge."""

    size = 96

    def __init__(self, path: str = "", images: str = "", judge: str = "", model: str = "gpt-4o", key: str = "OPENAI_API_KEY"):
        self.path, self.images = path, images
        self.judge = judge_or_none("mmhal", judge, model, key)

    def examples(self, split: str, n: int) -> list[Example]:
        file = existing(self.path, "path", SOURCE)
        fields = {"image_src": str, "image_id": str, "question": str, "gt_answer": str, "image_content": [str]}
        examples = []
        for i, row in enumerate(checked(rows(file), fields, file, SOURCE)[:n]):
            names = [row["image_src"].rpartition("/")[2], f"{row['image_id']}.jpg"]
            image = picture(row, names, self.images, f"the pictures of MMHal-Bench; this one is {row['image_src']}")
            prompt = dialogue(f"mmhal/{i}", [image], [(row["question"], "")])
            examples.append(Example(prompt, row["gt_answer"], TYPES[i % len(TYPES)], (", ".join(row["image_content"]),)))
        return examples

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float | None], dict[str, float]]:
        """score (0 to 6), hallucination_rate and score by type, over the judged answers; counts judged, judge_failures.

        The score of one answer is its rating / 6; None where it was not judged.
        """
        if self.judge is None:
            return [None] * len(answers), {"judged": 0}
        prompts = [JUDGE.format(contents=e.tags[0], question=e.prompt.messages[-1].text, reference=e.answer, answer=a)
                 for e, a in zip(examples, answers, strict=True)]  # fmt: skip
        ratings = [rating(reply) for reply in self.judge.ask([[message(text)] for text in prompts], rating)]
        failed = failures("mmhal", ratings, [example.prompt.id for example in examples])
        scores = [None if isinstance(mark, Failure) else mark / 6 for mark in ratings]
        return scores, {**summary(ratings, [example.kind for example in examples]),
                        "judged": len(ratings) - failed, "judge_failures": failed}  # fmt: skip

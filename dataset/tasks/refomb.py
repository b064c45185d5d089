"""RefoMB (arXiv 2405.17220): a judge compares each answer with GPT-4V's, knowing a dense description of the picture.

    python 4-eval_chat.py --bench refomb:path=RefoMB_gpt4v_dev.jsonl,images=refomb_images,judge=http://localhost:8000/v1,model=NAME

path      RefoMB_gpt4v_dev.jsonl of github.com/RLHF-V/RLAIF-V (eval/data): the 99 questions with GPT-4V's answers
images    its pictures, named as at the end of `image_url`
swap      true: every pair is judged in both orders and the two verdicts are averaged; judges like the first, or the longer.
          The original asks once, with GPT-4V first
judge, model, key    address, name and key's environment variable of the judge; without one the answers are only saved

win_rate = (wins + ties / 2) / judged pairs.  trust_rate: the same, from a second question to the judge: which answer
hallucinates less, by its own review. The original's judge was gpt-4-1106-preview with its own prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataset.formats.official import existing, picture, rows
from dataset.judge import Failure, Judge, failures, judge_or_none, message
from dataset.tasks import Example, Task, dialogue, means
from model.registry import TASKS, UserError

SOURCE = "RefoMB_gpt4v_dev.jsonl of github.com/RLHF-V/RLAIF-V (eval/data)"
COMPARE = """Two vision-language models, A and B, answered a question about a picture. You do not see the picture; the description
below says everything that is in it. Decide which answer is better.

Trustworthiness comes first: go through each answer statement by statement and list what contradicts the description or is not
in it: wrong or invented objects, numbers, colours, positions, text, people, actions, kind or mood of the picture. Where the
question asks for something creative, invention that serves it is allowed. Then weigh helpfulness: does the answer give the user
what was asked for, clearly and to the point? Neither length nor the order in which the answers stand is a merit.

Write down the hallucinations of A, those of B, how many each has, then which is more helpful, and end with one verdict:
[[A]] if A is better, [[B]] if B is better, [[C]] if they are equally good.

[Description]
{description}
[Question]
{question}
[Answer of A]
{first}
[Answer of B]
{second}
[End]"""
TRUST = """Below is a review that compares the answers of two models, A and B. From the review alone, count the hallucinations
that it finds in each. End with one verdict: [[A]] if A has fewer, [[B]] if B has fewer, [[C]] if they have equally many or none.

[Review]
{review}
[End]"""


def verdict(reply: str | Failure, ours: str) -> float | Failure:
    """1 where the reply prefers `ours` (A or B), 0 for the other, 0.5 for a tie; no verdict or two different ones: a failure."""
    if isinstance(reply, Failure):
        return reply
    found = set(re.findall(r"\[\[([ABC])\]\]", reply))
    if len(found) != 1:
        return Failure(f"{len(found)} verdicts in {reply[-80:]!r}")
    said = found.pop()
    return 0.5 if said == "C" else float(said == ours)


def both(*points: float | Failure) -> float | Failure:
    """The mean of the verdicts on one pair; a failure where one of them is."""
    bad = [point for point in points if isinstance(point, Failure)]
    good = [point for point in points if not isinstance(point, Failure)]
    return bad[0] if bad else sum(good) / len(good)


def compared(judge: Judge, examples: Sequence[Example], answers: Sequence[str], ours: str) -> tuple[list, list]:
    """(which is better, which is more trustworthy) for every pair, our answer standing at A or B."""
    asked = []
    for example, answer in zip(examples, answers, strict=True):
        first, second = (answer, example.answer) if ours == "A" else (example.answer, answer)
        question = example.prompt.messages[-1].text
        asked.append(COMPARE.format(description=example.tags[0], question=question, first=first, second=second))
    reviews = judge.ask([[message(text)] for text in asked])
    there = [k for k, review in enumerate(reviews) if not isinstance(review, Failure)]
    replies = judge.ask([[message(TRUST.format(review=reviews[k]))] for k in there])
    trust = {k: verdict(reply, ours) for k, reply in zip(there, replies)}
    return [verdict(review, ours) for review in reviews], [trust.get(k, review) for k, review in enumerate(reviews)]


@TASKS.register("refomb")
class RefoMB(Task):
    """RefoMB from its official file: wins and trustworthiness against GPT-4V's answers, by a judge."""

    size = 99

    def __init__(self, path: str = "", images: str = "", swap: bool = False, judge: str = "", model: str = "gpt-4o",
                 key: str = "OPENAI_API_KEY"):  # fmt: skip
        self.path, self.images, self.swap = path, images, swap
        self.judge = judge_or_none("refomb", judge, model, key)

    def examples(self, split: str, n: int) -> list[Example]:
        found = []
        for row in rows(existing(self.path, "path", SOURCE))[:n]:
            if not row["answer"].strip():
                raise UserError(f"path={self.path}: row {row['id']} has no answer to compare with: it wants {SOURCE}")
            names = [row["image_url"].rpartition("/")[2]]
            shown = picture(row, names, self.images, f"the pictures of RefoMB; this one is {row['image_url']}")
            prompt = dialogue(f"refomb/{row['id']}", [shown], [(row["question"], "")])
            found.append(Example(prompt, row["answer"], row["type"], (row["description"],)))
        return found

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float | None], dict[str, float]]:
        """win_rate and trust_rate over the pairs that were judged, win_rate by type; judged, judge_failures."""
        if self.judge is None:
            return [None] * len(answers), {"judged": 0}
        orders = [compared(self.judge, examples, answers, ours) for ours in ("BA" if self.swap else "B")]
        wins = [both(*points) for points in zip(*(order[0] for order in orders))]
        trust = [both(*points) for points in zip(*(order[1] for order in orders))]
        failed = failures("refomb", wins)
        failed_trust = failures("refomb, trustworthiness", trust)
        good = [(example, point) for example, point in zip(examples, wins) if not isinstance(point, Failure)]
        sure = [point for point in trust if not isinstance(point, Failure)]
        metrics: dict[str, float] = {"judged": len(good), "judge_failures": failed, "trust_failures": failed_trust}
        if good:
            metrics["win_rate"] = sum(point for _, point in good) / len(good)
            judged, points = [example for example, _ in good], [point for _, point in good]
            metrics.update(means(judged, points, lambda example: [f"win_rate_{example.kind.lower().replace(' ', '_')}"]))
        if sure:
            metrics["trust_rate"] = sum(sure) / len(sure)
        return [None if isinstance(point, Failure) else point for point in wins], metrics

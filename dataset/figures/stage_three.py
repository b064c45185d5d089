"""Stage 3 by one example: a group of answers with rewards and advantages, and a preference pair with its log-probabilities.

In:  the checkpoint of a run, and the one that it began with.  Out: the same prompt before and after training.
"""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from dataset.chat import Conversation, Preference
from dataset.evaluation import make_tasks
from dataset.figures.row import WIDE, title
from dataset.figures.stage import BAD, GOOD, INK, READ, CannotDraw, Stage, Trained, blank, canvas, chinese_font
from dataset.preferences import OwnPreferences, load_preferences
from dataset.report import fonts, wrapped
from dataset.rewards import RewardFunction, answer_reward
from dataset.tasks import Example, Truncated
from model.registry import PREFERENCE_LOSSES

GROUP = 8  # answers to a problem
PROBLEMS = 6  # asked together; shown is the one whose answers differ most in reward
Item = TypeVar("Item")
Answers = list[tuple[str, float]]  # (text, reward) of each answer of a group


def readable(found: Sequence[tuple[str, Item]]) -> list[Item]:
    """The items of (text, item) in English; where there are none, those that the system's fonts can write."""
    english = [item for text, item in found if text.isascii()]
    return english or [item for _, item in found if chinese_font()]


def lines(text: str, width: float, most: int) -> str:
    """A text, broken at a width in inches for letters of nine points; an ellipsis where it goes on."""
    latin, chinese = fonts(9)
    return "\n".join(wrapped(text, chinese if chinese and not text.isascii() else latin, int(width * 66), most))


def show_prompt(axis: Any, prompt: Conversation, top: float) -> None:
    """The picture of a prompt, and its question below it."""
    axis.imshow(prompt.pictures[0].load(), extent=(0.1, 1.7, top + 1.6, top), interpolation="nearest", aspect="auto")
    axis.text(0.1, top + 1.68, lines(prompt.messages[-1].text, 1.6, 5), va="top", fontsize=9)


# ---------------------------------------------------------------- rules: a group


def rewarded(trained: Trained, examples: Sequence[Example], reward: RewardFunction, flags: dict) -> list[Answers]:
    """GROUP answers to each question, sampled as the run samples them, each with its reward."""
    processor = trained.processor
    batch = processor.padded([processor.prompt(example.prompt) for example in examples])
    found = trained.inspector.sample(batch, GROUP, temperature=flags.get("temperature", 1.0),
                                     max_new_tokens=flags.get("max_new_tokens", 128), **processor.sampling)
    texts = [(str if answer.stopped else Truncated)(processor.tokenizer.decode(answer.tokens)) for answer in found]
    groups = [texts[k:k + GROUP] for k in range(0, len(texts), GROUP)]
    return [[(text, reward(example, text).total) for text in group] for example, group in zip(examples, groups, strict=True)]


def group(stage: Stage) -> Figure:
    """Answers to a held-out problem before training, of which some are right and some wrong, and to the same problem after it."""
    task = next(iter(make_tasks(stage.flags.get("bench") or "arithmetic").values()))
    reward = answer_reward(task.score, task.reward)
    examples = readable([(example.prompt.messages[-1].text, example) for example in task.examples("val", 40)
                         if len(example.prompt.pictures) == 1])
    if not examples:
        raise CannotDraw("its first task asks no question about one picture in words that the system's fonts can write")
    for start in range(0, min(2 * PROBLEMS, len(examples)), PROBLEMS):  # a model that is never wrong has no such group
        part = examples[start:start + PROBLEMS]
        groups = rewarded(stage.before(), part, reward, stage.flags)
        example, before = max(zip(part, groups), key=lambda one: statistics.pvariance([value for _, value in one[1]]))
        if len({value for _, value in before}) > 1:
            return draw_group(example, {"before": before, "after": rewarded(stage.trained(), [example], reward, stage.flags)[0]})
    raise CannotDraw(f"the model of {stage.start} gave no group of {GROUP} answers that differ in reward")


def draw_group(example: Example, groups: dict[str, Answers]) -> Figure:
    """Two tables of answers, best first, beside the picture."""
    height = 0.75 + 2 * (0.5 + 0.26 * GROUP)
    figure = blank(WIDE, height)
    axis = canvas(figure)
    title(axis, f"One problem, {GROUP} answers: what is better than its group becomes likelier")
    show_prompt(axis, example.prompt, 0.75)
    axis.text(0.1, 3.6, f"right: {example.answer}\n\nreward: 1 if right,\n  and 0.1 for the form\n\nadvantage: reward minus\n"
                        "  the mean of the group", va="top", fontsize=9)
    y = 0.78
    for when, answers in groups.items():
        mean = sum(value for _, value in answers) / len(answers)
        axis.text(1.95, y, f"{when} training: mean reward {mean:.2f}", fontweight="bold", va="center")
        for x, name in ((7.45, "reward"), (8.75, "advantage")):
            axis.text(x, y, name, ha="right", va="center", fontsize=9)
        for text, value in sorted(answers, key=lambda answer: -answer[1]):
            y += 0.26
            advantage = value - mean
            colour = INK if abs(advantage) < 1e-6 else GOOD if advantage > 0 else BAD
            axis.text(1.95, y, lines(text, 4.9, 1), va="center", fontsize=8.5)
            axis.text(7.45, y, f"{value:.1f}", ha="right", va="center", fontsize=9)
            axis.text(8.75, y, f"{advantage:+.2f}" if colour != INK else "0", ha="right", va="center", color=colour, fontsize=9,
                      fontweight="bold")
        y += 0.5
    axis.set(xlim=(0, WIDE), ylim=(height, 0), aspect="auto")
    return figure


# ---------------------------------------------------------------- preferences: a pair


def preferences(stage: Stage, most: int = 24) -> list[Preference]:
    """The first pairs with one picture that the run learned from, its own or those of --data."""
    if stage.flags.get("pairs", "stored") != "stored":
        raise CannotDraw("its pairs were sampled in every step and are not stored")
    if data := stage.flags.get("data"):
        source = load_preferences(str(data[0]).partition(":")[0], stage.flags.get("image_folder"))
    else:
        files = sorted(stage.folder.glob("feedback/*/pairs.jsonl"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise CannotDraw(f"no pairs in {stage.folder}/feedback")
        source = OwnPreferences(files[-1])
    found = (source[index] for index in range(min(4 * most, len(source))))
    fitting = readable([(pair.prompt.messages[-1].text + pair.chosen + pair.rejected, pair) for pair in found
                        if len(pair.pictures) == 1])[:most]
    if not fitting:
        raise CannotDraw("none of its first pairs has one picture and words that the system's fonts can write")
    return fitting


def pair(stage: Stage) -> Figure:
    """The pair whose margin after training is the median of the first ones: neither the best nor the worst."""
    found = preferences(stage)
    beta = PREFERENCE_LOSSES.make(stage.flags.get("algo") or "dpo").beta
    logps = []
    for trained in (stage.before(), stage.trained()):
        batch = trained.processor.pair_batch([trained.processor.pair(one, 10_000) for one in found])
        logps.append(trained.inspector.answer_logps(batch)[0].view(-1, 2))
    before, after = logps  # (pairs, 2) each: chosen, rejected
    rewards = beta * (after - before)
    middle = int((rewards[:, 0] - rewards[:, 1]).argsort()[len(found) // 2])
    return draw_pair(found[middle], before[middle], after[middle], beta)


def draw_pair(preference: Preference, before: torch.Tensor, after: torch.Tensor, beta: float) -> Figure:
    """Both answers with their log-probabilities as arrows on one axis, and the numbers of DPO's loss."""
    height = 3.95
    figure = blank(WIDE, height)
    axis = canvas(figure)
    title(axis, "One preference pair: how likely is each answer, before and after training?")
    show_prompt(axis, preference.prompt, 0.7)
    rewards = (beta * (after - before)).tolist()
    low, high = min(before.min(), after.min()).item(), max(before.max(), after.max()).item()
    for k, (name, text, colour) in enumerate((("chosen", preference.chosen, GOOD), ("rejected", preference.rejected, BAD))):
        top, old, new = 0.8 + 1.3 * k, float(before[k]), float(after[k])
        axis.text(1.95, top, name, fontweight="bold", va="center", color=colour)
        axis.text(8.85, top, f"reward = beta (after - before) = {beta:g} x {new - old:.2f} = {rewards[k]:+.3f}", ha="right",
                  va="center", fontsize=9)
        axis.text(1.95, top + 0.15, lines(text, 6.8, 2), va="top", fontsize=9)
        then, now = (3.1 + 4.6 * (value - low) / max(high - low, 1e-3) for value in (old, new))  # inches
        arrow(axis, then, now, top + 0.68, colour)
        sides = ("right", "left") if now >= then else ("left", "right")
        axis.text(then, top + 0.9, f"before {old:.1f}", ha=sides[0], va="center", fontsize=9)
        axis.text(now, top + 0.9, f"after {new:.1f}", ha=sides[1], va="center", fontsize=9, color=colour)
    margin = rewards[0] - rewards[1]
    loss = -torch.nn.functional.logsigmoid(torch.tensor(margin)).item()
    axis.text(1.95, 3.35, f"log p of the whole answer, in nats.   margin = reward(chosen) - reward(rejected) = {margin:+.3f}\n"
                          f"-log sigmoid(margin), DPO's loss: before 0.693, after {loss:.3f}", va="top", fontsize=9.5)
    axis.set(xlim=(0, WIDE), ylim=(height, 0), aspect="auto")
    return figure


def arrow(axis: Any, then: float, now: float, y: float, colour: str) -> None:
    """An arrow between two places of a line, from a dot at the first."""
    axis.plot((1.95, 8.85), (y, y), color=READ, alpha=0.4, linewidth=1)
    axis.annotate("", (now, y), (then, y), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=2.5))
    axis.plot(then, y, "o", color=READ, markersize=7)

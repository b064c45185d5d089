"""Rollouts: the policy answers problems of which the right answer is known, several times each, and every answer is judged.

In:  problems, a `sample` function (a padded batch of prompts -> G answers to each), a judge.
Out: an `Update`: groups of G answers that differ in reward, with what the log tells of them; `batches`, what is learned of
     them, or `pairs`, the best and the worst answer of each group.

    prompt 1   8   8   9   8      rewards 1.1 1.1 0.1 1.1    learned: what made the third one worse than the others?
    prompt 2   3   3   3   3      rewards 1.1 1.1 1.1 1.1    dropped: no answer is better than another, all advantages are 0
    prompt 3   5   7   4   6      rewards 0.1 0.1 0.1 0.1    dropped, and two prompts more are asked in their place

Everything is a function of the seed and the number of the prompt in the stream, whatever the number of processes: chunks of
prompts are sampled with random numbers of their own, shared out over the ranks, and every rank gets to know all of them.
"""
from __future__ import annotations

import dataclasses
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.chat import Conversation, Document, Template, render_prompt
from dataset.collate import Look, collate, pad
from dataset.formats.conversations import BadRows, load, name_and_weight
from dataset.formats.pass_rates import by_pass_rate
from dataset.images import BadRow, Picture
from dataset.preferences import Pair, join
from dataset.rewards import Judge, Reward, by_gold, gold, rule
from dataset.tasks import Cut, Example
from dataset.vision.image_processor import Eyes
from model.registry import TASKS

Sample = Callable[..., list]  # (prompts, generator=...) -> G answers to each, all those of the first prompt first
Check = Callable[[Conversation], None]
Weighed = Callable[[list[dict], torch.Tensor, torch.Tensor], list[dict]]  # micro-batches, rewards (P, G), lengths (P, G)

# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Problem:
    """A question with its right answer, and who judges."""

    example: Example
    judge: Judge

    @property
    def prompt(self) -> Conversation:
        return self.example.prompt


def of_task(task, count: int, judge: Judge | None) -> list[Problem]:
    """`count` pictures' worth of the train split, after the rows that stage 2 learned from (`rows`, where the task has it).

    ValueError for a task that gives a right answer in the right form nothing: its score does not read <answer>...</answer>.
    """
    learned = getattr(task, "rows", 0)
    examples = task.examples("train", learned + count)[learned:]
    if examples and not judge and task.score(examples[0], f"<think>.</think><answer>{examples[0].answer}</answer>") < 1:
        raise ValueError(f"the score of {type(task).__name__} does not look for the final answer in <answer>...</answer>, so no "
                         f"answer could be right: give a --reward my_file.py:function, or let its score look there")
    judge = judge or rule(task.score, getattr(task, "reward", None))
    return [Problem(example, judge) for example in examples]


def of_rows(source, count: int, judge: Judge | None, bad_rows: BadRows, report: bool = True,
            check: Check = lambda prompt: None) -> list[Problem]:
    """The first `count` rows of conversations with a gold answer; an assistant's last turn is left out.

    A row without a gold answer, or with one that nothing could match, and one that `check` refuses, is a bad row, now and not in
    the middle of training. `report`: whether to name it.
    """
    found = []
    for k in range(min(count, len(source))):
        bad_rows.seen += 1
        try:
            row = source[k]
            gold(row.answer)
            messages = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
            prompt = dataclasses.replace(row, messages=messages, answer=None)
            check(prompt)
        except BadRow as bad:
            bad_rows.add(bad, report)
            continue
        except ValueError as error:
            bad_rows.add(BadRow(str(error), "every row of RL data has an answer that can be checked", row.id), report)
            continue
        found.append(Problem(Example(prompt, row.answer, "file"), judge or rule(by_gold)))
    return found


def problems(specs: Sequence[str], count: int, judge: Judge | None, *, image_folder: Path | None, allow_urls: bool,
             bad_rows: Path | None, max_bad: float, pass_rates: tuple[float, float] = (0.0, 1.0), report: bool = True,
             check: Check = lambda prompt: None) -> list[Problem]:
    """All that `--data` names, tasks and files, the first `count` of each (times its weight, "arithmetic:0.5").

    ValueError if that is none.

    judge       in place of the task's own score and of the comparison with the gold answer
    report      whether bad rows are named, and written to `bad_rows` where that is a file
    check       raises BadRow for a prompt that cannot be asked
    pass_rates  of files: only rows whose own pass rate, where they tell one, lies between these two
    """
    found = []
    for spec in specs:
        name, weight = name_and_weight(spec)
        if name.partition(":")[0] in TASKS.names():
            found += of_task(TASKS.make(name), round(weight * count), judge)
        else:
            source = load(name, image_folder, allow_urls, need_answer=False)
            if pass_rates != (0.0, 1.0):
                source = by_pass_rate(source, *pass_rates)
            found += of_rows(source, round(weight * count), judge, BadRows(bad_rows, len(source), max_bad), report, check)
    if not found:
        raise ValueError(f"no problem in {', '.join(specs)}: give --data a task or a file with answers, and --problems above 0")
    return found


# ---------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Rollout:
    """One answer to a problem, as it will be learned.

    document   prompt, answer, and the stop token where the policy ended by itself; one beginning; only what it sampled is learned
    logps      of each learned token, in nats, under the distribution that it was drawn from
    text       the answer; a `Cut` where the limit on its length ended it
    """

    document: Document
    logps: list[float]
    text: str
    reward: Reward

    @property
    def stopped(self) -> bool:
        return not isinstance(self.text, Cut)

    def __len__(self) -> int:
        return len(self.logps)


@dataclass(frozen=True)
class Group:
    """All answers to one problem."""

    problem: Problem
    rollouts: list[Rollout]

    @property
    def differs(self) -> bool:
        """Whether one answer is better than another: else there is nothing to learn."""
        return len({rollout.reward.total for rollout in self.rollouts}) > 1


def as_rollout(prompt: Document, stop: int, tokens: list[int], logps: list[float], stopped: bool, text: str,
               reward: Reward) -> Rollout:
    """The prompt's tokens and those that were sampled, without encoding anything again: text could be cut into other tokens.

    <s>  <|user|>  image image  3 + 5 ?  <|assistant|>  <think> ... </answer>  <|end|>
     .      .        .     .    .  .  .       .            x     x      x         x        x learned, . only read
    An answer that did not end by itself learns no end.
    """
    said = [*tokens, stop] if stopped else tokens
    if len(said) != len(logps):
        raise ValueError(f"{len(said)} tokens have {len(logps)} log-probabilities ({prompt.id})")
    document = Document(prompt.id, prompt.input_ids + said, [False] * len(prompt) + [True] * len(said), prompt.pictures)
    return Rollout(document, logps, (str if stopped else Cut)(text), reward)


@dataclass(frozen=True)
class Update:
    """What one update learns from.

    groups     P at most; where no group differs at all, those of the first round, whose advantages are 0
    position   prompts of the stream that have been asked, to go on from
    facts      for the log, about all answers, those of dropped groups too
    """

    groups: list[Group]
    position: int
    facts: dict[str, float]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    def rewards(self) -> torch.Tensor:
        """(P, G)."""
        return torch.tensor([[rollout.reward.total for rollout in group.rollouts] for group in self.groups])

    def lengths(self) -> torch.Tensor:
        """(P, G): learned tokens."""
        return torch.tensor([[len(rollout) for rollout in group.rollouts] for group in self.groups])


@dataclass
class Rollouts:
    """An endless stream of problems, asked by the update: `rollouts.update(position)`.

    sample      (padded prompts, generator=...) -> answers with `.tokens`, `.logps`, `.stopped`; it never gives a placeholder,
                padding or a beginning, which would make the next forward another one
    prompts     P, groups that an update is to learn from; `answers` to each
    rounds      how often prompts are asked in the place of groups without any difference; with `keep_all` none is dropped
    chunk       prompts that are sampled together
    union       the dicts of all ranks -> one
    """

    problems: Sequence[Problem]
    sample: Sample
    template: Template
    tokenizer: object
    image_tokens: int
    eyes: Eyes
    device: torch.device
    prompts: int
    answers: int
    chunk: int
    seed: int
    rounds: int = 3
    keep_all: bool = False
    rank: int = 0
    world: int = 1
    union: Callable[[dict], dict] = dict

    def __post_init__(self):
        if self.answers < 2:
            raise ValueError("--answers is at least 2: an answer is good or bad beside others to the same problem")
        self.order: tuple[int, list[int]] = (-1, [])

    def problem(self, number: int) -> Problem:
        """Problem `number` of the stream: all of them in a new order every time round."""
        turn, place = divmod(number, len(self.problems))
        if self.order[0] != turn:
            order = list(range(len(self.problems)))
            random.Random(f"rollouts/{self.seed}/{turn}").shuffle(order)
            self.order = turn, order
        return self.problems[self.order[1][place]]

    def pictures(self, updates: int) -> list[Picture]:
        """What so many updates will show if no group is dropped."""
        asked = min(updates * self.prompts, len(self.problems))
        return [picture for number in range(asked) for picture in self.problem(number).prompt.pictures]

    def update(self, position: int) -> Update:
        """Ask P problems from a position of the stream on, and others in place of those that teach nothing."""
        kept: list[Group] = []
        asked: list[Group] = []
        for _ in range(1 + (0 if self.keep_all else self.rounds)):
            wanted = self.prompts - len(kept)
            new = self.ask(position, wanted)
            position, asked = position + wanted, asked + new
            kept += [group for group in new if self.keep_all or group.differs]
            if len(kept) == self.prompts:
                break
        facts = {**told(asked), "groups": len(kept), "asked": len(asked)}
        return Update(kept or asked[:self.prompts], position, facts)

    def ask(self, position: int, count: int) -> list[Group]:
        """G answers to each of `count` problems, judged. Each rank samples its share of the chunks."""
        asked = [self.problem(number) for number in range(position, position + count)]
        self.eyes.prepare(picture for problem in asked for picture in problem.prompt.pictures)
        prompts = [render_prompt(problem.prompt, self.template, self.tokenizer, self.image_tokens, views=self.eyes.views)
                   for problem in asked]
        mine: dict[int, list[tuple]] = {}
        for start in range(self.rank * self.chunk, count, self.world * self.chunk):
            part = slice(start, start + self.chunk)
            mine.update(enumerate(self.sampled(position + start, asked[part], prompts[part]), start))
        found = self.union(mine)
        stop = self.tokenizer.id(self.template.stop)
        return [Group(problem, [as_rollout(prompt, stop, *answer) for answer in found[k]])
                for k, (problem, prompt) in enumerate(zip(asked, prompts, strict=True))]

    def sampled(self, number: int, asked: Sequence[Problem], prompts: Sequence[Document]) -> list[list[tuple]]:
        """(tokens, log-probabilities, stopped, text, reward) of every answer to a chunk that begins with problem `number`."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"rollouts/{self.seed}/{number}".encode()))
        answers = self.sample(pad(list(prompts), self.eyes, self.tokenizer.pad), generator=generator)
        if len(answers) != self.answers * len(asked):
            raise ValueError(f"{len(asked)} prompts got {len(answers)} answers, not {self.answers} each")
        found: list[list[tuple]] = []
        for k, problem in enumerate(asked):
            group = []
            for answer in answers[k * self.answers:(k + 1) * self.answers]:
                text = (str if answer.stopped else Cut)(self.tokenizer.decode(answer.tokens))
                group.append((answer.tokens, answer.logps, answer.stopped, str(text), problem.judge(problem.example, text)))
            found.append(group)
        return found

    # ------------------------------------------------------------ where the batches of a step come from

    def batches(self, position: int, size: int, passes: int, weighed: Weighed) -> Iterator[tuple]:
        """For ever: (position to go on from, this rank's micro-batches of a step, their learned tokens, facts for the log).

        An update's are given out `passes` times. `weighed` puts into them what each token counts.
        """
        while True:
            update = self.update(position)
            position, found = update.position, micro_batches(update.rollouts, self.eyes, size, self.rank, self.world)
            found = weighed(found, update.rewards(), update.lengths())
            for _ in range(passes):
                yield position, found, sum(len(batch["places"]) for batch in found), update.facts

    def pairs(self, position: int, size: int, compared: Callable[[dict], dict]) -> Iterator[tuple]:
        """The same of pairs, the best and the worst answer of each group; `compared` puts in what the reference thinks."""
        in_vain = 0
        while True:
            update = self.update(position)
            position, pairs = update.position, best_and_worst(update.groups)
            if len(pairs) < self.world:  # no two answers differ: ask on
                in_vain += 1
                if in_vain == LONG:
                    raise RuntimeError(f"{LONG} times in a row no answer to any of {update.facts['asked']} problems was better "
                                       f"than another: {advice([update.facts] * LONG, 0.0) or TOO_FEW}")
                continue
            in_vain = 0
            parts = [[pairs[k] for k in places] for places in shares(len(pairs), size, self.rank, self.world)]
            yield (position, [compared(join(part, self.eyes)) for part in parts], sum(map(len, parts)),
                   {f"policy_{name}": value for name, value in update.facts.items()})


def told(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers, and over groups, for the log; no length of right or wrong answers where there are none."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = {"right": [len(rollout) for rollout in rollouts if rollout.reward.accuracy == 1],
               "wrong": [len(rollout) for rollout in rollouts if rollout.reward.accuracy < 1]}
    shares = [sum(rollout.reward.accuracy == 1 for rollout in group.rollouts) / len(group.rollouts) for group in groups]
    return {
        "reward": mean([rollout.reward.total for rollout in rollouts]),
        "accuracy": mean([rollout.reward.accuracy for rollout in rollouts]),
        "format": mean([rollout.reward.format for rollout in rollouts]),
        "all_right": mean([share == 1 for share in shares]), "all_wrong": mean([share == 0 for share in shares]),
        "alike": mean([not group.differs for group in groups]),
        **{f"length_{name}": mean(found) for name, found in lengths.items() if found},
        "truncated": mean([not rollout.stopped for rollout in rollouts]),
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- what is learned


def micro_batches(rollouts: Sequence[Rollout], look: Look, size: int, rank: int, world: int) -> list[dict]:
    """This rank's micro-batches of at most `size` answers, equally many on every rank.

    Flat as `collate` makes them, and for the K learned tokens in their order: `rollout_logps (K,)`, and `places (K,)`, which of
    the rollouts each belongs to.
    """
    batches = []
    for places in shares(len(rollouts), size, rank, world):
        chosen = [rollouts[k] for k in places]
        lengths = torch.tensor([len(rollout) for rollout in chosen])
        batches.append({**collate([rollout.document for rollout in chosen], look),
                        "rollout_logps": torch.tensor([logp for rollout in chosen for logp in rollout.logps]),
                        "places": torch.repeat_interleave(torch.from_numpy(places), lengths)})
    return batches


def shares(count: int, size: int, rank: int, world: int) -> list[np.ndarray]:
    """Places 0..count-1 in parts of at most `size`, equally many parts on every rank; ValueError for fewer places than ranks.

    One place more than `size` stands in a part where there are too few for one part more on every rank. The parts do not depend
    on the data, so every rank knows those of all others without asking.
    """
    if count < world:
        raise ValueError(f"{count} answers cannot be shared out over {world} processes: raise --prompts")
    each = min(count // world, math.ceil(count / (size * world)))
    return np.array_split(np.arange(count), each * world)[rank::world]


def best_and_worst(groups: Sequence[Group]) -> list[Pair]:
    """A preference pair of each group that differs: its best answer and its worst one, the first of equals."""
    pairs = []
    for group in groups:
        if group.differs:
            ordered = sorted(group.rollouts, key=lambda rollout: -rollout.reward.total)
            pairs.append(Pair(ordered[0].document, ordered[-1].document))
    return pairs


# ---------------------------------------------------------------- when to stop


LONG = 20  # updates
TOO_FEW = "raise --answers or --prompts"


def advice(history: Sequence[dict], entropy_floor: float, updates: int = LONG) -> str | None:
    """Why there is no point in going on, and what to do, by the log of the last updates; None as long as there is a point.

    Groups whose answers are paid differently teach, also where a reward of one's own calls none of them right, or all.
    """
    rows = [{name.removeprefix("policy_"): value for name, value in row.items()} for row in history]
    rows = [row for row in rows if "all_wrong" in row][-updates:]
    if len(rows) < updates:
        return None
    share = {name: mean([row.get(name, math.inf) for row in rows]) for name in ("all_wrong", "all_right", "alike", "entropy")}
    if min(share["all_wrong"], share["alike"]) > 0.8:
        return (f"{share['all_wrong']:.0%} of the groups hold no right answer: RL makes likelier what is already said at times. "
                f"Fine-tune longer on such problems (2-sft_vlm.py), or begin with easier ones")
    if min(share["all_right"], share["alike"]) > 0.8:
        return f"{share['all_right']:.0%} of the groups are all right: there is little left to learn here. Take harder problems"
    if share["entropy"] < entropy_floor:
        return (f"the entropy is {share['entropy']:.2g} nats a token: all answers to a problem are the same, and nothing new is "
                f"tried. Lower --lr, raise --clip_high, or fine-tune for fewer steps before")
    return None

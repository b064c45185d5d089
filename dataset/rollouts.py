"""Rollouts: the policy answers problems of which the right answer is known, several times each, and a rule rewards every answer.

In:  problems, and a policy that generates answers.
Out: a `RolloutBatch`: groups of G answers that differ in reward, with statistics for the log.

    prompt 1   8   8   9   8      rewards 1.1 1.1 0.1 1.1    learned: what made the third one worse than the others?
    prompt 2   3   3   3   3      rewards 1.1 1.1 1.1 1.1    dropped: no answer is better than another, all advantages are 0
    prompt 3   5   7   4   6      rewards 0.1 0.1 0.1 0.1    dropped, and two prompts more are sampled in their place

Everything is a function of the seed and the number of the prompt in the stream, whatever the number of ranks: chunks of prompts
are sampled with random numbers of their own, shared out over the ranks, and every rank gets to know all of them.
Legend: Q prompts of an update, G answers per prompt, L learned tokens of a batch.
"""
from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataset.chat import Document, Pair
from dataset.images import Picture
from dataset.problems import Problem, problems
from dataset.processor import Processor
from dataset.protocols import Ranks, Run
from dataset.rewards import Reward, reward_function
from dataset.tasks import Truncated
from model.registry import UserError

CHUNK = 32  # prompts that are sampled together, with one sequence of random numbers


class RolloutFlags(Protocol):
    """The flags of 3-rl_vlm.py that are read here."""

    data: tuple[str, ...]
    problems: int
    pass_rates: tuple[float, float]
    prompts: int
    group_size: int
    batch_size: int
    reward: str
    temperature: float
    optim: Any


@dataclass(frozen=True)
class Rollout:
    """One answer to a problem, as it will be learned.

    document   prompt, answer, and the stop token where the policy ended by itself; only what it sampled is learned
    logps      of each learned token, in nats, under the distribution that it was drawn from
    text       the answer; `Truncated` where the limit on its length ended it
    """

    document: Document
    logps: list[float]
    text: str
    reward: Reward

    @property
    def stopped(self) -> bool:
        return not isinstance(self.text, Truncated)

    def __len__(self) -> int:
        return len(self.logps)


@dataclass(frozen=True)
class Group:
    """All answers to one problem."""

    problem: Problem
    rollouts: list[Rollout]

    @property
    def zero_variance(self) -> bool:
        """Whether all answers have the same reward: then there is nothing to learn."""
        return len({rollout.reward.total for rollout in self.rollouts}) == 1


def as_rollout(prompt: Document, stop: int, answer: Any, text: str, reward: Reward) -> Rollout:
    """The prompt's tokens and those that were sampled, without encoding anything again: text could be cut into other tokens.

    <s>  <|user|>  image image  3 + 5 ?  <|assistant|>  <think> ... </answer>  <|end|>
     .      .        .     .    .  .  .       .            x     x      x         x        x learned, . only read

    An answer that did not end by itself learns no end.
    """
    sampled = [*answer.tokens, stop] if answer.stopped else list(answer.tokens)
    if len(sampled) != len(answer.logps):
        raise ValueError(f"{len(sampled)} tokens have {len(answer.logps)} log-probabilities ({prompt.id})")
    learn = [False] * len(prompt) + [True] * len(sampled)
    document = Document(prompt.id, prompt.input_ids + sampled, learn, prompt.pictures)
    return Rollout(document, answer.logps, (str if answer.stopped else Truncated)(text), reward)


@dataclass(frozen=True)
class RolloutBatch:
    """What one update learns from.

    groups   Q at most; where no group has any variance, those of the first round, whose advantages are 0
    stats    for the log, about all answers, those of dropped groups too
    """

    groups: list[Group]
    stats: dict[str, float]

    @property
    def rewards(self) -> Tensor:
        """(Q, G)."""
        return torch.tensor([[rollout.reward.total for rollout in group.rollouts] for group in self.groups])

    @property
    def lengths(self) -> Tensor:
        """(Q, G): learned tokens."""
        return torch.tensor([[len(rollout) for rollout in group.rollouts] for group in self.groups])

    def micro_batches(self, size: int, processor: Processor, ranks: Ranks) -> list[dict]:
        """This rank's micro-batches of at most `size` answers, equally many on every rank.

        Packed as `collate` makes them, and for the L learned tokens in their order: `rollout_logps (L,)`, and `answer_ids (L,)`,
        which of the Q x G answers each belongs to.
        """
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        batches = []
        for answers in share_out(len(rollouts), size, ranks):
            chosen = [rollouts[k] for k in answers]
            lengths = torch.tensor([len(rollout) for rollout in chosen])
            batches.append({**processor.batch([rollout.document for rollout in chosen]),
                            "rollout_logps": torch.tensor([logp for rollout in chosen for logp in rollout.logps]),
                            "answer_ids": torch.repeat_interleave(torch.from_numpy(answers), lengths)})
        return batches

    def pairs(self) -> list[Pair]:
        """A preference pair of each group with variance: its best answer and its worst one, the first of equals."""
        pairs = []
        for group in self.groups:
            if not group.zero_variance:
                ordered = sorted(group.rollouts, key=lambda rollout: -rollout.reward.total)
                pairs.append(Pair(ordered[0].document, ordered[-1].document))
        return pairs


def share_out(count: int, size: int, ranks: Ranks) -> list[np.ndarray]:
    """Numbers 0..count-1 in parts of at most `size`, equally many parts on every rank; UserError for fewer numbers than ranks.

    One number more than `size` stands in a part where there are too few for one part more on every rank. The parts do not depend
    on the data, so every rank knows those of all others without asking.
    """
    if count < ranks.world_size:
        raise UserError(f"{count} answers cannot be shared out over {ranks.world_size} processes: raise --prompts")
    each = min(count // ranks.world_size, math.ceil(count / (size * ranks.world_size)))
    return np.array_split(np.arange(count), each * ranks.world_size)[ranks.rank::ranks.world_size]


class Sampler:
    """An endless stream of problems that the policy answers: `sampler.next()` is the next update's rollouts.

    generate          (padded prompts, generator=...) -> G answers to each prompt with `.tokens`, `.logps`, `.stopped`
    prompts           Q, groups that an update is to learn from; `group_size` answers to each
    resample_rounds   times to resample prompts whose group has no reward variance; None: all groups are kept
    position          prompts of the stream that were asked, saved for --resume
    """

    def __init__(self, problems: Sequence[Problem], generate: Callable[..., list], processor: Processor, ranks: Ranks, *,
                 prompts: int, group_size: int, seed: int, resample_rounds: int | None):
        if group_size < 2:
            raise UserError("--group_size is at least 2: an answer is good or bad beside others to the same problem")
        self.problems, self.generate, self.processor, self.ranks = problems, generate, processor, ranks
        self.prompts, self.group_size, self.seed, self.resample_rounds = prompts, group_size, seed, resample_rounds
        self.position = 0
        self.last_order: tuple[int, list[int]] = (-1, [])  # of the last time round

    def problem(self, number: int) -> Problem:
        """Problem `number` of the stream: all of them in a new order every time round."""
        turn, place = divmod(number, len(self.problems))
        if self.last_order[0] != turn:
            order = list(range(len(self.problems)))
            random.Random(f"rollouts/{self.seed}/{turn}").shuffle(order)
            self.last_order = turn, order
        return self.problems[self.last_order[1][place]]

    def pictures(self, updates: int) -> list[Picture]:
        """What so many updates will show if no group is dropped."""
        count = min(updates * self.prompts, len(self.problems))
        return [picture for number in range(count) for picture in self.problem(number).prompt.pictures]

    def next(self) -> RolloutBatch:
        """Sample Q groups, and others in the place of those that teach nothing."""
        kept: list[Group] = []
        sampled: list[Group] = []
        for _ in range(1 + (self.resample_rounds or 0)):
            new = self.sample(self.prompts - len(kept))
            sampled += new
            kept += [group for group in new if self.resample_rounds is None or not group.zero_variance]
            if len(kept) == self.prompts:
                break
        return RolloutBatch(kept or sampled[:self.prompts], {**stats(sampled), "groups": len(kept), "asked": len(sampled)})

    def sample(self, count: int) -> list[Group]:
        """G rewarded answers to each of the next `count` problems. Each rank samples its share of the chunks."""
        start, self.position = self.position, self.position + count
        problems = [self.problem(number) for number in range(start, start + count)]
        self.processor.images.prepare(picture for problem in problems for picture in problem.prompt.pictures)
        prompts = [self.processor.prompt(problem.prompt) for problem in problems]
        mine: dict[int, list[tuple]] = {}
        for first in range(self.ranks.rank * CHUNK, count, self.ranks.world_size * CHUNK):
            part = slice(first, first + CHUNK)
            mine.update(enumerate(self.answers(start + first, problems[part], prompts[part]), first))
        found = self.ranks.all_gather(mine)
        (stop,) = self.processor.stop_ids
        return [Group(problem, [as_rollout(prompt, stop, *answer) for answer in found[k]])
                for k, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))]

    def answers(self, number: int, problems: Sequence[Problem], prompts: Sequence[Document]) -> list[list[tuple]]:
        """(answer, text, reward) of every answer to a chunk that begins with problem `number` of the stream."""
        generator = torch.Generator(self.ranks.device).manual_seed(zlib.crc32(f"rollouts/{self.seed}/{number}".encode()))
        answers = self.generate(self.processor.padded(prompts), generator=generator)
        if len(answers) != self.group_size * len(problems):
            raise ValueError(f"{len(problems)} prompts got {len(answers)} answers, not {self.group_size} each")
        found: list[list[tuple]] = []
        for k, problem in enumerate(problems):
            group = []
            for answer in answers[k * self.group_size:(k + 1) * self.group_size]:
                text = self.processor.tokenizer.decode(answer.tokens)
                group.append((answer, text, problem.reward(problem.example, (str if answer.stopped else Truncated)(text))))
            found.append(group)
        return found


def make_sampler(flags: RolloutFlags, run: Run, processor: Processor, generate: Callable[..., list], resample_rounds: int | None,
                 updates: int, max_prompt_tokens: int) -> Sampler:
    """The sampler of a run's flags: problems found, told, previewed with --check_data, and the features of their pictures made.

    updates             that the run will make
    max_prompt_tokens   that a problem may have; a row of a file that has more is a bad row
    """
    for name in ("prompts", "group_size", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is at least 1, not {getattr(flags, name)}")
    if updates < 1:
        raise UserError(f"--max_steps is at least 1, not {flags.optim.max_steps}")
    if flags.temperature <= 0:
        raise UserError("--temperature is above 0: answers that are all alike teach nothing")
    bad_rows = None if run.only_looks else run.out / "bad_problems.jsonl"
    if run.is_main and bad_rows:
        bad_rows.unlink(missing_ok=True)  # they are all found now, also by a run that goes on
    found = problems(
        flags.data, flags.problems, reward_function(flags.reward), image_folder=run.config.image_folder,
        allow_urls=run.config.allow_urls, bad_rows=bad_rows, max_bad=run.config.max_bad, pass_rates=flags.pass_rates,
        report=run.is_main, check=lambda prompt: processor.require_room(prompt, max_prompt_tokens))
    run.print0(f"{len(found):,} problems, {updates} updates of {flags.prompts} x {flags.group_size} answers "
               f"on {run.world_size} x {run.device}")
    if run.config.check_data:
        for problem in found[:: -(-len(found) // 6)]:  # from all parts of --data
            prompt = processor.prompt(problem.prompt)
            run.print0(f"{prompt.id}\n{processor.marked(prompt)}\nright: {problem.example.answer}\n")
    sampler = Sampler(found, partial(generate, temperature=flags.temperature, group_size=flags.group_size), processor, run,
                      prompts=flags.prompts, group_size=flags.group_size, seed=run.config.seed, resample_rounds=resample_rounds)
    if not run.only_looks:
        processor.images.prepare(sampler.pictures(updates), run.config.feature_cache_gb, run.print0)
    return sampler


def stats(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers, and over groups, for the log; no length of right or wrong answers where there are none."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = {"right": [len(rollout) for rollout in rollouts if rollout.reward.accuracy == 1],
               "wrong": [len(rollout) for rollout in rollouts if rollout.reward.accuracy < 1]}
    right = [sum(rollout.reward.accuracy == 1 for rollout in group.rollouts) / len(group.rollouts) for group in groups]
    return {
        "reward": mean([rollout.reward.total for rollout in rollouts]),
        "accuracy": mean([rollout.reward.accuracy for rollout in rollouts]),
        "format": mean([rollout.reward.format for rollout in rollouts]),
        "all_right": mean([share == 1 for share in right]), "all_wrong": mean([share == 0 for share in right]),
        "zero_variance": mean([group.zero_variance for group in groups]),
        **{f"length_{name}": mean(found) for name, found in lengths.items() if found},
        "truncated": mean([not rollout.stopped for rollout in rollouts]),
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def add_to_tokens(batches: Sequence[dict], **values: Tensor) -> None:
    """Give each batch a value for each of its tokens (L,), that of the token's answer; values (Q, G)."""
    for batch in batches:
        batch.update({name: value.flatten()[batch["answer_ids"]] for name, value in values.items()})


# ---------------------------------------------------------------- when to stop


PATIENCE = 20  # updates


def early_stop_reason(history: Sequence[dict], entropy_floor: float, updates: int = PATIENCE) -> str | None:
    """Why there is no point in going on, and what to do, by the log of the last updates; None as long as there is a point.

    Groups whose answers are paid differently teach, also where a reward of one's own calls none of them right, or all.
    """
    rows = [row for row in history if "all_wrong" in row][-updates:]
    if len(rows) < updates:
        return None
    names = ("all_wrong", "all_right", "zero_variance", "entropy")
    share = {name: mean([row.get(name, math.inf) for row in rows]) for name in names}
    if min(share["all_wrong"], share["zero_variance"]) > 0.8:
        return (f"{share['all_wrong']:.0%} of the groups hold no right answer: RL makes likelier what is already said at times. "
                f"Fine-tune longer on such problems (2-sft_vlm.py), or begin with easier ones")
    if min(share["all_right"], share["zero_variance"]) > 0.8:
        return f"{share['all_right']:.0%} of the groups are all right: there is little left to learn here. Take harder problems"
    if share["entropy"] < entropy_floor:
        return (f"the entropy is {share['entropy']:.2g} nats a token: all answers to a problem are the same, and nothing new is "
                f"tried. Lower --lr, raise clip_high, or fine-tune for fewer steps before")
    return None

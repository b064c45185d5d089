"""Sampling rollouts: an endless stream of problems that the policy answers, in groups.

In:  problems, and a policy that generates answers.  Out: the `RolloutBatch` of each update.

Everything is a function of the seed and the number of the prompt in the stream, whatever the number of ranks: chunks of prompts
are sampled with random numbers of their own, shared out over the ranks, and every rank gets to know all of them.
"""
from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from dataset.chat import Document
from dataset.early_stop import no_group_differs
from dataset.images import Picture
from dataset.own_rows import OwnRows
from dataset.problems import Problem, ProblemFlags, problems
from dataset.processor import Processor
from dataset.protocols import Ranks, Run
from dataset.rollouts import Group, RolloutBatch, as_rollout, stats
from dataset.tasks import Truncated
from model.registry import UserError

CHUNK = 32  # prompts that are sampled together, with one sequence of random numbers


@dataclass
class Sampler:
    """An endless stream of problems that the policy answers: `sampler.next()` is the next update's rollouts.

    generate          (padded prompts, generator=...) -> G answers to each prompt with `.tokens`, `.logps`, `.stopped`
    prompts           Q, groups that an update is to learn from; `group_size` answers to each
    resample_rounds   times to resample prompts whose group has no reward variance; None: all groups are kept
    tell              prints, on the first rank
    position          prompts of the stream that were sampled, saved for --resume
    """

    problems: Sequence[Problem]
    generate: Callable[..., list]
    processor: Processor
    ranks: Ranks
    prompts: int
    group_size: int
    seed: int
    resample_rounds: int | None
    tell: Callable[[str], None] = print
    position: int = 0
    dull_updates: int | None = 0  # at the beginning of the run, without a group whose rewards differ; None: there was one
    order: tuple[int, list[int]] = (-1, [])  # (epoch, its order of the problems)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UserError("--group_size is at least 2: an answer is good or bad beside others to the same problem")

    def problem(self, number: int) -> Problem:
        """Problem `number` of the stream: all of them in a new order in every epoch."""
        epoch, place = divmod(number, len(self.problems))
        if self.order[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"rollouts/{self.seed}/{epoch}").shuffle(order)
            self.order = epoch, order
        return self.problems[self.order[1][place]]

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
        facts = stats(sampled)
        if self.dull_updates is not None:
            self.dull_updates = self.dull_updates + 1 if facts["zero_variance"] == 1 else None
            if self.dull_updates == 2:
                self.tell(no_group_differs(facts))
        return RolloutBatch(kept or sampled[:self.prompts], {**facts, "groups": len(kept), "sampled": len(sampled)})

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


class RolloutFlags(ProblemFlags, Protocol):
    """The flags of 3-rl_vlm.py that say how problems are sampled."""

    prompts: int
    group_size: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    optim: Any


def make_sampler(flags: RolloutFlags, run: Run, processor: Processor, generate: Callable[..., list], updates: int,
                 resample_rounds: int | None) -> tuple[Sampler, dict[str, OwnRows]]:
    """(the sampler of a run that makes so many updates, its held-out problems as a task "held_out", if there are any).

    Prints its problems with --check_data, and encodes their pictures.
    """
    for name in ("prompts", "group_size", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is at least 1, not {getattr(flags, name)}")
    if flags.pass_rates[0] > flags.pass_rates[1]:
        raise UserError(f"--pass_rates are the lowest and the highest, as in 0.1 0.9, not {flags.pass_rates[0]} "
                        f"{flags.pass_rates[1]}")
    if updates < 1:
        raise UserError(f"--max_steps is at least 1, not {flags.optim.max_steps}")
    if flags.temperature <= 0:
        raise UserError("--temperature is above 0: answers that are all alike teach nothing")
    longest = processor.max_prompt_tokens(flags.max_new_tokens)
    found, own = problems(flags, run, lambda prompt: processor.require_answerable(prompt, longest))
    run.print0(f"{len(found):,} problems, {updates} updates of {flags.prompts} x {flags.group_size} answers "
               f"on {run.world_size} x {run.device}")
    if run.config.check_data:
        lengths = [len(processor.prompt(problem.prompt)) for problem in found]
        pictures = sum(bool(problem.prompt.pictures) for problem in found)
        run.print0(f"checked: {pictures:,} with pictures, {sum(lengths):,} tokens, the longest {max(lengths):,}")
        for problem in found[:: -(-len(found) // 6)]:  # from all parts of --data
            prompt = processor.prompt(problem.prompt)
            run.print0(f"{prompt.id}\n{processor.marked(prompt)}\nright: {problem.example.answer}\n")
    generate = partial(generate, temperature=flags.temperature, group_size=flags.group_size)
    sampler = Sampler(found, generate, processor, run, flags.prompts, flags.group_size, run.config.seed, resample_rounds,
                      run.print0)
    if not run.preview_only:
        processor.images.prepare(sampler.pictures(updates), run.config.feature_cache_gb, run.print0)
    return sampler, {"held_out": own} if own else {}

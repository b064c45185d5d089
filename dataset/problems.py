"""Problems for RL: questions whose right answer is known, from tasks and from files.

In:  what `--data` names.  Out: a list of `Problem`, each with its reward function, and the questions that are held out.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dataset.bad_rows import BadRow, BadRows
from dataset.chat import Conversation
from dataset.formats.gold_answers import gold
from dataset.formats.pass_rates import by_pass_rate
from dataset.held_out import Rows
from dataset.mixture import Mixture, load, name_and_weight, split
from dataset.own_rows import OwnRows, as_example, gold_text
from dataset.protocols import Run, Source
from dataset.rewards import RewardFunction, answer_reward, matches_gold, reward_function
from dataset.tasks import Example, Task
from model.registry import TASKS, UserError

Check = Callable[[Conversation], None]


@dataclass(frozen=True)
class Problem:
    """A question with its right answer, and what an answer to it is paid.

    ruled   whether a rule pays, which calls answers right or wrong; a function of one's own gives them a value alone
    """

    example: Example
    reward: RewardFunction
    ruled: bool = True

    @property
    def prompt(self) -> Conversation:
        return self.example.prompt


def of_task(task: Task, count: int, reward: RewardFunction | None) -> list[Problem]:
    """`count` pictures' worth of the train split, after the rows that stage 2 learned from.

    UserError for a task that gives a right answer in the right form nothing: its score does not read <answer>...</answer>.
    """
    examples = task.examples("train", task.rows + count)[task.rows:]
    if examples and not reward and task.score(examples[0], f"<think>.</think><answer>{examples[0].answer}</answer>") < 1:
        raise UserError(f"the score of {type(task).__name__} does not look for the final answer in <answer>...</answer>, so no "
                        f"answer could be right: give a --reward my_file.py:function, or let its score look there")
    return [Problem(example, reward or answer_reward(task.score, task.reward), ruled=not reward) for example in examples]


def of_rows(source: Source, count: int, reward: RewardFunction | None, bad_rows: BadRows,
            check: Check = lambda prompt: None) -> list[Problem]:
    """The first `count` rows with their gold answers (dataset/own_rows.py: gold_text); an assistant's last turn is left out.

    A row without a gold answer, or with one that nothing could match, and one that `check` refuses, is a bad row, now and not in
    the middle of training. A reward function of one's own needs no gold answer.
    """
    found = []
    for k in range(min(count, len(source))):
        bad_rows.seen += 1
        try:
            row = source[k]
            example = as_example(row)
            if not reward:
                gold(gold_text(row))
            check(example.prompt)
        except BadRow as bad:
            bad_rows.add(bad)
            continue
        except ValueError as error:
            bad_rows.add(BadRow(str(error), "every row of RL data has an answer that can be checked", row.id))
            continue
        found.append(Problem(example, reward or answer_reward(matches_gold), ruled=not reward))
    return found


class ProblemFlags(Protocol):
    """The flags of 3-rl_vlm.py that say which problems are sampled."""

    data: tuple[str, ...]
    problems: int
    pass_rates: tuple[float, float]
    reward: str


def problems(flags: ProblemFlags, run: Run, check: Check = lambda prompt: None) -> tuple[list[Problem], OwnRows | None]:
    """(all that `--data` names, tasks and files; the held-out questions, judged by the same reward, None where there are none).

    Of each the first --problems are taken (times its weight, "arithmetic:0.5"). A --reward function takes the place of the task's
    own score, and of the comparison with the gold answer; then questions of the tasks' "val" split are among the held-out ones.
    With --pass_rates, rows of files that tell their own pass rate are used only where it lies between these two.

    check   raises BadRow for a prompt that cannot be asked
    UserError where there is no problem.
    """
    reward, listed = reward_function(flags.reward), None if run.preview_only else run.out / "bad_problems.jsonl"
    if run.is_main and listed:
        listed.unlink(missing_ok=True)  # all bad rows are listed anew, also in a resumed run
    specs = [name_and_weight(spec) for spec in flags.data]
    tasks: dict[str, Task] = {name: TASKS.make(name) for name, _ in specs if name.partition(":")[0] in TASKS.names()}
    files = {name: load(name, run.config.image_folder, run.config.allow_urls, need_answer=False)
             for name, _ in specs if name not in tasks}
    trained, rows = split(Mixture([(source, 1) for source in files.values()]), run.config, run.print0)
    sources = dict(zip(files, trained.sources if isinstance(trained, Mixture) else ()))

    read: list[BadRows] = []  # of each file

    def of_file(source: Source, count: int) -> list[Problem]:
        read.append(BadRows(listed, len(source), run.config.max_bad, run.is_main, check=run.config.check_data))
        return of_rows(source, count, reward, read[-1], check)

    found: list[Problem] = []
    for name, weight in specs:
        count = round(weight * flags.problems)
        if name in tasks:
            found += of_task(tasks[name], count, reward)
        else:
            source = sources[name]
            if flags.pass_rates != (0.0, 1.0):
                source = by_pass_rate(source, *flags.pass_rates)
            if count < len(source):
                run.print0(f"{name}: the first {count:,} of {len(source):,} rows are asked (--problems)")
            found += of_file(source, count)
    asked = [problem.example for problem in of_file(Rows(rows), run.config.eval_examples)]
    for bad_rows in read if run.config.check_data else []:
        for reason, times in bad_rows.reasons.most_common():
            run.print0(f"  {times:,} bad: {reason}")
        bad_rows.require_few()
    if not found:
        raise UserError(f"no problem in {', '.join(flags.data)}: give --data a task or a file with answers, "
                        f"--problems above 0, and --pass_rates wide enough")
    if reward and run.config.bench:
        asked += [example for task in tasks.values() for example in task.examples("val", run.config.eval_examples)]
    return found, OwnRows(asked, reward or answer_reward(matches_gold), ruled=not reward) if asked else None

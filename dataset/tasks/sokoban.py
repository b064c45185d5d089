"""Mini-Sokoban: push every box onto a target, the whole plan told from the first picture.

A level is 6 x 6 squares with one inner wall, made at random and kept where breadth-first search finds a plan of at most `most`
moves. Nothing is compared with that plan: an answer is played, and whatever solves the level is right.

The reasoning names the squares (row and column, from 1), then what is wanted: from which square the box is pushed to where, one
straight line at a time. Then it plays: each move with the square the player comes to, and for a push the square the box comes
to. So every step follows from those before it, and the answer only copies the moves:

    player 23, box 33, target 35, wall 51. 32-35. left 22, down 32, right 33 box 34, right 34 box 35.
    -> left, down, right, right

Without the second part the first move has to know the whole plan. What helped most was more rows: of 300 validation levels nano
solved 37 % after 8,000 rows and 79 % after 24,000, with 3,000 and 4,000 more that only play (one seed each).
"""
from __future__ import annotations

import functools
import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.tasks import Example, Generated
from dataset.tasks.reasoning import ReasoningProblem, ReasoningTask, body, drawn, split_of
from dataset.world import drawings
from dataset.world.openmoji import LANGUAGES
from model.registry import TASKS, UserError

SIDE = 6
Square = tuple[int, int]  # row and column, from 0
MOVES: dict[str, Square] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CHINESE = {"up": "上", "down": "下", "left": "左", "right": "右"}
MEANING = {**{move: move for move in MOVES}, **{word: move for move, word in CHINESE.items()}}
ASK = {"en": "Push the boxes onto the targets. What are the moves?", "zh": "把箱子推到目标上。怎么走？"}
PLAY = {"en": "Play each.", "zh": "逐个走。"}
PLAYED, ONLY_PLAYED = 4, 1_000_000  # levels in a row that only plays, and the number of the first
NAMES = {"en": ("player", "box", "target", "wall"), "zh": ("玩家", "箱子", "目标", "墙")}

# ---------------------------------------------------------------- the game


@dataclass(frozen=True)
class Level:
    """Where everything stands; boxes, targets and walls in reading order."""

    player: Square
    boxes: tuple[Square, ...]
    targets: tuple[Square, ...]
    walls: tuple[Square, ...]

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def rows(self) -> list[str]:
        """The level in the usual signs, as `drawings.board` takes it."""
        signs = {**dict.fromkeys(self.walls, "#"), **dict.fromkeys(self.targets, ".")}
        for box in self.boxes:
            signs[box] = "*" if box in self.targets else "$"
        signs[self.player] = "+" if self.player in self.targets else "@"
        return ["".join(signs.get((row, column), " ") for column in range(SIDE)) for row in range(SIDE)]

    @classmethod
    def read(cls, rows: Sequence[str]) -> Level:
        """The level behind the signs."""
        where = {(r, c): sign for r, row in enumerate(rows) for c, sign in enumerate(row)}
        boxes, targets, walls, players = (tuple(square for square, sign in where.items() if sign in signs)
                                          for signs in ("$*", ".+*", "#", "@+"))
        return cls(players[0], boxes, targets, walls)

    def after(self, move: str) -> Level:
        """The level after a move; itself where a wall, the edge or a stuck box is in the way."""
        ahead, beyond = step(self.player, move), step(step(self.player, move), move)
        if not self.free(ahead):
            return self
        if ahead not in self.boxes:
            return Level(ahead, self.boxes, self.targets, self.walls)
        if not self.free(beyond) or beyond in self.boxes:
            return self
        moved = sorted(beyond if box == ahead else box for box in self.boxes)
        return Level(ahead, tuple(moved), self.targets, self.walls)

    def free(self, square: Square) -> bool:
        """On the board, and no wall."""
        return 0 <= square[0] < SIDE and 0 <= square[1] < SIDE and square not in self.walls

    def distance(self) -> int:
        """How many squares the boxes are from their targets, each box with a target of its own, walls not counted."""
        return min(sum(abs(b[0] - t[0]) + abs(b[1] - t[1]) for b, t in zip(self.boxes, order))
                   for order in permutations(self.targets))


def step(square: Square, move: str) -> Square:
    return square[0] + MOVES[move][0], square[1] + MOVES[move][1]


def shortest_plan(level: Level, most: int) -> list[str] | None:
    """Breadth-first search: a shortest plan of at most `most` moves, None where there is none.

    A move brings the boxes nearer by one square at most, so whatever is farther away than moves are left is not followed.
    """
    waiting: deque[tuple[Level, list[str]]] = deque([(level, [])])
    seen = {(level.player, level.boxes)}
    while waiting:
        here, moves = waiting.popleft()
        if here.solved:
            return moves
        for move in MOVES if here.distance() <= most - len(moves) else ():
            there = here.after(move)
            if (there.player, there.boxes) not in seen:
                seen.add((there.player, there.boxes))
                waiting.append((there, [*moves, move]))
    return None


@functools.cache
def level(split: str, index: int, boxes: int, walls: int, most: int) -> tuple[Level, tuple[str, ...]]:
    """Level number `index` of a split, with a shortest plan; made once a process."""
    rng = random.Random(f"sokoban/{boxes}/{walls}/{most}/{split}/{index}")
    squares = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    while True:
        player, *others = rng.sample(squares, 1 + 2 * boxes + walls)
        made = Level(player, *(tuple(sorted(others[start:end])) for start, end in
                               ((0, boxes), (boxes, 2 * boxes), (2 * boxes, None))))
        if split_of("sokoban", *made.rows()) == split and (plan := shortest_plan(made, most)):
            return made, tuple(plan)


# ---------------------------------------------------------------- answers


def moves_of(answer: str) -> list[str] | None:
    """The moves between the answer tags, in either language; None where a tag is missing or anything else stands there."""
    inside = body(answer)
    if inside is None:
        return None
    words = [word for word in re.split(r"[\s,，、.。]+", inside.lower()) if word]
    return [MEANING[word] for word in words] if words and all(word in MEANING for word in words) else None


@dataclass(frozen=True)
class Play:
    """What became of an answer: how many moves it has, how many of them did something, how many pushed a box."""

    end: Level
    moves: int
    effective: int
    pushes: int


def play(start: Level, moves: Sequence[str]) -> Play:
    """Make all moves; one that cannot be made changes nothing."""
    here, effective, pushes = start, 0, 0
    for move in moves:
        there = here.after(move)
        effective, pushes, here = effective + (there != here), pushes + (there.boxes != here.boxes), there
    return Play(here, len(moves), effective, pushes)


def at(square: Square) -> str:
    """Row and column from 1: '23'."""
    return f"{square[0] + 1}{square[1] + 1}"


def listed(level: Level, language: str) -> str:
    """'player 23, box 33, target 35, wall 51.'"""
    groups = zip(NAMES[language], ((level.player,), level.boxes, level.targets, level.walls))
    if language == "en":
        return ", ".join(f"{name} {at(square)}" for name, squares in groups for square in squares) + "."
    return "，".join(f"{name}{at(square)}" for name, squares in groups for square in squares) + "。"


def wanted(level: Level, plan: Sequence[str], language: str) -> str:
    """'32-35, 25-45.': every straight line of pushes, where the player stands before it and where the box ends."""
    lines: list[tuple[str, Square, Square]] = []  # move, where the player stands, where the box ends
    here, pushing = level, False
    for move in plan:
        there = here.after(move)
        ends = [box for box in there.boxes if box not in here.boxes]
        if ends and pushing and lines[-1][0] == move:
            lines[-1] = (move, lines[-1][1], ends[0])
        elif ends:
            lines.append((move, here.player, ends[0]))
        here, pushing = there, bool(ends)
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    return comma.join(f"{at(stand)}-{at(end)}" for _, stand, end in lines) + stop


def played(level: Level, plan: Sequence[str], language: str) -> str:
    """'left 22, down 32, right 33 box 34.': every move with where it leads."""
    steps, here = [], level
    for move in plan:
        there = here.after(move)
        pushed = [at(box) for box in there.boxes if box not in here.boxes]
        words = (f"{move} {at(there.player)}", f"{CHINESE[move]}{at(there.player)}")[language == "zh"]
        box = ("".join(f" box {square}" for square in pushed), "".join(f"箱子{square}" for square in pushed))[language == "zh"]
        steps.append(words + box)
        here = there
    return ", ".join(steps) + "." if language == "en" else "，".join(steps) + "。"


def told(moves: Sequence[str], language: str) -> str:
    """A plan as an answer: 'up, left, left', '上，左，左'."""
    return ", ".join(moves) if language == "en" else "，".join(CHINESE[move] for move in moves)


# ---------------------------------------------------------------- what RL is paid for


def solved(start: Level, answer: str) -> float:
    """1 where the plan solves the level."""
    moves = moves_of(answer)
    return float(moves is not None and play(start, moves).end.solved)


def hackable(start: Level, answer: str) -> float:
    """The shaped reward published with LMM-R1: it also pays 0.05 a move up to 20, and 0.001 a word up to 200.

    So twenty moves up and down and two hundred words earn as much as the solution of a short level, without touching a box.
    The format's half point is the caller's.
    """
    inside = body(answer) or ""
    moves = sum(word in MEANING for word in re.split(r"[\s,，、.。]+", inside.lower()))
    return solved(start, answer) + 0.05 * min(moves, 20) + 0.001 * min(len(answer.split()), 200)


def potential(start: Level, answer: str) -> float:
    """Solved, and half of how much nearer the boxes came to the targets.

    The sum over the moves of phi(after) - phi(before), with phi minus half the distance as a share of the first one: whatever is
    done in between cancels out, so nothing can be farmed (Ng, Harada and Russell 1999).
    """
    moves = moves_of(answer)
    if moves is None:
        return 0.0
    nearer = (start.distance() - play(start, moves).end.distance()) / start.distance()
    return solved(start, answer) + 0.5 * nearer


REWARDS = {"solved": solved, "hackable": hackable, "potential": potential}


@TASKS.register("sokoban")
class Sokoban(ReasoningTask):
    """Mini-Sokoban of 6 x 6 squares: the whole plan from the first picture, judged by playing it.

    rows    rows to tune on, 1,000 by default
    boxes   boxes and targets: 1, or 2, which is much harder
    walls   walls inside
    most    moves of the longest shortest plan
    reward  what RL is paid for: solved, hackable (the published reward of LMM-R1), or potential; scores are always `solved`
    plays   rows more, in words, of four levels each, of which what is wanted is told and only the moves are learned: most plans
            fail in their steps
    """

    name = "sokoban"

    def __init__(self, rows: int = 1_000, text: bool | None = None, boxes: int = 1, walls: int = 1, most: int = 6,
                 reward: str = "solved", first: int = 0, plays: int = 0, direct: float = 0.0):
        super().__init__(rows, text, first, direct)
        self.plays = plays
        if reward not in REWARDS:
            raise UserError(f"sokoban: reward is one of {', '.join(REWARDS)}, not {reward!r}")
        self.boxes, self.walls, self.most, self.paid = boxes, walls, most, REWARDS[reward]

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows + self.plays, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        """Level i with its reasoning; behind the levels come the rows that only play."""
        return super().row(i) if i < self.rows else self.playing(i - self.rows)

    def playing(self, i: int) -> Conversation:
        """Four levels in words, with numbers of their own: the squares and what is wanted are read, the moves are learned."""
        language = random.Random(f"sokoban/playing/{i}").choice(LANGUAGES)
        space = " " if language == "en" else ""
        parts: list[str] = []
        for k in range(PLAYED * i, PLAYED * i + PLAYED):
            made, plan = level("train", ONLY_PLAYED + k, self.boxes, self.walls, self.most)
            told = listed(made, language) + space + wanted(made, plan, language)
            parts += [Prefill(space * bool(parts) + told), space + played(made, plan, language)]
        return Conversation(f"sokoban/playing/{i}", (Message("user", (PLAY[language],)), Message("assistant", tuple(parts))))

    def problem(self, split: str, i: int) -> ReasoningProblem:
        rng = random.Random(f"sokoban/drawing/{split}/{i}")
        made, plan = level(split, i, self.boxes, self.walls, self.most)
        language, seed = rng.choice(LANGUAGES), rng.random()
        question = ASK[language]
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = listed(made, language) + (" " if language == "en" else "") + question
        else:
            pictures = (drawn(f"sokoban:{made.rows()}", lambda own: drawings.board(made.rows(), own), seed),)
        seen = listed(made, language)
        thoughts = (" " if language == "en" else "").join((seen, wanted(made, plan, language), played(made, plan, language)))
        kind = f"{self.boxes}_box" + "es" * (self.boxes > 1)
        state = ("sokoban", *made.rows())
        return ReasoningProblem(kind, language, pictures, question, thoughts, told(plan, language), state, seen)

    def guess(self, examples: Sequence[Example]) -> float:
        """What one plan for all levels solves: of 100 plans of validation levels, the one that solves most of those levels."""
        levels = [level("val", i, self.boxes, self.walls, self.most) for i in range(100)]
        plan = max((plan for _, plan in levels), key=lambda plan: sum(play(start, plan).end.solved for start, _ in levels))
        return sum(play(self.level(example)[0], plan).end.solved for example in examples) / len(examples)

    def level(self, example: Example) -> tuple[Level, tuple[str, ...]]:
        """The level that a question is about, and a shortest plan."""
        _, split, index = example.prompt.id.split("/")
        return level(split, int(index), self.boxes, self.walls, self.most)

    def score(self, example: Example, answer: str) -> float:
        return solved(self.level(example)[0], answer)

    def reward(self, example: Example, answer: str) -> float:
        """What RL is paid for this answer, beside the format."""
        return self.paid(self.level(example)[0], answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """solved; near_optimal: with at most two moves more than needed; legal: a list of moves each of which did something;
        untouched: no box was ever pushed; moves: how many there are on average; and solved of each language and form."""
        scores, rows = [], []
        for example, answer in zip(examples, answers, strict=True):
            start, plan = self.level(example)
            moves = moves_of(answer)
            end = play(start, moves or [])
            scores.append(solved(start, answer))
            rows.append({"near_optimal": scores[-1] and end.moves <= len(plan) + 2, "untouched": end.pushes == 0,
                         "legal": moves is not None and end.effective == end.moves, "moves": end.moves})
        metrics = {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}
        of_groups = self.summary(examples, scores)
        return scores, {"solved": of_groups.pop("accuracy"), **metrics, **of_groups}

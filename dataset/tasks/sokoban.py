"""Mini-Sokoban: push every box onto a target; the model gives the full plan from the first picture.

A level is a random board of 6 x 6 squares with one inner wall. Breadth-first search finds a plan of at most `most` moves for it.
An answer is not compared with that plan: it is played, and any plan that solves the level is right.

The reasoning names the squares (row and column, from 1). Then it lists the pushes, one straight line at a time: the square the
player pushes from, and the square where the box ends. Without this list the first move would need the full plan. Then it plays:
each move with the player's new square, and for a push the box's new square. So every step follows from those before it, and the
answer only copies the moves:

    player 23, box 33, target 35, wall 51. 32-35. left 22, down 32, right 33 box 34, right 34 box 35.
    -> left, down, right, right
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
LEVELS_PER_PLAY, FIRST_PLAY = 4, 1_000_000  # levels of a row that only plays, and the index of the first one
NAMES = {"en": ("player", "box", "target", "wall"), "zh": ("玩家", "箱子", "目标", "墙")}

# ---------------------------------------------------------------- the game


@dataclass(frozen=True)
class Level:
    """The squares of the player, and of boxes, targets and walls in reading order."""

    player: Square
    boxes: tuple[Square, ...]
    targets: tuple[Square, ...]
    walls: tuple[Square, ...]

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def rows(self) -> list[str]:
        """The level in the usual text signs, as `drawings.board` reads it."""
        signs = {**dict.fromkeys(self.walls, "#"), **dict.fromkeys(self.targets, ".")}
        for box in self.boxes:
            signs[box] = "*" if box in self.targets else "$"
        signs[self.player] = "+" if self.player in self.targets else "@"
        return ["".join(signs.get((row, column), " ") for column in range(SIDE)) for row in range(SIDE)]

    @classmethod
    def read(cls, rows: Sequence[str]) -> Level:
        """The level of a board in text signs."""
        where = {(r, c): sign for r, row in enumerate(rows) for c, sign in enumerate(row)}
        boxes, targets, walls, players = (tuple(square for square, sign in where.items() if sign in signs)
                                          for signs in ("$*", ".+*", "#", "@+"))
        return cls(players[0], boxes, targets, walls)

    def after(self, move: str) -> Level:
        """The level after a move; unchanged where a wall, the edge or a stuck box blocks it."""
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
        """Whether a square is on the board and not a wall."""
        return 0 <= square[0] < SIDE and 0 <= square[1] < SIDE and square not in self.walls

    def distance(self) -> int:
        """The Manhattan distance of the boxes from the targets, each box with a target of its own."""
        return min(sum(abs(b[0] - t[0]) + abs(b[1] - t[1]) for b, t in zip(self.boxes, order))
                   for order in permutations(self.targets))


def step(square: Square, move: str) -> Square:
    return square[0] + MOVES[move][0], square[1] + MOVES[move][1]


def shortest_plan(level: Level, most: int) -> list[str] | None:
    """A shortest plan of at most `most` moves, by breadth-first search; None where there is none.

    A move reduces the distance by one at most, so a level whose distance exceeds the moves left is dropped.
    """
    waiting: deque[tuple[Level, list[str]]] = deque([(level, [])])
    seen = {(level.player, level.boxes)}
    while waiting:
        current, moves = waiting.popleft()
        if current.solved:
            return moves
        for move in MOVES if current.distance() <= most - len(moves) else ():
            following = current.after(move)
            if (following.player, following.boxes) not in seen:
                seen.add((following.player, following.boxes))
                waiting.append((following, [*moves, move]))
    return None


@functools.cache
def level(split: str, index: int, boxes: int, walls: int, most: int) -> tuple[Level, tuple[str, ...]]:
    """Level `index` of a split and a shortest plan for it; cached."""
    rng = random.Random(f"sokoban/{boxes}/{walls}/{most}/{split}/{index}")
    squares = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    while True:
        player, *others = rng.sample(squares, 1 + 2 * boxes + walls)
        candidate = Level(player, *(tuple(sorted(others[start:end])) for start, end in
                                    ((0, boxes), (boxes, 2 * boxes), (2 * boxes, None))))
        if split_of("sokoban", *candidate.rows()) == split and (plan := shortest_plan(candidate, most)):
            return candidate, tuple(plan)


# ---------------------------------------------------------------- answers


def moves_of(answer: str) -> list[str] | None:
    """The moves between the answer tags, in either language; None where a tag is missing or a word is not a move."""
    inside = body(answer)
    if inside is None:
        return None
    words = [word for word in re.split(r"[\s,，、.。]+", inside.lower()) if word]
    return [MEANING[word] for word in words] if words and all(word in MEANING for word in words) else None


@dataclass(frozen=True)
class Play:
    """The result of an answer: the final level, its moves, those that changed the level, those that pushed a box."""

    end: Level
    moves: int
    effective: int
    pushes: int


def play(start: Level, moves: Sequence[str]) -> Play:
    """Play all moves; a blocked move changes nothing."""
    current, effective, pushes = start, 0, 0
    for move in moves:
        following = current.after(move)
        effective, pushes, current = effective + (following != current), pushes + (following.boxes != current.boxes), following
    return Play(current, len(moves), effective, pushes)


def at(square: Square) -> str:
    """A square as row and column from 1: '23'."""
    return f"{square[0] + 1}{square[1] + 1}"


def listed(level: Level, language: str) -> str:
    """'player 23, box 33, target 35, wall 51.'"""
    groups = zip(NAMES[language], ((level.player,), level.boxes, level.targets, level.walls))
    if language == "en":
        return ", ".join(f"{name} {at(square)}" for name, squares in groups for square in squares) + "."
    return "，".join(f"{name}{at(square)}" for name, squares in groups for square in squares) + "。"


def push_lines(level: Level, plan: Sequence[str], language: str) -> str:
    """'32-35, 25-45.': for each straight line of pushes the square the player pushes from and the square where the box ends."""
    lines: list[tuple[str, Square, Square]] = []  # move, the player's square before it, the box's square after it
    current, pushing = level, False
    for move in plan:
        following = current.after(move)
        ends = [box for box in following.boxes if box not in current.boxes]
        if ends and pushing and lines[-1][0] == move:
            lines[-1] = (move, lines[-1][1], ends[0])
        elif ends:
            lines.append((move, current.player, ends[0]))
        current, pushing = following, bool(ends)
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    return comma.join(f"{at(stand)}-{at(end)}" for _, stand, end in lines) + stop


def play_steps(level: Level, plan: Sequence[str], language: str) -> str:
    """'left 22, down 32, right 33 box 34.': each move with the new squares of the player and of a pushed box."""
    steps, current = [], level
    for move in plan:
        following = current.after(move)
        pushed = [at(box) for box in following.boxes if box not in current.boxes]
        words = (f"{move} {at(following.player)}", f"{CHINESE[move]}{at(following.player)}")[language == "zh"]
        box = ("".join(f" box {square}" for square in pushed), "".join(f"箱子{square}" for square in pushed))[language == "zh"]
        steps.append(words + box)
        current = following
    return ", ".join(steps) + "." if language == "en" else "，".join(steps) + "。"


def plan_text(moves: Sequence[str], language: str) -> str:
    """A plan as an answer: 'up, left, left', '上，左，左'."""
    return ", ".join(moves) if language == "en" else "，".join(CHINESE[move] for move in moves)


# ---------------------------------------------------------------- rewards for RL


def solved(start: Level, answer: str) -> float:
    """1 if the plan solves the level, else 0."""
    moves = moves_of(answer)
    return float(moves is not None and play(start, moves).end.solved)


def hackable(start: Level, answer: str) -> float:
    """The shaped reward published with LMM-R1: it adds 0.05 a move for up to 20 moves, and 0.001 a word for up to 200 words.

    So twenty moves up and down with two hundred words earn as much as solving a short level, without touching a box.
    The caller adds the half point for the format.
    """
    inside = body(answer) or ""
    moves = sum(word in MEANING for word in re.split(r"[\s,，、.。]+", inside.lower()))
    return solved(start, answer) + 0.05 * min(moves, 20) + 0.001 * min(len(answer.split()), 200)


def potential(start: Level, answer: str) -> float:
    """`solved`, plus half the share of the distance to the targets by which the boxes came nearer.

    It is the sum over moves of phi(after) - phi(before), with phi = -distance / (2 * first distance). Detours cancel out, so
    the reward cannot be farmed (Ng, Harada and Russell 1999).
    """
    moves = moves_of(answer)
    if moves is None:
        return 0.0
    nearer = (start.distance() - play(start, moves).end.distance()) / start.distance()
    return solved(start, answer) + 0.5 * nearer


REWARDS = {"solved": solved, "hackable": hackable, "potential": potential}


@TASKS.register("sokoban")
class Sokoban(ReasoningTask):
    """Mini-Sokoban of 6 x 6 squares: the full plan from the first picture, scored by playing it.

    rows    problems to learn from in stage 2, 1,000 by default; RL begins after them
    boxes   boxes and targets: 1, or 2, which is much harder
    walls   inner walls
    most    maximum length of a level's shortest plan
    reward  the reward in RL: solved, hackable (the published reward of LMM-R1), or potential; scores are always `solved`
    plays   more rows, of four levels in words: levels and pushes are prefilled and the moves are learned, where most plans fail
    """

    name = "sokoban"

    def __init__(self, rows: int = 1_000, text: bool | None = None, boxes: int = 1, walls: int = 1, most: int = 6,
                 reward: str = "solved", first: int = 0, plays: int = 0, direct: float = 0.0, new_words: bool = False):
        super().__init__(rows, text, first, direct, new_words)
        self.plays = plays
        if reward not in REWARDS:
            raise UserError(f"sokoban: reward is one of {', '.join(REWARDS)}, not {reward!r}")
        if boxes < 1 or most < 1 or 2 * boxes + walls >= SIDE * SIDE:
            raise UserError(f"sokoban:boxes={boxes},walls={walls},most={most}: a plan has a move or more, and a level a box or "
                            f"more, with a goal for each, on {SIDE * SIDE} squares")
        self.boxes, self.walls, self.most, self.reward_function = boxes, walls, most, REWARDS[reward]

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows + self.plays, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        """Level i with its reasoning; after `rows` levels come the rows that only play."""
        return super().row(i) if i < self.rows else self.playing(i - self.rows)

    def playing(self, i: int) -> Conversation:
        """Four levels in words that no other row has: squares and pushes are prefilled, the moves are learned."""
        language = random.Random(f"sokoban/playing/{i}").choice(LANGUAGES)
        space = " " if language == "en" else ""
        parts: list[str] = []
        for k in range(LEVELS_PER_PLAY * i, LEVELS_PER_PLAY * (i + 1)):
            start, plan = level("train", FIRST_PLAY + k, self.boxes, self.walls, self.most)
            prefill = listed(start, language) + space + push_lines(start, plan, language)
            parts += [Prefill(space * bool(parts) + prefill), space + play_steps(start, plan, language)]
        return Conversation(f"sokoban/playing/{i}", (Message("user", (PLAY[language],)), Message("assistant", tuple(parts))))

    def problem(self, split: str, i: int) -> ReasoningProblem:
        rng = random.Random(f"sokoban/drawing/{split}/{i}")
        start, plan = level(split, i, self.boxes, self.walls, self.most)
        language, seed = rng.choice(LANGUAGES), rng.random()
        question = ASK[language]
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = listed(start, language) + (" " if language == "en" else "") + question
        else:
            pictures = (drawn(f"sokoban:{start.rows()}", lambda drawing_rng: drawings.board(start.rows(), drawing_rng), seed),)
        squares, pushes = listed(start, language), push_lines(start, plan, language)
        thoughts = (" " if language == "en" else "").join((squares, pushes, play_steps(start, plan, language)))
        kind = f"{self.boxes}_box" + "es" * (self.boxes > 1)
        state = ("sokoban", *start.rows())
        return ReasoningProblem(kind, language, pictures, question, thoughts, plan_text(plan, language), state, squares)

    def guess(self, examples: Sequence[Example]) -> float:
        """The share solved by the best single plan: of the plans of 100 validation levels, the one that solves most of those."""
        levels = [level("val", i, self.boxes, self.walls, self.most) for i in range(100)]
        plan = max((plan for _, plan in levels), key=lambda plan: sum(play(start, plan).end.solved for start, _ in levels))
        return sum(play(self.level(example)[0], plan).end.solved for example in examples) / len(examples)

    def level(self, example: Example) -> tuple[Level, tuple[str, ...]]:
        """The level of an example, and a shortest plan for it."""
        _, split, index = example.prompt.id.split("/")
        return level(split, int(index), self.boxes, self.walls, self.most)

    def score(self, example: Example, answer: str) -> float:
        return solved(self.level(example)[0], answer)

    def reward(self, example: Example, answer: str) -> float:
        """The reward in RL, without that for the format."""
        return self.reward_function(self.level(example)[0], answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """Shares of answers, the mean number of moves, and `solved` for each language and form.

        near_optimal   solved with at most two moves more than needed
        legal          only moves, and each of them changed the level
        untouched      no box was pushed
        """
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

"""Mini-Sokoban against a second implementation that edits rows of signs, and a search that knows nothing of the first."""

import random
import re
from itertools import product

import pytest

from dataset.chat import Prefill
from dataset.tasks import sokoban
from dataset.tasks.sokoban import MOVES, Level, Sokoban, level, moves_of, play, shortest_plan

TASK = Sokoban()
BOARD = ["      ", " @$ . ", "  #   ", "      ", "      ", "      "]


def moved(rows: list[str], move: str) -> list[str]:
    """One move on a board of signs: turn the board until it is a move to the right, move within one string, turn it back."""
    turns = {"right": 0, "up": 1, "left": 2, "down": 3}[move]
    for _ in range(turns):
        rows = ["".join(column) for column in zip(*rows[::-1])]  # a quarter clockwise
    made = []
    for row in rows:
        here = next((i for i, sign in enumerate(row) if sign in "@+"), None)
        if here is not None:
            tail = row[here:]
            left = " " if tail[0] == "@" else "."
            if tail[1:2] in (" ", "."):
                tail = left + {" ": "@", ".": "+"}[tail[1]] + tail[2:]
            elif tail[1:2] in ("$", "*") and tail[2:3] in (" ", "."):
                tail = left + {"$": "@", "*": "+"}[tail[1]] + {" ": "$", ".": "*"}[tail[2]] + tail[3:]
            row = row[:here] + tail
        made.append(row)
    for _ in range((4 - turns) % 4):
        made = ["".join(column) for column in zip(*made[::-1])]
    return made


def test_the_second_implementation_moves_right_and_up():
    assert moved(BOARD, "right")[1] == "  @$. " and moved(BOARD, "up")[0] == " @    "
    assert moved(BOARD, "left")[1] == "@ $ . " and moved(BOARD, "down")[2] == " @#   "


def test_random_walks_agree_with_the_second_implementation():
    rng = random.Random(0)
    for i in range(60):
        made, _ = level("train", i, boxes=1 + i % 2, walls=1 + i % 3, most=6)
        rows = made.rows()
        for _ in range(40):
            move = rng.choice(list(MOVES))
            made, rows = made.after(move), moved(rows, move)
            assert made.rows() == rows
            assert made.solved == ("$" not in "".join(rows))
        assert Level.read(rows) == made


def test_plans_are_shortest():
    """No plan of fewer moves solves the level: all of them are tried on the second implementation."""
    for i in range(40):
        made, plan = level("val", i, boxes=1, walls=1, most=6)
        assert play(made, plan).end.solved and len(plan) <= 6
        frontier = [made.rows()]
        for _ in range(len(plan) - 1):
            frontier = [list(rows) for rows in {tuple(moved(rows, move)) for rows, move in product(frontier, MOVES)}]
            assert all("$" in "".join(rows) for rows in frontier)


def test_a_level_without_a_plan_has_none():
    stuck = Level.read(["$    .", "@     ", *["      "] * 4][:6])
    assert shortest_plan(stuck, 6) is None
    far = Level.read(["      ", " @$   ", "      ", "      ", "     .", "      "])
    assert shortest_plan(far, 4) is None and len(shortest_plan(far, 20)) > 4


def test_splits_share_no_level():
    found = {split: {tuple(level(split, i, 1, 1, 6)[0].rows()) for i in range(400)} for split in ("train", "val", "test")}
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    assert all(len(levels) > 395 for levels in found.values())


def test_what_is_wanted_names_every_straight_line_of_pushes():
    made = Level.read(["      ", "  @   ", "  $   ", "     .", "      ", "      "])
    plan = ["left", "down", "right", "right", "right", "up", "right", "down"]  # the box goes right three times, then down
    assert play(made, plan).end.solved
    assert sokoban.push_lines(made, plan, "en") == "32-36, 26-46." and sokoban.push_lines(made, plan, "zh") == "32-36，26-46。"
    around = ["left", "down", "right", "left", "right", "right"]  # lets go of the box for a while: two lines in one direction
    assert sokoban.push_lines(made, around, "en") == "32-34, 33-35."


@pytest.mark.parametrize("task", [TASK, Sokoban(boxes=2, rows=20)])
def test_demonstrations_solve_their_level_in_both_languages(task):
    rows, languages = task.train("sft"), set()
    for i in range(20):
        answer = rows[i].messages[-1].text
        made, plan = level("train", i, task.boxes, 1, 6)
        assert moves_of(answer) == list(plan)
        thoughts = answer.partition("</think>")[0]
        assert thoughts.count("推到") == 0 and sokoban.at(made.player) in thoughts
        ends = play(made, plan).end.boxes
        assert all(sokoban.at(box) in thoughts for box in ends)
        languages.add(answer.isascii())
    assert languages == {True, False}


def test_an_answer_is_a_list_of_moves_in_either_language():
    wanted = ["up", "left"]
    for moves in ("up, left", " Up , LEFT.", "上，左", "上、左。", "up left"):
        assert moves_of(f"<think></think><answer>{moves}</answer>") == wanted, moves
    for moves in ("", "up, jump", "uup", "上左", "up; left", "1"):
        assert moves_of(f"<answer>{moves}</answer>") is None, moves
    assert moves_of("up, left") is None and moves_of("<answer>up") is None


def test_any_plan_that_solves_is_right():
    example = TASK.examples("test", 1)[0]
    made, plan = TASK.level(example)
    idle = next(move for move in MOVES if made.after(move) == made or made.after(move).boxes == made.boxes)
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}[idle]
    longer = ([idle] if made.after(idle) == made else [idle, back]) + list(plan)
    assert TASK.score(example, f"<answer>{', '.join(longer)}</answer>") == 1
    assert TASK.score(example, f"<answer>{', '.join(plan[:-1]) or 'up, down'}</answer>") == 0


def test_metrics_written_out():
    examples = TASK.examples("test", 4)
    plans = [list(TASK.level(example)[1]) for example in examples]
    answers = [f"<answer>{', '.join(plans[0])}</answer>", f"<answer>{', '.join([*plans[1], *['up', 'down'] * 20])}</answer>",
               "<answer>fly</answer>", ""]  # fmt: skip
    scores, metrics = TASK.measure(examples, answers)
    assert scores[0] == 1 and scores[2:] == [0, 0]
    assert metrics["untouched"] == 0.5 and metrics["near_optimal"] == 0.25 and metrics["solved"] == sum(scores) / 4
    assert metrics["moves"] == (len(plans[0]) + len(plans[1]) + 40) / 4


def test_the_published_reward_pays_for_words_and_moves_that_touch_nothing():
    hacked = Sokoban(reward="hackable")
    example = hacked.examples("test", 1)[0]
    made, plan = hacked.level(example)
    calm = next(move for move in MOVES if made.after(move).boxes == made.boxes)
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}[calm]
    wordy = f"<think>{'so ' * 250}</think><answer>{', '.join([calm, back] * 12)}</answer>"
    assert hacked.reward(example, wordy) == pytest.approx(1.2) and hacked.score(example, wordy) == 0
    honest = f"<think></think><answer>{', '.join(plan)}</answer>"
    assert hacked.reward(example, honest) == pytest.approx(1 + 0.05 * len(plan) + 0.001 * len(honest.split()))
    assert TASK.reward(example, honest) == TASK.score(example, honest) == 1


def test_the_potential_cannot_be_farmed():
    shaped = Sokoban(reward="potential")
    rng = random.Random(0)
    for example in shaped.examples("val", 20):
        made, plan = shaped.level(example)
        moves = [rng.choice(list(MOVES)) for _ in range(30)]
        here, paid = made, 0.0
        for move in moves:
            there = here.after(move)
            paid, here = paid + 0.5 * (here.distance() - there.distance()) / made.distance(), there
        reward = shaped.reward(example, f"<answer>{', '.join(moves)}</answer>")
        assert reward == pytest.approx(paid + here.solved) and reward <= 1.5
        assert shaped.reward(example, f"<answer>{', '.join(plan)}</answer>") == pytest.approx(1.5)
    with pytest.raises(ValueError, match="solved, hackable, potential"):
        Sokoban(reward="money")


def test_random_bytes_crash_no_reward():
    rng = random.Random(0)
    for name, example in product(sokoban.REWARDS, TASK.examples("test", 5)):
        for _ in range(30):
            noise = rng.randbytes(50).decode("utf-8", errors="replace")
            for answer in (noise, f"<answer>{noise}</answer>", f"<answer>up, {noise}</answer>"):
                assert 0 <= Sokoban(reward=name).reward(example, answer) < 1


def test_one_plan_for_all_levels_solves_few():
    assert TASK.guess(TASK.examples("test", 300)) < 0.1


def test_rows_that_only_play_learn_the_moves_alone_and_solve_their_levels():
    rows = Sokoban(rows=2, plays=3).train("sft")
    assert len(rows) == 5
    for i in range(2, 5):
        boards, learned = rows[i].messages[-1].parts[::2], rows[i].messages[-1].parts[1::2]
        assert all(isinstance(part, Prefill) for part in boards) and not any(isinstance(part, Prefill) for part in learned)
        for k, (board, play_by_play) in enumerate(zip(boards, learned, strict=True)):
            made, plan = level("train", sokoban.FIRST_PLAY + 4 * (i - 2) + k, 1, 1, 6)
            assert all(sokoban.at(square) in board for square in (made.player, *made.boxes, *made.targets, *made.walls))
            moves = [sokoban.MEANING[word] for word in re.findall("|".join(sokoban.MEANING), play_by_play)]
            assert moves == list(plan) and play(made, moves).end.solved

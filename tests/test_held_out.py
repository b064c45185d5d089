"""Held-out rows: which they are, that no stage trains on them, what is measured on them, and that this chooses the checkpoint."""

import dataclasses
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.batches import pictures_of
from dataset.chat import Preference
from dataset.early_stop import early_stop_reason, no_group_differs
from dataset.evaluation import make_tasks
from dataset.formats.conversations import conversation
from dataset.formats.gold_answers import gold
from dataset.held_out import Rows, indices, place, place_of, places, threshold
from dataset.images import Picture
from dataset.mixture import Mixture, files_of, load, mixture, split
from dataset.own_rows import OwnRows, Verdicts, chosen_by, gold_text, measuring, scored
from dataset.preferences import load_preferences
from dataset.problems import problems
from dataset.report import sheet
from dataset.rewards import Reward, reward_function
from dataset.rollouts import Group, Rollout, stats
from dataset.tasks import Example, Truncated, dialogue
from model import cli
from model.best import mean_loss
from model.registry import Default, UserError
from tests.conftest import ROOT, TINY
from tests.miniatures import OPENAI, lines, llava, picture, talk
from tests.test_scripts import log_of

FOLDER = "/pictures"


# ---------------------------------------------------------------- which rows are held out


@pytest.mark.parametrize(("rows", "share", "held"), [
    (10_000, 0.02, 200), (800, 0.02, 16), (100, 0.02, 16), (40, 0.02, 16), (32, 0.02, 16), (30, 0.02, 15), (5, 0.02, 2),
    (2, 0.02, 1), (1, 0.02, 0), (0, 0.02, 0), (1000, 0.0, 0), (100, 0.3, 30), (100, 0.5, 50),
])  # fmt: skip
def test_a_share_is_held_out_at_least_sixteen_rows_and_at_most_half(rows, share, held):
    places = (np.arange(rows) + 0.5) / max(1, rows)  # as evenly as a hash in the mean
    np.random.default_rng(0).shuffle(places)
    assert (places < threshold(places, share)).sum() == held


def test_more_than_half_is_refused_and_equal_rows_are_never_divided():
    with pytest.raises(UserError, match="--val_share is a share of the rows, 0 to 0.5, not 0.7"):
        threshold(np.linspace(0, 0.99, 10), 0.7)
    assert threshold(np.full(9, 0.01), 0.02) <= 0.01, "nine times the same question: it is trained"
    found = np.array([-1.0, -1.0, 0.1, 0.1, 0.2, 0.9])  # two cannot be read
    assert (found[2:] < threshold(found, 0.02)).tolist() == [True, True, False, False]


def row(question="What?", answer="A bus.", image="a.png", stamp=":10:7", **more) -> float:
    def find(name: str) -> Picture:
        return Picture(f"{FOLDER}/{name}{stamp}", lambda: None, origin=name)

    turns = talk(f"<image>\n{question}" if image else question, answer)
    return place(conversation({"image": image, "conversations": turns, **more}, "r:1", find, False), FOLDER)


def test_a_place_is_that_of_the_first_picture_whatever_is_asked_about_it():
    same = row()
    assert 0 <= same < 1
    assert same == row(answer="A cat.") == row(id="7") == row(stamp=":11:99") == row(question="Where?")
    assert same == row(image="./a.png") == row(image="/pictures/a.png") == row(image="file:///pictures/deep/../a.png")
    assert same == row(question="<image> and?", image=["a.png", "b.png"])
    assert len({same, row(image="b.png"), row(image="deep/a.png"), row(image="/other/a.png")}) == 4


def test_a_place_without_a_picture_is_that_of_the_question():
    same = row(image=None)
    assert same == row(image=None, answer="A cat.") == row(image=None, id="7") != row(image=None, question="Where?")
    prompt = conversation({"messages": talk("What?", "", OPENAI)[:1]}, "x", None, False)
    assert place(prompt, FOLDER) == place(Preference("x", prompt, "good", "bad"), FOLDER) == same
    texts = [conversation({"text": text}, "x", None, False) for text in ("one", "two")]
    assert place(texts[0], FOLDER) != place(texts[1], FOLDER), "text alone is its own question"


FORMS_OF_A_ROW = [
    {"image": "{}", "conversations": talk("<image>\nWhat?", "A bus.")},
    {"images": ["{}"], "messages": talk("What?", "x", OPENAI)}, {"file_name": "{}", "text": "A bus."},
    {"image": "{}", "question": "What?", "answer": "x"}, {"image": "{}", "caption": "A bus."},
    {"Image": "{}", "question": "What?", "answer": ["x"]}, {"image": "{}, b.png", "question": "What?", "answer": "x"},
    {"conversations": talk("<img>{}</img>What?", "x")}, {"image": {"path": "{}"}, "question": "What?", "answer": "x"},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "{}"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "x"}]},
    {"image": "{}", "conversations": json.dumps(talk("<image>\nWhat?", "A bus."))},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS_OF_A_ROW)
def test_a_picture_has_one_place_in_every_form_and_one_walk_finds_what_rows_hold(form, tmp_path):
    picture(tmp_path / "a.png", "red"), picture(tmp_path / "b.png", "blue")
    names = ["a.png", "./a.png", str(tmp_path / "a.png")]
    source = load(lines(tmp_path / "rows.jsonl", [json.loads(json.dumps(form).replace("{}", name)) for name in names]))
    found = places(source, None)
    folder = tmp_path.as_posix()
    assert len(set(found)) == 1 and found[0] == place_of("a.png") == place(source[0], folder)
    for i in range(3):
        assert [one.key for one in source.pictures(i)] == [one.key for one in source[i].pictures]
    mixed = Mixture([(source, 2)])
    assert [one.key for one in pictures_of(mixed, 5)] == [one.key for one in mixed[5].pictures]
    assert source.names[0] in (None, ("a.png",), ("a.png", "b.png"))


def test_rows_of_the_common_forms_are_placed_without_being_parsed(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", "red")
    rows = [{"id": k, "image": "a.png", "conversations": talk(f"<image>\n{k} < 5?", "A bus.")} for k in range(9)]
    source = load(lines(tmp_path / "rows.jsonl", [*rows, {"text": "alone"}]))
    monkeypatch.setattr(source, "parse", lambda fields, where, find: pytest.fail("parsed") if "image" in fields else
                        conversation(fields, where, find, True))  # fmt: skip
    assert len(set(places(source, None))) == 2 and source.names == [("a.png",)] * 9 + [None]
    assert len({id(names) for names in source.names[:9]}) == 1, "equal names are kept once"
    assert [len(source.pictures(i)) for i in range(9)] == [1] * 9


def test_all_questions_about_a_picture_land_on_one_side_in_every_file(tmp_path):
    for k in range(30):
        picture(tmp_path / f"{k}.png", "red")
    files = [lines(tmp_path / f"{name}.jsonl", [{"image": f"{k // 3}.png", "question": f"{name} {k}?", "answer": "x"}
                                                for k in range(90)]) for name in "ab"]  # fmt: skip
    trained, rows = split(mixture([str(file) for file in files], "sft", None, False), flags(0.2), lambda text: None)
    sides = [{one.pictures[0].key for one in part} for part in (trained, Rows(rows))]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30 and len(trained) + len(rows) == 180 and len(rows) >= 32


def test_one_picture_is_never_divided_and_the_user_is_told(tmp_path):
    picture(tmp_path / "a.png", "red")
    file = lines(tmp_path / "rows.jsonl", [{"image": "a.png", "question": f"{k}?", "answer": "x"} for k in range(40)])
    trained, held, printed = divided(file)
    assert len(trained) == 40 and not held
    assert printed == ["no row is held out: the 40 rows of files are too few, or show or ask the same"]


def questions(folder: Path, numbers, name: str = "rows.jsonl", answer: str = "yes") -> Path:
    folder.mkdir(exist_ok=True)
    return lines(folder / name, [llava(f"Is it {k}?", answer, id=str(k)) for k in numbers])


def flags(share: float = 0.02, data: tuple = ()) -> SimpleNamespace:
    return SimpleNamespace(val_share=share, val_data=tuple(map(str, data)), image_folder=None, allow_urls=False)


def asked(source) -> list[str]:
    return sorted(one.messages[0].text for one in (source[i] for i in range(len(source))))


def divided(*specs, **given) -> tuple[list[str], list[str], list[str]]:
    """(questions that are trained, held-out questions, what was printed)."""
    printed: list[str] = []
    trained, rows = split(mixture([str(spec) for spec in specs], "sft", None, False), flags(**given), printed.append)
    return asked(trained), asked(Rows(rows)), printed


def test_every_row_is_trained_or_held_out_whatever_the_order_of_the_file(tmp_path):
    numbers = list(range(300))
    trained, held, printed = divided(questions(tmp_path, numbers))
    assert len(held) >= 16 and sorted(trained + held) == sorted(f"Is it {k}?" for k in numbers)
    assert printed == [f"held out: {len(held)} of 300 rows of files, not trained (--val_share 0.02)"]
    random.Random(1).shuffle(numbers)
    assert divided(questions(tmp_path, numbers, "other.jsonl"))[1] == held
    assert divided(questions(tmp_path, numbers, answer="no"))[1] == held
    assert divided(tmp_path / "rows.jsonl", share=0.0) == (sorted(trained + held), [], [])


def test_a_weight_repeats_the_rows_that_are_trained_and_tasks_stay_as_they_are(tmp_path):
    trained, held, _ = divided(f"{questions(tmp_path, range(40))}:2", "text:rows=5")
    assert len(held) == 16 and len(trained) == 2 * 24 + 5 and not set(held) & set(trained)


def test_equal_questions_land_on_one_side_in_one_file_in_several_and_in_the_files_of_a_folder(tmp_path):
    trained, held, _ = divided(questions(tmp_path, [*range(100), *range(100)]))
    assert not set(held) & set(trained) and 16 <= len(held) <= 18 and len(set(held)) == len(held) / 2
    questions(tmp_path / "folder", range(50), "a.jsonl")
    questions(tmp_path / "folder", range(30, 90), "b.jsonl")
    trained, held, _ = divided(tmp_path / "folder")
    assert len(trained) + len(held) == 110 and not set(held) & set(trained) and len(held) in range(16, 30)
    both = divided(tmp_path / "folder" / "a.jsonl", tmp_path / "folder" / "b.jsonl")
    alone = [divided(tmp_path / "folder" / name)[1] for name in ("a.jsonl", "b.jsonl")]
    assert set(both[1]) == set(alone[0]) | set(alone[1]) and not set(both[0]) & set(both[1])


def test_script_4_finds_the_rows_that_training_held_out(tmp_path):
    file = questions(tmp_path, range(200))
    source = load(file, need_answer=False)
    found = indices(source, 0.02, None)
    assert sorted(source[i].messages[0].text for i in found) == divided(file)[1]
    assert indices(source, 0, None) == list(range(200))


def test_rows_of_another_file_are_held_out_and_those_that_ask_the_same_are_not_trained(tmp_path):
    file, other = questions(tmp_path, range(50)), questions(tmp_path, range(45, 60), "val.jsonl", answer="no")
    trained, held, printed = divided(file, data=[other])
    assert held == sorted(f"Is it {k}?" for k in range(45, 60)) and trained == sorted(f"Is it {k}?" for k in range(45))
    assert printed == ["held out: 15 rows of --val_data; 5 rows of --data show or ask the same and are not trained"]
    assert divided("text:rows=5", data=[other])[1] == held
    with pytest.raises(UserError, match="--val_data holds out rows beside those of --data"):
        split([], flags(data=[other]), print)


def test_a_row_that_cannot_be_read_stays_with_those_that_are_trained_where_it_is_named(tmp_path):
    file = questions(tmp_path, range(40))
    file.write_text(file.read_text() + "not json\n" * 3)
    trained, rows = split(mixture([str(file)], "sft", None, False), flags(), lambda text: None)
    assert len(trained) == 27 and len(rows) == 16
    assert [len(part) for part in trained.sources] == [27] and files_of(Mixture([(load(file), 1)]))


def test_preferences_are_held_out_by_their_prompts(tmp_path):
    rows = [{"prompt": f"Is it {k // 2}?", "chosen": f"Yes {k}.", "rejected": "No."} for k in range(80)]
    source = Mixture([(load_preferences(lines(tmp_path / "pairs.jsonl", rows)), 1)])
    trained, held = split(source, flags(), lambda text: None)
    sides = [{one.prompt.messages[0].text for one in part} for part in (trained, Rows(held))]
    assert len(held) == 16 and len(sides[1]) == 8 and not sides[0] & sides[1]


# ---------------------------------------------------------------- what is asked, and what chooses


@pytest.mark.parametrize(("bench", "data", "tasks"), [
    (Default("world"), ("rows.jsonl", "more:2"), []), (Default("world"), ("world", "rows.jsonl"), ["world"]),
    (Default("world"), ("world:rows=9",), ["world"]), (Default("world"), (), ["world"]), ("world", ("rows.jsonl",), ["world"]),
    ("", ("world",), []),
])  # fmt: skip
def test_tasks_are_not_asked_where_all_data_are_files_unless_the_user_asks_for_them(bench, data, tasks):
    assert list(make_tasks(bench, data)) == tasks


def test_a_benchmark_in_a_file_of_flags_is_one_that_the_user_asks_for(tmp_path):
    @dataclasses.dataclass
    class Config:
        run: cli.SharedFlags = cli.shared("out", "world", eval_every=0, eval_examples=1, save_every=1, log_every=1)

    (tmp_path / "run.yaml").write_text("bench: world\n")
    given = cli.parse(Config, ["--config", str(tmp_path / "run.yaml")]).run.bench
    assert list(make_tasks(given, ["rows.jsonl"])) == ["world"] and isinstance(cli.parse(Config, []).run.bench, Default)


def test_what_chooses_the_checkpoint_is_what_is_trained():
    ruled, own = ({"held_out": OwnRows([], lambda example, answer: None, ruled=ruled)} for ruled in (True, False))
    assert chosen_by(["rows.jsonl"], ruled) == "held_out/accuracy"
    assert chosen_by(["rows.jsonl", "arithmetic"], ruled) == "accuracy" == chosen_by(["rows.jsonl"], {})
    assert chosen_by(["arithmetic"], own) == chosen_by(["rows.jsonl"], own) == "held_out/reward"


def test_the_command_that_measures_a_run_is_about_its_own_rows(tmp_path):
    file = questions(tmp_path, range(3))
    run = SimpleNamespace(out="out/sft", config=flags())
    assert measuring(run, [f"{file}:2"], "") == f"python 4-eval_chat.py --model out/sft --data {file} --val_share 0.02"
    assert measuring(run, ["world", str(file)], "--bench world") == "python 4-eval_chat.py --model out/sft --bench world"
    assert measuring(run, [str(tmp_path)], "") == "python 4-eval_chat.py --model out/sft"
    run.config.val_data = (str(file),)
    assert measuring(run, ["other.jsonl"], "") == f"python 4-eval_chat.py --model out/sft --data {file}"


def test_the_loss_of_held_out_rows_is_that_of_all_their_learned_tokens():
    from tests import tiny

    model = tiny.vlm()
    run = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), move=lambda batch: batch)
    documents = [tiny.document(length, [], seed) for seed, length in enumerate((9, 4, 17))]
    one = {**tiny.flat(documents), "ids": ["a", "b", "c"]}
    several = [{**tiny.flat([document]), "ids": ["x"]} for document in documents]
    whole = mean_loss(model, run, [one])
    assert mean_loss(model, run, several) == pytest.approx(whole, rel=1e-5) and whole["held_out/n"] == 3
    assert mean_loss(model, run, []) == {}, "nothing is known, and nothing is the best"


# ---------------------------------------------------------------- verdicts on answers


def form(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


@pytest.mark.parametrize(("truth", "answer", "accuracy", "exact", "has_form"), [
    ("red", "red", 1, 1, 0), ("red", "Red.", 1, 1, 0), ("red", form("red"), 1, 1, 1), ("red", form("blue"), 0, 0, 1),
    ("red", "blue", 0, 0, 0), ("red", "", 0, 0, 0), ("0.5", "1/2", 1, 0, 0), ("B", form("(b)"), 1, 0, 1),
    ("8", "8 or 9", 0, 0, 0), ("$$", "$$", 1, 1, 0), ("$$", "8", 0, 0, 0), ("8", Truncated("8"), 0, 1, 0),
    ("红色", "红色。", 1, 1, 0), ("8", "<answer>8</answer>", 1, 1, 0),
])  # fmt: skip
def test_an_answer_is_judged_with_and_without_the_form(truth, answer, accuracy, exact, has_form):
    found = scored(Example(dialogue("", [], [("?", "")]), truth, "file"), answer)
    assert found == {"accuracy": accuracy, "exact": exact, "format": has_form, "truncated": isinstance(answer, Truncated)}


@pytest.mark.parametrize(("more", "truth"), [
    ({}, "A bus."), ({"answer": "bus"}, "bus"), ({"conversations": talk("?", form("bus"))}, "bus"),
    ({"conversations": talk("?", "x")[:1]}, None), ({"conversations": talk("1?", "one") + talk("2?", "two")}, "two"),
])  # fmt: skip
def test_the_gold_answer_of_a_row_is_its_answer_or_the_last_turn_of_the_assistant(more, truth):
    assert gold_text(conversation({**llava("What?", "A bus."), **more}, "r", None, False)) == truth


def test_scores_of_rows_are_means_over_rows_with_an_answer_and_over_the_answers_to_each():
    verdicts = Verdicts()
    assert verdicts.scores("rows.jsonl") == {}
    for truth, answers in (("red", ["red", "blue"]), ("8", [form("8")]), ("", ["anything"])):
        verdicts.add(Example(dialogue("", [], [("?", "")]), truth, "file"), answers)
    expected = {"accuracy": 0.75, "exact": 0.75, "format": 0.5, "truncated": 0.0, "n": 2}
    assert verdicts.scores("rows.jsonl") == {f"rows.jsonl/{name}": value for name, value in expected.items()}
    assert len(verdicts.shown) == 3


def test_the_report_shows_the_value_of_a_reward_that_knows_no_right_and_no_large_picture(tmp_path):
    from PIL import Image

    large = Picture("large", lambda: Image.new("RGB", (4000, 1000)))
    example = Example(dialogue("", [large], [("?", "")]), "8", "file")
    task = OwnRows([example], lambda example, answer: Reward(0.0, 0.0, -1.5), ruled=False)
    text = sheet(tmp_path / "my run", tmp_path / "report.md", [(task, example)], {"answer": ["x"]})
    assert "| -1.50 x |" in text and "![](my%20run/pictures/00-0.png)" in text
    with Image.open(tmp_path / "my run" / "pictures" / "00-0.png") as shown:
        assert shown.size == (192, 48)


# ---------------------------------------------------------------- rewards of one's own


def group(ruled: bool, *rewards: float) -> Group:
    problem = SimpleNamespace(ruled=ruled)
    return Group(problem, [Rollout(None, [0.0] * (k + 1), "x", Reward(min(1.0, max(0.0, value)), 1.0, value))
                           for k, value in enumerate(rewards)])  # fmt: skip


def test_the_log_of_a_reward_of_ones_own_tells_rewards_and_calls_nothing_right():
    facts = stats([group(False, 0.5, 3.0), group(False, -1.0, -1.0, 2.0)])
    assert not [name for name in facts if "right" in name or "wrong" in name or name == "accuracy"]
    assert facts["reward_best"] == 2.5 and facts["reward_worst"] == -0.25 and facts["zero_variance"] == 0
    assert (facts["length_above"], facts["length_below"]) == (2.5, 4 / 3)
    assert {"accuracy", "all_right", "all_wrong"} <= set(stats([group(True, 0.1, 1.1)]))


def test_a_reward_of_ones_own_ends_a_run_only_where_it_tells_no_answers_apart():
    rows = {name: {**stats([group(False, *paid)]), "entropy": 0.1} for name, paid in (("dull", (1, 1)), ("good", (0, 0.5)))}
    assert "all answers have the same reward. Let --reward" in early_stop_reason([rows["dull"]] * 20, 0.005)
    assert early_stop_reason([rows["good"]] * 20, 0.005) is None
    assert "Lower --lr" in early_stop_reason([{**rows["good"], "entropy": 0.001}] * 20, 0.005)


@pytest.mark.parametrize(("facts", "message"), [
    ({"reward": 0.2, "format": 0}, "--reward gives every answer to a problem the same, 0.2"),
    ({"accuracy": 0, "format": 0}, "no answer has the form"), ({"accuracy": 0, "format": 0.5}, "no answer is right: fine-tune"),
    ({"accuracy": 1, "format": 1}, "every answer is right"), ({"accuracy": 0.5, "format": 1}, "answers to a problem are alike"),
])  # fmt: skip
def test_a_run_in_which_no_group_differs_says_why(facts, message):
    assert message in no_group_differs(facts)


def test_problems_of_a_file_are_divided_before_they_are_filtered_and_a_reward_needs_no_gold_answer(tmp_path):
    rows = [{**llava(f"Is it {k}?"), "conversations": talk(f"Is it {k}?", "")[:1], "pass_rate": k / 100} for k in range(100)]
    lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "mine.py").write_text("def size(example, answer):\n    return len(answer)\n")
    config = SimpleNamespace(**vars(flags()), max_bad=1.0, eval_examples=9, bench="", check_data=False)
    run = SimpleNamespace(out=tmp_path, config=config, is_main=True, preview_only=True, print0=lambda text: None)
    given = dict(data=(str(tmp_path / "rows.jsonl"),), problems=1000, reward=f"{tmp_path / 'mine.py'}:size")
    every, own = problems(SimpleNamespace(**given, pass_rates=(0.0, 1.0)), run)
    some, same = problems(SimpleNamespace(**given, pass_rates=(0.0, 0.5)), run)
    assert len(every) == 84 and 30 < len(some) < 60 and not every[0].ruled
    assert [one.prompt.id for one in own.questions] == [one.prompt.id for one in same.questions] and len(own.questions) == 9
    assert own.measure(own.questions[:2], ["abc", "a"]) == ([3.0, 1.0], {"reward": 2.0, "format": 0.0})
    config.bench = "arithmetic"
    mixed = dict(given, data=("arithmetic",), problems=4)
    assert len(problems(SimpleNamespace(**mixed, pass_rates=(0.0, 1.0)), run)[1].questions) > 0, "the task's, by this reward"


def test_a_gold_answer_in_the_last_turn_is_one_for_rl(tmp_path):
    lines(tmp_path / "rows.jsonl", [llava(f"{k} + 1?", str(k + 1)) for k in range(4)])
    config = SimpleNamespace(**vars(flags(share=0.0)), max_bad=0.0, eval_examples=9, bench="", check_data=False)
    run = SimpleNamespace(out=tmp_path, config=config, is_main=True, preview_only=True, print0=lambda text: None)
    found, own = problems(SimpleNamespace(data=(str(tmp_path / "rows.jsonl"),), problems=9, reward="rule",
                                          pass_rates=(0.0, 1.0)), run)  # fmt: skip
    assert own is None and [gold(one.example.answer).value.value for one in found] == [1, 2, 3, 4]
    assert all(one.prompt.messages[-1].role == "user" and one.ruled for one in found)


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """40 rows of one's own about a picture each, and 40 preferences about them."""
    folder = tmp_path_factory.mktemp("own")
    colours = [("red", "blue"), ("blue", "red")] * 20  # the right one, and a wrong one
    names = [picture(folder / f"{k}.png", colour).name for k, (colour, _) in enumerate(colours)]
    lines(folder / "rows.jsonl", [{"image": names[k], "conversations": talk(f"<image>\nWhat colour is number {k}?", colour)}
                                  for k, (colour, _) in enumerate(colours)])  # fmt: skip
    lines(folder / "pairs.jsonl", [{"image": names[k], "question": f"Colour {k}?", "chosen": colour, "rejected": wrong}
                                   for k, (colour, wrong) in enumerate(colours)])  # fmt: skip
    (folder / "mine.py").write_text("def short(example, answer):\n    return -len(answer)\n\n\n"
                                    "def same(example, answer):\n    return 0.25\n")  # fmt: skip
    return folder


OWN = ("--max_steps", 4, "--batch_size", 4, "--log_every", 1, "--device", "cpu")


def held_out_log(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[f"held_out/{name}"] for row in log_of(out) if f"held_out/{name}" in row}


@pytest.fixture(scope="module")
def pretrained(own, run_script, tmp_path_factory):
    """(folder, how it ended): script 1 on own rows, at a learning rate so high that the last step is not the best."""
    folder = tmp_path_factory.mktemp("stages")
    return folder, run_script("1-pretrain_vlm.py", "--encoder", TINY[1], "--data", own / "rows.jsonl", *OWN, "--warmup", 1,
                              cwd=folder)  # fmt: skip


def test_the_loss_of_held_out_rows_is_logged_chooses_the_checkpoint_and_stands_in_the_report(pretrained):
    folder, done = pretrained
    out = folder / "out" / "pretrain"
    losses = held_out_log(out, "loss")
    assert set(losses) == {0, 1, 2, 3, 4} and all(row["held_out/n"] == 16 for row in log_of(out) if "held_out/n" in row)
    best = min(losses, key=losses.get)
    assert f"step {best} is kept: held_out/loss = {losses[best]:.3f}" in done.out and best > 0
    assert "held out: 16 of 40 rows of files, not trained (--val_share 0.02)\n24 rows, 4 steps of 4" in done.out
    scores = json.loads((out / "scores.json").read_text())
    assert scores == {"held_out/loss": pytest.approx(losses[best], rel=1e-4), "held_out/n": 16}, "no task was asked"
    page = (folder / "out" / "report.md").read_text()
    assert "| held_out/loss before |" in page and "What colour is number" in page and "pretrain/pictures/00-0.png" in page


def test_fine_tuning_on_files_asks_a_task_only_where_the_user_names_it(pretrained, own, run_script, tmp_path):
    start = ("--init", pretrained[0] / "out" / "pretrain", "--data", own / "rows.jsonl", *OWN)
    done = run_script("2-sft_vlm.py", *start, "--bench", "easy_vqa", "--eval_examples", 1, "--val_data", own / "rows.jsonl",
                      cwd=tmp_path, expect=1)  # fmt: skip
    assert "the data holds no row" in done.err, "every row is held out"
    done = run_script("2-sft_vlm.py", *start, "--bench", "easy_vqa", "--eval_examples", 1, cwd=tmp_path)
    scores = json.loads((tmp_path / "out" / "sft" / "scores.json").read_text())
    assert {"held_out/loss", "easy_vqa/accuracy"} <= set(scores)
    assert f"Next: python 4-eval_chat.py --model out/sft --data {own / 'rows.jsonl'} --val_share 0.02, " in done.out


def test_two_processes_hold_out_the_same_rows(pretrained, own, run_ranks, tmp_path):
    given = ("--init", pretrained[0] / "out" / "pretrain", "--data", own / "rows.jsonl", *OWN)
    first, second = run_ranks("2-sft_vlm.py", *given, cwd=tmp_path)
    assert "held out: 16 of 40 rows" in first.out and second.out == ""
    assert set(held_out_log(tmp_path / "out" / "sft", "loss")) == {0, 1, 2, 3, 4}
    before = held_out_log(tmp_path / "out" / "sft", "loss")[0]
    kept = min(held_out_log(pretrained[0] / "out" / "pretrain", "loss").values())
    assert before == pytest.approx(kept, rel=1e-3), "stage 2 begins with the checkpoint that was kept, and asks the same rows"


RL = ("--max_steps", 2, "--prompts", 2, "--group_size", 2, "--max_new_tokens", 4, "--resample_rounds", 1, "--eval_every", 1,
      "--device", "cpu")


@pytest.mark.parametrize(("reward", "family", "measure", "message"), [
    ("rule", (), "accuracy", "no answer has the form"), ("mine.py:short", (), "reward", None),
    ("mine.py:same", (), "reward", "--reward gives every answer to a problem the same, 0.25"),
    ("mine.py:short", ("--algo", "dpo", "--pairs", "policy"), "reward", None),
])
def test_rl_is_measured_by_the_reward_that_it_trains(reward, family, measure, message, pretrained, own, run_script, tmp_path):
    path = reward if reward == "rule" else own / reward
    done = run_script("3-rl_vlm.py", *family, "--init", pretrained[0] / "out" / "pretrain", "--data", own / "rows.jsonl", *RL,
                      "--reward", path, cwd=tmp_path)  # fmt: skip
    out = tmp_path / "out" / ("dpo" if family else "grpo")
    found = held_out_log(out, measure)
    assert set(found) == {0, 1, 2}
    best = max(found, key=lambda step: (found[step], -step))
    assert f"step {best} is kept: held_out/{measure} = {found[best]:.3f}" in done.out
    assert ("nothing is learned so far" in done.out) == bool(message) and (message or "") in done.out
    scores = json.loads((out / "scores.json").read_text())
    assert {"held_out/reward", "held_out/format", "held_out/n"} <= set(scores) <= {f"held_out/{name}" for name in (
        "reward", "format", "n", "accuracy")}  # fmt: skip
    names = set().union(*log_of(out))
    assert ("accuracy" in names and "all_wrong" in names) == (reward == "rule")
    assert ({"reward_best", "reward_worst"} <= names) == (reward != "rule")


@pytest.mark.parametrize("more", [(), ("--train.llm", "lora:2"), ("--algo", "simpo")])
def test_dpo_on_files_is_measured_by_the_accuracy_of_held_out_pairs(more, pretrained, own, run_script, tmp_path):
    algo = () if "--algo" in more else ("--algo", "dpo")
    given = (*algo, *more, "--init", pretrained[0] / "out" / "pretrain", "--data", own / "pairs.jsonl", *OWN)
    done = run_script("3-rl_vlm.py", *given, "--lr", 1e-2, "--save_every", 2, cwd=tmp_path)
    out = tmp_path / "out" / "dpo"
    found = held_out_log(out, "accuracy")
    assert set(found) == {0, 1, 2, 3, 4}
    assert found[0] == 0 or "simpo" in more, "the policy is its reference: no chosen answer has a higher implied reward"
    best = max(found, key=lambda step: (found[step], -step))
    assert f"step {best} is kept: held_out/accuracy" in done.out
    assert set(json.loads((out / "scores.json").read_text())) == {f"held_out/{name}" for name in ("accuracy", "margin", "n")}
    assert "Colour" in (tmp_path / "out" / "report.md").read_text()
    again = run_script("3-rl_vlm.py", *given, "--lr", 1e-2, "--save_every", 2, "--resume", cwd=tmp_path)
    assert held_out_log(out, "accuracy") == found and f"step {best} is kept" in again.out


def test_a_file_is_scored_where_its_rows_hold_answers(pretrained, own, run_script):
    folder, _ = pretrained
    given = ("4-eval_chat.py", "--max_new_tokens", 3, "--device", "cpu", "--data")
    done = run_script(*given, own / "rows.jsonl", "--val_share", 0.02, cwd=folder)
    assert "16 predictions, 0 bad rows, in" in done.out and "| rows.jsonl-held_out/accuracy |" in done.out
    scores = json.loads((folder / "out" / "pretrain" / "scores.json").read_text())
    assert scores["rows.jsonl-held_out/n"] == 16 and "held_out/loss" in scores
    assert {f"rows.jsonl-held_out/{name}" for name in ("accuracy", "exact", "format", "truncated")} <= set(scores)
    records = [json.loads(line) for line in (folder / "out" / "pretrain" / "predictions.jsonl").read_text().splitlines()]
    assert {record["answer"] for record in records} <= {"red", "blue"}
    assert all([turn["role"] for turn in record["conversations"]] == ["user"] for record in records), "the answer is not shown"
    right = sum(record["predicted_answer"] == record["answer"] for record in records) / 16
    assert scores["rows.jsonl-held_out/exact"] == right
    page = (folder / "out" / "report.md").read_text()
    assert "## rows.jsonl-held_out, answered by pretrain" in page
    lines(folder / "asked.jsonl", [{"messages": talk("What?", "", OPENAI)[:1]}] * 2)
    assert "holds no answers, so its rows are not scored" in run_script(*given, "asked.jsonl", cwd=folder).out


def test_a_quick_benchmark_replaces_neither_fuller_scores_nor_what_the_report_says_of_other_tasks(pretrained, run_script):
    folder, _ = pretrained
    given = ("4-eval_chat.py", "--max_new_tokens", 2, "--device", "cpu", "--controls", 0, "--bench")
    run_script(*given, "text", "--examples", 6, cwd=folder)
    scores = json.loads((folder / "out" / "pretrain" / "scores.json").read_text())
    done = run_script(*given, "text", "--examples", 2, cwd=folder)
    assert f"not stored: out/pretrain/scores.json and out/report.md keep text on {scores['text/n']} questions" in done.out
    assert json.loads((folder / "out" / "pretrain" / "scores.json").read_text()) == scores
    run_script(*given, "world", "--examples", 1, cwd=folder)
    page = (folder / "out" / "report.md").read_text().partition("## Test scores of pretrain\n")[2]
    assert "### text" in page and "### world" in page and f"| text/n | {scores['text/n']} |" in page and "| world/n |" in page
    run_script(*given, "text", "--examples", 7, cwd=folder)
    assert json.loads((folder / "out" / "pretrain" / "scores.json").read_text())["text/n"] > scores["text/n"]


def test_the_reward_in_the_documentation_is_one(tmp_path):
    page = (ROOT / "dataset" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# my_file\.py\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_file.py").write_text(code)
    reward = reward_function(f"{tmp_path / 'my_file.py'}:short_and_right")
    example = Example(dialogue("row", [], [("What colour?", "")]), "red", "file")
    paid = [reward(example, answer).total for answer in ("red", "It is red.", "blue", Truncated("red"))]
    assert paid == pytest.approx([0.997, 0.99, -0.004, 0.0])

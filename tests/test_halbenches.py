"""Object HalBench, MMHal-Bench, RefoMB and AMBER on small files in the official formats; every number by hand."""

import base64
import json
import re
import runpy
import shutil
import sys

import pytest

from dataset.evaluation import evaluate
from dataset.judge import Failure
from dataset.report import table
from dataset.studies.rescore import rescore
from dataset.tasks import amber, mmhal, object_halbench, refomb
from model.registry import TASKS, specs
from tests.miniatures import lines, picture


class FakeJudge:
    """A judge that answers with `reply(text)` and keeps what it was asked."""

    model = "fake"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    tokens = 0

    def ask(self, questions, read=str):
        texts = [messages[-1]["content"] for messages in questions]
        self.asked += texts
        return [self.reply(text) for text in texts]


def judged(task, reply):
    task.judge = FakeJudge(reply)
    return task


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# ---------------------------------------------------------------- Object HalBench


@pytest.mark.parametrize(("text", "found"), [
    ("A man walks two dogs.", {"man": "person", "dog": "dog"}),
    ("Men, women and people; a child.", {"man": "person", "woman": "person", "person": "person", "child": "person"}),
    ("A hot dog on a plate.", {"hot dog": "hot dog"}),
    ("Hot dogs and a Teddy-Bear near the fire hydrant", {"hot dog": "hot dog", "teddy bear": "teddy bear",
                                                         "fire hydrant": "fire hydrant"}),
    ("Buses wait at the bus stop; the train station is empty.", {"bus": "bus"}),
    ("The toilet seat is up.", {"toilet seat": "toilet"}),
    ("a seat by the window", {"seat": "chair"}),
    ("The seat of the toilet is up.", {"toilet": "toilet"}),
    ("A doctor, two thieves and a vessel", {"doctor": "person", "thief": "person", "vessel": "boat"}),
    ("under a streetlight", {"streetlight": "traffic light"}),
    ("a male lion and a computer game", {}),
    ("A recliner and ravens", {"recliner": "couch", "raven": "bird"}),
    ("An orange cat and two oranges.", {"cat": "cat", "orange": "orange"}),
    ("An orange lies on a table.", {"orange": "orange", "table": "dining table"}),
    ("An orange.", {"orange": "orange"}),
    ("a baseball player swings a bat", {"player": "person", "bat": "baseball bat"}),
    ("a baseball flying past", {"baseball": "sports ball"}),
    ("Knives, mice, sheep, skis and scissors", {"knife": "knife", "mouse": "mouse", "sheep": "sheep", "skis": "skis",
                                                "scissors": "scissors"}),
    ("Firemen beside a truck, a scar, a carpet and a cartoon", {"fireman": "person", "truck": "truck"}),
    ("A cell phone, a TV and a laptop computer", {"cell phone": "cell phone", "tv": "tv", "laptop computer": "laptop"}),
    ("", {}),
])  # fmt: skip
def test_the_rule_reads_objects_off_a_text(text, found):
    assert object_halbench.objects(text) == found


def test_the_classes_are_the_80_of_coco_and_each_is_found_by_its_own_name():
    assert len(object_halbench.classes()) == 80
    for name in object_halbench.classes():
        assert object_halbench.objects(f"There is a {name}.").get(name) == name


def test_rsp_and_men_by_hand():
    named = [{"man": "person", "boy": "person", "dog": "dog"}, {"cat": "cat", "kitten": "cat"}, {}, {"car": "car"}]
    present = [{"person", "bench"}, {"dog"}, {"bus"}, {"car", "truck"}]
    # absent: dog, cat, kitten, in two of three answers that name anything; of six names; covered: person and car of six
    assert object_halbench.summary(named, present) == {
        "rsp": 2 / 3, "men": 3 / 6, "cover": 2 / 6, "answers_with_objects": 3}  # fmt: skip


def coco(folder) -> None:
    """Pictures 9, 25 and 30: masks of a person and a bench; of nothing, with a dog in a caption; of a cup, in the train half."""
    folder.mkdir()
    (folder / "instances_val2014.json").write_text(json.dumps({
        "images": [{"id": 9}, {"id": 25}], "categories": [{"id": 1, "name": "person"}, {"id": 15, "name": "bench"}],
        "annotations": [{"image_id": 9, "category_id": 1}, {"image_id": 9, "category_id": 15}, {"image_id": 9, "category_id": 1},
                        {"image_id": 77, "category_id": 1}]}))  # fmt: skip
    (folder / "instances_train2014.json").write_text(json.dumps({
        "images": [{"id": 30}], "categories": [{"id": 47, "name": "cup"}],
        "annotations": [{"image_id": 30, "category_id": 47}]}))  # fmt: skip
    (folder / "captions_val2014.json").write_text(json.dumps({
        "images": [{"id": 9}, {"id": 25}],
        "annotations": [{"image_id": 9, "caption": "A man with a kite"}, {"image_id": 25, "caption": "Puppies."},
                        {"image_id": 25, "caption": "Nothing much"}]}))  # fmt: skip


@pytest.fixture
def hal_files(tmp_path):
    """(questions with pictures inside, annotations)"""
    inside = base64.b64encode(picture(tmp_path / "9.jpg", "red").read_bytes()).decode()
    rows = [{"image_id": image, "question": "Provide a thorough description of the picture.", "image": inside}
            for image in (9, "25", 30)]  # fmt: skip
    coco(tmp_path / "annotations")
    return lines(tmp_path / "obj_halbench_300_with_image.jsonl", rows), tmp_path / "annotations"


ANSWERS = ["A woman on a bench flies a kite.", "A dog beside a cat.", "It is dark."]


def test_truth_is_masks_united_with_captions(hal_files):
    there = object_halbench.truths(hal_files[1], {9, 25, 30})
    assert there == {9: {"person", "bench", "kite"}, 25: {"dog"}, 30: {"cup"}}


def test_object_halbench_from_its_file_to_its_numbers(hal_files, capsys):
    task = TASKS.make(f"object_halbench:path={hal_files[0]},annotations={hal_files[1]}")
    shown = {}

    def ask(prompts):
        shown.update({prompt.id: prompt.pictures[0].load().size for prompt in prompts})
        return ANSWERS

    metrics, rows = evaluate("object_halbench", task, "test", ask, task.size)
    assert metrics == {f"object_halbench/{name}": value for name, value in {
        "rsp": 1 / 2, "men": 1 / 5, "cover": 4 / 5, "answers_with_objects": 2, "length": (8 + 5 + 3) / 3, "by_rule": 1,
        "judge_failures": 0, "n": 3}.items()}  # fmt: skip
    assert [row["score"] for row in rows] == [1.0, 0.0, None]
    assert [row["truth"] for row in rows] == ["bench, kite, person", "dog", "cup"]
    assert set(shown.values()) == {(40, 30)}
    assert "objects read by the rule" in capsys.readouterr().out


def test_a_judge_may_read_the_objects_and_its_failures_count_apart(hal_files, capsys):
    task = TASKS.make(f"object_halbench:path={hal_files[0]},annotations={hal_files[1]}")
    replies = iter(['Sure: ["woman", "park bench", "sky"]', "none, I think", "[]"])
    scores, metrics = judged(task, lambda text: next(replies)).measure(task.examples("test", 300), ANSWERS)
    # of three answers one was not judged and one names nothing: one answer without an absent object; person, bench of 3 + 1
    assert metrics == {"rsp": 0, "men": 0, "cover": 2 / 4, "answers_with_objects": 1, "length": 16 / 3, "by_rule": 0,
                       "judge_failures": 1}  # fmt: skip
    assert scores == [1.0, None, None]
    said = capsys.readouterr().out
    assert "objects read by fake" in said and "no list of objects in 'none, I think'" in said


@pytest.mark.parametrize(("reply", "found"), [
    ('["a red car", "two dogs"]', {"car": "car", "dog": "dog"}), ('```json\n["cup"]\n```', {"cup": "cup"}), ("[]", {}),
])  # fmt: skip
def test_a_list_of_objects_is_read_wherever_it_stands(reply, found):
    assert object_halbench.listed(reply) == found


@pytest.mark.parametrize("reply", ["", "car, dog", "[car]", '[{"name": "car"}]', "[1]", '["car"', Failure("asleep")])
def test_what_is_no_list_of_objects_is_a_failure(reply):
    assert isinstance(object_halbench.listed(reply), Failure)


def test_missing_files_are_named_with_their_source(hal_files, tmp_path):
    questions, annotations = hal_files
    make = object_halbench.ObjectHalBench
    with pytest.raises(FileNotFoundError, match="option path= is not set: it wants the question file of Object HalBench"):
        make().examples("test", 3)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        make("nowhere.jsonl").examples("test", 3)
    with pytest.raises(FileNotFoundError, match=r"annotations=\S+ holds no instances_\*.json"):
        make(questions, tmp_path).examples("test", 3)
    (annotations / "captions_val2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions_\*.json"):
        make(questions, annotations).examples("test", 3)


def test_an_image_that_coco_does_not_know_is_an_error(hal_files):
    (hal_files[1] / "instances_train2014.json").unlink()
    with pytest.raises(ValueError, match="1 images, 30 the first"):
        object_halbench.ObjectHalBench(*hal_files).examples("test", 3)


def test_pictures_may_lie_in_a_folder(hal_files, tmp_path):
    rows = lines(tmp_path / "bare.jsonl", [{"image_id": 9, "question": "What?"}])
    with pytest.raises(FileNotFoundError, match="option images= is not set"):
        object_halbench.ObjectHalBench(rows, hal_files[1]).examples("test", 1)
    with pytest.raises(FileNotFoundError, match="holds no COCO_val2014_000000000009.jpg or"):
        object_halbench.ObjectHalBench(rows, hal_files[1], tmp_path).examples("test", 1)
    picture(tmp_path / "COCO_val2014_000000000009.jpg", "blue")
    (example,) = object_halbench.ObjectHalBench(rows, hal_files[1], tmp_path).examples("test", 1)
    assert example.prompt.pictures[0].load().size == (40, 30)


def test_an_answer_of_three_words_names_nothing_and_goes_to_no_judge(hal_files):
    task = object_halbench.ObjectHalBench(*hal_files)
    (example,) = task.examples("test", 1)
    assert task.extracted([example] * 2, ["A red dog.", "Here a red dog."]) == [{}, {"dog": "dog"}]
    assert judged(task, lambda text: '["dog"]').extracted([example] * 2, ["a dog", "There is a dog."]) == [{}, {"dog": "dog"}]
    assert len(task.judge.asked) == 1


# ---------------------------------------------------------------- MMHal-Bench


@pytest.fixture
def mmhal_file(tmp_path):
    """Nine rows: every type once and the first again; every second picture is named by its id."""
    rows = []
    for i in range(9):
        name = f"id{i}.jpg" if i % 2 else f"flickr_{i}_o.jpg"
        picture(tmp_path / name, "green")
        rows.append({"question_type": mmhal.TYPES[i % 8], "question_topic": "outdoor", "image_id": f"id{i}",
                     "image_src": f"https://c4.staticflickr.com/8/7211/flickr_{i}_o.jpg", "image_content": ["Door", "Building"],
                     "question": f"Question {i}?", "gt_answer": f"Truth {i}.", "model_answer": ""})  # fmt: skip
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    return f"mmhal:path={tmp_path / 'response_template.json'},images={tmp_path}"


@pytest.mark.parametrize(("reply", "mark"), [
    ("It is fine.\nRating: 6", 6), ("**Rating: 0**", 0), ("rating: 3, not informative, no hallucination", 3),
    ("Rating:4.", 4), ("Rating: 5 ... so, Rating: 5", 5), ("Rating - 2", 2),
])  # fmt: skip
def test_a_rating_is_read(reply, mark):
    assert mmhal.rating(reply) == mark


@pytest.mark.parametrize("reply", ["", "I would say 4.", "Rating: 2 or Rating: 3", "Rating: 7", "Rating: 10", "Rating: high",
                                   Failure("asleep")])  # fmt: skip
def test_no_rating_or_several_is_a_failure_and_no_zero(reply):
    assert isinstance(mmhal.rating(reply), Failure)


def test_mmhal_by_hand():
    marks = [6, 0, 3, Failure("x"), 2, 5, 4, 1, 4]
    types = [mmhal.TYPES[i % 8] for i in range(9)]
    assert mmhal.summary(marks, types) == {
        "score": 25 / 8, "hallucination_rate": 3 / 8, "score_attribute": 5, "score_adversarial": 0, "score_comparison": 3,
        "score_relation": 2, "score_environment": 5, "score_holistic": 4, "score_other": 1}  # fmt: skip
    assert mmhal.summary([Failure("x")], ["other"]) == {}


def test_mmhal_from_its_file_to_its_numbers(mmhal_file):
    task = judged(TASKS.make(mmhal_file), lambda text: f"Rating: {re.search('Answer to rate: mark (.)', text)[1]}")
    answers = [f"mark {mark}" for mark in "60?325414"]
    metrics, rows = evaluate("mmhal", task, "test", lambda prompts: answers, task.size)
    expected = {"score": 25 / 8, "hallucination_rate": 3 / 8, "judged": 8, "judge_failures": 1, "n": 9, "score_attribute": 5,
                "score_adversarial": 0, "score_counting": 3, "score_relation": 2, "score_environment": 5, "score_holistic": 4,
                "score_other": 1}  # fmt: skip
    assert metrics == {f"mmhal/{name}": value for name, value in expected.items()}
    assert [row["score"] for row in rows] == [1, 0, None, 3 / 6, 2 / 6, 5 / 6, 4 / 6, 1 / 6, 4 / 6]
    for i, asked in enumerate(task.judge.asked):
        assert all(part in asked for part in ("Door, Building", f"Question {i}?", f"Truth {i}.", answers[i]))
    assert "| mmhal/score_other | 1 |" in table(metrics)  # a rating of 0 to 6 is no share


def test_without_a_judge_answers_are_saved_and_scored_later(mmhal_file, capsys):
    task = TASKS.make(mmhal_file)
    assert "mmhal: answers will be saved and not judged" in capsys.readouterr().out
    metrics, rows = evaluate("mmhal", task, "test", lambda prompts: ["mark 4"] * len(prompts), task.size, controls=2)
    assert metrics == {"mmhal/judged": 0, "mmhal/n": 9}  # no score at all, and no zero
    assert {row["score"] for row in rows} == {None} and rows[3]["answer"] == "mark 4"
    saved = [json.loads(json.dumps(row)) for row in rows]
    later, _ = rescore("mmhal", judged(task, lambda text: "Rating: 4"), saved)
    assert (later["mmhal/score"], later["mmhal/judged"], later["mmhal/n"]) == (4, 9, 9)


def test_the_controls_of_a_judged_task_leave_out_what_failed(mmhal_file):
    task = judged(TASKS.make(mmhal_file), lambda text: "Rating: 3" if "Question 0?" in text else "no idea")
    metrics, _ = evaluate("mmhal", task, "test", lambda prompts: ["x"] * len(prompts), 9, controls=4)
    assert (metrics["mmhal/blank"], metrics["mmhal/shuffled"]) == (0.5, 0.5)


@pytest.mark.filterwarnings("ignore:'dataset.studies.rescore' found in sys.modules")
def test_saved_answers_are_scored_from_the_command_line(hal_files, tmp_path, monkeypatch, capsys):
    """As `python -m dataset.studies.rescore PREDICTIONS TASK` does, without another Python."""
    spec = f"object_halbench:path={hal_files[0]},annotations={hal_files[1]}"
    _, rows = evaluate("object_halbench", TASKS.make(spec), "test", lambda prompts: ANSWERS, 300)
    file = lines(tmp_path / "predictions-object_halbench.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["dataset/studies/rescore.py", str(file), spec])
    runpy.run_module("dataset.studies.rescore", run_name="__main__", alter_sys=True)
    assert "| object_halbench/rsp | 50.0 % |" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["object_halbench/men"] == 1 / 5


# ---------------------------------------------------------------- RefoMB


@pytest.fixture
def refomb_file(tmp_path):
    rows = []
    for i, kind in enumerate(("Coarse Perception", "Coarse Perception", "Creative Writing", "OCR")):
        picture(tmp_path / f"test_{i}.jpg", "white")
        rows.append({"image_url": f"https://thunlp.oss-cn-qingdao.aliyuncs.com/test_{i}.jpg", "question": f"Question {i}?",
                     "description": f"Dense {i}.", "type": kind, "split": "dev", "id": i, "answer": f"GPT-4V {i}."})  # fmt: skip
    lines(tmp_path / "gpt4v_RefoMB_dev_0521.jsonl", rows)
    return f"refomb:path={tmp_path / 'gpt4v_RefoMB_dev_0521.jsonl'},images={tmp_path}"


@pytest.mark.parametrize(("reply", "ours", "points"), [
    ("... [[A]]", "A", 1), ("... [[A]]", "B", 0), ("[[B]]", "B", 1), ("[[B]]", "A", 0), ("[[C]]", "A", 0.5), ("[[C]]", "B", 0.5),
    ("[[A]], as I said: [[A]]", "A", 1),
])  # fmt: skip
def test_a_verdict_is_read(reply, ours, points):
    assert refomb.verdict(reply, ours) == points


@pytest.mark.parametrize("reply", ["", "A is better", "[[A]] no, [[B]]", "[[D]]", Failure("asleep")])
def test_no_verdict_or_two_is_a_failure(reply):
    assert isinstance(refomb.verdict(reply, "A"), Failure)


def parts(text: str) -> tuple[str, str]:
    return re.search(r"\[Answer of A\]\n(.*)\n\[Answer of B\]\n(.*)\n\[End\]", text).groups()


def test_refomb_by_hand(refomb_file):
    """Ours stands at B: a win, a tie, a loss and no verdict; the reviews find it less, equally and more trustworthy."""
    verdicts = {"0": "[[B]]", "1": "[[C]]", "2": "[[A]]", "3": "?"}
    trust = {"0": "[[B]]", "1": "[[C]]", "2": "[[B]]", "3": "[[A]]"}

    def reply(text):
        number = re.search(r"ours (\d)", text)[1]
        return trust[number] if "[Review]" in text else f"review of ours {number}: {verdicts[number]}"

    task = judged(TASKS.make(refomb_file), reply)
    answers = [f"ours {i}" for i in range(4)]
    metrics, rows = evaluate("refomb", task, "test", lambda prompts: answers, task.size)
    assert metrics == {f"refomb/{name}": value for name, value in {
        "win_rate": 1.5 / 3, "win_rate_coarse_perception": 1.5 / 2, "win_rate_creative_writing": 0, "trust_rate": 2.5 / 4,
        "judged": 3, "judge_failures": 1, "trust_failures": 0, "n": 4}.items()}  # fmt: skip
    assert [row["score"] for row in rows] == [1, 0.5, 0, None]
    first = [text for text in task.judge.asked if "[Review]" not in text]
    assert [parts(text) for text in first] == [(f"GPT-4V {i}.", f"ours {i}") for i in range(4)]
    assert all(f"Dense {i}." in text and f"Question {i}?" in text for i, text in enumerate(first))
    assert sum("review of ours" in text for text in task.judge.asked) == 4


def test_swapping_takes_a_judge_that_likes_the_first_answer_to_one_half(refomb_file):
    def likes_the_first(text):
        return "[[A]]"

    answers = [f"ours {i}" for i in range(4)]
    for swap, rate in (("false", 0), ("true", 0.5)):
        task = judged(TASKS.make(f"{refomb_file},swap={swap}"), likes_the_first)
        _, metrics = task.measure(task.examples("test", 99), answers)
        assert (metrics["win_rate"], metrics["trust_rate"], metrics["judged"]) == (rate, rate, 4)
    assert [parts(text) for text in task.judge.asked[8:12]] == [(f"ours {i}", f"GPT-4V {i}.") for i in range(4)]


def test_swapping_keeps_what_a_fair_judge_says_and_needs_both_verdicts(refomb_file):
    def fair(text):
        if "[Review]" in text:
            return "[[C]]"
        a, b = parts(text)
        if "3" in a and a.startswith("ours"):
            return Failure("asleep")
        better = "ours" if "0" in a else "GPT"
        return "[[A]]" if a.startswith(better) else "[[B]]"

    task = judged(TASKS.make(f"{refomb_file},swap=true"), fair)
    scores, metrics = task.measure(task.examples("test", 99), [f"ours {i}" for i in range(4)])
    assert scores == [1, 0, 0, None]
    assert (metrics["win_rate"], metrics["trust_rate"]) == (1 / 3, 0.5)
    assert (metrics["judge_failures"], metrics["trust_failures"]) == (1, 1)


def test_the_file_without_answers_to_compare_with_is_told_apart(refomb_file, tmp_path, capsys):
    file = tmp_path / "gpt4v_RefoMB_dev_0521.jsonl"
    file.write_text(file.read_text().replace("GPT-4V 2.", ""))
    task = TASKS.make(refomb_file)
    assert "refomb: answers will be saved and not judged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="row 2 has no answer to compare with: it needs gpt4v_RefoMB_dev_0521.jsonl"):
        task.examples("test", 99)
    assert task.measure(task.examples("test", 2), ["a", "b"]) == ([None, None], {"judged": 0})


# ---------------------------------------------------------------- AMBER

RELATED = {"dog": ["puppy"], "person": ["people", "man", "boy"], "man": ["person", "people"], "ship": ["boat"], "sky": [],
           "sun": [], "grass": ["ground"], "leave": [], "light": ["lamp"], "bus": [], "child": ["kid"]}  # fmt: skip


def similar_to(*pairs):
    return lambda a, b: a == b or (a, b) in pairs or (b, a) in pairs


def test_nouns_are_the_words_that_amber_knows():
    vocabulary = set(RELATED) | {"puppy", "people", "boat", "lamp", "kid"}
    assert amber.nouns("Two puppies, a Dog and dogs; people, men & buses. Leaves!", vocabulary) == [
        "puppy", "dog", "dog", "people", "man", "bus", "leave"]  # fmt: skip
    assert amber.nouns("doghouse", vocabulary) == []
    assert amber.nouns("A can, which can be seen: they can fish for a fish.", {"can", "fish"}) == ["can", "fish"]
    assert amber.nouns("Mice, shelves, scarves, knives and sleeves", {"mouse", "shelf", "scarf", "knife", "sleeve"}) == [
        "mouse", "shelf", "scarf", "knife", "sleeve"]  # fmt: skip


@pytest.mark.parametrize(("named", "truth", "likely", "counts"), [
    (["dog", "sky"], ["dog", "sky"], ["sun"], (0, 2, 2, 2, 0, 1)),
    (["puppy", "sun", "sun"], ["dog", "sky"], ["sun", "bus"], (2, 3, 1, 2, 1, 2)),
    (["light"], ["dog"], ["light"], (0, 1, 0, 1, 0, 1)),  # a safe word is a mention and nothing else
    (["boat", "boat"], ["ship", "ship"], [], (0, 2, 1, 2, 0, 0)),  # the second ship stays unnamed, as in the official code
    (["person"], ["man", "person"], [], (0, 1, 1, 2, 0, 0)),  # the man, whose related words come before the person itself
    (["bus"], ["dog"], ["sun"], (1, 1, 0, 1, 0, 1)),
    ([], [], ["sun"], (0, 0, 0, 0, 0, 1)),
])  # fmt: skip
def test_a_description_is_counted_as_the_official_code_counts_it(named, truth, likely, counts):
    assert amber.described(named, truth, likely, RELATED, {"light"}, lambda a, b: False) == amber.Counts(*counts)


def test_near_synonyms_cover_and_hallucinate_as_the_official_code_has_it():
    near = similar_to(("bus", "ship"), ("kid", "sun"))
    assert amber.described(["bus"], ["ship"], [], RELATED, set(), near) == (0, 1, 1, 1, 0, 0)
    assert amber.described(["kid"], ["ship"], ["sun"], RELATED, set(), near) == (1, 1, 0, 1, 1, 1)
    assert amber.described(["bus"], ["ship"], ["bus"], RELATED, set(), near) == (0, 1, 1, 1, 1, 1)  # near both


def test_the_numbers_of_descriptions_are_pooled():
    counts = [amber.Counts(1, 4, 2, 3, 1, 2), amber.Counts(0, 0, 0, 5, 0, 2)]
    assert amber.generative(counts) == {"chair": 1 / 4, "cover": 2 / 8, "hal": 1 / 2, "cog": 1 / 4}


@pytest.fixture
def amber_files(tmp_path):
    """Two descriptions and six questions, one of them of the second name that relations have in the official file."""
    types = ["discriminative-hallucination", "discriminative-attribute-state", "discriminative-attribute-number",
             "discriminative-attribute-action", "discriminative-relation", "relation"]  # fmt: skip
    notes = [{"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["sky", "sun"]},
             {"id": 2, "type": "generative", "truth": ["ship"], "hallu": ["bus"]}]  # fmt: skip
    truths = ("no", "yes", "no", "yes", "yes", "no")
    notes += [{"id": 3 + k, "type": kind, "truth": truth} for k, (kind, truth) in enumerate(zip(types, truths))]
    queries = [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
               {"id": 2, "image": "AMBER_2.jpg", "query": "Describe this image."}]  # fmt: skip
    queries += [{"id": 3 + k, "image": "AMBER_1.jpg", "query": f"Is it {k}?"} for k in range(6)]
    data, images = tmp_path / "data", tmp_path / "image"
    (data / "query").mkdir(parents=True)
    images.mkdir()
    for number in (1, 2):
        picture(images / f"AMBER_{number}.jpg", "blue")
    (data / "annotations.json").write_text(json.dumps(notes[::-1]))  # found by id and not by place
    (data / "relation.json").write_text(json.dumps(RELATED))
    (data / "safe_words.txt").write_text("orange\nlight")
    for name, some in (("all", queries), ("generative", queries[:2]), ("discriminative", queries[2:])):
        (data / "query" / f"query_{name}.json").write_text(json.dumps(some))
    return data, images


SAID = ["A puppy in the sun with people, a light.", "Two boats.", "No.", "no", "maybe", "Yes", "Yes, it is.", "no"]


def test_amber_from_its_files_to_its_numbers(amber_files):
    task = TASKS.make(f"amber:path={amber_files[0]},images={amber_files[1]}")
    metrics, rows = evaluate("amber", task, "test", lambda prompts: SAID, task.size)
    # mentions: puppy, sun, people, light and boat; absent: sun, people. Said no: 3, of which right: 2; truly no: 3
    f1 = 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3)
    expected = {"chair": 2 / 5, "cover": 2 / 3, "hal": 1 / 2, "cog": 1 / 3, "accuracy": 4 / 6, "precision": 2 / 3,
                "recall": 2 / 3, "f1": f1, "yes": 2 / 6, "unparsed": 1 / 6, "amber": (1 - 2 / 5 + f1) / 2,
                "near_synonyms": 0, "n": 8}  # fmt: skip
    assert {name: metrics[f"amber/{name}"] for name in expected} == pytest.approx(expected)
    dimensions = ("existence", "attribute", "state", "number", "action", "relation")
    assert [metrics[f"amber/{part}_accuracy"] for part in dimensions] == [1, 1 / 3, 0, 0, 1, 1]
    assert (metrics["amber/attribute_precision"], metrics["amber/attribute_recall"], metrics["amber/relation_f1"]) == (0, 0, 1)
    assert [row["score"] for row in rows] == [0, 1, 1, 0, 0, 1, 1, 1]
    assert rows[0]["truth"] == "dog, grass" and rows[2]["question"] == "Is it 0?"


@pytest.mark.parametrize(("query", "has", "has_not"), [("generative", "chair", "f1"), ("discriminative", "f1", "chair")])
def test_one_half_of_amber_alone(amber_files, query, has, has_not):
    task = TASKS.make(f"amber:path={amber_files[0]},images={amber_files[1]},query=query_{query}.json")
    examples = task.examples("test", task.size)
    _, metrics = task.measure(examples, ["no"] * len(examples))
    assert has in metrics and has_not not in metrics and "amber" not in metrics


def test_missing_files_of_amber_are_missed_before_anything_is_asked(amber_files):
    data, images = amber_files
    task = amber.Amber(data, images)
    for name in ("safe_words.txt", "query/query_all.json", "relation.json", "annotations.json"):
        kept = (data / name).read_text()
        (data / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} of the folder data of github.com/junyangwang0410/AMBER"):
            task.examples("test", 3)
        (data / name).write_text(kept)
    (data / "annotations.json").write_text('[{"id": 99, "type": "generative", "truth": []}]')
    with pytest.raises(ValueError, match="no annotation for query 1"):
        task.examples("test", 3)


def test_near_synonyms_want_spacy_and_its_package(amber_files, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        amber.Amber(*amber_files, spacy="en_core_web_lg")

    def missing(package):
        raise OSError("no such package")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=missing))
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_lg"):
        amber.Amber(*amber_files, spacy="en_core_web_lg")
    vectors = {"people": 1.0, "child": 0.9}

    def load(package):
        def read(word):
            value = vectors.get(word, 9)
            return SimpleNamespace(similarity=lambda other: 1 - abs(value - other.value), value=value)

        return read

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    near = amber.near_synonyms("en_core_web_lg")
    assert near("people", "child") and not near("people", "ship")


# ---------------------------------------------------------------- all of them


def test_the_script_measures_them_and_saves_what_no_judge_has_seen(stage_two, run_script, mmhal_file, refomb_file, tmp_path):
    folder = tmp_path / "workplace"
    shutil.copytree(stage_two[0] / "out" / "sft", folder / "out" / "sft")
    done = run_script("4-eval_chat.py", "--bench", f"hallucination,{mmhal_file},world_pope,{refomb_file}", "--examples", 4,
                      "--controls", 1, "--max_new_tokens", 4, "--device", "cpu", cwd=folder,
                      env={"OPENAI_API_KEY": ""})  # fmt: skip
    scores = json.loads((folder / "out" / "sft" / "scores.json").read_text())
    assert scores["hallucination/malformed"] == 1  # four tokens are no description
    assert {"hallucination/chair_s", "hallucination/cover", "hallucination/length", "hallucination/blank"} <= set(scores)
    assert scores["world_pope/n"] == 24 and "world_pope/adversarial_f1" in scores
    assert (scores["mmhal/judged"], scores["mmhal/n"], scores["refomb/judged"]) == (0, 4, 0) and "mmhal/score" not in scores
    rows = [json.loads(line) for line in (folder / "out" / "sft" / "predictions-mmhal.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["score"] is None and isinstance(row["answer"], str) for row in rows)
    assert "mmhal: answers will be saved and not judged" in done.out
    twice = run_script("4-eval_chat.py", "--bench", "arithmetic,arithmetic:text=true", cwd=folder, expect=None)
    assert twice.status == 1 and "one variant of a task at a time" in twice.err


def test_options_of_several_tasks_are_told_apart():
    text = "world,mmhal:path=a.json,images=b,judge=http://localhost:8000/v1,text,arithmetic:text=true,rows=3"
    assert specs(text) == ["world", "mmhal:path=a.json,images=b,judge=http://localhost:8000/v1", "text",
                           "arithmetic:text=true,rows=3"]  # fmt: skip
    assert specs("world") == ["world"] and specs("") == []


@pytest.mark.parametrize("name", ["object_halbench", "mmhal", "refomb", "amber"])
def test_a_benchmark_is_never_trained_on_and_says_what_it_lacks(name):
    task = TASKS.make(name)
    assert task.train("pretrain") is None and task.train("sft") is None
    with pytest.raises(FileNotFoundError, match="the option path= is not set"):
        task.examples("test", 1)

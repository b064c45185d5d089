"""The eight benchmarks of TinyLLaVA Factory on miniatures of their official files; every score by hand."""

import gc
import json
import re
import runpy

import pyarrow as pa
import pytest
from pyarrow import parquet

from dataset import report
from dataset.answers import Journal
from dataset.benchmarks import ALL, benchmarks, expanded
from dataset.evaluation import evaluate
from dataset.judge import Failure
from dataset.report import table
from dataset.studies.rescore import rescore
from dataset.tasks import gqa, mme, mmmu_answers, mmvet, pope, scienceqa, vqa_score
from dataset.vision.image_processor import OneRank
from model.registry import TASKS, UserError
from tests.conftest import ROOT
from tests.miniatures import lines, picture
from tests.test_halbenches import judged

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def saved(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return file


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(folder / name, "green")


def scored(task, answers, name="x", **options):
    """(metrics, rows) of these answers to all questions; scoring the saved rows again gives the same digits."""
    metrics, rows = evaluate(name, task, "test", lambda prompts: answers, task.size, **options)
    assert rescore(name, task, json.loads(json.dumps(rows)))[0] == metrics
    assert all(value == value for value in metrics.values())  # no NaN
    return {key.partition("/")[2]: value for key, value in metrics.items()}, rows


# ---------------------------------------------------------------- the accuracy of VQA


@pytest.mark.parametrize(("agree", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_one_person_is_left_out_in_turn(agree, score):
    people = ["cat"] * agree + [f"dog {k}" for k in range(10 - agree)]
    assert vqa_score.vqa_accuracy("cat", people) == pytest.approx(score)


@pytest.mark.parametrize(("text", "vqa", "m4c"), [
    ("The dogs.", "dogs", "dogs"), ("Two", "2", "2"), ("NONE", "0", "0"), ("a\tcat\nand an owl", "cat and owl", "cat and owl"),
    ("dont", "don't", "don't"), ("shouldntve", "shouldntve", "shouldntve"), ("shouldn'tve", "shouldn't've", "shouldn't've"),
    ("somebody'd", "somebodyd", "somebodyd"), ("cat's", "cat's", "cat 's"), ("hes", "he's", "he's"),
    ("t-shirt", "t shirt", "t shirt"), ("black/ white", "black white", "black white"), ("1,000", "1000", "1000"),
    ("red,blue", "red blue", "redblue"), ("1,000 t-shirts", "1000 tshirts", "1000 t shirts"), ("why?not", "why not", "whynot"),
    ("3.14", "3.14", "3.14"), ("5.", "5", "5"), ("$5.00", "$5.00", "$5.00"), ("3:30", "3:30", "3:30"), ("", "", ""),
    ("." * 34 + "x", "..x", "..x"), ("狗。", "狗。", "狗。"),
])  # fmt: skip
def test_answers_are_compared_as_the_official_code_compares_them(text, vqa, m4c):
    assert (vqa_score.vqa_normal(text), vqa_score.m4c_normal(text)) == (vqa, m4c)


def test_vqav2_compares_answers_as_they_are_where_all_people_agree_and_textvqa_never():
    assert (vqa_score.vqa_accuracy("yes.", ["yes"] * 10), vqa_score.m4c_accuracy("yes.", ["yes"] * 10)) == (0, 1)
    assert vqa_score.vqa_accuracy("yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_score.vqa_accuracy(" yes\n", ["yes"] * 10) == 1


# ---------------------------------------------------------------- VQAv2


@pytest.fixture
def vqav2_folder(tmp_path):
    asked = [{"question_id": 10, "image_id": 1, "question": "Is it red?"},
             {"question_id": 11, "image_id": 1, "question": "How many?"},
             {"question_id": 20, "image_id": 2, "question": "What is this?"}]  # fmt: skip
    people = {10: ["yes"] * 10, 11: ["2"] * 3 + ["3"] * 7, 20: ["t-shirt"] * 2 + [f"word{k}" for k in range(8)]}
    kinds = {10: ("yes/no", "is it"), 11: ("number", "how many"), 20: ("other", "what is this")}
    notes = [{"question_id": id, "image_id": id // 10, "answer_type": kinds[id][0], "question_type": kinds[id][1],
              "multiple_choice_answer": people[id][-1], "answers": [
                  {"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(people[id])]}
             for id in (20, 11, 10)]  # fmt: skip
    saved(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    saved(tmp_path / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": notes})
    images(tmp_path / "val2014", *(f"COCO_val2014_{k:012d}.jpg" for k in (1, 2)))
    return tmp_path


def test_vqav2_from_its_files_to_its_numbers(vqav2_folder):
    task = TASKS.make(f"vqav2:path={vqav2_folder}")
    metrics, rows = scored(task, ["yes", "Two", "the T shirt."])
    assert metrics == pytest.approx({
        "accuracy": (1 + 0.9 + 0.6) / 3, "yes_no": 1, "number": 0.9, "other": 0.6, "empty": 0, "yes": 1, "unparsed": 0,
        "asked_is_it": 1, "asked_how_many": 0.9, "asked_what_is_this": 0.6, "n": 3})  # fmt: skip
    assert list(metrics)[0] == "accuracy" and rows[0]["question"] == "Is it red?" + SHORT
    assert task.submission(rows) == {}
    metrics, _ = scored(task, ["", "", "maybe"])
    assert (metrics["accuracy"], metrics["unparsed"], metrics["yes"]) == (0, 1, 0) and metrics["empty"] == pytest.approx(2 / 3)
    assert len(task.examples("test", 1)) == 2  # the questions about one picture


@pytest.mark.parametrize("official", [True, False])
def test_vqav2_without_answers_gives_the_file_for_evalai(vqav2_folder, official, capsys):
    images(vqav2_folder / "test2015", "COCO_test2015_000000000007.jpg")
    if official:
        asked = [{"question_id": 70, "image_id": 7, "question": "Why?"}]
        saved(vqav2_folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
        others = [*asked, {"question_id": 80, "image_id": 8, "question": "Who?"}]
        saved(vqav2_folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": others})
    else:
        row = {"question_id": 70, "image": "COCO_test2015_000000000007.jpg", "text": "Why?" + SHORT, "category": "default"}
        lines(vqav2_folder / "llava_vqav2_mscoco_test-dev2015.jsonl", [row])
    task = TASKS.make(f"vqav2:path={vqav2_folder},split=test-dev")
    metrics, rows = scored(task, ["The Rain."])
    assert metrics == {"empty": 0, "n": 1} and rows[0]["score"] is None and rows[0]["question"] == "Why?" + SHORT
    given = [{"question_id": 70, "answer": "rain"}]
    assert task.submission(rows) == {"vqav2-test-dev.json": given + [{"question_id": 80, "answer": ""}] * official}
    assert ("EvalAI wants all" in capsys.readouterr().out) != official


# ---------------------------------------------------------------- TextVQA


@pytest.fixture
def textvqa_folder(tmp_path):
    data = [{"question": "what brand is this?", "question_id": 5, "image_id": "ab", "answers": ["Coca-Cola"] * 4 + ["pepsi"] * 6},
            {"question": "what brand is this?", "question_id": 6, "image_id": "cd", "answers": ["yes"] * 10}]  # fmt: skip
    saved(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    images(tmp_path / "train_images", "ab.jpg", "cd.jpg")
    return tmp_path


def test_textvqa_finds_equal_questions_by_their_ids(textvqa_folder):
    metrics, rows = scored(TASKS.make(f"textvqa:path={textvqa_folder}"), ["coca cola", "Yes."])
    assert metrics == {"accuracy": 1, "ocr": 0, "empty": 0, "n": 2}
    assert rows[0]["question"] == "What brand is this?" + SHORT and [row["id"] for row in rows] == ["textvqa/5", "textvqa/6"]


@pytest.mark.parametrize("rosetta", [True, False])
def test_textvqa_with_the_words_of_an_ocr_system(textvqa_folder, rosetta):
    if rosetta:
        data = [{"image_id": "ab", "ocr_tokens": ["COKE", "1L"]}, {"image_id": "cd", "ocr_tokens": []}]
        saved(textvqa_folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": data})
    else:
        lines(textvqa_folder / "llava_textvqa_val_v051_ocr.jsonl", [
            {"question_id": id, "image": f"{id}.jpg", "text": f"What brand is this?\nReference OCR token: {text}{SHORT}"}
            for id, text in (("ab", "COKE, 1L"), ("cd", ""))])  # fmt: skip
    metrics, rows = scored(TASKS.make(f"textvqa:path={textvqa_folder},ocr=true"), ["coke", ""])
    assert metrics["ocr"] == 1 and metrics["empty"] == 0.5
    assert [row["question"] for row in rows] == [
        f"What brand is this?\nReference OCR token: {text}{SHORT}" for text in ("COKE, 1L", "")
    ]


# ---------------------------------------------------------------- GQA


@pytest.fixture
def gqa_folder(tmp_path):
    def row(answer, structural, semantic, group, balanced=True):
        return {
            "imageId": "n1",
            "question": "Is it?",
            "answer": answer,
            "isBalanced": balanced,
            "entailed": [],
            "semantic": [],
            "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
            "groups": {"global": group, "local": "y"},
        }

    saved(tmp_path / "testdev_balanced_questions.json", {
        "7": row("red", "query", "attr", "color"), "8": row("blue", "query", "attr", "color"),
        "9": row("yes", "verify", "rel", None),
        "10": row("yes", "verify", "rel", None), "11": row("no", "verify", "obj", None, balanced=False)})  # fmt: skip
    images(tmp_path / "images", "n1.jpg")
    return tmp_path


def test_gqa_from_its_file_to_its_numbers(gqa_folder):
    task = TASKS.make(f"gqa:path={gqa_folder}")
    metrics, rows = scored(task, ["Red.", "red", "Yes", "the yes"])
    # the group color expects one red and one blue and gets two red: (1 + 1) / 100
    assert metrics == pytest.approx({"accuracy": 0.5, "open": 0.5, "binary": 0.5, "empty": 0, "yes": 0.5, "unparsed": 0.5,
                                     "distribution": 0.02, "structure_query": 0.5, "structure_verify": 0.5,
                                     "about_attribute": 0.5, "about_relation": 0.5, "n": 4})  # fmt: skip
    assert task.submission(rows)["gqa-testdev.json"][0] == {"questionId": "7", "prediction": "red"}
    assert "| gqa/distribution | 0.02 |" in table({"gqa/distribution": 0.02})  # no share
    assert gqa.distribution([""], ["a"], ["b"]) == 0


# ---------------------------------------------------------------- ScienceQA


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("B. dog", "B"), ("The answer is C.", "C"), ("I think: The answer is A. Yes", "A"), ("b", None),
    ("B.", None),
    ("(B)", None), ("B\n", None), ("The answer is A", None), ("The answer is A. The answer is B.", None), ("", None),
    ("AB", None), ("B) dog", None), ("F", None),
])  # fmt: skip
def test_a_letter_is_read_as_llava_reads_it(answer, letter):
    assert scienceqa.sqa_letter(answer) == letter


@pytest.fixture
def scienceqa_folder(tmp_path):
    def row(image, hint, grade, subject, choices):
        return {"question": "Which?", "choices": choices, "answer": 1, "hint": hint, "image": image, "grade": grade,
                "split": "test",
                "subject": subject, "task": "closed choice", "topic": "t", "lecture": "", "solution": ""}  # fmt: skip

    saved(
        tmp_path / "problems.json",
        {
            "4": row(None, "", "grade2", "language science", ["x", "y"]),
            "5": row("image.png", "Look.", "grade8", "natural science", ["x", "y"]),
            "6": row("image.png", "", "grade6", "social science", ["x", "y", "z"]),
            "7": row(None, "", "grade2", "social science", ["x", "y"]),
        },
    )
    saved(tmp_path / "pid_splits.json", {"test": ["4", "5", "6"], "train": ["7"]})
    images(tmp_path / "images" / "test", "5/image.png", "6/image.png")
    return tmp_path


def test_scienceqa_from_its_files_to_its_numbers(scienceqa_folder):
    metrics, rows = scored(TASKS.make(f"scienceqa:path={scienceqa_folder}"), ["B", "E", "B."])  # problems 5, 6 and 4
    assert [row["id"] for row in rows] == ["scienceqa/5", "scienceqa/6", "scienceqa/4"]
    assert metrics == pytest.approx({
        "image_accuracy": 1 / 2, "accuracy": 1 / 3, "natural": 1, "social": 0, "language": 0, "text": 1, "image": 0.5,
        "no_context": 0, "grade_1_6": 0, "grade_7_12": 1, "unparsed": 2 / 3, "first": 0, "n": 3})  # fmt: skip
    assert rows[0]["question"] == "Context: Look.\nWhich?\nA. x\nB. y" + LETTER
    assert rows[2]["question"] == "Which?\nA. x\nB. y" + LETTER


# ---------------------------------------------------------------- POPE


@pytest.mark.parametrize(("answer", "read"), [
    ("No", "no"), ("no, there is not", "no"), ("It is not. Yes", "no"), ("Yes, not a problem", "no"), ("Yes. No.", "yes"),
    ("NO", "yes"), ("No!", "yes"), ("No\n", "yes"), ("Nope", "yes"), ("There isn't one", "yes"), ("", "yes"), ("maybe", "yes"),
])  # fmt: skip
def test_an_answer_is_read_as_pope_reads_it(answer, read):
    assert pope.pope_answer(answer) == read


def pope_rows(labels):
    return [
        {"question_id": k + 1, "image": "COCO_val2014_1.jpg", "text": f"Is there a {k}?", "label": label}
        for k, label in enumerate(labels)
    ]


@pytest.fixture
def pope_folder(tmp_path):
    for kind, labels in (("random", ["yes", "no"]), ("popular", ["no"]), ("adversarial", ["no", "yes"])):
        (tmp_path / "coco").mkdir(exist_ok=True)
        lines(tmp_path / "coco" / f"coco_pope_{kind}.json", pope_rows(labels))
    images(tmp_path / "val2014", "COCO_val2014_1.jpg")
    return tmp_path


def test_pope_knows_a_question_by_its_set_and_id(pope_folder):
    """The sets count from 1 each and may have different lengths; f1 and accuracy are means over sets, not over questions."""
    metrics, rows = scored(TASKS.make(f"pope:path={pope_folder}"), ["Yes", "No", "", "No.", "yes"])
    assert metrics["f1"] == (1 + 0 + 1) / 3 and metrics["accuracy"] == (1 + 0 + 1) / 3
    assert (metrics["yes"], metrics["unparsed"], metrics["strict_accuracy"]) == (3 / 5, 1 / 5, 4 / 5)
    assert (metrics["popular_yes"], metrics["popular_f1"], metrics["random_accuracy"]) == (1, 0, 1)
    assert list(metrics)[:2] == ["f1", "accuracy"] and len({row["id"] for row in rows}) == 5
    never, _ = scored(TASKS.make(f"pope:path={pope_folder}"), ["no"] * 5)  # no division by zero
    assert (never["f1"], never["random_precision"], never["yes"]) == (0, 0, 0)


# ---------------------------------------------------------------- MME


@pytest.mark.parametrize(("answer", "read"), [
    ("Yes", "yes"), ("no.", "no"), ("None", "no"), ("not sure", "no"), ("know", "no"), ("Nothing", "no"),
    ("The answer is yes", None),
    ("  yes", None), (" yes", "yes"), ("", None), ("是", None), ("\tno", "no"),
])  # fmt: skip
def test_an_answer_is_read_as_mme_reads_it(answer, read):
    assert mme.mme_answer(answer) == read


@pytest.fixture
def mme_folder(tmp_path):
    """Two pictures of `artwork`, in its two folders, and one of each other ability beside its questions."""
    for ability in (*mme.PERCEPTION, *mme.COGNITION):
        nested = ability == "artwork"
        folder = tmp_path / "MME_Benchmark_release_version" / ability
        for stem in ("1", "2") if nested else ("1",):
            images(folder / "images" if nested else folder, f"{stem}.{'jpg' if nested else 'png'}")
            text = folder / ("questions_answers_YN" if nested else ".") / f"{stem}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text("Is it?  Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n")
    return tmp_path


def test_mme_from_its_folders_to_its_numbers(mme_folder):
    task = TASKS.make(f"mme:path={mme_folder}")
    examples = task.examples("test", task.size)
    assert {example.question for example in examples} == {f"Is it?{SHORT}", f"Is it not?{SHORT}"} and len(examples) == 30
    assert len({example.kind for example in task.examples("test", 14)}) == 14  # a quick look sees every ability
    right = {"artwork": ["yes", "no", "yes", "yes"], "count": ["The answer is yes", "No"]}  # the rest: always yes
    given = [right[e.kind].pop(0) if e.kind in right else "Yes" for e in examples]
    metrics, _ = scored(task, given)
    assert (metrics["accuracy_artwork"], metrics["accuracy_plus_artwork"], metrics["score_artwork"]) == (3 / 4, 1 / 2, 125)
    assert (metrics["score_count"], metrics["score_OCR"]) == (50, 50)
    assert (metrics["perception"], metrics["cognition"]) == (125 + 9 * 50, 4 * 50)
    assert (metrics["unparsed"], metrics["yes"]) == (1 / 30, 27 / 30)
    assert list(metrics)[0] == "perception" and "| mme/perception | 575 |" in table({"mme/perception": 575.0})
    few, _ = evaluate("mme", task, "test", lambda prompts: ["yes"] * len(prompts), 3)
    assert "mme/perception" not in few  # a sum over three abilities is none
    assert "| mme/perception | 0 |" in table({"mme/perception": 0.0})


# ---------------------------------------------------------------- MM-Vet


@pytest.fixture
def mmvet_folder(tmp_path):
    saved(tmp_path / "mm-vet.json", {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "v1_0.png", "question": "What is it?", "answer": "a cat<OR>kitten", "capability": ["rec"]},
        "v1_2": {"imagename": "v1_0.png", "question": "Why?", "answer": "sun", "capability": ["rec", "know"]}})  # fmt: skip
    images(tmp_path / "images", "v1_0.png")
    return tmp_path


@pytest.mark.parametrize(("reply", "value"), [("0.5", 0.5), ("1.0 because", 1), (" 0", 0), ("1", 1), (".3", 0.3)])
def test_a_grade_is_read(reply, value):
    assert mmvet.grade(reply) == value


@pytest.mark.parametrize("reply", ["", "right", "1.5", "Correctness: 0.5", "-0.5", "nan", Failure("asleep")])
def test_no_grade_is_a_failure_and_no_zero(reply):
    assert isinstance(mmvet.grade(reply), Failure)


def test_mmvet_by_hand(mmvet_folder):
    replies = {"ours 0": "0.5", "ours 1": "1.0", "ours 2": "hm"}
    task = judged(TASKS.make(f"mmvet:path={mmvet_folder}"), lambda text: replies[re.findall(r"ours \d", text)[-1]])
    metrics, rows = evaluate("mmvet", task, "test", lambda prompts: ["ours 0 -5 or -1", "ours 1", "ours 2"], task.size)
    assert metrics == {f"mmvet/{name}": value for name, value in {
        "total": 0.75, "math": 0.5, "ocr": 0.5, "rec": 1, "only_math_ocr": 0.5, "only_rec": 1, "judged": 2, "judge_failures": 1,
        "official_prompt": 0, "contains": 1 / 3, "n": 3}.items()}  # fmt: skip
    assert [row["score"] for row in rows] == [0.5, 1, None] and len(task.judge.asked) == 4  # the third is asked for again
    assert task.judge.asked[0].endswith("\nWhat is x? | -1 <AND> -5 | ours 0 -5 or -1 | ") and task.judge.asked[3].endswith(
        mmvet.AGAIN
    )
    assert task.submission(rows) == {"mmvet.json": {"v1_0": "ours 0 -5 or -1", "v1_1": "ours 1", "v1_2": "ours 2"}}


def test_mmvet_takes_the_official_prompt_and_official_grades(mmvet_folder):
    (mmvet_folder / "mm-vet_evaluator.py").write_text('import nothing\nprompt = """Official.\n"""\n')
    task = judged(TASKS.make(f"mmvet:path={mmvet_folder}"), lambda text: "1.0")
    assert evaluate("mmvet", task, "test", lambda prompts: ["x"] * 3, 9)[0]["mmvet/official_prompt"] == 1
    assert task.judge.asked[0].startswith("Official.\n\nWhat is x?")
    grades = saved(mmvet_folder / "grades.json", {"v1_0": {"score": [0.5, 0.7]}, "v1_1": {"score": [0]}})
    metrics, _ = scored(TASKS.make(f"mmvet:path={mmvet_folder},grades={grades}"), ["x"] * 3)
    assert metrics["total"] == pytest.approx(0.3) and (metrics["judged"], metrics["judge_failures"]) == (2, 1)
    metrics, _ = scored(TASKS.make(f"mmvet:path={mmvet_folder}"), ["A CAT"] * 3)
    assert metrics == {"judged": 0, "contains": 1 / 3, "n": 3}  # no judge, no score


# ---------------------------------------------------------------- MMMU


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("The answer is (C) not (A)", "A"), ("A or B", "B"), ("A cat is shown", "A"),
    ("it shows, I am sure, one cat and a DOG", "B"), ("I like my dog", None), ("A. dog", None), ("B) cat", None), ("b", None),
    ("**B**", None), ("", None), ("USA is it", None), ("D", None), ("'C'", "C"),
])  # fmt: skip
def test_an_option_is_read_as_mmmu_reads_it(answer, letter):
    assert mmmu_answers.option_of(answer, ["cat", "dog", "emu"]) == letter


@pytest.mark.parametrize(("answer", "golds", "right"), [
    ("The answer is 3.14159", ["3.14"], 1), ("about 1,000 of 2", ["1000"], 1), ("so x = 5\nso y = 6", ["6"], 1),
    ("2e3", ["2000"], 1),
    ("it is Tampa, surely", ["Tampa", "Florida"], 1), ("Florida.", ["Tampa", "Florida"], 1), ("a large cat", ["c"], 1),
    ("vitamins", ["c"], 0), ("x = 5\nit is six", ["5"], 0), ("the result is 5. the final one is 6", ["5"], 0),
    ("", ["5"], 0), ("six", ["6"], 0),
])  # fmt: skip
def test_an_open_answer_is_right_as_in_mmmu(answer, golds, right):
    assert mmmu_answers.open_is_right(answer, golds) == right


@pytest.fixture
def mmmu_folder(tmp_path):
    picture(tmp_path / "p.png", "blue")
    image = {"bytes": (tmp_path / "p.png").read_bytes(), "path": "p.png"}

    def row(id, question_type, options, answer):
        return {"id": f"validation_{id}", "question": "Look at <image 1>", "options": options, "explanation": "",
                "image_1": image,
                "image_2": None, "answer": answer, "question_type": question_type, "subfield": "x"}  # fmt: skip

    subjects = {
        "Art_Theory": [
            row("Art_Theory_10", "multiple-choice", "['it\\'s 1', \"2\", '3']", "C"),
            row("Art_Theory_2", "multiple-choice", "['x', 'y']", "A"),
        ],
        "Math": [row("Math_15", "open", "[]", "['24/7', '3.429']"), row("Math_16", "multiple-choice", "['x', 'y']", "B")],
    }
    for subject, rows in subjects.items():
        (tmp_path / subject).mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / subject / "validation-00000-of-00001.parquet")
    return tmp_path


def test_mmmu_from_its_files_to_its_numbers(mmmu_folder, capsys):
    """Art_Theory_2 and then Math_16 draw an option: of the official generator's first two for two options, A and A."""
    task = TASKS.make(f"mmmu:path={mmmu_folder}")
    asked = [example.prompt.id for example in task.examples("test", 9)]
    assert asked == [
        "mmmu/validation_Art_Theory_2",
        "mmmu/validation_Math_15",
        "mmmu/validation_Art_Theory_10",
        "mmmu/validation_Math_16",
    ]
    assert "28 of 30 subjects are not in" in capsys.readouterr().out
    metrics, rows = scored(task, ["", "so it is 3.43", "(C)", "b"])
    assert metrics == {"accuracy": 0.75, "strict_accuracy": 0.5, "unparsed": 2 / 3, "options": 2 / 3, "open": 1, "science": 0.5,
                       "art_and_design": 1, "subject_math": 0.5, "subject_art_theory": 1, "n": 4}  # fmt: skip
    assert rows[2]["question"] == "Look at <image 1>\n(A) it's 1\n(B) 2\n(C) 3\n" + LETTER
    assert rows[1]["question"] == "Look at <image 1>" + SHORT and rows[0]["score"] == 1
    assert task.submission(rows)["mmmu-validation.json"] == {
        "validation_Art_Theory_2": "A",
        "validation_Math_15": "so it is 3.43",
        "validation_Art_Theory_10": "C",
        "validation_Math_16": "A",
    }
    assert len(task.examples("test", 1)[0].prompt.pictures) == 1


def test_mmmu_without_public_answers_is_not_scored(mmmu_folder):
    for file in mmmu_folder.rglob("*.parquet"):
        file.rename(file.with_name("test-00000-of-00001.parquet"))
    metrics, rows = scored(TASKS.make(f"mmmu:path={mmmu_folder},split=test"), ["A"] * 4)
    assert metrics == {"unparsed": 0, "n": 4} and {row["score"] for row in rows} == {None}


# ---------------------------------------------------------------- controls, missing and wrong files, all


def test_every_benchmark_has_the_two_controls(gqa_folder, tmp_path):
    seen = []

    def answer(prompts):
        seen.append([prompt.pictures[0].key for prompt in prompts])
        return ["red"] * len(prompts)

    metrics, _ = evaluate("gqa", TASKS.make(f"gqa:path={gqa_folder}"), "test", answer, 9, controls=1)
    asked = metrics["gqa/n"]
    assert metrics["gqa/blank"] == metrics["gqa/accuracy"] == 0.25 and set(seen[0][asked:2 * asked]) == {"blank"}
    assert "blank" not in seen[0][:asked] + seen[0][2 * asked:]


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "scienceqa", "pope", "mme", "mmvet"])
def test_saved_answers_are_scored_again_without_the_pictures(name, request):
    root = request.getfixturevalue(f"{name}_folder")
    task = TASKS.make(f"{name}:path={root}")
    metrics, rows = evaluate(name, task, "test", lambda prompts: ["yes"] * len(prompts), task.size)
    pictures = [file for end in ("png", "jpg") for file in root.rglob(f"*.{end}")]
    assert pictures
    for file in pictures:
        file.unlink()
    assert rescore(name, task, rows)[0] == metrics
    with pytest.raises(FileNotFoundError, match="it is one of"):
        task.examples("test", task.size)


EIGHT = ("vqav2", "gqa", "textvqa", "scienceqa", "pope", "mme", "mmvet", "mmmu")


@pytest.mark.parametrize("name", EIGHT)
def test_a_missing_file_is_told_in_one_line_with_its_project_and_its_place(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"^{name}: \S+.* of \S+.* is missing: put it into {tmp_path}, or .*{name}:path=FOLDER$"
    ):
        TASKS.make(f"{name}:path={tmp_path}").examples("test", 1)


NOTE = {"question_id": 1, "answer_type": "", "question_type": "", "multiple_choice_answer": ""}


@pytest.mark.parametrize(("folder", "name", "file", "text", "message"), [
    ("vqav2_folder", "vqav2", "v2_mscoco_val2014_annotations.json", "<html>", "is not json .* download the file again"),
    ("vqav2_folder", "vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "[]", "holds no list of rows: it is not v2_Open"),
    ("vqav2_folder", "vqav2", "v2_mscoco_val2014_annotations.json",
     json.dumps({"annotations": [{**NOTE, "answers": [{"answer": "x"}] * 10}]}), "question 10 has no answers"),
    ("vqav2_folder", "vqav2", "v2_mscoco_val2014_annotations.json",
     json.dumps({"annotations": [{**NOTE, "answers": [{"answer": "x"}] * 9}]}), "question 1 has 9 answers, not ten"),
    ("vqav2_folder", "vqav2", "v2_mscoco_val2014_annotations.json",
     json.dumps({"annotations": [{**NOTE, "answers": [{"answer": None}] * 10}]}), "row 1 has no answers in the right form"),
    ("textvqa_folder", "textvqa", "TextVQA_0.5.1_val.json",
     '{"data": [{"question": "q", "question_id": 1, "image_id": "ab", "answers": ["a"]}]}', "question 1 has 1 answers, not ten"),
    ("gqa_folder", "gqa", "testdev_balanced_questions.json", '{"1": {"question": "q"}}', "row 1 has no imageId, answer"),
    ("scienceqa_folder", "scienceqa", "pid_splits.json", '{"train": []}', "has no split 'test'; it has train"),
    ("scienceqa_folder", "scienceqa", "pid_splits.json", '{"test": ["99"]}', "lacks 1 problems of test, 99 the first"),
    ("pope_folder", "pope", "coco/coco_pope_popular.json", '{"question_id": 1, "image": "x", "text": "q"}', "row 1 has no label"),
    ("pope_folder", "pope", "coco/coco_pope_popular.json", '{"question_id": 1}\n{', "popular.json:2 is not json"),
    ("mme_folder", "mme", "MME_Benchmark_release_version/OCR/1.txt", "Is it?\tYes\n", "1.txt: two lines, each a question, a tab"),
    ("mmvet_folder", "mmvet", "mm-vet.json", "[]", "holds no object of rows by their ids: it is not mm-vet.json"),
    ("mmmu_folder", "mmmu", "Math/validation-00000-of-00001.parquet", "version https://git-lfs", "is not parquet .*git lfs"),
])  # fmt: skip
def test_a_wrong_file_is_told_in_one_line(folder, name, file, text, message, request):
    root = request.getfixturevalue(folder)
    (root / file).write_text(text)
    with pytest.raises(UserError, match=message) as told:
        TASKS.make(f"{name}:path={root}").examples("test", 99)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "file", "place", "fields"), [
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", ("questions", 0), "question_id image_id question"),
    ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations", 0),
     "question_id answer_type question_type multiple_choice_answer answers"),
    ("textvqa", "TextVQA_0.5.1_val.json", ("data", 0), "question question_id image_id answers"),
    ("gqa", "testdev_balanced_questions.json", ("7",), "imageId question answer isBalanced types groups"),
    ("scienceqa", "problems.json", ("5",), "question choices answer hint grade subject split"),
    ("mmvet", "mm-vet.json", ("v1_0",), "imagename question answer capability"),
    ("pope", "coco/coco_pope_popular.json", (), "question_id image text label"),
])  # fmt: skip
@pytest.mark.parametrize("damage", [None, [None], {}])
def test_a_field_in_a_wrong_form_is_told_with_its_row(name, file, place, fields, damage, request):
    root = request.getfixturevalue(f"{name}_folder")
    whole = json.loads((root / file).read_text())
    row = whole
    for key in place:
        row = row[key]
    for field in fields.split():
        kept, row[field] = row[field], damage
        saved(root / file, whole)
        with pytest.raises(UserError, match=rf"{file}: row \d+ has no {field} in the right form \(.*\): it is not") as told:
            TASKS.make(f"{name}:path={root}").examples("test", 99)
        assert "\n" not in str(told.value)
        row[field] = kept
    saved(root / file, whole)
    assert TASKS.make(f"{name}:path={root}").examples("test", 99)


@pytest.mark.parametrize("answer", [-1, 2])
def test_an_answer_that_is_none_of_the_choices_is_told(scienceqa_folder, answer):
    problems = json.loads((scienceqa_folder / "problems.json").read_text())
    problems["5"]["answer"] = answer
    saved(scienceqa_folder / "problems.json", problems)
    with pytest.raises(UserError, match=f"problem 5 has answer {answer} of 2 choices"):
        TASKS.make(f"scienceqa:path={scienceqa_folder}").examples("test", 9)


def test_two_questions_with_one_id_are_told_before_anything_is_asked(pope_folder):
    lines(pope_folder / "coco" / "coco_pope_random.json", pope_rows(["yes"]) * 2)
    with pytest.raises(UserError, match="the task 'pope' asks 2 questions with the id pope/random/1"):
        evaluate("pope", TASKS.make(f"pope:path={pope_folder}"), "test", lambda prompts: pytest.fail("asked"), 9)


def test_cycles_are_collected_again_once_vqav2_is_read(vqav2_folder):
    TASKS.make(f"vqav2:path={vqav2_folder}").examples("test", 9)
    assert gc.isenabled()
    (vqav2_folder / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError):
        TASKS.make(f"vqav2:path={vqav2_folder}").examples("test", 9)
    assert gc.isenabled()


def test_a_file_that_is_no_text_is_told_in_one_line(pope_folder, mme_folder):
    for name, file in (("pope", "coco/coco_pope_random.json"), ("mme", "MME_Benchmark_release_version/OCR/1.txt")):
        (pope_folder / file).write_bytes(b"\x89PNG\xff\xfe")
        with pytest.raises(UserError, match="is not text in UTF-8 .*: download the file again"):
            TASKS.make(f"{name}:path={pope_folder}").examples("test", 99)


def test_scores_and_uploads_are_written_before_anything_is_drawn(mmvet_folder, tmp_path, monkeypatch):
    """And what is drawn are pictures of --examples: of the three questions two are asked, and the third has no picture."""
    listed = json.loads((mmvet_folder / "mm-vet.json").read_text())
    saved(mmvet_folder / "mm-vet.json", {**listed, "v1_2": {**listed["v1_2"], "imagename": "missing.png"}})
    script = runpy.run_path(str(ROOT / "4-eval_chat.py"))
    config = script["Config"](examples=2, controls=0)
    tasks = {"mmvet": TASKS.make(f"mmvet:path={mmvet_folder}")}
    journal = Journal(tmp_path / "sft", {}, OneRank(), 4, seed=0)
    drawn = []

    def poster(file, page, questions, answers):
        drawn.extend(json.loads((file.parent / "scores.json").read_text()))
        assert (file.parent / "mmvet.json").is_file() and len(questions) == 2
        raise OSError("no space left")

    monkeypatch.setattr(report, "poster", poster)
    with pytest.raises(OSError, match="no space left"):
        script["benchmark"](config, journal, lambda prompts, kept: ["a"] * len(prompts), tasks)
    assert {"mmvet/n", "mmvet/judged", "mmvet/contains"} <= set(drawn)
    assert len((tmp_path / "sft" / "predictions-mmvet.jsonl").read_text().splitlines()) == 2


def test_a_missing_picture_names_the_folders_and_the_project(pope_folder):
    (pope_folder / "val2014" / "COCO_val2014_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no picture COCO_val2014_1.jpg in .*val2014.*: it is one of COCO's val2014"):
        TASKS.make(f"pope:path={pope_folder}").examples("test", 1)
    images(pope_folder / "elsewhere", "COCO_val2014_1.jpg")
    assert TASKS.make(f"pope:path={pope_folder},images={pope_folder / 'elsewhere'}").examples("test", 1)


def test_all_runs_what_is_there_and_names_what_is_not(pope_folder, gqa_folder, capsys):
    root = pope_folder
    (root / "coco").rename(root / "pope")
    tasks = benchmarks(f"all:path={root},gqa:path={gqa_folder},textvqa:ocr=true")
    assert set(tasks) == {"gqa", "textvqa", "easy_vqa", "world", "world_words", "reflection"}
    (root / "val2014").rename(root / "pope" / "val2014")
    assert "pope" in benchmarks(f"all:path={root}")
    last = sorted((root / "pope" / "val2014").iterdir())[-1]
    last.rename(root / last.name)  # whichever picture is missing, it is noticed before anything is asked
    assert "pope" not in benchmarks(f"all:path={root}")
    (root / last.name).rename(last)
    told = capsys.readouterr().out
    assert "left out pope: pope: no picture COCO_val2014_1.jpg" in told and "left out gqa" in told.partition("left out pope")[2]
    for name, source in (
        ("mme", "MME"),
        ("mmhal", "mmhal/response_template.json"),
        ("amber", "amber/data"),
        ("mmmu", "huggingface"),
    ):
        assert re.search(rf"left out {name}: .*{source}", told)


def test_all_passes_on_its_folder_and_its_judge_and_refuses_the_rest():
    specs = expanded("path=/data,judge=http://x/v1,model=m")
    assert set(specs) == set(ALL) and specs["vqav2"] == "vqav2:path=/data/vqav2" and specs["world"] == "world"
    assert specs["mmvet"] == "mmvet:path=/data/mmvet,judge=http://x/v1,model=m"
    with pytest.raises(UserError, match="--bench all has no option 'split=val'. Options: path, judge"):
        expanded("split=val")
    assert list(benchmarks("world")) == ["world"]

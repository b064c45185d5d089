"""Answering and scoring: every answer goes to its question, the controls hide what they say, the report keeps its sections."""

import json
import random
from types import SimpleNamespace

import pytest
from PIL import Image

from dataset.chat import Conversation, Message
from dataset.evaluation import BLANK, Answerer, blank, evaluate, make_tasks, shuffled, validate, with_pictures
from dataset.images import Picture
from dataset.report import add_scores, fonts, poster, section, sheet, table, wrapped
from dataset.tasks import Example, Task, Truncated, dialogue, exact, guessing, means, normal
from dataset.tasks.easy_vqa import EasyVQA
from dataset.tasks.world import World
from dataset.tokenizer import SentencePieceTokenizer
from model.registry import TASKS, UserError
from tests import tiny

TOKENIZER = SentencePieceTokenizer()
LONG = 20  # tokens: an answer of so many does not stop by itself


def picture(name: str) -> Picture:
    return Picture(name, lambda: Image.new("RGB", (4, 4), (len(name), 0, 0)))


def example(id: str, question: str, answer: str, pictures=(), kind: str = "what", tags=()) -> Example:
    return Example(dialogue(id, [picture(name) for name in pictures], [(question, "")]), answer, kind, tags)


# ---------------------------------------------------------------- answering


class Images(tiny.Images):
    """Keeps what it is told to prepare."""

    def __init__(self):
        super().__init__()
        self.prepared = []

    def prepare(self, pictures):
        self.prepared += list(pictures)


def parrot(batch: dict) -> list:
    """Answers each prompt with its own user's words, and keeps the size of the batch."""
    parrot.sizes.append(tuple(batch["input_ids"].shape))
    user, assistant, image = (TOKENIZER.id(name) for name in ("<|user|>", "<|assistant|>", "<image>"))
    answers = []
    for ids in batch["input_ids"].tolist():
        words = ids[ids.index(user) + 1 : ids.index(assistant)]
        text = words[len(words) - words[::-1].index(image) :] if image in words else words  # behind the numbered pictures
        answers.append(SimpleNamespace(tokens=text, stopped=len(words) < LONG))
    return answers


@pytest.fixture
def answerer():
    parrot.sizes = []
    return Answerer(tiny.processor("pupil", 2, tokenizer=TOKENIZER, images=Images()), parrot, batch_size=4)


def test_answers_come_in_the_order_of_the_questions_whatever_their_lengths(answerer):
    rng = random.Random(0)
    texts = [f"{i} " + "word " * rng.randint(0, 30) + "end" for i in range(23)]
    prompts = [dialogue(str(i), [picture(f"p{i}")] * (i % 3), [(text, "")]) for i, text in enumerate(texts)]
    answers = answerer(prompts)
    assert answers == texts
    assert len(answerer.processor.images.prepared) == sum(i % 3 for i in range(23))
    assert [rows for rows, _ in parrot.sizes] == [4, 4, 4, 4, 4, 3]
    lengths = [longest for _, longest in parrot.sizes]
    assert lengths == sorted(lengths)  # equals beside equals: little padding
    truncated = {answer for answer in answers if isinstance(answer, Truncated)}
    words = [len(TOKENIZER.encode(text)) + (i % 3) * 3 for i, text in enumerate(texts)]  # each picture: its number, 2 tokens
    assert truncated == {text for text, length in zip(texts, words) if length >= LONG} and truncated


def test_several_answers_to_each_prompt_stand_together(answerer):
    prompts = [dialogue(str(i), [], [(text, "")]) for i, text in enumerate(("two words", "one", "and three words"))]
    assert answerer.sampled(prompts, 3) == [["two words"] * 3, ["one"] * 3, ["and three words"] * 3]
    assert sum(rows for rows, _ in parrot.sizes) == 9
    assert Answerer.sampled(answerer, prompts, 1) == [["two words"], ["one"], ["and three words"]]


def test_no_answers_are_given_to_no_prompts(answerer):
    assert answerer([]) == [] == answerer.sampled([], 3) and not parrot.sizes


def test_the_likeliest_answers_are_those_of_a_processor_on_one_rank():
    calls = []

    def generator(generate, model, **options):
        calls.append((generate, model, options))
        return parrot

    parrot.sizes = []
    processor = tiny.processor("pupil", 2, tokenizer=TOKENIZER, images=Images())
    processor.images.on_one_rank = Images
    greedy = Answerer.greedy(processor, generator, "generate", "model", max_new_tokens=7)
    assert calls == [("generate", "model", {"max_new_tokens": 7, "temperature": 0.0, **processor.sampling})]
    assert greedy([dialogue("a", [picture("p")], [("Hi?", "")])]) == ["Hi?"]
    assert len(greedy.processor.images.prepared) == 1 and not processor.images.prepared


# ---------------------------------------------------------------- controls


def test_other_pictures_take_the_places_of_the_old_ones():
    old = Conversation("a", (Message("system", ("Look.",)), Message("user", (picture("1"), "or", picture("2"))),
                             Message("assistant", ("The first.",)), Message("user", ("And", picture("3")))))  # fmt: skip
    new = with_pictures(old, lambda k: picture(f"new {k}"))
    assert [p.key for p in new.pictures] == ["new 0", "new 1", "new 2"]
    assert [message.text for message in new.messages] == [message.text for message in old.messages]
    assert new.messages[1].parts == (picture("new 0"), "or", picture("new 1"))


QUESTIONS = [example(str(i), f"Question {i}?", "yes", [f"{i // 3}/{k}" for k in range(i % 3)]) for i in range(60)]


def test_a_blank_control_hides_every_picture_and_asks_the_same():
    for before, after in zip(QUESTIONS, blank(QUESTIONS), strict=True):
        assert after.prompt.pictures == (BLANK,) * len(before.prompt.pictures)
        assert (after.prompt.messages[-1].text, after.answer) == (before.prompt.messages[-1].text, before.answer)
    assert len(BLANK.load().getcolors()) == 1


def test_a_shuffled_control_shows_as_many_pictures_and_never_its_own():
    pictured = [question for question in QUESTIONS if question.prompt.pictures]
    for before, after in zip(pictured, shuffled(pictured), strict=True):
        own, others = before.prompt.pictures, after.prompt.pictures
        assert len(own) == len(others) and not set(own) & set(others)
        assert (after.prompt.messages[-1].text, after.answer) == (before.prompt.messages[-1].text, before.answer)
    assert len({after.prompt.pictures for after in shuffled(pictured)}) > 30  # and not one for all


@pytest.mark.parametrize("task", [World(), EasyVQA()], ids=["world", "easy_vqa"])
@pytest.mark.parametrize("pictures", [1, 2, 3, 10])
def test_no_shuffled_question_of_a_task_keeps_a_picture(task, pictures):
    own = {e.prompt.id: e for e in task.examples("val", pictures)}
    others = shuffled(list(own.values()))
    assert all(len(e.prompt.pictures) == len(own[e.prompt.id].prompt.pictures) for e in others)
    assert not [e for e in others if set(e.prompt.pictures) & set(own[e.prompt.id].prompt.pictures)]
    assert pictures < 3 or len(others) == len(own)


def test_a_question_with_no_other_picture_to_show_is_left_out():
    assert shuffled([example("a", "?", "yes", ["1"]), example("b", "?", "no", ["1"]), example("c", "?", "no", ["1", "2"])]) == []


# ---------------------------------------------------------------- scores


class Names(Task):
    """Twelve questions about twelve pictures, half of them in words; the answer is the picture's name."""

    def examples(self, split, n):
        return [example(f"{split}/{i}", f"Name {i}?", f"{split}{i}", [f"{split}{i}"] if i % 2 == 0 else [], "ab"[i % 2])
                for i in range(n)]  # fmt: skip

    def summary(self, examples, scores):
        return {**super().summary(examples, scores), **means(examples, scores, lambda e: [e.kind])}


def seer(prompts):
    """Answers with the name of the picture, and "nothing" without one."""
    return [prompt.pictures[0].key if prompt.pictures else "nothing" for prompt in prompts]


def test_a_model_that_looks_passes_and_fails_both_controls():
    scores, rows = evaluate("names", Names(), "test", seer, n=12, controls=1)
    metrics = {"accuracy": 0.5, "a": 1.0, "b": 0.0, "blank": 0.0, "shuffled": 0.0, "n": 12}
    assert scores == {f"names/{metric}": value for metric, value in metrics.items()}
    assert rows[2] == {"id": "test/2", "kind": "a", "question": "Name 2?", "truth": "test2", "answer": "test2",
                       "truncated": False, "score": 1.0}  # fmt: skip
    assert [row["id"] for row in rows] == [f"test/{i}" for i in range(12)]


def test_a_model_that_does_not_look_cannot_hide():
    answers = {f"Name {i}?": f"test{i}" for i in range(12)}
    scores, _ = evaluate("names", Names(), "test", lambda ps: [answers[p.messages[-1].text] for p in ps], n=12, controls=1)
    assert (scores["names/accuracy"], scores["names/blank"], scores["names/shuffled"]) == (1.0, 1.0, 1.0)


def test_without_controls_only_the_questions_are_asked():
    calls = []
    scores, _ = evaluate("names", Names(), "val", lambda prompts: calls.append(len(prompts)) or seer(prompts), n=4, kinds=("a",))
    assert (scores, calls) == ({"names/accuracy": 1.0, "names/a": 1.0, "names/n": 2}, [2])


def test_a_check_during_training_is_done_by_the_first_rank_logged_and_waited_for_by_all():
    for is_main in (True, False):
        calls, logged = [], []
        run = SimpleNamespace(is_main=is_main, gather=lambda calls=calls: calls.append("gather"),
                              barrier=lambda calls=calls: calls.append("barrier"),
                              log=lambda step, logged=logged, **scores: logged.append((step, scores)))  # fmt: skip

        def answer(prompts, calls=calls):
            calls.append(len(prompts))
            return seer(prompts)

        scores = validate({"names": Names(), "again": Names()}, answer, 4, run, step=7, kinds=("a",))
        expected = {f"{name}/{metric}": value for name in ("names", "again")
                    for metric, value in (("accuracy", 1.0), ("a", 1.0), ("n", 2))}  # fmt: skip
        assert scores == (expected if is_main else {}) and logged == [(7, scores)]
        assert calls == (["gather", 2, 2, "barrier"] if is_main else ["gather", "barrier"])


def test_two_variants_of_a_task_are_not_measured_at_once():
    assert list(make_tasks("world,arithmetic:text=true")) == ["world", "arithmetic"] and make_tasks("") == {}
    with pytest.raises(UserError, match="one variant of a task at a time"):
        make_tasks("arithmetic,arithmetic:text=true")
    with pytest.raises(UserError, match="'earth'"):
        make_tasks("earth")


def test_the_controls_ask_every_nth_question():
    calls = []
    evaluate("names", Names(), "val", lambda prompts: calls.append(len(prompts)) or seer(prompts), n=12, controls=4)
    assert calls == [12 + 2 + 2]  # of the six with a picture, numbers 0 and 4


def test_a_task_without_a_question_to_ask_is_named():
    with pytest.raises(UserError, match="'easy_vqa' asks no question of the kind caption: leave it out of --bench"):
        evaluate("easy_vqa", EasyVQA(), "val", seer, n=2, kinds=("caption",))


@pytest.mark.parametrize("name", ["text", "arithmetic:text=true"])
def test_a_task_in_words_alone_has_no_controls(name):
    scores, _ = evaluate(name, TASKS.make(name), "test", seer, n=6, controls=1)
    assert not {f"{name}/blank", f"{name}/shuffled"} & set(scores)
    assert all(0 <= value <= 1 or metric.endswith("/n") for metric, value in scores.items())


@pytest.mark.parametrize(("answer", "right"), [
    ("a red apple", 1), ("A red apple.", 1), ("  A Red Apple。 ", 1), ("an apple", 0), ("a red apple, I think", 0), ("", 0),
])  # fmt: skip
def test_an_answer_is_right_word_for_word_but_for_case_and_stop(answer, right):
    assert exact(example("", "?", "a red apple"), answer) == right


def test_a_caption_is_right_when_it_names_exactly_what_is_there():
    task = World()
    captioned = Example(dialogue("", [picture("p")], [("?", "")]), "Two buses and a key.", "caption", ("en", "new"))
    answers = {"Two buses and a key.": 1, "A key and a bus.": 1, "A bus.": 0, "A bus, a key and an ant.": 0, "": 0}
    for text, score in answers.items():
        assert task.score(captioned, text) == score, text


def test_means_are_taken_group_by_group():
    examples = [example("", "?", "", kind=kind) for kind in "abab"]
    assert means(examples, [1, 0, 0, 1], lambda e: [e.kind, "all"]) == {"a": 0.5, "all": 0.5, "b": 0.5}
    assert means(examples, [1, 0, 1, 1], lambda e: [e.kind] * (e.kind == "b")) == {"b": 0.5}
    assert normal(" Yes. ") == "yes"


def test_the_level_of_guessing_is_the_commonest_answer_of_each_group():
    seen = [example("", "?", answer, kind=kind, tags=(language, "new")) for kind, language, answers in (
        ("exists", "en", ["yes", "yes", "no"]), ("exists", "zh", ["是"]), ("count", "en", ["2", "3", "3"])) for answer in answers]
    questions = [example("", "?", answer, kind=kind, tags=(language, "trained")) for kind, language, answer in (
        ("exists", "en", "yes"), ("exists", "en", "no"), ("exists", "zh", "是"), ("count", "en", "3"), ("count", "zh", "3"))]
    assert guessing(questions, seen) == 3 / 5  # yes, 是 and 3; nothing was seen of counting in Chinese


def test_guessing_stays_low_on_the_questions_of_the_world_and_is_below_everything_known_of_easy_vqa():
    assert 0 < World().guess(World().examples("test", 60)) < 0.5
    assert 0.3 < EasyVQA().guess(EasyVQA().examples("test", 60)) < 0.8


def test_multi_image_scores_are_those_of_two_pictures():
    task = World()
    examples = task.examples("test", 6)
    scores = [float(len(e.prompt.pictures) == 2) for e in examples]
    summary = task.summary(examples, scores)
    assert summary["multi_image"] == 1.0 and summary["caption"] == 0.0 and summary["count"] == 0.0
    questions = [(e, s) for e, s in zip(examples, scores) if e.kind != "caption"]
    assert summary["exact"] == pytest.approx(sum(s for _, s in questions) / len(questions))
    for tag in ("en", "zh", "new", "trained"):
        chosen = [s for e, s in questions if tag in e.tags]
        assert summary[tag] == pytest.approx(sum(chosen) / len(chosen))


def test_scores_of_several_benchmarks_share_a_file(tmp_path):
    add_scores(tmp_path, {"world/exact": 0.5, "world/n": 10})
    add_scores(tmp_path, {"easy_vqa/accuracy": 0.25, "world/exact": 0.75})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"world/exact": 0.75, "world/n": 10, "easy_vqa/accuracy": 0.25}


def test_new_scores_of_a_task_leave_no_old_one_of_it(tmp_path):
    add_scores(tmp_path, {"world/exact": 0.5, "world/blank": 0.2, "world_words/exact": 0.4})
    add_scores(tmp_path, {"world/exact": 0.6}, "world")
    assert json.loads((tmp_path / "scores.json").read_text()) == {"world/exact": 0.6, "world_words/exact": 0.4}


# ---------------------------------------------------------------- the report


def test_a_section_takes_the_place_of_its_older_self(tmp_path):
    page = tmp_path / "deep" / "report.md"
    section(page, "One", "first")
    section(page, "Two (x)", "second\n### Two (x)\ndeeper")
    section(page, "One", "a backslash \\1 and \\g<0>")
    section(page, "Two", "not the same title")
    assert page.read_text() == (
        "# Report\n\nContents:\n\n- [One](#one)\n- [Two (x)](#two-x)\n- [Two](#two)\n\n## One\n\n"
        "a backslash \\1 and \\g<0>\n\n## Two (x)\n\nsecond\n### Two (x)\ndeeper\n\n## Two\n\n"
        "not the same title\n\n")  # fmt: skip


def test_a_table_shows_shares_in_percent_and_counts_as_they_are():
    lines = table({"exact": 0.5, "n": 300, "all": 1.0, "none": 0.0, "seconds": 61}).splitlines()
    assert lines[2:] == ["| exact | 50.0 % |", "| n | 300 |", "| all | 100.0 % |", "| none | 0.0 % |", "| seconds | 61 |"]


def test_a_sheet_shows_each_picture_with_its_question_truth_and_answer(tmp_path):
    examples = [example("a", "Is there a | bar?", "yes", ["1", "22"]), example("b", "What?", "no", ["333"])]
    answers = {"before": ["no", "No."], "after": ["yes", "<think>so</think>"]}
    text = sheet(tmp_path / "sft", tmp_path / "report.md", [(Task(), example) for example in examples], answers)
    heads, _, first, second = text.splitlines()
    assert heads == "| picture | question | truth | before | after |"
    assert first == "| ![](sft/pictures/00-0.png) ![](sft/pictures/00-1.png) | Is there a \\| bar? | yes | ✗ no | ✓ yes |"
    assert second == "| ![](sft/pictures/01-0.png) | What? | no | ✓ No. | ✗ &lt;think>so&lt;/think> |"
    with Image.open(tmp_path / "sft" / "pictures" / "00-1.png") as thumbnail:
        assert (thumbnail.size, thumbnail.getpixel((0, 0))) == ((8, 8), (2, 0, 0))


def test_a_mark_is_the_task_s_own_and_not_the_equality_of_texts(tmp_path):
    class Sums(Task):
        def score(self, example: Example, answer: str) -> float:
            return float(f"<answer>{example.answer}</answer>" in answer)

    text = sheet(tmp_path / "sft", tmp_path / "report.md", [(Sums(), example("a", "1+1?", "2", ["1"]))],
                 {"answer": ["<think>1+1=2.</think><answer>2</answer>"]})  # fmt: skip
    assert "| ✓ &lt;think>1+1=2." in text


def test_long_answers_are_wrapped_and_chinese_breaks_anywhere():
    font = fonts(13)[0]
    assert wrapped("short", font, 192, 3) == ["short"]
    rows = wrapped("At the top left is one crocodile. " * 9, font, 192, 3)
    assert len(rows) == 3 and rows[0].startswith("At the top left") and rows[2].endswith("…")
    assert all(font.getlength(row.rstrip("…")) <= 192 for row in rows)
    assert "".join(wrapped("图里有什么" * 12, font, 192, 99)) == "图里有什么" * 12


def test_a_poster_shows_every_question_with_one_picture_that_its_fonts_can_write(tmp_path):
    examples = [example("a", "What?", "yes", ["1"]), example("b", "图里有什么？", "no", ["1"]),
                example("c", "Two?", "no", ["1", "2"])]  # fmt: skip
    picture = poster(tmp_path / "sft.png", tmp_path / "report.md", [(Task(), one) for one in examples], ["yes", "不", "no"])
    assert picture == "![](sft.png)\n\n"
    with Image.open(tmp_path / "sft.png") as image:
        assert image.size[0] == 4 * 208 and image.size[1] > 192
    assert poster(tmp_path / "none.png", tmp_path / "report.md", [(Task(), examples[2])], ["no"]) == ""

"""Wordings: many, all of the same question, and those that are held out are in no row of training."""

import random
import re
from collections import Counter

import pytest

from dataset.chat import Prefill
from dataset.tasks.easy_vqa import EasyVQA, EasyVQAWords, kind_and_names, reworded
from dataset.tasks.world import World
from dataset.tasks.world_unknown import SOMETHING, UNKNOWN_NAME, WorldUnknown, unknown
from dataset.tasks.world_words import WorldWords
from dataset.world import inventories, wordings
from dataset.world.openmoji import LANGUAGES, categories
from dataset.world.phrases import AROUND, FRAMES, PHRASES, PLACE_PHRASES, REQUEST, SIDE_PHRASES
from dataset.world.questions import KINDS, PAIR_KINDS, names
from dataset.world.small_talk import SMALL_TALK, small_talk
from dataset.world.wordings import expand, fill, invented, openings, plain, split_of, strange_words, typed, with_insertions, word
from model.registry import TASKS

BUS, KEY = (category for category in categories() if category.en in ("bus", "key"))


def about(language: str) -> dict[str, str]:
    """Everything that a kind may ask about."""
    other = names(KEY, language)
    return {**names(BUS, language), "at": PLACE_PHRASES[language][0], "side": SIDE_PHRASES[language]["left"],
            "other": other["it"], "others": other["many"]}  # fmt: skip


ALL = [(language, kind) for language in LANGUAGES for kind in PHRASES[language]]


@pytest.mark.parametrize(("language", "kind"), ALL)
def test_a_kind_is_asked_in_hundreds_of_wordings_without_a_gap(language, kind):
    rng = random.Random(0)
    texts = {word(kind, language, about(language), "train", rng).text for _ in range(1500)}
    assert len({text.lower().strip(" ?.？。") for text in texts}) > 300
    assert not [text for text in texts if re.search(r"[<>{}|()_]|^\W*$|  |\bi\b [a-z]+ [A-Z]", text)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_of_question_of_the_world_has_wordings(language):
    assert {*KINDS, *PAIR_KINDS, "caption", "description"} <= set(PHRASES[language])


@pytest.mark.parametrize(("kind", "english", "chinese"), [
    ("caption", "What is in the picture?", "图里有什么？"),
    ("description", "Describe the picture in detail.", "详细描述这张图。"),
    ("what", "What is at the top left?", "左上是什么？"),
    ("where", "Where is the bus?", "公交车在哪里？"),
    ("exists_at", "Is there a bus at the top left?", "左上有公交车吗？"),
    ("relation", "Is the bus to the left of the key?", "公交车在钥匙的左边吗？"),
    ("compare", "Are there more buses or more keys?", "公交车和钥匙哪个多？"),
    ("which_picture", "Which picture has a bus?", "哪张图有公交车？"),
])  # fmt: skip
def test_the_plainest_wording_of_a_kind(kind, english, chinese):
    assert [plain(kind, language, about(language)) for language in LANGUAGES] == [english, chinese]


@pytest.mark.parametrize(("language", "kind"), ALL)
def test_what_is_held_out_is_never_drawn_for_training(language, kind):
    drawn = {split: {word(kind, language, about(language), split, random.Random(k)) for k in range(300)}
             for split in wordings.SPLITS}  # fmt: skip
    assert {wording.held_out for wording in drawn["train"]} == {""}
    plainest = plain(kind, language, about(language))
    for split in ("val", "test"):
        assert "" not in {wording.held_out for wording in drawn[split]}
        assert not {wording.text for wording in drawn[split]} & {wording.text for wording in drawn["train"]} - {plainest}
        held_out = {wording.held_out for wording in drawn[split]} - {"the whole"}
        assert {split_of(piece) for piece in held_out} <= {split}


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_invented_word_is_no_word_for_a_picture(language):
    made = {invented(language, random.Random(k)) for k in range(30_000)}
    assert len(made) > 3_000 and not made & set(AROUND[language]["noun"])


def test_some_trained_wordings_hold_invented_words_and_those_of_the_benchmark_none(monkeypatch):
    monkeypatch.setattr(wordings, "invented", lambda language, rng: {"en": "SPLORF", "zh": "〇〇"}[language])
    for language, strange in (("en", "splorf"), ("zh", "〇〇")):
        texts = {split: [word("where", language, about(language), split, random.Random(k)).text.lower() for k in range(400)]
                 for split in wordings.SPLITS}  # fmt: skip
        assert 8 < sum(strange in text for text in texts["train"]) < 100
        assert not [text for text in texts["val"] + texts["test"] if strange in text]


@pytest.mark.parametrize(("language", "text"), [("en", "could you say where {it} is in the photo?"),
                                                ("zh", "请问{it}在图里的什么位置？")])
def test_inserted_words_leave_the_wording_in_order_and_its_names_whole(language, text):
    wordings = [with_insertions(text, language, random.Random(k)) for k in range(200)]
    pieces = re.findall(r"\{it\}|[a-z]+" if language == "en" else r"\{it\}|[一-龥]", text)
    in_order = re.compile(".*".join(map(re.escape, pieces)))
    assert all(in_order.search(wording) and len(wording) > len(text) for wording in wordings)
    assert all(wording.count("{it}") == 1 and (language == "zh" or "  " not in wording) for wording in wordings)
    begins, ends = ({getattr(wording, method)(part) for wording in wordings}
                    for method, part in (("startswith", text[:2]), ("endswith", text[-3:])))
    assert begins == ends == {True, False}


@pytest.mark.parametrize("language", LANGUAGES)
def test_strange_words_are_no_names_of_the_world_and_none_of_a_test(language):
    strange, known = set(strange_words(language)), {getattr(category, language) for category in categories("nano")}
    held_out = {getattr(category, language) for category in categories("all") if split_of(category.en) == "test"}
    assert len(strange) > 400 and not strange & known and not strange & held_out
    assert not [word for word in strange if any(noun in word for noun in AROUND[language]["noun"])]


def test_a_tenth_of_all_wordings_is_held_out_for_the_test():
    rng, splits = random.Random(0), Counter()
    for _ in range(3000):
        whole = expand(rng.choice(PHRASES["en"]["count"]["question"]), "en", rng.choice, [])
        splits[split_of(f"count: {whole}")] += 1
    assert 0.05 < splits["test"] / 3000 < 0.2


def test_what_is_common_is_always_trained_and_so_are_the_words_that_carry_a_request():
    """A model that begins from nothing cannot guess a synonym, and a common piece held out would be a hole."""
    rng, seen = random.Random(0), dict.fromkeys(LANGUAGES, "")
    for language, kind in ALL:
        seen[language] += " ".join(word(kind, language, about(language), "train", rng).text.lower() for _ in range(400))
    for language in LANGUAGES:
        common = [piece for pieces in AROUND[language].values() for piece in pieces if pieces.count(piece) > 1]
        requests = [piece for pieces in REQUEST[language].values() for piece in pieces]
        assert not [piece for piece in (*common, *requests) if "<" not in piece and piece not in seen[language]]
    for frames in (*FRAMES["en"].values(), *FRAMES["zh"].values()):
        assert [frame for frame in frames if frames.count(frame) > 1]


def test_every_choice_is_made_and_capitals_stand_where_english_has_them():
    assert expand("(a|b(c|d)) <show>", "en", lambda options: options[-1], []) == "bd display"
    text = fill("i want to know: where is {it}?", "en", {"it": "the St. Lucia"}, random.choice)
    assert text == "I want to know: where is the St. Lucia?"
    texts = {typed("Where is the bus?", "en", random.Random(k)) for k in range(60)}
    assert {"Where is the bus?", "where is the bus?", "Where is the bus", "where is the bus"} <= texts
    assert any(text.endswith(" ") for text in texts)


def test_the_benchmark_asks_what_the_world_asks_in_words_that_are_held_out():
    asked, held_out = World().examples("test", 12), WorldWords().examples("test", 12)
    assert [(one.question, one.answer, one.prompt.pictures) for one in asked] == [
        (one.question, one.answer, one.prompt.pictures) for one in held_out]  # fmt: skip
    assert all(example.tags[1] for example in held_out)
    metrics = WorldWords().summary(held_out, [float(example.kind != "where") for example in held_out])
    assert metrics["where"] == 0 and metrics["count"] == 1 and 0 < metrics["exact"] < 1
    assert {"en", "zh", "caption_en", "caption_zh", "new_whole"} <= set(metrics)


def test_official_questions_are_read_and_asked_again_in_other_words():
    assert kind_and_names("what color is the triangle?")[0] == "colour"
    assert kind_and_names("what is the blue shape?") == ("coloured_shape", kind_and_names("is there a blue shape?")[1])
    assert kind_and_names("does the image not contain a circle?")[0] == "missing"
    assert kind_and_names("is a teal shape present?")[1]["one"] == "a teal shape"
    for official, new in zip(EasyVQA().examples("test", 10), EasyVQAWords().examples("test", 10), strict=True):
        assert (official.answer, official.prompt.pictures, official.question) == (new.answer, new.prompt.pictures, new.question)
        assert official.prompt.messages[-1].text != new.prompt.messages[-1].text
    assert len({reworded("is there a circle?", "train", random.Random(k)) for k in range(100)}) > 60


@pytest.mark.parametrize("name", ["geometry", "perception", "sokoban"])
def test_a_reasoning_task_is_asked_in_many_ways_of_which_some_are_held_out(name):
    def starts(examples) -> set[str]:
        asked = [(example.question, example.prompt) for example in examples if example.prompt.pictures]
        texts = [(question[:4].lower(), prompt.messages[0].text.lower().replace("，", ",")) for question, prompt in asked]
        return {text.partition(first)[0] for first, text in texts}

    trained, new = TASKS.make(name), TASKS.make(f"{name}:new_words=true")
    rows = {row.messages[0].text for i in range(60) if (row := trained.train("sft")[i]).pictures}
    assert len(rows) > 12 and starts(trained.examples("test", 60)) > {""}
    held_out = {opening.replace("，", ",") for language in LANGUAGES for opening in openings(language, "test")}
    assert starts(new.examples("test", 60)) <= held_out and not starts(trained.examples("test", 60)) & held_out


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_people_say_is_held_out_too(language):
    for kind in SMALL_TALK[language]:
        said = {split: {small_talk(kind, language, split, random.Random(k))[0].strip(" ?!.？！。,").lower() for k in range(150)}
                for split in ("train", "test")}  # fmt: skip
        assert len(said["train"]) > 10 and said["test"] and not said["train"] & said["test"]


def test_what_is_short_and_common_is_trained_and_stands_among_questions_about_pictures():
    rows = [World().row("sft", i) for i in range(2000)]
    said = {turn.text.strip(" !?.").lower() for row in rows for turn in row.messages if turn.role == "user"}
    answers = {answer for language in LANGUAGES for *_, answer in SMALL_TALK[language].values()}
    assert {message.text for row in rows for message in row.messages} >= answers
    assert said & {"hello", "hi", "hey", "thank you", "thanks"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_some_trained_wordings_hold_words_that_do_not_matter_and_those_of_the_benchmark_none(language, monkeypatch):
    def asked(share: float, split: str) -> list[str]:
        monkeypatch.setattr(wordings, "INSERTED", share)
        return [word("where", language, about(language), split, random.Random(k)).text for k in range(200)]

    with monkeypatch.context() as changed:
        changed.setattr(wordings, "PLAIN", 0)
        assert sum(map(len, asked(1, "train"))) > sum(map(len, asked(0, "train"))) + 200 * (6 if language == "en" else 2)
    assert asked(0, "test") == asked(1, "test")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_of_question_about_the_world_is_asked_by_keywords(language, monkeypatch):
    monkeypatch.setattr(wordings, "PUT", {**dict.fromkeys(wordings.PUT, 0), "keyword": 1})
    for kind in (*KINDS, *PAIR_KINDS, "caption", "description"):
        texts = {word(kind, language, about(language), "train", random.Random(k)).text for k in range(60)}
        assert len(texts) > 5, kind
    text = word("where", "en", about("en"), "test", random.Random(1)).text
    assert "bus" in text.lower() and len(text.split()) < 6


def test_half_of_the_rows_about_unknown_things_are_inventories_of_known_and_unknown_drawings():
    task, seen = WorldUnknown(), Counter[str]()
    rows = [row for i in range(120) if isinstance((row := task.row(i)).messages[1].parts[0], Prefill)]
    assert 40 < len(rows) < 80
    for row in rows:
        language = "en" if row.messages[0].text == inventories.ASK["en"]["what"] else "zh"
        places, answers = row.messages[1].parts[0::2], row.messages[1].parts[1::2]
        assert len({place.strip(", ，") for place in places}) == len(answers) == 9
        seen.update("unknown" if SOMETHING[language] in answer else "known" for answer in answers)
    assert 0.2 < seen["unknown"] / seen.total() < 0.5


def test_unknown_names_and_drawings_of_the_test_are_never_trained():
    assert not set(unknown("train")) & set(unknown("test")) and not set(unknown("train")) & set(categories("nano"))
    task = WorldUnknown(rows=80)
    shown = {split: [obj.category.code for i in range(80) for obj in task.scene(split, i)[0].objects]
             for split in ("train", "test")}  # fmt: skip
    altered = [code for code in shown["train"] if "~" in code]
    assert 30 < len(altered) < 80 and not [code for code in shown["test"] if "~" in code]  # only what is unknown in training
    assert {code.partition("~")[0] for code in altered} <= {category.code for category in unknown("train")}
    trained = " ".join(message.text for i in range(80) for message in task.train("sft")[i].messages)
    assert not [category.en for category in unknown("test") if re.search(rf"\b{names(category, 'en')['one']}\b", trained)]
    for example in task.examples("test", 20):
        said = {"known": example.answer, "name": UNKNOWN_NAME[example.tags[0]], "drawing": SOMETHING[example.tags[0]]}
        assert task.score(example, said[example.kind]) == 1
        wrong = {"known": said["name"], "name": "I do not know what a f face is.", "drawing": said["name"]}[example.kind]
        assert task.score(example, wrong) == task.score(example, "" if example.kind != "known" else SOMETHING["zh"]) == 0

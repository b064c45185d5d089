"""CHAIR, Cover and yes/no numbers by hand; descriptions of scenes; questions about what is not there."""

import json
import random
from collections import Counter

import pytest

from dataset.evaluation import evaluate
from dataset.studies.rescore import rescore
from dataset.tasks import Truncated
from dataset.tasks.chair import agreement, binary, chair, yes_or_no
from dataset.tasks.hallucination import (
    POPULAR,
    Hallucination,
    WorldPOPE,
    by_count,
    exists,
    length,
    malformed,
    named,
    seen_in_training,
    untrue,
)
from dataset.world import questions
from dataset.world.openmoji import LANGUAGES, Category, categories
from dataset.world.scenes import Object, Scene, sample_scene
from dataset.world.words import description, mentions
from model.registry import TASKS

# ---------------------------------------------------------------- pure numbers


def test_chair_and_cover_by_hand():
    named = [["bus", "key", "bus"], ["ant", "owl"], [], ["fox", "fox"]]
    present = [{"bus", "fox"}, {"ant", "owl"}, {"key"}, {"bus"}]
    # mentions: 3 + 2 + 0 + 2 = 7, of which absent: key, fox, fox; two of four answers; of 2 + 2 + 1 + 1 there: bus, ant, owl
    assert chair(named, present) == {"chair_s": 2 / 4, "chair_i": 3 / 7, "cover": 3 / 6}


def test_silence_hallucinates_nothing_and_covers_nothing():
    assert chair([[], []], [{"bus"}, {"ant"}]) == {"chair_s": 0.0, "chair_i": 0.0, "cover": 0.0}


def test_naming_everything_covers_everything_and_hallucinates():
    assert chair([["bus", "ant", "key"]], [{"bus"}]) == {"chair_s": 1.0, "chair_i": 2 / 3, "cover": 1.0}


def test_a_thing_that_is_there_twice_is_one_thing():
    assert chair([["bus"]], [["bus", "bus"]])["cover"] == 1.0


@pytest.mark.parametrize(("named", "present"), [([], []), ([["bus"]], []), ([["bus"]], [{"bus"}, {"ant"}])])
def test_answers_without_their_truths_are_an_error(named, present):
    with pytest.raises(ValueError, match="one to one"):
        chair(named, present)
    with pytest.raises(ValueError, match="one to one"):
        binary([None] * len(named), ["yes"] * len(present), "yes")


def test_one_answer_scores_between_silence_and_everything():
    assert agreement(["bus", "ant"], {"ant", "bus"}) == 1.0
    assert agreement([], {"bus"}) == 0.0
    assert agreement(["bus", "key", "owl"], {"bus", "ant"}) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_yes_and_no_by_hand():
    predicted, truth = ["yes", "yes", "no", None, "no"], ["yes", "no", "yes", "no", "no"]
    assert binary(predicted, truth, "yes") == {
        "accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "yes": 2 / 5, "unparsed": 1 / 5}  # fmt: skip
    assert binary(predicted, truth, "no") == {
        "accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(2 / 5), "yes": 2 / 5,
        "unparsed": 1 / 5}  # fmt: skip


def test_nothing_predicted_positive_divides_by_nothing():
    assert binary(["no"], ["yes"], "yes") == {
        "accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes": 0, "unparsed": 0}  # fmt: skip


@pytest.mark.parametrize(("answer", "parsed"), [
    ("yes", "yes"), ("No.", "no"), (" NO!\nBecause", "no"), ("Yes, not a problem", "yes"), ("是", "yes"), ("否。", "no"),
    ("是的", "yes"), ("", None), ("maybe", None),
    ("Not sure", None), ("Nope", None), ("nothing", None), ("There is no bus", None), ("不是", None),
])  # fmt: skip
def test_an_answer_is_yes_or_no_by_its_first_word_alone(answer, parsed):
    assert yes_or_no(answer) == parsed


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("which", ["nano", "all"])
def test_a_true_description_is_well_formed_and_names_what_is_there(which, language):
    for i in range(150):
        scene = sample_scene("test", i, which)
        text = description(scene, language)
        assert Counter(named(text, language, which)) == scene.counts
        assert not malformed(text, language, which)


GOOD = {"en": "At the top left is one bus. At the center is one ant.", "zh": "左上有一个公交车。中间有一个蚂蚁。"}


@pytest.mark.parametrize(("language", "broken"), [
    ("en", ""), ("en", "A bus and a fox."), ("en", "At the top left is one bus"), ("en", "At the top left is one"),
    ("en", GOOD["en"] + " At the top is"), ("en", GOOD["en"] + " " + GOOD["en"]), ("en", GOOD["en"] + GOOD["en"]),
    ("en", "At the top left is a bus."), ("en", "At the top left is one unicorn-shaped bus."), ("en", GOOD["zh"]),
    ("en", "At the top left is one bus. At the top left is one key. At the top left is one bus."),
    ("en", "At the middle is one bus."), ("en", Truncated(GOOD["en"])),
    ("zh", ""), ("zh", "左上有公交车。"), ("zh", "左上有一个公交车"), ("zh", GOOD["zh"] + "中间"), ("zh", GOOD["zh"] * 2),
    ("zh", "天上有一个公交车。"), ("zh", GOOD["en"]), ("zh", Truncated(GOOD["zh"])),
])  # fmt: skip
def test_what_is_no_sentence_of_a_description_is_malformed(language, broken):
    assert malformed(broken, language)
    assert not malformed(GOOD[language], language)


def test_what_is_no_sentence_still_names_things():
    names = [category.en for category in named("At the top left is one bus. I see two foxes and a", "en")]
    assert names == ["bus", "fox"]
    assert [category.zh for category in named("左上有一个公交车。还有狐狸", "zh")] == ["公交车", "狐狸"]


def test_a_wrong_but_well_formed_claim_is_no_malformed_one():
    assert not malformed("At the top left is one bus. At the top left is one key.", "en")


@pytest.mark.parametrize(("text", "false"), [
    (GOOD["en"], False),
    (GOOD["en"].split(". ")[0] + ".", False),  # what is left out is not said
    (GOOD["en"] + " At the bottom is one ant.", True),  # absent
    ("At the bottom right" + GOOD["en"][GOOD["en"].index(" is"):], True),  # there, but elsewhere
    (GOOD["en"] + " " + GOOD["en"], True),  # told twice
    (GOOD["en"] + " I see one ant.", True),  # in other words
    (GOOD["en"] + " How nice.", False),
])  # fmt: skip
def test_a_description_is_false_where_any_statement_is(text, false):
    assert untrue(text, GOOD["en"], "en") == false


def test_length_is_in_words_and_in_characters():
    assert (length(GOOD["en"], "en"), length(GOOD["zh"], "zh")) == (13, 17)


def test_half_of_the_scenes_are_described_in_each_language_and_newness():
    examples = TASKS.make("hallucination").examples("test", 40)
    assert Counter(example.tags for example in examples) == {
        (language, freshness): 10 for language in LANGUAGES for freshness in ("new", "trained")}  # fmt: skip
    assert Hallucination.size >= 1000
    asked = {example.prompt.messages[-1].text for example in examples}
    assert asked == {"Describe the picture in detail.", "详细描述这张图。"}
    assert not {e.prompt.pictures for e in examples} & {e.prompt.pictures for e in Hallucination().examples("val", 40)}


def absent_from(example) -> Category:
    return next(c for c in categories() if c not in mentions(example.answer, example.tags[0]))


def test_the_numbers_of_descriptions_by_hand():
    task = Hallucination()
    examples = [e for e in task.examples("test", 40) if e.tags[0] == "en"][:4]
    objects = [len(set(mentions(e.answer, "en"))) for e in examples]
    named = [len(mentions(e.answer, "en")) for e in examples]
    invented = f"At the bottom is one {absent_from(examples[1]).en}."
    answers = [examples[0].answer, f"{examples[1].answer} {invented}", "", Truncated(examples[3].answer)]
    scores, metrics = task.measure(examples, answers)
    words = sum(len(answer.split()) for answer in answers) / 4
    assert metrics == {
        "false": 1 / 4,
        "chair_s": 1 / 4,
        "chair_i": 1 / (named[0] + named[1] + 1 + named[3]),
        "cover": (objects[0] + objects[1] + objects[3]) / sum(objects),
        "length": words, "length_words": words, "malformed": 2 / 4,
    }  # fmt: skip
    assert scores == [1.0, pytest.approx(2 * objects[1] / (2 * objects[1] + 1)), 0.0, 1.0]


def test_lengths_in_words_and_characters_stand_apart():
    examples = Hallucination().examples("test", 4)
    _, metrics = Hallucination().measure(examples, [GOOD[e.tags[0]] for e in examples])
    assert (metrics["length_words"], metrics["length_characters"], metrics["length"]) == (13, 17, 15)


def test_a_model_that_sees_passes_and_one_that_recites_fails():
    """Through `evaluate`, with its controls: the score of a control is the mean F1 of its answers."""
    task = Hallucination()
    truth = {e.prompt.pictures: e.answer for e in task.examples("test", 60)}
    metrics, rows = evaluate("hallucination", task, "test", lambda ps: [truth.get(p.pictures, "") for p in ps], 60, controls=2)
    assert (metrics["hallucination/chair_s"], metrics["hallucination/cover"], metrics["hallucination/malformed"]) == (0, 1, 0)
    assert metrics["hallucination/blank"] == 0 and metrics["hallucination/shuffled"] < 0.3
    assert metrics["hallucination/n"] == len(rows) == 60
    english, _ = evaluate("hallucination", task, "test", lambda ps: [GOOD["en"]] * len(ps), 60)
    assert 0.45 < english["hallucination/chair_s"] <= 0.5 == english["hallucination/malformed"]  # it names nothing in Chinese


def test_saved_answers_are_scored_again_as_they_were_before():
    task = Hallucination()
    said = lambda prompts: [Truncated(GOOD["en"]) if k % 3 else GOOD["zh"] for k in range(len(prompts))]  # noqa: E731
    metrics, rows = evaluate("hallucination", task, "test", said, 12)
    again = [json.loads(json.dumps(row)) for row in rows]
    assert rescore("hallucination", task, again) == (metrics, rows)
    with pytest.raises(ValueError, match="0 are to questions of 'world_pope'"):
        rescore("world_pope", WorldPOPE(), again)


# ---------------------------------------------------------------- is there a ...?


def asked_about(example) -> Category:
    (category,) = mentions(example.prompt.messages[-1].text, example.tags[0])
    return category


def test_every_kind_is_half_yes_and_every_answer_is_true():
    examples = WorldPOPE().examples("test", 60)
    assert len(examples) == 360 and len({e.prompt.id for e in examples}) == 360
    for example in examples:
        scene = sample_scene("test", int(example.prompt.id.split("/")[2]))
        assert (yes_or_no(example.answer) == "yes") == (asked_about(example) in scene.counts)
    for kind in WorldPOPE.kinds:
        assert Counter(yes_or_no(e.answer) for e in examples if e.kind == kind) == {"yes": 60, "no": 60}


def test_the_questions_are_those_that_the_world_asks():
    scene, known = sample_scene("test", 3), set()
    for language in LANGUAGES:
        known |= {questions.exists(scene, language, random.Random(i), "nano").text for i in range(400)}
        assert {exists(category, language) for category in scene.counts} <= known


def test_what_is_frequent_and_what_goes_together_is_counted_by_hand(monkeypatch):
    ant, bat, bear, bird, *_ = categories()
    scenes = [[ant, bat], [ant, bat, bear], [ant, ant, bird], [bird]]

    def scene(split, i, which, most):
        assert split == "train"
        return Scene("", tuple(Object(c, k, 0, 0, 28) for k, c in enumerate(scenes[i])), (255, 255, 255))

    monkeypatch.setattr("dataset.tasks.hallucination.sample_scene", scene)
    alone, beside = seen_in_training.__wrapped__("nano", 4, 4)  # past its cache: others want the true scenes
    assert alone == {ant: 3, bat: 2, bear: 1, bird: 2}
    assert beside == {ant: {bat: 2, bear: 1, bird: 1}, bat: {ant: 2, bear: 1}, bear: {ant: 1, bat: 1}, bird: {ant: 1}}
    assert by_count(alone, [bird, bear, bat, ant]) == [ant, bat, bird, bear]  # bat before bird by the alphabet


def test_popular_and_adversarial_things_are_what_they_are_called():
    task = WorldPOPE()
    alone, beside = seen_in_training("nano", 4, 5_000)
    for example in task.examples("test", 60):
        there = set(sample_scene("test", int(example.prompt.id.split("/")[2])).counts)
        category, missing = asked_about(example), [c for c in categories() if c not in there]
        if yes_or_no(example.answer) == "yes":
            continue
        if example.kind == "popular":
            assert sum(alone[other] > alone[category] for other in missing) < POPULAR
        if example.kind == "adversarial":
            together = {other: sum(beside[obj][other] for obj in there) for other in missing}
            assert together[category] == max(together.values()) > 0


def test_the_questions_are_the_same_in_every_process():
    assert [e.prompt.messages[-1].text for e in WorldPOPE().examples("test", 20)] == [
        e.prompt.messages[-1].text for e in WorldPOPE().examples("test", 20)]  # fmt: skip
    first = WorldPOPE().examples("test", 2)
    assert [e.prompt.messages[-1].text for e in WorldPOPE().examples("test", 30)[:12]] == [
        e.prompt.messages[-1].text for e in first]  # fmt: skip


def test_a_model_that_always_says_yes_is_half_right_with_full_recall():
    examples = WorldPOPE().examples("test", 30)
    scores, metrics = WorldPOPE().measure(examples, ["yes" if e.tags[0] == "en" else "是" for e in examples])
    for kind in ("", "random_", "popular_", "adversarial_"):
        numbers = {name: metrics[kind + name] for name in ("accuracy", "precision", "recall", "f1", "yes", "unparsed")}
        assert numbers == {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes": 1, "unparsed": 0}
    assert sum(scores) == len(scores) / 2


def test_the_three_kinds_are_scored_apart():
    examples = WorldPOPE().examples("test", 30)
    answers = [e.answer if e.kind == "random" else "?" if e.kind == "popular" else "no" for e in examples]
    scores, metrics = WorldPOPE().measure(examples, answers)
    assert (metrics["random_accuracy"], metrics["random_f1"], metrics["random_yes"]) == (1, 1, 0.5)
    assert (metrics["popular_accuracy"], metrics["popular_unparsed"], metrics["popular_precision"]) == (0, 1, 0)
    assert (metrics["adversarial_accuracy"], metrics["adversarial_recall"], metrics["adversarial_yes"]) == (0.5, 0, 0)
    assert metrics["accuracy"] == 0.5 == sum(scores) / len(scores)


def test_the_controls_ask_about_things_that_are_there_and_things_that_are_not():
    examples = WorldPOPE().examples("test", 60)[::8]
    assert 15 < sum(yes_or_no(e.answer) == "yes" for e in examples) < 30 and len(examples) == 45


def test_neither_task_is_trained_on():
    assert TASKS.make("hallucination").train("sft") is None and TASKS.make("world_pope").train("pretrain") is None

"""The embedded world: its truth, recomputed here from the pictures' contents alone, and what is held out."""

import functools
import random
import re
import zlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from dataset.chat import Prefill
from dataset.tasks import world
from dataset.tasks.arithmetic import Arithmetic, split_of
from dataset.tasks.easy_vqa import COLOURS, SHAPES, YES_NO, EasyVQA, known_shapes, shape_drawing
from dataset.tasks.text import Text
from dataset.tasks.world import World, picture
from dataset.tokenizer import SentencePieceTokenizer
from dataset.world import drawings, inventories, openmoji, questions
from dataset.world.openmoji import LANGUAGES, Category, categories, paste, plural, with_article
from dataset.world.scenes import (
    Object,
    Scene,
    chance,
    changed_scene,
    companions,
    draw_scene,
    held_out_pair,
    is_new,
    sample_scene,
    varied_scene,
)
from dataset.world.words import caption, description, mentions

NANO = categories("nano")
scene = functools.cache(sample_scene)  # many tests look at the same scenes

# ---------------------------------------------------------------- categories and words


def test_the_nano_categories_have_names_of_their_own_in_both_languages():
    assert len(NANO) == 100
    for names in ([c.en for c in NANO], [c.zh for c in NANO], [plural(c.en) for c in NANO], [c.code for c in NANO]):
        assert len(set(names)) == 100 and all(names)
    assert not {c.en for c in NANO} & {plural(c.en) for c in NANO}  # a word says whether it is one or more
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in c.zh) for c in NANO)


def test_every_emoji_without_a_skin_tone_is_a_category():
    everything = categories("all")
    assert 1800 < len(everything) < 2100
    assert set(NANO) <= set(everything)
    assert len({category.en for category in everything}) == len(everything)
    with pytest.raises(ValueError, match="'nano' or 'all', not 'some'"):
        categories("some")


@pytest.mark.parametrize(("name", "more"), [
    ("bus", "buses"), ("fox", "foxes"), ("butterfly", "butterflies"), ("tomato", "tomatoes"), ("key", "keys"),
    ("peach", "peaches"), ("kangaroo", "kangaroos"), ("avocado", "avocados"), ("octopus", "octopuses"), ("candle", "candles"),
    ("hot dog", "hot dogs"), ("watch", "watches"), ("strawberry", "strawberries"), ("giraffe", "giraffes"), ("axe", "axes"),
    ("trophy", "trophies"),
])  # fmt: skip
def test_plurals_are_english(name, more):
    assert plural(name) == more


@pytest.mark.parametrize("words", ["an ant", "a bus", "an umbrella", "a hot dog", "an octopus", "a horse", "an owl", "a unicorn"])
def test_articles_are_english(words):
    assert with_article(words.split(" ", 1)[1]) == words


def test_a_caption_written_out():
    ant, bus, key = (next(c for c in NANO if c.en == name) for name in ("ant", "bus", "key"))
    objects = tuple(Object(category, cell, 0, 0, 24) for category, cell in ((bus, 0), (key, 2), (bus, 4), (ant, 8)))
    shown = Scene("", objects, (255, 255, 255))
    assert caption(shown, "en") == "Two buses, a key and an ant."
    assert caption(shown, "zh") == f"两个{bus.zh}、一个{key.zh}和一个{ant.zh}。"
    assert description(shown, "en") == (
        "At the top left is one bus. At the top right is one key. At the center is one bus. "
        "At the bottom right is one ant.")  # fmt: skip
    assert description(shown, "zh") == f"左上有一个{bus.zh}。右上有一个{key.zh}。中间有一个{bus.zh}。右下有一个{ant.zh}。"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("most", [4, 9])
def test_captions_and_descriptions_name_exactly_what_is_there(language, most):
    for index in range(300):
        shown = scene("val", index, most=most)
        assert mentions(caption(shown, language), language) == list(shown.counts)
        assert mentions(description(shown, language), language) == [obj.category for obj in shown.objects]


def test_a_longer_name_is_not_the_shorter_one_inside_it():
    assert [c.en for c in mentions("A hot dog and two sunflowers.", "en")] == ["hot dog", "sunflower"]
    assert mentions("The battery is flat; a caring keyboard.", "en") == []


# ---------------------------------------------------------------- scenes


def test_a_scene_is_the_same_every_time():
    assert [sample_scene("train", i) for i in range(50)] == [sample_scene("train", i) for i in range(50)]
    assert np.array_equal(draw_scene(sample_scene("test", 3)), draw_scene(sample_scene("test", 3)))


def test_the_world_is_the_same_on_every_machine():
    """Written down: a new version of the code or of a package must not move the test set under old checkpoints."""
    assert [caption(scene("test", i), "en") for i in range(3)] == [
        "A whale and a trophy.", "A bicycle, an umbrella and a trophy.", "A frog.",
    ]  # fmt: skip


def held_out(shown: Scene) -> bool:
    """A pair of different categories, or a category more than once, that falls into the tenth that is never trained."""

    def tenth(*words) -> bool:
        return zlib.crc32("|".join(map(str, words)).encode()) < 2**32 / 10

    counts = Counter(obj.category.en for obj in shown.objects)
    return any(tenth("pair", *pair) for pair in combinations(sorted(counts), 2)) or any(
        tenth("count", name, n) for name, n in counts.items() if n >= 2
    )


def test_train_has_no_held_out_combination_and_every_second_test_scene_has_one():
    assert not any(held_out(scene("train", i)) for i in range(1000))
    for split in ("val", "test"):
        assert [held_out(scene(split, i)) for i in range(300)] == [False, True] * 150


def test_a_tenth_of_all_combinations_is_held_out():
    pairs = [chance("pair", *sorted((a.en, b.en))) < 0.1 for a, b in combinations(NANO, 2)]
    counts = [chance("count", c.en, n) < 0.1 for c in NANO for n in (2, 3, 4)]
    assert 0.08 < sum(pairs) / len(pairs) < 0.12
    assert 0.05 < sum(counts) / len(counts) < 0.15


def test_no_picture_is_in_two_splits():
    task = World()
    keys = {split: {picture.key for example in task.examples(split, 150) for picture in example.prompt.pictures}
            for split in ("val", "test")}  # fmt: skip
    keys["train"] = {picture.key for stage in ("pretrain", "sft") for i in range(600)
                     for picture in task.train(stage)[i].pictures}  # fmt: skip
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="train, val or test, not 'valid'"):
        sample_scene("valid", 0)


def test_things_lie_apart_inside_their_cells():
    for index in range(200):
        shown = scene("train", index, most=9)
        cells = [obj.cell for obj in shown.objects]
        assert cells == sorted(set(cells))
        assert cells == [obj.y // 32 * 3 + obj.x // 32 for obj in shown.objects]
        assert cells == [(obj.y + obj.size - 1) // 32 * 3 + (obj.x + obj.size - 1) // 32 for obj in shown.objects]


def test_an_altered_drawing_is_mirrored_or_has_its_colours_exchanged():
    bus, forms = NANO[61], {}
    for k in range(200):
        form = openmoji.altered(bus, random.Random(k))
        forms[form.code.removeprefix(bus.code)] = openmoji.drawing(form.code, 28)
        assert (form.en, form.zh) == (bus.en, bus.zh)
    plain = forms[""]
    assert len(forms) == 12 and np.array_equal(forms["~012m"], plain[:, ::-1])
    assert np.array_equal(forms["~201"], plain[..., [2, 0, 1, 3]]) and np.array_equal(forms["~201m"], forms["~201"][:, ::-1])


def test_sft_shows_the_scenes_of_pretraining_so_that_features_are_shared():
    task = World()
    for i in range(40):
        shared = {picture(task.scene("train", i)), picture(task.crowded(i))}
        assert {task.train(stage)[i].pictures[0] for stage in ("pretrain", "sft")} <= shared


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_pictures_of_a_row_are_listed_without_its_words(stage, monkeypatch):
    rows = World(rows=300, scenes=60).train(stage)
    shown = [[picture.key for picture in rows[i].pictures] for i in range(300)]
    assert {len(keys) for keys in shown} == ({1} if stage == "pretrain" else {1, 2})
    monkeypatch.setattr("dataset.tasks.world.turn", None)
    monkeypatch.setattr("dataset.world.inventories.lines", None)
    assert [[picture.key for picture in rows.pictures(i)] for i in range(300)] == shown


def test_rows_are_functions_of_their_number():
    for task in (World(), Arithmetic(), Text(), EasyVQA()):
        one, two = task.train("sft")[11], type(task)().train("sft")[11]
        assert one == two
        assert all(np.array_equal(a.load(), b.load()) for a, b in zip(one.pictures, two.pictures))
        with pytest.raises(IndexError):
            task.train("sft")[10**9]


def test_a_changed_scene_differs_in_exactly_one_thing():
    kinds = Counter()
    for index in range(300):
        before = scene("val", index)
        after, kind, old, new = changed_scene(before, random.Random(index))
        gone, came = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
        expected = {"same": (0, 0), "added": (0, 1), "removed": (1, 0), "replaced": (1, 1)}[kind]
        assert (len(gone), len(came)) == expected
        assert (gone, came) == ({old} - {None}, {new} - {None})
        if kind == "replaced":
            assert (old.x, old.y, old.size) == (new.x, new.y, new.size)
            assert old.category != new.category
        assert [obj.cell for obj in after.objects] == sorted({obj.cell for obj in after.objects})
        assert after.background == before.background
        assert held_out(after) == held_out(before) or kind == "same"
        kinds[kind] += 1
    assert min(kinds[kind] for kind in ("same", "added", "removed", "replaced")) > 30


# ---------------------------------------------------------------- questions, answered again from the pixels' boxes

PLACES = {"en": "top left,top,top right,left,center,right,bottom left,bottom,bottom right".split(","),
          "zh": "左上,上方,右上,左边,中间,右边,左下,下方,右下".split(",")}  # fmt: skip


def place(obj: Object) -> tuple[int, int]:
    """(row, column) on the 3 x 3 grid of the middle of its box."""
    return (obj.y + obj.size // 2) // 32, (obj.x + obj.size // 2) // 32


def called(shown: Scene, name: str, language: str) -> list[Object]:
    """The things of this name, singular or plural; the name must exist."""
    return [obj for obj in shown.objects if obj.category == by_form(language)[name]]


@functools.cache
def by_form(language: str) -> dict[str, Category]:
    return {form: c for c in NANO for form in ((c.en, plural(c.en)) if language == "en" else (c.zh,))}


def only(shown: Scene, name: str, language: str) -> Object:
    (obj,) = called(shown, name, language)  # a question about "the" thing has one
    return obj


def named(obj: Object, language: str) -> str:
    """A name after its article, so that it follows a space."""
    vowel = obj.category.en[0] in "aeiou" and not obj.category.en.startswith("uni")
    return (("an " if vowel else "a ") + obj.category.en) if language == "en" else obj.category.zh


def yes(truth: bool, language: str) -> str:
    return {"en": ("no", "yes"), "zh": ("否", "是")}[language][truth]


def truth(text: str, shown: Scene, language: str) -> str:
    """The right answer to a question about one scene."""
    def asks(english: str, chinese: str):
        return re.fullmatch(english if language == "en" else chinese, text)

    names = [obj.category.name(language) for obj in shown.objects]
    if asks(r"How many things are there in total\?", "一共有几个东西？"):
        return str(len(names))
    if asks(r"List everything in reading order\.", "按顺序列出所有东西。"):
        in_order = sorted(shown.objects, key=place)
        return (", " if language == "en" else "、").join(named(obj, language) for obj in in_order)
    if found := asks(r"What is at the (.+)\?", "(.+)是什么？"):
        there = [named(t, language) for t in shown.objects if place(t) == divmod(PLACES[language].index(found[1]), 3)]
        return there[0] if there else {"en": "nothing", "zh": "没有东西"}[language]
    if found := asks(r"Where is the (.+)\?", "(.+)在哪里？"):
        row, column = place(only(shown, found[1], language))
        return ("at the " if language == "en" else "") + PLACES[language][3 * row + column]
    if found := asks(r"How many (.+) are there\?", "有几个(.+)？"):
        return str(len(called(shown, found[1], language)))
    if found := asks(r"Is there an? (.+) at the (.+)\?", f"({'|'.join(PLACES['zh'])})有(.+)吗？"):
        name, where = found.groups() if language == "en" else (found[2], found[1])
        there = [place(obj) for obj in called(shown, name, language)]
        return yes(divmod(PLACES[language].index(where), 3) in there, language)
    if found := asks(r"Is there an? (.+)\?", "有(.+)吗？"):
        return yes(bool(called(shown, found[1], language)), language)
    if found := asks(r"Are there more (.+) or more (.+)\?", "(.+)和(.+)哪个多？"):
        one, two = (len(called(shown, name, language)) for name in found.groups())
        more = found[1 if one > two else 2]
        return {"en": "equal", "zh": "一样多"}[language] if one == two else f"more {more}" if language == "en" else more
    sides = "to the left of|to the right of|above|below"
    if found := asks(rf"Is the (.+) ({sides}) the (.+)\?", "(.+)在(.+)的(左边|右边|上面|下面)吗？"):
        one, how, two = found.groups() if language == "en" else (found[1], found[3], found[2])
        (row, column), (other_row, other_column) = (place(only(shown, name, language)) for name in (one, two))
        true = {"to the left of": column < other_column, "to the right of": column > other_column, "above": row < other_row,
                "below": row > other_row}  # fmt: skip
        true |= dict(zip(("左边", "右边", "上面", "下面"), true.values()))
        return yes(true[how], language)
    raise AssertionError(f"what does {text!r} ask?")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", questions.KINDS)
def test_every_answer_is_true_of_the_scene(kind, language):
    asked = 0
    for index in range(150):
        shown = scene("val", index, most=random.Random(index).choice((4, 9)))
        question = questions.ask(kind, shown, language, random.Random(index))
        if question is not None:
            assert question.kind == kind
            assert question.answer == truth(question.text, shown, language)
            asked += 1
    assert asked > 40


def pair_truth(text: str, first: Scene, second: Scene, language: str) -> str:
    """The right answer to a question about two scenes."""
    gone, came = set(first.objects) - set(second.objects), set(second.objects) - set(first.objects)
    if text in ("What changed from the first picture to the second?", "第二张图和第一张图相比有什么变化？"):
        old, new = ("".join(named(obj, language) for obj in objects) for objects in (gone, came))
        sentences = {"en": ("nothing changed", f"{new} was added", f"{old} was removed", f"{old} became {new}"),
                     "zh": ("没有变化", f"多了{new}", f"少了{old}", f"{old}变成了{new}")}[language]  # fmt: skip
        return sentences[bool(new) + 2 * bool(old)]
    if found := re.fullmatch(r"Which picture has an? (.+)\?|哪张图有(.+)？", text):
        has = [bool(called(shown, found[1] or found[2], language)) for shown in (first, second)]
        words = {"en": ("neither", "the first", "the second", "both"), "zh": ("都没有", "第一张", "第二张", "都有")}[language]
        return words[has[0] + 2 * has[1]]
    found = re.fullmatch(r"How many (.+) are there in both pictures together\?|两张图一共有几个(.+)？", text)
    return str(sum(len(called(shown, found[1] or found[2], language)) for shown in (first, second)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_answer_about_two_pictures_is_true_of_them(language):
    for index in range(150):
        rng = random.Random(index)
        first = scene("val", index)
        second, *change = changed_scene(first, rng)
        asked = [questions.difference(*change, language), questions.which_picture(first, second, language, rng, "nano"),
                 questions.together(first, second, language, rng, "nano")]  # fmt: skip
        for question in asked:
            assert question.answer == pair_truth(question.text, first, second, language)


def test_the_questions_of_the_task_are_these_questions():
    """Whatever the words of a test example, what it asks in plain words is one that `truth` knows, and every answer is right."""
    task = World()
    scenes = [task.scene("test", i) for i in range(60)]
    for example in task.examples("test", 60):
        shown = scenes[int(example.prompt.id.split("/")[2])]
        if example.kind in questions.KINDS:
            assert example.answer == truth(example.question, shown, example.tags[0])
        elif example.kind == "caption":
            assert mentions(example.answer, example.tags[0]) == list(shown.counts)
        assert example.tags[1] == ("new" if held_out(shown) else "trained")


def test_a_turn_of_training_asks_its_question_in_trained_words_and_reasons_where_it_is_asked_to():
    reasoned = 0
    for index in range(200):
        language, rng = LANGUAGES[index % 2], random.Random(index)
        question = questions.ask("count", scene("train", index), language, rng)
        text, answer = world.turn(question, rng)
        think = world.THINK[language]
        assert re.sub(r"<think>.*</think><answer>(.*)</answer>", r"\1", answer) == question.answer
        assert (answer != question.answer) == text.endswith(think)
        reasoned += text.endswith(think)
    assert 30 < reasoned < 70


COMMA = {"en": ", ", "zh": "，"}
NUMBERS = ("none one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen").split()  # fmt: skip


def inventory_truth(kind: str, asked: str, shown: list[Scene], language: str) -> list[str]:
    """What may stand behind a name: several answers only where its place is asked for and it appears more than once."""
    if kind in ("what", "change"):
        cell = PLACES[language].index(asked.removeprefix("the "))
        there = [next((obj.category.name(language) for obj in one.objects if obj.cell == cell), None) for one in shown]
        if language == "en":
            there = [name and f"{'an' if name[0] in 'aeiou' and name != 'unicorn' else 'a'} {name}" for name in there]
        nothing = {"en": "nothing", "zh": "没有东西"}[language]
        if kind == "what":
            return [there[0] or nothing]
        before, after = there
        cases = (not before and not after, before == after, not before, not after, True)
        words = {"en": (nothing, "nothing changed", f"{after} was added", f"{before} was removed", f"{before} became {after}"),
                 "zh": (nothing, "没有变化", f"多了{after}", f"少了{before}", f"{before}变成了{after}")}  # fmt: skip
        return [words[language][cases.index(True)]]
    if kind == "relation":  # the question about the same pair
        asked = re.sub(" (left|right) of ", r" to the \1 of ", asked)
        return [truth(f"Is {asked}?" if language == "en" else f"{asked[:-2]}的{asked[-2:]}吗？", shown[0], language)]
    if kind == "exists_at":
        name, at = asked.split(" at the ") if language == "en" else asked.split("的", 1)[::-1]
        found = called(shown[0], re.sub("^an? ", "", name), language)
        return [yes(at in [PLACES[language][3 * row + column] for row, column in map(place, found)], language)]
    found = [called(one, re.sub("^(an?|the) ", "", asked), language) for one in shown]
    if kind == "place":
        cells = [PLACES[language][3 * row + column] for row, column in map(place, found[0])]
        return [f"at the {cell}" if language == "en" else cell for cell in cells]
    if kind == "exists":
        return [yes(bool(found[0]), language)]
    if kind == "which_picture":
        words = {"en": ("neither", "the first", "the second", "both"), "zh": ("都没有", "第一张", "第二张", "都有")}[language]
        return [words[bool(found[0]) + 2 * bool(found[1])]]
    total = sum(map(len, found))
    return [NUMBERS[total] if language == "en" else str(total)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", (*inventories.ONE_SCENE, *inventories.TWO_SCENES))
def test_every_line_of_an_inventory_is_true(kind, language):
    said = Counter()
    for index in range(60):
        shown = [scene("train", index, most=9, least=4)]
        if kind in inventories.TWO_SCENES:
            shown.append(varied_scene(shown[0], random.Random(index)))
        lines = inventories.lines(kind, shown, language, random.Random(index), "nano")
        assert len({given for given, _ in lines}) == len(lines)  # nothing is asked twice
        for given, answer in lines:
            asked, answer = given.removeprefix(COMMA[language]), answer.strip()
            assert answer in inventory_truth(kind, asked, shown, language), (asked, answer)
            said[answer] += 1
    assert said.total() > 60 and said.most_common(1)[0][1] < 0.6 * said.total()  # no answer is right for most


def test_companions_are_mutual_often_together_and_never_held_out():
    found = companions()
    assert len(found) == len(NANO)
    assert all(found[other] == one != other and not held_out_pair(one, other) for one, other in found.items())
    together = Counter()
    for index in range(500):
        there = set(scene("train", index).counts)
        together.update(found[one] in there for one in there)
    others = sum(len(scene("train", index).counts) - 1 for index in range(500)) / 500 / len(NANO)
    assert together[True] / together.total() > 5 * others  # than any other thing


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 0, 0), (0.5, 0.35, 0.65), (1.0, 1, 1)])
def test_noisy_descriptions_name_the_absent_companion_of_the_last_thing_and_nothing_else(noise, least, most):
    task, found, tempted, named_it = World(description_noise=noise), companions(), 0, 0
    for index in range(200):
        shown = scene("train", index)
        last, language = shown.objects[-1], LANGUAGES[index % 2]
        companion = found[last.category]
        imagined = task.imagined(shown, random.Random(index))
        assert imagined.objects[:len(shown.objects)] == shown.objects and not is_new(imagined)
        room = last.cell < 7
        for extra in imagined.objects[len(shown.objects):]:
            assert room and extra.cell == last.cell + 1 and extra.category not in shown.counts
            possible = companion not in shown.counts and not any(held_out_pair(companion, other) for other in shown.counts)
            assert not possible or extra.category == companion
            assert description(imagined, language).startswith(description(shown, language))
        tempted, named_it = tempted + room, named_it + (imagined != shown)
    assert least <= named_it / tempted <= most


def test_captions_and_answers_are_clean_and_pretraining_descriptions_too():
    task = World(description_noise=1.0)
    for index in range(200):
        row = task.train("pretrain")[index]
        text = row.messages[1].text
        language = "en" if text.isascii() else "zh"
        if row.messages[0].text not in inventories.ASK[language].values():
            assert set(mentions(text, language)) == set(task.scene("train", index).counts)


def test_a_varied_scene_shares_some_places_and_is_never_new():
    shared = Counter()
    for index in range(100):
        before = scene("train", index, most=9, least=4)
        after = varied_scene(before, random.Random(index))
        assert not is_new(after)
        shared.update(obj in after.objects for obj in before.objects)
    assert 0.4 < shared[True] / shared.total() < 0.6


def test_a_name_is_one_token_wherever_it_stands():
    """Names are looked up by their embedding: in pieces, or with another piece at the start of a text, they would be others."""
    tokenizer = SentencePieceTokenizer()
    for category in NANO:
        for form in (category.en, plural(category.en)):
            assert len(tokenizer.encode(f" {form}")) == len(form.split()), form
            assert tokenizer.encode(f"the {form}?")[-1 - len(form.split()):-1] == tokenizer.encode(f" {form}")
        (piece,) = tokenizer.encode(category.zh)
        for text in (f"有{category.zh}吗？", f"一个{category.zh}。", f"{category.zh}在哪里？", f"左上有一个{category.zh}。"):
            assert piece in tokenizer.encode(text), text


@pytest.mark.parametrize("kind", ["exists", "exists_at", "relation", "compare"])
def test_answers_are_balanced(kind):
    """The commonest answer of a kind does not give a blind model more than 65 %."""
    answers = Counter()
    for index in range(400):
        question = questions.ask(kind, scene("train", index), "en", random.Random(index))
        if question:
            places = {"compare": "first" if f"{question.answer} or" in question.text else "second"}
            answers["equal" if question.answer == "equal" else places.get(kind, question.answer)] += 1
    assert answers.most_common(1)[0][1] < 0.65 * answers.total()


def test_counting_thoughts_end_at_the_answer():
    for index in range(100):
        question = questions.ask("count", scene("train", index), LANGUAGES[index % 2], random.Random(index))
        assert ([*re.findall(r"\d", question.thoughts), "0"] if question.answer == "0" else re.findall(r"\d", question.thoughts))[
            -1] == question.answer  # fmt: skip


# ---------------------------------------------------------------- pixels


def differing(one, two) -> np.ndarray:
    """(96, 96) bool: where two pictures differ."""
    return (np.asarray(one) != np.asarray(two)).any(-1)


def test_a_thing_changes_the_pixels_of_its_box_and_no_others():
    for index in range(30):
        shown = scene("train", index)
        for k, obj in enumerate(shown.objects):
            without = Scene("", shown.objects[:k] + shown.objects[k + 1 :], shown.background)
            where = differing(draw_scene(shown), draw_scene(without))
            assert where[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size].mean() > 0.1
            where[obj.y : obj.y + obj.size, obj.x : obj.x + obj.size] = False
            assert not where.any()


def test_transparent_pixels_show_what_is_under_them():
    canvas = np.full((2, 2, 3), 200, np.uint8)
    picture = np.zeros((2, 2, 4), np.uint8)
    picture[0, 0], picture[0, 1] = (100, 0, 0, 255), (100, 0, 0, 128)
    paste(canvas, picture, 0, 0)
    assert canvas[0, 0].tolist() == [100, 0, 0]
    assert canvas[0, 1].tolist() == [149, 99, 99]
    assert canvas[1].tolist() == [[200] * 3] * 2


def test_a_patch_belongs_to_the_region_that_covers_most_of_it():
    regions = (drawings.Region((0, 0, 32, 16), "a", "a"),  # patches 0 and 1 whole
               drawings.Region((12, 0, 24, 16), "b", "b"),  # a quarter of patch 0, half of patch 1: less than the first
               drawings.Region((80, 80, 88, 96), "c", "c"),  # half of the last patch
               drawings.Region((32, 0, 35, 16), "d", "d"),  # 3/16 of patch 2: too little
               drawings.Region((48, 16, 64, 26), "e", "e"))  # fmt: skip
    owners = drawings.region_of_patches(regions, 16)
    expected = np.full(36, -1)
    expected[[0, 1]], expected[35], expected[6 + 3] = 0, 2, 4
    assert owners.tolist() == expected.tolist()


def spots(image) -> int:
    """How many spots the dice in a picture show: each covers about 23 pixels of its own colour, neighbours may touch."""
    ink = (np.asarray(image) == (20, 20, 20)).all(-1)
    cells = [ink[y : y + 32, x : x + 32].sum() for y in (0, 32, 64) for x in (0, 32, 64)]
    return sum(round(pixels / 23) for pixels in cells)


@pytest.mark.parametrize("value", range(1, 7))
def test_a_die_shows_as_many_spots_as_its_value(value):
    drawing = drawings.dice([value], random.Random(value))
    assert spots(drawing.image) == value
    assert [region.en for region in drawing.regions] == [f"die showing {value}"]


@pytest.mark.parametrize(("draw_values", "new"), [(drawings.digits, 7), (drawings.dice, 5)])
def test_another_value_changes_its_own_region_only(draw_values, new):
    one, two = draw_values([1, 2, 3, 4], random.Random(5)), draw_values([1, new, 3, 4], random.Random(5))
    where = differing(one.image, two.image)
    assert where.any()
    for drawing in (one, two):
        left, top, right, bottom = (round(edge) for edge in drawing.regions[1].box)
        where[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False
    assert not where.any()
    assert [region.en[-1] for region in one.regions] == list("1234")


def test_a_shape_has_its_colour_at_its_middle():
    members = [("red", "circle"), ("blue", "triangle"), ("yellow", "rectangle")]
    drawing = drawings.shapes(members, random.Random(0))
    for (colour, shape), region in zip(members, drawing.regions):
        left, top, right, bottom = region.box
        assert drawing.image.getpixel(((left + right) // 2, (top + bottom) // 2)) == drawings.COLOURS[colour][1]
        assert region.en == f"{colour} {shape}"


BOARD = ["######", "#@ $.#", "# *+ #", "# $  #", "# .  #", "######"]


def test_a_board_draws_one_square_a_patch():
    drawing = drawings.board(BOARD, random.Random(0))
    assert drawings.region_of_patches(drawing.regions, 16).tolist() == list(range(36))
    assert [region.en for region in drawing.regions] == [drawings.SOKOBAN[sign][0] for row in BOARD for sign in row]
    assert drawing.en == "A Sokoban board with 3 boxes and 4 targets."


@pytest.mark.parametrize(("row", "column", "sign"), [(1, 1, " "), (1, 3, "*"), (1, 4, "+"), (2, 2, "."), (3, 4, "#")])
def test_another_square_changes_its_own_pixels_only(row, column, sign):
    other = [list(line) for line in BOARD]
    other[row][column] = sign
    where = differing(*(drawings.board(lines, random.Random(0)).image for lines in (BOARD, ["".join(line) for line in other])))
    assert where.any()
    where[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = False
    assert not where.any()


def test_a_board_that_is_too_large_or_unreadable_is_refused():
    for rows in (["#" * 7], ["#"] * 7, ["x"]):
        with pytest.raises(ValueError, match="at most 6 x 6"):
            drawings.board(rows, random.Random(0))


def test_random_drawings_keep_their_regions_on_the_canvas_and_name_them():
    rng = random.Random(0)
    for _ in range(60):
        drawing = drawings.random_drawing(rng)
        assert drawing.image.size == (96, 96) and drawing.regions
        for region in drawing.regions:
            left, top, right, bottom = region.box
            assert -1 <= left < right <= 97 and -1 <= top < bottom <= 97
            assert region.en and region.zh


# ---------------------------------------------------------------- arithmetic


def test_sums_in_pictures_and_words_are_right():
    kinds = Counter()
    for example in Arithmetic().examples("test", 200):
        text = example.prompt.messages[-1].text
        if example.kind == "text":
            assert int(example.answer) == sum(map(int, re.findall(r"\d+", text)))
        elif "dice" in text or "骰子" in text:
            (shown,) = example.prompt.pictures
            assert int(example.answer) == spots(shown.load())
            kinds["dice"] += 1
        kinds[example.kind] += 1
    assert min(kinds["text"], kinds["dice"], kinds["image"] - kinds["dice"]) > 30


def test_the_reasoning_of_a_sum_is_true_step_by_step():
    for i in range(200):
        answer = Arithmetic().train("sft")[i].messages[-1].text
        seen, steps, final = re.fullmatch(r"<think>([\d, ]+)\. ([^.]+)\.</think><answer>(\d+)</answer>", answer).groups()
        values, total = list(map(int, seen.split(", "))), None
        for step, value in zip(steps.split(", "), values[1:], strict=True):
            before, added, after = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())
            assert (before, added, after) == (values[0] if total is None else total, value, before + added)
            total = after
        assert int(final) == total == sum(values)


def test_a_sum_that_is_tested_was_never_trained_in_any_form():
    task = Arithmetic()
    sums = {"train": set(), "val": set(), "test": set()}
    for i in range(1500):
        row = task.train("sft")[i].messages[-1].text
        sums["train"].add(tuple(sorted(map(int, re.match(r"<think>([\d, ]+)\.", row)[1].split(", ")))))
    for split in ("val", "test"):
        sums[split] = {tuple(sorted(task.problem(split, i).numbers)) for i in range(500)}
    assert not sums["train"] & sums["val"] and not sums["train"] & sums["test"] and not sums["val"] & sums["test"]
    assert all(len(found) > 50 for found in sums.values())


def test_rows_that_are_only_read_follow_the_sums_and_name_what_is_drawn():
    source = Arithmetic(rows=2, read=60).train("sft")
    sums, read = [source[i] for i in range(2)], [source[i] for i in range(2, len(source))]
    assert len(read) == 60 and all("<think>" in row.messages[-1].text for row in sums)
    assert len({row.pictures for row in read}) == 60
    dice = [row for row in read if "dice" in row.messages[0].text or "骰子" in row.messages[0].text]
    assert 15 < len(dice) < 45
    for row in read:
        values = list(map(int, re.findall(r"\d", row.messages[-1].text)))
        assert 4 <= len(values) <= 9 and row.messages[-1].text == ", ".join(map(str, values)) + "."
        assert split_of(values) == "train"
        if row in dice:
            assert sum(values) == spots(row.pictures[0].load())


def test_rows_that_only_add_learn_the_next_number_and_the_sum_of_each_step_and_tell_no_sum_of_another_split():
    source = Arithmetic(rows=2, read=3, text=True, lists=60).train("sft")
    rows = [source[i] for i in range(5, len(source))]
    assert len(rows) == 60 and not any(row.pictures for row in rows)
    lengths = set()
    for row in rows:
        message = row.messages[-1]
        sums = re.findall(r"(\d(?:, \d)+)\. ((?:\d+\+\d=\d+(?:, |\.))+)", message.text)
        assert len(sums) == 3 and " ".join(f"{numbers}. {steps}" for numbers, steps in sums) == message.text
        learned = []
        for numbers, steps in sums:
            values = list(map(int, numbers.split(", ")))
            assert split_of(values) == "train"
            ends = [sum(values[: k + 1]) for k in range(len(values))]
            assert steps == f"{', '.join(f'{ends[k]}+{values[k + 1]}={ends[k + 1]}' for k in range(len(values) - 1))}."
            for k in range(1, len(values)):
                learned += [str(values[k]), f"{ends[k]}{'.' if k + 1 == len(values) else ','}"]
            lengths.add(len(values))
        assert [part for part in message.parts if not isinstance(part, Prefill)] == learned
    assert lengths == {3, 4, 5}


def test_a_sum_without_a_request_to_think_is_answered_by_the_running_sum_alone():
    task = Arithmetic(rows=50, plain=50)
    sums = task.train("sft")
    for i in range(50, 100):
        question, answer = (message.text for message in sums[i].messages)
        assert not any(question.endswith(think) for think in world.THINK.values())
        asked = [row for row in (sums[k] for k in range(50)) if f"<think>{answer}</think>" in row.messages[-1].text]
        assert asked and sums[i].pictures in [row.pictures for row in asked]


def test_direct_rows_say_a_sum_in_a_picture_at_once_and_one_in_words_step_by_step():
    rows = [Arithmetic(direct=0.6).train("sft")[i] for i in range(300)]
    direct = [row for row in rows if "+" not in row.messages[-1].text]
    assert all(row.pictures for row in direct) and 0.5 < len(direct) / sum(bool(row.pictures) for row in rows) < 0.7
    for row in direct:
        seen, said = re.fullmatch(r"<think>([\d, ]+)\.</think><answer>(\d+)</answer>", row.messages[-1].text).groups()
        assert sum(map(int, seen.split(", "))) == int(said)


@pytest.mark.parametrize(("direct", "of_dice", "of_digits"),
                         [(0.4, 0.8, 0.0), (0.75, 1.0, 0.5), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_sums_of_dice_are_said_at_once_before_those_of_digits(direct, of_dice, of_digits):
    task, shares = Arithmetic(direct=direct), {True: [], False: []}
    for i in range(400):
        if (problem := task.problem("train", i)).pictures:
            shares[problem.dice].append("+" not in task.train("sft")[i].messages[-1].text)
    for dice, share in ((True, of_dice), (False, of_digits)):
        assert sum(shares[dice]) / len(shares[dice]) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)


def test_a_sum_without_its_tags_is_wrong():
    task = Arithmetic()
    example = task.examples("test", 1)[0]
    right = example.answer
    scores = {f"<think>.</think><answer>{right}</answer>": 1, f"<answer> {right}. </answer>": 1, right: 0, f"<answer>{right}": 0,
              f"{right}</answer>": 0, "<answer></answer>": 0, f"<answer>1{right}</answer>": 0}  # fmt: skip
    for answer, score in scores.items():
        assert task.score(example, answer) == score, answer


# ---------------------------------------------------------------- easy-VQA and text


def test_easy_vqa_keeps_its_official_split():
    import easy_vqa

    task = EasyVQA()
    examples = task.examples("test", 10**6)
    asked = [(e.prompt.messages[-1].text, e.answer, int(e.prompt.id.split("/")[2])) for e in examples]
    assert sorted(asked) == sorted(zip(*easy_vqa.get_test_questions()))
    assert {p.key for e in examples for p in e.prompt.pictures} == {
        f"easy_vqa:test:{number}" for number in easy_vqa.get_test_image_paths()
    }


def test_easy_vqa_trains_on_no_picture_that_is_tested_or_validated():
    task = EasyVQA()
    rows = task.train("sft")
    trained = [picture.key for i in range(len(rows)) for picture in rows[i].pictures]
    assert len(trained) == len(set(trained)) == 3600
    assert all(re.fullmatch(r"easy_vqa:train:\d+", key) for key in trained)
    validated = {picture.key for example in task.examples("val", 10**6) for picture in example.prompt.pictures}
    assert len(validated) == 400 and not validated & set(trained)


def test_an_easy_vqa_row_asks_all_that_tells_what_its_picture_is_after_some_yes_or_no():
    import easy_vqa

    rows = EasyVQA().train("sft")
    row = next(rows[i] for i in range(20) if len(rows[i].messages) > 2)  # the others are inventories
    number = int(row.pictures[0].key.split(":")[-1])
    official = Counter(answer for question, answer, n in zip(*easy_vqa.get_train_questions()) if n == number)
    answers = [answer.text for answer in row.messages[1::2]]
    telling = Counter({answer: times for answer, times in official.items() if answer not in ("yes", "no")})
    assert set(answers[:YES_NO]) <= {"yes", "no"} and Counter(answers[YES_NO:]) == telling and Counter(answers) <= official
    assert row.pictures[0].load().size == (64, 64)


def test_easy_vqa_captions_say_what_the_questions_of_a_training_picture_tell():
    rows, tested = EasyVQA().train("pretrain"), {p.key for e in EasyVQA().examples("val", 10**6) for p in e.prompt.pictures}
    for i in range(200):
        (shown,) = rows[i].pictures
        assert shown.key not in tested
        known, said = known_shapes()[int(shown.key.split(":")[-1])], rows[i].messages[-1].text
        assert re.fullmatch(rf"an? {' '.join(known)}", said) or said == f"一个{COLOURS[known[0]][0]}{SHAPES[known[1]]}"


def test_the_region_of_an_easy_vqa_shape_holds_its_colour():
    for row in list(known_shapes().items())[:20]:
        drawing = shape_drawing(row, random.Random(0))
        (region,) = drawing.regions
        left, top, right, bottom = region.box
        assert region.en == " ".join(row[1]) and right - left > 5 and bottom - top > 5
        outside = np.asarray(drawing.image).astype(int).copy()
        outside[top:bottom, left:right] = outside[0, 0]
        assert np.abs(outside - outside[0, 0]).sum(-1).max() < 120  # nothing but background is left


def test_translations_and_small_talk_have_no_pictures():
    task = Text()
    by_name = {c.en: c.zh for c in NANO}
    for example in task.examples("test", 100):
        text = example.prompt.messages[-1].text
        if example.kind == "small_talk":
            continue
        name = re.fullmatch(r"What is (.+) in English\?|(.+)用中文怎么说？", text)
        assert example.answer == (by_name[name[2]] if name[2] else next(en for en, zh in by_name.items() if zh == name[1]))
    assert not any(task.train("sft")[i].pictures for i in range(50))

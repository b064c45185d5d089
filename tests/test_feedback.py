"""From answers to pairs: every step by hand, every step stopped in its middle, pairs against brute force."""

import json
import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from pyarrow import parquet

from dataset.feedback import pipeline
from dataset.feedback.claims import Claim, Divider, Item, by_rule, whole
from dataset.feedback.labels import TRUTH, Labeler, by_model
from dataset.feedback.pairs import picture_and_question, ranked, score, words
from dataset.feedback.pipeline import Sampling, digest, make_preferences, step, world_items
from dataset.images import from_bytes
from dataset.judge import Failure
from dataset.tasks import dialogue
from dataset.tasks.world import picture
from dataset.world.openmoji import categories
from dataset.world.scenes import Object, Scene, sample_scene
from dataset.world.words import PLACES, description, mentions

FILES = ("answers.jsonl", "claims.jsonl", "labels.jsonl", "pairs.jsonl", "summary.json")


class Stop(Exception):
    """A crash."""


class Pupil:
    """Describes scenes with errors drawn from torch's random numbers, as a model does; stops at call number `crash`."""

    def __init__(self, items: list[Item], crash: int | None = None, temperature: float = 0.7):
        self.items, self.calls, self.crash = {item.prompt.id: item for item in items}, 0, crash
        self.temperature = temperature

    def __call__(self, prompts, group_size):
        if self.calls == self.crash:
            raise Stop
        self.calls += 1
        return [[self.describe(self.items[prompt.id]) for _ in range(group_size)] for prompt in prompts]

    def describe(self, item: Item) -> str:
        objects = []
        for obj in item.scene.objects:
            wrong = float(torch.rand(())) < self.temperature / 2
            category = categories()[int(torch.randint(100, ()))] if wrong else obj.category
            objects.append(Object(category, obj.cell, 0, 0, 24))
        return description(Scene("", tuple(objects), (0, 0, 0)), item.language)


ITEMS = world_items(scenes=10, seed=0)


PLACES_TOO = by_rule(None, places=True)


@pytest.fixture(scope="module", autouse=True)
def chunks_of_three():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CHUNK", 3)
        yield


def quietly(text: str) -> None:
    """In the place of print."""


def run(out, pupil: Pupil | None = None, labeler: Labeler = TRUTH, divider: Divider = PLACES_TOO, **changes):
    sampling = Sampling(**{**dict(model="weights 1", group_size=4, temperature=0.7, seed=0), **changes})
    pupil = pupil or Pupil(ITEMS, temperature=sampling.temperature)
    return make_preferences(ITEMS, pupil, out, divider, labeler, sampling, quietly)


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, pairs) of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("feedback") / "out"
    return folder, run(folder)


# ---------------------------------------------------------------- what comes out


def test_every_file_holds_a_line_for_each_prompt_and_can_be_read(done):
    folder, pairs = done
    for name in ("answers", "claims", "labels"):
        assert [row["id"] for row in rows(folder / f"{name}.jsonl")] == [item.prompt.id for item in ITEMS]
    first = rows(folder / "answers.jsonl")[0]
    assert len(first["answers"]) == 4 and first["question"] == ITEMS[0].prompt.messages[-1].text
    assert "有" in (folder / "answers.jsonl").read_text(encoding="utf-8")  # and not \\u6709
    assert len(rows(folder / "pairs.jsonl")) == len(pairs) > 8


def test_each_chosen_answer_is_truer_than_its_rejected_one(done):
    _, pairs = done
    scenes = {item.prompt.id: item for item in ITEMS}
    for pair in pairs:
        item = scenes[pair.prompt.id]
        true = {(obj.category.name(item.language), obj.cell) for obj in item.scene.objects}

        def errors(text: str, item=item, true=true) -> int:
            """Recomputed from the sentences: a name that is absent and a place that is wrong are an error each."""
            stop = "." if item.language == "en" else "。"
            count = 0
            for sentence in text.split(stop)[:-1]:
                (category,) = mentions(sentence + stop, item.language)
                name, places = category.name(item.language), PLACES[item.language]
                before, verb = ("At the ", " is ") if item.language == "en" else ("", "有")
                place = sentence.strip().partition(verb)[0].removeprefix(before)
                count += (name not in {name for name, _ in true}) + ((name, places.index(place)) not in true)
            return count

        assert errors(pair.chosen) < errors(pair.rejected)


def test_the_summary_counts_what_is_in_the_files(done):
    folder, pairs = done
    facts = json.loads((folder / "summary.json").read_text())
    labels = rows(folder / "labels.jsonl")
    assert facts["prompts"] == 10 and facts["answers"] == 40 and facts["pairs"] == len(pairs)
    assert facts["answers_undivided"] == facts["answers_unlabelled"] == facts["questions_failed"] == 0
    assert facts["questions"] == sum(len(row["margins"]) for row in labels)
    assert facts["questions_rejected"] == sum(value < 0 for row in labels for value in row["margins"].values()) > 0
    assert facts["questions_as_the_truth"] == facts["pairs_as_the_truth"] == 1.0


def test_the_parquet_file_holds_the_same_pairs_with_their_pictures_in_the_columns_of_rlaif_v(done):
    folder, pairs = done
    table = parquet.read_table(folder / "pairs.parquet")
    assert table.column_names == ["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx",
                                  "image_path"]  # fmt: skip
    for k, (pair, row, line) in enumerate(zip(pairs, table.to_pylist(), rows(folder / "pairs.jsonl"), strict=True)):
        shown, question = picture_and_question(pair.prompt)
        assert (row["question"], row["chosen"], row["rejected"], row["idx"]) == (question, pair.chosen, pair.rejected, k)
        assert (line["question"], line["chosen"], line["rejected"]) == (question, pair.chosen, pair.rejected)
        assert json.loads(row["origin_split"])["id"] == pair.id == line["id"]
        image = from_bytes(row["image"]["bytes"]).load()
        assert image.tobytes() == shown.load().tobytes()
        assert not {"prompt", "text", "images", "messages"} & set(line)  # words of other formats that hold pairs
        assert (folder / line["image_path"]).read_bytes() == row["image"]["bytes"]
        assert row["image"]["path"] == row["image_path"] == line["image_path"]


def test_the_default_of_the_third_stage_asks_for_descriptions_of_training_scenes_in_alternating_languages(tmp_path):
    items = world_items(scenes=6, seed=2)
    pairs = make_preferences(items, Pupil(items, temperature=0.9), tmp_path, by_rule(None), TRUTH,
                             Sampling("weights 1", 4, 0.9, seed=2), quietly)
    assert [item.language for item in items] == ["en", "zh"] * 3
    assert [item.scene for item in items] == [sample_scene("train", k) for k in range(12, 18)]  # other seeds, other scenes
    assert len({item.prompt.messages[0].parts[1] for item in items}) > 3  # in many words
    assert all(item.prompt.messages[0].parts[1].isascii() == (item.language == "en") for item in items)
    assert pairs and {pair.prompt for pair in pairs} <= {item.prompt for item in items}
    cells = [claim["objects"][0][1] is None for row in rows(tmp_path / "claims.jsonl") for one in row["claims"] for claim in one]
    assert sum(cells) == len(cells) / 2  # each thing, and each with its place


def test_scenes_of_all_categories_are_described_where_the_divider_knows_them():
    which = by_rule(None, categories="all").categories
    assert [item.scene for item in world_items(3, 0, which)] == [sample_scene("train", k, "all") for k in range(3)]


# ---------------------------------------------------------------- stopped and started again


def same(one, other) -> None:
    assert {name: digest(one / name) for name in FILES} == {name: digest(other / name) for name in FILES}
    assert parquet.read_table(one / "pairs.parquet").equals(parquet.read_table(other / "pairs.parquet"))


def test_a_finished_folder_asks_nobody_and_gives_the_same_pairs(done):
    folder, pairs = done
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    nobody = Labeler("truth", lambda questions: 1 / 0)
    assert run(folder, Pupil(ITEMS, crash=0), nobody, Divider(PLACES_TOO.name, None)) == pairs
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("crash", [0, 1, 3])
def test_sampling_that_was_stopped_goes_on_with_the_same_random_numbers(done, tmp_path, crash):
    with pytest.raises(Stop):
        run(tmp_path, Pupil(ITEMS, crash))
    assert len(rows(tmp_path / "answers.jsonl")) == 3 * crash
    torch.rand(7)  # another process has drawn other numbers
    pupil = Pupil(ITEMS)
    run(tmp_path, pupil)
    assert pupil.calls == 4 - crash  # 10 prompts by 3; what was written is not asked again
    same(tmp_path, done[0])


def stopping(name: str, function, after: int):
    """The function, until it was called `after` times."""
    calls = []

    def work(questions):
        calls.append(len(questions))
        if len(calls) > after:
            raise Stop
        return function(questions)

    return name, work


@pytest.mark.parametrize("crash", [0, 1, 2])
def test_dividing_and_labelling_that_were_stopped_go_on(done, tmp_path, crash):
    with pytest.raises(Stop):
        run(tmp_path, divider=Divider(*stopping(PLACES_TOO.name, PLACES_TOO.divide, crash)))
    assert len(rows(tmp_path / "claims.jsonl")) == 3 * crash
    with pytest.raises(Stop):
        run(tmp_path, Pupil(ITEMS, crash=0), Labeler(*stopping("truth", TRUTH.margins, crash)))
    assert len(rows(tmp_path / "labels.jsonl")) == 3 * crash
    run(tmp_path, Pupil(ITEMS, crash=0))
    same(tmp_path, done[0])


def test_pairing_that_was_stopped_goes_on(done, tmp_path, monkeypatch):
    def stop(*_):
        raise Stop

    monkeypatch.setattr(pipeline, "write_parquet", stop)
    with pytest.raises(Stop):
        run(tmp_path)
    assert not (tmp_path / "pairs.jsonl").exists()  # written last
    monkeypatch.undo()
    run(tmp_path, Pupil(ITEMS, crash=0))
    same(tmp_path, done[0])


@pytest.mark.parametrize("name", FILES[:3])
def test_a_file_cut_at_any_byte_is_finished_to_the_same_bytes(done, tmp_path, name):
    folder, _ = done
    whole_file = (folder / name).read_bytes()
    for cut in random.Random(0).sample(range(len(whole_file)), 6):
        out = tmp_path / str(cut)
        out.mkdir()
        for file in FILES[:FILES.index(name) + 1]:
            (out / file).write_bytes((folder / file).read_bytes())
            note = file.replace(".jsonl", ".made_from.json")
            (out / note).write_bytes((folder / note).read_bytes())
        (out / name).write_bytes(whole_file[:cut])
        run(out)
        same(out, folder)


def test_sampling_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(tmp_path)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- other options


@pytest.mark.parametrize(("changes", "file", "words_of_the_error"), [
    ({"temperature": 1.0}, "answers", "temperature 0.7, now 1.0"),
    ({"group_size": 5}, "answers", "group_size 4, now 5"),
    ({"seed": 1}, "answers", "seed 0, now 1"),
    ({"model": "weights 2"}, "answers", "model 'weights 1', now 'weights 2'"),
    ({"divider": whole(None)}, "claims", "divider 'rule:nano,places=True,speech', now 'whole:nano'"),
    ({"labeler": by_model("self", None)}, "labels", "labeler 'truth', now 'self'"),
])  # fmt: skip
def test_other_options_are_refused_and_nothing_is_lost(done, changes, file, words_of_the_error):
    folder, _ = done
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=f"{file}.jsonl was made with {words_of_the_error}: .*delete {file}.jsonl"):
        run(folder, **changes)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_other_prompts_are_refused(done):
    with pytest.raises(ValueError, match="answers.jsonl was made with prompts '"):
        make_preferences(world_items(10, seed=1), None, done[0], PLACES_TOO, TRUTH, Sampling("weights 1", 4, 0.7, seed=0))


def test_files_after_one_that_was_made_again_are_refused_until_they_are_deleted_too(tmp_path):
    run(tmp_path)
    for name in ("labels.jsonl", "labels.made_from.json"):
        (tmp_path / name).unlink()
    lenient = by_model("lenient", lambda prompts: [1.0 if len(prompt.messages[-1].text) % 3 else -1.0 for prompt in prompts])
    with pytest.raises(ValueError, match="pairs.jsonl was made with labels.jsonl '"):
        run(tmp_path, labeler=lenient)
    for name in ("pairs.jsonl", "pairs.made_from.json"):
        (tmp_path / name).unlink()
    assert run(tmp_path, labeler=lenient)
    assert json.loads((tmp_path / "summary.json").read_text())["questions_as_the_truth"] < 1


def test_a_file_of_unknown_origin_and_a_damaged_one_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="does not say what it was made from"):
        step(tmp_path / "rows.jsonl", {}, 1, None)
    (tmp_path / "rows.made_from.json").write_text("{}")
    assert step(tmp_path / "rows.jsonl", {}, 1, None) == [{}]
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="rows.jsonl is damaged"):
        step(tmp_path / "rows.jsonl", {}, 1, None)


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(done, tmp_path):
    run(tmp_path / "again")
    same(tmp_path / "again", done[0])
    run(tmp_path / "other", seed=1)
    assert digest(tmp_path / "other" / "answers.jsonl") != digest(done[0] / "answers.jsonl")


@pytest.mark.parametrize("bad", ["two pictures", "two turns", "same id"])
def test_prompts_that_cannot_be_paired_are_refused_before_anybody_is_asked(tmp_path, bad):
    shown = picture(ITEMS[0].scene)
    pictures, turns = {"two pictures": ([shown] * 2, [("?", "")]), "two turns": ([shown], [("?", "a"), ("?", "")]),
                       "same id": ([shown], [("?", "")])}[bad]  # fmt: skip
    prompt = dialogue("x", pictures, turns)
    with pytest.raises(ValueError, match="same id" if bad == "same id" else "one picture and then one question"):
        make_preferences([Item(prompt, "en")] * (2 if bad == "same id" else 1), None, tmp_path, by_rule(None), TRUTH,
                         Sampling("", 2, 1.0, seed=0))
    assert not list(tmp_path.iterdir())


def test_answers_that_are_too_few_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"3 prompts got \[1, 1, 1\] answers, not 4 each"):
        run(tmp_path, lambda prompts, group_size: [["a"]] * len(prompts))


def test_no_pair_at_all_is_an_error_that_says_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="no pair: .*higher temperature"):
        run(tmp_path, temperature=0.0)  # four times the truth
    assert json.loads((tmp_path / "summary.json").read_text())["answers_undivided"] == 0


# ---------------------------------------------------------------- labels


def test_a_question_about_a_picture_is_asked_once_however_often_it_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 2)
    shown = picture(ITEMS[0].scene)
    items = [Item(dialogue(f"{k}", [shown], [(f"Describe it, {k}.", "")]), "en") for k in range(4)]
    items.append(Item(dialogue("other", [picture(ITEMS[1].scene)], [("Describe it.", "")]), "en"))
    texts = ["There is a bus. There is a bus. There is an ant.", "There is a key."]
    questions = []

    def yes_no(prompts):
        questions.extend((prompt.pictures[0].key, prompt.messages[-1].text) for prompt in prompts)
        return [0.5 if "key" in prompt.messages[-1].text else -0.5 for prompt in prompts]

    pairs = make_preferences(items, lambda prompts, group_size: [texts] * len(prompts), tmp_path, by_rule(None),
                             by_model("m", yes_no), Sampling("", 2, 1.0, seed=0), quietly)
    assert len(questions) == len(set(questions)) == 2 * 3  # three questions about each of two pictures
    assert [(pair.prompt.id, pair.chosen) for pair in pairs] == [(item.prompt.id, texts[1]) for item in items]
    scores = [row["scores"] for row in rows(tmp_path / "pairs.jsonl")]
    assert scores == [[[0, 1], [-3, 0]]] * len(items)  # counts: the bus was claimed twice


def claims(*names: str) -> list[Claim]:
    return [Claim(name, name) for name in names]


def test_scores_count_rejected_and_accepted_claims_and_a_tie_rejects():
    margins = {((), "a"): 0.3, ((), "b"): -0.2, ((), "c"): 0.0, ((), "d"): None, ((), "e"): 0.1}
    assert score(claims("a"), (), margins) == (0, 1)
    assert score(claims("a", "e"), (), margins) == (0, 2)
    assert score([], (), margins) == (0, 0)
    assert score(claims("a", "b", "c"), (), margins) == (-2, 1)
    assert score(claims("b", "b"), (), margins) == (-2, 0)
    assert score(claims("a", "a"), (), margins) == (-1, 1)  # said twice
    assert score([*claims("a"), Claim("There is a ant.", "", malformed=True)], (), margins) == (-1, 1)  # nobody is asked
    assert score(claims("a", "d"), (), margins) is None  # nobody could tell, so the answer is not right
    assert score(Failure("undivided"), (), margins) is None
    with pytest.raises(KeyError):
        score(claims("never asked"), (), margins)


def test_fewer_rejected_claims_are_better_and_of_as_many_the_answer_that_says_more():
    told = ["all of it and a false thing", "all of it", "half of it", "half of it and a false thing", "nothing"]
    scores = [(-1, 4), (0, 4), (0, 2), (-1, 2), (0, 0)]
    pairs = {(told[a], told[b]) for a, b in ranked(told, scores, random.Random(0), 10**9)}
    order = ["all of it", "half of it", "nothing", "all of it and a false thing", "half of it and a false thing"]
    assert pairs == set(combinations(order, 2))


def test_answers_with_a_failed_label_or_without_claims_are_left_out_and_counted_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PAIRS_PER_PROMPT", 9)
    item = Item(dialogue("x", [picture(ITEMS[0].scene)], [("Describe it.", "")]), "en")
    texts = ["There is a bus.", "There is an ant.", "There is a key.", "Nothing here."]
    answers = {"Is there a bus?": 1.0, "Is there an ant?": -1.0, "Is there a key?": Failure("HTTP 500")}
    labeler = Labeler("endpoint", lambda questions: [answers[one.claim.question] for one in questions])
    (pair,) = make_preferences([item], lambda prompts, group_size: [texts], tmp_path, by_rule(None), labeler,
                               Sampling("", 4, 1.0, seed=0), quietly)
    assert (pair.chosen, pair.rejected) == (texts[0], texts[1])
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert (facts["answers_undivided"], facts["answers_unlabelled"], facts["questions_failed"]) == (1, 1, 1)
    (row,) = rows(tmp_path / "labels.jsonl")
    assert row["failed"] == {"Is there a key?": "HTTP 500"} and row["margins"]["Is there a key?"] is None
    assert "reason" in rows(tmp_path / "claims.jsonl")[0]["claims"][3]


def test_a_margin_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="margin of .* is nan"):
        run(tmp_path, labeler=by_model("broken", lambda prompts: [math.nan] * len(prompts)))


def test_claim_wise_and_whole_answer_labels_are_compared_with_the_truth(tmp_path):
    """Of a labeler that knows every single object and guesses at whole descriptions."""
    items = {item.prompt.id: item for item in ITEMS}

    def yes_no(prompts):
        margins = []
        for prompt in prompts:
            text, item = prompt.messages[-1].text, items[prompt.id]
            objects = mentions(text, item.language)
            whole_answer = len(text) > 40
            right = random.Random(text).random() < 0.5 if whole_answer else objects[0] in item.scene.counts
            margins.append(0.4 if right else -0.4)
        return margins

    agreement = {}
    for name, divider in (("claims", by_rule(None, places=False)), ("whole", whole(None))):
        run(tmp_path / name, labeler=by_model("m", yes_no), divider=divider, group_size=8, temperature=1.0)
        agreement[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert agreement["claims"]["questions_as_the_truth"] == agreement["claims"]["pairs_as_the_truth"] == 1.0
    assert agreement["whole"]["pairs_as_the_truth"] < 0.9
    assert all(len(one) == 1 for row in rows(tmp_path / "whole" / "claims.jsonl") for one in row["claims"])


# ---------------------------------------------------------------- pairs


def test_all_pairs_whose_scores_differ_can_be_drawn_and_no_others():
    rng = random.Random(0)
    for trial in range(200):
        answers = [f"answer {rng.randrange(6)}" for _ in range(rng.randint(1, 8))]
        scores = [rng.choice([None, (0, 2), (0, 1), (-1, 2)]) for _ in answers]
        expected = set()
        for (one, a), (two, b) in combinations(zip(answers, scores), 2):
            if a is not None and b is not None and a != b and one != two:
                expected.add((one, two) if a > b else (two, one))
        drawn = [(answers[a], answers[b]) for a, b in ranked(answers, scores, random.Random(trial), 10**9)]
        assert len(drawn) == len(set(drawn)) and set(drawn) == expected
        two = ranked(answers, scores, random.Random(trial), 2)
        assert len(two) == min(2, len(expected)) and two == ranked(answers, scores, random.Random(trial), 2)


def test_the_two_pairs_of_a_prompt_are_drawn_evenly():
    counts = np.zeros((4, 4))
    for seed in range(3000):
        for a, b in ranked("wxyz", [(0, 3), (0, 2), (-1, 4), (-2, 1)], random.Random(seed), 2):
            counts[a, b] += 1
    assert np.all(np.abs(counts[np.triu_indices(4, 1)] - 1000) < 120)  # 6 pairs, 2 of them each time; 4.6 standard deviations
    assert not counts[np.tril_indices(4)].any()


def test_words_are_counted_between_blanks_and_by_chinese_character():
    assert words("There is a bus.") == 4
    assert words("左上有公交车。") == 6
    assert words("") == 0

"""Answers that are kept as they come: interrupted or not, by one process or two, they are the same."""

import json
import threading
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

from dataset.ahead import ahead
from dataset.answers import Journal, answers
from dataset.formats.files import complete_lines
from dataset.images import Picture, from_bytes
from dataset.tasks import Truncated, dialogue
from dataset.vision.image_processor import OneRank
from model.registry import UserError

ITEMS = list(range(23))


def work(chunk, loaded, stop_at=None):
    """What is sampled for each item: it depends on the seed of the chunk. Ctrl-C comes with one of the items."""
    assert loaded == [-item for item in chunk]
    if stop_at in chunk:
        raise KeyboardInterrupt
    return [[item, torch.rand(1).item()] for item in chunk]


def made(journal, items=ITEMS, stop_at=None, seen=None):
    def counted(chunk, loaded):
        seen.extend(chunk) if seen is not None else None
        return work(chunk, loaded, stop_at)

    return journal.results(items, items, lambda chunk: [-item for item in chunk], counted)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "deep" / "answers.jsonl", {"model": "a"}, OneRank(), size=4, seed=3)


@pytest.fixture
def whole(tmp_path):
    return made(Journal(tmp_path / "whole.jsonl", {"model": "a"}, OneRank(), size=4, seed=3))


def test_results_come_in_the_order_of_their_items(whole):
    assert [item for item, _ in whole] == ITEMS and len({drawn for _, drawn in whole}) == len(ITEMS)


@pytest.mark.parametrize("stop_at", [0, 3, 9, 22])
def test_an_interrupted_run_equals_an_uninterrupted_one_and_makes_nothing_twice(journal, whole, stop_at):
    first, second = [], []
    done = stop_at // 4 * 4
    with pytest.raises(KeyboardInterrupt) as stop:
        made(journal, stop_at=stop_at, seen=first)
    assert stop.value.__notes__ == [f"{done} of 23 answered; the same command goes on"]
    torch.manual_seed(99)  # whatever was drawn in between
    assert made(journal, seen=second) == whole
    assert first[:done] == ITEMS[:done] and second == ITEMS[done:]
    assert made(journal, seen=[]) == whole
    journal.clear()
    assert not list(journal.file.parent.iterdir())


def test_a_line_that_a_crash_cut_is_made_again(journal, whole):
    made(journal)
    (part,) = journal.file.parent.iterdir()
    part.write_text(part.read_text()[:-7])
    seen = []
    assert made(journal, seen=seen) == whole and seen == ITEMS[20:]


@pytest.mark.parametrize("change", ["settings", "items"])
def test_another_model_or_other_questions_begin_anew_and_the_old_answers_wait(journal, change):
    before, seen = made(journal), []
    other = journal.of(journal.file, model="b") if change == "settings" else journal
    items = ITEMS if change == "settings" else [*ITEMS[1:], 99]
    assert len(made(other, items, seen=seen)) == 23 and seen == items
    assert made(journal, seen=(again := [])) == before and not again


@dataclass(frozen=True)
class Ranks(OneRank):
    """One of two processes that are threads here."""

    rank: int = 0
    world_size: int = 2
    shared: list = field(default_factory=list)
    meet: threading.Barrier = None

    def all_gather(self, entries):
        self.meet.wait(10)
        self.shared.append(entries)
        self.meet.wait(10)
        merged = {key: value for part in self.shared for key, value in part.items()}
        self.meet.wait(10)
        self.shared.clear()
        return merged


def in_two(journal):
    """The results of both of two ranks, which are threads: what they draw comes from generators of their own."""
    shared, meet, found = [], threading.Barrier(2), {}

    def rank(number):
        own = Journal(journal.file, journal.settings, Ranks(rank=number, shared=shared, meet=meet), journal.size, journal.seed)
        seen = []

        def alone(chunk, loaded):
            seen.extend(chunk)
            generator = torch.Generator().manual_seed(own.seed + ITEMS.index(chunk[0]) // own.size)
            return [[item, torch.rand(1, generator=generator).item()] for item in chunk]

        found[number] = own.results(ITEMS, ITEMS, lambda chunk: [-item for item in chunk], alone), seen

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    return found


def test_two_processes_equal_one_and_share_the_work(journal, whole):
    found = in_two(journal)
    assert found[0][0] == found[1][0] == whole
    assert sorted(found[0][1] + found[1][1]) == ITEMS and abs(len(found[0][1]) - len(found[1][1])) <= 4


def test_another_number_of_processes_goes_on_with_what_one_has_left(journal, whole):
    with pytest.raises(KeyboardInterrupt):
        made(journal, stop_at=9)
    found = in_two(journal)
    assert found[0][0] == whole and sorted(found[0][1] + found[1][1]) == ITEMS[8:]


def test_the_next_item_is_loaded_while_one_is_worked_on():
    loading, worked = threading.Event(), []

    def load(item):
        if item == 1:
            loading.set()
        return 10 * item

    for item, loaded in ahead(load, range(3)):
        assert item or loading.wait(5)  # item 1 is loaded before item 0 is done
        worked.append((item, loaded))
    assert worked == [(0, 0), (1, 10), (2, 20)] and list(ahead(load, [])) == []


def test_complete_lines_are_those_with_an_end(tmp_path):
    file = tmp_path / "a.jsonl"
    assert complete_lines(file) == []
    for text, lines in (("a\nb\n", ["a", "b"]), ("a\u2028x\nb", ["a\u2028x"]), ("half", [])):
        file.write_text(text, encoding="utf-8")
        assert complete_lines(file) == lines
        assert file.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines)


# ---------------------------------------------------------------- answers


class Echo:
    """Answers with the question; one that is long is cut off. Notes the sizes of what it gets."""

    def __init__(self):
        self.asked = []

    def load(self, prompts):
        [picture.load() for prompt in prompts for picture in prompt.pictures]
        return [prompt.messages[-1].text for prompt in prompts]

    def answers(self, texts):
        self.asked.append([len(text) for text in texts])
        return [Truncated(text) if len(text) > 60 else text for text in texts]


def test_answers_stand_with_their_prompts_and_prompts_of_similar_length_are_asked_together(journal):
    prompts = [dialogue(str(k), [], [("?" * (7 * k % 90 + 1), "")]) for k in range(23)]
    model = Echo()
    found = answers(journal, model, prompts)
    assert found == [prompt.messages[-1].text for prompt in prompts]
    assert [isinstance(text, Truncated) for text in found] == [len(text) > 60 for text in found]
    assert sum(model.asked, []) == sorted(map(len, found), reverse=True)
    again = answers(journal, Echo(), prompts)
    assert [(text, type(text)) for text in again] == [(text, type(text)) for text in found]


def test_the_same_words_about_another_picture_are_another_question(journal):
    def asked(key):
        return [dialogue("a", [Picture(key, lambda: Image.new("RGB", (4, 4)))], [("What?", "")])]

    models = [Echo() for _ in range(3)]
    for model, key in zip(models, ("cat", "dog", "cat")):
        answers(journal, model, asked(key))
    assert [len(model.asked) for model in models] == [1, 1, 0]


def test_a_picture_that_does_not_open_is_told_in_one_line(journal):
    with pytest.raises(UserError, match="cannot be opened"):
        answers(journal, Echo(), [dialogue("a", [from_bytes(b"no image")], [("What?", "")])])


def test_parts_are_lines_of_json(journal):
    made(journal)
    (part,) = journal.file.parent.iterdir()
    assert [json.loads(line)[0] for line in part.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]

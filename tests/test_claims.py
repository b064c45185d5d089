"""What an answer claims, in both languages, and who accepts it: the truth, a model, a judge that may fail."""

import base64
import io
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dataset.feedback.claims import Claim, Item, by_rule, claims_by_judge, claims_by_rule, facts_of, sentences, whole
from dataset.feedback.labels import NO, TRUTH, YES, ClaimQuestion, YesNo, by_judge, by_model, prompt, yes_or_no
from dataset.judge import Failure
from dataset.tasks import dialogue
from dataset.tasks.world import picture
from dataset.tokenizer import SentencePieceTokenizer
from dataset.world.openmoji import LANGUAGES, categories
from dataset.world.questions import exists, exists_at
from dataset.world.scenes import Object, Scene, draw_scene, sample_scene
from dataset.world.words import caption, description
from model.registry import DIVIDERS
from tests import tiny

BUS, KEY, ANT = (next(c for c in categories() if c.en == name) for name in ("bus", "key", "ant"))
SCENE = Scene("hand-made", tuple(Object(category, cell, cell % 3 * 32, cell // 3 * 32, 24)
                                       for category, cell in ((BUS, 0), (KEY, 2), (BUS, 4))), (255, 255, 255))  # fmt: skip


def item(language: str = "en", scene: Scene | None = SCENE) -> Item:
    return Item(dialogue("row", [picture(SCENE)], [("Describe it.", "")]), language, scene)


def questions(answer: str, language: str = "en", places: bool = False) -> list[str]:
    found = claims_by_rule(answer, language, "nano", places)
    assert not isinstance(found, Failure), found.reason
    return [claim.question for claim in found]


# ---------------------------------------------------------------- dividing by rule


@pytest.mark.parametrize(("text", "language", "malformed"), [
    ("There is a ant at the top.", "en", True), ("There is an bus.", "en", True), ("There is bus at the top.", "en", True),
    ("There is a蚂蚁 at the top.", "en", True), ("左上有 ant。", "zh", True),
    ("There is an ant at the top.", "en", False), ("At the top is one ant.", "en", False),
    ("Two ants and the bus.", "en", False), ("左上有一个蚂蚁。", "zh", False),
])  # fmt: skip
def test_a_sentence_that_is_not_one_of_its_language_is_a_malformed_claim(text, language, malformed):
    claims = claims_by_rule(text, language, "nano")
    assert [claim.malformed for claim in claims] == [malformed] * len(claims)
    assert (claims == [Claim(text, "", malformed=True)]) == malformed


def test_a_description_claims_each_object_once_a_sentence():
    text = "There is a bus at the top left. There is a key at the center. There is a bus at the right."
    assert questions(text) == ["Is there a bus?", "Is there a key?", "Is there a bus?"]
    assert questions("A bus, a key and a bus.") == ["Is there a bus?", "Is there a key?"]
    assert questions("Two buses, a key and an ant.") == ["Is there a bus?", "Is there a key?", "Is there an ant?"]
    assert questions(f"左上有一个{BUS.zh}。中间有一个{KEY.zh}。", "zh") == [f"有{BUS.zh}吗？", f"有{KEY.zh}吗？"]
    assert questions(f"两个{BUS.zh}、一个{KEY.zh}和一个{ANT.zh}。", "zh") == [f"有{c.zh}吗？" for c in (BUS, KEY, ANT)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("which", ["nano", "all"])
def test_every_description_and_caption_of_the_world_is_divided_and_true(language, which):
    for shown in (sample_scene("val", index, which) for index in range(60)):
        if any(category.zh == "有" for category in shown.counts):
            continue  # a name that is also the word for "there is": the rule leaves it alone
        for text in (description(shown, language), caption(shown, language)):
            claims = claims_by_rule(text, language, which, places=True)
            assert not isinstance(claims, Failure), claims
            assert {claim.objects[0][0] for claim in claims} == {category.en for category in shown.counts}
            margins = TRUTH.margins([ClaimQuestion(claim, item(language, shown)) for claim in claims])
            assert margins == [1.0] * len(claims)


def test_a_claim_is_asked_as_the_instructions_ask_it():
    for language in LANGUAGES:
        known = {ask(SCENE, language, random.Random(k), "nano").text for k in range(80) for ask in (exists, exists_at)}
        assert set(questions(description(SCENE, language), language, places=True)) <= known


def test_places_are_claims_of_their_own_unless_they_are_left_out():
    text = "There is a bus at the top left."
    assert questions(text) == ["Is there a bus?"]
    assert questions(text, places=True) == ["Is there a bus?", "Is there a bus at the top left?"]
    assert questions(f"左上有一个{BUS.zh}。", "zh", places=True)[1] == f"左上有{BUS.zh}吗？"
    assert questions("A bus and a key at the top left.", places=True) == ["Is there a bus?", "Is there a key?"]  # whose place?


def test_the_stop_inside_a_name_ends_no_sentence():
    text = "There is a St. Lucia at the top. There is a bus at the left."
    assert sentences(text, "en", "all") == ["There is a St. Lucia at the top.", "There is a bus at the left."]


@pytest.mark.parametrize(("text", "language", "why"), [
    ("There is no bus at the top.", "en", "'no'"),  # claims the opposite of what is named
    ("There is a blue bus.", "en", "'blue'"),
    ("There is a bus. There is a wug.", "en", "There is a wug"),
    ("There is a bus at the top. There is a", "en", "There is a"),
    ("", "en", "says nothing"),
    (" \n", "zh", "says nothing"),
    (f"没有{BUS.zh}。", "zh", "'没'"),
    (f"左上有一个{BUS.zh}。", "en", "nothing that is named"),
])  # fmt: skip
def test_a_sentence_that_says_more_than_the_rule_sees_is_not_divided(text, language, why):
    found = claims_by_rule(text, language, "nano")
    assert isinstance(found, Failure) and why in found.reason


def test_a_whole_answer_is_one_claim_true_when_all_of_it_is():
    good, bad, odd = "There is a bus. There is a key.", "There is a bus. There is an ant.", "A wug."
    found = whole(None).divide([(item(), text) for text in (good, bad, odd, "")])
    assert [len(claims) for claims in found[:3]] == [1, 1, 1] and isinstance(found[3], Failure)
    assert good in found[0][0].question
    margins = TRUTH.margins([ClaimQuestion(claims[0], item()) for claims in found[:3]])
    assert margins[:2] == [1.0, -1.0] and isinstance(margins[2], Failure)


# ---------------------------------------------------------------- dividing by a language model


class Judge:
    """Replies from a table: what a prompt ends with -> reply; everything else fails as an endpoint fails."""

    model = "table"

    def __init__(self, table: dict):
        self.table, self.requests = table, []

    def ask(self, conversations: list) -> list:
        texts = [messages[-1]["content"] for messages in conversations]
        texts = [text if isinstance(text, str) else text[-1]["text"] for text in texts]
        self.requests += conversations
        return [next((reply for end, reply in self.table.items() if text.endswith(end)), Failure("HTTP 500")) for text in texts]


TABLE = {"Answer: A dog on a sofa.": "- There is a dog.\n- The dog is on a sofa.", "Answer: A dog.": "* There is a dog.",
         "Answer: Nice.": "NONE", "Answer: A cat.": "1. There is a cat.",
         "There is a dog.": "Is there a dog?", "The dog is on a sofa.": " Is the dog on a sofa?\n", "There is a cat.": "It is."}


def test_a_judge_divides_what_it_can_and_each_fact_is_turned_into_a_question_once():
    judge = Judge(TABLE)
    answers = ("A dog on a sofa.", "A dog.", "Nice.", "A cat.", "A bird.")
    sofa, dog, nice, cat, bird = claims_by_judge(judge, [(item(), answer) for answer in answers])
    assert sofa == [Claim("There is a dog.", "Is there a dog?"), Claim("The dog is on a sofa.", "Is the dog on a sofa?")]
    assert dog == [Claim("There is a dog.", "Is there a dog?")]
    assert "no fact in the reply 'NONE'" in nice.reason and "no question in the reply 'It is.'" in cat.reason
    assert bird == Failure("HTTP 500")
    assert len(judge.requests) == 5 + 3  # answers, different facts


def test_only_what_the_rule_cannot_divide_goes_to_the_judge():
    judge = Judge(TABLE)
    answered = [(item(), text) for text in ("There is a bus.", "A dog.", "")]
    bus, dog, nothing = by_rule(judge).divide(answered)
    assert [claims[0].question for claims in (bus, dog)] == ["Is there a bus?", "Is there a dog?"]
    assert isinstance(nothing, Failure)
    assert len(judge.requests) == 2  # the dog, and its one fact
    assert all(isinstance(claims, Failure) for claims in by_rule(None).divide(answered[1:]))


def test_dividers_are_made_by_name_with_their_options_and_tell_them_in_their_own_name():
    """So that files made with one of them are not taken for another's (dataset/feedback/pipeline.py)."""
    specs = ("claims", "claims:places=false", "claims:categories=all", "whole", "whole:categories=all")
    dividers = [DIVIDERS.make(spec, judge=None) for spec in specs] + [DIVIDERS.make("claims", judge=Judge({}))]
    assert len({divider.name for divider in dividers}) == 6
    answered = [(item(), "There is a bus at the top left."), (item(), "There is a St. Lucia.")]
    found = [[len(claims) if isinstance(claims, list) else 0 for claims in divider.divide(answered)] for divider in dividers]
    assert found == [[2, 0], [1, 0], [2, 1], [1, 1], [1, 1], [2, 0]]
    for spec, message in (("half", "unknown divider 'half'"), ("whole:places=true", "has no option 'places=true'")):
        with pytest.raises(ValueError, match=message):
            DIVIDERS.make(spec, judge=None)


def test_a_judge_that_answers_nothing_at_all_is_an_error_and_no_claims_are_kept():
    """An endpoint that is down: every answer would be undivided, and stay so in the file."""
    with pytest.raises(ValueError, match="the judge table answered none of 2 requests: HTTP 500"):
        claims_by_judge(Judge({}), [(item(), "A dog."), (item(), "A cat.")])


def test_a_judge_is_not_called_for_nothing():
    assert claims_by_judge(Judge({}), []) == []
    assert isinstance(facts_of("There is a dog, I think."), Failure)


# ---------------------------------------------------------------- labelling


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_truth_accepts_what_is_there_and_rejects_what_is_not(language):
    true = [Claim("", "", ((BUS.en, None),)), Claim("", "", ((BUS.en, 4),)), Claim("", "", ((BUS.en, 0), (KEY.en, 2)))]
    false = [Claim("", "", ((ANT.en, None),)), Claim("", "", ((BUS.en, 2),)), Claim("", "", ((BUS.en, 0), (ANT.en, 2)))]
    assert TRUTH.margins([ClaimQuestion(claim, item(language)) for claim in true]) == [1.0] * 3
    assert TRUTH.margins([ClaimQuestion(claim, item(language)) for claim in false]) == [-1.0] * 3


@pytest.mark.parametrize(("text", "language", "expected"), [
    ("There is a bus at the top left. There is an ant at the top.", "en", [1, 1, -1, -1]),
    ("There is a key at the left.", "en", [1, -1]),
    (f"左上有一个{BUS.zh}。上方有一个{ANT.zh}。", "zh", [1, 1, -1, -1]),
    (f"左边有一个{KEY.zh}。", "zh", [1, -1]),
])  # fmt: skip
def test_hallucinated_objects_and_places_are_rejected_and_the_others_accepted(text, language, expected):
    claims = claims_by_rule(text, language, "nano", places=True)
    assert TRUTH.margins([ClaimQuestion(claim, item(language)) for claim in claims]) == expected


def test_the_truth_says_nothing_about_what_it_does_not_know():
    photo = TRUTH.margins([ClaimQuestion(Claim("", "Is there a bus?", ((BUS.en, None),)), item(scene=None))])
    fact = TRUTH.margins([ClaimQuestion(Claim("It rains.", "Does it rain?"), item())])
    assert isinstance(photo[0], Failure) and isinstance(fact[0], Failure)


def test_a_model_is_asked_the_bare_question_about_the_pictures():
    prompts = []
    questions = [ClaimQuestion(Claim("", f"有{BUS.zh}吗？"), item("zh")), ClaimQuestion(Claim("", "Is there a bus?"), item("en"))]
    labeler = by_model("a", lambda conversations: prompts.extend(conversations) or [0.1, 0.2])
    assert labeler.margins(questions) == [0.1, 0.2] and labeler.name == "a"
    assert [one.messages[-1].text for one in prompts] == [f"有{BUS.zh}吗？", "Is there a bus?"]
    assert all(one.pictures == item().prompt.pictures for one in prompts)


@pytest.mark.parametrize(("reply", "margin"), [
    ("Yes", 1), ("yes.", 1), ("**Yes**, there is.", 1), ("No", -1), ("no, there is no bus", -1), ("是", 1), ("是的。", 1),
    ("否。", -1), ("不是。", -1), ("没有", -1), ("有。", 1), ("不，图中没有。", -1),
])  # fmt: skip
def test_the_first_word_of_a_reply_decides(reply, margin):
    assert yes_or_no(reply) == margin


@pytest.mark.parametrize("reply", ["", "There is no bus.", "Not sure", "No idea", "Yesterday", "是否有？", "不确定", "对不起"])
def test_a_reply_without_a_decision_is_a_failure(reply):
    assert isinstance(yes_or_no(reply), Failure)


def test_a_judge_sees_the_picture_and_what_it_does_not_answer_has_failed():
    judge = Judge({"Is there a bus? Please answer yes or no.": "Yes.", "Is there an ant? Please answer yes or no.": "Hm.",
                   f"有{BUS.zh}吗？请回答是或否。": "是。"})  # a model that was not tuned to is told how to answer
    questions = [ClaimQuestion(Claim("", f"Is there {name}?"), item()) for name in ("a bus", "an ant", "a key")]
    chinese = ClaimQuestion(Claim("", f"有{BUS.zh}吗？"), item("zh"))
    bus, ant, key, again = by_judge(judge).margins([*questions, chinese])
    assert bus == again == 1.0 and "Hm." in ant.reason and key == Failure("HTTP 500")
    shown, text = judge.requests[0][0]["content"]
    data = base64.b64decode(shown["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == draw_scene(SCENE).tobytes()
    assert text == {"type": "text", "text": "Is there a bus? Please answer yes or no."}


# ---------------------------------------------------------------- a model's own labels

TOKENIZER = SentencePieceTokenizer()


def first(word: str) -> int:
    return TOKENIZER.encode(word)[0]


def test_margins_are_the_probabilities_of_every_yes_less_those_of_every_no_in_the_order_asked():
    texts = ["Is there a bus?", f"有{BUS.zh}吗？", "Is there an ant at the top left, or is there none?"]
    logits = {text: torch.randn(TOKENIZER.vocab_size, generator=torch.Generator().manual_seed(k)) for k, text in enumerate(texts)}
    sizes = []

    def first_logits(batch: dict) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        user, assistant, image = (TOKENIZER.id(name) for name in ("<|user|>", "<|assistant|>", "<image>"))
        rows = batch["input_ids"].tolist()
        spoken = [[n for n in ids[ids.index(user) + 1 : ids.index(assistant)] if n != image] for ids in rows]
        return torch.stack([logits[TOKENIZER.decode(ids).removeprefix("1")] for ids in spoken])

    label = YesNo(tiny.processor(), first_logits, batch_size=2)
    margins = label([prompt(ClaimQuestion(Claim("", text), item())) for text in texts])
    for text, margin in zip(texts, margins, strict=True):
        p = logits[text].softmax(-1)
        expected = sum(p[first(word)] for word in YES) - sum(p[first(word)] for word in NO)
        assert margin == pytest.approx(float(expected), abs=1e-6)
    assert sizes == [2, 1]
    assert label([]) == []


def test_yes_and_no_that_begin_alike_are_refused():
    same = SimpleNamespace(encode=lambda text: [7, 8])
    with pytest.raises(ValueError, match="begins yes and no with the same tokens"):
        YesNo(tiny.processor(tokenizer=same), lambda batch: None)([])

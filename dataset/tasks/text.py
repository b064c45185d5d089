"""Text without pictures: the names of the world's categories in the other language, and who the model is.

A model that is trained on pictures alone forgets how to answer without one; these rows prevent that.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation
from dataset.tasks import Example, Generated, Task, dialogue, exact, means
from dataset.world.openmoji import LANGUAGES, Category, categories
from dataset.world.wordings import expand, fill, split_of, typed
from model.registry import TASKS

SMALL_TALK = {  # kind -> (what people say, with choices as in dataset/world/phrases.py; the answer)
    "en": {
        "hello": ("(hello|hi|hey|good morning|good evening|good afternoon|greetings|hi there|hello there|hey there)"
                  "(| you| pupil| friend)(!|.|, how are you?|! how are you?|, nice to meet you.)",
                  "Hello! Show me a picture."),
        "who": ("(|please tell me, |tell me: |hi, |and |so )(who are you|what are you|what is your name|what's your name"
                "|who am i talking to|which model are you|introduce yourself|tell me about yourself|are you a model"
                "|what kind of model are you)(?|.)", "I am Pupil, a small model that reads pictures."),
        "can": ("(|please tell me, |tell me: |hi, |and |so )(what can you do|what do you do|how can you help me|help"
                "|what are you good at|what can i ask you|what are you able to do|how does this work|what should i ask"
                "|what do you know)(?|.)", "I can name, count and compare the things in a picture."),
        "thanks": ("(thanks|thank you|many thanks|thank you very much|thanks a lot|thank you so much|great, thanks|ok, thanks"
                   "|cheers)(| pupil| for your help| for the answer)(!|.)", "You are welcome!"),
        "bye": ("(bye|goodbye|good bye|see you|see you later|bye bye|good night|that is all)(| pupil| for now)(!|.)",
                "Goodbye!"),
    },
    "zh": {
        "hello": ("(你好|您好|嗨|哈喽|早上好|晚上好|下午好|大家好|你好呀|你好啊)(|，Pupil|，很高兴认识你|，你好吗|，朋友)(！|。)",
                  "你好！给我看一张图吧。"),
        "who": ("(|请问|请告诉我|你好，|那么)(你是谁|你叫什么|你叫什么名字|你是什么|你是什么模型|介绍一下你自己|你的名字是什么"
                "|自我介绍一下)(？|。)", "我是Pupil，一个会看图的小模型。"),
        "can": ("(|请问|请告诉我|你好，|那么)(你会做什么|你能做什么|你会什么|你有什么用|你能帮我做什么|我可以问你什么"
                "|你可以做什么|你有什么功能|怎么用)(？|。)", "我会说出、数出和比较图里的东西。"),
        "thanks": ("(谢谢|多谢|谢谢你|非常感谢|谢啦|感谢|太感谢了|好的，谢谢)(|，Pupil|你的帮助|你的回答|了)(！|。)", "不客气！"),
        "bye": ("(再见|拜拜|下次见|晚安|回头见|先这样)(|，Pupil|吧|啦)(！|。)", "再见！"),
    },
}


def small_talk(kind: str, language: str, split: str, rng: random.Random) -> tuple[str, str]:
    """Something that people say, and the answer. A tenth of it is held out for "test" and a twentieth for "val"."""
    said, answer = SMALL_TALK[language][kind]
    while split_of(text := expand(said, language, rng.choice, [])) != split:
        pass
    return typed(fill(text, language, {}, rng.choice), language, rng), answer


def translation(category: Category, language: str) -> tuple[str, str]:
    """A question for the name in the other language, and its answer."""
    if language == "en":
        return f"What is {category.zh} in English?", category.en
    return f"{category.en}用中文怎么说？", category.zh


@TASKS.register("text")
class Text(Task):
    """Translations of the categories' names, and small talk: conversations without any picture."""

    size = 100  # categories of the test set

    def __init__(self, categories: str = "nano", rows: int = 600):
        self.categories, self.rows = categories, rows

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        rng = random.Random(f"text/{i}")
        language = rng.choice(LANGUAGES)
        turns = [translation(category, language) for category in rng.sample(categories(self.categories), 4)]
        turns += [small_talk(kind, language, "train", rng) for kind in rng.sample(tuple(SMALL_TALK[language]), 2)]
        rng.shuffle(turns)
        return dialogue(f"text/train/{i}", [], turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """Small talk in new words, and the first n names in each language, all trained: vocabulary has no unseen half."""
        examples = []
        for i in range(n):
            rng, language = random.Random(f"text/{split}/{i}"), LANGUAGES[i % 2]
            said, answer = small_talk(tuple(SMALL_TALK[language])[i // 2 % 5], language, split, rng)
            examples.append(Example(dialogue(f"text/{split}/{i}", [], [(said, "")]), answer, "small_talk", (language,)))
        for category in categories(self.categories)[:n]:
            for language in LANGUAGES:
                question, answer = translation(category, language)
                prompt = dialogue(f"text/{language}/{category.en}", [], [(question, "")])
                examples.append(Example(prompt, answer, "translation", (language,)))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return means(examples, scores, lambda example: [example.kind, *example.tags])

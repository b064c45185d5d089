"""Small talk: what people say to a chat besides their questions, and what the model answers; in English and Chinese.

A person greets, thanks, doubts, or asks for what this model cannot do. Without these rows it would take "hello" for a question
about the picture. A tenth of what can be said is held out of training, but nothing short and common ("hi", "thank you").

In:  a kind, a language, a split, a random generator.  Out: what somebody types, and the answer.
"""
from __future__ import annotations

import random
import re

from dataset.world.wordings import MARKS, expand, fill, split_of, typed

COMMON = 4  # so many of the sayings of a kind, the first ones, are always trained where they stand alone
ALONE = 0.3  # share of the trained sayings that do

# Kind -> (what may stand before, the sayings, what may stand behind, the answer).
SMALL_TALK: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "en": {
        "hello": (
            "",
            "hello|hi|hey|good morning|good evening|good afternoon|greetings|hi there|hello there|hey there|howdy|yo"
            "|how are you|how are you doing|how do you do|what's up",
            "| you| pupil| friend|, how are you?|! how are you?|, nice to meet you|, what's up?|, how is it going?",
            "Hello! Ask me about a picture.",
        ),
        "who": (
            "|please tell me, |tell me: |hi, |and |so |hello, ",
            "who are you|what are you|what is your name|what's your name|who am i talking to|which model are you"
            "|introduce yourself|tell me about yourself|are you a model|what kind of model are you|are you chatgpt"
            "|are you human|are you a robot|who made you",
            "|?|.",
            "I am Pupil, a small model that reads pictures.",
        ),
        "can": (
            "|please tell me, |tell me: |hi, |and |so |hello, ",
            "what can you do|help|how can you help me|what do you do|what are you good at|what can i ask you"
            "|how do i use this|what are you able to do|how does this work|what should i ask|what do you know"
            "|can you help me|i need help",
            "|?|.",
            "I can name, count and compare the things in a picture.",
        ),
        "thanks": (
            "|ok, |great, |nice, |wow, ",
            "thanks|thank you|great|good job|cool|nice|ok|okay|well done|thank you very much|thanks a lot"
            "|thank you so much|many thanks|cheers|awesome|perfect|that is right|correct|good answer|wow",
            "| pupil|, pupil| for your help| for the answer|!|.",
            "You are welcome!",
        ),
        "doubt": (
            "|hm, |no, |but |really? ",
            "are you sure|really|no|wrong|that is wrong|that's not right|you are wrong|is that true|i don't think so"
            "|look again|that is not correct|are you certain|i see something else|you made a mistake",
            "|?|.|!|, pupil",
            "I may be wrong, for I am small. Ask me in other words.",
        ),
        "bye": (
            "|ok, |thanks, |well, ",
            "bye|goodbye|see you|good night|good bye|see you later|bye bye|that is all|i have to go|talk to you later",
            "| pupil| for now|!|.",
            "Goodbye!",
        ),
        "other": (
            "|please |hey, |hi, |so |no, ",
            "tell me a joke|write a poem|say something|what is the weather|(can|could) you write (a poem|code|python)"
            "|sing a song|play a game|make me a sandwich|write me a (story|letter|song|python program)"
            "|can you (speak french|dance|hear me|do math|see me)"
            "|explain (quantum physics|gravity|democracy|deep learning|the stock market)"
            "|draw me a (picture|house|dragon)"
            "|what is the (time|date|news|meaning of life|capital of france|capital of china|price of gold)"
            "|who is the (president|king|queen|best singer)"
            "|how do i (cook rice|learn piano|get rich|fix my car|lose weight)"
            "|give me (advice|a recipe|the news|some money|a tip)|do my homework|book a (flight|table|hotel)"
            "|what day is it|how old are you|where do you live|do you love me|remind me to (call mom|buy milk)",
            "|?|.|, pupil",
            "I can only talk about pictures.",
        ),
    },
    "zh": {
        "hello": (
            "",
            "你好|您好|嗨|你好吗|哈喽|早上好|晚上好|下午好|大家好|你好呀|你好啊|嘿|早",
            "|，Pupil|，很高兴认识你|，你好吗？|，朋友|！|。|，最近怎么样？",
            "你好！问我图里有什么吧。",
        ),
        "who": (
            "|请问|请告诉我|你好，|那么|那",
            "你是谁|你叫什么名字|你叫什么|你是什么|你是什么模型|介绍一下你自己|你的名字是什么|自我介绍一下|你是人吗"
            "|你是机器人吗|谁做的你|你是ChatGPT吗",
            "|？|。",
            "我是Pupil，一个会看图的小模型。",
        ),
        "can": (
            "|请问|请告诉我|你好，|那么|那",
            "你会做什么|你能做什么|你会什么|怎么用|你能干嘛|你能干什么|你有什么用|你能帮我做什么|我可以问你什么|你可以做什么|你有什么功能"
            "|帮帮我|我该问什么",
            "|？|。",
            "我会说出、数出和比较图里的东西。",
        ),
        "thanks": (
            "|好的，|嗯，|太好了，",
            "谢谢|谢谢你|很好|不错|多谢|非常感谢|谢啦|感谢|太感谢了|好的|对|答对了|真棒|厉害|可以",
            "|，Pupil|你的帮助|你的回答|！|。|了",
            "不客气！",
        ),
        "doubt": (
            "|嗯，|不，|可是|真的吗？",
            "你确定吗|真的吗|不对|错了|你错了|这不对|再看看|是这样吗|我不这么认为|不是吧|你再看一遍|答错了",
            "|？|。|！|，Pupil",
            "我很小，可能会错。换个说法再问我吧。",
        ),
        "bye": (
            "|好的，|谢谢，|那",
            "再见|拜拜|下次见|晚安|回头见|先这样|我走了|下次再聊",
            "|，Pupil|吧|啦|！|。",
            "再见！",
        ),
        "other": (
            "|请|请问|你好，|那",
            "讲个笑话|写一首诗|说点什么|今天天气怎么样|你能(讲个笑话|写代码|说英语|唱歌|跳舞|听见我)吗"
            "|写(一个故事|一封信|一段代码|一篇作文)|唱首歌|玩个游戏|解释(量子力学|万有引力|深度学习|股市)"
            "|画一(条龙|座房子|只猫)|查一下(天气|新闻|时间|股票)|现在几点了|(法国|中国|日本)的首都是哪里|总统是谁"
            "|怎么(做饭|学钢琴|赚钱|修车|减肥)|给我(一点建议|一个菜谱|一些钱)|做作业|订(机票|酒店|餐厅)|今天星期几"
            "|你几岁了|你住在哪里|你爱我吗",
            "|？|。|，Pupil",
            "我只会看图说话。",
        ),
    },
}


def small_talk(kind: str, language: str, split: str, rng: random.Random) -> tuple[str, str]:
    """Something that people say, and the answer. A tenth of it is held out for "test" and a twentieth for "val"."""
    before, said, behind, answer = SMALL_TALK[language][kind]
    sayings = re.split(r"\|(?![^(]*\))", said)  # not at the | within brackets
    common = sayings[:COMMON]
    if split == "train" and rng.random() < ALONE:
        text = rng.choice(common)  # these have no brackets
    else:
        while True:
            parts = rng.choice(before.split("|")), rng.choice(sayings), rng.choice(behind.split("|"))
            text = expand("".join(parts), language, rng.choice, [])
            if ("train" if text.strip(MARKS) in common else split_of(text.strip(MARKS))) == split:
                break
    return typed(fill(text, language, {}, rng.choice), language, rng), answer

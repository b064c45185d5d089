"""Chat with a trained model about pictures, on a web page of this machine.

In:  a checkpoint, by default that of the last stage that was run: out/grpo, else out/dpo, else out/sft, else out/pretrain.
Out: a page where every message and every picture of the conversation reaches the model.

    python web_demo.py                              then open http://127.0.0.1:7860
    python web_demo.py --model out/sft --port 8080 --temperature 0

The server stores no conversation: the page sends all of it with each message. So users can edit, retry and undo messages, and
several can chat at once, without code for it.
"""

import html
import itertools
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import cli


@dataclass
class Config:
    model: Path | None = None  # folder of a checkpoint; default: out/grpo, else out/dpo, else out/sft, else out/pretrain
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets in everyone on your network
    port: cli.Port = 7860  # port to listen on
    temperature: cli.PositiveOrZero = 0.3  # of sampling; 0: always the most likely token; 1: as the model was trained
    top_p: cli.PositiveShare = 0.9  # sample among the most likely tokens that together have this probability
    max_new_tokens: cli.Count = 256  # the longest answer, in tokens
    device: str = "auto"  # auto, cpu, cuda or mps


if __name__ == "__main__":  # before the imports below, which take seconds: --help and mistakes are answered at once
    config = cli.parse(Config)

import torch

from dataset.bad_rows import BadRow
from dataset.chat import Message
from dataset.dialogue import Dialogue
from dataset.images import Picture, from_file
from dataset.processor import Processor
from dataset.tokenizer import Tokenizer, load_tokenizer
from dataset.vision.image_processor import OneRank
from dataset.world import questions
from dataset.world.scenes import Scene, changed_scene, draw_scene, sample_scene
from model import checkpoint
from model.generate import stream
from model.registry import TEMPLATES
from model.runtime import pick_device
from model.vlm import VLM, count_parameters

# ---------------------------------------------------------------- messages of the page, messages of the model

NOT_READ = "This message did not reach the model"  # the title of notes by this program, which are not the model's words


def escaped(text: str) -> dict:
    """A text for the page, escaped, because the page would take <think> or <b> for HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def part(item: dict) -> str | Picture:
    """A text or a picture from an item of the page."""
    return html.unescape(item["text"]) if item["type"] == "text" else from_file(item["file"]["path"])


def turns(history: list[dict]) -> list[list[dict]]:
    """The entries of the page's conversation, grouped by speaker.

    Each picture and each text of a message is an entry of its own, because gradio's edit button replaces a full entry.
    """
    return [list(entries) for _, entries in itertools.groupby(history, key=lambda entry: entry["role"])]


def messages(history: list[dict]) -> list[Message]:
    """The conversation on the page, without what did not reach the model."""
    delivered: list[list[dict]] = []
    for turn in turns(history):
        if (turn[0].get("metadata") or {}).get("title") == NOT_READ:
            delivered.pop()  # the message that the note is about
        else:
            delivered.append(turn)
    return [Message(turn[0]["role"], tuple(part(item) for entry in turn for item in entry["content"])) for turn in delivered]


def up_to_question(history: list[dict]) -> list[dict]:
    """The conversation without the last answer."""
    return history[:-1] if history[-1]["role"] == "assistant" else history


# ---------------------------------------------------------------- the page

CSS = """
/* gradio's Share button, alone under each picture, would publish it on another site */
.message-row:has(.image-container) + .message-buttons { display: none }
.example .example-image-container, .example .example-image { width: 96px; height: 96px }
"""


def build_demo(new_dialogue: Callable[[list[Message]], Dialogue], examples: list[Any], about: str) -> Any:
    """The page. `new_dialogue` makes a Dialogue that continues these messages."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # send and store nothing
    import gradio as gr  # takes seconds, which --help should not need

    def busy():
        return gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)

    def free():
        return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)

    # Each function that starts an answer returns the conversation up to the user's message that needs an answer.

    def send(message: dict, history: list[dict]):
        content = [{"path": path} for path in message["files"]]
        if message["text"].strip():
            content.append(escaped(message["text"]))
        return history + [{"role": "user", "content": [item]} for item in content], busy()

    def pick(example: gr.SelectData):
        return send({"text": example.value["text"], "files": [file["path"] for file in example.value["files"]]}, [])

    def retry(history: list[dict]):
        return up_to_question(history), busy()

    def edit(history: list[dict], change: gr.EditData):
        place = change.index if isinstance(change.index, int) else change.index[0]
        return history[:place] + [{"role": "user", "content": [escaped(change.value)]}], busy()

    def undo(history: list[dict]):
        question = turns(up_to_question(history))[-1]
        content = [item for entry in question for item in entry["content"]]
        files = [item["file"]["path"] for item in content if item["type"] == "file"]
        text = "".join(html.unescape(item["text"]) for item in content if item["type"] == "text")
        return up_to_question(history)[: -len(question)], {"files": files, "text": text}

    def answer(history: list[dict]) -> Iterator[list[dict]]:
        if not history or history[-1]["role"] != "user":
            return  # the message was empty
        try:
            *before, question = messages(history)
            dialogue = new_dialogue(before)
            for text in dialogue.say(question.parts):
                yield history + [{"role": "assistant", "content": [escaped(text)]}]
            if dialogue.forgotten:
                gr.Info(f"Too long for the model: the first {dialogue.forgotten} question(s) were forgotten")
        except BadRow as bad:
            reason = re.sub(r"[^\s'(]*[/\\]", "", bad.reason)  # without the paths of this machine
            yield history + [{"role": "assistant", "content": [escaped(reason)], "metadata": {"title": NOT_READ}}]

    with gr.Blocks(title="Pupil", fill_height=True, analytics_enabled=False) as demo:
        gr.Markdown(f"# Pupil\n{about}")
        chat = gr.Chatbot(
            examples=examples, editable="user", render_markdown=False, latex_delimiters=[], buttons=[],
            allow_file_downloads=False, group_consecutive_messages=False, show_label=False, scale=1,
        )  # fmt: skip
        box = gr.MultimodalTextbox(
            file_count="multiple", file_types=["image"], show_label=False, autofocus=True,
            placeholder="Ask something, with pictures or without",
        )  # fmt: skip
        starts = [
            box.submit(send, [box, chat], [chat, box]),
            chat.example_select(pick, None, [chat, box]),
            chat.retry(retry, chat, [chat, box]),
            chat.edit(edit, chat, [chat, box]),
        ]
        answers = [start.then(answer, chat, chat, concurrency_limit=1) for start in starts]
        for ended in answers:
            ended.then(free, None, box)
        box.stop(None, cancels=answers)
        chat.undo(undo, chat, [chat, box])
    return demo


def world_examples(folder: Path) -> list[dict]:
    """Questions about scenes of the test split, whose pictures are drawn into the folder."""
    rng, indices = random.Random(0), itertools.count()

    def drawn(scene: Scene) -> str:
        file = folder / f"scene-{next(indices)}.png"
        draw_scene(scene).save(file)
        return str(file)

    one, two, three, four = (sample_scene("test", index) for index in range(4))
    changed, change, old, new = changed_scene(four, rng)
    count = questions.count(two, "zh", rng, "nano")
    return [
        {"text": questions.account("caption", one, "en").text, "files": [drawn(one)]},
        {"text": count.text, "files": [drawn(two)]},
        {"text": questions.account("description", three, "zh").text, "files": [drawn(three)]},
        {"text": questions.difference(change, old, new, "en").text, "files": [drawn(four), drawn(changed)]},
    ]


# ---------------------------------------------------------------- the model


def dialogues(model: VLM, tokenizer: Tokenizer, device: torch.device, config: Config) -> Callable[[list[Message]], Dialogue]:
    """A function that makes a Dialogue with the model, which continues a list of messages."""
    processor = Processor.of(model, tokenizer, OneRank(device))
    longest_prompt = processor.max_prompt_tokens(config.max_new_tokens)

    def answer(batch: dict) -> Iterator[int]:
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        return stream(model, batch, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                      **processor.sampling)

    return lambda messages: Dialogue(answer, processor, longest_prompt, messages)


def main(config: Config) -> None:
    device, folder = pick_device(config.device), config.model or checkpoint.latest()
    model = checkpoint.load(folder, device)
    about = f"`{folder}`, {count_parameters(model) / 1e6:.1f} million parameters, on {device}"
    if TEMPLATES.make(model.config.template).drop_user_text:
        about += ". It was trained on captions alone: it describes pictures and does not read questions"
    with tempfile.TemporaryDirectory() as temporary:  # uploads are deleted when the server stops
        os.environ["GRADIO_TEMP_DIR"] = temporary
        new_dialogue = dialogues(model, load_tokenizer(checkpoint.tokenizer_file(folder)), device, config)
        demo = build_demo(new_dialogue, world_examples(Path(temporary)), about)
        demo.launch(
            server_name=config.host, server_port=config.port, share=False, ssr_mode=False, max_file_size="20mb", css=CSS
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, config)

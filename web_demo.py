"""Chat with a trained model about pictures, on a web page of this machine.

In:  a checkpoint, by default that of the last stage that was run: out/grpo, else out/dpo, else out/sft, else out/pretrain.
Out: a page where every message and every picture of the conversation reaches the model. The checkpoints beside it can be chosen,
     too, and asked the same question side by side. A word of the answer shows where the model looked when it wrote it.

    python web_demo.py                              then open http://127.0.0.1:7860
    python web_demo.py --model out/sft --port 8080 --temperature 0

The server stores no conversation: the page sends all of it with each message. So users can edit, retry and undo messages, and
several can chat at once, without code for it.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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

from dataset.checkpoints import Checkpoints
from dataset.page import views
from dataset.page.actions import Page
from dataset.page.examples import TAUGHT, examples
from dataset.page.server import app_options, checked_blocks
from model import checkpoint
from model.generate import stream
from model.inspection import Inspector, beside
from model.runtime import pick_device

WAITING = 64  # messages that may wait for their turn; more are refused
UNTAUGHT = "Other tasks, which the default commands do not teach: see dataset/README.md"


def build_demo(page: Page, samples: Sequence[dict], first: str, config: Config) -> Any:
    """The page in gradio, which begins with the checkpoint `first`; samples are the messages of its examples."""
    import gradio as gr  # takes seconds, which --help should not need

    names = list(page.checkpoints.folders)

    def edit(history: list[dict], change: gr.EditData, *settings: Any) -> tuple:
        place = change.index if isinstance(change.index, int) else change.index[0]
        return page.edited(history, place, change.value, settings)

    with checked_blocks(gr)(title="Pupil", analytics_enabled=False) as demo:
        gr.Markdown("# Pupil")
        about = gr.Markdown(page.about(first))
        with gr.Row():
            with gr.Column(scale=3, min_width=330):
                chat = gr.Chatbot(
                    elem_id="chat", height="45vh", min_height=320, editable="user", render_markdown=False, latex_delimiters=[],
                    buttons=[], allow_tags=False, allow_file_downloads=False, group_consecutive_messages=False, show_label=False,
                    placeholder="Choose an example below, or add a picture and ask.",
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    file_count="multiple", file_types=["image", "video"], show_label=False, autofocus=True,
                    placeholder="Ask something, or send pictures without words",
                )  # fmt: skip
                for label, some in {"Examples: choose one, then send it": samples[:TAUGHT], UNTAUGHT: samples[TAUGHT:]}.items():
                    if some:
                        gr.Examples([[sample] for sample in some], box, label=label, examples_per_page=20)
            with gr.Column(scale=2, min_width=330):
                model = gr.Dropdown(names, value=first, label="Checkpoint", filterable=False)
                with gr.Tabs() as tabs:
                    with gr.Tab("Look", id="look"):
                        heat = gr.HTML(views.HINT, elem_id="map")
                    with gr.Tab("Compare"):
                        stages = [name for name in names if name in checkpoint.STAGES] or names
                        chosen = gr.CheckboxGroup(names, value=stages, label="To answer what is in the box, or the last question")
                        compare = gr.Button("Compare", variant="primary", elem_id="compare")
                        answers = gr.HTML(elem_id="answers")
                    with gr.Tab("Things") as tab:
                        things = gr.HTML()
                    with gr.Tab("Sampling"):
                        longest = config.max_new_tokens
                        sampling = [
                            gr.Slider(0, 2, config.temperature, step=0.05, label="Temperature", info="0: the likeliest token"),
                            gr.Slider(0.05, 1, config.top_p, step=0.05, label="Top-p", info="the share that the likeliest hold"),
                            gr.Slider(1, max(1024, longest), longest, step=1, label="Longest answer, in tokens"),
                        ]
        settings, word = [model, *sampling], gr.Textbox(visible=False)  # the id of a clicked word, from views.CLICKED
        starts = [
            box.submit(page.send, [box, chat, *settings], [chat, box]),
            chat.retry(page.retry, chat, [chat, box]),
            chat.edit(edit, [chat, *settings], [chat, box]),
        ]
        answered = [start.success(page.answer, [chat, *settings], chat, concurrency_limit=1) for start in starts]
        for ended in answered:
            ended.then(page.free, None, box)
        box.stop(None, cancels=answered)
        chat.clear(None, cancels=answered).then(page.clear, None, [chat, box, heat])  # first stopped, then cleared
        chat.undo(page.undo, chat, [chat, box])
        looked = chat.select(page.look, [chat, word, *settings], [heat, tabs], js=views.CLICKED, concurrency_limit=1)
        looked.then(None, js=views.SHOWN)
        compare.click(page.compare, [box, chat, chosen, *sampling], answers, concurrency_limit=1)
        model.change(page.about, model, about)
        tab.select(views.things, None, things)
    return demo.queue(max_size=WAITING)


def main(config: Config) -> None:
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # send and store nothing
    device, folder = pick_device(config.device), checkpoint.require(config.model or checkpoint.latest()).resolve()
    checkpoint.read_config(folder)
    checkpoints, shown = Checkpoints(beside(folder), partial(Inspector, device=device), stream), examples()
    with tempfile.TemporaryDirectory() as temporary:  # uploads are deleted when the server stops
        os.environ["GRADIO_TEMP_DIR"] = temporary
        samples = [example.message(Path(temporary), number) for number, example in enumerate(shown)]
        demo = build_demo(Page(checkpoints, shown), samples, folder.name, config)
        demo.launch(
            server_name=config.host, server_port=config.port, share=False, ssr_mode=False, max_file_size="20mb", css=views.CSS,
            app_kwargs=app_options(),
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, config)

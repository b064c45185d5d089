"""Views of the page in HTML and Markdown: what the model knows, answers side by side, a map; what comes from outside is escaped.

In:  facts of a checkpoint, answers, a `Glance`.  Out: texts.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

from dataset.look import Glance
from dataset.page.examples import Truth
from dataset.page.messages import folded
from dataset.report import bench_scores
from dataset.world.openmoji import categories, raster
from model.config import VLMConfig
from model.registry import TEMPLATES

SCORES = {  # in scores.json: what it is called on the page
    "world/exact": "scenes", "easy_vqa/accuracy": "easy-VQA", "arithmetic/image": "sums in pictures",
    "geometry/accuracy": "geometry", "sokoban/solved": "Sokoban", "text/translation": "translation",
}  # fmt: skip
CSS = """
/* gradio's Share button, alone under each picture, would publish it on another site */
.message-row:has(.image-container) + .message-buttons { display: none }
.gallery-item .container { height: 56px; align-items: center } .gallery-item img { width: 52px; height: 52px }
.gallery-item p { font-size: 13px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 8px }
.cards section { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px }
.cards h2 { margin: 0 0 4px; font-size: 1em }
.cards p, .cards details { margin: 0; overflow-wrap: anywhere }
.things { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px; padding: 0; list-style: none }
.things li { text-align: center; font-size: 12px; line-height: 1.2 }
.things img { width: 44px; height: 44px; margin: auto; display: block }
#map figure { margin: 0 } #map img { max-width: 100%; max-height: 300px }
#chat [data-testid] { cursor: auto !important } #chat .word { cursor: pointer; border-radius: 3px }
#chat .word:hover { text-decoration: underline dotted } #chat .word:focus { outline: 2px solid var(--color-accent) }
.likeliest { width: 100%; font-size: 14px } .likeliest caption { text-align: left; padding: 8px 0 }
.likeliest :is(tr, td) { padding: 2px 8px; border: 0 !important }
.likeliest td:nth-child(2) { width: 55% } .likeliest i { display: block; height: 10px; background: var(--color-accent) }
.likeliest td:last-child { text-align: right; white-space: nowrap }
"""
HINT = "<p>Click a word of an answer: here you see where the model looked when it wrote that word, and what else was likely.</p>"
# JavaScript: a click on a word focuses it, so its id goes to the server; then the map is brought into view, below on a phone.
CLICKED = "(chat, word, ...settings) => [chat, document.activeElement.id, ...settings]"
SHOWN = """() => document.activeElement.classList.contains("word")
    && document.querySelector("#map").scrollIntoView({ block: "nearest", behavior: "smooth" })"""


def knowledge(folder: Path, parameters: int, config: VLMConfig) -> str:
    """What a checkpoint knows and does not, in Markdown."""
    scores = bench_scores(folder)
    measured = ", ".join(f"{name} {100 * scores[key]:.0f} %" for key, name in SCORES.items() if key in scores)
    lines = [f"`{folder.name}` has {parameters / 1e6:.1f} million parameters."]
    if config.encoder.startswith("tiny_clip"):
        lines.append("It knows the hundred things under *Things*, drawn on a grid of 3 × 3, and questions about them in English "
                     "and Chinese. It does not know photos, other things or facts: about a photo it says something foolish.")
    if TEMPLATES.make(config.template).drop_user_text:
        lines.append("It learned captions alone: it describes pictures and does not read questions.")
    missing = ", ".join(name for key, name in SCORES.items() if key not in scores)
    lines += [f"Right on test questions: {measured}."] if measured else []
    lines += [f"Not tested on: {missing}."] if missing else []
    return " ".join(lines)


@functools.cache
def things() -> str:
    """The hundred things of the embedded world with their names, as HTML."""
    return "<ul class='things'>" + "".join(
        f"<li><img src='{data_url(png(raster(category.code)))}' alt=''>{escape(category.en)} "
        f"<span lang='zh'>{category.zh}</span></li>" for category in categories()) + "</ul>"


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def data_url(file: bytes) -> str:
    """A PNG file inside an address, so that no other request is needed."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def side_by_side(question: str, right: Truth, answers: Mapping[str, str]) -> str:
    """The answers of several checkpoints as HTML, below what is right, where that is known."""
    cards = []
    for name, answer in answers.items():
        parts = folded(answer)
        mark = f" {right.shown.task.mark(right.shown.example, answer)}" if right.shown and answer else ""
        details = f"<details><summary>Reasoning</summary>{escape(parts['thoughts'])}</details>" if parts["thoughts"] else ""
        cards.append(f"<section><h2>{escape(name)}{mark}</h2>{details}<p>{escape(parts['rest']) or '…'}</p></section>")
    asked = f"<p><b>{escape(question) or 'Pictures without words'}</b></p>"
    title = "The right answer" if right.shown else "In the picture"
    return f"{asked}{right.text and f'<p>{title}: <i>{escape(right.text)}</i></p>'}<div class='cards'>{''.join(cards)}</div>"


def inside(glance: Glance, word: str, drawn: bytes) -> str:
    """Where the model looked when it wrote a word, and what was likely there, as HTML; `drawn` is the heat map."""
    said = f"<b>“{escape(word)}”</b>"
    if glance.missing:
        seen = f"<p>{said}. No map: {escape(glance.missing)}.</p>"
    else:
        told = f"{said}: {100 * glance.weight:.0f} % of the attention fell on the pictures; the squares share it."
        seen = f"<figure><img src='{data_url(drawn)}' alt='heat map over the pictures'><figcaption>{told}</figcaption></figure>"
    percent = [(escape(token), f"{100 * share:.1f}") for token, share in glance.likeliest]
    rows = "".join(f"<tr><td>{token}<td><i style='width: {share}%'></i><td>{share} %" for token, share in percent)
    return f"{seen}<table class='likeliest'><caption>The five likeliest tokens there</caption>{rows}</table>"

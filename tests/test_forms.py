"""One table of forms: the same twelve rows written in every form that is read are the same twelve rows afterwards.

`FORMS` is that table, and dataset/README.md shows it: a test compares the two. To print it: python -m tests.test_forms
"""

import base64
import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dataset.chat import Conversation, Preference
from dataset.images import Picture
from dataset.mixture import load
from dataset.preferences import load_preferences
from tests.miniatures import png
from tests.test_conversations import contents

COLOURS = ("red", "blue")
NAMES = {"red": "RED", "blue": "BLUE"}
ROWS = [(COLOURS[i % 2], f"What colour is it?\nChild {i} asks.", f"It is {COLOURS[i % 2]}, {i} times.") for i in range(12)]
OTHER = "It is pink."
UTF8 = {"encoding": "utf-8"}


def file_of(colour: str) -> str:
    return f"{colour}.png"


def encoded(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def turns(question, answer, role="role", text="content", user="user", assistant="assistant") -> list[dict]:
    return [{role: user, text: question}, *([{role: assistant, text: answer}] if answer else [])]


def llava(question, answer=None) -> list[dict]:
    return turns(question, answer, "from", "value", "human", "gpt")


def parts(question: str, **image) -> list[dict]:
    return [{"type": "image", **image}, {"type": "text", "text": question}]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


# ---------------------------------------------------------------- forms: what a row looks like, or who writes a file of them

# (a picture's colour, question, answer) -> a row; the key is what the table says of it
QUESTIONS = {
    "LLaVA, TinyLLaVA: conversations": lambda c, q, a: {"image": file_of(c), "conversations": llava(f"<image>\n{q}", a)},
    "the placeholder last, or none": lambda c, q, a: {"image": file_of(c), "conversations": llava(q, a)},
    "MiniMind-V: image_bytes (bytes in parquet), conversations as JSON": lambda c, q, a: {
        "image_bytes": f"data:image/png;base64,{encoded(c)}", "conversations": json.dumps(turns(f"<image>\n{q}", a))},
    "OpenAI: messages of parts": lambda c, q, a: {"messages": turns(
        [{"type": "image_url", "image_url": {"url": file_of(c)}}, {"type": "text", "text": q}], a)},
    "OpenAI: content as text, images beside it": lambda c, q, a: {"images": [file_of(c)], "messages": turns(f"<image>{q}", a)},
    "MM-EUREKA: image_urls, answer": lambda c, q, a: {
        "conversations": turns(f"<image>{q}", None), "answer": a, "image_urls": [file_of(c)]},
    "LMM-R1: message as JSON": lambda c, q, a: {"message": json.dumps(turns(parts(q, image=file_of(c)), None)), "answer": a},
    "image, question, answer": lambda c, q, a: {"image": file_of(c), "question": q, "answer": a},
    "R1-V, open-r1: image, problem, solution": lambda c, q, a: {"image": file_of(c), "problem": q, "solution": a},
    "TRL: images, prompt, completion": lambda c, q, a: {
        "images": [file_of(c)], "prompt": turns(parts(q), None), "completion": said(a)},
    "Alpaca: instruction, input, output": lambda c, q, a: {
        "images": [file_of(c)], "instruction": q.split("\n")[0], "input": q.partition("\n")[2], "output": a},
    "ms-swift: query, response": lambda c, q, a: {"images": [file_of(c)], "query": q, "response": a, "history": []},
    "the_cauldron: images, texts": lambda c, q, a: {
        "images": [{"bytes": None, "path": file_of(c)}], "texts": [{"user": q, "assistant": a}]},
    "Qwen-VL: the path between img tags": lambda c, q, a: {"conversations": llava(f"<img>{file_of(c)}</img>{q}", a)},
    "the picture in base64": lambda c, q, a: {"image": encoded(c), "question": q, "answer": a},
    "other names of the picture: image_path, img, Image, file_name ...": lambda c, q, a: {
        {"red": "img_path", "blue": "Image"}[c]: file_of(c), "conversations": llava(f"<image>\n{q}", a)},
    "text and answer": lambda c, q, a: {"image": file_of(c), "text": q, "answer": a},
}  # fmt: skip
CAPTIONS = {
    "image, caption": lambda c, q, a: {"image": file_of(c), "caption": a},
    "ImageFolder: file_name, text": lambda c, q, a: {"file_name": file_of(c), "text": a},
}
PREFERENCES = {
    "RLAIF-V: image, question, chosen, rejected": lambda c, q, a: {
        "image": encoded(c), "question": q, "chosen": a, "rejected": OTHER},
    "RLHF-V: text as JSON": lambda c, q, a: {
        "image": encoded(c), "text": json.dumps({"question": q, "chosen": a, "rejected": OTHER})},
    "TRL: images, prompt, chosen, rejected": lambda c, q, a: {
        "images": [file_of(c)], "prompt": turns(parts(q), None), "chosen": said(a), "rejected": said(OTHER)},
    "TRL: without a prompt; MiniMind: dpo.jsonl": lambda c, q, a: {
        "images": [file_of(c)], "chosen": turns(q, a), "rejected": turns(q, OTHER)},
    "LLaMA-Factory: conversations, chosen, rejected": lambda c, q, a: {
        "images": [file_of(c)], "conversations": llava(f"<image>{q}"), "chosen": llava(q, a)[1], "rejected": llava(q, OTHER)[1]},
    "LLaMA-Factory: instruction, chosen, rejected": lambda c, q, a: {
        "images": [file_of(c)], "instruction": q, "input": "", "chosen": a, "rejected": OTHER},
    "ms-swift: messages, rejected_response": lambda c, q, a: {
        "images": [file_of(c)], "messages": turns(f"<image>{q}", a), "rejected_response": OTHER},
    "ms-swift: messages, rejected_messages": lambda c, q, a: {
        "images": [file_of(c)], "messages": turns(f"<image>{q}", a), "rejected_messages": turns(f"<image>{q}", OTHER)},
    "ultrafeedback: prompt, and turns that begin with it": lambda c, q, a: {
        "images": [file_of(c)], "prompt": q, "chosen": turns(q, a), "rejected": turns(q, OTHER)},
}  # fmt: skip


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), **UTF8)


def write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", **UTF8) as opened:
        writer = csv.DictWriter(opened, rows[0].keys(), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


# who writes a file of rows; the key is what the table says of it
FILES = {
    "jsonl: an object per line": ("rows.jsonl", write_jsonl),
    "json: an array": ("rows.json", lambda file, rows: file.write_text(json.dumps(rows, indent=1), **UTF8)),
    "json: an object with one list of rows": ("rows.json", lambda file, rows: file.write_text(
        json.dumps({"version": 1, "data": rows}), **UTF8)),
    "an array named .jsonl, lines named .json": ("rows.json", write_jsonl),
    "with a byte order mark": ("rows.jsonl", lambda file, rows: file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")),
    "parquet": ("rows.parquet", lambda file, rows: parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=5)),
    "csv with a header": ("rows.csv", write_csv),
    "tsv with a header": ("rows.tsv", write_csv),
}  # fmt: skip
FLAT = QUESTIONS["image, question, answer"]


@pytest.fixture
def folder(tmp_path) -> Path:
    for colour in COLOURS:
        (tmp_path / file_of(colour)).write_bytes(png(colour))
    return tmp_path


def asked(colour: str, question: str) -> tuple:
    return "user", [NAMES[colour], question]


@pytest.mark.parametrize("form", QUESTIONS)
def test_the_same_questions_in_every_form_are_the_same_in_every_stage(folder, form):
    write_jsonl(folder / "rows.jsonl", [QUESTIONS[form](*row) for row in ROWS])
    learned = [contents(one) for one in load(folder / "rows.jsonl")]
    assert learned == [[asked(c, q), ("assistant", [a])] for c, q, a in ROWS]
    to_ask = list(load(folder / "rows.jsonl", need_answer=False))
    assert [contents(one)[0] for one in to_ask] == [asked(c, q) for c, q, _ in ROWS]
    assert [one.answer or one.messages[-1].text for one in to_ask] == [a for _, _, a in ROWS]


@pytest.mark.parametrize("form", CAPTIONS)
def test_the_same_captions_in_every_form(folder, form):
    write_jsonl(folder / "rows.jsonl", [CAPTIONS[form](*row) for row in ROWS])
    assert [contents(one) for one in load(folder / "rows.jsonl")] == [[("assistant", [NAMES[c], a])] for c, _, a in ROWS]


def test_pictures_with_texts_beside_them_are_the_same_captions(folder):
    for i, (colour, _, answer) in enumerate(ROWS):
        (folder / f"{i:02}.png").write_bytes(png(colour))
        (folder / f"{i:02}.txt").write_text(answer + "\n")
    found = sorted((contents(one) for one in load(folder)), key=lambda one: int(one[0][1][1].split()[-2]))
    assert found == [[("assistant", [NAMES[c], a])] for c, _, a in ROWS]


@pytest.mark.parametrize("form", PREFERENCES)
def test_the_same_preferences_in_every_form(folder, form):
    write_jsonl(folder / "rows.jsonl", [PREFERENCES[form](*row) for row in ROWS])
    found: list[Preference] = list(load_preferences(folder / "rows.jsonl"))
    assert [(contents(one.prompt), one.chosen, one.rejected) for one in found] == [([asked(c, q)], a, OTHER) for c, q, a in ROWS]


@pytest.mark.parametrize("kind", FILES)
def test_the_same_rows_in_every_kind_of_file(folder, kind):
    name, write = FILES[kind]
    write(folder / name, [FLAT(*row) for row in ROWS])
    source = load(folder / name)
    assert [contents(one) for one in source] == [[asked(c, q), ("assistant", [a])] for c, q, a in ROWS]
    assert [contents(source[i])[0] for i in (11, 0, 5)] == [asked(*ROWS[i][:2]) for i in (11, 0, 5)]


def test_pictures_have_an_address_that_finds_them_again(folder):
    write_jsonl(folder / "rows.jsonl", [FLAT("red", "Q?", "A."), QUESTIONS["the picture in base64"]("blue", "Q?", "A.")])
    again = [{"image": one.pictures[0].address, "question": "Q?", "answer": "A."} for one in load(folder / "rows.jsonl")]
    assert again[0]["image"] == "red.png"
    write_jsonl(folder / "again.jsonl", again)
    assert [contents(one)[0][1][0] for one in load(folder / "again.jsonl")] == ["RED", "BLUE"]


# ---------------------------------------------------------------- the table of the page


def shortened(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False)
    for colour in COLOURS:
        text = text.replace(encoded(colour), "iVBORw0...")
    return "`" + text.replace("|", "\\|") + "`"


def table() -> str:
    """The forms as markdown, each with its first row."""
    lines = []
    for title, forms in (("A question and its answer", QUESTIONS), ("A caption", CAPTIONS), ("A preference", PREFERENCES)):
        lines += [f"| {title} | a row |", "| --- | --- |"]
        lines += [f"| {name.replace('|', '')} | {shortened(form('red', 'What colour is it?', 'Red.'))} |"
                  for name, form in forms.items()]  # fmt: skip
        lines.append("")
    lines += ["| Files |", "| --- |", *(f"| {name} |" for name in FILES), "| a folder of pictures, 0.png beside 0.txt |"]
    return "\n".join(lines)


def test_the_page_shows_the_forms_of_this_test():
    page = (Path(__file__).parents[1] / "dataset" / "README.md").read_text(**UTF8)
    shown = page.partition("<!-- forms -->\n")[2].partition("\n<!-- /forms -->")[0]
    assert shown == table(), "run python -m tests.test_forms, and put what it prints between the two marks"


def test_a_conversation_and_a_picture_are_what_these_tests_compare(folder):
    write_jsonl(folder / "rows.jsonl", [FLAT(*ROWS[0])])
    one = load(folder / "rows.jsonl")[0]
    assert isinstance(one, Conversation) and isinstance(one.messages[0].parts[0], Picture)


if __name__ == "__main__":
    print(table())

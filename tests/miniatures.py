"""Small files with the columns of the official ones, and pictures for them."""

import io
import json
import random
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


def picture(file: Path, colour: str) -> Path:
    Image.new("RGB", (40, 30), colour).save(file)
    return file


def png(colour: str) -> bytes:
    """The bytes of a file with 8 x 8 pixels of a colour."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def talk(question: str, answer: str, names: tuple[str, ...] = ("from", "value", "human", "gpt")) -> list[dict]:
    role, text, user, assistant = names
    return [{role: user, text: question}, {role: assistant, text: answer}]


OPENAI = ("role", "content", "user", "assistant")


def llava(question, answer="An apple.", **more) -> dict:
    """A row of LLaVA's."""
    return {"conversations": talk(question, answer), **more}


def minimind_tables(n: int) -> tuple:
    """Parquet tables of n rows: with the bytes of one picture each, red and blue in turn; with a list of both."""
    import pyarrow

    turns = json.dumps(talk("<image>\nWhat?", "An apple.", OPENAI))
    two = turns.replace("<image>", "<image><image>")
    one_each = {"conversations": [turns] * n, "image_bytes": [png("red"), png("blue")] * (n // 2)}
    lists = {"conversations": [two] * n, "image_bytes": [[png("red"), png("blue")]] * n}
    return pyarrow.table(one_each), pyarrow.table(lists)


def write_all(folder: Path) -> Path:
    """llava.json, llava.jsonl, minimind.parquet, messages.jsonl, eureka.jsonl, lmm_r1.jsonl and text.jsonl, four rows each."""
    import pyarrow
    from pyarrow import parquet

    files = [picture(folder / f"{colour}.png", colour) for colour in COLOURS[:4]]
    one = talk("<image>\nWhat colour?", "It is a colour.")
    two = talk("From <image> to <image>?", "Another colour.")
    llava = [{"id": "1", "image": files[0].name, "conversations": one},
             {"id": "2", "image": f"{files[0].name}, {files[1].name}", "conversations": two},
             {"id": "3", "image": [files[2].name, files[3].name], "conversations": two},
             {"id": "4", "conversations": talk("Hello!", "Good day.")}]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(llava))
    lines(folder / "llava.jsonl", llava)
    turns = [talk(row["conversations"][0]["value"], "A colour.", OPENAI) for row in llava]
    parquet.write_table(pyarrow.table({
        "conversations": [json.dumps(turn) for turn in (turns[0], turns[1])] * 2,
        "image_bytes": [[files[0].read_bytes()], [files[0].read_bytes(), files[1].read_bytes()]] * 2,
    }), folder / "minimind.parquet")  # fmt: skip
    content = [{"type": "image_url", "image_url": {"url": files[1].name}}, {"type": "text", "text": "What colour?"}]
    lines(folder / "messages.jsonl", [{"messages": talk(content, "Green.", OPENAI)}] * 4)
    thought = "<think>I look.</think><answer>4</answer>"
    lines(folder / "eureka.jsonl", [
        {"id": f"e{i}", "conversations": talk("<image>How many?" if i % 2 else "What is 2 + 2?", thought, OPENAI), "answer": "4",
         "image_urls": [f"file://{files[0]}"] if i % 2 else []} for i in range(4)])  # fmt: skip
    parts = [{"type": "image", "image": f"file://{files[2]}"}, {"type": "text", "text": "How many?"}]
    lines(folder / "lmm_r1.jsonl", [{"id": "r1", "message": json.dumps(talk(parts, thought, OPENAI)), "answer": "$4$"}] * 4)
    lines(folder / "text.jsonl", [{"text": f"Once there were {i} ants. 从前有{i}只蚂蚁。"} for i in range(4)])
    return folder


def write_mixed(folder: Path, pictures: int, texts: int) -> Path:
    """One jsonl: captions of a picture or two, each learned from a different number of tokens, and shorter texts without any."""
    rng = random.Random(0)
    files = [picture(folder / f"{i}.png", (7 * i % 256, 40 * i % 256, 90)).name for i in range(pictures)]
    rows = [{"id": str(i), "image": files[i:i + 1 + i % 2],
             "conversations": talk("<image>\n" * (1 + i % 2) + "What?", " ".join(rng.choices(COLOURS, k=rng.randint(1, 20))))}
            for i in range(pictures - 1)]  # fmt: skip
    rows += [{"text": " ".join(rng.choices(COLOURS, k=rng.randint(1, 20)))} for _ in range(texts)]
    return lines(folder / "mixed.jsonl", rows)

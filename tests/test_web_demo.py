"""The web page sends the whole conversation to the model, wherever it was edited, and listens on this machine alone."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

import web_demo
from dataset.bad_rows import BadRow
from dataset.chat import Message
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import checkpoint
from model.config import VLMConfig
from model.vlm import VLM
from tests.conftest import free_port
from tests.test_dialogue import BLUE, GREEN, RED, Model, dialogue, encode, look
from tests.tiny import llm_config

TOKENIZER = SentencePieceTokenizer()
SCRIPT = Path(web_demo.__file__)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page in front of a model that says what the test tells it to say: (client, model)."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        model = Model()
        examples = web_demo.world_examples(folder)
        demo = web_demo.build_demo(lambda messages: dialogue(model, messages=messages), examples, "a test")
        port = free_port()
        demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False)
        yield Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False), model
        demo.close()


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Pictures to upload, and one file that only has a picture's name."""
    for name, picture in {"red": RED, "blue": BLUE, "green": GREEN}.items():
        picture.load().save(tmp_path / f"{name}.png")
    (tmp_path / "notes.png").write_text("this is no picture")
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def say(page, history: list, text: str, *uploads: str, answers: str) -> list:
    """The page's conversation after one more message and its answer."""
    client, model = page
    model.answers.append(answers)
    message = {"text": text, "files": [handle_file(file) for file in uploads]}
    history, _ = client.predict(message, history, api_name="/send")
    return client.predict(history, api_name="/answer")


def texts(history: list) -> list[str]:
    return [item.get("text", "PICTURE") for entry in history for item in entry["content"]]


def test_every_message_and_every_picture_of_the_conversation_reaches_the_model(page, files):
    history = say(page, [], "What are these?", files["red"], files["blue"], answers="A bus.")
    history = say(page, history, "And this?", files["green"], answers="一只狐狸。")
    assert texts(history) == ["PICTURE", "PICTURE", "What are these?", "A bus.", "PICTURE", "And this?", "一只狐狸。"]
    batch = page[1].batches[-1]
    assert torch.equal(batch["pixels"], look([RED, BLUE, GREEN]))
    picture = [TOKENIZER.image] * 5
    asked = [*encode("<s>", "<|user|>", "1"), *picture, *encode("2"), *picture]
    asked += [*encode("What are these?", "<|assistant|>", "A bus.", "<|end|>", "<|user|>", "3"), *picture]
    asked += encode("And this?", "<|assistant|>")
    assert batch["input_ids"][0].tolist() == asked


def test_the_answer_streams(page):
    page[1].answers.append("one two three four")
    history, _ = page[0].predict({"text": "count", "files": []}, [], api_name="/send")
    grown = [texts(update)[-1] for update in page[0].submit(history, api_name="/answer")]
    assert grown[-1] == "one two three four"
    assert len(grown) > 2 and all(later.startswith(earlier) for earlier, later in zip(grown, grown[1:], strict=False))


def test_what_looks_like_html_is_shown_as_written_and_reaches_the_model_as_written(page):
    written = "<think>1 < 2</think> <b>&amp;</b> <script>"
    history = say(page, [], "is a<b & <image>?", answers=written)
    assert "<" not in "".join(texts(history))
    say(page, history, "so?", answers="yes")
    expected = encode("<s>", "<|user|>", "is a<b & <image>?", "<|assistant|>", written, "<|end|>", "<|user|>", "so?")
    assert page[1].batches[-1]["input_ids"][0].tolist() == expected + encode("<|assistant|>")


def test_a_text_file_named_png_gets_a_note_and_the_conversation_goes_on_without_it(page, files):
    history = say(page, [], "hello", answers="hi")
    refused = say(page, history, "what is this?", files["notes"], answers="never said")
    page[1].answers.clear()
    assert refused[-1]["metadata"]["title"] == web_demo.NOT_READ
    assert "notes.png" in texts(refused)[-1] and "cannot be opened" in texts(refused)[-1]
    assert "/" not in texts(refused)[-1], "no folder of the server's"
    say(page, refused, "still there?", answers="yes")
    expected = encode("<s>", "<|user|>", "hello", "<|assistant|>", "hi", "<|end|>", "<|user|>", "still there?")
    assert page[1].batches[-1]["input_ids"][0].tolist() == expected + encode("<|assistant|>")


def test_an_empty_message_is_not_sent(page):
    asked = len(page[1].batches)
    history, _ = page[0].predict({"text": "  ", "files": []}, [], api_name="/send")
    assert history == [] and len(page[1].batches) == asked


def test_a_retry_asks_the_same_again_and_undo_gives_the_message_back(page, files):
    first = say(page, [], "hello", answers="hi")
    both = say(page, first, "what?", files["red"], answers="wrong")
    again, _ = page[0].predict(both, api_name="/retry")
    assert texts(again) == [*texts(first), "PICTURE", "what?"]
    undone, box = page[0].predict(both, api_name="/undo")
    assert texts(undone) == texts(first)
    assert box["text"] == "what?" and len(box["files"]) == 1


def test_stop_stops_the_model(page):
    client, model = page
    model.answers.append("one two three four five six seven eight nine ten " * 5)
    model.seconds, before = 0.02, len(model.spoken)
    history, _ = client.predict({"text": "count", "files": []}, [], api_name="/send")
    job = client.submit(history, api_name="/answer")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    time.sleep(0.2)
    made = len(model.spoken)
    time.sleep(0.2)
    model.seconds = 0.0
    assert 0 < made - before < 50 and len(model.spoken) == made


def test_two_people_are_answered_one_after_the_other(page):
    client, model = page
    model.answers += ["one two three four five six"] * 2
    model.seconds, before = 0.02, len(model.spoken)
    history, _ = client.predict({"text": "count", "files": []}, [], api_name="/send")
    other = Client(client.src, verbose=False, download_files=False)
    for job in [person.submit(history, api_name="/answer") for person in (client, other)]:
        assert texts(job.result())[-1] == "one two three four five six"
    model.seconds = 0.0
    spoken = model.spoken[before:]
    assert len(set(spoken)) == 2 and spoken == sorted(spoken)


def test_files_of_the_server_cannot_be_asked_for(page):
    client, model = page
    asked = len(model.batches)
    file = {"path": str(SCRIPT), "meta": {"_type": "gradio.FileData"}}
    data = {"data": [[{"role": "user", "content": [{"type": "file", "file": file}]}]]}
    call = urllib.request.Request(
        f"{client.src}gradio_api/call/answer", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(call))["event_id"]
    assert b"event: error" in urllib.request.urlopen(f"{client.src}gradio_api/call/answer/{event}").read()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{client.src}gradio_api/file={SCRIPT}")
    assert len(model.batches) == asked


def entry(role: str, *content, title: str | None = None) -> dict:
    return {"role": role, "content": list(content), "metadata": {"title": title} if title else None}


def test_pictures_and_texts_in_entries_of_their_own_are_one_message(files):
    picture = {"type": "file", "file": {"path": files["red"]}}
    history = [entry("user", picture), entry("user", {"type": "text", "text": "1 &lt; 2?"}), entry("assistant")]
    message, answer = web_demo.messages(history)
    assert message.text == "1 < 2?" and message.parts[0].load().getpixel((0, 0)) == (255, 0, 0)
    assert answer == Message("assistant", ())
    with pytest.raises(BadRow, match="missing"):
        web_demo.messages([entry("user", {"type": "file", "file": {"path": files["red"] + "x"}})])


def test_the_examples_show_scenes_of_both_languages_and_one_has_two_pictures(tmp_path):
    examples = web_demo.world_examples(tmp_path)
    assert any(example["text"].isascii() for example in examples)
    assert any(not example["text"].isascii() for example in examples)
    assert sorted(len(example["files"]) for example in examples)[-1] == 2
    assert all(Image.open(file).size == (96, 96) for example in examples for file in example["files"])


@pytest.fixture(scope="module")
def port(launcher, tmp_path_factory):
    """The script itself with a tiny random checkpoint, on this port."""
    folder = tmp_path_factory.mktemp("served")
    spec = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"
    config = VLMConfig(llm_config(vocab_size=TOKENIZER.vocab_size), spec, "linear", TOKENIZER.image)
    checkpoint.save(folder / "tiny", VLM(config), MODEL_FILE)
    chosen = free_port()
    arguments = ["--model", "tiny", "--port", str(chosen), "--max_new_tokens", "5", "--device", "cpu"]
    server, latest = launcher.start(SCRIPT.name, *arguments, cwd=folder), time.time() + 120
    while not answers("127.0.0.1", chosen):
        assert time.time() < latest, server.streams["stderr"].read_text()
        time.sleep(0.1)
    yield chosen
    os.kill(server.pid, signal.SIGTERM)
    launcher.wait(server)


def test_the_script_answers_with_a_checkpoint_and_refuses_huge_files(port, files, tmp_path):
    client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False)
    message = {"text": "hello", "files": [handle_file(files["red"])]}
    history, _ = client.predict(message, [], api_name="/send")
    assert client.predict(history, api_name="/answer")[-1]["role"] == "assistant"
    (tmp_path / "huge.png").write_bytes(bytes(21_000_000))
    with pytest.raises(ValueError, match="(?i)size|413"):
        client.predict({"text": "", "files": [handle_file(tmp_path / "huge.png")]}, [], api_name="/send")


def test_the_script_listens_on_this_machine_alone(port):
    # On Linux all of 127.x.x.x is this machine, so a server on 0.0.0.0 would answer here too.
    assert answers("127.0.0.1", port) and not answers("127.0.0.2", port)


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def test_without_a_trained_model_it_says_what_to_run(run_script, tmp_path):
    done = run_script(SCRIPT.name, cwd=tmp_path, expect=1)
    assert "1-pretrain_vlm.py" in done.err and len(done.err.splitlines()) == 1

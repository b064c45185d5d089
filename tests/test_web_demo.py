"""The web page sends the whole conversation to the model, wherever it was edited, and listens on this machine alone."""

import contextlib
import json
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import web_demo
from dataset.bad_rows import BadRow
from dataset.chat import Message
from dataset.images import from_file
from dataset.page import views
from dataset.page.actions import Page, paced
from dataset.page.examples import examples, truth
from dataset.page.messages import WORD, answer_entries, clicked, messages
from dataset.page.server import app_options
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from dataset.vision.video import of_any
from model import checkpoint
from model.config import VLMConfig
from model.vlm import VLM
from tests import tiny
from tests.conftest import free_port
from tests.test_dialogue import BLUE, GREEN, RED, Model, dialogue, encode, look
from tests.tiny import llm_config

WORD_MARK = re.compile(r'<span class="word" role="button" tabindex="0" id="word-[0-9]+-[0-9]+">|</span>')
TOKENIZER = SentencePieceTokenizer()
SCRIPT = Path(web_demo.__file__)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page in front of a model that says what the test tells it to say: (client, model)."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        model = Model()
        shown = examples()[:2]
        samples = [example.message(folder, number) for number, example in enumerate(shown)]
        demo = web_demo.build_demo(Page(told := Told(model), shown), samples, "sft", web_demo.Config())
        port = free_port()
        demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                    app_kwargs=app_options())  # fmt: skip
        yield Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False), model, told
        demo.close()


class Told:
    """In the place of checkpoints: two names for a model that says what the test tells it to say."""

    folders = {"pretrain": Path("pretrain"), "sft": Path("sft")}

    def __init__(self, model: Model):
        self.model, self.network = model, tiny.nano()

    def dialogue(self, name, messages=(), *, max_new_tokens=1, **sampling):
        self.asked = name, max_new_tokens, sampling
        return dialogue(self.model, messages=messages)

    def trained(self, name):
        processor = dialogue(self.model).processor
        return SimpleNamespace(inspector=SimpleNamespace(model=self.network), processor=processor)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Pictures to upload, and one file that only has a picture's name."""
    for name, picture in {"red": RED, "blue": BLUE, "green": GREEN}.items():
        picture.load().save(tmp_path / f"{name}.png")
    (tmp_path / "notes.png").write_text("this is no picture")
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def say(page, history: list, text: str, *uploads: str, answers: str) -> list:
    """The page's conversation after one more message and its answer."""
    client, model, _ = page
    model.answers.append(answers)
    message = {"text": text, "files": [handle_file(file) for file in uploads]}
    history, _ = client.predict(message, history, api_name="/send")
    return client.predict(history, api_name="/answer")


def texts(history: list) -> list[str]:
    """What stands on the page, without the marks of the words that can be clicked."""
    return [WORD_MARK.sub("", item.get("text", "PICTURE")) for entry in history for item in entry["content"]]


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
    page[1].seconds = 0.06  # the page shows ten updates a second
    history, _ = page[0].predict({"text": "count", "files": []}, [], api_name="/send")
    grown = [texts(update)[-1] for update in page[0].submit(history, api_name="/answer")]
    page[1].seconds = 0.0
    assert grown[-1] == "one two three four"
    assert len(grown) > 2 and all(later.startswith(earlier) for earlier, later in zip(grown, grown[1:], strict=False))


def test_what_looks_like_html_is_shown_as_written_and_reaches_the_model_as_written(page):
    written = "<think>1 < 2</think> <b>&amp;</b> <script>"
    history = say(page, [], "is a<b & <image>?", answers=written)
    assert "<" not in "".join(texts(history))
    say(page, history, "so?", answers="yes")
    expected = encode("<s>", "<|user|>", "is a<b & <image>?", "<|assistant|>", written, "<|end|>", "<|user|>", "so?")
    assert page[1].batches[-1]["input_ids"][0].tolist() == expected + encode("<|assistant|>")


def test_a_text_file_named_png_is_refused_with_the_reason_and_the_conversation_goes_on_without_it(page, files):
    history = say(page, [], "hello", answers="hi")
    with pytest.raises(AppError, match="cannot be opened: notes.png") as refused:
        page[0].predict({"text": "what is this?", "files": [handle_file(files["notes"])]}, history, api_name="/send")
    assert "/" not in str(refused.value), "no folder of the server's"
    say(page, history, "still there?", answers="yes")
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
    client, model, _ = page
    model.answers.append("one two three four five six seven eight nine ten " * 5)
    model.seconds, before = 0.02, len(model.spoken)
    history, _ = client.predict({"text": "count", "files": []}, [], api_name="/send")
    job = client.submit(history, api_name="/answer")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    time.sleep(0.5)
    made = len(model.spoken)
    time.sleep(0.2)
    model.seconds = 0.0
    assert 0 < made - before < 50 and len(model.spoken) == made


def test_two_people_are_answered_one_after_the_other(page):
    client, model, _ = page
    model.answers += ["one two three four five six"] * 2
    model.seconds, before = 0.02, len(model.spoken)
    history, _ = client.predict({"text": "count", "files": []}, [], api_name="/send")
    other = Client(client.src, verbose=False, download_files=False)
    for job in [person.submit(history, api_name="/answer") for person in (client, other)]:
        assert texts(job.result())[-1] == "one two three four five six"
    model.seconds = 0.0
    spoken = model.spoken[before:]
    assert len(set(spoken)) == 2 and spoken == sorted(spoken)


def test_eight_people_at_once_get_each_an_answer_to_what_they_asked(page, monkeypatch):
    def echo(batch: dict):
        for token in TOKENIZER.encode(TOKENIZER.decode(batch["input_ids"][0].tolist())):
            time.sleep(0.002)
            yield token

    def talk(person: int) -> list[str]:
        client, history = Client(page[0].src, verbose=False, download_files=False), []
        for question in (f"{person} asks, ", f"{person} asks more"):
            history, _ = client.predict({"text": question, "files": []}, history, api_name="/send")
            history = client.predict(history, api_name="/answer")
        return texts(history)

    monkeypatch.setattr(page[2], "model", echo)
    with ThreadPoolExecutor(8) as pool:
        for person, said in enumerate(pool.map(talk, range(8))):
            first, second = f"{person} asks, ", f"{person} asks more"
            assert said == [first, first, second, first + first + second]


def test_files_of_the_server_cannot_be_asked_for(page):
    client, model, _ = page
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
    message, answer = messages(history)
    assert message.text == "1 < 2?" and message.parts[0].load().getpixel((0, 0)) == (255, 0, 0)
    assert answer == Message("assistant", ("",))
    with pytest.raises(BadRow, match="missing"):
        messages([entry("user", {"type": "file", "file": {"path": files["red"] + "x"}})])


@pytest.mark.parametrize("answer", [
    "A bus.", "<think>1+1</think><answer>2</answer>", "<think>1 < 2</think> so 2", "<answer>2</answer>", "", "1 <think> 2",
])  # fmt: skip
def test_reasoning_is_folded_away_and_comes_back_to_the_model_as_it_was(answer):
    entries = answer_entries(answer, 0)
    titles = [(one["metadata"] or {}).get("title") for one in entries]
    assert titles == (["Reasoning", None] if answer.startswith("<think>") else [None])
    assert "&lt;/" not in "".join(texts(entries)), "no tag is shown"
    assert messages([*entries])[0].text == answer


@pytest.mark.parametrize("answer", [
    "A bus & two foxes.", "<think>3, 4. 3+4=7.</think><answer>7 it is</answer>", "<think>1 < 2</think> so 公交车",
    "<answer>2</answer>", "a</span>",
])  # fmt: skip
def test_each_word_of_an_answer_knows_its_conversation_and_its_place(answer):
    before = [entry("user", {"type": "text", "text": "one?"}), *answer_entries("<think>1</think>yes", 1),
              entry("user", {"type": "text", "text": "two?"})]  # fmt: skip
    history = [*before, *answer_entries(answer, len(before)), entry("user", {"type": "text", "text": "three?"})]
    ids = [id for one in history[len(before):] for id in re.findall('id="(.*?)"', one["content"][0]["text"])]
    found = [clicked(history, id) for id in ids]
    assert {(tuple(asked), said) for asked, said, _ in found} == {(tuple(messages(before)), answer)}
    untagged = re.sub("</?(think|answer)>", lambda tag: " " * len(tag[0]), answer)
    assert [at for _, _, at in found] == [word.start() for word in WORD.finditer(untagged)]
    assert len(set(ids)) == len(ids) > 0


@pytest.mark.parametrize("word", ["", "component-7", "word-0-0", "word-2-0", "word-99-0", "word-1", "word-1-0-0"])
def test_what_is_no_word_of_an_answer_is_not_looked_into(word):
    assert clicked([entry("user", {"type": "text", "text": "one?"}), *answer_entries("yes", 1)], word) is None


@pytest.mark.parametrize(("text", "shown"), [
    ("<think>1+", [("1+", "Reasoning", None)]), ("<think>1+1</think>", [("1+1", "Reasoning", "done")]),
    ("<think>1+1</think><answer>2", [("1+1", "Reasoning", "done"), ("2", None, None)]),
])  # fmt: skip
def test_reasoning_is_open_while_it_grows(text, shown):
    entries = [(texts([one])[0], one["metadata"] or {}) for one in answer_entries(text, 0)]
    assert [(words, metadata.get("title"), metadata.get("status")) for words, metadata in entries] == shown


def test_every_update_but_some_between_the_first_and_the_last_is_skipped():
    assert list(paced(iter("abcde"), seconds=60)) == ["a", "e"]
    assert list(paced(iter("abc"), seconds=0)) == ["a", "b", "c"] and list(paced(iter(""))) == []


def test_the_examples_are_of_every_task_in_both_languages_and_know_their_answers(tmp_path):
    shown = examples()
    samples = [example.message(tmp_path, number) for number, example in enumerate(shown)]
    tasks = {type(example.task).__name__ for example in shown}
    assert tasks == {"World", "Arithmetic", "EasyVQA", "Geometry", "Sokoban", "WorldClips"}
    assert any(not sample["text"].isascii() for sample in samples) and all(sample["text"] for sample in samples)
    assert sorted(len(sample["files"]) for sample in samples)[-1] == 2
    assert all(min(Image.open(file).size) >= 64 for sample in samples for file in sample["files"])
    for example, sample in zip(shown, samples, strict=True):
        asked = Message("user", (*(part for file in sample["files"] for part in of_any(file)), sample["text"]))
        assert truth(asked, shown) == (example, example.example.answer), "a copy of the pictures is known, too"
    other = Message("user", (from_file(samples[0]["files"][0]), "Anything else?"))
    assert truth(other, shown).shown is None and truth(other, shown).text.startswith("At the ")
    assert truth(Message("user", (RED, "What is this?")), shown) == (None, "") == truth(Message("user", ("What?",)), shown)


def test_a_picture_without_words_is_a_message(page, files):
    history = say(page, [], "", files["red"], answers="A square.")
    assert texts(history) == ["PICTURE", "A square."]
    asked = [*encode("<s>", "<|user|>", "1"), *[TOKENIZER.image] * 5, *encode("<|assistant|>")]
    assert page[1].batches[-1]["input_ids"][0].tolist() == asked


def test_the_settings_of_the_page_reach_the_model(page):
    page[1].answers.append("yes")
    history, _ = page[0].predict({"text": "really?", "files": []}, [], api_name="/send")
    page[0].predict(history, "pretrain", 1.5, 0.5, 7, api_name="/answer")
    assert page[2].asked == ("pretrain", 7, {"temperature": 1.5, "top_p": 0.5})


def test_checkpoints_answer_side_by_side_and_what_they_say_is_inert(page, files):
    page[1].answers += ["<think>2</think><answer><b>A</b></answer>", "A bus."]
    message = {"text": "<i>What</i>?", "files": [handle_file(files["red"])]}
    shown = page[0].predict(message, [], ["pretrain", "sft"], api_name="/compare")
    assert "<h2>pretrain</h2><details><summary>Reasoning</summary>2</details><p>&lt;b&gt;A&lt;/b&gt;</p>" in shown
    assert "<h2>sft</h2><p>A bus.</p>" in shown and "&lt;i&gt;What&lt;/i&gt;?" in shown and "right answer" not in shown
    with pytest.raises(AppError, match="write a question"):
        page[0].predict({"text": "", "files": []}, [], ["sft"], api_name="/compare")


def test_the_right_answer_of_an_example_stands_above_the_others_which_are_marked():
    example = examples()[0]
    right = truth(example.example.prompt.messages[-1], [example])
    shown = views.side_by_side("?", right, {"sft": example.example.answer, "dpo": "A violin."})
    assert "The right answer" in shown and "sft ✓" in shown and "dpo ✗" in shown


@pytest.mark.parametrize("history", [
    [{"role": "robot", "content": [{"type": "text", "text": "hi"}]}], [{"role": "user"}], [5], "hello", {"a": 1}, [[["a", "b"]]],
    [{"role": "user", "content": [{"type": "component", "component": "html", "value": "", "constructor_args": {}, "props": {}}]}],
    [{"role": "user", "content": [{"type": "file", "file": {"path": "gone.png"}}]}], None, [{"role": "user", "content": []}],
])  # fmt: skip
def test_a_malformed_post_gets_an_error_and_the_next_message_its_answer(page, history, capfd):
    asked = len(page[1].batches)
    with contextlib.suppress(urllib.error.HTTPError):
        data = json.dumps({"data": [history, "sft", 0.3, 0.9, 20]}).encode()
        url = f"{page[0].src}gradio_api/call/answer"
        call = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(call))["event_id"]
        assert b"event: error" in urllib.request.urlopen(f"{url}/{event}").read() or history is None
    assert len(page[1].batches) == asked
    assert "Traceback" not in capfd.readouterr().err
    assert texts(say(page, [], "hello", answers="hi")) == ["hello", "hi"]


@pytest.mark.parametrize(("path", "body", "status"), [
    ("call/answer", b"{", 422), ("call/answer", b"[1, 2]", 422), ("call/answer", b"{}", 422),
    ("call/nothing", b'{"data": []}', 400), ("queue/join", b'{"data": [], "fn_index": 999, "session_hash": "x"}', 400),
])  # fmt: skip
def test_a_post_that_is_no_call_gets_a_status_and_leaves_no_traceback(page, path, body, status, capfd):
    with pytest.raises(urllib.error.HTTPError) as refused:
        call = urllib.request.Request(f"{page[0].src}gradio_api/{path}", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(call)
    assert refused.value.code == status and "Traceback" not in capfd.readouterr().err


def test_more_messages_than_may_wait_are_refused(page):
    model, before, accepted = page[1], len(page[1].batches), 0
    model.answers += ["one two three four five six seven eight"] * (web_demo.WAITING + 10)
    model.seconds = 0.1
    data = json.dumps({"data": [[entry("user", {"type": "text", "text": "count"})], "sft", 0.3, 0.9, 20]}).encode()
    call = urllib.request.Request(f"{page[0].src}gradio_api/call/answer", data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="503"):
        for _ in range(web_demo.WAITING + 10):
            urllib.request.urlopen(call)
            accepted += 1
    model.seconds = 0.0
    while len(model.batches) - before < accepted:
        time.sleep(0.05)
    model.answers.clear()
    assert accepted >= web_demo.WAITING


def test_a_long_history_costs_its_length(page):
    history = []
    for number in range(400):
        history.append(entry("user", {"type": "text", "text": f"question {number}"}))
        history.append(entry("assistant", {"type": "text", "text": "ok"}))
    asked = messages(history)
    started = time.process_time()
    document, forgotten = dialogue(page[1], max_prompt_tokens=60).prompt(asked[:-1])
    assert time.process_time() - started < 1 and forgotten > 300 and len(document) <= 60


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

"""The page in a real browser: headless Chromium uploads, asks, stops, clears, compares and clicks words.

It needs Debian's `chromium` and `chromium-driver`, and `selenium`; with `axe-core-python` it also asks what bars people who
cannot see the page or use a mouse.
"""

import contextlib
import importlib.util
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

import web_demo
from dataset.checkpoints import Checkpoints
from dataset.page import views
from dataset.page.actions import Page
from dataset.page.examples import examples
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import checkpoint
from model.inspection import Inspector, beside
from tests import tiny
from tests.conftest import free_port

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install chromium chromium-driver; pip install selenium"
)
STAGES = ["pretrain", "sft", "dpo", "grpo"]
BOX, SUBMIT, STOP = "textarea", "button.submit-button", "button.stop-button"


class Told:
    """In the place of model/generate.py's `stream`: says what the test tells it, and remembers the prompts."""

    def __init__(self):
        self.tokenizer, self.text, self.seconds, self.prompts, self.made = SentencePieceTokenizer(), "", 0.0, [], 0
        self.pause_before, self.go_on = 5, threading.Event()  # before this token it waits until it may go on
        self.go_on.set()

    def __call__(self, model, batch, **options):
        self.prompts.append(self.tokenizer.decode_all(batch["input_ids"][0].tolist()))
        for number, token in enumerate(self.tokenizer.encode(self.text)):
            time.sleep(self.seconds)
            if number == self.pause_before:
                self.go_on.wait(60)
            self.made += 1
            yield token


@pytest.fixture(scope="module")
def told():
    return Told()


@pytest.fixture(scope="module")
def address(tmp_path_factory, told):
    """The page in front of four tiny checkpoints."""
    folder = tmp_path_factory.mktemp("page")
    for stage in STAGES:
        checkpoint.save(folder / "out" / stage, tiny.nano(), MODEL_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        shown = examples()
        samples = [example.message(folder, number) for number, example in enumerate(shown)]
        checkpoints = Checkpoints(beside(folder / "out" / "sft"), Inspector, told)
        demo = web_demo.build_demo(Page(checkpoints, shown), samples, "sft", web_demo.Config())
        port = free_port()
        demo.launch(server_port=port, prevent_thread_lock=True, quiet=True, css=views.CSS, max_file_size=100_000)
        yield f"http://127.0.0.1:{port}/"
        demo.close()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Tab:
    """A fresh page and what a person does on it."""

    def __init__(self, browser, told, address: str, width: int = 1280, height: int = 1000):
        self.browser, self.told = browser, told
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})  # fmt: skip
        browser.get(address)
        self.wait(lambda: self.all(".gallery-item"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def wait(self, condition, seconds: float = 60):
        """Wait until the condition holds; what has just left the page, or is not on it yet, is no error."""
        from selenium.common.exceptions import WebDriverException

        latest = time.monotonic() + seconds
        while True:
            with contextlib.suppress(IndexError, WebDriverException):
                if found := condition():
                    return found
            assert time.monotonic() < latest, f"not within {seconds} s: {self.all('body')[0].text[-2000:]}"
            time.sleep(0.05)

    def ask(self, text: str, *files: Path) -> None:
        if files:
            self.all("input[type=file]")[0].send_keys("\n".join(map(str, files)))
            self.wait(lambda: len(self.all(".thumbnail-item")) == len(files))
        self.all(BOX)[0].send_keys(text)
        self.press(SUBMIT)

    def press(self, selector: str, number: int = 0) -> None:
        self.wait(lambda: self.all(selector)[number].is_displayed())
        self.browser.execute_script("arguments[0].click()", self.all(selector)[number])

    def chat(self) -> str:
        return self.all("[role=log]")[0].text

    def free(self) -> bool:
        return bool(self.all(SUBMIT)) and not self.all(STOP)

    def open(self, name: str) -> None:
        (tab,) = [one for one in self.all("button[role=tab]") if one.get_attribute("textContent").strip() == name][:1]
        self.browser.execute_script("arguments[0].click()", tab)


@pytest.fixture
def tab(browser, told, address):
    told.text, told.seconds = "A red bus and two foxes.", 0.0
    told.prompts.clear()
    return Tab(browser, told, address)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for colour in ("red", "blue"):
        Image.new("RGB", (96, 96), colour).save(folder / f"{colour}.png")
    red, green, blue = (Image.new("RGB", (96, 96), colour) for colour in ("red", "green", "blue"))
    red.save(folder / "moving.gif", save_all=True, append_images=[green, blue], duration=500)
    (folder / "notes.png").write_text("this is not a picture")
    return {file.stem: file for file in folder.iterdir()}


def test_two_pictures_are_uploaded_the_answer_streams_and_a_second_question_follows(tab, told, files):
    told.seconds = 0.15
    told.go_on.clear()
    tab.ask("What are these?", files["red"], files["blue"])
    tab.wait(lambda: "A red" in tab.chat())
    assert "foxes" not in tab.chat(), "it grows"
    told.go_on.set()
    tab.wait(lambda: "two foxes." in tab.chat())
    assert len(tab.all("[role=log] img")) == 2
    tab.wait(tab.free)
    told.text, told.seconds = "Blue.", 0.0
    tab.ask("And the second?")
    tab.wait(lambda: "Blue." in tab.chat())
    assert "What are these?" in told.prompts[-1] and "two foxes." in told.prompts[-1]


def test_stop_ends_the_answer_and_keeps_what_was_said(tab, told):
    told.text, told.seconds = "one two three four five six seven eight nine ten " * 20, 0.05
    tab.ask("Count.")
    tab.wait(lambda: "one two" in tab.chat())
    tab.press(STOP)
    tab.wait(tab.free)
    made = told.made
    time.sleep(0.5)
    assert told.made <= made + 2 and "one two" in tab.chat()


def test_clear_while_an_answer_streams_clears(tab, told):
    told.text, told.seconds = "one two three four five six seven eight nine ten " * 20, 0.05
    tab.ask("Count.")
    tab.wait(lambda: "one two" in tab.chat())
    tab.press("button[aria-label='Clear'], button[title='Clear']")
    tab.wait(tab.free)
    time.sleep(1)
    assert "one" not in tab.chat() and "Count." not in tab.chat()
    told.text, told.seconds = "Hello!", 0.0
    tab.ask("Hi.")
    tab.wait(lambda: "Hello!" in tab.chat())
    assert "Count." not in told.prompts[-1]


def test_a_file_that_is_not_a_picture_is_refused_and_nothing_is_sent(tab, told, files):
    tab.ask("What is this?", files["notes"])
    tab.wait(lambda: any("cannot be opened" in toast.text for toast in tab.all(".toast-body, .toast-text")))
    assert "What is this?" not in tab.chat() and not told.prompts
    assert tab.all(BOX)[0].get_attribute("value") == "What is this?", "so that it can be sent with another picture"


def test_a_file_that_is_too_large_is_refused_and_nothing_is_sent(tab, told, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    tab.all("input[type=file]")[0].send_keys(str(tmp_path / "large.png"))
    tab.wait(lambda: any("size" in toast.text for toast in tab.all(".toast-body, .toast-text")))
    assert not told.prompts and not tab.all("[role=log] img")


def test_reasoning_is_folded_away_and_the_answer_is_shown(tab, told):
    told.text = "<think>3, 4. 3+4=7.</think><answer>7</answer>"
    tab.ask("Add.")
    tab.wait(lambda: "Reasoning" in tab.chat() and tab.free())
    tab.wait(lambda: "3+4=7" not in tab.chat())
    assert "7" in tab.chat() and "answer>" not in tab.chat()


def test_four_checkpoints_answer_an_example_side_by_side_below_the_right_answer(tab, told):
    tab.press(".gallery-item")
    tab.wait(lambda: tab.all(BOX)[0].get_attribute("value"))
    tab.open("Compare")
    tab.press("#compare")
    tab.wait(lambda: len([one for one in tab.all(".cards section") if "two foxes." in one.text]) == 4)
    assert [one.text.split()[0] for one in tab.all(".cards h2")] == STAGES
    assert "The right answer" in tab.all("#answers")[0].text and "✗" in tab.all(".cards h2")[0].text
    assert tab.chat().count("foxes") == 0, "a comparison is not part of the chat"


def test_a_word_of_the_answer_that_is_clicked_shows_where_the_model_looked_and_what_was_likely(tab, told):
    tab.press(".gallery-item", 4)
    tab.wait(lambda: len(tab.all(".thumbnail-item")) == 2)
    tab.press(SUBMIT)
    tab.wait(lambda: [one.text for one in tab.all(".word")] == ["A", "red", "bus", "and", "two", "foxes", "."] and tab.free())
    tab.open("Compare")
    tab.all(".word")[2].click()
    tab.wait(lambda: tab.all("#map img"))
    assert tab.all("#map img")[0].is_displayed(), "the tab of the map comes to the front"
    assert tab.all("#map img")[0].get_property("naturalWidth") > 400, "two pictures side by side"
    assert "“bus”" in tab.all("#map")[0].text
    assert len(tab.all(".likeliest tr")) == 5
    assert tab.all(".gallery-item"), "the examples stay"
    told.text = "So it is."
    tab.ask("Really?")
    tab.wait(lambda: len(tab.all(".word")) == 11 and tab.free())
    tab.all(".word")[5].send_keys("\n")  # of the first answer, by the keyboard
    tab.wait(lambda: "“foxes”" in tab.all("#map")[0].text)


def test_an_animation_is_shown_to_the_model_as_frames_with_their_times(tab, told, files):
    tab.ask("What happens?", files["moving"])
    tab.wait(lambda: "two foxes." in tab.chat())
    frames = "".join(f"{number / 2:.1f} s: {number + 1}" + "<image>" * 9 for number in range(3))
    assert f"<|user|>{frames}What happens?<|assistant|>" in told.prompts[-1].replace(" <", "<")
    assert len(tab.all("[role=log] img")) == 1


def test_the_page_fits_a_phone_and_is_dark_where_that_is_asked_for(browser, told, address):
    tab = Tab(browser, told, f"{address}?__theme=dark", 390, 844)
    tab.open("Things")
    tab.wait(lambda: len(tab.all(".things li")) == 100)
    width, *colour = browser.execute_script("""
        const colour = getComputedStyle(document.querySelector(".gradio-container")).color
        return [document.documentElement.scrollWidth, ...colour.match(/[0-9]+/g).map(Number)]""")
    assert width <= 390 and min(colour[:3]) > 150, "light letters"


def test_nothing_critical_bars_anybody(tab, told):
    spec = importlib.util.find_spec("axe_core_python")
    if not spec:
        pytest.skip("pip install axe-core-python")
    told.text = "<think>1</think><answer>A bus.</answer>"
    tab.press(".gallery-item")
    tab.wait(lambda: tab.all(BOX)[0].get_attribute("value"))
    tab.press(SUBMIT)
    tab.wait(lambda: tab.all(".word") and tab.free())
    tab.all(".word")[-1].click()
    tab.wait(lambda: tab.all("#map img"))
    tab.browser.execute_script((Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
    critical = [(one["id"], node["html"]) for one in found if one["impact"] == "critical" for node in one["nodes"]]
    gradios = ("image-frame", "icon-button")  # a picture in a message and what enlarges it: gradio's buttons have no names
    assert not [(rule, html) for rule, html in critical if not any(name in html for name in gradios)]

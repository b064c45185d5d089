"""A judge behind a small server that speaks the chat API: replies, retries, time-outs, garbage, and what is kept."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dataset.images import from_image
from dataset.judge import Failure, Judge, NoJudge, data_url, failures, judge_or_none, make_judge, message, threaded
from model.registry import UserError
from tests.conftest import ROOT

pytest.importorskip("openai")


class Server(ThreadingHTTPServer):
    """Answers every request with `self.answer(text of the last message)`: a reply, (status, body), or a number of seconds."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.together, self.most = answer, [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers["Authorization"], request))
            server.together += 1
            server.most = max(server.most, server.together)
        content = request["messages"][-1]["content"]
        reply = server.answer(content if isinstance(content, str) else content[-1]["text"])
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "late"
        if isinstance(reply, str):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
            usage = {"prompt_tokens": 10, "completion_tokens": len(reply), "total_tokens": 10 + len(reply)}
            reply = 200, json.dumps({"id": "1", "object": "chat.completion", "model": request["model"], "choices": [choice],
                                     "usage": usage})  # fmt: skip
        with server.lock:
            server.together -= 1
        status, body, *headers = reply
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())
        except BrokenPipeError:
            pass  # the client waited no longer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    """`serve(answer)`: a running server."""
    running = []

    def serve(answer) -> Server:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


def ask(server: Server, texts: list[str], **options) -> list:
    options = {"cache": None, "retries": 0, "timeout": 5.0, **options}
    return Judge("judge-1", server.url, **options).ask([[message(text)] for text in texts])


def test_every_reply_goes_to_its_question_and_the_judge_is_asked_as_it_should_be(serve):
    server = serve(lambda text: f"so {text}")
    assert ask(server, [str(i) for i in range(20)]) == [f"so {i}" for i in range(20)]
    paths, keys, bodies = zip(*server.requests)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer none"}
    assert all(body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == 2048 for body in bodies)


def test_the_key_comes_from_the_environment_variable_that_is_named(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(lambda text: "yes")
    assert ask(server, ["?"], key="MY_KEY") == ["yes"]
    assert server.requests[0][1] == "Bearer secret"


def test_requests_run_side_by_side_but_no_more_than_workers(serve):
    def slow(text):
        time.sleep(0.1)
        return text

    server = serve(slow)
    started = time.time()
    assert ask(server, [str(i) for i in range(12)], workers=4) == [str(i) for i in range(12)]
    assert 1 < server.most <= 4 and time.time() - started < 12 * 0.1


def test_equal_questions_are_asked_once(serve):
    server = serve(lambda text: text)
    assert ask(server, ["a", "b", "a", "a"]) == ["a", "b", "a", "a"]
    assert len(server.requests) == 2


def test_a_server_that_fails_now_and_then_is_asked_again(serve):
    tries = []

    def flaky(text):
        tries.append(text)
        return (500, "{}") if len(tries) == 1 else "here"

    assert ask(serve(flaky), ["?"], retries=2) == ["here"]
    assert len(tries) == 2


def test_a_server_that_says_how_long_to_wait_is_waited_for(serve):
    times = []

    def busy(text):
        times.append(time.time())
        return (429, "{}", ("Retry-After", "1")) if len(times) == 1 else "here"

    assert ask(serve(busy), ["?"], retries=1) == ["here"]
    assert 1 <= times[1] - times[0] < 5


def test_tokens_are_counted_and_kept_with_the_replies(serve, tmp_path, capsys):
    server, cache = serve(lambda text: (400, "{}") if text == "b" else text), tmp_path / "judge.jsonl"
    for printed in ("judge m: 3 requests, 1 failed; 25 tokens for all 3 replies", "judge m: 1 requests, 1 failed; 25 tokens"):
        judge = Judge("m", server.url, cache=cache, retries=0)
        replies = judge.ask([[message(text)] for text in ("a", "b", "aaaa", "a")])
        assert [isinstance(reply, Failure) for reply in replies] == [False, True, False, False] and judge.tokens == 11 + 14
        assert printed in capsys.readouterr().out


def test_a_stored_reply_that_says_nothing_is_asked_for_again(serve, tmp_path):
    said = iter(["hm", "7", "8"])
    server, cache = serve(lambda text: next(said)), tmp_path / "judge.jsonl"

    def number(reply):
        return int(reply) if reply.isdigit() else Failure("no number")

    def asked(read):
        return Judge("m", server.url, cache=cache).ask([[message("How many?")]], read)

    assert [asked(number), asked(number), asked(number), asked(str)] == [["hm"], ["7"], ["7"], ["7"]]
    assert len(server.requests) == 2


def test_an_address_without_its_scheme_is_told_at_once():
    with pytest.raises(ValueError, match="judge=localhost:8000/v1 is no address: give one such as http://localhost:8000/v1"):
        Judge("m", "localhost:8000/v1")


def test_a_server_that_always_fails_is_a_failure_with_its_reason(serve):
    server = serve(lambda text: (503, '{"error": {"message": "overloaded"}}'))
    (failure,) = ask(server, ["?"], retries=1)
    assert isinstance(failure, Failure) and "overloaded" in failure.reason
    assert len(server.requests) == 2


def test_a_wrong_key_is_told_at_once_and_not_tried_again(serve):
    server = serve(lambda text: (401, '{"error": {"message": "wrong key"}}'))
    (failure,) = ask(server, ["?"], retries=3)
    assert "AuthenticationError" in failure.reason and len(server.requests) == 1


def test_a_server_that_does_not_answer_in_time_is_a_failure_and_the_others_go_on(serve):
    server = serve(lambda text: 1.0 if text == "slow" else text)
    slow, quick = ask(server, ["slow", "quick"], timeout=0.2)
    assert isinstance(slow, Failure) and "Timeout" in slow.reason
    assert quick == "quick"


def test_no_server_at_all_is_a_failure():
    (failure,) = Judge("m", "http://127.0.0.1:9/v1", cache=None, retries=0).ask([[message("?")]])
    assert "APIConnectionError" in failure.reason


@pytest.mark.parametrize("body", [
    "<html>welcome</html>", "{", "[]", "null", '{"choices": []}', '{"choices": [{"message": {}}]}', '{"choices": "x"}',
    '{"choices": [{"message": {"content": null}}]}', '{"choices": [{"message": {"content": " "}}]}',
    '{"choices": [{"message": {"content": [1]}}]}', "",
])  # fmt: skip
def test_garbage_is_a_failure_and_never_a_reply(serve, body):
    (failure,) = ask(serve(lambda text: (200, body)), ["?"])
    assert isinstance(failure, Failure)


def test_what_was_answered_is_kept_and_what_failed_is_asked_again(serve, tmp_path):
    cache, broken = tmp_path / "deep" / "judge.jsonl", {"b"}
    server = serve(lambda text: (400, "{}") if text in broken else f"so\u2028{text}")
    first = ask(server, ["a", "b", "c"], cache=cache)
    assert (first[0], first[2]) == ("so\u2028a", "so\u2028c") and isinstance(first[1], Failure)
    broken.clear()
    assert ask(server, ["a", "b", "c"], cache=cache) == ["so\u2028a", "so\u2028b", "so\u2028c"]
    assert len(server.requests) == 4  # three, then the failed one alone
    assert {json.loads(line)["model"] for line in cache.read_text().split("\n")[:-1]} == {"judge-1"}


def test_another_model_or_question_is_not_answered_from_the_file(serve, tmp_path):
    server = serve(lambda text: text)
    cache = tmp_path / "judge.jsonl"
    for model, text in (("one", "a"), ("two", "a"), ("one", "b"), ("one", "a")):
        assert Judge(model, server.url, cache=cache).ask([[message(text)]]) == [text]
    assert len(server.requests) == 3


def test_a_half_written_last_line_is_asked_again(serve, tmp_path):
    server, cache = serve(lambda text: text), tmp_path / "judge.jsonl"
    ask(server, ["a", "b"], cache=cache, workers=1)
    cache.write_text(cache.read_text()[:-10])
    assert ask(server, ["a", "b"], cache=cache) == ["a", "b"]
    assert len(server.requests) == 3
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 2


def test_a_picture_travels_within_the_message(serve):
    server, picture = serve(lambda text: text), from_image(Image.new("RGB", (5, 4), "red"))
    assert Judge("m", server.url, cache=None).ask([[message("What?", [picture])]]) == ["What?"]
    image, text = server.requests[0][2]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert (head, image["image_url"]["url"]) == ("data:image/png;base64", data_url(picture))
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert (shown.size, shown.getpixel((0, 0))) == ((5, 4), (255, 0, 0))


def test_without_address_and_key_the_message_says_what_to_give(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(NoJudge, match=r"judge=URL .* environment variable OPENAI_API_KEY"):
        Judge("gpt-4o")
    assert judge_or_none("mmhal", "", "gpt-4o", "OPENAI_API_KEY") is None
    printed = capsys.readouterr().out
    assert re.search(r"mmhal: answers will be saved and not judged; .*judge=URL.*python -m dataset.studies.rescore", printed)


def test_a_key_alone_is_enough_and_a_model_is_always_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert Judge("gpt-4o", cache=None).url == ""
    with pytest.raises(ValueError, match="model=NAME"):
        Judge("", "http://localhost:1/v1")


def test_a_judge_is_named_on_the_command_line_with_the_words_of_the_benchmarks(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    for options in ("http://localhost:1/v1,model=m,key=MY_KEY", "judge=http://localhost:1/v1,key=MY_KEY,model=m"):
        judge = make_judge(options)
        assert (judge.url, judge.model, judge.key) == ("http://localhost:1/v1", "m", "MY_KEY")
    assert make_judge("model=m,key=MY_KEY").url == ""  # OpenAI's own
    for options, remedy in (("http://localhost:1/v1", "give model=NAME"), ("model=m,key=NO_KEY", "give judge=URL"),
                            ("http://localhost:1/v1,name=m", "no option 'name=m'. Options: judge, model, key")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(remedy)):
            make_judge(options)


@pytest.mark.parametrize("key", [
    "sk-proj-4f9aB2", "hf_abcDEFghi", "gsk_0123456789abcdef", "AKIAIOSFODNN7EXAMPLE", "0123456789ABCDEF", "a key", "my.key", ""])
def test_a_key_in_the_place_of_a_variable_is_refused_and_not_repeated(key):
    for url in ("", "http://localhost:1/v1"):
        with pytest.raises(UserError, match="key= takes the name of an environment variable.* key=JUDGE_KEY") as refused:
            Judge("m", url, key)
        assert not key or key not in str(refused.value)


def test_any_variable_that_is_set_and_any_ordinary_name_is_taken(monkeypatch):
    monkeypatch.setenv("my_key", "secret")
    for name in ("my_key", "OPENAI_API_KEY", "LOCAL_KEY_2"):
        assert Judge("m", "http://localhost:1/v1", name, cache=None).key == name


def test_a_missing_library_is_told_before_anything_is_generated(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install openai"):
        Judge("m", "http://localhost:1/v1")


def test_failures_are_counted_and_listed_by_their_reason(capsys):
    failed = [Failure("asleep"), "a", 3, Failure("gone"), Failure("asleep")]
    assert failures("mmhal", failed, ["q0", "q1", "q2", "q3", "q4"]) == 3
    head, *reasons = capsys.readouterr().out.splitlines()
    assert head == "mmhal: 3 of 5 judgements failed and are not scored; the same command asks only these again"
    assert reasons == ["  asleep: q0, q4", "  gone: q3"]
    assert failures("mmhal", ["a"]) == 0 and not capsys.readouterr().out


def test_asking_nothing_answers_nothing():
    assert Judge("m", "http://127.0.0.1:9/v1", cache=None).ask([]) == []


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(serve):
    server = serve(lambda text: 60.0)
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore it
            f"from dataset.judge import Judge, message; Judge('m', {server.url!r}, cache=None).ask([[message('Is it?')]] * 2)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not server.requests and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in told and process.returncode != 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_goes_wrong_in_a_thread_is_raised():
    def half(item):
        if item == "b":
            raise OSError("no space left")
        return item * 2

    assert dict(threaded(half, ["a", "c"], 8)) == {"a": "aa", "c": "cc"}
    with pytest.raises(OSError, match="no space left"):
        list(threaded(half, ["a", "b", "c"], 2))

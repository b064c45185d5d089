"""Pictures on the web: downloaded once in a run, within bounds, and never from this machine or a private network."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dataset.bad_rows import BadRow
from dataset.vision import downloads
from dataset.vision.loading import from_name
from tests.test_images import gradient, saved

PNG = saved(gradient(8, 8), "PNG")


class Answer(BaseHTTPRequestHandler):
    """Answers by the path: a picture, an error, too much, byte by byte for ever, or a redirection to what stands behind /to/."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing.png" else 200)
        self.end_headers()
        self.wfile.write(PNG * (2 if self.path == "/large.png" else 1))
        if self.path == "/slow.png":
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine, `asked`: the paths that were asked for. What is downloaded is forgotten afterwards."""
    monkeypatch.setattr("dataset.vision.loading.DOWNLOADS", downloads.Downloads())
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as made:
        made.asked, made.stopped, made.daemon_threads = [], threading.Event(), True
        made.address = f"http://127.0.0.1:{made.server_port}"
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.stopped.set()
        made.shutdown()


@pytest.fixture
def trusted(monkeypatch):
    """Lets these tests, and nothing else, download from this machine."""
    real = downloads.is_public
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.1" or real(address))


def find(url: str):
    return from_name(url, Path("."), allow_urls=True)


def test_a_picture_is_downloaded_once_in_a_run_and_only_when_it_is_opened(server, trusted):
    pictures = [find(f"{server.address}/a.png") for _ in range(3)]
    assert not server.asked
    threads = [threading.Thread(target=picture.load) for picture in pictures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [picture.load().size for picture in pictures] == [picture.size for picture in pictures] == [(8, 8)] * 3
    assert server.asked == ["/a.png"]
    assert find(f"{server.address}/a.png".replace("http", "HTTP")).load().size == (8, 8)


@pytest.mark.parametrize(("path", "reason"), [
    ("/missing.png", "404"), ("/large.png", "larger than"), ("/slow.png", "not within 0.3 s"), ("/to//missing.png", "404"),
    ("/to/file:///etc/passwd", "(?i)redirect"), ("/to/http://10.0.0.1/a.png", "10.0.0.1, not a public address"),
    ("/to/http://localhost:1/a.png", "not a public address|refused"), ("/to/HTTP://[::1]/a.png", "::1, not a public address"),
])  # fmt: skip
def test_what_does_not_come_is_a_bad_row_and_is_not_asked_for_again(path, reason, server, trusted, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_DOWNLOAD", len(PNG) + 10 if path == "/large.png" else 10**6)
    monkeypatch.setattr(downloads, "MAX_SECONDS", 0.3 if path == "/slow.png" else 20.0)
    began = time.time()
    for _ in range(2):
        with pytest.raises(BadRow, match=reason) as refused:
            find(server.address + path).load()
        assert not refused.value.where
        refused.value.where = "rows:1"  # as its row does, whose place is not that of the next row
    assert server.asked.count(path) == 1 and time.time() - began < 10


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "10.1.2.3", "192.168.0.1",
    "172.16.0.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "[fe80::1]", "[fd00::1]", "[2002:7f00:1::]"])
def test_this_machine_and_private_networks_are_refused(host, server):
    with pytest.raises(BadRow, match="image URL does not answer: http.*not a public address"):
        find(f"http://{host}:{server.server_port}/a.png").load()
    assert not server.asked


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]])
def test_a_name_that_stands_for_a_private_address_is_refused(answers, server, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, *more: [(2, 1, 6, "", (one, port)) for one in answers])
    with pytest.raises(BadRow, match="pictures.example is 127.0.0.1, not a public address"):
        find(f"http://pictures.example:{server.server_port}/a.png").load()
    assert not server.asked


def test_a_name_that_is_resolved_to_another_address_the_second_time_is_refused(server, monkeypatch):
    answers = iter(["93.184.216.34", "127.0.0.1"])
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, *more: [(2, 1, 6, "", (next(answers), port))])
    with pytest.raises(BadRow, match="127.0.0.1, not a public address"):
        find(f"http://pictures.example:{server.server_port}/a.png").load()
    assert not server.asked


@pytest.mark.parametrize("url", ["https://a.org/a.png", "HTTP://a.org/a.png", "HttpS://a.org/a.png"])
def test_without_the_flag_a_url_is_a_bad_row(url):
    with pytest.raises(BadRow, match="pass --allow_urls"):
        from_name(url, Path("."), allow_urls=False)

"""Pictures on the web, for --allow_urls: each is downloaded once in a run, within bounds, and never from a private address.

In:  an http or https URL from a row, which strangers wrote.  Out: the file it was stored in; `BadRow` where that cannot be.

A row could name a machine behind the user's firewall, or this one. So the address that a name stands for must be a public one,
behind redirects too, and no proxy is asked, which would resolve names by itself.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate  # before Python 3.11 one of its own
from pathlib import Path
from typing import Any

from dataset.bad_rows import BadRow

MAX_DOWNLOAD = 50_000_000  # bytes
MAX_SECONDS = 30.0  # of a whole download, redirects included
CHUNK = 1 << 16  # bytes


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not this machine, a private network, or a reserved range."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return ip.is_global and not ip.is_multicast


def require_public(host: str, addresses: set[str]) -> None:
    """OSError where a name stands for an address that is not public."""
    if private := sorted(one for one in addresses if not is_public(one)):
        raise OSError(f"{host} is {private[0]}, not a public address")


class PublicHTTP(http.client.HTTPConnection):
    """A connection to a public address."""

    def connect(self) -> None:
        require_public(self.host, {str(found[4][0]) for found in socket.getaddrinfo(self.host, self.port)})
        super().connect()
        require_public(self.host, {self.sock.getpeername()[0]})  # the name may have been resolved to another one since


class PublicHTTPS(http.client.HTTPSConnection, PublicHTTP):
    """The same with TLS, which HTTPSConnection puts around what PublicHTTP connects."""


class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens URLs by these connections."""

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(PublicHTTP, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(PublicHTTPS, req)


def opener() -> urllib.request.OpenerDirector:
    """Opens http and https, and what they redirect to, by `Handler`; urllib's own would open files and ftp, too."""
    made = urllib.request.OpenerDirector()
    for handler in (Handler, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
                    urllib.request.HTTPDefaultErrorHandler):  # fmt: skip
        made.add_handler(handler())
    return made


def body(url: str, seconds: float) -> bytes:
    """The bytes behind a URL. OSError where they do not come, ValueError where they are too many."""
    end, data = time.monotonic() + seconds, bytearray()
    with opener().open(url, timeout=seconds) as response:
        while part := response.read1(CHUNK):
            data += part
            if len(data) > MAX_DOWNLOAD:
                raise ValueError(f"it is larger than {MAX_DOWNLOAD:,} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s")
    return bytes(data)


def download(url: str) -> bytes:
    """The bytes behind a URL; BadRow where it does not answer within MAX_SECONDS, is too large, or is not public."""
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(body(url, MAX_SECONDS))
        except (OSError, ValueError, http.client.HTTPException) as error:
            result.set_exception(error)

    # In a thread, because a server that sends a byte now and then holds up a read for ever, whatever its time-out is.
    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(MAX_SECONDS)
    except TooLate as error:
        raise BadRow(f"image URL does not answer: {url} (not within {MAX_SECONDS:g} s)", "download the images first") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadRow(f"image URL does not answer: {url} ({error})", "download the images first") from error


class Downloads:
    """The files of URLs, in a folder that goes when the process ends. A URL that failed is not asked again."""

    def __init__(self) -> None:
        self.known: dict[str, Future[Path]] = {}
        self.lock = threading.Lock()

    def __call__(self, url: str) -> Path:
        """The file of a URL. Another thread that wants it meanwhile waits for it."""
        with self.lock:
            if not self.known:
                self.folder = tempfile.TemporaryDirectory(prefix="pupil-downloads-", ignore_cleanup_errors=True)
            first = url not in self.known
            future = self.known.setdefault(url, Future())
        if first:
            file = Path(self.folder.name) / hashlib.sha256(url.encode(errors="backslashreplace")).hexdigest()
            try:
                file.write_bytes(download(url))
                future.set_result(file)
            except Exception as error:
                future.set_exception(error)
                raise
        try:
            return future.result()
        except BadRow as bad:
            raise BadRow(bad.reason, bad.remedy) from bad  # of its own, since each row puts its place into it


DOWNLOADS = Downloads()  # of this process

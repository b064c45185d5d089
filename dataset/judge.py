"""A judge: any model behind the OpenAI chat API, at any address, that rates answers.

In:  lists of chat messages.  Out: the judge's reply to each, or the reason why it failed (`Failure`).

    judge = Judge("gpt-4o")                                             the key is in OPENAI_API_KEY
    judge = Judge("qwen3", url="http://localhost:8000/v1")              a local server (vLLM, llama.cpp, Ollama) needs no key
    replies = judge.ask([[message("Is the sky green?")], [message("What is this?", [picture])]])

Replies are stored in a file with their tokens, so an interrupted run continues where it stopped; the next run sends failed
requests again, and those whose reply could not be read. A failure is a value of its own: it never becomes a score.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tqdm import tqdm

from dataset.formats.files import complete_lines
from dataset.images import Picture, png
from dataset.writing import append
from model.registry import Registry, UserError

CACHE = Path("out/judge.jsonl")
LONGEST_WORD = 16  # letters of a variable's name without an underscore between them; a key has more


class NoJudge(UserError):
    """There is no judge: neither an address nor a key is given."""


@dataclass(frozen=True)
class Reply:
    """What a judge replied, and the tokens that it read and wrote for it."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Failure:
    """A result that is missing, and why. It is counted separately, so a failed judgement never makes an answer right."""

    reason: str


def require_variable(name: str) -> None:
    """UserError for what is no name of an environment variable: perhaps the key itself, which the message does not repeat."""
    parts = name.split("_")
    if name not in os.environ and not (re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) and max(map(len, parts)) <= LONGEST_WORD):
        raise UserError("key= takes the name of an environment variable that holds the key, not the key: flags are printed and "
                        "stored. Put the key into a variable, export JUDGE_KEY=..., and give key=JUDGE_KEY")


def data_url(picture: Picture) -> str:
    """A picture as `data:image/png;base64,...`, which every server accepts and nobody has to host."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def message(text: str, pictures: Sequence[Picture] = (), role: str = "user") -> dict:
    """A chat message in OpenAI's form, its pictures before its text."""
    if not pictures:
        return {"role": role, "content": text}
    images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


class Judge:
    """Sends requests to one model, at temperature 0.

    model     its name on the server
    url       the server's address up to and including /v1; "": OpenAI's own
    key       the environment variable that holds the key; a local server may need none
    cache     a jsonl file of replies, by model and messages; None: replies are not stored
    workers   requests sent at the same time
    timeout   seconds to wait for one reply
    retries   how often a request is repeated after a time-out, a lost connection, or status 408, 409, 429 or 5xx: after as long
              as the server's Retry-After says, else after half a second, then twice as long each time up to 8 s, less a random
              quarter (the library openai does this)
    tokens    read and written for the replies so far, those of stored replies included; 0 from a server that does not count

    The constructor raises NoJudge without url and key, UserError without a model name or the library, or for a key in the place
    of a variable's name.
    """

    def __init__(self, model: str, url: str = "", key: str = "OPENAI_API_KEY", cache: Path | None = CACHE, workers: int = 8,
                 timeout: float = 120.0, retries: int = 6, max_tokens: int = 2048):  # fmt: skip
        require_variable(key)
        if not url and not os.environ.get(key):
            raise NoJudge(f"no judge: give judge=URL (any server with the OpenAI chat API, such as http://localhost:8000/v1), "
                          f"or put OpenAI's key into the environment variable {key}")  # fmt: skip
        if url and not url.startswith(("http://", "https://")):
            raise UserError(f"judge={url} is no address: give one such as http://localhost:8000/v1")
        if not model:
            raise UserError("a judge needs its name on the server: give model=NAME")
        if importlib.util.find_spec("openai") is None:  # checked now, and not after an hour of answers
            raise UserError("a judge needs the library openai: pip install openai")
        self.model, self.url, self.key, self.max_tokens = model, url, key, max_tokens
        self.workers, self.timeout, self.retries = workers, timeout, retries
        self.cache, self.lock = cache, threading.Lock()
        self.known = read_cache(cache) if cache else {}
        self.tokens = 0

    def fingerprint(self, messages: list[dict]) -> str:
        """A hash of model and messages: the key that a reply is stored under, wherever the model runs."""
        request = json.dumps([self.model, self.max_tokens, messages], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(request.encode()).hexdigest()

    def ask(self, questions: Sequence[list[dict]], read: Callable[[str], object] = str) -> list[str | Failure]:
        """The reply to each list of messages, in their order. Equal requests are sent once.

        read   what will be made of a reply; where it is a `Failure`, a stored reply does not count and the judge is asked anew
        """
        import openai

        # A server that needs no key gets a placeholder: the client library insists on one.
        client = openai.OpenAI(base_url=self.url or None, api_key=os.environ.get(self.key) or "none", timeout=self.timeout,
                               max_retries=self.retries)  # fmt: skip
        keys = [self.fingerprint(messages) for messages in questions]
        new = {key: messages for key, messages in zip(keys, questions)
               if key not in self.known or isinstance(read(self.known[key].text), Failure)}  # fmt: skip
        with client:
            sent = threaded(lambda key: self.reply(client, key, new[key]), list(new), self.workers)
            progress = tqdm(sent, total=len(new), desc=f"judge {self.model}", disable=not new, leave=False)
            replies = {**self.known, **dict(progress)}
        tokens = sum(reply.tokens for key in set(keys) if isinstance(reply := replies[key], Reply))
        self.tokens += tokens
        if new:
            failed = sum(isinstance(replies[key], Failure) for key in new)
            print(f"judge {self.model}: {len(new)} requests, {failed} failed; {tokens:,} tokens for all {len(set(keys))} replies")
        return [reply.text if isinstance(reply := replies[key], Reply) else reply for key in keys]

    def reply(self, client, key: str, messages: list[dict]) -> Reply | Failure:
        """One reply, stored under its key. It is read from the raw response, which may be the HTML page of a proxy."""
        import openai

        try:
            response = client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, temperature=0.0, max_tokens=self.max_tokens
            )
            body = json.loads(response.text)
            text, usage = body["choices"][0]["message"]["content"], body.get("usage") or {}
            tokens = int(usage.get("total_tokens") or 0)
        except openai.OpenAIError as error:
            return Failure(f"{type(error).__name__}: {error}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return Failure(f"the server's reply is not a chat completion ({type(error).__name__}: {error})")
        if not isinstance(text, str) or not text.strip():
            return Failure("an empty reply")
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to a file
        reply = Reply(text, tokens)
        with self.lock:
            self.store(key, reply)
        return reply

    def store(self, key: str, reply: Reply) -> None:
        """Put a reply into memory and, at once, onto the disk."""
        self.known[key] = reply
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            row = {"key": key, "model": self.model, "reply": reply.text, "tokens": reply.tokens}
            append(self.cache, json.dumps(row, ensure_ascii=False) + "\n")


def threaded(function: Callable[[str], Any], items: Sequence[str], workers: int) -> Iterator[tuple[str, Any]]:
    """(item, function(item)) as they come, from so many threads; what one of them raises is raised here.

    The threads are daemons: Ctrl-C ends the program at once, where a pool would wait for a server that hangs.
    """
    todo: SimpleQueue = SimpleQueue()
    done: SimpleQueue = SimpleQueue()
    for item in items:
        todo.put(item)

    def work() -> None:
        with contextlib.suppress(Empty):
            while True:
                item = todo.get_nowait()
                try:
                    done.put((item, function(item), None))
                except BaseException as error:
                    done.put((item, None, error))
                    raise

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    for _ in items:
        item, result, error = done.get()
        if error is not None:
            raise error
        yield item, result


def read_cache(file: Path) -> dict[str, Reply]:
    """The stored replies, by key; of several the last. A line that an interrupted run left incomplete is requested again."""
    rows = map(json.loads, complete_lines(file))
    return {row["key"]: Reply(row["reply"], row.get("tokens", 0)) for row in rows}


def make_judge(options: str) -> Judge:
    """The judge of `URL,model=NAME,key=VARIABLE`, with the options of the benchmarks; raises as `Judge` does."""
    judges = Registry("judge", __name__)
    judges.register("judge")(lambda judge="", model="", key="OPENAI_API_KEY": Judge(model, judge, key))
    return judges.make(f"judge:{options}")


def judge_or_none(task: str, judge: str, model: str, key: str) -> Judge | None:
    """The judge of a task's options. Without one, prints that answers are still saved, and how to judge them later."""
    try:
        return Judge(model, judge, key)
    except NoJudge as missing:
        print(f"{task}: answers will be saved and not judged; {missing}. Later: python -m dataset.studies.rescore "
              f"PREDICTIONS.jsonl {task}:judge=...,model=... with the same other options")
        return None


def failures(task: str, replies: Sequence[object], ids: Sequence[str] = ()) -> int:
    """The number of failures. Prints each reason with the questions (`ids`) that failed for it."""
    failed: dict[str, list[str]] = defaultdict(list)
    for id, reply in zip(ids or [str(k) for k in range(len(replies))], replies, strict=True):
        if isinstance(reply, Failure):
            failed[reply.reason].append(id)
    count = sum(map(len, failed.values()))
    if count:
        print(f"{task}: {count} of {len(replies)} judgements failed and are not scored; the same command asks only these again")
    for reason, of in failed.items():
        print(f"  {reason}: {', '.join(of)}")
    return count

"""Train the tokenizer: sentencepiece BPE, 6,400 pieces, on the world's words and a broad English and Chinese corpus.

In:  any number of text files (`--text`).  Out: `dataset/tokenizer.model`.
The shipped model was trained on Debian's packages wordnet-base and fortunes-zh and PyPI's hsk-sentences-audio:

    apt-get install wordnet-base fortunes-zh && pip download --no-deps hsk-sentences-audio && python -m zipfile -e hsk*.whl hsk
    python -m dataset.studies.train_tokenizer --text /usr/share/wordnet/data.* \\
        /usr/share/games/fortunes/{chinese,tang300,song100} \\
        hsk/hsk_sentences_audio/data/sentences.json

Only with these settings does Hugging Face's BPE give the same ids, so that the tokenizer can be exported exactly: no dummy
prefix, no normalisation, no whitespace clean-up, byte fallback. Digits are split, so that a number has a token per digit.
"""
from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from dataset.tasks.world import World
from dataset.tokenizer import CONTROLS, MODEL_FILE, TAGS
from dataset.world import drawings
from dataset.world.openmoji import categories, plural, with_article
from dataset.world.words import PLACES, mention_pattern

BOUNDARY = "\u241f"  # marks where no piece may cross; it is not part of the text


@dataclass
class Config:
    text: tuple[Path, ...]  # text files of the broad corpus
    out: Path = MODEL_FILE  # file of the model
    vocab_size: int = 6400  # pieces, including the 256 bytes and the control tokens
    most: int = 4_000_000  # maximum characters from each file


def world_lines(rng: random.Random) -> Iterator[str]:
    """Texts of the world: training rows of nano scenes, and every name at least a few times."""
    import easy_vqa

    for stage in ("pretrain", "sft"):
        for conversation in (World().train(stage)[i] for i in range(8000)):
            for message in conversation.messages:
                yield apart(message.text)
    for category in categories("nano") * 300:
        yield f"the {category.en} and two {plural(category.en)}"
    for category in categories("all"):
        yield from (f"{with_article(category.en)}, {plural(category.en)}, {category.en}", category.zh) * 5
    for _ in range(3000):
        picture = drawings.random_drawing(rng)
        yield from (picture.en, picture.zh)
    yield from easy_vqa.get_train_questions()[0][:5000]


def apart(line: str) -> str:
    """A line with BOUNDARY around Chinese names and places, so that no piece joins them to adjacent words."""
    places = "|".join(sorted(PLACES["zh"], key=len, reverse=True))
    pattern = rf"({mention_pattern('nano', 'zh')[0].pattern.strip('()')}|{places})"
    return re.sub(pattern, rf"{BOUNDARY}\1{BOUNDARY}", line)


def corpus_lines(file: Path, most: int) -> Iterator[str]:
    """The lines of a text file, without terminal colours, box drawing and dictionary codes. UnicodeDecodeError if not UTF-8."""
    text = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]+", "", file.read_text(encoding="utf-8"))[:4 * most]
    taken = 0
    for line in text.splitlines():
        if match := re.search(r'"(?:chinese|en)": "(.*)"', line):
            line = match[1]
        elif file.suffix == ".json":
            continue
        line = line.split(" | ")[-1].strip()  # WordNet: the gloss after the bar
        taken += len(line)
        if taken > most:
            return
        yield line


def main(config: Config) -> None:
    lines = list(world_lines(random.Random(0)))
    print(f"world: {sum(map(len, lines)):,} characters")
    for file in config.text:
        new = list(corpus_lines(file, config.most))
        print(f"{file}: {sum(map(len, new)):,} characters")
        lines += new
    model = io.BytesIO()  # in memory: a file's path would be stored in the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line]), model_writer=model,
        vocab_size=config.vocab_size, model_type="bpe", character_coverage=0.996, byte_fallback=True, split_digits=True,
        pretokenization_delimiter=BOUNDARY,
        add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False, max_sentence_length=100_000,
        required_chars="".join({character for category in categories("all") for character in category.en + category.zh} - {" "}),
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, eos_piece="<|end|>", pad_piece="<pad>",
        control_symbols=list(CONTROLS), user_defined_symbols=[*TAGS, "\n"], minloglevel=1)
    config.out.write_bytes(model.getvalue())
    print(f"wrote {config.out}")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))

"""Videos: which frames are taken, what a row, the chat and the page make of them; and the clips of the embedded world."""

import builtins
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.evaluation import Asked
from dataset.images import Picture, from_bytes, from_file
from dataset.mixture import load
from dataset.page.messages import messages
from dataset.tasks import dialogue
from dataset.tasks.world import picture
from dataset.tasks.world_clips import ASK, WorldClips
from dataset.terminal import Chat
from dataset.vision import video, video_files
from dataset.vision.video import frames, parts, timed, with_options
from dataset.world.clips import EVENTS, clip
from dataset.world.scenes import draw_scene
from model.registry import UserError
from tests import tiny
from tests.test_terminal import Echo

COLOURS = ["red", "lime", "blue", "black", "white", "red", "lime", "blue"]


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 24), colour)


def animated(path: Path, colours=COLOURS, duration=500, **options) -> Path:
    first, *rest = map(plain, colours)
    first.save(path, save_all=True, append_images=rest, duration=duration, **options)
    return path


def filmed(path: Path, images: list[Image.Image], rate: Fraction | int = 2) -> Path:
    """An mp4 without loss."""
    av = pytest.importorskip("av", reason="PyAV writes and reads the mp4: pip install av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0", "bf": "2"})
        (stream.width, stream.height), stream.pix_fmt = images[0].size, "rgb24"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def film(path: Path) -> Path:
    """A file of eight colours, half a second each, in the format of its suffix."""
    still = [plain(colour) for colour in COLOURS]
    return filmed(path, still) if path.suffix in (".mp4", ".mkv") else animated(path, lossless=True)


def colours(taken: list[tuple[float, Picture]]) -> list[tuple]:
    return [picture.load().getpixel((3, 3)) for _, picture in taken]


def rgb(*names: str) -> list[tuple]:
    return [plain(name).getpixel((0, 0)) for name in names]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.mkv"])
def test_frames_are_uniform_in_time_with_the_first_and_the_last(tmp_path, name):
    taken = frames(from_file(film(tmp_path / name)), 8)
    assert [round(seconds, 2) for seconds, _ in taken] == [0.5 * k for k in range(8)] and colours(taken) == rgb(*COLOURS)
    assert len({picture.key for _, picture in taken}) == 8  # in a cache each is itself
    two, many = frames(from_file(tmp_path / name), 2), frames(from_file(tmp_path / name), 20)
    assert colours(two) == rgb("red", "blue") and len(many) == 8


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_by_scene_the_frames_after_the_largest_changes_are_taken(tmp_path, name):
    shades = [shade for scene in ((0, 0), (200, 0), (0, 255)) for shade in [(4 * k, *scene) for k in range(10)]]
    if name == "a.mp4":
        filmed(tmp_path / name, [plain(shade) for shade in shades], rate=10)
    else:
        animated(tmp_path / name, shades, duration=100)
    taken = frames(from_file(tmp_path / name), 3, "scene")
    assert [round(seconds, 2) for seconds, _ in taken] == [0, 1, 2] and len(colours(taken)) == 3


def test_a_file_in_a_row_is_read_as_one_on_the_disk(tmp_path):
    file = animated(tmp_path / "a.gif")
    assert colours(frames(from_bytes(file.read_bytes()), 4)) == colours(frames(from_file(file), 4))


@pytest.mark.parametrize(("text", "meaning"), [
    ("a.mp4", ("a.mp4", {})), ("a.mp4:frames=8", ("a.mp4", {"count": 8})), ("C:\\a.mp4:by=scene", ("C:\\a.mp4", {"by": "scene"})),
    ("a:b.mp4:frames=3,by=scene", ("a:b.mp4", {"count": 3, "by": "scene"})), ("a.mp4:b=3", ("a.mp4:b=3", {})),
])  # fmt: skip
def test_options_stand_behind_the_name(text, meaning):
    assert with_options(text) == meaning


@pytest.mark.parametrize("by", ["time", "scene"])
def test_a_frame_that_leads_its_reader_into_an_error_is_a_bad_row(by, tmp_path, monkeypatch):
    def palette_is_missing(image):
        raise AssertionError

    file = film(tmp_path / "a.gif")
    monkeypatch.setattr(video_files, "to_rgb", palette_is_missing)
    with pytest.raises(BadRow, match=r"a frame of the video cannot be read \(AssertionError\)"):
        colours(frames(from_file(file), by=by))


def test_a_video_without_frames_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "changes", lambda source, count: [])
    with pytest.raises(BadRow, match="the video has no frame"):
        frames(from_file(film(tmp_path / "a.webp")), by="scene")


BROKEN = {"cut.gif": lambda data: data[:40], "text.gif": lambda data: b"not a film", "empty.mp4": lambda data: b"",
          "list.mp4": lambda data: b"#EXTM3U\nfile:///etc/hostname"}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_a_bad_row_with_its_reason(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name](animated(tmp_path / "a.gif").read_bytes()))
    with pytest.raises(BadRow, match=name.replace(".", r"\.")):
        parts(tmp_path / name)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_damaged_mp4_is_a_bad_row_with_its_reason(tmp_path, share):
    data = film(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[:int(share * len(data))])
    with pytest.raises(BadRow, match=r"video cannot be read: .*cut\.mp4"):
        parts(tmp_path / "cut.mp4")


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_what_would_take_too_long_to_decode_is_refused(tmp_path, name, monkeypatch):
    film(tmp_path / name)
    monkeypatch.setattr(video_files, "MAX_DECODED", 32 * 24 - 1)
    with pytest.raises(BadRow, match="pixels"):
        parts(tmp_path / name)


@pytest.mark.parametrize("options", ["frames=0", "frames=65", "by=size"])
def test_a_wrong_option_names_the_right_ones(tmp_path, options):
    with pytest.raises(BadRow, match="1 to 64 frames, by=time or by=scene"):
        parts(f"{animated(tmp_path / 'a.gif')}:{options}")


def test_without_pyav_a_video_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    imported = builtins.__import__

    def without_av(name, *arguments, **options):
        if name == "av":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match="pip install av"):
        parts(tmp_path / "a.mp4")


# ---------------------------------------------------------------- rows, the chat, the page

TALK = [{"from": "human", "value": "Look:\n<video>\nWhat?"}, {"from": "gpt", "value": "Red, then blue."}]
FRONT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red, then blue."}]
TWO = ["0.0 s: ", "a", "3.5 s: ", "a"]
ROWS = [
    ({"video": "a.gif:frames=2", "conversations": TALK}, ["Look:", *TWO, "What?"]),
    ({"videos": ["a.gif:frames=2"], "conversations": FRONT}, [*TWO, "What?"]),
    ({"videos": ["a.gif:frames=2", "b.gif:frames=1"], "question": "<video>\nthen\n<video>", "answer": "Yes."},
     [*TWO, "then", "0.0 s: ", "b"]),
    ({"video": "a.gif:frames=2", "image": "still.png", "question": "<image>or<video>", "answer": "Yes."}, ["still", "or", *TWO]),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.gif:frames=2"}, {"type": "text", "text": "What?"}]},
                   {"role": "assistant", "content": "Red."}]}, [*TWO, "What?"]),
    ({"videos": ["a.gif:frames=2"], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "video"}]},
        {"role": "assistant", "content": "Red."}]}, ["What?", *TWO]),
    ({"image": "a.gif", "question": "What?", "answer": "Red."}, ["a", "What?"]),  # its first frame, as before
]  # fmt: skip


def row(folder: Path, row: dict):
    animated(folder / "a.gif")
    animated(folder / "b.gif", ["blue", "red"])
    plain("white").save(folder / "still.png")
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return load(folder / "rows.jsonl")


def shown(content) -> list[str]:
    return [Path(part.key.split(":")[0]).stem if isinstance(part, Picture) else part for part in content]


@pytest.mark.parametrize(("written", "read"), ROWS)
def test_a_row_shows_the_frames_of_its_video_behind_their_times(tmp_path, written, read):
    source = row(tmp_path, written)
    assert shown(source[0].messages[0].parts) == read
    list(source.walk())
    assert len(source.pictures(0)) == len(source[0].pictures)  # also where rows are walked through for their pictures


@pytest.mark.parametrize(("written", "reason"), [
    ({"video": "none.mp4", "conversations": TALK}, "missing"), ({"conversations": TALK}, "1 <video> placeholders but 0 videos"),
    ({"video": "../a.mp4", "conversations": TALK}, "leaves the image folder"), ({"video": 7, "conversations": TALK}, "is a int"),
    ({"videos": ["a.gif", "a.gif"], "conversations": TALK}, "1 <video> placeholders but 2 videos"),
])  # fmt: skip
def test_a_row_whose_video_cannot_be_used_is_a_bad_row(tmp_path, written, reason):
    with pytest.raises(BadRow, match=reason):
        row(tmp_path, written)[0]


def test_the_chat_sends_the_frames_of_a_video(tmp_path, capsys):
    talk = Chat(Echo())
    talk.obey(f"/video {animated(tmp_path / 'a.gif')}:frames=2")
    assert "2 pictures for the next message" in capsys.readouterr().out
    talk.obey("What happens?")
    assert talk.dialogue.sent == [["0.0 s: ", "a.gif", "3.5 s: ", "a.gif", "What happens?"]]


def test_the_page_takes_animations_and_stills(tmp_path):
    plain("red").save(tmp_path / "still.png")
    files = [animated(tmp_path / "a.gif"), tmp_path / "still.png"]
    history = [{"role": "user", "content": [{"type": "file", "file": {"path": str(file)}}]} for file in files]
    (message,) = messages(history)
    assert shown(message.parts)[::2] == ["0.0 s: ", "1.0 s: ", "2.5 s: ", "3.5 s: ", "still"]


# ---------------------------------------------------------------- clips of the world


def test_no_single_frame_tells_a_direction():
    moved = [clip("train", i) for i in range(1500) if clip("train", i).event == "moves"]
    for way, back in (((0, 1), (0, -1)), ((1, 0), (-1, 0))):
        there, again = (sum(seen.way == one for seen in moved) for one in (way, back))
        assert abs(there - again) < 4 * (there + again) ** 0.5
    assert {clip("train", i).event for i in range(100)} == set(EVENTS)


def test_the_answers_say_what_the_frames_show():
    for i in range(200):
        seen = clip("test", i)
        images = [np.asarray(draw_scene(scene), int) for _, scene in seen.frames]
        changed = [(before != after).any(-1) for before, after in zip(images, images[1:])]
        assert 3 <= len(images) <= 5 and any(change.any() for change in changed) == (seen.event != "nothing")
        where = np.argwhere(np.any(changed, 0))
        if len(where):  # only cells between the first and the last place of the thing change
            cells = {tuple(cell) for cell in where // 32}
            places = {divmod(seen.thing.cell, 3), divmod(seen.end, 3)}
            assert places <= cells and len(cells) <= 3


def test_clips_are_split_and_controlled_by_one_frame():
    task = WorldClips(rows=50, clips=30)
    rows = [task.train("sft")[i] for i in range(50)]
    examples = task.examples("test", 40)
    assert task.train("pretrain") is None and {example.kind for example in examples} == set(ASK) - {"follow"}
    trained, asked = ({picture.key for one in of for picture in one.pictures} for of in (rows, [e.prompt for e in examples]))
    assert not trained & asked
    controls = Asked.of("world_clips", task, "test", 40, controls=1).controls
    assert set(controls) == {"blank", "shuffled", "single_frame"}
    for example, single in zip(examples, controls["single_frame"], strict=True):
        assert len(single.prompt.pictures) == 1 and single.prompt.pictures[0] in example.prompt.pictures
        assert single.answer == example.answer and single.question == example.question


@pytest.mark.parametrize("index", [3, 5, 8])
def test_a_film_of_a_clip_is_asked_about_as_its_pictures_are(tmp_path, index):
    seen = clip("test", index)
    drawn = [(seconds, picture(scene)) for seconds, scene in seen.frames]
    images = [shown.load() for _, shown in drawn]
    rate = 1 / Fraction(seen.frames[1][0]).limit_denominator(10)
    taken = frames(from_file(filmed(tmp_path / "clip.mp4", images, rate)), len(images))
    asked = [tiny.processor().prompt(dialogue("", timed(of), [("What happens?", "")])) for of in (taken, drawn)]
    assert asked[0].input_ids == asked[1].input_ids
    for (seconds, frame), (expected, image) in zip(taken, zip([seconds for seconds, _ in drawn], images), strict=True):
        assert seconds == pytest.approx(expected) and np.array_equal(np.asarray(frame.load()), np.asarray(image))

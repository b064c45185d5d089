"""Stage 3 from pairs to a checkpoint: the self-tests of DPO, the bugs that others have had, and the script as people run it.

The eight self-tests: step 0 is exactly ln 2, swapping flips the margin (test_dpo_losses.py), padding and batch size change
nothing, LoRA starts as the base, a stored reference is the live one, six pairs overfit, a shuffled picture lowers accuracy,
iterations renew the reference.
"""

import dataclasses
import itertools
import json
import math
import re
import runpy
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.chat import Conversation, Message, Pair, Preference
from dataset.images import from_image
from dataset.preferences import load_preferences
from dataset.processor import Processor
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import checkpoint, lora
from model.best import BestCheckpoint, truth_and_cover
from model.cli import from_mapping
from model.dpo import reference
from model.dpo.losses import Pairs, rewards
from model.dpo.reference import answer_logps
from model.generate import Answer, generate
from model.losses import score, sum_by_document
from model.recipe import Mode, set_trainable
from model.reference import policy_fingerprint, reference_model
from model.registry import PREFERENCE_LOSSES, UserError
from model.runtime import Run
from model.vlm import VLM
from tests import tiny
from tests.conftest import ROOT
from tests.miniatures import lines
from tests.test_preferences import GOOD, OFFICIAL, WRONG, write_official

SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "3-rl_vlm.py")))
TOKENIZER = SentencePieceTokenizer()
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
ORDERS = list(itertools.permutations(COLOURS, 2))  # (right, wrong): every colour is as often one as the other


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("start")
    checkpoint.save(folder, tiny.nano(), MODEL_FILE)
    return folder


def about_colours(count: int) -> list[Preference]:
    """Pairs of which the picture alone says what is right: each answer is as often chosen as rejected, in the same words."""
    rows = []
    for k in range(count):
        right, wrong = ORDERS[k % len(ORDERS)]
        shown = from_image(Image.new("RGB", (32, 32), COLOURS[right]))
        prompt = Conversation(f"row{k}", (Message("user", (shown, "What colour is it?")),))
        rows.append(Preference(f"row{k}", prompt, f"It is {right}.", f"It is {wrong}."))
    return rows


def processor(model: VLM) -> Processor:
    return Processor.of(model, TOKENIZER, tiny.Ranks())


def rendered(rows: list[Preference], model: VLM) -> list[Pair]:
    return [processor(model).pair(row, 1000) for row in rows]


def batch_of(rows: list[Preference], model: VLM) -> dict:
    return processor(model).pair_batch(rendered(rows, model))


def train(model: VLM, llm: str, connector: str = "freeze") -> None:
    for name, mode in (("llm", llm), ("connector", connector), ("encoder", "freeze")):
        set_trainable(model.parts[name], Mode.parse(mode))


def a_run(tmp_path: Path, dtype: str = "fp32") -> Run:
    return Run.inference(tmp_path, "cpu", dtype, 0)


def logps_now(model: VLM, batch: dict) -> torch.Tensor:
    """(2N,) in fp32."""
    return answer_logps(model, a_run(Path("unused")), batch)


def as_pairs(logps: torch.Tensor, lengths: torch.Tensor, of_reference: torch.Tensor) -> Pairs:
    """Chosen and rejected answers by turns."""
    return Pairs(logps[0::2], logps[1::2], of_reference[0::2], of_reference[1::2], lengths[0::2], lengths[1::2])


def reward_accuracy(model: VLM, batch: dict, of_reference: torch.Tensor) -> float:
    """How often the chosen answer has the higher reward under the model as it is."""
    logps = logps_now(model, batch)
    chosen, rejected = rewards(as_pairs(logps, torch.ones_like(logps), of_reference), 0.1)
    return (chosen > rejected).float().mean().item()


# ---------------------------------------------------------------- log-probabilities of answers


def test_the_sum_is_that_of_the_answer_and_its_end_one_token_at_a_time():
    """Against the plainest way: the prompt and the answer through the model, and log-softmax at each place."""
    model, rows = tiny.nano().eval(), about_colours(2)
    sums = logps_now(model, batch_of(rows, model))
    answers = [answer for row in rows for answer in (row.chosen, row.rejected)]
    documents = [document for pair in rendered(rows, model) for document in (pair.chosen, pair.rejected)]
    for document, answer, found in zip(documents, answers, sums.tolist(), strict=True):
        batch = processor(model).batch([document])
        with torch.no_grad():
            logps = model(batch, batch["document_ids"] >= 0).double().log_softmax(-1)  # (T, V)
        expected = sum(logps[t - 1, document.input_ids[t]].item() for t in range(len(document)) if document.learn[t])
        assert found == pytest.approx(expected, abs=1e-3)
        assert sum(document.learn) == len(TOKENIZER.encode(answer)) + 1


def test_what_was_sampled_is_scored_as_it_was_when_it_was_sampled():
    model = tiny.nano().eval()
    pair = rendered(about_colours(1), model)[0]
    length = pair.chosen.learn.index(True)
    prompt = dataclasses.replace(pair.chosen, input_ids=pair.chosen.input_ids[:length], learn=pair.chosen.learn[:length])
    (answer,) = generate(model, processor(model).padded([prompt]), max_new_tokens=6, stop_ids={TOKENIZER.id("<|end|>")},
                         temperature=1.0, generator=torch.Generator().manual_seed(1))  # fmt: skip
    tokens = answer.tokens + [TOKENIZER.id("<|end|>")] * answer.stopped
    document = dataclasses.replace(prompt, input_ids=prompt.input_ids + tokens, learn=prompt.learn + [True] * len(tokens))
    sums = logps_now(model, processor(model).pair_batch([Pair(document, document)]))
    assert sums.tolist() == pytest.approx([sum(answer.logps)] * 2, abs=1e-4)


def test_padding_and_batch_size_leave_log_probabilities_unchanged():
    model = tiny.nano().eval()
    pairs = rendered(about_colours(6), model)
    together = logps_now(model, processor(model).pair_batch(pairs))
    alone = torch.cat([logps_now(model, processor(model).pair_batch([pair])) for pair in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    padded = processor(model).padded([document for pair in pairs for document in (pair.chosen, pair.rejected)])
    torch.testing.assert_close(logps_now(model, padded), together, atol=1e-4, rtol=0)


def test_the_reference_is_taken_in_evaluation_mode_without_gradient_and_leaves_the_mode_as_it_was():
    """`the reference in train mode or another dtype`."""
    model = tiny.nano().train()
    model.llm.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output + 100 * module.training)
    batch = batch_of(about_colours(2), model)
    sums = logps_now(model, batch)
    assert model.training and not sums.requires_grad
    torch.testing.assert_close(sums, logps_now(model.eval(), batch))


@pytest.mark.parametrize(("mode", "dtype"), [("full", "fp32"), ("full", "bf16"), ("lora:4", "fp32"), ("lora:4", "bf16")])
def test_the_loss_at_step_zero_is_exactly_ln_2(tmp_path, mode, dtype):
    """Bit for bit: policy and reference go through one function in one precision, the policy in train mode."""
    model = tiny.nano().train()
    train(model, mode)
    batch, run = batch_of(about_colours(4), model), a_run(tmp_path, dtype)
    of_reference = precomputed(model, [batch], run)(batch)
    with run.autocast():
        scores = score(model, batch)
    pairs = as_pairs(*sum_by_document(scores.logps, scores.owner, 8), of_reference)
    dpo = PREFERENCE_LOSSES.make("dpo")
    assert torch.equal(dpo(pairs), torch.full((4,), math.log(2)))
    assert not dpo.log(pairs)["margin"].any() and not dpo.log(pairs)["reward_accuracy"].any()


class Batches(list):
    """Batches that are there already, in the place of a stream of them."""

    batch = list.__getitem__


def precomputed(model: VLM, batches: list[dict], run: Run, resume: bool = False):
    """What dpo compares these batches with."""
    run.config = dataclasses.replace(run.config, resume=resume)
    return reference.precomputed(Batches(batches), len(batches), run, model, "made", None)


def test_a_stored_reference_is_the_live_one_and_stays_where_the_policy_leaves(tmp_path):
    """`the reference re-copied each step (loss stays ln 2)`: with the policy's own weights the margin could never move."""
    model, run = tiny.nano(), a_run(tmp_path)
    batches = [batch_of(about_colours(6)[k : k + 2], model) for k in (0, 2, 4)]
    now = [logps_now(model, batch) for batch in batches]
    copy = reference.live(reference_model(model), run)  # of pairs that are sampled in each step
    stored = precomputed(model, batches, run)
    with torch.no_grad():
        model.connector.proj.weight.add_(0.5)
    from_file = precomputed(model, batches, run, resume=True)  # read back, not computed with the weights of now
    for batch, expected in zip(batches, now):
        assert all(torch.equal(of(batch), expected) for of in (copy, stored, from_file))
    assert not torch.allclose(logps_now(model, batches[0]), now[0])


def test_with_lora_the_reference_is_the_model_before_and_needs_neither_a_second_model_nor_a_file(tmp_path):
    model = tiny.nano()
    batch = batch_of(about_colours(3), model)
    before = logps_now(model, batch)
    train(model, "lora:4")
    of_pairs = precomputed(model, [batch], a_run(tmp_path))
    for part in lora.adapters(model):
        torch.nn.init.normal_(part.lora_b)
    assert torch.equal(of_pairs(batch), before)
    assert not torch.allclose(logps_now(model, batch), before)
    with reference_model(model)() as the_reference:
        assert the_reference is model
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="the reference is the model without them: leave out --reference"):
        reference.precomputed(Batches([batch]), 1, a_run(tmp_path), model, "made", tmp_path / "reference.npz")


def test_adapters_switched_off_are_not_the_reference_where_the_connector_is_trained_too(tmp_path):
    model = tiny.nano()
    batch = batch_of(about_colours(3), model)
    before = logps_now(model, batch)
    train(model, "lora:4", connector="full")
    of_pairs = precomputed(model, [batch], a_run(tmp_path))
    with torch.no_grad():
        model.connector.proj.weight.add_(0.5)
    assert torch.equal(of_pairs(batch), before)
    with reference_model(model)() as the_reference:
        assert the_reference is not model


def test_a_loss_without_a_reference_compares_with_nothing():
    model = tiny.nano()
    assert torch.equal(reference.none(batch_of(about_colours(3), model)), torch.zeros(6))


# ---------------------------------------------------------------- learning


def flags(kind: str = "DPO", **given):
    """The script's dataclass with these flags, by their names on the command line."""
    return from_mapping(getattr(SCRIPT, kind)(), {"device": "cpu", "bench": "", "log_every": 1, "val_share": 0, **given}, "test")


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Runs inside this process draw none: each takes a second, and test_runtime.py tests them."""
    monkeypatch.setattr("model.runtime.draw_curves", lambda history, file: None)


def write_pairs(folder: Path, rows: list[Preference]) -> Path:
    """Pipeline jsonl, with the pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for k, row in enumerate(rows):
        row.pictures[0].load().save(folder / f"{k}.png")
        found.append({"image_path": f"{k}.png", "question": row.prompt.messages[0].text, "chosen": row.chosen,
                      "rejected": row.rejected})  # fmt: skip
    return lines(folder / "pairs.jsonl", found)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def overfit(start, tmp_path_factory):
    """`overfit("dpo:beta=0.1")`: the folder of a run of the script on six pairs, all of them in each of its 12 steps."""
    folder, done = tmp_path_factory.mktemp("overfit"), {}
    data = write_pairs(folder / "data", about_colours(len(ORDERS)))

    def overfit(algo: str, **more) -> Path:
        name = f"{algo}{sorted(more.items())}"
        if name not in done:
            done[name] = folder / str(len(done))
            SCRIPT.dpo_iterations(flags(algo=algo, init=start, data=[str(data)], out=done[name], batch_size=len(ORDERS), lr=3e-3,
                                        warmup=1, max_steps=12, feature_cache=folder / "features", **more))  # fmt: skip
        return done[name]

    return overfit


@pytest.mark.parametrize("algo", PREFERENCE_LOSSES.names())
def test_every_loss_overfits_six_pairs_to_accuracy_one(algo, overfit, start):
    """The preference loss alone, without the SFT term; sft_chosen, the control, has nothing else."""
    weight = float(algo == "sft_chosen")
    folder = overfit(algo, sft_weight=weight)
    *rows, end = log_of(folder)
    assert [row["step"] for row in rows] == list(range(12)) and end["step"] == 12
    assert rows[-1]["reward_accuracy"] == 1 and rows[-1]["margin"] > 0 and rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["preference_loss"] + weight * row["sft_loss"], rel=1e-5)
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-4)
        assert row["sft_loss"] == pytest.approx(-row["logp_chosen"])
        assert (row["preference_loss"] == 0) == (algo == "sft_chosen") and row["lr"] > 0
    unmoved = {"dpo": math.log(2), "robust": math.log(2), "hinge": 1.0, "apo_zero": 1.0, "bco": 2 * math.log(2), "ipo": 25.0,
               "mpo": 1.2 * math.log(2), "sft_chosen": 0.0}  # fmt: skip
    if algo in unmoved:
        assert rows[0]["preference_loss"] == pytest.approx(unmoved[algo], rel=1e-5)
        assert rows[0]["margin"] == rows[0]["reward_chosen"] == rows[0]["reward_accuracy"] == 0
    assert (folder / "reference.npz").is_file() == (algo != "simpo")
    moved = changed(start, folder)
    assert moved and all(name.startswith("llm.") for name in moved)


def changed(before: Path, after: Path) -> set[str]:
    """The tensors that differ between two checkpoints of the same model."""
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


def test_lora_overfits_six_pairs_too_and_stores_no_reference(overfit, start):
    folder = overfit("dpo", sft_weight=0.0, train={"llm": "lora:8"})
    rows = log_of(folder)
    assert rows[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6) and rows[11]["reward_accuracy"] == 1
    assert not (folder / "reference.npz").exists() and changed(start, folder)


def test_what_is_compared_is_the_stored_reference_of_each_answer(overfit, start):
    """Chosen and rejected answers by turns: at step 0 the log's means are those of the file, each side by its own tokens."""
    folder = overfit("dpo", sft_weight=0.0)
    pairs = {pair.key: pair for pair in rendered([*load_preferences(folder.parent / "data")], checkpoint.load(start))}
    with np.load(folder / "reference.npz") as stored:
        logps = dict(zip(stored["keys"].tolist(), stored["logps"].tolist(), strict=True))
    assert logps.keys() == pairs.keys()
    for side, name in enumerate(("chosen", "rejected")):
        lengths = {key: sum(getattr(pair, name).learn) for key, pair in pairs.items()}
        row = log_of(folder)[0]
        assert row[f"length_{name}"] == pytest.approx(sum(lengths.values()) / 6)
        assert row[f"logp_{name}"] == pytest.approx(sum(logps[key][side] / lengths[key] for key in pairs) / 6, rel=1e-5)


def test_a_shuffled_picture_lowers_reward_accuracy(overfit, start):
    """Each answer is chosen as often as it is rejected, so words alone decide nothing."""
    rows = about_colours(len(ORDERS))
    pictures = {row.chosen: row.pictures[0] for row in rows}
    shuffled = [dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, messages=(
        Message("user", (pictures[row.rejected], "What colour is it?")),))) for row in rows]  # fmt: skip
    before, after = (checkpoint.load(folder) for folder in (start, overfit("dpo", sft_weight=0.0)))
    accuracies = []
    for found in (rows, shuffled):
        batch = batch_of(found, before)
        accuracies.append(reward_accuracy(after, batch, logps_now(before, batch)))
    assert accuracies[0] == 1.0 and accuracies[1] <= 0.5


def test_the_sft_term_keeps_the_chosen_answer_likely(overfit):
    """DPO alone is content to lower both answers as long as the rejected one falls faster."""
    ends = {weight: log_of(overfit("dpo", sft_weight=weight))[11] for weight in (0.0, 1.0)}
    assert all(end["reward_accuracy"] == 1 for end in ends.values())
    assert ends[1.0]["logp_chosen"] > ends[0.0]["logp_chosen"] + 1


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """Pairs about colours, of different lengths."""
    rows = about_colours(24)
    for k, row in enumerate(rows):
        question = Message("user", (row.pictures[0], "What colour is it?" * (1 + k % 3)))
        rows[k] = dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, messages=(question,)),
                                      rejected=row.rejected + " And a dog." * (k % 4))  # fmt: skip
    return write_pairs(tmp_path_factory.mktemp("pairs"), rows)


def arguments(start: Path, pairs: Path, *more) -> tuple:
    return ("--algo", "dpo", "--init", start, "--data", pairs, "--bench", "", "--device", "cpu", "--batch_size", 2,
            "--val_share", 0,
            "--max_steps", 5, "--epochs", 1, "--save_every", 2, "--log_every", 1, "--warmup", 2, "--lr", 1e-3, *more)  # fmt: skip


LOGGED = {"step", "seconds", "loss", "preference_loss", "sft_loss", "reward_chosen", "reward_rejected", "margin",
          "reward_accuracy", "logp_chosen", "logp_rejected", "length_chosen", "length_rejected", "lr", "gradient_norm",
          "tokens_per_second"}  # fmt: skip
TIMES = {"seconds", "tokens_per_second"}


def timeless(folder: Path) -> list[dict]:
    """The log without what no two runs share."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in log_of(folder)]


@pytest.fixture(scope="session")
def one(run_script, start, pairs_file, tmp_path_factory) -> Path:
    """One process that accumulates two micro-batches a step; mpo, whose loss has a memory (the shift of bco)."""
    folder = tmp_path_factory.mktemp("one_dpo")
    run_script("3-rl_vlm.py", *arguments(start, pairs_file, "--accumulate", 2, "--algo", "mpo"), cwd=folder)
    return folder / "out" / "dpo"


def test_a_run_writes_a_checkpoint_a_log_and_the_reference(one, start):
    rows = log_of(one)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and all(set(row) == LOGGED for row in rows[:5])
    assert rows[0]["preference_loss"] == pytest.approx(1.2 * math.log(2), rel=1e-5)  # ln 2 of dpo, twice of bco
    assert rows[0]["margin"] == rows[0]["reward_chosen"] == 0 != rows[4]["margin"]
    assert rows[4]["loss"] < rows[0]["loss"]
    assert {"model.safetensors", "config.json", "tokenizer.model", "reference.npz", "curves.png"} <= {
        path.name for path in one.iterdir()}  # fmt: skip
    assert changed(start, one) == {name for name in load_file(start / "model.safetensors") if name.startswith("llm.")}
    assert checkpoint.load(one)


@pytest.mark.parametrize("more", [(), ("--accumulate", 2, "--context_parallel", 2)])
def test_two_processes_equal_one_that_accumulates(more, one, start, pairs_file, run_ranks, tmp_path):
    """With pairs of their own, or with halves of each."""
    run_ranks("3-rl_vlm.py", *arguments(start, pairs_file, "--algo", "mpo", *more), cwd=tmp_path)
    two = tmp_path / "out" / "dpo"
    for a, b in zip(log_of(one)[:5], log_of(two)[:5], strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5) for name in LOGGED - TIMES)
    begun, ends = load_file(start / "model.safetensors"), [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in begun.items():
        assert (ends[0][name] - ends[1][name]).norm() <= 1e-3 * (ends[0][name] - weight).norm(), name


@pytest.mark.parametrize("mode", ["full", "lora:4"])
def test_a_killed_run_goes_on_to_exactly_the_same_weights(mode, one, start, pairs_file, run_script, tmp_path):
    """`mpo`: with the shift that was saved; `lora`: with the adapters, not with their sum."""
    given = arguments(start, pairs_file, "--accumulate", 2, "--algo", "mpo", "--train.llm", mode)
    whole = one
    if mode != "full":
        whole = tmp_path / "whole"
        run_script("3-rl_vlm.py", *given, "--out", whole, cwd=tmp_path)
    run_script("3-rl_vlm.py", *given, cwd=tmp_path, die_at_step=3, expect=-signal.SIGKILL)
    run_script("3-rl_vlm.py", *given, "--resume", cwd=tmp_path)
    resumed = tmp_path / "out" / "dpo"
    assert changed(whole, resumed) == set() and timeless(whole) == timeless(resumed)
    assert changed(start, resumed)  # of the same names: merged, an ordinary checkpoint
    saved = load_file(next((resumed / "resume").iterdir()) / "model.safetensors")
    assert any("lora_a" in name for name in saved) == (mode != "full")


def test_a_stale_reference_is_refused_and_so_is_going_on_from_another_start(one, pairs_file, tmp_path):
    """`a stale reference cache silently reused`."""
    out, moved = shutil.copytree(one, tmp_path / "dpo"), tiny.nano()
    with torch.no_grad():
        moved.connector.proj.weight.add_(0.1)
    checkpoint.save(tmp_path / "moved", moved, MODEL_FILE)
    given = dict(algo="mpo", init=tmp_path / "moved", data=[str(pairs_file)], batch_size=2, accumulate=2, epochs=1,
                 feature_cache=tmp_path / "features")  # fmt: skip
    with pytest.raises(UserError, match="was started from other weights than those of --init now.*start again without --resume"):
        SCRIPT.dpo_iterations(flags(**given, out=out, max_steps=7, resume=True))
    with pytest.raises(UserError, match="reference.npz is stale.*Delete it"):
        SCRIPT.dpo_iterations(flags(**given, out=tmp_path / "other", reference=out / "reference.npz"))
    stored = (out / "reference.npz").read_bytes()
    SCRIPT.dpo_iterations(flags(**given, out=out, max_steps=1))  # a fresh start makes its own
    assert (out / "reference.npz").read_bytes() != stored
    assert log_of(out)[0]["preference_loss"] == pytest.approx(1.2 * math.log(2), rel=1e-5)


def test_a_reference_file_of_ones_own_holds_all_pairs_and_serves_other_runs(start, pairs_file, tmp_path):
    given = dict(init=start, data=[str(pairs_file)], batch_size=4, reference=tmp_path / "shared.npz",
                 feature_cache=tmp_path / "features")  # fmt: skip
    for out, algo in (("a", "dpo"), ("b", "ipo")):
        SCRIPT.dpo_iterations(flags(**given, algo=algo, out=tmp_path / out, max_steps=1))
        assert not (tmp_path / out / "reference.npz").exists()
        if out == "a":
            written = (tmp_path / "shared.npz").stat().st_mtime_ns
    assert (tmp_path / "shared.npz").stat().st_mtime_ns == written
    with np.load(tmp_path / "shared.npz") as stored:
        assert len(stored["keys"]) == 24


def test_every_official_format_trains_and_a_bad_row_is_named(start, tmp_path, capsys):
    official = write_official(tmp_path)
    rows = [json.loads(line) for line in (official / "pipeline.jsonl").read_text().splitlines()]
    bad = lines(official / "bad.jsonl", [{**rows[0], "rejected": rows[0]["chosen"]}])
    files = [str(file) for file in (*(official / name for name in OFFICIAL), bad)]
    SCRIPT.dpo_iterations(flags(init=start, data=files, batch_size=7, epochs=1, warmup=2, lr=1e-3, max_bad=0.1,
                                out=tmp_path / "out", feature_cache=tmp_path / "features"))  # fmt: skip
    printed = capsys.readouterr()
    assert "21 pairs, 3 steps of 7 on 1 x cpu" in printed.out  # an epoch: every row of every file
    rows = log_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[2]["margin"] > 0
    assert [rows[0][f"length_{side}"] for side in ("chosen", "rejected")] == [len(TOKENIZER.encode(text)) + 1
                                                                               for text in (GOOD, WRONG)]
    assert printed.err.count("skipped ") == 1
    assert f"skipped {bad}:1: chosen and rejected are the same answer" in printed.err
    (named,) = map(json.loads, (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert named["row"] == f"{bad}:1"


def test_a_trained_encoder_sees_pixels_and_its_reference_is_stored(start, pairs_file, tmp_path):
    SCRIPT.dpo_iterations(flags(init=start, data=[str(pairs_file)], batch_size=2, max_steps=2, lr=1e-3, warmup=1,
                                train={"encoder": "lora:2", "connector": "full"}, out=tmp_path / "out",
                                feature_cache=tmp_path / "features"))  # fmt: skip
    assert not (tmp_path / "features").exists() and (tmp_path / "out" / "reference.npz").is_file()
    moved = changed(start, tmp_path / "out")
    assert {"connector.proj.weight", "encoder.transformer.resblocks.0.mlp.c_fc.weight"} <= moved
    assert "encoder.conv1.weight" not in moved


@pytest.mark.parametrize("mode", ["full", "lora:4"])
def test_pairs_of_the_policy_itself_begin_at_ln_2_and_are_compared_with_the_start(mode, start, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def even(example, answer):\n    return float(len(answer) % 2 == 0)\n")
    SCRIPT.dpo_iterations(flags(
        "OnlineDPO", init=start, data=["arithmetic:rows=0"], problems=4, prompts=4, group_size=4, reward=f"{reward}:even",
        max_new_tokens=6, max_steps=3, lr=1e-3, warmup=1, batch_size=3, train={"llm": mode}, out=tmp_path / "out",
        feature_cache=tmp_path / "features"))  # fmt: skip
    *rows, _ = log_of(tmp_path / "out")
    assert len(rows) == 3 and all(LOGGED <= row.keys() for row in rows)
    assert rows[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-5) and rows[0]["margin"] == 0
    assert rows[1]["reward_chosen"] != 0 and rows[2]["reward_chosen"] != 0 and 0 < rows[2]["reward"] < 1
    assert not (tmp_path / "out" / "reference.npz").exists() and changed(start, tmp_path / "out")


@pytest.mark.parametrize("switch", ["--dry_run", "--check_data"])
def test_looking_writes_nothing(switch, start, pairs_file, run_script, tmp_path):
    given = ("--algo", "dpo", "--init", start, "--bench", "", "--epochs", 1, "--val_share", 0, switch)
    done = run_script("3-rl_vlm.py", *given, "--data", pairs_file, "--batch_size", 8, cwd=tmp_path)
    assert "24 pairs, 3 steps of 8 on 1 x" in done.out
    shown = "chosen: <s><|user|>1[image]What colour is it?<|assistant|>【It is red.<|end|>】" in done.out
    assert shown == (switch == "--check_data")
    done = run_script("3-rl_vlm.py", *given, cwd=tmp_path)
    assert "the pairs will come from 400 scenes x 8 answers" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "message"), [
    (("--algo", "dppo"), "unknown --algo dppo; perhaps you meant ppo. Known: by rules "),
    (("--algo", "ipo:smoothing=0.1"), "preference loss 'ipo' has no option 'smoothing=0.1'. Options: beta"),
    (("--algo", "dpo:smoothing=0.7"), "smoothing is the share of swapped pairs, 0 to below 0.5, not 0.7"),
    (("--train.llm", "freeze"), "every part is frozen"), (("--init", "nowhere"), "no checkpoint in nowhere"),
    (("--data", "nowhere.jsonl"), "no data at nowhere.jsonl"), (("--resume",), "nothing to resume in out/dpo"),
    (("--labeler", "self"), "--data has its pairs: leave out --labeler"), (("--divider", "whole"), "--data has its pairs"),
    (("--questions", "q.jsonl", "--judge", "j"), "leave out --questions, --judge"),
    (("--pairs_only",), "leave out --data and --iterations"), (("--pairs", "own"), "--pairs is stored or policy, not 'own'"),
    (("--batch_size", 0), "--batch_size is at least 1, not 0"), (("--accumulate", 0), "--accumulate is at least 1, not 0"),
    (("--iterations", 0), "--iterations is at least 1, not 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_remedy(more, message, start, pairs_file, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments(start, pairs_file), *more, cwd=tmp_path, expect=1)
    assert message in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.mark.parametrize(("more", "message"), [
    (("--smoothing", 0.1), "smoothing is an option of dpo, mpo, robust, written --algo dpo:smoothing=..."),
    (("--gamma", 0.5), "gamma is an option of simpo, written --algo simpo:gamma=..."),
    (("--balance",), "unknown flag or value --balance"), (("--entropy_floor", 0.1), "unknown flag or value --entropy_floor"),
])  # fmt: skip
def test_flags_that_preferences_do_not_have_are_unknown(more, message, start, pairs_file, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments(start, pairs_file), *more, cwd=tmp_path, expect=2)
    assert message in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.mark.parametrize(("more", "message"), [
    ({"labeler": "slef"}, "--labeler is truth, self, judge or the folder of a checkpoint, not 'slef'"),
    ({"labeler": "judge"}, "add --judge http://localhost:8000/v1,model=NAME"), ({"divider": "half"}, "unknown divider 'half'"),
    ({"divider": "whole:places=true"}, "divider 'whole' has no option 'places=true'. Options: categories"),
    ({"judge": "http://localhost:1/v1,model=m"}, "add --labeler judge"), ({"iterations": 2}, "leave out --data and --iterations"),
    ({"judge": "http://localhost:1/v1,model=m", "labeler": "self", "divider": "whole"}, "leaves --judge nothing to do"),
    ({"questions": "rows.jsonl"}, "--labeler truth knows the embedded world alone"),
])  # fmt: skip
@pytest.mark.parametrize("switch", [{"pairs_only": True}, {"pairs_only": True, "dry_run": True}], ids=["run", "dry_run"])
def test_labels_that_no_one_can_give_are_refused_before_any_work(more, switch, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):  # before the model is looked for
        SCRIPT.dpo_iterations(flags(init=tmp_path / "nowhere", out=tmp_path / "out", **switch, **more))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["DPO", "OnlineDPO"])
def test_the_control_without_the_sft_term_would_learn_nothing_and_is_refused(kind, tmp_path):
    with pytest.raises(UserError, match="sft_chosen learns by the SFT term alone: --sft_weight must be above 0"):
        SCRIPT.dpo_iterations(flags(kind, init=tmp_path / "nowhere", algo="sft_chosen", sft_weight=0))


# ---------------------------------------------------------------- choosing a checkpoint


def test_quality_wants_what_is_there_and_nothing_else():
    def of(false: float, cover: float) -> float:
        return truth_and_cover({"hallucination/false": false, "hallucination/cover": cover, "world/exact": 1.0})

    assert of(0.07, 0.94) > of(0.58, 0.965) > of(0.046, 0.368)  # with the SFT term, before, silent
    assert truth_and_cover({"world/exact": 0.5}) is None


def best_in(tmp_path: Path, history: list[dict], measure: str = "(1 - false) x Cover") -> BestCheckpoint:
    return BestCheckpoint(SimpleNamespace(out=tmp_path, is_main=True, preview_only=False, history=history,
                                          print0=lambda text: None), measure)  # fmt: skip


def scores(step: int, cover: float) -> dict:
    return {"step": step, "seconds": 1.0, "hallucination/false": 0.0, "hallucination/cover": cover}


def marked_model(value: float) -> VLM:
    model = tiny.nano()
    torch.nn.init.constant_(model.connector.proj.weight, value)
    return model


def mark(folder: Path) -> list[float]:
    return load_file(folder / "model.safetensors")["connector.proj.weight"].unique().tolist()


@pytest.mark.parametrize("first, kept", [(0.4, 100), (0.9, 0)])
def test_the_best_checkpoint_is_kept_and_that_may_be_the_start(tmp_path, first, kept):
    best = best_in(tmp_path, [])
    for step, cover in ((0, first), (50, 0.5), (100, 0.7), (150, 0.6)):
        best.offer(marked_model(step), MODEL_FILE, step, scores(step, cover))
    highest = max(first, 0.7)
    assert best.keep() == {"hallucination/false": 0.0, "hallucination/cover": highest}
    assert mark(tmp_path) == [kept]
    assert json.loads((tmp_path / "best.json").read_text()) == {"quality": highest}


def test_a_resumed_run_remembers_the_best_from_its_log(tmp_path):
    best_in(tmp_path, []).offer(marked_model(50), MODEL_FILE, 50, scores(50, 0.8))
    best = best_in(tmp_path, [scores(0, 0.5), scores(50, 0.8), {"step": 60, "loss": 1.0}])
    best.offer(marked_model(100), MODEL_FILE, 100, scores(100, 0.7))
    assert best.keep()["hallucination/cover"] == 0.8
    assert mark(tmp_path) == [50]
    best = best_in(tmp_path, [])  # a fresh run forgets it
    assert best.keep() == {} and not (tmp_path / "best").exists()


def test_accuracy_in_training_is_not_a_check_on_the_validation_split(tmp_path):
    """A resumed run finds both in its log; the shares of right answers in training are higher, and would win."""
    history = [{"step": 0, "task/accuracy": 0.4}, {"step": 3, "accuracy": 0.99, "reward_accuracy": 1.0}]
    best = best_in(tmp_path, history, "accuracy")
    assert best.value == 0.4
    assert not best.offer(marked_model(5), MODEL_FILE, 5, {"task/accuracy": 0.3})
    assert best.offer(marked_model(10), MODEL_FILE, 10, {"task/accuracy": 0.5})
    assert best.keep() == {"task/accuracy": 0.5}


# ---------------------------------------------------------------- pairs of the model's own answers


def random_sentences(model, batch: dict, **options) -> list[Answer]:
    """In place of `generate`: one to three sentences about objects that may be there, where an untrained model babbles."""
    names, places = ("bus", "cow", "key", "bear", "star"), ("top left", "top", "center", "bottom")
    answers = []
    for _ in batch["input_ids"]:
        draws = torch.randint(0, 60, (int(torch.randint(1, 4, ())),)).tolist()
        text = " ".join(f"At the {places[k % 4]} is one {names[k % 5]}." for k in draws)
        answers.append(Answer(TOKENIZER.encode(text), [], stopped=True))
    return answers


@pytest.fixture
def own_pairs(start, tmp_path, monkeypatch):
    """`own_pairs(labeler="self")`: a run with --pairs_only; the folder of its pairs."""
    monkeypatch.chdir(tmp_path)  # where a judge's replies are kept

    def own_pairs(answers=random_sentences, **more) -> Path:
        monkeypatch.setitem(SCRIPT.dpo.__globals__, "generate", answers)
        SCRIPT.dpo_iterations(flags(**{**dict(
            init=start, out=tmp_path / "out" / "dpo", scenes=6, group_size=6, pairs_only=True,
            feature_cache=tmp_path / "features"), **more}))  # fmt: skip
        return next(tmp_path.glob("out/dpo/feedback/*"))

    return own_pairs


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def labeler_of(folder: Path) -> str:
    return json.loads((folder / "labels.made_from.json").read_text(encoding="utf-8"))["labeler"]


def test_pairs_alone_can_be_made_and_the_same_command_then_learns_from_them(own_pairs, tmp_path, capsys):
    folder = own_pairs()
    summary, pairs = summary_of(folder), folder / "pairs.jsonl"
    assert labeler_of(folder) == "truth" and summary["questions_as_the_truth"] == summary["pairs_as_the_truth"] == 1.0
    printed = capsys.readouterr().out
    assert f"{summary['pairs']} pairs in {pairs}" in printed and "Next: the same command without --pairs_only" in printed
    assert [path.name for path in (tmp_path / "out" / "dpo").iterdir()] == ["feedback"]  # nothing was learned
    made = pairs.stat().st_mtime_ns
    assert own_pairs(pairs_only=False, max_steps=1) == folder and pairs.stat().st_mtime_ns == made
    assert list(tmp_path.glob("out/dpo/feedback/*")) == [folder] and (tmp_path / "out" / "dpo" / "model.safetensors").is_file()


@pytest.mark.parametrize("labeler", ["self", "other"])
def test_the_model_or_another_checkpoint_labels_by_its_own_yes_and_no(labeler, own_pairs, tmp_path, monkeypatch):
    """In place of `next_logits`: no to everything, and which model was asked."""
    labelers = []

    def no(model, batch):
        labelers.append(model.connector.proj.weight.unique().tolist())
        logits = torch.zeros(len(batch["input_ids"]), TOKENIZER.vocab_size)
        return logits.index_fill(1, torch.tensor(TOKENIZER.encode("no")[:1]), 9.0)

    monkeypatch.setitem(SCRIPT.dpo.__globals__, "next_logits", no)
    checkpoint.save(tmp_path / "other", marked_model(3.0), MODEL_FILE)
    folder = own_pairs(labeler={"other": str(tmp_path / "other")}.get(labeler, labeler))
    summary = summary_of(folder)
    assert labelers and all((weights == [3.0]) == (labeler == "other") for weights in labelers)
    assert summary["questions_rejected"] == summary["questions"] and summary["pairs"] > 0  # fewer claims win
    assert labeler_of(folder) != "truth" and summary["questions_as_the_truth"] < 1


def test_a_model_that_was_never_asked_anything_cannot_label(own_pairs, tmp_path):
    model = tiny.nano()
    model.config = dataclasses.replace(model.config, template="pretrain")
    checkpoint.save(tmp_path / "captioner", model, MODEL_FILE)
    with pytest.raises(UserError, match="only a model that was fine-tuned to answer them can label"):
        own_pairs(labeler=str(tmp_path / "captioner"))


def judge_that_replies(reply) -> str:
    """The address and name, as --judge has them, of a local server that answers `reply(text)`."""
    pytest.importorskip("openai")
    from tests.test_judge import Server

    server = Server(reply)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"{server.url},model=judge-1"


def test_a_judge_behind_an_address_labels(own_pairs):
    judge = judge_that_replies(lambda text: "No." if "bus" in text or "公交车" in text else "Yes.")
    folder = own_pairs(labeler="judge", judge=judge)
    summary = summary_of(folder)
    assert labeler_of(folder) == "judge-1" and 0 < summary["questions_rejected"] < summary["questions"]
    buses = [(row["chosen"].count("bus"), row["rejected"].count("bus")) for row in rows_of(folder / "pairs.jsonl")]
    assert all(chosen <= rejected for chosen, rejected in buses) and any(chosen < rejected for chosen, rejected in buses)


def test_places_are_labelled_too_where_the_divider_names_them(own_pairs):
    folder = own_pairs(divider="claims:places=true")
    cells = {cell for row in rows_of(folder / "claims.jsonl") for claims in row["claims"] for claim in claims
             for _, cell in claim["objects"]}  # fmt: skip
    assert cells == {None, 0, 1, 4, 7} and summary_of(folder)["questions_as_the_truth"] == 1.0


def test_whole_answers_are_labelled_in_one_piece(own_pairs):
    judge = judge_that_replies(lambda text: "No." if "bus" in text else "Yes.")
    folder = own_pairs(labeler="judge", judge=judge, divider="whole")
    claims = rows_of(folder / "claims.jsonl")[0]["claims"]
    assert all(len(found) == 1 and "entirely right" in found[0]["question"] for found in claims)
    assert summary_of(folder)["pairs"] > 0


def test_a_judge_divides_what_the_rule_cannot(own_pairs):
    """The sentences of `random_sentences` are followed by one that no rule knows."""
    requests = []

    def answers(model, batch, **options):
        return [dataclasses.replace(answer, tokens=answer.tokens + TOKENIZER.encode(" It looks merry."))
                for answer in random_sentences(model, batch, **options)]

    def reply(text: str) -> str:
        if "List the facts" in text:
            requests.append(text)
            return "- There is a bus." if "bus" in text else "- It is sunny."
        if "Turn this statement" in text:
            return "Is there a bus?" if "bus" in text else "Is it sunny?"
        return "No." if "bus" in text else "Yes."

    summary = summary_of(own_pairs(answers, labeler="judge", judge=judge_that_replies(reply)))
    assert requests and all("merry" in text for text in requests)
    assert summary["answers_undivided"] == 0 and summary["pairs"] > 0


def test_a_model_labels_its_answers_to_questions_and_pictures_of_ones_own(own_pairs, samples, tmp_path):
    rows = [{"image": "red.png", "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A"}]},
            {"image": "green.png", "messages": [{"role": "user", "content": "这是什么？"}]},
            {"messages": [{"role": "user", "content": "Without a picture?"}]}]  # fmt: skip
    questions = lines(tmp_path / "questions.jsonl", rows)
    judge = judge_that_replies(lambda text: "No." if "bus" in text else "Yes.")
    folder = own_pairs(labeler="judge", judge=judge, divider="whole", questions=questions, image_folder=samples, max_bad=0.5)
    summary = summary_of(folder)
    assert summary["prompts"] == 2 and summary["pairs"] > 0 and summary["pairs_as_the_truth"] is None
    assert [row["question"] for row in rows_of(folder / "answers.jsonl")] == ["What is it?", "这是什么？"]
    assert "完全正确" in rows_of(folder / "claims.jsonl")[1]["claims"][0][0]["question"]
    (bad,) = rows_of(tmp_path / "out" / "dpo" / "bad_questions.jsonl")
    assert bad["row"].endswith("questions.jsonl:3")


def test_truncated_answers_are_never_a_side_of_a_pair(own_pairs):
    """To end where the limit ended them would be learned, however they are divided."""
    def answers(model, batch, **options):
        found = random_sentences(model, batch, **options)
        return [dataclasses.replace(answer, stopped=k % 3 > 0) for k, answer in enumerate(found)]

    judge = judge_that_replies(lambda text: "No." if "bus" in text else "Yes.")
    folder = own_pairs(answers, labeler="judge", judge=judge, divider="whole")
    summary = summary_of(folder)
    assert summary["answers_undivided"] == 12 and summary["pairs"] > 0
    texts = {whole: {text for row in rows_of(folder / "answers.jsonl") for k, text in enumerate(row["answers"])
                     if (k in row["truncated"]) != whole} for whole in (True, False)}  # fmt: skip
    sides = {row[side] for row in rows_of(folder / "pairs.jsonl") for side in ("chosen", "rejected")}
    assert sides <= texts[True] and not sides & (texts[False] - texts[True])


def test_an_address_that_answers_nothing_stops_the_run_and_leaves_no_labels_behind(own_pairs, tmp_path):
    judge = judge_that_replies(lambda text: (404, "{}"))
    with pytest.raises(UserError, match="the labeler judge-1 answered none of .* questions: NotFoundError"):
        own_pairs(labeler="judge", judge=judge)
    (labels,) = tmp_path.rglob("labels.jsonl")
    assert labels.read_text() == ""  # once the server is there, the same command goes on


# ---------------------------------------------------------------- iterations


def test_a_run_removes_nothing_of_an_earlier_one_before_it_can_begin(start, tmp_path):
    old = tmp_path / "out" / "dpo" / "iteration-2"
    shutil.copytree(start, old)
    given = dict(init=start, out=tmp_path / "out" / "dpo")
    for name, value in (("init", old), ("labeler", str(old)), ("reference", old / "reference.npz")):
        with pytest.raises(UserError, match="of an earlier run into .*, which this one would replace: name another --out"):
            SCRIPT.dpo_iterations(flags(**{**given, name: value}))
    for more in ({"init": tmp_path / "nowhere"}, {"data": ["nowhere.jsonl"]}):
        with pytest.raises(FileNotFoundError):
            SCRIPT.dpo_iterations(flags(**{**given, **more}))
    assert (old / "model.safetensors").is_file()


def fingerprint_of(folder: Path) -> str:
    return policy_fingerprint(checkpoint.load(folder), MODEL_FILE.read_bytes(), "torch.float32")


def reference_of(folder: Path) -> str:
    """The fingerprint of the policy that a run was compared with."""
    with np.load(folder / "reference.npz") as stored:
        return str(stored["fingerprint"])


def resumed(config):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))


def test_each_iteration_makes_its_own_pairs_and_starts_from_what_the_last_one_kept(start, tmp_path, monkeypatch, capsys):
    """`the reference stale after an iteration`: at step 0 of each the loss is ln 2 again, under new weights."""
    monkeypatch.setitem(SCRIPT.dpo.__globals__, "generate", random_sentences)
    out = tmp_path / "out" / "dpo"
    shutil.copytree(start, out / "iteration-3")  # of an earlier, longer run
    config = flags(init=start, out=out, scenes=12, group_size=6, iterations=2, max_steps=3, batch_size=2, lr=1e-3, warmup=1,
                   bench="hallucination", eval_every=1, eval_examples=3, feature_cache=tmp_path / "features")  # fmt: skip
    SCRIPT.dpo_iterations(config)
    assert "not read" not in capsys.readouterr().out  # of a file of its own
    folders = [out / f"iteration-{n}" for n in (1, 2)]
    assert not (out / "iteration-3").exists()
    prompts = []
    for folder in folders:
        (pairs,) = folder.glob("feedback/*/pairs.jsonl")
        prompts.append({row["id"].rpartition("/")[0] for row in rows_of(pairs)})
        assert [row["step"] for row in log_of(folder) if "hallucination/cover" in row] == [0, 1, 2, 3]
        learned = [row for row in log_of(folder) if "margin" in row]
        assert [row["step"] for row in learned] == [0, 1, 2]
        assert learned[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6) and learned[0]["margin"] == 0
        assert learned[2]["margin"] != 0
        assert changed(folder / "best", folder) == set()
        assert "hallucination/cover" in json.loads((folder / "scores.json").read_text())
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]  # new scenes in each iteration
    assert [reference_of(folder) for folder in folders] == [fingerprint_of(folder) for folder in (start, folders[0])]
    best = max(reversed(folders), key=lambda folder: json.loads((folder / "best.json").read_text())["quality"])
    assert (out / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert json.loads((out / "scores.json").read_text()) == json.loads((best / "scores.json").read_text())
    assert checkpoint.load(out)
    shutil.rmtree(folders[1] / "resume")
    (folders[1] / "best.json").unlink()
    times = {file: file.stat().st_mtime_ns for file in out.rglob("pairs.jsonl")}
    SCRIPT.dpo_iterations(resumed(config))  # the second iteration again, from the pairs that were made
    assert times == {file: file.stat().st_mtime_ns for file in out.rglob("pairs.jsonl")}
    assert (folders[1] / "best.json").is_file()


def test_a_chain_of_iterations_that_was_killed_goes_on_where_it_was(start, pairs_file, tmp_path):
    """The second iteration again, from what the first one kept, to the same weights; the first is left as it is."""
    out = tmp_path / "dpo"
    config = flags(init=start, data=[str(pairs_file)], out=out, iterations=2, max_steps=3, batch_size=2, lr=1e-3, warmup=1,
                   feature_cache=tmp_path / "features")  # fmt: skip
    SCRIPT.dpo_iterations(config)
    folders = [out / f"iteration-{n}" for n in (1, 2)]
    rows = [log_of(folder) for folder in folders]
    for found in rows:
        assert [row["step"] for row in found] == [0, 1, 2, 3]
        assert found[0]["preference_loss"] == pytest.approx(math.log(2), rel=1e-6) and found[2]["margin"] > 0
    assert rows[1][0]["sft_loss"] < rows[0][0]["sft_loss"] and changed(*folders)
    assert [reference_of(folder) for folder in folders] == [fingerprint_of(folder) for folder in (start, folders[0])]
    second, first = shutil.move(folders[1], tmp_path / "second"), (folders[0] / "log.jsonl").read_text()
    SCRIPT.dpo_iterations(resumed(config))
    assert (folders[0] / "log.jsonl").read_text() == first
    assert changed(Path(second), folders[1]) == set() and timeless(Path(second)) == timeless(folders[1])
    assert changed(folders[1], out) == set()  # the last one of equals

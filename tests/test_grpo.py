"""Stage 3 by rules, from problems to a checkpoint: what a step moves, and the script as people run it."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dataset.problems import of_task
from dataset.processor import Processor
from dataset.rewards import Reward
from dataset.rollouts import Group, RolloutBatch, as_rollout, stats
from dataset.sampler import Sampler
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import checkpoint, cli, runtime
from model.generate import Answer
from model.losses import score, sum_by_document
from model.reference import reference_model
from model.registry import ALGORITHMS, TASKS, UserError
from tests import tiny
from tests.conftest import ROOT
from tests.miniatures import lines

RIGHT, WRONG = "<think>so</think><answer>8</answer>", "<think>so, or not so</think><answer>9</answer>"  # of different lengths

SPEC = importlib.util.spec_from_file_location("rl_vlm", ROOT / "3-rl_vlm.py")
SCRIPT = sys.modules["rl_vlm"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)
TOKENIZER = SentencePieceTokenizer()
EVEN = """
def even(example, answer):
    return float(len(answer) % 2 == 0)
"""  # a reward that an untrained model gets half the time


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("start_of_grpo")
    checkpoint.save(folder, tiny.nano(), MODEL_FILE)
    return folder


@pytest.fixture(scope="session")
def even(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text(EVEN)
    return file


def arguments(start: Path, even: Path, *more) -> tuple:
    return ("--init", start, "--data", "arithmetic:rows=0", "--problems", 12, "--prompts", 4, "--group_size", 4,
            "--reward", f"{even}:even", "--max_new_tokens", 6, "--batch_size", 5, "--max_steps", 4, "--save_every", 2,
            "--lr", 1e-3, "--warmup", 1, "--bench", "", "--device", "cpu", *more)  # fmt: skip


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def flags(start: Path, out: Path, *more, family=SCRIPT.GRPO):
    """The flags of a run in this process, of four steps on one problem."""
    given = ("--init", start, "--out", out, "--data", "arithmetic:rows=0", "--problems", 1, "--prompts", 1, "--group_size", 4,
             "--max_new_tokens", 6, "--max_steps", 4, "--save_every", 4, "--lr", 1e-3, "--warmup", 1, "--bench", "",
             "--device", "cpu", "--feature_cache", out / "features")  # fmt: skip
    return cli.parse(family, list(map(str, (*given, *more))))


@pytest.fixture
def no_curves(monkeypatch):
    """Most of the time of a run of four steps is the drawing."""
    monkeypatch.setattr(runtime, "draw_curves", lambda history, file: None)


# ---------------------------------------------------------------- what a step moves


class Sampled:
    """One group of four answers to one picture, two right and two wrong, with the log-probabilities that they have at first."""

    def __init__(self, start: Path, out: Path):
        self.run = SCRIPT.Run.inference(out, "cpu", "fp32", 0)
        model = checkpoint.load(start)
        self.processor = Processor.of(model, TOKENIZER, self.run)
        (self.problem,) = of_task(TASKS.make("arithmetic:rows=0"), 1, None)
        prompt = self.processor.prompt(self.problem.prompt)
        self.rollouts = []
        for text in (RIGHT, RIGHT, WRONG, WRONG):
            tokens = TOKENIZER.encode(text)
            reward = Reward(1.0, 1.0, 1.1) if text is RIGHT else Reward(0.0, 1.0, 0.1)
            answer = Answer(tokens, [0.0] * (len(tokens) + 1), stopped=True)
            self.rollouts.append(as_rollout(prompt, TOKENIZER.end, answer, text, reward))
        scores = self.score(model)
        logps = scores.logps.split([len(rollout) for rollout in self.rollouts])
        self.rollouts = [dataclasses.replace(one, logps=part.tolist()) for one, part in zip(self.rollouts, logps)]
        self.before = sum_by_document(scores.logps, scores.owner, 4)[0]

    def score(self, model):
        (batch,) = self.update().micro_batches(64, self.processor, self.run)
        with torch.no_grad():
            return score(model.eval(), batch, banned=self.processor.banned)

    def update(self, factor: float = 1.0, risen: float = 0.0, **changes) -> RolloutBatch:
        """What the sampler gives; `factor`: of rewards, `changes`: of its statistics.

        risen   how much likelier each token of the right answers is said to have been when it was sampled
        """
        rollouts = []
        for one in self.rollouts:
            logps = [logp + risen * (one.text == RIGHT) for logp in one.logps]
            reward = dataclasses.replace(one.reward, total=factor * one.reward.total)
            rollouts.append(dataclasses.replace(one, logps=logps, reward=reward))
        groups = [Group(self.problem, rollouts)]
        return RolloutBatch(groups, {**stats(groups), "groups": 1, "sampled": 1, **changes})

    def gains(self, folder: Path) -> torch.Tensor:
        """(4,): by how much each answer's log-probability has grown in a trained model."""
        scores = self.score(checkpoint.load(folder))
        return sum_by_document(scores.logps, scores.owner, 4)[0] - self.before


@pytest.fixture(scope="session")
def sampled(start, tmp_path_factory) -> Sampled:
    return Sampled(start, tmp_path_factory.mktemp("sampled"))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("algo", [
    "grpo", "grpo:per_sequence=true", "grpo:kl=0.1,kl_estimate=k2", "rloo", "reinforce++", "reinforce++_baseline", "ppo:lam=1",
    "cispo", "gspo", "cpgd:drift=0.1",
])  # fmt: skip
def test_every_algorithm_raises_the_better_answers_and_lowers_the_worse(algo, start, sampled, tmp_path, monkeypatch):
    """Four steps of the script itself on one group of answers, two on each update."""
    copies = []
    monkeypatch.setattr(SCRIPT, "reference_model", lambda model: copies.append(model) or reference_model(model))
    monkeypatch.setattr(Sampler, "next", lambda sampler: sampled.update())
    SCRIPT.grpo(flags(start, tmp_path / "grpo", "--algo", algo, "--num_iterations", 2))
    gains, rows = sampled.gains(tmp_path / "grpo"), log_of(tmp_path / "grpo")
    assert gains[:2].min() > 0 > gains[2:].max()
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-4) and rows[0]["logp_gap"] < 1e-4, "on policy"
    assert rows[0]["clipped_low"] == rows[0]["clipped_high"] == 0
    assert rows[1]["ratio_max"] > 1.0001 and rows[1]["logp_gap"] > 1e-3, "the same answers, of an older policy"
    if not algo.startswith(("ppo", "cispo")):  # on policy the loss is minus the mean advantage; cpgd's is 0
        update, made = sampled.update(), ALGORITHMS.make(algo)
        costs = -made.advantages(update.rewards) * made.token_weights(update.lengths) * update.lengths
        expected = 0.0 if algo.startswith("cpgd") else (costs.sum() / update.lengths.sum()).item()
        assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) < 1e-4 or not made.per_sequence
    assert rows[0]["gradient_norm"] > 1e-3 and not rows[0]["step_left_out"]
    assert len(copies) == ("kl" in algo), "without a KL there is no second model"
    assert ("kl" in rows[0]) == ("kl" in algo) and ("value_loss" in rows[0]) == algo.startswith("ppo")
    assert abs(rows[0].get("kl", 0)) < 1e-6
    if algo.startswith("ppo"):
        kept = load_file(tmp_path / "grpo" / "resume" / "000004" / "model.safetensors")
        assert kept["value_head.weight"].any(), "the value head learns too, and a resumed run gets it back"


@pytest.mark.usefixtures("no_curves")
def test_a_kl_in_the_rewards_lowers_answers_that_have_become_likelier_than_they_were(start, sampled, tmp_path, monkeypatch):
    """The right ones are paid 1 more, and cost 10 for each of their nats: k1 of the whole answer."""
    monkeypatch.setattr(Sampler, "next", lambda sampler: sampled.update(risen=0.1))
    SCRIPT.grpo(flags(start, tmp_path / "grpo", "--algo", "grpo:kl=10,kl_estimate=k1"))
    gains, update = sampled.gains(tmp_path / "grpo"), sampled.update()
    assert gains[:2].max() < gains[2:].min()
    rewards = update.rewards - 10 * 0.1 * update.lengths * torch.tensor([1.0, 1.0, 0.0, 0.0])
    costs = -(rewards - rewards.mean()) * torch.tensor([-0.1, -0.1, 0.0, 0.0]).exp() * update.lengths
    assert log_of(tmp_path / "grpo")[0]["loss"] == pytest.approx((costs.sum() / update.lengths.sum()).item(), abs=1e-3)


@pytest.mark.usefixtures("no_curves")
def test_a_kl_in_the_loss_is_learned_from_where_answers_teach_nothing(start, sampled, tmp_path, monkeypatch):
    factors = iter((1.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(Sampler, "next", lambda sampler: sampled.update(next(factors)))
    SCRIPT.grpo(flags(start, tmp_path / "grpo", "--algo", "grpo:kl=1"))
    rows = log_of(tmp_path / "grpo")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    for row in rows[1:4]:
        assert row["loss"] == pytest.approx(row["kl"], abs=1e-6) and row["kl"] > 1e-4
        assert row["gradient_norm"] > 1e-3 and not row["step_left_out"]


@pytest.mark.usefixtures("no_curves")
def test_a_step_whose_gradient_is_absurd_or_zero_is_left_out(start, sampled, tmp_path, monkeypatch):
    factors = iter((1.0, 1.0, 1000.0, 0.0))
    monkeypatch.setattr(Sampler, "next", lambda sampler: sampled.update(next(factors)))
    SCRIPT.grpo(flags(start, tmp_path / "grpo"))
    rows = log_of(tmp_path / "grpo")[:4]
    assert [row["step_left_out"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["gradient_norm"] > 10 * rows[1]["gradient_norm"] and rows[3]["gradient_norm"] == 0
    optimizer = torch.load(tmp_path / "grpo" / "resume" / "000004" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for part in optimizer.values() for state in part["state"].values()} == {2}


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("family", ["grpo", "dpo"])
def test_a_run_whose_answers_teach_nothing_any_more_stops_in_either_family(family, start, sampled, tmp_path, monkeypatch, capsys):
    dull = {"all_wrong": 0.9, "zero_variance": 0.9}
    monkeypatch.setattr(Sampler, "next", lambda sampler: sampled.update(**dull))
    main, family_flags = {"grpo": (SCRIPT.grpo, SCRIPT.GRPO), "dpo": (SCRIPT.dpo_iterations, SCRIPT.OnlineDPO)}[family]
    main(flags(start, tmp_path / family, "--max_steps", 30, "--save_every", 100, family=family_flags))
    assert re.search(r"stopped at step 20 of 30: 90% of the groups hold no right answer.*2-sft_vlm.py", capsys.readouterr().out)
    assert (tmp_path / family / "model.safetensors").is_file() and (tmp_path / family / "resume" / "000020").is_dir()


# ---------------------------------------------------------------- the script


LOGGED = {"step", "seconds", "reward", "reward_best", "reward_worst", "format", "zero_variance", "truncated", "groups",
          "sampled", "loss", "entropy", "ratio", "clipped_low", "clipped_high", "ratio_max", "logp_gap", "lr", "gradient_norm",
          "gradient_threshold", "step_left_out", "tokens_per_second"}  # fmt: skip


@pytest.fixture(scope="session")
def one(run_script, start, even, tmp_path_factory) -> Path:
    """The checkpoint of one process."""
    folder = tmp_path_factory.mktemp("one_grpo")
    run_script("3-rl_vlm.py", *arguments(start, even), cwd=folder)
    return folder / "out" / "grpo"


def test_a_run_writes_a_checkpoint_and_a_log_of_everything(one, start):
    rows = log_of(one)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[:4]:
        differ = {"length_above", "length_below"} if row["zero_variance"] < 1 else set()
        assert set(row) == LOGGED | differ, "of a reward of one's own, which calls no answer right"
        assert row["logp_gap"] < 1e-4 and row["ratio_max"] == pytest.approx(1, abs=1e-4) and 0 < row["entropy"]
        assert row["groups"] <= 4 <= row["sampled"] <= 16
    assert {"model.safetensors", "config.json", "tokenizer.model", "curves.png"} <= {path.name for path in one.iterdir()}
    before, after = load_file(start / "model.safetensors"), load_file(one / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved == {name for name in before if name.startswith("llm.")}


@pytest.mark.parametrize("more", [(), ("--context_parallel", 2)])
def test_two_processes_equal_one(more, one, start, even, run_ranks, tmp_path):
    """With answers of their own, or with halves of each."""
    run_ranks("3-rl_vlm.py", *arguments(start, even), *more, cwd=tmp_path)
    two = tmp_path / "out" / "grpo"
    for a, b in zip(log_of(one)[:4], log_of(two)[:4], strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4) for name in a.keys() - {"seconds", "tokens_per_second"})
    before, ends = load_file(start / "model.safetensors"), [load_file(folder / "model.safetensors") for folder in (one, two)]
    for name, weight in before.items():
        assert (ends[0][name] - ends[1][name]).norm() <= 2e-3 * (ends[0][name] - weight).norm(), name


@pytest.mark.parametrize("more", [
    (), ("--algo", "ppo:kl=0.1,kl_estimate=k1"), ("--algo", "dpo", "--pairs", "policy"),
    ("--algo", "gspo:kl=0.1", "--train.llm", "lora:4", "--num_iterations", 2, "--lr", 1e-2),
])  # fmt: skip
def test_a_killed_run_goes_on_to_exactly_the_same_weights(more, one, start, even, run_script, tmp_path):
    given = arguments(start, even, *more)
    whole = one
    if more:
        whole = tmp_path / "whole"
        run_script("3-rl_vlm.py", *given, "--out", whole, cwd=tmp_path)
    run_script("3-rl_vlm.py", *given, "--out", "half", cwd=tmp_path, die_at_step=3, expect=-signal.SIGKILL)
    run_script("3-rl_vlm.py", *given, "--out", "half", "--resume", cwd=tmp_path)
    ends = [load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "half")]
    assert ends[0].keys() == ends[1].keys() == load_file(start / "model.safetensors").keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    logs = [[{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in log_of(folder)]
            for folder in (whole, tmp_path / "half")]  # fmt: skip
    assert logs[0] == logs[1]
    if "--num_iterations" in more:
        rows = logs[0]
        assert rows[0]["reward"] == rows[1]["reward"] and rows[2]["sampled"] == rows[3]["sampled"], "the same answers"
        assert rows[2]["ratio_max"] == pytest.approx(1, abs=1e-4) and rows[3]["ratio_max"] > 1.001


@pytest.mark.usefixtures("no_curves")
def test_a_finished_run_that_is_resumed_ends_as_it_did_and_forgets_nothing(one, start, even, tmp_path):
    again = shutil.copytree(one, tmp_path / "grpo")
    SCRIPT.grpo(flags(start, again, *arguments(start, even), "--resume"))
    ends = [load_file(folder / "model.safetensors") for folder in (one, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    states = [json.loads((folder / "resume" / "000004" / "state.json").read_text()) for folder in (one, again)]
    assert states[0]["average"] == states[1]["average"] > 0


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_ended_within_an_update_goes_on_with_a_new_one(start, even, tmp_path):
    for more in (("--max_steps", 3), ("--max_steps", 5, "--resume")):
        SCRIPT.grpo(flags(start, tmp_path / "grpo", "--num_iterations", 2, "--reward", f"{even}:even", *more))
    rows = log_of(tmp_path / "grpo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[3]["ratio_max"] == pytest.approx(1, abs=1e-4), "sampled now"


def test_a_file_of_problems_is_learned_from_and_a_config_file_says_how(start, run_script, samples, tmp_path):
    settings = {"data": [str(samples / "eureka.jsonl"), str(samples / "lmm_r1.jsonl")], "init": str(start), "out": "run/grpo",
                "max_steps": 2, "prompts": 2, "group_size": 2, "max_new_tokens": 4, "lr": "1e-4", "algo": "rloo:clip_high=0.3",
                "temperature": 0.8, "bench": "arithmetic", "eval_examples": 2, "eval_every": 1, "device": "cpu",
                "reward": "rule", "val_share": 0}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = run_script("3-rl_vlm.py", "--config", tmp_path / "run.yaml", "--resample_rounds", 1, cwd=tmp_path)
    assert "8 problems, 2 updates of 2 x 2 answers on 1 x cpu" in done.out and "a loss of about 0 is normal" in done.out
    rows = log_of(tmp_path / "run" / "grpo")
    assert [row["step"] for row in rows if "arithmetic/accuracy" in row] == [0, 1, 2]
    assert [row["lr"] for row in rows if "lr" in row][0] == pytest.approx(1e-4 / 5)
    assert all(row["logp_gap"] < 1e-4 for row in rows if "lr" in row), "scored at the temperature that it was sampled at"
    assert all(row["all_wrong"] == 1 and row["groups"] == 0 and row["gradient_norm"] == 0 for row in rows if "lr" in row)
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "## Reinforcement learning: grpo" in page and "| picture | question | truth | before | after |" in page
    assert "arithmetic/accuracy before" in page
    first, best = (json.loads((tmp_path / "run" / "grpo" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert "step 0 is kept" in done.out and first == best, "the report tells what the kept checkpoint says"
    assert "arithmetic/accuracy" in json.loads((tmp_path / "run" / "grpo" / "scores.json").read_text())


@pytest.mark.usefixtures("no_curves")
def test_bad_rows_of_problems_are_named_once_and_their_list_stays(start, tmp_path, capsys):
    rows = [{"conversations": [{"role": "user", "content": f"{k}?"}], "answer": answer} for k, answer in enumerate("7$77")]
    given = ("--data", lines(tmp_path / "rows.jsonl", rows), "--problems", 12, "--max_bad", 0.5, "--resample_rounds", 0,
             "--val_share", 0)
    for more in (("--max_steps", 2), ("--max_steps", 2, "--resume")):
        SCRIPT.grpo(flags(start, tmp_path / "grpo", *given, *more))
        assert capsys.readouterr().err.count("skipped ") == 1
        (listed,) = map(json.loads, (tmp_path / "grpo" / "bad_problems.jsonl").read_text().splitlines())
        assert listed["row"].endswith("rows.jsonl:2") and "nothing can match it" in listed["reason"]


@pytest.mark.parametrize("switch", ["--dry_run", "--check_data"])
def test_looking_writes_nothing(switch, start, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", "--init", start, "--bench", "", "--device", "cpu", "--problems", 12, switch, cwd=tmp_path)
    assert "12 problems, 20 updates of 32 x 8 answers on 1 x cpu" in done.out
    assert ("[image]" in done.out and "right: " in done.out) == (switch == "--check_data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "message"), [
    (("--algo", "grppo"), "unknown --algo grppo; perhaps you meant grpo. Known: by rules cispo, "),
    (("--algo", "grpo:advantage=best"), "advantage is one of dr_grpo"), (("--temperature", 0), "--temperature is above 0"),
    (("--group_size", 1), "--group_size is at least 2"), (("--num_iterations", 4, "--save_every", 6), "not 4 and 6"),
    (("--num_iterations", 0), "--num_iterations is at least 1"), (("--prompts", 0), "--prompts is at least 1, not 0"),
    (("--max_steps", 0), "--max_steps is at least 1, not 0"), (("--save_every", 0), "--save_every is at least 1, not 0"),
    (("--batch_size", 0), "--batch_size is at least 1, not 0"), (("--reward", "mine.py:no"), "my_file.py:function, not"),
    (("--data", "nowhere.jsonl"), "no data at nowhere.jsonl"), (("--resume",), "nothing to resume in out/grpo"),
    (("--keep_zero_variance", "--resample_rounds", 1), "--resample_rounds has no use where every group is kept"),
    (("--algo", "ppo", "--resample_rounds", 1), "--resample_rounds has no use where every group is kept"),
    (("--max_new_tokens", 4096), "leaves no room for prompt and answer"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line_with_the_remedy(more, message, start, even, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments(start, even), *more, cwd=tmp_path, expect=1)
    assert message in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.mark.parametrize(("more", "message"), [
    (("--sft_weight", 0.5), "unknown flag or value --sft_weight"), (("--pairs", "policy"), "unknown flag or value --pairs"),
    (("--max_length", 64), "unknown flag or value --max_length"), (("--algo", "dpo"), "unknown flag or value --problems"),
    (("--drift", 0.1), "drift is an option of cpgd, written --algo cpgd:drift=..."),
])  # fmt: skip
def test_a_flag_of_another_family_is_unknown_to_this_one(more, message, start, even, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments(start, even), *more, cwd=tmp_path, expect=2)
    assert message in done.err.splitlines()[-1] and "Traceback" not in done.err


@pytest.mark.usefixtures("no_curves")
def test_a_run_is_not_resumed_from_other_weights_than_it_began_with(one, start, even, tmp_path):
    again = shutil.copytree(one, tmp_path / "grpo")
    model = tiny.nano()
    with torch.no_grad():
        model.connector.proj.weight.add_(0.1)
    checkpoint.save(tmp_path / "other", model, MODEL_FILE)
    with pytest.raises(UserError, match="was started from other weights"):
        SCRIPT.grpo(flags(start, again, *arguments(tmp_path / "other", even), "--max_steps", 6, "--resume"))


# ---------------------------------------------------------------- flags


def test_every_family_has_real_defaults_of_its_own():
    rules, stored, online = SCRIPT.GRPO(), SCRIPT.DPO(), SCRIPT.OnlineDPO()
    assert [config.data for config in (rules, stored, online)] == [("arithmetic",), (), ("arithmetic",)]
    assert [config.run.out for config in (rules, stored, online)] == [Path("out/grpo"), Path("out/dpo"), Path("out/dpo")]
    assert [config.optim.max_steps for config in (rules, stored, online)] == [20, 0, 40]
    assert [config.optim.optimizer for config in (rules, stored, online)] == ["muon", "adamw", "adamw"]
    assert [config.temperature for config in (rules, stored, online)] == [1.0, 1.0, 1.0]
    without = {name for config in (rules, stored, online) for part in (config, config.run, config.optim)
               for name, value in vars(part).items() if value is None}
    assert without == {"image_folder", "questions", "reference"}, "None only where nothing is meant, never where it depends"


def test_a_config_file_may_set_what_has_no_default_of_its_own():
    given = {"lr": "1e-4", "max_steps": 7, "out": "x", "data": "a.jsonl", "image_folder": "pictures"}
    read = cli.from_mapping(SCRIPT.GRPO(), given, "run.yaml")
    assert (read.optim.lr, read.optim.max_steps, read.run.out, read.data) == (1e-4, 7, Path("x"), ("a.jsonl",))
    assert read.run.image_folder == Path("pictures")
    assert cli.from_mapping(SCRIPT.GRPO(), {"image_folder": None}, "run.yaml").run.image_folder is None
    with pytest.raises(SystemExit, match="run.yaml: lr: 'fast' is not a float"):
        cli.from_mapping(SCRIPT.GRPO(), {"lr": "fast"}, "run.yaml")

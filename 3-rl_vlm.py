"""Stage 3, preference learning: from answers that sound right to answers that are.

The model answers the same question several times, each claim is checked, and pairs of a better and a worse answer are kept. One
loss raises the better one over the worse, measured against what the model said before (DPO, arXiv 2305.18290). Beside it an
anchor keeps the better answer likely in itself: without it the surest way never to be wrong is to say nothing.

In:  out/sft, and preference pairs (default: made by the model itself about the embedded world).  Out: out/dpo, as in stage 1.

    python 3-rl_vlm.py                                              a minute and a half on a CPU core
    python 3-rl_vlm.py --algo sft_chosen --out out/control          the control: fine-tuning on the better answers alone
    python 3-rl_vlm.py --iterations 3                               generate, learn, choose, and again from there
    python 3-rl_vlm.py --pairs_only --labeler judge --judge http://localhost:8000/v1,model=NAME       a larger model's labels
    python 3-rl_vlm.py --data RLAIF-V-Dataset rlhf-v.parquet:2 --train.llm lora:64 --lr 1e-5
"""

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import preferences
from dataset.collate import Batches
from dataset.conversations import BadRows
from dataset.evaluation import Ask, add_scores, evaluate, several
from dataset.eyes import Eyes
from dataset.feedback import divider_and_labeler, world_pairs
from dataset.labels import Labeler, YesNo, by_model
from dataset.mixture import pictures
from dataset.report import marked, section, sheet, table
from dataset.tokenizer import Tokenizer
from model import checkpoint, cli, lora
from model.generate import evaluating, generate, prefill
from model.losses import (
    IGNORE,
    PER_TOKEN,
    PREFERENCE_LOSSES,
    WITHOUT_REFERENCE,
    Pairs,
    PreferenceOptions,
    anchor,
    answer_sums,
    as_pairs,
    next_token_targets,
    rewards,
    token_logps,
)
from model.optimizer import make_optimizer
from model.registry import TASKS, TEMPLATES, specs
from model.runtime import Run, clip_gradients, draw_curves, learning_rate
from model.vlm import VLM, count_parameters

Batch = dict  # dataset/preferences.py: `join`


@dataclass
class Train:
    connector: str = "freeze"  # freeze | full
    llm: str = "full"  # freeze | full | partial:K (the last K blocks) | lora:R (adapters; their absence is the reference)
    encoder: str = "freeze"  # freeze | full | partial:K | lora:R; trained, it sees pixels at every step


@dataclass
class Config:
    algo: str = "dpo"  # dpo | ipo | hinge | robust | simpo | apo_zero | bco | mpo | sft_chosen (the control)
    data: tuple[str, ...] = ()  # files or folders of preferences, by weight; none: the model's own answers, judged
    scenes: int = 400  # without --data: scenes that the model describes in each iteration
    answers: int = 8  # without --data: answers to each question, sampled alike
    temperature: float = 0.7  # without --data: of this sampling
    labeler: str = "truth"  # without --data: who labels; truth: the scene | self: the model | judge: --judge | a checkpoint
    judge: str = ""  # URL,model=NAME[,key=VARIABLE]: an OpenAI-compatible endpoint; it divides what no rule can
    divider: str = "claims"  # without --data: what is labelled; claims: each thing that an answer says | whole: all at once
    balance: bool = False  # without --data: drop pairs by length, until chosen and rejected answers are about equally long
    pairs_only: bool = False  # make the pairs, say where they are, and stop
    iterations: int = 1  # rounds of generate, learn, choose; each starts from, and compares with, the one chosen before
    image_folder: Path | None = None  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    init: Path = Path("out/sft")  # the checkpoint to start from
    out: Path = Path("out/dpo")  # where the checkpoint goes
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: Train = field(default_factory=Train)
    beta: float = 0.1  # what a nat of log-ratio to the reference is worth; simpo: 2
    nll_weight: float = 1.0  # of the anchor, the negative log-likelihood of the chosen answer; 0 invites silence
    smoothing: float = 0.0  # dpo, robust: the share of pairs that are taken to be swapped
    gamma: float = 1.0  # simpo: the margin to reach
    reference: Path | None = None  # the reference's log-probabilities, computed where they are missing; default: in --out
    epochs: float = 4.0  # passes over the pairs
    max_steps: int = 0  # stop after so many steps; 0: after the epochs
    batch_size: int = 8  # pairs a process and micro-step
    accumulate: int = 1  # micro-steps a step
    max_length: int = 1024  # tokens of prompt and answer; longer answers lose their end, both sides at the same token
    optimizer: str = "adamw"  # adamw | muon
    lr: float = 5e-5  # peak learning rate, with LoRA twenty times that; of a pretrained model 5e-7, with LoRA 1e-5
    warmup: int = 10  # steps of rising learning rate
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bench: str = "hallucination"  # tasks to check on their validation split; hallucination chooses the checkpoint; "": none
    eval_every: int = 100  # steps between checks, from step 0 on; 0: at the end alone
    eval_examples: int = 1000  # pictures' worth of questions a check asks of each task
    save_every: int = 200  # steps between saves for --resume; the end is always saved
    log_every: int = 5  # steps between lines of log.jsonl
    max_bad: float = 0.01  # share of bad rows that stops the run
    feature_cache: Path = Path("out/features")  # features of the frozen encoder, computed once
    feature_cache_gb: float = 8.0  # above this the encoder runs at every step instead
    resume: bool = False  # go on exactly where the run in --out stopped
    compile: bool = False  # torch.compile: a minute of waiting, then faster on a GPU
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps
    wandb: bool = False  # log to Weights & Biases as well
    dry_run: bool = False  # print parameters, rows and steps, and stop
    check_data: bool = False  # print three pairs as the model will read them, what is learned in 【brackets】, and stop


def main(config: Config) -> None:
    """Iterations of one thing: `learn`. With several, each has its own folder in --out, which gets the best of them."""
    if config.algo not in PREFERENCE_LOSSES:
        raise ValueError(f"--algo is one of {', '.join(PREFERENCE_LOSSES)}, not {config.algo!r}")
    if config.algo == "robust" and config.smoothing == 0:
        raise ValueError("robust without swapped pairs is dpo: say how many there are, --smoothing 0.1")
    if config.algo == "sft_chosen" and config.nll_weight == 0:
        raise ValueError("sft_chosen learns by the anchor alone: --nll_weight must be above 0")
    if config.pairs_only and (config.data or config.iterations > 1):
        raise ValueError("--pairs_only makes the pairs of one iteration: leave out --data and --iterations")
    if config.data and (config.labeler, config.judge, config.divider, config.balance) != ("truth", "", "claims", False):
        raise ValueError("--data has its labels: leave out --labeler, --judge, --divider and --balance")
    divider_and_labeler(config.divider, config.labeler, config.judge)  # what does not go together fails here, too
    options = PreferenceOptions(config.beta, config.smoothing, config.gamma)
    tasks = {name: TASKS.make(name) for name in specs(config.bench)}  # a wrong name fails here, not after training
    run = Run(config, config.algo)
    folders = [config.out] if config.iterations == 1 else [config.out / f"iteration-{n + 1}" for n in range(config.iterations)]
    if run.first and not (config.resume or config.dry_run or config.check_data or config.pairs_only):
        for folder in config.out.glob("iteration-*"):  # an earlier run's are not this one's
            shutil.rmtree(folder)
    run.wait()

    start, reference = config.init, config.reference
    for number, folder in enumerate(folders):
        run.out, run.history, run.state = folder, [], {}
        finished = config.resume and config.iterations > 1 and (folder / "chosen.json").is_file()
        if not finished:
            resume = config.resume and (number == 0 or (folder / "resume").is_dir())
            run.config = dataclasses.replace(config, init=start, reference=reference, out=folder, resume=resume,
                                             seed=config.seed + number)
            if not learn(run.config, run, tasks, options):
                return
        start, reference = folder, None  # the next one begins with, and is compared with, what this one chose
    if run.first and len(folders) > 1:
        best = max(reversed(folders), key=lambda folder: json.loads((folder / "chosen.json").read_text())["quality"])
        run.say(f"{best.name} of {len(folders)} is kept")  # the last one of equals, and where nothing was measured
        copy_checkpoint(best, config.out)
        add_scores(config.out, json.loads((best / "scores.json").read_text()))
    run.finish(f"wrote {config.out}", "python 4-eval_chat.py --bench hallucination,world, or python web_demo.py")


def learn(config: Config, run: Run, tasks: dict, options: PreferenceOptions) -> bool:
    """One run of preference learning, from config.init to config.out; False where it was only looked at."""
    torch.manual_seed(config.seed)  # each iteration is the same whether it is the first of its process or not
    model = checkpoint.load(config.init).train().to(run.device)
    if config.template:
        model.config = dataclasses.replace(model.config, template=config.template)
    tokenizer, template = Tokenizer(config.init / "tokenizer.model"), TEMPLATES.make(model.config.template)
    moving = {name: checkpoint.trainable(part, getattr(config.train, name)) for name, part in model.parts.items()}
    optimizer = make_optimizer(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
    parts = ", ".join(f"{name} {count_parameters(part):,} ({moving[name]:,} trained)" for name, part in model.parts.items())
    if not config.data and (config.dry_run or config.check_data):
        run.say(f"{parts}\nthe pairs will come from {config.scenes} scenes x {config.answers} answers of {config.init}")
        return False

    see = partial(Eyes, model.encoder, model.config.fit, run.device, None if moving["encoder"] else config.feature_cache)
    made_by = fingerprint(model, tokenizer, run)
    sampling = dict(max_new_tokens=96, stop_ids={tokenizer.id(template.stop)},
                    banned=(tokenizer.image, tokenizer.pad, tokenizer.bos))
    ask = Ask(template, tokenizer, model.image_tokens, see(), run.generator(generate, model, temperature=0.0, **sampling))

    if config.data:
        source = preferences.mixture(config.data, config.image_folder, config.allow_urls)
    else:
        source = own_pairs(config, run, model, made_by, ask, partial(run.generator, generate, model, **sampling))
    if config.pairs_only:
        run.say(f"{len(source):,} pairs in {source.path}. Next: the same command without --pairs_only, to learn from them")
        return False
    eyes = see(rank=run.rank, world=run.world, wait=run.wait)
    batches = Batches(
        source,
        partial(preferences.render, template=template, tokenizer=tokenizer, image_tokens=model.image_tokens,
                max_length=config.max_length),
        eyes, batch_size=config.batch_size, window=1, seed=config.seed,
        bad_rows=BadRows(run.out / "bad_rows.jsonl", len(source), config.max_bad), rank=run.rank, world=run.world,
        join=preferences.join)
    per_step = config.accumulate * run.world  # micro-batches a step
    steps = config.max_steps or max(1, round(config.epochs * len(batches) / per_step))
    run.say(f"{parts}\n{len(source):,} pairs, {steps} steps of {config.batch_size * per_step} on {run.world} x {run.device}")
    if config.check_data:
        for row in range(min(3, len(source))):
            pair = batches.render(source[row])
            run.say(f"{pair.id}\nchosen: {marked(pair.chosen, tokenizer)}\nrejected: {marked(pair.rejected, tokenizer)}\n")
    if config.dry_run or config.check_data:
        return False
    eyes.prepare(pictures(batches, steps * per_step), config.feature_cache_gb, run.say)

    wrapped = run.wrap(model, config.compile)
    first_step, position = run.resume(model, optimizer)
    chosen = Chosen(run)
    # Two things make this DPO and not another way to learn from answers: where a batch comes from, and what is minimised.
    reference = make_reference(config, run, model, made_by, batches, steps * per_step)
    stream = compared(batches.start(position), reference, run)
    minimised = partial(preference_objective, algo=config.algo, nll_weight=config.nll_weight)
    options = dataclasses.replace(options, shift=run.state.get("shift", 0.0))
    run.progress(first_step, steps)
    for step in range(first_step, steps + 1):
        last = step == steps

        if last or (step > first_step and step % config.save_every == 0):
            run.save(model, optimizer, tokenizer.file, step, position, shift=options.shift)
        if last or (tasks and config.eval_every and step % config.eval_every == 0):  # step 0 too: what there was before
            scores = {}
            if run.first:
                for name, task in tasks.items():
                    scores.update(evaluate(name, task, "val", ask, config.eval_examples)[0])
                chosen.offer(model, tokenizer, step, scores)
            run.log(step, **scores)
            run.wait()
        if last:
            break

        micro_batches = []
        for _ in range(config.accumulate):
            position, batch = next(stream)
            micro_batches.append(batch)
        pairs_of_step = run.sum(sum(len(batch["keys"]) for batch in micro_batches))

        sums = Counter()
        for batch in micro_batches:
            with run.autocast():
                logps, documents = answer_logps(wrapped, batch)
            loss, measured = minimised(as_pairs(logps, documents, batch["reference"]), options)
            (loss * run.world / pairs_of_step).backward()  # DDP takes the mean over ranks: undo it
            sums.update(measured)

        lr = learning_rate(step, peak=config.lr, warmup=config.warmup, total=steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = clip_gradients(model, config.clip)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {name: run.sum(value) / pairs_of_step for name, value in sums.items()}
        mean_reward = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        options = dataclasses.replace(options, shift=0.9 * options.shift + 0.1 * mean_reward)  # the zero of bco
        run.bar.update()
        run.count(sum(batch["input_ids"].numel() for batch in micro_batches))
        if step % config.log_every == 0:
            run.log(step, **metrics, lr=lr, gradient_norm=norm, tokens_per_second=run.tokens_per_second())

    if run.first:
        draw_curves(run.history, run.out / "curves.png")
        scores = chosen.keep() or scores
        add_scores(run.out, scores)
        page = config.out.parent / "report.md"
        shown = [example for task in tasks.values() for example in task.examples("val", 8)[:14]]
        said = ask([example.prompt for example in shown])
        section(page, f"Preference learning: {run.out.name}", f"{table({**scores, 'seconds': round(run.seconds)})}\n\n"
                f"![]({run.out.name}/curves.png)\n\n{sheet(run.out, page, shown, said)}")
    run.bar.close()
    run.wait()
    return True


# ---------------------------------------------------------------- where a batch comes from


def own_pairs(config: Config, run: Run, model: VLM, made_by: str, ask: Ask, sampler: Callable) -> preferences.PreferenceFile:
    """Pairs of the model's own answers about the world, made by dataset/feedback.py; what was made is not made again."""

    def answers_to(prompts, answers: int, temperature: float) -> list[list[str]]:
        return several(dataclasses.replace(ask, generate=sampler(temperature=temperature)), prompts, answers)

    divider, labeler = divider_and_labeler(config.divider, config.labeler, config.judge)
    labeler = labeler or model_labeler(config, run, model, ask)
    options = dict(scenes=config.scenes, answers=config.answers, temperature=config.temperature, seed=config.seed,
                   balance=config.balance)
    folder = run.out / "feedback" / preferences.fingerprint(made_by, labeler.name, divider.name, repr(options))[:12]
    if run.first:
        world_pairs(answers_to, folder, divider=divider, labeler=labeler, model=made_by, say=run.say, **options)
    run.wait()
    return preferences.load(folder / "pairs.jsonl")


def model_labeler(config: Config, run: Run, model: VLM, ask: Ask) -> Labeler:
    """Labels by yes or no of the model itself, or of another checkpoint with its own tokenizer, template and eyes."""
    if config.labeler != "self":
        folder = Path(config.labeler)
        model = checkpoint.load(folder, run.device)
        ask = Ask(TEMPLATES.make(model.config.template), Tokenizer(folder / "tokenizer.model"), model.image_tokens,
                  Eyes(model.encoder, model.config.fit, run.device, config.feature_cache), ask.generate)
    first_logits = run.generator(lambda model, batch: prefill(model, batch, room=0)[0], model)
    yes_no = YesNo(ask.template, ask.tokenizer, ask.image_tokens, ask.eyes, first_logits)
    return by_model(fingerprint(model, ask.tokenizer, run), yes_no)


def fingerprint(model: VLM, tokenizer: Tokenizer, run: Run) -> str:
    """Tells what a model says from what any other says."""
    return preferences.fingerprint(model.config.to_json(), tokenizer.file.read_bytes(), str(run.dtype), lora.merged(model))


def compared(stream: Iterator[tuple[int, Batch]], reference: Callable[[Batch], Tensor], run: Run) -> Iterator[tuple[int, Batch]]:
    """The same stream, on the device, with what the reference thinks of each answer."""
    for position, batch in stream:
        batch = run.to_device(batch)
        yield position, {**batch, "reference": reference(batch)}


def answer_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every learned token (K,) and its document (K,): one function for the policy and its reference."""
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    learned = targets != IGNORE
    return token_logps(model(batch, learned), targets[learned]), batch["document_ids"][learned]


@torch.no_grad()
def sums_now(model: VLM, run: Run, batch: Batch) -> Tensor:
    """(2N,): the log-probabilities of a batch's answers under the model as it is, in its precision, in evaluation mode."""
    with evaluating(model), run.autocast():
        logps, documents = answer_logps(model, batch)
    return answer_sums(logps, documents, len(batch["ids"]))[0]


def make_reference(config: Config, run: Run, model: VLM, made_by: str, batches: Batches,
                   micro_batches: int) -> Callable[[Batch], Tensor]:
    """Batch -> (2N,) log-probabilities of its answers under the model that this run starts from.

    Called before the first step, or in a resumed run, which reads the file. Where adapters alone are trained, that is the
    model with these switched off. Else they are computed once and kept in a file that says what they were made by: a hash of
    config, tokenizer, precision and weights.
    """
    if config.algo in WITHOUT_REFERENCE:
        return lambda batch: torch.zeros(len(batch["ids"]), device=run.device)
    if all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad):

        def switched_off(batch: Batch) -> Tensor:
            with lora.switched_off(model):
                return sums_now(model, run, batch)

        return switched_off

    file = config.reference or run.out / "reference.npz"
    if config.resume or (config.reference and file.is_file()):
        stored = preferences.Reference.read(file, made_by)
    else:
        logps = {}
        mine = range(run.rank, min(len(batches), micro_batches), run.world)  # an epoch shows every pair
        for number in tqdm(mine, desc="reference", unit="batch", disable=not run.first):
            batch = run.to_device(batches.batch(number))
            logps.update(zip(batch["keys"], map(tuple, sums_now(model, run, batch).view(-1, 2).tolist()), strict=True))
        stored = preferences.Reference(run.union(logps), made_by)
        if run.first:
            stored.write(file)
    return lambda batch: stored.of(batch).to(run.device)


# ---------------------------------------------------------------- what is minimised


def preference_objective(pairs: Pairs, options: PreferenceOptions, algo: str, nll_weight: float) -> tuple[Tensor, dict]:
    """The loss summed over the pairs, and sums over them of all that is logged."""
    preference, nll = PREFERENCE_LOSSES[algo](pairs, options), anchor(pairs)
    loss = preference + nll_weight * nll
    chosen, rejected = rewards(pairs.per_token() if algo in PER_TOKEN else pairs, options.beta)
    mean = pairs.per_token()
    measured = {
        "loss": loss, "preference_loss": preference, "nll": nll, "reward_chosen": chosen, "reward_rejected": rejected,
        "margin": chosen - rejected, "accuracy": (chosen > rejected).float(), "logp_chosen": mean.chosen,
        "logp_rejected": mean.rejected, "length_chosen": pairs.chosen_tokens, "length_rejected": pairs.rejected_tokens,
    }  # fmt: skip
    return loss.sum(), {name: float(values.detach().sum()) for name, values in measured.items()}


# ---------------------------------------------------------------- which checkpoint is kept


def quality(scores: dict[str, float]) -> float | None:
    """(1 - CHAIR_s) x Cover: nothing that is not there, and all that is. Either alone is won by silence or by chatter."""
    found = {name.rpartition("/")[2]: value for name, value in scores.items() if name.startswith("hallucination")}
    return round((1 - found["chair_s"]) * found["cover"], 4) if found else None


class Chosen:
    """The best checkpoint of a run on the validation split, in OUT/chosen; without `hallucination` in --bench, the last one.

    What a resumed run has seen of it stands in its log.
    """

    def __init__(self, run: Run):
        self.run, self.folder = run, run.out / "chosen"
        rows = [(quality(row), row) for row in run.history if row["step"] > 0 and quality(row) is not None]
        self.best, self.scores = max(rows, key=lambda pair: pair[0], default=(-math.inf, {}))
        if run.first and not rows:
            shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, model: VLM, tokenizer: Tokenizer, step: int, scores: dict[str, float]) -> None:
        value = quality(scores)
        if step > 0 and value is not None and value > self.best:
            self.best, self.scores = value, {"step": step, **scores}
            checkpoint.save(self.folder, model, tokenizer.file)

    def keep(self) -> dict[str, float]:
        """Put the best one into OUT; returns its scores, {} where there was no choice."""
        if self.folder.is_dir():
            copy_checkpoint(self.folder, self.run.out)
            self.run.say(f"step {self.scores['step']} is kept: (1 - CHAIR_s) x Cover = {self.best:.3f}")
        best = self.best if self.folder.is_dir() else 0.0
        (self.run.out / "chosen.json").write_text(json.dumps({"quality": best}))
        return {name: value for name, value in self.scores.items() if name not in ("step", "seconds")}


def copy_checkpoint(source: Path, target: Path) -> None:
    """The three files of a checkpoint, each replaced in one move."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        checkpoint.write(target / name, partial(shutil.copyfile, source / name))


if __name__ == "__main__":
    cli.run(main, Config)

"""Stage 1, pretraining: a language model learns to put into words what an encoder sees.

A frozen CLIP turns a picture into P tokens, one linear projection turns them into the language model's channels, and the
language model writes the caption. With a pretrained language model this stage trains the projection alone (--train.llm freeze);
by default nothing pretrained exists, so it trains both. On data without pictures it pretrains the language model alone.

Nine nouns, here and everywhere:
    Picture        an image that is opened when it is needed (dataset/images.py)
    Conversation   messages of text and pictures: a row of data (dataset/chat.py)
    Document       its tokens, and which of them are learned
    batch          documents end to end, as tensors (dataset/collate.py)
    Processor      makes documents and batches for one model (dataset/processor.py)
    VLM            encoder -> connector -> language model (model/vlm.py)
    Task           data to learn from, questions, and a score for answers (dataset/tasks/)
    checkpoint     a folder with weights, config.json and tokenizer (model/checkpoint.py)
    Run            one training: its flags, device, processes, log and folder (model/runtime.py)

In:  captions (default: the embedded world).  Out: out/pretrain, a checkpoint; log.jsonl, curves.png, out/report.md.

    python 1-pretrain_vlm.py                                        a good minute on two CPU cores
    python 1-pretrain_vlm.py --preset small --data llava_cc3m_595k.json --image_folder images
    python 1-pretrain_vlm.py --llm gpt:HuggingFaceTB/SmolLM2-135M-Instruct --train.llm freeze --optimizer adamw --lr 3e-3
    torchrun --nproc_per_node 2 1-pretrain_vlm.py
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model import cli


@dataclass
class Config:
    preset: str = "nano"  # nano: minutes on a CPU | small: 26M, GPT 512 x 8 | base: 104M, 768 x 16; small:hidden_size=640 resizes
    data: tuple[str, ...] = cli.data_flag(("world", "easy_vqa:0.5"))  # tasks or files, by weight: world captions.jsonl:0.5
    init: Path | None = None  # a checkpoint to start from; default: random weights
    adapter: Path | None = None  # adapter.safetensors of an earlier LoRA run from --init, to go on from
    tokenizer: Path | None = None  # a sentencepiece model, whose vocabulary sizes the language model; default: dataset/'s
    encoder: str = ""  # an encoder by name, in place of the preset's; `python -m model.registry` lists them
    connector: str = ""  # a connector by name
    llm: str = ""  # gpt, random; or pretrained, gpt:FOLDER or :OWNER/NAME (Llama, Qwen, MiniMind), huggingface:... (any other)
    template: str = ""  # how conversations are written; default: pupil, or the pretrained model's; pretrain: caption, no roles
    fit: str = "square"  # how pictures are fitted: square (crop) | pad | stretch; stored in the checkpoint
    tiles: cli.CountOrZero = 0  # cut a large picture into at most so many tiles, seen after the whole of it; 0: none; stored too
    train: cli.Train = field(default_factory=cli.Train)
    epochs: cli.Positive = 0.55  # passes over the data; 15,000 captions and inventories are enough
    batch_size: cli.Count = cli.data_flag(40)  # captions a rank and micro-step
    accumulate: cli.Count = cli.data_flag(1)  # micro-steps a step: 8 on one GPU make the same step as 1 on eight
    max_length: cli.Count = cli.data_flag(1024)  # tokens of a row, at most the model's context; longer ones lose their end
    lr_end: cli.Share = 0.5  # share of the peak learning rate at the last step: high, for stage 2 goes on from there
    shard: str = "ddp"  # with torchrun: ddp: the whole model on each rank | zero2 | zero3: divided among them
    optim: cli.SharedOptimizerFlags = cli.optim("muon", lr=8e-3, warmup=20)  # small and base on real captions: --lr 4e-4
    run: cli.SharedFlags = cli.shared("out/pretrain", "world", eval_every=0, eval_examples=60, save_every=200, log_every=20)


if __name__ == "__main__":  # before the imports below, which take seconds: --help and mistakes are answered at once
    config = cli.parse(Config)

import torch.nn.functional as F

from dataset.evaluation import Answerer, make_tasks, validate
from dataset.figures.finish import finish_figures
from dataset.formats.native import language
from dataset.mixture import mixture, training_batches
from dataset.own_rows import shown
from dataset.processor import Processor
from dataset.report import finish_stage
from dataset.tokenizer import Tokenizer, load_tokenizer
from model import checkpoint
from model.best import BestCheckpoint, HeldOutCheck, mean_loss
from model.config import preset
from model.generate import generate
from model.inspection import Inspector
from model.llm import pretrained
from model.losses import IGNORE, count_learned, next_token_targets
from model.optimizer import clip_gradients, lr_multiplier
from model.registry import UserError
from model.runtime import Run, prepare
from model.vlm import VLM

NEW_MODEL_FLAGS = ("preset", "tokenizer", "encoder", "connector", "llm", "template", "fit")  # --init has its own


def starting_model(config: Config, run: Run) -> tuple[VLM, Tokenizer]:
    """The model of --init, or a new one: random, or around a pretrained language model. UserError for flags without use."""
    if config.init:
        if given := [name for name in NEW_MODEL_FLAGS if getattr(config, name) != getattr(Config(), name)]:
            raise UserError(f"the model in {config.init} has its own: leave out --{', --'.join(given)}, or --init")
        model = checkpoint.load(config.init).train()
        model.config = dataclasses.replace(model.config, tiles=config.tiles or model.config.tiles)
        return model, load_tokenizer(checkpoint.tokenizer_file(config.init))
    start = pretrained.start(config.llm)
    tokenizer, template = language(start.folder, config.tokenizer, config.template)
    model = VLM(start.config(preset(
        config.preset, encoder=config.encoder, connector=config.connector, template=template, fit=config.fit,
        tiles=config.tiles, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image)))
    run.print0(start.fill(model.llm, model.connector))
    return model, tokenizer


def main(config: Config) -> None:
    tasks = make_tasks(config.run.bench, config.data)  # a wrong name fails here, not after training
    for name, task in tasks.items():
        if not any(example.kind == "caption" for example in task.examples("val", 8)):
            raise UserError(f"--bench {name}: captions are all that this stage is asked for, and it has none: leave it out")
    run = Run(config.run, "pretrain", config)

    # The model: three parts, of which the recipe says what is trained.
    model, tokenizer = starting_model(config, run)
    model.to(run.device)
    wrapped, optimizer = prepare(model, run, config.train, config.optim, adapter=config.adapter, shard=config.shard)

    # The data: conversations -> documents -> batches; of a frozen encoder, features instead of pixels.
    processor = Processor.of(model, tokenizer, run, run.feature_cache(model))
    source = mixture(config.data, "pretrain", config.run.image_folder, config.run.allow_urls)
    batches, steps, held_out = training_batches(source, processor, config, run)
    if config.run.check_data:
        return
    answer = Answerer.greedy(processor, run.generator, generate, model, max_new_tokens=64)

    first_step, position = run.resume(model, optimizer)
    own = HeldOutCheck(run, held_out, steps, partial(mean_loss, model, run), BestCheckpoint(run, "held_out/loss"))
    stream = batches.stream(position, run.data_ranks)
    for step in run.steps(first_step, steps):
        # Save and evaluate; the last round does nothing else, so that the last update is saved and can be the best.
        last = step == steps
        if last or run.save_due(step):
            run.save(model, optimizer, tokenizer.file, step, stream.position)
        if not last and step > 0 and config.run.eval_every and step % config.run.eval_every == 0:
            # Of a task's questions, captions: all that the model has been shown.
            validate(tasks, answer, config.run.eval_examples, run, step, kinds=("caption",))
        own.check(model, tokenizer.file, step, last)  # rows of files: their loss, which chooses the checkpoint
        if last:
            break

        # The loss is a sum over learned tokens, divided by those of the whole step: of all micro-batches, on all ranks.
        micro_batches = [run.to_device(next(stream)) for _ in range(config.accumulate)]
        learned_tokens = run.sum(sum(count_learned(batch) for batch in micro_batches))
        loss_sum = 0.0
        for batch in run.micro_steps(wrapped, micro_batches):
            targets = next_token_targets(batch["labels"], batch["document_ids"])  # (B, T): labels, shifted by one
            learned = targets != IGNORE
            with run.autocast():
                logits = wrapped(batch, learned)  # (L, V): no logits where nothing is learned
            loss = F.cross_entropy(logits.float(), targets[learned], reduction="sum")
            (loss * run.world_size / learned_tokens).backward()  # DDP takes the mean over ranks: undo it
            loss_sum += loss.item()

        rates = optimizer.scale_lr(lr_multiplier(step, warmup=config.optim.warmup, total=steps, floor=config.lr_end))
        step_loss, norm = run.sum(loss_sum) / learned_tokens, clip_gradients(model, config.optim.clip)
        if run.is_finite(step, micro_batches, step_loss, norm):  # else the step is left out
            optimizer.step()
        optimizer.zero_grad()

        run.log_step(step, micro_batches, loss=step_loss, **rates, gradient_norm=norm)

    if config.run.dry_run:
        return
    answer = Answerer.greedy(processor, run.generator, generate, own.keep(model), max_new_tokens=64)
    scores = validate(tasks, answer, config.run.eval_examples, run, steps, kinds=("caption",))
    captions = [(task, example) for task in tasks.values() for example in task.examples("val", 8) if example.kind == "caption"]
    finish_stage(run, "Pretraining", {**scores, **own.scores}, [*captions, *shown(held_out)], answer)
    finish_figures(run, Inspector)
    run.finish(f"wrote {run.out}", f"python 2-sft_vlm.py --init {run.out}")


if __name__ == "__main__":
    cli.run(main, config)

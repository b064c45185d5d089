"""Stage 1, pretraining: a language model learns to put into words what an encoder sees.

A frozen CLIP turns a picture into P tokens, one linear projection turns them into the language model's channels, and the
language model writes the caption. With a pretrained language model this stage trains the projection alone (--train.llm freeze);
by default nothing pretrained exists, so it trains both. On data without pictures it pretrains the language model alone.

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

from dataset.chat import render
from dataset.collate import Batches
from dataset.evaluation import Ask, add_scores, evaluate
from dataset.formats.conversations import BadRows
from dataset.formats.native import language
from dataset.mixture import look, mixture, pictures
from dataset.report import marked, section, sheet, table
from dataset.tokenizer import load_tokenizer
from dataset.vision.image_processor import Eyes
from model import checkpoint, cli, recipe
from model.config import preset
from model.generate import generate
from model.llm import pretrained
from model.losses import IGNORE, cross_entropy_sum, next_token_targets
from model.optimizer import make_optimizer
from model.registry import TASKS, TEMPLATES, specs
from model.runtime import Run, clip_gradients, learning_rate
from model.vlm import VLM, count_parameters


@dataclass
class Train:
    connector: str = "full"  # freeze | full | partial:K (the last K linear maps) | lora:R
    llm: str = "full"  # freeze | full | partial:K (the last K blocks) | lora:R (adapters of rank R)
    encoder: str = "freeze"  # the same; trained, it sees pixels at every step instead of cached features


@dataclass
class Config:
    preset: str = "nano"  # nano: minutes on a CPU | small: 26M, GPT 512 x 8 | base: 104M, GPT 768 x 16
    data: tuple[str, ...] = ("world", "easy_vqa:0.5")  # tasks or files, mixed: world, captions.jsonl, more.parquet:0.5
    image_folder: Path | None = None  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    init: Path | None = None  # a checkpoint to start from; default: random weights
    adapter: Path | None = None  # adapter.safetensors of an earlier LoRA run from --init, to go on from
    tokenizer: Path | None = None  # a sentencepiece model, whose vocabulary sizes the language model; default: dataset/'s
    out: Path = Path("out/pretrain")  # where the checkpoint goes
    encoder: str = ""  # an encoder by name, in place of the preset's; `python -m model.registry` lists them
    connector: str = ""  # a connector by name
    llm: str = ""  # gpt, random; or pretrained, gpt:FOLDER or :OWNER/NAME (Llama, Qwen, MiniMind), huggingface:... (any other)
    template: str = ""  # how conversations are written; default: pupil, or the pretrained model's; pretrain: caption, no roles
    fit: str = "square"  # how pictures are fitted: square (crop) | pad | naive (squeeze); stored in the checkpoint
    tiles: int = 0  # cut a large picture into at most so many tiles, seen after the whole of it; 0: none; stored as well
    train: Train = field(default_factory=Train)
    epochs: float = 0.55  # passes over the data; 15,000 captions and inventories are enough
    max_steps: int = 0  # stop after so many steps; 0: after the epochs
    batch_size: int = 40  # conversations a process and micro-step
    accumulate: int = 1  # micro-steps a step
    max_length: int = 1024  # tokens of a conversation, at most the model's context; longer ones lose their end
    optimizer: str = "muon"  # muon (matrices of blocks and connector; AdamW for the rest) | adamw
    lr: float = 8e-3  # peak learning rate; small and base on real captions: 4e-4
    lr_encoder: float = 0.0  # peak learning rate of the encoder alone; 0: --lr
    lr_connector: float = 0.0  # of the connector alone
    lr_llm: float = 0.0  # of the language model alone
    warmup: int = 20  # steps of rising learning rate
    lr_end: float = 0.5  # of the peak, at the last step; not lower, for stage 2 goes on, and what is not found yet needs it high
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bench: str = "world"  # tasks whose captions are checked on their validation split, with commas between; "" for none
    eval_every: int = 0  # steps between checks; 0: at the end alone
    eval_examples: int = 60  # pictures' worth of questions a check asks
    save_every: int = 200  # steps between saves for --resume; the end is always saved
    log_every: int = 20  # steps between lines of log.jsonl
    max_bad: float = 0.01  # share of bad rows that stops the run
    feature_cache: Path = Path("out/features")  # features of the frozen encoder, computed once
    feature_cache_gb: float = 8.0  # above this the encoder runs at every step instead
    resume: bool = False  # go on exactly where the run in --out stopped
    shard: str = "ddp"  # with torchrun: ddp: the whole model on each process | zero2 | zero3: divided among them
    checkpointing: bool = False  # less memory for one more forward pass: activations are computed again, not kept
    compile: bool = False  # torch.compile: a minute of waiting, then faster on a GPU
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps
    wandb: bool = False  # log to Weights & Biases as well
    dry_run: bool = False  # print parameters, rows and steps, and stop
    check_data: bool = False  # print three rows of each --data as the model reads them, what is learned in 【brackets】, and stop


CHOSEN_AT_BIRTH = ("preset", "tokenizer", "encoder", "connector", "llm", "template", "fit")  # of a model: --init has them


def main(config: Config) -> None:
    tasks = {name: TASKS.make(name) for name in specs(config.bench)}  # a wrong name fails here, not after training
    refuse_what_is_not_used(config, tasks)
    run = Run(config, "pretrain")
    if config.init:
        model, tokenizer = checkpoint.load(config.init).train(), load_tokenizer(checkpoint.tokenizer_file(config.init))
        model.config = dataclasses.replace(model.config, tiles=config.tiles or model.config.tiles)
    else:
        start = pretrained.start(config.llm)  # random weights, or those of a pretrained language model
        tokenizer, template = language(start.folder, config.tokenizer, config.template)
        model = VLM(start.config(preset(
            config.preset, encoder=config.encoder, connector=config.connector, template=template, fit=config.fit,
            tiles=config.tiles, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image)))
        run.say(start.fill(model.llm))
    model.to(run.device)
    modes = {name: getattr(config.train, name) for name in model.parts}
    moving = recipe.apply(model, modes, config.checkpointing, config.adapter)
    wrapped = run.wrap(model, config.compile, config.shard)
    optimizer = make_optimizer(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
                               own_lr={"encoder": config.lr_encoder, "connector": config.lr_connector, "llm": config.lr_llm})

    # The data: conversations -> documents -> batches; of a frozen encoder, features instead of pixels.
    template = TEMPLATES.make(model.config.template)
    source = mixture(config.data, "pretrain", config.image_folder, config.allow_urls)
    see = partial(Eyes, model.encoder, model.config.fit, model.config.tiles, run.device,
                  None if moving["encoder"] else config.feature_cache)
    eyes = see(rank=run.rank, world=run.world, wait=run.wait)
    batches = Batches(
        source,
        partial(render, template=template, tokenizer=tokenizer, image_tokens=model.image_tokens,
                max_length=min(config.max_length, model.config.llm.max_position_embeddings), views=eyes.views),
        eyes, batch_size=config.batch_size, window=1, seed=config.seed,
        bad_rows=BadRows(run.out / "bad_rows.jsonl", len(source), config.max_bad), rank=run.rank, world=run.world)
    per_step = config.accumulate * run.world  # micro-batches a step
    steps = config.max_steps or max(1, round(config.epochs * len(batches) / per_step))
    parts = ", ".join(f"{name} {count_parameters(part):,} ({moving[name]:,} trained)" for name, part in model.parts.items())
    run.say(f"{parts}\n{len(source):,} rows, {steps} steps of {config.batch_size * per_step} on {run.world} x {run.device}")
    if config.check_data:
        look(source, lambda row: f"{row.id}: {marked(batches.render(row), tokenizer)}", run.say)
    if config.dry_run or config.check_data:
        return
    eyes.prepare(partial(pictures, batches, steps * per_step), config.feature_cache_gb, run.say)

    ask = Ask(template, tokenizer, model.image_tokens, see(), run.generator(
        generate, model, max_new_tokens=64, stop_ids={tokenizer.id(template.stop)}, temperature=0.0,
        banned=(tokenizer.image, tokenizer.pad, tokenizer.bos)))

    first_step, position = run.resume(model, optimizer)
    stream = batches.start(position)
    run.progress(first_step, steps)
    for step in range(first_step, steps + 1):
        last = step == steps

        # Evaluate and save; the last round does nothing else, so that the last update is saved too.
        if last or (step > first_step and step % config.save_every == 0):
            run.save(model, optimizer, tokenizer.file, step, position)
        if last or (step > 0 and config.eval_every and step % config.eval_every == 0):
            scores = {}
            run.gather(model)  # --shard: it is whole until the next step, for one process asks it alone
            if run.first:
                for name, task in tasks.items():  # of a task's questions, captions: all it has been shown
                    scores.update(evaluate(name, task, "val", ask, config.eval_examples, kinds=("caption",))[0])
            run.log(step, **scores)
            run.wait()
        if last:
            break

        # A step's micro-batches; the loss is divided by the learned tokens of all of them, on all ranks.
        micro_batches = []
        for _ in range(config.accumulate):
            position, batch = next(stream)
            batch = run.to_device(batch)
            micro_batches.append((batch, next_token_targets(batch["labels"], batch["document_ids"])))
        learned_tokens = run.sum(sum(int((targets != IGNORE).sum()) for _, targets in micro_batches))

        loss_sum = 0.0
        for batch, targets in micro_batches:
            learned = targets != IGNORE
            with run.autocast():
                logits = wrapped(batch, learned)  # (learned tokens, V): no logits where nothing is learned
            loss = cross_entropy_sum(logits, targets[learned])
            (loss * run.world / learned_tokens).backward()  # DDP takes the mean over ranks: undo it
            loss_sum += loss.detach()

        rates = optimizer.set_lr(partial(learning_rate, step, warmup=config.warmup, total=steps, floor=config.lr_end))
        norm = clip_gradients(model, config.clip)
        optimizer.step()
        optimizer.zero_grad()

        run.bar.update()
        run.count(sum(batch["input_ids"].numel() for batch, _ in micro_batches))
        if step % config.log_every == 0:
            run.log(step, loss=run.sum(float(loss_sum)) / learned_tokens, **rates, gradient_norm=norm,
                    tokens_per_second=run.tokens_per_second())

    if run.first:
        add_scores(run.out, scores)
        page = run.out.parent / "report.md"
        shown = [example for task in tasks.values() for example in task.examples("val", 8) if example.kind == "caption"]
        said = ask([example.prompt for example in shown])
        section(page, "Pretraining", f"{table({**scores, 'seconds': round(run.seconds)})}\n\n"
                f"![]({run.out.name}/curves.png)\n\n{sheet(run.out, page, shown, said)}")
    run.finish(f"wrote {run.out}", f"python 2-sft_vlm.py --init {run.out}")


def refuse_what_is_not_used(config: Config, tasks: dict) -> None:
    """ValueError for flags that --init has an answer to already, and for tasks that have no caption to ask for."""
    if config.init and (given := [name for name in CHOSEN_AT_BIRTH if getattr(config, name) != getattr(Config(), name)]):
        raise ValueError(f"the model in {config.init} has its own: leave out --{', --'.join(given)}, or --init")
    for name, task in tasks.items():
        if not any(example.kind == "caption" for example in task.examples("val", 8)):
            raise ValueError(f"--bench {name}: captions are all that this stage is asked for, and it has none: leave it out")


if __name__ == "__main__":
    cli.run(main, Config)

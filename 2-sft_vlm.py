"""Stage 2, supervised fine-tuning: from describing pictures to answering what is asked.

The data are conversations: one picture or several, one turn or many, some without a picture, some with their reasoning in
<think>...</think><answer>...</answer>, so that RL can start from it. Only the assistant's words and its end of turn are learned.

In:  out/pretrain and conversations (default: world, easy_vqa, arithmetic, text).  Out: out/sft, as in stage 1.

    python 2-sft_vlm.py                                             five minutes on two CPU cores
    python 2-sft_vlm.py --data world my_rows.jsonl:2 --image_folder pictures
    python 2-sft_vlm.py --data llava_instruct_230k.parquet --init out/pretrain --lr 4e-5 --batch_size 16
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dataset.chat import render
from dataset.collate import Batches
from dataset.evaluation import Ask, add_scores, evaluate
from dataset.formats.conversations import BadRows
from dataset.mixture import look, mixture, pictures
from dataset.report import marked, section, sheet, table
from dataset.tokenizer import load_tokenizer
from dataset.vision.image_processor import Eyes
from model import checkpoint, cli, recipe
from model.generate import generate
from model.losses import IGNORE, cross_entropy_sum, next_token_targets
from model.optimizer import make_optimizer
from model.registry import TASKS, TEMPLATES, specs
from model.runtime import Run, clip_gradients, learning_rate
from model.vlm import count_parameters

MIXTURE = ("world:1.2", "easy_vqa:1.5", "arithmetic:read=1600,brief=0.45", "arithmetic:text=true,rows=1200,lists=1000",
           "text:1.25")


@dataclass
class Train:
    connector: str = "full"  # freeze | full | partial:K (the last K linear maps) | lora:R
    llm: str = "full"  # freeze | full | partial:K (the last K blocks) | lora:R (adapters of rank R)
    encoder: str = "freeze"  # freeze | full | partial:K | lora:R; trained, it sees pixels, not cached features


@dataclass
class Config:
    data: tuple[str, ...] = MIXTURE  # tasks or files, by weight: world my_rows.jsonl:2
    image_folder: Path | None = None  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    init: Path = Path("out/pretrain")  # the checkpoint to start from
    adapter: Path | None = None  # adapter.safetensors of an earlier LoRA run from --init, to go on from
    out: Path = Path("out/sft")  # where the checkpoint goes
    template: str = ""  # how conversations are written; default: as the checkpoint does
    train: Train = field(default_factory=Train)
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # stop after so many steps; 0: after the epochs
    batch_size: int = 40  # conversations a process and micro-step
    accumulate: int = 1  # micro-steps a step
    max_length: int = 1024  # tokens of a conversation, at most the model's context; longer ones lose their end
    optimizer: str = "muon"  # muon (matrices of blocks and connector; AdamW for the rest) | adamw
    lr: float = 8e-3  # peak learning rate; small and base on real conversations: 4e-5
    lr_encoder: float = 0.0  # peak learning rate of the encoder alone; 0: --lr
    lr_connector: float = 0.0  # of the connector alone
    lr_llm: float = 0.0  # of the language model alone
    warmup: int = 20  # steps of rising learning rate
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bench: str = "world,easy_vqa,arithmetic"  # tasks to check on their validation split; "" for none
    eval_every: int = 0  # steps between checks; 0: at the end alone
    eval_examples: int = 30  # pictures' worth of questions a check asks of each task
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


def main(config: Config) -> None:
    tasks = {name: TASKS.make(name) for name in specs(config.bench)}  # a wrong name fails here, not after training
    run = Run(config, "sft")
    model = checkpoint.load(config.init).train().to(run.device)
    if config.template:
        model.config = dataclasses.replace(model.config, template=config.template)
    tokenizer, template = load_tokenizer(checkpoint.tokenizer_file(config.init)), TEMPLATES.make(model.config.template)
    modes = {name: getattr(config.train, name) for name in model.parts}
    moving = recipe.apply(model, modes, config.checkpointing, config.adapter)
    wrapped = run.wrap(model, config.compile, config.shard)
    optimizer = make_optimizer(model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay,
                               own_lr={"encoder": config.lr_encoder, "connector": config.lr_connector, "llm": config.lr_llm})

    source = mixture(config.data, "sft", config.image_folder, config.allow_urls)
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
        generate, model, max_new_tokens=128, stop_ids={tokenizer.id(template.stop)}, temperature=0.0,
        banned=(tokenizer.image, tokenizer.pad, tokenizer.bos)))

    first_step, position = run.resume(model, optimizer)
    stream = batches.start(position)
    run.progress(first_step, steps)
    for step in range(first_step, steps + 1):
        last = step == steps

        if last or (step > first_step and step % config.save_every == 0):
            run.save(model, optimizer, tokenizer.file, step, position)
        if last or (step > 0 and config.eval_every and step % config.eval_every == 0):
            scores = {}
            run.gather(model)  # --shard: it is whole until the next step, for one process asks it alone
            if run.first:
                for name, task in tasks.items():
                    scores.update(evaluate(name, task, "val", ask, config.eval_examples)[0])
            run.log(step, **scores)
            run.wait()
        if last:
            break

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
                logits = wrapped(batch, learned)  # (learned tokens, V)
            loss = cross_entropy_sum(logits, targets[learned])
            (loss * run.world / learned_tokens).backward()
            loss_sum += loss.detach()

        rates = optimizer.set_lr(partial(learning_rate, step, warmup=config.warmup, total=steps))
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
        shown = [example for task in tasks.values() for example in task.examples("val", 2)[:14]]
        said = ask([example.prompt for example in shown])
        section(page, "Supervised fine-tuning", f"{table({**scores, 'seconds': round(run.seconds)})}\n\n"
                f"![]({run.out.name}/curves.png)\n\n{sheet(run.out, page, shown, said)}")
    run.finish(f"wrote {run.out}", f"python 4-eval_chat.py --model {run.out}, python web_demo.py --model {run.out}, "
                                   f"or python 3-rl_vlm.py --init {run.out}")


if __name__ == "__main__":
    cli.run(main, Config)

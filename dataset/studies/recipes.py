"""Which connector, and which parts to train? One table, with equal steps for each row.

In:  names of connectors, and recipes ENCODER/CONNECTOR/LLM of modes for stage 2 (model/recipe.py).
Out: out/recipes/stage-1-CONNECTOR and NAME/sft, as the scripts write them; out/recipes/table.md, which is also printed.

    python -m dataset.studies.recipes                                       all connectors, and five recipes
    python -m dataset.studies.recipes --connectors linear --recipes freeze/full/lora:8 --steps 20 --examples 5

The numbered scripts run as processes. A finished row with the same settings is reused.
"""
from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dataset.studies.scripts import ScriptError, markdown, start
from model.registry import CONNECTORS, ENCODERS


@dataclass
class Config:
    connectors: tuple[str, ...] = ()  # connectors, each with both stages; default: all in the registry
    recipes: tuple[str, ...] = (  # ENCODER/CONNECTOR/LLM of stage 2, after one shared stage 1
        "freeze/full/freeze", "freeze/freeze/full", "freeze/full/partial:1", "freeze/full/lora:8", "partial:1/full/full",
    )
    base: str = "pixel_shuffle_compare"  # the connector of the recipes
    steps: int = 300  # training steps of each stage
    batch_size: int = 40  # conversations a step
    examples: int = 200  # pictures of each benchmark; 0: all of its test set
    seed: int = 0  # seed of every run
    device: str = "auto"  # device of every run
    out: Path = Path("out/recipes")  # folder of the results


def stage(config: Config, script: str, out: Path, *arguments) -> str:
    """Run stage 1 or 2 with the shared settings and return what it printed."""
    return start(script, "--out", out, "--max_steps", config.steps, "--batch_size", config.batch_size, "--seed", config.seed,
                 "--device", config.device, "--log_every", max(1, config.steps // 20), "--bench", "",
                 "--overwrite", *arguments)  # fmt: skip


def row(config: Config, name: str, connector: str, recipe: str) -> dict:
    """Run stage 1 if it is missing, stage 2 and the benchmarks; returns the facts of the row, which row.json keeps."""
    folder, settings = config.out / name.replace("/", "-").replace(":", ""), [connector, recipe, *settings_of(config)]
    file = folder / "row.json"
    if file.is_file() and (saved := json.loads(file.read_text()))["settings"] == settings:
        return saved
    first, first_settings = config.out / f"stage-1-{connector.replace(':', '-')}", [connector, *settings_of(config)]
    if not (first / "made.json").is_file() or json.loads((first / "made.json").read_text()) != first_settings:
        stage(config, "1-pretrain_vlm.py", first, "--connector", connector)
        (first / "made.json").write_text(json.dumps(first_settings))
    encoder, of_connector, llm = recipe.split("/")
    output = stage(config, "2-sft_vlm.py", folder / "sft", "--init", first, "--train.encoder", encoder,
                   "--train.connector", of_connector, "--train.llm", llm)  # fmt: skip
    start("4-eval_chat.py", "--model", folder / "sft", "--bench", "world,easy_vqa", "--examples", config.examples,
          "--controls", 0, "--max_new_tokens", 96, "--device", config.device)  # fmt: skip
    facts = {"settings": settings, "trained": trained(output), "tokens": visual_tokens(folder / "sft"),
             "speed": samples_per_second(folder / "sft" / "log.jsonl", config.batch_size),
             **json.loads((folder / "sft" / "scores.json").read_text())}  # fmt: skip
    file.write_text(json.dumps(facts, indent=1))
    return facts


def settings_of(config: Config) -> list[int]:
    return [config.steps, config.batch_size, config.examples, config.seed]


def trained(output: str) -> int:
    """The trained parameters of all three parts, from the output of a script."""
    counts = re.findall(r"\w+ [\d,]+ \(([\d,]+) trained\)", output)
    if len(counts) != 3:
        raise ValueError(f"the script printed {len(counts)} parts, not three: {output[:300]}")
    return sum(int(count.replace(",", "")) for count in counts)


def visual_tokens(folder: Path) -> int:
    """Tokens of a picture in the language model, from the config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = ENCODERS.make(config["encoder"])
    return CONNECTORS.make(config["connector"], encoder=encoder, channels=config["llm"]["hidden_size"]).tokens


def samples_per_second(log: Path, batch_size: int) -> float | None:
    """Conversations trained per second between the first and the last line of the log; None if it has only one."""
    rows = [entry for line in log.read_text().splitlines() if "loss" in (entry := json.loads(line))]
    steps, seconds = rows[-1]["step"] - rows[0]["step"], rows[-1]["seconds"] - rows[0]["seconds"]
    return steps * batch_size / seconds if steps and seconds > 0 else None


HEAD = ("", "world", "easy-VQA", "trained parameters", "tokens a picture", "samples/s")


def cells(name: str, facts: dict) -> list[str]:
    """The cells of a row of the table."""
    if "error" in facts:
        return [name, facts["error"].replace("|", "\\|"), "", "", "", ""]
    speed = f"{facts['speed']:.0f}" if facts["speed"] else "-"
    return [name, f"{100 * facts['world/exact']:.1f} %", f"{100 * facts['easy_vqa/accuracy']:.1f} %", f"{facts['trained']:,}",
            str(facts["tokens"]), speed]  # fmt: skip


def main(config: Config) -> None:
    for recipe in config.recipes:
        if recipe.count("/") != 2:
            raise SystemExit(f"--recipes are ENCODER/CONNECTOR/LLM, as freeze/full/lora:8, not {recipe!r}")
    config = dataclasses.replace(config, connectors=config.connectors or tuple(CONNECTORS.names()))
    runs = {name: (name, "freeze/full/full") for name in config.connectors}
    runs.update({recipe: (config.base, recipe) for recipe in config.recipes})
    rows = {}
    for name, (connector, recipe) in runs.items():
        try:
            rows[name] = row(config, name, connector, recipe)
        except ScriptError as failed:  # the row of a connector that does not fit the encoder shows the error
            rows[name] = {"error": str(failed)}
        print(f"| {' | '.join(cells(name, rows[name]))} |", flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    table = markdown(HEAD, [cells(*row) for row in rows.items()])
    (config.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{config.steps} steps of {config.batch_size} in each stage. Wrote {config.out / 'table.md'}")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))

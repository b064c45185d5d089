"""The tokenizer and the template of a pretrained language model.

In:  the folder of the model, or None, and --tokenizer and --template.  Out: a tokenizer, and the name of a template.

The model states its template as a Jinja program. The program runs on one conversation, in Jinja's sandbox. A template of ours
that writes exactly the same text is the model's own; without one, the user has to choose.
"""
from __future__ import annotations

import json
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dataset.chat import Template
from dataset.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from model.registry import TEMPLATES, UserError

# With a system turn, because many templates invent one where it is missing.
PROBE = (("system", "Be short."), ("user", "What is it?"), ("assistant", "A pear."), ("user", "Are you sure?"))


def language(folder: Path | None, tokenizer: Path | None, template: str) -> tuple[Tokenizer, str]:
    """(tokenizer, template) of the model in the folder; without one, of the flags, or our own ("": the preset's template)."""
    if folder is None:
        return load_tokenizer(tokenizer or MODEL_FILE), template
    if tokenizer:
        raise UserError(f"--tokenizer {tokenizer} goes with random weights: the language model in {folder} has its own")
    return load_tokenizer(folder / "tokenizer.json"), template or template_of(folder)


def template_of(folder: Path) -> str:
    """The name of the template that the model was trained with. UserError where it states none, or none of ours."""
    own = spelled_by_jinja(folder, PROBE)
    for name in TEMPLATES.names():
        if spelled(TEMPLATES.make(name), PROBE) == own:
            return name
    stated = "states no chat template" if own is None else f"writes a conversation as none of our templates does: {own!r}"
    raise UserError(f"{folder} {stated}. Choose one with --template ({', '.join(TEMPLATES.names())}), "
                     f"or add its own to dataset/formats/templates.py")


def spelled(template: Template, messages: tuple[tuple[str, str], ...]) -> str:
    """The text that a template makes from (role, text) pairs, up to where the assistant's next words begin."""
    text = template.begin
    for role, words in messages:
        before, after = getattr(template, role)
        text += before + words + (template.stop if role == "assistant" else "") + after
    return text + template.assistant[0]


def spelled_by_jinja(folder: Path, messages: tuple[tuple[str, str], ...]) -> str | None:
    """The same text by the model's own program, in chat_template.jinja or tokenizer_config.json; None where there is none."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    program = config.get("chat_template")
    if isinstance(program, list):  # several programs by name
        program = next((entry["template"] for entry in program if entry["name"] == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        program = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if program is None:
        return None

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.globals["raise_exception"] = refuse
    tokens = {key: token["content"] if isinstance(token, dict) else token
              for key, token in config.items() if key.endswith("_token") and token}
    try:
        return sandbox.from_string(program).render(
            messages=[{"role": role, "content": words} for role, words in messages], add_generation_prompt=True, **tokens)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {folder} does not run ({error}): choose one with --template") from error

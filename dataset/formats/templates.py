"""Chat templates of other models, for pretrained language models: --llm gpt:FOLDER selects its own (native.py).

In:  a name.  Out: a `Template` (dataset/chat.py).  A new one is one more function in any file of this folder.
"""

import dataclasses

from dataset.chat import Template
from model.registry import TEMPLATES


@TEMPLATES.register("chatml")
def chatml() -> Template:
    """<|im_start|>ROLE ... <|im_end|>: Qwen, SmolLM2, MiniMind 2 from April 2025; MiniMind 3 where it is to think."""
    return Template(
        control=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "\n"),
        stop="<|im_end|>",
    )


@TEMPLATES.register("llama")
def llama() -> Template:
    """<|start_header_id|>ROLE<|end_header_id|> ... <|eot_id|>: Llama 3."""
    return Template(
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        stop="<|eot_id|>",
    )


@TEMPLATES.register("zephyr")
def zephyr() -> Template:
    """<|user|> ... </s>: TinyLlama. Only </s> is a control token: a user who types <|user|> writes what is read as a turn."""
    return Template(
        control=("</s>",),
        system=("<|system|>\n", "</s>\n"),
        user=("<|user|>\n", "</s>\n"),
        assistant=("<|assistant|>\n", "\n"),
        stop="</s>",
    )


@TEMPLATES.register("vicuna")
def vicuna() -> Template:
    """<s>USER: ... ASSISTANT: ... </s>: LLaVA-1.5 and RLAIF-V-7B (model/from_llava.py). An answer begins with a blank."""
    return Template(
        control=("<s>", "</s>"),
        begin="<s>",
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT:", ""),
        stop="</s>",
    )


@TEMPLATES.register("minimind1")
def minimind1() -> Template:
    """<s>ROLE ... </s>, the system's words without a role before all: MiniMind 1 and MiniMind-V 1."""
    return dataclasses.replace(minimind(), system=("", ""))


@TEMPLATES.register("minimind3")
def minimind3() -> Template:
    """chatml with an empty thought before every answer: MiniMind 3 and MiniMind-3V. An answer may still think after it."""
    return dataclasses.replace(chatml(), assistant=("<|im_start|>assistant\n<think>\n\n</think>\n\n", "\n"))


@TEMPLATES.register("minimind")
def minimind() -> Template:
    """<s>ROLE ... </s>: MiniMind 2 up to April 2025 and the first MiniMind2-V."""
    return Template(
        control=("<s>", "</s>"),
        system=("<s>system\n", "</s>\n"),
        user=("<s>user\n", "</s>\n"),
        assistant=("<s>assistant\n", "\n"),
        stop="</s>",
    )

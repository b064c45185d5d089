"""Language models, one file each, found by name in LLMS. What a language model must offer:

dim, blocks, template            facts: channels C, list of its blocks, name of the chat template it was made for
embed(input_ids (S,))            -> (S, C)
cache(rows, room)                -> an empty key-value cache for `rows` sequences of at most `room` tokens
forward(x (S, C), position_ids (S,), documents, keep (S,) or None, cache or None) -> logits (kept, V)

One that can begin with pretrained weights also has a function of its name in PRETRAINED: SOURCE -> `Pretrained`
(model/llm/pretrained.py), for `--llm NAME:SOURCE`. Programs are run by `python -m` and register nothing: gguf.
"""

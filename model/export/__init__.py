"""Export: a checkpoint as a folder that `transformers` opens, and a proof that nothing has changed. `python -m model.export`

tokenizer.py     tokenizer.json with the same ids, and the chat template as a Jinja program
llava.py         config.json and the tensors under LLaVA's names
own_code.py      files of Python for what no class of transformers computes: a connector, how pictures are fitted
parity.py        reloads the folder by transformers and compares logits and answers
model_card.py    README.md of the folder
gguf.py          the language model alone, for llama.cpp
The way back, and in for models of others: model/from_llava.py.
"""

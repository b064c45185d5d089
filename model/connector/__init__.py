"""Connectors, one file each, found by name in CONNECTORS. What a connector must offer:

__init__(encoder, channels)      reads the facts it needs (encoder.dim, .tokens, .has_cls) and keeps no reference to the encoder
tokens                           fact: placeholders per image in the text
forward(features (N, P, D), numbers (N,)) -> (N, tokens, C); numbers: which picture of its conversation each is, from 0

attention.py registers nothing: it holds what the connectors with learned queries share.
"""

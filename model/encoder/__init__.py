"""Image encoders, one file each, found by name in ENCODERS. What an encoder must offer:

dim, tokens, has_cls             facts: channels D, tokens per image P, is the first token a summary of the image
size, mean, std                  facts: the pixels it expects, (3, size, size), normalised per channel
blocks, fingerprint()            list of its blocks; a hash that changes whenever the features would
forward(pixels (N, 3, size, size)) -> (N, P, D)
shared_space                     optional: (D, any), its map into a space shared with text; connectors begin with it

Importing a file of this folder must stay cheap: heavy libraries are imported inside the function that needs them.
Programs that make weights are named train_*.py and are not imported by the look-up.
"""

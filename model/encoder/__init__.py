"""Image encoders, one file each, found by name in ENCODERS. What an encoder must offer:

dim, tokens, has_cls             facts: channels D, tokens per image P, is the first token a summary of the image
size, mean, std                  facts: the pixels it expects, (3, size, size), normalised per channel
blocks, fingerprint()            its blocks, in an nn.ModuleList; a hash that changes whenever the features would
forward(pixels (N, 3, size, size)) -> (N, P, D)
shared_space                     optional: (D, any), its map into a space shared with text; connectors begin with it

Importing a file of this folder must stay cheap: heavy libraries are imported inside the function that needs them.
Programs that make weights are named train_*.py and are not imported by the look-up.
"""

import hashlib
import json

from torch import nn


def fingerprint(facts: dict, module: nn.Module) -> str:
    """A hash of facts and weights, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

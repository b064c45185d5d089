"""The CLIP vision transformer, written out (arXiv 2103.00020), with open_clip's parameter names.

CLIP trains an image and a text encoder together: a picture's vector must be closer to its own caption's than to any other's.
Only the CLS token is compared with text, but it gathers what it knows from the patches. So a patch lies near the word for what
it shows, and one projection can hand it to a language model.

In:  pixels (N, 3, S, S), normalised by the encoder's mean and std.
Out: (N, P, D): the CLS token and all patches after the last block, before ln_post, as Hugging Face's LLaVA reads them.
Names: tiny_clip, trained in this repository; clip_random, the same architecture from scratch; published ones: open_clip.py and
       huggingface.py.
Legend: N images, P tokens per image (CLS and patches), D channels of the encoder, H heads, K channels per head, S pixels a side.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model.attention import attention
from model.encoder import Encoder, fingerprint
from model.registry import ENCODERS

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI trained CLIP with; exact GELU would change every feature."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Self-attention without a mask: every token reads every token. One matrix computes q, k and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)  # (N, P, D) each
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)  # (N, H, P, K)
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (N, P, D)


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed x and adds its output to x (the residual stream)."""

    def __init__(self, width: int, heads: int, mlp: int, activation: str):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = self.activation(self.mlp["c_fc"](self.ln_2(x)))  # (N, P, mlp)
        return x + self.mlp["c_proj"](hidden)  # (N, P, D)


class Transformer(nn.Module):
    """The blocks, under open_clip's name."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int, activation: str):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, activation) for _ in range(layers))


class ViT(Encoder):
    """CLIP's image encoder. Its arguments describe it completely; tiny_clip.json stores them, as `facts`."""

    has_cls = True

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, mlp: int, output: int,
                 activation: str, mean: tuple[float, ...], std: tuple[float, ...]):  # fmt: skip
        super().__init__()
        self.facts = {
            "size": size, "patch": patch, "width": width, "layers": layers, "heads": heads, "mlp": mlp,
            "output": output, "activation": activation, "mean": list(mean), "std": list(std),
        }  # fmt: skip
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.dim, self.tokens = width, (size // patch) ** 2 + 1
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.tokens, width))
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp, activation)
        # Not used by forward: the map into the space shared with text, for `embed` and as the start of connectors.
        self.ln_post, self.proj = nn.LayerNorm(width), nn.Parameter(scale * torch.randn(width, output))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.resblocks

    @property
    def shared_space(self) -> Tensor | None:  # type: ignore[override]
        """(D, output): CLIP's map from a token into the space of its text encoder, with ln_post's scale included."""
        return (self.ln_post.weight[:, None] * self.proj).detach() if self.proj.numel() else None

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D), the CLS token first."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)  # (N, P - 1, D): one matrix, applied to every patch
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)  # (N, 1, D)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)  # (N, P, D)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, output): CLIP's vectors of length 1, comparable with those of texts."""
        return F.normalize(self.ln_post(self(pixels)[:, 0]) @ self.proj, dim=-1)

    def fingerprint(self) -> str:
        """A hash of facts and weights: equal fingerprints mean equal features."""
        return fingerprint(self.facts, self)


@ENCODERS.register("tiny_clip")
def tiny_clip() -> ViT:
    """The small CLIP trained in this repository on the embedded world's pictures."""
    return load(Path(__file__).parent / "tiny_clip.safetensors")


def load(weights: Path) -> ViT:
    """A ViT from NAME.safetensors (fp16 on disk, fp32 in memory) and its facts, NAME.json beside it."""
    facts = weights.with_suffix(".json")
    for file in (weights, facts):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing. Restore it, or train the encoder with: "
                                    f"python -m dataset.studies.train_clip --ship {weights}")
    encoder = ViT(**json.loads(facts.read_text()))
    encoder.load_state_dict({name: weight.float() for name, weight in load_file(weights).items()})
    return encoder


@ENCODERS.register("clip_random")
def clip_random(size: int, patch: int, width: int, layers: int, heads: int, activation: str = "gelu", mlp: int = 0) -> ViT:
    """A CLIP ViT with random weights, to be trained from scratch. mlp: channels inside its MLPs, 4 x width by default."""
    return ViT(size, patch, width, layers, heads, mlp or 4 * width, width, activation, MEAN, STD)

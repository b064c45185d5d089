"""A small network, applied to every encoder token by itself.

In:  features (N, P, D).    Out: (N, P, C).    Source: LLaVA-1.5 (arXiv 2310.03744), section 3.3, with depth 2.
Legend: N images, P tokens per image, D channels of the encoder, C channels of the LLM.
"""

from torch import Tensor, nn

from model.connector import Connector
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


@CONNECTORS.register("mlp")
class MLP(Connector):
    """`depth` linear maps with a GELU between them (LLaVA-1.5)."""

    def __init__(self, encoder: Encoder, channels: int, depth: int = 2):
        super().__init__()
        if depth < 1:
            raise UserError(f"mlp:depth={depth}: at least one linear map is needed, as in mlp:depth=2")
        self.tokens = encoder.tokens
        layers: list[nn.Module] = [nn.Linear(encoder.dim, channels)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(channels, channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, C); image_index is not used."""
        return self.layers(features)

"""A sparse-training algorithm of one's own: drop by momentum, grow by gradient.

    python examples/custom_sparsifier.py

`Restless` is like RigL, but keeps the weights that Adam moves most, however small they are. A
subclass says what is different; making the model sparse, the optimizer's state, several processes,
saving and the reports come with the base class.
"""

import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.sparsify.base import Trained


class Restless(sparsetrain.RigL):
    """Keeps weights by |w| + |first moment| / sqrt(second moment), that is, by size and speed."""

    def __init__(self, *args, speed_weight: float = 0.01, **options) -> None:
        self.speed_weight = speed_weight
        super().__init__(*args, **options)

    def drop_scores(self, layer: Trained) -> Tensor:
        """(nnz,): the higher, the longer a weight stays."""
        values = layer.module.values
        state = self.optimizer.state[values]
        speed = state["exp_avg"].abs() / (state["exp_avg_sq"].sqrt() + 1e-8)
        return values.detach().abs() + self.speed_weight * speed


def main(steps: int = 400) -> list[float]:
    """Learns which of four corners of a picture is brightest; returns the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = Restless(model, optimizer, sparsity=0.9, total_steps=steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 8, 8)
        corners = x.view(64, 2, 4, 2, 4).sum((2, 4)).flatten(1)
        loss = nn.functional.cross_entropy(model(x), corners.argmax(1))
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(sparsifier.summary())
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")
    return losses


if __name__ == "__main__":
    main()

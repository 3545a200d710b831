"""Other people's steps, restated in plain torch: what zotune is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]


class MeZO:
    """MeZO's step as released (Malladi et al. 2023, arXiv 2305.17333, princeton-nlp/MeZO).

        theta += eps u;  l+;  theta -= 2 eps u;  l-;  theta += eps u;  theta -= lr (c u + wd theta)

    Four sweeps over all weights, u drawn again in each from the step's seed, every new value
    written out of place. One difference: the generator is an object, not torch's global one.
    """

    def __init__(self, model: nn.Module, loss: Loss, lr: float = 1e-6, eps: float = 1e-3) -> None:
        self.named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
        self.loss, self.lr, self.eps, self.decay = loss, lr, eps, 0.0
        self.generator = torch.Generator(self.named[0][1].device)
        self.done = 0

    @torch.no_grad()
    def step(self) -> float:
        self._perturb(1)
        higher = self._forward()
        self._perturb(-2)
        lower = self._forward()
        slope = ((higher - lower) / (2 * self.eps)).item()
        self._perturb(1)
        self._update(slope)
        self.done += 1
        return float(higher)

    def _forward(self) -> Tensor:
        with torch.inference_mode():
            return self.loss().detach()

    def _perturb(self, factor: float) -> None:
        self.generator.manual_seed(self.done)
        for _, parameter in self.named:
            u = self._draw(parameter)
            parameter.data = parameter.data + factor * u * self.eps

    def _update(self, slope: float) -> None:
        self.generator.manual_seed(self.done)
        for name, parameter in self.named:
            u = self._draw(parameter)
            if any(word in name for word in ("bias", "layer_norm", "layernorm")):
                parameter.data = parameter.data - self.lr * (slope * u)
            else:
                moved = slope * u + self.decay * parameter.data
                parameter.data = parameter.data - self.lr * moved

    def _draw(self, parameter: Tensor) -> Tensor:
        return torch.normal(
            mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype,
            device=parameter.device, generator=self.generator,
        )  # fmt: skip


class AdamW:
    """Forward, backward, clipping and torch.optim.AdamW: the usual fine-tuning step."""

    def __init__(self, parameters: Iterable[nn.Parameter], loss: Loss, lr: float = 3e-5) -> None:
        self.parameters = [p.requires_grad_() for p in parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.loss = loss

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())

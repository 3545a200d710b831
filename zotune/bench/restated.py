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
    written out of place. One difference: the generator is an object, not torch's global one, and
    is set back to where the step began instead of to a number.
    """

    def __init__(self, model: nn.Module, loss: Loss, lr: float = 1e-6, eps: float = 1e-3) -> None:
        self.named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
        self.loss, self.lr, self.eps, self.decay = loss, lr, eps, 0.0
        self.generator = torch.Generator(self.named[0][1].device)

    @torch.no_grad()
    def step(self) -> float:
        self.begin = self.generator.get_state()
        self._perturb(1)
        higher = _forward(self.loss)
        self._perturb(-2)
        lower = _forward(self.loss)
        slope = ((higher - lower) / (2 * self.eps)).item()
        self._perturb(1)
        self._update(slope)
        return float(higher)

    def _perturb(self, factor: float) -> None:
        self.generator.set_state(self.begin)
        for _, parameter in self.named:
            u = _draw(parameter, self.generator)
            parameter.data = parameter.data + factor * u * self.eps

    def _update(self, slope: float) -> None:
        self.generator.set_state(self.begin)
        for name, parameter in self.named:
            u = _draw(parameter, self.generator)
            if any(word in name for word in ("bias", "layer_norm", "layernorm")):
                parameter.data = parameter.data - self.lr * (slope * u)
            else:
                moved = slope * u + self.decay * parameter.data
                parameter.data = parameter.data - self.lr * moved


class QZO:
    """QZO's step as released (Shang et al. 2025, arXiv 2505.13430, maifoundations/QZO).

        S += eps u;  l+;  S -= 2 eps u;  l-;  S += eps u;  S = max(S - lr clip(c) u, floor)

    MeZO's four sweeps, over the scales of quantized layers, whose forward makes the float weight
    anew each time (`zotune.bench.dequantizing`).
    """

    def __init__(
        self,
        scales: Iterable[Tensor],
        loss: Loss,
        lr: float = 1e-7,
        eps: float = 1e-3,
        clip: float = 100.0,
        floor: float = 1e-7,
    ) -> None:
        self.scales = list(scales)
        self.loss, self.lr, self.eps, self.clip, self.floor = loss, lr, eps, clip, floor
        self.generator = torch.Generator()

    @torch.no_grad()
    def step(self) -> float:
        self.begin = self.generator.get_state()
        self._sweep(self.eps)
        higher = _forward(self.loss)
        self._sweep(-2 * self.eps)
        lower = _forward(self.loss)
        slope = ((higher - lower) / (2 * self.eps)).item()
        self._sweep(self.eps)
        self._sweep(-self.lr * max(-self.clip, min(self.clip, slope)))
        for scale in self.scales:
            scale.clamp_(min=self.floor)
        return float(higher)

    def _sweep(self, amount: float) -> None:
        self.generator.set_state(self.begin)
        for scale in self.scales:
            scale.add_(_draw(scale, self.generator), alpha=amount)


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


def _forward(loss: Loss) -> Tensor:
    with torch.inference_mode():
        return loss().detach()


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.normal(
        mean=0.0, std=1.0, size=like.shape, dtype=like.dtype, device=like.device,
        generator=generator,
    )  # fmt: skip

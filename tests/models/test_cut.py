"""A model cut behind any of its layers goes on from the state as if it had not been cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import toys
from torch import Tensor, nn
from training.freezing import frozen

from zotune.errors import BadInput
from zotune.models.adapter import LowRank, attach
from zotune.models.cut import Trunk, layers_of


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=toys.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=toys.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": toys.bert, "llama": toys.llama, "llama-tied": lambda: toys.llama(tied=True),
    "gpt2": toys.gpt2, "opt": _opt, "qwen2": _qwen2,
}  # fmt: skip


@contextmanager
def _spoiled(model: nn.Module, below: list[nn.Module]) -> Iterator[None]:
    """NaN in whatever the modules below hold alone (a tied head needs its half)."""
    inside = {id(m) for module in below for m in module.modules()}
    others = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values()}
    alone = [p for module in below for p in module.parameters() if id(p) not in others]
    held = [p.data for p in alone]
    for parameter in alone:
        parameter.data = torch.full_like(parameter.data, float("nan"))
    yield
    for parameter, data in zip(alone, held, strict=True):
        parameter.data = data


def _texts() -> dict[str, Tensor]:
    rows = frozen.texts(4)
    return {n: torch.stack([r[n] for r in rows]) for n in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", [*TEXT, "cnn", "resnet"])
def test_every_cut_gives_the_whole_models_output_and_leaves_no_trace(kind: str) -> None:
    if kind in TEXT:
        with torch.random.fork_rng():
            model = TEXT[kind]()
        inputs = _texts()
        run = lambda: model(**inputs).logits  # noqa: E731
    else:
        model = frozen.model(kind)
        pixels = torch.stack([row["pixels"] for row in frozen.images(4)])
        run = lambda: model(pixels)  # noqa: E731
    with torch.no_grad():
        whole = run()
        trunk = Trunk.of(model, run)
        assert trunk.depth == len(layers_of(model)) >= 2
        for depth in range(1, trunk.depth + 1):
            state = trunk.state(depth, run)
            with _spoiled(model, [unit.module for unit in trunk.below(depth)]):
                assert not torch.equal(run(), whole)
                with trunk.handing(depth, state):  # nobody asks the modules below
                    assert torch.equal(run(), whole)
        assert torch.equal(run(), whole)
        assert not any("forward" in vars(m) for m in model.modules())


def test_what_comes_before_the_first_layer_lies_below_every_cut() -> None:
    model = frozen.model("resnet")
    trunk = Trunk.of(model, lambda: model(torch.zeros(1, 3, 8, 8)))
    assert [u.path for u in trunk.below(1)] == ["conv", "norm", "stage1.0"]
    levels = trunk.levels()
    assert levels[id(model.conv)] == 1
    assert levels[id(model.stage2[0].first)] == 3
    assert id(model.linear) not in levels


def test_a_layer_that_runs_twice_and_a_model_without_layers_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers[0](self.layers[0](x))
            return out

    twice, single = Twice(), nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"'layers.0' runs 2 times"):
        Trunk.of(twice, lambda: twice(torch.ones(1, 2)))
    with pytest.raises(BadInput, match="holds no row of layers"):
        Trunk.of(single, lambda: single(torch.ones(1, 2)))


def test_a_layer_with_two_outputs_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(nn.Linear(2, 2), Pair())
    trunk = Trunk.of(model, lambda: model(torch.ones(1, 2)))
    with pytest.raises(BadInput, match="gives 2 values in a tuple"):
        trunk.state(2, lambda: model(torch.ones(1, 2)))


def test_what_hangs_on_a_layer_below_is_in_the_state_already() -> None:
    """An adapter acts by a hook of its layer, which answers with the state while it is handed."""
    model = toys.fill_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    x = torch.ones(2, 4)
    trunk = Trunk.of(model, lambda: model(x))
    for k, layer in enumerate(model):
        attach(layer, LowRank(torch.full((1, 4), 0.5), torch.full((4, 1), 0.1 + k)))
    whole = model(x)
    state = trunk.state(2, lambda: model(x))
    with trunk.handing(2, state):
        assert torch.equal(model(torch.zeros(2, 4)), whole)
    assert torch.equal(model(x), whole)

"""Which layers stand behind which in the blocks of an architecture, and what lies between them.

Another architecture is another tuple of rows here; its exactness is tested by adding a tiny model
to tests/quant/calibrate/test_folding.py.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple


class Row(NamedTuple):
    """Names inside a block: a source, and the layers that read it and that nothing else does.

    shifts: whether what lies between lets a summand pass. part: the share (k, of n) of the source's
    outputs that is read.
    """

    source: str
    targets: tuple[str, ...]
    shifts: bool = True
    part: tuple[int, int] = (0, 1)


class Blocked(NamedTuple):
    """Layers whose input no module before them can change alone."""

    targets: tuple[str, ...]
    why: str


Rows = tuple[Row | Blocked, ...]
RESIDUAL: Final = "the norm before it also feeds the residual"
CURVED: Final = "the activation before it lets no factor pass"
QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA: Final[Rows] = (
    Row("input_layernorm", QKV),
    Row("self_attn.v_proj", ("self_attn.o_proj",)),
    Row("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Row("mlp.up_proj", ("mlp.down_proj",), shifts=False),
)
GPT2: Final[Rows] = (
    Row("ln_1", ("attn.c_attn",)),
    Row("attn.c_attn", ("attn.c_proj",), part=(2, 3)),
    Row("ln_2", ("mlp.c_fc",)),
    Blocked(("mlp.c_proj",), CURVED),
)
_SELF: Final = "attention.self"
BERT: Final[Rows] = (
    Row(f"{_SELF}.value", ("attention.output.dense",)),
    Blocked((f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value", "intermediate.dense"), RESIDUAL),
    Blocked(("output.dense",), CURVED),
)
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "bert", "roberta")


def rows(config: Any) -> Rows:
    """The rows of a transformers configuration; none for what is not in FAMILIES."""
    family = getattr(config, "model_type", None)
    if family == "opt":
        return _opt(config)
    if family == "gpt2":
        return GPT2
    if family in ("bert", "roberta"):
        return BERT
    return LLAMA if family in FAMILIES else ()


def _opt(config: Any) -> Rows:
    """OPT's norms stand before or behind their layers, and its activation may be another."""
    inside: Rows = (Row("self_attn.v_proj", ("self_attn.out_proj",)),)
    if config.activation_function == "relu":
        inside += (Row("fc1", ("fc2",), shifts=False),)
    else:
        inside += (Blocked(("fc2",), CURVED),)
    if not config.do_layer_norm_before:
        return (*inside, Blocked((*QKV, "fc1"), RESIDUAL))
    return (*inside, Row("self_attn_layer_norm", QKV), Row("final_layer_norm", ("fc1",)))

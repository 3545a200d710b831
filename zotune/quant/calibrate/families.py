"""Which layers stand behind which in the blocks of an architecture, and what lies between them.

Another architecture is another tuple of rows here; its exactness is tested by adding a tiny model
to tests/quant/calibrate/test_folding.py.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple


class Row(NamedTuple):
    """Names inside a block: a source, and the layers that read it and that nothing else does.

    shifts: whether what lies between lets a summand pass. part: the share (k, of n) of the source's
    outputs that is read. heads: whether attention lies between, which lets every linear map of a
    head's channels pass.
    """

    source: str
    targets: tuple[str, ...]
    shifts: bool = True
    part: tuple[int, int] = (0, 1)
    heads: bool = False


class Blocked(NamedTuple):
    """Layers whose input no module before them can change alone."""

    targets: tuple[str, ...]
    why: str


class Flow(NamedTuple):
    """What the residual stream passes beside the norms of the rows.

    tables: embeddings that are added up at its start. writers: layers inside a block whose outputs
    are added to it. last: the norm before the output layer.
    """

    tables: tuple[str, ...]
    writers: tuple[str, ...]
    last: str


Rows = tuple[Row | Blocked, ...]
RESIDUAL: Final = "the norm before it also feeds the residual"
CURVED: Final = "the activation before it lets no factor pass"
QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA: Final[Rows] = (
    Row("input_layernorm", QKV),
    Row("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
    Row("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Row("mlp.up_proj", ("mlp.down_proj",), shifts=False),
)
GPT2: Final[Rows] = (
    Row("ln_1", ("attn.c_attn",)),
    Row("attn.c_attn", ("attn.c_proj",), part=(2, 3), heads=True),
    Row("ln_2", ("mlp.c_fc",)),
    Blocked(("mlp.c_proj",), CURVED),
)
_SELF: Final = "attention.self"
BERT: Final[Rows] = (
    Row(f"{_SELF}.value", ("attention.output.dense",), heads=True),
    Blocked((f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value", "intermediate.dense"), RESIDUAL),
    Blocked(("output.dense",), CURVED),
)
BEHIND: Final = "the norms stand behind the sums and feed the residual"
_LLAMA_FLOW: Final = Flow(("embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "norm")
_GPT2_FLOW: Final = Flow(("wte", "wpe"), ("attn.c_proj", "mlp.c_proj"), "ln_f")
_OPT_FLOW: Final = Flow(
    ("embed_tokens", "embed_positions"), ("self_attn.out_proj", "fc2"), "decoder.final_layer_norm"
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


def flow(config: Any) -> Flow | str:
    """Where the residual stream of a transformers configuration flows; or why it is not known."""
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        return f"no neighbours are known in models of type {family!r}; known: {', '.join(FAMILIES)}"
    if family in ("bert", "roberta") or (family == "opt" and not config.do_layer_norm_before):
        return BEHIND
    return {"opt": _OPT_FLOW, "gpt2": _GPT2_FLOW}.get(str(family), _LLAMA_FLOW)


def _opt(config: Any) -> Rows:
    """OPT's norms stand before or behind their layers, and its activation may be another."""
    inside: Rows = (Row("self_attn.v_proj", ("self_attn.out_proj",), heads=True),)
    if config.activation_function == "relu":
        inside += (Row("fc1", ("fc2",), shifts=False),)
    else:
        inside += (Blocked(("fc2",), CURVED),)
    if not config.do_layer_norm_before:
        return (*inside, Blocked((*QKV, "fc1"), RESIDUAL))
    return (*inside, Row("self_attn_layer_norm", QKV), Row("final_layer_norm", ("fc1",)))

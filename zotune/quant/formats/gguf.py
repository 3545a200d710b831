"""Format "gguf": one file of llama.cpp with weights, config and tokenizer.

Read are Llama (Mistral goes by that name there), Qwen2 and Qwen3. Matrices in the block types of
gguf_blocks.py become quantized layers; F32, F16 and BF16 become float tensors. A quantized table of
words stays as it is, also where it serves as output layer: only rows that are looked up are
dequantized. Types that are not trained are named. Writing copies the file and puts what was tuned
in its place.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.allocator import give_back
from zotune.errors import BadInput, FormatError
from zotune.quant.formats.build import assign_, empty_model
from zotune.quant.formats.folder import copy_source, is_gguf
from zotune.quant.formats.gguf_blocks import BLOCKS, BlockLayout, ordered, unordered
from zotune.quant.formats.gguf_config import HIDDEN_ROPE, frequencies_, model_config
from zotune.quant.formats.gguf_file import GgufHeader, GgufTensor, gguf_package, read_header
from zotune.quant.formats.gguf_layers import BlockEmbedding, BlockLinear, TiedHead, read_blocks
from zotune.quant.formats.layout import values_of
from zotune.quant.formats.origin import Source, float_tensors, quantized, set_source_, source_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.formats.tensors import listing
from zotune.quant.linear import QuantLinear
from zotune.quant.model import replace_

log = logging.getLogger("zotune")
FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUFFIX: Final = ".gguf"


class GgufFormat:
    """llama.cpp's single files: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K."""

    name = "gguf"
    tunable = ("scales", "zeros", "codes", "norms", "biases", "weights")

    def detect(self, folder: Path) -> bool:
        """Whether this is a .gguf file, or a folder with one and without a config.json."""
        if folder.is_file():
            return folder.suffix == SUFFIX
        return is_gguf(folder)

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model; float tensors in `dtype`, None meaning float32.

        Tensors are read and decoded one at a time.

        Raises:
            FormatError: for damaged files, other architectures, types that are not trained, or
                tensors that do not fit the model.
        """
        header = read_header(file_of(folder))
        config = model_config(header)
        model = empty_model(config, auto, list(header.tensors), trust_remote_code=False)
        places = _places(model, header)
        tensors: dict[str, Tensor] = {}
        for name, tensor in places.items():
            if tensor.type in FLOATS:
                value = ordered(_floats(tensor), _order(tensor, config, header))
                tensors[name] = value.to(dtype or torch.float32)
            else:
                layer = _place_(model, name, tensor, _order(tensor, config, header))
                start = name.removesuffix("weight")
                own = dict(layer.named_buffers()).items()
                tensors.update({start + part: buffer for part, buffer in own})
            give_back()
        _tie_(model)
        assign_(model, tensors, header.path)
        frequencies_(model, header)
        dtypes = {name: FLOATS[t.type] for name, t in places.items() if t.type in FLOATS}
        set_source_(model, Source(self.name, folder.absolute(), dtypes))
        return model.eval()

    def write(self, model: nn.Module, folder: Path) -> None:
        """The source's files, with what was tuned in its place.

        Raises:
            BadInput: if the model has layers or tensors that its source does not have.
            FormatError: if the source's file is gone or damaged.
        """
        source = source_of(model)
        if source is None:
            raise BadInput(
                f"{type(model).__name__} was not read from a GGUF file, and only such models are "
                "written as one; llama.cpp's convert_hf_to_gguf.py makes the first"
            )
        header = read_header(file_of(source.folder))
        places = _places(model, header)
        _check(model, places, header.path)
        if source.folder.is_dir():
            copy_source(source.folder, folder, {header.path})
        else:
            shutil.copyfile(header.path, folder / header.path.name)
        for tensor, data in _changes(model, places, header):
            tensor.overwrite(folder / header.path.name, data)

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformers configuration that the file's metadata gives."""
        found: dict[str, Any] = model_config(read_header(file_of(folder))).to_dict()
        return found

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer that the file's metadata gives, as transformers reads it.

        Raises:
            FormatError: if there is none that transformers can read.
        """
        path = file_of(folder)
        read_header(path)  # transformers trusts the file's lengths
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        except Exception as error:  # whatever metadata makes of a library
            raise FormatError(
                f"the tokenizer in {path} is not one that transformers reads ({error}); read the "
                "model alone with zotune.quant.formats.read and bring a tokenizer"
            ) from error


def file_of(folder: Path) -> Path:
    """The file itself, or the one of a folder."""
    if not folder.is_dir():
        return folder
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        names = listing([p.name for p in found])
        raise FormatError(f"{folder} holds {len(found)} GGUF files [{names}]; give one of them")
    return found[0]


def _places(model: nn.Module, header: GgufHeader) -> dict[str, GgufTensor]:
    """The file's tensors by the model's names.

    Raises:
        FormatError: for tensors that the model has no place for or that are not trained.
    """
    package, architecture = gguf_package(), header.metadata["general.architecture"]
    known = {name: arch for arch, name in package.MODEL_ARCH_NAMES.items()}
    layers = header.metadata[f"{architecture}.block_count"]
    names = package.get_tensor_name_map(known[architecture], layers)
    whole = _whole_names(model)
    wanted = {}
    for own, name in whole.items():
        stem, _, last = name.rpartition(".")
        found = names.get_name(stem)
        if found is not None:
            wanted[f"{found}.{last}"] = own
    unknown = set(header.tensors) - set(wanted) - {HIDDEN_ROPE}
    if not any(name.startswith("lm_head") for name in whole.values()):
        unknown -= {"output.weight"}  # a body alone has no use for it
    if unknown:
        raise FormatError(
            f"{header.path} holds tensors that {type(model).__name__} has no place for: "
            f"[{listing(unknown)}]; such a model is not read"
        )
    for name, tensor in header.tensors.items():
        if tensor.type not in BLOCKS and tensor.type not in FLOATS:
            raise FormatError(
                f"tensor {name!r} of {header.path} is {tensor.type}, which is not trained; make "
                f"the file again from a float one with llama-quantize, as one of {sorted(BLOCKS)}"
            )
    return {wanted[n]: t for n, t in header.tensors.items() if n in wanted}


def _whole_names(model: nn.Module) -> dict[str, str]:
    """The model's parameters, and weights of quantized layers, by the names of a causal model."""
    held = {n: f"{n}.weight" for n, m in model.named_modules() if _is_block(m)}
    names = [n for n, _ in model.named_parameters()] + list(held.values())
    body = not any(n.startswith(("model.", "lm_head.")) for n in names)
    return {n: f"model.{n}" if body else n for n in names}


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear | BlockEmbedding)


def _order(tensor: GgufTensor, config: Any, header: GgufHeader) -> tuple[int, int] | None:
    """Heads and their width where the file interleaves rows: q and k of Llama."""
    if header.metadata["general.architecture"] != "llama":
        return None
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = heads.get(tensor.name.split(".")[-2])
    return None if found is None else (found, tensor.shape[0] // found)


def _floats(tensor: GgufTensor) -> Tensor:
    return tensor.read().view(FLOATS[tensor.type]).reshape(tensor.shape)


def _place_(
    model: nn.Module, name: str, tensor: GgufTensor, order: tuple[int, int] | None
) -> nn.Module:
    """Put a layer with the tensor's blocks where its weight was."""
    path = name.removesuffix(".weight")
    old = model.get_submodule(path)
    if not name.endswith(".weight") or not isinstance(old, nn.Linear | nn.Embedding):
        raise FormatError(f"tensor {tensor.name!r} is {tensor.type}; wanted one of {list(FLOATS)}")
    if tuple(old.weight.shape) != tensor.shape:
        raise FormatError(
            f"tensor {tensor.name!r} is {tensor.shape}; the file's own metadata want "
            f"{tuple(old.weight.shape)}"
        )
    layout = BlockLayout.of(tensor.type, order)
    blocks = read_blocks(layout, tensor.read())
    layer: nn.Module
    if isinstance(old, nn.Embedding):
        layer = BlockEmbedding(blocks, layout)
    else:
        rows, columns = tensor.shape
        bias = old.bias is not None
        plain = blocks.zero is None and blocks.subs is None and layout.type.bits in (4, 8)
        if plain:
            layer = QuantLinear(columns, rows, layout.scheme, bias=bias, name=path, device="meta")
            layer.storage = layout
        else:
            layer = BlockLinear(columns, rows, layout, bias=bias)
        for part, buffer in blocks._asdict().items():
            if buffer is not None:
                setattr(layer, part, buffer)
    replace_(model, path, layer)
    return layer


def _tie_(model: nn.Module) -> None:
    """An output layer without a tensor of its own reads the table of words."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    config: Any = model.config
    if isinstance(table, BlockEmbedding) and config.tie_word_embeddings:
        config.tie_word_embeddings = False  # there is no parameter to be shared
        if getattr(model, "lm_head", None) is not None:
            replace_(model, "lm_head", TiedHead(table))


def _check(model: nn.Module, places: Mapping[str, GgufTensor], path: Path) -> None:
    """Refuse a model that has more than its source."""
    own = {id(dict(model.named_parameters()).get(name)) for name in places}
    foreign = [n for n, p in model.named_parameters() if n not in places and id(p) not in own]
    foreign += [n for n, layer in quantized(model) if not isinstance(layer.storage, BlockLayout)]
    if foreign:
        raise BadInput(
            f"[{listing(foreign)}] have no place in {path}, from which the model was read; a model "
            "is given back with the layers it came with"
        )


def _changes(
    model: nn.Module, places: Mapping[str, GgufTensor], header: GgufHeader
) -> list[tuple[GgufTensor, Tensor]]:
    """Tensors of the file that the model holds otherwise, and their new bytes."""
    found = []
    floats, layers = dict(float_tensors(model)), dict(quantized(model))
    for name, tensor in places.items():
        layer = layers.get(name.removesuffix(".weight"))
        if isinstance(layer, QuantLinear):
            layout, values, raw = layer.storage, values_of(layer), tensor.read()
            assert isinstance(layout, BlockLayout)
            kept, now = layout.encode(layout.decode({"weight": raw})), layout.encode(values)
            if any(not torch.equal(raw_bytes(now[k]), raw_bytes(kept[k])) for k in kept):
                found.append((tensor, layout.merged(raw, values)))
        elif tensor.type in FLOATS:
            value = floats[name].detach().cpu().to(FLOATS[tensor.type])
            data = raw_bytes(unordered(value, _order(tensor, model.config, header)))
            if not torch.equal(data, tensor.read().flatten()):
                found.append((tensor, data))
    return found


FORMAT = GgufFormat()

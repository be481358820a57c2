"""GGUF LoRA for llama.cpp: `general.type` adapter, `adapter.type` lora, `<weight>.lora_a` and `.lora_b`.

llama.cpp computes scale = adapter.lora.alpha / rank with one alpha for all tensors (and 1 for alpha = 0);
other scalings are multiplied into lora_b. For llama and mistral the rows of q_proj's and k_proj's B are
reordered as the conversion of the model reorders those of the weight. An embedding's A is (num, r); all experts of
a layer are one tensor (experts.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer
from lowrank.errors import AdapterFileError, ConvertError, MissingExtraError, listed
from lowrank.files import folder_for, replacing
from lowrank.formats import experts
from lowrank.formats.base_model import ARCHITECTURES, Architecture, is_tied, read_config
from lowrank.formats.layers import Options, as_adapter, folded, most_common, shown, unknown

HOLDS = frozenset({"embeddings", "target_parameters", "alora_invocation_tokens"})
DTYPES = {"f32": torch.float32, "f16": torch.float16}
_EMBEDDINGS = ("model.embed_tokens", "transformer.wte")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps")
_INVOCATION = "adapter.alora.invocation_tokens"
_NEEDS_HEADS = "how many heads there are, by which q_proj's and k_proj's rows are ordered"


def read(path: Path, options: Options) -> dict[str, Adapter]:
    gguf = _package()
    reader = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items()}
    kind, inner, name = (
        said.get(k) for k in ("general.type", "adapter.type", "general.architecture")
    )
    if kind != "adapter" or inner != "lora":
        raise ConvertError(f"{path} is no LoRA: general.type is {kind!r}, adapter.type {inner!r}.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    moe = any("_exps." in key or "ffn_gate_inp." in key for key in tensors)
    rows = [row for row in ARCHITECTURES.values() if row.gguf == name]
    row = next((row for row in rows if row.experts == moe), next(iter(rows), None))
    if row is None:
        raise ConvertError(f"{path}: {_known(f'the architecture {name!r}')}")
    layers_there = [int(n) for n in re.findall(r"\bblk\.(\d+)\.", " ".join(tensors))]
    names = {n: p for p, n in _names(row, max(layers_there, default=0) + 1).items()}
    parts: dict[str, dict[str, Tensor]] = {}
    stacked: dict[experts.Place, dict[str, Tensor]] = {}
    lost = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.weight\.lora_([ab])", key)
        of_experts = match and _EXPERTS.fullmatch(match[1])
        if match and of_experts and tensor.data.ndim == 3:
            place = of_experts[1], of_experts[2]
            stacked.setdefault(place, {})[match[2]] = _tensor(gguf, tensor)
        elif match is None or match[1] not in names:
            lost.append(key)
        else:
            parts.setdefault(names[match[1]], {})[match[2]] = _tensor(gguf, tensor)
    unknown(lost, str(path), options)
    heads = _heads(row, said)
    if not heads and row.rotary and {"q_proj", "k_proj"} & set(map(_last, parts)):
        heads = _heads(row, read_config(options.base, _NEEDS_HEADS))
    alpha, layers = float(said.get("adapter.lora.alpha", 0.0)), {}
    named = parts | {" ".join(place): part for place, part in stacked.items()}
    halves = [name for name, part in named.items() if len(part) != 2]
    if halves:
        raise ConvertError(f"{path}: {shown(halves)} has only one of lora_a and lora_b.")
    for module, part in parts.items():
        embedding = module in _EMBEDDINGS
        A, B = (part["a"].T.contiguous() if embedding else part["a"]), part["b"]
        B = _pairs_apart(B, heads.get(_last(module), 0))
        layer = AdapterLayer(A, B, alpha or float(len(A)), embedding=embedding)
        where, layer = experts.router(module, layer)
        layers[where] = layer
    layers |= experts.fused(
        {
            place: AdapterLayer(part["a"], part["b"], alpha or float(part["a"].shape[1]))
            for place, part in stacked.items()
        },
        row.interleaved,
    )
    adapter = as_adapter(
        layers,
        f"gguf: {path.name}",
        fan_in_fan_out=row.transposed,
        alora_invocation_tokens=list(map(int, said.get(_INVOCATION, ()))) or None,
        task_type="CAUSAL_LM",
    )
    return {"": adapter}


def write(path: Path, adapters: Mapping[str, Adapter], options: Options) -> list[Path]:
    gguf = _package()
    (adapter,) = adapters.values()
    if path.suffix != ".gguf":
        raise ConvertError(f"{path} must be the name of a file: {path}.gguf.")
    base = adapter.config.base_model_name_or_path
    config = read_config(base, f"the architecture, and {_NEEDS_HEADS}")
    row = ARCHITECTURES.get(config.get("model_type", ""))
    if row is None:
        raise ConvertError(_known(f"model_type {config.get('model_type')!r}"))
    stacked, layers = experts.read_adapted(adapter, config)
    found = {f"blk.{n}.ffn_{word}_exps": layer for (n, word), layer in stacked.items()}
    count = max((int(n) for path in layers for n in re.findall(r"\.(\d+)\.", path)), default=0) + 1
    names = _names(row, count) | {name: name for name in found}
    problems = []
    foreign = [module for module in layers if module not in names]
    if foreign:
        problems.append(f"llama.cpp's {row.gguf} has no weight for {shown(foreign)}.")
    ends = [module for module in layers if module in (*_EMBEDDINGS, "lm_head")]
    if ends and is_tied(config):
        problems.append(
            f"{shown(ends)}: the base's embeddings are tied, one weight of llama.cpp is both, and an adapter of "
            "one of them has no place."
        )
    heads = _heads(row, config)
    if row.rotary and not heads:
        problems.append(f"The base's config.json does not say {_NEEDS_HEADS}.")
    if problems:
        raise ConvertError(listed(problems))
    layers |= found
    alpha = most_common(layer.alpha for layer in layers.values()) or 1.0  # 0 would mean scale 1
    dtype = DTYPES[options.dtype or "f32"]
    tensors = {}
    for module, layer in layers.items():
        B = folded(layer.B, layer.alpha / alpha)
        B = _pairs_together(B, heads.get(_last(module), 0))
        A = layer.A.T if layer.embedding else layer.A
        for what, tensor in (("lora_a", A), ("lora_b", B)):
            tensors[f"{names[module]}.weight.{what}"] = tensor.to(dtype).contiguous()
    large = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if large:
        raise ConvertError(f"{shown(large)} exceed float16's range: write f32.")
    with folder_for(path.parent), replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, row.gguf)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if adapter.config.alora_invocation_tokens:
            tokens, kind = adapter.config.alora_invocation_tokens, gguf.GGUFValueType
            writer.add_key_value(_INVOCATION, tokens, kind.ARRAY, kind.UINT32)
        if heads:  # so that the file can be read back without the base
            writer.add_head_count(heads["q_proj"])
            writer.add_head_count_kv(heads["k_proj"])
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(temporary).tensors}
        same = written.keys() == tensors.keys() and all(
            (tensor.numpy() == written[name]).all() for name, tensor in tensors.items()
        )
        if not same:
            raise AdapterFileError(
                f"{path} does not hold what was written to it. Is the disk full?"
            )
    return [path]


def notes(adapters: Mapping[str, Adapter]) -> list[str]:
    """Where programs that read these files differ from what the file says, for these adapters."""
    if not any(adapter.config.alora_invocation_tokens for adapter in adapters.values()):
        return []
    return [
        "Of llama.cpp's programs the server alone looks for the invocation tokens, and it begins one token before "
        "them; the others apply the adapter to all tokens."
    ]


def _heads(row: Architecture, said: Mapping[str, Any]) -> dict[str, int]:
    """The number of heads in each projection whose rows are reordered; said: config.json's words, or the file's."""
    q = said.get("num_attention_heads", said.get(f"{row.gguf}.attention.head_count"))
    kv = said.get("num_key_value_heads", said.get(f"{row.gguf}.attention.head_count_kv"))
    return {"q_proj": int(q), "k_proj": int(kv or q)} if row.rotary and q else {}


def _pairs_together(B: Tensor, heads: int) -> Tensor:
    """B (out, r) in llama.cpp's order: of each head the rows i and i + half beside each other."""
    return B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape) if heads else B


def _pairs_apart(B: Tensor, heads: int) -> Tensor:
    """B (out, r) in transformers' order again."""
    return B.reshape(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape) if heads else B


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _names(row: Architecture, layers: int) -> dict[str, str]:
    """transformers' path -> llama.cpp's name, for every module that can be adapted."""
    gguf = _package()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.gguf)
    known = gguf.get_tensor_name_map(arch, layers)
    paths = [path.format(i) for path in row.modules for i in range(layers if "{}" in path else 1)]
    return {path: name for path in paths if (name := known.get_name(path))}


def _tensor(gguf: Any, tensor: Any) -> Tensor:
    """Half precision as it is, the quantised as float32."""
    kind = gguf.GGMLQuantizationType
    plain = tensor.tensor_type in (kind.F32, kind.F16)
    data = tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(data.copy())  # the reader's memory is the file


def _known(what: str) -> str:
    return f"{what} is none whose names are known here: {', '.join(ARCHITECTURES)}."


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF needs its package: pip install 'lowrank[convert]'") from error
    return gguf

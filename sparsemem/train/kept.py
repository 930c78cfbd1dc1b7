"""A trained model beside its trial's result, and how it is read again, without the study and without running anything
that a file says.

    config.json          the trial's fields, its solved sizes, how its tokenizer divides documents
    tokenizer.json       of the text that it was trained on
    model.safetensors    weights, buffers and canonical tokens; written last, and it holds checksums of all three

The three stand alone: they may be moved or copied together. Optimiser state is not among them. The file of weights is
written tensor by tensor in pieces, so that tables of any size take no second copy in memory; it is read by the library
`safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparsemem.config import ConfigError, Trial
from sparsemem.config.refusal import named_errors
from sparsemem.data.tokenizer import load_tokenizer
from sparsemem.files import write_atomically
from sparsemem.model import Sizes, Transformer
from sparsemem.trial_files import CONFIG, MODEL, MODEL_FILES, TOKENIZER
from sparsemem.values import shortened

FORMAT = "1"  # raise it when a file is read otherwise
CANONICAL = "vocabulary.canonical"
PIECE = 1 << 22  # numbers that are copied from a device, written and hashed at a time
REMEDY = "bring it back from a copy, or train its trial again with `run.keep_models`"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class KeptModel:
    """A model that was read again.

    Attributes:
        model: in evaluation mode.
        trial: what it was trained by.
        tokenizer: plain, without truncation or padding.
        separator_id: token that ends a document.
        precision: in which it was trained and evaluated, by autocast if it is not fp32.
        corpus: digest of the text that it was trained on, its name in the cache.
        val_loss: the trial's held-out loss, nats per token.
    """

    model: Transformer
    trial: Trial
    tokenizer: Tokenizer
    separator_id: int
    precision: torch.dtype
    corpus: str
    val_loss: float


# --- writing ----------------------------------------------------------------------------------------------------------


def keep_model(
    folder: Path,
    model: Transformer,
    trial: Trial,
    sizes: Sizes,
    tokenizer: bytes,
    canonical: Tensor,
    separator_id: int,
    precision: torch.dtype,
    corpus: str,
    val_loss: float,
) -> None:
    """Leave a model in a trial's folder. What a kill leaves of it is no model: the weights come last, whole or not at
    all.

    Args:
        tokenizer: content of its `tokenizer.json`.
        canonical: (V,) raw token id -> canonical id.
        corpus, val_loss: see `KeptModel`.

    Raises:
        OSError: the disk is full.
    """
    named = {
        "trial_id": trial.id,
        "trial": trial.model_dump(mode="json"),
        "sizes": asdict(sizes),
        "separator": Tokenizer.from_str(tokenizer.decode()).id_to_token(separator_id),
        "separator_id": separator_id,
        "precision": "fp32" if precision == torch.float32 else "bf16",
        "corpus": corpus,
        "val_loss": val_loss,
    }
    config = (json.dumps(named, indent=2) + "\n").encode()
    for name, content in ((CONFIG, config), (TOKENIZER, tokenizer)):
        write_atomically(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    about = {"format": "pt", "sparsemem": FORMAT, "config": _sha256(config), "tokenizer": _sha256(tokenizer)}
    tensors = {**_tensors(model), CANONICAL: canonical}
    write_atomically(folder / MODEL, lambda file: _write(file, tensors, about))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """All that a model's outputs depend on beside its config, each tensor once, by the first of its names."""
    once = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if once[id(tensor)] == name}


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """In the format of safetensors. The checksum of all tensors stands before them, so it is filled in at the end."""
    places, start = dict[str, Any](), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # each aligned
        end = start + tensor.numel() * tensor.element_size()
        places[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end

    def header(checksum: str) -> bytes:
        text = json.dumps({"__metadata__": {**about, "tensors": checksum}, **places}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    digest = hashlib.sha256()
    file.write(header(digest.hexdigest()))
    for name in places:
        for piece in tensors[name].detach().flatten().split(PIECE):
            content = piece.cpu().contiguous().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
    file.seek(0)
    file.write(header(digest.hexdigest()))


# --- reading ----------------------------------------------------------------------------------------------------------


def load_model(folder: Path | str, device: str | torch.device = "cpu") -> KeptModel:
    """Read a model that `run: {keep_models: ...}` has left, from the folder of its trial or a copy of its three files.

    Args:
        device: receives the weights.

    Raises:
        ConfigError: there is none, or a file is damaged, of another model, or no kept model; names the file and what to
            do.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    path = folder / MODEL
    contents = _contents(folder)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("sparsemem") != FORMAT:
                raise ConfigError(
                    f"{path}: is not a model that this version of sparsemem kept; give the folder of a trial that was "
                    "trained with `run: {keep_models: true}`"
                )
            for name, content in contents.items():
                if about.get(name.partition(".")[0]) != _sha256(content):
                    raise ConfigError(f"{folder / name}: is damaged, or another model's than {path}; {REMEDY}")
            if about.get("tensors") != _checksum(path):
                raise ConfigError(f"{path}: is damaged (its checksum is that of other weights); {REMEDY}")
            named = json.loads(contents[CONFIG])
            with named_errors("", Trial, given={}):
                trial = Trial.model_validate(named["trial"])
            model = _built(path, file, named, trial)
            for name, tensor in _tensors(model).items():
                tensor.data.copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise ConfigError(
            f"{path}: cannot be read as safetensors, so it is cut short, damaged or another kind of file "
            f"({shortened(str(error))}); {REMEDY}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(str(error) if str(folder) in str(error) else f"{folder / CONFIG}: {error}") from None
        raise ConfigError(f"{folder / CONFIG}: does not describe a kept model ({error!r}); {REMEDY}") from None
    try:
        tokenizer, separator = load_tokenizer(folder / TOKENIZER, trial.data.vocab_size, named["separator"])
    except ConfigError as error:
        raise ConfigError(f"{folder / TOKENIZER}: {error}") from None
    return KeptModel(
        model.to(device).eval(),
        trial,
        tokenizer,
        separator,
        torch.float32 if named["precision"] == "fp32" else torch.bfloat16,
        str(named["corpus"]),
        float(named["val_loss"]),
    )


def _contents(folder: Path) -> dict[str, bytes]:
    """Of the two small files.

    Raises:
        ConfigError: one of the three is not there.
    """
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; give that of a trial whose model was kept, such as runs/STUDY/trials/ID"
        )
    if MODEL in missing:
        inside = sorted({*folder.glob(f"*/{MODEL}"), *folder.glob(f"trials/*/{MODEL}")})
        remedy = (
            f"{len(inside)} of its trials have one: give {inside[0].parent}" + " or another" * (len(inside) > 1)
            if inside
            else "a trial leaves one where its study says `run: {keep_models: true}` before it is trained"
        )
        raise ConfigError(f"{folder}: holds no kept model ({MODEL}); {remedy}")
    if missing:
        raise ConfigError(f"{folder / missing[0]}: is missing beside {MODEL}; {REMEDY}")
    try:
        return {name: (folder / name).read_bytes() for name in (CONFIG, TOKENIZER)}
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); allow it or {REMEDY}") from None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _built(path: Path, file: Any, named: Mapping[str, Any], trial: Trial) -> Transformer:
    """The model that a config describes, of the same tensors as the file; none of them is filled yet.

    Raises:
        ConfigError: it has others.
    """
    stated = named["sizes"]
    tables = {pool: tuple(map(tuple, modules)) for pool, modules in stated["tables"].items()}
    sizes = Sizes(int(stated["routed_experts"]), int(stated["shared_width"]), tables)
    held = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    if held.pop(CANONICAL, None) != ("I64", (trial.data.vocab_size,)):
        raise ConfigError(f"{path}: lacks the canonical tokens (`{CANONICAL}`) of its vocabulary; {REMEDY}")
    canonical, separator = file.get_tensor(CANONICAL).clone(), int(named["separator_id"])
    try:
        with torch.device("meta"):  # before memory is taken for what a file states
            planned = Transformer(trial.model, sizes, trial.data.context, canonical, separator)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    wanted = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in _tensors(planned).items()}
    if wrong := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
        raise ConfigError(
            f"{path}: its tensor `{wrong[0]}` is {_shown(held.get(wrong[0]))}, where {CONFIG} and this version of the "
            f"model make it {_shown(wanted.get(wrong[0]))}"
            + f" ({len(wrong)} differ)" * (len(wrong) > 1)
            + "; read it with the version that kept it, or train its trial again with `run.keep_models`"
        )
    return Transformer(trial.model, sizes, trial.data.context, canonical, separator)


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{tensor[0]} {list(tensor[1])}" if tensor else "missing"

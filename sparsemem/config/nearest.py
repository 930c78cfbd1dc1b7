"""What was meant by a name that is not there: the most similar one, or ours for what other trainers call so."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from sparsemem.mechanisms import POOLS

_CALLED = {
    "train.lr": "learning_rate base_lr max_lr peak_lr lr_max",
    "train.batch_tokens": "batch_size bs global_batch_size train_batch_size per_device_train_batch_size",
    "train.warmup": "warmup_steps warmup_iters num_warmup_steps warmup_tokens warmup_ratio warmup_fraction",
    "train.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style",
    "train.final_lr": "min_lr lr_min min_lr_ratio end_lr",
    "train.grad_clip": "max_grad_norm clip_grad clip_grad_norm gradient_clipping gradient_clip_val",
    "train.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "train.precision": "dtype torch_dtype bf16 fp16 amp mixed_precision",
    "train.evaluations": "eval_every eval_interval eval_steps",
    "budget.tokens": "steps max_steps num_steps train_steps max_iters iterations epochs num_epochs train_tokens",
    "budget.total_params": "num_experts n_experts n_routed_experts num_routed_experts num_local_experts",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth n_blocks num_blocks",
    "model.width": "hidden_size hidden_dim d_model dim n_embd embed_dim model_dim",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "n_kv_heads num_kv_heads num_key_value_heads num_query_groups",
    "model.residual": "residual_type residual_kind residual_connection hyper_connections hyper_connection mhc",
    "model.streams": "hc_mult hc_count n_streams num_streams residual_streams num_residual_streams expansion_rate",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "data.context": "seq_len seq_length sequence_length block_size context_length max_seq_len max_seq_length n_ctx",
    "data.vocab_size": "n_vocab vocab",
    "data.files": "path paths data_path train_data train_files",
    "data.validation_files": "val_files valid_files eval_files test_files val_data eval_data",
    "data.dataset": "dataset_name",
    "tune.trials": "n_trials num_trials num_samples",
    "run.max_concurrent": "workers num_workers max_workers n_jobs",
    "run.gpus_per_trial": "gpus num_gpus n_gpus",
    "run.cpus_per_trial": "cpus num_cpus n_cpus",
    "seed": "random_seed",
    "study": "run_name experiment experiment_name",
}
_CALLED |= {f"model.{pool}.{field}": names for pool, each in POOLS.items() for field, names in each.called.items()}
OURS = {name: path for path, names in _CALLED.items() for name in names.split()}
"""What other trainers and model files call a field -> our dotted path."""
COUNTED = {
    "train.batch_tokens": "in tokens: sequences times `data.context`",
    "train.warmup": "as a share of the tokens",
    "train.final_lr": "as a share of `lr`",
    "train.evaluations": "as their number in all",
    "budget.tokens": "in tokens: steps times `train.batch_tokens`",
    "budget.total_params": "from which the number of routed experts is solved",
}
"""Our dotted path -> in what it is counted, where others count otherwise."""


def nearest_name(wrong: str, names: Sequence[str]) -> str:
    """A remedy for a misspelt name.

    >>> nearest_name("cosin", ["cosine", "wsd"]), nearest_name("x", ["cosine", "wsd"])
    ('did you mean `cosine`?', 'known here: cosine, wsd')
    """
    close = difflib.get_close_matches(wrong.lower(), names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(dict.fromkeys(names))}"


def named_elsewhere(name: str, group: str, paths: Sequence[str]) -> str:
    """A remedy for a name that other trainers use; empty where it is none, or none of these fields is meant.

    Args:
        group: dotted path of the group in which it stands, with its last dot: `heads` of a memory are not those of the
            model.
        paths: fields that there are.

    >>> named_elsewhere("n_heads", "model.engram.", ["model.heads", "model.engram.heads"])
    'did you mean `model.engram.heads`?'
    """
    ours = OURS.get(name.lower().replace("-", "_"), "")
    own = f"{group}{ours.rpartition('.')[2]}"
    found = own if ours and own in paths else ours
    counted = f", {COUNTED[found]}" if found in COUNTED else ""
    return f"did you mean `{found}`{counted}?" if found in paths else ""


def nearest_path(path: Path | str, base: Path = Path()) -> str:
    """The file that a path or a glob was meant for, each part that is not there replaced by the most similar one; empty
    where none is.

    Args:
        base: the folder from which both start. What lies there from the working folder on is found too.
    """
    if os.path.isfile(path):
        return os.path.relpath(path, base)
    found, parts = Path(), Path(path).parts
    for place, part in enumerate(parts):
        if glob.has_magic(part):
            break
        is_last = place == len(parts) - 1
        if not (os.path.isfile if is_last else os.path.isdir)(base / found / part):
            part = _most_similar(part, base / found, is_last)
        if not part:
            return ""
        found /= part
    else:
        return str(found) if parts else ""
    whole = str(Path(found, *parts[place:]))
    return whole if glob.glob(os.path.join(glob.escape(str(base)), whole), recursive=True) else ""


def study_around(path: Path) -> Path | None:
    """The results folder of a study in which a file or folder lies."""
    return next(
        (each for each in path.parents if (each / "study.yaml").is_file() and (each / "trials.csv").is_file()), None
    )


def _most_similar(name: str, folder: Path, is_file: bool) -> str:
    """Of the files or folders in a folder, by their names before the suffix; empty where none is similar."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if (entry.is_file() if is_file else entry.is_dir()))
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(Path(name).stem, {Path(each).stem for each in names}, n=1)
    alike = [each for each in names if [Path(each).stem] == close]
    return max(alike, key=lambda each: difflib.SequenceMatcher(None, name, each).ratio(), default="")

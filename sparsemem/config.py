"""Every field of a study: its unit, its default, its bounds. YAML in, typed and frozen objects out.

This module must not know torch or Ray: `analysis` reads it, and a study is refused here before anything heavy is loaded.

- `Study` is what the user writes: one base trial, the axes to `vary`, and how to run.
- `Trial` is one point of it, fully resolved. Its identity is the hash of its fields (`Trial.id`), so a finished trial is
  recognised in whatever study asks for it, and an edited one is a new trial.
- `ConfigError` names the file, the field, the value and the remedy.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

POOLS = ("moe", "engram")  # the kinds of sparse parameters; the names of `shares`
MEMORY_POOLS = POOLS[1:]


class ConfigError(ValueError):
    """A refused input. The message names the file, the field, the value and what would be right."""


# --- units ------------------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_quantity(value: Any) -> Any:
    """`1.24M` -> 1_240_000. Units are decimal: k, M, B (or G), T. Plain integers pass.

    >>> parse_quantity("135k"), parse_quantity("1.24M"), parse_quantity("2e20")
    (135000, 1240000, 200000000000000000000)
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKMBGT]?)\s*", value.replace("_", ""))
        if not match:
            raise ValueError("write a count such as 500000, 500k, 1.24M or 26.7B")
        value = float(match[1]) * _UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value - round(value)) > 1e-6:
        raise ValueError("write a whole number, such as 500000, 500k or 1.24M")
    return round(value)


def parse_real(value: Any) -> Any:
    """YAML 1.1 reads `1e-2` as text: accept it, refuse booleans and what is not finite."""
    if isinstance(value, bool):
        raise ValueError("write a number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("write a number such as 0.01 or 1e-2") from None
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError("write a finite number")
    return value


def parse_share(value: Any) -> Any:
    """`2%` -> 0.02; plain numbers between 0 and 1 pass.

    >>> parse_share("2%"), parse_share(0.75)
    (0.02, 0.75)
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        return parse_real(value.strip()[:-1]) / 100
    return parse_real(value)


Quantity = Annotated[int, BeforeValidator(parse_quantity), Field(gt=0, le=10**15)]
Real = Annotated[float, BeforeValidator(parse_real)]
Share = Annotated[float, BeforeValidator(parse_share), Field(ge=0, le=1)]
Size = Annotated[StrictInt, Field(ge=1)]
Count = Annotated[StrictInt, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- data -------------------------------------------------------------------------------------------------------------------


class Data(_Strict):
    """Which text, how it is cut into tokens, and what is held out."""

    corpus: Literal["python-source", "files", "hub"] = "python-source"
    """`python-source`: the installed Python packages and the standard library; `files`: your own; `hub`: Hugging Face `datasets`."""
    vocab_size: Annotated[StrictInt, Field(ge=260)] = 4096
    """Entries of the byte-level BPE trained on the corpus, specials included; with `tokenizer`, the size of that tokenizer."""
    context: Annotated[StrictInt, Field(ge=2)] = 128
    """Tokens a training sequence."""
    max_bytes: Quantity = 32_000_000
    """Text kept after de-duplication. More is not read: a study needs `budget.tokens` tokens of about 3 bytes."""
    validation_tokens: Quantity = 131_072
    """Size of the fixed held-out set, whole packages or whole documents never seen in training."""
    tokenizer: str | None = None
    """A `tokenizer.json` to use in place of a trained one; relative to the study's file."""
    files: tuple[str, ...] = ()
    """Globs of `.txt`, `.py`, `.md`, `.jsonl` or `.parquet` files, relative to the study's file (corpus `files`)."""
    text_field: str = "text"
    """The column that holds the text (JSON lines, Parquet, hub)."""
    dataset: str | None = None
    """Hub data set, `owner/name` (corpus `hub`)."""
    subset: str | None = None
    """Named configuration of the hub data set, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; required, so that the text cannot change under a study."""
    split: str = "train"
    """Split of the hub data set that is streamed."""

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.corpus == "files" and not self.files:
            raise ValueError("corpus 'files' needs `files`: a list of globs such as ['corpus/*.txt']")
        if self.corpus == "hub" and not (self.dataset and self.revision):
            raise ValueError("corpus 'hub' needs `dataset` (owner/name) and `revision` (a branch, tag or commit)")
        return self


# --- model ------------------------------------------------------------------------------------------------------------------


class MoE(_Strict):
    """DeepSeekMoE layer (arXiv 2401.06066). The number of routed experts and the shared width are solved from the budget."""

    expert_width: Size
    """Inner width of one routed expert (SwiGLU)."""
    top_k: Size
    """Routed experts that a token activates."""
    shared_experts: Count = 1
    """Experts that every token passes; their width is what the budget solves for."""
    leading_dense: Count = 0
    """First blocks that hold a dense feed-forward of the activated width in place of experts."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity: `sigmoid` (DeepSeek-V3) or `softmax` (DeepSeekMoE, OLMoE)."""
    normalize_gates: StrictBool = True
    """Divide the top-k gates by their sum."""
    bias_rate: Annotated[Real, Field(ge=0)] = 1e-3
    """Step of the loss-free balancing bias (arXiv 2408.15664); 0 turns it off."""
    balance_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the switch-style auxiliary balance loss."""
    z_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the router z-loss (mean squared logsumexp of the router logits)."""


class Engram(_Strict):
    """Hashed n-gram memory (arXiv 2601.07372). The rows of its tables are solved from the budget."""

    layers: tuple[Size, ...]
    """1-based blocks at whose entry a module sits."""
    orders: tuple[Annotated[StrictInt, Field(ge=2)], ...] = (2, 3)
    """Lengths of the suffix n-grams."""
    heads: Size = 8
    """Hash heads an order; each has its own table of a prime number of rows."""
    row_dim: Size = 8
    """Width of one row."""
    gate: Literal["signed-root", "plain"] = "signed-root"
    """`plain`: sigmoid of the scaled dot product (paper); `signed-root`: of its signed square root (released code)."""
    bias: StrictBool = False
    """Biases in the key and value projections (released demo)."""
    conv: StrictBool = True
    """The depthwise causal convolution after the gate."""
    conv_kernel: Size = 4
    """Taps of that convolution; its dilation is the largest order."""
    compression: StrictBool = True
    """Hash canonical tokens (case, accents and spaces folded) in place of raw ids."""
    reset_at_document_end: StrictBool = True
    """n-grams do not reach across document separators."""
    init_std: Annotated[Real, Field(ge=0)] = 0.02
    """Standard deviation of the rows at the start."""
    hash_seed: Count = 0
    """Seed of the hash multipliers."""

    @model_validator(mode="after")
    def _distinct(self) -> Engram:
        for name in ("layers", "orders"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"`{name}` must be a rising list without repeats, such as [2, 3]; got {list(values)}")
        return self


class Model(_Strict):
    """Pre-norm decoder: RoPE, QK-norm, grouped-query attention, SwiGLU."""

    layers: Size
    width: Size
    heads: Size
    kv_heads: Size | None = None
    """Key-value heads (grouped-query attention); default: as many as `heads`."""
    rope_theta: Annotated[Real, Field(gt=1)] = 10_000.0
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-6
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    tie_embeddings: StrictBool = False
    """Use the vocabulary embedding as the LM head too."""
    moe: MoE
    engram: Engram | None = None

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.width % (2 * self.heads):
            raise ValueError(f"`width` {self.width} must be a multiple of 2 x `heads` = {2 * self.heads} (RoPE turns pairs)")
        for name, value in (("width", self.width), ("moe.expert_width", self.moe.expert_width)):
            if value % 8:
                raise ValueError(f"`{name}` {value} must be a multiple of 8: grouped matrix products need rows of whole 16 bytes")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"`heads` {self.heads} must be a multiple of `kv_heads` {self.kv_heads}")
        if self.moe.leading_dense >= self.layers:
            raise ValueError(f"`moe.leading_dense` {self.moe.leading_dense} leaves no MoE block among {self.layers} layers")
        if self.engram and max(self.engram.layers) > self.layers:
            raise ValueError(f"`engram.layers` {list(self.engram.layers)} names a block beyond the {self.layers} of the model")
        return self


# --- budget, training, run --------------------------------------------------------------------------------------------------


class Budget(_Strict):
    """What is held fixed while shares vary. Parameters exclude the vocabulary embedding and the LM head."""

    total_params: Quantity
    active_params: Quantity
    tokens: Quantity
    """Training tokens, met exactly: the last batch is cut short."""
    tolerance: Annotated[Share, Field(gt=0, le=0.1)] = 0.005
    """Largest relative error of either parameter count; a plan that misses it is refused."""

    @model_validator(mode="after")
    def _sparse(self) -> Budget:
        if self.active_params > self.total_params:
            raise ValueError(f"`active_params` {self.active_params:,} exceeds `total_params` {self.total_params:,}")
        return self


class Train(_Strict):
    """AdamW for the backbone, Adam without decay on the touched rows of the tables."""

    batch_tokens: Quantity
    lr: Annotated[Real, Field(gt=0)]
    table_lr_factor: Annotated[Real, Field(gt=0)] = 5.0
    """Learning rate of the memory tables over `lr` (Engram sec. 2.4)."""
    warmup: Share = 0.02
    """Share of the tokens over which the rate rises from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`wsd`: constant, then linear to `final_lr` over the last `decay` share."""
    decay: Share = 0.2
    """Share of the tokens in the falling part of `wsd`."""
    final_lr: Share = 0.1
    """Rate at the end as a share of `lr`."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """Of the backbone's matrices; never of norms, biases or tables."""
    betas: tuple[Annotated[Share, Field(lt=1)], Annotated[Share, Field(lt=1)]] = (0.9, 0.95)
    grad_clip: Annotated[Real, Field(gt=0)] = 1.0
    """Largest norm of the backbone's gradient. Table gradients stay out of it: Adam rescales them row by row."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU."""
    evaluations: Size = 8
    """Points of the validation curve, evenly spaced; the last one is the result and uses the whole held-out set."""

    def precision_on(self, gpu: bool) -> Literal["fp32", "bf16"]:
        """What `precision` comes to on a GPU or a CPU."""
        if self.precision == "auto":
            return "bf16" if gpu else "fp32"
        return self.precision

    @model_validator(mode="after")
    def _phases(self) -> Train:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"`warmup` {self.warmup:g} and `decay` {self.decay:g} together exceed the budget")
        return self


class Run(_Strict):
    """How trials are placed. None of it enters a trial's identity; the ledger refuses to mix precisions, which the device decides."""

    cpus_per_trial: Size = 1
    """Processor slots and threads of a trial."""
    gpus_per_trial: Annotated[Real, Field(ge=0)] = 0.0
    max_failures: Count = 2
    """Times that a failing trial is started again, from its checkpoint."""


# --- trial and study --------------------------------------------------------------------------------------------------------


class Trial(_Strict):
    """One training run, fully resolved."""

    data: Data
    model: Model
    budget: Budget
    train: Train
    shares: dict[str, Share]
    """Share of P_sparse that each pool holds; empty: the dense baseline of the same P_act."""
    seed: Count = 0
    """Seeds the data order and the initial weights, alike for every share."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
        if "rho" in raw:
            if "shares" in raw:
                raise ValueError("give `rho` or `shares`, not both")
            raw["shares"] = _shares_of(raw.pop("rho"), [pool for pool in MEMORY_POOLS if model.get(pool) is not None])
        if isinstance(raw.get("shares"), dict):
            raw["shares"] = {k: s for k, v in raw["shares"].items() if (s := parse_share(v)) != 0}
            # A pool without a share is not built: dropping it makes rho = 1 the same trial whatever the memory's settings are.
            unused = [pool for pool in MEMORY_POOLS if pool not in raw["shares"] and model.get(pool) is not None]
            if unused:
                raw["model"] = {key: None if key in unused else value for key, value in model.items()}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Trial:
        total = sum(self.shares.values())
        if self.shares and abs(total - 1) > 1e-6:
            raise ValueError(f"`shares` {self.shares} sum to {total:g}; they must sum to 1")
        for pool in self.shares:
            if pool not in POOLS:
                raise ValueError(f"`shares` names the pool {pool!r}; known pools: {', '.join(POOLS)}")
            if getattr(self.model, pool) is None:
                raise ValueError(f"`shares` gives {self.shares[pool]:g} to {pool}, which `model` does not configure; add `model.{pool}`")
        if self.model.moe.top_k == 1 and self.model.moe.normalize_gates and self.shares:
            raise ValueError(
                "`model.moe.top_k` 1 with `normalize_gates` makes every gate 1: the router learns nothing; set `normalize_gates: false`"
            )
        if self.train.batch_tokens % self.data.context:
            raise ValueError(f"`train.batch_tokens` {self.train.batch_tokens:,} must be a multiple of `data.context` {self.data.context}")
        if self.data.validation_tokens <= self.data.context:
            raise ValueError(
                f"`data.validation_tokens` {self.data.validation_tokens:,} holds no sequence of "
                f"`data.context` {self.data.context} tokens; hold out more"
            )
        if self.budget.tokens < self.data.context:
            raise ValueError(f"`budget.tokens` {self.budget.tokens:,} is less than one sequence of `data.context` {self.data.context}")
        return self

    @property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of all fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def rho(self) -> float | None:
        """Share of the sparse parameters held by routed experts; None for the dense baseline."""
        return self.shares.get("moe", 0.0) if self.shares else None


def _shares_of(rho: Any, memories: list[str]) -> dict[str, float]:
    """`rho` is short for shares of routed experts and the one memory configured; `dense` for no sparse parameters."""
    if rho == "dense":
        return {}
    try:
        rho = float(parse_share(rho))
    except (TypeError, ValueError):
        raise ValueError(f"`rho` is {rho!r}; write a share between 0 and 1, or 'dense' for the dense baseline") from None
    if not 0 <= rho <= 1:
        raise ValueError(f"`rho` is {rho:g}; it is a share of the sparse parameters, between 0 (all memory) and 1 (all routed experts)")
    if rho == 1:
        return {"moe": 1.0}
    if len(memories) != 1:
        raise ValueError(f"`rho` below 1 needs exactly one memory in `model`, found {memories or 'none'}; write `shares` instead")
    return {"moe": round(rho, 12), memories[0]: round(1 - rho, 12)}


class Study(_Strict):
    """What the user writes. `vary` spans a grid; a list of mappings is the union of several grids. `budget` may be a list, a ladder."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    question: str = ""
    base: dict[str, Any]
    """The trial's fields as written, shared by all trials before `vary` is applied."""
    vary: tuple[dict[str, tuple[Any, ...]], ...] = ({},)
    run: Run = Run()

    @model_validator(mode="after")
    def _has_points(self) -> Study:
        if not self.vary:
            raise ValueError("field `vary` is an empty list; leave it out, or name a grid such as {rho: [1.0, 0.5], seed: [0, 1]}")
        for path in (path for grid in self.vary for path, values in grid.items() if not values):
            raise ValueError(f"field `vary.{path}` is an empty list, which leaves no trial; give it at least one value or leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _split(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError("a study is a mapping; it starts with `study: NAME`")
        if "base" in raw:
            raise ValueError("unknown field `base`")
        raw = dict(raw)
        raw["base"] = {key: raw.pop(key) for key in (*Trial.model_fields, "rho") if key in raw}
        if isinstance(raw.get("vary"), dict):
            raw["vary"] = [raw["vary"]]
        for grid in raw["vary"] if isinstance(raw.get("vary"), list) else []:
            for path, values in grid.items() if isinstance(grid, dict) else []:
                if not isinstance(values, list | tuple):
                    raise ValueError(f"field `vary.{path}` has the value {values!r}: write a list of values, such as [{values}]")
        if isinstance(raw["base"].get("budget"), list):  # a ladder of budgets is an axis like any other
            ladder, grids = raw["base"].pop("budget"), raw.get("vary", [{}])
            raw["vary"] = [{"budget": ladder, **grid} if isinstance(grid, dict) else grid for grid in grids]
        return raw

    def trials(self) -> list[Trial]:
        """Every distinct trial of the study in the order of its axes.

        Raises:
            ConfigError: naming the field and the value that no trial can have.
        """
        return list({trial.id: trial for _, trial in self.points()}.values())

    def points(self) -> Iterator[tuple[dict[str, Any], Trial]]:
        """Each grid point as (varied fields, trial)."""
        for grid in self.vary:
            for values in itertools.product(*grid.values()):
                varied = dict(zip(grid, values, strict=True))
                raw = copy.deepcopy(self.base)
                for path, value in varied.items():
                    _assign(raw, path, value)
                with _named_errors("vary" if varied else "", Trial, given=varied):
                    yield varied, Trial.model_validate(raw)


def _assign(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested mappings. `rho` and `shares` replace each other, so that one base serves both."""
    if path in ("rho", "shares"):
        raw.pop("rho", None)
        raw.pop("shares", None)
    *parents, leaf = path.split(".")
    for depth, name in enumerate(parents):
        inner = raw.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"field `{'.'.join(parents[: depth + 1])}` in `vary.{path}`: it is {inner!r}, not a group of fields")
        raw = inner
    raw[leaf] = copy.deepcopy(value)  # a later axis may set a field inside it


# --- reading ----------------------------------------------------------------------------------------------------------------


def load_study(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study from YAML.

    Args:
        path: the YAML file.
        overrides: dotted path -> value, applied after reading (`--set path=value`).

    Raises:
        ConfigError: naming file, field, value and remedy. Every trial of the study has been validated when this returns.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the study's YAML file") from None
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], n=1)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        raise ConfigError(f"{path}: not valid YAML{place}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study is a mapping of fields that starts with `study: NAME`; this file holds {type(raw).__name__}")
    raw.pop("provenance", None)  # what `run` adds to the copy that it keeps beside the results
    try:
        _refuse_repeated_fields(yaml.compose(text, Loader=yaml.SafeLoader))
        for dotted, value in (overrides or {}).items():
            if _is_varied(raw.get("vary"), dotted):
                raise ConfigError(f"`--set {dotted}` would change nothing: `vary` sets it; write `--set 'vary.{dotted}=[{value}]'`")
            if dotted.startswith("vary."):  # the name of an axis is itself a dotted path
                grids = raw.get("vary", {})
                raw["vary"] = [{**grid, dotted.removeprefix("vary."): value} for grid in (grids if isinstance(grids, list) else [grids])]
            else:
                _assign(raw, dotted, value)
        with _named_errors("", Study, given=raw):
            study = Study.model_validate(raw)
        for _ in study.points():
            pass
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path}: holds a value that no field takes: {error}") from None
    return study


def _is_varied(vary: Any, path: str) -> bool:
    """Whether every grid sets this field, so that its value in the base is never used."""
    grids = vary if isinstance(vary, list) else [vary]
    return bool(grids) and all(isinstance(grid, dict) and path in grid for grid in grids)


def _refuse_repeated_fields(node: yaml.Node | None, place: str = "") -> None:
    """YAML's own reader keeps the last of two equal keys and says nothing."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise ConfigError(f"field `{place}{key.value}` stands twice (line {key.start_mark.line + 1}); keep one of them")
            seen.add(key.value)
            _refuse_repeated_fields(value, f"{place}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_fields(item, place)


class _named_errors:
    """Turns pydantic's report into one ConfigError that names field, value and remedy."""

    def __init__(self, prefix: str, root: type[BaseModel], given: Mapping[str, Any]) -> None:
        self.prefix, self.root, self.given = prefix, root, given

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if not isinstance(error, ValidationError):
            return
        lines = []
        for problem in error.errors():
            parts = [str(part) for part in problem["loc"]]
            name = ".".join(parts)
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown field `{name}`{_nearest(self.root, parts)}")
            elif problem["type"] == "missing":
                lines.append(f"field `{name}` is missing")
            elif problem["type"] == "value_error" and len(parts) <= 1 and isinstance(problem["input"], dict):
                lines.append(f"field `{name}`: {message}" if name else message)
            else:
                lines.append(f"field `{name}` has the value {problem['input']!r}: {message}")
        point = ", ".join(f"{key}={value}" for key, value in self.given.items()) if self.prefix else ""
        raise ConfigError("; ".join(lines) + (f" (at the point {point})" if point else "")) from None


def _nearest(root: type[BaseModel], parts: list[str]) -> str:
    """A remedy for a misspelt field: the closest name in the same group."""
    group: Any = root
    for part in parts[:-1]:
        field = group.model_fields.get(part)
        candidates = [field.annotation, *typing.get_args(field.annotation)] if field else []
        group = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if group is None:
            return ""
    names = list(group.model_fields)
    if group is Study:
        names = [name for name in names if name != "base"]
    if group in (Study, Trial):
        names += [*Trial.model_fields, "rho"]
    close = difflib.get_close_matches(parts[-1], names, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known here: {', '.join(dict.fromkeys(names))}"

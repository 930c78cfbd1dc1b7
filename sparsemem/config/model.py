"""Fields of the model: its blocks. Each mechanism adds its own group, see `sparsemem.mechanisms`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic.fields import FieldInfo

from sparsemem import mechanisms
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, POOLS, Mechanism, MemoryFields
from sparsemem.values import Real, Size, SmallCount, Strict, brief, refuse_partial_rows

MANY_STREAMS = ("static", "hyper_connections", "manifold", "gated")


class Model(Strict):
    """Decoder: RoPE, QK-norm, grouped-query attention, SwiGLU."""

    layers: SmallCount
    width: Size
    heads: Size
    kv_heads: Size | None = None
    """Key-value heads (grouped-query attention); default: as many as `heads`."""
    head_dim: Size | None = None
    """Width of a head; default: `width` / `heads`."""
    rope_theta: Annotated[Real, Field(gt=1)] = 10_000.0
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-6
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    tie_embeddings: StrictBool = False
    """Use the vocabulary embedding as the LM head too."""
    residual: Literal["pre_norm", "static", "hyper_connections", "manifold", "gated"] = "pre_norm"
    """How attention and feed-forwards read and write the residual. `pre_norm`: one stream; the others: several, with
    learned reads and writes. `hyper_connections` (arXiv 2409.19606) and `manifold` (mHC, 2512.24880: its mixing matrix
    is doubly stochastic) depend on the token; `static` is `manifold` without that; `gated` (2608.30320) gates each
    number that is read and mixes nothing. Its parameters count in P_act.
    """
    streams: Annotated[SmallCount, Field(ge=2)] | None = None
    """Residual streams where there are several; default: 4."""
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The group of fields of a mechanism, by its name; None: not configured."""

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.width // self.heads

    @property
    def stream_count(self) -> int:
        """Residual streams."""
        return self.streams or 1

    @property
    def pools(self) -> dict[str, Any]:
        """The groups of fields of the mechanisms that are configured, by name."""
        return {pool: fields for pool in POOLS if (fields := getattr(self, pool)) is not None}

    @property
    def on_top(self) -> tuple[str, ...]:
        """Memories of given rows: they come on top of the budget."""
        return tuple(pool for pool, fields in self.pools.items() if pool in MEMORY_POOLS and fields.rows)

    @property
    def replaced(self) -> set[int]:
        """1-based blocks in which a memory stands in place of the feed-forward."""
        return {block for pool in self.pools for block in POOLS[pool].replaced(self)}

    @model_validator(mode="before")
    @classmethod
    def _streams(cls, raw: Any) -> Any:
        """Their number, so that a model is the same whether its default is written or not."""
        if isinstance(raw, dict) and raw.get("residual") in MANY_STREAMS and raw.get("streams") is None:
            return raw | {"streams": 4}
        return raw

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.streams and self.residual not in MANY_STREAMS:
            raise ValueError(
                f"`streams` is {self.streams}, and `residual: {self.residual}` has one stream; leave `streams` out, or "
                f"write residual: {', '.join(MANY_STREAMS[:-1])} or {MANY_STREAMS[-1]}"
            )
        if self.head_dim is None and self.width % (2 * self.heads):
            counts = [heads for heads in range(1, self.width) if self.width % (2 * heads) == 0]
            fit = ", ".join(map(str, sorted(sorted(counts, key=lambda heads: abs(heads - self.heads))[:6])))
            raise ValueError(
                f"`width` {self.width} must be a multiple of 2 x `heads` = {2 * self.heads} (RoPE turns pairs): write "
                f"heads: {fit or '(none divides an odd `width`)'}, or the width of a head, head_dim: "
                f"{self.width // self.heads // 2 * 2 or 2}"
            )
        if self.head_width % 2:
            raise ValueError(f"`head_dim` {self.head_dim} must be even: RoPE turns pairs")
        refuse_partial_rows("width", self.width)
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"`heads` {self.heads} must be a multiple of `kv_heads` {self.kv_heads}")
        for pool in self.pools:
            POOLS[pool].check(self)
        first: dict[int, str] = {}
        for pool in self.pools:
            for block in POOLS[pool].replaced(self):
                if (other := first.setdefault(block, pool)) != pool:
                    raise ValueError(
                        f"`{other}` and `{pool}` both replace the feed-forward of block {block}; set one to "
                        "`placement: parallel`"
                    )
        if not any(EXPERTS.holds(self, block) for block in range(1, self.layers + 1)):
            raise ValueError(
                "memories in place of a feed-forward leave no block with one; shorten `layers` or set `placement: "
                "parallel`"
            )
        return self


def add_fields(mechanism: Mechanism) -> None:
    """Let a model have the group of fields of a mechanism.

    Raises:
        ValueError: its name is no name of a field, or is taken; or its fields are not those of a memory.
    """
    name, fields = mechanism.name, mechanism.fields
    if name in Model.model_fields and POOLS.get(name) is mechanism:
        return  # told of twice
    if not name.isidentifier() or name.startswith("_") or hasattr(Model, name) or name in Model.model_fields:
        raise ValueError(
            f"a mechanism is named {brief(name)}, which `model` cannot have or has already as a field; choose another "
            "name"
        )
    if mechanism is not EXPERTS and not issubclass(fields, MemoryFields):
        raise ValueError(
            f"the fields of the mechanism {name!r} are a {fields.__name__}; make it a subclass of `MemoryFields`"
        )
    Model.model_fields[name] = FieldInfo(annotation=fields | None, default=None)  # type: ignore[arg-type]
    Model.model_rebuild(force=True)
    POOLS.setdefault(name, mechanism)
    if mechanism is not EXPERTS:
        MEMORY_POOLS.setdefault(name, mechanism)


for _each in list(POOLS.values()):
    add_fields(_each)
for _entry in mechanisms.outside():
    try:
        add_fields(mechanisms.load(_entry))
    except (ImportError, ValueError) as error:  # studies that do not name it can do without
        print(f"warning: {error}", file=sys.stderr)

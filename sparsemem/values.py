"""How a value is written in YAML: units, shares, numbers that YAML reads as text; and the error that refuses one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt


class ConfigError(ValueError):
    """A refused input. The message names the file, the field, the value and what would be right."""


class BudgetError(ConfigError):
    """No integer sizes meet a field of the budget at one point; `{}` in its words stands for the value offered instead,
    written as it is typed."""

    def __init__(self, field: str, words: str, offer: int) -> None:
        super().__init__(words.replace("{}", str(offer)))
        self.field, self.words, self.offer = field, words, offer

    def offering(self, value: int) -> BudgetError:
        """The same with another offer."""
        return BudgetError(self.field, self.words, value)


SHOWN = 300  # characters of a refused value that a message shows
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_quantity(value: Any) -> Any:
    """`1.24M` -> 1_240_000. Units are decimal: k, M, B (or G), T. Plain integers pass.

    >>> parse_quantity("135k"), parse_quantity("1.24M"), parse_quantity("2e20")
    (135000, 1240000, 200000000000000000000)
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKMBGT]?)\s*", value.replace("_", ""))
        if not match:
            meant = re.sub(r"(?<=\d),(?=\d{3}\b)", "", value).replace(",", ".").strip()
            near = re.fullmatch(r"(\d+(?:\.\d+)? ?[kKmMbBgGtT]?)(?: *\b[a-z]+)?", meant)
            offered = (
                f"; did you mean {near[1].replace(' ', '').replace('K', 'k').replace('m', 'M').replace('b', 'B')}?"
                if near
                else ""
            )
            raise ValueError(f"write a count such as 500000, 500k, 1.24M or 26.7B{offered}")
        value = float(match[1]) * _UNITS[match[2]]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or abs(value - round(value)) > 1e-6
    ):
        raise ValueError("write a whole number, such as 500000, 500k or 1.24M")
    return round(value)


def parse_real(value: Any) -> Any:
    """YAML 1.1 reads `1e-2` as text: accept it, refuse booleans and what is not finite."""
    if isinstance(value, bool):
        raise ValueError("write a number such as 0.01 or 1e-2")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            meant = value.replace(",", ".", 1)
            offered = f"; did you mean {meant}?" if meant != value and re.fullmatch(r"[-+.\deE]+", meant) else ""
            raise ValueError(f"write a number such as 0.01 or 1e-2{offered}") from None
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


_STORAGE_OPTIONS = {
    "": (),
    "file": (),
    "s3": ("region", "scheme", "endpoint_override"),
    "gs": ("scheme", "endpoint_override"),
}


def parse_storage(value: Any) -> Any:
    """The address of a place that several machines see: a folder, or a bucket of an object store.

    What could be a secret is refused: the address is written into the results.

    >>> parse_storage("s3://bucket/studies?region=eu-central-1")
    's3://bucket/studies?region=eu-central-1'
    """
    if not isinstance(value, str):
        return value
    parts = urlsplit(value) if "://" in value else urlsplit("")
    if parts.scheme not in _STORAGE_OPTIONS:
        raise ValueError("write the path of a folder, or an address that begins with s3://, gs:// or file://")
    if "#" in value and parts.scheme:
        raise ValueError("write # as %23, since an address ends before it")
    if "@" in parts.netloc:
        raise ValueError(
            "leave out user and password: credentials come from the environment, such as AWS_ACCESS_KEY_ID, or the "
            "machine"
        )
    known = _STORAGE_OPTIONS[parts.scheme]
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            remedy = (
                f"known here: {', '.join(known) or 'none'}; credentials come from the environment, such as "
                "AWS_ACCESS_KEY_ID"
            )
            raise ValueError(f"the option {brief(name)} is unknown; {remedy}")
    if (parts.scheme in ("s3", "gs") and not parts.netloc) or not value.strip():
        raise ValueError("name a folder or a bucket, such as s3://bucket/studies")
    return value


def parse_kept(value: Any) -> Any:
    """Of which trials models are kept: all, none, or those named by a share, by `dense` or by their id.

    >>> parse_kept(True), parse_kept(["50%", 1, "dense", 123456789012])
    (True, (0.5, 1.0, 'dense', '123456789012'))
    """
    if isinstance(value, bool):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("write true, false, or a list of shares (rho) or trial ids, such as [1.0, 0.5]")
    return tuple(map(_parse_named, value))


def _parse_named(value: Any) -> float | str:
    named = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if named == "dense" or re.fullmatch(r"[0-9a-f]{12}", named):  # an id of digits alone is a number in YAML
        return named
    try:
        share = float(parse_share(value))
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(
            f"{brief(value)} names no trial: write a share (rho) between 0 and 1, dense, or a trial's id of 12 digits "
            "from 0 to f, between quotes"
        )
    return share


Quantity = Annotated[int, BeforeValidator(parse_quantity), Field(gt=0, le=10**15)]
Real = Annotated[float, BeforeValidator(parse_real)]
Share = Annotated[float, BeforeValidator(parse_share), Field(ge=0, le=1)]
Size = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
SmallCount = Annotated[StrictInt, Field(ge=1, le=256)]
"""Of things that are made one by one, such as blocks: a study of a stranger must not keep a plan busy for hours."""
Count = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]


def brief(value: Any) -> str:
    """A refused value for a message, cut where it is long.

    >>> brief("x" * 1000)[-13:], brief(16**5000)
    ('xxxxxxxxx ...', 'a number of more than 4300 digits')
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out such a number
        text = "a number of more than 4300 digits"
    return shortened(text)


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def refuse_partial_rows(name: str, width: int) -> None:
    """
    Raises:
        ValueError: a width with which grouped matrix products cannot work.
    """
    if width % 8:
        raise ValueError(
            f"`{name}` {width} must be a multiple of 8: grouped matrix products need rows of whole 16 bytes"
        )


class Strict(BaseModel):
    """A group of fields: frozen, and an unknown name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""The memories study: kinds of memory, or designs of one, at the same share of one budget. Which is best, and what does
each displace?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from analysis.studies.comparing import MOST, Comparison, compare, comparison_drawings, comparison_warnings
from analysis.studies.types import Analysis, Drawing, Reading, Section
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS


@dataclass(frozen=True)
class Memories(Analysis):
    """Paired differences between the memories at each share, apart for each budget and text."""

    point: ClassVar[str] = "memory and share"
    terms: ClassVar[str] = (
        "A share is the part of the sparse parameters held by routed experts; the memory holds the rest. A difference "
        "is told from noise where Holm's correction for the number of differences leaves it."
    )

    @cached_property
    def compared(self) -> list[Comparison]:
        found = compare(self.cells)
        mixes = ", ".join(f"{{{EXPERTS.name}: 0.5, {pool}: 0.5}}" for pool in list(MEMORY_POOLS)[:2])
        remedy = f"give two memories one share, such as `shares: [{mixes}]`"
        problem = f"no budget has from 2 to {MOST} alternatives to compare, and two of them at one share"
        self.require(any(each.has_pairs for each in found), problem, remedy)
        return found

    def check(self) -> None:
        _ = self.compared

    def foresee(self) -> list[str]:
        return self.remarks()

    def noise(self) -> list[dict[str, Any]]:
        """That of the comparisons: memories at one share are points beside each other, though cells of their own."""
        return [
            {
                "label": each.label,
                "tokens": float(each.runs["tokens"].median()),
                "paired_sd": each.fit.paired_sd,
                "df": each.fit.noise_df,
            }
            for each in self.compared
            if each.fit.paired_sd and each.fit.noise_df
        ] or super().noise()

    def fits(self) -> list[dict[str, Any]]:
        return [{"over": each.label, **each.fit.to_dict()} for each in self.compared]

    def readings(self) -> list[Reading]:
        return [each.reading() for each in self.compared]

    def remarks(self) -> list[str]:
        return comparison_warnings(self.compared, self.results)

    def drawings(self) -> list[Drawing]:
        return comparison_drawings(self.compared, "memories")

    def sections(self) -> list[Section]:
        return [each.section() for each in self.compared]

    def caveats(self) -> list[str]:
        return [
            "P_tot and P_act are held; FLOPs and bytes read per token are not, and differ between the memories (see "
            "the plan below).",
            "One design of each memory, unless the study varies it: its defaults were tuned elsewhere, at other sizes.",
        ]

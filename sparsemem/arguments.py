"""A parser of command lines that says what was meant: under the usage of the command at hand, with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """As argparse's, which refuses what a command does not know under the usage of the whole, and names no nearest choice."""

    commands: dict[str, Parser]
    """Those beside this one, by name; empty where it stands alone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.commands = {}

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, rest = super().parse_known_args(None if args is None else list(args), namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest[0])}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(found[1].lower(), re.findall(r"[\w-]+", found[2]), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message)

    def _meant(self, unknown: str) -> str:
        option = unknown.partition("=")[0]
        if not option.startswith("-"):
            return "; --set takes path=value in one word: --set budget.tokens=40k" if "--set" in self._option_string_actions else ""
        having = [name for name, other in self.commands.items() if option in other._option_string_actions]
        if having:
            return f"; {option} is an option of {' and '.join(having)}"
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""

"""A parser of command lines that says what was meant: under the usage of the command at hand, with the nearest name."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

EXAMPLES = {
    "NATS": "0.01, a difference of losses in nats/token",
    "LEVEL": "0.95",
    "path=value": "budget.tokens=40k",
    "DIR": "runs/my-study",
    "ADDR": "auto",
    "COLUMN": "loss",
    "FILE": "fit.svg",
}
"""What to write for an option, by what its help calls its value."""


class Parser(argparse.ArgumentParser):
    """As argparse's, which refuses what a command does not know under the usage of the whole, and names no nearest
    choice.
    """

    commands: dict[str, Parser]
    """Those beside this one, by name; empty where it stands alone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.commands = {}
        self._given: list[str] = []

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self._given = sys.argv[1:] if args is None else list(args)
        parsed, rest = super().parse_known_args(self._given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest[0])}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(found[1].lower(), re.findall(r"[\w-]+", found[2]), n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        elif found := re.match(r"argument (--[\w-]+): (?:expected one argument|invalid \w+ value)", message):
            action = self._option_string_actions[found[1]]
            example = " or ".join(action.choices) if action.choices else EXAMPLES.get(str(action.metavar))
            message += f"; write {found[1]} {example}" if example else ""
        elif "arguments are required" in message:
            takers = [
                option
                for option in self._given[:-1]
                if getattr(self._option_string_actions.get(option), "nargs", None) == "?"
            ]
            message += f"; {takers[0]} took the word after it: write it last" if takers else ""
        super().error(message)

    def _meant(self, unknown: str) -> str:
        option = unknown.partition("=")[0]
        if not option.startswith("-"):
            setting = shlex.quote(unknown) if "=" in unknown else "budget.tokens=40k"
            return (
                f"; --set takes path=value in one word: --set {setting}"
                if "--set" in self._option_string_actions
                else ""
            )
        having = [name for name, other in self.commands.items() if option in other._option_string_actions]
        if having:
            return f"; {option} is an option of {' and '.join(having)}"
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""

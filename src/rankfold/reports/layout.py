"""Tables that fit the terminal without cutting a name, and are as wide as they need where output is not a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between two columns."""
NAME, PROSE = 24, 32
"""Columns that a folded name, and a wrapped sentence, have at least."""
UNBOUNDED = 100_000
"""Width of output that is not a terminal."""
GROUP = 3
"""Names that are written as one, at least."""

_NUMBER = re.compile("0|[1-9][0-9]*")


@dataclass(frozen=True)
class Column:
    """A column: `name` is folded at its dots, never cut; `prose` is wrapped; `spare` may be left out."""

    title: str
    right: bool = False
    name: bool = False
    prose: bool = False
    spare: bool = False

    @classmethod
    def read(cls, text: str) -> Column:
        """A column from its title, with @ ahead of it for names, ~ for prose, > for flush right, ? for spare."""
        title = text.lstrip("@~>?")
        marks = text[: len(text) - len(title)]
        return cls(title, ">" in marks, "@" in marks, "~" in marks, "?" in marks)


@final
class Listing:
    """A plain table. Where it is wider than the terminal, spare columns go first, by a note; then names are folded."""

    def __init__(self, *columns: str) -> None:
        self.columns = [Column.read(text) for text in columns]
        self.rows: list[list[Text]] = []
        self.sections: set[int] = set()

    def add_row(self, *cells: str | Text) -> None:
        """Adds a row, a cell per column."""
        self.rows.append([Text(cell) if isinstance(cell, str) else cell for cell in cells])

    def add_section(self) -> None:
        """Sets the rows that follow apart."""
        self.sections.add(len(self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        widths = self._widths()
        least = [
            min(width, PROSE) if column.prose else width for column, width in zip(self.columns, widths, strict=True)
        ]
        shown = list(range(len(self.columns)))
        for k in [k for k in shown if self.columns[k].spare]:
            if _total(least, shown) > options.max_width:
                shown.remove(k)
        excess = _total(least, shown) - options.max_width
        if excess > 0:
            least = [
                max(width - excess, min(width, NAME)) if column.name else width
                for column, width in zip(self.columns, least, strict=True)
            ]
        while _total(least, shown) > options.max_width and len(shown) > 1 and not self.columns[shown[-1]].prose:
            shown.pop()  # a very narrow terminal
        yield self._table(shown, least, options.max_width)
        left_out = [column.title for k, column in enumerate(self.columns) if k not in shown]
        if left_out:
            told = f"not in {options.max_width} columns: {', '.join(left_out)}; a wider terminal or --json has them"
            yield Text(told, "dim")

    def _widths(self) -> list[int]:
        """The width of every column as its cells have it."""
        cells = [[column.title, *(row[k].plain for row in self.rows)] for k, column in enumerate(self.columns)]
        return [max(map(cell_len, column)) for column in cells]

    def _table(self, shown: Sequence[int], widths: Sequence[int], most: int) -> Table:
        """The rows with the columns shown, names folded to these widths."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in (self.columns[k] for k in shown):
            table.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                no_wrap=not column.prose,
                overflow="fold",
            )
        for number, row in enumerate(self.rows):
            if number in self.sections:
                table.add_section()
            table.add_row(*(folded(row[k], min(widths[k], most)) if self.columns[k].name else row[k] for k in shown))
        return table


def show(*tables: RenderableType) -> None:
    """Prints tables, an empty line between two: fitted to a terminal; whole, and without trailing blanks, elsewhere."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNBOUNDED)
    with console.capture() as captured:
        for k, table in enumerate(tables):
            if k:
                console.print()
            console.print(table)
    text = captured.get()
    if not console.is_terminal:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    print(text, end="")


def folded(name: Text, width: int) -> Text:
    """A name in lines of at most `width`, broken after dots and blanks where it can be; further lines are indented."""
    if cell_len(name.plain) <= width:
        return name
    lines, line, indent = [], "", " " * min(2, width - 1)
    for piece in re.findall(r"[^. ]*[. ]?", name.plain):
        while cell_len(line + piece) > width:
            room = width - cell_len(line) if not line.strip() or cell_len(indent + piece) > width else 0
            lines.append(line + piece[:room])
            line, piece = indent, piece[room:]
        line += piece
    return Text("\n".join([*lines, line]), name.style)


def shown_name(name: str) -> str:
    """A layer's qualified name as people read it; that of the model itself is empty."""
    return name or "(the model itself)"


def grouped(names: Iterable[str]) -> list[str]:
    """Qualified names, with three or more that differ in one number as one: `layer.*.fc (12 layers: 0–11)`.

    What is written says exactly which names they are.
    """
    families: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        families.setdefault(".".join("*" if _NUMBER.fullmatch(part) else part for part in parts), []).append(parts)
    labels: list[str] = []
    for members in families.values():
        values = [{parts[k] for parts in members} for k in range(len(members[0]))]
        widest = max(range(len(values)), key=lambda k: len(values[k]))
        siblings: dict[str, list[list[str]]] = {}
        for parts in members:
            siblings.setdefault(".".join(["*" if k == widest else part for k, part in enumerate(parts)]), []).append(
                parts
            )
        for label, group in siblings.items():
            if len(group) < GROUP:
                labels.extend(shown_name(".".join(parts)) for parts in group)
            else:
                labels.append(f"{label} ({len(group)} layers: {_ranges([int(parts[widest]) for parts in group])})")
    return labels


def _ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words: 0–11, 13."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[k] for k in shown) + GAP * (len(shown) - 1)

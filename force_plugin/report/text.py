"""Shorten the names of layers to a given width, so that all labels differ."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from force_plugin.report.sparsity import LayerReport, SparsityReport

COLUMNS = 80
"""The default width of a terminal, and the longest line of a table."""


def shorten(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` characters, a third of them the head."""
    if len(text) <= width:
        return text
    head = max(0, (width - 1) // 3)
    tail = max(0, width - 1 - head)
    return f"{text[:head].rstrip('.')}…{text[len(text) - tail :].lstrip('.')}"


def shorten_names(
    names: Iterable[str], width: int, shortest: int = 6
) -> dict[str, str]:
    """Return a label of at most ``width`` characters for each name, all different.

    A name that fits is its own label. In a longer name, "…" replaces the parts that
    long names share at the end or the beginning. Long parts are cut next, except the
    characters that distinguish them from other parts. Examples:
    "stages.2.blocks.11.mlp.fc1.…", "….11.attention.query.weight",
    "layers.0.attn.relative_posi….weight".

    Args:
        names: Names made of parts, with dots between the parts.
        width: Number of characters.
        shortest: Number of characters to which a part may be cut. Default: 6.

    Returns:
        Labels by name, in the order of the names. A name that stays too long has no
        label.
    """
    ordered = [*dict.fromkeys(names)]
    parts = {name: name.split(".") for name in ordered}
    labels = {name: name for name in ordered if len(name) <= width}
    left = {name: some for name, some in parts.items() if name not in labels}
    while left:
        made = _joined(_shortened(left, parts, width, shortest))
        fitting = {name: left[name] for name in left if len(made[name]) <= width}
        if len(fitting) == len(left):
            labels |= made
            break
        left = fitting
    counts = Counter(labels.values())  # a name may contain "…" itself
    return {n: labels[n] for n in ordered if n in labels and counts[labels[n]] == 1}


def numbered_names(names: Sequence[str], width: int) -> list[str]:
    """Return labels of at most ``width`` characters, numbered if nothing else helps."""
    labels = shorten_names(names, width, shortest=2)
    for number, name in enumerate(dict.fromkeys(names)):
        mark = f"#{number}"
        labels.setdefault(name, shorten(name, width - len(mark)) + mark)
    return [labels[name] for name in names]


def table_rows(
    names: Sequence[str], rests: Sequence[str], width: int
) -> tuple[list[str], list[str]]:
    """Return the lines of a table that has names in its first column.

    Args:
        names: The name of each row.
        rests: The other columns of each row as a string, all of equal length.
        width: Width of the first column. A name that cannot be shortened enough gets a
            line of its own, above the rest of its row.

    Returns:
        The lines, and a note in lines that explains a shortened name. The note is empty
        if no name is shortened.
    """
    labels = shorten_names(names, width)
    alone = [name for name in dict.fromkeys(names) if name not in labels]
    above = dict(zip(alone, numbered_names(alone, COLUMNS), strict=True))
    lines = []
    for name, rest in zip(names, rests, strict=True):
        if name in above:
            lines.append(above[name])
        lines.append(f"{labels.get(name, ''):<{width}}  {rest}")
    shown = labels | above
    example = next((f"{shown[n]} is {n}" for n in names if shown[n] != n), "")
    return lines, textwrap.wrap(example, COLUMNS, subsequent_indent="  ")


_Parts = Mapping[str, Sequence[str]]
_Ends = Mapping[str, Sequence[tuple[int, int]]]


def _shortened(parts: _Parts, known: _Parts, width: int, shortest: int) -> _Parts:
    """Return names shortened in the first way that makes all fit, else in the last way.

    Args:
        parts: The parts of the names to shorten.
        known: The parts of all names in the table.
        width: Number of characters.
        shortest: Number of characters to which a part may be cut.
    """
    words = {part for some in known.values() for part in some}
    longest = max(map(len, words))
    ends = {
        word: _telling(word, words)
        for word in {part for some in parts.values() for part in some}
        if len(word) > shortest
    }
    head, tail = _shared(parts, known)
    ways = [
        {name: _without(some, *ends) for name, some in parts.items()}
        for ends in ((0, 0), (0, tail), (head, 0), (head, tail))
    ]
    for least in (longest, 10, shortest):
        for way in ways:
            if _width(_cut(way, least, ends)) <= width:
                most = longest
                while least < most:  # look for the longest parts that fit
                    middle = (least + most + 1) // 2
                    if _width(_cut(way, middle, ends)) <= width:
                        least = middle
                    else:
                        most = middle - 1
                return _cut(way, least, ends)
    return _cut(ways[-1], shortest, ends)


def _shared(parts: _Parts, known: _Parts) -> tuple[int, int]:
    """Return how many parts all names share at their beginning and at their end.

    A part at the end does not count if another name has equal parts before it, and
    continues differently.
    """
    if len(parts) == 1:
        return 0, 0
    following: dict[tuple[str, ...], set[str | None]] = defaultdict(set)
    for some in known.values():
        for place, part in enumerate([*some, None]):
            following[tuple(some[:place])].add(part)
    rows = [*parts.values()]
    shortest = min(map(len, rows)) - 1
    head = tail = 0
    while head < shortest and len({some[head] for some in rows}) == 1:
        head += 1
    while (
        head + tail < shortest
        and len({some[-1 - tail] for some in rows}) == 1
        and all(len(following[tuple(some[: -1 - tail])]) == 1 for some in rows)
    ):
        tail += 1
    return head, tail


def _without(some: Sequence[str], head: int, tail: int) -> list[str]:
    """Return parts with "…" for the first and the last parts, where "…" is shorter."""
    begin, middle, end = some[:head], some[head : len(some) - tail], some[-tail:]
    return [
        *(["…"] if len(".".join(begin)) > 1 else begin),
        *middle,
        *([] if not tail else ["…"] if len(".".join(end)) > 1 else end),
    ]


def _joined(parts: _Parts) -> dict[str, str]:
    return {name: ".".join(some) for name, some in parts.items()}


def _width(parts: _Parts) -> int:
    return max(map(len, _joined(parts).values()))


def _cut(parts: _Parts, most: int, ends: _Ends) -> _Parts:
    """Return parts cut to ``most`` characters, or more if needed to keep them apart."""
    short = {word: _cut_one(word, most, pairs) for word, pairs in ends.items()}
    return {
        name: [short.get(part, part) for part in some] for name, some in parts.items()
    }


def _cut_one(word: str, most: int, pairs: Sequence[tuple[int, int]]) -> str:
    if len(word) <= most:
        return word
    room = most - 1
    fitting = [pair for pair in pairs if sum(pair) <= room]
    head, tail = fitting[0] if fitting else min(pairs, key=sum)
    head = max(head, room - tail)
    return (
        f"{word[:head]}…{word[len(word) - tail :]}"
        if head + tail < len(word) - 1
        else word
    )


def _telling(word: str, words: Collection[str]) -> list[tuple[int, int]]:
    """Return pairs of head and tail lengths that distinguish a word from all others.

    Returns:
        Pairs of lengths, the shorter tails first.
    """
    shared = [
        (_common(word, other), _common(word[::-1], other[::-1]))
        for other in words
        if other != word
    ]
    tails = sorted({0, *(tail + 1 for _, tail in shared)})
    return [
        (1 + max((h for h, t in shared if t >= tail), default=-1), tail)
        for tail in tails
    ]


def _common(one: str, other: str) -> int:
    """Return the number of equal characters at the beginning of two words."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def percent(report: LayerReport | SparsityReport) -> str:
    """Return the sparsity as ``"99.00 %"``; 100 % and 0 % are exact, never rounded."""
    text = f"{100 * report.sparsity:.2f} %"
    if 0 < report.kept < report.total:
        return {"100.00 %": ">99.99 %", "0.00 %": "<0.01 %"}.get(text, text)
    return text


def stage_of(name: str) -> str:
    """Return a layer's stage: "layer1" for "layer1.0.conv1.weight"; also "stages.0"."""
    first, second, *_ = [*name.split("."), ""]
    if second.isdigit() and not first[-1:].isdigit():
        return f"{first}.{second}"
    return first

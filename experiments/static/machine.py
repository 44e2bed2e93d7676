"""Machine code as a graph: blocks of instructions, loops, and what a warp executes.

A loop is found as a strongly connected set of blocks, so that a wait written behind the program's
end (sm_100) belongs to the loop that waits. The *main* loops are those that do more than wait; of
nested ones, the innermost that holds three quarters of the work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

TENSOR = re.compile(r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|DMMA|UTC\w*MMA)\b|v_mfma_")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG)\b|(global|buffer)_(load|store)")
WIDE = re.compile(r"(LDG|STG|LDGSTS)\b.*\.128|(global|buffer)_(load|store)_dwordx4")

SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
AMDGCN = re.compile(r"^\t([a-z]\w*)\s*([^;]*)")
LABEL = re.compile(r"^([.$\w]+):")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    jump: str | None = None  # label to which it may go
    call: str | None = None  # label of a function that returns
    falls: bool = True  # whether it may be followed by the next one
    ends: bool = False  # whether it may end the program


@dataclass
class Block:
    """Instructions that run one after another, and where they lead."""

    opcodes: Counter[str] = field(default_factory=Counter)
    successors: set[int] = field(default_factory=set)
    ends: bool = False


def _sass_instruction(match: re.Match[str], waits: dict[str, str]) -> Instruction:
    predicate, opcode, operands = match.groups()
    place = re.search(r"`\(([^)]+)\)", operands)
    label = place.group(1) if place else None
    base = opcode.split(".")[0]
    if base in ("BRX", "JMX"):
        raise ValueError(f"indirect branch: {match.group(0).strip()}")
    # A call to a local label (sm_80) never returns: it is a jump.
    if base in ("BRA", "JMP") or (base == "CALL" and label is not None and label.startswith(".L")):
        certain = predicate is None and operands.startswith("`")
        return Instruction(opcode, jump=label, falls=not certain)
    if base == "CALL":
        return Instruction(opcode, call=label)
    if base == "BSSY" and label is not None:
        waits[re.split(r"[,\s]", operands)[0]] = label
    if base == "BSYNC":
        return Instruction(opcode, jump=waits.get(operands.strip()), falls=True)
    ends = base in ("EXIT", "RET")
    return Instruction(opcode, falls=not ends or predicate is not None, ends=ends)


def parse_sass(text: str) -> list[str | Instruction]:
    """Labels and instructions of `nvdisasm -c`."""
    found: list[str | Instruction] = []
    waits: dict[str, str] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            found.append(label.group(1))
        elif match := SASS.match(line):
            found.append(_sass_instruction(match, waits))
    return found


def parse_amdgcn(text: str) -> list[str | Instruction]:
    """Labels and instructions of the first function of an assembler file."""
    found: list[str | Instruction] = []
    for line in text.split(".Lfunc_end0")[0].splitlines():
        if label := LABEL.match(line):
            found.append(label.group(1))
        elif match := AMDGCN.match(line):
            opcode = re.sub(r"_(e32|e64|dpp|sdwa)$", "", match.group(1))
            jump = match.group(2).strip() if opcode.startswith(("s_branch", "s_cbranch")) else None
            stops = opcode in ("s_branch", "s_endpgm")
            found.append(Instruction(opcode, jump, falls=not stops, ends=opcode == "s_endpgm"))
    return found


class Program:
    """The blocks of a program, the loops among them, and what a warp of it executes."""

    def __init__(self, items: list[str | Instruction]) -> None:
        self.opcodes = Counter(i.opcode for i in items if isinstance(i, Instruction))
        self.blocks: list[Block] = [Block()]
        places: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        calls: list[tuple[int, str]] = []
        self._build(items, places, jumps, calls)
        for block, label in jumps:
            self.blocks[block].successors.add(places[label])
        # A called function counts as if it stood where it is called.
        bodies = {label: self._total(self._reach(places[label])) for _, label in calls}
        for block, label in calls:
            self.blocks[block].opcodes += bodies[label]
        self.reached = self._reach(0)

    def _build(
        self,
        items: list[str | Instruction],
        places: dict[str, int],
        jumps: list[tuple[int, str]],
        calls: list[tuple[int, str]],
    ) -> None:
        """Blocks end behind a jump, a call or an exit, and before a label that is used."""
        used = {label for i in items if isinstance(i, Instruction) for label in (i.jump, i.call)}
        for item in items:
            here = len(self.blocks) - 1
            if isinstance(item, str):
                if item in used:
                    self._open(here)
                    places[item] = len(self.blocks) - 1
                continue
            block = self.blocks[here]
            block.opcodes[item.opcode] += 1
            block.ends |= item.ends
            if item.jump is not None:
                jumps.append((here, item.jump))
            if item.call is not None:
                calls.append((here, item.call))
            if item.jump is not None or item.ends or item.call is not None:
                self._open(here, item.falls)

    def _open(self, here: int, falls: bool = True) -> None:
        """Begin a block; the one before leads into it, if it `falls`."""
        self.blocks.append(Block())
        if falls:
            self.blocks[here].successors.add(here + 1)

    def _reach(self, start: int, within: Collection[int] | None = None) -> set[int]:
        """Blocks from `start` on, itself included."""
        seen, todo = {start}, [start]
        while todo:
            for other in self.blocks[todo.pop()].successors - seen:
                if within is None or other in within:
                    seen.add(other)
                    todo.append(other)
        return seen

    def _total(self, blocks: Collection[int]) -> Counter[str]:
        total: Counter[str] = Counter()
        for block in blocks:
            total += self.blocks[block].opcodes
        return total

    def _loops(self, within: set[int]) -> Iterator[frozenset[int]]:
        """The largest strongly connected sets of blocks in `within` that hold a cycle."""
        reach = {b: self._reach(b, within) for b in within}
        left = set(within)
        while left:
            start = min(left)
            members = {b for b in reach[start] if start in reach[b]}
            left -= members
            if len(members) > 1 or start in self.blocks[start].successors:
                yield frozenset(members)

    def _innermost(self, loop: frozenset[int]) -> frozenset[int]:
        """The loop in a nest in which the work is done."""
        outside = self.reached - loop
        heads = {b for o in outside for b in self.blocks[o].successors} & loop
        whole = self._total(loop)
        for inner in self._loops(set(loop - heads)):
            if work(self._total(inner), whole) >= 0.75 * work(whole, whole):
                return self._innermost(inner)
        return loop

    def executed(self) -> tuple[Counter[str], Counter[str]]:
        """Opcodes that a warp executes: outside of the main loops, and in a turn of each of them.

        Of all ways through the program that run the main loops the one with the most 16-byte
        accesses is taken, then the one with the most accesses, then the shortest. Loops that only
        wait count once; so does what an outer loop of a nest adds.
        """
        loops = list(self._loops(self.reached))
        owner = {b: loop for loop in loops for b in loop}
        main = {loop: self._innermost(loop) for loop in loops if _is_main(self._total(loop))}

        def node(block: int) -> frozenset[int]:
            return owner.get(block, frozenset((block,)))

        def after(here: frozenset[int]) -> set[frozenset[int]]:
            return {node(s) for b in here for s in self.blocks[b].successors} - {here}

        Way = tuple[tuple[int, ...], list[frozenset[int]]]  # its value, and what it leads through
        best: dict[frozenset[int], Way | None] = {}
        for here in _backwards(node(0), after):
            ways = [way for other in after(here) if (way := best[other]) is not None]
            if any(self.blocks[b].ends for b in here):
                ways.append(((0, 0, 0, 0), []))
            best[here] = None  # leads to no end
            if ways:
                rest, nodes = max(ways, key=lambda way: way[0])
                own = self._total(here)
                value = (here in main, _count(own, WIDE), _count(own, GLOBAL), -own.total())
                best[here] = tuple(map(sum, zip(value, rest, strict=True))), [here, *nodes]

        way = best[node(0)]
        if way is None:
            raise ValueError("the program has no end")
        turn = sum((self._total(main[n]) for n in way[1] if n in main), Counter[str]())
        outside = sum((self._total(n) for n in way[1]), Counter[str]()) - turn
        return outside, turn


Node = TypeVar("Node")


def _backwards(start: Node, after: Callable[[Node], set[Node]]) -> list[Node]:
    """Nodes of an acyclic graph, each behind those it leads to."""
    order: dict[Node, None] = {}
    todo: list[tuple[Node, bool]] = [(start, False)]
    while todo:
        here, left = todo.pop()
        if left:
            order[here] = None
        elif here not in order:
            todo.append((here, True))
            todo += [(other, False) for other in after(here)]
    return list(order)


def _count(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for op, n in opcodes.items() if pattern.match(op))


def _is_main(opcodes: Counter[str]) -> bool:
    """Whether a loop touches global memory, multiplies matrices or is long; others only wait."""
    return _count(opcodes, TENSOR) + _count(opcodes, GLOBAL) > 0 or opcodes.total() >= 64


def work(opcodes: Counter[str], whole: Counter[str]) -> int:
    """Products of matrices, or where the whole has none, instructions."""
    return _count(opcodes, TENSOR) if _count(whole, TENSOR) else opcodes.total()


def grouped(opcodes: Counter[str]) -> dict[str, int]:
    """By the first word of an opcode, with that of products in full; the most frequent first."""
    groups: Counter[str] = Counter()
    for opcode, n in opcodes.items():
        groups[opcode if TENSOR.match(opcode) else opcode.split(".")[0]] += n
    return dict(sorted(groups.items(), key=lambda item: (-item[1], item[0])))


__all__ = [
    "GLOBAL",
    "TENSOR",
    "WIDE",
    "Instruction",
    "Program",
    "grouped",
    "parse_amdgcn",
    "parse_sass",
]

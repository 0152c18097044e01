"""Reads the PTX of a compiled kernel: its parameters, and its instructions with their operands."""

import re
from typing import Any, NamedTuple


class Operand(NamedTuple):
    """A register, an immediate value or a special register."""

    kind: str  # "register", "integer", "float" or "special"
    value: Any  # a name, or the bits of a number


class Address(NamedTuple):
    """What stands in brackets: a register and an offset in bytes, or the offset alone."""

    base: Operand | None
    offset: int


class Instruction(NamedTuple):
    """One line of PTX."""

    opcode: str
    operands: list[str]
    guard: str | None  # the predicate register that it depends on, "!" before it where negated
    place: int
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def type(self) -> str:
        """Of the result, or of what is loaded or stored."""
        return self.parts[-1]


PARAMETERS = 0x1000_0000  # where the addresses of parameters lie, 128 bytes each


def parameter_address(name: str) -> int:
    return PARAMETERS + 128 * int(name.rsplit("_", 1)[1])


def operand(text: str) -> Operand:
    text = text.strip()
    if re.match(r"%(tid|ntid|ctaid|nctaid)\.", text):
        return Operand("special", text)
    if re.fullmatch(r"0f[0-9A-F]{8}", text):
        return Operand("float", int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+U?|\d+)", text):
        return Operand("integer", int(text.rstrip("U"), 0))
    if text == "global_smem":  # shared memory begins at 0
        return Operand("integer", 0)
    if "_param_" in text:
        return Operand("integer", parameter_address(text))
    return Operand("register", text)


def address(text: str) -> Address:
    base, _, offset = text.strip("[] ").partition("+")
    first = operand(base)
    if first.kind == "integer":
        return Address(None, first.value + int(offset or "0", 0))
    return Address(first, int(offset or "0", 0))


def listed(text: str) -> list[str]:
    """The operands of a vector {a, b}, or the only one."""
    return [each.strip() for each in text.strip("{} ").split(",")]


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", _nested(text)) if part.strip()]


def _nested(text: str) -> str:
    """The one operand with braces inside brackets, [map, {c, n, b}], becomes [map; c; n; b]."""
    return re.sub(r"\[(%\w+), \{([^}]*)\}\]", lambda m: f"[{m[1]}; {m[2].replace(',', ';')}]", text)


class Kernel:
    """A kernel as it was compiled.

    Attributes:
        parameters: type and name of each, in order.
        threads: of a program.
        instructions: all of them.
    """

    def __init__(self, ptx: str):
        head, _, body = ptx[ptx.index(".entry") :].partition("\n{\n")
        self.parameters = re.findall(r"\.param (?:\.align 64 )?\.(\w+)[^\n]*?(\w+_param_\d+)", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        self._labels: dict[str, list[int]] = {}
        self.instructions: list[Instruction] = []
        for text in self._statements(body):
            label, _, rest = text.partition(":") if re.match(r"[$\w]+:(\s|$)", text) else ("", "", text)
            if label:
                self._labels.setdefault(label, []).append(len(self.instructions))
            if rest.strip():
                self._add(rest.strip())

    @staticmethod
    def _statements(body: str) -> list[str]:
        statements = []
        for line in body.split("\n"):
            line = line.partition("//")[0].strip()
            # Scopes of inline assembly are dropped: no register in them lives on.
            parts = [re.sub(r"^\{\s*(?=[.@a-z]|$)", "", part.strip()) for part in line.split(";")]
            statements += [part for part in parts if part and part != "}" and not part.startswith(".")]
        return statements

    def _add(self, text: str) -> None:
        guard, opcode, rest = re.fullmatch(r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", text).groups()
        self.instructions.append(Instruction(opcode, _split(rest), guard, len(self.instructions), text))

    def target(self, label: str, place: int) -> int:
        """Where a branch leads; the same label may stand in several pieces of inline assembly, before their branch."""
        places = self._labels[label]
        return places[0] if len(places) == 1 else max(each for each in places if each <= place)

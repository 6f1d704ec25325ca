"""A step's program for people: its instructions, one a line, and the codes that they call as Python."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from chunkft_compile.assembly import Assembled


def readable(assembled: Assembled, segments: Sequence[str]) -> str:
    """The instructions of a step, without what is as usual, and the codes that they call. `segments` are the names of segments."""
    program = assembled.program
    defaults = {field.name: field.default for field in fields(program.instructions[0])}
    lines = []
    for number, instruction in enumerate(program.instructions):
        said = {key: value for key, value in asdict(instruction).items() if value != defaults[key] and key not in ("op", "segment")}
        where = f" of {segments[instruction.segment]}" if instruction.segment >= 0 else ""
        lines.append(f"{number} {instruction.op.name}{where} {json.dumps(said)}")
    codes = [f"code {number}:\n{code.module.code.strip()}" for number, code in enumerate(assembled.codes)]
    return "\n".join([*lines, "", *codes])

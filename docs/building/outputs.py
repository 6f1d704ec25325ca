"""What a block printed against what its page shows: the words count, the numbers only as numbers.

The page shows a real run. Before comparing, in both of them

1. every number with the unit behind it is `#`, so that `2.6 s`, `899 ms`, `54.2 %` and `3` are all the same;
2. every run of blanks is one blank, and every rule of a table (`----`) is `---`, as wider numbers make wider columns;
3. the directory of the page is `/home/you`, and blanks at the ends of lines and blank lines at the end do not count.

A line `...` in the page stands for any number of lines, none included. Which numbers are printed is not the concern of a page: what must be
true of them is said by an `assert` in a block, or by a test.
"""

import difflib
import re
from pathlib import Path

HOME = "/home/you"

_NUMBER = re.compile(
    r"[-+]?\d[\d.,]*(?<![.,])(?:e[-+]?\d+)?"  # no full stop or comma that ends a clause
    r"(?:\s?(?:%|[kMGT]i?B(?:/s)?|B|(?:ms|us|µs|s|min|h|x)\b)(?!\w))?"
)
_RULE = re.compile(r"([-=─])\1{2,}")


def shape(text: str) -> str:
    """What of an output is compared."""
    lines = [" ".join(_RULE.sub("---", _NUMBER.sub("#", line)).split()) for line in text.splitlines()]
    return "\n".join(lines).strip("\n")


def difference(printed: str, expected: str, directory: Path) -> str | None:
    """None where they agree; else a diff from the page to what was printed, in which only lines of another shape are marked."""
    printed = printed.replace(str(directory), HOME)
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(f"{line}\n") for line in shape(expected).split("\n"))
    if re.fullmatch(pattern, shape(printed) + "\n"):
        return None
    lines = difflib.unified_diff(shape(expected).split("\n"), shape(printed).split("\n"), "in the page", "printed", lineterm="")
    return "\n".join([*lines, "as printed:", printed])

"""All pages as HTML without network: python -m docs.building [--out build/docs]"""

import argparse
import shutil
from pathlib import Path

from docs.building.pages import ROOT
from docs.building.reference import build as build_reference
from docs.building.rendering import STYLE
from docs.building.site import build_pages

REFERENCE = "api"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", metavar="DIR", help="where it goes (default: %(default)s)")
    out: Path = parser.parse_args().out
    if out.exists() and any(out.iterdir()) and not (out / STYLE).exists():
        parser.error(f"--out {out} holds something else: name an empty directory, or one that does not exist")
    shutil.rmtree(out, ignore_errors=True)
    first, *_ = build_reference(out / REFERENCE)
    build_pages(
        out,
        [
            ("Documentation", "index.html"),
            ("First hour", "first-hour.html"),
            ("Overview", "overview.html"),
            ("Python reference", first.relative_to(out).as_posix()),
        ],
    )
    print(out / "index.html")


if __name__ == "__main__":
    main()

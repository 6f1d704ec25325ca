"""The pages of docs/ and README.md: what is written in them is executed, and made into HTML. No part of the package that is installed.

    python -m docs.building.running docs/first-hour.md     run the blocks of a page, as the tests do
    python -m docs.building                                all pages as HTML, in build/docs

Blocks are fences of Markdown. All blocks of a page run in order, in one temporary directory:

| fence or comment                       | what becomes of it                                                                   |
|----------------------------------------|--------------------------------------------------------------------------------------|
| `python`                               | executed; all of a page share one namespace                                          |
| `sh`                                   | executed by `bash -euo pipefail`, with `chunkft` on PATH                             |
| `text` directly after one of these     | its stdout; `outputs.py` says what may differ                                        |
| first line `# file: NAME`              | written to NAME and not executed (`yaml`, `toml` and `python`)                       |
| `<!-- file: NAME -->` before any fence | the same, for what has no comments, such as `json`                                   |
| `<!-- not run: REASON -->` before it   | not executed, and neither is a `text` after it compared                              |
| `<!-- hidden set-up` .. `-->`          | Python that is executed and not shown                                                |
| `<!-- slow -->`                        | the test of the page is marked slow                                                  |
| no language                            | a drawing or an excerpt: neither executed nor compared                               |

Everything else is an error: another language, another comment, a fence without an end. An image that is not in the repository is one that
the blocks of its page write to that path, relative to the page's directory.
"""

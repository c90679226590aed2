"""Check the words of documents, docstrings, comments and messages: ``python docs/prose.py [FILE ...]``.

Prints each place where a term of `TERMS` stands, with what to write instead; the exit status is 1 if there is one.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: What is not written here (a regular expression, without regard to case), and what is.
TERMS = {
    r"twins?": "reference model, counterpart",
    r"lend|lends|lent|lending|loans?": "expose, restore",
    r"deal(?:s|t|ing)? (?:them )?out|dealt": "split, reassign",
    r"tuning by turns": "autotuning",
    r"a floor|floors?(?= of| for)": "a minimum, min_per_layer",
    r"whole or not at all": "atomically",
    r"damage and lies|trusted in nothing": "untrusted input; corrupt or inconsistent files",
    r"too much is left|left too dense": "still too dense for the sparse kernels",
    r"what is left(?: of| in| behind)?": "the remaining entries, the pruned model",
    r"won back|win back": "reconstructed",
    r"as they were not": "name the two states",
    r"cut(?:s|ting)?(?: out)?(?: of)?(?: the| some)? channels?|channels?(?: \w+){0,2} cut": "remove channels",
    r"we are the first|first (?:open|public) implementation|state of the art|novel|seamless(?:ly)?|blazing\w*":
        "what was measured",
    r"(?:a|our) reproduction of": "an independent implementation after",
}  # fmt: skip
PATTERN = re.compile("|".join(rf"(?P<t{n}>\b(?:{term})\b)" for n, term in enumerate(TERMS)), flags=re.IGNORECASE)
BETTER = list(TERMS.values())


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Pieces of prose and the lines that they begin at: of Markdown all but code, of Python comments and texts."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (token.type != tokenize.NAME and token.string.count(" ") > 1):
                yield token.start[0], token.string
    else:
        hidden = re.sub(r"^```.*?^```$|`[^`\n]*`", lambda code: re.sub(r"[^\n]", " ", code[0]), text, flags=re.S | re.M)
        yield 1, hidden


def findings(path: Path) -> Iterator[str]:
    """One line for each term that a file should not have."""
    for line, text in prose(path):
        for term in PATTERN.finditer(text):
            number = line + text.count("\n", 0, term.start())
            better = BETTER[int(str(term.lastgroup)[1:])]
            yield f"{path.relative_to(ROOT)}:{number}: {' '.join(term[0].split())!r}; better: {better}"


def documents() -> list[Path]:
    """README and its neighbours, and the pages of the documentation."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(pages)]


def sources() -> list[Path]:
    """Everything that is written in Python but tests, and this list."""
    folders = ("ip_plugin", "adapters", "examples", "benchmarks", "docs")
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(path for path in paths if path != Path(__file__) and path.parts[-2:-1] != ("_build",))


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]] or documents() + sources()
    lines = [line for path in paths for line in findings(path)]
    print("\n".join(lines))
    sys.exit(bool(lines))

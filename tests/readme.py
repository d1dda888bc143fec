"""The commands of README.md: every line of a fenced or indented block that a reader could type, and how much of it can be checked.

A block mixes commands with what they print; commands are told by their first word. Placeholders are README's own convention: a choice
`a|b` stands for its first value, `[X]` may be left out, `…` stands for words not shown, capitals (CONFIG, RUN, N) for the reader's.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

BOXES = ("data_prep", "pipeline", "cluster")
FIRST = ("python", "make", "torchrun", "deepspeed", "srun", "sbatch", "pip", "git", "rm", "export", "cd")
INLINE = re.compile(r"`(python -m (?:data_prep|pipeline|cluster) [^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command as README has it. line: in README; words: what a shell would see, placeholders resolved as far as they can be;
    whole: nothing of it is left out (`…`)."""

    line: int
    text: str
    words: tuple[str, ...]
    whole: bool

    @property
    def box(self) -> str | None:
        """data_prep, pipeline or cluster, for `python -m BOX COMMAND …`."""
        known = self.words[:2] == ("python", "-m") and len(self.words) > 3 and self.words[2] in BOXES
        return self.words[2] if known else None

    @property
    def name(self) -> str:
        """`pipeline train`; the first word of what is no command of ours."""
        return f"{self.words[2]} {self.words[3]}" if self.box else self.words[0]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[4:])


def commands(path: Path) -> list[Command]:
    """Commands of all blocks, and those named whole within a sentence, in order."""
    found = []
    for number, text in blocks(path):
        for part in re.split(r"\s+&&\s+|;\s+", text):
            if part.split(" ")[0] in FIRST and (command := parse(number, part)):
                found.append(command)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found += [command for text in INLINE.findall(line) if (command := parse(number, text))]
    return found


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines of fenced and indented blocks; a line that ends in a backslash goes on in the next."""
    found: list[tuple[int, str]] = []
    fenced, going_on = False, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text = going_on + line.strip()
            going_on = text[:-1] if text.endswith("\\") else ""
            if not going_on:
                found.append((number, text))
    assert not fenced, "a fenced block of README.md is not closed"
    return found


def parse(line: int, text: str) -> Command | None:
    """The command of a line without its comment; None for what a shell would not take (a table, a sentence)."""
    bare = re.sub(r"\s+#\s.*$", "", text).strip()
    try:
        words = shlex.split(re.sub(r"\s\[(?:--|[A-Z])[^\]]*\]", "", bare))
    except ValueError:
        return None
    whole = "…" not in words
    made = tuple(resolved(word) for word in words if word != "…")
    return Command(line, bare, made, whole) if made else None


def resolved(word: str) -> str:
    """`stac|terramind` → stac; `N` → 1; `a…b` → a-b."""
    if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word):
        return word.partition("|")[0]
    return {"N": "1", "I": "0", "S": "1", "M": "1"}.get(word, word.replace("…", "-"))

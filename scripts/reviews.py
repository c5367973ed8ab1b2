"""Prepare `make reviews`: film reviews as training text, their openings as prompts, labelled sentences for the reward.

    python scripts/reviews.py DATA [--out build/reviews]

DATA holds Pang and Lee's polarity data set v2.0 (1,000 positive and 1,000 negative reviews) and their sentence polarity
data set v1.0, as folders or zip files of any name.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath

from rlhf_pipeline.errors import BadInput

sys.path.insert(0, str(Path(__file__).parent.parent))

FRACTIONS = (("train", 0.76), ("judge", 0.08), ("validation", 0.06), ("test", 0.10))
OPENINGS = range(3, 9)  # words: as many as the DPO paper's prefixes have tokens, 2 to 8
WINDOW, LEAD = 40, 8  # words of a row, and those of its prompt
MOST_BYTES = 256 << 20  # both data sets unpacked have some 12 MiB
ADVICE = "download the polarity data set v2.0 and the sentence polarity data set v1.0 to this folder"


def members(data: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Every file of a folder and of the zip files in it; member names are only compared, never used as paths.

    Raises:
        BadInput: a zip file cannot be read, or is larger than such a data set when unpacked.
    """
    for path in sorted(data.rglob("*")):
        if path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    infos = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda i: i.filename)
                    if sum(info.file_size for info in infos) > MOST_BYTES:
                        raise BadInput(
                            f"{path}: unpacks to more than {MOST_BYTES >> 20} MiB; expected one of the data sets"
                        )
                    files = [(info.filename, archive.read(info)) for info in infos]
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError) as error:
                raise BadInput(f"{path}: not a complete zip file ({error}); download it again") from None
            yield from ((PurePosixPath(name), content) for name, content in files)
        elif path.is_file() and path.suffix in (".txt", ".pos", ".neg"):
            yield PurePosixPath(path.relative_to(data).as_posix()), path.read_bytes()


def decoded(content: bytes) -> str:
    """The text of a file in either of the encodings in use."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def split_of(name: str) -> str:
    """The split of a review; everything from one review is in the same split."""
    place = int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in FRACTIONS:
        place -= share
        if place < 0:
            return split
    return FRACTIONS[-1][0]


def windows(words: list[str], split: str) -> Iterator[dict[str, object]]:
    """Cut a review into rows of WINDOW words, with the first LEAD words of each as its prompt.

    A row that reaches the last word of the review has ended. A rest of at most LEAD words would be only a prompt, so it
    is left out.
    """
    for start in range(0, len(words), WINDOW):
        piece = words[start : start + WINDOW]
        if len(piece) > LEAD:
            prompt, rest = " ".join(piece[:LEAD]), " " + " ".join(piece[LEAD:])
            yield {"prompt": prompt, "completion": rest, "ended": start + WINDOW >= len(words), "split": split}


def openings(reviews: Iterable[tuple[str, list[str]]], every_length: bool = True) -> Iterator[dict[str, str]]:
    """The first words of reviews: every length for training (if asked for), one length for each held-out review.

    An opening that several reviews share belongs to the first of test, validation, judge and train that has it, so that
    no held-out opening is trained on.
    """
    found: dict[str, str] = {}
    order = [split for split, _ in FRACTIONS]
    for split, words in reviews:
        lengths = OPENINGS if every_length and split in ("train", "judge") else [OPENINGS[len(words) % len(OPENINGS)]]
        for length in lengths:
            prompt = " ".join(words[:length])
            if prompt not in found or order.index(found[prompt]) < order.index(split):
                found[prompt] = split
    for prompt, split in found.items():
        yield {"prompt": prompt, "split": split}


def write(path: Path, rows: Iterable[dict[str, object]]) -> int:
    """Write rows as JSONL; returns their number."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def prepare(data: Path, out: Path, say: Callable[[str], object]) -> None:
    """Write reviews, openings, openings_one and sentences as JSONL files, and print the quality of the classifier.

    Raises:
        BadInput: one of the two data sets is missing.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; {ADVICE}")
    reviews: list[tuple[str, list[str]]] = []
    sentences: list[dict[str, object]] = []
    seen: set[tuple[str, str]] = set()
    for name, content in members(data):
        key = name.parent.name if name.parent.name in ("pos", "neg") else "", name.name
        if key in seen:
            continue  # the same file, both zipped and unpacked
        seen.add(key)
        if name.name in ("rt-polarity.pos", "rt-polarity.neg"):
            label = int(name.suffix == ".pos")
            texts = (line.strip() for line in decoded(content).splitlines())
            sentences += [{"text": text, "label": label} for text in texts if text]
        elif name.parent.name in ("pos", "neg") and name.name.startswith("cv"):
            reviews.append((split_of(f"{name.parent.name}/{name.name}"), decoded(content).split()))
    if not reviews:
        raise BadInput(f"{data}: found no reviews (pos/cv*.txt, neg/cv*.txt); {ADVICE}")
    if not sentences:
        raise BadInput(f"{data}: found no sentences (rt-polarity.pos, rt-polarity.neg); {ADVICE}")
    out.mkdir(parents=True, exist_ok=True)
    rows = (row for split, words in reviews for row in windows(words, split))
    say(f"{write(out / 'reviews.jsonl', rows):6} rows of text from {len(reviews)} reviews\n")
    say(f"{write(out / 'openings.jsonl', openings(reviews)):6} openings\n")
    say(f"{write(out / 'openings_one.jsonl', openings(reviews, every_length=False)):6} openings, one of each review\n")
    say(f"{write(out / 'sentences.jsonl', sentences):6} labelled sentences\n")
    from scripts.sentiment import quality

    found = quality(out / "sentences.jsonl")
    say(
        f"sentiment classifier on {found['sentences']} held-out sentences: accuracy {found['accuracy']:.3f} "
        f"+- {found['half_width']:.3f}, {found['nll']:.3f} nats a sentence\n"
    )


def main() -> None:
    """Prepare the folder on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with both data sets")
    parser.add_argument("--out", type=Path, default=Path("build/reviews"))
    options = parser.parse_args()
    try:
        prepare(options.data, options.out, sys.stderr.write)
    except BadInput as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()

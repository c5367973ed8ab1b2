"""Read sources: the hub, saved data sets, local files, the built-in world, collected data.

This module only reads; `formats` interprets the rows. Rows of a local file keep `file:line`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.names import DATA_SUFFIXES
from rlhf_pipeline.data.configs import declared_files
from rlhf_pipeline.data.files import Passes, Row, RowFault, Rows, rows_in
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.disk.arrays import digest_of
from rlhf_pipeline.disk.sealed import unseal
from rlhf_pipeline.errors import DamagedFile, DataError, Fault, UnknownReference, did_you_mean, first_line

WORLDS = ("world:verdicts",)
SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}")
PART_NUMBER = re.compile(r"[-_. ]*[0-9]+$")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files of a split, as in `datasets`."""
COLLECTED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(@v(?P<version>[0-9]{1,15}))?")


@dataclass
class Source:
    """The rows of one source, or its records if the source provides them."""

    name: str  # for reports; `collected:` names include their version
    rows: Rows | Passes = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)  # rows that could not be read
    records: list[Record] | None = None  # of the built-in world, all of one kind
    tokenizer_digest: str | None = None  # tokenizer of collected token ids
    files: list[Path] = field(default_factory=list)  # of a data set of the hub, in the cache of `datasets`

    def whole(self) -> Source:
        """Return the source with its rows in memory."""
        rows = list(self.rows)
        return replace(self, rows=rows, faults=self.rows.faults if isinstance(self.rows, Passes) else self.faults)


def read_source(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    home: Path | None = None,
    in_passes: bool = False,
) -> Source:
    """Read every row of `source`.

    Args:
        source: hub id, directory of files or saved by `datasets`, local file, `world:verdicts`, `collected:NAME[@vN]`.
        config: configuration of a hub data set or of a folder whose README.md declares some, or part of the world.
        split: read only this split.
        home: home directory with collected data; default `$RLHF_HOME`, else `./rlhf_home`.
        in_passes: do not keep the rows: `Source.rows` reads them again at every pass, and has the faults of those that
            cannot be read. What is wrong with the whole source is then found in a pass.

    Raises:
        DataError: the source cannot be read, or has no such split.
        UnknownReference: the collected data set, world or local file does not exist.
        DamagedFile: collected data differ from their manifest.
    """
    source = str(source)
    if source.startswith(("world:", "collected:")):
        if split is not None:
            raise _no_split(source, split, [])
        found = _world(source, config) if source.startswith("world:") else _collected(source, home)
    elif (path := local_path(source)) is None:
        found = _hub(source, config, split)
    elif path.is_dir():
        found = _folder(source, path, config, split) if data_files(path) else _saved(source, path, split)
    else:
        found = Source(source, Passes(functools.partial(_of_file, source, path, split)))
    return found if in_passes else found.whole()


def _of_file(source: str, path: Path, split: str | None, faults: list[RowFault]) -> Iterator[Row]:
    """Yield the rows of a file, or those of one split, which their column `split` names."""
    named: set[str] = set()
    there = False
    for where, row in rows_in(path, str(path), faults):
        if split is not None and "split" in row:
            named.add(str(row["split"]))
        if split is None or row.get("split") == split:
            there = True
            yield where, row
    if split is not None and not there:
        raise _no_split(source, split, sorted(named))


def _no_split(source: str, split: str, names: Iterable[str]) -> DataError:
    expected = f"one of {', '.join(names)}, or all" if names else "`split: all`: the source has no splits"
    return DataError(Fault(source, f"no split {split!r}", expected, did_you_mean(split, names)))


def files_of(source: str, *, home: Path | None = None) -> list[Path] | None:
    """Return the files of a source: [] for a built-in world, None if they are unknown (the hub).

    Raises:
        UnknownReference: as `read_source`.
    """
    if source.startswith("world:"):
        return []
    if source.startswith("collected:"):
        _, records = _collected_records(source, home)
        return [records, records.with_name("manifest.json")]
    path = local_path(source)
    if path is None or not path.is_dir():
        return None if path is None else [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def local_path(source: str) -> Path | None:
    """Return the file or directory that `source` names, or None if it is a hub id.

    Raises:
        UnknownReference: `source` looks like a path, but nothing exists there.
    """
    try:
        given = Path(source).expanduser()
        if given.exists():
            return given
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, `~` of an unknown user, a NUL byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UnknownReference(f"{source[:80]}: not a path ({reason}); expected a source") from None
    if source.startswith((".", "/", "~")) or source.lower().endswith(DATA_SUFFIXES):
        folder = given.parent if given.parent.is_dir() else Path()
        near = did_you_mean(given.name, [entry.name for entry in folder.iterdir()])
        raise UnknownReference(f"{source}: no such file or directory{'; ' + near if near else ''}")
    return None


def _world(source: str, config: str | None) -> Source:
    if source not in WORLDS:
        raise UnknownReference(f"{source}: no such world; known: {', '.join(WORLDS)}")
    from rlhf_pipeline.data import world

    return Source(source, records=world.records(config))


@functools.cache
def world_digest() -> str:
    """Return the digest of the tokenizer of the built-in world."""
    from rlhf_pipeline.data import world
    from rlhf_pipeline.data.tokenizers import tokenizer_digest

    return tokenizer_digest(world.tokenizer())


def _collected_records(source: str, home: Path | None) -> tuple[str, Path]:
    """Return the name of collected data with its version, and the file of its records."""
    text = source.removeprefix("collected:")
    match = COLLECTED.fullmatch(text)
    if not match:
        raise UnknownReference(f"{source}: not a name; expected collected:NAME or collected:NAME@vN")
    data = Path(home or os.environ.get("RLHF_HOME") or "rlhf_home") / "data"
    folder = data / match["name"]
    versions = sorted(
        int(entry.name[1:])
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"v[0-9]+", entry.name)
    )
    if not versions:
        names = [entry.name for entry in data.iterdir()] if data.is_dir() else []
        near = did_you_mean(match["name"], names)
        raise UnknownReference(f"{source}: no collected data with this name in {data}{'; ' + near if near else ''}")
    version = int(match["version"]) if match["version"] else versions[-1]
    if version not in versions:
        there = ", ".join(f"v{number}" for number in versions)
        raise UnknownReference(f"{source}: no such version in {folder}; there are {there}")
    return f"collected:{match['name']}@v{version}", folder / f"v{version}" / "records.jsonl"


def _collected(source: str, home: Path | None) -> Source:
    name, path = _collected_records(source, home)
    manifest = _checked_manifest(path)
    rows = Passes(functools.partial(rows_in, path, name))
    return Source(name, rows, tokenizer_digest=manifest.get("tokenizer_digest"))


def _checked_manifest(records: Path) -> dict[str, Any]:
    path = records.with_name("manifest.json")
    try:
        manifest = unseal(path.read_bytes().decode("utf-8"))
        found = digest_of(records)
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename}: missing; collect the data again") from None
    except ValueError as error:
        raise DamagedFile(f"{path}: not a valid manifest ({error}); collect the data again") from None
    files = manifest.get("files")
    entry = files.get(records.name) if isinstance(files, dict) else None
    expected = entry.get("sha256") if isinstance(entry, dict) else None
    if expected != found:
        raise DamagedFile(
            f"{records}: found sha256 {found[:12]}..., expected {str(expected)[:12]}... as in manifest.json; "
            "collect the data again"
        )
    return manifest


def data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder, in order; [] for a folder that `datasets` has saved."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.lower().endswith(DATA_SUFFIXES))
    names = {file.name for file in files}
    saved = {"state.json", "dataset_dict.json"} & names or any(folder.glob("*.arrow"))
    return [] if saved else [file for file in files if file.name not in ("dataset_info.json", "dataset_infos.json")]


def _split_of_file(path: Path, folder: Path) -> str | None:
    """Return the split that a file's name stands for, else the name of its folder; None if neither names one.

    `data/train_prefs-00000-of-00001.parquet` and `train_prefs.jsonl` are of the split train_prefs; `test.jsonl`,
    `hh_test_2.jsonl` and `test/0000.parquet` of test.
    """
    stem = path.name.partition(".")[0]
    if shard := SHARD.fullmatch(stem):
        return shard[1]
    for name in (stem, *(parent.name for parent in path.relative_to(folder).parents if parent.name)):
        words = re.split(r"[-_. ]+", PART_NUMBER.sub("", name.lower()))
        if (place := next((i for i, word in enumerate(words) if word in SPLIT_WORDS), None)) is not None:
            return "_".join([SPLIT_WORDS[words[place]], *(words[1:] if place == 0 else ())])
    return None


def _folder(source: str, folder: Path, config: str | None, split: str | None) -> Source:
    """Read a folder of data files; more than one split in its README.md, else in their names, are those of the source.

    Raises:
        DataError: some files name a split and others do not, none is of `split`, or errors of `declared_files`.
    """
    base, declared = declared_files(source, folder, config) or (folder, None)
    splits = [(file, _split_of_file(file, base)) for file in data_files(base)] if declared is None else declared
    names = {name for _, name in splits}
    several = len(names) > 1
    if several and (nameless := [file for file, name in splits if name is None]):
        shown = ", ".join(str(file.relative_to(folder)) for file in nameless[:3])
        named = ", ".join(sorted(name for name in names if name is not None))
        expected = "a split in every file's name: train..., validation... or test..."
        raise DataError(Fault(source, f"files of the splits {named}, and {shown}", expected, "name the files apart"))
    if split is not None and split not in names:
        raise _no_split(source, split, sorted({name for name in names if name}))

    def read(faults: list[RowFault]) -> Iterator[Row]:
        for file, name in splits:
            if split in (None, name):
                own: list[RowFault] = []
                for where, row in rows_in(file, str(file), own):
                    yield where, {**row, "split": name} if several else row
                faults += [replace(item, split=name) for item in own] if several else own

    return Source(source, Passes(read))


def _saved(source: str, path: Path, split: str | None) -> Source:
    import datasets

    def read(_faults: list[RowFault]) -> Iterator[Row]:
        try:
            yield from _dataset_rows(source, datasets.load_from_disk(str(path)), split)
        except DataError:
            raise
        except Exception as error:  # the library passes on the errors of its readers
            found = f"no data files, and not a complete directory saved by `datasets` ({first_line(error)})"
            raise DataError(Fault(source, found, "files of .jsonl[.gz], .json, .csv or .parquet")) from error

    return Source(source, Passes(read))


def _hub(source: str, config: str | None, split: str | None) -> Source:
    loaded = from_hub(source, config)
    tables = loaded.values() if hasattr(loaded, "keys") else [loaded]
    files = [Path(file["filename"]) for table in tables for file in table.cache_files]
    return Source(source, Passes(lambda _faults: _dataset_rows(source, loaded, split)), files=files)


def from_hub(source: str, config: str | None, **options: Any) -> Any:
    """Return a data set of the hub, as `datasets` loads it.

    Raises:
        UnknownReference: the source is no hub id. DataError: it cannot be loaded.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UnknownReference(
            f"{source}: no such file, and not a hub id; expected a path, org/name, world:verdicts or collected:NAME"
        )
    import datasets

    try:
        return datasets.load_dataset(source, config, **options)
    except Exception as error:  # connection, missing repository, config or credentials
        found = f"no such local file, and it cannot be loaded from the hub ({first_line(error)})"
        expected = "a local file, a saved directory, or a reachable hub data set"
        fix = "if offline, save the data set elsewhere with `save_to_disk` and name that directory"
        raise DataError(Fault(source, found, expected, fix)) from error


def _dataset_rows(source: str, loaded: Any, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if not hasattr(loaded, "keys"):
        if split is not None:
            raise _no_split(source, split, [])
        refuse_media(source, loaded)
        yield from ((f"{source}:{number}", dict(row)) for number, row in enumerate(loaded, 1))
        return
    several = len(loaded) > 1
    if split is not None and split not in loaded:
        raise _no_split(source, split, list(loaded))
    for name, table in loaded.items() if split is None else [(split, loaded[split])]:
        refuse_media(source, table)
        for number, row in enumerate(table, 1):
            yield f"{source}[{name}]:{number}", {**row, "split": name} if several else dict(row)


def refuse_media(source: str, table: Any) -> None:
    """Refuse columns that the library would decode by opening files or addresses: images, audio.

    Raises:
        DataError: names the columns.
    """
    from datasets.features.features import require_decoding

    features = getattr(table, "features", None) or {}
    if found := [name for name, feature in features.items() if require_decoding(feature)]:
        columns = f"columns that are not text: {', '.join(found)}"
        raise DataError(Fault(source, columns, "text, numbers and lists", "remove them"))

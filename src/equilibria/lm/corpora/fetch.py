"""fetch_wikitext: downloads the token files of WikiText from the Hugging Face Hub with the library ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from equilibria.lm.paths import path_of

WikiText = Literal["wikitext-103-v1", "wikitext-2-v1"]
"""The names of the two data sets of words on the Hub."""

DATASET = "Salesforce/wikitext"
"""The repository of both on the Hub."""
_PARTIAL = ".partial"
"""Suffix of unfinished files."""
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
"""Our name of each split, and its name on the Hub."""


def is_vacant(root: Path) -> bool:
    """True if a folder is absent or empty, apart from the unfinished files of an interrupted download."""
    if root.is_file():
        return False
    return not root.exists() or all(path.name.endswith(_PARTIAL) for path in root.iterdir())


def fetch_wikitext(name: WikiText, root: Path | str) -> None:
    """Download WikiText and write ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens`` to a folder.

    The files have temporary names until all three are complete, so a failed download leaves no incomplete file.
    ``datasets`` has its own cache of downloads; the environment variable ``HF_HOME`` moves it.

    Args:
        name: the data set.
        root: the folder; it must be absent or empty, so that nothing is overwritten.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed; ``pip install "equilibria[data]"``.
        ConnectionError: the download failed.
        FileExistsError: the folder is not empty.
    """
    root = path_of("fetch_wikitext", root=root)
    if not is_vacant(root):
        raise FileExistsError(f"{root} is not empty, and WikiText is downloaded into an empty folder; name another.")
    rows = _download(name, root)
    partial = {split: root / f"wiki.{split}.tokens{_PARTIAL}" for split in _SPLITS}
    root.mkdir(parents=True, exist_ok=True)
    try:
        for split, path in partial.items():
            _write(path, rows[_SPLITS[split]])
        for path in partial.values():
            path.rename(path.with_suffix(""))
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _download(name: WikiText, root: Path) -> Mapping[str, Any]:
    """The three splits, by their names on the Hub."""
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        return datasets.load_dataset(DATASET, name)
    except Exception as error:  # network, Hub or disk: several libraries raise many classes
        raise ConnectionError(
            f"{DATASET}, {name}, could not be downloaded ({type(error).__name__}: {error}); check the network and try "
            f"again, or put wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens into {root} yourself."
        ) from error


def _write(path: Path, rows: Any) -> None:
    """Write the original lines: each text has its line feed, except that the blank line " " became ""."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in rows.iter(batch_size=1000):
            file.writelines((text.removesuffix("\n") or " ") + "\n" for text in batch["text"])

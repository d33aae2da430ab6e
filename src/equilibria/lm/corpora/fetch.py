"""fetch_wikitext: the token files of WikiText from the Hugging Face Hub, through the library ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

WikiText = Literal["wikitext-103-v1", "wikitext-2-v1"]
"""The two data sets of words, as the Hub calls them."""

DATASET = "Salesforce/wikitext"
"""Where the Hub keeps both."""
_PARTIAL = ".partial"
"""What the name of an unfinished file ends in."""
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
"""Our name of each split, and the Hub's."""


def is_vacant(root: Path) -> bool:
    """Whether a folder is absent or empty, but for what a fetch that was killed has left."""
    if root.is_file():
        return False
    return not root.exists() or all(path.name.endswith(_PARTIAL) for path in root.iterdir())


def fetch_wikitext(name: WikiText, root: Path) -> None:
    """Downloads WikiText and writes ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens`` to a folder.

    The files are written under other names and renamed when all three are whole, so that a fetch that fails leaves no
    part of one. ``datasets`` keeps what it downloads in a cache of its own, which ``HF_HOME`` moves.

    Args:
        name: which of the two.
        root: the folder; absent or empty, so that nothing is overwritten.

    Raises:
        ModuleNotFoundError: without ``datasets``; ``pip install "equilibria[data]"``.
        ConnectionError: the download failed.
        FileExistsError: the folder holds something.
    """
    root = root.expanduser()
    if not is_vacant(root):
        raise FileExistsError(f"{root} is not empty, and WikiText is fetched into a folder of its own; name another.")
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
    except Exception as error:  # of the network, the Hub or the disk, in many classes of several libraries
        raise ConnectionError(
            f"{DATASET}, {name}, could not be downloaded ({type(error).__name__}: {error}); check the network and try "
            f"again, or put wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens into {root} yourself."
        ) from error


def _write(path: Path, rows: Any) -> None:
    """Rows as the lines they were: each has its line feed, but blank lines came as "" and were " "."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in rows.iter(batch_size=1000):
            file.writelines((text.removesuffix("\n") or " ") + "\n" for text in batch["text"])

"""A folder that appears whole or not at all: written under another name, then renamed.

`hf/export.py` and `exchange/` write theirs this way: an interrupted or failed export leaves an older one as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_llm.ops.storage import sync_folder


@contextmanager
def whole_folder(output: str | Path, overwrite: bool, what: str, foreign: Callable[[Path], str | None]) -> Iterator[Path]:
    """The folder to write into; when the block ends without an exception, it becomes `output`.

    Args:
        overwrite: replace what an earlier command wrote there.
        what: what that is, such as "export", for messages.
        foreign: why a folder is not such a thing ("has no config.json"), None if it is one: only then is it replaced.

    Raises ValueError if `output` is in the way, before the block begins.
    """
    if "://" in str(output):
        raise ValueError(f"{output}: what this command writes is a local folder; copy it to where it belongs")
    output = Path(output).absolute()
    old = output.with_name(f".{output.name}.old")
    if old.exists() and not output.exists():  # a command was killed between its two renames
        old.rename(output)
    _check_output(output, overwrite, what, foreign)
    partial_folder = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a command that was interrupted
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        partial_folder.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    sync_folder(output.parent)


def _check_output(output: Path, overwrite: bool, what: str, foreign: Callable[[Path], str | None]) -> None:
    """Refuse to mix with or delete what is not an older one of the same sort."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file; {'an' if what[0] in 'aeiou' else 'a'} {what} is a folder")
    if not overwrite:
        raise ValueError(f"{output} is not empty; choose another folder, or replace it with --overwrite")
    reason = foreign(output)
    if reason is not None:
        raise ValueError(f"{output} {reason}, so it is no earlier {what} and is not deleted; choose another folder")

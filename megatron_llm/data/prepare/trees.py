"""Message trees of OpenAssistant: their conversations, and trees from rows that each hold one message.

A record is a nested tree (`{"prompt": {"text", "role", "replies": [...]}}`, the export), or what `read_trees` makes of the
rows on the hub (`message_id`, `parent_id`, `text`, `role`, `rank`), which lie in any order. `conversations.py` asks for the
conversations of a tree; `inputs.py` reads rows through `read_trees`.

Left out, with everything that answers it: a message that is deleted, was reviewed and refused, or has no text; of rows also
one whose tree is not ready for export. A conversation ends with a reply: questions that nobody answered are left out too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_llm.data.prepare.chunks import Chunk, Job, Skipped, is_record, record_json
from megatron_llm.data.prepare.turns import Message, Record

ROWS = "rows of a message tree"  # key of a record that `read_trees` made: [parent's place or -1, role, text, rank] each
TREE_ID = "message_tree_id"
ROLES = {"prompter": "user", "assistant": "assistant"}
READY = "ready_for_export"
LEFT_OUT = "deleted or refused messages, and what follows them, are left out of a tree"


class Node(NamedTuple):
    """A message, `parent` by its place in the list of all, -1 for the first; a parent comes before its replies."""

    parent: int
    role: str
    text: str
    rank: float | None


def is_row(record: Record) -> bool:
    """Whether a record is one message of a tree."""
    return "parent_id" in record and all(isinstance(record.get(key), str) for key in ("message_id", "role", "text"))


def conversations(record: Record, best: bool) -> tuple[list[list[Message]], tuple[str, ...]]:
    """Messages of every path from the root to a last reply, best-ranked replies first, and what was left out in words.

    `best`: only the path that takes the best-ranked reply at every step; what has no rank comes behind what has one.
    Raises ValueError if there is none, and for a row that was not read with its tree.
    """
    if ROWS in record:
        nodes, left_out = [Node(*row) for row in record[ROWS]], False
    elif isinstance(record.get("prompt"), dict):
        if record.get("tree_state") not in (None, READY):
            raise ValueError(f"the tree is not ready for export but {record['tree_state']!r}")
        nodes, left_out = _nested(record["prompt"])
    elif is_row(record):
        raise ValueError(
            "a row of a message tree, in a file whose first record is none: put all rows of the trees into files of their own"
        )
    else:
        raise ValueError("no tree: neither a 'prompt' with 'replies' nor rows with 'message_id' and 'parent_id'")
    found = [[Message(role=nodes[at].role, content=nodes[at].text) for at in path] for path in _paths(nodes, best)]
    if not found:
        raise ValueError("the tree has no reply")
    return found, (LEFT_OUT,) if left_out else ()


def _refusal(message: Record) -> str:
    """Why a message is left out, "" if it is not. Raises ValueError for what cannot be a message."""
    if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
        raise ValueError(f"unknown role {message.get('role')!r} in a message tree; known: {', '.join(ROLES)}")
    rank = message.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
        raise ValueError(f"'rank' of a message is not a number but {type(rank).__name__}")
    if message.get("deleted"):
        return "a deleted message"
    if message.get("review_result") is False:
        return "a message that its reviewers refused"
    if message.get("tree_state") not in (None, READY):
        return "a message of a tree that is not ready for export"
    text = message.get("text")
    return "" if isinstance(text, str) and text.strip() else "a message without text"


def _nested(root: Record) -> tuple[list[Node], bool]:
    nodes: list[Node] = []
    left_out, waiting = False, [(-1, root)]
    while waiting:
        parent, message = waiting.pop()
        replies = message.get("replies") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(replies, list | None):
            raise ValueError("a message of the tree is not a JSON object, or its 'replies' are no list")
        if _refusal(message):
            left_out = True
            continue
        nodes.append(Node(parent, ROLES[message["role"]], message["text"], message.get("rank")))
        waiting += [(len(nodes) - 1, reply) for reply in reversed(replies or [])]
    return nodes, left_out


def _paths(nodes: Sequence[Node], best: bool) -> Iterator[list[int]]:
    """Places from the root to each last reply, depth first."""
    replies: list[list[int]] = [[] for _ in nodes]
    for at in reversed(range(len(nodes))):
        replies[at].reverse()
        replies[at].sort(key=lambda reply: (nodes[reply].rank is None, nodes[reply].rank or 0))
        if nodes[at].parent >= 0 and (nodes[at].role == "assistant" or replies[at]):  # else nothing is to be learnt from it
            replies[nodes[at].parent].append(at)
    waiting = [0] if nodes and (replies[0] or nodes[0].role == "assistant") else []
    while waiting:
        at = waiting.pop()
        if replies[at]:
            waiting += replies[at][:1] if best else reversed(replies[at])
            continue
        path = []
        while at >= 0:
            path.append(at)
            at = nodes[at].parent
        yield path[::-1]


def read_trees(job: Job, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Chunks of trees from `chunks` of rows, in the order of their roots; the `Position` counts trees.

    All rows are held in memory, and read again when reading goes on behind a chunk. A row that is in no tree is skipped by
    name: a message that is left out, what answers one, and what has no root above it.
    """
    gathered = _Rows()
    for chunk in chunks:
        gathered.add(chunk)
    first = job.at[1] if job.at else 0
    roots, skipped = gathered.roots, [] if job.at else gathered.skipped()
    while first < len(roots) or skipped:
        last, size = first, 0
        records: list[Record] = []
        while (
            last < len(roots)
            and (not records or size < job.chunk_bytes)
            and gathered.path(roots[last]) == gathered.path(roots[first])
        ):
            records.append(gathered.tree(roots[last]))
            size += sum(len(row[2]) for row in records[-1][ROWS])
            last += 1
        path = gathered.path(roots[first]) if roots else job.file.path
        read, disk = (_share(total, first, last, len(roots)) for total in (gathered.input_bytes, job.file.size))
        yield Chunk(path, "row", "tree", records, first + 1, first, read, disk, (job.number, last, last), skipped)
        first, skipped = last, []


def _share(total: int, first: int, last: int, count: int) -> int:
    """What items [first, last) of `count` have of a total."""
    return total * last // count - total * first // count if count else total


class _Rows:
    """The messages of all trees by their ids, in the order of the input."""

    def __init__(self) -> None:
        self.roots: list[str] = []
        self.input_bytes = 0
        self._messages: dict[
            str, tuple[str, str | None, str, str, float | None, str]
        ] = {}  # path, parent, role, text, rank, where
        self._replies: dict[str, list[str]] = {}
        self._refused: dict[str, Skipped] = {}
        self._skipped: list[Skipped] = []

    def add(self, chunk: Chunk) -> None:
        self.input_bytes += chunk.input_bytes
        self._skipped += chunk.skipped
        for index in range(len(chunk.records)):
            if is_record(chunk, index):
                try:
                    self._add(record_json(chunk, index), chunk.path, chunk.where(index))
                except ValueError as error:
                    self._skipped.append(Skipped(chunk.where(index), str(error)))

    def _add(self, row: Record, path: str, where: str) -> None:
        if "parent_id" not in row or not isinstance(row.get("message_id"), str):
            raise ValueError("no row of a message tree (with 'message_id' and 'parent_id') in a file of such rows")
        name, parent = row["message_id"], row["parent_id"] or None  # "" in csv
        if not isinstance(parent, str | None):
            raise ValueError(f"'parent_id' is not a string but {type(parent).__name__}")
        if name in self._messages or name in self._refused:
            raise ValueError("its message_id occurs twice")
        if isinstance(row.get("rank"), str):
            row = {**row, "rank": _csv_rank(row["rank"])}
        row = {
            **row,
            **{key: _CSV.get(row[key], row[key]) for key in ("deleted", "review_result") if isinstance(row.get(key), str)},
        }
        refusal = _refusal(row)
        if refusal:
            self._refused[name] = Skipped(where, refusal, bad=False)
        else:
            self._messages[name] = (path, parent, ROLES[row["role"]], row["text"], row.get("rank"), where)
        if parent is not None:
            self._replies.setdefault(parent, []).append(name)
        elif not refusal:
            self.roots.append(name)

    def path(self, root: str) -> str:
        return self._messages[root][0]

    def tree(self, root: str) -> Record:
        rows: list[list[Any]] = []
        for parent, name in self._below(root):
            _, _, role, text, rank, _ = self._messages[name]
            rows.append([parent, role, text, rank])
        return {TREE_ID: root, ROWS: rows}

    def _below(self, top: str) -> Iterator[tuple[int, str]]:
        """(place of its parent, id) of `top` and all that is below it and not refused, parents first."""
        waiting, place = [(-1, top)], 0
        while waiting:
            parent, name = waiting.pop()
            yield parent, name
            waiting += [(place, reply) for reply in reversed(self._replies.get(name, ())) if reply in self._messages]
            place += 1

    def skipped(self) -> list[Skipped]:
        """All rows that are in no tree."""
        lost = [*self._skipped, *self._refused.values()]
        unseen = dict.fromkeys(self._messages)
        for root in self.roots:
            for _, name in self._below(root):
                del unseen[name]
        below = {
            reply
            for name in self._refused
            for top in self._replies.get(name, ())
            if top in unseen
            for _, reply in self._below(top)
        }
        for name in unseen:
            where = self._messages[name][-1]
            if name in below:
                lost.append(Skipped(where, "it answers a message that is left out", bad=False))
            else:
                lost.append(Skipped(where, "a row without the root of its tree: a message above it is not in the input"))
        return lost


_CSV = {"true": True, "false": False, "True": True, "False": False, "": None}


def _csv_rank(text: str) -> float | None:
    """A rank that csv gives as a string. Raises ValueError."""
    return float(text) if text.strip() else None

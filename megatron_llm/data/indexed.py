"""Token files: Megatron's `PREFIX.bin` + `PREFIX.idx` (MMIDIDX version 1), `PREFIX.roles.bin`, `PREFIX.meta.json`.

`.bin` is the token ids back to back, little-endian, no header. `.idx` (Megatron-LM, core/datasets/indexed_dataset.py):

    offset 0   9 bytes  b"MMIDIDX\\0\\0"
    offset 9   uint64   version = 1
    offset 17  uint8    dtype code (DTYPES below)
    offset 18  uint64   S, number of sequences
    offset 26  uint64   D, number of document indices = documents + 1
    offset 34  int32[S] tokens of each sequence; int64[S] byte offset of each in .bin;
               int64[D] sequence number at which each document starts, the last one = S; int8[S] modes (optional)

`.roles.bin` (chat) is one byte a token, `.meta.json` holds a `DatasetMeta`; Megatron ignores both, and files without
them are read. `writer.py` writes them; `rows`, `stream` and the `inspect` command read.
"""

from __future__ import annotations

import bisect
import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
BLOCK = 1 << 20  # entries handled at a time where a whole file must be walked

ROLES = {"none": 0, "system": 1, "user": 2, "assistant": 3, "tool": 4}
ROLE_MASK = 0b0111
NOT_TRAINED = 0b1000
WEIGHT_SHIFT = 4  # bits 4-7 of a role byte: index into DatasetMeta.weights
MAX_WEIGHTS = 16

IntArray = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 below 65,500 tokens, else int32: the rule of Megatron's `DType.optimal_dtype`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclasses.dataclass(frozen=True)
class DatasetMeta:
    """What `PREFIX.meta.json` says. The counts come from the writer; the rest from whoever made the tokens.

    Attributes:
        kind: "pretrain" or "chat".
        tokenizer, tokenizer_fingerprint: folder it was made with, sha256 of its tokenizer.json (or vocabulary files).
        vocab_size: len(tokenizer). eod_id: id appended to every document, None if none was.
        documents, tokens, max_token_id: counts, and the largest id that occurs.
        made_by: digest of the command and its inputs, by which a repeated command knows that its work is done.
        shard: (number, count) if this is one of several shards, which `merge` joins; part_of: digest of what they are cut
            from, the same for all that belong together.
        weights: loss weights that bits 4-7 of a role byte choose from, at most 16, the first of which is 1.
        input_bytes, skipped: bytes of input after decompression; records not taken, by reason.
        records: number of records read. formats: of chat data how many of them had each format.
        variant: "flip" or "predict_instruction" if document i is another task from the conversation in document i of the
            data set whose name is this one's without `.VARIANT`, or empty if there is none; `skipped` then counts those, by
            reason. Both have the same `made_by`.
    """

    kind: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    documents: int = 0
    tokens: int = 0
    max_token_id: int = -1
    made_by: str | None = None
    shard: tuple[int, int] | None = None
    part_of: str | None = None
    weights: tuple[float, ...] = (1.0,)
    input_bytes: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    records: int = 0
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    variant: str | None = None

    @classmethod
    def read(cls, path: Path) -> DatasetMeta:
        """Raises ValueError naming the file if it is not such a JSON object. Unknown keys are left to newer versions."""
        import pydantic  # only here: a tenth of a second, which a command that writes need not wait for

        from megatron_llm.config import sentences

        try:
            return pydantic.TypeAdapter(cls).validate_json(path.read_bytes())
        except pydantic.ValidationError as error:
            what = "; ".join(sentences(error))
            raise ValueError(f"{path} is not a data set description ({what}); delete it or preprocess again") from error


class IndexedDataset:
    """Read access to one data set through memory maps: opening costs the same for a thousand tokens and a trillion.

    Opening looks at the header and the ends of the index, not at what lies between: reading a place that is damaged
    raises ValueError.

    Attributes:
        tokens: all token ids [N], memory-mapped. roles: uint8 [N] memory-mapped, None without `.roles.bin`.
        meta: the description, None without `.meta.json`. documents: number of documents.
        sequence_lengths, sequence_pointers: int32 tokens and int64 byte offset in `.bin` of each sequence, memory-mapped.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        """`vocab_size`: `read` refuses ids that are not below it.

        Raises ValueError naming file and byte offset if a file is missing, damaged or does not fit the others.
        """
        self.prefix = str(prefix)
        self._vocab_size = vocab_size
        self._maps: dict[str, mmap.mmap] = {}  # by suffix
        self._random = False
        for suffix in (".idx", ".bin"):
            if not Path(self.prefix + suffix).is_file():
                raise ValueError(f"{self.prefix}{suffix} does not exist; {self._missing_hint()}")
        self._read_index(Path(self.prefix + ".idx"))
        path = Path(self.prefix + ".bin")
        length, start = (
            (int(self.sequence_lengths[-1]), int(self.sequence_pointers[-1])) if len(self.sequence_pointers) else (0, 0)
        )
        expected = start + length * self.dtype.itemsize
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but {self.prefix}.idx describes {expected} "
                f"({len(self.sequence_lengths)} sequences of {self.dtype.name}); "
                f"the file is truncated or belongs to another index"
            )
        if length < 0 or start < 0 or start % self.dtype.itemsize:
            at = self._pointers_at + 8 * (len(self.sequence_pointers) - 1)
            raise self._damaged(at, f"the last sequence has {length} tokens from byte {start} of the .bin on")
        self.tokens: IntArray = self._array(".bin", self.dtype, 0, expected // self.dtype.itemsize)
        self.roles = self._read_roles(Path(self.prefix + ".roles.bin"))
        self.meta = self._read_meta(Path(self.prefix + ".meta.json"))

    def _array(self, suffix: str, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
        """Read-only array of `count` items in one of the files, mapped into memory; an empty file cannot be mapped."""
        if not count:
            return np.empty(0, dtype)
        if suffix not in self._maps:
            with open(self.prefix + suffix, "rb") as file:
                try:
                    self._maps[suffix] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:  # too many open files, mostly
                    raise OSError(error.errno, error.strerror, file.name) from error
        return np.frombuffer(self._maps[suffix], dtype, count, offset)

    def expect_random_reads(self) -> None:
        """Tell the kernel that the next reads are far apart.

        Else it reads on after each of them, megabytes on some machines, which takes time and pushes useful pages out of
        its cache.
        """
        self._random = True
        for file in self._maps.values():
            file.madvise(mmap.MADV_RANDOM)

    def _missing_hint(self) -> str:
        """Users often give the file instead of the prefix, or have not preprocessed."""
        for suffix in (".bin", ".idx"):
            if self.prefix.endswith(suffix):
                return f"give the path without {suffix}"
        return "a data set is PREFIX.bin and PREFIX.idx, made by `megatron-llm preprocess`, of conversations by `preprocess-chat`"

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if header[:9] != MAGIC:
            raise ValueError(f"{path} is not a token index: bytes 0-8 are {header[:9]!r}, expected {MAGIC!r}")
        if len(header) < HEADER.size:
            raise ValueError(f"{path} is truncated: it ends at byte {size}, inside the header of {HEADER.size} bytes")
        _, version, code, sequences, indices = HEADER.unpack(header)
        if version != 1:
            raise ValueError(f"{path} has index version {version} at byte 9; only version 1 is known")
        if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
            raise ValueError(f"{path} has dtype code {code} at byte 17; token data has an integer type (1-5 or 8)")
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[code]).newbyteorder("<")
        pointers_at = HEADER.size + 4 * sequences
        documents_at = pointers_at + 8 * sequences
        end = documents_at + 8 * indices
        if size not in (end, end + sequences):  # `sequences` more bytes: the modes of multi-modal data
            raise ValueError(
                f"{path} has {size} bytes, but its header (bytes 18-33) promises {sequences} sequences and {indices} document "
                f"indices, which take {end}; the file is {'truncated' if size < end else 'damaged'}"
            )
        self.sequence_lengths = self._array(".idx", np.dtype("<i4"), HEADER.size, sequences)
        self._pointers_at, self._documents_at = pointers_at, documents_at
        self.sequence_pointers = self._array(".idx", np.dtype("<i8"), pointers_at, sequences)
        self._document_indices = self._array(".idx", np.dtype("<i8"), documents_at, indices)
        # The header has 34 bytes, so these arrays are not aligned, and `np.searchsorted` would copy all of them first.
        # `bisect` reads the same memory in place.
        self._pointers_view = self.sequence_pointers.view(np.uint8).data.cast("q")
        self._document_indices_view = self._document_indices.view(np.uint8).data.cast("q")
        if indices == 0 or int(self._document_indices[0]) != 0 or int(self._document_indices[-1]) != sequences:
            raise ValueError(f"{path}: document indices at byte {documents_at} do not run from 0 to {sequences}")
        self.documents = indices - 1

    def _read_roles(self, path: Path) -> npt.NDArray[np.uint8] | None:
        if not path.is_file():
            return None
        if path.stat().st_size != len(self.tokens):
            raise ValueError(f"{path} has {path.stat().st_size} bytes for {len(self.tokens)} tokens; preprocess again")
        return self._array(".roles.bin", np.dtype(np.uint8), 0, len(self.tokens))

    def _read_meta(self, path: Path) -> DatasetMeta | None:
        if not path.is_file():
            return None
        meta = DatasetMeta.read(path)
        if (meta.documents, meta.tokens) != (self.documents, len(self.tokens)):
            raise ValueError(
                f"{path} describes {meta.documents} documents with {meta.tokens} tokens, but {self.prefix}.idx has "
                f"{self.documents} with {len(self.tokens)}; it belongs to another data set: delete it or preprocess again"
            )
        return meta

    def _damaged(self, at: int, what: str) -> ValueError:
        return ValueError(f"{self.prefix}.idx is damaged: {what} (byte {at}); preprocess again")

    def _document_start(self, document: int) -> int:
        """Token offset of a document; of the end for `document == documents`."""
        sequence = self._document_indices_view[document]
        if sequence == len(self.sequence_pointers):
            return len(self.tokens)
        if not 0 <= sequence < len(self.sequence_pointers):
            at = self._documents_at + 8 * document
            raise self._damaged(at, f"document {document} starts at sequence {sequence} of {len(self.sequence_pointers)}")
        start, rest = divmod(self._pointers_view[sequence], self.dtype.itemsize)
        if rest or not 0 <= start <= len(self.tokens):
            at = self._pointers_at + 8 * sequence
            raise self._damaged(at, f"sequence {sequence} starts at byte {self.sequence_pointers[sequence]} of the .bin")
        return start

    def boundaries(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Token offsets b with start < b < end at which a document starts, ascending. Binary search: O(log documents)."""
        size = self.dtype.itemsize
        first = bisect.bisect_right(self._pointers_view, start * size)
        last = bisect.bisect_left(self._pointers_view, end * size, lo=first)
        low = bisect.bisect_left(self._document_indices_view, first)
        high = bisect.bisect_left(self._document_indices_view, last, lo=low)
        if low == high:
            return np.empty(0, np.int64)
        sequences = self._document_indices[low:high] - first
        if not 0 <= sequences.min() <= sequences.max() < last - first:
            raise self._damaged(self._documents_at + 8 * low, f"documents {low} to {high} do not follow each other")
        places = self.sequence_pointers[first:last][sequences] // size
        steps = places[1:] - places[:-1]
        if not start < places[0] <= places[-1] < end or (steps < 0).any():
            raise self._damaged(self._pointers_at + 8 * first, f"sequences {first} to {last} do not follow each other")
        # An empty document starts where the next one does.
        return places if steps.all() else places[np.append(True, steps > 0)]

    def document_offsets(self) -> npt.NDArray[np.int64]:
        """Token offset of every document's start, then the number of tokens: int64 [documents + 1]. Reads the whole index."""
        offsets = np.empty(self.documents + 1, np.int64)
        end = len(self.sequence_pointers)
        for first in range(0, self.documents + 1, BLOCK):
            sequences = self._document_indices[first : first + BLOCK]
            low, high = int(sequences[0]), int(sequences[-1])
            if (np.diff(sequences) < 0).any() or low < 0 or high > end:
                raise self._damaged(self._documents_at + 8 * first, f"documents from {first} on do not follow each other")
            starts = np.append(self.sequence_pointers[low : high + 1], len(self.tokens) * self.dtype.itemsize)
            if (starts % self.dtype.itemsize).any():
                raise self._damaged(self._pointers_at + 8 * low, f"some sequence from {low} on starts within a token")
            offsets[first : first + BLOCK] = starts[sequences - low] // self.dtype.itemsize
        wrong = (np.diff(offsets) < 0) | (offsets[1:] > len(self.tokens))
        if wrong.any() or offsets[0] != 0:
            document = int(np.argmax(wrong)) if offsets[0] == 0 else 0
            raise self._damaged(self._documents_at + 8 * document, f"document {document} starts or ends outside its neighbours")
        return offsets

    def document(self, number: int) -> IntArray:
        """Token ids of one document, memory-mapped. Raises IndexError outside [0, documents)."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents} in {self.prefix}")
        start, end = self._document_start(number), self._document_start(number + 1)
        if start > end:
            raise self._damaged(self._documents_at + 8 * number, f"document {number} ends before it starts")
        return self.tokens[start:end]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """A copy of the `count` ids from token `start` on, int64 [count] (fewer at the end of the data set).

        Raises ValueError naming file and byte of an id that is negative or not below `vocab_size`.
        """
        if self._random and start < len(self.tokens):
            # Without reading on, each page would be fetched by itself.
            first, end = (place * self.dtype.itemsize for place in (start, min(start + count, len(self.tokens))))
            first -= first % mmap.PAGESIZE
            self._maps[".bin"].madvise(mmap.MADV_WILLNEED, first, end - first)
        ids = self.tokens[start : start + count].astype(np.int64)
        limit = 1 << 63 if self._vocab_size is None else self._vocab_size
        unsigned = ids.view(np.uint64)  # a negative id is a huge one, so one comparison finds both
        if len(ids) and int(unsigned.max()) >= limit:
            raise ValueError(f"{self.describe_token(start + int(np.argmax(unsigned >= limit)))}, outside {self._known_ids()}")
        return ids

    def _known_ids(self) -> str:
        return "the non-negative numbers" if self._vocab_size is None else f"the model's 0 to {self._vocab_size - 1}"

    def describe_token(self, place: int) -> str:
        """A token with its id, file and byte, for messages."""
        return f"{self.prefix}.bin has token id {self.tokens[place]} at byte {place * self.dtype.itemsize}"

    def find_outside(self, vocab_size: int) -> int | None:
        """Place of the first token whose id is not in [0, vocab_size), None if there is none. Reads up to there."""
        for first in range(0, len(self.tokens), BLOCK):
            block = self.tokens[first : first + BLOCK]
            if block.min() < 0 or block.max() >= vocab_size:
                return first + int(np.argmax((block < 0) | (block >= vocab_size)))
        return None

    def max_token_id(self) -> int:
        """Largest id: from the meta file, else by reading all tokens. Raises ValueError for negative ids."""
        return self.meta.max_token_id if self.meta is not None else self.scan_max_token_id()

    def scan_max_token_id(self) -> int:
        """Largest id by reading all tokens, -1 without any. Raises ValueError naming the place of a negative id."""
        largest = -1
        for first in range(0, len(self.tokens), BLOCK):
            block = self.tokens[first : first + BLOCK]
            if block.min() < 0:
                raise ValueError(f"{self.describe_token(first + int(np.argmax(block < 0)))}; ids cannot be negative")
            largest = max(largest, int(block.max()))
        return largest

    def verify(self) -> None:
        """Read the whole index. Raises ValueError if sequences are not back to back or documents run backwards."""
        itemsize, expected = self.dtype.itemsize, 0
        for first in range(0, len(self.sequence_lengths), BLOCK):
            lengths = np.asarray(self.sequence_lengths[first : first + BLOCK], np.int64)
            starts = expected + np.concatenate(([0], np.cumsum(lengths * itemsize)))
            wrong = (lengths < 0) | (self.sequence_pointers[first : first + BLOCK] != starts[:-1])
            if wrong.any():
                number = first + int(np.argmax(wrong))
                at = self._pointers_at + 8 * number
                raise ValueError(
                    f"{self.prefix}.idx: sequence {number} (byte {at}) starts at byte {self.sequence_pointers[number]} "
                    f"of the .bin, expected {starts[number - first]}: sequences must lie back to back"
                )
            expected = int(starts[-1])
        for first in range(0, self.documents, BLOCK):
            steps = np.diff(self._document_indices[first : first + BLOCK + 1])
            if (steps < 0).any():
                raise ValueError(f"{self.prefix}.idx: document {first + int(np.argmax(steps < 0))} ends before it starts")

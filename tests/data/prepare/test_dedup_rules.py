"""What counts as a duplicate: against plain Python that says the same in other words."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data.prepare.dedup_rules import (
    MAX_HASHES,
    Signature,
    contains,
    exact_duplicates,
    file_and_record,
    near_duplicates,
    position,
    signature_for,
    text_digest,
    words_and_numbers,
)
from megatron_llm.data.prepare.dedup_steps import FindExact, Signatures, Words


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("It cost 5 euros.", "It cost 6 euros."),
        ("Total: 1,000.50", "Total: 999"),
        ("at -5 degrees", "at 5 degrees"),
        ("version 3.10", "version 3.9, ".rstrip(", ")),
        ("on 2021-01-05", "on 2021-01-06"),
        ("page", "page 2"),
        ("Page 1", "PAGE  2!"),
        ("\u0664\u0665 books", "\u0664\u0666 books"),  # Arabic digits
        ("step12 of", "step13 of"),
        ("1 2 3 go", "1 3 2 go"),
    ],
)
def test_texts_that_differ_in_numbers_only(left: str, right: str) -> None:
    (left_words, left_numbers), (right_words, right_numbers) = words_and_numbers(left), words_and_numbers(right)
    assert left_words == right_words and left_numbers != right_numbers


@pytest.mark.parametrize(
    ("left", "right", "words", "numbers"),
    [
        ("It cost 5 euros.", "it cost 5  Euros", True, True),
        ("It cost 5 euros.", "It cost 5 dollars.", False, True),
        ("one 1 two 2", "two 1 one 2", False, True),
        ("ab c", "a bc", False, True),
        ("1 23", "12 3", True, False),
        ("one", "two", False, True),
    ],
)
def test_words_and_numbers(left: str, right: str, words: bool, numbers: bool) -> None:
    (left_words, left_numbers), (right_words, right_numbers) = words_and_numbers(left), words_and_numbers(right)
    assert ((left_words == right_words), (left_numbers == right_numbers)) == (words, numbers)


@given(st.lists(st.text("ab\u00e9", max_size=2), max_size=40), st.randoms())
@settings(deadline=None, max_examples=60)
def test_exact_duplicates_are_those_of_a_dict(texts: list[str], shuffle: object) -> None:
    first: dict[str, int] = {}
    expected = [(at, first[text]) for at, text in enumerate(texts) if first.setdefault(text, at) != at]
    order = list(range(len(texts)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    digests = np.frombuffer(b"".join(text_digest(texts[at]) for at in order), ">u8").reshape(-1, 2).astype(np.uint64)
    removed, kept = exact_duplicates(digests, np.array(order, np.uint64))
    assert list(zip(removed.tolist(), kept.tolist(), strict=True)) == expected


def test_both_halves_of_a_digest_count() -> None:
    digests = np.array([[1, 1], [1, 2], [2, 2], [1, 1], [2, 1]], np.uint64)
    removed, kept = exact_duplicates(digests, np.arange(5, dtype=np.uint64))
    assert (removed.tolist(), kept.tolist()) == ([3], [0])


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_the_parts_of_the_range_of_digests_leave_nothing_out(tmp_path: Path, parts: int) -> None:
    edges = {min(max((part << 64) // parts + step, 0), 2**64 - 1) for part in range(parts + 1) for step in (-1, 0, 1)}
    for task in range(2):
        halves = np.array(sorted(edges), np.uint64)
        np.save(tmp_path / f"{task:05d}.npy", np.array([halves, halves, position(task, range(len(edges)))]))
    for part in range(parts):
        FindExact(tmp_path, tmp_path / "found").run(None, part, parts)
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "found").iterdir())], axis=1)
    assert found.T.tolist() == [[int(position(1, n)), int(position(0, n))] for n in range(len(edges))]


Member = tuple[int, int, int, int]  # cluster, length, words, numbers


def reference(members: list[Member]) -> dict[int, int]:
    """What goes and what stays for it, by loops over one cluster after the other."""
    instead = {}
    for cluster in {member[0] for member in members}:
        here = [at for at, member in enumerate(members) if member[0] == cluster]
        longest = min(here, key=lambda at: (-members[at][1], at))
        groups = defaultdict(list)
        for at in here:
            differs = [other for other in here if members[other][2] == members[at][2] and members[other][3] != members[at][3]]
            groups[f"numbers {members[at][3]}" if differs else "free"].append(at)
        for name, group in list(groups.items()):
            if name != "free" and longest in group:
                group += groups.pop("free", [])
        for group in groups.values():
            stays = min(group, key=lambda at: (-members[at][1], at))
            instead |= {at: stays for at in group if at != stays}
    return instead


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), max_size=25), st.randoms())
@settings(deadline=None, max_examples=300)
def test_near_duplicates(members: list[Member], shuffle: object) -> None:
    order = list(range(len(members)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    clusters, lengths, words, numbers = np.array([members[at] for at in order], np.uint64).reshape(-1, 4).T
    removed, kept = near_duplicates(np.array(order, np.uint64), lengths, clusters, words, numbers)
    instead = dict(zip(removed.tolist(), kept.tolist(), strict=True))
    assert instead == reference(members) and removed.tolist() == sorted(instead)
    group = [instead.get(at, at) for at in range(len(members))]
    for left in range(len(members)):
        for right in range(left):
            if group[left] == group[right]:
                assert members[left][0] == members[right][0]
                assert members[left][2] != members[right][2] or members[left][3] == members[right][3]
    for cluster in {member[0] for member in members}:
        here = [at for at, member in enumerate(members) if member[0] == cluster]
        assert min(here, key=lambda at: (-members[at][1], at)) not in instead, "the longest of a cluster always stays"


def test_positions_sort_as_the_input() -> None:
    places = [(0, 1), (0, 2**40 - 1), (1, 1), (300, 5), (2**24 - 1, 7)]
    positions = [int(position(file, record)) for file, record in places]
    assert positions == sorted(positions) and [file_and_record(at) for at in positions] == places


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
@settings(deadline=None, max_examples=50)
def test_contains(some: list[int], values: list[int]) -> None:
    values = values + some[:3]
    expected = [value in some for value in values]
    assert contains(np.array(sorted(some), np.uint64), np.array(values, np.uint64)).tolist() == expected


@pytest.mark.parametrize("similarity", [0.02, 0.3, 0.5, 0.72, 0.8, 0.9, 0.99, 0.9999])
def test_signature_finds_nine_of_ten_and_is_the_steepest(similarity: float) -> None:
    shape = signature_for(similarity)
    assert shape.buckets * shape.hashes <= MAX_HASHES
    assert shape.found(similarity) >= 0.9
    for buckets in range(1, MAX_HASHES // (shape.hashes + 1) + 1):
        assert Signature(buckets, shape.hashes + 1).found(similarity) < 0.9


def test_found_is_the_chance_that_random_hashes_agree() -> None:
    shape, similarity = Signature(5, 3), 0.7
    agree = np.random.default_rng(0).random((200_000, shape.buckets, shape.hashes)) < similarity
    assert math.isclose(shape.found(similarity), agree.all(2).any(1).mean(), abs_tol=0.004)
    assert math.isclose(Signature(14, 8).threshold, 0.72, abs_tol=0.005)  # as datatrove says of its default


@pytest.mark.parametrize("similarity", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_similarity_outside_of_0_and_1(similarity: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        signature_for(similarity)


def test_signatures_in_pieces_are_those_of_datatrove(tmp_path: Path) -> None:
    config = MinhashConfig(num_buckets=3, hashes_per_bucket=4, hash_config=HashConfig(hash_fc="sha1"))
    ours = Signatures(str(tmp_path), config, Words())
    shingles = np.random.default_rng(0).integers(0, 2**63, (150_000, 1), np.uint64)
    for count in (1, 65_536, 65_537, 150_000):
        assert ours.get_signature(shingles[:count]) == MinhashDedupSignature.get_signature(ours, shingles[:count])


def test_a_late_writer_does_not_reach_the_signatures(tmp_path: Path) -> None:
    path = tmp_path / "bucket_000/00000.minhash.sig"
    path.parent.mkdir()
    with path.open("wb") as late:
        config = MinhashConfig(num_buckets=1, hash_config=HashConfig(hash_fc="sha1"))
        Signatures(str(tmp_path), config, Words()).run(iter([Document(text="one two three four five six", id="0")]))
        written = path.read_bytes()
        late.write(b"of an interrupted task" * 50)
    assert written and path.read_bytes() == written


def test_words() -> None:
    assert Words().word_tokenize("the café opens") == ["the", "café", "opens"]
    assert Words().word_tokenize("我喜歡 python3 の本") == ["我", "喜", "歡", "python3", "の", "本"]
    assert Words().word_tokenize("") == []

"""Turns of a conversation, from the roles of its tokens: where it may be cut, and what each part must begin with.

Roles are a byte a token (`indexed.ROLES`). What introduces a message belongs to it, but for a reply: the generation prompt
before it, and the white space after it, belong to nobody. Adjacent messages of one role cannot be told apart, and need not be:
a turn is what a user (and a system) says, once or several times, up to where they speak again after a reply. Called by
`chat_rows.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_llm.data.indexed import ROLES

_NOBODY, _SYSTEM, _USER, _REPLY = (bytes([ROLES[name]]) for name in ("none", "system", "user", "assistant"))
_PROMPT = re.compile(b"[%b][%b]*" % (_SYSTEM + _USER, _NOBODY + _SYSTEM + _USER))
_LEADING = re.compile(b"[%b]*" % (_NOBODY + _SYSTEM))


class Part(NamedTuple):
    """Tokens [start, stop) of a conversation, before which its first `head` tokens are repeated. `fits`: into a row."""

    start: int
    stop: int
    head: int
    fits: bool


def last_reply(roles: bytes) -> int:
    """Where the last reply begins; len(roles) without one."""
    end = roles.rfind(_REPLY) + 1
    return len(roles[:end].rstrip(_REPLY)) if end else len(roles)


def head_length(roles: bytes, starts_with_bos: bool) -> int:
    """Tokens at the start that every part needs: BOS and the system's messages.

    BOS has the role of the message that it comes with, which is the user's where there is no system message.
    """
    leading = _LEADING.match(roles)
    assert leading is not None
    end = leading.end()
    if roles[end : end + 1] != _USER:  # the last tokens prompt the reply that follows
        end = roles[:end].rfind(_SYSTEM) + 1
    return max(end, int(starts_with_bos))


def turn_starts(roles: bytes, head: int) -> list[int]:
    """Where a conversation may be cut: at every turn of a user after the head, but for one that the head leads to."""
    found = (match for match in _PROMPT.finditer(roles) if _USER in match.group())
    return [match.start() for match in found if match.start() > head]


def split_turns(roles: bytes, head: int, capacity: int, bos: Sequence[int] = ()) -> Iterator[Part]:
    """Parts of whole turns, each with as many as fit into `capacity` tokens, from the first on; and single turns that do not.

    `bos`: places of BOS tokens. Where a turn begins with one, the template begins anew at every turn, and the head is not
    repeated.
    """
    own_head = {0, *bos}
    part: Part | None = None
    starts = [0, *turn_starts(roles, head)]
    for start, stop in zip(starts, [*starts[1:], len(roles)], strict=True):
        if part is not None and part.head + stop - part.start <= capacity:
            part = part._replace(stop=stop)
            continue
        if part is not None:
            yield part
        repeated = 0 if start in own_head else head
        part = Part(start, stop, repeated, repeated + stop - start <= capacity)
        if not part.fits:
            yield part
            part = None
    if part is not None:
        yield part

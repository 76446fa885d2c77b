"""The record formats of chat data: a table of how each is recognized by its fields, and what makes documents of a record.

`records.py` calls `recognize` for `--format auto` or looks a format up in `FORMATS`, then calls its `documents`. To add a
format, add a line to the table, its function to `conversions.py` if none there will do, and a sample to
`tests/data/prepare/format_samples.py`. docs/data.md shows the table to users.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_llm.data.prepare import trees
from megatron_llm.data.prepare.conversions import (
    SECTION,
    alpaca_text,
    belle,
    chosen,
    completion_text,
    dolphin,
    exchange,
    exchanges,
    flan,
    from_messages,
    from_segments,
    from_tokens,
    has_turns,
    hc3,
    hh,
    lmflow,
    marked,
    oasst,
    plain_text,
    prompt_completion,
    sharegpt,
    ultrachat,
)
from megatron_llm.data.prepare.documents import TURN_FIELDS, Found, describe_fields, has, turn_field
from megatron_llm.data.prepare.turns import GUANACO, HH, OIG, Record


@dataclass(frozen=True)
class Format:
    """One shape of records.

    `fits`: whether a record has this shape; None: it looks like another one, so this one has to be named.
    `documents`: at least one. Raises ValueError saying what is wrong with the record.
    """

    name: str
    fits: Callable[[Record], bool] | None
    documents: Callable[[Record], Found]


def recognize(record: Record) -> Format:
    """The one format whose fields a record has; `text` counts only if no other fits. Raises ValueError for none or several."""
    for group in (FIELDS, TEXTS):
        fitting = [known for known in group if known.fits is not None and known.fits(record)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = " and ".join(known.name for known in fitting)
            raise ValueError(f"ambiguous: it fits {names} ({describe_fields(record)}); name one with --format")
    raise ValueError(f"fits no known format ({describe_fields(record)}); name one with --format, or the columns with --map")


def decoded(record: Record) -> Record:
    """The record with the lists that csv files, and some tables, hold as strings of JSON."""
    return {key: _decoded(key, value) if isinstance(value, str) and key in _LISTS else value for key, value in record.items()}


_LISTS = (
    *TURN_FIELDS, "data", "history", "tools", "segments", "input_output", "human_answers", "chatgpt_answers",
    "input_ids", "labels", "attention_mask", "prompt", "completion", "chosen",
)  # fmt: skip


def _decoded(key: str, text: str) -> Any:
    if key == "tools" and not text.strip():
        return None
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if turns or key not in ("prompt", "completion", "chosen") else text


def _turns(record: Record, *keys: str) -> bool:
    """Whether the turns in `record` are dicts with one of `keys`; by the first of them, as all of a list are alike."""
    turns = record.get(turn_field(record))
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and any(key in turns[0] for key in keys)


def _other_turns(record: Record) -> bool:
    return _turns(record, "role") or (record.get("conversations") is not None and not _turns(record, "input", "output"))


def _flat(record: Record, *names: str) -> bool:
    """Whether one question and its reply stand in fields of strings with these names, and not in a list of turns."""
    return has(record, str, *names) and all(record.get(name) is None for name in (*TURN_FIELDS, "chosen"))


def _belle_turns(record: Record) -> bool:
    return _flat(record, "instruction", "output") and has_turns(record)


def _preference(record: Record) -> bool:
    if record.get("messages") is not None or HH.mark(record.get("chosen")):
        return False
    return has(record, list, "chosen") or (has(record, str, "chosen") and any(name in record for name in ("prompt", "question")))


def _is_tree(record: Record) -> bool:
    return trees.ROWS in record or has(record, dict, "prompt") or trees.is_row(record)


def _has_sections(record: Record) -> bool:
    return has(record, str, "text") and {"Instruction", "Response"} <= set(SECTION.findall(record["text"]))


def _is_plain(record: Record) -> bool:
    return has(record, str, "text") and not (
        _has_sections(record) or any(markers.mark(record["text"]) for markers in (GUANACO, OIG))
    )


FIELDS = (
    Format("messages", lambda r: r.get("messages") is not None and not _turns(r, "from"), from_messages),
    Format("sharegpt", lambda r: _turns(r, "from") or (r.get("messages") is None and _other_turns(r)), sharegpt),
    Format("exchanges", lambda r: r.get("messages") is None and _turns(r, "input", "output"), exchanges),
    Format("ultrachat", lambda r: has(r, list, "data") and bool(r["data"]) and isinstance(r["data"][0], str), ultrachat),
    Format(
        "alpaca",
        lambda r: _flat(r, "instruction", "output") and "input" in r and not _belle_turns(r),
        partial(exchange, question="instruction", reply="output", given="input"),
    ),
    Format(
        "evol_instruct",
        lambda r: _flat(r, "instruction", "output") and "input" not in r and not _belle_turns(r),
        partial(exchange, question="instruction", reply="output"),
    ),
    Format("belle", _belle_turns, belle),
    Format("dolphin", None, dolphin),
    Format(
        "dolly",
        lambda r: _flat(r, "instruction", "response"),
        partial(exchange, question="instruction", reply="response", given="context"),
    ),
    Format(
        "openorca",
        lambda r: _flat(r, "question", "response"),
        partial(exchange, question="question", reply="response", system="system_prompt"),
    ),
    Format("hc3", lambda r: has(r, str, "question") and has(r, list, "human_answers"), partial(hc3, answers="human_answers")),
    Format("hc3_human", None, partial(hc3, answers="human_answers", every=True)),
    Format("hc3_chatgpt", None, partial(hc3, answers="chatgpt_answers", every=True)),
    Format("firefly", lambda r: _flat(r, "input", "target"), partial(exchange, question="input", reply="target")),
    Format("gpt4all", lambda r: _flat(r, "prompt", "response"), partial(exchange, question="prompt", reply="response")),
    Format("flan", lambda r: _flat(r, "inputs", "targets") or _flat(r, "inputs_pretokenized", "targets_pretokenized"), flan),
    Format(
        "prompt_completion",
        lambda r: all(isinstance(r.get(name), str | list) for name in ("prompt", "completion")),
        prompt_completion,
    ),
    Format("prompt_completion_text", None, completion_text),
    Format("hh", lambda r: r.get("messages") is None and HH.mark(r.get("chosen")), hh),
    Format("chosen", _preference, chosen),
    Format("oasst", _is_tree, oasst),
    Format("oasst_best", None, partial(oasst, best=True)),
    Format("lmflow", lambda r: has(r, str, "type") and has(r, list, "instances"), lmflow),
    Format("input_output", lambda r: has(r, list, "segments") or has(r, list, "input_output"), from_segments),
    Format("tokens", lambda r: has(r, list, "input_ids"), from_tokens),
)
TEXTS = (
    Format("guanaco", lambda r: GUANACO.mark(r.get("text")), partial(marked, markers=GUANACO)),
    Format("oig", lambda r: OIG.mark(r.get("text")), partial(marked, markers=OIG)),
    Format("alpaca_text", _has_sections, alpaca_text),
    Format("text", _is_plain, plain_text),
)
FORMATS = {known.name: known for known in (*FIELDS, *TEXTS)}
ALIASES = {"openai": "messages", "xp3": "flan", "oasst_all": "oasst", "evol": "evol_instruct"}

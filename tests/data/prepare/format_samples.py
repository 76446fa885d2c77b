"""Small records in the shape of real data sets, several for each format, and the documents they must become."""

from __future__ import annotations

from typing import Any

from megatron_llm.data.prepare.documents import Segments, Tokens


def say(*turns: str) -> list[dict[str, Any]]:
    """`say("u: hello", "a: hi")` as messages."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[turn[0]], "content": turn[3:]} for turn in turns]


def qa(question: str = "Q", reply: str = "A", system: str = "") -> list[Any]:
    """What one question and its reply become: one conversation."""
    return [say(*([f"s: {system}"] if system else []), f"u: {question}", f"a: {reply}")]


def turn(speaker: str, text: Any, **rest: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text, **rest}


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
WITH_TOOLS = [
    *say("u: Q"),
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
    {**say("a: A")[0], "train": False, "weight": 0.5},
]
TRANSCRIPT = "Human: q\nAssistant: a"
ALPACA_TEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\nO"
)
TREE = {
    "message_tree_id": "1",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "1",
        "text": "Q",
        "role": "prompter",
        "deleted": False,
        "review_result": True,
        "replies": [
            {"message_id": "2", "parent_id": "1", "text": "worse", "role": "assistant", "rank": 1, "replies": []},
            {
                "message_id": "3",
                "parent_id": "1",
                "text": "better",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "message_id": "4",
                        "text": "more?",
                        "role": "prompter",
                        "rank": None,
                        "replies": [{"message_id": "5", "text": "more", "role": "assistant", "rank": None}],
                    },
                    {"message_id": "6", "text": "nobody answers", "role": "prompter", "replies": []},
                ],
            },
        ],
    },
}

# format -> [(record, documents)]
SAMPLES: dict[str, list[tuple[dict[str, Any], list[Any]]]] = {
    "messages": [
        ({"messages": say("s: S", "u: Q", "a: A", "u: R", "a: B"), "id": 3}, [say("s: S", "u: Q", "a: A", "u: R", "a: B")]),
        ({"messages": WITH_TOOLS, "tools": [TOOL]}, [WITH_TOOLS]),
        ({"prompt": "Q", "prompt_id": "x", "chosen": say("u: Q", "a: A"), "rejected": say("u: Q", "a: no"),
          "messages": say("u: Q", "a: A"), "score_chosen": 9.0}, qa()),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q1"}, {"type": "text", "text": "Q2"}]},
                       *say("a: A")]}, qa("Q1Q2")),
        ({"messages": say("u: Q", "u: R", "a: A", "a: B")}, [say("u: Q", "u: R", "a: A", "a: B")]),
    ],
    "sharegpt": [
        ({"id": "x_0", "conversations": [turn("human", "Q"), turn("gpt", "A"), turn("user", "R"), turn("chatgpt", "B")]},
         [say("u: Q", "a: A", "u: R", "a: B")]),
        ({"conversations": [turn("system", "S", weight=None), turn("human", "Q", weight=0), turn("gpt", "A", weight=1)]},
         [[*say("s: S"), {**say("u: Q")[0], "weight": 0}, {**say("a: A")[0], "weight": 1}]]),
        ({"system": "S", "tools": [TOOL], "conversations": [turn("human", "Q"), turn("function_call", "{}"),
          turn("observation", ""), turn("gpt", "A")]}, [say("s: S", "u: Q", "a: {}", "t: ", "a: A")]),
        ({"system_prompt": "S", "conversations": [turn("human", "Q"), turn("gpt", "A")]}, qa(system="S")),  # OpenHermes
        ({"conversations": say("u: Q", "a: A")}, qa()),
        ({"conversation": say("u: Q", "a: A")}, qa()),
        ({"messages": [turn("human", "Q"), turn("bing", "A")]}, qa()),
        ({"idx": 1, "conversations": [turn("human", "Q"), turn("gpt", "A")]}, qa()),  # Evol-Instruct V2
        ({"instruction": "Q", "response": "A", "conversations": [turn("human", "Q"), turn("gpt", "A")]}, qa()),  # Magpie
        ({"conversations": [turn("gpt", "cut off"), turn("human", "Q"), turn("bard", "A")]}, qa()),
        ({"conversations": [turn("system", ""), turn("human", "Q"), turn("gpt", "A"), turn("gpt", "goes on")]},
         qa("Q", "A\n\ngoes on")),
    ],
    "exchanges": [
        ({"source": "s", "conversation": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}]},
         [say("u: Q", "a: A", "u: R", "a: B")]),
        ({"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, qa(system="S")),
    ],
    "ultrachat": [
        ({"id": "0", "data": ["Q", "A", "R", "B"]}, [say("u: Q", "a: A", "u: R", "a: B")]),
        ({"data": ["Q", "A"]}, qa()),
    ],
    "alpaca": [
        ({"instruction": "I", "input": "X", "output": "O", "text": ALPACA_TEXT}, qa("I\n\nX", "O")),
        ({"instruction": "I", "input": "", "output": "O"}, qa("I", "O")),
        ({"instruction": "I", "input": None, "output": "O", "data_source": "p"}, qa("I", "O")),
        ({"instruction": f"Summarize:\n{TRANSCRIPT}", "input": "", "output": "O"}, qa(f"Summarize:\n{TRANSCRIPT}", "O")),
        ({"instruction": f"{TRANSCRIPT}\nHuman: r", "input": "X", "output": "O"}, qa(f"{TRANSCRIPT}\nHuman: r\n\nX", "O")),
        ({"instruction": "I", "input": " ", "output": "O", "system": "S", "history": [["Q", "A"]]},
         [say("s: S", "u: Q", "a: A", "u: I", "a: O")]),
    ],
    "evol_instruct": [
        ({"instruction": "I", "output": "O"}, qa("I", "O")),
        ({"instruction": "I\n", "output": " O"}, qa("I\n", " O")),
        ({"instruction": f"{TRANSCRIPT}\nWhat is this?", "output": "O"}, qa(f"{TRANSCRIPT}\nWhat is this?", "O")),
    ],
    "belle": [
        ({"instruction": "Human:你好\nAssistant:您好！\nHuman:Q\nAssistant:", "input": "", "output": "A"},
         [say("u: 你好", "a: 您好！", "u: Q", "a: A")]),
        ({"instruction": "Human: Q\nAssistant: ", "output": "A"}, qa()),
        ({"instruction": "Human: q\nAssistant: a\nHuman: r", "output": "A"}, [say("u: q", "a: a", "u: r", "a: A")]),
    ],
    "dolphin": [
        ({"instruction": "You are helpful.", "input": "Q", "output": "A"}, qa(system="You are helpful.")),
        ({"instruction": "S", "input": "Q ", "output": "A\n"}, qa("Q ", "A\n", "S")),
    ],
    "dolly": [
        ({"instruction": "I", "context": "C", "response": "R", "category": "closed_qa"}, qa("I\n\nC", "R")),
        ({"instruction": "I", "context": "", "response": "R", "category": "open_qa"}, qa("I", "R")),
        ({"instruction": "I", "response": "R"}, qa("I", "R")),
    ],
    "openorca": [
        ({"id": "cot.1", "system_prompt": "S", "question": "Q", "response": "A"}, qa(system="S")),
        ({"id": "niv.2", "system_prompt": "", "question": "Q", "response": "A"}, qa()),
    ],
    "hc3": [
        ({"question": "Q", "human_answers": ["A", "B"], "chatgpt_answers": ["C"], "source": "reddit"}, qa()),
        ({"id": "1", "question": "Q", "human_answers": ["", "B"], "chatgpt_answers": []}, qa("Q", "B")),
    ],
    "hc3_human": [({"question": "Q", "human_answers": ["A", "B"], "chatgpt_answers": []}, qa() + qa("Q", "B"))],
    "hc3_chatgpt": [({"question": "Q", "human_answers": ["A"], "chatgpt_answers": ["C", " ", "D"]}, qa("Q", "C") + qa("Q", "D"))],
    "firefly": [({"kind": "NLI", "input": "Q", "target": "A"}, qa()), ({"input": "Q", "target": "A"}, qa())],
    "gpt4all": [({"prompt": "Q", "response": "A", "source": "laion"}, qa()), ({"prompt": "Q\n", "response": "A"}, qa("Q\n"))],
    "flan": [
        ({"inputs": "Q", "targets": "A", "task": "t", "template_type": "zs_noopt"}, qa()),
        ({"inputs": "Q", "targets": "A", "language": "en", "split": "train"}, qa()),
        ({"inputs": [1], "inputs_pretokenized": "Q", "targets": [2], "targets_pretokenized": "A"}, qa()),
    ],
    "prompt_completion": [
        ({"prompt": "Q", "completion": "A"}, qa()),
        ({"prompt": say("s: S", "u: Q"), "completion": say("a: A")}, qa(system="S")),
        ({"prompt": "Q", "completion": say("a: A")}, qa()),
    ],
    "prompt_completion_text": [({"prompt": "The sky is", "completion": " blue."},
                                [Segments([("The sky is", False), (" blue.", True)], eos=True)])],
    "hh": [
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nmore\n\nAssistant: B", "rejected": "\n\nHuman: Q"},
         [say("u: Q", "a: A", "u: R\n\nmore", "a: B")]),
        ({"chosen": "Human: Q\n\nAssistant: A"}, qa()),
    ],
    "chosen": [
        ({"prompt": "Q", "chosen": say("u: Q", "a: A"), "rejected": say("u: Q", "a: no")}, qa()),
        ({"prompt": say("u: Q"), "chosen": say("a: A"), "rejected": say("a: no")}, qa()),
        ({"chosen": say("u: Q", "a: A"), "rejected": say("u: Q", "a: no")}, qa()),
        ({"system": "S", "question": "Q", "chosen": "A", "rejected": "no"}, qa(system="S")),  # orca_dpo_pairs
        ({"prompt": "\n\nHuman: P\n\nAssistant: O\n\nHuman: Q\n\nAssistant:", "response": "A", "chosen": "A", "rejected": "no"},
         [say("u: P", "a: O", "u: Q", "a: A")]),  # rm-static
    ],
    "oasst": [
        (TREE, [say("u: Q", "a: better", "u: more?", "a: more"), say("u: Q", "a: worse")]),
        ({"prompt": {"text": "Q", "role": "prompter", "replies": [{"text": "A", "role": "assistant"}]}}, qa()),
    ],
    "oasst_best": [(TREE, [say("u: Q", "a: better", "u: more?", "a: more")])],
    "lmflow": [
        ({"type": "text2text", "instances": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}]}, qa() + qa("R", "B")),
        ({"type": "text_only", "instances": [{"text": "T"}]}, [Segments([("T", True)], eos=True)]),
        ({"type": "conversation", "instances": [{"system": "S", "tools": [], "messages": say("u: Q", "a: A")}]},
         qa(system="S")),
        ({"type": "paired_conversation", "instances": [{"chosen": {"messages": say("u: Q", "a: A")}, "rejected": {}}]}, qa()),
    ],
    "input_output": [
        ({"segments": [{"label": False, "text": "<s>Q\n"}, {"label": True, "text": "A</s>"}]},
         [Segments([("<s>Q\n", False), ("A</s>", True)])]),
        ({"input_output": [{"label": True, "text": "A"}], "id": 1}, [Segments([("A", True)])]),
    ],
    "tokens": [
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}, [Tokens([5, 6, 7], [False, True, True])]),
        ({"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, -100, 6]},
         [Tokens([5, 6], [False, True])]),
        ({"input_ids": [5, 6], "text": "ab"}, [Tokens([5, 6], [True, True])]),
    ],
    "guanaco": [
        ({"text": "### Human: Q### Assistant: A### Human: R### Assistant: B"}, [say("u: Q", "a: A", "u: R", "a: B")]),
        ({"text": "### Human: Q\n### Assistant: A\n", "lang": "en"}, qa()),
    ],
    "oig": [
        ({"text": "<human>: Q\n<bot>: A\n<human>: R\n<bot>: B", "metadata": "{}"}, [say("u: Q", "a: A", "u: R", "a: B")]),
        ({"text": "Background: C\n<human>: Q\n<bot>: A"}, qa(system="Background: C")),
    ],
    "alpaca_text": [
        ({"text": ALPACA_TEXT}, qa("I\n\nX", "O")),
        ({"text": "### Instruction:\nI\n\n### Response:\nO"}, qa("I", "O")),
    ],
    "text": [
        ({"text": "Once upon a time.", "meta": {"url": "u"}}, [Segments([("Once upon a time.", True)], eos=True)]),
        ({"text": "He said: ### nothing\nHuman: a"}, [Segments([("He said: ### nothing\nHuman: a", True)], eos=True)]),
    ],
}  # fmt: skip

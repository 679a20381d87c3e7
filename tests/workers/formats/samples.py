"""Rows of every dialect that each format reads: (format, dialect) -> row."""

from __future__ import annotations

import json
from typing import Any

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
WORSE, WORSE_GPT = {"role": "assistant", "content": "what"}, {"from": "gpt", "value": "what"}
TOOL = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}

SAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("alpaca", "input"): {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ("alpaca", "no input"): {"instruction": "Add.", "output": "3"},
    ("alpaca", "response"): {"instruction": "Add.", "input": "", "response": "3"},
    ("alpaca", "system and history"): {
        "instruction": "Add.", "input": "", "output": "3", "system": "Count.", "history": [["hi", "hello"]],
    },
    ("alpaca", "context"): {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "sums"},
    ("messages", "plain"): {"messages": [USER, ASSISTANT]},
    ("messages", "developer"): {"messages": [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT]},
    ("messages", "weights"): {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]},
    ("messages", "train"): {"messages": [USER, {**ASSISTANT, "train": False}, USER, {**ASSISTANT, "train": True}]},
    ("messages", "parts"): {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
    ("messages", "reasoning"): {"messages": [USER, {**ASSISTANT, "reasoning_content": "Be polite."}]},
    ("messages", "conversations"): {"conversations": [USER, ASSISTANT]},
    ("messages", "role and value"): {"conversations": [{"role": "user", "value": "hi"}, ASSISTANT]},
    ("messages", "tools"): {
        "messages": [
            USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}, ASSISTANT,
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "parallel_tool_calls": False,
    },
    ("messages", "functions"): {
        "messages": [
            USER, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "sunny"}, ASSISTANT,
        ],
        "functions": [TOOL],
    },
    ("sharegpt", "plain"): {"conversations": [HUMAN, GPT]},
    ("sharegpt", "system"): {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
    ("sharegpt", "system beside"): {"conversations": [HUMAN, GPT], "system": "Be brief."},
    ("sharegpt", "other tags"): {
        "conversation": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "hello"}], "id": "1",
    },
    ("sharegpt", "tools as text"): {
        "conversations": [
            HUMAN, {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"from": "observation", "value": "sunny"}, GPT,
        ],
        "tools": json.dumps([TOOL]),
    },
    ("prompt_completion", "texts"): {"prompt": "hi", "completion": "hello"},
    ("prompt_completion", "lists"): {"prompt": [USER], "completion": [ASSISTANT]},
    ("prompt_completion", "system"): {"system": "Be brief.", "prompt": "hi", "completion": "hello"},
    ("preference", "TRL texts"): {"prompt": "hi", "chosen": "hello", "rejected": "what"},
    ("preference", "TRL lists"): {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]},
    ("preference", "TRL implicit"): {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
    ("preference", "TRL implicit texts"): {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    ("preference", "whole conversations"): {
        "prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE], "score_chosen": 8.5,
    },
    ("preference", "OpenAI"): {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ASSISTANT], "non_preferred_output": [WORSE],
    },
    ("preference", "older OpenAI"): {
        "input": {"messages": [USER]}, "preferred_completion": [ASSISTANT], "non_preferred_completion": [WORSE],
    },
    ("preference", "LLaMA-Factory Alpaca"): {
        "instruction": "hi", "input": "there", "chosen": "hello", "rejected": "what", "history": [["a", "b"]],
    },
    ("preference", "LLaMA-Factory ShareGPT"): {"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE_GPT},
    ("preference", "Axolotl chat template"): {"messages": [USER], "chosen": ASSISTANT, "rejected": WORSE},
    ("preference", "Intel"): {"system": "", "question": "hi", "chosen": "hello", "rejected": "what"},
    ("preference", "ICR"): {"input": "hi", "chosen": "hello", "rejected": "what"},
    ("preference", "Argilla"): {
        "system": "Be brief.", "instruction": "hi", "chosen_response": "hello", "rejected_response": "what",
    },
    ("preference", "torchtune"): {"chosen_conversations": [USER, ASSISTANT], "rejected_conversations": [USER, WORSE]},
    ("preference", "AutoTrain"): {"prompt": "hi", "text": "hello", "rejected_text": "what"},
    ("preference", "Nectar"): {
        "prompt": "hi", "answers": [{"answer": "what", "rank": 3}, {"answer": "hello", "rank": 1}],
    },
    ("preference", "HH"): {
        "chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: what",
    },
    ("kto", "TRL texts"): {"prompt": "hi", "completion": "hello", "label": True},
    ("kto", "TRL lists"): {"prompt": [USER], "completion": [ASSISTANT], "label": False},
    ("kto", "question"): {"question": "hi", "completion": "hello", "label": True},
    ("kto", "Alpaca"): {"instruction": "hi", "input": "", "output": "hello", "kto_tag": True},
    ("kto", "ShareGPT"): {"conversations": [HUMAN, GPT], "kto_tag": False},
    ("kto", "messages"): {"messages": [USER, ASSISTANT], "kto_tag": True},
    ("text", "alone"): {"text": "Once upon a time."},
    ("text", "corpus"): {"text": "Once upon a time.", "url": "https://example.org", "meta": {"a": 1}},
    ("mapped", "question and answer"): {"question": "hi", "answer": "hello"},
    ("mapped", "text and summary"): {"text": "Long.", "summary": "Short."},
    ("mapped", "input and target"): {"input": "hi", "target": "hello"},
}  # fmt: skip

FORMATS = tuple(dict.fromkeys(name for name, _dialect in SAMPLES))

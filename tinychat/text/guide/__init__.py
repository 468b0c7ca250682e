"""Tool calls that cannot be malformed: automata over bytes, and what they let a vocabulary say.

    state = json_call([("now", schema)], close=b"</tool_call>", array=False, many=False)
    mask = TokenTrie(tokenizer).mask(state)          # which tokens may come first
"""
from tinychat.text.guide.automaton import State
from tinychat.text.guide.calls import json_call, named_call, python_call
from tinychat.text.guide.tagged import tagged_call
from tinychat.text.guide.tokens import TokenTrie

__all__ = ["State", "TokenTrie", "json_call", "named_call", "python_call", "tagged_call"]

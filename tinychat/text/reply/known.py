"""What no rendering shows: markers that a template's text names, and the usual ends of a turn."""
from tinychat.text.reply.grammars import Grammar, JsonCalls, NamedCalls, PythonCalls

# Frames are told by their markers, nothing else is.
FRAMES = {
    "harmony": ("<|channel|>", "<|message|>"),
    "functionary": (">>>all",),
    "muse": ("<|message|>", "<|eom|>"),
}

REASONING_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)

# (what a template says, the markers round an answer)
WRAPPERS_BY_TEXT = (("<response></response>", ("<response>", "</response>")),)

END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|return|>", "<|call|>",
    "<|flush|>", "<|calls|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "</s>", "<eos>", "<｜end▁of▁sentence｜>",
    "<|tool_response>", "<start_function_response>", "[e~[", "<|role_end|>", "<seed:eos>", "<SPECIAL_12>", "<|message_sep|>",
)

_DEEPSEEK = NamedCalls("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n",
                       "\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_LFM = PythonCalls("<|tool_call_start|>", "<|tool_call_end|>")

# Looked for in this order when no call shows in any rendering.
CALLS_BY_TEXT: tuple[tuple[tuple[str, ...], Grammar], ...] = (
    (("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ["), _LFM),
    (("<start_function_call>",), NamedCalls("<start_function_call>call:", "",
                                            "<end_function_call>", quote="<escape>")),
    (("<｜tool▁calls▁begin｜>",), _DEEPSEEK),
    (("functools",), JsonCalls("functools", "", array=True)),
    (("<|tool_call|>",), JsonCalls("<|tool_call|>", "<|/tool_call|>", array=True)),
    (("[TOOL_CALLS]",), JsonCalls("[TOOL_CALLS]", "", array=True)),
    (("<function_calls>",), PythonCalls("<function_calls>", "</function_calls>")),
    (("<tool_call>",), JsonCalls()),
)

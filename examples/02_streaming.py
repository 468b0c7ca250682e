"""The answer while it is made: `stream=True` gives the wire's events as dicts, one by one."""
import sys

import tinychat

with tinychat.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct") as model:
    events = model.chat("Write two lines about the sea.", stream=True, max_output_tokens=48,
                        system_prompt="You are a poet of few words.")
    for event in events:
        if event["type"] == "prompt_processing.progress":
            print(f"[prompt {event['progress']:.0%}]")
        elif event["type"] == "message.delta":
            print(event["content"], end="", flush=True)
        elif event["type"] == "error":
            print("failed:", event["error"]["message"])
        elif event["type"] == "chat.end":
            stats = event["result"]["stats"]
            print(f"\n[{stats['total_output_tokens']} tokens, first after "
                  f"{stats['time_to_first_token_seconds']:.2f} s, "
                  f"{stats['tokens_per_second']:.0f} a second]")

    # Closing the iterator stops the answer; nothing of it is stored.
    events = model.chat("Tell me a long story.", stream=True)
    for event in events:
        if event["type"] == "message.delta":
            events.close()
    print("[stopped after the first word]")

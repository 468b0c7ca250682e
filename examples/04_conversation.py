"""A conversation: each response has an id, and the next request continues from any of them."""
import sys

import tinychat


def say(model, text: str, after: dict | None = None) -> dict:
    """Ask, in the conversation that ended with the response `after`, or in a new one."""
    response = model.chat(text, previous_response_id=after and after["response_id"],
                          temperature=0, max_output_tokens=32)
    print(f"> {text}\n{response['output'][0]['content']}")
    print(f"  [{response['stats']['input_tokens']} tokens of prompt]\n")
    return response


with tinychat.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct") as model:
    first = say(model, "Tell me one thing about the moon.")
    second = say(model, "And one about the sun.", first)
    say(model, "Which of the two is larger?", second)

    # A branch: the first response can be continued again, as if the rest had not been said.
    # Only the new tokens are computed: the pages of the common beginning are still there.
    say(model, "Say it in other words.", first)
    stats = model.library.load(model.key).engine.stats
    print(f"{stats.n_prefilled_tokens} prompt tokens were computed, "
          f"{stats.n_reused_tokens} were found in the cache")

"""A chat in five lines. The small default model is fetched on first use; an argument names another."""
import sys

import tinychat

with tinychat.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct") as model:
    response = model.chat("What is gravity?", temperature=0, max_output_tokens=48)
    print(response["output"][0]["content"])

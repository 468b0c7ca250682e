"""A question about a picture: MODEL PICTURE, for a model with its mmproj file beside it."""
import sys
from pathlib import Path

import tinychat

name, picture = sys.argv[1:3]
with tinychat.load(name) as model:
    first = model.chat([Path(picture), "What is in this picture?"], max_output_tokens=48)
    print(first["output"][0]["content"])

    # The picture is part of the conversation: nothing of it is computed again.
    then = model.chat("And what is behind it?", previous_response_id=first["response_id"],
                      max_output_tokens=48)
    print(then["output"][0]["content"])
    print(f"{then['stats']['input_tokens']} tokens read, the picture's among them")

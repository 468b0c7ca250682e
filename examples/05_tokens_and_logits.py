"""Below the chat: prompts as text, tokens, what the model expects next, and generation by ids."""
import sys

import numpy as np

import tinychat

with tinychat.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct") as model:
    ids = model.tokenize("The sun rises in the")
    print(ids, [model.detokenize([id]) for id in ids])

    logits = model.logits(ids)  # (n_tokens, n_vocab): row t scores what follows ids[:t + 1]
    chances = np.exp(logits[-1] - logits[-1].max())
    chances /= chances.sum()
    for id in np.argsort(-chances)[:5]:
        print(f"  {chances[id]:6.1%} {model.detokenize([id])!r}")

    # How surprised is the model by a text? The mean of -log p over its tokens.
    for text in ("Cats drink milk.", "Milk drinks cats."):
        ids = model.tokenize(text)
        scores = model.logits(ids)[:-1].astype(np.float64)
        scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
        print(f"{text!r}: {-scores[range(len(ids) - 1), ids[1:]].mean():.2f} nats a token")

    # The chat template makes a prompt of messages; `special` lets its control tokens count as such.
    prompt = model.render([{"role": "user", "content": "Say hello."}])
    print(repr(prompt))
    answer = model.generate(model.tokenize(prompt, special=True), temperature=0.7, seed=1,
                            max_tokens=24)
    print(repr(model.detokenize(answer)))

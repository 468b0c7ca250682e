"""Which text is nearest in meaning to a question: MODEL, one for embeddings."""
import sys

import tinychat

TEXTS = ["Paris is the capital of France.", "The whale is a mammal.", "Copper is a metal."]

with tinychat.load(sys.argv[1]) as model:
    question, *texts = model.embed(["Which animals live in the sea?", *TEXTS])  # unit vectors
    scores = [float(question @ text) for text in texts]

for score, text in sorted(zip(scores, TEXTS), reverse=True):
    print(f"{score:.3f}  {text}")

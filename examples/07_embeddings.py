"""Texts as vectors: which of them is nearest to a question. Takes an embedding model."""
import sys

import tinychat

TEXTS = ["Bread rises because yeast makes carbon dioxide.",
         "The Moon takes 27.3 days for its way round the Earth.",
         "Cats sleep twelve to sixteen hours a day."]
QUESTION = "How long is the orbit of the Moon?"

# Fetched by: tinychat pull nomic-ai/nomic-embed-text-v1.5-GGUF --quantization F16
with tinychat.load(sys.argv[1] if len(sys.argv) > 1 else "nomic-embed-text-v1.5") as model:
    # nomic-embed-text was trained with these words in front; what a model wants, its card says
    texts = model.embed([f"search_document: {text}" for text in TEXTS])  # float32 (3, n_embd)
    question, = model.embed([f"search_query: {QUESTION}"])

    # Vectors have the length 1, so that their product is the cosine of their angle.
    for score, text in sorted(zip(texts @ question, TEXTS), reverse=True):
        print(f"{score:.3f}  {text}")

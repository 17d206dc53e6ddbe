"""EmbedServe: embeddings, similarity search and zero-shot classification over HTTP."""

__all__ = ["__version__"]
__version__ = "0.1.0"

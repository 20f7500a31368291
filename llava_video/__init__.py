"""LLaVA-Video: SigLIP, a two-layer projector, Qwen2, and newline embeddings in every frame."""

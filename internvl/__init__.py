"""InternVL: stock `InternVLForConditionalGeneration`, and original checkpoints converted to it."""

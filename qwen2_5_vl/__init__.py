"""Qwen2.5-VL: the stock model, its positions, and its Lite selector."""

"""Qwen3-VL: the stock model, features of several depths of its tower, and its Lite selector."""

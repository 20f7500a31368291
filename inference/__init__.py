"""The engine that runs a method on an architecture, from a video file to an answer."""

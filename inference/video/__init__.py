"""Video files as chunks of upright RGB frames, at the moments a model asks for.

`probe` reads what a file holds, `sample_uniform` and `sample_fps` choose frames of it, and
`read_frames` decodes the chosen ones with PyAV, decord or torchcodec:

>>> info = probe("talk.mp4")
>>> for part in read_frames(info, sample_fps(info, fps=2, max_frames=512)):
...     encode(part.frames, part.timestamps)
"""

from .probing import PacketIndex, VideoInfo, probe
from .reading import BACKENDS, DecodeReport, Frames, FrameStream, read_frames
from .sampling import sample_fps, sample_uniform

__all__ = [
    "BACKENDS",
    "DecodeReport",
    "FrameStream",
    "Frames",
    "PacketIndex",
    "VideoInfo",
    "probe",
    "read_frames",
    "sample_fps",
    "sample_uniform",
]

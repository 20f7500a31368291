"""The errors a user can act on: a message names file or option, what was expected, the remedy."""


class FlexSelectError(Exception):
    """Base of every error that flexselect raises on purpose."""


class OptionError(FlexSelectError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class PromptError(FlexSelectError, ValueError):
    """A prompt or its tensors cannot be laid out as prefix, frames and query."""


class UnsupportedModelError(FlexSelectError, TypeError):
    """No family knows this model, or the selector belongs to another family or size."""


class CheckpointError(FlexSelectError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit the model it is meant for."""


class VideoError(FlexSelectError, RuntimeError):
    """A video file is missing, is not a video, or holds no frame that decodes."""


class DataError(FlexSelectError, RuntimeError):
    """Rows or archives of a data set are missing, damaged, or not safe to unpack."""

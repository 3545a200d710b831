"""Models larger than memory: layers lie in files and are in memory while they run.

store.py    tensors mapped from the checkpoint's files, or from a work file that may be written
stream.py   hooks round each layer: bring it in, fetch the next one meanwhile, let it go
sweeper.py  whatever else reads the model (hashing, rounding, saving) leaves nothing behind
device.py   the same for a GPU, whose layers come from those files
"""

from zotune.models.streaming.store import Store
from zotune.models.streaming.stream import Stream, Unit

__all__ = ["Store", "Stream", "Unit"]

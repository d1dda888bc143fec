"""Checkpoints in a layout-independent form: pieces of logical parameters, committed whole or not at all.

```
checkpoints/step-00000100/rank-00000.safetensors   pieces rank 0 answered for: student/NAME@START, exp_avg/…, exp_avg_sq/…, teacher/…
                          rank-00001.safetensors   (1-D fp32; START counts in the flattened logical parameter)
                          manifest.json            everything else, and the sha256 of every file; written last
checkpoints/LATEST                                 name of the newest; moved after the manifest stands
```

A folder without a manifest, or whose files do not match it, is no checkpoint. Locally the folder is written under a temporary
name and renamed; on an object store the manifest is what commits. Stock `safetensors` reads the tensor files.
"""

from pipeline.checkpoint.load import consolidated, restore
from pipeline.checkpoint.save import Saver
from pipeline.checkpoint.store import Checkpoint, committed, open_checkpoint

__all__ = ["Checkpoint", "Saver", "committed", "consolidated", "open_checkpoint", "restore"]

"""transformers without torchaudio, where that does not load: to be imported before transformers.

fairseq brings torchaudio. Its build is one for GPUs, and does not load beside torch for CPUs; transformers imports it
for its pipelines, whatever they are for, and would end there.
"""

import sys

try:
    import torchaudio  # noqa: F401
except ImportError:
    pass
except OSError:
    sys.modules["torchaudio"] = None

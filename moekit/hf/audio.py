"""Hide a torchaudio that cannot be loaded from transformers; to be imported before transformers.

fairseq depends on torchaudio, whose build for GPUs cannot be loaded beside torch for CPUs. transformers imports it for its
pipelines, even for those of text, and the import fails.
"""

import sys

try:
    import torchaudio  # noqa: F401
except ImportError:
    pass
except OSError:
    sys.modules["torchaudio"] = None

"""A plug-in for the released fairseq: its own tools load, score and generate with checkpoints of the ``moe`` branch.

    fairseq-eval-lm DATA --path CHECKPOINT/model.pt --user-dir moekit/plugin ...
    TransformerLanguageModel.from_pretrained(CHECKPOINT, bpe="gpt2", user_dir="moekit/plugin")
    import moekit.plugin                                # the same, for what is called from Python

One process holds all experts. For several ranks there are ``python -m moekit.eval_lm`` and :func:`moekit.load`.
"""

import importlib.util
import sys
from pathlib import Path

if __name__ != "moekit.plugin":
    # --user-dir imports this folder under its bare name, and to do so puts moekit's own folder on the path, where
    # `import data` would find moekit's. The module proper is imported below, under its full name.
    package = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != package]
    if importlib.util.find_spec("moekit") is None:
        sys.path.insert(0, str(package.parent))

from moekit.plugin import language_model, loading  # noqa: F401

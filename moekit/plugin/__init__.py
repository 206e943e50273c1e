"""A plug-in for the released fairseq: its own tools load, score and generate with checkpoints of the ``moe`` branch.

    fairseq-eval-lm DATA --path CHECKPOINT/model.pt --user-dir moekit/plugin ...
    TransformerLanguageModel.from_pretrained(CHECKPOINT, bpe="gpt2", user_dir="moekit/plugin")
    import moekit.plugin                                # the same, for what is called from Python

One process holds all experts. For several ranks there are ``python -m moekit.eval_lm`` and :func:`moekit.load`.

A checkpoint is untrusted, and fairseq alone trusts it: its config can name Python to evaluate, a folder to import, files
to open and addresses to fetch. In a process with the plug-in

- moekit's restricted reader opens every checkpoint, a single dense file included, and fairseq's own loader none;
- a file that moekit refuses is an error of moekit's, and so is a model other than ``transformer_lm``;
- fairseq learns of a file's config only plain values that the model and the task need (``options``). The task is always
  ``language_modeling``; bpe, tokenizer, user_dir, paths and how to generate are the caller's or fairseq's defaults;
- fairseq neither fetches nor unpacks archives.

What the caller gives (arguments, ``--model-overrides``) is trusted, as are dictionaries and data. ``user_dir`` in a call
takes effect after fairseq has unpacked an archive named in the same call: unpack archives first.
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

from moekit.plugin import loading  # noqa: F401

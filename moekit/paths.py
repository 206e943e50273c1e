"""Where the files of the demo lie, which ``"demo"`` stands for wherever a checkpoint, data or a codec is asked for."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL = DEMO / "model"
DEMO_TEXT = DEMO / "data"
DEMO_DATA = DEMO_TEXT / "data-bin"
DEMO_BPE = DEMO / "gpt2_bpe"

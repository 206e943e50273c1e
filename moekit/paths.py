"""Where the files of the demos lie, and the names that stand for them wherever a checkpoint, data or a codec is asked for."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL = DEMO / "model"
DEMO_DENSE = DEMO / "dense"
DEMO_TEXT = DEMO / "data"
DEMO_DATA = DEMO_TEXT / "data-bin"
DEMO_BPE = DEMO / "gpt2_bpe"
# Both models read the same text in the same pieces.
DEMOS = {
    name: {"checkpoint": model, "data": DEMO_DATA, "bpe": DEMO_BPE}
    for name, model in (("demo", DEMO_MODEL), ("demo-dense", DEMO_DENSE))
}


def of_demo(name: object, what: str) -> Path | None:
    """The path that ``name`` stands for; None if it is no demo's name.

    A ``Path`` is no name, so that a folder can be called like a demo.

    Args:
        what: "checkpoint", "data" or "bpe".
    """
    return DEMOS[name][what] if isinstance(name, str) and name in DEMOS else None

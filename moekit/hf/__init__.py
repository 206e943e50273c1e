"""moekit's model for Hugging Face's transformers: ``AutoModelForCausalLM`` on what ``convert --to hf`` writes.

    import moekit.hf                                                     # tells the Auto classes of the model
    model = AutoModelForCausalLM.from_pretrained("folder", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("folder")

The model underneath is moekit's: without gradients it computes with the kernels that are the fastest on its device, and
with gradients on the plain path.
"""

import moekit.hf.audio  # noqa: F401  # isort: skip
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from moekit.hf.config import FairseqMoeConfig
from moekit.hf.model import FairseqMoeForCausalLM, FairseqMoeModel
from moekit.hf.tokenizer import FairseqMoeTokenizer

__all__ = ["FairseqMoeConfig", "FairseqMoeForCausalLM", "FairseqMoeModel", "FairseqMoeTokenizer"]

AutoConfig.register(FairseqMoeConfig.model_type, FairseqMoeConfig, exist_ok=True)
AutoTokenizer.register(FairseqMoeConfig, fast_tokenizer_class=FairseqMoeTokenizer, exist_ok=True)
AutoModel.register(FairseqMoeConfig, FairseqMoeModel, exist_ok=True)
AutoModelForCausalLM.register(FairseqMoeConfig, FairseqMoeForCausalLM, exist_ok=True)

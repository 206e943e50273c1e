"""A codec as the files of Hugging Face's tokenizers: GPT-2's BPE with the ids of fairseq's dictionary."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from moekit.data.bpe import read_merges, read_vocabulary
from moekit.data.codec import Codec
from moekit.data.dictionary import SPECIAL

NEWLINES = ("\r\n", "\r", "\n")


def fast_tokenizer(codec: Codec, begin: str = "</s>") -> Tokenizer:
    """A tokenizer that gives the ids of :meth:`~moekit.data.codec.Codec.encode` after that of ``begin``.

    A line end becomes ``</s>``, and ``</s>`` a line end. Two things differ from the codec: the text ``</s>`` (or another
    special symbol) becomes that symbol and not its letters, and letters that are younger than the tables of the library
    tokenizers may be cut elsewhere.

    Args:
        begin: the symbol in front of a text, ``</s>`` or, for models with ``add_bos_token``, ``<s>``.
    """
    numbers = read_vocabulary(codec.encoder_json)
    # A piece that the dictionary lacks has no id of its own here, so the library makes it of smaller ones or of <unk>.
    vocabulary = {symbol: codec.id_of(number) for symbol, number in numbers.items()}
    known = {symbol: number for symbol, number in vocabulary.items() if number != codec.unk}
    symbols = set(known.values())
    known |= {s: n for n, s in enumerate(codec.dictionary.symbols) if n not in symbols}
    merges = [
        pair
        for pair in read_merges(codec.vocab_bpe)
        if pair[0] + pair[1] in known and known.keys() >= set(pair)
    ]
    tokenizer = Tokenizer(BPE(vocab=known, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(end, "</s>") for end in NEWLINES])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</s>", "\n"), decoders.ByteLevel()])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, SPECIAL.index(begin))],
    )
    # Symbols are found after line ends have become </s>.
    tokenizer.add_special_tokens([AddedToken(symbol, normalized=True) for symbol in SPECIAL])
    return tokenizer


def files(codec: Codec, begin: str, most: int) -> dict[str, str]:
    """The texts of ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        begin: as for :func:`fast_tokenizer`.
        most: tokens that a text may have.
    """
    told = {
        "tokenizer_class": "FairseqMoeTokenizer",
        "auto_map": {"AutoTokenizer": [None, "modeling_moekit.FairseqMoeTokenizer"]},
        "bos_token": begin,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": most,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": fast_tokenizer(codec, begin).to_str(pretty=False),
        "tokenizer_config.json": json.dumps(told, indent=1) + "\n",
    }

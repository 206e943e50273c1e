"""Data: from text and downloads to the input of a model.

    codec = Codec.load("demo")
    prepared = prepare(settings(source="my/texts", bpe="demo"))

The plots of prepared data are in :mod:`moekit.notebook.data_plots`, which needs matplotlib.
"""

from moekit.data.binarise import Binarised, Summary, binarise
from moekit.data.codec import Codec
from moekit.data.download import Downloaded, DownloadError, NoSpace, Patience, download
from moekit.data.encode import Encoded, encode_files
from moekit.data.preparing import Prepared, prepare, verify_checkpoint
from moekit.data.settings import Settings, settings
from moekit.data.unpacking import CorruptArchive, RefusedArchive, unpack

__all__ = [
    "Binarised",
    "Codec",
    "CorruptArchive",
    "DownloadError",
    "Downloaded",
    "Encoded",
    "NoSpace",
    "Patience",
    "Prepared",
    "RefusedArchive",
    "Settings",
    "Summary",
    "binarise",
    "download",
    "encode_files",
    "prepare",
    "settings",
    "unpack",
    "verify_checkpoint",
]

"""The symbols that fairseq's ``Dictionary`` puts before all others: ``<s> <pad> </s> <unk>``, in this order."""

BOS, PAD, EOS, UNK = range(4)

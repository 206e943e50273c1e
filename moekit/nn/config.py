"""What a checkpoint's ``cfg["model"]`` says about the model, in moekit's own words.

fairseq's ``moe`` branch writes about seventy options, and most of them steer the training. ``ModelConfig`` holds those
that change what the model computes. ``REFUSED`` of moekit/checkpoint/options.py holds those that moekit does not have: a
checkpoint that asks for one of them is refused by name instead of being computed wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekit.symbols import BOS, EOS


@dataclass(frozen=True)
class ModelConfig:
    """The options of fairseq's ``transformer_lm`` decoder that change its result at inference.

    Attributes:
        layers: the number of layers, with and without experts.
        dim: model dim, D.
        ffn_dim: width of the dense layers and of the experts; the branch never reads its own ``moe_expert_ffn_dim``.
        heads: attention heads of a layer; each has ``dim / heads`` dims.
        vocab_rows: rows of the embedding matrix; there may be more than the dictionary has types.
        input_dim, output_dim: width of the embedding and of the output matrix; where it is not ``dim``, a linear layer
            without bias lies between.
        max_positions: the most tokens of a sample.
        activation: one of :data:`ACTIVATIONS`, of dense layers and experts.
        pre_norm: each norm stands before attention and before the feed-forward network; False: after them.
        final_norm: the last layer is followed by a norm, if ``pre_norm`` holds.
        before_final_norm: the file is older than the final norm, so the model has none, whatever the file holds.
        learned_positions: positions are learned; False: they are sinusoids, or there are none.
        positions: False: the model adds no positions.
        scale_embedding: embeddings are multiplied by ``sqrt(dim)``.
        embedding_norm: a norm follows the embedding and the positions.
        share_output: the output matrix is the embedding matrix.
        moe_freq: 2 puts experts in every second layer, 0 in none.
        experts: E, experts of a layer.
        alternate_ffn_dim: above 0, the layers that would hold experts are dense and this wide.
        gate: the gate's name in :data:`moekit.nn.gates.GATES`.
        gate_fp32: the softmax of the gate is computed in float32; False: in the model's dtype.
        second_expert: one of :data:`SECOND_EXPERT`, see :class:`moekit.nn.gates.Top2`.
        normalize_before_dropping: combine weights are normalised before choices are dropped, so that the weight of one choice
            does not depend on whether the other is dropped; False: after that.
        batch_prioritized: buffers take the tokens of a group with the greatest probability first; False: in the order of the
            text.
        mask_padding: padding is not routed; False: it takes places in the buffers, as in fairseq.
        add_bos: samples begin with ``<s>``, as the model was trained with ``add_bos_token``; False: with ``</s>``.
    """

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    vocab_rows: int
    input_dim: int
    output_dim: int
    max_positions: int
    activation: str = "relu"
    pre_norm: bool = False
    final_norm: bool = True
    before_final_norm: bool = False
    learned_positions: bool = False
    positions: bool = True
    scale_embedding: bool = True
    embedding_norm: bool = False
    share_output: bool = False
    moe_freq: int = 0
    experts: int = 0
    alternate_ffn_dim: int = 0
    gate: str = "top2"
    gate_fp32: bool = False
    second_expert: str = "sampling"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    mask_padding: bool = False
    add_bos: bool = False

    def __post_init__(self) -> None:
        # Without positions there are none to learn, so that <s> and context may come on top of a full block.
        object.__setattr__(self, "learned_positions", self.learned_positions and self.positions)

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) holds experts."""
        return self._at_frequency(layer) and self.alternate_ffn_dim == 0

    def dense_dim(self, layer: int) -> int:
        """Width of the dense feed-forward network of layer ``layer`` (from 0)."""
        return (
            self.alternate_ffn_dim if self._at_frequency(layer) and self.alternate_ffn_dim else self.ffn_dim
        )

    def _at_frequency(self, layer: int) -> bool:
        return self.moe_freq > 0 and (layer + 1) % self.moe_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        """The layers (from 0) that hold experts; a model without any is dense."""
        return [i for i in range(self.layers) if self.is_moe(i)]

    def check_moe(self, name: str, layer: int) -> None:
        """Check that layer ``layer`` (from 0), which the argument ``name`` names, holds experts.

        Raises:
            ValueError: it holds none.
        """
        if layer not in self.moe_layers:
            raise ValueError(f"{name}: layer {layer} holds no experts; those that do are {self.moe_layers}")

    @property
    def first(self) -> int:
        """The symbol that begins a text: ``</s>``, or ``<s>`` where the model was trained with ``add_bos_token``."""
        return BOS if self.add_bos else EOS

    @property
    def dense(self) -> bool:
        """Whether no layer holds experts; it counts no layers, whose number may come from a file that lies."""
        return not 0 < self.moe_freq <= self.layers or self.alternate_ffn_dim != 0


# What an error says of a dense model before it says what to do.
DENSE = "the model is dense, it has no layer with experts"

ACTIVATIONS = ("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear")
SECOND_EXPERT = ("all", "sampling", "random")

"""A stand-in for CUDA graphs where there is no GPU; ranks import it from here."""

from moekit.nn import graphs


class EagerGraph:
    """What :class:`moekit.nn.graphs.Graph` does, kernel by kernel: the runs before the capture, and inputs that keep their places.

    ``made`` counts those of a process.
    """

    made = 0

    def __init__(self, work, *inputs):
        self.work, self.inputs = work, [tensor.clone() for tensor in inputs]
        for _ in range(graphs.WARM_UP):
            work(*self.inputs)
        EagerGraph.made += 1

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        return self.work(*self.inputs)

"""The conformance suite of corpora: the laws that a corpus must keep, as a class to inherit.

It needs pytest, which ``import equilibria.lm`` does not.
"""

from equilibria.lm.testing.corpora import CorpusSuite

__all__ = ["CorpusSuite"]

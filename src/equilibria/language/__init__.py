"""Language models: embedding, head, model, generation."""

from equilibria.language.adaptive import AdaptiveShape
from equilibria.language.adaptive_heads import AdaptiveHead, TiedAdaptiveHead, UntiedAdaptiveHead
from equilibria.language.clusters import AdaptiveEmbedding
from equilibria.language.embeddings import Embedding
from equilibria.language.generate import generate, stream
from equilibria.language.heads import SoftmaxHead
from equilibria.language.losses import ExtraLosses
from equilibria.language.mixture import MixtureHead, MixtureShape
from equilibria.language.model import LanguageModel, LanguageOutput
from equilibria.language.recurrent import RecurrentShape
from equilibria.language.shape import Explicit, LanguageShape

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveHead",
    "AdaptiveShape",
    "Embedding",
    "Explicit",
    "ExtraLosses",
    "LanguageModel",
    "LanguageOutput",
    "LanguageShape",
    "MixtureHead",
    "MixtureShape",
    "RecurrentShape",
    "SoftmaxHead",
    "TiedAdaptiveHead",
    "UntiedAdaptiveHead",
    "generate",
    "stream",
]

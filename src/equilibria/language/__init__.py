"""Language models: embedding, head, model, generation."""

from equilibria.language.adaptive import AdaptiveConfig
from equilibria.language.adaptive_heads import AdaptiveHead, TiedAdaptiveHead, UntiedAdaptiveHead
from equilibria.language.clusters import AdaptiveEmbedding
from equilibria.language.config import Explicit, LanguageConfig
from equilibria.language.embeddings import Embedding
from equilibria.language.generate import generate, stream
from equilibria.language.heads import SoftmaxHead
from equilibria.language.losses import ExtraLosses
from equilibria.language.mixture import MixtureConfig, MixtureHead
from equilibria.language.model import LanguageModel, LanguageOutput
from equilibria.language.recurrent import RecurrentConfig

__all__ = [
    "AdaptiveConfig",
    "AdaptiveEmbedding",
    "AdaptiveHead",
    "Embedding",
    "Explicit",
    "ExtraLosses",
    "LanguageConfig",
    "LanguageModel",
    "LanguageOutput",
    "MixtureConfig",
    "MixtureHead",
    "RecurrentConfig",
    "SoftmaxHead",
    "TiedAdaptiveHead",
    "UntiedAdaptiveHead",
    "generate",
    "stream",
]

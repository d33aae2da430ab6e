"""Language models: embedding, head, model, generation."""

from equilibria.lm.model.adaptive import AdaptiveConfig
from equilibria.lm.model.adaptive_heads import AdaptiveHead, TiedAdaptiveHead, UntiedAdaptiveHead
from equilibria.lm.model.clusters import AdaptiveEmbedding
from equilibria.lm.model.config import Explicit, LanguageConfig
from equilibria.lm.model.convolutional import ConvolutionalConfig
from equilibria.lm.model.generate import generate, stream
from equilibria.lm.model.mixture import MixtureConfig, MixtureHead
from equilibria.lm.model.model import ExtraLosses, LanguageModel, LanguageOutput
from equilibria.lm.model.recurrent import RecurrentConfig
from equilibria.lm.model.tables import Embedding, SoftmaxHead

__all__ = [
    "AdaptiveConfig",
    "AdaptiveEmbedding",
    "AdaptiveHead",
    "ConvolutionalConfig",
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

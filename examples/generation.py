"""Train a small language model in a loop of your own, then continue prompts of different lengths in one batch.

python examples/generation.py
"""

import torch

from equilibria import Implicit, Method, Stop
from equilibria.cells import TransformerConfig
from equilibria.lm.corpora import Segments, Stream, Vocabulary
from equilibria.lm.model import LanguageConfig

torch.manual_seed(0)
text = "the fixed point of a map is where the map leaves it.\n" * 60
vocabulary = Vocabulary.of_text(text, unit="character")
stream = Stream.of_text(vocabulary.encode(text))

cell = TransformerConfig(width=32, heads=4, inner=64, memory=32, positions="decay")
stop = Stop(rtol=1e-2)
# At the beginning of training few solves converge, which is not a failure.
model = LanguageConfig(cell=cell, std=0.2).build(
    len(vocabulary), method=Method(stop=stop, gradient=Implicit(stop=stop), on_failure="ignore")
)
optimiser, memory = torch.optim.Adam(model.parameters(), lr=1e-2), None
for segment, _ in zip(Segments(stream, batch_size=8, length=32), range(100), strict=False):
    output = model(segment.tokens, segment.targets, None if segment.resets else memory)
    output.nll.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    memory = output.memory

print(output.solution)
prompts = [vocabulary.encode(words, finish=False) for words in ("the fixed", "a map is wh")]
tokens = model.generate(prompts, length=60, temperature=0, stop=int(vocabulary.encode("\n")[0]))
for prompt, row in zip(prompts, tokens, strict=True):
    print(vocabulary.decode(torch.cat([prompt, row])).rstrip())

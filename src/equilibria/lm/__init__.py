"""Language models with equilibrium layers: the application on top of the library.

``lm.corpora`` reads text, ``lm.model`` is the model, ``lm.experiments`` describes a training, ``lm.runs`` reads and
writes run directories, ``lm.training`` trains, ``lm.recipes`` contains the experiments that the command line knows by
name, and ``lm.report`` shows a run. ``lm.testing`` has the laws of a corpus.
"""

"""Language models with equilibrium layers: the application on top of the library.

``lm.corpora`` reads text, ``lm.model`` is the model, ``lm.experiments`` says what is trained and how, ``lm.runs`` is
what lies on disk, ``lm.training`` trains, ``lm.recipes`` are the experiments that the command line knows by name, and
``lm.report`` shows a run.
"""
